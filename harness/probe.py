"""What is left behind each boundary: for every criterion, whether the text says it and whether the model knows it.

What is found goes into a private file of the run, since it names criteria; nothing of it is ever shown to the agent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..calling import passing
from ..eval.judge import exact_criterion, exact_judge
from ..eval.questions import Question
from ..eval.tasks import Criterion, LabTask
from .agent import Episode
from .runs import RunError
from .types import Message

FILE = "private.jsonl"
LONGEST = 32
"""Tokens of an answer."""


class Probe:
    """Looks at each boundary of one run; see `Episode.watch`.

    Args:
        task: with its rubric, of which criteria with a value to state are looked for.
        root: the run's folder.
        ask: put each criterion's question to a local model too.
        name: of the file; `private.jsonl` unless the run has other private lines.
        gain: and log how much likelier what crossed made each right answer, nats a token.
    """

    def __init__(self, task: LabTask, root: Path, ask: bool, name: str = FILE, gain: bool = False):
        self.criteria = [c for c in task.criteria if c.expect and not c.expect.get("absent")]
        self.path, self.ask, self.gain = root / name, ask, gain
        self.known = {record["window"]: record for record in read_private(root, name)}
        self._without: list[float] | None = None

    def __call__(self, episode: Episode) -> None:
        """Look at what crossed the boundary that the episode just crossed; once."""
        window = episode.state.window
        if window in self.known:
            return
        held = episode.state.held
        text = held.text if held else ""
        said = [c.id for c in self.criteria if text and exact_criterion(text, c).passed]
        asks = self.ask and hasattr(episode.session, "peek") and episode.session.policy.capabilities >= {"kv"}
        record = {"window": window, "written": said, "answered": None}
        if asks and self.criteria:
            record |= self._asked(episode.session)
        elif asks:
            record["answered"] = []
        self.known[window] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _asked(self, session: Any) -> dict[str, Any]:
        import torch

        chat, model = session.chat, session.policy.model
        cache, waiting = session.peek()
        with torch.no_grad():
            ids = torch.tensor([waiting], device=model.device)
            model(input_ids=ids, **passing(model, cache), use_cache=True, logits_to_keep=1)
        found, lengths = self._put(session, cache)
        pairs = zip(self.criteria, found.outputs, strict=True)
        right = [c.id for c, output in pairs if exact_judge(chat.decode(output).strip(), _question(c)).passed]
        if not self.gain:
            return {"answered": right}
        if self._without is None:
            self._without = self._put(session, session.exact_base())[0].cross_entropy
        each = zip(self.criteria, self._without, found.cross_entropy, lengths, strict=True)
        return {"answered": right, "gain": {c.id: (before - now) / length for c, before, now, length in each}}

    def _put(self, session: Any, cache: Any) -> tuple[Any, list[int]]:
        """Every criterion's question put to a cache, and the tokens of each right answer."""
        from .ask import Prompt, ask

        chat, questions, answers = session.chat, [], []
        for criterion in self.criteria:
            asked = Message("user", criterion.expect["question"])
            questions.append([*chat.follow([asked], "user"), *chat.opening])
            value = f"{criterion.expect['party']}: {criterion.expect['value']}"
            answers.append(chat.assistant(Message("assistant", value)))
        prompt = Prompt(questions, answers, (chat.closing[0],))
        return ask(session.policy.model, cache, prompt, max_new_tokens=LONGEST), list(map(len, answers))


def _question(criterion: Criterion) -> Question:
    expect = criterion.expect
    wrong = tuple(expect.get("superseded", ()))
    return Question(criterion.id, expect["question"], expect["value"], wrong, {"kind": expect.get("kind", "")})


def read_private(root: str | Path, name: str = FILE) -> list[dict[str, Any]]:
    """The lines of a run's private file; a torn last one is left out.

    Raises:
        RunError: another line is damaged.
    """
    path = Path(root) / name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise RunError(f"line {number + 1} of {path} is damaged; remove the file") from None
            path.write_text("".join(lines[:-1]), encoding="utf-8")
    return found


def ledger(records: Sequence[dict[str, Any]], kind: str) -> list[tuple[list[str], list[str]]] | None:
    """Criteria acquired and lost at each boundary.

    Args:
        records: of `read_private`, in order.
        kind: "written" or "answered".

    Returns:
        For each boundary the ids that are there and were not, and those that were and are not; None where it was not
        looked for.
    """
    if any(record[kind] is None for record in records):
        return None
    before: set[str] = set()
    moves = []
    for record in records:
        now = set(record[kind])
        moves.append((sorted(now - before), sorted(before - now)))
        before = now
    return moves
