"""Why is a run laid out as it is? Each choice, what else there was, and the two costs that decided.

Costs are the planner's own: bytes of `offload.scheduler.layout`, milliseconds of `offload.scheduler.cost`. No torch: the
planner says it of a run to come, the runtime of the one that was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.config import COMPILED_FROM, OffloadConfig
from offload.errors import BudgetError
from offload.scheduler import cost
from offload.scheduler.layout import (
    AUTO_CHUNK,
    LEAST_WINDOW_BLOCKS,
    Demand,
    Layout,
    RungPrice,
    everything,
    lay_out,
    workspace_bytes,
)
from offload.scheduler.placement import COPIED, ways
from offload.scheduler.profiles import Profile
from offload.units import gib

BYTES, STEP_BYTES, MS, TOKEN_MS, RUN_MS = (
    "bytes",
    "bytes a step",
    "ms a step",
    "ms a token",
    "ms of the answer",
)
# Seconds for a layer: 32 of an 8B model take 20 to 25 s on an H100 (`COMPILED_FROM`).
_COMPILE_LAYER_S = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One decision.

    Attributes:
        what: Was to be decided.
        chosen: What it became.
        cost: Of that, in `unit`; None where nobody knows.
        instead: What else there was.
        instead_cost: Of that, in `unit`; None where nobody knows.
        unit: Of both costs.
        why: The rule, or the setting that asked for it.
        source: "computed", "predicted" from a card's rates, or "measured".
    """

    what: str
    chosen: str
    cost: float | None
    instead: str
    instead_cost: float | None
    unit: str
    why: str
    source: str = "computed"

    def __str__(self) -> str:
        """As in `chunk: 1,024 tokens, 0.2 GiB; instead 4,096, 0.6 GiB: the budget leaves no more`."""
        here, there = self._shown(self.cost), self._shown(self.instead_cost)
        return f"{self.what}: {self.chosen}, {here}; instead {self.instead}, {there}: {self.why}"

    def _shown(self, value: float | None) -> str:
        if value is None:
            return "unknown"
        if self.unit.startswith(BYTES):
            return gib(round(value)) + self.unit.removeprefix(BYTES)
        return f"{value:,.4g} {self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What milliseconds are of.

    Attributes:
        shape: Of the model.
        profile: Of the machine.
        way: How tokens are made.
    """

    shape: cost.Shape
    profile: Profile
    way: cost.Way

    def step_ms(self, layout: Layout, **changes: object) -> float:
        """Milliseconds of a step, in a way that differs by some fields."""
        way = replace(self.way, **changes)  # type: ignore[arg-type]
        return 1000 * cost.step(layout, self.shape, self.profile, way).seconds


def choices(
    config: OffloadConfig,
    demand: Demand,
    layout: Layout,
    *,
    budget: int,
    card: Card | None,
    other: Demand | None = None,
    output: int | None = None,
) -> list[Choice]:
    """What was decided before a run.

    Args:
        config: As asked.
        demand: Of the run.
        layout: That came of it.
        budget: Device bytes.
        card: What steps are priced on; None: by the bytes that they move instead.
        other: The demand with the other setting of scheduler.recompute; None where there is none.
        output: Tokens of the answer, where that is known.
    """
    found = [*_placement(demand, layout, budget)]
    rung = layout.rung
    if (
        rung is not None
        and rung.share
        and layout.host_tokens
        and len(layout.whole) < len(layout.rungs)
    ):
        found += _sparse(demand, layout, card)
    elif rung is not None and not rung.share and layout.host_tokens:
        found += [*_path(demand, layout, card), *_rungs(demand, layout, budget)]
    if config.mode == "exact" and layout.host_tokens:
        found += _recompute(config, demand, layout, budget, card, other)
    found += _chunk(demand, layout)
    if card is not None and config.keeps_replica and layout.rungs and output is not None:
        found += _compiled(config, card, output)
        if config.mode == "verified" and card.way.batch == 1:
            found += _drafts(layout, card)
    return found


def _placement(demand: Demand, layout: Layout, budget: int) -> Iterator[Choice]:
    """Whether tokens leave the device; nothing where the length is not known."""
    if demand.tokens is None:
        return
    whole = everything(replace(demand, chunk=layout.chunk))
    if layout.host_tokens:
        asked = demand.window is not None
        yield Choice(
            what="KV",
            chosen="on the device and the host",
            cost=layout.device_bytes,
            instead="all on the device",
            instead_cost=whole.device_bytes,
            unit=BYTES,
            why="cache.window is set" if asked else f"the device budget is {gib(budget)}",
        )
        return
    least = replace(demand, window=LEAST_WINDOW_BLOCKS * demand.page, rungs=(), hidden=None)
    try:
        split: int | None = lay_out(least, device_budget=budget, host_budget=2**62).device_bytes
    except BudgetError:  # buffers for copies, which nothing needs here
        split = None
    yield Choice(
        what="KV",
        chosen="all on the device",
        cost=layout.device_bytes,
        instead="the smallest window, the rest on the host",
        instead_cost=split,
        unit=BYTES,
        why=f"it fits the device budget of {gib(budget)}, and nothing is copied",
    )


def _path(demand: Demand, layout: Layout, card: Card | None) -> Iterator[Choice]:
    """A replica's steps beside those that stream every token."""
    rung = layout.rung
    assert rung is not None
    read, streamed, unit, source = _beside_streaming(demand, layout, card, float(layout.device["replica"]))  # fmt: skip
    yield Choice(
        what="steps",
        chosen=f"by the {rung.name} replica on the device",
        cost=read,
        instead="every token streamed",
        instead_cost=streamed,
        unit=unit,
        why="a replica fits the device budget",
        source=source,
    )


