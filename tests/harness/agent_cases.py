"""What the harness's tests play with: a tiny tokenizer that has tool calls, scripts that read and write, and tasks.

The scripts show how the harness works; no number about a model comes from them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from still.eval.tasks import load_task
from still.harness import backends
from still.harness.agent import Episode, drive
from still.harness.documents import Documents
from still.harness.policies.chat import ChatFormat
from still.harness.policies.local import LocalSession
from still.harness.policies.scripted import ScriptedPolicy, ScriptedSession
from still.harness.run_config import RunConfig
from still.harness.runs import RunFolder, read_run
from still.harness.tools import Workspace
from still.harness.types import MEMO, Message, ToolCall
from still.models import LoadedModel

SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>")
CHAT = """\
{%- if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<|call|>{{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def tiny_agent_tokenizer() -> PreTrainedTokenizerFast:
    """Role and call marks and 256 bytes: a text has as many tokens as bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate((*SPECIALS, *letters))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIALS[0], eos_token=SPECIALS[1],
        extra_special_tokens=list(SPECIALS[2:]), chat_template=CHAT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_agent(kind: str = "qwen3", **overrides) -> LoadedModel:
    """A tiny random model that goes with it."""
    tokenizer = tiny_agent_tokenizer()
    options = {"vocab_size": len(tokenizer), "eos_token_id": 1, "max_position_embeddings": 65_536, **overrides}
    return LoadedModel("tiny", tiny_model(kind, **options), tokenizer)


def call(name: str, **arguments) -> Message:
    """An assistant's turn with one call."""
    return Message("assistant", "", (ToolCall(name, json.dumps(arguments)),))


def documents_of(seen: list[Message]) -> list[str]:
    """The documents that U lists, in order."""
    return [line for line in seen[1].content.splitlines() if line.startswith("documents/")]


def read_so_far(seen: list[Message]) -> set[str]:
    """What was read whole, by the bridge and by what follows it."""
    found = set()
    for message in seen:
        if message.role == "user" and message.content.startswith("[BRIDGE"):
            section = message.content.split("## Files already read")[-1].split("\n## ")[0]
            found |= {line.split(" (")[0] for line in section.splitlines() if "go on with" not in line}
        if message.role == "tool" and message.call.name == "read" and not message.content.startswith("Error"):
            cut = "go on with offset" in message.content
            found |= set() if cut else {seen_path(message)}
    return {name for name in found if name.startswith("documents/")}


def seen_path(message: Message) -> str:
    """The path that a tool's message answers."""
    return (message.call.parsed() or {}).get("path", "")


def offset_of(seen: list[Message], name: str) -> int:
    """Where to go on in a document that was read in part."""
    offset = 0
    for message in seen:
        if message.role == "user" and f"{name} (" in message.content and "go on with offset" in message.content:
            line = next(line for line in message.content.splitlines() if line.startswith(f"{name} ("))
            offset = int(line.split("offset ")[1].rstrip(")")) if "offset" in line else offset
        if message.role == "tool" and seen_path(message) == name and "go on with offset" in message.content:
            offset = int(message.content.rsplit("offset ", 1)[1].split("]")[0].replace(",", ""))
    return offset


class Reader:
    """Reads every document in order, writes a memo when told to, then the deliverables, then stops.

    Args:
        memo: makes a memo from the names read so far.
        obeys: writes the memo when reminded.
    """

    outputs = ("output/schedule.md", "output/memo.md")

    def __init__(self, memo=lambda names: "memo of " + " ".join(sorted(names)), obeys: bool = True):
        self.memo, self.obeys = memo, obeys

    def __call__(self, seen: list[Message], limit) -> Message:
        """One turn."""
        done = read_so_far(seen)
        last = seen[-1].content
        if last.startswith("Write the memo now"):
            return Message("assistant", self.memo(done))
        if self.obeys and f"write {MEMO}" in last:
            return call("write", path=MEMO, content=self.memo(done))
        for name in documents_of(seen):
            if name not in done:
                offset = offset_of(seen, name)
                return call("read", path=name, **({"offset": offset} if offset else {}))
        written = {seen_path(m) for m in seen if m.role == "tool" and m.call.name == "write"}
        listed = next((m.content for m in reversed(seen) if m.content.startswith("[BRIDGE")), "")
        for name in self.outputs:
            if name not in written and f"\n{name} (" not in listed:
                return call("write", path=name, content=f"draft after {len(done)} documents")
        return Message("assistant", "Done.")


class Clerk(Reader):
    """Copies the last sentence on each party that the assignment names into memo and draft, as long as it is in view.

    It knows no rubric. Behind slots it is shown what they stand for, so its pass rates there say nothing.
    """

    outputs = ("output/terms.md",)

    def __call__(self, seen: list[Message], limit) -> Message:
        """One turn."""
        names = re.findall(r"^\d+\. (.+)$", seen[1].content, re.MULTILINE)
        found = {}
        for message in seen[2:]:
            text = message.content.partition("## Memo\n")[2].partition("\n## Files")[0]
            text = message.content if message.role == "tool" and message.call.name == "read" else text
            for sentence in re.split(r"(?<=[.])\s+|\n", text):
                found |= {name: sentence for name in names if name in sentence}
        self.memo = lambda _: "\n".join(found.values()) or "nothing"
        message = super().__call__(seen, limit)
        if message.calls and "output/terms.md" in message.calls[0].arguments:
            return call("write", path="output/terms.md", content=self.memo(()))
        return message


def make_task(root: Path, texts: dict[str, str], deliverables=("schedule.md", "memo.md"), secret: str = "SECRET"):
    """A LAB task on disk with these documents; its rubric and title carry `secret`."""
    folder = root / "tasks" / "area" / "matter"
    for name, text in texts.items():
        file = folder / "documents" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    task = {
        "title": f"{secret} title",
        "instructions": "Report what the documents fix.",
        "criteria": [{"id": "C-001", "title": f"{secret} one", "match_criteria": f"PASS if it says {secret} value."}],
    }
    if deliverables:
        task["deliverables"] = {name: name for name in deliverables}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    return load_task(folder)


def texts(count: int, size: int = 200) -> dict[str, str]:
    """Documents of about `size` characters that differ."""
    words = ["lease", "term", "rent", "clause", "party", "sum", "date", "notice"]
    return {
        f"{n + 1:02d}.txt": " ".join(f"{words[(i * 7 + n) % 8]}{(i * 31 + n * 17) % 97}" for i in range(size // 7))
        for n in range(count)
    }


def episode(
    root: Path, task, player, loaded=None, policy=None, method=None, name="run", sandbox=None, **settings
) -> Episode:
    """An episode in `root/name`, with limits that suit tiny documents."""
    settings = {"backend": "full", "window": 4000, "reserve": 400, "reads": 2, "reads_force": 3, "max_new_tokens": 600,
                "tools": ("read", "write", "edit", "glob", "grep"), **settings}  # fmt: skip
    config = RunConfig(**settings)
    if policy is None:
        tokenizer = loaded.tokenizer if loaded else tiny_agent_tokenizer()
        policy = ScriptedPolicy(tokenizer, lambda: player, config.window, loaded)
    folder = RunFolder(root / name)
    workspace = Workspace(folder.workspace, Documents.load(task.agent_view(), cache=root / "converted"), sandbox)
    return Episode(workspace, policy, backends.make(config, policy, method), config, folder)


def play(root: Path, task, player, **settings) -> list[dict]:
    """Play an episode to its end; its events."""
    run = episode(root, task, player, **settings)
    drive(run)
    return read_run(run.folder.root)


def of(events: list[dict], kind: str) -> list[dict]:
    """The events of a kind."""
    return [event for event in events if event["event"] == kind]


class SteeredPolicy(ScriptedPolicy):
    """The script decides what is done; every `~` that it writes is a letter that the model chooses, greedily."""

    def session(self, tools, queries=False):
        """A new conversation."""
        return SteeredSession(self, ChatFormat(self.tokenizer, tools), queries)


class SteeredSession(ScriptedSession):
    """Samples as a local model does, token by token, but along the script's text."""

    decodes_here = True

    def sample(self, limit):
        """One turn."""
        return LocalSession.sample(self, limit)

    def begin(self, limit):
        """Ask the script what the turn is."""
        self.script = self.chat.assistant(self.player(list(self.seen), limit))
        return super().begin(limit)

    def finish(self, turn):
        """Remember it."""
        sampled = super().finish(turn)
        self.seen.append(Message("assistant", sampled.text, sampled.calls))
        return sampled

    def choose(self, turn, logits):
        """The script's token, or where it has a gap the letter that the model likes best."""
        wanted, gap = self.script[len(turn.output)], self.chat.encode("~")[0]
        if wanted != gap:
            turn.take(wanted, 0.0, float("inf"))
            return
        letters = self.chat.encode("abcdefghijklmnopqrstuvwxyz")
        best = logits[letters].topk(2)
        turn.take(letters[int(best.indices[0])], 0.0, (best.values[0] - best.values[1]).item())
