"""Losses against closed forms, torch's own, and the authors' numbers; and what `valid` promises."""

import inspect
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from strategies import BATCHES, batches, flips, generators, tensors, uniform, valid_rows
from torch.utils._pytree import tree_leaves
import densekit
from densekit import (
    Negatives,
    affinity_matrix,
    cross_entropy_similarity,
    gram_loss,
    gridsample_pairs,
    info_nce,
    kernel_alignment,
    knn_votes,
    l2_normalize,
    map_to_rows,
    mutual_information_loss,
    negative_cosine,
    neighbor_distribution_loss,
    neighbor_order_loss,
    object_knn,
    pool_masks,
    propagate_labels,
    propagate_video,
    sample_view_pairs,
    self_distillation,
    soft_sort,
    symmetric_loss,
    update_center,
    variance_covariance,
)

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

DATA = Path(__file__).parent / "data"
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
HALVES = [torch.float16, torch.bfloat16]
SIMILARITIES = [negative_cosine, cross_entropy_similarity]


def in_set(query, key, valid=None, **options):
    return info_nce(query, key, valid=valid, temperature=0.2, **options)


def distillation(student, teacher, valid=None, **options):
    center = torch.linspace(-1, 1, student.shape[-1], dtype=torch.float32)
    return self_distillation(student, teacher, center, valid, **options)


def references(student, count=3):
    """The same rows for every set, in float32."""
    d = student.shape[-1]
    rows = torch.arange(count * d, dtype=torch.float32).add(1).sin().view(count, d)
    return rows.expand(*student.shape[:-2], count, d)


def order(student, teacher, valid=None, **options):
    return neighbor_order_loss(
        student, teacher, references(student), valid, steepness=3.0, **options
    )


def distribution(student, teacher, valid=None, **options):
    return neighbor_distribution_loss(student, teacher, references(student), valid, **options)


