"""What the trainers' tests share: rollouts along a script with a tiny model's own log-probabilities, and their rows.

The scripts stand for a model that plays well; nothing here says anything about a model.
"""

from __future__ import annotations

import math

import torch
from agent_cases import Reader, SteeredPolicy, SteeredSession, episode, make_task, texts, tiny_agent

from still.harness.agent import drive
from still.harness.policies.chat import ChatFormat
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
