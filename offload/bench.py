"""How fast does a model read and write here, how deep in a context, in which memory and how close to exact?

The cases are llama-bench's: so many tokens read (pp) or generated (tg) behind so many others (the depth). For each mode
and depth the cache is filled once. Every run then starts at that depth: what it added is forgotten again, or, where a
model's states cannot go back, everything is read anew.

Shorter cases run first, since a block that was moved to the host stays there when the cache goes back. The first run of
a case, which is not counted, moves all that later ones would: they start from equal caches.

torch, transformers and pydantic are imported by `bench`, not by this module.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from offload.errors import BudgetError, InputError, OffloadError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    from offload.cache import OffloadCache
    from offload.config import OffloadConfig
    from offload.report import Report
    from offload.runtime import Runtime

MEASURED, DOES_NOT_FIT, NOT_SUPPORTED = "measured", "does not fit", "not supported"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is timed: tokens that are read, or tokens that are generated, behind others.

    Attributes:
        prompt: Tokens read; 0 where tokens are generated.
        generated: Tokens generated; 0 where tokens are read.
        depth: Tokens that the cache holds before.
    """

    prompt: int = 0
    generated: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        """Refuses what is no case."""
        if min(self.prompt, self.generated, self.depth) < 0 or bool(self.prompt) == bool(self.generated):  # fmt: skip
            raise ValueError(f"{self} neither reads nor generates")

    @property
    def name(self) -> str:
        """As llama-bench has it: `pp2048`, `tg128 @ d32768`."""
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.prompt or self.generated

    @property
    def fed(self) -> int:
        """Tokens of the prompt: the last one is fed by the first step, not by what reads prompts."""
        return self.depth + self.prompt + 1

    @property
    def room(self) -> int:
        """Tokens of prompt and answer."""
        return self.fed + (self.generated or 1)


