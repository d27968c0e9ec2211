"""How is a step replayed that the host has a hand in? As several CUDA graphs, and what the host does between them.

A step on the device path is one graph. Where kernels cannot read host pages, a layer has to ask the host for rows, and where
every token is streamed, the host launches a layer's attention, whose chunks change whenever pages come in: `by_host` ends the
graph that is being captured there, and begins another one. Most of what the host launches is what it launched in the step before:
`Repeats` makes small graphs of it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from offload.scheduler.layout import MOST_REPEATS

logger = logging.getLogger(__name__)

# Replays for which one is kept that is not used: two buffers may come to hold the same pages in turns.
_KEPT_REPLAYS = 4


class Repeats:
    """Launches between the graphs of a step that come alike in many replays, captured one by one.

    On the hosts of an H100 Python takes 30 to 60 us for a launch, and 5 for a graph of a dozen; capturing these takes 0.7 ms.

    Attributes:
        stream: On which is captured: that of the step.
        reason: Why something is launched anew in every replay, or None.
        captured: How often something was captured.
    """

    def __init__(self) -> None:
        """With nothing captured."""
        self.stream: torch.cuda.Stream | None = None
        self.reason: str | None = None
        self.captured = 0
        self._failures = 0
        # Nothing in it outlives its graph: it is not that of the step's graphs, whose values do.
        self._pool: Any = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._used: dict[Hashable, int] = {}  # the replay
        self._replay = 0

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Does what `launch` does; but for the first time, without calling it.

        Args:
            key: Says what is launched, with each address that is read or written.
            launch: Launches on the current stream alone, and changes nothing that Python knows of.
        """
        if key not in self._graphs and not self._capture(key, launch):
            launch()
            return
        self._used[key] = self._replay
        self._graphs[key].replay()

    def begin(self) -> None:
        """Another replay begins: what has not been used for some is forgotten."""
        self._replay += 1
        oldest = self._replay - _KEPT_REPLAYS
        for key in [key for key, used in self._used.items() if used < oldest]:
            del self._used[key], self._graphs[key]

    def _capture(self, key: Hashable, launch: Callable[[], None]) -> bool:
        """Whether that worked. Nothing waits for the device: the steps go on beside it."""
        if self._failures > 1:
            return False
        if len(self._graphs) == MOST_REPEATS:
            self.reason = f"it comes in more than {MOST_REPEATS} pieces"
            return False
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # torch takes none back that nothing uses
            self._pool = torch.cuda.graph_pool_handle()
        collects = gc.isenabled()
        gc.disable()  # what dies while a graph is captured may call CUDA
        try:
            with torch.cuda.stream(self.stream):
                # Relaxed: a kernel that is new may have to be loaded meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
                try:
                    launch()
                except BaseException:
                    with suppress(RuntimeError):  # says only that the capture is void
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Exception as error:  # noqa: BLE001 - whatever stops a capture, launching works
            self._give_up(error)
            return False
        finally:
            if collects:
                gc.enable()
        self._graphs[key] = graph
        self.captured += 1
        return True

    def _give_up(self, error: Exception) -> None:
        """Captures nothing more, and gives back what graphs hold; once, memory that torch keeps may have been what was missing."""
        self._failures += 1 if isinstance(error, torch.OutOfMemoryError) else 2
        torch.cuda.synchronize()
        self._graphs.clear()
        self._used.clear()
        torch.cuda.empty_cache()
        if self._failures > 1:
            self.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            logger.warning("What repeats in steps is launched anew each time, which is slower: %s.", self.reason)  # fmt: skip


class StepGraph:
    """A captured step: graphs that share their memory, replayed in the order in which they were captured.

    Attributes:
        repeats: Of what the host launches between them.
    """

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
        self._kept: dict[tuple[object, ...], Tensor] = {}  # of `kept` and `scratch`
        self.repeats = Repeats()

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
        self.repeats.stream = _capture_stream(self._device)
        try:
            with torch.cuda.stream(self.repeats.stream):
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

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        self._graphs.append(graph)

    def replay(self) -> None:
        """Queues the step; waits for the device where an action of the host does."""
        self.repeats.begin()
        for i, graph in enumerate(self._graphs):
            graph.replay()
            if i < len(self._actions):
                self._actions[i]()

    def _room(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        key = (name, shape, dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._kept[key]

    def _split(self, action: Callable[[], None]) -> None:
        self._graphs[-1].capture_end()
        self._actions.append(action)
        self._begin()


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which torch captures: libraries keep a workspace for every stream that they are called on."""
    shared = torch.cuda.graph
    if shared.default_capture_stream is None:
        shared.default_capture_stream = torch.cuda.Stream(device)
    stream: torch.cuda.Stream = shared.default_capture_stream
    return stream if stream.device == device else torch.cuda.Stream(device)


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
    return {
        name: graph._room(name, value.shape, value.dtype, value.device).copy_(value)
        for name, value in values.items()
    }


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what the host writes; while a step is being captured it is shared by all calls of it, as that of `kept` is.

    Args:
        name: Not one of `kept`.
        shape: Of the tensor.
        dtype: Likewise.
        device: Likewise.
    """
    graph = StepGraph._capturing
    if graph is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return graph._room(name, torch.Size(shape), dtype, device)


def repeats() -> Repeats | None:
    """Of the step that is being captured: for what the host is going to launch in its replays."""
    graph = StepGraph._capturing
    return None if graph is None else graph.repeats
