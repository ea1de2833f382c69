"""Tables of the runs of adapt.py: the code blocks of its page execute this file."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

PROTOCOLS = ("retrieval", "kmeans", "ridge")


def read_rows(file):
    """The rows of a file beside the page; none where it does not exist yet."""
    path = Path("docs/recipes", file)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figure(rows, protocol):
    """The mean difference over the seeds, its deviation, and the widest of their intervals."""
    found = [row["scores"][protocol]["difference"] for row in rows]
    values, lows, highs = zip(*found, strict=True)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.3f}{spread} [{min(lows):+.3f}, {max(highs):+.3f}]"


def results(rows):
    """A table for each set and split: a row for each method."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["set"], row["split"], row["images"], row["scored"], *row["size"])
        groups[key][row["method"]].append(row)
    lines = []
    for (name, split, images, scored, height, width), methods in groups.items():
        first = next(iter(methods.values()))[0]
        before = [f"{first['scores'][x]['before'][0]:.3f}" for x in PROTOCOLS]
        lines += [
            f"**{name}, {split}**: trained on {images} images, scored on {scored} of {height} x "
            f"{width} pixels, with masks at their own size.",
            "",
            "| method | runs | retrieval | k-means | ridge | CPU seconds | GB |",
            "|---|---|---|---|---|---|---|",
            f"| *before* | | *{before[0]}* | *{before[1]}* | *{before[2]}* | | |",
        ]
        for method, runs in methods.items():
            cells = [figure(runs, protocol) for protocol in PROTOCOLS]
            seconds = statistics.fmean(row["seconds"] for row in runs)
            memory = max(row["gigabytes"] for row in runs)
            lines.append(
                f"| `{method}` | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} | {memory:.1f} |"
            )
        lines.append("")
    return "\n".join(lines) or "No run is finished yet."


def option(name, value):
    """An option as it is typed; those of the views are in a table of their own."""
    if isinstance(value, dict):
        return " ".join(option(f"{name}.{k}", v) for k, v in value.items() if k != "blur")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"--{name.replace('_', '-')} {text}"


def settings(rows):
    """A table of all settings that were tried."""
    lines = [
        "| method | setting | retrieval | k-means | clusterings | ridge |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        setting = {k: v for k, v in row["setting"].items() if k not in ("steps", "features", "on")}
        text = " ".join(option(k, v) for k, v in setting.items())
        text = f"`{text}`" if text else row["setting"]["features"]
        cells = [f"{row['scores'][x]['difference'][0]:+.3f}" for x in PROTOCOLS]
        cells.insert(2, str(row.get("clusterings", 1)))
        lines.append(f"| `{row['method']}` | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)
