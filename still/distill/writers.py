"""Who writes the questions: the model of an OpenAI-compatible server, or the base model itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from .config import DataConfig
from .rendering import Renderer


class Writer(Protocol):
    """Answers prompts."""

    def write(self, prompts: Mapping[str, str], done: Callable[[str, str], None]) -> dict[str, str]:
        """Answer prompts by id; `done(id, reply)` is called as each reply arrives.

        Returns:
            Why a prompt got no reply, by id.
        """


class ServerWriter:
    """A model behind any OpenAI-compatible server, several requests at a time, each retried with growing pauses.

    The key comes from the environment variable `OPENAI_API_KEY`; local servers need none.

    Raises:
        ModuleNotFoundError: the `openai` package is not installed.
    """

    def __init__(self, config: DataConfig):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "questions from a server take the `openai` package: pip install 'still-kv[eval]'"
            ) from error
        self.openai = openai
        self.config = config

    def write(self, prompts: Mapping[str, str], done: Callable[[str, str], None]) -> dict[str, str]:
        """See `Writer.write`.

        Raises:
            ValueError: the server refuses the key, the model or the address; no other request would do better.
        """
        return asyncio.run(self._write(prompts, done))

    async def _write(self, prompts, done) -> dict[str, str]:
        failed: dict[str, str] = {}
        gate = asyncio.Semaphore(self.config.concurrency)
        openai, config = self.openai, self.config
        key = os.environ.get("OPENAI_API_KEY") or "none"
        async with openai.AsyncOpenAI(
            base_url=config.endpoint, api_key=key, max_retries=config.retries, timeout=config.timeout
        ) as client:

            async def one(id_: str, text: str) -> None:
                async with gate:
                    try:
                        reply = await client.chat.completions.create(
                            model=config.api_model, messages=[{"role": "user", "content": text}], seed=config.seed
                        )
                    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                        raise ValueError(
                            f"{config.endpoint} refuses requests for model {config.api_model!r} ({error}): check "
                            "--endpoint, --api-model and OPENAI_API_KEY; what was finished is kept"
                        ) from error
                    except openai.OpenAIError as error:
                        failed[id_] = f"{type(error).__name__}: {error}"
                        return
                content = reply.choices[0].message.content if reply.choices else None
                done(id_, content or "")

            tasks = [asyncio.create_task(one(id_, text)) for id_, text in prompts.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return failed


class BaseWriter:
    """The base model writes its own questions, one prompt at a time.

    Args:
        model: the base model.
        renderer: for its tokenizer.
        tokens: longest reply.
    """

    def __init__(self, model, renderer: Renderer, tokens: int = 2048):
        self.model, self.renderer, self.tokens = model, renderer, tokens

    def write(self, prompts: Mapping[str, str], done: Callable[[str, str], None]) -> dict[str, str]:
        """See `Writer.write`."""
        for id_, text in prompts.items():
            ids = torch.tensor([self.renderer.alone(text)], device=self.model.device)
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                do_sample=False,
                pad_token_id=self.renderer.pad_id,
            )
            done(id_, self.renderer.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return {}
