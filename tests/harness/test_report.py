"""Rows, table, figures and page from cells that are written by hand, so that every number can be checked."""

from __future__ import annotations

import csv
import json
import re

import pytest

from still.harness.cells import Cell, CellStore, SweepConfig
from still.harness.commands import COMMANDS
from still.harness.figures import _bytes_axis
from still.harness.report import conditions, table, write_report
from still.harness.rows import breakdown, committed_rows, compare, make_rows

# Passes among the four questions of each context. The last question is of an amended fact.
VERDICTS = {
    ("full", None): ["1111", "1111"],
    ("none", None): ["0000", "0000"],
    ("int4", None): ["1110", "1110"],
    ("still", 2): ["1111", "1110"],
    ("still", 8): ["1110", "1100"],
    ("snapkv", 2): ["1100", "1000"],
    ("snapkv", 8): ["1000", "0001"],
    ("still-untrained", 2): ["0000", "1000"],
    ("still-untrained", 8): ["0000", "0000"],
}
ENTROPY = {"full": 0.1, "none": 4.1, "still": 0.5, "snapkv": 3.1, "still-untrained": 3.9, "int4": 0.2}
SLOTS = {"full": 1024, "int4": 1024, "none": 0}
CONFIG = SweepConfig(model="pocket", methods=("still", "snapkv", "still-untrained", "int4"), ratios=(2, 8), count=2)
INPUTS = {"model": "pocket-3 0123456789ab"}
PROVENANCE = {
    "versions": {"python": "3.12.0", "torch": "2.9.0"},
    "device": {"type": "cpu", "name": "x86_64"},
    "git": {"commit": "f" * 40, "dirty": False},
    "created": "2026-01-01T00:00:00+00:00",
    "command": "still sweep --preset <quick>",
}


