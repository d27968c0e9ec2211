"""Is what a plan says so? A step and the most device bytes, predicted before a run and measured; and how long planning takes.

- `steps`: an 8B-shaped Llama with random weights under a cap, in modes exact, fast and verified, by length, batch and rung.
  The layout is the one that the runtime chose, its price `offload.scheduler.cost.times`, as `offload plan` prints it. Measured
  is the time from token to token of `Runtime.generate`, median behind some; in mode verified, whose tokens come in bursts, the
  mean behind some. Layers are not compiled. The planned bytes are those of the layout, the measured ones the most that
  the driver counted in use from before `attach` to the last token; it is not asked while steps are timed, which it holds up.
- `plan`: milliseconds of `offload.plan.plan`, median of some calls, of several models up to 1M tokens.

Modes fast and verified attend with keys and queries recorded from a real model (`_vectors.py`), as the costs' constants were
measured. Prompts of up to 65,536 tokens in all sequences are read; of longer ones the first part is filled with these keys and
random values, and two chunks are read: so activations are there as in a prefill, but what the allocator loses in many
chunks is not. Random weights say nothing about drafts: as many are kept as the price expects.

    python tools/bench/predictions.py --onto benchmarks/scheduler.json
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _record import GIB, PeakMemory, Record, arguments, keep, parse, synchronize
from _vectors import Played, played
from decode import free, load_vectors
from generate import CAP_BYTES, build_model, file_shape
from torch import Tensor
from transformers import AutoConfig
from verified import forced

import offload
from offload.checkpoint import FileShape
from offload.config import OffloadConfig
from offload.demand import priced_shape, way_of
from offload.plan import Machine, plan, shape_of
from offload.probe import known_profile
from offload.scheduler import cost
from offload.scheduler.pace import MOST_ROWS
from offload.scheduler.profiles import Profile, profile_of
from offload.trace import Watch

READ = 65536  # tokens of all sequences up to which a prompt is read and not filled in
LEAST = 12  # settings of which a median says something
BARS = (
    "step_settings",
    "step_error_median",
    "step_error_max",
    "bytes_error_max",
    "bytes_under",
    "plan_ms",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A run.

    Attributes:
        mode: Of it.
        tokens: Of each sequence, before the answer.
        batch: Sequences.
        rung: Of all layers; None: as the runtime chooses, or none in mode exact.
        cap: Device bytes, as the driver counts them.
    """

    mode: str
    tokens: int
    batch: int = 1
    rung: str | None = None
    cap: int = CAP_BYTES

    @property
    def name(self) -> str:
        """As in `fast 4k4v, 8 x 8192, 22.5 GiB`."""
        way = self.mode if self.rung is None else f"{self.mode} {self.rung}"
        return f"{way}, {self.batch} x {self.tokens}, {self.cap / GIB:g} GiB"


def _gib(size: float) -> int:
    return int(size * GIB)


