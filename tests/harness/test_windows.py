"""Runs become rows window by window: the loss on each window's own turns, prefixes behind slots, refusals."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
from agent_cases import Reader, call, make_task, of, play, texts, tiny_agent, tiny_agent_tokenizer
from trainer_cases import plain_row

from still import methods
from still.cli import main
from still.harness import row_files
from still.harness.policies.chat import ChatFormat
from still.harness.runs import read_run
from still.harness.types import MEMO
from still.harness.windows import IGNORE, KINDS, check_rows, flawed_turns, rows_of_run, streams


def run(root, backend="memo", player=None, documents=6, loaded=None, **settings):
    """Play a script; its run folder and its tokenizer."""
    loaded = loaded or (tiny_agent() if backend in ("kv", "hybrid", "memo_kv") else None)
    task = make_task(root, texts(documents, 80))
    settings = {"budget": "200t", "window": 6000, **settings}
    if backend in ("kv", "hybrid"):
        settings["method"] = methods.get("knorm")
    play(root, task, player or Reader(), loaded=loaded, backend=backend, **settings)
    return root / "run", loaded.tokenizer if loaded else tiny_agent_tokenizer()


def stream_of(events):
    ids = list(events[0]["base_ids"])
    for event in events:
        if event["event"] == "turn":
            ids += event["append_ids"] + event["output_ids"]
        if event["event"] == "compact":
            ids += event["pending_ids"]
    return ids


def test_m_memos_make_m_plus_one_rows_as_the_agent_saw_them(tmp_path):
    folder, tokenizer = run(tmp_path)
    rows, events = rows_of_run(folder, tokenizer), read_run(folder)
    memos = len(of(events, "compact"))
    assert memos == 2
    assert [row.window for row in rows] == [0, 1, 2] == list(range(rows[0].n_windows))
    check_rows(rows, tokenizer, max_tokens=6000)
    outputs = [[token for e in of(events, "turn") if e["window"] == w for token in e["output_ids"]] for w in range(3)]
    for row, sampled in zip(rows, outputs, strict=True):
        assert [token for token in row.labels if token != IGNORE] == sampled
        assert row.prefix_ids == [] == row.prefix_plan
        assert row.is_last == (row.window == 2)
        text = tokenizer.decode(row.input_ids)
        assert ("[BRIDGE" in text) == (row.window > 0)  # raw reads in window 0, the bridge first afterwards
        assert row.input_ids[: len(events[0]["base_ids"])] == events[0]["base_ids"]
    assert [KINDS["memo"] in row.token_kind for row in rows] == [True, True, False]
    assert KINDS["draft"] in rows[2].token_kind


def test_the_conversation_of_a_row_renders_to_its_tokens(tmp_path):
    folder, tokenizer = run(tmp_path)
    for row in rows_of_run(folder, tokenizer):
        said = json.loads(row.messages)
        chat = ChatFormat(tokenizer, json.loads(row.tools))
        rendered = tokenizer.apply_chat_template(
            [{**m, "content": chat.neutral(m["content"])} if m["role"] != "assistant" else _parsed(m) for m in said],
            tools=json.loads(row.tools), tokenize=False,
        )  # fmt: skip
        assert chat.encode(rendered)[: len(row.input_ids)] == row.input_ids


def _parsed(message):
    calls = [
        {**each, "function": {**each["function"], "arguments": json.loads(each["function"]["arguments"])}}
        for each in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("backend", ["kv", "hybrid", pytest.param("memo_kv", marks=pytest.mark.full)])
def test_behind_slots_prefixes_and_rows_tile_the_episode(tmp_path, backend):
    folder, tokenizer = run(tmp_path, backend)
    rows, events = rows_of_run(folder, tokenizer), read_run(folder)
    whole, base = stream_of(events), len(events[0]["base_ids"])
    assert len(rows) == 3
    for row in rows:
        place = len(row.prefix_ids)
        assert whole[:place] == row.prefix_ids
        assert whole[place : place + len(row.input_ids)] == row.input_ids
        assert [(step["start"], step["keep"]) for step in row.prefix_plan[:1]] == [(0, "exact")] * bool(row.window)
        ends = [step["end"] for step in row.prefix_plan]
        assert [step["start"] for step in row.prefix_plan] == [0, *ends[:-1]][: len(ends)]
        assert ends[-1:] == [place] * bool(row.window)
    held = [event["artifact"]["details"]["slots"] for event in of(events, "compact")]
    assert [step["slots"] for step in rows[2].prefix_plan] == [base, *held]
    assert rows[2].prefix_plan[1]["keep"] == {"kv": "append", "hybrid": "append", "memo_kv": "columns"}[backend]


class Careless(Reader):
    """Calls a tool where a memo is demanded, once, and writes to where nothing may be written."""

    def __init__(self):
        super().__init__(obeys=False)
        self.tried = self.wrote = False

    def __call__(self, seen, limit):
        if seen[-1].content.startswith("Write the memo now") and not self.tried:
            self.tried = True
            return call("read", path="documents/01.txt")
        if not self.wrote and len(seen) > 4:
            self.wrote = True
            return call("write", path="documents/01.txt", content="no")
        return super().__call__(seen, limit)


def test_rejected_memos_are_nowhere_and_mistakes_are_context(tmp_path):
    player = Careless()
    folder, tokenizer = run(tmp_path, player=player)
    events, rows = read_run(folder), rows_of_run(folder, tokenizer)
    rejected = of(events, "reject")
    assert rejected
    assert player.wrote
    every = rows_of_run(folder, tokenizer, train_on="all")
    turns = {span["turn"] for row in every for span in row.spans if not span["untrained"]}
    assert turns == {event["turn"] for event in of(events, "turn") if not event["repaired"]}
    row = next(row for row in every if row.window == rejected[0]["window"])
    text = tokenizer.decode(row.input_ids)
    again = tokenizer.decode(rejected[0]["output_ids"])
    assert text.count(again) == 1  # the first reading of that document, and not the rejected one
    mistaken = [span for row in rows for span in row.spans if span["untrained"] == "mistake"]
    assert len(mistaken) >= 1
    for row in rows:
        for span in row.spans:
            flags = {label != IGNORE for label in row.labels[span["start"] : span["end"]]}
            assert flags == {not span["untrained"]}


def test_a_memo_that_was_never_accepted_is_not_trained(tmp_path):
    class Stubborn(Reader):
        def __call__(self, seen, limit):
            if seen[-1].content.startswith("Write the memo now"):
                return call("read", path="documents/01.txt")
            return super().__call__(seen, limit)

    folder, tokenizer = run(tmp_path, player=Stubborn(obeys=False))
    spans = [span for row in rows_of_run(folder, tokenizer, train_on="all") for span in row.spans]
    failed = [span for span in spans if span["untrained"] == "failed memo"]
    assert len(failed) == len(of(read_run(folder), "compact"))
    assert {span["kind"] for span in failed} == {"memo"}


def test_a_superseded_draft_is_context_where_a_correction_followed(tmp_path):
    class Reviser(Reader):
        def __call__(self, seen, limit):
            message = super().__call__(seen, limit)
            rewritten = [m for m in seen if m.role == "tool" and '"better' in m.call.arguments]
            if message.content == "Done." and not rewritten:
                return call("write", path="output/memo.md", content="better")
            return message

    folder, tokenizer = run(tmp_path, backend="full", player=Reviser(), documents=1)
    turns = [event for event in of(read_run(folder), "turn") if event["kind"] == "draft"]
    first, again = [event for event in turns if "memo.md" in event["calls"][0]["arguments"]]
    (plain,) = rows_of_run(folder, tokenizer)
    (masked,) = rows_of_run(folder, tokenizer, corrected_at=[again["turn"]])
    assert not any(span["untrained"] for span in plain.spans)
    assert [s["turn"] for s in masked.spans if s["untrained"] == "superseded"] == [first["turn"]]
    assert masked.input_ids == plain.input_ids


def test_rows_are_saved_loaded_and_exported(tmp_path):
    folder, tokenizer = run(tmp_path / "kv", "kv")
    rows = rows_of_run(folder, tokenizer, round=3, score=0.5, teacher="scripted")
    row_files.save_dataset(rows, tmp_path / "data")
    row_files.write_rows(tmp_path / "rows.jsonl", rows)
    for found in (row_files.load_dataset(tmp_path / "data"), row_files.read_rows(tmp_path / "rows.jsonl")):
        for mine, theirs in zip(rows, found, strict=True):
            assert json.dumps(row_files._plain(replace(mine, logprobs=[]))) == json.dumps(
                row_files._plain(replace(theirs, logprobs=[]))
            )
            assert [math.isnan(x) for x in mine.logprobs] == [math.isnan(x) for x in theirs.logprobs]
    with pytest.raises(ValueError, match="no message can say"):
        list(row_files.messages(rows))
    folder, tokenizer = run(tmp_path / "memo")
    exported = list(row_files.messages(rows_of_run(folder, tokenizer), tokenizer))
    assert [m["role"] for m in exported[1]["messages"][:3]] == ["system", "user", "user"]
    assert all(m["train"] for each in exported for m in each["messages"] if m["role"] == "assistant")
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1]}\n')
    with pytest.raises(ValueError, match=r"line 1 .* no training row \(there is no column"):
        row_files.read_rows(tmp_path / "bad.jsonl")


def test_messages_are_refused_where_a_template_drops_earlier_thinking():
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "<think>hm</think>a"},
            {"role": "user", "content": "v"}, {"role": "assistant", "content": "b"}]  # fmt: skip
    keeps, drops = tiny_agent_tokenizer(), tiny_agent_tokenizer()
    drops.chat_template = keeps.chat_template.replace(
        "{{ message.content }}", "{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
    )
    ids = keeps(keeps.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"]
    row = plain_row(ids, range(2, 4), messages=json.dumps(said))
    row = replace(row, spans=[row.spans[0]] * 2)
    assert [m.get("train") for m in next(row_files.messages([row], keeps))["messages"]] == [None, True, None, True]
    with pytest.raises(ValueError, match="may drop earlier thinking"):
        list(row_files.messages([row], drops))


def test_what_would_train_nothing_or_another_thing_is_refused(tmp_path):
    folder, tokenizer = run(tmp_path)
    rows = rows_of_run(folder, tokenizer)
    nothing = replace(rows[0], labels=[IGNORE] * len(rows[0].input_ids))
    for bad, complaint in [
        ([], "no rows to train on"),
        ([nothing], "none of 1 rows has a trained token"),
        ([rows[1], nothing], "row 1 .* mask is all zero"),
        ([replace(rows[0], labels=rows[0].labels[:-5])], "row 0 .* is cut"),
        ([replace(rows[0], input_ids=rows[0].input_ids[:-5], labels=rows[0].labels[:-5],
                  token_kind=rows[0].token_kind[:-5], logprobs=rows[0].logprobs[:-5])], "is cut: a turn ends at"),
        ([replace(rows[0], template="0" * 16)], "rendered by template 0000"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=complaint):
            check_rows(bad, tokenizer)
    with pytest.raises(ValueError, match="over the 50 allowed"):
        check_rows(rows, tokenizer, max_tokens=50)
    with pytest.raises(ValueError, match="weights of version None, and version 3 trains"):
        check_rows(rows, tokenizer, newest=3)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "<|system|>").replace("<|end|>", "")
    with pytest.raises(ValueError, match=r"another template or tokenizer|does not mark"):
        rows_of_run(folder, tokenizer)


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    folder, tokenizer = run(tmp_path)
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:-2]))
    with pytest.raises(ValueError, match="has not ended"):
        rows_of_run(folder, tokenizer)
    assert rows_of_run(folder, tokenizer, partial=True)


def test_the_command_shows_a_row_with_its_mask(tmp_path, capsys):
    folder, tokenizer = run(tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["rows", "show", str(folder), "--row", "1", "--colour", "never", *more]) == 0
    plain = capsys.readouterr().out
    assert f'[memo: <|call|>write {{"path": "{MEMO}"' in plain
    assert "[action: <|call|>read" in plain
    assert "[BRIDGE 1 of" in plain
    assert main(["rows", "show", str(folder), "--row", "1", "--colour", "always", *more]) == 0
    assert "\x1b[35m" in capsys.readouterr().out
    assert main(["rows", "list", str(folder), *more]) == 0
    assert "window 2 of 3, memo" in capsys.readouterr().out
    assert main(["rows", "export", str(folder), "-o", str(tmp_path / "m.jsonl"), "--messages", *more]) == 0
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 3
    assert main(["rows", "show", str(folder), "--row", "9", *more]) == 2
    assert "has 3 rows" in capsys.readouterr().err


def test_the_command_finds_the_student_of_a_teachers_rows_and_leaves_out_unfinished_runs(tmp_path, capsys):
    folder, tokenizer = run(tmp_path / "round-1" / "collect")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [replace(row, policy="teacher oracle") for row in rows_of_run(folder, tokenizer)]
    row_files.write_rows(tmp_path / "round-1" / "rows.jsonl", rows)
    assert main(["rows", "list", str(tmp_path / "round-1" / "rows.jsonl")]) == 2
    assert "no tokenizer 'teacher oracle'" in capsys.readouterr().err
    (tmp_path / "isft.json").write_text(json.dumps({"settings": {"model": str(tmp_path / "student")}}))
    assert main(["rows", "list", str(tmp_path / "round-1" / "rows.jsonl")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    cut = folder.parent / "aaa-cut"
    shutil.copytree(folder, cut)
    lines = (cut / "events.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "events.jsonl").write_bytes(b"".join(lines[:-2]))
    more = ["--tokenizer", str(tmp_path / "student")]
    assert main(["rows", "list", str(folder.parent), *more]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(rows)
    assert f"1 of 2 runs have not ended and are left out, first {cut}" in said.err
    assert main(["rows", "list", str(cut), *more]) == 2
    assert "has ended: let them go on" in capsys.readouterr().err


def turn_event(number, **more):
    return {"event": "turn", "turn": number, "kind": "memo", "repaired": False, "finish": "stop", "append_ids": [7],
            "output_ids": [8, 9], "logprobs": [-1.0, -2.0], **more}  # fmt: skip


@pytest.mark.parametrize("heat", [1.0, 1.3])
def test_log_probabilities_of_a_hotter_retry_are_not_known(heat):
    first = {"event": "run", "config": {"temperature": 1.0, "retry_temperature": heat}}
    (stream,) = streams([first, {"event": "reject"}, turn_event(0), turn_event(1)])
    assert [math.isnan(x) for x in stream.logprobs] == [True, *[heat > 1] * 2, True, False, False]


def test_a_turn_that_was_cut_is_context():
    assert flawed_turns([turn_event(0), turn_event(1, finish="length"), turn_event(2)]) == {1: "cut"}
