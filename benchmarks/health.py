"""Do the scores without labels tell which encoder is better? Their correlation with retrieval mIoU.

    python benchmarks/health.py FOLDER FOLDER --encoders tiny=random:tiny start=lite0 paka=RUN ...

Each encoder has a name, and is what evaluate.py takes: a run folder, one of its checkpoints,
random:NAME and so on. A row for each encoder and labeled folder is appended to --rows, and what is
there already is not measured again. Without --encoders it prints the table of the rows.
"""

import argparse
import json
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
ROWS = Path("docs/recipes/health-rows.jsonl")
SIZE = (224, 288)  # of the images; the masks keep their own size
IMAGES = 32  # of each split, randomly selected
GALLERY = 5_000  # cells that the nearest neighbors are of
DRAWS = 10_000  # of the bootstrap over the encoders
# Each score, and whether more of it should be better.
SCORES = {
    "effective_rank": "more",
    "off_diagonal_cosine": "less",
    "position_share": "less",
    "norm_outliers": "less",
    "dense_structure": "more",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--encoders", nargs="*", default=[], help="NAME=ENCODER")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--fit", default="train", help="split of the nearest neighbors")
    parser.add_argument("--split", default="val", help="split to score")
    arguments = parser.parse_args()

    known = {(row["set"], row["name"]) for row in read_rows(arguments.rows)}
    for folder in arguments.folders:
        missing = []
        for pair in arguments.encoders:
            name, _, encoder = pair.partition("=")
            if (folder.resolve().name, name) not in known:
                missing.append((name, encoder))
        if missing:
            measure_all(folder, missing, arguments)
    print(table(read_rows(arguments.rows)))


def read_rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


# ---- measuring -----------------------------------------------------------------------------------
def measure_all(folder: Path, encoders: list[tuple[str, str]], arguments) -> None:
    """Append a row for each encoder on the images of one folder, which are read once."""
    sys.path.insert(0, str(RECIPES))
    import evaluate
    from downstream import health, protocols
    from downstream.encoders import load_encoder

    config = evaluate.Config(
        encoders=(), data=folder, fit=arguments.fit, split=arguments.split, size=SIZE,
        limit=IMAGES, workers=0, device="cpu",
    )  # fmt: skip
    protocols.GALLERY = GALLERY
    fit, test = [Kept(samples) for samples in evaluate.open_samples(config)]
    for name, source in encoders:
        encoder = load_encoder(source)
        batches = evaluate.load_batches(test, config, name)
        scores = health.health(encoder, batches, config, Path())
        features = [evaluate.encode(encoder, samples, config) for samples in (fit, test)]
        found = protocols.FITTED["retrieval-seg"].score(*features, config, 0)
        row = {
            "set": folder.resolve().name,
            "name": name,
            "architecture": encoder.architecture,
            "method": encoder.facts.get("method", source),
            "step": encoder.facts.get("step", 0),
            "miou": [round(float(x), 4) for x in found["miou"][:3]],
            **{score: round(float(scores[score]), 5) for score in SCORES},
            "tokens": scores["tokens"],
        }
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


class Kept(list):
    """Samples in memory."""

    def __init__(self, samples):
        super().__init__(samples[i] for i in range(len(samples)))
        self.classes = samples.classes


# ---- the table -----------------------------------------------------------------------------------
def ranks(values):
    """The ranks of values in the last axis; equal ones share the mean of theirs."""
    lower = (values[..., :, None] > values[..., None, :]).sum(-1)
    same = (values[..., :, None] == values[..., None, :]).sum(-1)
    return lower + (same.double() - 1) / 2


def spearman(x, y):
    """Spearman's correlation along the last axis; NaN where one side is constant."""
    import torch

    centered = [ranks(values) - ranks(values).mean(-1, keepdim=True) for values in (x, y)]
    covariance = (centered[0] * centered[1]).sum(-1)
    return covariance / torch.sqrt(centered[0].square().sum(-1) * centered[1].square().sum(-1))


def correlate(rows: list[dict], score: str) -> str:
    """The correlation with its 95 % interval, by a bootstrap over the encoders."""
    import torch

    x = torch.tensor([row[score] for row in rows], dtype=torch.float64)
    y = torch.tensor([row["miou"][0] for row in rows], dtype=torch.float64)
    value = spearman(x, y)
    if value.isnan():
        return "constant"
    draws = torch.randint(len(rows), (DRAWS, len(rows)), generator=torch.Generator().manual_seed(0))
    found = spearman(x[draws], y[draws])
    low, high = found[~found.isnan()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def table(rows: list[dict], least: int = 6) -> str:
    """A column for all encoders of each set, and for each architecture that has enough of them."""
    columns = {}
    for name in sorted({row["set"] for row in rows}):
        of_set = [row for row in rows if row["set"] == name]
        columns[f"{name}, all {len(of_set)}"] = of_set
        for architecture in sorted({row["architecture"] for row in of_set}):
            own = [row for row in of_set if row["architecture"] == architecture]
            if least <= len(own) < len(of_set):
                columns[f"{name}, {len(own)} of `{architecture}`"] = own
    lines = ["| score | better | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for score, direction in SCORES.items():
        cells = [correlate(own, score) for own in columns.values()]
        lines.append(f"| `{score}` | {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
