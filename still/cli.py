"""The command line's dispatcher: it finds commands through entry points and imports no room itself.

A room, or a plug-in, declares `COMMANDS: dict[str, Command]` in a module that loads no torch and names it in
the entry-point group `still.commands`. What a command needs to run is imported inside its `run`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points, version
from typing import Protocol

from . import flags, memory

GROUP = "still.commands"

DESCRIPTION = "Compact the KV caches of language models in one forward pass, and measure what that costs."

EXAMPLES = """\
examples:
  still sweep --preset quickstart                     every method on the model that comes with still
  still compact pocket lease.txt --ratio 8 -o lease.safetensors
  still ask lease.safetensors "When does the term end?"
  still inspect lease.safetensors

`still COMMAND --help` explains a command. --traceback (or STILL_TRACEBACK=1) shows where an error came from.
"""


class Command(Protocol):
    """One command. Rooms need not import this class: any object with these three names is a command.

    Attributes:
        help: one line for the list of commands.
        description: optional, what `still COMMAND --help` says before the flags.
        examples: optional, what it says after them.
        resume: optional, said when the command is interrupted: how to go on from there.
    """

    help: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments; called only for the command that was asked for."""

    def run(self, args: argparse.Namespace) -> int | None:
        """Do the work and return the exit code; None is 0."""


class CommandError(Exception):
    """A mistake of the caller's that no built-in exception fits: printed as one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the caller's mistake, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        commands = find_commands()
    except CommandError as problem:
        return _complain(str(problem))
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in commands:
        return _complain(f"there is no command {name!r}{_nearest(name, commands)}; `still --help` lists them")
    parser, chosen = _build_parser(commands, name)
    args, extra = parser.parse_known_args(argv)
    if name is None:
        parser.print_help()
        return 0
    unknown = flags.take_pass_through(args, extra)
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    return _run(commands[name], args)


def find_commands() -> dict[str, Command]:
    """Every command that an installed package declares, by name; a room that fails to load costs one line on stderr.

    Raises:
        CommandError: two packages declare the same command.
    """
    found: dict[str, Command] = {}
    homes: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            declared = dict(entry.load())
        except Exception as problem:
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
            print(f"still: the commands of {entry.value} cannot be loaded: {reason}", file=sys.stderr)
            continue
        for name, command in declared.items():
            if name in found and found[name] is not command:
                raise CommandError(f"{homes[name]} and {entry.value} both declare the command {name!r}; remove one")
            found[name], homes[name] = command, entry.value
    return found


def _build_parser(
    commands: dict[str, Command], name: str | None
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(
        prog="still",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"still-kv {version('still-kv')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    chosen = None
    for key in sorted(commands):
        command = commands[key]
        sub = subparsers.add_parser(
            key,
            help=command.help,
            description=getattr(command, "description", "") or command.help,
            epilog=getattr(command, "examples", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        if key == name:
            command.configure(sub)
            chosen = sub
    return parser, chosen


def _run(command: Command, args: argparse.Namespace) -> int:
    show = getattr(args, "traceback", False) or os.environ.get("STILL_TRACEBACK", "") not in ("", "0")
    memory.keep_freed()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warner()
            # transformers 5.17 knows the cache by no other name, and no user of a command can mend it
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            code = command.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        resume = getattr(command, "resume", "")
        print(f"\nstill: interrupted{'; ' + resume if resume else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except Exception as problem:
        if show or not is_callers_mistake(problem):
            traceback.print_exc()
            return 1 if not is_callers_mistake(problem) else 2
        return _complain(_message(problem))


def is_callers_mistake(problem: BaseException) -> bool:
    """Whether one line of message is all that the caller needs; anything else is a defect and keeps its traceback."""
    if isinstance(problem, KeyError):
        return bool(problem.args) and isinstance(problem.args[0], str) and " " in problem.args[0]
    return isinstance(problem, CommandError | ValueError | OSError | NotImplementedError | ModuleNotFoundError)


def _message(problem: BaseException) -> str:
    if isinstance(problem, KeyError):
        return problem.args[0]
    if isinstance(problem, OSError) and problem.filename and problem.strerror:
        return f"{problem.filename}: {problem.strerror}"
    if isinstance(problem, ModuleNotFoundError) and str(problem).startswith("No module named"):
        return f"{problem}; install the package, or the extra of still-kv that brings it"
    return str(problem) or type(problem).__name__


def _warner() -> Callable[..., None]:
    """Shows each warning once, in a line without the place in the code: what still warns of lies in the caller's data.

    Python's own "once a place" does not hold here: libraries that touch the filters make it forget.
    """
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: object, **_: object) -> None:
        line = f"still: {'' if category is UserWarning else category.__name__ + ' '}warning: {message}"
        if line not in shown:
            shown.add(line)
            print(line, file=sys.stderr)

    return show


def _complain(message: str) -> int:
    print(f"still: error: {message}", file=sys.stderr)
    return 2


def _nearest(name: str, commands: dict[str, Command]) -> str:
    near = difflib.get_close_matches(name, commands, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


if __name__ == "__main__":
    sys.exit(main())
