"""What does an index read for how good an output? The figure and the tables of docs/index.md, of benchmarks/index.json.

    python tools/plot_index.py

writes docs/index.svg and puts the tables between the marks of the page. The figure is written by hand: a line is a list of
points, and so it is the same on every machine, which a test compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
# Name in the record, in the figure, and its colour: those of Okabe and Ito, which the colour-blind tell apart.
SERIES = [
    ("flat 4 bits", "flat, 4 bits", "#000000"),
    ("flat 2 bits", "flat, 2 bits", "#888888"),
    ("ivf", "ivf", "#E69F00"),
    ("hnsw", "hnsw", "#CC79A7"),
    ("graph", "graph", "#0072B2"),
    ("clusters", "clusters", "#D55E00"),
    ("clusters, shared", "clusters, shared", "#009E73"),
    ("pages, boxes", "pages, boxes", "#56B4E9"),
    ("pages, means", "pages, means", "#8B5A2B"),
]
DROPPED, ESTIMATED = "output_error", "error_with_codes"
REACHED = 0.95
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 330, 60, 46, 76


class Panel(NamedTuple):
    """A context of a model.

    Attributes:
        title: Model and tokens.
        at: What its rows end with.
        rows: By what they are of, without that.
        keys: That are indexed.
    """

    title: str
    at: str
    rows: dict[str, Row]
    keys: int


def panels(record: dict[str, Any]) -> list[Panel]:
    """The longest context of each model at which every index was measured, in the order of the record."""
    longest: dict[str, tuple[int, Panel]] = {}
    for row in record["rows"]:
        what, _, at = row["what"].rpartition(", ")
        if what != "pair: exact":
            continue
        model, tokens, ending = at.rpartition(" ")[0], row["tokens"], f", {at}"
        rows = {row["what"].removesuffix(ending): row for row in record["rows"] if row["what"].endswith(ending)}  # fmt: skip
        title = f"{model or 'SmolLM2-135M'}, {tokens:,} tokens"
        panel = Panel(title, at, rows, rows["pair: exact"]["indexed"])
        if tokens > longest.get(model, (0,))[0] and all(
            sweep(panel, name) for name, _, _ in SERIES
        ):
            longest[model] = tokens, panel
    return [panel for _, (_, panel) in sorted(longest.items())]


def sweep(panel: Panel, name: str) -> list[tuple[str, Row]]:
    """Settings of an index and their rows, in order of the bytes that they read."""
    found = []
    for what, row in panel.rows.items():
        index, _, setting = what.rpartition(", ")
        if index == name and ESTIMATED in row and setting != "sample":
            found.append((setting, row))
    return sorted(found, key=lambda pair: float(pair[1]["touched_bytes"]))


class Axis(NamedTuple):
    """A logarithmic axis: its ends, and where they lie in the figure."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten between the ends."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [tick for tick in every if self.low <= tick * 1.0001 and tick <= self.high * 1.0001]


