"""A placement that is fitted to rollouts, before a trainer's steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from agent_cases import tiny_agent
from test_grpo import CONFIG, SETTINGS, grpo, scripted
from trainer_cases import RUN, exact, log_of, matters, plain_row, repeatable, rollout, scripted_teacher

from still import methods
from still.compactor import StillCompactor
from still.harness.trainers import placing
from still.harness.trainers.config import IsftConfig, TrainSettings
from still.harness.trainers.grpo import Rollouts
from still.harness.trainers.isft import run_isft
from still.harness.trainers.placing import asked_of, windows_of
from still.harness.windows import IGNORE

KV = replace(RUN, backend="kv", budget=None, ratio=4.0)
PLACES = replace(SETTINGS, train_policy="frozen", compactor_mode="distill", place=2)


def placed(loaded, **options):
    """A method whose compactor has a fresh placement."""
    torch.manual_seed(0)
    return methods.get("still", compactor=StillCompactor.for_model(loaded.model, ratio=4, chunk=2048, **options))


@pytest.fixture
def quick(monkeypatch):
    """A fit of few steps."""
    monkeypatch.setattr(placing, "STEPS", 12)


def scorers(compactor):
    return {name: p.clone() for name, p in compactor.named_parameters() if ".placement." in name}


def test_windows_are_asked_by_what_the_agent_did_after_them(tmp_path):
    loaded = tiny_agent(layers=1)
    rows = rollout(tmp_path, loaded, backend="kv", method=placed(loaded, placement=8), ratio=4.0)
    last = rows[-1]
    texts = windows_of(rows, 5, seed=0)
    assert sorted(texts) == sorted(asked_of(last))  # the last window has all others before it
    assert len(texts) == last.window
    for text in texts:
        assert text.ids == [*last.prefix_ids, *last.input_ids]
        first, end = text.context
        assert last.prefix_plan[0]["end"] <= first < end <= len(last.prefix_ids)
        assert [text.ids[place + 1] for place in text.asked] == [label for label in last.labels if label != IGNORE]
    two = [*rows, *(replace(row, trajectory_id="another") for row in rows)]
    assert len(windows_of(two, 5, seed=0)) == 2 * len(texts)
    assert len(windows_of(two, 1, seed=0)) == len(texts)
    assert windows_of([plain_row([1, 2, 3], range(1, 3))], 5, seed=0) == []


def test_a_placement_is_fitted_before_the_first_step_and_taken_up_again(tmp_path, quick, monkeypatch):
    tasks, found = matters(tmp_path / "lab"), []
    for name in ("whole", "cut"):
        loaded = tiny_agent(layers=1)
        method = placed(loaded, placement=8)
        fresh = scorers(method.compactor)
        settings = replace(PLACES, save_every=1)
        if name == "cut":  # it ends between the fit and the first step
            with monkeypatch.context() as patch:
                patch.setattr(Rollouts, "step", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    grpo(tmp_path / name, tasks, CONFIG, KV, settings, loaded, method=method, policy_of=scripted)
            assert (tmp_path / name / "placement" / placing.DONE).is_file()
            loaded = tiny_agent(layers=1)
            method = placed(loaded, placement=8)
            monkeypatch.setattr(placing, "fit_placement", interrupt)  # it must not be fitted again
        grpo(tmp_path / name, tasks, CONFIG, KV, settings, loaded, method=method, policy_of=scripted)
        mine = scorers(method.compactor)
        assert any((mine[key] != fresh[key]).any() for key in fresh)
        found.append((mine, method.compactor.config.split, method.compactor.config.scout, log_of(tmp_path / name)))
    (one, *rest), (other, *others) = found
    assert all((one[key] == other[key]).all() for key in one)
    assert repeatable(rest.pop()) == repeatable(others.pop())
    assert rest == others
    assert rest[0] is not None


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_every_round_fits_the_placement_to_its_rows(tmp_path, quick):
    tasks, loaded = matters(tmp_path / "lab"), tiny_agent(layers=1)
    method = placed(loaded, placement=8)
    seen = [scorers(method.compactor)]
    config = IsftConfig(rounds=2, rollouts=1, keep_per_task=1, batch=2, private="none", evaluate_on=())
    settings = TrainSettings(lr=1e-3, micro_tokens=4000, compactor_mode="joint", place=2)
    teacher = scripted_teacher(tasks, forgets=False)
    run_isft(tasks, (), loaded, KV, config, settings, tmp_path / "run", exact(), exact()[0],
             teacher_of=lambda round, student: teacher, method=method, report=lambda line: None)  # fmt: skip
    for number in (1, 2):
        folder = tmp_path / "run" / f"round-{number}" / "placement"
        seen.append(scorers(StillCompactor.from_pretrained(folder, model=loaded.model)))
    assert all(any((one[key] != other[key]).any() for key in one) for one, other in itertools.pairwise(seen))
    assert all((p == seen[-1][name]).all() for name, p in scorers(method.compactor).items())


def test_what_has_no_placement_to_fit_is_refused(tmp_path, quick):
    with pytest.raises(ValueError, match="place is 2 and compactor_mode frozen"):
        TrainSettings(place=2)
    tasks, loaded = matters(tmp_path / "lab", (1,)), tiny_agent(layers=1)
    with pytest.raises(ValueError, match="place is 2, but this compactor spreads its latents evenly"):
        grpo(tmp_path / "even", tasks, CONFIG, KV, PLACES, loaded, method=placed(loaded), policy_of=scripted)
    once = replace(KV, reads=9, reads_force=9)
    with pytest.raises(ValueError, match=r"none of the .* rows goes on behind slots"):
        grpo(tmp_path / "once", tasks, CONFIG, once, PLACES, loaded, method=placed(loaded, placement=8),
             policy_of=scripted)  # fmt: skip
