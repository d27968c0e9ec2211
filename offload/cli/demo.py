"""`offload demo`: a real model answers from a long document with most of its KV cache on the host.

The same question is then asked with the in-memory cache of transformers, and the tokens compared.
"""

from __future__ import annotations

import importlib.resources
import time
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from offload.cli.text import encoded, no_bars, printer, progress, read_text, shows_progress
from offload.errors import InputError
from offload.units import duration, gib

if TYPE_CHECKING:
    import torch

    from offload.loading import Loaded
    from offload.report import Report

# In the public domain, the same on every machine, and it holds the answer: "such Trial shall be held
# in the State where the said Crimes shall have been committed" (Article III, section 2). Of some
# thirty questions about it and about Python's own manual, this is the one that SmolLM2-135M answers
# rightly, in its own words, and the same way however the lines are broken.
DOCUMENT: Final = "constitution.txt"
DOCUMENT_TITLE: Final = "The Constitution of the United States, Articles I to III"
QUESTION: Final = "Where must the trial of a crime be held?"
QUESTION_OF_ANY: Final = "What is this text about?"

KV_SHARE: Final = 0.3  # of the KV cache, in the default budget
THIRD: Final = 1 / 3  # what the demo promises to stay under


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One answer, and its times as a streamer sees them.

    Attributes:
        tokens: The new ones, without the prompt.
        first_s: From the call to the first token: the prefill, and what goes with it.
        per_token_s: Mean of the tokens after the first. None if there is only one.
    """

    tokens: list[int]
    first_s: float
    per_token_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the demo found; `--json` prints these fields.

    Attributes:
        prompt_tokens: Document, question and chat template together.
        gpu_memory: The device budget: bytes, or the text that was given.
        kv_bytes: Keys and values of all tokens, as the in-memory cache held them at its end.
        kv_tokens: Tokens in the cache at the end.
        tokens_on_device: Of these, in device memory.
        tokens_on_host: Of these, in host memory.
        same_tokens: Whether both caches gave the same tokens.
        first_difference: Where they part: an index of new tokens, from 0. None if nowhere.
        report: `Report.to_dict()` of our run.
    """

    model: str
    dtype: str
    device: str
    load_s: float
    document: str
    question: str
    prompt_tokens: int
    gpu_memory: int | str
    kv_bytes: int
    kv_tokens: int
    tokens_on_device: int
    tokens_on_host: int
    answer: str
    offload: Run
    in_memory: Run
    same_tokens: bool
    first_difference: int | None
    seconds: float
    report: dict[str, Any]


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder with a config.json, a .gguf file, or a hub name."
            " Without it: SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="A text file in UTF-8, read whole. Without it: a public-domain text of 5,000 tokens.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What to ask about the document.", show_default=False)
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="Device budget for everything, for example 1GiB."
            " Without it: one that holds 30% of the KV cache.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 96,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about a long document with most of the KV cache in host memory.

    Then ask again with the in-memory cache and compare the tokens. Exit code 1 if they differ.
    """
    outcome = run(
        model,
        document=document,
        question=question,
        gpu_memory=gpu_memory,
        max_new_tokens=max_new_tokens,
        show=not json,
    )
    if json:
        inputs = {
            "model": model,
            "document": None if document is None else str(document),
            "question": question,
            "gpu_memory": gpu_memory,
            "max_new_tokens": max_new_tokens,
        }
        print(dumps({"schema_version": 1, "command": "demo", "inputs": inputs, **asdict(outcome)}))
    if not outcome.same_tokens:
        raise typer.Exit(1)


def run(
    model: str | None,
    *,
    document: Path | None,
    question: str | None,
    gpu_memory: str | None,
    max_new_tokens: int,
    show: bool,
) -> Outcome:
    """Loads, answers under the budget, answers in memory, compares.

    Args:
        model: As `offload.loading.load` takes it.
        document: A text file. None: the one that comes with offload.
        question: None: one that fits the document.
        gpu_memory: The device budget. None: the smallest that holds `KV_SHARE` of the KV cache.
        max_new_tokens: Of each of the two answers.
        show: Print what happens to stdout as it happens, the answer token by token.

    Raises:
        InputError: The model or document cannot be read, or the model is too short for it.
    """
    started = time.perf_counter()
    title, text = _read(document)
    question = question or (QUESTION if document is None else QUESTION_OF_ANY)

    progress(f"Loading {model or 'SmolLM2-135M-Instruct'} (the first time takes longer) ...")
    from offload.loading import load

    # The small default model runs in float32 everywhere: bfloat16 rounds differently for every
    # shape of a matrix product, and a near tie between two tokens may then fall either way.
    with no_bars():
        loaded = load(model, dtype="float32" if model is None else None)
    prompt = _prompt(loaded, text, question)
    _check_length(loaded, prompt["input_ids"].shape[1], max_new_tokens)
    if show:
        _print_header(loaded, title, prompt["input_ids"].shape[1], question)

    ours = _answer_offloaded(loaded, prompt, gpu_memory, max_new_tokens, show=show)
    progress("\nThe same with the in-memory cache of transformers, to compare ...")
    stock = _answer_in_memory(loaded, prompt, max_new_tokens)

    difference = _first_difference(ours.run.tokens, stock.run.tokens)
    outcome = Outcome(
        model=loaded.source,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        load_s=loaded.seconds,
        document=title,
        question=question,
        prompt_tokens=prompt["input_ids"].shape[1],
        gpu_memory=ours.gpu_memory,
        kv_bytes=stock.kv_bytes,
        kv_tokens=ours.report.tokens_on_device + ours.report.tokens_on_host,
        tokens_on_device=ours.report.tokens_on_device,
        tokens_on_host=ours.report.tokens_on_host,
        answer=str(loaded.tokenizer.decode(ours.run.tokens, skip_special_tokens=True)),
        offload=ours.run,
        in_memory=stock.run,
        same_tokens=difference is None,
        first_difference=difference,
        seconds=time.perf_counter() - started,
        report=ours.report.to_dict(),
    )
    if show:
        print(f"\n{ours.report.summary}\n")
        print(render(outcome))
    return outcome


def render(outcome: Outcome) -> str:
    """The lines after the report's table: how much lay where, both speeds, and the verdict."""
    lines = [
        f"KV cache   {gib(outcome.kv_bytes, digits=2)} for {outcome.kv_tokens:,} tokens:"
        f" {_share(outcome.tokens_on_device, outcome)} on the device,"
        f" {_share(outcome.tokens_on_host, outcome)} on the host",
        f"Speed      offload    {_speed(outcome.offload)}",
        f"           in memory  {_speed(outcome.in_memory)}",
    ]
    if outcome.tokens_on_device >= THIRD * outcome.kv_tokens:
        lines.append(
            "Note       This budget holds a third of the KV cache or more: a longer document or a"
            " smaller --gpu-memory shows the point better."
        )
    n = len(outcome.offload.tokens)
    verdict = "same tokens as the in-memory cache:"
    if outcome.first_difference is None:
        lines.append(f"{verdict} yes ({n} of {n})")
    else:
        lines.append(f"{verdict} no, they differ from new token {outcome.first_difference + 1} on")
        if outcome.dtype != "float32":
            lines.append(
                f"In {outcome.dtype} the stock model's own tokens change with the shape of its"
                " matrix products where two are nearly tied; float32 has no such ties."
            )
    return "\n".join(lines)


