"""Every backend keeps the contract of `offload.index.base`."""

from __future__ import annotations

import itertools
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute import brute, check, recall
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError, InputError
from offload.index import BACKENDS, backend, load
from offload.index.base import Index, Vectors
from offload.index.clusters import Clusters
from offload.index.flat import Flat
from offload.index.graph import Graph
from offload.index.hnsw import HNSW
from offload.index.ivf import IVF
from offload.index.pages import Pages

# A way to make each backend, and the recall of the best 50 that it has to reach on both kinds of vectors below.
MAKERS: dict[str, tuple[Callable[[], Index], float]] = {
    "flat": (Flat, 0.99),
    "flat, 2 bits": (lambda: Flat(bits=2, overfetch=8), 0.95),
    "ivf": (lambda: IVF(probes=32), 0.85),
    "ivf, all lists": (lambda: IVF(lists=20, probes=20, centred=False), 0.999),
    "hnsw": (lambda: HNSW(links=24, build_breadth=100, breadth=300), 0.95),
    "graph": (lambda: Graph(breadth=300), 0.95),
    "graph, every key met": (lambda: Graph(links=24, breadth=200, votes=1), 0.95),
    "clusters": (lambda: Clusters(segment=300, overfetch=24), 0.85),
    "clusters, shared": (lambda: Clusters(segment=128, overfetch=27, shared=True), 0.85),
    "clusters, all": (lambda: Clusters(segment=512, overfetch=COUNT), 0.999),
    "pages": (lambda: Pages(overfetch=27), 0.85),
    "pages, means": (lambda: Pages(digest="mean", overfetch=24, breadth=1), 0.85),
    "pages, all": (lambda: Pages(overfetch=COUNT), 0.999),
}
COUNT = 1511


def vectors(kind: str, count: int = COUNT, size: int = 64, seed: int = 0) -> tuple[Vectors, Vectors]:  # fmt: skip
    """Keys [count, size] and queries [7, size]."""
    random = np.random.default_rng(seed)
    queries = random.standard_normal((7, size)).astype(np.float32)
    if kind == "random":
        return random.standard_normal((count, size)).astype(np.float32), queries
    # As keys are: float16, near one of a few centres, a mean far from zero in some channels.
    centres = random.standard_normal((30, size)) * 2
    keys = centres[random.integers(0, 30, count)] + random.standard_normal((count, size))
    keys += np.where(np.arange(size) % 16 == 3, 20, 0)
    return keys.astype(np.float16), queries


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str) -> Index:
    return MAKERS[name][0]()


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("size", [64, 80, 7])
def test_the_best_keys_of_brute_force_are_found(name: str, kind: str, size: int) -> None:
    keys, queries = vectors(kind, size=size)
    index = make(name)
    index.build(keys, queries)
    assert (len(index), index.dimension) == (COUNT, size)
    found = index.search(queries, 50)
    scores = brute(keys, queries)
    check(found, scores, 50)
    assert recall(found, scores) >= MAKERS[name][1]
    # At least the rows themselves, and all queries of the group count.
    assert index.nbytes >= keys.nbytes


def test_keys_that_are_added_are_found_as_if_they_had_been_there(name: str) -> None:
    keys, queries = vectors("clustered")
    whole, grown = make(name), make(name)
    whole.build(keys)
    grown.build(keys[:700])
    for a, b in ((700, 701), (701, 1000), (1000, COUNT)):
        grown.add(keys[a:b])
    assert len(grown) == COUNT
    found, scores = grown.search(queries, 50), brute(keys, queries)
    check(found, scores, 50)
    assert recall(found, scores) >= MAKERS[name][1]
    assert (found.ids >= 700).any()
    if name.startswith(("flat", "pages")):
        assert grown.search(queries, 50).ids.tolist() == whole.search(queries, 50).ids.tolist()


@given(cuts=st.lists(st.integers(1, 399), max_size=8, unique=True), bits=st.sampled_from([2, 4]))
def test_any_split_of_the_keys_makes_the_same_flat_index(cuts: list[int], bits: int) -> None:
    keys, queries = vectors("clustered", 400)
    whole, grown = Flat(bits=bits, overfetch=1), Flat(bits=bits, overfetch=1)
    whole.build(keys)
    edges = [0, *sorted(cuts), 400]
    for a, b in itertools.pairwise(edges):
        grown.add(keys[a:b])
    found, want = grown.search(queries, 30), whole.search(queries, 30)
    assert found.ids.tolist() == want.ids.tolist()
    np.testing.assert_array_equal(found.scores, want.scores)
    assert (found.scanned, found.touched_bytes) == (want.scanned, want.touched_bytes)
    assert grown.nbytes == whole.nbytes


