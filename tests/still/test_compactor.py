from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_perceiver import OPTIONS
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

from still import StillCompactor, attention, compactor_io, read, slots_for
from still import compactor as compactor_module
from still.models import NamedModel
from still.rope import full_attention_layers
from still.weights import difference, sample


def stirred(compactor: StillCompactor, amount: float = 0.03) -> StillCompactor:
    """Away from the start, so that every part of it does something."""
    with torch.no_grad():
        for name, weight in compactor.named_parameters():
            if not name.endswith("log_scale"):
                weight.add_(amount * torch.randn_like(weight))
    return compactor


def checksum(cache) -> str:
    digest = hashlib.sha256(str(cache.get_seq_length()).encode())
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor):
                    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def full_logits(model, context, question):
    return model(torch.cat((context, question), dim=1), use_cache=False).logits[:, context.shape[1] :]


def answer(model, cache, question, mask=None):
    return model(**cache.continuation(question, mask), past_key_values=cache).logits


def model_for(options, kind="qwen3"):
    if not options.get("beta"):
        return tiny_model(kind)
    attention.register()
    return tiny_model(kind, attention="still")


@torch.no_grad()
def check_identity(model, options, tokens=40):
    context, question = random_ids(2, tokens), random_ids(2, 5, seed=1)
    reading = read(model, context)
    cache = StillCompactor.for_model(model, slots=8, chunk=64, **options).compact(reading, ratio=1)
    for layer in full_attention_layers(model.config):
        ours, theirs = cache.layers[layer], reading.cache.layers[layer]
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-4)
    logits = answer(model, cache, question)
    torch.testing.assert_close(logits, full_logits(model, context, question), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_as_many_slots_as_tokens_give_the_full_caches_logits(kind):
    check_identity(tiny_model(kind), {})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_starts_at_the_identity(options):
    check_identity(model_for(options), options)


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_starts_at_the_identity_on_every_family(kind, options):
    check_identity(model_for(options, kind), options, tokens=64)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_fewer_slots_are_the_keys_and_values_at_rounded_positions(kind):
    model = tiny_model(kind)
    compactor = StillCompactor.for_model(model, slots=8, chunk=64)
    reading = read(model, random_ids(2, 53))
    for slots in (1, 2, 7, 26, 52):
        index = torch.linspace(0, 52, slots, dtype=torch.float64).round().long() if slots > 1 else torch.tensor([26])
        cache = compactor.compact(reading, slots=slots)
        assert (cache.slots, cache.logical_length) == (slots, 53)
        for layer in full_attention_layers(model.config):
            ours, theirs = cache.layers[layer], reading.cache.layers[layer]
            torch.testing.assert_close(ours.keys, theirs.keys[:, :, index], rtol=0, atol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values[:, :, index], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_compacting_and_asking_leave_the_full_cache_alone(kind):
    model = tiny_model(kind)
    compactor = stirred(StillCompactor.for_model(model, slots=8, chunk=64))
    reading = read(model, random_ids(2, 30))
    before = checksum(reading.cache)
    cache = compactor.compact(reading, ratio=3)
    with torch.no_grad():
        answer(model, cache, random_ids(2, 4))
    assert checksum(reading.cache) == before


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ratio", [1.5, 7])
def test_left_padded_rows_equal_the_rows_alone(kind, ratio):
    model = tiny_model(kind)
    if kind == "gemma3":  # its windows read the same mask columns as the unequal slots of a stock cache
        attention.register()
        model.set_attn_implementation("still")
    compactor = stirred(StillCompactor.for_model(model, slots=8, chunk=64))
    rows, question = [random_ids(n, seed=n) for n in (48, 9, 30, 48)], random_ids(4, 5, seed=2)
    ids, mask = left_padded(rows)
    caches = compactor.prefill(model, ids, mask, ratio=ratio), compactor.compact(read(model, ids, mask), ratio=ratio)
    for cache in caches:
        assert cache.row_slots() == [slots_for(len(row), ratio) for row in rows]
        logits = answer(model, cache, question)
        for row, context in enumerate(rows):
            alone = compactor.prefill(model, context[None], ratio=ratio)
            expected = answer(model, alone, question[row : row + 1])
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("chunk", [40, 16])
def test_an_identity_read_in_chunks_is_the_uncompacted_run(kind, chunk):
    model = tiny_model(kind)
    context, question = random_ids(1, 64), random_ids(1, 6, seed=3)
    compactor = StillCompactor.for_model(model, slots=8, chunk=chunk)
    for keep_last in (None, 0):
        cache = compactor.prefill(model, context, ratio=1, keep_last=keep_last)
        assert (cache.slots, cache.physical_length, cache.logical_length) == (64, 64, 64)
        logits = answer(model, cache, question)
        torch.testing.assert_close(logits, full_logits(model, context, question), rtol=0, atol=2e-3)


@torch.no_grad()
def test_windows_read_in_chunks_take_no_more_bytes_than_in_one_pass():
    model = tiny_model("gemma3")
    compactor = StillCompactor.for_model(model, slots=8, chunk=64)
    whole, parts = (compactor.prefill(model, random_ids(2, 60), ratio=4, chunk=chunk) for chunk in (64, 20))
    assert parts.nbytes == whole.nbytes


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("tokens", "ratio"), [(64, 4), (57, 3), (33, 1.7), (80, 16), (70, 8)])
def test_slots_of_a_context_in_chunks_are_those_of_one_pass(kind, tokens, ratio):
    model = tiny_model(kind)
    compactor = stirred(StillCompactor.for_model(model, slots=4, chunk=16))
    cache = compactor.prefill(model, random_ids(2, tokens), ratio=ratio)
    assert cache.slots == cache.physical_length == slots_for(tokens, ratio)
    assert cache.logical_length == tokens
    assert torch.isfinite(answer(model, cache, random_ids(2, 3))).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_recompacting_keeps_one_size(kind):
    model = tiny_model(kind)
    compactor = stirred(StillCompactor.for_model(model, slots=4, chunk=16))
    for tokens in (33, 64, 80):
        cache = compactor.prefill(model, random_ids(1, tokens), slots=5, mode="recompact")
        assert (cache.slots, cache.physical_length, cache.logical_length) == (5, 5, tokens)
        assert torch.isfinite(answer(model, cache, random_ids(1, 3))).all()


@torch.no_grad()
def test_recompacting_spreads_the_slots_over_all_that_was_read():
    model = tiny_model("qwen3", layers=1)  # the keys of one layer do not depend on what was compacted before
    context = random_ids(1, 64)
    compactor = StillCompactor.for_model(model, slots=4, chunk=16)
    cache = compactor.prefill(model, context, slots=8, mode="recompact", reach=math.inf)
    assert cache.layers[0].slot_positions.tolist() == [[0, 9, 18, 27, 36, 45, 54, 63]]
    full = read(model, context).cache.layers[0]
    for ends in ("keys", "values"):  # a slot between two older ones is a mixture of both
        ours, theirs = getattr(cache.layers[0], ends)[:, :, [0, -1]], getattr(full, ends)[:, :, [0, -1]]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1, 2.5])
