"""Clustering against POT, scikit-learn, the authors' numbers and slow loops; and its promises."""

import math
import re
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import on_processes
from scipy.spatial.distance import cdist
from strategies import batches, flips, generators, tensors, uniform
from densekit import (
    pool_masks,
    positional_cost,
    prune_clusters,
    sample_tokens,
    sinkhorn,
    sinkhorn_merge,
    split_assignments,
    swav_codes,
)

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

DATA = Path(__file__).parent / "data"
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES)
precisions = pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shares(generator, *shape, dtype=torch.float64, zeros=False):
    """Masses of sum 1, all positive, or with zeros but for the first."""
    mass = uniform(generator, *shape, low=0.1)
    if zeros:
        mass[..., 1:] = torch.where(flips(generator, *mass[..., 1:].shape), mass[..., 1:], 0.0)
    return (mass / mass.sum(-1, keepdim=True)).to(dtype)


@st.composite
def transports(draw, batch=None, dtype=torch.float64, zeros=None, high=2.0):
    """Cost in [0, high) and marginals of sum 1."""
    batch = draw(batches()) if batch is None else batch
    zeros = draw(st.booleans()) if zeros is None else zeros
    n, k, generator = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(generators())
    cost = uniform(generator, *batch, n, k, high=high).to(dtype)
    row, col = (shares(generator, *batch, x, dtype=dtype, zeros=zeros) for x in (n, k))
    return cost, row, col


def chi_square(counts, chances):
    """How far counts are from their expectation, in standard deviations of that distance."""
    possible = chances > 0
    assert (counts[~possible] == 0).all()
    expected = chances[possible] * counts.sum()
    distance = ((counts[possible] - expected) ** 2 / expected).sum()
    degrees = possible.sum() - 1
    return ((distance - degrees) / math.sqrt(2 * degrees)).item()


# ---------------------------------------------------------------------------------- sinkhorn


@precisions
@given(data=st.data())
def test_the_columns_have_their_mass_exactly(dtype, atol, data):
    cost, row, col = data.draw(transports(dtype=dtype), label="problem")
    reg = data.draw(st.sampled_from([0.02, 0.3, 5.0]), label="reg")
    plan = sinkhorn(cost, row, col, reg=reg, iterations=data.draw(st.integers(1, 4)))
    assert plan.dtype == dtype
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(-2), col, rtol=0, atol=atol)
    assert (plan[(row == 0)[..., None].expand_as(plan)] == 0).all()
    uniform_plan = sinkhorn(cost, reg=reg, iterations=1)
    want = torch.full_like(col, 1 / col.shape[-1])
    torch.testing.assert_close(uniform_plan.sum(-2), want, rtol=0, atol=atol)


@precisions
@given(data=st.data())
def test_the_rows_have_their_mass_in_the_limit(dtype, atol, data):
    cost, row, col = data.draw(transports(dtype=dtype), label="problem")
    plan = sinkhorn(cost, row, col, reg=1.0, iterations=50)
    torch.testing.assert_close(plan.sum(-1), row, rtol=0, atol=atol)
    plan = sinkhorn(cost, reg=1.0, iterations=50)
    want = torch.full_like(row, 1 / row.shape[-1])
    torch.testing.assert_close(plan.sum(-1), want, rtol=0, atol=atol)


@given(transports(zeros=False))
def test_the_limit_is_the_regularized_optimum(problem):
    """There the logarithm of the plan is the cost's, but for a term a row and one a column."""
    cost, row, col = problem
    rest = sinkhorn(cost, row, col, reg=1.0, iterations=50).log() + cost
    rest = rest - rest[..., :1] - rest[..., :1, :] + rest[..., :1, :1]
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@given(data=st.data())
def test_a_shift_of_a_row_or_of_all_changes_nothing(dtype, atol, data):
    cost, row, col = data.draw(transports(dtype=dtype), label="problem")
    cost = (cost * 64).round() / 64  # so that the shifted cost is exact
    options = {"reg": data.draw(st.floats(0.5, 2), label="reg"), "iterations": 3}
    want = sinkhorn(cost, row, col, **options)
    shift = (uniform(data.draw(generators()), *row.shape, 1, low=-999, high=999)).round()
    for moved in (cost + 1000, cost - 1000, cost + shift.to(dtype)):
        got = sinkhorn(moved, row, col, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@given(transports(), st.data())
def test_permuted_rows_and_columns_permute_the_plan(problem, data):
    cost, row, col = problem
    i, j = (torch.randperm(x.shape[-1], generator=data.draw(generators())) for x in (row, col))
    got = sinkhorn(cost[..., i, :][..., j], row[..., i], col[..., j], reg=0.3, iterations=3)
    want = sinkhorn(cost, row, col, reg=0.3, iterations=3)[..., i, :][..., j]
    torch.testing.assert_close(got, want, **CLOSE)


@given(transports(zeros=False), st.sampled_from([0.05, 0.3, 2.0]), st.integers(1, 12))
def test_plans_are_pots_at_every_number_of_iterations(problem, reg, iterations):
    cost, row, col = problem
    plan = sinkhorn(*problem, reg=reg, iterations=iterations)
    sizes = (-1, *cost.shape[-2:])
    parts = cost.reshape(sizes), row.reshape(-1, sizes[1]), col.reshape(-1, sizes[2])
    for got, c, r, b in zip(plan.reshape(sizes), *(x.numpy() for x in parts), strict=True):
        for method in ("sinkhorn", "sinkhorn_log"):
            # POT ends on the rows; ours on the columns.
            want = ot.sinkhorn(
                b, r, c.T, reg, method=method, numItermax=iterations, stopThr=0, warn=False
            )
            np.testing.assert_allclose(got.numpy(), want.T, rtol=0, atol=1e-12)


@given(transports((), zeros=True))
def test_plans_are_pots_of_what_has_mass(problem):
    cost, row, col = problem
    plan = sinkhorn(*problem, reg=1.0, iterations=50)
    i, j = row > 0, col > 0
    part = (x.numpy() for x in (col[j], row[i], cost[i][:, j].mT))
    want = ot.sinkhorn(*part, 1.0, numItermax=50, stopThr=0, warn=False)
    np.testing.assert_allclose(plan[i][:, j].numpy(), want.T, rtol=0, atol=1e-11)
    assert (plan[~i] == 0).all()
    assert (plan[:, ~j] == 0).all()


def ragged(generator, batch, n, k):
    """Rows and columns in use, of each problem, and the entries where both are."""
    rows, cols = flips(generator, *batch, n), flips(generator, *batch, k)
    return rows, cols, rows[..., None] & cols[..., None, :]


@given(transports((3,)), st.data())
def test_a_masked_problem_is_the_smaller_one_alone(problem, data):
    cost, row, col = problem
    rows, cols, valid = ragged(data.draw(generators()), (3,), row.shape[-1], col.shape[-1])
    filled = torch.where(valid, cost, torch.nan).requires_grad_()
    options = {"reg": 0.3, "iterations": 3}
    for marginals in ((), (row, col)):
        got = sinkhorn(filled, *marginals, valid=valid, **options)
        assert (got[~valid] == 0).all()
        assert got.isfinite().all()
        for b in range(3):
            r, c = rows[b], cols[b]
            masses = (x[b][keep] for x, keep in zip(marginals, (r, c), strict=False))
            want = sinkhorn(cost[b][r][:, c], *masses, **options)
            torch.testing.assert_close(got[b][r][:, c], want, **CLOSE)
        weights = uniform(seeded(), *got.shape)
        (grad,) = torch.autograd.grad((got * weights).sum(), filled)
        assert grad.isfinite().all()
        assert (grad[~valid] == 0).all()


def test_a_problem_without_valid_entries_has_an_empty_plan():
    cost = uniform(seeded(), 2, 3, 4).requires_grad_()
    valid = torch.tensor([False, True])[:, None, None].expand(2, 3, 4)
    plan = sinkhorn(cost, reg=0.1, iterations=3, valid=valid)
    assert (plan[0] == 0).all()
    torch.testing.assert_close(plan[1], sinkhorn(cost[1], reg=0.1, iterations=3), **CLOSE)
    (grad,) = torch.autograd.grad(plan.square().sum(), cost)
    assert (grad[0] == 0).all()
    assert grad.isfinite().all()
    assert (grad[1] != 0).any()


def test_scattered_forbidden_entries_carry_nothing():
    cost = uniform(seeded(), 4, 4)
    valid = ~torch.eye(4, dtype=torch.bool)
    got = sinkhorn(cost, reg=0.5, iterations=200, valid=valid)
    assert torch.equal(got == 0, ~valid)
    torch.testing.assert_close(got.sum(-1), torch.full((4,), 0.25).double(), rtol=0, atol=1e-9)
    forbidden = torch.where(valid, cost, torch.inf)
    assert torch.equal(got, sinkhorn(forbidden, reg=0.5, iterations=200))


@given(transports(zeros=True))
def test_masses_of_zero_have_finite_gradients(problem):
    inputs = [x.requires_grad_() for x in problem]
    plan = sinkhorn(*inputs, reg=0.3, iterations=3)
    weights = uniform(seeded(), *plan.shape)
    for grad in torch.autograd.grad((plan * weights).sum(), inputs):
        assert grad.isfinite().all()


WILD = {
    "logits of std 50": torch.randn(8, 6, generator=seeded()) * 50,
    "one dead column": torch.rand(8, 6, generator=seeded()) + 1e6 * (torch.arange(6) == 2),
    "one dead row": torch.rand(8, 6, generator=seeded()) + 1e6 * (torch.arange(8) == 2)[:, None],
    "all dead but one column": torch.rand(8, 6, generator=seeded()) + 1e6 * (torch.arange(6) != 2),
    "one row": torch.randn(1, 6, generator=seeded()) * 50,
    "one column": torch.randn(8, 1, generator=seeded()) * 50,
    "one entry": torch.full((1, 1), -300.0),
    "all alike": torch.full((8, 6), 7.0),
    "a shift of 5 at std 3": torch.randn(8, 6, generator=seeded()) * 3 + 5,
}


@pytest.mark.parametrize("name", WILD)
@pytest.mark.parametrize("reg", [1.0, 0.05, 1e-3])
def test_wild_costs_are_finite_and_fill_the_columns(name, reg):
    cost = WILD[name].clone().requires_grad_()
    plan = sinkhorn(cost, reg=reg, iterations=3)
    k = cost.shape[1]
    torch.testing.assert_close(plan.sum(0), torch.full((k,), 1 / k), rtol=0, atol=1e-6)
    assert torch.autograd.grad((plan * torch.arange(k)).sum(), cost)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [1e-320, 1e-100, 1e100, math.inf])