def test_adding_to_an_index_without_keys_builds_it(name: str) -> None:
    keys, queries = vectors("random", 300)
    added, built = make(name), make(name)
    added.add(keys)
    built.build(keys)
    assert added.search(queries, 9).ids.tolist() == built.search(queries, 9).ids.tolist()


def test_building_forgets_what_was_there(name: str) -> None:
    keys, queries = vectors("random", 400)
    index = make(name)
    index.build(keys)
    others, _ = vectors("random", 300, seed=1)
    index.build(others)
    assert len(index) == 300
    check(index.search(queries, 20), brute(others, queries), 20)


def test_an_index_keeps_its_own_copy(name: str) -> None:
    keys, queries = vectors("random", 300)
    index = make(name)
    index.build(keys)
    before = index.search(queries, 5)
    ids = before.ids.tolist()
    keys[:] = 0
    again = index.search(queries, 5)
    assert again.ids.tolist() == ids
    assert before.ids.tolist() == ids
    np.testing.assert_array_equal(again.scores, before.scores)


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_a_query_finds_the_same_in_any_company(name: str, groups: int) -> None:
    if name == "clusters, shared":
        pytest.skip("its queries choose clusters together")
    keys, queries = vectors("random")
    index = make(name)
    index.build(keys)
    together = index.search(queries[:groups], 20)
    for g in range(groups):
        alone = index.search(queries[g : g + 1], 20)
        assert alone.ids[0].tolist() == together.ids[g].tolist()


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 257])
def test_all_keys_are_given_where_all_are_asked_for(name: str, count: int) -> None:
    if name == "ivf, all lists" and count < 20:
        pytest.skip("fewer keys than lists, which is an error of its own")
    keys, queries = vectors("random", count)
    index = make(name)
    index.build(keys)
    found = index.search(queries, count)
    check(found, brute(keys, queries), count)


def test_equal_keys_and_zeros_are_keys_like_others(name: str) -> None:
    keys, queries = vectors("random", 400)
    keys[100:300] = keys[100]
    keys[300:] = 0
    queries[0] = 0
    index = make(name)
    index.build(keys)
    index.add(np.zeros((3, 64), dtype=np.float32))
    found = index.search(queries, 350)
    check(found, brute(np.concatenate([keys, np.zeros((3, 64), np.float32)]), queries), 350)
    assert (found.scores[0] == 0).all()
    index.build(np.zeros((200, 64), dtype=np.float32))
    assert (index.search(queries, 200).scores == 0).all()


def test_strided_vectors_and_halves_are_taken(name: str) -> None:
    keys, queries = vectors("random", 1000, 128)
    index = make(name)
    index.build(keys[::2, ::2])
    index.add(np.asfortranarray(keys[1::2, ::2]))
    want = np.concatenate([keys[::2, ::2], keys[1::2, ::2]])
    halves = queries.astype(np.float16)[:, ::2]
    check(index.search(halves, 10), brute(want, halves), 10)


def test_the_same_seed_makes_the_same_index(name: str) -> None:
    keys, queries = vectors("clustered")
    found = []
    for _ in range(2):
        index = make(name)
        index.build(keys)
        found.append(index.search(queries, 30))
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].scanned == found[1].scanned


def test_the_work_is_counted() -> None:
    keys, queries = vectors("random", 1024)
    flat = Flat()
    flat.build(keys)
    found = flat.search(queries, 10)
    assert found.scanned == 1.0
    # Four bits a value and two floats a channel and block, read once; 40 rows for each query.
    assert found.touched_bytes == 1024 * 64 // 2 + 8 * 64 * 8 + 7 * 40 * 256
    all_lists = IVF(lists=16, probes=16)
    all_lists.build(keys)
    assert all_lists.search(queries, 10).scanned == 1.0
    shares = []
    for probes in (1, 4, 8):
        some = IVF(lists=16, probes=probes)
        some.build(keys)
        shares.append(some.search(queries, 1).scanned)
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    walked = []
    for breadth in (16, 256):
        walk = HNSW(links=8, build_breadth=40, breadth=breadth)
        walk.build(keys)
        walked.append(walk.search(queries, 10).scanned)
    assert 0 < walked[0] < walked[1]
    uncounted = HNSW(counted=False)
    uncounted.build(keys)
    assert np.isnan(uncounted.search(queries, 10).scanned)