def test_padded_rows_read_in_chunks(ratio):
    """Equal to the rows alone where their own chunks begin at chunks of the batch, or nothing is lost."""
    model = tiny_model("qwen3")
    compactor = StillCompactor.for_model(model, slots=8, chunk=16)
    rows = [random_ids(n, seed=n) for n in ((64, 32, 48) if ratio > 1 else (64, 23, 9))]
    ids, mask = left_padded(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cache = compactor.prefill(model, ids, mask, ratio=ratio)
    question = random_ids(3, 4, seed=9)
    logits = answer(model, cache, question)
    for row, context in enumerate(rows):
        alone = compactor.prefill(model, context[None], ratio=ratio)
        assert cache.row_slots()[row] == alone.slots
        expected = answer(model, alone, question[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=2e-3)


def test_a_bf16_base_has_an_fp32_compactor():
    model = tiny_model("qwen3").bfloat16()
    compactor = StillCompactor.for_model(model, slots=8, chunk=64)
    assert {p.dtype for p in compactor.parameters()} == {torch.float32}
    cache = compactor.compact(read(model, random_ids(1, 24)), ratio=3)
    assert cache.layers[0].keys.dtype == cache.layers[1].values.dtype == torch.bfloat16
    (cache.layers[0].keys.float().sum() + cache.layers[1].values.float().sum()).backward()
    assert compactor.layers["0"].key_head.weight.grad.dtype == torch.float32
    for layer in (0, 1):
        full = read(model, random_ids(1, 24)).cache.layers[layer]
        identity = compactor.compact(read(model, random_ids(1, 24)), ratio=1).layers[layer]
        torch.testing.assert_close(identity.keys, full.keys, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(identity.values, full.values, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("limit", [2**30, 1])
@pytest.mark.parametrize("options", [{}, {"beta": True}, {"placement": 8}, {"placement": 8, "scout": 1}],
                         ids=["even", "beta", "placed", "scouted"])  # fmt: skip
def test_layers_together_are_layers_one_by_one(monkeypatch, options, limit):
    monkeypatch.setitem(compactor_module.SOURCES, "cpu", limit)
    model = model_for(options)
    compactor = stirred(StillCompactor.for_model(model, ratio=4, chunk=64, **options))
    compactor.trains()
    cached, where = read(model, random_ids(2, 60)).cache.layers, torch.arange(20, 60)
    states = {i: (cached[i].keys[:, :, 20:], cached[i].values[:, :, 20:]) for i in map(int, compactor.layers)}

    def slopes(made):
        loss = sum((part.keys * part.values).sum() for part in made.values())
        weights = [weight for weight in compactor.parameters() if weight.requires_grad]
        return torch.autograd.grad(loss, weights, allow_unused=True)

    together = compactor.compact_layers(states, where, 7)
    alone = {layer: compactor.compact_layer(layer, *own, where, 7) for layer, own in states.items()}
    for layer, part in alone.items():
        for mine, theirs in zip(together[layer][:3], part[:3], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(slopes(together), slopes(alone), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"beta": True}, {"placement": 8, "scout": 0}], ids=["even", "beta", "scouted"])
def test_what_was_compacted_without_gradients_can_be_trained_behind(options):
    model = model_for(options)
    compactor = stirred(StillCompactor.for_model(model, ratio=4, chunk=64, **options))
    cache = read(model, random_ids(1, 40)).cache
    with torch.no_grad():
        quiet = compactor.compact(cache, ratio=4)
        own = cache.layers[0].keys, cache.layers[0].values
        layer = compactor.compact_layers({0: own}, torch.arange(40), 10)[0]
    assert not any(x.is_inference() for x in layer[:3] if x is not None)
    model.requires_grad_(True)
    answer(model, quiet.clone(), random_ids(1, 5, seed=1)).square().sum().backward()
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    compactor.trains(False)
    with torch.enable_grad():
        loud = compactor.compact(cache, ratio=4)
    answer(model, loud, random_ids(1, 5, seed=1)).square().sum().backward()
    for mine, weight in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-4)


def test_tables_kept_of_the_first_tokens_serve_any_length_and_training(monkeypatch):
    model, options = tiny_model("qwen3"), {"ratio": 4, "placement": 8, "scout": 1}
    compactor = StillCompactor.for_model(model, **options)

    def compacted(by, tokens):
        return by.compact_rows(read(model, random_ids(1, tokens)).cache, [tokens], ratio=4)

    with torch.inference_mode():
        compacted(compactor, 40)
    with torch.enable_grad():  # what was made where no gradient can flow would be refused here
        compactor.trains()
        cache = read(model, random_ids(1, 33)).cache
        for layer in cache.layers:
            layer.keys = layer.keys.clone().requires_grad_()
        made = compactor.compact_rows(cache, [33], ratio=4)
        sum(part.keys.square().sum() for part in made.values()).backward()
    assert compactor.layers["1"].blocks[0].cross.query.bias.grad.abs().max() > 0
    assert all(layer.keys.grad.abs().max() > 0 for layer in cache.layers)
    for kept in (compactor_module.KEPT, 16):
        monkeypatch.setattr(compactor_module, "KEPT", kept)
        for tokens in (40, 17, 90):
            fresh = StillCompactor.for_model(model, **options)
            fresh.load_state_dict(compactor.state_dict())
            made = compacted(compactor, tokens)
            for layer, part in compacted(fresh, tokens).items():
                assert torch.equal(part.keys, made[layer].keys)
                assert torch.equal(part.values, made[layer].values)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_saving_and_loading_is_bit_exact(tmp_path, options):
    model = tiny_model("qwen3_next")
    saved = stirred(StillCompactor.for_model(model, slots=8, chunk=64, seed=5, **options))
    saved.config.steps = 12  # as training sets it
    saved.save_pretrained(tmp_path)
    assert {"compactor.json", "compactor.safetensors"} <= {p.name for p in tmp_path.iterdir()} <= {
        "compactor.json", "compactor.safetensors", "README.md",
    }  # fmt: skip
    for loaded in (StillCompactor.from_pretrained(tmp_path), StillCompactor.from_pretrained(tmp_path, model=model)):
        assert loaded.config == saved.config
        state = loaded.state_dict()
        assert state.keys() == saved.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in saved.state_dict().items())
    full = read(model, random_ids(1, 20)).cache.layers[1]
    layer = (1, full.keys, full.values, torch.arange(20), 6)
    pairs = zip(saved.compact_layer(*layer), loaded.compact_layer(*layer), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def folder(tmp_path):
    StillCompactor.for_model(tiny_model("qwen3"), slots=8, chunk=64, base_model="tiny").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("other", [{"layers": 3}, {"vocab_size": 96}, {"kind": "llama3"}])
def test_another_model_is_refused(folder, other):
    kind = other.pop("kind", "qwen3")
    with pytest.raises(ValueError, match="made for tiny"):
        StillCompactor.from_pretrained(folder, model=tiny_model(kind, **other))
    other["kind"] = kind


def warned(folder, model) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        StillCompactor.from_pretrained(folder, model=model)
    return [str(item.message) for item in said]


def test_other_weights_of_the_same_shape_are_warned_of_once(folder):
    [said] = warned(folder, tiny_model("qwen3", seed=1))
    assert said.startswith("this compactor was trained for tiny and is bound to this one (the shape is the same; a ")
    tuned = tiny_model("qwen3").bfloat16()
    for weight in tuned.parameters():
        weight.mul_(1.01)
    assert warned(folder, tuned) == []


def test_weights_that_are_no_plain_floats_give_no_sample():
    model = tiny_model("qwen3")
    assert difference(sample(model), sample(model.bfloat16())) < 0.005
    for change in ({"dtype": torch.float8_e4m3fn}, {"device": "meta"}):
        assert sample(tiny_model("qwen3").to(**change)) == ""
    packed = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)  # as 4-bit weights are
    model.get_decoder().layers[0].self_attn.q_proj.weight = packed
    assert sample(model) == ""


def test_another_name_is_warned_of_where_no_sample_is_known(folder):
    file = folder / "compactor.json"
    before = {name: value for name, value in json.loads(file.read_text()).items() if name != "base_weights"}
    file.write_text(json.dumps({**before, "steps": 5}))  # trained before there were samples
    model = tiny_model("qwen3", seed=1)
    assert warned(folder, model) == []
    model.config._name_or_path = str(folder)
    assert warned(folder, model) == []
    model.config._name_or_path = "maker/other"
    [said] = warned(folder, model)
    assert "trained for tiny and is bound to maker/other (the names differ)" in said
    assert StillCompactor.from_pretrained(folder).config.base_weights == ""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="takes Linux's /proc for a folder that cannot be written")
