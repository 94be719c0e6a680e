from __future__ import annotations

import pytest
import torch

from still import StillConfig
from still.perceiver import POWER_GAIN, LayerPerceiver, directions, own_turns, resampled
from still.rope import Turning

HEAD_DIM, HEADS = 64, 2
OPTIONS = {
    "canonical": {},
    "one block": {"blocks": 1},
    "three blocks": {"blocks": 3},
    "feed-forward": {"feed_forward": 48},
    "beta": {"beta": True},
    "shared bank": {"shared_bank": True},
    "fractional positions": {"fractional_positions": True},
    "wide latent": {"latent_width": 160},
    "learned scale": {"learned_scale": True},
    "gain": {"gain": True},
    "open start": {"open_start": True, "learned_scale": True},
}


def perceiver(**options) -> LayerPerceiver:
    return LayerPerceiver(HEAD_DIM, HEADS, StillConfig(**{"bank": 8, **options}))


def own_tables(layer, positions, where):
    start = positions[:, :1]
    return layer.turns(where, start), layer.turns(positions, start)


def run(layer, keys, values, positions, slots):
    where = layer.latent_positions(positions, slots)
    return *layer(keys, values, slots, own_tables(layer, positions, where)), where


def tokens(count, batch=2, spread=1.0):
    return tuple(spread * torch.randn(batch, HEADS, count, HEAD_DIM) for _ in range(2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("count", [1, 2, 8, 33])
def test_as_many_slots_as_tokens_is_the_identity(options, count):
    keys, values = tokens(count, spread=3.0)
    with torch.no_grad():
        small, mixed, beta, where = run(perceiver(**options), keys, values, torch.arange(count)[None], count)
    torch.testing.assert_close(small, keys, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed, values, rtol=0, atol=1e-4)
    assert torch.equal(where, torch.arange(count)[None].to(where))
    assert (beta is None) != options.get("beta", False)
    assert beta is None or (beta.shape == (2, HEADS, count) and not beta.any())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("count", "slots", "first"), [(41, 11, 0), (41, 11, 100_000), (31, 2, 5), (1050, 21, 3)])
def test_fewer_slots_are_a_strided_copy(options, count, slots, first):
    if options.get("fractional_positions") and (count - 1) % (slots - 1):
        pytest.skip("latents between tokens mix their neighbours")
    keys, values = tokens(count, batch=1)
    with torch.no_grad():
        positions = torch.arange(first, first + count)[None]
        small, mixed, _, where = run(perceiver(**options), keys, values, positions, slots)
    index = torch.linspace(first, first + count - 1, slots, dtype=torch.float64).round().long() - first
    assert torch.equal(where, (first + index)[None].to(where))
    torch.testing.assert_close(small, keys[:, :, index], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed, values[:, :, index], rtol=0, atol=1e-4)


def test_rows_stand_at_positions_of_their_own():
    layer, (keys, values) = perceiver(), tokens(12)
    positions = torch.stack((torch.arange(12), torch.tensor([0, 3, 6, 9, *range(20, 28)])))
    together = run(layer, keys, values, positions, 5)
    for row in range(2):
        alone = run(layer, keys[row : row + 1], values[row : row + 1], positions[row : row + 1], 5)
        for part, single in zip(together, alone, strict=True):
            assert part is None or torch.allclose(part[row : row + 1].float(), single.float(), atol=1e-6)


def test_one_slot_stands_in_the_middle():
    assert perceiver().latent_positions(torch.arange(10, 21)[None], 1).tolist() == [[15]]
    assert perceiver(fractional_positions=True).latent_positions(torch.arange(10, 20)[None], 1).tolist() == [[14.5]]


def test_the_kernel_of_the_start_is_as_sharp_as_published():
    """Weight 0.974 on the nearest of 8,192 tokens for 1,024 slots at a latent width of 256."""
    width, count, slots = 256, 8192, 1024
    unit = torch.full((1, 1, 1, width), width**-0.5)
    where = torch.linspace(0, count - 1, slots, dtype=torch.float64)[None, 100:130]
    query = directions(unit.repeat(1, 1, 30, 1), own_turns(where, width, 10.0))
    key = directions(unit.repeat(1, 1, count, 1), own_turns(torch.arange(count)[None], width, 10.0))
    nearest = (width * query @ key.transpose(-1, -2)).softmax(-1).amax(-1)
    on_tokens = directions(unit.repeat(1, 1, 30, 1), own_turns(where.round(), width, 10.0))
    assert (width * on_tokens @ key.transpose(-1, -2)).softmax(-1).amax(-1).min() > 0.999
    assert 0.6 < nearest.mean() < 1


def test_the_bank_is_itself_at_its_size_and_resampled_elsewhere():
    layer = perceiver(bank=5)
    torch.nn.init.normal_(layer.bank)
    assert torch.equal(resampled(layer.bank, 5), layer.bank)
    wide = resampled(layer.bank, 9)
    torch.testing.assert_close(wide[:, ::2], layer.bank, rtol=0, atol=1e-6)
    torch.testing.assert_close(wide[:, 1::2], (layer.bank[:, 1:] + layer.bank[:, :-1]) / 2, rtol=0, atol=1e-6)
    assert resampled(layer.bank, 1).shape == (HEADS, 1, 2 * HEAD_DIM)
    assert perceiver(shared_bank=True).bank.shape[0] == 1


def test_a_learned_scale_gets_gradients_and_a_fixed_one_none():
    keys, values = tokens(12)
    for learned in (False, True):
        layer = perceiver(learned_scale=learned)
        small, mixed, _, _ = run(layer, keys, values, torch.arange(12)[None], 4)
        (small.square().sum() + mixed.sum()).backward()
        assert (layer.blocks[0].cross.log_scale.grad is not None) == learned


def test_trained_weights_use_all_tokens_and_the_order_of_slots():
    layer, (keys, values) = perceiver(), tokens(12, batch=1)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if not name.endswith("log_scale"):
                weight.add_(0.05 * torch.randn_like(weight))
        whole = run(layer, keys, values, torch.arange(12)[None], 4)[1]
        values[0, 0, 5] += 1
        touched = (run(layer, keys, values, torch.arange(12)[None], 4)[1] - whole).abs().amax(-1)[0]
    assert (touched[0] > 1e-6).all()
    assert not touched[1].any()  # heads are independent


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"latent_width": 64}, "latent_width is 64"),
        ({"latent_width": 131}, "latent_width is 131"),
        ({"bank": 0}, "bank is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"chunk": -1}, "chunk is -1"),
        ({"feed_forward": -4}, "feed_forward is -4"),
        ({"rms_eps": 0.0}, "rms_eps is 0.0"),
        ({"rope_base": 1.0}, "rope_base 1.0"),
    ],
)
def test_options_without_sense_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        perceiver(**options)


