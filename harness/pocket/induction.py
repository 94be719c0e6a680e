"""An initialisation that can look things up before it has learned anything.

A transformer trained from scratch to answer from its context sits on a long plateau until two layers have agreed
on an induction circuit. Here the first two layers start as one: the first layer's heads write the tokens one, two
and three places back into subspaces of the residual stream, the second layer's heads match those against what
stands now, and copy. Training then begins at recall and only has to generalise, in minutes on two cores.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

FAST_PAIRS = slice(0, 6)  # rotary pairs that tell neighbours apart
NEAR_PAIRS = slice(6, 11)  # rotary pairs that fall off over a sentence or two
FAR_PAIRS = slice(12, 32)  # rotary pairs that hold still over a matter


def pocket_config(vocab_size: int, layers: int = 5) -> Qwen3Config:
    """The pocket's architecture: stock Qwen3, four query and two KV heads of 64, 3.8 million parameters."""
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
def induction_start(config: Qwen3Config, names: list[int], seed: int = 0) -> Qwen3ForCausalLM:
    """A fresh model whose first three layers form an induction circuit that minds whom a sentence is about.

    The residual stream is cut into four blocks of 64. Layer 1 writes the token one and two places back into blocks
    1 and 2. Layer 2 attends to the newest token that ends a name, and writes it with the token before it, the whole
    name, into block 3; it also copies what followed the last occurrence of the same token. Layer 3 copies what
    followed the same token *under the same name*.

    Args:
        config: of `pocket_config`.
        names: ids of the tokens that end a name; they get a direction of their own to be found by.
        seed: of everything random.

    Raises:
        ValueError: the shape leaves no room for four orthogonal blocks of one head's width.
    """
    width, dim = config.hidden_size, config.head_dim
    if width != 4 * dim or config.num_attention_heads != 4 or config.num_key_value_heads != 2:
        raise ValueError(f"the induction start needs 4 query heads, 2 KV heads and width 4 x {dim}, not {width}")
    if config.num_hidden_layers < 3:
        raise ValueError(f"the induction start needs three layers or more, not {config.num_hidden_layers}")
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed + 1)
    blocks = _orthogonal(width, generator).chunk(4)
    mark = blocks[3].mean(0) / blocks[3].mean(0).norm()
    embeddings = model.get_input_embeddings().weight
    embeddings[names] += 0.8 * mark
    layers = model.model.layers
    _shift(layers[0].self_attn, blocks, config)
    _gather(layers[1].self_attn, blocks, mark, config, generator)
    for layer in layers[2:]:
        _match(layer.self_attn, blocks, generator, copy=0.4)
    for layer in layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)  # a random feed-forward would drown the circuit
    return model


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _rows(head: int, dim: int = 64) -> slice:
    return slice(head * dim, (head + 1) * dim)


def _pairs(which: slice, dim: int) -> torch.Tensor:
    """A vector of a head's dims with ones in the first halves of some rotary pairs."""
    out = torch.zeros(dim)
    out[which] = 1
    return out


def _turned(vector: torch.Tensor, places: int, config) -> torch.Tensor:
    """`vector` as a query that fits the same vector as a key best `places` tokens back."""
    half = config.head_dim // 2
    angle = -places * config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    return torch.cat((vector[:half] * angle.cos(), vector[:half] * angle.sin()))


def _shift(attention, blocks, config, strength: float = 0.12, sharpness: float = 6.0) -> None:
    """Heads 0 and 1 attend one and two tokens back, by biases alone, and write block 0 of those into blocks 1, 2."""
    key = _pairs(FAST_PAIRS, config.head_dim)
    attention.q_proj.weight.mul_(0.02)
    attention.k_proj.weight.mul_(0.02)
    attention.k_proj.bias.copy_(key.repeat(2))
    attention.q_norm.weight.fill_(sharpness)
    attention.v_proj.weight.copy_(torch.cat((blocks[0], blocks[0])))
    attention.o_proj.weight.zero_()
    for head, places in enumerate((1, 2, 1, 2)):
        attention.q_proj.bias[_rows(head)] = _turned(key, places, config)
        if head < 2:
            attention.o_proj.weight[:, _rows(head)] = strength * blocks[places].T


def _gather(attention, blocks, mark, config, generator, strength: float = 0.25, sharpness: float = 4.0) -> None:
    """KV head 0 matches the token before a place with the query's own; KV head 1 finds the newest name."""
    dim = config.head_dim
    basis = _orthogonal(dim, generator)
    near = _pairs(NEAR_PAIRS, dim)
    attention.k_proj.weight[_rows(0)] = basis @ blocks[1]
    # Without the mark a key points away from the query; the mark, about 8 after the norm, turns it round.
    attention.k_proj.weight[_rows(1)] = near[:, None] * mark[None] / 4
    attention.k_proj.bias[_rows(1)] = -near
    for head in (0, 1):
        attention.q_proj.weight[_rows(head)] = basis @ blocks[0]
    for head in (2, 3):
        attention.q_proj.weight[_rows(head)] = 0
        attention.q_proj.bias[_rows(head)] = _turned(near, 1, config)
    attention.q_norm.weight.fill_(sharpness)
    copied = _orthogonal(4 * dim, generator)[:dim]
    name = torch.cat((blocks[0][: dim // 2], blocks[1][: dim // 2]))
    attention.v_proj.weight.copy_(torch.cat((copied, name)))
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[:, _rows(0)] = 0.1 * copied.T
    attention.o_proj.weight[:, _rows(2)] = strength * blocks[3].T


def _match(attention, blocks, generator, copy: float, sharpness: float = 6.0) -> None:
    """Keys and queries compare the name in block 3 and neighbouring tokens; what is found is copied as it is."""
    dim = blocks[0].shape[0]
    for group, (key, first, second) in enumerate(((1, 0, 0), (2, 1, 0))):
        name, token = _orthogonal(dim, generator).chunk(2)
        for row in (name, token):
            row[: FAR_PAIRS.start] = 0  # faster pairs turn too far between a question and the place it asks for
        attention.k_proj.weight[_rows(group)] = torch.cat((name @ blocks[3], token @ blocks[key]))
        for head, query in enumerate((first, second)):
            rows = _rows(2 * group + head)
            attention.q_proj.weight[rows] = torch.cat((name @ blocks[3], token @ blocks[query]))
    attention.q_norm.weight.fill_(sharpness)
    one, two = _orthogonal(4 * dim, generator)[: 2 * dim].chunk(2)
    attention.v_proj.weight.copy_(torch.cat((one, two)))
    attention.o_proj.weight.copy_(copy * torch.cat((one, one, two, two)).T)
