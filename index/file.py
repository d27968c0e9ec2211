"""How does an index lie in a file, and how is a damaged one told from a whole one?

    magic, format version, three lengths and a checksum      64 bytes
    JSON: backend, metadata, name, dtype and shape of arrays
    the arrays as they lie in memory, each at a multiple of 64 bytes

The checksum (BLAKE2b, 16 bytes) covers everything but itself and the filling behind it. `read` compares length and checksum before
anything is parsed, and nothing in the file is executed: there is no pickle. Arrays are mapped, not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.errors import InputError

MAGIC = b"OFFLDIDX"
VERSION = 1
ALIGNMENT = 64
# Magic, version, zero, bytes of JSON, bytes of arrays; checksum, filling. Little-endian.
_HEAD = struct.Struct("<8sIIQQ16s16x")
_COVERED = 32  # bytes of the head before the checksum
_DTYPES = ("<f2", "<f4", "<i4", "<i8", "|u1")
_DAMAGED = "Build the index again, or copy the file again."

assert _HEAD.size == ALIGNMENT


def write(
    path: Path, backend: str, metadata: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Writes an index; a file of this name is replaced when all is written, or not at all.

    Args:
        path: Where to.
        backend: Name of the backend.
        metadata: What JSON can say.
        arrays: By name; float16, float32, int32, int64 or uint8.
    """
    entries = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    assert all(dtype in _DTYPES for _, dtype, _ in entries)
    said = {"backend": backend, "metadata": dict(metadata), "arrays": entries}
    text = json.dumps(said, allow_nan=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    nbytes = sum(array.nbytes + -array.nbytes % ALIGNMENT for array in arrays.values())
    head = _HEAD.pack(MAGIC, VERSION, 0, len(text), nbytes, bytes(16))
    digest = hashlib.blake2b(head[:_COVERED] + text, digest_size=16)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(_HEAD.size))
            file.write(text)
            for array in arrays.values():
                raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                for part in (raw, np.zeros(-raw.nbytes % ALIGNMENT, dtype=np.uint8)):
                    digest.update(part.data)
                    file.write(part.data)
            file.seek(0)
            file.write(head[:_COVERED] + digest.digest())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path, backend: str | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Reads what `write` wrote.

    Args:
        path: Of the file.
        backend: The one that it has to be of; None for any.

    Returns:
        Backend, metadata, and the arrays by name: read-only, mapped.

    Raises:
        InputError: It is no index, of a newer format, shorter or longer than it says, not what was written, or of
            another backend.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if head[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path.name} is no index", there=head[: len(MAGIC)], change=_DAMAGED)
    if len(head) < _HEAD.size:
        raise _wrong_length(path, _HEAD.size, length)
    _, version, _, text_bytes, array_bytes, digest = _HEAD.unpack(head)
    if version > VERSION:
        raise InputError(
            f"{path.name} is of a newer format than this version of offload reads",
            asked=version,
            there=VERSION,
            change="Update offload, or build the index again.",
        )
    if length != _HEAD.size + text_bytes + array_bytes:
        raise _wrong_length(path, _HEAD.size + text_bytes + array_bytes, length)
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    found_digest = hashlib.blake2b(head[:_COVERED], digest_size=16)
    found_digest.update(mapped[_HEAD.size :].data)
    if found_digest.digest() != digest:
        raise InputError(f"{path.name} is not what was written", change=_DAMAGED)
    start = _HEAD.size + text_bytes
    try:
        said = json.loads(bytes(mapped[_HEAD.size : start]))
        arrays = {}
        for name, dtype, shape in said["arrays"]:
            if dtype not in _DTYPES or any(n < 0 for n in shape):
                raise ValueError(dtype, shape)
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = mapped[start : start + nbytes].view(dtype).reshape(shape)
            start += nbytes + -nbytes % ALIGNMENT
        found, metadata = str(said["backend"]), dict(said["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path.name} says nothing readable: {error}", change=_DAMAGED) from error
    if backend is not None and found != backend:
        raise InputError(
            f"{path.name} is an index of another backend",
            asked=backend,
            there=found,
            change="Use offload.index.load, which takes the one that the file names.",
        )
    return found, metadata, arrays


def _wrong_length(path: Path, asked: int, there: int) -> InputError:
    return InputError(
        f"{path.name} is {'shorter' if there < asked else 'longer'} than it says",
        asked=asked,
        there=there,
        change=_DAMAGED,
    )
