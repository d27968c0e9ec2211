"""A measurement says where it was made."""

from __future__ import annotations

import platform

import pytest
import torch
import transformers

import offload
from offload import environment
from offload.hardware import Card


def test_versions_are_those_that_run() -> None:
    found = environment.versions()
    assert found["offload"] == offload.__version__
    assert found["python"] == platform.python_version()
    assert found["transformers"] == transformers.__version__
    assert str(torch.__version__).startswith(str(found["torch"]))


def test_what_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-distribution",))
    assert environment.versions()["no-such-distribution"] is None


def test_a_card_is_told_with_its_link_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(
        name="NVIDIA GeForce RTX 4090", total=24 * 2**30, free=2**34, driver="580", pcie_generation=4,
        pcie_width=16, power_limit_w=450.0, most_clock_mhz=3105, most_memory_clock_mhz=10501,
    )  # fmt: skip
    monkeypatch.setattr(environment, "local_card", lambda: card)
    found = environment.environment()
    assert (found["card"], found["card_bytes"], found["driver"]) == (card.name, card.total, "580")
    assert (found["pcie_generation"], found["pcie_width"]) == (4, 16)
    assert (found["power_limit_w"], found["most_clock_mhz"]) == (450.0, 3105)
    assert found["cpu_threads"] == torch.get_num_threads()
    monkeypatch.setattr(environment, "local_card", lambda: None)
    assert environment.environment()["card"] is None
