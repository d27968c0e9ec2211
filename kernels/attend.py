"""How is one part of attention computed fast? By the fastest stock kernel that returns the log-sum-exp.

The log-sum-exp is what makes a part mergeable, and torch's public `scaled_dot_product_attention` does not
return it; the operators below it do. What no stock kernel computes (a softcap, odd head sizes) runs as the
reference in blocks of bounded memory. The reference is `offload.kernels.reference.attend`.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from offload.kernels import reference
from offload.kernels.merge import RunningMerge
from offload.kernels.reference import Part, with_sink_logits

# Bytes of float32 logits that the blocked reference holds at a time. 64 MiB keep its peak under a tenth of a
# chunk's activations for an 8B model; larger blocks were not faster on a CPU.
_BLOCK_BYTES = 64 * 2**20


class Backend(enum.Enum):
    """Who computes a part."""

    FLASH = "flash"
    EFFICIENT = "memory-efficient"
    CPU = "cpu flash"
    BLOCKED = "blocked reference"


def backend_for(
    query: Tensor, key: Tensor, value: Tensor, *, masked: bool, softcap: float | None
) -> Backend:
    """Which backend `attend` uses for these operands.

    Args:
        query: [B, H_q, Q, D].
        key: [B, H_kv, N, D].
        value: [B, H_kv, N, D_v].
        masked: Whether there is a mask or a bias.
        softcap: The logit cap, if any.

    Returns:
        The fastest backend that computes exactly this.
    """
    head_size = query.shape[-1]
    if softcap is not None or head_size != value.shape[-1]:
        return Backend.BLOCKED
    if query.device.type == "cpu":
        return Backend.CPU
    if query.device.type != "cuda":
        return Backend.BLOCKED
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and not masked and head_size % 8 == 0 and head_size <= 256:
        return Backend.FLASH
    return Backend.EFFICIENT if head_size % 8 == 0 else Backend.BLOCKED


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Part:
    """Attends with every query to every visible key of one set.

    Args:
        query: [B, H_q, Q, D], floating.
        key: [B, H_kv, N, D], the dtype of `query`, last stride 1; any other strides, batch stride 0 too.
        value: [B, H_kv, N, D_v], likewise.
        scale: Factor on the dot products.
        causal: Query i sees keys up to i + N - Q.
        mask: Boolean, broadcastable to [B, 1, Q, N]; True where a key is visible.
        bias: Floating, broadcastable to [B, H_q, Q, N]; added to the scaled logits.
        softcap: Logits become softcap * tanh(logits / softcap) before bias and mask.
        sink_logits: [H_q]: one logit per head without a value. In a merge exactly one part may have them.

    Returns:
        The part: `out` in the dtype of `query`, `lse` float32 [B, H_q, Q].

    Raises:
        ValueError: H_q is not a multiple of H_kv, or the operands' devices or dtypes differ.

    Source: `offload.kernels.reference.attend`, which computes the same.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads do not divide into {key.shape[1]} KV heads")
    if (
        not query.dtype == key.dtype == value.dtype
        or not query.device == key.device == value.device
    ):
        raise ValueError(
            f"query, key and value differ: {query.dtype} on {query.device}, {key.dtype} on {key.device}, "
            f"{value.dtype} on {value.device}"
        )
    n_queries, n_keys = query.shape[2], key.shape[2]
    if n_keys == 0:
        empty = Part(
            query.new_zeros((*query.shape[:3], value.shape[-1])),
            torch.full(query.shape[:3], -torch.inf, device=query.device),
        )
        return empty if sink_logits is None else with_sink_logits(empty, sink_logits)
    if causal and n_queries == 1:
        causal = False  # the only query is the last one: it sees everything
    backend = backend_for(
        query, key, value, masked=mask is not None or bias is not None, softcap=softcap
    )
    # Every stock kernel but flash aligns a causal mask to the first key; ours is aligned to the last one. A mask of keys
    # alone goes beside a square causal one, which then needs no queries times keys of memory.
    rows = [t.shape[-2] for t in (mask, bias) if t is not None and t.dim() > 1]
    apart = n_queries != n_keys or any(n > 1 for n in rows)
    if causal and apart and backend in (Backend.EFFICIENT, Backend.CPU):
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        seen = seen.tril(n_keys - n_queries)
        mask = seen if mask is None else mask & seen
        causal = False
    if backend is Backend.FLASH:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )[:2]
        part = Part(out, lse)
    elif backend is Backend.EFFICIENT:
        part = _attend_efficient(query, key, value, scale, causal, mask, bias)
    elif backend is Backend.CPU:
        part = _attend_cpu(query, key, value, scale, causal, mask, bias)
    else:
        part = _attend_blocked(query, key, value, scale, causal, mask, bias, softcap)
    return part if sink_logits is None else with_sink_logits(part, sink_logits)


