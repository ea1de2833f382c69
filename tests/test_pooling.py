"""Region embeddings against a loop, and the authors' own numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, tensors, valid_rows
from densekit import pool_masks

DATA = Path(__file__).parent / "data"


@st.composite
def pools(draw):
    batch = draw(batches())
    n, k, d = (draw(st.integers(0, 5)) for _ in range(3))
    features = draw(tensors((*batch, n, d)))
    return features, draw(tensors((*batch, n, k), 0.0, 1.0)), draw(valid_rows((*batch, n)))


@given(pools())
def test_a_region_is_the_weighted_sum_of_its_cells(pool):
    features, masks, valid = pool
    want = torch.zeros(*features.shape[:-2], masks.shape[-1], features.shape[-1]).double()
    for cell in range(features.shape[-2]):
        used = masks[..., cell, :] * valid[..., cell, None]
        want = want + torch.einsum("...k,...d->...kd", used, features[..., cell, :])
    torch.testing.assert_close(pool_masks(*pool), want, rtol=1e-12, atol=1e-12)


@given(pools())
def test_the_average_is_the_sum_over_the_mass(pool):
    _, masks, valid = pool
    got = pool_masks(*pool, average=True)
    mass = (masks * valid[..., None]).sum(-2)[..., None]
    torch.testing.assert_close(got * mass, pool_masks(*pool), rtol=1e-12, atol=1e-12)
    assert (got[(mass == 0).expand_as(got)] == 0).all()


@given(pools())
def test_masks_over_all_cells_alike_average_like_a_mean(pool):
    features, masks, _ = pool
    got = pool_masks(features, torch.full_like(masks, 0.3), average=True)
    if features.shape[-2]:
        want = features.mean(-2, keepdim=True).expand_as(got)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(got, torch.zeros_like(got))


@given(pools(), st.booleans())
def test_cells_that_are_not_valid_reach_neither_result_nor_gradient(pool, average):
    features, masks, valid = pool
    poisoned = [torch.where(valid[..., None], x, torch.nan).requires_grad_() for x in pool[:2]]
    got = pool_masks(*poisoned, valid, average=average)
    assert torch.equal(got, pool_masks(features, masks, valid, average=average))
    for grad in torch.autograd.grad(got.sum(), poisoned):
        assert grad.isfinite().all()
        assert (grad[~valid] == 0).all()


def test_a_region_without_mass_is_zero_with_finite_gradients():
    features = torch.rand(3, 2, requires_grad=True)
    masks = torch.zeros(3, 4, requires_grad=True)
    got = pool_masks(features, masks, average=True)
    assert torch.equal(got, torch.zeros(4, 2))
    for grad in torch.autograd.grad(got.sum(), [features, masks]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_half_precision_do_not_overflow(dtype, autocast):
    # 49 cells of 3000 each: the sum is above float16's largest number.
    features, masks = torch.full((49, 2), 3000.0, dtype=dtype), torch.ones(49, 1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = pool_masks(features, masks)
    assert torch.equal(got, 49 * features[:1].float())


@pytest.mark.parametrize("view", ["1", "2"])
def test_region_embeddings_of_the_authors_program(view):
    golden = np.load(DATA / "regionsim_0_B2_N6_C16_identity.npz")
    features, logits = (
        torch.from_numpy(golden[x + view]).double().flatten(2).mT for x in ("f", "z")
    )
    got = pool_masks(features, logits.softmax(-1))
    want = torch.from_numpy(golden[f"e{view}_softmax"])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    if view == "1":  # Eq 4 with the raw logits for masks
        want = torch.from_numpy(golden["e1_raw_paper_eq4"])
        torch.testing.assert_close(pool_masks(features, logits), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("features", "masks", "valid", "name"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 5), None, "masks"),
        (torch.zeros(2, 3, 2), torch.zeros(3, 5), None, "masks"),
        (torch.zeros(3, 2), torch.zeros(3, 5).long(), None, "masks"),
        (torch.zeros(3), torch.zeros(3, 5), None, "features"),
        (torch.zeros(3, 2), torch.zeros(3, 5), torch.ones(4).bool(), "valid"),
        (torch.zeros(3, 2), torch.zeros(3, 5), torch.ones(3), "valid"),
    ],
)
def test_what_does_not_fit_is_refused(features, masks, valid, name):
    with pytest.raises(TypeError, match=f"pool_masks: argument '{name}'"):
        pool_masks(features, masks, valid)