def test_a_strength_beyond_the_range_of_the_dtype_is_its_end(reg, dtype):
    cost = uniform(seeded(), 5, 4, dtype=dtype)
    cost[1, 2] = torch.inf
    plan = sinkhorn(cost, reg=reg, iterations=3)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 0.25, dtype=dtype))
    assert plan[1, 2] == 0
    tokens, weights = uniform(seeded(), 6, 3, dtype=dtype), torch.ones(6, dtype=dtype)
    found = sinkhorn_merge(tokens, tokens[:, :2], weights, torch.arange(4), reg=reg)
    assert found.assignments.sum().item() == pytest.approx(1)


@halves
def test_half_precision_costs_are_widened(dtype):
    cost = (torch.randn(8, 6, generator=seeded()) * 20).to(dtype)
    plan = sinkhorn(cost, reg=0.05, iterations=3)
    assert plan.dtype == torch.float32
    assert torch.equal(plan, sinkhorn(cost.float(), reg=0.05, iterations=3))
    row, col = (shares(seeded(i), n, dtype=dtype) for i, n in enumerate((8, 6)))
    plan = sinkhorn(cost, row, col, reg=0.05, iterations=3)
    torch.testing.assert_close(plan.sum(0), col.float(), rtol=0, atol=1e-6)


BOUNDS = [(0, 11), (0, 3, 11), (0, 1, 4, 6, 11), (0, 0, 11)]  # rows of each process


def plans_of_a_part(rank, group, problems, bounds):
    part, plans = slice(*bounds[rank : rank + 2]), []
    for cost, row, col, valid in problems:
        here = cost[..., part, :].clone().requires_grad_()
        plan = sinkhorn(
            here,
            None if row is None else row[..., part].clone().requires_grad_(),
            None if col is None else col.clone().requires_grad_(),
            reg=0.3,
            iterations=4,
            valid=None if valid is None else valid[..., part, :],
            group=group,
        )
        assert not plan.requires_grad
        plans.append(plan)
    return plans


@pytest.mark.parametrize("bounds", BOUNDS)
def test_rows_spread_over_processes_have_the_plan_of_one(bounds):
    generator = seeded()
    cost = uniform(generator, 2, 11, 5, high=2.0)
    row, col = shares(generator, 2, 11), shares(generator, 2, 5)
    rows, _, valid = ragged(generator, (2,), 11, 5)
    rows[:, :3] = False  # the first process of two has no valid row
    valid = valid & rows[..., None]
    lonely = torch.ones(2, 11, 5, dtype=torch.bool)
    lonely[0, 1:, 2] = False  # a column that only the first process can fill
    problems = [
        (cost, None, None, None),
        (cost, row, col, None),
        (cost, None, None, valid),
        (cost, row, col, valid),
        (cost, None, None, lonely),
        (cost, None, None, torch.zeros_like(lonely)),
        (1000 + cost, None, col, None),
    ]
    parts = on_processes(len(bounds) - 1, plans_of_a_part, problems, bounds)
    for number, (cost, row, col, valid) in enumerate(problems):
        got = torch.cat([plans[number] for plans in parts], -2)
        want = sinkhorn(cost, row, col, reg=0.3, iterations=4, valid=valid)
        torch.testing.assert_close(got, want, **CLOSE)


# ---- SwAV's codes --------------------------------------------------------------------------------


def swavs_program(scores, epsilon, iterations):
    """SwAV's pseudo-code as the paper tells it, in plain float64: prototypes in rows."""
    plan = (scores.double() / epsilon).exp().T
    plan = plan / plan.sum()
    prototypes, samples = plan.shape
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / prototypes
        plan = plan / plan.sum(0, keepdim=True) / samples
    return (plan * samples).T


@given(st.data())
def test_codes_are_those_of_swavs_program(data):
    n, k = data.draw(st.integers(1, 9), label="n"), data.draw(st.integers(1, 6), label="k")
    scores = data.draw(tensors((n, k), low=-1, high=1), label="scores")
    options = {
        "epsilon": data.draw(st.floats(0.02, 2), label="epsilon"),
        "iterations": data.draw(st.integers(1, 6), label="iterations"),
    }
    got = swav_codes(scores, **options)
    torch.testing.assert_close(got, swavs_program(scores, **options), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(n, dtype=torch.float64), **CLOSE)
    options["reg"] = options.pop("epsilon")
    other_side = n * sinkhorn(-scores.mT, **options).mT
    torch.testing.assert_close(other_side, got, rtol=1e-9, atol=1e-12)
    assert torch.equal(swav_codes(scores), swav_codes(scores, epsilon=0.05, iterations=3))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), generators())
