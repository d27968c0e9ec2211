"""Weights that a config alone says are those that the model has."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from offload.counting import by_tensors, count, table
from offload.errors import InputError

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "weights.py"))
TENSORS = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "tensors.py"))
OLDER = Version(transformers.__version__) < Version("5.23")  # the table is the newest one's

# As their files have it, and as their cards say.
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
        8_030_261_248,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8},
        46_702_792_704,
    ),
    "Qwen3-Next-80B-A3B": (
        {"model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
         "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936,
         "num_experts": 512, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
         "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32,
         "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mlp_only_layers": [], "decoder_sparse_step": 1,
         "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12},
        79_674_391_296,
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
         "num_experts": 128, "moe_intermediate_size": 768, "mlp_only_layers": [], "decoder_sparse_step": 1},
        30_532_122_624,
    ),
}  # fmt: skip


def small(kind: str, seed: int, **more: Any) -> tuple[dict[str, Any], int]:
    """The config of a small model of a kind, as a file has it, and how many weights the model has."""
    entry = table()[kind]
    names = {name: keys[0] for name, (keys, _) in entry["sizes"].items()}
    pick = random.Random(f"{kind} {seed}")
    given: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1} | more
    if "top" in entry:
        given[entry["top"][0]] = 2
    failed: Exception | None = None
    for _ in range(20):  # sizes that do not go together
        try:
            config, weights = TOOL["_built"](
                type(transformers.CONFIG_MAPPING[kind]()), given | TOOL["_varied"](names, pick)
            )
        except Exception as error:  # noqa: BLE001
            failed = error
            continue
        return config.to_dict(), weights
    raise AssertionError(f"{kind} cannot be built: {failed}")


@pytest.mark.parametrize("kind", sorted(table()))
def test_every_kind_in_the_table_has_as_many_weights_as_are_counted(kind: str) -> None:
    if OLDER:
        pytest.skip("the table is that of a newer transformers")
    config, weights = small(kind, 1)
    assert count(kind, config).all == weights, "run tools/weights.py > offload/data/weights.json"


def changed(kind: str, seed: int) -> dict[str, int]:
    """Some keys that a kind's tensors are made of, with other values; no model that they would not go with."""
    entry = by_tensors()[kind]
    keys = {
        key: value for key, value in entry["keys"].items() if value and key not in entry["fixed"]
    }
    pick = random.Random(f"{kind} {seed}")
    return {key: 2 * value for key, value in keys.items() if pick.random() < 0.4}


@pytest.mark.parametrize("kind", sorted(by_tensors()))
def test_kinds_of_several_sorts_of_layers_have_as_many_weights_as_are_counted(kind: str) -> None:
    if OLDER:
        pytest.skip("the table is that of a newer transformers")
    few = TENSORS["_Kind"](kind).few
    compared = 0
    for seed in range(12):
        changes = changed(kind, seed)
        try:
            config, model = TENSORS["built"](kind, few | changes)
        except Exception:  # noqa: BLE001, S112 - sizes that do not go together
            continue
        weights = sum(p.numel() for p in model.parameters())
        try:
            said = count(kind, config)
        except InputError:  # its layers are of a further sort then
            continue
        assert said.all == weights, f"{changes}: run tools/tensors.py > offload/data/tensors.json"
        assert said.embedding == model.get_input_embeddings().weight.numel()
        compared += bool(changes)
        if compared == 3:
            break
    assert compared


def test_a_kind_is_in_one_table_alone() -> None:
    assert not set(table()) & set(by_tensors())


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "spiral_attention"]}, "counted with layers"),
        ("falcon_h1", {"mamba_conv_bias": False}, "counted with mamba_conv_bias"),
        ("granitemoehybrid", {"hidden_size": "wide"}, "counted with hidden_size"),
        ("nemotron_h", {"num_hidden_layers": None}, "counted with num_hidden_layers"),
    ],
)
def test_what_was_not_counted_of_several_sorts_is_refused_by_name(
    kind: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        count(kind, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2} | more)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "glm4_moe", "cohere", "gpt2"])
def test_switches_count_together(kind: str) -> None:
    if OLDER:
        pytest.skip("the table is that of a newer transformers")
    switches = {key: not switch["default"] for key, switch in table()[kind]["switches"].items()}
    assert switches
    config, weights = small(kind, 2, **switches)
    assert count(kind, config).all == weights


@pytest.mark.parametrize("name", KNOWN)
def test_models_that_people_have_weigh_what_their_cards_say(name: str) -> None:
    config, weights = KNOWN[name]
    assert count(config["model_type"], config).all == weights


def test_experts_that_a_token_does_not_meet_and_looked_up_rows_are_told_apart() -> None:
    config, weights = KNOWN["Qwen3-30B-A3B"]
    found = count("qwen3_moe", config | {"num_experts_per_tok": 8})
    assert found.met == 8 / 128
    assert found.experts == 48 * 128 * 3 * 2048 * 768
    assert found.embedding == found.head == 151936 * 2048
    active = weights - (1 - found.met) * found.experts
    assert active == pytest.approx(3.3e9, rel=0.02)  # as its name says, and the embedding
    tied = count("qwen3_moe", config | {"tie_word_embeddings": True})
    assert (tied.head, tied.all) == (0, weights - found.head)


def test_a_key_has_more_than_one_spelling() -> None:
    config, weights = KNOWN["Qwen3-30B-A3B"]
    other = {key: value for key, value in config.items() if key != "num_experts"}
    assert count("qwen3_moe", other | {"num_local_experts": 128}).all == weights
    assert count("qwen3_moe", other | {"num_local_experts": 64}).all < weights


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("klingon", {}, "does not say how many weights"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "not been counted with mlp_only_layers"),
        ("llama", {"num_hidden_layers": "many"}, "needs num_hidden_layers"),
        ("llama", {"hidden_size": True}, "needs hidden_size"),
    ],
)
def test_what_was_not_counted_is_refused_by_name(
    kind: str, more: dict[str, Any], message: str
) -> None:
    config = KNOWN["Qwen3-30B-A3B"][0] if kind == "qwen3_moe" else KNOWN["Llama-3.1-8B"][0]
    with pytest.raises(InputError, match=message):
        count(kind, config | more)
