"""How fast is exact generation at 131,072 tokens under the 24 GB cap, and against what?

An 8B-shaped Llama with random weights (speed does not depend on their values) reads a random prompt and decodes:

- `ours`: `Runtime.generate` in exact mode, the KV cache split between the capped device and pinned host memory;
- `dense`: chunked prefill with all KV on the card, preallocated, torch's flash kernel, same chunk, no cap:
  the fastest stock prefill that we know of, and the reference whose logits ours are compared with;
- `hf_offloaded`: transformers' own offloaded cache, filled with random keys and values, decode only.

The 24 GB cap is 22.5 GiB as the driver counts it, the CUDA context included.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _record import GIB, PeakMemory, Record, arguments, median_seconds, parse, seconds, synchronize
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

import offload
from offload.cache import CACHE
from offload.checkpoint import FileShape, describe
from offload.kernels.attend import attend
from offload.kernels.reference import merge
from offload.tiers.pinned import HostRegion, PinBudget, commit_regions

CAP_BYTES = int(22.5 * GIB)
ALONE, SPLIT = "dense_bench", "dense_split_bench"


def build_model(smoke: bool, device: torch.device) -> Any:
    """The 8B shape in bfloat16, or a tiny one in float32."""
    shape: dict[str, Any] = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256}
        if smoke
        else {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    )  # fmt: skip
    config = LlamaConfig(**shape, max_position_embeddings=2**20)
    config.eos_token_id = None
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(
            config, dtype=torch.float32 if smoke else torch.bfloat16
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def file_shape(config: Any, dtype: str) -> FileShape:
    """What the files of a model would say of it, were they there.

    Args:
        config: Of transformers.
        dtype: In which its weights are loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(config.to_json_string(use_diff=False))
        return describe(file, dtype=dtype)


class DenseLayer(CacheLayerMixin):
    """All keys and values in one buffer on the card, written in place."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.keys: Any = key_states.new_empty((batch, heads, self.capacity, size))
        self.values: Any = torch.empty_like(self.keys)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[2]
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def dense_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention aligned to the last key, through torch's flash kernel where it runs."""
    causal = query.shape[2] > 1
    if query.device.type == "cuda":
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )[0]
    else:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
            key.shape[2] - query.shape[2]
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def split_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same attention in another order of additions: the first half of the earlier keys apart."""
    half = (key.shape[2] - query.shape[2]) // 2
    if half == 0:
        return dense_attention(module, query, key, value, mask, scaling=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [
        attend(query, key[:, :, :half], value[:, :, :half], scale=scale),
        attend(query, key[:, :, half:], value[:, :, half:], scale=scale, causal=True),
    ]
    return merge(parts).out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def run_dense(
    model: Any, ids: Tensor, chunk: int, forced: Tensor, logits_steps: int, name: str = ALONE
) -> dict[str, Any]:
    """Prefill with all KV on the card, then a few decode steps over given tokens."""
    model.set_attn_implementation(name)
    total = ids.shape[1]

    def go(n: int) -> tuple[float, Any]:
        cache = Cache(
            layers=[DenseLayer(n + logits_steps) for _ in range(model.config.num_hidden_layers)]
        )
        synchronize()
        began = time.perf_counter()
        for start in range(0, n - 1, chunk):
            stop = min(start + chunk, n - 1)
            model(
                input_ids=ids[:, start:stop],
                **{CACHE: cache},
                use_cache=True,
                logits_to_keep=1,
            )
        synchronize()
        return time.perf_counter() - began, cache

    go(min(total, 2 * chunk))  # warm-up: library handles and autotuning
    prefill_s, cache = go(total)
    logits, token = [], ids[:, -1:]
    steps_s = []
    for step in range(logits_steps):
        began = time.perf_counter()
        out = model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        synchronize()
        steps_s.append(time.perf_counter() - began)
        logits.append(out.logits[:, -1].float().cpu())
        token = forced[:, step : step + 1]
    return {
        "prefill_s": prefill_s,
        "logits": torch.stack(logits),
        "step_s": sorted(steps_s)[len(steps_s) // 2],
    }


@torch.no_grad()
def run_hf_offloaded(model: Any, ids: Tensor, steps: int) -> list[float]:
    """Seconds of each decode step of transformers' offloaded cache, its KV filled with random values.

    The first steps are slow: torch pins a whole KV cache of host memory, several times over, before its
    allocator has enough to reuse. Report the later ones.
    """
    model.set_attn_implementation("sdpa")
    config, device = model.config, ids.device
    size = config.head_dim
    cache: Any = DynamicCache(config=config, offloading=device.type == "cuda")
    shape = (1, config.num_key_value_heads, ids.shape[1], size)
    for layer in cache.layers:
        layer.update(
            torch.randn(shape, dtype=model.dtype, device=device),
            torch.randn(shape, dtype=model.dtype, device=device),
        )
        if device.type == "cuda":
            layer.offload()
    if device.type == "cuda":  # as a forward pass leaves it: the first layer is on its way back
        cache.layers[0].prefetch()
    token = ids[:, -1:]

    def step() -> None:
        nonlocal token
        out = model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)

    return [seconds(step) for _ in range(steps)]


def compare(logits: Tensor, reference: Tensor) -> dict[str, float]:
    """Root mean square error of logits over the reference's deviation, and how often the best token agrees."""
    error = (logits - reference).square().mean().sqrt() / reference.std()
    same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    return {"logit_error": float(error), "same_top": float(same), "compared_steps": len(logits)}


