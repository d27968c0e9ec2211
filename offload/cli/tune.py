"""`offload tune`: the settings that make a model, a prompt and a machine fastest, found by plans and short runs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.cli.options import ConfigFile, CpuMemory, Dtype, GpuMemory, Json, Mode, Model
from offload.cli.settings import asked
from offload.cli.text import encoded, no_bars, progress, read_text, require_writable
from offload.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from offload.cli.settings import Asked
    from offload.config import OffloadConfig
    from offload.loading import Loaded
    from offload.report import Report
    from offload.tune import Outcome, Predicted, Tuned

_RUN_TOKENS = 48  # of a run: enough for the mean of a token
_OBJECTIVES = ("speed", "fidelity", "context")


def tune(
    prompt_file: Annotated[
        Path,
        typer.Option(
            "--prompt-file", help="A text as long as those to come, - for standard input."
        ),
    ],
    model: Model = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="speed at equal fidelity, fidelity at equal speed, or the longest context.",
        ),
    ] = "speed",
    output: Annotated[
        str,
        typer.Option(
            "--output", help="Tokens of an answer, which weigh a token against the prompt."
        ),
    ] = "512",
    limit: Annotated[str, typer.Option("--time", help="No run begins later, as in 5m.")] = "5m",
    mode: Mode = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any key of the file, which then stays: --set replica.rung=4k4v."
        ),
    ] = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path(
        "offload.tuned.toml"
    ),
    as_json: Json = False,
) -> None:
    """Find better settings, by what the cost model says and by short runs.

    What is set already stays. Runs are kept beside the file to write: the same command goes on where it was stopped.
    """
    from offload.units import parse_tokens

    if objective not in _OBJECTIVES:
        raise InputError(
            "There is no such objective", asked=objective, there=", ".join(_OBJECTIVES),
            change="Write one of these.",
        )  # fmt: skip
    until = time.monotonic() + _seconds(limit)
    tokens = parse_tokens(output)
    text = read_text(prompt_file)
    given = asked(config, sets, mode=mode, gpu_memory=gpu_memory, cpu_memory=cpu_memory)
    settings = given.config
    settings.require_usable()
    require_writable(out)

    progress(f"Loading {model or 'SmolLM2-135M-Instruct'} ...")
    from offload.loading import load
    from offload.tune import Runs
    from offload.tune import tune as search

    with no_bars():
        loaded = load(model, dtype=dtype)
    chat = loaded.tokenizer.chat_template is not None
    ids = encoded(loaded, text, chat=chat)["input_ids"]
    kept = out.with_name(out.name + ".runs.json")
    runs = Runs(kept, _fingerprint(loaded, ids, settings, tokens))
    if runs.kept:
        progress(f"{runs.kept} runs are in {kept} already")
    length = ids.shape[1]
    try:
        with _warned_once():
            found = search(
                settings, measurer(loaded.model, ids, tokens), runs, objective=objective,  # type: ignore[arg-type]
                output=tokens, prompt=length, until=until, tell=progress,
                predict=predictor(model, str(loaded.model.dtype).removeprefix("torch."), length, tokens, settings),
            )  # fmt: skip
    except KeyboardInterrupt:
        progress(
            f"stopped; the same command goes on from {kept}"
            if runs.kept
            else "stopped before a run was over: the same command begins anew"
        )
        raise
    _write(out, given, found, tokens)
    _say(found, out, tokens, as_json=as_json, objective=objective)


class _Once(logging.Filter):
    """Lets every warning through once: each run has the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        message = record.getMessage()
        new = record.levelno != logging.WARNING or message not in self._seen
        self._seen.add(message)
        return new


@contextmanager
def _warned_once() -> Iterator[None]:
    handlers, once = logging.getLogger("offload").handlers, _Once()
    for handler in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(once)


