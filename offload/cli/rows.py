"""How are the rows of `offload bench` printed? As a table of Markdown, CSV, one JSON object, or a JSON object a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from offload.baseline import SCHEMA, Baseline, Change
from offload.bench import Fidelity, Row
from offload.units import duration, gib

_MARK = "!"


class Form(StrEnum):
    """What is printed."""

    MD = "md"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Everything that is printed of a run.

    Attributes:
        inputs: What was asked, resolved.
        environment: Where it ran.
        rows: Those that are there.
        notes: What a reader has to know of them.
        baseline: An earlier run to compare with.
        interrupted: Whether further rows were asked for.
    """

    inputs: dict[str, Any]
    environment: dict[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str]
    baseline: Baseline | None = None
    interrupted: bool = False

    def change(self, row: Row) -> Change | None:
        """A row against the baseline's; None where one of them was not measured."""
        if self.baseline is None or not row.samples:
            return None
        rates = [sample.tokens_per_s for sample in row.samples]
        return self.baseline.change(row.mode, row.case.name, rates)


def render(result: Result, form: Form) -> str:
    """A result as text, without a newline at its end.

    Args:
        result: What was measured.
        form: Which.
    """
    made = {Form.MD: _markdown, Form.CSV: _csv, Form.JSON: _json, Form.JSONL: _json_lines}
    return made[form](result)


def notes_of(rows: Sequence[Row], *, repetitions: int, random: bool) -> list[str]:
    """What a reader has to know of rows: how they were timed, what was not, what stands in for something else.

    Args:
        rows: Of one run.
        repetitions: Of each.
        random: Whether their tokens are random ones.
    """
    capture_s = sum(sample.capture_s for row in rows for sample in row.samples)
    took = f" ({duration(capture_s)} in counted runs)" if capture_s else ""
    notes = [
        f"mean ± standard deviation of {repetitions}, after a warm-up that is not counted",
        f"not timed: loading, tokenising, reading the tokens before a test, compiling and capturing{took}",
    ]
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        same = [row for row in rows if row.reason == reason]
        names = ", ".join(f"{row.mode} {row.case.name}" for row in same)
        notes.append(f"{same[0].status}: {names}: {reason}")
    if any(not row.goes_back for row in rows):
        notes.append(
            "this model's cache cannot go back: the tokens before a test were read anew for each run"
        )
    if random and any(row.fidelity.steps == "verified" for row in rows if row.samples):
        notes.append(
            "the tokens are random, and how often drafts agree on these says nothing of a text: --prompt-file"
        )
    said = (note for row in rows for note in row.notes)
    return [*notes, *dict.fromkeys(said)]


def line_of(row: Row) -> str:
    """A row on one line, for progress."""
    if not row.samples:
        return f"{row.mode} {row.case.name}: {row.status}"
    return f"{row.mode} {row.case.name}: {_rate(row)} tokens/s, {row.ms_per_token:.2f} ms a token"


