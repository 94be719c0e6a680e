"""A served model, token-in and token-out: prompts go as ids, and sampled ids come back (vLLM, or any that does so)."""

from __future__ import annotations

from typing import Any

from .calls import parser_of
from .chat import ChatFormat
from .local import LocalSession
from .server import ReplyError, ServerConfig, ask, first_choice


class TokenServerPolicy:
    """A model whose tokenizer is here and whose weights are there.

    Args:
        config: where it is served; its completions endpoint must take `prompt` as ids and honour `return_token_ids`.
        tokenizer: the model's own.
    """

    capabilities = frozenset({"tokens"})
    version: int | None = None

    def __init__(self, config: ServerConfig, tokenizer):
        self.config, self.tokenizer, self.client = config, tokenizer, config.client()
        self.name, self.window, self.bytes_per_token = config.model, config.window, config.bytes_per_token
        self.parse, self.ends = parser_of(tokenizer.chat_template or ""), set()

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> TokenServerSession:
        """A new conversation."""
        return TokenServerSession(self, ChatFormat(self.tokenizer, tools), queries)


WHOLE = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
UNTOUCHED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Tokens are drawn from the model's own distribution, as the log-probabilities that come back are of it. What a request
leaves out vLLM takes from the model's `generation_config.json`, which often cuts or penalises."""


class TokenServerSession(LocalSession):
    """See `LocalSession`: the same ids, computed elsewhere. The server's prefix cache spares it the window so far."""

    decodes_here = False

    def _read_prompt(self, turn, chunk):
        prompt = [*self.base_ids, *(token for each in self._state.chunks for token in each), *chunk]
        request = {
            "model": self.policy.config.model, "prompt": prompt, "max_tokens": turn.most,
            "temperature": turn.limit.temperature, "seed": turn.limit.seed % (1 << 31), "logprobs": 2, **WHOLE,
            "extra_body": {
                "return_token_ids": True, "stop_token_ids": sorted(turn.ends), "skip_special_tokens": False,
                **UNTOUCHED,
            },
        }  # fmt: skip
        choice = ask(self.policy.config, lambda: self.policy.client.completions.create(**request), _scored)
        output = getattr(choice, "token_ids", None)
        if not output:
            raise ValueError(
                f"the server of {self.policy.name} gave no token_ids: it does not honour return_token_ids; name the "
                f"policy without a tokenizer, to use its chat completions"
            )
        scores = choice.logprobs
        tops = [sorted(each.values(), reverse=True) for each in (scores.top_logprobs or []) if each and len(each) > 1]
        turn.output, turn.logprobs = list(output), [float(each) for each in scores.token_logprobs or []]
        turn.most = min(turn.most, len(turn.output))
        turn.margin = min((top[0] - top[1] for top in tops), default=float("inf"))


def _scored(reply):
    """The choice of a reply, with the log-probabilities of its tokens; raises ReplyError as `ask` wants it."""
    choice = first_choice(reply)
    if getattr(choice, "logprobs", None) is None:
        raise ReplyError("the reply has no logprobs")
    return choice
