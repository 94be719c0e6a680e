"""A teacher with privileged access, and a public transcript that never had it.

A teacher's session keeps two conversations. The inner one is what the teacher sees: S with a private block, and private
notes. The public one holds the student's S and nothing private; the loop and its log know only that. What is private is
written to `private.jsonl`, beside a log that stays valid without it.

Private submit: when the teacher stops short, one private bit tells it so, and it goes on in its own voice. The failed
stop and the note exist in the inner conversation alone, so the public transcript goes from the last result straight to
the turn that checks again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...budgets import slots_for
from ...eval.tasks import LabTask
from .. import backends
from ..backends.text import TextBackend
from ..bridge import memo_demand
from ..episodes import Oracle
from ..policies.chat import ChatFormat
from ..policies.local import LocalPolicy
from ..policies.scripted import ScriptedPolicy, ScriptedSession
from ..run_config import RunConfig
from ..sampling import Answer, Request, Sampler
from ..state import sampled_from
from ..types import Artifact, Backend, Boundary, ContextSize, Limit, Message, Policy, Sampled
from ..windows import template_digest

DEMAND = memo_demand(0).split(":")[0]
PRIVATE = "private.jsonl"


def rubric_block(task: LabTask, marker: str) -> str:
    """The criteria as a teacher is shown them."""
    criteria = "\n".join(f"- {each.title}: {each.match_criteria}" for each in task.criteria)
    return (
        f"[{marker}] For you alone: the work is complete when all of this holds.\n{criteria}\n"
        "Work from the documents and in your own words. Never mention or copy this list."
    )


def private_note(marker: str) -> str:
    """The one bit that a failed submit returns."""
    return (
        f"[{marker}] For you alone: not complete yet. Find what is missing by checking the matter again, then go on as "
        "though you had noticed it yourself. Never mention this note."
    )


def marker_of(task: LabTask, key: str) -> str:
    """The canary of an attempt at a task, by the attempt's key."""
    return "PRIVATE-" + hashlib.sha256(f"{key} {task.id}".encode()).hexdigest()[:12]


def key_of(round: int, number: int) -> str:
    """The key of an attempt, by its round and number."""
    return f"round {round} attempt {number}"


