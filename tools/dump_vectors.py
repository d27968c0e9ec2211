"""What do keys, queries and values of a real model look like, behind the position embedding? A file of them.

A model reads a document (Python's standard library, see `tools/fidelity.py`). Of some KV heads, spread over its layers, the
keys and values of all tokens are written, and the queries of all heads that share them: those of the context apart from
those of the tokens behind it, which stand for decode queries and which no index may be built from.

    python tools/dump_vectors.py --model smollm2 --context 7800 --steps 128 vectors.npz

The file is of NumPy, without pickle: keys and values float16 [heads, context + steps, D], prompt_queries float16 [heads,
context, G, D], decode_queries float16 [heads, steps, G, D], layers int64 [heads], about (JSON). Scores of attention are
inner products divided by the root of D.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "bench"))
from _vectors import record
from fidelity import document

from offload.loading import load


def vectors(source: str, context: int, steps: int, device: str = "cpu") -> dict[str, NDArray[Any]]:
    """The arrays of the file.

    Args:
        source: A model as `offload.loading.load` takes it, or `smollm2`, the bundled one.
        context: Tokens that are read before the first decode query.
        steps: Decode queries.
        device: Where the model runs, in float32.
    """
    loaded = load(None if source == "smollm2" else source, dtype=torch.float32, device=device)
    longest = loaded.model.config.max_position_embeddings
    if context + steps > longest:
        raise SystemExit(
            f"the model reads {longest:,} tokens, {context + steps:,} were asked for; lower --context"
        )
    ids = torch.tensor([document(loaded.tokenizer, context + steps, context)], device=device)
    found = record(loaded.model, ids, context, everything=True)
    about = {"model": Path(source).name, "context": context, "steps": steps, "dtype": "float32"}
    return {
        "keys": found["keys"].numpy(),
        "values": found["values"].numpy(),
        "prompt_queries": found["prompt_queries"].numpy(),
        "decode_queries": found["queries"].numpy(),
        "layers": np.array(found["layers"]),
        "about": np.array(json.dumps(about)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=7800)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found = vectors(args.model, args.context, args.steps, args.device)
    np.savez(args.file, **found)  # type: ignore[arg-type]  # its stubs take them for `allow_pickle`
    for name, array in found.items():
        print(f"{name:16} {array.dtype} {list(array.shape)}")


if __name__ == "__main__":
    main()
