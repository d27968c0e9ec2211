"""Are the command line's answers quick, and are they right?

- `start`: wall time of `offload --help` and of `offload plan`, from the shell, warm.
- `families`: of transformers' classes that decode, those whose default config plans, those that are refused by name, and
  those whose weights are as many as the model of that config has, built on `meta`.
- `profile`: an 8B-shaped Llama with random weights under the 24 GB cap: device bytes and times as planned and as measured.
- `largest`: the context that a plan calls largest under that cap is generated, a page more is refused.

- `tune`: what `offload tune` finds for a prompt that does not fit under that cap, beside the defaults.

`profile`, `largest` and `tune` need a card.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _record import Record, arguments, parse
from decode import free
from generate import CAP_BYTES, build_model, file_shape

from offload.checkpoint import describe
from offload.cli.tune import measurer, predictor
from offload.config import OffloadConfig
from offload.errors import BudgetError, OffloadError, UnsupportedModelError
from offload.plan import Machine, plan
from offload.profile import profile
from offload.runtime import attach
from offload.scheduler.profiles import profile_of
from offload.tune import Runs, tune

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2**20,
}  # fmt: skip
OUTPUT = 64
TUNED_OUTPUT = 512
_WEIGHED = 80e9  # parameters up to which a kind is built: `meta` takes no memory, but time


def measure_start(record: Record, repeats: int) -> None:
    """Wall time of commands, from the shell."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA_8B))
        plan_it = ["plan", "--model", str(config), "--context", "128K", "--gpu", "rtx4090"]
        for name, asked in (("help_s", ["--help"]), ("plan_s", plan_it)):
            times = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                run = subprocess.run([sys.executable, "-P", "-m", "offload", *asked], capture_output=True, check=True)  # fmt: skip
                times.append(time.perf_counter() - began)
                assert run.stdout
            record.row(name, seconds=times[1:], command=" ".join(asked[:1]))
            record.bars[name] = statistics.median(times[1:])


def _weights(kind: str) -> int | None:
    """Weights of a model of the default config; None where it cannot be built, or is too large."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    except Exception:  # noqa: BLE001 - not every kind can be built from its defaults
        return None
    # Tables of positions are no parameters, and in float32.
    tables = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("embed_positions"))
    return int(sum(p.numel() for p in model.parameters()) + tables // 2)


def measure_families(record: Record, kinds: list[str] | None) -> None:
    """Which kinds of model plan by their default config."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    roomy = profile_of("h200")
    machine = Machine(profile=roomy, device=2**44, host=2**44)
    settings = OffloadConfig.build(None, mode="exact")
    planned, refused, crashed, same, differ, decoders = [], {}, {}, [], {}, 0
    not_run, not_built = (
        [],
        [],
    )  # of the refused: by the runtime too; by transformers, which cannot make its default model
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception as error:  # noqa: BLE001 - it has no default config
            record.row(f"no config: {kind}", error=str(error)[:100])
            continue
        encodes = config.is_encoder_decoder or getattr(config, "is_decoder", True) is False
        if encodes:
            continue
        decoders += 1
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(config.to_json_string(use_diff=False))
            try:
                shape = describe(file)
                plan(
                    settings,
                    shape,
                    machine,
                    context=min(4096, shape.max_positions or 4096),
                    output=64,
                )
            except OffloadError as error:
                refused[kind] = str(error)
                if isinstance(error, UnsupportedModelError):
                    not_run.append(kind)
                elif _weights(kind) is None:
                    not_built.append(kind)
                continue
            except Exception as error:  # noqa: BLE001 - what must not be
                crashed[kind] = repr(error)
                continue
        planned.append(kind)
        if shape.weights > 2 * _WEIGHED:
            continue
        there = _weights(kind)
        if there is not None:
            counted = shape.weights // 2
            same.append(kind) if counted == there else differ.update({kind: [counted, there]})
    record.row(
        "families", decoders=decoders, planned=planned, refused=refused, crashed=crashed, weights_same=same,
        weights_differ=differ, refused_by_the_runtime=not_run, not_built_by_transformers=not_built,
    )  # fmt: skip
    record.bars["plan_families_planned"] = len(planned) / max(1, decoders)
    # What the bar could be at most with the models that run.
    record.bars["plan_families_reachable"] = 1 - (len(not_run) + len(not_built)) / max(1, decoders)
    record.bars["plan_families_crashed"] = len(crashed)
    record.bars["plan_families_weights_same"] = len(same)


