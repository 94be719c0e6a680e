"""From runs to training rows: a rollout with M compactions becomes M + 1 rows, one a window.

    rows = rows_of_run("runs/memo/matter-1/seed-0", tokenizer)
    check_rows(rows, tokenizer, max_tokens=8192)

A row holds exactly the tokens that were read and sampled, so training sees what the policy saw. The loss lies on the
assistant's tokens of the row's own window; the memo turn belongs to the window that it closes. Behind slots a row says
by a plan how the cache before its first token is made again (`trainers.prefix` does it). Only the public log is read:
nothing here opens any other file of a run. No torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .bridge import memo_reminder
from .rules import MISTAKES
from .runs import read_run
from .types import Message

KINDS = {"context": 0, "action": 1, "memo": 2, "draft": 3, "review": 4, "final": 5}
IGNORE = -100
"""Label of a token that is not trained."""
SLOTS = ("kv", "hybrid", "memo_kv")
KNOWN = ("all", "own")


@dataclass(frozen=True)
class WindowRow:
    """One training example; the fields are the columns of a saved data set.

    Attributes:
        input_ids: what the model reads and writes in this window; behind slots, what follows them.
        labels: the token itself where it is trained, -100 elsewhere.
        token_kind: kind of the turn that a token was sampled in, as in `KINDS`; 0 where it was not sampled.
        logprobs: log-probability of each sampled token when it was sampled, NaN where it is not known.
        spans: the sampled turns: {start, end, kind, turn, version, untrained}; `untrained` says why a turn is context.
        prefix_ids: behind slots, all tokens before this window; else empty.
        prefix_plan: how the cache of `prefix_ids` is made, step by step: {keep, start, end, slots, first, last}. `keep`
            is exact (S and U), append (the span becomes `slots` more slots), recompact (all slots and the span become
            `slots`) or columns (of the span, columns `first` to `last` stay, and nothing from before).
        prefix_method: the method that made the slots; empty without any.
        task_id: of the task.
        trajectory_id: of the rollout; all windows of a rollout have the same.
        round: of iSFT, or the step of GRPO.
        attempt: of the task in that round, or the sample's number in its group.
        window: number of the window, from 0.
        n_windows: of the rollout.
        is_last: whether it is the last one.
        messages: the window's public conversation, as JSON text.
        tools: the tools' schemas, as JSON text.
        backend: whose shape the row has.
        policy: the model that played.
        template: digest of the tokenizer's template and vocabulary.
        temperature: at which `logprobs` were taken.
        score: share of the criteria that passed; NaN where it is not known.
        all_pass: 1.0, 0.0, or NaN where it is not known.
        teacher: what helped the policy; empty without any.
        corrections: private rounds that the rollout took.
        weight: of the row in a loss.
        prefix_compactor: digest of the weights that made the slots; empty without any.
    """

    input_ids: list[int]
    labels: list[int]
    token_kind: list[int]
    logprobs: list[float]
    spans: list[dict[str, Any]]
    prefix_ids: list[int]
    prefix_plan: list[dict[str, Any]]
    prefix_method: str
    task_id: str
    trajectory_id: str
    round: int
    attempt: int
    window: int
    n_windows: int
    is_last: bool
    messages: str
    tools: str
    backend: str
    policy: str
    template: str
    temperature: float
    score: float = math.nan
    all_pass: float = math.nan
    teacher: str = ""
    corrections: int = 0
    weight: float = 1.0
    prefix_compactor: str = ""

    @property
    def trained(self) -> int:
        """Trained tokens."""
        return sum(label != IGNORE for label in self.labels)

    @property
    def versions(self) -> set[int | None]:
        """Versions of the weights that sampled the trained turns."""
        return {span["version"] for span in self.spans if not span["untrained"]}


@dataclass
class Stream:
    """One window's tokens, S and U left out.

    Attributes:
        ids: as they were read and sampled.
        kinds: see `WindowRow.token_kind`.
        logprobs: see `WindowRow.logprobs`.
        spans: see `WindowRow.spans`.
        pending: what was read at the window's end that no turn answered.
        events: the window's own events.
    """

    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    events: list[Mapping[str, Any]] = field(default_factory=list)

    def read(self, ids: Sequence[int]) -> None:
        """Tokens that were not sampled."""
        self.ids += ids
        self.kinds += [0] * len(ids)
        self.logprobs += [math.nan] * len(ids)

    def sample(self, turn: Mapping[str, Any], untrained: str, known: bool) -> None:
        """A turn."""
        output = turn["output_ids"]
        start, logprobs = len(self.ids), turn["logprobs"] if known and turn["logprobs"] else [math.nan] * len(output)
        self.ids += output
        self.kinds += [KINDS[turn["kind"]]] * len(output)
        self.logprobs += logprobs
        self.spans.append({
            "start": start, "end": len(self.ids), "kind": turn["kind"], "turn": turn["turn"],
            "version": turn.get("version"), "untrained": untrained,
        })  # fmt: skip

    @property
    def trained(self) -> list[bool]:
        """Which tokens are trained."""
        flags = [False] * len(self.ids)
        for span in self.spans:
            if not span["untrained"]:
                flags[span["start"] : span["end"]] = [True] * (span["end"] - span["start"])
        return flags


def streams(events: Sequence[Mapping[str, Any]], untrained: Mapping[int, str] | None = None) -> list[Stream]:
    """The windows of a logged run, in order; rejected attempts are not in them.

    Args:
        events: of the run.
        untrained: turns that are context, by number, and why; those of `harness_turns` unless given.
    """
    untrained = harness_turns(events) if untrained is None else untrained
    config = events[0]["config"]
    hotter = config["retry_temperature"] > config["temperature"]
    windows, attempts = [Stream()], 0
    for event in events:
        windows[-1].events.append(event)
        if event["event"] == "reject":
            attempts += 1
        elif event["event"] == "turn":
            known = not event["repaired"] and not (attempts and hotter)
            windows[-1].read(event["append_ids"])
            windows[-1].sample(event, untrained.get(event["turn"], ""), known)
            attempts = 0
        elif event["event"] == "compact":
            windows[-1].pending = list(event["pending_ids"])
            windows.append(Stream())
    return windows


def harness_turns(events: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Turns that are the harness's doing: reads that were issued again, and memos that were never accepted."""
    found = {event["turn"]: "repaired" for event in events if event["event"] == "turn" and event["repaired"]}
    last: Mapping[str, Any] | None = None
    for event in events:
        if event["event"] == "turn":
            last = event
        given_up = event["event"] == "compact" and event["degraded"].startswith("no memo")
        failed = event["event"] == "end" and event["stop"] == "compaction_failed"
        if last is not None and (given_up or failed):
            found[last["turn"]] = "failed memo"
    return found


