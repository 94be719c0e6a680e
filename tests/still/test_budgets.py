"""Splits: exact totals, floors and caps for any context, and errors that name the head and the number."""

from __future__ import annotations

import json
import random

import pytest

from still.budgets import Split, slots_for, slots_of_bytes

UNEVEN = Split({0: (1, 99), 2: (0, 20.5)})


def test_totals_are_exact_between_the_floor_and_the_tokens():
    rng = random.Random(0)
    for _ in range(2000):
        layers, heads, tokens = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 300)
        shares = [0, 1, rng.random(), rng.random() ** 8 * 1e6, rng.random() * 50]
        slots, floor = rng.randint(1, tokens), rng.randint(0, 2)
        weights = {i: tuple(rng.choice(shares) for _ in range(heads)) for i in range(layers)}
        split = Split(weights, floor=min(floor, slots))
        counts = split.counts(tokens, slots)
        every = [n for own in counts.values() for n in own]
        assert sum(every) == slots * layers * heads
        assert split.floor <= min(every) <= max(every) <= tokens


def test_a_ratio_of_tokens_and_slots_gives_the_slots():
    assert all(slots_for(n, n / slots) == slots for n in range(1, 130) for slots in range(1, n + 1))
    assert all(slots_for(256, 512 / slots) == slots // 2 for slots in range(2, 513))
    assert slots_for(100, 7) == 14


def test_slots_follow_the_shares():
    assert UNEVEN.counts(1000, 30) == {0: (1, 98), 2: (1, 20)}
    assert UNEVEN.counts(50, 30) == {0: (19, 50), 2: (1, 50)}
    assert Split.uniform([0, 3], 2).counts(100, 7) == {0: (7, 7), 3: (7, 7)}
    assert Split({0: (0, 0, 0)}, floor=0).counts(10, 1) == {0: (1, 1, 1)}
    assert Split({0: (0, 1)}, floor=0).counts(10, 2) == {0: (0, 4)}


def test_a_split_of_numbers_serves_its_budget_alone():
    split = Split.from_dict({"slots": {"0": [1, 9], "1": [2, 4]}})
    assert split.counts(50, 4) == {0: (1, 9), 1: (2, 4)}
    with pytest.raises(ValueError, match=r"16 slots in all, and the budget is 20 \(5 for each of 4 KV heads\)"):
        split.counts(50, 5)
    with pytest.raises(ValueError, match="layer 0, KV head 1 has 9 slots for 8 tokens"):
        split.counts(8, 4)
    with pytest.raises(ValueError, match=r"layer 1, KV head 0 has 0 slots; .* the floor of 1 or more"):
        Split.from_dict({"slots": {"0": [1, 9], "1": [0, 4]}})


def test_errors_name_the_head_and_the_number(tmp_path):
    with pytest.raises(ValueError, match="share of layer 1, KV head 0 is -2"):
        Split({0: (1, 1), 1: (-2, 1)})
    with pytest.raises(ValueError, match=r"4 slots for 4 KV heads are fewer than a floor of 2 .* layer 2, KV head 0"):
        Split({0: (1, 1), 2: (1, 1)}, floor=2).counts(50, 1)
    with pytest.raises(ValueError, match="layers \\[0, 2\\]; the model's are \\[0, 1\\]"):
        UNEVEN.check([0, 1], 2)
    with pytest.raises(ValueError, match="2 heads in layer 0; the model has 4"):
        UNEVEN.check([0, 2], 4)
    with pytest.raises(ValueError, match="model with fingerprint aa, not for this one \\(bb\\)"):
        Split({0: (1,)}, fingerprint="aa").check([0], 1, "bb")
    for text in ("[]", '{"weights": {"0": ["many"]}}', '{"weights": {"0": [1]}, "heads": 2}', "{"):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(ValueError, match=r"split\.json: "):
            Split.load(tmp_path / "split.json")


def test_a_split_is_read_as_it_was_written(tmp_path):
    for split in (UNEVEN, Split({0: (3, 5)}, floor=2, fingerprint="ab", source="given", exact=True)):
        split.save(tmp_path / "split.json")
        assert Split.load(tmp_path / "split.json") == split
        assert json.loads(json.dumps(split.to_dict())) == split.to_dict()


def test_draws_lie_between_the_split_and_equal_numbers():
    drawn = [UNEVEN.drawn(seed).counts(1000, 30) for seed in range(50)]
    assert drawn[7] == UNEVEN.drawn(7).counts(1000, 30)
    largest = [counts[0][1] for counts in drawn]
    assert len(set(largest)) > 20
    assert min(largest) < 40
    assert max(largest) > 90


def test_a_split_for_other_layers_names_both():
    with pytest.raises(ValueError, match=r"names layers \[0\]; the model's are \[0, 1\]"):
        Split({0: (1, 3)}).check(map(int, ["1", "0"]), 2)


def test_bytes_become_slots():
    assert slots_of_bytes(4 * 2 * 2 * 64 * 4 * 10 + 5, layers=4, kv_heads=2, head_dim=64, itemsize=4) == 10
    with pytest.raises(ValueError, match="100 bytes are less than one slot for each of 8 KV heads takes"):
        slots_of_bytes(100, layers=4, kv_heads=2, head_dim=64, itemsize=4)
