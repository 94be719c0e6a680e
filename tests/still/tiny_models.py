"""Tiny random models of the families that the library is tried on: made offline, from seeds, head dimension 64."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCAB = 97
HEAD_DIM = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def qwen3_config(layers: int = 2, **overrides) -> Qwen3Config:
    """Grouped queries, qk-norm, plain RoPE."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen3Config(**{**COMMON, "num_hidden_layers": layers, "rope_parameters": rope, **overrides})


def llama_config(rope: dict = LLAMA3_ROPE, layers: int = 2, **overrides) -> LlamaConfig:
    """Llama with a scaled RoPE: `LLAMA3_ROPE`, or `YARN_ROPE`, whose attention factor is not 1."""
    return LlamaConfig(**{**COMMON, "num_hidden_layers": layers, "rope_parameters": dict(rope), **overrides})


def gemma3_config(window: int = 16, **overrides) -> Gemma3TextConfig:
    """Two sliding-window layers and two full-attention ones, each kind with its own RoPE base."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(
        **{
            **COMMON,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "sliding_window": window,
            "query_pre_attn_scalar": HEAD_DIM,
            "rope_parameters": {name: dict(rope) for name, rope in GEMMA3_ROPE.items()},
            **overrides,
        }
    )


def qwen3_next_config(**overrides) -> Qwen3NextConfig:
    """A hybrid: two gated linear-attention layers and two full-attention ones with partial rotary (a quarter)."""
    kinds = ["linear_attention", "full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}
    return Qwen3NextConfig(
        **{
            **COMMON,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
            "rope_parameters": rope,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 0,
            "mlp_only_layers": list(range(len(kinds))),
            **overrides,
        }
    )


CONFIGS = {
    "qwen3": qwen3_config,
    "llama3": llama_config,
    "yarn": lambda **overrides: llama_config(YARN_ROPE, **overrides),
    "gemma3": gemma3_config,
    "qwen3_next": qwen3_next_config,
}


def tiny_model(
    kind: str | PretrainedConfig = "qwen3", seed: int = 0, attention: str = "sdpa", spread: float = 4.0, **overrides
) -> PreTrainedModel:
    """A random model in fp32 eval mode whose attention is far from uniform.

    Args:
        kind: one of `CONFIGS`, or a configuration.
        seed: of the weights; the global generator is left as it was.
        attention: the attention implementation.
        spread: factor on the initial weights of the attention projections, so that what a token attends to matters
            to the logits (at the stock 0.02 every head averages its whole context). Logits have a spread near 1, and
            the special tokens 0 to 2 are never the likeliest.
        **overrides: fields of the configuration.
    """
    config = CONFIGS[kind](**overrides) if isinstance(kind, str) else kind
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "_proj" in name and weight.dim() == 2:
                    weight.mul_(spread)
                elif "embed_tokens" in name:
                    weight.normal_(std=0.1 if "gemma" in config.model_type else 1.0)
                elif "lm_head" in name:
                    weight.normal_(std=0.2)
                    weight[:3] = 0
    return model.float().eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without padding or special ones, the same for the same seed."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[tokens]` of unequal length as one left-padded batch: ids and attention mask, both `[rows, tokens]`."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask
