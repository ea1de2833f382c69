"""Segmentation by fine-tuning: crops and labels, the network, scores, runs that resume."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import fcn
import harness
import numpy as np
import pytest
import torch
from downstream import encoders, image_sets, scene_sets
from downstream.records import LabeledSet, Record
from downstream.shards import shards_of
from fcn import PRESETS, Crops, Segmenter, Square
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import on_processes
from steps import step_on_part
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
import densekit as dk
from densekit.testing import assert_world_size_invariant

SMALL = replace(
    PRESETS["demo"], steps=4, batch=4, crop=32, window=40, draws=20, workers=0, log_every=1,
    save_every=2, device="cpu",
)  # fmt: skip
# Arguments that make no sense, and how the sentence that answers them begins.
WRONG = [
    (["--preset", "densesiam"], "--data is missing"),
    (["--data", "nowhere"], "--data is nowhere"),
    (["--layout", "nowhere"], "--layout is nowhere"),
    (["--mapping", "nowhere.json"], "--mapping is nowhere.json"),
    (["--encoder", "nowhere"], "--encoder is nowhere"),
    (["--encoder", "random:tiny-vit"], "--encoder is random:tiny-vit: give a ResNet"),
    (["--encoder", "torchvision:swin_t"], "--encoder is torchvision:swin_t: give a ResNet"),
    (["--aux", "-1"], "--aux is -1"),
    (["--steps", "0"], "--steps is 0"),
    (["--milestones", "9", "3"], "--milestones is 9 3"),
    (["--milestones", "0", "3"], "--milestones is 0 3"),
    (["--batch", "1"], "--batch is 1"),
    (["--lr", "-1"], "--lr is -1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--crop", "1"], "--crop is 1"),
    (["--scale", "2", "1"], "--scale is 2.0 1.0"),
    (["--scale", "0", "1"], "--scale is 0.0 1.0"),
    (["--scale", "1e-4", "1"], "--scale is 0.0001 1.0: a crop of 64 pixels would be more than"),
    (["--max-share", "0"], "--max-share is 0.0"),
    (["--max-share", "1.5"], "--max-share is 1.5"),
    (["--window", "0"], "--window is 0"),
    (["--draws", "0"], "--draws is 0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
]
GRAY = (0.5, 0.5, 0.5)
DRAW = fcn.draw
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scene_sets, "COUNT", 8)
    monkeypatch.setattr(fcn, "draw", lambda *_: None)  # which takes longer than all else


def image_set(images, labels, classes):
    """Labeled images in memory; a label of -1 is no class."""
    records = []
    for number, (image, own) in enumerate(zip(images, labels, strict=True)):
        records.append(Record(f"{number}", image, label_map=lambda _, own=own: own))
    return image_sets.ImageSet(LabeledSet([str(x) for x in range(classes)], records))


def start_of(name):
    return encoders.find_start(f"random:{name}")


def segmenter(classes=3, arch="tiny", **changes):
    config = replace(SMALL, encoder=f"random:{arch}", **changes)
    torch.manual_seed(0)
    return Segmenter(config, start_of(arch), classes)


# ---- crops -----------------------------------------------------------------------------------
sides = st.integers(1, 50)


@given(sides, sides, st.integers(2, 24), st.floats(0.3, 2.5), st.booleans(), st.integers(0, 99))
@settings(max_examples=25)
def test_a_pixel_of_a_crop_and_its_label_are_of_the_same_place(h, w, crop, factor, flip, seed):
    """The center of pixel j of the crop lies at left + (j + 0.5) side / crop in the image."""
    rows, columns = torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)
    image = torch.stack([4 * columns, 4 * rows, torch.full((h, w), 77)]).byte()
    labels = rows * w + columns
    labels = torch.where(labels % 5 == 0, -1, labels)  # some pixels of no class
    config = replace(SMALL, crop=crop, scale=(factor, factor), max_share=1.0, distort=False)
    data = Crops(image_set([image], [labels], h * w), config, GRAY)
    ignored = data.images.ignored
    numbers = data.images.read_labels(0)
    draws = harness.generator(seed)
    side = fcn.sample_side(config, draws)
    square = fcn.sample_square(torch.Size((h, w)), side, draws)
    assert side == max(1, round(crop / factor))
    assert square.top == 0 or square.top + side <= h  # in the image, if that is large enough
    assert square.left == 0 or square.left + side <= w

    found = data.crop_image(image, square, torch.tensor(flip))
    classes = data.crop_labels(numbers, square)
    if flip:
        classes = classes.flip(-1)
    for i in range(crop):
        for j in range(crop):
            column = crop - 1 - j if flip else j
            y = square.top + (i + 0.5) * side / crop
            x = square.left + (column + 0.5) * side / crop
            inside = y < h and x < w
            expected = int(numbers[int(y), int(x)]) if inside else ignored
            assert classes[i, j] == expected
            reach = max(1.0, side / crop)  # of the filter, in pixels of the image
            top, left = square.top, square.left
            bottom, right = min(h, top + side), min(w, left + side)
            if top + reach <= y <= bottom - reach and left + reach <= x <= right - reach:
                want = torch.tensor([4 * (x - 0.5), 4 * (y - 0.5), 77.0])
                assert (found[:, i, j] - want).abs().max() <= 1
            if y >= h + reach or x >= w + reach:
                assert found[:, i, j].tolist() == [128] * 3  # the mean color


def test_an_item_is_the_same_whenever_it_is_made_and_half_of_them_are_flipped():
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (1, 48, 48), generator=draws)
    labels[:, :, :30] = 0
    image = torch.stack([labels[0] * 60] * 3).byte()  # the color is the class
    config = replace(SMALL, crop=24, scale=(1.0, 1.0), distort=False)
    data = Crops(image_set([image], labels, 4), config, GRAY)
    flips = mixed = 0
    for epoch in range(60):
        (crop,), classes, index, unreadable = data[epoch, 0]
        again = data[epoch, 0]
        assert torch.equal(crop, again[0][0])
        assert torch.equal(classes, again[1])
        assert torch.equal(crop[0], classes * 60)  # both are flipped, or none
        assert (int(index), unreadable) == (0, [])
        flips += int(not torch.equal(classes, data_without_flip(data, epoch)))
        mixed += data.is_mixed(classes)
    assert 15 < flips < 45
    assert mixed > 55  # of the first draws a third are of one class alone
    assert not torch.equal(
        data[0, 0][1], Crops(data.images, replace(config, seed=1), GRAY)[0, 0][1]
    )


def data_without_flip(data, epoch):
    """The labels of a crop as they were before the flip."""
    draws = harness.generator(data.config.seed, epoch, 0)
    torch.rand((), generator=draws)
    return data.choose_square(data.images.read_labels(0), draws)[1]


def test_colors_change_alone_and_not_between_runs():
    labels = torch.arange(64).view(1, 8, 8) % 4
    image = torch.arange(3 * 64).view(3, 8, 8).byte()
    config = replace(SMALL, crop=8, scale=(1.0, 1.0), distort=True)
    data = Crops(image_set([image], labels, 4), config, GRAY)
    plain = Crops(data.images, replace(config, distort=False), GRAY)
    state = torch.get_rng_state()
    changed = 0
    for epoch in range(8):
        (crop,), classes, *_ = data[epoch, 0]
        assert torch.equal(crop, data[epoch, 0][0][0])
        assert torch.equal(classes, plain[epoch, 0][1])
        changed += not torch.equal(crop, plain[epoch, 0][0][0])
    assert changed > 5
    assert torch.equal(state, torch.get_rng_state())


# ---- the network -----------------------------------------------------------------------------
def test_the_network_is_torchvisions(monkeypatch):
    """Its FCN with an auxiliary head, in training and in a test; what is dropped is left out."""
    monkeypatch.setitem(encoders.TINY, "short", ("resnet50", {"layers": (1, 1, 1, 1)}))
    ours = segmenter(5, "short", head="fcn")
    backbone = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    backbone = IntermediateLayerGetter(backbone, {"layer4": "out", "layer3": "aux"})
    theirs = FCN(backbone, FCNHead(2048, 5), FCNHead(1024, 5))
    weights = ours.network.state_dict()
    theirs.backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    heads = [(ours.head, theirs.classifier), (ours.aux_head, theirs.aux_classifier)]
    for own, other in heads:
        for place, part in ((0, own.body[0]), (1, own.body[1]), (4, own.last)):
            other[place].load_state_dict(part.state_dict())
        other[3].p = 0.0

    images = torch.randn(2, 3, 48, 64)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        expected = theirs(images)
        found = [fcn.enlarge(x, 8) for x in ours.cell_scores(images)]
        torch.testing.assert_close(found[0], expected["out"], atol=1e-4, rtol=1e-4)
        if training:
            torch.testing.assert_close(found[1], expected["aux"], atol=1e-4, rtol=1e-4)
        assert len(found) == 1 + training


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("head", ["fcn", "fcn-concat", "fcn-dilated"])
def test_a_cell_covers_the_same_pixels_in_images_of_any_size(stride, head):
    model = segmenter(3, stride=stride, head=head).eval()
    cells = model.cell_scores(torch.randn(1, 3, 33, 70))[0]
    assert cells.shape == (1, 3, -(-33 // stride), -(-70 // stride))
    # Of an image that ends with a cell nothing is added, and more at the right moves no cell.
    image = torch.randn(1, 3, 64, 64)
    padded = nn.functional.pad(image, (0, 1, 0, 0))
    assert torch.equal(fcn.pad_to_cells(image, stride), image)
    assert fcn.pad_to_cells(padded, stride)[..., :64].equal(image)
    assert fcn.pad_to_cells(padded, stride).shape[-1] == 64 + stride


def test_the_layers_of_the_heads_are_those_of_the_papers():
    """mmsegmentation's: 512 channels, and 256 on C4; MoCo's: 256 channels of dilation 6."""
    concat = fcn.build_head("fcn-concat", 2048, 19)
    found = [x for x in concat.modules() if isinstance(x, nn.Conv2d)]
    shapes = [(x.out_channels, x.in_channels, x.kernel_size[0], x.dilation[0]) for x in found]
    third = (512, 2560, 3, 1)
    assert shapes == [(512, 2048, 3, 1), (512, 512, 3, 1), third, (19, 512, 1, 1)]
    dilated = fcn.build_head("fcn-dilated", 2048, 19)
    found = [x for x in dilated.modules() if isinstance(x, nn.Conv2d)]
    shapes = [(x.out_channels, x.in_channels, x.kernel_size[0], x.dilation[0]) for x in found]
    assert shapes == [(256, 2048, 3, 6), (256, 256, 3, 6), (19, 256, 1, 1)]
    auxiliary = fcn.build_head("fcn", 1024, 19)
    assert auxiliary.last.in_channels == 256


def test_a_tenth_of_the_channels_is_dropped_the_same_ones_in_any_batch():
    head = fcn.build_head("fcn", 4096, 2).train()
    head.body = nn.Identity()
    head.last = nn.Identity()
    seeds = harness.image_seeds(0, 3, torch.arange(6))
    maps = torch.ones(6, 1024, 2, 2)
    dropped = head(maps, seeds)
    assert torch.equal(dropped[2:4], head(maps[2:4], seeds[2:4]))
    assert ((dropped == 0) | (dropped - 1 / 0.9).abs().lt(1e-6)).all()
    assert torch.equal(dropped[..., :1, :1].expand_as(dropped), dropped)  # whole channels
    assert ((dropped == 0).float().mean() - 0.1).abs() < 0.02
    assert torch.equal(head.eval()(maps, seeds), maps)


def slow_loss(cells, labels, stride):
    """Bilinear between the centers of the cells, pixel by pixel, in numpy."""
    losses = []
    for scores, own in zip(cells, labels, strict=True):
        for i, j in np.argwhere((own >= 0) & (own < len(scores))):
            weights = []
            for place, count in ((i, scores.shape[1]), (j, scores.shape[2])):
                at = min(max((place + 0.5) / stride - 0.5, 0), count - 1)
                low = int(at)
                weights.append(((low, 1 - at + low), (min(low + 1, count - 1), at - low)))
            pixel = sum(a * b * scores[:, y, x] for y, a in weights[0] for x, b in weights[1])
            losses.append(np.log(np.exp(pixel).sum()) - pixel[own[i, j]])
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("ignored", [255, -1])
def test_the_loss_is_the_mean_over_the_labeled_pixels(ignored):
    draws = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 3, 2, 3, generator=draws, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 13, 20), generator=draws)
    labels[0, :9] = ignored
    kind = torch.uint8 if ignored == 255 else torch.int16
    with harness.process_group("cpu"):
        loss = fcn.pixel_loss(cells, labels.to(kind), 8)
        nothing = fcn.pixel_loss(cells, torch.full_like(labels, ignored).to(kind), 8)
    expected = slow_loss(cells.detach().numpy(), labels.numpy(), 8)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert nothing == 0  # and its gradient too
    assert torch.autograd.grad(nothing, cells)[0].abs().sum() == 0


def test_a_step_is_the_same_on_any_number_of_processes():
    """Also where the processes have labels of different numbers of pixels, or none."""
    model = segmenter(3).double()
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 24, 24, generator=draws, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 24, 24), generator=draws).byte()
    labels[1] = 255
    labels[2, :20] = 255
    seeds = harness.image_seeds(0, 0, torch.arange(4))

    def one_step(part, group):
        (terms,), loss, gradients, _ = step_on_part(model, *part)
        terms = {name: dk.all_mean(x.detach(), group) for name, x in terms.items()}
        return dk.all_mean(loss, group), terms, gradients

    assert_world_size_invariant(one_step, (images, labels, seeds), (2, 4))


@pytest.mark.parametrize("norm", ["trained", "frozen"])
def test_frozen_norms_stay_and_all_else_learns(norm):
    model = segmenter(3, norm=norm).train()
    old = {k: x.clone() for k, x in model.network.named_buffers() if "running" in k}
    labels = torch.zeros(2, 32, 32, dtype=torch.uint8)
    with harness.process_group("cpu"):
        loss, _ = model(torch.randn(2, 3, 32, 32), labels, torch.arange(2))
    loss.backward()
    same = {torch.equal(x, old[k]) for k, x in model.network.named_buffers() if k in old}
    assert same == {norm == "frozen"}
    assert all(p.grad is not None for p in model.parameters())  # which DDP needs
    assert any("bn" in k for k, _ in model.network.named_parameters()) == (norm == "trained")


def test_the_learning_rate_is_that_of_the_papers():
    config = PRESETS["densesiam"]
    rates = [fcn.learning_rate(x, config) for x in (0, 20_000, 40_000)]
    # mmsegmentation: (0.01 - 1e-4) (1 - step / steps)^0.9 + 1e-4
    assert rates == pytest.approx([0.01, 0.0099 * 0.5**0.9 + 1e-4, 1e-4])
    config = replace(PRESETS["dupr"], batch=8)
    rates = [fcn.learning_rate(x, config) for x in (0, 62_999, 63_000, 81_000)]
    assert rates == pytest.approx([0.005, 0.005, 5e-4, 5e-5])


# ---- scores ----------------------------------------------------------------------------------
@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_cover_a_side_and_overlap(cells, window):
    starts = fcn.window_starts(cells, window)
    covered = {x for start in starts for x in range(start, min(start + window, cells))}
    assert covered == set(range(cells))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] + window == cells or starts == [0]
    assert all(b - a <= max(1, 2 * window // 3) for a, b in itertools.pairwise(starts))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 5000))
@settings(max_examples=30)
def test_windows_and_bands_of_any_size_give_the_same_scores(height, width, window, scores):
    """Where a cell depends on its own pixels alone."""
    config = replace(SMALL, window=window)

    def cell_scores(images):
        return [avg_pool2d(fcn.pad_to_cells(images, 8), 8)]

    model = SimpleNamespace(config=config, classes=3, cell_scores=cell_scores)
    images = torch.rand(1, 3, height, width, dtype=torch.float64)
    cells = fcn.window_scores(model, images)
    torch.testing.assert_close(cells, cell_scores(images)[0][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcn, "SCORES", scores)
        parts = list(fcn.bands(cells, 8))
    whole = interpolate(cells[None], scale_factor=8, mode="bilinear")[0]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    most = max(scores, 3 * cells.shape[-1] * 64)  # a row of cells is the least
    assert all(x.numel() <= most for x in parts)


def scored_set():
    """Images of several sizes, some labels of no class, and one image without a label map."""
    draws = torch.Generator().manual_seed(0)
    sizes = [(40, 24), (16, 16), (33, 50), (24, 40), (8, 9)]
    images = [torch.randint(0, 256, (3, *x), generator=draws).byte() for x in sizes]
    labels = [torch.randint(-1, 3, x, generator=draws) for x in sizes]
    found = image_set(images, labels, 3)
    found.records[3] = found.records[3]._replace(label_map=None)
    return found


def score(rank, group, weights, folder):
    world = harness.World(rank, group.size(), torch.device("cpu"))
    model = segmenter(3)
    model.load_state_dict(torch.load(weights, weights_only=True))
    for statistics in model.buffers():  # on a CPU each process has its own
        statistics += rank
    with harness.Run(folder, SMALL, world) as run:
        run.resume(model, torch.optim.SGD(model.parameters(), 0.1))
        fcn.evaluate(model, scored_set(), run, shards_of(world), 1)


def test_scores_are_those_of_all_labeled_pixels_on_any_number_of_processes(tmp_path):
    model = segmenter(3).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics of these images, so that all classes are found
    with torch.no_grad():
        model.cell_scores(torch.randn(4, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "weights")
    results = []
    for count in (1, 2):
        on_processes(count, score, tmp_path / "weights", tmp_path / f"{count}")
        results.append((tmp_path / f"{count}/results.json").read_text())
        rows = (tmp_path / f"{count}/metrics.jsonl").read_text()
        assert len(rows.splitlines()) == 1
    assert results[0] == results[1]

    model.eval()
    mean, std = [torch.tensor(x).view(3, 1, 1) for x in model.normalization]
    counts = np.zeros((3, 3))
    val = scored_set()
    for index in (0, 1, 2, 4):
        image = (val.read_image(index) / 255 - mean) / std
        labels = val.read_labels(index)
        with torch.no_grad():
            # The windows of 40 pixels cover all of an image but the third's, in two of them.
            cells = fcn.window_scores(model, image[None])
        large = interpolate(cells[None], scale_factor=8, mode="bilinear")[0].argmax(0)
        for y, x in np.argwhere(labels.numpy() < 3):
            counts[int(labels[y, x]), int(large[y, x])] += 1
    assert counts.sum(0).min() > 200  # of each class many pixels are found
    hits = counts.diagonal()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    found = json.loads(results[0])
    assert found["images"] == 4
    assert found["miou"]["value"] == pytest.approx(iou.mean(), rel=1e-6)
    assert found["miou"]["low"] <= found["miou"]["value"] <= found["miou"]["high"]
    assert list(found["iou"].values()) == pytest.approx(iou.tolist(), rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(hits.sum() / counts.sum(), rel=1e-6)


def test_scores_that_are_not_finite_are_no_scores(tmp_path):
    model = segmenter(3)
    model.head.last.bias.data[1] = torch.nan
    with harness.process_group("cpu") as world, harness.Run(tmp_path, SMALL, world) as run:
        run.resume(model, torch.optim.SGD(model.parameters(), 0.1))
        with pytest.raises(harness.NonFiniteError, match="at step 7: the scores of 4 images"):
            fcn.evaluate(model, scored_set(), run, shards_of(world), 7)
    assert not (tmp_path / "results.json").exists()


# ---- runs ------------------------------------------------------------------------------------
def rows(folder, name="step"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def test_a_halted_run_ends_as_a_whole_one(tmp_path, monkeypatch, capsys):
    fcn.train(replace(SMALL, run=tmp_path / "whole"))
    asked = iter([False, False, True])  # after the third step, which has no checkpoint of its own
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked))
        fcn.train(replace(SMALL, run=tmp_path / "halted"))
    assert not (tmp_path / "halted/segmenter.pt").exists()
    assert len(rows(tmp_path / "halted", "loss")) == 3
    fcn.train(replace(SMALL, run=tmp_path / "halted"))
    whole = rows(tmp_path / "whole")
    assert rows(tmp_path / "halted") == whole
    assert [row["step"] for row in rows(tmp_path / "whole", "miou")] == [2, 4]
    terms = {"step", "loss", "main", "aux", "grad_norm", "lr", "unreadable"}
    assert {frozenset(row) for row in rows(tmp_path / "whole", "loss")} == {frozenset(terms)}
    first, second = (
        torch.load(tmp_path / x / "segmenter.pt", weights_only=True) for x in ("whole", "halted")
    )
    assert all(torch.equal(x, second[k]) for k, x in first.items())
    results = [(tmp_path / x / "results.json").read_text() for x in ("whole", "halted")]
    assert results[0] == results[1]
    assert capsys.readouterr().out.count("mIoU") == 4


def cityscapes(folder):
    """Four images to train on and two to score, with ids of every kind, in Cityscapes' layout."""
    draws = np.random.default_rng(0)
    ids = np.array([0, 1, 4, 7, 8, 9, 11, 24, 26, 29, 33])  # 9 is parking, 29 a caravan: void
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            name = f"{split}/bonn/bonn_{number}"
            image = folder / f"leftImg8bit/{name}_leftImg8bit.png"
            labels = folder / f"gtFine/{name}_gtFine_labelIds.png"
            for path in (image, labels):
                path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 255, (30, 60, 3), np.uint8)
            Image.fromarray(pixels).save(image)
            chosen = ids[draws.integers(0, len(ids), (6, 12))].repeat(5, 0).repeat(5, 1)
            Image.fromarray(chosen.astype(np.uint8)).save(labels)
    return folder