def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(OSError, match=r"/proc/self/compactor.safetensors cannot be written"):
        StillCompactor.for_model(tiny_model("qwen3"), slots=8, chunk=64).save_pretrained("/proc/self")


@pytest.mark.parametrize("name", ["compactor.json", "compactor.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        StillCompactor.from_pretrained(folder)


def test_a_compactor_is_found_by_the_name_of_the_model_that_it_comes_with(folder, tmp_path, monkeypatch):
    named = NamedModel("brook-2", tmp_path, (folder, tmp_path / "another"))
    monkeypatch.setattr(compactor_io, "find", {"brook": named, "bare": NamedModel("bare-1", tmp_path)}.get)
    weights = StillCompactor.from_pretrained("brook").state_dict()
    assert all(torch.equal(weights[name], x) for name, x in StillCompactor.from_pretrained(folder).state_dict().items())
    for name in ("bare", "nobody/knows-it"):
        with pytest.raises(FileNotFoundError, match=f"no compactor {name}: not a folder, not a name"):
            StillCompactor.from_pretrained(name)


@pytest.mark.parametrize("size", [0, 5, 100, 20_000, -1])
def test_truncated_weights_are_refused(folder, size):
    file = folder / "compactor.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="no whole file"):
        StillCompactor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: {**config, "dropout": 0.1}, "dropout"),
        (lambda config: {**config, "blocks": 0}, "blocks is 0"),
        (lambda config: {**config, "blocks": 3}, "do not fit"),
        (lambda config: {**config, "bank": 9}, "do not fit"),
        (lambda config: [1], "must be an object"),
    ],
)
def test_a_wrong_config_is_refused(folder, change, named):
    file = folder / "compactor.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=named):
        StillCompactor.from_pretrained(folder)


