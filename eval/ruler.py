"""RULER's retrieval and variable-tracking tasks, generated locally at any length.

Written from the description in "RULER: What's the Real Context Size of Your Long-Context Language Models?" (Hsieh et
al. 2024, arXiv 2404.06654, section 3 and appendix B): eight needle-in-a-haystack tasks and multi-hop tracing. What
differs from the authors' data, so that numbers are compared with care:

- The essay haystack is text made here from a small grammar, since the paper's essays are not ours to ship; the keys
  come from a word list of our own. The noise haystack is the paper's.
- Lengths are counted over the context alone, with the counter that the caller hands in: question and answer come on
  top. No example and no opening of the answer is put before the model.

A sample is one context with one question. Where several values are asked for they stand in `Question.answers`, and
`recall` is the paper's score: the share of them that occur in the answer. `judge.exact_judge` is stricter: it passes
only an answer that gives every one and nothing else of the kind.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

from .essay import ADJECTIVES, NOUNS, essay_sentence
from .questions import Document, Question, QuestionSet, context_text, depth_of

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class RulerTask:
    """One configuration of the paper's table of tasks.

    Attributes:
        haystack: "noise" (the repeated sentences), "essay" (generated) or "needles" (needles that nobody asks about).
        key: what identifies a needle, "words" or "uuids".
        value: what it holds, "numbers" (seven digits) or "uuids".
        keys: needles with keys of their own, the asked ones included.
        values: values of the asked key.
        queries: keys asked about.
        hops: variable tracking: assignments after the first; 0 for needle tasks.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    hops: int = 0


TASKS = {
    "niah_single_1": RulerTask("noise"),
    "niah_single_2": RulerTask("essay"),
    "niah_single_3": RulerTask("essay", value="uuids"),
    "niah_multikey_1": RulerTask("essay", keys=4),
    "niah_multikey_2": RulerTask("needles"),
    "niah_multikey_3": RulerTask("needles", key="uuids", value="uuids"),
    "niah_multivalue": RulerTask("essay", values=4),
    "niah_multiquery": RulerTask("essay", keys=4, queries=4),
    "vt": RulerTask("noise", hops=4),
}
"""The nine tasks by the paper's names, at its sizes."""


def generate(task: str, tokens: int, seed: int, count_tokens: Callable[[str], int]) -> QuestionSet:
    """Make one sample whose context is as long as it can be without passing `tokens`.

    Args:
        task: a name in `TASKS`.
        tokens: most tokens of the context (`QuestionSet.text`), question and answer not counted.
        seed: the same task, tokens, seed and counter give the same sample; a longer one has the same needles.
        count_tokens: tokens of a text, for example `lambda text: len(tokenizer(text)["input_ids"])`.

    Returns:
        A set with one question, tagged task, kind, haystack, `depth` (of its first needle) and `depths` (of all).

    Raises:
        KeyError: there is no such task.
        ValueError: the needles alone are longer than `tokens`.
    """
    if task not in TASKS:
        raise KeyError(f"no RULER task is called {task!r}; there are {', '.join(TASKS)}")
    spec = TASKS[task]
    rng = random.Random(f"ruler:{task}:{seed}")
    haystack = _Haystack(spec, random.Random(f"ruler haystack:{task}:{seed}"))
    if spec.hops:
        needles, asked, text, answers = _chain(spec, rng)
    else:
        needles, asked, text, answers = _needles(spec, rng, haystack)
    places = [rng.random() for _ in needles]
    if spec.hops:
        places.sort()  # a variable is assigned before it is copied

    def document(size: int) -> Document:
        inserts: dict[int, list[str]] = {}
        for place, needle in zip(places, needles, strict=True):
            inserts.setdefault(round(place * size), []).append(needle)
        sentences = []
        for index in range(size + 1):
            sentences += inserts.get(index, [])
            sentences += [haystack[index]] if index < size else []
        return Document("context.txt", " ".join(sentences))

    def length(size: int) -> int:
        return count_tokens(context_text((document(size),)))

    if (least := length(0)) > tokens:
        raise ValueError(f"{task} has {least} tokens of needles alone, more than the {tokens} asked for; ask for more")
    low, high = 0, 16
    while length(high) <= tokens:
        low, high = high, 2 * high
        if low > tokens:
            raise ValueError(f"count_tokens finds {length(low)} tokens in {low} sentences; it must count tokens")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if length(middle) <= tokens else (low, middle)

    documents = (document(low),)
    depths = [round(depth_of(documents, 0, needle), 6) for needle in asked]
    kind = "variable" if spec.hops else spec.value.removesuffix("s")
    tags = {"task": task, "kind": kind, "haystack": spec.haystack, "depth": min(depths), "depths": depths}
    question = Question("Q-1", text, ", ".join(answers), (), tags, answers)
    source = {
        "generator": "ruler",
        "paper": "arXiv 2404.06654",
        "task": task,
        "config": asdict(spec),
        "haystack": {
            "noise": "the paper's noise sentences",
            "essay": "essay-like text generated from a grammar",
            "needles": "needles that are not asked about",
        }[spec.haystack],
        "seed": seed,
        "tokens": tokens,
        "counted_tokens": length(low),
    }
    return QuestionSet(f"ruler-{task}-{tokens}-{seed}", documents, (question,), source)


