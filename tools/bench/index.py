"""What does each index find, and what does it read for it? On keys and queries of a real model.

Indexed are the tokens between the first 64 and the last 256 of a context, which attention has on the device anyway. Queries
are those of the tokens behind the context (`tools/dump_vectors.py`), which no index has seen. A search is of the query heads
of one KV head together. Figures are means over heads and steps; times are medians of searches in one thread, with their tenth and ninetieth
percentile, of the machine as it was.

- `recall`: share of the exactly best 100 that are found. `scanned`, `touched_bytes`: see `offload.index.base.Found`.
- `mass`: share of the softmax over the whole context that is attended to with what was found, first and last tokens included;
  `output_error`: of attention over these alone, the rest dropped, relative. The row `exact` is what the exactly best give.
  `error_with_means`, `error_with_codes`: the same with the rest estimated (`offload.index.tail`), whose bytes, as a share of
  those of keys and values in bfloat16, are in the row `tails`.
- `pair`: the same searches for 3 % of the keys. `ratio_...`: an error relative to that of the exactly best, as many, the rest
  dropped. The rows `best pair` hold the least of a context, with its summaries; they make the bar. `sample`: the best with noise
  (`offload.index.sample`), no summaries, by an index of keys with noise.
- `as a key`: the same searches with keys of the tokens behind the context as queries, of the keys' own distribution. The
  rows `out of distribution` hold the smallest share of keys of each sweep whose recall is 0.95 for either kind.
- `graph` learns from the queries of the later half of the context; `graph, of keys` has none; `graph, following` begins at what
  the last step found, where steps are as far apart as `--steps` leaves them, so farther than in decoding. The rows `at recall 0.95` hold what lies between the two settings next
  to that recall, `exact_share` the share of keys that are wanted at all.
- `graph, walked`: keys that no query likes are linked to what a walk finds for them, as where no card finds their best ones;
  `graph, repaired`: with links for 2,048 queries more.
- `routes`: the floor of what learns from lists of earlier queries. Of 8,192 late queries each has a list of its best 200 keys. Lists
  are read, of the most alike query first (`by_likeness`) or of that which brings most missing keys for each that it brings, which only
  who knows the answer can tell (`by_an_oracle`), until 95 % of the best 100 of a decode query are there: the share of keys in
  them, mean and median over queries.
- `clusters, shared`: the queries of a group read the same clusters.
- `fastscan`: FAISS product quantiser of 4 bits for two channels, four times over-fetched, rows scored again by us.

Bars are of all rows, those kept from an earlier record too: of the longest context of each model, and of the worst model. That
of `graph` at 32K is set only by a context of 32,000 tokens or more; SmolLM2 reads 8,192 at most. `scan` and `add` are of time
alone and take random or repeated vectors. With a model that reads more, and a card:

    python tools/dump_vectors.py --model MODEL --context 32768 --steps 128 long.npz
    python tools/bench/index.py --vectors long.npz --lengths 8192 32768 --only hnsw graph --onto benchmarks/index.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faiss as _faiss
import numpy as np
from _record import Record, arguments, keep, parse
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from dump_vectors import vectors

from offload.index import scan
from offload.index.base import Found, Index
from offload.index.clusters import Clusters
from offload.index.flat import Flat
from offload.index.graph import Graph, nearest
from offload.index.hnsw import HNSW
from offload.index.ivf import IVF
from offload.index.pages import Pages
from offload.index.part import Part, attend, merge
from offload.index.sample import noised, sampled
from offload.index.tail import Codes, Means, Tail

faiss: Any = _faiss  # its stubs leave out most of what is used here
FIRST, LAST = 64, 256  # tokens of the context that are not indexed
K = 100
REACHED = 0.95
SHARE = 0.03  # of the keys that a pair attends to exactly
TAIL_BYTES = 0.11  # of keys and values, that the summaries of a pair may take
ROUTES, ROUTE = 8192, 200  # lists of earlier queries, and keys of each
REPAIRS = 2048  # queries
PARTS = ["fastscan", "flat", "ivf", "hnsw", "graph", "clusters", "pages", "sample", "routes", "scan", "add"]  # fmt: skip
TAILS: dict[str, type[Means | Codes]] = {"means": Means, "codes": Codes}
# What learned from queries, and what it is compared with.
COMPARED = {
    "graph": ("graph", "graph, one vote", "graph, following", "graph, walked", "graph, repaired"),
    "hnsw": ("hnsw", "hnsw, not centred"),
}
Array = NDArray[Any]


class Head(NamedTuple):
    """One KV head of a context.

    Attributes:
        keys: float16 [N, D] that are indexed.
        queries: float32 [steps, G, D].
        indexed_values: float16 [N, D]: of the indexed keys.
        as_keys: float32 [steps, 1, D]: keys of the tokens that the queries are of.
        late: float16 [M, D]: queries of the later half of the context, which an index may learn from.
        tails: Summaries of the indexed tokens, by name.
        whole: Of each step: attention over the whole context.
        others: Of each step: attention over the tokens that are not indexed.
    """

    keys: Array
    indexed_values: Array
    queries: Array
    as_keys: Array
    late: Array
    tails: dict[str, Tail]
    whole: list[Part]
    others: list[Part]


def heads(recorded: dict[str, Array], length: int, steps: int) -> list[Head]:
    """The last `length` tokens of the recorded context, and `steps` of its decode queries, evenly spread."""
    context = recorded["prompt_queries"].shape[1]
    at = np.linspace(0, recorded["decode_queries"].shape[1] - 1, steps).astype(int)
    found = []
    for h in range(recorded["keys"].shape[0]):
        keys, values = (recorded[name][h, context - length : context] for name in ("keys", "values"))  # fmt: skip
        queries = recorded["decode_queries"][h, at].astype(np.float32)
        as_keys = recorded["keys"][h, context + at][:, None].astype(np.float32)
        indexed = np.ascontiguousarray(keys[FIRST : length - LAST])
        late = recorded["prompt_queries"][h, context - length // 2 :]
        late = late.reshape(-1, late.shape[-1])
        of_indexed = np.ascontiguousarray(values[FIRST : length - LAST])
        tails: dict[str, Tail] = {name: kind(indexed, of_indexed) for name, kind in TAILS.items()}
        wide_keys, wide_values = keys.astype(np.float32), values.astype(np.float32)
        rest = np.r_[:FIRST, length - LAST : length]
        found.append(Head(
            indexed, of_indexed, queries, as_keys, late, tails,
            [over(wide_keys, wide_values, query) for query in queries],
            [over(wide_keys[rest], wide_values[rest], query) for query in queries],
        ))  # fmt: skip
    return found


class FastScan:
    """What FAISS has for the same purpose as `Flat`: codes of 2 bits a channel, scanned in registers."""

    def __init__(self, keys: Array) -> None:
        self._rows = keys
        faiss.omp_set_num_threads(1)
        self._index = faiss.IndexPQFastScan(keys.shape[1], keys.shape[1] // 2, 4, faiss.METRIC_INNER_PRODUCT)  # fmt: skip
        self._index.train(keys.astype(np.float32))
        self._index.add(keys.astype(np.float32))
        self.nbytes = keys.nbytes + keys.shape[0] * keys.shape[1] // 4

    def search(self, queries: Array, k: int) -> Found:
        some = min(4 * k, len(self._rows))
        _, candidates = self._index.search(queries, some)
        candidates.sort(axis=1)
        ids = np.empty((len(queries), k), dtype=np.int64)
        scores = np.empty((len(queries), k), dtype=np.float32)
        exact = np.empty(some, dtype=np.float32)
        for g, query in enumerate(queries):
            scan.rescore(self._rows, candidates[g], query, exact)
            scan.ranked(candidates[g], exact, ids[g], scores[g])
        touched = self._rows.size // 4 + len(queries) * some * self._rows[0].nbytes
        return Found(ids, scores, 1.0, touched)


def best(keys: Array, queries: Array, k: int = K) -> Found:
    """The exactly best k of each query, best first; nothing is counted."""
    scores = queries @ keys.astype(np.float32).T
    ids = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(scores, ids, 1), axis=1), axis=1)
    return Found(ids, np.take_along_axis(scores, ids, axis=1), 1.0, 0)


def over(keys: Array, values: Array, queries: Array) -> Part:
    """Attention over all of some tokens: [n, D] each."""
    every = np.broadcast_to(values, (len(queries), *values.shape))
    return attend(queries @ keys.T, every, queries.shape[1] ** -0.5)


def attended(head: Head, step: int, found: Found) -> dict[str, float]:
    """Mass of the softmax, and relative errors of the output, of attention over what was found and what is not indexed."""
    queries, want = head.queries[step], head.whole[step]
    scale = queries.shape[1] ** -0.5
    values = head.indexed_values[found.ids]
    exact = [head.others[step], attend(found.scores, values, scale)]
    dropped = merge(exact)
    figures = {"mass": float(np.exp(dropped.lse - want.lse).mean()), "output_error": off(dropped, want)}  # fmt: skip
    for name, tail in head.tails.items():
        rest = tail.estimate(queries, found.ids, found.scores, values, scale)
        figures[f"error_with_{name}"] = off(merge([*exact, rest]), want)
    return figures


def off(ours: Part, want: Part) -> float:
    """Relative error, mean over the queries."""
    errors = np.linalg.norm(ours.output - want.output, axis=1)
    return float((errors / np.linalg.norm(want.output, axis=1)).mean())


def means(figures: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.mean(row[name] for row in figures) for name in figures[0]}


def searched(
    heads: list[Head], indexes: list[Any], *, as_keys: bool = False
) -> dict[str, float | list[float]]:
    """Every step's search of every head."""
    recall, scanned, touched, figures, times = [], [], [], [], []
    for head, index in zip(heads, indexes, strict=True):
        for step, queries in enumerate(head.as_keys if as_keys else head.queries):
            began = time.perf_counter()
            found = index.search(queries, K)
            times.append((time.perf_counter() - began) / len(queries))
            want = best(head.keys, queries).ids
            pairs = zip(found.ids.tolist(), want.tolist(), strict=True)
            recall += [len(set(a) & set(b)) / K for a, b in pairs]
            scanned.append(found.scanned)
            touched.append(found.touched_bytes)
            if not as_keys:
                figures.append(attended(head, step, found))
    tenths = [1e6 * float(t) for t in np.quantile(times, [0.1, 0.5, 0.9])]
    shown: dict[str, float | list[float]] = {
        "recall": statistics.mean(recall), "recall_5_percent": float(np.quantile(recall, 0.05)),
        "scanned": statistics.mean(scanned), "touched_bytes": statistics.mean(touched),
        "us_per_query": tenths[1], "us_per_query_spread": [tenths[0], tenths[2]],
    }  # fmt: skip
    if figures:
        shown.update(means(figures))
    return shown


