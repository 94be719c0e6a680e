"""GRPO over whole rollouts of the harness: groups of rollouts, one advantage a trajectory, one optimizer step a batch.

    OUT/rollouts/step-0007/TASK/seed-61     run folders, resumed like any run
    OUT/rollouts/step-0007/weights.json     digest of the weights that roll out, written first
    OUT/rollouts/step-0007/rewards-0.json   rewards and verdicts, written when all are graded
    OUT/placement                           with --place: rollouts, and the compactor whose placement was fitted to them
    OUT/checkpoint-N                        of the trainer; OUT/evaluation/before and after
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...provenance import provenance
from ..backends.slots import fingerprint
from ..play import play_tasks
from ..policies.local import LocalPolicy
from ..run_config import RunConfig
from ..runs import read_run, write_atomically
from ..sandbox import Sandbox, sandbox_of
from ..windows import WindowRow, check_rows, rows_of_run
from .advantages import Advantages, combined_reward, group_advantages
from .behaviour import mean_behaviour, was_cut
from .checks import check_learns, check_start
from .clock import Clock
from .config import GrpoConfig, TrainSettings
from .credit import criterion_advantages
from .evaluate import evaluate
from .grading import Grade, grade_runs, random_rewards
from .ledgers import check_credit, numbers, trajectory_of, watcher, window_advantages
from .lines import anchors, line_advantages
from .loop import RowTrainer, agreed, barrier, world
from .model import RowModel, Share
from .placing import is_placed, place
from .setup import begun_with, claim_output, join_processes, make_module
from .steps import shares_of
from .weights import digest

SEEDS = 1_000_000
"""Seeds of rollouts that lie between two seeds of runs."""


@dataclass
class Rollouts:
    """The step source: rolls out with the weights as they are when its step is asked for.

    Attributes:
        module: what trains.
        loaded: the policy as a `LoadedModel`.
        tasks: to train on.
        run: of the harness.
        config: of GRPO.
        settings: of the training.
        output: the run's folder.
        grade: the training grader; not the one that reports are made with.
        together: runs at a time.
        reference: the policy that the run started from, for the KL.
        policy_of: makes the policy that plays, of a `LoadedModel` and a window.
        clock: of the trainer.
        last: numbers of the last step, for the log.
    """

    module: RowModel
    loaded: Any
    tasks: Sequence[Any]
    run: RunConfig
    config: GrpoConfig
    settings: TrainSettings
    output: Path
    grade: Grade
    together: int = 1
    reference: Any = None
    policy_of: Callable[[Any, int | None], Any] = LocalPolicy
    clock: Clock = field(default_factory=Clock)
    last: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sandbox(self) -> Sandbox | None:
        """What bash runs in; to look for it starts a command, which need not be done in every step."""
        return sandbox_of(self.run)[0]

    @property
    def distils_alone(self) -> bool:
        """Nothing that trains looks at a reward."""
        return self.settings.train_policy == "frozen" and self.settings.compactor_mode == "distill"

    def step(self, number: int) -> list[Share]:
        """Roll out, grade, and turn rewards into advantages.

        Raises:
            ValueError: every group lacks variance, most rollouts were cut by length, a reward is no number, or nothing
                would train.
        """
        self.module.eval()
        folder = self.output / "rollouts" / f"step-{number:04d}"
        self._claim(folder, number)
        order = self._order(number)
        policy = self.policy_of(self.loaded, self.run.window)
        policy.version = number
        rewards, groups, kept = {}, {}, {}
        first = self._seed(number)
        seeds = [first + sample for sample in range(self.config.group)]
        eyes = watcher(self.config.ask, self.config.credit == "potential" and self.config.potential == "gain")
        size, draws = min(self.config.tasks_per_step, len(order)), 0
        while True:
            chosen, order = order[:size], order[size:]
            with self.clock.measuring("rollouts"):
                played = self._play(chosen, f"step-{number}", seeds, folder, policy, eyes)
            with self.clock.measuring("grading"):
                found = self._rewards(played, folder, draws)
            rewards |= found
            groups |= {name: task.id for name, (task, _) in played.items()}
            kept |= played
            made = group_advantages(rewards, groups, self.config.scale)
            if self.distils_alone:
                made = made.with_equals(rewards)
            enough = self.distils_alone or 2 * len(made.kept) >= size
            if draws >= self.config.refill or enough or not order:
                break
            draws += 1
        runs = {name: read_run(root) for name, (_, root) in kept.items()}
        self._check(number, made, runs)
        rows = self._rows(made, kept, number)
        check_learns(rows, self.settings, f"step {number}")
        method = fingerprint(self.module.method)
        check_rows(rows, self.loaded.tokenizer, self.settings.max_tokens, number, compactor=method)
        settings = self.settings
        advantage, foretold = self._credit(made, rewards, groups, kept, runs)
        shares = shares_of(rows, settings.normaliser, settings.constant, settings.memo_weight, advantage)
        if self.config.kl:
            self._refer(shares)
        self._note(made, rewards, runs, rows)
        self.last |= {**numbers(*zip(*kept.values(), strict=True)), **foretold}
        return shares

    def place(self) -> None:
        """Fit the compactor's placement to rollouts of their own, or take up one that was fitted.

        As many as were asked for, one of each task before there are two.

        Raises:
            ValueError: a rollout failed, or nothing of them can be learnt.
        """
        folder, rows = self.output / "placement", []
        if not is_placed(folder):
            self.module.eval()
            policy = self.policy_of(self.loaded, self.run.window)
            seed, order = self._seed(self.config.steps), self._pass(0)  # a seed that no step takes
            for start in range(0, self.settings.place, len(order)):
                tasks = order[: self.settings.place - start]
                for name, (_, root) in self._play(tasks, "placement", [seed], folder / "rollouts", policy).items():
                    rows += rows_of_run(root, self.loaded.tokenizer, train_on="all", trajectory_id=name)
                seed += 1
        place(self.module, rows, folder, self.settings)

    def _seed(self, number: int) -> int:
        """The first seed of a step's rollouts; runs of other seeds draw others."""
        return SEEDS * (self.settings.train_seed + SEEDS * self.run.seed) + number * self.config.group

    def _claim(self, folder: Path, number: int) -> None:
        """Rollouts on disk count only if these very weights made them, as those of steps since a checkpoint do."""
        mark, now = folder / "weights.json", digest(self.module)
        if world()[0] == 0:
            known = json.loads(mark.read_text(encoding="utf-8"))["digest"] if mark.is_file() else None
            if known != now and folder.is_dir():  # without a mark it is what was left of removing it
                shutil.rmtree(folder)
            write_atomically(mark, json.dumps({"digest": now, "version": number}).encode())
        barrier()

    def _order(self, number: int) -> list[Any]:
        """All tasks in this step's order: a pass over all before any comes again."""
        size = min(self.config.tasks_per_step, len(self.tasks))
        epoch, start = divmod(number * size, len(self.tasks))
        order = self._pass(epoch)
        left = order[start:]
        more = order[:start] if len(left) >= size else self._pass(epoch + 1)
        taken = {task.id for task in left}
        return left + [task for task in more if task.id not in taken]

    def _pass(self, number: int) -> list[Any]:
        """All tasks in an order of this pass; it begins with none that the step across its start has from the last."""
        size, order = min(self.config.tasks_per_step, len(self.tasks)), []
        for each in range(number + 1):
            over = each * len(self.tasks) % size
            last = {task.id for task in order[len(order) - over :]}
            order = list(self.tasks)
            random.Random(f"{self.settings.train_seed} {each}").shuffle(order)
            first = [task for task in order if task.id not in last][: size - over]
            begun = {task.id for task in first}
            order = first + [task for task in order if task.id not in begun]
        return order

    def _play(
        self, tasks: Sequence[Any], name: str, seeds: Sequence[int], folder: Path, policy: Any, watch: Any = None
    ) -> dict[str, tuple[Any, Path]]:
        """All rollouts of these tasks, each process playing its share; by trajectory."""
        heat = self.config.rollout_temperature
        run = replace(self.run, temperature=heat, retry_temperature=heat, on_failure="fail")
        method = self.module.method if run.backend in ("kv", "hybrid") else None
        play = {"seeds": seeds, "method": method, "together": self.together, "watch": watch, "sandbox": self.sandbox}
        if world()[1] > 1:
            play_tasks(tasks, policy, run, folder, **play, share=world())
            barrier()
        # What failed there is tried again by one process: of two, both would write into its folder.
        outcomes = agreed(play_tasks(tasks, policy, run, folder, **play) if world()[0] == 0 else None)
        failed = [outcome for outcome in outcomes if outcome.status == "failed"]
        if failed:
            raise ValueError(f"{len(failed)} of {len(outcomes)} rollouts of {name} failed, first "
                             f"{failed[0].folder}: {failed[0].reason}")  # fmt: skip
        by_id = {task.id: task for task in tasks}
        return {f"{name}/{o.task}/{o.folder.name}": (by_id[o.task], o.folder) for o in outcomes}

    def _rewards(self, played: dict[str, tuple[Any, Path]], folder: Path, draw: int) -> dict[str, float | None]:
        """Graded by one process, once."""
        path = folder / f"rewards-{draw}.json"
        if world()[0] == 0 and not path.is_file():
            scored = grade_runs(self.grade, list(played.values()))
            drawn = random_rewards(self.settings.train_seed)
            lines = {}
            for (name, (_, root)), each in zip(played.items(), scored, strict=True):
                reward = combined_reward(each.rate, each.all_pass, self.config.all_pass_share)
                if self.config.reward == "random":
                    reward = drawn(name)
                if self.config.overlong == "mask" and was_cut(read_run(root)):
                    reward = None
                lines[name] = {"reward": reward, "rate": each.rate, "all_pass": each.all_pass, "labels": each.labels}
            write_atomically(path, json.dumps(lines, indent=1).encode() + b"\n")
        barrier()
        found = json.loads(path.read_text(encoding="utf-8"))
        self._graded = {**getattr(self, "_graded", {}), **found} if draw else found
        return {name: found[name]["reward"] for name in played}

    def _check(self, number: int, made: Advantages, runs: dict[str, list]) -> None:
        cut = [name for name, events in runs.items() if was_cut(events)]
        if len(cut) / len(runs) > self.config.length_cut:
            raise ValueError(
                f"{len(cut)} of {len(runs)} rollouts of step {number} were stopped by a limit on length: raise "
                f"max_turns, max_windows, max_new_tokens or the window before training on them"
            )
        if not made.of:
            raise ValueError(
                f"no group of step {number} has any variance ({len(made.dropped)} with equal rewards, {len(made.lone)} "
                f"with fewer than two scored rollouts, {len(made.unscored)} rollouts unscored): nothing would be "
                f"learnt; take tasks that are sometimes solved, larger groups, or a higher temperature"
            )

    def _rows(self, made: Advantages, kept: dict[str, tuple[Any, Path]], number: int) -> list[WindowRow]:
        rows = []
        for name in made.of:
            task, root = kept[name]
            graded = self._graded[name]
            nan = math.nan
            rows += rows_of_run(
                root, self.loaded.tokenizer, train_on="all", trajectory_id=name, round=number,
                attempt=int(root.name.removeprefix("seed-")), score=nan if graded["rate"] is None else graded["rate"],
                all_pass=nan if graded["all_pass"] is None else float(graded["all_pass"]), task_id=task.id,
            )  # fmt: skip
        return rows

    def _credit(
        self, made: Advantages, rewards, groups, kept, runs
    ) -> tuple[Callable[[WindowRow], float | list[float]], dict]:
        """The advantage of a row or of its tokens, and numbers for the log."""
        if self.config.credit == "broadcast":
            return lambda row: made.of[row.trajectory_id], {}
        if self.config.credit == "lines":
            return self._line_credit(made, groups, kept), {}
        known = {
            name: trajectory_of(*kept[name], runs[name], rewards[name], self._graded[name]["labels"], self.config)
            for name in made.of
        }
        found, log = window_advantages(made.of, groups, known, self.config)
        return lambda row: found[row.trajectory_id][row.window], log

    def _line_credit(self, made: Advantages, groups, kept) -> Callable[[WindowRow], list[float]]:
        """The advantages of a row's trained tokens, by the criteria that their lines name."""
        drawn = random_rewards(self.settings.train_seed)
        passed: dict[str, dict[str, dict[str, bool]]] = {}
        for name in made.of:
            labels = {id_: each for id_, each in self._graded[name]["labels"].items() if each != "unscored"}
            by_chance = self.config.reward == "random"
            passed.setdefault(groups[name], {})[name] = {
                id_: drawn(f"{name} {id_}") < 0.5 if by_chance else label == "pass" for id_, label in labels.items()
            }
        own = {name: each for group in passed.values() for name, each in criterion_advantages(group).items()}
        named = {name: anchors(kept[name][0]) for name in made.of}

        def of_row(row: WindowRow) -> list[float]:
            name = row.trajectory_id
            share = self.config.credit_share
            return line_advantages(row, self.loaded.tokenizer.decode, named[name], own[name], made.of[name], share)

        return of_row

    @torch.no_grad()
    def _refer(self, shares: Sequence[Share]) -> None:
        for share in shares:
            share.reference = self.module.logprobs(share.row, self.reference)

    def _note(self, made: Advantages, rewards, runs, rows) -> None:
        scored = [reward for reward in rewards.values() if reward is not None]
        rate = [each["rate"] for each in self._graded.values() if each["rate"] is not None]
        whole = [float(each["all_pass"]) for each in self._graded.values() if each["all_pass"] is not None]
        self.last = {
            "reward": fmean(scored), "criterion_rate": fmean(rate) if rate else 0.0,
            "all_pass": fmean(whole) if whole else 0.0, "rollouts": float(len(rewards)),
            "groups_kept": float(len(made.kept)), "groups_dropped": float(len(made.dropped)),
            "unscored": float(len(made.unscored)), "rows": float(len(rows)),
            "cut_by_length": sum(was_cut(events) for events in runs.values()) / len(runs),
            **{f"behaviour_{name}": value for name, value in mean_behaviour(list(runs.values())).items()},
        }  # fmt: skip


