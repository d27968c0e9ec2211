"""How long does a token take where an index in host memory finds what it attends to, and what does building it cost?

The 8B shape with random weights, which attends with keys and queries recorded from a real model (`_vectors.py` says how); the
device keeps means over clusters only. Beside a time stands how far the logits are from dense attention, where its KV fits a
card, else from every token streamed.

- `131072`: `Runtime.generate` after our own prefill, under a cap that no better rung fits; for each index, and with none
  (`replica`: the device selects by mean keys), what prefill takes longer. `build`: all cores index all heads and do nothing else;
- `graph`: all cores link the keys of all heads, while the card finds the best keys of queries and of keys;
- `524288`: the cache is filled with recorded keys, repeated, and random values instead of a prefill; then single steps,
  captured;
- `search`: the search of one layer alone, and its stages (`offload.index.crew`), by threads;
- `bandwidth`: the rate at which all cores search codes, against the rate at which they read memory, and one token more of one
  head.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import GIB, PeakMemory, Record, arguments, keep, parse, synchronize
from _vectors import places, played
from decode import free, load_vectors, run_ours
from generate import ALONE, CAP_BYTES, build_model, compare, dense_attention, run_dense
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import offload
from offload.cache import CACHE
from offload.decode import captured_steps
from offload.demand import NEAREST_BYTES
from offload.index.crew import TASK, Crew, search_rows, spaces_of, staged
from offload.index.finders import Copied, Finder, finder
from offload.index.graph import nearest
from offload.index.paged import BFLOAT16, Rows, Scratch, gathered
from offload.index.workers import Workers, cores
from offload.tiers.nearest import CardNearest
from offload.tiers.pinned import HostBudget, HostRegion, PinBudget, commit_regions
from offload.tiers.rows import RowShape
from offload.tiers.search import LEARNED, Found, HostSearch, Searchers, SearchSettings

CHECKED = 8
K = 100  # keys that a graph is asked for


@njit(nogil=True, cache=True)
def _read(words: Any) -> Any:
    total = np.int64(0)
    for i in range(words.shape[0]):
        total += words[i]
    return total


def measure_bandwidth(record: Record, tokens: int, heads: int, threads: int | None) -> None:
    """Rate of `flat` and `clusters` over many heads, and of reading memory, all cores."""
    size, groups, k, page = 128, 4, 256, 64
    workers, crew = Workers(threads), Crew(threads)
    words = np.ones(2**27 if tokens > 10_000 else 2**20, np.int64)
    parts = np.array_split(words, 4 * workers.threads)

    def best(run: Any, repeats: int = 5) -> float:
        run()
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
        return min(found)

    def read(i: int, worker: int) -> None:
        _read(parts[i])

    stream = words.nbytes / best(lambda: workers.run(read, len(parts)))
    random = np.random.default_rng(0)
    pool = (random.standard_normal((tokens // page, page, 1, 2 * size)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # fmt: skip
    rows = Rows(pool, BFLOAT16, np.arange(tokens // page), 0, size)
    queries = random.standard_normal((groups, size)).astype(np.float32) / 11
    for name in ("flat", "clusters"):
        one = finder(name, tokens, size)
        scratches = [
            Scratch.of(groups, tokens, size, size, one.candidates(groups, k)) for _ in range(workers.threads)
        ]  # fmt: skip
        began = time.perf_counter()
        one.extend(rows, tokens, Scratch.of(1, 128 * size, size, size, 1), None)
        build_s = time.perf_counter() - began
        finders = [one, *(one.copy() for _ in range(heads - 1))]
        out = np.empty((heads, groups, size), np.float32)
        lse, ids = np.empty((heads, groups), np.float32), np.empty((heads, k), np.int32)
        tasks = np.zeros(heads, TASK)
        for head, task in enumerate(tasks):
            search_rows(task, rows)
            task["groups"], task["count"], task["scale"] = groups, tokens, 1.0
            task["query_at"], task["k"] = queries.ctypes.data, k
            task["ids_at"], task["out_at"] = ids[head].ctypes.data, out[head].ctypes.data
            task["lse_at"] = lse[head].ctypes.data
            finders[head].describe(task)
        shares = crew.threads // heads
        batches = staged(tasks, shares) if shares > 1 else [tasks]
        spaces = spaces_of(scratches)

        def search(batches: Any = batches, spaces: Any = spaces) -> None:
            crew.run(batches, spaces)

        seconds = best(search)
        nbytes = sum(each.nbytes for each in finders)
        adds = []
        grown = finder(name, tokens + 2 * page, size)
        grown.extend(rows, tokens - page, Scratch.of(1, 128 * size, size, size, 1), None)
        small = Scratch.of(1, 128 * size, size, size, 1)
        for n in range(tokens - page, tokens + 1):
            began = time.perf_counter()
            grown.extend(rows, n, small, None)
            adds.append(time.perf_counter() - began)
        record.row(
            f"{name}, {heads} heads of {tokens}", seconds=seconds, bytes=nbytes, bytes_per_s=nbytes / seconds, stream_bytes_per_s=stream,
            threads=workers.threads, build_s_of_a_head=build_s, add_us_mean=1e6 * statistics.mean(adds), add_us_max=1e6 * max(adds),
            error="tests/index/test_paged.py compares with brute force",
        )  # fmt: skip
        if name == "flat":
            record.bars["flat_bandwidth_share"] = nbytes / seconds / stream
    workers.close()
    crew.close()


def measure_search(record: Record, vectors: dict[str, Any], tokens: int, args: argparse.Namespace, device: torch.device) -> None:  # fmt: skip
    """One layer's search on recorded keys, several layers in turn, with a gap like that of the device's part."""
    heads, size, page, layers, groups = 8, 128, 64, 2 if args.smoke else 4, 4
    shape = RowShape(kv_heads=heads, key_dim=size, value_dim=size, dtype=torch.bfloat16)
    at = places(tokens, vectors["context"], vectors["keys"].shape[1])[:tokens]
    repeats = size // vectors["keys"].shape[-1]
    nbytes = tokens * heads * 2 * size * 2
    pinned = PinBudget(limit=layers * nbytes)
    regions = [HostRegion(page * heads * 2 * size * 2, nbytes, device, pinned) for _ in range(layers)]  # fmt: skip
    commit_regions([(region, nbytes) for region in regions])
    pools = [region.view(0, nbytes).view(torch.bfloat16).view(tokens // page, page, heads, 2 * size) for region in regions]  # fmt: skip
    for layer, pool in enumerate(pools):
        generator = torch.Generator().manual_seed(layer)
        for head in range(heads):
            keys = vectors["keys"][(layer % 3 * heads + head) % len(vectors["keys"])].cpu()[at]
            pool[:, :, head, :size] = keys.repeat(1, repeats).view(-1, page, size).bfloat16()
            pool[:, :, head, size:] = torch.randn((tokens // page, page, size), generator=generator)
    recorded = vectors["queries"].cpu().float()
    pages = np.arange(tokens // page, dtype=np.int64)[None]
    threads = sorted({args.threads or cores(), max(1, cores() - 1), max(1, cores() // 2)})
    for index in [name for name in args.index if name != "replica"]:
        for count in threads:
            shared = Searchers(count)
            settings = SearchSettings(index=index, tokens=args.retrieved)
            searches = [HostSearch(shape, settings, shared, batch=1, blocks=tokens // page, page=page, host=HostBudget()) for _ in pools]  # fmt: skip
            for search, pool in zip(searches, pools, strict=True):
                search.extend(pool, pages, [0])
            found = Found.of(1, heads * groups, shape, args.retrieved, device=torch.device("cpu"), pinned=device.type == "cuda")  # fmt: skip
            query = torch.zeros((1, heads * groups, size))
            for search, pool in zip(searches, pools, strict=True):  # what is asked is written once
                search.attend(query, pool, found, scale=size**-0.5, softcap=None)
            whole: list[float] = []
            stages: dict[int, list[float]] = {}
            for step in range(2 if args.smoke else 24):
                for layer, (search, pool) in enumerate(zip(searches, pools, strict=True)):
                    some = recorded[layer % 3 * heads : layer % 3 * heads + heads, step % recorded.shape[1]]  # fmt: skip
                    some = some[:, torch.arange(groups) % some.shape[1]].repeat(1, 1, repeats)
                    query.copy_((some / repeats**0.5).reshape(1, -1, size))
                    gap = time.perf_counter() + args.gap_us / 1e6
                    while time.perf_counter() < gap:
                        pass
                    began = time.perf_counter()
                    if step % 2:  # all of it
                        search.attend(query, pool, found, scale=size**-0.5, softcap=None)
                        whole.append(time.perf_counter() - began)
                        continue
                    asked = search._asked
                    for i, batch in enumerate(asked.batches if asked else []):
                        began = time.perf_counter()
                        shared.crew.run([batch], asked.spaces if asked else batch)
                        stages.setdefault(i, []).append(time.perf_counter() - began)
            record.row(
                f"search of {index}, {heads} heads of {tokens}, {count} threads", ms=1000 * statistics.median(whole),
                spread_ms=[1000 * min(whole), 1000 * max(whole)], stages_ms=[1000 * statistics.median(times) for times in stages.values()],
                layers=layers, gap_us=args.gap_us, error="tests/index/test_crew.py compares with calls, tests/index/test_paged.py with brute force",
            )  # fmt: skip
            shared.close()
    for region in regions:
        region.close()


def measure_131072(
    record: Record, model: Any, vectors: dict[str, Any], ids: Tensor, args: argparse.Namespace, settings: dict[str, Any]
) -> None:  # fmt: skip
    """Each index after a prefill of ours, and dense attention to compare."""
    n, got = ids.shape[1], {}
    for index in args.index:
        got[index] = run_ours(model, ids, args.new, settings | {"index": index}, logits=True)
        free()
    first = got[args.index[0]]
    reference = run_dense(model, ids, args.chunk, first["answer"], CHECKED)
    free()
    dense_s = reference["prefill_s"]
    record.row(f"dense prefill {n}", prefill_s=dense_s, logit_error=0.0)
    for index, found in got.items():
        # Where the tokens are others than those that dense attention was asked about, only the first logits compare.
        same = bool(torch.equal(found["answer"][:, :CHECKED], first["answer"][:, :CHECKED]))
        shown = CHECKED if same else 1
        more: dict[str, Any] = {}
        if "replica" in got:
            more["build_share_of_prefill"] = (
                found["prefill_s"] - got["replica"]["prefill_s"]
            ) / dense_s
        errors = compare(found["logits"][:shown], reference["logits"][:shown])
        record.row(f"{index} {n}", **found["row"], **errors, **more)
    record.bars[f"host_ms_{n}"] = min(
        found["row"]["ms_per_token"] for index, found in got.items() if index != "replica"
    )
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    for index in ("flat", "clusters"):
        built = build_all(index, n, heads, args.threads)
        record.row(f"build {index}, {heads} heads of {n}", seconds=built, share_of_dense_prefill=built / dense_s, error=0.0)  # fmt: skip
        if index == "flat":
            record.bars["flat_build_share"] = built / dense_s


def measure_graph(
    record: Record, model: Any, vectors: dict[str, Any], ids: Tensor, args: argparse.Namespace
) -> None:
    """All graphs of a model, against its dense prefill."""
    n, config = ids.shape[1], model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    dense_s = run_dense(model, ids, args.chunk, ids[:, :1], 1)["prefill_s"]
    free()
    for queries in args.queries:
        drawn = draw_all(vectors, n, heads, args.threads, model.device, min(queries, n // 4))
        share = drawn["seconds"] / dense_s
        record.row(f"build graph of {queries:,} queries, {heads} heads of {n}", **drawn, dense_prefill_s=dense_s, share_of_dense_prefill=share)  # fmt: skip
        record.bars["build_share_of_prefill"] = max(share, record.bars.get("build_share_of_prefill", 0))  # fmt: skip


def draw_all(
    vectors: dict[str, Any], tokens: int, heads: int, threads: int | None, device: torch.device, learned: int
) -> dict[str, Any]:  # fmt: skip
    """What `build_all` measures, of graphs: of recorded keys and queries, tiled, with noise so that none is there twice.

    The card finds the best keys while all cores link them.
    """
    size, page, sets = 128, 64, min(8, heads)
    generator = np.random.default_rng(0)
    at = places(tokens, vectors["context"], vectors["keys"].shape[1])[:tokens]

    def noisy(some: NDArray[Any], n: int) -> NDArray[np.float32]:
        wide = np.tile(np.resize(some, (n, some.shape[1])).astype(np.float32), size // some.shape[1])  # fmt: skip
        noise = generator.standard_normal(wide.shape, np.float32)
        wide += np.float32(0.3) * wide.std(axis=0) * noise
        return wide

    pools, taught = [], []
    for head in range(sets):
        pool = np.zeros((tokens // page, page, 1, 2 * size), np.uint16)
        keys = noisy(vectors["keys"][head].cpu().numpy()[at.cpu().numpy()], tokens)
        pool[..., :size] = (keys.view(np.uint32) >> 16).astype(np.uint16).reshape(-1, page, 1, size)
        pools.append(pool)
        recorded = vectors["queries"][head].cpu().numpy()
        taught.append(noisy(recorded.reshape(-1, recorded.shape[-1]), learned))
    rows = [Rows(pool, BFLOAT16, np.arange(tokens // page), 0, size) for pool in pools]
    near = CardNearest(device, NEAREST_BYTES)
    scratch = Scratch.of(1, 128 * size, size, size, 1)
    kept: list[Finder | None] = [None] * heads
    workers = Workers(threads)

    def draw(i: int, worker: int) -> None:
        one = finder("graph", tokens, size, nearest=near)
        one.extend(rows[i % sets], tokens, scratch, taught[i % sets])
        kept[i] = one if i < sets else None

    finder("graph", tokens, size, nearest=near).extend(rows[0], min(4096, tokens), scratch, taught[0][:1024])  # fmt: skip
    began = time.perf_counter()
    workers.run(draw, heads)
    seconds = time.perf_counter() - began
    workers.close()
    recalls, shares = [], []
    for one, of, queries in zip(kept, rows, taught, strict=False):
        assert isinstance(one, Copied)
        asked = queries[:: max(1, len(queries) // 16)] + 0.1 * queries.std() * generator.standard_normal(size, np.float32)  # fmt: skip
        found = one.index.search(asked, K)
        want = nearest(gathered(of, 0, tokens), asked, K)
        recalls += [len(np.intersect1d(a, b)) / K for a, b in zip(found.ids, want, strict=True)]
        shares.append(found.scanned)
    return {
        "seconds": seconds, "queries": len(taught[0]), "recall": statistics.mean(recalls), "scanned": statistics.mean(shares),
        "error": "recall of the best 100, by brute force, for such queries as were learned from; benchmarks/index.json has others",
    }  # fmt: skip


def build_all(name: str, tokens: int, heads: int, threads: int | None) -> float:
    """Seconds in which all cores build the indexes of so many heads, and do nothing else."""
    size, page = 128, 64
    random = np.random.default_rng(0)
    pool = (random.standard_normal((tokens // page, page, 1, 2 * size)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)  # fmt: skip
    rows = Rows(pool, BFLOAT16, np.arange(tokens // page), 0, size)
    finders = [finder(name, tokens, size) for _ in range(heads)]
    workers = Workers(threads)

    def build(i: int, worker: int) -> None:
        finders[i].extend(rows, tokens, Scratch.of(1, 128 * size, size, size, 1), None)

    finder(name, 4096, size).extend(
        rows, min(4096, tokens), Scratch.of(1, 128 * size, size, size, 1), None
    )
    began = time.perf_counter()
    workers.run(build, heads)
    built = time.perf_counter() - began
    workers.close()
    return built


@torch.no_grad()
def measure_filled(
    record: Record, model: Any, vectors: dict[str, Any], tokens: int, args: argparse.Namespace, settings: dict[str, Any]
) -> None:  # fmt: skip
    """Steps behind a cache that was filled, not prefilled."""
    device, config = model.device, model.config
    kv_heads = config.num_key_value_heads
    size = model.model.layers[0].self_attn.head_dim
    keys = vectors["keys"]
    at = places(tokens, vectors["context"], keys.shape[1])
    repeats = size // keys.shape[-1]
    for index in [name for name in args.index if name != "replica"]:
        with PeakMemory() as peak, offload.attach(model, mode="fast", **settings, index=index) as runtime:  # fmt: skip
            cache = runtime.new_cache(tokens + args.new + 64)
            cache.start(1)
            began = time.perf_counter()
            for layer, store in enumerate(cache.layer_stores):
                heads = slice(layer % 3 * kv_heads, (layer % 3 + 1) * kv_heads)
                generator = torch.Generator(device).manual_seed(layer)
                for first in range(0, tokens, 4096):
                    some = keys[heads][:, at[first : min(first + 4096, tokens)]]
                    some = some.to(device, model.dtype).repeat(1, 1, repeats).transpose(0, 1)
                    values = torch.randn(some.shape, generator=generator, device=device).to(model.dtype)  # fmt: skip
                    store.put(first, torch.cat([some, values], dim=-1).unsqueeze(0))
            synchronize()
            filled_s = time.perf_counter() - began
            token = torch.ones((1, 1), dtype=torch.long, device=device)

            def step(n: int, cache: Any = cache, token: Tensor = token) -> Tensor:
                position = torch.full((1, 1), tokens + n, device=device)
                out = model(input_ids=token, position_ids=position, **{CACHE: cache}, use_cache=True)  # fmt: skip
                return out.logits[0, -1].float()  # type: ignore[no-any-return]

            began = time.perf_counter()
            at_first = step(0)
            built_s = time.perf_counter() - began  # builds the index
            with captured_steps(model, cache, compiles=bool(settings.get("compile"))) as captured:
                for n in range(1, 8):
                    step(n)
                synchronize()
                times = []
                for n in range(8, 8 + args.new):
                    began = time.perf_counter()
                    token.copy_(step(n).argmax().view(1, 1))
                    synchronize()
                    times.append(time.perf_counter() - began)
                replays = captured.replays
            searches = [store.path.search for store in cache.layer_stores if store.path is not None]
            searched = sum(search.seconds / max(1, search.searches) for search in searches if search is not None)  # fmt: skip
            indexed = sum(search.nbytes for search in searches if search is not None)
            tail = statistics.mean(float(store.path.masses()[0]) for store in cache.layer_stores if store.path)  # fmt: skip
            # The first step once more, every token streamed.
            cache.crop(tokens - cache.get_seq_length())
            token.fill_(1)
            with cache.streaming(True):
                exact = step(0)
            kl = float(
                (exact.softmax(-1) * (exact.log_softmax(-1) - at_first.log_softmax(-1))).sum()
            )
            ms = 1000 * statistics.median(times)
            record.row(
                f"{index} {tokens}", ms_per_token=ms, spread_ms=[1000 * min(times), 1000 * max(times)], searched_ms=1000 * searched,
                new_tokens=args.new, replayed_steps=replays, filled_s=filled_s, built_s=built_s, index_bytes=indexed, tail_mass=tail,
                kl_of_first_step=kl, peak_bytes=peak.nbytes, host_bytes=sum(store.region.committed for store in cache.layer_stores),
                error="kl_of_first_step, against every token streamed",
            )  # fmt: skip
            bar = f"host_ms_{tokens}"
            record.bars[bar] = min(ms, record.bars.get(bar, ms))
            cache.close()
        del cache, step, store, searches, captured  # the next one needs their memory
        free()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--new", type=int, default=160, help="tokens that are decoded")
    parser.add_argument("--chunk", type=int, default=1024, help="prefill chunk")
    parser.add_argument("--vectors", default="smollm2@7168", help="a real model and the tokens that it reads")  # fmt: skip
    parser.add_argument("--index", nargs="*", default=["replica", "flat", "clusters"], help="replica: none")  # fmt: skip
    parser.add_argument("--cap-gib", type=float, default=17.6, help="device memory at 131,072 tokens")  # fmt: skip
    parser.add_argument("--retrieved", type=int, default=256, help="tokens per KV head")
    parser.add_argument("--threads", type=int, help="that search; default: one for each core")
    parser.add_argument("--gap-us", type=float, default=300.0, help="between two searches")
    parser.add_argument(
        "--only", nargs="*", default=["bandwidth", "search", "131072", "graph", "524288"]
    )
    parser.add_argument("--queries", nargs="*", type=int, default=[LEARNED, 8192], help="that graphs learn from")  # fmt: skip
    parser.add_argument("--onto", type=Path, help="a record whose other rows and bars are kept")
    args = parse(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = {"131072": 131072, "524288": 524288}
    if args.smoke:
        args.new, args.chunk, args.retrieved = 12, 256, 64
        lengths = {"131072": 3072, "524288": 4096}
    record = Record("host", settings={**vars(args), "vectors": Path(args.vectors).name, "out": None, "onto": None, "cap_bytes": CAP_BYTES})  # fmt: skip
    if "bandwidth" in args.only:
        for heads in (8, 32):
            n = lengths["131072"]
            measure_bandwidth(record, n, 2 if args.smoke else heads, args.threads)
        record.write(args.out)
        gc.collect()
    if not {"search", "131072", "graph", "524288"} & set(args.only):
        return
    AttentionInterface.register(ALONE, dense_attention)
    AttentionMaskInterface.register(ALONE, lambda **kwargs: None)
    vectors = load_vectors(args.vectors, args.new + CHECKED, device)
    if "search" in args.only:
        for n in lengths.values():
            measure_search(record, vectors, n, args, device)
        record.write(args.out)
        gc.collect()
    if not {"131072", "graph", "524288"} & set(args.only):
        return
    model = build_model(args.smoke, device)
    torch.manual_seed(1)
    text = torch.randint(1, model.config.vocab_size, (1, lengths["131072"]), device=device)
    base: dict[str, Any] = {"chunk": args.chunk, "compile": True, "rung": "clusters", "retrieved": args.retrieved}  # fmt: skip
    if args.threads:
        base["threads"] = args.threads
    if args.smoke:
        base["window"] = 256
    if "131072" in args.only:
        n = lengths["131072"]
        cap = {"gpu_memory": int(args.cap_gib * GIB)} if device.type == "cuda" else {}
        with played(model, vectors, n):
            measure_131072(record, model, vectors, text[:, :n], args, base | cap)
        record.write(args.out)
    if "graph" in args.only:
        with played(model, vectors, lengths["131072"]):
            measure_graph(record, model, vectors, text[:, : lengths["131072"]], args)
        record.write(args.out)
    if "524288" in args.only:
        cap = {"gpu_memory": CAP_BYTES} if device.type == "cuda" else {}
        with played(model, vectors, lengths["524288"]):
            measure_filled(record, model, vectors, lengths["524288"], args, base | cap)
    if args.onto:
        earlier = json.loads(args.onto.read_text())
        keep(record, earlier)
        record.bars = earlier["bars"] | record.bars
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
