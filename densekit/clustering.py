"""Clustering of tokens: Sinkhorn transport, merging of centroids, pruning.

All functions accept leading batch axes and return fixed shapes: unused entries are zero, or marked
by `valid`. Half precision is converted to float32, also under autocast.
"""

import math
from typing import Literal, NamedTuple

import torch
from densekit.distributed import Group, all_max, all_sum
from densekit.numerics import (
    check,
    full_precision,
    in_range,
    l2_normalize,
    readable,
    refuse_maps,
    safe_divide,
    sample_uniform,
    take_rows,
    widened,
)
from densekit.typing import Bool, Float, Integer, Tensor, typed

__all__ = [
    "MergedClusters",
    "PrunedClusters",
    "positional_cost",
    "prune_clusters",
    "sample_tokens",
    "sinkhorn",
    "sinkhorn_merge",
    "split_assignments",
    "swav_codes",
]

_MOST = 8  # iterations of one kernel: marginals of unequal sums let the factors drift apart
_HEAVIEST = 1e15  # a larger weight is the same in any dtype, but might overflow in float32
_SAFE = 30  # scaled by rows and columns, exp(-30) stays in exp(-60) ... exp(60): normal floats


class MergedClusters(NamedTuple):
    """Clusters of `sinkhorn_merge`: k columns, of which the first `clusters` are in use.

    Attributes:
        assignments: The transport plan Q of the chosen step: the mass of each token in each
            cluster; columns that are not in use are zero.
        centroids: Mean of the L2-normalized tokens of each cluster, weighted by the plan; zero
            where not in use.
        clusters: The chosen number of clusters K.
        costs: The cost that is compared, of every step, from the number of start tokens down to 2
            clusters.
        merges: The two columns that were merged after each step except the last. The merged column
            becomes the last one, and the others keep their order.
    """

    assignments: Float[Tensor, "*batch n k"]
    centroids: Float[Tensor, "*batch k d"]
    clusters: Integer[Tensor, "*batch"]
    costs: Float[Tensor, "*batch steps"]
    merges: Integer[Tensor, "*batch merged 2"]


class PrunedClusters(NamedTuple):
    """Hard clusters, reduced to those that have a token in every view.

    Attributes:
        assignments: Weight of each token in its own cluster; zero elsewhere and in pruned clusters.
        labels: The cluster of each token, pruned or not; -1 where the token has no assignment.
        valid: True for clusters with a token in every view.
    """

    assignments: Float[Tensor, "*batch v n k"]
    labels: Integer[Tensor, "*batch v n"]
    valid: Bool[Tensor, "*batch k"]