def test_cityscapes_is_trained_and_scored_without_void(tmp_path, monkeypatch):
    """The settings of DUPR's preset, small; an image that cannot be read is passed over."""
    data = cityscapes(tmp_path / "data")
    (data / "leftImg8bit/val/bonn/bonn_1_leftImg8bit.png").write_text("broken")
    (data / "leftImg8bit/train/bonn/bonn_2_leftImg8bit.png").write_text("broken")
    config = replace(
        SMALL, data=data, head="fcn-dilated", stride=16, aux=0.0, milestones=(1,), steps=2,
        precision="bf16", max_share=1.0, run=tmp_path / "run",
    )  # fmt: skip
    dataset, val = fcn.load(config, GRAY)
    assert len(dataset.classes) == 19
    assert dataset[0, 2][3][0].startswith(f"{data / 'leftImg8bit/train/bonn/bonn_2_left'}")
    labels = val.read_labels(0)
    assert (dataset.classes[0], dataset.classes[18]) == ("road", "bicycle")
    assert set(labels.unique().tolist()) <= {0, 1, 2, 11, 13, 18, 255}
    # The next image comes with its own labels.
    square = Square(0, 0, 32)
    after = dataset.crop_labels(dataset.images.read_labels(3), square)
    dataset.choose_square = lambda labels, _: (square, dataset.crop_labels(labels, square))
    found = dataset[0, 2][1]
    assert torch.equal(found, after) or torch.equal(found, after.flip(-1))

    monkeypatch.setattr(fcn, "draw", DRAW)
    fcn.train(config)
    assert (tmp_path / "run/pictures/step-000002.png").is_file()
    scored = rows(tmp_path / "run", "miou")
    assert [row["step"] for row in scored] == [2]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["images"] == 1
    assert set(results["iou"]) <= set(dataset.classes)
    unreadable = (tmp_path / "run/unreadable.txt").read_text()
    assert "val/bonn/bonn_1" in unreadable
    assert set(rows(tmp_path / "run", "loss")[0]) >= {"main", "lr"}
    assert not any("aux" in row for row in rows(tmp_path / "run"))


