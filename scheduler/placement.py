"""Where does a step get tokens that it has chosen and the device does not keep? Three ways, priced alike.

| way | takes |
|---|---|
| `COPIED` | the link: rows, of each KV head those that it chose |
| `ATTENDED` | the host: its memory, where each row lies anywhere, and a hand-off each way for every layer, while the card waits |
| `REBUILT` | the link and the card: inputs of all tokens that some KV head chose, and products for those that each head chose |

KV heads choose apart, so that an input serves few of them: with many heads it is more bytes than the rows that come of it. The first
way is the one that steps take (`offload.tiers.sparse`); a plan says what the others would cost.
"""

from __future__ import annotations

from offload.scheduler.cost import HAND_OFFS_S, SEARCH_ROW_BYTES, Shape, copying
from offload.scheduler.profiles import Profile

COPIED, ATTENDED, REBUILT = "copied from the host", "attended to on the host", "rebuilt from inputs of attention"  # fmt: skip


def ways(
    shape: Shape, profile: Profile, *, sequences: int, tokens: int, absent: float
) -> dict[str, float]:
    """Seconds of a step by each way.

    Args:
        shape: Of the model.
        profile: Of the machine.
        sequences: That are decoded.
        tokens: Of each, on the host.
        absent: Of each, chosen by a KV head and not on the device.
    """
    chosen = sequences * absent
    # A row of a KV head is its key and its value side by side.
    read = sum(
        layer.kv * max(layer.token_values * shape.itemsize // layer.kv, SEARCH_ROW_BYTES)
        for layer in shape.layers
    )
    found = {
        COPIED: copying(chosen * shape.kv_bytes, 0, profile),
        ATTENDED: len(shape.layers) * HAND_OFFS_S + chosen * read / profile.host_bytes_per_s,
    }
    if absent and shape.layers:
        heads = max(layer.kv for layer in shape.layers)
        some = min(float(tokens), absent * heads)
        # Whoever keeps inputs rebuilds them in every layer.
        inputs = sequences * some * shape.hidden * shape.itemsize * len(shape.layers)
        products = chosen * 2.0 * shape.hidden * shape.kv_bytes / shape.itemsize
        found[REBUILT] = max(copying(inputs, 0, profile), products / profile.gemm_flops)
    return found