def exactly(heads: list[Head], k: int) -> dict[str, float]:
    """What the exactly best k of every step give."""
    return means(
        [attended(head, step, best(head.keys, queries, k)) for head in heads for step, queries in enumerate(head.queries)]
    )  # fmt: skip


def paired(heads: list[Head], indexes: list[Any], dropped: float) -> dict[str, float]:
    """Every step's search of every head for SHARE of the keys.

    Args:
        heads: What is searched.
        indexes: One for each.
        dropped: Error of the exactly best, as many, the rest dropped.
    """
    figures, k = [], int(SHARE * len(heads[0].keys))
    for head, index in zip(heads, indexes, strict=True):
        for step, queries in enumerate(head.queries):
            found = index.search(queries, k)
            work = {"scanned": found.scanned, "touched_bytes": float(found.touched_bytes)}
            figures.append(work | attended(head, step, found))
    shown = means(figures)
    for name in ("output_error", *(f"error_with_{name}" for name in TAILS)):
        shown[f"ratio_{name.removeprefix('error_with_')}"] = shown[name] / dropped
    return shown


def sample_row(heads: list[Head], make: Callable[[], Index], dropped: float) -> dict[str, float]:
    """What `paired` measures, of samples: one token more is searched, which says how likely the others were."""
    figures, k = [], int(SHARE * len(heads[0].keys))
    for seed, head in enumerate(heads):
        scale = head.keys.shape[1] ** -0.5
        rows = noised(head.keys, scale, seed=seed)
        index = make()
        index.build(rows)
        for step, queries in enumerate(head.queries):
            asked = np.concatenate([queries, np.ones((len(queries), 1), np.float32)], axis=1)
            found = index.search(asked, k + 1)
            part = sampled(found.ids, found.scores, rows[:, -1], head.indexed_values[found.ids], scale)  # fmt: skip
            error = off(merge([head.others[step], part]), head.whole[step])
            figures.append({"scanned": found.scanned, "touched_bytes": float(found.touched_bytes), "output_error": error})  # fmt: skip
    shown = means(figures)
    return shown | {"ratio_output_error": shown["output_error"] / dropped}


