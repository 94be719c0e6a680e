from __future__ import annotations

import json

import pytest
from made_scores import scores_of, write_run

from still.eval.dual import write_dual
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.quarantine import Entry, Quarantine, candidates, item_statistics
from still.eval.scored import Rubrics, RunFolders, judges_of, load_runs
from still.eval.stats import cluster_bootstrap, wilson
from still.eval.summary import both_scores, by, compare_systems, summarise
from still.eval.tasks import find_tasks, load_task


def runs_of(folder, labels, **more):
    """Runs in a folder: task -> labels of one run."""
    for task, letters in labels.items():
        write_run(folder / task.replace("/", "-"), letters, task=task, **more)
    return load_runs([folder])


def test_rates_by_hand(tmp_path):
    runs = runs_of(tmp_path, {"tax/a": "pppp", "tax/b": "pf", "lease/c": "ppu", "lease/d": "fu"}, cost=0.5)
    found = summarise(runs, seed=3)
    assert (found.runs, found.tasks, found.criteria, found.unscored) == (4, 4, 11, 2)
    assert found.micro.estimate == pytest.approx(7 / 9)
    assert found.macro.estimate == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    groups = [1] * 4 + [1, 0] + [1, 1] + [0]
    tasks = ["a"] * 4 + ["b"] * 2 + ["c"] * 2 + ["d"]
    # the folder is read in sorted order: lease-c, lease-d, tax-a, tax-b
    order = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    same = cluster_bootstrap([groups[i] for i in order], [tasks[i] for i in order], seed=3)
    assert (found.micro.low, found.micro.high) == (same.low, same.high)
    assert (found.all_passed, found.unknown) == (1, 1)
    assert found.all_pass == wilson(1, 3)
    assert found.all_pass_bounds == (0.25, 0.5)
    assert found.cost == pytest.approx(5.5)
    areas = by(runs, lambda run: run.area)
    assert {name: each.micro.estimate for name, each in areas.items()} == {"lease": 2 / 3, "tax": 5 / 6}


def test_the_seed_decides_the_intervals_over_many_tasks(tmp_path):
    runs = runs_of(tmp_path, {f"tax/{n:02d}": "pppf" if n % 3 else "pf" for n in range(24)})
    found, values, tasks = summarise(runs, seed=3), [], []
    for run in runs:
        values += [verdict.passed for verdict in run.verdicts]
        tasks += [run.task] * len(run.verdicts)
    assert found.micro == cluster_bootstrap(values, tasks, seed=3)
    assert found.macro == cluster_bootstrap(values, tasks, macro=True, seed=3)
    assert found.micro != summarise(runs, seed=4).micro


def test_what_was_judged_without_a_call_cost_nothing_and_other_files_do_not_say(tmp_path):
    (ours,) = runs_of(tmp_path / "a", {"tax/a": "pf"}, still={"judging": {"judges": {"exact": {"model": "exact"}}}})
    (theirs,) = runs_of(tmp_path / "b", {"tax/a": "pf"}, still={})
    assert (ours.judging_cost, theirs.judging_cost) == (0.0, None)
    called = [{"id": "C-001", "title": "t", "label": "pass", "tokens": {"calls": 1}}]
    block = {"judging": {"judges": {}}, "verdicts": called}
    (unpriced,) = runs_of(tmp_path / "c", {"tax/a": "pf"}, still=block)
    assert unpriced.judging_cost is None


def test_several_runs_of_a_task_are_no_trials_of_their_own(tmp_path):
    for run in range(6):
        write_run(tmp_path / f"a{run}", "pp", task="tax/a", run_id=f"a{run}")
        write_run(tmp_path / f"b{run}", "pf", task="tax/b", run_id=f"b{run}")
    found = summarise(load_runs([tmp_path]))
    assert (found.runs, found.tasks, found.all_pass.estimate) == (12, 2, 0.5)
    assert found.all_pass.half_width > wilson(6, 12).half_width


def test_all_unscored_is_no_rate(tmp_path):
    found = summarise(runs_of(tmp_path, {"tax/a": "uu"}))
    assert (found.micro, found.macro, found.all_pass, found.all_pass_bounds) == (None, None, None, (0.0, 1.0))
    with pytest.raises(ValueError, match="no runs"):
        summarise([])


def test_systems_are_paired_by_criterion_and_task(tmp_path):
    a = runs_of(tmp_path / "a", {"tax/a": "pppp", "tax/b": "ppff", "tax/c": "pp", "tax/only": "ffff"}, model="A")
    b = runs_of(tmp_path / "b", {"tax/a": "pppf", "tax/b": "pfpf", "tax/c": "pp"}, model="B")
    found = compare_systems(a, b)
    assert (found.tasks, found.criteria) == (3, 10)
    assert found.criterion.interval.estimate == pytest.approx((1 + 0 + 0) / 10)
    assert (found.criterion.only_a, found.criterion.only_b) == (2, 1)
    assert (found.only_a, found.only_b, found.mcnemar) == (1, 0, 1.0)
    assert found.all_pass.interval.estimate == pytest.approx(1 / 3)
    other = runs_of(tmp_path / "c", {"tax/a": "pppp"}, judge="other")
    with pytest.raises(ValueError, match="under one"):
        compare_systems(a, other)
    with pytest.raises(ValueError, match="no criterion"):
        compare_systems(a, runs_of(tmp_path / "d", {"tax/z": "p"}))


