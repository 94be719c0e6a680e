"""A context and its turns as token ids: the first question as `still.prompts` asks it, the others after an answer.

Training asks several questions of a context in one conversation. The context and the first question are exactly
what `still ask` and the evaluation feed; a later question is a further user message of the same conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..prompts import PromptFormat, escape, render, render_alone, render_answer

ASKED, ANSWERED, ASKED_AGAIN = "FirstQuestionHere", "FirstAnswerHere", "SecondQuestionHere"
"""Texts that stand in for real ones while the chat template is read."""


class Renderer:
    """Texts to token ids in the model's own conversation format.

    Args:
        tokenizer: any tokenizer of transformers, with or without a chat template.
        prompt_format: default `PromptFormat.of(tokenizer)`.

    Attributes:
        stop_ids: ids that end an answer when the model writes one.
        pad_id: id that fills shorter rows.
    """

    def __init__(self, tokenizer: Any, prompt_format: PromptFormat | None = None):
        self.tokenizer = tokenizer
        self.form = prompt_format or PromptFormat.of(tokenizer)
        self._before, self._after = self._read_template()
        ends = {tokenizer.eos_token_id, self.answer(ASKED, ANSWERED)[-1]}
        self.stop_ids = sorted(id_ for id_ in ends if id_ is not None)
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = next(id_ for id_ in pads if id_ is not None)

    def context(self, context: str | Sequence[tuple[str, str]] | Sequence[dict]) -> list[int]:
        """Ids of a context: a text, documents as `(name, text)`, or messages with `role` and `content`.

        Raises:
            ValueError: the context is empty, or it is messages and the tokenizer has no chat template.
        """
        if isinstance(context, str):
            return render(self.tokenizer, [context], (), self.form)[0]
        if all(isinstance(part, tuple) for part in context):
            return render(self.tokenizer, context, (), self.form)[0]
        if not self.tokenizer.chat_template:
            raise ValueError("it is a list of messages, and this tokenizer has no chat template; give the text")
        text = self._template(*({**message, "content": self._safe(message["content"])} for message in context))
        end = text.rfind(self.tokenizer.eos_token or "\0") + len(self.tokenizer.eos_token or "")
        # White space after the last message's end belongs to the next message's beginning.
        return self._ids(text if text[end:].strip() else text[:end])

    def opening(self, question: str) -> list[int]:
        """Ids of the first question after a context, up to where its answer begins."""
        return render(self.tokenizer, ["A."], [question], self.form)[1][0]

    def alone(self, question: str) -> list[int]:
        """Ids of a question that nothing stands before."""
        shared, (rest,) = render_alone(self.tokenizer, [question], self.form)
        return shared + rest

    def later(self, question: str) -> list[int]:
        """Ids of a question after an answer, or after a context of messages."""
        return self._ids(self._before + self._safe(question).strip() + self._after)

    def answer(self, question: str, answer: str) -> list[int]:
        """Ids of an answer with what ends it."""
        return render_answer(self.tokenizer, question, self._safe(answer), self.form)

    def count(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self._ids(text))

    def text(self, answer_ids: Sequence[int]) -> str:
        """The text of ids that the model wrote as an answer."""
        text = self.tokenizer.decode(list(answer_ids), skip_special_tokens=True).strip()
        return text.split("\n")[0].strip() if self.form.style == "plain" else text

    def _read_template(self) -> tuple[str, str]:
        """What stands before and after a question that follows an answer."""
        if self.form.style == "plain":
            return "\nQuestion: ", "\nAnswer:"
        asked = {"role": "user", "content": ASKED}
        answered = {"role": "assistant", "content": ANSWERED}
        again = {"role": "user", "content": ASKED_AGAIN}
        closing = self._template(asked, answered).split(ANSWERED)[1]
        end = closing.rfind(self.tokenizer.eos_token or "\0")
        closing = closing[: end + len(self.tokenizer.eos_token)] if end >= 0 else closing
        rest = self._template(asked, answered, again, generate=True).split(ANSWERED)[1]
        before, after = rest.removeprefix(closing).split(ASKED_AGAIN)
        return before, after

    def _template(self, *messages: dict, generate: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, enable_thinking=False
        )

    def _safe(self, text: str) -> str:
        return escape(self.tokenizer, text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
