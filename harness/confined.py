"""Files below one folder, and nothing else: no `..`, no link is ever followed, and a write is whole or not at all.

What runs in a sandbox can leave links behind in the workspace. So every path is walked from the root, folder by
folder, through descriptors that refuse links: there is no moment between a check and its use.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

Parts = tuple[str, ...]
"""A path below the root, folder by folder."""


class OutsideError(ValueError):
    """A path that leads, or could lead, out of the workspace."""


def parse(path: str, alias: str = "/workspace") -> Parts:
    """The folders and the name of a path as an agent writes it; `alias` is what the root is called in the sandbox.

    Raises:
        OutsideError: it is absolute, goes up, or is no path.
    """
    inner = path.removeprefix(alias) if path == alias or path.startswith(alias + "/") else path
    if inner is path and path.startswith(("/", "~")):
        raise OutsideError(f"{path!r} is outside of the workspace; paths are relative to it, like documents/NAME")
    parts = tuple(part for part in inner.split("/") if part not in ("", "."))
    if ".." in parts or "\0" in path or not path.isprintable():
        raise OutsideError(f"{path!r} is outside of the workspace; paths are relative to it and do not go up")
    return parts


class Confined:
    """Reads and writes files below `root`.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).resolve(strict=True)

    def read(self, parts: Parts, limit: int) -> bytes:
        """The bytes of a file.

        Raises:
            OutsideError: a link is on the way.
            FileNotFoundError: there is no such file, or it is a folder or a device.
            ValueError: it has more than `limit` bytes.
        """
        with self._folder(parts[:-1]) as folder:
            handle = _open(parts, os.O_RDONLY | os.O_NONBLOCK, folder)
        with os.fdopen(handle, "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise FileNotFoundError(f"{'/'.join(parts)} is no file")
            if state.st_size > limit:
                raise ValueError(f"{'/'.join(parts)} has {state.st_size:,} bytes; at most {limit:,} are read")
            return file.read()

    def write(self, parts: Parts, data: bytes) -> None:
        """Write a file, making its folders; what was there is replaced only when everything is on disk.

        An empty folder of that name makes way: a run that is taken up again does not have it either.

        Raises:
            OutsideError: a link is on the way.
            OSError: the disk is full, or the name is a folder or too long.
        """
        part = f".{token_hex(8)}.part"
        with self._folder(parts[:-1], make=True) as folder:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                with suppress(OSError):
                    os.rmdir(parts[-1], dir_fd=folder)
                os.replace(part, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(part, dir_fd=folder)
                raise

    def files(self) -> Iterator[tuple[str, int]]:
        """Every file below the root with its size in bytes, in sorted order.

        Left out: links, hidden files, and names that `parse` would refuse, which only a command in a sandbox can make.
        """
        yield from self._files((), 0)

    def _files(self, parts: Parts, depth: int) -> Iterator[tuple[str, int]]:
        with self._folder(parts) as folder, os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir(follow_symlinks=False), e.stat(follow_symlinks=False)) for e in entries)
        for name, is_folder, state in found:
            if name.startswith(".") or not name.isprintable():
                continue
            if is_folder and depth < 64:
                yield from self._files((*parts, name), depth + 1)
            elif stat.S_ISREG(state.st_mode):
                yield "/".join((*parts, name)), state.st_size

    @contextmanager
    def _folder(self, parts: Parts, make: bool = False) -> Iterator[int]:
        """A descriptor of a folder below the root."""
        here = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for depth, part in enumerate(parts):
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=here)
                inner = _open(parts[: depth + 1], os.O_RDONLY | os.O_DIRECTORY, here)
                os.close(here)
                here = inner
            yield here
        finally:
            os.close(here)


def _open(parts: Parts, flags: int, folder: int) -> int:
    if not parts:
        raise FileNotFoundError("the workspace itself is no file; name one in it")
    try:
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(parts[-1], folder):
            raise OutsideError(f"{'/'.join(parts)} is a link; links are not followed") from problem
        if problem.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO):
            raise FileNotFoundError(f"there is no file {'/'.join(parts)}") from problem
        raise


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode)


def own_all(folder: Path) -> None:
    """Give this process back what a command took from it: every file below can be listed, read and removed."""
    _own(folder)
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _own(Path(here, name))


def _own(path: Path) -> None:
    mode = path.lstat().st_mode
    wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
    if not stat.S_ISLNK(mode) and mode & wanted != wanted:
        path.chmod(stat.S_IMODE(mode) | wanted)