@typed
def sinkhorn(
    cost: Float[Tensor, "*batch n k"],
    row: Float[Tensor, "*batch n"] | None = None,
    col: Float[Tensor, "*batch k"] | None = None,
    *,
    reg: float,
    iterations: int,
    valid: Bool[Tensor, "*batch n k"] | None = None,
    group: Group = None,
) -> Float[Tensor, "*batch n k"]:
    r"""Compute entropic optimal transport: the cheapest regularized plan with given marginals.

    For SwAV's codes use [`swav_codes`][densekit.clustering.swav_codes], which scales the rows last.

    It minimizes $\langle P, C \rangle - \epsilon H(P)$ over plans $P \ge 0$ with $P 1 = r$ and
    $P^T 1 = c$, where $C$ is the cost, $\epsilon$ is `reg`, and $r$ and $c$ are the masses. It
    scales the rows of $\exp(-C / \epsilon)$ and then its columns, `iterations` times. The columns
    are scaled last, so their sums are exact; the sums of the rows converge. The plan is the same as
    in the log domain, for costs and masses of any range, and takes about the time of plain scaling.

    Args:
        cost: Cost of moving a unit from row n to column k; finite, or inf where forbidden. Adding a
            constant to a row, or to all entries, changes nothing.
        row: Mass of the rows, not negative; by default uniform over the valid rows with sum 1.
        col: Mass of the columns, not negative, with the same sum; by default uniform.
        reg: Strength of the entropy, above 0, in units of the cost (CrOC's `1 / lambda`).
        iterations: Number of times that rows and columns are scaled, at least 1.
        valid: Entries that may have mass; a row or column without any valid entry is ignored. This
            allows problems of several sizes in one tensor.
        group: Processes over which the rows are distributed; None means that this process has all
            rows. `row` is then the part of this process, its uniform default is over the rows of
            all processes, and no gradient flows.

    Returns:
        The plan, in at least float32.

    Raises:
        ValueError: `reg` is not above 0, or `iterations` is below 1.

    Examples:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> sinkhorn(cost, reg=0.5, iterations=5)
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])

    References:
        Cuturi, Sinkhorn Distances, Algorithm 1; CrOC, Eq 11 and 12.
    """
    _check_transport("sinkhorn", reg, iterations)
    if group is not None:  # without gradient no backward pass waits for other processes
        cost = cost.detach()
        row = None if row is None else row.detach()
        col = None if col is None else col.detach()

    cost = widened(cost)
    if not cost.shape[-1] or (group is None and not cost.shape[-2]):
        return cost

    if valid is not None:
        cost = torch.where(valid, cost, torch.inf)
    # Subtracting its lowest cost cancels a shift of a row; without the shift it is more precise.
    low = cost.detach().amin(-1, keepdim=True)
    rows = low < torch.inf
    logits = (torch.where(rows, low, 0.0) - cost).div_(in_range(reg, cost.dtype))
    cols = _highest(logits, -2, group) > -torch.inf

    row = None if row is None else row.to(logits)
    col = None if col is None else col.to(logits)
    scalings = _plain_scalings(logits, rows, cols, row, col, group)
    if row is None:
        equal = rows.to(logits.dtype)
        row_mass = safe_divide(equal, all_sum(equal.sum(-2, keepdim=True), group))
    else:
        row_mass = torch.where(rows, row[..., None], 0.0)
    if col is None:
        equal = cols.to(logits.dtype)
        col_mass = safe_divide(equal, equal.sum(-1, keepdim=True))
    else:
        col_mass = torch.where(cols, col[..., None, :], 0.0)

    with full_precision(logits):
        return _scale(logits, row_mass, col_mass, iterations, scalings, group)


@typed
def swav_codes(
    scores: Float[Tensor, "*batch n k"],
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: Group = None,
) -> Float[Tensor, "*batch n k"]:
    r"""Compute SwAV's codes: soft assignments of n samples that use all k prototypes evenly.

    $$
    Q = \mathrm{diag}(u) \exp(S / \epsilon) \mathrm{diag}(v)
    $$

    of the scores $S$, where each iteration first gives every prototype the same mass over the
    samples, and then every sample the mass 1. So the codes of a sample sum to 1 exactly, and the
    masses of the prototypes converge. `sinkhorn` scales the other side last, and is stopped before
    it converges, so neither result is the other one. The codes are the same as in the log domain:
    scores of any size, and a prototype that no sample is near, are safe.

    Args:
        scores: Similarity of each sample to each prototype, in SwAV the cosine. Minus infinity
            excludes a prototype. A sample whose scores are all minus infinity is left out, so mask
            rows with `scores.masked_fill(~valid[..., None], -torch.inf)`. Adding a constant to all
            scores of a prototype changes nothing.
        epsilon: Smoothness of the codes, above 0, in units of the scores.
        iterations: Number of times that prototypes and samples are scaled, at least 1.
        group: Processes over which the samples are distributed, each with any number of them. The
            codes are those of all samples. None means that this process has all samples.

    Returns:
        The codes, in at least float32; zeros for a sample that is left out. They are targets: no
        gradient flows.

    Raises:
        TypeError: The scores look like maps.
        ValueError: `epsilon` is not above 0, or `iterations` is below 1.

    Examples:
        >>> swav_codes(torch.tensor([[0.2, 0.1], [0.2, 0.0]])).round(decimals=1)
        tensor([[0.3000, 0.7000],
                [0.7000, 0.3000]])

    References:
        SwAV, Eq 3 to 5 (epsilon 0.05, 3 iterations).
    """
    check("clustering.swav_codes", "epsilon", epsilon, epsilon > 0, "a number above 0")
    check("clustering.swav_codes", "iterations", iterations, iterations >= 1, "1 or more")

    refuse_maps("clustering.swav_codes", "scores", scores)

    scores = widened(scores.detach())
    if not scores.shape[-1] or (group is None and not scores.shape[-2]):
        return scores

    # A transport from prototypes to samples, whose side of the samples is scaled last.
    high = _highest(scores.mT, -1, group)
    prototypes = high > -torch.inf
    logits = (scores.mT - _finite(high)).div_(in_range(epsilon, scores.dtype))
    samples = _highest(logits, -2) > -torch.inf
    row_mass = prototypes.to(logits.dtype)
    col_mass = samples.to(logits.dtype)
    scalings = _plain_scalings(logits, prototypes, samples, None, None, group)
    with full_precision(logits):
        plan = _scale(logits, row_mass, col_mass, iterations, scalings, col_group=group)
    return plan.mT


