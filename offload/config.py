"""What a user can set: one frozen value, read from TOML, from keyword arguments, or from both.

This is the configuration as it was *asked*: `auto` stays `auto` here. What it comes to on a machine
and for a model is a value of its own, made elsewhere; nothing writes back into a config.

Every key has its description, its default and its unit here and nowhere else: `offload config init`
and the reference are written from them. Mistakes are `ConfigError`s, never pydantic's own, and all
mistakes of a file or a call are reported together.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from offload import places
from offload.errors import ConfigError
from offload.scheduler.pace import window_of_drafts
from offload.units import Size, parse_tokens

FILE_NAME: Final = "offload.toml"
SMALLEST_PAGE: Final = 16  # one tile of the tensor cores: no kernel reads fewer tokens at a time
# Tokens from which compiling the layers is worth the wait. On an H100, 32 layers of an 8B model take 20 to 25 s to compile,
# and a token 2 ms less afterwards: this many win back a third of it, a server's later calls the rest.
COMPILED_FROM: Final = 4096
FAST_PAGE: Final = 64  # tokens that share the scales of their keys in a replica
LONGEST_DRAFT: Final = 192  # tokens: two fit the window beside a replica
_ASSIGNMENT: Final = re.compile(r"""\s*[\w."' -]+=""")
_LEAST_SINKS: Final = 64  # tokens; the first few carry the attention sink, the rest is rounding


def _auto_or_tokens(value: Any) -> Any:
    return "auto" if isinstance(value, str) and value.strip().lower() == "auto" else _tokens(value)


