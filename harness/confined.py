"""Files below one folder, and nothing else: no `..`, no link is ever followed, and a write is whole or not at all.

What runs in a sandbox can leave links behind in the workspace. So every path is walked from the root, folder by
folder, through descriptors that refuse links: there is no moment between a check and its use.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

Parts = tuple[str, ...]
"""A path below the root, folder by folder."""
DEPTH = 64
"""Folders that may lie in one another: what is listed, and so handed in, lies no deeper."""


class OutsideError(ValueError):
    """A path that leads, or could lead, out of the workspace."""


def parse(path: str, alias: str = "/workspace") -> Parts:
    """The folders and the name of a path as an agent writes it; `alias` is what the root is called in the sandbox.

    Raises:
        OutsideError: it is absolute, goes up, or is no path.
        OSError: it is deeper than `DEPTH` folders.
    """
    inner = path.removeprefix(alias) if path == alias or path.startswith(alias + "/") else path
    if inner is path and path.startswith(("/", "~")):
        raise OutsideError(f"{path!r} is outside of the workspace; paths are relative to it, like documents/NAME")
    parts = tuple(part for part in inner.split("/") if part not in ("", "."))
    if ".." in parts or "\0" in path:
        raise OutsideError(f"{path!r} is outside of the workspace; paths are relative to it and do not go up")
    if any(unicodedata.category(letter) == "Cs" for letter in path):
        raise OutsideError(f"{path!r} is no valid text, so no file of the workspace is called so")
    if len(parts) > DEPTH + 1:
        raise OSError(errno.ENAMETOOLONG, f"{path[:40]!r}... has {len(parts) - 1} folders, at most {DEPTH} are taken")
    return parts


def is_plain(name: str) -> bool:
    """Whether a name can stand in a list, one a line: it has no line break, no other control and no broken letter."""
    return all(unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") for letter in name)


def shown_names(names: Iterable[str]) -> dict[str, str]:
    r"""Names as a model is shown them, and reads them by, with the real ones: a line break is shown as `\n`.

    Raises:
        ValueError: two are shown alike.
    """
    found: dict[str, str] = {}
    for name in names:
        shown = "".join(letter if is_plain(letter) else ascii(letter)[1:-1] for letter in name)
        if (other := found.setdefault(shown, name)) is not name:
            raise ValueError(f"the documents {other!r} and {name!r} are both shown as {shown}; rename one of them")
    return found


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

        Left out, as only a command in a sandbox can make them: links, names that are not plain, and what lies deeper
        than `DEPTH` folders; and hidden files.
        """
        yield from self._files((), 0)

    def _files(self, parts: Parts, depth: int) -> Iterator[tuple[str, int]]:
        with self._folder(parts) as folder, os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir(follow_symlinks=False), e.stat(follow_symlinks=False)) for e in entries)
        for name, is_folder, state in found:
            if name.startswith(".") or not is_plain(name):
                continue
            if is_folder and depth < DEPTH:
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
    for _ in _below(folder):
        pass


def empty(folder: Path) -> None:
    """Remove everything below a folder, whatever a command did to it."""
    for here, name, is_folder in _below(folder):
        (os.rmdir if is_folder else os.unlink)(name, dir_fd=here)


def _below(folder: Path) -> Iterator[tuple[int, str, bool]]:
    """Everything below a folder, made ours: a descriptor of where it lies, its name, and whether it is a folder.

    A folder comes after what is in it. The walk goes down and up again with one descriptor, so that neither the depth
    of a tree nor the length of its paths matters.

    Raises:
        OSError: somebody moved a folder meanwhile, so that the way up would lead elsewhere.
    """
    _own(str(folder), None)
    here, way = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), []
    try:
        files, folders = _owned(here)
        waiting = [folders]
        while True:
            yield from ((here, name, False) for name in files)
            files = []
            if waiting[-1]:
                way.append((waiting[-1].pop(), os.fstat(here)))
                here = _moved(way[-1][0], here)
                files, folders = _owned(here)
                waiting.append(folders)
            elif way:
                waiting.pop()
                here, (name, above) = _moved("..", here), way.pop()
                if not os.path.samestat(os.fstat(here), above):
                    raise OSError(f"{folder} was changed by somebody else while it was walked through")
                yield here, name, True
            else:
                return
    finally:
        os.close(here)


def _moved(name: str, here: int) -> int:
    """A descriptor of the next folder instead of this one."""
    there = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
    os.close(here)
    return there


def _owned(here: int) -> tuple[list[str], list[str]]:
    """The files and the folders in a folder, made ours."""
    files, folders = [], []
    for name in os.listdir(here):
        (folders if stat.S_ISDIR(_own(name, here)) else files).append(name)
    return files, folders


def _own(name: str, here: int | None) -> int:
    """Make a file or a folder ours; returns its mode."""
    mode = os.lstat(name, dir_fd=here).st_mode
    wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
    if not stat.S_ISLNK(mode) and mode & wanted != wanted:
        os.chmod(name, stat.S_IMODE(mode) | wanted, dir_fd=here)
    return mode