@typed
def positional_cost(
    positions: Float[Tensor, "*batch n 2"], centers: Float[Tensor, "*batch k 2"]
) -> Float[Tensor, "*batch n k"]:
    """Compute the distance of each token to each centroid, divided by the largest distance.

    Args:
        positions: Positions (x, y) of the tokens of both views in one frame, such as pixels of the
            image.
        centers: Positions (x, y) of the centroids, in the same frame.

    Returns:
        Distances in [0, 1], in at least float32; all are 0 if all points coincide.

    Examples:
        >>> positions = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> positional_cost(positions, positions[:1]).T
        tensor([[0.0000, 0.5000, 1.0000]])

    References:
        CrOC, Eq 17.
    """
    point = widened(positions)[..., :, None, :]
    center = widened(centers)[..., None, :, :]
    square = (point[..., 0] - center[..., 0]).square() + (point[..., 1] - center[..., 1]).square()
    if 0 in square.shape[-2:]:
        return square

    # The gradient of a root is infinite at 0, where a start token is its own centroid.
    tiny = torch.finfo(square.dtype).tiny
    distance = square.clamp(min=tiny).sqrt() - tiny**0.5
    return safe_divide(distance, distance.amax((-2, -1), keepdim=True))


@typed
def sample_tokens(
    weights: Float[Tensor, "*batch n"],
    count: int,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "*batch n"] | None = None,
) -> Integer[Tensor, "*batch count"]:
    """Sample tokens without replacement, each in proportion to the weights that remain.

    Args:
        weights: Weight of each token, such as the attention of [CLS]; not negative. A token of
            weight 0 is selected only if no other token remains.
        count: Number of tokens to select.
        generator: Source of the random numbers, on the weights' device.
        noise: Uniform numbers in [0, 1) from which the draw follows; by default they are drawn from
            `generator`.

    Returns:
        Indices of the tokens, all different, in the order of selection.

    Raises:
        TypeError: The shapes do not match.
        ValueError: There are fewer tokens than `count`.

    Examples:
        >>> sample_tokens(torch.tensor([0.0, 0.5, 0.0, 0.5]), 2).sort().values
        tensor([1, 3])

    References:
        CrOC, Sec 3.3 (start tokens by the attention map); Efraimidis and Spirakis, Weighted random
        sampling with a reservoir.
    """
    if not 0 <= count <= weights.shape[-1]:
        raise ValueError(
            f"densekit.clustering.sample_tokens: count is {count}, but there are "
            f"{weights.shape[-1]} tokens; give a count from 0 to this number."
        )

    weights = widened(weights)
    draws = sample_uniform(weights.shape, weights, generator=generator, noise=noise)
    # The token with the largest log w + Gumbel noise is the first sample, the token with the next
    # largest value is a sample of the remaining tokens, and so on.
    gumbel = -(-draws.clamp(min=torch.finfo(draws.dtype).tiny).log()).log()
    return (_log(weights) + gumbel).topk(count).indices


