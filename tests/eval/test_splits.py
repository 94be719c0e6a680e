from __future__ import annotations

import json
from collections import Counter

import pytest

from still.eval.matters.lab_format import write_lab_tasks
from still.eval.splits import Split, split_tasks
from still.eval.tasks import FAMILIES, find_tasks, load_task

SHARES = {"train": 0.6, "held_out": 0.2, "test": 0.2}


def write_task(root, name, documents, **more):
    """A task with two criteria and the given documents."""
    folder = root / "tasks" / name
    criteria = [{"id": f"C-{i}", "title": f"{name} {i}", "match_criteria": "PASS if."} for i in (1, 2)]
    folder.mkdir(parents=True)
    raw = {"title": name, "instructions": "Write.", "criteria": criteria, **more}
    (folder / "task.json").write_text(json.dumps(raw))
    for document, text in documents.items():
        (folder / "documents" / document).parent.mkdir(parents=True, exist_ok=True)
        (folder / "documents" / document).write_text(text)
    return folder


def load_all(root):
    return [load_task(folder) for folder in find_tasks(root)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Four areas of 50 tasks, ten of one task each, one chain and one pair of shared documents."""
    root = tmp_path_factory.mktemp("split")
    for area in ("tax", "real-estate", "litigation", "capital-markets"):
        for number in range(50):
            write_task(root, f"{area}/task-{number:02d}", {"a/own.txt": f"{area} {number}"})
    for number in range(10):
        write_task(root, f"small-{number}/only", {"own.txt": f"small {number}"})
    shared = [{"x.txt": "lease"}, {"y.txt": "lease", "z.txt": "side letter"}, {"deep/w.txt": "side letter"}]
    for number, documents in enumerate(shared):
        write_task(root, f"chain-{number}/task", documents)
    return load_all(root)


def test_areas_are_balanced_and_small_ones_are_not_all_on_one_side(many):
    split = split_tasks(many, SHARES, seed=3)
    for area in ("tax", "real-estate", "litigation", "capital-markets"):
        for side, share in SHARES.items():
            assert abs(split.areas[area][side] - 50 * share) <= 1
    singles = Counter(split.side_of(f"small-{number}/only") for number in range(10))
    assert all(singles[side] for side in SHARES)
    assert sum(len(ids) for ids in split.sides.values()) == len(many) == len(split.rubrics)


def test_tasks_that_share_documents_are_on_one_side_through_any_chain(many):
    for seed in range(20):
        split = split_tasks(many, SHARES, seed)
        assert split.groups == (("chain-0/task", "chain-1/task", "chain-2/task"),)
        assert len({split.side_of(name) for name in split.groups[0]}) == 1


def test_the_seed_decides_and_the_order_of_the_tasks_does_not(many):
    first = split_tasks(many, SHARES, 1)
    assert first == split_tasks(many[::-1], SHARES, 1)
    assert first.sides != split_tasks(many, SHARES, 2).sides


def test_a_shared_store_keeps_firm_knowledge_together_in_either_notation(tmp_path):
    for index, family in enumerate(FAMILIES):
        write_lab_tasks(tmp_path, family, range(6 * index, 6 * index + 6), "tiny")
    for folder in find_tasks(tmp_path / "tasks" / "firm-knowledge")[:3]:
        raw = json.loads((folder / "task.json").read_text()) | {"docs_dir": "../../dms"}
        (folder / "task.json").write_text(json.dumps(raw))
    tasks = load_all(tmp_path)
    split = split_tasks(tasks, {"train": 0.5, "test": 0.5})
    assert [len(group) for group in split.groups] == [6]
    assert {name.split("/")[0] for name in split.groups[0]} == {"firm-knowledge"}
    write_lab_tasks(tmp_path, "contracts", [0], "tiny")  # the matter of practice task 0: its documents again
    again = split_tasks(load_all(tmp_path), {"train": 0.5, "test": 0.5})
    assert [len(group) for group in again.groups] == [6, 2]


def test_empty_documents_do_not_tie_tasks_together(tmp_path):
    for name in ("tax/a", "tax/b"):
        write_task(tmp_path, name, {"empty.txt": "", "own.txt": name})
    assert split_tasks(load_all(tmp_path), {"train": 0.5, "test": 0.5}).groups == ()


def test_it_is_read_back_as_it_was_written(many, tmp_path):
    split = split_tasks(many, SHARES, 5)
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    with pytest.raises(KeyError, match="no-such/task"):
        split.side_of("no-such/task")
    (tmp_path / "split.json").write_text("[]")
    with pytest.raises(ValueError, match="no split"):
        Split.load(tmp_path / "split.json")


@pytest.mark.parametrize("shares", [{}, {"train": 0.8}, {"train": 1.2, "test": -0.2}])
def test_shares_that_are_none_are_refused(many, shares):
    with pytest.raises(ValueError, match="sum to 1"):
        split_tasks(many, shares)


def test_two_tasks_of_one_id_and_no_tasks_are_refused(many):
    with pytest.raises(ValueError, match="tax/task-00"):
        split_tasks([*many, many[-1], next(task for task in many if task.id == "tax/task-00")], SHARES)
    with pytest.raises(ValueError, match="no tasks"):
        split_tasks([], SHARES)


def test_real_tasks_split_with_firm_knowledge_on_one_side(lab):
    tasks = load_all(lab / "tasks")
    split = split_tasks(tasks, {"train": 0.5, "test": 0.5})
    assert [len(group) for group in split.groups] == [20]
    assert {name.split("/")[0] for name in split.groups[0]} == {"firm-knowledge"}