def test_codes_see_no_shift_of_a_prototype_or_of_all(n, k, iterations, generator):
    scores = uniform(generator, n, k, low=-1)
    shifts = uniform(generator, k, low=-50), uniform(generator, 1, low=-50)
    want = swav_codes(scores, iterations=iterations)
    for shift in shifts:
        got = swav_codes(scores + shift, iterations=iterations)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 6), st.integers(2, 4), generators(), st.floats(1, 1e4))
def test_codes_of_any_scores_are_finite_and_use_the_prototypes(n, k, generator, size):
    scores = size * uniform(generator, n, k, low=-1, dtype=torch.float32)
    got = swav_codes(scores)
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(-1), torch.ones(n))
    far = torch.cat([scores, torch.full((n, 1), -torch.inf)], -1)  # nobody may use it
    torch.testing.assert_close(swav_codes(far)[:, :k], got)
    assert (swav_codes(far)[:, k] == 0).all()


@given(st.integers(1, 6), st.integers(1, 4), generators())
def test_codes_of_the_samples_that_are_left_in_are_those_of_these_alone(n, k, generator):
    scores, valid = uniform(generator, n, k, low=-1), flips(generator, n)
    got = swav_codes(scores.masked_fill(~valid[:, None], -torch.inf))
    torch.testing.assert_close(got[valid], swav_codes(scores[valid]), **CLOSE)
    assert (got[~valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-320, 1e-100, 1e100, math.inf])
def test_a_smoothness_beyond_the_range_of_the_dtype_is_its_end(epsilon, dtype):
    scores = uniform(seeded(), 5, 4, low=-1, dtype=dtype)
    scores[1, 2] = -torch.inf
    codes = swav_codes(scores, epsilon=epsilon)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(-1), torch.ones(5, dtype=dtype))
    assert codes[1, 2] == 0


def codes_of_a_part(rank, group, problems, bounds):
    return [swav_codes(x[..., slice(*bounds[rank : rank + 2]), :], group=group) for x in problems]


