"""k-means: start centroids, Lloyd's iteration, batches of a large set, the nearest centroid.

Half precision is converted to float32, also under autocast. No gradient flows.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from densekit.clustering import sample_tokens
from densekit.distributed import Group, all_gather, all_sum
from densekit.numerics import full_precision, safe_divide, take_rows, widened
from densekit.typing import Bool, Float, Integer, Tensor, typed

__all__ = ["KMeans", "kmeans", "kmeans_plus_plus", "minibatch_kmeans", "nearest_centroids"]

_STARTS, _FEW = 4, 32  # number of short runs at the start, and their points for each cluster


class KMeans(NamedTuple):
    """Result of `kmeans`.

    Attributes:
        centroids: Means of the clusters.
        labels: The nearest centroid of each point; -1 where the point is not valid.
        inertia: Sum of the squared distances of the valid points to their centroids.
    """

    centroids: Float[Tensor, "*batch k d"]
    labels: Integer[Tensor, "*batch n"]
    inertia: Float[Tensor, "*batch"]


@typed
def kmeans_plus_plus(
    points: Float[Tensor, "*batch n d"],
    count: int,
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch count d"]:
    """Choose start centroids for k-means: random points that lie far from those chosen before.

    The first centroid is a uniformly random point. Each further one is a random point whose
    probability is proportional to its squared distance to the nearest centroid chosen so far.

    Args:
        points: n points.
        count: Number of centroids; points are repeated if there are fewer different ones.
        valid: Points to choose from; by default all. Without any valid point the centroids are
            zero.
        generator: Source of the random numbers, on the points' device.

    Returns:
        The chosen points, in at least float32; no gradient flows.

    Raises:
        ValueError: `count` is negative, or there is no point to choose.

    Examples:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
        >>> kmeans_plus_plus(points, 2).sum()
        tensor(10.)

    References:
        Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, Sec 2.2.
    """
    if count < 0 or (count and not points.shape[-2]):
        raise ValueError(
            f"densekit.k_means.kmeans_plus_plus: count is {count} and there are "
            f"{points.shape[-2]} points; give a count of 0 or more, and one or more points."
        )
    x = widened(points.detach())
    usable = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
    x = torch.where(usable[..., None], x, 0.0)
    chosen, weight = [x[..., :0, :]], usable.to(x)
    for number in range(count):
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, usable.to(x))
        chosen.append(take_rows(x, sample_tokens(weight, 1, generator=generator)))
        square = torch.where(usable, (x - chosen[-1]).square().sum(-1), 0.0)
        weight = torch.minimum(weight, square) if number else square
    return torch.cat(chosen, -2)


@typed
def kmeans(
    points: Float[Tensor, "*batch n d"],
    start: Float[Tensor, "*batch k d"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    iterations: int = 20,
) -> KMeans:
    """Run Lloyd's k-means: assign points to the nearest centroid, then move centroids to the means.

    A cluster that loses all its points starts again at the point that is farthest from its
    centroid; several such clusters start again at the next farthest points.

    Args:
        points: n points.
        start: Start centroids ([`kmeans_plus_plus`][densekit.k_means.kmeans_plus_plus]).
        valid: Points to use; by default all.
        iterations: Number of times that the centroids move; a few dozen are enough in practice.

    Returns:
        Centroids, labels and inertia, in at least float32; no gradient flows.

    Raises:
        ValueError: There is no centroid, or `iterations` is negative.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> kmeans(points, torch.tensor([[0.0], [1.0]])).centroids.T
        tensor([[0.5000, 9.5000]])

    References:
        Lloyd, Least squares quantization in PCM; CrOC, Sec 4.2 (unsupervised segmentation).
    """
    if not start.shape[-2] or iterations < 0:
        raise ValueError(
            f"densekit.k_means.kmeans: there are {start.shape[-2]} centroids and iterations is "
            f"{iterations}; give one or more centroids, and 0 or more iterations."
        )
    x, centers = widened(points.detach()), widened(start.detach())
    usable = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
    x = torch.where(usable[..., None], x, 0.0)
    # Distances are computed as differences of squares, which are precise near the origin only.
    mean = (safe_divide(x.sum(-2), usable.sum(-1, keepdim=True).to(x)))[..., None, :]
    x, centers = torch.where(usable[..., None], x - mean, 0.0), centers - mean
    spare = min(x.shape[-2], centers.shape[-2])
    with full_precision(x):
        for _ in range(iterations if spare else 0):
            square, labels = _nearest(x, centers)
            own = (labels[..., None] == torch.arange(centers.shape[-2], device=x.device)).to(x)
            own = torch.where(usable[..., None], own, 0.0)
            count = own.sum(-2)[..., None]
            far = torch.where(usable, square, -1.0).topk(spare)
            rank = ((count == 0).cumsum(-2) - 1).clamp(0, spare - 1)[..., 0]
            restart = take_rows(x, far.indices.gather(-1, rank))
            restart = torch.where(far.values.gather(-1, rank)[..., None] > 0, restart, centers)
            centers = torch.where(count > 0, safe_divide(own.mT @ x, count), restart)
        square, labels = _nearest(x, centers)
    inertia = torch.where(usable, square, 0.0).sum(-1)
    return KMeans(centers + mean, torch.where(usable, labels, -1), inertia)


@typed
def minibatch_kmeans(
    points: Float[Tensor, "n d"],
    clusters: int,
    *,
    steps: int = 10,
    batch: int = 4096,
    sample: int = 256,
    iterations: int = 10,
    group: Group = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "clusters d"]:
    """Compute centroids of a large set: k-means on a sample, then steps on random batches.

    `kmeans` on `sample * clusters` points gives the start. This run starts from the best of four
    short runs on fewer of these points, each of which starts from `kmeans_plus_plus`. In each step,
    every centroid moves to the mean of all points that were assigned to it so far, including those
    of the sample, so the steps become smaller. With several processes, each takes the same number
    of random points from its own points, and the sums are shared.

    Args:
        points: n points, such as the cells of all feature maps; points that are not finite are
            ignored.
        clusters: Number of centroids.
        steps: Number of batches after the sample; with 0 it is k-means on the sample alone.
        batch: Number of points in a batch, for each process.
        sample: Number of points of the sample for each cluster, over all processes; all points if
            there are fewer.
        iterations: Number of iterations of `kmeans` on the sample.
        group: Processes that share the points; None means this process alone.
        generator: Source of the random numbers, on the points' device. With several processes it is
            required, in the same state on each.

    Returns:
        The centroids, in at least float32, the same on all processes.

    Raises:
        ValueError: There is no point or cluster, a count is negative, or a generator is missing.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [9.0], [10.0]]).repeat(100, 1)
        >>> minibatch_kmeans(points, 2, steps=0).sort(0).values.T
        tensor([[0.5000, 9.5000]])

    References:
        Sculley 2010, Web-scale k-means clustering; CrOC, Sec 4.2 (unsupervised segmentation).
    """
    if min(clusters, batch, sample) < 1 or min(steps, iterations) < 0:
        raise ValueError(
            f"densekit.k_means.minibatch_kmeans: clusters is {clusters}, batch {batch}, sample "
            f"{sample}, steps {steps} and iterations {iterations}; give 1 or more for the first "
            "three, and 0 or more for steps and iterations."
        )
    if group is not None and generator is None:
        raise ValueError(
            "densekit.k_means.minibatch_kmeans: a group needs a generator; give one, in the same "
            "state on all processes, so that all start from the same centroids."
        )

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = widened(points[rows].detach())
        usable = x.sum(-1).isfinite()
        return x if usable.all() else torch.where(usable[:, None], x, 0.0), usable

    device = points.device
    seed = torch.randint(2**31, (), generator=generator, device=device)  # the same on all processes
    share = -(-sample * clusters // (1 if group is None else dist.get_world_size(group)))
    own = take(torch.randperm(len(points), generator=generator, device=device)[:share])
    known, usable = (all_gather(x, group, ragged=True) for x in own)
    if not len(known):  # the same on all processes: none waits for another
        raise ValueError("densekit.k_means.minibatch_kmeans: there is no point; give one or more.")
    # One start may miss a cluster. Several starts are cheap on a part of each process's points.
    few = slice(None, None, max(1, len(known) // (_FEW * clusters)))
    some, good = (x[few].expand(_STARTS, *x[few].shape) for x in (known, usable))
    draws = torch.Generator(device).manual_seed(int(seed))
    start = kmeans_plus_plus(some, clusters, good, generator=draws)
    tried = kmeans(some, start, good, iterations=iterations)
    best = tried.centroids[tried.inertia.argmin()]
    centers, labels, _ = kmeans(known, best, usable, iterations=iterations)
    mass = torch.nn.functional.one_hot(labels + 1, clusters + 1)[:, 1:].sum(0).to(centers)
    for _ in range(steps):
        count = batch if len(points) else 0
        rows = torch.randint(max(1, len(points)), (count,), generator=generator, device=device)
        x, usable = take(rows)
        each = torch.nn.functional.one_hot(nearest_centroids(x, centers), clusters).to(x)
        each = each * usable[:, None]
        with full_precision(x):
            added = all_sum(torch.cat([each.sum(0)[:, None], each.mT @ x], 1), group)
        mass = mass + added[:, 0]
        centers = centers + (added[:, 1:] - added[:, :1] * centers) / mass.clamp(min=1)[:, None]
    return centers


@typed
def nearest_centroids(
    points: Float[Tensor, "*batch n d"], centroids: Float[Tensor, "*batch k d"]
) -> Integer[Tensor, "*batch n"]:
    """Find the nearest centroid of each point, by Euclidean distance.

    Args:
        points: n points.
        centroids: k centroids (`minibatch_kmeans`, `kmeans`).

    Returns:
        Index of the nearest centroid; the first one if several are equally near.

    Raises:
        TypeError: The shapes do not match.
        ValueError: There is no centroid.

    Examples:
        >>> nearest_centroids(torch.tensor([[0.2], [0.9]]), torch.tensor([[1.0], [0.0]]))
        tensor([1, 0])

    References:
        Lloyd, Least squares quantization in PCM.
    """
    if not centroids.shape[-2]:
        raise ValueError("densekit.k_means.nearest_centroids: give one or more centroids.")
    x, centers = widened(points.detach()), widened(centroids.detach())
    # This is ||x - c||^2 up to ||x||^2, with the mean m of the centroids as the origin. Differences
    # of squares are precise near the origin only, and in this form the points need no copy.
    mean = centers.mean(-2, keepdim=True)
    centers = centers - mean
    bias = centers.square().sum(-1) / 2 + (centers * mean).sum(-1)
    with full_precision(x):
        return (x @ centers.mT.to(x)).sub_(bias[..., None, :].to(x)).argmax(-1)


def _nearest(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return each point's squared distance to its nearest center, and the center's index."""
    if not x.shape[-2]:
        return x.sum(-1), x.sum(-1).long()
    square = centers.square().sum(-1)[..., None, :] - 2 * (x @ centers.mT)
    least, labels = square.min(-1)
    return (least + x.square().sum(-1)).clamp(min=0), labels
