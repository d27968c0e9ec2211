"""How would a batch fare under each policy, on a card that nobody has to have? Simulated from data sheets, not measured.

    python tools/simulate.py
    python tools/simulate.py --gpu rtx4090 --model llama-2-7b --prompt 4096 --output 256 --batch 8 --gpu-memory 22GiB

The defaults are the heaviest setting of ALISA (arXiv 2403.17312, section 6): OPT-6.7B, 128 tokens of input, 512 of output,
64 sequences, 16 GiB. Attention is exact but for the sparse window, whose hits on the device are an assumption: the
share of chosen tokens that the step before had chosen too. Both that share and none are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.errors import BudgetError, OffloadError
from offload.scheduler import phases
from offload.scheduler.cost import Heads, Shape
from offload.scheduler.profiles import PROFILES, Profile, profile_of
from offload.scheduler.simulate import (
    Phased,
    Policy,
    Request,
    RequestSwap,
    Resident,
    Result,
    Setting,
    SparseWindow,
    StaticSplit,
    WholeLayer,
    best,
)
from offload.units import GIB, duration, gib, parse_bytes, parse_tokens


def _shape(layers: int, heads: int, kv: int, hidden: int, parameters: float, rest: float) -> Shape:
    """In float16.

    Args:
        layers: All keep every token.
        heads: Query heads.
        kv: KV heads.
        hidden: Channels.
        parameters: That a token is multiplied with.
        rest: Further ones: embeddings.
    """
    return Shape(
        layers=(Heads(heads, kv, hidden // heads),) * layers,
        hidden=hidden,
        itemsize=2,
        parameters=parameters,
        weights=int(2 * (parameters + rest)),
        reads=int(2 * parameters),
    )


# Counted from their configs.
MODELS = {
    "opt-6.7b": _shape(32, 32, 32, 4096, 6.65e9, 8e6),  # its head is its embedding
    "llama-2-7b": _shape(32, 32, 32, 4096, 6.61e9, 0.13e9),
    "llama-3-8b": _shape(32, 32, 8, 4096, 7.50e9, 0.53e9),
}
# NVIDIA V100 SXM2 32 GB: 900 GB/s, 125 TFLOP/s in float16; the link as ALISA has it, 20 GB/s; shares as in `profiles`.
V100 = replace(
    PROFILES["rtx3090"],
    name="v100",
    memory=32 * GIB,
    host=128 * GIB,
    bytes_per_s=0.86 * 900e9,
    gemm_flops=0.75 * 125e12,
    attention_flops=0.7 * 125e12,
    pcie=20e9,
)
ACTIVATIONS = 128 * 2**20  # of a step, and of a prompt's chunk


def compared(
    workload: list[Request], setting: Setting, *, sparsity: float, reuse: float
) -> dict[str, Result | BudgetError]:
    """What becomes of a workload under each policy, the best of its settings; an error where it has no room."""
    batch = len(workload)
    turns = [n for n in range(1, 9) if n <= batch]
    groups = sorted({-(-batch // n) for n in turns}, reverse=True)
    ask = setting.ask(workload)
    shares = (0.0, 0.5, 1.0) if setting.shape.rebuilds else (0.0,)

    def sparse(again: float, together: list[int]) -> list[Policy]:
        return [
            SparseWindow(setting, sparsity=sparsity, reuse=again, share=share, together=n)
            for n in together
            for share in shares
        ]

    def planned(make: Any) -> list[Policy]:
        return [Phased(make(ask, setting.profile))]

    asked: dict[str, Any] = {
        "all on the GPU": lambda: [Resident()],
        "whole layers": lambda: [WholeLayer(setting)],
        "static split": lambda: [StaticSplit(setting, percent) for percent in range(101)],
        "static split, batch swept": lambda: [
            StaticSplit(setting, percent, n) for n in groups for percent in range(0, 101, 5)
        ],
        "request swap": lambda: [RequestSwap(setting)],
        "ours, exact": lambda: planned(phases.plan),
        "ours, exact, batch swept": lambda: planned(phases.grouped),
        "ours, sparse": lambda: sparse(reuse, [batch]),
        "ours, sparse, batch swept": lambda: sparse(reuse, groups),
        "ours, sparse, nothing reused": lambda: sparse(0.0, [batch]),
        "ours, sparse, batch swept, nothing reused": lambda: sparse(0.0, groups),
    }
    found: dict[str, Result | BudgetError] = {}
    for what, policies in asked.items():
        try:
            found[what] = best(workload, setting, policies())
        except BudgetError as error:
            found[what] = error
    return found


def ratios(found: dict[str, Result | BudgetError]) -> dict[str, float]:
    """Tokens per second of one policy over another's, where both have room: predicted."""
    pairs = {
        "alisa_vs_static_split": ("ours, sparse", "static split"),
        "alisa_vs_static_split, nothing reused": ("ours, sparse, nothing reused", "static split"),
        "schedule_vs_static_split_equal_output": ("ours, exact", "static split"),
        "same, batch swept of both": ("ours, exact, batch swept", "static split, batch swept"),
        "alisa_vs_request_swap": ("ours, sparse", "request swap"),
        "alisa_vs_request_swap, nothing reused": ("ours, sparse, nothing reused", "request swap"),
        "alisa_vs_request_swap, batch swept": ("ours, sparse, batch swept", "request swap"),
    }
    made = {}
    for name, (ours, theirs) in pairs.items():
        one, other = found[ours], found[theirs]
        if isinstance(one, Result) and isinstance(other, Result):
            made[name] = one.tokens_per_s / other.tokens_per_s
    return made


