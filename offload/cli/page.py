"""One HTML page of a profile: no script, no fetches, readable in the dark and printed.

Charts are inline SVG that takes its colours from the page's style, so that both themes are one drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from offload.units import duration, gib

if TYPE_CHECKING:
    from offload.parts import Part
    from offload.profile import Profile

_WIDTH, _HEIGHT = 760, 220
_LEFT, _BOTTOM = 64, 24
_MOST_POINTS = 800  # of a line: more are not seen
_KERNELS = 20

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667085; --rule: #d0d5dd; --paper: #ffffff;
  --one: #2563eb; --two: #d97706; --three: #059669; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #98a2b3; --rule: #3a414b; --paper: #14171b;
  --one: #7aa2ff; --two: #f0a94b; --three: #4cc38a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 800px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
p, li, figcaption { color: var(--dim); } figure { margin: 1rem 0 0; } svg { width: 100%; height: auto; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } .axis { stroke: var(--rule); }
.one { stroke: var(--one); } .two { stroke: var(--two); } .three { stroke: var(--three); }
.line { fill: none; stroke-width: 1.5; } .plan { stroke: var(--ink); stroke-dasharray: 4 4; }
rect.one { fill: var(--one); stroke: none; } rect.two { fill: var(--two); stroke: none; }
b.one { color: var(--one); } b.two { color: var(--two); } b.three { color: var(--three); }
pre { white-space: pre-wrap; background: color-mix(in srgb, var(--rule) 30%, transparent); padding: .8rem; }
"""


def page(title: str, found: Profile, *, planned_ms: float | None) -> str:
    """The whole page.

    Args:
        title: What ran.
        found: Of the run.
        planned_ms: Milliseconds of a token as planned; None where nobody planned any.
    """
    report = found.report
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(report.summary)}</pre>",
        "<h2>Bytes by purpose</h2>",
        _bytes_table([*found.device], "device", found.unaccounted),
        _bytes_table([*found.host], "host", None),
        "<h2>Memory over time</h2>",
        _memory(found),
        "<h2>Time of each token</h2>",
        _tokens(found, planned_ms),
    ]
    if found.kernels:
        parts += ["<h2>What a step's time goes to</h2>", _engines(found), _kernels(found)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f"<table><tr>{top}</tr>\n{body}</table>"


def _bytes_table(parts: list[Part], tier: str, unaccounted: int | None) -> str:
    rows = [
        (part.purpose, gib(part.planned), "-" if part.measured is None else gib(part.measured))
        for part in parts
    ]
    total = sum(part.measured or 0 for part in parts)
    known = all(part.measured is not None for part in parts)
    planned = gib(sum(part.planned for part in parts))
    rows.append(("together", planned, gib(total) if known else "-"))
    if unaccounted is not None:
        rows.append(("unaccounted", "-", gib(unaccounted)))
    most = max([1, *(max(part.planned, part.measured or 0) for part in parts)])
    bars = "".join(_bar_pair(i, part, most) for i, part in enumerate(parts))
    height = 26 * len(parts) + 6
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{tier}">{bars}</svg><figcaption>'
        f'{tier}: <b class="one">planned</b>, <b class="two">measured</b></figcaption></figure>'
        + _table((tier, "planned", "measured"), rows)
    )


