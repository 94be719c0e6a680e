"""What `bash` runs in: bubblewrap, without network, with the workspace, the documents read-only, and nothing else.

The command sees `/usr`, an empty `/tmp`, `/workspace` (the agent's files) and `/workspace/documents` (the originals).
No environment variable of this process, no other folder of this machine and no other process is there. Where there is
no bubblewrap there is no sandbox, and `bash` is off; it never runs without one.

Limits are each process's (memory, processor time, size of one file), each command's (time, output, processes) or each
folder's (`/tmp`, `/dev/shm`). What all processes of a command hold together, and `/workspace`, have no limit.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .confined import own_all

if TYPE_CHECKING:
    from .run_config import RunConfig

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
FILES = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/fonts", "/etc/localtime")
INSIDE = "/workspace"
INSTALL = "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap)"


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        code: exit code; None where it ran out of time.
        text: standard output and errors as they came, the middle left out where there was too much.
        left_out: bytes that are not in `text`.
    """

    code: int | None
    text: str
    left_out: int = 0


class SandboxError(OSError):
    """The sandbox itself does not start, or what a command left behind cannot be cleared up."""


class Sandbox:
    """Runs one command at a time, each in a new shell.

    Args:
        program: bubblewrap.
        seconds: longest run of a command.
        output_bytes: of its output that are kept, half from the beginning and half from the end.
        memory_bytes: address space of each of its processes.
        file_bytes: largest file that it may write.
        scratch_bytes: of `/tmp`, and of `/dev/shm`, which are memory; a bubblewrap older than 0.6 does not limit them.
        processes: that it may have at a time; for root, and by a Linux older than 5.14, they are not limited.
    """

    def __init__(
        self, program: str, seconds: float = 120.0, output_bytes: int = 60_000, memory_bytes: int = 4 << 30,
        file_bytes: int = 64 << 20, scratch_bytes: int = 1 << 30, processes: int = 512,
    ):  # fmt: skip
        self.program, self.seconds, self.output_bytes = program, seconds, output_bytes
        self.scratch_bytes = scratch_bytes
        self.limits = f"ulimit -c 0; ulimit -v {memory_bytes >> 10}; ulimit -f {file_bytes >> 10}"
        if _counts_by_namespace(os.uname().release):
            self.limits += f"; ulimit -u {processes}"

    def shows(self, folder: Path) -> bool:
        """Whether a command can read a folder of this machine by the places that every command sees."""
        seen = [Path(each).resolve() for each in (*SYSTEM, *FILES) if Path(each).exists()]
        return any(folder.resolve().is_relative_to(each) for each in seen)

    def run(
        self, command: str, workspace: Path, documents: Path | None, hidden: Sequence[Path] = (), seconds: float = 0.0
    ) -> Ran:
        """Run a command with bash in the workspace.

        Args:
            command: any text.
            workspace: bound to `/workspace`, writable.
            documents: bound to `/workspace/documents`, read-only; None where the task has none.
            hidden: files and folders in `documents` that are not shown.
            seconds: longest run; the sandbox's own limit unless given, and never more.

        Raises:
            SandboxError: the sandbox does not start; or the command ran, and its files cannot be made ours again.
        """
        seconds = min(seconds or self.seconds, self.seconds)
        shell = f'{self.limits}; ulimit -t {int(seconds) + 1}; exec bash -c "$1"'
        arguments = [*self._mounts(workspace, documents, hidden), "bash", "-c", shell, "bash", command]
        started, ready = os.pipe()
        try:
            process = subprocess.Popen(
                [self.program, "--info-fd", str(ready), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env={}, start_new_session=True, pass_fds=(ready,),
            )  # fmt: skip
        except (OSError, ValueError) as problem:
            os.close(started)
            os.close(ready)
            raise SandboxError(f"the sandbox does not start: {problem}") from problem
        os.close(ready)
        kept = _Kept(self.output_bytes)
        reader = threading.Thread(target=kept.read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # all processes of the sandbox die with it
            process.wait()
            reader.join()
            process.stdout.close()
            with os.fdopen(started, "rb") as info:
                began = bool(info.read())
        try:
            own_all(workspace)
        except OSError as problem:
            raise SandboxError(f"the command ran, but its files cannot be taken over: {problem}") from problem
        if code and (not began or kept.head.startswith(b"bwrap: ")):
            raise SandboxError(f"the sandbox does not start: {kept.text().strip()[:300]}")
        return Ran(code, kept.text(), kept.left_out)

    def _mounts(self, workspace: Path, documents: Path | None, hidden: Sequence[Path]) -> list[str]:
        given = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
        for each in SYSTEM:
            path = Path(each)
            if path.is_symlink():
                given += ["--symlink", os.readlink(path), each]
            elif path.is_dir():
                given += ["--ro-bind", each, each]
        for each in FILES:
            given += ["--ro-bind-try", each, each]
        scratch = ["--size", str(self.scratch_bytes), "--tmpfs"] if _takes_size(self.program) else ["--tmpfs"]
        given += ["--proc", "/proc", "--dev", "/dev", *scratch, "/dev/shm", *scratch, "/tmp"]
        given += ["--bind", str(workspace), INSIDE]
        if documents is not None and documents.is_dir():
            inside = f"{INSIDE}/documents"
            given += ["--ro-bind", str(documents), inside]
            for path in hidden:
                where = f"{inside}/{path.relative_to(documents)}"
                empty = ["--tmpfs", where, "--remount-ro", where]
                given += empty if path.is_dir() else ["--ro-bind", "/dev/null", where]
        given += ["--remount-ro", "/dev", "--remount-ro", "/"]  # memory, too, in which nothing need be written
        for name, value in (("PATH", "/usr/local/bin:/usr/bin:/bin"), ("HOME", "/tmp"), ("LANG", "C.UTF-8")):
            given += ["--setenv", name, value]
        return [*given, "--chdir", INSIDE]


@lru_cache
def _takes_size(program: str) -> bool:
    """Whether a bubblewrap can limit a folder in memory."""
    try:
        return b"--size" in subprocess.run([program, "--help"], capture_output=True, env={}, check=False).stdout
    except OSError:
        return False


def _counts_by_namespace(release: str) -> bool:
    """Whether Linux counts a sandbox's processes by themselves, and not with all others of the same user."""
    version = re.match(r"(\d+)\.(\d+)", release)
    return version is not None and (int(version[1]), int(version[2])) >= (5, 14)


class _Kept:
    """The beginning and the end of a stream, which is read to its end whatever its length."""

    def __init__(self, most: int):
        self.half, self.head, self.tail, self.total = max(1, most // 2), b"", b"", 0

    def read(self, stream) -> None:
        while chunk := stream.read1(1 << 16):
            self.total += len(chunk)
            room = self.half - len(self.head)
            self.head += chunk[:room]
            self.tail = (self.tail + chunk[room:] if room > 0 else self.tail + chunk)[-self.half :]

    @property
    def left_out(self) -> int:
        return self.total - len(self.head) - len(self.tail)

    def text(self) -> str:
        gap = f"\n[{self.left_out:,} bytes are left out here]\n".encode() if self.left_out else b""
        return (self.head + gap + self.tail).decode("utf-8", "replace")


def find_sandbox(**limits) -> tuple[Sandbox | None, str]:
    """A sandbox that works here, or None and the reason.

    Args:
        limits: of `Sandbox`.
    """
    program = shutil.which("bwrap")
    if program is None:
        return None, f"there is no bubblewrap here: {INSTALL}"
    sandbox = Sandbox(program, **limits)
    try:
        ran = Sandbox(program, seconds=20.0).run("echo works", Path("/usr"), None)
    except SandboxError as problem:
        return None, str(problem)
    if ran.text != "works\n":
        return None, f"bubblewrap does not work here: {ran.text.strip()[:300]}"
    return sandbox, ""


def sandbox_of(config: RunConfig) -> tuple[Sandbox | None, str]:
    """What bash runs in as a run asks for it, or None; and why bash is off where the run did not turn it off.

    Raises:
        ValueError: the run demands a sandbox, and none works here.
    """
    if config.sandbox == "none" or "bash" not in config.tools:
        return None, ""
    sandbox, reason = find_sandbox()
    if sandbox is None and config.sandbox == "bwrap":
        raise ValueError(f"sandbox is 'bwrap', and {reason}")
    return sandbox, reason
