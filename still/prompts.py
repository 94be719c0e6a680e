"""How documents, questions and answers become token ids, so that a cache read once answers many questions.

A conversation is rendered once and cut between the documents and the question. The cut always falls between two
tokens: the same context ids, followed by a question's ids, are exactly what tokenising the whole conversation
gives. `render` proves that on the text at hand before it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("What?", "7 of", "(a)", "émis")
"""Questions that begin with a letter, a digit, a mark and a byte sequence: the cut has to hold for each."""

_SENTINEL = "QuestionStandsHere"


@dataclass(frozen=True)
class PromptFormat:
    """How a model wants to be shown documents and asked.

    A tokenizer may carry one in its configuration, as a dict under the key `prompt_format`.

    Attributes:
        style: `plain`, text for base models; `chat`, everything in one user message; `turns`, each document
            as a tool's result in a turn of its own.
        instruction: said before the documents; empty for none.
    """

    style: Literal["plain", "chat", "turns"] = "chat"
    instruction: str = ""

    def __post_init__(self) -> None:
        if self.style not in ("plain", "chat", "turns"):
            raise ValueError(f"prompt style is {self.style!r}; it must be plain, chat or turns")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """The tokenizer's own format, else `chat` if it has a chat template, else `plain`."""
        own = tokenizer.init_kwargs.get("prompt_format")
        if own:
            return cls(**own)
        if tokenizer.chat_template:
            return cls("chat", "Answer the question at the end from these documents.")
        return cls("plain")

    def to_dict(self) -> dict[str, str]:
        """The fields, as a file or a tokenizer's configuration holds them."""
        return asdict(self)


def render(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Any],
    questions: Iterable[str] = (),
    prompt_format: PromptFormat | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the documents, and of each question after them.

    What it guarantees:

    - the context ids depend on the documents alone, so that one cache serves every question;
    - `context_ids + question_ids` equals the ids of the whole conversation rendered at once, up to where the
      model's answer begins;
    - special tokens that stand inside a document or a question are broken up, and nothing else is changed.

    Args:
        tokenizer: the model's own.
        documents: in reading order; each a text, a `(name, text)` pair, or anything with `name` and `text`.
        questions: as a person asks them.
        prompt_format: default `PromptFormat.of(tokenizer)`.

    Returns:
        `(context_ids, [question_ids, ...])`.

    Raises:
        ValueError: there is no document, a document or a question is empty, or the tokenizer joins the end of
            the documents and the start of a question in one token.
    """
    form = prompt_format or PromptFormat.of(tokenizer)
    named = [_document(tokenizer, document, i) for i, document in enumerate(documents)]
    if not named:
        raise ValueError("there are no documents; give at least one")
    context_ids = _encode(tokenizer, form, _context_text(tokenizer, form, named))
    for probe in PROBES:
        whole = _encode(tokenizer, form, _conversation(tokenizer, form, named, probe))
        after = _after_stand_in(tokenizer, form, probe)
        if after is None or whole != context_ids + after:
            raise ValueError(
                f"this tokenizer has no token boundary between the documents and a question such as {probe!r} in the "
                f"{form.style!r} format; give another PromptFormat"
            )
    return context_ids, [_question_ids(tokenizer, form, question) for question in questions]


def render_alone(
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[str],
    prompt_format: PromptFormat | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of questions that are asked without any document: the floor of an evaluation.

    The conversation is rendered with no document in it; what all of its questions share in front (the instruction,
    or at least the token that opens the turn) is the context.

    Returns:
        `(context_ids, [question_ids, ...])`, neither ever empty.
    """
    form = prompt_format or PromptFormat.of(tokenizer)
    questions = [escape(tokenizer, question).strip() for question in questions]
    whole = [_encode(tokenizer, form, _conversation(tokenizer, form, [], text)) for text in (*PROBES, *questions)]
    shared = 0
    while len({tuple(ids[: shared + 1]) for ids in whole}) == 1:
        shared += 1
    shared = max(shared, 1)
    return whole[0][:shared], [ids[shared:] for ids in whole[len(PROBES) :]]


def render_question(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    context_ids: Sequence[int],
    prompt_format: PromptFormat | None = None,
) -> list[int]:
    """Token ids of a question after a context that only its ids are known of, those that a cache holds.

    Raises:
        ValueError: the question is empty, or the context was not rendered in this format.
    """
    form = prompt_format or PromptFormat.of(tokenizer)
    ending = _context_ending(tokenizer, form)
    shown = tokenizer.decode(list(context_ids)[-len(ending) - 8 :], skip_special_tokens=False)
    if not shown.endswith(ending):
        raise ValueError(
            f"the cache's context ends in {shown[-20:]!r}, but this tokenizer and the {form.style!r} format end it in "
            f"{ending[-20:]!r}: it was read with another tokenizer or format; compact the documents again"
        )
    return _question_ids(tokenizer, form, question)


