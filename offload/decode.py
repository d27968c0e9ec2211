"""How is a token made without waiting for the CPU? One forward pass, captured as a CUDA graph and replayed.

A model's decode step is hundreds of launches of a few microseconds each; launched one by one they take longer than
they run. `captured_steps` puts a `CapturedStep` where `torch.nn.Module.compile` would put a compiled forward, so that
whoever calls the model, transformers' `generate` first of all, replays the graph without knowing.

The first step of one token runs as it is (compiled, where that is wanted), the second is captured, later ones are
replayed. A graph is captured anew when an address that it has kept changed, when the first block went to the host, or
when host pages could no longer be pinned: then it is split at every layer, whose rows the host gathers. Where every token is
streamed it is split at every layer from the start: the host launches its attention, and the graphs hold what lies between. What it
launches for pages that were there in the step before are small graphs again (`offload.graph.Repeats`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from offload.attention import kept_out_of_compiled_code
from offload.cache import OffloadCache, OffloadLayer, cache_in
from offload.graph import StepGraph
from offload.model import text_config
from offload.tiers.path import LARGEST_HEAD
from offload.tiers.store import LayerStore

# Inputs of a step that a graph reads from fixed addresses; others must be the same objects in every step.
_STATIC = ("input_ids", "position_ids")
# Where hooks come from that a graph may leave out: ours tell the cache what `CapturedStep` tells it, transformers' collect hidden states
# where these are asked for, and what torch's compute is captured.
_KNOWN_HOOKS = ("offload.", "transformers.", "torch.")
# Logits processors that keep something from call to call: they may see nothing but tokens that are kept.
_STATEFUL = {
    "PrefixConstrainedLogitsProcessor",  # a function of the user's
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
}
# What says only how long the past is, which the stores know.
_DROPPED = ("attention_mask",)


class CapturedStep:
    """Stands before a model's forward: replays what it can, passes on the rest. Whoever made it tells the reasons.

    Attributes:
        reason: Why steps are not captured, or None.
        not_compiled: Why layers are captured as they are, though they should be compiled, or None.
        relaunched: Why what repeats between the graphs of a step is launched anew in every replay, or None.
        replays: Steps that were replayed.
        seconds: What compiling and capturing took, each counted once; the step that compiles is part of it.
        before_capture: Called before a step is compiled or captured: nothing else may use the model meanwhile.
    """

    def __init__(self, model: Any, cache: OffloadCache, *, compiles: bool) -> None:
        """For one generate call.

        Args:
            model: Attached.
            cache: On a CUDA device; every layer of it ours.
            compiles: Whether layers are compiled before they are captured.
        """
        self._model = model
        self._cache = cache
        self._compiles = compiles
        self._graph: StepGraph | None = None
        self._static: dict[str, Tensor] = {}
        self._others: dict[str, Any] = {}
        self._output: Any = None
        self._key: tuple[Any, ...] | None = None
        # The kinds of layers, in steps that ran.
        self._warm: set[tuple[tuple[bool, bool], ...]] = set()
        self._padded: bool | None = None  # whether any token is padding; None: not known yet
        self.reason = _why_not(cache) or _hooked(model) or _counts(model)
        self.not_compiled: str | None = None
        self.relaunched: str | None = None
        self.replays = 0
        self.seconds = 0.0
        self.before_capture: Callable[[], None] = lambda: None

    @property
    def _stores(self) -> list[LayerStore]:
        return self._cache.layer_stores

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        forward = self._model._call_impl
        if self.reason is not None or not self._is_step(args, kwargs):
            return forward(*args, **kwargs)
        on_host = tuple(_kind(store) for store in self._stores)
        if on_host not in self._warm:  # kernels and scratch are made outside of a graph
            self._warm.add(on_host)
            return self._first_step(args, kwargs)
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self._cache.begin_pass(ids, mask)
        visible = self._visible(mask)
        for store in self._stores:
            store.visible = visible
            store.before_step()
        try:
            if self._key != self._addresses(kwargs) and not self._capture(kwargs):
                self._cache.forget_pass()  # nothing was run: the pass begins anew
                return forward(*args, **kwargs)
            for name, static in self._static.items():
                static.copy_(kwargs[name])
            assert self._graph is not None
            self._graph.replay()
            self.replays += 1
            self.relaunched = self._graph.repeats.reason
            for store in self._stores:
                store.visible = None
                store.after_step()
        except BaseException:
            for store in self._stores:
                store.settle()
            raise
        self._cache.end_pass()
        return self._output

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        """Boolean [B, length + 1], False where a streamed token is padding; None where none is. Steps bring no padding."""
        if mask is None or all(store.path is not None for store in self._stores):
            return None
        if self._padded is None:
            self._padded = not bool(mask.all())
        return mask.bool() if self._padded else None

    def _first_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a step as it is, compiled if that is wanted and works."""
        self.before_capture()
        if self._compiles:
            length, began = self._cache.get_seq_length(), time.perf_counter()
            try:
                with self._compiled():
                    return self._model._call_impl(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self._compiles = False
                self.not_compiled = f"compiling failed ({_first_line(error)})"
                self._cache.settle()  # some layers had taken the token in
                if self._cache.get_seq_length() != length:
                    raise
            finally:
                self.seconds += time.perf_counter() - began
        return self._model._call_impl(*args, **kwargs)

    def _is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids")
        if args or cache_in(kwargs) is not self._cache or not isinstance(ids, Tensor):
            return False
        if ids.dim() != 2 or ids.shape[1] != 1 or not self._stores:
            return False
        if not isinstance(kwargs.get("position_ids"), Tensor):
            # A graph would keep the position that the model counts for itself.
            self.reason = "its forward was not given position_ids"
            return False
        if kwargs.get("output_hidden_states"):
            # Whoever keeps them would keep one step's, many times.
            self.reason = "hidden states of every step are asked for"
            return False
        strangers = [
            name
            for name, value in kwargs.items()
            if isinstance(value, Tensor) and name not in (*_STATIC, *_DROPPED)
        ]
        if strangers:
            self.reason = f"a graph does not know its inputs {', '.join(strangers)}"
            return False
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            self.reason = "its attention mask is not one of padding"
            return False
        if ids.shape[0] != self._stores[0].batch:
            return False
        return all(s.path is None or s.path.can_step_now(s.columns) for s in self._stores)

    def _addresses(self, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What a graph has kept: it is void when any of it changes."""
        others = tuple((name, id(value)) for name, value in _others(kwargs).items())
        shapes = tuple(tuple(kwargs[name].shape) for name in _STATIC if kwargs.get(name) is not None)  # fmt: skip
        stores = tuple((s.address, s.path.epoch if s.path else 0, _kind(s)) for s in self._stores)
        padded = any(s.path is not None and s.path.is_padded for s in self._stores)
        return others, shapes, stores, padded

    def _capture(self, kwargs: dict[str, Any]) -> bool:
        """Captures the step; whether that worked."""
        self.before_capture()
        began = time.perf_counter()
        self.release()
        self._static = {
            name: kwargs[name].clone() for name in _STATIC if isinstance(kwargs.get(name), Tensor)
        }
        inputs = {k: v for k, v in kwargs.items() if k not in _DROPPED} | self._static
        graph = StepGraph(self._model.device)
        try:
            with self._cache.capturing(), self._compiled(), graph.capture():
                self._output = self._model._call_impl(**inputs)
        except Exception as error:  # noqa: BLE001 - whatever stops a capture, eager steps work
            torch.cuda.synchronize()
            first: BaseException = error  # what ended the capture hides what went wrong within it
            while first.__context__ is not None:
                first = first.__context__
            self.reason = f"capturing it failed ({type(first).__name__}: {_first_line(first)})"
            self.release()
            return False
        finally:
            self.seconds += time.perf_counter() - began
        self._graph = graph
        self._others = _others(kwargs)  # held, so that no other object gets the id of one of them
        self._key = self._addresses(kwargs)
        return True

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Within, decoder layers run compiled, but for what our cache and our attention do."""
        if not self._compiles:
            yield
            return
        layers = _decoder_layers(self._model)
        limits = {"recompile_limit": 4 * len(layers) + 64, "accumulated_recompile_limit": 2**16}
        try:
            with torch._dynamo.config.patch(limits), kept_out_of_compiled_code(self._cache):
                for layer in layers:
                    layer.compile(dynamic=False)
                yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None

    def release(self) -> None:
        """Gives the graph's memory back."""
        self._graph = self._output = self._key = None
        self._static, self._others = {}, {}


@contextmanager
def captured_steps(model: Any, cache: OffloadCache, *, compiles: bool) -> Iterator[CapturedStep]:
    """Within, the model's steps of one token over a cache are captured and replayed.

    Args:
        model: Attached.
        cache: In use.
        compiles: Whether layers are compiled first.

    Yields:
        What stands before the model's forward.
    """
    step = CapturedStep(model, cache, compiles=compiles)
    if step.reason is not None or model._compiled_call_impl is not None:
        step.reason = step.reason or "the model has been compiled by its user"
        yield step
        return
    model._compiled_call_impl = step
    try:
        yield step
    finally:
        model._compiled_call_impl = None
        step.release()


def decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    waits: bool = False,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy search and sampling as transformers' own loop does them, but never waiting for the device where nobody can tell.

    The next step is queued before it is known whether this one was the last; that is found out one step later, and
    the step too many is taken back, its random numbers too. A streamer is one step behind for the same reason. transformers has
    the same idea for other devices (`DeferredStopCheck`); there it costs a copy of all ids and positions a step besides. Logits
    processors that are not the library's or that remember something, and stopping criteria besides its two, would see the step too
    many: then every step is waited for.

    Args:
        model: Attached, its cache one of ours that can be cropped.
        input_ids: [B, N], of which the cache holds all but some.
        logits_processor: Of transformers, as prepared by `generate`; likewise the further ones.
        stopping_criteria: With a longest length.
        generation_config: As merged.
        streamer: Gets tokens.
        synced_gpus: Must be False.
        waits: Whether every step is waited for, whatever there is: where one takes much longer than waiting does.
        **model_kwargs: The cache, and attention_mask and position_ids where the model takes them.

    Returns:
        [B, N + new], as `generate` returns it.
    """
    assert not synced_gpus
    cache = cache_in(model_kwargs)
    batch, length = input_ids.shape
    longest = int(stopping_criteria.max_length)
    ends, others = ends_of(stopping_criteria, input_ids.device)
    waits = waits or others or not all(map(keeps_nothing, logits_processor))
    pad = generation_config._pad_token_tensor
    ids, mask, inputs = prepare(model, input_ids, max(longest, length), model_kwargs)
    finished: Tensor | None = None
    flags = Flags(input_ids, streamer)
    device, state = input_ids.device, None
    while True:
        logits = model(**inputs, return_dict=True).logits[:, -1].to(torch.float32, copy=True)
        scores = logits_processor(ids[:, :length], logits)
        if generation_config.do_sample:
            chances = torch.softmax(scores, dim=-1)
            state = random_state(device)
            token = torch.multinomial(chances, num_samples=1).squeeze(1)
        else:
            token = torch.argmax(scores, dim=-1)
        if ends is not None and finished is not None and batch > 1:
            token = torch.where(finished, pad, token)
        ids[:, length] = token
        length += 1
        # Launches between two steps are time that the device waits: none that does not matter.
        done = None if ends is None else (token == ends).any(0)
        if others:
            done = stopping_criteria(ids[:, :length], None)
        if done is not None:
            finished = done if finished is None or batch == 1 else finished | done
        if flags.send(finished, token):  # the step before was the last one
            cache.crop(-1)
            length -= 1
            if (
                state is not None
            ):  # the step too many took random numbers: the next call must not miss them
                set_random_state(state, device)
            break
        if length >= longest:
            flags.finish()
            break
        if waits and flags.finish():
            break
        inputs["input_ids"] = token[:, None]
        if mask is not None:
            inputs["attention_mask"] = mask[:, :length]
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"][..., -1:] + 1
    if streamer is not None:
        streamer.end()
    return ids[:, :length].contiguous()


def prepare(
    model: Any, input_ids: Tensor, room: int, model_kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What a loop begins with.

    Args:
        model: Attached.
        input_ids: [B, N], of which the cache holds all but some.
        room: Tokens per sequence that there shall be room for, at least N.
        model_kwargs: Of the loop, the cache among them.

    Returns:
        ids [B, room] with the tokens so far, the attention mask [B, room] if there is one, and the inputs of the first
        pass.
    """
    length = input_ids.shape[1]
    ids = input_ids.new_zeros((input_ids.shape[0], room))
    ids[:, :length] = input_ids
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, room - mask.shape[1]), value=1)
    inputs = model.prepare_inputs_for_generation(
        input_ids,
        next_sequence_length=length - cache_in(model_kwargs).get_seq_length(),
        is_first_iteration=True,
        **model_kwargs,
    )
    return ids, mask, inputs


