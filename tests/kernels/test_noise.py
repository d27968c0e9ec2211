"""What rounding is expected to do to an output is what it does, and `combine` adds up what the reference says."""

from __future__ import annotations

import pytest
import torch
from cards import DEVICES

from offload.kernels import reference
from offload.kernels.combine import combine, empty_partials
from offload.kernels.noise import Noise, empty_noise, key_noise, squared_error, value_noise
from offload.kernels.reference import BLOCK, Codes, dequantize_keys, dequantize_values

ON = pytest.mark.parametrize("device", DEVICES)
BITS = pytest.mark.parametrize("bits", [4, 3, 2])
SCALE = 0.125


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, some channels of them much larger than others."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * (torch.randn(shape[-1], generator=random) + 0.2)


def replica_of(
    keys: torch.Tensor, values: torch.Tensor, bits: int
) -> tuple[tuple[Codes, Codes], Noise]:
    coded = (
        reference.quantize_keys(keys, bits=bits),
        reference.quantize_values(values, bits=bits),
    )
    of_values = value_noise(coded[1], bits=bits, head_size=values.shape[-1])
    return coded, Noise(key_noise(coded[0], bits=bits).mean(2), of_values.mean(2))


@BITS
def test_errors_of_codes_are_as_large_as_expected(bits: int) -> None:
    keys, values = rows(2, 40 * BLOCK, 2, 80), rows(2, 40 * BLOCK, 2, 80, seed=1)
    codes = reference.quantize_keys(keys, bits=bits)
    off = dequantize_keys(codes, bits=bits, head_size=80) - keys.transpose(1, 2)
    found = key_noise(codes, bits=bits)
    assert found.shape == (2, 2, 40, 128)
    assert bool((found[..., 80:] == 0).all())
    torch.testing.assert_close(found.mean(2)[..., :80], off.square().mean(2), rtol=0.15, atol=0.0)
    coded = reference.quantize_values(values, bits=bits)
    off = dequantize_values(coded, bits=bits, head_size=80) - values.transpose(1, 2)
    norm, error = value_noise(coded, bits=bits, head_size=80).mean(2).unbind(-1)
    torch.testing.assert_close(norm, values.square().sum(-1).mean(1), rtol=0.5 / bits, atol=0.0)
    torch.testing.assert_close(error, off.square().sum(-1).mean(2), rtol=0.15, atol=0.0)


@BITS
@pytest.mark.parametrize("exact", [0, 60, 1024])
def test_the_expected_error_is_that_of_attention_over_codes(exact: int, bits: int) -> None:
    """Where it is known what share each token has, and which are exact does not depend on their scores."""
    n, heads = 32 * BLOCK, 64
    keys, values = rows(1, n, 1, 64), rows(1, n, 1, 64, seed=1)
    query = rows(1, heads, 64, seed=2).unsqueeze(2)
    coded, noise = replica_of(keys, values, bits)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:exact].view(1, 1, -1)
    scores = reference.scan(query[:, :, 0], coded[0], bits=bits, scale=SCALE)
    held, of_held = (x.transpose(1, 2)[:, :, chosen.flatten()] for x in (keys, values))
    parts = [reference.tail(scores, chosen, coded[1], bits=bits, head_size=64)]
    if exact:
        parts.append(reference.attend(query, held, of_held, scale=SCALE))
    got = reference.merge(parts)
    want = reference.attend(query, keys.transpose(1, 2), values.transpose(1, 2), scale=SCALE)
    shares = torch.exp(reference.unselected(scores, chosen) - got.lse)

    def expected(shares: torch.Tensor, skipped: float = 0.0) -> float:
        gone = torch.full((1, heads), skipped)
        square, size = squared_error(query[:, :, 0], got.out[:, :, 0], shares, gone, noise, scale=SCALE)  # fmt: skip
        torch.testing.assert_close(size, got.out.square().sum(-1).mean())
        return float(square.sqrt())

    happened = float((got.out - want.out).square().sum(-1).mean().sqrt())
    assert 0.9 < expected(shares) / happened < 2.6
    # What is known of blocks only is not less, and what is skipped costs at least its share of a value.
    blocks = shares.unflatten(-1, (-1, BLOCK)).sum(-1)
    assert expected(blocks) > expected(shares)
    assert expected(shares, 0.5) > 0.5 * float(noise.values[0, 0, 0].sqrt())


@ON
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("size", "value_dim", "groups"), [(64, 64, 1), (80, 96, 3)])
def test_combine_adds_up_what_the_reference_says(
    size: int, value_dim: int, groups: int, sinks: bool, device: str
) -> None:
    random = torch.Generator().manual_seed(3)
    batch, kv_heads, slots, tail_at = 2, 2, 21, 9
    heads = kv_heads * groups

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device)

    partials = empty_partials(batch, heads, slots, value_dim, torch.device(device))
    partials.out.copy_(draw(*partials.out.shape))
    partials.lse.copy_(draw(*partials.lse.shape) * 2)
    partials.lse[:, :, ::4] = -torch.inf
    partials.out[:, :, ::4] = torch.nan
    partials.lse[1, 0] = -torch.inf  # a head that sees nothing
    query = draw(batch, 1, heads, size).transpose(1, 2)[:, :, 0]
    noise = empty_noise(batch, kv_heads, 128 if size > 64 else 64, torch.device(device))
    noise.keys[..., :size] = draw(batch, kv_heads, size).abs()
    noise.values.copy_(draw(batch, kv_heads, 2).abs())
    skipped = draw(batch, heads, 5).abs() * 0.01
    logits = draw(heads) if sinks else None
    stats = torch.ones(4, device=device)
    out = torch.empty((batch, heads, value_dim), device=device)
    for _ in range(2):
        combine(
            partials, out, sink_logits=logits, stats=stats, skipped=skipped, query=query, noise=noise,
            scale=SCALE, tail_at=tail_at,
        )  # fmt: skip
    lse = partials.lse.logsumexp(-1)
    if logits is not None:
        lse = torch.logaddexp(lse, logits)
    shares = torch.exp(partials.lse - lse.unsqueeze(-1)).nan_to_num(0.0)[..., tail_at:]
    want = torch.stack([shares.sum(-1).mean(), skipped.sum(-1).mean()])
    more = squared_error(query, out, shares, skipped.sum(-1), noise, scale=SCALE)
    torch.testing.assert_close(stats, 1 + 2 * torch.cat([want, more]), atol=1e-4, rtol=1e-4)


def test_sums_without_what_they_are_made_of_are_refused() -> None:
    partials = empty_partials(1, 2, 3, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="skipped shares"):
        combine(partials, torch.empty(1, 2, 64), stats=torch.zeros(4))
