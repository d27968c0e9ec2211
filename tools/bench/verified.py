"""What does mode verified cost, how often do its drafts agree, and are its tokens the stock cache's?

- `shape`: an 8B-shaped Llama under the 24 GB cap at 131,072 tokens, keys and queries recorded from a real model
  (`_vectors.py`). Random weights say nothing about agreement, so how many tokens of a draft are kept is taken from the
  trace of `agreement`; everything else is the product's loop, rejections included. Mode fast in the same run beside it.
- `agreement`: a real model in bfloat16, greedy, several tasks over one long document: tokens that agreed of those that
  were compared, with Wilson's interval of 95 %.
- `greedy` and `seeded`: tokens of a real model in float32 that differ from transformers' own cache, with the drafts as
  they are and with half of them made wrong.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _record import GIB, Record, arguments, parse, seconds
from _vectors import played
from decode import free, load_vectors
from generate import CAP_BYTES, build_model
from torch import Tensor

import offload
from offload import verify
from offload.report import Report

sys.path.insert(0, str(Path(__file__).parents[1]))
from fidelity import Case, prepare

TASKS = {
    "continue": "",
    "summarise": "\n\n# Summary of the modules above, in plain English:\n# ",
    "write": "\n\n# A new function that uses what is defined above:\ndef ",
    "list": "\n\n# All classes that are defined above, one a line:\n# 1. ",
    "explain": '\n\n"""Explains step by step what the last function above does.\n\n',
}
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"repetition_penalty": 1.3, "top_k": 50},
)


def wilson(kept: int, seen: int) -> tuple[float, float]:
    """The interval of 95 % of a share."""
    if not seen:
        return 0.0, 1.0
    z, share = 1.96, kept / seen
    middle = share + z * z / (2 * seen)
    half = z * (share * (1 - share) / seen + z * z / (4 * seen * seen)) ** 0.5
    return (middle - half) / (1 + z * z / seen), (middle + half) / (1 + z * z / seen)


def figures(report: Report) -> dict[str, Any]:
    """What a row says of a verified run."""
    n = max(1, report.new_tokens)
    return {
        "ms_per_token": 1000 * (report.decode_s - report.capture_s) / n, "new_tokens": report.new_tokens,
        "capture_s": report.capture_s, "prefill_s": report.prefill_s, "rung": report.rung,
        "verify_passes": report.verify_passes, "drafted": report.drafted_tokens, "accepted": report.accepted_tokens,
        "accepted_per_pass": report.accepted_tokens / max(1, report.verify_passes),
        "draft_ms_per_token": 1000 * report.draft_s / n, "verify_ms_per_token": 1000 * report.verify_s / n,
        "decode_h2d_bytes": report.decode_h2d_bytes, "agreement": report.agreement, "bytes": report.bytes,
        "tokens_on_host": report.tokens_on_host, "notes": report.notes,
    }  # fmt: skip


@contextmanager
def forced(trace: list[bool]) -> Iterator[None]:
    """Within, drafts are kept as far as a trace of agreement goes, which then begins anew."""
    right, at = verify._compare, [0]

    def compare(chooser: Any, ids: Tensor, logits: Tensor, length: int, drafted: int) -> Any:
        _, targets = right(chooser, ids, logits, length, drafted)  # what it takes is taken
        kept = 0
        while kept < drafted:
            at[0] += 1
            if not trace[at[0] % len(trace)]:
                break
            kept += 1
        return kept + 1, torch.cat([ids[0, length : length + kept], targets[kept:]])

    verify._compare = compare
    try:
        yield
    finally:
        verify._compare = right


@contextmanager
def wrong_drafts(share: float) -> Iterator[None]:
    """Within, about this share of drafted tokens is another one than was meant."""
    random, right = torch.Generator().manual_seed(0), verify._Chooser.draft

    def draft(self: Any, ids: Tensor, logits: Tensor) -> Tensor:
        token = right(self, ids, logits)
        wrong = float(torch.rand((), generator=random)) < share
        return (token + 1) % logits.shape[-1] if wrong else token

    verify._Chooser.draft = draft  # type: ignore[method-assign]
    try:
        yield
    finally:
        verify._Chooser.draft = right  # type: ignore[method-assign]


