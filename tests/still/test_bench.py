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


def test_latent_attention_is_measured_both_ways(tmp_path):
    assert run(tmp_path, "--kernels", "latent_attention", "--no-figure", "--tokens", "24") == 0
    results = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert {result["mode"] for result in results} == {"forward", "backward"}
    for result in results:
        assert {"reference", "eager"} == set(result["providers"])
        assert result["providers"]["eager"]["error"] < 1e-4


def test_floors_need_no_device_and_agree_with_the_published_shares(capsys):
    """Compaction's share of the prefill of a Qwen3-4B-shaped cache in chunks of 8,192, at 8x and 50x."""
    assert main(["bench", "--floors", "h200"]) == 0
    table = capsys.readouterr().out
    shares = [line.split()[-2] for line in table.splitlines() if "chunks of 8192" in line]
    assert shares == ["8.5%", "1.9%", "4.9%", "1.1%", "1.8%", "0.4%"]
    copied = next(line.split() for line in table.splitlines() if line.startswith("strip_rope") and "T=131072" in line)
    assert float(copied[6]) == pytest.approx(2 * 8 * 131072 * 128 * 2 / 4.8e12 * 1e6, abs=0.1)


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
