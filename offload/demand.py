"""What does a run of this model need? The demand of one generate, from the configuration and the model's shape.

No torch: the runtime asks with the shape that it has examined, the planner with one that it has read from a file, and
`offload.scheduler.layout` prices both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from offload.config import OffloadConfig
from offload.errors import ConfigError
from offload.index import token_bytes
from offload.scheduler import cost
from offload.scheduler.cost import Way, hidden_share
from offload.scheduler.layout import (
    REBUILT_TOKENS,
    REPLICA_WINDOW,
    REREAD_TOKENS,
    Demand,
    HiddenPrice,
    RungPrice,
    hidden_page_bytes,
)
from offload.scheduler.pace import Drafts
from offload.scheduler.rungs import (
    RUNGS,
    Rung,
    cached_rows,
    row_cache_bytes,
    scratch_bytes,
    scratch_token_bytes,
)
from offload.scheduler.window import SparseWindow, state_bytes, step_bytes, window_tokens
from offload.scheduler.window import token_bytes as sparse_token_bytes

# Share of an index that a search reads. Of most what finds 95 of the best 100 of 8,000 keys, rounded up: it falls as
# the context grows (benchmarks/index.json). With flat, choosing among all keys takes as long as reading their codes again;
# auto is taken for clusters, which are that share of what it may take.
SEARCHED = {
    "replica": 0.0, "auto": 0.12, "flat": 2.3, "ivf": 0.3, "hnsw": 0.2, "graph": 0.15, "clusters": 1.0, "pages": 0.4,
}  # fmt: skip
# Rows that a search reads for each token that is attended to.
_READ = {
    "replica": 0, "auto": 9, "flat": 5, "ivf": 4, "hnsw": 4, "graph": 4, "clusters": 9, "pages": 4,
}  # fmt: skip
# What torch's allocator loses to rounding and fragmentation. An 8B model used all of it in a prefill of 131,072
# tokens; with less, the allocator gives cached blocks back and asks for them again, again and again.
ALLOCATOR_SLACK = 256 * 2**20
# What the driver takes after attaching: kernels loaded when they first run, tables of pinned pages. Without it the
# same run went 7 MiB over the cap as the driver counts.
DRIVER_GROWTH = 96 * 2**20
# What cuBLAS keeps for every stream that it is called on, on Hopper; on others it is 8 MiB.
CUBLAS_WORKSPACE = 32 * 2**20
# What draws a graph on the card takes at most, once a prompt is read: heads have their turns.
NEAREST_BYTES = 256 * 2**20
# The stream of passes over drafts: for cuBLAS, and as much for cuBLASLt.
_STREAM_WORKSPACE = 2 * CUBLAS_WORKSPACE


class Row(Protocol):
    """One token of one layer: `offload.tiers.rows.RowShape`, or what a file says of it."""

    @property
    def kv_heads(self) -> int:
        """KV heads."""

    @property
    def key_dim(self) -> int:
        """Head size of the keys."""

    @property
    def value_dim(self) -> int:
        """Head size of the values."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""


class Shape(Protocol):
    """What is known of a model; the attributes are those of `offload.model.ModelShape`."""

    @property
    def rows(self) -> Sequence[Row]:
        """Of each layer that keeps every token."""

    @property
    def heads(self) -> Sequence[tuple[int, int]]:
        """Query heads of each of those, and the head size of their values."""

    @property
    def max_positions(self) -> int | None:
        """The context length that the model was made for."""

    @property
    def workspace(self) -> int:
        """Device bytes of a forward pass that do not depend on the number of tokens."""

    @property
    def workspace_per_token(self) -> int:
        """Further device bytes per token."""

    @property
    def fed_whole(self) -> str | None:
        """Why a prompt must not be cut into chunks."""

    @property
    def vocabulary(self) -> int:
        """Logits of one token."""

    @property
    def hidden(self) -> int:
        """Size of the residual stream."""

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """KV bytes of one token of one sequence, for each layer of `rows`."""

    def other_kv_bytes(self, tokens: int | None) -> int:
        """Device bytes of one sequence in layers that are not offloaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What the device holds before a run.

    Attributes:
        total: Bytes of the device.
        weights: Bytes of weights and other live tensors.
        overhead: Bytes that are nobody's tensors: driver contexts, other processes.
        on_card: Whether it is a card; a CPU has neither an allocator of ours nor streams.
        flops_per_byte: Of matrix products while PCIe brings a byte; None where nobody knows.
    """

    total: int
    weights: int
    overhead: int
    on_card: bool
    flops_per_byte: float | None = None


