"""`still budgets` from end to end: a split, its losses and its heat map; and what takes the split afterwards."""

from __future__ import annotations

import json

import pytest
from test_sweep import folder, settings  # noqa: F401 - a fixture

from still.budgets import Split
from still.cache_io import read_header
from still.cli import main
from still.harness.sweep import run_sweep

QUICK = ("--matters", "1", "--facts", "4", "--questions", "2", "--levels", "8", "--ratio", "6")


@pytest.fixture
def split(folder, tmp_path, capsys):  # noqa: F811
    where = tmp_path / "split.json"
    words = ["budgets", str(folder / "model"), "--compactor", str(folder / "compactors" / "seed-0"), *QUICK]
    assert main([*words, "-o", str(where), "--learn", "1", "--store"]) == 0
    assert "KL at 6x" in capsys.readouterr().out
    return where


def test_a_split_goes_through_every_command(folder, split, tmp_path, monkeypatch, capsys):  # noqa: F811
    made = Split.load(split)
    assert (sorted(made.weights), made.source, len(made.fingerprint)) == ([0, 1], "learned", 16)
    losses = json.loads(split.with_name("split.losses.json").read_text())
    assert set(losses["losses"]) == {"0.0", "1.0"}
    assert losses["learned"][-1] <= losses["learned"][0]
    assert losses["split"] == made.to_dict()
    for ending in (".png", ".svg"):
        assert split.with_suffix(ending).stat().st_size > 2000

    compactor = str(folder / "compactors" / "seed-0")
    shown = []
    for place in (str(split), compactor):  # stored in the checkpoint as well
        assert main(["inspect", place]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "learned split, floor 1" in shown[0]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "lease.txt").write_text("This lease of Mill House begins on 3 May 2031 and ends on 9 June 2044.\n" * 3)
    for more in (["--compactor", compactor, "--split", "own"], ["--method", "knorm", "--split", str(split)]):
        words = ["compact", str(folder / "model"), "lease.txt", "--ratio", "4", "-o", "lease.safetensors"]
        assert main([*words, *more]) == 0
        about = read_header("lease.safetensors")["description"]
        tokens, slots = about["logical_length"], about["slots"]
        counts = made.counts(tokens, slots)
        assert about["head_slots"] == {str(layer): list(own) for layer, own in counts.items()}
        assert main(["ask", "lease.safetensors", "When does the lease end?", "--max-new-tokens", "3"]) == 0
    assert main([*words, "--method", "knorm", "--split", "own"]) == 2
    assert "name a JSON file" in capsys.readouterr().err


def test_the_sweep_compares_splits_at_equal_slots(folder, split, tmp_path):  # noqa: F811
    names = ("still", "still-uneven", "snapkv", "snapkv-uneven", "attention_matching-uneven")
    config = settings(folder, methods=names, split=str(split), count=1)
    results = run_sweep(config, tmp_path / "sweep", progress=False).results()
    sizes = {}
    for result in results:
        if result["cell"]["ratio"]:
            sizes.setdefault(result["cell"]["ratio"], {})[result["cell"]["method"]] = result["record"]
    for records in sizes.values():
        assert set(records) == set(names)
        assert len({record["slots"] for record in records.values()}) == 1
        assert records["still"]["nbytes"] == records["still-uneven"]["nbytes"] == records["snapkv-uneven"]["nbytes"]
        assert records["still-uneven"]["options"]["split"] == "learned"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--levels", "1,4"], "--levels has 1"),
        (["--method", "int8"], "a split serves truncation"),
        (["--method", "knorm", "--store"], "belong to the method still"),
        ([], "comes with no compactor"),
        (["-o", "nowhere/split.json"], "does not exist"),
    ],
)
def test_bad_input_says_the_mend(folder, words, message, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert main(["budgets", str(folder / "model"), "-o", "split.json", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_without_a_split_says_so(folder, tmp_path):  # noqa: F811
    config = settings(folder, methods=("knorm-uneven",), compactor=(str(folder / "compactors" / "seed-1"),), seeds=(1,))
    with pytest.raises(ValueError, match="carries no split of its own: measure one with `still budgets`"):
        run_sweep(config, tmp_path / "sweep", progress=False)
