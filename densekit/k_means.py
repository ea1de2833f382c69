"""k-means: start centroids, Lloyd's iteration, batches of a large set, the nearest centroid.

Half precision is converted to float32, also under autocast. No gradient flows. Points that are not
finite are left out. The nearest centroid of a point depends on this point and the centroids alone:
far points, and centroids that no point uses, change no other label, whatever numbers they hold.

The points are processed in blocks of at most 2^22 numbers (or of one point), so their distances to
the centroids are never in memory together.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from densekit.clustering import sample_tokens
from densekit.distributed import Group, all_gather, all_sum
from densekit.numerics import block_rows, check, full_precision, readable, take_rows, widened
from densekit.typing import Bool, Float, Integer, Tensor, typed

__all__ = ["KMeans", "kmeans", "kmeans_plus_plus", "minibatch_kmeans", "nearest_centroids"]

_STARTS = 4  # number of short runs at the start
_FEW = 32  # their points for each cluster


class KMeans(NamedTuple):
    """Result of `kmeans`.

    Attributes:
        centroids: Means of the clusters.
        labels: The nearest centroid of each point; -1 where the point is not valid or not finite.
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
        valid: Points to choose from; by default all. A point that is not finite is not chosen.
            Without any point to choose the centroids are zero.
        generator: Source of the random numbers, on the points' device.

    Returns:
        The chosen points, in at least float32; no gradient flows.

    Raises:
        ValueError: `count` is negative, or there is no point to choose.

    Examples:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
        >>> kmeans_plus_plus(points, 2).sort(0).values
        tensor([[0., 0.],
                [5., 5.]])

    References:
        Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, Sec 2.2.
    """
    n = points.shape[-2]
    check("k_means.kmeans_plus_plus", "count", count, count >= 0, "0 or more")
    check("k_means.kmeans_plus_plus", "the number of points", n, n > 0 or count == 0, "1 or more")

    x = widened(points.detach())
    usable = x.isfinite().all(-1)
    usable = usable if valid is None else usable & valid
    chosen = [x[..., :0, :]]
    weight = usable.to(x)
    for number in range(count):
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, usable.to(x))
        drawn = sample_tokens(weight, 1, generator=generator)
        chosen.append(torch.where(usable.gather(-1, drawn)[..., None], take_rows(x, drawn), 0.0))
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
        valid: Points to use; by default all. A point that is not finite is not used.
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
    k = start.shape[-2]
    check("k_means.kmeans", "the number of centroids", k, k >= 1, "1 or more")
    check("k_means.kmeans", "iterations", iterations, iterations >= 0, "0 or more")

    dtype = torch.promote_types(torch.promote_types(points.dtype, start.dtype), torch.float32)
    x = points.detach()  # in its own dtype: a wider copy of a large set may not fit the memory
    centers = start.detach().to(dtype)
    origin = _middle(centers)
    moves = iterations if x.shape[-2] else 0
    for _ in range(moves):
        labels, count, total = _assign(x, centers, origin, valid)
        means = origin + total / count.clamp(min=1)[..., None]
        empty = count[..., None] == 0
        if not readable(x, centers, empty) or empty.any():
            means = torch.where(empty, _restarts(x, centers, labels, empty), means)
        centers = means

    labels, _, _ = _assign(x, centers, origin, valid)
    return KMeans(centers, labels, _squares(x, centers, labels).sum(-1))


def _restarts(x: Tensor, centers: Tensor, labels: Tensor, empty: Tensor) -> Tensor:
    """Return new places for the empty clusters: the points that are farthest from their centers.

    The old place stays where no point is left that is away from its center.
    """
    spare = min(x.shape[-2], centers.shape[-2])
    square = torch.where(labels >= 0, _squares(x, centers, labels), -1.0)
    far = square.topk(spare)
    rank = (empty.cumsum(-2) - 1).clamp(0, spare - 1)[..., 0]
    restart = take_rows(x, far.indices.gather(-1, rank)).to(centers)
    return torch.where(far.values.gather(-1, rank)[..., None] > 0, restart, centers)


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
    of random points from its own points, and the sums are shared. Besides the points, a few copies
    of the sample (`sample * clusters * d` numbers) are in memory, and four of the parts of it that
    the short runs take.

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
    for name, number in {"clusters": clusters, "batch": batch, "sample": sample}.items():
        check("k_means.minibatch_kmeans", name, number, number >= 1, "1 or more")
    for name, number in {"steps": steps, "iterations": iterations}.items():
        check("k_means.minibatch_kmeans", name, number, number >= 0, "0 or more")

    if group is not None and generator is None:
        raise ValueError(
            "densekit.k_means.minibatch_kmeans: a group needs a generator; give one, in the same "
            "state on all processes, so that all start from the same centroids."
        )

    device = points.device
    seed = torch.randint(2**31, (), generator=generator, device=device)  # the same on all processes
    if group is not None:  # what follows draws as many numbers as a process has points
        generator = torch.Generator(device).manual_seed(int(seed))
    share = -(-sample * clusters // (1 if group is None else dist.get_world_size(group)))
    own = points[torch.randperm(len(points), generator=generator, device=device)[:share]]
    known = all_gather(widened(own.detach()), group, ragged=True)
    if not len(known):  # the same on all processes: none waits for another
        raise ValueError("densekit.k_means.minibatch_kmeans: there is no point; give one or more.")

    start = _best_start(known, clusters, iterations, int(seed))
    centers, labels, _ = kmeans(known, start, iterations=iterations)
    used = labels >= 0
    mass = torch.zeros(clusters, dtype=torch.long, device=device)
    mass = mass.scatter_add(0, torch.where(used, labels, 0), used.long())
    count = batch if len(points) else 0
    for _ in range(steps):
        rows = torch.randint(max(1, len(points)), (count,), generator=generator, device=device)
        centers, mass = _moved(widened(points[rows].detach()), centers, mass, group)
    return centers


def _moved(x: Tensor, centers: Tensor, mass: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Move centers to the mean of the `mass` points that they had and those of a batch."""
    origin = _middle(centers)
    _, count, total = _assign(x, centers, origin)
    added = all_sum(torch.cat([count.to(x)[:, None], total], 1), group)  # in one message
    mass = mass + added[:, 0].round().long()
    shift = added[:, 1:] - added[:, :1] * (centers - origin)
    return centers + shift / mass.clamp(min=1)[:, None], mass