def _auto_or_tokens_or_none(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    return _tokens_or_none(value)


def _auto_or_switch(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    raise ConfigError(
        f"{value!r} is neither a switch nor auto",
        asked=value,
        change='Write true, false or "auto".',
    )


def _auto_or_share(value: Any) -> Any:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"{value!r} is no share above 0 and at most 1",
            asked=value,
            change='Write for example 0.5, or "auto".',
        )
    return share


def _tokens(value: Any) -> int:
    return parse_tokens(value)


def _tokens_or_none(value: Any) -> int:
    return parse_tokens(value, at_least=0)


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # a number to Python, and to pydantic
        raise ConfigError(
            f"{value!r} is not a number", asked=value, change="Write for example 0.001."
        )
    return value


def _definite(value: Any) -> Size:
    size = Size.parse(value)
    if size.is_auto:
        raise ConfigError(
            "'auto' has no meaning here", asked="auto", change='Write bytes ("1GiB") or a share.'
        )
    return size


def _auto_or_bytes(value: Any) -> Size:
    size = Size.parse(value)
    if size.percent is not None:
        raise ConfigError(
            f"'{size}' is a share of nothing",
            asked=str(size),
            change='Write bytes ("256MiB") or "auto".',
        )
    return size


# How the parsers above are described in the JSON schema. These patterns take all that the parsers read,
# and a few things that they refuse (a size of less than 1 MiB without its unit).
_NUMBER: Final = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"
_BYTES: Final = _NUMBER + r"\s*([KMGTkmgt][iI]?B|[kmgt][iI]?b|[KMGT]Ib|[Bb])?"
_SHARE: Final = _NUMBER + r"\s*%"
_LENGTH: Final = _NUMBER + r"\s*[KMkm]?"
_AUTO: Final = "[aA][uU][tT][oO]"


def _reads(bare: Mapping[str, Any], *patterns: str) -> WithJsonSchema:
    """A text that is one of the patterns, or a value without quotes; "auto" is offered as a word."""
    word = [{"const": "auto"}] if _AUTO in patterns else []
    text = {"type": "string", "pattern": rf"^\s*({'|'.join(patterns)})\s*$"}
    return WithJsonSchema({"anyOf": [*word, text, {**bare}]})


_ABOVE_ZERO: Final = {"type": "integer", "minimum": 1}
_FROM_ZERO: Final = {"type": "integer", "minimum": 0}
_WHOLE: Final = {"type": "number", "minimum": 1}  # 1e9 is a float in TOML
_PART: Final = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_AsText = PlainSerializer(str, return_type=str)
_Budget = Annotated[
    InstanceOf[Size],
    BeforeValidator(Size.parse),
    _AsText,
    _reads(_WHOLE, _BYTES, _SHARE, _AUTO),
]
_DefiniteSize = Annotated[
    InstanceOf[Size], BeforeValidator(_definite), _AsText, _reads(_WHOLE, _BYTES, _SHARE)
]
_BufferSize = Annotated[
    InstanceOf[Size], BeforeValidator(_auto_or_bytes), _AsText, _reads(_WHOLE, _BYTES, _AUTO)
]
_Tokens = Annotated[int, BeforeValidator(_tokens), _reads(_ABOVE_ZERO, _LENGTH)]
_TokensOrNone = Annotated[int, BeforeValidator(_tokens_or_none), _reads(_FROM_ZERO, _LENGTH)]
_AutoOrTokens = Annotated[
    Literal["auto"] | int, BeforeValidator(_auto_or_tokens), _reads(_ABOVE_ZERO, _LENGTH, _AUTO)
]
_AutoOrTokensOrNone = Annotated[
    Literal["auto"] | int,
    BeforeValidator(_auto_or_tokens_or_none),
    _reads(_FROM_ZERO, _LENGTH, _AUTO),
]
_AutoOrShare = Annotated[
    Literal["auto"] | float, BeforeValidator(_auto_or_share), _reads(_PART, _NUMBER, _AUTO)
]
_AutoOrSwitch = Annotated[
    Literal["auto"] | bool, BeforeValidator(_auto_or_switch), _reads({"type": "boolean"}, _AUTO)
]


def _unit(unit: str) -> dict[str, Any]:
    return {"unit": unit}


class _Table(BaseModel):
    """A TOML table: frozen, and a stranger among its keys is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _one_error(_problems(error, type(self))) from None


class MemoryConfig(_Table):
    """How much memory may be used, and how much stays free for others."""

    gpu: _Budget = Field(
        default=Size(),
        description="Device memory for weights, KV cache and workspace together. auto: what is "
        "free, and what the model already holds, minus the reserve.",
        json_schema_extra=_unit("bytes, % of the device's memory, or auto"),
    )
    cpu: _Budget = Field(
        default=Size(),
        description="Host memory for the offloaded KV. auto: as much as the context needs, at "
        "most what is available minus the reserve.",
        json_schema_extra=_unit("bytes, % of the host's memory, or auto"),
    )
    pinned: _Budget = Field(
        default=Size(),
        description="How much of the host memory may be pinned. WSL2 and some containers pin "
        "little; the rest is then pageable and copied through pinned buffers. auto: all of it, "
        "as far as the system lets us.",
        json_schema_extra=_unit("bytes, % of the host's memory, or auto"),
    )
    reserve: _DefiniteSize = Field(
        default=Size(bytes=1024**3),
        description="What auto leaves free for other programs, on the device and on the host.",
        json_schema_extra=_unit("bytes or % of the memory in question"),
    )


class CacheConfig(_Table):
    """How the KV cache of a layer is cut into sinks, window and pages."""

    page: _Tokens = Field(
        default=64,
        description="Tokens that leave the device window together. A power of two, at least "
        f"{SMALLEST_PAGE}; mode fast takes 64 only.",
        json_schema_extra=_unit("tokens"),
    )
    sinks: _TokensOrNone = Field(
        default_factory=lambda data: _default_sinks(data.get("page", 64)),
        description="First tokens of the context, which stay on the device. A multiple of page, "
        "or 0. Default: 64 rounded up to whole pages.",
        json_schema_extra=_unit("tokens"),
    )
    window: _AutoOrTokens = Field(
        default="auto",
        description="Most recent tokens, which stay on the device. A multiple of page. auto: as "
        "many as the device budget holds.",
        json_schema_extra=_unit("tokens, or auto"),
    )

    @field_validator("page")
    @classmethod
    def _page_is_a_power_of_two(cls, page: int) -> int:
        if page >= SMALLEST_PAGE and page & (page - 1) == 0:
            return page
        below = max(SMALLEST_PAGE, 1 << (page.bit_length() - 1))
        above = max(SMALLEST_PAGE, 1 << page.bit_length())
        raise ConfigError(
            f"a page of {page:,} tokens is not a power of two of at least {SMALLEST_PAGE}",
            asked=page,
            change=_write(below, above),
        )

    @field_validator("sinks", "window")
    @classmethod
    def _page_divides(cls, tokens: int | str, info: ValidationInfo) -> int | str:
        page = info.data.get("page")  # missing if it was wrong itself
        if page is None or isinstance(tokens, str) or tokens % page == 0:
            return tokens
        below = tokens // page * page
        least = page if info.field_name == "window" else 0
        raise ConfigError(
            f"page size {page:,} does not divide the {info.field_name} of {tokens:,} tokens",
            asked=tokens,
            there=page,
            change=_write(max(below, least), below + page),
        )


class RetrievalConfig(_Table):
    """How offloaded tokens are found again. Exact mode reads all of them."""

    tokens: _AutoOrTokensOrNone = Field(
        default="auto",
        description="Tokens per KV head that are attended to exactly in each step, beside sinks and "
        "window. A power of two from 16 to 4,096, or 0. auto: 64 on replicas of 4 and 3 bits, 256 on "
        "2 bits.",
        json_schema_extra=_unit("tokens, or auto"),
    )

    row_cache: _AutoOrTokensOrNone = Field(
        default="auto",
        description="Rows per KV head that stay on the device after they were selected, so that the next "
        "steps need not read them from the host. A power of two from 16 to 65,536, or 0. What comes out "
        "does not depend on it. auto: eight times retrieval.tokens, at most 4,096, where these are 256 or more, else none.",
        json_schema_extra=_unit("tokens, or auto"),
    )

    index: Literal["replica", "auto", "flat", "ivf", "hnsw", "graph", "clusters", "pages"] = Field(
        default="replica",
        description="What finds the tokens that are attended to exactly. replica: the device, by what it keeps of "
        "them. The others: an index over the keys in host memory; the host then attends to what it finds, "
        "so that a low replica need not know which tokens matter. flat scores all keys by four bits of each, "
        "clusters those of the clusters whose centroids score best; the others have a copy of the keys and look at some. auto: "
        "for each KV head clusters or flat, whichever finds enough and is faster, as measured behind the prompt.",
        json_schema_extra=_unit(
            '"replica", "auto", "flat", "ivf", "hnsw", "graph", "clusters" or "pages"'
        ),
    )
    recall: Annotated[float, BeforeValidator(_no_switch)] = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Share of the exactly best tokens that clusters have to find, on average, where index is auto. "
        "Not read otherwise.",
        json_schema_extra=_unit("a share, 1 for all"),
    )
    threads: _AutoOrTokens = Field(
        default="auto",
        description="Threads that search, where the host does. auto: one for each core.",
        json_schema_extra=_unit("threads, or auto"),
    )

    @field_validator("tokens", "row_cache")
    @classmethod
    def _tokens_are_a_power_of_two(cls, tokens: int | str, info: ValidationInfo) -> int | str:
        least, most = 16, 4096 if info.field_name == "tokens" else 65536
        if isinstance(tokens, str) or tokens == 0:
            return tokens
        if least <= tokens <= most and tokens & (tokens - 1) == 0:
            return tokens
        below = min(most, max(least, 1 << (tokens.bit_length() - 1)))
        raise ConfigError(
            f"{tokens:,} tokens are not a power of two from {least} to {most:,}",
            asked=tokens,
            change=_write(below, min(most, max(least, 1 << tokens.bit_length()))),
        )


class ReplicaConfig(_Table):
    """The low-bit copy of offloaded KV on the device. Exact mode needs none."""

    rung: Literal["auto", "4k4v", "3k3v", "2k2v", "2k+clusters", "clusters"] = Field(
        default="auto",
        description="Bits of its keys and values; 2k+clusters keeps means of values over tokens of similar "
        "keys, clusters means of keys too and nothing else. auto: the best that fits the device budget beside a "
        "small window, and streaming of every token where none does; clusters in mode verified only.",
        json_schema_extra=_unit('"auto", "4k4v", "3k3v", "2k2v", "2k+clusters" or "clusters"'),
    )
    ladder: bool = Field(
        default=False,
        strict=True,
        description="Whether each layer gets the bits that cost least fidelity for the bytes there are, as measured on "
        "the beginning of the first long prompt: a layer that matters may keep its KV as it is, one that does not gets "
        "2 bits; retrieval.tokens, where it is auto, is 64 or 256 for each. Otherwise all get the same, and what is left lifts the first and the last ones.",
        json_schema_extra=_unit("true or false"),
    )
    whole_layers: _TokensOrNone = Field(
        default=0,
        description="Layers that keep all their KV on the device as it is, the first and the last "
        "ones first: for models that low bits hurt there. A cache whose length is not known has none.",
        json_schema_extra=_unit("layers"),
    )
    skipped_mass: Annotated[float, BeforeValidator(_no_switch)] = Field(
        default=0.001,
        ge=0.0,
        lt=1.0,
        description="Values of blocks whose attention weights together are below this share of all "
        "weights need not be read. report() says how much was skipped.",
        json_schema_extra=_unit("share"),
    )


class SchedulerConfig(_Table):
    """What becomes of tokens that a step needs and the device does not hold."""

    recompute: Literal["off", "hidden", "prefix"] = Field(
        default="off",
        description="off: keys and values on the host are copied. hidden, in mode exact: the host keeps the inputs of "
        "attention instead, which are fewer bytes where a model has as many KV heads as query heads, and the device "
        "rebuilds keys and values from them, to the rounding of its matrix products. prefix, in mode exact: where keys and "
        "values are more than memory.cpu, the oldest are dropped, and read again from their ids in every pass: slow, and "
        "it fits. One sequence or several, but neither beams nor returned sequences.",
        json_schema_extra=_unit('"off", "hidden" or "prefix"'),
    )
    recomputed: _AutoOrShare = Field(
        default="auto",
        description="Share of the tokens on the host that are rebuilt, where recompute is hidden. auto: so many that "
        "copies and matrix products end together.",
        json_schema_extra=_unit("share, or auto"),
    )
    sparsity: Annotated[float, BeforeValidator(_no_switch)] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Mode fast: share of all tokens that a step leaves out altogether, where not all fit the device. It attends to "
        "the window and, per KV head, to the tokens that weighed most lately, no replica speaks for the others, and a cache whose "
        "length is not known streams them. That costs least, and finds no token again that was let go: 0, with a replica of "
        "every token, stays closer to attention over all.",
        json_schema_extra=_unit("share"),
    )


class PrefillConfig(_Table):
    """How a prompt is read."""

    chunk: _AutoOrTokens = Field(
        default="auto",
        description="Tokens of the prompt that are computed together. auto: 4,096, and fewer "
        "where the device budget asks for it.",
        json_schema_extra=_unit("tokens, or auto"),
    )


class DecodeConfig(_Table):
    """How a token is made."""

    staging: _BufferSize = Field(
        default=Size(),
        description="Size of one of the two device buffers through which host pages stream. "
        "auto: chosen from the device budget.",
        json_schema_extra=_unit("bytes, or auto"),
    )
    capture: bool = Field(
        default=True,
        strict=True,
        description="Whether the step of one token is captured and replayed, on a CUDA device: as one CUDA graph in fast mode, as "
        "one between every two layers' attention where every token is streamed.",
        json_schema_extra=_unit("true or false"),
    )
    compile: _AutoOrSwitch = Field(
        default="auto",
        description="Whether the layers are compiled before they are captured: nearly a second each, "
        "once in a process, for about 2 ms less a token of an 8B model. auto: once 4,096 tokens have "
        "been made or are asked for.",
        json_schema_extra=_unit("true, false or auto"),
    )

    draft: _AutoOrTokens = Field(
        default="auto",
        description="Mode verified: tokens that are drafted before an exact pass looks at them. auto: by what "
        "drafting and verifying take and how often they agree; none where exact steps are faster.",
        json_schema_extra=_unit("tokens, or auto"),
    )

    look_ahead: _AutoOrSwitch = Field(
        default="auto",
        description="Mode verified: whether the draft goes on while an exact pass looks at it. auto: on a GPU.",
        json_schema_extra=_unit("true, false or auto"),
    )

    @field_validator("draft")
    @classmethod
    def _not_too_long(cls, draft: str | int) -> str | int:
        if isinstance(draft, int) and draft > LONGEST_DRAFT:
            raise ConfigError(
                f"A draft has at most {LONGEST_DRAFT} tokens",
                asked=draft,
                there=LONGEST_DRAFT,
                change='Write fewer, or "auto".',
            )
        return draft


class TraceConfig(_Table):
    """What is shown while it runs."""

    progress: bool = Field(
        default=True,
        strict=True,
        description="Whether a progress bar is drawn on stderr during a long prefill. Never drawn "
        "where stderr is not a terminal.",
        json_schema_extra=_unit("true or false"),
    )
    progress_from: _TokensOrNone = Field(
        default=8192,
        description="Prompts of at least so many tokens get a progress bar.",
        json_schema_extra=_unit("tokens"),
    )


class Setting(NamedTuple):
    """One key of a configuration, with all that there is to say about it.

    Attributes:
        key: Where it is in the file, `memory.gpu`.
        value: What is in effect, as TOML takes it: a str, an int or a bool.
        default: What would be in effect without it.
        is_set: Whether it was given, even if as the default.
        unit: What it is counted in.
        description: What it does.
    """

    key: str
    value: str | int | bool
    default: str | int | bool
    is_set: bool
    unit: str
    description: str


class Given(NamedTuple):
    """One value that stands above the file, and how the user gave it.

    Attributes:
        key: As in the file, `memory.gpu`.
        value: As TOML would have it.
        name: What the user wrote, for messages: `OFFLOAD_MEMORY__GPU`, `--gpu-memory`.
    """

    key: str
    value: object
    name: str


class OffloadConfig(_Table):
    """The whole configuration of one attached model.

    `OffloadConfig()` is the default. `build` makes one from whatever a user has; the constructor
    takes the sections by name, as their classes or as dicts. Both raise `ConfigError`.
    """

    mode: Literal["fast", "verified", "exact"] = Field(
        default="fast",
        description="What is promised of the tokens. fast: nearly always those of the stock cache, from a "
        "low-bit replica on the device and a few tokens read exactly; what fits the device, beams of "
        "runtime.generate, and steps of several tokens are exact. verified: always those of the stock cache; "
        "fast drafts several tokens, and one exact pass, for which every offloaded token is streamed, keeps those "
        "that are right. exact: always those of the stock cache; every offloaded token is streamed for each new one.",
        json_schema_extra=_unit('"fast", "verified" or "exact"'),
    )
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    replica: ReplicaConfig = Field(default_factory=ReplicaConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    prefill: PrefillConfig = Field(default_factory=PrefillConfig)
    decode: DecodeConfig = Field(default_factory=DecodeConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)

    # The keyword arguments of `offload.attach`, and the key that each one sets.
    SHORT_NAMES: ClassVar[Mapping[str, str]] = {
        "gpu_memory": "memory.gpu",
        "cpu_memory": "memory.cpu",
        "pinned_memory": "memory.pinned",
        "reserve": "memory.reserve",
        "page": "cache.page",
        "sinks": "cache.sinks",
        "window": "cache.window",
        "chunk": "prefill.chunk",
        "staging": "decode.staging",
        "capture": "decode.capture",
        "compile": "decode.compile",
        "draft": "decode.draft",
        "look_ahead": "decode.look_ahead",
        "rung": "replica.rung",
        "ladder": "replica.ladder",
        "whole_layers": "replica.whole_layers",
        "skipped_mass": "replica.skipped_mass",
        "retrieved": "retrieval.tokens",
        "row_cache": "retrieval.row_cache",
        "index": "retrieval.index",
        "recall": "retrieval.recall",
        "threads": "retrieval.threads",
        "recompute": "scheduler.recompute",
        "recomputed": "scheduler.recomputed",
        "sparsity": "scheduler.sparsity",
        "progress": "trace.progress",
        "progress_from": "trace.progress_from",
    }

    def require_usable(self) -> None:
        """Raises ConfigError where keys that are right by themselves exclude each other."""
        if self.scheduler.recompute != "off" and self.mode != "exact":
            raise ConfigError(
                "Inputs of attention stand for keys and values in mode exact only: other modes read rows of single tokens",
                asked=f'scheduler.recompute = "{self.scheduler.recompute}"',
                there=f"mode {self.mode}",
                change='Write mode = "exact", or scheduler.recompute = "off".',
            )
        if self.scheduler.sparsity:
            self._require_sparse()
        elif self.keeps_replica and self.cache.page != FAST_PAGE:
            raise ConfigError(
                f"Mode {self.mode} works in pages of {FAST_PAGE} tokens, which share the scales of their keys",
                asked=self.cache.page,
                there=FAST_PAGE,
                change="Leave cache.page out, or set mode to 'exact'.",
            )
        window, draft = self.cache.window, self.decode.draft
        if self.mode == "verified" and isinstance(window, int):
            needed = window_of_drafts(1 if isinstance(draft, str) else draft)
            if window < needed:
                raise ConfigError(
                    "The window does not hold two drafts, the token before them and a page",
                    asked=window,
                    there=needed,
                    change="Leave cache.window out, or lower decode.draft.",
                )

    def _require_sparse(self) -> None:
        """Raises ConfigError where a key asks for what steps over a share of the tokens have not."""
        others = {
            f'mode = "{self.mode}"': self.mode != "fast",
            f'replica.rung = "{self.replica.rung}"': self.replica.rung != "auto",
            "replica.ladder = true": self.replica.ladder,
            f'retrieval.index = "{self.retrieval.index}"': self.retrieval.index != "replica",
            f"retrieval.tokens = {self.retrieval.tokens}": self.retrieval.tokens != "auto",
            f"retrieval.row_cache = {self.retrieval.row_cache}": self.retrieval.row_cache != "auto",
        }
        asked = next((name for name, holds in others.items() if holds), None)
        if asked is not None:
            raise ConfigError(
                "Steps that leave tokens out are those of mode fast, and keep no replica",
                asked=asked,
                there=f"scheduler.sparsity = {self.scheduler.sparsity:g}",
                change="Leave one of the two out.",
            )

    @property
    def keeps_replica(self) -> bool:
        """Whether steps of one token may go by a low-bit replica."""
        return self.mode != "exact"

    def compiles(self, tokens: int) -> bool:
        """Whether layers are compiled where so many tokens are asked for."""
        asked = self.decode.compile
        return tokens >= COMPILED_FROM if isinstance(asked, str) else asked

    @classmethod
    def build(
        cls,
        config: OffloadConfig | str | Path | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> OffloadConfig:
        """Makes a configuration from whatever the user has, with some of its keys replaced.

        Args:
            config: A configuration, a TOML file, TOML text, or tables as nested dicts. None: all
                defaults.
            **overrides: Keys to replace: `mode`, the names in `SHORT_NAMES` (`gpu_memory="20GiB"`),
                or sections as dicts (`memory={"gpu": "20GiB"}`).

        Raises:
            ConfigError: Naming every key that is unknown or unusable, in the file and in the call.
        """
        if isinstance(config, OffloadConfig) and not overrides:
            return config
        data, file = _tables(config)
        given, problems = _nest(overrides)
        spelled = {key: name for name, key in cls.SHORT_NAMES.items() if name in overrides}
        for section, value in given.items():
            below = data.get(section)
            if isinstance(below, dict) and isinstance(value, dict):
                value = below | value
            data[section] = value
        return cls._checked(data, problems, file=file, given=given, spelled=spelled)

    @classmethod
    def from_toml(cls, path_or_text: str | Path) -> OffloadConfig:
        """Reads a TOML file, or TOML text.

        Args:
            path_or_text: A Path is a file. A str is a file if it ends in `.toml` or if a file of
                that name exists; otherwise it is the text itself.

        Raises:
            ConfigError: The file cannot be read, is not TOML, or has keys that are unknown or
                unusable: all of them are named.
        """
        return cls.build(path_or_text)

    @classmethod
    def layered(
        cls,
        file: Path | None,
        given: Sequence[Given],
        problems: Sequence[ConfigError] = (),
    ) -> OffloadConfig:
        """One file with single values above it, as the command line has them.

        Args:
            file: The TOML file. None: the defaults.
            given: Values of keys that exist. Of two for one key the later one is taken.
            problems: What is already known to be wrong.

        Raises:
            ConfigError: Naming all problems, those given, those of the file and those of the values.
        """
        try:
            data, source = _tables(file)
        except ConfigError as error:
            raise _one_error([*problems, *(error.problems or (error,))]) from None
        above: dict[str, Any] = {}
        for each in given:
            section, _, name = each.key.rpartition(".")
            table = above.setdefault(section, {}) if section else above
            table[name] = each.value
        for section, value in above.items():
            below = data.get(section, {})
            if not isinstance(value, dict):
                data[section] = value
            elif isinstance(below, dict):  # else it is no table, and reported
                data[section] = below | value
        spelled = {each.key: each.name for each in given}
        return cls._checked(data, problems, file=source, given=above, spelled=spelled)

    @staticmethod
    def find() -> Path | None:
        """The file that the command line reads when none is named.

        Nothing in the library calls it: a script that wants the same says
        `offload.attach(model, OffloadConfig.find())`.

        Returns:
            The file that the variable `OFFLOAD_CONFIG` names, else the nearest `offload.toml` in the
            current folder or above it, else `offload.toml` in the user's config folder, else None.

        Raises:
            ConfigError: `OFFLOAD_CONFIG` names no file.
        """
        if named := os.environ.get("OFFLOAD_CONFIG"):
            if _exists(named):
                return Path(named).expanduser()
            raise ConfigError(
                f"There is no file {named!r}",
                key="OFFLOAD_CONFIG",
                asked=named,
                change="Let the variable name a TOML file, or unset it.",
            )
        import platformdirs

        here = Path(os.path.abspath("."))
        users = Path(platformdirs.user_config_dir("offload", appauthor=False))
        files = [folder / FILE_NAME for folder in (here, *here.parents, users)]
        return next((file for file in files if os.path.isfile(file)), None)

    def to_toml(self, *, origins: Mapping[str, str] | None = None) -> str:
        """Every key with the value in effect, as TOML that `from_toml` reads back as an equal.

        Args:
            origins: Where each key has its value from, for a comment at the end of its line.
        """

        def entry(setting: Setting) -> list[str]:
            line = _assignment(setting.key, setting.value)
            return [line if origins is None else f"{line:<24}  # {origins[setting.key]}"]

        return _toml(self.settings(), entry)

    @classmethod
    def template(cls, *, schema: str | None = None) -> str:
        """A TOML file with every key commented out, and what it does, its unit and its default.

        Args:
            schema: Where the JSON schema is, seen from the file. Its first line tells editors.
        """

        def entry(setting: Setting) -> list[str]:
            what = _comment(f"{setting.description} [{setting.unit}]")
            return ["", *what, f"# {_assignment(setting.key, setting.default)}"]

        head = "Configuration of offload. Every key is here with its default: uncomment to change."
        first = [] if schema is None else [f"#:schema {schema}", ""]
        return "\n".join([*first, *_comment(head), "", _toml(cls().settings(), entry)])

    def settings(self) -> list[Setting]:
        """Every key, in the order of the file."""
        return list(_settings(self))

    @classmethod
    def every_key(cls) -> list[str]:
        """The name of every key, `memory.gpu`, in the order of the file."""
        return [setting.key for setting in cls().settings()]

    @classmethod
    def nearest_key(cls, key: str) -> str | None:
        """The key that was probably meant by one that does not exist. None if there is no telling."""
        keys = cls.every_key()
        last = key.lower().rpartition(".")[2]
        same = [known for known in keys if known.rpartition(".")[2] == last]
        near = difflib.get_close_matches(key.lower(), [*keys, *cls.SHORT_NAMES], n=1, cutoff=0.6)
        found = same if len(same) == 1 else near
        return cls.SHORT_NAMES.get(found[0], found[0]) if found else None

    @classmethod
    def _checked(
        cls,
        data: Mapping[str, Any],
        problems: Iterable[ConfigError],
        *,
        file: _File | None,
        given: Mapping[str, Any],
        spelled: Mapping[str, str],
    ) -> OffloadConfig:
        """The configuration, or all problems in one error, each under the name the user wrote.

        Args:
            data: The tables, overrides included.
            problems: What is already known to be wrong.
            file: Where the tables come from, for the messages.
            given: What came from overrides, as tables.
            spelled: For a key that came from an override: the name of that override.
        """
        found = list(problems)
        config = None
        try:
            config = cls(**data)
        except ConfigError as error:
            in_file: list[tuple[places.Place, ConfigError]] = []
            for problem in error.problems or (error,):
                key = problem.key or ""
                section, _, name = key.partition(".")
                table = given.get(section)
                overridden = name in table if isinstance(table, Mapping) else section in given
                if overridden or file is None:
                    found.append(problem.under(spelled.get(key, key)))
                else:
                    in_file.append(file.locate(problem))
            found += [problem for _, problem in sorted(in_file, key=lambda each: each[0])]
        if config is None or found:
            raise _one_error(found)
        return config


class _File(NamedTuple):
    """A file that was read, for messages about it."""

    name: str
    text: str

    def locate(self, problem: ConfigError) -> tuple[places.Place, ConfigError]:
        """Where a problem stands, and the problem with its place and its line."""
        key = problem.key or ""
        entry = places.entries(self.text).get(key)
        if entry is None:
            return places.Place(0, 0, 0), problem.at(self.name)
        # A key that is unknown was asked for by its name; of any other the value is wrong.
        place = entry.key if problem.asked == key.rpartition(".")[2] else entry.value
        return place, self.at(place, problem)

    def at(self, place: places.Place, problem: ConfigError) -> ConfigError:
        return problem.at(
            f"{self.name}:{place.line}:{place.column}", places.excerpt(self.text, place)
        )


def _default_sinks(page: int) -> int:
    return -(-_LEAST_SINKS // page) * page


def _write(below: int, above: int) -> str:
    return f"Write {below}." if below == above else f"Write {below} or {above}."


def _nearest(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name."""
    known = list(known)
    if not known:
        return "This section has no keys yet: leave it out."
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(known)}."


