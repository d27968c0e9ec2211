"""How long does it take? Times of a prefill, a step and a pass for a layout on a machine, engine by engine.

What runs on different engines overlaps: a sum is only taken over what one engine does. The constants are those of an
H100 SXM, from `benchmarks/decode.json` and `benchmarks/verified.json`; a test compares the two. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.scheduler.layout import Layout
from offload.scheduler.pace import LENGTHS, MOST_ROWS, Drafts
from offload.scheduler.profiles import Profile

# Of a layer of a captured step, without what its bytes take: launches, gaps, small kernels.
_LAYER_S = 24e-6
# Further, where layers are not compiled: some twenty small kernels more (`benchmarks/cli_card.json`).
_EAGER_S = 71e-6
# The device path of a layer besides its bytes: scan and selection until the tail is under way.
_PATH_S = 39e-6
_PATH_TOKEN_S = 3e-11  # for each token of the replica
_ROW_S = 0.28e-6  # for each exact token beyond 64 per KV head
# Streaming every token reaches this share of the link.
_STREAM_SHARE = 0.94
# Launching what one staged chunk needs, where chunks are small.
_CHUNK_S = 0.3e-3
_PASS_LAYER_S = (
    0.5e-3  # costs the draft beside it a layer of a pass, besides what it reads and computes
)
# Share of drafted tokens that are kept, by bits of the replica: measured at 4 bits (`benchmarks/verified.json`), for
# 3 and 2 the share of same best tokens (`benchmarks/fidelity.json`), below that a guess.
AGREEMENT = {4: 0.9987, 3: 0.998, 2: 0.989, 0: 0.9}
LINK, PASSES = "PCIe", "passes"


@dataclass(frozen=True, kw_only=True, slots=True)
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

    @property
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
    """

    mode: str
    batch: int
    prompt: int
    selected: int | None = None
    drafts: Drafts | None = None
    looks_ahead: bool = True
    compiled: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """What a plan expects.

    Attributes:
        prefill: Seconds until the first token.
        token: Seconds of a token.
        parts: Of these, by what they go into; the link overlaps with the others.
        limit: The part that is the largest.
    """

    prefill: float
    token: float
    parts: dict[str, float]
    limit: str


def times(layout: Layout, work: Work, profile: Profile, way: Way) -> Times:
    """Times of a run.

    Args:
        layout: Of the run.
        work: Of the model.
        profile: Of the machine.
        way: How tokens are made.
    """
    first = prefill(layout, work, profile, batch=way.batch, prompt=way.prompt)
    parts = step(layout, work, profile, way)
    device = sum(size for part, size in parts.items() if part != LINK)
    token = max(device, parts.get(LINK, 0.0))
    if way.mode == "verified" and layout.rungs and way.batch == 1:
        token = verified(layout, work, profile, way, step_s=device)
        parts[PASSES] = token - device
    limit = max(parts, key=lambda part: parts[part])
    if LINK in parts and parts[LINK] >= device:
        limit = LINK
    return Times(prefill=first, token=token, parts=parts, limit=limit)


def step(layout: Layout, work: Work, profile: Profile, way: Way) -> dict[str, float]:
    """Seconds of one token by part. Where every token is streamed, that is the link's."""
    rate, batch = profile.bytes_per_s, way.batch
    parts = {
        "weights": max(work.read_bytes / rate, 2 * work.parameters * batch / profile.gemm_flops),
        "window": (layout.device["sinks and window"] + layout.device["other KV"]) / rate,
        "launches": work.layers * (_LAYER_S + (0.0 if way.compiled else _EAGER_S)),
    }
    # Several sequences are not drafted: mode verified makes exact steps of them.
    streams = way.mode == "exact" or (way.mode == "verified" and batch > 1) or not layout.rungs
    if layout.host_tokens and streams:
        # What is left of the budget keeps rebuilt rows.
        streamed = 1.0 - layout.resident_share
        parts[LINK] = streamed * layout.host_bytes / profile.pcie / _STREAM_SHARE
        if layout.hidden is not None:
            rebuilt = layout.hidden.tokens / layout.page * layout.host_tokens * batch * streamed
            parts["rebuilding"] = rebuilt * layout.hidden.flops / profile.gemm_flops
    elif layout.rungs:
        rung = layout.rung
        assert rung is not None
        replicas = len(layout.rungs) - len(layout.whole)
        selected = rung.tokens if way.selected is None else way.selected
        parts["replica"] = layout.device["replica"] / rate
        parts["selection"] = replicas * (_PATH_S + batch * layout.replica_tokens * _PATH_TOKEN_S)
        parts["selection"] += replicas * batch * max(0, selected - 64) * _ROW_S
    return parts


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
    products = 2.0 * work.parameters * prompt * batch / profile.gemm_flops
    attention = work.attention_flops * batch * prompt**2 / 2 / profile.attention_flops
    chunks = -(-prompt // layout.chunk)
    weights = chunks * work.read_bytes / profile.bytes_per_s
    # On the host at chunk i: what came before, less what the device holds.
    held = max(1, prompt - layout.host_tokens)
    steps = max(0, prompt - held) / layout.chunk
    copied = layout.host_bytes * steps / 2
    launches = copied / max(1, layout.staging_bytes) * _CHUNK_S
    return max(max(products, weights) + attention, copied / profile.pcie + launches)


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
    copied = float(layout.host_bytes)
    computes = pass_flops(work, way.prompt, MOST_ROWS) / profile.attention_flops
    taken = max(copied / profile.pcie, computes)
    late = slowed(work, profile, tokens=way.prompt, copied=copied)
    rung = layout.rung
    agreement = AGREEMENT[0 if rung is None or rung.clustered else rung.bits]
    drafts = way.drafts or Drafts(MOST_ROWS - 1, True)
    lengths = [n for n in LENGTHS if 0 < n <= drafts.most] if drafts.is_auto else []
    return min(
        verified_token(
            step_s, taken, late, drafts=n, agreement=agreement, looks_ahead=way.looks_ahead
        )
        for n in lengths or [drafts.most]
    )


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
