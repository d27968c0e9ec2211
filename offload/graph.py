"""How is a step replayed that the host has a hand in? As several CUDA graphs, and what the host does between them.

Most steps are one graph. Where kernels cannot read host pages, a layer's step has to ask the host for rows: `by_host`
ends the graph that is being captured there, and begins another one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


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
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._actions: list[Callable[[], None]] = []  # the one behind each graph but the last

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Within, launches are captured and not run. Every stream that was forked has to be joined again."""
        assert StepGraph._capturing is None
        assert not self._graphs
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
