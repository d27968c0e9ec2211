"""A configuration is read from anywhere, wrong in one message, and written back equal."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.config import CacheConfig, Given, MemoryConfig, OffloadConfig
from offload.errors import ConfigError
from offload.units import GIB, Size

pages = st.sampled_from([16, 32, 64, 128, 256])
sizes = st.one_of(
    st.just("auto"),
    st.integers(1, 2**50),
    st.integers(1, 100).map(lambda p: f"{p}%"),
)


@st.composite
def configs(draw: st.DrawFn) -> OffloadConfig:
    page = draw(pages)
    given: dict[str, Any] = {
        "gpu_memory": draw(sizes),
        "cpu_memory": draw(sizes),
        "pinned_memory": draw(sizes),
        "reserve": draw(st.integers(1, 2**40)),
        "page": page,
        "sinks": page * draw(st.integers(0, 8)),
        "window": draw(st.one_of(st.just("auto"), st.integers(1, 64).map(lambda n: n * page))),
        "chunk": draw(st.one_of(st.just("auto"), st.integers(1, 10_000))),
        "staging": draw(st.one_of(st.just("auto"), st.integers(1, 2**40))),
        "progress": draw(st.booleans()),
        "progress_from": draw(st.integers(0, 100_000)),
    }
    kept = draw(st.sets(st.sampled_from(sorted(given))))
    if "page" not in kept:
        kept -= {"sinks", "window"}
    return OffloadConfig.build(**{name: given[name] for name in kept})


def refused(config: Any = None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.build(config, **overrides)
    return str(caught.value)


def test_the_defaults_are_the_documented_ones() -> None:
    assert OffloadConfig().to_toml() == (
        'mode = "fast"\n'
        "\n"
        "[memory]\n"
        'gpu = "auto"\n'
        'cpu = "auto"\n'
        'pinned = "auto"\n'
        'reserve = "1GiB"\n'
        "\n"
        "[cache]\n"
        "page = 64\n"
        "sinks = 64\n"
        'window = "auto"\n'
        "\n"
        "[retrieval]\n"
        'tokens = "auto"\n'
        'row_cache = "auto"\n'
        'index = "replica"\n'
        "recall = 0.95\n"
        'threads = "auto"\n'
        "\n"
        "[replica]\n"
        'rung = "auto"\n'
        "ladder = false\n"
        "whole_layers = 0\n"
        "skipped_mass = 0.001\n"
        "\n"
        "[scheduler]\n"
        'recompute = "off"\n'
        'recomputed = "auto"\n'
        "sparsity = 0.0\n"
        "\n"
        "[prefill]\n"
        'chunk = "auto"\n'
        "\n"
        "[decode]\n"
        'staging = "auto"\n'
        "capture = true\n"
        'compile = "auto"\n'
        'draft = "auto"\n'
        'look_ahead = "auto"\n'
        "\n"
        "[trace]\n"
        "progress = true\n"
        "progress_from = 8192\n"
    )


@given(configs())
def test_toml_reads_back_equal(config: OffloadConfig) -> None:
    assert OffloadConfig.from_toml(config.to_toml()) == config
    assert (
        OffloadConfig.from_toml(
            config.to_toml(origins=dict.fromkeys(config.every_key(), "some.toml"))
        )
        == config
    )
    assert OffloadConfig.build(config, mode="fast") == config


def test_the_template_is_the_default_commented_out_or_not() -> None:
    template = OffloadConfig.template()
    assert OffloadConfig.from_toml(template) == OffloadConfig()
    lines = [line.removeprefix("# ") if " = " in line else line for line in template.splitlines()]
    assert OffloadConfig.from_toml("\n".join(lines)) == OffloadConfig()
    assert tomllib.loads("\n".join(lines)) == tomllib.loads(OffloadConfig().to_toml())


def test_every_key_has_a_description_a_unit_and_a_short_name() -> None:
    settings = OffloadConfig().settings()
    for setting in settings:
        assert setting.description.endswith("."), setting.key
        assert setting.unit, setting.key
    short = set(OffloadConfig.SHORT_NAMES.values()) | {"mode"}
    assert {setting.key for setting in settings} == short


def test_overrides_come_as_short_names_and_as_sections() -> None:
    config = OffloadConfig.build(
        gpu_memory="24GB", window="4K", memory={"cpu": "80%"}, chunk=512, trace={"progress": False}
    )
    assert config.memory.gpu == Size(bytes=24 * 10**9)
    assert config.memory.cpu == Size(percent=Decimal(80))
    assert config.cache.window == 4096
    assert config.prefill.chunk == 512
    assert not config.trace.progress
    assert [s.key for s in config.settings() if s.is_set] == [
        "memory.gpu",
        "memory.cpu",
        "cache.window",
        "prefill.chunk",
        "trace.progress",
    ]


@pytest.mark.parametrize(
    "base",
    [
        OffloadConfig.build(gpu_memory="3GiB", page=32),
        {"memory": {"gpu": "3GiB"}, "cache": {"page": 32}},
        {"memory": MemoryConfig(gpu=Size(bytes=3 * GIB)), "cache": CacheConfig(page=32)},
        '[memory]\ngpu = "3GiB"\n[cache]\npage = 32',
    ],
    ids=["config", "dicts", "sections", "text"],
)
def test_an_override_replaces_one_key_and_keeps_the_rest(base: Any) -> None:
    config = OffloadConfig.build(base, cpu_memory="1GiB")
    assert config.memory == MemoryConfig(gpu=Size(bytes=3 * GIB), cpu=Size(bytes=GIB))
    assert config.cache.page == 32
    assert OffloadConfig.build(base, gpu_memory="4GiB").memory.gpu.bytes == 4 * GIB


def test_a_config_without_overrides_is_itself() -> None:
    config = OffloadConfig()
    assert OffloadConfig.build(config) is config


def test_build_changes_nothing_that_it_was_given() -> None:
    base: dict[str, Any] = {"memory": {"gpu": "3GiB"}}
    override: dict[str, Any] = {"cpu": "1GiB"}
    OffloadConfig.build(base, memory=override, pinned_memory="1GiB")
    assert base == {"memory": {"gpu": "3GiB"}}
    assert override == {"cpu": "1GiB"}


def test_a_file_is_read_by_path_and_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("offload.toml", "settings"):
        Path(name).write_text('[memory]\ngpu = "3GiB"\n')
        for path in (Path(name), name, str(tmp_path / name)):
            assert OffloadConfig.from_toml(path).memory.gpu.bytes == 3 * GIB


def test_values_above_a_file_replace_it_and_the_later_one_counts(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('mode = "exact"\n[memory]\ngpu = "1GiB"\ncpu = "1GiB"\n')
    given = [Given("memory.gpu", "2GiB", "VARIABLE"), Given("memory.gpu", "3GiB", "--gpu-memory")]
    config = OffloadConfig.layered(file, [*given, Given("cache.page", 32, "--set cache.page")])
    assert (config.mode, config.cache.page) == ("exact", 32)
    assert config.memory == MemoryConfig(gpu=Size(bytes=3 * GIB), cpu=Size(bytes=GIB))
    assert OffloadConfig.layered(None, []) == OffloadConfig()


def test_values_above_a_file_are_refused_under_the_name_the_user_wrote(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("memory = 5\n")
    given = [Given("memory.gpu", "x", "VARIABLE"), Given("mode", "y", "--mode")]
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.layered(file, given, [ConfigError("known before", key="--set z")])
    assert [problem.key for problem in caught.value.problems] == ["--set z", "--mode", "memory"]
    file.write_text("memory.gpu = 'also wrong, but replaced'\n")
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.layered(file, given)
    assert [problem.key for problem in caught.value.problems] == ["--mode", "VARIABLE"]
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.layered(tmp_path / "none", given, [ConfigError("before", key="--set z")])
    assert len(caught.value.problems) == 2


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The current folder, two below one that may have a file, and the user's config folder."""
    here, users = tmp_path / "project" / "a" / "b", tmp_path / "users"
    here.mkdir(parents=True)
    users.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("OFFLOAD_CONFIG", raising=False)
    monkeypatch.setattr("platformdirs.user_config_dir", lambda *_, **__: str(users))
    return here, users


