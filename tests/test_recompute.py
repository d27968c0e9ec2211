"""Are keys and values rebuilt from inputs of attention what the model would have cached?"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from families import prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM

import offload
from offload.errors import ConfigError, UnsupportedModelError
from offload.graph import Repeats, StepGraph
from offload.recompute import Angles
from offload.scheduler.cost import hidden_share
from offload.tiers.hidden import HiddenForm
from offload.tiers.rows import RowShape

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 3, "vocab_size": 199, "max_position_embeddings": 2048, "initializer_range": 0.2,
    "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}
# Norms of keys over a head and over all, rotations of all channels and of some, learned positions, biases, one product.
_KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "olmo2": {}, "phi": {}, "stablelm": {}, "phi3": {}, "opt": _OPT}  # fmt: skip
_TIERS: dict[str, Any] = {"mode": "exact", "page": 16, "sinks": 16, "window": 64, "chunk": 96}


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(_SIZES | _KINDS.get(kind, {}) | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def answer(model: Any, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    ids = prompts(2, 400) % 190 + 2
    settings = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0} | more
    made: torch.Tensor = model.generate(ids, attention_mask=mask, **settings)
    return made


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("kind", _KINDS)
def test_tokens_are_those_of_the_stock_cache(kind: str, share: float) -> None:
    model, mask = build(kind), torch.ones((2, 400), dtype=torch.long)
    mask[0, :37] = 0  # padding: the sequences' positions differ
    want = answer(model, mask, do_sample=False)
    recompute = {"recompute": "hidden", "recomputed": share}
    with offload.attach(model, scheduler=recompute, **_TIERS) as runtime:
        assert (answer(runtime, mask, do_sample=False) == want).all()
        ours = runtime.report()
    with offload.attach(model, **_TIERS) as runtime:
        answer(runtime, mask, do_sample=False)
        rows = runtime.report()
    # An input is half of the keys and values.
    assert ours.planned_host == (1 - round(share * 16) / 32) * rows.planned_host
    assert ours.planned_host <= ours.bytes["host_pinned"] < rows.bytes["host_pinned"]
    assert 0 < ours.decode_h2d_bytes < rows.decode_h2d_bytes


def test_beams_share_pages_and_reorder_positions() -> None:
    model, mask = build("llama"), torch.ones((2, 400), dtype=torch.long)
    mask[1, :21] = 0
    want = answer(model, mask, num_beams=3)
    with offload.attach(model, scheduler={"recompute": "hidden"}, **_TIERS) as runtime:
        assert (answer(runtime, mask, num_beams=3) == want).all()


def test_a_cache_goes_back_into_its_host_pages_and_on() -> None:
    model = build("qwen3")
    ids = prompts(1, 500) % 190 + 2
    want = model(input_ids=ids).logits[:, -1]
    with (
        torch.no_grad(),
        offload.attach(model, scheduler={"recompute": "hidden", "recomputed": 0.5}, **_TIERS) as runtime,
    ):  # fmt: skip
        cache = runtime.new_cache(max_tokens=600)
        model(input_ids=prompts(1, 480) % 190 + 2, past_key_values=cache)
        cache.crop(-(480 - 203))  # in the middle of a page
        logits = want
        for start, stop in ((203, 330), (330, 499), (499, 500)):
            logits = model(input_ids=ids[:, start:stop], past_key_values=cache).logits[:, -1]
        assert cache.get_seq_length() == 500
        # The first 203 tokens of both prompts are alike.
        assert (prompts(1, 480)[:, :203] == prompts(1, 500)[:, :203]).all()
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_everything_on_the_device_needs_no_inputs() -> None:
    model, mask = build("llama"), torch.ones((2, 400), dtype=torch.long)
    want = answer(model, mask, do_sample=False)
    with offload.attach(model, mode="exact", scheduler={"recompute": "hidden"}) as runtime:
        assert (answer(runtime, mask, do_sample=False) == want).all()
        assert runtime.report().bytes["host_pinned"] == 0


def test_fewer_heads_of_keys_are_refused() -> None:
    model = build("llama", num_key_value_heads=1)
    with (
        pytest.raises(ConfigError, match="no fewer bytes"),
        offload.attach(model, scheduler={"recompute": "hidden"}, **_TIERS) as runtime,
    ):
        answer(runtime, torch.ones((2, 400), dtype=torch.long))


def test_a_model_whose_projections_are_not_known_is_refused_by_name() -> None:
    model = build("gpt_neox")
    with (
        pytest.raises(UnsupportedModelError, match="gpt_neox"),
        offload.attach(model, scheduler={"recompute": "hidden"}, **_TIERS) as runtime,
    ):
        answer(runtime, torch.ones((2, 400), dtype=torch.long))


def test_what_differs_from_the_cache_is_refused() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            kwargs | {"hidden_states": 2 * kwargs["hidden_states"]},
        ),
        with_kwargs=True,
    )  # a later hook: ours sees another input than the module
    projection = attention.k_proj
    projection.register_forward_hook(lambda module, args, out: out + torch.rand_like(out))
    with (
        pytest.raises(UnsupportedModelError, match="layer 1 is not what it cached"),
        offload.attach(model, scheduler={"recompute": "hidden"}, **_TIERS) as runtime,
    ):
        answer(runtime, torch.ones((2, 400), dtype=torch.long))


def test_other_modes_refuse_it() -> None:
    with pytest.raises(ConfigError, match="in mode exact only"):
        offload.attach(build("llama"), mode="verified", recompute="hidden")


def test_copies_and_products_end_together() -> None:
    flops_per_byte = 5000.0
    values, inputs, itemsize = 8192, 4096, 2
    share = hidden_share(values, inputs, itemsize, flops_per_byte)
    copied = itemsize * (share * inputs + (1 - share) * values)
    assert 0 < share < 1
    assert copied * flops_per_byte == pytest.approx(2 * share * inputs * values)
    # A faster link, or fewer heads of keys: what is rebuilt becomes less, and then nothing.
    assert hidden_share(values, inputs, itemsize, 1000.0) < share
    assert hidden_share(values, inputs, itemsize, 1e9) == 1.0
    assert hidden_share(values // 4, inputs, itemsize, flops_per_byte) == 0.0
    assert hidden_share(values, inputs, itemsize, None) == 1.0


@pytest.mark.parametrize("recompute", ["off", "hidden"])
def test_a_captured_step_leaves_attention_to_the_host_in_every_replay(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU captures nothing: what the host does between two graphs is done at once here, what repeats by its first launch."""

    class Launch:
        def __init__(self, launch: Callable[[], None]) -> None:
            self.replay = launch

    class Stored(Repeats):
        def _capture(self, key: Any, launch: Callable[[], None]) -> bool:
            self._graphs[key] = cast("Any", Launch(launch))
            self.captured += 1
            return True

        def run(self, key: Any, launch: Callable[[], None]) -> None:
            keys.append(key)
            super().run(key, launch)

    class Split(StepGraph):
        def _split(self, action: Callable[[], None]) -> None:
            splits.append(action)
            action()

    splits: list[Callable[[], None]] = []
    keys: list[Any] = []
    model, ids = build("llama"), prompts(2, 400) % 190 + 2
    with torch.no_grad(), offload.attach(model, scheduler={"recompute": recompute}, **_TIERS) as runtime:  # fmt: skip
        stepped, usual = (runtime.new_cache(max_tokens=500) for _ in range(2))
        for cache in (stepped, usual):
            model(input_ids=ids[:, :300], past_key_values=cache)
        graph = Split(torch.device("cpu"))
        graph.repeats = Stored()
        for at in range(300, 340):  # blocks leave the window on the way
            one, where = ids[:, at : at + 1], torch.full((2, 1), at)
            want = model(input_ids=one, position_ids=where, past_key_values=usual).logits
            graph.repeats.begin()
            stepped.begin_pass(one, None)
            with stepped.capturing(), monkeypatch.context() as patched:
                patched.setattr(StepGraph, "_capturing", graph)
                got = model(input_ids=one, position_ids=where, past_key_values=stepped).logits
            stepped.end_pass()
            assert torch.equal(got, want)
        assert stepped.get_seq_length() == usual.get_seq_length() == 340
        form: Any = stepped.layer_stores[0]._hidden
        read = 0 if form is None else form.source.addresses
    assert len(splits) == 40 * 3
    # One query, key, value, result and sum with its lse for all layers, and an input where pages hold these.
    assert len(graph._kept) == (7 if recompute == "hidden" else 6)
    # Chunks are launched once, and anew when pages have come in; what nobody asks for any more is let go.
    assert 3 < graph.repeats.captured < len(keys) / 4
    assert len(graph.repeats._graphs) < graph.repeats.captured
    # A graph keeps the address of the angles: where that is another one, the key is.
    assert {key[-1] for key in keys} == {read}