class _Offloaded(NamedTuple):
    run: Run
    report: Report
    gpu_memory: int | str


class _InMemory(NamedTuple):
    run: Run
    kv_bytes: int


class _Streamer:
    """Notes when tokens come, and passes them on. Counts what `generate` gives to any streamer.

    It is handed the prompt first, then each new token.
    """

    def __init__(self, text: Any = None) -> None:
        self._text = text
        self._started = time.perf_counter()
        self._puts: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._puts.append(time.perf_counter())
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        if self._text is not None:
            self._text.end()

    def run(self, tokens: list[int]) -> Run:
        times = self._puts[1:] or [time.perf_counter()]
        later = len(times) - 1
        return Run(
            tokens=tokens,
            first_s=times[0] - self._started,
            per_token_s=(times[-1] - times[0]) / later if later else None,
        )


def _answer_offloaded(
    loaded: Loaded,
    prompt: dict[str, Any],
    gpu_memory: str | None,
    max_new_tokens: int,
    *,
    show: bool,
) -> _Offloaded:
    import offload

    n_prompt = prompt["input_ids"].shape[1]
    budget: int | str
    if gpu_memory is not None:
        budget = gpu_memory
    else:
        with offload.attach(loaded.model, mode="exact", gpu_memory="auto") as runtime:
            budget = runtime.budget_for(
                kv_share=KV_SHARE, prompt_tokens=n_prompt, new_tokens=max_new_tokens
            )
    with offload.attach(
        loaded.model, mode="exact", gpu_memory=budget, progress=shows_progress()
    ) as runtime:
        if show:
            shown = f"{gib(budget, digits=2)} of" if isinstance(budget, int) else f"{budget} as"
            print(f"Budget     {shown} device memory, for weights, work and KV cache")
            print("Answer     ", end="", flush=True)
        streamer = _Streamer(printer(loaded) if show else None)
        ids = runtime.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
        return _Offloaded(streamer.run(ids[0, n_prompt:].tolist()), runtime.report(), budget)


