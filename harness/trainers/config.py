"""What `still isft` and `still grpo` can be told. The flags are made from these dataclasses; no torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..run_config import BackendName


@dataclass(frozen=True)
class TrainSettings:
    """How rows are trained on, by either trainer.

    Attributes:
        train_policy: what of the policy trains: full, lora (an adapter, with peft) or frozen (the compactor alone).
        lora_rank: of the adapter.
        compactor_mode: frozen; distill (KL from the full cache on tokens that were sampled behind slots); rl (the
            rows' own loss flows through the slots); joint (both).
        distill_weight: of that KL beside the rows' loss.
        place: rollouts to whose windows the compactor's placement is fitted again before anything else: those that a
            round trains on (iSFT), or some of their own before the first step (GRPO). No loss reaches a placement.
        lr: learning rate.
        compactor_lr: of the compactor beside a policy that trains too; `lr` unless given.
        schedule: of the learning rates after the warm-up.
        warmup: steps of warm-up.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        normaliser: what a step's summed losses are divided by: token (trained tokens of the step), trajectory (each
            counts the same) or constant (Dr. GRPO); a mean per row is no choice.
        constant: tokens of a trajectory, for the constant normaliser.
        memo_weight: of memo tokens.
        micro_tokens: tokens that one forward may compute, slots' prefixes left out; a longer row goes alone.
        max_tokens: of a row with its prefix; more is an error, nothing is ever cut.
        checkpointing: gradient checkpointing of a policy that trains; a frozen one stays in evaluation mode.
        save_every: optimizer steps between two checkpoints.
        keep: checkpoints kept.
        train_seed: of the order of trajectories and of every draw of the training, GRPO's rollouts among them.
    """

    train_policy: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 32
    compactor_mode: Literal["frozen", "distill", "rl", "joint"] = "frozen"
    distill_weight: float = 1.0
    place: int = 0
    lr: float = 1e-5
    compactor_lr: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    normaliser: Literal["token", "trajectory", "constant"] = "token"
    constant: float = 1000.0
    memo_weight: float = 1.0
    micro_tokens: int = 8192
    max_tokens: int | None = None
    checkpointing: bool = False
    save_every: int = 10
    keep: int = 2
    train_seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "lora_rank", "lr", "clip", "constant", "memo_weight", "micro_tokens", "save_every")
        _between(self, 0, math.inf, "distill_weight", "warmup", "weight_decay", "train_seed")
        if self.max_tokens is not None:
            _positive(self, "max_tokens")
        if self.train_policy == "frozen" and self.compactor_mode == "frozen":
            raise ValueError("train_policy and compactor_mode are both frozen: nothing would train")
        if self.compactor_lr is not None:
            _positive(self, "compactor_lr")
            if "frozen" in (self.train_policy, self.compactor_mode):
                raise ValueError(
                    f"compactor_lr is {self.compactor_lr:g}, but train_policy is {self.train_policy} and "
                    f"compactor_mode {self.compactor_mode}: what trains alone has the rate lr; leave compactor_lr out"
                )
        if self.checkpointing and self.train_policy == "frozen":
            raise ValueError("checkpointing would do nothing: a frozen policy stays in evaluation mode; leave it out")
        if self.place < 0 or (self.place and self.compactor_mode == "frozen"):
            raise ValueError(
                f"place is {self.place} and compactor_mode {self.compactor_mode}; a placement is fitted to 1 rollout "
                f"or more, and with a compactor that trains (distill, rl or joint)"
            )
        if self.keep < 2:
            raise ValueError(f"keep is {self.keep}; it must be 2 or more, since the newest may be half written")


@dataclass(frozen=True)
class IsftConfig:
    """Rounds of iterative supervised fine-tuning.

    Attributes:
        rounds: of collect, filter, train, evaluate.
        tasks_per_round: tasks of a round, each time the next ones (from the first again after the last); all unless
            given.
        teacher_rounds: rounds that the first teacher plays, where another than the student is given.
        rollouts: attempts at a task in a round at most; a task that is solved often enough gets no more, and a teacher
            that draws nothing (the oracle, or any at temperature 0) plays each once.
        keep_per_task: rollouts of a task that are kept in a round.
        temperature: of the teacher's sampling; the hold-out is played greedily.
        private: what happens when a rollout falls short: submit (one private bit, and the teacher goes on), rollback
            (the last boundary, and another sample), gate (the same neutral review for all), none (a plain resample).
        private_rounds: private submits of a rollout at most.
        epochs: passes over the rows of a round.
        batch: trajectories in an optimizer step.
        start: each round's student starts from the base or from the last round's.
        union: train on the rows of all rounds so far.
        gradings: independent gradings that must all say all-pass.
        rubric: show the teacher the criteria in a private prefix.
        evaluate_on: backends of the hold-out evaluation.
        ask: put the criteria's questions to the student behind each boundary of the hold-out, for the ledger.
        select: kept (rollouts that pass everything) or any (the control: the first `keep_per_task` at every task,
            whatever came of them, up to `token_budget`).
        token_budget: trained tokens of a round at most, for the control: all tasks' first rollouts before any second.
        longest_copy: words in a row that assistant text may share with a criterion and with nothing that was read.
        clairvoyance: share of values in a correction that no document so far contains.
        leaks: drop the rollouts that leak, or stop the run.
    """

    rounds: int = 3
    tasks_per_round: int | None = None
    teacher_rounds: int = 1
    rollouts: int = 4
    keep_per_task: int = 2
    temperature: float = 0.7
    private: Literal["submit", "rollback", "gate", "none"] = "submit"
    private_rounds: int = 2
    epochs: int = 1
    batch: int = 8
    start: Literal["base", "last"] = "base"
    union: bool = True
    gradings: int = 2
    rubric: bool = True
    evaluate_on: tuple[str, ...] = ("memo", "kv")
    ask: bool = True
    select: Literal["kept", "any"] = "kept"
    token_budget: int | None = None
    longest_copy: int = 12
    clairvoyance: float = 0.02
    leaks: Literal["drop", "stop"] = "drop"

    def __post_init__(self) -> None:
        if self.tasks_per_round is not None:
            _positive(self, "tasks_per_round")
        counts = ("rounds", "teacher_rounds", "rollouts", "keep_per_task", "epochs", "batch", "gradings")
        _positive(self, *counts, "longest_copy")
        _between(self, 0, math.inf, "private_rounds", "temperature")
        _between(self, 0, 1, "clairvoyance")
        if self.token_budget is not None:
            _positive(self, "token_budget")
        check_backends(self.evaluate_on)
        again = self.rollouts > 1 and self.private in ("none", "rollback")
        if again and self.temperature == 0:
            raise ValueError(f"temperature is {self.temperature}: all attempts at a task would be alike; take more")


@dataclass(frozen=True)
class GrpoConfig:
    """Steps of group-relative policy optimisation over whole rollouts.

    Attributes:
        steps: optimizer steps.
        tasks_per_step: tasks of a step.
        group: rollouts of each task.
        all_pass_share: of the reward; the rest is the share of the criteria that pass.
        reward: rubric, or random: the control, which must gain nothing (with credit=lines each criterion's verdict is
            drawn as well).
        scale: divide advantages by the group's standard deviation, or by nothing.
        clip_low: ratios are clipped below 1 minus this.
        clip_high: and above 1 plus this.
        ratio_cap: no token counts with a larger ratio.
        kl: weight of the KL to the policy that the run started from.
        refill: further draws of tasks when groups without variance left fewer than half (dynamic sampling).
        overlong: rollouts that a limit stopped are graded as they are, or masked.
        length_cut: share of rollouts that a limit may stop before the run stops, loudly.
        rollout_temperature: of the sampling; top-p is 1, always.
        rollouts: who plays: local, or server:NAME, a model of a vLLM server at --base-url that is given the weights
            before every step.
        ask: log with every boundary, of the hold-out too, which criteria a local policy still answers behind it; what
            its text says is logged always.
        credit: broadcast (the trajectory's advantage to all of its tokens), potential (windows: shaping by what
            boundaries hold), ledger (each criterion's advantage to the windows that acquired or lost it) or lines
            (to the lines of memos and deliverables that name it).
        credit_share: of that credit beside the trajectory's advantage.
        credit_decay: of later windows' steps, for the potential.
        potential: what counts as held: written, answered, or gain (how much likelier the right answers became).
        full_gain: nats a token at which a criterion counts as held in full, for gain.
    """

    steps: int = 40
    tasks_per_step: int = 16
    group: int = 8
    all_pass_share: float = 0.1
    reward: Literal["rubric", "random"] = "rubric"
    scale: Literal["none", "group"] = "none"
    clip_low: float = 0.2
    clip_high: float = 0.28
    ratio_cap: float = 4.0
    kl: float = 0.0
    refill: int = 0
    overlong: Literal["grade", "mask"] = "grade"
    length_cut: float = 0.5
    rollout_temperature: float = 1.0
    rollouts: str = "local"
    ask: bool = True
    credit: Literal["broadcast", "potential", "ledger", "lines"] = "broadcast"
    credit_share: float = 0.3
    credit_decay: float = 1.0
    potential: Literal["written", "answered", "gain"] = "answered"
    full_gain: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "steps", "tasks_per_step", "rollout_temperature", "ratio_cap", "full_gain")
        _between(self, 0, math.inf, "clip_high", "kl", "refill")
        _between(self, 0, 1, "clip_low", "length_cut", "all_pass_share", "credit_share", "credit_decay")
        if self.group < 2:
            raise ValueError(f"group is {self.group}; a baseline needs 2 rollouts of a task or more")
        if self.credit != "broadcast" and self.scale != "none":
            raise ValueError(f"credit={self.credit} is in units of the reward: take scale=none")
        if self.needs_ledger:
            if self.reward == "random":
                raise ValueError(f"credit={self.credit} knows the rubric, so that reward=random is no control with it")
            if self.potential != "written" and not self.ask:
                raise ValueError(f"potential={self.potential} needs ask")

    @property
    def needs_ledger(self) -> bool:
        """Whether its credit rests on what is found behind boundaries."""
        return self.credit in ("potential", "ledger")


def check_backends(names: tuple[str, ...]) -> None:
    """Refuse what is no backend.

    Raises:
        ValueError: names it.
    """
    if unknown := [name for name in names if name not in get_args(BackendName)]:
        raise ValueError(f"evaluate_on has {unknown[0]!r}; backends are {', '.join(get_args(BackendName))}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:  # nor is it no number
            raise ValueError(f"{name} is {getattr(config, name)}; it must be above 0, and finite")


def _between(config: object, least: float, most: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value <= most or value == math.inf:
            allowed = f"be {least} or more, and finite" if most == math.inf else f"lie between {least} and {most}"
            raise ValueError(f"{name} is {value}; it must {allowed}")
