"""The SoCo recipe: augmentations, loss and optimizer against the paper's words.

Its runs: test_recipes.py. A step on several processes: test_world_size.py. What it shares with
D3SSL: test_d3ssl.py.
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import d3ssl
import harness
import numpy as np
import proposals
import pytest
import soco
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from soco import PRESETS, SoCo, Views, augment
from test_d3ssl import batch, carried, cases, filled, halved, one_box
from torch import nn
import densekit as dk

SMALL = replace(
    PRESETS["demo"], bins=4, head=(16, 8), batch=8, epochs=2, workers=0, log_every=1, save_every=3,
    device="cpu", views=Views(size=32),
)  # fmt: skip
# Nothing but what a test adds.
STILL = replace(SMALL, soco_cutout=(0.0, 0.0), soco_jitter=0.0)
# Wrong options, and what the sentence about each of them begins with.
WRONG = [
    (["--weights", "timm:convnext_atto"], "--weights is timm:convnext_atto"),
    (["--freeze", "-1"], "--freeze is -1"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--proposals", "some.npz"], "--proposals is some.npz"),  # without --data
    (["--co-occurrence", "1.5"], "--co-occurrence is 1.5"),
    (["--co-occurrence", "0.5", "--data", "some"], "--co-occurrence is 0.5: leave it out"),
    (["--arch", "resnet5"], "--arch is resnet5"),
    (["--arch", "resnetv2_50"], "--arch is resnetv2_50"),  # it has no layer4
    (["--regions", "0"], "--regions is 0"),
    (["--cut", "0.5", "0.2"], "--cut is 0.5 0.2"),
    (["--mask", "-0.1", "0.2"], "--mask is -0.1 0.2"),
    (["--jitter", "0.8", "1.2"], "--jitter is 0.8 1.2"),
    (["--soco-cutout", "0.3", "0.1"], "--soco-cutout is 0.3 0.1"),
    (["--soco-jitter", "1.0"], "--soco-jitter is 1.0"),
    (["--view3", "-1"], "--view3 is -1"),
    (["--view3", "nan"], "--view3 is nan"),
    (["--bins", "1"], "--bins is 1"),
    (["--head", "16", "0"], "--head is 16 0"),
    (["--momentum", "1.1"], "--momentum is 1.1"),
    (["--momentum", "nan"], "--momentum is nan"),
    (["--warmup", "-1"], "--warmup is -1"),
    (["--warmup", "inf"], "--warmup is inf"),
    (["--views.size", "33"], "--views.size is 33: give a multiple of 16, two cells of C4 of tiny"),
    (["--views.size", "40"], "--views.size is 40: give a multiple of 16, two cells"),
    (["--arch", "resnet18", "--views.size", "48"], "--views.size is 48: give a multiple of 32"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--weight-decay", "-0.1"], "--weight-decay is -0.1"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
    (["--views.size", "0"], "--views.size is 0"),
    (["--views.scale", "0.2", "1.5"], "--views.scale is 0.2 1.5"),
    (["--views.hue", "0.6"], "--views.hue is 0.6"),
    (["--views.blur", "2.0", "0.1"], "--views.blur is 2.0 0.1"),
]


def seeded(seed, config, case):
    seeds = harness.image_seeds(seed, 0, torch.arange(len(case[-1])))
    return augment(*case, seeds, config)


# --------------------------------------------------------------------------- the augmentations


@given(cases())
def test_view_3_is_view_2_at_half_the_size_and_boxes_follow(case):
    images, views, boxes, valid = case
    (x1, first, _), (x2, second, _), (x3, third, _) = seeded(0, STILL, case)
    assert torch.equal(x1, images[0])
    assert torch.equal(x2, images[1])
    torch.testing.assert_close(x3, halved(images[1]))
    torch.testing.assert_close(first[valid], carried(views[0], boxes)[valid])
    torch.testing.assert_close(second[valid], carried(views[1], boxes)[valid])
    assert torch.equal(third, second)


@given(cases(), st.integers(0, 99))
def test_socos_augmentations_are_those_of_its_program(case, seed):
    """A box of view 1 moves by up to 10 %; squares in views 2 and 3 alone are covered."""
    images, _, _, valid = case
    still = seeded(seed, STILL, case)
    changed = seeded(seed, SMALL, case)
    assert torch.equal(changed[0].images, images[0])
    filled(changed[1].images, images[1])
    filled(changed[2].images, halved(images[1]))
    for k in (1, 2):
        assert torch.equal(changed[k].boxes, still[k].boxes)
    before, after = (x[0].boxes[valid] for x in (still, changed))
    assert ((after >= 0) & (after <= 1)).all()
    sides = (before[:, 2:] - before[:, :2]).repeat(1, 2)
    assert ((after - before).abs() <= 0.15 * sides + 1e-9).all()  # a corner: center and half a side


def test_half_of_the_boxes_of_view_1_are_jittered():
    case = one_box(400)
    still, moved = (seeded(0, config, case)[0].boxes[:, 0] for config in (STILL, SMALL))
    assert 0.4 < (still != moved).any(-1).double().mean() < 0.6
    cut = (seeded(0, SMALL, case)[1].images != case[0][1]).flatten(1).any(1)
    assert 0.4 < cut.double().mean() < 0.6


@given(cases(), st.integers(0, 99))
def test_d3ssls_augmentations_are_in_views_1_and_3_and_jitter_each_view(case, seed):
    images, _, _, valid = case
    names = "soco_cutout", "soco_jitter", "cut", "mask", "jitter"
    aug = replace(SMALL, **{name: getattr(PRESETS["aug"], name) for name in names})
    still = seeded(seed, STILL, case)
    changed = seeded(seed, aug, case)
    zeros = [
        filled(changed[0].images, images[0]),
        filled(changed[2].images, halved(images[1])),
    ]
    assert torch.equal(changed[1].images, images[1])
    for zero in zeros:
        assert torch.equal(zero.flatten(1).any(1), valid.any(1))
    relative = []
    for (_, inner, _), (_, outer, _) in zip(changed, still, strict=True):
        inner, outer = inner[valid], outer[valid]
        assert (inner[:, :2] >= outer[:, :2] - 1e-9).all()
        assert (inner[:, 2:] <= outer[:, 2:] + 1e-9).all()
        relative.append((inner[:, 2:] - inner[:, :2]) / (outer[:, 2:] - outer[:, :2]))
    assert all(((x > 0.8 - 1e-6) & (x < 1 + 1e-6)).all() for x in relative)
    if valid.any():  # each view has its own
        assert len({tuple(x.flatten().tolist()) for x in relative}) == 3


# ------------------------------------------------------------------------------------ the loss


def different_teacher(model):
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    return model


def make(**changes):
    torch.manual_seed(0)
    return different_teacher(SoCo(replace(SMALL, **changes))).double()


def embed(encoder, heads, view, bins):
    """Block 5 of RoIAlign's bins of C4, its mean, and the MLPs, of the valid regions alone."""
    x, boxes, valid = view
    x = encoder.layer1(encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(x)))))
    c4 = encoder.layer3(encoder.layer2(x))
    places = [row[used] * c4.shape[-1] for row, used in zip(boxes, valid, strict=True)]
    regions = torchvision.ops.roi_align(c4, places, bins, sampling_ratio=2, aligned=True)
    rows = encoder.layer4(regions).mean((2, 3))
    for first, norm, _, last in heads:
        hidden = rows @ first.weight.T + first.bias
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
        hidden = (hidden * norm.weight + norm.bias).relu()
        rows = hidden @ last.weight.T + last.bias
    return rows.detach().numpy()


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_the_loss_is_that_of_the_paper(monkeypatch, weight):
    """-2 cos of each region, from view 1 to the others and back, against a few lines of numpy."""
    seen = []
    monkeypatch.setattr(soco, "augment", lambda *x: seen.append(augment(*x)) or seen[-1])
    model, case = make(view3=weight), batch()  # 8 of 16 places: each region has two of them
    oracle = copy.deepcopy(model)
    loss, terms = model(*case, torch.arange(4))

    def cosine(x, y):
        return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)

    bins = (4, 4, 2)  # of a view of half the size
    online = [oracle.student["projector"], oracle.predictor]
    target = [oracle.teacher["projector"]]
    p = [embed(oracle.student["encoder"], online, x, n) for x, n in zip(*seen, bins, strict=True)]
    z = [embed(oracle.teacher["encoder"], target, x, n) for x, n in zip(*seen, bins, strict=True)]
    pairs = [(-2 * cosine(p[0], z[k]) - 2 * cosine(p[k], z[0])).mean() for k in (1, 2)]
    assert terms["view2"].item() == pytest.approx(pairs[0])
    assert loss.item() == pytest.approx(pairs[0] + weight * pairs[1])
    assert ("view3" in terms) == bool(weight)
    assert terms["valid"] == 0.5


