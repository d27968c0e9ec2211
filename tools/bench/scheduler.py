"""Do the scheduler's decisions pay? Measured on real models, a decision against its absence.

- `ladder`: KL(dense || ours) in nats of the next token with each layer's bits chosen by what the prompt says, against one
  rung everywhere, under the same device budget. Mode fast through the product, in float32, one token at a time behind a
  context (`tools/fidelity.py`).

- `hidden`: milliseconds of a step of mode exact that streams the inputs of attention beside keys and values, against one
  that streams keys and values; a random model of Llama-2-7B's shape, one sequence, under the 24 GB cap.
- `schedule`: the same of OPT-6.7B's shape, 64 sequences of 128 + 512 tokens, under 16 GiB; against the best of some static
  splits, which keep a window on the device and stream the rest, copies and attention overlapped.
- `alisa`: whole answers of the same 64 sequences by steps that attend to a fifth of the tokens (`scheduler.sparsity`), against the best
  static split of `schedule`, and against whole sequences that come and go: the policy of `offload.scheduler.simulate.RequestSwap`, each of
  its steps priced by measured steps of as many sequences, swaps for nothing.
- `sparse`: KL(dense || ours) of `alisa`'s steps on real models, against the window alone (`tools/fidelity.py`).
- `sweep`: the same model as `hidden`, under the plan that is chosen and under others: the share of tokens that is kept as inputs,
  and the size of the buffers through which pages stream. The bar is the chosen one's time to that of the fastest, at the worse of
  both questions.

    python tools/bench/scheduler.py --only ladder --model smollm2@2048 --model qwen.gguf@2048
    python tools/bench/scheduler.py --only hidden schedule alisa
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _record import Record, arguments, parse
from decode import free
from fidelity import Case, behind_context, dense, divergence, fed, prepare
from generate import CAP_BYTES
from transformers import AutoConfig, AutoModelForCausalLM

import offload
from offload.decode import captured_steps
from offload.errors import BudgetError
from offload.scheduler.cost import Heads, Shape
from offload.scheduler.layout import REPLICA_WINDOW
from offload.scheduler.profiles import profile_of
from offload.scheduler.simulate import RequestSwap, Setting

UNIFORM = ("3k3v", "4k4v")  # the bar is that of the first


@torch.no_grad()
def decoded(case: Case, **settings: Any) -> dict[str, Any]:
    """Logits [steps, V] of mode fast, and how its cache was laid out."""
    common: dict[str, Any] = {
        "window": REPLICA_WINDOW,
        "chunk": 512,
        "staging": "2MiB",
        "capture": False,
    }
    with offload.attach(case.model, mode="fast", **common | settings) as runtime:
        began = time.perf_counter()
        cache = behind_context(runtime, case)
        seconds = time.perf_counter() - began
        steps = range(case.context, case.ids.shape[1])
        logits = [fed(case, cache, at).logits[0].float().cpu() for at in steps]
        layout = cache.layout
        assert layout is not None
        found = {
            "device_bytes": layout.device_bytes, "replica_bytes": layout.device["replica"],
            "bits": [16 if i in layout.whole else rung.bits for i, rung in enumerate(layout.rungs)],
            "exact_tokens": [rung.tokens for rung in layout.rungs],
            "prefill_s": seconds,
        }  # fmt: skip
    return {"logits": torch.cat(logits), **found}


def measure_ladder(
    record: Record, models: list[str], context: int, steps: int, rungs: list[str]
) -> None:
    """Against one rung everywhere, under the device budget that it needs."""
    ratios = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for given in models:
        source, _, asked = given.partition("@")
        case = prepare(source, int(asked or context), steps, torch.float32, device)
        want, _, _ = dense(case, step=steps)
        for rung in rungs:
            uniform = decoded(case, rung=rung)
            budget = uniform["device_bytes"]
            ladder = decoded(case, gpu_memory=budget, ladder=True)
            kl = []
            for what, found in ((rung, uniform), (f"ladder, bytes of {rung}", ladder)):
                moved = divergence(want, found["logits"], case.model.device)
                kl.append(moved["kl_mean"])
                row = {name: value for name, value in found.items() if name != "logits"}
                record.row(
                    f"{Path(source).name}: {what}", context=case.context, steps=steps, budget=budget, **row, **moved,
                    error="KL in nats, against transformers' own cache",
                )  # fmt: skip
            if rung == rungs[0]:
                ratios.append(kl[1] / kl[0])
        del case, want
        free()
    record.bars["ladder_vs_uniform_error"] = max(ratios)


LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2**17,
}  # fmt: skip
OPT_6_7B: dict[str, Any] = {
    "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 4096,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
HIDDEN = {"recompute": "hidden"}
SEQUENCES, PROMPT, ANSWER, SPARSITY = (
    64,
    128,
    512,
    0.8,
)  # the heaviest setting of ALISA's (arXiv 2403.17312)


def random_model(kind: str, smoke: bool) -> Any:
    """A model of some shape with random weights, in bfloat16 on the card."""
    small = {"llama": {"intermediate_size": 128, "num_key_value_heads": 4}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}}  # fmt: skip
    shape = LLAMA_2_7B if kind == "llama" else OPT_6_7B
    shape = shape | SMALL | small[kind] if smoke else shape
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(kind, **shape)
    with device if kind == "llama" else torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if kind == "opt":  # weights alone: copies that an initialisation makes leave holes between them
        model.to_empty(device=device)
        model.tie_weights()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.02)
                else:
                    weight.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model.eval()


def opt_settings(smoke: bool) -> dict[str, Any]:
    """Of runs of OPT-6.7B's shape."""
    common: dict[str, Any] = {"page": 16, "sinks": 0, "chunk": 16, "staging": "64MiB"}
    return common if smoke else common | {"gpu_memory": "16GiB"}


