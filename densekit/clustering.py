"""Clustering of tokens: Sinkhorn transport, merging of centroids, pruning.

Everything is batched over leading axes and of fixed shape: what a problem does not use is zero, or
marked by `valid`. Half precision is widened to float32, also under autocast.
"""

from typing import Literal, NamedTuple

import torch
from densekit.distributed import Group, all_max, all_sum
from densekit.numerics import (
    full_precision,
    l2_normalize,
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
]

_SAFE = 30  # scaled by rows and columns, exp(-30) stays within exp(-60) and exp(60): normal numbers


class MergedClusters(NamedTuple):
    """Clusters of `sinkhorn_merge`, k columns of which the first `clusters` are in use.

    Attributes:
        assignments: The transport plan Q of the chosen step: the mass of each token in each
            cluster; the columns not in use are zero.
        centroids: Mean of the L2-normalized tokens of each cluster, weighted by the plan; zero
            where not in use.
        clusters: The chosen number of clusters K.
        costs: Transport cost of every step, from the number of start tokens down to 2 clusters.
        merges: The two columns that became one after each step but the last; the new one goes last,
            the others keep their order.
    """

    assignments: Float[Tensor, "*batch n k"]
    centroids: Float[Tensor, "*batch k d"]
    clusters: Integer[Tensor, "*batch"]
    costs: Float[Tensor, "*batch steps"]
    merges: Integer[Tensor, "*batch merged 2"]