class Launches(TorchDispatchMode):
    """What a graph would keep of launches: operators, scalars, shapes, and addresses of what was there before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []
        self._made: dict[int, int] = {}  # storages that came of a launch, which are counted
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = tree_flatten((args, kwargs or {}))[0]
        self.seen.append((str(func), [self._said(one) for one in flat]))
        there = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_flatten(out)[0]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in there:
                self._made[one.untyped_storage().data_ptr()] = len(self._alive)
                self._alive.append(one)  # or another one gets its address
        return out

    def _said(self, one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return repr(one)
        made = self._made.get(one.untyped_storage().data_ptr())
        where = one.data_ptr() if made is None else (made, one.storage_offset())
        return where, one.shape, one.stride(), one.dtype


@pytest.mark.parametrize("recompute", ["off", "hidden"])
def test_one_key_means_one_thing_that_a_graph_would_do(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a graph would keep has to be in the key, for a replay does not look."""

    class Compared(Repeats):
        def run(self, key: Any, launch: Callable[[], None]) -> None:
            with Launches() as launches:
                launch()
            assert traces.setdefault(key, launches.seen) == launches.seen
            runs.append(key)

    class Split(StepGraph):
        def _split(self, action: Callable[[], None]) -> None:
            action()

    traces: dict[Any, list[Any]] = {}
    runs: list[Any] = []
    model, ids = build("llama"), prompts(2, 500) % 190 + 2
    mask = torch.ones((2, 500), dtype=torch.bool)
    mask[0, :37] = False
    with torch.no_grad(), offload.attach(model, scheduler={"recompute": recompute}, **_TIERS) as runtime:  # fmt: skip
        cache = runtime.new_cache(max_tokens=500)
        model(input_ids=ids[:, :300], past_key_values=cache)
        graph, stores = Split(torch.device("cpu")), cache.layer_stores
        graph.repeats = Compared()

        def steps(n: int, *, padded: bool = False) -> None:
            first = cache.get_seq_length()
            for at in range(first, first + n):
                one, where = ids[:, at : at + 1], torch.full((2, 1), at)
                cache.begin_pass(one, None)
                for store in stores:
                    store.visible = mask[:, : at + 1].clone() if padded else None
                with cache.capturing(), monkeypatch.context() as patched:
                    patched.setattr(StepGraph, "_capturing", graph)
                    model(input_ids=one, position_ids=where, past_key_values=cache)
                cache.end_pass()

        def keep(columns: int) -> None:
            for store in stores:
                store.keep_resident(columns)

        steps(20)
        steps(3, padded=True)
        keep(3)
        steps(20)
        cache.reorder_cache(torch.tensor([1, 0]))
        keep(4)
        steps(5)
        cache.crop(220 - cache.get_seq_length())  # host pages go, and come again
        steps(40)
        if recompute == "hidden":
            source: Any = cast("Any", stores[0]._hidden).source
            angles = source._angles
            angles._table = tuple(part.clone() for part in angles._table)
            steps(3)
            angles._table = angles._table[0], angles._table[1].clone()
            steps(3)
    assert len(traces) < len(runs) / 3