def measure_profile(record: Record, model: Any, contexts: list[int], mode: str) -> None:
    """Planned and measured, at the 8B shape."""
    settings = OffloadConfig.build(None, mode=mode, gpu_memory=CAP_BYTES)
    machine = Machine(profile=profile_of("h100"), device=CAP_BYTES, host=2**40)
    shape = file_shape(model.config, str(model.dtype).removeprefix("torch."))
    errors, under, unaccounted, times = [0.0], 0, [0.0], [0.0]
    for context in contexts:
        ids = torch.randint(1, model.config.vocab_size, (1, context - OUTPUT), device=model.device)
        said = plan(settings, shape, machine, context=context, output=OUTPUT)
        found = profile(model, settings, ids, max_new_tokens=OUTPUT, looked_at=0)
        free()
        assert said.times is not None
        assert said.layout is not None
        assert found.peak is not None
        assert found.unaccounted is not None
        middle = statistics.median(found.token_ms) if mode != "verified" else 1000 * found.report.decode_s / OUTPUT  # fmt: skip
        share = said.layout.device_bytes / found.peak - 1
        record.row(
            f"profile {mode} {context}", planned_bytes=said.layout.device_bytes, measured_bytes=found.peak,
            planned_parts=said.layout.device, unaccounted_bytes=found.unaccounted,
            runtime_planned_bytes=sum(part.planned for part in found.device),
            parts=[[part.purpose, part.planned, part.measured] for part in found.device],
            planned_ms=1000 * said.times.token, measured_ms=middle,
            planned_prefill_s=said.times.prefill, measured_prefill_s=found.report.prefill_s,
            error="bytes: of the whole device as the driver counts; ms: median of the tokens",
        )  # fmt: skip
        errors.append(abs(share))
        under += share < 0
        unaccounted.append(abs(found.unaccounted) / found.peak)
        times.append(abs(1000 * said.times.token / middle - 1))
        gc.collect()
    record.bars["plan_bytes_error_max"] = max(errors)
    record.bars["plan_bytes_under"] = under
    record.bars["unaccounted_share"] = max(unaccounted)
    record.bars["plan_ms_error_max"] = max(times)


