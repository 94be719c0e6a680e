"""Files of every kind to text: what is in it, what is said to be left out, and what a bad file becomes."""

from __future__ import annotations

import datetime
import hashlib
import io
import sys
import zipfile
from email.message import EmailMessage

import pytest
from office_files import docx, redlines

from still.eval.readers import read, read_bytes
from still.eval.reading import DocumentError, Limits, run_bounded

pytest.importorskip("pypandoc")


def state_of(name: str, data: bytes, **limits: float) -> tuple[str, str]:
    with pytest.raises(DocumentError) as caught:
        read_bytes(name, data, limits=Limits(**limits))
    assert str(caught.value).startswith(name)
    return caught.value.state, str(caught.value)


def test_a_reading_says_what_was_read_and_what_came_out(tmp_path):
    file = tmp_path / "memo.docx"
    file.write_bytes(docx("<w:p><w:r><w:t>The rent is due.</w:t></w:r></w:p>"))
    found = read(file)
    assert found.text == "The rent is due.\n"
    assert found.reader.startswith("pandoc ")
    assert found.file_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.text_sha256 == hashlib.sha256(found.text.encode()).hexdigest()
    assert found.record() == {
        "name": "memo.docx", "reader": found.reader, "file_sha256": found.file_sha256, "notes": [],
        "text_sha256": found.text_sha256, "file_bytes": file.stat().st_size, "characters": 17,
    }  # fmt: skip


def test_tracked_changes_are_accepted_or_shown_with_comments():
    data = docx(redlines("the old rent", "the new rent"))
    accepted, shown = read_bytes("a.docx", data), read_bytes("a.docx", data, redlines=True)
    assert accepted.text == "Payable: the new rent\n"
    assert "the old rent" in shown.text
    assert "deletion" in shown.text
    assert "insertion" in shown.text
    assert accepted.reader != shown.reader
    assert accepted.text_sha256 != shown.text_sha256
    assert accepted.notes == (
        "tracked changes are accepted (1 insertions, 1 deletions), and 0 comments are not in the text",
    )
    assert shown.notes == ()


def test_headers_and_footers_that_pandoc_leaves_out_are_told():
    found = read_bytes("a.docx", docx("<w:p><w:r><w:t>Body.</w:t></w:r></w:p>", header="Privileged &amp; confidential"))
    assert found.notes == ("headers and footers are not in the text: Privileged & confidential",)


def test_a_long_document_is_never_cut():
    said = "what it says, and so on. " * 40
    body = "".join(f"<w:p><w:r><w:t>Clause {n} says {said}</w:t></w:r></w:p>" for n in range(200))
    text = read_bytes("long.docx", docx(body)).text
    assert text.count("what it says, and so on.") == 40 * 200
    assert len(text) > 170_000


def test_sheets_show_values_as_they_look_formulas_without_a_result_comments_and_hidden_sheets():
    openpyxl = pytest.importorskip("openpyxl")
    from openpyxl.comments import Comment

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Fees"
    rows = [["item", "share", "due"], ["agency | fee", 0.125, datetime.datetime(2026, 3, 31)], ["sum", "=B2*2", True]]
    for row in rows:
        sheet.append(row)
    sheet["B2"].number_format = "0.0%"
    sheet["A2"].comment = Comment("check with the bank", "A")
    hidden = book.create_sheet("Workings")
    hidden.sheet_state = "hidden"
    hidden["C5"] = 1234.5
    book.create_sheet("Blank")
    file = io.BytesIO()
    book.save(file)
    found = read_bytes("fees.xlsx", file.getvalue())
    assert found.text.strip().splitlines() == [
        "=== Sheet: Fees ===",
        "| item | share | due |",
        r"| agency \| fee | 12.5% | 2026-03-31 |",
        "| sum | =B2*2 | TRUE |",
        "Comment at A2: check with the bank",
        "",
        "=== Sheet: Workings (hidden) ===",
        *found.text.strip().splitlines()[7:-1],
        "|  |  | 1234.5 |",
    ]
    assert found.reader.startswith("openpyxl ")
    assert found.notes == ("1 formulas have no stored result and are shown as formulas",)


def test_slides_give_titles_tables_and_notes():
    pptx = pytest.importorskip("pptx")
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[5])
    slide.shapes.title.text = "Closing conditions"
    slide.notes_slide.notes_text_frame.text = "Say that the waiver is pending"
    cells = slide.shapes.add_table(2, 2, *[pptx.util.Inches(2)] * 4).table
    cells.cell(1, 1).text = "31 March"
    file = io.BytesIO()
    deck.save(file)
    found = read_bytes("deck.pptx", file.getvalue())
    for said in ("Closing conditions", "31 March", "Say that the waiver is pending"):
        assert said in found.text
    assert found.reader.startswith("markitdown ")


