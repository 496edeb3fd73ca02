"""The timeline of a benchmark run as one HTML page with an inline SVG: a lane for each stage and thread, nothing loaded."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

COLOURS = {
    "read": "#4477aa", "h2d": "#66ccee", "forward": "#aa3377", "search": "#ee6677", "pack": "#228833", "d2h": "#88ccaa",
    "hash": "#ccbb44", "write": "#ee8866", "sync": "#bb4444",
}  # fmt: skip
OTHER = "#888888"
WIDTH, LANE, LEFT = 1200, 16, 190
PIXELS_APART = 0.5  # spans of a lane nearer than this are drawn as one


def write_chart(path: Path, result: dict[str, Any]) -> None:
    """Write the page for the median run of a `convert` result."""
    runs = sorted((r for r in result["ours"] if "spans" in r), key=lambda r: r["seconds"])
    if not runs:
        return
    run = runs[(len(runs) - 1) // 2]
    title = f"{result['shape']} x{result['layers']} to {result['recipe']} on {result['machine']['device']}: {run['seconds']:.2f} s"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>body{{font:13px sans-serif;margin:2em}}td,th{{padding:.2em .8em;text-align:right}}</style>"
        f"<h1>{escape(title)}</h1>{svg(run)}{table(result['stages'])}",
        encoding="utf-8",
    )


def svg(run: dict[str, Any]) -> str:
    """Rows by stage and lane, in the order in which stages first ran; time to the right, a tick a second."""
    lanes: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for stage, lane, start, end, _ in run["spans"]:
        lanes.setdefault((stage, lane), []).append((start, end))
    stages = list(dict.fromkeys(stage for stage, _ in lanes))
    ordered = sorted(lanes, key=lambda key: (stages.index(key[0]), key[1]))
    seconds = max(run["timeline"]["seconds"], 1e-9)
    scale = (WIDTH - LEFT) / seconds
    height = LANE * (len(ordered) + 2)
    parts = [f'<svg width="{WIDTH}" height="{height}" font-size="11" role="img">']
    step = max(1, round(seconds / 20)) if seconds > 2 else 0.1
    for tick in range(int(seconds / step) + 1):
        x = LEFT + tick * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - LANE}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 3}">{tick * step:g} s</text>')
    for row, key in enumerate(ordered):
        y = row * LANE
        parts.append(
            f'<text x="0" y="{y + LANE - 5}">{escape(key[0])} <tspan fill="#888">{escape(key[1])}</tspan></text>'
        )
        for start, end in merged(lanes[key], PIXELS_APART / scale):
            parts.append(
                f'<rect x="{LEFT + start * scale:.2f}" y="{y + 2}" width="{max((end - start) * scale, 0.3):.2f}" '
                f'height="{LANE - 4}" fill="{COLOURS.get(key[0], OTHER)}"><title>{escape(key[0])} {start:.3f} to {end:.3f} s</title></rect>'
            )
    return "".join(parts) + "</svg>"


def merged(spans: list[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start - out[-1][1] <= gap:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def table(rows: list[dict[str, Any]]) -> str:
    head = "<tr><th>stage<th>GB<th>busy s<th>floor s<th>busy / floor<th>of the run"
    body = "".join(
        f"<tr><td>{escape(row['stage'])}<td>{row['nbytes'] / 1e9:.2f}<td>{row['busy']:.2f}"
        + (f"<td>{row['floor']:.2f}<td>{row['busy'] / row['floor']:.2f}" if row["floor"] else "<td><td>")
        + f"<td>{row['share']:.0%}"
        for row in rows
    )
    return f"<table>{head}{body}</table>"
