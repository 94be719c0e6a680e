"""Deliverables that are amiss: what state each gets, and that nothing of them is lost or cut."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import zipfile

import pytest
from judge_server import Answer, JudgeServer, honest, make_task

from still.eval.deliverables import Outputs, UnfinishedRun
from still.eval.grade import GradeConfig, grade
from still.eval.judges import ExactJudge, find_judge

OLE = bytes.fromhex("d0cf11e0a1b11ae1")  # how a password-protected docx begins


@pytest.fixture
def run(tmp_path):
    """A run folder with one good memo."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "memo.md").write_text("The memo.")
    return tmp_path


def write(run, name: str, content: bytes):
    (run / "output" / name).write_bytes(content)
    return Outputs(run).read(name)


def test_states_of_files(run):
    assert Outputs(run).read("memo.md").state == "ok"
    assert Outputs(run).read("x.docx").state == "missing"
    assert write(run, "empty.md", b"").state == "empty"
    assert write(run, "blank.md", b" \n\t").state == "empty"
    for name, content in (
        ("cut.docx", b"PK\x03\x04 no zip"),
        ("text.docx", b"Just text."),
        ("locked.docx", OLE + bytes(4096)),
        ("image.png", b"\x89PNG\r\n"),
    ):
        deliverable = write(run, name, content)
        assert (deliverable.state, deliverable.text) == ("unreadable", None), name
        assert deliverable.why.startswith(name)
        assert str(run) not in deliverable.why
    with zipfile.ZipFile(run / "output" / "hollow.docx", "w") as archive:
        archive.writestr("x", "y")
    assert Outputs(run).read("hollow.docx").state == "unreadable"


def test_what_is_unreadable_fails_without_a_call_and_says_why(run):
    write(run, "locked.docx", OLE + bytes(4096))
    task = make_task(2, files=(("locked.docx",), ("memo.md",)))
    with JudgeServer() as server:
        grading = asyncio.run(grade(task, run, find_judge(f"m@{server.url}")))
        again = asyncio.run(grade(task, run, find_judge(f"m@{server.url}"), GradeConfig(unreadable="unscored")))
    locked = grading.verdicts[0]
    assert (locked.label, locked.state) == ("fail", "unreadable")
    assert "locked.docx" in locked.reason
    assert (again.verdicts[0].label, again.verdicts[0].state) == ("unscored", "unreadable")
    assert [each.ids for each in server.log] == [["C-00001"]] * 2
    states = {each["name"]: each["state"] for each in grading.judging["deliverables"]}
    assert states == {"locked.docx": "unreadable", "memo.md": "ok"}


