"""The commands `isft` and `grpo`. Loading this module loads no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ...flags import add_flags, add_pass_through, from_flags
from ..run_command import SERVED, PolicyConfig
from ..run_config import RunConfig
from ..sandbox import sandbox_of
from .config import GrpoConfig, IsftConfig, TrainSettings

PROMPTS = ("plain", "checklist")
"""Of the first grading and of the second: the same request again would find the server's noise alone."""


class _Trainer:
    """What the two commands share."""

    resume = (
        "whole turns, gradings and the optimizer steps up to the last checkpoint are kept; run the same command again "
        "to go on"
    )
    config: type

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments: one flag a field of the configs."""
        parser.add_argument("tasks", metavar="TASKS", nargs="+", type=Path, help="folders of training tasks")
        parser.add_argument("--held-out", metavar="DIR", nargs="+", type=Path, default=[], help="tasks to evaluate on")
        parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder of the run")
        parser.add_argument(
            "--judge", metavar="NAME", default="exact",
            help="grader of the training, as `still grade --judge` (default: exact, for synthetic matters)",
        )  # fmt: skip
        parser.add_argument(
            "--report-judge", metavar="NAME", default="exact",
            help="grader of the hold-out; another than --judge, where judges are models (default: exact)",
        )  # fmt: skip
        parser.add_argument("--together", metavar="N", type=int, default=1, help="rollouts at a time (default: 1)")
        add_flags(parser, self.config)
        add_flags(parser, TrainSettings)
        add_flags(parser, PolicyConfig)
        add_flags(parser, RunConfig, skip=("temperature", "retry_temperature"))
        add_pass_through(parser, "trainer")
        add_pass_through(parser, "option")
        parser.set_defaults(trainer={}, option={})

    def loaded(self, args: argparse.Namespace):
        """Tasks, hold-out, run config, student, method."""
        run, model = from_flags(args, RunConfig), from_flags(args, PolicyConfig)
        if args.together < 1:
            raise ValueError(f"--together is {args.together}; it must be 1 or more")
        if model.policy.startswith(SERVED):
            raise ValueError(f"{model.policy} is served elsewhere; training needs a local model for --policy")
        _, off = sandbox_of(run)
        if off:
            print(f"bash is off: {off}", file=sys.stderr)
        tasks, held_out = _tasks(args.tasks), _tasks(args.held_out)
        if run.backend not in ("kv", "hybrid") and {"kv", "hybrid"} & set(getattr(args, "evaluate_on", ())):
            policy, method = model.load(replace(run, backend="kv"), args.option)  # the hold-out is played on slots too
        else:
            policy, method = model.load(run, args.option)
        from ...models import LoadedModel

        student = LoadedModel(policy.name, policy.model, policy.tokenizer)
        if args.judge == args.report_judge != "exact":
            raise ValueError(f"--judge and --report-judge are both {args.judge}: what trains must not report")
        return tasks, held_out, run, student, method


class Isft(_Trainer):
    """`still isft`: rounds of rollouts by a privileged teacher, filtered, gated, and trained on."""

    config = IsftConfig
    help = "Iterative supervised fine-tuning inside the harness, with a teacher that sees the rubric."
    description = """\
Per round: a teacher plays every task with the rubric in a private prefix; rollouts that pass every criterion in every
grading are kept, checked for leaks, cut into windows and trained on; the student is evaluated on the hold-out. The next
round's teacher is the student with the rubric. Every stage is restartable."""
    examples = """\
examples:
  still matters generate --family assignments --seeds 0:40 --split train -o lab-train
  still matters generate --family assignments --seeds 0:40 -o lab-held-out
  still isft lab-train/tasks --held-out lab-held-out/tasks --policy pocket-agent --teacher oracle --backend memo \\
      --budget 256t --tools read,write --no-rubric -o out/isft
  still isft lab-train/tasks --held-out lab-held-out/tasks --policy Qwen/Qwen3-4B --teacher server:gpt-5.5 \\
      --judge gpt-5-mini --report-judge claude-haiku-4-5 --train-policy lora --backend memo -o out/qwen
  still isft ... --select any --token-budget 50000 -o out/control           the control: unfiltered rollouts"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        super().configure(parser)
        parser.add_argument(
            "--teacher", metavar="TEXT",
            help="teacher of the first --teacher-rounds, as --policy, or oracle: a script that looks the answers up in "
            "the rubric of a synthetic matter; the student with the rubric unless given",
        )  # fmt: skip

    def run(self, args: argparse.Namespace) -> int:
        """Train, and print a line for each step of the way."""
        config, settings = from_flags(args, IsftConfig), from_flags(args, TrainSettings)
        tasks, held_out, run, student, method = self.loaded(args)
        from .isft import run_isft
        from .loop import world

        first = None
        if args.teacher == "oracle":
            from ..policies.local import LocalPolicy
            from .teacher import OracleTeacher

            first = OracleTeacher(LocalPolicy(student, run.window))
            for task in tasks:
                first.check(task)
        elif args.teacher:
            named = replace(from_flags(args, PolicyConfig), policy=args.teacher)
            first, _ = named.load(replace(run, backend="memo", ratio=None), {})
        if args.judge != "exact" and config.gradings > len(PROMPTS):
            raise ValueError(
                f"gradings is {config.gradings}; of one judge {len(PROMPTS)} are independent, one by each prompt "
                f"({', '.join(PROMPTS)}): take that or less"
            )
        graders = [
            _grade(args.judge, args.output, f"grading-{number}", PROMPTS[number % len(PROMPTS)])
            for number in range(config.gradings)
        ]

        def teacher_of(number: int, _) -> object:
            return first if number <= config.teacher_rounds else None

        run_isft(
            tasks, held_out, student, run, config, settings, args.output, graders,
            _grade(args.report_judge, args.output, "report"), teacher_of=teacher_of, method=method,
            together=args.together, options=args.trainer, report=lambda line: print(line, flush=True),
            named={"teacher": args.teacher or "", **_judges(args)},
        )  # fmt: skip
        if world()[0] == 0:
            print(args.output / "report.html")
        return 0


class Grpo(_Trainer):
    """`still grpo`: whole rollouts in groups, one advantage a trajectory."""

    config = GrpoConfig
    help = "GRPO over whole rollouts of the harness, on text or on slots, with the compactor in the loop."
    description = """\
