"""The dispatcher, flags from dataclasses, and the messages that a user meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from still import flags
from still.cli import find_commands, is_callers_mistake, main

PLUGIN = '''
import sys, time
class Show:
    help = "Show what arrived."
    examples = "examples:\\n  still show 3"
    resume = "run `still show` again to go on"
    def configure(self, parser):
        from still import flags
        parser.add_argument("what")
        flags.add_pass_through(parser, "trainer")
    def run(self, args):
        print(args.what, args.trainer)
        if args.what == "value":
            raise ValueError("ratio is 0.5; it must be 1 or more")
        if args.what == "key":
            raise KeyError("there is no method 'x'; choose one of a, b")
        if args.what == "defect":
            {}["defect"]
        if args.what == "missing":
            open("/nowhere/lease.txt")
        if args.what == "sleep":
            print("started", flush=True)
            time.sleep(60)
        if args.what == "warn":
            import warnings
            for _ in range(3):
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                warnings.warn("a ratio of 99x lies outside the trained 2x to 64x")
            warnings.warn("`past_key_values` is deprecated and will be removed. Use `cache`.", FutureWarning)
        return 3 if args.what == "three" else None
COMMANDS = {"show": Show()}
'''


@pytest.fixture
def plugins(tmp_path):
    """An environment in which a plug-in brings a command and another one is broken."""
    (tmp_path / "showroom.py").write_text(PLUGIN)
    info = tmp_path / "showroom-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: showroom\nVersion: 1.0\n")
    entries = "[still.commands]\nshowroom = showroom:COMMANDS\nruin = ruin_of_a_module:COMMANDS\n"
    (info / "entry_points.txt").write_text(entries)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path}


def still(*arguments: str, env=None) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "still.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_plugin_adds_a_command(plugins):
    done = still("show", "7", env=plugins)
    assert (done.returncode, done.stdout) == (0, "7 {}\n")
    listed = still("--help", env=plugins)
    assert "Show what arrived." in listed.stdout
    assert "still ask" in listed.stdout  # it teaches by example
    assert "still show 3" in still("show", "--help", env=plugins).stdout


def test_a_broken_room_costs_one_line_and_nothing_else(plugins):
    done = still("show", "7", env=plugins)
    lines = [line for line in done.stderr.splitlines() if "ruin_of_a_module" in line]
    assert len(lines) == 1
    assert "cannot be loaded: ModuleNotFoundError" in lines[0]
    assert "Traceback" not in done.stderr


def test_exit_code_of_a_command_is_the_exit_code(plugins):
    assert still("show", "three", env=plugins).returncode == 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("value", "still: error: ratio is 0.5; it must be 1 or more"),
        ("key", "still: error: there is no method 'x'; choose one of a, b"),
        ("missing", "still: error: /nowhere/lease.txt: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(plugins, what, message):
    done = still("show", what, env=plugins)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_the_traceback_is_there_when_asked_for(plugins, place):
    arguments = {"before": ["--traceback", "show", "value"], "after": ["show", "value", "--traceback"]}
    env = {**plugins, "STILL_TRACEBACK": "1"} if place == "environment" else plugins
    done = still(*arguments.get(place, ["show", "value"]), env=env)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_defect_keeps_its_traceback(plugins):
    done = still("show", "defect", env=plugins)
    assert done.returncode == 1
    assert "KeyError: 'defect'" in done.stderr


def test_a_warning_is_one_line_and_comes_once(plugins):
    done = still("show", "warn", env=plugins)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "ruin_of_a_module" not in line]
    assert lines == ["still: warning: a ratio of 99x lies outside the trained 2x to 64x"]


def test_an_interrupt_says_how_to_go_on(plugins):
    command = [sys.executable, "-m", "still.cli", "show", "sleep"]
    process = subprocess.Popen(
        command, env=plugins, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    while process.stdout.readline() != "started\n":
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "still: interrupted; run `still show` again to go on" in error
    assert "Traceback" not in error


def test_a_misspelt_command_is_answered_with_the_nearest(capsys):
    assert main(["inspekt"]) == 2
    assert "there is no command 'inspekt'; did you mean 'inspect'?" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_version_is_that_of_the_distribution(capsys):
    import still as package

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["still-kv", package.__version__]


def test_arguments_pass_through_to_the_trainer(plugins):
    values = ["--trainer.learning-rate", "1e-4", "--trainer.report_to=none", "--trainer.bf16"]
    done = still("show", "7", *values, env=plugins)
    assert done.stdout == "7 {'learning_rate': 0.0001, 'report_to': 'none', 'bf16': True}\n"
    wrong = still("show", "7", "--trainee.bf16", env=plugins)
    assert wrong.returncode == 2
    assert "unrecognized arguments: --trainee.bf16" in wrong.stderr


def test_every_flag_of_every_command_has_help():
    import argparse

    def walk(parser, name):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub, inner in action.choices.items():
                    walk(inner, f"{name} {sub}")
            elif action.help is not argparse.SUPPRESS:
                assert action.help, f"still {name}: {action.option_strings or action.dest} has no help"

    for name, command in find_commands().items():
        assert command.help, name
        parser = argparse.ArgumentParser()
        command.configure(parser)
        walk(parser, name)
        parser.format_help()  # a stray % in a help text raises here


@dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        count: how many,
            in all.
        name: what to call it.
        kind: which kind.
        ratios: compression ratios.
        fast: hurry.
        limit: at most so many.
        folder: where.
    """

    count: int
    name: str = "a 100% plan"
    kind: Literal["big", "small"] = "big"
    ratios: tuple[float, ...] = (2, 8)
    fast: bool = False
    limit: int | None = None
    folder: Path | None = None
    rate: float = field(default=4e-5, metadata={"help": "learning rate"})
    hidden: int = 5


def plan_parser():
    import argparse

    parser = argparse.ArgumentParser()
    flags.add_flags(parser, Plan, skip=("hidden",))
    return parser


def test_flags_carry_the_defaults_of_the_dataclass():
    args = plan_parser().parse_args(["--count", "3"])
    assert flags.from_flags(args, Plan) == Plan(3)
    assert flags.from_flags(args, Plan, hidden=6) == Plan(3, hidden=6)


def test_flags_parse_every_type():
    words = ["--count", "3", "--name", "x", "--kind", "small", "--ratios", "2,4.5", "--fast"]
    words += ["--limit", "9", "--folder", "a/b", "--rate", "1e-3"]
    made = flags.from_flags(plan_parser().parse_args(words), Plan)
    assert made == Plan(3, "x", "small", (2.0, 4.5), True, 9, Path("a/b"), 1e-3)


def test_flags_explain_themselves():
    text = " ".join(plan_parser().format_help().split())
    for part in ("how many, in all", "learning rate (default: 4e-05)", "(default: 2,8)", "{big,small}", "--no-fast"):
        assert part in text
    assert "a 100% plan" in text


@pytest.mark.parametrize("words", [["--count", "three"], ["--count", "1", "--kind", "huge"], [], ["--hidden", "3"]])
def test_flags_refuse_what_the_field_cannot_hold(words, capsys):
    with pytest.raises(SystemExit) as stop:
        plan_parser().parse_args(words)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_type_that_flags_do_not_know_is_refused():
    import argparse

    @dataclass
    class Odd:
        table: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Odd\.table"):
        flags.add_flags(argparse.ArgumentParser(), Odd)


def test_what_counts_as_a_mistake():
    assert is_callers_mistake(FileNotFoundError("x"))
    assert not is_callers_mistake(KeyError("layer"))
    assert not is_callers_mistake(TypeError("x"))
    assert not is_callers_mistake(RuntimeError("x"))