@typed
def sinkhorn_merge(
    tokens: Float[Tensor, "*batch n d"],
    positions: Float[Tensor, "*batch n 2"],
    weights: Float[Tensor, "*batch n"],
    start: Integer[Tensor, "*batch start"],
    *,
    reg: float = 0.05,
    iterations: int = 5,
    position_weight: float = 4.0,
    max_clusters: int | None = None,
    similarity: Literal["cosine", "dot"] = "cosine",
    merge: Literal["average", "mass"] = "average",
    cost_range: Literal["problem", "batch"] = "problem",
    choose_by: Literal["cost", "semantic"] = "cost",
) -> MergedClusters:
    r"""Cluster tokens by transport, merge centroids down to two, and keep the step of lowest cost.

    The start tokens are the first centroids. Each step computes the cost of every token at every
    centroid, $T = -Z C^T + \lambda_{pos} T_{pos}$, scales it to the range [0, 1], transports the
    weights of the tokens to those of the centroids ([`sinkhorn`][densekit.clustering.sinkhorn]),
    moves each centroid to the mean of its tokens, and merges the two most similar centroids. K
    decreases by one in every step, independent of the data, so shapes are static. The result is the
    step whose plan has the lowest cost $\langle Q, T \rangle$; `choose_by` says which cost T that
    is.

    Concatenate both views along n, and give each attention head an entry of `*batch`: one call then
    clusters all of them. The result of a problem does not depend on the others, except with
    `cost_range="batch"`. No gradient flows. On a GPU keep `torch.set_float32_matmul_precision` at
    "highest": with products in TF32 another K is sometimes chosen.

    Args:
        tokens: n tokens; they are L2-normalized here.
        positions: Centers (x, y) of the tokens of both views in the image frame.
        weights: Weights r of the tokens, not negative, such as the attention of [CLS]; they are
            scaled to sum 1 here. A token of weight 0 is ignored, and so is one whose weight is
            negative or not finite.
        start: Indices of two or more start tokens, whose weights are above 0
            ([`sample_tokens`][densekit.clustering.sample_tokens]).
        reg: Strength of the entropy, `1 / lambda`; the cost has range 1.
        iterations: Number of Sinkhorn iterations in every step.
        position_weight: Weight of the positional cost, lambda_pos, 0 or more. Infinity means the
            positional cost alone (Table 4); the tokens then only decide which centroids merge.
        max_clusters: Largest K that may be chosen; by default the number of start tokens. The
            smallest is 2.
        similarity: Similarity of centroids: their "cosine" (the paper), or the "dot" product of the
            means (the authors' program).
        merge: "average" takes the mean of two centroids and of two columns of Y, and the marginal
            of the centroids is `softmax(Y^T r)` (the paper). "mass" weights both by their mass in
            the plan, and the marginal is the mean token weight of each centroid, scaled to sum 1
            (the program).
        cost_range: The range of the cost is that of each "problem" alone, or that of the whole
            "batch" (the program), in which an image's clusters depend on the other images. Under
            `vmap` the batch is what the function sees: one problem.
        choose_by: The cost that the steps are compared by. "cost" is `<Q, T>` with the cost of the
            transport, positions included, whose range is brought to [0, 1] in every step (the
            program). "semantic" is `<Q, -Z C^T>`, without positions and in cosines (Eq 13). The two
            often choose another K.

    Returns:
        Assignments, centroids, K, costs and merges, in at least float32.

    Raises:
        ValueError: There are fewer than two start tokens, `max_clusters` is below 2, `reg` is not
            above 0, `iterations` is below 1, or `position_weight` is negative or NaN.

    Examples:
        >>> tokens = torch.eye(2).repeat_interleave(4, 0)
        >>> where, weights = torch.zeros(8, 2), torch.ones(8)
        >>> found = sinkhorn_merge(tokens, where, weights, torch.tensor([0, 5, 7]))
        >>> found.clusters, found.assignments.argmax(-1)
        (tensor(2), tensor([0, 0, 0, 0, 1, 1, 1, 1]))

    References:
        CrOC, Sec 3.3, Eq 8 to 14, 17 and 18. The paper does not define the range of T.
    """
    _check_transport("sinkhorn_merge", reg, iterations)
    k = start.shape[-1]
    most = k if max_clusters is None else min(k, max_clusters)
    check("clustering.sinkhorn_merge", "the number of start tokens", k, k >= 2, "2 or more")
    check("clustering.sinkhorn_merge", "max_clusters", max_clusters, most >= 2, "2 or more")
    check(
        "clustering.sinkhorn_merge",
        "position_weight",
        position_weight,
        position_weight >= 0,
        "0 or more, or infinity for the positional cost alone",
    )

    tokens = widened(tokens.detach())
    positions = widened(positions.detach())
    weights = weights.detach().to(tokens.dtype)
    weights = torch.where((weights > 0) & (weights < torch.inf), weights, 0.0)
    start = start.long()  # torch 2.6 gathers by int64 alone
    options = (reg, iterations, position_weight, most)
    variants = (
        similarity == "cosine",
        merge == "mass",
        cost_range == "batch",
        choose_by == "semantic",
    )

    with full_precision(tokens):
        return _merge(tokens, positions, weights, start, *options, *variants)


