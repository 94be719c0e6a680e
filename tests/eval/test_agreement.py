from __future__ import annotations

import json
import random

import pytest
from made_scores import scores_of, write_run

from still.eval.agreement import Pair, Rates, compare_judges
from still.eval.dual import write_dual
from still.eval.scored import graded_by, load_runs
from still.eval.stats import clustered_rate, cohens_kappa
from still.eval.verdicts import CriterionVerdict


def runs_of(folder, judge, labels, **more):
    """Runs that one judge graded: task -> labels."""
    for task, letters in labels.items():
        write_run(folder / judge / task.replace("/", "-"), letters, judge=judge, task=task, **more)
    return load_runs([folder / judge])


def test_the_table_and_every_rate_by_hand(tmp_path):
    reference = runs_of(tmp_path, "strong", {"tax/a": "ppppff", "tax/b": "ppfffu", "tax/c": "pppp"}, cost=0.02)
    candidate = runs_of(tmp_path, "cheap", {"tax/a": "pppfpf", "tax/b": "pppffp", "tax/d": "pp"}, cost=0.001)
    found = compare_judges(reference, candidate)
    # tax/a: p/f on 4, f/p on 5; tax/b: f/p on 3, and 6 is unscored by the reference.
    assert (found.reference, found.candidate, found.runs, found.only_one) == ("strong", "cheap", 2, 2)
    assert found.rates.counts == {"both_pass": 5, "false_pass": 2, "false_fail": 1, "both_fail": 3}
    assert found.rates.agreement.estimate == pytest.approx(8 / 11)
    assert found.rates.false_pass.estimate == pytest.approx(2 / 5)
    assert found.rates.false_fail.estimate == pytest.approx(1 / 6)
    chance = (6 * 7 + 5 * 4) / 121
    assert found.rates.kappa.estimate == pytest.approx((8 / 11 - chance) / (1 - chance))
    assert found.rates.mcnemar == 1.0
    assert found.rates.leniency.interval.estimate == pytest.approx(1 / 11)
    assert found.unscored == (1, 0)
    assert found.costs == (pytest.approx(1000 * 0.24 / 11), pytest.approx(1.0))
    assert found.all_pass == {(False, False): 2}
    assert [(pair.task, pair.reference.id) for pair in found.disagreements] == [
        ("tax/a", "C-005"), ("tax/b", "C-003"), ("tax/a", "C-004"),
    ]  # fmt: skip
    assert list(found.by_task) == ["tax/a", "tax/b"]
    assert found.by_task["tax/b"].counts == {"both_pass": 2, "false_pass": 1, "false_fail": 0, "both_fail": 2}


def test_rates_by_kind_of_criterion_follow_the_titles(tmp_path):
    titles = (
        "Names the seat",
        "States the fee of $5",
        "At least 6 of 8 items",
        "Does not disclose it",
        "DISTRACTOR: x",
    )
    reference = runs_of(tmp_path, "a", {"tax/a": "pffff"}, titles=titles)
    candidate = runs_of(tmp_path, "b", {"tax/a": "ppppp"}, titles=titles)
    found = compare_judges(reference, candidate).by_kind
    assert {kind: rates.counts["false_pass"] for kind, rates in found.items()} == {
        "presence": 0, "numeric": 1, "counting": 1, "absence": 1, "distractor": 1,
    }  # fmt: skip
    assert found["presence"].false_pass is None
    assert found["counting"].false_fail is None


