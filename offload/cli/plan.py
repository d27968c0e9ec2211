"""`offload plan`: what fits a card, how fast it is and what to set, without loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offload.cli.settings import CONFIG_HELP, asked
from offload.errors import InputError

if TYPE_CHECKING:
    from offload.checkpoint import FileShape
    from offload.config import OffloadConfig
    from offload.plan import Machine, Plan
    from offload.scheduler.profiles import Profile

NOT_FITTING = 3
_LINE = 64  # characters of a bar
_LETTERS = {
    "weights": "W", "sinks and window": "n", "tail": "n", "replica": "R", "cached rows": "c", "staging": "s",
    "eviction": "s", "workspace": "a", "reading again": "a", "rebuilding": "a", "decode step": "a", "other KV": "k", "overhead": "o",
    "pages": "P", "index": "I",
}  # fmt: skip


def plan(
    model: Annotated[
        str,
        typer.Option("--model", help="A folder, a config.json, a GGUF file, or a name of the hub."),
    ],
    context: Annotated[
        str, typer.Option("--context", help="Tokens of prompt and answer, as in 128K.")
    ] = "128K",
    output: Annotated[str, typer.Option("--output", help="Tokens of the answer.")] = "512",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="The card: rtx3090, rtx4090, rtx5090, l4, a100, h100, ... Default: the one that is there.",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", help="Of the card, as in 20GiB. Default: all but the reserve."
        ),
    ] = None,
    cpu_memory: Annotated[
        str | None,
        typer.Option(
            "--cpu-memory",
            help="For KV, as in 64GiB. Default: three quarters of such a host, but for the reserve.",
        ),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="fast, verified or exact.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of weights and KV.")] = "bfloat16",
    config: Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP)] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of the file: --set replica.rung=4k4v."),
    ] = None,
    sweep: Annotated[
        Literal["context"] | None,
        typer.Option("--sweep", help="context: every length from 8K on, doubled, up to --context."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="Further cards: rtx3090,rtx4090,rtx5090.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a model fits a card at a length, how fast it is, and what to set.

    Bytes are those that the runtime would take; times are predicted. The exit code is 3 if it does not fit.
    """
    from offload.checkpoint import describe
    from offload.plan import NOT
    from offload.plan import plan as planned
    from offload.units import parse_tokens

    settings = asked(config, sets, mode=mode, gpu_memory=gpu_memory, cpu_memory=cpu_memory).config
    shape = describe(model, dtype=dtype)
    tokens, answer = parse_tokens(context), parse_tokens(output)
    names = [name.strip() for name in f"{gpu or ''},{compare or ''}".split(",") if name.strip()]
    machines = [_machine(name, settings) for name in dict.fromkeys(names)] or [
        _local_machine(settings)
    ]
    lengths = _doubled(tokens, answer) if sweep == "context" else [tokens]
    found = []
    for machine in machines:
        for length in lengths:
            result = planned(settings, shape, machine, context=length, output=answer, batch=batch)
            found.append((machine, result))
    if as_json:
        inputs = {
            "model": model,
            "context": tokens,
            "output": answer,
            "batch": batch,
            "dtype": dtype,
        }
        plans = [_as_object(machine, result) for machine, result in found]
        top = {"schema_version": 1, "command": "plan", "inputs": inputs, "model": _model(shape), "plans": plans}  # fmt: skip
        print(json.dumps(top, indent=2))
    elif len(found) > 1:
        _print_table(shape, found)
    else:
        _print_one(shape, *found[0], output=answer, batch=batch)
    if all(result.verdict == NOT for _, result in found):
        raise typer.Exit(NOT_FITTING)


def _doubled(tokens: int, output: int) -> list[int]:
    lengths, length = [], 8192
    while length < tokens:
        if length > output:
            lengths.append(length)
        length *= 2
    return [*lengths, tokens]


def _machine(card: str, settings: OffloadConfig) -> Machine:
    from offload.plan import machine_of
    from offload.scheduler.profiles import profile_of

    return machine_of(profile_of(card), settings)


