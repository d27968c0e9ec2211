"""What the doctor says of machines that lack something."""

from __future__ import annotations

import json
from typing import Any

import pytest

from offload import cli, doctor
from offload.doctor import Check, diagnose
from offload.hardware import Card, local_card

CARD = Card(
    name="NVIDIA GeForce RTX 4090", total=24 * 2**30, free=23 * 2**30, driver="580.1",
    pcie_generation=4, pcie_width=16, most_pcie_width=16,
)  # fmt: skip


def with_card(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    monkeypatch.setattr(doctor, "local_card", lambda: card)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_machine_without_a_card_is_ready_and_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, None)
    found = diagnose()
    assert found.ready
    assert "without a GPU" in found.verdict
    checks = by_name(found.checks)
    assert checks["card"].ok is None
    assert checks["torch"].ok
    assert "pinned memory" not in checks


@pytest.mark.skipif(local_card() is not None, reason="this machine has a card")
def test_a_card_that_torch_cannot_use_blocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_card(monkeypatch, CARD)
    found = diagnose()
    assert not found.ready
    assert found.verdict.startswith("blocked: torch")
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == found.verdict
    assert lines[0].startswith("ok  card")
    assert cli.main(["doctor", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema_version"], printed["command"], printed["ready"]) == (1, "doctor", False)
    assert {check["name"] for check in printed["checks"]} >= {
        "card",
        "link",
        "torch",
        "host memory",
    }


@pytest.mark.parametrize(
    ("package", "version", "name"),
    [("torch", None, "torch"), ("transformers", None, "transformers"), ("transformers", "5.9.1", "transformers")],
)  # fmt: skip
def test_what_is_missing_or_too_old_blocks(
    package: str, version: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, None)
    right = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: version if asked == package else right(asked))  # fmt: skip
    found = diagnose()
    assert not found.ready
    assert by_name(found.checks)[name].blocks
    assert "pip install" in found.verdict


def test_slow_links_busy_cards_and_refused_pins_come_with_advice() -> None:
    fields: dict[str, Any] = {name: getattr(CARD, name) for name in Card.__slots__}
    (link,) = doctor._link(Card(**fields | {"pcie_width": 4}))
    assert link.ok is False
    assert "16 lanes" in link.advice
    busy = doctor._card(Card(**fields | {"free": 10 * 2**30}))
    assert "14.0 GiB" in busy.advice
    refused = doctor._pinned(2**29, 2**31, "the driver refused with error 2")
    assert refused.ok is False
    assert "0.5 GiB of 2.0 GiB" in refused.value
    assert doctor._pinned(2**31, 2**31, None).ok


@pytest.mark.gpu
def test_a_card_is_measured() -> None:
    found = diagnose()
    assert found.verdict == "ready: device path"
    checks = by_name(found.checks)
    assert checks["pinned memory"].ok
    assert "GiB/s" in checks["copies to the card"].value
