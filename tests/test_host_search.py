"""The host path: tokens found by an index in host memory and attended to there, in `generate`."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from cards import DEVICES
from families import FAMILIES, PAD, left_padded, prompts

import offload
from offload.index import BACKENDS, finders, paged
from offload.tiers import search
from offload.tiers.pinned import HostBudget
from offload.tiers.rows import RowShape
from offload.tiers.search import HostSearch, Searchers, SearchSettings

N = 700
CALL: dict[str, Any] = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None}
# Sinks, a window of four blocks, and of the other tokens all are selected.
ALL: dict[str, Any] = {
    "mode": "fast", "sinks": 64, "window": 256, "rung": "4k4v", "retrieved": 1024, "compile": False,
}  # fmt: skip
ON = pytest.mark.parametrize("device", DEVICES)


def build(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model.to(device=device, dtype=dtype)


def steps_off(model: Any, ids: Any, **settings: Any) -> tuple[float, Any]:
    """How far the logits of two steps are from the stock cache's, and the report."""
    call = CALL | {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **call)
    with offload.attach(model, **(ALL | settings)) as runtime:
        got = runtime.generate(ids, **call)
        report = runtime.report()
    # The prompt's last logits are exact: its chunk streams everything.
    off = [(g - w).abs().max() for g, w in zip(got.logits[1:], want.logits[1:], strict=True)]
    return float(max(off)), report


@ON
@pytest.mark.parametrize(
    ("name", "index"),
    [
        *(("llama", index) for index in (*BACKENDS, "auto")),
        *((name, "flat") for name in ("qwen2", "gemma2", "gpt_oss", "opt", "gpt2")),
    ],
)
def test_with_every_token_found_the_tokens_are_the_stock_caches(
    name: str, index: str, device: str
) -> None:
    model = build(name, device)
    for padded in (False, True):
        ids, mask = left_padded(2, N, pads=(0, 130))
        inputs: dict[str, Any] = {"attention_mask": mask.to(device)} if padded else {}
        want = model.generate(ids.to(device), **inputs, **CALL)
        with offload.attach(model, **ALL, index=index, threads=2) as runtime:
            got = runtime.generate(ids.to(device), **inputs, **CALL)
            report = runtime.report()
        assert torch.equal(got, want), padded
        assert report.tokens_on_host > 400
        assert report.tail_mass < 1e-6