def _local_machine(settings: OffloadConfig) -> Machine:
    """The card that is there, with its own memory and the host's."""
    from offload.plan import local_machine

    machine = local_machine(settings)
    if machine is None:
        raise InputError(
            "There is no NVIDIA card here",
            asked=None,
            there=None,
            change="Name one: --gpu rtx4090.",
        )
    return machine


def _model(shape: FileShape) -> dict[str, Any]:
    return {
        "name": shape.name, "model_type": shape.model_type, "dtype": shape.dtype, "layers": shape.layers,
        "layers_offloaded": len(shape.rows), "weights_bytes": shape.weights, "weights_are": shape.weights_are,
        "kv_bytes_per_token": sum(shape.token_bytes), "max_positions": shape.max_positions,
    }  # fmt: skip


def _as_object(machine: Machine, result: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "card": machine.profile.name, "basis": machine.profile.basis, "context": result.context,
        "verdict": result.verdict, "device_budget_bytes": machine.device, "host_budget_bytes": machine.host,
        "largest_context": result.largest, "notes": result.notes,
    }  # fmt: skip
    if result.missing is not None:
        found["missing"] = {
            "message": str(result.missing), "setting": result.missing.setting,
            "requested_bytes": result.missing.requested, "available_bytes": result.missing.available,
        }  # fmt: skip
        found["suggestions"] = [
            {"change": s.change, "result": s.result} for s in result.suggestions
        ]
        return found
    layout, times, phases = result.layout, result.times, result.phases
    assert layout is not None
    assert times is not None
    assert phases is not None
    return found | {
        "device_bytes": dict(layout.device), "host_bytes": dict(layout.host),
        "rung": None if layout.rung is None else layout.rung.name, "lifted_layers": layout.lifted_layers,
        "chunk": layout.chunk, "device_tokens": result.context - layout.host_tokens - layout.dropped_tokens,
        "host_tokens": layout.host_tokens, "dropped_tokens": layout.dropped_tokens, "phases": asdict(phases), "prefill_s": times.prefill, "token_s": times.token, "band": result.band,
        "decisions": [asdict(choice) for choice in result.decisions], "limit": times.limit, "parts_s": times.parts, "toml": result.toml,
        "fidelity": None if result.fidelity is None else {
            "kl": result.fidelity.kl, "same_top": result.fidelity.same_top, "source": "measured",
        },
        "sources": {"device_bytes": "computed", "host_bytes": "computed", "times": machine.profile.basis},
        "rates": _rates(machine.profile),
    }  # fmt: skip


def _rates(profile: Profile) -> dict[str, Any]:
    from offload.scheduler.profiles import RATES

    return {
        rate: {"value": getattr(profile, rate), "source": profile.source_of(rate)} for rate in RATES
    }


def _closeness(result: Plan) -> str:
    """How close the tokens are to those of the stock cache, in words."""
    found, layout = result.fidelity, result.layout
    assert layout is not None
    if found is None:
        return "not measured for this rung and so many exact tokens: offload generate --verify says"
    if not found.kl:
        return "the tokens of the stock cache"
    return (
        f"the most likely token is the same in {found.same_top:.1%} of steps, KL {found.kl:.1e} "
        "(measured on small models)"
    )


def _bar(parts: dict[str, int], whole: int) -> str:
    """A tier as one line: a letter for each part, dots for what is free."""
    shown = "".join(
        _LETTERS.get(name, name[0]) * round(_LINE * size / max(1, whole))
        for name, size in parts.items()
    )
    return (shown + "." * _LINE)[:_LINE]


def _speed(result: Plan) -> str:
    from offload.units import duration

    times = result.times
    assert times is not None
    low, high = times.token * (1 - result.band), times.token * (1 + result.band)
    return f"{duration(times.token)} a token ({duration(low)} to {duration(high)})"


