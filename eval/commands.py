"""Commands of the evaluation room: synthetic matters, RULER samples and LAB task folders.

This module is imported whenever `still` starts, so everything that a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .grade_command import Grade
from .judges_command import Judges
from .tasks_command import Tasks


@dataclass(frozen=True)
class Command:
    """What the dispatcher needs: one line of help, the arguments, and the function that does it."""

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    examples: str = ""


def parse_seeds(text: str) -> list[int]:
    """Read "7", "0:20" (20 is left out) or "1,3,5:8".

    Raises:
        argparse.ArgumentTypeError: it is none of these, or names no seed.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, colon, last = part.partition(":")
            seeds += range(int(first), int(last)) if colon else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} names no seeds; write 7, 0:20 (20 is left out) or 1,3,5:8")
    return seeds


def _add_matter_options(parser: argparse.ArgumentParser) -> None:
    from .matters import DIFFICULTIES

    parser.add_argument("--difficulty", choices=list(DIFFICULTIES), default="standard", help="default: standard")
    parser.add_argument("--split", choices=["held_out", "train"], default="held_out", help="whose names and values")
    parser.add_argument(
        "--unseen-templates", action="store_true", help="use only the sentences that training never shows"
    )


def _configure_matters(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    generate = verbs.add_parser("generate", help="write matters as LAB tasks", description=_generate_matters.__doc__)
    _add_matter_options(generate)
    generate.add_argument(
        "--seeds", type=parse_seeds, default=[0], metavar="A:B", help="7, 0:20 or 1,3,5:8; default: 0"
    )
    families = ["practice", "contracts", "firm-knowledge", "assignments"]
    generate.add_argument(
        "--family", choices=families, default="practice",
        help="of LAB, or assignments: a few of a matter's parties are asked for, as an agent's sweep does (default: "
        "practice)",
    )  # fmt: skip
    asked = generate.add_argument_group("an assignment")
    asked.add_argument("--relevance", metavar="X", type=float, help="share of the facts that is asked for (default: 1)")
    asked.add_argument("--criteria", metavar="N", type=int, help="facts that are asked for (default: 20)")
    asked.add_argument("--documents", metavar="N", type=int, help="that they are spread over (default: 8)")
    generate.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="tasks go to DIR/tasks; goes on where it was"
    )
    generate.set_defaults(verb_run=_generate_matters, difficulty=None)  # None: nobody asked, and assignments have none
    show = verbs.add_parser("show", help="print a matter and what can be asked of it", description=_show_matter.__doc__)
    _add_matter_options(show)
    show.add_argument("--seed", type=int, default=0, help="which matter (default: 0)")
    show.add_argument("--json", action="store_true", help="print the question set as JSON")
    show.set_defaults(verb_run=_show_matter)


def _generate_matters(args: argparse.Namespace) -> int:
    """Write synthetic matters in LAB's own task format; every criterion can be checked by machine."""
    asked = {name: getattr(args, name) for name in ("relevance", "criteria", "documents")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.family == "assignments":
        from .matters.assignments import Assignment, write_assignments

        if args.difficulty:
            raise ValueError(f"--difficulty {args.difficulty} is not for assignments; give --relevance and --criteria")
        assignment = Assignment(**asked)
        folders = write_assignments(args.output, assignment, args.seeds, args.split, args.unseen_templates)
        kind = f"assignments of {assignment.criteria} parties, {assignment.label} relevant,"
        print(f"{len(folders)} {kind} are in {args.output}/tasks")
        return 0
    if asked:
        name, value = next(iter(asked.items()))
        raise ValueError(f"--{name} {value:g} is for --family assignments; {args.family} has --difficulty")
    from .matters.lab_format import write_lab_tasks

    difficulty = args.difficulty or "standard"
    folders = write_lab_tasks(
        args.output, args.family, args.seeds, difficulty, args.split, unseen_templates=args.unseen_templates
    )
    print(f"{len(folders)} {args.family} tasks of difficulty {difficulty} are in {args.output}/tasks")
    return 0


def _show_matter(args: argparse.Namespace) -> int:
    """Print the documents of a matter, then its questions and answers."""
    import json

    from .matters import generate_matter, question_set

    matter = generate_matter(args.seed, args.difficulty, args.split, args.unseen_templates)
    questions = question_set(matter)
    if args.json:
        print(json.dumps(questions.to_json(), indent=1, ensure_ascii=False))
        return 0
    print(f"{questions.id} (difficulty {matter.difficulty.name}, {matter.difficulty.digest})\n\n{questions.text}\n")
    for question in questions.questions:
        stale = f"  (no longer {', '.join(question.wrong)})" if question.wrong else ""
        print(f"{question.id}  {question.text}  ->  {question.answer}{stale}")
    return 0


def _configure_ruler(parser: argparse.ArgumentParser) -> None:
    from .ruler import TASKS

    parser.add_argument("--task", choices=list(TASKS), default="niah_single_2", help="default: niah_single_2")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens of the context (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="which sample (default: 0)")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.json to count with; without it, tokens are words and punctuation marks, and the file says so",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where the question set goes as JSON (default: stdout)")


