from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import CONFIGS, HEAD_DIM, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma4TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from still import StillCompactor, read
from still.rope import Rotary, full_attention_layers, rotate, unrotate

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def attention_of(model, layer):
    return model.get_decoder().layers[layer].self_attn


@pytest.mark.parametrize("kind", CONFIGS)
def test_our_rotation_is_the_models(kind):
    model = tiny_model(kind)
    rotary, layer = Rotary.for_model(model), full_attention_layers(model.config)[0]
    theirs = sys.modules[type(attention_of(model, layer)).__module__].apply_rotary_pos_emb
    cos, sin = rotary.cos_sin(layer, torch.tensor([[0, 3, 40, 1500], [7, 8, 9, 4000]]))
    x = torch.randn(2, 3, 4, HEAD_DIM)
    torch.testing.assert_close(rotate(x, cos, sin), theirs(x, x, cos, sin)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_unrotated_keys_are_those_before_the_models_rotation(kind):
    model = tiny_model(kind)
    rotary, ids = Rotary.for_model(model), random_ids(2, 24)
    for layer in full_attention_layers(model.config):
        attention, seen = attention_of(model, layer), []
        last = getattr(attention, "k_norm", attention.k_proj)
        hook = last.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        cache = read(model, ids).cache
        hook.remove()
        before = seen[0]  # [2, 24, heads x dim], [2, 24, heads, dim] or, in Gemma, [2, heads, 24, dim]
        if before.shape[1] == 24:
            before = before.reshape(2, 24, -1, HEAD_DIM).transpose(1, 2)
        keys = cache.layers[layer].keys
        tables = rotary.cos_sin(layer, torch.arange(24))
        torch.testing.assert_close(unrotate(keys, *tables), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rotate(before, *tables), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("positions", [torch.arange(40), torch.tensor([[0.5, 2.25, 3.875], [17.5, 1000.1, 3999.9]])])
def test_unrotate_undoes_rotate(kind, positions):
    model = tiny_model(kind)
    rotary = Rotary.for_model(model)
    for layer in full_attention_layers(model.config):
        tables = rotary.cos_sin(layer, positions)
        x = torch.randn(2, 2, positions.shape[-1], HEAD_DIM)
        torch.testing.assert_close(unrotate(rotate(x, *tables), *tables), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(rotate(unrotate(x, *tables), *tables), x, rtol=0, atol=1e-5)


def test_yarn_scales_and_partial_rotary_leaves_the_rest():
    x = torch.randn(1, 1, 5, HEAD_DIM)
    turned = {kind: rotate(x, *Rotary.for_model(tiny_model(kind)).cos_sin(1, torch.arange(5))) for kind in CONFIGS}
    assert turned["yarn"].norm() > 1.05 * x.norm()
    assert torch.equal(turned["qwen3_next"][..., HEAD_DIM // 4 :], x[..., HEAD_DIM // 4 :])
    assert not torch.equal(turned["llama3"], turned["gemma3"])


def test_layers_have_their_own_base():
    rotary = Rotary.for_model(tiny_model("gemma3"))
    sliding, full = (rotary.cos_sin(layer, torch.arange(9))[0] for layer in (0, 1))
    assert not torch.allclose(sliding, full)


def test_half_precision_models_are_recognised():
    model = tiny_model("qwen3").bfloat16()
    assert Rotary.for_model(model).cos_sin(0, torch.arange(3))[0].dtype == torch.float32


UNSUPPORTED = {
    "interleaved pairs, partial": (GlmConfig(**SMALL, partial_rotary_factor=0.5), "split halves"),
    "interleaved pairs": (CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}), "split halves"),
    "full attention without rotation": (Cohere2Config(**SMALL, layer_types=["full_attention"] * 2), "split halves"),
    "some layers without rotation": (SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), "layer 1 of smollm3"),
    "other heads in the global layers": (
        Gemma4TextConfig(
            **SMALL, layer_types=["sliding_attention", "full_attention"], num_global_key_value_heads=1,
            global_head_dim=64, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        ),
        "layers of gemma4_text differ in num_key_value_heads",
    ),
    "heads without a number": (
        GPTNeoXConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        "gpt_neox has no num_key_value_heads",
    ),
    "learned positions": (GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=2), "no rotary_emb"),
    "dynamic": (
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic",
    ),
    "longrope": (
        Phi3Config(
            **SMALL,
            original_max_position_embeddings=64,
            max_position_embeddings=128,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
                "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64,
            },
        ),
        "longrope",
    ),
    "sliding windows only": (
        tiny_model("gemma3", layer_types=["sliding_attention"] * 4).config, "no full-attention layer",
    ),
    "linear attention only": (
        Qwen3NextConfig(**SMALL, layer_types=["linear_attention"] * 2, num_experts=0), "no full-attention layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_be_compacted_are_refused(name):
    config, reason = UNSUPPORTED[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=reason):
        StillCompactor.for_model(model, slots=4)