class PrivateChannel:
    """What one attempt keeps from its public log.

    Args:
        folder: the run's.
        task: with its rubric.
        key: names the attempt; the canary marker is drawn from it.
    """

    def __init__(self, folder: Path, task: LabTask, key: str):
        self.path, self.task = Path(folder) / PRIVATE, task
        self.marker = marker_of(task, key)
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            whole = self.path.read_bytes()
            kept = whole[: whole.rfind(b"\n") + 1]
            if kept != whole:
                self.path.write_bytes(kept)
            self.lines = [json.loads(line) for line in kept.splitlines()]

    def note(self, kind: str, turn: int, **fields: Any) -> None:
        """Append a line."""
        line = {"kind": kind, "turn": turn, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.lines.append(line)

    def of(self, kind: str, turn: int | None = None) -> list[dict[str, Any]]:
        """Lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind and turn in (None, line["turn"])]

    @property
    def corrected_at(self) -> list[int]:
        """Turns that follow a private note, by number."""
        return sorted({line["turn"] for line in self.of("submit")})


class OracleTeacher:
    """A script that looks the answers up in the rubric, in place of a model: for tasks that the exact judge can check.

    It copies what the documents say in the student's own notation and never goes wrong, so that a first round has
    rollouts to keep where no model at hand knows the game.

    Args:
        student: whose tokenizer, window and bytes a token count.
    """

    name = "oracle"

    def __init__(self, student: LocalPolicy):
        self.student, self.tokenizer = student, student.tokenizer
        self.window, self.bytes_per_token = student.window, student.bytes_per_token

    def check(self, task: LabTask) -> None:
        """Refuse a task that it cannot teach.

        Raises:
            ValueError: there is no criterion whose value it could look up.
        """
        if not any(each.expect for each in task.criteria):
            raise ValueError(f"{task.id} has no criterion with a value to look up: the oracle cannot teach it")

    def of(self, task: LabTask, run: RunConfig) -> ScriptedPolicy:
        """The policy that plays a task.

        Raises:
            ValueError: see `check`.
        """
        self.check(task)
        memo_tokens = make_backend(run, self.student).memo_tokens
        player = Oracle(task, memo_tokens, self.student.session([]).count)
        policy = ScriptedPolicy(self.tokenizer, lambda: player, self.window, name=self.name)
        policy.bytes_per_token = self.bytes_per_token
        return policy


class TeacherPolicy:
    """A policy that plays with a private prefix, and is seen by the loop as though it had none.

    Args:
        teacher: the model that plays.
        tokenizer: the student's: the public transcript is rendered by it.
        channel: of this attempt.
        window: of the public transcript; the teacher's own must have room for the private text besides.
        rubric: show the criteria.
        falls_short: whether the deliverables as they lie now fall short; None where that is not known.
        rounds: private submits at most; 0 for none.
    """

    capabilities = frozenset({"tokens"})

    def __init__(
        self, teacher: Policy, tokenizer, channel: PrivateChannel, window: int, *, rubric: bool = True,
        falls_short: Callable[[], bool | None] | None = None, rounds: int = 0,
    ):  # fmt: skip
        self.teacher, self.tokenizer, self.channel, self.window = teacher, tokenizer, channel, window
        self.rubric, self.falls_short, self.rounds = rubric, falls_short, rounds
        self.name, self.bytes_per_token = f"teacher {teacher.name}", teacher.bytes_per_token
        theirs = getattr(teacher, "tokenizer", None)
        self.same_ids = theirs is not None and template_digest(theirs) == template_digest(tokenizer)

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> TeacherSession:
        """A new conversation."""
        return TeacherSession(self, tools)


class TeacherSession:
    """See `harness.types.Session`.

    Attributes:
        public: the student's view, token by token; nothing is computed in it.
        inner: what the teacher sees.
    """

    def __init__(self, policy: TeacherPolicy, tools: list[dict[str, Any]]):
        self.policy = policy
        shadow = ScriptedPolicy(policy.tokenizer, lambda: None, policy.window, name="public")
        shadow.bytes_per_token = policy.bytes_per_token
        self.public = ScriptedSession(shadow, ChatFormat(policy.tokenizer, tools), False)
        self.inner = policy.teacher.session(tools)
        self.turn, self.last, self._rounds = 0, "", 0

    @property
    def base_ids(self) -> list[int]:
        """Of the student's S and U."""
        return self.public.base_ids

    @property
    def pending_ids(self) -> list[int]:
        """See `LocalSession`."""
        return self.public.pending_ids

    def start(self, base: Sequence[Message]) -> None:
        """Begin a window afresh, the private block behind the teacher's S."""
        policy, theirs = self.policy, list(base)
        if policy.rubric:
            block = rubric_block(policy.channel.task, policy.channel.marker)
            theirs[0] = replace(base[0], content=f"{base[0].content}\n\n{block}")
            if not policy.channel.of("prefix"):
                policy.channel.note("prefix", self.turn, text=block, marker=policy.channel.marker)
        self.public.start(base)
        self.inner.start(theirs)

    def append(self, messages: Sequence[Message]) -> None:
        """Add to both."""
        self.public.append(messages)
        self.inner.append(messages)
        self.last = messages[-1].content

    def sample(self, limit: Limit) -> Sampled:
        """A turn of the teacher; a stop that falls short is answered privately first."""
        self.begin()
        while (turn := self.hear(self.inner.sample(self.limit_of(limit)))) is None:
            pass
        return turn

    def begin(self) -> None:
        """Before a turn is sampled."""
        self._rounds = self._private_rounds()

    def limit_of(self, limit: Limit) -> Limit:
        """That of the teacher's own session, for the turn or for what it says after a private note."""
        return replace(limit, seed=limit.seed + self._rounds)

    def hear(self, sampled: Sampled) -> Sampled | None:
        """The student's turn of what the teacher said; None where it is told to go on, and is to be sampled again."""
        if self._falls_short(sampled, self._rounds):
            note = private_note(self.policy.channel.marker)
            self.policy.channel.note("submit", self.turn, failed=asdict(sampled), text=note)
            self.inner.append([Message("user", note)])
            self._rounds += 1
            return None
        self.policy.channel.note("turn", self.turn, logprobs=list(sampled.logprobs))
        self.turn += 1
        return self.public.repeat(self._as_the_students(sampled))

    def _private_rounds(self) -> int:
        """Put back what an earlier start of this run kept private before this turn; all rounds so far."""
        for line in self.policy.channel.of("submit", self.turn):
            self.inner.repeat(sampled_from(line["failed"]))
            self.inner.append([Message("user", line["text"])])
        return len(self.policy.channel.of("submit"))

    def _falls_short(self, sampled: Sampled, rounds: int) -> bool:
        stops = not sampled.calls and not sampled.problem and not self.last.startswith(DEMAND)
        if not stops or rounds >= self.policy.rounds or self.policy.falls_short is None:
            return False
        return self.policy.falls_short() is True

    def _as_the_students(self, sampled: Sampled) -> Sampled:
        """The turn in the student's tokens; log-probabilities are of another context and go no further."""
        ids = sampled.output_ids
        if not self.policy.same_ids or not ids:
            ids = tuple(self.public.chat.assistant(Message("assistant", sampled.text, sampled.calls)))
        return replace(sampled, output_ids=ids, output_tokens=len(ids), logprobs=(), version=None)

    def accept(self, sampled: Sampled) -> None:
        """Take a recorded turn, and what was private before it."""
        self._private_rounds()
        self.public.accept(sampled)
        self.inner.repeat(sampled)
        self.turn += 1

    def reject(self) -> None:
        """Forget the last turn."""
        self.turn -= 1
        self.public.reject()
        self.inner.reject()

    def repeat(self, sampled: Sampled) -> Sampled:
        """Put a turn of an earlier window behind both prompts."""
        self.turn += 1
        self.inner.repeat(sampled)
        return self.public.repeat(sampled)

    def count(self, text: str) -> int:
        """Tokens of a text, the student's."""
        return self.public.count(text)

    def cut(self, text: str, tokens: int, last: bool = False) -> str:
        """The first tokens of a text, or the last ones."""
        return self.public.cut(text, tokens, last)

    def size(self) -> ContextSize:
        """The public window."""
        return self.public.size()

    def pretend(self, slots: int) -> int:
        """Go on as behind slots: the student will have them, the teacher keeps everything in view."""
        return self.public.pretend(slots)


class ThroughTeachers:
    """Answers the turns of teachers' sessions by whoever samples their own; see `harness.sampling.Sampler`.

    Args:
        sampler: of the model that teaches.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self._asked: dict[Request, Request] = {}

    def ask(self, request: Request) -> None:
        """See `Sampler`."""
        request.session.begin()
        self._ask(request)

    def _ask(self, request: Request) -> None:
        own = Request(request.session.inner, request.session.limit_of(request.limit))
        self._asked[own] = request
        self.sampler.ask(own)

    def answered(self) -> list[Answer]:
        """See `Sampler`; private notes are no turns."""
        ended: list[Answer] = []
        while not ended:
            for own, made in self.sampler.answered():
                request = self._asked.pop(own)
                try:
                    turn = made if isinstance(made, Exception) else request.session.hear(made)
                except Exception as problem:
                    turn = problem
                if turn is None:
                    self._ask(request)
                else:
                    ended.append((request, turn))
        return ended


PLAYABLE = ("full", "plain", "none", "trim", "memo", "kv", "hybrid")
"""Backends of a teacher's rollouts."""


def check_run(run: RunConfig) -> None:
    """Refuse a run whose rows a teacher cannot play.

    Raises:
        ValueError: its backend is none of `PLAYABLE`, or it has no ratio where a student would have slots.
    """
    if run.backend not in PLAYABLE:
        raise ValueError(f"a teacher cannot play {run.backend}; take memo, kv or hybrid")
    if run.backend in ("kv", "hybrid") and run.ratio is None:
        raise ValueError(f"a teacher's rollouts for {run.backend} need a ratio, not a budget of {run.budget}")


def make_backend(run: RunConfig, policy: Policy) -> Backend:
    """The backend of a teacher's rollouts: the run's own, or its shape where a student would have slots."""
    return ShapedKv(run, policy) if run.backend in ("kv", "hybrid") else backends.make(run, policy)


class ShapedKv(TextBackend):
    """The shape of a boundary behind slots, for teachers: rows get the prefix plan that a student's run would have.

    Args:
        config: kv or hybrid, with a ratio.
        policy: a teacher.

    Raises:
        ValueError: there is no ratio.
    """

    def __init__(self, config: RunConfig, policy: TeacherPolicy):
        check_run(config)
        super().__init__(config, policy)
        self.config, self.writes_memo = config, config.backend == "hybrid"
        self.tokens = max(1, int(self.tokens * config.memo_share))

    def compact(self, session: TeacherSession, base, memo: str, boundary: Boundary) -> Artifact:
        """Go on as behind slots."""
        held = boundary.held.details["held"] if boundary.held else 0
        waiting = session.size().raw  # what waits to be read is part of the window
        tokens = session.pretend(held)
        again = held > 0 and self.config.mode == "recompact"  # as `kv`: what the first window got holds all others too
        count = held if again else slots_for(tokens, self.config.ratio)
        total = count if again else held + count
        session.public._compacted = (total, total * (self.bytes_per_token or 0))
        text = session.cut(memo, self.tokens) if self.writes_memo else ""
        details = {"slots": count, "held": total, "method": self.config.method, "mode": self.config.mode,
                   "exhausted": False, "window_tokens": tokens, "raw": waiting}  # fmt: skip
        return Artifact(self.name, text, tokens=total, details=details)

    def restore(self, session: TeacherSession, base, artifact: Artifact, folder: Path) -> None:
        """The same again."""
        session.pretend(artifact.details["held"])