def test_criteria_are_paired_by_wording_as_far_as_files_tell_it(tmp_path):
    a = runs_of(tmp_path / "a", {"tax/a": "pp"}, hashes={"C-001": "1", "C-002": "2"})
    b = runs_of(tmp_path / "b", {"tax/a": "ff"}, hashes={"C-001": "changed", "C-002": "2"})
    assert compare_systems(a, b).criteria == 1
    bare = runs_of(tmp_path / "c", {"tax/a": "ff"}, still={})
    assert compare_systems(a, bare).criteria == compare_systems(bare, a).criteria == 2


def test_repeated_runs_are_averaged_before_they_are_paired(tmp_path):
    for run, labels in enumerate(("pp", "pf")):
        write_run(tmp_path / "a" / str(run), labels, run_id=str(run))
    write_run(tmp_path / "b" / "0", "ff", run_id="0")
    found = compare_systems(load_runs([tmp_path / "a"]), load_runs([tmp_path / "b"]))
    assert found.criterion.interval.estimate == pytest.approx((1 + 0.5) / 2)
    assert found.all_pass.interval.estimate == pytest.approx(0.5)


def test_loading_takes_the_latest_of_each_judge_and_no_stopped_ones(tmp_path):
    folder = write_run(tmp_path / "run", "pf", judge="a", model="gpt-9")
    early = scores_of("ff", "a") | {"scored_at": "2025-01-01T00:00:00+00:00"}
    (folder / "scores_old.json").write_text(json.dumps(early))
    (folder / "scores.partial.json").write_text(json.dumps(scores_of("uu", "a")))
    write_dual(folder, [scores_of("pp", "b"), scores_of("fp", "c")])
    runs = load_runs([tmp_path])
    assert {run.judge: "".join(v.label[0] for v in run.verdicts) for run in runs} == {"a": "pf", "b": "pp", "c": "fp"}
    assert {run.system for run in runs} == {"gpt-9"}
    assert next(run for run in runs if run.judge == "b").path.name == "scores_b.json"
    assert judges_of(load_runs([folder / "scores_dual.json"])) == ["b", "c"]
    with pytest.raises(ValueError, match="one judge at a time"):
        summarise(runs)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="still grade"):
            load_runs([nothing])


@pytest.mark.parametrize("place", ["output", "output/deep", "workspace", "workspace/output"])
def test_scores_that_an_agent_wrote_are_not_believed(tmp_path, place):
    run = write_run(tmp_path / "runs" / "0", "pf", judge="strict", model="m")
    forged = write_run(run / place, "pp", judge="strict", model="better")
    (forged / "scores.json").rename(forged / "scores_strict.json")
    (forged / "scores.json").write_text('{"criteria_results": [{"verdict": "pass"}]}')
    (forged / "scoresheet.json").write_text("{}")
    (found,) = load_runs([tmp_path])
    assert (found.system, found.all_pass) == ("m", False)
    (run / "scores.json").unlink()
    with pytest.raises(FileNotFoundError, match="output/ and workspace/ aside"):
        load_runs([tmp_path])


def test_only_scores_files_are_read_and_a_folder_called_workspace_may_hold_runs(tmp_path):
    write_run(tmp_path / "workspace" / "0", "pf")
    (tmp_path / "workspace" / "scoresheet.json").write_text("{}")
    assert len(load_runs([tmp_path])) == 1


def test_a_criterion_without_an_id_is_an_error_that_names_the_file(tmp_path):
    scores = scores_of("pf")
    del scores["criteria_results"][1]["id"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=r"scores\.json: criterion 2 has no id;"):
        load_runs([tmp_path])


def test_runs_in_two_folders_are_two_and_a_folder_graded_again_is_one(tmp_path):
    for name in ("x", "y"):
        write_run(tmp_path / name, "pf", model="m", run_id="seed-0")
    for name, labels, when in (("x", "ff", "2025"), ("y", "pp", "2027")):
        again = scores_of(labels, run_id="seed-0") | {"scored_at": f"{when}-01-01T00:00:00+00:00"}
        (tmp_path / name / "scores_again.json").write_text(json.dumps(again))
    runs = load_runs([tmp_path, tmp_path / "y" / ".." / "x"])
    assert {run.path.parent.name: "".join(v.label[0] for v in run.verdicts) for run in runs} == {"x": "pf", "y": "pp"}
    assert len(runs) == 2
    assert summarise(runs).criteria == 4


