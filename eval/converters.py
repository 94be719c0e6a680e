"""Sheets, slides and PDF to text, in a process of its own: `python -m still.eval.converters KIND FILE MEMORY`.

`readers.py` starts it. It prints one JSON object: `text` and `notes`, or `state` and `message` of a `DocumentError`.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

Converted = tuple[str, list[str]]
"""Text and notes."""


class Refused(Exception):
    """A file that gives no text: `state` and `message` as `DocumentError` has them."""


def xlsx(path: str) -> Converted:
    """Every sheet, hidden ones too, row by row: stored values as the sheet shows them, else the formula."""
    from openpyxl import load_workbook
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

    lines, unsaved = [], 0
    values = load_workbook(path, read_only=True, data_only=True)
    formulas = load_workbook(path, read_only=True)
    with zipfile.ZipFile(path) as archive:
        for sheet in values.worksheets:
            if not isinstance(sheet, ReadOnlyWorksheet):
                continue
            hidden = "" if sheet.sheet_state == "visible" else f" ({sheet.sheet_state})"
            rows = []
            sheet.reset_dimensions()
            other = formulas[sheet.title]
            other.reset_dimensions()
            for shown, written in zip_longest(sheet.iter_rows(), other.iter_rows(), fillvalue=()):
                cells = []
                for cell, source in zip_longest(shown, written):
                    text = show(cell.value, getattr(cell, "number_format", "")) if cell is not None else ""
                    if not text and source is not None and source.data_type == "f":
                        text, unsaved = formula(source.value), unsaved + 1
                    cells.append(text)
                rows.append(row(cells))
            comments = [f"Comment at {place}: {text}" for place, text in comments_of(archive, sheet._worksheet_path)]
            body = "\n".join([*rows, *comments]).strip("\n")
            if body:
                lines.append(f"=== Sheet: {sheet.title}{hidden} ===\n{body}")
    notes = [f"{unsaved} formulas have no stored result and are shown as formulas"] if unsaved else []
    return "\n\n".join(lines), notes


def show(value: Any, number_format: str) -> str:
    """A cell's value, near to how the sheet shows it: per cent, dates without a time of midnight, 15 digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime):
        return str(value.date() if value.time() == datetime.time() else value)
    if isinstance(value, int | float) and "%" in number_format:
        decimals = re.search(r"\.(0+)%", number_format)
        return f"{value:.{len(decimals[1]) if decimals else 0}%}"
    return format(value, ".15g") if isinstance(value, float) else str(value)


def formula(value: Any) -> str:
    """A formula as it was typed; array formulas are objects."""
    return str(getattr(value, "text", value))


def row(cells: Iterable[str]) -> str:
    """One line of a table; a row of empty cells is an empty line."""
    cells = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells]
    while cells and not cells[-1]:
        cells.pop()
    return f"| {' | '.join(cells)} |" if cells else ""


def comments_of(archive: zipfile.ZipFile, sheet: str) -> Iterator[tuple[str, str]]:
    """Where each comment of a sheet stands, and its text."""
    from openpyxl.comments.comment_sheet import CommentSheet
    from openpyxl.packaging.relationship import get_dependents, get_rels_path
    from openpyxl.xml.constants import COMMENTS_NS
    from openpyxl.xml.functions import fromstring

    rels = get_rels_path(sheet)
    if rels not in archive.namelist():
        return
    for relation in get_dependents(archive, rels).find(COMMENTS_NS):
        for place, comment in CommentSheet.from_tree(fromstring(archive.read(relation.target))).comments:
            yield place, comment.text


def pptx(path: str) -> Converted:
    """Slides with titles, tables and speaker's notes, as markitdown writes them."""
    from markitdown import StreamInfo
    from markitdown.converters import PptxConverter

    with open(path, "rb") as file:
        text = PptxConverter().convert(file, StreamInfo(extension=".pptx")).markdown
    return text if re.sub(r"<!--.*?-->|#+ Notes:?", "", text, flags=re.DOTALL).strip() else "", []


def pdf(path: str) -> Converted:
    """Page after page: its text, then its tables row by row."""
    import pdfplumber
    from pdfminer.pdfdocument import PDFPasswordIncorrect
    from pdfplumber.utils.exceptions import PdfminerException

    try:
        document = pdfplumber.open(path)
    except PdfminerException as problem:
        if problem.args and isinstance(problem.args[0], PDFPasswordIncorrect):
            raise Refused("encrypted", "is protected by a password; save it without one") from problem
        raise
    pages, blank = [], []
    with document:
        for page in document.pages:
            text = page.extract_text()
            tables = page.extract_tables() if text else []
            for number, table in enumerate(tables, 1):
                rows = "\n".join(row(cell or "" for cell in cells) for cells in table)
                text += f"\n\n[Table {number}]\n{rows}"
            if text.strip():
                pages.append(f"=== Page {page.page_number} ===\n{text}")
            else:
                blank.append(str(page.page_number))
            page.close()
    if not document.pages:
        raise Refused("corrupt", "has no pages; open it in its own program and save it again")
    notes = [f"pages without text, which may be scans: {', '.join(blank)}"] if blank else []
    return "\n\n".join(pages), notes


KINDS = {"xlsx": xlsx, "pptx": pptx, "pdf": pdf}


def main(kind: str, path: str, memory: str) -> None:
    """Convert one file within `memory` bytes and print what came out."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    try:
        text, notes = KINDS[kind](path)
        answer: dict[str, Any] = {"text": text, "notes": notes}
    except Refused as refusal:
        answer = dict(zip(("state", "message"), refusal.args, strict=True))
    except MemoryError:
        answer = {"state": "too_large", "message": f"takes more than {int(memory) >> 20} MiB of memory to read"}
    except Exception as problem:  # parsers raise whatever they meet
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        answer = {
            "state": "corrupt",
            "message": f"cannot be read ({reason}); open it in its own program and save it again",
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