def _beside_streaming(
    demand: Demand, layout: Layout, card: Card | None, read: float
) -> tuple[float, float, str, str]:
    """What a step takes and one that streams every token, their unit and source: bytes, `read` in the first, without a card."""
    if card is None:
        return read, float(layout.host["pages"]), STEP_BYTES, "computed"
    fast, exact = (card.step_ms(layout, mode=mode, batch=demand.batch) for mode in ("fast", "exact"))  # fmt: skip
    return fast, exact, MS, "predicted"


def _sparse(demand: Demand, layout: Layout, card: Card | None) -> Iterator[Choice]:
    """Steps over a share of the tokens beside those over all; where the chosen ones are; how those come that the device lacks."""
    rung = layout.rung
    assert rung is not None
    own = [one for layer, one in enumerate(layout.rungs) if layer not in layout.whole]
    at = layout.last_tokens
    chosen = min(layout.sparse(rung.share).chosen(at), rung.near + rung.far)
    near = sum(min(chosen, one.near) for one in own) / max(1, len(own))
    rows = demand.batch * sum(demand.token_bytes)
    read, streamed, unit, source = _beside_streaming(demand, layout, card, float(rows * (chosen - near)))  # fmt: skip
    yield Choice(
        what="steps",
        chosen=f"over the window and {chosen:,} of {at:,} tokens per KV head",
        cost=read,
        instead="every token streamed",
        instead_cost=streamed,
        unit=unit,
        why=f"scheduler.sparsity = {1 - rung.share:g}; the last step",
        source=source,
    )
    yield Choice(
        what="chosen tokens",
        chosen=f"{near:,.0f} of {chosen:,} per KV head on the device",
        cost=rows * near,
        instead="all of them",
        instead_cost=float(rows * chosen),
        unit=BYTES,
        why="all of them fit" if near >= chosen else "as many as the device budget has room for",
    )
    if card is None or chosen <= near:
        return
    found = ways(
        card.shape, card.profile,
        sequences=demand.batch, tokens=layout.host_tokens, absent=chosen - near,
    )  # fmt: skip
    here = found.pop(COPIED)
    other = min(found, key=lambda way: found[way])
    yield Choice(
        what="tokens that the device lacks",
        chosen=COPIED,
        cost=1000 * here,
        instead=other,
        instead_cost=1000 * found[other],
        unit=MS,
        why="the only way that steps have"
        + ("; the other one is cheaper" if found[other] < here else " and the cheapest"),
        source="predicted",
    )


def _rungs(demand: Demand, layout: Layout, budget: int) -> Iterator[Choice]:
    """The rung of each layer beside the next better one, layers with the same rung together."""
    prices: tuple[RungPrice, ...] = demand.ladder or demand.rungs
    spare, tokens = budget - layout.device_bytes, demand.batch * layout.replica_tokens
    by_name: dict[str, list[int]] = {}
    for layer, rung in enumerate(layout.rungs):
        by_name.setdefault("whole" if layer in layout.whole else rung.name, []).append(layer)
    names = list(dict.fromkeys(price.rung.name for price in prices))

    def size(name: str, layers: list[int]) -> float | None:
        if name == "whole":
            return float(tokens * sum(demand.token_bytes[layer] for layer in layers))
        price = next((price for price in prices if price.rung.name == name), None)
        return None if price is None else float(tokens * sum(price.layer_bytes[i] for i in layers))

    for name, layers in by_name.items():
        at = names.index(name) if name in names else -1
        instead = names[at - 1] if at > 0 else "whole"
        why = f"{gib(spare)} of the budget are left"
        if demand.ladder:
            why = f"the least error on the prompt for the bytes there are; {why}"
        if name == "whole":
            instead = names[0]
            why = "these layers mind low bits most"
        yield Choice(
            what=f"rung of {_layers(layers)}",
            chosen="kept as they are" if name == "whole" else name,
            cost=size(name, layers),
            instead="kept as they are" if instead == "whole" else instead,
            instead_cost=size(instead, layers),
            unit=BYTES,
            why=why,
        )


