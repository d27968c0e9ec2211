"""Keys, values and queries of a real model, read once for all tests of a process."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from offload.index.base import Floats, Vectors
from offload.loading import load

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))

from _vectors import record  # noqa: E402

SCALE = 0.125


class Head(NamedTuple):
    """One KV head of the bundled model that reads the README.

    Attributes:
        keys: float16 [1280, 64]
        values: float16 [1280, 64]
        late: float16 [M, 64]: queries of the later half of the context.
        steps: float32 [4, G, 64]: queries of tokens behind it.
    """

    keys: Vectors
    values: Vectors
    late: Vectors
    steps: Floats


@cache
def heads() -> list[Head]:
    """Some heads, spread over the layers."""
    loaded = load(None, dtype=torch.float32, device="cpu")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:1632]])
    got = record(loaded.model, ids, 1600, everything=True)
    return [
        Head(
            got["keys"][h, 64:1344].numpy(),
            got["values"][h, 64:1344].numpy(),
            got["prompt_queries"][h, 800:].flatten(0, 1).numpy(),
            got["queries"][h, ::8].float().numpy(),
        )
        for h in range(0, 24, 5)
    ]