def test_real_pairs_of_judges_match_a_hand_computation(lab, tmp_path):
    pairs = json.loads((lab / "runs" / "dual_judge.json").read_text())
    for number, run in enumerate(pairs["exact_pairs"]):
        names = [f"C-{index:03d}" for index in range(1, run["n"] + 1)]
        both = [
            scores_of(["f" if name in run[key] else "p" for name in names], judge, run["task"], run["run"])
            for judge, key in zip(pairs["judges"], ("fail_sonnet46", "fail_gpt55"), strict=True)
        ]
        (tmp_path / str(number)).mkdir()
        write_dual(tmp_path / str(number), both)
    runs = load_runs([tmp_path])
    sonnet, gpt = (graded_by(runs, judge) for judge in pairs["judges"])
    found = compare_judges(sonnet, gpt)
    # By hand, from the lists of failed criteria. Conflict check, 56: both fail 43, 44; GPT alone 18. Timeline, 64:
    # both 45, 48; Sonnet alone 29, 47; GPT alone 16, 27. Interrogatories, 50: both 9 of Sonnet's 11, Sonnet alone
    # 33 and 46; GPT none alone. Sonnet fails 2 + 4 + 11 = 17 of 170, GPT 3 + 4 + 9 = 16; both fail 2 + 2 + 9 = 13.
    assert found.rates.counts == {"both_pass": 150, "false_pass": 4, "false_fail": 3, "both_fail": 13}
    assert found.rates.agreement.estimate == pytest.approx(163 / 170)
    assert found.rates.false_pass.estimate == pytest.approx(4 / 17)
    assert found.rates.false_fail.estimate == pytest.approx(3 / 153)
    chance = (17 * 16 + 153 * 154) / 170**2
    assert found.rates.kappa.estimate == pytest.approx((163 / 170 - chance) / (1 - chance))
    assert found.rates.kappa.estimate == pytest.approx(0.134118 / 0.175294, abs=1e-5)
    assert found.rates.mcnemar == 1.0
    # Clustered by its three runs: residuals of agreement 55 - 56 a, 60 - 64 a, 48 - 50 a with a = 163/170.
    a = 163 / 170
    variance = 3 / 2 * sum((x - n * a) ** 2 for x, n in ((55, 56), (60, 64), (48, 50))) / 170**2
    n = min(170, a * (1 - a) / variance)
    t = 4.302653
    centre, reach = (a + t * t / (2 * n)) / (1 + t * t / n), t * (a * (1 - a) / n + t * t / (4 * n * n)) ** 0.5
    assert found.rates.agreement.low == pytest.approx(centre - reach / (1 + t * t / n), abs=1e-6)
    assert found.rates.agreement.high == pytest.approx(centre + reach / (1 + t * t / n), abs=1e-6)
    failed = clustered_rate([0, 0] + [0, 0, 1, 1] + [0] * 9 + [1, 1], ["x"] * 2 + ["y"] * 4 + ["z"] * 11)
    assert (found.rates.false_pass.low, found.rates.false_pass.high) == (failed.low, failed.high)
    passed = clustered_rate([0] * 53 + [1] + [0] * 58 + [1, 1] + [0] * 39, ["x"] * 54 + ["y"] * 60 + ["z"] * 39)
    assert (found.rates.false_fail.low, found.rates.false_fail.high) == (passed.low, passed.high)
    assert found.all_pass == {(False, False): 3}
    assert found.costs == (None, None)


def test_kappas_interval_is_seeded_and_covers_the_truth(tmp_path):
    rng = random.Random(5)
    covered, draws = 0, 60
    for draw in range(draws):
        strong, cheap = {}, {}
        for task in range(25):
            difficulty = rng.betavariate(4, 2)
            first = ["p" if rng.random() < difficulty else "f" for _ in range(20)]
            strong[f"tax/{task}"] = "".join(first)
            cheap[f"tax/{task}"] = "".join(x if rng.random() < 0.9 else "pf"[x == "p"] for x in first)
        found = compare_judges(
            runs_of(tmp_path / str(draw), "a", strong), runs_of(tmp_path / str(draw), "b", cheap), seed=1
        )
        p = 4 / 6
        q = 0.9 * p + 0.1 * (1 - p)
        chance = p * q + (1 - p) * (1 - q)
        truth = (0.9 - chance) / (1 - chance)
        covered += found.rates.kappa.low <= truth <= found.rates.kappa.high
    assert covered >= 51  # 85 %: 60 draws of a 95 % interval fall below that once in 2,000
    labels = [
        [pair.reference.label for pair in found.rates.pairs],
        [pair.candidate.label for pair in found.rates.pairs],
    ]
    assert found.rates.kappa.estimate == pytest.approx(cohens_kappa(*labels))
    again = compare_judges(load_runs([tmp_path / "59" / "a"]), load_runs([tmp_path / "59" / "b"]), seed=1)
    assert again.rates.kappa == found.rates.kappa
    other = compare_judges(load_runs([tmp_path / "59" / "a"]), load_runs([tmp_path / "59" / "b"]), seed=2)
    assert other.rates.kappa != found.rates.kappa


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_kappas_interval_over_few_tasks_covers_the_truth(tasks):
    rng = random.Random(tasks)

    def drawn(count: int) -> Rates:
        pairs = []
        for task in range(count):
            passes, false_pass, false_fail = (rng.betavariate(*shape) for shape in ((4, 2), (2, 6), (1, 9)))
            for name in map(str, range(40)):
                first = rng.random() < passes
                second = rng.random() < (1 - false_fail if first else false_pass)
                given = [CriterionVerdict(name, name, "pass" if each else "fail") for each in (first, second)]
                pairs.append(Pair("", str(task), "", "presence", "", *given))
        return Rates(tuple(pairs))

    found = [drawn(tasks).kappa for _ in range(60)]
    covered = sum(each.low <= 0.658 <= each.high for each in found)  # the truth, by 800,000 draws
    assert covered >= 51  # 85 %: 60 draws of a 95 % interval fall below that once in 2,000
    assert all(-1 <= each.low <= each.estimate <= each.high <= 1 for each in found)


