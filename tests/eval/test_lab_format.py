from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from still.eval.matters import DIFFICULTIES, generate_matter, lab_format
from still.eval.matters.lab_format import lab_task, write_lab_tasks
from still.eval.tasks import FAMILIES, find_tasks, load_task


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != lab_format.MANIFEST)
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_config_writes_the_same_files(tmp_path, family):
    folders = write_lab_tasks(tmp_path / "a", family, range(3), "tiny")
    write_lab_tasks(tmp_path / "b", family, [2, 0, 1], "tiny")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert [folder.is_dir() for folder in folders] == [True] * 3
    assert len(find_tasks(tmp_path / "a")) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_matters_keep_all_their_facts_and_distractors(tmp_path, family):
    (folder,) = write_lab_tasks(tmp_path, family, [11])
    task, matter = load_task(folder), generate_matter(11)
    expected = {(fact.party, fact.value, fact.superseded) for fact in matter.facts}
    given = {
        (each.expect["party"], each.expect["value"], tuple(each.expect["superseded"]))
        for each in task.criteria
        if not each.is_distractor
    }
    assert given == expected
    assert sum(each.is_distractor for each in task.criteria) == lab_format.DISTRACTORS
    text = "".join(doc.text for doc in matter.documents)
    assert "".join(task.agent_view().read(name).decode() for name in task.documents) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_was_stopped_goes_on_and_redoes_nothing(tmp_path, monkeypatch, family):
    whole = tmp_path / "whole"
    write_lab_tasks(whole, family, range(4), "tiny")
    real, calls = lab_format.Path.replace, []

    def stop(self, target):
        calls.append(target)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, target)

    part = tmp_path / "part"
    monkeypatch.setattr(lab_format.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_lab_tasks(part, family, range(4), "tiny")
    monkeypatch.undo()
    done = find_tasks(part)
    assert 0 < len(done) < 4
    assert all(load_task(folder).documents for folder in done)
    before = {folder: folder.stat().st_mtime_ns for folder in done}
    write_lab_tasks(part, family, range(4), "tiny")
    assert {folder: folder.stat().st_mtime_ns for folder in done} == before
    assert digest(part) == digest(whole)


def test_the_manifest_says_what_was_made_and_grows(tmp_path):
    write_lab_tasks(tmp_path, "practice", range(2), "tiny")
    write_lab_tasks(tmp_path, "practice", range(1, 4), "tiny")
    write_lab_tasks(tmp_path, "contracts", [7], "tiny")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"]["digest"] == DIFFICULTIES["tiny"].digest
    assert manifest["config"]["split"] == "held_out"
    assert manifest["families"] == {"practice": [0, 1, 2, 3], "contracts": [7]}
    assert set(manifest["versions"]) == {"python", "still-kv"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"difficulty": "easy"}, "digest"),
        ({"difficulty": replace(DIFFICULTIES["tiny"], amended=0.5)}, "digest"),
        ({"split": "train"}, "split"),
        ({"unseen_templates": True}, "unseen_templates"),
    ],
)
def test_a_folder_of_another_config_is_refused_untouched(tmp_path, other, message):
    write_lab_tasks(tmp_path / "lab", "practice", [0], "tiny")
    before = digest(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_lab_tasks(tmp_path / "lab", "practice", [1], **({"difficulty": "tiny"} | other))
    assert digest(tmp_path) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        write_lab_tasks(tmp_path, "practice", [0], "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_families_and_seeds_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="tax"):
        write_lab_tasks(tmp_path / "lab", "tax", [0], "tiny")
    with pytest.raises(ValueError, match="seeds"):
        write_lab_tasks(tmp_path / "lab", "practice", [], "tiny")
    assert not (tmp_path / "lab").exists()


def test_no_criterion_names_a_value_of_the_distractors(tmp_path):
    for seed in range(6):
        task = lab_task(generate_matter(seed), "practice").task
        absent = [each["expect"]["value"] for each in task["criteria"] if each["expect"].get("absent")]
        present = [each["expect"] for each in task["criteria"] if not each["expect"].get("absent")]
        assert len(absent) == 2
        assert not set(absent) & {value for each in present for value in (each["value"], *each["superseded"])}


def test_a_value_that_a_party_is_bound_by_is_no_distractor():
    matter = generate_matter(3)
    (value, *_) = [each["expect"]["value"] for each in lab_task(matter, "practice").task["criteria"][-2:]]
    bound = replace(matter, facts=(*matter.facts, replace(matter.facts[0], id="C-065", value=value)))
    absent = [each["expect"] for each in lab_task(bound, "practice").task["criteria"] if each["expect"].get("absent")]
    assert len(absent) == 2
    assert value not in {each["value"] for each in absent}
