"""Which kinds of model are refused, and why? By their names, before anything of them is loaded."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

LATENT = "its cache holds compressed (latent) keys that are expanded before attention"
_INDEXED = "a trained indexer chooses the keys that each query sees"
SHARED = "layers attend to the keys of other layers"
_NO_KEYS = "it keeps a recurrent state and no keys"
OWN_ATTENTION = (
    "its attention is not replaceable (it does not ask transformers' AttentionInterface)"
)
_OWN_CACHE = "it needs cache layers of its own"
_CHANGED = "it changes keys or values between cache and attention"
_MASK = "its mask is not causal: tokens of an image see each other"
_DIFFERS = "its tokens were seen to differ from the stock cache's"
_POSITION_BIAS = "its attention adds a learned position bias"


def _because(reason: str, *model_types: str) -> dict[str, str]:
    return dict.fromkeys(model_types, reason)


# model_type -> why its tokens would come out wrong, or why there is nothing to offload. Names as in transformers
# 5.17 to 5.23; a composite model is looked up by its text part too. What is not listed is still examined.
REFUSED: dict[str, str] = {
    **_because(
        LATENT,
        "deepseek_v2", "deepseek_v3", "axk1", "bailing_hybrid", "glm4_moe_lite", "kimi_linear", "kimi_k25",
        "longcat_flash", "minicpm3", "mistral4", "mistral_large4", "mistral_large4_text", "youtu",
    ),
    **_because(
        _INDEXED,
        "axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", "glm5_next_text", "dots3_note_text",
        "qwen4_exp_text", "minimax_m3_vl_text", "step3p5",
    ),
    **_because(_OWN_CACHE, "deepseek_v4", "minimax", "unlimited_ocr_text", "zaya", "dory"),
    **_because(_CHANGED, "diffllama", "doge", "jetmoe", "idefics", "moonshine", "moonshine_streaming"),
    **_because(
        SHARED,
        "mllama_text_model", "gemma3n", "gemma3n_text", "gemma4_assistant", "gemma4_unified_assistant", "diffusion_gemma_text",
    ),
    **_because(_MASK, "gemma4_unified"),
    **_because(_DIFFERS, "moshi"),
    **_because(_POSITION_BIAS, "inkling_text", "inkling2_text"),
    **_because(
        _NO_KEYS, "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma",
    ),
    **_because(
        OWN_ATTENTION,
        "bloom", "falcon", "gpt_neo", "gpt_neox_japanese", "mpt", "xglm", "openai-gpt",
        "xlm", "xlnet", "cpmant", "imagegpt", "reformer", "trocr", "big_bird", "rembert", "roformer",
        "megatron-bert", "git", "semantic", "coarse_acoustics",
    ),
}  # fmt: skip

# Kinds whose attention or cache older versions of transformers have in another way, and since when they run.
SINCE: dict[str, tuple[int, int]] = dict.fromkeys(
    ("gptj", "codegen", "gemma4", "gemma4_text", "gemma4_unified_text", "hrm_text"), (5, 24)
)  # fmt: skip


def refusal(model_type: str) -> str | None:
    """Why a kind is refused, by the table and the version of transformers that is installed; None where it is not."""
    since = SINCE.get(model_type)
    if since is not None and _transformers() < since:
        return f"it runs on transformers {since[0]}.{since[1]} and later"
    return REFUSED.get(model_type)


@cache
def _transformers() -> tuple[int, int]:
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


# Cache layers that are understood: ours take the place of the first two, the others stay as they are.
KNOWN_LAYERS = frozenset(
    {
        "full_attention", "hybrid", "sliding_attention", "chunked_attention", "linear_attention", "conv",
        "moe", "mlp", "dummy", "mamba", "attention",
    }
)  # fmt: skip

# Families whose forward of several tokens ignores the recurrent state in the cache (stock transformers 5.17 to
# 5.23 too): a prompt in chunks would come out wrong, so it is fed whole, and to a warm cache token by token.
FED_WHOLE: dict[str, str] = {
    "jamba": "its Mamba-1 scan starts from zero in every forward pass of several tokens",
    "zamba": "its Mamba-1 scan starts from zero in every forward pass of several tokens",
}
