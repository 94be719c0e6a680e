"""Pandoc: Word and web pages to markdown, and the markdown of a deliverable to Word."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from html import unescape
from pathlib import Path

from .reading import Limits, as_path, needs_extra, run_bounded

WRITTEN = (
    "markdown+lists_without_preceding_blankline-blank_before_header-blank_before_blockquote-tex_math_dollars"
    "-citations-example_lists-yaml_metadata_block-pandoc_title_block-raw_tex-raw_attribute"
    "-simple_tables-multiline_tables"
)
"""Pandoc's name for the markdown that a deliverable is written in."""
DRAWN_TABLES = "+simple_tables+multiline_tables"
PROSE = "markdown-raw_html-fenced_divs-bracketed_spans-header_attributes-link_attributes-fenced_code_attributes"
"""Pandoc's name for the markdown that web pages, books and the like are read as; docx is read as LAB reads it."""


def pandoc_read(name: str, data: bytes, kind: str, limits: Limits, redlines: bool = False) -> tuple[str, list[str]]:
    """The text of a file as markdown, and what pandoc leaves out of it.

    Args:
        name: for messages, and for its suffix.
        data: the file's bytes; a zipped format has been checked before.
        kind: pandoc's name of the format.
        limits: what it may cost.
        redlines: show every tracked change and comment of a docx, instead of accepting the changes.

    Raises:
        DocumentError: pandoc does not take it.
    """
    memory = f"-M{limits.memory_bytes >> 20}M"
    command = [pandoc_path(), "+RTS", memory, "-RTS", "--sandbox", "--wrap=none", "-f", kind]
    if kind == "docx":
        command += ["-t", "markdown", "--track-changes=" + ("all" if redlines else "accept")]
    else:
        command += ["-t", PROSE]
    with as_path(name, data) as source:
        text = run_bounded(name, [*command, source], limits).decode("utf-8")
    return text, docx_notes(data, redlines) if kind == "docx" else []


def markdown_to_docx(name: str, markdown: bytes, from_docx: bool = False, limits: Limits | None = None) -> bytes:
    """A Word file of a markdown text in UTF-8.

    Args:
        name: for messages.
        markdown: as people write it: a list or heading needs no blank line before it, and `$`, `@` and `%` are text.
        from_docx: it is what `read` shows of a docx, edited: tables may be drawn with dashes alone.
        limits: what the conversion may cost.

    Raises:
        DocumentError: pandoc does not take it.
        ModuleNotFoundError: there is no pandoc.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "text.md"), Path(folder, "text.docx")
        source.write_bytes(markdown)
        command = [
            pandoc_path(),
            "--sandbox",
            "-f",
            WRITTEN + DRAWN_TABLES * from_docx,
            "-t",
            "docx",
            "-o",
            str(target),
            str(source),
        ]
        run_bounded(name, command, limits or Limits())
        return target.read_bytes()


def docx_notes(data: bytes, redlines: bool) -> list[str]:
    """What pandoc leaves out of a docx's text, as LAB's reader does: headers, footers, accepted changes, comments."""
    notes, margins, counts = [], [], Counter()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for part in archive.namelist():
            if not re.match(r"word/[^/]*\.xml$", part):
                continue
            try:
                xml = archive.read(part).decode("utf-8", "replace")
            except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, zlib.error):
                continue  # a damaged part is pandoc's to report
            if re.match(r"word/(header|footer)\d*\.xml", part):
                margins.append("".join(re.findall(r"<w:t(?: [^>]*)?>([^<]*)", xml)).strip())
            for kind in ("ins", "del", "comment"):
                counts[kind] += len(re.findall(rf"<w:{kind}[ >]", xml))
    if margins := [text for text in dict.fromkeys(margins) if text]:
        notes.append(f"headers and footers are not in the text: {unescape(' / '.join(margins))}")
    if not redlines and counts.total():
        notes.append(
            f"tracked changes are accepted ({counts['ins']} insertions, {counts['del']} deletions), and "
            f"{counts['comment']} comments are not in the text"
        )
    return notes


@lru_cache
def pandoc_path() -> str:
    """Where pandoc is: the one that comes with `pypandoc_binary`, or the system's.

    Raises:
        ModuleNotFoundError: there is none.
    """
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ModuleNotFoundError, OSError) as problem:
        raise needs_extra("pandoc", problem) from problem


@lru_cache
def pandoc_version() -> str:
    """For example `pandoc 3.9`."""
    shown = subprocess.run([pandoc_path(), "--version"], capture_output=True, text=True, check=True).stdout
    return " ".join(shown.split()[:2])
