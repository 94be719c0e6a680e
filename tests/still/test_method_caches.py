"""Every method through the public way in: a real model reads, compacts and generates."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, VOCAB, left_padded, random_ids, tiny_model
from transformers import DynamicCache

from still import StillCache, StillCompactor, attention, methods
from still.reading import read, read_after
from still.rope import full_attention_layers

QUICK = {"cartridge": {"steps": 2, "batch": 1, "spans": 2, "span": 8, "sampled": 2}}
FOR_PADDED = [name for name in methods.NAMES if name != "cartridge"]


def method_for(name: str, model):
    if name == "still":
        return methods.get("still", compactor=StillCompactor.for_model(model, slots=16, chunk=64))
    return methods.get(name, **QUICK.get(name, {}))


def attend_as(method, model) -> None:
    if method.uses_beta:
        attention.register()
        model.set_attn_implementation("still")


def checksum(cache) -> str:
    digest = hashlib.sha256()
    for layer in cache.layers:
        for name, value in sorted(vars(layer).items()):
            values = value.values() if isinstance(value, dict) else [value]
            for tensor in (item for item in values if isinstance(item, torch.Tensor)):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", methods.NAMES)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_every_method_generates_and_leaves_the_full_cache_alone(kind, name):
    model = tiny_model(kind)
    reading = read(model, random_ids(1, 60), queries=True)
    before, question = checksum(reading.cache), random_ids(1, 6, seed=1)
    method = method_for(name, model)
    attend_as(method, model)
    cache, record = methods.measure(method, model, reading, slots=12)
    slots = {"full": 60, "int8": 60, "int4": 60, "none": 0}.get(name, 12)
    assert cache.slots == record.slots == slots
    assert record.tokens == 60
    assert record.nbytes == cache.nbytes
    prompt = cache.prompt(question)
    out = model.generate(**prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, prompt["input_ids"].shape[1] + 6)
    assert checksum(reading.cache) == before
    assert reading.cache.get_seq_length() == 60
    assert record.to_dict()["query_aware"] is False


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_full_cache_generates_what_no_cache_generates(kind):
    model = tiny_model(kind)
    rows, question = [random_ids(50), random_ids(31, seed=1)], random_ids(1, 5, seed=2)
    for ids, mask in ((rows[0][None], None), left_padded(rows)):
        cache = methods.get("full").compact(model, read(model, ids, mask))
        prompt = cache.prompt(question)
        expected = model.generate(**prompt, max_new_tokens=10, do_sample=False)
        out = model.generate(**prompt, past_key_values=cache, max_new_tokens=10, do_sample=False)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_context_the_question_stands_alone(kind):
    model = tiny_model(kind)
    question = random_ids(1, 7, seed=2)
    cache, record = methods.measure(methods.get("none"), model, read(model, *left_padded([random_ids(30)])))
    assert (cache.nbytes, record.slots, record.ratio) == (0, 0, float("inf"))
    out = model.generate(**cache.prompt(question), past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, model.generate(question, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("name", FOR_PADDED)
def test_padded_rows_answer_as_alone(name):
    model = tiny_model("llama3")
    method, question = method_for(name, model), random_ids(1, 5, seed=9)
    attend_as(method, model)
    generator = torch.Generator().manual_seed(0)  # no token twice, so that no two keys have the same norm
    rows = [torch.randperm(VOCAB - 3, generator=generator)[:tokens] + 3 for tokens in (57, 20, 33)]
    together = method.compact(model, read(model, *left_padded(rows), queries=True), ratio=4)
    whole = {"none": [0, 0, 0], **{kept: [57, 20, 33] for kept in ("full", "int8", "int4")}}
    assert together.row_slots() == whole.get(name, [14, 5, 8])
    inputs = together.continuation(question)
    logits = model(**inputs, past_key_values=together).logits
    for index, row in enumerate(rows):
        alone = method.compact(model, read(model, row[None], queries=True), ratio=4)
        expected = model(**alone.continuation(question), past_key_values=alone).logits[0]
        tolerance = 0.05 if name == "int4" else 5e-3  # a code may flip on a rounding error of the forward
        torch.testing.assert_close(logits[index], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["full", "int8", "none", "truncation"])
def test_many_questions_follow_one_context(name):
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 40), queries=True)
    cache = methods.get(name).compact(model, reading, slots=40)
    questions = [random_ids(4, seed=1), random_ids(7, seed=2)]
    ids, mask = left_padded(questions)
    prompt = cache.prompt(ids, mask)
    together = model.generate(**prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)[:, -6:]
    for row, question in zip(together, questions, strict=True):
        one = methods.get(name).compact(model, reading, slots=40)
        alone = model.generate(**one.prompt(question), past_key_values=one, max_new_tokens=6, do_sample=False)
        assert torch.equal(row, alone[0, -6:])


def test_snapkv_says_that_it_saw_the_question():
    model, question = tiny_model("qwen3"), random_ids(1, 5, seed=1)
    reading = read(model, *left_padded([random_ids(40), random_ids(30, seed=3)]))
    before = checksum(reading.cache)
    cache, record = methods.measure(methods.get("snapkv", question_ids=question), model, reading, slots=10)
    assert record.query_aware
    assert cache.row_slots() == [10, 10]
    assert cache.provenance["query_aware"]
    assert checksum(reading.cache) == before
    model.generate(**cache.prompt(question), past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_bytes_are_those_of_the_slots():
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 60), queries=True)
    for name in ("knorm", "h2o", "truncation", "attention_matching"):
        _, record = methods.measure(methods.get(name), model, reading, slots=12)
        beta = 2 * 2 * 12 * 4 if name == "attention_matching" else 0
        assert record.nbytes == 2 * 2 * 2 * 12 * 64 * 4 + beta
        assert record.full_nbytes == 2 * 2 * 2 * 60 * 64 * 4


def test_a_fresh_compactor_keeps_a_strided_subset():
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 60))
    cache = method_for("still", model).compact(model, reading, slots=15)
    at = torch.linspace(0, 59, 15).round().long()
    for layer in full_attention_layers(model.config):
        kept, full = cache.layers[layer], reading.cache.layers[layer]
        torch.testing.assert_close(kept.keys, full.keys[:, :, at], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(kept.values, full.values[:, :, at], atol=1e-3, rtol=1e-3)


def divergence(model, cache, reading, text: torch.Tensor) -> float:
    """KL(full || cache) per token of a text that follows the context."""
    full = DynamicCache(config=model.config)
    model(input_ids=reading.input_ids, past_key_values=full)
    wanted = model(input_ids=text, past_key_values=full).logits.log_softmax(-1)
    got = model(**cache.continuation(text), past_key_values=cache).logits.log_softmax(-1)
    return torch.nn.functional.kl_div(got, wanted, log_target=True, reduction="sum").item() / text.shape[1]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_a_cartridge_learns_its_context_and_resumes(kind, tmp_path):
    model = tiny_model(kind)
    reading = read(model, random_ids(1, 48))
    texts = [random_ids(12, seed=seed) for seed in (1, 2)]
    options = {"texts": texts, "learning_rate": 0.05, "batch": 2}
    start = methods.get("cartridge", steps=0, **options).compact(model, reading, slots=8)
    trained = methods.get("cartridge", steps=12, **options).compact(model, reading, slots=8)
    first = full_attention_layers(model.config)[0]
    assert torch.equal(trained.layers[first].keys[:, :, 0], reading.cache.layers[first].keys[:, :, 0])
    assert not trained.layers[first].keys.requires_grad
    path = tmp_path / "cartridge.safetensors"
    for steps in (5, 12):
        resumed = methods.get("cartridge", steps=steps, checkpoint=path, **options).compact(model, reading, slots=8)
    for ours, theirs in zip(resumed.compact_layers, trained.compact_layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    text = texts[0][None]
    assert divergence(model, trained, reading, text) < 0.7 * divergence(model, start, reading, text)
    with pytest.raises(ValueError, match=r"holds 8 slots at step 12; asked were 9 up to step 12"):
        methods.get("cartridge", steps=12, checkpoint=path, **options).compact(model, reading, slots=9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cartridge_of_another_context_or_model_is_not_gone_on_with(tmp_path):
    path, model = tmp_path / "cartridge.safetensors", tiny_model("qwen3")
    cartridge = methods.get("cartridge", steps=1, texts=[random_ids(6)], batch=1, checkpoint=path)
    contexts = [random_ids(1, 30, seed=seed) for seed in (0, 1)]
    first = cartridge.compact(model, read(model, contexts[0]), slots=4)
    for other, ids in ((model, contexts[1]), (tiny_model("qwen3", vocab_size=VOCAB + 1), contexts[0])):
        with pytest.raises(ValueError, match=r"cartridge\.safetensors is of another context or model"):
            cartridge.compact(other, read(other, ids), slots=4)
    again = cartridge.compact(model, read(model, contexts[0]), slots=4)
    assert torch.equal(again.layers[1].values, first.layers[1].values)
    with safe_open(str(path), "pt") as file:
        meta = file.metadata()
    del meta["of"]
    save_file(load_file(path), path, metadata={**meta, "tokens": "30"})
    with pytest.raises(ValueError, match="of another context or model"):
        cartridge.compact(model, read(model, contexts[0]), slots=4)


def test_a_cartridge_makes_its_own_texts_and_refuses_batches():
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 40))
    cartridge = methods.get("cartridge", spans=3, span=6, sampled=4, seed=5)
    full = methods.get("full").compact(model, reading)
    texts, again = cartridge.study(model, reading, full), cartridge.study(model, reading, full)
    context = reading.input_ids[0].tolist()
    for text, same in zip(texts, again, strict=True):
        assert torch.equal(text, same)
        assert len(text) == 10
        assert any(context[i : i + 6] == text[:6].tolist() for i in range(35))
    with pytest.raises(ValueError, match="one context at a time; this reading has 2 rows"):
        cartridge.compact(model, read(model, random_ids(2, 20)), slots=4)
    with pytest.raises(ValueError, match="a text has 1 tokens"):
        methods.get("cartridge", texts=[torch.tensor([5])])


def test_attention_matching_needs_its_bias():
    """With the bias the next logits come nearer to those of the full cache than without."""
    attention.register()
    model = tiny_model("qwen3", attention="still")
    reading = read(model, random_ids(1, 120), queries=True)
    question = random_ids(1, 20, seed=4)
    wanted = read_after(model, reading, question)
    full = methods.get("full").compact(model, reading)
    target = model(**full.continuation(question), past_key_values=full).logits
    cache = methods.get("attention_matching").compact(model, reading, slots=20)
    plain = cache.clone()
    for layer in plain.compact_layers:
        layer.beta = None
    errors = [
        (model(**small.continuation(question), past_key_values=small).logits - target).norm().item()
        for small in (cache, plain)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert wanted.cache.get_seq_length() == 140


@pytest.mark.parametrize("name", ["truncation", "random", "streaming_llm", "knorm", "keydiff"])
def test_methods_that_need_no_queries_compact_a_growing_cache(name):
    model, ids = tiny_model("qwen3"), random_ids(1, 64)
    cache = StillCache(methods.get(name), ratio=4, keep_last=0, chunk=32, config=model.config)
    model(input_ids=ids[:, :32], past_key_values=cache)
    assert (cache.slots, cache.physical_length, cache.logical_length) == (8, 8, 32)
    expected = methods.get(name).compact(model, read(model, ids[:, :32]), slots=8)
    assert torch.equal(cache.layers[0].keys, expected.layers[0].keys)
    model(input_ids=ids[:, 32:], past_key_values=cache)
    assert (cache.slots, cache.logical_length) == (16, 64)
