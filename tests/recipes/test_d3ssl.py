"""The D3SSL recipe: augmentations and losses against the paper's words. Its runs: test_recipes.py.

The library's own laws of each augmentation: test_regions.py.
"""

import copy
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import d3ssl
import harness
import numpy as np
import proposals
import pytest
import timm
import torch
import torchvision
from d3ssl import D3SSL, PRESETS, Input, TwoViews, Views, augment
from downstream import encoders
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from processes import on_processes
from steps import step_on_part
from strategies import flips, image_box, uniform
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode
import densekit as dk
from densekit.scenes import sample_scenes
from densekit.testing import assert_world_size_invariant

SMALL = replace(
    PRESETS["demo"], cut=(0.2, 0.5), mask=(0.2, 0.6), jitter=(0.8, 1.0), bins=4, head=(16, 8),
    bank=16, batch=8, epochs=2, workers=0, log_every=1, save_every=3, device="cpu",
    views=Views(size=32, scale=(0.5, 1.0)),
)  # fmt: skip
STILL = replace(SMALL, jitter=(1.0, 1.0))  # the boxes stay what they are
# Wrong options, and what the sentence about each of them begins with.
WRONG = [
    (["--weights", "timm:convnext_atto"], "--weights is timm:convnext_atto"),
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--proposals", "some.npz"], "--proposals is some.npz"),  # without --data
    (["--co-occurrence", "1.5"], "--co-occurrence is 1.5"),
    (["--co-occurrence", "nan"], "--co-occurrence is nan"),
    (["--co-occurrence", "0.5", "--data", "some"], "--co-occurrence is 0.5: leave it out"),
    (["--arch", "resnet5"], "--arch is resnet5"),
    (["--arch", "cspresnet50"], "--arch is cspresnet50"),  # no ResNet, in spite of its name
    (["--arch", "resnetv2_50"], "--arch is resnetv2_50"),  # it has no layer4
    (["--regions", "0"], "--regions is 0"),
    (["--cut", "0.5", "0.2"], "--cut is 0.5 0.2"),
    (["--cut", "0.5", "1.1"], "--cut is 0.5 1.1"),
    (["--cut", "nan", "0.2"], "--cut is nan 0.2"),
    (["--mask", "-0.1", "0.2"], "--mask is -0.1 0.2"),
    (["--mask", "0.3", "0.2"], "--mask is 0.3 0.2"),
    (["--jitter", "0.0", "1.0"], "--jitter is 0.0 1.0"),
    (["--jitter", "0.8", "1.2"], "--jitter is 0.8 1.2"),
    (["--jitter", "0.9", "0.8"], "--jitter is 0.9 0.8"),
    (["--soco-cutout", "0.3", "0.1"], "--soco-cutout is 0.3 0.1"),
    (["--soco-cutout", "0.1", "1.5"], "--soco-cutout is 0.1 1.5"),
    (["--soco-jitter", "1.0"], "--soco-jitter is 1.0"),
    (["--soco-jitter", "-0.1"], "--soco-jitter is -0.1"),
    (["--depositioning", "-1"], "--depositioning is -1"),
    (["--depositioning", "nan"], "--depositioning is nan"),
    (["--bins", "1"], "--bins is 1"),
    (["--head", "16", "0"], "--head is 16 0"),
    (["--head", "0", "8"], "--head is 0 8"),
    (["--bank", "0"], "--bank is 0"),
    (["--temperature", "0"], "--temperature is 0"),
    (["--temperature", "nan"], "--temperature is nan"),
    (["--momentum", "1.1"], "--momentum is 1.1"),
    (["--momentum", "-0.1"], "--momentum is -0.1"),
    (["--momentum", "nan"], "--momentum is nan"),
    (["--views.size", "33"], "--views.size is 33: give a multiple of 16, two cells of C4 of tiny"),
    (["--views.size", "40"], "--views.size is 40: give a multiple of 16, two cells"),
    (["--arch", "resnet18", "--views.size", "48"], "--views.size is 48: give a multiple of 32"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--weight-decay", "-0.1"], "--weight-decay is -0.1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--views.size", "0"], "--views.size is 0"),
    (["--views.scale", "1.0", "0.2"], "--views.scale is 1.0 0.2"),
    (["--views.scale", "0.0", "1.0"], "--views.scale is 0.0 1.0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.hue", "nan"], "--views.hue is nan"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
    (["--views.blur", "-1.0", "2.0"], "--views.blur is -1.0 2.0"),
]
SIDE = SMALL.views.size
COUNTS = 3, 4, 0, 1  # boxes of each image; uneven over two processes
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def batch(counts=COUNTS, seed=0, dtype=torch.float64):
    """Images of 64 x 64, seen whole and in part; so many boxes in view 2, the others anywhere.

    No pixel of a view is near 0, and a box is 11 pixels wide at least.
    """
    generator, n = torch.Generator().manual_seed(seed), len(counts)
    images = [uniform(generator, n, 3, SIDE, SIDE, low=0.1) for _ in "12"]
    low, high = uniform(generator, n, 2, high=16), uniform(generator, n, 2, low=48, high=64)
    views = [image_box((64, 64), (n,)), torch.cat([low, high], -1)]
    views = [dk.View(box.to(dtype), flips(generator, n)) for box in views]
    valid = torch.arange(4) < torch.tensor(counts)[:, None]
    first, extent = uniform(generator, n, 4, 2, high=0.4), uniform(generator, n, 4, 2, high=0.25)
    places = torch.cat([first, first + 0.35 + extent], -1)
    frame = torch.where(valid[..., None], views[1].box[:, None], image_box((64, 64)))
    boxes = frame[..., [0, 1, 0, 1]] + places * (frame[..., 2:] - frame[..., :2]).repeat(1, 1, 2)
    return [x.to(dtype) for x in images], views, boxes.to(dtype), valid


def cases():
    """Batches of 2 to 4 images with 0 to 4 boxes each."""
    counts = st.lists(st.integers(0, 4), min_size=2, max_size=4)
    return st.builds(batch, counts, st.integers(0, 2**31 - 1))


def one_box(count=2):
    """Images with one box in the middle; nothing that lies beside it leaves the image."""
    images, views, boxes, valid = batch((1,) * count)
    whole = dk.View(views[0].box, torch.zeros_like(views[0].flip))
    boxes[:] = torch.tensor([20.0, 20, 44, 44])  # 12 x 12 pixels of a view
    return images, [whole, whole], boxes, valid


def seeded(seed, config, case):
    seeds = d3ssl.harness.image_seeds(seed, 0, torch.arange(len(case[-1])))
    return augment(*case, seeds, config)


def carried(view, boxes):
    """Boxes in the frame of a view, corner by corner."""
    x1, y1, x2, y2 = view.box[:, None].unbind(-1)
    left, right = ((boxes[..., k] - x1) / (x2 - x1) for k in (0, 2))
    top, bottom = ((boxes[..., k] - y1) / (y2 - y1) for k in (1, 3))
    flip = view.flip[:, None]
    left, right = torch.where(flip, 1 - right, left), torch.where(flip, 1 - left, right)
    return torch.stack([left, top, right, bottom], -1)


def covered(boxes, valid, side):
    """The pixels whose center lies in a valid box; the boxes are in [0, 1]."""
    center = (torch.arange(side) + 0.5) / side
    x1, y1, x2, y2 = (x[..., None] for x in boxes.unbind(-1))
    across, down = (center >= x1) & (center < x2), (center >= y1) & (center < y2)
    return (down[..., :, None] & across[..., None, :] & valid[..., None, None]).any(1)


def halved(x):
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-3, -1))


