"""Asking many questions of one cache: the tokens of `generate`, and likelihoods of a plain forward."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model
from transformers import DynamicCache

from still import Split, StillCache, StillCompactor, methods
from still.attention import register
from still.behind import contexts
from still.harness import ask as ask_module
from still.harness.ask import Prompt, ask, ask_each
from still.reading import read

STOP = tuple(range(5, 13))
LIMIT = 9


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "qwen3_next"])
def asked(request):
    """A model, a context's cache, questions of unequal length, and what `generate` answers to each."""
    model = tiny_model(request.param)
    context = random_ids(1, 40)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(context, past_key_values=cache)
    questions = [random_ids(length, seed=length).tolist() for length in (4, 9, 13, 5)]
    answers = []
    for question in questions:
        out = model.generate(
            torch.cat([context, torch.tensor([question])], 1), past_key_values=copy.deepcopy(cache), do_sample=False,
            max_new_tokens=LIMIT, eos_token_id=list(STOP), pad_token_id=0,
        )  # fmt: skip
        answer = out[0, 40 + len(question) :].tolist()
        answers.append(answer[:-1] if answer[-1] in STOP else answer)
    return model, context, cache, questions, answers


@pytest.mark.parametrize("kept", ["none", "half", "all"])
def test_answers_are_those_of_generate(asked, kept):
    """Whatever the right answer is, and wherever the model leaves it, the answer is generate's."""
    model, _, cache, questions, answers = asked
    share = {"none": 0, "half": 0.5, "all": 1}[kept]
    right = [answer[: int(share * len(answer))] + [20] * (kept != "all") + [STOP[0]] for answer in answers]
    before = [layer.keys.clone() for layer in cache.layers if getattr(layer, "keys", None) is not None]
    got = ask(model, cache, Prompt(questions, right, STOP), max_new_tokens=LIMIT)
    assert got.outputs == answers
    after = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.get_seq_length() == 40


def test_cross_entropy_and_kl_are_those_of_a_plain_forward(asked):
    model, context, cache, questions, _ = asked
    right = [[30, 31, STOP[0]], [32, STOP[1]], [33, 34, 35, 36, STOP[2]], [STOP[3]]]
    prompt = Prompt(questions, right, STOP)
    full = ask(model, cache, prompt, keep_distributions=True)
    empty = DynamicCache(config=model.config)
    with torch.no_grad():
        model(context[:, :7], past_key_values=empty)
    other = ask(model, empty, prompt, teacher=full.distributions, keep_distributions=True)
    again = ask(model, cache, prompt, teacher=full.distributions)
    assert max(again.kl) < 1e-4
    for row, (question, answer) in enumerate(zip(questions, right, strict=True)):
        ids = torch.cat([context, torch.tensor([[*question, *answer]])], 1)
        with torch.no_grad():
            log_probs = model(ids).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
        expected = -log_probs[range(len(answer)), answer].sum().item()
        assert full.cross_entropy[row] == pytest.approx(expected, abs=2e-3)
        theirs = other.distributions[row]
        kl = torch.nn.functional.kl_div(theirs, log_probs, reduction="sum", log_target=True).item()
        assert other.kl[row] == pytest.approx(kl, abs=2e-3)
        assert theirs.shape == (len(answer), VOCAB)


def test_a_compact_cache_and_a_quantised_one_are_asked_like_generate_asks_them():
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 40), queries=True)
    questions = [random_ids(length, seed=length).tolist() for length in (6, 3)]
    for name in ("snapkv", "int4"):
        cache = methods.get(name).compact(model, reading, ratio=4)
        expected = []
        for question in questions:
            fed = cache.prompt(torch.tensor([question]))
            out = model.generate(
                **fed, past_key_values=cache.clone(), do_sample=False, max_new_tokens=LIMIT, eos_token_id=list(STOP),
                pad_token_id=0,
            )  # fmt: skip
            answer = out[0, fed["input_ids"].shape[1] :].tolist()
            expected.append(answer[:-1] if answer[-1] in STOP else answer)
        got = ask(model, cache, Prompt(questions, [[20, STOP[0]], [STOP[0]]], STOP), max_new_tokens=LIMIT)
        assert got.outputs == expected, name


def caches(model, reading):
    """Caches of every kind that rows may go on behind: full, equal slots, a bias of each, unequal heads, raw tokens."""
    compactor = StillCompactor.for_model(model, ratio=4, chunk=40, seed=1)
    biased = StillCompactor.for_model(model, ratio=4, chunk=40, beta=True, seed=2)
    for layer in biased.layers.values():
        torch.nn.init.normal_(layer.beta_head.weight, std=0.3)
    uneven = compactor.with_split(Split({index: (1, 3) for index in range(model.config.num_hidden_layers)}))
    growing = compactor.prefill(model, reading.input_ids, ratio=4, chunk=16)
    with torch.no_grad():
        model(**growing.continuation(random_ids(1, 3)), past_key_values=growing)
    return {
        "full": reading.cache, "equal": compactor.compact(reading, ratio=4), "bias": biased.compact(reading, ratio=4),
        "uneven": uneven.compact(reading, ratio=4), "int4": methods.get("int4").compact(model, reading),
        "slots and raw tokens": growing,
    }  # fmt: skip


