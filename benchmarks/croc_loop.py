"""CrOC's clustering as a plain loop on shrinking tensors, to compare `sinkhorn_merge` with.

The loop follows the paper in the style that is usual for such programs: one-hot products gather
rows, Boolean masks drop columns, `cat` appends the merged column, padding makes the steps
stackable, and Python sets prune the clusters. Tokens are (b, heads, views * n, d). Marginals and
merges are the variants of the authors' program.
"""

import torch
from torch.nn import functional as F


def transport(cost, row, col, reg, iterations):
    plan = torch.exp(-cost / reg)
    plan = plan / plan.sum((1, 2), keepdim=True)
    for _ in range(iterations):
        plan = plan * (row / plan.sum(2)).unsqueeze(2)
        plan = plan * (col / plan.sum(1)).unsqueeze(1)
    return plan


def merge_loop(tokens, positions, weights, start, reg=0.05, iterations=5, position_weight=4.0):
    """Return the plan of each problem, padded to the largest K, and the K that it chose."""
    b, n = tokens.shape[:2]
    k_start = start.shape[1]
    tokens = F.normalize(tokens, dim=-1)
    row = weights / weights.sum(1, keepdim=True)
    chosen = F.one_hot(start, n).to(tokens.dtype)  # (b, k, n)
    centroids, places = chosen @ tokens, chosen @ positions
    col = (chosen @ row.unsqueeze(2)).squeeze(2)
    col = col / col.sum(1, keepdim=True)
    plans, costs = [], []
    for k in range(k_start, 1, -1):
        centroids = F.normalize(centroids, dim=-1)
        distance = torch.sqrt(((positions.unsqueeze(2) - places.unsqueeze(1)) ** 2).sum(3))
        distance = distance / distance.amax((1, 2), keepdim=True)
        cost = -torch.bmm(tokens, centroids.transpose(1, 2)) + position_weight * distance
        low, high = cost.amin((1, 2), keepdim=True), cost.amax((1, 2), keepdim=True)
        cost = (cost - low) / (high - low)
        plan = transport(cost, row, col, reg, iterations)
        costs.append((plan * cost).sum((1, 2)))
        plans.append(F.pad(plan, (0, k_start - k)))
        mass = plan.sum(1)
        share = plan / mass.unsqueeze(1)
        centroids = share.transpose(1, 2) @ tokens
        places = share.transpose(1, 2) @ positions
        if k == 2:
            break
        similarity = centroids @ centroids.transpose(1, 2)
        similarity = similarity.masked_fill(
            torch.eye(k, dtype=torch.bool, device=tokens.device), -torch.inf
        )
        flat = similarity.flatten(1).argmax(1)
        i, j = flat // k, flat % k
        keep = torch.ones(b, k, dtype=torch.bool, device=tokens.device)
        keep[torch.arange(b), i] = False
        keep[torch.arange(b), j] = False
        gone = F.one_hot(torch.stack([i, j], 1), k).to(tokens.dtype)  # (b, 2, k)
        part = gone @ mass.unsqueeze(2)
        part = part / part.sum(1, keepdim=True)

        def drop_and_append(x):
            merged = ((gone @ x) * part).sum(1, keepdim=True)
            return torch.cat([x[keep].view(b, k - 2, -1), merged], 1)

        centroids, places = drop_and_append(centroids), drop_and_append(places)
        plan = plan.transpose(1, 2)
        merged = (gone @ plan).sum(1, keepdim=True)
        plan = torch.cat([plan[keep].view(b, k - 2, n), merged], 1)
        share = plan / plan.sum(2, keepdim=True)
        col = (share @ row.unsqueeze(2)).squeeze(2)
        col = col / col.sum(1, keepdim=True)
    best = torch.stack(costs, 1).argmin(1)
    plans = torch.stack(plans, 1)
    chosen = F.one_hot(best, k_start - 1).to(tokens.dtype)
    plan = (plans * chosen[:, :, None, None]).sum(1)
    return plan, k_start - best


def prune(plan, views=2):
    """Return the hard weights of each view, and the clusters that both views have (Python sets)."""
    b, n, k = plan.shape
    soft = plan.view(b, views, n // views, k)
    soft = soft / (soft.sum(2, keepdim=True) + 1e-12)
    labels = soft.argmax(3)
    hard = F.one_hot(labels, k).to(plan.dtype)
    offset = torch.arange(b, device=plan.device)[:, None] * k
    present = [set((labels[:, view] + offset).flatten().tolist()) for view in range(views)]
    valid = torch.tensor(sorted(set.intersection(*present)), device=plan.device)
    return soft * hard, valid


def view_centroids(tokens, weights, valid, heads):
    """Return the valid centroids of each view; every head gathers its own copy of the tokens."""
    views = weights.shape[1]
    found = []
    for view in range(views):
        copies = tokens[:, view].unsqueeze(1).repeat(1, heads, 1, 1).flatten(0, 1)  # (b, n, d)
        sums = torch.bmm(weights[:, view].transpose(1, 2), copies).flatten(0, 1)
        found.append(sums[valid])
    return found


def cluster(tokens, positions, weights, start, last):
    """Cluster the tokens of all heads; return the centroids of both views and the chosen K."""
    heads = tokens.shape[1]
    flat = [x.flatten(0, 1) for x in (tokens, positions, weights, start)]
    plan, clusters = merge_loop(*flat)
    weights, valid = prune(plan)
    return view_centroids(last, weights, valid, heads), clusters