def demand_of(
    config: OffloadConfig,
    shape: Shape,
    held: Held,
    *,
    batch: int,
    tokens: int | None,
    copies: int = 1,
    prompt: int = 0,
    exact: bool = False,
    errors: Mapping[Rung, Sequence[float]] | None = None,
) -> Demand:
    """What a run needs.

    Args:
        config: As asked.
        shape: Of the model.
        held: By the device.
        batch: Sequences that are decoded.
        tokens: Tokens per sequence at the end, or None if unknown.
        copies: How many sequences continue one prompt.
        prompt: Tokens of the prompt, where known.
        exact: No replica, whatever the mode.
        errors: What each layer's replica costs in fidelity, by rung, where that was measured.
    """
    fast = config.keeps_replica and not exact
    staging, chunk, window = config.decode.staging, config.prefill.chunk, config.cache.window
    whole = prompt if shape.fed_whole is not None and prompt else None
    overhead = held.overhead + ALLOCATOR_SLACK + DRIVER_GROWTH if held.on_card else 0
    hidden = None
    hides = config.scheduler.recompute == "hidden" and config.mode == "exact"
    if hides and tokens is not None and shape.rows:
        hidden = hidden_price(config, shape, held.flops_per_byte)
    again = _reread_bytes(config, shape, copies)
    capturing = config.decode.capture and config.scheduler.recompute != "prefix"
    captures = CUBLAS_WORKSPACE if held.on_card and capturing else 0
    draws = 0
    if held.on_card and fast and config.retrieval.index == "graph":
        draws = NEAREST_BYTES + CUBLAS_WORKSPACE  # of the thread that does it
    rows = _decoded_rows(config, exact=exact)
    sparse = _sparse(config, tokens) if fast else None
    scratch = _scratch(config, shape, sparse, batch, tokens) if fast else (0, 0)
    ahead = held.on_card and config.decode.look_ahead is not False
    decoding = captures + draws + pass_bytes(shape, batch, rows, beside=ahead)
    # A CPU's copy would be no nearer, and an explicit window says what shall be on the device.
    keeps = held.on_card and isinstance(window, str)
    return Demand(
        batch=batch,
        copies=copies,
        prompt=prompt,
        tokens=tokens,
        page=config.cache.page,
        sinks=config.cache.sinks,
        window=None if isinstance(window, str) else window,
        chunk=whole or (None if isinstance(chunk, str) else chunk),
        staging=None if staging.is_auto else staging.resolve(total=held.total, auto=0),
        token_bytes=shape.token_bytes,
        weights=held.weights,
        overhead=overhead,
        workspace=shape.workspace + captures + draws,
        workspace_per_token=shape.workspace_per_token,
        least_workspace=decoding,
        step_workspace=decoding if keeps else None,
        other_kv=batch * shape.other_kv_bytes(tokens),
        rungs=()
        if not fast
        else _sparse_rungs(config, shape, sparse, batch=batch, tokens=tokens or 0)
        if config.scheduler.sparsity
        else _rungs(config, shape, on_card=held.on_card),
        ladder=_ladder(config, shape, errors, on_card=held.on_card) if fast and errors else (),
        whole_layers=_whole_layers(config, shape) if fast else 0,
        streams=config.replica.rung == "auto",
        rung_window=REPLICA_WINDOW if sparse is None else sparse.window,
        scratch_bytes=scratch[0],
        scratch_token_bytes=scratch[1],
        longest=shape.max_positions or 2**20,
        hidden=hidden,
        index_bytes=index_bytes(config, shape) if fast else 0,
        searched_bytes=int(index_bytes(config, shape) * SEARCHED[config.retrieval.index])
        if fast
        else 0,
        searched_rows=sum(rows.kv_heads for rows in shape.rows) * _READ[config.retrieval.index],
        prefix_token_bytes=again[0],
        prefix_workspace=again[1],
    )


@dataclass(frozen=True, slots=True)
class _Sparse:
    """Where a step attends to a share of all tokens.

    Attributes:
        window: Tokens of the window, sinks aside.
        set: Which others.
    """

    window: int
    set: SparseWindow