def test_rows_behind_a_context_answer_as_rows_that_copy_it(monkeypatch):
    """Nothing of it is copied, and likelihoods are the same in every kind of cache."""
    register()
    model = tiny_model("qwen3", attention="still")
    reading = read(model, random_ids(1, 40))
    questions = [random_ids(length, seed=length).tolist() for length in (4, 9, 13, 5)]
    prompt = Prompt(questions, [[30, 31, STOP[0]], [32, STOP[1]], [33, 34, 35, STOP[2]], [STOP[3]]], STOP)
    copied = ask_module.repeated
    for name, cache in caches(model, reading).items():
        length = cache.get_seq_length()
        with monkeypatch.context() as patch:
            patch.setattr(ask_module, "repeated", lambda *args, name=name: pytest.fail(f"{name} is copied"))
            behind = ask(model, cache, prompt, max_new_tokens=LIMIT, keep_distributions=True)
        assert cache.get_seq_length() == length
        with monkeypatch.context() as patch:
            patch.setattr(ask_module, "contexts", lambda *args: None)
            rows = []
            patch.setattr(ask_module, "repeated", lambda *args, rows=rows: rows.append(args[1]) or copied(*args))
            copies = ask(model, cache, prompt, max_new_tokens=LIMIT, keep_distributions=True)
        assert rows, "this one copies"
        assert behind.outputs == copies.outputs, name
        for ours, theirs in zip(behind.distributions, copies.distributions, strict=True):
            assert (ours - theirs).abs().max() < 1e-4, name


@pytest.mark.parametrize("rows", [2, 7, 100])
def test_several_caches_answer_in_one_batch_as_each_by_itself(monkeypatch, rows):
    """Caches of every kind and of unequal lengths; batches are cut where they come to lie."""
    register()
    model = tiny_model("qwen3", attention="still")
    reading = read(model, random_ids(1, 40))
    every = [*caches(model, reading).values(), read(model, random_ids(1, 9, seed=3)).cache]
    assert len({cache.get_seq_length() for cache in every}) == 3
    questions = [random_ids(length, seed=length).tolist() for length in (4, 9, 13, 5)]
    prompt = Prompt(questions, [[30, 31, STOP[0]], [32, STOP[1]], [33, 34, 35, STOP[2]], [STOP[3]]], STOP)
    teacher = ask(model, reading.cache, prompt, keep_distributions=True).distributions
    alone = [ask(model, cache, prompt, max_new_tokens=LIMIT, teacher=teacher) for cache in every]
    assert len({tuple(map(tuple, each.outputs)) for each in alone}) > 1
    forward, sizes = ask_module._Batch.forward, []
    monkeypatch.setattr(ask_module._Batch, "forward", lambda self: sizes.append(len(self.sources)) or forward(self))
    monkeypatch.setattr(ask_module, "_rows_at_once", lambda *args: rows)
    together = ask_each(model, every, prompt, max_new_tokens=LIMIT, teacher=teacher)
    assert max(sizes) == min(rows, 4 * len(every))
    assert sum(sizes) == 4 * len(every)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.outputs == theirs.outputs
        assert ours.cross_entropy == pytest.approx(theirs.cross_entropy, abs=1e-3)
        assert ours.kl == pytest.approx(theirs.kl, abs=1e-3)


def test_caches_that_rows_must_copy_are_asked_one_after_the_other():
    model = tiny_model("gemma3")
    lengths = (20, 12)
    every = [DynamicCache(config=model.config) for _ in lengths]
    with torch.no_grad():
        for cache, length in zip(every, lengths, strict=True):
            model(random_ids(1, length), past_key_values=cache)
    prompt = Prompt([random_ids(4).tolist(), random_ids(6, seed=2).tolist()], [[30, STOP[0]], [STOP[1]]], STOP)
    together = ask_each(model, every, prompt, max_new_tokens=LIMIT)
    assert together == [ask(model, cache, prompt, max_new_tokens=LIMIT) for cache in every]


def test_a_model_that_takes_no_other_attention_copies(monkeypatch):
    """Transformers only logs that, and such rows would see nothing of the context."""
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 9))
    assert contexts(model, reading.cache, 1)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation_cached_value", False, raising=False)
    assert contexts(model, reading.cache, 1) is None


def test_a_cache_that_would_compact_itself_meanwhile_is_copied():
    """So that an answer is what `generate` gives, which compacts."""
    model = tiny_model("qwen3")
    compactor = StillCompactor.for_model(model, ratio=4, chunk=16)
    cache = StillCache(compactor, ratio=4, keep_last=8)
    with torch.no_grad():
        model(random_ids(1, 20), past_key_values=cache)
    assert contexts(model, cache, 3)
    assert contexts(model, cache, 4) is None
    assert contexts(tiny_model("gemma3"), DynamicCache(), 1) is None
    assert contexts(tiny_model("qwen3", attention="eager"), read(model, random_ids(1, 9)).cache, 1) is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt([], [], STOP), "no question"),
        (Prompt([[3]], [[]], STOP), "no tokens"),
        (Prompt([[3]], [[20]], STOP), "does not end"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused(prompt, message):
    model = tiny_model("qwen3")
    with pytest.raises(ValueError, match=message):
        ask(model, DynamicCache(config=model.config), prompt)
