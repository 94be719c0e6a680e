"""Training rows from whole episodes: a teacher plays synthetic matters through the very loop and renderer of a run.

    config = RunConfig(backend="memo", budget="512t", window=2048)
    rows = list(synthetic_rows(range(1000), "standard", tokenizer, config))

The teacher (`Oracle`) knows the rubric's parties and copies only what stands in view: in the window, in the bridge's
memo, or in what slots stand for. It teaches a base model the format and the behaviour; it is no policy
to measure anything with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..eval.matters.generate import Difficulty
from ..eval.matters.lab_format import write_lab_tasks
from ..eval.tasks import Criterion, LabTask, load_task
from .agent import Episode, drive
from .backends.oracle import AskedFacts
from .backends.text import Memo, TextBackend, Uncompacted
from .documents import Documents
from .policies.scripted import Player, ScriptedPolicy, ScriptedSession
from .run_config import RunConfig
from .runs import RunFolder, read_run
from .tools import NEXT, Workspace
from .types import MEMO, Artifact, Boundary, Limit, Message, Policy, ToolCall
from .windows import KINDS, SLOTS, streams

__all__ = ["KINDS", "Oracle", "Pretended", "Row", "oracle_events", "rows_of", "synthetic_rows"]

LINE = re.compile(r"^(?:\d+\. )?(.+?): (.+)$", re.MULTILINE)
"""A party's line in a memo or a draft."""
MISSING = "not found"
"""What a memo or a draft says of a party whose value is not in view."""
LINE_TOKENS = 12
"""Of a long line of the pocket's; a memo has as many lines as surely fit, which a small model can learn by heart."""


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        input_ids: what the model reads and writes.
        trained: which of them it learns to write: its own turns, their end token included.
        kinds: for each token the kind of its turn, as in `KINDS`; 0 where it is no turn.
        task: id of the task.
        window: number of the window; 0 where a row holds all of them.
        windows: of the episode.
        base: tokens of S and U.
        cuts: behind slots, the ends of the windows in `input_ids`: what lies between two cuts is compacted there.
        backend: whose shape the row has.
    """

    input_ids: list[int]
    trained: list[bool]
    kinds: list[int]
    task: str
    window: int
    windows: int
    base: int
    cuts: tuple[int, ...]
    backend: str

    @property
    def labels(self) -> list[int]:
        """Ids of trained tokens, -100 elsewhere."""
        return [i if t else -100 for i, t in zip(self.input_ids, self.trained, strict=True)]


def rows_of(events: Sequence[Mapping[str, Any]], untrained: Mapping[int, str] | None = None) -> list[Row]:
    """The training rows of a logged run: M memos make M + 1 rows; with slots, or without a boundary, there is one.

    Rejected memos are not there, and turns that the harness issued again are context.

    Args:
        events: of the run.
        untrained: other turns that are context, see `windows.streams`.
    """
    run, base = events[0], list(events[0]["base_ids"])
    slots = any(event["event"] == "compact" and event["artifact"]["kind"] in SLOTS for event in events)
    windows, rows, cuts = streams(events, untrained), [], []
    for number, window in enumerate(windows):
        if not (slots and number):
            rows.append(([*base], [False] * len(base), [0] * len(base)))
        pending = window.pending if slots else []
        rows[-1][0].extend(window.ids + pending)
        rows[-1][1].extend(window.trained + [False] * len(pending))
        rows[-1][2].extend(window.kinds + [0] * len(pending))
        if slots and number < len(windows) - 1:
            cuts.append(len(rows[-1][0]))
    shared = {"task": run["task"], "windows": len(windows), "base": len(base), "backend": run["backend"]}
    return [
        Row(ids, trained, kinds, window=number, cuts=tuple(cuts), **shared)
        for number, (ids, trained, kinds) in enumerate(rows)
    ]


class Pretended(TextBackend):
    """The shape of a boundary behind slots, without slots: for rows that train a base model before any compactor.

    Args:
        config: `backend` kv or hybrid; `ratio` says how many slots the window would have.
        policy: a scripted one.
    """

    def __init__(self, config: RunConfig, policy: ScriptedPolicy):
        super().__init__(config, policy)
        self.writes_memo = config.backend == "hybrid"
        self.ratio, self.method = config.ratio or 8.0, config.method
        self.tokens = max(1, int(self.tokens * config.memo_share))

    def compact(self, session: ScriptedSession, base, memo: str, boundary: Boundary) -> Artifact:
        """Go on as behind slots."""
        held = boundary.held.details["held"] if boundary.held else 0
        tokens = session.size().raw
        count = max(1, int(tokens / self.ratio))
        session.pretend(held + count)
        text = session.cut(memo, self.tokens)
        details = {"slots": count, "held": held + count, "method": self.method, "mode": "append", "exhausted": False}
        return Artifact(self.name, text, tokens=held + count + (session.count(text) if text else 0), details=details)

    def restore(self, session: ScriptedSession, base, artifact: Artifact, folder: Path) -> None:
        """The same again."""
        session.pretend(artifact.details["held"])


class Oracle:
    """Reads all, keeps a memo of asked facts within its budget, and hands in one line for each.

    Args:
        task: with its rubric; only criteria with an `expect` block are answered.
        memo_tokens: of the memo.
        count: tokens of a text.
    """

    def __init__(self, task: LabTask, memo_tokens: int, count: Callable[[str], int]):
        self.memo_tokens, self.count = memo_tokens, count
        self.facts = AskedFacts(task)
        self.asked = self.facts.asked
        self.files = _deliverables(task)

    def __call__(self, seen: list[Message], limit: Limit) -> Message:
        """One turn."""
        known, read, written = self._look(seen)
        last = seen[-1].content
        if last.startswith("Write the memo now"):
            return Message("assistant", self._memo(known))
        if f"write {MEMO}" in last and seen[-1].role == "tool":
            return _call("write", path=MEMO, content=self._memo(known))
        if any(path not in read for path in _listed(seen)):
            return _call("read", path=NEXT)
        for name in self.files:
            if f"output/{name}" not in written:
                return _call("write", path=f"output/{name}", content=self._draft(name, known))
        return Message("assistant", "Done.")

    def _look(self, seen: list[Message]) -> tuple[dict[str, str], dict[str, int], set[str]]:
        """What stands in view: known values by party, what was read, what was written."""
        known: dict[str, str] = {}
        read: dict[str, int] = {}
        written: set[str] = set()
        for message in seen[2:]:
            if message.role == "user" and message.content.startswith("[BRIDGE"):
                memo, _, rest = message.content.partition("\n## Files already read")
                known |= dict(LINE.findall(memo.partition("## Memo\n")[2]))
                listed, _, files = rest.partition("\n## Working files\n")
                for path, note in re.findall(r"^(documents/.+?) \((.*)\)$", listed, re.MULTILINE):
                    _note(read, path, re.search(r"offset (\d+)", note))
                written |= set(re.findall(r"^(output/.+?) \(\d+ bytes\)$", files, re.MULTILINE))
            if message.role == "tool" and message.call is not None and not message.content.startswith("Error"):
                path = (message.call.parsed() or {}).get("path", "")
                if path == NEXT:
                    path = next(name for name in _listed(seen) if name not in read)
                if message.call.name == "read":
                    _note(read, path, re.search(r"go on with offset (\d+)\]", message.content))
                    self.facts.learn(message.content, known)
                elif message.call.name == "write":
                    written.add(path)
        return known, read, written

    def _memo(self, known: dict[str, str]) -> str:
        """A list of what is asked, as far as the budget goes, open questions included; to leave lines out is harder."""
        parties = self._order(known)[: max(1, self.memo_tokens // LINE_TOKENS)]
        lines = [self.facts.line(party, known.get(party, MISSING)) for party in parties]
        while len(lines) > 1 and self.count("\n".join(lines)) >= self.memo_tokens:
            lines.pop()
        return "\n".join(lines) or "Nothing yet."

    def _draft(self, name: str, known: dict[str, str]) -> str:
        lines = [
            self.facts.line(party, known.get(party, MISSING))
            for party in self._order(known)
            if party in self.asked and _place(self.asked[party], self.files) == name
        ]
        return "\n".join(lines) or "Nothing found."

    def _order(self, known: dict[str, str]) -> list[str]:
        """Parties as the assignment numbers them, else as the documents did: more would give the rubric away."""
        return list(self.asked if self.facts.numbered else known)


def synthetic_rows(
    seeds: Iterable[int],
    difficulty: Difficulty | str,
    tokenizer,
    config: RunConfig,
    split: str = "train",
    family: str = "practice",
    unseen_templates: bool = False,
) -> Iterator[Row]:
    """Rows of the teacher's episodes over synthetic matters, one matter at a time.

    Args:
        seeds: of the matters.
        difficulty: as `still.eval.matters` takes it.
        tokenizer: with a chat template that has tool calls.
        config: `backend` full, memo, kv or hybrid; `window` must be given, and budgets in tokens (`512t`).
        split: whose names and values.
        family: of LAB.
        unseen_templates: use only the sentences that training never shows.
    """
    for seed in seeds:
        with TemporaryDirectory(prefix="still-episode-") as folder:
            root = Path(folder)
            (place,) = write_lab_tasks(root / "lab", family, [seed], difficulty, split, unseen_templates)
            yield from rows_of(oracle_events(load_task(place), tokenizer, replace(config, seed=seed), root / "run"))


def oracle_events(task: LabTask, tokenizer, config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Play a task with the teacher; the run's events.

    Raises:
        ValueError: the config has no window, or a backend whose rows have no shape of their own.
    """
    return script_events(task, tokenizer, config, folder, lambda *limits: Oracle(task, *limits))