def filled(x, clean):
    """Which pixels are 0; all others must be those of the clean image."""
    zero = (x == 0).all(1)
    torch.testing.assert_close(x, torch.where(zero[:, None], 0.0, clean))
    return zero


# --------------------------------------------------------------------------- the augmentations


@given(cases())
def test_boxes_are_the_proposals_carried_into_each_view(case):
    images, views, boxes, valid = case
    (_, first, _), (clean, second, _), (_, small, _), _ = seeded(0, STILL, case)
    assert torch.equal(clean, images[1])  # for the teacher
    torch.testing.assert_close(first[valid], carried(views[0], boxes)[valid])
    torch.testing.assert_close(second[valid], carried(views[1], boxes)[valid])
    assert torch.equal(small, second)


@given(cases())
def test_cutouts_take_a_part_of_every_proposal_and_nothing_else(case):
    images, _, _, valid = case
    view1, _, small, _ = seeded(0, replace(STILL, mask=(0.0, 0.0)), case)
    for (x, boxes, _), clean in ((view1, images[0]), (small, halved(images[1]))):
        zero, inside = filled(x, clean), covered(boxes, valid, x.shape[-1])
        assert not (zero & ~inside).any()
        assert torch.equal(zero.any((1, 2)), valid.any(1))
        for row in (valid.sum(1) == 1).nonzero()[:, 0]:
            area = (boxes[row, 0, 2:] - boxes[row, 0, :2]).prod() * x.shape[-1] ** 2
            assert zero[row].sum() <= 0.5 * area


@given(cases())
def test_masks_lie_beside_the_proposal(case):
    images, _, _, valid = case
    view1, _, small, _ = seeded(0, replace(STILL, cut=(0.0, 0.0)), case)
    for (x, boxes, _), clean in ((view1, images[0]), (small, halved(images[1]))):
        zero, inside = filled(x, clean), covered(boxes, valid, x.shape[-1])
        alone = valid.sum(1) == 1  # a mask may lie on another proposal
        assert not (zero & inside)[alone].any()
        assert not zero[~valid.any(1)].any()


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_options_say_how_much_is_cut_and_masked(share):
    case, places = one_box(), set()
    config = replace(STILL, cut=(share, share), mask=(share, share))
    for seed in range(8):
        view1, _, small, _ = seeded(seed, config, case)
        for (x, boxes, _), clean in ((view1, case[0][0]), (small, halved(case[0][1]))):
            zero, inside = filled(x, clean), covered(boxes, case[-1], x.shape[-1])
            side = 12 * x.shape[-1] // SIDE
            assert inside[0].sum() == side**2
            least = int(share**0.5 * side) - 1  # the cut takes whole pixels only
            for cut, mask in zip(zero & inside, zero & ~inside, strict=True):
                assert least**2 <= cut.sum() <= share * side**2
                assert 0.5 * share < mask.sum() / side**2 < 2 * share
                middle = mask.nonzero().double().mean(0)
                places.add(tuple((middle > x.shape[-1] / 2).tolist()))
    assert len(places) == 4  # on all sides


@given(cases(), st.booleans())
def test_view_3_is_view_2_moved_onto_the_image_before(case, cut):
    (_, x2), _, _, valid = case
    config = STILL if cut else replace(STILL, cut=(0.0, 0.0))
    _, (_, second, _), _, (x3, third, _) = seeded(0, config, case)
    assert ((third[valid] > -1e-9) & (third[valid] < 1 + 1e-9)).all()
    for row in range(len(x2)):
        other = (x3[row] == x2[row - 1]).all(0)
        if not valid[row].any():
            assert other.all()
            continue
        shift = ((third - second)[row, valid[row]] * SIDE).round()
        torch.testing.assert_close((third - second)[row, valid[row]] * SIDE, shift)
        assert (shift == shift[0, [0, 1, 0, 1]]).all()  # one vector for all
        dx, dy = shift[0, :2].long().tolist()
        own = (x3[row] == x2[row].roll((dy, dx), (1, 2))).all(0)
        region = covered(third[[row]], valid[[row]], SIDE)[0]
        assert other[~region].all()
        assert (own | other).all()
        if cut:
            assert (other & region).any()
            if valid[row].sum() == 1:
                area = (third[row, 0, 2:] - third[row, 0, :2]).prod() * SIDE**2
                assert (other & region).sum() <= 0.5 * area
        else:
            assert own[region].all()


