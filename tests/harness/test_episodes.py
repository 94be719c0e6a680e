"""Rows for training: the teacher's episodes are complete, right, and of the shape that a run has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from agent_cases import of, tiny_agent, tiny_agent_tokenizer

from still import methods
from still.eval.judge import exact_criterion
from still.eval.matters.generate import Difficulty
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.tasks import load_task
from still.harness import backends
from still.harness.agent import Episode, drive
from still.harness.documents import Documents
from still.harness.episodes import KINDS, Oracle, oracle_events, rows_of, synthetic_rows
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import RunFolder, read_run
from still.harness.tools import Workspace

SMALL = Difficulty("small", facts=12, documents=6, amended=0.25)
CONFIG = RunConfig(window=9000, reserve=1500, reads=2, reads_force=3, tools=("read", "write"))


def setting(backend: str, **more) -> RunConfig:
    """A config for this backend."""
    return replace(CONFIG, backend=backend, **more)


SETTINGS = [setting("full"), setting("memo", budget="900t"), setting("kv", ratio=8.0), setting("hybrid", ratio=8.0)]


def tasks(root, family="practice"):
    return [load_task(place) for place in write_lab_tasks(root, family, [1, 2], SMALL, "train")]


@pytest.mark.parametrize("family", ["practice", "contracts", "firm-knowledge"])
@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.backend)
def test_the_teacher_passes_every_criterion(tmp_path, config, family):
    for number, task in enumerate(tasks(tmp_path / "lab", family)):
        folder = tmp_path / f"run-{number}"
        events = oracle_events(task, tiny_agent_tokenizer(), config, folder)
        assert events[-1]["status"] == "done"
        outputs = {path.name: path.read_text() for path in (folder / "output").iterdir()}
        for criterion in task.criteria:
            text = "\n".join(outputs[name] for name in task.files_for(criterion, outputs))
            assert exact_criterion(text, criterion).passed, criterion.title


def test_a_memo_keeps_to_its_budget_and_what_it_drops_is_lost(tmp_path):
    task = tasks(tmp_path / "lab")[0]
    events = oracle_events(task, tiny_agent_tokenizer(), setting("memo", budget="120t"), tmp_path / "run")
    assert max(event["artifact"]["tokens"] for event in of(events, "compact")) <= 120
    assert not any(event["degraded"] for event in of(events, "compact"))
    outputs = {path.name: path.read_text() for path in (tmp_path / "run" / "output").iterdir()}
    verdicts = [
        exact_criterion("\n".join(outputs[name] for name in task.files_for(each, outputs)), each).passed
        for each in task.criteria
    ]
    assert 0 < sum(verdicts) < len(verdicts)


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.backend)
def test_rows_hold_every_turn_and_train_on_turns_alone(config):
    tokenizer = tiny_agent_tokenizer()
    rows = list(synthetic_rows([3], SMALL, tokenizer, config))
    assert len(rows) == (rows[0].windows if config.backend == "memo" else 1)
    assert rows[0].windows == (1 if config.backend == "full" else 3)
    end, opening = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    for row in rows:
        spans, inside = 0, False
        for place, (token, trained) in enumerate(zip(row.input_ids, row.trained, strict=True)):
            if trained and not inside:
                assert row.input_ids[place - 1] == opening
                spans += 1
            if inside and not trained:
                assert row.input_ids[place - 1] == end
            inside = trained
            assert row.labels[place] == (token if trained else -100)
        assert spans == row.input_ids.count(opening)
        assert not any(row.trained[: row.base])
    memos = sum(row.kinds.count(KINDS["memo"]) > 0 for row in rows)
    assert memos == {"memo": 2, "hybrid": 1}.get(config.backend, 0)
    assert [len(row.cuts) for row in rows] == [{"kv": 2, "hybrid": 2}.get(config.backend, 0)] * len(rows)


@pytest.mark.parametrize("backend", ["kv", "hybrid"])
def test_pretended_slots_give_the_ids_of_a_run_with_slots(tmp_path, backend):
    config, task, loaded = setting(backend, ratio=8.0), tasks(tmp_path / "lab")[0], tiny_agent()
    pretended = rows_of(oracle_events(task, loaded.tokenizer, config, tmp_path / "pretended"))
    oracle = None
    policy = ScriptedPolicy(loaded.tokenizer, lambda: lambda *seen: oracle(*seen), config.window, loaded)
    made, run = backends.make(config, policy, methods.get("knorm")), RunFolder(tmp_path / "real")
    documents = Documents.load(task.agent_view(), cache=tmp_path / "converted")
    episode = Episode(Workspace(run.workspace, documents), policy, made, config, run)
    oracle = Oracle(task, made.memo_tokens, episode.session.count)
    drive(episode)
    assert rows_of(read_run(run.root)) == pretended


def test_a_config_without_a_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="window is None"):
        oracle_events(tasks(tmp_path)[0], tiny_agent_tokenizer(), replace(CONFIG, window=None), tmp_path / "run")
    with pytest.raises(ValueError, match="backend trim"):
        oracle_events(tasks(tmp_path)[0], tiny_agent_tokenizer(), setting("trim"), tmp_path / "run")