# Caps with which most tokens leave the device, but where everything shall fit. What takes longest comes last.
SETTINGS = (
    Setting(mode="exact", tokens=8192),
    Setting(mode="exact", tokens=8192, batch=4, cap=_gib(19)),
    Setting(mode="exact", tokens=8192, batch=8),
    Setting(mode="exact", tokens=32768, cap=_gib(18)),
    Setting(mode="fast", tokens=8192),
    Setting(mode="fast", tokens=8192, batch=8, rung="4k4v"),
    Setting(mode="fast", tokens=32768, rung="4k4v", cap=_gib(19)),
    Setting(mode="fast", tokens=65536, rung="3k3v", cap=_gib(20)),
    Setting(mode="fast", tokens=32768, batch=4, rung="4k4v"),
    Setting(mode="fast", tokens=131072, rung="4k4v"),
    Setting(mode="fast", tokens=131072, rung="2k2v", cap=_gib(20.5)),
    Setting(mode="exact", tokens=131072),
    Setting(mode="verified", tokens=32768, rung="4k4v", cap=_gib(19)),
    Setting(mode="fast", tokens=131072, rung="clusters", cap=_gib(18.5)),
    Setting(mode="fast", tokens=262144, rung="2k2v"),
    Setting(mode="fast", tokens=262144, rung="clusters", cap=_gib(20)),
)
SMALL = (
    Setting(mode="exact", tokens=700, batch=2),
    Setting(mode="exact", tokens=1600),
    Setting(mode="fast", tokens=700, batch=2, rung="4k4v"),
    Setting(mode="fast", tokens=1600, rung="2k2v"),
    Setting(mode="fast", tokens=1600, rung="clusters"),
    Setting(mode="verified", tokens=700, rung="4k4v"),
    Setting(mode="fast", tokens=700, rung="no such rung"),  # that a row says so
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What all settings share.

    Attributes:
        model: Not attached.
        shape: As its files would say it.
        profile: Of the card; of some card on a machine without one.
        vectors: Of `_vectors.record`; None: random ones.
        smoke: A small size, without a cap.
        warm: Tokens that are not counted.
        counted: Tokens that are.
    """

    model: Any
    shape: FileShape
    profile: Profile
    vectors: dict[str, Any] | None
    smoke: bool
    warm: int
    counted: int

    def config_of(self, setting: Setting) -> OffloadConfig:
        """What `attach` gets."""
        asked: dict[str, Any] = {"mode": setting.mode, "compile": False}
        if setting.rung is not None:
            asked["rung"] = setting.rung
        if self.model.device.type == "cuda":
            asked["gpu_memory"] = setting.cap
        if self.smoke:
            asked |= {"window": 192, "chunk": 256}
        if setting.mode == "verified" and self.model.device.type != "cuda":
            asked["draft"] = 7  # drafts do not pay there
        return OffloadConfig.build(None, **asked)

    def new_tokens(self, setting: Setting) -> tuple[int, int]:
        """Tokens that are not counted, and those that are."""
        # A pass of mode verified brings many at once, and how long drafts pay is found out on the way.
        many = 1 if setting.mode != "verified" else 4 if self.smoke else 16
        return many * self.warm, many * self.counted


@torch.no_grad()
def fill(model: Any, cache: Any, ids: Tensor, tokens: int) -> None:
    """Puts keys and values of the first tokens of all sequences into a cache, as if a prompt had been read.

    Args:
        model: Whose keys are recorded ones where it is `played`, else random, as values are.
        cache: Started, empty.
        ids: [B, N], the tokens that the cache then says it holds.
        tokens: How many of them.
    """
    heads, size = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    piece = cache.layout.chunk
    cache.begin_pass(ids[:, :tokens], None)
    for index, (layer, store) in enumerate(
        zip(model.model.layers, cache.layer_stores, strict=True)
    ):
        made = layer.self_attn.k_proj
        generator = torch.Generator(ids.device).manual_seed(index)
        for first in range(0, tokens, piece):
            like = (min(piece, tokens - first), heads, size)
            keys, values = (
                torch.randn(like, generator=generator, device=ids.device).to(model.dtype)
                for _ in range(2)
            )
            if isinstance(made, Played):
                keys = made.vectors[made.places[first : first + like[0]]].view(like)
            store.put(first, torch.cat([keys, values], dim=-1).expand(ids.shape[0], -1, -1, -1))
    synchronize()
    cache.end_pass()


@contextmanager
def agreeing(setting: Setting, layout: Any) -> Iterator[float | None]:
    """Within, as many drafted tokens are kept as the price of mode verified expects; yields that share."""
    if setting.mode != "verified" or layout.rung is None:
        yield None
        return
    agreement = cost.AGREEMENT[0 if layout.rung.clustered else layout.rung.bits]
    every = round(1 / (1 - agreement))
    with forced([i != every // 2 for i in range(every)]):
        yield agreement


def predicted(bench: Bench, runtime: Any, layout: Any, setting: Setting) -> dict[str, Any]:
    """What is said of a run before it: by the layout that it has, and by a plan that knows no more than the model's files."""
    config, (warm, counted) = runtime.config, bench.new_tokens(setting)
    output = warm + counted
    way = way_of(config, batch=setting.batch, prompt=setting.tokens, output=output)
    priced = shape_of(bench.shape)
    times = cost.times(layout, priced, bench.profile, way)
    busy = cost.step(layout, priced, bench.profile, way)
    held = runtime.shape.weights
    itemsize = max(row.dtype.itemsize for row in runtime.shape.rows)
    # As `report` has it in decisions, which counts embeddings among what a step reads.
    by_runtime = priced_shape(runtime.shape, weights=held, parameters=held / itemsize)
    host = Machine(profile=bench.profile, device=setting.cap, host=2**40)
    said = plan(config, bench.shape, host, context=setting.tokens + output, output=output, batch=setting.batch)  # fmt: skip
    return {
        "predicted_ms": 1000 * times.token, "parts_ms": {part: 1000 * s for part, s in times.parts.items()}, "limit": times.limit,
        "predicted_h2d_bytes": busy.bytes_in, "planned_bytes": layout.device_bytes, "planned": dict(layout.device),
        "host_bytes": layout.host_bytes, "tokens_on_host": layout.host_tokens, "chunk": layout.chunk,
        "lifted_layers": layout.lifted_layers, "staging_bytes": layout.staging_bytes,
        "by_decisions_ms": 1000 * cost.times(layout, by_runtime, bench.profile, way).token,
        "by_plan_ms": None if said.times is None else 1000 * said.times.token,
        "by_plan_bytes": None if said.layout is None else said.layout.device_bytes,
        "basis": bench.profile.basis, "card": bench.profile.name,
    }  # fmt: skip


def ran(bench: Bench, runtime: Any, cache: Any, setting: Setting, ids: Tensor, peak: PeakMemory) -> dict[str, Any]:  # fmt: skip
    """What a run took."""
    warm, counted = bench.new_tokens(setting)
    began = time.perf_counter()
    filled = 0
    if setting.batch * setting.tokens > (1000 if bench.smoke else READ):
        filled = max(0, setting.tokens - 1 - 2 * cache.layout.chunk)
        fill(bench.model, cache, ids, filled)
    filled_s = time.perf_counter() - began

    def rest(tokens: int) -> None:
        peak.resting = tokens >= setting.batch * warm

    watch = Watch(rest)
    runtime.generate(
        ids, attention_mask=torch.ones_like(ids), cache=cache, streamer=watch, max_new_tokens=warm + counted,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    peak.resting = False
    report = runtime.report()
    # Of all sequences together, one of which is counted.
    bursts = [(at, made / setting.batch) for at, made in watch.bursts if made / setting.batch >= warm]  # fmt: skip
    steps = [1000 * (b - a) / (n - m) for (a, m), (b, n) in pairwise(bursts)]
    (first, before), (last, made) = bursts[0], bursts[-1]
    mean = 1000 * (last - first) / (made - before)
    return {
        "measured_ms": mean if setting.mode == "verified" else statistics.median(steps), "mean_ms": mean,
        "spread_ms": [min(steps), max(steps)], "counted_tokens": made - before, "filled_tokens": filled, "filled_s": filled_s,
        "prefill_s": report.prefill_s, "capture_s": report.capture_s, "replayed_steps": report.replayed_steps,
        "h2d_bytes_per_token": report.decode_h2d_bytes / max(1, report.new_tokens), "fetched_bytes": report.fetched_bytes,
        "tail_mass": report.tail_mass, "skipped_mass": report.skipped_mass, "resident_bytes": report.bytes["resident"],
        "verify_passes": report.verify_passes, "drafted": report.drafted_tokens, "accepted": report.accepted_tokens,
        "parts": [[part.purpose, part.planned, part.measured] for part in report.device_parts],
        "unaccounted_bytes": report.unaccounted, "notes": report.notes,
    }  # fmt: skip


def measured(bench: Bench, setting: Setting) -> dict[str, Any]:
    """A row of a setting."""
    model = bench.model
    config, tokens = bench.config_of(setting), setting.tokens
    torch.manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (setting.batch, tokens), device=model.device)
    plays = bench.vectors is not None and setting.mode != "exact"
    with played(model, bench.vectors, tokens) if plays and bench.vectors else nullcontext():
        free()
        with PeakMemory() as peak, offload.attach(model, config) as runtime:
            cache = runtime.new_cache(tokens + sum(bench.new_tokens(setting)))
            cache.start(setting.batch)
            said = predicted(bench, runtime, cache.layout, setting)
            with agreeing(setting, cache.layout) as agreement:
                found = ran(bench, runtime, cache, setting, ids, peak)
            cache.close("it was measured")
    row = {
        "mode": setting.mode, "rung": setting.rung, "tokens": tokens, "batch": setting.batch, "cap_bytes": setting.cap,
        "predicted_ms": said["predicted_ms"], "measured_ms": found["measured_ms"],
        "step_error": abs(said["predicted_ms"] / found["measured_ms"] - 1), "planned_bytes": said["planned_bytes"],
    }  # fmt: skip
    if peak.nbytes:
        row["peak_bytes"] = peak.nbytes
        row["bytes_error"] = abs(said["planned_bytes"] / peak.nbytes - 1)
    more = {} if agreement is None else {"agreement": agreement}
    return row | said | found | more | {"plays_vectors": plays, "error": "tests compare the tokens"}


def measure_steps(
    record: Record,
    bench: Bench,
    settings: tuple[Setting, ...],
    args: Namespace,
    earlier: dict[str, Any] | None,
) -> None:
    """Each setting, one after the other; one that raises is a row that says so."""
    began = time.perf_counter()
    for setting in settings:
        if time.perf_counter() - began > args.limit_s:
            record.row(setting.name, failed=f"not begun: {args.limit_s:g} s were over")
            continue
        since = time.perf_counter()
        try:
            row = measured(bench, setting)
        except Exception as error:  # noqa: BLE001 - the other settings are to be measured all the same
            row = {"failed": f"{type(error).__name__}: {error}"}
        free()
        record.row(setting.name, **row, took_s=time.perf_counter() - since)
        whole(record, earlier).write(args.out)  # what follows may not fit the time


def measure_plan(record: Record, repeats: int) -> None:
    """Planning time of some models, for a card of 24 GB."""
    llama: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2**20,
    }  # fmt: skip
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}  # fmt: skip
    small = {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 2**20,
    }  # fmt: skip
    models = {
        "llama 8b": ("llama", llama), "llama 7b, as many KV heads": ("llama", llama | {"num_key_value_heads": 32}),
        "llama 70b": ("llama", llama | large), "qwen2 0.5b": ("qwen2", small),
    }  # fmt: skip
    for name, (kind, values) in models.items():
        shape = file_shape(AutoConfig.for_model(kind, **values), "bfloat16")
        for card, mode, context, batch in (
            ("rtx4090", "fast", 8192, 8),
            ("rtx4090", "fast", 131072, 1),
            ("rtx4090", "fast", 2**20, 1),
            ("rtx4090", "verified", 131072, 1),
            ("rtx4090", "exact", 131072, 1),
            ("h100", "exact", 2**20, 1),
            ("h100", "fast", 2**20, 4),
        ):
            profile = profile_of(card)
            machine = Machine(profile=profile, device=profile.memory, host=profile.host * 3 // 4)
            config = OffloadConfig.build(None, mode=mode)
            times, said = [], plan(config, shape, machine, context=context, batch=batch)
            for _ in range(repeats):
                began = time.perf_counter()
                plan(config, shape, machine, context=context, batch=batch)
                times.append(1000 * (time.perf_counter() - began))
            record.row(
                f"plan {name}, {card}, {mode}, {batch} x {context}", plan_ms=statistics.median(times), spread_ms=[min(times), max(times)],
                verdict=said.verdict, largest=said.largest, error="tests/test_plan.py compares with the runtime",
            )  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of all rows that there are, whichever run measured them; a setting that failed does not count."""
    found: dict[str, float] = {}
    steps = [row["step_error"] for row in rows if "step_error" in row]
    if steps:
        found["step_settings"] = len(steps)
    if len(steps) >= LEAST:
        found |= {"step_error_median": statistics.median(steps), "step_error_max": max(steps)}
    counted = [row for row in rows if "bytes_error" in row]
    if counted:
        found["bytes_error_max"] = max(row["bytes_error"] for row in counted)
        found["bytes_under"] = sum(row["planned_bytes"] < row["peak_bytes"] for row in counted)
    plans = [row["plan_ms"] for row in rows if "plan_ms" in row]
    return found | ({"plan_ms": max(plans)} if plans else {})


def whole(record: Record, earlier: dict[str, Any] | None) -> Record:
    """A record with the rows and bars of an earlier one that this run has not measured."""
    both, others = Record(record.name, dict(record.settings), list(record.rows)), {}
    if earlier is not None:
        keep(both, earlier)
        others = {bar: value for bar, value in earlier["bars"].items() if bar not in BARS}
    both.bars = others | bars(both.rows)
    return both


def table(rows: list[dict[str, Any]]) -> str:
    """Of settings: predicted beside measured."""
    lines = [f"{'':38}{'predicted':>10}{'measured':>10}{'error':>8}{'planned GiB':>13}{'peak':>8}{'error':>8}  parts, ms"]  # fmt: skip
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['what']:38}  {row['failed']}")
        if "step_error" not in row:
            continue
        peak = row.get("peak_bytes")
        share = "-" if not peak else f"{row['planned_bytes'] / peak - 1:+.1%}"
        shown = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms"].items())
        lines.append(
            f"{row['what']:38}{row['predicted_ms']:10.2f}{row['measured_ms']:10.2f}{row['predicted_ms'] / row['measured_ms'] - 1:+8.1%}"
            f"{row['planned_bytes'] / GIB:13.2f}{'-' if not peak else f'{peak / GIB:.2f}':>8}{share:>8}  {shown}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=["plan", "steps"], choices=["plan", "steps"], help="parts")  # fmt: skip
    parser.add_argument("--settings", nargs="*", help="parts of names of settings, for instance 'exact' '262144'; none: all")  # fmt: skip
    parser.add_argument("--vectors", default="smollm2@7168", help="a real model and the tokens that it reads; '' for random ones")  # fmt: skip
    parser.add_argument("--warm", type=int, default=8, help="tokens that are not counted")
    parser.add_argument("--counted", type=int, default=24, help="tokens that are; in mode verified 16 times both")  # fmt: skip
    parser.add_argument("--limit-s", type=float, default=280, help="seconds after which no setting begins")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="plans of each kind")
    parser.add_argument("--onto", type=Path, help="a record whose other rows are kept")
    args = parse(parser)
    logging.basicConfig(level=logging.WARNING)
    if args.smoke:
        args.warm, args.counted, args.repeats = 3, 4, 1
        args.vectors = args.vectors and "smollm2@1200"
    record = Record("scheduler", settings={**vars(args), "vectors": Path(args.vectors).name, "out": None, "cap_bytes": CAP_BYTES})  # fmt: skip
    record.settings["onto"] = None
    earlier = json.loads(args.onto.read_text(encoding="utf-8")) if args.onto else None
    if "plan" in args.only:
        measure_plan(record, args.repeats)
    if "steps" in args.only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_card = device.type == "cuda"
        # An answer has room for four times what was recorded of one, and drafts go on behind it.
        recorded = (16 * (args.warm + args.counted) + 4 * MOST_ROWS) // 4
        vectors = load_vectors(args.vectors, recorded, device) if args.vectors else None
        model = build_model(args.smoke, device)
        bench = Bench(
            model=model,
            shape=file_shape(model.config, str(model.dtype).removeprefix("torch.")),
            profile=known_profile(torch.cuda.get_device_name()) if on_card else profile_of("h100"),
            vectors=vectors,
            smoke=args.smoke,
            warm=args.warm,
            counted=args.counted,
        )
        settings = tuple(
            setting
            for setting in (SMALL if args.smoke else SETTINGS)
            if not args.settings or any(part in setting.name for part in args.settings)
        )
        measure_steps(record, bench, settings, args, earlier)
        print(table(record.rows))
    print(f"written to {whole(record, earlier).write(args.out).name}")


if __name__ == "__main__":
    main()
