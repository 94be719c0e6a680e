"""The sweep end to end on a tiny random model: cells, resuming, refusing, equal slots, rows that repeat."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from still import methods
from still.budgets import Split, slots_for
from still.compactor import StillCompactor
from still.config import fingerprint
from still.eval.matters import generate_matter, question_set
from still.eval.matters.lab_format import write_lab_tasks
from still.harness import sweep as sweeps
from still.harness.cells import CONTROLS, METHODS, WITHOUT_RATIO, Cell, CellStore, SweepConfig, cells_of
from still.harness.commands import COMMANDS
from still.harness.pocket.tokenizer import train_tokenizer
from still.harness.rows import make_rows
from still.harness.sweep import asked_at_once, run_sweep

SECONDS = ("compact_seconds", "read_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder and, in `compactors/`, compactors of training seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(matters=60)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=64,
            num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        model = Qwen3ForCausalLM(shape)
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.data.mul_(6)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for seed in (0, 1):
            compactor = StillCompactor.for_model(model, slots=16, chunk=256, seed=seed)
            for weight in compactor.parameters():
                weight.data.add_(1e-3 * torch.randn_like(weight))
            compactor.save_pretrained(folder / "compactors" / f"seed-{seed}")
    return folder


def settings(folder, **changes) -> SweepConfig:
    """Two tiny matters, three questions each, at two ratios."""
    base = SweepConfig(
        model=str(folder / "model"), compactor=(str(folder / "compactors"),), difficulty="tiny", count=2, questions=3,
        ratios=(2, 8), max_new_tokens=4, methods=("still", "truncation"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def rows_of(store: CellStore) -> list[dict]:
    """The rows without what differs from run to run."""
    rows = make_rows(store.results(), store.header)
    return [{name: value for name, value in row.items() if name not in SECONDS} for row in rows]


def sweep(config, output) -> CellStore:
    return run_sweep(config, output, device="cpu", progress=False)


@pytest.fixture(scope="module")
def everything(folder, tmp_path_factory):
    """A sweep of every method, seeds 0 and 1."""
    config = settings(folder, methods=METHODS, seeds=(0, 1))
    return sweep(config, tmp_path_factory.mktemp("all") / "out")


def test_every_method_keeps_exactly_the_slots_of_its_ratio(everything):
    results = everything.results()
    assert {result["cell"]["method"] for result in results} == set(METHODS)
    for result in results:
        cell, record = result["cell"], result["record"]
        if cell["ratio"] is not None:
            assert record["slots"] == slots_for(record["tokens"], cell["ratio"]), cell
            per_slot = record["full_nbytes"] / record["tokens"]
            bias = 4 * 2 * record["slots"] if record["uses_beta"] else 0  # fp32, two layers of one KV head
            assert record["nbytes"] == record["slots"] * per_slot + bias, cell
        assert len(result["questions"]) == 3
        assert result["facts"] == 8


def test_ceiling_floor_and_controls_are_what_they_say(everything):
    rows = {(row["method"], row["ratio"]): row for row in rows_of(everything)}
    full, none = rows["full", None], rows["none", None]
    assert full["kl"] == 0
    assert full["utilisation"] == 1
    assert none["utilisation"] == 0
    assert none["nbytes"] == 0
    assert rows["int8", None]["kl"] < rows["int4", None]["kl"] < none["kl"]
    assert rows["still", 2]["seeds"] == "0 1"
    assert rows["random", 2]["seeds"] == "0 1"
    assert rows["snapkv", 2]["seeds"] == ""
    tokens = {result["cell"]["set_id"]: result["record"]["tokens"] for result in everything.results()
              if result["cell"]["method"] == "full"}  # fmt: skip
    assert len(set(tokens.values())) == 2
    for result in everything.results():
        cell = result["cell"]
        swapped = cell["method"] == "still-wrong-matter"
        assert (result["record"]["tokens"] != tokens[cell["set_id"]]) == swapped, cell


def test_methods_that_no_ratio_sizes_and_the_names_agree_with_the_registry():
    assert {name for name, method in methods.METHODS.items() if method.fixed_size} == set(WITHOUT_RATIO)
    assert {*METHODS, "cartridge"} - set(CONTROLS) == set(methods.NAMES)


def test_the_same_config_gives_the_same_rows(folder, tmp_path):
    config = settings(folder, methods=("still", "random"), ratios=(4,))
    assert rows_of(sweep(config, tmp_path / "a")) == rows_of(sweep(config, tmp_path / "b"))


def test_workers_make_the_rows_of_one_process(folder, tmp_path):
    config = settings(folder, methods=("still", "random"), ratios=(4,), seeds=(0, 1))
    alone = sweep(config, tmp_path / "alone")
    shared = run_sweep(config, tmp_path / "shared", device="cpu", progress=False, workers=2)
    assert rows_of(shared) == rows_of(alone)
    paths = [path for path in (tmp_path / "shared" / "cells").rglob("*.json") if path.parent.name.endswith("-0")]
    for path in paths:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared" / "cells").rglob("*.json")}
    assert rows_of(run_sweep(config, tmp_path / "shared", device="cpu", progress=False, workers=2)) == rows_of(alone)
    assert paths
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.json")}.items()


def test_a_killed_sweep_goes_on_where_it_stopped(folder, tmp_path):
    """kill -9 in the middle: what was done is not done again, and the rows are those of a sweep without a break."""
    config = settings(folder, count=3, methods=("still", "truncation", "knorm", "keydiff"))
    flags = [
        "--model", config.model, "--compactor", config.compactor[0], "--difficulty", "tiny", "--count", "3",
        "--questions", "3", "--ratios", "2,8", "--max-new-tokens", "4", "--methods", "still,truncation,knorm,keydiff",
    ]  # fmt: skip
    output = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "still.cli", "sweep", *flags, "--device", "cpu", "--output", str(output)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while len(done := [*(output / "cells").rglob("*.json")]) < 5 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("[!.]*.json")}
    assert len(done) >= 5, "the sweep ended before it had done anything"
    store = sweep(config, output)
    assert len(store.results()) == 3 * (2 + 4 * 2)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert rows_of(store) == rows_of(sweep(config, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 2}, "questions was 3 and is 2"),
        ({"ratios": (2, 4)}, r"ratios was \[2, 8\] and is \[2, 4\]"),
        ({"seeds": (1,)}, "seeds was"),
    ],
)
def test_a_folder_of_another_config_is_refused(folder, everything, tmp_path, changes, message):
    config = settings(folder)
    output = tmp_path / "out"
    CellStore.create(output, config, {}, {})
    before = (output / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        sweep(dataclasses.replace(config, **changes), output)
    assert (output / "sweep.json").read_bytes() == before
    assert not (output / "cells").exists()


def test_a_folder_that_other_weights_made_is_refused(folder, tmp_path):
    config = settings(folder, methods=("truncation",))
    store = CellStore.create(tmp_path / "out", config, {"model": "tiny 0123456789ab"}, {})
    with pytest.raises(ValueError, match="model was 'tiny 0123456789ab' and is"):
        sweep(config, store.folder)


def test_a_folder_of_other_things_and_a_damaged_cell_are_refused(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        sweep(settings(folder), tmp_path)
    store = CellStore.create(tmp_path / "out", settings(folder), {}, {})
    cell = Cell("matters", "matter-1", "knorm", 2)
    store.write(cell, {"record": {}})
    assert store.results()[0]["cell"] == dataclasses.asdict(cell)
    store.path(cell).write_text('{"record": ')
    with pytest.raises(ValueError, match=f"{store.path(cell).name} is damaged"):
        store.results()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("snapvk",)}, "no method 'snapvk'"),
        ({"tasks": ("maters",)}, "no task 'maters'"),
        ({"tasks": ("ruler/niah",)}, "no RULER task is called 'niah'"),
        ({"seeds": (0, 7)}, "no compactor was trained with seed 7"),
        ({"methods": ("still-wrong-matter",), "count": 1}, "has only one"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_written(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(settings(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("ratios", (0.5,)), ("count", 0), ("questions", -1), ("methods", ())])
def test_a_config_that_makes_no_sense_names_the_value(field, value):
    with pytest.raises(ValueError, match="ratio is 0.5" if field == "ratios" else field):
        SweepConfig(**{field: value})


def test_files_of_question_sets_are_a_task(folder, tmp_path):
    for seed in (3, 4):
        question_set(generate_matter(seed, "tiny", "held_out")).save(tmp_path / "sets" / f"{seed}.json")
    config = settings(folder, tasks=(str(tmp_path / "sets"),), methods=("truncation",), ratios=(2,))
    results = sweep(config, tmp_path / "out").results()
    assert {result["cell"]["set_id"] for result in results} == {"matter-tiny-held_out-3", "matter-tiny-held_out-4"}


def test_lab_tasks_are_a_task(folder, tmp_path):
    write_lab_tasks(tmp_path / "lab", "practice", (0, 1), "tiny")
    config = settings(folder, tasks=(str(tmp_path / "lab"),), methods=("truncation",), ratios=(2,))
    results = sweep(config, tmp_path / "out").results()
    assert len({result["cell"]["set_id"] for result in results}) == 2
    assert len(results) == 2 * 3
    assert all(len(result["questions"]) == 3 for result in results)


def test_likelihoods_are_measured_on_the_right_answers_of_the_full_cache_in_its_own_words(folder, tmp_path):
    """The tiny model's own answers become the right ones, all but one: then the full cache is a real ceiling."""
    asked = settings(folder, count=1, questions=0, ratios=(1,), methods=("truncation", "still-untrained", "none"))
    store = sweep(asked, tmp_path / "first")
    answered = store.read(Cell("matters", "matter-tiny-held_out-0", "full"))["questions"]
    own = {each["id"]: each["output"] for each in answered}
    original = question_set(generate_matter(0, "tiny", "held_out"))
    answers = [own[question.id] for question in original.questions]
    questions = [
        dataclasses.replace(question, answer=f"The answer: {answer}" if place == 0 else answer, wrong=(), answers=())
        for place, (question, answer) in enumerate(zip(original.questions, answers, strict=True))
    ]
    dataclasses.replace(original, questions=tuple(questions)).save(tmp_path / "own.json")
    store = sweep(dataclasses.replace(asked, tasks=(str(tmp_path / "own.json"),)), tmp_path / "second")
    rows = {row["method"]: row for row in rows_of(store)}
    full = next(result for result in store.results() if result["cell"]["method"] == "full")
    right = [each["label"] == "pass" for each in full["questions"]]
    assert sum(right) > len(right) / 2
    assert not right[0]
    assert [each["tokens"] > 0 for each in full["questions"]] == right
    assert rows["full"]["cross_entropy"] < rows["none"]["cross_entropy"]
    for method in ("truncation", "still-untrained"):  # at 1x both are the full cache
        assert rows[method]["pass_rate"] == rows["full"]["pass_rate"]
        assert rows[method]["kl"] == pytest.approx(0, abs=1e-4)
        assert rows[method]["utilisation"] == pytest.approx(1, abs=1e-3)