def test_what_stops_a_capture_is_told_and_launched_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Graph:
        def capture_begin(self, **how: Any) -> None:
            assert how["capture_error_mode"] == "relaxed"

        def capture_end(self) -> None:
            if broken:
                raise RuntimeError("the capture is void")

        def replay(self) -> None:
            done.append("replayed")

    def launch() -> None:
        done.append("launched")
        if broken and not gc.isenabled():  # that is, while it is captured
            raise broken[-1]

    broken: list[BaseException] = []
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    repeats = Repeats()
    repeats.run("a", launch)
    repeats.run("a", launch)
    assert done == ["launched", "replayed", "replayed"]
    broken.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        repeats.run("b", launch)
    assert gc.isenabled()
    # Memory that torch kept may be there the next time: it is tried again, once.
    broken.append(torch.OutOfMemoryError("none left"))
    del done[:]
    repeats.run("b", launch)
    assert (done, repeats.reason) == (["launched", "launched"], None)
    broken.append(ValueError("the real cause"))
    repeats.run("b", launch)
    assert repeats.reason == "ValueError: the real cause"
    assert "launched anew" in caplog.text
    del done[:]
    repeats.run("a", launch)
    assert done == ["launched"]


def test_the_addresses_of_angles_are_where_they_are_read() -> None:
    angles = Angles()
    assert not angles.addresses
    seen = set()
    for first in range(0, 9000, 1000):  # the table grows on the way
        part = torch.full((1, 1000, 4), float(first))
        angles.put(first, (part, part))
        table = angles.of(None)
        assert table is not None
        assert angles.addresses == (table[0].data_ptr(), table[1].data_ptr())
        seen.add(angles.addresses)
    assert len(seen) > 1