def _tables(config: object) -> tuple[dict[str, Any], _File | None]:
    """The tables that were given, and the file that they come from."""
    if config is None:
        return {}, None
    if isinstance(config, OffloadConfig):
        return _explicit(config), None
    if isinstance(config, Mapping):
        return {str(name): _plain(value) for name, value in config.items()}, None
    if isinstance(config, Path) or (isinstance(config, str) and _is_file_name(config)):
        return _load(Path(config))
    if isinstance(config, str):
        try:
            return tomllib.loads(config), None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"The configuration is not TOML: {error}",
                asked=_abridged(config),
                change="Give the name of a file, which ends in .toml, or lines like "
                'memory.gpu = "20GiB".',
            ) from None
    raise ConfigError(
        f"A configuration cannot be read from a {type(config).__name__}",
        asked=type(config).__name__,
        change="Give an OffloadConfig, a path, TOML text or a dict.",
    )


def _is_file_name(text: str) -> bool:
    return "\n" not in text and "\0" not in text and (text.endswith(".toml") or _exists(text))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a file name; a home that is not there
        return False


def _load(path: Path) -> tuple[dict[str, Any], _File]:
    file = _File(str(path), _text(path))
    try:
        return tomllib.loads(file.text), file
    except tomllib.TOMLDecodeError:
        raise _one_error(_mistakes(file)) from None