def test_half_a_config_and_foreign_weights_are_refused(folder):
    save_file(load_file(folder / "compactor.safetensors"), folder / "compactor.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="compactor's weights"):
        StillCompactor.from_pretrained(folder)
    (folder / "compactor.json").write_text('{"bank": 8,')
    with pytest.raises(ValueError, match="no JSON"):
        StillCompactor.from_pretrained(folder)


@torch.no_grad()
def test_lengths_and_ratios_outside_training_warn():
    model = tiny_model("qwen3")
    compactor = StillCompactor.for_model(model, slots=8, chunk=64)
    compactor.config.trained_lengths, compactor.config.trained_ratios = [20, 50], [2.0, 8.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compactor.compact(read(model, random_ids(1, 40)), ratio=4)
        compactor.compact(read(model, random_ids(1, 50)), slots=7)
    for tokens, size, said in (
        (51, {"ratio": 4}, "51 tokens lies outside the trained 20 to 50"),
        (19, {"ratio": 4}, "19 tokens"),
        (40, {"ratio": 16}, "16x lies outside the trained 2x to 8x"),
        (40, {"slots": 40}, "1x lies outside"),
    ):
        with pytest.warns(UserWarning, match=said):
            compactor.prefill(model, random_ids(1, tokens), **size)


@torch.no_grad()
def test_bad_input_is_named():
    model = tiny_model("qwen3")
    compactor = StillCompactor.for_model(model, slots=8, chunk=16)
    ids, reading = random_ids(1, 12), read(model, random_ids(1, 12))
    for call, error, said in (
        (lambda: compactor.compact(reading, ratio=0.5), ValueError, "ratio is 0.5"),
        (lambda: compactor.compact(reading, ratio=float("nan")), ValueError, "ratio is nan"),
        (lambda: compactor.compact(reading, slots=13), ValueError, "slots is 13"),
        (lambda: compactor.compact(reading, slots=0), ValueError, "slots is 0"),
        (lambda: compactor.compact(reading), ValueError, "exactly one"),
        (lambda: compactor.compact(reading, slots=3, ratio=4), ValueError, "exactly one"),
        (lambda: compactor.prefill(model, ids[:, :0], ratio=2), ValueError, "1 token or more"),
        (lambda: compactor.prefill(model, ids[0], ratio=2), ValueError, "batch, tokens"),
        (lambda: compactor.prefill(model, ids, ratio=2, mode="merge"), ValueError, "merge"),
        (lambda: compactor.prefill(model, ids, ratio=2, chunk=0), ValueError, "chunk 0"),
        (lambda: compactor.prefill(model, ids, ids.flip(1) * 0, ratio=2), ValueError, "left padding"),
        (
            lambda: compactor.prefill(model, random_ids(1, 40), ratio=2, mode="recompact"),
            ValueError, "at most a chunk of 16 slots, not 20",
        ),
        (lambda: compactor.compact(reading.cache, ratio=2, input_ids=ids[:, :9]), ValueError, "12 tokens and input_i"),
        (lambda: StillCompactor.for_model(model, slots=3, ratio=2), ValueError, "exactly one"),
        (lambda: StillCompactor.for_model(model, slots=2000), ValueError, "slots is 2000"),
        (lambda: StillCompactor.for_model(model, slots=4, heads=3), TypeError, "heads"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            call()
    model(ids[:, :1], past_key_values=reading.cache)
    with pytest.raises(ValueError, match="moved the cache on"):
        compactor.compact(reading, ratio=2)


def test_a_compactor_without_its_model_says_so(folder):
    compactor = StillCompactor.from_pretrained(folder)
    layer = torch.randn(1, 2, 9, 64)
    with pytest.raises(RuntimeError, match="bind"):
        compactor.compact_layer(0, layer, layer, torch.arange(9), 3)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(50, 33), (5, 50, 33), (30, 50, 45)])
def test_padded_rows_that_are_longer_than_a_chunk_are_prompted_like_others(lengths):
    model = tiny_model("llama3")
    compactor = StillCompactor.for_model(model, ratio=4, chunk=16)
    ids, mask = left_padded([random_ids(n, seed=n) for n in lengths])
    question = random_ids(len(lengths), 5, seed=1)
    for ratio in (2, 8):
        cache = compactor.prefill(model, ids, mask, ratio=ratio)
        assert cache.token_ids.shape[1] == cache.logical_length
        plain = cache.clone()
        wanted = model(**plain.continuation(question), past_key_values=plain).logits[:, -1].argmax(-1)
        own = cache.clone()
        own.token_ids = None
        for each, previous in ((cache, None), (own, ids)):  # ids as the user has them, without columns of padding
            out = model.generate(
                **each.prompt(question, previous_ids=previous), past_key_values=each, do_sample=False, max_new_tokens=1
            )
            assert out[:, -1].tolist() == wanted.tolist()


@torch.no_grad()
def test_a_second_turn_does_not_follow_one_beam_of_several():
    model = tiny_model("qwen3")
    cache = StillCompactor.for_model(model, slots=8, chunk=64).prefill(model, random_ids(1, 20), ratio=1)
    more = {"past_key_values": cache, "do_sample": False, "max_new_tokens": 4}
    out = model.generate(**cache.prompt(random_ids(1, 3)), num_beams=3, **more)
    with pytest.raises(ValueError, match="previous_ids has 1 rows and the cache 3"):
        cache.prompt(random_ids(1, 2), previous_ids=out)


def test_slots_of_chunks_that_divide_evenly_are_all_given():
    model = tiny_model("qwen3")
    compactor = StillCompactor.for_model(model, ratio=4, chunk=256)
    assert compactor.prefill(model, random_ids(1, 512), slots=186).slots == 186  # 256 / (512 / 186) is below 93
