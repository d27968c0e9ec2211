"""How many tokens does a step attend to where the others are left out, and how fast is it forgotten what they weighed?

Sparse window attention (ALISA, arXiv 2403.17312, algorithm 1): of n tokens the newest, and those outside of them that weighed most
lately, per KV head, half of share · n each. Here the newest are the window, whatever its size, and the others fill the share up:

    chosen(n) = share · n - rows that the window may come to

What a token weighed is kept as a sum that a step multiplies with a decay before it adds, so that a step costs what it attends to.
The decay is that of the paper's sum over the last share · n / 2 steps: as old a weight counts 1 / e.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.scheduler.rungs import ROWS, WINDOW_PARTS

PARTS = 32  # of what is near, and of what is not: at most
PROGRAMS = 2048  # of one launch, from which on more do not make reads of the host any faster
# What comes together while what came before is attended to. On an H100 PCIe brings as much in 0.6 ms, and a layer takes 0.3; less
# is more launches, and more is memory that could keep rows.
STAGED_BYTES = 32 * 2**20
FRACTIONS = 16  # of the chosen tokens, that the device may keep


@dataclass(frozen=True, slots=True)
class SparseWindow:
    """Which share of all tokens is attended to.

    Attributes:
        share: Of all tokens, at most; the window is attended to whole, however large it is.
        held: Rows on the device at most: sinks, window, and the page that fills.
    """

    share: float
    held: int

    def chosen(self, tokens: int) -> int:
        """Of so many tokens, those per KV head that are attended to beside the window."""
        return max(0, int(self.share * tokens) - self.held)

    def most(self, tokens: int) -> int:
        """Places for them, with as many tokens at the end; in whole tiles of the kernels."""
        return -(-self.chosen(tokens) // ROWS) * ROWS

    def near(self, tokens: int) -> list[int]:
        """Places on the device that may be planned, the most first and none last; the other tokens are read on the host."""
        most = self.most(tokens)
        return sorted({most * n // FRACTIONS // ROWS * ROWS for n in range(FRACTIONS + 1)}, reverse=True)  # fmt: skip

    def decay(self, tokens: int) -> float:
        """What a step multiplies sums with, where there will be so many tokens."""
        return 1.0 - 1.0 / max(2.0, self.share * tokens / 2)


def window_tokens(share: float, tokens: int, page: int, sinks: int) -> int:
    """Tokens of a window that is half of what is attended to at the end, sinks and the page that fills among them.

    Args:
        share: Of all tokens.
        tokens: At the end.
        page: Tokens of a block.
        sinks: Tokens that never leave the device.
    """
    return max(2, int(share * tokens / 2) // page - 1 - sinks // page) * page


def state_bytes(
    held: int, most: int, near: int, kv_heads: int, query_heads: int, key_dim: int, token_bytes: int, batch: int
) -> int:  # fmt: skip
    """Device bytes of one layer and sequence: chosen rows, their numbers, sums of the window, queries of a prompt.

    Args:
        held: Rows of the window at most.
        most: Places for chosen tokens.
        near: Of these, on the device.
        kv_heads: KV heads.
        query_heads: Query heads.
        key_dim: Head size of the keys.
        token_bytes: Bytes of one token of the layer.
        batch: Sequences.
    """
    itemsize = 4  # of the widest numbers that a query may have
    queries = learned(batch) * query_heads * (key_dim * itemsize + 4)
    return near * token_bytes + 4 * kv_heads * (most + held) + queries


def token_bytes(kv_heads: int, page: int) -> int:
    """Device bytes of one layer, sequence and token on the host: its sums, and its share of a page's number."""
    return 4 * kv_heads + -(-4 // page)


def learned(batch: int) -> int:
    """Queries of a prompt, its last ones, that say what its tokens weigh: fewer of more sequences."""
    return max(1, min(16, 64 // batch))


def staged_rows(most: int, batch: int, token_bytes: int) -> int:
    """Places for chosen rows on the host that come together, one of two.

    Args:
        most: Places for chosen tokens.
        batch: Sequences.
        token_bytes: Bytes of one token of the layer.
    """
    return min(most, max(ROWS, STAGED_BYTES // (batch * token_bytes) // ROWS * ROWS))


def splits(count: int, programs: int) -> int:
    """Programs per KV head over so many chosen tokens, where a launch has some for each sequence and KV head."""
    return max(1, min(PARTS, -(-count // ROWS), PROGRAMS // programs))


def step_bytes(
    query_heads: int, value_dim: int, kv_heads: int, token_bytes: int, held: int, most: int, batch: int
) -> int:  # fmt: skip
    """Device bytes of one sequence that a step needs besides: scores, parts that wait to be merged, pieces that come from the host.

    One layer's serve all.

    Args:
        query_heads: Query heads.
        value_dim: Head size of the values.
        kv_heads: KV heads.
        token_bytes: Bytes of one token of the layer.
        held: Rows of the window at most.
        most: Places for chosen tokens.
        batch: Sequences.
    """
    programs = batch * kv_heads
    together = staged_rows(most, batch, token_bytes)
    parts = WINDOW_PARTS if programs < 512 else 1
    parts += splits(most, programs)
    parts += -(-most // max(1, together)) * splits(together, programs)
    return query_heads * 4 * (held + most + parts * (value_dim + 1)) + 2 * together * token_bytes
