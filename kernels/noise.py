"""How far may the output of a step be off? By what rounding keys and values is expected to do to it.

A step weighs token i of the tail by exp(score + e_i) and gives it the value v_i + d_i: its score and its value come from
codes. Let w'_i be that weight and w_i the right one, 0 and the right one for a token that is skipped, both as shares of
all that the step has summed up. Of the outputs o and o' then

    o' - o = sum over the tail of (w'_i - w_i) (v_i - o) + w'_i d_i      exactly.

Rounding errors are taken for independent and even, of a mean square of step^2 / 12. So e_i is normal, of the variance
s = scale^2 sum_d q_d^2 step_d^2 / 12. Of w'_i a part of 1 - exp(-s / 2) is too much on average, and of w'_i^2 a part of
1 - exp(-s) is scatter. With p = sum w'_i, c = sum w'_i^2, g the share that was skipped, and V^2 and E^2 the mean squares
of the norm of a value and of that of its error,

    |o' - o|^2 ~ c E^2 + 2 (c (1 - exp(-s)) + (p (1 - p) (1 - exp(-s / 2)) + g)^2) V^2:

what is too much in all of the tail matters as far as other tokens are attended to, and 2 V^2 is how far a value is from
an output that is as long and has nothing in common with it.

It is an estimate and no bound, but it errs upwards. Only the shares of parts of the tail are known, and the sum of their
squares stands for c. Values do have something in common with the output, which is shorter than they are. And
tokens whose scores came out much too high are selected and weighed exactly, so that those of the tail are not too high by
as much. What may exceed it are errors that many tokens share: no mean over tokens takes them away.

Where only means of clusters are kept, nothing says how far a row is from them: there is no estimate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offload.kernels.reference import (
    BLOCK,
    GROUP,
    KEYS,
    VALUES,
    Codes,
    dequantize_values,
)


class Noise(NamedTuple):
    """Mean squares over the blocks that a step may read.

    Attributes:
        keys: float32 [B, H_kv, D_p]: of the error of a key's channel.
        values: float32 [B, H_kv, 2]: of the norm of a value, and of its error's.
    """

    keys: Tensor
    values: Tensor


def empty_noise(batch: int, kv_heads: int, width: int, device: torch.device) -> Noise:
    """Zeros.

    Args:
        batch: Sequences.
        kv_heads: KV heads.
        width: D_p, the padded head size of keys.
        device: Where.
    """
    return Noise(
        torch.zeros((batch, kv_heads, width), device=device),
        torch.zeros((batch, kv_heads, 2), device=device),
    )


def key_noise(keys: Codes, *, bits: int) -> Tensor:
    """Mean square error of each channel of low-bit keys.

    Args:
        keys: Codes of n blocks.
        bits: Of the codes.

    Returns:
        float32 [B, H_kv, n, D_p].
    """
    slope = keys.meta[..., 1, :].float().flatten(3)
    return slope.mul_(KEYS.unit(bits)).square_().div_(12)


def value_noise(values: Codes, *, bits: int, head_size: int) -> Tensor:
    """Mean squares of the norms of low-bit values and of their errors, block by block.

    Args:
        values: Codes of n blocks.
        bits: Of the codes.
        head_size: D_v.

    Returns:
        float32 [B, H_kv, n, 2].
    """
    rows = dequantize_values(values, bits=bits, head_size=head_size)
    norm = rows.square().sum(-1).unflatten(-1, (-1, BLOCK)).mean(-1)
    step = values.meta[..., 1, :].float() * VALUES.unit(bits)  # [.., D_p / GROUP, BLOCK / 4, 4]
    each = step.square().mean((-2, -1)) / 12
    groups = torch.arange(each.shape[-1], device=each.device)
    channels = (head_size - GROUP * groups).clamp(0, GROUP)  # of the head, not behind it
    return torch.stack([norm, (each * channels).sum(-1)], dim=-1)


def squared_error(
    query: Tensor,
    out: Tensor,
    shares: Tensor,
    skipped: Tensor,
    noise: Noise,
    *,
    scale: float,
) -> Tensor:
    """What `offload.kernels.combine` adds to its sums: the formula above.

    Args:
        query: [B, H_q, D].
        out: [B, H_q, D_v], of the step.
        shares: [B, H_q, n]: of all weights, of parts of the tail.
        skipped: [B, H_q]: share that was skipped.
        noise: Of the tail.
        scale: Factor on the dot products.

    Returns:
        float32 [2]: the estimate's square and that of the output's norm, means over B and H_q.
    """
    groups = query.shape[1] // noise.keys.shape[1]
    of_keys = noise.keys[..., : query.shape[-1]].repeat_interleave(groups, dim=1)
    norm, error = noise.values.repeat_interleave(groups, dim=1).unbind(-1)
    spread = (query.float().square() * of_keys).sum(-1) * scale**2
    tail, square = shares.sum(-1), shares.square().sum(-1)
    off = tail * (1 - tail) * (1 - torch.exp(-0.5 * spread)) + skipped
    factor = square * (1 - torch.exp(-spread)) + off.square()
    size = out.float().square().sum(-1)
    return torch.stack([2 * factor * norm + square * error, size]).mean((1, 2))
