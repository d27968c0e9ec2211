"""What would a step of `benchmarks/decode.json`, and a verified token of `benchmarks/verified.json`, take on another card?

    python tools/bench/predict.py

**A step**: what the measured card took, and for every byte that a step reads the difference between the two cards:
weights, window and replica from the card's memory, selected rows over PCIe. Memory is taken to reach the same share of
its data sheet on both. Launches and selection are left as they were measured.

**A verified token**: its share of a draft and of a pass. A pass takes as long as its copies, or as what it computes.
Where all tokens of a draft agree, the next one is drafted beside the pass and comes later by what the pass takes of the
card; where one does not, the pass is waited for and what was drafted beside it is lost. `offload.scheduler.cost.slowed_by`
says what that is: 58 ms a pass at 131,072 tokens on the measured card, half of it matrix products. Printed beside what was measured.

Predictions, nothing that was run. The data sheets, dense bfloat16 with float32 sums: H100 SXM 3,350 GB/s; RTX 4090 1,008
GB/s, 165 TFLOP/s; RTX 3090 936 GB/s, 71 TFLOP/s. Copies from pinned memory reach about 25 GB/s on PCIe 4 (53 on PCIe 5).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.scheduler.cost import slowed_by, verified_token

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTHS = (8, 16, 32, 64, 127)


@dataclass(frozen=True)
class Card:
    """A data sheet.

    Attributes:
        bytes_per_s: Of its memory.
        pcie: Bytes per second of copies from pinned memory.
        flops: Per second, of attention and matrix products in bfloat16: 85 % of the data sheet, or as measured.
    """

    bytes_per_s: float
    pcie: float
    flops: float


H100 = Card(3.350e12, 53e9, 363e12)  # flops: of attention in prefill
CARDS = {
    "RTX 4090": Card(1.008e12, 25e9, 0.85 * 165e12),
    "RTX 3090": Card(0.936e12, 25e9, 0.85 * 71e12),
}
PASS_FLOPS = 11e12  # 128 rows of an 8B model over 131,072 tokens
LAYERS = 32  # of that model


def step_ms(row: dict[str, Any], measured_bytes_per_s: float, card: Card) -> float:
    """Milliseconds of a step on another card.

    Args:
        row: Of `Runtime.generate` on an H100.
        measured_bytes_per_s: That the H100's memory reached in the same run.
        card: The other one.
    """
    share = measured_bytes_per_s / H100.bytes_per_s
    read = sum(row["bytes"][what] for what in ("weights", "window", "resident", "replica"))
    slower = 1 / (share * card.bytes_per_s) - 1 / measured_bytes_per_s
    rows = row["fetched_bytes"] * (1 / card.pcie - 1 / H100.pcie)
    return float(row["ms_per_token"] + 1000 * (read * slower + rows))


def verified_ms(
    step: float,
    copies: float,
    *,
    host_bytes: float,
    drafts: float,
    agreement: float,
    card: Card = H100,
    looks_ahead: bool = True,
) -> float:
    """Milliseconds a token of mode verified.

    Args:
        step: Milliseconds of a step of mode fast.
        copies: Milliseconds of the copies of a pass.
        host_bytes: That a pass streams.
        drafts: Tokens drafted before a pass.
        agreement: Share of drafted tokens that are kept.
        card: Where it runs.
        looks_ahead: Whether the draft goes on beside the pass.
    """
    computes = PASS_FLOPS / card.flops
    return 1000 * verified_token(
        step / 1000,
        max(copies / 1000, computes),
        slowed_by(computes, host_bytes, card.bytes_per_s, LAYERS),
        drafts=drafts,
        agreement=agreement,
        looks_ahead=looks_ahead,
    )


def measured_and_predicted(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Milliseconds a token of each way in which mode verified was run, as measured and as predicted from mode fast.

    Args:
        rows: Of `benchmarks/verified.json`, by what they are of.
    """
    step = next(row["ms_per_token"] for what, row in rows.items() if what.startswith("fast "))
    found = {}
    for what, row in rows.items():
        if not what.startswith("verified"):
            continue
        # What was not drafted itself: corrections, and without a look-ahead the token behind a pass that agreed.
        rejected = min(row["new_tokens"] - row["accepted"], row["drafted"] - row["accepted"])
        predicted = verified_ms(
            step,
            row["verify_ms_per_token"] * row["new_tokens"] / row["verify_passes"],
            host_bytes=row["decode_h2d_bytes"] / row["verify_passes"],
            drafts=row["drafted"] / row["verify_passes"],
            agreement=row["accepted"] / (row["accepted"] + rejected),
            looks_ahead="waits" not in what,
        )
        found[what] = (row["ms_per_token"], predicted)
    return found


def best_verified_ms(step: float, host_bytes: float, agreement: float, card: Card) -> float:
    """Milliseconds a token with the length of drafts that is fastest.

    Args:
        step: Milliseconds of a step of mode fast on that card.
        host_bytes: That a pass streams.
        agreement: Share of drafted tokens that are kept.
        card: Where it runs.
    """
    copies = 1000 * host_bytes / card.pcie
    return min(
        verified_ms(step, copies, host_bytes=host_bytes, drafts=n, agreement=agreement, card=card)
        for n in LENGTHS
    )


def main() -> None:
    record = json.loads((BENCHMARKS / "decode.json").read_text(encoding="utf-8"))
    steps = {row["what"]: row for row in record["rows"]}
    rate = steps["kernels"]["device_bytes_per_s"]
    print(f"{'a step, ms':28}{'measured':>10}" + "".join(f"{name:>10}" for name in CARDS))
    for what, row in steps.items():
        if what.startswith("ours "):
            others = "".join(f"{step_ms(row, rate, card):10.1f}" for card in CARDS.values())
            print(f"{what.removeprefix('ours '):28}{row['ms_per_token']:10.1f}{others}")
    rows = json.loads((BENCHMARKS / "verified.json").read_text(encoding="utf-8"))["rows"]
    named = {row["what"]: row for row in rows}
    print(f"\n{'a verified token, ms':28}{'measured':>10}{'predicted':>10}")
    for what, (measured, predicted) in measured_and_predicted(named).items():
        print(f"{what:28}{measured:10.1f}{predicted:10.1f}")
    passes = named["verified 131072"]
    streamed = passes["decode_h2d_bytes"] / passes["verify_passes"]
    agreed = passes["forced_agreement"]
    step = named["fast 131072"]["ms_per_token"]
    print(f"\n{'predicted, by length':28}" + "".join(f"{n:>10}" for n in LENGTHS))
    links = [(f"H100, {pcie:.0f} GB/s", H100, step, pcie * 1e9) for pcie in (53, 25, 12)]
    for name, card in CARDS.items():
        slower = step_ms(steps["ours 131072"], rate, card)
        links.append((f"{name}, {card.pcie / 1e9:.0f} GB/s", card, slower, card.pcie))
    for name, card, of_step, pcie in links:
        each = [
            verified_ms(
                of_step,
                1000 * streamed / pcie,
                host_bytes=streamed,
                drafts=n,
                agreement=agreed,
                card=card,
            )
            for n in LENGTHS
        ]
        print(f"{name:28}" + "".join(f"{ms:10.1f}" for ms in each))


if __name__ == "__main__":
    main()
