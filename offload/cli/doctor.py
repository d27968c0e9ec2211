"""`offload doctor`: is this machine ready, and what would make it faster?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

_MARKS = {True: "ok", False: "!!", None: "--"}


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Try copies and pinning on the card.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what is missing and what would make it faster.

    The last line says whether it is ready. The exit code is 1 if something blocks.
    """
    from offload.doctor import diagnose

    found = diagnose(measure=measure)
    if as_json:
        top = {
            "schema_version": 1,
            "command": "doctor",
            "ready": found.ready,
            "verdict": found.verdict,
        }
        print(json.dumps(top | {"checks": [asdict(check) for check in found.checks]}, indent=2))
    else:
        for check in found.checks:
            print(f"{_MARKS[check.ok]}  {check.name:20}{check.value}")
            if check.advice:
                print(f"      {check.advice}")
        print(found.verdict)
    if not found.ready:
        raise typer.Exit(1)
