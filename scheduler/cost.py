"""How long does it take? Times of a prefill, a step and a pass for a layout or a placement on a machine, engine by engine.

What runs on different engines overlaps: a sum is only taken over what one engine does. The constants are those of an
H100 SXM, from `benchmarks/decode.json` and `benchmarks/verified.json`; a test compares the two. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from offload.errors import InputError
from offload.scheduler.layout import MOST_REPEATS, REREAD_TOKENS, Layout
from offload.scheduler.pace import LENGTHS, MOST_ROWS, Drafts
from offload.scheduler.profiles import Profile

# Of a layer of a captured step, without what its bytes take: launches, gaps, small kernels.
_LAYER_S = 24e-6
# Further, where layers are not compiled: some twenty small kernels more (`benchmarks/cli_card.json`).
EAGER_S = 71e-6
# Where tokens are streamed, Python launches a layer's attention between two graphs in the first of these times, and asks for each
# piece of it beyond one, a graph of its own, in the second; where steps are not captured, a whole layer of an 8B Llama by
# transformers takes it the third, and a piece the last. It does so beside the card and the link. On the hosts of such an H100
# (`benchmarks/scheduler.json`), whose Python takes half as long again on one as on another.
_ATTENDING_LAYER_S = 0.2e-3
_REPLAYED_PIECE_S = 0.1e-3
_LAUNCHED_LAYER_S = 0.92e-3
_LAUNCHED_PIECE_S = 0.22e-3
# The device path of a layer besides its bytes: scan and selection until the tail is under way.
_PATH_S = 39e-6
_PATH_TOKEN_S = 3e-11  # for each token of the replica
# Of a layer that chooses its tokens anew, when blocks leave the window: launches of Python, which the card waits for. Of OPT-6.7B's shape
# with 64 sequences and pages of 16 tokens some 3 ms a token; without it 18.9 ms were predicted of 22.5 (the row `alisa: a fifth of the
# tokens` of `benchmarks/scheduler.json`). Of one shape and one host.
_SETTLED_LAYER_S = 1.5e-3
_ROW_S = 0.28e-6  # for each exact token beyond 64 per KV head
# Streaming every token reaches this share of the link.
_STREAM_SHARE = 0.94
# What both ways of the link reach together, of what one does: 80 of 53 GB/s on the H100.
_DUPLEX = 1.5
# Launching what one staged chunk needs, where chunks are small.
_CHUNK_S = 0.3e-3
_PASS_LAYER_S = (
    0.5e-3  # costs the draft beside it a layer of a pass, besides what it reads and computes
)
# Share of drafted tokens that are kept, by bits of the replica: measured at 4 bits (`benchmarks/verified.json`), for
# 3 and 2 the share of same best tokens (`benchmarks/fidelity.json`), below that a guess.
AGREEMENT = {4: 0.9987, 3: 0.998, 2: 0.989, 0: 0.9}
# Of a host path, from the 8B shape on an H100 with 16 cores, 256 tokens for each of 256 KV heads (`benchmarks/host.json`). With
# these `clusters` takes 30 ms a step at 131,072 tokens and 40 at 524,288, `flat` 71 at 131,072; measured 28 to 32, 40 and 72.
HAND_OFFS_S = 50e-6  # of a layer to the host and back
SEARCH_ROW_BYTES = (
    2900  # what could be read in order in the time that one row takes, which lies anywhere
)
LINK, PASSES, LAUNCHING, EVICTIONS = "PCIe", "passes", "launching", "evictions"


@dataclass(frozen=True, kw_only=True)  # no slots: a sum over layers is kept
class Work:
    """What a model computes, beside the bytes of its layout.

    Attributes:
        parameters: That a token is multiplied with.
        read_bytes: Bytes of them, as they lie in memory.
        heads: Query heads and head size of each layer that keeps every token.
        layers: Of all kinds.
    """

    parameters: float
    read_bytes: float
    heads: Sequence[tuple[int, int]]
    layers: int

    @cached_property
    def attention_flops(self) -> float:
        """Of one query and one key, in all layers."""
        return float(sum(4 * heads * size for heads, size in self.heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How tokens are made.

    Attributes:
        mode: fast, verified or exact.
        batch: Sequences.
        prompt: Tokens of each.
        selected: Tokens that a step attends to exactly per KV head; None: as the rung has it.
        drafts: How long drafts are; None: as is fastest.
        looks_ahead: Whether a draft goes on beside its pass.
        compiled: Whether the layers of a step are compiled.
        captured: Whether steps are captured, if they can be.
    """

    mode: str
    batch: int
    prompt: int
    selected: int | None = None
    drafts: Drafts | None = None
    looks_ahead: bool = True
    compiled: bool = True
    captured: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """What a plan expects.

    Attributes:
        prefill: Seconds until the first token.
        token: Seconds of a token.
        parts: Of these, by what they go into; `LINK` and `LAUNCHING` overlap with the others and with each other,
            `EVICTIONS` with none.
        limit: The part that is the largest.
    """

    prefill: float
    token: float
    parts: dict[str, float]
    limit: str


