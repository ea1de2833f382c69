"""Videos: labels propagated from frame to frame, and the scores J and F of object masks."""

import math

import torch
from densekit.numerics import (
    block_rows,
    check,
    check_temperature,
    full_precision,
    in_range,
    l2_normalize,
    map_to_rows,
    rows_to_map,
    widened,
)
from densekit.typing import Bool, Float, Scalar, Tensor, typed

__all__ = ["boundary_f_measure", "propagate_labels", "propagate_video", "region_similarity"]


@typed
def propagate_labels(
    features: Float[Tensor, "d h w"],
    context: Float[Tensor, "t d h w"],
    context_labels: Float[Tensor, "t c h w"],
    *,
    radius: int = 12,
    k: int = 5,
    temperature: Scalar = 0.1,
    chunk: int = 1024,
) -> Float[Tensor, "c h w"]:
    """Propagate labels from earlier frames of a video to the next frame, by nearest neighbors.

    For each cell, the candidates are the cells of the earlier frames that are at most `radius` rows
    and columns away. The labels of the k most similar candidates are averaged with weights
    `exp(cosine / t)`. A cell of an earlier frame whose features or labels are not finite is no
    candidate.

    Args:
        features: Feature map of the new frame.
        context: Feature maps of t earlier frames.
        context_labels: Their labels: c shares in each cell, such as one-hot objects.
        radius: Largest distance in cells that an object may have moved.
        k: Number of neighbors.
        temperature: Divisor of the cosine.
        chunk: Number of cells that are processed at a time, which bounds the memory to `chunk x t h
            w` numbers.

    Returns:
        Shares of the new frame, in at least float32. They are zero where a cell of the new frame is
        not finite or has no candidate.

    Raises:
        TypeError: The shapes do not match.
        ValueError: There is no earlier frame, `k` or `chunk` is below 1, the radius is negative, or
            the temperature is not positive.

    Examples:
        >>> maps = torch.eye(9).view(1, 9, 3, 3)
        >>> labels = torch.rand(1, 2, 3, 3)
        >>> torch.allclose(propagate_labels(maps[0], maps, labels, k=1), labels[0])
        True

    References:
        Caron et al. 2021 (DINO), Sec 4.2.2; Jabri et al. 2020; CrOC, Appendix D.
    """
    t, _, h, w = context.shape
    check("video.propagate_labels", "chunk", chunk, chunk >= 1, "1 or more")
    _check_options("video.propagate_labels", t, k, radius, temperature)

    own = map_to_rows(features)
    known = map_to_rows(context).flatten(0, 1)
    labels = map_to_rows(context_labels).flatten(0, 1)
    asks = own.isfinite().all(-1)
    usable = known.isfinite().all(-1) & labels.isfinite().all(-1)
    cell = torch.arange(h * w, device=features.device)
    position = torch.stack([cell // max(w, 1), cell % max(w, 1)], -1)

    found = []
    with full_precision(features):
        own = l2_normalize(torch.where(asks[:, None], own, 0.0))
        known = l2_normalize(torch.where(usable[:, None], known, 0.0)).to(own)
        labels = torch.where(usable[:, None], labels, 0.0).to(own)
        for rows, at in zip(own.split(chunk), position.split(chunk), strict=True):
            far = ((at[:, None] - position).abs() > radius).any(-1).repeat(1, t)
            excluded = far | ~usable
            found.append(_nearest_labels(rows, known, labels, excluded, k, temperature))

    shares = torch.where(asks[:, None], torch.cat(found), 0.0)
    return rows_to_map(shares, (h, w))


def _nearest_labels(
    rows: Tensor, known: Tensor, labels: Tensor, excluded: Tensor, k: int, temperature: Scalar
) -> Tensor:
    """Average the labels of the k known cells that are nearest to each row; zeros without any."""
    best = (rows @ known.mT).masked_fill(excluded, -torch.inf).topk(min(k, len(known)))
    some = best.values[:, :1] > -torch.inf
    similarity = torch.where(some, best.values, 0.0)
    weights = (similarity / in_range(temperature, similarity.dtype)).softmax(-1)
    weights = torch.where(some, weights, 0.0)
    return (weights[..., None] * labels[best.indices]).sum(1)


@typed
def propagate_video(
    features: Float[Tensor, "t d h w"],
    first: Float[Tensor, "c h w"],
    *,
    context: int = 7,
    radius: int = 12,
    k: int = 5,
    temperature: Scalar = 0.1,
) -> Float[Tensor, "t c h w"]:
    """Propagate the labels of a video's first frame through all other frames.

    `propagate_labels` labels each frame from the first frame and the `context` frames before it.
    Nothing is learned.

    Args:
        features: Feature maps of the frames, in order.
        first: Labels of the first frame: c shares in each cell.
        context: Number of frames before the current one that are used, besides the first.
        radius: As in `propagate_labels`.
        k: As in `propagate_labels`.
        temperature: As in `propagate_labels`.

    Returns:
        Shares of all frames, in at least float32. To get labels, resize them bilinearly and take
        the class with the largest share.

    Raises:
        ValueError: There is no frame, the context is negative, or as in `propagate_labels`.

    Examples:
        >>> features = torch.rand(1, 9, 3, 3).expand(4, 9, 3, 3)  # nothing moves
        >>> first = torch.rand(2, 3, 3)
        >>> torch.allclose(propagate_video(features, first, k=1), first.expand(4, 2, 3, 3))
        True

    References:
        Caron et al. 2021 (DINO), Sec 4.2.2 (7 frames, radius 12, the 5 nearest); CrOC, Appendix D.
    """
    count = len(features)
    _check_options("video.propagate_video", count, k, radius, temperature)
    check("video.propagate_video", "context", context, context >= 0, "0 or more")

    options = {"radius": radius, "k": k, "temperature": temperature}
    labels = [widened(first)]
    for now in range(1, len(features)):
        used = sorted({0, *range(max(0, now - context), now)})
        known = torch.stack([labels[i] for i in used])
        labels.append(propagate_labels(features[now], features[used], known, **options))
    return torch.stack(labels)


def _check_options(where: str, frames: int, k: int, radius: int, temperature: Scalar) -> None:
    for name, number in {"the number of frames": frames, "k": k}.items():
        check(where, name, number, number >= 1, "1 or more")
    check(where, "radius", radius, radius >= 0, "0 or more")
    check_temperature(where, temperature)


@typed
def region_similarity(
    masks: Bool[Tensor, "*batch h w"], predictions: Bool[Tensor, "*batch h w"]
) -> Float[Tensor, "*batch"]:
    """Compute the region similarity J of video object segmentation: the IoU of two masks.

    Args:
        masks: True masks.
        predictions: Predicted masks.

    Returns:
        IoU, in float32; 1 where both masks are empty.

    Examples:
        >>> region_similarity(torch.eye(2).bool(), torch.ones(2, 2).bool())
        tensor(0.5000)

    References:
        Perazzi et al. 2016 (DAVIS), Sec 4; CrOC, Appendix D.
    """
    both = (masks & predictions).sum((-2, -1))
    either = (masks | predictions).sum((-2, -1))
    return torch.where(either > 0, both.float() / either.clamp(min=1), 1.0)


@typed
def boundary_f_measure(
    masks: Bool[Tensor, "*batch h w"],
    predictions: Bool[Tensor, "*batch h w"],
    *,
    tolerance: float = 0.008,
) -> Float[Tensor, "*batch"]:
    """Compute the contour accuracy F of video object segmentation: the agreement of two outlines.

    `F = 2 P R / (P + R)`, where P is the share of the predicted outline that lies within the
    tolerance of the true outline, and R is the reverse. A pixel belongs to the outline if it
    differs from the pixel to its right, below it, or to its lower right. The images are processed
    in blocks, of at most some 2^22 pixels or one image, which bounds the memory.

    Args:
        masks: True masks.
        predictions: Predicted masks.
        tolerance: Allowed distance as a share of the image's diagonal; it is rounded up to whole
            pixels.

    Returns:
        F, in float32; 1 where neither mask has an outline, 0 where only one has.

    Raises:
        ValueError: The tolerance is negative or not finite.

    Examples:
        >>> boundary_f_measure(torch.eye(9).bool(), torch.eye(9).bool())
        tensor(1.)

    References:
        Perazzi et al. 2016 (DAVIS), Sec 4; Martin et al. 2004 (the measure).
    """
    known = 0 <= tolerance < math.inf
    check("video.boundary_f_measure", "tolerance", tolerance, known, "0 or more, and finite")

    if not masks.numel():
        return masks.new_ones(masks.shape[:-2], dtype=torch.float32)

    h, w = masks.shape[-2:]
    reach = math.ceil(tolerance * math.hypot(h, w))
    count = block_rows(h * w)
    true_parts = masks.reshape(-1, h, w).split(count)
    guess_parts = predictions.reshape(-1, h, w).split(count)
    parts = zip(true_parts, guess_parts, strict=True)
    scores = [_boundary_f(true, guess, reach) for true, guess in parts]
    return torch.cat(scores).view(masks.shape[:-2])


def _boundary_f(masks: Tensor, predictions: Tensor, reach: int) -> Tensor:
    """Return F of each mask; the tolerance is `reach` pixels."""
    true = _outline(masks)
    guess = _outline(predictions)
    precision = _share_within(guess, true, reach)
    recall = _share_within(true, guess, reach)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def _share_within(outline: Tensor, other: Tensor, reach: int) -> Tensor:
    """Return the share of an outline that lies near the other one; 1 if both are empty."""
    length = outline.sum((-2, -1))
    close = (outline & _within(other, reach)).sum((-2, -1))
    none = (~other.any(-1).any(-1)).float()
    return torch.where(length > 0, close.float() / length.clamp(min=1), none)


def _within(outline: Tensor, reach: int) -> Tensor:
    """Mark the pixels that are at most `reach` away from a pixel of the outline.

    The distance along the row is computed once. Every row that is near enough then allows a
    distance along it: this takes `2 reach + 1` passes, where a disk takes its area.
    """
    h, w = outline.shape[-2:]
    column = torch.arange(w, dtype=torch.int32, device=outline.device).expand(outline.shape)
    left = column - torch.where(outline, column, -w - reach - 1).cummax(-1).values
    right = torch.where(outline, column, 2 * w + reach).flip(-1).cummin(-1).values.flip(-1) - column
    beside = torch.minimum(left, right)

    near = beside <= reach
    for rows in range(1, min(reach, h - 1) + 1):
        allowed = beside <= math.isqrt(reach**2 - rows**2)
        above = torch.nn.functional.pad(allowed[..., rows:, :], (0, 0, 0, rows))
        below = torch.nn.functional.pad(allowed[..., :-rows, :], (0, 0, rows, 0))
        near = near | above | below
    return near


def _outline(mask: Tensor) -> Tensor:
    """Mark the pixels that differ from the pixel to the right, below, or to the lower right."""
    right = torch.cat([mask[..., 1:], mask[..., -1:]], -1)
    below = torch.cat([mask[..., 1:, :], mask[..., -1:, :]], -2)
    diagonal = torch.cat([below[..., 1:], below[..., -1:]], -1)
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
