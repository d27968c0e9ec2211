"""`offload bench`: tokens per second, memory and fidelity at several depths, in llama-bench's manner."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from offload.baseline import Baseline, read_baseline
from offload.bench import DOES_NOT_FIT, Case, Row, cases, in_order
from offload.bench import bench as measure
from offload.cli.options import ConfigFile, CpuMemory, Dtype, GpuMemory, Model, Sets
from offload.cli.rows import Form, Result, line_of, notes_of, render
from offload.cli.settings import asked
from offload.cli.text import encoded, no_bars, progress, read_text
from offload.errors import InputError

if TYPE_CHECKING:
    from offload.config import OffloadConfig
    from offload.loading import Loaded

BAD_INPUT, DID_NOT_FIT, INTERRUPTED = 2, 3, 130
_RANGE: Final = re.compile(r"([^-+*]+)(?:-([^-+*]+)(?:([+*])([^-+*]+))?)?")
_MOST: Final = 256  # counts of one list: more were not meant


def bench(
    model: Model = None,
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", help="Tokens to read: 512,2K or 512-4K*2; 0: none.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", help="Tokens to generate, likewise.")
    ] = "128",
    n_depth: Annotated[
        str,
        typer.Option(
            "-d", "--n-depth", help="Tokens in the cache before, likewise: 0,32K or 0-64K+32K."
        ),
    ] = "0",
    mode: Annotated[
        str | None, typer.Option("--mode", help="fast, verified, exact: one or a list.")
    ] = None,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, help="Counted runs of each test.")
    ] = 5,
    delay: Annotated[
        float, typer.Option("--delay", min=0.0, help="Seconds between two tests.")
    ] = 0.0,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", help="The text that is read. Default: random tokens."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="What -o json printed before, to compare with."),
    ] = None,
    output: Annotated[
        Form | None, typer.Option("-o", "--output", help="On stdout. Default: md.")
    ] = None,
    output_err: Annotated[
        Form | None,
        typer.Option("-oe", "--output-err", help="The same on stderr, in another form."),
    ] = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    config: ConfigFile = None,
    sets: Sets = None,
    dtype: Dtype = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of random tokens.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
) -> None:
    """Time reading (pp) and generating (tg) tokens, at several depths and in several modes.

    What does not fit is a row that says so; the exit code is 3 if nothing fits. Ctrl-C prints the rows that are there.
    """
    form = _form(output, as_json=as_json)
    tests = cases(token_counts(n_prompt), token_counts(n_gen), token_counts(n_depth))
    if not tests:
        raise InputError("There is nothing to time", asked="-p 0 -n 0", change="Give -p or -n.")
    configs = _configs(mode, config, sets or [], gpu_memory=gpu_memory, cpu_memory=cpu_memory)
    before = None if baseline is None else read_baseline(baseline)
    text = None if prompt_file is None else read_text(prompt_file)

    progress(f"Loading {model or 'SmolLM2-135M-Instruct'} ...")
    from offload.environment import environment
    from offload.loading import load

    with no_bars():
        loaded = load(model, dtype=dtype)
    wanted: dict[str, Any] = {
        "repetitions": repetitions, "delay_s": delay, "seed": seed,
        "prompt_file": None if prompt_file is None else str(prompt_file),
    }  # fmt: skip
    inputs = _inputs(loaded, tests, configs) | wanted
    where = environment()
    if before is not None:
        _tell_differences(before, inputs, where)
    rows, ended = _measured(loaded, tests, configs, text, wanted)
    interrupted = isinstance(ended, KeyboardInterrupt)
    notes = notes_of(rows, repetitions=repetitions, random=text is None)
    result = Result(
        inputs=inputs, environment=where, rows=rows, notes=notes, baseline=before, interrupted=interrupted
    )  # fmt: skip
    if ended is None or interrupted or (rows and not as_json):  # an error is an object, and one
        _print(result, form, output_err)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if ended is not None:
        raise ended
    if not any(row.samples for row in rows):
        refused = any(row.status == DOES_NOT_FIT for row in rows)
        raise typer.Exit(DID_NOT_FIT if refused else BAD_INPUT)


def token_counts(text: str) -> list[int]:
    """A list of token counts as llama-bench takes it: `0,32K`, `512-2K+512`, `8K-128K*2`.

    Args:
        text: Counts and ranges with commas between them. A range without a step goes up by one.

    Returns:
        Every count, in the order given.

    Raises:
        InputError: Another form, or a range that does not end or has very many counts.
        ConfigError: Something in it is no number of tokens.
    """
    counts: list[int] = []
    for part in text.split(","):
        counts += _range_of(part.strip(), text)
        if len(counts) > _MOST:
            raise InputError(
                "These are very many token counts",
                asked=text,
                there=f"at most {_MOST}",
                change="Give the range a step: 0-128K+32K, or a factor: 8K-128K*2.",
            )
    return counts


def _range_of(part: str, text: str) -> list[int]:
    from offload.units import parse_tokens

    found = _RANGE.fullmatch(part)
    if found is None:
        raise InputError(
            f"{part!r} is neither a number of tokens nor a range",
            asked=text,
            change="Write 512, 0,32K, 512-2K+512 or 8K-128K*2.",
        )
    first = parse_tokens(found[1].strip(), at_least=0)
    if found[2] is None:
        return [first]
    last = parse_tokens(found[2].strip(), at_least=0)
    step = 1 if found[4] is None else parse_tokens(found[4].strip(), at_least=0)
    counts, count = [first], first
    while len(counts) <= _MOST:
        count = count * step if found[3] == "*" else count + step
        if count <= counts[-1] or last < first:
            raise InputError(
                f"The range {part!r} does not go up",
                asked=text,
                change="Write first-last+step or first-last*factor.",
            )
        if count > last:
            break
        counts.append(count)
    return counts


def _form(output: Form | None, *, as_json: bool) -> Form:
    if as_json and output not in (None, Form.JSON):
        raise InputError(
            "--json and -o ask for two forms",
            asked=f"--json -o {output}",
            change="Give one of them; -oe prints a second form on stderr.",
        )
    return Form.JSON if as_json else output or Form.MD


def _configs(
    mode: str | None,
    file: Path | None,
    sets: list[str],
    *,
    gpu_memory: str | None,
    cpu_memory: str | None,
) -> list[OffloadConfig]:
    """One configuration for each mode, checked."""
    modes = [None] if mode is None else [name.strip() for name in mode.split(",")]
    configs = [
        asked(file, sets, mode=name, gpu_memory=gpu_memory, cpu_memory=cpu_memory).config
        for name in dict.fromkeys(modes)
    ]
    for config in configs:
        config.require_usable()
    return configs


def _inputs(loaded: Loaded, tests: list[Case], configs: list[OffloadConfig]) -> dict[str, Any]:
    settings = {each.key: each.value for each in configs[0].settings() if each.is_set and each.key != "mode"}  # fmt: skip
    return {
        "model": loaded.source,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "n_prompt": list(dict.fromkeys(case.prompt for case in tests if case.prompt)),
        "n_gen": list(dict.fromkeys(case.generated for case in tests if case.generated)),
        "n_depth": list(dict.fromkeys(case.depth for case in tests)),
        "modes": [config.mode for config in configs],
        "settings": settings,
    }


def _tell_differences(before: Baseline, inputs: dict[str, Any], where: dict[str, Any]) -> None:
    for name, (then, now) in before.differences(inputs, where).items():
        progress(f"not as in {before.name}: {name} was {then}, is {now}")


def _measured(
    loaded: Loaded, tests: list[Case], configs: list[OffloadConfig], text: str | None, wanted: dict[str, Any]
) -> tuple[list[Row], BaseException | None]:  # fmt: skip
    """The rows that are there, in the order asked for, and what ended the run before its time."""
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        progress(line_of(row))

    ended: BaseException | None = None
    try:
        ids = None if text is None else encoded(loaded, text, chat=False)["input_ids"]
        with _said_once():
            measure(
                loaded.model, tests, configs=configs, name=loaded.source, ids=ids, seed=wanted["seed"],
                repetitions=wanted["repetitions"], delay_s=wanted["delay_s"], on_row=keep, tell=progress,
            )  # fmt: skip
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - raised again behind the rows
        ended = error
    return in_order(rows, tests), ended


def _print(result: Result, form: Form, on_stderr: Form | None) -> None:
    print(render(result, form), flush=True)
    if on_stderr is not None:
        print(render(result, on_stderr), file=sys.stderr, flush=True)
    if form is Form.CSV and on_stderr is None:  # has no place for them
        for note in result.notes:
            progress(f"note: {note}")


@contextmanager
def _said_once() -> Iterator[None]:
    """Within, a warning that each of many runs would give is given once."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        new = line not in said
        said.add(line)
        return new

    handlers = list(logging.getLogger("offload").handlers)
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)
