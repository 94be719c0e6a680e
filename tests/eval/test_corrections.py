from __future__ import annotations

import json
import random

import pytest
from made_scores import scores_of, write_run

from still.eval.corrections import Labelled, audited, corrected_rate, label_pairs
from still.eval.scored import load_runs
from still.eval.stats import t_quantile


def draw(rng, tasks, size, lenient=0.25, strict=0.04):
    """Tasks whose criteria hang together, under a judge whose errors do too: (task, judge, label) rows."""
    rows = []
    for task in range(tasks):
        rate = rng.betavariate(5, 2)
        wrong_up, wrong_down = lenient * rng.uniform(0.3, 1.7), strict * rng.uniform(0, 2)
        for _ in range(size):
            label = rng.random() < rate
            judge = rng.random() >= wrong_down if label else rng.random() < wrong_up
            rows.append(Labelled(f"task-{task}", judge, label))
    return rows


TRUTH = 5 / 7
"""The mean of the tasks' pass rates: what the corrected rate estimates for new tasks of the same kind."""


def test_prediction_powered_by_hand():
    judged = [("a", True)] * 6 + [("a", False)] * 2 + [("b", True)] * 2 + [("b", False)] * 2
    sample = [Labelled("a", True, True)] * 3 + [Labelled("a", True, False)] + [Labelled("b", False, False)] * 2
    found = corrected_rate(judged, sample)
    # raw 8/12; sample: labels 3/6, judge 4/6, covariance 1/2 - 1/3 = 1/6, variance 2/9; weight (3/4) / (1 + 6/12) = 1/2
    assert found.raw == pytest.approx(8 / 12)
    assert found.weight == pytest.approx(0.5)
    assert found.interval.estimate == pytest.approx(0.5 * 8 / 12 + 3 / 6 - 0.5 * 4 / 6)
    assert (found.sensitivity, found.specificity, found.labelled) == (1.0, 2 / 3, 6)
    assert (found.interval.low, found.interval.high) == (pytest.approx(0.009, abs=1e-3), pytest.approx(0.991, abs=1e-3))


def test_rogan_gladen_by_hand():
    judged = [("a", True)] * 70 + [("b", False)] * 30
    sample = [Labelled("x", True, True)] * 18 + [Labelled("y", False, True)] * 2
    sample += [Labelled("x", False, False)] * 8 + [Labelled("y", True, False)] * 2
    found = corrected_rate(judged, sample, "rogan-gladen")
    assert found.interval.estimate == pytest.approx((0.7 + 0.8 - 1) / (0.9 + 0.8 - 1))


@pytest.mark.parametrize("method", ["prediction-powered", "rogan-gladen"])
def test_intervals_cover_the_truth_where_the_judges_own_do_not(method):
    rng = random.Random(7)
    covered = naive = 0
    draws = 150
    for _ in range(draws):
        rows = draw(rng, tasks=40, size=30)
        judged = [(row.task, row.judge) for row in rows]
        sample = rng.sample(rows, 240) if method == "prediction-powered" else [
            Labelled("other-" + row.task, row.judge, row.label) for row in rng.sample(draw(rng, 40, 30), 240)
        ]  # fmt: skip
        found = corrected_rate(judged, sample, method)
        covered += found.interval.low <= TRUTH <= found.interval.high
        naive += abs(found.raw - TRUTH) <= found.interval.half_width
        assert found.interval.half_width < 0.16
    assert covered >= 0.91 * draws
    assert naive < covered


@pytest.mark.parametrize("method", ["prediction-powered", "rogan-gladen"])
def test_the_width_is_that_of_a_jackknife_over_tasks(method):
    rows = draw(random.Random(3), tasks=60, size=25, lenient=0.4)
    chosen = set(random.Random(4).sample(range(len(rows)), 700))

    def estimate(without=None):
        kept = [(index, row) for index, row in enumerate(rows) if row.task != without]
        judged = [(row.task, row.judge) for _, row in kept]
        return corrected_rate(judged, [row for index, row in kept if index in chosen], method).interval

    found, tasks = estimate(), sorted({row.task for row in rows})
    left_out = [estimate(task).estimate for task in tasks]
    middle = sum(left_out) / len(tasks)
    spread = (len(tasks) - 1) / len(tasks) * sum((each - middle) ** 2 for each in left_out)
    assert found.half_width == pytest.approx(t_quantile(0.975, 59) * spread**0.5, rel=0.08)


