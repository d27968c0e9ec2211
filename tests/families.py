"""Which tiny random models stand for the families of transformers in the tests.

Each entry of `FAMILIES` builds, from a fixed seed and without a download, a model small enough for
one core whose greedy tokens vary from step to step. `REFUSED` holds models that attaching must
refuse. Configs and their settings are those of transformers 5.17 and later (`transformers/models`).

The seeds are such that, with the stock cache of transformers 5.17.0 and of 5.23.0, on
`prompts(1, 430)` and on `left_padded(2, 430)`:

- each row of 24 greedy tokens has at least 12 different ones;
- the two best logits are never nearer than 5e-3 (float32 and float64 differ by some 1e-5);
- noise of 1e-5 on all weights changes no token, of greedy search or of 3 beams;
- other prompt tokens at 100 to 199 change most of the output, unless every layer slides.

After a change of settings the seed has to be searched anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel

from offload.kinds import SINCE

VOCAB = 128
"""Entries of every vocabulary here, the padding token included."""

PAD = 0
"""Id of the padding token of every model here."""

WINDOW = 32
"""Tokens that a sliding layer of these models sees: far fewer than a prompt of the tests has."""

TIERS: dict[str, Any] = {"mode": "exact", "page": 16, "sinks": 16, "window": 64}
"""Settings under which a prompt of the tests is on both tiers, and streamed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A tiny model, and what a test has to know about its family.

    Attributes:
        name: The key in its table.
        build: Makes the model anew: float32 on the CPU, eval mode, `stock_attention` already set,
            the same weights on every call with one version of transformers. Leaves torch's global
            generator as it was.
        stock_attention: The attention that the stock comparator must use: "eager" where sdpa lacks
            a term of the family (the soft cap of gemma2, the sinks of gpt_oss).
        hybrid: Some layers keep a recurrent or convolution state.
        chunkable: A forward of several tokens goes on from the state in the cache, as a prefill in
            chunks needs. False for jamba: its Mamba-1 scan starts at zero in every such forward
            (transformers 5.17.0 to 5.23.0, with the stock cache too).
        full_layers: Indices, ascending, of the layers whose keys and values grow with the sequence.
            Empty if every layer slides.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    stock_attention: Literal["sdpa", "eager"] = "sdpa"
    hybrid: bool = False
    chunkable: bool = True
    full_layers: tuple[int, ...] = ()


def prompts(batch: int, length: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Draws random token ids, none of which is the padding token.

    Args:
        batch: Rows.
        length: Tokens a row.
        vocab: The ids lie in [1, vocab).
        seed: The same arguments give the same ids.

    Returns:
        [batch, length], int64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PAD + 1, vocab, (batch, length), generator=generator)