@pytest.mark.parametrize("bounds", [(0, 9), (0, 2, 9), (0, 9, 9), (0, 1, 4, 4, 9)])
def test_codes_on_several_processes_are_those_of_one(bounds):
    scores = uniform(seeded(), 2, 9, 4, low=-1)
    left = torch.where(torch.arange(9)[:, None] < 3, -torch.inf, scores[0])
    dead = torch.where(torch.arange(4) < 1, -torch.inf, scores[0])
    problems = [scores, scores[0] * 100, left, dead]
    parts = on_processes(len(bounds) - 1, codes_of_a_part, problems, bounds)
    for number, x in enumerate(problems):
        got = torch.cat([codes[number] for codes in parts], -2)
        torch.testing.assert_close(got, swav_codes(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(swav_codes(scores[0]), swavs_program(scores[0], 0.05, 3))


@pytest.mark.parametrize(
    ("name", "value"), [("epsilon", 0.0), ("epsilon", math.nan), ("iterations", 0)]
)
def test_codes_without_smoothness_or_iterations_are_refused(name, value):
    with pytest.raises(ValueError, match=f"clustering.swav_codes: {name} is {value}; give "):
        swav_codes(torch.zeros(2, 2), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("reg", 0.0), ("reg", -1.0), ("reg", math.nan), ("iterations", 0)]
)
def test_transport_without_strength_or_iterations_is_refused(name, value):
    options = {"reg": 0.1, "iterations": 3, name: value}
    found = re.escape(f"{name} is {value}; give ")
    with pytest.raises(ValueError, match=f"clustering.sinkhorn: {found}"):
        sinkhorn(torch.zeros(2, 2), **options)
    problem = torch.eye(3), torch.zeros(3, 2), torch.ones(3), torch.arange(2)
    with pytest.raises(ValueError, match=f"clustering.sinkhorn_merge: {found}"):
        sinkhorn_merge(*problem, **options)


def in_logarithms(cost, row, col, reg, iterations, valid=None):
    """Sinkhorn with every sum in the log domain: slow, and as exact as the dtype."""
    logits = -cost / reg if valid is None else torch.where(valid, -cost / reg, -torch.inf)

    def log_sum(x, axis):
        """Zero where there is nothing, so that nothing minus it stays nothing."""
        some = (x > -torch.inf).any(axis, keepdim=True)
        safe = torch.where(some, x, 0.0).logsumexp(axis, keepdim=True)
        return torch.where(some, safe, 0.0)

    f, g = 0.0, torch.zeros_like(col[..., None, :])
    for _ in range(iterations):
        f = row[..., None].log() - log_sum(logits + g, -1)
        g = col[..., None, :].log() - log_sum(logits + f, -2)
    return (logits + f + g).exp()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@given(data=st.data(), std=st.sampled_from([0.1, 1.0, 4.0]), iterations=st.integers(1, 20))
def test_plans_are_those_of_the_log_domain(dtype, atol, data, std, iterations):
    generator = data.draw(generators(), label="generator")
    n, k = data.draw(st.integers(1, 40), label="n"), data.draw(st.integers(1, 20), label="k")
    cost = (torch.randn(2, n, k, generator=generator, dtype=torch.float64) * std).to(dtype)
    zeros = data.draw(st.booleans(), label="zeros")
    row, col = (shares(generator, 2, x, dtype=dtype, zeros=zeros) for x in (n, k))
    options = {"reg": 1.0, "iterations": iterations}
    want = in_logarithms(cost.double(), row.double(), col.double(), **options)
    got = sinkhorn(cost, row, col, **options)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    alike = [torch.full((2, x), 1 / x, dtype=torch.float64) for x in (n, k)]
    want = in_logarithms(cost.double(), *alike, **options)
    got = sinkhorn(cost, **options)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@given(
    data=st.data(),
    std=st.sampled_from([50.0, 1000.0]),
    power=st.sampled_from([1, 10, 30]),
    iterations=st.sampled_from([1, 2, 3, 5, 9, 40]),
)
def test_wild_plans_are_those_of_the_log_domain(data, std, power, iterations):
    """Logits and masses of any range: no factor or entry that counts underflows."""
    generator = data.draw(generators(), label="generator")
    n, k = data.draw(st.integers(2, 60), label="n"), data.draw(st.integers(2, 20), label="k")
    cost = torch.randn(n, k, generator=generator) * std
    masses = [torch.rand(x, generator=generator).clamp(min=0.01) ** power for x in (n, k)]
    row, col = (x / x.sum() for x in masses)
    valid = flips(generator, n, k) | flips(generator, n, k)
    valid[:, 0] = valid[0] = True
    problem = cost, row, col, valid
    want = in_logarithms(*(x.double() for x in problem[:3]), 1.0, iterations, valid)
    for dtype, atol in ((torch.float32, 1e-6 * std), (torch.float64, 1e-10)):
        parts = (x.to(dtype) for x in problem[:3])
        got = sinkhorn(*parts, reg=1.0, iterations=iterations, valid=valid)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


@given(transports(zeros=False), st.sampled_from([0.1, 1.0]), st.integers(1, 12))
def test_gradients_are_those_of_the_log_domain(problem, reg, iterations):
    inputs = [x.requires_grad_() for x in problem]
    weights = uniform(seeded(), *problem[0].shape)
    plans = (f(*inputs, reg=reg, iterations=iterations) for f in (sinkhorn, in_logarithms))
    got, want = (torch.autograd.grad((plan * weights).sum(), inputs) for plan in plans)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(transports((3,)), st.data())
def test_masses_that_are_not_used_change_nothing(problem, data):
    cost, row, col = problem
    _, _, valid = ragged(data.draw(generators()), (3,), row.shape[-1], col.shape[-1])
    want = sinkhorn(cost, row, col, reg=0.3, iterations=3, valid=valid)
    some_row, some_col = valid.any(-1), valid.any(-2)
    for odd in (torch.nan, torch.inf, 7.0):
        other = torch.where(some_row, row, odd), torch.where(some_col, col, odd)
        assert torch.equal(sinkhorn(cost, *other, reg=0.3, iterations=3, valid=valid), want)


def test_transport_of_nothing_is_nothing():
    for shape in ((0, 3), (3, 0), (2, 0, 0)):
        assert sinkhorn(torch.zeros(shape), reg=0.1, iterations=1).shape == shape


# --------------------------------------------------------------------------- positional cost


@st.composite
def places(draw):
    batch, generator = draw(batches()), draw(generators())
    sizes = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return tuple(uniform(generator, *batch, n, 2, high=224.0) for n in sizes)


@given(places())
def test_positional_cost_is_scipys_distance_over_its_largest(points):
    got = positional_cost(*points)
    assert ((got >= 0) & (got <= 1)).all()
    flat = (x.reshape(-1, *x.shape[-2:]).numpy() for x in points)
    for one, tokens, centers in zip(got.reshape(-1, *got.shape[-2:]), *flat, strict=True):
        want = cdist(tokens, centers)
        np.testing.assert_allclose(one.numpy(), want / want.max(), rtol=0, atol=1e-12)


@given(places(), st.floats(0.01, 100), st.floats(-1000, 1000), st.floats(-1000, 1000))
def test_positional_cost_does_not_see_scale_and_place(points, scale, x, y):
    moved = (scale * p + p.new_tensor([x, y]) for p in points)
    got, want = positional_cost(*moved), positional_cost(*points)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_that_coincide_have_cost_zero_and_finite_gradients(dtype):
    inputs = [torch.full((n, 2), 3.0, dtype=dtype, requires_grad=True) for n in (4, 2)]
    got = positional_cost(*inputs)
    assert torch.equal(got, torch.zeros(4, 2))
    points = uniform(seeded(), 4, 2, dtype=dtype)
    mixed = [points.requires_grad_(), points.detach()[:2].clone().requires_grad_()]
    cost = positional_cost(*mixed)
    assert torch.equal(cost[[0, 1], [0, 1]], torch.zeros(2))
    for result, leaves in ((got, inputs), (cost, mixed)):
        for grad in torch.autograd.grad(result.sum(), leaves):
            assert grad.isfinite().all()


# ------------------------------------------------------------------------------ sample tokens


@given(st.data())
def test_drawn_tokens_are_different_and_weighted_ones_come_first(data):
    batch, n = data.draw(batches(), label="batch"), data.draw(st.integers(1, 8), label="n")
    weights = data.draw(tensors((*batch, n), 0.0, 1.0), label="weights")
    weights = torch.where(flips(data.draw(generators()), *batch, n), weights, 0.0)
    count = data.draw(st.integers(0, n), label="count")
    seed = data.draw(st.integers(0, 999), label="seed")
    drawn = sample_tokens(weights, count, generator=seeded(seed))
    assert drawn.shape == (*batch, count)
    assert torch.equal(drawn, sample_tokens(weights, count, generator=seeded(seed)))
    assert ((drawn >= 0) & (drawn < n)).all()
    assert (drawn.sort().values.diff() > 0).all()
    weighted = weights.gather(-1, drawn) > 0
    assert (weighted.sum(-1) == (weights > 0).sum(-1).clamp(max=count)).all()
    assert (weighted[..., 1:] <= weighted[..., :-1]).all()


WEIGHTS = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.5, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_draws_follow_the_law_of_draws_without_replacement(dtype, scale):
    weights = (WEIGHTS * scale).to(dtype).expand(20_000, 6)
    first, second, third = sample_tokens(weights, 3, generator=seeded()).unbind(-1)
    p = WEIGHTS / WEIGHTS.sum()
    assert chi_square(first.bincount(minlength=6), p) < 4
    left = 1 - p[:, None]
    pairs = torch.where(torch.eye(6, dtype=torch.bool), 0.0, p[:, None] * p / left)
    assert chi_square((6 * first + second).bincount(minlength=36), pairs.flatten()) < 4
    after = left - p
    i, j, k = torch.meshgrid(*[torch.arange(6)] * 3, indexing="ij")
    different = (i != j) & (j != k) & (i != k)
    triples = torch.where(different, pairs[..., None] * p / after[..., None], 0.0)
    counts = (36 * first + 6 * second + third).bincount(minlength=216)
    assert chi_square(counts, triples.flatten()) < 4


def test_draws_are_distributed_as_those_of_torch():
    weights = WEIGHTS.expand(20_000, 6)
    drawn = torch.multinomial(weights, 2, generator=seeded())
    p = drawn.mul(torch.tensor([6, 1])).sum(-1).bincount(minlength=36) / 20_000
    got = sample_tokens(weights, 2, generator=seeded()).mul(torch.tensor([6, 1])).sum(-1)
    assert (got.bincount(minlength=36) / 20_000 - p).abs().max() < 0.02


def test_more_tokens_than_there_are_is_refused():
    for count in (4, -1):
        with pytest.raises(ValueError, match=f"sample_tokens: count is {count}, but there are 3"):
            sample_tokens(torch.ones(2, 3), count)


# ------------------------------------------------------- merging: the authors' program and CrOC


GOLDEN = sorted(path.name for path in DATA.glob("croc_*.npz"))
NUMBERS = re.compile(r"_B(\d+)_H(\d+)_N(\d+)_d(\d+)_K(\d+)_ncm(\d+)_lp(\d+)_lam(\d+)_it(\d+)_")


def golden_run(name, dtype, cost_range):
    """The vectors, the result on them, and it as hard clusters; `(b h)` problems, views joined."""
    golden = dict(np.load(DATA / name))
    b, h, n, d, _, most, position_weight, strength, iterations = map(
        int, NUMBERS.search(name).groups()
    )
    tokens = torch.from_numpy(golden["tokens"]).to(dtype).view(2, b, h, n + 1, d)[..., 1:, :]
    places = torch.from_numpy(golden["positions"]).to(dtype)[:, None].expand(b, h, 2 * n, 2)
    found = sinkhorn_merge(
        tokens.permute(1, 2, 0, 3, 4).reshape(b * h, 2 * n, d),
        places.reshape(b * h, 2 * n, 2),
        torch.from_numpy(golden["r"]).to(dtype),
        torch.from_numpy(golden["init_idx"]),
        reg=1 / strength,
        iterations=iterations,
        position_weight=position_weight,
        max_clusters=most,
        similarity="dot",
        merge="mass",
        cost_range=cost_range,
    )
    soft = split_assignments(found.assignments, normalize="columns")
    return golden, found, soft, prune_clusters(soft)


def padded(x, k):
    """At least k columns: the program keeps as many as an image of the batch has clusters."""
    return torch.nn.functional.pad(x, (0, max(k - x.shape[-1], 0)))


def assert_soft(soft, want, atol):
    k = want.shape[-1]
    soft = padded(soft.flatten(-3, -2), k)
    np.testing.assert_allclose(soft[..., :k].numpy(), want, rtol=0, atol=atol)
    assert (soft[..., k:] == 0).all()


def gap(name):
    """How far the discrete choices of a case are from the next best."""
    golden = np.load(DATA / name)
    return min(golden[f"gap_{choice}"].min() for choice in ("K", "merge", "hard"))


# A choice is compared where its gap is above the tolerance of the dtype.
RUNS = [
    (name, dtype, atol)
    for name in GOLDEN
    for dtype, atol in ((torch.float32, 1e-5), (torch.float64, 1e-10))
    if gap(name) > atol
]
golden_runs = pytest.mark.parametrize(("name", "dtype", "atol"), RUNS)


def test_there_are_golden_vectors():
    assert len(GOLDEN) == 5
    assert len(RUNS) == 8


@golden_runs
def test_clusters_of_the_authors_program(name, dtype, atol):
    golden, found, soft, hard = golden_run(name, dtype, "batch")
    assert found.assignments.dtype == dtype
    np.testing.assert_allclose(found.costs.numpy(), golden["costs"], rtol=0, atol=atol)
    np.testing.assert_array_equal(found.clusters.numpy(), golden["chosen_K"])
    np.testing.assert_array_equal(found.merges.numpy(), golden["merges"])
    assert_soft(soft, golden["soft"], atol)
    np.testing.assert_array_equal(hard.labels.flatten(1).numpy(), golden["hard_idx"])
    k = golden["soft"].shape[-1]
    valid = padded(hard.valid, k)
    assert not valid[:, k:].any()
    np.testing.assert_array_equal(valid[:, :k].flatten().nonzero()[:, 0].numpy(), golden["valid"])


@golden_runs
def test_clusters_of_the_authors_program_for_each_image_alone(name, dtype, atol):
    golden, found, soft, _ = golden_run(name, dtype, "problem")
    np.testing.assert_allclose(found.costs.numpy(), golden["img_costs"], rtol=0, atol=atol)
    np.testing.assert_array_equal(found.clusters.numpy(), golden["img_chosen_K"])
    assert_soft(soft, golden["img_soft"], atol)


@golden_runs
@pytest.mark.parametrize(("features", "key"), [("last_tokens", "c"), ("student_last_tokens", "s")])
def test_centroids_of_the_authors_program(name, dtype, atol, features, key):
    golden, _, _, hard = golden_run(name, dtype, "batch")
    b, h = (int(x) for x in NUMBERS.search(name).groups()[:2])
    tokens = torch.from_numpy(golden[features]).to(dtype).unflatten(0, (2, b))
    length = tokens[..., 0, :].norm(dim=-1).mean()  # of [CLS], over all images and views
    for view in range(2):
        own = hard.assignments[:, view].unflatten(0, (b, h))
        each = pool_masks(tokens[view, :, None, 1:].expand(-1, h, -1, -1), own, average=True)
        each = torch.nn.functional.normalize(each, dim=-1) * length
        got = each[hard.valid.unflatten(0, (b, h))]
        want = golden[f"{key}{view + 1}"]
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=atol)


