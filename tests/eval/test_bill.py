from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from judge_server import ids_in, make_task
from made_scores import write_run

from still.eval.agreement import compare_judges
from still.eval.bill import Workload, estimate, observed
from still.eval.grade import GradeConfig, grade
from still.eval.judges import Reply, ScriptedJudge
from still.eval.prices import Price, Prices
from still.eval.scored import load_runs
from still.eval.verdict_store import VerdictStore
from still.eval.verdicts import Tokens

SONNET = Price(3.0, 15.0, 0.3, 3.75)
OPUS = Price(5.0, 25.0, 0.5, 6.25)
DEEPSEEK = Price(0.14, 0.28, 0.0028)


@pytest.mark.parametrize(
    ("price", "per_call", "plain", "cached"),
    [
        (SONNET, 1, 24.5, 6.0),
        (SONNET, 4, 8.6, 4.0),
        (SONNET, 8, 5.9, 3.7),
        (SONNET, 16, 4.4, 3.5),
        (SONNET, 0, 3.3, 3.3),
        (OPUS, 1, 40.8, 10.0),
        (OPUS, 8, 9.9, 6.1),
        (DEEPSEEK, 1, 1.07, 0.13),
        (DEEPSEEK, 0, 0.08, 0.08),
    ],
)
def test_the_published_table_of_dollars_per_thousand(price, per_call, plain, cached):
    within = 0.006 if price is DEEPSEEK else 0.051  # the table rounds
    found = [estimate(Workload(), price, per_call, cached=how).per_thousand for how in (False, True)]
    assert found == [pytest.approx(plain, abs=within), pytest.approx(cached, abs=within)]


def test_a_bill_for_training_by_hand():
    work = Workload(tasks=100, rollouts=8, steps=50, criteria=10, deliverable_tokens=1000, instruction_tokens=100,
                    criterion_tokens=50, verdict_tokens=20, repeats=2)  # fmt: skip
    found = estimate(work, Price(1.0, 2.0), criteria_per_call=4, cached=True)
    assert (work.outputs, work.verdicts) == (40_000, 800_000)
    # an output: 3 calls twice; 6 x 1000 shared, of which 5 x 1000 cached; 6 x 100 + 20 x 50 asked; 20 x 20 said
    assert found.tokens.calls == 6 * 40_000
    assert found.tokens.input == (6000 + 600 + 1000) * 40_000
    assert found.tokens.cached == 5000 * 40_000
    assert found.tokens.output == 400 * 40_000
    assert found.dollars == pytest.approx(40_000 * (7600 + 800) / 1e6)


def test_what_was_seen_is_scaled(tmp_path):
    write_run(tmp_path / "run", "ppfu", cost=0.25)
    (run,) = load_runs([tmp_path])
    run = replace(run, verdicts=tuple(replace(v, tokens=Tokens(100, 60, 0, 10, 0, 1)) for v in run.verdicts))
    found = observed(Workload(tasks=3, criteria=100), [run])
    assert found.tokens.input == 400 * 100  # the one left unscored was paid for too
    assert found.dollars == pytest.approx(1.0 * 300 / 3)
    with pytest.raises(ValueError, match="do not say"):
        observed(Workload(), load_runs([tmp_path]))


def flaky(name: str = "flaky", good: bool = True) -> ScriptedJudge:
    """A judge whose first answer on every criterion is of no use, and its second too unless `good`."""

    def say(chat) -> Reply:
        asked = chat[-1]["content"]
        verdicts = [{"id": each, "reason": "so", "verdict": "pass"} for each in ids_in(asked)]
        text = json.dumps({"verdicts": verdicts}) if good and "Your last answer" in asked else "I think so."
        return Reply(text, Tokens(1000, 0, 0, 100, 0, 1))

    return ScriptedJudge(say, name)


def graded(folder, judge, per_call: int = 1, **more):
    prices = Prices({f"scripted:{judge.name}": Price(1.0, 1.0)})
    config = GradeConfig(criteria_per_call=per_call, reasks=1)
    grading = asyncio.run(grade(make_task(4), {"memo.md": "The memo."}, judge, config, prices=prices, **more))
    grading.save(folder)
    (run,) = load_runs([folder])
    return grading, run


def test_answers_of_no_use_are_in_what_a_thousand_criteria_cost(tmp_path):
    grading, run = graded(tmp_path / "run", flaky())
    assert grading.cost == pytest.approx(4 * 2 * 1100e-6)
    assert run.judging_cost == pytest.approx(grading.cost)
    assert compare_judges([run], [run]).costs == (pytest.approx(2.2), pytest.approx(2.2))
    bill = observed(Workload(criteria=1000), [run])
    assert (bill.dollars, bill.tokens.calls) == (pytest.approx(2.2), 2000)
    half = replace(run, verdicts=run.verdicts[:2])
    assert half.judging_cost == pytest.approx(grading.cost / 2), "what a quarantine leaves has its share"


def test_a_judge_that_is_never_of_use_costs_what_it_took_and_the_cache_what_it_took_once(tmp_path):
    grading, run = graded(tmp_path / "never", flaky(good=False))
    assert (grading.n_unscored, run.judging_cost) == (4, pytest.approx(4 * 2 * 1100e-6))
    store = VerdictStore()
    graded(tmp_path / "first", flaky(), store=store)
    again, run = graded(tmp_path / "again", flaky(), store=store)
    assert (again.cost, run.judging_cost) == (0.0, pytest.approx(4 * 1100e-6))


def test_prices_that_are_not_known_leave_the_dollars_open_and_bad_loads_are_refused():
    assert estimate(Workload(), Prices().find("no-such-model")).dollars is None
    with pytest.raises(ValueError, match="rollouts is 0"):
        Workload(rollouts=0)
    with pytest.raises(ValueError, match="-1"):
        estimate(Workload(), SONNET, -1)