class PrunedClusters(NamedTuple):
    """Hard clusters that every view has a token of.

    Attributes:
        assignments: Weight of each token in its own cluster, zero elsewhere and in pruned clusters.
        labels: The cluster of each token, pruned or not; -1 where it has no assignment.
        valid: Clusters with a token in every view.
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
    """Entropic optimal transport: the plan with given marginals and the least regularized cost.

    Minimizes `<P, cost> - reg H(P)` over plans P >= 0 with `P 1 = row` and `P^T 1 = col`: scales
    the rows of `exp(-cost / reg)` and then its columns, `iterations` times, in the log domain. The
    columns come last: their sums are met exactly, the rows' in the limit.

    Args:
        cost: Cost of moving a unit from row n to column k; finite, or inf where forbidden. A
            constant added to a row or to all of it changes nothing.
        row: Mass of the rows, not negative; uniform with sum 1 over the valid rows when left out.
        col: Mass of the columns, not negative, of the same sum; uniform when left out.
        reg: Strength of the entropy, above 0, in units of the cost (CrOC's `1 / lambda`).
        iterations: How often rows and columns are scaled, at least once.
        valid: Entries that may carry mass; a row or column without any is left out. This holds
            problems of several sizes in one tensor.
        group: Processes that the rows are spread over (`row` is this process's part, and its
            uniform default is over the rows of all; no gradient flows); None when all are here.
            For codes of which each row sums to 1, divide the plan by its row sums.

    Returns:
        The plan, in at least float32.

    Raises:
        ValueError: `reg` is not above 0, or `iterations` below 1.

    Examples:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> sinkhorn(cost, reg=0.5, iterations=5)
        tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]])

    References:
        Cuturi, Sinkhorn Distances, Algorithm 1; CrOC, Eq 11 and 12; SwAV, Eq 3 and 5.
    """
    _check_transport("sinkhorn", reg, iterations)
    if group is not None:  # no gradient, and so no backward pass that waits for other processes
        cost = cost.detach()
        row, col = (x if x is None else x.detach() for x in (row, col))
    cost = widened(cost)
    if not cost.shape[-1] or (group is None and not cost.shape[-2]):
        return cost
    if valid is not None:
        cost = torch.where(valid, cost, torch.inf)
    possible = cost < torch.inf
    # Scaling the rows undoes a shift of a row, which would cost precision.
    low = cost.detach().amin(-1, keepdim=True)
    logits = (torch.where(low < torch.inf, low, 0.0) - cost) / reg
    rows = possible.any(-1).to(logits.dtype)
    cols = all_max(possible.any(-2).to(logits.dtype), group)
    if row is None:
        row = safe_divide(rows, all_sum(rows.sum(-1, keepdim=True), group))
    if col is None:
        col = safe_divide(cols, cols.sum(-1, keepdim=True))
    log_row, col = _log(row.to(rows) * rows)[..., None], (col.to(cols) * cols)[..., None, :]
    g, share = torch.zeros_like(col), logits
    for _ in range(iterations):
        f = log_row - _log_sum(logits + g, -1)[0]
        total, share = _log_sum(logits + f, -2, group)
        g = _log(col) - total
    return col * share


@typed
def positional_cost(
    positions: Float[Tensor, "*batch n 2"], centers: Float[Tensor, "*batch k 2"]
) -> Float[Tensor, "*batch n k"]:
    """Distance of each token to each centroid, over the largest one of the problem.

    Args:
        positions: Tokens (x, y), both views in one frame: pixels of the image, say.
        centers: Centroids (x, y), in the same frame.

    Returns:
        Distances in [0, 1], in at least float32; all 0 when all points coincide.

    Examples:
        >>> positions = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
        >>> positional_cost(positions, positions[:1]).T
        tensor([[0.0000, 0.5000, 1.0000]])

    References:
        CrOC, Eq 17.
    """
    x, y = widened(positions)[..., :, None, :], widened(centers)[..., None, :, :]
    square = (x[..., 0] - y[..., 0]).square() + (x[..., 1] - y[..., 1]).square()
    if 0 in square.shape[-2:]:
        return square
    # The slope of a root is infinite at 0, where a start token is its own centroid.
    tiny = torch.finfo(square.dtype).tiny
    distance = square.clamp(min=tiny).sqrt() - tiny**0.5
    return safe_divide(distance, distance.amax((-2, -1), keepdim=True))


@typed
def sample_tokens(
    weights: Float[Tensor, "*batch n"], count: int, *, generator: torch.Generator | None = None
) -> Integer[Tensor, "*batch count"]:
    """Draw tokens without replacement, each draw in proportion to the weights that are left.

    Args:
        weights: Weight of each token, such as the attention of [CLS]; not negative. A token of
            weight 0 is drawn when no other is left.
        count: How many.
        generator: Source of the random numbers.

    Returns:
        Indices into the tokens, all different, in the order of the draws.

    Raises:
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
            f"{weights.shape[-1]} tokens to draw from; give at most as many."
        )
    weights = widened(weights)
    draws = sample_uniform(weights.shape, weights, generator=generator)
    # The largest log w + Gumbel noise is one draw, the next largest the draw from what is left.
    noise = -(-draws.clamp(min=torch.finfo(draws.dtype).tiny).log()).log()
    return (_log(weights) + noise).topk(count).indices


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
) -> MergedClusters:
    """Cluster tokens by transport, merging centroids down to two; keep the cheapest step.

    The centroids begin as the start tokens. Each step computes the cost of every token at every
    centroid, `T = -Z C^T + position_weight T_pos`, brings its range to [0, 1], transports the
    tokens' weights to the centroids' ([`sinkhorn`][densekit.clustering.sinkhorn]), moves each
    centroid to the mean of its tokens, and merges the two that are most alike. K falls by one a
    step whatever the data, so shapes are static. Kept is the step whose plan costs least, `<Q, T>`.

    Join both views along n, and give each attention head an entry of `*batch`: one call clusters
    all. A problem's result depends on no other, unless `cost_range="batch"` asks for it. No
    gradient flows. On a GPU leave `torch.set_float32_matmul_precision` at "highest": rounded to
    TF32, products choose another K now and then.

    Args:
        tokens: n tokens; L2-normalized here.
        positions: Their centers (x, y) in the image frame, of both views alike.
        weights: Their weights r, not negative, such as the attention of [CLS]; scaled to sum 1
            here. A token of weight 0 takes no part.
        start: Indices of the start tokens, two or more, of tokens with some weight
            ([`sample_tokens`][densekit.clustering.sample_tokens]).
        reg: Strength of the entropy, `1 / lambda`; the cost has range 1.
        iterations: Of Sinkhorn, in every step.
        position_weight: Weight of the positional cost, lambda_pos.
        max_clusters: Choose K from 2 to this; to the number of start tokens when left out.
        similarity: Which centroids are most alike: by "cosine" (the paper), or by the "dot" product
            of the means (the authors' program).
        merge: "average" takes the mean of two centroids and two columns of Y, and the centroids'
            marginal is `softmax(Y^T r)` (the paper). "mass" weights both by their mass in the plan,
            and the marginal is each centroid's mean token weight, scaled to sum 1 (the program).
        cost_range: What the range of the cost is taken over: each "problem" alone, or the whole
            "batch" (the program), which makes an image's clusters depend on its neighbors. Under
            `vmap` the batch is what the function sees: one problem.

    Returns:
        Assignments, centroids, K, costs and merges, in at least float32.

    Raises:
        ValueError: Fewer than two start tokens, `max_clusters` below 2, `reg` not above 0, or
            `iterations` below 1.

    Examples:
        >>> tokens = torch.eye(2).repeat_interleave(4, 0)
        >>> where, weights = torch.zeros(8, 2), torch.ones(8)
        >>> found = sinkhorn_merge(tokens, where, weights, torch.tensor([0, 5, 7]))
        >>> found.clusters, found.assignments.argmax(-1)
        (tensor(2), tensor([0, 0, 0, 0, 1, 1, 1, 1]))

    References:
        CrOC, Sec 3.3, Eq 8 to 14, 17 and 18. The paper leaves the range of T open.
    """
    _check_transport("sinkhorn_merge", reg, iterations)
    k = start.shape[-1]
    most = k if max_clusters is None else min(k, max_clusters)
    if most < 2:
        raise ValueError(
            f"densekit.clustering.sinkhorn_merge: {k} start tokens and max_clusters="
            f"{max_clusters} leave {most} clusters; merging needs two or more of each."
        )
    tokens, positions, weights = (widened(x.detach()) for x in (tokens, positions, weights))
    options = (reg, iterations, position_weight, most)
    variants = (similarity == "cosine", merge == "mass", cost_range == "batch")
    with full_precision(tokens):
        return _merge(tokens, positions, weights, start, *options, *variants)


