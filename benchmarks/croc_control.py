"""CrOC's demo with other clusters: is it the loss or the clustering that holds it back?

    python benchmarks/croc_control.py --clusters truth --seed 0 --run FOLDER
    python benchmarks/croc_control.py --clusters found --seed 0 --run FOLDER --epochs 5

Everything but the clusters is the demo's: its scenes, networks, loss and options, which may be
given too. The clusters of both views are

    found     those of CrOC's clustering
    truth     the visible objects and grounds of the scene
    places    equal squares of the image, whatever is there: no clustering at all
    none      nothing: --alpha 0, DINO's loss of the whole views

The last line is a JSON object: the probe at the first and the last step, and the clusters that an
image has in both views.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import croc
import harness
import torch
from torch import Tensor
from torch.nn.functional import one_hot
import densekit as dk

SIDE = 64  # of a scene, in pixels
REGIONS = 10  # of a scene: two grounds and eight slots of objects
SQUARES = 3  # along each side of the image


def true_regions(count: int) -> Tensor:
    """The visible region at each pixel of the demo's scenes, (count, 64, 64).

    They are drawn as `harness.SceneImages` draws them.
    """
    regions = []
    for number, start in enumerate(range(0, count, 64)):
        part = min(64, count - start)
        drawn = dk.sample_scenes(part, (SIDE, SIDE), generator=harness.generator(0, number))
        # Of the two grounds, the one of the lower class is 0 and the other one 1.
        lowest = drawn.labels.where(drawn.instances == 0, 99).flatten(1).amin(1)
        ground = (drawn.labels != lowest[:, None, None]).long()
        regions.append(ground.where(drawn.instances == 0, drawn.instances + 1).to(torch.uint8))
    return torch.cat(regions)


class Control:
    """Takes the place of `CrOC.find_clusters`, with the clusters of the scenes' own content."""

    def __init__(self, kind: str, regions: Tensor):
        self.kind = kind
        self.regions = regions
        self.indices = torch.zeros(0, dtype=torch.long)  # of the images of the step

    def note_images(self, seed: int, step: int, indices: Tensor) -> Tensor:
        self.indices = indices.cpu()
        return image_seeds(seed, step, indices)

    def find_clusters(
        self,
        model: croc.CrOC,
        tokens: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        views: list[dk.View],
        seeds: Tensor,
    ) -> tuple[Tensor, dk.PrunedClusters]:
        side = croc.grid_side(tokens)
        places = torch.cat([dk.coordinate_map(x, (side, side)).flatten(1, 2) for x in views], 1)
        places = places.clamp(0, SIDE - 1e-3)  # in pixels of the scene
        if self.kind == "truth":
            pixels = places.long()
            image = torch.arange(len(pixels))[:, None]
            labels = self.regions[self.indices][image, pixels[..., 1], pixels[..., 0]].long()
            clusters = REGIONS
        else:
            squares = (places * SQUARES / SIDE).long()
            labels = squares[..., 1] * SQUARES + squares[..., 0]
            clusters = SQUARES**2
        # One head; each token belongs to one cluster alone.
        assignments = one_hot(labels, clusters).to(tokens.dtype)[:, None]
        parts = dk.split_assignments(assignments, normalize=model.config.normalize)
        counts = (assignments.sum(-2) > 0).sum(-1)
        return counts, dk.prune_clusters(parts)


image_seeds = harness.image_seeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clusters", choices=["found", "truth", "places", "none"], default="found")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    told, of_the_demo = parser.parse_known_args()
    sys.argv[1:] = of_the_demo
    config = replace(croc.read_options(), run=told.run, seed=told.seed)
    if config.data is not None:
        parser.error(
            f"--data is {config.data}: leave it out, since scenes alone have true regions."
        )
    if told.clusters == "none":
        config = replace(config, alpha=0.0)
    elif told.clusters != "found":
        control = Control(told.clusters, true_regions(4096))
        harness.image_seeds = control.note_images
        croc.CrOC.find_clusters = lambda model, *given: control.find_clusters(model, *given)
    croc.train(config)

    rows = [json.loads(line) for line in (told.run / "metrics.jsonl").read_text().splitlines()]
    probes = [row["probe_miou"] for row in rows if "probe_miou" in row]
    valid = [row["valid"] for row in rows if "valid" in row]
    found = {
        "clusters": told.clusters, "seed": told.seed, "steps": rows[-1]["step"],
        "probe": [round(probes[0], 4), round(probes[-1], 4)],
        "valid": round(sum(valid) / len(valid), 2) if valid else None,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