def slow_merge(
    tokens, positions, weights, start, *, reg, iterations, position_weight, choose_by="cost"
):
    """One problem of tokens with weights above 0, as the paper has it, number by number."""
    n, d = tokens.shape
    z = np.array([[x / math.sqrt(sum(y * y for y in token)) for x in token] for token in tokens])
    r = np.array([w / sum(weights) for w in weights])
    y = np.zeros((n, len(start)))
    for column, token in enumerate(start):
        y[token, column] = 1
    c, e = y.T @ z, y.T @ positions  # Eq 8
    costs, merges, steps = [], [], []
    while True:
        k = y.shape[1]
        semantic = np.zeros((n, k))
        distance = np.array([[math.dist(positions[i], e[j]) for j in range(k)] for i in range(n)])
        for i in range(n):
            for j in range(k):
                length = math.sqrt(sum(x * x for x in c[j]))
                semantic[i, j] = -sum(z[i, m] * c[j, m] for m in range(d)) / length  # Eq 9
        t = distance / distance.max()  # Eq 17
        if position_weight < math.inf:
            t = semantic + position_weight * t  # Eq 18
        t = (t - t.min()) / (t.max() - t.min())
        share = y.T @ r
        marginal = np.exp(share) / np.exp(share).sum()  # Eq 10
        q = np.exp(-t / reg)  # Eq 11 and 12
        for _ in range(iterations):
            for i in range(n):
                q[i] *= r[i] / q[i].sum()
            for j in range(k):
                q[:, j] *= marginal[j] / q[:, j].sum()
        costs.append((q * (semantic if choose_by == "semantic" else t)).sum())  # Eq 13
        a = q / q.sum(0)
        c, e = a.T @ z, a.T @ positions
        steps.append((q, c))
        if k == 2:
            best = min(range(len(costs)), key=lambda step: costs[step])
            return *steps[best], costs, merges
        pair, alike = None, -math.inf  # Eq 14
        for i in range(k):
            for j in range(i + 1, k):
                cosine = c[i] @ c[j] / math.sqrt((c[i] @ c[i]) * (c[j] @ c[j]))
                if cosine > alike:
                    pair, alike = (i, j), cosine
        merges.append(pair)
        keep = [j for j in range(k) if j not in pair]
        c, e = (np.vstack([x[keep], x[list(pair)].mean(0)]) for x in (c, e))
        y = np.hstack([y[:, keep], y[:, list(pair)].mean(1, keepdims=True)])


@st.composite
def problems(draw, batch=None, dtype=torch.float64):
    """Tokens, positions, weights and start tokens."""
    batch, generator = draw(batches()) if batch is None else batch, draw(generators())
    n, d = draw(st.integers(3, 8)), draw(st.integers(2, 4))
    start = torch.rand(*batch, n, generator=generator).argsort(-1)
    return (
        uniform(generator, *batch, n, d, low=-1).to(dtype),
        uniform(generator, *batch, n, 2, high=16.0).to(dtype),
        uniform(generator, *batch, n, low=0.05).to(dtype),
        start[..., : draw(st.integers(2, min(n, 6)))],
    )


OPTIONS = {"reg": 0.05, "iterations": 5, "position_weight": 4.0}  # the defaults


def assert_same(got, want, **tolerance):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or CLOSE))


def assert_slow(problem, found, **options):
    plan, means, costs, merges = slow_merge(*(x.numpy() for x in problem), **options)
    k = plan.shape[1]
    assert found.clusters == k
    np.testing.assert_allclose(found.costs.numpy(), costs, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(found.merges.numpy(), np.array(merges).reshape(-1, 2))
    np.testing.assert_allclose(found.assignments[:, :k].numpy(), plan, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.centroids[:k].numpy(), means, rtol=0, atol=1e-10)
    assert (found.assignments[:, k:] == 0).all()
    assert (found.centroids[k:] == 0).all()


@given(problems(()))
def test_merging_is_the_papers(problem):
    assert_slow(problem, sinkhorn_merge(*problem), **OPTIONS)


# A strength below 1/30 takes another way, through logarithms.
@given(
    problems(()),
    st.sampled_from([1.0, 0.2, 1 / 30, 0.0333, 0.01, 0.004]),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.5, 4.0, math.inf]),
    st.sampled_from(["cost", "semantic"]),
)
def test_merging_is_the_papers_for_other_options(
    problem, reg, iterations, position_weight, choose_by
):
    options = {"reg": reg, "iterations": iterations, "position_weight": position_weight}
    options["choose_by"] = choose_by
    assert_slow(problem, sinkhorn_merge(*problem, **options), **options)