def test_indexes_are_searched_side_by_side(name: str) -> None:
    indexes, alone = [], []
    for seed in range(4):
        keys, queries = vectors("random", 600, seed=seed)
        index = make(name)
        index.build(keys)
        indexes.append((index, queries))
        alone.append(index.search(queries, 20))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(lambda pair: pair[0].search(pair[1], 20), indexes))
            for a, b in zip(found, alone, strict=True):
                assert a.ids.tolist() == b.ids.tolist()
                assert a.scanned == b.scanned


def test_a_file_gives_back_the_index(name: str, tmp_path: Path) -> None:
    keys, queries = vectors("clustered")
    index = make(name)
    index.build(keys)
    file = tmp_path / "index"
    index.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    for again in (load(file), type(index).load(file)):
        assert type(again) is type(index)
        assert len(again) == COUNT
        found, want = again.search(queries, 30), index.search(queries, 30)
        assert found.ids.tolist() == want.ids.tolist()
        np.testing.assert_array_equal(found.scores, want.scores)
        assert found.scanned == want.scanned
        again.add(keys[:200])
        index_grown = make(name)
        index_grown.build(keys)
        index_grown.add(keys[:200])
        assert again.search(queries, 30).ids.tolist() == index_grown.search(queries, 30).ids.tolist()  # fmt: skip
    # Keys were added to what was mapped, not to the file.
    assert len(load(file)) == COUNT


def test_an_empty_index_is_saved_too(name: str, tmp_path: Path) -> None:
    make(name).save(tmp_path / "index")
    again = load(tmp_path / "index")
    assert len(again) == 0
    assert again.dimension is None


def saved(name: str, folder: Path) -> Path:
    """The file of an index of 300 keys."""
    index, file = make(name), folder / "index"
    index.build(vectors("random", 300)[0])
    index.save(file)
    return file


@pytest.mark.parametrize("at", [0, 9, 17, 25, 33, 80, 200, 5000, -1])
def test_a_file_with_a_wrong_byte_is_refused(name: str, at: int, tmp_path: Path) -> None:
    file = saved(name, tmp_path)
    content = bytearray(file.read_bytes())
    content[at] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(InputError, match="index"):
        load(file)


@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    keys, _ = vectors("random", 130, 8)
    index = Flat()
    index.build(keys)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index"
        index.save(file)
        content = bytearray(file.read_bytes())
        read = [*range(48), *range(64, len(content))]  # the last 16 bytes of the head are filling
        content[data.draw(st.sampled_from(read))] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        with pytest.raises(InputError):
            load(file)


