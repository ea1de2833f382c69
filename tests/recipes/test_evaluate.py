"""The evaluation recipe: features that know the answer score one, and figures are their parts'."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import evaluate
import harness
import numpy as np
import pytest
import torch
import torchvision
from downstream import image_sets, memory, report, video
from downstream.protocols import (
    FITTED,
    main_class,
    position_prior,
    segmentation_figures,
    small_labels,
)
from downstream.shards import Shards
from PIL import Image
from torch import nn
import densekit as dk

SEGMENTATION = ("linear-seg", "ridge-seg", "kmeans-seg", "retrieval-seg")
COLORS = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


class Colors(nn.Module):
    """An encoder whose features are the image at an eighth of its size: they know the colors."""

    name, stride, strides = "colors", 8, [4, 8]

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []
        self.bands = None

    def levels(self, images, *, stem=False):
        self.seen.append(images.clone())
        return [nn.functional.avg_pool2d(images, size) * self.scale for size in (4, 8)]

    def forward(self, images):
        return self.levels(images)[-1]


def write_set(root, count=8, side=32):
    """A folder of images whose color is the class: three cells of one, one object of another."""
    generator = torch.Generator().manual_seed(0)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    boxes = []
    for number in range(2 * count):
        labels = torch.zeros(side, side, dtype=torch.long)
        kind = 1 + number % 3
        x, y = (8 * torch.randint(side // 8 - 1, (2,), generator=generator)).tolist()
        labels[y : y + 16, x : x + 16] = kind
        image, name = COLORS[labels].numpy(), f"{number:03d}"
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray(labels.numpy().astype(np.uint8)).save(root / "labels" / f"{name}.png")
        row = {"box": [x, y, x + 16, y + 16], "cat": kind, "crowd": 0}
        boxes.append({"id": name, "objects": [row]})
    names = [f"{number:03d}" for number in range(2 * count)]
    splits = {"train": names[:count], "val": names[count:]}
    (root / "classes.json").write_text(json.dumps({"labels": ["ground", "a", "b", "c"]}))
    (root / "splits.json").write_text(json.dumps(splits))
    (root / "boxes.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


def configured(data, tmp_path, **changes):
    config = evaluate.Config(
        ("random:tiny",), data=data, size=(32, 32), out=tmp_path / "out", workers=0, draws=20,
        batch=5, neighbors=1, epochs=60, lr=1.0, device="cpu", cost=100.0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def samples(config, split):
    images = image_sets.open_images(config.data, split=split)
    return evaluate.Samples(images, config, gallery=split == "train")


def both(config, encoder=None):
    encoder = encoder or Colors()
    return [evaluate.encode(encoder, samples(config, x), config) for x in ("train", "val")]


# ---- features ------------------------------------------------------------------------------------


def test_features_of_objects_are_torchvisions_roi_align_averaged(data, tmp_path):
    config = configured(data, tmp_path)
    encoder, source = Colors(), samples(config, "val")
    features = evaluate.encode(encoder, source, config)
    assert features.objects.shape == (8, 3)
    for number, sample in enumerate(source[i] for i in range(len(source))):
        maps = encoder(sample.image[None] / 255)
        box = sample.boxes * 4  # in cells
        want = torchvision.ops.roi_align(maps, [box], 7, sampling_ratio=2, aligned=True)
        torch.testing.assert_close(features.objects[number], want.mean((-2, -1))[0])
        torch.testing.assert_close(features.maps[number].float(), maps[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(features.pooled[1][number], maps[0].mean((-2, -1)))
    assert features.object_images.tolist() == list(range(8))
    assert main_class(features).tolist() == [0] * 8  # the ground covers three quarters


def test_disturbed_objects_keep_their_pixels_and_no_others(data, tmp_path):
    config = configured(data, tmp_path)
    encoder, source = Colors(), samples(config, "val")
    evaluate.encode_disturbed(encoder, source, config)
    images = [source[i].image / 255 for i in range(len(source))]
    made = torch.cat(encoder.seen)
    assert len(made) == 8
    for number, image in enumerate(made):
        x1, y1, x2, y2 = (source[number].boxes[0] * 32).int().tolist()
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        assert torch.equal(image[:, inside], images[number][:, inside])
        rest = [torch.equal(image[:, ~inside], other[:, ~inside]) for other in images]
        assert any(rest[:number] + rest[number + 1 :])
    # What is around an object depends on neither the batch nor the process.
    other = Colors()
    evaluate.encode_disturbed(other, source, dataclasses.replace(config, batch=1))
    assert torch.equal(torch.cat(other.seen), made)
    parts = Colors()
    for rank in (0, 1):
        evaluate.encode_disturbed(parts, source, config, Part(rank, 2))
    assert torch.equal(torch.cat(parts.seen), made)


class Part(Shards):
    """One of some processes that never meet."""

    def gather(self, rows):
        return rows


def test_a_limit_draws_the_same_images_again(data, tmp_path):
    config = configured(data, tmp_path, limit=3)
    rows = samples(config, "val").rows
    assert len(rows) == 3
    assert rows == sorted(rows) == samples(config, "val").rows


# ---- protocols -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", SEGMENTATION)
def test_features_that_know_the_classes_segment_without_a_fault(data, tmp_path, protocol):
    config = configured(data, tmp_path)
    fit, test = both(config)
    if protocol == "kmeans-seg":
        config = dataclasses.replace(config, clusters=12)  # many to one: no bad start hurts
    found = FITTED[protocol].score(fit, test, config, 0)
    # Class scores are resized bilinearly: at the corner of an object a pixel or two is wrong.
    assert found["miou"].value > 0.93
    assert found["images"] == 8
    assert set(found["iou"]) == {"ground", "a", "b", "c"}


@pytest.mark.parametrize("protocol", ["object-knn", "disturbed-object-knn"])
def test_features_that_know_the_classes_name_all_objects(data, tmp_path, protocol):
    config = configured(data, tmp_path)
    features = both(config)
    if protocol.startswith("disturbed"):
        features = [
            evaluate.encode_disturbed(Colors(), samples(config, x), config)
            for x in ("train", "val")
        ]
    found = FITTED[protocol].score(*features, config, 0)
    assert found["overall"].value == found["macro"].value == 1
    assert found["overall"].deviation == 0
    assert found["rows"] == 8


def test_features_that_know_nothing_are_at_chance(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    blank = [x._replace(maps=x.maps * 0, objects=x.objects * 0) for x in (fit, test)]
    prior = dk.confusion_scores(
        torch.stack([
            dk.confusion_matrix(x, x * 0, classes=4) for x in test.labels if x is not None
        ]).sum(0)
    )  # fmt: skip
    for protocol in ("linear-seg", "ridge-seg"):
        torch.testing.assert_close(
            FITTED[protocol].score(*blank, config, 0)["miou"].value, prior.miou
        )
    assert FITTED["object-knn"].score(*blank, config, 0)["overall"].value < 0.8


def test_classification_of_whole_images(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    kinds = [x.area[:, 1:].argmax(1) + 1 for x in (fit, test)]
    area = [nn.functional.one_hot(x, 4).float() for x in kinds]
    fit, test = (x._replace(area=y) for x, y in zip((fit, test), area, strict=True))
    assert FITTED["image-knn"].score(fit, test, config, 0)["overall"].value == 1
    linear = FITTED["image-linear"].score(fit, test, config, 0)
    assert linear["level2"]["overall"].value == 1
    svm = FITTED["image-svm"].score(fit, test, config, 0)
    assert svm["level2_map"] == pytest.approx(1)
    assert svm["classes"] == 3


def test_images_that_a_set_says_nothing_of_are_judged_by_their_labels_or_left_out(tmp_path):
    root = write_set(tmp_path / "set")
    rows = json.loads((root / "boxes.json").read_text())
    unknown = (1, 9)  # one image of each split
    kept = [x for number, x in enumerate(rows) if number not in unknown]
    (root / "boxes.json").write_text(json.dumps(kept))
    Image.new("L", (32, 32), 255).save(root / "labels" / "009.png")  # no labeled pixel either
    fit, test = both(configured(root, tmp_path))
    assert fit.presence[1].tolist() == [1, 0, 1, 0]  # the ground too: of its label map
    assert fit.presence[0].tolist() == [0, 1, 0, 0]  # of its objects
    assert test.presence[1].tolist() == [-1, -1, -1, -1]
    found = FITTED["image-svm"].score(fit, test, configured(root, tmp_path), 0)
    assert found["images"] == 7


def test_the_interval_is_over_images(data, tmp_path):
    config = configured(data, tmp_path, draws=500)
    _, test = both(config)
    counts = torch.zeros(8, 4, 4, dtype=torch.long)
    counts[:4, 0, 0], counts[4:, 0, 1] = 10, 10  # half of the images right, half wrong
    found = segmentation_figures(counts, test, config)["miou"]
    assert found.value == pytest.approx(0.25)  # 40 / 80 of the ground, none of a
    assert found.low < 0.2 < 0.3 < found.high
    # Images without a labeled pixel change nothing, also where only one of many has some.
    more = torch.cat([counts, torch.zeros_like(counts)])
    assert segmentation_figures(more, test, config)["miou"] == found
    assert segmentation_figures(more[3:], test, config)["images"] == 5
    one = segmentation_figures(more[7:], test, config)["miou"]
    assert one.low == one.value == one.high == 0
    with pytest.raises(harness.UserError, match="No image of the split has a labeled pixel"):
        segmentation_figures(more[8:], test, config)


def test_the_position_prior_is_the_commonest_class_at_each_place(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    stripes = torch.arange(4).repeat_interleave(8).expand(32, 32).contiguous()
    fit, test = (x._replace(labels=[stripes] * 8) for x in (fit, test))
    found = position_prior(fit, test, config)
    assert found["miou"].value > 0.8  # of stripes of one place, but for bilinear edges
    upright = test._replace(labels=[stripes.T.contiguous()] * 8)
    assert position_prior(fit, upright, config)["miou"].value < 0.3


def test_labels_to_fit_on_are_those_of_the_cells_centers(data, tmp_path):
    config = configured(data, tmp_path)
    fit, _ = both(config)
    small = small_labels(fit, 4)
    assert small.shape == (8, 16, 16)
    assert torch.equal(small[0], fit.labels[0][1::2, 1::2])  # nearest, two pixels apart


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_compares_encoders_and_writes_its_report(data, tmp_path, capsys):
    config = configured(
        data, tmp_path, encoders=("random:tiny", "random:tiny-vit"), size=(64, 64), seeds=2,
        protocol="ridge-seg,object-knn,patches,similarity-iou,retrieval,bias,health",
    )  # fmt: skip
    evaluate.evaluate(config)
    results = json.loads((config.out / "results.json").read_text())
    assert set(results["results"]) == {"position prior", "random:tiny", "random:tiny-vit"}
    one = results["results"]["random:tiny"]
    assert set(one) == set(config.protocol.split(","))
    seeds = [x["miou"]["value"] for x in results["seeds"]["random:tiny"]["ridge-seg"]]
    assert len(seeds) == 2
    assert seeds[0] != seeds[1]  # random encoders of two seeds
    assert one["ridge-seg"]["miou"]["value"] == pytest.approx(sum(seeds) / 2)
    text = (config.out / "report.md").read_text()
    assert "| random:tiny-vit |" in text
    assert "## bias" in text
    assert "nan" not in text.lower()
    for name in ("affinity", "similarity", "retrieval"):
        assert f"figures/{name}-random-tiny.png" in text
        assert (config.out / "figures" / f"{name}-random-tiny.png").stat().st_size > 1000
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(("split", "first"), [("--fit train", 0), ("--split val", 8)])
def test_a_protocol_of_objects_is_refused_before_any_other_begins(split, first, tmp_path):
    root = write_set(tmp_path / "set")
    rows = json.loads((root / "boxes.json").read_text())
    for row in rows[first : first + 8]:
        row["objects"] = []
    (root / "boxes.json").write_text(json.dumps(rows))
    config = configured(root, tmp_path, protocol="ridge-seg,object-knn")
    with pytest.raises(harness.UserError, match=f"object-knn needs objects, and {split} has none"):
        evaluate.evaluate(config)
    assert not (config.out / "results.json").exists()


def test_what_was_measured_stays_and_old_pictures_are_not_shown(data, tmp_path, monkeypatch):
    def fail(*_):
        raise harness.UserError("no more")

    config = configured(data, tmp_path, protocol="ridge-seg,retrieval,object-knn")
    old = config.out / "figures" / "retrieval-runs-old.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier evaluation")
    monkeypatch.setitem(FITTED, "object-knn", FITTED["object-knn"]._replace(score=fail))
    with pytest.raises(harness.UserError, match="no more"):
        evaluate.evaluate(config)
    kept = json.loads((config.out / "results.json").read_text())["results"]["random:tiny"]
    assert set(kept) == {"ridge-seg", "retrieval"}
    text = (config.out / "report.md").read_text()
    assert "figures/retrieval-random-tiny.png" in text
    assert "old" not in text


def test_objects_for_the_bias_are_cut_to_whole_cells_of_all_that_is_made_of_them(data, tmp_path):
    config = configured(data, tmp_path, protocol="bias", size=(80, 80))
    evaluate.evaluate(dataclasses.replace(config, encoders=("random:tiny-vit",)))
    text = (config.out / "results.json").read_text()
    assert set(json.loads(text)["results"]["random:tiny-vit"]["bias"]) == {
        "level1", "level2", "level3", "objects"
    }  # fmt: skip


def test_means_over_seeds_keep_counts_and_add_the_deviation_of_an_interval():
    one = {"miou": {"value": 0.2, "low": 0.1, "high": 0.3}, "images": 8, "iou": {"sky": 0.5}}
    two = {"miou": {"value": 0.4, "low": 0.3, "high": 0.5}, "images": 8, "iou": {"sky": 1.0}}
    means = report.mean_over_seeds([one, two])
    assert means["miou"]["value"] == pytest.approx(0.3)
    assert means["miou"]["low"] == pytest.approx(0.2)
    assert means["miou"]["over_seeds"] == pytest.approx(0.02**0.5)
    assert means["images"] == 8
    assert isinstance(means["images"], int)
    assert report.table_row(means) == {"miou": "0.300 ± 0.141 [0.200, 0.400]", "images": 8}
    assert report.mean_over_seeds([one]) == one
    of_seeds = [{"iou": {"sky": 0.5, "value": 0.1}}, {"iou": {"sky": 0.7, "low": 0.3, "high": 1.0}}]
    found = report.mean_over_seeds(of_seeds)["iou"]  # a class has any name, and not every seed
    assert found == pytest.approx({"sky": 0.6, "value": 0.1, "low": 0.3, "high": 1.0})
    assert report.table_row(one) == {"miou": "0.200 [0.100, 0.300]", "images": 8}
    tables = report.tables_of("ridge-seg", {"a": {"ridge-seg": one}, "b": {}})
    assert len(tables) == 2
    assert "| a | 0.200 [0.100, 0.300] | 8 |" in tables[0]
    assert "| a | 0.500 |" in tables[1]
    assert report.tables_of("bias", {"a": {"ridge-seg": one}}) == []


def davis(root, frames=5):
    """A red square that moves by a cell a frame, and a still blue one."""
    for folder in ("JPEGImages/480p/moving", "Annotations/480p/moving", "ImageSets/2017"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("moving\n")
    for number in range(frames):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:24, 8 * number : 8 * number + 16], mask[40:56, 40:56] = 1, 2
        image = COLORS[torch.from_numpy(mask).long()].numpy()
        Image.fromarray(image).save(
            root / f"JPEGImages/480p/moving/{number:05d}.jpg", quality=100, subsampling=0
        )
        palette = Image.fromarray(mask, "P")
        palette.putpalette(COLORS.flatten().tolist())
        palette.save(root / f"Annotations/480p/moving/{number:05d}.png")
    return root


def test_labels_follow_a_moving_object(tmp_path):
    config = configured(davis(tmp_path / "DAVIS"), tmp_path, size=(64, 64))
    videos = image_sets.open_videos(config.data)
    found = evaluate.video(Colors(), videos, config)
    assert (found["videos"], found["objects"]) == (1, 2)
    assert found["J"].value > 0.8  # of 2 x 2 cells, whose corners the bilinear resize rounds
    assert found["F"].value > 0.8
    assert found["J&F"].value == pytest.approx((found["J"].value + found["F"].value) / 2)
    blind = Colors()
    blind.scale.data.zero_()
    assert evaluate.video(blind, videos, config)["J"].value < 0.6
    for mask in videos[0].masks[1:]:  # what is void counts neither as found nor as missed
        numbers = torch.from_numpy(np.array(Image.open(mask)))
        numbers[:, :32] = 255
        Image.fromarray(numbers.numpy()).save(mask)
    shares = torch.zeros(3, 64, 64)
    shares[2, 40:56, 40:56], shares[1, :, :32] = 1, 1  # the still object, and all of the void
    assert (video.score_frames(videos[0], shares.expand(5, 3, 64, 64), [1, 2])[:, :, 1] == 1).all()


def one_of_two(rank, port, config):
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    evaluate.evaluate(config)


def numbers_of(figures, name=""):
    """Each number of nested figures, by its dotted name."""
    if not isinstance(figures, dict):
        return {name: figures}
    found = {}
    for key, value in figures.items():
        found |= numbers_of(value, f"{name}.{key}")
    return found


def evaluate_on_two(config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (port, config), nprocs=2, start_method="fork")


def test_two_processes_have_the_numbers_of_one(data, tmp_path):
    protocols = [x for x in evaluate.PROTOCOLS if x not in ("image-svm", "image-linear-map")]
    davis(tmp_path / "set")
    shutil.copytree(data, tmp_path / "set", dirs_exist_ok=True)
    config = configured(
        tmp_path / "set", tmp_path, size=(64, 64), protocol=",".join(protocols), layout="folder",
        kmeans_seeds=1, epochs=5, batch=3,
    )  # fmt: skip
    results = []
    for count in (1, 2):
        own = dataclasses.replace(config, out=tmp_path / str(count))
        if count == 1:
            evaluate.evaluate(own)
        else:
            evaluate_on_two(own)
        results.append(json.loads((own.out / "results.json").read_text())["results"])
    one, two = map(numbers_of, results)
    assert set(one) == set(two)
    assert len(one) > 60
    assert two == pytest.approx(one, abs=1e-6, nan_ok=True)


def test_a_process_may_have_no_image(data, tmp_path):
    config = configured(
        data, tmp_path, size=(64, 64), limit=1, epochs=1,
        protocol="image-knn,image-linear-map,object-knn,ridge-seg,patches,similarity-iou",
    )  # fmt: skip
    evaluate_on_two(config)
    results = json.loads((config.out / "results.json").read_text())["results"]
    assert results["random:tiny"]["image-knn"]["rows"] == 1
    assert "level4" in results["random:tiny"]["image-linear-map"]


def test_features_that_are_not_finite_are_refused_and_large_ones_stay_float(data, tmp_path):
    config = configured(data, tmp_path)
    encoder = Colors()
    maps = {}
    for scale in (1.0, 1e6, 1e-6):
        encoder.scale.data.fill_(scale)
        maps[scale] = evaluate.encode(encoder, samples(config, "val"), config).maps
        torch.testing.assert_close(maps[scale].float() / scale, maps[1.0].float())
    assert [x.dtype for x in maps.values()] == [torch.float16, torch.float32, torch.float32]
    encoder.scale.data.fill_(torch.nan)
    with pytest.raises(harness.UserError, match=r"^colors gives features that are not finite"):
        evaluate.encode(encoder, samples(config, "val"), config)


def test_only_what_the_protocols_need_is_made(data, tmp_path):
    config = configured(data, tmp_path, protocol="kmeans-seg")
    both_splits = (samples(config, "train"), samples(config, "val"))
    encoder = Colors()
    evaluation = evaluate.Evaluation(encoder, both_splits, None, config)
    assert evaluation.score("kmeans-seg")["images"] == 8
    evaluation.score_prior()
    assert sum(map(len, encoder.seen)) == 8  # of the split to fit on, the label maps alone
    test = evaluation.test.made
    assert [len(x) for x in (test.pooled, test.vectors, test.objects)] == [0, 0, 0]
    evaluation.score("object-knn")
    assert sum(map(len, encoder.seen)) == 8 + 16
    assert len(evaluation.test.made.objects) == 8


def test_the_bytes_of_the_features_follow_from_the_shapes(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    sizes = memory.Sizes(
        fit=8, test=8, cells=16, channels=3, pooled=(3, 3), vectors=(3 * 64, 3 * 16), gallery=8,
        objects=8,
    )  # fmt: skip
    held = {
        "linear-seg": [fit.maps, test.maps],
        "kmeans-seg": [test.maps],
        "object-knn": [fit.objects, test.objects],
        "image-linear": [*fit.pooled, *test.pooled],
        "image-svm": [*fit.vectors, *test.vectors],
    }
    for protocol, tensors in held.items():
        assert memory.feature_bytes(protocol, sizes) == sum(x.nbytes for x in tensors)


def test_weights_that_are_the_same_are_encoded_once_for_all_seeds(data, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        evaluate, "load_encoder", lambda name, seed: encoded.append(name) or Named()
    )
    for name, times in (("runs/croc", 1), ("random:colors", 3)):
        encoded.clear()
        config = configured(data, tmp_path, encoders=(name,), seeds=3, protocol="kmeans-seg")
        evaluate.evaluate(config)
        found = json.loads((config.out / "results.json").read_text())
        assert len(encoded) == times
        assert len(found["seeds"][name]["kmeans-seg"]) == 15  # five of k-means for each


class Named(Colors):
    def takes(self, size):
        return ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoders": ()}, "^No encoder is named: give run folders"),
        ({"encoders": ("random:tiny", "random tiny")}, "random:tiny and random tiny would have"),
        ({"encoders": ("random:resnet19",)}, "no model resnet19"),
        ({"encoders": ("random:tiny-vit",), "size": (60, 60)}, "--size is 60 60: .*multiples of 8"),
        ({"fit": "nothing"}, r"^--fit is nothing: .*splits.json has no 'nothing': choose one of"),
        ({"split": "nothing"}, r"^--split is nothing: .*has no 'nothing': choose one of"),
        ({"protocol": "video"}, "^--data is .*: the protocol video needs the folder of DAVIS"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(data, tmp_path, changes, sentence):
    with pytest.raises(harness.UserError, match=sentence):
        evaluate.evaluate(configured(data, tmp_path, **changes))


# Each wrong option and the beginning of its sentence, without any file.
WRONG = [
    (["random:tiny", "--protocol", "linear"], "--protocol is linear: there is no protocol"),
    (["random:tiny", "--protocol", "bias,"], "--protocol is bias,: there is no protocol ''"),
    (["random:tiny", "--protocol", "bias,bias"], "--protocol is bias,bias: name each"),
    (["random:tiny", "--data", "nowhere"], "--data is nowhere: give a folder"),
    (["random:tiny", "--protocol", "video"], "--data is None: the protocol video"),
    (["random:tiny", "--layout", "voc"], "--layout is voc: give one of auto, scenes"),
    (["random:tiny", "--mapping", "nowhere.json"], "--mapping is nowhere.json: give a JSON"),
    (["random:tiny", "--fit", "nothing"], "--fit is nothing: "),
    (["random:tiny", "--split", "nothing"], "--split is nothing: "),
    (["random:tiny", "--size", "0", "64"], "--size is 0 64: give a height and a width"),
    (["random:tiny", "--size", "64", "-8"], "--size is 64 -8: give a height and a width"),
    (["random:tiny", "--size", "60", "60"], "--size is 60 60: random:tiny takes multiples of 8"),
    (["random:tiny", "--limit", "-1"], "--limit is -1: give 0"),
    (["random:tiny", "--out", __file__], f"--out is {__file__}: it cannot be made a folder"),
    (["random:tiny", "--seeds", "0"], "--seeds is 0: give 1"),
    (["random:tiny", "--clusters", "-1"], "--clusters is -1: give 0"),
    (["random:tiny", "--neighbors", "0"], "--neighbors is 0: give 1"),
    (["random:tiny", "--epochs", "0"], "--epochs is 0: give 1"),
    (["random:tiny", "--lr", "-1"], "--lr is -1.0: give a finite number, 0"),
    (["random:tiny", "--lr", "nan"], "--lr is nan: give a finite number, 0"),
    (["random:tiny", "--objects", "0"], "--objects is 0: give 1"),
    (["random:tiny", "--cost", "0"], "--cost is 0.0: give a finite number above 0"),
    (["random:tiny", "--cost", "nan"], "--cost is nan: give a finite number above 0"),
    (["random:tiny", "--draws", "0"], "--draws is 0: give 1"),
    (["random:tiny", "--batch", "0"], "--batch is 0: give 1"),
    (["random:tiny", "--kmeans-seeds", "0"], "--kmeans-seeds is 0: give 1"),
    (["random:tiny", "--level", "-1"], "--level is -1: give 0"),
    (["random:tiny", "--level", "5"], "--level is 5: random:tiny has the levels 1 to 4"),
    (["random:tiny", "--workers", "-1"], "--workers is -1: give 0"),
]
if not torch.cuda.is_available():
    WRONG.append((["random:tiny", "--device", "cuda"], "--device is cuda: no GPU"))


def test_a_video_split_that_is_missing_is_named(tmp_path):
    config = configured(davis(tmp_path / "DAVIS"), tmp_path, protocol="video", split="x")
    with pytest.raises(harness.UserError, match=r"^--split is x: .*ImageSets/2017 has no 'x'"):
        evaluate.evaluate(config)


def test_all_protocols_are_those_that_the_data_has(data, tmp_path):
    config = configured(None, tmp_path, protocol="all")
    assert set(evaluate.PROTOCOLS) - set(evaluate.wanted_protocols(config)) == {"video"}
    labeled = dataclasses.replace(config, data=data)
    assert evaluate.wanted_protocols(labeled) == evaluate.wanted_protocols(config)
    videos = dataclasses.replace(config, data=davis(tmp_path / "DAVIS"))
    assert evaluate.wanted_protocols(videos) == ["video"]
    write_set(tmp_path / "DAVIS")
    assert evaluate.wanted_protocols(videos) == list(evaluate.PROTOCOLS)


@pytest.mark.parametrize("clusters", [10**9, 129])
def test_more_clusters_than_cells_are_one_sentence(clusters, data, tmp_path):
    config = configured(data, tmp_path, clusters=clusters)
    fit, test = both(config)  # 8 images of 4 x 4 cells
    with pytest.raises(harness.UserError, match=f"--clusters is {clusters}: give at most 128,"):
        FITTED["kmeans-seg"].score(fit, test, config, 0)


def test_a_set_without_labels_or_objects_is_named(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    bare = test._replace(labels=[None] * 8)
    with pytest.raises(harness.UserError, match="label map"):
        FITTED["ridge-seg"].score(fit, bare, config, 0)
    some = {x: getattr(test, x)[:0] for x in ("objects", "object_classes", "object_images")}
    none = test._replace(**some)
    with pytest.raises(harness.UserError, match="no object"):
        FITTED["object-knn"].score(fit, none, config, 0)
    with pytest.raises(harness.UserError, match="no image of a class"):
        FITTED["image-knn"].score(fit, test._replace(area=test.area * 0), config, 0)
    alone = samples(dataclasses.replace(config, limit=1), "val")
    with pytest.raises(harness.UserError, match="takes another image: the split has 1 alone"):
        evaluate.encode_disturbed(Colors(), alone, config)


def test_images_without_a_class_are_left_out(data, tmp_path):
    config = configured(data, tmp_path)
    fit, test = both(config)
    bare = test._replace(area=test.area * (torch.arange(8) > 2)[:, None])
    assert main_class(bare).tolist() == [-1] * 3 + [0] * 5
    assert FITTED["image-knn"].score(fit, bare, config, 0)["rows"] == 5


@pytest.mark.parametrize(
    ("protocol", "sentence"),
    [
        ("linear-seg", "no labeled pixel"),
        ("ridge-seg", "no labeled pixel"),
        ("retrieval-seg", "no labeled pixel"),
        ("image-knn", "has a class"),
        ("image-linear", "has a class"),
    ],
)
def test_a_split_without_labels_to_fit_on_is_one_sentence(data, tmp_path, protocol, sentence):
    void = without_labels(data, tmp_path)
    with pytest.raises(harness.UserError, match=sentence):
        evaluate.evaluate(configured(void, tmp_path / "out", protocol=protocol))


def test_without_labels_to_fit_on_clusters_are_scored_and_there_is_no_prior(data, tmp_path):
    void = without_labels(data, tmp_path)
    config = configured(void, tmp_path, protocol="kmeans-seg", clusters=2)
    evaluate.evaluate(config)
    results = json.loads((config.out / "results.json").read_text())["results"]
    assert results["position prior"] == {"kmeans-seg": {}}
    assert 0 <= results["random:tiny"]["kmeans-seg"]["miou"]["value"] <= 1


def without_labels(data, folder):
    """The set, with label maps of train that have no class anywhere."""
    void = folder / "void"
    shutil.copytree(data, void)
    for name in json.loads((void / "splits.json").read_text())["train"]:
        for path in (void / "labels").glob(f"{Path(name).stem}.*"):
            Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    (void / "boxes.json").unlink(missing_ok=True)
    return void
