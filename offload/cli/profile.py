"""`offload profile`: where every byte and every millisecond of a run went, beside what was planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offload.cli.options import (
    ConfigFile,
    CpuMemory,
    Dtype,
    GpuMemory,
    Json,
    Mode,
    Model,
    Prompt,
    PromptFile,
    Raw,
    Sets,
)
from offload.cli.settings import asked
from offload.cli.text import encoded, no_bars, progress, prompt_text, require_writable
from offload.errors import OffloadError

if TYPE_CHECKING:
    from offload.config import OffloadConfig
    from offload.parts import Part
    from offload.plan import Plan
    from offload.profile import Profile

_SHOWN = 8  # kernels


def profile(
    model: Model = None,
    prompt_file: PromptFile = None,
    prompt: Prompt = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer, all of them made.")
    ] = 128,
    mode: Mode = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dtype: Dtype = None,
    raw: Raw = False,
    steps: Annotated[
        int,
        typer.Option("--steps", min=0, help="Tokens behind the answer whose kernels are timed."),
    ] = 16,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to this file.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write a trace for ui.perfetto.dev, as in run.json.gz."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a prompt and say where every byte and every millisecond went.

    Bytes are planned, measured and unaccounted, by purpose. The answer is not shown and does not end early.
    """
    text = prompt_text(prompt_file, prompt, raw=raw)
    settings = asked(config, sets, mode=mode, gpu_memory=gpu_memory, cpu_memory=cpu_memory).config
    settings.require_usable()
    for file in (html, trace):
        if file is not None:
            require_writable(file)

    progress(f"Loading {model or 'SmolLM2-135M-Instruct'} ...")
    from offload.loading import load
    from offload.profile import profile as run

    with no_bars():
        loaded = load(model, dtype=dtype)
    chat = not raw and loaded.tokenizer.chat_template is not None
    ids = encoded(loaded, text, chat=chat)["input_ids"]
    progress(f"Running {ids.shape[1]:,} tokens of prompt and {max_new_tokens:,} of an answer ...")
    found = run(loaded.model, settings, ids, max_new_tokens=max_new_tokens, looked_at=steps)
    shown = str(loaded.model.dtype).removeprefix("torch.")
    planned = _planned(model, shown, settings, ids.shape[1], max_new_tokens)
    if as_json:
        inputs = {
            "model": loaded.source, "prompt_tokens": ids.shape[1],
            "max_new_tokens": max_new_tokens, "steps": steps,
        }  # fmt: skip
        top = {"schema_version": 1, "command": "profile", "inputs": inputs}
        times = None if planned is None or planned.times is None else {
            "prefill_s": planned.times.prefill, "token_s": planned.times.token, "band": planned.band,
            "source": planned.basis,
        }  # fmt: skip
        print(json.dumps({**top, "planned_times": times, "profile": found.to_dict()}))
    else:
        _print(found, planned)
    if html is not None:
        _write_page(html, loaded.source, found, planned)
    if trace is not None:
        _write_trace(trace, found)


def _planned(
    source: str | None, dtype: str, settings: OffloadConfig, prompt: int, output: int
) -> Plan | None:
    """The plan of this run on the card that is there; None where there is none, or the files do not say enough."""
    from offload.plan import of_this_machine
    from offload.plan import plan as planned

    there = of_this_machine(settings, source, dtype)
    if there is None:
        return None
    try:
        return planned(settings, *there, context=prompt + output, output=output)
    except OffloadError:  # it ran, whatever a plan thinks of it
        return None


def _write_page(file: Path, source: str, found: Profile, planned: Plan | None) -> None:
    from offload.cli.page import page

    ms = None if planned is None or planned.times is None else 1000 * planned.times.token
    title = f"{source}: {found.report.prompt_tokens:,} tokens, mode {found.report.mode}"
    file.write_text(page(title, found, planned_ms=ms), encoding="utf-8")
    progress(f"wrote {file}")


def _write_trace(file: Path, found: Profile) -> None:
    from offload.trace import perfetto

    data = perfetto(
        found.events,
        found.samples,
        found.bursts,
        prefill_until=found.prefill_until,
        changes=found.changes,
    )
    file.write_bytes(data)
    progress(f"wrote {file}; ui.perfetto.dev opens it")


def _print(found: Profile, planned: Plan | None) -> None:
    from offload.units import duration

    print(found.report.summary)
    _print_bytes("device", found.device, found.unaccounted)
    _print_bytes("host", found.host, None)
    if found.peak is None:
        print(
            "\nA CPU has no driver that counts: what passes take, and what is unaccounted, is not known."
        )
    times = sorted(found.token_ms)
    if times:
        middle = times[len(times) // 2] / 1000
        more = ""
        if planned is not None and planned.times is not None:
            low, high = (planned.times.token * (1 + sign * planned.band) for sign in (-1, 1))
            more = (
                f"; planned {duration(planned.times.token)} ({duration(low)} to {duration(high)})"
            )
        print(
            f"\na token      {duration(middle)} in the middle, {duration(times[-1] / 1000)} at most{more}"
        )
    if found.looked_at:
        _print_steps(found)


def _print_bytes(tier: str, parts: list[Part], unaccounted: int | None) -> None:
    from offload.units import gib

    print(f"\n{tier:22}{'planned':>12}{'measured':>12}")
    for part in parts:
        measured = "-" if part.measured is None else gib(part.measured)
        print(f"  {part.purpose:20}{gib(part.planned):>12}{measured:>12}")
    if unaccounted is not None:
        whole = sum(part.measured or 0 for part in parts) + unaccounted
        print(
            f"  {'unaccounted':20}{'':12}{gib(unaccounted):>12}  {unaccounted / max(1, whole):.1%}"
        )


def _print_steps(found: Profile) -> None:
    from offload.units import duration

    each = duration(found.looked_s / found.looked_at)
    print(f"\n{found.looked_at} further tokens were looked at, {each} each; engines overlap")
    for engine, ms in found.engines.items():
        print(f"  {engine:24}{ms:10.2f} ms a token")
    print("the slowest kernels")
    for kernel in found.kernels[:_SHOWN]:
        ms, calls = (value / found.looked_at for value in (1000 * kernel.seconds, kernel.calls))
        print(f"  {kernel.name[:60]:60}{ms:10.3f} ms a token, {calls:,.0f} calls")
