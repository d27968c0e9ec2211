"""Where did every byte and every millisecond of a run go, and was it planned? One generate, measured.

Bytes are compared purpose by purpose: what the layout planned, what was there at the peak, and what nobody accounts for.
A second, short generate behind the first answer is looked at by torch's profiler, so that the first one is not slowed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.errors import InputError, OffloadError
from offload.hardware import DeviceMemory, device_memory
from offload.parts import Part, device_parts
from offload.prefill import Progress
from offload.report import Report
from offload.runtime import Runtime, attach
from offload.scheduler.pace import MOST_ROWS
from offload.trace import Event, Kernel, Recorder, Sample, Steps, Watch

logger = logging.getLogger(__name__)

# Of the second generate: tokens before those that are looked at, and of those.
LEAD, LOOKED_AT = 8, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a run took.

    Attributes:
        report: Of the generate.
        device: Bytes of the device, by purpose.
        host: Bytes of the host, likewise.
        peak: The most bytes of the device that were in use, as its driver counts; None on a CPU.
        unaccounted: Of these, what no purpose explains; None on a CPU.
        samples: Memory over time.
        prefill_until: Seconds from the first sample to the end of the prefill.
        bursts: Seconds from the first sample, and tokens so far, of each burst of tokens: of one, or of what a pass
            of mode verified brings.
        kernels: Of the steps that were looked at, the slowest first.
        events: Likewise, all of them, by time.
        looked_at: How many tokens those steps made.
        looked_s: Seconds that they took, the profiler's share included.
        changes: Seconds from the first sample, and the phase of `offload.scheduler.phases` that began then.
    """

    report: Report
    device: list[Part]
    host: list[Part]
    peak: int | None
    unaccounted: int | None
    samples: list[Sample]
    prefill_until: float
    bursts: list[tuple[float, int]]
    kernels: list[Kernel] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    looked_at: int = 0
    looked_s: float = 0.0
    changes: list[tuple[float, str]] = field(default_factory=list)

    @property
    def engines(self) -> dict[str, float]:
        """Milliseconds per token that was looked at, by what kernels are for, the largest first."""
        found: dict[str, float] = {}
        for kernel in self.kernels:
            ms = 1000 * kernel.seconds / self.looked_at
            found[kernel.engine] = found.get(kernel.engine, 0.0) + ms
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    @property
    def token_ms(self) -> list[float]:
        """Milliseconds of each token but the first; those of a burst share its time."""
        found = []
        for (before, made), (after, so_far) in pairwise(self.bursts):
            found += [1000 * (after - before) / (so_far - made)] * (so_far - made)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values; events are left out, which are a trace's."""
        return {
            "report": self.report.to_dict(),
            "device": [asdict(part) for part in self.device],
            "host": [asdict(part) for part in self.host],
            "peak_bytes": self.peak, "unaccounted_bytes": self.unaccounted,
            "samples": [asdict(sample) for sample in self.samples],
            "prefill_until_s": self.prefill_until, "bursts": [{"at_s": at, "tokens": tokens} for at, tokens in self.bursts],
            "engines_ms_per_token": self.engines, "kernels": [asdict(kernel) for kernel in self.kernels],
            "looked_at_tokens": self.looked_at, "looked_s": self.looked_s,
            "phases": [{"at_s": at, "phase": phase} for at, phase in self.changes],
        }  # fmt: skip


def profile(
    model: Any,
    config: OffloadConfig,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    looked_at: int = LOOKED_AT,
    on_progress: Callable[[Progress], None] | None = None,
) -> Profile:
    """Runs a generate, greedy and not ended by an end-of-sequence token, and says what it took.

    Args:
        model: Of transformers, not attached.
        config: As for `attach`.
        input_ids: [1, N].
        max_new_tokens: Tokens of the answer.
        looked_at: Tokens of a second generate behind it whose kernels are timed; 0 for none. None are where the model's
            positions end too soon.
        on_progress: As for `Runtime.generate`.

    Raises:
        InputError: More than one sequence, or no token to make.
    """
    if input_ids.shape[0] != 1 or max_new_tokens < 1:
        raise InputError(
            "A profile is of one sequence and at least one token",
            asked=f"{input_ids.shape[0]} sequences, {max_new_tokens} tokens",
            there=None,
            change="Give one prompt, and max_new_tokens over 0.",
        )
    # A pass of mode verified brings many tokens at once: whole ones are looked at.
    burst = MOST_ROWS if config.mode == "verified" else 1
    more = LEAD + looked_at + 2 * burst
    most = model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
    if not looked_at or (most and input_ids.shape[1] + max_new_tokens + more > most):
        looked_at = more = 0
    with attach(model, config) as runtime:
        device = runtime.shape.device
        before = device_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch = Watch()
        with Recorder(device) as recorder:
            cache = runtime.new_cache(max_tokens=input_ids.shape[1] + max_new_tokens + more)
            sequence = _generate(
                runtime, input_ids, cache, watch, max_new_tokens, on_progress=on_progress
            )
        report = runtime.report()
        parts, peak, unaccounted = _device_parts(report, before, recorder, device)
        steps = Steps(device, first=LEAD, count=looked_at)
        if looked_at:
            burst = (
                -(-report.new_tokens // max(1, report.verify_passes)) if report.verify_passes else 1
            )
            _look(runtime, sequence, cache, steps, LEAD + looked_at + 2 * min(burst, MOST_ROWS))
        cache.close("its profile is over")
    bursts = [(at - recorder.began, tokens) for at, tokens in watch.bursts]
    return Profile(
        report=report,
        device=parts,
        host=report.host_parts,
        peak=peak,
        unaccounted=unaccounted,
        samples=recorder.samples,
        prefill_until=bursts[0][0] if bursts else 0.0,
        bursts=bursts,
        kernels=steps.kernels(),
        events=steps.events(),
        looked_at=steps.tokens,
        looked_s=steps.seconds,
        changes=[
            (change.at - recorder.began, change.phase)
            for change in report.phases
            if change.at is not None
        ],
    )


def _generate(
    runtime: Runtime, ids: Tensor, cache: Any, watch: Watch, tokens: int, **more: Any
) -> Tensor:
    """[1, N + tokens], whatever tokens end a sequence."""
    made: Tensor = runtime.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        streamer=watch,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return made


def _look(runtime: Runtime, sequence: Tensor, cache: Any, steps: Steps, tokens: int) -> None:
    """Makes further tokens while the profiler looks; what was measured before is there whatever comes of it."""
    watch = Watch(steps.on_burst)
    try:
        _generate(runtime, sequence, cache, watch, tokens)
    except OffloadError as error:
        logger.warning("No kernels were looked at: %s", error)
    finally:
        steps.close(watch.tokens)


def _device_parts(
    report: Report, before: DeviceMemory, recorder: Recorder, device: torch.device
) -> tuple[list[Part], int | None, int | None]:
    """Planned and measured, the driver's peak, and what is unaccounted."""
    last = recorder.samples[-1]
    return device_parts(
        report.planned,
        report.bytes,
        device,
        before=before,
        most_used=recorder.most_used,
        last_used=last.used,
        last_reserved=last.reserved or 0,
    )
