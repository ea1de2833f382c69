"""Tables of what benchmarks/evidence.py and demos.py write: evidence.md executes this file."""

import io
import json
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

PROTOCOLS = ("ridge-seg", "retrieval-seg", "kmeans-seg")
GRAY = "#808080"
STYLES = {  # of a method's curve: a pair shares a color
    "densesiam": ("tab:blue", "-"),
    "simsiam": ("tab:blue", "--"),
    "dupr": ("tab:green", "-"),
    "mocov2": ("tab:green", "--"),
    "croc": ("tab:red", "-"),
    "dino": ("tab:red", "--"),
    "d3ssl": ("tab:purple", "-"),
    "decoupling": ("tab:purple", "-."),
    "region": ("tab:purple", "--"),
}
METHODS = list(STYLES)  # in the order of the tables
TERMS = {  # what a demo logs besides its score, as the tables name it
    "coupling_rate_layer4": "coupling",
    "mean_cosine_layer4": "cosine",
    "clusters": "K",
    "valid": "valid",
    "image_entropy": "image entropy",
    "cluster_entropy": "cluster entropy",
    "color_miou": "k-means on colors",
}


def read_lines(path):
    """All rows; a line that was cut off by a crash is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def read(path):
    """The last row of each run, comparison and point, and the rows that no longer count.

    These are of earlier studies, and of failed runs and points that were made once more.
    """
    runs = {}
    comparisons = {}
    points = {}
    earlier = []
    rows = read_lines(path)
    last_study = max((row["study"] for row in rows), default=0)
    for row in rows:
        if row["study"] < last_study:
            earlier.append(row)
        elif row["kind"] == "comparison":
            comparisons[row["method"], row["protocol"]] = row
        else:
            is_point = row["kind"] == "point"
            kept = points if is_point else runs
            start = row["of"] if is_point else row["kind"]
            key = (start, row["method"], row["seed"], row["rate"], row["steps"] if is_point else 0)
            if key in kept:
                earlier.append(kept.pop(key))
            kept[key] = row
    return list(runs.values()), list(comparisons.values()), list(points.values()), earlier


def table(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def interval(value, low, high):
    """A figure and the interval around it."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def tables(path):
    """The claims, all runs and the grid as Markdown; a sentence where there are no rows."""
    runs, comparisons, points, earlier = read(path)
    if not runs and not earlier:
        return "No run has been made yet.\n"
    runs.sort(key=lambda row: (METHODS.index(row["method"]), row["seed"], row["rate"]))
    on_photographs = [row for row in runs if row["kind"] != "grid"]
    grid = [row for row in runs if row["kind"] == "grid"]
    parts = []
    if comparisons:
        parts += ["### Claims\n", claims(comparisons)]
    if on_photographs:
        priors = sorted({f"{row['prior']:.3f}" for row in on_photographs if "prior" in row})
        parts += ["### Means over the seeds\n", means(on_photographs)]
        parts += [f"The position prior, which looks at no image, has mIoU {', '.join(priors)}.\n"]
    picture, points_table = curves(runs, points)
    if picture:
        parts += ["### Curves\n", picture]
    if grid:
        parts += ["### Grid of learning rates, on scenes\n", run_table(grid, PROTOCOLS[:1])]
    if on_photographs:
        parts += ["### Runs\n", run_table(on_photographs, PROTOCOLS)]
    if points_table:
        parts += ["### Points of the curves\n", points_table]
    if earlier:
        parts += ["### Earlier studies, and failed runs that were made again\n"]
        parts += [earlier_runs(earlier)]
    return "\n".join(parts)


def claims(comparisons):
    """A table of the comparisons."""
    head = ["pair", "protocol", "difference of mIoU (images)", "over seeds", "claim"]
    rows = [
        [
            f"{row['method']} against {row['baseline']}",
            row["protocol"],
            interval(row["difference"], row["low"], row["high"]),
            f"[{row['seeds_low']:.3f}, {row['seeds_high']:.3f}]",
            row["claim"],
        ]
        for row in comparisons
    ]
    return table(head, rows)


