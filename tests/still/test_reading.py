from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

from still.methods.base import attention_scale
from still.reading import read, read_after
from still.rope import full_attention_layers


@pytest.mark.parametrize("kind", CONFIGS)
def test_reading_holds_the_cache_of_a_plain_forward(kind):
    model, ids = tiny_model(kind), random_ids(2, 40)
    plain = model(ids, use_cache=True).past_key_values
    for queries in (False, True):
        reading = read(model, ids, queries=queries)
        assert reading.cache.get_seq_length() == 40
        assert reading.seconds > 0
        for layer in full_attention_layers(model.config):
            torch.testing.assert_close(reading.cache.layers[layer].keys, plain.layers[layer].keys)
            torch.testing.assert_close(reading.cache.layers[layer].values, plain.layers[layer].values)
        assert sorted(reading.queries) == (full_attention_layers(model.config) if queries else [])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_queries_give_the_models_own_attention(kind, attention):
    eager, ids = tiny_model(kind, attention="eager"), random_ids(2, 24)
    attentions = eager(ids, output_attentions=True).attentions
    attentions = [attention for attention in attentions if attention is not None]
    layers = full_attention_layers(eager.config)
    if len(attentions) == len(layers):
        attentions = dict(zip(layers, attentions, strict=True))
    model = tiny_model(kind, attention=attention)
    reading = read(model, ids, queries=True)
    for layer in layers:
        keys = reading.cache.layers[layer].keys.repeat_interleave(2, dim=1)
        logits = reading.queries[layer] @ keys.mT * attention_scale(model, layer)
        logits = logits.masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(logits.softmax(-1), attentions[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_capturing_queries_changes_nothing_and_is_undone(attention):
    model, ids = tiny_model("gemma3", attention=attention), random_ids(1, 20)
    before = model(ids).logits
    read(model, ids, queries=True)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids).logits, before)


def test_attention_is_restored_after_an_error():
    model = tiny_model("qwen3")

    def fail(*_):
        raise RuntimeError("broken layer")

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        read(model, random_ids(1, 8), queries=True)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert read(model, random_ids(1, 8)).queries == {}


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_rows_are_read_as_alone(kind):
    model = tiny_model(kind)
    rows = [random_ids(tokens, seed=tokens) for tokens in (30, 13)]
    together = read(model, *left_padded(rows), queries=True)
    for index, row in enumerate(rows):
        alone = read(model, row[None], queries=True)
        for layer in full_attention_layers(model.config):
            kept = together.cache.layers[layer].keys[index : index + 1, :, -len(row) :]
            torch.testing.assert_close(kept, alone.cache.layers[layer].keys, atol=1e-4, rtol=1e-4)
            queries = together.queries[layer][index : index + 1, :, -len(row) :]
            torch.testing.assert_close(queries, alone.queries[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_reading_on_is_reading_all_at_once(kind):
    model = tiny_model(kind)
    ids, mask = left_padded([random_ids(30), random_ids(21, seed=1)])
    more = random_ids(1, 7, seed=2)
    first = read(model, ids, mask)
    kept = first.cache.layers[1].keys.clone()
    longer = read_after(model, first, more, queries=True)
    assert torch.equal(first.cache.layers[1].keys, kept)
    assert first.cache.get_seq_length() == 30
    whole = read(model, longer.input_ids, longer.attention_mask, queries=True)
    for layer in full_attention_layers(model.config):
        assert longer.queries[layer].shape[2] == 7
        torch.testing.assert_close(longer.queries[layer], whole.queries[layer][:, :, -7:], atol=1e-4, rtol=1e-4)
        live = longer.attention_mask[:, None, :, None]
        torch.testing.assert_close(
            longer.cache.layers[layer].keys * live, whole.cache.layers[layer].keys * live, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.empty(1, 0, dtype=torch.long), None, r"shape \[1, 0\]"),
        (random_ids(4), None, r"shape \[4\]"),
        (random_ids(1, 4), torch.ones(1, 5), r"\[1, 5\] differs from input_ids \[1, 4\]"),
        (random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "row 1 .* left padding"),
        (random_ids(2, 4), torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), "row 0 .* left padding"),
        (random_ids(2, 4), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), "row 0 .* left padding"),
    ],
)
def test_bad_contexts_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        read(tiny_model("qwen3"), ids, mask)