A step is TASKS-PER-STEP tasks times GROUP rollouts of the whole harness. The reward is the share of criteria that pass,
mixed with all-pass; the advantage is taken once a trajectory and trains every token of its windows, memos included."""
    examples = """\
examples:
  still grpo lab-train/tasks --held-out lab-held-out/tasks --policy out/isft/round-3/student/policy --backend memo \\
      --budget 256t --steps 40 --tasks-per-step 8 --group 8 -o out/grpo
  still grpo ... --backend kv --ratio 8 --compactor pocket-agent --train-policy frozen --compactor-mode joint \\
      -o out/grpo-compactor
  still grpo ... --rollouts server:policy --base-url http://localhost:8000/v1 --together 64 -o out/served
  still grpo ... --reward random -o out/grpo-control                        the control: must gain nothing
  accelerate launch --num_processes 2 -m still.cli grpo ... -o out/grpo"""

    def run(self, args: argparse.Namespace) -> int:
        """Train, and print the way."""
        config, settings = from_flags(args, GrpoConfig), from_flags(args, TrainSettings)
        tasks, held_out, run, student, method = self.loaded(args)
        from ..policies.local import LocalPolicy
        from .grpo import run_grpo
        from .loop import world

        policy_of = LocalPolicy
        if config.rollouts != "local":
            policy_of = _served(config, run, from_flags(args, PolicyConfig), args.output)
        run_grpo(
            tasks, held_out, student, run, config, settings, args.output,
            _grade(args.judge, args.output, "reward"), _grade(args.report_judge, args.output, "report"),
            method=method, together=args.together, options=args.trainer,
            report=lambda line: print(line, flush=True), policy_of=policy_of, named=_judges(args),
        )  # fmt: skip
        if world()[0] == 0:
            print(args.output / "report.html")
        return 0


def _judges(args: argparse.Namespace) -> dict[str, str]:
    return {"judge": args.judge, "report_judge": args.report_judge}


def _served(config: GrpoConfig, run: RunConfig, model: PolicyConfig, output: Path):
    """What makes policies that play on a server.

    Raises:
        ValueError: a server cannot play this run.
    """
    if not config.rollouts.startswith(SERVED):
        raise ValueError(f"rollouts is {config.rollouts!r}; it is local, or server:NAME with --base-url")
    if model.base_url is None:
        raise ValueError(f"rollouts come from {config.rollouts}, and no --base-url says where that is")
    if run.backend in ("kv", "hybrid"):
        raise ValueError(f"slots are made in this process: with --backend {run.backend} leave --rollouts local")
    if config.rollout_temperature != 1:
        raise ValueError(
            f"rollout_temperature is {config.rollout_temperature}; a server's log-probabilities are those at 1: take 1"
        )
    from ..policies.server import ServerConfig
    from .served import ServedRollouts

    name = config.rollouts.removeprefix(SERVED)
    return ServedRollouts(ServerConfig(name, model.base_url, model.api_key_env), output / "served")


def _tasks(folders: Sequence[Path]) -> list:
    """The tasks below some folders.

    Raises:
        ValueError: there is none below one of them, or two have one id.
    """
    from ...eval.tasks import find_tasks, load_task
    from ..play import check_ids

    found = [(path, find_tasks(path)) for path in folders]
    if bare := [path for path, below in found if not below]:
        raise ValueError(f"there is no task.json below {', '.join(map(str, bare))}; name LAB task folders")
    tasks = [load_task(folder) for folder in dict.fromkeys(folder.resolve() for _, below in found for folder in below)]
    check_ids(tasks)
    return tasks


def _grade(judge: str, output: Path, role: str, prompt: str = PROMPTS[0]):
    """A grader that keeps a model's verdicts in the run's folder as they come, apart from those of other roles."""
    from ...eval.grade import GradeConfig
    from ...eval.judges import find_judge
    from ...eval.reward import RubricReward
    from ...eval.verdict_store import VerdictStore

    found = find_judge(judge)

    @cache
    def reward() -> RubricReward:  # made when it is needed, and then the folder is known to be this run's
        where = ":memory:" if judge == "exact" else output / "verdicts" / f"{role}.sqlite"
        return RubricReward(found, GradeConfig(prompt=prompt), store=VerdictStore(where))

    return lambda rollouts: reward().grade(rollouts)


COMMANDS = {"isft": Isft(), "grpo": Grpo()}
