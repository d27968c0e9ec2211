"""How is a long prompt read in bounded memory? In chunks of our own, through the model's own forward.

transformers' `prefill_chunk_size` starts over at position 0 when the cache already holds tokens; this one
starts behind them. All tokens but the last are fed here; the last one is left to `generate`, whose first step
then makes the first logits. No logits but one row per chunk are computed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from offload.cache import CACHE, OffloadCache
from offload.prompt import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a prefill has come.

    Attributes:
        total: Tokens of the prompt, per sequence.
        cached: Tokens that were in the cache already.
        processed: Tokens in the cache now.
        seconds: Since the prefill began.
    """

    total: int
    cached: int
    processed: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and sequence so far; 0 before the first."""
        return (self.processed - self.cached) / self.seconds if self.seconds > 0 else 0.0


def prefill(
    model: Any,
    cache: OffloadCache,
    prompt: Prompt,
    *,
    chunk: int,
    whole: bool,
    keeps_logits: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Progress:
    """Feeds all tokens of a prompt but the last one, and those that the cache holds already.

    Args:
        model: With our attention.
        cache: Holds a prefix of the prompt.
        prompt: The whole prompt.
        chunk: Tokens fed at a time.
        whole: The model's recurrent state does not survive chunks: everything at once into an empty cache,
            token by token into another.
        keeps_logits: Whether the model's forward takes logits_to_keep.
        on_progress: Called before the first chunk and after each one.

    Returns:
        The last progress.
    """
    total = prompt.input_ids.shape[1]
    cached = cache.get_seq_length()
    began = time.perf_counter()
    progress = Progress(total=total, cached=cached, processed=cached, seconds=0.0)
    kwargs = dict(prompt.model_kwargs)
    positions = kwargs.pop("position_ids", None)
    if keeps_logits:
        kwargs["logits_to_keep"] = 1
    if on_progress is not None and cached < total - 1:
        on_progress(progress)
    if whole:
        chunk = 1 if cached else max(1, total - 1)
    for start in range(cached, total - 1, chunk):
        stop = min(start + chunk, total - 1)
        if prompt.attention_mask is not None:
            kwargs["attention_mask"] = prompt.attention_mask[:, :stop]
        if positions is not None:
            kwargs["position_ids"] = positions[..., start:stop]
        inputs = model.prepare_inputs_for_generation(
            prompt.input_ids[:, start:stop],
            use_cache=True,
            is_first_iteration=False,
            **{CACHE: cache},
            **kwargs,
        )
        model(**inputs, return_dict=True)
        progress = Progress(
            total=total, cached=cached, processed=stop, seconds=time.perf_counter() - began
        )
        if on_progress is not None:
            on_progress(progress)
    if prompt.input_ids.device.type == "cuda":
        torch.cuda.synchronize(prompt.input_ids.device)
    return Progress(
        total=total,
        cached=cached,
        processed=progress.processed,
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def progress_bar(total: int, *, wanted: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on stderr with rate and remaining time; nothing where stderr is not a terminal.

    Args:
        total: Tokens of the prompt.
        wanted: Whether a bar is wanted at all.

    Yields:
        What to call with each progress, or None.
    """
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("reading the prompt"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prefill", total=total, rate="")

        def show(progress: Progress) -> None:
            rate = f"{progress.tokens_per_s:,.0f} tokens/s" if progress.seconds > 0.2 else ""
            bar.update(task, completed=progress.processed, rate=rate)

        yield show
