"""A step of the recipes that have no test of it elsewhere: the same on any number of processes.

Elsewhere: test_densesiam.py, test_croc.py, test_dupr.py, test_d3ssl.py, test_adapt.py.
"""

import copy
from dataclasses import replace

import densesiam_segment
import detect
import harness
import minimal
import picie
import pytest
import soco
import test_soco
import torch
from steps import step_on_part
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.rpn import RegionProposalNetwork
import densekit as dk
from densekit.testing import assert_world_size_invariant


def images_of(count, side):
    draws = torch.Generator().manual_seed(0)
    return list(torch.rand(2, count, 3, side, side, generator=draws, dtype=torch.float64))


def test_a_step_of_the_minimal_recipe():
    config = minimal.Config(size=32, grid=3, batch=4, epochs=1, workers=0, device="cpu")
    torch.manual_seed(0)
    model = minimal.Minimal(config).double()
    pairs = dk.sample_view_pairs((64, 64), (4,), generator=harness.generator(0))
    views = [dk.View(view.box.double(), view.flip) for view in pairs[:2]]
    valid = torch.tensor([True, False, False, True])  # of four processes two have no pair

    def one_step(part, group):
        _, loss, gradients, _ = step_on_part(model, *part)
        return loss, gradients

    assert_world_size_invariant(one_step, (images_of(4, 32), views, valid))


def test_a_step_of_unsupervised_segmentation():
    # With other weights, the counts of the classes are those of one process.
    config = replace(
        densesiam_segment.PRESETS["demo"], image=32, size=32, aux=8, weighting="plain", device="cpu"
    )
    torch.manual_seed(0)
    model = densesiam_segment.Segmenter(config, 5).double()
    box = [[0.0, 0, 1, 1], [0.0, 0.38, 0.62, 1.0], [0.45, 0.2, 0.95, 0.7], [0.1, 0.1, 0.8, 0.6]]
    flip = torch.tensor([True, False, True, False])
    # Two images on each of four processes: of one image alone, torch's batch normalization has a
    # wrong gradient on a CPU, if the gradient of its output is laid out as rows (2.8 to 2.15).
    view = dk.View(torch.tensor(box, dtype=torch.float64).repeat(2, 1), flip.repeat(2))

    def one_step(part, group):
        (terms,), loss, gradients, _ = step_on_part(model, *part, True)
        terms = {name: dk.all_mean(x.detach(), group) for name, x in terms.items()}
        return dk.all_mean(loss, group), terms, gradients

    assert_world_size_invariant(one_step, (images_of(8, 32), view))


@pytest.mark.parametrize("method", ["picie", "iic", pytest.param("mdc", marks=pytest.mark.slow)])
def test_a_step_of_clusters(method):
    config = replace(
        picie.PRESETS["demo"], image=32, size=32, aux=8, method=method, device="cpu", radius=1
    )
    torch.manual_seed(0)
    model = picie.Segmenter(config, 5).double()
    for clusters in model.clusters.values():
        clusters.centroids.normal_()
        clusters.weights.uniform_(0.2, 1.0)
    if model.clusters:
        model.add_labeler()
    whole = dk.full_view((1, 1), (4,))
    view = dk.View(whole.box.double(), whole.flip)
    images = images_of(4, 32)

    def one_step(part, group):
        (terms,), loss, gradients, _ = step_on_part(model, *part)
        return {name: x.detach() for name, x in terms.items()}, loss, gradients

    assert_world_size_invariant(one_step, (images, view), (2,))


def test_a_step_of_soco():
    model = test_soco.make(cut=(0.2, 0.5), mask=(0.2, 0.6), jitter=(0.8, 1.0))
    case = test_soco.batch((3, 4, 0, 1))  # one of four processes has no proposal
    inputs = test_soco.seeded(0, model.config, case)  # what is drawn is each image's own

    def one_step(part, group):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(soco, "augment", lambda *_: part["inputs"])
            (terms,), loss, gradients, _ = step_on_part(model, *part["case"], part["seeds"])
        return loss, terms["view2"].detach(), terms["view3"].detach(), gradients

    part = {"case": case, "inputs": inputs, "seeds": torch.arange(4)}
    assert_world_size_invariant(one_step, part, (1, 2, 4))


def one_object_and_the_rest(sampler, matched):
    """The draws of torchvision's losses, given: in each image its last object, and 7 places.

    torchvision's losses are means over the samples of a process. So all images have as many.
    """
    positive, negative = [], []
    for labels in matched:
        chosen = torch.zeros_like(labels, dtype=torch.uint8)
        chosen[(labels >= 1).nonzero()[-1]] = 1
        positive.append(chosen)
        chosen = torch.zeros_like(labels, dtype=torch.uint8)
        chosen[(labels == 0).nonzero()[:7]] = 1
        negative.append(chosen)
    return positive, negative


@pytest.mark.parametrize("detector", ["faster-rcnn-fpn", "mask-rcnn-c4", "retinanet-fpn"])
def test_a_step_of_detection(detector, monkeypatch):
    monkeypatch.setattr(BalancedPositiveNegativeSampler, "__call__", one_object_and_the_rest)
    assign = RegionProposalNetwork.assign_targets_to_anchors

    def assign_in_double(*arguments):
        labels, boxes = assign(*arguments)
        return [x.double() for x in labels], boxes  # with float32 the loss would be float32, too

    monkeypatch.setattr(RegionProposalNetwork, "assign_targets_to_anchors", assign_in_double)
    config = replace(
        detect.PRESETS["demo"], detector=detector, sides=(64,), width=8, rois=8, proposals=20,
        device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = detect.build_detector(config, 3).double()
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 64, 64, generator=draws, dtype=torch.float64)
    corners = torch.randint(0, 24, (4, 2), generator=draws)
    sides = torch.randint(16, 40, (4, 2), generator=draws)
    boxes = torch.cat([corners, corners + sides], 1).double()[:, None]
    masks = dk.boxes_to_mask(boxes, (64, 64)).view(4, 1, 64, 64).byte()
    labels = torch.tensor([[1], [3], [2], [1]])

    def one_step(part, group):
        images, boxes, labels, masks = part
        rows = zip(boxes, labels, masks, strict=True)
        targets = [{"boxes": x, "labels": y, "masks": z} for x, y, z in rows]
        terms, loss, gradients = step_of_detector(model, list(images), targets)
        terms = {name: dk.all_mean(x, group) for name, x in terms.items()}
        return dk.all_mean(loss, group), terms, gradients

    assert_world_size_invariant(one_step, (images, boxes, labels, masks), (2, 4))


def step_of_detector(model, images, targets):
    """The terms of the loss, their sum, and the mean gradients of all processes."""
    model = copy.deepcopy(model).train()
    norms = [x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    nn.ModuleList(norms).eval()
    ddp = nn.parallel.DistributedDataParallel(model)  # it averages as long as it lives
    terms = ddp(images, targets)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.detach() for name, x in terms.items()}, loss.detach(), gradients
