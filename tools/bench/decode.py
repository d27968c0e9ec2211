"""How long does a token take in mode fast under the 24 GB cap, against all KV on a large card?

An 8B-shaped Llama with random weights. With `--vectors` it attends with keys and queries recorded from a real model
that reads a real document (`_vectors.py` says how); without, and in the rows `random`, queries attend to everything
alike, so that nothing is skipped and no row is selected twice: the worst there is. Errors of what was timed are logits
against dense attention (see `tools/fidelity.py` for real models).

- `ours`: `Runtime.generate` in mode fast after our own prefill, wall clock of the decode over its tokens, compiling
  and capturing apart (they are in the row);
- `full`: all KV on the card, no cap: layers compiled, torch's flash kernel, the step one CUDA graph with its argmax;
- `hf_offloaded`: transformers' own offloaded cache.

The 24 GB cap is 22.5 GiB as the driver counts it, the CUDA context included.
"""

from __future__ import annotations

import gc
import logging
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _record import GIB, PeakMemory, Record, arguments, parse, seconds, synchronize
from _vectors import played, record
from generate import (
    ALONE,
    CAP_BYTES,
    build_model,
    compare,
    dense_attention,
    run_dense,
    run_hf_offloaded,
)
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

import offload
from offload.cache import CACHE
from offload.kernels.combine import empty_partials
from offload.kernels.quantize import empty_codes
from offload.kernels.reference import BLOCK, Codes
from offload.kernels.scan import scan, scan_scratch
from offload.kernels.select import empty_selection, select_blocks, select_tokens
from offload.kernels.tail import block_slots, tail, tail_of_blocks, tail_slots
from offload.scheduler.layout import REPLICA_WINDOW

CHECKED = 8  # steps whose logits are compared


