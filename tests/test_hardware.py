"""Free memory is what the machine or its container leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from offload.hardware import host_memory

GIB = 2**30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_a_container_the_machine_decides(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert memory.limited_by == "machine"
    assert memory.total == psutil.virtual_memory().total


def test_a_version_2_group_limits_what_is_available(tmp_path: Path) -> None:
    write(
        tmp_path,
        memory__max=str(GIB // 4),
        memory__current=str(GIB // 8),
        memory__stat=f"anon 1\ninactive_file {GIB // 16}",
    )
    memory = host_memory(tmp_path)
    assert memory.limited_by == "cgroup"
    assert memory.total == GIB // 4
    assert memory.available == GIB // 4 - (GIB // 8 - GIB // 16)


def test_a_version_1_group_too(tmp_path: Path) -> None:
    write(
        tmp_path / "memory",
        memory__limit_in_bytes=str(GIB // 4),
        memory__usage_in_bytes=str(GIB // 8),
        memory__stat="total_inactive_file 0",
    )
    assert host_memory(tmp_path).available == GIB // 8


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_group_without_a_limit_does_not_count(tmp_path: Path, limit: str) -> None:
    write(tmp_path, memory__max=limit, memory__current="1", memory__stat="")
    assert host_memory(tmp_path).limited_by == "machine"
