"""Host memory is exactly what was asked, keeps its contents while it grows, and stops at its budget."""

from __future__ import annotations

import logging

import pytest
import torch

from offload.errors import BudgetError
from offload.tiers.pinned import HostRegion, PinBudget, commit_regions

UNIT = 3 * 4096
CPU = torch.device("cpu")


def region(units: int, budget: PinBudget | None = None, device: torch.device = CPU) -> HostRegion:
    return HostRegion(UNIT, units * UNIT, device, budget or PinBudget())


def test_growing_keeps_contents_and_address() -> None:
    host = region(8)
    commit_regions([(host, UNIT)])
    first = host.view(0, UNIT)
    first.fill_(7)
    address = first.data_ptr()
    commit_regions([(host, 5 * UNIT)])
    assert host.view(0, UNIT).data_ptr() == address
    assert bool((host.view(0, UNIT) == 7).all())
    host.view(4 * UNIT, UNIT).fill_(9)


def test_sizes_are_rounded_to_whole_units_only() -> None:
    host = region(8)
    commit_regions([(host, 2 * UNIT + 1)])
    assert host.committed == 3 * UNIT == host.pinned
    commit_regions([(host, UNIT)])  # smaller: nothing changes
    assert host.committed == 3 * UNIT


def test_the_pin_budget_ends_at_a_unit_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    budget = PinBudget(limit=3 * UNIT + 100)
    first, second = region(8, budget), region(8, budget)
    with caplog.at_level(logging.WARNING, "offload"):
        commit_regions([(first, 2 * UNIT), (second, 2 * UNIT)])
        commit_regions([(first, 4 * UNIT)])
    assert (first.pinned, second.pinned, budget.held) == (2 * UNIT, UNIT, 3 * UNIT)
    assert (first.committed, second.committed) == (4 * UNIT, 2 * UNIT)
    assert second.edges == [UNIT]
    assert len(caplog.records) == 1
    assert budget.refused is not None
    assert "memory.pinned" in budget.refused


def test_closing_gives_the_budget_back() -> None:
    budget = PinBudget()
    host = region(4, budget)
    commit_regions([(host, 4 * UNIT)])
    assert budget.held == 4 * UNIT
    host.close()
    assert budget.held == 0


def test_growing_beyond_the_reserved_addresses_is_a_budget_error() -> None:
    host = region(2)
    with pytest.raises(BudgetError) as caught:
        commit_regions([(host, 3 * UNIT)])
    assert caught.value.requested == 3 * UNIT
    assert caught.value.setting == "memory.cpu"


@pytest.mark.gpu
def test_pinned_memory_is_exact_and_copies_across_a_growth_border_by_units() -> None:
    device, budget = torch.device("cuda"), PinBudget()
    host = region(1000, budget, device)
    commit_regions([(host, 100 * UNIT)])
    commit_regions([(host, 300 * UNIT)])
    assert host.pinned == budget.held == 300 * UNIT
    assert host.edges == [100 * UNIT]
    assert host.view(0, UNIT).is_pinned()
    assert host.view(299 * UNIT, UNIT).is_pinned()
    host.view(0, 300 * UNIT).random_(0, 256)
    for start, stop in ((0, 100), (100, 300)):
        size = (stop - start) * UNIT
        there = torch.empty(size, dtype=torch.uint8, device=device)
        there.copy_(host.view(start * UNIT, size), non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), host.view(start * UNIT, size))
    host.close()


@pytest.mark.gpu
def test_closed_memory_is_unregistered() -> None:
    device = torch.device("cuda")
    for _ in range(20):  # the system hands the same addresses out again
        host = region(64, PinBudget(), device)
        commit_regions([(host, 64 * UNIT)])
        assert host.pinned == 64 * UNIT
        host.close()
    torch.zeros(1, device=device).add_(1)  # no error was left behind
