"""Unsupervised segmentation: losses against slow ones, replayed geometry, scores, whole runs."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import densesiam_segment
import detect
import export
import harness
import pytest
import torch
import torch._dynamo  # before any fork: importing it in the children takes long
import torchvision
from densesiam_segment import (
    PRESETS,
    Segmenter,
    TwoViews,
    open_split,
    open_training,
    replay,
    segment_loss,
    train,
)
from downstream import encoders, health, image_sets, segmentation
from PIL import Image
from processes import on_processes
from safetensors.torch import load_file
from test_recipes import launch, rows
from torch.nn.functional import avg_pool2d, normalize
import densekit as dk
from densekit.scenes import SCENE_CLASSES, sample_scenes

RECIPE = Path(densesiam_segment.__file__)
# Arguments that make no sense, and how the sentence that answers them begins.
WRONG = [
    (["--preset", "paper"], "--data is missing"),
    (["--data", "nowhere"], "--data is nowhere"),
    (["--mapping", "nowhere.json"], "--mapping is nowhere.json"),
    (["--train-list", "nowhere.txt"], "--train-list is nowhere.txt"),
    (["--val-list", "nowhere.txt"], "--val-list is nowhere.txt"),
    (["--freeze", "-1"], "--freeze is -1"),
    (["--freeze", "9"], "--freeze is 9"),
    (["--weights", " "], "--weights is empty"),
    (["--weights", "nowhere"], "nowhere does not exist"),
    (["--weights", "timm:no_such_net", "--freeze", "1"], "--weights is timm:no_such_net"),
    (["--weights", "random:tiny-vit"], "--weights is random:tiny-vit: give a network of timm"),
    (["--arch", "resnet5"], "--arch is resnet5: give a network of timm"),
    (["--arch", "levit_128s"], "--arch is levit_128s"),  # three levels alone
    (["--arch", "vit_small_patch16_224"], "--arch is vit_small_patch16_224: give a convolutional"),
    (["--aux", "1"], "--aux is 1"),
    (["--aux", "-2"], "--aux is -2"),
    (["--segment", "-1"], "--segment is -1"),
    (["--segment", "nan"], "--segment is nan"),
    (["--region", "-0.1"], "--region is -0.1"),
    (["--region", "nan"], "--region is nan"),
    (["--sim", "-1"], "--sim is -1"),
    (["--sim", "nan"], "--sim is nan"),
    (["--region-start", "1.5"], "--region-start is 1.5"),
    (["--region-start", "nan"], "--region-start is nan"),
    (["--image", "1"], "--image is 1: give 2 pixels or more"),
    (["--blur", "0.1", "1e30"], "--blur is 0.1 1e+30: give two standard deviations in pixels"),
    (["--size", "-64"], "--size is -64"),
    (["--size", "100"], "--size is 100: give a multiple of 8, the side of a cell of tiny"),
    (["--arch", "resnet18", "--size", "104"], "--size is 104: give a multiple of 32"),
    (["--hue", "0.6"], "--hue is 0.6"),
    (["--hue", "nan"], "--hue is nan"),
    (["--blur", "1.0", "0.5"], "--blur is 1.0 0.5"),
    (["--blur", "-1.0", "0.5"], "--blur is -1.0 0.5"),
    (["--blur", "0.1", "inf"], "--blur is 0.1 inf"),
    (["--batch", "1"], "--batch is 1"),
    (["--epochs", "0"], "--epochs is 0"),
    (["--lr", "-1"], "--lr is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--weight-decay", "-1"], "--weight-decay is -1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
]
MAPPING = RECIPE.with_name("coco_stuff_27.json")
SMALL = replace(
    PRESETS["demo"], image=32, size=32, aux=8, batch=8, epochs=5, workers=0, device="cpu",
    log_every=1, save_every=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labeled images in the layout of CamVid: 16 to train on, 6 to score, of two sizes."""
    folder, splits = tmp_path_factory.mktemp("set"), {"train": 16, "val": 6}
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    names = {}
    for number, (split, count) in enumerate(splits.items()):
        for size in ((32, 40), (40, 32)):
            draws = torch.Generator().manual_seed(number)
            drawn = sample_scenes(count // 2, size, generator=draws)
            pixels = (drawn.images * 255).byte().movedim(1, -1).numpy()
            for index, (image, labels) in enumerate(zip(pixels, drawn.labels, strict=True)):
                name = f"{split}-{size[0]}-{index}"
                Image.fromarray(image).save(folder / f"images/{name}.png")
                labels[:3] = 255  # ignored
                Image.fromarray(labels.byte().numpy()).save(folder / f"labels/{name}.png")
                names.setdefault(split, []).append(name)
    (folder / "splits.json").write_text(json.dumps(names))
    (folder / "classes.json").write_text(json.dumps({"labels": [*SCENE_CLASSES], "ignore": 255}))
    return folder


def small_on(folder, **changes):
    return replace(SMALL, data=folder, **changes)


def use(items, monkeypatch):
    """Train on and score these labeled images."""
    val = torch.utils.data.Subset(items, range(len(items)))
    monkeypatch.setattr(densesiam_segment, "open_split", lambda *_: val)
    source = [(sample.image, ()) for sample in items]
    monkeypatch.setattr(densesiam_segment, "open_training", lambda _: source)


# ---- the loss --------------------------------------------------------------------------------


def slow_replay(maps, box, flip):
    """Bilinear, cell by cell; beyond the map its outermost cells are repeated."""
    n, (x1, y1, x2, y2) = maps.shape[-1], (box * maps.shape[-1]).tolist()

    def line(start, stop):
        for cell in range(n):
            place = start + (cell + 0.5) * (stop - start) / n - 0.5  # in indices of cells
            low = math.floor(place)
            yield [min(max(i, 0), n - 1) for i in (low, low + 1)], place - low

    out = torch.zeros_like(maps)
    for i, ((top, bottom), v) in enumerate(line(y1, y2)):
        for j, ((left, right), u) in enumerate(line(x1, x2)):
            above = (1 - u) * maps[:, top, left] + u * maps[:, top, right]
            below = (1 - u) * maps[:, bottom, left] + u * maps[:, bottom, right]
            out[:, i, n - 1 - j if flip else j] = (1 - v) * above + v * below
    return out


def slow_segment(z, weighting):
    """L_seg, pixel by pixel."""
    winners = [int(x.argmax()) for x in z]
    counts, total = Counter(winners), 0
    for x, k in zip(z, winners, strict=True):
        weight = {
            "frequency": counts[k] / len(z),
            "balanced": len(z) / (len(counts) * counts[k]),
            "plain": 1,
        }[weighting]
        total = total - weight * (x[k] - x.exp().sum().log()) / len(z)
    return total


def slow_loss(model, images, view, with_region):
    """Eq 8 with the weights of Sec 4, in plain torch."""
    config, maps = model.config, []
    for x in images:
        c2, c3, c4, c5 = (
            lateral(level)
            for lateral, level in zip(model.laterals, model.encoder.levels(x), strict=True)
        )

        def up(x, like):
            return torch.nn.functional.interpolate(x, like.shape[2:], mode="bilinear")

        p4 = c4 + up(c5, c4)
        p3 = c3 + up(p4, c3)
        maps.append(c2 + up(p3, c2))
    views = zip(maps[1], view.box, view.flip, strict=True)
    maps[1] = torch.stack([slow_replay(*x) for x in views])

    def pixels(x):
        return x.movedim(1, -1).flatten(0, 2)

    terms = {}
    for name in ("dense", "aux") if config.aux else ("dense",):
        z = [model.projectors[name](f) for f in maps]
        p = [pixels(model.predictors[name](x)) for x in z]
        z = [pixels(x) for x in z]
        forth = -(z[1].detach().softmax(1) * p[0].log_softmax(1)).sum(1).mean()
        back = -(z[0].detach().softmax(1) * p[1].log_softmax(1)).sum(1).mean()
        terms[name] = (forth + back) / 2
        if name == "dense":
            if config.segment:
                terms["segment"] = sum(slow_segment(x, config.weighting) for x in z) / 2
            masks = [
                x.softmax(1).view(len(f), -1, x.shape[1]) for x, f in zip(z, maps, strict=True)
            ]
    loss = terms["dense"]
    if config.aux:
        n, m = math.log(5), math.log(config.aux)  # classes of the model below, and of the other
        loss = m / (n + m) * terms["dense"] + n / (n + m) * terms["aux"]
    if config.segment:
        loss = loss + config.segment * terms["segment"]
    if with_region:
        v = []
        for f, mask in zip(maps, masks, strict=True):
            e = (mask[..., None] * f.flatten(2).mT[:, :, None]).sum(1)  # Eq 4: a sum
            v.append(model.projectors["region"](e.reshape(-1, 128)))
        u = [normalize(model.predictors["region"](x)) for x in v]
        v = [normalize(x) for x in v]
        losses = []
        for query, key in ((u[0], v[1]), (u[1], v[0])):
            for image in range(len(images[0])):
                mine = slice(5 * image, 5 * image + 5)
                logits = query[mine] @ key[mine].T / 0.1
                losses.append((logits.exp().sum(1).log() - logits.diagonal()).mean())
        terms["region"] = sum(losses) / len(losses)
        loss = loss + config.region * terms["region"]
    if config.sim:
        pooled = [model.encoder(x).flatten(2).mean(2) for x in images]
        z = [model.projectors["sim"](x) for x in pooled]
        p = [normalize(model.predictors["sim"](x)) for x in z]
        z = [normalize(x).detach() for x in z]
        terms["sim"] = -((p[0] * z[1]).sum(1).mean() + (p[1] * z[0]).sum(1).mean()) / 2
        loss = loss + config.sim * terms["sim"]
    return loss, terms


def batch():
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(2, 3, 3, 32, 32, generator=generator, dtype=torch.float64))
    box = [[0.0, 0, 1, 1], [0.0, 0.38, 0.62, 1.0], [0.45, 0.2, 0.95, 0.7]]
    flip = torch.tensor([True, False, True])
    return images, dk.View(torch.tensor(box, dtype=torch.float64), flip)