def _markdown(result: Result) -> str:
    head = ["model", "size", "params", "mode", "rung", "test", "t/s", "ms/token", "device", "host", "fidelity"]  # fmt: skip
    if result.baseline is not None:
        head.append(f"against {result.baseline.name}")
    table = [head, *(_cells(result, row) for row in result.rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    right = {"size", "params", "test", "t/s", "ms/token", "device", "host", head[-1]} - {"fidelity"}
    rule = ["-" * (width - 1) + (":" if name in right else "-") for name, width in zip(head, widths, strict=True)]  # fmt: skip
    lines = []
    for cells in (head, rule, *table[1:]):
        padded = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, cells, widths, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    if result.baseline is not None and any(_is_slower(result, row) for row in result.rows):
        then = result.baseline.name
        lines += ["", f"{_MARK} slower than in {then} by more than two standard deviations"]
    lines += ["", *(f"note: {note}" for note in result.notes), _where(result.environment)]
    if result.interrupted:
        lines.append("interrupted: there were further tests")
    return "\n".join(lines)


def _cells(result: Result, row: Row) -> list[str]:
    subject = row.subject
    cells = [subject.name, gib(subject.weights_bytes), _count(subject.parameters), row.mode, row.rung or "-", row.case.name]  # fmt: skip
    if row.samples:
        peak = "" if row.peak_bytes is None else f", peak {gib(row.peak_bytes, digits=2)}"
        cells += [
            _rate(row), f"{row.ms_per_token:.2f}", gib(row.device_bytes, digits=2) + peak, gib(row.host_bytes, digits=2),
            _fidelity(row.fidelity),
        ]  # fmt: skip
    else:
        cells += [row.status, "-", "-", "-", "-"]
    if result.baseline is not None:
        cells.append(_change(result, row))
    return cells


def _change(result: Result, row: Row) -> str:
    assert result.baseline is not None
    if not row.samples:
        return "-"
    change = result.change(row)
    if change is None:
        return "not there"
    mark = f" {_MARK}" if change.is_slower else ""
    return f"{100 * change.share:+.1f} %{mark}"


def _is_slower(result: Result, row: Row) -> bool:
    change = result.change(row)
    return change is not None and change.is_slower


def _rate(row: Row) -> str:
    return f"{row.tokens_per_s:.2f} ± {row.deviation:.2f}"


def _fidelity(found: Fidelity) -> str:
    if found.accepted_per_pass is not None:
        return f"exact, {found.accepted_per_pass:.1f} drafted tokens kept a pass"
    if found.left_out is not None:
        return f"{found.left_out:.2%} left out"
    if found.tail_mass is None or found.skipped_mass is None:
        return "exact"
    error = "unknown" if found.error_estimate is None else f"{found.error_estimate:.2%}"
    return f"{found.tail_mass:.2%} by the replica, {found.skipped_mass:.3%} skipped, error {error}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _where(environment: dict[str, Any]) -> str:
    """The environment on a line."""
    known = {name: value for name, value in environment.items() if value is not None}
    words = [f"{name} {known[name]}" for name in ("offload", "torch", "transformers", "triton") if name in known]  # fmt: skip
    if "card" in known:
        words.append(f"{known['card']}, driver {known['driver']}")
        if "pcie_generation" in known and "pcie_width" in known:
            words.append(f"PCIe {known['pcie_generation']} x{known['pcie_width']}")
        if "power_limit_w" in known:
            words.append(f"{known['power_limit_w']:.0f} W")
    else:
        threads = known["cpu_threads"]
        words.append(f"{known.get('cpu', 'CPU')}, {threads} thread{'s' if threads > 1 else ''}")
    return ", ".join(words)


def _as_object(result: Result, row: Row) -> dict[str, Any]:
    found = row.to_dict()
    if result.baseline is not None:
        change = result.change(row)
        found["baseline"] = None if change is None else change.to_dict()
    return found


def _head(result: Result) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA, "command": "bench", "inputs": result.inputs, "environment": result.environment,
    }  # fmt: skip


def _json(result: Result) -> str:
    rows = [_as_object(result, row) for row in result.rows]
    more = {"rows": rows, "notes": list(result.notes), "interrupted": result.interrupted}
    return json.dumps(_head(result) | more, indent=1)


def _json_lines(result: Result) -> str:
    objects = [
        {"type": "run", **_head(result)},
        *({"type": "row", **_as_object(result, row)} for row in result.rows),
        *({"type": "note", "text": note} for note in result.notes),
        {"type": "end", "interrupted": result.interrupted},
    ]
    return "\n".join(json.dumps(each) for each in objects)


def _csv(result: Result) -> str:
    rows = [_flat(result, row) for row in result.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().rstrip("\n")


def _flat(result: Result, row: Row) -> dict[str, Any]:
    """A row without its samples and notes, tables within it as columns."""
    flat: dict[str, Any] = {}
    for name, value in _as_object(result, row).items():
        if isinstance(value, dict):
            for inner, of_inner in value.items():
                flat[f"{name}_{inner.removeprefix(f'{name}_')}"] = of_inner
        elif name == "samples":
            flat["repetitions"] = len(value)
        elif name not in (
            "notes",
            "fidelity",
            "baseline",
        ):  # tables that a row without samples lacks
            flat[name] = value
    return flat