def test_view_3_moves_anywhere():
    case, shifts = one_box(4), set()
    case[2][:, 1:] = torch.tensor([0.0, 0, 64, 64])  # not valid, and so in nobody's way
    for seed in range(10):
        _, (_, second, _), _, (_, third, _) = seeded(seed, STILL, case)
        shift = ((third - second)[:, 0, :2] * SIDE).round().tolist()
        shifts |= {tuple(x) for x in shift}
    x, y = zip(*shifts, strict=True)
    assert len(shifts) > 30  # of 21 x 21
    assert min(*x, *y) < -7
    assert max(*x, *y) > 7


@given(cases(), st.integers(0, 99))
def test_jittered_boxes_lie_inside_the_proposals(case, seed):
    valid, relative = case[-1], []
    still = seeded(seed, STILL, case)
    moved = seeded(seed, replace(SMALL, jitter=(0.5, 0.8)), case)
    for (x, inner, _), (same, outer, _) in zip(moved, still, strict=True):
        assert torch.equal(x, same)  # what is cut is so around the proposal itself
        inner, outer = inner[valid], outer[valid]
        assert (inner[:, :2] > outer[:, :2] - 1e-9).all()
        assert (inner[:, 2:] < outer[:, 2:] + 1e-9).all()
        sides, whole = (b[:, 2:] - b[:, :2] for b in (inner, outer))
        assert ((sides / whole > 0.5 - 1e-9) & (sides / whole < 0.8 + 1e-9)).all()
        relative.append(sides / whole)
    if valid.any():  # each view has its own
        assert len({tuple(x.flatten().tolist()) for x in relative}) == 4


SOCO = replace(STILL, cut=(0.0, 0.0), mask=(0.0, 0.0))  # nothing but what a test adds


@pytest.mark.parametrize("seed", range(4))
def test_socos_cutout_is_a_square_whose_center_lies_in_the_proposal(seed):
    images, views, boxes, valid = one_box(8)
    config = replace(SOCO, soco_cutout=(0.1, 0.3))
    (x1, first, _), (clean, *_), (small, *_), _ = seeded(
        seed, config, (images, views, boxes, valid)
    )
    assert torch.equal(clean, images[1])  # for the teacher
    for x, same, side in ((x1, images[0], 12), (small, halved(images[1]), 6)):
        for zero in filled(x, same):
            if zero.any():
                rows, columns = zero.any(1).nonzero()[:, 0], zero.any(0).nonzero()[:, 0]
                height, width = (int(k[-1] - k[0]) + 1 for k in (rows, columns))
                assert zero.sum() == height * width
                assert abs(height - width) <= 1
                assert 0.1**0.5 * side - 1 <= min(height, width)
                assert max(height, width) <= 0.3**0.5 * side + 1
                low, high = first[0, 0, :2] * len(zero), first[0, 0, 2:] * len(zero)
                for k, axis in ((columns, 0), (rows, 1)):
                    assert low[axis] - 1 <= k.double().mean() + 0.5 <= high[axis] + 1


def test_soco_changes_half_of_the_proposals_and_keeps_boxes_in_the_view():
    images, views, boxes, valid = one_box(400)
    boxes[1::2, 0] = torch.tensor([0.0, 0, 64, 64])  # as large as the view
    case = images, views, boxes, valid
    cut, *_ = seeded(0, replace(SOCO, soco_cutout=(0.1, 0.3)), case)
    share = (cut.images != images[0]).flatten(1).any(1).double().mean()
    assert 0.4 < share < 0.6

    still, *_ = seeded(0, SOCO, case)
    moved, *_ = seeded(0, replace(SOCO, soco_jitter=0.1), case)
    assert torch.equal(moved.images, still.images)
    before, after = still.boxes[:, 0], moved.boxes[:, 0]
    assert 0.4 < (before != after).any(-1).double().mean() < 0.6
    assert (after >= 0).all()
    assert (after <= 1).all()
    small = slice(0, None, 2)  # away from the edges of the view
    center = ((after - before)[small, :2] + (after - before)[small, 2:]) / 2
    extent = before[0, 2:] - before[0, :2]
    assert 0.09 < (center / extent).abs().max() <= 0.1 + 1e-6
    sides = (after[small, 2:] - after[small, :2]) / extent
    assert sides.min() < 0.91
    assert 1.09 < sides.max() <= 1.1 + 1e-6


