"""What commands that run a model share: texts, prompts, and what is printed while they run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import InputError

if TYPE_CHECKING:
    from offload.loading import Loaded

# Its level is whether progress is shown: `main` sets it for each run.
PROGRESS = logging.getLogger("offload.cli.progress")
PROGRESS.setLevel(logging.INFO)


def read_text(file: Path, *, raw: bool = False) -> str:
    """A text file, or standard input for `-`, whole.

    Args:
        file: Which.
        raw: As it is; otherwise without white space around it.

    Raises:
        InputError: It is not there, not UTF-8, or empty.
    """
    name = "standard input" if str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode("utf-8")
        text = text if raw else text.strip()
    except OSError as error:
        raise InputError(
            f"{name} cannot be read", asked=name, there=error.strerror, change="Give a text file."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not text in UTF-8",
            asked=name,
            there=f"byte 0x{error.object[error.start]:02x} at {error.start:,}",
            change="Convert it, or give another document.",
        ) from error
    if not text.strip():
        raise InputError(f"{name} is empty", asked=name, change="Give a document with text in it.")
    return text


def prompt_text(file: Path | None, prompt: str | None, *, raw: bool = False) -> str:
    """What is asked: a file, a text, or the text behind the file.

    Args:
        file: Of --prompt-file.
        prompt: Of --prompt.
        raw: The file as it is; otherwise without white space around it.

    Raises:
        InputError: There is neither, or the file cannot be read.
    """
    parts = [] if file is None else [read_text(file, raw=raw)]
    parts += [] if prompt is None else [prompt]
    if not parts:
        raise InputError(
            "There is no prompt", asked=None, there=None, change="Give --prompt or --prompt-file."
        )
    return "\n\n".join(parts)


def require_writable(file: Path) -> None:
    """Raises InputError where a file cannot be, before hours are spent on what is to be in it."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir():
        what = "it is a folder" if file.is_dir() else "its folder is not there"
        raise InputError(
            f"{file} cannot be written: {what}",
            asked=str(file),
            change="Give a path in a folder that exists.",
        )


def encoded(loaded: Loaded, text: str, *, chat: bool) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, [1, N], on the model's device.

    Args:
        loaded: Of the model.
        text: What is asked.
        chat: By the model's chat template, as a user's message.
    """
    tokenizer: Any = loaded.tokenizer
    if chat:
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        made = tokenizer(text, return_tensors="pt")
    device = loaded.model.device
    return {name: made[name].to(device) for name in ("input_ids", "attention_mask")}


def printer(loaded: Loaded) -> Any:
    """Prints an answer to stdout as it comes."""
    from transformers import TextStreamer

    return TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)


def shows_progress() -> bool:
    """Whether progress is shown: not with --quiet."""
    return PROGRESS.isEnabledFor(logging.INFO)


def progress(line: str) -> None:
    """A line on stderr that --quiet leaves out."""
    if shows_progress():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keeps transformers' "Loading weights" bar, which lasts half a second, out of the output.

    With --quiet also the bars of downloads.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    downloads = not shows_progress() and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()
