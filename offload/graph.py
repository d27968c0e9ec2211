"""How is a step replayed that the host has a hand in? As several CUDA graphs, and what the host does between them.

A step on the device path is one graph. Where kernels cannot read host pages, a layer has to ask the host for rows, and where
every token is streamed, the host launches a layer's attention, whose chunks are others in every step: `by_host` ends the graph
that is being captured there, and begins another one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


class StepGraph:
    """A captured step: graphs that share their memory, replayed in the order in which they were captured."""

    # A process captures one step at a time, and what asks for the host lies deep in the model's forward.
    _capturing: StepGraph | None = None

    def __init__(self, device: torch.device) -> None:
        """With nothing captured.

        Args:
            device: A CUDA device.
        """
        self._device = device
        self._pool: Any = None  # torch's handle of memory that graphs share
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._actions: list[Callable[[], None]] = []  # the one behind each graph but the last
        self._kept: dict[tuple[object, ...], Tensor] = {}  # of `kept`

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Within, launches are captured and not run. Every stream that was forked has to be joined again."""
        assert StepGraph._capturing is None
        assert not self._graphs
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        gc.collect()  # what dies while a graph is captured may call CUDA
        torch.cuda.empty_cache()
        StepGraph._capturing = self
        try:
            with torch.cuda.stream(self._stream()):
                self._begin()
                try:
                    yield
                except BaseException:
                    with suppress(RuntimeError):  # says only that the capture is void
                        self._graphs[-1].capture_end()
                    raise
                self._graphs[-1].capture_end()
        finally:
            StepGraph._capturing = None

    def _stream(self) -> torch.cuda.Stream:
        """The one on which torch captures: libraries keep a workspace for every stream that they are called on."""
        shared = torch.cuda.graph
        if shared.default_capture_stream is None:
            shared.default_capture_stream = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = shared.default_capture_stream
        return stream if stream.device == self._device else torch.cuda.Stream(self._device)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self._graphs.append(graph)

    def replay(self) -> None:
        """Queues the step; waits for the device where an action of the host does."""
        for i, graph in enumerate(self._graphs):
            graph.replay()
            if i < len(self._actions):
                self._actions[i]()

    def _keep(self, key: tuple[object, ...], value: Tensor) -> Tensor:
        if key not in self._kept:
            self._kept[key] = torch.empty_like(value, memory_format=torch.contiguous_format)
        return self._kept[key].copy_(value)

    def _split(self, action: Callable[[], None]) -> None:
        self._graphs[-1].capture_end()
        self._actions.append(action)
        self._begin()


def by_host(action: Callable[[], None]) -> None:
    """Lets the host do something between two launches, in replays too. All streams but the current one are joined.

    Args:
        action: Called now, or, where a step is being captured, in each of its replays.
    """
    graph = StepGraph._capturing
    if graph is None:
        action()
    else:
        graph._split(action)


def kept(**values: Tensor) -> dict[str, Tensor]:
    """The same values where what the host does behind them finds them in every replay.

    Where a step is being captured they are copied to memory that all calls of the step share, by name and shape: a value is there
    until the next call, which for a layer's own is until the next layer.
    """
    graph = StepGraph._capturing
    if graph is None:
        return values
    return {name: graph._keep((name, value.shape, value.dtype), value) for name, value in values.items()}  # fmt: skip
