"""One episode as one HTML page that needs nothing else: what was read, what crossed each boundary, what was judged.

Everything that a document, a model or a judge wrote is escaped; the page has no script and loads nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .figures import size
from .page import STYLE as SHARED
from .probe import read_private
from .runs import RunFolder, metrics, read_run

STYLE = SHARED + """
nav a { margin-right: .9rem; } .window { border-left: 3px solid var(--line); padding-left: 1rem; margin: 1.6rem 0; }
.turn { margin: .7rem 0; } .turn > b { margin-right: .5rem; } .tag { font-size: 12px; padding: .05rem .45rem;
  border: 1px solid var(--line); border-radius: 1rem; margin-right: .3rem; white-space: nowrap; }
.bad { color: #b42318; border-color: #b42318; } .good { color: #1a7f37; } pre { white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto; } .boundary { background: #fff7f3; padding: .8rem 1rem;
  border: 1px solid #f0c4b0; margin: 1.2rem 0; } .bar { display: flex; height: 14px; max-width: 46rem;
  background: var(--soft); margin: .2rem 0; } .bar i { display: block; height: 14px; } .b1 { background: #8a8f98; }
.b2 { background: #d1410c; } .b3 { background: #9ec5e8; } details { margin: .25rem 0; } summary { cursor: pointer; }
td.why { white-space: normal; max-width: 28rem; } .why { text-align: left; }
.key { display: inline-block; width: 9px; height: 9px; margin-right: .3rem; }
"""
PARTS = ("base", "compacted", "raw")
"""Of a window's size, as the bars stack them."""


def trace_page(root: str | Path) -> str:
    """The page of a run folder, finished or not; verdicts and the ledger are shown where they are there.

    Raises:
        FileNotFoundError: there is no event log.
        RunError: the log, or a text that it names, is damaged.
    """
    folder, events = RunFolder(root, make=False), read_run(root)
    scores = _json(folder.root / "scores.json")
    run, facts = events[0], metrics(events)
    title = f"{run['task']} · {run['backend']}"
    body = [f"<h1>{escape(title)}</h1>", *_summary(events, facts, scores)]
    windows = 1 + sum(event["event"] == "compact" for event in events)
    links = "".join(f'<a href="#w{number}">window {number}</a>' for number in range(windows))
    body.append(f'<nav>{links}<a href="#reads">documents</a><a href="#verdicts">verdicts</a></nav>')
    body += ["<h2>Assignment</h2>", _fold("system", run["system"]), f"<pre>{escape(run['user'])}</pre>"]
    body += _windows(folder, events, {record["window"]: record for record in read_private(root)})
    body += _reads(run, events)
    body += _outputs(folder)
    body += _verdicts(scores)
    provenance = {key: run.get(key) for key in ("run_id", "policy", "backend", "window_tokens", "reserve", "config")}
    body.append("<h2>Settings</h2>" + _fold("config", json.dumps(provenance, indent=1, ensure_ascii=False)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def find_runs(path: str | Path) -> list[Path]:
    """Run folders at or below a path, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    found = []
    for here, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name != "workspace"]  # an agent's own, of any depth
        found += [Path(here)] if "events.jsonl" in files else []
    if not found:
        raise FileNotFoundError(f"{path} holds no run: there is no events.jsonl in it or below it")
    return sorted(found)


def _summary(events: Sequence[dict], facts: dict, scores: dict | None) -> Iterator[str]:
    run, ours = events[0], facts["still"]
    end = events[-1] if events[-1]["event"] == "end" else None
    state = "not finished" if end is None else end["stop"] if end["stop"] == "done" else f"stopped ({end['stop']})"
    peak = ours["peak_compacted_bytes"]
    held = "an unknown number of bytes" if peak is None else escape(size(peak))
    read = f"{ours['characters_read']:,} of {ours['characters_available']:,} characters"
    yield (
        f'<p class="lead">{escape(run["policy"])}: {escape(state)}; {facts["documents_read"]} of '
        f"{facts['total_documents']} documents opened, {read} read; {facts['turn_count']} turns in {ours['windows']} "
        f"windows, {100 * ours['forced_or_repaired']:.1f} % of them forced or repaired by the harness; at most "
        f"{held} ({ours['peak_compacted_tokens']:,} entries) held.</p>"
    )
    if scores:
        passed, total = scores.get("n_passed", 0), scores.get("n_criteria", 0)
        kind = "good" if scores.get("all_pass") else "bad"
        yield f'<p class="lead"><b class="{kind}">{passed} of {total} criteria pass.</b></p>'
    for event in events:
        if event["event"] == "error":
            yield f'<p class="bad">It broke once, and went on: {escape(event["error"])}</p>'


def _windows(folder: RunFolder, events: Sequence[dict], private: dict[int, dict]) -> Iterator[str]:
    number, before = 0, {}
    yield '<h2>Window by window</h2><div class="window" id="w0"><h3>window 0</h3>'
    for event in events:
        kind = event["event"]
        if kind in ("turn", "reject"):
            yield _turn(event)
        elif kind == "tool":
            yield _tool(folder, event)
        elif kind == "note":
            tag = f'<span class="tag">{escape(event["why"])}</span>'
            yield f'<p class="turn"><b>harness</b>{tag}{escape(event["text"])}</p>'
        elif kind == "compact":
            number += 1
            yield "</div>" + _boundary(folder, event, private.get(number), before)
            before = private.get(number) or before
            yield f'<div class="window" id="w{number}"><h3>window {number}</h3>'
        elif kind == "submit":
            names = ", ".join(f"{each['name']} ({each['bytes']:,} bytes)" for each in event["files"]) or "nothing"
            missing = f'<span class="tag bad">missing: {escape(", ".join(event["missing"]))}</span>'
            yield f'<p class="turn"><b>hands in</b>{escape(names)} {missing if event["missing"] else ""}</p>'
    yield "</div>"


def _turn(event: dict) -> str:
    tags = [event.get("kind", "rejected")]
    cost = f"{event['output_tokens']:,} tokens, {event['seconds']:.2f} s, prompt {event['prompt_tokens']:,}"
    bad = [word for word, there in (
        ("forced", event["forced"]), ("repaired", event["repaired"]), ("cut", event["finish"] == "length"),
        (f"rejected: {event.get('reason', '')}", event["event"] == "reject"), (event["problem"], event["problem"]),
    ) if there]  # fmt: skip
    shown = "".join(f'<span class="tag">{escape(word)}</span>' for word in tags)
    shown += "".join(f'<span class="tag bad">{escape(word)}</span>' for word in bad)
    lines = [f'<div class="turn"><b>turn {event["turn"]}</b>{shown}<span class="faint">{cost}</span>']
    if event["text"]:
        lines.append(f"<pre>{escape(event['text'])}</pre>")
    for call in event["calls"]:
        lines.append(_call(call))
    return "".join([*lines, "</div>"])


def _call(call: dict) -> str:
    try:
        given = json.loads(call["arguments"])
        path = str(given.get("path") or given.get("pattern") or given.get("command") or "")
        text = given.get("content") if isinstance(given.get("content"), str) else call["arguments"]
    except (ValueError, AttributeError, RecursionError):
        path, text = "", call["arguments"]
    return _fold(f"{call['name']} {path}"[:200], text)


def _tool(folder: RunFolder, event: dict) -> str:
    problem = event["rule"] or event["problem"]
    tag = f'<span class="tag bad">{escape(problem)}</span>' if problem else ""
    part = ""
    if event["document"]:
        end = event["start"] + event["document_characters"]
        part = f"{event['document']}, characters {event['start']:,} to {end:,} of {event['total']:,}; "
    head = f"{part}{event['tokens']:,} tokens"
    return f'<div class="turn"><b>{escape(event["name"])}</b>{tag}{_fold(head, folder.text(event["result"]))}</div>'


def _boundary(folder: RunFolder, event: dict, found: dict | None, before: dict) -> str:
    artifact, tags = event["artifact"], [event["trigger"]]
    tags += ["forced"] * event["forced"] + [event["degraded"]] * bool(event["degraded"])
    shown = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
    lines = [f'<div class="boundary"><h3>boundary {event["window"] + 1}: {escape(artifact["kind"])}</h3>{shown}']
    most = max(1, *(sum(event[when][part] for part in PARTS) for when in ("before", "after")))
    for words, place in (("before", event["before"]), ("after", event["after"])):
        total = sum(place[name] for name in PARTS)
        lines.append(
            f"<div>{words}: {total:,} entries: <i class='key b1'></i>{place['base']:,} base, "
            f"<i class='key b2'></i>{place['compacted']:,} compacted ({escape(size(place['compacted_bytes']))}), "
            f"<i class='key b3'></i>{place['raw']:,} raw</div>{_bar(place, most)}"
        )
    lines.append(
        f'<p class="faint">{event["seconds"]:.3f} s, {event["decoded_tokens"]:,} tokens decoded for the memo, '
        f"{event['attempts']} rejected, {event['prefill_tokens']:,} tokens read again</p>"
    )
    if found:
        lines += _moves(found, before)
    text = folder.text(artifact["text"])
    if text:
        lines.append(_fold(f"what crossed as text ({artifact['tokens']:,} entries in all)", text, is_open=True))
    lines.append(_fold("the bridge", folder.text(event["bridge"])))
    return "".join([*lines, "</div>"])


def _bar(place: dict, most: int) -> str:
    parts = [f'<i class="b{n}" style="width:{100 * place[name] / most:.2f}%"></i>' for n, name in enumerate(PARTS, 1)]
    return f'<div class="bar">{"".join(parts)}</div>'


def _moves(found: dict, before: dict) -> Iterator[str]:
    for kind, words in (("written", "the text says"), ("answered", "the model answers")):
        if found[kind] is not None:
            now, then = set(found[kind]), set(before.get(kind) or ())
            up, down = ", ".join(sorted(now - then)) or "none", ", ".join(sorted(then - now)) or "none"
            yield (
                f"<div>{words} {len(now)} criteria: <span class='good'>acquired {escape(up)}</span>, "
                f"<span class='{'bad' if then - now else 'faint'}'>lost {escape(down)}</span></div>"
            )


def _reads(run: dict, events: Sequence[dict]) -> Iterator[str]:
    rows = []
    for document in run["documents"]:
        tools = [e for e in events if e["event"] == "tool" and e["ok"] and e["document"] == document["name"]]
        read = sum(each["document_characters"] for each in tools)
        windows = ", ".join(str(number) for number in dict.fromkeys(each["window"] for each in tools))
        rows.append([document["name"], f"{read:,} of {document['characters']:,}", windows, document.get("error", "")])
    yield '<h2 id="reads">Documents</h2>' + _table(["document", "characters read", "in window", "error"], rows)


def _outputs(folder: RunFolder) -> Iterator[str]:
    files = sorted(path for path in folder.output.rglob("*") if path.is_file()) if folder.output.is_dir() else []
    if files:
        yield "<h2>Handed in</h2>"
    for path in files:
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = f"{len(data):,} bytes that are no text"
        yield _fold(path.relative_to(folder.output).as_posix(), text, is_open=len(text) < 4000)


def _verdicts(scores: dict | None) -> Iterator[str]:
    yield '<h2 id="verdicts">Verdicts</h2>'
    if not scores:
        yield "<p>Not judged yet: <code>still grade</code> does that.</p>"
        return
    rows = "".join(
        f"<tr><td>{escape(str(each['id']))}</td><td class='{'good' if each['verdict'] == 'pass' else 'bad'}'>"
        f"{escape(str(each['verdict']))}</td><td class='why'>{escape(str(each['title']))}</td>"
        f"<td class='why'>{escape(str(each.get('reasoning') or ''))}</td></tr>"
        for each in scores.get("criteria_results", ())
    )
    head = "<th>id<th>verdict<th class='why'>criterion<th class='why'>reason"
    yield f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _fold(head: str, text: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(head)}</summary><pre>{escape(text)}</pre></details>"


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