class FullLayer(CacheLayerMixin):
    """A full cache of fixed length whose last token is written again in every step, as a graph needs it."""

    is_sliding = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Any = torch.randn(shape, dtype=dtype, device=device)
        self.values: Any = torch.randn(shape, dtype=dtype, device=device)
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """Done."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        return -1


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def full_step_ms(model: Any, tokens: int, device: torch.device) -> float:
    """Milliseconds of a step with all KV on the card: median of three runs of 100."""
    model.set_attn_implementation(ALONE)
    config = model.config
    size = config.head_dim
    shape = (1, config.num_key_value_heads, tokens, size)
    cache = Cache(
        layers=[FullLayer(shape, model.dtype, device) for _ in range(config.num_hidden_layers)]
    )
    token = torch.ones((1, 1), dtype=torch.long, device=device)
    position = torch.full((1, 1), tokens - 1, device=device)

    def step() -> None:
        out = model(input_ids=token, position_ids=position, **{CACHE: cache}, use_cache=True)
        token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

    if device.type != "cuda":
        step()
        return 1000 * seconds(step)
    layers = list(model.model.layers)
    limits = {"recompile_limit": 4 * len(layers) + 64, "accumulated_recompile_limit": 2**16}
    with torch._dynamo.config.patch(limits):
        for layer in layers:
            layer.compile(dynamic=False)
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    for layer in layers:
        layer._compiled_call_impl = None

    def many() -> None:
        for _ in range(100):
            graph.replay()

    many()
    return 1000 * statistics.median(seconds(many) for _ in range(3)) / 100


def run_ours(
    model: Any, ids: Tensor, new: int, settings: dict[str, Any], *, logits: bool
) -> dict[str, Any]:
    """Prefill and decode in mode fast; then the first steps once more, with their logits."""
    short = ids[:, : min(ids.shape[1], 6000)]
    with offload.attach(model, mode="fast", **(settings | {"window": 256})) as runtime:
        runtime.generate(short, max_new_tokens=80, do_sample=False)  # compiles what is compiled
    free()
    with PeakMemory() as peak, offload.attach(model, mode="fast", **settings) as runtime:
        cache = runtime.new_cache(ids.shape[1] + new)
        answer = runtime.generate(ids, cache=cache, max_new_tokens=new, do_sample=False)
        report = runtime.report()
        print(report, flush=True)
        found: dict[str, Any] = {"answer": answer[:, ids.shape[1] :]}
        if logits:
            cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
            again = runtime.generate(
                ids, cache=cache, max_new_tokens=CHECKED, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            found["logits"] = torch.stack([step.float().cpu() for step in again.logits])
            found["answer"] = again.sequences[:, ids.shape[1] :]
        cache.close()
    ms = 1000 * (report.decode_s - report.capture_s) / report.new_tokens
    return found | {
        "peak": peak.nbytes,
        "prefill_s": report.prefill_s,
        "row": {
            "ms_per_token": ms, "new_tokens": report.new_tokens, "capture_s": report.capture_s,
            "replayed_steps": report.replayed_steps, "prefill_s": report.prefill_s, "rung": report.rung,
            "tail_mass": report.tail_mass, "skipped_mass": report.skipped_mass,
            "error_estimate": report.error_estimate,
            "selected_bytes": report.selected_bytes, "fetched_bytes": report.fetched_bytes, "peak_bytes": peak.nbytes, "bytes": report.bytes,
            "planned": report.planned, "tokens_on_host": report.tokens_on_host, "notes": report.notes,
        },
    }  # fmt: skip


def measure_kernels(record: Record, tokens: int, device: torch.device) -> None:
    """The rate of the scan and the time of a selection, six layers in turn so that no cache is warm."""
    kv_heads, groups, size, layers = 8, 4, 128, 6
    keys: list[Codes] = []
    values: list[Codes] = []
    for into in (keys, values):
        for _ in range(layers):
            codes = empty_codes(1, kv_heads, tokens, size, bits=4, keys=into is keys, device=device)
            for plane in codes.planes:
                plane.random_(0, 256)
            codes.meta.normal_(0, 0.1).abs_()
            into.append(codes)
    query = torch.randn((1, kv_heads * groups, size), device=device, dtype=torch.bfloat16)
    n_blocks = torch.full((1,), tokens // BLOCK, dtype=torch.int32, device=device)
    scratch = scan_scratch(1, kv_heads, groups, tokens, device)
    chosen = empty_selection(1, kv_heads * groups, kv_heads, tokens, 64, device)
    large = torch.empty(2**30, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)

    def us(run: Callable[[int], object], repeats: int) -> float:
        run(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(repeats):
                run(i % layers)
        graph.replay()
        return 1e6 * statistics.median(seconds(graph.replay) for _ in range(9)) / repeats

    us(lambda i: other.copy_(large), 60)  # until the clocks are up
    copies = (lambda i: other.copy_(large), lambda i: torch.bitwise_not(large, out=other))
    copy_us = min(us(copy, 20) for copy in copies)
    bandwidth = 2 * large.nbytes / copy_us * 1e6

    def scanned(*then: Callable[[], None]) -> Callable[[int], None]:
        """A scan, and what makes something of the scores that it has just written."""

        def run(i: int) -> None:
            scan(query, keys[i], n_blocks, scratch, bits=4, scale=0.088)
            for step in then:
                step()

        return run

    def find_blocks() -> None:
        select_blocks(scratch, n_blocks, chosen)

    def find_tokens() -> None:
        select_tokens(scratch, chosen)

    scan_us = us(scanned(), 60)
    blocks_us = us(scanned(find_blocks), 60) - scan_us
    select_us = us(scanned(find_blocks, find_tokens), 60) - scan_us
    slots = tail_slots(tokens, kv_heads)
    partials = empty_partials(1, kv_heads * groups, slots + block_slots(64), size, device)
    skipped = torch.empty((1, kv_heads * groups, slots), device=device)
    scanned(find_blocks, find_tokens)(0)

    def run_tail(i: int) -> None:
        tail(
            scratch, chosen, values[i], n_blocks, partials, skipped,
            first_slot=0, bits=4, head_size=size, share=0.0,
        )  # fmt: skip

    def run_tail_of_blocks(i: int) -> None:
        tail_of_blocks(
            scratch, chosen, values[i], partials, first_slot=slots, bits=4, head_size=size
        )

    tail_us, tail_of_blocks_us = us(run_tail, 60), us(run_tail_of_blocks, 60)
    nbytes = sum(t.nbytes for t in (*keys[0].planes, keys[0].meta))
    tail_bytes = sum(t.nbytes for t in (*values[0].planes, values[0].meta))
    record.row(
        "kernels", tokens=tokens, device_bytes_per_s=bandwidth, scan_us=scan_us, scan_bytes=nbytes,
        select_us=select_us, of_which_before_the_tail_us=blocks_us, tail_us=tail_us, tail_bytes=tail_bytes,
        tail_of_blocks_us=tail_of_blocks_us, error="tests/kernels/test_device_path.py compares with the references",
    )  # fmt: skip
    record.bars["scan_bandwidth_share"] = nbytes / scan_us * 1e6 / bandwidth
    record.bars["select_us"] = select_us


def load_vectors(asked: str, steps: int, device: torch.device) -> dict[str, Any]:
    """What `record` makes of a model and its tokens, written `smollm2@7168`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fidelity import prepare

    source, _, context = asked.partition("@")
    case = prepare(source, int(context or 7168), steps, torch.float32, str(device))
    vectors = record(case.model, case.ids, case.context)
    del case
    free()
    return vectors


def measure_131072(
    record: Record, model: Any, ids: Tensor, args: Namespace, settings: dict[str, Any]
) -> None:
    """Ours against full attention at the length of most bars, with the errors of both."""
    got = run_ours(model, ids, args.new, settings, logits=True)
    free()
    reference = run_dense(model, ids, args.chunk, got["answer"], CHECKED)
    free()
    n = ids.shape[1]
    record.row(f"ours {n}", **got["row"], **compare(got["logits"], reference["logits"]))
    record.row(f"dense prefill {n}", prefill_s=reference["prefill_s"], logit_error=0.0)
    record.bars["prefill_with_replica_vs_dense"] = got["prefill_s"] / reference["prefill_s"]
    if ids.is_cuda:
        record.bars["peak_gib_131072"] = got["peak"] / GIB
    full = full_step_ms(model, n, ids.device)
    free()
    record.row(f"full {n}", ms_per_token=full, error="exact attention")
    record.bars["decode_131072_vs_full"] = got["row"]["ms_per_token"] / full


