"""How far is mode fast from attention over everything? On real models and a real document, through the product.

The window is that of mode fast. A document is read exactly; behind it, tokens of the document are fed one by one
through the device path, and each next-token distribution is compared with that of transformers' own cache and
attention: KL(dense || ours) in nats.
Settings are written `rung:tokens` (`4k4v:64`), tokens attended to exactly per KV head; `4k4v:0` is what a resident
4-bit KV cache gives. Planted facts are asked for at the end.

    python tools/fidelity.py --model smollm2 --context 7168 --steps 1000 4k4v:0 4k4v:64

A model is a name, folder or GGUF file as `offload.loading.load` takes it; `smollm2` is the bundled one. A context may
follow it: `smollm2@7168`. In bfloat16 rounding alone moves the logits; the row `dense, one token at a time` is that
floor.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from _record import Record, arguments, parse

import offload
from offload.cache import CACHE
from offload.decode import captured_steps
from offload.loading import load
from offload.scheduler.layout import REPLICA_WINDOW

FACTS = {
    "blue box": "7341", "old lighthouse": "2958", "third drawer": "6017", "night train": "4482",
    "garden gate": "9126", "silver key": "3875", "north tower": "5560", "red umbrella": "8243",
}  # fmt: skip
LAYER_STEPS = 8  # steps whose hidden states are compared layer by layer


@dataclass
class Case:
    """A model and a document.

    Attributes:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        ids: [1, context + steps].
        context: Tokens that are read before the first comparison.
        questions: Token ids [1, n] of each fact's question, and the answer's text.
    """

    name: str
    model: Any
    tokenizer: Any
    ids: Tensor
    context: int
    questions: list[tuple[Tensor, str]]

    @property
    def steps(self) -> int:
        return int(self.ids.shape[1]) - self.context


def document(tokenizer: Any, tokens: int, context: int) -> list[int]:
    """Python's standard library, as many tokens as asked, with the facts planted over the first `context` of them."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    pieces: list[int] = []
    facts = [f"\n# Remember: the code of the {k} is {v}.\n" for k, v in FACTS.items()]
    every = context // (len(facts) + 1)
    for file in files:
        if len(pieces) >= tokens:
            break
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            pieces += tokenizer(line, add_special_tokens=False)["input_ids"]
            if facts and len(pieces) >= every * (len(FACTS) - len(facts) + 1):
                pieces += tokenizer(facts.pop(0), add_special_tokens=False)["input_ids"]
            if len(pieces) >= tokens:
                break
    if len(pieces) < tokens:
        raise SystemExit(
            f"the standard library has only {len(pieces)} tokens, {tokens} were asked for"
        )
    return pieces[:tokens]


def prepare(source: str, context: int, steps: int, dtype: torch.dtype, device: str) -> Case:
    loaded = load(None if source == "smollm2" else source, dtype=dtype, device=device)
    tokenizer, model = loaded.tokenizer, loaded.model
    ids = torch.tensor([document(tokenizer, context + steps, context)], device=device)
    questions = []
    for name, code in FACTS.items():
        text = f"\n# Remember: the code of the {name} is"
        found = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        questions.append((found.to(device), code))
    return Case(source, model, tokenizer, ids, context, questions)


def pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, size):
        yield at, min(at + size, stop)


@torch.no_grad()
def dense(case: Case, *, step: int) -> tuple[Tensor, list[Tensor], Any]:
    """Logits [steps, V] on the CPU and hidden states of transformers' own cache, `step` tokens at a time."""
    model, ids = case.model, case.ids
    cache = DynamicCache(config=model.config)
    for a, b in pieces(0, case.context, 1024):
        model(input_ids=ids[:, a:b], **{CACHE: cache}, logits_to_keep=1)
    logits, hidden = [], []
    for a, b in pieces(case.context, ids.shape[1], step):
        out = model(input_ids=ids[:, a:b], **{CACHE: cache}, output_hidden_states=a == case.context)
        logits.append(out.logits[0].float().cpu())
        if a == case.context:
            hidden = [h[0, :LAYER_STEPS].float().cpu() for h in out.hidden_states]
    return torch.cat(logits), hidden, cache


