"""How do keys and values come of the input of an attention module? By the model's own projections, norm and rotation.

What the module is given is noted by a hook; angles are those that the model itself passed, whatever its scheme. Which
models this is right for is not believed but tried: a few tokens are fed, and what is rebuilt is compared with what the
model cached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.cache import CACHE, OffloadCache, cache_in
from offload.errors import CacheError, UnsupportedModelError
from offload.kernels.rotate import rotate_
from offload.model import ModelShape, text_config
from offload.tiers.rows import RowShape

_TRIED = 8  # tokens
_PIECE = 1024  # tokens that are rotated together where no kernel does it
_ROUNDINGS = 8  # by which rebuilt keys may differ, in roundings of the largest
_Project = Callable[[Tensor], Tensor]


class Recipe:
    """Rebuilds keys and values of one attention module.

    Attributes:
        width: Values of an input, E.
    """

    def __init__(self, module: Any, row: RowShape) -> None:
        """Finds the module's parts.

        Args:
            module: Of the model.
            row: Of its keys and values.

        Raises:
            AttributeError: The module has other parts.
        """
        self._keys, self._values = _projections(module, row)
        self._norm: Any = getattr(module, "k_norm", getattr(module, "k_layernorm", None))
        self._row = row
        self._rotate: Any = getattr(
            sys.modules[type(module).__module__], "apply_rotary_pos_emb", None
        )
        self.width = _width(module)
        # By one kernel, on a card, where that comes to the same.
        self._in_place = next(module.parameters()).is_cuda

    def __call__(
        self, inputs: Tensor, angles: tuple[Tensor, Tensor] | None, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys [B, H_kv, T, D] and values [B, H_kv, T, D_v].

        Args:
            inputs: [B, T, E].
            angles: Cosines and sines [B or 1, N, D or fewer] by position; None where keys are not rotated.
            positions: int64 [T].
        """
        heads = self._row.kv_heads
        keys, values = self._keys(inputs), self._values(inputs)
        norm = self._norm
        whole = norm is not None and tuple(norm.weight.shape) == (keys.shape[-1],)
        if whole and heads > 1:
            keys, norm = norm(keys), None
        keys = keys.unflatten(-1, (heads, self._row.key_dim))
        if norm is not None:
            keys = norm(keys)
        if angles is not None and self._in_place:
            rotate_(keys, *angles, positions)
            angles = None
        keys = keys.transpose(1, 2)
        if angles is not None and self._rotate is not None:
            for at in range(0, positions.shape[0], _PIECE):
                piece = slice(at, at + _PIECE)  # copies of all would be as large as keys and values
                cos, sin = (part[:, positions[piece]] for part in angles)
                turned = keys[:, :, piece, : cos.shape[-1]]
                turned.copy_(self._rotate(turned[:, :0], turned, cos, sin)[1])
        return keys, values.unflatten(-1, (heads, self._row.value_dim)).transpose(1, 2)

    def tries(
        self, inputs: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What comes of tokens from position 0 on, by each way there is; the way tried last stays."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        if self._in_place:
            yield self(inputs, angles, positions)
            self._in_place = False
        yield self(inputs, angles, positions)


class Inputs:
    """What each attention module was given last, where the pass is over a cache of ours that asks for it.

    Attributes:
        recipes: Of the modules.
        asking: Caches that it is noted for, by `id`.
    """

    def __init__(self, modules: Sequence[Any], recipes: Sequence[Recipe]) -> None:
        """Hooks the modules.

        Args:
            modules: Of the layers that keep every token.
            recipes: Of each.
        """
        self.recipes = recipes
        self.asking: set[int] = set()
        self._given: dict[int, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._noting(index), with_kwargs=True)
            for index, module in enumerate(modules)
        ]

    def take(self, layer: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The inputs [B, Q, E] of a layer's new tokens and their angles.

        Raises:
            CacheError: Nobody has told them.
        """
        given = self._given.pop(layer, None)
        if given is None:
            raise CacheError(
                "The attention module's input is not known, which pages are to hold",
                asked=f"layer {layer}",
                there="a call that passed by the module's forward",
                change='Write scheduler.recompute = "off".',
            )
        return given

    def forget(self, cache: int) -> None:
        """Notes nothing more for a cache."""
        self.asking.discard(cache)
        self._given.clear()

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._given.clear()

    def _noting(self, layer: int) -> Callable[..., None]:
        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = cache_in(kwargs)
            if isinstance(cache, OffloadCache) and id(cache) in self.asking:
                self._given[layer] = _inputs(args, kwargs)

        return note


class Angles:
    """Cosines and sines of one cache's tokens, the same for all its layers."""

    def __init__(self) -> None:
        self._table: tuple[Tensor, Tensor] | None = None  # each [B or 1, room, D]

    def put(self, first: int, angles: tuple[Tensor, Tensor] | None) -> None:
        """Keeps those of tokens from a position on; rows that are alike are kept once.

        Args:
            first: The position in the sequences.
            angles: Each [B or 1, Q, D].
        """
        if angles is None:
            return
        new = [part if part.shape[0] == 1 else _once(part) for part in angles]
        stop = first + new[0].shape[1]
        if self._table is None:
            self._table = (new[0][:, :0], new[1][:, :0])
        grown = []
        for table, part in zip(self._table, new, strict=True):
            batch = max(table.shape[0], part.shape[0])
            if table.shape[1] < stop or table.shape[0] < batch:
                room = max(stop + 4096, table.shape[1])
                larger = table.new_zeros((batch, room, table.shape[2]))
                larger[:, : table.shape[1]] = table
                table = larger
            table[:, first:stop] = part
            grown.append(table)
        self._table = grown[0], grown[1]

    def of(self, sequence: int | None) -> tuple[Tensor, Tensor] | None:
        """Those of one sequence, or of all: each [B or 1, N, D], by position. None where keys are not rotated."""
        if self._table is None:
            return None
        cos, sin = self._table
        if sequence is not None and cos.shape[0] > 1:
            return cos[sequence : sequence + 1], sin[sequence : sequence + 1]
        return cos, sin

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of cosines and of sines; none while there are none."""
        return tuple(part.data_ptr() for part in self._table or ())

    def select(self, rows: Tensor) -> None:
        """Makes sequence i the former sequence rows[i]."""
        if self._table is not None and self._table[0].shape[0] > 1:
            cos, sin = (table.index_select(0, rows.to(table.device)) for table in self._table)
            self._table = cos, sin


class LayerSource:
    """A `Source` of one layer of one cache."""

    def __init__(self, inputs: Inputs, layer: int, angles: Angles) -> None:
        """Of a cache's layer.

        Args:
            inputs: Of the model.
            layer: Among those that keep every token. The first one keeps the angles for all.
            angles: Of the cache.
        """
        self._inputs, self._layer, self._angles = inputs, layer, angles

    def take(self) -> tuple[Tensor, Callable[[int], None]]:
        """As of `Source`."""
        hidden, angles = self._inputs.take(self._layer)

        def note(first: int) -> None:
            if self._layer == 0:
                self._angles.put(first, angles)

        return hidden, note

    @torch.no_grad()  # what is not inference mode records a graph: it would hold every input
    def rebuild(
        self, inputs: Tensor, positions: Tensor, sequence: int | None
    ) -> tuple[Tensor, Tensor]:
        """As of `Source`."""
        return self._inputs.recipes[self._layer](inputs, self._angles.of(sequence), positions)

    def select(self, rows: Tensor) -> None:
        """As of `Source`."""
        if self._layer == 0:
            self._angles.select(rows)

    @property
    def addresses(self) -> tuple[int, ...]:
        """As of `Source`."""
        return self._angles.addresses


@torch.no_grad()
def recipes(model: Any, shape: ModelShape) -> list[Recipe]:
    """How each layer's keys and values are rebuilt, tried with a few tokens.

    Args:
        model: With our attention.
        shape: Of the model.

    Raises:
        UnsupportedModelError: They cannot be.
    """
    from transformers.cache_utils import DynamicCache

    try:
        found = [Recipe(module, row) for module, row in zip(shape.modules, shape.rows, strict=True)]
    except AttributeError as error:
        raise _unsupported(shape, f"its attention has no k_proj and v_proj ({error})") from error
    given: dict[int, Any] = {}
    hooks = []
    for index, module in enumerate(shape.modules):

        def note(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            given[index] = _inputs(args, kwargs)

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    cache = DynamicCache(config=text_config(model))
    ids = torch.arange(1, _TRIED + 1, device=shape.device)[None] % max(2, shape.vocabulary)
    try:
        model(input_ids=ids, use_cache=True, **{CACHE: cache})
    finally:
        for hook in hooks:
            hook.remove()
    for index, (layer, recipe) in enumerate(zip(shape.offloaded, found, strict=True)):
        if index not in given:
            raise _unsupported(shape, f"what layer {layer} is given is not known")
        held: Any = cache.layers[layer]
        try:
            alike = any(
                _alike(keys, held.keys) and _alike(values, held.values)
                for keys, values in recipe.tries(*given[index])
            )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise _unsupported(shape, f"layer {layer} is rebuilt otherwise ({error})") from error
        if not alike:
            raise _unsupported(shape, f"what is rebuilt of layer {layer} is not what it cached")
    return found


def _projections(module: Any, row: RowShape) -> tuple[Any, Any]:
    """What makes keys and values of an input: of its own, or the part of a product that makes queries as well."""
    n_keys, n_values = row.kv_heads * row.key_dim, row.kv_heads * row.value_dim
    fused = getattr(module, "qkv_proj", None)  # all queries, all keys, all values
    if fused is not None:
        keys, values = slice(-n_keys - n_values, -n_values), slice(-n_values, None)
        return _part(fused, keys), _part(fused, values)
    return module.k_proj, module.v_proj


def _part(linear: Any, rows: slice) -> _Project:
    weight, bias = linear.weight[rows], None if linear.bias is None else linear.bias[rows]
    return lambda inputs: torch.nn.functional.linear(inputs, weight, bias)


def _width(module: Any) -> int:
    linear: Any = getattr(module, "qkv_proj", None) or module.k_proj
    return int(linear.in_features)


def _inputs(args: Any, kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    hidden: Tensor = kwargs.get("hidden_states", args[0] if args else None)
    angles = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    return hidden, angles if isinstance(angles, tuple) and len(angles) == 2 else None


def _once(part: Tensor) -> Tensor:
    """[1, Q, D] of [B, Q, D] where all are alike."""
    return part[:1] if bool((part == part[:1]).all()) else part


def _alike(found: Tensor, there: Tensor) -> bool:
    if found.shape != there.shape or found.dtype != there.dtype:
        return False
    off = (found.double() - there.double()).abs().max()
    return bool(off <= _ROUNDINGS * torch.finfo(there.dtype).eps * there.double().abs().max())


def _unsupported(shape: ModelShape, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "Keys and values of this model cannot be rebuilt",
        model_type=shape.model_type,
        reason=reason,
        change='Write scheduler.recompute = "off".',
    )
