"""Work shared out among processes: each makes ready once, and takes the next piece as soon as it is free."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .. import memory
from ..cli import is_callers_mistake

FORKS = sys.platform == "linux"  # elsewhere a process that has loaded torch cannot be forked safely
ITEM, ERROR, END = "item", "error", "end"


def make_ready(modules: Sequence[str]) -> None:
    """Begin to import what workers will need, while the caller does likewise: on CPUs they are forked from what has it.

    To be called in the main thread.

    Args:
        modules: by name; such as start no thread when they are imported.
    """
    if not FORKS:
        return
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's, who ends the others
    try:
        _can_fork()
    finally:
        signal.signal(signal.SIGINT, heard)


def _can_fork() -> bool:
    """Whether there is a process to fork from."""
    try:
        multiprocessing.forkserver.ensure_running()
    except OSError:  # its socket lies below TMPDIR, and such a path may have a hundred characters
        return False
    return True


def share_out(pieces: Sequence[Any], workers: int, start: Callable[..., Callable], *given: Any) -> Iterator[Any]:
    """What processes of their own make of the pieces, item by item as it comes.

    Processes come from a fork server, or are spawned where there is a GPU or no such server, so a script that calls
    this needs the usual `if __name__ == "__main__":`. They end with the caller, also where it is killed.

    Args:
        pieces: of work; what can be pickled, like all that goes to and fro.
        workers: processes.
        start: called in each process as `start(number, *given)`, its numbers from 0; returns what makes of a piece an
            iterable of items. Torch has the worker's share of the caller's threads.
        given: likewise.

    Raises:
        RuntimeError: a process died, or broke by a defect; items that came before that have been yielded.
        ValueError: what a process found wrong with its input; likewise OSError and what else has one line of message.
    """
    # What a fork server imports may look for a GPU, and a process that found one cannot be forked.
    forks = FORKS and worker_device(0) is None and _can_fork()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    todo, done = context.Queue(), context.Queue()
    share = (_threads(workers), todo, done, start, given)
    workers = min(workers, len(pieces))
    processes = [context.Process(target=_work, args=(n, *share), daemon=True) for n in range(workers)]
    for piece in (*pieces, *[None] * workers):
        todo.put(piece)
    try:
        for process in processes:
            process.start()
        while workers:
            try:
                kind, item = done.get(timeout=0.5)
            except queue.Empty:
                _check(processes)
                continue
            if kind == ERROR:
                raise item
            if kind == END:
                workers -= 1
            else:
                yield item
        for process in processes:
            process.join()
    finally:
        for each in (todo, done):
            each.cancel_join_thread()
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def worker_device(number: int) -> str | None:
    """Of a worker by its number: the GPUs in turn, None where there is none."""
    import torch

    return f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.device_count() else None


def _check(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        if process.exitcode:
            raise RuntimeError(
                f"a worker process ended with status {process.exitcode} (-9 is what the system does where memory runs "
                "out); what was finished is kept: run again, with fewer workers"
            )


def _threads(workers: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // workers)


def _work(number: int, threads: int, todo, done, start: Callable[..., Callable], given: tuple) -> None:
    """One process, from its first piece to the end."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller's process hears it too, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    memory.keep_freed()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the caller has loaded the same, and heard it
    try:
        work = start(number, *given)
        for piece in iter(todo.get, None):
            for item in work(piece):
                done.put((ITEM, item))
        done.put((END, None))
    except Exception as problem:
        done.put((ERROR, problem if is_callers_mistake(problem) else RuntimeError(traceback.format_exc())))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