def ends_of(stopping_criteria: Any, device: torch.device) -> tuple[Tensor | None, bool]:
    """Tokens that end a sequence, [n, 1], and whether anything but them and the longest length does."""
    ends = [c.eos_token_id for c in stopping_criteria if hasattr(c, "eos_token_id")]
    plain = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in stopping_criteria)
    return (torch.cat(ends).view(-1, 1).to(device) if ends else None), not plain


def keeps_nothing(processor: Any) -> bool:
    """Whether a logits processor is the library's, and remembers nothing from call to call."""
    kind = type(processor)
    return kind.__module__ == logits_process.__name__ and kind.__name__ not in _STATEFUL


def random_state(device: torch.device) -> Tensor:
    """The state of a device's generator, which the host keeps: reading it waits for nothing."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets the state of a device's generator."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Flags:
    """Whether all sequences are finished, and their tokens for a streamer, read one step late.

    They are copied on a stream of their own, since what comes behind a copy waits for more than the copy takes.
    """

    def __init__(self, input_ids: Tensor, streamer: Any) -> None:
        self._device = input_ids.device
        self._streamer = streamer
        self._copies: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._copies = torch.cuda.Stream(self._device)
        # Of the last two steps: what is copied, where it goes, and when it has arrived.
        self._sent: list[
            tuple[tuple[Tensor, ...], tuple[Tensor, ...], torch.cuda.Event | None]
        ] = []

    def send(self, finished: Tensor | None, token: Tensor) -> bool:
        """Sends a step's; waits for the step before.

        Args:
            finished: Boolean [B]; None as long as nothing can finish a sequence.
            token: [B].

        Returns:
            Whether the step before left no sequence unfinished. Then this one is not to be shown.
        """
        over = () if finished is None else (finished if len(finished) == 1 else finished.all(0, keepdim=True),)  # fmt: skip
        sources = over if self._streamer is None else (*over, token)
        if self._copies is None:
            self._sent.append((sources, sources, None))
        else:
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._copies):
                copies = tuple(source.to("cpu", non_blocking=True) for source in sources)
                self._sent.append((sources, copies, self._copies.record_event()))
        return len(self._sent) > 1 and self._receive()

    def finish(self) -> bool:
        """Waits for the last step and shows its tokens; says whether it left no sequence unfinished."""
        return self._receive()

    def forget(self) -> None:
        """What was sent does not matter any more."""
        self._sent.clear()

    def _receive(self) -> bool:
        """Whether the oldest step that was sent left no sequence unfinished."""
        _, copies, event = self._sent.pop(0)
        if event is not None:
            event.synchronize()
        if self._streamer is not None:
            self._streamer.put(copies[-1].clone())
        return len(copies) > (self._streamer is not None) and bool(copies[0])


def _kind(store: LayerStore) -> tuple[bool, bool]:
    """Whether a layer's kernels read tokens on the host, and whether the host has to gather them."""
    on_host = store.path is not None and store.columns > 0
    return on_host, on_host and not store.all_pinned


