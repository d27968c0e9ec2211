"""Mode verified: whatever is drafted, its tokens are the stock cache's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cards import DEVICES
from families import FAMILIES, PAD, left_padded, prompts
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import offload
from offload import verify
from offload.config import LONGEST_DRAFT
from offload.errors import ConfigError, UnsupportedModelError
from offload.kernels import reference
from offload.scheduler.layout import REPLICA_WINDOW
from offload.scheduler.pace import LENGTHS, Drafts, Pace, Tally, Turn, window_of_drafts
from offload.tiers.replica import DevicePath
from offload.tiers.store import LayerStore

N, NEW = 600, 70
CALL: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
# Two bits and sixteen tokens: drafts of a random model are wrong now and then by themselves.
SETTINGS: dict[str, Any] = {
    "mode": "verified",
    "sinks": 64,
    "window": 256,
    "rung": "2k2v",
    "retrieved": 16,
    "draft": 5,
    "look_ahead": True,
    "compile": False,
}
ON = pytest.mark.parametrize("device", DEVICES)
# Layers with windows or states cannot forget what was rejected.
REFUSED = {
    "bamba",
    "falcon_h1",
    "gemma2",
    "gemma3",
    "gemma4",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mistral_sliding",
    "nemotron_h",
    "qwen3_5",
    "qwen2_sliding",
    "qwen3_next",
    "zamba2",
}
SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.02},
    {"repetition_penalty": 1.3, "top_k": 50},
]


def build(name: str = "llama", device: str = "cpu") -> Any:
    model: Any = FAMILIES[name].build()
    model.generation_config.pad_token_id = PAD
    return model.to(device)


@contextmanager
def wrong_drafts(share: float, seed: int = 0) -> Iterator[list[int]]:
    """Within, about this share of drafted tokens is another one than was meant. Yields how many were."""
    random = torch.Generator().manual_seed(seed)
    right, count = verify._Chooser.draft, [0]

    def draft(self: Any, ids: Tensor, logits: Tensor) -> Tensor:
        token = right(self, ids, logits)
        if float(torch.rand((), generator=random)) < share:
            count[0] += 1
            return (token + 1) % logits.shape[-1]
        return token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify._Chooser, "draft", draft)
        yield count


@contextmanager
def passes_that_last(steps: int | None) -> Iterator[None]:
    """Within, a pass seems to be over once so many tokens were drafted beside it. None: once it is over."""
    right, left = verify._Checker.begin, [0]

    def begin(self: Any, inputs: dict[str, Any]) -> None:
        left[0] = steps or 0
        right(self, inputs)

    def is_over(self: Any) -> bool:
        left[0] -= 1
        return left[0] < 0

    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:
            patch.setattr(verify._Checker, "begin", begin)
            patch.setattr(verify._Checker, "is_over", is_over)
        yield


@ON
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("beside", [None, 0, 2, 99])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_tokens_are_the_stock_caches(
    name: str, beside: int | None, share: float, device: str
) -> None:
    few = ("llama", "qwen2", "phi3")
    if name not in few and (share or beside != 99 or device == "cuda"):
        pytest.skip("others of the kind do the same")
    model = build(name, device)
    ids = prompts(1, N).to(device)
    want = model.generate(ids, **CALL)
    with (
        wrong_drafts(share) as wrong,
        passes_that_last(beside),
        offload.attach(model, **SETTINGS) as runtime,
    ):
        got = runtime.generate(ids, **CALL)
        report = runtime.report()
    assert torch.equal(got, want)
    assert report.tokens_on_host > 300
    assert (wrong[0] > 20) == (share > 0)
    assert report.new_tokens == NEW
    assert report.accepted_tokens + report.verify_passes >= NEW
    assert report.verify_passes < NEW
    if share:
        assert report.agreement[0] < 0.9
    if beside is not None:
        # What is drafted beside a pass is in vain where the pass finds a wrong token before.
        assert (report.dropped_tokens > 0) == (beside > 1 and report.accepted_tokens < report.drafted_tokens)  # fmt: skip


def test_what_is_all_window_is_exact_without_a_draft() -> None:
    model = build()
    ids = prompts(1, 20)
    want = model.generate(ids, **CALL)
    with offload.attach(model, mode="verified") as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)
        assert runtime.report().drafted_tokens == 0


@pytest.mark.parametrize("name", sorted(REFUSED & set(FAMILIES)))
def test_layers_that_cannot_forget_are_refused_by_name(name: str) -> None:
    model = build(name)
    with pytest.raises(UnsupportedModelError, match="cannot forget"):
        offload.attach(model, **SETTINGS)
    with offload.attach(model, mode="exact"):  # nothing was left behind
        pass


@pytest.mark.parametrize("beside", [0, 3, 99])
@pytest.mark.parametrize("at", range(6))
def test_a_rejection_at_any_place_of_a_draft_leaves_nothing_behind(at: int, beside: int) -> None:
    """Tokens, positions, keys, values and replica are those of a run that never drafted."""
    model = build()
    ids = prompts(1, N)
    call = CALL | {"max_new_tokens": 60}
    right, calls = verify._Chooser.draft, [0]

    def draft(self: Any, ids: Tensor, logits: Tensor) -> Tensor:
        token = right(self, ids, logits)
        wrong = calls[0] % 5 == at  # none where `at` is 5
        calls[0] += 1
        return (token + 1) % logits.shape[-1] if wrong else token

    kept = {}
    for mode in ("verified", "exact"):
        settings = SETTINGS | {"mode": mode, "draft": 5, "rung": "4k4v"}
        with (
            pytest.MonkeyPatch.context() as patch,
            passes_that_last(beside),
            offload.attach(model, **settings) as runtime,
        ):
            patch.setattr(verify._Chooser, "draft", draft)
            cache = runtime.new_cache()
            tokens = runtime.generate(ids, cache=cache, **call)
            rows = []
            for store in cache.layer_stores:
                whole = [store._block(i) for i in range(store.length // 64)]
                rows.append(
                    torch.cat([torch.cat(whole, 1), store._tail[:, : store._tail_length]], 1)
                )
                if store.path is None:
                    continue
                assert isinstance(store.path, DevicePath)
                first = store.first_host_token
                host = rows[-1][:, first : first + store.host_tokens]
                codes = reference.quantize_keys(host[..., : store.shape.key_dim], bits=4)
                got = replica_of(store)
                assert torch.equal(got.meta, codes.meta)
                assert all(torch.equal(a, b) for a, b in zip(got.planes, codes.planes, strict=True))
            known = cache.token_ids
            assert known is not None
            assert torch.equal(known, tokens[:, :-1])
            kept[mode] = (tokens, rows)
    assert torch.equal(kept["verified"][0], kept["exact"][0])
    for ours, exact in zip(kept["verified"][1], kept["exact"][1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def replica_of(store: Any) -> reference.Codes:
    keys = store.path._keys
    n = store.columns
    return reference.Codes(tuple(p[:, :, :n] for p in keys.planes), keys.meta[:, :, :n])


@ON
@pytest.mark.parametrize("beside", [0, 99])
@pytest.mark.parametrize("sampling", SAMPLED, ids=lambda s: "+".join(s))
def test_sampled_tokens_are_the_stock_caches_for_the_same_seed(
    sampling: dict[str, Any], beside: int, device: str
) -> None:
    model = build("qwen2", device)
    ids = prompts(1, N).to(device)
    call = CALL | {"do_sample": True} | sampling
    torch.manual_seed(5)
    want = model.generate(ids, **call)
    after = torch.rand(4, device=device)
    with (
        wrong_drafts(0.2),
        passes_that_last(beside),
        offload.attach(model, **SETTINGS) as runtime,
    ):
        torch.manual_seed(5)
        got = runtime.generate(ids, **call)
        assert torch.equal(got, want)
        # What is drawn next is the same, too.
        assert torch.equal(torch.rand(4, device=device), after)
        report = runtime.report()
        assert 0 < report.accepted_tokens < report.drafted_tokens


def test_without_rollback_or_with_other_noise_the_tokens_are_others() -> None:
    """What the tests above would see: each part of the promise is needed."""
    model = build()
    ids = prompts(1, N)
    sampled = CALL | {"do_sample": True, "temperature": 1.2}
    torch.manual_seed(5)
    want = model.generate(ids, **sampled)
    with pytest.MonkeyPatch.context() as patch, offload.attach(model, **SETTINGS) as runtime:
        patch.setattr(verify, "set_random_state", lambda state, device: None)
        torch.manual_seed(5)
        assert not torch.equal(runtime.generate(ids, **sampled), want)
    greedy = model.generate(ids, **CALL)
    with wrong_drafts(0.5), offload.attach(model, **SETTINGS) as runtime:
        kept_all = verify._compare

        def keep_all(chooser: Any, ids: Tensor, logits: Tensor, length: int, drafted: int) -> Any:
            _, targets = kept_all(chooser, ids, logits, length, drafted)
            draft = ids[0, length : length + drafted]
            return drafted, torch.cat([draft, targets[drafted:]])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "_compare", keep_all)
            assert not torch.equal(runtime.generate(ids, **CALL), greedy)


@pytest.mark.parametrize("beside", [0, 4, 99])
@pytest.mark.parametrize("ending", ["eos", "criterion", "length"])
def test_the_answer_ends_where_the_stock_one_does(ending: str, beside: int) -> None:
    model = build()
    ids = prompts(1, N)
    whole = model.generate(ids, **CALL)[0, N:]
    call: dict[str, Any] = dict(CALL)
    if ending == "eos":
        call["eos_token_id"] = [int(whole[29])]
    elif ending == "criterion":
        call["stopping_criteria"] = StoppingCriteriaList(
            [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= N + 31])]
        )
    else:
        call["max_new_tokens"] = 26
    want = model.generate(ids, **call)
    with passes_that_last(beside), offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        shown: list[Tensor] = []

        class Streamer(BaseStreamer):
            def put(self, value: Tensor) -> None:
                shown.append(value.flatten())

            def end(self) -> None:
                shown.append(torch.tensor([-1]))

        got = runtime.generate(ids, cache=cache, streamer=Streamer(), **call)
        assert torch.equal(got, want)
        assert torch.equal(torch.cat(shown), torch.cat([got[0], torch.tensor([-1])]))
        assert cache.get_seq_length() == got.shape[1] - 1
        # The conversation goes on over what was verified.
        more = torch.cat([got, prompts(1, 30, seed=3)], dim=1)
        assert torch.equal(
            runtime.generate(more, cache=cache, **CALL | {"max_new_tokens": 40}),
            model_tokens(model, more, 40),
        )


def model_tokens(model: Any, ids: Tensor, new: int) -> Tensor:
    """What the stock cache gives, of the model while it is attached."""
    from transformers import DynamicCache

    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        out: Tensor = model.generate(
            ids, past_key_values=DynamicCache(config=model.config), **CALL | {"max_new_tokens": new}
        )
    finally:
        model.set_attn_implementation(before)
    return out


@pytest.mark.parametrize("beside", [0, 99])
def test_processors_of_users_see_tokens_that_are_kept_and_no_others(beside: int) -> None:
    model = build()
    ids = prompts(1, N)

    class Counts(LogitsProcessor):
        """Forbids each time the token that it saw last, and keeps what it saw."""

        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append(input_ids[0, N:].tolist())
            scores = scores.clone()
            scores[:, input_ids[0, -1]] = -torch.inf
            return scores

    stock, ours = Counts(), Counts()
    want = model.generate(ids, logits_processor=LogitsProcessorList([stock]), **CALL)
    with (
        wrong_drafts(0.3),
        passes_that_last(beside),
        offload.attach(model, **SETTINGS) as runtime,
    ):
        got = runtime.generate(ids, logits_processor=LogitsProcessorList([ours]), **CALL)
    assert torch.equal(got, want)
    assert ours.seen == stock.seen


@pytest.mark.parametrize("ending", ["eos", "criterion"])
def test_processors_of_users_see_nothing_behind_an_end(ending: str) -> None:
    model = build()
    ids = prompts(1, N)
    whole = model.generate(ids, **CALL)[0, N:].tolist()
    call: dict[str, Any] = dict(CALL)
    if ending == "eos":
        call["eos_token_id"] = [whole[23]]
    else:
        call["stopping_criteria"] = StoppingCriteriaList(
            [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= N + 24])]
        )
    seen: dict[str, int] = {}

    def counting(name: str) -> LogitsProcessorList:
        class Counts(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                seen[name] = seen.get(name, 0) + 1
                return scores

        return LogitsProcessorList([Counts()])

    want = model.generate(ids, logits_processor=counting("stock"), **call)
    with offload.attach(model, **SETTINGS) as runtime:
        got = runtime.generate(ids, logits_processor=counting("ours"), **call)
        notes = runtime.report().notes
    assert torch.equal(got, want)
    assert seen["ours"] == seen["stock"] == got.shape[1] - N
    # Where only the criterion knows the end, nothing is drafted, and that is said.
    assert any("drafts nothing" in note for note in notes) == (ending == "criterion")


def test_processors_that_draw_numbers_and_functions_of_users_are_called_as_the_stock_loop_does() -> (
    None
):
    model = build()
    ids = prompts(1, N)
    calls = [0]

    class Noise(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + torch.randn_like(scores)

    def allowed(batch: int, input_ids: Tensor) -> list[int]:
        calls[0] += 1
        return list(range(1 + calls[0] % 3, 128, 3))

    sampled = CALL | {"do_sample": True, "max_new_tokens": 40}
    for more in (
        {"logits_processor": LogitsProcessorList([Noise()])},
        {"prefix_allowed_tokens_fn": allowed},
    ):
        torch.manual_seed(3)
        calls[0] = 0
        want = model.generate(ids, **sampled, **more)
        with offload.attach(model, **SETTINGS) as runtime:
            torch.manual_seed(3)
            calls[0] = 0
            assert torch.equal(runtime.generate(ids, **sampled, **more), want)


def test_a_pass_at_the_last_positions_of_a_model_asks_for_none_behind_them() -> None:
    model = build("gpt2")
    limit = model.config.max_position_embeddings
    ids = prompts(1, limit - 20)
    call = CALL | {"max_new_tokens": 20}
    want = model.generate(ids, **call)
    with offload.attach(model, **SETTINGS) as runtime:
        assert torch.equal(runtime.generate(ids, **call), want)


def test_positions_that_turn_with_the_length_are_refused() -> None:
    model = build()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        offload.attach(model, **SETTINGS)


def test_each_call_counts_for_itself() -> None:
    model = build()
    ids = prompts(1, N)
    call = CALL | {"max_new_tokens": 20}
    with passes_that_last(2), offload.attach(model, **SETTINGS) as runtime:
        found = []
        for _ in range(2):
            runtime.generate(ids, **call)
            report = runtime.report()
            found.append((report.verify_passes, report.drafted_tokens, len(report.agreement)))
        assert found[0] == found[1]
        runtime.generate(prompts(2, N), **call)
        assert runtime.report().verify_passes == 0


@pytest.mark.parametrize("beside", [0, 99])
def test_an_exception_in_a_draft_leaves_a_cache_of_verified_tokens(beside: int) -> None:
    model = build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    with offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        right, calls = verify._Chooser.draft, [0]

        def draft(self: Any, ids: Tensor, logits: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] == 30:
                raise KeyboardInterrupt
            return right(self, ids, logits)

        with pytest.MonkeyPatch.context() as patch, passes_that_last(beside):
            patch.setattr(verify._Chooser, "draft", draft)
            with pytest.raises(KeyboardInterrupt):
                runtime.generate(ids, cache=cache, **CALL)
        known = cache.token_ids
        assert known is not None
        assert N < known.shape[1] < N + 60
        assert torch.equal(known, want[:, : known.shape[1]])
        assert torch.equal(runtime.generate(ids, cache=cache, **CALL), want)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_an_exception_in_a_pass_comes_to_the_caller_and_leaves_verified_tokens(
    look_ahead: bool,
) -> None:
    model = build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    settings = SETTINGS | {"look_ahead": look_ahead}
    with passes_that_last(3), offload.attach(model, **settings) as runtime:
        cache, calls = runtime.new_cache(), [0]
        right = LayerStore.look

        def look(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == 30:
                raise RuntimeError("out of memory, say")
            return right(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerStore, "look", look)
            with pytest.raises(RuntimeError, match="say"):
                runtime.generate(ids, cache=cache, **CALL)
        known = cache.token_ids
        assert known is not None
        assert N < known.shape[1] < N + 60
        assert torch.equal(known, want[:, : known.shape[1]])
        assert torch.equal(runtime.generate(ids, cache=cache, **CALL), want)


def test_a_second_interrupt_closes_a_cache_that_holds_drafted_tokens() -> None:
    model = build()
    ids = prompts(1, N)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with passes_that_last(99), offload.attach(model, **SETTINGS) as runtime:
        cache = runtime.new_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "_compare", interrupt)
            patch.setattr(verify._Run, "_drop", interrupt)
            with pytest.raises(KeyboardInterrupt):
                runtime.generate(ids, cache=cache, **CALL)
        assert not cache.is_open


def test_steps_that_stream_draft_nothing() -> None:
    """They would take turns with a pass at the buffers through which both stream."""
    model = build()
    ids, hole = prompts(1, N), torch.ones((1, N), dtype=torch.long)
    hole[0, 500] = 0
    want = model.generate(ids, attention_mask=hole, **CALL)
    longer = prompts(1, 900, seed=4)
    with offload.attach(model, **SETTINGS) as runtime:
        assert torch.equal(runtime.generate(ids, attention_mask=hole, **CALL), want)
        report = runtime.report()
        assert report.drafted_tokens == 0
        assert any("not all on the left" in note for note in report.notes)
        assert not any("did not pay" in note for note in report.notes)
        cache = runtime.new_cache(max_tokens=400)  # of which the replica has room for
        want = model_tokens(model, longer, NEW)
        assert torch.equal(runtime.generate(longer, cache=cache, **CALL), want)
        assert runtime.report().drafted_tokens == 0


def test_the_smallest_window_holds_what_is_drafted_beside_a_pass() -> None:
    model = build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    for draft in (31, 63):
        window = -(-window_of_drafts(draft) // 64) * 64
        settings = SETTINGS | {"draft": draft, "window": window, "rung": "4k4v", "retrieved": 64}
        with (
            wrong_drafts(0.02),
            passes_that_last(99),
            offload.attach(model, **settings) as runtime,
        ):
            assert torch.equal(runtime.generate(ids, **CALL), want)


def test_what_cannot_be_drafted_is_exact_and_says_so() -> None:
    model = build()
    two = prompts(2, N)
    call = CALL | {"max_new_tokens": 20}
    want = model.generate(two, **call)
    beams = model.generate(two[:1], num_beams=2, **call)
    with offload.attach(model, **SETTINGS) as runtime:
        assert torch.equal(runtime.generate(two, **call), want)
        report = runtime.report()
        assert report.verify_passes == 0
        assert any("several sequences" in note for note in report.notes)
        assert torch.equal(runtime.generate(two[:1], num_beams=2, **call), beams)
        got = runtime.generate(two[:1], return_dict_in_generate=True, output_scores=True, **call)
        assert torch.equal(got.sequences, want[:1])
        assert any("more than tokens" in note for note in runtime.report().notes)


def test_where_nobody_verifies_every_token_is_exact() -> None:
    """Stock generate over a cache of mode verified, before and after a call of ours."""
    model = build()
    ids = prompts(1, N)
    call = CALL | {"max_new_tokens": 30}
    want = model.generate(ids, **call)
    with offload.attach(model, **SETTINGS | {"retrieved": 0}) as runtime:
        for ours in (False, True):
            cache = runtime.new_cache()
            if ours:
                runtime.generate(ids[:, :560], cache=cache, **call | {"max_new_tokens": 4})
                cache.crop(0 - cache.get_seq_length())
            assert torch.equal(model.generate(ids, past_key_values=cache, **call), want)
            paths = [store.path for store in cache.layer_stores if store.path is not None]
            assert paths
            assert ours or all(path.steps == 0 for path in paths)
            cache.close()


def test_padding_on_the_left_is_no_part_of_it() -> None:
    model = build()
    ids, mask = left_padded(1, N, pads=(90,))
    want = model.generate(ids, attention_mask=mask, **CALL)
    with wrong_drafts(0.3), offload.attach(model, **SETTINGS) as runtime:
        assert torch.equal(runtime.generate(ids, attention_mask=mask, **CALL), want)
        assert runtime.report().accepted_tokens > 0


def test_drafts_that_do_not_pay_end() -> None:
    model = build()
    ids = prompts(1, N)
    want = model.generate(ids, **CALL)
    with wrong_drafts(1.0), offload.attach(model, **SETTINGS | {"draft": "auto"}) as runtime:
        assert torch.equal(runtime.generate(ids, **CALL), want)
        report = runtime.report()
    assert report.accepted_tokens == 0
    assert any("drafts did not pay" in note for note in report.notes)


def test_a_draft_is_as_long_as_pays() -> None:
    def settled(agreement: float, draft_s: float, verify_s: float) -> int:
        pace, random = Pace(Drafts.of("auto")), torch.Generator().manual_seed(1)
        drafted = []
        for _ in range(60):
            n = pace.next().drafted
            drafted.append(n)
            if not n:
                pace.note_exact(verify_s)
                continue
            same = torch.rand(n, generator=random) < agreement
            pace.note(n, int(same.long().cumprod(0).sum()), verify_s, step_s=draft_s)
        assert drafted[0] == 8  # a short answer is not late
        return max(set(drafted[-20:]), key=drafted[-20:].count)

    assert settled(1.0, 0.009, 0.35) == LENGTHS[-1]
    assert 8 <= settled(0.9, 0.009, 0.35) <= 64
    assert settled(0.0, 0.009, 0.35) == 0
    assert settled(0.5, 0.4, 0.35) == 0  # a draft as slow as an exact step
    assert Pace(Drafts.of(5)).next() == Turn(5, False)
    assert Drafts.of("auto", 256) == Drafts(64, True)
    assert Drafts.of("auto", 64) == Drafts(0, True)
    assert window_of_drafts(LONGEST_DRAFT) <= REPLICA_WINDOW


def test_a_draft_that_goes_on_beside_its_pass_need_not_be_long() -> None:
    def settled(agreement: float, verify_s: float) -> Turn:
        pace, turn = Pace(Drafts.of("auto"), looks_ahead=True), Turn(0, False)
        for _ in range(40):
            turn = pace.next()
            n = turn.drafted
            if not n:
                pace.note_exact(verify_s)
                continue
            ahead = turn.goes_on
            pace.note(n + ahead, round(agreement * (n + ahead)), verify_s, step_s=0.010, step_beside_s=0.012 if ahead else None, beside=ahead)  # fmt: skip
        return turn

    # A pass of ten steps costs nothing behind a draft of sixteen; one of a hundred does.
    assert settled(1.0, 0.1).drafted >= 16
    assert settled(1.0, 1.0).drafted >= 96
    assert settled(1.0, 1.0).goes_on
    assert settled(0.0, 0.05) == Turn(0, False)


def paced(
    pace: Pace, tokens: int, agreement: Callable[[int], float], *, exact: float, alone: float, beside: float, step: float = 0.005
) -> list[tuple[Turn, int, float]]:  # fmt: skip
    """What a pace decides in a run of made-up times: each turn, tokens so far and seconds so far behind it."""
    random, log = torch.Generator().manual_seed(1), []
    made, seconds, ahead = 0, 0.0, 0
    while made < tokens:
        turn = pace.next()
        if not turn.drafted:
            pace.note_exact(exact)
            made, seconds, ahead = made + 1, seconds + exact, 0
            log.append((turn, made, seconds))
            continue
        n = max(turn.drafted, ahead)
        first, more = n - ahead, round(beside / (1.2 * step)) if turn.goes_on else 0
        takes = beside if turn.goes_on else alone
        compared = n + (more > 0)
        same = torch.rand(compared, generator=random) < agreement(made)
        agreed = int(same.long().cumprod(0).sum())
        pace.note(compared, agreed, takes, beside=more > 0, step_s=step if first else None, step_beside_s=1.2 * step if more else None)  # fmt: skip
        kept = min(agreed, n) + 1
        made, seconds = made + kept, seconds + first * step + takes
        ahead = n + more - kept if agreed == n + 1 else 0
        log.append((turn, made, seconds))
    return log


@pytest.mark.parametrize(("agreement", "most_ms"), [(0.5, 24.0), (0.85, 16.0), (0.95, 11.5)])
def test_what_makes_a_pass_late_is_not_done_in_vain(agreement: float, most_ms: float) -> None:
    # With steps beside it, a pass of a small model takes four times as long. The best of all fixed ways take 20, 13.5
    # and 9.5 ms a token.
    pace = Pace(Drafts.of("auto"), looks_ahead=True)
    log = paced(pace, 1500, lambda made: agreement, exact=0.02, alone=0.03, beside=0.12)
    assert 1000 * log[-1][2] / log[-1][1] < most_ms


def test_a_long_context_is_not_kept_waiting_by_trials() -> None:
    pace = Pace(Drafts.of("auto"), looks_ahead=True)
    log = paced(pace, 1024, lambda made: 0.999, exact=0.31, alone=0.31, beside=0.36, step=0.0092)
    assert all(turn.drafted for turn, _, _ in log)  # an exact token takes as long as thirty others
    assert 1000 * log[-1][2] / log[-1][1] < 12.5


@pytest.mark.parametrize("bad", [500, 2000])
def test_drafts_come_back_when_they_agree_again(bad: int) -> None:
    pace = Pace(Drafts.of("auto"), looks_ahead=True)
    log = paced(pace, bad + 1500, lambda made: 0.98 * (made >= bad), exact=0.02, alone=0.05, beside=0.06)  # fmt: skip
    again = next(made for turn, made, _ in log if made > bad and turn.drafted >= 16)
    assert again < bad + 600  # two rests of 256 at most


def test_a_stall_is_no_reason_to_draft_no_more() -> None:
    pace, drafted = Pace(Drafts.of("auto")), []
    for turn in range(40):
        n = pace.next().drafted
        drafted.append(n)
        pace.note(n, n, 0.1, step_s=0.009 + (1.0 / n if turn == 6 else 0.0))
    assert min(drafted) >= 8
    # Where drafts do not pay, one is tried now and then.
    pace, drafted = Pace(Drafts.of("auto")), []
    for _ in range(400):
        n = pace.next().drafted
        drafted.append(n)
        if n:
            pace.note(n, 0, 0.1, step_s=0.009)
        else:
            pace.note_exact(0.1)
    assert 4 < sum(n > 0 for n in drafted) < 40


def test_a_tally_counts_what_was_compared() -> None:
    tally = Tally()
    tally.add(4, 4)
    tally.add(4, 1)
    assert (tally.passes, tally.drafted, tally.examined, tally.accepted) == (2, 8, 6, 5)
    assert tally.by_position == [(2, 2), (2, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": 0}, "draft"),
        ({"draft": 500}, "at most 192"),
        ({"draft": 100, "window": 256}, "two drafts"),
        ({"page": 32, "sinks": 64}, "pages of 64"),
    ],
)
def test_drafts_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        offload.attach(build(), **SETTINGS | change)
