"""The first stage of a round: a teacher's attempts at each task, graded, each in a folder of its own.

    ROUND/collect/TASK/attempt-0/              a run folder, with private.jsonl beside its public log
    ROUND/collect/TASK/attempt-0/attempt.json  written last: how it ended, its gradings, whether it is kept
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..agent import Episode, drive_many
from ..documents import Documents
from ..play import claim, run_id
from ..run_config import RunConfig
from ..runs import read_run, write_atomically
from ..sampling import OneByOne, sampler
from ..sandbox import sandbox_of
from ..tools import Workspace
from ..types import NoRoom, Policy
from .config import IsftConfig
from .grading import Grade, Scored, falls_short, grade_runs
from .ledgers import watcher
from .teacher import (
    PRIVATE,
    OracleTeacher,
    PrivateChannel,
    TeacherPolicy,
    ThroughTeachers,
    check_run,
    key_of,
    make_backend,
)

DONE = "attempt.json"


@dataclass(frozen=True)
class Attempt:
    """One rollout of a teacher.

    Attributes:
        round: of iSFT, from 1.
        task: id of the task.
        number: of the attempt.
        folder: of the run.
        teacher: who played.
        status: as `play.Outcome`.
        reason: why it ended.
        rates: share of the criteria that pass, one a grading.
        all_pass: one a grading; None is unscored.
        kept: it passes every criterion in every grading, and nothing of it is degraded.
        corrected_at: turns that followed a private note.
        rolled_back_from: attempt that it continues from a boundary, or None.
        windows: of the run.
    """

    round: int
    task: str
    number: int
    folder: str
    teacher: str
    status: str
    reason: str
    rates: list[float | None]
    all_pass: list[bool | None]
    kept: bool
    corrected_at: list[int]
    rolled_back_from: int | None
    windows: int

    @property
    def corrections(self) -> int:
        """Turns that followed a private note."""
        return len(self.corrected_at)


@dataclass(frozen=True)
class Play:
    """An attempt under way.

    Attributes:
        task: that it is at.
        number: of the attempt.
        channel: what it keeps from its log.
        source: attempt that it continues from a boundary, or None.
        episode: in the harness.
    """

    task: Any
    number: int
    channel: PrivateChannel
    source: int | None
    episode: Episode


class Collector:
    """Plays and grades attempts.

    Args:
        teacher: the model that plays, with privileges.
        tokenizer: the student's.
        run: of the harness.
        config: of iSFT.
        graders: one for each grading; they must not share a cache of verdicts.
        output: the round's folder.
        round: its number.
        together: attempts at a time, at as many tasks: decoded in one batch by a local model, requested in parallel of
            a server.
        report: called with every attempt as it ends.

    Raises:
        ValueError: there are fewer graders than gradings, a backend whose rows a teacher cannot play, or no sandbox
            where the run demands one.
    """

    def __init__(
        self, teacher: Policy, tokenizer: Any, run: RunConfig, config: IsftConfig, graders: Sequence[Grade],
        output: Path, round: int, together: int = 1, report: Callable[[Attempt], None] = lambda _: None,
    ):  # fmt: skip
        check_graders(graders, config)
        check_run(run)
        self.teacher, self.tokenizer, self.config, self.graders = teacher, tokenizer, config, graders
        gate = config.private == "gate"
        self.run = replace(run, review=run.review or gate, on_failure="fail", temperature=config.temperature)
        self.output, self.round, self.together, self.report = Path(output), round, together, report
        self.sandbox, _ = sandbox_of(run)

    def collect(self, tasks: Sequence[Any]) -> list[Attempt]:
        """Attempts at every task, until enough are kept or there were as many as allowed; what is on disk is read."""
        found: dict[str, list[Attempt]] = {task.id: [] for task in tasks}
        due, playing = deque(tasks), {}

        def opened() -> Iterator[Episode | None]:
            while True:  # an attempt that ends may make another one due
                play = self._open(due.popleft(), found) if due else None
                if play is not None:
                    playing[play.episode] = play
                if play is not None or not due:
                    yield play and play.episode

        who = OneByOne() if isinstance(self.teacher, OracleTeacher) else sampler(self.teacher, self.together)
        for episode, end in drive_many(opened(), self.together, ThroughTeachers(who)):
            play = playing.pop(episode)
            attempt = self._graded(play, end)
            found[play.task.id].append(attempt)
            self.report(attempt)
            due.appendleft(play.task)
        return [attempt for task in tasks for attempt in found[task.id]]

    def _open(self, task: Any, found: Mapping[str, list[Attempt]]) -> Play | None:
        """The next attempt at a task, as it is played; None where it has enough."""
        mine = found[task.id]
        while len(mine) < self._most and self._counted(mine) < self.config.keep_per_task:
            number = len(mine)
            folder = self.output / "collect" / task.id / f"attempt-{number}"
            if not (folder / DONE).is_file():
                return self._play(task, number, folder, mine[-1] if mine else None)
            mine.append(Attempt(**json.loads((folder / DONE).read_text(encoding="utf-8"))))
        return None

    @property
    def _most(self) -> int:
        """Attempts at a task: one of a teacher that draws nothing, whose second would be the first again."""
        draws = self.config.temperature > 0 and not isinstance(self.teacher, OracleTeacher)
        return self.config.rollouts if draws else 1

    def _counted(self, attempts: Sequence[Attempt]) -> int:
        """Attempts that count as kept: all of the control's, which would else have more of what fails."""
        return len(attempts) if self.config.select == "any" else sum(a.kept for a in attempts)

    def _play(self, task: Any, number: int, folder: Path, before: Attempt | None) -> Play:
        source = None
        if self.config.private == "rollback" and before is not None and not before.kept and before.windows > 1:
            source = before.number
            if not (folder / "events.jsonl").exists():
                roll_back(Path(before.folder), folder)
        channel = PrivateChannel(folder, task, key_of(self.round, number))
        run = replace(self.run, seed=self.run.seed + 1000 * self.round + number)
        rounds = self.config.private_rounds if self.config.private == "submit" else 0
        teacher = self.teacher.of(task, run) if isinstance(self.teacher, OracleTeacher) else self.teacher
        policy = TeacherPolicy(
            teacher, self.tokenizer, channel, run.window or teacher.window, rubric=self.config.rubric,
            falls_short=lambda: falls_short(self.graders[0], task, folder / "workspace"), rounds=rounds,
        )  # fmt: skip
        place = claim(task, policy, run, folder)
        workspace = Workspace(place.workspace, Documents.load(task.agent_view()), self.sandbox)
        episode = Episode(
            workspace, policy, make_backend(run, policy), run, place,
            {"run_id": run_id(task, policy, run)},
        )  # fmt: skip
        episode.watch = watcher()(task, folder)
        return Play(task, number, channel, source, episode)

    def _graded(self, play: Play, end: dict[str, Any] | Exception) -> Attempt:
        """What an attempt came to, kept on disk."""
        scored: list[Scored] = []
        folder = play.episode.folder.root
        if isinstance(end, NoRoom):  # a teacher sees more than its student, and another attempt may be shorter
            end = {"status": "failed", "stop": f"{end}; a teacher with a longer window has more"}
        elif isinstance(end, Exception):
            raise end
        else:
            play.episode.folder.write_lab_files(read_run(folder))
            graders = self.graders[: self.config.gradings]
            scored = [grade_runs(grade, [(play.task, folder)])[0] for grade in graders]
        events = read_run(folder)
        degraded = any(event["event"] == "compact" and event["degraded"] for event in events)
        attempt = Attempt(
            self.round, play.task.id, play.number, str(folder), self.teacher.name, end["status"], end["stop"],
            [each.rate for each in scored], [each.all_pass for each in scored],
            end["status"] == "done" and not degraded and all(each.all_pass for each in scored),
            play.channel.corrected_at, play.source, sum(event["event"] == "compact" for event in events) + 1,
        )  # fmt: skip
        write_atomically(folder / DONE, json.dumps(asdict(attempt), indent=2).encode() + b"\n")
        return attempt


def check_graders(graders: Sequence[Grade], config: IsftConfig) -> None:
    """Refuse fewer graders than gradings.

    Raises:
        ValueError: gives both numbers.
    """
    if len(graders) < config.gradings:
        raise ValueError(f"{config.gradings} independent gradings need as many graders; {len(graders)} were given")


def roll_back(source: Path, target: Path) -> None:
    """A run folder that ends at another's last boundary, to be played on from there with another seed."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("blobs", "artifacts"):
        if (source / name).is_dir():
            shutil.copytree(source / name, partial / name)
    lines = (source / "events.jsonl").read_bytes().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if json.loads(line)["event"] == "compact")
    (partial / "events.jsonl").write_bytes(b"".join(lines[: last + 1]))
    if (source / PRIVATE).exists():
        turns = sum(json.loads(line)["event"] == "turn" for line in lines[: last + 1])
        private = (source / PRIVATE).read_bytes().splitlines(keepends=True)
        kept = [line for line in private if json.loads(line)["turn"] < turns]
        (partial / PRIVATE).write_bytes(b"".join(kept))
    partial.rename(target)