@ON
def test_threads_that_share_a_head_find_what_one_does(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    call = CALL | {"max_new_tokens": 30}
    few = ALL | {"retrieved": 64, "rung": "clusters"}
    answers = []
    for threads in (1, 2, 7, 16):
        with offload.attach(model, **few, index="flat", threads=threads) as runtime:
            answers.append(runtime.generate(ids, **call))
            assert (
                runtime.shape.rows[0].kv_heads == 2
            )  # so that 7 threads are three for each head, and one waits
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@ON
def test_what_is_found_does_not_depend_on_the_replica(device: str) -> None:
    """Mean keys hide most of what a step attends to; codes of four bits on the host do not."""
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    few = {"rung": "clusters", "retrieved": 128}
    by_device, _ = steps_off(model, ids, **few)
    by_host, report = steps_off(model, ids, **few, index="flat")
    assert by_host < by_device
    assert report.index == "flat"
    assert report.index_bytes > 0
    assert report.search_s > 0


@ON
def test_what_searches_is_chosen_behind_the_prompt(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of random weights have no structure: few clusters find few of the best."""
    tried: Any = finders._tried

    def by_keys(one: Any, *args: Any) -> tuple[float, float]:
        # What is faster must not depend on what else this machine does.
        return tried(one, *args)[0], 100.0 if one.name == "flat" else float(one.overfetch)

    monkeypatch.setattr(finders, "_tried", by_keys)
    model = build("llama", device)
    ids = prompts(2, 2 * N).to(device)
    few = ALL | {"rung": "clusters", "retrieved": 32, "index": "auto"}
    heads = 2 * 2 * model.config.num_hidden_layers
    chosen = {}
    for recall in (0.01, 1.0):
        with offload.attach(model, **few, recall=recall) as runtime:
            runtime.generate(ids, **CALL)
            report = runtime.report()
        chosen[recall] = report.index_heads
        assert sum(report.index_heads.values()) == heads
        for name, count in report.index_heads.items():
            assert f"{name} in {count} heads" in str(report)
    assert chosen[0.01] == {"clusters": heads}
    assert chosen[1.0]["flat"] > 0


@ON
def test_a_conversation_goes_on_and_is_cropped(device: str) -> None:
    model = build("llama", device)
    call = CALL | {"max_new_tokens": 40}
    for index in ("flat", "clusters", "hnsw", "auto"):
        with offload.attach(model, **ALL, index=index) as runtime:
            cache = runtime.new_cache()
            ids = prompts(2, N).to(device)
            for turn in range(4):
                want = model.generate(ids, **call)
                got = runtime.generate(ids, past_key_values=cache, **call)
                assert torch.equal(got, want), (index, turn)
                cut = (0, 400, 30, 0)[
                    turn
                ]  # the user edits what was said, deep into the host's pages
                more = prompts(2, 90 + cut, seed=turn + 5).to(device)
                ids = torch.cat([got[:, : got.shape[1] - cut], more], dim=1)
            assert runtime.report().reused_tokens > N


@ON
def test_several_answers_to_one_prompt(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    call: dict[str, Any] = {
        "max_new_tokens": 80,
        "do_sample": True,
        "num_return_sequences": 3,
        "eos_token_id": None,
    }
    for index in ("flat", "clusters", "ivf"):
        torch.manual_seed(7)
        want = model.generate(ids, **call)
        with offload.attach(model, **ALL, index=index) as runtime:
            torch.manual_seed(7)
            assert torch.equal(runtime.generate(ids, **call), want)


@ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_half_precision_are_read_as_they_are(dtype: torch.dtype, device: str) -> None:
    model = build("llama", device, dtype)
    ids = prompts(1, N).to(device)
    exact, _ = steps_off(model, ids, rung="clusters", retrieved=1024, index="replica")
    found, report = steps_off(model, ids, rung="clusters", retrieved=1024, index="flat")
    assert report.tail_mass < 1e-6
    assert found <= max(1.5 * exact, 2e-2)


@ON
def test_drafts_come_from_the_host_and_are_verified(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    want = model.generate(ids, **CALL)
    few = ALL | {"mode": "verified", "retrieved": 64, "rung": "clusters"}
    with offload.attach(model, **few, index="flat") as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)


@ON
def test_what_a_search_raises_reaches_who_called(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    searched = iter(range(1000))

    def fails(*args: Any, **more: Any) -> None:
        if next(searched) == 40:
            raise RuntimeError("the rows are gone")
        attend_some(*args, **more)

    attend_some = paged.attend_some
    monkeypatch.setattr(finders, "attend_some", fails)
    with offload.attach(model, **ALL, index="pages", threads=2) as runtime:
        with pytest.raises(RuntimeError, match="the rows are gone"):
            runtime.generate(ids, **CALL)
        monkeypatch.undo()
        assert torch.equal(runtime.generate(ids, **CALL), model.generate(ids, **CALL))
        threads = {t.name for t in threading.enumerate()}
        assert "offload-search-1" in threads
    for thread in threading.enumerate():
        if thread.name.startswith(("offload-search", "offload-index")):
            thread.join(timeout=10)
            assert not thread.is_alive()


@ON
def test_an_index_that_does_not_fit_the_host_is_refused_with_what_it_takes(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    with offload.attach(model, **ALL, index="flat") as runtime:
        runtime.generate(ids, **CALL)
        report = runtime.report()
    with offload.attach(model, **ALL) as runtime:
        runtime.generate(ids, **CALL)
        pages = runtime.report().planned_host
    assert report.planned_host >= pages + report.index_bytes
    with offload.attach(model, **ALL, cpu_memory=pages) as runtime:
        assert runtime.generate(ids, **CALL).shape[1] == N + 150
    with (
        offload.attach(model, **ALL, index="flat", cpu_memory=pages) as runtime,
        pytest.raises(offload.BudgetError, match=r"memory\.cpu"),
    ):
        runtime.generate(ids, **CALL)


@ON
@pytest.mark.parametrize("index", ["flat", "clusters", "hnsw"])
def test_an_index_that_failed_once_is_right_afterwards(
    index: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head fails to take tokens in, others have them: nobody has any twice, and the next call goes on."""
    model = build("llama", device)
    ids = prompts(1, 900).to(device)
    call = CALL | {"max_new_tokens": 20}
    want = model.generate(ids, **call)
    kind: Any = {
        "flat": finders.PagedFlat,
        "clusters": finders.PagedClusters,
        "hnsw": finders.Copied,
    }[index]
    calls = iter(range(1000))

    def fails(self: Any, *args: Any) -> None:
        if next(calls) == 1:
            raise MemoryError("once")
        extend(self, *args)

    extend: Any = kind.extend
    with offload.attach(model, **ALL, index=index, threads=1) as runtime:
        cache = runtime.new_cache()
        runtime.generate(ids[:, :600], past_key_values=cache, **call)
        monkeypatch.setattr(kind, "extend", fails)
        with pytest.raises(MemoryError, match="once"):
            runtime.generate(ids, past_key_values=cache, **call)
        monkeypatch.undo()
        assert cache.is_open
        assert torch.equal(runtime.generate(ids, past_key_values=cache, **call), want)


@ON
def test_a_pass_that_could_be_trained_is_searched_too(device: str) -> None:
    model = build("llama", device)
    ids = prompts(1, N).to(device)
    for index in ("flat", "graph"):
        with offload.attach(model, **ALL, index=index) as runtime:
            cache = runtime.new_cache(max_tokens=N + 8)
            model(input_ids=ids, cache=cache)
            out = model(input_ids=ids[:, :1], cache=cache, position_ids=torch.full((1, 1), N, device=device))  # fmt: skip
            assert out.logits.isfinite().all()


@ON
def test_what_indexes_take_is_charged_and_given_back(device: str) -> None:
    model = build("llama", device)
    with offload.attach(model, **ALL, index="hnsw") as runtime:
        before = runtime.budgets.host.held
        caches = []
        for seed in (1, 2):
            caches.append(runtime.new_cache())
            runtime.generate(prompts(1, N, seed=seed).to(device), past_key_values=caches[-1], **(CALL | {"max_new_tokens": 2}))  # fmt: skip
        report = runtime.report()
        pages = sum(store.region.committed for cache in caches for store in cache.layer_stores)
        held = runtime.budgets.host.held
        assert held - before >= pages + 2 * report.index_bytes
        for cache in caches:
            cache.close()
        # Regions wait for the next cache, indexes do not.
        assert runtime.budgets.host.held == before + pages


def test_a_cache_that_is_collected_within_its_indexing_hangs_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama", "cpu")
    ids = prompts(1, N)
    begun, goes_on = threading.Event(), threading.Event()

    def slow(self: Any, *args: Any) -> None:
        begun.set()
        assert goes_on.wait(20)
        gc.collect()  # as it may at any allocation
        extend(self, *args)

    extend: Any = finders.PagedFlat.extend
    monkeypatch.setattr(finders.PagedFlat, "extend", slow)
    monkeypatch.setattr(search, "AT_ONCE", 1)
    runtime = offload.attach(model, **ALL, index="flat", threads=1)

    def lose() -> None:
        cache = runtime.new_cache(max_tokens=N + 8)
        with torch.no_grad():
            model(input_ids=ids[:, :600], cache=cache)
        cycle: list[Any] = [cache]
        cycle.append(cycle)

    gc.disable()
    try:
        lose()
        assert begun.wait(20)
        goes_on.set()
        ends = threading.Thread(target=runtime.detach, daemon=True)
        ends.start()
        ends.join(timeout=20)
        assert not ends.is_alive()
    finally:
        gc.enable()
    monkeypatch.undo()


@pytest.mark.parametrize("at_once", [1, 300, 8192])
def test_a_prompt_is_indexed_as_it_is_read_so_many_tokens_together(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    tasks = []

    def seen(self: Any, rows: Any, count: int, *args: Any) -> None:
        counts.append(count)
        extend(self, rows, count, *args)

    extend: Any = finders.PagedFlat.extend
    model = build("llama", "cpu")
    ids = prompts(1, 1400)
    with offload.attach(model, **(ALL | {"chunk": 64}), index="flat", threads=1) as runtime:
        want = runtime.generate(ids, max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(finders.PagedFlat, "extend", seen)
    monkeypatch.setattr(search, "AT_ONCE", at_once)
    with offload.attach(model, **(ALL | {"chunk": 64}), index="flat", threads=1) as runtime:
        assert torch.equal(runtime.generate(ids, max_new_tokens=4, do_sample=False), want)
        tasks = sorted(set(counts))
    gaps = [b - a for a, b in zip([0, *tasks], tasks, strict=False)]
    assert all(gap >= at_once for gap in gaps[:-1])  # the last is what is left at the first step
    if at_once == 8192:
        assert len(tasks) == 1
    else:
        assert len(tasks) >= min(1400 // (at_once + 64), 10)


def test_what_was_indexed_before_an_error_is_not_kept_for_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extend: Any = finders.PagedFlat.extend
    calls = []

    def fails(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # of the second head
            raise MemoryError("no room")
        extend(self, *args)

    def searched() -> HostSearch:
        row = RowShape(kv_heads=2, key_dim=32, value_dim=32, dtype=torch.float32)
        host = HostBudget(available=lambda _: 10**12)
        return HostSearch(row, SearchSettings(index="flat", tokens=8), Searchers(1), batch=1, blocks=16, page=64, host=host)  # fmt: skip

    monkeypatch.setattr(search, "AT_ONCE", 256)
    monkeypatch.setattr(finders.PagedFlat, "extend", fails)
    pool = torch.randn((16, 64, 2, 64), generator=torch.Generator().manual_seed(0))
    pages = np.arange(16, dtype=np.int64)[None]
    one, other = searched(), searched()
    one.extend_later(pool, pages[:, :8], [0], None)
    one.truncate(4)
    pool[4:] = torch.randn((12, 64, 2, 64), generator=torch.Generator().manual_seed(1))
    one.extend_later(pool, pages[:, :9], [0], None)
    assert one._building is not None  # it begins again
    for each in (one, other):
        each.extend(pool, pages[:, :9], [0])
    for head, want in zip(one._finders[0], other._finders[0], strict=True):
        assert isinstance(head, finders.PagedFlat)
        assert isinstance(want, finders.PagedFlat)
        assert head._blocks == want._blocks == 4
        for mine, theirs in zip(head._coded.arrays, want._coded.arrays, strict=True):
            np.testing.assert_array_equal(mine[:4], theirs[:4])
    for each in (one, other):
        each._shared.close()


def test_padding_takes_no_places_of_what_is_found() -> None:
    model = build("llama", "cpu")
    ids, mask = left_padded(2, N, pads=(0, 250))
    for index in ("flat", "clusters", "ivf", "pages"):
        with offload.attach(model, **(ALL | {"retrieved": 64}), index=index) as runtime:
            cache = runtime.new_cache()
            runtime.generate(ids, attention_mask=mask, past_key_values=cache, **(CALL | {"max_new_tokens": 3}))  # fmt: skip
            hands = cache.layer_stores[-1].path
            assert hands is not None
            assert hands.search is not None
            first = hands.hidden_tokens()
            assert 100 < first[1] < hands.search.tokens - 64
            query = torch.randn(
                2, 4, hands.shape.key_dim, generator=torch.Generator().manual_seed(0)
            )
            found = search.Found.of(2, 4, hands.shape, 64, device=torch.device("cpu"), pinned=False)
            hands.search.attend(
                query, cache.layer_stores[-1]._pool(), found, scale=0.2, softcap=None
            )
            for row in (0, 1):
                for chosen in found.tokens[row]:
                    assert len(set(chosen.tolist())) == 64, index
                    assert int(chosen.min()) >= first[row]