@pytest.mark.parametrize("reg", [1 / 30, 0.0333, 0.01, 1e-3])
@given(problem=problems(()))
def test_sharp_plans_of_single_precision_are_those_of_double(reg, problem):
    got = sinkhorn_merge(*(x.float() for x in problem[:3]), problem[3], reg=reg)
    want = sinkhorn_merge(*problem, reg=reg)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got.costs[:1].double(), want.costs[:1], rtol=0, atol=1e-4)
    assert got.assignments.sum().item() == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------- merging: promises


VARIANTS = [
    {},
    {"similarity": "dot", "merge": "mass"},
    {"reg": 0.02},
    {"position_weight": math.inf, "choose_by": "semantic"},
]
VARIANT_NAMES = ["paper", "program", "logarithms", "positions"]
variants = pytest.mark.parametrize("options", VARIANTS, ids=VARIANT_NAMES)


@variants
@given(problem=problems((3,)))
def test_clusters_of_an_image_do_not_depend_on_its_neighbors(options, problem):
    together = sinkhorn_merge(*problem, **options)
    for b in range(3):
        alone = sinkhorn_merge(*(x[b] for x in problem), **options)
        assert_same([x[b] for x in together], alone)


def test_clusters_depend_on_the_neighbors_when_asked():
    problem = [
        uniform(seeded(0), 2, 8, 3, low=-1),
        uniform(seeded(1), 2, 8, 2),
        torch.ones(2, 8).double(),
        torch.arange(4).expand(2, 4),
    ]
    problem[0][1] = problem[0][1, :1]  # the neighbor's cost has another range
    together = sinkhorn_merge(*problem, cost_range="batch")
    alone = sinkhorn_merge(*(x[:1] for x in problem), cost_range="batch")
    assert (together.costs[:1] - alone.costs).abs().max() > 1e-3
    assert_same(alone, sinkhorn_merge(*(x[:1] for x in problem)))


@variants
@given(problem=problems(), data=st.data())
def test_the_order_of_the_tokens_does_not_matter(options, problem, data):
    tokens, positions, weights, start = problem
    order = torch.randperm(tokens.shape[-2], generator=data.draw(generators()))
    got = sinkhorn_merge(
        tokens[..., order, :],
        positions[..., order, :],
        weights[..., order],
        order.argsort()[start],
        **options,
    )
    want = sinkhorn_merge(*problem, **options)
    want = want._replace(assignments=want.assignments[..., order, :])
    assert_same(got, want, rtol=0, atol=1e-10)


@variants
@given(
    problem=problems(),
    scale=st.floats(0.01, 100),
    shift=st.floats(-1000, 1000),
    weight=st.floats(1e-6, 1e6),
)
def test_place_scale_lengths_and_total_weight_do_not_matter(options, problem, scale, shift, weight):
    tokens, positions, weights, start = problem
    moved = scale * positions + positions.new_tensor([shift, -shift / 2])
    got = sinkhorn_merge(tokens * scale, moved, weights * weight, start, **options)
    assert_same(got, sinkhorn_merge(*problem, **options), rtol=0, atol=1e-8)


@variants
@given(problem=problems(), data=st.data())
def test_a_token_of_weight_zero_takes_no_part(options, problem, data):
    """Not in the plan, in the centroids, nor in the range of the cost."""
    n, batch = problem[0].shape[-2], problem[2].shape[:-1]
    extra, generator = data.draw(st.integers(1, 4), label="extra"), data.draw(generators())
    grown = (
        torch.cat([problem[0], uniform(generator, *batch, extra, problem[0].shape[-1])], -2),
        torch.cat([problem[1], uniform(generator, *batch, extra, 2, high=500.0)], -2),
        torch.cat([problem[2], torch.zeros(*batch, extra, dtype=torch.float64)], -1),
        problem[3],
    )
    got, want = sinkhorn_merge(*grown, **options), sinkhorn_merge(*problem, **options)
    assert (got.assignments[..., n:, :] == 0).all()
    got = got._replace(assignments=got.assignments[..., :n, :])
    assert_same(got, want, rtol=0, atol=1e-10)


@variants
@given(problem=problems(), weight=st.sampled_from([math.nan, math.inf, -1.0]), data=st.data())
def test_a_weight_that_is_none_counts_as_zero(options, problem, weight, data):
    tokens, positions, weights, start = problem
    place = data.draw(st.integers(0, weights.shape[-1] - 1), label="place")
    want, got = weights.clone(), weights.clone()
    want[..., place], got[..., place] = 0.0, weight
    found = sinkhorn_merge(tokens, positions, got, start, **options)
    assert_same(found, sinkhorn_merge(tokens, positions, want, start, **options), rtol=0, atol=0)


@variants
@given(problem=problems(), data=st.data())
def test_the_plan_of_the_cheapest_step_comes_back(options, problem, data):
    tokens, _, weights, start = problem
    most = data.draw(st.sampled_from([None, 2, 3, 9]), label="most")
    found = sinkhorn_merge(*problem, max_clusters=most, **options)
    k = start.shape[-1]
    width = min(k, most or k)
    assert found.assignments.shape == (*weights.shape, width)
    assert found.centroids.shape == (*weights.shape[:-1], width, tokens.shape[-1])
    assert found.costs.shape == (*weights.shape[:-1], k - 1)
    assert found.merges.shape == (*weights.shape[:-1], k - 2, 2)
    assert (found.merges[..., 0] < found.merges[..., 1]).all()
    assert (found.merges[..., 1] < torch.arange(k, 2, -1)).all()
    allowed = found.costs[..., k - width :]
    best = (allowed == allowed.amin(-1, keepdim=True)).int().argmax(-1)  # the first minimum
    assert torch.equal(found.clusters, width - best)
    used = torch.arange(width) < found.clusters[..., None]
    assert torch.equal(found.assignments.sum(-2) > 0, used)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    want = pool_masks(unit, found.assignments, average=True)
    torch.testing.assert_close(found.centroids, want, rtol=0, atol=1e-12)
    assert (found.centroids.abs().sum(-1) > 0).equal(used)
    torch.testing.assert_close(found.assignments.sum((-2, -1)), torch.ones_like(weights[..., 0]))
    assert_same((found.costs, found.merges), sinkhorn_merge(*problem, **options)[-2:])


@pytest.mark.parametrize("options", VARIANTS[:2], ids=["paper", "program"])
@given(problem=problems())
def test_tokens_have_their_weight_at_convergence(options, problem):
    weights = problem[2]
    plan = sinkhorn_merge(*problem, reg=0.5, iterations=60, **options).assignments
    want = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(plan.sum(-1), want, rtol=0, atol=1e-6)


@variants
@given(problem=problems(dtype=torch.float32))
def test_merging_has_no_gradient_and_ignores_autocast(options, problem):
    before = [x.clone() for x in problem]
    want = sinkhorn_merge(*problem, **options)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in problem[:3]]
        got = sinkhorn_merge(*leaves, problem[3], **options)
    assert not any(x.requires_grad for x in got)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(problem, before, strict=True))


@variants
@halves
@given(generator=generators())
def test_half_precision_clusters_are_those_of_the_widened_numbers(options, dtype, generator):
    problem = [
        (uniform(generator, 12, 4, low=-1) * 100).to(dtype),
        uniform(generator, 12, 2, high=224.0).to(dtype),
        uniform(generator, 12).to(dtype),
    ]
    start = torch.arange(5)
    got = sinkhorn_merge(*problem, start, **options)
    assert got.assignments.dtype == torch.float32
    assert all(x.isfinite().all() for x in got)
    assert_same(got, sinkhorn_merge(*(x.float() for x in problem), start, **options))


