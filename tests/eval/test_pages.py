"""HTML reports: what they say, and that nothing in them can act."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from made_scores import scores_of, write_run

from still.eval.agreement import compare_judges
from still.eval.page_parts import dollars, escape
from still.eval.pages import run_page, title_of
from still.eval.pages_across import runs_page
from still.eval.pages_judges import figure_of, judges_page
from still.eval.quarantine import Entry, Quarantine
from still.eval.scored import Rubrics, load_runs
from still.eval.summary import overview
from still.eval.tasks import load_task

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</style></details></p></td>--><svg/onload=document.title='owned'>'\"&amp;&lt; \u202eevil\u202c \x00\x1b[2J {0} %s"
)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and notes what a page may not hold."""

    VOID = ("meta", "br", "circle", "line")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Reader:
    """Parse a page and check what holds for every one."""
    found = Reader(page)
    assert not set(found.tags) & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert found.unbalanced == []
    assert found.open == []
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert not re.search("[\x00\x1b\u202e]", page)
    return found


def hostile_task(root):
    criteria = [
        {"id": f"C-{i:03d}", "title": HOSTILE, "match_criteria": HOSTILE, "deliverables": [HOSTILE]} for i in (1, 2, 3)
    ]
    folder = root / "tasks" / "tax" / "a"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"title": HOSTILE, "instructions": "x", "criteria": criteria}))
    return load_task(folder)


def hostile_run(folder, judge=HOSTILE, labels="pfu"):
    """A run in which every text that a file may hold is hostile."""
    scores = scores_of(labels, judge, run_id=HOSTILE, cost=0.1)
    for result, verdict in zip(scores["criteria_results"], scores["still"]["verdicts"], strict=True):
        result |= {"title": HOSTILE, "reasoning": HOSTILE}
        verdict |= {"title": HOSTILE, "reason": HOSTILE, "evidence": [HOSTILE], "misquotes": [HOSTILE]}
        verdict["votes"] = [{"id": "x", "title": "x", "label": "fail", "judge": HOSTILE, "reason": HOSTILE}]
    scores["still"]["judging"] = {
        "judges": {HOSTILE: {"model": HOSTILE, "cost": 0.3, "tokens": {"input": 10, "calls": 1}}},
        "prompt": {"name": HOSTILE, "sha256": HOSTILE}, "stopped": HOSTILE,
        "deliverables": [{"name": HOSTILE, "state": "ok", "reader": HOSTILE, "sha256": HOSTILE}],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "config.json").write_text(json.dumps({"model": HOSTILE}))


@pytest.fixture
def hostile(tmp_path):
    """Every page made of hostile text alone: name to HTML."""
    task = hostile_task(tmp_path)
    for index in range(3):
        hostile_run(tmp_path / "a" / str(index))
        hostile_run(tmp_path / "b" / str(index), HOSTILE + "2", "ppf")
        for side in "ab":
            file = tmp_path / side / str(index) / "scores.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"run_id": f"{HOSTILE}{index}"}))
    a, b = load_runs([tmp_path / "a"]), load_runs([tmp_path / "b"])
    listed = Quarantine((Entry("tax/a", "C-001", HOSTILE, HOSTILE),))
    return {
        "run": run_page(a[0], task),
        "bare run": run_page(a[0]),
        "runs": runs_page(
            a + b, overview(a + b, listed), Rubrics([tmp_path / "tasks"]), {0: f"runs/{HOSTILE}"}, [HOSTILE]
        ),
        "judges": judges_page([compare_judges(a, b)]),
    }


@pytest.mark.parametrize("name", ["run", "bare run", "runs", "judges"])
def test_hostile_text_stays_text(hostile, name):
    found = read(hostile[name])
    shown = "".join(found.text)
    assert "<script>document.title='owned'</script><img src=x onerror=" in shown
    assert "\ufffdevil" in shown


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("name", ["run", "runs", "judges"])
def test_hostile_text_does_nothing_in_a_real_browser(hostile, name, tmp_path):
    (tmp_path / "page.html").write_text(hostile[name])
    done = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    assert title != "owned"
    assert "<img" not in done.stdout
    assert "evil" in done.stdout


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_printed_page_holds_what_is_folded_on_screen_and_every_column(tmp_path):
    pdfplumber = pytest.importorskip("pdfplumber")
    for judge, labels in (("strong", "ppff"), ("cheap", "pfpf")):
        folder = write_run(tmp_path / judge, labels, judge=judge, cost=0.01)
        scores = json.loads((folder / "scores.json").read_text())
        scores["criteria_results"][0]["reasoning"] = f"{judge} explains a pass"
        judges = {judge: {"model": "m", "cost": 0.04, "tokens": {"calls": 4}, "reused_tokens": {"input": 777}}}
        scores["still"]["judging"] = {"judges": judges}
        (folder / "scores.json").write_text(json.dumps(scores))
    strong, cheap = (load_runs([tmp_path / judge]) for judge in ("strong", "cheap"))

    def printed(page: str) -> str:
        (tmp_path / "page.html").write_text(page)
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri()],
            capture_output=True, timeout=180, check=True,
        )  # fmt: skip
        with pdfplumber.open(tmp_path / "page.pdf") as document:
            words = [(word, page.width) for page in document.pages for word in page.extract_words()]
        return " ".join(word["text"] for word, width in words if word["x1"] < width)

    told = printed(run_page(strong[0]))
    assert "strong explains a pass" in told
    assert " 777 " in told
    assert "judged" in printed(judges_page([compare_judges(strong, cheap)])).partition("disagrees with")[0]