def behind_context(runtime: Any, case: Case) -> Any:
    """A cache of a case's context, as the device path has read it."""
    cache = runtime.new_cache(case.ids.shape[1] + 64)
    runtime.generate(case.ids[:, : case.context], cache=cache, max_new_tokens=1, do_sample=False)
    cache.crop(case.context - cache.get_seq_length())
    return cache


def fed(case: Case, cache: Any, at: int, **more: Any) -> Any:
    """The model's output of one token of a case."""
    position = torch.tensor([[at]], device=case.ids.device)
    return case.model(
        input_ids=case.ids[:, at : at + 1], position_ids=position, **{CACHE: cache}, use_cache=True, **more
    )  # fmt: skip


@torch.no_grad()
def ours(
    case: Case, rung: str, tokens: int, skipped: float, index: str = "replica"
) -> dict[str, Any]:
    """The same through the device path, one token at a time, and the facts."""
    model, ids = case.model, case.ids
    on_card = ids.device.type == "cuda"
    settings: dict[str, Any] = {"mode": "fast", "window": REPLICA_WINDOW, "rung": rung, "retrieved": tokens, "skipped_mass": skipped, "index": index}  # fmt: skip
    with offload.attach(model, **settings, chunk=1024, capture=False) as runtime:
        cache = behind_context(runtime, case)
        logits, hidden = [], []
        began = 0.0

        def feed(at: int, **more: Any) -> Any:
            out = fed(case, cache, at, **more)
            logits.append(out.logits[0].float().cpu())
            return out

        first = case.context
        for at in range(first, min(first + LAYER_STEPS, ids.shape[1])):
            states = feed(at, output_hidden_states=True).hidden_states
            hidden.append([h[0, 0].float().cpu() for h in states])
        with captured_steps(model, cache, compiles=False) as captured:
            began = time.perf_counter()
            for at in range(first + LAYER_STEPS, ids.shape[1]):
                feed(at)
            seconds = time.perf_counter() - began
        paths = [s.path for s in cache.layer_stores if s.path]
        stats = torch.stack([path.stats.cpu() for path in paths]).mean(0)
        estimate = statistics.mean(path.error_estimate() for path in paths)
        answers = []
        for question, _ in case.questions:
            asked = torch.cat([ids, question], dim=1)
            out = runtime.generate(
                asked, cache=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            answers.append(out[0, asked.shape[1] :].tolist())
        assert not on_card or captured.replays > 0, captured.reason
    return {
        "logits": torch.cat(logits), "answers": answers,
        "hidden": [torch.stack(layer) for layer in zip(*hidden, strict=True)],
        "tail_mass": float(stats[0]) / case.steps, "skipped_mass": float(stats[1]) / case.steps,
        "error_estimate": None if math.isnan(estimate) else estimate, "ms_per_step": 1000 * seconds / max(1, case.steps - LAYER_STEPS),
    }  # fmt: skip


@torch.no_grad()
def dense_answers(case: Case, cache: Any) -> list[list[int]]:
    answers = []
    for question, _ in case.questions:
        length = cache.get_seq_length()
        asked = torch.cat([case.ids, question], dim=1)
        out = case.model.generate(
            asked, **{CACHE: cache}, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, asked.shape[1] :].tolist())
        cache.crop(length - cache.get_seq_length())
    return answers


def right(case: Case, answers: list[list[int]]) -> int:
    """Answers that name the planted code."""
    pairs = zip(answers, case.questions, strict=True)
    return sum(code in case.tokenizer.decode(answer) for answer, (_, code) in pairs)