def settings(smoke: bool) -> Iterator[tuple[str, Callable[[], Index], str, list[int]]]:
    """A name, how the index is made, and what is set to which values between searches."""
    yield "flat 4 bits", lambda: Flat(bits=4), "overfetch", [4] if smoke else [1, 2, 4, 8]
    yield "flat 2 bits", lambda: Flat(bits=2), "overfetch", [4] if smoke else [1, 2, 4, 8]
    probes = [8] if smoke else [4, 8, 16, 24, 32, 48, 64]
    yield "ivf", IVF, "probes", probes
    yield "ivf, not centred", lambda: IVF(centred=False), "probes", probes
    breadths = [200] if smoke else [100, 150, 200, 300, 400, 800]
    yield "hnsw", HNSW, "breadth", breadths
    yield "hnsw, not centred", lambda: HNSW(centred=False), "breadth", breadths
    breadths = [200] if smoke else [100, 150, 200, 300, 400, 800]
    yield "graph", lambda: Graph(nearest=nearest), "breadth", breadths
    yield "graph, one vote", lambda: Graph(votes=1, nearest=nearest), "breadth", breadths
    yield "graph, following", lambda: Graph(follow=True, nearest=nearest), "breadth", breadths
    yield "graph, repaired", lambda: Graph(nearest=nearest), "breadth", breadths
    yield "graph, walked", Graph, "breadth", breadths
    yield "graph, of keys", Graph, "breadth", breadths
    fetches = [8] if smoke else [1, 2, 4, 8, 16, 32]
    yield "clusters", Clusters, "overfetch", fetches
    yield "clusters, shared", lambda: Clusters(shared=True), "overfetch", fetches
    yield "pages, boxes", Pages, "overfetch", fetches
    yield "pages, means", lambda: Pages(digest="mean"), "overfetch", fetches


