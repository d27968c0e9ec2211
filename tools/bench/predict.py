"""What would a step of `benchmarks/decode.json`, and a verified token, take on another card?

The same bytes at that card's rates.

What the measured card took, and for every byte that a step reads the difference between the two cards: weights, window
and replica from the card's memory, selected rows over PCIe. Memory is taken to reach the same share of its data sheet
on both. Launches and selection are left as they were measured. A prediction, nothing that was run.

A verified token takes its share of a draft and of a pass, which streams the KV on the host and computes beside it. Where
all tokens of a draft agree, the next one is drafted beside the pass, and is later by a fifth of the pass.

    python tools/bench/predict.py

The data sheets: H100 SXM 3,350 GB/s; RTX 4090 1,008 GB/s and PCIe 4, of which copies from pinned memory reach
about 25 GB/s (53 GB/s of PCIe 5 on the H100).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

H100_BYTES_PER_S, RTX_4090_BYTES_PER_S = 3.350e12, 1.008e12
H100_PCIE, RTX_4090_PCIE = 53e9, 25e9
SLOWED = 0.2  # of `offload.verify`


def on_rtx_4090(row: dict[str, Any], measured_bytes_per_s: float) -> float:
    """Milliseconds a token.

    Args:
        row: Of `Runtime.generate` on an H100.
        measured_bytes_per_s: That the H100's memory reached in the same run.
    """
    share = measured_bytes_per_s / H100_BYTES_PER_S
    read = sum(row["bytes"][what] for what in ("weights", "window", "resident", "replica"))
    slower = 1 / (share * RTX_4090_BYTES_PER_S) - 1 / measured_bytes_per_s
    fetched = row.get("fetched_bytes", row["selected_bytes"])  # all, before rows were cached
    rows = fetched * (1 / RTX_4090_PCIE - 1 / H100_PCIE)
    return float(row["ms_per_token"] + 1000 * (read * slower + rows))


def verified_ms(
    step_ms: float, pass_ms: float, *, drafts: int, agreement: float, looks_ahead: bool = True
) -> float:
    """Milliseconds a token of mode verified.

    Args:
        step_ms: Of a step of mode fast.
        pass_ms: Of a pass: the time of its copies, or of what it computes where that is longer.
        drafts: Tokens drafted before a pass.
        agreement: Share of drafted tokens that are kept.
        looks_ahead: Whether the draft goes on beside the pass.
    """
    agreement = min(agreement, 1 - 1e-9)
    tokens = (1 - agreement ** (drafted := drafts + 1)) / (1 - agreement)
    waits = drafts * step_ms + pass_ms
    if not looks_ahead:
        return waits / tokens
    all_agree = agreement**drafted
    goes_on = max(drafted * step_ms, pass_ms) + SLOWED * pass_ms
    return (all_agree * goes_on + (1 - all_agree) * (waits + SLOWED * pass_ms)) / tokens


def main() -> None:
    record = json.loads(Path("benchmarks/decode.json").read_text(encoding="utf-8"))
    (kernels,) = (row for row in record["rows"] if row["what"] == "kernels")
    for row in record["rows"]:
        if row["what"].startswith("ours "):
            predicted = on_rtx_4090(row, kernels["device_bytes_per_s"])
            print(f"{row['what']:14} {row['ms_per_token']:6.1f} ms  predicted {predicted:6.1f} ms")


if __name__ == "__main__":
    main()
