"""A synthetic matter as the questions that can be asked of it."""

from __future__ import annotations

from dataclasses import asdict

from ..questions import Document, Question, QuestionSet, depth_of
from .generate import Matter


def question_set(matter: Matter) -> QuestionSet:
    """The matter's documents as a context, and one question for each of its facts.

    Tags of a question: `attribute`; `kind` (sum, date, person or reference); `amended`: a later document superseded
    an earlier value, which is then in `wrong`; `unseen_template`; `depth`: where the right statement starts in the
    context, 0 to 1 by characters.
    """
    documents = tuple(Document(doc.name, doc.text) for doc in matter.documents)
    questions = []
    for fact in matter.facts:
        tags = {
            "attribute": fact.attribute,
            "kind": fact.kind,
            "amended": bool(fact.superseded),
            "unseen_template": fact.unseen_template,
            "depth": round(depth_of(documents, fact.document, fact.statement), 6),
        }
        wrong = tuple(value for value in fact.superseded if value != fact.value)
        questions.append(Question(fact.id, fact.question, fact.value, wrong, tags))
    unseen = any(fact.unseen_template for fact in matter.facts)
    name = f"matter-{matter.difficulty.name}-{matter.split}{'-unseen' if unseen else ''}-{matter.seed}"
    source = {
        "generator": "matters",
        "seed": matter.seed,
        "split": matter.split,
        "unseen_templates": unseen,
        "difficulty": asdict(matter.difficulty),
        "digest": matter.difficulty.digest,
    }
    return QuestionSet(name, documents, tuple(questions), source)
