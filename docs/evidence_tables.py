"""Tables of the rows that benchmarks/evidence.py writes: evidence.md executes this file."""

import json
from pathlib import Path

PROTOCOLS = ("ridge-seg", "retrieval-seg", "kmeans-seg")


def read(path):
    """The last row of each run, in the order of the file, and the last comparison of each pair."""
    runs = {}
    comparisons = {}
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    for line in lines:
        row = json.loads(line)
        if row["kind"] == "comparison":
            comparisons[row["method"], row["protocol"]] = row
        else:
            runs[row["study"], row["kind"], row["method"], row["seed"], row["rate"]] = row
    return list(runs.values()), list(comparisons.values())


def table(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def interval(value, low, high):
    """A figure and the interval around it."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def tables(path):
    """The claims, all runs and the grid as Markdown; a sentence where there are no rows."""
    runs, comparisons = read(path)
    if not runs:
        return "No run has been made yet.\n"
    claims = [
        (
            f"{row['method']} against {row['baseline']}",
            row["protocol"],
            interval(row["difference"], row["low"], row["high"]),
            f"[{row['seeds_low']:.3f}, {row['seeds_high']:.3f}]",
            row["claim"],
        )
        for row in comparisons
    ]
    found = []
    grid = []
    for row in runs:
        start = [row["method"], str(row["seed"]), f"{row['rate']:g}", str(row["steps"])]
        if row["status"] == "done":
            scores = [row["scores"].get(protocol) for protocol in PROTOCOLS]
            cells = [interval(**score) if score else "" for score in scores]
        else:
            cells = [f"failed: {row['message']}".replace("|", "/"), "", ""]
        end = [f"{row['seconds'] / 60:.0f} min", f"`{row['commit']}`"]
        if row["kind"] == "grid":
            grid.append([*start, cells[0], *end])
        else:
            found.append([*start, *cells, *end])
    parts = []
    if claims:
        head = ["pair", "protocol", "difference of mIoU (images)", "over seeds", "claim"]
        parts += ["### Claims\n", table(head, claims)]
    start = ["method", "seed", "learning rate", "steps"]
    end = ["time", "commit"]
    if found:
        priors = sorted(
            {f"{row['prior']:.3f}" for row in runs if "prior" in row and row["kind"] == "run"}
        )
        parts += ["### Runs\n", table([*start, *PROTOCOLS, *end], found)]
        parts += [f"The position prior, which looks at no image, has mIoU {', '.join(priors)}.\n"]
    if grid:
        parts += [
            "### Grid of learning rates, on scenes\n",
            table([*start, "ridge-seg", *end], grid),
        ]
    return "\n".join(parts)


def demo_tables(path):
    """The claims of the demos and their runs as Markdown; a sentence where there are no rows."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        return "No demo has been run yet.\n"
    claims = {}
    runs = {}
    for row in rows:
        if row["kind"] == "demo comparison":
            claims[row["side"], row["other"]] = (
                f"{row['side']} against {row['other']}",
                interval(row["difference"], row["low"], row["high"]),
                f"{row['above']} of 5",
                row["claim"],
            )
        else:
            if row["status"] == "done":
                (_, first), (step, last) = row["probes"][0], row["probes"][-1]
                cells = [str(step), f"{first:.3f}", f"{last:.3f}"]
            else:
                cells = [f"failed: {row['message']}".replace("|", "/"), "", ""]
            end = [f"{row['seconds'] / 60:.0f} min", f"`{row['commit']}`"]
            runs[row["study"], row["side"], row["seed"]] = [
                row["side"],
                str(row["seed"]),
                *cells,
                *end,
            ]
    parts = []
    if claims:
        head = ["pair", "difference of the probe's mIoU", "seeds above", "claim"]
        parts.append(table(head, claims.values()))
    head = ["demo", "seed", "steps", "probe at the start", "at the end", "time", "commit"]
    parts.append(table(head, [runs[key] for key in sorted(runs)]))
    return "\n".join(parts)