def text(x: float, y: float, words: str, *, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def curve(points: list[tuple[float, float]], colour: str, *, filled: bool) -> list[str]:
    """A line through points and a mark at each: solid and full, or dashed and hollow."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = "" if filled else ' stroke-dasharray="4 3" stroke-opacity="0.7"'
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{colour if filled else "#ffffff"}" stroke="{colour}"/>'
        for x, y in points
    ]
    return [f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>', *marks]  # fmt: skip


def figure(record: dict[str, Any]) -> str:
    """The SVG."""
    shown = panels(record)
    points = [
        (row["touched_bytes"] / panel.keys, row[kind])
        for panel in shown for name, _, _ in SERIES for _, row in sweep(panel, name) for kind in (DROPPED, ESTIMATED)
    ]  # fmt: skip
    whole_width = LEFT + len(shown) * WIDTH + (len(shown) - 1) * GAP + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole_width} {TOP + HEIGHT + 118}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{whole_width}" height="{TOP + HEIGHT + 118}" fill="#ffffff"/>',
    ]
    for i, panel in enumerate(shown):
        left = LEFT + i * (WIDTH + GAP)
        xs, ys = zip(*points, strict=True)
        x = Axis(min(xs) / 1.2, max(xs) * 1.2, left, left + WIDTH)
        y = Axis(min(ys) / 1.2, max(ys) * 1.2, TOP + HEIGHT, TOP)
        out.append(text(left + WIDTH / 2, TOP - 14, panel.title, more=' font-size="13"'))
        out += [line(x.at(tick), y.start, x.at(tick), y.stop, 'stroke="#e4e4e4"') for tick in x.ticks()]  # fmt: skip
        out += [line(x.start, y.at(tick), x.stop, y.at(tick), 'stroke="#e4e4e4"') for tick in y.ticks()]  # fmt: skip
        out += [text(x.at(tick), y.start + 15, f"{tick:g}") for tick in x.ticks()]
        out += [text(left - 6, y.at(tick) + 4, f"{tick:g}", anchor="end") for tick in y.ticks()]
        out.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#444444"/>')  # fmt: skip
        out.append(text(left + WIDTH / 2, y.start + 34, "bytes touched by a search, all query heads together, per key of the index"))  # fmt: skip
        for kind, words in (
            (DROPPED, "the exactly best 100"),
            (ESTIMATED, "the same, rest estimated"),
        ):
            exact = y.at(panel.rows["exact"][kind])
            out.append(line(x.start, exact, x.stop, exact, 'stroke="#444444" stroke-dasharray="1 3"'))  # fmt: skip
            out.append(text(x.stop - 5, exact + 13, words, anchor="end", more=' fill="#444444"'))
        for name, _, colour in SERIES:
            rows = [row for _, row in sweep(panel, name)]
            for kind in (DROPPED, ESTIMATED):
                places = [(x.at(row["touched_bytes"] / panel.keys), y.at(row[kind])) for row in rows]  # fmt: skip
                out += curve(places, colour, filled=kind == ESTIMATED)
    middle = TOP + HEIGHT / 2
    out.append(text(14, middle, "relative error of attention's output", more=f' transform="rotate(-90 14 {middle:.1f})"'))  # fmt: skip
    bottom = TOP + HEIGHT + 60
    for i, (_, words, colour) in enumerate(SERIES):
        at, row = LEFT + i % 5 * 150, bottom + i // 5 * 18
        out += curve([(at, row), (at + 24, row)], colour, filled=True)
        out.append(text(at + 32, row + 4, words, anchor="start"))
    for j, (filled, words) in enumerate(((True, "rest estimated by codes"), (False, "rest dropped"))):  # fmt: skip
        at = LEFT + j * 190
        out += curve([(at, bottom + 40), (at + 24, bottom + 40)], "#444444", filled=filled)
        out.append(text(at + 32, bottom + 44, words, anchor="start"))
    return "\n".join([*out, "</svg>"]) + "\n"


def table(record: dict[str, Any]) -> str:
    """For each index the setting of least bytes that finds enough of the best 100, or that which finds most."""
    shown = panels(record)
    lines = []
    for panel in shown:
        lines += [
            f"**{panel.title}**",
            "",
            "| index | setting | recall@100 | keys scored | bytes per key | error, rest dropped | with means | with codes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        exact = panel.rows["exact"]
        lines.append(f"| the exactly best 100 | | 1 | | | {errors(exact)} |")
        for name, words, _ in SERIES:
            rows = sweep(panel, name)
            if not rows:
                continue
            enough = [pair for pair in rows if pair[1]["recall"] >= REACHED]
            setting, row = enough[0] if enough else max(rows, key=lambda pair: float(pair[1]["recall"]))  # fmt: skip
            share = row["touched_bytes"] / panel.keys
            lines.append(
                f"| {words} | {setting} | {row['recall']:.3f} | {100 * row['scanned']:.1f} % | {share:.0f} | {errors(row)} |"
            )
        lines.append("")
    lines += [
        "**3 % of the keys, relative to the exactly best of them without a tail**",
        "",
        "| pair | " + " | ".join(panel.title for panel in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    kinds = [("the exactly best, rest dropped", "pair: exact", DROPPED)]
    kinds += [(f"the exactly best, {name}", "pair: exact", f"error_with_{name}") for name in ("means", "codes")]  # fmt: skip
    found = ("flat 4 bits, overfetch 2", "flat 2 bits, overfetch 2", "graph, breadth 200", "clusters, overfetch 8", "pages, boxes, overfetch 8")  # fmt: skip
    kinds += [(f"{what}, codes", f"pair: {what}", ESTIMATED) for what in found]
    kinds += [("the best with noise, found by flat", "pair: flat 4 bits, sample", DROPPED)]
    for words, what, kind in kinds:
        ratios = [panel.rows[what][kind] / panel.rows["pair: exact"][DROPPED] for panel in shown]
        lines.append(f"| {words} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    walks = [row for row in record["rows"] if row["what"].startswith("at recall 0.95, ")]
    lines += [
        "",
        "**Keys that are scored until 95 % of the best 100 are found**",
        "",
        "| keys of | tokens | `hnsw` | `graph` | `graph`, from the last step's | the best 100 are |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(walks, key=lambda row: (row["what"].rpartition(" ")[0], row["tokens"])):
        model = row["what"].partition(", ")[2].rpartition(" ")[0] or "SmolLM2-135M"
        shares = [row["scanned"].get(name) for name in ("hnsw", "graph", "graph, following")]
        shown_shares = ["never" if share is None else f"{100 * share:.1f} %" for share in shares]
        exact_share = f"{100 * row['exact_share']:.1f} %"
        lines.append(
            f"| {model} | {row['tokens']:,} | {' | '.join(shown_shares)} | {exact_share} |"
        )
    return "\n".join(lines) + "\n"


def errors(row: Row) -> str:
    return " | ".join(f"{row[kind]:.4f}" for kind in (DROPPED, "error_with_means", ESTIMATED))


def page(record: dict[str, Any], before: str) -> str:
    """The page with its tables as they are now."""
    start, end = "<!-- tables -->\n", "<!-- /tables -->\n"
    head, _, rest = before.partition(start)
    return f"{head}{start}\n{table(record)}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    record = json.loads((ROOT / "benchmarks" / "index.json").read_text(encoding="utf-8"))
    (ROOT / "docs" / "index.svg").write_text(figure(record), encoding="utf-8")
    file = ROOT / "docs" / "index.md"
    file.write_text(page(record, file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
