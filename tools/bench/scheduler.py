"""Do the scheduler's decisions pay? Measured on real models, a decision against its absence.

- `ladder`: KL(dense || ours) in nats of the next token with each layer's bits chosen by what the prompt says, against one
  rung everywhere, under the same device budget. Mode fast through the product, in float32, one token at a time behind a
  context (`tools/fidelity.py`).

    python tools/bench/scheduler.py --model smollm2@2048 --model qwen.gguf@2048
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _record import Record, arguments, parse
from fidelity import Case, behind_context, dense, divergence, fed, prepare

import offload
from offload.scheduler.layout import REPLICA_WINDOW

UNIFORM = ("3k3v", "4k4v")  # the bar is that of the first


@torch.no_grad()
def decoded(case: Case, **settings: Any) -> dict[str, Any]:
    """Logits [steps, V] of mode fast, and how its cache was laid out."""
    common: dict[str, Any] = {"window": REPLICA_WINDOW, "chunk": 512, "staging": "2MiB"}
    with offload.attach(case.model, mode="fast", capture=False, **common, **settings) as runtime:
        began = time.perf_counter()
        cache = behind_context(runtime, case)
        seconds = time.perf_counter() - began
        steps = range(case.context, case.ids.shape[1])
        logits = [fed(case, cache, at).logits[0].float().cpu() for at in steps]
        layout = cache.layout
        assert layout is not None
        found = {
            "device_bytes": layout.device_bytes, "replica_bytes": layout.device["replica"],
            "bits": [16 if i in layout.whole else rung.bits for i, rung in enumerate(layout.rungs)],
            "exact_tokens": [rung.tokens for rung in layout.rungs],
            "prefill_s": seconds,
        }  # fmt: skip
    return {"logits": torch.cat(logits), **found}


def measure_ladder(
    record: Record, models: list[str], context: int, steps: int, rungs: list[str]
) -> None:
    """Against one rung everywhere, under the device budget that it needs."""
    ratios = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for given in models:
        source, _, asked = given.partition("@")
        case = prepare(source, int(asked or context), steps, torch.float32, device)
        want, _, _ = dense(case, step=steps)
        for rung in rungs:
            uniform = decoded(case, rung=rung)
            budget = uniform["device_bytes"]
            ladder = decoded(case, gpu_memory=budget, ladder=True)
            kl = []
            for what, found in ((rung, uniform), (f"ladder, bytes of {rung}", ladder)):
                moved = divergence(want, found["logits"], case.model.device)
                kl.append(moved["kl_mean"])
                row = {name: value for name, value in found.items() if name != "logits"}
                record.row(
                    f"{Path(source).name}: {what}", context=case.context, steps=steps, budget=budget, **row, **moved,
                    error="KL in nats, against transformers' own cache",
                )  # fmt: skip
            if rung == rungs[0]:
                ratios.append(kl[1] / kl[0])
        del case, want
        gc.collect()
    record.bars["ladder_vs_uniform_error"] = max(ratios)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", action="append", help="name@context; may be given several times")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--rungs", nargs="+", default=list(UNIFORM), help="of all layers, to compare with"
    )
    parser.add_argument("--steps", type=int, default=128)
    args = parse(parser)
    models = args.model or ["smollm2"]
    if args.smoke:
        args.context, args.steps = 1200, 4
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
    shown = [Path(model).name for model in models]
    record = Record("scheduler", settings={**vars(args), "out": None, "model": shown})
    measure_ladder(record, models, args.context, args.steps, args.rungs)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