def test_a_sample_without_errors_still_leaves_room_for_them():
    judged = [(f"t{i % 20}", i % 4 != 0) for i in range(2000)]
    sample = [Labelled(task, passed, passed) for task, passed in judged[:50]]
    found = corrected_rate(judged, sample)
    assert found.interval.estimate == pytest.approx(0.75, abs=0.01)
    assert found.interval.half_width > 0.03


def test_a_judge_that_always_passes_counts_for_nothing():
    judged = [(f"t{i % 10}", True) for i in range(500)]
    sample = [Labelled(f"t{i % 10}", True, i % 2 == 0) for i in range(60)]
    found = corrected_rate(judged, sample)
    assert (found.weight, found.raw, found.specificity) == (0.0, 1.0, 0.0)
    assert found.interval.estimate == pytest.approx(0.5)
    with pytest.raises(ValueError, match="better than chance"):
        corrected_rate(judged, sample, "rogan-gladen")


def test_samples_that_say_nothing_are_refused():
    one = Labelled("a", True, True)
    with pytest.raises(ValueError, match="1 labelled"):
        corrected_rate([("a", True)], [one])
    with pytest.raises(ValueError, match="2 passes and 0 fails"):
        corrected_rate([("a", True)], [one, one], "rogan-gladen")


def test_labels_are_matched_with_verdicts_and_unscored_ones_are_none(tmp_path):
    write_run(tmp_path / "judged" / "a", "ppfu", judge="cheap")
    write_run(tmp_path / "judged" / "b", "pp", judge="cheap", task="tax/b")
    write_run(tmp_path / "labels" / "a", "pfup", judge="people")
    found = label_pairs(load_runs([tmp_path / "judged"]), load_runs([tmp_path / "labels"]))
    assert found == [Labelled("tax/a", True, True), Labelled("tax/a", True, False)]


def test_labels_for_a_run_that_two_judged_ones_may_be_are_refused(tmp_path):
    for system in ("A", "B"):
        write_run(tmp_path / "judged" / system, "ppff", judge="cheap", model=system, run_id="seed-0")
        write_run(tmp_path / "judged" / f"{system}-1", "pppp", judge="cheap", model=system, run_id="seed-1")
    write_run(tmp_path / "judged" / "C", "pf", judge="cheap", model="C", run_id="alone")
    judged = load_runs([tmp_path / "judged"])
    write_run(tmp_path / "one", "pp", judge="people", run_id="alone")
    assert len(label_pairs(judged, load_runs([tmp_path / "one"]))) == 2
    write_run(tmp_path / "labels", "pfff", judge="people", run_id="seed-0")
    labels = load_runs([tmp_path / "labels"])
    with pytest.raises(ValueError, match=r"run 'seed-0' of tax/a, and 2 judged runs are called so"):
        label_pairs(judged, labels)
    assert len(label_pairs([run for run in judged if run.system == "A"], labels)) == 4


def test_a_cascades_audit_is_a_sample_of_its_cheap_judge(tmp_path):
    scores = scores_of("ppff", "cascade(c, s)")
    cheap, strong = {"id": "x", "title": "x", "judge": "c", "role": "cheap"}, {"id": "x", "title": "x", "judge": "s"}
    first, second, third, _ = scores["still"]["verdicts"]
    first["role"] = "cheap"
    second |= {"role": "audit", "votes": [cheap | {"label": "pass"}, strong | {"label": "pass", "role": "strong"}]}
    third |= {"role": "strong", "votes": [cheap | {"label": "pass"}, strong | {"label": "fail", "role": "strong"}]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    judged, sample = audited(load_runs([tmp_path]))
    assert judged == [("tax/a", True)] * 3
    assert sample == [Labelled("tax/a", True, True)]