def divergence(want: Tensor, got: Tensor, device: torch.device) -> dict[str, float]:
    """Of next-token distributions: KL(want || got) in nats and how often the best token is the same."""
    kl = []
    for a, b in zip(want.split(64), got.split(64), strict=True):
        p, q = (logits.to(device).double().log_softmax(-1) for logits in (a, b))
        kl.append((p.exp() * (p - q)).sum(-1).cpu())
    all_kl = torch.cat(kl).clamp(min=0)
    return {
        "kl_mean": float(all_kl.mean()), "kl_median": float(all_kl.median()),
        "kl_999": float(all_kl.quantile(0.999)), "kl_max": float(all_kl.max()),
        "same_top": float((want.argmax(-1) == got.argmax(-1)).float().mean()),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "settings", nargs="*", default=["4k4v:0", "4k4v:64", "3k3v:64", "2k2v:256"],
        help="rung:tokens, or rung:tokens:index where the host searches",
    )  # fmt: skip
    parser.add_argument("--model", action="append", help="may be given several times")
    parser.add_argument("--context", type=int, default=7168)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--skipped-mass", type=float, default=0.001)
    args = parse(parser)
    models = args.model or ["smollm2"]
    if args.smoke:
        args.context, args.steps, args.settings = 900, 12, ["4k4v:16"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    if dtype == torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = False
    record = Record("fidelity", settings={**vars(args), "out": None, "model": [Path(m).name for m in models]})  # fmt: skip
    worst: dict[str, float] = {}
    ratios = []
    for given in models:
        source, _, context = given.partition("@")
        name = Path(source).name
        case = prepare(source, int(context or args.context), args.steps, dtype, device)
        want, hidden, cache = dense(case, step=256)
        answers = dense_answers(case, cache)
        del cache
        record.row(
            f"{name}: dense", tokens=case.context, steps=case.steps, dtype=args.dtype,
            facts_right=right(case, answers), facts=len(FACTS), model_type=case.model.config.model_type,
            parameters=sum(p.numel() for p in case.model.parameters()),
        )  # fmt: skip
        if dtype != torch.float32:
            other, _, _ = dense(case, step=1)
            record.row(
                f"{name}: dense, one token at a time", **divergence(want, other, case.model.device)
            )
        mean = {}
        for setting in args.settings:
            rung, tokens, *index = setting.split(":")
            got = ours(case, rung, int(tokens), args.skipped_mass, *index)
            found = divergence(want, got["logits"], case.model.device)
            layers = [
                float((a - b).norm() / b.norm()) for a, b in zip(got["hidden"], hidden, strict=True)
            ]
            record.row(
                f"{name}: {setting}", **found,
                facts_right=right(case, got["answers"]),
                facts_same=sum(a == b for a, b in zip(got["answers"], answers, strict=True)),
                tail_mass=got["tail_mass"], skipped_mass=got["skipped_mass"],
                error_estimate=got["error_estimate"], ms_per_step=got["ms_per_step"], layer_error=layers,
                layer_error_mean=statistics.mean(layers[1:]),
            )  # fmt: skip
            mean[setting] = found["kl_mean"]
            worst[setting] = max(worst.get(setting, 0.0), found["kl_mean"])
            gc.collect()
        if "4k4v:0" in mean and "4k4v:64" in mean:
            ratios.append(mean["4k4v:0"] / mean["4k4v:64"])
        del case, want, hidden
        gc.collect()
        for setting, bar in (("4k4v:64", "kl_default"), ("3k3v:64", "kl_3k3v"), ("2k2v:256", "kl_2k2v_256")):  # fmt: skip
            if setting in worst:
                record.bars[bar] = worst[setting]
        if ratios:
            record.bars["resident4bit_vs_ours_kl"] = min(ratios)
        print(
            f"written to {record.write(args.out).name}", flush=True
        )  # the next may not fit the time


if __name__ == "__main__":
    main()