def flawed_turns(events: Sequence[Mapping[str, Any]], corrected_at: Sequence[int] = ()) -> dict[int, str]:
    """Turns that a student should not learn, beside the harness's own: cut ones, mistakes, superseded drafts.

    Args:
        events: of the run.
        corrected_at: turns that follow a correction: drafts before them that are written again later are superseded.
    """
    found = {}
    for event in events:
        if event["event"] == "turn" and event["finish"] == "length":
            found[event["turn"]] = "cut"
        if event["event"] == "tool":
            if event["problem"] in MISTAKES or event["rule"] in ("syntax", "memo_over", "memo_empty", "one_read"):
                found[event["turn"]] = "mistake"
            if event["ok"] and event["name"] in ("write", "edit") and event["path"].startswith("output/"):
                later = [
                    other["turn"] for other in events
                    if other["event"] == "tool" and other["ok"] and other["path"] == event["path"]
                    and other["name"] in ("write", "edit") and other["turn"] > event["turn"]
                ]  # fmt: skip
                if any(event["turn"] < at <= turn for at in corrected_at for turn in later):
                    found[event["turn"]] = "superseded"
    return found | harness_turns(events)


def rows_of_run(
    root: str | Path,
    tokenizer: Any,
    *,
    train_on: str = "own",
    corrected_at: Sequence[int] = (),
    trajectory_id: str = "",
    partial: bool = False,
    **about: Any,
) -> list[WindowRow]:
    """The training rows of a run on disk, windows without a trained token left out.

    Args:
        root: the run's folder.
        tokenizer: the student's; prompts must have been rendered as it renders them.
        train_on: "own" leaves out turns with mistakes (see `flawed_turns`), "all" trains every turn that was sampled
            and kept, as a policy gradient needs.
        corrected_at: see `flawed_turns`.
        trajectory_id: the run's path unless given.
        partial: take a run that has not ended.
        about: further columns: round, attempt, score, all_pass, teacher, corrections, weight.

    Raises:
        ValueError: the run has not ended, was rendered by another template, or holds no token ids.
    """
    events = read_run(root)
    if train_on not in KNOWN:
        raise ValueError(f"train_on is {train_on!r}; it is one of {', '.join(KNOWN)}")
    if not events or (events[-1]["event"] != "end" and not partial):
        raise ValueError(f"{root} has not ended: its last window would be cut; let it go on, or pass partial=True")
    if not any(event["output_ids"] for event in events if event["event"] == "turn"):
        raise ValueError(f"{root} holds no token ids: its server hid them; give the policy a tokenizer")
    untrained = harness_turns(events) if train_on == "all" else flawed_turns(events, corrected_at)
    chat = _same_template(events[0], tokenizer, root)
    texts = _Texts(Path(root), chat)
    rows = rows_of_events(events, untrained, trajectory_id or str(root), template=template_digest(tokenizer), **about)
    found = streams(events, untrained)
    conversations = [json.dumps(texts.of(events, found, number), ensure_ascii=False) for number in range(len(found))]
    return [replace(row, messages=conversations[row.window]) for row in rows]


