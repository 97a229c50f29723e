"""Pictures as SVG written by hand, one panel a model: KL divergence over stored bits per weight,
and tokens per second over context length.

No plotting library: the file is a text that the same figures always make the same, so that
``report --check`` can compare it.
"""

import math
from collections.abc import Iterable, Iterator
from html import escape

from benchmarks.report_tables import named

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
    height = lines * PANEL[1] + 46
    panels = [panel(name, [row for row in rows if row["model"] == name]) for name in names]
    return picture(panels, legend(lines * PANEL[1] + 14), height)


def picture(panels: list[Iterable[str]], below: Iterable[str], height: int) -> str:
    """Panels in columns, and what is below them."""
    width = COLUMNS * PANEL[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, shapes in enumerate(panels):
        x, y = i % COLUMNS * PANEL[0], i // COLUMNS * PANEL[1]
        parts += [f'<g transform="translate({x} {y})">', *shapes, "</g>"]
    return "\n".join([*parts, *below, "</svg>"]) + "\n"


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

    xs = {at(tick, y_range[0])[0]: f"{tick}" for tick in range(x_range[0], x_range[1] + 1)}
    ys = {
        at(x_range[0], tick)[1]: f"{10.0**tick:g}" if tick > -3 else f"1e{tick}"
        for tick in range(y_range[0], y_range[1] + 1)
    }
    yield from frame(name, xs, ys, "stored bits per weight of the blocks", "mean KL, nats")
    for strategy, colour in SERIES.items():
        yield from series(
            [(*at(b, k), row["format"]) for b, k, row in zip(bits, kl, rows, strict=True)
             if tuple(row["strategy"]) == strategy], colour, calibrated(strategy))  # fmt: skip


def frame(
    title: str, xs: dict[str, str], ys: dict[str, str], x_label: str, y_label: str
) -> Iterator[str]:
    """A panel's title, axes and grid; xs, ys: where there are lines, and what they say."""
    left, top, right, bottom = MARGIN
    w, h = PANEL[0] - left - right, PANEL[1] - top - bottom
    yield f'<text x="{left}" y="{top - 12}" font-size="13">{escape(title)}</text>'
    for x, label in xs.items():
        yield f'<path d="M{x} {top}V{top + h}" stroke="#e4e4e4"/>'
        yield f'<text x="{x}" y="{top + h + 15}" text-anchor="middle">{label}</text>'
    for y, label in ys.items():
        yield f'<path d="M{left} {y}H{left + w}" stroke="#e4e4e4"/>'
        yield f'<text x="{left - 6}" y="{y}" text-anchor="end" dy="4">{label}</text>'
    yield (f'<text x="{left + w / 2:.0f}" y="{top + h + 32}" text-anchor="middle">{x_label}'
           "</text>")  # fmt: skip
    yield (f'<text transform="translate(13 {top + h / 2:.0f}) rotate(-90)" text-anchor="middle">'
           f"{y_label}</text>")  # fmt: skip


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


# -- tokens per second over context length -----------------------------------------------------

WAYS = {
    "transformers fp32": "#8a8a8a",
    "int8, dynamic cache": "#b07d2b",
    "int8, fp16 pages": "#1f6fb4",
    "int8, int8 pages": "#111111",
}


def contexts_svg(rows: list[dict]) -> str:
    """The picture of a decode record's contexts."""
    names = list(dict.fromkeys(row["shape"] for row in rows))
    lines = -(-len(names) // COLUMNS)
    panels = [speeds(name, [row for row in rows if row["shape"] == name]) for name in names]
    below = lines * PANEL[1] + 14
    keys = (
        f'<path d="M{20 + 185 * i} {below - 4}h22" stroke="{colour}" stroke-width="2"/>'
        f'<text x="{48 + 185 * i}" y="{below}">{way}</text>'
        for i, (way, colour) in enumerate(WAYS.items())
    )
    return picture(panels, keys, below + 16)


def speeds(name: str, rows: list[dict]) -> Iterator[str]:
    """Axes and lines of one shape: contexts on a logarithmic scale, tokens per second from 0."""
    left, top, right, bottom = MARGIN
    w, h = PANEL[0] - left - right, PANEL[1] - top - bottom
    ticks = sorted({row["context"] for row in rows})
    most = max(1 / row["seconds"]["median"] for row in rows)
    power = 10 ** math.floor(math.log10(most))
    step = next(power * f for f in (2, 1, 0.5, 0.2) if most >= 4 * power * f)
    n_steps = math.ceil(most / step)
    span = max(1e-9, math.log2(ticks[-1] / ticks[0]))

    def at(context: int, speed: float) -> tuple[str, str]:
        x = left + w * math.log2(context / ticks[0]) / span
        return f"{x:.1f}", f"{top + h * (1 - speed / (n_steps * step)):.1f}"

    xs = {at(tick, 0)[0]: f"{tick}" for tick in ticks}
    ys = {at(ticks[0], i * step)[1]: f"{i * step:g}" for i in range(n_steps + 1)}
    yield from frame(named(name), xs, ys, "tokens of context", "tokens per second")
    for way, colour in WAYS.items():
        points = [at(r["context"], 1 / r["seconds"]["median"]) for r in rows if r["name"] == way]
        path = "L".join(f"{x} {y}" for x, y in points)
        yield f'<path d="M{path}" fill="none" stroke="{colour}"/>'
        for x, y in points:
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"><title>{way}</title></circle>'