def test_a_deliverable_of_50_mb_goes_out_whole_and_comes_back_as_a_state(run):
    text = "The clause says what it says, and so on.\n" * (50 * 2**20 // 41)
    (run / "output" / "memo.md").write_text(text)
    said = "This model's maximum context length is 131072 tokens"
    received = []

    def rule(asked):
        received.append(asked.text.count("The clause says"))
        return Answer(said, 400)

    with JudgeServer(rule, keep=False) as server:
        grading = asyncio.run(grade(make_task(5), run, find_judge(f"m@{server.url}")))
    assert received == [50 * 2**20 // 41], "asked once, uncut, and not again for the other criteria"
    assert {(each.label, each.state) for each in grading.verdicts} == {("unscored", "rejected")}
    record = grading.judging["deliverables"][0]
    assert record["characters"] == len(text)
    assert record["file_sha256"] == record["sha256"]
    assert record["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("asked", "delivered", "taken"),
    [
        ("memo.docx", ["Final Memo.docx", "table.xlsx"], "Final Memo.docx"),
        ("issues-memo.docx", ["commitment_letter.docx", "Memo of issues.docx"], "Memo of issues.docx"),
        ("issues-memo.docx", ["a/issues.docx", "b/issues.docx"], None),
        ("issues-memo.docx", ["one.docx", "two.docx"], None),
        ("issues-memo.docx", ["issues-memo.md", "notes.txt"], "issues-memo.md"),
        ("memo.docx", [], None),
    ],
)
def test_a_misnamed_output_is_taken_as_lab_does_where_that_is_asked_for(asked, delivered, taken):
    outputs = dict.fromkeys(delivered, "The memo.")
    with JudgeServer() as server:
        judge = find_judge(f"m@{server.url}")
        exact = asyncio.run(grade(make_task(1, files=((asked,),)), outputs, judge))
        assert (exact.verdicts[0].state, len(server.log)) == ("missing", 0)
        found = asyncio.run(grade(make_task(1, files=((asked,),)), outputs, judge, GradeConfig(names="closest")))
        assert found.verdicts[0].state == ("judged" if taken else "missing")
    records = {each["name"]: each.get("taken_for") for each in found.judging["deliverables"]}
    assert records == ({taken: [asked]} if taken else {asked: None})


def test_the_right_name_is_never_given_up_for_a_closer_one():
    texts = {"memo.docx": "Right.", "memo memo.docx": "Wrong."}
    with JudgeServer() as server:
        judge = find_judge(f"m@{server.url}")
        asyncio.run(grade(make_task(1, files=(("memo.docx",),)), texts, judge, GradeConfig(names="closest")))
    assert "Right." in server.log[0].text
    assert "Wrong." not in server.log[0].text


def test_links_hidden_files_and_lock_files_are_no_deliverables(run, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.md"
    secret.write_text("secret")
    os.symlink(secret, run / "output" / "link.md")
    (run / "output" / ".hidden.md").write_text("x")
    (run / "output" / "~$memo.docx").write_text("x")
    (run / "output" / "node_modules").mkdir()
    (run / "output" / "node_modules" / "a.md").write_text("x")
    (run / "output" / "deep").mkdir()
    (run / "output" / "deep" / "b.md").write_text("x")
    outputs = Outputs(run)
    assert outputs.names == ("deep/b.md", "memo.md")
    assert outputs.read("link.md").state == "missing"
    assert outputs.read("../output/memo.md").state == "missing", "a name leads nowhere else"


def test_a_text_that_no_encoding_takes_is_sent_as_far_as_it_goes():
    with JudgeServer(honest) as server:
        grading = asyncio.run(grade(make_task(1), {"memo.md": "half a \ud83d pair"}, find_judge(f"m@{server.url}")))
    assert grading.n_unscored == 0
    assert "half a ? pair" in server.log[0].text


@pytest.mark.parametrize(
    ("events", "told"),
    [
        (None, "it never began"),
        (['{"event": "run"}', '{"event": "turn"}'], "its log ends with 'turn'"),
        (['{"event": "run"}', '{"event": "error", "error": "ConnectionError: refused"}'], "ConnectionError: refused"),
        (['{"event": "run"}', '{"event": "end", "sta'], "its log ends with 'run'"),
    ],
)
def test_a_run_that_has_not_ended_gets_no_verdicts_and_is_told(tmp_path, events, told):
    (tmp_path / "config.json").write_text(json.dumps({"task": "a", "still": {"run": {}}}))
    if events:
        (tmp_path / "events.jsonl").write_text("\n".join(events))
    with pytest.raises(UnfinishedRun, match=f"has not ended .{told}"):
        asyncio.run(grade(make_task(1), tmp_path, ExactJudge()))


def test_a_run_that_ended_badly_and_one_of_another_harness_are_judged_on_what_they_handed_in(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "a", "still": {"run": {}}}))
    events = ['{"event": "run"}', '{"event": "error", "error": "x"}', '{"event": "end", "status": "stopped"}']
    (tmp_path / "events.jsonl").write_text("\n".join(events) + "\n")
    assert Outputs(tmp_path).read("memo.md").state == "missing"
    (tmp_path / "config.json").write_text(json.dumps({"task": "a"}))
    (tmp_path / "events.jsonl").write_text('{"event": "turn"}\n')
    assert Outputs(tmp_path).read("memo.md").state == "missing"