def recall(answer_text: str, question: Question) -> float:
    """RULER's own score of an answer: the share of expected values that occur in it, in upper or lower case.

    It does not mind what else an answer says, so bound the answer's length, as the paper does (128 new tokens for
    needles, 30 for variable tracking).
    """
    return sum(value.lower() in answer_text.lower() for value in question.answers) / len(question.answers)


def _needles(
    spec: RulerTask, rng: random.Random, haystack: _Haystack
) -> tuple[list[str], list[str], str, tuple[str, ...]]:
    """All needles, the asked ones, the question and its answers."""
    draw = _Draw(rng, haystack.taken)
    pairs = []
    for number in range(max(spec.keys, spec.queries)):
        key = draw(spec.key)
        pairs += [(key, draw(spec.value)) for _ in range(spec.values if number < spec.queries else 1)]
    count = spec.queries * spec.values
    needles = [_needle(spec, key, value) for key, value in pairs]
    names = list(dict.fromkeys(key for key, _ in pairs[:count]))
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    if count == 1:
        text = f"What is the special magic {spec.value[:-1]} for {listed} mentioned in the provided text?"
    else:
        text = f"What are all the special magic {spec.value} for {listed} mentioned in the provided text?"
    return needles, needles[:count], text, tuple(value for _, value in pairs[:count])


def _needle(spec: RulerTask, key: str, value: str) -> str:
    return f"One of the special magic {spec.value} for {key} is: {value}."


def _chain(spec: RulerTask, rng: random.Random) -> tuple[list[str], list[str], str, tuple[str, ...]]:
    """Assignments X1 = V, X2 = X1, ..., the question for every variable that ends with V, and those variables."""
    names: dict[str, None] = {}
    while len(names) < spec.hops + 1:
        names["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    chain, value = list(names), str(rng.randrange(10000, 100000))
    lines = [f"VAR {chain[0]} = {value}."]
    lines += [f"VAR {name} = VAR {before}." for before, name in pairwise(chain)]
    text = f"Find all variables that are assigned the value {value} in the text above."
    return lines, lines, text, tuple(chain)


class _Draw:
    """Keys and values of which none is drawn twice."""

    def __init__(self, rng: random.Random, taken: set[str]):
        self.rng, self.taken = rng, taken

    def __call__(self, kind: str) -> str:
        while True:
            if kind == "numbers":
                text = str(self.rng.randrange(1_000_000, 10_000_000))
            elif kind == "uuids":
                text = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
            else:
                text = f"{self.rng.choice(ADJECTIVES)}-{self.rng.choice(NOUNS)}"
                while text in self.taken:  # for haystacks of more needles than there are pairs of words
                    text = f"{self.rng.choice(ADJECTIVES)}-{text}"
            if text not in self.taken:
                self.taken.add(text)
                return text


class _Haystack:
    """Sentence i of the haystack, the same however long the context becomes."""

    def __init__(self, spec: RulerTask, rng: random.Random):
        self.spec, self.rng = spec, rng
        self.taken: set[str] = set()
        self.sentences: list[str] = []
        self.draw = _Draw(rng, self.taken)

    def __getitem__(self, index: int) -> str:
        if self.spec.haystack == "noise":
            return NOISE[index % len(NOISE)]
        while len(self.sentences) <= index:
            if self.spec.haystack == "needles":
                self.sentences.append(_needle(self.spec, self.draw(self.spec.key), self.draw(self.spec.value)))
            else:
                self.sentences.append(essay_sentence(self.rng))
        return self.sentences[index]