def test_the_file_is_that_of_the_variable_then_the_nearest_then_the_users(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, users = folders
    assert OffloadConfig.find() is None
    (here / "offload.toml").mkdir()  # no file, and passed over
    for folder in (users, here.parent.parent, here.parent):
        file = folder / "offload.toml"
        file.touch()
        assert OffloadConfig.find() == file
    monkeypatch.setenv("OFFLOAD_CONFIG", "named")
    Path("named").touch()
    assert OffloadConfig.find() == Path("named")
    monkeypatch.setenv("OFFLOAD_CONFIG", "")
    assert OffloadConfig.find() == here.parent / "offload.toml"


@pytest.mark.parametrize("named", ["none.toml", "."])
def test_a_variable_that_names_no_file_is_refused_by_its_name(
    named: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders[1] / "offload.toml").touch()
    monkeypatch.setenv("OFFLOAD_CONFIG", named)
    with pytest.raises(ConfigError, match=r"^OFFLOAD_CONFIG: ") as caught:
        OffloadConfig.find()
    assert caught.value.asked == named


def test_the_library_reads_no_file_that_it_was_not_given(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders[0] / "offload.toml").write_text('mode = "exact"')
    monkeypatch.setenv("OFFLOAD_MODE", "exact")
    assert OffloadConfig.build() == OffloadConfig.build(None) == OffloadConfig()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("memory.gup", "memory.gpu"),
        ("memroy.gpu", "memory.gpu"),
        ("gpu", "memory.gpu"),
        ("cache.gpu", "memory.gpu"),
        ("MEMORY.GPU", "memory.gpu"),
        ("gpu_memroy", "memory.gpu"),
        ("moed", "mode"),
        ("xyz", None),
    ],
)
def test_a_key_that_does_not_exist_is_answered_with_the_nearest(
    key: str, nearest: str | None
) -> None:
    assert OffloadConfig.nearest_key(key) == nearest


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        OffloadConfig().mode = "exact"