def rows_of_events(
    events: Sequence[Mapping[str, Any]], untrained: Mapping[int, str] | None, trajectory_id: str, **about: Any
) -> list[WindowRow]:
    """The same from events alone, without the text of the messages.

    Args:
        events: of the run.
        untrained: see `streams`.
        trajectory_id: of the run.
        about: further columns.
    """
    run, windows = events[0], streams(events, untrained)
    base, compacts = list(run["base_ids"]), [event for event in events if event["event"] == "compact"]
    slots = any(event["artifact"]["kind"] in SLOTS for event in compacts)
    heat = run["config"]["temperature"]
    shared = {
        "task_id": run["task"], "trajectory_id": trajectory_id, "n_windows": len(windows), "backend": run["backend"],
        "policy": run["policy"], "tools": json.dumps(run["tools"], ensure_ascii=False), "messages": "",
        "temperature": heat or 1.0, "round": 0, "attempt": 0, "template": "", **about,
    }  # fmt: skip
    rows, before, plan, method = [], list(base), [_step("exact", 0, len(base), len(base))], ""
    compactor = ""
    for number, window in enumerate(windows):
        behind = slots and number > 0
        ids = window.ids if behind else base + window.ids
        shift = 0 if behind else len(base)
        flags = [False] * shift + window.trained
        if any(flags):
            rows.append(WindowRow(
                input_ids=ids,
                labels=[token if flag else IGNORE for token, flag in zip(ids, flags, strict=True)],
                token_kind=[0] * shift + window.kinds,
                logprobs=[math.nan] * shift + window.logprobs,
                spans=[{**s, "start": s["start"] + shift, "end": s["end"] + shift} for s in window.spans],
                prefix_ids=list(before) if behind else [], prefix_plan=list(plan) if behind else [],
                prefix_method=method if behind else "", prefix_compactor=compactor if behind else "",
                window=number, is_last=number == len(windows) - 1, **shared,
            ))  # fmt: skip
        if slots and number < len(compacts):
            details = compacts[number]["artifact"]["details"]
            method, compactor = details.get("method", ""), details.get("compactor", "")
            plan = [*plan, _plan_step(compacts[number], window, len(before))]
            before += window.ids + window.pending
    return rows


def _plan_step(event: Mapping[str, Any], window: Stream, start: int) -> dict[str, Any]:
    details, end = event["artifact"]["details"], start + len(window.ids) + len(window.pending)
    if event["artifact"]["kind"] == "memo_kv":
        last = start + window.spans[-1]["end"]
        return _step("columns", start, end, details["slots"], last - details["slots"], last)
    again = details["mode"] == "recompact" or details["exhausted"]
    return _step("recompact" if again and event["window"] else "append", start, end, details["slots"])


def _step(keep: str, start: int, end: int, slots: int, first: int = 0, last: int = 0) -> dict[str, Any]:
    return {"keep": keep, "start": start, "end": end, "slots": slots, "first": first, "last": last}