def times(
    layout: Layout, shape: Shape, profile: Profile, way: Way, *, tokens: int | None = None
) -> Times:
    """Times of a run.

    Args:
        layout: Of the run.
        shape: Of the model.
        profile: Of the machine.
        way: How tokens are made.
        tokens: Of a sequence, at the token that is timed; None: at the end.
    """
    first = prefill(layout, shape.work, profile, batch=way.batch, prompt=way.prompt)
    busy = step(layout, shape, profile, way, tokens=tokens)
    parts, device, token = dict(busy.device), busy.computes, busy.seconds
    if busy.link:
        parts[LINK] = busy.link
    if busy.launching:
        parts[LAUNCHING] = busy.launching
    if busy.between:
        parts[EVICTIONS] = busy.between
    if way.mode == "verified" and layout.rungs and way.batch == 1:
        token = verified(layout, shape.work, profile, way, step_s=device)
        parts[PASSES] = token - device
    largest = max(device, busy.link, busy.launching)
    limit = busy.limit if largest > device else max(parts, key=lambda part: parts[part])
    return Times(prefill=first, token=token, parts=parts, limit=limit)


def step(
    layout: Layout, shape: Shape, profile: Profile, way: Way, *, tokens: int | None = None
) -> Busy:
    """Prices a step of a run, as `placed` prices where its layout has the tokens.

    Args:
        layout: Of the run.
        shape: Of the model.
        profile: Of the machine.
        way: How tokens are made.
        tokens: Of a sequence, at that step; None: at the end.
    """
    return placed(placement_of(layout, shape, way, tokens=tokens), shape, profile)