def run_grpo(
    tasks: Sequence[Any], held_out: Sequence[Any], loaded: Any, run: RunConfig, config: GrpoConfig,
    settings: TrainSettings, output: Path, grade: Grade, report_grade: Grade, *, method: Any = None, together: int = 1,
    evaluate_on: Sequence[str] = (), options: dict[str, Any] | None = None, report: Callable[[str], None] = print,
    policy_of: Callable[[Any, int | None], Any] = LocalPolicy, named: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train, with a hold-out evaluation before and after, or go on with a run that was cut off.

    Args:
        tasks: to train on.
        held_out: to evaluate on; none of `tasks`.
        loaded: the policy.
        run: of the harness.
        config: of GRPO.
        settings: of the training.
        output: the run's folder.
        grade: gives rewards.
        report_grade: gives the reported numbers; another grader, or training on the first would be praised by it.
        method: for backends with slots.
        together: runs at a time.
        evaluate_on: backends of the evaluation; the run's own unless given.
        options: further arguments of the library trainer.
        report: told what goes on.
        policy_of: makes the policy that rolls out.
        named: names of the judges; a run goes on with the same ones alone.

    Returns:
        The evaluations, before and after.

    Raises:
        ValueError: see `check_start`; there are fewer tasks than a step takes, the folder holds another run, or there
            is no ledger for the credit.
    """
    check_credit(config, tasks, run.backend)
    on = tuple(evaluate_on) or (run.backend,)
    check_start(tasks, held_out, loaded, run, settings, on, method, together, options or {})
    if config.tasks_per_step > len(tasks):
        raise ValueError(f"tasks_per_step is {config.tasks_per_step}; of {len(tasks)} tasks take {len(tasks)} or less")
    made_by = {"run": asdict(run), "grpo": asdict(config), "train": asdict(settings)}
    made_by |= begun_with(tasks, held_out, loaded, method, options, named)
    clip = {"low": config.clip_low, "high": config.clip_high, "cap": config.ratio_cap, "kl": config.kl}
    join_processes(loaded.model.device.type == "cpu")
    module, loaded = make_module(loaded, method, settings, loss="policy", options=clip)
    # Last of all: a folder whose first values were refused would else refuse the right ones.
    claim_output(output, "grpo.json", made_by, loaded.name, provenance(config, settings.train_seed))
    reference = copy.deepcopy(module.policy).requires_grad_(False).eval() if config.kl else None
    source = Rollouts(module, loaded, tasks, run, config, settings, output, grade, together, reference, policy_of)
    trainer = RowTrainer(
        module, settings, output, source, config.steps, loaded.tokenizer, options, lambda: source.last, source.clock
    )

    def scores(when: str) -> dict[str, Any]:
        return evaluate(module, loaded, held_out, run, on, report_grade, output / "evaluation" / when, together,
                        lambda line: report(f"{when:7} {line}"), config.ask)  # fmt: skip

    found = {"before": scores("before")}
    if settings.place:
        source.place()
    trainer.fit()
    found["after"] = scores("after")
    if world()[0] == 0:
        from .report import write_grpo_report

        write_grpo_report(output)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(output / "trained")
    trainer.accelerator.wait_for_everyone()
    return found