def measure_largest(record: Record, model: Any, cap: int) -> None:
    """The largest context that a plan gives is generated; the plan refuses a page more; the largest that fits is searched."""
    host = 24 * 2**30
    settings = OffloadConfig.build(None, mode="exact", gpu_memory=cap, cpu_memory=host)
    machine = Machine(profile=profile_of("h100"), device=cap, host=host)
    shape = file_shape(model.config, str(model.dtype).removeprefix("torch."))
    largest = plan(settings, shape, machine, context=8192, output=OUTPUT).largest
    more = plan(settings, shape, machine, context=largest + settings.cache.page, output=OUTPUT)
    fits, refused = 0, 2 * largest
    for tokens in (largest, largest - largest // 20, largest + largest // 20):
        fits, refused = _tried(model, settings, tokens, fits, refused)
    while refused - fits > settings.cache.page:
        fits, refused = _tried(model, settings, (fits + refused) // 2, fits, refused)
    ids = torch.randint(1, model.config.vocab_size, (1, largest - OUTPUT), device=model.device)
    with attach(model, settings) as runtime:
        began = time.perf_counter()
        made = runtime.generate(ids, max_new_tokens=OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        seconds, report = time.perf_counter() - began, runtime.report()
    free()
    ran = made.shape[1] == largest
    record.row(
        "largest", planned=largest, generated=made.shape[1], seconds=seconds, bytes=report.bytes, largest_that_fits=fits,
        a_page_more=more.verdict, error="the searched ones are laid out and allocated, not generated",
    )  # fmt: skip
    record.bars["largest_context_share"] = largest / max(largest, fits) if ran and more.missing else 0.0  # fmt: skip


def _tried(
    model: Any, settings: OffloadConfig, tokens: int, fits: int, refused: int
) -> tuple[int, int]:
    """The most tokens that fit and the fewest that do not, so many tried too."""
    with attach(model, settings) as runtime:
        try:
            cache = runtime.new_cache(max_tokens=tokens)
            cache.start(1)
            cache.close("it was only to see whether it fits")
            fits = max(fits, tokens)
        except BudgetError:
            refused = min(refused, tokens)
    free()
    return fits, refused


def measure_tune(
    record: Record, model: Any, prompt: int, cap: int, limit_s: float, kept: str | None
) -> None:
    """What `offload tune` finds for a prompt, beside the defaults."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(model.config.to_json_string(use_diff=False))
        ids = torch.randint(1, model.config.vocab_size, (1, prompt), device=model.device)
        settings = OffloadConfig.build(None, gpu_memory=cap)
        outcomes = Path(kept or Path(folder) / "runs.json")
        runs = Runs(outcomes, {})
        found = tune(
            settings, measurer(model, ids, TUNED_OUTPUT), runs, objective="speed", output=TUNED_OUTPUT, prompt=prompt,
            predict=predictor(str(file), "bfloat16", prompt, TUNED_OUTPUT, settings), until=time.monotonic() + limit_s, tell=print,
        )  # fmt: skip
        made = json.loads(outcomes.read_text())
    before, after = found.before.seconds(TUNED_OUTPUT), found.after.seconds(TUNED_OUTPUT)
    record.row(
        f"tune {prompt}", settings=found.settings, before_s=before, after_s=after, runs=found.runs, skipped=found.skipped,
        is_over=found.is_over, output=TUNED_OUTPUT, made=made, errors=[found.before.error, found.after.error],
        error="of two further runs each; the expected error of an attention layer beside them",
    )  # fmt: skip
    record.bars["tune_gain"] = before / after


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", nargs="*", default=["start", "families", "profile", "largest", "tune"]
    )
    parser.add_argument("--tuned", type=int, default=53248, help="tokens of the prompt to tune for")
    parser.add_argument(
        "--tune-s", type=float, default=300, help="seconds after which no run of tune begins"
    )
    parser.add_argument("--tune-runs", help="a file of runs of an earlier search, which goes on")
    parser.add_argument("--contexts", nargs="*", type=int, default=[32768, 131072, 262144])
    parser.add_argument("--mode", default="fast")
    parser.add_argument("--repeats", type=int, default=7)
    args = parse(parser)
    on_card = torch.cuda.is_available()
    record = Record("cli", settings={**vars(args), "out": None})
    if "start" in args.only:
        measure_start(record, 1 if args.smoke else args.repeats)
    if "families" in args.only:
        measure_families(record, ["llama", "gpt2", "mamba"] if args.smoke else None)
    if on_card and {"profile", "largest", "tune"} & set(args.only):
        model = build_model(args.smoke, torch.device("cuda"))
        if "largest" in args.only:  # first: libraries keep memory of every run
            measure_largest(record, model, CAP_BYTES)
        if "profile" in args.only:
            measure_profile(record, model, [4096] if args.smoke else args.contexts, args.mode)
        if "tune" in args.only:
            tuned = 4096 if args.smoke else args.tuned
            measure_tune(record, model, tuned, CAP_BYTES, args.tune_s, args.tune_runs)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