def _print_one(
    shape: FileShape, machine: Machine, result: Plan, *, output: int, batch: int
) -> None:
    from offload.units import duration, gib

    print(
        f"{shape.name}  {shape.model_type}, {shape.layers} layers, {shape.dtype}; weights "
        f"{gib(shape.weights)} ({shape.weights_are}), {_per_token(shape)} of KV a token"
    )
    sequences = "" if batch == 1 else f"{batch} sequences of "
    print(
        f"{machine.profile.name}  {gib(machine.device)} of device memory, {gib(machine.host)} of host memory; "
        f"{sequences}{result.context:,} tokens, {output:,} of them the answer"
    )
    if result.missing is not None:
        short = result.missing.requested - max(0, result.missing.available)
        where = "on the device" if result.missing.setting == "memory.gpu" else "of host memory"
        print(f"\n{result.verdict}: {gib(short)} short {where}")
        print(f"  {result.missing}")
        for suggestion in result.suggestions:
            print(f"  {suggestion.change}: {suggestion.result}")
        largest = f"{result.largest:,} tokens" if result.largest else "none"
        print(f"  largest context at this budget: {largest}")
    else:
        print(f"\n{result.verdict}")
        layout, times = result.layout, result.times
        assert layout is not None
        assert times is not None
        shown = {name: size for name, size in layout.device.items() if size}
        print(f"\ndevice [{_bar(shown, machine.device)}] {gib(sum(shown.values()))}")
        for name, size in shown.items():
            more = _about(name, result)
            print(f"  {_LETTERS.get(name, name[0])} {name:18}{gib(size):>10}{more}")
        print(f"host   [{_bar(dict(layout.host), machine.host)}] {gib(layout.host_bytes)}")
        about = {
            "pages": f"{layout.host_tokens:,} tokens of each sequence",
            "index": "of their keys",
        }
        for name, size in layout.host.items():
            print(f"  {_LETTERS[name]} {name:18}{gib(size):>10}  {about[name]}")
        print(f"\nphases       {result.phases}")
        print(f"first token  {duration(times.prefill)}, read in chunks of {layout.chunk:,}")
        print(f"then         {_speed(result)}, most of it {times.limit}")
        beyond = shape.max_positions is not None and result.largest > shape.max_positions
        more = ", more than the model was made for" if beyond else ""
        print(f"fidelity     {_closeness(result)}")
        print(f"longest      {result.largest:,} tokens fit this budget{more}")
        print(f"\n{result.toml}", end="")
    for note in result.notes:
        print(f"note: {note}")


def _per_token(shape: FileShape) -> str:
    return f"{sum(shape.token_bytes) / 1024:,.0f} KiB"


def _about(name: str, result: Plan) -> str:
    layout = result.layout
    assert layout is not None
    if name == "replica" and layout.rung is not None:
        lifted = f", {layout.lifted_layers} layers better" if layout.lifted_layers else ""
        return f"  {layout.rung.name}{lifted}"
    if name == "sinks and window":
        tokens = result.context - layout.host_tokens - layout.dropped_tokens
        return f"  {tokens:,} tokens and more, in full precision"
    if name == "overhead":
        return "  driver, allocator"
    return ""


def _print_table(shape: FileShape, found: list[tuple[Machine, Plan]]) -> None:
    from offload.units import duration, gib

    print(f"{shape.name}  weights {gib(shape.weights)}, {_per_token(shape)} of KV a token")
    head = (
        "card",
        "context",
        "verdict",
        "device",
        "host",
        "rung",
        "first token",
        "a token",
        "longest",
    )
    rows: list[tuple[str, ...]] = []
    for machine, result in found:
        layout, times = result.layout, result.times
        if layout is None or times is None:
            rest = ("-",) * 5
        else:
            rung = layout.rung.name if layout.rung else "streamed" if layout.host_tokens else "none"
            rest = (
                gib(layout.device_bytes), gib(layout.host_bytes), rung,
                duration(times.prefill), duration(times.token),
            )  # fmt: skip
        rows.append(
            (
                machine.profile.name,
                f"{result.context:,}",
                result.verdict,
                *rest,
                f"{result.largest:,}",
            )
        )
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    for note in dict.fromkeys(note for _, result in found for note in result.notes):
        print(f"note: {note}")