def render_answer(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str,
    prompt_format: PromptFormat | None = None,
) -> list[int]:
    """Token ids of an answer as the model would write it after `question`, its end token included if it has one.

    Raises:
        ValueError: the question or the answer is empty.
    """
    form = prompt_format or PromptFormat.of(tokenizer)
    if not answer.strip():
        raise ValueError(f"the answer to {question!r} is empty")
    asked = _conversation(tokenizer, form, _STAND_IN, question)
    answered = _conversation(tokenizer, form, _STAND_IN, question, answer)
    before, whole = (_encode(tokenizer, form, text) for text in (asked, answered))
    if whole[: len(before)] == before:
        ids = whole[len(before) :]
    else:  # the template words an earlier answer and one still to come differently
        ids = [*tokenizer(answer.strip(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[: ends[-1] + 1] if ends else ids


_STAND_IN = [("a.txt", "A.")]


def _question_ids(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, question: str) -> list[int]:
    question = escape(tokenizer, question).strip()
    if not question:
        raise ValueError("the question is empty")
    ids = _after_stand_in(tokenizer, form, question)
    if ids is None:
        raise ValueError(
            f"the question {question[:40]!r} joins the end of the context in one token; begin it with a letter"
        )
    return ids


def _after_stand_in(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, question: str) -> list[int] | None:
    """Ids after a short document that stands in for the real ones; None where the cut falls inside a token."""
    before = _encode(tokenizer, form, _context_text(tokenizer, form, _STAND_IN))
    whole = _encode(tokenizer, form, _conversation(tokenizer, form, _STAND_IN, question))
    return whole[len(before) :] if whole[: len(before)] == before else None


def _context_text(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, documents: list[tuple[str, str]]) -> str:
    if form.style == "turns":
        return _template(tokenizer, _turns(form, documents), generate=False)
    whole = _conversation(tokenizer, form, documents, _SENTINEL)
    return whole[: whole.rindex(_SENTINEL) - len(_QUESTION_MARK if form.style == "plain" else "")]


_QUESTION_MARK = "Question: "


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    form: PromptFormat,
    documents: list[tuple[str, str]],
    question: str,
    answer: str | None = None,
) -> str:
    """The whole conversation as text, up to where the answer begins, or with the answer."""
    if form.style == "plain":
        parts = [form.instruction, *(f"{name}\n{text}" if name else text for name, text in documents)]
        body = "\n\n".join(part for part in parts if part)
        return f"{body}\n\n{_QUESTION_MARK}{question}\nAnswer:" + (f" {answer.strip()}\n" if answer else "")
    if form.style == "turns":
        messages = [*_turns(form, documents), {"role": "user", "content": question}]
    else:
        blocks = [_block(name, text) for name, text in documents]
        messages = [{"role": "user", "content": "\n\n".join(filter(None, [form.instruction, *blocks, question]))}]
    if answer:
        messages.append({"role": "assistant", "content": answer.strip()})
    text = _template(tokenizer, messages, generate=not answer)
    if form.style == "turns" and not text.startswith(_context_text(tokenizer, form, documents)):
        raise ValueError("this chat template rewrites earlier turns when a question follows; use PromptFormat('chat')")
    return text


def _block(name: str, text: str) -> str:
    title = ' name="' + name.replace('"', "'") + '"' if name else ""
    return f"<document{title}>\n{text}\n</document>"


def _turns(form: PromptFormat, documents: list[tuple[str, str]]) -> list[dict[str, str]]:
    first = [{"role": "user", "content": form.instruction}] if form.instruction else []
    return [*first, *({"role": "tool", "content": f"{name}: {text}" if name else text} for name, text in documents)]


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generate: bool) -> str:
    # Reasoning models are asked for the answer at once; other templates ignore the variable.
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
    )


def _encode(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if form.style == "plain" and tokenizer.bos_token_id is not None:
        start = tokenizer("a")["input_ids"][:1]
        return [*start, *ids] if start == [tokenizer.bos_token_id] else ids
    return ids


def _context_ending(tokenizer: PreTrainedTokenizerBase, form: PromptFormat) -> str:
    """What every context ends in, whatever the last document says."""
    one, other = (_context_text(tokenizer, form, [("a.txt", text)]) for text in ("A.", "b"))
    size = 0
    while size < min(len(one), len(other)) and one[-size - 1] == other[-size - 1]:
        size += 1
    return one[len(one) - size :]


def escape(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Break up special tokens in text that is somebody else's: `<|end|>` becomes `<¦end¦>`, `<s>` becomes `< s>`."""
    for token in map(str, tokenizer.all_special_tokens):
        if token in text:
            broken = token.replace("|", "\u00a6")
            text = text.replace(token, broken if broken != token else f"{token[0]} {token[1:]}")
    return text


def _document(tokenizer: PreTrainedTokenizerBase, document: Any, index: int) -> tuple[str, str]:
    """Name and escaped text of one document."""
    if isinstance(document, str):
        name, text = "", document
    elif isinstance(document, Mapping):
        name, text = document.get("name", ""), document["text"]
    elif isinstance(document, tuple):
        name, text = document
    else:
        name, text = document.name, document.text
    if not text.strip():
        raise ValueError(f"document {name or index + 1} is empty; there is nothing to read")
    return escape(tokenizer, name), escape(tokenizer, text)