@torch.no_grad()
def fed_steps(
    model: Any, ids: torch.Tensor, total: int, steps: int, *, mode: str = "exact", **settings: Any
) -> dict[str, Any]:
    """Milliseconds of steps behind a prompt, and their logits [B, steps, V]; the first three are not counted.

    They are captured, as those of `generate` are.

    Args:
        model: Not attached.
        ids: The prompt [B, N], and behind it a token for each step.
        total: Tokens that the cache is laid out for.
        steps: How many are fed.
        mode: As for `attach`; likewise the others.
        settings: Likewise.
    """
    on_card = ids.device.type == "cuda"
    free()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    with offload.attach(model, mode=mode, **settings) as runtime:
        cache = runtime.new_cache(max_tokens=total)
        began, prompt = time.perf_counter(), ids.shape[1] - steps
        # Two tokens: then what prefill needed and decoding does not is filled with copies of pages.
        more: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        runtime.generate(ids[:, :prompt], cache=cache, max_new_tokens=2, **more)
        cache.crop(prompt - cache.get_seq_length())
        seconds = time.perf_counter() - began
        times, logits = [], []
        before = runtime.report().h2d_bytes
        with captured_steps(model, cache, compiles=False) as captured:
            for at in range(prompt, prompt + steps):
                begun = time.perf_counter()
                where = torch.full((ids.shape[0], 1), at, device=ids.device)
                made = model(
                    input_ids=ids[:, at : at + 1],
                    position_ids=where,
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits
                if on_card:
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - begun))
                logits.append(made.float().cpu())
            replays, why = captured.replays, captured.reason
        report = runtime.report()
        layout = cache.layout
        assert layout is not None
        found = {
            "step_ms": statistics.median(times[3:]), "replays": replays, "not_captured": why, "all_ms": times, "prefill_s": seconds,
            "h2d_bytes_per_step": (runtime.report().h2d_bytes - before) / steps,
            "resident_bytes": report.bytes["resident"], "window_bytes": report.bytes["window"],
            "device_bytes_planned": layout.device_bytes, "host_bytes": layout.host_bytes,
            "recomputed_of_page": 0 if layout.hidden is None else layout.hidden.tokens / layout.page,
            "fixed_bytes": sum(n for part, n in layout.device.items() if part not in ("sinks and window", "tail", "staging", "eviction")),
        }  # fmt: skip
        if on_card:
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        cache.close("it was measured")
    return found | {"logits": torch.cat(logits, dim=1)}


