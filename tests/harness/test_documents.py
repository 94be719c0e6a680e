"""Real formats as documents of a task: read once, kept by content, and errors that leave the run going."""

from __future__ import annotations

import io
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pytest
from agent_cases import Reader, call, episode, make_task, of, play

from still.eval.pandoc import markdown_to_docx
from still.eval.readers import read_bytes
from still.harness.agent import drive
from still.harness.documents import Documents
from still.harness.runs import read_run

WORDS = "The rent of Ashgate Mining is $123,456."
REAL = sorted((Path(__file__).resolve().parents[3] / "shared" / "lab" / "runs").rglob("*.docx"))


def docx() -> bytes:
    return markdown_to_docx("lease.docx", f"# Lease\n\n{WORDS}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n".encode())


def xlsx() -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, data = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["party", "rent"])
    book.active.append([WORDS, 123456])
    book.save(data)
    return data.getvalue()


def pptx() -> bytes:
    slides = pytest.importorskip("pptx")
    deck, data = slides.Presentation(), io.BytesIO()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Terms", WORDS
    deck.save(data)
    return data.getvalue()


def pdf(password: str = "") -> bytes:
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    data = io.BytesIO()
    encrypt = None
    if password:
        from reportlab.lib.pdfencrypt import StandardEncryption

        encrypt = StandardEncryption(password)
    page = canvas.Canvas(data, encrypt=encrypt)
    page.drawString(72, 720, WORDS)
    page.save()
    return data.getvalue()


def eml() -> bytes:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "a@example.org", "b@example.org", "Rent"
    mail.set_content(WORDS)
    mail.add_attachment(b"x", maintype="application", subtype="octet-stream", filename="annex.bin")
    return mail.as_bytes()


def locked_docx() -> bytes:
    offcrypto = pytest.importorskip("msoffcrypto.format.ooxml")
    data = io.BytesIO()
    offcrypto.OOXMLFile(io.BytesIO(docx())).encrypt("secret", data)
    return data.getvalue()


def bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        with archive.open("word/document.xml", "w", force_zip64=True) as part:
            for _ in range(600):
                part.write(bytes(1 << 20))
    return data.getvalue()


GOOD = {"a.docx": docx, "b.xlsx": xlsx, "c.pptx": pptx, "d.pdf": pdf, "e.eml": eml, "f.txt": WORDS.encode}
BAD = {
    "corrupt.docx": (lambda: docx()[:400], "corrupt", "damaged"),
    "corrupt.pdf": (lambda: pdf()[:60] + bytes(99), "corrupt", "cannot be read"),
    "encrypted.pdf": (lambda: pdf("secret"), "encrypted", "protected by a password"),
    "encrypted.docx": (locked_docx, "encrypted", "protected by a password"),
    "empty.txt": (bytes, "empty", "empty"),
    "huge.txt": (lambda: b"x" * 100_000_000, "too_large", "100,000,000 bytes"),
    "bomb.docx": (bomb, "too_large", "zip bomb"),
    "old.doc": (lambda: b"x", "unsupported", "save it as .docx"),
}


def task_of(root: Path, files: dict[str, bytes], deliverables=()):
    task = make_task(root, {"00.txt": "first"}, deliverables)
    for name, data in files.items():
        (task.folder / "documents" / name).write_bytes(data)
    return task


def test_every_format_is_read_and_counted_and_kept(tmp_path, monkeypatch):
    task = task_of(tmp_path, {name: make() for name, make in GOOD.items()})
    first = Documents.load(task.agent_view(), cache=tmp_path / "cache")
    assert not first.errors
    for name in GOOD:
        assert WORDS in first.text(name).replace("\\", ""), name
        assert first.characters(name) == len(first.text(name))
    assert "annex.bin" in first.text("e.eml")
    monkeypatch.setattr("still.harness.documents.read_bytes", None)  # the cache answers, or this breaks
    again = Documents.load(task.agent_view(), cache=tmp_path / "cache")
    assert [again.text(name) for name in again.names] == [first.text(name) for name in first.names]


def test_a_damaged_cache_is_written_again(tmp_path):
    task = task_of(tmp_path, {})
    Documents.load(task.agent_view(), cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text(file.read_text().replace("first", "other"))
    assert Documents.load(task.agent_view(), cache=tmp_path / "cache").text("00.txt") == "first"


@pytest.mark.parametrize("names", [
    ["corrupt.docx", "empty.txt", "old.doc"], pytest.param([*BAD], marks=pytest.mark.full),
])  # fmt: skip
def test_what_cannot_be_read_is_said_and_the_run_goes_on(tmp_path, names):
    bad = {name: BAD[name] for name in names}
    task = task_of(tmp_path, {name: make() for name, (make, _, _) in bad.items()})

    class Curious(Reader):
        """Tries the broken ones too."""

        def __call__(self, seen, limit):
            tried = {(m.call.parsed() or {}).get("path") for m in seen if m.role == "tool"}
            untried = [name for name in bad if f"documents/{name}" not in tried]
            return call("read", path=f"documents/{untried[0]}") if untried else super().__call__(seen, limit)

    run = episode(tmp_path, task, Curious(), backend="full", window=60_000)
    assert drive(run)["status"] == "done"
    events = read_run(run.folder.root)
    said = {each["name"]: each["error"] for each in events[0]["documents"]}
    for name, (_, state, words) in bad.items():
        assert run.workspace.documents.errors[name].state == state
        assert words in said[name], said[name]
        (tool,) = (e for e in of(events, "tool") if name in e["arguments"])
        assert (tool["ok"], tool["problem"]) == (False, "unreadable")
        assert words in run.folder.text(tool["result"])
    assert said["00.txt"] == ""


@pytest.mark.full
@pytest.mark.skipif(not REAL, reason="the docx files of real runs are not here")
def test_real_word_files_become_text(tmp_path):
    task = task_of(tmp_path, {f"{number}-{path.name}": path.read_bytes() for number, path in enumerate(REAL)})
    documents = Documents.load(task.agent_view(), cache=tmp_path / "cache")
    assert not documents.errors
    assert min(documents.characters(name) for name in documents.names if name != "00.txt") > 5_000


def test_a_deliverable_named_docx_is_one(tmp_path):
    task = make_task(tmp_path, {"01.txt": "short"}, deliverables=("memo.docx",))

    class Drafter(Reader):
        outputs = ("output/memo.docx",)

        def __call__(self, seen, limit):
            message = super().__call__(seen, limit)
            if message.calls and message.calls[0].name == "write":
                return call("write", path="output/memo.docx", content="# Memo\n\nThe rent is **$5**.\n- one\n- two\n")
            edited = any(m.role == "tool" and m.call.name == "edit" for m in seen)
            if not message.calls and not edited:
                return call("edit", path="output/memo.docx", old_string="**\\$5**", new_string="**\\$6**")
            return message

    events = play(tmp_path, task, Drafter(), backend="full")
    assert events[-1]["stop"] == "done"
    text = read_bytes("memo.docx", (tmp_path / "run" / "output" / "memo.docx").read_bytes()).text
    assert "# Memo" in text
    assert "**\\$6**" in text
    assert text.count("- ") == 2