def test_sinks_follow_the_page_in_whole_pages() -> None:
    assert [OffloadConfig.build(page=p).cache.sinks for p in (16, 64, 128)] == [64, 64, 128]


def test_all_mistakes_of_a_call_are_in_one_message() -> None:
    assert refused(
        gpu_memroy="1GiB",
        memory={"gup": "1GiB", "cpu": "24 gigs"},
        cache={"page": 48, "window": 100},
        mode="quick",
        progress="yes",
        prefill=5,
        retrieval={"k": 64},
    ) == (
        "8 settings cannot be used.\n"
        "  gpu_memroy: unknown setting. Did you mean 'gpu_memory'?\n"
        '  mode: \'quick\' is not one of its values. Write "fast", "verified" or "exact".\n'
        "  memory.cpu: 'gigs' in '24 gigs' is not a unit of memory. Write \"24GiB\" (1 GiB = "
        '1024^3 bytes) or "24GB" (1 GB = 1000^3).\n'
        "  memory.gup: unknown key. Did you mean 'gpu'?\n"
        "  cache.page: a page of 48 tokens is not a power of two of at least 16. Write 32 or 64.\n"
        "  retrieval.k: unknown key. Known are tokens, row_cache, index, recall, threads.\n"
        "  prefill: 5 is not a table. Write [prefill] on a line of its own, and its keys below.\n"
        "  progress: 'yes' is not a switch. Write true or false."
    )


def test_mistakes_name_the_file_or_the_keyword_that_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        '[memory]\ngpuu = 1\ncpu = "0"\ngpu = "also wrong, but replaced"\n[retreival]\n'
    )
    assert refused(file, gpu_memory="80%%", pinned_memory="1GiB") == (
        "4 settings cannot be used.\n"
        "  gpu_memory: '80%%' is not a size. "
        'Write bytes ("20GiB", "24GB") or, for a budget, a share ("80%") or "auto".\n'
        f"  {file}:2:1: memory.gpuu: unknown key. Did you mean 'gpu'?\n"
        "    2 | gpuu = 1\n"
        "      | ^^^^\n"
        f"  {file}:3:7: memory.cpu: '0' is no memory at all. "
        'Write a size above zero, for example "20GiB".\n'
        '    3 | cpu = "0"\n'
        "      |       ^^^\n"
        f"  {file}:5:2: retreival: unknown section. Did you mean 'retrieval'?\n"
        "    5 | [retreival]\n"
        "      |  ^^^^^^^^^"
    )