TABLE_5 = [  # PixSim, the auxiliary head, L_seg and RegionSim are added one after another
    {"aux": 0, "segment": 0.0, "region": 0.0},
    {"segment": 0.0, "region": 0.0},
    {"region": 0.0},
    {},
]


@pytest.mark.parametrize(
    ("changes", "with_region"),
    [
        *((row, not row) for row in TABLE_5),
        ({}, False),
        ({"weighting": "balanced", "segment": 0.3}, False),
        ({"weighting": "plain", "aux": 0, "region": 2.0}, True),
        ({"sim": 0.7}, True),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_a_slow_one(changes, with_region):
    torch.manual_seed(0)
    model = Segmenter(replace(SMALL, **changes), 5).double()
    loss, terms = model(*batch(), with_region)
    slow, slow_terms = slow_loss(model, *batch(), with_region)
    torch.testing.assert_close(terms, slow_terms)
    torch.testing.assert_close(loss, slow)
    # Without a head there are no weights that nothing trains, which DDP would wait for.
    parameters = [p for name, p in model.named_parameters() if with_region or "region" not in name]
    found, expected = (torch.autograd.grad(x, parameters) for x in (loss, slow))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("copies", [1, 7])
def test_balanced_lets_every_class_weigh_the_same_however_frequent(copies):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    logits[:, 3] = -9.0  # never wins, and does not count
    first = logits[logits.argmax(1) == 0]
    more = torch.cat([logits, *[first] * copies])
    torch.testing.assert_close(segment_loss(more, "balanced"), segment_loss(logits, "balanced"))
    each = [segment_loss(logits[logits.argmax(1) == k], "plain") for k in range(3)]
    torch.testing.assert_close(segment_loss(logits, "balanced"), sum(each) / 3)
    for weighting in ("plain", "frequency"):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(
                segment_loss(more, weighting), segment_loss(logits, weighting)
            )


def test_the_two_heads_have_the_weights_of_the_paper():
    share = Segmenter(replace(SMALL, aux=128), 27).share
    assert (round(share, 4), round(1 - share, 4)) == (0.5955, 0.4045)


@pytest.mark.parametrize("arch", ["mobilenetv3_small_050", "convnext_atto"])
def test_any_network_with_four_levels_trains_all_that_has_a_gradient(arch):
    """A weight without a gradient would let DistributedDataParallel wait for ever."""
    config = replace(SMALL, arch=arch, freeze=1, region=0.0)
    model = Segmenter(config, 5)
    encoders.freeze(model.encoder.network, config.freeze)
    model.double()
    loss, _ = model(*batch(), with_region=False)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not all(x.requires_grad for x in model.encoder.parameters())  # those of the stem


@pytest.mark.parametrize("width", [320, 427, 481, 33, 5])
@pytest.mark.parametrize("coarse", [4, 32])
def test_pixels_of_images_of_any_width_have_the_logits_of_their_place(width, coarse):
    """The cells of a level, enlarged as in the pyramid, say at which column they are."""
    columns = (torch.arange(width) + 0.5).expand(1, 3, 40, width) / 1000
    encoder = SimpleNamespace(stride=32, mean=(0.25, 0.5, 0.75))
    threshold = 0.4 * width

    def logits_of(padded):
        assert all(side % 32 == 0 for side in padded.shape[-2:])
        outside = padded[..., :40, width:].mean((0, 2, 3))
        if padded.shape[-1] > width:
            torch.testing.assert_close(outside, torch.tensor(encoder.mean))
        # Beyond the image the columns go on, as features of what is seen there would.
        padded = ((torch.arange(padded.shape[-1]) + 0.5) / 1000).expand(padded.shape)
        cells = torch.nn.functional.avg_pool2d(padded[:, :1], coarse)
        size = [side // 4 for side in padded.shape[-2:]]
        x = torch.nn.functional.interpolate(cells, size, mode="bilinear")
        return torch.cat([x, torch.full_like(x, threshold / 1000)], 1)

    found = segmentation.segment(logits_of, encoder, columns, torch.Size([80, 3 * width]))
    assert found.shape == (80, 3 * width)
    edge = (found[0] == 1).sum().item() / 3  # in pixels of the image
    if threshold > coarse / 2:  # nearer to the border the coarse cells say nothing
        assert edge == pytest.approx(threshold, abs=0.5)  # a third of a pixel, and rounding


def test_the_pyramid_has_stride_4_and_128_channels():
    model = Segmenter(replace(SMALL, arch="resnet18"), 27)
    assert model.features(torch.zeros(2, 3, 64, 96)).shape == (2, 128, 16, 24)
    assert [tuple(x.weight.shape) for x in model.laterals] == [
        (128, d, 1, 1) for d in (64, 128, 256, 512)
    ]
    assert all(p.requires_grad for p in model.parameters())
    assert model.encoder.network.bn1.training


def layers(head):
    """Each layer of a head as (kind, inputs, outputs or channels, with parameters of its own)."""
    rows = []
    for layer in head:
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.kernel_size == (1, 1)
            rows.append(("conv", layer.in_channels, layer.out_channels, layer.bias is not None))
        elif isinstance(layer, torch.nn.Linear):
            rows.append(("linear", layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, torch.nn.ReLU):
            rows.append("relu")
        else:
            rows.append(("norm", layer.num_features, layer.affine))
    return rows


@pytest.mark.parametrize(
    ("head", "kind", "outputs", "bias"),
    [("dense", "conv", 12, True), ("aux", "conv", 8, True), ("region", "linear", 128, False)],
)
def test_projectors_have_three_layers_and_predictors_two(head, kind, outputs, bias):
    model = Segmenter(SMALL, 12)
    hidden = [(kind, 128, 128, False), ("norm", 128, True), "relu"]
    last = [(kind, 128, outputs, bias), ("norm", outputs, False)]
    assert layers(model.projectors[head]) == [*hidden, *hidden, *last]
    first = [(kind, outputs, 128, False), ("norm", 128, True), "relu"]
    assert layers(model.predictors[head]) == [*first, (kind, 128, outputs, True)]
    assert "sim" not in model.projectors  # off by default


def test_a_term_with_weight_0_has_no_head_and_no_row_in_the_log(tmp_path, folder):
    model = Segmenter(replace(SMALL, **TABLE_5[0]), 12)
    assert [*model.projectors] == [*model.predictors] == ["dense"]
    train(small_on(folder, epochs=1, run=tmp_path, **TABLE_5[0]))
    for row in rows(tmp_path):
        terms = row.keys() - set(health.SCORES)
        assert terms == {"step", "loss", "dense", "grad_norm", "lr", "unreadable"}
        assert row["loss"] == row["dense"]


# ---- the views -------------------------------------------------------------------------------


class Coordinates:
    """An image whose red is x and whose green is y, at the center of a pixel."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        line = torch.arange(64).mul(4).to(torch.uint8)
        image = torch.stack(
            [line.expand(64, 64), line[:, None].expand(64, 64), 0 * line.expand(64, 64)]
        )
        return image, ()


def plain_views(source, **changes):
    dataset = TwoViews(source, replace(SMALL, image=64, size=64, **changes))
    dataset.photometric = torch.nn.Identity()
    return dataset


def test_features_of_coordinates_show_the_same_image_points_in_both_views(monkeypatch):
    def crop(image, view, size):  # not rounded to bytes
        return dk.crop_views(image.float(), view, size)

    monkeypatch.setattr(densesiam_segment, "crop_bytes", crop)
    dataset, flips = plain_views(Coordinates()), set()
    for epoch in range(6):
        images, view, *_ = harness.make_batch(
            dataset, range(4), epoch=epoch, normalize=densesiam_segment.UNIT_RANGE
        )
        near, whole = images
        replayed = replay(avg_pool2d(whole, 4), view)
        pooled = avg_pool2d(near, 4)
        center = slice(2, -2)  # nearer the border a crop does not see what is beside it
        inside = (..., center, center)
        torch.testing.assert_close(replayed[inside], pooled[inside], atol=1e-4, rtol=0)
        assert (replayed - pooled).abs().max() < 0.5 * 4 * 4 / 255  # half a cell of 4 pixels
        for maps, box, flip in zip(replayed, view.box, view.flip, strict=True):
            x = box[0] + (torch.arange(16) + 0.5) / 16 * (box[2] - box[0])
            x = x.flip(0) if flip else x
            y = box[1] + (torch.arange(16) + 0.5) / 16 * (box[3] - box[1])
            red, green = maps[0, 8] * 255 / 4 / 64, maps[1, :, 8] * 255 / 4 / 64
            torch.testing.assert_close(red[center], x[center] - 0.5 / 64, atol=1e-5, rtol=0)
            torch.testing.assert_close(green[center], y[center] - 0.5 / 64, atol=1e-5, rtol=0)
            flips.add(bool(flip))
    assert flips == {True, False}


def test_a_whole_view_gives_the_map_itself_and_a_flip_its_mirror_image():
    maps = torch.rand(2, 3, 8, 8)
    whole = dk.full_view((1, 1), (2,))
    torch.testing.assert_close(replay(maps, whole), maps)
    mirrored = dk.View(whole.box, ~whole.flip)
    torch.testing.assert_close(replay(maps, mirrored), maps.flip(-1))


def test_geometry_depends_on_seed_epoch_and_image_alone():
    dataset = plain_views(Coordinates())

    def view(*indices, epoch=0, data=dataset):
        found = harness.make_batch(data, indices, epoch=epoch)[1]
        return torch.cat([found.box, found.flip[:, None]], 1)

    torch.testing.assert_close(view(0, 1, 2, 3)[[2, 0]], view(2, 0))
    assert not torch.equal(view(1), view(2))
    assert not torch.equal(view(1), view(1, epoch=1))
    assert not torch.equal(view(1), view(1, data=plain_views(Coordinates(), seed=1)))
    frozen = plain_views(Coordinates(), frozen_views=True)
    assert torch.equal(view(1, data=frozen), view(1, epoch=3, data=frozen))
    assert torch.equal(view(1), view(1, data=frozen))


def test_crops_are_squares_of_half_to_all_of_the_side_anywhere_and_half_are_flipped():
    dataset = plain_views(Coordinates())
    views = [harness.make_batch(dataset, range(4), epoch=epoch)[1] for epoch in range(100)]
    box, flip = torch.cat([x.box for x in views]), torch.cat([x.flip for x in views])
    width, height = (box[:, 2:] - box[:, :2]).unbind(1)
    torch.testing.assert_close(width, height)
    assert box.min() >= 0
    assert box.max() <= 1 + 1e-6
    assert width.min() >= 0.5 - 1e-6
    assert (width.mean() - 0.75).abs() < 0.03  # U(0.5, 1): 0.75 +- 0.007
    place = box[:, :2] / (1 - width)[:, None]
    assert ((place.mean(0) - 0.5).abs() < 0.06).all()  # U(0, 1): 0.5 +- 0.014
    assert (flip.float().mean() - 0.5).abs() < 0.1


def test_photometric_changes_differ_between_the_views_but_not_between_runs(folder):
    source = open_training(small_on(folder))
    dataset = TwoViews(source, replace(SMALL, image=32, size=32))
    state = torch.get_rng_state()
    indices = [3, 9, 12]  # of both sizes
    (near, whole), *_ = harness.make_batch(dataset, indices)
    again, *_ = harness.make_batch(dataset, indices)
    assert torch.equal(near, again[0])
    assert torch.equal(whole, again[1])
    assert torch.equal(state, torch.get_rng_state())
    assert near.shape == whole.shape == (3, 3, 32, 32)
    assert not torch.equal(harness.make_batch(dataset, indices, epoch=1)[0][1], whole)
    plain = TwoViews(source, dataset.config)
    plain.photometric = torch.nn.Identity()
    square = source[12][0][:, 4:36]  # the center of 40 x 32
    assert torch.equal(plain[0, 12][0][1], square)


def test_each_color_change_is_drawn_on_its_own(folder):
    dataset = TwoViews(open_training(small_on(folder)), replace(PRESETS["paper"], data=folder))
    changes = [x for x in dataset.photometric.transforms if hasattr(x, "p")]
    assert [x.p for x in changes] == [0.8, 0.8, 0.8, 0.8, 0.2, 0.5]  # then gray, blur
    names = ("brightness", "contrast", "saturation", "hue")
    jitters = [change.transforms[0] for change in changes[:4]]
    found = [{x: getattr(y, x) for x in names if getattr(y, x)} for y in jitters]
    strong = (0.7, 1.3)
    expected = {"brightness": strong, "contrast": strong, "saturation": strong, "hue": (-0.1, 0.1)}
    assert found == [{name: value} for name, value in expected.items()]


# ---- data and scores -------------------------------------------------------------------------


def test_a_list_chooses_its_images_with_or_without_extension(folder, tmp_path):
    names = tmp_path / "list.txt"
    names.write_text("train-40-2.jpg\n\n  train-32-1\ntrain-40-2\n")  # one counts once
    chosen = open_split(small_on(folder), "train", names)
    assert [sample.name for sample in chosen] == ["train-40-2.png", "train-32-1.png"]
    assert len(open_split(small_on(folder), "train", None)) == 16


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("train-32-0\nval-32-0\n", "val-32-0"), ("\n", "empty"), (None, "cannot be used")],
)
def test_a_list_that_does_not_fit_is_one_sentence(folder, tmp_path, text, sentence):
    names = tmp_path / "list.txt"
    if text is not None:
        names.write_text(text)
    with pytest.raises(harness.UserError, match=sentence) as error:
        open_split(small_on(folder), "train", names)
    assert str(names) in str(error.value)


class Flat(list):
    """Images of flat patches: class k has color k, in each image at other places."""

    classes = ("a", "b", "c")
    things = 0
    ignored = 255

    def __init__(self, permutation=(0, 1, 2)):
        colors = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250]], dtype=torch.uint8)
        for index in range(7):
            found = (torch.arange(8)[:, None] + torch.arange(16) + index) // 4 % 3
            labels = torch.tensor(permutation)[found]
            labels[0] = 255
            image = colors[found].movedim(-1, 0)
            self.append(image_sets.Labeled(image, labels, None, None, str(index)))


def test_pseudo_classes_are_named_whatever_their_order():
    val, run = Flat((2, 0, 1)), SimpleNamespace(world=harness.World(0, 1, torch.device("cpu")))
    with harness.process_group("cpu"):
        confusion, names, shown = segmentation.match(
            val, lambda image, size: image.argmax(0), 3, run
        )
    assert names.tolist() == [2, 0, 1]
    assert confusion.sum() == 7 * 7 * 16  # the ignored row does not count
    assert dk.mean_iou(dk.merge_clusters(confusion, names)) == 1
    assert len(shown) == 6


def test_k_means_on_colors_is_perfect_where_color_is_the_class(tmp_path, monkeypatch):
    use(Flat(), monkeypatch)
    train(replace(SMALL, batch=6, epochs=1, run=tmp_path))
    scored = rows(tmp_path, "miou")
    assert scored[0]["color_miou"] == 1
    assert "color_miou" not in scored[-1]
    assert [row["step"] for row in scored] == [0, 1]


def test_an_image_without_labels_cannot_be_scored(tmp_path, monkeypatch):
    val = Flat()
    val[2] = val[2]._replace(labels=None)
    use(val, monkeypatch)
    with pytest.raises(harness.UserError, match="image 2 has no label"):
        train(replace(SMALL, batch=6, epochs=1, run=tmp_path))


def test_the_classes_of_coco_stuff_are_its_27_supercategories():
    content = json.loads(MAPPING.read_text())
    names, table = content["names"], {int(k): v for k, v in content["map"].items()}
    assert sorted(table) == list(range(182))
    assert len(names) == len(set(names)) == 27
    assert set(table.values()) == set(range(27))
    assert {k for k in table if table[k] < content["things"]} == set(range(91))  # the things
    # One of each supercategory, by the id in the label map: COCO's id less 1.
    known = {
        "person": 0, "vehicle": 2, "outdoor": 9, "animal": 15, "accessory": 26, "sports": 36,
        "kitchen": 43, "food": 52, "furniture": 61, "electronic": 71, "appliance": 81, "indoor": 83,
        "textile": 92, "plant": 168, "building": 127, "furniture-stuff": 97, "structural": 112,
        "raw-material": 131, "floor": 117, "ceiling": 101, "sky": 156, "ground": 148, "water": 154,
        "food-stuff": 121, "solid": 149, "wall": 170, "window": 180,
    }  # fmt: skip
    assert set(known) == set(names)
    assert {name: names[table[k]] for name, k in known.items()} == {name: name for name in known}
    sizes = Counter(names[k] for k in table.values())
    assert sizes["wall"] == 7
    assert sizes["textile"] == sizes["furniture-stuff"] == sizes["ground"] == 11
    assert sizes["plant"] == 9


# ---- runs ------------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_resumes_and_region_begins_late(tmp_path, folder, monkeypatch):
    config = small_on(folder)  # 2 batches an epoch, 10 steps
    train(replace(config, run=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(tmp_path / "whole")] == list(range(1, 11))
    assert [row["step"] for row in rows(tmp_path / "whole", "region")] == [9, 10]
    assert [row["step"] for row in rows(tmp_path / "whole", "miou")] == [0, 5, 10]
    pictures = sorted((tmp_path / "whole" / "pictures").iterdir())
    assert [path.stem for path in pictures] == ["step-000000", "step-000005", "step-000010"]
    with Image.open(pictures[-1]) as picture:
        assert picture.height > 1.5 * picture.width  # six rows of three panels, and a legend

    asked = iter([False, False, True])  # stopped after the third step
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked))
        train(replace(config, run=tmp_path / "halted"))
    assert len(rows(tmp_path / "halted")) == 3
    assert json.loads((tmp_path / "halted" / "encoder.json").read_text())["step"] == 3
    train(replace(config, run=tmp_path / "halted", workers=1))
    assert (tmp_path / "halted" / "metrics.jsonl").read_text() == whole
    for name in ("encoder", "segmenter"):
        left, right = (
            load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "halted")
        )
        torch.testing.assert_close(left, right, rtol=0, atol=0)
        (tmp_path / "halted" / f"{name}.safetensors").unlink()
    train(replace(config, run=tmp_path / "halted"))  # finished: it writes the files again
    assert (tmp_path / "halted" / "metrics.jsonl").read_text() == whole

    side_car = json.loads((tmp_path / "whole" / "segmenter.json").read_text())
    assert (side_car["architecture"], side_car["step"]) == ("tiny", 10)
    assert side_car["classes"] == [*SCENE_CLASSES]
    model = Segmenter(config, 12)
    model.load_state_dict(load_file(tmp_path / "halted" / "segmenter.safetensors"))
    assert sorted(model.names.tolist()) == list(range(12))
    # The encoder is one that the other recipes can load, and that this one can start from.
    encoder = encoders.load_encoder(str(tmp_path / "whole"))
    other = Segmenter(replace(config, weights=str(tmp_path / "whole")), 12)
    for name, x in encoder.network.state_dict().items():
        torch.testing.assert_close(other.encoder.network.state_dict()[name], x)


def without_download(monkeypatch):
    """torchvision's networks with weights that were not downloaded."""
    get_model = torchvision.models.get_model

    def get(name, weights=None):
        torch.manual_seed(5)
        return get_model(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", get)


def test_a_run_from_torchvision_saves_no_classifier_and_others_read_it(
    tmp_path, folder, monkeypatch
):
    without_download(monkeypatch)
    config = small_on(folder, weights="torchvision:resnet18", run=tmp_path, epochs=1, region=0.0)
    start = encoders.load_encoder(config.weights)
    train(config)
    saved = load_file(tmp_path / "encoder.safetensors")
    assert saved.keys() == {x for x in start.network.state_dict() if not x.startswith("fc.")}
    assert not [x for x in load_file(tmp_path / "segmenter.safetensors") if "fc." in x]

    # It goes on from those weights: two steps at a small rate do not take it far.
    first = start.network.state_dict()["layer1.0.conv1.weight"]
    assert 0 < (saved["layer1.0.conv1.weight"] - first).abs().max() < 0.1
    encoder = encoders.load_encoder(str(tmp_path))
    assert (encoder.architecture, encoder.facts["start"]) == ("resnet18", config.weights)
    levels = encoder.levels(torch.rand(1, 3, 64, 64))
    assert [x.shape[1] for x in levels] == [64, 128, 256, 512]
    detect.build_detector(replace(detect.PRESETS["demo"], encoder=str(tmp_path)), 3)
    for to in ("torchvision", "timm", "detectron2"):
        out = tmp_path / f"{to}{export.SUFFIXES[to][-1]}"
        export.export(export.Config(str(tmp_path), to, out))
        assert out.is_file()


def test_a_saved_segmenter_scores_what_the_run_logged(tmp_path, folder):
    config = small_on(folder, epochs=1, run=tmp_path)
    train(config)
    model = Segmenter(config, 12).eval()
    model.load_state_dict(load_file(tmp_path / "segmenter.safetensors"))
    confusion = torch.zeros(12, 12, dtype=torch.long)
    with torch.no_grad():
        for image, labels, *_ in image_sets.open_images(folder, split="val"):
            logits = model.projectors["dense"](model.features(image[None] / 255))
            logits = torch.nn.functional.interpolate(logits, labels.shape, mode="bilinear")
            found = model.names[logits[0].argmax(0)]
            for k in range(12):
                for n in range(12):
                    confusion[k, n] += ((labels == k) & (found == n)).sum()
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    expected = (hits[union > 0] / union[union > 0]).mean()
    assert rows(tmp_path, "miou")[-1]["miou"] == pytest.approx(float(expected), abs=1e-6)


# It says nothing of the result.
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_a_bf16_run_stays_close(tmp_path, folder):
    config = small_on(folder, epochs=1, region_start=0.0)
    train(replace(config, run=tmp_path / "plain"))
    train(replace(config, run=tmp_path / "other", precision="bf16"))
    for plain, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "other"), strict=True):
        assert "region" in plain
        assert other == pytest.approx(plain, rel=0.05, abs=0.05)


def four_classes(tmp_path, **more):
    mapping = tmp_path / "mapping.json"
    table = {str(k): int(k < 4) + 2 * int(k in (0, 4)) for k in range(12)}  # 4 classes
    content = {"names": ["things", "ground", "disk", "gradient"], "map": table, **more}
    mapping.write_text(json.dumps(content))
    return mapping


def test_things_and_stuff_are_scored_apart_when_the_mapping_tells_them(tmp_path, folder):
    mapping = four_classes(tmp_path, things=1)
    train(small_on(folder, mapping=mapping, epochs=1, run=tmp_path / "run"))
    for row in rows(tmp_path / "run", "miou"):
        assert {"things_miou", "stuff_miou", "things_wrong", "stuff_wrong"} <= row.keys()
        assert row["things_miou"] in (0.0, 1.0)  # one class, and pixels within the group alone
        assert 0 <= row["stuff_wrong"] <= 1


@pytest.mark.parametrize("more", [{}, {"things": 4}])
def test_a_group_without_a_class_has_no_score(tmp_path, folder, more):
    mapping = four_classes(tmp_path, **more)
    train(small_on(folder, mapping=mapping, epochs=1, run=tmp_path / "run"))
    assert not [name for name in rows(tmp_path / "run", "miou")[-1] if "_wrong" in name]


@pytest.mark.parametrize("things", [-1, 5, 1.5, "two", None, True, [1]])
def test_a_wrong_number_of_things_is_one_sentence(tmp_path, folder, things):
    mapping = four_classes(tmp_path, things=things)
    config = small_on(folder, mapping=mapping, run=tmp_path / "run")
    with pytest.raises(harness.UserError, match=r"mapping.json cannot .* things") as error:
        train(config)
    assert "\n" not in str(error.value)


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_labels_of_training_images_are_not_read(tmp_path, folder):
    changed = copy_of(folder, tmp_path)
    for path in changed.glob("labels/train-*.png"):
        path.write_text("broken")
    train(small_on(changed, epochs=1, run=tmp_path / "run"))
    assert rows(tmp_path / "run", "miou")[-1]["step"] == 2


@pytest.mark.parametrize("gone", ["train-32-*", "train-*"])
def test_images_without_a_label_map_are_trained_on(tmp_path, folder, gone):
    changed = copy_of(folder, tmp_path)
    for path in changed.glob(f"labels/{gone}"):
        path.unlink()
    before, after = (open_training(small_on(x)) for x in (folder, changed))
    assert len(after) == 16
    assert all(torch.equal(x[0], y[0]) for x, y in zip(before, after, strict=True))


def test_images_of_coco_without_a_label_map_are_trained_on(tmp_path, folder):
    for split, names in (("train2017", "abc"), ("val2017", "de")):
        for name in names:
            for kind in (split, f"stuffthingmaps/{split}"):
                (tmp_path / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / f"{name}.jpg")
            if name != "b":
                Image.new("L", (32, 32)).save(tmp_path / f"stuffthingmaps/{split}/{name}.png")
    config = small_on(tmp_path, layout="coco-stuff", mapping=MAPPING)
    source = open_training(config)
    assert [os.fsdecode(name) for name in source.names] == [f"train2017/{x}.jpg" for x in "abc"]
    names = tmp_path / "curated.txt"
    names.write_text("c\nb\n")
    source = open_training(replace(config, train_list=names))
    assert [os.fsdecode(name) for name in source.names] == ["train2017/c.jpg", "train2017/b.jpg"]


def test_streets_without_fine_labels_are_trained_on_and_not_scored(tmp_path):
    """train_extra of Cityscapes has no gtFine."""
    for name in ("a/b", "a/c"):
        path = tmp_path / f"leftImg8bit/train_extra/{name}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    config = small_on(tmp_path, train_split="train_extra", val_split="train_extra")
    assert len(open_training(config)) == 2
    with pytest.raises(harness.UserError, match=r"2 files are missing, such as .*gtFine"):
        open_split(config, "train_extra", None)


def test_unreadable_images_are_named_and_the_run_goes_on(tmp_path, folder):
    changed = copy_of(folder, tmp_path)
    broken = ["train-32-3", "val-40-1"]
    for name in broken:
        (changed / f"images/{name}.png").write_text("broken")
    train(small_on(changed, epochs=2, run=tmp_path / "run"))
    named = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    paths = [str(changed / f"images/{name}.png") for name in broken]
    assert sorted(line.split(": ")[0] for line in named) == paths
    assert rows(tmp_path / "run")[-1]["unreadable"] == 2
    assert rows(tmp_path / "run", "miou")[-1]["miou"] > 0


def test_a_broken_label_map_to_score_with_ends_the_run_with_a_sentence(tmp_path, folder):
    changed = copy_of(folder, tmp_path)
    (changed / "labels/val-40-1.png").write_text("broken")
    with pytest.raises(harness.UserError, match=r"labels/val-40-1.png cannot be used"):
        train(small_on(changed, run=tmp_path / "run"))


def test_nothing_to_score_with_is_one_sentence(tmp_path, folder):
    changed = copy_of(folder, tmp_path)
    for path in changed.glob("images/val-*.png"):
        path.write_text("broken")
    with pytest.raises(harness.UserError, match="No scored image is readable"):
        train(small_on(changed, run=tmp_path / "run"))


def confusion_on(rank, group):
    world = harness.World(rank, 2, torch.device("cpu"))
    run = SimpleNamespace(world=world)
    return segmentation.match(Flat(), lambda image, size: image.argmax(0), 3, run)[0]


def test_each_image_counts_once_over_all_processes():
    left, right = on_processes(2, confusion_on)
    assert torch.equal(left, right)
    assert left.sum() == 7 * 7 * 16


class Threshold(torch.nn.Module):
    """Bright pixels are of class 1; what is bright follows from the batch statistics."""

    def __init__(self, rank):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1, affine=False)
        self.norm.running_mean += 0.4 + 0.4 * rank  # on a CPU each process has its own
        self.register_buffer("names", torch.zeros(2, dtype=torch.long))

    def segment(self, image, size):
        return (self.norm(image[None])[0, 0] > 0).long()


class Halves:
    """Four images, half of whose pixels are of class 1, and brighter."""

    dataset = SimpleNamespace(things=0)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        labels = (torch.arange(4) // 2).expand(4, 4)
        return image_sets.Labeled((100 + 50 * labels[None]).byte(), labels, None, None, "")


def miou_on(rank, group):
    found = {}
    run = SimpleNamespace(
        world=harness.World(rank, group.size(), torch.device("cpu")),
        log=lambda step, **values: found.update(values),
        picture_path=lambda step: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "draw", lambda *_: None)
        segmentation.evaluate(Threshold(rank), Halves(), run, 1)
    return found["miou"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_model_of_the_first_process_is_scored(count):
    assert on_processes(count, miou_on) == [1] * count  # that of the second finds one class


def two_processes(rank, name, port, config):
    with pytest.MonkeyPatch.context() as patch:
        values = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
        for key, value in {**values, "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(key, str(value))
        torch.set_num_threads(1)
        train(config)


def test_two_processes_score_the_whole_set_together(tmp_path, folder):
    config = small_on(folder, epochs=1)
    launch(two_processes, "segment", replace(config, run=tmp_path / "two"))
    train(replace(config, run=tmp_path / "one"))
    one, two = (rows(tmp_path / run, "miou") for run in ("one", "two"))
    assert two[0] == one[0]
    assert [row["step"] for row in two] == [0, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "folder", "val_split": "exam"}, "exam"),
        ({"data": "folder", "batch": 64}, "--batch is 64"),
        ({"data": "folder", "weights": "random:resnet5"}, "--weights is random:resnet5"),
        ({"data": "folder", "layout": "nothing"}, "nothing"),
    ],
    ids=str,
)
def test_bad_input_gets_one_sentence(tmp_path, folder, changes, sentence):
    changes = {key: folder if value == "folder" else value for key, value in changes.items()}
    with pytest.raises(harness.UserError, match=sentence) as error:
        train(replace(SMALL, run=tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_the_paper_preset_is_the_papers():
    paper = PRESETS["paper"]
    assert (paper.arch, paper.aux, paper.batch, paper.epochs) == ("resnet18", 128, 256, 10)
    assert (paper.lr, paper.weight_decay) == (0.05, 1e-4)
    assert (paper.image, paper.size, paper.hue, paper.frozen_views) == (640, 320, 0.1, False)
    assert (paper.weighting, paper.region, paper.region_start) == ("frequency", 0.1, 0.8)


def test_help_answers_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = subprocess.run(
        [sys.executable, RECIPE, "--help"], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--frozen-views" in done.stdout
    assert "--val-list" in done.stdout
