"""Which of the offloaded tokens matter to this query?

| file | what |
|---|---|
| `base` | what every index can be asked, and what it may be given |
| `flat` | all keys by a few bits, the best again exactly |
| `ivf` | the lists of the nearest centroids, by FAISS |
| `hnsw` | a walk over a graph of keys, by FAISS |
| `graph` | a walk over links that earlier queries drew, in Numba |
| `clusters` | the keys of the clusters whose centroids are liked |
| `pages` | the keys of the pages that may hold what is liked |
| `auto` | the fastest of these that finds enough, by trial |
| `tail` | what all other tokens add to attention, by summaries of them |
| `sample` | the same by a few of them, without summaries |
| `part` | attention over some tokens, merged with that over others |
| `kmeans` | which keys lie near each other |
| `scan` | the codes of `flat`, their scores and the best of them, in Numba |
| `file` | how an index lies in a file |
| `growing` | rows behind rows at O(1) |
| `finders` | what finds the best keys of one KV head while a model generates |
| `grouped` | clusters of keys that lie in pages |
| `paged` | rows where the cache keeps them: the best are found and attended to, in Numba |
| `workers` | threads that share out the searches of many heads |
| `on_faiss` | what the backends that FAISS holds have in common |

Vector indexes over offloaded keys: NumPy, Numba and FAISS, no torch. Importing this package loads none of them.
`offload.tiers.search` has one for each layer and KV head where `retrieval.index` asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offload.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from offload.index.base import Index

BACKENDS = ("flat", "ivf", "hnsw", "graph", "clusters", "pages")


def backend(name: str) -> type[Index]:
    """The class of a backend; its arguments are its settings.

    Args:
        name: One of `BACKENDS`.

    Raises:
        ConfigError: There is none of this name.
    """
    if name == "flat":
        from offload.index.flat import Flat

        return Flat
    if name == "ivf":
        from offload.index.ivf import IVF

        return IVF
    if name == "hnsw":
        from offload.index.hnsw import HNSW

        return HNSW
    if name == "graph":
        from offload.index.graph import Graph

        return Graph
    if name == "clusters":
        from offload.index.clusters import Clusters

        return Clusters
    if name == "pages":
        from offload.index.pages import Pages

        return Pages
    change = f"Choose from {', '.join(BACKENDS)}."
    raise ConfigError("there is no index of this name", asked=name, there=BACKENDS, change=change)


def load(path: Path) -> Index:
    """The index of a file, whichever backend saved it.

    Args:
        path: Of `Index.save`.

    Raises:
        InputError: The file is damaged or from a newer version.
        ConfigError: It is of a backend that this version does not have.
    """
    from offload.index.file import read

    name, _, _ = read(path)
    return backend(name).load(path)


def token_bytes(name: str, dimension: int) -> int:
    """Host bytes of one key beside its page, where an index is searched while a model generates: an upper bound.

    Args:
        name: One of `BACKENDS`, or `auto`: what is tried lies side by side.
        dimension: D.
    """
    if name == "auto":
        return token_bytes("clusters", dimension) + token_bytes("flat", dimension)
    if name == "flat":
        # Four bits a channel, and the smallest value and step of each for 128 keys.
        return -(-(dimension + 3) // 2) + -(-dimension // 16)
    if name == "clusters":
        # Its number, and a sixteenth of where its cluster begins and of the cluster's centroid by such codes.
        return 5 + -(-(dimension + 3) // 32) + -(-dimension // 256)
    rows = 4 * dimension  # copied, as float32 where they are not of 16 bits
    beside = {
        "ivf": 24 + dimension // 4,
        "hnsw": 4 * 64 + 64,
        "graph": 4 * 32 + 8 + 4 * dimension,
        "pages": 4 * dimension // 4,
    }
    return rows + beside[name]
