"""Where does every byte of a run go, and how many tokens stay on the device? One function prices a layout.

The planner and the runtime both call `lay_out`; there is no second implementation that could drift. All plain
numbers: bytes are ints, tokens are ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from offload.errors import BudgetError
from offload.scheduler.ladder import Option, climb, total
from offload.scheduler.rungs import Rung
from offload.scheduler.window import SparseWindow

# Two staging buffers hide the copies behind attention once a copy outlasts the launches of a layer. On an
# H100 (PCIe 5) 16 MiB copies already run at the full 53 GB/s; 128 MiB (2.5 ms) outlast an eager layer (1-2 ms).
STAGING_BYTES = 128 * 2**20
# What is spent on a buffer before layers beside a replica are lifted. A prefill of 262,144 tokens streams every page
# once a chunk: on that H100 it took 79 s with buffers of 13.5 MiB, 98 s with 9.75, 267 s with 4, and 60 s without any.
USEFUL_STAGING_BYTES = 32 * 2**20
SMALLEST_CHUNK = 128  # tokens; below this a prefill is bound by reading the weights
AUTO_CHUNK = 4096
# `auto` keeps at least this many blocks in the window; fewer and nearly every token is evicted as it comes.
LEAST_WINDOW_BLOCKS = 4
# The window beside a replica; half of it leaves at a time, so at least 256 tokens are there, which is what fidelity was
# measured with. It is read in full precision: each further token takes as long as four of the replica.
REPLICA_WINDOW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class RungPrice:
    """A rung of the ladder for one model.

    Attributes:
        rung: Of `offload.scheduler.rungs`.
        layer_bytes: Device bytes of one token of one sequence, for each offloaded layer.
        row_bytes: Device bytes of one sequence for cached rows, likewise.
        errors: What each layer's replica costs in fidelity; empty where nobody knows.
    """

    rung: Rung
    layer_bytes: tuple[int, ...]
    row_bytes: tuple[int, ...]
    errors: tuple[float, ...] = ()

    @property
    def token_bytes(self) -> int:
        """Of all layers together."""
        return sum(self.layer_bytes)


REREAD_TOKENS = 512  # of each sequence, that go through a layer together where they are read again
# Pieces of a step's attention that are graphs of their own, which take the driver some 40 KB each: 20 MB, within what the plan leaves to
# it. 16 pieces of each of 32 layers; what comes beyond is launched anew.
MOST_REPEATS = 512
REBUILT_TOKENS = 8192  # of all sequences, whose keys and values are rebuilt together


def hidden_page_bytes(width: int, tokens: int, token_bytes: int, itemsize: int, page: int) -> int:
    """Bytes of a page whose first tokens are kept as inputs.

    Args:
        width: Values of an input.
        tokens: Kept so.
        token_bytes: Of the keys and values of one token.
        itemsize: Bytes of a value.
        page: Tokens of the page.
    """
    return tokens * width * itemsize + (page - tokens) * token_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenPrice:
    """Pages that hold the inputs of attention instead of the keys and values of some tokens.

    Attributes:
        tokens: Of a block that are held so, its first ones.
        page_bytes: Of a page of each layer.
        row_bytes: Of a token's input beside its row in the window, for each layer.
        flops: Operations that rebuild the keys and values of one token in all layers.
        workspace: Device bytes of what is rebuilt together.
        angle_bytes: Device bytes of a token's cosines and sines.
    """

    tokens: int
    page_bytes: tuple[int, ...]
    row_bytes: tuple[int, ...]
    flops: float
    workspace: int
    angle_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a run asks for.

    Attributes:
        batch: Sequences that are decoded.
        copies: How many of them continue one prompt (beams, returned sequences).
        prompt: Tokens per sequence of that prompt; the copies share its host pages.
        tokens: Tokens per sequence at the end (prompt and answer), or None if unknown.
        page: Tokens of a block.
        sinks: Tokens that never leave the device.
        window: Further tokens on the device, or None for as many as fit.
        chunk: Prompt tokens computed together, or None for 4,096, less where the budget asks.
        staging: Bytes of one staging buffer, or None for a size from the budget.
        token_bytes: Bytes of one token of one sequence, for each offloaded layer.
        weights: Device bytes held already (weights, buffers, other tensors).
        overhead: Device bytes that are nobody's tensors: driver context, allocator slack.
        workspace: Device bytes of activations that do not depend on the chunk.
        workspace_per_token: Further device bytes per token of the chunk and sequence.
        least_workspace: Device bytes of activations at least, however small the chunk: of passes while decoding.
        step_workspace: Of the activations, device bytes that a step of decoding needs, where host pages are kept in the place of
            the others; None where none are.
        other_kv: Device bytes of the layers that are not offloaded.
        rungs: Replicas that may be kept of offloaded tokens, best first; none for exact mode.
        ladder: Rungs that single layers may have, with what that costs each; none where nobody knows. Only where
            `tokens` is known.
        whole_layers: Layers that keep all their tokens on the device beside replicas of the others, the first and the
            last ones first. Only where `tokens` is known.
        whole: Which these are, where that is known.
        streams: Whether to stream every token where no rung fits; else that is an error.
        scratch_bytes: Device bytes of a decode step on the device path, per sequence.
        scratch_token_bytes: Further ones, per token and sequence.
        longest: Tokens to make room for where `tokens` is not known.
        rung_window: Tokens of the window beside a rung, where none is given.
        index_bytes: Host bytes of one token of one sequence in the indexes of all layers; 0 where there are none.
        searched_bytes: Of these, what a step reads.
        searched_rows: Rows of keys or values that a step reads in all layers, for each token that it attends to.
        hidden: Of pages that hold inputs of attention; None where they hold keys and values. Only where `tokens` is
            known, and without rungs.
        prefix_token_bytes: Device bytes of a token while it is read again, where the oldest may be dropped when the host is
            full; 0 where they may not. Only where `tokens` is known, without rungs and copies.
        prefix_workspace: Device bytes of activations of one sequence besides.
    """

    batch: int
    copies: int = 1
    prompt: int = 0
    tokens: int | None
    page: int
    sinks: int
    window: int | None
    chunk: int | None
    staging: int | None
    token_bytes: tuple[int, ...]
    weights: int
    overhead: int
    workspace: int
    workspace_per_token: int
    least_workspace: int = 0
    step_workspace: int | None = None
    other_kv: int = 0
    rungs: tuple[RungPrice, ...] = ()
    ladder: tuple[RungPrice, ...] = ()
    whole_layers: int = 0
    whole: frozenset[int] | None = None
    streams: bool = True
    scratch_bytes: int = 0
    scratch_token_bytes: int = 0
    longest: int = 0
    rung_window: int = REPLICA_WINDOW
    hidden: HiddenPrice | None = None
    index_bytes: int = 0
    searched_bytes: int = 0
    searched_rows: int = 0
    prefix_token_bytes: int = 0
    prefix_workspace: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a demand is met.

    Attributes:
        chunk: Prompt tokens computed together.
        sink_blocks: Blocks that never leave the device.
        window_blocks: Further blocks on the device.
        host_tokens: Tokens per sequence that will be on the host, where the length is known.
        staging_bytes: Of one of the two staging buffers.
        eviction_bytes: Of one of the two eviction buffers.
        device: Device bytes by purpose.
        host: Host bytes by purpose.
        rungs: What the replica of each offloaded layer is; empty without one.
        replica_tokens: Tokens per sequence that it has room for.
        searched_bytes: Host bytes that a step then reads to find what it attends to exactly; 0 where the device does.
        searched_rows: Rows that it reads beside them for each token that it attends to, of all sequences.
        whole: Layers that keep all their tokens on the device; they have no replica.
        page: Tokens of a block.
        hidden: What pages hold instead of keys and values; None where they hold these.
        resident_share: Of the host's tokens, those of which the device keeps rebuilt rows while it decodes.
        idle_bytes: Of the activations, device bytes that only prefill needs: while decoding, host pages are kept there.
        host_blocks: Blocks of a sequence that the host holds at most, where older ones are then dropped and read again
            from their ids; None: it holds all that leave the device.
        dropped_tokens: Tokens per sequence that are nowhere at the end, where the length is known.
    """

    chunk: int
    sink_blocks: int
    window_blocks: int
    host_tokens: int
    staging_bytes: int
    eviction_bytes: int
    device: dict[str, int]
    host: dict[str, int]
    rungs: tuple[Rung, ...] = ()
    replica_tokens: int = 0
    searched_bytes: int = 0
    searched_rows: int = 0
    whole: frozenset[int] = frozenset()
    page: int = 1
    hidden: HiddenPrice | None = None
    resident_share: float = 0.0
    idle_bytes: int = 0
    host_blocks: int | None = None
    dropped_tokens: int = 0

    @property
    def rung(self) -> Rung | None:
        """The lowest rung among the layers, or None without a replica."""
        return min(self.rungs, key=lambda rung: rung.rank, default=None)

    @property
    def lifted_layers(self) -> int:
        """Layers whose replica is a better one."""
        pairs = enumerate(self.rungs)
        least = None if self.rung is None else self.rung.rank
        return sum(rung.rank != least for layer, rung in pairs if layer not in self.whole)

    @property
    def most_on_device(self) -> int:
        """Tokens of a sequence up to which none has left the device: with one more the oldest block outside the sinks does."""
        return (self.sink_blocks + self.window_blocks + 1) * self.page - 1

    def on_host(self, tokens: int, *, prompt: int = 0) -> int:
        """Tokens of a sequence that are on the host: whole blocks, the newest of those that left the device."""
        left = self.left(tokens, prompt=prompt)
        return left if self.host_blocks is None else min(left, self.host_blocks * self.page)

    def dropped(self, tokens: int, *, prompt: int = 0) -> int:
        """Tokens of a sequence that are nowhere, and are read again from their ids: the oldest behind the sinks."""
        return self.left(tokens, prompt=prompt) - self.on_host(tokens, prompt=prompt)

    def left(self, tokens: int, *, prompt: int = 0) -> int:
        """Tokens of a sequence that have left the device: whole blocks, the oldest behind the sinks.

        A block leaves when one more is whole than the window holds. Beside a replica half of the window leaves at once,
        but while a prompt is read.

        Args:
            tokens: That it has.
            prompt: Of these, tokens of the prompt.
        """
        blocks = tokens // self.page - self.sink_blocks
        # The last token of a prompt is fed by the first step.
        read = max(0, min(tokens, prompt - 1)) // self.page - self.sink_blocks
        there = max(0, read - self.window_blocks)
        more = max(0, blocks - max(read, self.window_blocks))
        together = max(1, self.window_blocks // 2) if self.rungs else 1
        return (there + -(-more // together) * together) * self.page

    def kept_share(self, away: float, *, sequences: int, token_bytes: float) -> float:
        """Of the tokens on the host, the share that the device keeps too while it decodes without a replica.

        Args:
            away: Tokens of a sequence on the host.
            sequences: That are decoded.
            token_bytes: Of a token's keys and values in all layers.
        """
        if not away or self.host_blocks is not None:  # what is read again needs that memory
            return 0.0
        column = sequences * self.page * token_bytes
        kept = (self.idle_bytes + self.resident_share * away * sequences * token_bytes) // column
        return min(1.0, max(self.resident_share, kept * self.page / away))

    def sparse(self, share: float) -> SparseWindow:
        """Which tokens a step attends to, where that is a share of all."""
        return SparseWindow(share, (self.sink_blocks + self.window_blocks + 1) * self.page)

    @property
    def last_tokens(self) -> int:
        """Tokens of a sequence at the end, where the length is known and some are on the host: to a page."""
        stays = self.window_blocks - self.window_blocks // 2 if self.rungs else self.window_blocks
        return self.host_tokens + (self.sink_blocks + stays) * self.page

    @property
    def device_bytes(self) -> int:
        """All device bytes."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All host bytes."""
        return sum(self.host.values())


