"""`offload doctor`: is this machine ready, and what would make it faster?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from offload.probe import Entry, Probe

_MARKS = {True: "ok", False: "!!", None: "--"}
_NAMES = {
    "h2d": "to the card, blocks of", "d2h": "to the host, blocks of", "dma_from": "copied rather than read, from",
    "zero_copy": "read by a kernel, rows of", "device_stream": "the card's memory", "gemm": "matrix products,",
    "attention": "attention", "launch": "a launch", "hand_off": "to the host and back", "pinnable": "can be pinned",
    "host_stream": "host memory, in order", "host_scan": "host memory, codes of keys",
    "host_attend": "host memory, rows anywhere", "worker_hand_off": "to threads and back",
}  # fmt: skip


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Try copies and pinning on the card.")
    ] = True,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe",
            help="Measure what this machine can do, and keep it for plans; --no-probe: show what is kept.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what is missing and what would make it faster.

    The last line says whether it is ready. The exit code is 1 if something blocks.
    """
    from offload.doctor import diagnose

    rates = None if probe is None else _rates(measure=probe)
    found = diagnose(measure=measure)
    if as_json:
        top = {
            "schema_version": 1,
            "command": "doctor",
            "ready": found.ready,
            "verdict": found.verdict,
            "probe": None if rates is None else asdict(rates),
        }
        print(json.dumps(top | {"checks": [asdict(check) for check in found.checks]}, indent=2))
    else:
        for check in found.checks:
            print(f"{_MARKS[check.ok]}  {check.name:20}{check.value}")
            if check.advice:
                print(f"      {check.advice}")
        for entry in [] if rates is None else rates.entries():
            print(_line(entry))
        print(found.verdict)
    if not found.ready:
        raise typer.Exit(1)


def _rates(*, measure: bool) -> Probe:
    """What this machine can do: measured now, or as it is kept."""
    from offload.cli.text import progress
    from offload.probe import probe as probed
    from offload.probe import probe_file, renewed

    if not measure:
        return probed(measure=False)
    progress("Measuring what this machine can do ...")
    found = renewed()
    progress(f"In {found.took_s:.1f} s; it is kept in {probe_file()}")
    return found


def _line(entry: Entry) -> str:
    from offload.units import duration, gib, rate

    of, value = entry.of, entry.quantity.value
    name = f"{_NAMES[entry.name]} {gib(of) if isinstance(of, int) else of or ''}"
    shown = {
        "B": lambda: gib(value), "B/s": lambda: rate(value), "s": lambda: duration(value),
        "FLOP/s": lambda: f"{value / 1e12:.1f} TFLOP/s",
    }[entry.quantity.unit]()  # fmt: skip
    return f"    {name:40}{shown:>14}  {entry.quantity.source}"
