"""Matters as the pocket reads them: documents as tool results, then questions and answers."""

from __future__ import annotations

from ...eval.matters import Fact, Matter
from .tokenizer import INSTRUCTION, escape


def context_messages(matter: Matter) -> list[dict]:
    """The matter's documents as a chat: the instruction, then each document as a tool's result."""
    documents = [{"role": "tool", "content": f"{doc.name}: {escape(doc.text)}"} for doc in matter.documents]
    return [{"role": "user", "content": INSTRUCTION}, *documents]


def question_messages(fact: Fact, answer: bool = False) -> list[dict]:
    """A question, with its answer when `answer` is set."""
    messages = [{"role": "user", "content": fact.question}]
    return [*messages, {"role": "assistant", "content": answer_text(fact)}] if answer else messages


def answer_text(fact: Fact) -> str:
    """How the pocket answers: the party, then the value."""
    return f"{fact.party}: {fact.value}"