def lay_out(demand: Demand, *, device_budget: int, host_budget: int) -> Layout:
    """Divides a run between the tiers so that both budgets hold.

    Everything stays on the device if it fits. Otherwise the window takes what weights, workspace and buffers
    leave; the chunk (where it is free) shrinks until a window of at least four blocks fits. So a little more budget
    can mean a larger chunk and a smaller window: a prefill in small chunks reads the weights and the host pages more
    often than the window saves.

    With rungs, what does not fit the device gets a replica there: the best rung that fits beside a small window, at
    any chunk. What then is left lifts single layers to the next rung, the first and the last ones first, which low bits
    hurt most. With a ladder that choice is made anew: each layer gets the rung that costs least fidelity for the bytes
    there are. If no rung fits, every token is streamed, or it is an error.

    Args:
        demand: What is asked.
        device_budget: Bytes, weights included.
        host_budget: Bytes for pages.

    Returns:
        The layout.

    Raises:
        BudgetError: It does not fit; says how much the smallest layout needs.
    """
    errors, roomiest = [], None
    ladder = [*((price,) for price in demand.rungs), *([()] if _may_stream(demand) else [])]
    for step, rungs in enumerate(ladder):
        chunks = [demand.chunk] if demand.chunk is not None else _chunks(demand)
        for chunk in chunks:
            try:
                layout = _device_layout(replace(demand, chunk=chunk, rungs=rungs), device_budget)
            except BudgetError as error:
                errors.append(error)
                continue
            if layout.host_bytes > host_budget:
                dropping = _dropping(replace(demand, chunk=chunk), device_budget, host_budget)
                if dropping is not None:
                    return dropping
                raise BudgetError(
                    f"The KV cache of {demand.batch} x {demand.tokens:,} tokens in host memory",
                    requested=layout.host_bytes,
                    available=host_budget,
                    setting="memory.cpu",
                    change="Shorten the prompt, lower max_new_tokens or raise memory.cpu.",
                )
            if layout.rungs and demand.tokens is None and layout.replica_tokens < demand.longest:
                # The length is not known: what has the most room, if none has room for the longest.
                if layout.replica_tokens > (roomiest.replica_tokens if roomiest else 0):
                    roomiest = layout
                continue
            if roomiest is not None:
                return roomiest
            better = demand.rungs[:step][::-1]
            if layout.rungs and demand.ladder:
                climbed = _climbed(layout, demand, device_budget)
                if climbed is not None:
                    return climbed
            return _lifted(layout, demand, rungs, better, device_budget)
    if roomiest is not None:
        return roomiest
    raise min(errors, key=lambda error: error.requested)