def table(card: str, found: dict[str, Result | BudgetError]) -> Table:
    """For a reader."""
    shown = Table(title=f"{card}: simulated, not measured", title_justify="left")
    for head in (
        "policy",
        "best setting",
        "tokens/s",
        "GPU peak",
        "host peak",
        "to the GPU",
        "time",
    ):
        shown.add_column(head, justify="left" if head in ("policy", "best setting") else "right")
    for what, result in found.items():
        if isinstance(result, BudgetError):
            missing = result.requested - result.available
            shown.add_row(what, f"does not fit, by {gib(missing)}", *[""] * 5)
            continue
        times = ", ".join(f"{phase} {duration(s)}" for phase, s in result.phases.items())
        shown.add_row(
            what,
            result.policy,
            f"{result.tokens_per_s:,.0f}",
            gib(result.device_peak),
            gib(result.host_peak),
            gib(result.bytes_in),
            times,
        )
    return shown


def record(found: dict[str, Result | BudgetError]) -> dict[str, Any]:
    """For a program."""
    rows = {}
    for what, result in found.items():
        if isinstance(result, BudgetError):
            rows[what] = {"requested": result.requested, "available": result.available}
        else:
            rows[what] = asdict(result) | {"tokens_per_s": result.tokens_per_s}
    return {"basis": "simulated", "policies": rows, "predicted_ratios": ratios(found)}


def _profile(name: str) -> Profile:
    return V100 if name.lower() == "v100" else profile_of(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="append", help=f"v100, {', '.join(PROFILES)}; repeatable")
    parser.add_argument("--model", choices=MODELS, default="opt-6.7b")
    parser.add_argument("--prompt", type=parse_tokens, default=128)
    parser.add_argument("--output", type=parse_tokens, default=512)
    parser.add_argument("--batch", type=parse_tokens, default=64)
    parser.add_argument("--gpu-memory", type=parse_bytes, default=16 * GIB)
    parser.add_argument("--cpu-memory", type=parse_bytes, help="of a typical host, if not given")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--reuse", type=float, default=0.9, help="assumed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    console, records = Console(), {}
    try:
        for name in given.gpu or ["h100", "v100", "rtx4090"]:
            profile = _profile(name)
            setting = Setting(
                shape=MODELS[given.model],
                profile=profile,
                device=given.gpu_memory,
                host=profile.host * 3 // 4 if given.cpu_memory is None else given.cpu_memory,
                workspace=profile.context + ACTIVATIONS,
            )
            workload = [Request(given.prompt, given.output)] * given.batch
            found = compared(workload, setting, sparsity=given.sparsity, reuse=given.reuse)
            records[profile.name] = record(found)
            if given.json:
                continue
            console.print(table(profile.name, found))
            for what, value in ratios(found).items():
                console.print(f"  {what}: {value:.2f} predicted", highlight=False)
            exact = found["ours, exact"]
            if isinstance(exact, Result):
                planned = phases.plan(setting.ask(workload), profile)
                console.print(f"\nTokens of a sequence, as planned:\n{planned.timeline()}\n")
    except OffloadError as error:
        print(error, file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps(records, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