SOME, WHERE = uniform(seeded(0), 6, 3).float(), uniform(seeded(1), 6, 2).float()
EQUAL, ALIKE = torch.ones(6, 3), torch.ones(6)
ODD = {
    "all tokens equal": (EQUAL, WHERE, ALIKE),
    "all tokens equal in one place": (EQUAL, torch.zeros(6, 2), ALIKE),
    "all tokens in one place": (SOME, torch.zeros(6, 2), ALIKE),
    "all tokens zero": (torch.zeros(6, 3), WHERE, ALIKE),
    "opposite tokens": (torch.tensor([[1.0], [-1.0]] * 3), WHERE, ALIKE),
    "large tokens": (SOME * 1e15, WHERE, ALIKE),
    "all weights zero": (SOME, WHERE, torch.zeros(6)),
    "one weight": (SOME, WHERE, torch.eye(6)[2]),
    "one weight, of no start token": (SOME, WHERE, torch.eye(6)[5]),
    "tiny weights": (SOME, WHERE, torch.full((6,), 1e-30)),
    "uneven weights": (SOME, WHERE, 10.0 ** -torch.arange(0, 36, 6)),
}


@variants
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("count", [2, 4])
def test_odd_problems_are_finite(options, name, count):
    found = sinkhorn_merge(*ODD[name], torch.arange(count), **options)
    assert all(x.isfinite().all() for x in found)
    assert ((found.clusters >= 2) & (found.clusters <= count)).all()
    assert found.assignments.sum().item() == pytest.approx(1, rel=1e-5)


def test_tokens_without_any_weight_count_alike():
    tokens, positions = uniform(seeded(0), 6, 3), uniform(seeded(1), 6, 2)
    none, all_alike = torch.zeros(6).double(), torch.ones(6).double()
    start = torch.arange(3)
    got = sinkhorn_merge(tokens, positions, none, start)
    assert_same(got, sinkhorn_merge(tokens, positions, all_alike, start))


def test_a_start_token_may_come_twice():
    tokens, positions = uniform(seeded(0), 6, 3), uniform(seeded(1), 6, 2)
    found = sinkhorn_merge(tokens, positions, torch.ones(6).double(), torch.tensor([1, 1, 4]))
    assert found.merges.tolist() == [[0, 1]]
    assert all(x.isfinite().all() for x in found)