def error_of(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What one run's logits are off by from another's."""
    ours, theirs = found.pop("logits"), wanted["logits"]
    off = (ours - theirs).abs()
    return {
        "logit_error_max": float(off.max()), "logit_error_mean": float(off.mean()), "logit_std": float(theirs.std()),
        "kl_mean": float((theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()),
        "same_top": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "error": "logits against those of keys and values streamed, same tokens fed",
    }  # fmt: skip


def measure_hidden(record: Record, contexts: list[int], steps: int, smoke: bool) -> None:
    """Inputs of attention streamed beside keys and values, against these alone."""
    model = random_model("llama", smoke)
    for context in contexts:
        ids = torch.randint(3, model.config.vocab_size, (1, context + steps), device=model.device)
        common: dict[str, Any] = (
            {"window": 256, "chunk": 256} if smoke else {"gpu_memory": CAP_BYTES}
        )
        fetched = fed_steps(model, ids, context + steps, steps, **common)
        ours = fed_steps(model, ids, context + steps, steps, scheduler=HIDDEN, **common)
        moved = error_of(ours, fetched)
        fetched.pop("logits")
        record.row(
            f"hidden {context}: keys and values",
            context=context,
            **fetched,
            error="is the reference",
        )
        record.row(f"hidden {context}: inputs", context=context, **ours, **moved)
        if context == 32768 or smoke:  # the bar's own length; a small run shows that it is recorded
            record.bars["hidden_vs_fetch_32k_mha"] = fetched["step_ms"] / ours["step_ms"]
    del model
    free()  # or the next model comes to lie in what is left of this one


def measure_sweep(record: Record, context: int, steps: int, rounds: int, smoke: bool) -> None:
    """The chosen plan against others, each measured in turn some times; of a plan the fastest round counts."""
    model = random_model("llama", smoke)
    ids = torch.randint(3, model.config.vocab_size, (1, context + steps), device=model.device)
    common: dict[str, Any] = {"window": 256, "chunk": 256} if smoke else {"gpu_memory": CAP_BYTES}
    shares: list[dict[str, Any]] = [{"recompute": "off"}, *({"recompute": "hidden", "recomputed": x} for x in (0.25, 0.5, 0.75, 1.0))]  # fmt: skip
    sizes = ["1MiB", "2MiB"] if smoke else ["8MiB", "32MiB", "64MiB", "128MiB", "256MiB"]
    questions: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "recomputed": [("chosen", {"scheduler": HIDDEN}), *((f"{x.get('recomputed', 0)}", {"scheduler": x}) for x in shares)],
        "staging": [("chosen", {}), *((size, {"staging": size}) for size in sizes)],
    }  # fmt: skip
    worst = 0.0
    for question, plans in questions.items():
        times: dict[str, list[float]] = {name: [] for name, _ in plans}
        off: dict[str, dict[str, Any]] = {}
        wanted: dict[str, Any] | None = None
        for _ in range(rounds):
            for name, settings in plans:
                found = fed_steps(model, ids, context + steps, steps, **common, **settings)
                times[name].append(found["step_ms"])
                if wanted is None:
                    wanted = {"logits": found["logits"]}
                off[name] = error_of(found, wanted) | {"h2d_bytes_per_step": found["h2d_bytes_per_step"]}  # fmt: skip
        best = {name: min(each) for name, each in times.items()}
        for name, ms in best.items():
            record.row(f"sweep {context}, {question} {name}", step_ms=ms, all_ms=times[name], **off[name] | {"error": "logits against those of the chosen plan, same tokens fed"})  # fmt: skip
        chosen = best.pop("chosen")
        # What is chosen may be one of the others, measured again: the faster of both is no plan that was missed.
        worst = max(worst, chosen / min(chosen, *best.values()))
    record.bars["plan_vs_best_of_sweep"] = worst
    del model
    free()


def measure_schedule(
    record: Record, lengths: list[int], windows: list[int], steps: int, smoke: bool
) -> float:
    """Whole answers of 64 sequences: steps at some lengths, with what is between them in proportion.

    Returns:
        Tokens per second of the best static split.
    """
    model = random_model("opt", smoke)
    batch, total = (4 if smoke else SEQUENCES), PROMPT + ANSWER
    ids = torch.randint(3, model.config.vocab_size, (batch, total), device=model.device)
    common = opt_settings(smoke)
    speeds: dict[str, float] = {}
    kept: dict[int, Any] = {}
    for name, window, more in [("static split", w, {}) for w in windows] + [
        ("ours, exact", windows[0], HIDDEN)
    ]:
        at: list[tuple[int, float]] = []
        try:
            for length in lengths:
                fed = ids[:, : length + steps]
                settings: dict[str, Any] = {"scheduler": more} if more else {}
                found = fed_steps(
                    model,
                    fed,
                    total,
                    steps,
                    window=window,
                    **common,
                    **settings,
                )
                at.append((length, found["step_ms"]))
                moved = {"error": "is the reference"}
                if more:
                    moved = error_of(found, kept[length])
                elif window == windows[0]:
                    kept[length] = {"logits": found["logits"]}
                found.pop("logits", None)
                record.row(
                    f"{name}, window {window}, {length} tokens",
                    window=window,
                    length=length,
                    batch=batch,
                    **found,
                    **moved,
                )
        except BudgetError as error:
            record.row(f"{name}, window {window}", window=window, refused=str(error))
            continue
        mean = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(at)) / (
            at[-1][0] - at[0][0]
        )
        speed = 1000 * batch / mean
        record.row(
            f"{name}, window {window}",
            window=window,
            tokens_per_s=speed,
            mean_step_ms=mean,
            error="of its steps above",
        )
        speeds[name] = max(speed, speeds.get(name, 0.0))
    record.bars["schedule_vs_static_split_equal_output"] = (
        speeds["ours, exact"] / speeds["static split"]
    )
    return speeds["static split"]


def answers(model: Any, ids: torch.Tensor, new: int, **settings: Any) -> dict[str, Any]:
    """Tokens per second of whole answers, prompts aside, of mode fast through `generate`; and what its report says."""
    free()
    with offload.attach(model, mode="fast", **settings) as runtime:
        call: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        runtime.generate(ids, max_new_tokens=new, **call)
        report = runtime.report()
        planned = runtime._last.layout
        assert planned is not None
        return {
            "batch": ids.shape[0], "prompt": ids.shape[1], "new_tokens": report.new_tokens,
            "tokens_per_s": ids.shape[0] * report.new_tokens / (report.decode_s - report.capture_s),
            "step_ms": 1000 * (report.decode_s - report.capture_s) / report.new_tokens,
            "decode_s": report.decode_s, "capture_s": report.capture_s, "replayed_steps": report.replayed_steps,
            "predicted_ms": report.predicted_ms, "prefill_s": report.prefill_s, "rung": report.rung,
            "near": [rung.near for rung in planned.rungs], "far": [rung.far for rung in planned.rungs],
            "tokens_on_host": report.tokens_on_host, "host_bytes_a_step": report.fetched_bytes,
            "device_bytes_planned": planned.device_bytes, "window": planned.window_blocks * planned.page,
            "left_out": report.left_out, "notes": report.notes,
        }  # fmt: skip


def swapped_seconds(
    steps_ms: dict[int, list[tuple[int, float]]], setting: Setting, requests: int, link: float
) -> tuple[float, int]:
    """Seconds and steps of `requests` answers by whole sequences that come and go; swaps overlap with steps.

    Args:
        steps_ms: For numbers of sequences tokens of each and milliseconds of a step, measured.
        setting: That says what fits.
        requests: Sequences of the workload.
        link: Bytes per second.
    """
    if not steps_ms:
        raise SystemExit("no step was measured with all on the device: give smaller --groups")
    policy = RequestSwap(setting)
    lengths, left = [PROMPT] * requests, [ANSWER] * requests
    seconds, steps = 0.0, 0
    while waiting := [i for i, n in enumerate(left) if n]:
        turn = policy.turn(lengths, waiting)
        n, mean = len(turn.active), sum(lengths[i] for i in turn.active) / len(turn.active)
        # Of the measured numbers of sequences the next one below: no slower than it is, if the smallest one is small enough.
        known = steps_ms[max((b for b in steps_ms if b <= n), default=min(steps_ms))]
        ms = min(known, key=lambda at: abs(at[0] - mean))[1]
        seconds += max(ms / 1000, turn.where.bytes_in / link)
        steps += 1
        for i in turn.active:
            left[i] -= 1
            lengths[i] = lengths[i] + 1 if left[i] else 0
    return seconds, steps


def measure_alisa(record: Record, split: float, groups: list[int], smoke: bool) -> None:
    """A fifth of the tokens, against a static split and whole sequences that come and go.

    Args:
        record: Where it is written.
        split: Tokens per second of the best static split.
        groups: Numbers of sequences of which steps with all on the device are measured.
        smoke: Small.
    """
    model = random_model("opt", smoke)
    batch, new = (4, 200) if smoke else (SEQUENCES, ANSWER)
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT + new), device=model.device)
    common = opt_settings(smoke) | ({"window": 48} if smoke else {})
    # Steps have no use for staging: a page of each sequence.
    ours: dict[str, Any] = {"sparsity": SPARSITY} | common | {"staging": "16MiB"}
    answers(model, ids[:, :PROMPT], new, **ours)  # compiles kernels
    found = answers(model, ids[:, :PROMPT], new, **ours)
    # What is left out matters most at the end; the logits of random weights say that it is computed, not that it is close.
    steps = 6
    dense = fed_steps(model, ids, PROMPT + new, steps, **common | {"window": 32})
    sparse = fed_steps(model, ids, PROMPT + new, steps, mode="fast", **ours)
    off = error_of(sparse, dense) | {
        "error": "logits against attention over all, same tokens fed at the end"
    }
    record.row(
        "alisa: a fifth of the tokens",
        sparsity=SPARSITY,
        **found,
        last_step_ms=sparse["step_ms"],
        **off,
    )
    del dense

    steps_ms: dict[int, list[tuple[int, float]]] = {}
    fixed = 0
    on_device = {k: v for k, v in common.items() if k not in ("window", "page", "staging")}
    for sequences in groups:
        prompts = [PROMPT, (PROMPT + PROMPT + new) // 2, PROMPT + new - 16]
        for prompt in prompts:
            fed = ids[:sequences, : prompt + 16]
            try:
                all_on = fed_steps(model, fed, prompt + 16, 16, mode="fast", **on_device)
            except BudgetError:
                continue
            all_on.pop("logits")
            if all_on["host_bytes"]:
                continue
            fixed = max(fixed, all_on["fixed_bytes"])
            steps_ms.setdefault(sequences, []).append((prompt + 8, all_on["step_ms"]))
            record.row(f"alisa: {sequences} sequences of {prompt} on the device", **all_on, error="exact: none is left out")  # fmt: skip
    record.bars["alisa_vs_static_split"] = found["tokens_per_s"] / split
    if smoke:
        return
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    size = OPT_6_7B["hidden_size"] // OPT_6_7B["num_attention_heads"]
    shape = Shape(
        layers=(Heads(OPT_6_7B["num_attention_heads"], OPT_6_7B["num_attention_heads"], size),) * OPT_6_7B["num_hidden_layers"],
        hidden=OPT_6_7B["hidden_size"], itemsize=2, parameters=weights / 2, weights=weights,
    )  # fmt: skip
    cap = 16 * 2**30
    setting = Setting(
        shape=shape,
        profile=profile_of("h100"),
        device=cap,
        host=2**40,
        workspace=max(0, fixed - weights),
    )
    seconds, n_steps = swapped_seconds(steps_ms, setting, batch, profile_of("h100").pcie)
    swap = batch * ANSWER / seconds
    record.row(
        "alisa: whole sequences that come and go", tokens_per_s=swap, steps=n_steps, mean_step_ms=1000 * seconds / n_steps,
        room_tokens=setting.room(buffers=False), measured=dict(steps_ms),
        error="replayed from the steps above, which are exact",
    )  # fmt: skip
    record.bars["alisa_vs_request_swap"] = found["tokens_per_s"] / swap


def measure_sparse(record: Record, models: list[str], context: int, steps: int) -> None:
    """What leaving out four fifths costs in fidelity, and what it would cost without a choice."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for given in models:
        source, _, asked = given.partition("@")
        case = prepare(source, int(asked or context), steps, torch.float32, device)
        want, _, _ = dense(case, step=steps)
        total = case.ids.shape[1]
        window = int((1 - SPARSITY) * total / 2) // 16 * 16
        of_choice = {"window": window, "sparsity": SPARSITY, "page": 16}
        alone = {"window": 2 * window, "sparsity": 0.999, "page": 16}
        for what, settings in (("a fifth of the tokens", of_choice), ("the window alone", alone)):
            found = decoded(case, **settings)
            moved = divergence(want, found.pop("logits"), case.model.device)
            record.row(
                f"{Path(source).name}: {what}", context=case.context, steps=steps, sparsity=SPARSITY, window=settings["window"],
                **found, **moved, error="KL in nats, against transformers' own cache",
            )  # fmt: skip
        del case, want
        free()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", nargs="*", default=["ladder", "hidden", "schedule", "alisa", "sparse", "sweep"]
    )
    parser.add_argument("--rounds", type=int, default=2, help="in which each plan of the sweep is measured")  # fmt: skip
    parser.add_argument("--contexts", nargs="+", type=int, default=[32768], help="of hidden")
    parser.add_argument(
        "--windows", nargs="+", type=int, default=[16, 32, 48], help="of static splits, tokens"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[128, 384, 630], help="of schedule"
    )
    parser.add_argument(
        "--split",
        type=float,
        help="tokens per second of the best static split, where schedule is not measured",
    )
    parser.add_argument(
        "--groups", nargs="+", type=int, default=[6, 8, 11, 14, 18], help="sequences of alisa"
    )
    parser.add_argument("--model", action="append", help="name@context; may be given several times")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--rungs", nargs="+", default=list(UNIFORM), help="of all layers, to compare with"
    )
    parser.add_argument("--steps", type=int, default=128)
    args = parse(parser)
    models = args.model or ["smollm2"]
    if args.smoke:
        args.context, args.steps = 1200, 4
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
    shown = [Path(model).name for model in models]
    record = Record("scheduler", settings={**vars(args), "out": None, "model": shown})
    if "ladder" in args.only:
        measure_ladder(record, models, args.context, args.steps, args.rungs)
    if "hidden" in args.only:
        contexts = [1024] if args.smoke else args.contexts
        measure_hidden(record, contexts, 6 if args.smoke else 12, args.smoke)
    if "sweep" in args.only:
        context, steps = (1024, 6) if args.smoke else (32768, 12)
        measure_sweep(record, context, steps, args.rounds, args.smoke)
    if "sparse" in args.only:
        measure_sparse(record, models, args.context, args.steps)
    if "schedule" in args.only:
        args.split = measure_schedule(
            record, args.lengths, args.windows, 6 if args.smoke else 8, args.smoke
        )
    if "alisa" in args.only:
        if args.split is None:
            parser.error(
                "alisa is measured against a static split: add schedule to --only, or --split"
            )
        measure_alisa(record, args.split, [2] if args.smoke else args.groups, args.smoke)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
