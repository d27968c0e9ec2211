"""What does mode verified cost, how often do its drafts agree, and are its tokens the stock cache's?

- `shape`: an 8B-shaped Llama under the 24 GB cap at 131,072 tokens, keys and queries recorded from a real model
  (`_vectors.py`). Random weights say nothing about agreement, so how many tokens of a draft are kept is taken from the
  trace of `agreement`; everything else is the product's loop, rejections included. Mode fast in the same run beside it.
- `agreement`: a real model in bfloat16, greedy, several tasks over one long document: tokens that agreed of those that
  were compared, with Wilson's interval of 95 %.
- `greedy` and `seeded`: tokens of a real model in float32 that differ from transformers' own cache, with the drafts as
  they are and with half of them made wrong.
- `flips`: tokens of a run of `agreement` that are not what transformers' own cache has on top when it is fed them one
  by one, although they are further below than its logits change when it is fed several at once.
- `sampling`: how well tokens that are drafted and judged follow the distribution that transformers samples from.

At the 8B shape also with drafts that wait for their pass, and with copies from the host paced to slower links: a kernel
that only sleeps stands behind each copy. Rows that steps select are read at the full rate all the same.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _record import GIB, Record, arguments, parse, seconds
from _vectors import played
from decode import free, load_vectors
from generate import CAP_BYTES, build_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import offload
from offload import verify
from offload.cache import CACHE
from offload.report import Report
from offload.runtime import Runtime
from offload.scheduler import pace
from offload.tiers.transfer import HostReader

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
        "wait_ms_per_token": 1000 * report.wait_s / n, "dropped": report.dropped_tokens,
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
        return kept, torch.cat([ids[0, length : length + kept], targets[kept:]])

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
    right = pace.Tally.add

    def add(self: Any, drafted: int, accepted: int) -> None:
        trace.extend([True] * accepted + [False] * (accepted < drafted))
        right(self, drafted, accepted)

    pace.Tally.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        pace.Tally.add = right  # type: ignore[method-assign]


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


def measure_agreement(record: Record, case: Case, args: Namespace) -> tuple[list[bool], Tensor]:
    """Drafts of a real model that agree.

    Returns:
        Whether each compared token did, and the tokens of the first task [1, context + new].
    """
    trace: list[bool] = []
    first = None
    for task, text in TASKS.items():
        ids = case.ids[:, : case.context]
        if text:
            more = case.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, more.to(ids.device)], dim=1)
        one: list[bool] = []
        with traced(one), offload.attach(case.model, **settings_of(args)) as runtime:
            tokens = runtime.generate(
                ids, max_new_tokens=args.task_tokens, do_sample=False, eos_token_id=None
            )
            report = runtime.report()
        first = tokens if first is None else first
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
    assert first is not None
    return trace, first


@torch.no_grad()
def measure_flips(record: Record, case: Case, tokens: Tensor, rows: int) -> None:
    """Tokens of a verified run that transformers' own cache would not have chosen, and not for rounding.

    Args:
        record: Written to.
        case: The model.
        tokens: [1, context + new].
        rows: Tokens fed at once.
    """
    model, n = case.model, case.context
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for at in range(0, n - 1, 1024):
        model(input_ids=tokens[:, at : min(at + 1024, n - 1)], **{CACHE: cache}, logits_to_keep=1)
    answers = tokens[0, n:]

    def logits(at_once: int) -> Tensor:
        """float32 [new, V], behind the prompt and all tokens of the answer but the last."""
        parts = []
        for at in range(n - 1, tokens.shape[1] - 1, at_once):
            ids = tokens[:, at : min(at + at_once, tokens.shape[1] - 1)]
            parts.append(model(input_ids=ids, **{CACHE: cache}).logits[0].float())
        cache.crop(n - 1 - cache.get_seq_length())
        return torch.cat(parts)

    one, several = logits(1), logits(rows)
    best = one.topk(64, dim=-1)
    noise = (best.values - several.gather(1, best.indices)).abs().flatten()
    # Of a few ten thousand changes: the 99.9th percentile.
    tau = float(noise.sort().values[int(0.999 * (noise.numel() - 1))])
    margin = best.values[:, 0] - one.gather(1, answers[:, None])[:, 0]
    flips = answers != best.indices[:, 0]
    beyond = int((flips & (margin > tau)).sum())
    record.row(
        f"flips {case.name}", context=n, tokens=int(answers.numel()), flips=int(flips.sum()), beyond_noise=beyond,
        tau=tau, largest_margin=float(margin.max()), rows=rows,
        flips_of_the_stock_cache_by_itself=int((several.argmax(-1) != best.indices[:, 0]).sum()),
    )  # fmt: skip
    record.bars["bf16_flips_beyond_noise"] = beyond


VOCABULARY, PLACES = 6, 3
TOKEN_WORKERS = 4  # processes that compare tokens: each spends its time on launches


def sampling_p_value(sampling: dict[str, Any], draws: int) -> float:
    """Chi-square of sequences of three tokens that are drafted and judged, against what they are sampled from.

    The drafts come from other logits than the judge's, so that about a third of them is rejected.

    Args:
        sampling: As `generate` takes it.
        draws: Sequences.

    Returns:
        The probability of a deviation at least as large.
    """
    torch.set_num_threads(1)
    torch.manual_seed(11)
    true = 1.5 * torch.randn(PLACES, VOCABULARY, VOCABULARY)  # by place and by the token before
    drafted = true + 0.7 * torch.randn_like(true)
    model, _ = tiny_model()
    config = GenerationConfig(do_sample=True, **sampling)
    config._eos_token_tensor = None
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    chances = torch.zeros((VOCABULARY,) * PLACES, dtype=torch.float64)

    def expect(ids: list[int], chance: float) -> None:
        place = len(ids) - 1
        if place == PLACES:
            chances[tuple(ids[1:])] = chance
            return
        scores = processors(torch.tensor([ids]), true[place, ids[-1]][None].clone())
        for token, p in enumerate(torch.softmax(scores.double(), -1)[0].tolist()):
            if p:
                expect([*ids, token], chance * p)

    expect([0], 1.0)
    chooser = verify._Chooser(processors, config, set(), torch.device("cpu"))
    counts = torch.zeros_like(chances)
    for _ in range(draws):
        ids, length = torch.zeros((1, PLACES + 2), dtype=torch.long), 1
        while length <= PLACES:
            chooser.begin()
            n = min(2, PLACES - length)
            for at in range(length, length + n):
                logits = drafted[at - 1, ids[0, at - 1]][None].clone()
                ids[:, at] = chooser.draft(ids[:, :at], logits)
            judged = torch.stack(
                [true[at - 1, ids[0, at - 1]] for at in range(length, length + n + 1)]
            )
            agreed, targets = verify._compare(chooser, ids, judged, length, n)
            kept = min(agreed, n) + 1
            ids[0, length : length + kept] = targets[:kept]
            chooser.end(kept)
            length += kept
        counts[tuple(ids[0, 1 : PLACES + 1].tolist())] += 1
    expected = chances * draws
    often = expected >= 5
    seen = [*counts[often].tolist(), float(counts[~often].sum())]
    wanted = [*expected[often].tolist(), float(expected[~often].sum())]
    if wanted[-1] < 5:  # too few for a class of their own
        rest_seen, rest_wanted = seen.pop(), wanted.pop()
        seen[-1] += rest_seen
        wanted[-1] += rest_wanted
    square = sum((a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True))
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(square / 2, dtype=torch.float64)))


def tiny_model() -> tuple[Any, Any]:
    """A model whose `generate` makes the processors, and its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), config