def _answer_in_memory(loaded: Loaded, prompt: dict[str, Any], max_new_tokens: int) -> _InMemory:
    from transformers import DynamicCache

    from offload.cache import CACHE

    cache = DynamicCache(config=loaded.model.config)
    streamer = _Streamer()
    model: Any = loaded.model  # its `generate` is typed for streamers that derive from BaseStreamer
    ids = model.generate(
        **prompt,
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    n_prompt = prompt["input_ids"].shape[1]
    # A layer of linear attention has neither.
    kv = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    kv_bytes = sum(x.nbytes for x in kv if x is not None)
    return _InMemory(streamer.run(ids[0, n_prompt:].tolist()), kv_bytes)


def _read(document: Path | None) -> tuple[str, str]:
    """Title and text. A document of the user's is taken whole."""
    if document is None:
        data = importlib.resources.files("offload") / "data" / DOCUMENT
        return DOCUMENT_TITLE, data.read_text(encoding="utf-8").strip()
    return document.name, read_text(document)


def _prompt(loaded: Loaded, text: str, question: str) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, [1, N], by the model's chat template if it has one."""
    asked = f"{text}\n\nAnswer this question about the text above in one sentence. {question}"
    if loaded.tokenizer.chat_template is None:
        progress("The model has no chat template: it is asked in plain text.")
        return encoded(loaded, f"{asked}\nAnswer:", chat=False)
    return encoded(loaded, asked, chat=True)


def _check_length(loaded: Loaded, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses what is beyond the model's positions: nothing is cut, and the answer would be noise."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and prompt_tokens + max_new_tokens > longest:
        raise InputError(
            f"The prompt has {prompt_tokens:,} tokens and the answer may take {max_new_tokens:,},"
            f" but {loaded.source} was made for {longest:,} in all",
            asked=prompt_tokens + max_new_tokens,
            there=longest,
            change="Give a shorter document, or a --model with a longer context.",
        )


def _first_difference(ours: list[int], stock: list[int]) -> int | None:
    """Index of the first new token that differs, or at which one of the answers has ended."""
    if ours == stock:
        return None
    pairs = zip(ours, stock, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(stock)))


def _print_header(loaded: Loaded, title: str, prompt_tokens: int, question: str) -> None:
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    copied = " from its copy in the cache folder" if loaded.from_copy else ""
    print(
        f"Model      {loaded.source}, {dtype}, on {loaded.model.device},"
        f" loaded in {duration(loaded.seconds)}{copied}"
    )
    print(f"Document   {title}; {prompt_tokens:,} tokens with the question")
    print(f"Question   {question}", flush=True)


def _share(tokens: int, outcome: Outcome) -> str:
    return f"{tokens:,} ({tokens / max(outcome.kv_tokens, 1):.0%})"


def _speed(run: Run) -> str:
    after = "" if run.per_token_s is None else f", then {duration(run.per_token_s)} per token"
    return f"{duration(run.first_s)} to the first token{after}"