def _seconds(text: str) -> float:
    """A time: 90, 90s, 5m or 1h."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InputError("--time is no time", asked=text, there=None, change="Write 90s, 5m or 1h.")
    return seconds


def _fingerprint(
    loaded: Loaded, ids: Tensor, settings: OffloadConfig, output: int
) -> dict[str, Any]:
    """What outcomes depend on."""
    import zlib

    import torch
    import transformers

    from offload import __version__
    from offload.hardware import local_card

    card = local_card()
    return {
        "model": loaded.source, "dtype": str(loaded.model.dtype), "settings": settings.to_toml(),
        "prompt_tokens": ids.shape[1], "prompt": zlib.crc32(ids.cpu().numpy().tobytes()), "output": output,
        "card": None if card is None else card.name, "driver": None if card is None else card.driver,
        "offload": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def measurer(model: Any, ids: Tensor, output: int) -> Callable[[OffloadConfig], Outcome]:
    """What makes a run: some tokens behind a prompt.

    Args:
        model: Of transformers, not attached.
        ids: The prompt, [1, N].
        output: Tokens of the answers to come; a run makes 48 at most.
    """
    from offload.profile import profile
    from offload.tune import Outcome

    tokens = max(2, min(_RUN_TOKENS, output))
    warm: set[str] = set()

    def measure(config: OffloadConfig) -> Outcome:
        kernels = (config.mode, config.replica, config.retrieval, config.decode.compile)
        if str(kernels) not in warm:  # what is compiled for the first time is not what is measured
            warm.add(str(kernels))
            profile(model, config, ids, max_new_tokens=2, looked_at=0)
        report = profile(model, config, ids, max_new_tokens=tokens, looked_at=0).report
        return Outcome(
            prefill_s=report.prefill_s,
            token_s=(report.decode_s - report.capture_s) / report.new_tokens,
            error=0.0 if report.mode != "fast" else report.error_estimate,
            device_bytes=sum(n for what, n in report.bytes.items() if not what.startswith("host_")),
            effective=_effective(report),
        )

    return measure


def _effective(report: Report) -> dict[str, Any]:
    """What keys came to in a run that are auto."""
    from offload.scheduler.rungs import RUNGS

    found: dict[str, Any] = {"prefill.chunk": report.chunk}
    if report.rung is not None:
        tokens = next((r.tokens for r in RUNGS if r.name == report.rung), None)
        if tokens is not None:  # there is a replica
            found |= {"replica.rung": report.rung, "retrieval.tokens": tokens}
    return found


def predictor(
    source: str | None, dtype: str, prompt: int, output: int, settings: OffloadConfig
) -> Callable[[OffloadConfig], Predicted] | None:
    """What the cost model says; None without a card, or where the files do not say enough.

    Args:
        source: As for `--model`.
        dtype: Of the loaded model: bfloat16, float16 or float32.
        prompt: Tokens.
        output: Likewise, of an answer.
        settings: Budgets among them.
    """
    from offload.plan import of_this_machine, plan
    from offload.tune import Predicted

    there = of_this_machine(settings, source, dtype)
    if there is None:
        return None
    shape, machine = there

    def predict(config: OffloadConfig) -> Predicted:
        found = plan(config, shape, machine, context=prompt + output, output=output)
        if found.times is None:
            return Predicted(fits=False, longest=found.largest)
        seconds = found.times.prefill + output * found.times.token
        return Predicted(fits=True, seconds=seconds, band=found.band, longest=found.largest)

    return predict


def _write(out: Path, given: Asked, found: Tuned, output: int) -> None:
    """The file that was read, with what is better, and with what variables and options say."""
    from offload.tune import tuned_toml

    text = "" if given.file is None else given.file.read_text(encoding="utf-8")
    before, after = found.before.seconds(output), found.after.seconds(output)
    why = f"tuned: {before:.1f} s became {after:.1f} s"
    if found.longest is not None:
        why = f"tuned: {found.longest[0]:,} tokens became {found.longest[1]:,}"
    values = {setting.key: setting.value for setting in given.config.settings()}
    above = {key: values[key] for key in given.above}
    plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in above.items()}
    changed = tuned_toml(text, plain | found.settings, dict.fromkeys(found.settings, why))
    out.write_text(changed or "# Nothing was better than the defaults.\n", encoding="utf-8")


def _say(found: Tuned, out: Path, output: int, *, as_json: bool, objective: str) -> None:
    if as_json:
        top = {"schema_version": 1, "command": "tune", "inputs": {"objective": objective, "output": output}}  # fmt: skip
        print(json.dumps({**top, **asdict(found), "file": str(out)}))
        return
    print(f"{found.runs} runs, {len(found.skipped)} settings not run")
    if not found.is_over:
        print("the time was up, and nothing was changed: the same command goes on")
    if not found.settings and found.is_over:
        print("nothing is better than the settings as they are")
    for key, value in found.settings.items():
        print(f"  {key} = {value}")
    before, after = found.before, found.after
    if found.longest is not None:
        print(f"longest context {found.longest[0]:,} -> {found.longest[1]:,} tokens")
    elif found.settings:
        print(
            f"{before.seconds(output):.2f} s -> {after.seconds(output):.2f} s for the prompt and {output:,} tokens, "
            f"{1000 * before.token_s:.2f} -> {1000 * after.token_s:.2f} ms a token; expected error "
            f"{_percent(before.error)} -> {_percent(after.error)}"
        )
    print(f"wrote {out}")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.2%}"
