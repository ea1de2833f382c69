"""The health of an encoder: scores that need no labels, for the log of a run and for evaluate.py.

This module is no command. A `Monitor` measures a network in training: most scores for each row of
the log, and the dense structure score, which takes longer, with each checkpoint. All are of the
same few images. `health` is the protocol of evaluate.py.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.transforms import v2 as transforms
import densekit as dk
from downstream import encoders

TOKENS = 2048  # at most, of all images together
IMAGES = 8  # that the tokens come from at least, where there are as many
RANK_TOKENS = 256  # of them at most, for the rank in the log: more would take too long
COLLAPSE = 0.5  # the features collapse where a rank or a spread falls below this share
SCORES = (
    "effective_rank",
    "off_diagonal_cosine",
    "position_share",
    "norm_outliers",
    "dense_structure",
)


# ---- maps ----------------------------------------------------------------------------------------
class Maps(NamedTuple):
    """The last maps of images, (b, d, h, w)."""

    last: Tensor
    before_norm: Tensor  # the same before the final norm of a ViT; the last maps of other networks


def encode(network: Any, images: Tensor) -> Maps:
    """The maps that a network of timm gives of normalized images, or an `Encoder` of plain ones."""
    if isinstance(network, encoders.Encoder):
        if network.by_timm:
            normalize = transforms.Normalize(network.mean, network.std)
            return encode(network.network, normalize(images))
        last = network(images)
        return Maps(last, last)
    if not encoders.is_vit(network):
        last = encoders.last_map(network, images)
        return Maps(last, last)
    (before,) = network.forward_intermediates(
        images, indices=1, norm=False, intermediates_only=True
    )
    size = (before.shape[-2], before.shape[-1])
    last = dk.rows_to_map(network.norm(dk.map_to_rows(before)), size)
    return Maps(last, before)


def thin(maps: Tensor) -> Tensor:
    """The maps (b, d, h, w) with so few cells that eight images have at most 2,048 together.

    Of larger maps every second cell along each side is taken, or every third, and so on.
    """
    stride = 1
    while math.prod(maps[0, 0, ::stride, ::stride].shape) > TOKENS // IMAGES:
        stride += 1
    return maps[..., ::stride, ::stride]


def keep_tokens(maps: Tensor) -> Tensor:
    """The thinned maps of the first images, with at most 2,048 tokens together."""
    thinned = thin(maps)
    cells = math.prod(thinned.shape[-2:])
    return thinned[: TOKENS // cells].float()


# ---- scores --------------------------------------------------------------------------------------
def measure(maps: Maps, rank_tokens: int = TOKENS) -> dict[str, Tensor]:
    """The scores of at most 2,048 tokens; the rank of `rank_tokens` of them, evenly spaced.

    Features that are not finite have none: the loss will be the next to tell.
    """
    last = keep_tokens(maps.last)
    rows = dk.map_to_rows(last).flatten(0, 1)
    if not rows.isfinite().all():
        return {}
    count = min(rank_tokens, len(rows))
    chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
    return {
        "effective_rank": dk.effective_rank(rows[chosen]),
        "off_diagonal_cosine": dk.off_diagonal_cosine(rows),
        "position_share": dk.position_share(last),
        "norm_outliers": dk.norm_outliers(keep_tokens(maps.before_norm)),
    }


def measure_structure(maps: Maps, seeds: int = 1) -> dict[str, Tensor]:
    """The dense structure score of at most 2,048 tokens, the mean over the seeds of k-means."""
    last = keep_tokens(maps.last).cpu()  # it takes many small operations
    scores = []
    for seed in range(seeds):
        draws = harness.generator(5, seed)
        scores.append(dk.dense_structure_score(last, generator=draws).score)
    return {"dense_structure": torch.stack(scores).mean()}


def find_collapse(now: dict[str, Any], known: dict[str, Any], share: float = COLLAPSE) -> str:
    """What has collapsed against known scores, as a part of a sentence; "" where nothing has.

    The rank or the spread, which is 1 minus the mean cosine, is below this share of the known one.
    """
    rank = float(now["effective_rank"])
    known_rank = float(known["effective_rank"])
    if rank < share * known_rank:
        return f"their effective rank is {rank:.1f}, and was {known_rank:.1f}"
    spread = 1 - float(now["off_diagonal_cosine"])
    known_spread = 1 - float(known["off_diagonal_cosine"])
    if spread < share * known_spread:
        return f"1 - their mean cosine is {spread:.2g}, and was {known_spread:.2g}"
    return ""


def best_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The highest rank and the widest spread of some rows of scores."""
    return {
        "effective_rank": max(row["effective_rank"] for row in rows),
        "off_diagonal_cosine": min(row["off_diagonal_cosine"] for row in rows),
    }


