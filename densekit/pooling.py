"""Regions from cells: pooled features of soft masks."""

import torch
from einops import einsum
from densekit.typing import Bool, Float, Tensor, typed

__all__ = ["pool_masks"]


@typed
def pool_masks(
    features: Float[Tensor, "*batch n d"],
    masks: Float[Tensor, "*batch n k"],
    valid: Bool[Tensor, "*batch n"] | None = None,
    *,
    average: bool = False,
) -> Float[Tensor, "*batch k d"]:
    """Embed k regions as sums of features, weighted by soft masks.

    `e_k = sum_n m_nk f_n`, as the paper has it; with `average` divided by the region's mass,
    `sum_n m_nk`.

    Args:
        features: Features of n cells or points.
        masks: Weight of each cell in each region, not negative.
        valid: Cells to use; all when left out.
        average: Divide by the mass of the region. A region without mass is zero.

    Returns:
        One row of features a region, in at least float32 (a sum of half precision overflows).

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> pool_masks(features, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [2.0000, 2.5000]])

    References:
        DenseSiam, Eq 4 (masks softmax(z'), features gridsample(f(x))).
    """
    dtype = torch.promote_types(torch.promote_types(features.dtype, masks.dtype), torch.float32)
    values, weights = features.to(dtype), masks.to(dtype)
    if valid is not None:
        values = torch.where(valid[..., None], values, 0.0)
        weights = torch.where(valid[..., None], weights, 0.0)
    with torch.autocast(features.device.type, enabled=False):
        regions = einsum(weights, values, "... n k, ... n d -> ... k d")
    if average:
        mass = weights.sum(-2)[..., None]
        regions = torch.where(mass > 0, regions / torch.where(mass > 0, mass, 1.0), 0.0)
    return regions
