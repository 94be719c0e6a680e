from __future__ import annotations

import json
import subprocess
import sys

import pytest

from still.cli import main
from still.eval.questions import QuestionSet
from still.eval.tasks import find_tasks, load_task


def test_the_room_imports_no_torch_no_transformers_and_no_numpy():
    code = (
        "import sys, pkgutil, importlib, still.eval\n"
        "for found in pkgutil.walk_packages(still.eval.__path__, 'still.eval.'): importlib.import_module(found.name)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'still.harness', 'still.kernels', 'still.methods'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_generate_writes_tasks_and_goes_on(tmp_path, capsys):
    argv = ["matters", "generate", "--difficulty", "tiny", "--seeds", "0:3,7", "--family", "contracts"]
    assert main([*argv, "--output", str(tmp_path / "lab")]) == 0
    assert "4 contracts tasks" in capsys.readouterr().out
    assert main([*argv, "--output", str(tmp_path / "lab")]) == 0
    assert len(find_tasks(tmp_path / "lab")) == 4
    assert main(["lab", "validate", str(tmp_path / "lab")]) == 0
    assert "4 of 4 tasks are sound" in capsys.readouterr().out
    assert main([*argv, "--split", "train", "--output", str(tmp_path / "lab")]) == 2
    assert "split" in capsys.readouterr().err


def test_generate_writes_assignments_that_ask_for_a_part(tmp_path, capsys):
    argv = ["matters", "generate", "--family", "assignments", "--relevance", "0.5", "--criteria", "2"]
    assert main([*argv, "--documents", "3", "--seeds", "0:2", "-o", str(tmp_path / "lab")]) == 0
    assert "2 assignments of 2 parties, 50 % relevant," in capsys.readouterr().out
    tasks = [load_task(folder) for folder in find_tasks(tmp_path / "lab")]
    assert [(len(task.documents), sum(not c.is_distractor for c in task.criteria)) for task in tasks] == [(3, 2)] * 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--family assignments --difficulty tiny", "--difficulty tiny is not for assignments"),
        ("--family assignments --relevance 2", "relevance is 2.0"),
        ("--family contracts --criteria 3", "--criteria 3 is for --family assignments; contracts has --difficulty"),
    ],
)
def test_flags_of_another_family_are_refused(tmp_path, capsys, flags, said):
    assert main(["matters", "generate", *flags.split(), "-o", str(tmp_path / "lab")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("seeds", ["x", "3:3", "-1", "1:", ""])
def test_bad_seeds_are_refused(tmp_path, capsys, seeds):
    with pytest.raises(SystemExit) as stop:
        main(["matters", "generate", f"--seeds={seeds}", "--output", str(tmp_path / "lab")])
    assert stop.value.code == 2
    assert "names no seeds" in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


def test_show_prints_documents_questions_and_answers(capsys):
    assert main(["matters", "show", "--difficulty", "tiny", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert main(["matters", "show", "--difficulty", "tiny", "--seed", "3", "--json"]) == 0
    questions = QuestionSet.from_json(json.loads(capsys.readouterr().out))
    assert questions.text in shown
    assert all(f"{each.text}  ->  {each.answer}" in shown for each in questions.questions)


def test_ruler_writes_a_sample_and_says_how_it_counted(tmp_path, capsys):
    file = tmp_path / "vt.json"
    assert main(["ruler", "--task", "vt", "--tokens", "400", "--seed", "2", "--output", str(file)]) == 0
    sample = QuestionSet.load(file)
    assert sample.source["counter"] == "words and punctuation marks"
    assert 350 < sample.source["counted_tokens"] <= 400
    assert main(["ruler", "--task", "vt", "--tokens", "400", "--seed", "2"]) == 0
    assert QuestionSet.from_json(json.loads(capsys.readouterr().out)) == sample


def test_ruler_counts_with_a_tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    argv = ["ruler", "--tokens", "300", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*argv, "--output", str(tmp_path / "sample.json")]) == 0
    sample = QuestionSet.load(tmp_path / "sample.json")
    assert len(sample.text.split()) == sample.source["counted_tokens"] <= 300


def test_lab_show_hides_the_rubric_from_the_agents_view(tmp_path, capsys):
    main(["matters", "generate", "--difficulty", "tiny", "--output", str(tmp_path / "lab")])
    capsys.readouterr()
    (folder,) = find_tasks(tmp_path / "lab")
    task = load_task(folder)
    assert main(["lab", "show", str(folder)]) == 0
    assert task.criteria[0].match_criteria in capsys.readouterr().out
    assert main(["lab", "show", "--agent", str(folder)]) == 0
    agent = capsys.readouterr().out
    assert task.instructions in agent
    assert not any(each.title in agent or each.rubric_hash in agent for each in task.criteria)


def test_lab_validate_says_what_is_odd(tmp_path, capsys):
    main(["matters", "generate", "--difficulty", "tiny", "--output", str(tmp_path / "lab")])
    (folder,) = find_tasks(tmp_path / "lab")
    raw = json.loads((folder / "task.json").read_text())
    raw["criteria"].append(raw["criteria"][0])
    (folder / "task.json").write_text(json.dumps(raw))
    assert main(["lab", "validate", str(tmp_path / "lab")]) == 1
    assert "two criteria" in capsys.readouterr().out
    assert main(["lab", "validate", str(tmp_path / "nothing")]) == 2