def test_a_set_to_train_on_without_a_labeled_pixel_ends_the_run(tmp_path):
    data = cityscapes(tmp_path / "data")
    for path in (data / "gtFine/train/bonn").iterdir():
        Image.fromarray(np.zeros((30, 60), np.uint8)).save(path)  # unlabeled, everywhere
    config = replace(SMALL, data=data, max_share=1.0, steps=3, run=tmp_path / "run")
    with pytest.raises(harness.UserError, match="all 4 images had no labeled pixel in a whole"):
        fcn.train(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder": "torchvision:nothing"}, "--encoder is torchvision:nothing: give a ResNet"),
        ({"encoder": "random:nothing"}, "There is no model nothing in timm"),
        ({"train_split": "nowhere"}, "'nowhere': choose one of"),
        ({"batch": 64}, "--batch is 64: give at most 8"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(harness.UserError, match=sentence) as error:
        fcn.train(replace(SMALL, run=tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_splits_without_label_maps_or_with_other_classes_are_refused(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "0.png")
    config = replace(SMALL, data=tmp_path, layout="class-folders")
    with pytest.raises(harness.UserError, match="The split train has no label map"):
        fcn.load(config, GRAY)

    blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
    sets = iter([image_set([blank], [blank[0].long()], x) for x in (2, 3)])
    monkeypatch.setattr(fcn, "open_images", lambda *_: next(sets))
    with pytest.raises(harness.UserError, match="have other classes"):
        fcn.load(SMALL, GRAY)


def test_it_learns():
    """The loss falls on a few scenes; that the mean IoU rises is the demo's to show."""
    dataset, _ = fcn.load(replace(SMALL, distort=False), GRAY)
    model = segmenter(len(dataset.classes)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    (images,), labels, indices, _ = harness.make_batch(
        dataset, range(4), normalize=model.normalization
    )
    losses = []
    with harness.process_group("cpu"):
        for _ in range(12):
            loss, _ = model(images, labels, harness.image_seeds(0, 0, indices))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