def test_an_open_start_lets_gradients_into_parts_that_add_nothing_yet():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, HEADS, 24, HEAD_DIM)
    moved = {}
    for name in ("canonical", "open start"):
        layer = perceiver(**OPTIONS[name])
        with torch.no_grad():  # a first step has made the later block speak
            torch.nn.init.eye_(layer.blocks[1].cross.output.weight)
        run(layer, keys, values, torch.arange(24)[None], 6)[1].square().sum().backward()
        moved[name] = layer.blocks[1].cross.key.weight.grad.norm().item()
    assert moved["open start"] > 100 * moved["canonical"]


def test_a_lower_first_scale_mixes_neighbours_and_keeps_the_place():
    keys, values = tokens(33, batch=1)
    positions = torch.arange(33)[None]
    with torch.no_grad():
        copied = run(perceiver(), keys, values, positions, 5)[0]
        layer = perceiver(first_scale=16.0, learned_scale=True)
        mixed = run(layer, keys, values, positions, 5)[0]
    nearest = keys[:, :, [0, 8, 16, 24, 32]]
    torch.testing.assert_close(copied, nearest, atol=1e-4, rtol=1e-4)
    assert (mixed - nearest).abs().mean() > 0.1
    similarity = torch.nn.functional.cosine_similarity(mixed[:, :, :, None], keys[:, :, None], dim=-1)
    assert similarity.argmax(-1).tolist() == [[[0, 8, 16, 24, 32]] * HEADS]
    with pytest.raises(ValueError, match="first_scale is 0"):
        StillConfig(first_scale=0)


def test_a_gain_makes_slots_louder_by_powers_of_the_ratio():
    keys, values = tokens(33, batch=1)
    positions = torch.arange(33)[None]
    layer, plain = perceiver(gain=True), perceiver()
    with torch.no_grad():
        layer.gain[1, 1] = 0.5 / POWER_GAIN  # the second head's values
        layer.gain[0, 0] = -0.25 / POWER_GAIN  # the first head's keys
        for slots in (33, 11, 3):
            (loud_keys, loud_values), (own_keys, own_values) = (
                run(each, keys, values, positions, slots)[:2] for each in (layer, plain)
            )
            ratio = 33 / slots
            torch.testing.assert_close(loud_values[:, 1], own_values[:, 1] * ratio**0.5)
            torch.testing.assert_close(loud_keys[:, 0], own_keys[:, 0] * ratio**-0.25)
            torch.testing.assert_close(loud_values[:, 0], own_values[:, 0])
            torch.testing.assert_close(loud_keys[:, 1], own_keys[:, 1])
            where = own_tables(layer, positions, layer.latent_positions(positions, slots))
            alone = layer(keys[:, 1:], values[:, 1:], slots, where, heads=[1])
            torch.testing.assert_close(alone[1][:, 0], loud_values[:, 1])


@pytest.mark.parametrize("placement", [0, 8])
def test_slots_without_gradients_are_the_same_and_leave_the_cache_alone(placement):
    layer = perceiver(open_start=True, learned_scale=True, placement=placement)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    keys, values = torch.randn(2, 2, HEADS, 40, HEAD_DIM)
    positions = torch.arange(40)[None]
    angle = torch.rand(1, 40, HEAD_DIM // 2).repeat(1, 1, 2)
    turns = own_tables(layer, positions, layer.latent_positions(positions, 6))
    given = {"strip": Turning(angle.cos(), angle.sin()), "phase": torch.tensor([0.25, 0.75]) if placement else None}
    before = keys.clone(), values.clone()
    with torch.no_grad():
        found = layer(keys, values, 6, turns, **given)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    wanted = layer(keys.clone().requires_grad_(), values, 6, turns, **given)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other)