def _others(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that must be the same objects in every step."""
    return {k: v for k, v in kwargs.items() if k not in (*_STATIC, *_DROPPED)}


def _why_not(cache: OffloadCache) -> str | None:
    strangers = {type(x).__name__ for x in cache.layers if type(x) is not OffloadLayer}
    if strangers:
        return f"its cache has layers that a graph cannot replay ({', '.join(sorted(strangers))})"
    if any(store.region.device.type != "cuda" for store in cache.layer_stores):
        return "graphs are captured on CUDA devices only"
    if any(store.rereads for store in cache.layer_stores):
        return "tokens that were dropped may have to be read again"
    if not all(store.path.has_kernels for store in cache.layer_stores if store.path is not None):
        return f"its heads are larger than {LARGEST_HEAD}, which no kernel knows"
    return None


def _hooked(model: Any) -> str | None:
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if not all(getattr(hook, "__module__", "").startswith(_KNOWN_HOOKS) for hook in hooks):
            return f"no graph calls the hooks of {name or type(module).__name__}"
    return None


def _counts(model: Any) -> str | None:
    # Llama 4 scales queries by a position that Python reads from the cache's length.
    if getattr(text_config(model), "attn_temperature_tuning", None):
        return "a graph would keep the positions that its attention counts"
    return None


def _decoder_layers(model: Any) -> list[Any]:
    """The modules of the longest list of modules of one class: the decoder's layers."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    best = max(lists, key=len, default=None)
    layers = [] if best is None else [x for x in best if type(x) is type(best[0])]
    return [layer for layer in layers if layer._compiled_call_impl is None]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