def _best_start(points: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Return the best result of several short runs, since one start may miss a cluster.

    The runs are cheap: they take every n-th point, which is a part of each process's points.
    """
    every = max(1, len(points) // (_FEW * clusters))
    some = points[::every].expand(_STARTS, -1, -1)
    draws = torch.Generator(points.device).manual_seed(seed)
    start = kmeans_plus_plus(some, clusters, generator=draws)
    tried = kmeans(some, start, iterations=iterations)
    return tried.centroids[tried.inertia.argmin()]


@typed
def nearest_centroids(
    points: Float[Tensor, "*batch n d"], centroids: Float[Tensor, "*batch k d"]
) -> Integer[Tensor, "*batch n"]:
    """Find the nearest centroid of each point, by Euclidean distance.

    Args:
        points: n points.
        centroids: k centroids (`minibatch_kmeans`, `kmeans`).

    Returns:
        Index of the nearest centroid; the first one if several are equally near. It is -1 where the
        point is not finite. A centroid that is not finite is never the nearest.

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

    x = points.detach()
    centers = widened(centroids.detach())
    find = _nearest(widened(x[..., :0, :]), centers, _middle(centers))
    return torch.cat([find(widened(part)) for part in _blocks(x, centers)], -1)


def _blocks(x: Tensor, centers: Tensor) -> tuple[Tensor, ...]:
    """Split points, so that they and their products with the centers fit in a block."""
    return x.split(block_rows(math.prod(x.shape[:-2]) * max(centers.shape[-2:])), -2)


def _middle(centers: Tensor) -> Tensor:
    """Return the median of the finite centers: far ones do not move it."""
    finite = centers.isfinite().all(-1)
    ranked = torch.where(finite[..., None], centers, torch.inf).sort(-2).values
    half = (finite.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    return torch.where(finite.any(-1)[..., None, None], take_rows(ranked, half), 0.0)


def _assign(
    x: Tensor, centers: Tensor, origin: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign points to the nearest centers, -1 where one is not valid or not finite.

    Returns:
        The labels, and for each center the number of its points and their sum about the origin.
    """
    find = _nearest(x[..., :0, :].to(centers), centers, origin)
    index = torch.arange(centers.shape[-2], device=x.device)[:, None]
    labels = []
    count = centers.new_zeros(centers.shape[:-1], dtype=torch.long)
    total = torch.zeros_like(centers)
    first = 0
    for block in _blocks(x, centers):
        part = block.to(centers)
        label = find(part)
        if valid is not None:
            label = torch.where(valid[..., first : first + part.shape[-2]], label, -1)
        used = label >= 0
        offset = part - origin
        if not readable(part, used) or not used.all():
            offset = torch.where(used[..., None], offset, 0.0)
        own = label[..., None, :] == index
        with full_precision(x):
            total = total + own.to(part) @ offset
        count = count + own.sum(-1)
        labels.append(label)
        first += part.shape[-2]

    return torch.cat(labels, -1), count, total


def _squares(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Return the squared distance of each point to its center; 0 without one."""
    squares = []
    first = 0
    for part in _blocks(x, centers):
        label = labels[..., first : first + part.shape[-2]]
        square = (part - take_rows(centers, label.clamp(min=0))).square().sum(-1)
        squares.append(torch.where(label >= 0, square, 0.0))
        first += part.shape[-2]
    return torch.cat(squares, -1)


def _nearest(x: Tensor, centers: Tensor, origin: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that finds the nearest center of points like x; -1 if one is not finite.

    It compares squared distances as `x c - c c / 2`, which is quick but cancels digits, and no
    origin is near all points and all centers. Points in float32 are therefore compared in float64,
    which holds their products, and points in float64 by their differences. Both take longer, so
    where Python may read values, only those points take them whose nearest center is uncertain
    after rounding.
    """
    dtype = torch.promote_types(x.dtype, centers.dtype)
    finite = centers.isfinite().all(-1)
    centers = torch.where(finite[..., None], centers, 0.0).to(dtype)
    exact = _exact_search(centers, finite)
    if not readable(x, centers) or torch.get_float32_matmul_precision() != "highest":
        return exact
    return _quick_search(centers, finite, origin.double(), exact)


def _exact_search(centers: Tensor, finite: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the search that takes longer, in float64."""
    wide = centers.double()
    half_square = torch.where(finite, wide.square().sum(-1) / 2, torch.inf)
    some = finite.any(-1, keepdim=True)

    def exact(x: Tensor) -> Tensor:
        usable = x.isfinite().all(-1)
        x = torch.where(usable[..., None], x, 0.0).double()
        if centers.dtype == torch.float64:
            distance = torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")
            labels = torch.where(finite[..., None, :], distance, torch.inf).argmin(-1)
        else:
            with full_precision(x):
                labels = _first_best((wide @ x.mT).sub_(half_square[..., None]))[1]
        return torch.where(usable & some, labels, -1)

    return exact


def _quick_search(
    centers: Tensor, finite: Tensor, origin: Tensor, exact: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return the search that asks `exact` only about points whose nearest center is uncertain.

    The number that is compared is off by at most `slope |x| + fixed` for a point x.
    """
    dtype = centers.dtype
    # Products of offsets round less than those of points far from zero.
    table = torch.where(finite[..., None], centers.double() - origin, 0.0).to(dtype)
    rounded = table.double()
    length = rounded.norm(dim=-1)
    far = origin.norm(dim=-1)

    # A product of n numbers is off by n roundings at most; one rounding is half of eps.
    accuracy = torch.finfo(dtype)
    width = centers.shape[-1]
    wide_slope = (width + 8) * accuracy.eps * length
    wide_fixed = wide_slope * (length + far) + width * accuracy.tiny
    middle = rounded.square().sum(-1) / 2 + (rounded * origin).sum(-1)
    shift = torch.where(finite, wide_fixed - middle, -torch.inf).to(dtype)[..., None]
    slope = wide_slope.to(dtype)
    fixed = wide_fixed.to(dtype)

    def certain(x: Tensor) -> Tensor:
        x = x.to(dtype)
        norm = torch.linalg.vector_norm(x, dim=-1)
        with full_precision(x):
            upper = (table @ x.mT).add_(shift)
        upper.addcmul_(norm[..., None, :], slope[..., None])
        best, labels = _first_best(upper)
        error = norm * slope.gather(-1, labels) + fixed.gather(-1, labels)
        second = upper.scatter_(-2, labels[..., None, :], -torch.inf).amax(-2)
        unsure = ~(best - 2 * error > second)  # true for NaN
        rows = unsure.reshape(math.prod(x.shape[:-2]), x.shape[-2]).any(0).nonzero()[:, 0]
        if not len(rows):
            return labels
        return labels.index_copy(-1, rows, exact(x.index_select(-2, rows)))

    return certain


def _first_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest number along the first axis of a matrix, and where it is first.

    On a CPU this is several times faster than `max`, and than any reduction of the last axis. Where
    there is NaN, the index is any.
    """
    best = scores.amax(-2)
    index = torch.arange(scores.shape[-2], dtype=torch.int32, device=scores.device)[:, None]
    first = torch.where(scores >= best[..., None, :], index, len(index)).amin(-2)
    return best, first.clamp(max=len(index) - 1).long()
