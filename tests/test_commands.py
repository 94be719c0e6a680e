"""`still compact`, `still ask` and `still inspect` on a tiny random model, and everything that can be wrong."""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
import torch
from tiny_models import qwen3_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from still import StillCache, StillCompactor, methods, models
from still.attention import attending
from still.cli import main
from still.commands import METHODS
from still.harness.pocket.tokenizer import train_tokenizer
from still.prompts import render

LEASE = "This lease of Mill House begins on 3 May 2031 and ends on 9 June 2044. The yearly rent is $1,234,567.\n"
AMENDMENT = "The yearly rent of Mill House changes to $765,432. Everything else stays as it was agreed before.\n"
QUESTION = "When does the lease of Mill House end?"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny random model and a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(matters=20)
    tiny_model(qwen3_config(vocab_size=len(tokenizer), eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, base, monkeypatch):
    """A working folder with two documents, in which `model` is the tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lease.txt").write_text(LEASE)
    (tmp_path / "amendment.txt").write_text(AMENDMENT)
    (tmp_path / "model").symlink_to(base)
    return tmp_path


def compact(*arguments: str) -> int:
    """`still compact` with an untrained compactor unless another method is named."""
    how = () if "--method" in arguments else ("--compactor", "untrained")
    return main(["compact", *how, "-o", "lease.safetensors", "model", "lease.txt", *arguments])


def full_answer(base, documents, question: str, new: int) -> str:
    """What the model says with nothing compacted."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    context, [asked] = render(tokenizer, documents, [question])
    ids = torch.tensor([context + asked])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[-1] :], skip_special_tokens=True)


def test_at_ratio_one_the_answer_is_that_of_the_whole_context(work, base, capsys):
    assert compact("amendment.txt", "--ratio", "1") == 0
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "12"]) == 0
    answer = capsys.readouterr().out
    documents = [("lease.txt", LEASE), ("amendment.txt", AMENDMENT)]
    assert answer.strip() == full_answer(base, documents, QUESTION, 12).strip()
    assert answer.strip()


def test_ask_says_slots_bytes_and_seconds_apart_from_the_answer(work, capsys):
    assert compact("--slots", "5") == 0
    wrote = capsys.readouterr().err
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "3"]) == 0
    shown = capsys.readouterr()
    size = 2 * 2 * 2 * 5 * 64 * 4  # layers, keys and values, heads, slots, head dim, bytes
    for text in (wrote, shown.err):
        assert "5 slots" in text
        assert f"{size / 1000:.3g} kB" in text
    assert " s" in shown.err
    assert "slots" not in shown.out


def test_inspect_tells_how_the_file_was_made(work, capsys):
    assert compact("amendment.txt", "--ratio", "4") == 0
    capsys.readouterr()
    assert main(["inspect", "lease.safetensors", "--verify", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    made_with = about["provenance"]
    documents = [("lease.txt", LEASE), ("amendment.txt", AMENDMENT)]
    tokens = len(render(AutoTokenizer.from_pretrained("model"), documents)[0])
    assert about["slots"] == tokens // 4
    assert about["logical_length"] == tokens
    assert [document["name"] for document in made_with["documents"]] == ["lease.txt", "amendment.txt"]
    assert made_with["method"] == "still"
    assert made_with["versions"]["torch"] == torch.__version__
    assert main(["inspect", "lease.safetensors"]) == 0
    table = capsys.readouterr().out
    assert "lease.txt" in table
    assert str(tokens) in table


def test_a_question_is_asked_in_the_dtype_of_the_file(work, capsys):
    assert compact("--dtype", "bfloat16", "--slots", "5") == 0
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "2"]) == 0
    assert f"{2 * 2 * 2 * 5 * 64 * 2 / 1000:.3g} kB" in capsys.readouterr().err.splitlines()[-1]


def test_the_methods_offered_are_those_that_a_file_can_hold():
    assert set(METHODS) == {name for name, method in methods.METHODS.items() if not method.fixed_size}