def test_quotations_are_shown_without_pandocs_backslashes_and_no_p_is_zero(tmp_path):
    for judge, labels in (("strong", "f" * 20), ("cheap", "p" * 20)):
        folder = write_run(tmp_path / judge, labels, judge=judge)
        scores = json.loads((folder / "scores.json").read_text())
        for verdict in scores["still"]["verdicts"]:
            verdict["evidence"] = [r"\[the Company\'s fee\] is \$5 <b>net</b>"]
        (folder / "scores.json").write_text(json.dumps(scores))
    strong, cheap = (load_runs([tmp_path / judge]) for judge in ("strong", "cheap"))
    found = read(judges_page([compare_judges(strong, cheap)]))
    for shown in ("".join(found.text), "".join(read(run_page(strong[0])).text)):
        assert "[the Company's fee] is $5 <b>net</b>" in shown
    assert "< 0.001" in found.text
    assert "0.000" not in found.text
    assert "All of this rests on 1 task; the intervals are as wide as that makes them." in found.text


def test_a_run_says_what_was_missed_first_and_why(tmp_path):
    titles = ("Names the seat", "States the fee", "Cites the rule", "Counts")
    folder = write_run(tmp_path / "run", "pfup", titles=titles, cost=0.05, model="gpt-9")
    scores = json.loads((folder / "scores.json").read_text())
    scores["doc_coverage"] = {"documents_read": 7, "total_documents": 9}
    scores["cost"] = {"input_tokens": 863089, "output_tokens": 129764, "wall_clock_seconds": 710.7}
    scores["still"]["verdicts"][1] |= {"evidence": ["a fee of $5"], "misquotes": ["a fee of $6"]}
    (folder / "scores.json").write_text(json.dumps(scores))
    (run,) = load_runs([tmp_path])
    text = "\n".join(each.strip() for each in read(run_page(run)).text if each.strip())
    told = (
        "1 not met",
        "Not met (1)",
        "States the fee",
        "a fee of $5",
        "a fee of $6",
        "Not judged (1)",
        "Cites the rule",
    )
    order = [text.index(each) for each in (*told, "Met (2)", "Names the seat")]
    assert order == sorted(order)
    for said in ("2 of 4", "7 of 9", "made by gpt-9", "863,089 input tokens", "12 minutes", "$0.20",
                 "1 of 4 criteria have no verdict"):  # fmt: skip
        assert said in text


def test_all_pass_that_hangs_on_the_unscored_is_unknown(tmp_path):
    write_run(tmp_path / "run", "ppu")
    (run,) = load_runs([tmp_path])
    text = " ".join(read(run_page(run)).text)
    assert "Unknown" in text
    assert "whether the whole task passes is therefore unknown" in text
    across = " ".join(read(runs_page([run], overview([run]))).text)
    assert "from 0.0 % to 100.0 % if the unknown ones are counted" in across


def test_across_runs_gives_both_scores_the_pairing_and_odd_items(tmp_path):
    for index in range(4):
        for model, labels in (("A", "ppfp"), ("B", "pffp")):
            write_run(tmp_path / model / str(index), labels, model=model, task=f"tax/{index % 2}", run_id=str(index))
    runs = load_runs([tmp_path])
    listed = Quarantine((Entry("tax/0", "C-003", "hash-C-003", "in no document"), Entry("tax/1", "C-001", "old", "x")))
    text = " ".join(read(runs_page(runs, overview(runs, listed), notes=["an entry took no effect"])).text)
    for said in ("without quarantined criteria", "75.0 %", "+25.0", "never passes", "an entry took no effect"):
        assert said in text


def test_judges_are_shown_with_their_figure_and_every_disagreement(tmp_path):
    for task in ("tax/a", "tax/b"):
        write_run(tmp_path / "a" / task[-1], "ppff", judge="strong", task=task, cost=0.004)
        write_run(tmp_path / "b" / task[-1], "pfpf", judge="cheap", task=task, cost=0.0001)
    found = compare_judges(load_runs([tmp_path / "a"]), load_runs([tmp_path / "b"]))
    svg = figure_of([found])
    assert svg.count("<circle") == 4
    assert "reference: strong" in svg
    text = " ".join(read(judges_page([found])).text)
    for said in ("Disagreements (4)", "false pass", "$4.00", "$0.10", "50.0 %", "cheap says so", "strong says so"):
        assert said in text
    shorter = " ".join(read(judges_page([found], most=1)).text)
    assert "3 more are in the files" in shorter
    free = compare_judges(load_runs([tmp_path / "b"]), load_runs([tmp_path / "a"]))
    assert figure_of([free])
    write_run(tmp_path / "c" / "a", "ppff", judge="free", task="tax/a")
    unpriced = compare_judges(load_runs([tmp_path / "a"]), load_runs([tmp_path / "c"]))
    assert figure_of([unpriced]) == ""
    assert "not known" in judges_page([unpriced])


def test_real_runs_make_pages(lab):
    rubrics = Rubrics([lab / "tasks"])
    runs = load_runs([lab / "runs" / "irys"], rubrics)
    for run in runs:
        shown = "".join(read(run_page(run)).text)
        for result in run.scores["criteria_results"]:
            assert result["reasoning"] in shown
            assert result["title"] in shown
    across = "".join(read(runs_page(runs, overview(runs), rubrics)).text)
    assert all(f"{run.scores['n_passed']} of {run.scores['n_criteria']}" in across for run in runs)
    assert title_of(runs[0]).startswith("Compare proposed merger remedies")


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(None, "not known"), (0, "$0.00"), (1234.5, "$1,234.50"), (0.3, "$0.30"), (0.00052, "$0.00052")],
)
def test_amounts(amount, shown):
    assert dollars(amount) == shown


def test_lone_surrogates_can_be_written():
    assert escape("a\ud800b").encode() == b"a?b"