def result(method: str, ratio: float | None, place: int, verdicts: str) -> dict:
    slots = SLOTS.get(method, 1024 // (ratio or 1))
    nbytes = slots * 100 if method != "int4" else 1024 * 28
    questions = [
        {
            "id": f"C-{number}", "output": "", "label": "pass" if mark == "1" else "fail",
            "stale": mark == "0" and number == 3, "recall": float(mark), "cross_entropy": 5 * ENTROPY[method],
            "kl": 5 * (ENTROPY[method] - 0.1), "tokens": 5,
            "tags": {"kind": "date" if number < 2 else "sum", "amended": number == 3, "depth": number / 4},
        }
        for number, mark in enumerate(verdicts)
    ]  # fmt: skip
    return {
        "record": {
            "method": method, "options": {}, "query_aware": False, "synthesis": method == "still", "uses_beta": False,
            "tokens": 1024, "slots": slots, "nbytes": nbytes, "full_nbytes": 102400, "seconds": 0.25 + place,
            "read_seconds": 0.5,
        },
        "warnings": ["a ratio of 8x lies outside the trained 2x to 4x"] if (method, ratio) == ("still", 8) else [],
        "facts": 64,
        "source": {"generator": "matters", "digest": "abcd1234", "difficulty": {"name": "standard"}},
        "questions": questions,
        "provenance": {name: PROVENANCE[name] for name in ("versions", "device", "git", "created")},
    }  # fmt: skip


@pytest.fixture
def store(tmp_path) -> CellStore:
    store = CellStore.create(tmp_path / "out", CONFIG, INPUTS, PROVENANCE)
    for (method, ratio), contexts in VERDICTS.items():
        for place, verdicts in enumerate(contexts):
            store.write(Cell("matters", f"matter-{place}", method, ratio), result(method, ratio, place, verdicts))
    return store


@pytest.fixture
def rows(store) -> dict:
    return {(row["method"], row["ratio"]): row for row in make_rows(store.results(), store.header)}


def test_rows_hold_the_rates_of_their_cells(rows):
    row = rows["still", 8]
    assert row["pass_rate"] == 5 / 8
    assert row["pass_low"] < 5 / 8 < row["pass_high"]
    assert row["share_of_full"] == 5 / 8
    assert rows["still", 2]["all_pass"] == 0.5
    assert row["stale_rate"] == 1.0
    assert rows["still", 2]["stale_rate"] == 0.5
    assert row["cross_entropy"] == 0.5
    assert row["kl"] == 0.4
    assert row["utilisation"] == pytest.approx((4.1 - 0.5) / (4.1 - 0.1))
    assert (row["slots"], row["nbytes"], row["full_nbytes"], row["tokens"]) == (128, 12800, 102400, 1024)
    assert row["facts_per_slot"] == 0.5
    assert 16 < row["bits_per_fact"] < 20
    assert row["compact_seconds"] == 0.75
    assert (row["sets"], row["questions"], row["unscored"]) == (2, 8, 0)
    assert (row["digest"], row["difficulty"], row["commit"]) == ("abcd1234", "standard", "f" * 12)
    assert rows["full", None]["utilisation"] == 1
    assert rows["none", None]["utilisation"] == 0


def test_seeds_of_a_context_are_no_contexts_of_their_own_in_all_pass(store, rows):
    once, results = rows["still", 2], store.results()
    again = [each | {"cell": each["cell"] | {"seed": seed}} for each in results for seed in range(10)]
    copied = {(row["method"], row["ratio"]): row for row in make_rows(again, store.header)}["still", 2]
    assert copied["all_pass"] == once["all_pass"] == 0.5
    assert copied["all_pass_low"] <= once["all_pass_low"]
    assert copied["all_pass_high"] >= once["all_pass_high"]


def test_unscored_answers_are_counted_and_kept_out_of_the_rate(store):
    cell = Cell("matters", "matter-0", "still", 2)
    changed = store.read(cell)
    changed["questions"][0]["label"] = "unscored"
    store.write(cell, changed)
    rows = {(row["method"], row["ratio"]): row for row in make_rows(store.results(), store.header)}
    assert rows["still", 2]["unscored"] == 1
    assert rows["still", 2]["pass_rate"] == pytest.approx(6 / 7, abs=1e-6)


def test_the_breakdown_sees_what_an_average_hides(store):
    parts = {(row["method"], row["ratio"], row["facts"]): row for row in breakdown(store.results())}
    assert parts["still", 8, "never amended"]["pass_rate"] == pytest.approx(5 / 6, abs=1e-6)
    assert parts["still", 8, "amended"]["pass_rate"] == 0
    assert parts["still", 8, "kind: date"]["pass_rate"] == 1
    assert parts["still", 8, "kind: sum"]["pass_rate"] == 0.25
    assert parts["still", 8, "depth: 60 to 80 %"]["pass_rate"] == 0
    assert parts["still", 8, "kind: sum"]["share_of_full"] == 0.25


def test_wins_and_losses_are_paired_at_equal_slots_and_at_no_more_bytes(store):
    pairs = {(row["method"], row["ratio"]): row for row in compare(store.results())}
    assert pairs["snapkv", 8]["difference"] == pytest.approx(5 / 8 - 2 / 8)
    assert (pairs["snapkv", 8]["only_ours"], pairs["snapkv", 8]["only_theirs"]) == (4, 1)
    assert set(pairs) == {("snapkv", 2), ("snapkv", 8), ("int4", 8)}, "int4's bytes fit STILL at 8x, not at 2x"
    assert pairs["int4", 8]["difference"] == pytest.approx(5 / 8 - 6 / 8)


def test_the_table_has_floor_ceiling_and_every_method(store):
    rows = make_rows(store.results(), store.header)
    text = table(rows, "matters")
    assert conditions(rows, "matters") in text
    assert "2 contexts of 1,024 tokens, 8 questions" in text
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert re.search(r"87\.5 \+-.*62\.5 \+-", lines["STILL"])
    assert "100.0" in lines["full cache"]
    assert " 0.0" in lines["no context"]
    assert {"SnapKV", "int4", "STILL, untrained"} <= set(lines)
    assert "STILL: a ratio of 8x lies outside the trained 2x to 4x." in text
    assert "512" in lines["slots per KV head"]
    assert "128" in lines["slots per KV head"]


def test_a_full_rate_beside_another_keeps_the_columns_apart(store):
    made = [row for row in make_rows(store.results(), store.header) if row["ratio"] is not None]
    for row in made:
        row.update(pass_rate=1.0, pass_low=0.8, pass_high=1.0)
        row["method"] = row["method"].replace("snapkv", "snapkv-uneven")
    lines = table(made, "matters").splitlines()
    assert any(line.startswith("SnapKV, uneven heads ") for line in lines)
    cells = [line.count("100.0 +-10.0") for line in lines if "+-10.0" in line]
    assert max(cells) > 1
    assert not any("10.0100.0" in line for line in lines)


def test_the_report_is_written_from_the_cells_alone_and_says_the_same_twice(store):
    pytest.importorskip("matplotlib")
    assert COMMANDS["report"].run(_args(folder=store.folder, committed=None)) == 0
    names = ("rows.csv", "rows.json", "facts.csv", "comparisons.csv", "report.html",
             *(f"figures/{name}.{kind}" for name in ("pass_rate", "likelihood", "facts") for kind in ("svg", "png")))
    first = {name: (store.folder / name).read_bytes() for name in names}
    for name in names:
        (store.folder / name).unlink()
    write_report(store.folder)
    for name in names:
        if not name.endswith(".png"):
            assert (store.folder / name).read_bytes() == first[name], name
    assert first["figures/pass_rate.png"].startswith(b"\x89PNG")
    with open(store.folder / "rows.csv", encoding="utf-8", newline="") as file:
        table_rows = list(csv.DictReader(file))
    data = json.loads(first["rows.json"])
    assert data["provenance"]["git"]["commit"] == "f" * 40
    assert len(table_rows) == len(data["rows"]) == len(VERDICTS)
    assert [float(row["pass_rate"]) for row in table_rows] == [row["pass_rate"] for row in data["rows"]]


def test_the_page_needs_nothing_else_and_escapes_what_it_quotes(store):
    pytest.importorskip("matplotlib")
    write_report(store.folder)
    page = (store.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert not re.search(r"<script|<link|<img|@import|src=", page)
    assert not re.search(r"""(?:href|url)\s*[=(]\s*["']?https?:""", re.sub(r"xmlns[^ >]*|<rdf.*?</rdf:RDF>", "", page))
    assert "--preset &lt;quick&gt;" in page
    assert "f" * 40 in page
    assert "STILL ahead: 0" in page
    assert "no difference shown: 3" in page, "two contexts show no difference"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "figures on one page must not share ids"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_committed_rows_stand_in_only_for_the_same_model_and_difficulty(store, tmp_path):
    pytest.importorskip("matplotlib")
    rows = make_rows(store.results(), store.header)
    like = next(row for row in rows if row["method"] == "still" and row["ratio"] == 8)
    folder = tmp_path / "rows"
    folder.mkdir()
    wanted = {**like, "method": "cartridge", "pass_rate": 0.75}
    others = [{**wanted, "digest": "00000000", "ratio": 2}, {**wanted, "model": "another 00", "ratio": 2}, like]
    with open(folder / "cartridge.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(like))
        writer.writeheader()
        writer.writerows([wanted, *others])
    found = committed_rows(folder, rows)
    assert [(row["method"], row["ratio"], row["pass_rate"], row["source"]) for row in found] == [
        ("cartridge", 8, 0.75, "cartridge.csv")
    ]
    text = write_report(store.folder, committed=folder)
    line = next(line for line in text.splitlines() if line.startswith("Cartridge"))
    assert line.startswith("Cartridge *")
    assert "75.0" in line
    assert "not computed here" in text
    assert "cartridge.csv" in (store.folder / "report.html").read_text(encoding="utf-8")
    assert "Cartridge *" in write_report(store.folder), "a later report has them too"


def test_an_unfinished_sweep_is_reported_as_far_as_it_got(store):
    pytest.importorskip("matplotlib")
    for path in (store.folder / "cells").rglob("*.json"):
        if "snapkv" in path.name or "matter-1" in str(path.parent):
            path.unlink()
    text = write_report(store.folder)
    assert "1 contexts of" in text
    assert "SnapKV" not in text
    for path in (store.folder / "cells").rglob("*.json"):
        if not path.name.startswith("none"):
            path.unlink()
    assert "no context" in write_report(store.folder)


def test_a_folder_without_a_sweep_or_without_a_cell_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no sweep\.json"):
        write_report(tmp_path)
    CellStore.create(tmp_path / "new", CONFIG, INPUTS, PROVENANCE)
    with pytest.raises(ValueError, match="no finished cell"):
        write_report(tmp_path / "new")


def _args(**values):
    from argparse import Namespace

    return Namespace(**values)


def test_an_axis_of_bytes_has_ticks_however_narrow_it_is():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    shown = {}
    for name, places in (("narrow", (595_000, 672_000)), ("wide", (100_000, 900_000))):
        axis = Figure().subplots()
        axis.plot(places, (1, 2))
        _bytes_axis(axis, ())
        high, low = axis.get_xlim()
        shown[name] = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert shown == {"narrow": [595_000, 672_000], "wide": [2.0**17, 2.0**18, 2.0**19]}


def test_a_quantised_cache_meets_the_largest_still_cache_that_takes_no_more_bytes(store):
    for place in range(2):
        store.write(Cell("matters", f"matter-{place}", "still", 32), result("still", 32, place, "0000"))
    assert [row["ratio"] for row in compare(store.results()) if row["method"] == "int4"] == [8]