def _sparse(config: OffloadConfig, tokens: int | None) -> _Sparse | None:
    """What the config says of that; None where every token counts, or the length is not known."""
    share = 1.0 - config.scheduler.sparsity
    if share == 1.0 or tokens is None:
        return None
    page, sinks, asked = config.cache.page, config.cache.sinks, config.cache.window
    window = window_tokens(share, tokens, page, sinks) if isinstance(asked, str) else asked
    held = (sinks // page + window // page + 1) * page
    return _Sparse(window, SparseWindow(share, held))


def _scratch(
    config: OffloadConfig, shape: Shape, sparse: _Sparse | None, batch: int, tokens: int | None
) -> tuple[int, int]:
    """Device bytes of one sequence that a step on the device path needs, and further ones for each token."""
    if sparse is None:
        selected = max(rung.selected(config.retrieval.tokens) for rung in RUNGS)
        kinds = set(shape.heads)
        return (
            sum(scratch_bytes(*heads, selected) for heads in kinds),
            sum(scratch_token_bytes(*heads) for heads in kinds),
        )
    held, most = sparse.set.held, sparse.set.most(tokens or 0)
    of_layers = {
        (*heads, row.kv_heads, row.token_bytes)
        for heads, row in zip(shape.heads, shape.rows, strict=True)
    }
    return sum(step_bytes(*layer, held, most, batch) for layer in of_layers), 0


def _sparse_rungs(
    config: OffloadConfig, shape: Shape, sparse: _Sparse | None, *, batch: int, tokens: int
) -> tuple[RungPrice, ...]:
    """A rung for each number of chosen rows that the device may keep, the most first."""
    if sparse is None:
        return ()
    chosen, found = sparse.set, []
    most = chosen.most(tokens)
    for near in chosen.near(tokens):
        rung = Rung("window", 0, 0, caches=False, share=chosen.share, near=near, far=most - near)
        row_bytes = tuple(
            state_bytes(chosen.held, most, near, row.kv_heads, heads, row.key_dim, row.token_bytes, batch)
            for row, (heads, _) in zip(shape.rows, shape.heads, strict=True)
        )  # fmt: skip
        layer_bytes = tuple(sparse_token_bytes(row.kv_heads, config.cache.page) for row in shape.rows)  # fmt: skip
        found.append(RungPrice(rung=rung, layer_bytes=layer_bytes, row_bytes=row_bytes))
    return tuple(found)


def _reread_bytes(config: OffloadConfig, shape: Shape, copies: int) -> tuple[int, int]:
    """Device bytes of a token while it is read again, and of activations besides; none where nothing may be dropped."""
    if config.scheduler.recompute != "prefix" or config.mode != "exact" or copies > 1:
        return 0, 0
    # Keys and values of a layer as they came and side by side, and both of the layer before.
    widest = max(shape.rows, key=lambda row: row.token_bytes, default=None)
    if widest is None:
        return 0, 0
    kept = 4 * widest.token_bytes
    if shape.other_kv_bytes(1):  # in one piece: windows and states are not those of a piece
        return kept + shape.workspace_per_token, 0
    # A piece that waits in a layer has the model's input, the layer's, that of attention, and queries.
    waits = _itemsize(widest) * (3 * shape.hidden + max(n * size for n, size in shape.heads))
    return kept + waits, REREAD_TOKENS * shape.workspace_per_token


def other_demand(
    config: OffloadConfig, shape: Shape, held: Held, *, batch: int, tokens: int | None, copies: int = 1, prompt: int = 0
) -> Demand | None:  # fmt: skip
    """The demand with the other setting of scheduler.recompute; None where there is none, or the model has no use for it.

    Args:
        config: As asked.
        shape: As for `demand_of`; likewise the others.
        held: By the device.
        batch: Sequences that are decoded.
        tokens: Per sequence at the end, or None if unknown.
        copies: How many of them continue one prompt.
        prompt: Tokens of the prompt.
    """
    if config.mode != "exact" or tokens is None or not shape.rows:
        return None
    recompute = "off" if config.scheduler.recompute == "hidden" else "hidden"
    try:
        return demand_of(
            OffloadConfig.build(config, recompute=recompute), shape, held,
            batch=batch, tokens=tokens, copies=copies, prompt=prompt,
        )  # fmt: skip
    except ConfigError:
        return None


def priced_shape(
    shape: Shape, *, weights: int, parameters: float, reads: float | None = None, depth: int | None = None
) -> cost.Shape:  # fmt: skip
    """What the cost model needs of a shape.

    Args:
        shape: Of the model.
        weights: Bytes of them on the device.
        parameters: That a token is multiplied with.
        reads: Bytes of them that a step reads; None: all.
        depth: Layers of all kinds; None: there are no others.
    """
    layers = tuple(
        cost.Heads(queries, row.kv_heads, row.key_dim, row.value_dim)
        for row, (queries, _) in zip(shape.rows, shape.heads, strict=True)
    )
    return cost.Shape(
        layers=layers,
        hidden=shape.hidden,
        itemsize=max((_itemsize(row) for row in shape.rows), default=2),
        parameters=parameters,
        weights=weights,
        reads=reads,
        depth=depth,
    )


def _itemsize(row: Row) -> int:
    return row.token_bytes // (row.kv_heads * (row.key_dim + row.value_dim))


def way_of(config: OffloadConfig, *, batch: int, prompt: int, output: int) -> Way:
    """How a configuration makes tokens."""
    selected, ahead = config.retrieval.tokens, config.decode.look_ahead
    return Way(
        mode=config.mode,
        batch=batch,
        prompt=prompt,
        selected=None if isinstance(selected, str) else selected,
        drafts=Drafts.of(config.decode.draft),
        looks_ahead=ahead is not False,
        compiled=config.compiles(output),
        captured=config.decode.capture,
    )


def index_bytes(config: OffloadConfig, shape: Shape) -> int:
    """Host bytes that one token of one sequence takes in the indexes of all layers."""
    name = config.retrieval.index
    if name == "replica":
        return 0
    return sum(row.kv_heads * token_bytes(name, row.key_dim) for row in shape.rows)


def hidden_price(config: OffloadConfig, shape: Shape, flops_per_byte: float | None) -> HiddenPrice:
    """What pages take that hold inputs of attention instead of the keys and values of some tokens.

    Args:
        config: As asked.
        shape: Of the model.
        flops_per_byte: As of `Held`.

    Raises:
        ConfigError: Nothing would be gained.
    """
    page, asked = config.cache.page, config.scheduler.recomputed
    row = max(shape.rows, key=lambda one: one.token_bytes)
    values = row.kv_heads * (row.key_dim + row.value_dim)
    itemsize = row.token_bytes // values
    if shape.hidden >= values:
        raise ConfigError(
            "Inputs of attention are no fewer bytes than keys and values in this model",
            asked='scheduler.recompute = "hidden"',
            there=f"{shape.hidden * itemsize:,} bytes of an input, {row.token_bytes:,} of keys and values",
            change='Write scheduler.recompute = "off".',
        )
    share = hidden_share(values, shape.hidden, itemsize, flops_per_byte)
    if not isinstance(asked, str):
        share = asked
    tokens = max(1, round(share * page))
    # Keys and values of two parts, inputs side by side, and copies that a rotation makes of some keys.
    of_token = 2 * values + shape.hidden + row.kv_heads * row.key_dim
    rebuilt = REBUILT_TOKENS * itemsize * of_token
    return HiddenPrice(
        tokens=tokens,
        page_bytes=tuple(
            hidden_page_bytes(shape.hidden, tokens, one.token_bytes, itemsize, page)
            for one in shape.rows
        ),
        row_bytes=tuple(
            -(-shape.hidden // (one.key_dim + one.value_dim))
            * (one.key_dim + one.value_dim)
            * itemsize
            for one in shape.rows
        ),
        flops=2.0
        * shape.hidden
        * sum(one.kv_heads * (one.key_dim + one.value_dim) for one in shape.rows),
        workspace=rebuilt,
        angle_bytes=2 * row.key_dim * itemsize,
    )


def pass_bytes(shape: Shape, batch: int, rows: int, *, beside: bool) -> int:
    """Device bytes of a pass that gives logits of every row, which processors and samplers copy.

    Args:
        shape: Of the model.
        batch: Sequences.
        rows: Tokens of each; of more than one the keys and values are kept beside the cache.
        beside: Whether it runs on a stream of its own on a card.
    """
    per_row = shape.workspace_per_token + 8 * shape.vocabulary
    kept = _STREAM_WORKSPACE * beside + batch * rows * sum(shape.token_bytes)
    needed = shape.workspace + batch * (rows * per_row + 16 * shape.vocabulary)
    return needed + (kept if rows > 1 else 0)


def activation_bytes(hidden: int, inner: int, itemsize: int) -> int:
    """Bytes of activations per token of a forward pass: residuals and the MLP at its widest."""
    return int(itemsize * max(4 * hidden + 3 * inner, 14 * hidden))


def parts_bytes(heads: Sequence[tuple[int, int]], rows: Sequence[Row]) -> int:
    """Bytes per token of attention in parts: the float32 sum and one part beside the output, and the tokens as rows.

    Args:
        heads: Query heads and the head size of values, of each layer.
        rows: Of each layer.
    """
    widest = max((n * size for n, size in heads), default=0)
    return 8 * widest + max((row.token_bytes for row in rows), default=0)


def _decoded_rows(config: OffloadConfig, *, exact: bool) -> int:
    """Tokens of a sequence that a pass of decoding computes together, at most."""
    verified = config.mode == "verified" and not exact
    return Drafts.of(config.decode.draft).rows if verified else 1


def _whole_layers(config: OffloadConfig, shape: Shape) -> int:
    asked, there = config.replica.whole_layers, len(shape.rows)
    if asked > there:
        raise ConfigError(
            "replica.whole_layers is more than the layers that keep every token",
            asked=asked,
            there=there,
            change=f"Write at most {there}.",
        )
    return asked


def _rungs(config: OffloadConfig, shape: Shape, *, on_card: bool) -> tuple[RungPrice, ...]:
    """The rungs that the config allows, best first."""
    asked = config.replica.rung
    prices = []
    for rung in RUNGS:
        automatic = rung.faithful or config.mode == "verified"
        if asked != rung.name and not (asked == "auto" and automatic):
            continue
        price = _priced(rung, config, shape, on_card=on_card)
        prices.append(price)
        if any(price.row_bytes) and isinstance(config.retrieval.row_cache, str):
            # What is only faster must not cost a rung.
            without = replace(rung, caches=False)
            prices.append(_priced(without, config, shape, on_card=on_card))
    return tuple(prices)


def _priced(rung: Rung, config: OffloadConfig, shape: Shape, *, on_card: bool) -> RungPrice:
    tokens, rows = rung.selected(config.retrieval.tokens), shape.rows
    keeps = on_card and rung.caches and config.retrieval.index == "replica"
    slots = cached_rows(tokens, config.retrieval.row_cache) if keeps else 0
    return RungPrice(
        rung=rung,
        layer_bytes=tuple(rung.token_bytes(r.kv_heads, r.key_dim, r.value_dim) for r in rows),
        row_bytes=tuple(row_cache_bytes(slots, r.kv_heads, r.token_bytes) for r in rows),
    )


def ladder_rungs(config: OffloadConfig) -> tuple[Rung, ...]:
    """Rungs that single layers may have where it is measured what they cost, best first; none where that is not asked for.

    Each with as many exact tokens as any of them has by itself: layers whose steps attend to as many share their scratch, which
    is as large as some layers' replicas where a model is small.
    """
    if not config.replica.ladder or config.replica.rung != "auto" or not config.keeps_replica:
        return ()
    rungs = [rung for rung in RUNGS if rung.bits and not rung.clustered]
    if not isinstance(config.retrieval.tokens, str):
        return tuple(rungs)
    counts = sorted({rung.tokens for rung in rungs})
    return tuple(replace(rung, tokens=tokens) for rung in rungs for tokens in counts)


def _ladder(
    config: OffloadConfig,
    shape: Shape,
    errors: Mapping[Rung, Sequence[float]],
    *,
    on_card: bool,
) -> tuple[RungPrice, ...]:
    prices = []
    for rung in ladder_rungs(config):
        as_used = replace(rung, tokens=rung.selected(config.retrieval.tokens))
        price = replace(
            _priced(as_used, config, shape, on_card=on_card), errors=tuple(errors[rung])
        )
        prices.append(price)
        if any(price.row_bytes) and isinstance(config.retrieval.row_cache, str):
            none = (0,) * len(price.row_bytes)
            prices.append(replace(price, rung=replace(as_used, caches=False), row_bytes=none))
    return tuple(prices)