@pytest.mark.parametrize(
    "words", [["truncation"], ["snapkv", "--option.window", "4"], ["attention_matching"], ["random", "--option.seed=3"]]
)
def test_every_method_goes_through_a_file(work, capsys, words):
    assert compact("--method", *words, "--slots", "8") == 0
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_trained_compactor_is_taken_from_its_folder(work, capsys):
    model = models.load("model").model
    compactor = StillCompactor.for_model(model, slots=8, chunk=64)
    with torch.no_grad():
        for parameter in compactor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    compactor.save_pretrained("compactor")
    words = ["compact", "model", "lease.txt", "--slots", "8", "--compactor", "compactor", "-o", "a.safetensors"]
    assert main(words) == 0
    assert compact("--slots", "8") == 0
    trained, fresh = (StillCache.load(name, model) for name in ("a.safetensors", "lease.safetensors"))
    ids = fresh.token_ids
    expected = compactor.prefill(model, ids, slots=8)
    assert torch.equal(trained.layers[1].values, expected.layers[1].values)
    assert not torch.equal(trained.layers[1].values, fresh.layers[1].values)


def test_a_compactor_with_a_bias_reads_a_document_of_several_chunks(work, capsys):
    model = models.load("model").model
    assert model.config._attn_implementation != "still"
    compactor = StillCompactor.for_model(model, ratio=4, chunk=8, beta=True)
    with torch.no_grad():
        for layer in compactor.layers.values():
            layer.beta_head.weight.normal_(std=0.3)
    compactor.save_pretrained("compactor")
    words = ["compact", "model", "lease.txt", "--ratio", "4", "--compactor", "compactor", "-o", "lease.safetensors"]
    assert main(words) == 0
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "2"]) == 0
    with attending(model):
        made = StillCache.load("lease.safetensors", model)
        expected = compactor.prefill(model, made.token_ids, ratio=4)
    assert made.logical_length > 2 * 8
    assert made.layers[1].beta.abs().max() > 0.01
    torch.testing.assert_close(made.layers[1].beta, expected.layers[1].beta)
    torch.testing.assert_close(made.layers[1].values, expected.layers[1].values)


def test_a_document_from_stdin(work, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(LEASE))
    assert main(["compact", "model", "-", "--compactor", "untrained", "-o", "lease.safetensors"]) == 0
    assert "stdin" in capsys.readouterr().err
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "2"]) == 0


