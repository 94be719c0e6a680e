from __future__ import annotations

import functools
import random

import pytest
import torch
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

from still import StillCompactor, methods
from still.methods.base import LayerView, attention_scale, row_lengths
from still.reading import read, read_after
from still.rope import Rotary, full_attention_layers, rotate, unrotate

EVICTION = [name for name, method in methods.METHODS.items() if issubclass(method, methods.Eviction)]
SIMPLE = ["truncation", "random", "streaming_llm", "knorm", "keydiff"]
BUDGETED = [*EVICTION, "attention_matching"]


@functools.cache
def reading_of(kind: str, tokens: int = 48, rows: int = 1):
    model = tiny_model(kind)
    return model, read(model, random_ids(rows, tokens, seed=tokens), queries=True)


def views(model, reading, slots: int):
    """A `LayerView` for each full-attention layer of rows without padding."""
    rotary = Rotary.for_model(model)
    for layer in full_attention_layers(model.config):
        state = reading.cache.layers[layer]
        queries = reading.queries[layer] * attention_scale(model, layer)
        positions = torch.arange(state.keys.shape[2])
        yield LayerView(layer, state.keys, state.values, positions, slots, queries, rotary)


def places(full: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Where kept entries `[.., slots, head_dim]` stand, bit for bit, among `[.., tokens, head_dim]`; -1 for nowhere."""
    same = (kept[..., :, None, :] == full[..., None, :, :]).all(-1)
    return same.int().argmax(-1).masked_fill(~same.any(-1), -1)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries `[.., slots, head_dim]` of `x` `[.., tokens, head_dim]`."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def test_registry_lists_its_names_and_refuses_others():
    assert set(methods.NAMES) >= {"full", "none", "still", "h2o", "int4", "cartridge", "attention_matching"}
    assert methods.get("snapkv", window=7).window == 7
    with pytest.raises(ValueError, match=r"'snap'; choose one of full, none, .*int4"):
        methods.get("snap")
    with pytest.raises(ValueError, match=r"h2o has no hyper-parameter 'window'; it has heavy, chunk"):
        methods.get("h2o", window=3)
    with pytest.raises(ValueError, match="needs compactor="):
        methods.get("still")


@pytest.mark.parametrize("name", EVICTION)
@pytest.mark.parametrize("kind", CONFIGS)
def test_evicted_caches_are_a_sorted_subset_bit_for_bit(kind, name):
    model, reading = reading_of(kind, 48, 2)
    for view in views(model, reading, 13):
        kept = methods.get(name).compact_view(view)
        where = places(view.keys, kept.keys)
        assert where.min() >= 0
        assert (where.diff(dim=-1) > 0).all()
        assert torch.equal(take(view.values, where), kept.values)
        assert kept.beta is None


def grid(samples: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    pairs = [(1, 1), (2, 1), (5, 5), (64, 1), (33, 32)]
    return pairs + [(tokens := draw.randint(1, 64), draw.randint(1, tokens)) for _ in range(samples - len(pairs))]


def check_counts(name: str, pairs: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(1)
    model, _ = reading_of("qwen3")
    rotary, method = Rotary.for_model(model), methods.get(name)
    for tokens, slots in pairs:
        keys, values = torch.randn(2, 1, 2, tokens, 64, generator=generator)
        queries = torch.randn(1, 4, tokens, 64, generator=generator)
        kept = method.compact_layer(0, keys, values, torch.arange(tokens), slots, queries, rotary)
        assert kept.keys.shape == kept.values.shape == (1, 2, slots, 64), (tokens, slots)
        assert kept.keys.isfinite().all()
        assert kept.values.isfinite().all()
        where = places(keys, kept.keys)
        assert where.min() >= 0, (tokens, slots)
        assert (where.diff(dim=-1) > 0).all(), (tokens, slots)


@pytest.mark.parametrize("name", BUDGETED)
def test_kept_slots_equal_the_budget(name):
    check_counts(name, grid(40))


@pytest.mark.full
@pytest.mark.parametrize("name", BUDGETED)
def test_kept_slots_equal_the_budget_everywhere(name):
    check_counts(name, grid(600))


def stirred(model, **options) -> StillCompactor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        compactor = StillCompactor.for_model(model, **options).requires_grad_(False)
        for weight in compactor.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01)
    return compactor


def test_still_keeps_as_many_slots_as_the_budget():
    model, _ = reading_of("qwen3")
    generator, compactor = torch.Generator().manual_seed(1), stirred(model, slots=8, chunk=64)
    for tokens, slots in grid(200):
        keys, values = torch.randn(2, 1, 2, tokens, 64, generator=generator)
        kept = compactor.compact_layer(0, keys, values, torch.arange(tokens), slots)
        assert kept.keys.shape == kept.values.shape == (1, 2, slots, 64), (tokens, slots)
        assert kept.keys.isfinite().all()
        assert kept.values.isfinite().all()


@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "none"])
def test_a_reading_that_a_forward_has_moved_on_is_refused(name):
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 30), queries=True)
    more = {"compactor": stirred(model, slots=8, chunk=64)} if name == "still" else {}
    model(random_ids(1, 4, seed=3), past_key_values=reading.cache)
    with pytest.raises(ValueError, match="holds 34 tokens and input_ids 30: a forward has moved the cache on"):
        methods.get(name, **more).compact(model, reading, slots=8)


def test_truncation_and_streaming_llm_keep_what_they_say():
    model, reading = reading_of("qwen3", 48)
    for slots, sinks in ((20, 4), (8, 4), (5, 2), (1, 0)):
        for view in views(model, reading, slots):
            last = methods.get("truncation").select(view)
            assert (last == torch.arange(48 - slots, 48)).all()
            ends = torch.cat([torch.arange(sinks), torch.arange(48 - slots + sinks, 48)])
            assert (methods.get("streaming_llm").select(view) == ends).all()


@pytest.mark.parametrize("kind", ["qwen3", "yarn", "gemma3", "qwen3_next"])
def test_renumbered_keys_stand_side_by_side(kind):
    model, reading = reading_of(kind, 48)
    for view in views(model, reading, 10):
        plain, moved = (methods.get("streaming_llm", renumber=on).compact_view(view) for on in (False, True))
        stood = torch.cat([torch.arange(4), torch.arange(42, 48)])
        content = unrotate(plain.keys, *view.rotary.cos_sin(view.layer, stood))
        expected = rotate(content, *view.rotary.cos_sin(view.layer, torch.arange(38, 48)))
        torch.testing.assert_close(moved.keys, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(moved.values, plain.values)
        assert not torch.allclose(moved.keys, plain.keys, atol=1e-2)


def test_random_depends_on_seed_and_head():
    model, reading = reading_of("qwen3", 48)
    view = next(views(model, reading, 12))
    first, again, other = (methods.get("random", seed=seed).select(view) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_h2o_accumulates_the_models_own_attention(kind):
    eager = tiny_model(kind, attention="eager")
    ids = random_ids(2, 40)
    attentions = [attention for attention in eager(ids, output_attentions=True).attentions if attention is not None]
    reading = read(eager, ids, queries=True)
    layers = full_attention_layers(eager.config)
    attentions = dict(zip(layers, attentions, strict=True)) if len(attentions) == len(layers) else attentions
    for view in views(eager, reading, 12):
        expected = attentions[view.layer].sum(dim=2).unflatten(1, (2, 2)).sum(dim=2)
        for chunk in (7, 512):
            h2o = methods.get("h2o", chunk=chunk)
            torch.testing.assert_close(h2o.accumulated(view), expected, atol=1e-4, rtol=1e-4)
        heavy = expected[..., :34].topk(6, dim=-1).indices.sort(-1).values
        recent = torch.arange(34, 40).expand(2, 2, 6)
        assert torch.equal(h2o.select(view), torch.cat([heavy, recent], dim=-1))


def test_snapkv_votes_with_its_window_and_keeps_it():
    model, reading = reading_of("qwen3", 48)
    for view in views(model, reading, 20):
        snapkv = methods.get("snapkv", window=8, kernel_size=3)
        queries, keys = view.queries[:, :, -8:], view.keys.repeat_interleave(2, dim=1)
        logits = queries @ keys.mT
        logits[..., 40:] += torch.full((8, 8), -torch.inf).triu(1)
        seen = torch.nn.functional.pad(logits.softmax(-1)[..., :40].mean(dim=2), (1, 1))
        votes = ((seen[..., :-2] + seen[..., 1:-1] + seen[..., 2:]) / 3).unflatten(1, (2, 2)).mean(dim=2)
        score = snapkv.score(view)
        torch.testing.assert_close(score[..., :40], votes, atol=1e-5, rtol=1e-4)
        assert (snapkv.select(view)[..., -8:] == torch.arange(40, 48)).all()
        assert torch.equal(snapkv.select(view)[..., :-8], votes.topk(12, dim=-1).indices.sort(-1).values)


def test_snapkv_with_the_question_votes_with_the_question():
    model, reading = reading_of("qwen3", 48)
    question = random_ids(1, 6, seed=9)
    snapkv = methods.get("snapkv", question_ids=question)
    assert snapkv.query_aware
    assert not methods.get("snapkv").query_aware
    asked = read_after(model, reading, question, queries=True)
    kept = snapkv.compact_rows(model, asked, [54], [10])
    whole = read(model, asked.input_ids, queries=True)
    for view in views(model, whole, 10):
        logits = view.queries[:, :, -6:] @ view.keys.repeat_interleave(2, dim=1).mT
        logits[..., 48:] += torch.full((6, 6), -torch.inf).triu(1)
        seen = torch.nn.functional.avg_pool1d(logits.softmax(-1)[..., :48].mean(dim=2), 5, stride=1, padding=2)
        expected = seen.unflatten(1, (2, 2)).mean(dim=2).topk(10, dim=-1).indices.sort(-1).values
        source = reading.cache.layers[view.layer]
        assert torch.equal(places(source.keys, kept[view.layer].keys), expected)
        assert torch.equal(take(source.values, expected), kept[view.layer].values)


@pytest.mark.parametrize("kind", ["qwen3", "llama3", "qwen3_next"])
def test_expected_attention_equals_a_loop_over_positions(kind):
    model, reading = reading_of(kind, 40)
    method = methods.get("expected_attention", future=30, n_sink=3, epsilon=0.01)
    for view in views(model, reading, 16):
        turns, eye = [], torch.eye(64)[None, None]
        for position in range(40, 70):
            turns.append(rotate(eye, *view.rotary.cos_sin(view.layer, torch.tensor([position])))[0, 0])
        average = torch.stack(turns).mean(dim=0)
        plain = unrotate(view.queries, *view.rotary.cos_sin(view.layer, view.positions))[0, :, 3:]
        scores = []
        for head, queries in enumerate(plain):
            mean, covariance = queries.mean(dim=0) @ average, average.T @ torch.cov(queries.T, correction=0) @ average
            keys = view.keys[0, head // 2, 3:]
            scores.append((keys @ mean + (keys @ covariance * keys).sum(-1) / 2).softmax(-1))
        norms = view.values[0, :, 3:].norm(dim=-1)
        expected = (torch.stack(scores).unflatten(0, (2, 2)).mean(dim=1) + 0.01) * norms
        score = method.score(view)
        assert score[..., :3].isinf().all()
        torch.testing.assert_close(score[0, :, 3:], expected, atol=1e-4, rtol=1e-3)


def test_expected_attention_equals_monte_carlo():
    """Where one position lies ahead, the expected exponential is that of sampled Gaussian queries."""
    generator = torch.Generator().manual_seed(0)
    model, _ = reading_of("qwen3")
    rotary = Rotary.for_model(model)
    mix = 0.15 * torch.randn(64, 64, generator=generator) / 8
    content = 0.1 * torch.randn(64, generator=generator) + torch.randn(4000, 64, generator=generator) @ mix
    tables = rotary.cos_sin(0, torch.arange(4000))
    queries = rotate(content.expand(1, 2, -1, -1), *tables)
    keys = torch.randn(1, 1, 4000, 64, generator=generator)
    view = LayerView(0, keys, keys, torch.arange(4000), 8, queries, rotary)
    options = {"future": 1, "n_sink": 0, "use_vnorm": False}
    ahead = rotate(content[None, None], *rotary.cos_sin(0, torch.tensor([4000])))[0, 0]
    sampled = (ahead @ keys[0, 0].T).exp().mean(dim=0)
    sampled = sampled / sampled.sum()
    score = methods.get("expected_attention", **options).score(view)[0, 0]
    torch.testing.assert_close(score, sampled, rtol=0.12, atol=0)
    plain = methods.get("expected_attention", use_covariance=False, **options).score(view)[0, 0]
    assert (plain / sampled - 1).abs().max() > 0.3


def attention_error(view: LayerView, kept, queries: torch.Tensor) -> float:
    """Relative error of the attention output over kept slots, for scaled queries `[batch, kv_heads, n, head_dim]`."""
    logits = queries @ kept.keys.mT + (0 if kept.beta is None else kept.beta[:, :, None])
    full = (queries @ view.keys.mT).softmax(-1) @ view.values
    return ((logits.softmax(-1) @ kept.values - full).norm() / full.norm()).item()


@pytest.mark.parametrize("choice", ["attention", "omp"])
def test_attention_matching_beats_its_own_keys_without_the_fit(choice):
    model, reading = reading_of("qwen3", 200)
    after = read_after(model, reading, random_ids(1, 30, seed=3), queries=True)
    for slots in (8, 25, 100):
        for view in views(model, reading, slots):
            fitted = methods.get("attention_matching", keys=choice).compact_view(view)
            plain = fitted._replace(values=take(view.values, places(view.keys, fitted.keys)), beta=None)
            biased = plain._replace(beta=fitted.beta)
            unseen = (after.queries[view.layer] * attention_scale(model, view.layer)).unflatten(1, (2, 2)).flatten(2, 3)
            assert attention_error(view, fitted, unseen) < 0.75 * attention_error(view, plain, unseen)
            mass = [
                ((unseen @ kv.keys.mT + (0 if kv.beta is None else kv.beta[:, :, None])).logsumexp(-1)
                 - (unseen @ view.keys.mT).logsumexp(-1)).abs().mean()
                for kv in (plain, biased)
            ]  # fmt: skip
            assert mass[1] < 0.4 * mass[0]
            assert fitted.beta.abs().max() <= 3 + 1e-5


def test_attention_matching_of_all_tokens_changes_nothing():
    model, reading = reading_of("qwen3", 48)
    for view in views(model, reading, 48):
        kept = methods.get("attention_matching").compact_view(view)
        assert kept.beta.abs().max() < 1e-4
        torch.testing.assert_close(kept.values, view.values, atol=1e-3, rtol=1e-3)


def test_attention_matching_weights_are_the_least_squares_ones():
    """In a box that no weight touches, against the closed form."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 2, 200, 6, generator=generator) / 3
    weights = methods.get("attention_matching", iterations=2000, ridge=0.0).fit_weights(mass)
    exact = torch.linalg.lstsq(mass, torch.ones(3, 2, 200, 1)).solution[..., 0]
    torch.testing.assert_close(weights, exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_padded_rows_are_compacted_as_alone(kind, name):
    model, method = tiny_model(kind), methods.get(name)
    rows = [random_ids(tokens, seed=tokens) for tokens in (40, 23, 40, 9)]
    together = read(model, *left_padded(rows), queries=True)
    lengths = row_lengths(together)
    for budget in ({"slots": 12}, {"ratio": 3.5}):
        budgets = method.budgets(lengths, budget.get("slots"), budget.get("ratio"))
        assert budgets == ([12, 12, 12, 9] if "slots" in budget else [11, 6, 11, 2])
        layers = method.compact_rows(model, together, lengths, budgets)
        for index, (row, slots) in enumerate(zip(rows, budgets, strict=True)):
            alone = method.compact_rows(model, read(model, row[None], queries=True), [len(row)], [slots])
            for layer, kv in alone.items():
                if name == "knorm":  # the same token at two positions has the same norm: a tie
                    norms = [x.norm(dim=-1).sort().values for x in (layers[layer].keys[index, :, -slots:], kv.keys[0])]
                    torch.testing.assert_close(*norms)
                    continue
                for ours, theirs in zip(layers[layer], kv, strict=True):
                    if theirs is not None:
                        torch.testing.assert_close(ours[index : index + 1, :, -slots:], theirs, atol=2e-3, rtol=2e-3)
                        assert not ours[index, :, : max(budgets) - slots].any()


def test_budgets_that_do_not_fit_are_refused():
    model, reading = reading_of("qwen3", 48)
    for budget, message in (
        ({"slots": 49}, "slots is 49; it must lie between 1 and the context's 48 tokens"),
        ({"slots": 0}, "slots is 0"),
        ({"ratio": 0.5}, "ratio is 0.5"),
        ({}, "exactly one of slots"),
        ({"slots": 3, "ratio": 3}, "exactly one of slots"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.get("knorm").compact(model, reading, **budget)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "expected_attention", "attention_matching"])
def test_methods_that_need_queries_say_so(name):
    model = tiny_model("qwen3")
    reading = read(model, random_ids(1, 20))
    with pytest.raises(ValueError, match=r"needs the context's queries: call read\(model, ids, queries=True\)"):
        methods.get(name).compact(model, reading, slots=4)


def test_snapkv_with_no_more_slots_than_its_window_votes_with_half_of_them():
    model, reading = reading_of("qwen3", 48)
    for view in views(model, reading, 8):
        snapkv = methods.get("snapkv", window=8)
        voted = snapkv.votes(view.grouped_queries()[..., -4:, :], view.keys).topk(4, dim=-1).indices.sort(-1).values
        assert torch.equal(snapkv.select(view), torch.cat([voted, torch.arange(44, 48).expand(1, 2, 4)], dim=-1))


def test_sinks_of_expected_attention_take_at_most_half_of_the_slots():
    model, reading = reading_of("qwen3", 40)
    for view in views(model, reading, 4):
        score = methods.get("expected_attention", n_sink=4).score(view)
        assert score[..., :2].isinf().all()
        assert score[..., 2:].isfinite().all()


def test_h2o_gives_its_share_to_heavy_hitters():
    model, reading = reading_of("qwen3", 40)
    for view in views(model, reading, 12):
        h2o = methods.get("h2o", heavy=0.25)
        heavy = h2o.accumulated(view)[..., :31].topk(3, dim=-1).indices.sort(-1).values
        assert torch.equal(h2o.select(view), torch.cat([heavy, torch.arange(31, 40).expand(1, 2, 9)], dim=-1))


def test_attention_matching_asks_from_right_behind_the_context():
    model, reading = reading_of("qwen3", 48)
    for view in views(model, reading, 8):
        content = unrotate(view.queries, *view.rotary.cos_sin(view.layer, view.positions))
        where = 48 + torch.arange(48) % 5
        expected = rotate(content, *view.rotary.cos_sin(view.layer, where)).unflatten(1, (2, 2)).flatten(2, 3)
        found = methods.get("attention_matching", future=5, references=10**6).reference_queries(view)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("window", "kernel_size"), [(0, 5), (32, 4), (32, 0)])
def test_snapkv_refuses_no_window_and_even_averages(window, kernel_size):
    with pytest.raises(ValueError, match=rf"window is {window} and kernel_size {kernel_size}; .* kernel_size odd"):
        methods.get("snapkv", window=window, kernel_size=kernel_size)