def make_pdf(*pages: str, password: str = "") -> bytes:
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    file = io.BytesIO()
    drawn = canvas.Canvas(file, encrypt=password or None)
    for text in pages:
        drawn.drawString(72, 720, text)
        drawn.showPage()
    drawn.save()
    return file.getvalue()


def test_pdf_is_read_page_by_page_and_blank_pages_are_told():
    found = read_bytes("letter.pdf", make_pdf("The first page.", "", "The third page."))
    assert found.text.strip() == "=== Page 1 ===\nThe first page.\n\n=== Page 3 ===\nThe third page."
    assert found.notes == ("pages without text, which may be scans: 2",)
    assert found.reader.startswith("pdfplumber ")
    assert state_of("scan.pdf", make_pdf(""))[0] == "no_text"
    assert state_of("locked.pdf", make_pdf("Secret.", password="secret"))[0] == "encrypted"
    assert state_of("cut.pdf", make_pdf("Cut.")[:80])[0] == "corrupt"


def test_mail_has_its_headers_its_text_and_the_names_of_what_is_attached():
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "a@firm.example", "b@firm.example", "Fees for März"
    mail.set_content("The fee is due.\n")
    mail.add_attachment(b"%PDF-", maintype="application", subtype="pdf", filename="fee letter.pdf")
    found = read_bytes("m.eml", bytes(mail))
    assert found.text.startswith("From: a@firm.example\nTo: b@firm.example\nSubject: Fees for März\n")
    assert "- fee letter.pdf (application/pdf, 5 bytes)" in found.text
    assert found.text.endswith("The fee is due.\n")
    assert found.notes == ("1 attachments are named and not read",)
    html = EmailMessage()
    html["Subject"] = "x"
    html.set_content("<p>Due <b>now</b></p><script>alert(1)</script>", subtype="html")
    found = read_bytes("h.eml", bytes(html))
    assert "Due **now**" in found.text
    assert "alert" not in found.text
    assert state_of("no.eml", b"just words")[0] == "corrupt"


@pytest.mark.parametrize("name", ["a.md", "a.txt", "A.TXT", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_plain_text_is_taken_as_it_is_in_any_usual_encoding(name, encoding):
    found = read_bytes(name, "§ 3 “Fees”\r\n| a | b |\r".encode(encoding))
    assert found.text == "§ 3 “Fees”\n| a | b |\n"
    assert found.reader.startswith("text ")


def test_an_encrypted_docx_is_told_from_an_old_and_from_a_broken_one():
    office = pytest.importorskip("msoffcrypto.format.ooxml")
    good, locked = docx("<w:p><w:r><w:t>Secret.</w:t></w:r></w:p>"), io.BytesIO()
    office.OOXMLFile(io.BytesIO(good)).encrypt("secret", locked)
    state, message = state_of("locked.docx", locked.getvalue())
    assert (state, "password" in message) == ("encrypted", True)
    assert state_of("old.docx", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(4096))[0] == "unsupported"
    assert state_of("cut.docx", good[: len(good) // 2])[0] == "corrupt"
    holed = io.BytesIO()
    with zipfile.ZipFile(holed, "w") as archive:
        archive.writestr("word/other.xml", "<x/>")
    assert state_of("holed.docx", holed.getvalue())[0] == "corrupt"
    assert state_of("old.doc", b"x")[1].endswith("save it as .docx")
    assert state_of("photo.png", b"x")[0] == "unsupported"
    assert state_of("nothing.docx", b"")[0] == "empty"
    assert state_of("blank.docx", docx("<w:p/>"))[0] == "no_text"
    assert state_of("binary.txt", b"\x00\x01\x02")[0] == "corrupt"


def test_a_file_over_a_limit_is_refused_whole():
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(4 << 20))
    assert state_of("bomb.docx", bomb.getvalue(), unpacked_bytes=1 << 20)[0] == "too_large"
    assert state_of("many.docx", bomb.getvalue(), members=0)[0] == "too_large"
    assert state_of("big.md", b"x" * 100, file_bytes=99)[0] == "too_large"
    with pytest.raises(DocumentError, match="not read within") as caught:
        run_bounded("slow.docx", [sys.executable, "-c", "import time; time.sleep(600)"], Limits(seconds=0.1))
    assert caught.value.state == "too_slow"


def test_a_name_that_is_no_file_is_missing(tmp_path):
    for path in (tmp_path / "none.docx", tmp_path):
        with pytest.raises(DocumentError) as caught:
            read(path)
        assert caught.value.state == "missing"
