"""The agent's sweep end to end, played by a script over a tiny model: cells, resuming, budgets, the ledger, the report.

The script is honest about what it sees, so the memo's rows have a meaning; no number about a model comes from here.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest
from agent_cases import Clerk, make_task, texts, tiny_agent

from still.cli import main
from still.eval.matters.assignments import Assignment, write_assignments
from still.eval.tasks import load_task
from still.harness.agent_cells import AgentStore, AgentSweepConfig
from still.harness.agent_report import write_agent_report
from still.harness.agent_sweep import AgentBench, run_agent_sweep, run_folder
from still.harness.agent_table import agent_rows, held
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.probe import ledger
from still.harness.runs import read_run

CONFIG = AgentSweepConfig(
    model="tiny", relevance=(1.0, 0.5), criteria=4, documents=4, count=1, reads=1, reads_force=2,
    backends=("memo", "memo_oracle", "kv", "hybrid"), methods=("streaming_llm",),
    budgets=("60t", "600t"),
)  # fmt: skip


def bench(player=Clerk) -> AgentBench:
    loaded = tiny_agent()
    return AgentBench(ScriptedPolicy(loaded.tokenizer, player, 60_000, loaded))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    output = tmp_path_factory.mktemp("sweep") / "results"
    store = run_agent_sweep(CONFIG, output, bench(), progress=False)
    return store, agent_rows(store.results(), store.header)


def row(rows, backend: str, budget: str = "", share: str = "100 %"):
    (found,) = (r for r in rows if (r["backend"], r["budget"]) == (backend, budget) and share in r["task"])
    return found


def test_every_cell_is_a_run_a_verdict_and_a_row(swept):
    store, rows = swept
    results = store.results()
    assert len(results) == 2 * (2 + 4 * 2)
    assert len(rows) == 2 * (2 + 4 * 2)
    for result in results:
        cell = store.cell_type(**result["cell"])
        events = read_run(run_folder(store, cell))
        assert (events[0]["task"], events[-1]["stop"]) == (cell.set_id, "done")
        scores = json.loads((run_folder(store, cell) / "scores.json").read_text())
        assert scores["n_criteria"] == len(result["criteria"])
    for each in rows:
        assert each["documents_opened"] == each["documents_total"] == 4
        assert 0 < each["characters_read"] <= each["characters_available"]
        assert each["runs"] == each["matters"] == 1
        assert each["boundaries"] == (0 if each["backend"] == "full" else 3)
        assert {"device", "commit", "versions", "model"} <= {k for k, v in each.items() if v} | {"commit"}


def test_budgets_are_kept_in_bytes_and_what_was_read_passes(swept):
    _, rows = swept
    for each in rows:
        if each["budget"]:
            assert 0 < each["held_bytes"] <= int(each["budget"][:-1]) * each["bytes_per_token"]
    assert row(rows, "full")["all_pass"] == row(rows, "memo", "600t")["all_pass"] == 1.0
    assert row(rows, "memo", "60t")["pass_rate"] < 1.0
    assert row(rows, "none")["pass_rate"] < row(rows, "memo", "600t")["pass_rate"]
    for budget in CONFIG.budgets:
        for share in ("100 %", "50 %"):
            oracle, memo = (row(rows, name, budget, share) for name in ("memo_oracle", "memo"))
            assert max(held(oracle, "written")) >= max(held(memo, "written"))
    assert row(rows, "memo", "600t")["boundary_decoded_tokens"] > 20
    assert row(rows, "kv", "600t")["boundary_decoded_tokens"] == 0
    assert row(rows, "kv", "600t")["boundary_seconds"] > 0


def test_seeds_of_a_matter_are_no_matters_of_their_own_in_all_pass(swept):
    store, rows = swept
    again = [each | {"cell": each["cell"] | {"seed": seed}} for each in store.results() for seed in range(10)]
    once, copied = row(rows, "full"), row(agent_rows(again, store.header), "full")
    assert (copied["runs"], copied["matters"], copied["all_pass"]) == (10, 1, once["all_pass"])
    assert copied["all_pass_low"] <= once["all_pass_low"]


def test_the_ledger_says_what_each_boundary_acquired_and_lost(swept):
    store, rows = swept
    assert held(row(rows, "memo_oracle", "600t"), "written")[-1] >= 2
    records = [{"written": ["a"]}, {"written": ["b", "c"]}, {"written": ["b"]}]
    assert ledger(records, "written") == [(["a"], []), (["b", "c"], ["a"]), ([], ["c"])]
    assert ledger([*records, {"written": None}], "written") is None
    assert row(rows, "kv", "600t")["acquired_written"] == "0.00 0.00 0.00"
    for each in rows:
        assert len(held(each, "answered")) == (0 if each["backend"] == "full" else 3)
    for result in store.results():
        root = run_folder(store, store.cell_type(**result["cell"]))
        private = {root / "private.jsonl", root / "scores.json"}
        public = [path for path in root.rglob("*") if path.is_file() and path not in private]
        assert not any(b"match_criteria" in path.read_bytes() for path in public)


def test_a_sweep_goes_on_where_it_stopped(swept):
    store, _ = swept
    before = {path: path.stat().st_mtime_ns for path in store.folder.glob("cells/**/*.json")}
    lost, half = list(before)[::9], list(before)[5]
    verdicts = {path: json.loads(path.read_text())["criteria"] for path in (*lost, half)}
    for path in (*lost, half):
        path.unlink()
    log = run_folder(store, store.cell_type(**json.loads(list(before)[1].read_text())["cell"])) / "events.jsonl"
    assert log.is_file()
    events = store.folder / "runs" / half.relative_to(store.folder / "cells").with_suffix("") / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[: len(lines) // 2]))
    run_agent_sweep(CONFIG, store.folder, bench(), progress=False)
    after = {path: path.stat().st_mtime_ns for path in store.folder.glob("cells/**/*.json")}
    assert {path for path in after if after[path] != before[path]} == {*lost, half}
    assert {path: json.loads(path.read_text())["criteria"] for path in (*lost, half)} == verdicts


def test_what_breaks_leaves_the_other_cells_and_is_said(tmp_path):
    def broken():
        raise RuntimeError("no script")

    players = iter([broken, *[Clerk] * 99])
    config = AgentSweepConfig(**{**CONFIG.to_json(), "backends": ["memo"], "budgets": ["600t"], "relevance": [1.0]})
    with pytest.raises(RuntimeError, match="1 runs broke; run again to go on"):
        run_agent_sweep(config, tmp_path / "r", bench(lambda: next(players)()), progress=False)
    assert len(AgentStore.open(tmp_path / "r").results()) == 3 - 1
    run_agent_sweep(config, tmp_path / "r", bench(), progress=False)
    assert len(AgentStore.open(tmp_path / "r").results()) == 3


def test_another_config_and_tasks_that_need_a_reader_are_refused(swept, tmp_path):
    store, _ = swept
    other = AgentSweepConfig(**{**CONFIG.to_json(), "budgets": ["9t"]})
    with pytest.raises(ValueError, match="budgets was"):
        run_agent_sweep(other, store.folder, bench(), progress=False)
    make_task(tmp_path, texts(2))
    config = AgentSweepConfig(**{**CONFIG.to_json(), "tasks": [str(tmp_path / "tasks")]})
    with pytest.raises(ValueError, match="still grade"):
        run_agent_sweep(config, tmp_path / "out", bench(), progress=False)


def test_the_report_shows_all_shares_and_conditions(swept, capsys):
    store, rows = swept
    assert main(["report", str(store.folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("100 % relevant", "50 % relevant", "memo + streaming_llm", "oracle memo", "full context", "600t"):
        assert words in shown
    write_agent_report(store.folder)
    with open(store.folder / "rows.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    page = (store.folder / "report.html").read_text()
    assert page.count("<svg") == 3
    for words in ("full context", "no context", "KV by streaming_llm", "oracle memo (upper bound)"):
        assert re.search(f"<svg.*{re.escape(words)}", page, re.DOTALL)


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--agent", "--ratios", "2,4"], "--ratios means nothing"), (["--budgets", "64t"], "--budgets means nothing"),
    (["--agent", "--preset", "uneven"], "sweeps of questions"), (["--agent", "--backends", "telepathy"], "telepathy"),
    (["--agent", "--methods", "still-uneven", "--modes", "recompact"], "still-uneven with mode recompact"),
    (["--agent", "--budgets", "lots"], "budget is 'lots'"), (["--agent", "--relevance", "0"], "relevance is 0"),
])  # fmt: skip
def test_refusals(tmp_path, capsys, flags, complaint):
    assert main(["sweep", "--output", str(tmp_path / "out"), "--model", str(tmp_path), *flags]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_assignments_differ_in_relevance_alone(tmp_path):
    tasks = [load_task(write_assignments(tmp_path / str(s), Assignment(s, 5, 4), [3])[0]) for s in (1.0, 0.25)]
    for task in tasks:
        asked = [c for c in task.criteria if not c.expect.get("absent")]
        assert len(asked) == 5
        assert all(c.expect["party"] in task.instructions for c in asked)
        text = "".join((task.documents_folder / name).read_text() for name in task.documents)
        assert all(c.expect["value"] in text and c.expect["value"] not in task.instructions for c in task.criteria)
        assert len(task.documents) == 4
    assert len(tasks[1].criteria) == 7


def test_unequal_slots_are_appended_alone():
    config = AgentSweepConfig(backends=("kv",), methods=("still-uneven", "still"), modes=("append", "recompact"),
                              budgets=("64t",))  # fmt: skip
    names = [condition.name for condition in config.conditions]
    assert names == ["full", "none", "kv still-uneven", "kv still", "kv still recompact"]


def test_methods_are_made_and_seeds_are_those_that_matter():
    made = bench()
    for name in ("knorm", "snapkv", "random"):
        config = AgentSweepConfig(**{**CONFIG.to_json(), "methods": [name], "backends": ["kv"], "seeds": [0, 1]})
        condition = config.conditions[-1]
        assert made.method(condition, 1).name == name
        assert made.seeds(condition, config) == ((0, 1) if name == "random" else (0,))


def test_workers_play_the_cells_of_one_process(tmp_path):
    """A tiny random model says nothing of use, but the same both times."""
    loaded = tiny_agent()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    config = replace(
        CONFIG, model=str(tmp_path / "model"), relevance=(1.0,), backends=("memo", "kv"), budgets=("60t",),
        max_new_tokens=8, max_turns=3, reserve=64, probe=False,
    )  # fmt: skip
    bench = AgentBench.load(config, "cpu")
    stores = [
        run_agent_sweep(config, tmp_path / str(n), bench, progress=False, workers=n, device="cpu") for n in (1, 2)
    ]
    labels = [[(each["cell"], each["criteria"]) for each in store.results()] for store in stores]
    assert len(labels[0]) == 4
    assert labels[0] == labels[1]
