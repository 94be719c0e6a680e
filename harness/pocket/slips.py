"""Rows that teach the pocket to take a private note: a draft with wrong lines, a stop, the note, the draft again.

The oracle that teaches the game never goes wrong, so a model that learnt from it alone cannot act on a private submit
(`trainers.teacher`). Here it slips in some lines of its first draft and is told so as a teacher is. The rows are what
the teacher itself saw, note included; wrong drafts and stops are context, what follows the note is learnt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...eval.tasks import LabTask
from ..episodes import LINE, MISSING, Oracle, Row, rows_of, script_events
from ..policies.chat import ChatFormat
from ..policies.scripted import ScriptedPolicy
from ..run_config import RunConfig
from ..trainers.teacher import PrivateChannel, TeacherPolicy
from ..types import Limit, Message, ToolCall
from ..windows import flawed_turns

MOST = 0.5
"""Share of a draft's lines that are wrong, at most: were they few, a model would copy its draft instead of looking."""


class Slipping(Oracle):
    """An oracle whose first draft has wrong lines.

    Args:
        task: with its rubric.
        memo_tokens: of the memo.
        count: tokens of a text.
        rng: draws the slips.
    """

    def __init__(self, task: LabTask, memo_tokens: int, count: Any, rng: random.Random):
        super().__init__(task, memo_tokens, count)
        self.rng, self.slipped = rng, False

    def __call__(self, seen: list[Message], limit: Limit) -> Message:
        """One turn."""
        told = [place for place, message in enumerate(seen) if message.role == "user" and place > 1
                and message.content.startswith("[PRIVATE-")]  # fmt: skip
        if told:
            known, _, _ = self._look(seen)
            again = {path for message in seen[told[-1] :] for path in _written(message)}
            for name in self.files:
                if f"output/{name}" not in again:
                    return _write(name, self._draft(name, known))
            return Message("assistant", "Done.")
        said = super().__call__(seen, limit)
        drafts = [path for path in _written(said) if path.startswith("output/")]
        if not drafts:
            return said
        wrong = self.slip(json.loads(said.calls[0].arguments)["content"])
        return _write(drafts[0].removeprefix("output/"), wrong)

    def slip(self, draft: str) -> str:
        """The draft with some values gone, superseded, or taken from other lines."""
        lines = draft.split("\n")
        found = [match for match in map(LINE.match, lines) if match]
        count = self.rng.randint(1, max(1, round(MOST * len(found))))
        for match in self.rng.sample(found, min(count, len(found))):
            before = self.asked[match[1]].expect.get("superseded", ()) if match[1] in self.asked else ()
            others = {MISSING, *before, *(other[2] for other in found)} - {match[2]}
            lines[lines.index(match[0])] = match[0][: match.start(2)] + self.rng.choice(sorted(others))
            self.slipped = True
        return "\n".join(lines)


def slip_rows(task: LabTask, tokenizer, config: RunConfig, folder: Path, rng: random.Random) -> list[Row]:
    """The rows of one episode, as its teacher saw it.

    Args:
        task: with its rubric.
        tokenizer: with a chat template that has tool calls.
        config: as `episodes.oracle_events` takes it.
        folder: of the run.
        rng: draws the slips.
    """
    player: list[Slipping] = []
    channel = PrivateChannel(folder, task, f"slip {rng.random()}")

    def player_of(memo_tokens: int, count: Any) -> Slipping:
        player.append(Slipping(task, memo_tokens, count, rng))
        return player[0]

    def told_once(script: ScriptedPolicy) -> TeacherPolicy:
        slipped = {"falls_short": lambda: player[0].slipped, "rounds": 1}
        return TeacherPolicy(script, tokenizer, channel, config.window, rubric=False, **slipped)

    events = script_events(task, tokenizer, config, folder, player_of, told_once)
    untrained = flawed_turns(events, channel.corrected_at)
    inner = list(as_the_teacher_saw(events, channel, ChatFormat(tokenizer, events[0]["tools"])))
    return rows_of(inner, untrained | {event["turn"]: "failed stop" for event in inner if event.get("turn", 0) < 0})


def as_the_teacher_saw(
    events: Sequence[Mapping[str, Any]], channel: PrivateChannel, chat: ChatFormat
) -> Iterator[Mapping[str, Any]]:
    """A public log with what was private put back: failed stops, as turns of negative numbers, and notes."""
    for event in events:
        submits = channel.of("submit", event["turn"]) if event["event"] == "turn" else []
        append = event.get("append_ids")
        for number, line in enumerate(submits, 1):
            yield {**event, "turn": -number, "append_ids": append, "output_ids": list(line["failed"]["output_ids"]),
                   "logprobs": []}  # fmt: skip
            append = [*chat.follow([Message("user", line["text"])], "assistant"), *chat.opening]
        yield {**event, "append_ids": append} if submits else event


def _written(message: Message) -> list[str]:
    calls = (message.call,) if message.role == "tool" and message.call else message.calls
    return [(call.parsed() or {}).get("path", "") for call in calls if call.name == "write"]


def _write(name: str, content: str) -> Message:
    call = ToolCall("write", json.dumps({"path": f"output/{name}", "content": content}, ensure_ascii=False))
    return Message("assistant", "", (call,))
