"""Run folders: an append-only event log that a killed run resumes from, and LAB's own files beside it.

    RUN/events.jsonl        one event a line, only ever appended; the schema is below
    RUN/blobs/SHA256        texts and files that events name by hash
    RUN/artifacts/          slots at each boundary, safetensors
    RUN/workspace/          the agent's working directory
    RUN/output/             its deliverables, copied when it submits: what a grader reads
    RUN/config.json, metrics.json, transcript.jsonl     as LAB writes them
    RUN/.lock               empty; locked by the process that plays the run, as long as it does

Every event has `event` (its kind), `n` (its number in the file) and `time` (UTC). Kinds, in the order they occur:

    run      schema, run_id, task, backend, policy, window_tokens, bytes_per_token, config, tools, system, user,
             documents [{name, sha256, characters, tokens}], base_ids, provenance
    turn     turn, window, kind action|memo|draft|final, forced, repaired, text, calls [{name, arguments, id}], finish,
             problem, append_ids, output_ids, logprobs, margin, prompt_tokens, output_tokens, seconds, cost, version
    reject   a turn that was sampled again: the same, and attempt, reason. Never trained on
    tool     turn, window, index, name, arguments, ok, rule, problem, result (sha256 of a blob), characters, tokens,
             document, start, document_characters, truncated, seconds; `files` {path: [sha256 of a blob, bytes]}, all of
             the agent's files, where the call changed them
    note     turn, why memo|nudge|review, text: a user message by the harness
    compact  window, trigger, forced, degraded, attempts, artifact {kind, path, text (sha256 of a blob), sha256, tokens,
             nbytes, details}, before and after {base, compacted, raw, compacted_bytes}, seconds, decoded_tokens,
             prefill_tokens, pending_ids, bridge (sha256 of a blob), read [[name, window, characters]], files
    submit   files [{name, sha256, bytes}], missing
    error    turn, error: the run stopped and can go on
    end      status done|stopped, stop, totals

`rule` names the harness rule that answered a call in place of its tool, and is empty where the tool answered:
one_read, memo_due, deferred, memo_empty, memo_over, syntax. `problem` is the tool's own (`tools.PROBLEMS`). `repaired`
marks a turn that the harness issued again after a compaction; `forced` one that answers a note which demanded a memo.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from .confined import Confined, empty

SCHEMA = 1


class RunError(ValueError):
    """A run folder that cannot be gone on with."""


class EventLog:
    """The events of one run: those of an earlier start are replayed first, then new ones are appended.

    Args:
        path: the JSONL file.
    """

    def __init__(self, path: Path):
        self.path, self.is_open = path, False
        self.events: list[dict[str, Any]] = []
        self._next, self._count, self._file, self._lock = 0, 0, None, None

    def open(self) -> None:
        """Keep other processes away until `close`, and read what an earlier start left.

        A torn last line, from a run that was killed while it wrote, is cut off.

        Raises:
            RunError: another process plays this run, or a line other than the last is damaged.
        """
        self._lock = _locked(self.path.with_name(".lock"))
        every, whole = _read_events(self.path)
        if self.path.exists() and self.path.stat().st_size > whole:
            os.truncate(self.path, whole)
        self.events = [event for event in every if event["event"] != "error"]
        self._count, self.is_open = len(every), True

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The next event of the earlier start, or None once all were replayed."""
        return self.events[self._next] if self._next < len(self.events) else None

    def expect(self, *kinds: str) -> dict[str, Any] | None:
        """The next recorded event, which must be of one of these kinds, or None once all were replayed.

        Raises:
            RunError: the earlier start recorded another kind of event here, so it was another run.
        """
        recorded = self.recorded
        if recorded is not None and recorded["event"] not in kinds:
            raise RunError(
                f"{self.path} goes on with a {recorded['event']!r} event where this run has {kinds[0]!r}: it was made "
                f"by other code or other settings; give another output folder"
            )
        return recorded

    def commit(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append an event, or, while replaying, go past the recorded one; raises as `expect` does."""
        recorded = self.expect(event)
        if recorded is not None:
            self._next += 1
            return recorded
        record = {"event": event, "n": self._count, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = json.dumps({**record, **fields}, ensure_ascii=False, separators=(",", ":")) + "\n"
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        start, data = os.fstat(self._file.fileno()).st_size, line.encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:  # a full disk: no half event stays
            os.truncate(self.path, start)
            raise
        self._count += 1
        return {**record, **fields}

    def close(self) -> None:
        """Close the file, and let other processes have the run."""
        for file in filter(None, (self._file, self._lock)):
            file.close()
        self._file = self._lock = None
        self.is_open = False


class RunFolder:
    """One run on disk.

    Args:
        root: made if it is not there.
        make: whether to make it; not so for readers.
    """

    def __init__(self, root: str | Path, make: bool = True):
        self.root = Path(root)
        self.workspace, self.artifacts = self.root / "workspace", self.root / "artifacts"
        self.output, self.blobs = self.root / "output", self.root / "blobs"
        for folder in (self.workspace, self.artifacts, self.blobs) if make else ():
            folder.mkdir(parents=True, exist_ok=True)
        if make:
            self.confined = Confined(self.workspace)

    @property
    def events(self) -> Path:
        """The event log."""
        return self.root / "events.jsonl"

    def keep(self, data: str | bytes) -> str:
        """Store a text or a file's bytes by content; returns its sha256."""
        data = data.encode() if isinstance(data, str) else data
        name = hashlib.sha256(data).hexdigest()
        path = self.blobs / name
        if not path.exists() or path.stat().st_size != len(data):
            write_atomically(path, data)
        return name

    def text(self, sha256: str) -> str:
        """A stored text.

        Raises:
            RunError: it is missing or damaged.
        """
        return self.data(sha256).decode()

    def data(self, sha256: str) -> bytes:
        """Stored bytes; raises as `text` does."""
        path = self.blobs / sha256
        data = path.read_bytes() if path.is_file() else None
        if data is None or hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(f"{path} is {'missing' if data is None else 'damaged'}; start the run in another folder")
        return data

    def snapshot(self) -> dict[str, list]:
        """Every file that the agent has, by path: sha256 and size. The bytes are stored by content."""
        found = {}
        for name, size in self.confined.files():
            if not name.startswith("documents/"):
                found[name] = [self.keep(self.confined.read(tuple(name.split("/")), 1 << 32)), size]
        return found

    def restore(self, files: Mapping[str, Sequence]) -> None:
        """Put the workspace back to a snapshot: what ran but was never committed leaves no trace, here or beside it."""
        for folder in (self.artifacts, self.blobs):
            for partial in folder.glob(".*.tmp"):
                partial.unlink()
        empty(self.workspace)
        if "output" not in files:
            self.workspace.joinpath("output").mkdir()
        for name, (sha256, _) in files.items():
            self.confined.write(tuple(name.split("/")), self.data(sha256))

    def submit(self) -> list[dict[str, Any]]:
        """Copy the workspace's deliverables to `output/` and name them."""
        partial = self.root / ".output.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, _ in self.confined.files():
            if name.startswith("output/"):
                parts = tuple(name.split("/"))
                write_atomically(partial.joinpath(*parts[1:]), self.confined.read(parts, 1 << 32))
        shutil.rmtree(self.output, ignore_errors=True)
        partial.replace(self.output)
        files = sorted(path for path in self.output.rglob("*") if path.is_file())
        return [
            {"name": path.relative_to(self.output).as_posix(), "sha256": sha256_of(path), "bytes": path.stat().st_size}
            for path in files
        ]

    def claim(self, run: dict[str, Any], config: Callable[[], dict[str, Any]]) -> None:
        """Write LAB's `config.json`, or check that the one there is of the same run.

        Args:
            run: what runs must have in common, `still.run` of the file.
            config: makes the file's content, where there is none yet.

        Raises:
            RunError: the folder holds a run with other settings.
        """
        path = self.root / "config.json"
        if not path.exists():
            write_atomically(path, json.dumps(config(), indent=2, ensure_ascii=False).encode() + b"\n")
            return
        there = json.loads(path.read_text(encoding="utf-8")).get("still", {}).get("run", {})
        ours = json.loads(json.dumps(run))
        other = [f"{key} {there.get(key)!r}, not {value!r}" for key, value in ours.items() if there.get(key) != value]
        if other:
            raise RunError(f"{self.root} holds a run with {'; '.join(other)}: give another output folder")

    def check_documents(self, recorded: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> None:
        """Refuse documents other than those that the run was begun with; what an old log does not say is not compared.

        Args:
            recorded: the `documents` of the run's first event.
            now: the same of the documents as they are: name, sha256, characters.

        Raises:
            RunError: some were changed, added or taken away.
        """
        then, here = ({each["name"]: each for each in every} for every in (recorded, now))
        other = {
            "added": here.keys() - then.keys(),
            "gone": then.keys() - here.keys(),
            "other text": {
                name for name in then.keys() & here.keys()
                if any(then[name].get(key, here[name][key]) != here[name][key] for key in ("sha256", "characters"))
            },
        }  # fmt: skip
        if any(other.values()):
            said = "; ".join(f"{what}: {_first_of(names)}" for what, names in other.items() if names)
            raise RunError(
                f"{self.root} holds a run over other documents ({said}): give another output folder, or put the old "
                f"documents back, and the readers that gave their text; the run is kept as it is"
            )

    def write_lab_files(self, events: list[dict[str, Any]]) -> None:
        """Write LAB's `transcript.jsonl` and `metrics.json` from the events alone."""
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._transcript(events))
        write_atomically(self.root / "transcript.jsonl", lines.encode())
        write_atomically(self.root / "metrics.json", json.dumps(metrics(events), indent=2).encode() + b"\n")

    def _transcript(self, events: list[dict[str, Any]]):
        for event in events:
            if event["event"] == "turn":
                yield {
                    "turn": event["turn"],
                    "role": "assistant",
                    "text": event["text"],
                    "tool_calls": [{"name": c["name"], "arguments": c["arguments"]} for c in event["calls"]],
                    "input_tokens": event["prompt_tokens"],
                    "output_tokens": event["output_tokens"],
                }
            elif event["event"] == "tool":
                yield {
                    "turn": event["turn"],
                    "role": "tool",
                    "tool_name": event["name"],
                    "arguments": event["arguments"],
                    "result_preview": self.text(event["result"])[:500],
                }


def metrics(events: list[dict[str, Any]]) -> dict[str, Any]:
    """LAB's metrics of a run, and under `still` what LAB has no key for, from its events; None is not known."""
    run = events[0]
    turns = [event for event in events if event["event"] == "turn"]
    tools = [event for event in events if event["event"] == "tool"]
    compacts = [event for event in events if event["event"] == "compact"]
    sampled = turns + [event for event in events if event["event"] == "reject"]
    end = events[-1] if events[-1]["event"] == "end" else None
    opened: dict[str, int] = {}
    for tool in tools:
        if tool["ok"] and tool["document"]:
            opened[tool["document"]] = opened.get(tool["document"], 0) + tool["document_characters"]
    names = [document["name"] for document in run["documents"]]
    available = {document["name"]: document["characters"] for document in run["documents"]}
    held = max((event["after"]["compacted"] for event in compacts), default=0)
    held_bytes = max((event["after"]["compacted_bytes"] for event in compacts), default=0)
    ran = [tool for tool in tools if tool["ok"]]
    written = [tool for tool in ran if tool["name"] == "write"]
    assisted = sum(turn["forced"] or turn["repaired"] for turn in turns)
    costs = [turn["cost"] for turn in sampled if turn["cost"] is not None]
    return {
        "turn_count": len(turns),
        "input_tokens": sum(turn["prompt_tokens"] for turn in sampled),
        "output_tokens": sum(turn["output_tokens"] for turn in sampled),
        "wall_clock_seconds": _seconds(events),
        "finished_cleanly": end is not None and end["status"] == "done",
        "documents_read": len(opened),
        "documents_read_list": [name for name in names if name in opened],
        "documents_skipped": len(names) - len(opened),
        "documents_skipped_list": [name for name in names if name not in opened],
        "total_documents": len(names),
        "bash_commands": sum(tool["name"] == "bash" for tool in ran),
        "files_written": len(written),
        "files_edited": sum(tool["name"] == "edit" for tool in ran),
        "glob_searches": sum(tool["name"] == "glob" for tool in ran),
        "grep_searches": sum(tool["name"] == "grep" for tool in ran),
        "completed_at": end["time"] if end else None,
        "still": {
            "stop": end["stop"] if end else None,
            "windows": len(compacts) + 1,
            "forced_or_repaired": assisted / len(turns) if turns else 0.0,
            "rejected": len(sampled) - len(turns),
            "tool_errors": sum(not tool["ok"] for tool in tools),
            "characters_available": sum(available.values()),
            "characters_read": sum(min(count, available.get(name, count)) for name, count in opened.items()),
            "characters_read_again": sum(max(0, count - available.get(name, count)) for name, count in opened.items()),
            "peak_compacted_tokens": held,
            "peak_compacted_bytes": None if held and run["bytes_per_token"] is None else held_bytes,
            "peak_context": max((turn["prompt_tokens"] + turn["output_tokens"] for turn in sampled), default=0),
            "compaction_seconds": [event["seconds"] for event in compacts],
            "compaction_decoded_tokens": [event["decoded_tokens"] for event in compacts],
            "degraded": sum(bool(event["degraded"]) for event in compacts),
            "close_margins": sum(turn["margin"] is not None and turn["margin"] < 1e-3 for turn in turns),
            "cost": sum(costs) if costs else None,
        },
    }


def read_run(root: str | Path) -> list[dict[str, Any]]:
    """The events of a run, finished or not.

    Raises:
        FileNotFoundError: there is no event log.
        RunError: a line is damaged.
    """
    path = Path(root) / "events.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{root} holds no run: there is no events.jsonl")
    return _read_events(path)[0]


def _read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Events, and the bytes up to the end of the last whole line."""
    events, whole = [], 0
    if not path.exists():
        return events, 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            events.append(json.loads(line))
        except ValueError as problem:
            if number < len(lines) - 1:
                raise RunError(f"line {number + 1} of {path} is damaged ({problem}); start in another folder") from None
            break
        whole += len(line)
    return events, whole


def _locked(path: Path) -> IO[str] | None:
    """A file that no other holds until it is closed, by us or, where we are killed, by the kernel.

    None where there are no locks: on Windows, and on disks that refuse them or cannot be written.

    Raises:
        RunError: another one holds it.
    """
    try:
        import fcntl

        file = path.open("a")
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(
            f"{path.parent} is being played by another process: wait until it has ended, or give another output folder"
        ) from None
    except OSError:
        file.close()
        return None
    return file


def _first_of(names: Iterable[str], most: int = 5) -> str:
    some = sorted(names)
    return ", ".join(some[:most]) + (f" and {len(some) - most} more" if len(some) > most else "")


def _seconds(events: list[dict[str, Any]]) -> float:
    """Seconds of work: pauses between a kill and the next start do not count."""
    return sum(event.get("seconds") or 0.0 for event in events)


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{token_hex(4)}.tmp")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
