"""LAB's traps, each on tasks made here, and the real tasks where they lie beside the checkout."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from still.eval.judge import exact_criterion
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.tasks import FAMILIES, LabTaskError, find_tasks, load_task, problems


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four tiny tasks of each family in one tree."""
    root = tmp_path_factory.mktemp("lab")
    for family in FAMILIES:
        write_lab_tasks(root, family, range(4), "tiny")
    return root / "tasks"


@pytest.fixture
def tasks(made):
    return [load_task(folder) for folder in find_tasks(made)]


def rewrite(folder, **changes):
    """Change keys of a task.json; None removes one."""
    raw = json.loads((folder / "task.json").read_text()) | changes
    (folder / "task.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of one practice task that a test may spoil."""
    first = next(path for path in find_tasks(made) if path.name == "schedule-current-terms-0")
    return shutil.copytree(first, tmp_path / "tasks" / "corporate-commercial" / first.name)


def test_all_are_found_load_and_are_written_back_equal(made, tasks):
    assert len(tasks) == 12
    assert {task.family for task in tasks} == set(FAMILIES)
    for task in tasks:
        assert task.to_json() == json.loads((task.folder / "task.json").read_text())
        assert problems(task) == []


def test_ids_are_paths_of_two_to_four_levels_below_tasks(made, tasks):
    assert {task.id.count("/") + 1 for task in tasks} == {2, 3, 4}
    for task in tasks:
        assert made / task.id == task.folder
        assert load_task(task.folder / "task.json", root=made).id == task.id
    assert "firm-knowledge/tasks/002" in {task.id for task in tasks}


def test_criterion_ids_of_both_styles_are_unique_in_a_task_only(tasks):
    firsts = {task.criteria[0].id for task in tasks}
    assert firsts == {"C-001", "C001"}


def test_without_map_and_binding_a_judge_gets_every_output(tasks):
    outputs = ["b.md", "a.md"]
    for task in tasks:
        if task.family == "practice":
            assert set(task.deliverables) == {"schedule.md", "memo.md"}
            continue
        assert task.deliverables is None
        assert task.agent_view().deliverables == ()
        assert all(task.files_for(each, outputs) == ("a.md", "b.md") for each in task.criteria)


def test_criteria_bound_to_one_file_and_to_several(tasks):
    for task in (each for each in tasks if each.family == "practice"):
        bound = {task.files_for(each, ["else.md"]) for each in task.criteria}
        assert bound == {("schedule.md",), ("memo.md",), ("memo.md", "schedule.md")}


def test_bound_names_are_translated_by_the_map(folder):
    rewrite(folder, deliverables={"schedule.md": "final-schedule.md", "memo.md": "memo.md"})
    task = load_task(folder)
    assert {name for each in task.criteria for name in task.files_for(each, [])} == {"final-schedule.md", "memo.md"}


def test_old_tasks_keep_their_assignment_in_instructions_md(tasks):
    old = [task for task in tasks if "instructions" not in task.raw]
    assert [(task.folder / "instructions.md").read_text() for task in old] == [task.instructions for task in old]
    assert len(old) == 1


def test_tracked_changes_are_asked_for_by_a_criterion(tasks):
    practice = next(task for task in tasks if task.family == "practice")
    assert [each.include_redlines for each in practice.criteria][:2] == [True, False]


def test_documents_are_nested_in_contracts_and_shared_in_firm_knowledge(tasks):
    for task in tasks:
        if task.family == "contracts":
            assert task.documents == ("agreement/01-document.txt", "amendments/02-amendment.txt")
        if task.family == "firm-knowledge":
            assert task.own_id == task.id[-3:]
            assert task.docs_dir == "firm-knowledge/dms"
            assert not (task.folder / "documents").exists()
            assert len(task.documents) == 8
            assert {name.split("/")[0] for name in task.documents} == {f"{1001 + seed}-00001" for seed in range(4)}


def test_firm_knowledge_criteria_are_plain_statements_and_the_others_say_pass_if(tasks):
    for task in tasks:
        plain = {"PASS if" not in each.match_criteria for each in task.criteria}
        assert plain == {task.family == "firm-knowledge"}


def test_distractors_pass_when_their_value_is_not_claimed(tasks):
    for task in tasks:
        absent = [each for each in task.criteria if each.is_distractor]
        assert len(absent) == 2
        context = "\n".join(task.agent_view().read(name).decode() for name in task.documents)
        for each in absent:
            assert each.expect["value"] in context
            assert exact_criterion("A memo about something else.", each).passed
            assert exact_criterion(f"It costs {each.expect['value']}.", each).passed is False


def test_a_complete_memo_passes_every_criterion_and_a_stale_one_does_not(tasks):
    for task in tasks:
        present = [each.expect for each in task.criteria if not each.is_distractor]
        memo = "\n".join(f"- {each['party']}: {each['value']}" for each in present)
        assert all(exact_criterion(memo, each).passed for each in task.criteria)
        stale = "\n".join(f"- {each['party']}: {(each['superseded'] or [each['value']])[0]}" for each in present)
        failed = [exact_criterion(stale, each) for each in task.criteria]
        assert [each.stale for each in failed if not each.passed] == [True]


def test_the_agent_sees_no_rubric(tasks):
    for task in tasks:
        view = task.agent_view()
        seen = repr(view) + "".join(view.read(name).decode() for name in view.documents)
        seen += pickle.dumps(view).decode("latin-1")
        for each in task.criteria:
            assert each.match_criteria not in seen
            assert each.title not in seen
        assert "expect" not in seen
        for name in ("task.json", "../task.json", "../instructions.md", str(task.folder / "task.json")):
            with pytest.raises(FileNotFoundError):
                view.read(name)


def test_harveys_own_docs_dir_is_relative_to_the_task(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "tasks")
    folder = root / "firm-knowledge" / "tasks" / "002"
    before = load_task(folder)
    rewrite(folder, docs_dir="../../dms")
    after = load_task(folder)
    assert after.documents_folder == before.documents_folder == root / "firm-knowledge" / "dms"
    assert len(after.documents) == 8
    rewrite(folder, docs_dir="../../..")
    with pytest.raises(LabTaskError, match="docs_dir"):
        load_task(folder).agent_view()
    shutil.rmtree(root / "firm-knowledge" / "dms")
    rewrite(folder, docs_dir="../../dms")
    assert load_task(folder).documents == ()
    assert problems(load_task(folder)) == ["docs_dir '../../dms' is not there", "it has no documents"]


def test_practice_areas_are_the_first_part_and_of_contracts_the_first_two(tasks):
    areas = {task.practice_area for task in tasks}
    assert {"firm-knowledge", "corporate-commercial"} <= areas
    contracts = {task.practice_area for task in tasks if task.family == "contracts"}
    assert contracts
    assert all(area.startswith("contracts/") and area.count("/") == 1 for area in contracts)


def test_a_distractor_is_named_anywhere_in_the_title(folder):
    raw = load_task(folder).to_json()
    raw["criteria"][0] |= {"title": "Does not treat the old lease as an issue (Distractor_001)", "expect": None}
    (folder / "task.json").write_text(json.dumps(raw))
    assert load_task(folder).criteria[0].is_distractor


def test_unknown_keys_stay_out_of_the_agents_view_and_are_kept(folder):
    rewrite(folder, secret={"answer": "$1,234"}, weight=3)
    task = load_task(folder)
    assert task.to_json()["secret"] == {"answer": "$1,234"}
    assert "1,234" not in repr(task.agent_view())


def test_unknown_keys_of_criteria_and_their_order_are_kept(made, tmp_path):
    for number, source in enumerate(find_tasks(made)):
        folder = shutil.copytree(source, tmp_path / "tasks" / str(number) / source.name)
        raw = json.loads((folder / "task.json").read_text())
        raw = {"_note": "\u2028 kept", **raw, "zeta": [1.0, None, {"a": "\u00e9"}]}
        for criterion in raw["criteria"]:
            criterion |= {"weight": 2.5, "_match_cut_at_260": False, "sources": [], "evaluation_options": {"other": 1}}
        (folder / "task.json").write_text(json.dumps(raw))
        again = load_task(folder).to_json()
        assert json.dumps(again) == json.dumps(raw)


def test_empty_bindings_and_maps_are_none(made, tmp_path):
    for number, source in enumerate(find_tasks(made)):
        folder = shutil.copytree(source, tmp_path / "tasks" / str(number) / source.name)
        raw = json.loads((folder / "task.json").read_text()) | {"deliverables": {}, "work_type": None, "tags": None}
        for criterion in raw["criteria"]:
            criterion |= {"deliverables": [], "sources": None, "evaluation_options": None}
        (folder / "task.json").write_text(json.dumps(raw))
        task = load_task(folder)
        assert (task.deliverables, task.work_type, task.tags) == (None, None, ())
        assert {task.files_for(each, ["b.md", "a.md"]) for each in task.criteria} == {("a.md", "b.md")}
        assert not any(each.include_redlines for each in task.criteria)


def test_ids_with_gaps_and_the_same_ids_in_other_tasks_are_fine(folder):
    raw = load_task(folder).to_json()
    del raw["criteria"][1:4]
    (folder / "task.json").write_text(json.dumps(raw))
    assert [each.id for each in load_task(folder).criteria][:2] == ["C-001", "C-005"]


def test_documents_that_would_leak_the_rubric_are_refused(folder):
    (folder / "documents" / "link.json").symlink_to(folder / "task.json")
    with pytest.raises(LabTaskError, match=r"link\.json"):
        load_task(folder).agent_view()
    elsewhere = folder.parents[2] / "elsewhere"
    elsewhere.mkdir()
    for docs_dir in (".", "corporate-commercial", "..", "/", "../elsewhere", str(elsewhere)):
        rewrite(folder, docs_dir=docs_dir)
        with pytest.raises(LabTaskError, match="docs_dir"):
            load_task(folder).agent_view()


def test_rubric_hash_follows_what_is_judged_and_nothing_else(folder):
    before = load_task(folder)
    raw = before.to_json()
    raw["criteria"][0] |= {"sources": ["other.txt"], "note": "new"}
    raw["criteria"][1]["match_criteria"] += " Or not."
    raw["criteria"][2]["deliverables"] = (
        ["memo.md"] if before.criteria[2].deliverables != ("memo.md",) else ["schedule.md"]
    )
    raw["criteria"][0]["id"] = "C-900"
    (folder / "task.json").write_text(json.dumps(raw))
    after = load_task(folder)
    same = [a.rubric_hash == b.rubric_hash for a, b in zip(before.criteria, after.criteria, strict=True)]
    assert same == [True, False, False] + [True] * (len(same) - 3)
    assert before.rubric_hash != after.rubric_hash


def test_a_task_is_a_question_set_for_one_question_at_a_time(tasks):
    for task in tasks:
        questions = task.question_set()
        assert len(questions.questions) == 8
        assert {each.tags["kind"] for each in questions.questions} <= {"sum", "date", "person", "reference"}
        assert sum(each.tags["amended"] for each in questions.questions) == 1
        for question in questions.questions:
            assert question.answer in questions.text
            assert "value" not in question.tags
        if task.family == "practice":  # reading order: amendments after what they amend
            question = next(each for each in questions.questions if each.tags["amended"])
            assert questions.text.index(question.wrong[0]) < questions.text.index(question.answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": []}, "empty rubric"),
        ({"criteria": None}, "empty rubric"),
        ({"title": None}, "title None"),
        ({"instructions": None}, "instructions"),
        ({"deliverables": ["memo.md"]}, "memo.md"),
        ({"criteria": ["C-001"]}, "criterion 1"),
        ({"criteria": [{"id": "C-001", "title": "t"}]}, "match_criteria"),
        (
            {"criteria": [{"id": "C-1", "title": "t", "match_criteria": "m", "deliverables": "memo.md"}]},
            "deliverables 'memo.md'; it is a list",
        ),
        ({"tags": "tax"}, "tags 'tax'"),
        ({"criteria": [{"id": "C-7", "title": "t", "match_criteria": "m"}] * 2}, "'C-7'"),
    ],
)
def test_broken_tasks_are_refused_by_name(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(LabTaskError, match=message):
        load_task(folder)


def test_no_task_and_no_json_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no task.json"):
        load_task(tmp_path)
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(LabTaskError, match="no JSON"):
        load_task(tmp_path)


def test_problems_name_what_a_grader_would_stumble_over(folder):
    raw = load_task(folder).to_json()
    raw["criteria"][0]["deliverables"] = ["letter.md"]
    raw["criteria"][1]["expect"] = {"value": "x"}
    raw["docs_dir"] = "firm-knowledge/dms"
    (folder / "task.json").write_text(json.dumps(raw))
    found = problems(load_task(folder))
    assert len(found) == 3
    assert all(word in " ".join(found) for word in ("letter.md", "question, party, kind", "firm-knowledge/dms"))


def test_real_tasks_load_and_are_written_back_equal(lab):
    folders = find_tasks(lab / "tasks")
    assert len(folders) == 22
    for folder in folders:
        task = load_task(folder)
        assert task.id == folder.relative_to(lab / "tasks").as_posix()
        text = (folder / "task.json").read_text(encoding="utf-8")
        assert task.to_json() == json.loads(text)
        assert list(task.to_json()) == list(json.loads(text))
        assert len({each.rubric_hash for each in task.criteria}) == len(task.criteria)
        view = task.agent_view()
        assert not any(each.title in repr(view) for each in task.criteria)


def test_real_practice_rubrics_have_their_bindings(lab):
    task = load_task(lab / "tasks" / "banking-finance" / "draft-commitment-letter")
    assert (task.family, len(task.criteria), task.work_type) == ("practice", 77, "draft")
    outputs = ["commitment-letter.docx", "issues-memo.docx"]
    bound = [task.files_for(each, outputs) for each in task.criteria]
    assert bound.count(("issues-memo.docx", "commitment-letter.docx")) == 2
    assert bound.count(("issues-memo.docx",)) == 26
    markup = "arbitration-international-dispute-resolution/identify-arbitration-agreement-markup"
    assert len(load_task(lab / "tasks" / markup).criteria) == 41


def test_real_firm_knowledge_tasks_are_bound_to_every_output(lab):
    task = load_task(lab / "tasks" / "firm-knowledge" / "tasks" / "007")
    assert (task.id, task.family, task.own_id) == ("firm-knowledge/tasks/007", "firm-knowledge", "007")
    assert task.files_for(task.criteria[0], ["x.docx"]) == ("x.docx",)
    assert len(task.documents) == 5
    with pytest.raises(LabTaskError, match="judge must read"):
        task.question_set()
