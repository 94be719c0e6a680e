"""Word files made by hand: the few parts that a reader needs."""

from __future__ import annotations

import io
import zipfile

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def docx(body: str, header: str = "") -> bytes:
    """A Word file with this body, as WordprocessingML, and a header's text that is XML already."""
    parts = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.'
        'document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{_RELATIONS}"><Relationship Id="r1" Type="{_OFFICE}/officeDocument" '
        'Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>',
    }
    if header:
        told = f"<w:p><w:r><w:t>{header}</w:t></w:r></w:p>"
        parts["word/header1.xml"] = f'<w:hdr xmlns:w="{WORD}">{told}</w:hdr>'
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>{content}')
    return file.getvalue()


def redlines(old: str, new: str) -> str:
    """A paragraph in which one text is struck out and another put in."""
    who = 'w:author="A" w:date="2026-01-01T00:00:00Z"'
    return (
        '<w:p><w:r><w:t xml:space="preserve">Payable: </w:t></w:r>'
        f'<w:del w:id="1" {who}><w:r><w:delText>{old}</w:delText></w:r></w:del>'
        f'<w:ins w:id="2" {who}><w:r><w:t>{new}</w:t></w:r></w:ins></w:p>'
    )
