"""The loop: an agent reads a matter document by document, is compacted as it reads, and writes what was asked for.

    window 0:  S U | A T  A T  A T  A(write memento.md) T
    rewrite:   S U B1
    window M:  S U BM | A T ... A(write output/...) T  A(no tool call)

`Episode.play` is a generator: it yields what it wants sampled, so a driver may run one episode or many at a time. A
run that was killed is played again from its event log: recorded turns, results and artifacts are taken as they are,
by the same code, until the log ends; then it is live. Nothing here decides by the clock.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from .bridge import Counters, Ledger, base_messages, memo_demand, memo_reminder, nudge, review, rewrite
from .confined import shown_names
from .documents import Documents
from .rules import MISTAKES, Rules
from .run_config import RunConfig
from .runs import EventLog, RunError, RunFolder
from .sampling import OneByOne, Request, Sampler
from .state import State, kind_of, sampled_fields, sampled_from, tool_fields
from .tools import Workspace
from .triggers import Decision, Thresholds
from .types import MEMO, Artifact, Backend, Boundary, ContextSize, Limit, Message, Policy, Sampled, ToolCall

Sampling = Generator[Request, Sampled, Any]


class Episode:
    """One agent on one task.

    Args:
        workspace: the task's documents and tools, in the run's folder.
        policy: the model.
        backend: made for this policy.
        config: of the run.
        folder: where everything goes; one that holds an unfinished run of the same settings is taken up.
        about: what the first event says besides: run id, provenance.

    Attributes:
        watch: called behind each boundary, replayed ones too, to look at what crossed; it changes nothing.
    """

    def __init__(
        self, workspace: Workspace, policy: Policy, backend: Backend, config: RunConfig, folder: RunFolder,
        about: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.workspace, self.policy, self.backend, self.config, self.folder = workspace, policy, backend, config, folder
        self.task, self.about, self.live = workspace.documents.task, about or {}, False
        self.watch: Callable[[Episode], None] | None = None
        self.log = EventLog(folder.events)
        self.tools = [tool for tool in workspace.specs() if tool["function"]["name"] in config.tools]
        self.session = policy.session(self.tools, "queries" in backend.needs)
        self.window = min(config.window or policy.window, policy.window)
        reserve = min(16_384, self.window // 4) if config.reserve is None else config.reserve
        errors = workspace.documents.errors
        self.state = State(Ledger(tuple(name for name, real in workspace.names.items() if real not in errors)))
        names = [tool["function"]["name"] for tool in self.tools]
        self.rules = Rules(
            workspace, self.session, backend, self.state, names, self.window, reserve,
            Thresholds.of(config, self.task.id), config.backend != "plain",
        )  # fmt: skip

    def play(self) -> Sampling:
        """Play to the end; returns the `end` event."""
        self.open()
        while not self.spent():
            sampled = yield from self.turn()
            if self.state.stop:
                break
            if not sampled.calls:
                self.finish()
            else:
                due = self.answer(sampled)
                while due and not self.spent():
                    due = yield from self.boundary(due)
        return self.close()

    def open(self) -> None:
        """Begin the first window, and say what is played.

        Raises:
            RunError: the log is another process's, is damaged, or is of other documents.
        """
        self.log.open()
        if recorded := self.log.expect("run"):
            self.folder.check_documents(recorded["documents"], facts(self.workspace.documents))
        names, memo_tokens = self.state.ledger.documents, self.backend.memo_tokens
        self.base = base_messages(self.task.instructions, self.task.deliverables, names, self.config, memo_tokens)
        self.session.start(self.base)
        event = self.log.commit("run", **({} if self.log.recorded else self.first_event()))
        self.state.tokens_of = {each["name"]: each["tokens"] for each in event["documents"]}

    def turn(self, demanded: bool = False) -> Sampling:
        """Sample one turn; a memo that is empty, cut or a tool call is rejected and sampled again."""
        for attempt in range(self.config.attempts):
            if recorded := self.log.expect("turn", "reject"):
                sampled = sampled_from(recorded)
                self.session.accept(sampled)
            else:
                self.go_live()
                sampled = yield Request(self.session, self.limit(attempt, demanded))
            flaw = self.rules.flaw(sampled, demanded)
            if not flaw or attempt == self.config.attempts - 1:
                break
            self.log.commit("reject", **self.turn_fields(sampled, demanded), attempt=attempt, reason=flaw)
            self.session.reject()
            self.state.threw_away(sampled)
        self.take(sampled, demanded)
        self.state.flaw = flaw
        return sampled

    def answer(self, sampled: Sampled) -> Decision:
        """Run the turn's calls, show the results, and say whether the window is to be closed."""
        state, results, waiting, mistakes = self.state, [], 0, []
        for index, call in enumerate(sampled.calls):
            message, event = self.call(index, call, sampled, waiting)
            results.append(message)
            waiting += event["tokens"]
            mistakes.append(event["problem"] in MISTAKES)
        tokens = self.session.size().total + waiting
        due = self.rules.due(tokens)
        waits = self.backend.writes_memo and not state.memo_ready
        if due and waits:
            reminder = memo_reminder(state.reads, due.level == "force")
            results[-1] = replace(results[-1], content=results[-1].content + reminder)
        self.session.append(results)
        state.history += [f"tool: {each.content}" for each in results]
        state.mistakes = state.mistakes + 1 if all(mistakes) else 0
        if state.mistakes >= 3:
            state.stop = "tool_errors"
        if waits:
            return due if self.rules.must_demand(due, tokens) else Decision()
        return due or Decision("suggest", "agent") if state.memo_ready and self.backend.compacts else due

    def boundary(self, due: Decision) -> Sampling:
        """Close the window: a memo where the backend needs one, the backend's own work, and the bridge.

        Returns whether the next window is due already: a read that waited may fill it.
        """
        state, memo, degraded, demanded = self.state, "", "", False
        if self.backend.writes_memo:
            demanded = not state.memo_ready
            memo, degraded = (yield from self.demand_memo()) if demanded else self.own_memo()
            if state.stop:
                return Decision()
        before, recorded = self.size(), self.log.expect("compact")
        if recorded:
            artifact = Artifact(**{**recorded["artifact"], "text": self.folder.text(recorded["artifact"]["text"])})
            self.backend.restore(self.session, self.base, artifact, self.folder.root)
        else:
            self.go_live()
            history, folder = lambda: "\n".join(state.history), self.folder.artifacts
            boundary = Boundary(state.window, state.held, self.rules.ahead(), folder, history)
            seconds, artifact = timed(self.backend.compact, self.session, self.base, memo, boundary)
        fields = {} if recorded else {
            "window": state.window, "trigger": due.trigger, "forced": demanded, "attempts": state.rejected,
            "degraded": degraded or ("budget used up" if artifact.details.get("exhausted") else ""),
            "artifact": {**asdict(artifact), "text": self.folder.keep(artifact.text)}, "seconds": seconds,
            "decoded_tokens": state.decoded, "files": state.files, "before": asdict(before),
            "pending_ids": list(getattr(self.session, "pending_ids", ())),
            "read": [[name, part.window, part.characters] for name, part in state.ledger.read.items()],
        }  # fmt: skip
        state.next_window(artifact)
        messages = rewrite(self.base, artifact, state.ledger, self.counters(artifact))
        self.session.append(messages[len(self.base) :])
        if not recorded:
            after = self.size()
            fields |= {"after": asdict(after), "bridge": self.folder.keep(messages[-1].content)}
            fields["prefill_tokens"] = self.session.size().raw + (0 if artifact.path else after.base)
        state.has(self.log.commit("compact", **fields)["files"])
        if self.watch is not None:
            self.watch(self)
        return Decision() if state.deferred is None else self.issue_again()

    def finish(self) -> None:
        """The agent stopped: one note where a deliverable is missing, and one where all are asked to check again."""
        missing = self.missing()
        if missing and not self.state.nudged:
            self.state.nudged = True
            self.tell(nudge(missing if self.task.deliverables else ()), "nudge")
        elif self.config.review and not self.state.reviewed:
            self.state.reviewed = True
            self.tell(review(), "review")
        else:
            self.state.stop = "no_deliverable" if missing else "done"

    def close(self) -> dict[str, Any]:
        """Hand in what is there, and end."""
        stop = self.spent()
        self.go_live()
        self.log.commit("submit", files=[] if self.log.recorded else self.folder.submit(), missing=self.missing())
        totals = {"turns": self.state.turns, "windows": self.state.window + 1}
        end = self.log.commit("end", status="done" if stop == "done" else "stopped", stop=stop, totals=totals)
        self.log.close()
        return end

    def call(self, index: int, call: ToolCall, sampled: Sampled, waiting: int) -> tuple[Message, dict[str, Any]]:
        """Answer one call, and log it with what it changed."""
        if self.log.recorded:
            event = self.log.commit("tool")
        else:
            self.go_live()
            seconds, (rule, result) = timed(self.rules.answer, call, sampled, waiting)
            fields = tool_fields(call, rule, result) | {
                "turn": self.state.turns - 1, "window": self.state.window, "index": index, "seconds": seconds,
                "tokens": self.session.count(result.text), "result": self.folder.keep(result.text),
            }  # fmt: skip
            if call.name in ("write", "edit", "bash") and (files := self.folder.snapshot()) != self.state.files:
                fields["files"] = files
            event = self.log.commit("tool", **fields)
        self.state.saw(event, sampled)
        return Message("tool", self.folder.text(event["result"]), call=call), event

    def demand_memo(self) -> Sampling:
        """Ask for the memo as plain text; returns it, or the one before, and what is wrong with it."""
        self.tell(memo_demand(self.backend.memo_tokens), "memo")
        sampled = yield from self.turn(demanded=True)
        flaw, held = self.state.flaw, self.state.held
        if flaw and flaw != "over its budget" and self.config.on_failure == "fail":
            self.state.stop = "compaction_failed"
            return "", flaw
        good = not flaw or flaw == "over its budget"
        memo = sampled.text if good else (held.text if held else "")
        if not self.log.recorded:
            self.go_live()
            with suppress(IsADirectoryError):  # a command made a folder of that name; the memo crosses all the same
                self.workspace.files.write((MEMO,), memo.encode("utf-8", "replace"))
            self.state.has(self.folder.snapshot())
        return memo, "" if not flaw else "memo cut to its budget" if good else f"no memo: {flaw}"

    def own_memo(self) -> tuple[str, str]:
        """The memo that the agent wrote, and what is wrong with it; neither is needed while replaying."""
        if self.log.recorded:
            return "", ""
        self.go_live()
        memo = self.rules.memo()
        return memo, "memo cut to its budget" if self.session.count(memo) > self.backend.memo_tokens else ""

    def issue_again(self) -> Decision:
        """Repeat the read that made way for the compaction, with the agent's own tokens; answers as `answer` does."""
        turn, self.state.deferred = self.state.deferred, None
        if recorded := self.log.expect("turn"):
            turn = sampled_from(recorded)
            self.session.accept(turn)
        else:
            turn = self.session.repeat(replace(turn, output_tokens=0, seconds=0.0, cost=None))
        self.take(turn, repaired=True)
        return self.answer(turn)

    def take(self, sampled: Sampled, demanded: bool = False, repaired: bool = False) -> None:
        """A turn counts."""
        kind = kind_of(sampled, demanded)
        self.log.commit("turn", **self.turn_fields(sampled, demanded, repaired), kind=kind)
        self.state.took(sampled, kind)
        if sampled.finish == "content_filter":  # what is left of the turn is not what the agent said
            self.state.stop = sampled.finish

    def turn_fields(self, sampled: Sampled, demanded: bool = False, repaired: bool = False) -> dict[str, Any]:
        """What an event says of a turn."""
        where = {"turn": self.state.turns, "window": self.state.window, "forced": demanded, "repaired": repaired}
        return {} if self.log.recorded else {**where, **sampled_fields(sampled)}

    def spent(self) -> str:
        """Why the run must stop now, or an empty string."""
        if self.state.stop:
            return self.state.stop
        if self.session.size().total + 16 > self.window:
            return "overflow"
        if self.state.turns >= self.config.max_turns:
            return "max_turns"
        return "max_windows" if self.state.window >= self.config.max_windows else ""

    def limit(self, attempt: int, demanded: bool) -> Limit:
        """How the next turn is sampled: drawn from the run's seed, the turn and the attempt alone."""
        draw = f"{self.config.seed} {self.task.id} {self.state.turns} {attempt}"
        seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:6])
        heat = self.config.temperature if attempt == 0 else max(self.config.temperature, self.config.retry_temperature)
        room = self.window - self.session.size().total - 16
        most = self.backend.memo_tokens + 64 if demanded else self.config.max_new_tokens
        return Limit(max(1, min(most, self.config.max_new_tokens, room)), heat, seed)

    def size(self) -> ContextSize:
        """The window's size, with the text that crossed counted as compacted."""
        size, held = self.session.size(), self.state.held
        if held is None or not held.text:
            return size
        raw = size.total - size.base - held.tokens
        return replace(size, compacted=held.tokens, raw=raw, compacted_bytes=held.nbytes)

    def counters(self, artifact: Artifact) -> Counters:
        """What is left, for the bridge."""
        tokens = self.window - self.session.size().total - (artifact.tokens if artifact.text else 0)
        left = self.config.max_turns - self.state.turns
        return Counters(self.state.window, self.config.max_windows, left, tokens)

    def missing(self) -> list[str]:
        """Deliverables that are not there; without a map of them, any file will do."""
        there = {name.removeprefix("output/") for name in self.state.files if name.startswith("output/")}
        if not self.task.deliverables:
            return [] if there else ["any file"]
        return [name for name in self.task.deliverables if name not in there]

    def tell(self, text: str, why: str) -> None:
        """A user message by the harness."""
        self.log.commit("note", turn=self.state.turns, why=why, text=text)
        self.session.append([Message("user", text)])
        self.state.history.append(f"user: {text}")

    def first_event(self) -> dict[str, Any]:
        """What is played: everything that a reader of the log needs to know once."""
        documents = self.workspace.documents
        known = [
            {**each, "tokens": 0 if real in documents.errors else self.session.count(documents.text(real))}
            for each, real in zip(facts(documents), documents.names, strict=True)
        ]
        return {
            "schema": 1, "task": self.task.id, "backend": self.backend.name, "policy": self.policy.name,
            "window_tokens": self.window, "reserve": self.rules.reserve, "memo_tokens": self.backend.memo_tokens,
            "bytes_per_token": self.policy.bytes_per_token, "config": asdict(self.config), "tools": self.tools,
            "system": self.base[0].content, "user": self.base[1].content, "documents": known,
            "base_ids": list(getattr(self.session, "base_ids", ())), **self.about,
        }  # fmt: skip

    def fail(self, problem: BaseException) -> None:
        """Log what broke the run, where there is room to; the run can be taken up again."""
        with suppress(OSError, RunError):
            if self.log.is_open and not self.log.recorded:
                self.log.commit("error", turn=self.state.turns, error=f"{type(problem).__name__}: {problem}")
        self.log.close()

    def go_live(self) -> None:
        """The log has ended: put the workspace to where it says that it is."""
        if not self.live and not self.log.recorded:
            self.live = True
            self.folder.restore(self.state.files)


