"""Caches on disk: bit-exact, checked, and refused for another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cache_cases import StridedCompactor, compact
from safetensors import safe_open
from tiny_models import CONFIGS, left_padded, llama_config, qwen3_config, random_ids, tiny_model

import still.attention
from still.cache import StillCache
from still.cache_io import read_header, verify_data
from still.compactor import StillCompactor

T = 40
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture
def saved(model, tmp_path):
    return compact(model, random_ids(2, T), 10).save(tmp_path / "matter.safetensors")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_loaded_cache_answers_as_the_saved_one(kind, tmp_path):
    model, question = tiny_model(kind), random_ids(2, 5, seed=1)
    cache = compact(model, random_ids(2, T), 10)
    path = cache.save(tmp_path / "folder" / "matter.safetensors")
    loaded = StillCache.load(path, model, verify=True)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        for name in ("keys", "values"):
            if getattr(a, name, None) is not None:
                assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(loaded.token_ids, cache.token_ids)
    assert loaded.nbytes == cache.nbytes
    assert loaded.describe() == cache.describe()
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    inputs = cache.prompt(question)
    wanted = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(model.generate(**loaded.prompt(question), past_key_values=loaded, **GREEDY), wanted)
    again = StillCache.load(path, model.config, verify=True)  # decoding has changed nothing on disk
    assert torch.equal(model.generate(**inputs, past_key_values=again, **GREEDY), wanted)


def test_half_precision_beta_and_padded_rows_are_kept_bit_for_bit(tmp_path):
    still.attention.register()
    model = tiny_model(attention="still").bfloat16()
    ids, mask = left_padded([random_ids(40), random_ids(25, seed=1)])
    beta = torch.randn(2, 2, 20).bfloat16()
    cache = compact(model, ids, ratio=2, mask=mask, beta=beta)
    question = random_ids(2, 5, seed=1)
    loaded = StillCache.load(cache.save(tmp_path / "matter"), model)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(a.beta, b.beta)
        assert torch.equal(a.live, b.live)
    wanted = model(**cache.continuation(question), past_key_values=cache).logits
    assert torch.equal(model(**loaded.continuation(question), past_key_values=loaded).logits, wanted)


def test_a_cache_that_compacts_itself_goes_on_after_loading(model, tmp_path):
    cache = StillCache(StridedCompactor(16), 4, keep_last=4, config=model.config)
    for part in random_ids(1, 48).split(16, dim=1):
        model(part, past_key_values=cache)
    path = cache.save(tmp_path / "matter")
    loaded = StillCache.load(path, model, compactor=StridedCompactor(16))
    more = random_ids(1, 16, seed=1)
    wanted = model(more, past_key_values=cache).logits
    assert torch.equal(model(more, past_key_values=loaded).logits, wanted)
    assert loaded.slots == cache.slots == 12
    assert loaded.describe()["compacts_itself"]["keep_last"] == 4
    assert StillCache.load(path, model).policy is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's table of mappings")
def test_the_tensors_are_memory_mapped(model, saved):
    loaded = StillCache.load(saved, model)
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(saved) in line]
    start, end = (int(x, 16) for x in mapped[0].split()[0].split("-"))
    assert all(start <= layer.keys.data_ptr() < end for layer in loaded.layers)


def test_the_file_says_what_made_it(model, saved):
    header = read_header(saved)
    description = header["description"]
    assert (description["slots"], description["logical_length"], description["ratio"]) == (10, T, 4)
    assert description["provenance"] == {"method": "strided", "seed": 0}
    assert description["nbytes"] == 2 * 2 * 2 * 2 * 10 * 64 * 4
    assert {"torch", "transformers"} <= set(header["versions"])
    assert len(verify_data(saved)) == 64
    with safe_open(saved, framework="pt") as file:
        assert "token_ids" in file.keys()  # noqa: SIM118


def test_truncated_and_corrupt_files_are_caught(model, saved, tmp_path):
    whole = saved.read_bytes()
    broken = tmp_path / "broken"
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated|no complete header"):
            StillCache.load(broken, model)
    broken.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        StillCache.load(broken, model)
    for at in (len(whole) - 1, len(whole) // 2, whole.index(b"strided")):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        broken.write_bytes(flipped)
        with pytest.raises(ValueError, match="is corrupt"):
            StillCache.load(broken, model, verify=True)
    broken.write_bytes(b"\x10" + b"\0" * 7 + b"no safetensors..")
    with pytest.raises(ValueError, match="no cache written by StillCache"):
        read_header(broken)
    with pytest.raises(FileNotFoundError):
        StillCache.load(tmp_path / "missing", model)


def test_a_foreign_model_is_refused(saved):
    for config, field in (
        (llama_config(), "model_type"),
        (qwen3_config(layers=3), "num_hidden_layers"),
        (qwen3_config(num_key_value_heads=4), "num_key_value_heads 2 there, 4 here"),
        (qwen3_config(head_dim=32), "head_dim"),
        (qwen3_config(vocab_size=98), "vocab_size"),
        (qwen3_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), "rope_parameters"),
    ):
        with pytest.raises(ValueError, match=f"made for another model.*{field}"):
            StillCache.load(saved, config)


def test_names_and_revisions_count_where_both_are_known(model, tmp_path):
    named = qwen3_config()
    named._name_or_path, named._commit_hash = "maker/one", "abc"
    cache = compact(tiny_model(named), random_ids(1, T), 10)
    path = cache.save(tmp_path / "matter")
    StillCache.load(path, qwen3_config())
    other = qwen3_config()
    other._name_or_path = "maker/two"
    with pytest.raises(ValueError, match="name 'maker/one' there, 'maker/two' here"):
        StillCache.load(path, other)
    other._name_or_path, other._commit_hash = "maker/one", "def"
    with pytest.raises(ValueError, match="revision 'abc' there, 'def' here"):
        StillCache.load(path, other)


def test_other_weights_of_the_same_shape_are_refused(tmp_path):
    model = tiny_model("qwen3", seed=3)
    cache = StillCompactor.for_model(model, slots=8, chunk=64).prefill(model, random_ids(1, T), slots=8)
    path = cache.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"a was made for other weights .* differs by \d\d+%\): load the model"):
        StillCache.load(path, tiny_model("qwen3", seed=4))
    tuned = tiny_model("qwen3", seed=3)
    for weight in tuned.parameters():
        weight.mul_(1.01)
    StillCache.load(path, tuned)
    StillCache.load(path, qwen3_config())  # a config says nothing of weights


def test_files_without_a_sample_of_the_weights_are_taken(tmp_path):
    path = compact(tiny_model("qwen3", seed=3), random_ids(1, T), 10).save(tmp_path / "matter")
    assert read_header(path)["description"]["model"]["weights"] == ""  # as if written before there were any
    StillCache.load(path, tiny_model("qwen3", seed=4))


def test_a_model_of_another_dtype_is_refused(model, saved):
    with pytest.raises(ValueError, match="in float32, and the model runs in bfloat16: load the model with dtype="):
        StillCache.load(saved, tiny_model("qwen3").bfloat16())


def test_a_place_that_cannot_be_written_is_named(model, saved):
    cache, place = StillCache.load(saved, model), saved.with_name("x" * 250)
    with pytest.raises(OSError, match=f"{place} cannot be written"):
        cache.save(place)
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]


def test_a_failed_save_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()
    cache = StillCache.load(saved, model)
    cache.provenance["made by"] = object()
    with pytest.raises(TypeError):
        cache.save(saved)
    assert saved.read_bytes() == before
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]
    with pytest.raises(ValueError, match="empty"):
        StillCache(StridedCompactor(16), config=model.config).save(saved)


def test_the_description_is_plain(model):
    text = json.loads(json.dumps(compact(model, random_ids(2, T), 10).describe()))
    assert (text["slots"], text["physical_length"], text["raw_tokens"], text["beta"]) == (10, 10, 0, False)
    assert (text["compact_layers"], text["other_layers"], text["model"]["model_type"]) == ([0, 1], [], "qwen3")
