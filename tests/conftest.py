"""What every test run needs before the first test module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Two pytest-xdist workers on two cores: more threads each would only wait for one another. Before
# torch, FAISS and Numba are imported, since each reads these once.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import torch

HAS_CUDA = torch.cuda.is_available()

# Before the kernels are imported: Triton decides at decoration whether a kernel is compiled.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The same examples in every run, and no limit on the time of one: a loaded machine must not turn a test red.
settings.register_profile(
    "house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _no_probe_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What whoever runs the tests has measured must not change what is predicted, nor be written over."""
    file = tmp_path_factory.mktemp("no-probe") / "probe.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offload.probe.probe_file", lambda: file)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