def script_events(
    task: LabTask, tokenizer, config: RunConfig, folder: Path, player_of: Callable[[int, Callable[[str], int]], Player],
    seen_as: Callable[[ScriptedPolicy], Policy] = lambda script: script,
) -> list[dict[str, Any]]:  # fmt: skip
    """Play a task with any script; the run's events.

    Args:
        task: with its rubric.
        tokenizer: with a chat template that has tool calls.
        config: with a window; `backend` full, memo, kv or hybrid.
        folder: of the run.
        player_of: makes the player, of the tokens of a memo and what counts a text's.
        seen_as: the policy that the loop plays with, of the script's.

    Raises:
        ValueError: the config has no window, or a backend whose rows have no shape of their own.
    """
    if config.window is None or config.backend not in ("full", "memo", "kv", "hybrid"):
        raise ValueError(f"window is {config.window}, backend {config.backend}: a number; full, memo, kv or hybrid")
    script = ScriptedPolicy(tokenizer, lambda: lambda seen, limit: player(seen, limit), config.window, name="oracle")
    policy = seen_as(script)
    kinds = {"full": Uncompacted, "memo": Memo, "kv": Pretended, "hybrid": Pretended}
    backend = kinds[config.backend](config, policy)
    run = RunFolder(folder)
    documents = Documents.load(task.agent_view(), cache=folder / "converted", workers=1)
    episode = Episode(Workspace(run.workspace, documents), policy, backend, config, run)
    player = player_of(backend.memo_tokens, episode.session.count)
    drive(episode)
    return read_run(folder)


def _deliverables(task: LabTask) -> list[str]:
    named = list((task.deliverables or {}).values()) or re.findall(r"[\w-]+\.(?:md|txt|docx)", task.instructions)
    return named or ["answer.md"]


def _place(criterion: Criterion, files: list[str]) -> str:
    """The file that a criterion is answered in: the one that it is bound to; sums before people where both will do."""
    bound = [name for name in files if name in criterion.deliverables] or files
    first = criterion.expect.get("kind") in ("sum", "reference")
    return sorted(bound, key=lambda name: name.startswith("memo") == first)[0]


def _listed(seen: Sequence[Message]) -> list[str]:
    """The documents that U lists."""
    return re.findall(r"^documents/.+$", seen[1].content, re.MULTILINE)


def _note(read: dict[str, int], path: str, part: re.Match[str] | None) -> None:
    if part is None:
        read[path] = 0
    else:
        read[f"{path} part"] = int(part[1])


def _call(name: str, **arguments: Any) -> Message:
    return Message("assistant", "", (ToolCall(name, json.dumps(arguments, ensure_ascii=False)),))