def _dropping(demand: Demand, budget: int, host_budget: int) -> Layout | None:
    """Drops the oldest tokens that the host has no room for; None where that is not asked for, or does not fit.

    Reading them again takes memory of the device, so that the window is smaller and more leave it: enlarged until it is
    enough.

    Args:
        demand: With a chunk.
        budget: Device bytes.
        host_budget: Bytes for pages.
    """
    host_blocks = host_budget // max(1, _block_bytes(demand))
    if not demand.prefix_token_bytes or demand.rungs or demand.hidden or host_blocks < 1:
        return None
    reserved = 0
    while reserved <= budget:
        try:
            layout = _device_layout(replace(demand, overhead=demand.overhead + reserved), budget)
        except BudgetError:
            return None
        dropped = max(0, layout.host_tokens - host_blocks * demand.page)
        again = dropped + layout.sink_blocks * demand.page if dropped else 0
        needed = demand.batch * again * demand.prefix_token_bytes
        needed += demand.batch * demand.prefix_workspace if dropped else 0
        if needed <= reserved:
            there = layout.host_tokens - dropped
            own = {"overhead": demand.overhead, "reading again": reserved}
            return replace(
                layout,
                device=layout.device | own,
                host={"pages": there // demand.page * _block_bytes(demand)},
                host_tokens=there,
                host_blocks=host_blocks,
                dropped_tokens=dropped,
            )
        reserved = needed
    return None


def _lifted(
    layout: Layout,
    demand: Demand,
    rungs: tuple[RungPrice, ...],
    better: tuple[RungPrice, ...],
    budget: int,
) -> Layout:
    """Spends what a layout leaves of the budget on better rungs for single layers.

    Args:
        layout: With one rung for all layers, or none.
        demand: What was asked.
        rungs: The one rung, or none.
        better: Those above it, the nearest first.
        budget: Device bytes.
    """
    if not layout.rungs or not better or demand.tokens is None:
        return layout
    now = [rungs[0]] * len(layout.rungs)
    tokens, scratch = demand.batch * layout.replica_tokens, _scratch(layout, demand)
    spare, sets = budget - layout.device_bytes, {rungs[0].rung.scratch}
    for price in better:
        for layer in _ends_first(len(now)):
            if layer in layout.whole:
                continue
            more = tokens * (price.layer_bytes[layer] - now[layer].layer_bytes[layer])
            more += demand.batch * (price.row_bytes[layer] - now[layer].row_bytes[layer])
            if price.rung.scratch not in sets:  # layers whose steps write other parts share none
                more += scratch
            if more <= spare:
                spare -= more
                sets.add(price.rung.scratch)
                now[layer] = price
    return _with_rungs(layout, demand, now)


def _climbed(layout: Layout, demand: Demand, budget: int) -> Layout | None:
    """Gives each layer the rung that costs least fidelity for the bytes there are; None where that cannot be.

    Above all rungs a layer can keep its tokens as they are, which costs none. Rows are cached, which is only faster, where what is
    left then allows it.

    Args:
        layout: With one rung for all layers.
        demand: What was asked, with a ladder.
        budget: Device bytes.
    """
    if demand.tokens is None:
        return None
    tokens, scratch = demand.batch * layout.replica_tokens, _scratch(layout, demand)
    own = ("replica", "cached rows", "decode step")
    room = budget - layout.device_bytes + sum(layout.device[part] for part in own)
    layers = [layer for layer in range(len(layout.rungs)) if layer not in layout.whole]
    # Tokens of a layer without a replica beyond those of the window.
    page = demand.page
    on_device = (layout.sink_blocks + layout.window_blocks) * page
    beside = demand.batch * max(0, -(-demand.tokens // page) * page - on_device)
    best: tuple[float, list[RungPrice | None]] | None = None
    # Layers whose steps write other parts share no scratch: fewer kinds of rungs leave more for replicas.
    plain = [price for price in demand.ladder if not price.rung.caches]
    costly = {price.rung.scratch for price in plain}  # those that need not cache rows
    offered = plain + [price for price in demand.ladder if price.rung.caches and price.rung.scratch not in costly]  # fmt: skip
    kinds = sorted({price.rung.scratch for price in offered})
    for n in range(1, len(kinds) + 1):
        for used in combinations(kinds, n):
            prices = [price for price in offered if price.rung.scratch in used]
            options = []
            for layer in layers:
                sizes = [
                    tokens * p.layer_bytes[layer] + demand.batch * p.row_bytes[layer]
                    for p in prices
                ]
                rungs = [
                    Option(size, p.errors[layer]) for size, p in zip(sizes, prices, strict=True)
                ]
                options.append([*rungs, Option(beside * demand.token_bytes[layer], 0.0)])
            chosen = climb(options, room - n * scratch)
            if chosen is None:
                continue
            error = total(options, chosen)
            if best is None or error < best[0]:
                picked: list[RungPrice | None] = [None] * len(layout.rungs)
                for layer, i in zip(layers, chosen, strict=True):
                    picked[layer] = prices[i] if i < len(prices) else None
                best = error, picked
    if best is None or all(price is None for price in best[1]):
        return None
    whole = frozenset(layer for layer, price in enumerate(best[1]) if price is None)
    # Of those the rung says nothing, but that it is no lower than the others'.
    highest = max((p for p in best[1] if p is not None), key=lambda price: price.rung.rank)
    demand = replace(demand, whole=whole, rungs=(highest,))
    again = _price(demand, layout.staging_bytes, layout.window_blocks, layout.chunk)
    now = [highest if price is None else price for price in best[1]]
    spare = budget - _with_rungs(again, demand, now).device_bytes
    return _with_rungs(again, demand, _caching(demand, now, spare))


def _caching(demand: Demand, now: Sequence[RungPrice], spare: int) -> list[RungPrice]:
    """The same rungs, with cached rows in the first layers for which some bytes suffice."""
    with_rows = {replace(price.rung, caches=False): price for price in demand.ladder if price.rung.caches}  # fmt: skip
    found = []
    for layer, price in enumerate(now):
        cached = with_rows.get(price.rung)
        if cached is not None and layer not in (demand.whole or ()):
            more = demand.batch * cached.row_bytes[layer]
            if more <= spare:
                price, spare = cached, spare - more
        found.append(price)
    return found


def _scratch(layout: Layout, demand: Demand) -> int:
    """Device bytes of the decode step of layers that share them."""
    tokens = demand.batch * layout.replica_tokens
    return demand.batch * demand.scratch_bytes + tokens * demand.scratch_token_bytes


def _with_rungs(layout: Layout, demand: Demand, now: Sequence[RungPrice]) -> Layout:
    """A layout with a rung for each layer."""
    tokens = demand.batch * layout.replica_tokens
    held = _outside(layout.whole, [price.layer_bytes[layer] for layer, price in enumerate(now)])
    rows = _outside(layout.whole, [price.row_bytes[layer] for layer, price in enumerate(now)])
    sets = {price.rung.scratch for layer, price in enumerate(now) if layer not in layout.whole}
    device = layout.device | {
        "replica": tokens * held,
        "cached rows": demand.batch * rows,
        "decode step": _scratch(layout, demand) * max(1, len(sets)),
    }
    return replace(layout, rungs=tuple(price.rung for price in now), device=device)


def _ends_first(n: int) -> list[int]:
    """0, n - 1, 1, n - 2, ..."""
    return sorted(range(n), key=lambda layer: (min(layer, n - 1 - layer), layer))


def _may_stream(demand: Demand) -> bool:
    return demand.streams or not demand.rungs


def budget_for(demand: Demand, *, device_tokens: int) -> int:
    """The smallest device budget under which a window of that many tokens fits beside everything else.

    Args:
        demand: What is asked; a chunk that is not given counts as 4,096 or the whole prompt.
        device_tokens: Tokens on the device, sinks included.

    Returns:
        Bytes, weights included.
    """
    demand = replace(demand, chunk=demand.chunk or _chunks(demand)[0], window=None, rungs=())
    blocks = max(LEAST_WINDOW_BLOCKS, -(-(device_tokens - demand.sinks) // demand.page))
    window = (blocks - LEAST_WINDOW_BLOCKS) * _block_bytes(demand)
    # The inverse of `_staging`: buffers take an eighth of what the smallest layout leaves, up to their full size.
    more_staging = _full_staging(demand) - _page_bytes(demand)
    spare = min(-(-window * 8 // 7), window + 2 * more_staging)
    return _least(demand).device_bytes + spare + 16  # divisions round down


def everything(demand: Demand) -> Layout:
    """The layout with all tokens on the device, whatever the budget: no replica, and buffers that are never used.

    Args:
        demand: What is asked; its length and its chunk are known.
    """
    assert demand.tokens is not None
    assert demand.chunk is not None
    # Of one page: nothing is copied.
    blocks = max(1, -(-demand.tokens // demand.page) - demand.sinks // demand.page)
    whole = replace(demand, rungs=(), hidden=None)
    return _price(whole, _page_bytes(demand), blocks, demand.chunk)


def workspace_bytes(demand: Demand, chunk: int) -> int:
    """Device bytes of activations with a chunk of the prompt."""
    return max(
        demand.workspace + demand.batch * chunk * demand.workspace_per_token,
        demand.least_workspace,
    )


def _chunks(demand: Demand) -> list[int]:
    """The chunks that `auto` tries, largest first."""
    longest = AUTO_CHUNK
    if demand.tokens is not None:
        longest = max(SMALLEST_CHUNK, min(AUTO_CHUNK, demand.tokens))
    chunks = [longest]
    while chunks[-1] // 2 >= SMALLEST_CHUNK:
        chunks.append(chunks[-1] // 2)
    return chunks


def _device_layout(demand: Demand, budget: int) -> Layout:
    chunk = demand.chunk
    assert chunk is not None
    sink_blocks = demand.sinks // demand.page
    least = _least(demand)
    needed = least.device_bytes
    if demand.tokens is not None and demand.window is None:
        # Does everything fit?
        whole = everything(demand)
        if whole.device_bytes <= budget:
            return whole
        needed = min(needed, whole.device_bytes)
    if least.device_bytes > budget:
        if demand.window is None:
            what = "The sum of weights, workspace and the smallest window on the device"
            change = "Raise memory.gpu, lower prefill.chunk, or load the model with fewer bits."
            if demand.weights + demand.overhead >= budget:  # nothing of ours is to blame
                change = "The weights alone take more: raise memory.gpu, or load the model with fewer bits."
            elif demand.rungs:
                rung = demand.rungs[0].rung
                what = f"The sum of weights, workspace, a window and the {rung.name} replica on the device"
                change = 'Raise memory.gpu, or set replica.rung to "auto"'
                change += " or to one of fewer bits." if rung.bits else ", which then streams."
        else:
            what = f"The sum of weights, workspace and a window of {demand.window:,} tokens on the device"
            change = "Raise memory.gpu, or lower cache.window, prefill.chunk or decode.staging."
        raise BudgetError(
            what,
            requested=needed,
            available=budget,
            setting="memory.gpu",
            change=change,
        )
    if demand.rungs and demand.tokens is None:
        # The length is not known: there is room for as many tokens as the budget has bytes for, and what then is left
        # is window, so that a short context needs no replica.
        spare = (budget - least.device_bytes) * 7 // 8
        room = spare // max(1, _replica_token_bytes(demand)) // demand.page * demand.page
        demand = replace(demand, longest=min(room, demand.longest))
        least = _least(demand)
    staging = max(least.staging_bytes, _staging(demand, budget - least.device_bytes))
    if demand.window is not None or (demand.rungs and demand.tokens is not None):
        return _price(demand, staging, least.window_blocks, chunk)
    found = _price(demand, staging, least.window_blocks, chunk)
    spare = budget - found.device_bytes
    if demand.hidden is not None:
        # A window holds inputs as well: what is left is for copies of pages, which do not.
        whole_tokens = demand.batch * max(1, found.host_tokens)
        share = spare / max(1, whole_tokens * sum(demand.token_bytes))
        return replace(found, resident_share=min(1.0, share))
    blocks = least.window_blocks + spare // max(1, _block_bytes(demand))
    if demand.tokens is not None:  # a window longer than the run is never filled
        blocks = min(blocks, max(1, -(-demand.tokens // demand.page) - sink_blocks))
    return _price(demand, staging, blocks, chunk)


def _least(demand: Demand) -> Layout:
    """The smallest layout: the window that was asked or four blocks, buffers of one page or as asked."""
    chunk = demand.chunk
    assert chunk is not None
    if demand.staging is not None and demand.staging < _page_bytes(demand):
        raise BudgetError(
            "One page of every sequence in a staging buffer",
            requested=_page_bytes(demand),
            available=demand.staging,
            setting="decode.staging",
        )
    blocks = LEAST_WINDOW_BLOCKS if demand.window is None else demand.window // demand.page
    if (demand.rungs or demand.hidden is not None) and demand.window is None:
        blocks = max(1, demand.rung_window // demand.page)
    if demand.rungs and demand.tokens is None:
        demand = replace(demand, longest=0)
    staging = _page_bytes(demand) if demand.staging is None else demand.staging
    if demand.staging is None and demand.rungs and demand.rungs[0].rung.near:
        # Of many rungs that differ by a few rows the best one that fits leaves nothing, and prompts are read through these.
        staging = max(staging, min(_full_staging(demand), USEFUL_STAGING_BYTES))
    return _price(demand, staging, blocks, chunk)


def _page_bytes(demand: Demand) -> int:
    """Bytes of one block of the widest layer, all sequences."""
    if demand.hidden is not None:
        return demand.batch * max(demand.hidden.page_bytes, default=0)
    return demand.batch * demand.page * max(demand.token_bytes, default=0)


def _block_bytes(demand: Demand) -> int:
    """Bytes of one block of all layers, all sequences."""
    return demand.batch * demand.page * sum(demand.token_bytes)


def _full_staging(demand: Demand) -> int:
    """Bytes beyond which a staging buffer gains nothing, in whole pages.

    A quarter of a layer is enough, for copies to overlap with attention to it; the whole of a small one, whose chunks
    would be launched more slowly than they are copied. The next layer is copied meanwhile.
    """
    limit = STAGING_BYTES
    if demand.tokens is not None:
        layer = demand.batch * demand.tokens * max(demand.token_bytes, default=0)
        if demand.hidden is not None:
            # What is rebuilt takes as long as the copies, which overlap from the second piece of a layer on; smaller
            # pieces take longer to launch.
            layer = demand.batch * demand.tokens * max(demand.hidden.page_bytes) // demand.page
            limit = min(limit, layer // 3)
        else:
            limit = min(limit, max(layer // 4, min(layer, USEFUL_STAGING_BYTES)))
    return max(1, limit // max(1, _page_bytes(demand))) * _page_bytes(demand)


def _staging(demand: Demand, spare: int) -> int:
    """Bytes of one staging buffer: as asked, or a page and a share of what the smallest layout leaves.

    The share is a sixteenth. Beside a replica of known length little is left, and nothing gains as much by it.
    """
    if demand.staging is not None:
        return demand.staging
    share = spare // 16
    if demand.rungs and demand.tokens is not None:
        share = max(share, min(spare // 2, USEFUL_STAGING_BYTES))
    page = max(1, _page_bytes(demand))
    return min(_page_bytes(demand) + share // page * page, _full_staging(demand))


def _price(demand: Demand, staging: int, window_blocks: int, chunk: int) -> Layout:
    """The bytes of a layout, by purpose."""
    sink_blocks = demand.sinks // demand.page
    whole = _whole(demand)
    split = _outside(whole, demand.token_bytes)
    kept = sum(demand.token_bytes) - split  # bytes of a token in layers that keep all of them
    on_device = (sink_blocks + window_blocks) * demand.page
    host_tokens = 0
    if demand.tokens is not None:
        # Beside a replica half of a full window leaves at once.
        stays = window_blocks - window_blocks // 2 if demand.rungs else window_blocks
        host_tokens = max(0, demand.tokens - (sink_blocks + stays) * demand.page)
        host_tokens = -(-host_tokens // demand.page) * demand.page
    evicted = min(chunk // demand.page + 1, max(1, -(-host_tokens // demand.page)))
    if demand.tokens is None:
        evicted = chunk // demand.page + 1
    eviction = evicted * _page_bytes(demand)
    rung = demand.rungs[0].rung if demand.rungs else None
    replica_tokens = 0
    if rung is not None:
        replica_tokens = host_tokens if demand.tokens is not None else demand.longest
    shared = min(host_tokens, demand.prompt) // demand.page * demand.page
    indexed = replica_tokens * demand.batch if demand.tokens is not None else 0
    pages = host_tokens * demand.batch - shared * (demand.batch - demand.batch // demand.copies)
    hidden, rebuilding = demand.hidden, {}
    of_page, beside = demand.page * split, 0
    if hidden is not None:
        of_page, beside = sum(hidden.page_bytes), sum(hidden.row_bytes)
        rebuilding = {
            "rebuilding": hidden.workspace
            + demand.batch * (demand.tokens or 0) * hidden.angle_bytes
            + evicted
            * demand.page
            * demand.batch
            * max(map(sum, zip(demand.token_bytes, hidden.row_bytes, strict=True)))
        }
    return Layout(
        chunk=chunk,
        sink_blocks=sink_blocks,
        window_blocks=window_blocks,
        host_tokens=host_tokens,
        staging_bytes=staging,
        eviction_bytes=eviction,
        device={
            "weights": demand.weights,
            "sinks and window": demand.batch
            * (
                on_device * (split + beside)
                + -(-(demand.tokens or 0) // demand.page) * demand.page * kept
            ),
            "tail": demand.batch * demand.page * (split + kept + beside),
            "staging": 2 * staging,
            "eviction": 2 * eviction,
            "replica": demand.batch * replica_tokens * _replica_bytes(demand),
            "cached rows": demand.batch
            * sum(_outside(whole, price.row_bytes) for price in demand.rungs[:1])
            * (replica_tokens > 0),
            "decode step": demand.batch
            * (demand.scratch_bytes + replica_tokens * demand.scratch_token_bytes),
            "other KV": demand.other_kv,
            "workspace": workspace_bytes(demand, chunk),
            "overhead": demand.overhead,
        }
        | rebuilding,
        host={"pages": pages // demand.page * of_page}
        | ({"index": indexed * demand.index_bytes} if demand.index_bytes else {}),
        rungs=() if rung is None else (rung,) * len(demand.token_bytes),
        replica_tokens=replica_tokens,
        searched_bytes=demand.batch * replica_tokens * demand.searched_bytes,
        searched_rows=demand.batch * demand.searched_rows,
        whole=whole,
        page=demand.page,
        hidden=hidden,
        idle_bytes=0
        if demand.step_workspace is None
        else max(0, workspace_bytes(demand, chunk) - demand.step_workspace),
    )


def _whole(demand: Demand) -> frozenset[int]:
    """Layers that keep all their tokens on the device beside replicas of the others."""
    if not demand.rungs or demand.tokens is None:
        return frozenset()
    if demand.whole is not None:
        return demand.whole
    return frozenset(_ends_first(len(demand.token_bytes))[: demand.whole_layers])


def _replica_bytes(demand: Demand) -> int:
    """Bytes of one token of one sequence in the replica of the first rung."""
    if not demand.rungs:
        return 0
    return _outside(_whole(demand), demand.rungs[0].layer_bytes)


def _outside(whole: frozenset[int], sizes: Sequence[int]) -> int:
    """The sum of what layers with a replica take."""
    return sum(size for layer, size in enumerate(sizes) if layer not in whole)


def _replica_token_bytes(demand: Demand) -> int:
    """Bytes of one more token of every sequence in the replica and in a decode step over it."""
    return demand.batch * (_replica_bytes(demand) + demand.scratch_token_bytes)
