"""The heat map of a calibration: where a model keeps its facts. matplotlib is imported only when it is drawn."""

from __future__ import annotations

from pathlib import Path

from ..budgets import slots_for
from .figures import FAINT, INK, RC, save


def save_heat_map(found, tokens: int, stem: str | Path, note: str = "") -> list[Path]:
    """Draw what each head's loss is worth, and the slots that it gets, by layer and KV head; returns the paths.

    Args:
        found: a `still.allocation.Measurement`.
        tokens: length of the context whose slots are shown.
        stem: path without its ending; PNG and SVG are written.
        note: conditions, printed under the figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'still-kv[plot]'") from problem
    from matplotlib.figure import Figure

    split, slots = found.split, slots_for(tokens, found.ratio)
    counts = split.counts(tokens, slots)
    layers, heads = sorted(counts), max(len(own) for own in counts.values())
    nothing = float("nan")
    worst = [
        [max((loss for _, loss in found.losses.get(f"{i}.{h}", [])), default=nothing) for h in range(heads)]
        for i in layers
    ]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(6.4, 1.6 + 1.1 * heads), max(2.6, 1.5 + 0.34 * len(layers))), layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, worst, layers, "Loss with one averaged slot", "KL, nats per answer token", "{:.2f}")
        title = f"Slots at {found.ratio:g}x (mean {slots})"
        _panel(right, [list(counts[i]) for i in layers], layers, title, f"slots of {tokens:,} tokens", "{:.0f}")
        if note:
            figure.supxlabel(note, fontsize=7, color=FAINT)
    return save(figure, stem)


def _panel(axis, table: list[list[float]], layers: list[int], title: str, label: str, form: str) -> None:
    image = axis.imshow(table, cmap="OrRd", aspect="auto", vmin=0)
    axis.set_title(title)
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(len(table[0])))
    step = max(1, len(layers) // 14)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.figure.colorbar(image, ax=axis, shrink=0.9).set_label(label, fontsize=7.5, color=FAINT)
    if len(layers) * len(table[0]) > 80:
        return
    top = max(value for row in table for value in row if value == value) or 1
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.6 * top else INK
                axis.text(x, y, form.format(value), ha="center", va="center", fontsize=7.5, color=colour)
