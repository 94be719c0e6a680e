from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

from still import methods
from still.methods import QuantisedLayer
from still.reading import read
from still.rope import full_attention_layers


def states(tokens: int, rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 2, tokens, 64, generator=generator)
    return keys * torch.linspace(0.1, 20, 64) + 3, values * torch.rand(rows, 2, tokens, 1, generator=generator) * 5


def dequantised(layer: QuantisedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    probe = torch.zeros(layer.packed_keys.codes.shape[0], 2, 1, 64)
    layer.residual = 10**9
    keys, values = layer.update(probe, probe)
    layer.crop(-1)
    return keys[:, :, :-1], values[:, :, :-1]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "group"), [(64, 32), (70, 32), (5, 32), (33, 16), (1, 8)])
def test_errors_stay_within_half_a_step(bits, tokens, group):
    keys, values = states(tokens)
    out_keys, out_values = dequantised(QuantisedLayer.pack(keys, values, bits, group))
    first = 0
    for last in range(tokens % group or group, tokens + 1, group):  # groups count from the last token
        block = keys[:, :, first:last]
        low, high = block.amin(2, keepdim=True), block.amax(2, keepdim=True)
        slack = (high - low + low.abs()) * 2**-10 + 1e-5
        assert ((out_keys[:, :, first:last] - block).abs() <= (high - low) / (2**bits - 1) / 2 + slack).all()
        first = last
    blocks = values.unflatten(-1, (-1, group))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    slack = (high - low + low.abs()) * 2**-10 + 1e-5
    assert ((out_values.unflatten(-1, (-1, group)) - blocks).abs() <= (high - low) / (2**bits - 1) / 2 + slack).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "group"), [(64, 32), (70, 32), (33, 16)])
def test_bytes_follow_the_formula_and_are_really_held(bits, tokens, group):
    model = tiny_model("qwen3")
    cache, record = methods.measure(
        methods.get(f"int{bits}", group=group), model, read(model, random_ids(2, tokens)), ratio=8
    )
    codes = 2 * 2 * tokens * 64 * bits // 8
    key_scales, value_scales = 2 * 2 * -(-tokens // group) * 64 * 2, 2 * 2 * tokens * (64 // group) * 2
    assert cache.nbytes == 2 * (2 * codes + 2 * key_scales + 2 * value_scales)
    assert record.nbytes == cache.nbytes
    assert record.full_nbytes == 2 * 2 * 2 * 2 * tokens * 64 * 4
    assert (record.slots, record.tokens, record.ratio) == (tokens, tokens, 1.0)
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in cache.layers
        for x in (*layer.packed_keys, *layer.packed_values)
    }
    assert sum(storages.values()) == cache.nbytes


def test_padded_rows_pack_as_alone():
    model = tiny_model("llama3")
    rows = [random_ids(tokens, seed=tokens) for tokens in (75, 40)]
    together = methods.get("int4").compact(model, read(model, *left_padded(rows)))
    for index, row in enumerate(rows):
        alone = methods.get("int4").compact(model, read(model, row[None]))
        for ours, theirs in zip(together.layers, alone.layers, strict=True):
            for mine, other in zip(dequantised(ours), dequantised(theirs), strict=True):
                difference = (mine[index : index + 1, :, -len(row) :] - other).abs()
                assert (difference > 1e-3).float().mean() < 1e-3  # a code may flip on a rounding error of the forward


def test_new_tokens_are_raw_until_they_fill_the_residual():
    keys, values = states(40)
    layer = QuantisedLayer.pack(keys, values, bits=8, group=16)
    layer.residual = 20
    grown_keys, grown_values = keys, values
    for step, new in enumerate((7, 7, 7, 1)):
        more_keys, more_values = states(new, seed=step + 1)
        grown_keys, grown_values = torch.cat([grown_keys, more_keys], 2), torch.cat([grown_values, more_values], 2)
        out_keys, out_values = layer.update(more_keys, more_values)
        assert layer.get_seq_length() == out_keys.shape[2] == grown_keys.shape[2]
        assert torch.equal(out_keys[:, :, -new:], more_keys)
        assert (out_keys - grown_keys).abs().max() < 0.5
        assert (out_values - grown_values).abs().max() < 0.2
    assert layer.packed_tokens == 56
    assert layer.keys.shape[2] == 6
    with pytest.raises(ValueError, match="only the last 6 are not packed"):
        layer.crop(-7)
    layer.crop(-6)
    assert layer.get_seq_length() == 56


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_with_int8_follows_the_full_cache(kind):
    model = tiny_model(kind)
    ids, mask = left_padded([random_ids(60), random_ids(41, seed=1)])
    reading, question = read(model, ids, mask), random_ids(1, 5, seed=2)
    cache = methods.get("int8").compact(model, reading)
    prompt = cache.prompt(question)
    full = model(**prompt).logits[:, -1]
    small = model(
        input_ids=question.expand(2, -1),
        attention_mask=prompt["attention_mask"],
        position_ids=(prompt["attention_mask"].cumsum(-1) - 1)[:, -5:],
        past_key_values=cache.clone(),
    ).logits[:, -1]
    assert (small - full).norm() < 0.05 * full.norm()
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert (out == expected).float().mean() > 0.95
    assert reading.cache.get_seq_length() == 60


def test_beams_repeat_the_packed_rows():
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 40))
    question = random_ids(1, 4, seed=1)
    cache = methods.get("int8").compact(model, reading)
    beams = model.generate(
        **cache.prompt(question), past_key_values=cache.clone(), num_beams=3, max_new_tokens=8, do_sample=False
    )
    expected = model.generate(**cache.prompt(question), num_beams=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(beams, expected)


def test_refusals():
    keys, values = states(8)
    with pytest.raises(ValueError, match="bits is 3"):
        QuantisedLayer.pack(keys, values, bits=3, group=8)
    with pytest.raises(ValueError, match="64 channels, no multiple of the group of 24"):
        QuantisedLayer.pack(keys, values, bits=8, group=24)
    with pytest.raises(ValueError, match="past what float16 scales can hold"):
        QuantisedLayer.pack(keys * 1e5, values, bits=8, group=8)


def test_layers_without_full_attention_are_copied():
    model = tiny_model("gemma3")
    reading = read(model, random_ids(1, 40))
    cache = methods.get("int4").compact(model, reading)
    full = full_attention_layers(model.config)
    for index, (layer, source) in enumerate(zip(cache.layers, reading.cache.layers, strict=True)):
        assert isinstance(layer, QuantisedLayer) == (index in full)
        if index not in full:
            assert torch.equal(layer.keys, source.keys)
            assert layer.keys.data_ptr() != source.keys.data_ptr()
