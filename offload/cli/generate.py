"""`offload generate`: one answer to one prompt, streamed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload.cli.options import (
    ConfigFile,
    CpuMemory,
    Dtype,
    GpuMemory,
    Json,
    Mode,
    Model,
    Prompt,
    PromptFile,
    Raw,
    Sets,
)
from offload.cli.settings import asked
from offload.cli.text import encoded, no_bars, printer, progress, prompt_text, shows_progress
from offload.errors import InputError

if TYPE_CHECKING:
    from offload.compare import Comparison
    from offload.report import Report


def generate(
    model: Model = None,
    prompt_file: PromptFile = None,
    prompt: Prompt = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")
    ] = 512,
    mode: Mode = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    config: ConfigFile = None,
    sets: Sets = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: the most likely token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="With a temperature.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="With a temperature.")
    ] = None,
    dtype: Dtype = None,
    raw: Raw = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Bytes per tier, times and fallbacks, on stderr.")
    ] = False,
    verify: Annotated[
        int,
        typer.Option(
            "--verify", min=0, help="Repeat so many steps exactly and say how close they are."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Answer a prompt, with a KV cache as large as host memory.

    The answer goes to stdout as it comes, everything else to stderr. Nothing of a prompt is ever cut.
    """
    text = prompt_text(prompt_file, prompt, raw=raw)
    settings = asked(config, sets, mode=mode, gpu_memory=gpu_memory, cpu_memory=cpu_memory).config
    settings.require_usable()

    progress(f"Loading {model or 'SmolLM2-135M-Instruct'} ...")
    import torch

    import offload
    from offload.compare import compare
    from offload.loading import load

    with no_bars():
        loaded = load(model, dtype=dtype)
    chat = not raw and loaded.tokenizer.chat_template is not None
    inputs = encoded(loaded, text, chat=chat)
    length = inputs["input_ids"].shape[1]
    call: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        call |= {"temperature": temperature, "top_p": top_p}
    if seed is not None:
        torch.manual_seed(seed)
    comparison: Comparison | None = None
    bar = {} if shows_progress() else {"progress": False}
    with offload.attach(loaded.model, settings, **bar) as runtime:
        cache = runtime.new_cache(max_tokens=length + max_new_tokens)
        shown = None if as_json else printer(loaded)
        sequence = runtime.generate(**inputs, cache=cache, streamer=shown, **call)
        report = runtime.report()
        tokens = sequence[0, length:].tolist()
        said = _why_not_verified(verify, len(tokens), report)
        if verify and not said:
            try:
                comparison = compare(loaded.model, cache, sequence, min(verify, len(tokens) - 1))
            except InputError as error:  # the answer is there all the same
                said = str(error)
    if said:
        print(f"not verified: {said}", file=sys.stderr)
    if stats and not as_json:
        print(f"\n{report.summary}", file=sys.stderr)
    if comparison is not None and not as_json:
        print(_closeness(comparison), file=sys.stderr)
    if as_json:
        found = {
            "schema_version": 1,
            "command": "generate",
            "model": loaded.source,
            "prompt_tokens": length,
            "tokens": tokens,
            "text": str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)),
            "report": report.to_dict(),
            "verified": None if comparison is None else asdict(comparison),
        }
        print(json.dumps(found))


def _why_not_verified(asked: int, tokens: int, report: Report) -> str:
    """Why no step is repeated though that was asked for; empty where some can be."""
    if not asked:
        return ""
    if tokens < 2:
        return "the answer is one token, which the prompt's last pass made"
    if report.mode != "fast" or report.rung is None:
        return "every step was exact"
    return ""


def _closeness(found: Comparison) -> str:
    return (
        f"{found.same_top} of {found.steps} tokens as exact attention has them on top, "
        f"KL {found.kl_mean:.1e} (at most {found.kl_max:.1e})"
    )
