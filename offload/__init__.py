"""Runs Hugging Face models on contexts whose KV cache does not fit on the GPU.

    runtime = offload.attach(model, gpu_memory="20GiB")
    ids = runtime.generate(**inputs, max_new_tokens=256)
    print(runtime.report())

| where | what |
|---|---|
| `offload.runtime` | `attach`, and the `Runtime` that it returns |
| `offload.config` | what can be set, and the TOML file |
| `offload.errors` | everything that is raised on purpose |
| `offload.cache` | the transformers cache that is split between device and host |
| `offload.report` | what a run used and how long it took |
| `offload.index`, `offload.scheduler`, `offload.kernels` | search, placement, and GPU code |

Importing any `offload.x` runs this file first, so it loads nothing heavy: names are looked up when
they are used (PEP 562), and torch and transformers come with the first one that needs them.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from offload.errors import (
    BudgetError,
    CacheError,
    ConfigError,
    InputError,
    LostHandleError,
    OffloadError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from offload.cache import OffloadCache
    from offload.config import OffloadConfig
    from offload.report import Report
    from offload.runtime import Runtime, attach

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CacheError",
    "ConfigError",
    "InputError",
    "LostHandleError",
    "OffloadCache",
    "OffloadConfig",
    "OffloadError",
    "Report",
    "Runtime",
    "UnsupportedModelError",
    "__version__",
    "attach",
]

_HOME = {
    "OffloadCache": "offload.cache",
    "OffloadConfig": "offload.config",
    "Report": "offload.report",
    "Runtime": "offload.runtime",
    "attach": "offload.runtime",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
