"""Where a sweep's questions come from: synthetic matters, RULER, folders of LAB tasks, or files of question sets."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from ..eval import ruler
from ..eval.matters import generate_matter, question_set
from ..eval.questions import QuestionSet
from ..eval.tasks import find_tasks, load_task
from .cells import SweepConfig

NAMES = "matters, matters-unseen, ruler, ruler/TASK, or a path"


def question_sets(config: SweepConfig, task: str, count_tokens: Callable[[str], int]) -> list[QuestionSet]:
    """The question sets of one task, as many as the config asks for, each with the questions that it draws.

    Args:
        task: `matters` (held-out names and values), `matters-unseen` (templates that training never shows too),
            `ruler` (`count` samples of each of its tasks), `ruler/TASK`, a LAB task or a folder of them, a file that
            `QuestionSet.save` wrote or a folder of them.
        count_tokens: tokens of a text, for RULER's lengths.

    Raises:
        ValueError: the task has no such name, or its path holds fewer sets than asked for.
    """
    sets = list(islice(_sets(config, task, count_tokens), _most(config, task)))
    if not sets:
        raise ValueError(f"{task} holds no question sets (files of QuestionSet.save) and no LAB tasks (task.json)")
    if len({each.id for each in sets}) < len(sets):
        raise ValueError(f"two question sets of {task} have the same id; ids name the cells, so give each its own")
    return [_drawn(each, config.questions) for each in sets]


def _most(config: SweepConfig, task: str) -> int:
    return config.count * (len(ruler.TASKS) if task == "ruler" else 1)


def _sets(config: SweepConfig, task: str, count_tokens: Callable[[str], int]) -> Iterator[QuestionSet]:
    seeds = range(config.first, config.first + config.count)
    kind, _, name = task.partition("/")
    if task in ("matters", "matters-unseen"):
        for seed in seeds:
            yield question_set(generate_matter(seed, config.difficulty, "held_out", task == "matters-unseen"))
    elif task == "ruler" or (kind == "ruler" and not Path(task).exists()):
        if name and name not in ruler.TASKS:
            raise ValueError(f"no RULER task is called {name!r}; there are {', '.join(ruler.TASKS)}")
        for each in [name] if name else ruler.TASKS:
            for seed in seeds:
                yield ruler.generate(each, config.tokens, seed, count_tokens)
    elif Path(task).is_file():
        path = Path(task)
        yield load_task(path).question_set() if path.name == "task.json" else QuestionSet.load(path)
    elif Path(task).is_dir():
        folders = find_tasks(task)
        for folder in folders:
            yield load_task(folder).question_set()
        if not folders:
            yield from map(QuestionSet.load, sorted(Path(task).glob("*.json")))
    else:
        raise ValueError(f"there is no task {task!r}; choose {NAMES}")


def _drawn(each: QuestionSet, count: int) -> QuestionSet:
    """The set with at most `count` of its questions, drawn uniformly; `source` keeps how many facts it has."""
    source = {**each.source, "facts": len(each.questions)}
    if not count or count >= len(each.questions):
        return dataclasses.replace(each, source=source)
    places = sorted(random.Random(f"questions of {each.id}").sample(range(len(each.questions)), count))
    return dataclasses.replace(each, questions=tuple(each.questions[place] for place in places), source=source)