def _merge(
    tokens, positions, weights, start, reg, iterations, position_weight, most, cosine, by_mass,
    batch_range,
):  # fmt: skip
    """`sinkhorn_merge` on (k, n) costs and plans: sums over tokens are then the quick ones."""
    d, k = tokens.shape[-1], start.shape[-1]
    row = _distribution(weights)
    # A token without weight takes the place of a start token: the range of the cost ignores it.
    features, places = (
        torch.where(row[..., None] > 0, x, take_rows(x, start[..., :1]))
        for x in (l2_normalize(tokens), positions.to(tokens.dtype))
    )
    # All that a cluster has, in one table: feature, position, token weight.
    tables = features, torch.cat([places.mT, row[..., None, :]], -2).mT
    clusters = torch.cat([take_rows(x, start) for x in tables], -1)
    plans, costs, centers, merges = [], [], [], []
    for left in range(k, 1, -1):
        cost = -l2_normalize(clusters[..., :d]) @ features.mT  # Eq 9
        if position_weight:  # Eq 18
            far = positional_cost(clusters[..., d:-1], places)
            cost = torch.add(cost, far, alpha=position_weight)
        every = batch_range and cost.numel() > 0
        cost = _unit_range(cost, tuple(range(cost.ndim)) if every else (-2, -1))
        share = clusters[..., -1]
        col = _distribution(share) if by_mass else share.softmax(-1)  # Eq 10
        plan = _transport(cost, row, col, reg, iterations)
        mass = plan.sum(-1, keepdim=True)
        means = safe_divide(torch.cat([plan @ x for x in tables], -1), mass)
        plans.append(plan)
        centers.append(means[..., :d])
        costs.append((plan * cost).sum((-2, -1)))  # Eq 13
        if not by_mass:
            means = torch.cat([means[..., :-1], share[..., None]], -1)
        if left > 2:
            pair = _most_alike(l2_normalize(means[..., :d]) if cosine else means[..., :d])
            two, part = (
                take_rows(means, pair),
                take_rows(mass if by_mass else torch.ones_like(mass), pair),
            )
            joined = safe_divide((two * part).sum(-2, keepdim=True), part.sum(-2, keepdim=True))
            others = torch.arange(left - 2, device=pair.device).expand(*pair.shape[:-1], -1)
            for gone in (pair[..., :1], pair[..., 1:]):  # in this order: the first is the smaller
                others = others + (others >= gone)
            clusters = torch.cat([take_rows(means, others), joined], -2)
            merges.append(pair)
    costs = torch.stack(costs, -1)
    steps = costs[..., k - most :].argmin(-1) + k - most
    # The rows of step s in the list of all clusters of all steps begin at k + (k - 1) + ...
    columns = torch.arange(most, device=steps.device)
    rows = (steps * (2 * k + 1 - steps) // 2)[..., None] + columns
    used = (columns < k - steps[..., None])[..., None]
    plan, centers = (
        torch.where(used, take_rows(torch.cat(x, -2), torch.where(used[..., 0], rows, 0)), 0.0)
        for x in (plans, centers)
    )
    merges = torch.stack(merges, -2) if merges else start[..., None][..., :0, [0, 0]]
    return MergedClusters(plan.mT, centers, k - steps, costs, merges)


@typed
def split_assignments(
    assignments: Float[Tensor, "*batch n k"],
    *,
    views: int = 2,
    normalize: Literal["rows", "columns"] = "rows",
) -> Float[Tensor, "*batch v m k"]:
    """Split the joint assignments of several views, and normalize them.

    Args:
        assignments: The plan over the tokens of all views, joined along n in the views' order.
        views: How many views share the n tokens evenly.
        normalize: "rows" makes each token's assignments sum to 1 (the paper); "columns" makes each
            cluster's sum to 1 in each view, so that a token keeps its weight beside its neighbors
            (the authors' program). What sums to zero stays zero.

    Returns:
        Assignments of m = n / v tokens in each view, in at least float32.

    Raises:
        ValueError: The tokens do not divide into that many views.

    Examples:
        >>> split_assignments(torch.tensor([[0.3, 0.1], [0.2, 0.4]])).shape
        torch.Size([2, 1, 2])

    References:
        CrOC, Eq 1, and the end of Sec 3.3 (row-wise normalization).
    """
    if views < 1 or assignments.shape[-2] % views:
        raise ValueError(
            f"densekit.clustering.split_assignments: {assignments.shape[-2]} tokens do not divide "
            f"into {views} views; join the same number of tokens from each."
        )
    split = widened(assignments).unflatten(-2, (views, assignments.shape[-2] // views))
    return safe_divide(split, split.sum(-1 if normalize == "rows" else -2, keepdim=True))


@typed
def prune_clusters(assignments: Float[Tensor, "*batch v n k"]) -> PrunedClusters:
    """Give each token to its best cluster, and drop the clusters that a view has no token of.

    `M_nk = 1` where k is the best cluster of token n. A cluster without a token of either view is
    dropped for both through `valid`; that no cluster is left is a normal case.

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
    labels = assignments.max(-1).indices  # argmax takes ten times as long on a CPU
    own = labels[..., None] == torch.arange(assignments.shape[-1], device=labels.device)
    own = own & (assignments > 0)
    valid, labels = own.any(-2).all(-2), torch.where(own.any(-1), labels, -1)
    kept = torch.where(own & valid[..., None, None, :], assignments, 0.0)
    return PrunedClusters(kept, labels, valid)


def _check_transport(function: str, reg: float, iterations: int) -> None:
    if not (reg > 0 and iterations >= 1):
        raise ValueError(
            f"densekit.clustering.{function}: reg is {reg} and iterations is {iterations}; give a "
            "reg above 0 and 1 or more iterations."
        )


def _transport(cost: Tensor, row: Tensor, col: Tensor, reg: float, iterations: int) -> Tensor:
    """`sinkhorn` of a (k, n) cost in [0, 1], with row (n) and col (k); the plan is (k, n) too."""
    if reg * _SAFE < 1:
        return sinkhorn(cost.mT, row, col, reg=reg, iterations=iterations).mT
    kernel, u, v = (cost / -reg).exp(), row, torch.ones_like(col)
    for _ in range(iterations):
        u = row / (kernel * v[..., None]).sum(-2)
        v = col / (kernel * u[..., None, :]).sum(-1)
    return kernel * u[..., None, :] * v[..., None]


def _most_alike(clusters: Tensor) -> Tensor:
    """The two rows i < j with the largest product; the first such pair."""
    k = clusters.shape[-2]
    above = torch.ones(k, k, dtype=torch.bool, device=clusters.device).triu(1)
    best = torch.where(above, clusters @ clusters.mT, -torch.inf).flatten(-2).argmax(-1)
    return torch.stack([best // k, best % k], -1)


def _unit_range(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    low = x.amin(axes, keepdim=True)
    return safe_divide(x - low, x.amax(axes, keepdim=True) - low)


def _distribution(x: Tensor) -> Tensor:
    """The last axis scaled to sum 1; uniform where it is all zero."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, safe_divide(x, total), 1 / max(x.shape[-1], 1))


def _log(x: Tensor) -> Tensor:
    """Logarithm; -inf at zero, without a gradient there."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -torch.inf)


def _log_sum(x: Tensor, axis: int, group: Group = None) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials, and each one's share; 0 and zeros where all are -inf."""
    peak = x.detach()
    if group is not None:  # a process may have no rows
        peak = torch.cat([peak, torch.full_like(peak.sum(axis, keepdim=True), -torch.inf)], axis)
    top = all_max(peak.amax(axis, keepdim=True), group)
    top = torch.where(top > -torch.inf, top, 0.0)
    each = (x - top).exp()
    total = all_sum(each.sum(axis, keepdim=True), group)
    log = top + torch.where(total > 0, total, 1.0).log()
    return torch.where(total > 0, log, 0.0), safe_divide(each, total)
