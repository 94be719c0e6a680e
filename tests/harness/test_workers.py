"""Work in several processes: every piece once, errors with their message, deaths told, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worker_cases import breaking, loading, squares

from still.harness.workers import FORKS, share_out


def test_every_piece_is_worked_once_by_processes_of_their_own():
    got = list(share_out([[1, 2], [3], [4, 5, 6]], 2, squares, 100))
    assert sorted(value for value, _, _ in got) == [100 + n * n for n in range(1, 7)]
    assert {number for _, number, _ in got} <= {0, 1}
    assert os.getpid() not in {pid for _, _, pid in got}
    by = {value: (number, pid) for value, number, pid in got}
    assert by[101] == by[104]
    assert by[116] == by[125] == by[136]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("start", "what", "error", "message"),
    [
        (breaking, "mistake", ValueError, "slots is 0"),
        (breaking, "defect", RuntimeError, "ZeroDivisionError: a defect"),
        (breaking, "die", RuntimeError, "status -9"),
        (loading, "here", FileNotFoundError, "no model here"),
    ],
)
def test_what_breaks_a_worker_is_told_and_what_came_before_it_is_kept(start, what, error, message):
    got = []
    with pytest.raises(error, match=message):
        got.extend(share_out([1], 2, start, what))
    if what != "die":  # a killed process may take its last words with it
        assert got == ([] if start is loading else [1])
    assert not multiprocessing.active_children()


def test_a_caller_that_stops_early_or_is_killed_leaves_no_process(tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(
        "import sys\nfrom worker_cases import slow\nfrom still.harness.workers import share_out\n"
        "if __name__ == '__main__':\n    list(share_out([1, 2], 2, slow, sys.argv[1]))\n"
    )
    started = tmp_path / "started"
    started.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    caller = subprocess.Popen([sys.executable, str(script), str(started)], env={**os.environ, "PYTHONPATH": path})
    try:
        until(lambda: len(list(started.iterdir())) == 2)
    finally:
        caller.kill()
        caller.wait()
    until(lambda: not [each.name for each in started.iterdir() if running(each.name)])


@pytest.mark.skipif(not FORKS, reason="processes are spawned here")
@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("server", [True, False])
def test_processes_have_what_was_made_ready_for_them(tmp_path, ready, server):
    """They are spawned, and have nothing, where no server can be: its socket's path is too long here."""
    script, scratch = tmp_path / "caller.py", tmp_path / ("a" * 108)
    scratch.mkdir()
    script.write_text(
        "import sys\nfrom worker_cases import knowing\nfrom still.harness.workers import make_ready, share_out\n"
        f"if __name__ == '__main__':\n    {ready} and make_ready(['wave', 'no.such.module'])\n"
        "    print(*share_out([1, 2], 2, knowing, 'wave'))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    elsewhere = {} if server else {"TMPDIR": str(scratch)}
    ran = subprocess.run([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path, **elsewhere},
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert ran.stdout.split() == [str(ready and server)] * 2


@pytest.mark.skipif(not FORKS, reason="processes are spawned here")
def test_an_interrupt_while_workers_are_made_ready_is_the_callers_alone(tmp_path):
    begun, script = tmp_path / "begun", tmp_path / "caller.py"
    (tmp_path / "slowly.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(1)\n")
    script.write_text(
        "import signal, time\nfrom still.harness.workers import make_ready\n"
        "if __name__ == '__main__':\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    make_ready(['slowly'])\n    try:\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        print('interrupted')\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    caller = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    until(begun.exists)
    os.killpg(caller.pid, signal.SIGINT)
    assert caller.communicate(timeout=60) == ("interrupted\n", "")


def running(pid: str) -> bool:
    """Whether a process is there, and no mere entry that nobody has waited for."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true, seconds: float = 120) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