def test_runs_of_one_id_are_told_apart_by_their_task(tmp_path):
    for name, task in (("a", "tax/a"), ("b", "tax/b")):
        (tmp_path / name / "output").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"run_id": "1", "task": task, "model": f"m-{name}"}))
    (tmp_path / "c" / "output").mkdir(parents=True)
    folders = RunFolders([tmp_path])
    assert folders.find("tax/b", "1") == tmp_path / "b"
    assert folders.find("tax/z", "1") is None
    assert folders.find("tax/z", "c") == tmp_path / "c"
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "scores.json").write_text(json.dumps(scores_of("p", task="tax/b", run_id="1")))
    (run,) = load_runs([tmp_path / "apart"], folders=folders)
    assert (run.system, run.folder) == ("m-b", tmp_path / "b")


def test_a_quarantined_criterion_counts_by_its_hash_alone(tmp_path):
    runs = runs_of(tmp_path, {"tax/a": "ppf", "tax/b": "ppp"})
    listed = Quarantine((Entry("tax/a", "C-003", "hash-C-003", "the fact is in no document", "jd", "2026-09-01"),))
    found = both_scores(runs, listed)
    assert found.official.micro.estimate == pytest.approx(5 / 6)
    assert found.without.micro.estimate == 1
    assert (found.official.all_passed, found.without.all_passed, found.dropped) == (1, 2, 1)
    changed = Quarantine((Entry("tax/a", "C-003", "hash-before", "x"), Entry("tax/z", "C-001", "h", "elsewhere")))
    assert both_scores(runs, changed).without is None
    ((entry, why),) = changed.unused(runs)
    assert (entry.rubric, "hash-C-003" in why) == ("hash-before", True)
    assert listed.unused(runs) == []


def test_hashes_of_labs_own_files_come_from_the_tasks(tmp_path):
    (folder,) = write_lab_tasks(tmp_path / "lab", "practice", [0], "tiny")
    task = load_task(folder)
    scores = scores_of("p" * len(task.criteria), task=task.id)
    del scores["still"]
    for result, criterion in zip(scores["criteria_results"], task.criteria, strict=True):
        result["id"] = criterion.id
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    first = task.criteria[0]
    listed = Quarantine((Entry(task.id, first.id, first.rubric_hash, "stale name"),))
    (bare,) = load_runs([tmp_path / "run"])
    assert listed.without([bare])[0].verdicts == bare.verdicts
    assert "name the tasks' folder" in listed.unused([bare])[0][1]
    (run,) = load_runs([tmp_path / "run"], Rubrics([tmp_path / "lab"]))
    assert len(listed.without([run])[0].verdicts) == len(task.criteria) - 1
    assert "distractor" in set(run.kinds.values())


def test_the_list_is_read_back_and_broken_ones_are_refused(tmp_path):
    listed = Quarantine((Entry("tax/a", "C-003", "h", "reason", "jd", "2026-09-01"),))
    listed.save(tmp_path / "list.json")
    assert Quarantine.load(tmp_path / "list.json") == listed
    for content in ("{", '[{"task": "a"}]', '{"task": "a"}', "[3]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json"):
            Quarantine.load(tmp_path / "bad.json")


def test_items_that_never_pass_split_judges_or_go_the_wrong_way_are_flagged(tmp_path):
    # criterion 1 always passes, 2 never does, 3 splits the judges, 4 is passed by the worse outputs only
    first = ["pfpfppp", "pfffppp", "pfppfff", "pffpfff"]
    second = ["pfffppp", "pfpfppp", "pffpfff", "pfppfff"]
    for index, both in enumerate(zip(first, second, strict=True)):
        for judge, labels in zip(("a", "b"), both, strict=True):
            write_run(tmp_path / judge / str(index), labels, judge=judge, run_id=str(index), model="m")
    items = {item.criterion: item for item in item_statistics(load_runs([tmp_path]))}
    assert items["C-001"].flags() == ("always passes",)
    assert items["C-002"].flags() == ("never passes",)
    assert (items["C-003"].split, items["C-003"].runs, items["C-003"].verdicts) == (1.0, 4, 8)
    assert "judges split" in items["C-003"].flags()
    assert items["C-004"].discrimination < -0.5
    assert "better outputs fail it" in items["C-004"].flags()
    assert items["C-005"].discrimination > 0
    assert items["C-005"].flags() == ()
    assert items["C-002"].flags(least=5) == ()
    suspects = candidates(items.values())
    assert [entry.criterion for entry in suspects.entries] == ["C-002", "C-003", "C-004"]
    assert "0 of 8 verdicts pass over 4 runs" in suspects.entries[0].reason


def test_real_scores_summarise_as_they_say(lab):
    runs = load_runs([lab / "runs" / "irys"])
    found = summarise(runs)
    said = [run.scores for run in runs]
    assert found.criteria == sum(each["n_criteria"] for each in said) == 215
    assert found.micro.estimate == pytest.approx(sum(each["n_passed"] for each in said) / 215)
    assert [run.all_pass for run in runs] == [each["all_pass"] for each in said]
    assert (found.all_passed, found.cost) == (1, None)
    rates = [each["n_passed"] / each["n_criteria"] for each in said]
    assert found.macro.estimate == pytest.approx(sum(rates) / 3)
    assert load_runs([lab / "runs" / "irys"], Rubrics([lab / "tasks"]))[0].area == "antitrust-competition"
    assert find_tasks(lab / "tasks")