def _mistakes(file: _File) -> list[ConfigError]:
    """What is wrong with a file that is not TOML: each of its lines, and what the others say.

    A line is left out to read on only where it is a key with a value and wrong by itself: what stands behind a
    header or within an array that never ends means something else without it.
    """
    found: list[tuple[places.Place, ConfigError]] = []
    lines = file.text.split("\n")
    data = None
    while data is None:
        text = "\n".join(lines)
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            what, place = places.place_of_mistake(str(error), text)
            line = lines[place.line - 1] if place.line <= len(lines) else ""
            is_assignment = _ASSIGNMENT.match(line) is not None
            if is_assignment and line.count('"') % 2:
                what = "a quote is missing"
            found.append((place, file.at(place, _not_toml(what, is_assignment=is_assignment))))
            if not (is_assignment and _is_wrong_by_itself(line)):
                break
            lines[place.line - 1] = ""
    try:
        OffloadConfig(**(data or {}))
    except ConfigError as error:
        rest = file._replace(text="\n".join(lines))
        found += [rest.locate(problem) for problem in error.problems or (error,)]
    return [problem for _, problem in sorted(found, key=lambda each: each[0])]


def _is_wrong_by_itself(line: str) -> bool:
    try:
        tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return True
    return False


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "No such file",
            key=str(path),
            asked=str(path),
            change="Write one with: offload config init.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The file cannot be read: {error.strerror}",
            key=str(path),
            asked=str(path),
            change="Give the path of a TOML file.",
        ) from error
    except UnicodeDecodeError as error:
        raise _not_toml(str(error)).at(str(path)) from None


