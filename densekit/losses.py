"""Losses of rows: of single rows, of rows against others, and of the structure of a set of rows.

Channels come last: all losses take rows (..., d), such as (b, n, d). `map_to_rows` turns a map
(..., d, h, w) into rows. A map that is passed as it is can be told where it has four or more axes,
h equals w, and d is above both w and 3; then a TypeError says so.

One rule says where gradients flow, for all losses: what an argument list calls `teacher`, `center`
or `references` is detached by the loss, and everything else gets its gradient.

A loss is the mean over the valid entries. When no entry is valid it is zero, but still connected to
the graph. Half precision is converted to float32. This module knows no geometry.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import Function
from densekit.bank import Negatives
from densekit.distributed import Group, all_sum
from densekit.numerics import (
    broadcasts,
    check,
    check_temperature,
    fit_valid,
    full_precision,
    has_spread,
    in_range,
    l2_normalize,
    masked_mean,
    recomputed,
    refuse_maps,
    safe_divide,
    widened,
)
from densekit.sorting import Network, soft_sort
from densekit.typing import Bool, Float, Scalar, Tensor, typed

__all__ = [
    "VarianceCovariance",
    "cross_entropy_similarity",
    "gram_loss",
    "info_nce",
    "kernel_alignment",
    "mutual_information_loss",
    "negative_cosine",
    "neighbor_distribution_loss",
    "neighbor_order_loss",
    "self_distillation",
    "symmetric_loss",
    "update_center",
    "variance_covariance",
]

Metric = Literal["cosine", "euclidean"]
Reduction = Literal["mean", "none"]


class VarianceCovariance(NamedTuple):
    """VICReg's two terms against collapse, not weighted; both are 0 for fewer than two rows.

    Attributes:
        variance: Mean over the channels of `max(0, target - std)`: every channel has a spread.
        covariance: Sum of the squared covariances of different channels, divided by d.
    """

    variance: Float[Tensor, "*batch"]
    covariance: Float[Tensor, "*batch"]


@typed
def negative_cosine(
    student: Float[Tensor, "*batch d"],
    teacher: Float[Tensor, "*batch d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute the negative cosine similarity of student and teacher; the teacher is detached.

    Channels come last: `student` and `teacher` are rows (..., d). For maps use `map_to_rows`.

    $$
    -\frac{p \cdot z}{|p| |z|}
    $$

    Args:
        student: Predictions p; the gradient flows to them only.
        teacher: Projections z; they are detached (the paper's stop-gradient).
        valid: Entries to use, of shape `*batch`; an axis may have size 1. By default all. One value
            for each image of rows (b, n, d) is `valid[:, None]`.
        reduction: "mean" over the valid entries, or "none" for one value for each entry (0 where
            not valid).

    Returns:
        The loss in [-1, 1], in at least float32; the cosine of a zero vector is 0.

    Raises:
        TypeError: The shapes differ, or rows look like maps.

    Examples:
        >>> p = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> negative_cosine(p, torch.tensor([[2.0, 0.0], [0.0, 1.0]]), reduction="none")
        tensor([-1.0000, -0.7071])

    References:
        DenseSiam, Eq 2; SimSiam, Eq 1.
    """
    refuse_maps("losses.negative_cosine", "student", student)
    valid = fit_valid("losses.negative_cosine", valid, student.shape[:-1])
    student = _valid_rows(student, valid)
    teacher = _valid_rows(teacher, valid)
    cosine = (l2_normalize(student) * l2_normalize(teacher.detach())).sum(-1)
    return _reduce(-cosine, valid, reduction)


