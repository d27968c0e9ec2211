"""Where keys stand in a file: every way that TOML has of writing them."""

from __future__ import annotations

import tomllib

from offload.config import OffloadConfig
from offload.places import Place, entries, excerpt, place_of_mistake

TEXT = """\
# memory.gpu = [
mode = "a # b = c" # ]
 cache.page=64
[memory] # {
gpu = '''
mode = 1
''' # the value begins two lines above
"cpu" = "[x"
prefill = { chunk = [1, { mode = 2 },
  3], "k" = {z = 1}, w = 5 }
[ retrieval . tokens ]
[[many]]
at = 1979-05-27
"""


def piece(place: Place) -> str:
    line = TEXT.splitlines()[place.line - 1]
    return line[place.column - 1 : place.column - 1 + place.length]


def test_every_key_and_every_value_is_found_where_it_stands() -> None:
    tomllib.loads(TEXT)
    found = {
        name: (entry.key.line, piece(entry.key), piece(entry.value))
        for name, entry in entries(TEXT).items()
    }
    assert found == {
        "mode": (2, "mode", '"a # b = c"'),
        "cache": (3, "cache.page", "cache.page"),
        "cache.page": (3, "cache.page", "64"),
        "memory": (4, "memory", "memory"),
        "memory.gpu": (5, "gpu", "'''"),
        "memory.cpu": (8, '"cpu"', '"[x"'),
        "memory.prefill": (9, "prefill", "{"),
        "memory.prefill.chunk": (9, "chunk", "["),
        "memory.prefill.k": (10, '"k"', "{"),
        "memory.prefill.k.z": (10, "z", "1"),
        "memory.prefill.w": (10, "w", "5"),
        "retrieval": (11, "retrieval . tokens", "retrieval . tokens"),
        "retrieval.tokens": (11, "retrieval . tokens", "retrieval . tokens"),
        "many": (12, "many", "many"),
        "many.at": (13, "at", "1979-05-27"),
    }


def test_a_file_without_a_last_newline_is_read_to_its_end() -> None:
    assert list(entries("[a]\nb = 1\n[c]")) == ["a", "a.b", "c"]


def test_every_key_of_our_own_files_has_its_line() -> None:
    config = OffloadConfig()
    text = config.to_toml()
    found, lines = entries(text), text.splitlines()
    for setting in config.settings():
        assert lines[found[setting.key].key.line - 1].startswith(setting.key.rpartition(".")[2])
    assert entries(OffloadConfig.template()).keys() == {
        setting.key.partition(".")[0] for setting in config.settings() if "." in setting.key
    }


def test_an_excerpt_counts_a_tab_as_one_column() -> None:
    text = "a = 1\n\tbc = 2\n"
    assert excerpt(text, entries(text)["bc"].key) == "  2 |  bc = 2\n    |  ^^"


def test_a_mistake_without_a_place_is_at_the_end() -> None:
    assert place_of_mistake("Unterminated string", "a = 1\nb = \n\n") == (
        "Unterminated string",
        Place(2, 4, 1),
    )