def _merge(
    tokens,
    positions,
    weights,
    start,
    reg,
    iterations,
    position_weight,
    most,
    cosine,
    by_mass,
    batch_range,
    by_semantic,
):
    """Compute `sinkhorn_merge` with costs and plans of shape (k, n): token sums are faster.

    No gradient flows, so what a step has made is changed in place.
    """
    d = tokens.shape[-1]
    k = start.shape[-1]
    row = _distribution(weights)
    # A token without weight becomes a copy of a start token, so the range of the cost ignores it.
    has_weight = row[..., None] > 0
    features = l2_normalize(torch.where(has_weight, tokens, take_rows(tokens, start[..., :1])))
    positions = positions.to(tokens.dtype)
    positions = torch.where(has_weight, positions, take_rows(positions, start[..., :1]))
    # One table contains everything of a cluster: feature, position, token weight.
    places = torch.cat([positions.mT, row[..., None, :]], -2).mT
    tables = (features, places)
    clusters = torch.cat([take_rows(x, start) for x in tables], -1)
    columns = features.mT.contiguous()  # so the product of every step is quicker
    above = torch.ones(k, k, dtype=torch.bool, device=tokens.device).triu(1)

    plans = []
    costs = []
    centers = []
    merges = []
    for left in range(k, 1, -1):
        semantic = -l2_normalize(clusters[..., :d]) @ columns  # Eq 9
        cost = semantic
        if position_weight:  # Eq 18
            cost = _add_distances(semantic, clusters[..., d:-1], places.mT, position_weight)
        every = batch_range and cost.numel() > 0
        axes = tuple(range(cost.ndim)) if every else (-2, -1)
        cost = _unit_range(cost, axes)

        share = clusters[..., -1]
        col = _distribution(share) if by_mass else share.softmax(-1)  # Eq 10
        plan = _transport(cost, row, col, reg, iterations)
        mass = plan.sum(-1, keepdim=True)
        means = safe_divide(torch.cat([plan @ x for x in tables], -1), mass)

        plans.append(plan)
        centers.append(means[..., :d])
        costs.append((plan * (semantic if by_semantic else cost)).sum((-2, -1)))  # Eq 13

        if not by_mass:
            means = torch.cat([means[..., :-1], share[..., None]], -1)
        if left > 2:
            directions = means[..., :d]
            if cosine:
                directions = l2_normalize(directions)
            pair = _most_alike(directions, above[:left, :left])

            two = take_rows(means, pair)
            part = take_rows(mass, pair)
            if not by_mass:
                part = torch.ones_like(part)

            joined = safe_divide((two * part).sum(-2, keepdim=True), part.sum(-2, keepdim=True))
            others = torch.arange(left - 2, device=pair.device).expand(*pair.shape[:-1], -1)
            for gone in (pair[..., :1], pair[..., 1:]):  # the smaller first
                others = others + (others >= gone)
            clusters = torch.cat([take_rows(means, others), joined], -2)
            merges.append(pair)

    step_costs = torch.stack(costs, -1)
    steps = step_costs[..., k - most :].argmin(-1) + k - most

    # The rows of step s in the list of all clusters of all steps begin at k + (k - 1) + ...
    columns = torch.arange(most, device=steps.device)
    rows = (steps * (2 * k + 1 - steps) // 2)[..., None] + columns
    used = (columns < k - steps[..., None])[..., None]
    rows = torch.where(used[..., 0], rows, 0)
    plan = torch.where(used, take_rows(torch.cat(plans, -2), rows), 0.0)
    centroids = torch.where(used, take_rows(torch.cat(centers, -2), rows), 0.0)
    merged = torch.stack(merges, -2) if merges else start[..., None][..., :0, [0, 0]]
    return MergedClusters(plan.mT, centroids, k - steps, step_costs, merged)


@typed
def split_assignments(
    assignments: Float[Tensor, "*batch n k"],
    *,
    views: int = 2,
    normalize: Literal["rows", "columns"] = "rows",
) -> Float[Tensor, "*batch v m k"]:
    """Split the joint assignments of several views, and normalize them.

    Args:
        assignments: The plan over the tokens of all views, concatenated along n in the views'
            order.
        views: Number of views; each has the same number of the n tokens.
        normalize: With "rows" the assignments of each token sum to 1 (the paper). With "columns"
            those of each cluster sum to 1 in each view, so that a token keeps its weight relative
            to the other tokens (the authors' program). A sum of zero stays zero.

    Returns:
        Assignments of m = n / v tokens in each view, in at least float32.

    Raises:
        ValueError: The tokens cannot be divided into that many views.

    Examples:
        >>> split_assignments(torch.tensor([[0.3, 0.1], [0.2, 0.4]])).shape
        torch.Size([2, 1, 2])

    References:
        CrOC, Eq 1, and the end of Sec 3.3 (row-wise normalization).
    """
    if views < 1 or assignments.shape[-2] % views:
        raise ValueError(
            f"densekit.clustering.split_assignments: {assignments.shape[-2]} tokens cannot be "
            f"divided into {views} views; concatenate the same number of tokens of each view."
        )

    split = widened(assignments).unflatten(-2, (views, assignments.shape[-2] // views))
    axis = -1 if normalize == "rows" else -2
    return safe_divide(split, split.sum(axis, keepdim=True))


@typed
def prune_clusters(assignments: Float[Tensor, "*batch v n k"]) -> PrunedClusters:
    """Assign each token to its best cluster, and drop the clusters that lack a token in some view.

    `M_nk = 1` where k is the best cluster of token n. If a cluster has no token in one of the
    views, `valid` drops it for all views. It is a normal case that no cluster remains.

    Args:
        assignments: Soft assignments of each view, not negative
            ([`split_assignments`][densekit.clustering.split_assignments]). A token whose
            assignments are all zero belongs to no cluster.

    Returns:
        The assignments where M is 1 and the cluster is valid, the labels, and the valid clusters.

    Examples:
        >>> soft = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.7, 0.3]]])
        >>> prune_clusters(soft).valid
        tensor([ True, False])

    References:
        CrOC, Eq 15 and 16.
    """
    if not assignments.shape[-1]:
        labels = assignments.sum(-1).long() - 1
        return PrunedClusters(assignments, labels, assignments.sum((-3, -2)) > 0)

    best = assignments.max(-1).indices  # argmax takes ten times as long on a CPU
    own = best[..., None] == torch.arange(assignments.shape[-1], device=best.device)
    own = own & (assignments > 0)
    valid = own.any(-2).all(-2)
    labels = torch.where(own.any(-1), best, -1)
    kept = torch.where(own & valid[..., None, None, :], assignments, 0.0)
    return PrunedClusters(kept, labels, valid)


def _check_transport(function: str, reg: float, iterations: int) -> None:
    check(f"clustering.{function}", "reg", reg, reg > 0, "a number above 0")
    check(f"clustering.{function}", "iterations", iterations, iterations >= 1, "1 or more")


def _scale(
    logits: Tensor,
    row: Tensor,
    col: Tensor,
    iterations: int,
    scalings: int,
    row_group: Group = None,
    col_group: Group = None,
) -> Tensor:
    """Scale `exp(logits)`, in which the highest logit of a row is 0, to `row` (n, 1), `col` (1, k).

    Either the rows are distributed over the processes of `row_group`, or the columns over those of
    `col_group`.

    One kernel serves `scalings` iterations. It is computed from the logits and the potentials of
    the columns, so that first each row has its mass as the largest entry, and then each column 1.
    The first iteration with it is exact for all logits and masses: an entry that underflows is
    negligible beside the largest entries. A shift of the logits cancels, also in the gradient.
    """
    log_row = _log(row.detach())
    potential = torch.zeros_like(col)
    kernel = logits  # the three of the last pass are the result
    u = row
    v = col
    for done in range(0, iterations, scalings):
        if done == 0:
            shifted = logits + log_row
        else:
            shifted = logits + potential
            shifted.add_(log_row - _finite(_highest(shifted, -1, col_group)))

        highest = _finite(_highest(shifted, -2, row_group))
        kernel = shifted.sub_(highest).exp_()
        v = highest.exp()

        for _ in range(min(scalings, iterations - done)):
            u = safe_divide(row, all_sum(_product(kernel, v.mT), col_group))
            v = safe_divide(col, all_sum(_product(u.mT, kernel), row_group))
        potential = potential + _log(v) - highest
    return (kernel * v).mul_(u)


def _plain_scalings(
    logits: Tensor,
    rows: Tensor,
    cols: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    group: Group,
) -> int:
    """Return how many iterations one kernel of `_scale` serves without a loss of precision.

    From one iteration to the next, the factors u of the rows change by ratios between the smallest
    share of a row's mass and `k` over that of a column's. These are bounds of the first ratios, and
    all later ratios lie between the smallest and the largest of those. So there are bounds of v,
    and of the product of u and v that an entry lacks which has underflowed in the kernel. The
    result is 1 where the shares are not known without waiting for a device.
    """
    known = all(x is None or readable(logits, x) for x in (row, col))
    if group is not None or torch.compiler.is_compiling() or not known:
        return 1

    n, k = logits.shape[-2:]
    # A row without mass takes no part. A column without mass does, in the first iteration.
    row_share = 1 / n if row is None else _least_share(row, rows.squeeze(-1) & (row > 0))
    col_share = 1 / k if col is None else _least_share(col, cols.squeeze(-2))
    if not (row_share > 0 and col_share > 0):
        return 1

    eps = torch.finfo(logits.dtype).eps
    tiny = torch.finfo(logits.dtype).tiny
    fall = -math.log(row_share)
    rise = math.log(k) - math.log(col_share)
    of_product = math.log(eps / tiny / k) / max(fall + rise, 1e-9)
    of_v = (math.log(col_share / tiny) - math.log(n)) / max(rise, 1e-9)
    return 1 + int(max(min(of_product, of_v, _MOST - 1), 0))


def _least_share(mass: Tensor, used: Tensor) -> float:
    """Return the smallest share that a used entry of any problem has of the total mass."""
    total = torch.where(used, mass, 0.0).sum(-1)
    share = torch.where(used, mass, torch.inf).amin(-1) / total
    return share.clamp(max=1).amin().item() if share.numel() else 1.0


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply matrices of which one is a vector: without TF32, to which a GPU might round."""
    return x @ y if x.device.type == "cpu" else (x[..., None] * y[..., None, :, :]).sum(-2)


def _transport(cost: Tensor, row: Tensor, col: Tensor, reg: float, iterations: int) -> Tensor:
    """Compute `sinkhorn` of a (k, n) cost in [0, 1] with row (n) and col (k), as a (k, n) plan."""
    if reg * _SAFE < 1:
        return sinkhorn(cost.mT, row, col, reg=reg, iterations=iterations).mT
    kernel = (cost / -reg).exp_()
    row = row[..., None, :]
    col = col[..., None, :]
    u = row
    v = torch.ones_like(col)
    for _ in range(iterations):
        u = row / _product(v, kernel)
        v = col / _product(u, kernel.mT)
    return kernel.mul_(u).mul_(v.mT)


def _add_distances(cost: Tensor, centers: Tensor, places: Tensor, weight: float) -> Tensor:
    """Add the weighted `positional_cost` of tokens (2 or more rows, n) to a (k, n) cost.

    An infinite weight leaves the positional cost alone.
    """
    x = places[..., :1, :] - centers[..., :1]
    y = places[..., 1:2, :] - centers[..., 1:2]
    distance = x.mul_(x).add_(y.mul_(y)).sqrt_()
    if not distance.numel():
        return distance
    farthest = distance.amax((-2, -1), keepdim=True)
    farthest = torch.where(farthest == 0, torch.inf, farthest)
    if weight == math.inf:
        return distance.div_(farthest)
    return torch.addcmul(cost, distance, min(weight, _HEAVIEST) / farthest)


def _most_alike(clusters: Tensor, above: Tensor) -> Tensor:
    """Return the two rows i < j with the largest product; the first such pair."""
    k = clusters.shape[-2]
    products = torch.where(above, clusters @ clusters.mT, -torch.inf)
    best = products.flatten(-2).max(-1).indices  # argmax takes ten times as long on a CPU
    return torch.stack([best // k, best % k], -1)


def _unit_range(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    low = x.amin(axes, keepdim=True)
    span = x.amax(axes, keepdim=True) - low
    return (x - low).div_(torch.where(span == 0, torch.inf, span))


def _distribution(x: Tensor) -> Tensor:
    """Scale the last axis to sum 1; it is uniform where all entries are zero."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, safe_divide(x, total), 1 / max(x.shape[-1], 1))


def _log(x: Tensor) -> Tensor:
    """Compute the logarithm; it is -inf at zero, without a gradient there."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -torch.inf)


def _highest(x: Tensor, axis: int, group: Group = None) -> Tensor:
    """Return the maximum over an axis and the processes, without a gradient; -inf of nothing."""
    x = x.detach()
    if group is not None:  # a process may have no rows
        x = torch.cat([x, torch.full_like(x.sum(axis, keepdim=True), -torch.inf)], axis)
    return all_max(x.amax(axis, keepdim=True), group)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x > -torch.inf, x, 0.0)