def _not_toml(what: str, *, is_assignment: bool = False) -> ConfigError:
    change = 'Write tables and keys, for example [memory], then gpu = "20GiB".'
    if is_assignment:
        change = 'Write one value, text between two quotes, for example gpu = "20GiB".'
    return ConfigError(f"This is not TOML: {what}", change=change)


def _abridged(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}..."


def _explicit(table: _Table) -> dict[str, Any]:
    """What was set in it, without the defaults."""
    return {name: _plain(getattr(table, name)) for name in table.model_fields_set}


def _plain(value: Any) -> Any:
    """A section as a dict of its own, whichever way it was given; any other value as it is."""
    if isinstance(value, _Table):
        return _explicit(value)
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value


def _nest(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigError]]:
    """Overrides as tables, and one problem for each name that is unknown or given twice."""
    tables = {n: _plain(v) for n, v in overrides.items() if n in OffloadConfig.model_fields}
    problems: list[ConfigError] = []
    for name, value in overrides.items():
        if name in OffloadConfig.model_fields:
            continue
        if name not in OffloadConfig.SHORT_NAMES:
            known = [*OffloadConfig.SHORT_NAMES, *OffloadConfig.model_fields]
            problems.append(
                ConfigError("unknown setting", key=name, asked=name, change=_nearest(name, known))
            )
            continue
        section, _, key = OffloadConfig.SHORT_NAMES[name].partition(".")
        table = tables.setdefault(section, {})
        if not isinstance(table, dict):
            continue  # wrong itself, and reported as such
        if key in table:
            problems.append(
                ConfigError(
                    f"given a second time as {section}.{key}",
                    key=name,
                    asked=value,
                    there=table[key],
                    change="Leave one of the two out.",
                )
            )
            continue
        table[key] = value
    return tables, problems


