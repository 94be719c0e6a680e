"""What a model is asked in order to get questions about a context, and what is taken from its reply."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from .dedup import holds, normalise
from .documents import Context

KINDS = ("fact", "string", "edit")
LONGEST = 400  # characters in a question or an answer

PROMPT = """\
Below is a text. Write {total} questions that somebody who has read it can answer, and that nobody else can.

- {facts} of kind "fact": something the text says, asked without the text's own wording. Answer in a few words.
- {strings} of kind "string": an exact string of the text, such as a sum, a date, a name, a number or a short
  quotation. The answer is copied from the text character by character.
- {edits} of kind "edit": choose a sentence and change one thing in it, so that the answer to your question changes.
  "sentence" is the sentence copied exactly, "edited" is the changed one, "answer" is right after the change.

Each question stands alone: name what it is about, and never say "the text" or "the passage".
Reply with a JSON array and nothing else:
[{{"kind": "fact", "question": "...", "answer": "..."}},
 {{"kind": "string", "question": "...", "answer": "..."}},
 {{"kind": "edit", "sentence": "...", "edited": "...", "question": "...", "answer": "..."}}]

<text>
{text}
</text>
"""


@dataclass(frozen=True)
class Asked:
    """A question that passed every check.

    Attributes:
        reference: the answer of the model that wrote the question.
    """

    kind: str
    question: str
    reference: str


def prompt(context: Context, questions: int) -> str:
    """What a model is asked: a quarter of the questions are edits, a quarter exact strings, the rest facts."""
    edits = strings = questions // 4
    facts = questions - edits - strings
    return PROMPT.format(total=questions, facts=facts, strings=strings, edits=edits, text=context.text)


def parse(
    reply: str, context: Context, limit: int, dropped: Counter, tokens: Callable[[Context], int]
) -> tuple[Context, list[Asked]]:
    """The context with its edits made, and the questions that hold for it.

    Everything that is not taken is counted in `dropped` by its reason.

    Args:
        reply: text that should be a JSON array; code fences, talk around it and a cut end are forgiven.
        context: what the reply is about.
        limit: most questions that are taken.
        dropped: counts, changed in place.
        tokens: length of a context; edits that make it longer than it may be are left out.
    """
    found = _objects(reply)
    if not found:
        dropped["reply_without_json"] += 1
    taken: list[Asked] = []
    edits: dict[tuple[int, int, int], tuple[str, Asked]] = {}
    known: set[str] = set()
    for item in found:
        reason = _flaw(item, context, known, edits)
        if reason:
            dropped[reason] += 1
            continue
        known.add(normalise(item["question"]))
        asked = Asked(item["kind"], item["question"].strip(), item["answer"].strip())
        if item["kind"] == "edit":
            edits[_find(context, item["sentence"])] = (item["edited"].strip(), asked)
        taken.append(asked)
    edited = _apply(context, edits)
    while edits and tokens(edited) > context.length:
        place = max(edits, key=lambda place: len(edits[place][0]) - (place[2] - place[1]))
        taken.remove(edits.pop(place)[1])
        dropped["edit_too_long"] += 1
        edited = _apply(context, edits)
    whole = [asked for asked in taken if asked.kind != "string" or asked.reference in edited.text]
    dropped["string_edited_away"] += len(taken) - len(whole)
    dropped["over_the_limit"] += max(0, len(whole) - limit)
    return edited, whole[:limit] if len(whole) <= limit else _balanced(whole, limit)


def _flaw(item: object, context: Context, known: set[str], edits: dict) -> str:
    """Why an object of the reply cannot be used; an empty string if it can."""
    if not isinstance(item, dict):
        return "not_an_object"
    if item.get("kind") not in KINDS:
        return "unknown_kind"
    for name in ("question", "answer") + (("sentence", "edited") if item["kind"] == "edit" else ()):
        if not isinstance(item.get(name), str) or not item[name].strip():
            return f"no_{name}"
        if name in ("question", "answer") and len(item[name]) > LONGEST:
            return f"long_{name}"
    if normalise(item["question"]) in known:
        return "duplicate_question"
    if not normalise(item["answer"]):
        return "no_answer"
    if item["kind"] == "string" and item["answer"].strip() not in context.text:
        return "string_not_in_text"
    if item["kind"] == "edit":
        place = _find(context, item["sentence"])
        if place is None:
            return "sentence_not_in_text_once"
        if any(place[0] == part and place[1] < end and start < place[2] for part, start, end in edits):
            return "sentence_edited_twice"
        if normalise(item["sentence"]) == normalise(item["edited"]):
            return "edit_changes_nothing"
        if holds(item["sentence"], item["answer"]):
            return "edit_keeps_the_answer"
    return ""


def _find(context: Context, sentence: str) -> tuple[int, int, int] | None:
    """Part, start and end of a sentence that stands exactly once in a context, however its white space runs."""
    pattern = re.compile(r"\s+".join(map(re.escape, sentence.split())))
    found = [
        (part, match.start(), match.end())
        for part, (_, text) in enumerate(context.parts)
        for match in pattern.finditer(text)
    ]
    return found[0] if len(found) == 1 else None


def _apply(context: Context, edits: dict[tuple[int, int, int], tuple[str, Asked]]) -> Context:
    parts = [list(part) for part in context.parts]
    for (part, start, end), (edited, _) in sorted(edits.items(), reverse=True):
        parts[part][1] = parts[part][1][:start] + edited + parts[part][1][end:]
    return replace(context, parts=tuple((name, text) for name, text in parts))


def _balanced(asked: list[Asked], limit: int) -> list[Asked]:
    """The first `limit` questions, taken from the kinds in turn, so that none is crowded out."""
    queues = {kind: [one for one in asked if one.kind == kind] for kind in ("edit", "string", "fact")}
    chosen = []
    while len(chosen) < limit:
        for queue in queues.values():
            if queue and len(chosen) < limit:
                chosen.append(queue.pop(0))
    return chosen


def _objects(reply: str) -> list:
    """JSON objects in a reply: its array, or else every object that can be read, so that a cut reply gives some."""
    start, end = reply.find("["), reply.rfind("]")
    if 0 <= start < end:
        try:
            found = json.loads(reply[start : end + 1])
            return found if isinstance(found, list) else []
        except json.JSONDecodeError:
            pass
    decoder, objects, place = json.JSONDecoder(), [], reply.find("{")
    while place >= 0:
        try:
            item, end = decoder.raw_decode(reply, place)
            objects.append(item)
        except json.JSONDecodeError:
            end = place + 1
        place = reply.find("{", end)
    return objects
