"""A judge behind a real HTTP server: answers chats by a rule, and misbehaves when told to.

The rule gets the parsed request and returns an `Answer`. Everything that arrives is in `log`, in order of arrival. A
client keeps one connection for each call that it has in flight, so `most_connections` is the most that it ever had.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from still.eval.tasks import Criterion, LabTask


@dataclass
class Answer:
    """An HTTP response.

    Attributes:
        text: of the assistant's message; None sends `raw`.
        raw: the whole body, instead of a completion.
        delay: seconds before it is sent.
        cut: bytes of the body that are sent before the connection is dropped; the length header tells of all of them.
    """

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    cut: int | None = None
    finish: str = "stop"
    refusal: str | None = None
    usage: dict | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "type": "error", "code": None}}).encode()
        message = {"role": "assistant", "content": self.text, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        usage = self.usage and {**self.usage, "total_tokens": sum(v for v in self.usage.values() if type(v) is int)}
        done = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        return json.dumps(done).encode()


@dataclass
class Asked:
    """A request: its parsed body, its headers, and the ids that it asks about."""

    body: dict
    headers: dict[str, str]
    ids: list[str]

    @property
    def text(self) -> str:
        """The last message."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part["text"] for part in content)


Rule = Callable[[Asked], Answer]


class JudgeServer:
    """Serves in a thread of its own; a context manager.

    Args:
        rule: what to answer; `honest` when left out.
    """

    def __init__(self, rule: Rule | None = None, keep: bool = True):
        self.rule, self.keep = rule or honest, keep
        self.log: list[Asked] = []
        self.requests, self.connections, self.most_connections = 0, 0, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.port = self._server.result().sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> list[str]:
        """Ids in order of arrival, as often as they were asked."""
        return [name for each in self.log for name in each.ids]

    def _stop(self) -> None:
        self._server.result().close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.most_connections = max(self.most_connections, self.connections)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        pairs = (line.partition(":") for line in head.split("\r\n")[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))))
        asked = Asked(body, headers, [])
        asked.ids = ids_in(asked.text)
        self.requests += 1
        if self.keep:
            self.log.append(asked)
        answer = self.rule(asked)
        if answer.delay:
            await asyncio.sleep(answer.delay)
        content = answer.body()
        lines = {"content-type": "application/json", "content-length": str(len(content)), **answer.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 {answer.status} X\r\n{head}\r\n".encode() + content[: answer.cut])
        await writer.drain()
        return answer.cut is None


def ids_in(text: str) -> list[str]:
    """The criteria that a prompt of ours asks about."""
    return re.findall(r"^## (C[-\d]\S*)$", text.rpartition("\n# Criteria\n")[2], re.MULTILINE)


def truth(name: str) -> str:
    """The label that an honest server gives a criterion: two of three pass, by the hash of its id."""
    return "fail" if hashlib.sha256(name.encode()).digest()[0] % 3 == 0 else "pass"


def verdicts(ids: list[str], **more: object) -> str:
    """An answer of our form, with the true labels."""
    listed = [
        {"id": each, "evidence": [], "reason": f"looked at {each}", "verdict": truth(each)} | more for each in ids
    ]
    return json.dumps({"verdicts": listed})


def honest(asked: Asked) -> Answer:
    """The truth, at once."""
    return Answer(verdicts(asked.ids))


def make_task(count: int, prefix: str = "C-", files: tuple[tuple[str, ...], ...] = ((),), **more: object) -> LabTask:
    """A task with so many criteria, bound to the file sets in turn."""
    criteria = tuple(
        Criterion(f"{prefix}{n:05d}", f"Title {n}", f"PASS if {n}. FAIL if not.", files[n % len(files)])
        for n in range(count)
    )
    return LabTask("area/slug", Path(), "practice", "The title of the task", "Do it.", criteria, **more)