def different_tokens(args: Namespace, worker: int, workers: int) -> dict[str, dict[str, Any]]:
    """Tokens that are not the stock cache's, of every so many prompts and settings.

    Args:
        args: Of the command line.
        worker: Which of them: the first begins with 0.
        workers: How many share the work.

    Returns:
        By what was compared: tokens that differ, and what else a row says.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, _, context = args.short.partition("@")
    case = prepare(source, int(context), 64 * args.prompts, torch.float32, device)
    model, n = case.model, case.context
    call: dict[str, Any] = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    step = max(1, (case.ids.shape[1] - n) // max(1, args.prompts))
    prompts = [case.ids[:, i * step : i * step + n] for i in range(args.prompts)]
    mine = prompts[worker::workers]
    found: dict[str, dict[str, Any]] = {}

    def verified(ids: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Report]:
        with offload.attach(model, **settings_of(args)) as runtime:
            return runtime.generate(ids, **settings), runtime.report()

    began = time.perf_counter()
    want = [model.generate(ids, attention_mask=torch.ones_like(ids), **call) for ids in mine]
    found["stock"] = {"seconds": time.perf_counter() - began, "prompts": len(mine)}
    for share in (0.0, 0.5):
        one = found[f"greedy, {share:.0%} of drafts made wrong"] = {
            "different": 0,
            "prompts": len(mine),
        }
        began = time.perf_counter()
        with wrong_drafts(share) if share else nullcontext():
            for ids, tokens in zip(mine, want, strict=True):
                got, report = verified(ids, call)
                one["different"] += int((got != tokens).sum())
                one["last_run"] = figures(report)
        one["seconds"] = time.perf_counter() - began
    # Each prompt in one of the ways, and each way at least once.
    for at in range(worker, max(args.prompts, len(SAMPLED)), workers):
        sampling = SAMPLED[at % len(SAMPLED)]
        sampled, ids = call | {"do_sample": True} | sampling, prompts[at % args.prompts]
        torch.manual_seed(7)
        stock = model.generate(ids, attention_mask=torch.ones_like(ids), **sampled)
        torch.manual_seed(7)
        with wrong_drafts(0.2):
            got, report = verified(ids, sampled)
        one = found.setdefault(f"seeded, {json.dumps(sampling)}", {"different": 0, "prompts": 0})
        one["different"] += int((got != stock).sum())
        one["prompts"] += 1
        one["last_run"] = figures(report)
    return found


def record_tokens(record: Record, found: list[dict[str, dict[str, Any]]], args: Namespace) -> None:
    """Writes what the workers of `different_tokens` found."""
    source, _, context = args.short.partition("@")
    name, worst = Path(source).name, {"greedy": 0, "seeded": 0}
    for what in dict.fromkeys(what for one in found for what in one):
        rows = [one[what] for one in found if what in one]
        row = dict(rows[0])
        for key in ("different", "seconds", "prompts"):
            if key in row:
                row[key] = sum(one[key] for one in rows)
        record.row(f"{what}, {name}", context=int(context), tokens=args.new_tokens, **row)
        kind = what.partition(",")[0]
        if kind in worst:
            worst[kind] += row["different"]
    record.bars["greedy_mismatches_fp32"] = worst["greedy"]
    record.bars["seeded_mismatches_fp32"] = worst["seeded"]


def cycles_per_second() -> float:
    """Of the clock by which `torch.cuda._sleep` counts."""
    cycles = 20_000_000
    torch.cuda._sleep(1000)
    return cycles / min(seconds(lambda: torch.cuda._sleep(cycles)) for _ in range(5))


@contextmanager
def paced(to: float, rate: float) -> Iterator[None]:
    """Within, pages come from the host no faster than so many bytes per second.

    Args:
        to: Bytes per second that are wanted.
        rate: That there are.
    """
    right, clock = HostReader._copy, cycles_per_second()

    def copy(self: Any, pages: Any, rows: int, start: int, stop: int, buffer: Tensor) -> None:
        right(self, pages, rows, start, stop, buffer)
        nbytes = rows * (stop - start) * pages.page_bytes
        torch.cuda._sleep(int(nbytes * (1 / to - 1 / rate) * clock))  # on the stream of the copies

    HostReader._copy = copy  # type: ignore[method-assign]
    try:
        yield
    finally:
        HostReader._copy = right  # type: ignore[method-assign]


@contextmanager
def looking_ahead(wanted: bool) -> Iterator[None]:
    """Within, drafts go on beside their pass, or wait for it."""
    right = Runtime._looks_ahead
    Runtime._looks_ahead = lambda self: wanted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Runtime._looks_ahead = right  # type: ignore[method-assign]


def measure_shape(
    record: Record, model: Any, vectors: Any, trace: list[bool], args: Namespace
) -> None:
    """Mode verified beside mode fast at the 8B shape."""
    n, device = args.tokens, model.device
    torch.manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (1, n), device=device)
    base: dict[str, Any] = {"rung": "4k4v", "chunk": args.chunk, "compile": True}
    on_card = device.type == "cuda"
    if on_card:
        base["gpu_memory"] = CAP_BYTES
    else:
        base |= {"window": 192, "draft": 7}
    agreed = sum(trace) / len(trace)
    rate = pinned_rate(device) if on_card else 0.0
    ways: dict[str, Any] = {"verified": (looking_ahead(on_card), nullcontext())}
    ways["verified, waits"] = (looking_ahead(False), nullcontext())
    if on_card:
        for to in (25e9, 12e9):
            ways[f"verified, {to / 1e9:.0f} GB/s"] = (looking_ahead(True), paced(to, rate))
    call: dict[str, Any] = {"max_new_tokens": args.shape_tokens, "do_sample": False}
    rows: dict[str, Any] = {}
    error = "tokens are forced: see `agreement` and `greedy`"
    with nullcontext() if vectors is None else played(model, vectors, n), forced(trace):
        for mode in ("fast", "verified"):
            with offload.attach(model, **base, mode=mode) as runtime:
                runtime.generate(
                    ids[:, : min(n, 4000)], max_new_tokens=40, do_sample=False
                )  # compiles
            free()
            with offload.attach(model, **base, mode=mode) as runtime:
                cache = runtime.new_cache(max_tokens=n + args.shape_tokens)
                for way, (ahead, held_back) in ways.items() if mode == "verified" else [("fast", (nullcontext(),) * 2)]:  # fmt: skip
                    with ahead, held_back:
                        runtime.generate(ids, cache=cache, **call)
                    report = runtime.report()
                    print(f"{way}: {report}", flush=True)
                    rows[way] = figures(report)
                    if report.verify_s and on_card:
                        rows[way]["h2d_share"] = report.decode_h2d_bytes / report.verify_s / rate
            free()
    step = rows["fast"]["ms_per_token"]
    for way, found in rows.items():
        if way != "fast" and on_card and found["verify_passes"]:
            found["pinned_bytes_per_s"] = rate
            found["draft_over_fast"] = found["draft_ms_per_token"] / step
        record.row(f"{way} {n}", **found, forced_agreement=agreed, error=error)
    if on_card:
        record.bars["verify_h2d_share"] = rows["verified, waits"].get("h2d_share", 0.0)
    record.bars["verified_ms_131072"] = rows["verified"]["ms_per_token"]
    record.bars["verified_vs_fast_131072"] = rows["verified"]["ms_per_token"] / step


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
    parser.add_argument("--only", nargs="*", default=["sampling", "agreement", "flips", "shape", "tokens"], help="parts")  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=100_000, help="sequences sampled, for each setting"
    )
    args = parse(parser)
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.smoke:
        args.long = args.short = "smollm2@400"
        args.tokens, args.shape_tokens, args.chunk = 640, 40, 128
        args.task_tokens, args.prompts, args.new_tokens, args.draws = 12, 2, 12, 300
    named = {"long": Path(args.long).name, "short": Path(args.short).name, "out": None}
    record = Record("verified", settings={**vars(args), **named})
    trace = [True]
    p_values: list[Future[float]] = []
    if "sampling" in args.only:
        # Beside what is no matter of time; over before what is.
        pool = ProcessPoolExecutor(len(SAMPLED), mp_context=multiprocessing.get_context("spawn"))
        p_values = [pool.submit(sampling_p_value, sampling, args.draws) for sampling in SAMPLED]
    tokens_found: list[Future[dict[str, dict[str, Any]]]] = []
    comparing: ProcessPoolExecutor | None = None
    if "tokens" in args.only:
        workers = TOKEN_WORKERS if device.type == "cuda" else 1
        comparing = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        tokens_found = [
            comparing.submit(different_tokens, args, at, workers) for at in range(workers)
        ]
    if "agreement" in args.only:
        source, _, context = args.long.partition("@")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        case = prepare(source, int(context), 0, dtype, str(device))
        case.name = Path(source).name
        trace, tokens = measure_agreement(record, case, args)
        record.bars["agreement_qwen_16k"] = sum(trace) / max(1, len(trace))
        if "flips" in args.only:
            measure_flips(record, case, tokens, pace.MOST_ROWS)
        del case
        free()
        record.write(args.out)
    if comparing is not None:
        record_tokens(record, [found.result() for found in tokens_found], args)
        comparing.shutdown()  # what they hold of the card is not to be missed at the 8B shape
        record.write(args.out)
    for sampling, p_value in zip(SAMPLED, p_values, strict=False):
        record.row(f"sampling {json.dumps(sampling)}", p_value=p_value.result(), draws=args.draws)
    if p_values:
        record.bars["sampling_p_value"] = min(p_value.result() for p_value in p_values)
    if "shape" in args.only:
        vectors = None if args.smoke else load_vectors(args.long, 1200, device)
        model = build_model(args.smoke, device)
        measure_shape(record, model, vectors, trace, args)
        del model, vectors
        free()
        record.write(args.out)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
