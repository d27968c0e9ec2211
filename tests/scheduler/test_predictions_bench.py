"""Bars of the predictions bench are of the settings that ran, and what other benches put into its file stays."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    sys.path.insert(0, str(BENCH))
    return runpy.run_path(str(BENCH / "predictions.py"))


def row(at: int, error: float, planned: int = 100, peak: int = 100) -> dict[str, Any]:
    return {
        "what": f"setting {at}", "step_error": error, "planned_bytes": planned, "peak_bytes": peak,
        "bytes_error": abs(planned / peak - 1),
    }  # fmt: skip


def test_a_setting_that_failed_does_not_count(bench: dict[str, Any]) -> None:
    rows = [row(i, 0.01 * i) for i in range(12)] + [{"what": "another", "failed": "it raised"}]
    found = bench["bars"](rows)
    assert found["step_settings"] == 12
    assert found["step_error_median"] == pytest.approx(0.055)
    assert found["step_error_max"] == pytest.approx(0.11)


def test_too_few_settings_have_no_median(bench: dict[str, Any]) -> None:
    found = bench["bars"]([row(i, 0.0) for i in range(11)])
    assert "step_error_median" not in found
    assert found["step_settings"] == 11


def test_what_was_planned_too_small_is_counted(bench: dict[str, Any]) -> None:
    found = bench["bars"]([row(0, 0.0, 99, 100), row(1, 0.0, 102, 100), row(2, 0.0)])
    assert found["bytes_under"] == 1
    assert found["bytes_error_max"] == pytest.approx(0.02)


def test_other_parts_of_the_file_stay_and_settings_that_ran_again_are_as_they_are_now(
    bench: dict[str, Any],
) -> None:
    record = bench["Record"]("scheduler", settings={}, rows=[row(0, 0.1)])
    earlier = {
        "environment": {"commit": "before"}, "settings": {},
        "rows": [{"what": "hidden"}, row(0, 0.5), row(1, 0.2, 99)],
        "bars": {"hidden_vs_fetch_32k_mha": 1.3, "step_error_max": 0.5, "bytes_under": 7},
    }  # fmt: skip
    both = bench["whole"](record, earlier)
    assert [one["what"] for one in both.rows] == ["hidden", "setting 1", "setting 0"]
    assert both.bars["hidden_vs_fetch_32k_mha"] == 1.3
    assert both.bars["bytes_under"] == 1
    assert "step_error_max" not in both.bars
    assert [one["what"] for one in record.rows] == ["setting 0"]


def test_there_are_enough_settings_and_their_names_differ(bench: dict[str, Any]) -> None:
    names = [setting.name for setting in bench["SETTINGS"]]
    assert len(set(names)) == len(names) > bench["LEAST"]
