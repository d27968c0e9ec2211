"""Memory over time, times of tokens, and what kernels are for."""

from __future__ import annotations

import ast
import gzip
import json
import mmap
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from offload import trace
from offload.trace import Event, Recorder, Sample, Steps, Watch, engine_of, perfetto

CPU = torch.device("cpu")
KERNELS = Path(__file__).parents[1] / "kernels"


def test_every_kernel_of_ours_is_for_something() -> None:
    names = [
        node.name
        for file in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    assert len(names) >= 12
    ours = {"scan and selection", "the replica's answer", "selected rows", "window and merge", "quantising", "rebuilding"}  # fmt: skip
    assert {engine_of(name) for name in names} == ours


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "copies from the host"),
        ("Memcpy DtoH (Device -> Pinned)", "copies to the host"),
        ("Memcpy DtoD (Device -> Device)", "copies on the device"),
        ("nvjet_tst_64x8_64x16_1x2_h_bz_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("triton_poi_fused_mul_silu_0", "compiled layers"),
        ("aten::mm", "matrix products"),
        ("something_new", "other"),
    ],
)  # fmt: skip
def test_what_libraries_run_is_for_something_too(name: str, engine: str) -> None:
    assert engine_of(name) == engine


def test_memory_is_sampled_while_something_runs() -> None:
    with Recorder(CPU, every=0.001) as recorder:
        time.sleep(0.02)
        held = mmap.mmap(-1, 64 * 2**20)  # not from a heap, which may have that much to spare
        held.write(bytes(64 * 2**20))
        time.sleep(0.05)
        held.close()
    times = [sample.at for sample in recorder.samples]
    assert len(times) > 5
    assert times == sorted(times)
    first = recorder.samples[0].used
    assert recorder.most_used >= first + 60 * 2**20


def test_a_long_run_keeps_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_SAMPLES", 8)
    with Recorder(CPU, every=0.0005) as recorder:
        time.sleep(0.1)
    assert len(recorder.samples) <= 10
    assert recorder.samples[0].at < 0.05
    assert recorder.samples[-1].at > 0.09


def test_tokens_are_counted_by_bursts_without_the_prompt() -> None:
    told: list[int] = []
    watch = Watch(told.append)
    watch.put(torch.zeros(1, 9))
    watch.put(torch.zeros(1))
    time.sleep(0.01)
    for _ in range(5):  # a pass of mode verified
        watch.put(torch.zeros(1))
    time.sleep(0.01)
    watch.put(torch.zeros(2))
    watch.end()
    assert [tokens for _, tokens in watch.bursts] == [1, 6, 8]
    assert told == [0, 1, 6]
    assert watch.tokens == 8
    times = [at for at, _ in watch.bursts]
    assert times[1] - times[0] > 0.009


def test_only_the_steps_asked_for_are_looked_at() -> None:
    steps = Steps(CPU, first=2, count=2)
    for so_far in range(1, 7):
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        steps.on_burst(so_far)
    steps.close(6)
    assert steps.tokens == 2
    products = [kernel for kernel in steps.kernels() if kernel.name == "aten::mm"]
    assert [kernel.calls for kernel in products] == [2]
    assert products[0].engine == "matrix products"
    assert 0 < products[0].seconds <= steps.seconds
    begins = [event.began for event in steps.events()]
    assert begins == sorted(begins)


def test_an_answer_that_ends_early_is_looked_at_up_to_its_end() -> None:
    steps = Steps(CPU, first=1, count=100)
    for so_far in (1, 2, 3):
        steps.on_burst(so_far)
    steps.close(3)
    assert steps.tokens == 2
    never = Steps(CPU, first=9, count=1)
    never.close(3)
    assert (never.tokens, never.kernels(), never.events()) == (0, [], [])


def test_a_trace_has_named_tracks_whose_slices_are_nested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "MOST_EVENTS", 3)
    events = [
        Event("outer", "stream 7", 0.0, 0.010, 0.004),
        Event("inner", "stream 7", 0.002, 0.006, 0.006),
        Event("copy", "stream 9", 0.001, 0.020, 0.020),
        Event("too short to keep", "stream 7", 0.0, 1e-9, 1e-9),
    ]
    samples = [Sample(0.0, 5, 7, 9), Sample(0.5, None, None, 11)]
    data = perfetto(events, samples, [(0.4, 1), (0.6, 2), (0.7, 6)], prefill_until=0.4)
    rows = json.loads(gzip.decompress(data))["traceEvents"]
    names = {row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert {"the run", "stream 7", "stream 9", "phases", "placement", "tokens"} <= names
    counters = [row["args"] for row in rows if row["ph"] == "C"]
    assert counters == [{"in use": 9, "reserved": 7, "allocated": 5}, {"in use": 11}]
    slices = [row for row in rows if row["ph"] == "X"]
    assert not any(row["name"] == "too short to keep" for row in slices)
    assert {"token 2", "tokens 3 to 6"} <= {row["name"] for row in slices}
    assert [row["dur"] for row in slices if row["name"] == "decode"] == [pytest.approx(3e5)]
    tracks = defaultdict(list)
    for row in slices:
        tracks[row["pid"], row["tid"]].append((row["ts"], row["ts"] + row["dur"]))
    assert len(tracks) == 5
    for of_track in tracks.values():
        for began, ended in of_track:
            for other, until in of_track:
                apart = ended <= other or until <= began
                inside = (began <= other and until <= ended) or (other <= began and ended <= until)
                assert apart or inside
