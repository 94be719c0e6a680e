"""What the trainers' tests share: rollouts along a script with a tiny model's own log-probabilities, and their rows.

The scripts stand for a model that plays well; nothing here says anything about a model.
"""

from __future__ import annotations

import json
import math

import torch
from agent_cases import (
    Reader,
    SteeredPolicy,
    SteeredSession,
    episode,
    make_task,
    texts,
    tiny_agent,
    tiny_agent_tokenizer,
)

from still.attention import register
from still.eval.judges import find_judge
from still.eval.matters.generate import Difficulty
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.reward import RubricReward
from still.eval.tasks import load_task
from still.harness.agent import drive
from still.harness.episodes import Oracle
from still.harness.policies.chat import ChatFormat
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.run_config import RunConfig
from still.harness.trainers.attention import attending_rows
from still.harness.trainers.model import Share
from still.harness.types import Message, ToolCall
from still.harness.windows import IGNORE, WindowRow, rows_of_run


class Honest(SteeredPolicy):
    """A script that records what the model thinks of each of its tokens, at temperature 1."""

    def session(self, tools, queries=False):
        """A new conversation."""
        return HonestSession(self, ChatFormat(self.tokenizer, tools), queries)


class HonestSession(SteeredSession):
    """See `Honest`."""

    def choose(self, turn, logits):
        """The script's token with the model's log-probability."""
        wanted = self.script[len(turn.output)]
        turn.take(wanted, logits.log_softmax(-1)[wanted].item(), 0.0)


def attentive(loaded):
    """The model, with the attention that unequal slots need."""
    register()
    loaded.model.set_attn_implementation("still")
    return loaded.model


def rollout(root, loaded=None, player=None, documents=4, train_on="own", version=None, **settings) -> list[WindowRow]:
    """Rows of one scripted rollout."""
    loaded = loaded or tiny_agent()
    policy = Honest(loaded.tokenizer, player or Reader, 4000, loaded)
    policy.version = version
    run = episode(root, make_task(root, texts(documents, 40)), None, policy=policy, **settings)
    drive(run)
    return rows_of_run(run.folder.root, loaded.tokenizer, train_on=train_on)


def plain_row(ids: list[int], trained: range, trajectory: str = "a", window: int = 0, **more) -> WindowRow:
    """A text row that was never played."""
    labels = [token if place in trained else IGNORE for place, token in enumerate(ids)]
    known = {
        "token_kind": [int(label != IGNORE) for label in labels], "logprobs": [math.nan] * len(ids),
        "spans": [{"start": trained[0], "end": trained[-1] + 1, "kind": "action", "turn": window, "version": None,
                   "untrained": ""}],
        "prefix_ids": [], "prefix_plan": [], "prefix_method": "", "task_id": "t", "round": 0, "attempt": 0,
        "n_windows": 1, "is_last": True, "messages": "", "tools": "[]", "backend": "memo", "policy": "tiny",
        "template": "", "temperature": 1.0,
    }  # fmt: skip
    return WindowRow(input_ids=ids, labels=labels, trajectory_id=trajectory, window=window, **{**known, **more})


def log_of(folder) -> list[dict]:
    """Lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def repeatable(log: list[dict]) -> list[dict]:
    """Without what differs between two runs that train the same: seconds, and a norm summed in another order."""
    return [{k: v for k, v in line.items() if k != "grad_norm" and not k.startswith("seconds_")} for line in log]


def gradients(module) -> dict[str, torch.Tensor]:
    """What a backward pass left."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], bound: float = 1e-5) -> float:
    """Equal gradients, relative to the largest; returns the largest difference."""
    assert one.keys() == other.keys()
    size = max(float(x.abs().max()) for x in one.values())
    worst = max(float((one[name] - other[name]).abs().max()) for name in one) / size
    assert worst < bound, worst
    return worst


def kept_bytes(module, row) -> int:
    """Bytes that a forward keeps for its backward pass, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with attending_rows(module.policy), hooks:
        module([Share(row, 1.0 / row.trained)])
    return sum(storage.nbytes() for storage in kept.values())


TINY = Difficulty("tiny", facts=4, documents=4, amended=0.0)
RUN = RunConfig(
    backend="memo", budget="700t", window=6000, reserve=900, reads=2, reads_force=3, max_new_tokens=800,
    tools=("read", "write"), temperature=0.0,
)  # fmt: skip


def matters(root, seeds=(1, 2), difficulty=TINY):
    """Synthetic tasks."""
    return [load_task(place) for place in write_lab_tasks(root, "practice", list(seeds), difficulty, "train")]


def written(root) -> dict[str, int]:
    """When the log of each run folder was written last."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("events.jsonl")}


def exact() -> list:
    """Two graders that share nothing."""
    return [RubricReward(find_judge("exact")).grade for _ in range(2)]


class ScriptedTeacher:
    """A script that knows the rubrics: it plays `Oracle`, and forgets a line of each draft until it is told.

    Args:
        tasks: that it may meet.
        forgets: leave out a line before the first private note.
        says: what it says when it goes on after one.
        memo_tokens: of its memos.
    """

    def __init__(self, tasks, forgets: bool = True, says: str = "Let me check the terms once more.", memo_tokens=600):
        self.tasks, self.forgets, self.says, self.memo_tokens = tasks, forgets, says, memo_tokens

    def __call__(self, seen, limit):
        """One turn."""
        task = next(task for task in self.tasks if all(each.title in seen[0].content for each in task.criteria))
        oracle = Oracle(task, self.memo_tokens, len)
        noted = [place for place, m in enumerate(seen) if m.role == "user" and "For you alone: not" in m.content]
        if noted:
            later = [m.call for m in seen[noted[-1] :] if m.role == "tool" and m.call.name == "write"]
            written = {call.parsed()["path"] for call in later}
            missing = [name for name in oracle.files if f"output/{name}" not in written]
            if not missing:
                return Message("assistant", "Done.")
            draft = oracle._draft(missing[0], oracle._look(seen)[0])
            call = ToolCall("write", json.dumps({"path": f"output/{missing[0]}", "content": draft}))
            return Message("assistant", self.says, (call,))
        message = oracle(seen, limit)
        if self.forgets and message.calls and '"output/' in message.calls[0].arguments:
            arguments = message.calls[0].parsed()
            kept = arguments["content"].splitlines()[:-1]
            arguments["content"] = "\n".join(kept) or "Nothing found."
            return Message("assistant", "", (ToolCall("write", json.dumps(arguments)),))
        return message


def scripted_teacher(tasks, window: int = 12_000, **options) -> ScriptedPolicy:
    """The script as a policy; its name says what it is."""
    player = ScriptedTeacher(tasks, **options)
    return ScriptedPolicy(tiny_agent_tokenizer(), lambda: player, window, name="scripted teacher")