def test_the_student_and_its_predictor_learn_and_the_teacher_does_not():
    torch.manual_seed(0)
    model = SoCo(SMALL)
    loss, _ = model(*batch(dtype=torch.float32), torch.arange(4))
    loss.backward()
    for name, parameter in [*model.student.named_parameters(), *model.predictor.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.student["encoder"].conv1[0].weight.grad.any()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert model.teacher["encoder"].bn1.num_batches_tracked == 3  # of all views


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 2)])
def test_few_proposals_have_a_finite_loss_and_gradients(counts):
    model = make(bins=2)
    loss, terms = model(*batch(counts), torch.arange(2))
    loss.backward()
    assert loss.isfinite()
    assert terms["valid"] == sum(counts) / 8
    assert loss != 0 or not sum(counts)
    for name, parameter in model.student.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_what_stands_in_for_a_missing_proposal_changes_nothing():
    """Neither the loss, nor a gradient, nor the running batch statistics."""
    images, views, boxes, valid = batch((3, 4, 0, 1))
    others = torch.where(valid[..., None], boxes, boxes.flip(0))
    found = []
    for some in (boxes, others):
        model = make(cut=(0.2, 0.5), mask=(0.2, 0.6))
        loss, _ = model(images, views, some, valid, torch.arange(4))
        loss.backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        found.append((loss.detach(), gradients, dict(model.named_buffers())))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_the_first_step_of_the_optimizer(optimizer):
    """LARS: 0.001 |w| / (|g| + decay |w|) of g + decay w; one-dimensional parameters take SGD's."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(n, generator=generator)) for n in ((3, 4), (4,)))
    config = replace(PRESETS["paper"], optimizer=optimizer, weight_decay=0.1)
    made = soco.build_optimizer([weight, bias], 2.0, config)
    before = [x.detach().clone() for x in (weight, bias)]
    weight.grad, bias.grad = (torch.randn(x.shape, generator=generator) for x in before)
    gradient = weight.grad + 0.1 * before[0]
    ratio = 0.001 * before[0].norm() / (weight.grad.norm() + 0.1 * before[0].norm())
    if optimizer == "sgd":
        ratio = 1.0
    want = [before[0] - 2.0 * ratio * gradient, before[1] - 2.0 * bias.grad]
    made.step()
    torch.testing.assert_close([weight.detach(), bias.detach()], want)


def test_the_target_network_follows_before_each_step_ever_more_slowly(tmp_path, monkeypatch):
    scenes = proposals.SceneProposals
    monkeypatch.setattr(proposals, "SceneProposals", lambda *_, **more: scenes(16, **more))
    monkeypatch.setattr(soco, "evaluate", lambda *arguments: None)
    calls, update = [], dk.ema_update

    def follow(teacher, student, **options):
        calls.append(options)
        return update(teacher, student, **options)

    monkeypatch.setattr(dk, "ema_update", follow)
    soco.train(replace(SMALL, run=tmp_path))
    want = [1 - 0.01 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert [x["momentum"] for x in calls] == pytest.approx(want)
    assert {x["buffers"] for x in calls} == {"keep"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lr = [row["lr"] for row in rows if "lr" in row]
    # Two epochs of two steps; the first one warms up.
    assert lr == pytest.approx([0, 0.8 * 8 / 256 / 2, 0.8 * 8 / 256, 0.8 * 8 / 256 / 2])


# ------------------------------------------------------------------------------- what a user sees


def test_the_presets_are_the_papers():
    paper = PRESETS["paper"]
    assert paper.views == Views(224, (0.5, 1.0), 0.1, (0.1, 2.0))
    assert (paper.arch, paper.regions, paper.bins, paper.head) == ("resnet50", 4, 14, (4096, 256))
    assert (paper.soco_cutout, paper.soco_jitter, paper.view3) == ((0.1, 0.3), 0.1, 1.0)
    assert (paper.cut, paper.mask, paper.jitter) == ((0, 0), (0, 0), (1, 1))
    assert (paper.batch, paper.epochs, paper.optimizer) == (2048, 100, "lars")
    assert (paper.lr, paper.warmup, paper.weight_decay, paper.momentum) == (1.0, 10, 1e-5, 0.99)
    ours = d3ssl.PRESETS["paper"]
    changes = {x: getattr(ours, x) for x in ("cut", "mask", "jitter", "soco_cutout", "soco_jitter")}
    assert PRESETS["aug"] == replace(paper, preset="aug", epochs=200, **changes)


def test_the_picture_has_the_three_views_and_the_method_its_name(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        soco, "save_image", lambda tiles, *_, nrow: drawn.append((len(tiles), nrow))
    )
    monkeypatch.setattr(soco, "draw_layers", lambda *_: None)
    source = proposals.SceneProposals(4)
    normalize = ((0.5,) * 3, (0.5,) * 3)
    preview = harness.make_batch(soco.TwoViews(source, SMALL), range(4), normalize=normalize)
    world = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(
        world=world, log=lambda *_, **__: None, rows=lambda *_: [],
        picture_path=lambda step, *_: tmp_path / f"{step}.png",
    )  # fmt: skip
    model = SoCo(SMALL)
    soco.evaluate(model, source, preview, replace(SMALL, data="."), run, 0)
    assert drawn == [(12, 3)]
    assert model.training
    assert [soco.method_of(x) for x in (SMALL, PRESETS["aug"], STILL)] == [
        "soco",
        "soco-aug",
        "soco",
    ]
