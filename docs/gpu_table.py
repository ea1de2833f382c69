"""Tables of what benchmarks/gpu.py writes: benchmarks.md executes this file."""

import json
from pathlib import Path


def table(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def outcome(section):
    """How a section ended, and how many of its rows name an error."""
    if section["error"]:
        return f"failed: {section['error']}"
    failed = [row["what"] for row in section["rows"] if row.get("error")]
    done = f"{len(section['rows']) - len(failed)} of {len(section['rows'])} rows"
    return f"{done}; failed: {', '.join(failed)}" if failed else done


def step(name, row):
    """The cells of a recipe."""
    waits = row.get("waits")
    return (
        f"{name}, {row['batch']} images",
        f"{row['step_ms']:.1f} ms",
        f"{row['images_per_s']:.0f}",
        f"{row['first_step_s']:.1f} s",
        f"{row.get('peak_gb', 0):.1f} GB",
        "" if waits is None else ", ".join(waits) or "none",
    )


def tables(path):
    """What ran, the recipes and the benchmarks as Markdown; a sentence where there is no file."""
    if not Path(path).exists():
        return "It has not run on a GPU yet, so there are no numbers here.\n"
    found = json.loads(Path(path).read_text())
    sections = found["sections"]
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    text = f"On {machine}.\n\n"
    ran = [
        (name, f"{section['seconds']:.0f} of {section['limit']} s", outcome(section))
        for name, section in sections.items()
    ]
    text += table(("section", "time", "outcome"), ran) + "\n"

    rows = [(name, row) for name, section in sections.items() for row in section["rows"]]
    steps = [step(name, row) for name, row in rows if "step_ms" in row]
    if steps:
        head = ("recipe", "a step", "images/s", "first step", "peak memory", "waits in a step")
        text += table(head, steps) + "\n"
    compared = [
        (row["what"], row["ours"], row["rival"], row["ratio"]) for _, row in rows if "ours" in row
    ]
    if compared:
        text += table(("what", "densekit", "rival", "ratio"), compared)
    return text