def means(runs):
    """A table of the mean scores of each method, over the seeds; long runs are left out."""
    rows = []
    for method in METHODS:
        done = [row for row in runs if row["method"] == method and row["kind"] == "run"]
        done = [row for row in done if row["status"] == "done"]
        if done:
            found = [[row["scores"].get(protocol) for row in done] for protocol in PROTOCOLS]
            values = [[score["value"] for score in scores if score] for scores in found]
            cells = [f"{sum(x) / len(x):.3f}" if x else "" for x in values]
            rows.append([method, str(len(done)), *cells])
    return table(["method", "seeds", *PROTOCOLS], rows)


def run_table(runs, protocols):
    """A table of runs, one in each row."""
    rows = []
    for row in runs:
        start = [row["method"], str(row["seed"]), f"{row['rate']:g}", str(row["steps"])]
        end = [f"{row['seconds'] / 60:.0f} min", f"`{row['commit']}`"]
        rows.append([*start, *score_cells(row, protocols), *end])
    return table(["method", "seed", "learning rate", "steps", *protocols, "time", "commit"], rows)


def score_cells(row, protocols):
    """The scores of a run; of one that failed, its message."""
    if row["status"] != "done":
        message = f"failed: {row.get('message', '')}".replace("|", "/")
        return [message, *[""] * (len(protocols) - 1)]
    scores = [row["scores"].get(protocol) for protocol in protocols]
    return [interval(**score) if score else "" for score in scores]


def earlier_runs(rows):
    """A table of runs that no longer count."""
    cells = []
    for row in rows:
        if row["kind"] != "comparison":
            start = [str(row["study"]), row["kind"], row["method"], str(row["seed"])]
            numbers = [f"{row['rate']:g}", str(row["steps"])]
            time = f"{row['seconds'] / 60:.0f} min" if "seconds" in row else ""
            end = [time, f"`{row['commit']}`"]
            cells.append([*start, *numbers, *score_cells(row, PROTOCOLS), *end])
    head = ["study", "kind", "method", "seed", "learning rate", "steps"]
    return table([*head, *PROTOCOLS, "time", "commit"], cells)


def curves(runs, points):
    """The scores of the first seed against the steps: one panel for each protocol, and a table.

    Both are empty where there is no point.
    """
    ends = {f"{x['kind']}-{x['method']}-{x['seed']}-{x['rate']:g}": x for x in runs}
    lines = {}  # of each run: the steps and their scores
    failed = []
    for point in sorted(points, key=lambda row: (METHODS.index(row["method"]), row["steps"])):
        if point["status"] != "done":
            failed.append(f"{point['method']} at step {point['steps']:,}")
        elif ends.get(point["of"], {}).get("status") == "done":
            lines.setdefault(point["of"], []).append((point["steps"], point["scores"]))
    note = f"These points failed: {', '.join(failed)}.\n" if failed else ""
    if not lines:
        return note, ""
    for name, line in lines.items():
        line.append((ends[name]["steps"], ends[name]["scores"]))

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    for axes, protocol in zip(figure.subplots(1, len(PROTOCOLS)), PROTOCOLS, strict=True):
        for name, line in lines.items():
            color, dashes = STYLES[ends[name]["method"]]
            is_long = ends[name]["kind"] == "long"
            steps = [step for step, _ in line]
            values = [scores[protocol]["value"] for _, scores in line]
            axes.plot(
                steps, values, dashes, label=run_label(ends[name]), color=color,
                marker="s" if is_long else "o", markersize=3,
                linewidth=2.5 if is_long else 1.2, alpha=0.5 if is_long else 1.0,
            )  # fmt: skip
        if protocol == "ridge-seg":  # the prior is measured with its classifier
            for prior in {row["prior"] for row in runs if row["kind"] == "run" and "prior" in row}:
                axes.axhline(prior, linestyle=":", color=GRAY, label="position prior")
        axes.set_xscale("log")
        last = max(line[-1][0] for line in lines.values())
        ticks = [step for step in (20, 100, 500, 2000) if step <= last]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(title=protocol, xlabel="step", ylabel="mIoU" if protocol == PROTOCOLS[0] else "")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, frameon=False, labelcolor=GRAY
    )
    picture = as_image(figure, "Curves of the mIoU in three protocols, against the step")

    rows = [
        [run_label(ends[name]), f"{step:,}", *(f"{scores[x]['value']:.3f}" for x in PROTOCOLS)]
        for name, line in lines.items()
        for step, scores in line
    ]
    note += "Seed 0; a baseline has the color of its method, and a broken line.\n"
    return "\n".join([picture, note]), table(["run", "step", *PROTOCOLS], rows)


