"""The demos' networks trained with the labels of the scenes: what their probe could reach.

    python benchmarks/scene_labels.py --arch tiny --run FOLDER       # the demos' ResNet
    python benchmarks/scene_labels.py --arch tiny-vit --run FOLDER   # CrOC's ViT

It is no method, but the other end of the scale: the random network of a demo is the floor. The
network learns the classes of 4,096 scenes by a linear layer and cross-entropy, and is then probed
as the demos are. The run folder gets a metrics.jsonl with the probe.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import torch
from downstream import encoders
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
import densekit as dk

SCENES = 4096
SIDE = 64  # of a scene, in pixels
BATCH = 40
STEPS = 600
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.01


def feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """The last map of either network, (b, d, 8, 8), of images in [0, 1]."""
    normalized = (images - 0.5) / 0.25
    if encoders.is_vit(encoder):
        tokens = encoder.forward_features(normalized)[:, encoder.num_prefix_tokens :]
        return dk.rows_to_map(tokens, encoder.patch_embed.grid_size)
    return encoders.last_map(encoder, normalized)


def train(arch: str, seed: int, steps: int, scenes: int) -> list[dict]:
    """Train with labels; the probe before and after it."""
    torch.manual_seed(seed)
    drawn = dk.sample_scenes(scenes, (SIDE, SIDE))
    encoder = encoders.build(arch)
    head = nn.Conv2d(encoder.num_features, len(dk.SCENE_CLASSES), 1)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)

    def probe(step: int) -> dict:
        encoder.eval()
        with torch.no_grad():
            score = dk.probe_scenes(lambda images: feature_map(encoder, images))
        encoder.train()
        return {"step": step, "probe_miou": score.miou.item()}

    rows = [probe(0)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = dk.warmup_cosine(
            step, steps, peak=LEARNING_RATE, warmup=steps // 4, end=0.0
        )
        indices = torch.randint(scenes, (BATCH,))
        scores = head(feature_map(encoder, drawn.images[indices]))
        scores = interpolate(scores, (SIDE, SIDE), mode="bilinear")
        loss = cross_entropy(scores, drawn.labels[indices].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*rows, probe(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=["tiny", "tiny-vit"], default="tiny")
    parser.add_argument("--run", type=Path, required=True, help="folder for metrics.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    rows = train(arguments.arch, arguments.seed, STEPS, SCENES)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (arguments.run / "metrics.jsonl").write_text(lines)
    print(lines, end="")


if __name__ == "__main__":
    main()