class Count(TorchDispatchMode):
    """Counts the operations that torch is asked for, views of memory too."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        # Some versions of torch also name a slice that is the whole.
        is_whole = function is torch.ops.aten.slice.Tensor and result.shape == args[0].shape
        self.operations += not is_whole
        return result


def test_the_augmentation_takes_few_operations_for_any_number_of_images():
    """A GPU waits for the host to name each of them. On a GPU the number is the same."""
    config = replace(PRESETS["paper"], views=Views(size=32))
    counts = []
    for count in (1, 8):
        images = [torch.rand(count, 3, 32, 32) for _ in range(2)]
        views = [dk.full_view((32, 32), (count,))] * 2
        boxes = torch.tensor([4.0, 4.0, 24.0, 24.0]).expand(count, config.regions, 4)
        valid = torch.ones(count, config.regions, dtype=torch.bool)
        with Count() as counter:
            augment(images, views, boxes, valid, torch.arange(count), config)
        counts.append(counter.operations)
    assert counts[0] == counts[1] <= 600


def test_images_without_any_proposal_stay_clean_and_finite():
    images, views, boxes, valid = batch((0, 0, 0))
    case = images, views, torch.zeros_like(boxes), valid  # as the dataset says it
    (x1, *_), (x2, *_), (small, *_), (x3, *_) = found = seeded(0, SMALL, case)
    assert torch.equal(x1, images[0])
    assert torch.equal(x2, images[1])
    torch.testing.assert_close(small, halved(images[1]))
    assert torch.equal(x3, images[1].roll(1, 0))
    assert all(view.boxes.isfinite().all() for view in found)


# ---------------------------------------------------------------------------------- the losses


def filled_bank(count=13, dtype=torch.float64):
    keys = uniform(torch.Generator().manual_seed(1), count, 8, low=-1).to(dtype)
    keys = normalize(keys, dim=-1)  # as the keys that the model pushes
    return dk.push_to_bank(dk.init_bank(16, 8, dtype=dtype), keys)


def different_teacher(model):
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    return model


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return different_teacher(D3SSL(replace(SMALL, **changes))).double()


@pytest.fixture
def inputs(monkeypatch):
    """What `augment` has given, call by call."""
    seen = []
    monkeypatch.setattr(d3ssl, "augment", lambda *x: seen.append(augment(*x)) or seen[-1])
    return seen


def embed(network, x, boxes, valid, bins):
    """Eq 1 as the paper has it: block 5, pooling and MLP after torchvision's RoIAlign of C4.

    NaN where there is no proposal.
    """
    encoder, head = network["encoder"], network["head"]
    x = encoder.layer1(encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(x)))))
    c4 = encoder.layer3(encoder.layer2(x))
    places = [row * c4.shape[-1] for row in boxes]
    places = [row[used] for row, used in zip(places, valid, strict=True)]
    regions = torchvision.ops.roi_align(c4, places, bins, sampling_ratio=2, aligned=True)
    c5 = encoder.layer4(regions).mean((2, 3))
    hidden = (c5 @ head[0].weight.T + head[0].bias).relu()
    found = torch.full((*valid.shape, len(head[2].bias)), torch.nan, dtype=x.dtype)
    found[valid] = hidden @ head[2].weight.T + head[2].bias
    return found


def nce(z, key, bank):
    """Eq 5 of one region, its key and the keys of a bank."""
    z, key, bank = (normalize(x, dim=-1) for x in (z, key, bank))
    logits = torch.cat([(z @ key)[None], bank @ z]) / 0.2
    return cross_entropy(logits, torch.tensor(0))


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_the_loss_is_that_of_the_paper(inputs, weight):
    model, bank, case = make(depositioning=weight), filled_bank(), batch()
    oracle, valid = copy.deepcopy(model), case[-1]
    loss, terms, _ = model(*case, bank, torch.tensor([2, 0, 3, 1]), torch.arange(4))
    (view1, view2, small, view3) = inputs[0]
    t1, t2 = (embed(oracle.teacher, *view, 4) for view in (view1, view2))
    s1, s3 = (embed(oracle.student, *view, 4) for view in (view1, view3))
    s2 = embed(oracle.student, *small, 2)  # of a view of half the size
    rows, decoupling, depositioning, cosines = bank.features[:13], [], [], []
    for place in valid.nonzero().tolist():
        z1, z2, z3, k1, k2 = (z[tuple(place)] for z in (s1, s2, s3, t1, t2))
        decoupling.append(nce(z1, k2, rows) + nce(z2, k1, rows))  # Eq 4
        depositioning.append(nce(z3, k2, rows) + nce(z3, k1, rows))  # Eq 9
        cosines.append(cosine_similarity(z1, k2, 0))
    decoupling, depositioning, cosines = (
        torch.stack(x).mean() for x in (decoupling, depositioning, cosines)
    )
    torch.testing.assert_close(terms["decoupling"], decoupling)
    torch.testing.assert_close(terms["cosine"], cosines)
    torch.testing.assert_close(loss, decoupling + weight * depositioning)  # Eq 10
    if weight:
        torch.testing.assert_close(terms["depositioning"], depositioning)
    assert ("depositioning" in terms) == bool(weight)
    assert (terms["valid"], terms["filled"]) == (0.5, 13)


def test_keys_of_this_batch_enter_the_bank_after_the_loss(inputs):
    model, case = make(), batch()
    oracle, valid, order = copy.deepcopy(model), case[-1], torch.tensor([2, 0, 3, 1])
    loss, _, bank = model(*case, dk.init_bank(16, 8, dtype=torch.float64), order, torch.arange(4))
    assert loss == 0  # no negatives yet
    assert bank.filled == valid.sum() == 8
    keys = normalize(embed(oracle.teacher, *inputs[0][0], 4)[valid], dim=1)  # of view 1
    torch.testing.assert_close(bank.features[:8], keys.detach())
    assert (bank.features[8:] == 0).all()
    loss, *_ = model(*case, bank, order, torch.arange(4))
    assert loss > 1


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_only_the_student_learns_and_the_keys_use_batch_statistics(weight):
    torch.manual_seed(0)
    model, bank = D3SSL(replace(SMALL, depositioning=weight)), filled_bank(dtype=torch.float32)
    loss, _, _ = model(*batch(dtype=torch.float32), bank, torch.arange(4), torch.arange(4))
    loss.backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.student["encoder"].conv1[0].weight.grad.any()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert model.teacher["encoder"].bn1.num_batches_tracked == 2  # of both views


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_without_any_valid_box_the_loss_is_zero_and_carries_the_graph(weight):
    model, bank = make(depositioning=weight), filled_bank()
    images, views, boxes, valid = batch((0, 0, 0, 0))
    loss, terms, new = model(
        images, views, 0 * boxes, valid, bank, torch.arange(4), torch.arange(4)
    )
    loss.backward()
    assert loss == terms["valid"] == 0
    assert all(torch.equal(a, b) for a, b in zip(new, bank, strict=True))
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every one
        assert not parameter.grad.any(), name


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_places_of_block_5_hold_valid_regions_alone_and_equally_often(flags):
    valid = torch.tensor(flags)
    source, place = d3ssl.fill_places(valid)
    assert len(source) == len(place) == len(valid)
    assert torch.equal(source[place][valid], valid.nonzero()[:, 0])
    if valid.any():
        assert valid[source].all()
        often = torch.bincount(source, minlength=len(valid))[valid]
        assert often.max() - often.min() <= 1


@pytest.mark.parametrize("counts", [COUNTS, (2, 0), (0, 1, 1)])
def test_what_stands_in_for_a_missing_proposal_changes_nothing(counts):
    """Neither a loss, nor a key, nor a gradient, nor the running batch statistics."""
    images, views, boxes, valid = batch(counts)
    generator = torch.Generator().manual_seed(1)
    first = uniform(generator, *boxes.shape[:2], 2, high=32)
    other = torch.cat([first, first + uniform(generator, *first.shape, low=8, high=32)], -1)
    others = torch.where(valid[..., None], boxes, other)
    found = []
    for some in (boxes, others):
        model = make()
        loss, _, bank = model(
            images, views, some, valid, filled_bank(), *[torch.arange(len(valid))] * 2
        )
        loss.backward()
        gradients = [x.grad for x in model.student.parameters()]
        found.append((loss.detach(), bank, gradients, dict(model.named_buffers())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 2)])
def test_few_proposals_have_batch_statistics(counts):
    """Block 5 makes one cell of the small view's single bin, and one cell has no variance."""
    model = make(bins=2)
    loss, *_ = model(*batch(counts), filled_bank(), torch.arange(2), torch.arange(2))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert all(x.isfinite().all() for x in model.buffers())


