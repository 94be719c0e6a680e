"""`still bench` on this machine: rows, a document, a figure, and an exit code that says when numbers are wrong."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
import torch

from still.cli import main


def run(tmp_path, *more):
    figure = () if importlib.util.find_spec("matplotlib") else ("--no-figure",)
    fixed = ["--tokens", "128", "--repeats", "2", "--device", "cpu", "--output", str(tmp_path)]
    return main(["bench", *fixed, *figure, *more])


def test_bench_writes_rows_a_document_and_a_figure(tmp_path, capsys):
    assert run(tmp_path, "--kernels", "rope,prefix_attention") == 0
    table = capsys.readouterr().out
    assert "strip_rope" in table
    assert "GB/s" in table
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert document["roof"]["bandwidth"] > 0
    assert document["dtype"] == "torch.float32"
    assert document["versions"]["torch"] == torch.__version__
    for result in document["results"]:
        at_least = result["bytes"] / document["roof"]["bandwidth"], result["operations"] / document["roof"]["rate"]
        assert result["floor"] == pytest.approx(max(at_least))
        assert result["ours"] in result["providers"]
        assert not result["wrong"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "roofline.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert {row["kernel"] for row in rows} == {"strip_rope", "prefix_attention"}
    assert {"time", "bandwidth", "rate", "share of floor", "error"} <= {row["metric"] for row in rows}
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in rows)
    assert run(tmp_path, "--kernels", "rope", "--no-figure") == 0
    again = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert again[: len(rows)] == rows
    assert len(again) > len(rows)


def test_wrong_numbers_end_in_an_error(tmp_path, monkeypatch, capsys):
    from still.bench import rope

    right = rope.turn_reference

    def wrong(x, *tables, **how):
        return right(x, *tables, **how) + (1e-2 if x.dtype == torch.float32 else 0.0)

    monkeypatch.setattr(rope, "turn_reference", wrong)
    assert run(tmp_path, "--kernels", "rope") == 1
    assert "WRONG: reference of strip_rope" in capsys.readouterr().out


def test_unknown_kernels_and_devices_are_named(tmp_path, capsys):
    assert run(tmp_path, "--kernels", "softmax") == 2
    refusal = "there is no benchmark 'softmax'; there are rope, latent_attention, prefix_attention"
    assert refusal in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda:0", "--output", str(tmp_path)]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err