def left_padded(
    batch: int,
    length: int,
    vocab: int = VOCAB,
    seed: int = 0,
    pads: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws random prompts of different lengths, padded on the left to one length.

    Args:
        batch: Rows.
        length: Tokens a row, padding included.
        vocab: The ids of the prompts lie in [1, vocab).
        seed: The same arguments give the same ids: those of `prompts`, where they are not padding.
        pads: Padding tokens of each row; by default 0, 37, 74 ... (a batch from a tokenizer has a
            row without any, and no page or chunk is a multiple of 37).

    Returns:
        The ids and the attention mask (0 on padding): both [batch, length], int64, on the CPU.

    Raises:
        ValueError: `pads` has another number of rows, or would leave a row without a token.
    """
    counts = tuple(37 * row for row in range(batch)) if pads is None else tuple(pads)
    if len(counts) != batch or not all(0 <= count < length for count in counts):
        raise ValueError(f"pads {counts} do not fit {batch} rows of {length} tokens")
    ids = prompts(batch, length, vocab, seed)
    mask = (torch.arange(length) >= torch.tensor(counts)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def _build(
    stem: str,
    config_stem: str,
    model_suffix: str,
    attention: str,
    seed: int,
    settings: dict[str, Any],
) -> PreTrainedModel:
    config = getattr(transformers, f"{config_stem}Config")(
        vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None, eos_token_id=None, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{stem}{model_suffix}")(config)
    model.set_attn_implementation(attention)
    # Without an end token every run has the length it asks for.
    model.generation_config = GenerationConfig(
        pad_token_id=PAD,
        eos_token_id=None,
        bos_token_id=None,
        decoder_start_token_id=PAD if config.is_encoder_decoder else None,
    )
    model.float().eval()
    return model


def _family(
    name: str,
    stem: str,
    *,
    config_stem: str | None = None,
    model_suffix: str = "ForCausalLM",
    stock_attention: Literal["sdpa", "eager"] = "sdpa",
    hybrid: bool = False,
    chunkable: bool = True,
    full_layers: tuple[int, ...] = (0, 1),
    seed: int = 0,
    **settings: Any,
) -> Family:
    build = partial(
        _build, stem, config_stem or stem, model_suffix, stock_attention, seed, settings
    )
    return Family(
        name=name,
        build=build,
        stock_attention=stock_attention,
        hybrid=hybrid,
        chunkable=chunkable,
        full_layers=full_layers,
    )


# Queries and keys of std 1.6 give scores of std 2.6: sharp enough that lost tokens change the
# output, soft enough that many tokens take part.
_INIT: dict[str, Any] = {"initializer_range": 0.2}
_ATTENTION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,  # a tied head would mostly repeat its input
    **_INIT,
}
_DENSE: dict[str, Any] = {"num_hidden_layers": 2, **_ATTENTION}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
# The scan of nemotron_h and zamba2 clamps time steps to this minimum, their one-token step does
# not: at the default of 1e-3, a last token fed alone moved the logits of zamba2 by up to 0.05.
_TIME_STEP_MIN = 1e-6
_GATED_DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SLIDING_FIRST = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_FULL_OF_FOUR = (1, 3)


def _table(*families: Family) -> dict[str, Family]:
    table = {family.name: family for family in families}
    assert len(table) == len(families), "two families share a name"
    return table


FAMILIES: dict[str, Family] = _table(
    _family("llama", "Llama", seed=0, **_DENSE),
    _family("qwen2", "Qwen2", seed=100, use_sliding_window=False, **_DENSE),
    _family(
        "qwen2_sliding",
        "Qwen2",
        seed=205,
        full_layers=(0, 2),
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_SLIDING_FIRST[::-1],
        num_hidden_layers=4,
        **_ATTENTION,
    ),
    _family("qwen3", "Qwen3", seed=303, head_dim=16, **_DENSE),
    _family("mistral", "Mistral", seed=401, sliding_window=None, **_DENSE),
    _family(
        "mistral_sliding", "Mistral", seed=501, full_layers=(), sliding_window=WINDOW, **_DENSE
    ),
    _family("phi3", "Phi3", seed=601, sliding_window=None, **_DENSE),
    _family(
        "gemma2",
        "Gemma2",
        seed=701,
        stock_attention="eager",
        full_layers=_FULL_OF_FOUR,
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,  # two standard deviations of the scores: the cap matters
        **_ATTENTION,
    ),
    _family(
        "gemma3",
        "Gemma3",
        seed=803,
        config_stem="Gemma3Text",
        full_layers=_FULL_OF_FOUR,
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        **_ATTENTION,
    ),
    # Without the layers that share keys, which are refused below; full layers have a head size of their own.
    _family(
        "gemma4",
        "Gemma4",
        seed=853,
        config_stem="Gemma4Text",
        full_layers=_FULL_OF_FOUR,
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        num_kv_shared_layers=0,
        head_dim=16,
        global_head_dim=32,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        **_ATTENTION,
    ),
    _family(
        "hrm_text",
        "HrmText",
        seed=875,
        full_layers=(0, 1, 2, 3),
        num_hidden_layers=1,
        H_cycles=2,
        L_cycles=1,
        head_dim=16,
        **(_ATTENTION | {"num_key_value_heads": 4}),
    ),
    _family(
        "gpt2",
        "GPT2",
        seed=901,
        model_suffix="LMHeadModel",
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=2048,
        tie_word_embeddings=False,
        **_INIT,
    ),
    _family(
        "gptj",
        "GPTJ",
        seed=951,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=2048,
        rotary_dim=8,
        tie_word_embeddings=False,
        **_INIT,
    ),
    _family(
        "codegen",
        "CodeGen",
        seed=961,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=2048,
        n_ctx=2048,
        rotary_dim=8,
        tie_word_embeddings=False,
        **_INIT,
    ),
    _family(
        "opt",
        "OPT",
        seed=1000,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        init_std=0.2,
    ),
    _family(
        "gpt_neox",
        "GPTNeoX",
        seed=1102,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        **_INIT,
    ),
    _family(
        "mixtral",
        "Mixtral",
        seed=1201,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        **_DENSE,
    ),
    _family(
        "gpt_oss",
        "GptOss",
        seed=1302,
        stock_attention="eager",
        full_layers=_FULL_OF_FOUR,
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **_ATTENTION,
    ),
    _family(
        "qwen3_next",
        "Qwen3Next",
        seed=1400,
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        layer_types=_LINEAR_FIRST,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **_GATED_DELTA,
        **_ATTENTION,
    ),
    _family(
        "qwen3_5",
        "Qwen3_5",
        seed=1502,
        config_stem="Qwen3_5Text",
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        layer_types=_LINEAR_FIRST,
        num_hidden_layers=4,
        **_GATED_DELTA,
        **_ATTENTION,
    ),
    _family(
        "bamba",
        "Bamba",
        seed=1601,
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        attn_layer_indices=list(_FULL_OF_FOUR),
        num_hidden_layers=4,
        **_MAMBA2,
        **_ATTENTION,
    ),
    _family(
        "falcon_h1",
        "FalconH1",
        seed=1703,
        hybrid=True,
        mamba_d_ssm=128,
        head_dim=16,
        **_MAMBA2,
        **_DENSE,
    ),
    _family(
        "nemotron_h",
        "NemotronH",
        seed=1802,
        hybrid=True,
        full_layers=(1, 4),
        layers_block_type=[
            "linear_attention",
            "full_attention",
            "mlp",
            "linear_attention",
            "full_attention",
        ],
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=64,
        time_step_min=_TIME_STEP_MIN,
        **_ATTENTION,
    ),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        seed=1903,
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        layer_types=_LINEAR_FIRST,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        attention_multiplier=0.25,
        position_embedding_type="rope",
        **_MAMBA2,
        **_ATTENTION,
    ),
    _family(
        "zamba2",
        "Zamba2",
        seed=2001,
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        num_hidden_layers=4,
        n_mamba_heads=4,
        mamba_d_state=16,
        chunk_size=64,
        use_mem_rope=True,
        time_step_min=_TIME_STEP_MIN,
        **(_ATTENTION | {"num_key_value_heads": 4}),  # the shared block has no grouped heads
    ),
    _family(
        "jamba",
        "Jamba",
        seed=2101,
        hybrid=True,
        chunkable=False,
        full_layers=_FULL_OF_FOUR,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        mamba_d_state=8,
        **_ATTENTION,
    ),
    _family(
        "lfm2",
        "Lfm2",
        seed=2201,
        hybrid=True,
        full_layers=_FULL_OF_FOUR,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        num_hidden_layers=4,
        block_auto_adjust_ff_dim=False,
        **_ATTENTION,
    ),
)
"""Models whose greedy tokens must equal those of the stock cache."""

if Version(transformers.__version__) < Version("5.24"):
    for _name in sorted(set(SINCE) & set(FAMILIES)):
        FAMILIES.pop(_name)

REFUSED: dict[str, Family] = _table(
    # Latent attention: keys and values are computed from what the cache returned.
    _family(
        "deepseek_v3",
        "DeepseekV3",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        **(_DENSE | {"num_key_value_heads": 4}),
    ),
    # Differential attention: the values are rearranged after the update.
    _family("diffllama", "DiffLlama", **_DENSE),
    # Shared keys and values: the last two layers attend without an update, to the cache of others.
    _family(
        "gemma3n",
        "Gemma3n",
        config_stem="Gemma3nText",
        full_layers=(1,),
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=16,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        **_ATTENTION,
    ),
    _family(
        "gemma4",
        "Gemma4",
        config_stem="Gemma4Text",
        full_layers=(1,),
        layer_types=_SLIDING_FIRST,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=16,
        global_head_dim=16,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        **_ATTENTION,
    ),
    # An encoder-decoder with a position bias on its scores.
    _family(
        "t5",
        "T5",
        model_suffix="ForConditionalGeneration",
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
    ),
    # No attention, hence nothing to offload.
    _family(
        "mamba",
        "Mamba",
        stock_attention="eager",
        full_layers=(),
        hybrid=True,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
        **_INIT,
    ),
)
"""Models that attaching must refuse."""
