"""The tools one by one: what they answer, what they refuse, and that nothing an agent asks for raises."""

from __future__ import annotations

import json
import os
import random

import pytest
from agent_cases import Reader, make_task, of, play

from still.harness.confined import DEPTH
from still.harness.documents import Documents
from still.harness.tools import PROBLEMS, TOOLS, Workspace

TEXTS = {"01.txt": "The rent is 12.\nThe term ends.\n", "sub/02.txt": "Rent again: 13.\n", "long.txt": "word " * 4000}


@pytest.fixture
def workspace(tmp_path):
    task = make_task(tmp_path, TEXTS, secret="CANARY-51c7")
    (tmp_path / "ws").mkdir()
    return Workspace(tmp_path / "ws", Documents.load(task.agent_view(), cache=tmp_path / "cache"))


def test_reading_in_parts_gives_the_whole_text(workspace):
    offset, text = 0, ""
    while True:
        part = workspace.call("read", {"path": "documents/long.txt", "offset": offset, "limit": 3001})
        text += part.text.split("\n\n[characters ")[0]
        assert (part.document, part.start, part.total) == ("long.txt", offset, 20_000)
        offset += part.characters
        if not part.truncated:
            break
    assert text == TEXTS["long.txt"]
    assert workspace.call("read", {"path": "documents/long.txt", "offset": 20_000}).problem == "bad_arguments"


@pytest.mark.parametrize("path", [
    "../task.json", "documents/../../task.json", "/etc/passwd", "~/x", "output/../../x", "a\0b", "a\nb",
    "/workspace/../x", "documents/\ud800", "link/task.json", "link", "output/up/task.json",
])  # fmt: skip
def test_no_path_leads_out(workspace, tmp_path, path):
    outside = tmp_path / "tasks" / "area" / "matter"
    os.symlink(outside, workspace.root / "link")
    os.symlink(outside, workspace.root / "output" / "up")
    edit = {"old_string": "a", "new_string": "b"}
    for name, arguments in [("read", {}), ("edit", edit), ("write", {"content": "x"})]:
        result = workspace.call(name, {"path": path, **arguments})
        replaced = (path, name) == ("link", "write")  # the link itself, by a file
        assert result.ok == replaced
        assert replaced or result.problem in ("outside", "missing", "bad_arguments")
        assert "CANARY" not in result.text
    assert "CANARY" in (outside / "task.json").read_text()
    for result in (workspace.call("grep", {"pattern": "CANARY"}), workspace.call("glob", {"pattern": "**"})):
        assert "CANARY" not in result.text.removeprefix("nothing matches CANARY")
        assert "task.json" not in result.text


def test_documents_cannot_be_written_under_any_name(workspace):
    for path in ("documents/01.txt", "./documents/new.txt", "documents//01.txt", "/workspace/documents/01.txt"):
        assert workspace.call("write", {"path": path, "content": "x"}).problem == "read_only"
        assert workspace.call("edit", {"path": path, "old_string": "12", "new_string": "9"}).problem == "read_only"
    assert workspace.call("read", {"path": "documents/01.txt"}).text == TEXTS["01.txt"]


def test_edit_wants_the_text_exactly_once(workspace):
    workspace.call("write", {"path": "output/m.md", "content": "one two two"})
    edit = {"path": "output/m.md", "new_string": "2"}
    assert workspace.call("edit", {**edit, "old_string": "three"}).problem == "no_match"
    assert workspace.call("edit", {**edit, "old_string": ""}).problem == "no_match"
    assert "2 times" in workspace.call("edit", {**edit, "old_string": "two"}).text
    assert workspace.call("edit", {**edit, "old_string": "two", "replace_all": True}).ok
    assert workspace.call("read", {"path": "output/m.md"}).text == "one 2 2"


def test_grep_and_glob_know_documents_and_files(workspace):
    workspace.call("write", {"path": "notes/a.md", "content": "rent: 14"})
    assert workspace.call("glob", {"pattern": "**"}).text.splitlines() == [
        "documents/01.txt", "documents/long.txt", "documents/sub/02.txt", "notes/a.md",
    ]  # fmt: skip
    assert workspace.call("glob", {"pattern": "documents/*.txt"}).text.count("\n") == 1
    found = workspace.call("grep", {"pattern": r"rent.*\d+", "ignore_case": True}).text.splitlines()
    assert found == [
        "documents/01.txt:1: The rent is 12.", "documents/sub/02.txt:1: Rent again: 13.", "notes/a.md:1: rent: 14",
    ]  # fmt: skip
    assert workspace.call("grep", {"pattern": "rent", "path": "notes"}).text == "notes/a.md:1: rent: 14"
    assert len(workspace.call("grep", {"pattern": "word"}).text) < 700
    assert workspace.call("grep", {"pattern": "(" * 30_000}).problem == "bad_arguments"


def test_a_search_that_would_never_end_is_stopped(workspace, monkeypatch):
    monkeypatch.setattr("still.harness.tools.GREP_SECONDS", 0.5)
    workspace.call("write", {"path": "a.txt", "content": ("a" * 60 + "!\n") * 500})
    assert workspace.call("grep", {"pattern": "(a|aa)+$", "path": "a.txt"}).problem == "timeout"