def blobs(counts, spread=0.05):
    """Noisy tokens around as many orthogonal directions, and the blob of each."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), len(counts), generator=seeded())
    return torch.eye(len(counts))[labels] + spread * noise, labels


@variants
def test_blobs_are_found_exactly_from_a_token_of_each(options):
    tokens, labels = blobs([10, 9, 11, 10])
    order = torch.randperm(40, generator=seeded(1))
    tokens, labels = tokens[order], labels[order]
    start = torch.stack([(labels == blob).nonzero()[0, 0] for blob in (2, 0, 3, 1)])
    anywhere = 100 * uniform(seeded(2), 40, 2, dtype=torch.float32)
    options = {**options, "position_weight": 0.0}
    found = sinkhorn_merge(tokens, anywhere, torch.ones(40), start, **options)
    assert found.clusters == 4
    assert torch.equal(labels[start][found.assignments.argmax(-1)], labels)
    # Two tokens of each: those of one blob merge first.
    pairs = torch.cat([(labels == blob).nonzero()[:2, 0] for blob in range(4)])
    found = sinkhorn_merge(tokens, anywhere, torch.ones(40), pairs, max_clusters=4, **options)
    assert found.clusters == 4
    hard = found.assignments.argmax(-1)
    assert len({*zip(hard.tolist(), labels.tolist(), strict=True)}) == 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_start_tokens_have_any_integer_dtype(dtype):
    problem = uniform(seeded(0), 6, 3), uniform(seeded(1), 6, 2), torch.ones(6).double()
    for start in (torch.tensor([1, 5, 4]), torch.tensor([2, 0])):
        got, want = (sinkhorn_merge(*problem, x) for x in (start.to(dtype), start))
        assert_same(got, want, rtol=0, atol=0)


def test_positions_tell_tokens_apart_that_look_alike():
    tokens = torch.ones(8, 2) + 0.01 * torch.randn(8, 2, generator=seeded())
    positions = torch.tensor([[0.0, 0.0]] * 4 + [[9.0, 9.0]] * 4) + SOME[:1, :2]
    found = sinkhorn_merge(tokens, positions, torch.ones(8), torch.tensor([1, 6]))
    assert found.assignments.argmax(-1).tolist() == [0] * 4 + [1] * 4


@given(problem=problems(), data=st.data())
def test_with_positions_alone_tokens_decide_about_merges_only(problem, data):
    tokens, positions, weights, start = problem
    others = data.draw(tensors(tokens.shape, -1.0, 1.0), label="other tokens")
    got, want = (
        sinkhorn_merge(x, positions, weights, start, position_weight=math.inf)
        for x in (tokens, others)
    )
    torch.testing.assert_close(got.costs[..., 0], want.costs[..., 0], **CLOSE)
    two = start[..., :2]  # which never merge
    got, want = (
        sinkhorn_merge(x, positions, weights, two, position_weight=math.inf)
        for x in (tokens, others)
    )
    torch.testing.assert_close(got.assignments, want.assignments, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [1e6, 1e20, 1e38, 1e300])
@given(generator=generators())
def test_a_growing_weight_of_positions_has_them_alone_as_its_limit(dtype, weight, generator):
    problem = [
        uniform(generator, 3, 12, 4, low=-1).to(dtype),
        uniform(generator, 3, 12, 2, high=224.0).to(dtype),
        uniform(generator, 3, 12, low=0.05).to(dtype),
        torch.arange(2).expand(3, 2),
    ]
    got = sinkhorn_merge(*problem, position_weight=weight)
    want = sinkhorn_merge(*problem, position_weight=math.inf)
    assert_same(got[:4], want[:4], rtol=0, atol=1e-4)


def test_equal_tokens_are_told_apart_by_positions_alone():
    """Two groups in two corners: each is a cluster, and both views have it."""
    corner = uniform(seeded(0), 8, 2) + 50 * (torch.arange(8) % 2)[:, None]
    tokens, weights = torch.ones(16, 3).double(), torch.ones(16).double()
    positions = torch.cat([corner, corner])
    start = torch.tensor([0, 1, 2, 3])
    found = sinkhorn_merge(tokens, positions, weights, start, position_weight=math.inf)
    hard = prune_clusters(split_assignments(found.assignments))
    assert hard.valid.sum() == found.clusters
    near, far = (set(hard.labels[:, i::2].flatten().tolist()) for i in range(2))
    assert not near & far


@pytest.mark.parametrize("weight", [-1.0, math.nan, -math.inf])
def test_a_weight_of_positions_that_is_no_weight_is_refused(weight):
    problem = torch.eye(3), torch.zeros(3, 2), torch.ones(3), torch.arange(2)
    with pytest.raises(ValueError, match=f"sinkhorn_merge: position_weight is {weight};"):
        sinkhorn_merge(*problem, position_weight=weight)


def test_the_steps_are_compared_by_the_cost_that_is_asked_for():
    """Eq 13 and the program often choose another K, of the same steps."""
    problem = (
        uniform(seeded(0), 200, 24, 8, low=-1),
        uniform(seeded(1), 200, 24, 2, high=224.0),
        uniform(seeded(2), 200, 24, low=0.05),
        torch.rand(200, 24, generator=seeded(3)).argsort(-1)[:, :8],
    )
    by_cost = sinkhorn_merge(*problem, choose_by="cost")
    by_semantic = sinkhorn_merge(*problem, choose_by="semantic")
    assert_same(by_cost, sinkhorn_merge(*problem))
    assert torch.equal(by_cost.merges, by_semantic.merges)
    assert (by_cost.clusters != by_semantic.clusters).double().mean() > 0.2


@pytest.mark.parametrize(("count", "most"), [(1, None), (0, None), (3, 1), (1, 5), (3, -2)])
def test_fewer_than_two_clusters_are_refused(count, most):
    problem = torch.eye(3), torch.zeros(3, 2), torch.ones(3), torch.arange(count)
    said = f"number of start tokens is {count}" if count < 2 else f"max_clusters is {most}"
    with pytest.raises(ValueError, match=f"sinkhorn_merge: (the )?{said}; give 2"):
        sinkhorn_merge(*problem, max_clusters=most)


def test_variants_of_another_name_are_refused():
    problem = torch.eye(3), torch.zeros(3, 2), torch.ones(3), torch.arange(2)
    for option in ("similarity", "merge", "cost_range", "choose_by"):
        with pytest.raises(TypeError, match=f"sinkhorn_merge: argument '{option}'"):
            sinkhorn_merge(*problem, **{option: "other"})


# ------------------------------------------------------------------- splitting, pruning, means


@st.composite
def soft_assignments(draw, shape, zeros=True):
    """Soft assignments, at times with tokens and clusters that are all zero."""
    generator = draw(generators())
    soft = uniform(generator, *shape, low=0.01)
    if zeros and draw(st.booleans()):
        soft = torch.where(flips(generator, *shape[:-1], 1), soft, 0.0)
        soft = torch.where(flips(generator, *shape[:-2], 1, shape[-1]), soft, 0.0)
    return soft


@given(st.data())
def test_split_assignments_are_each_views_and_sum_to_one(data):
    batch, views = data.draw(batches()), data.draw(st.integers(1, 3))
    m, k = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    joint = data.draw(soft_assignments((*batch, views * m, k)), label="joint")
    for normalize, axis in (("rows", -1), ("columns", -2)):
        got = split_assignments(joint, views=views, normalize=normalize)
        assert got.shape == (*batch, views, m, k)
        for view in range(views):
            own = joint[..., view * m : (view + 1) * m, :]
            mass = own.sum(axis, keepdim=True)
            torch.testing.assert_close(got[..., view, :, :] * mass, own, **CLOSE)
            want = (mass > 0).double()
            torch.testing.assert_close(got[..., view, :, :].sum(axis, keepdim=True), want, **CLOSE)
    assert torch.equal(
        split_assignments(joint, views=views),
        split_assignments(joint, views=views, normalize="rows"),
    )


@pytest.mark.parametrize("views", [2, 4, 0, -1])
def test_tokens_that_do_not_divide_into_the_views_are_refused(views):
    with pytest.raises(ValueError, match=f"split_assignments: 3 tokens .* into {views} views"):
        split_assignments(torch.ones(3, 2), views=views)


@given(st.data())
def test_pruning_is_that_of_a_loop(data):
    batch, views = data.draw(batches()), data.draw(st.integers(1, 3))
    m, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    soft = data.draw(soft_assignments((*batch, views, m, k)), label="soft")
    got = prune_clusters(soft)
    flat = soft.reshape(-1, views, m, k)
    hard, labels = got.assignments.reshape(flat.shape), got.labels.reshape(-1, views, m)
    for b, valid in enumerate(got.valid.reshape(-1, k)):
        members = [[set() for _ in range(views)] for _ in range(k)]
        for view in range(views):
            for token, row in enumerate(flat[b, view].tolist()):
                if max(row) > 0:
                    best = row.index(max(row))
                    assert labels[b, view, token] == best
                    members[best][view].add(token)
        assert valid.tolist() == [all(each) for each in members]
        for view in range(views):
            for token in range(m):
                for cluster in range(k):
                    kept = valid[cluster] and token in members[cluster][view]
                    want = flat[b, view, token, cluster] if kept else 0
                    assert hard[b, view, token, cluster] == want


def test_a_cluster_of_one_view_is_dropped_for_both():
    soft = torch.tensor([[[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], [[0.6, 0.4, 0.0], [0.1, 0.0, 0.9]]])
    got = prune_clusters(soft)
    assert got.valid.tolist() == [True, False, False]
    assert got.labels.tolist() == [[0, 1], [0, 2]]
    assert got.assignments[..., 1:].eq(0).all()
    torch.testing.assert_close(got.assignments[..., 0], torch.tensor([[0.9, 0.0], [0.6, 0.0]]))


def test_no_cluster_left_is_a_normal_case():
    soft = torch.eye(2)[:, None].expand(2, 3, 2).clone().requires_grad_()
    got = prune_clusters(soft)  # view 1 has only cluster 0, view 2 only cluster 1
    assert got.valid.tolist() == [False, False]
    assert got.labels.tolist() == [[0] * 3, [1] * 3]
    means = pool_masks(torch.ones(2, 3, 4), got.assignments, average=True)
    assert torch.equal(means, torch.zeros(2, 2, 4))
    (grad,) = torch.autograd.grad(means.sum(), soft)
    assert torch.equal(grad, torch.zeros_like(soft))


def test_tokens_without_assignments_keep_no_cluster_alive():
    got = prune_clusters(torch.zeros(2, 3, 4))
    assert not got.valid.any()
    assert (got.assignments == 0).all()


def test_pruning_of_nothing_is_nothing():
    for shape in ((2, 0, 3), (2, 3, 0), (0, 2, 3, 4)):
        got = prune_clusters(torch.zeros(shape))
        assert got.assignments.shape == shape
        assert got.labels.shape == shape[:-1]
        assert not got.valid.any()


@given(st.data())
def test_centroids_are_the_weighted_means_of_a_loop(data):
    batch, n, k, d = data.draw(batches()), *(data.draw(st.integers(0, 6)) for _ in range(3))
    tokens = data.draw(tensors((*batch, n, d)), label="tokens").requires_grad_()
    soft = data.draw(soft_assignments((*batch, n, k)), label="assignments")
    got = pool_masks(tokens, soft, average=True)
    want = torch.zeros(*batch, k, d, dtype=torch.float64)
    for cluster in range(k):
        mass = soft[..., cluster].sum(-1)[..., None]
        for token in range(n):
            share = soft[..., token, cluster, None] / torch.where(mass > 0, mass, 1.0)
            want[..., cluster, :] += share * tokens.detach()[..., token, :]
    torch.testing.assert_close(got.detach(), want, **CLOSE)
    (grad,) = torch.autograd.grad(got.sum(), tokens)
    share = soft / torch.where(soft.sum(-2, keepdim=True) > 0, soft.sum(-2, keepdim=True), 1.0)
    torch.testing.assert_close(grad, share.sum(-1)[..., None].expand_as(grad), **CLOSE)


def test_a_cluster_without_mass_is_zero_with_zero_gradient():
    tokens = torch.ones(3, 2, requires_grad=True)
    got = pool_masks(tokens, torch.zeros(3, 4), average=True)
    assert torch.equal(got, torch.zeros(4, 2))
    assert torch.equal(torch.autograd.grad(got.sum(), tokens)[0], torch.zeros(3, 2))


def test_weights_may_have_another_dtype_than_tokens():
    tokens, places = torch.rand(6, 4), torch.rand(6, 2)
    weights, start = torch.rand(6), torch.tensor([0, 1, 4])
    got = sinkhorn_merge(tokens, places, weights.double(), start)
    for own, want in zip(got, sinkhorn_merge(tokens, places, weights, start), strict=True):
        assert own is want or torch.equal(own, want)
