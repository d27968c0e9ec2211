"""What does a call of generate ask for, and what of it does the cache hold already?

The mask, the positions and the generation config are made by transformers' own helpers, so that our prefill feeds
exactly what its loop would have fed.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from offload.cache import CACHE_NAMES, OffloadCache, cache_in, unpadded
from offload.errors import CacheError, InputError

logger = logging.getLogger(__name__)

# Arguments of generate that would go past the cache or ask for what it does not have.
_REFUSED = {
    "cache_implementation": "The runtime brings its own cache; call model.generate for a stock one.",
    "custom_generate": "It replaces the decoding loop.",
    "prefill_chunk_size": "Set prefill.chunk of the configuration instead: attach(model, chunk=...).",
    "penalty_alpha": "Contrastive search is not supported.",
    "dola_layers": "DoLa decoding is not supported.",
    "output_attentions": "Attention weights are never made.",
    "token_healing": "It changes the prompt after that was read.",
}
# Arguments that transformers takes out of **kwargs itself, before the model sees them.
_LOOP_ONLY = ("tokenizer", "assistant_tokenizer")
# Inputs that are as long as the prompt or do not depend on its tokens. Others belong to the first forward pass
# (images, audio) and cannot be cut into chunks.
_TEXT_INPUTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "use_cache",
        *CACHE_NAMES,
        "logits_to_keep",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as transformers would feed it.

    Attributes:
        input_ids: [B, N].
        attention_mask: [B, N], or None where nothing is padding.
        model_kwargs: What else goes to `prepare_inputs_for_generation`; position_ids where the model takes
            them.
        generation: The merged generation config.
        is_plain: Whether tokens come one by one, by greedy search or sampling, and nothing but tokens is returned.
        is_assisted: Whether candidates come from an assistant, from the prompt, or from the model's first layers.
        in_chunks: Whether it may be read in chunks. Not with images or other inputs of the first pass.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    model_kwargs: dict[str, Any]
    generation: Any
    is_plain: bool
    is_assisted: bool
    in_chunks: bool

    @property
    def copies(self) -> int:
        """Sequences that continue each row: beams or returned sequences."""
        config = self.generation
        return int(max(config.num_beams or 1, config.num_return_sequences or 1))

    @property
    def is_beams(self) -> bool:
        """Whether beams are searched."""
        return int(self.generation.num_beams or 1) > 1

    @property
    def known_ids(self) -> Tensor:
        """The tokens as a cache knows them: -1 where they are padding."""
        return unpadded(self.input_ids, self.attention_mask)

    @property
    def final_length(self) -> int:
        """Tokens per sequence at the end, at most."""
        n_prompt = self.input_ids.shape[1]
        if self.generation.max_new_tokens is not None:
            return n_prompt + int(self.generation.max_new_tokens)
        if self.generation.max_length is not None:
            return max(n_prompt + 1, int(self.generation.max_length))
        return n_prompt + 20  # transformers' own default


def read_prompt(model: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> Prompt:
    """The prompt of a call of generate.

    Args:
        model: The transformers model.
        inputs: Token ids, or None where kwargs has them.
        kwargs: The keyword arguments of the call.

    Raises:
        InputError: An argument that is not supported or not known, an empty prompt, a mask of another shape, or
            padding on the right.
    """
    given = kwargs.get("input_ids") if inputs is None else inputs
    if given is not None and not (isinstance(given, Tensor) and not given.is_floating_point()):
        raise InputError(
            "The prompt is not a tensor of token ids",
            asked=type(given).__name__,
            there="token ids [sequences, tokens]",
            change='Pass **tokenizer(text, return_tensors="pt").',
        )
    generation, model_kwargs = check_arguments(model, kwargs)
    ids, name, model_kwargs = model._prepare_model_inputs(
        inputs, generation.bos_token_id, model_kwargs
    )
    if name != "input_ids" or ids.dim() != 2 or 0 in ids.shape:
        raise InputError(
            "The prompt is empty" if 0 in ids.shape else "The prompt has another shape",
            asked=tuple(ids.shape),
            there="token ids [sequences, tokens]",
            change="Pass at least one token.",
        )
    mask = model_kwargs.pop("attention_mask", None)
    model._prepare_special_tokens(
        generation, mask is not None, device=ids.device, batch_size=ids.shape[0]
    )
    if mask is None:
        mask = model._prepare_attention_mask_for_generation(ids, generation, dict(model_kwargs))
    if mask.shape != ids.shape:
        raise InputError(
            "attention_mask and prompt differ in shape",
            asked=tuple(mask.shape),
            there=tuple(ids.shape),
            change="Pass the whole conversation and a mask over all of it.",
        )
    if bool((mask[:, -1] == 0).any()):
        raise InputError(
            "The prompt is padded on the right",
            asked="attention_mask that ends in 0",
            there="decoding goes on at the right end",
            change='Set tokenizer.padding_side = "left".',
        )
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if takes_positions and model_kwargs.get("position_ids") is None:
        model_kwargs["position_ids"] = model._prepare_position_ids_for_generation(
            ids, model_kwargs | {"attention_mask": mask}
        )
    mode = _check_loop(model, ids, generation, model_kwargs, kwargs)
    in_chunks = not any(
        isinstance(value, Tensor) and key not in _TEXT_INPUTS for key, value in model_kwargs.items()
    )
    for key in ("use_cache", *CACHE_NAMES):
        model_kwargs.pop(key, None)
    return Prompt(
        input_ids=ids,
        attention_mask=mask if bool((mask == 0).any()) else None,
        model_kwargs=model_kwargs,
        generation=generation,
        is_plain=mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and not generation.return_dict_in_generate
        and not generation.stop_strings  # transformers passes no tokenizer on to a loop of one's own
        and not kwargs.get("synced_gpus"),
        is_assisted=mode == GenerationMode.ASSISTED_GENERATION,
        in_chunks=in_chunks,
    )


def check_arguments(model: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Checks the arguments of a call, before anything is read.

    Args:
        model: The transformers model.
        kwargs: The keyword arguments of the call.

    Returns:
        The merged generation config, and what goes to the model.

    Raises:
        InputError: An argument that is not supported or not known, or padding on the right.
    """
    own = set(inspect.signature(model.generate).parameters) - {"inputs", "kwargs"}
    for_config = {k: v for k, v in kwargs.items() if k not in own and k not in _LOOP_ONLY}
    for name in CACHE_NAMES:
        for_config.pop(name, None)
    generation, model_kwargs = model._prepare_generation_config(
        kwargs.get("generation_config"), **for_config
    )
    _refuse(kwargs, generation)
    _check_names(model, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool((mask[:, -1:] == 0).any()):
        raise InputError(
            "The prompt is padded on the right",
            asked="attention_mask that ends in 0",
            there="decoding goes on at the right end",
            change='Set tokenizer.padding_side = "left".',
        )
    return generation, model_kwargs


def _refuse(kwargs: dict[str, Any], generation: Any) -> None:
    for name, reason in _REFUSED.items():
        value = kwargs.get(name)
        if value is None:
            value = getattr(generation, name, None)
        if value is not None and value is not False:
            raise InputError(f"generate cannot take {name}", asked=value, there=None, change=reason)
    if generation.use_cache is False:
        raise InputError(
            "generate cannot run without a cache: use_cache is False",
            asked=None,
            there=None,
            change="Leave use_cache out, or set model.generation_config.use_cache = True.",
        )


def _check_names(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Finds a misspelled argument before the prompt is read, not after it."""
    try:
        model._validate_model_kwargs(dict(model_kwargs))
    except ValueError as error:
        known = [*inspect.signature(model.generate).parameters, *vars(model.generation_config)]
        near = [m for k in model_kwargs for m in difflib.get_close_matches(k, known, n=1)]
        raise InputError(
            str(error).rstrip("."), change=f"Did you mean {near[0]}?" if near else None
        ) from error


def _check_loop(
    model: Any,
    ids: Tensor,
    generation: Any,
    model_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> GenerationMode:
    """Lets transformers refuse now what its loop would refuse after the prompt was read.

    Returns:
        Which loop it will be.
    """
    asked = {
        k: kwargs[k]
        for k in ("assistant_model", "streamer", *_LOOP_ONLY)
        if kwargs.get(k) is not None
    }
    mode: GenerationMode = generation.get_generation_mode(asked.get("assistant_model"))
    model._validate_generation_mode(mode, generation, asked)
    model._get_logits_processor(
        generation_config=generation,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        prefix_allowed_tokens_fn=kwargs.get("prefix_allowed_tokens_fn"),
        logits_processor=kwargs.get("logits_processor") or LogitsProcessorList(),
        device=ids.device,
        model_kwargs=dict(model_kwargs),
        negative_prompt_ids=kwargs.get("negative_prompt_ids"),
        negative_prompt_attention_mask=kwargs.get("negative_prompt_attention_mask"),
    )
    model._get_stopping_criteria(
        generation_config=generation,
        stopping_criteria=kwargs.get("stopping_criteria") or StoppingCriteriaList(),
        tokenizer=asked.get("tokenizer"),
    )
    too_short = generation.max_new_tokens is None and generation.max_length is not None
    if too_short and generation.max_length <= ids.shape[1]:
        raise InputError(
            "The prompt alone is as long as max_length allows",
            asked=ids.shape[1],
            there=generation.max_length,
            change="Set max_new_tokens instead.",
        )
    if mode == GenerationMode.ASSISTED_GENERATION and ids.shape[0] > 1:
        raise InputError(
            "Assisted decoding takes one sequence",
            asked=ids.shape[0],
            there=1,
            change="Leave the assistant or prompt_lookup_num_tokens out, or pass one prompt at a time.",
        )
    return mode


def reuse(cache: OffloadCache, prompt: Prompt) -> None:
    """Makes a used cache hold a prefix of the prompt; forgets what the prompt does not begin with.

    Args:
        cache: A cache of this model.
        prompt: The prompt.

    Raises:
        CacheError: It holds another number of sequences.
        InputError: The prompt is not longer than an unknown past, or differs where a state cannot go back.
    """
    cache.settle()  # a stock generate may have been interrupted
    cache.require_open()
    past, ids = cache.get_seq_length(), prompt.known_ids
    if past == 0:
        return
    keep = min(past, ids.shape[1] - 1)
    known = cache.token_ids
    if known is not None:
        if known.shape[0] != ids.shape[0]:
            raise CacheError(
                "The cache holds another number of sequences",
                asked=ids.shape[0],
                there=known.shape[0],
                change="Make a new cache: runtime.new_cache().",
            )
        n = min(keep, known.shape[1])
        now = ids[:, :n].cpu()
        # Padding up to the end of what is held (a row that ended early): no later token has seen what it hides.
        hidden = (now == -1).flip(1).cumprod(dim=1).flip(1).bool()
        differ = ((known[:, :n] != now) & ~hidden).any(dim=0)
        keep = int(differ.int().argmax()) if bool(differ.any()) else n
    elif past >= ids.shape[1]:
        raise InputError(
            "The prompt is not longer than what the cache holds",
            asked=ids.shape[1],
            there=past,
            change="Pass the whole conversation, earlier turns included.",
        )
    else:
        logger.warning(
            "Which %d tokens the cache holds is not known (it was filled without token ids): they are taken for "
            "the first ones of this prompt.",
            past,
        )
    if keep < past:
        keep = cache.croppable(keep)
        if not cache.can_go_back(past - keep):
            raise InputError(
                "The prompt (or its padding) does not begin as the cache does, whose recurrent states or "
                "sliding windows cannot go back",
                asked=f"{keep:,} tokens in common",
                there=f"{past:,} tokens in the cache",
                change="Pass a new cache.",
            )
        logger.info("The prompt shares %d of %d cached tokens; the rest is read anew.", keep, past)
        cache.crop(keep - past)
    cache.relabel(ids[:, :keep])


@contextmanager
def first_forward_skips_cached(model: Any, cache: OffloadCache) -> Iterator[None]:
    """Cuts the tokens that the cache holds off the first forward pass over it inside the block.

    Assisted decoding (transformers 5.17 to 5.23) feeds the whole prompt in its first step even to a warm cache,
    stock ones too, and its tokens are then wrong.
    """

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cache_in(kwargs) is not cache:
            return None
        hook.remove()
        past, ids = cache.get_seq_length(), kwargs["input_ids"]
        if past and ids.shape[1] > past:
            positions = kwargs.get("position_ids")
            if positions is not None and positions.shape[-1] == ids.shape[1]:
                kwargs["position_ids"] = positions[..., past:]
            kwargs["input_ids"] = ids[:, past:]
        return args, kwargs

    # First, so that whoever listens to the tokens of a pass hears of those that it really feeds.
    hook = model.register_forward_pre_hook(cut, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