def measure(
    record: Record, model: Any, ids: Tensor, args: Namespace, settings: dict[str, Any], bar: str
) -> None:
    """Ours against full attention."""
    got = run_ours(model, ids, args.new, settings, logits=False)
    free()
    full = full_step_ms(model, ids.shape[1], ids.device)
    free()
    record.row(f"ours {ids.shape[1]}", **got["row"], error="see tools/fidelity.py")
    record.row(f"full {ids.shape[1]}", ms_per_token=full, error="exact attention")
    record.bars[bar] = got["row"]["ms_per_token"] / full


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--new", type=int, default=544, help="tokens that ours decodes")
    parser.add_argument("--chunk", type=int, default=2048, help="prefill chunk")
    parser.add_argument("--hf-steps", type=int, default=8, help="steps of the offloaded cache")
    parser.add_argument(
        "--vectors",
        help="a real model and the tokens that it reads, smollm2@7168 or FILE.gguf@16384: its keys and queries "
        "take the place of random ones",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="*", help="parts to run",
        default=["131072", "32768", "fits", "262144", "3k3v", "hf", "kernels", "random"],
    )  # fmt: skip
    args = parse(parser)
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = {"131072": 131072, "262144": 262144, "32768": 32768, "fits": 8192}
    if args.smoke:
        args.new, args.chunk, args.hf_steps = 70, 256, 3
        lengths = {"131072": 1024, "262144": 1280, "32768": 640, "fits": 512}
    told = {"vectors": args.vectors and Path(args.vectors).name, "out": None}
    result = Record("decode", settings={**vars(args), **told, "cap_bytes": CAP_BYTES})
    AttentionInterface.register(ALONE, dense_attention)
    AttentionMaskInterface.register(ALONE, lambda **kwargs: None)
    vectors = load_vectors(args.vectors, args.new + CHECKED, device) if args.vectors else None

    def playing(length: int) -> AbstractContextManager[None]:
        return nullcontext() if vectors is None else played(model, vectors, length)

    model = build_model(args.smoke, device)
    torch.manual_seed(1)
    text = torch.randint(1, model.config.vocab_size, (1, max(lengths.values())), device=device)
    base: dict[str, Any] = {"chunk": args.chunk, "compile": True}
    if device.type == "cuda":
        base["gpu_memory"] = CAP_BYTES
    # Also where everything would fit.
    offloaded = base | {"window": 256 if args.smoke else REPLICA_WINDOW}
    settings = {
        "131072": base | {"rung": "4k4v"},
        "fits": base,
        "32768": offloaded | {"rung": "4k4v"},
        "262144": base | {"rung": "2k2v"},
    }
    if args.smoke:
        settings |= dict.fromkeys(("131072", "262144"), offloaded)

    for part, length in lengths.items():
        if part not in args.only:
            continue
        bar = "fits_step_overhead" if part == "fits" else f"decode_{part}_vs_full"
        with playing(length):
            if part == "131072":
                measure_131072(result, model, text[:, :length], args, settings[part])
            else:
                measure(result, model, text[:, :length], args, settings[part], bar)
        result.write(args.out)  # what follows may not fit the time
    if "3k3v" in args.only:  # the better rung, which at this length needs a larger card
        ids = text[:, : lengths["262144"]]
        with playing(ids.shape[1]):
            settings["3k3v"] = {k: v for k, v in settings["262144"].items() if k != "gpu_memory"}
            settings["3k3v"] |= {"rung": "3k3v"}
            got = run_ours(model, ids, args.new, settings["3k3v"], logits=False)
        free()
        result.row(f"no cap {ids.shape[1]}", **got["row"], error="see tools/fidelity.py")
        result.write(args.out)
    if "hf" in args.only:
        steps = run_hf_offloaded(model, text[:, : lengths["131072"]], args.hf_steps)
        hf_ms = 1000 * statistics.median(steps[len(steps) // 2 :])
        result.row("transformers offloaded", ms_per_token=hf_ms, step_s=steps, error="exact")
        for row in result.rows:
            if row["what"] == f"ours {lengths['131072']}":
                result.bars["hf_offloaded_over_ours_131072"] = hf_ms / row["ms_per_token"]
        result.write(args.out)
        free()
    if "kernels" in args.only and device.type == "cuda":
        measure_kernels(result, 131072, device)
        free()
    if "random" in args.only and args.vectors:
        for part in ("131072", "262144"):
            ids = text[:, : lengths[part]]
            got = run_ours(model, ids, args.new, settings[part], logits=False)
            free()
            if part == "131072" and device.type == "cuda":
                result.bars["peak_gib_131072"] = got["peak"] / GIB  # vectors take memory too
            result.row(f"random {ids.shape[1]}", **got["row"], error="see tools/fidelity.py")
            result.write(args.out)
    synchronize()
    print(f"written to {result.write(args.out).name}")


if __name__ == "__main__":
    main()
