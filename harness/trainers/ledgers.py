"""The ledger of criteria of every rollout: logged behind each boundary, read back as numbers and as windows' credit.

    RUN/ledger.jsonl    a line a boundary: criteria that its text says, that the model still answers, and by how much
                        what crossed makes the answers likelier; private, as it names criteria
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..probe import Probe, ledger, read_private
from .config import GrpoConfig
from .credit import Trajectory, correlation, ledger_credit, mixed, potential_credit
from .lines import anchors

LEDGER = "ledger.jsonl"
KINDS = ("written", "answered")
Events = Sequence[Mapping[str, Any]]


def watcher(ask: bool = True, gain: bool = False) -> Callable[[Any, Path], Probe]:
    """What looks at the boundaries of rollouts, for `play_tasks`.

    Args:
        ask: put the criteria's questions to a local model too.
        gain: and log how much likelier the right answers became.
    """
    return lambda task, root: Probe(task, Path(root), ask, LEDGER, gain)


def probed(task: Any) -> list[str]:
    """Criteria with a value that can be looked for, by id."""
    return [c.id for c in task.criteria if c.expect and not c.expect.get("absent")]


def numbers(tasks: Sequence[Any], roots: Sequence[Path]) -> dict[str, float]:
    """What the ledgers of some runs come to, over the runs that crossed a boundary.

    Returns:
        For each kind that was looked for: `ledger_KIND_held`, share of the criteria behind the last boundary;
        `ledger_KIND_acquired` and `ledger_KIND_lost`, criteria of a run over all of its boundaries.
    """
    found: dict[str, float] = {}
    lines = [(task, read_private(root, LEDGER)) for task, root in zip(tasks, roots, strict=True) if probed(task)]
    for kind in KINDS:
        seen = [(task, records) for task, records in lines if records and all(r[kind] is not None for r in records)]
        if seen:
            moves = [ledger(records, kind) for _, records in seen]
            found |= {
                f"ledger_{kind}_held": fmean(len(records[-1][kind]) / len(probed(task)) for task, records in seen),
                f"ledger_{kind}_acquired": fmean(sum(len(up) for up, _ in each) for each in moves),
                f"ledger_{kind}_lost": fmean(sum(len(down) for _, down in each) for each in moves),
            }
    return found


def trajectory_of(task: Any, root: Path, events: Events, reward: float, labels: Mapping[str, str],
                  config: GrpoConfig) -> Trajectory:  # fmt: skip
    """What credit needs of a run on disk.

    Args:
        task: with its rubric.
        root: the run's folder.
        events: of the run.
        reward: of the run.
        labels: of its grading, by criterion.
        config: potential, full_gain.

    Raises:
        ValueError: a boundary is not in the ledger, or was not looked at in the way that the credit needs.
    """
    compacts = [event for event in events if event["event"] == "compact"]
    records = read_private(root, LEDGER)
    if len(records) != len(compacts):
        raise ValueError(f"{root / LEDGER} has {len(records)} of {len(compacts)} boundaries; remove the run's folder")
    kind, asked = config.potential, probed(task)
    if any(record.get(kind) is None for record in records):
        raise ValueError(
            f"{root / LEDGER} does not say what is {kind}, which potential={kind} needs: ask a local policy, or take "
            f"potential=written on a backend with text"
        )
    held = [frozenset(record["written" if kind == "written" else "answered"]) for record in records]
    if kind == "gain":
        potential = [fmean(min(1.0, max(0.0, record["gain"][name] / config.full_gain)) for name in asked)
                     for record in records]  # fmt: skip
    else:
        potential = [len(each) / len(asked) for each in held]
    documents = max(1, len(events[0]["documents"]))
    read = [0.0, *(len({name for name, *_ in event["read"]}) / documents for event in compacts)]
    passed = {name: label == "pass" for name, label in labels.items() if label != "unscored"}
    return Trajectory(reward, held, potential, read, passed)


def window_advantages(
    plain: Mapping[str, float], group_of: Mapping[str, str], made: Mapping[str, Trajectory], config: GrpoConfig
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The advantage of every window, and how far the potential foretells the reward.

    Args:
        plain: advantage by trajectory.
        group_of: the group of each.
        made: see `trajectory_of`, the same trajectories.
        config: credit, credit_share, credit_decay.
    """
    groups: dict[str, dict[str, Trajectory]] = {}
    for name in plain:
        groups.setdefault(group_of[name], {})[name] = made[name]
    found = {}
    for group in groups.values():
        credit = ledger_credit(group) if config.credit == "ledger" else potential_credit(group, config.credit_decay)
        found |= {name: mixed(plain[name], each, config.credit_share) for name, each in credit.items()}
    foretold = correlation(list(made.values()))
    return found, {} if foretold is None else {"credit_correlation": foretold}


def check_credit(config: GrpoConfig, tasks: Sequence[Any], backend: str) -> None:
    """Refuse credit that no ledger could give.

    Raises:
        ValueError: says what is missing.
    """
    if config.credit == "broadcast":
        return
    if config.credit == "lines":
        mute = [task.id for task in tasks if not anchors(task)]
        if mute:
            raise ValueError(
                f"no criterion of {mute[0]} says which party it is about, by which credit=lines finds its lines: take "
                f"synthetic matters, or credit=broadcast"
            )
        return
    blind = [task.id for task in tasks if not probed(task)]
    if blind:
        raise ValueError(
            f"no criterion of {blind[0]} states a value that can be looked for behind a boundary, which "
            f"credit={config.credit} needs: take synthetic matters, or credit=broadcast"
        )
    if config.potential == "written" and backend == "kv":
        raise ValueError("slots have no text, so nothing is written in them: take potential=answered or gain")