def _additive(mask: Tensor | None, bias: Tensor | None, like: Tensor, n_keys: int) -> Tensor:
    """Mask and bias as one additive tensor [..., N] whose rows start at multiples of 16 values.

    The memory-efficient kernel wants aligned rows; torch's public function pads, the operator does not.
    """
    shapes = [t.shape for t in (mask, bias) if t is not None]
    shape = (*torch.broadcast_shapes(*shapes)[:-1], n_keys)
    padded = like.new_zeros((*shape[:-1], -(-n_keys // 16) * 16))[..., :n_keys]
    if bias is not None:
        padded += bias.to(like.dtype)
    return padded if mask is None else padded.masked_fill_(~mask, -torch.inf)


def _without_dead_queries(part: Part, additive: Tensor | None, *, causal: bool) -> Part:
    """Gives queries that see no key zeros and -inf: stock kernels leave NaN or an lse of 0 there.

    Args:
        part: Of a stock kernel.
        additive: Mask and bias, [..., Q or 1, N].
        causal: The kernel was causal as well; then Q = N, and `additive` has one row.
    """
    if additive is None:
        return part
    visible = ~additive.isneginf()
    # A causal query i sees keys up to i.
    seen = visible.cumsum(dim=-1).squeeze(-2) > 0 if causal else visible.any(dim=-1)
    dead = ~seen.expand(part.lse.shape)
    return Part(
        part.out.masked_fill(dead.unsqueeze(-1), 0.0), part.lse.masked_fill(dead, -torch.inf)
    )


def _as_4d(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))


def _attend_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Part:
    batch, n_heads, n_queries, head_size = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    groups = n_heads // kv_heads
    additive = None
    if mask is not None or bias is not None:
        mask = None if mask is None else _as_4d(mask)
        bias = None if bias is None else _as_4d(bias)
        additive = _additive(mask, bias, query, n_keys)
    whole = additive
    one_row = additive is None or (additive.shape[1] == 1 and additive.shape[2] == 1)
    # The kernel knows no GQA. Where every query of a group sees the same keys, the group's queries are more
    # queries of the KV head; else the heads are repeated (only the chunk's own keys take that way).
    if groups > 1 and not causal and one_row:
        folded = query.reshape(batch, kv_heads, groups * n_queries, head_size)
    else:
        folded = query
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    if additive is not None:
        additive = additive.expand(batch, folded.shape[1], folded.shape[2], n_keys)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        folded, key, value, additive, True, 0.0, causal, scale=scale
    )[:2]
    lse = lse[..., : folded.shape[2]]  # the kernel pads queries to a multiple of 32
    part = Part(
        out.reshape(batch, n_heads, n_queries, head_size), lse.reshape(batch, n_heads, n_queries)
    )
    return _without_dead_queries(part, whole, causal=causal)


def _attend_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Part:
    batch, _, n_queries, _ = query.shape
    additive = None
    if mask is not None or bias is not None:
        mask = None if mask is None else _as_4d(mask)
        additive = _additive(mask, None if bias is None else _as_4d(bias), query, key.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key,
        value,
        0.0,
        causal,
        attn_mask=None if additive is None else additive.expand(batch, -1, n_queries, -1),
        scale=scale,
    )
    return _without_dead_queries(Part(out, lse), additive, causal=causal)


def _attend_blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
) -> Part:
    """The reference over blocks of queries and keys, each block's logits within `_BLOCK_BYTES`."""
    batch, n_heads, n_queries, _ = query.shape
    n_keys = key.shape[2]
    rows = batch * n_heads * 4
    query_block = max(1, min(n_queries, _BLOCK_BYTES // (rows * min(n_keys, 1024))))
    key_block = max(1, min(n_keys, _BLOCK_BYTES // (rows * query_block)))
    outs, all_lse = [], []
    for q0 in range(0, n_queries, query_block):
        q1 = min(q0 + query_block, n_queries)
        running = RunningMerge()
        last_key = q1 + n_keys - n_queries if causal else n_keys
        for k0 in range(0, max(last_key, 1), key_block):
            k1 = min(k0 + key_block, n_keys)
            visible = _cut(mask, q0, q1, k0, k1)
            if causal:
                seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device)
                seen = seen.tril(n_keys - n_queries + q0 - k0)
                visible = seen if visible is None else visible & seen
            running.add(
                reference.attend(
                    query[:, :, q0:q1],
                    key[:, :, k0:k1],
                    value[:, :, k0:k1],
                    scale=scale,
                    mask=visible,
                    bias=_cut(bias, q0, q1, k0, k1),
                    softcap=softcap,
                )
            )
        part = running.result(query.dtype)
        outs.append(part.out)
        all_lse.append(part.lse)
    return Part(torch.cat(outs, dim=2), torch.cat(all_lse, dim=2))


def _cut(tensor: Tensor | None, q0: int, q1: int, k0: int, k1: int) -> Tensor | None:
    """The block of a mask or bias whose query or key axis may be of size one."""
    if tensor is None:
        return None
    tensor = _as_4d(tensor)
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, q0:q1]
    return tensor[..., k0:k1] if tensor.shape[3] > 1 else tensor