def test_tasks_without_spread_are_no_certainty_of_kappa(tmp_path):
    for name, first, second in (("few", 2, "ppff"), ("many", 25, "ppff"), ("chance", 2, "pfpf")):
        labels = {f"tax/{task}": "ppff" for task in range(first)}
        other = dict.fromkeys(labels, second)
        kappa = compare_judges(runs_of(tmp_path / name, "a", labels), runs_of(tmp_path / name, "b", other)).rates.kappa
        assert kappa.estimate == (0 if name == "chance" else 1)
        assert kappa.high - kappa.low > 0.1, name


def test_full_agreement_has_no_kappa_and_no_false_point_interval(tmp_path):
    found = compare_judges(runs_of(tmp_path, "a", {"tax/a": "pppp"}), runs_of(tmp_path, "b", {"tax/a": "pppp"}))
    assert found.rates.kappa is None
    assert found.rates.false_pass is None
    assert found.rates.agreement.estimate == 1
    assert found.rates.agreement.low < 0.6


def test_pairs_say_which_system_made_the_run(tmp_path):
    for system, labels in (("A", "pf"), ("B", "fp")):
        for judge, given in (("strong", labels), ("cheap", "pp")):
            write_run(tmp_path / judge / system, given, judge=judge, model=system, run_id="seed-0")
    found = compare_judges(load_runs([tmp_path / "strong"]), load_runs([tmp_path / "cheap"]))
    assert {(pair.system, pair.reference.id) for pair in found.disagreements} == {("A", "C-002"), ("B", "C-001")}


def test_a_system_that_only_the_candidates_file_names_is_known(tmp_path):
    write_run(tmp_path / "strong", "pf", judge="strong")
    write_run(tmp_path / "cheap", "pp", judge="cheap", model="A")
    found = compare_judges(load_runs([tmp_path / "strong"]), load_runs([tmp_path / "cheap"]))
    assert {pair.system for pair in found.rates.pairs} == {"A"}


def test_runs_without_a_common_id_are_matched_by_task_and_that_is_said(tmp_path):
    reference = runs_of(tmp_path, "a", {"tax/a": "pf", "tax/b": "pp"}, run_id="one")
    candidate = runs_of(tmp_path, "b", {"tax/a": "pp", "tax/b": "pp"}, run_id="two")
    found = compare_judges(reference, candidate)
    assert (found.runs, found.rates.counts["false_pass"]) == (2, 1)
    assert "matched by their task" in found.warnings[0]


def test_a_criterion_whose_rubric_changed_is_not_compared(tmp_path):
    reference = runs_of(tmp_path, "a", {"tax/a": "pp"}, hashes={"C-001": "1", "C-002": "2"})
    candidate = runs_of(tmp_path, "b", {"tax/a": "fp"}, hashes={"C-001": "other", "C-002": "2"})
    found = compare_judges(reference, candidate)
    assert (len(found.rates.pairs), found.unpaired) == (1, 1)


def test_different_texts_are_warned_of(tmp_path):
    block = {"verdicts": [], "judging": {"deliverables": [{"name": "memo.md", "sha256": "1"}]}}
    reference = runs_of(tmp_path, "a", {"tax/a": "pp"}, still=block)
    block = {"verdicts": [], "judging": {"deliverables": [{"name": "memo.md", "sha256": "2"}]}}
    candidate = runs_of(tmp_path, "b", {"tax/a": "pp"}, still=block)
    assert "different texts" in compare_judges(reference, candidate).warnings[0]


def test_sides_that_cannot_be_compared_are_refused(tmp_path):
    reference = runs_of(tmp_path, "a", {"tax/a": "pp"})
    other = runs_of(tmp_path, "b", {"tax/z": "pp"})
    with pytest.raises(ValueError, match="no run in common"):
        compare_judges(reference, other)
    with pytest.raises(ValueError, match="choose one judge"):
        compare_judges(reference + other, other)
    with pytest.raises(ValueError, match="twice"):
        compare_judges(reference + reference, reference)