def test_of_rebuilt_pages_one_part_is_held_at_a_time() -> None:
    # Of a layout with inputs for half of the tokens, memory is planned for the parts of one piece, not of two.
    class Ones:
        def take(self) -> Any:
            raise AssertionError

        def rebuild(self, inputs: torch.Tensor, positions: torch.Tensor, sequence: int | None) -> Any:  # fmt: skip
            assert before is None or before() is None, "rows of the piece before are still there"
            made = torch.ones(inputs.shape[0], 2, inputs.shape[1], 4)
            return made, made

        def select(self, rows: torch.Tensor) -> None:
            raise AssertionError

        addresses = ()

    shape = RowShape(kv_heads=2, key_dim=4, value_dim=4, dtype=torch.float32)
    form = HiddenForm(width=4, tokens=2, source=Ones())
    pages = torch.zeros((1, 3, form.page_bytes(shape, 4)), dtype=torch.uint8)
    before: weakref.ref[Any] | None = None
    seen = 0
    for _ in range(2):
        for keys, values, positions in form.read(pages, shape, 4, 0, None):
            assert before is None or before() is None
            before = weakref.ref(keys if keys._base is None else keys._base)
            seen += positions.numel()
            del keys, values
    assert seen == 2 * 12


def test_rebuilt_copies_hold_no_graph() -> None:
    # One would keep every input that they were made of: of mixed pages these are copies.
    model = build("llama")
    recompute = {"recompute": "hidden", "recomputed": 0.5}
    with offload.attach(model, scheduler=recompute, **_TIERS) as runtime:
        cache = runtime.new_cache(max_tokens=440)
        answer(runtime, torch.ones((2, 400), dtype=torch.long), do_sample=False, cache=cache)
        for store in cache.layer_stores:
            store.keep_resident(4)
            assert store._resident is not None
            assert not store._resident.requires_grad
