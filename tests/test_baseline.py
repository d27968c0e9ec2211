"""Rows against those of an earlier run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from offload.baseline import Change, change, read_baseline
from offload.errors import InputError

GOOD: dict[str, Any] = {
    "schema_version": 1,
    "command": "bench",
    "inputs": {"model": "tiny", "dtype": "float32", "seed": 0, "prompt_file": None, "settings": {"memory.gpu": "1GiB"}},
    "environment": {"date": "2026-01-01", "torch": "2.12.0", "card": None},
    "rows": [
        {"mode": "exact", "test": "tg8", "samples": [{"tokens": 8, "seconds": 1.0}, {"tokens": 8, "seconds": 2.0}]},
        {"mode": "exact", "test": "pp8", "samples": []},
    ],
}  # fmt: skip


def write(folder: Path, found: object) -> Path:
    file = folder / "first.json"
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    return file


def test_the_deviation_is_pooled_over_both_runs() -> None:
    found = change([10.0, 12.0], [5.0, 6.0, 7.0])
    assert (found.then, found.now) == (11.0, 6.0)
    assert found.deviation == pytest.approx(math.sqrt((1 * 2 + 2 * 1) / 3))
    assert found.share == pytest.approx(-5 / 11)


@pytest.mark.parametrize(
    ("now", "slower"), [(8.0, False), (7.9, True), (10.0, False), (15.0, False)]
)
def test_slower_is_by_more_than_two_deviations(now: float, slower: bool) -> None:
    assert Change(then=10.0, now=now, deviation=1.0).is_slower is slower


def test_of_single_runs_nothing_is_said_to_be_slower() -> None:
    found = change([10.0], [1.0])
    assert found.deviation is None
    assert not found.is_slower
    assert change([10.0, 10.0], [1.0]).is_slower
    assert not change([10.0, 10.0], [10.0]).is_slower


def test_a_baseline_has_the_rates_of_every_measured_row(tmp_path: Path) -> None:
    found = read_baseline(write(tmp_path, GOOD))
    assert found.name == "first.json"
    assert found.rates == {("exact", "tg8"): [8.0, 4.0]}
    again = found.change("exact", "tg8", [3.0, 3.0])
    assert again is not None
    assert again.share == -0.5
    assert found.change("exact", "pp8", [3.0]) is None
    assert found.change("fast", "tg8", [3.0]) is None


def test_what_was_another_then_is_named_but_for_the_date(tmp_path: Path) -> None:
    found = read_baseline(write(tmp_path, GOOD))
    assert found.differences(GOOD["inputs"], GOOD["environment"] | {"date": "2026-02-02"}) == {}
    inputs = GOOD["inputs"] | {"dtype": "bfloat16", "settings": {"cache.window": 64}}
    environment = GOOD["environment"] | {"torch": "2.13.0", "driver": "580"}
    assert found.differences(inputs, environment) == {
        "dtype": ("float32", "bfloat16"),
        "torch": ("2.12.0", "2.13.0"),
        "driver": (None, "580"),
        "memory.gpu": ("1GiB", "default"),
        "cache.window": ("default", 64),
    }


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("{", "no JSON"),
        ([], "no result of offload bench"),
        (GOOD | {"command": "plan"}, "no result of offload bench"),
        (GOOD | {"schema_version": 2}, "Update offload"),
        (GOOD | {"schema_version": None}, "Write one"),
        (GOOD | {"rows": [{"mode": "exact"}]}, "KeyError: 'samples'"),
        (GOOD | {"rows": 3}, "TypeError"),
        (GOOD | {"rows": [{"mode": "exact", "test": "tg8", "samples": [{"tokens": 8, "seconds": 0}]}]}, "ZeroDivision"),
    ],
)  # fmt: skip
def test_what_is_no_baseline_is_refused(found: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_baseline(write(tmp_path, found))
    assert "first.json" in str(caught.value.asked)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_baseline(tmp_path / "nowhere.json")