@pytest.mark.parametrize("kept", [0, 5, 8, 63, 64, 200, 3000])
def test_a_truncated_file_is_refused(name: str, kept: int, tmp_path: Path) -> None:
    file = saved(name, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(InputError):
        load(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(InputError, match="longer") as caught:
        load(file)
    assert caught.value.there == len(content) + 1


def test_a_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index"
    Flat().save(file)
    content = bytearray(file.read_bytes())
    content[8:12] = struct.pack("<I", 2)
    file.write_bytes(content)
    with pytest.raises(InputError, match="newer") as caught:
        load(file)
    assert (caught.value.asked, caught.value.there) == (2, 1)


def test_a_file_of_another_backend_is_refused(tmp_path: Path) -> None:
    Flat().save(tmp_path / "index")
    with pytest.raises(InputError, match="another backend") as caught:
        IVF.load(tmp_path / "index")
    assert (caught.value.asked, caught.value.there) == ("ivf", "flat")


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, _ = vectors("random", 300)
    index = Flat()
    index.build(keys)
    index.save(tmp_path / "index")
    index.add(keys)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        index.save(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert len(load(tmp_path / "index")) == 300


def test_an_empty_index_is_not_searched(name: str) -> None:
    with pytest.raises(InputError, match="empty"):
        make(name).search(np.zeros((1, 64), dtype=np.float32), 1)


@pytest.mark.parametrize("k", [0, -1, 301])
def test_no_more_keys_are_given_than_there_are(name: str, k: int) -> None:
    keys, queries = vectors("random", 300)
    index = make(name)
    index.build(keys)
    with pytest.raises(InputError) as caught:
        index.search(queries, k)
    assert (caught.value.asked, caught.value.there) == (k, 300)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_row_that_is_not_finite_is_named_and_changes_nothing(
    name: str, bad: float, dtype: type
) -> None:
    keys, queries = vectors("random", 300)
    index = make(name)
    index.build(keys.astype(dtype))
    before = index.search(queries, 10).ids.tolist()
    wrong: Vectors = keys.astype(dtype)
    wrong[[17, 33], 5] = bad
    calls: list[Callable[[], Any]] = [
        lambda: make(name).build(wrong),
        lambda: index.build(wrong),
        lambda: index.build(keys, wrong),
        lambda: index.add(wrong),
        lambda: index.search(wrong[:20], 1),
    ]
    for call in calls:
        with pytest.raises(InputError, match="Row 17") as caught:
            call()
        assert caught.value.asked == 17
    assert len(index) == 300
    assert index.search(queries, 10).ids.tolist() == before


NO_VECTORS: list[Any] = [
    np.zeros(64, np.float32),
    np.zeros((0, 64), np.float32),
    np.zeros((4, 0), np.float32),
    np.zeros((2, 2, 64), np.float32),
    np.zeros((4, 64), np.float64),
    np.zeros((4, 64), np.int32),
    [[0.0] * 64],
]


@pytest.mark.parametrize(
    "wrong",
    NO_VECTORS,
    ids=["vector", "no rows", "no channels", "three axes", "doubles", "integers", "a list"],
)
def test_what_are_no_vectors_is_refused(name: str, wrong: Any) -> None:
    keys, _ = vectors("random", 300)
    index = make(name)
    index.build(keys)
    for call in (index.build, index.add, lambda given: index.search(given, 1)):
        with pytest.raises(InputError):
            call(wrong)
    assert len(index) == 300


def test_vectors_of_another_dimension_are_refused(name: str) -> None:
    keys, queries = vectors("random", 300)
    index = make(name)
    index.build(keys)
    calls: list[Callable[[], Any]] = [
        lambda: index.add(keys[:, :63]),
        lambda: index.search(queries[:, :63], 5),
        lambda: index.build(keys, queries[:, :63]),
    ]
    for call in calls:
        with pytest.raises(InputError, match="dimension") as caught:
            call()
        assert (caught.value.asked, caught.value.there) == (63, 64)
    assert len(index) == 300


def test_fewer_keys_than_lists_are_refused() -> None:
    keys, _ = vectors("random", 19)
    with pytest.raises(InputError) as caught:
        IVF(lists=20).build(keys)
    assert (caught.value.asked, caught.value.there) == (20, 19)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Flat(bits=3), "bits"),
        (lambda: Flat(overfetch=0), "overfetch"),
        (lambda: IVF(lists=0), "lists"),
        (lambda: IVF(probes=0), "probes"),
        (lambda: IVF(iterations=0), "iterations"),
        (lambda: HNSW(links=1), "links"),
        (lambda: HNSW(breadth=0), "breadth"),
        (lambda: HNSW(build_breadth=0), "build_breadth"),
        (lambda: Graph(links=1), "links"),
        (lambda: Graph(reach=1), "reach"),
        (lambda: Graph(teachers=0), "teachers"),
        (lambda: Graph(breadth=0), "breadth"),
        (lambda: Graph(votes=0), "votes"),
        (lambda: Graph(votes=255), "votes"),
        (lambda: Clusters(size=0), "size"),
        (lambda: Clusters(segment=15), "segment"),
        (lambda: Clusters(overfetch=0), "overfetch"),
        (lambda: Clusters(iterations=0), "iterations"),
        (lambda: Pages(digest="median"), "digest"),
        (lambda: Pages(overfetch=0), "overfetch"),
        (lambda: Pages(breadth=0), "breadth"),
    ],
)
def test_settings_are_checked(make: Callable[[], Index], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.key == key


def test_a_backend_is_chosen_by_name() -> None:
    assert [backend(name).backend for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(ConfigError, match="flat, ivf, hnsw, graph, clusters, pages") as caught:
        backend("faiss")
    assert caught.value.asked == "faiss"
