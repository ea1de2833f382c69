"""The results of an evaluation: the mean over its seeds, tables, results.json and report.md.

This module is no command. Results are nested dictionaries: results[encoder][protocol] holds the
figures of a protocol by their names. A figure is a number, or an interval with its value, low and
high ends, or it holds the figures of a level.
"""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import harness
import densekit as dk

Figures = dict[str, Any]
Results = dict[str, dict[str, Figures]]  # by encoder, by protocol


# ---- several seeds -------------------------------------------------------------------------------
def mean_over_seeds(found: list[Any]) -> Any:
    """The mean of the same figures with several seeds.

    An interval also gets the standard deviation of its value over the seeds. What is a whole number
    with every seed alike, such as a count of images, stays one.
    """
    first = found[0]
    if not isinstance(first, dict):
        mean = statistics.fmean(found)
        if isinstance(first, int) and mean == first:
            return first
        return mean

    means = {}
    for key in dict.fromkeys(key for x in found for key in x):
        of_seeds = [x[key] for x in found if key in x]
        means[key] = mean_of_classes(of_seeds) if key == "iou" else mean_over_seeds(of_seeds)
    if means.keys() >= {"value", "low", "high"} and len(found) > 1:
        means["over_seeds"] = statistics.stdev(x["value"] for x in found)
    return means


def mean_of_classes(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the figure of each class, over the seeds that have one."""
    names = dict.fromkeys(name for x in found for name in x)
    return {name: statistics.fmean(x[name] for x in found if name in x) for name in names}


# ---- tables --------------------------------------------------------------------------------------
def table_row(figures: Figures) -> dict[str, Any]:
    """The cells of a row: one for each figure, none for single classes."""
    cells = {}
    for name, figure in figures.items():
        if name == "iou":
            continue  # it has a table of its own
        if not isinstance(figure, dict):
            cells[name] = figure
        elif "value" in figure:
            cells[name] = interval_text(figure)
        else:
            cells[name] = table_row(figure)
    return cells


def interval_text(interval: Figures) -> str:
    """0.250 ± 0.004 [0.241, 0.262]; the deviation only where there are several seeds."""
    text = f"{interval['value']:.3f}"
    if "over_seeds" in interval:
        text += f" ± {interval['over_seeds']:.3f}"
    return f"{text} [{interval['low']:.3f}, {interval['high']:.3f}]"


def tables_of(protocol: str, results: Results) -> list[str]:
    """The tables of a protocol: a row for each encoder, and then the IoU of each class."""
    rows = {}
    rows_of_classes = {}
    for encoder, found in results.items():
        if protocol in found:
            figures = found[protocol]
            name = harness.printable(encoder)
            rows[name] = table_row(figures)
            if "iou" in figures:
                rows_of_classes[name] = {
                    harness.printable(label): iou for label, iou in figures["iou"].items()
                }

    tables = [dk.as_table(rows)] if rows else []
    if rows_of_classes:
        tables.append(dk.as_table(rows_of_classes))
    return tables


# ---- files ---------------------------------------------------------------------------------------
def picture_name(encoder: str) -> str:
    """What the pictures of an encoder are called, behind their kind: random-tiny of random:tiny."""
    return re.sub(r"[^\w.-]+", "-", encoder).strip("-")


def report_text(results: Results, protocols: Iterable[str], config: Any) -> str:
    """The report in Markdown: the tables of all protocols, then the figures of `config.out`."""
    data = harness.printable(str(config.data or "procedural scenes"))
    height, width = config.size
    lines = [
        "# Evaluation",
        "",
        f"The data are `{data}`, split {config.split}, with images of {height} x {width} pixels.",
        "The brackets are the 95 % interval of a bootstrap over the images.",
    ]
    if config.seeds > 1:
        lines.append(f"Figures are means over {config.seeds} seeds ± their standard deviation.")
    lines.append("")

    for protocol in protocols:
        tables = tables_of(protocol, results)
        if tables:
            lines += [f"## {protocol}", ""]
        for table in tables:
            lines += [table, ""]
    own_names = {picture_name(encoder) for encoder in results}
    for path in sorted((config.out / "figures").glob("*.png")):
        if path.stem.partition("-")[2] in own_names:  # else it is of an earlier evaluation
            lines += [f"![{path.stem}](figures/{path.name})", ""]
    return "\n".join(lines)


def write_results(results: Results, seeds: dict[str, Any], text: str, config: Any) -> None:
    """Write results.json, with the figures of every seed, and report.md."""
    content = {"config": asdict(config), "results": results, "seeds": seeds}
    numbers = json.dumps(harness.as_plain(content), indent=2) + "\n"
    harness.write(config.out / "results.json", numbers.encode())
    harness.write(config.out / "report.md", text.encode())
