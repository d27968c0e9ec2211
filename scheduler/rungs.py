"""Which low-bit copies of offloaded tokens can the device keep, and what do they cost? The ladder, best first.

A rung is a code for keys and values, or means of them, and a number of tokens per KV head that are attended to exactly
on top of it. The bytes are those of `offload.kernels.quantize` and `offload.kernels.clusters`, scales included; a test
compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 64  # tokens that share the scales of their keys: what a replica grows by
_GROUP = 32  # channels that share the scales of a token's values
_CLUSTERS = 4  # of a block, where only means are kept
# How a step is cut into parts; a test compares these with the kernels'.
WINDOW_PARTS = 32  # at most
ROWS = 16  # selected rows of a part
SELECTED_BLOCKS = 2  # blocks of a part of the tail that selected tokens are in
TAIL_TOKENS = 256  # tokens of a part of the rest of the tail, at least


MOST_CACHED_ROWS = 4096  # per KV head, unless more are asked for: 16 MiB a layer of an 8B model


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder.

    Attributes:
        name: As in the config.
        bits: Of the codes of keys, and of values unless these are clustered; 0 where of keys too only the means of
            clusters are kept.
        tokens: Attended to exactly per KV head, unless the config says otherwise.
        clustered: Of values only the means of clusters are kept.
        caches: Rows may stay on the device after they were selected; without them it takes less.
        faithful: Its tokens may be shown as they are. Others are for drafts, unless they are asked for by name.
        share: Of all tokens, those that are attended to, where no replica speaks for the others; 0: one does.
        near: Rows per KV head of chosen tokens that the device keeps then.
        far: Rows of them that a step reads on the host, at most.
    """

    name: str
    bits: int
    tokens: int
    clustered: bool = False
    caches: bool = True
    faithful: bool = True
    share: float = 0.0
    near: int = 0
    far: int = 0

    @property
    def rank(self) -> tuple[int, bool]:
        """The more faithful the larger."""
        return self.bits, not self.clustered

    @property
    def scratch(self) -> tuple[int, bool]:
        """What the scratch of its steps depends on."""
        return self.tokens, self.clustered

    def selected(self, asked: int | str) -> int:
        """Tokens per KV head that a step attends to exactly.

        Args:
            asked: As in the config: tokens, or "auto".
        """
        return self.tokens if isinstance(asked, str) else asked

    def token_bytes(self, kv_heads: int, key_dim: int, value_dim: int) -> int:
        """Device bytes of one token of one layer and sequence, to the next byte.

        Args:
            kv_heads: KV heads.
            key_dim: Head size of the keys.
            value_dim: Head size of the values.
        """
        keys, values = _padded(key_dim), _padded(value_dim)
        # Zero and scale of a channel take four bytes for a block, those of a token's group four for itself.
        block = BLOCK * self.bits * keys // 8 + 4 * keys if self.bits else 2 * _CLUSTERS * keys
        if self.clustered:
            block += BLOCK + 2 * _CLUSTERS * values
        else:
            block += BLOCK * self.bits * values // 8 + 4 * BLOCK * (values // _GROUP)
        return -(-(kv_heads * block + 4) // BLOCK)  # and four bytes for the number of its page


def cached_rows(tokens: int, asked: int | str) -> int:
    """Rows per KV head that stay on the device after they were selected, where they may.

    Of eight times as many as are selected in a step, a step finds most of its own there: 89 % of 256 and 78 % of 64
    on SmolLM2. 64 rows are read beside the replica, so that they need not be there; 256 take longer than it.

    Args:
        tokens: Attended to exactly per KV head.
        asked: As in the config: rows, or "auto".
    """
    if not tokens:
        return 0
    if isinstance(asked, str):
        return min(MOST_CACHED_ROWS, 8 * tokens) if tokens >= 256 else 0
    return asked


def row_cache_bytes(rows: int, kv_heads: int, token_bytes: int) -> int:
    """Device bytes of one layer and sequence for cached rows and the tokens they are of.

    Args:
        rows: Per KV head.
        kv_heads: KV heads.
        token_bytes: Bytes of one token of the layer.
    """
    return rows * (token_bytes + 4 * kv_heads)


RUNGS = (
    Rung("4k4v", 4, 64),
    Rung("3k3v", 3, 64),
    Rung("2k2v", 2, 256),
    Rung("2k+clusters", 2, 256, clustered=True),
    Rung("clusters", 0, 256, clustered=True, faithful=False),
)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How close mode fast stays to attention over everything.

    Attributes:
        kl: Kullback-Leibler divergence of the next token in nats, mean.
        same_top: Share of steps in which the most likely token is the same.
    """

    kl: float
    same_top: float


# By rung, with as many exact tokens as it has by itself: the worse of two real models over 7,168 and 16,384 tokens, each
# the mean of 1,000 steps in float32 (`benchmarks/fidelity.json`; a test compares the two). Others were not measured so.
FIDELITY = {
    "4k4v": Fidelity(2.6e-5, 0.998),
    "3k3v": Fidelity(2.2e-4, 0.998),
    "2k2v": Fidelity(1.5e-3, 0.989),
}


def fidelity_of(rung: Rung | None, asked: int | str) -> Fidelity | None:
    """What was measured of a rung; None where nothing was.

    Args:
        rung: In use; None where every token is attended to exactly.
        asked: Exact tokens per KV head, as in the config. More than were measured come at least as close.
    """
    if rung is None:
        return Fidelity(0.0, 1.0)
    return FIDELITY.get(rung.name) if rung.selected(asked) >= rung.tokens else None


def scratch_bytes(query_heads: int, value_dim: int, tokens: int) -> int:
    """Device bytes of one sequence that a decode step needs besides: parts that wait to be merged, a logarithm each.

    One layer's serve all.

    Args:
        query_heads: Query heads.
        value_dim: Head size of the values.
        tokens: Attended to exactly per KV head.
    """
    # The last part of the tail may be a short one.
    parts = WINDOW_PARTS + tokens // ROWS + tokens // SELECTED_BLOCKS + 1
    # Of each selected token its number, its block's, and those of all tokens of a block that may be among the best.
    return query_heads * ((value_dim + 2) * 4 * parts + 4 * (2 + BLOCK) * max(tokens, ROWS) + 4)


def scratch_token_bytes(query_heads: int, value_dim: int) -> int:
    """Further ones of each token: its scores, its share of what its block comes to and of a part of the tail."""
    return query_heads * (3 + -(-value_dim * 4 // TAIL_TOKENS))


def _padded(head_size: int) -> int:
    return max(64, 1 << (head_size - 1).bit_length())