def test_a_plugin_names_a_model(work, base, monkeypatch, capsys):
    StillCompactor.for_model(models.load("model").model, ratio=4, chunk=64).save_pretrained("shipped")
    (work / "shelf.py").write_text(
        "from pathlib import Path\nfrom still.models import NamedModel\n"
        f"HERE = Path({str(work)!r})\n"
        "def resolve(name):\n    return NamedModel(name + '-1', HERE / 'model', (HERE / 'shipped',))\n"
    )
    info = work / "shelf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[still.models]\nshelf-tiny = shelf:resolve\n")
    monkeypatch.syspath_prepend(str(work))
    assert "shelf-tiny" in models.names()
    assert models.find("shelf-tiny").name == "shelf-tiny-1"
    assert models.find("pocketful") is None
    assert main(["compact", "shelf-tiny", "lease.txt", "-o", "lease.safetensors"]) == 0
    assert main(["ask", "lease.safetensors", QUESTION, "--max-new-tokens", "2"]) == 0
    assert "shelf-tiny-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "0.5"], "ratio is 0.5; it must be 1 or more"),
        (["--ratio", "nan"], "ratio is nan"),
        (["--slots", "5000"], "slots is 5000; it must lie between 1 and the context's"),
        (["--slots", "0"], "slots is 0"),
        (["empty.txt"], "empty.txt is empty; there is nothing to read"),
        (["absent.txt"], "absent.txt: No such file or directory"),
        (["model"], "model is a folder; name the text files in it"),
        (["scan.pdf"], "scan.pdf is not UTF-8 text (byte 1 is 0xff)"),
        (["--method", "snapkv", "--option.windows", "4"], "no hyper-parameter 'windows'"),
        (["--method", "snapkv", "--compactor", "x"], "--compactor belongs to the method still, not to snapkv"),
        (["--option.window", "4"], "the method still takes no --option.window"),
        (["-o", "absent/x.safetensors"], "the folder absent does not exist"),
        (["-o", "."], "is a folder; name a file"),
        (["--compactor", "model"], "compactor"),
        (["--ratio", "inf"], "ratio is inf"),
        (["--device", "abacus"], "device is 'abacus', which is not here"),
        (["--dtype", "fp33"], "dtype is 'fp33'; take float32, bfloat16, float16, or auto"),
        (["--method", "snapkv", "--option.window", "abc"], "window of snapkv is 'abc'; it must be a whole number"),
        (["--method", "snapkv", "--option.window", "-3"], "window of snapkv is -3"),
    ],
)
def test_bad_input_to_compact(work, capsys, words, message):
    (work / "empty.txt").write_text(" \n")
    (work / "scan.pdf").write_bytes(b"%\xff\xfe")
    before = sorted(work.iterdir())
    assert compact(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(work.iterdir()) == before, "something was left half-written"


def test_a_model_without_a_compactor_says_what_to_do(work, capsys):
    assert main(["compact", "model", "lease.txt", "-o", "lease.safetensors"]) == 2
    assert "comes with no compactor; pass --compactor PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pockets", "no model 'pockets' (did you mean 'pocket'?): not a name that comes with still ("),
        ("empty", "holds no model"),
    ],
)
def test_a_model_that_is_not_there(work, capsys, model, message):
    (work / "empty").mkdir()
    assert main(["compact", model, "lease.txt", "-o", "lease.safetensors", "--method", "truncation"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_whose_files_are_cut_short(work, capsys):
    for name in ("model.safetensors", "tokenizer.json"):
        path = work / "model" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert main(["compact", "model", "lease.txt", "-o", "lease.safetensors", "--method", "truncation"]) == 2
        error = capsys.readouterr().err
        assert "the model model" in error
        assert "Traceback" not in error
        path.write_bytes(whole)


@pytest.fixture
def matter(work):
    """A compact cache on disk."""
    assert compact("--ratio", "4") == 0
    return work / "lease.safetensors"


def refused(*arguments: str, capsys) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("command", [["ask", "cut.safetensors", QUESTION], ["inspect", "cut.safetensors"]])
def test_a_truncated_file_is_refused(matter, capsys, share, command):
    data = matter.read_bytes()
    (matter.parent / "cut.safetensors").write_bytes(data[: int(share * len(data))])
    assert "cut.safetensors" in refused(*command, capsys=capsys)


def test_a_flipped_bit_is_found_unless_told_not_to_look(matter, capsys):
    data = bytearray(matter.read_bytes())
    data[-100] ^= 4
    matter.write_bytes(data)
    assert "is corrupt" in refused("ask", str(matter), QUESTION, capsys=capsys)
    assert "is corrupt" in refused("inspect", str(matter), "--verify", capsys=capsys)
    assert main(["ask", str(matter), QUESTION, "--max-new-tokens", "2", "--no-verify"]) == 0
    assert main(["inspect", str(matter)]) == 0


def test_another_model_is_refused(matter, base, capsys):
    tiny_model(qwen3_config(layers=3, vocab_size=4096)).save_pretrained("other")
    for name in os.listdir(base):
        if name.startswith(("tokenizer", "chat_template", "special")):
            shutil.copy(base / name, "other")
    assert "model" in refused("ask", str(matter), QUESTION, "--model", "other", capsys=capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.safetensors", QUESTION], "absent.safetensors"),
        (["lease.txt", QUESTION], "lease.txt"),
        (["lease.safetensors", "  "], "the question is empty"),
        (["lease.safetensors", QUESTION, "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be 1 or more"),
    ],
)
def test_bad_input_to_ask(matter, capsys, words, message):
    assert message in refused("ask", *words, capsys=capsys)


def test_a_question_does_not_change_the_file(matter):
    before = matter.read_bytes()
    assert main(["ask", str(matter), QUESTION, "--max-new-tokens", "3"]) == 0
    assert matter.read_bytes() == before