@contextmanager
def traced(trace: list[bool]) -> Iterator[None]:
    """Within, whether each compared token was kept is noted."""
    right = verify.Tally.add

    def add(self: Any, drafted: int, accepted: int) -> None:
        trace.extend([True] * accepted + [False] * (accepted < drafted))
        right(self, drafted, accepted)

    verify.Tally.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        verify.Tally.add = right  # type: ignore[method-assign]


def pinned_rate(device: torch.device) -> float:
    """Bytes per second of copies from pinned host memory."""
    source = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(GIB, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    copy()
    return GIB / min(seconds(copy) for _ in range(5))


def settings_of(args: Namespace) -> dict[str, Any]:
    """Of the runs on real models, offloaded though they would fit."""
    asked: dict[str, Any] = {"mode": "verified", "window": 512, "rung": "4k4v", "compile": False}
    if args.smoke:
        asked |= {"window": 192}
    if not torch.cuda.is_available():
        asked["draft"] = 7  # drafts do not pay there
    return asked


def measure_agreement(record: Record, case: Case, args: Namespace) -> list[bool]:
    """Drafts of a real model that agree; returns whether each compared token did."""
    trace: list[bool] = []
    for task, text in TASKS.items():
        ids = case.ids[:, : case.context]
        if text:
            more = case.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, more.to(ids.device)], dim=1)
        one: list[bool] = []
        with traced(one), offload.attach(case.model, **settings_of(args)) as runtime:
            runtime.generate(
                ids, max_new_tokens=args.task_tokens, do_sample=False, eos_token_id=None
            )
            report = runtime.report()
        record.row(
            f"agreement {case.name} {task}", context=ids.shape[1], share=sum(one) / max(1, len(one)),
            compared=len(one), **figures(report),
        )  # fmt: skip
        trace += one
        gc.collect()
    low, high = wilson(sum(trace), len(trace))
    record.row(
        f"agreement {case.name}", share=sum(trace) / max(1, len(trace)), low=low, high=high,
        compared=len(trace), tasks=len(TASKS),
    )  # fmt: skip
    return trace


