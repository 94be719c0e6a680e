from __future__ import annotations

import math

import pytest
import torch
from test_compactor import answer, checksum, model_for, stirred
from test_perceiver import OPTIONS
from tiny_models import COMMON, CONFIGS, VOCAB, left_padded, random_ids, tiny_model
from transformers import CONFIG_MAPPING

from still import StillCompactor, calling, read
from still.budgets import Split
from still.distill import objective
from still.distill.objective import IGNORE, Distiller, top_k_kl

SCALED = {
    "granite": {"logits_scaling": 0.5, "attention_multiplier": 0.125},
    "hyperclovax": {"logits_scaling": 2.0, "attention_multiplier": 0.125},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "qwen3": {},
}
"""Models whose forward scales or caps the logits, and one whose forward does not."""


def scaled_model(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    config = CONFIG_MAPPING[kind](**COMMON, num_hidden_layers=2, **SCALED[kind])
    return tiny_model(config, attention="eager" if kind == "gemma2" else "sdpa")


def by_hand(teacher, student, gold, k):
    """KL of one token, from its definition."""
    support = set(teacher.topk(k).indices.tolist()) | {gold}
    p, q = ({i: math.exp(x[i].item()) for i in support} for x in (teacher.double(), student.double()))
    p, q = ({i: x / sum(part.values()) for i, x in part.items()} for part in (p, q))
    return sum(p[i] * math.log(p[i] / q[i]) for i in support)


def test_support_kl_follows_its_definition():
    teacher, student = 3 * torch.randn(6, 50), 3 * torch.randn(6, 50)
    order = teacher.argsort(-1, descending=True)
    gold = torch.tensor([order[i, rank] for i, rank in enumerate((0, 3, 4, 5, 20, 49))])  # in and out of the top 5
    for k in (5, 49, 50, 200):
        expected = [by_hand(teacher[i], student[i], gold[i].item(), min(k, 50)) for i in range(6)]
        torch.testing.assert_close(top_k_kl(teacher, student, gold, k), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_support_kl_is_zero_for_equal_logits_and_blind_to_a_shift():
    teacher, gold = 3 * torch.randn(6, 50), torch.arange(6)
    assert top_k_kl(teacher, teacher, gold, 10).abs().max() == 0
    assert top_k_kl(teacher, teacher + 2.5, gold, 10).abs().max() < 1e-5
    assert (top_k_kl(teacher, torch.randn(6, 50), gold, 10) > 0).all()


def test_a_gold_token_far_outside_the_top_stays_finite():
    teacher = torch.zeros(1, 50)
    teacher[0, 7] = -1e4
    student = torch.zeros(1, 50, requires_grad=True)
    loss = top_k_kl(teacher, student, torch.tensor([7]), 5).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def batch_of(lengths=(20, 12, 20), turns=(7, 6, 4)):
    contexts = [random_ids(n, seed=n + i) for i, n in enumerate(lengths)]
    context_ids, context_mask = left_padded(contexts)
    turn_ids = torch.zeros(len(turns), max(turns), dtype=torch.long)
    turn_mask, labels = torch.zeros_like(turn_ids), torch.full_like(turn_ids, IGNORE)
    for row, count in enumerate(turns):
        turn_ids[row, :count], turn_mask[row, :count] = random_ids(count, seed=row), 1
        for index in range(2 + row % 2, count):  # questions are not supervised
            labels[row, index] = turn_ids[row, index]
    return {
        "context_ids": context_ids, "context_mask": context_mask, "turn_ids": turn_ids, "turn_mask": turn_mask,
        "labels": labels,
    }  # fmt: skip


def distiller_for(kind="qwen3", slots=6, model=None, **options) -> Distiller:
    model = tiny_model(kind) if model is None else model
    return Distiller(model, stirred(StillCompactor.for_model(model, slots=slots, chunk=64, **options)), top_k=9)


def check_against_a_loop(distiller, batch):
    model, compactor = distiller.model, distiller.compactor
    with torch.no_grad():
        out = distiller(**batch, slots=6)
        total = []
        for row in range(len(batch["context_ids"])):
            context = batch["context_ids"][row][batch["context_mask"][row].bool()][None]
            turn = batch["turn_ids"][row][batch["turn_mask"][row].bool()][None]
            teacher = model(torch.cat((context, turn), dim=1), use_cache=False).logits[0, context.shape[1] :]
            student = answer(model, compactor.compact(read(model, context), slots=6), turn)[0]
            total += [
                (by_hand(teacher[j - 1], student[j - 1], label.item(), 9), student[j - 1].argmax() == label)
                for j, label in enumerate(batch["labels"][row])
                if label != IGNORE
            ]
    assert out.tokens == len(total)
    assert out.kl > 1e-4
    expected = sum(kl for kl, _ in total)
    torch.testing.assert_close(out.kl.item(), expected / len(total), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(out.loss, out.kl)
    assert out.right.tolist() == [bool(right) for _, right in total]
    scaled = distiller(**batch, slots=6, num_items_in_batch=50).loss.item()
    torch.testing.assert_close(scaled, expected / 50, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_batches_give_the_kl_of_a_loop_over_tokens(kind):
    check_against_a_loop(distiller_for(kind), batch_of())


@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_are_matched_beside_the_kl(kind):
    distiller, batch = distiller_for(kind), batch_of((20, 20), (7, 7))
    plain, both = distiller(**batch, slots=6), distiller(**batch, slots=6, match=0.5)
    assert plain.hidden == 0
    torch.testing.assert_close(plain.kl, both.kl)
    torch.testing.assert_close(both.loss, both.kl + 0.5 * both.hidden)
    wanted = batch["labels"][:, 1:] != IGNORE
    with torch.no_grad():
        ids = torch.cat((batch["context_ids"], batch["turn_ids"]), dim=1)
        taught = distiller.model(ids, output_hidden_states=True).hidden_states[1:]
        small = distiller.compactor.compact(read(distiller.model, batch["context_ids"]), slots=6)
        given = small.continuation(batch["turn_ids"])
        learnt = distiller.model(**given, past_key_values=small, output_hidden_states=True).hidden_states[1:]
        apart = sum(
            ((x - y[:, 20:]).square().sum(-1) / y[:, 20:].square().sum(-1))[:, :-1][wanted].mean()
            for x, y in zip(learnt, taught, strict=True)
        )
    torch.testing.assert_close(both.hidden, apart, rtol=1e-3, atol=1e-5)


def test_beta_is_part_of_the_student():
    distiller = distiller_for(model=model_for({"beta": True}), beta=True)
    with torch.no_grad():
        for layer in distiller.compactor.layers.values():
            layer.beta_head.weight.normal_(std=0.3)
    check_against_a_loop(distiller, batch_of())


@pytest.mark.parametrize("kind", CONFIGS)
def test_only_the_compactor_gets_gradients_in_every_layer_and_head(kind):
    distiller = distiller_for(kind).train()
    assert not distiller.model.training
    distiller(**batch_of(), slots=6).loss.backward()
    assert all(p.grad is None for p in distiller.model.parameters())
    for layer in distiller.compactor.layers.values():
        assert (layer.bank.grad.abs().amax((1, 2)) > 0).all()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_tensor_moves_within_ten_steps(options):
    model = model_for(options)
    distiller = Distiller(model, StillCompactor.for_model(model, slots=6, chunk=64, **options))
    start = {name: p.detach().clone() for name, p in distiller.compactor.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(distiller.compactor.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        distiller(**batch_of((18, 18), (6, 6)), slots=6).loss.backward()
        optimizer.step()
    now = dict(distiller.compactor.named_parameters())
    unmoved = [name for name, p in start.items() if torch.equal(p, now[name])]
    # At the start all latents' self-attention queries and keys are one vector: to first order they have no gradient.
    assert not [name for name in unmoved if "self_attention.query" not in name and "self_attention.key" not in name]
    banks = [layer.bank for layer in distiller.compactor.layers.values()]
    assert all((bank.abs().amax((1, 2)) > 0).all() for bank in banks)


def logits_of(distiller, monkeypatch, batch):
    seen = []

    def watched(teacher, student, gold, k):
        seen.append((teacher, student))
        return top_k_kl(teacher, student, gold, k)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(objective, "top_k_kl", watched)
        distiller(**batch, slots=6)
    return seen[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_answer_token_changes_no_logits_before_it(kind, monkeypatch):
    distiller, batch = distiller_for(kind), batch_of((20, 12), (8, 8))
    batch["labels"] = batch["turn_ids"].clone()
    before = logits_of(distiller, monkeypatch, batch)
    for j in (1, 4, 7):
        changed = {**batch, "turn_ids": batch["turn_ids"].clone()}
        changed["turn_ids"][:, j] = (changed["turn_ids"][:, j] + 5) % VOCAB
        for old, new in zip(before, logits_of(distiller, monkeypatch, changed), strict=True):
            old, new = old.view(2, 7, -1), new.view(2, 7, -1)  # the logits at tokens 0 to 6 of each row
            torch.testing.assert_close(new[:, :j], old[:, :j], rtol=0, atol=1e-6)
            assert j == 7 or (new[:, j] - old[:, j]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_teacher_student_and_validation_leave_the_contexts_cache_alone(kind, monkeypatch):
    distiller, batch, seen = distiller_for(kind), batch_of((20, 20), (5, 5)), []
    whole = distiller.compactor.compact_rows

    def watched(cache, rows, **size):
        seen.append((cache, checksum(cache)))
        return whole(cache, rows, **size)

    monkeypatch.setattr(distiller.compactor, "compact_rows", watched)
    distiller(**batch, slots=6).loss.backward()
    with torch.no_grad():
        distiller.eval()(**batch, slots=6)
    alone = read(distiller.model, batch["context_ids"]).cache
    assert len(seen) == 2
    for cache, before in seen:
        assert cache.get_seq_length() == 20
        assert checksum(cache) == before
        for ours, theirs in zip(cache.layers, alone.layers, strict=True):
            if getattr(theirs, "keys", None) is not None:
                torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-5)
                torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-5)


def test_bad_batches_are_named():
    distiller, batch = distiller_for(), batch_of()
    with pytest.raises(ValueError, match="every label is IGNORE"):
        distiller(**{**batch, "labels": torch.full_like(batch["labels"], IGNORE)}, slots=6)
    for slots in (0, 13):
        with pytest.raises(ValueError, match=f"slots is {slots}; .* 12 tokens of the shortest row"):
            distiller(**batch, slots=slots)


def test_a_bf16_base_trains_an_fp32_compactor():
    model = tiny_model("qwen3").bfloat16()
    distiller = distiller_for(model=model)
    distiller(**batch_of(), slots=6).loss.backward()
    grads = [p.grad for p in distiller.compactor.parameters() if p.requires_grad]
    assert {g.dtype for g in grads} == {torch.float32}
    assert all(torch.isfinite(g).all() for g in grads)


def test_a_few_contexts_are_learnt_by_heart():
    """Answers are the base's own, greedy with the full cache; at 4x the compact cache gives nearly all of them."""
    model = tiny_model("qwen3")
    contexts, questions, length = 3, 4, 4
    context = random_ids(contexts, 32)
    turns = []
    for number in range(questions):
        asked = torch.cat((context, random_ids(contexts, 3, seed=10 + number)), dim=1)
        turns.append(model.generate(asked, max_new_tokens=length, do_sample=False)[:, 32:])
    turn_ids = torch.cat(turns)
    labels = turn_ids.clone()
    labels[:, :3] = IGNORE
    batch = {"context_ids": context.repeat(questions, 1), "turn_ids": turn_ids, "labels": labels}
    distiller = Distiller(model, StillCompactor.for_model(model, slots=8, chunk=32))
    optimizer = torch.optim.AdamW(distiller.compactor.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        start = distiller(**batch, slots=8)
    assert start.teacher_right.all()
    assert start.right.float().mean() < 0.7
    for _ in range(150):
        optimizer.zero_grad()
        out = distiller(**batch, slots=8)
        if out.right.float().mean() >= 0.95:
            break
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.compactor.parameters(), 1.0)
        optimizer.step()
    assert out.right.float().mean() >= 0.95
    assert out.kl < start.kl / 3


def test_layers_look_for_themselves_while_they_train():
    model, batch = tiny_model("qwen3"), batch_of()
    scouted = distiller_for(model=model, placement=8, scout=1)
    for layer in scouted.compactor.layers.values():  # so that layers differ in what they think
        torch.nn.init.normal_(layer.placement.first.outer)
    alone = Distiller(model, StillCompactor.for_model(model, slots=6, chunk=64, placement=8), top_k=9)
    alone.compactor.load_state_dict(scouted.compactor.state_dict())
    trained, by_itself = scouted.train()(**batch, slots=6), alone.train()(**batch, slots=6)
    torch.testing.assert_close(trained.loss, by_itself.loss)
    served, not_served = scouted.eval()(**batch, slots=6), alone.eval()(**batch, slots=6)
    torch.testing.assert_close(not_served.loss, by_itself.loss)
    assert (served.loss - by_itself.loss).abs() > 1e-3


@pytest.mark.parametrize("kind", SCALED)
def test_logits_of_hidden_states_are_those_of_the_models_own_forward(kind):
    model, ids = scaled_model(kind), random_ids(2, 12)
    states = model.get_decoder()(ids).last_hidden_state
    logits, wanted = calling.logits_of(model, states), model(ids).logits
    torch.testing.assert_close(logits, wanted)
    changed = (model.get_output_embeddings()(states) - wanted).abs().max()
    assert (changed == 0) if kind == "qwen3" else (changed > 0.1)


@pytest.mark.parametrize("kind", ["granite", "hyperclovax"])
def test_a_model_that_scales_its_logits_is_distilled_at_that_scale(kind):
    distiller, batch = distiller_for(model=scaled_model(kind)), batch_of((20, 20), (7, 7))
    check_against_a_loop(distiller, batch)
    ids = torch.cat((batch["context_ids"], batch["turn_ids"]), dim=1)
    logits = distiller.model(ids).logits[:, 20:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(distiller(**batch, slots=6).teacher_cross_entropy, expected, rtol=1e-4, atol=1e-5)


def test_a_split_may_leave_a_head_without_slots():
    distiller, split = distiller_for(model=model_for({"beta": True})).train(), Split({0: (0, 1), 1: (1, 1)}, floor=0)
    out = distiller(**batch_of(), slots=6, split=split)
    out.loss.backward()
    assert out.kl.isfinite()
    reached = [layer.bank.grad.abs().amax((1, 2)) > 0 for layer in distiller.compactor.layers.values()]
    assert [heads.tolist() for heads in reached] == [[False, True], [True, True]]
