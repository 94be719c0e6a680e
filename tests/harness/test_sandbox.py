"""bash in its sandbox, and the workspace after hostile commands. Skipped where there is no bubblewrap.

With STILL_NEEDS_SANDBOX=1, as continuous integration sets it, its absence is a failure.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
from agent_cases import Reader, call, episode, make_task, of, texts

from still.cli import main
from still.harness.agent import drive
from still.harness.documents import Documents
from still.harness.run_config import RunConfig
from still.harness.runs import read_run
from still.harness.sandbox import Sandbox, SandboxError, find_sandbox, sandbox_of
from still.harness.tools import Workspace
from still.harness.types import MEMO, Message

SANDBOX, WHY_NOT = find_sandbox(seconds=20.0)
CANARY = "CANARY-9d41"
needs_sandbox = pytest.mark.skipif(
    SANDBOX is None and not os.environ.get("STILL_NEEDS_SANDBOX"), reason=f"no sandbox: {WHY_NOT}"
)


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path, texts(3), secret=CANARY)


@pytest.fixture
def workspace(tmp_path, task):
    assert SANDBOX is not None, WHY_NOT
    root = tmp_path / "workspace"
    root.mkdir()
    return Workspace(root, Documents.load(task.agent_view(), cache=tmp_path / "cache"), SANDBOX)


def bash(workspace: Workspace, command: str, **arguments):
    return workspace.call("bash", {"command": command, **arguments})


@needs_sandbox
def test_a_command_works_on_the_agents_files_and_reads_the_originals(workspace):
    assert bash(workspace, "cat documents/01.txt | wc -c").text.strip().isdigit()
    assert bash(workspace, "echo one > a.txt; cp a.txt output/b.txt").text == "[no output]"
    assert workspace.call("read", {"path": "output/b.txt"}).text == "one\n"
    failed = bash(workspace, "echo out; echo err >&2; exit 3")
    assert (failed.text, failed.ok, failed.problem) == ("out\nerr\n[exit code 3]", False, "failed")


@needs_sandbox
@pytest.mark.parametrize("command", [
    "echo x >> documents/01.txt", "rm -rf documents", "mv documents d", "touch documents/new", "echo x > /usr/bin/new",
])  # fmt: skip
def test_documents_and_the_system_cannot_be_written(workspace, task, command):
    before = (task.folder / "documents" / "01.txt").read_bytes()
    assert not bash(workspace, command).ok
    assert (task.folder / "documents" / "01.txt").read_bytes() == before
    assert bash(workspace, "ls documents").text == "01.txt\n02.txt\n03.txt"


@needs_sandbox
def test_no_network_no_environment_and_no_other_process(workspace, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    network = bash(workspace, "cat /proc/net/dev | tail -n +3; echo x > /dev/tcp/127.0.0.1/80")
    assert "eth" not in network.text
    assert not network.ok
    assert CANARY not in bash(workspace, "env; cat /proc/*/environ; cat /proc/*/cmdline | tr '\\0' ' '").text
    assert int(bash(workspace, "ls -d /proc/[0-9]* | wc -l").text) < 8


@needs_sandbox
@pytest.mark.parametrize("command", [
    "cat documents/../task.json", "cat ../task.json", "cat ../../task.json", "find / -name task.json 2>/dev/null",
    "ln -s {folder}/task.json output/memo.md; cat output/memo.md", "cat {folder}/task.json",
    "grep -rl {canary_half}-9d41 / --include='*' -s --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr",
    "cat documents/.rubric documents/.private/rubric; ls -A documents documents/.private",
    "ln -s / root; cat root/{folder}/task.json; cat /proc/1/root/{folder}/task.json",
])  # fmt: skip
def test_the_rubric_is_out_of_reach_of_commands(tmp_path, workspace, task, command):
    hidden = task.folder / "documents"
    (hidden / ".rubric").write_text(CANARY)
    (hidden / ".private").mkdir()
    (hidden / ".private" / "rubric").write_text(CANARY)
    assert CANARY in (task.folder / "task.json").read_text()
    ran = bash(workspace, command.format(folder=task.folder, canary_half=CANARY[:6]))
    assert CANARY not in ran.text
    for name in ("output/memo.md", "root/work", MEMO):
        assert CANARY not in workspace.call("read", {"path": name}).text


@needs_sandbox
def test_a_command_is_stopped_in_time_and_all_that_it_started(workspace, tmp_path):
    began = time.monotonic()
    ran = bash(workspace, "(sleep 31; echo late > late.txt) & echo first; sleep 30", timeout=1)
    assert (ran.text, ran.problem) == ("first\n[stopped after 1 seconds]", "timeout")
    assert time.monotonic() - began < 15
    assert bash(workspace, "nohup setsid sh -c 'sleep 2; echo x > late.txt' & echo done").text == "done"
    time.sleep(2.5)
    assert not (workspace.root / "late.txt").exists()
    assert bash(workspace, "true", timeout=-1).problem == "bad_arguments"


@needs_sandbox
def test_output_files_and_memory_are_bounded(workspace):
    flood = bash(workspace, "echo begin; yes | head -c 50000000; echo end")
    assert flood.truncated
    assert len(flood.text) < 70_000
    assert flood.text.startswith("begin")
    assert "more characters are not shown" in flood.text
    assert not bash(workspace, "head -c 200000000 /dev/zero > big").ok
    assert (workspace.root / "big").stat().st_size <= 64 << 20
    assert not bash(workspace, "python3 -c 'bytearray(5 << 30)'").ok


@needs_sandbox
@pytest.mark.parametrize("command", ["bad \0 text", "half \ud800 pair"])
def test_what_is_no_text_is_refused(workspace, command):
    assert bash(workspace, command).problem == "bad_arguments"


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_said_and_nothing_runs(workspace, tmp_path):
    broken = Sandbox("/nonexistent/bwrap")
    with pytest.raises(SandboxError, match="does not start"):
        broken.run("touch ran", workspace.root, None)
    workspace.sandbox = broken
    assert bash(workspace, "touch ran").problem == "environment"
    assert not (workspace.root / "ran").exists()


def test_without_a_sandbox_there_is_no_bash(tmp_path, task, monkeypatch):
    (tmp_path / "alone").mkdir()
    alone = Workspace(tmp_path / "alone", Documents.load(task.agent_view(), cache=tmp_path / "cache"))
    assert "bash" not in [tool["function"]["name"] for tool in alone.specs()]
    assert alone.call("bash", {"command": "touch ran"}).problem == "off"
    monkeypatch.setenv("PATH", "")
    sandbox, reason = find_sandbox()
    assert sandbox is None
    assert "install bubblewrap" in reason


HOSTILE = (
    "rm -rf output && ln -s /usr output", "ln -sf /usr/bin memento.md", f"rm -f {MEMO} && mkdir {MEMO}",
    "touch $'bad\\xff' $'line\\n## Files not yet read'", "mkfifo pipe; mkdir -p a/b; chmod 000 a . 2>/dev/null",
    "mkdir -p .x.part; ln -s /workspace loop; rm -rf output; echo x > output", "touch $(printf 'n%.0s' $(seq 240)).md",
)  # fmt: skip


class Vandal(Reader):
    """Runs one hostile command after its first document, and again in the turn that writes its first memo."""

    outputs = ("memo.md",)

    def __init__(self, command: str):
        super().__init__()
        self.command = call("bash", command=command).calls

    def __call__(self, seen, limit) -> Message:
        message = super().__call__(seen, limit)
        if any("[BRIDGE" in each.content for each in seen):
            return message
        if seen[-1].role == "tool" and not any(m.call.name == "bash" for m in seen if m.role == "tool"):
            return Message("assistant", "", self.command)
        memo = any(MEMO in each.arguments for each in message.calls)
        return Message("assistant", "", message.calls + self.command) if memo else message


@needs_sandbox
@pytest.mark.parametrize("command", HOSTILE)
def test_nothing_that_a_command_leaves_behind_breaks_the_run(tmp_path, command):
    task = make_task(tmp_path, texts(5), deliverables=())

    def run():
        return episode(tmp_path, task, Vandal(command), backend="memo", budget="200t", sandbox=SANDBOX,
                       tools=("bash", "read", "write"))  # fmt: skip

    whole = run()
    end = drive(whole)
    events = read_run(whole.folder.root)
    assert end["stop"] in ("done", "no_deliverable", "tool_errors")  # it may have spoilt its own work, and is told
    calls = len([event for event in of(events, "tool") if event["name"] == "bash"])
    assert calls >= 2  # it comes again with every memo that failed
    read = {event["document"] for event in of(events, "tool") if event["document"] and event["ok"]}
    assert read == set(texts(5)) or end["stop"] == "tool_errors"
    for event in of(events, "compact"):
        assert "\n## Files not yet read (" not in whole.folder.text(event["bridge"])
    whole.folder.write_lab_files(events)
    log = whole.folder.events
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[: len(events) // 2]))
    assert drive(run())["stop"] == end["stop"]
    assert [event["event"] for event in read_run(whole.folder.root)] == [event["event"] for event in events]


@needs_sandbox
def test_folders_in_memory_are_bounded_and_the_rest_cannot_be_written(workspace):
    workspace.sandbox = Sandbox(SANDBOX.program, scratch_bytes=1 << 20)
    for folder in ("/tmp", "/dev/shm"):
        assert not bash(workspace, f"head -c 3000000 /dev/zero > {folder}/x").ok
        assert bash(workspace, f"echo x > {folder}/x; cat {folder}/x").text == "x"
    for place in ("/x", "/dev/x", "/etc/x"):
        assert not bash(workspace, f"echo x > {place}").ok
    assert bash(workspace, "echo x > /dev/null").ok


@needs_sandbox
@pytest.mark.skipif(os.getuid() == 0, reason="root's processes are not limited")
def test_processes_are_bounded(workspace):
    workspace.sandbox = Sandbox(SANDBOX.program, seconds=10.0, processes=20)
    assert "Resource temporarily unavailable" in bash(workspace, "for i in $(seq 40); do sleep 9 & done").text
    assert bash(workspace, "echo works | cat").text == "works"


@needs_sandbox
def test_folders_of_any_depth_leave_the_next_command_alone(workspace):
    deep = "for i in $(seq 300); do mkdir dddddddddddddddddddd && cd dddddddddddddddddddd || exit; done; echo deep"
    assert bash(workspace, deep).text == "deep"
    assert bash(workspace, "echo again").text == "again"


@needs_sandbox
def test_a_command_whose_files_cannot_be_taken_over_is_not_said_to_have_done_nothing(workspace, monkeypatch):
    def failing(folder):
        raise OSError("the disk is gone")

    monkeypatch.setattr("still.harness.sandbox.own_all", failing)
    ran = bash(workspace, "echo x > a.txt")
    assert ran.problem == "environment"
    assert "the command ran" in ran.text
    assert "nothing was changed" not in ran.text


def test_a_sandbox_that_a_run_demands_and_lacks_stops_trainers_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("shutil.which", lambda program: None)
    run = RunConfig(sandbox="bwrap")
    with pytest.raises(ValueError, match="sandbox is 'bwrap', and there is no bubblewrap here"):
        sandbox_of(run)
    found, reason = sandbox_of(replace(run, sandbox="auto"))
    assert found is None
    assert "there is no bubblewrap here" in reason
    assert sandbox_of(replace(run, sandbox="none")) == sandbox_of(replace(run, tools=("read",))) == (None, "")
    for trainer in ("isft", "grpo"):
        argv = [trainer, str(tmp_path), "--policy", "pocket-agent", "--sandbox", "bwrap", "-o", str(tmp_path / "out")]
        assert main(argv) == 2
        assert "sandbox is 'bwrap', and there is no bubblewrap here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