def test_images_without_a_box_change_no_loss_and_no_key_of_the_others():
    model, (images, views, boxes, valid), results = make(), batch((2, 0, 3, 1)), []
    nn.ModuleList(x for x in model.modules() if isinstance(x, nn.BatchNorm2d)).eval()
    config, order = replace(STILL, cut=(0.0, 0.0), mask=(0.0, 0.0), depositioning=0.0), [0, 2, 3]
    model.config = config
    for rows in ([0, 1, 2, 3], order):
        some = [dk.View(view.box[rows], view.flip[rows]) for view in views]
        case = [x[rows] for x in images], some, (boxes * valid[..., None])[rows], valid[rows]
        loss, _, bank = model(*case, filled_bank(), torch.arange(len(rows)), torch.tensor(rows))
        results.append((loss, bank.features))
    torch.testing.assert_close(*results)


def rows_of(case, rank):
    own = slice(2 * rank, 2 * rank + 2)
    images, views, boxes, valid = case
    views = [dk.View(view.box[own], view.flip[own]) for view in views]
    return [x[own] for x in images], views, boxes[own], valid[own]


def test_processes_have_the_loss_the_gradient_and_the_bank_of_one():
    model, order, case = make(), torch.tensor([2, 0, 3, 1]), batch()
    inputs = seeded(0, SMALL, case)  # the draws are each process's own

    def one_step(part, group):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d3ssl, "augment", lambda *_: part["inputs"])
            (terms, bank), loss, gradients, _ = step_on_part(
                model, *part["case"], filled_bank(), order, part["seeds"]
            )
        # 7 valid boxes and 1 on two processes: only a mean over all of them gives the same.
        return loss, terms["cosine"], gradients, bank

    part = {"case": case, "inputs": inputs, "seeds": torch.arange(4)}
    assert_world_size_invariant(one_step, part, (1, 2, 4))