LOSSES = [*SIMILARITIES, in_set, distillation, order, distribution]
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
similarities = pytest.mark.parametrize("loss", SIMILARITIES, ids=lambda f: f.__name__)
halves = pytest.mark.parametrize("dtype", HALVES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def pairs(draw, batch=None, rows=None):
    """Student, teacher and valid, `(*batch, n, d)`."""
    batch = draw(batches()) if batch is None else batch
    n = draw(st.integers(0, 5)) if rows is None else rows
    shape = (*batch, n, draw(st.integers(1, 5)))
    return draw(tensors(shape)), draw(tensors(shape)), draw(valid_rows(shape[:-1]))


def mean_of_valid(values, valid):
    return values[valid].mean() if valid.any() else values.new_zeros(())


# ----------------------------------------------------------------------- closed forms, torch


@given(pairs())
def test_negative_cosine_is_torchs(pair):
    student, teacher, valid = pair
    want = -F.cosine_similarity(student, teacher, dim=-1)
    torch.testing.assert_close(negative_cosine(student, teacher, reduction="none"), want, **CLOSE)
    torch.testing.assert_close(negative_cosine(*pair), mean_of_valid(want, valid), **CLOSE)


@given(pairs())
def test_cross_entropy_is_torchs_with_soft_targets(pair):
    student, teacher, valid = pair
    d = student.shape[-1]
    want = F.cross_entropy(
        student.reshape(-1, d), teacher.reshape(-1, d).softmax(-1), reduction="none"
    ).reshape(valid.shape)
    got = cross_entropy_similarity(student, teacher, reduction="none")
    torch.testing.assert_close(got, want, **CLOSE)
    got = cross_entropy_similarity(*pair)
    torch.testing.assert_close(got, mean_of_valid(want, valid), **CLOSE)


@given(pairs(), st.floats(0.05, 5))
def test_in_set_info_nce_is_torchs_cross_entropy_on_the_matrix(pair, temperature):
    query, key, valid = pair
    n = query.shape[-2]
    logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT / temperature
    target = torch.arange(n).expand(logits.shape[:-1]).reshape(-1)
    want = F.cross_entropy(logits.reshape(len(target), n), target, reduction="none")
    got = info_nce(query, key, temperature=temperature, reduction="none")
    torch.testing.assert_close(got, want.reshape(valid.shape), rtol=1e-11, atol=1e-11)
    got = info_nce(query, key, temperature=temperature)
    want = want.mean() if want.numel() else want.sum()
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@given(st.data())
def test_given_negatives_are_torchs_cross_entropy_with_the_key_first(data):
    query, key, valid = data.draw(pairs(), label="pair")
    m = data.draw(st.integers(0, 4), label="m")
    shared = data.draw(st.booleans(), label="shared")
    shape = (m, query.shape[-1]) if shared else (*query.shape[:-2], m, query.shape[-1])
    negatives = data.draw(tensors(shape), label="negatives")
    q, k, others = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ others.mT], -1) / 0.2
    rows = logits.reshape(math.prod(valid.shape), m + 1)
    want = F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long), reduction="none")
    want = want.reshape(valid.shape)
    got = info_nce(query, key, negatives, temperature=0.2, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    got = info_nce(query, key, negatives, valid, temperature=0.2)
    torch.testing.assert_close(got, mean_of_valid(want, valid), rtol=1e-11, atol=1e-11)


def test_closed_forms():
    eye = torch.eye(3, dtype=torch.float64)
    assert negative_cosine(eye, eye) == -1
    assert negative_cosine(eye, -eye) == 1
    assert negative_cosine(eye, eye.roll(1, 0)) == 0
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    torch.testing.assert_close(cross_entropy_similarity(zeros, zeros).item(), math.log(5))
    # Orthogonal rows: one cosine of 1 against n - 1 of 0.
    want = math.log(1 + 2 * math.exp(-1 / 0.1))
    torch.testing.assert_close(info_nce(eye, eye, temperature=0.1).item(), want)
    # All alike: each of the n is as likely.
    same = torch.ones(7, 3, dtype=torch.float64)
    torch.testing.assert_close(info_nce(same, same, temperature=0.1).item(), math.log(7))
    torch.testing.assert_close(info_nce(same, same, same, temperature=0.1).item(), math.log(8))


def test_temperature_divides_the_cosine():
    query = key = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    negative = key.flip(-1)
    for temperature in (0.07, 0.5, 2.0):
        want = math.log1p(math.exp(-1 / temperature))
        got = info_nce(query, key, negative, temperature=temperature)
        assert got.item() == pytest.approx(want, rel=1e-9)


# ------------------------------------------------------------------------------- properties


@given(pairs())
def test_losses_stay_in_their_bounds(pair):
    student, teacher, _ = pair
    cosine = negative_cosine(student, teacher, reduction="none")
    assert ((cosine >= -1 - 1e-12) & (cosine <= 1 + 1e-12)).all()
    assert (cross_entropy_similarity(student, teacher, reduction="none") >= 0).all()
    contrast = in_set(student, teacher, reduction="none")
    assert (contrast >= 0).all()
    assert (contrast <= math.log(max(student.shape[-2], 1)) + 2 / 0.2 + 1e-9).all()


@given(pairs(rows=3), st.floats(-100, 100), st.floats(-100, 100))
def test_cross_entropy_does_not_see_a_shift(pair, one, two):
    student, teacher, valid = pair
    got = cross_entropy_similarity(student + one, teacher + two, valid)
    want = cross_entropy_similarity(student, teacher, valid)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@given(pairs(rows=3), st.floats(0.01, 100))
def test_cosine_and_info_nce_do_not_see_a_scale(pair, scale):
    student, teacher, valid = pair
    for loss in (negative_cosine, in_set):
        got = loss(scale * student, teacher, valid)
        torch.testing.assert_close(got, loss(student, teacher, valid), rtol=0, atol=1e-11)


@losses
@given(pair=pairs(), generator=generators())
def test_the_order_of_the_rows_does_not_matter(loss, pair, generator):
    order = torch.randperm(pair[0].shape[-2], generator=generator)
    student, teacher, valid = pair[0][..., order, :], pair[1][..., order, :], pair[2][..., order]
    torch.testing.assert_close(loss(student, teacher, valid), loss(*pair), **CLOSE)
    got = loss(student, teacher, valid, reduction="none")
    torch.testing.assert_close(got, loss(*pair, reduction="none")[..., order], **CLOSE)


@losses
@given(pair=pairs())
def test_the_mean_is_that_of_the_valid_entries(loss, pair):
    values = loss(*pair, reduction="none")
    assert values.shape == pair[2].shape
    assert (values[~pair[2]] == 0).all()
    torch.testing.assert_close(loss(*pair), mean_of_valid(values, pair[2]), **CLOSE)


@losses
@given(pair=pairs(()))
def test_a_masked_set_is_the_compacted_set(loss, pair):
    student, teacher, valid = pair
    got, want = loss(*pair), loss(student[valid], teacher[valid])
    torch.testing.assert_close(got, want, **CLOSE)


@given(pairs((2,)))
def test_masked_entries_are_no_negatives_of_their_set(pair):
    query, key, valid = pair
    got = in_set(*pair, reduction="none")
    for b in range(2):
        keep = valid[b]
        want = in_set(query[b][keep], key[b][keep], reduction="none")
        torch.testing.assert_close(got[b][keep], want, **CLOSE)


@losses
@given(pair=pairs())
def test_nan_in_rows_that_are_not_valid_reaches_neither_loss_nor_gradient(loss, pair):
    student, teacher, valid = pair
    bad = [torch.where(valid[..., None], x, torch.nan).requires_grad_() for x in (student, teacher)]
    for reduction in ("mean", "none"):
        got = loss(*bad, valid, reduction=reduction)
        assert torch.equal(got, loss(student, teacher, valid, reduction=reduction))
        grads = torch.autograd.grad(got.sum(), bad, allow_unused=True, materialize_grads=True)
        for grad in grads:
            assert grad.isfinite().all()
            assert (grad[~valid] == 0).all()


@losses
@given(pair=pairs((2,)), data=st.data())
def test_adding_an_empty_pair_changes_nothing(loss, pair, data):
    shape = pair[0][:1].shape
    extra = [data.draw(tensors(shape), label="extra") for _ in range(2)]
    grown = [torch.cat([x, y]) for x, y in zip(pair[:2], extra, strict=True)]
    valid = torch.cat([pair[2], torch.zeros(shape[:-1], dtype=torch.bool)])
    grads = []
    for inputs, mask in ((pair[:2], pair[2]), (grown, valid)):
        inputs = [x.clone().requires_grad_() for x in inputs]
        total = loss(*inputs, mask)
        grad = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        grads.append((total, *grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other[:2] if other.ndim else other, one, **CLOSE)
        assert not other.ndim or (other[2] == 0).all()


@losses
@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_valid_is_a_zero_with_a_graph(loss, batch):
    student = uniform(seeded(), *batch, 3, 2).requires_grad_()
    total = loss(student, student.detach() + 1, torch.zeros(*batch, 3, dtype=torch.bool))
    assert total == 0
    assert total.requires_grad
    assert torch.equal(torch.autograd.grad(total, student)[0], torch.zeros_like(student))


@losses
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 2, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_and_single_sets_are_finite(loss, shape, masked):
    student = torch.ones(shape, requires_grad=True)
    valid = torch.ones(shape[:-1], dtype=torch.bool) if masked else None
    total = loss(student, torch.ones(shape), valid)
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


@similarities
@given(pair=pairs(rows=3))
def test_the_teacher_gets_no_gradient(loss, pair):
    student, teacher = (x.requires_grad_() for x in pair[:2])
    total = loss(student, teacher, pair[2])
    grads = torch.autograd.grad(total, [student, teacher], allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


def test_keys_and_negatives_of_info_nce_get_a_gradient():
    inputs = [uniform(seeded(i), 3, 4).requires_grad_() for i in range(3)]
    for grad in torch.autograd.grad(info_nce(*inputs, temperature=0.5), inputs):
        assert (grad != 0).any()


@losses
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_zero_vectors_have_finite_gradients(loss, dtype):
    student = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
    for teacher in (torch.zeros(4, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)):
        total = loss(student, teacher)
        assert total.isfinite()
        assert torch.autograd.grad(total, student)[0].isfinite().all()


@losses
@halves
@given(generator=generators(), exponent=st.integers(-3, 3))
def test_half_precision_is_finite_and_that_of_the_widened_numbers(loss, dtype, generator, exponent):
    student, teacher = (
        (uniform(generator, 6, 8, low=-1) * 10.0**exponent).to(dtype) for _ in range(2)
    )
    got = loss(student.requires_grad_(), teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(student.float(), teacher.float()), rtol=0, atol=0)
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@losses
def test_large_logits_are_finite(loss):
    student = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16, requires_grad=True)
    total = loss(student, -student.detach())
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


EXCLUDED = [cross_entropy_similarity, distillation]
excluding = pytest.mark.parametrize("loss", EXCLUDED, ids=lambda f: f.__name__)


def test_the_cross_entropy_of_an_excluded_category_with_itself():
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    total = cross_entropy_similarity(logits, logits)
    assert total.item() == pytest.approx(0.5822, abs=5e-5)
    assert torch.autograd.grad(total, logits)[0].isfinite().all()


@excluding
@given(pair=pairs(), generator=generators())
def test_an_excluded_category_might_as_well_be_absent(loss, pair, generator):
    """Minus infinity in the teacher, or in both, at some categories; at least one remains."""
    student, teacher, valid = pair
    d = student.shape[-1]
    count = int(torch.randint(d, (), generator=generator))
    kept = torch.randperm(d, generator=generator)[count:].sort().values
    out = torch.ones(d, dtype=torch.bool).index_fill(0, kept, False)
    teacher = torch.where(out, -torch.inf, teacher)
    results = []
    for inputs in (
        (torch.where(out, -torch.inf, student), teacher),
        (torch.where(out, -1e9, student), teacher),
    ):
        leaf = inputs[0].clone().requires_grad_()
        total = loss(leaf, inputs[1], valid)
        results.append((total, *torch.autograd.grad(total, leaf)))
        assert total.isfinite()
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, **CLOSE)
    if loss is cross_entropy_similarity:
        want = loss(student[..., kept], teacher[..., kept], valid)
        torch.testing.assert_close(results[0][0], want, **CLOSE)


def test_a_running_mean_of_minus_infinity_is_no_reason_for_a_nan():
    logits = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    center = update_center(torch.zeros(3), logits)
    got = self_distillation(logits, logits, center)
    torch.testing.assert_close(got, self_distillation(logits[:, :2], logits[:, :2], center[:2]))


@excluding
def test_a_student_that_excludes_what_its_teacher_does_not_loses_infinitely(loss):
    excluded = torch.tensor([[1.0, -torch.inf]])
    assert loss(excluded, torch.ones(1, 2)) == torch.inf
    assert loss(torch.ones(1, 2), torch.full((1, 2), -torch.inf)).isnan()  # no category at all
    assert loss(torch.full((1, 2), torch.nan), excluded).isnan()
    assert loss(torch.ones(1, 2), torch.full((1, 2), torch.nan)).isnan()


def test_info_nce_ignores_autocast():
    query, key = (uniform(seeded(i), 5, 4, dtype=torch.float32) for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = [info_nce(query, key, n, temperature=0.1) for n in (None, key)]
    want = [info_nce(query, key, n, temperature=0.1) for n in (None, key)]
    assert got == want


def test_one_valid_for_each_image_serves_all_of_its_rows():
    student, teacher = (uniform(seeded(i), 3, 5, 4) for i in range(2))
    valid = torch.tensor([[True], [False], [True]])
    for loss in SIMILARITIES:
        want = loss(student[[0, 2]], teacher[[0, 2]])
        torch.testing.assert_close(loss(student, teacher, valid), want, **CLOSE)
        each = loss(student, teacher, valid, reduction="none")
        assert each.shape == (3, 5)
        assert (each[1] == 0).all()


# ---------------------------------------------------------------- negatives, not all of them valid


@st.composite
def contrasts(draw):
    """Queries, keys and valid; negatives of all sets or of each, and which of them to use."""
    query, key, valid = draw(pairs())
    batch, d = query.shape[:-2], query.shape[-1]
    shared = (*draw(st.sampled_from([(), batch])), draw(st.integers(0, 5)))
    return query, key, valid, Negatives(draw(tensors((*shared, d))), draw(valid_rows(shared)))


def torchs_contrast(query, key, negatives):
    """Cross-entropy with the key first, of each set against its compacted negatives."""
    if query.ndim > 2:
        own = negatives.features.ndim > 2
        losses = [
            torchs_contrast(q, k, Negatives(*(x[i] for x in negatives)) if own else negatives)
            for i, (q, k) in enumerate(zip(query, key, strict=True))
        ]
        return torch.stack(losses) if losses else query.sum(-1)
    q, k, others = (
        F.normalize(x, dim=-1) for x in (query, key, negatives.features[negatives.valid])
    )
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ others.mT], -1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none")


@given(contrasts())
def test_negatives_are_those_that_are_valid_and_torchs_cross_entropy_agrees(problem):
    query, key, valid, negatives = problem
    leaves = [x.requires_grad_() for x in (query, key, negatives.features)]
    got = info_nce(query, key, negatives, temperature=0.2, reduction="none")
    want = torchs_contrast(query, key, negatives)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    weight = uniform(seeded(), *got.shape)
    options = {"allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad((x * weight).sum(), leaves, **options) for x in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    got = info_nce(query, key, negatives, valid, temperature=0.2)
    torch.testing.assert_close(got, mean_of_valid(want, valid), rtol=1e-11, atol=1e-11)


@given(contrasts())
def test_negatives_that_are_not_valid_may_be_anything(problem):
    query, key, valid, negatives = problem
    features, use = negatives
    want = info_nce(query, key, negatives, valid, temperature=0.2, reduction="none")
    for bad in (torch.nan, torch.inf, 1e300):
        spoiled = torch.where(use[..., None], features, bad).requires_grad_()
        leaves = [query.requires_grad_(), key.requires_grad_(), spoiled]
        options = {"temperature": 0.2, "reduction": "none"}
        got = info_nce(query, key, Negatives(spoiled, use), valid, **options)
        assert torch.equal(got, want)
        for grad in torch.autograd.grad(got.sum(), leaves, allow_unused=True):
            assert grad.isfinite().all()
        assert (grad[~use] == 0).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_without_a_valid_negative_loss_and_gradients_are_zero(dtype):
    leaves = [uniform(seeded(i), n, 4).to(dtype).requires_grad_() for i, n in enumerate((3, 3, 5))]
    for features in (leaves[2], leaves[2][:0]):
        none = Negatives(features, torch.zeros(len(features)).bool())
        total = info_nce(*leaves[:2], none, temperature=0.2)
        assert total == 0
        for grad in torch.autograd.grad(total, leaves[:2], retain_graph=True):
            assert torch.equal(grad, torch.zeros_like(grad))
        if len(features):
            assert (torch.autograd.grad(total, leaves[2])[0] == 0).all()


def test_dense_queries_share_a_bank_as_flat_ones_do():
    query, key = (uniform(seeded(i), 2, 3, 6, 4, low=-1).requires_grad_() for i in range(2))
    bank = Negatives(uniform(seeded(2), 8, 4, low=-1), torch.arange(8) < 5)
    valid = uniform(seeded(3), 2, 3, 6) < 0.6
    results = []
    for flat in (False, True):
        q, k, v = (x.reshape(36, *x.shape[3:]) if flat else x for x in (query, key, valid))
        loss = info_nce(q, k, bank, v, temperature=0.2)
        each = info_nce(q, k, bank, v, temperature=0.2, reduction="none")
        results.append((loss, each.flatten(), *torch.autograd.grad(loss, [query, key])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@given(st.sampled_from([(), (1,), (3,), (1, 1), (1, 3), (2, 1), (2, 3)]), st.data())
def test_negatives_are_broadcast_over_the_sets(shape, data):
    query, key, valid = data.draw(pairs((2, 3)), label="pair")
    size = (*shape, data.draw(st.integers(0, 4), label="m"))
    features = data.draw(tensors((*size, query.shape[-1])), label="negatives").requires_grad_()
    use, results = data.draw(valid_rows(size), label="use"), []
    for expand in (False, True):
        x, mask = features, use
        if expand:
            x, mask = (y.expand(2, 3, *y.shape[len(shape) :]) for y in (features, use))
        loss = info_nce(query, key, Negatives(x, mask), valid, temperature=0.2)
        results.append((loss, torch.autograd.grad(loss, features)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_contrasts_against_a_large_bank_are_torchs_to_the_second_derivative(batch):
    # More logits than are made at a time; the last part is smaller.
    n, m = 4700 // math.prod([1, *batch]), 1000
    leaves = [
        uniform(seeded(i), *batch, k, 3, low=-1).requires_grad_() for i, k in enumerate((n, m))
    ]
    key, use = uniform(seeded(2), *batch, n, 3, low=-1), flips(seeded(3), *batch, m)
    query, others = (F.normalize(x, dim=-1) for x in leaves)
    logits = (query @ others.mT / 0.5).masked_fill(~use[..., None, :], -torch.inf)
    own = (query * F.normalize(key, dim=-1)).sum(-1, keepdim=True) / 0.5
    want = torch.cat([own, logits], -1).logsumexp(-1) - own[..., 0]
    options = {"temperature": 0.5, "reduction": "none"}
    got = info_nce(leaves[0], key, Negatives(leaves[1], use), **options)
    results, weight = [], uniform(seeded(4), *got.shape)
    for value in (got, want):
        slopes = torch.autograd.grad((value * weight).sum(), leaves, create_graph=True)
        turned = sum((x * x.detach().roll(1, -1)).sum() for x in slopes)
        results.append((value, *slopes, *torch.autograd.grad(turned, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_cold_contrasts_are_finite(dtype):
    query = torch.tensor([[300.0, 0.0], [0.0, -300.0]], dtype=dtype, requires_grad=True)
    for sign, want in ((1, math.log(2)), (-1, 200 + math.log1p(math.exp(-100)))):
        key = sign * query.detach()
        negatives = Negatives(query.detach()[[0, 1, 1]], torch.tensor([True, True, False]))
        each = info_nce(query, key, negatives, temperature=0.01, reduction="none")
        torch.testing.assert_close(each, torch.full((2,), want), rtol=1e-6, atol=1e-6)
        assert torch.autograd.grad(each.sum(), query)[0].isfinite().all()


def test_a_cold_contrast_does_not_see_what_is_not_valid():
    query = torch.tensor([[300.0, 0.0], [0.0, -300.0]], requires_grad=True)
    unknown = Negatives(query.detach(), torch.zeros(2).bool())  # far more alike than the own key
    total = info_nce(query, -query.detach(), unknown, temperature=0.01)
    assert total == 0
    assert (torch.autograd.grad(total, query)[0] == 0).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_negatives_may_have_a_dtype_of_their_own(dtype):
    query, key = (uniform(seeded(i), 5, 4, low=-1).requires_grad_() for i in range(2))
    features, use = uniform(seeded(2), 6, 4, low=-1).to(dtype), torch.arange(6) < 4
    got = info_nce(query, key, Negatives(features, use), temperature=0.2)
    assert got.dtype == torch.float64
    want = info_nce(query, key, features[use].double(), temperature=0.2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    grads = (torch.autograd.grad(x, [query, key]) for x in (got, want))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_masked_negatives_ignore_autocast():
    query, key = (uniform(seeded(i), 5, 4, dtype=torch.float32) for i in range(2))
    negatives = Negatives(key.flip(0), torch.arange(5) < 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(query, key, negatives, temperature=0.1)
    assert got == info_nce(query, key, negatives, temperature=0.1)


def test_masked_negatives_of_another_length_are_refused():
    query = torch.zeros(2, 4, 3)
    for bad in (torch.zeros(6, 2), torch.zeros(5, 6, 3)):
        with pytest.raises(TypeError, match=r"negatives.* should be .*3.*tensor of shape \([56], "):
            info_nce(query, query, Negatives(bad, torch.ones(bad.shape[:-1]).bool()), temperature=1)


def test_many_negatives_are_taken_some_at_a_time():
    generator = torch.Generator().manual_seed(0)
    sizes = 2**14, 2**14, 700
    query, key, others = (
        torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in sizes
    )
    use = torch.rand(700, generator=generator) < 0.5
    query.requires_grad_()
    others.requires_grad_()
    got = info_nce(query, key, Negatives(others, use), temperature=0.2)  # 256 at a time
    rows = torch.cat([key[:, None], others[use].expand(2**14, -1, 2)], 1)
    logits = torch.cosine_similarity(query[:, None], rows, dim=-1) / 0.2
    want = torch.nn.functional.cross_entropy(logits, torch.zeros(2**14).long())
    torch.testing.assert_close(got, want)
    slopes = (torch.autograd.grad(x, (query, others)) for x in (got, want))
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("used", [0, 3])
def test_second_derivatives_are_finite_without_negatives_and_far_from_them(used, temperature):
    key = torch.eye(3, 4, dtype=torch.float64)
    query, others = key.clone().requires_grad_(), Negatives(-key, torch.arange(3) < used)

    def loss(x):
        return info_nce(x, key, others, temperature=temperature)

    assert torch.autograd.functional.hessian(loss, query).isfinite().all()
    assert torch.autograd.gradgradcheck(loss, query)


def test_a_small_loss_keeps_its_digits():
    query = torch.tensor([[1.0, 0.0]])
    got = info_nce(query, query, -query, temperature=0.1)
    assert got.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-4)


def test_gradients_of_negatives_ignore_an_autocast_around_backward():
    generator = torch.Generator().manual_seed(0)
    query, key, others = (torch.randn(n, 8, generator=generator) for n in (4, 4, 9))
    inputs = [x.requires_grad_() for x in (query, others)]
    want = torch.autograd.grad(info_nce(query, key, others, temperature=0.1), inputs)
    loss = info_nce(query, key, others, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kind", ["given", "masked", "of each set", "none valid", "own set"])
def test_derivatives_of_both_modes_agree(kind):
    query, key, others = (uniform(seeded(n), 2, n, 3, low=-1) for n in (2, 2, 3))
    valid, use = torch.tensor([[True, True], [False, True]]), torch.tensor([True, False, True])

    def loss(query, key, others):
        negatives = {
            "given": others[0],
            "masked": Negatives(others[0], use),
            "of each set": others,
            "none valid": Negatives(others[0], torch.zeros_like(use)),
            "own set": None,
        }[kind]
        return info_nce(query, key, negatives, valid, temperature=0.5)

    inputs = query, key, others
    jacrev, jacfwd, every = torch.func.jacrev, torch.func.jacfwd, (0, 1, 2)
    want = jacrev(jacrev(loss, every), every)(*inputs)
    for modes in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        got = modes[0](modes[1](loss, every), every)(*inputs)
        for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_the_hessian_within_vmap_is_that_of_each():
    query, key, others = (uniform(seeded(i), 2, 3, 4, low=-1) for i in range(3))
    hessian = torch.func.hessian(partial(info_nce, temperature=0.5))
    got = torch.func.vmap(hessian)(query, key, others)
    want = [hessian(*inputs) for inputs in zip(query, key, others, strict=True)]
    torch.testing.assert_close(got, torch.stack(want), **CLOSE)


def test_a_tangent_agrees_with_the_gradient_in_either_order():
    query, key, others = (uniform(seeded(i), 3, 4, low=-1) for i in range(3))

    def loss(query, others):
        return info_nce(query, key, others, temperature=0.5)

    inputs = [x.requires_grad_() for x in (query, others)]
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True)


def test_negatives_whose_fields_do_not_belong_together_are_refused():
    query, good, use = torch.zeros(2, 4, 3), torch.zeros(6, 3), torch.ones(6).bool()
    fields = [(good, bad) for bad in (use[:5], use[:1], use[:, None], torch.ones(6))]
    for features, valid in [*fields, (good.long(), use), (good[0], use[0])]:
        with pytest.raises(TypeError, match="info_nce: argument 'negatives"):
            info_nce(query, query, Negatives(features, valid), temperature=1)


def test_one_row_without_negatives_has_no_loss():
    row = uniform(seeded(), 3, 1, 4)
    assert in_set(row, row.flip(0)) == 0


def test_a_query_that_finds_its_own_key_among_the_negatives_has_a_loss_of_log_two():
    query = torch.eye(8, dtype=torch.float64)
    assert info_nce(query[:4], query[:4], query[4:], temperature=0.1) < 1e-3
    assert info_nce(query[:4], query[:4], query, temperature=0.1) > math.log(2)


# ------------------------------------------------------------------------------- symmetric


@losses
@given(one=pairs(), data=st.data())
def test_the_symmetric_loss_is_the_mean_of_both_directions(loss, one, data):
    two = [data.draw(tensors(one[0].shape), label="view 2") for _ in range(2)]
    students, teachers = (one[0], two[0]), (one[1], two[1])
    got = symmetric_loss(loss, students, teachers, valid=one[2])
    forth, back = loss(one[0], two[1], one[2]), loss(two[0], one[1], one[2])
    torch.testing.assert_close(got, forth / 2 + back / 2, **CLOSE)
    swapped = symmetric_loss(loss, students[::-1], teachers[::-1], valid=one[2])
    torch.testing.assert_close(got, swapped, **CLOSE)
    each = symmetric_loss(loss, students, teachers, valid=one[2], reduction="none")
    assert each.shape == one[2].shape


def test_the_symmetric_loss_hands_positional_arguments_on():
    students, teachers = (torch.eye(2), torch.eye(2)), (torch.eye(2), torch.eye(2))
    off = torch.zeros(2, dtype=torch.bool)
    assert symmetric_loss(negative_cosine, students, teachers) == -1
    assert symmetric_loss(negative_cosine, students, teachers, off) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_the_symmetric_loss_wants_two_of_each(count):
    with pytest.raises(ValueError, match=f"the number of students is {count}; give 2"):
        symmetric_loss(negative_cosine, (torch.eye(2),) * count, (torch.eye(2),) * 2)


# ---------------------------------------------------------------------------------- errors


@losses
def test_a_teacher_of_another_shape_is_refused(loss):
    with pytest.raises(TypeError, match=r"d=3.*shape \(4, 2\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(TypeError, match=r"argument '(teacher|key)'"):
        loss(torch.zeros(4, 3), torch.zeros(3, 3))
    with pytest.raises(TypeError, match=r"argument '(student|query)'.*int64"):
        loss(torch.zeros(4, 3).long(), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="argument 'valid'"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(3).bool())
    with pytest.raises(
        TypeError, match=r"argument 'valid'.*\(64,\) was given; use `valid\[:, None\]`"
    ):
        loss(torch.zeros(64, 64, 3), torch.zeros(64, 64, 3), torch.ones(64).bool())
    with pytest.raises(TypeError, match=r"argument 'reduction'.*'sum' of type str"):
        loss(torch.zeros(4, 3), torch.zeros(4, 3), reduction="sum")


def test_negatives_that_do_not_fit_are_refused():
    query = torch.zeros(2, 4, 3)
    for bad in (torch.zeros(5, 6, 3), torch.zeros(6, 2), torch.zeros(3), torch.zeros(6, 3).long()):
        with pytest.raises(TypeError, match="info_nce: argument 'negatives'"):
            info_nce(query, query, bad, temperature=0.1)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"densekit.losses.info_nce: temperature is {temperature}"):
        info_nce(torch.eye(2), torch.eye(2), temperature=temperature)


# ------------------------------------------------------- unit vectors and products in bfloat16


def contrast(problem, unit, **options):
    """InfoNCE of a problem, and the gradients of queries, keys and negatives before `unit`."""
    query, key, others, use = problem
    leaves = [x.clone().requires_grad_() for x in (query, key, others)]
    query, key, others = map(unit, leaves)
    negatives = None if use is None else Negatives(others, use)
    losses = info_nce(query, key, negatives, temperature=0.2, reduction="none", **options)
    grads = torch.autograd.grad(losses.square().sum(), leaves, materialize_grads=True)
    return losses.detach(), *grads


@st.composite
def contrasts(draw):
    """Queries, keys, negatives and which to use; None for the negatives of the set itself."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    b, n, m, d = (draw(st.integers(1, most)) for most in (2, 3, 600, 4))
    query, key = torch.randn(2, b, n, d, generator=generator) * 3
    others = torch.randn(m, d, generator=generator) * 3
    use = torch.rand(m, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return query, key, others, draw(st.sampled_from([use, None]))


@given(contrasts())
def test_rows_that_are_normalized_once_give_what_normalizing_here_gives(problem):
    before = contrast(problem, unit=lambda x: x)
    once = contrast(problem, unit=l2_normalize, normalized=True)
    torch.testing.assert_close(once, before, rtol=1e-5, atol=1e-5)


@given(contrasts())
def test_products_of_another_dtype_are_those_of_the_loss_but_for_their_rounding(problem):
    exact = contrast(problem, unit=l2_normalize, normalized=True)
    same = contrast(problem, unit=l2_normalize, normalized=True, product_dtype=torch.float32)
    rough = contrast(problem, unit=l2_normalize, normalized=True, product_dtype=torch.bfloat16)
    torch.testing.assert_close(same, exact, rtol=0, atol=0)
    assert [x.dtype for x in rough] == [torch.float32] * 4
    torch.testing.assert_close(rough[0], exact[0], rtol=0, atol=0.01 / 0.2)
    for got, wanted in zip(rough[1:], exact[1:], strict=True):
        assert (got - wanted).norm() <= 0.05 * (wanted.norm() + exact[0].norm())


def test_negatives_that_are_not_used_may_be_anything_when_nothing_is_normalized():
    query = l2_normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    others = torch.cat([query.roll(1, 0), torch.full((2, 4), torch.nan)])
    use = torch.arange(5) < 3
    options = {"temperature": 0.2, "normalized": True}
    got = info_nce(query, query, Negatives(others, use), **options)
    assert got == info_nce(query, query, others[:3], **options)


def test_products_are_of_a_floating_dtype():
    with pytest.raises(ValueError, match=r"product_dtype is torch.int64; give a floating dtype"):
        info_nce(torch.eye(2), torch.eye(2), temperature=1.0, product_dtype=torch.int64)


# ------------------------------------------------------------------------- maps are not rows


def center_of(teacher, _):
    return update_center(teacher.new_zeros(teacher.shape[-1]), teacher)


def terms_of(rows, _):
    return variance_covariance(rows)


ON_ROWS = [*LOSSES, center_of, terms_of, mutual_information_loss]
on_rows = pytest.mark.parametrize("loss", ON_ROWS, ids=lambda f: f.__name__)


def test_every_loss_says_where_its_channels_are():
    for name in set(densekit.losses.__all__) - {"VarianceCovariance"}:
        assert "Channels come last" in getattr(densekit, name).__doc__.split("\n\n")[1]


@on_rows
@given(
    batch=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    side=st.integers(1, 5),
    data=st.data(),
)
def test_what_looks_like_a_map_is_refused_and_its_rows_are_not(loss, batch, side, data):
    channels = data.draw(st.integers(max(side, 3) + 1, 8), label="channels")
    maps = data.draw(tensors((*batch, channels, side, side)), label="maps")
    with pytest.raises(
        TypeError, match=r"channels last.*\(\.\.\., d, h, w\); use `map_to_rows"
    ) as caught:
        loss(maps, maps)
    assert str(tuple(maps.shape)) in str(caught.value)
    loss(map_to_rows(maps), map_to_rows(maps))


@on_rows
@given(data=st.data())
def test_rows_are_never_taken_for_maps(loss, data):
    """Up to one leading axis; up to 3 heads or views; no more heads than channels; n not d."""
    n, d = (data.draw(st.integers(1, 6), label=name) for name in "nd")
    most = 8 if n != d else max(d, 3)
    heads = data.draw(st.integers(1, most), label="heads")
    few = data.draw(st.sampled_from([(n, d), (9, n, d), (2, heads, n, d), (2, 3, heads, n, d)]))
    rows = data.draw(tensors(few), label="rows")
    loss(rows, rows)


@pytest.mark.parametrize(
    "shape", [(2, 64, 7, 7), (8, 2048, 7, 7), (2, 384, 14, 14), (4, 512, 1, 1)]
)
def test_maps_of_networks_are_refused(shape):
    maps = torch.zeros(()).expand(shape)
    for loss in ON_ROWS:
        with pytest.raises(TypeError, match="looks like that of maps"):
            loss(maps, maps)


# ------------------------------------------------------------ which side gets which gradient

SHAPES = {
    **dict.fromkeys(("student", "teacher", "query", "key", "rows"), (4, 3)),
    **dict.fromkeys(("negatives", "references"), (5, 3)),
    "center": (3,),
    **dict.fromkeys(("temperature", "student_temperature", "teacher_temperature"), ()),
    **dict.fromkeys(("steepness", "teacher_steepness"), ()),
}
OTHERS = {
    *("valid", "reduction", "momentum", "group", "target", "epsilon"),
    *("allowed", "unit", "clip_negative", "metric", "network"),
    *("normalized", "product_dtype"),
}
ALL_LOSSES = [
    getattr(densekit, name)
    for name in densekit.losses.__all__
    if name not in {"VarianceCovariance", "symmetric_loss"}  # a record; as its loss does
]


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda f: f.__name__)
def test_the_name_of_an_argument_says_whether_it_is_detached(loss):
    names = inspect.signature(loss).parameters.keys() - OTHERS
    leaves = {
        name: (uniform(seeded(i), *SHAPES[name]) + 0.1).requires_grad_()
        for i, name in enumerate(sorted(names))
    }
    total = sum(x.sum() for x in tree_leaves(loss(**leaves)))
    detached = {name for name in names if name.startswith(("teacher", "center", "references"))}
    if loss is update_center:  # it has no other arguments
        assert detached == names
        assert not total.requires_grad
        return
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        assert (grad is None) == (name in detached), name
        assert grad is None or (grad != 0).any(), name


# ---------------------------------------------------------------- temperatures that are tensors

X, Y = (uniform(seeded(i), 6, 4, low=-1) for i in range(2))
LABELS = torch.arange(6) % 2
MAPS = uniform(seeded(2), 3, 2, 2, 2, low=-1)
SHARES = uniform(seeded(3), 3, 2, 2, 2)
WITH_TEMPERATURE = {
    "info_nce": lambda t: info_nce(X, Y, temperature=t),
    "info_nce of negatives": lambda t: info_nce(X, Y, Y.flip(0), temperature=t),
    "self_distillation": lambda t: self_distillation(X, Y, X[0], student_temperature=t),
    "affinity_matrix": lambda t: affinity_matrix(X, Y, temperature=t)[0],
    "knn_votes": lambda t: knn_votes(X, Y, LABELS, classes=2, k=3, temperature=t)[0],
    "object_knn": lambda t: object_knn(X, LABELS, Y, LABELS, classes=2, k=3, temperature=t).macro,
    "neighbor_distribution_loss": lambda t: neighbor_distribution_loss(
        X, Y, Y.flip(0), student_temperature=t
    ),
    "propagate_labels": lambda t: propagate_labels(MAPS[0], MAPS[1:], SHARES[1:], temperature=t),
    "propagate_video": lambda t: propagate_video(MAPS, SHARES[0], temperature=t)[1],
}


def test_every_function_with_a_temperature_is_in_the_table():
    functions = {name for name in densekit.__all__ if inspect.isfunction(getattr(densekit, name))}
    takes = {
        name
        for name in functions
        if any("temperature" in x for x in inspect.signature(getattr(densekit, name)).parameters)
    }
    assert takes == {name.split()[0] for name in WITH_TEMPERATURE}


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_may_be_a_tensor_and_is_learned(name, dtype):
    call = WITH_TEMPERATURE[name]
    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    got, want = call(temperature), call(temperature.item())
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    if name != "object_knn":  # counts
        close = {"atol": 1e-6, "rtol": 1e-4}
        assert torch.autograd.gradcheck(
            call, temperature.detach().double().requires_grad_(), **close
        )
        assert torch.autograd.grad(got.sum(), temperature)[0].isfinite()


@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_the_value_of_a_temperature_is_not_read(name):
    """Under vmap nobody can read it, and a compiled graph has no break at it."""
    call = WITH_TEMPERATURE[name]
    several = torch.tensor([0.1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(call)(several), torch.stack([call(t) for t in several]))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(several[0]), call(several[0]))


# --------------------------------------------------------------------- the authors' numbers


def golden_tokens(file, *names):
    golden = np.load(DATA / file)
    tokens = [torch.from_numpy(golden[n]).double().flatten(2).mT for n in names]
    return golden, [x.requires_grad_() for x in tokens]


@pytest.mark.parametrize(
    ("loss", "name"), [(cross_entropy_similarity, "ce"), (negative_cosine, "cos")]
)
def test_pixsim_of_the_authors_program(loss, name):
    golden, (p1, p2, z1, z2) = golden_tokens("pixsim_0_B2_C27_5x5.npz", "p1", "p2", "z1", "z2")
    total = symmetric_loss(loss, (p1, p2), (z1, z2))
    torch.testing.assert_close(total.item(), golden[f"loss_{name}"].item(), rtol=0, atol=1e-10)
    for view, grad in zip("12", torch.autograd.grad(total, [p1, p2]), strict=True):
        want = torch.from_numpy(golden[f"grad_{name}_p{view}"]).flatten(2).mT
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-10)


def test_the_cross_entropy_map_of_the_authors_program():
    golden, (p1, z2) = golden_tokens("pixsim_0_B2_C27_5x5.npz", "p1", "z2")
    got = cross_entropy_similarity(p1, z2, reduction="none").unflatten(-1, (5, 5))
    torch.testing.assert_close(got, torch.from_numpy(golden["ce_map12"]), rtol=0, atol=1e-10)
    literal = golden["loss_ce_paper_eq3_literal"].item()
    assert abs(got.mean().item() - literal) > 0.1  # Eq 3 as printed is another loss


def test_regionsim_of_the_authors_program():
    golden, (f1, f2, z1, z2) = golden_tokens(
        "regionsim_0_B2_N6_C16_identity.npz", "f1", "f2", "z1", "z2"
    )
    e1, e2 = (pool_masks(f, z.softmax(-1)) for f, z in ((f1, z1), (f2, z2)))
    nce = partial(info_nce, temperature=golden["temp"].item())
    total = symmetric_loss(nce, (e1, e2), (e1, e2))
    want = golden["loss_official"].item()
    torch.testing.assert_close(total.item(), want, rtol=0, atol=1e-9)
    for name, grad in zip(
        ("f1", "f2", "z1", "z2"), torch.autograd.grad(total, [f1, f2, z1, z2]), strict=True
    ):
        want = torch.from_numpy(golden[f"grad_{name}"]).flatten(2).mT
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------- views to a loss


@losses
def test_disjoint_views_in_a_batch_leave_the_loss_as_it_is(loss):
    pairs = sample_view_pairs((48, 64), (64,), scale=(0.05, 0.2), generator=seeded())
    valid = pairs.valid
    assert 0 < valid.sum() < 64
    maps = [uniform(seeded(i), 64, 4, 5, 5).requires_grad_() for i in range(2)]
    sampled = gridsample_pairs(*maps, pairs.view1, pairs.view2, 3, valid)
    total = loss(sampled.features1, sampled.features2, sampled.valid)
    want = loss(sampled.features1[valid], sampled.features2[valid])
    torch.testing.assert_close(total, want, **CLOSE)
    (grad,) = torch.autograd.grad(total, maps[:1])
    assert (grad[~valid] == 0).all()
    assert (grad[valid] != 0).any()


# ------------------------------------------------------------------- self-distillation, centers


@st.composite
def distillations(draw):
    """Student, teacher, center and valid."""
    student, teacher, valid = draw(pairs())
    return student, teacher, draw(tensors(student.shape[-1:])), valid


temperatures = st.floats(0.02, 2)


@given(distillations(), temperatures, temperatures)
def test_self_distillation_is_torchs_cross_entropy_with_soft_targets(problem, hot, cold):
    student, teacher, center, valid = problem
    options = {"student_temperature": hot, "teacher_temperature": cold}
    d = student.shape[-1]
    target = ((teacher - center) / cold).softmax(-1)
    want = F.cross_entropy((student / hot).reshape(-1, d), target.reshape(-1, d), reduction="none")
    want = want.reshape(valid.shape)
    tolerance = {"rtol": 1e-11, "atol": 1e-11}
    got = self_distillation(student, teacher, center, reduction="none", **options)
    torch.testing.assert_close(got, want, **tolerance)
    got = self_distillation(student, teacher, center, valid, **options)
    torch.testing.assert_close(got, mean_of_valid(want, valid), **tolerance)


@given(distillations())
def test_the_default_temperatures_are_the_papers(problem):
    want = self_distillation(*problem, student_temperature=0.1, teacher_temperature=0.07)
    assert torch.equal(self_distillation(*problem), want)


@given(distillations(), st.floats(-100, 100))
def test_the_center_is_taken_from_the_teacher(problem, shift):
    student, teacher, center, valid = problem
    got = self_distillation(student, teacher, center, valid)
    want = self_distillation(student, teacher - center, torch.zeros_like(center), valid)
    torch.testing.assert_close(got, want, **CLOSE)
    moved = self_distillation(student, teacher + center + shift, 2 * center + shift, valid)
    torch.testing.assert_close(moved, got, rtol=1e-9, atol=1e-9)


def test_distillation_closed_forms():
    eye = torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    # A teacher at the limit of sharpness asks the student for its own category.
    got = self_distillation(eye, eye, zero, student_temperature=0.5, teacher_temperature=1e-3)
    assert got.item() == pytest.approx(math.log1p(math.exp(-1 / 0.5)), rel=1e-12)
    # With the center at the teacher's logits nothing is left to tell.
    got = self_distillation(eye[:1], eye[:1], eye[0], student_temperature=1.0)
    assert got.item() == pytest.approx(math.log1p(math.e) - 0.5, rel=1e-12)


@given(distillations())
def test_only_the_student_of_a_distillation_gets_a_gradient(problem):
    leaves = [x.requires_grad_() for x in problem[:3]]
    total = self_distillation(*leaves, problem[3])
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    assert grads[0] is not None
    assert grads[1:] == (None, None)


@given(distillations(), temperatures, temperatures)
def test_the_gradient_of_a_distillation_is_the_difference_of_the_distributions(problem, hot, cold):
    student, teacher, center, _ = problem
    total = self_distillation(
        student.requires_grad_(),
        teacher,
        center,
        student_temperature=hot,
        teacher_temperature=cold,
        reduction="none",
    ).sum()
    (grad,) = torch.autograd.grad(total, student)
    want = ((student / hot).softmax(-1) - ((teacher - center) / cold).softmax(-1)) / hot
    torch.testing.assert_close(grad, want.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
@pytest.mark.parametrize("which", ["student_temperature", "teacher_temperature"])
def test_a_distillation_temperature_that_is_not_positive_is_refused(which, temperature):
    with pytest.raises(ValueError, match=f"losses.self_distillation: .*{temperature}"):
        self_distillation(torch.eye(2), torch.eye(2), torch.zeros(2), **{which: temperature})


def test_a_center_of_another_length_is_refused():
    for bad in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(2).long()):
        with pytest.raises(TypeError, match="self_distillation: argument 'center'"):
            self_distillation(torch.eye(2), torch.eye(2), bad)
        with pytest.raises(TypeError, match=r"update_center: argument '(center|teacher)'"):
            update_center(bad, torch.eye(2))


@pytest.mark.parametrize("momentum", [0, 0.5, 0.9])
@given(generator=generators())
def test_the_center_moves_to_the_mean_of_the_valid(momentum, generator):
    teacher, center = uniform(generator, 2, 4, 3), uniform(generator, 3)
    valid = uniform(generator, 2, 4) < 0.5
    valid[0, 0] = True
    before = center.clone()
    filled = torch.where(valid[..., None], teacher, torch.nan).requires_grad_()
    got = update_center(center, filled, valid, momentum=momentum)
    want = momentum * center + (1 - momentum) * teacher[valid].mean(0)
    torch.testing.assert_close(got, want, **CLOSE)
    assert not got.requires_grad
    assert torch.equal(center, before)
    want = momentum * center + (1 - momentum) * teacher.mean((0, 1))
    torch.testing.assert_close(update_center(center, teacher, momentum=momentum), want, **CLOSE)


def test_a_center_without_channels_stays_empty():
    for valid in (None, torch.tensor([True, False, True])):
        assert update_center(torch.zeros(0), torch.zeros(3, 0), valid).shape == (0,)


def test_the_center_of_nothing_stays_to_the_bit():
    center = uniform(seeded(), 3, dtype=torch.float32)
    for teacher, valid in (
        (torch.ones(4, 3), torch.zeros(4, dtype=torch.bool)),
        (torch.ones(0, 3), None),
    ):
        assert torch.equal(update_center(center, teacher, valid), center)


def test_a_single_vector_is_a_mean_too():
    got = update_center(torch.zeros(2), torch.tensor([1.0, 3.0]), momentum=0.5)
    assert torch.equal(got, torch.tensor([0.5, 1.5]))


def test_one_valid_serves_all_rows_of_an_image_in_the_center():
    teacher, center = uniform(seeded(0), 2, 3, 4), uniform(seeded(1), 4)
    got = update_center(center, teacher, torch.tensor([[True], [False]]))
    assert torch.equal(got, update_center(center, teacher[0]))


@halves
def test_the_center_keeps_its_dtype_and_sums_do_not_overflow(dtype):
    teacher = torch.full((100, 2), 3000.0, dtype=dtype)
    got = update_center(torch.zeros(2), teacher, momentum=0.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, teacher[0].float())
    assert update_center(torch.zeros(2, dtype=dtype), teacher).dtype == dtype


def test_the_center_settles_on_the_mean():
    teacher = uniform(seeded(), 50, 3)
    center = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        center = update_center(center, teacher)
    torch.testing.assert_close(center, teacher.mean(0), **CLOSE)


EXTREMES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_of_the_center_are_exact_whatever_the_values(dtype):
    center, teacher = torch.cartesian_prod(*[torch.tensor(EXTREMES)] * 2).to(dtype).unbind(-1)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    for rows in (teacher, teacher.expand(1, 1, -1)):
        torch.testing.assert_close(update_center(center, rows, momentum=0.0), teacher, **exact)
        torch.testing.assert_close(update_center(center, rows, momentum=1.0), center, **exact)
    want = center.double() / 2 + teacher.double() / 2
    got = update_center(center.double(), teacher, momentum=0.5)
    torch.testing.assert_close(got, want, **exact)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_a_momentum_of_the_center_outside_the_unit_range_is_refused(momentum):
    with pytest.raises(ValueError, match=f"update_center: momentum is {momentum}"):
        update_center(torch.zeros(2), torch.eye(2), momentum=momentum)


# ------------------------------------------------------------------- variance and covariance


def terms_of_one_set(rows, target=1.0, epsilon=1e-4):
    """VICReg's two terms of the rows (n, d) of one set, by torch's own statistics."""
    n, d = rows.shape
    if n < 2:
        return [rows.sum() * 0] * 2
    covariance = torch.atleast_2d(torch.cov(rows.T))
    variance = (target - (rows.var(0) + epsilon).sqrt()).clamp(min=0).mean()
    return [variance, (covariance - torch.diag(covariance.diagonal())).square().sum() / d]


@given(pairs(), st.floats(0, 3), st.floats(1e-6, 1))
def test_variance_and_covariance_are_those_of_torchs_statistics(pair, target, epsilon):
    rows, _, valid = pair
    options = {"target": target, "epsilon": epsilon}
    got = variance_covariance(rows, valid, **options)
    sets = math.prod(rows.shape[:-2])
    flat, mask = rows.reshape(sets, *rows.shape[-2:]), valid.reshape(sets, rows.shape[-2])
    want = [terms_of_one_set(x[keep], **options) for x, keep in zip(flat, mask, strict=True)]
    for i, term in enumerate(got):
        assert term.shape == rows.shape[:-2]
        wanted = torch.stack([terms[i] for terms in want]) if want else term.flatten()
        torch.testing.assert_close(term.flatten(), wanted, rtol=1e-10, atol=1e-10)


@given(st.integers(2, 6), st.integers(1, 4), generators())
def test_constant_rows_have_the_largest_variance_term_and_no_covariance(n, d, generator):
    rows = uniform(generator, 1, d, low=-9).expand(n, d).clone().requires_grad_()
    got = variance_covariance(rows)
    torch.testing.assert_close(got.variance.item(), 1 - 1e-4**0.5)
    assert got.covariance < 1e-20
    for grad in torch.autograd.grad(got.variance, rows):
        assert grad.isfinite().all()


@given(st.integers(2, 5), st.integers(2, 4), st.integers(2, 3), generators())
def test_copies_change_the_terms_as_they_change_the_number_of_rows(n, d, copies, generator):
    rows = uniform(generator, n, d, low=-1)
    once = variance_covariance(rows)
    many = variance_covariance(rows.repeat(copies, 1))
    grown = copies * (n - 1) / (copies * n - 1)  # of the covariances, which divide by n - 1
    torch.testing.assert_close(many.covariance, once.covariance * grown**2, **CLOSE)
    want = variance_covariance(rows * grown**0.5)
    torch.testing.assert_close(many.variance, want.variance, **CLOSE)
    # A channel that repeats another one is what the covariance finds.
    twice = variance_covariance(torch.cat([rows, rows], 1))
    assert twice.covariance > once.covariance
    torch.testing.assert_close(twice.variance, once.variance, **CLOSE)


@given(pairs(), st.floats(-100, 100))
def test_a_shift_of_all_rows_changes_neither_term(pair, shift):
    rows, _, valid = pair
    for got, want in zip(
        variance_covariance(rows + shift, valid), variance_covariance(rows, valid), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(pairs())
def test_rows_that_are_not_valid_reach_neither_term_nor_gradient(pair):
    rows, _, valid = pair
    bad = torch.where(valid[..., None], rows, torch.nan).requires_grad_()
    got, want = variance_covariance(bad, valid), variance_covariance(rows, valid)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in got), bad)
    assert grad.isfinite().all()
    assert (grad[~valid] == 0).all()


@pytest.mark.parametrize(("name", "value"), [("target", -1.0), ("epsilon", 0.0)])
def test_a_spread_that_makes_no_sense_is_refused(name, value):
    with pytest.raises(ValueError, match=f"variance_covariance: {name} is {value}; give"):
        variance_covariance(torch.eye(2), **{name: value})


# ------------------------------------------------------------------------- mutual information


@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_mutual_information_of_labels_is_that_of_sklearn(d, n, data):
    labels = [torch.tensor(data.draw(st.lists(st.integers(0, d - 1), min_size=n, max_size=n)))]
    labels += [torch.tensor(data.draw(st.lists(st.integers(0, d - 1), min_size=n, max_size=n)))]
    valid = data.draw(valid_rows((n,)))
    logits = [F.one_hot(x, d).double().mul(1e3).requires_grad_() for x in labels]
    got = mutual_information_loss(*logits, valid)
    first, second = (x[valid].numpy() for x in labels)
    both = np.concatenate([first, second]), np.concatenate([second, first])
    want = mutual_info_score(*both) if len(first) else 0.0
    assert got.item() == pytest.approx(-want, abs=1e-9)
    for grad in torch.autograd.grad(got, logits):
        assert grad.isfinite().all()


def slow_information(query, key):
    """Of two sets of logits (n, d), cell by cell."""
    first, second = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (query, key))
    joint = sum(np.outer(a, b) + np.outer(b, a) for a, b in zip(first, second, strict=True))
    joint = joint / joint.sum()
    sides = np.outer(joint.sum(1), joint.sum(0))
    return (joint * np.log(joint / sides)).sum()


@given(pairs(), st.floats(0.1, 20))
def test_mutual_information_is_that_of_the_joint_table_of_the_valid_rows(pair, scale):
    query, key, valid = pair
    bad = torch.where(valid[..., None], scale * query, torch.nan).requires_grad_()
    got = mutual_information_loss(bad, key, valid, reduction="none")
    d = query.shape[-1]
    assert got.shape == query.shape[:-2]
    assert ((got <= 0) & (got >= -math.log(max(1, d)))).all()
    for place in torch.ones_like(got).nonzero().tolist():
        one, other, keep = ((x[tuple(place)]) for x in (scale * query, key, valid))
        want = slow_information(one[keep].numpy(), other[keep].numpy()) if keep.any() else 0.0
        assert got[tuple(place)].item() == pytest.approx(-want, abs=1e-9)
    turned = mutual_information_loss(key, bad, valid, reduction="none")
    moved = mutual_information_loss(bad.flip(-1), key.flip(-1), valid, reduction="none")
    torch.testing.assert_close(turned, got, **CLOSE)  # neither side is first
    torch.testing.assert_close(moved, got, **CLOSE)  # nor has a category a name
    (grad,) = torch.autograd.grad(got.sum(), bad)
    assert grad.isfinite().all()
    assert (grad[~valid] == 0).all()
    mean = mutual_information_loss(bad, key, valid)
    torch.testing.assert_close(mean, mean_of_valid(got, valid.any(-1)), **CLOSE)


# ------------------------------------------------------------- structure of a set, and neighbors


@st.composite
def structures(draw, least=0):
    """Tokens of a student and a teacher of another width, and which are valid."""
    batch, n = draw(batches()), draw(st.integers(least, 7))
    shapes = [(*batch, n, draw(st.integers(1, 5))) for _ in range(2)]
    return *(draw(tensors(shape)) for shape in shapes), draw(valid_rows((*batch, n)))


def orthogonal(generator, d):
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def slow_alignment(student, teacher, valid):
    """1 - CKA of the valid tokens of one image, by the centered matrices n x n."""
    centered = []
    for tokens in (student[valid], teacher[valid]):
        center = torch.eye(len(tokens), dtype=torch.float64) - 1 / max(1, len(tokens))
        centered.append(center @ (tokens @ tokens.T) @ center)
    norm = centered[0].norm() * centered[1].norm()
    return 1 - (centered[0] * centered[1]).sum() / norm if norm > 1e-12 else torch.tensor(1.0)


def slow_gram(student, teacher, valid):
    rows = [F.normalize(x[valid], dim=-1) for x in (student, teacher)]
    return (rows[0] @ rows[0].T - rows[1] @ rows[1].T).square().mean()


STRUCTURES = [(kernel_alignment, slow_alignment, 2), (gram_loss, slow_gram, 1)]
of_structure = pytest.mark.parametrize(
    ("loss", "slow", "least"), STRUCTURES, ids=lambda x: getattr(x, "__name__", "")
)


@of_structure
@given(problem=structures())
def test_structure_is_that_of_the_matrices_of_the_valid_tokens(loss, slow, least, problem):
    student, teacher, valid = problem
    got = loss(*problem, reduction="none")
    assert got.shape == valid.shape[:-1]
    assert ((got >= 0) & (got <= 4)).all()
    enough = valid.sum(-1) >= least
    for index in enough.nonzero().tolist():
        place = tuple(index)
        want = slow(student[place], teacher[place], valid[place]).double()
        torch.testing.assert_close(got[place], want, rtol=0, atol=1e-9)
    assert (got[~enough] == 0).all()
    torch.testing.assert_close(loss(*problem), mean_of_valid(got, enough), **CLOSE)


@of_structure
@given(problem=structures(), data=st.data())
def test_structure_does_not_see_what_is_not_valid_nor_the_order(loss, slow, least, problem, data):
    student, teacher, valid = problem
    want = loss(*problem)
    bad = [torch.where(valid[..., None], x, torch.nan).requires_grad_() for x in (student, teacher)]
    got = loss(*bad, valid)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got, bad, allow_unused=True)
    assert grads[0].isfinite().all()
    assert grads[1] is None
    order = torch.randperm(valid.shape[-1], generator=data.draw(generators()))
    moved = loss(student[..., order, :], teacher[..., order, :], valid[..., order])
    torch.testing.assert_close(moved, want, rtol=0, atol=1e-9)


@given(st.integers(3, 8), st.integers(1, 6), st.floats(-3, 3), generators(), st.booleans())
def test_a_turned_scaled_and_moved_set_is_aligned(n, d, exponent, generator, mirrored):
    tokens = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    scale = (-1) ** mirrored * 10.0**exponent
    student = tokens @ orthogonal(generator, d) * scale + torch.randn(d, generator=generator)
    assert kernel_alignment(student, tokens) < 1e-9


@given(st.integers(1, 8), st.integers(1, 6), generators())
def test_turned_tokens_of_other_lengths_have_the_same_gram(n, d, generator):
    tokens = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    lengths = uniform(generator, 2, n, 1, low=0.1, high=10)
    assert gram_loss(tokens @ orthogonal(generator, d) * lengths, tokens) < 1e-12


@given(structures(least=2))
def test_gradients_of_structure_change_no_mean_and_no_length(problem):
    student, teacher, _ = problem
    student = student.requires_grad_()
    (grad,) = torch.autograd.grad(kernel_alignment(student, teacher), student)
    torch.testing.assert_close(grad.sum(-2), torch.zeros_like(grad[..., 0, :]), rtol=0, atol=1e-9)
    along = (grad * student).sum((-2, -1))
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-9)
    (grad,) = torch.autograd.grad(gram_loss(student, teacher), student)
    along = (grad * student).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_set_of_equal_tokens_is_not_aligned_and_has_no_gradient(dtype, masked):
    student = torch.full((49, 3), 0.1, dtype=dtype)
    valid = torch.arange(49) > 2 if masked else None
    if masked:
        student[0] = 7.0
    student.requires_grad_()
    teacher = uniform(seeded(), 49, 4).to(dtype)
    total = kernel_alignment(student, teacher, valid)
    assert total == 1
    assert (torch.autograd.grad(total, student)[0] == 0).all()
    assert kernel_alignment(teacher, student.detach(), valid) == 1


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(generator=generators())
def test_tokens_that_differ_by_rounding_alone_have_no_gradient(dtype, unit, generator):
    tokens = uniform(generator, 1, 16, dtype=dtype).expand(49, 16)
    if unit:
        tokens = tokens * uniform(generator, 49, 1, low=0.5, high=2.0, dtype=dtype)
    weights = uniform(generator, 49, 49, dtype=dtype)
    mixed = (weights / weights.sum(-1, keepdim=True)) @ tokens  # as an interpolation rounds
    student = (tokens if unit else mixed).clone().requires_grad_()
    total = kernel_alignment(student, uniform(generator, 49, 4, dtype=dtype), unit=unit)
    assert total == 1
    assert (torch.autograd.grad(total, student)[0] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stays_in_the_alignment(value):
    student, teacher = uniform(seeded(), 9, 3), uniform(seeded(), 9, 4)
    student[2, 1] = value
    assert kernel_alignment(student, teacher).isnan()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_alignment_needs_no_scale(scale):
    student, teacher = uniform(seeded(), 2, 9, 4), uniform(seeded(1), 2, 9, 4)
    got = kernel_alignment((scale * student).float(), (scale * teacher).float())
    torch.testing.assert_close(got.double(), kernel_alignment(student, teacher), rtol=1e-5, atol=0)


def test_unit_tokens_are_aligned_by_their_directions():
    student, teacher = uniform(seeded(), 9, 4), uniform(seeded(1), 9, 4)
    lengths = uniform(seeded(2), 9, 1, low=0.1)
    got = kernel_alignment(lengths * student, teacher, unit=True)
    want = kernel_alignment(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))
    torch.testing.assert_close(got, want, **CLOSE)


@st.composite
def neighborhoods(draw, least=1):
    """Points of a student and a teacher, references and which points are valid."""
    batch, d = draw(batches()), draw(st.integers(1, 4))
    n, r = draw(st.integers(0, 4)), draw(st.integers(least, 6))
    points = [draw(tensors((*batch, count, d))) for count in (n, n, r)]
    return *points, draw(valid_rows((*batch, n)))


def plans(points, rows, steepness, metric, network):
    similarity = F.normalize(points, dim=-1) @ F.normalize(rows, dim=-1).mT
    if metric == "euclidean":
        similarity = torch.cdist(points, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return soft_sort(similarity, steepness=steepness, network=network).plan


@given(neighborhoods(), st.sampled_from(["cosine", "euclidean"]), st.booleans(), st.floats(1, 50))
def test_the_order_loss_is_the_cross_entropy_of_two_plans(problem, metric, odd_even, steepness):
    student, teacher, rows, valid = problem
    options = {"metric": metric, "network": "odd_even" if odd_even else "bitonic"}
    got = neighbor_order_loss(
        *problem, steepness=steepness, teacher_steepness=9.0, reduction="none", **options
    )
    wanted = plans(teacher, rows, 9.0, **options)
    found = plans(student, rows, steepness, **options)
    want = -(wanted * found.log()).sum(-1).mean(-1)
    torch.testing.assert_close(got, torch.where(valid, want, 0.0), rtol=1e-9, atol=1e-9)
    entropy = -(wanted * wanted.log()).sum(-1).mean(-1)
    assert (got >= torch.where(valid, entropy, 0.0) - 1e-9).all()


@given(neighborhoods(), generators())
def test_one_turn_of_all_changes_no_loss_of_neighbors(problem, generator):
    *points, valid = problem
    turn = orthogonal(generator, points[0].shape[-1])
    for loss in (neighbor_order_loss, neighbor_distribution_loss):
        got = loss(*(x @ turn for x in points), valid)
        torch.testing.assert_close(got, loss(*problem), rtol=1e-8, atol=1e-8)


@given(neighborhoods())
def test_a_student_like_its_teacher_has_the_least_loss_of_neighbors(problem):
    student, teacher, rows, valid = problem
    for loss, same in (
        (neighbor_order_loss, {"steepness": 5.0}),
        (neighbor_distribution_loss, {"student_temperature": 0.3, "teacher_temperature": 0.3}),
    ):
        inputs = [x.clone().requires_grad_() for x in (student, teacher, rows)]
        least = loss(teacher, teacher, rows, valid, **same, reduction="none")
        got = loss(*inputs, valid, **same, reduction="none")
        assert (got >= least - 1e-9).all()
        grads = torch.autograd.grad(got.sum(), inputs, allow_unused=True)
        assert grads[0].isfinite().all()
        assert grads[1:] == (None, None)


@given(neighborhoods(least=0), st.data())
def test_the_distribution_loss_is_torchs_over_the_allowed_references(problem, data):
    student, teacher, rows, valid = problem
    allowed = data.draw(valid_rows((*valid.shape, rows.shape[-2])), label="allowed")
    none = ~allowed.any(-2)
    spoiled = torch.where(none[..., None], torch.nan, rows)
    student.requires_grad_()
    got = neighbor_distribution_loss(student, teacher, spoiled, valid, allowed, reduction="none")
    logits = [F.normalize(x, dim=-1) @ F.normalize(rows, dim=-1).mT for x in (student, teacher)]
    counted = valid & allowed.any(-1)
    for index in counted.nonzero().tolist():
        place = tuple(index)
        own, other = (x[place][allowed[place]] for x in logits)
        want = F.cross_entropy(own / 0.1, (other / 0.04).softmax(-1))
        torch.testing.assert_close(got[place], want, rtol=1e-9, atol=1e-9)
    assert (got[~counted] == 0).all()
    spoiled_points = torch.where(counted[..., None], student, torch.nan)
    total = neighbor_distribution_loss(spoiled_points, teacher, spoiled, valid, allowed)
    (grad,) = torch.autograd.grad(total, spoiled_points)
    assert grad.isfinite().all()
    assert (grad[~counted] == 0).all()
    total = neighbor_distribution_loss(student, teacher, spoiled, valid, allowed)
    torch.testing.assert_close(total, mean_of_valid(got, counted), **CLOSE)
    assert torch.autograd.grad(total, student)[0].isfinite().all()
    order = torch.randperm(rows.shape[-2], generator=data.draw(generators()))
    moved = neighbor_distribution_loss(
        student, teacher, spoiled[..., order, :], valid, allowed[..., order]
    )
    torch.testing.assert_close(moved, total, **CLOSE)


def test_the_order_loss_stores_no_plan_and_has_the_gradient_of_one_that_does():
    student, teacher, rows = (uniform(seeded(i), 8, 30, 4, low=-1) for i in range(3))
    rows = torch.cat([rows] * 2, -2)[:, :49]
    stored = []

    def note(x):
        stored.append(x.numel())
        return x

    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        total = neighbor_order_loss(student, teacher, rows, steepness=20.0)
    assert max(stored) < 8 * 30 * 49 * 49 / 20
    (grad,) = torch.autograd.grad(total, student)
    # Inside torch.func nothing is computed again.
    want = torch.func.grad(lambda x: neighbor_order_loss(x, teacher, rows, steepness=20.0))
    torch.testing.assert_close(grad, want(student.detach()), rtol=0, atol=1e-12)


def test_without_references_there_is_no_loss():
    student = uniform(seeded(), 3, 4).requires_grad_()
    for loss in (neighbor_order_loss, neighbor_distribution_loss):
        total = loss(student, student, student[:0])
        assert total == 0
        assert (torch.autograd.grad(total, student)[0] == 0).all()


def given_numbers(name):
    return {key: torch.from_numpy(x) for key, x in np.load(DATA / f"{name}_0.npz").items()}


GIVEN = [
    ("paka_gauss_B2_N16_D8", lambda x, g: kernel_alignment(x, g["teacher"], g["valid"])),
    ("paka_constant_student", lambda x, g: kernel_alignment(x, g["teacher"], g["valid"])),
    (
        "gram_B2_N16_D8_clip",
        lambda x, g: gram_loss(x, g["teacher"], g["valid"], clip_negative=True),
    ),
    (
        "neco_pair_cosine_bitonic_r4_s10",
        lambda x, g: neighbor_order_loss(
            *map(map_to_rows, (x, g["teacher"], g["reference"])), steepness=10.0
        ),
    ),
    (
        "neighbors_n16_m16_excluded",
        lambda x, g: neighbor_distribution_loss(
            x,
            g["teacher"],
            g["references"],
            allowed=g["allowed"],
            student_temperature=g["student_temperature"],
            teacher_temperature=g["teacher_temperature"],
        ),
    ),
]


@pytest.mark.parametrize(("name", "loss"), GIVEN, ids=[name for name, _ in GIVEN])
def test_structure_and_neighbors_give_the_known_numbers(name, loss):
    golden = given_numbers(name)
    student = golden["student"].requires_grad_()
    total = loss(student, golden)
    torch.testing.assert_close(total, golden["loss"], rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(grad, golden["grad_student"], rtol=1e-10, atol=1e-10)


# ---- excluded categories, small temperatures, no channels ----------------------------------------


@given(
    st.lists(
        st.lists(st.sampled_from([-torch.inf, -1.0, 0.5, 2.0]), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_the_center_of_a_category_is_the_mean_of_the_rows_that_do_not_exclude_it(rows):
    got = update_center(torch.zeros(3), torch.tensor(rows), momentum=0.0)
    for value, column in zip(got.tolist(), zip(*rows, strict=True), strict=True):
        included = [x for x in column if x > -torch.inf]
        want = sum(included) / len(included) if included else -torch.inf
        assert value == pytest.approx(want, abs=1e-6)


def test_a_center_of_an_excluded_category_changes_no_other_row():
    student, inf = torch.rand(2, 3), torch.inf
    teacher = torch.tensor([[1.0, 2.0, -inf], [1.0, 2.0, 3.0]])
    got = self_distillation(student, teacher, torch.tensor([0.1, 0.2, -inf]), reduction="none")
    want = self_distillation(student, teacher, torch.tensor([0.1, 0.2, 0.0]), reduction="none")
    assert torch.equal(got, want)
    assert got.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-39, 1e-300])
def test_a_temperature_below_the_range_of_the_dtype_is_its_end(temperature):
    x, others = torch.eye(3, 4), torch.ones(2, 4)
    smallest = torch.finfo(torch.float32).tiny
    zeros = torch.zeros(4)
    for number in (temperature, smallest):
        found = [
            info_nce(x, x, temperature=number),
            info_nce(x, x, others, temperature=number),
            self_distillation(x, x, zeros, student_temperature=number, teacher_temperature=number),
        ]
        if number == temperature:
            got = found
    assert not any(y.isnan() for y in got)
    assert got == found


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.long])
def test_a_dtype_without_products_is_refused(dtype):
    x = torch.eye(3)
    with pytest.raises(ValueError, match="info_nce: product_dtype is torch"):
        info_nce(x, x, temperature=1.0, product_dtype=dtype)


def test_rows_without_channels_have_values():
    none = torch.zeros(3, 0)
    total = info_nce(none, none, torch.zeros(2, 0), temperature=0.1)
    assert total == pytest.approx(math.log(3))  # all cosines are 0
    assert variance_covariance(none) == (0, 0)