def run_label(run):
    """The method of a run, and the number of its steps if it is a long one."""
    return f"{run['method']}, {run['steps']:,} steps" if run["kind"] == "long" else run["method"]


def as_image(figure, alt):
    """A figure for a page, readable on white and on black."""
    for axes in figure.axes:
        axes.tick_params(colors=GRAY)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(GRAY)
        for side, line in axes.spines.items():
            line.set_color(GRAY)
            line.set_visible(side in ("left", "bottom"))
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": alt}):  # the same bytes each time
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    data = b64encode(file.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">\n'


def demo_tables(path):
    """The claims of the demos and their runs as Markdown; a sentence where there are no rows."""
    rows = read_lines(path)
    if not rows:
        return "No demo has been run yet.\n"
    last_study = max(row["study"] for row in rows)
    claims = {}
    runs = {}  # of each side, by seed
    failed = []  # runs that were made again
    for row in rows:
        if row["study"] < last_study:
            continue
        if row["kind"] == "demo comparison":
            claims[row["side"], row["other"], row["measure"]] = (
                f"{row['side']} against {row['other']}",
                TERMS.get(row["measure"], row["measure"]),
                interval(row["difference"], row["low"], row["high"]),
                f"{row['above']} of {row['seeds']}",
                row["claim"],
            )
        else:
            of_side = runs.setdefault(row["side"], {})
            before = of_side.get(row["seed"])
            if before is not None and before["status"] != "done":
                failed.append(before)
            of_side[row["seed"]] = row
    parts = []
    if claims:
        head = ["pair", "measure", "difference", "seeds above", "claim"]
        parts.append(table(head, claims.values()))
    head = ["demo", "steps", "score at the end, by seed", "means at the end", "time", "commits"]
    parts.append(table(head, [side_cells(side, runs[side]) for side in sorted(runs)]))
    if failed:
        said = [f"{row['side']} {row['seed']} ({row['message']})" for row in failed]
        parts.append(f"These runs failed and were made again: {', '.join(said)}.\n")
    return "\n".join(parts)


def side_cells(side, runs):
    """What the runs of a side ended with, in one row of a table."""
    done = [row for row in runs.values() if row["status"] == "done"]
    ends = []
    for seed, row in sorted(runs.items()):
        if row["status"] == "done":
            ends.append(f"{seed}: {row['scores'][-1][1]:.3f}")
        else:
            ends.append(f"{seed}: failed: {row['message']}".replace("|", "/"))
    steps = sorted({row["scores"][-1][0] for row in done})
    values = {name: [x["terms"][name] for x in done if name in x["terms"]] for name in TERMS}
    means = [f"{TERMS[x]} {sum(y) / len(y):.3f}" for x, y in values.items() if y]
    minutes = sum(row["seconds"] for row in runs.values()) / 60 / len(runs)
    commits = sorted({f"`{row['commit']}`" for row in runs.values()})
    steps = ", ".join(f"{x:,}" for x in steps)
    end = [", ".join(means), f"{minutes:.0f} min", ", ".join(commits)]
    return [side, steps, ", ".join(ends), *end]