def placement_of(layout: Layout, shape: Shape, way: Way, *, tokens: int | None = None) -> Placement:
    """From where a step of a layout gets the tokens that it attends to.

    A page that beams share is copied once. Tokens are counted by their bytes in all layers: those that some layers
    have on the device and others do not are part of a token in each place.

    Args:
        layout: Of the run.
        shape: Of the model.
        way: How tokens are made.
        tokens: Of a sequence, at that step; None: at the end.
    """
    batch, kv = way.batch, max(1, shape.kv_bytes)
    held, hidden = layout.device["sinks and window"] / kv, layout.hidden
    away = layout.host_tokens if tokens is None else layout.on_host(tokens, prompt=way.prompt)
    if (
        hidden is not None
    ):  # a row of the window has its input beside it, which attention does not read
        held *= kv / (kv + sum(hidden.row_bytes))
    if tokens is not None:
        held = min(held, float(batch * tokens))
    # Several sequences are not drafted: mode verified makes exact steps of them.
    streams = way.mode == "exact" or (way.mode == "verified" and batch > 1) or not layout.rungs
    where = Placement(
        sequences=batch,
        resident=held,
        read=layout.device["other KV"],
        compiled=way.compiled,
        pieces=0.0 if way.mode == "exact" or (streams and away) else None,
        captured=way.captured and not (way.mode == "verified" and batch > 1 and layout.rungs),
    )
    gone = layout.dropped_tokens if tokens is None else layout.dropped(tokens, prompt=way.prompt)
    if gone:  # read again in pieces, the sinks before them too
        gone += layout.sink_blocks * layout.page
        piece = batch * min(gone, REREAD_TOKENS) * shape.prefix_bytes
        where = replace(where, dropped=batch * gone, staging=max(1, piece))
    if not away:
        return where
    # A layout whose length is not known has no bytes on the host, only the rule by which they come there.
    grown = away / layout.host_tokens if layout.host_tokens else 0.0
    if streams:
        # What is left of the budget keeps rows of host tokens.
        host_bytes = grown * layout.host["pages"] if layout.host_tokens else batch * away * kv
        kept = layout.kept_share(away, sequences=batch, token_bytes=kv)
        copied = (1.0 - kept) * host_bytes
        resident = held + kept * batch * away
        if shape.layers:  # each that is staged, and those that are kept
            pieces = -(-copied // (len(shape.layers) * max(1, layout.staging_bytes)))
            where = replace(where, pieces=pieces + (kept > 0))
        if hidden is None:
            return replace(where, resident=resident, fetched=copied / kv)
        pages = copied / sum(hidden.page_bytes)
        rebuilt, fetched = pages * hidden.tokens, pages * (layout.page - hidden.tokens)
        # A layer whose inputs are no fewer bytes keeps them all the same.
        more = copied - fetched * kv - rebuilt * shape.input_bytes
        return replace(where, resident=resident, fetched=fetched, rebuilt=rebuilt, bytes_in=more)
    rung = layout.rung
    assert rung is not None
    if rung.share:
        at = layout.last_tokens if tokens is None else tokens
        chosen = min(layout.sparse(rung.share).chosen(at), rung.near + rung.far)
        own = [one for layer, one in enumerate(layout.rungs) if layer not in layout.whole]
        near = sum(min(chosen, one.near) for one in own) / max(1, len(own))
        return replace(
            where,
            resident=held + batch * near,
            fetched=batch * (chosen - near),
            scored=batch * chosen,
            choosing=len(own),
            settled=len(own) / layout.page,
        )
    return replace(
        where,
        replica=layout.device["replica"] * away / max(1, layout.replica_tokens),
        scored=batch * away,
        choosing=len(layout.rungs) - len(layout.whole),
        selected=batch * max(0, (rung.tokens if way.selected is None else way.selected) - 64),
        searched=layout.searched_bytes * away / max(1, layout.replica_tokens),
        searched_rows=layout.searched_rows
        * (rung.tokens if way.selected is None else way.selected),
    )


def hidden_share(values: int, inputs: int, itemsize: int, flops_per_byte: float | None) -> float:
    """Share of tokens to rebuild, so that copies and matrix products of a layer end together.

    Of share x a token takes x inputs + (1 - x) values from the host, times the bytes of one, and 2 x inputs values
    operations. Both take as long at x = values / (values - inputs + 2 inputs values / (flops per byte itemsize)).

    Args:
        values: Of a token's keys and values.
        inputs: Of its input.
        itemsize: Bytes of a value.
        flops_per_byte: Operations while PCIe brings a byte; None where nobody knows: then all of them.
    """
    if inputs >= values:
        return 0.0
    if flops_per_byte is None:
        return 1.0
    products = 2.0 * inputs * values / (flops_per_byte * itemsize)
    return min(1.0, values / (values - inputs + products))


def prefill(layout: Layout, work: Work, profile: Profile, *, batch: int, prompt: int) -> float:
    """Seconds of reading a prompt in chunks: products and attention, beside the pages that every chunk streams."""
    chunks = -(-prompt // layout.chunk)
    # On the host at chunk i: what came before, less what the device holds.
    held = max(1, prompt - layout.host_tokens)
    steps = max(0, prompt - held) / layout.chunk
    copied = layout.host["pages"] * steps / 2
    launches = copied / max(1, layout.staging_bytes) * _CHUNK_S
    computes = reading(work, profile, sequences=batch, tokens=prompt * batch, passes=chunks)
    if layout.dropped_tokens:  # by every chunk that comes behind, half of the end's on average
        tokens = batch * (layout.dropped_tokens + layout.sink_blocks * layout.page)
        again = layout.dropped_tokens / layout.chunk / 2
        pieces = -(-tokens // (batch * REREAD_TOKENS))
        computes += again * reading(work, profile, sequences=batch, tokens=tokens, passes=pieces)
    return max(computes, copied / profile.pcie + launches)


def reading(work: Work, profile: Profile, *, sequences: int, tokens: float, passes: float) -> float:
    """Seconds in which a model reads the tokens of a prompt; copies are not among them.

    max(2 · parameters · tokens / GEMM rate, passes · weight bytes / memory rate)
    + attention FLOP of a query and a key · tokens² / (2 · sequences) / attention rate.

    Args:
        work: Of the model.
        profile: Of the machine.
        sequences: That the tokens are of, in equal parts.
        tokens: Of all sequences together.
        passes: How often the weights are read.
    """
    products = 2.0 * work.parameters * tokens / profile.gemm_flops
    weights = passes * work.read_bytes / profile.bytes_per_s
    attention = work.attention_flops * tokens**2 / 2 / max(1, sequences) / profile.attention_flops
    return max(products, weights) + attention


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer that keeps every token.

    Attributes:
        queries: Query heads.
        kv: KV heads.
        size: Of a head of the keys, in channels.
        values: Of a head of the values; None: as large.
    """

    queries: int
    kv: int
    size: int
    values: int | None = None

    @property
    def token_values(self) -> int:
        """Numbers of a token's keys and values."""
        return self.kv * (self.size + self.value_size)

    @property
    def value_size(self) -> int:
        """Of a head of the values, in channels."""
        return self.size if self.values is None else self.values


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, as its tokens can be kept: as keys and values, or as the inputs of its layers.

    Attributes:
        layers: Those that keep every token; a model that has none is priced too.
        hidden: Channels of a layer's input.
        itemsize: Bytes of a number.
        parameters: That a token is multiplied with.
        weights: Bytes of all of them on the device.
        reads: Bytes of them that a step reads, in the mean; None: all.
        depth: Layers of all kinds; None: there are no others.
    """

    layers: tuple[Heads, ...]
    hidden: int
    itemsize: int
    parameters: float
    weights: int
    reads: float | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no model has."""
        sizes = (self.hidden, self.itemsize, self.parameters, self.weights)
        heads = [n for x in self.layers for n in (x.queries, x.kv, x.size, x.value_size)]
        if not all(size > 0 for size in (*sizes, *heads)):
            raise InputError(
                "A model's shape has a size that is not above zero",
                asked=(*sizes, *heads),
                change="Give layers with heads, hidden, itemsize, parameters and weights.",
            )

    @cached_property
    def work(self) -> Work:
        """What it computes."""
        return Work(
            parameters=self.parameters,
            read_bytes=self.weights if self.reads is None else self.reads,
            heads=[(layer.queries, layer.value_size) for layer in self.layers],
            layers=len(self.layers) if self.depth is None else self.depth,
        )

    @cached_property
    def kv_bytes(self) -> int:
        """Of a token in all layers, as K and V: Σ kv heads · (key size + value size) · itemsize."""
        return sum(self._layer_kv)

    @cached_property
    def input_bytes(self) -> int:
        """Of a token in all layers, as inputs where these are smaller: Σ min(hidden · itemsize, K and V)."""
        return sum(min(self.hidden * self.itemsize, kv) for kv in self._layer_kv)

    @cached_property
    def rebuild_flops(self) -> float:
        """Of K and V of a token from inputs: Σ 2 · hidden · kv heads · (key size + value size), where these are smaller."""
        smaller = [kv for kv in self._layer_kv if self.hidden * self.itemsize < kv]
        return sum(2.0 * self.hidden * kv / self.itemsize for kv in smaller)

    @property
    def rebuilds(self) -> bool:
        """Whether inputs are smaller than K and V in any layer: not with four or more query heads to a KV head."""
        return self.rebuild_flops > 0

    @cached_property
    def prefix_bytes(self) -> int:
        """Of a token that is read again, while it is: a layer's input, and its K and V."""
        return self.hidden * self.itemsize + max(self._layer_kv, default=0)

    @cached_property
    def _layer_kv(self) -> tuple[int, ...]:
        return tuple(layer.token_values * self.itemsize for layer in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """From where a step gets the tokens that it attends to: tokens of all sequences together.

    Attributes:
        sequences: That are decoded.
        resident: Whose K and V are on the device.
        fetched: Whose K and V are copied from the host.
        rebuilt: Whose layer inputs are copied from the host, and multiplied to K and V.
        dropped: The oldest ones, read again from their ids.
        scored: Among which the step first chooses; 0 where it attends to all.
        choosing: Layers that choose; None: all that keep every token.
        selected: Tokens per KV head beyond 64 that a layer then reads exactly, of all sequences together.
        settled: Layers that choose anew in a step, on average: those whose blocks leave the window.
        searched: Bytes of indexes that the host reads to find what is read exactly; 0 where the device does.
        searched_rows: Rows that it then reads.
        replica: Bytes of the replica that scores are of.
        read: Further bytes on the device: states, and windows of other layers.
        bytes_in: Further bytes that are copied to the device.
        bytes_out: Bytes that are copied to the host.
        staging: Bytes in which the dropped ones are read again, a group of sequences at a time.
        link_share: Of the link's rate that copies reach, if it is not that of pinned memory.
        compiled: Whether the layers of a step are compiled.
        pieces: In which Python lets a layer attend, beyond the one of what never left the device; None where it has no hand in it.
        captured: Whether graphs hold what lies between.
    """

    sequences: int
    resident: float
    fetched: float = 0
    rebuilt: float = 0
    dropped: float = 0
    scored: float = 0
    choosing: int | None = None
    selected: int = 0
    settled: float = 0
    searched: float = 0
    searched_rows: float = 0
    replica: float = 0
    read: float = 0
    bytes_in: float = 0
    bytes_out: float = 0
    staging: int = 1
    link_share: float = _STREAM_SHARE
    compiled: bool = True
    pieces: float | None = None
    captured: bool = True


@dataclass(frozen=True, slots=True)
class Busy:
    """For how long each engine works on a step.

    Attributes:
        device: Seconds of the card, by what they go into.
        link: Seconds of PCIe.
        bytes_in: That are copied to the device.
        bytes_out: That are copied to the host.
        launching: Seconds of Python, where it launches attention or all of a step.
        between: Seconds in which Python settles what moves between two steps, and everything waits.
    """

    device: dict[str, float]
    link: float
    bytes_in: float
    bytes_out: float
    launching: float = 0.0
    between: float = 0.0

    @property
    def computes(self) -> float:
        """Seconds of the card."""
        return sum(self.device.values())

    @property
    def seconds(self) -> float:
        """Of the step: the engines overlap."""
        return max(self.computes, self.link, self.launching) + self.between

    @property
    def limit(self) -> str:
        """What takes longest."""
        if self.launching > max(self.computes, self.link):
            return LAUNCHING
        if self.link >= self.computes:
            return LINK
        return max(self.device, key=lambda part: self.device[part])


def placed(where: Placement, shape: Shape, profile: Profile) -> Busy:
    """Prices a step of a placement, in seconds. Planner, runtime and simulator have no other prices.

    Of the card, which add up:
    weights    max(weight bytes / memory rate, 2 · parameters · sequences / GEMM rate)
    launches   layers · 24 µs; 95 µs where they are not compiled
    attention  bytes of all K and V, read once, and of what was not resident written before, and of other layers' K, V and
               states / memory rate
    rebuild    tokens · 2 · hidden · (2 · kv heads · head size) over layers / GEMM rate; inputs written and read
    prefix     `reading` of the dropped tokens; the weights once for each group of sequences that staging holds
    selection  layers that choose · (39 µs + 0.03 ns · tokens scored + 0.28 µs · tokens read exactly beyond 64)
    replica    its bytes / memory rate
    search     layers that choose · 58 µs for a hand-off each way + bytes / (host's memory rate · 0.5): the device waits. The
               half is what is aimed at and has not been measured beside a card

    Of Python, where it has a hand in a step: layers · 0.2 ms + layers that keep every token · pieces · 0.1 ms; 0.92 and 0.22 where
    it is not captured, 0.22 for pieces beyond 512 too.
    Between steps, beside nothing: layers that choose anew, on average · 1.5 ms.
    Of the link: bytes / (PCIe rate · share reached), the larger of both ways, or their sum over 1.5.

    Args:
        where: The tokens are.
        shape: Of the model.
        profile: Of the machine.
    """
    rate, work = profile.bytes_per_s, shape.work
    made = where.fetched + where.rebuilt + where.dropped
    device = {
        "weights": _weights_s(work, profile, where.sequences),
        "launches": _launches_s(work, compiled=where.compiled),
        "attention": ((where.resident + 2 * made) * shape.kv_bytes + where.read) / rate,
    }
    if where.rebuilt:
        products = where.rebuilt * shape.rebuild_flops / profile.gemm_flops
        device["rebuild"] = products + 2 * where.rebuilt * shape.input_bytes / rate
    if where.dropped:
        groups = where.dropped * shape.prefix_bytes / where.staging
        device["prefix"] = reading(
            work, profile, sequences=where.sequences, tokens=where.dropped, passes=groups
        )
    if where.scored:
        layers = len(shape.layers) if where.choosing is None else where.choosing
        a_layer = _PATH_S + where.scored * _PATH_TOKEN_S + where.selected * _ROW_S
        if where.searched:  # the card then scores only what is not found
            a_layer = _PATH_S + where.scored * _PATH_TOKEN_S
            reads = where.searched + where.searched_rows * SEARCH_ROW_BYTES
            device["search"] = layers * HAND_OFFS_S + reads / profile.host_bytes_per_s
        device["selection"] = layers * a_layer
    if where.replica:
        device["replica"] = where.replica / rate
    come = where.fetched * shape.kv_bytes + where.rebuilt * shape.input_bytes + where.bytes_in
    link = copying(come, where.bytes_out, profile, share=where.link_share)
    launching = 0.0
    if where.pieces is not None:
        pieces = len(shape.layers) * where.pieces
        if where.captured:
            replayed = min(pieces, MOST_REPEATS)
            launching = work.layers * _ATTENDING_LAYER_S + replayed * _REPLAYED_PIECE_S
            launching += (pieces - replayed) * _LAUNCHED_PIECE_S
        else:
            launching = work.layers * _LAUNCHED_LAYER_S + pieces * _LAUNCHED_PIECE_S
    between = where.settled * _SETTLED_LAYER_S
    return Busy(device, link, come, where.bytes_out, launching, between)


def copying(
    bytes_in: float, bytes_out: float, profile: Profile, *, share: float = _STREAM_SHARE
) -> float:
    """Seconds of the link: max(in, out, (in + out) / 1.5) / (PCIe rate · share reached)."""
    largest = max(bytes_in, bytes_out, (bytes_in + bytes_out) / _DUPLEX)
    return largest / profile.pcie / share


def _weights_s(work: Work, profile: Profile, batch: int) -> float:
    """Seconds of a step's products: of reading the weights, or of multiplying with them."""
    products = 2 * work.parameters * batch / profile.gemm_flops
    return max(work.read_bytes / profile.bytes_per_s, products)


def _launches_s(work: Work, *, compiled: bool) -> float:
    """Seconds of a step's launches and gaps."""
    return work.layers * (_LAYER_S + (0.0 if compiled else EAGER_S))


def pass_flops(work: Work, tokens: int, rows: int) -> float:
    """Floating-point operations of an exact pass of so many rows."""
    return rows * (2.0 * work.parameters + work.attention_flops * tokens)


def slowed(work: Work, profile: Profile, *, tokens: int, copied: float) -> float:
    """Seconds by which a pass makes the draft beside it later: what it computes, reads and launches."""
    computes = pass_flops(work, tokens, MOST_ROWS) / profile.attention_flops
    return slowed_by(computes, copied, profile.bytes_per_s, len(work.heads))


def slowed_by(computes_s: float, copied: float, bytes_per_s: float, layers: int) -> float:
    """As `slowed`, by what a pass takes of the card.

    Args:
        computes_s: Seconds of its matrix products.
        copied: Bytes that it streams: written to the card's memory, and read there.
        bytes_per_s: Of that memory.
        layers: Of the model.
    """
    return computes_s + 2 * copied / bytes_per_s + layers * _PASS_LAYER_S


def verified(layout: Layout, work: Work, profile: Profile, way: Way, *, step_s: float) -> float:
    """Seconds of a verified token, with drafts as long as is fastest, or as asked."""
    return min(by_draft(layout, work, profile, way, step_s=step_s).values())


def by_draft(
    layout: Layout, work: Work, profile: Profile, way: Way, *, step_s: float
) -> dict[int, float]:
    """Seconds of a verified token by the tokens of a draft: of the lengths there are, or of the one that is asked for.

    Args:
        layout: Of the run.
        work: Of the model.
        profile: Of the machine.
        way: How tokens are made.
        step_s: Seconds of a step of mode fast.
    """
    copied = float(layout.host["pages"])
    computes = pass_flops(work, way.prompt, MOST_ROWS) / profile.attention_flops
    taken = max(copied / profile.pcie, computes)
    late = slowed(work, profile, tokens=way.prompt, copied=copied)
    rung = layout.rung
    agreement = AGREEMENT[0 if rung is None or rung.clustered else rung.bits]
    drafts = way.drafts or Drafts(MOST_ROWS - 1, True)
    lengths = [n for n in LENGTHS if 0 < n <= drafts.most] if drafts.is_auto else []
    return {
        n: verified_token(
            step_s, taken, late, drafts=n, agreement=agreement, looks_ahead=way.looks_ahead
        )
        for n in lengths or [drafts.most]
    }


def verified_token(
    step_s: float,
    pass_s: float,
    slowed_s: float,
    *,
    drafts: float,
    agreement: float,
    looks_ahead: bool = True,
) -> float:
    """Seconds of a verified token.

    Where all tokens of a draft agree, the next one is drafted beside the pass; where one does not, the pass is waited
    for, and what was drafted beside it is lost.

    Args:
        step_s: Of a step of mode fast.
        pass_s: Of a pass: of its copies, or of what it computes where that is longer.
        slowed_s: By which the draft beside it comes later.
        drafts: Tokens drafted before a pass.
        agreement: Share of drafted tokens that are kept.
        looks_ahead: Whether the draft goes on beside the pass.
    """
    agreement, drafted = min(agreement, 1 - 1e-9), drafts + 1
    tokens = (1 - agreement**drafted) / (1 - agreement)
    waits = drafts * step_s + pass_s
    if not looks_ahead:
        return float(waits / tokens)
    all_agree = agreement**drafted
    goes_on = max(drafted * step_s, pass_s) + slowed_s
    return float((all_agree * goes_on + (1 - all_agree) * (waits + slowed_s)) / tokens)
