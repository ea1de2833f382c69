"""Curves of runs as SVG: the code blocks of the recipes' pages execute this file."""

import json
from pathlib import Path

W, H = 330, 150  # of a panel


def curve(rows, name, x0, number):
    """One logged value over the steps, from its least to its largest, and those two numbers."""
    points, end = [(row["step"], row[name]) for row in rows if name in row], rows[-1]["step"]
    low, high = min(y for _, y in points), max(y for _, y in points)
    places = [
        f"{x0 + W * x / end:.1f},{25 + H * (1 - (y - low) / max(high - low, 1e-9)):.1f}"
        for x, y in points
    ]
    color = f"hsl({number * 100 + 210},70%,50%)"
    line = f'fill="none" stroke="{color}" stroke-width="1.5"'
    place = f'x="{x0}" y="{H + 42 + 15 * number}" font-size="12" fill="{color}"'
    note = f"{name}: {low:.3f} to {high:.3f}"
    return f'<polyline points="{" ".join(places)}" {line}/><text {place}>{note}</text>'


def charts(*panels):
    """Panels side by side: a title, the log of a run, and the names of its curves."""
    parts, most = [], max(len(names) for _, _, *names in panels)
    for position, (title, file, *names) in enumerate(panels):
        x0 = position * (W + 40)
        rows = [json.loads(line) for line in Path("docs/recipes", file).read_text().splitlines()]
        parts.append(f'<text x="{x0}" y="14" font-size="13" fill="currentColor">{title}</text>')
        parts += [curve(rows, name, x0, number) for number, name in enumerate(names)]
    width, height = len(panels) * (W + 40) - 40, H + 35 + 15 * most
    return f'<svg viewBox="0 0 {width} {height}" width="100%">{"".join(parts)}</svg>'
