"""How long does it take? Times of a prefill, a step and a pass for a layout on a machine, engine by engine.

What runs on different engines overlaps: a sum is only taken over what one engine does. The constants are those of an
H100 SXM, from `benchmarks/decode.json` and `benchmarks/verified.json`; a test compares the two. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.scheduler.layout import Layout
from offload.scheduler.pace import LENGTHS, MOST_ROWS
from offload.scheduler.profiles import Profile

# Of a layer of a captured step, without what its bytes take: launches, gaps, small kernels.
_LAYER_S = 24e-6
# The device path of a layer besides its bytes: scan and selection until the tail is under way.
_PATH_S = 39e-6
_PATH_TOKEN_S = 3e-11  # for each token of the replica
_ROW_S = 0.28e-6  # for each exact token beyond 64 per KV head
# Streaming every token reaches this share of the link.
_STREAM_SHARE = 0.94
# Launching what one staged chunk needs, where chunks are small.
_CHUNK_S = 0.3e-3
_PASS_LAYER_S = (
    0.5e-3  # that a layer of a pass costs the draft beside it, besides what it reads and computes
)
# Share of drafted tokens that are kept, by bits of the replica: measured at 4 bits (`benchmarks/verified.json`), for
# 3 and 2 the share of same best tokens (`benchmarks/fidelity.json`), below that a guess.
AGREEMENT = {4: 0.999, 3: 0.998, 2: 0.989, 0: 0.9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a model computes, beside the bytes of its layout.

    Attributes:
        parameters: That a token is multiplied with.
        itemsize: Bytes of one of them.
        heads: Query heads and head size of each layer that keeps every token.
        layers: Of all kinds.
        token_bytes: KV bytes of a token, for each layer that keeps every token.
    """

    parameters: int
    itemsize: int
    heads: Sequence[tuple[int, int]]
    layers: int
    token_bytes: Sequence[int]

    @property
    def attention_flops(self) -> float:
        """Of one query and one key, in all layers."""
        return float(sum(4 * heads * size for heads, size in self.heads))


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """What a plan expects.

    Attributes:
        prefill: Seconds until the first token.
        token: Seconds of a token.
        engines: Seconds of a token by engine.
        limit: The engine that sets the time.
    """

    prefill: float
    token: float
    engines: dict[str, float]
    limit: str


def times(
    layout: Layout, work: Work, profile: Profile, *, mode: str, batch: int, prompt: int
) -> Times:
    """Times of a run.

    Args:
        layout: Of the run.
        work: Of the model.
        profile: Of the machine.
        mode: fast, verified or exact.
        batch: Sequences.
        prompt: Tokens of each.
    """
    engines = step(layout, work, profile, batch=batch)
    first = prefill(layout, work, profile, batch=batch, prompt=prompt)
    token = max(engines["device"], engines["PCIe"])
    if mode == "verified" and layout.rungs:
        token = verified(layout, work, profile, step_s=token, prompt=prompt)
        engines["passes"] = token - max(engines["device"], engines["PCIe"])
    limit = "PCIe" if engines["PCIe"] > engines["device"] else _largest(layout, work, profile)
    return Times(prefill=first, token=token, engines=engines, limit=limit)


def step(layout: Layout, work: Work, profile: Profile, *, batch: int) -> dict[str, float]:
    """Seconds of one token by engine: of the device, and of the link where every token is streamed."""
    read = work.parameters * work.itemsize
    read += sum(layout.device[part] for part in ("sinks and window", "replica", "other KV"))
    device = read / profile.bytes_per_s + work.layers * _LAYER_S
    streamed = 0.0
    if layout.rungs:
        rung = layout.rung
        assert rung is not None
        replicas = len(layout.rungs) - len(layout.whole)
        device += replicas * (_PATH_S + batch * layout.replica_tokens * _PATH_TOKEN_S)
        device += replicas * batch * max(0, rung.tokens - 64) * _ROW_S
    elif layout.host_tokens:
        streamed = layout.host_bytes / profile.pcie / _STREAM_SHARE
    return {"device": device, "PCIe": streamed}


def prefill(layout: Layout, work: Work, profile: Profile, *, batch: int, prompt: int) -> float:
    """Seconds of reading a prompt in chunks: products and attention, beside the pages that every chunk streams."""
    products = 2.0 * work.parameters * prompt * batch / profile.gemm_flops
    attention = work.attention_flops * batch * prompt**2 / 2 / profile.attention_flops
    chunks = -(-prompt // layout.chunk)
    weights = chunks * work.parameters * work.itemsize / profile.bytes_per_s
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
    return computes + 2 * copied / profile.bytes_per_s + len(work.heads) * _PASS_LAYER_S


def verified(layout: Layout, work: Work, profile: Profile, *, step_s: float, prompt: int) -> float:
    """Seconds of a verified token, with drafts as long as is fastest."""
    copied = float(layout.host_bytes)
    computes = pass_flops(work, prompt, MOST_ROWS) / profile.attention_flops
    taken = max(copied / profile.pcie, computes)
    late = slowed(work, profile, tokens=prompt, copied=copied)
    rung = layout.rung
    agreement = AGREEMENT[0 if rung is None or rung.clustered else rung.bits]
    return min(
        verified_token(step_s, taken, late, drafts=n, agreement=agreement) for n in LENGTHS if n
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


def _largest(layout: Layout, work: Work, profile: Profile) -> str:
    parts = {
        "weights": work.parameters * work.itemsize / profile.bytes_per_s,
        "window": layout.device["sinks and window"] / profile.bytes_per_s,
        "replica": layout.device["replica"] / profile.bytes_per_s,
        "launches": work.layers * _LAYER_S,
    }
    return max(parts, key=lambda part: parts[part])
