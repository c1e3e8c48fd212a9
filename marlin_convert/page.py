"""The page that `--report` writes: what became of every matrix, with pictures."""

import html as markup
from typing import Any

from marlin_convert.checkpoint.manifest import PAGE
from marlin_convert.matrix import fate_of
from marlin_convert.report import groups


def html(manifest: dict[str, Any]) -> str:
    """One self-contained page: the error of every linear as a plot, by kind over the blocks, and a table."""
    rows = [row for row in manifest["matrices"] if "error" in row]
    source, recipe = manifest["source"], manifest["recipe"]
    table = "".join(
        f"<tr><td>{markup.escape(row['name'])}<td>{row['k']}<td>{row['n']}"
        f"<td>{row['error']:.4f}<td>{'rounded to nearest' if row.get('rounded_to_nearest') else ''}"
        for row in rows
    )
    fates = [fate_of(row) for row in manifest["matrices"]]
    dense = "".join(
        f"<li>{markup.escape(fate.name)}: {markup.escape(str(fate.reason))}"
        for fate in fates
        if not fate.worked_on
    )
    behind = [f"tensor {name}" for name in manifest["left_out"]] + manifest["left_behind"]
    behind += [f"{fate.name} is not 2:4 ({fate.reason})" for fate in fates if fate.packed and fate.reason]
    left = "".join(f"<li>{markup.escape(name)}" for name in behind)
    beside = "".join(f"<li>{markup.escape(name)}" for name in manifest["beside"])
    title = markup.escape(f"{source['name']} in {recipe['format']}, {groups(fates)}")
    return (
        f"{PAGE}<title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{markup.escape(manifest['tool'])}, "
        f"{manifest['bits_per_weight']} bits per weight.</p>"
        f"{_divergence(manifest['divergence'])}{_errors(rows)}"
        f"<p>Left dense: {'' if dense else 'nothing'}</p><ul>{dense}</ul>"
        f"<p>Left out, or not as asked: {'' if left else 'nothing'}</p><ul>{left}</ul>"
        f"<p>Copied, no part of the model that is built: {'' if beside else 'nothing'}</p><ul>{beside}</ul>"
        f"<table><tr><th>linear<th>inputs<th>outputs<th>error<th>{table}</table></html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{text-align:right;padding:.1rem .8rem;border-bottom:1px solid #ddd}td:first-child{text-align:left}"
    "svg{width:100%;height:auto}"
)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")


def _divergence(after: list[float]) -> str:
    """A plot of the hidden states' distance from the original's over the blocks."""
    if not after:
        return ""
    plot = _plot({"hidden states": list(enumerate(after))})
    return (
        "<p>Hidden states after every block: how far from the original model's, relative, on the calibration "
        f"text ({after[-1]:.4f} after the last).</p>{plot}"
    )


def _errors(rows: list[dict[str, Any]]) -> str:
    """A plot of the errors over the blocks, a line for every kind of linear."""
    if not rows:
        return "<p>The codes are the source's own: there is no error to plot.</p>"
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        block = next(int(part) for part in row["name"].split(".") if part.isdigit())
        kinds.setdefault(row["name"].rpartition(".")[2], []).append((block, row["error"]))
    said = "Error: ||x(W - W<sub>q</sub>)|| / ||xW|| on the calibration text."
    return f"<p>{said}</p>{_plot(kinds)}"


def _plot(lines: dict[str, list[tuple[int, float]]]) -> str:
    """An SVG of values over block numbers, a line for every name."""
    width, height, left, bottom = 900, 320, 60, 40
    last = max(block for points in lines.values() for block, _ in points) or 1
    top = max(value for points in lines.values() for _, value in points) * 1.05 or 1.0

    def at(block: int, error: float) -> str:
        x = left + (width - left - 150) * block / last
        y = (height - bottom) * (1 - error / top) + 5
        return f"{x:.1f},{y:.1f}"

    parts = []
    for step in range(5):
        error = top * step / 4
        y = at(0, error).split(",")[1]
        parts.append(
            f'<line x1="{left}" x2="{width - 150}" y1="{y}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{error:.3f}</text>'
        )
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(at(*point) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
            for x, y in (at(*point).split(",") for point in points)
        ]
        parts.append(
            f'<text x="{width - 140}" y="{20 + 20 * number}" fill="{colour}">{markup.escape(name)}</text>'
        )
    middle = (left + width - 150) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">block (0 to {last})</text>')
    return f'<svg viewBox="0 0 {width} {height}" font-size="13" role="img">{"".join(parts)}</svg>'
