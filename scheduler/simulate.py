"""How fast would a workload be under another policy, or on another card? Replayed step by step, priced by `cost.placed`.

| policy | tokens that do not fit the device |
|---|---|
| `Resident` | there are none, or it is an error |
| `WholeLayer` | all tokens: each layer comes and goes in every step (transformers' OffloadedCache) |
| `StaticSplit` | the same share of every sequence, from its first token on (FlexGen, arXiv 2303.06865, section 4) |
| `RequestSwap` | whole sequences, which wait meanwhile (vLLM, arXiv 2309.06180, section 4.5) |
| `Phased` | as a plan in three phases says; all attention exact |
| `SparseWindow` | likewise, and of the tokens only some are attended to (ALISA, arXiv 2403.17312, algorithm 1) |

Simulated times are predictions. Policies that copy overlap copies with the card and reach the same share of the link,
but for `WholeLayer`, whose memory is not pinned. Prompts are read before the step that needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from offload.errors import BudgetError, InputError
from offload.scheduler.cost import Placement, Shape, placed
from offload.scheduler.layout import STAGING_BYTES
from offload.scheduler.phases import Ask, PhasePlan, phase_of, prefill_seconds
from offload.scheduler.profiles import Profile

# What transformers' OffloadedCache reaches of the link both ways together: 32 GiB a step of 966 ms at 131,072 tokens
# of an 8B model (`benchmarks/generate.json`), where pinned copies reach 80 GB/s.
_STOCK_SHARE = 0.45


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence.

    Attributes:
        prompt: Tokens.
        output: Tokens that are made.
    """

    prompt: int
    output: int

    def __post_init__(self) -> None:
        """Refuses an empty one.

        Raises:
            InputError: No prompt or no output.
        """
        if min(self.prompt, self.output) < 1:
            raise InputError(
                "A request has a prompt and an output",
                asked=f"{self.prompt} and {self.output} tokens",
                change="Give at least one token of each.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a workload runs on.

    Attributes:
        shape: Of the model.
        profile: Of the machine.
        device: Bytes that may be used, weights included.
        host: Bytes for tokens.
        workspace: Device bytes of everything but weights, tokens and staging.
        staging: Bytes of one of two buffers that copies go through.
    """

    shape: Shape
    profile: Profile
    device: int
    host: int
    workspace: int = 0
    staging: int = STAGING_BYTES

    def room(self, *, buffers: bool) -> int:
        """Tokens of all sequences that the device holds, beside buffers or without."""
        held = self.shape.weights + self.workspace + 2 * self.staging * buffers
        return max(0, self.device - held) // self.shape.kv_bytes

    def ask(self, workload: Sequence[Request], *, batch: int | None = None) -> Ask:
        """What a planner is asked: as many sequences, as long as the longest.

        Args:
            workload: All sequences.
            batch: Those decoded at once; None: all.
        """
        prompt = max(request.prompt for request in workload)
        return Ask(
            shape=self.shape,
            batch=len(workload) if batch is None else batch,
            prompt=prompt,
            output=max(request.prompt + request.output for request in workload) - prompt,
            device=self.device,
            host=self.host,
            workspace=self.workspace,
            staging=self.staging,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What a policy does in one step.

    Attributes:
        active: Numbers of the sequences that make a token.
        where: Their tokens are.
        device_tokens: Tokens whose K and V are on the device.
        buffers: Device bytes that copies go through.
        host_bytes: Bytes of tokens on the host once the step is done.
        phase: What its time is counted to.
    """

    active: Sequence[int]
    where: Placement
    device_tokens: float
    buffers: int
    host_bytes: float
    phase: str


class Policy(Protocol):
    """Where tokens are, step by step. Asked once for each step, in order; may remember what it said.

    `bytes_out` of a turn is left to the simulator: what the host holds more than after the turn before. A policy that
    copies more than that says so in its placement.
    """

    @property
    def name(self) -> str:
        """With its settings."""

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """The next step.

        Args:
            lengths: Tokens of each sequence, 0 of one that is done.
            waiting: Numbers of the sequences that are not done, at least one.

        Raises:
            BudgetError: It does not fit.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What came of a policy: simulated, not measured.

    Attributes:
        policy: Its name.
        tokens: That were made.
        seconds: Of the run.
        phases: Seconds of it: of prefill, and of steps by phase.
        device_peak: Bytes.
        host_peak: Likewise.
        bytes_in: That were copied to the device by steps.
        bytes_out: That were copied to the host.
        bytes_freed: Of tokens that the host gave up.
        steps: Passes of the model, of prompts aside.
    """

    policy: str
    tokens: int
    seconds: float
    phases: dict[str, float]
    device_peak: int
    host_peak: int
    bytes_in: float
    bytes_out: float
    bytes_freed: float
    steps: int

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, the reading of prompts included."""
        return self.tokens / self.seconds


def simulate(workload: Sequence[Request], setting: Setting, policy: Policy) -> Result:
    """Replays a workload.

    Args:
        workload: Sequences, all there from the beginning; the first ones come first where not all do at once.
        setting: What it runs on.
        policy: That is asked before each step.

    Raises:
        BudgetError: The policy has no room for it.
        InputError: There is no sequence.
    """
    if not workload:
        raise InputError("There is no sequence to simulate", asked=0, change="Give a request.")
    lengths = [request.prompt for request in workload]
    left = [request.output for request in workload]
    read = [False] * len(workload)
    phases: dict[str, float] = {}
    device_peak, host_peak, bytes_in, bytes_out, freed = 0, 0.0, 0.0, 0.0, 0.0
    steps, host = 0, 0.0
    while waiting := [i for i, n in enumerate(left) if n]:
        turn = policy.turn(lengths, waiting)
        more = turn.host_bytes - host
        new = [i for i in turn.active if not read[i]]
        where = turn.where
        if new:
            tokens = sum(lengths[i] for i in new)
            share = tokens / sum(lengths[i] for i in turn.active)
            of_prompts = replace(
                where,
                sequences=len(new),
                fetched=where.fetched * share,
                rebuilt=where.rebuilt * share,
                dropped=where.dropped * share,
            )
            ask = setting.ask(workload)
            first = prefill_seconds(of_prompts, ask, setting.profile, tokens=tokens)
            phases["prefill"] = phases.get("prefill", 0.0) + first
            for i in new:
                read[i] = True
        else:
            # What a prompt leaves on the host is copied while it is read.
            where = replace(where, bytes_out=where.bytes_out + max(0.0, more))
        busy = placed(where, setting.shape, setting.profile)
        phases[turn.phase] = phases.get(turn.phase, 0.0) + busy.seconds
        bytes_in += busy.bytes_in
        bytes_out += turn.where.bytes_out + max(0.0, more)
        freed += max(0.0, -more)
        host = turn.host_bytes
        held = setting.shape.weights + setting.workspace + turn.buffers
        device_peak = max(device_peak, held + int(turn.device_tokens * setting.shape.kv_bytes))
        host_peak = max(host_peak, host)
        _require("GPU", "memory.gpu", policy, device_peak, setting.device)
        _require("host", "memory.cpu", policy, int(host_peak), setting.host)
        steps += 1
        for i in turn.active:
            left[i] -= 1
            lengths[i] = lengths[i] + 1 if left[i] else 0
    return Result(
        policy=policy.name,
        tokens=sum(request.output for request in workload),
        seconds=sum(phases.values()),
        phases=phases,
        device_peak=device_peak,
        host_peak=int(host_peak),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        bytes_freed=freed + host,
        steps=steps,
    )


def best(workload: Sequence[Request], setting: Setting, policies: Iterable[Policy]) -> Result:
    """The fastest of several policies, those without room aside.

    Raises:
        BudgetError: None has room: that of the one which lacks the least.
    """
    results, errors = [], []
    for policy in policies:
        try:
            results.append(simulate(workload, setting, policy))
        except BudgetError as error:
            errors.append(error)
    if not results:
        raise min(errors, key=lambda error: error.requested - error.available)
    return min(results, key=lambda result: result.seconds)


@dataclass(frozen=True, slots=True)
class Resident:
    """Everything on the device."""

    name = "all on the GPU"

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """All sequences, nothing copied."""
        tokens = _tokens(lengths, waiting)
        return _resident(waiting, tokens)


@dataclass(frozen=True, slots=True)
class WholeLayer:
    """Every layer's K and V come from the host before it is computed and go back after it.

    Attributes:
        setting: What it runs on.
    """

    setting: Setting
    name = "whole layers (transformers)"

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """All sequences; two layers are on the device."""
        tokens = _tokens(lengths, waiting)
        layers = len(self.setting.shape.layers)
        size = tokens * self.setting.shape.kv_bytes
        where = Placement(
            sequences=len(waiting),
            resident=0,
            fetched=tokens,
            # All of it; the new tokens are counted as what the host holds more.
            bytes_out=size - len(waiting) * self.setting.shape.kv_bytes,
            link_share=_STOCK_SHARE,
        )
        return Turn(
            active=waiting,
            where=where,
            device_tokens=min(2, layers) * tokens / layers,
            buffers=0,
            host_bytes=size,
            phase="decode",
        )


@dataclass(frozen=True, slots=True)
class StaticSplit:
    """A share of every sequence's K and V is on the device, at every length; copies overlap.

    Attributes:
        setting: What it runs on.
        percent: Of K and V that are on the device.
        together: Sequences decoded at once; None: all.
    """

    setting: Setting
    percent: int
    together: int | None = None

    @property
    def name(self) -> str:
        """With its percentage."""
        at_once = "" if self.together is None else f", {self.together} at once"
        return f"static split, {self.percent} % on the GPU{at_once}"

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """As many sequences as are decoded at once."""
        active = waiting[: self.together]
        tokens = _tokens(lengths, active)
        if self.percent == 100:
            return _resident(active, tokens)
        kept = tokens * self.percent // 100
        where = Placement(sequences=len(active), resident=kept, fetched=tokens - kept)
        return Turn(
            active=active,
            where=where,
            device_tokens=kept,
            buffers=2 * self.setting.staging,
            host_bytes=(tokens - kept) * self.setting.shape.kv_bytes,
            phase="decode",
        )


@dataclass(slots=True)
class RequestSwap:
    """As many sequences as fit run, the first ones first; the others wait, with their K and V on the host.

    It remembers who is where: made anew for each run. Swapping overlaps with the step, which is more than vLLM does.

    Attributes:
        setting: What it runs on.
    """

    setting: Setting
    name = "request swap (vLLM)"
    _on_device: set[int] = field(default_factory=set)
    _swapped: dict[int, int] = field(default_factory=dict)

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """Those that fit; what comes and goes of whole sequences.

        Raises:
            BudgetError: Not even the first one fits.
        """
        room, size = self.setting.room(buffers=False), self.setting.shape.kv_bytes
        active: list[int] = []
        held = 0
        for i in waiting:
            if held + lengths[i] > room:
                break
            held += lengths[i]
            active.append(i)
        if not active:
            _require(
                "GPU",
                "memory.gpu",
                self,
                self.setting.device + (lengths[waiting[0]] - room) * size,
                self.setting.device,
            )
        come = sum(self._swapped.pop(i, 0) for i in active)
        for i in waiting:
            if i in self._on_device and i not in active:
                self._swapped[i] = lengths[i]
        self._on_device = set(active)
        return Turn(
            active=active,
            where=Placement(sequences=len(active), resident=held, bytes_in=come * size),
            device_tokens=held,
            buffers=0,
            host_bytes=sum(self._swapped.values()) * size,
            phase="decode",
        )


@dataclass(frozen=True, slots=True)
class Phased:
    """A plan in three phases. As many sequences as it is for are decoded at once.

    Attributes:
        plan: Of `phases.plan`, or `phases.grouped`.
    """

    plan: PhasePlan

    @property
    def name(self) -> str:
        """With the plan's batch."""
        return f"three phases, exact, {self.plan.ask.batch} at once"

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """As planned for so many tokens."""
        active = waiting[: self.plan.ask.batch]
        where = self.plan.placement(_tokens(lengths, active), len(active))
        return Turn(
            active=active,
            where=where,
            device_tokens=where.resident,
            buffers=self.plan.buffers,
            host_bytes=self.plan.host_bytes(where),
            phase=phase_of(where).value,
        )


@dataclass(frozen=True, slots=True)
class SparseWindow:
    """Of every sequence the newest tokens are attended to, and as many that weighed most lately. Not exact.

    Once tokens leave the device, all but the newest are on the host too, and what the device has room for beside the
    newest are those that were attended to before. So a step copies those that were chosen newly and are not there.

    Attributes:
        setting: What it runs on.
        sparsity: Share of tokens that a step does not attend to.
        reuse: Share of the chosen tokens that the step before had chosen too. An assumption, not a measurement: by
            the paper's rule tokens are chosen by the sum over the last steps, of which each changes one.
        share: Of the host's tokens, those kept as inputs.
        together: Sequences decoded at once; None: all.
    """

    setting: Setting
    sparsity: float = 0.8
    reuse: float = 0.9
    share: float = 0.0
    together: int | None = None

    def __post_init__(self) -> None:
        """Refuses shares that are none.

        Raises:
            InputError: One is not between 0 and 1, or everything is left out.
        """
        for value in (self.sparsity, self.reuse, self.share):
            if not 0 <= value <= 1 or self.sparsity == 1:
                raise InputError(
                    "Not a share of tokens",
                    asked=value,
                    there="from 0 to 1, and less than 1 of sparsity",
                    change="Write for example 0.8.",
                )

    @property
    def name(self) -> str:
        """With its sparsity and what is assumed."""
        at_once = "" if self.together is None else f", {self.together} at once"
        return f"sparse window, {self.sparsity:.0%} sparse, reuse {self.reuse:.0%}{at_once}"

    def turn(self, lengths: Sequence[int], waiting: Sequence[int]) -> Turn:
        """The newest, the chosen ones that are on the device, and those that are copied."""
        shape, active = self.setting.shape, waiting[: self.together]
        tokens = _tokens(lengths, active)
        each = [math.ceil(lengths[i] * (1 - self.sparsity) / 2) for i in active]
        newest = sum(each)
        chosen = min(newest, tokens - newest)
        scored = tokens if chosen < tokens - newest else 0
        if tokens <= self.setting.room(buffers=False):
            where = Placement(sequences=len(active), resident=newest + chosen, scored=scored)
            return Turn(
                active=active,
                where=where,
                device_tokens=tokens,
                buffers=0,
                host_bytes=0,
                phase="I",
            )
        room = self.setting.room(buffers=True)
        slots = max(0, min(room - newest, tokens - newest))
        again = min(slots, self.reuse * chosen)
        others = tokens - newest - again
        lucky = (chosen - again) * (slots - again) / others if others else 0.0
        absent = chosen - again - lucky
        rebuilt = absent * self.share
        away = tokens - newest
        inputs = int(away * self.share)
        return Turn(
            active=active,
            where=Placement(
                sequences=len(active),
                resident=newest + again + lucky,
                fetched=absent - rebuilt,
                rebuilt=rebuilt,
                scored=scored,
            ),
            device_tokens=newest + slots,
            buffers=2 * self.setting.staging,
            host_bytes=(away - inputs) * shape.kv_bytes + inputs * shape.input_bytes,
            phase="II",
        )


def _tokens(lengths: Sequence[int], active: Sequence[int]) -> int:
    return sum(lengths[i] for i in active)


def _resident(active: Sequence[int], tokens: int) -> Turn:
    where = Placement(sequences=len(active), resident=tokens)
    return Turn(
        active=active, where=where, device_tokens=tokens, buffers=0, host_bytes=0, phase="decode"
    )


def _require(tier: str, key: str, policy: Policy, asked: int, there: int) -> None:
    if asked > there:
        raise BudgetError(
            f"The policy {policy.name!r} in {tier} memory",
            requested=asked,
            available=there,
            setting=key,
            change=f"Raise {key}, or simulate fewer or shorter sequences.",
        )
