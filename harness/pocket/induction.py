"""An initialisation that can look things up before it has learned anything.

A transformer trained from scratch to answer from its context sits on a long plateau until two layers have agreed
on an induction circuit. Here the first two layers start as one: the first layer's heads write the tokens one, two
and three places back into subspaces of the residual stream, the second layer's heads match those against what
stands now, and copy. Training then begins at recall and only has to generalise, in minutes on two cores.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SHIFTS = (1, 2, 3, 1)
# (block of the keys, blocks of the two queries) for each KV head; block j holds the token j places back.
MATCHES = (((1, 0, 0), (3, 2, 1)), ((2, 1, 0), (3, 2, 1)), ((1, 0, 2), (2, 1, 3)))
FAST_PAIRS = 6  # rotary pairs that tell neighbours apart; slower ones blur them


def pocket_config(vocab_size: int, layers: int = 4) -> Qwen3Config:
    """The pocket's architecture: stock Qwen3, four query and two KV heads of 64, 3.3 million parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        # A large base leaves most dims unrotated over a matter, where contents are matched.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        attention_bias=True,
        initializer_range=0.0625,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


@torch.no_grad()
def induction_start(config: Qwen3Config, seed: int = 0) -> Qwen3ForCausalLM:
    """A fresh model whose first two layers form an induction circuit.

    Raises:
        ValueError: the shape leaves no room for four orthogonal blocks of one head's width.
    """
    width, dim = config.hidden_size, config.head_dim
    if width != 4 * dim or config.num_attention_heads != 4 or config.num_key_value_heads != 2:
        raise ValueError(f"the induction start needs 4 query heads, 2 KV heads and width 4 x {dim}, not {width}")
    if config.num_hidden_layers < 2:
        raise ValueError(f"the induction start needs two layers or more, not {config.num_hidden_layers}")
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed + 1)
    blocks = _orthogonal(width, generator).chunk(4)
    layers = model.model.layers
    _shift(layers[0].self_attn, blocks, config)
    for depth, layer in enumerate(layers[1:]):
        _match(layer.self_attn, blocks, MATCHES[depth % len(MATCHES)], generator, copy=0.3 if depth == 0 else 0.05)
    for layer in layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)  # a random feed-forward would drown the circuit
    return model


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _shift(attention, blocks, config, strength: float = 0.12, sharpness: float = 6.0) -> None:
    """Head h attends `SHIFTS[h]` tokens back, by biases alone, and writes block 0 of that token into block h."""
    dim = config.head_dim
    half = dim // 2
    inverse = config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    key = torch.zeros(dim)
    key[:FAST_PAIRS] = 1
    attention.q_proj.weight.mul_(0.02)
    attention.k_proj.weight.mul_(0.02)
    attention.k_proj.bias.copy_(key.repeat(2))
    for head, shift in enumerate(SHIFTS):
        angle = -shift * inverse
        query = torch.cat((key[:half] * angle.cos(), key[:half] * angle.sin()))
        attention.q_proj.bias[head * dim : (head + 1) * dim] = query
    attention.q_norm.weight.fill_(sharpness)
    attention.v_proj.weight.copy_(torch.cat((blocks[0], blocks[0])))
    attention.o_proj.weight.zero_()
    for head, shift in enumerate(SHIFTS[:3]):
        attention.o_proj.weight[:, head * dim : (head + 1) * dim] = strength * blocks[shift].T


def _match(attention, blocks, matches, generator, copy: float, sharpness: float = 4.0) -> None:
    """Queries and keys compare blocks of the stream in one random basis; what is found is copied as it is."""
    dim = blocks[0].shape[0]
    basis = _orthogonal(dim, generator)
    for group, (key, first, second) in enumerate(matches):
        attention.k_proj.weight[group * dim : (group + 1) * dim] = basis @ blocks[key]
        attention.q_proj.weight[2 * group * dim : (2 * group + 1) * dim] = basis @ blocks[first]
        attention.q_proj.weight[(2 * group + 1) * dim : (2 * group + 2) * dim] = basis @ blocks[second]
    attention.q_norm.weight.fill_(sharpness)
    one, two = _orthogonal(4 * dim, generator)[: 2 * dim].chunk(2)
    attention.v_proj.weight.copy_(torch.cat((one, two)))
    attention.o_proj.weight.copy_(copy * torch.cat((one, one, two, two)).T)