def template_digest(tokenizer: Any) -> str:
    """Sixteen hex digits of what renders a conversation: the chat template and the vocabulary."""
    parts = json.dumps([tokenizer.chat_template, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def check_rows(
    rows: Sequence[WindowRow], tokenizer: Any = None, max_tokens: int | None = None, newest: int | None = None,
    compactor: str = "",
) -> None:  # fmt: skip
    """Refuse rows that would train nothing, or another thing than what was played, before a step is wasted.

    Args:
        rows: all that are trained on.
        tokenizer: of the model that trains.
        max_tokens: that a row may have; nothing is ever cut.
        newest: version of the weights that train; rows that others sampled are stale.
        compactor: digest of the compactor that the rows' slots must be of; any unless given.

    Raises:
        ValueError: names the row, what is wrong and the mend.
    """
    if not rows:
        raise ValueError("there are no rows to train on: no rollout was kept, or none has a trained token")
    if not any(row.trained for row in rows):
        raise ValueError(f"none of {len(rows)} rows has a trained token: every mask is zero")
    digest = template_digest(tokenizer) if tokenizer is not None else ""
    for number, row in enumerate(rows):
        where = f"row {number} ({row.trajectory_id}, window {row.window} of {row.n_windows})"
        if not row.trained:
            raise ValueError(f"{where} has no trained token: its mask is all zero; rows_of_run leaves such windows out")
        if not len(row.input_ids) == len(row.labels) == len(row.token_kind) == len(row.logprobs):
            raise ValueError(f"{where} is cut: its columns have unequal lengths; build it again from its run")
        if any(label not in (IGNORE, token) for label, token in zip(row.labels, row.input_ids, strict=True)):
            raise ValueError(f"{where} has labels that are not its tokens; build it again from its run")
        if row.spans and row.spans[-1]["end"] > len(row.input_ids):
            raise ValueError(f"{where} is cut: a turn ends at {row.spans[-1]['end']} of {len(row.input_ids)} tokens")
        if max_tokens is not None and (total := len(row.prefix_ids) + len(row.input_ids)) > max_tokens:
            raise ValueError(f"{where} has {total} tokens, over the {max_tokens} allowed: raise max_tokens; no cut")
        if digest and row.template and row.template != digest:
            raise ValueError(
                f"{where} was rendered by template {row.template}, the model that trains has {digest}: build the rows "
                f"again with its tokenizer"
            )
        if compactor and row.prefix_compactor and row.prefix_compactor != compactor:
            raise ValueError(
                f"{where} was played behind slots of compactor {row.prefix_compactor}, and {compactor} is the one at "
                f"hand: sample again, or load the compactor that made them"
            )
        if newest is not None:
            stale = [version for version in row.versions if version != newest]
            if stale:
                raise ValueError(
                    f"{where} was sampled by weights of version {stale[0]}, and version {newest} trains: sample again"
                )


def _same_template(run: Mapping[str, Any], tokenizer: Any, root: str | Path):
    """The renderer, checked against how the run was rendered."""
    from .policies.chat import ChatFormat

    chat = ChatFormat(tokenizer, run["tools"])
    ids = chat.base([Message("system", run["system"]), Message("user", run["user"])])
    if ids != list(run["base_ids"]):
        raise ValueError(
            f"{root} was rendered by another template or tokenizer: S and U are {len(run['base_ids'])} tokens there "
            f"and {len(ids)} here; take the tokenizer of {run['policy']} (--tokenizer)"
        )
    return chat


class _Texts:
    """The public conversation of a window, from the log and its texts."""

    def __init__(self, root: Path, chat: Any):
        self.root, self.chat = root, chat

    def of(self, events: Sequence[Mapping[str, Any]], windows: Sequence[Stream], number: int) -> list[dict[str, Any]]:
        """Messages as other trainers take them."""
        run = events[0]
        said: list[dict[str, Any]] = [
            {"role": "system", "content": run["system"]}, {"role": "user", "content": run["user"]},
        ]  # fmt: skip
        if number:
            bridge = next(e for e in windows[number - 1].events if e["event"] == "compact")["bridge"]
            said.append({"role": "user", "content": self._blob(bridge)})
        reads, calls = 0, iter(())
        for place, event in enumerate(windows[number].events):
            if event["event"] == "turn":
                named = [
                    {"id": call["id"] or f"call_{event['turn']}_{index}", "type": "function",
                     "function": {"name": call["name"], "arguments": call["arguments"]}}
                    for index, call in enumerate(event["calls"])
                ]  # fmt: skip
                calls = iter(named)
                said.append({"role": "assistant", "content": event["text"], **({"tool_calls": named} if named else {})})
            elif event["event"] == "tool":
                reads += bool(event["ok"] and event["document"])
                content = self._blob(event["result"]) + self._reminder(windows[number].events[place + 1 :], reads)
                identifier = next(calls)["id"]
                said.append({"role": "tool", "name": event["name"], "tool_call_id": identifier, "content": content})
            elif event["event"] == "note":
                said.append({"role": "user", "content": event["text"]})
        return said

    def _reminder(self, following: Sequence[Mapping[str, Any]], reads: int) -> str:
        """The reminder that the last result of a turn carried, as the next prompt shows."""
        if not following or following[0]["event"] not in ("turn", "reject"):
            return ""
        shown = self.chat.decode(following[0]["append_ids"])
        texts = [memo_reminder(reads, forced) for forced in (True, False)]
        return next((text for text in texts if self.chat.neutral(text).strip() in shown), "")

    def _blob(self, sha256: str) -> str:
        return (self.root / "blobs" / sha256).read_text(encoding="utf-8")


def by_trajectory(rows: Iterable[WindowRow]) -> dict[str, list[WindowRow]]:
    """Rows by rollout, windows in order."""
    found: dict[str, list[WindowRow]] = {}
    for row in rows:
        found.setdefault(row.trajectory_id, []).append(row)
    return {name: sorted(group, key=lambda row: row.window) for name, group in found.items()}