def measure_pinning(record: Record, device: torch.device, nbytes: int, n_regions: int) -> float:
    """Pins memory as the runtime does; returns the H2D rate of that memory in bytes per second."""
    per_region, page = nbytes // n_regions, 2**19
    regions: list[HostRegion] = []
    took = []
    # The first time includes what a virtual machine needs to get memory from its host; all times are in the row.
    for _ in range(3):
        for region in regions:
            region.close()
        budget = PinBudget()
        regions = [HostRegion(page, per_region, device, budget) for _ in range(n_regions)]
        grow = [(region, per_region) for region in regions]
        took.append(seconds(partial(commit_regions, grow)))
    held = sum(region.pinned for region in regions)
    piece = min(128 * 2**20, per_region)
    target = torch.empty(piece, dtype=torch.uint8, device=device)
    sources = [region.view(0, piece) for region in regions]
    sources[0].random_(0, 256)

    def copy_all() -> None:
        for source in sources:
            target.copy_(source, non_blocking=True)

    rate = piece * n_regions / median_seconds(copy_all)
    target.copy_(sources[0])
    same = bool(torch.equal(target.cpu(), sources[0]))
    record.row(
        "pinned memory", asked_bytes=nbytes, pinned_bytes=held, seconds=took,
        h2d_bytes_per_s=rate, copied_bytes_equal=same,
    )  # fmt: skip
    record.bars["pin_gib_per_s"] = nbytes / GIB / statistics.median(took)
    record.bars["pinned_over_asked"] = held / nbytes
    for region in regions:
        region.close()
    return rate


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=131072, help="prompt")
    parser.add_argument("--new", type=int, default=96, help="tokens that ours decodes")
    parser.add_argument("--chunk", type=int, default=4096, help="prefill chunk of ours and dense")
    parser.add_argument("--pin-gib", type=float, default=16.0, help="pinned memory to time")
    parser.add_argument("--hf-steps", type=int, default=8, help="steps of the offloaded cache")
    parser.add_argument("--skip-floor", action="store_true", help="leave out the second dense run")
    parser.add_argument(
        "--skip-hf", action="store_true", help="leave out transformers' offloaded cache"
    )
    args = parse(parser)
    logging.basicConfig(level=logging.WARNING)
    if args.smoke:
        args.tokens, args.new, args.chunk, args.pin_gib = 1024, 70, 256, 2**-6
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record("generate", settings={**vars(args), "out": None, "cap_bytes": CAP_BYTES})
    for name, function in ((ALONE, dense_attention), (SPLIT, split_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda **kwargs: None)

    rate = measure_pinning(record, device, int(args.pin_gib * GIB), 2 if args.smoke else 32)
    model = build_model(args.smoke, device)
    ids = torch.randint(1, model.config.vocab_size, (1, args.tokens), device=device)

    # Ours.
    settings: dict[str, Any] = {"mode": "exact", "chunk": args.chunk}
    if args.smoke:
        settings |= {"window": 128}
    if device.type == "cuda":
        settings["gpu_memory"] = CAP_BYTES
    with PeakMemory() as peak, offload.attach(model, **settings) as runtime:
        runtime.generate(ids[:, : 2 * args.chunk], max_new_tokens=4, do_sample=False)  # warm-up
        out = runtime.generate(
            ids, max_new_tokens=args.new, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        report = runtime.report()
        print(report, flush=True)
    steps = min(8, args.new)
    ours_logits = torch.stack([step.float().cpu() for step in out.logits[:steps]])
    forced = out.sequences[:, args.tokens :]
    del out
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    dense = run_dense(model, ids, args.chunk, forced, steps)
    error = compare(ours_logits, dense["logits"])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    record.row(
        "ours exact", ms_per_token=report.ms_per_token, prefill_s=report.prefill_s,
        new_tokens=report.new_tokens, decode_s=report.decode_s,
        h2d_bytes_per_token=report.decode_h2d_bytes / max(1, report.new_tokens),
        discarded_bytes=report.discarded_bytes, tokens_on_device=report.tokens_on_device, tokens_on_host=report.tokens_on_host,
        peak_bytes=peak.nbytes, planned=report.planned, bytes=report.bytes, notes=report.notes, **error,
    )  # fmt: skip
    record.row(
        "dense, all KV on the card", prefill_s=dense["prefill_s"], ms_per_token=1000 * dense["step_s"],
        logit_error=0.0,
    )  # fmt: skip
    if not args.skip_floor:
        gc.collect()
        other = run_dense(model, ids, args.chunk, forced, steps, name=SPLIT)
        record.row(
            "dense, each attention split in two: the rounding floor of the comparison",
            prefill_s=other["prefill_s"], **compare(other["logits"], dense["logits"]),
        )  # fmt: skip
    if not args.skip_hf:
        hf = run_hf_offloaded(model, ids, args.hf_steps)
        hf_ms = 1000 * statistics.median(hf[len(hf) // 2 :])
        record.row(
            "transformers offloaded", ms_per_token=hf_ms, step_s=hf, logit_error=None,
            note="keys and values are random: only its time is used; median of the later half of the steps",
        )  # fmt: skip
        record.bars[f"exact_vs_hf_offloaded_{args.tokens}"] = hf_ms / report.ms_per_token
    used = report.decode_h2d_bytes - report.discarded_bytes  # bytes that attention read
    record.bars["exact_h2d_share"] = used / report.decode_s / rate
    record.bars[f"prefill_{args.tokens}_vs_dense"] = report.prefill_s / dense["prefill_s"]
    if device.type == "cuda":
        record.bars[f"peak_gib_{args.tokens}"] = peak.nbytes / GIB
    print(f"written to {record.write(args.out).name}")


if __name__ == "__main__":
    main()
