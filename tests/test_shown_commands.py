"""Every `still` command that a README, a card, a help text or the trainers' bench shows is one that `still` takes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from still import cli, flags

ROOT = Path(__file__).parents[1]
PAGES = [
    path for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in ("runs", "build", "dist") for part in path.relative_to(ROOT).parts)
]  # fmt: skip
COMMANDS = cli.find_commands()


def shown(text: str) -> list[str]:
    """The commands of a text: what begins with `still` on its lines, joined where a backslash ends them."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    found = (part for line in lines for part in line.split(" && "))
    whole = (match[1] for part in found if (match := re.match(r" *(?:\$ )?still (.*)", part)))
    # Prose stands beside some, behind a hash or in a column of its own.
    return [re.split(r" #|  +\S", each)[0].strip() for each in whole]


def refused(line: str, capsys) -> str:
    """What the parser has against it; empty where it is taken."""
    argv = shlex.split(line)
    if not argv or not re.fullmatch(r"[a-z-]+", argv[0]):
        return ""  # prose: a line that happens to begin so
    if argv[0] not in COMMANDS:
        return f"there is no command {argv[0]!r}"
    parser, _ = cli._build_parser(COMMANDS, argv[0])
    try:
        args, extra = parser.parse_known_args(argv)
    except SystemExit as end:
        return capsys.readouterr().err.splitlines()[-1] if end.code else ""
    unknown = flags.take_pass_through(args, extra)
    return f"unrecognized arguments: {unknown}" if unknown else ""


def unknown_commands(lines: list[str], capsys) -> list[str]:
    """Each refused command with the reason; those with an ellipsis show a part alone."""
    problems = ((line, refused(line, capsys)) for line in lines if "..." not in line)
    return [f"still {line}\n    {problem}" for line, problem in problems if problem]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_show_commands_that_are_there(page, capsys):
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert not unknown_commands([line for block in blocks for line in shown(block)], capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_commands_that_are_there(name, capsys):
    examples = shown(getattr(COMMANDS[name], "examples", None) or "")
    assert not unknown_commands(examples, capsys)


def test_the_trainers_bench_runs_commands_that_are_there(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("pocket_training", ROOT / "bench" / "pocket_training.py")
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pocket_training", bench)
    spec.loader.exec_module(bench)
    for run in bench.RUNS:
        for number in (1, 2, 3):  # a control asks how much its counterpart trained on
            place = tmp_path / f"{run.group}-{run.seed}" / f"round-{number}" / "selection.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text('{"tokens": 1000}')
    lines = [shlex.join(run.argv(tmp_path)) for run in bench.RUNS]
    assert len({run.name for run in bench.RUNS}) == len(lines)
    assert not unknown_commands(lines, capsys)


def test_a_wrong_one_is_found(capsys):
    text = "    still sweep --preset quickstart \\\n        --outptu x  # typo\n$ still swep\nstillness\n"
    assert shown(text) == ["sweep --preset quickstart --outptu x", "swep"]
    assert len(unknown_commands(shown(text), capsys)) == 2
