"""The decode benchmark's recorded vectors: a model that plays them attends as the recorded one did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import AttentionInterface

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "bench"))
from _vectors import places, played, record

from offload.loading import load

CONTEXT, STEPS = 1200, 30


def recorded(size: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    return {
        "keys": torch.randn(8, CONTEXT + STEPS, size, generator=random),
        "queries": torch.randn(8, STEPS, 3, size, generator=random),
        "context": CONTEXT,
    }


def test_the_ends_of_the_recorded_context_stand_once_and_its_middle_again_and_again() -> None:
    at = places(5000, CONTEXT, CONTEXT + STEPS).tolist()
    assert at[:64] == list(range(64))
    assert at[5000 - 1024 : 5000 + STEPS] == list(range(CONTEXT - 1024, CONTEXT + STEPS))
    assert at[5000 + STEPS : 5000 + 2 * STEPS] == list(range(CONTEXT, CONTEXT + STEPS))
    middle = at[64 : 5000 - 1024]
    assert set(middle) == set(range(64, CONTEXT - 1024))
    assert middle[: CONTEXT - 1024 - 64] == middle[CONTEXT - 1024 - 64 : 2 * (CONTEXT - 1024 - 64)]


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_model_attends_with_the_scores_that_were_recorded(repeats: int) -> None:
    model: Any = FAMILIES["llama"].build()
    config = model.config
    kv_heads, size = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // kv_heads
    vectors = recorded(size // repeats)
    scores: dict[int, torch.Tensor] = {}

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        scores[module.layer_idx] = query @ key.repeat_interleave(groups, 1).mT * kwargs["scaling"]
        return value.repeat_interleave(groups, 1).transpose(1, 2), None

    AttentionInterface.register("seen", attention)
    plain = model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits
    usual = config._attn_implementation
    model.set_attn_implementation("seen")
    length = 1500
    with played(model, vectors, length):
        position = torch.tensor([[length - 3, length, length + 2]])
        model(input_ids=torch.ones_like(position), position_ids=position)
    model.set_attn_implementation(usual)
    assert torch.equal(model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits, plain)
    at = torch.tensor([CONTEXT - 3, CONTEXT, CONTEXT + 2])
    steps = torch.tensor([STEPS - 3, 0, 2])
    for layer, got in scores.items():
        for head in range(config.num_attention_heads):
            of = layer % (8 // kv_heads) * kv_heads + head // groups
            query = vectors["queries"][of, steps, head % groups % 3]
            want = query @ vectors["keys"][of, at].T * (size // repeats) ** -0.5
            torch.testing.assert_close(got[0, head], want, rtol=1e-4, atol=1e-4)


def test_what_is_recorded_is_behind_the_position_embedding() -> None:
    model = load(None, dtype=torch.float32, device="cpu").model
    ids = torch.arange(1120)[None] * 37 % 40_000
    got = record(model, ids, 1100, everything=True)
    assert got["keys"].shape == got["values"].shape == (24, 1120, 64)
    assert got["prompt_queries"].shape == (24, 1100, 3, 64)
    assert got["queries"].shape == (24, 20, 3, 64)
    assert len(set(got["layers"])) == 24
    assert bool(got["keys"].isfinite().all())
    # A real model looks at few tokens: its queries point at some keys far more than at others.
    scores = torch.einsum("htgd,hkd->htgk", got["queries"].float(), got["keys"][:, :1100].float())
    mass = (scores * 64**-0.5).softmax(-1).sort(-1, descending=True).values
    assert float(mass[..., :110].sum(-1).mean()) > 0.8
    # The context's own queries stand before the others: each points at the first token, as the others do.
    first = got["prompt_queries"][:, -20:].float() @ got["keys"][:, None, :1].float().mT
    assert float((first - scores[..., :1]).abs().mean() / scores[..., :1].std()) < 1
    # Without everything the same is recorded, and no more.
    less = record(model, ids, 1100)
    assert set(got) - set(less) == {"values", "prompt_queries"}
    assert torch.equal(less["queries"], got["queries"])
    assert torch.equal(less["keys"], got["keys"])
    with pytest.raises(SystemExit, match="1,088"):
        record(model, ids, 1000)