def _run_ruler(args: argparse.Namespace) -> int:
    """Write one RULER sample."""
    import dataclasses
    import json
    import re

    from .ruler import generate

    if args.tokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(args.tokenizer)
        except Exception as problem:  # tokenizers has no class of its own for these
            raise ValueError(f"--tokenizer {args.tokenizer}: {problem}; give a tokenizer.json") from problem
        counter, name = (lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)), args.tokenizer
    else:
        counter, name = (lambda text: len(re.findall(r"\w+|[^\w\s]", text))), "words and punctuation marks"
    sample = generate(args.task, args.tokens, args.seed, counter)
    sample = dataclasses.replace(sample, source={**sample.source, "counter": name})
    if args.output:
        sample.save(args.output)
        print(f"{sample.id}: {sample.source['counted_tokens']} tokens ({name}) in {args.output}", file=sys.stderr)
    else:
        print(json.dumps(sample.to_json(), indent=1, ensure_ascii=False))
    return 0


def _configure_lab(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("show", help="print a task with its rubric", description=_show_lab.__doc__)
    show.add_argument("path", help="the folder of one task")
    show.add_argument("--agent", action="store_true", help="print only what a solving agent may see")
    show.set_defaults(verb_run=_show_lab)
    validate = verbs.add_parser("validate", help="check task folders", description=_validate_lab.__doc__)
    validate.add_argument("paths", nargs="+", metavar="PATH", help="folders of tasks, or folders that hold many")
    validate.set_defaults(verb_run=_validate_lab)


def _show_lab(args: argparse.Namespace) -> int:
    """Print a LAB task: the assignment, the documents and, for you alone, the rubric."""
    from .tasks import load_task

    task = load_task(args.path)
    view = task.agent_view()
    print(f"{task.id} ({task.family})\n\n{view.instructions}\n")
    print(f"deliverables: {', '.join(view.deliverables) or 'not named: every output is judged'}")
    print(f"documents ({len(view.documents)}): {', '.join(view.documents[:10])}{' ...' * (len(view.documents) > 10)}")
    if not args.agent:
        print(f"\n{task.title}: {len(task.criteria)} criteria, rubric {task.rubric_hash}")
        for each in task.criteria:
            bound = ", ".join(each.deliverables) or "every output"
            print(f"{each.id} [{each.rubric_hash}] ({bound}) {each.title}\n    {each.match_criteria}")
    return 0


def _validate_lab(args: argparse.Namespace) -> int:
    """Load every task below the paths, write each back in memory, and say what is odd. Exit code 1 if anything is."""
    import json
    from pathlib import Path

    from .tasks import find_tasks, load_task, problems

    folders = [folder for path in args.paths for folder in find_tasks(path)]
    if not folders:
        raise ValueError(f"there is no task.json below {', '.join(args.paths)}; name folders that hold LAB tasks")
    odd = 0
    for folder in folders:
        try:
            task = load_task(folder)
            found = problems(task)
            if task.to_json() != json.loads((Path(folder) / "task.json").read_text(encoding="utf-8")):
                found.append("it is not written back as it was read")
        except ValueError as problem:
            found = [str(problem)]
        odd += bool(found)
        for each in found:
            print(f"{folder}: {each}")
    print(f"{len(folders) - odd} of {len(folders)} tasks are sound")
    return 1 if odd else 0


def _run_verb(args: argparse.Namespace) -> int:
    return args.verb_run(args)


COMMANDS = {
    "grade": Grade(),
    "judges": Judges(),
    "tasks": Tasks(),
    "matters": Command(
        "make synthetic matters in LAB's own task format, or look at one",
        _configure_matters,
        _run_verb,
        "examples:\n  still matters show --difficulty tiny --seed 3\n"
        "  still matters generate --difficulty standard --seeds 0:20 --family contracts -o lab/\n"
        "  still matters generate --family assignments --relevance 0.25 --seeds 0:200 --split train -o lab-train/",
    ),
    "ruler": Command(
        "make a needle or variable-tracking sample of RULER, of any length",
        _configure_ruler,
        _run_ruler,
        "example:\n  still ruler --task vt --tokens 8192 --tokenizer tokenizer.json --output vt.json",
    ),
    "lab": Command(
        "look at LAB task folders, or check them",
        _configure_lab,
        _run_verb,
        "examples:\n  still lab show tasks/real-estate/review-lease\n  still lab validate tasks/",
    ),
}
