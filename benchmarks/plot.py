"""KL divergence over stored bits per weight, one panel a model, as SVG written by hand.

No plotting library: the file is a text that the same figures always make the same, so that
``report --check`` can compare it.
"""

import math
from collections.abc import Iterator
from html import escape

PANEL, MARGIN, COLUMNS = (380, 250), (62, 34, 16, 44), 2  # left, top, right, bottom
#: Strategy -> colour; those that need data are drawn solid.
SERIES = {
    ("absmax",): "#8a8a8a",
    ("hqq",): "#b07d2b",
    ("equalize", "mse"): "#1f6fb4",
    ("awq", "mse"): "#3a9d6e",
    ("smoothquant", "gptq"): "#8b5fbf",
    ("awq", "gptq"): "#d1495b",
    ("equalize", "gptq"): "#111111",
}


def svg(rows: list[dict]) -> str:
    """The picture of the plain variants in a strategies record."""
    rows = [r for r in rows if r["variant"] == "plain" and tuple(r["strategy"]) in SERIES]
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = -(-len(names) // COLUMNS)
    width, height = COLUMNS * PANEL[0], lines * PANEL[1] + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, name in enumerate(names):
        x, y = i % COLUMNS * PANEL[0], i // COLUMNS * PANEL[1]
        parts.append(f'<g transform="translate({x} {y})">')
        parts += panel(name, [row for row in rows if row["model"] == name])
        parts.append("</g>")
    parts += legend(lines * PANEL[1] + 14)
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(name: str, rows: list[dict]) -> Iterator[str]:
    """Axes and series of one model."""
    bits = [row["bits_per_weight"] for row in rows]
    kl = [math.log10(row["quality"]["kl_mean"]) for row in rows]
    x_range = math.floor(min(bits)), math.ceil(max(bits))
    y_range = math.floor(min(kl)), math.ceil(max(kl))
    left, top, right, bottom = MARGIN
    w, h = PANEL[0] - left - right, PANEL[1] - top - bottom

    def at(b: float, log: float) -> tuple[str, str]:
        x = left + w * (b - x_range[0]) / (x_range[1] - x_range[0])
        y = top + h * (y_range[1] - log) / max(1, y_range[1] - y_range[0])
        return f"{x:.1f}", f"{y:.1f}"

    yield f'<text x="{left}" y="{top - 12}" font-size="13">{escape(name)}</text>'
    for tick in range(x_range[0], x_range[1] + 1):
        x, _ = at(tick, y_range[0])
        yield f'<path d="M{x} {top}V{top + h}" stroke="#e4e4e4"/>'
        yield f'<text x="{x}" y="{top + h + 15}" text-anchor="middle">{tick}</text>'
    for tick in range(y_range[0], y_range[1] + 1):
        _, y = at(x_range[0], tick)
        yield f'<path d="M{left} {y}H{left + w}" stroke="#e4e4e4"/>'
        label = f"{10.0**tick:g}" if tick > -3 else f"1e{tick}"
        yield f'<text x="{left - 6}" y="{y}" text-anchor="end" dy="4">{label}</text>'
    yield (f'<text x="{left + w / 2:.0f}" y="{top + h + 32}" text-anchor="middle">stored bits per '
           "weight of the blocks</text>")  # fmt: skip
    yield (f'<text transform="translate(13 {top + h / 2:.0f}) rotate(-90)" text-anchor="middle">'
           "mean KL, nats</text>")  # fmt: skip
    for strategy, colour in SERIES.items():
        yield from series(
            [(*at(b, k), row["format"]) for b, k, row in zip(bits, kl, rows, strict=True)
             if tuple(row["strategy"]) == strategy], colour, calibrated(strategy))  # fmt: skip


def series(points: list[tuple[str, str, str]], colour: str, solid: bool) -> Iterator[str]:
    """A line through the formats with minima and 8 bits; symmetric ones are hollow and apart."""
    line = sorted((p for p in points if p[2] != "int4_g32"), key=lambda p: float(p[0]))
    if len(line) > 1:
        dash = "" if solid else ' stroke-dasharray="4 3"'
        path = "L".join(f"{x} {y}" for x, y, _ in line)
        yield f'<path d="M{path}" fill="none" stroke="{colour}"{dash}/>'
    for x, y, form in points:
        fill = "white" if form == "int4_g32" else colour
        yield (f'<circle cx="{x}" cy="{y}" r="3" fill="{fill}" stroke="{colour}"><title>'
               f"{form}</title></circle>")  # fmt: skip


def legend(y: int) -> Iterator[str]:
    for i, (strategy, colour) in enumerate(SERIES.items()):
        x, dash = 20 + 185 * (i % 4), "" if calibrated(strategy) else ' stroke-dasharray="4 3"'
        row = y + 16 * (i // 4)
        yield f'<path d="M{x} {row - 4}h22" stroke="{colour}" stroke-width="2"{dash}/>'
        yield f'<text x="{x + 28}" y="{row}">{" + ".join(strategy)}</text>'


def calibrated(strategy: tuple[str, ...]) -> bool:
    return bool({"gptq", "awq", "smoothquant"} & set(strategy))
