"""Options that several commands have, declared once: each is the annotation of a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offload.cli.settings import CONFIG_HELP

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A folder, a GGUF file, or a name of the hub. Default: SmolLM2-135M-Instruct.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompt-file", help="A text file in UTF-8, - for standard input."),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", help="What is asked; behind the file, if there is one."),
]
Mode = Annotated[str | None, typer.Option("--mode", help="fast, verified or exact.")]
GpuMemory = Annotated[
    str | None, typer.Option("--gpu-memory", help="Device budget for everything, as in 20GiB.")
]
CpuMemory = Annotated[
    str | None, typer.Option("--cpu-memory", help="Host budget for KV, as in 64GiB.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help=CONFIG_HELP)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the file: --set replica.rung=4k4v."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="bfloat16, float16 or float32. Default: as fits the device."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="The text as it is, without the model's chat template.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
