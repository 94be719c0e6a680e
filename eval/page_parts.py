"""What our HTML pages are made of: one style, a shell without scripts, tables, and text that is always escaped.

A page is one file that needs nothing else and runs nothing: its content security policy allows inline styles alone, so
that even a mistake in escaping could not make a browser act on what a deliverable or a judge wrote.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from .stats import Interval

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light; --ink: #1c2126; --faint: #667079; --line: #d9dee3; --soft: #f6f8fa;
  --pass: #1a6b3c; --fail: #a4262c; --open: #8a5a00; --accent: #1f4e79; }
* { box-sizing: border-box; }
body { font: 15px/1.55 "Inter", "Segoe UI", "Liberation Sans", Helvetica, Arial, sans-serif; color: var(--ink);
  background: #fff; max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.5rem; overflow-wrap: anywhere; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 1rem; margin-bottom: 1.6rem; }
.kicker { font-size: .78rem; letter-spacing: .08em; text-transform: uppercase; color: var(--faint); margin: 0 0 .3rem; }
h1 { font: 600 1.65rem/1.25 Georgia, "Liberation Serif", serif; margin: 0 0 .5rem; }
h2 { font: 600 1.2rem/1.3 Georgia, "Liberation Serif", serif; margin: 2.4rem 0 .7rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
.faint, caption, .meta { color: var(--faint); }
.meta { font-size: .86rem; margin: .1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { border: 1px solid var(--line); border-top: 3px solid var(--accent); padding: .7rem .9rem .8rem; }
.tile.pass { border-top-color: var(--pass); } .tile.fail { border-top-color: var(--fail); }
.tile.open { border-top-color: var(--open); }
.tile b { display: block; font: 600 1.45rem/1.25 Georgia, "Liberation Serif", serif; }
.tile span { font-size: .82rem; color: var(--faint); }
.note { border-left: 3px solid var(--open); background: #fdf8ee; padding: .6rem .9rem; margin: 1rem 0; }
.note p { margin: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums;
  margin: .4rem 0 1.2rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .34rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; background: var(--soft); }
td small { display: block; font-size: .8em; color: var(--faint); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
.item { border: 1px solid var(--line); border-left: 4px solid var(--line); margin: 0 0 .6rem; }
.item.pass { border-left-color: var(--pass); } .item.fail { border-left-color: var(--fail); }
.item.unscored { border-left-color: var(--open); }
.item > summary, .item > .head { padding: .55rem .9rem; display: flex; gap: .8rem; align-items: baseline; }
.item > summary { cursor: pointer; list-style: none; } .item > summary::-webkit-details-marker { display: none; }
.item > summary::after { content: "+"; margin-left: auto; color: var(--faint); }
.item[open] > summary::after { content: "\\2013"; }
.body { padding: 0 .9rem .7rem; }
.badge { flex: none; font-size: .7rem; font-weight: 700; letter-spacing: .06em; text-transform: uppercase;
  min-width: 4.6rem; }
.badge.pass { color: var(--pass); } .badge.fail { color: var(--fail); } .badge.unscored { color: var(--open); }
.id { flex: none; font-size: .8rem; color: var(--faint); font-variant-numeric: tabular-nums; }
.what { font-weight: 600; }
.said { white-space: pre-wrap; margin: .3rem 0; max-width: 50rem; }
.label { font-size: .76rem; font-weight: 600; color: var(--faint); margin: .7rem 0 .1rem; }
blockquote { margin: .3rem 0 .3rem; padding: .15rem .9rem; border-left: 2px solid var(--line); white-space: pre-wrap;
  font-family: Georgia, "Liberation Serif", serif; font-size: .92rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
figure { margin: .6rem 0 1.2rem; overflow-x: auto; } svg { max-width: 100%; min-width: 34rem; height: auto; }
a { color: var(--accent); }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); font-size: .8rem;
  color: var(--faint); }
code { font-size: .82rem; }
@media (max-width: 44rem) { .pair { grid-template-columns: 1fr; } }
@media print {
  @page { margin: 16mm 15mm; }
  body { margin: 0; padding: 0; max-width: none; font-size: 10.5pt; }
  p, blockquote, .said { max-width: none; orphans: 3; widows: 3; }
  h2, h3, .label, .head, .item > summary { break-after: avoid; }
  .item { break-inside: auto; }
  .item > summary::after { display: none; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  .scroll, figure { overflow: visible; }
  figure, tr { break-inside: avoid; }
  svg { min-width: 0; }
  table { font-size: 8.5pt; }
  th, td { padding: .25rem .35rem; white-space: normal; overflow-wrap: break-word; }
  td small { white-space: nowrap; }
}
"""