def routes(heads: list[Head]) -> dict[str, Any]:
    """How many keys the lists of earlier queries hold that have REACHED of the best K of later ones between them."""
    likeness, oracle = [], []
    for seed, head in enumerate(heads):
        random = np.random.default_rng(seed)
        late = head.late[random.permutation(len(head.late))[:ROUTES]].astype(np.float32)
        keys = head.keys.astype(np.float32)
        keys -= keys.mean(axis=0)
        lists = nearest(keys, late, min(ROUTE, len(keys)))
        units = late / np.linalg.norm(late, axis=1, keepdims=True)
        asked = head.queries.reshape(-1, keys.shape[1])
        for query in asked[:: max(1, len(asked) // 32)]:
            wanted = np.zeros(len(keys), np.bool_)
            wanted[nearest(keys, query[None], K)] = True
            need = int(np.ceil(REACHED * K))
            likeness.append(_read_lists(lists, wanted, need, np.argsort(-(units @ query))) / len(keys))  # fmt: skip
            oracle.append(_read_lists(lists, wanted, need, None) / len(keys))
    return {
        "by_likeness": [statistics.mean(likeness), statistics.median(likeness)],
        "by_an_oracle": [statistics.mean(oracle), statistics.median(oracle)],
        "queries": len(oracle),
        "error": f"until {REACHED} of the best {K} of each query are there; all keys count where they never are",
    }


def _read_lists(lists: Array, wanted: Array, need: int, order: Array | None) -> int:
    """Keys that are read until enough of the wanted ones are, list by list in an order, or the best list next."""
    seen = np.zeros(len(wanted), np.bool_)
    read = got = 0
    for turn in range(len(lists)):
        if order is not None:
            chosen = lists[order[turn]]
        else:
            fresh = ~seen[lists]
            brings = (wanted[lists] & fresh).sum(axis=1)
            if not brings.any():
                break
            gain = brings / np.maximum(1, fresh.sum(axis=1))
            gain[brings < max(1, (need - got) // 20)] = (
                0  # not one key at a time, as long as many are missing
            )
            chosen = lists[gain.argmax() if gain.any() else brings.argmax()]
        new = chosen[~seen[chosen]]
        seen[new] = True
        read += len(new)
        got += int(wanted[new].sum())
        if got >= need:
            return read
    return len(wanted)


def at_recall(points: list[tuple[float, float]]) -> float | None:
    """The share scanned at a recall of REACHED, on the line between the settings next to it; None where none reaches it.

    Args:
        points: Recall and share of each setting.
    """
    points = sorted(points)
    above = next((i for i, point in enumerate(points) if point[0] >= REACHED), None)
    if not above:  # none, or already the least setting
        return None if above is None else points[0][1]
    (low, less), (high, more) = points[above - 1 : above + 1]
    return less + (more - less) * (REACHED - low) / (high - low)


def measure(
    record: Record,
    recorded: dict[str, Array],
    length: int,
    steps: int,
    smoke: bool,
    only: list[str],
) -> None:
    """Every backend over its sweep at one length."""
    some = heads(recorded, length, steps)
    of = {"tokens": length, "indexed": len(some[0].keys)}
    model = json.loads(str(recorded["about"]))["model"]
    at = f"{length}" if model == "smollm2" else f"{model} {length}"
    kv_bytes = 4 * some[0].keys.size
    shares = {name: some[0].tails[name].nbytes / kv_bytes for name in TAILS}
    wanted = int(SHARE * len(some[0].keys))
    record.row(f"tails, {at}", **of, share_of_kv_bytes=shares, error="in the rows of the indexes")
    exact = [exactly(some, k) for k in (K, wanted)]
    record.row(f"exact, {at}", **of, recall=1.0, **exact[0])
    record.row(f"pair: exact, {at}", **of, k=wanted, **exact[1])
    dropped = exact[1]["output_error"]
    if "sample" in only:
        for name, sampler in (("flat 4 bits", Flat), ("clusters", Clusters)):
            record.row(f"pair: {name}, sample, {at}", **of, k=wanted, **sample_row(some, sampler, dropped))  # fmt: skip
    if "fastscan" in only:
        began = time.perf_counter()
        fast = [FastScan(head.keys) for head in some]
        seconds = (time.perf_counter() - began) / len(some)
        held = statistics.mean(index.nbytes for index in fast)
        record.row(f"fastscan, {at}", **of, build_s=seconds, nbytes=held, **searched(some, fast))
    if "routes" in only:
        record.row(f"routes, {at}", **of, **routes(some))
    at_reached: dict[str, float | None] = {}
    for name, make, setting, values in settings(smoke):
        if name.split()[0].rstrip(",") not in only:
            continue
        indexes: list[Any] = []
        times = []
        for head in some:
            index = make()
            began = time.perf_counter()
            learns = name.startswith("graph") and name != "graph, of keys"
            index.build(head.keys, head.late if learns else None)
            if isinstance(index, Graph) and name == "graph, repaired":
                index.repair(head.late[:: max(1, len(head.late) // REPAIRS)])
            times.append(time.perf_counter() - began)
            indexes.append(index)
        held = statistics.mean(index.nbytes for index in indexes)
        reached: dict[str, list[float]] = {"decode": [], "as a key": []}
        points = []
        for value in values:
            for index in indexes:
                setattr(index, setting, value)
            found = searched(some, indexes)
            record.row(f"{name}, {setting} {value}, {at}", **of, build_s=statistics.median(times), nbytes=held, **found)  # fmt: skip
            record.row(f"pair: {name}, {setting} {value}, {at}", **of, k=wanted, **paired(some, indexes, dropped))  # fmt: skip
            both = {"decode": found}
            if not name.startswith("flat") and name != "graph, following":
                both["as a key"] = searched(some, indexes, as_keys=True)
                record.row(f"{name}, {setting} {value}, as a key, {at}", **of, **both["as a key"])  # fmt: skip
            for kind, figures in both.items():
                recall, scanned = figures["recall"], figures["scanned"]
                assert isinstance(recall, float)
                assert isinstance(scanned, float)
                if kind == "decode" and name.startswith(("hnsw", "graph")):
                    points.append((recall, scanned))
                if recall >= REACHED:
                    reached[kind].append(scanned)
        if not name.startswith("flat") and name != "graph, following":
            least = {kind: min(shares) if shares else None for kind, shares in reached.items()}
            record.row(
                f"out of distribution: {name}, {at}", **of,
                scanned_for_decode_queries=least["decode"], scanned_for_keys=least["as a key"],
                error=f"smallest of the sweep with a recall of {REACHED} or more, so no less than needed; None where none has it",
            )  # fmt: skip
        if points:
            at_reached[name] = at_recall(points)
    if at_reached:
        record.row(
            f"at recall {REACHED}, {at}", **of, exact_share=K / len(some[0].keys), scanned=at_reached,
            error="between the two settings next to that recall; None where none has it",
        )  # fmt: skip
    pairs = pairs_of(record.rows, at, shares)
    if pairs:
        ratio, what, tail = min(pairs)
        record.row(f"best pair, {at}", **of, ratio=ratio, index=what, tail=tail, error="see `pair`")


def pairs_of(
    rows: list[dict[str, Any]], at: str, shares: dict[str, float]
) -> list[tuple[float, str, str]]:
    """Ratio, index and summaries of each pair of a context whose summaries take at most TAIL_BYTES."""
    found = []
    for row in rows:
        if row["what"].startswith("pair: ") and row["what"].endswith(f", {at}"):
            found += [(row[f"ratio_{name}"], row["what"], name) for name in TAILS if f"ratio_{name}" in row and shares[name] <= TAIL_BYTES]  # fmt: skip
    return found


def join(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> None:
    """Puts what earlier rows say of backends that were not run again into the rows that compare backends.

    Args:
        rows: Of this run; those `at recall` and `best pair` are changed.
        earlier: Of the record that they come onto.
    """
    before = {row["what"]: row for row in earlier}
    ran = {row["what"] for row in rows}
    for row in rows:
        there = before.get(row["what"])
        if there is None:
            continue
        if row["what"].startswith("at recall "):
            row["scanned"] = there["scanned"] | row["scanned"]
        elif row["what"].startswith("best pair, ") and there["index"] not in ran and there["ratio"] < row["ratio"]:  # fmt: skip
            row.update({key: there[key] for key in ("ratio", "index", "tail")})


def bars(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bars of all rows: of the longest context of each model, the worst model's."""
    longest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        what, _, at = row["what"].rpartition(", ")
        key = (what, at.rpartition(" ")[0])  # the model, which contexts of SmolLM2 do not name
        if "tokens" in row and row["tokens"] >= longest.get(key, row)["tokens"]:
            longest[key] = row
    of: dict[str, list[dict[str, Any]]] = {}
    for (what, _), row in longest.items():
        of.setdefault(what, []).append(row)
    found = {}
    if flat := of.get("flat 4 bits, overfetch 4"):
        found["flat_recall100"] = min(row["recall"] for row in flat)
    ratios, shares = [], []
    for row in of.get(f"at recall {REACHED}", []):
        least = {kind: min((share for name, share in row["scanned"].items() if share and name in names), default=None) for kind, names in COMPARED.items()}  # fmt: skip
        if least["graph"] and least["hnsw"]:
            ratios.append(least["graph"] / least["hnsw"])
        if least["graph"] and row["tokens"] >= 32_000:
            shares.append(least["graph"])
    if ratios:
        found["graph_over_hnsw_scanned"] = max(ratios)
    if shares:
        found["graph_scanned_at_recall95_32k"] = max(shares)
    if adds := [row["mean_us"] for row in rows if ", add at " in row["what"]]:
        found["add_us"] = max(adds)
    if best_pairs := of.get("best pair"):
        found["pair_error_ratio"] = max(row["ratio"] for row in best_pairs)
    return found


def measure_scan(record: Record, count: int, size: int, groups: int) -> None:
    """One thread's scan of random codes, beside the rate at which one thread reads."""
    random = np.random.default_rng(0)
    keys = random.standard_normal((count, size), dtype=np.float32).astype(np.float16)
    queries = random.standard_normal((groups, size), dtype=np.float32)
    scores = np.empty((groups, count), dtype=np.float32)
    stream = np.ones(1 << 25, dtype=np.float32)
    _, reads = timed(lambda: stream.sum())
    fast = FastScan(keys)
    whole, least = timed(lambda: fast.search(queries, K))
    record.row(
        "scan, fastscan", keys=count, size=size, groups=groups, search_us=1e6 * whole, search_us_least=1e6 * least,
        code_bytes=count * size // 4, error="random vectors, one thread; median and least of 30",
    )  # fmt: skip
    for bits in (4, 2):
        index = Flat(bits=bits)
        index.build(keys)
        parts = scan.encode(keys, bits)
        took, took_least = timed(lambda: scan.scan(*parts, queries, bits, scores))  # noqa: B023
        whole, least = timed(lambda: index.search(queries, K))  # noqa: B023
        rate = index.code_bytes / took_least
        record.row(
            f"scan, {bits} bits", keys=count, size=size, groups=groups, scan_us=1e6 * took,
            scan_us_least=1e6 * took_least, search_us=1e6 * whole, search_us_least=1e6 * least,
            code_bytes=index.code_bytes, bytes_per_s=rate, share_of_one_thread_stream=rate * reads / stream.nbytes,
            error="random vectors, one thread; median and least of 30, rates of the least; not the bar, which is of all cores",
        )  # fmt: skip


def measure_add(record: Record, recorded: dict[str, Array], counts: list[int]) -> None:
    """A token added to one head's index, by the backends that learn nothing from queries."""
    keys = recorded["keys"][0]
    kinds: list[tuple[str, Callable[[], Index]]] = [("flat", Flat), ("clusters", Clusters), ("pages", Pages)]  # fmt: skip
    for name, make in kinds:
        for count in counts:
            index = make()
            index.build(np.resize(keys, (count, keys.shape[1])))
            times = []
            for i in range(1024):
                began = time.perf_counter()
                index.add(keys[i : i + 1])
                times.append(1e6 * (time.perf_counter() - began))
            record.row(
                f"{name}, add at {count}", mean_us=statistics.mean(times), median_us=statistics.median(times), max_us=max(times),
                error="1,024 tokens one by one; recorded keys, repeated to this length",
            )  # fmt: skip


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Median and least seconds of a call; on a machine that others use, only the least says what the code takes."""
    times = []
    for _ in range(31):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), min(times[1:])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=Path, help="of tools/dump_vectors.py; without it they are made")  # fmt: skip
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096, 7800])
    parser.add_argument("--steps", type=int, default=32, help="decode queries of each head")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="what is measured")
    parser.add_argument("--onto", type=Path, help="a record whose other rows are kept")
    args = parse(parser)
    if args.smoke:
        args.lengths, args.steps = [1200], 4
    if args.vectors:
        recorded = dict(np.load(args.vectors))
    else:
        recorded = vectors(args.model, max(args.lengths), 4 * args.steps)
    record = Record("index", settings={
        **vars(args), "out": None, "vectors": json.loads(str(recorded["about"])), "k": K, "first": FIRST, "last": LAST,
        "heads": recorded["keys"].shape[0],
    })  # fmt: skip
    # Compiles, and reads what Numba keeps compiled.
    measure_scan(Record("warm", settings={}), 2 * scan.BLOCK, 64, 1)
    for length in args.lengths:
        measure(record, recorded, length, args.steps, args.smoke, args.only)
    if "scan" in args.only:
        measure_scan(record, 4096 if args.smoke else 131072, 128, 4)
    if "add" in args.only:
        measure_add(record, recorded, [1024] if args.smoke else [8192, 524288])
    if args.onto:
        earlier = json.loads(args.onto.read_text())
        join(record.rows, earlier["rows"])
        keep(record, earlier)
    record.bars = bars(record.rows)
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
