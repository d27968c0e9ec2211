"""The packages, the links and the imports follow the layout that ARCHITECTURE.md draws."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload

ROOT = Path(__file__).parent.parent
LINKED = ("index", "scheduler", "kernels")
HEAVY = {"torch", "transformers", "numba", "faiss"}

# What each folder may import: of ours by prefix, of others by top-level name.
OF_OURS = {
    "index": ("offload.index", "offload.errors", "offload.units"),
    "scheduler": ("offload.scheduler", "offload.errors", "offload.units"),
    "kernels": ("offload.kernels",),
}
OF_OTHERS = {
    "index": {"numpy", "numba", "llvmlite", "faiss"},
    "scheduler": set[str](),
    "kernels": {"torch", "triton"},
}
LEAVES = ("errors", "units")


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder, without what its links show of the others."""
    top = ROOT / folder
    found = sorted(top.rglob("*.py"))
    return [p for p in found if folder != "offload" or p.relative_to(top).parts[0] not in LINKED]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, late imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            module = node.module or ""
            if module == "offload":
                yield from (f"offload.{alias.name}" for alias in node.names)
            else:
                yield module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, check=True
    )


def test_every_package_is_declared() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for top in ("offload", *LINKED):
        prefix = "offload" if top == "offload" else f"offload.{top}"
        for path in sources(top):
            found.add(".".join((prefix, *path.parent.relative_to(ROOT / top).parts)))
    assert found == set(table["packages"])


def test_the_links_show_the_folders() -> None:
    for name in LINKED:
        link = ROOT / "offload" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)
        assert link.resolve() == (ROOT / name).resolve()


def test_kernels_is_not_a_top_level_package() -> None:
    # transformers asks whether a module `kernels` exists: the Hugging Face package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["offload", *LINKED, "tests", "tools"])
def test_imports_are_absolute_and_never_name_a_linked_folder_at_the_top(folder: str) -> None:
    for path in sources(folder):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & set(LINKED), path


@pytest.mark.parametrize("folder", LINKED)
def test_imports_run_one_way(folder: str) -> None:
    for path in sources(folder):
        for name in imports(path):
            top = name.partition(".")[0]
            if top == "offload":
                assert any(f"{name}.".startswith(f"{p}.") for p in OF_OURS[folder]), (path, name)
            else:
                assert top in OF_OTHERS[folder] | sys.stdlib_module_names, (path, name)


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_nothing_of_ours_but_each_other(module: str) -> None:
    for name in imports(ROOT / "offload" / f"{module}.py"):
        top = name.partition(".")[0]
        if top == "offload":
            assert name in {f"offload.{leaf}" for leaf in LEAVES}, name
        else:
            assert top in sys.stdlib_module_names, name


@pytest.mark.parametrize(
    "module",
    [
        "offload", "offload.errors", "offload.units", "offload.config", "offload.hardware", "offload.plan", "offload.probe",
        "offload.scheduler",
    ],
)  # fmt: skip
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    done = run("-c", f"import sys, {module}; print(*sys.modules)")
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["bench", "--help"],
        ["config", "show"],
        ["config", "schema"],
        ["--version"],
        ["version"],
    ],
    ids=" ".join,
)
def test_the_command_line_loads_nothing_heavy_to_answer(arguments: list[str]) -> None:
    done = run("-X", "importtime", "-m", "offload", *arguments)
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "typer" in loaded
    assert not HEAVY & loaded


def test_every_exported_name_is_there() -> None:
    for name in offload.__all__:
        assert getattr(offload, name) is not None
        assert name in dir(offload)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        offload.atach  # noqa: B018