def _recompute(
    config: OffloadConfig,
    demand: Demand,
    layout: Layout,
    budget: int,
    card: Card | None,
    other: Demand | None,
) -> Iterator[Choice]:
    """Fetching keys and values beside rebuilding them from inputs of attention; keeping the oldest beside dropping them."""
    if layout.host_blocks is not None:
        kept = replace(demand, prefix_token_bytes=0, chunk=layout.chunk)
        yield Choice(
            what="the oldest tokens",
            chosen=f"{layout.dropped_tokens:,} of each sequence dropped, and read again in every pass",
            cost=layout.host_bytes,
            instead="all kept on the host",
            instead_cost=lay_out(kept, device_budget=budget, host_budget=2**62).host_bytes,
            unit=BYTES,
            why='memory.cpu has no room for all, and scheduler.recompute = "prefix"',
        )
    names = ("keys and values fetched", "some rebuilt from inputs of attention")
    chosen, instead = names if layout.hidden is None else names[::-1]
    asked = f'scheduler.recompute = "{config.scheduler.recompute}"'
    if other is None:
        # A step of a rebuilt token copies its inputs: no less than what it replaces.
        copied = float(sum(demand.token_bytes))
        inputs = None
        if card is not None:
            size = card.shape.hidden * card.shape.itemsize
            inputs = float(size * len(demand.token_bytes))
        yield Choice(
            what="tokens on the host",
            chosen=chosen,
            cost=copied,
            instead=instead,
            instead_cost=inputs,
            unit=BYTES,
            why="of a token: its inputs are no fewer bytes in this model",
        )
        return
    try:
        second = lay_out(other, device_budget=budget, host_budget=2**62)
    except BudgetError:
        second = None

    def price(of: Layout | None) -> float | None:
        if of is None:
            return None
        if card is not None:
            return card.step_ms(of, mode="exact", batch=demand.batch)
        return (1.0 - of.resident_share) * of.host_bytes

    here, there = price(layout), price(second)
    faster = here is not None and there is not None and there < here
    hint = "; the other one is cheaper" if faster else ""
    yield Choice(
        what="tokens on the host",
        chosen=chosen,
        cost=here,
        instead=instead,
        instead_cost=there,
        unit=STEP_BYTES if card is None else MS,
        why=f"{asked}{hint}",
        source="computed" if card is None else "predicted",
    )


def _chunk(demand: Demand, layout: Layout) -> Iterator[Choice]:
    """A chunk that is smaller than usual, or set."""
    usual = min(AUTO_CHUNK, demand.tokens or AUTO_CHUNK)
    if layout.chunk >= usual:
        return
    yield Choice(
        what="chunk of the prompt",
        chosen=f"{layout.chunk:,} tokens",
        cost=workspace_bytes(demand, layout.chunk),
        instead=f"{usual:,}",
        instead_cost=workspace_bytes(demand, usual),
        unit=BYTES,
        why="prefill.chunk is set" if demand.chunk else "the device budget has no room for more",
    )


def _compiled(config: OffloadConfig, card: Card, output: int) -> Iterator[Choice]:
    """Compiling layers beside launching more kernels in every step."""
    gains = card.shape.work.layers * cost.EAGER_S
    spent = 1000 * card.shape.work.layers * _COMPILE_LAYER_S
    saved = 1000 * gains * output
    rule = f"from {COMPILED_FROM:,} tokens on: later calls of a server win the rest back"
    pair = ("compiled", spent), ("as they are", saved)
    (chosen, here), (instead, there) = pair if card.way.compiled else pair[::-1]
    yield Choice(
        what="layers",
        chosen=chosen,
        cost=here,
        instead=instead,
        instead_cost=there,
        unit=RUN_MS,
        why=rule if isinstance(config.decode.compile, str) else "decode.compile is set",
        source="predicted",
    )


def _drafts(layout: Layout, card: Card) -> Iterator[Choice]:
    """The length of drafts beside exact tokens."""
    step_s = cost.step(layout, card.shape, card.profile, card.way).computes
    found = cost.by_draft(layout, card.shape.work, card.profile, card.way, step_s=step_s)
    best = min(found, key=lambda n: found[n])
    yield Choice(
        what="drafts",
        chosen=f"{best} tokens before a pass",
        cost=1000 * found[best],
        instead="exact tokens one by one",
        instead_cost=card.step_ms(layout, mode="exact"),
        unit=TOKEN_MS,
        why=f"the fastest of {len(found)} lengths" if len(found) > 1 else "decode.draft is set",
        source="predicted",
    )


def _layers(layers: list[int]) -> str:
    """As in `layers 0, 3 to 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(shown)}"
