"""Tables of the rows that benchmarks/conformance.py writes: conformance.md executes this file."""

import json
from pathlib import Path

NAMES = {"albumentationsx": "AlbumentationsX"}


def conformance_rows(check):
    """The rows of one question, in the order of the file."""
    rows = [json.loads(line) for line in Path("docs/conformance.jsonl").read_text().splitlines()]
    return [row for row in rows if row["check"] == check]


def name(row):
    """The library, its version and what of it is asked."""
    library = NAMES.get(row["library"], row["library"])
    return f"{library} {row['version']}: {row['what']}"


def conformance_table(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def pairs(check):
    """The rows of one library by edges and by centers, beside each other."""
    found = {}
    for row in conformance_rows(check):
        found.setdefault(name(row), {})[row["convention"]] = row
    return found


def vectors_table():
    """How many golden vectors pass, by edges and by centers."""
    head = ("key points of", "pass, by edges", "by centers", "largest error", "not offered")
    rows = []
    for what, found in pairs("vectors").items():
        passed = [f"{found[by]['passed']} of {found[by]['offered']}" for by in ("edges", "centers")]
        best = max(found.values(), key=lambda row: (row["passed"], -row["largest"]))
        largest = f"{best['largest']:.1f}" if best["largest"] else "0"
        absent = ", ".join(case.partition(" (")[0] for case in best["not_offered"])
        rows.append((what, *passed, f"{largest} (by {best['convention']})", absent))
    return conformance_table(head, rows)


def pixels_table():
    """How far key points are from their pixels after each operation."""
    rows = []
    for what, found in pairs("pixels").items():
        for convention, row in found.items():
            errors = ["" if e is None else f"{e:.2f}" if e else "0" for e in row["errors"].values()]
            rows.append((what, convention, *errors))
    operations = conformance_rows("pixels")[0]["errors"]
    return conformance_table(("key points of", "by", *operations), rows)