def encoded(rank, group, order):
    """What the encoders are given on this process: images and boxes."""
    model, case, seen, plain = make(), batch(), [], d3ssl.embed
    model.config = replace(STILL, cut=(0.0, 0.0), mask=(0.0, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d3ssl, "embed", lambda *x: seen.append((*x[1], x[2])) or plain(*x))
        model(*rows_of(case, rank), filled_bank(), order, torch.arange(2) + 2 * rank)
    return seen


def test_the_keys_are_shuffled_over_the_processes_with_their_boxes():
    order, (images, views, boxes, valid) = torch.tensor([2, 0, 3, 1]), batch()
    places = [dk.boxes_in_view(view, boxes).boxes for view in views]
    for rank, seen in enumerate(on_processes(2, encoded, order)):
        own = slice(2 * rank, 2 * rank + 2)
        (s1, s2, t1, t2, s3), bins = [x[:3] for x in seen], [x[3] for x in seen]
        assert bins == [4, 2, 4, 4, 4]
        for (x, b, v), k, rows in ((s1, 0, own), (t1, 0, order[own]), (t2, 1, order[own])):
            assert torch.equal(x, images[k][rows])
            assert torch.equal(v, valid[rows])
            torch.testing.assert_close(b, places[k][rows])
        assert s2[0].shape[-1] == 16
        assert s3[0].shape[-1] == 32


# --------------------------------------------------------------------------------- the dataset


class Source(list):
    """Images of one color each, whose proposals tell them apart."""

    def __init__(self, sizes, boxes):
        super().__init__(
            (torch.full((3, *size), 9 * k, dtype=torch.uint8), ()) for k, size in enumerate(sizes)
        )
        self.boxes = boxes


def some_source():
    """Eight images of four sizes with 1 to 8 proposals each."""
    generator = torch.Generator().manual_seed(0)
    first = [uniform(generator, k, 2, high=0.6, dtype=torch.float32) for k in range(1, 9)]
    boxes = [
        torch.cat([x, x + uniform(generator, *x.shape, low=0.1, high=0.4).float()], 1)
        for x in first
    ]
    return Source([(40, 48), (64, 50), (30, 90), (40, 48)] * 2, boxes)


def test_the_chosen_boxes_are_some_that_view_2_holds():
    source, full = some_source(), set()
    dataset, indices = TwoViews(source, SMALL), [0, 5, 2, 7, 6, 3]
    for epoch in range(60):
        batch = harness.make_batch(dataset, indices, epoch=epoch)
        _, (view1, view2), boxes, valid, *_ = batch
        assert boxes.shape == (6, SMALL.regions, 4)
        for row, index in enumerate(indices):
            h, w = source[index][0].shape[1:]
            assert view1.box[row].tolist() == [0, 0, w, h]  # the whole image
            own = source.boxes[index] * torch.tensor([w, h, w, h])
            x1, y1, x2, y2 = view2.box[row]
            held = own[
                (own[:, 0] >= x1) & (own[:, 1] >= y1) & (own[:, 2] <= x2) & (own[:, 3] <= y2)
            ]
            count = min(SMALL.regions, len(held))
            assert valid[row].tolist() == [True] * count + [False] * (SMALL.regions - count)
            chosen, rest = boxes[row, :count], boxes[row, count:]
            distance = (chosen[:, None] - held).abs().amax(-1)
            assert (distance.amin(1) < 1e-3).all() if count else True
            assert len(set(distance.argmin(1).tolist() if count else [])) == count  # none twice
            other = chosen[:1] if count else view2.box[[row]]  # with none all of the view
            assert torch.equal(rest, other.expand_as(rest))
            full.add(count)
    assert full == {0, 1, 2, 3, 4}


def test_the_boxes_are_drawn_from_the_seed_the_epoch_and_the_images():
    config = replace(SMALL, views=Views(size=8, scale=(1.0, 1.0)))
    dataset = TwoViews(some_source(), config)
    first, again = (harness.make_batch(dataset, [7, 3])[2:4] for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(harness.make_batch(dataset, [7, 3], epoch=1)[2], first[0])
    seeded = TwoViews(some_source(), replace(config, seed=1))
    assert not torch.equal(harness.make_batch(seeded, [7, 3])[2], first[0])


def write_proposals(folder, boxes, sizes):
    """What recipes/proposals.py writes beside a folder; both by name, in pixels."""
    rows = [np.array(x, np.int32).reshape(-1, 4) for x in boxes.values()]
    np.savez_compressed(
        proposals.default_path(folder),
        names=np.array([os.fsencode(name) for name in boxes]),
        sizes=np.array([sizes[name] for name in boxes], np.int32),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        boxes=np.concatenate(rows),
        settings=json.dumps({"schema": proposals.SCHEMA}),
    )


@pytest.fixture
def folder(tmp_path):
    """Five images, some proposals of each."""
    folder, names = tmp_path / "photos", [f"{k}.png" for k in range(5)]
    folder.mkdir()
    drawn = sample_scenes(5, (40, 48), generator=torch.Generator().manual_seed(0)).images
    for name, image in zip(names, (drawn * 255).byte().movedim(1, -1).numpy(), strict=True):
        Image.fromarray(image).save(folder / name)
    boxes = {name: [[k, 2, 20 + k, 38]] for k, name in enumerate(names)}
    write_proposals(folder, boxes, dict.fromkeys(names, (40, 48)))
    return folder


WHOLE = replace(SMALL, views=Views(size=32, scale=(1.0, 1.0)))  # view 2 holds all


def test_what_stands_in_for_an_unreadable_file_brings_its_own_proposals(folder):
    for name in ("1.png", "2.png", "4.png"):
        (folder / name).write_text("no image")
    dataset = TwoViews(proposals.image_source(folder, None, scenes=0), WHOLE)
    _, _, boxes, valid, _, unreadable = harness.make_batch(dataset, range(5))
    assert valid.sum(1).tolist() == [1] * 5
    want = [[k, 2, 20 + k, 38] for k in (0, 3, 3, 3, 0)]  # 4 is the last
    torch.testing.assert_close(boxes[:, 0], torch.tensor(want).float())
    assert [os.path.basename(x.split(":")[0]) for x in unreadable] == [
        "1.png", "2.png", "2.png", "4.png",
    ]  # fmt: skip


def test_boxes_follow_an_image_that_was_resized_since(folder):
    boxes = {f"{k}.png": [[8, 0, 96, 80]] for k in range(5)}
    write_proposals(folder, boxes, dict.fromkeys(boxes, (160, 96)))  # four times, and twice
    dataset = TwoViews(proposals.image_source(folder, None, scenes=0), WHOLE)
    _, _, boxes, valid, *_ = harness.make_batch(dataset, [0, 4])
    assert valid[:, 0].all()
    torch.testing.assert_close(boxes[:, 0], torch.tensor([[4.0, 0, 48, 20]] * 2))


def test_images_without_proposals_are_left_out(folder):
    boxes = {f"{k}.png": [[8, 0, 30, 30]] * (k % 2) for k in range(4)}  # and 4 is unknown
    write_proposals(folder, boxes, dict.fromkeys(boxes, (40, 48)))
    source = proposals.image_source(folder, None, scenes=0)
    assert source.names.tolist() == [b"1.png", b"3.png"]
    assert len(source) == len(source.boxes) == 2


# ------------------------------------------------------------------------------- what a user sees


def test_the_encoder_is_timms():
    torch.manual_seed(0)
    plain = timm.create_model("resnet50", num_classes=0, global_pool="").eval()
    encoder = encoders.build("resnet50").eval()
    encoder.load_state_dict(plain.state_dict())
    torchvision.models.resnet50().load_state_dict(encoder.state_dict(), strict=False)
    model = SimpleNamespace(encoder=encoder, head=nn.Identity())
    x, boxes = torch.rand(1, 3, 64, 64), torch.tensor([[[0.1, 0.2, 0.7, 0.9]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    got = d3ssl.embed(vars(model), Input(x, boxes, valid), 3)  # block 5 of 3 x 3 bins of C4
    c2 = plain.layer1(plain.maxpool(plain.act1(plain.bn1(plain.conv1(x)))))
    c4 = plain.layer3(plain.layer2(c2))
    region = torchvision.ops.roi_align(c4, [boxes[0] * 4], 3, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(got[0], plain.layer4(region).mean((2, 3)), rtol=1e-3, atol=1e-4)


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert paper.views == Views(224, (0.4, 1.0), 0.1, (0.1, 2.0))
    assert (paper.arch, paper.regions, paper.bins, paper.head) == ("resnet50", 4, 14, (2048, 128))
    assert (paper.cut, paper.mask) == ((0.2, 0.5), (0.2, 0.6))
    assert (paper.jitter[1], paper.depositioning) == (1.0, 1.0)
    assert (paper.bank, paper.temperature, paper.momentum) == (65536, 0.2, 0.999)
    assert (paper.batch, paper.epochs, paper.lr, paper.weight_decay) == (256, 800, 0.3, 1e-4)
    assert (paper.soco_cutout, paper.soco_jitter) == ((0, 0), 0.0)


def test_the_other_presets_are_rows_of_table_5():
    ablation = replace(PRESETS["paper"], epochs=200, depositioning=0.0)
    nothing = {"cut": (0, 0), "mask": (0, 0), "jitter": (1, 1)}
    rows = {
        "region": nothing,
        "soco-cutout": {**nothing, "soco_cutout": (0.1, 0.3)},
        "soco-jitter": {**nothing, "cut": (0.2, 0.5), "soco_jitter": 0.1},
        "decoupling": {},
    }
    for preset, changes in rows.items():
        assert PRESETS[preset] == replace(ablation, preset=preset, **changes)
    assert PRESETS.keys() == {"demo", "paper", *rows}


def test_the_rows_of_table_5_are_commands(monkeypatch):
    page = (Path(__file__).parents[2] / "docs/recipes/d3ssl.md").read_text()
    rows = re.findall(r"^\| (\d) \|.*`(--preset [^`]+)` \|$", page, flags=re.MULTILINE)
    assert [number for number, _ in rows] == [*"123456"]
    names = "soco_cutout", "soco_jitter", "cut", "jitter", "mask"  # the columns
    still = {name: getattr(PRESETS["region"], name) for name in names}
    checks = []
    for _, options in rows:
        monkeypatch.setattr(sys, "argv", ["d3ssl.py", *options.split()])
        config = d3ssl.read_options()
        d3ssl.check_options(config)
        assert (config.epochs, config.depositioning) == (200, 0.0)
        checks.append([getattr(config, name) != still[name] for name in names])
    assert checks == [
        [False, False, False, False, False],
        [True, False, False, False, False],
        [False, True, True, False, False],
        [False, False, True, False, False],
        [False, False, True, True, False],
        [False, False, True, True, True],
    ]


def test_the_region_preset_changes_nothing_in_an_image():
    names = "cut", "mask", "jitter", "depositioning"
    config = replace(SMALL, **{name: getattr(PRESETS["region"], name) for name in names})
    case = batch()
    images, views, boxes, valid = case
    (x1, b1, _), *_ = seeded(0, config, case)
    assert torch.equal(x1, images[0])
    torch.testing.assert_close(b1[valid], carried(views[0], boxes)[valid])


@pytest.fixture
def few_scenes(monkeypatch):
    """A demo of 16 scenes, and without its probe."""
    scenes = proposals.SceneProposals
    monkeypatch.setattr(proposals, "SceneProposals", lambda *_, **more: scenes(16, **more))
    score = SimpleNamespace(miou=0.5, prior_miou=0.25)
    monkeypatch.setattr(dk, "probe_scenes", lambda encode: score)
    monkeypatch.setattr(d3ssl.scene_probe, "draw", lambda encode, path: None)


def test_scenes_are_those_of_the_harness_and_bring_large_proposals():
    source = proposals.SceneProposals(70)
    plain = d3ssl.harness.image_source(None, scenes=70)
    for (image, unreadable), (same, _) in zip(source, plain, strict=True):
        assert torch.equal(image, same)
        assert unreadable == ()
    assert len(source.boxes) == 70
    boxes = torch.cat(source.boxes)
    assert (dk.box_area(boxes) > 0.09).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    again = proposals.image_source(None, None, scenes=70)
    assert all(torch.equal(a, b) for a, b in zip(source.boxes, again.boxes, strict=True))


def test_a_bank_larger_than_the_images_is_refused(tmp_path, few_scenes):
    with pytest.raises(d3ssl.harness.UserError, match=r"--bank is 17.*16") as error:
        d3ssl.train(replace(SMALL, run=tmp_path, bank=17))  # its own keys are in it
    assert "\n" not in str(error.value)


def test_images_without_a_proposals_file_are_answered_with_what_to_run(tmp_path, folder):
    proposals.default_path(folder).unlink()
    with pytest.raises(
        d3ssl.harness.UserError, match=r"photos\.proposals\.npz.*recipes/proposals"
    ) as error:
        d3ssl.train(replace(SMALL, data=folder, run=tmp_path / "run", bank=4, batch=2))
    assert "\n" not in str(error.value)


def test_proposals_without_images_are_refused(tmp_path, folder):
    config = replace(SMALL, run=tmp_path / "run")
    with pytest.raises(d3ssl.harness.UserError, match="--data") as error:
        d3ssl.train(replace(config, proposals=proposals.default_path(folder)))
    assert "\n" not in str(error.value)


def test_proposals_of_another_folder_are_refused(tmp_path, folder):
    (other := tmp_path / "other").mkdir()
    (folder / "0.png").rename(other / "another.png")
    config = replace(SMALL, data=other, run=tmp_path / "run", bank=4, batch=2)
    path = proposals.default_path(folder)
    with pytest.raises(d3ssl.harness.UserError, match=r"photos\.proposals\.npz.*other") as error:
        d3ssl.train(replace(config, proposals=path))
    assert "\n" not in str(error.value)


def test_objects_are_the_first_proposals_of_what_can_be_read(folder):
    for name in ("1.png", "2.png", "4.png"):
        (folder / name).write_text("no image")
    source = proposals.image_source(folder, None, scenes=0)
    got = proposals.crop_objects(source, 99, 8)
    assert len(got) == 5
    for k, found in zip((0, 3, 3, 3, 0), got, strict=True):
        box = dk.View(torch.tensor([k, 2.0, 20 + k, 38]), torch.tensor(False))
        torch.testing.assert_close(found, dk.crop_views(source[k][0] / 255, box, 8))


def logged(run, name):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


@pytest.fixture
def curves(monkeypatch):
    """The lines of each figure that is saved: for each of its axes label and heights."""
    saved = []

    class Recorded(Figure):
        def savefig(self, path, *arguments, **options):
            saved.append([{x.get_label(): x.get_ydata() for x in axes.lines} for axes in self.axes])
            super().savefig(path, *arguments, **options)

    monkeypatch.setattr(d3ssl, "Figure", Recorded)
    return saved


def test_pictures_and_log_show_the_bias_of_each_layer(tmp_path, few_scenes, curves, monkeypatch):
    asked = iter([False, False, False, True])  # halted after the last step, and resumed
    monkeypatch.setattr(d3ssl.harness.Run, "stop_requested", lambda self: next(asked, True))
    d3ssl.train(replace(SMALL, run=tmp_path))
    assert (tmp_path / "pictures" / "layers.png").is_file()
    names = "coupling_rate", "mean_cosine"
    rows = logged(tmp_path, "mean_cosine_layer1")
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert [[len(axes) for axes in figure] for figure in curves] == [[1, 1], [2, 2], [3, 3]]
    for name, lines in zip(names, curves[-1], strict=True):
        for row in rows:
            want = [row[f"{name}_layer{k}"] for k in (1, 2, 3, 4)]
            assert lines[f"step {row['step']}"].tolist() == want
            assert all(np.isfinite(want))
    assert [row["probe_miou"] for row in rows] == [0.5] * 3
    steps = logged(tmp_path, "loss")
    assert [row["filled"] for row in steps] == sorted(row["filled"] for row in steps)
    assert all(0 < row["valid"] <= 1 for row in steps)


def fake_run(folder, *steps):
    """What `evaluate` needs of a run: it has logged after these steps."""
    names = [f"{x}_layer{k}" for x in ("coupling_rate", "mean_cosine") for k in (1, 2, 3, 4)]
    rows = [dict.fromkeys(names, 1.0) | {"step": step} for step in steps or (0,)]
    world = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(
        world=world,
        log=lambda step, **values: None,
        rows=lambda *_: rows,
        picture_path=lambda step, kind="step": folder / f"{kind}-{step}.png",
    )


def some_preview():
    """Four scenes, and the batch of them that is drawn."""
    source = proposals.SceneProposals(4)
    normalize = (MEAN, STD)
    return source, harness.make_batch(TwoViews(source, SMALL), range(4), normalize=normalize)


def test_the_preview_shows_the_students_three_inputs_and_the_teachers_two(tmp_path, monkeypatch):
    drawn = []
    source, preview = some_preview()
    _, _, boxes, valid, *_ = preview
    valid[:] = torch.tensor([True, False, True, False])
    std, mean = torch.tensor(STD), torch.tensor(MEAN)
    colors = [((k + torch.zeros(3)) / 4 - mean) / std for k in range(4)]
    shapes = (4, 3, 32, 32), (4, 3, 32, 32), (4, 3, 16, 16), (4, 3, 32, 32)
    given = [
        Input(color[:, None, None].expand(shape), boxes / 64 / (k + 1), valid)
        for k, (color, shape) in enumerate(zip(colors, shapes, strict=True))
    ]
    monkeypatch.setattr(d3ssl, "augment", lambda *_: given)
    monkeypatch.setattr(
        d3ssl, "draw_bounding_boxes", lambda x, boxes, **options: drawn.append(boxes) or x
    )
    model = D3SSL(SMALL)
    d3ssl.evaluate(model, source, preview, replace(SMALL, data="."), fake_run(tmp_path), 0)
    assert model.training
    with Image.open(tmp_path / "step-0.png") as picture:
        pixels = torch.from_numpy(np.array(picture))
    order = 0, 2, 3, 0, 1  # view 1, the small one, view 3; view 1, view 2
    for row in range(4):
        for column, view in enumerate(order):
            tile = pixels[row * 226 + 2 :, column * 226 + 2 :][:224, :224]
            assert ((tile.float() - 255 * view / 4).abs() <= 1).all()
    want = [given[view].boxes[row, valid[row]] * 224 for view in order for row in range(4)]
    assert len(drawn) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(drawn, want, strict=True))


def test_of_many_checkpoints_the_first_and_the_last_are_drawn(tmp_path, curves):
    source, preview = some_preview()
    run = fake_run(tmp_path, *range(0, 100, 5))
    d3ssl.evaluate(D3SSL(SMALL), source, preview, replace(SMALL, data="."), run, 95)
    for lines in curves[0]:
        assert 3 < len(lines) < 10
        assert [*lines] == [
            "step 0",
            *(f"step {100 - 5 * k}" for k in range(len(lines) - 1, 0, -1)),
        ]


def test_the_preview_has_the_same_augmentations_each_time(tmp_path):
    pictures = []
    source, preview = some_preview()
    preview[3][:] = True
    for step in (0, 3):
        run, data = fake_run(tmp_path), replace(SMALL, data=".")
        d3ssl.evaluate(D3SSL(SMALL), source, preview, data, run, step)
        pictures.append((tmp_path / f"step-{step}.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_an_image_without_a_box_is_shown_in_silence(tmp_path):
    source, preview = some_preview()
    preview[3][1] = False
    d3ssl.evaluate(D3SSL(SMALL), source, preview, replace(SMALL, data="."), fake_run(tmp_path), 0)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("d3ssl", ()),
        ("region", ("cut", "mask", "jitter", "depositioning")),
        ("decoupling", ("cut", "depositioning")),
        ("decoupling", ("cut", "mask", "depositioning")),  # jitter is one, too
    ],
)
def test_the_method_is_said_beside_the_weights(
    tmp_path, few_scenes, monkeypatch, capsys, method, names
):
    monkeypatch.setattr(d3ssl, "evaluate", lambda *arguments: None)
    changes = {name: getattr(PRESETS["region"], name) for name in names}
    d3ssl.train(replace(SMALL, run=tmp_path, epochs=1, **changes))
    assert json.loads((tmp_path / "encoder.json").read_text())["method"] == method
    warning = "warning: the shuffle of the keys has no effect: there is one process"
    assert capsys.readouterr().err.count(warning) == 1


def test_socos_augmentations_make_a_decoupling():
    nothing = PRESETS["region"]
    assert d3ssl.method_of(nothing) == "region"
    assert d3ssl.method_of(replace(nothing, soco_cutout=(0.0, 0.3))) == "decoupling"
    assert d3ssl.method_of(replace(nothing, soco_jitter=0.1)) == "decoupling"


def test_the_key_encoder_follows_before_each_step_and_keeps_its_statistics(
    tmp_path, few_scenes, monkeypatch
):
    calls, update = [], dk.ema_update

    def follow(teacher, student, **options):
        calls.append(options)
        return update(teacher, student, **options)

    monkeypatch.setattr(dk, "ema_update", follow)
    monkeypatch.setattr(d3ssl, "evaluate", lambda *arguments: None)
    d3ssl.train(replace(SMALL, run=tmp_path))
    assert calls == [{"momentum": SMALL.momentum, "buffers": "keep"}] * 4