def _problems(error: ValidationError, table: type[_Table]) -> list[ConfigError]:
    """What pydantic found, in our words, one error for each key."""
    found: list[ConfigError] = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"][:2])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            nested = cause.problems or (cause,)
            found += [p.under(f"{key}.{p.key}" if p.key else key) for p in nested]
        elif detail["type"] != "default_factory_not_called":  # page is wrong, and reported
            found.append(_translated(detail, key, table))
    return found


def _translated(detail: ErrorDetails, key: str, table: type[_Table]) -> ConfigError:
    asked = detail["input"]
    kind = detail["type"]
    name = str(detail["loc"][-1])
    if kind == "extra_forbidden":
        known = list(table.model_fields)
        section = isinstance(asked, Mapping) and table is OffloadConfig
        what = "unknown section" if section else "unknown key"
        return ConfigError(what, key=key, asked=name, change=_nearest(name, known))
    if kind == "literal_error":
        expected = str(detail.get("ctx", {}).get("expected", "")).replace("'", '"')
        return ConfigError(
            f"{asked!r} is not one of its values", key=key, asked=asked, change=f"Write {expected}."
        )
    if kind == "bool_type":
        return ConfigError(
            f"{asked!r} is not a switch", key=key, asked=asked, change="Write true or false."
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return ConfigError(
            f"{asked!r} is not a table",
            key=key,
            asked=asked,
            change=f"Write [{key}] on a line of its own, and its keys below.",
        )
    return ConfigError(f"{detail['msg'].lower()}: {asked!r}", key=key, asked=asked)


def _one_error(problems: list[ConfigError]) -> ConfigError:
    """One problem is the error itself; several are listed under one."""
    if len(problems) == 1:
        return problems[0]
    return ConfigError(f"{len(problems)} settings cannot be used", problems=problems)


def _settings(table: _Table, prefix: str = "") -> Iterator[Setting]:
    values, defaults = table.model_dump(), type(table)().model_dump()
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, _Table):
            yield from _settings(value, f"{prefix}{name}.")
            continue
        yield Setting(
            key=f"{prefix}{name}",
            value=values[name],
            default=defaults[name],
            is_set=name in table.model_fields_set,
            unit=_unit_of(field),
            description=field.description or "",
        )


def _unit_of(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""


def _assignment(key: str, value: str | int | bool) -> str:
    # A JSON string, number or boolean is also a TOML one.
    return f"{key.rpartition('.')[2]} = {json.dumps(value)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 96)]


def _toml(settings: Iterable[Setting], entry: Callable[[Setting], list[str]]) -> str:
    """The keys under the headers of their sections; `entry` writes the lines of one key."""
    lines: list[str] = []
    open_section = ""
    for setting in settings:
        section = setting.key.rpartition(".")[0]
        if section != open_section:
            lines += ["", f"[{section}]"]
            open_section = section
        lines += entry(setting)
    return "\n".join(lines).strip("\n") + "\n"