def _bar_pair(i: int, part: Part, most: int) -> str:
    y, room = 26 * i + 4, _WIDTH - 180
    bars = ((part.planned, "one", 0), (max(0, part.measured or 0), "two", 9))
    drawn = "".join(
        f'<rect class="{kind}" x="160" y="{y + dy}" width="{room * size / most:.1f}" height="8"/>'
        for size, kind, dy in bars
    )
    return f'<text x="152" y="{y + 13}" text-anchor="end">{escape(part.purpose)}</text>{drawn}'


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """So many points that a line needs, peaks among them."""
    step = -(-len(points) // _MOST_POINTS)
    return [
        max(points[at : at + step], key=lambda point: point[1])
        for at in range(0, len(points), max(1, step))
    ]


def _chart(
    lines: Sequence[tuple[str, list[tuple[float, float]]]],
    *,
    label: str,
    x_unit: str,
    y_text: Sequence[str],
    top: float,
    marks: Sequence[tuple[float, str]] = (),
    level: float | None = None,
) -> str:
    """Lines over a common x from 0.

    Args:
        lines: (class, points).
        label: What is shown.
        x_unit: Written behind the largest x.
        y_text: At 0 and at the top.
        top: The largest y.
        marks: (x, text) of vertical lines.
        level: The y of a dashed line.
    """
    right = max([1e-9, *(x for _, points in lines for x, _ in points)])
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 8

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + width * x / right, 8 + height * (1 - min(1.0, y / top))

    drawn = [
        f'<path class="axis" d="M{_LEFT} 8V{8 + height}H{_LEFT + width}" fill="none"/>',
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{escape(y_text[1])}</text>',
        f'<text x="{_LEFT - 6}" y="{8 + height}" text-anchor="end">{escape(y_text[0])}</text>',
        f'<text x="{_LEFT + width}" y="{_HEIGHT - 6}" text-anchor="end">{right:,.4g} {escape(x_unit)}</text>',
    ]
    for kind, points in lines:
        if points:
            path = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in _thinned(points))
            drawn.append(f'<path class="line {kind}" d="M{path}"/>')
    for x, text in marks:
        at = place(x, 0)[0]
        drawn.append(f'<path class="axis" d="M{at:.1f} 8V{8 + height}"/>')
        drawn.append(f'<text x="{at + 3:.1f}" y="18">{escape(text)}</text>')
    if level is not None:
        y = place(0, level)[1]
        drawn.append(f'<path class="plan" d="M{_LEFT} {y:.1f}H{_LEFT + width}"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def _memory(found: Profile) -> str:
    used = [(s.at, float(s.used)) for s in found.samples]
    lines = [("two", used)]
    said = '<b class="two">in use</b> of the card, by whomever'
    if found.peak is None:
        said = '<b class="two">resident memory</b> of the process: this run was on a CPU, weights and all else included'
    else:
        reserved = [(s.at, float(s.reserved or 0)) for s in found.samples]
        lines += [
            ("one", reserved),
            ("three", [(s.at, float(s.allocated or 0)) for s in found.samples]),
        ]
        said += ', <b class="one">held by torch</b>, <b class="three">in live tensors</b>'
    planned = sum(part.planned for part in found.device)
    level = float(planned) if found.peak is not None else None
    top = 1.05 * max([level or 0.0, *(y for _, points in lines for _, y in points)])
    drawn = _chart(
        lines, label="memory over time", x_unit="s", y_text=("0", gib(int(top))), top=top,
        marks=[(found.prefill_until, "decode"), *((at, f"phase {phase}") for at, phase in found.changes)], level=level,
    )  # fmt: skip
    dashed = "" if level is None else f"; dashed: planned, {gib(planned)}"
    return f"<figure>{drawn}<figcaption>{said}{dashed}</figcaption></figure>"


def _tokens(found: Profile, planned_ms: float | None) -> str:
    times = found.token_ms
    if not times:
        return "<p>One token was made, by the prompt's last pass.</p>"
    middle = sorted(times)[len(times) // 2]
    top = max(min(4 * middle, 1.05 * max(times)), 1.05 * (planned_ms or 0.0), 1e-3)
    points = [(float(i), ms) for i, ms in enumerate(times, 2)]
    drawn = _chart(
        [("one", points)], label="milliseconds per token", x_unit="tokens",
        y_text=("0", duration(top / 1000)), top=top, level=planned_ms,
    )  # fmt: skip
    beyond = sum(ms > top for ms in times)
    said = f"half of them took {duration(middle / 1000)} or less, the slowest {duration(max(times) / 1000)}"
    if beyond:
        said += f"; {beyond} beyond the top, where steps are captured"
    if planned_ms is not None:
        said += f"; dashed: planned, {planned_ms:.1f} ms"
    return f"<figure>{drawn}<figcaption>{said}</figcaption></figure>"


def _engines(found: Profile) -> str:
    rows = [(engine, f"{ms:.2f}") for engine, ms in found.engines.items()]
    return (
        f"<p>{found.looked_at} tokens behind the answer were looked at, "
        f"{duration(found.looked_s / found.looked_at)} each with the profiler on. Engines overlap.</p>"
    ) + _table(("engine", "ms a token"), rows)


def _kernels(found: Profile) -> str:
    rows = [
        (kernel.name[:120], kernel.engine, f"{1000 * kernel.seconds / found.looked_at:.3f}",
         f"{kernel.calls / found.looked_at:,.0f}")
        for kernel in found.kernels[:_KERNELS]
    ]  # fmt: skip
    return "<h2>The slowest kernels</h2>" + _table(("kernel", "engine", "ms a token", "calls a token"), rows)  # fmt: skip