def cases(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int] = (0,)
) -> list[Case]:
    """Every length at every depth, once, in llama-bench's order. A length of 0 is none.

    Args:
        prompts: Tokens read.
        generated: Tokens generated.
        depths: Tokens before.
    """
    found: dict[Case, None] = {}
    for depth in depths:
        found |= {Case(prompt=n, depth=depth): None for n in prompts if n}
        found |= {Case(generated=n, depth=depth): None for n in generated if n}
    return list(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model.

    Attributes:
        name: For a reader.
        model_type: Of its config.
        parameters: How many.
        weights_bytes: What they take on the device, buffers included.
        dtype: Of the weights.
        device: Where it runs.
    """

    name: str
    model_type: str
    parameters: int
    weights_bytes: int
    dtype: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One counted run of a case.

    Attributes:
        tokens: Timed.
        seconds: That they took; without compiling and capturing.
        capture_s: For these.
        device_bytes: As `Report.bytes` adds up.
        peak_bytes: The most that torch had allocated on the card; None without one.
        host_bytes: Host pages.
        tokens_on_device: After the run.
        tokens_on_host: After the run.
        decode_h2d_bytes: KV that came to the device while tokens were generated.
        tail_mass: Share of attention that the replica answered for.
        skipped_mass: Share that was not read at all.
        left_out: Share of a prompt's attention that steps leave out; None where they leave none out.
        error_estimate: Of an attention layer's output, as `Report` has it; None where nothing is known of it.
        verify_passes: Exact passes over drafts.
        drafted_tokens: That they looked at.
        accepted_tokens: Of these, kept.
    """

    tokens: int
    seconds: float
    capture_s: float = 0.0
    device_bytes: int = 0
    peak_bytes: int | None = None
    host_bytes: int = 0
    tokens_on_device: int = 0
    tokens_on_host: int = 0
    decode_h2d_bytes: int = 0
    tail_mass: float = 0.0
    skipped_mass: float = 0.0
    left_out: float | None = None
    error_estimate: float | None = 0.0
    verify_passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens timed in a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How close the tokens of a row are to exact ones.

    Attributes:
        steps: "exact": attention to every key in full. "replica": mode fast, some of it from low bits. "sparse": mode fast, some of
            it left out. "verified": drafted by mode fast, and exact.
        tail_mass: "replica": share of attention from low bits, mean.
        skipped_mass: "replica": share that was not read, mean.
        error_estimate: "replica": of an attention layer's output, mean; None where nothing is known of it.
        left_out: "sparse": share of a prompt's attention, mean.
        accepted_per_pass: "verified": drafted tokens that an exact pass kept, mean.
    """

    steps: str
    tail_mass: float | None = None
    skipped_mass: float | None = None
    error_estimate: float | None = None
    left_out: float | None = None
    accepted_per_pass: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A case in a mode.

    Attributes:
        subject: The model.
        mode: Which.
        case: What was timed.
        status: "measured", "does not fit" or "not supported".
        reason: Why it was not measured.
        rung: The replica of offloaded tokens, or None without one.
        samples: One for each repetition; none where it was not measured.
        fills: How often the tokens before were read for this row.
        goes_back: Whether the cache could forget what a run added; otherwise it was filled anew for each.
        notes: What the runtime fell back to, and what was chosen.
    """

    subject: Subject
    mode: str
    case: Case
    status: str = MEASURED
    reason: str = ""
    rung: str | None = None
    samples: tuple[Sample, ...] = ()
    fills: int = 0
    goes_back: bool = True
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Mean over the repetitions."""
        return statistics.fmean(sample.tokens_per_s for sample in self.samples)

    @property
    def deviation(self) -> float:
        """Standard deviation of tokens_per_s; 0 of one repetition."""
        rates = [sample.tokens_per_s for sample in self.samples]
        return statistics.stdev(rates) if len(rates) > 1 else 0.0

    @property
    def ms_per_token(self) -> float:
        """Milliseconds, mean over the repetitions."""
        return 1000 * statistics.fmean(s.seconds / s.tokens for s in self.samples)

    @property
    def device_bytes(self) -> int:
        """The most of any repetition."""
        return max(sample.device_bytes for sample in self.samples)

    @property
    def peak_bytes(self) -> int | None:
        """The most that torch had allocated on the card in any repetition; None without a card."""
        return max((s.peak_bytes for s in self.samples if s.peak_bytes is not None), default=None)

    @property
    def host_bytes(self) -> int:
        """The most of any repetition."""
        return max(sample.host_bytes for sample in self.samples)

    @property
    def fidelity(self) -> Fidelity:
        """How close its tokens are to exact ones. Prompts are read exactly in every mode."""
        samples = self.samples
        if self.case.prompt:
            return Fidelity(steps="exact")
        passes = sum(sample.verify_passes for sample in samples)
        if passes:
            kept = sum(sample.accepted_tokens for sample in samples)
            return Fidelity(steps="verified", accepted_per_pass=kept / passes)
        offloads = any(sample.tokens_on_host for sample in samples)
        if self.mode != "fast" or self.rung is None or not offloads:
            return Fidelity(steps="exact")
        left = [s.left_out for s in samples if s.left_out is not None]
        if left:
            return Fidelity(steps="sparse", left_out=statistics.fmean(left))
        errors = [s.error_estimate for s in samples if s.error_estimate is not None]
        return Fidelity(
            steps="replica",
            tail_mass=statistics.fmean(sample.tail_mass for sample in samples),
            skipped_mass=statistics.fmean(sample.skipped_mass for sample in samples),
            error_estimate=statistics.fmean(errors) if len(errors) == len(samples) else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, every sample included. What was not measured is None."""
        measured, case = bool(self.samples), self.case
        return {
            "model": asdict(self.subject), "mode": self.mode, "test": case.name, "n_prompt": case.prompt,
            "n_gen": case.generated, "n_depth": case.depth, "status": self.status, "reason": self.reason,
            "rung": self.rung, "tokens_per_s": self.tokens_per_s if measured else None,
            "tokens_per_s_sd": self.deviation if measured else None,
            "ms_per_token": self.ms_per_token if measured else None,
            "device_bytes": self.device_bytes if measured else None,
            "peak_bytes": self.peak_bytes if measured else None,
            "host_bytes": self.host_bytes if measured else None,
            "fidelity": asdict(self.fidelity) if measured else None, "fills": self.fills,
            "goes_back": self.goes_back, "samples": [asdict(s) for s in self.samples], "notes": list(self.notes),
        }  # fmt: skip


def bench(
    model: Any,
    cases: Sequence[Case],
    *,
    configs: Sequence[OffloadConfig],
    name: str | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    repetitions: int = 5,
    delay_s: float = 0.0,
    on_row: Callable[[Row], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Row]:
    """Times every case in every mode. What does not fit gets a row that says so, and the others go on.

    Args:
        model: As `offload.attach` takes it, and not attached.
        cases: What is timed.
        configs: One for each mode.
        name: Of the model, for a reader; None: its type.
        ids: Tokens [1, N] that fill the cache and are read. None: random ones.
        seed: Of random tokens.
        repetitions: Counted runs of each case, behind one that is not.
        delay_s: Seconds between two rows.
        on_row: Called with each row when it is there.
        tell: Called with a line about what comes next.

    Returns:
        The rows, by config, in the order of the cases.

    Raises:
        InputError: There are fewer ids than the longest case takes, or no repetitions.
    """
    if repetitions < 1:
        raise InputError("Nothing is counted", asked=repetitions, there=None, change="Repeat 1 time or more.")  # fmt: skip
    longest = max((case.fed for case in cases), default=1)
    given = random_ids(model, longest, seed) if ids is None else ids.to(model.device)
    if given.shape[1] < longest:
        raise InputError(
            "The text is too short for these tests",
            asked=f"{longest:,} tokens",
            there=f"{given.shape[1]:,} tokens",
            change="Give a longer text, or fewer tokens to read (-p) or to begin at (-d).",
        )
    runs = _Runs(model, given, describe(model, name), repetitions, delay_s, tell or _silent)
    rows: list[Row] = []
    for config in configs:
        for row in runs.of_mode(config, cases):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return in_order(rows, cases)


def in_order(rows: Sequence[Row], cases: Sequence[Case]) -> list[Row]:
    """Rows by mode and, within it, in the order of the cases.

    Args:
        rows: Of `bench`, in the order in which they came.
        cases: As asked.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    places = {case: place for place, case in enumerate(cases)}
    return sorted(rows, key=lambda row: (modes.index(row.mode), places[row.case]))


def describe(model: Any, name: str | None = None) -> Subject:
    """What a model is.

    Args:
        model: Loaded.
        name: For a reader; None: its type.
    """
    from offload.model import weight_bytes

    return Subject(
        name=name or str(model.config.model_type),
        model_type=str(model.config.model_type),
        parameters=int(model.num_parameters()),
        weights_bytes=weight_bytes(model, model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def random_ids(model: Any, length: int, seed: int = 0) -> Tensor:
    """Tokens [1, length] of the model's vocabulary, on its device; longer ones begin as shorter ones of the same seed."""
    import torch

    random = torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings().weight.shape[0]
    return torch.randint(words, (1, length), generator=random).to(model.device)


@dataclass(slots=True)
class _Runs:
    """All runs of one model over one text."""

    model: Any
    ids: Tensor
    subject: Subject
    repetitions: int
    delay_s: float
    tell: Callable[[str], None]
    begun: int = 0  # rows

    def of_mode(self, config: OffloadConfig, cases: Sequence[Case]) -> Iterator[Row]:
        """The rows of a mode, each as soon as it is there."""
        from offload.runtime import attach

        try:
            runtime = attach(self.model, _settled(config, cases))
        except (BudgetError, UnsupportedModelError) as error:
            yield from (self._refused(config.mode, case, error) for case in cases)
            return
        with runtime:
            for depth in dict.fromkeys(case.depth for case in cases):
                at_depth = [case for case in cases if case.depth == depth]
                yield from self._at_depth(runtime, at_depth)

    def _at_depth(self, runtime: Runtime, cases: list[Case]) -> Iterator[Row]:
        mode, refused = runtime.config.mode, {}
        for longest in sorted(cases, key=lambda case: case.room, reverse=True):
            cache = runtime.new_cache(max_tokens=longest.room)
            try:
                cache.start(1)
                break
            except BudgetError as error:
                cache.close("it does not fit")
                refused[longest] = error
        else:
            cache = None
        yield from (self._refused(mode, case, error) for case, error in refused.items())
        if cache is None:
            return
        try:
            for case in sorted(cases, key=lambda case: case.room):
                if case not in refused:
                    yield self._row(runtime, cache, case)
        finally:
            cache.close("its tests are over")

    def _row(self, runtime: Runtime, cache: OffloadCache, case: Case) -> Row:
        mode, fills, samples = runtime.config.mode, 0, []
        if self.begun:
            time.sleep(self.delay_s)
        self.begun += 1
        try:
            for count in range(self.repetitions + 1):
                fills += self._go_to(runtime, cache, case.depth)
                what = f"{count} of {self.repetitions}" if count else "warm-up"
                self.tell(f"{mode} {case.name}: {what}")
                sample = self._run(runtime, cache, case)
                if count:
                    samples.append(sample)
        except BudgetError as error:
            return self._refused(mode, case, error)
        report = runtime.report()
        notes = [*report.notes]
        if report.replayed_steps and not runtime.config.decode.compile:
            notes.append("layers are not compiled, as in short runs: --set decode.compile=true")
        return Row(
            subject=self.subject, mode=mode, case=case, rung=report.rung, samples=tuple(samples), fills=fills,
            goes_back=fills <= 1, notes=tuple(notes),
        )  # fmt: skip

    def _go_to(self, runtime: Runtime, cache: OffloadCache, depth: int) -> bool:
        """Makes the cache hold the tokens before a case; whether they had to be read."""
        held = cache.get_seq_length()
        if held > depth and depth and cache.can_go_back(held - depth):
            cache.crop(depth - held)
        elif held != depth:
            if held:
                cache.reset()
            if depth:
                self.tell(f"{runtime.config.mode}: reading {depth:,} tokens")
                self._generate(runtime, cache, depth, 1)
                return True
        return False

    def _run(self, runtime: Runtime, cache: OffloadCache, case: Case) -> Sample:
        import torch

        device = self.model.device
        on_card = device.type == "cuda"
        if on_card:
            torch.cuda.reset_peak_memory_stats(device)
        self._generate(runtime, cache, case.fed, case.generated or 1)
        report = runtime.report()
        read = report.prompt_tokens - report.reused_tokens - 1
        _require(case, read=read, made=report.new_tokens)
        peak = torch.cuda.max_memory_allocated(device) if on_card else None
        return _sample(case, report, peak)

    def _generate(self, runtime: Runtime, cache: OffloadCache, length: int, new: int) -> None:
        import torch

        prompt = self.ids[:, :length]
        # A mask: random tokens may be the one that pads.
        runtime.generate(
            prompt, attention_mask=torch.ones_like(prompt), cache=cache, max_new_tokens=new, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip

    def _refused(self, mode: str, case: Case, error: OffloadError) -> Row:
        status = DOES_NOT_FIT if isinstance(error, BudgetError) else NOT_SUPPORTED
        return Row(subject=self.subject, mode=mode, case=case, status=status, reason=str(error))


def _settled(config: OffloadConfig, cases: Sequence[Case]) -> OffloadConfig:
    """With `decode.compile` decided: auto would begin to compile in the middle of the repetitions."""
    from offload.config import OffloadConfig

    longest = max((case.generated for case in cases), default=0)
    return OffloadConfig.build(config, compile=config.compiles(longest))


def _require(case: Case, *, read: int, made: int) -> None:
    """Raises InputError unless a run did what its case says."""
    if (read, made) != (case.prompt, case.generated or 1):
        raise InputError(
            f"A run of {case.name} was another one",
            asked=f"{case.prompt:,} tokens read, {case.generated or 1:,} generated",
            there=f"{read:,} read, {made:,} generated",
            change="Take what ends answers (stop strings, max_time) out of the model's generation_config.",
        )


def _sample(case: Case, report: Report, peak_bytes: int | None) -> Sample:
    on_host = {name: size for name, size in report.bytes.items() if name.startswith("host_")}
    return Sample(
        tokens=case.tokens,
        seconds=report.prefill_s if case.prompt else report.decode_s - report.capture_s,
        capture_s=report.capture_s,
        device_bytes=sum(report.bytes.values()) - sum(on_host.values()),
        peak_bytes=peak_bytes,
        host_bytes=sum(on_host.values()),
        **{name: getattr(report, name) for name in _FROM_REPORT},
    )


_FROM_REPORT = (
    "tokens_on_device", "tokens_on_host", "decode_h2d_bytes", "tail_mass", "skipped_mass", "left_out", "error_estimate",
    "verify_passes", "drafted_tokens", "accepted_tokens",
)  # fmt: skip


def _silent(line: str) -> None:
    pass
