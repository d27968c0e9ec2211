"""What did a run cost, and where is every byte? The answer of `Runtime.report()`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from offload.decisions import Choice
from offload.parts import Part
from offload.units import gib

logger = logging.getLogger(__name__)


class Notes:
    """What a user has to know of a runtime: every fallback and every choice that was made for them, once each."""

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)

    def add(self, note: str) -> None:
        """Keeps a note."""
        self._notes[note] = None

    def tell(self, note: str) -> None:
        """Keeps what mode fast fell back to, and warns of it the first time."""
        if note not in self._notes:
            logger.warning("Mode fast: %s.", note)
        self.add(note)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseChange:
    """A phase of `offload.scheduler.phases`, planned and as it came.

    Attributes:
        phase: "II": tokens are on the host too. "III": the oldest ones are dropped, and read again.
        planned: Tokens of a sequence with which the layout lets it begin; None where it does not, within the run.
        tokens: With which it began; None where it did not. While a prompt is read that is the end of a chunk; mode verified
            makes room for a draft, and so is up to two drafts early.
        at: `time.perf_counter()` then.
    """

    phase: str
    planned: int | None
    tokens: int | None
    at: float | None

    def __str__(self) -> str:
        """As in `II from 4,672 tokens, as planned`."""
        planned = "not planned" if self.planned is None else f"planned from {self.planned:,}"
        if self.tokens is None:
            return f"{self.phase} {planned} tokens, not reached"
        if self.tokens == self.planned:
            return f"{self.phase} from {self.tokens:,} tokens, as planned"
        return f"{self.phase} from {self.tokens:,} tokens, {planned}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Bytes per tier, tokens per tier, time, and every fallback, of the last `generate`.

    Attributes:
        mode: The mode that ran.
        model_type: Of the model.
        device: Where the model runs.
        bytes: Bytes by purpose: weights, window (sinks and tail too), resident (device copies of host pages
            in the memory that prefill needed), replica, cached rows, staging, eviction, host_pinned, host_pageable,
            host_index (where the host searches).
        tokens_on_device: Tokens per sequence in the device window.
        tokens_on_host: Tokens per sequence in host pages.
        budget: Device bytes allowed, weights included.
        planned: Device bytes of the layout, by purpose, workspace and overhead included.
        planned_host: Bytes of host pages of the layout, and of indexes.
        chunk: Prompt tokens computed together.
        prompt_tokens: Of the last prompt, per sequence.
        reused_tokens: Of these, in the cache already.
        new_tokens: Generated per sequence.
        prefill_s: Seconds of the prefill.
        decode_s: Seconds from the end of the prefill to the last token.
        predicted_ms: Of a token in the middle of the answer, by the price that `offload plan` and all decisions have, capturing left
            out; None where the card is not known, or steps were of a kind that has no price (beams, an assistant, mode fast where
            nothing is captured).
        predicted_parts: Milliseconds of it by what they go into; the link and Python's launching overlap with the others.
        predicted_limit: The largest part of the engine that takes longest; None without a prediction.
        h2d_bytes: KV bytes copied to the device since the runtime was attached.
        d2h_bytes: KV bytes copied to the host.
        bounced_bytes: Of h2d_bytes, through a bounce buffer because pages are not pinned.
        discarded_bytes: Of h2d_bytes, prefetched and then not needed.
        decode_h2d_bytes: KV bytes copied to the device during the last decode.
        rung: The replica of offloaded tokens in mode fast, or None without one.
        lifted_layers: Layers whose replica is a better one.
        whole_layers: Layers that keep all their tokens on the device and have none.
        selected_bytes: KV bytes that each step of mode fast attends to exactly, beside sinks and window.
        fetched_bytes: How many of them came from the host, mean over the last decode's steps; the others were on the
            device since an earlier step.
        index: What finds these on the host; None where the device selects.
        index_bytes: Host bytes of all layers' indexes.
        index_heads: KV heads of sequences by what searches them, where an index does.
        search_s: Seconds of decode_s in which the host searched and attended.
        tail_mass: Share of attention that the replica answered for, mean over the last decode's steps, layers and
            heads.
        skipped_mass: Share of attention that was not read at all, likewise.
        left_out: Share of attention that steps leave out where scheduler.sparsity is set: of a prompt's last queries, when the tokens
            were chosen last, mean over heads and layers.
        error_estimate: How far the output of an attention layer is expected to be from attention to the same keys and
            values in full, relative to that output: root mean square over the last decode's steps and heads, mean over
            layers. 0 without a replica. What independent rounding errors come to, by `offload.kernels.noise`: no bound,
            but an estimate that errs upwards. None where only means of clusters are kept, of which nothing says how far
            a row is from them.
        verify_passes: Exact passes of mode verified in the last decode.
        drafted_tokens: Tokens that they looked at.
        accepted_tokens: Of these, kept.
        agreement: For each place in a draft the share of tokens that were kept, of those that were compared.
        draft_s: Seconds of decode_s for drafting.
        verify_s: Seconds of exact passes, which drafting goes on beside.
        wait_s: Seconds of verify_s in which nothing was drafted.
        dropped_tokens: Drafted behind one that was wrong, and looked at by no pass.
        replayed_steps: Steps of the last decode that a captured graph replayed.
        capture_s: Seconds of decode_s for compiling and capturing.
        phases: Where tokens went as the run grew, planned and as it came; empty where all stayed on the device.
        decisions: What was chosen for the run, what else there was, and what both cost.
        device_parts: Bytes of the device by purpose, planned and measured; empty before the first run.
        unaccounted: Of the most bytes of the card that were in use since `attach`, by whomever, those that no purpose
            explains; None on a CPU, which has no driver that counts.
        notes: Fallbacks and adaptations, a sentence each.
    """

    mode: str
    model_type: str
    device: str
    bytes: dict[str, int]
    tokens_on_device: int
    tokens_on_host: int
    budget: int
    planned: dict[str, int]
    planned_host: int
    chunk: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    h2d_bytes: int
    d2h_bytes: int
    bounced_bytes: int
    discarded_bytes: int
    decode_h2d_bytes: int
    predicted_ms: float | None = None
    predicted_parts: dict[str, float] = field(default_factory=dict)
    predicted_limit: str | None = None
    rung: str | None = None
    lifted_layers: int = 0
    whole_layers: int = 0
    selected_bytes: int = 0
    fetched_bytes: int = 0
    index: str | None = None
    index_bytes: int = 0
    index_heads: dict[str, int] = field(default_factory=dict)
    search_s: float = 0.0
    tail_mass: float = 0.0
    left_out: float | None = None
    skipped_mass: float = 0.0
    error_estimate: float | None = 0.0
    verify_passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    agreement: list[float] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    wait_s: float = 0.0
    dropped_tokens: int = 0
    replayed_steps: int = 0
    capture_s: float = 0.0
    phases: list[PhaseChange] = field(default_factory=list)
    decisions: list[Choice] = field(default_factory=list)
    device_parts: list[Part] = field(default_factory=list)
    unaccounted: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def host_parts(self) -> list[Part]:
        """Bytes of the host by purpose, planned and measured."""
        there = self.bytes.get("host_pinned", 0) + self.bytes.get("host_pageable", 0)
        return [Part("pages", self.planned_host, there)]

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per generated token; 0 before the first."""
        return 1000 * self.decode_s / self.new_tokens if self.new_tokens else 0.0

    @property
    def prediction_error(self) -> float | None:
        """By what share a token was predicted faster (below zero) or slower than it came; None where either is not known."""
        ms = 1000 * (self.decode_s - self.capture_s) / max(1, self.new_tokens)
        if self.predicted_ms is None or self.new_tokens < 2 or ms <= 0:
            return None
        return self.predicted_ms / ms - 1

    def to_dict(self) -> dict[str, Any]:
        """All fields, ms_per_token and prediction_error as plain values."""
        more = {"ms_per_token": self.ms_per_token, "prediction_error": self.prediction_error}
        return asdict(self) | more

    def __str__(self) -> str:
        """The summary, bytes by purpose, and decisions."""
        lines = [self.summary]
        if self.device_parts:
            lines.append(f"  {'bytes':24}{'planned':>10}{'measured':>12}")
            for part in [*self.device_parts, *self.host_parts]:
                measured = "-" if part.measured is None else gib(part.measured)
                lines.append(f"    {part.purpose:22}{gib(part.planned):>10}{measured:>12}")
        if self.unaccounted is not None:
            lines.append(f"    {'unaccounted':22}{'':10}{gib(self.unaccounted):>12}")
        return "\n".join(lines + [f"  decided {choice}" for choice in self.decisions])

    @property
    def summary(self) -> str:
        """Bytes per tier, time per token and every fallback, a line each."""
        device = {k: v for k, v in self.bytes.items() if not k.startswith("host_") and v}
        host = {
            k.removeprefix("host_"): v for k, v in self.bytes.items() if k.startswith("host_") and v
        }
        lines = [
            f"{self.model_type} on {self.device}, mode {self.mode}",
            f"  device  {gib(sum(device.values())):>10}  of {gib(self.budget)} allowed  ({_list(device)})",
            f"  host    {gib(sum(host.values())):>10}  ({_list(host) if host else 'nothing offloaded'})",
            f"  tokens  {self.tokens_on_device + self.tokens_on_host:>10,}  "
            f"{self.tokens_on_device:,} on the device, {self.tokens_on_host:,} on the host",
            f"  prefill {self.prefill_s:>9.2f} s  {self.prompt_tokens - self.reused_tokens:,} tokens"
            f" in chunks of {self.chunk:,}, {self.reused_tokens:,} reused",
            f"  decode  {self.decode_s:>9.2f} s  {self.new_tokens:,} tokens,"
            f" {self.ms_per_token:.1f} ms each, {gib(self.decode_h2d_bytes)} from the host",
        ]
        if self.prediction_error is not None:
            lines.append(
                f"  predict {self.predicted_ms:>9.1f} ms a token ({self.prediction_error:+.0%}), most of it {self.predicted_limit}"
            )
        if self.phases:
            reached = "-".join(["I", *(c.phase for c in self.phases if c.tokens is not None)])
            lines.append(f"  phases  {reached:>10}  {'; '.join(map(str, self.phases))}")
        if self.rung is not None:
            others = {"better": self.lifted_layers, "whole": self.whole_layers}
            shown = ", ".join(f"{n} layers {what}" for what, n in others.items() if n)
            more = f" ({shown})" if shown else ""
            name = "drafts" if self.mode == "verified" else "fast"
            read = f"{gib(self.selected_bytes)} a step read exactly, {gib(self.fetched_bytes)} from the host"
            expected = "unknown" if self.error_estimate is None else f"{self.error_estimate:.2%}"
            said = (
                f"replica{more} answered for {self.tail_mass:.2%} of attention, "
                f"{self.skipped_mass:.3%} skipped, expected error {expected}"
            )
            if self.left_out is not None:
                said = f"{self.left_out:.2%} of the attention of the prompt's last tokens left out"
            lines.append(f"  {name:8}{self.rung:>10}  {said}, {read}")
        if self.index is not None:
            ms = 1000 * self.search_s / max(1, self.new_tokens)
            heads = ", ".join(f"{name} in {n:,} heads" for name, n in sorted(self.index_heads.items()))  # fmt: skip
            chosen = f" ({heads})" if self.index == "auto" else ""
            lines.append(
                f"  host    {self.index:>10}  index of {gib(self.index_bytes)}{chosen} found them, and the host attended: "
                f"{ms:.1f} ms a token"
            )
        if self.verify_passes:
            mean = self.accepted_tokens / self.verify_passes
            ms = 1000 / max(1, self.new_tokens)
            lines.append(
                f"  verified{self.new_tokens:>9,}  of {self.new_tokens:,} tokens, {self.verify_passes:,} passes, "
                f"{mean:.1f} drafted tokens kept in each, of {self.drafted_tokens:,}; "
                f"{ms * self.draft_s:.1f} ms a token to draft, {ms * self.wait_s:.1f} ms more to wait for "
                f"passes, which took {ms * self.verify_s:.1f}"
            )
        if self.replayed_steps:
            lines.append(
                f"  graph   {self.replayed_steps:>10,}  steps replayed, {self.capture_s:.1f} s to capture"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _list(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in sizes.items())