def test_a_mistake_in_a_file_has_its_key_and_its_place(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("cache.window = 100\n")
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_toml(file)
    assert (caught.value.key, caught.value.place) == ("cache.window", f"{file}:1:16")
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.from_toml("cache.window = 100\n")
    assert (caught.value.key, caught.value.place) == ("cache.window", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"window": 100},
            "window: page size 64 does not divide the window of 100 tokens. Write 64 or 128.",
        ),
        (
            {"window": 3},
            "window: page size 64 does not divide the window of 3 tokens. Write 64.",
        ),
        ({"window": 0}, "window: 0 tokens are too few. Write 1 or more."),
        (
            {"sinks": 3},
            "sinks: page size 64 does not divide the sinks of 3 tokens. Write 0 or 64.",
        ),
        (
            {"page": 8},
            "page: a page of 8 tokens is not a power of two of at least 16. Write 16.",
        ),
        ({"skipped_mass": True}, "skipped_mass: True is not a number. Write for example 0.001."),
        ({"chunk": 0}, "chunk: 0 tokens are too few. Write 1 or more."),
        (
            {"staging": "10%"},
            'staging: \'10%\' is a share of nothing. Write bytes ("256MiB") or "auto".',
        ),
        (
            {"reserve": "auto"},
            "reserve: 'auto' has no meaning here. Write bytes (\"1GiB\") or a share.",
        ),
        (
            {"gpu_memory": "1GiB", "memory": {"gpu": "2GiB"}},
            "gpu_memory: given a second time as memory.gpu (asked: 1GiB; there: 2GiB). "
            "Leave one of the two out.",
        ),
    ],
)
def test_one_mistake_is_one_line(given: dict[str, Any], message: str) -> None:
    assert refused(**given) == message


def test_a_mistake_is_also_a_value() -> None:
    with pytest.raises(ConfigError) as caught:
        OffloadConfig.build(window=100)
    assert (caught.value.key, caught.value.asked, caught.value.there) == ("window", 100, 64)


def test_the_constructors_raise_no_pydantic_errors() -> None:
    wrong: dict[str, Any] = {"gpu": "x"}
    with pytest.raises(ConfigError, match="gpu: 'x' is not a size"):
        MemoryConfig(**wrong)
    whole: dict[str, Any] = {"memory": wrong}
    with pytest.raises(ConfigError, match=r"memory\.gpu: 'x' is not a size"):
        OffloadConfig(**whole)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("none.toml", "none.toml: No such file. Write one with: offload config init."),
        (Path("none"), "none: No such file."),
        (Path(), ".: The file cannot be read: Is a directory."),
        ("[memory\n", "The configuration is not TOML:"),
        ("offload.cfg", "The configuration is not TOML:"),
        ("x" * 5000, "The configuration is not TOML:"),
        (5, "A configuration cannot be read from a int."),
        ({3: 4}, "3: unknown key."),
        ({"memory": {3: 4}}, "memory.3: unknown key."),
    ],
)
def test_what_cannot_be_read_is_refused(given: Any, says: str) -> None:
    assert refused(given).startswith(says)


@pytest.mark.parametrize(
    ("content", "place", "excerpt"),
    [
        (b"\n[memory\n", ":2:8", "  2 | [memory\n    |        ^"),
        (b"mode = exact", ":1:8", "  1 | mode = exact\n    |        ^"),
        (b"mode = \n\n", ":1:8", "  1 | mode =\n    |        ^"),
        (b"mode", ":1:5", "  1 | mode\n    |     ^"),
        (b"\x1b[31m = 1", ":1:1", "  1 |  [31m = 1\n    | ^"),  # not sent to the terminal
        (b"\xff\xfe", "", None),
    ],
)
def test_a_file_that_is_not_toml_is_named(
    tmp_path: Path, content: bytes, place: str, excerpt: str | None
) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(content)
    message = refused(file)
    assert message.startswith(f"{file}{place}: This is not TOML:")
    assert excerpt is None or message.endswith(f"\n{excerpt}")