# ---- in training ---------------------------------------------------------------------------------
class Monitor:
    """The health of a network in training, on the same images each time.

    The main process measures; on the others `measure` and `measure_all` give nothing. Nothing is
    drawn, and the network is left as it was.

    Args:
        network: What `encode` takes.
        images: What it takes, of the main process, in one or several tensors.
        run: The run, which has been resumed: its log holds the scores so far.
        share: The features collapse where their rank, or their spread, is below this share of the
            best one so far.
        against_start: Compare with the start instead of the best one so far. Trained weights are a
            good start, while the features of a random network are all alike.
    """

    def __init__(
        self,
        network: Any,
        images: Iterable[Tensor],
        run: harness.Run,
        share: float = COLLAPSE,
        *,
        against_start: bool = False,
    ):
        self.network = network
        self.images = torch.cat(list(images))
        self.run = run
        self.share = share
        self.collapse = ""  # what had collapsed when it was last measured
        self.has_warned = False
        self.against_start = against_start
        self.known: list[dict[str, Any]] = []  # the scores to compare with
        if run.world.is_main:
            for row in run.rows("effective_rank", "off_diagonal_cosine"):
                self.note(row)

    @torch.no_grad()
    def encode(self) -> Maps:
        """The maps in evaluation mode."""
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        maps = encode(self.network, self.images)
        for module, mode in modes.items():
            module.training = mode
        return maps

    def measure(self) -> dict[str, float]:
        """The scores for a row of the log, and whether the features have collapsed."""
        if not self.run.world.is_main:
            return {}
        return self.score(self.encode())

    def measure_all(self) -> dict[str, float]:
        """The same with the dense structure score, for the start and each checkpoint."""
        if not self.run.world.is_main:
            return {}
        maps = self.encode()
        structure = {name: float(value) for name, value in measure_structure(maps).items()}
        return self.score(maps) | structure

    def score(self, maps: Maps) -> dict[str, float]:
        scores = {name: float(value) for name, value in measure(maps, RANK_TOKENS).items()}
        if scores:
            self.note(scores)
            self.collapse = find_collapse(scores, self.known[0], self.share)
        return scores

    def note(self, scores: dict[str, Any]) -> None:
        """Keep what later scores are compared with."""
        if not self.known:
            self.known = [scores]
        elif not self.against_start:
            self.known = [best_of([*self.known, scores])]

    def warn(self, step: int) -> None:
        """Say once that the features have collapsed."""
        if self.collapse and not self.has_warned:
            self.has_warned = True
            harness.say(f"warning: The features collapse at step {step}: {self.collapse}.")

    def collapse_on_all(self) -> str:
        """What has collapsed, or "", on all processes alike; each of them has to ask."""
        answer = [self.collapse]
        dist.broadcast_object_list(answer, src=0, device=self.run.world.device)
        return answer[0]


# ---- the protocol of evaluate.py -----------------------------------------------------------------
@torch.no_grad()
def health(encoder: encoders.Encoder, batches: Iterable, config: Any, folder: Path) -> dict:
    """Scores of an encoder that need no labels, of at most 2,048 tokens of the first images."""
    device = encoders.device_of(encoder)
    found = []
    tokens = 0
    for batch in batches:
        images = torch.stack([x.image for x in batch]).to(device)
        maps = Maps(*[thin(x).cpu() for x in encode(encoder, images)])
        found.append(maps)
        tokens += maps.last[:, 0].numel()
        if tokens >= TOKENS:
            break

    joined = Maps(*[torch.cat(parts) for parts in zip(*found, strict=True)])
    scores = measure(joined) | measure_structure(joined, seeds=3)
    figures = {name: float(value) for name, value in scores.items()}
    return {**figures, "tokens": keep_tokens(joined.last)[:, 0].numel()}