def test_a_task_may_name_its_own_methods(folder, tmp_path):
    config = settings(folder, tasks=("matters", "matters-unseen:knorm"), methods=("truncation",), ratios=(2,))
    cells = [result["cell"] for result in sweep(config, tmp_path / "out").results()]
    assert {(cell["task"], cell["method"]) for cell in cells} == {
        ("matters", "full"), ("matters", "none"), ("matters", "truncation"),
        ("matters-unseen", "full"), ("matters-unseen", "none"), ("matters-unseen", "knorm"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="'matters' is named twice"):
        settings(folder, tasks=("matters", "matters:knorm"))


def test_ruler_is_a_task(folder, tmp_path):
    config = settings(
        folder, tasks=("ruler/niah_single_1", "ruler/vt"), tokens=300, methods=("truncation",), ratios=(2,), count=1
    )
    results = sweep(config, tmp_path / "out").results()
    assert {result["questions"][0]["tags"]["task"] for result in results} == {"niah_single_1", "vt"}
    assert all(150 < result["record"]["tokens"] < 400 for result in results)


@pytest.mark.parametrize("chunk", [100, 4000])
def test_a_compactor_reads_in_chunks_what_is_longer_than_its_own(folder, tmp_path, chunk):
    model = Qwen3ForCausalLM.from_pretrained(folder / "model")
    compactor = StillCompactor.for_model(model, slots=16, chunk=chunk)
    compactor.config.split = Split({0: (1.0,), 1: (3.0,)}, fingerprint=fingerprint(model)).to_dict()
    compactor.save_pretrained(tmp_path / "compactor")
    names = ("still", "still-chunks", "still-uneven", "still-uneven-chunks")
    config = settings(folder, compactor=(str(tmp_path / "compactor"),), methods=names)
    store = sweep(config, tmp_path / "out")
    found = {tuple(result["cell"].values()): result for result in store.results()}
    assert {row["method"] for row in make_rows(store.results(), store.header) if row["trained"]} == set(names)
    for (task, which, method, ratio, seed), result in found.items():
        if ratio is None:
            continue
        record = result["record"]
        assert record["slots"] == slots_for(record["tokens"], ratio)
        assert ("chunks" in record["options"]) == method.endswith("-chunks")
        one_pass = found[task, which, method.removesuffix("-chunks"), ratio, seed]["questions"]
        same = [question["kl"] for question in result["questions"]] == [question["kl"] for question in one_pass]
        assert same == (chunk == 4000 or not method.endswith("-chunks"))


def test_flags_change_a_preset_and_importing_the_commands_loads_no_torch():
    code = (
        "import argparse, json, sys\n"
        "from still.harness.commands import COMMANDS, config_from\n"
        "parser = argparse.ArgumentParser()\n"
        "COMMANDS['sweep'].configure(parser)\n"
        "config = config_from(parser.parse_args(['--preset', 'quickstart', '--count', '3', '--ratios', '4']))\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'slow to import'\n"
        "print(json.dumps(config.to_json()))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    config = SweepConfig.from_json(json.loads(out))
    assert config.model == "pocket"
    assert config.count == 3
    assert config.ratios == (4,)
    assert set(COMMANDS) >= {"sweep", "report"}


def test_cells_asked_at_once_are_of_one_method_and_hold_no_more_than_the_full_cache():
    config = SweepConfig("pocket", ratios=(1, 1.5, 2, 4, 8, 16), methods=("snapkv", "still", "int8"))
    cells = list(cells_of(config, "matters", "a", {"still": (0, 1)}))
    groups = list(asked_at_once(cells))
    assert sorted(map(str, cells)) == sorted(str(cell) for group in groups for cell in group)
    found = [(group[0].method, group[0].seed, [cell.ratio for cell in group]) for group in groups]
    sizes = [[1], [1.5], [2, 4, 8, 16]]
    snapkv = [("snapkv", None, size) for size in sizes]
    still = [("still", seed, size) for seed in (0, 1) for size in sizes]
    assert found == [("full", None, [None]), ("none", None, [None]), *snapkv, *still, ("int8", None, [None])]
    assert all({(cell.method, cell.seed) for cell in group} == {(group[0].method, group[0].seed)} for group in groups)
    assert list(asked_at_once(cells, 0.0)) == [[cell] for group in groups for cell in group]
    assert list(asked_at_once([])) == []


@pytest.mark.parametrize("patience", [20.0, 0.0])
def test_what_was_made_before_a_ratio_that_fails_is_on_disk(folder, tmp_path, monkeypatch, patience):
    """And what takes long is asked before the next one is made."""
    asked, ask_each, compact = [], sweeps.ask_each, methods.METHODS["snapkv"].compact

    def failing(self, model, reading, slots=None, ratio=None):
        if ratio == 8:
            raise RuntimeError("out of memory")
        return compact(self, model, reading, slots=slots, ratio=ratio)

    monkeypatch.setattr(methods.METHODS["snapkv"], "compact", failing)
    monkeypatch.setattr(sweeps, "PATIENCE", patience)
    monkeypatch.setattr(
        sweeps, "ask_each", lambda model, caches, *rest, **options:
        asked.append(len(caches)) or ask_each(model, caches, *rest, **options),
    )  # fmt: skip
    config = settings(folder, methods=("snapkv",), ratios=(2, 4, 8), count=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep(config, tmp_path / "out")
    kept = [result["cell"] for result in CellStore.open(tmp_path / "out").results()]
    assert [cell["ratio"] for cell in kept if cell["method"] == "snapkv"] == [2, 4]
    assert asked[-2:] == ([1, 1] if patience == 0 else [asked[-2], 2])
    monkeypatch.setattr(methods.METHODS["snapkv"], "compact", compact)
    assert len(sweep(config, tmp_path / "out").results()) == len(kept) + 1


def test_a_cell_says_itself_what_lies_outside_the_training(folder, tmp_path):
    """Cells that are asked in one batch have each their own warnings."""
    compactor = StillCompactor.from_pretrained(folder / "compactors" / "seed-0")
    compactor.config.trained_ratios = (2.0, 4.0)
    compactor.save_pretrained(tmp_path / "trained")
    config = settings(folder, compactor=(str(tmp_path / "trained"),), methods=("still",), count=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        store = sweep(config, tmp_path / "out")
    told = {result["cell"]["ratio"]: result["warnings"] for result in store.results() if result["cell"]["ratio"]}
    assert told[2] == []
    assert [note.partition(":")[0] for note in told[8]] == ["a ratio of 8x lies outside the trained 2x to 4x"]
