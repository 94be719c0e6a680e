"""Documents in, training rows out: what `still data` does.

Documents are cut to contexts and repeated ones dropped; a model writes questions about each; sentences are edited
where a question asks for it; the base model answers with the full context; what it also answers without the context
is dropped. Every reply and every answered context goes into a journal at once, so a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..provenance import provenance
from .answers import Answerer
from .config import DataConfig
from .dedup import holds, normalise, unique
from .documents import Context, cut, held_out_names, read_documents
from .journal import Journal, write_atomically
from .questions import Asked, parse, prompt
from .rendering import Renderer
from .writers import BaseWriter, ServerWriter, Writer

ROWS_IN_SHARD = 1000
FREE = ("endpoint", "concurrency", "retries", "timeout", "device")
"""Settings that may change between a run and its continuation: they change no row."""


@dataclass(frozen=True)
class Made:
    """What a run of `generate` left on disk.

    Attributes:
        rows: rows by split.
        turns: questions by split.
        dropped: what was left out, by reason.
        failed: requests without a reply; running again sends them again.
        path: the folder.
    """

    rows: dict[str, int]
    turns: dict[str, int]
    dropped: dict[str, int]
    failed: dict[str, str]
    path: Path


def generate(
    documents: str | Path,
    output: str | Path,
    base: Any,
    config: DataConfig,
    writer: Writer | None = None,
    progress: bool = True,
) -> Made:
    """Make training rows from a folder of documents.

    Args:
        documents: a file or folder.
        output: folder for the rows; a killed run's folder is continued.
        base: a `still.models.LoadedModel`: the model that answers, and that is compacted later.
        config: see `DataConfig`.
        writer: who writes the questions; default: the server that `config` names, else the base.
        progress: show progress bars.

    Returns:
        Counts of what was made and of what was dropped.

    Raises:
        ValueError: `output` holds rows made with other settings, the server refuses requests, or nothing is left.
    """
    output, renderer = Path(output), Renderer(base.tokenizer)
    dropped: Counter[str] = Counter()
    found, unread = read_documents(documents)
    dropped.update(unread)
    plan = {"model": base.name, "fingerprint": _fingerprint(base.model), **asdict(config)}
    _check_plan(output, plan)

    apart = held_out_names(found, config.held_out, config.seed)
    contexts = []
    for length in config.context_tokens:
        cuts = []
        for split in ("train", "validation"):
            chosen = [doc for doc in found if (doc.name in apart) == (split == "validation")]
            cuts += cut(chosen, length, renderer, split, dropped)
        # Over both splits, so that no validation context repeats a training one.
        contexts += unique(((context.text, context) for context in cuts), config.near, dropped)
    write_atomically(output / "plan.json", json.dumps(plan, indent=2) + "\n")

    replies = Journal(output / "journal" / "replies.jsonl")
    wanted = {context.id: prompt(context, config.questions) for context in contexts if context.id not in replies}
    failed: dict[str, str] = {}
    if wanted:
        writer = writer or (ServerWriter(config) if config.endpoint else BaseWriter(base.model, renderer))
        with tqdm(
            total=len(contexts), initial=len(contexts) - len(wanted), desc="questions", disable=not progress
        ) as bar:

            def done(id_: str, reply: str) -> None:
                replies.add(id_, reply=reply)
                bar.update()

            failed = writer.write(wanted, done)

    answered = Journal(output / "journal" / "answers.jsonl")
    answerer = Answerer(base.model, renderer, config.answer_tokens, config.seed)
    rows: dict[str, list[dict]] = {"train": [], "validation": []}
    for context in tqdm(contexts, desc="answers", disable=not progress):
        if context.id not in replies:
            dropped["request_failed"] += 1
            continue
        reply = replies[context.id]["reply"]
        # Of the split too: where documents were added it may have changed, and what is scored is answered greedily.
        digest = hashlib.sha256(f"{context.split} {reply}".encode()).hexdigest()[:16]
        if context.id not in answered or answered[context.id]["reply"] != digest:
            answered.add(context.id, reply=digest, **_answer(context, reply, answerer, renderer, config))
        record = answered[context.id]
        dropped.update(record["dropped"])
        if record["row"] is None:
            dropped["context_without_turns"] += 1
        else:
            rows[context.split].append(record["row"])
    return _write(output, rows, dropped, failed, plan, config, base)


def _answer(context: Context, reply: str, answerer: Answerer, renderer: Renderer, config: DataConfig) -> dict[str, Any]:
    """The row of a context, or None when no turn is left, and what was dropped on the way."""
    dropped: Counter[str] = Counter()

    def tokens(some: Context) -> int:
        return len(renderer.context(list(some.parts)))

    edited, asked = parse(reply, context, config.questions, dropped, tokens)
    edited = replace(edited, tokens=tokens(edited))
    questions = [one.question for one in asked]
    temperature = config.temperature if context.split == "train" else 0.0
    turns = []
    if questions:
        full = answerer.with_context(renderer.context(list(edited.parts)), questions, temperature)
        bare = answerer.without_context(questions)
        for one, answer, guess in zip(asked, full, bare, strict=True):
            reason = _flaw(one, answer, guess)
            if reason:
                dropped[reason] += 1
            else:
                turns.append(
                    {
                        "question": one.question,
                        "answer": answer.text,
                        "kind": one.kind,
                        "reference": one.reference,
                        "agrees": holds(answer.text, one.reference),
                    }
                )
    row = {
        "id": context.id,
        "context": [{"name": name, "text": text} for name, text in edited.parts],
        "turns": turns,
        "source": ", ".join(name for name, _ in context.parts),
        "split": context.split,
        "tokens": edited.tokens,
        "length": context.length,
    }
    return {"row": row if turns else None, "dropped": {reason: n for reason, n in dropped.items() if n}}


def _flaw(asked: Asked, answer, guess) -> str:
    """Why a turn cannot be trained on; an empty string if it can."""
    if not normalise(answer.text):
        return "answer_empty"
    if not answer.ended:
        return "answer_too_long"
    if normalise(guess.text) == normalise(answer.text) or holds(guess.text, asked.reference):
        return "answered_without_context"
    if asked.kind == "edit" and not holds(answer.text, asked.reference):
        return "edit_not_followed"
    return ""


def _check_plan(output: Path, plan: dict) -> None:
    if not (output / "plan.json").exists():
        return
    before = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    changed = [name for name in plan if name not in FREE and before.get(name) != plan[name]]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)!r} -> {plan[name]!r}" for name in changed)
        raise ValueError(f"{output} was made with other settings ({shown}); give another output folder")


def _fingerprint(model) -> str:
    from ..compactor import fingerprint

    return fingerprint(model)


def _write(output: Path, rows, dropped, failed, plan, config, base) -> Made:
    shards = {}
    for split, made in rows.items():
        count = -(-len(made) // ROWS_IN_SHARD)
        for index in range(count):
            lines = [json.dumps(row, ensure_ascii=False) for row in made[index * ROWS_IN_SHARD :][:ROWS_IN_SHARD]]
            text = "\n".join(lines) + "\n"
            name = f"{split}-{index:05d}-of-{count:05d}.jsonl"
            write_atomically(output / name, text)
            shards[name] = {"rows": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    for split in rows:
        for old in output.glob(f"{split}-*.jsonl"):
            if old.name not in shards:
                old.unlink()
    turns = {split: sum(len(row["turns"]) for row in made) for split, made in rows.items()}
    counts = {split: len(made) for split, made in rows.items()}
    dropped = {reason: n for reason, n in sorted(dropped.items()) if n}
    kinds = Counter(turn["kind"] for made in rows.values() for row in made for turn in row["turns"])
    manifest = {
        "rows": counts,
        "turns": turns,
        "kinds": dict(sorted(kinds.items())),
        "dropped": dropped,
        "shards": shards,
        "provenance": provenance(config, config.seed, base.model.device, model=base.name, plan=plan),
    }
    write_atomically(output / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    if failed and len(failed) == dropped.get("request_failed") and not any(counts.values()):
        raise ValueError(f"no request got a reply; the first says: {next(iter(failed.values()))}")
    if not any(counts.values()):
        why = ", ".join(f"{reason} {n}" for reason, n in dropped.items())
        raise ValueError(f"no row is left ({why}); {output / 'manifest.json'} counts what was dropped")
    return Made(counts, turns, dropped, failed, output)