_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class Markup(str):
    """HTML that is safe already and is not escaped again."""


def escape(text: object) -> str:
    """Text as a page may hold it: markup escaped, control and direction characters made visible."""
    plain = "" if text is None else str(text)
    return html.escape(_INVISIBLE.sub("\ufffd", plain.encode("utf-8", "replace").decode()), quote=True)


def page(title: str, body: Iterable[str], made_by: str) -> str:
    """A whole page.

    Args:
        title: of the browser's window; escaped here.
        body: parts that are HTML already.
        made_by: the footer's line; escaped here.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>{escape(made_by)}</footer>\n</body></html>\n"
    )


def header(kicker: str, title: str, meta: Iterable[str]) -> str:
    """The page's head: what kind of page, of what, and a line for each fact."""
    lines = "".join(f'<p class="meta">{escape(line)}</p>' for line in meta if line)
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>{lines}</header>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers side by side: (value, what it is, one of pass, fail, open or "")."""
    cells = (f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
             for value, what, kind in entries)  # fmt: skip
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", texts: Sequence[int] = (0,)) -> str:
    """A table; columns in `texts` are set left and may wrap. A cell that is a `Markup` is taken as it is."""

    def cell(tag: str, index: int, value: object) -> str:
        kind = ' class="text"' if index in texts else ""
        return f"<{tag}{kind}>{value if isinstance(value, Markup) else escape(value)}</{tag}>"

    top = "".join(cell("th", index, name) for index, name in enumerate(head)) if any(head) else ""
    lines = ["<tr>" + "".join(cell("td", i, value) for i, value in enumerate(row)) + "</tr>" for row in rows]
    if not lines:
        return ""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}{top and f"<thead><tr>{top}</tr></thead>"}<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def note(lines: Iterable[str]) -> str:
    """Something that the reader must know before the numbers; nothing without lines."""
    inner = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    return f'<div class="note">{inner}</div>' if inner else ""


def count(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def quoted(text: str) -> str:
    """A passage as a reader of the work knows it: without the backslashes that pandoc sets before its punctuation."""
    return _ESCAPED.sub(r"\1", text)


def p_value(value: float) -> str:
    """Three digits, never a bare zero; a dash where it is not defined."""
    return "\u2013" if value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"


def few_tasks(tasks: int) -> str:
    """A warning where rates rest on so few tasks that their intervals say little; "" from ten on."""
    return f"All of this rests on {count(tasks, 'task')}; the intervals are as wide as that makes them." * (tasks < 10)


def percent(share: float | None, digits: int = 1) -> str:
    """0.5 as "50.0 %"; a dash for None."""
    return "\u2013" if share is None else f"{100 * share:.{digits}f} %"


def interval(found: Interval | None, digits: int = 1) -> Markup:
    """A rate with its 95 % interval below it; a dash for None."""
    if found is None:
        return Markup("\u2013")
    low, high = 100 * found.low, 100 * found.high
    return Markup(f"{percent(found.estimate, digits)}<small>{low:.{digits}f} to {high:.{digits}f}</small>")


def points(found: Interval | None) -> Markup:
    """A difference of rates in percentage points with its interval below it; a dash for None."""
    if found is None:
        return Markup("\u2013")
    return Markup(f"{100 * found.estimate:+.1f}<small>{100 * found.low:+.1f} to {100 * found.high:+.1f}</small>")


def dollars(amount: float | None) -> str:
    """An amount to the cent, a small one to two digits; "not known" for None."""
    if amount is None:
        return "not known"
    digits = 2 if amount >= 0.1 or amount <= 0 else 1 - math.floor(math.log10(amount))
    return f"${amount:,.{digits}f}"