def measure_tokens(record: Record, case: Case, args: Namespace) -> None:
    """Tokens that are not the stock cache's."""
    model, n = case.model, case.context
    call: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    step = max(1, (case.ids.shape[1] - n) // max(1, args.prompts))
    starts = [i * step for i in range(args.prompts)]
    batch = torch.cat([case.ids[:, at : at + n] for at in starts])
    want = model.generate(batch, attention_mask=torch.ones_like(batch), **call)
    worst = 0
    for share in (0.0, 0.5):
        different, report = 0, None
        with wrong_drafts(share) if share else nullcontext():
            for row in range(args.prompts):
                with offload.attach(model, **settings_of(args)) as runtime:
                    got = runtime.generate(batch[row : row + 1], **call)
                    report = runtime.report()
                different += int((got != want[row : row + 1]).sum())
        assert report is not None
        record.row(
            f"greedy {case.name}, {share:.0%} of drafts made wrong", prompts=args.prompts, tokens=args.new_tokens,
            context=n, different=different, last_run=figures(report),
        )  # fmt: skip
        worst = max(worst, different)
    record.bars["greedy_mismatches_fp32"] = worst
    different = 0
    for sampling in SAMPLED:
        sampled = call | {"do_sample": True} | sampling
        ids = batch[:1]
        torch.manual_seed(7)
        stock = model.generate(ids, attention_mask=torch.ones_like(ids), **sampled)
        with wrong_drafts(0.2), offload.attach(model, **settings_of(args)) as runtime:
            torch.manual_seed(7)
            got = runtime.generate(ids, **sampled)
            report = runtime.report()
        apart = int((got != stock).sum())
        record.row(f"seeded {case.name} {json.dumps(sampling)}", different=apart, **figures(report))
        different += apart
    record.bars["seeded_mismatches_fp32"] = different


def measure_shape(
    record: Record, model: Any, vectors: Any, trace: list[bool], args: Namespace
) -> None:
    """Mode verified beside mode fast at the 8B shape."""
    n, device = args.tokens, model.device
    torch.manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (1, n), device=device)
    base: dict[str, Any] = {"rung": "4k4v", "chunk": args.chunk, "compile": True}
    if device.type == "cuda":
        base["gpu_memory"] = CAP_BYTES
    else:
        base |= {"window": 192, "draft": 7}
    ms = {}
    with nullcontext() if vectors is None else played(model, vectors, n):
        for mode in ("fast", "verified"):
            with forced(trace), offload.attach(model, **base, mode=mode) as runtime:
                short = ids[:, : min(n, 4000)]
                runtime.generate(short, max_new_tokens=40, do_sample=False)  # compiles
            free()
            with forced(trace), offload.attach(model, **base, mode=mode) as runtime:
                runtime.generate(ids, max_new_tokens=args.shape_tokens, do_sample=False)
                report = runtime.report()
                print(report, flush=True)
            free()
            found = figures(report)
            ms[mode] = found["ms_per_token"]
            if mode == "verified" and device.type == "cuda":
                rate = pinned_rate(device)
                found |= {"pinned_bytes_per_s": rate}
                record.bars["verify_h2d_share"] = (
                    report.decode_h2d_bytes / report.verify_s / rate if report.verify_s else 0.0
                )
            agreed = sum(trace) / len(trace)
            record.row(f"{mode} {n}", **found, forced_agreement=agreed, error="tokens are forced: see `agreement` and `greedy`")  # fmt: skip
    record.bars["verified_ms_131072"] = ms["verified"]
    record.bars["verified_vs_fast_131072"] = ms["verified"] / ms["fast"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--long", default="smollm2@7168", help="a real model and its context: agreement, and vectors")  # fmt: skip
    parser.add_argument("--short", default="smollm2@3072", help="likewise, for tokens in float32")
    parser.add_argument("--tokens", type=int, default=131072, help="prompt at the 8B shape")
    parser.add_argument("--shape-tokens", type=int, default=1024, help="made there")
    parser.add_argument("--chunk", type=int, default=2048, help="prefill chunk there")
    parser.add_argument("--task-tokens", type=int, default=1200, help="made in each task")
    parser.add_argument("--prompts", type=int, default=16, help="compared in float32")
    parser.add_argument("--new-tokens", type=int, default=256, help="made of each")
    parser.add_argument("--only", nargs="*", default=["agreement", "shape", "tokens"], help="parts")
    args = parse(parser)
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.smoke:
        args.long = args.short = "smollm2@400"
        args.tokens, args.shape_tokens, args.chunk = 640, 40, 128
        args.task_tokens, args.prompts, args.new_tokens = 12, 2, 12
    named = {"long": Path(args.long).name, "short": Path(args.short).name, "out": None}
    record = Record("verified", settings={**vars(args), **named})
    trace = [True]
    if "agreement" in args.only:
        source, _, context = args.long.partition("@")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        case = prepare(source, int(context), 0, dtype, str(device))
        case.name = Path(source).name
        trace = measure_agreement(record, case, args)
        record.bars["agreement_qwen_16k"] = sum(trace) / max(1, len(trace))
        del case
        free()
        record.write(args.out)
    if "shape" in args.only:
        vectors = None if args.smoke else load_vectors(args.long, 1200, device)
        model = build_model(args.smoke, device)
        measure_shape(record, model, vectors, trace, args)
        del model, vectors
        free()
        record.write(args.out)
    if "tokens" in args.only:
        source, _, context = args.short.partition("@")
        case = prepare(source, int(context), 64 * args.prompts, torch.float32, str(device))
        case.name = Path(source).name
        torch.backends.cuda.matmul.allow_tf32 = False
        measure_tokens(record, case, args)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