def facts(documents: Documents) -> list[dict[str, Any]]:
    """What a run's first event says of each document: a run goes on over the same ones alone."""
    return [
        {
            "name": name, "sha256": documents.sha256(real), "characters": documents.characters(real),
            "error": str(documents.errors[real]) if real in documents.errors else "",
        }
        for name, real in shown_names(documents.names).items()
    ]  # fmt: skip


def timed(function, *arguments) -> tuple[float, Any]:
    """Seconds that a call took, for the log, and its result."""
    started = time.perf_counter()
    result = function(*arguments)
    return round(time.perf_counter() - started, 6), result


def drive(episode: Episode) -> dict[str, Any]:
    """Play one episode to its end, sampling as it asks; returns its last event.

    An error of the policy or the disk is logged where it can be, and raised: the run can be taken up again.
    """
    for _, end in drive_many([episode], 1, OneByOne()):
        if isinstance(end, BaseException):
            raise end
        return end


def drive_many(
    episodes: Iterable[Episode | None], width: int, sampler: Sampler
) -> Iterator[tuple[Episode, dict[str, Any] | Exception]]:
    """Play episodes side by side, `width` at a time; yields each with its last event, or with what broke it.

    Args:
        episodes: taken as places get free; None says that there is none until an episode has ended.
        width: episodes that are open at once.
        sampler: answers the open episodes' requests.
    """
    waiting, playing = iter(episodes), {}
    try:
        while True:
            while len(playing) < width and (episode := next(waiting, None)) is not None:
                if (end := _advance(episode, episode.play(), None, playing, sampler)) is not None:
                    yield episode, end
            if not playing:
                return
            for request, answer in sampler.answered():
                episode, steps = playing.pop(request)
                if isinstance(answer, Exception):
                    episode.fail(answer)
                    yield episode, answer
                elif (end := _advance(episode, steps, answer, playing, sampler)) is not None:
                    yield episode, end
    finally:
        for episode, _ in playing.values():  # whoever asked has stopped asking: others may take these runs up
            episode.log.close()


def _advance(
    episode: Episode, steps: Sampling, answer: Sampled | None, playing: dict[Request, tuple[Episode, Sampling]],
    sampler: Sampler,
) -> dict[str, Any] | Exception | None:  # fmt: skip
    """Go on to the next request, which is asked, or to the end, which is returned."""
    try:
        request = steps.send(answer)
    except StopIteration as end:
        return end.value
    except Exception as problem:
        episode.fail(problem)
        return problem
    playing[request] = episode, steps
    sampler.ask(request)
    return None