@pytest.mark.parametrize("arguments", [
    "{broken", "[1]", '{"path": 5}', "{}", '{"path": "x", "mode": "r"}', '{"path": "documents/01.txt", "offset": -1}',
    '{"path": "documents/01.txt", "limit": true}', "[" * 100_000, '{"path": "\\ud800", "\\ud800": 1}',
])  # fmt: skip
def test_arguments_that_are_not_the_tools_own(workspace, arguments):
    result = workspace.call("read", arguments)
    assert result.problem in ("bad_arguments", "outside")
    result.text.encode()


def test_nothing_that_is_asked_raises(workspace):
    rng = random.Random(0)
    names = [tool["function"]["name"] for tool in TOOLS] + ["fetch", ""]
    keys = ["path", "content", "pattern", "offset", "limit", "old_string", "new_string", "command", "replace_all", "x"]
    values = ["documents/01.txt", "output/a.md", "a.docx", "output", ".", "", "..", "*", "**/*", "(", "\0", "\ud800",
              "x" * 300, 0, -1, 10**12, 1.5, True, None, [], {"a": 1}, "memento.md", "output/a.md/b", "documents",
              "é\u202e"]  # fmt: skip
    for _ in range(1500):
        arguments = {key: rng.choice(values) for key in rng.sample(keys, rng.randrange(5))}
        result = workspace.call(rng.choice(names), arguments if rng.random() < 0.5 else json.dumps(arguments))
        assert result.ok == (not result.problem)
        assert not result.problem or result.problem in PROBLEMS
        result.text.encode()


@pytest.mark.parametrize("where", ["tasks/area/matter", "tasks/area/matter/documents", "tasks/area/matter/ws", "."])
def test_a_workspace_that_would_show_the_rubric_is_refused(tmp_path, where):
    task = make_task(tmp_path, TEXTS)
    (tmp_path / where).mkdir(exist_ok=True)
    documents = Documents.load(task.agent_view(), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="hold one another"):
        Workspace(tmp_path / where, documents)
    assert not (tmp_path / where / "output").exists()


@pytest.mark.parametrize(("name", "shown"), [
    ("Screenshot 10.30\u202fAM.txt", "Screenshot 10.30\u202fAM.txt"), ("a\u00a0b.txt", "a\u00a0b.txt"),
    ("a\ndocuments/forged.txt", "a\\ndocuments/forged.txt"), ("x\u2028y\x1f.txt", "x\\u2028y\\x1f.txt"),
])  # fmt: skip
def test_a_name_with_any_character_is_listed_read_and_searched(tmp_path, name, shown):
    task = make_task(tmp_path, {name: "rent: 14", "z.txt": "rent: 15"})
    (tmp_path / "ws").mkdir()
    workspace = Workspace(tmp_path / "ws", Documents.load(task.agent_view(), cache=tmp_path / "cache"))
    listed = workspace.call("glob", {"pattern": "**"}).text.splitlines()
    assert listed == [f"documents/{shown}", "documents/z.txt"]
    for path in (*listed[:1], f"documents/{name}"):
        read = workspace.call("read", {"path": path})
        assert (read.text, read.document) == ("rent: 14", shown)
    found = workspace.call("grep", {"pattern": "rent"}).text.splitlines()
    assert found == [f"documents/{shown}:1: rent: 14", "documents/z.txt:1: rent: 15"]
    events = play(tmp_path, task, Reader(), backend="memo", budget="200t", reads=1, reads_force=1)
    assert {e["document"] for e in of(events, "tool") if e["ok"] and e["document"]} == {shown, "z.txt"}
    assert "\ndocuments/forged.txt" not in events[0]["user"]


def test_two_documents_that_would_be_shown_alike_are_refused(tmp_path):
    task = make_task(tmp_path, {"a\nb.txt": "one", "a\\nb.txt": "two"})
    (tmp_path / "ws").mkdir()
    with pytest.raises(ValueError, match="both shown as"):
        Workspace(tmp_path / "ws", Documents.load(task.agent_view(), cache=tmp_path / "cache"))


def test_a_name_that_no_listing_can_show_is_not_written(workspace):
    assert workspace.call("write", {"path": "output/a\nb.md", "content": "x"}).problem == "bad_arguments"
    assert workspace.call("write", {"path": "output/a\u00a0b.md", "content": "x"}).ok
    assert [name for name, _ in workspace.files.files()] == ["output/a\u00a0b.md"]


def test_a_search_goes_on_past_what_cannot_be_read(workspace, monkeypatch):
    workspace.call("write", {"path": "a.txt", "content": "rent: 14"})
    monkeypatch.setattr(workspace.files, "files", lambda: iter([("../x", 1), ("a.txt", 8), ("d/" * 99 + "x", 1)]))
    found = workspace.call("grep", {"pattern": "rent: 14"}).text
    assert found == "a.txt:1: rent: 14\n[2 files give no text and were not searched]"


def test_a_path_deeper_than_a_listing_goes_is_refused(workspace):
    deepest = "d/" * DEPTH + "x.md"
    assert workspace.call("write", {"path": deepest, "content": "x"}).ok
    assert [name for name, _ in workspace.files.files()] == [deepest]
    for path in ("d/" * (DEPTH + 1) + "x.md", "d/" * 1200 + "x.md"):
        refused = workspace.call("write", {"path": path, "content": "x"})
        assert refused.problem == "bad_arguments"
        assert f"at most {DEPTH}" in refused.text