@typed
def cross_entropy_similarity(
    student: Float[Tensor, "*batch d"],
    teacher: Float[Tensor, "*batch d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute the cross-entropy of the student and the teacher, which is detached.

    Channels come last: `student` and `teacher` are rows (..., d). For maps use `map_to_rows`.

    $$
    -\sum_l \mathrm{softmax}(z)_l \log \mathrm{softmax}(p)_l
    $$

    The d channels are pseudo-categories. The paper prints its Eq 3 with student and teacher
    exchanged; this function computes the direction that its published code uses.

    A category whose teacher probability is 0 adds nothing, even if its student's logit is minus
    infinity. The loss is infinite if the student excludes a category that the teacher does not
    exclude, and NaN if all logits of a row are minus infinity, or one is plus infinity or NaN.

    Args:
        student: Logits p; the gradient flows to them only. Minus infinity excludes a category.
        teacher: Logits z; they are detached. Minus infinity excludes a category.
        valid: Entries to use, of shape `*batch`; an axis may have size 1. By default all. One value
            for each image of rows (b, n, d) is `valid[:, None]`.
        reduction: "mean" over the valid entries, or "none" for one value for each entry (0 where
            not valid).

    Returns:
        The loss, not negative, in at least float32, in nats.

    Raises:
        TypeError: The shapes differ, or rows look like maps.

    Examples:
        >>> logits = torch.zeros(3, 4)
        >>> cross_entropy_similarity(logits, logits)  # log 4
        tensor(1.3863)

    References:
        DenseSiam, Eq 3 (student and teacher exchanged).
    """
    refuse_maps("losses.cross_entropy_similarity", "student", student)
    valid = fit_valid("losses.cross_entropy_similarity", valid, student.shape[:-1])
    return _reduce(_cross_entropy(student, teacher, valid), valid, reduction)


def _cross_entropy(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    student = _valid_rows(student, valid)
    teacher = _valid_rows(teacher, valid)
    share = widened(teacher.detach()).softmax(-1)
    log_share = widened(student).log_softmax(-1)
    log_share = torch.where(share == 0, 0.0, log_share)  # zero times minus infinity would be NaN
    return -(share * log_share).sum(-1)


@typed
def info_nce(
    query: Float[Tensor, "*batch n d"],
    key: Float[Tensor, "*batch n d"],
    negatives: Float[Tensor, "*shared m d"] | Negatives | None = None,
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    temperature: Scalar,
    reduction: Reduction = "mean",
    normalized: bool = False,
    product_dtype: torch.dtype | None = None,
) -> Float[Tensor, "*reduced"]:
    r"""Compute InfoNCE: contrast each query's own key with negative keys.

    Channels come last: queries and keys are rows (..., n, d). For maps use `map_to_rows`.

    For each query $q$ with its key $k$ and the negatives $k_j$, on L2-normalized vectors, the loss
    is

    $$
    -\log \frac{\exp(q \cdot k / t)}{\exp(q \cdot k / t) + \sum_j \exp(q \cdot k_j / t)} .
    $$

    If `negatives` are given, only they are the negatives; otherwise the other keys of the same set
    are. In the dense form a query is a cell or patch of one view, its key is the same position in
    the other view, and the negatives come from a bank:
    `info_nce(query, key, bank_negatives(bank), temperature=0.2)`.

    The gradient flows to queries, keys and negatives, since none of them is called a teacher. So
    compute the keys of a momentum encoder under `torch.no_grad()`, or detach them.
    Negatives must not contain the query's own key: with it the loss is at least log 2. So push keys
    into a bank after the loss. One row without negatives has nothing to be told from: its loss is
    exactly 0.

    With given negatives, neither the loss nor its gradient stores an array of queries times
    negatives; a forward derivative of the gradient, as in `torch.func.hessian`, does.

    A large bank costs less if its keys are normalized once, at the push, and not again in every
    step: push `l2_normalize(key)`, and call the loss with `normalized=True` on queries and keys
    that `l2_normalize` returned. On a GPU, `product_dtype=torch.bfloat16` computes the products
    with the negatives several times faster. This is the only part of the loss that leaves float32,
    and only if you ask for it: inside autocast too, the default computes in float32.

    For several levels or kinds of features, add weighted calls, as `recipes/dupr.py` does. To
    weight the queries, use `reduction="none"`.

    Args:
        query: n queries in each set.
        key: Their keys; row n of the keys belongs to row n of the queries.
        negatives: m negatives, shared by all sets or broadcast to them; or `Negatives`, which
            contain their `valid`, as `bank_negatives` returns them. Without any valid negative the
            loss is zero.
        valid: Entries to use, of shape `*batch n`; an axis may have size 1. One value for each
            image is `valid[:, None]`. The other entries are not used as queries, nor are their keys
            used as negatives.
        temperature: Divisor of the cosine; as a tensor it gets a gradient, and is not checked.
        reduction: "mean" over the valid queries, or "none" for one value for each query (0 where
            not valid).
        normalized: Whether all valid queries, keys and negatives are unit vectors. Then they are
            used as they are. This is not checked, since that would read the values: with longer
            vectors the loss is that of another temperature.
        product_dtype: Dtype in which queries are multiplied by negatives, or by the keys of their
            set. A device adds up the products in float32, and exponentials, sums and the queries'
            own products are in float32. With torch.bfloat16 a logit is off by up to 1 % of `1 / t`.
            By default the dtype of the loss.

    Returns:
        The loss, not negative, in at least float32, in nats. With a smaller `product_dtype` it may
        be below zero by its rounding, if there are no given negatives.

    Raises:
        TypeError: The shapes differ, or rows look like maps.
        ValueError: The temperature is not positive, or `product_dtype` is not a floating dtype of
            16 bits or more.

    Examples:
        >>> x = torch.eye(4)
        >>> info_nce(x, x, temperature=0.1)
        tensor(0.0001)

    References:
        DenseSiam, Eq 6 (negatives of the same set, temperature 0.1, mean); MoCo, Eq 1, and DUPR, Eq
        1, 5 and 6 (given negatives).
    """
    check_temperature("losses.info_nce", temperature)
    refuse_maps("losses.info_nce", "query", query)

    others, use = negatives if isinstance(negatives, Negatives) else (negatives, None)
    if others is not None:
        _check_negatives(others, query)

    valid = fit_valid("losses.info_nce", valid, query.shape[:-1])
    unit = widened if normalized else l2_normalize
    query = unit(_valid_rows(query, valid))
    key = unit(_valid_rows(key, valid))
    dtype = query.dtype if product_dtype is None else product_dtype
    check("losses.info_nce", "product_dtype", dtype, dtype.is_floating_point, "a floating dtype")
    check("losses.info_nce", "product_dtype", dtype, dtype.itemsize > 1, "one of 16 bits or more")
    with full_precision(query):
        if others is None:
            loss = _info_nce_in_set(query, key, valid, temperature, dtype)
        else:
            if not normalized:
                others = l2_normalize(_valid_rows(others, use))
            loss = _info_nce_of_negatives(query, key, others, use, temperature, dtype)
    return _reduce(loss, valid, reduction)


def _check_negatives(others: Tensor, query: Tensor) -> None:
    same_width = others.shape[-1] == query.shape[-1]
    if not (same_width and broadcasts(others.shape[:-2], query.shape[:-2])):
        raise TypeError(
            f"densekit.losses.info_nce: argument 'negatives' should be (m, {query.shape[-1]}), or "
            f"broadcast to batch={tuple(query.shape[:-2])}, but a tensor of shape "
            f"{tuple(others.shape)} was given."
        )


def _info_nce_in_set(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    temperature: Scalar,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the loss of each query, where the other valid keys of its set are the negatives."""
    logits = (query.to(dtype) @ key.mT.to(dtype)).to(query.dtype)
    logits = logits / in_range(temperature, logits.dtype)
    positive = logits.diagonal(dim1=-2, dim2=-1)
    if valid is not None:
        own = torch.eye(query.shape[-2], dtype=torch.bool, device=query.device)
        logits = torch.where(valid[..., None, :] | own, logits, -torch.inf)
    return logits.logsumexp(-1) - positive


def _info_nce_of_negatives(
    query: Tensor,
    key: Tensor,
    others: Tensor,
    use: Tensor | None,
    temperature: Scalar,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the loss of each query with the negatives `others`, those that `use` allows."""
    temperature = in_range(temperature, query.dtype)
    positive = (query * key).sum(-1) / temperature
    if use is None:
        use = torch.ones(others.shape[:-1], dtype=torch.bool, device=others.device)
    rows = query.flatten(0, -2) if others.ndim == 2 else query  # shared: one plain product
    if _in_forward_mode():
        total = _logsumexp(rows / temperature, others, use, dtype)
    else:
        total, _ = _LogSumExp.apply(rows / temperature, others, use, dtype)
    # log(1 + exp(x)); with this threshold all derivatives are finite, and float64 is exact.
    return torch.nn.functional.softplus(total.view(positive.shape) - positive, threshold=60)


@typed
def self_distillation(
    student: Float[Tensor, "*batch d"],
    teacher: Float[Tensor, "*batch d"],
    center: Float[Tensor, " d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.07,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute the cross-entropy H(P_t, P_s) of a centered, sharpened teacher and a student.

    Channels come last: `student` and `teacher` are rows (..., d). For maps use `map_to_rows`.

    $$
    P_t = \mathrm{softmax}((z - c) / t_t) , \qquad
    P_s = \mathrm{softmax}(p / t_s) , \qquad
    H = -\sum_l P_{t,l} \log P_{s,l}
    $$

    with the teacher's logits $z$, the center $c$ and the student's logits $p$. The teacher is
    detached. A category whose teacher probability is 0 adds nothing.

    Args:
        student: Logits of the student's head; the gradient flows to them only. Minus infinity
            excludes a category, as in `cross_entropy_similarity`.
        teacher: Logits of the teacher's head; they are detached. Minus infinity excludes a
            category, whatever the center is.
        center: Running mean of the teacher's logits
            ([`update_center`][densekit.losses.update_center]). Centering prevents one output from
            dominating; sharpening prevents uniform outputs.
        valid: Entries to use, of shape `*batch`; an axis may have size 1. By default all.
        student_temperature: Divisor of the student's logits; it may be a tensor.
        teacher_temperature: Divisor of the teacher's logits; it is smaller than the student's. It
            may be a tensor, which is detached.
        reduction: "mean" over the valid entries, or "none" for one value for each entry (0 where
            not valid).

    Returns:
        The loss, not negative, in at least float32, in nats.

    Raises:
        TypeError: The shapes differ, or rows look like maps.
        ValueError: A temperature is not positive.

    Examples:
        >>> logits = torch.zeros(3, 4)
        >>> self_distillation(logits, logits, torch.zeros(4))  # log 4
        tensor(1.3863)

    References:
        CrOC, Eq 3 to 6; DINO, Eq 1 to 4.
    """
    where = "losses.self_distillation"
    check_temperature(where, student_temperature, "student_temperature")
    check_temperature(where, teacher_temperature, "teacher_temperature")
    refuse_maps(where, "student", student)

    valid = fit_valid(where, valid, student.shape[:-1])
    logits = widened(teacher.detach())
    # The logit of an excluded category stays minus infinity. Where a whole step excluded it, it has
    # no mean.
    center = torch.where(center == -torch.inf, 0.0, center)
    centered = torch.where(logits == -torch.inf, logits, logits - center)
    # Detached with the teacher, by the loss below.
    sharp = centered / in_range(teacher_temperature, centered.dtype)
    student = widened(student)
    student = student / in_range(student_temperature, student.dtype)
    return cross_entropy_similarity(student, sharp, valid, reduction=reduction)


@typed
def kernel_alignment(
    student: Float[Tensor, "*batch n d"],
    teacher: Float[Tensor, "*batch n e"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    unit: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute 1 - CKA: whether two sets of tokens have the same similarities, each set centered.

    Channels come last: `student` and `teacher` are rows (..., n, d). For maps use `map_to_rows`.

    With the tokens $S$ and $T$ of one image, each about its mean over the valid tokens,

    $$
    CKA = \frac{|S^T T|^2}{|S^T S| |T^T T|} ,
    $$

    in Frobenius norms: the cosine of the centered n x n matrices of products $S S^T$ and $T T^T$.
    It compares structures: rotating or mirroring all tokens of a side, scaling them by one factor,
    or moving them by one vector changes nothing, and the two sides may have different numbers of
    channels. A token counts by its squared distance to the mean, so a few tokens of high norm
    dominate; `unit` prevents this.

    Args:
        student: Tokens of the student; the gradient flows to them only.
        teacher: Tokens of the teacher at the same n points; they are detached.
        valid: Tokens to use, of shape `*batch n`; an axis may have size 1. By default all.
        unit: Scale each token to length one first.
        reduction: "mean" over the images with two or more valid tokens, or "none" for one value for
            each image (0 with fewer valid tokens).

    Returns:
        The loss in [0, 1], in at least float32; 1 with a gradient of zero where all tokens of one
        side are equal but for rounding.

    Raises:
        TypeError: The shapes differ, or rows look like maps.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> turned = torch.stack([x[:, 1], -x[:, 0]], 1)
        >>> kernel_alignment(3 * x + 1, turned).abs() < 1e-6
        tensor(True)

    References:
        PaKA (arXiv 2509.05606); Kornblith et al., Similarity of Neural Network Representations
        Revisited, Eq 3 to 5.
    """
    where = "losses.kernel_alignment"
    refuse_maps(where, "student", student)
    refuse_maps(where, "teacher", teacher)
    valid = fit_valid(where, valid, student.shape[:-1])
    own = _spread(student, valid, unit)
    other = _spread(teacher.detach(), valid, unit)
    dtype = torch.promote_types(own.dtype, other.dtype)
    cosine = _kernel_cosine(own.to(dtype), other.to(dtype))

    return _reduce((1 - cosine).clamp(0, 1), _count_rows(student, valid) > 1, reduction)


def _count_rows(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Count the valid rows of each set."""
    if valid is None:
        return torch.full(rows.shape[:-2], rows.shape[-2], device=rows.device)
    return valid.sum(-1)


def _spread(rows: Tensor, valid: Tensor | None, unit: bool) -> Tensor:
    """Center the valid rows of each set, and scale the set to norm one; a set of equal rows is 0.

    The rows are taken about the first valid one, so that equal rows give exactly zero.
    """
    rows = _valid_rows(widened(rows), valid)
    rows = l2_normalize(rows) if unit else rows
    if valid is None:
        count = max(1, rows.shape[-2])
        first = rows[..., :1, :]
    else:
        count = valid.sum(-1)[..., None, None].clamp(min=1)
        is_first = valid & (valid.cumsum(-1) == 1)
        first = torch.where(is_first[..., None], rows, 0.0).sum(-2, keepdim=True)

    moved = _valid_rows(rows - first.detach(), valid)
    centered = _valid_rows(moved - moved.sum(-2, keepdim=True) / count, valid)
    centered = torch.where(has_spread(centered, rows)[..., None, None], centered, 0.0)
    return l2_normalize(centered.flatten(-2)).view(centered.shape)


def _kernel_cosine(rows: Tensor, others: Tensor) -> Tensor:
    """Compute the cosine of `rows rows^T` and `others others^T`; 0 where one of them is 0."""
    n = rows.shape[-2]
    d = rows.shape[-1]
    e = others.shape[-1]
    with full_precision(rows):
        if n * (d + e) < d * d + d * e + e * e:  # the same numbers, from matrices n x n
            own = rows @ rows.mT
            other = others @ others.mT
            product = (own * other).sum((-2, -1))
        else:
            own = rows.mT @ rows
            other = others.mT @ others
            product = (rows.mT @ others).square().sum((-2, -1))
    square = own.square().sum((-2, -1)) * other.square().sum((-2, -1))
    return safe_divide(product, torch.where(square > 0, square, torch.inf).sqrt())


@typed
def mutual_information_loss(
    query: Float[Tensor, "*batch n d"],
    key: Float[Tensor, "*batch n d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    group: Group = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute the negative mutual information of the categories of two views (IIC).

    Channels come last: `query` and `key` are rows (..., n, d) of logits. For maps use
    `map_to_rows`.

    The d channels are categories. With the probabilities $z_i$ and $z'_i$ of row i in both views,

    $$
    P = \frac{1}{2n} \sum_i (z_i z_i'^T + z'_i z_i^T)
    \qquad \text{and} \qquad
    -I = -\sum_{c, k} P_{ck} \log \frac{P_{ck}}{p_c p_k} ,
    $$

    where $p_c$ is the sum of row c of P. The loss is least if the views agree on one category for
    each row, and all categories are equally frequent. It is 0 if all rows have the same category.

    Args:
        query: Logits of one view.
        key: Logits of the other view, of the same things row by row.
        valid: Rows to use, of shape `*batch n`; an axis may have size 1. By default all. One value
            for each image is `valid[:, None]`.
        group: Processes over which the rows of every set are distributed, each with any number of
            rows. P is that of all rows, and so are the averaged gradients. None means that this
            process has all rows.
        reduction: "mean" over the sets with a valid row, or "none" for one value for each set (0
            without one).

    Returns:
        The loss in [-log d, 0], in nats, in at least float32. A set is the n rows of one index of
        `*batch`: flatten the axes of all rows that belong together.

    Raises:
        TypeError: The shapes differ, or rows look like maps.

    Examples:
        >>> logits = 50 * torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> mutual_information_loss(logits, logits).round(decimals=3)
        tensor(-0.6930)

    References:
        Ji et al., Invariant Information Clustering (IIC), Eq 2 to 5.
    """
    where = "losses.mutual_information_loss"
    refuse_maps(where, "query", query)
    refuse_maps(where, "key", key)
    valid = fit_valid(where, valid, query.shape[:-1])
    own = _shares(query, valid)
    other = _shares(key, valid)
    dtype = torch.promote_types(own.dtype, other.dtype)
    with full_precision(own):
        products = all_sum(own.to(dtype).mT @ other.to(dtype), group)
    total = products.sum((-2, -1), keepdim=True)
    joint = safe_divide((products + products.mT) / 2, total)

    loss = _entropy(joint, (-2, -1)) - 2 * _entropy(joint.sum(-1), (-1,))
    loss = loss.clamp(-math.log(max(1, query.shape[-1])), 0)  # beyond them it is rounding
    return _reduce(loss, total[..., 0, 0] > 0, reduction)


def _shares(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Return the probabilities of the rows; zeros where they are not valid."""
    return _valid_rows(_valid_rows(widened(logits), valid).softmax(-1), valid)


def _entropy(shares: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Compute the entropy; a share of zero adds nothing, and has no gradient."""
    return -(shares * torch.where(shares > 0, shares, 1.0).log()).sum(axes)


@typed
def gram_loss(
    student: Float[Tensor, "*batch n d"],
    teacher: Float[Tensor, "*batch n e"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    clip_negative: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute Gram anchoring: the mean squared difference of the cosines of all pairs of tokens.

    Channels come last: `student` and `teacher` are rows (..., n, d). For maps use `map_to_rows`.

    With the tokens of one image scaled to length one, $S$ and $T$, the loss is
    $|S S^T - T T^T|^2 / n^2$. The paper sums over the pairs; the mean makes the weight independent
    of the number of tokens. Multiplying a token by a number above 0, or rotating or mirroring all
    tokens of a side changes nothing; moving all tokens by one vector does, unlike in
    `kernel_alignment`.

    Args:
        student: Tokens of the student; the gradient flows to them only.
        teacher: Tokens of the Gram teacher at the same n points, such as those of the weights at
            the start; they are detached. They may have another number of channels.
        valid: Tokens to use, of shape `*batch n`; an axis may have size 1. By default all.
        clip_negative: Count cosines below 0 as 0, on both sides.
        reduction: "mean" over the images with a valid token, or "none" for one value for each image
            (0 without a valid token).

    Returns:
        The loss in [0, 4], in at least float32; the cosines of a zero vector are 0.

    Raises:
        TypeError: The shapes differ, or rows look like maps.

    Examples:
        >>> x = torch.eye(2)
        >>> gram_loss(x, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # two of four pairs differ by 1
        tensor(0.5000)

    References:
        DINOv3 (arXiv 2508.10104), Eq 2.
    """
    where = "losses.gram_loss"
    refuse_maps(where, "student", student)
    refuse_maps(where, "teacher", teacher)
    valid = fit_valid(where, valid, student.shape[:-1])
    grams = []
    for tokens in (student, teacher.detach()):
        # What is not valid becomes zeros, whose products are equal on both sides.
        rows = l2_normalize(_valid_rows(tokens, valid))
        with full_precision(rows):
            gram = rows @ rows.mT
        if clip_negative:
            gram = gram.relu()
        grams.append(gram)

    total = (grams[0] - grams[1]).square().sum((-2, -1))
    count = _count_rows(student, valid)
    return _reduce(total / count.clamp(min=1).square(), count > 0, reduction)


@typed
def neighbor_order_loss(
    student: Float[Tensor, "*batch n d"],
    teacher: Float[Tensor, "*batch n d"],
    references: Float[Tensor, "*batch r d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    steepness: Scalar = 100.0,
    teacher_steepness: Scalar | None = None,
    metric: Metric = "cosine",
    network: Network = "bitonic",
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute NeCo's loss: the student orders the references by similarity as the teacher does.

    Channels come last: `student` and `teacher` are rows (..., n, d). For maps use `map_to_rows`.

    The similarities of each point with the r references are sorted by `soft_sort`, in ascending
    order, on both sides. With the plans $q$ of the teacher and $p$ of the student, the loss of a
    point is $-\sum_{ij} q_{ij} \log p_{ij} / r$ over the references i and their ranks j. It is
    never below the entropy of $q$ (its value at student = teacher, with one steepness), so report
    it minus that.

    The backward pass sorts again, some points at a time, so that the plans of all layers are never
    in memory together: with 49 points and references of 64 images, 0.4 GB instead of 1.7 GB on a
    CPU, in about the same time.

    Args:
        student: Points of the student; the gradient flows to them only.
        teacher: The same n points of the teacher; they are detached.
        references: r rows of the teacher to compare with; they are detached. For one set that all
            images share, expand it.
        valid: Points to use, of shape `*batch n`; an axis may have size 1. By default all.
        steepness: Steepness of the student's comparisons, as in `soft_sort`. Its effect depends on
            the spread of the similarities.
        teacher_steepness: Steepness of the teacher's comparisons; by default the student's.
        metric: "cosine", or "euclidean" for distances, which put the nearest reference first.
        network: As in `soft_sort`.
        reduction: "mean" over the valid points, or "none" for one value for each point (0 where not
            valid).

    Returns:
        The loss, not negative, in at least float32, in nats; 0 without references.

    Raises:
        TypeError: The shapes differ, or rows look like maps.
        ValueError: A steepness is not above 0.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> references = torch.tensor([[3.0, 1.0], [0.0, 1.0]])
        >>> neighbor_order_loss(x, x, references, steepness=1e6) < 0.01
        tensor(True)
        >>> neighbor_order_loss(-x, x, references, steepness=1e6) > 5  # the opposite order
        tensor(True)

    References:
        NeCo (arXiv 2408.11054), Sec 3; Petersen et al., Monotonic Differentiable Sorting Networks.
    """
    where = "losses.neighbor_order_loss"
    if teacher_steepness is None:
        teacher_steepness = steepness
    check_temperature(where, steepness, "steepness")
    check_temperature(where, teacher_steepness, "teacher_steepness")
    refuse_maps(where, "student", student)

    valid = fit_valid(where, valid, student.shape[:-1])
    references = references.detach()
    near = _proximity(_valid_rows(student, valid), references, metric)
    target = _proximity(_valid_rows(teacher.detach(), valid), references, metric)
    sort = partial(soft_sort, steepness=steepness, network=network)
    teacher_sort = partial(soft_sort, steepness=teacher_steepness, network=network)

    parts = [
        recomputed(lambda x, y: _order_cost(sort(x).plan, teacher_sort(y).plan), some, wanted)
        for some, wanted in _plans_at_a_time(near, target)
    ]
    loss = torch.cat(parts).view(near.shape[:-1])
    return _reduce(loss, valid, reduction)


def _order_cost(plan: Tensor, wanted: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the rows of plans (b, r, r)."""
    log_plan = plan.clamp(min=torch.finfo(plan.dtype).tiny).log()  # a share may be rounded to zero
    return -(wanted.detach() * log_plan).sum((-2, -1)) / max(1, plan.shape[-1])


def _plans_at_a_time(near: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split similarities (..., r) into parts (b, r), whose plans fit in memory layer by layer."""
    r = near.shape[-1]
    # The layers of one part, some 50 times as many numbers, are in memory in the backward pass.
    rows = max(1, 2 ** (24 if near.is_cuda else 19) // max(1, r * r))
    flat = [x.reshape(math.prod(x.shape[:-1]), r).split(rows) for x in (near, target)]
    return list(zip(*flat, strict=True))


def _proximity(rows: Tensor, references: Tensor, metric: Metric) -> Tensor:
    """Compute the cosines, or the distances, of each row and each reference."""
    if metric == "cosine":
        own = l2_normalize(rows)
        other = l2_normalize(references)
        dtype = torch.promote_types(own.dtype, other.dtype)
        with full_precision(own):
            return own.to(dtype) @ other.to(dtype).mT
    difference = widened(rows)[..., :, None, :] - widened(references)[..., None, :, :]
    square = difference.square().sum(-1)
    apart = square > 0  # at zero distance the root has no slope
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


@typed
def neighbor_distribution_loss(
    student: Float[Tensor, "*batch n d"],
    teacher: Float[Tensor, "*batch n d"],
    references: Float[Tensor, "*batch r d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    allowed: Bool[Tensor, "*batch n r"] | None = None,
    *,
    student_temperature: Scalar = 0.1,
    teacher_temperature: Scalar = 0.04,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Compute the cross-entropy of the points' similarities with references, teacher to student.

    Channels come last: `student` and `teacher` are rows (..., n, d). For maps use `map_to_rows`.

    Over the allowed references $R_i$, with the teacher's point $t$ and the student's point $s$,

    $$
    P_t = \mathrm{softmax}(\cos(t, R) / t_t) , \qquad
    P_s = \mathrm{softmax}(\cos(s, R) / t_s) ,
    $$

    and the loss of a point is $-\sum_i P_{t,i} \log P_{s,i}$. It is the loss of
    `neighbor_order_loss` without the sorting. It is never below the entropy of $P_t$, so report it
    minus that.

    Args:
        student: Points of the student; the gradient flows to them only.
        teacher: The same n points of the teacher; they are detached.
        references: r rows of the teacher to compare with; they are detached. For one set that all
            images share, expand it.
        valid: Points to use, of shape `*batch n`; an axis may have size 1. By default all.
        allowed: References of each point; by default all. Leave out the point itself and its image.
            A reference that no point of its set is allowed to use changes nothing, even if it is
            NaN. A point without a reference does not count.
        student_temperature: Divisor of the student's cosines; it may be a tensor.
        teacher_temperature: Divisor of the teacher's cosines; it is smaller than the student's. It
            may be a tensor, which is detached.
        reduction: "mean" over the points that count, or "none" for one value for each point (0
            where it does not count).

    Returns:
        The loss, not negative, in at least float32, in nats.

    Raises:
        TypeError: The shapes differ, or rows look like maps.
        ValueError: A temperature is not positive.

    Examples:
        >>> x = torch.eye(4)
        >>> apart = ~torch.eye(4, dtype=torch.bool)
        >>> neighbor_distribution_loss(x, x, x, allowed=apart)  # log 3
        tensor(1.0986)

    References:
        ReSSL (arXiv 2107.09282), Eq 3 to 5, here for patches.
    """
    where = "losses.neighbor_distribution_loss"
    check_temperature(where, student_temperature, "student_temperature")
    check_temperature(where, teacher_temperature, "teacher_temperature")
    refuse_maps(where, "student", student)

    use = fit_valid(where, valid, student.shape[:-1])
    if allowed is None:
        pairs = (*student.shape[:-1], references.shape[-2])
        allowed = student.new_ones(pairs, dtype=torch.bool)
    if use is not None:
        allowed = allowed & use[..., None]

    counted = allowed.any(-1)
    references = _valid_rows(references.detach(), allowed.any(-2))

    def logits(points: Tensor, temperature: Scalar) -> Tensor:
        near = _proximity(_valid_rows(points, counted), references, "cosine")
        near = near / in_range(temperature, near.dtype)
        return torch.where(allowed, near, -torch.inf)

    student_logits = logits(student, student_temperature)
    teacher_logits = logits(teacher.detach(), teacher_temperature)
    distances = _cross_entropy(student_logits, teacher_logits, counted)
    return _reduce(distances, counted, reduction)


@typed
def update_center(
    center: Float[Tensor, " d"],
    teacher: Float[Tensor, "*batch d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    momentum: float = 0.9,
    group: Group = None,
) -> Float[Tensor, " d"]:
    r"""Update the running mean of the teacher's logits.

    Channels come last: `teacher` has rows (..., d). For maps use `map_to_rows`.

    $$
    c \leftarrow m c + (1 - m) \bar{z}
    $$

    with the mean $\bar{z}$ of the teacher's logits.

    Args:
        center: The previous mean; zeros at the start. No gradient flows.
        teacher: Logits of this step, of all views. No gradient flows.
        valid: Entries to use, of shape `*batch`; an axis may have size 1. By default all.
        momentum: Weight of the previous mean.
        group: Processes that share the mean. Every valid entry counts once, also when the processes
            have different numbers of entries. None means this process alone.

    Returns:
        The new mean, in the dtype of `center`; the previous mean if no process has a valid entry.
        The mean of a category is that of the entries that do not exclude it by minus infinity;
        where all do, it is minus infinity, which `self_distillation` takes as 0.
        A momentum of 0 gives the mean of this step, and 1 the previous mean, also where the other
        one is infinite or NaN.

    Raises:
        TypeError: The shapes differ, or rows look like maps.
        ValueError: The momentum is outside [0, 1].

    Examples:
        >>> update_center(torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), momentum=0.5)
        tensor([1.0000, 1.5000])

    References:
        DINO, Eq 4; CrOC, Sec 4.1 (one center for each head).
    """
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"densekit.losses.update_center: momentum is {momentum}; give a weight of the "
            "previous mean from 0 to 1."
        )

    refuse_maps("losses.update_center", "teacher", teacher)
    center = center.detach()
    valid = fit_valid("losses.update_center", valid, teacher.shape[:-1])
    rows = widened(_valid_rows(teacher.detach(), valid))
    rows = rows.reshape(math.prod(rows.shape[:-1]), len(center))  # of no channels too
    used = torch.ones_like(rows, dtype=torch.bool)
    if valid is not None:
        used = used & valid.flatten()[:, None]
    included = used & (rows != -torch.inf)  # minus infinity excludes a category
    counts = [x.sum(0).to(rows.dtype) for x in (included, used)]
    sums = torch.where(included, rows, 0.0).sum(0)
    total, parts, count = all_sum(torch.stack([sums, *counts]), group)  # in one message
    mean = torch.where(parts > 0, total / parts.clamp(min=1), -torch.inf)

    if momentum == 1:  # at an end the other one does not count: zero times infinity is NaN
        new = center
    elif 1 - momentum == 1:
        new = mean
    else:
        new = momentum * center + (1 - momentum) * mean
    return torch.where(count > 0, new, center.to(new.dtype)).to(center.dtype)


@typed
def symmetric_loss(
    loss: Callable[..., Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *args,
    **kwargs,
) -> Float[Tensor, "*reduced"]:
    """Average a loss over both directions: view 1 with view 2, and view 2 with view 1.

    Channels come last, as in the loss. The loss also decides which side is detached:
    `negative_cosine` detaches the teachers, and `info_nce` neither its queries nor its keys.

    Args:
        loss: A function of student and teacher, such as `negative_cosine`.
        students: Predictions of view 1 and view 2.
        teachers: Projections of view 1 and view 2.
        *args: Further arguments of the loss, the same in both directions.
        **kwargs: Further keyword arguments of the loss, the same in both directions.

    Returns:
        `loss(student1, teacher2) / 2 + loss(student2, teacher1) / 2`.

    Raises:
        ValueError: There are not exactly two students and two teachers.

    Examples:
        >>> p, z = torch.eye(2), torch.ones(2, 2)
        >>> symmetric_loss(negative_cosine, (p, p), (z, z))
        tensor(-0.7071)

    References:
        DenseSiam, Eq 1 and 5; SimSiam, Eq 2.
    """
    for name, pair in {"students": students, "teachers": teachers}.items():
        count = len(pair)
        check("losses.symmetric_loss", f"the number of {name}", count, count == 2, "2")

    forth = loss(students[0], teachers[1], *args, **kwargs)
    return (forth + loss(students[1], teachers[0], *args, **kwargs)) / 2


@typed
def variance_covariance(
    rows: Float[Tensor, "*batch n d"],
    valid: Bool[Tensor, "*valid"] | None = None,
    *,
    target: float = 1.0,
    epsilon: float = 1e-4,
    group: Group = None,
) -> VarianceCovariance:
    r"""Compute VICReg's variance and covariance: channels keep a spread, and do not repeat others.

    Channels come last: n rows (..., n, d) of a set. For maps use `map_to_rows`. VICReg's third
    term, the distance of the two views, is `torch.nn.functional.mse_loss`.

    With the covariance matrix $C = \sum_i (z_i - m)(z_i - m)^T / (n - 1)$ of the rows $z_i$ about
    their mean $m$, the terms are

    $$
    \frac{1}{d} \sum_j \max(0, \gamma - \sqrt{C_{jj} + \epsilon})
    \qquad \text{and} \qquad
    \frac{1}{d} \sum_{i \ne j} C_{ij}^2
    $$

    with the target $\gamma$. Add them for each view, in the paper with the weights 25 and 1.

    Args:
        rows: n rows in each set, not normalized. Statistics are over the rows of one set: flatten
            the axes of all rows that belong together, such as (b, n, d) to (b n, d), or exchange
            them for statistics of each position.
        valid: Rows to use, of shape `*batch n`; an axis may have size 1. By default all. One value
            for each image is `valid[:, None]`.
        target: Standard deviation below which a channel is pulled apart.
        epsilon: Term under the root, which bounds the gradient of a channel that has collapsed.
        group: Processes over which the rows of every set are distributed, each with any number of
            rows. The terms are those of all rows, and so are the averaged gradients. None means
            that this process has all rows.

    Returns:
        The two terms of each set, in at least float32; both 0 for fewer than two valid rows.

    Raises:
        TypeError: `valid` does not fit, or rows look like maps.
        ValueError: The target is negative, or epsilon is not above 0.

    Examples:
        >>> terms = variance_covariance(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        >>> terms.variance.round(decimals=2), terms.covariance.round(decimals=2)
        (tensor(0.), tensor(4.))

    References:
        VICReg, Eq 1 to 4.
    """
    where = "losses.variance_covariance"
    check(where, "target", target, target >= 0, "0 or more")
    check(where, "epsilon", epsilon, epsilon > 0, "one above 0")
    refuse_maps(where, "rows", rows)

    valid = fit_valid(where, valid, rows.shape[:-1])
    rows = widened(_valid_rows(rows, valid))
    ones = rows.new_ones((*rows.shape[:-1], 1))
    total = _valid_rows(torch.cat([rows, ones], -1), valid).sum(-2, keepdim=True)
    total = all_sum(total, group)  # sums and number in one message
    count = total[..., -1:]
    mean = total[..., :-1] / count.clamp(min=1)
    centered = _valid_rows(rows - mean, valid)
    with full_precision(rows):
        products = all_sum(centered.mT @ centered, group)
    covariance = products / (count - 1).clamp(min=1)

    width = max(rows.shape[-1], 1)
    own = torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
    spread = (covariance.diagonal(dim1=-2, dim2=-1) + epsilon).sqrt()
    variance = (target - spread).relu().sum(-1) / width
    others = torch.where(own, 0.0, covariance).square().sum((-2, -1)) / width
    return VarianceCovariance(torch.where(count.squeeze((-2, -1)) > 1, variance, 0.0), others)


class _LogSumExp(Function):
    """Compute `logsumexp(query @ others.mT)` over `use` in parts, with its gradient for the query.

    The logits of 49 patches of 256 images and a bank of 65,536 keys would be an array of 3 GB,
    several times. The gradient is the mean of the others, weighted by their softmax, and is
    computed in the same pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, others: Tensor, use: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        biased = _append(query, query.new_ones(query.shape[:-1])).to(dtype)
        most = query.new_full((*query.shape[:-1], 1), -torch.inf)
        mass = torch.zeros_like(most)
        weighted = torch.zeros_like(query)
        for keys in _some_at_a_time(query, others, use, dtype):
            logits = (biased @ keys.mT).to(query.dtype)
            new_most = torch.maximum(most, logits.amax(-1, keepdim=True))
            weight = logits.sub_(new_most).exp_()
            fade = (most - new_most).exp()
            mass = mass * fade + weight.sum(-1, keepdim=True)
            weighted = weighted * fade + (weight.to(dtype) @ keys[..., :-1]).to(query.dtype)
            most = new_most

        mass = mass.clamp(min=1)  # it is at least 1 if there is any column
        return (most + mass.log())[..., 0], weighted / mass

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.product_dtype = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        query, others, use, total, mean = ctx.saved_tensors
        gradient = gradients[0][..., None]
        if not (torch.is_grad_enabled() or ctx.needs_input_grad[1]):
            return mean * gradient, None, None, None

        # Compute it again, for second derivatives or for the gradient with respect to the others.
        dtype = ctx.product_dtype
        biased = _append(query, query.new_ones(query.shape[:-1])).to(dtype)
        mean = torch.zeros_like(query)
        of_others = [torch.zeros_like(others[..., :0, :])]
        with full_precision(query):
            for keys in _some_at_a_time(query, others, use, dtype):
                logits = (biased @ keys.mT).to(query.dtype)
                share = logits.sub_(total[..., None]).exp_().to(dtype)
                mean = mean + (share @ keys[..., :-1]).to(query.dtype)
                part = share.mT @ (query * gradient).to(dtype)
                part = part.sum_to_size(*others.shape[:-2], *part.shape[-2:])
                of_others.append(part.to(others.dtype))
        return mean * gradient, torch.cat(of_others, -2), None, None


def _logsumexp(query: Tensor, others: Tensor, use: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the same of plain operations, which have derivatives of every order and mode.

    A `Function` with a rule for forward mode is wrong without a warning where forward modes are
    nested (https://github.com/pytorch/pytorch/issues/197867).
    """
    biased = _append(query, query.new_ones(query.shape[:-1])).to(dtype)
    parts = _some_at_a_time(query, others, use, dtype)
    totals = [(biased @ keys.mT).to(query.dtype).logsumexp(-1) for keys in parts]
    totals.append(query.new_full(query.shape[:-1], -torch.inf))  # of no negatives at all
    return torch.stack(totals, -1).logsumexp(-1)


def _in_forward_mode() -> bool:
    """Return whether a forward derivative is being computed, such as the outer one of a Hessian."""
    return torch.autograd.forward_ad._current_level >= 0


def _append(x: Tensor, last: Tensor) -> Tensor:
    return torch.cat([x, last[..., None]], -1)


def _some_at_a_time(
    query: Tensor, others: Tensor, use: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield parts of `others` with a last column, which the product adds: 0, or a large negative.

    It is finite, since minus infinity would be NaN without any valid negative.
    """
    most = 2 ** (27 if query.is_cuda else 22)  # numbers of a product; a CPU's cache can store them
    count = max(256, most // max(1, math.prod(query.shape[:-1])))
    far_below = torch.finfo(dtype).min / 2
    for rows, allowed in zip(others.split(count, -2), use.split(count, -1), strict=True):
        if allowed.shape[-1]:
            part = _valid_rows(rows.to(dtype), allowed)
            last = part.new_zeros(allowed.shape).masked_fill(~allowed, far_below)
            yield _append(part, last)


def _valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """Replace the rows that are not valid by zeros, so that a NaN in them reaches no gradient."""
    return x if valid is None else torch.where(valid[..., None], x, 0.0)


def _reduce(values: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return masked_mean(values, valid)
    return values if valid is None else torch.where(valid, values, 0.0)
