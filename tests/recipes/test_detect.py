"""Detection: loaders on files of the true form, the detector's weights, AP, runs that resume."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import detect
import harness
import numpy as np
import pytest
import torch
import torchvision
from detect import PRESETS, average_precision, build_detector, load
from downstream import encoders, object_sets
from downstream.records import LabeledObject, LabeledSet, Record
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import on_processes
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

DETECTORS = [
    "faster-rcnn-fpn", "faster-rcnn-c4", "mask-rcnn-fpn", "mask-rcnn-c4", "retinanet-fpn"
]  # fmt: skip
SMALL = replace(
    PRESETS["demo"], scenes=8, steps=4, milestones=(3,), warmup=1, batch=4, sides=(48, 64),
    width=8, rois=8, proposals=10, workers=0, log_every=1, save_every=2, device="cpu",
)  # fmt: skip
# Arguments that make no sense, and how the sentence that answers them begins.
WRONG = [
    (["--preset", "voc"], "--data is missing"),
    (["--data", "nowhere"], "--data is nowhere"),
    (["--encoder", "nowhere"], "--encoder is nowhere"),
    (["--annotations"], "--annotations is empty"),
    (["--val-annotations"], "--val-annotations is empty"),
    (["--scenes", "0"], "--scenes is 0"),
    (["--steps", "0"], "--steps is 0"),
    (["--milestones", "9", "3"], "--milestones is 9 3"),
    (["--milestones", "0", "3"], "--milestones is 0 3"),
    (["--warmup", "-1"], "--warmup is -1"),
    (["--batch", "1"], "--batch is 1"),
    (["--lr", "-1"], "--lr is -1"),
    (["--lr", "nan"], "--lr is nan"),
    (["--sides"], "--sides is empty"),
    (["--sides", "64", "0"], "--sides is 64 0"),
    (["--longest", "0"], "--longest is 0"),
    (["--anchors", "8", "16"], "--anchors is 8 16: give five"),
    (["--anchors", "0", "8", "16", "32", "64"], "--anchors is 0 8 16 32 64"),
    (["--detector", "faster-rcnn-c4", "--anchors"], "--anchors is empty"),
    (["--width", "0"], "--width is 0"),
    (["--rois", "0"], "--rois is 0"),
    (["--proposals", "-1"], "--proposals is -1"),
    (["--weight-decay", "-1"], "--weight-decay is -1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--workers", "-1"], "--workers is -1"),
    (["--log-every", "0"], "--log-every is 0"),
    (["--save-every", "0"], "--save-every is 0"),
]
# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def noise(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(height)
    Image.fromarray(draws.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def run_lengths(mask):
    """COCO's uncompressed form, column after column, beginning with zeros."""
    counts, last = [0], 0
    for value in mask.T.flatten().tolist():
        if value != last:
            counts, last = [*counts, 0], value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


SPOTS = np.zeros((30, 40), int)
SPOTS[5:9, 10:20] = SPOTS[20:25, 30:33] = 1  # an object in two parts
CROWD = np.zeros((30, 40), int)
CROWD[0:12, 25:40] = 1


def coco(folder, **changes):
    """Three images: objects of every form and a crowd; nothing; a box without area, and one."""
    for i, size in ((7, (30, 40)), (9, (20, 50)), (11, (24, 24))):
        noise(folder / f"val2017/{i:012}.jpg", *size)
    square = [4, 6, 14, 6, 14, 12, 4, 12]
    rows = [
        (7, 90, [4, 6, 10, 6], [square], 0), (7, 3, [10, 5, 23, 20], run_lengths(SPOTS), 0),
        (7, 90, [25, 0, 15, 12], run_lengths(CROWD), 1), (11, 3, [5, 5, 0, 9], [square], 0),
        (11, 3, [1, 2, 20, 21], [[1, 2, 21, 2, 21, 23, 1, 23]], 0),
    ]  # fmt: skip
    names = "image_id", "category_id", "bbox", "segmentation", "iscrowd"
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012}.jpg", "height": size[0], "width": size[1]}
            for i, size in ((7, (30, 40)), (9, (20, 50)), (11, (24, 24)))
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {"id": 5 * i, "area": 9.0, **dict(zip(names, row, strict=True))}
            for i, row in enumerate(rows)
        ],
    } | changes
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    names = ("annotations/instances_val2017.json",)
    return replace(SMALL, data=folder, annotations=names, val_annotations=names)


OBJECT = """<object><name>{}</name><pose>Left</pose><difficult>{}</difficult><bndbox>
    <xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
    </part></object>"""


def voc(root, year="VOC2007", image="000005", split="trainval", objects=()):
    folder = root / year
    noise(folder / f"JPEGImages/{image}.jpg", 30, 40)
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / f"Annotations/{image}.xml").write_text(
        f"<annotation><filename>{image}.jpg</filename><size><width>40</width><height>30</height>"
        f"<depth>3</depth></size>{''.join(OBJECT.format(*x) for x in objects)}</annotation>"
    )
    with (folder / f"ImageSets/Main/{split}.txt").open("a") as file:
        file.write(f"{image}\n")
    return folder


@pytest.fixture
def devkit(tmp_path):
    """Two years, one name of an image in both; a difficult object; an image without any."""
    voc(tmp_path, objects=[("dog", 0, 5, 7, 14, 12), ("cat", 1, 20, 1, 40, 12)])
    voc(tmp_path, "VOC2012", objects=[("cat", 0, 1, 1, 40, 30)])
    voc(tmp_path, split="test", image="000009")
    voc(tmp_path, split="test", image="000010", objects=[("cat", 0, 3, 3, 9, 9)])
    with (tmp_path / "VOC2007/ImageSets/Main/test.txt").open("a") as file:
        file.write("\n")
    names = ("VOC2007/trainval", "VOC2012/trainval")
    return replace(SMALL, data=tmp_path, annotations=names, val_annotations=("VOC2007/test",))


def boxes_json(folder):
    for name in ("a", "b", "c"):
        noise(folder / f"images/{name}.jpg", 30, 40)
    dog = {"box": [4.0, 6.0, 14.0, 12.0], "cat": 2, "crowd": None, "inst": None, "area": None}
    crowd = dog | {"box": [20, 1, 39, 12], "cat": 1, "crowd": 1}
    rows = {"b": [dog, crowd], "a": [dog], "c": []}
    rows = [{"id": k, "w": 40, "h": 30, "split": "?", "objects": x} for k, x in rows.items()]
    splits = {"train": ["a", "b"], "val": ["c", "b"]}
    names = {"labels": ["other", "cat", "dog"]}
    for name, content in (("boxes", rows), ("splits", splits), ("classes", names)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return replace(SMALL, data=folder, annotations=("train",), val_annotations=("val",))


def perfect(data):
    """What a detector would find that makes no mistake."""
    rows = [x for objects in data.objects for x in objects if x["area"] < object_sets.IGNORED_AREA]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{"score": 0.9, **{k: x[k] for k in keys if k in x}} for x in rows]


def ap(data, found, kind="bbox"):
    return average_precision(data.coco, found, kind)["AP"]


def batch_of(data, *indices, epoch=0):
    """The images, the targets and the unreadable files of a few images."""
    images, targets, _, unreadable = harness.make_batch(data, indices, epoch=epoch)
    return images, targets, unreadable


# ---- data --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a", "c"])  # to train on, to test
def test_an_image_that_would_lose_its_short_side_is_named_before_any_step(name, tmp_path):
    config = replace(boxes_json(tmp_path), longest=1333)
    load(config)
    noise(tmp_path / f"images/{name}.jpg", 2, 4000)
    rows = json.loads((tmp_path / "boxes.json").read_text())
    for row in rows:
        if row["id"] == name:
            row |= {"w": 4000, "h": 2}
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    sentence = f"The image .*{name}.jpg has 2 x 4000 pixels, and --longest 1333 with --sides .* no"
    with pytest.raises(harness.UserError, match=sentence):
        load(config)


def test_coco_is_read_as_it_was_written(tmp_path, capsys):
    train, val = load(replace(coco(tmp_path), detector="mask-rcnn-fpn"))
    assert "1 objects are left out" in capsys.readouterr().out  # the box without area
    assert train.classes == ["cat", "dog"]
    assert [len(train), len(val)] == [2, 3]  # an image without objects is not trained on
    train.train = False  # nothing is flipped
    train.order, train.train = [0], True
    for epoch in range(20):  # of which some are not flipped
        (image,), (target,), unreadable = batch_of(train, 0, epoch=epoch)
        if torch.equal(image, harness.read_image(tmp_path / "val2017/000000000007.jpg")):
            break
    assert target["boxes"].tolist() == [[4, 6, 14, 12], [10, 5, 33, 25]]
    assert target["labels"].tolist() == [2, 1]
    square = torch.zeros(30, 40, dtype=torch.uint8)
    square[6:12, 4:14] = 1
    assert torch.equal(target["masks"][0], square)
    assert torch.equal(target["masks"][1], torch.from_numpy(SPOTS).byte())
    assert list(unreadable) == []
    _, (empty,), _ = batch_of(val, 1)
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)


def test_a_perfect_detector_scores_1_on_boxes_and_masks(tmp_path):
    _, val = load(replace(coco(tmp_path), detector="mask-rcnn-c4"))
    assert [ap(val, perfect(val), kind) for kind in ("bbox", "segm")] == [1.0, 1.0]
    _, scenes = load(replace(SMALL, detector="mask-rcnn-fpn"))
    assert [ap(scenes, perfect(scenes), kind) for kind in ("bbox", "segm")] == [1.0, 1.0]
    assert ap(scenes, []) == 0


def test_any_number_of_detections_in_a_crowd_count_nowhere(tmp_path):
    _, val = load(coco(tmp_path))
    inside = [{"image_id": 0, "category_id": 2, "bbox": [27 + i, 2, 8, 8]} for i in range(3)]
    assert ap(val, [*perfect(val), *({**x, "score": 0.95} for x in inside)]) == 1
    outside = {"image_id": 1, "category_id": 2, "bbox": [27, 2, 8, 8], "score": 0.95}
    assert ap(val, [*perfect(val), outside]) == pytest.approx(0.75)  # of dogs: a half


def test_voc_is_read_as_it_was_written(devkit):
    train, val = load(devkit)
    assert train.classes == ["cat", "dog"]
    files = ["VOC2007/JPEGImages/000005.jpg", "VOC2012/JPEGImages/000005.jpg"]
    assert [x["file_name"] for x in train.infos] == files
    train.train = False  # nothing is flipped
    targets = [batch_of(train, index)[1][0] for index in (0, 1)]
    # The difficult cat is trained on, as in Detectron2; one box covers all of its image.
    boxes = [[[4, 6, 14, 12], [19, 0, 40, 12]], [[0, 0, 40, 30]]]
    assert [x["boxes"].tolist() for x in targets] == boxes
    assert [x["labels"].tolist() for x in targets] == [[2, 1], [1]]
    assert [len(val), *map(len, val.objects)] == [2, 0, 1]
    alone = replace(devkit, data=devkit.data / "VOC2007", annotations=("trainval",))
    alone = load(replace(alone, annotations=("test", "trainval"), val_annotations=("test",)))
    assert [len(x) for x in alone[0].objects] == [0, 1, 2]


def test_a_difficult_object_is_ignored_but_not_what_lies_inside_it(devkit):
    _, train = load(replace(devkit, val_annotations=devkit.annotations))  # tested on as well
    cat = {"image_id": 0, "category_id": 1, "score": 0.95}
    assert ap(train, [*perfect(train), {**cat, "bbox": [19, 0, 21, 12]}]) == 1
    assert ap(train, [*perfect(train), {**cat, "bbox": [20, 1, 7, 7]}]) == pytest.approx(0.75)


def one_image(folder, boxes):
    """COCO's form of an image of 30 x 40 pixels with these boxes, x0 y0 x1 y1."""
    noise(folder / "images/a.jpg", 30, 40)
    rows = [
        {"id": k, "image_id": 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for k, (x0, y0, x1, y1) in enumerate([(1, 2, 9, 8), *boxes])
    ]
    content = {
        "images": [{"id": 1, "file_name": "images/a.jpg", "height": 30, "width": 40}],
        "categories": [{"id": 1, "name": "cat"}], "annotations": rows,
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(content))
    return replace(SMALL, data=folder, annotations=("a.json",), val_annotations=("a.json",))


edges = st.integers(-90, 90).map(lambda x: x / 2)


@given(st.lists(st.tuples(edges, edges, edges, edges), max_size=4))
@example([(-5, -5, 15, 15), (30, 20, 80, 70), (500, 500, 520, 520), (40, 0, 49, 9), (-9, 0, 0, 9)])
@settings(max_examples=25)
def test_boxes_are_clipped_to_the_image_and_those_without_area_left_out(boxes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        train, val = load(one_image(Path(folder), boxes))
        train.train = False  # nothing is flipped
        (target,) = batch_of(train, 0)[1]
        (tested,) = batch_of(val, 0)[1]

    frame = torch.tensor([0, 0, 40, 30])
    inside = [[1, 2, 9, 8]]
    for x0, y0, x1, y1 in boxes:
        cut = [max(x0, 0), max(y0, 0), min(x1, 40), min(y1, 30)]
        if cut[0] < cut[2] and cut[1] < cut[3]:
            inside.append(cut)
    assert target["boxes"].tolist() == tested["boxes"].tolist() == inside
    assert ap(val, perfect(val)) == 1
    assert (target["boxes"][:, :2] >= 0).all()
    assert (target["boxes"][:, 2:] <= frame[2:]).all()
    # What is left out or cut off is said, once for each set.
    if len(inside) <= len(boxes):
        count = len(boxes) + 1 - len(inside)
        sentence = f"{count} objects are left out: their boxes have no area"
        assert sum(text.startswith(sentence) for text in printed) == 2


def test_a_box_beyond_the_image_changes_no_loss(tmp_path, capsys):
    losses = []
    for number, boxes in enumerate(([], [(4000, 3000, 5000, 4000), (-90, 5, 0, 9)])):
        train, _ = load(one_image(tmp_path / f"{number}", boxes))
        (image,), targets, _ = batch_of(train, 0)
        torch.manual_seed(0)
        model = build_detector(SMALL, 1).train()
        torch.manual_seed(0)
        losses.append(model([image / 255], targets))
    torch.testing.assert_close(*losses)
    assert "2 objects are left out" in capsys.readouterr().out


def test_boxes_json_is_read_as_it_was_written(tmp_path):
    train, val = load(boxes_json(tmp_path))
    assert train.classes == ["cat", "dog"]
    files = ["images/a.jpg", "images/b.jpg"]
    assert [x["file_name"] for x in train.infos] == files  # in the order of the split
    assert [len(x) for x in train.objects] == [1, 1]  # and no crowd
    assert train.objects[1][0]["bbox"] == [4, 6, 10, 6]
    assert train.objects[1][0]["category_id"] == 2
    assert [len(x) for x in val.objects] == [0, 1]
    crowd = {"image_id": 1, "category_id": 1, "bbox": [21, 2, 9, 9], "score": 1.0}
    assert average_precision(val.coco, [*perfect(val), crowd], "bbox")["classes"] == {"dog": 1}


def test_cityscapes_is_read_as_it_was_written(tmp_path):
    """Every number of a map of instance ids: a mask each, their boxes, crowds, no other class."""
    draws = np.random.default_rng(0)
    ids = np.array([0, 7, 24, 33, 24000, 24001, 26005, 29003, 33000])  # 29 is a caravan: ignored
    maps = {}
    for split in ("train", "val"):
        name = f"{split}/aachen/a_0"
        noise(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", 30, 40)
        numbers = ids[draws.integers(0, len(ids), (6, 8))].repeat(5, 0).repeat(5, 1)
        numbers[3, 4] = 26005  # an object in several parts
        file = tmp_path / f"gtFine/{name}_gtFine_instanceIds.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(numbers.astype(np.uint16)).save(file)
        maps[split] = numbers
    config = replace(SMALL, data=tmp_path, detector="mask-rcnn-fpn")
    train, val = load(config)
    assert train.classes == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"
    ]  # fmt: skip
    assert ap(val, perfect(val)) == ap(val, perfect(val), "segm") == 1

    rows = train.coco.imgToAnns[0]
    numbers = maps["train"]
    found = [x for x in np.unique(numbers) if x not in (0, 7, 29003)]
    assert len(rows) == len(found)
    for row, number in zip(rows, found, strict=True):
        mask = torch.from_numpy(numbers == number)
        assert torch.equal(torch.from_numpy(train.mask_of[row["id"]].draw()), mask)
        box = torchvision.ops.masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
        assert torch.equal(detect.boxes_of([row])[0], box)
        assert row["iscrowd"] == (number < 1000)
        class_id = number // 1000 if number >= 1000 else number
        assert row["category_id"] == {24: 1, 26: 3, 33: 8}[class_id]


def test_image_boxes_and_masks_are_flipped_together():
    train, _ = load(replace(SMALL, detector="mask-rcnn-fpn"))
    flipped = 0
    for epoch in range(4):
        images, targets, _ = batch_of(train, 0, 1, 2, epoch=epoch)
        again = batch_of(train, 0, 1, 2, epoch=epoch)
        assert all(torch.equal(a, b) for a, b in zip(images, again[0], strict=True))
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            boxes = torchvision.ops.masks_to_boxes(target["masks"])
            boxes[:, 2:] += 1  # the last pixel is part of the box
            assert torch.equal(target["boxes"], boxes)
            plain = train.images[train.order[i]][0]
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
            flipped += torch.equal(image, plain.flip(-1))
    assert 0 < flipped < 12
    _, val = load(SMALL)
    assert all(torch.equal(batch_of(val, i)[0][0], val.images[i][0]) for i in range(8))


def test_an_unreadable_image_is_replaced_in_training_and_lost_in_a_test(tmp_path, monkeypatch):
    config = coco(tmp_path)
    (tmp_path / "val2017/000000000007.jpg").write_text("broken")
    (image,), (target,), unreadable = batch_of(load(config)[0], 0)
    assert image.shape[1:] == (20, 50)  # the next one, without any object
    assert target["boxes"].shape == (0, 4)
    assert [x.split(":")[0][-8:] for x in unreadable] == ["0007.jpg"]
    found, judge = [], average_precision
    monkeypatch.setattr(detect, "average_precision", lambda *x: [found.append(x[1]), judge(*x)][1])
    detect.train(replace(config, batch=2, steps=1, run=tmp_path / "run"))
    assert "0007.jpg" in (tmp_path / "run/unreadable.txt").read_text()
    found = [(x["image_id"], x["category_id"], *x["bbox"]) for x in found[0]]
    assert {x[0] for x in found} == {1, 2}
    assert len(set(found)) == len(found)  # the next one is not tested twice


# ---- average precision -------------------------------------------------------------------------
def content(boxes):
    """Ground truth: rows of (image, class, xyxy)."""
    of_images = [[] for _ in range(3)]
    for image, name, box in boxes:
        of_images[image].append(LabeledObject(box, "abc".index(name)))
    blank = torch.zeros(3, 100, 100, dtype=torch.uint8)
    records = [Record(f"{i}", blank, (100, 100), x) for i, x in enumerate(of_images)]
    return LabeledSet(["a", "b", "c"], records)


def objects(boxes):
    return detect.Objects(content(boxes), ["a", "b", "c"], SMALL, train=False)


def found(*rows):
    """Detections: rows of (image, label, xyxy, score)."""
    names = "image_id", "category_id", "bbox", "score"
    rows = [(i, k, [x0, y0, x1 - x0, y1 - y0], s) for i, k, (x0, y0, x1, y1), s in rows]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_an_example_by_hand():
    data = objects([(0, "a", (0, 0, 50, 50)), (1, "a", (0, 0, 100, 50)), (1, "b", (0, 0, 9, 9))])
    right = (0, 1, (0, 0, 50, 50), 0.9)
    wrong, near = (0, 1, (60, 60, 90, 90), 0.8), (1, 1, (0, 0, 62, 50), 0.7)  # of IoU 0.62
    result = average_precision(data.coco, found(near, right, wrong), "bbox")
    # Recall is read at 0, 0.01, ... 1. Up to 0.5 the precision is 1; beyond 2/3, if 0.62 is enough.
    low, high = 51 / 101, (51 + 50 * 2 / 3) / 101
    assert result["classes"] == pytest.approx({"a": (3 * high + 7 * low) / 10, "b": 0})
    means = {"AP": (3 * high + 7 * low) / 20, "AP50": high / 2, "AP75": low / 2}  # b has none
    assert {k: result[k] for k in means} == pytest.approx(means)


def slow_ap(truth, rows, threshold):
    """AP of one class, after the definition: greedy by score, precision that never rises."""
    free, hits = {i: list(boxes) for i, boxes in truth.items()}, []
    for image, _, box, _ in sorted(rows, key=lambda x: -x[3]):
        overlaps = [float(box_iou(torch.tensor([box]), torch.tensor([x]))) for x in free[image]]
        best = max(overlaps, default=0.0)
        hits.append(best >= threshold)
        if hits[-1]:
            free[image].pop(overlaps.index(best))
    count = sum(map(len, truth.values()))
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    recall = [sum(hits[: i + 1]) / count for i in range(len(hits))]
    levels = np.linspace(0, 1, 101)
    best = [max((p for p, r in zip(precision, recall, strict=True) if r >= x), default=0.0)
            for x in levels]  # fmt: skip
    return sum(best) / 101


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_any_detections_score_what_a_slow_loop_says(seed):
    draws = np.random.default_rng(seed)
    sizes = draws.integers(20, 40, (8, 2))
    corners = draws.integers(0, 60, (8, 2))
    boxes = np.concatenate([corners, corners + sizes], 1).astype(float)
    truth = [(int(draws.integers(3)), "ab"[draws.integers(2)], tuple(box)) for box in boxes]
    rows = []
    for score in draws.permutation(20):
        image, name, box = truth[draws.integers(8)]
        moved = tuple((np.array(box) + draws.integers(0, 8, 4)).tolist())
        label = "ab".index(name) + 1 if draws.random() < 0.8 else 3 - "ab".index(name) - 1
        rows.append((image, label, moved, float(score + 1) / 21))
    result = average_precision(objects(truth).coco, found(*rows), "bbox")
    expected = {}
    for label, name in enumerate("ab", 1):
        mine = {i: [x[2] for x in truth if x[:2] == (i, name)] for i in range(3)}
        if any(mine.values()):
            theirs = [x for x in rows if x[1] == label]
            levels = np.linspace(0.5, 0.95, 10) - 1e-6  # a tie is a match
            expected[name] = [slow_ap(mine, theirs, x) for x in levels]
    assert result["classes"] == pytest.approx({k: np.mean(x) for k, x in expected.items()})
    assert result["AP50"] == pytest.approx(np.mean([x[0] for x in expected.values()]))
    assert result["AP75"] == pytest.approx(np.mean([x[5] for x in expected.values()]))


# ---- model -------------------------------------------------------------------------------------
@pytest.fixture(params=["saved", "random:resnet18", "torchvision"])
def name(request, tmp_path, monkeypatch):
    """An encoder: tiny, with other statistics and constants than a new one; or of the libraries."""
    torch.manual_seed(0)
    if request.param == "torchvision":  # without its weights, which would be downloaded
        network = torchvision.models.resnet18()
        monkeypatch.setattr(
            detect, "load_encoder", lambda _: encoders.Encoder("x", "resnet18", network, {})
        )
    if request.param != "saved":
        return request.param
    network = encoders.load_encoder("random:tiny", seed=7).network
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += 0.1
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)  # else timm's last one is 0
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    harness.save_encoder(
        tmp_path / "encoder.safetensors", network, architecture="tiny", mean=mean, std=std,
        method="test",
    )  # fmt: skip
    return str(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["trained", "frozen"])
def test_the_detectors_begin_as_the_encoder(name, norm):
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = [x.clone() for x in detect.load_encoder(name).levels(images)]
    config = replace(SMALL, encoder=name, norm=norm)
    for kind in DETECTORS:
        model = build_detector(replace(config, detector=kind), 3).eval()
        pixels = model.transform([images[0]])[0].tensors  # normalized as the encoder's
        if kind.endswith("fpn"):
            used = levels[1:] if kind == "retinanet-fpn" else levels
            for mine, level in zip(model.backbone.body(pixels).values(), used, strict=True):
                torch.testing.assert_close(mine, level, rtol=1e-5, atol=1e-5)
            continue
        maps = model.backbone(pixels)
        torch.testing.assert_close(maps, levels[2], rtol=1e-5, atol=1e-5)
        fifth, *_ = model.roi_heads.box_head
        torch.testing.assert_close(fifth[0](maps), levels[3], rtol=1e-5, atol=1e-5)
        if kind.startswith("mask"):
            assert model.roi_heads.mask_head is fifth
        assert model.rpn.anchor_generator.num_anchors_per_location() == [15]


def test_the_papers_detectors_are_what_they_say():
    voc, coco = PRESETS["voc"], PRESETS["coco"]
    assert (voc.steps, voc.milestones, voc.warmup) == (24_000, (18_000, 22_000), 100)
    assert (coco.steps, coco.milestones) == (90_000, (60_000, 80_000))
    assert {(x.batch, x.lr, x.sides[-1]) for x in (voc, coco)} == {(16, 0.02, 800)}
    assert (voc.sides[0], coco.sides[0]) == (480, 640)
    streets = PRESETS["cityscapes"]
    assert (streets.steps, streets.milestones, streets.batch) == (24_000, (18_000,), 8)
    assert detect.learning_rate(10_000, streets) == 0.01
    assert (streets.sides[0], streets.sides[-1], streets.longest) == (800, 1024, 2048)
    model = build_detector(replace(voc, encoder="random:resnet18"), 20)
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    assert model.roi_heads.box_predictor.cls_score.out_features == 21
    assert model.rpn.anchor_generator.sizes == [(32, 64, 128, 256, 512)]
    assert model.transform.min_size == voc.sides
    model.rpn.train()
    assert [model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()] == [12_000, 2_000]
    model.rpn.eval()
    assert [model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()] == [6_000, 1_000]
    fpn = build_detector(replace(coco, encoder="random:resnet18"), 80)
    assert fpn.rpn.anchor_generator.sizes == [(32,), (64,), (128,), (256,), (512,)]
    assert fpn.roi_heads.box_roi_pool.output_size == (7, 7)
    fpn.rpn.train()
    assert [fpn.rpn.pre_nms_top_n(), fpn.rpn.post_nms_top_n()] == [2_000, 1_000]
    fpn.rpn.eval()
    assert [fpn.rpn.pre_nms_top_n(), fpn.rpn.post_nms_top_n()] == [1_000, 1_000]


def test_retinanet_is_the_papers():
    config = replace(PRESETS["coco"], detector="retinanet-fpn", encoder="random:resnet18")
    model = build_detector(config, 80)
    first, *_, last = model.anchor_generator.sizes
    assert first == pytest.approx((32, 40.3, 50.8), abs=0.1)
    assert last == pytest.approx((512, 645.1, 812.7), abs=0.1)
    assert model.head.classification_head.cls_logits.out_channels == 9 * 80
    assert (model.topk_candidates, model.detections_per_img) == (1000, 100)
    levels = model.backbone(torch.zeros(1, 3, 128, 128))
    assert [x.shape[-1] for x in levels.values()] == [16, 8, 4, 2, 1]  # strides 8 to 128
    assert model.backbone.fpn.extra_blocks.p6.in_channels == 512  # P6 is made from C5


def test_retinanet_counts_the_classes_of_objects_alone():
    """Its losses and its labels are those of torchvision's, whose classes count from 0."""
    torch.manual_seed(0)
    model = build_detector(replace(SMALL, detector="retinanet-fpn", sides=(64,), norm="frozen"), 3)
    boxes = torch.tensor([[3.0, 4, 20, 30], [5, 5, 50, 40]])
    images = [torch.rand(3, 64, 64)]
    ours = model.train()(images, [{"boxes": boxes, "labels": torch.tensor([1, 3])}])
    model.eval().score_thresh = 0.0
    with torch.no_grad():
        (found,) = model(images)
    assert set(found["labels"].tolist()) == {1, 2, 3}

    model.__class__ = torchvision.models.detection.RetinaNet
    torch.manual_seed(0)
    theirs = model.train()(images, [{"boxes": boxes, "labels": torch.tensor([0, 2])}])
    torch.testing.assert_close(list(ours.values()), list(theirs.values()))
    with torch.no_grad():
        (same,) = model.eval()(images)
    assert torch.equal(found["labels"], same["labels"] + 1)
    assert torch.equal(found["boxes"], same["boxes"])


@pytest.mark.parametrize("kind", DETECTORS)
def test_bf16_changes_no_place(kind):
    """Networks compute in bfloat16, and all that reaches the boxes is float32."""
    torch.manual_seed(0)
    config = replace(SMALL, detector=kind, norm="frozen", sides=(64,))
    model = build_detector(config, 3).train()
    boxes, labels = torch.tensor([[3.0, 4, 20, 30], [5, 5, 50, 40]]), torch.tensor([1, 3])
    masks = torch.ones(2, 64, 64, dtype=torch.uint8)
    targets = [{"boxes": boxes, "labels": labels, "masks": masks}]
    images = [torch.rand(3, 64, 64)]

    def losses():
        torch.manual_seed(1)  # the samples of the losses
        return {name: float(x.detach()) for name, x in model(images, targets).items()}

    plain = losses()
    detect.compute_in_bf16(model, "cpu")
    kinds = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name.startswith("backbone"):
            module.register_forward_hook(lambda *x: kinds.add(x[2].dtype))
    assert losses() == pytest.approx(plain, rel=0.05, abs=0.01)
    assert kinds == {torch.bfloat16}
    assert {x.dtype for x in model.state_dict().values()} <= {torch.float32, torch.int64}
    found = model.eval()(images)[0]
    assert found["boxes"].dtype == torch.float32


def c4_batch(norm):
    """A Mask R-CNN of C4, and images with two objects and with none."""
    torch.manual_seed(0)
    config = replace(SMALL, detector="mask-rcnn-c4", norm=norm, sides=(64,))
    model = build_detector(config, 3).train()
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 4:30, 3:20] = masks[1, 5:40, 5:50] = 1
    boxes, labels = torch.tensor([[3.0, 4, 20, 30], [5, 5, 50, 40]]), torch.tensor([1, 2])
    targets = [{"boxes": boxes[:n], "labels": labels[:n], "masks": masks[:n]} for n in (2, 0)]
    return model, list(torch.rand(2, 3, 64, 64)), targets


def test_the_fifth_block_runs_once_on_each_region():
    model, images, targets = c4_batch("trained")
    regions = []
    fifth = model.roi_heads.mask_head
    fifth.register_forward_hook(lambda _, given, output: regions.append(len(given[0])))
    model(images, targets)["loss_mask"].backward()
    assert regions == [2 * SMALL.rois]
    # Its batch statistics are those of all regions: they were updated once.
    norms = [x for x in fifth.modules() if isinstance(x, torch.nn.BatchNorm2d)]
    assert {int(x.num_batches_tracked) for x in norms} == {1}
    # The gradient of the masks reaches the block and the backbone through the shared maps.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fifth.parameters())
    assert model.backbone[0][0].weight.grad.abs().sum() > 0


def test_shared_maps_give_what_torchvision_gives_where_no_batch_statistics_differ():
    model, images, targets = c4_batch("frozen")
    outcomes = []
    for forward in (type(model.roi_heads).forward, RoIHeads.forward):
        model.roi_heads.forward = forward.__get__(model.roi_heads)
        torch.manual_seed(1)  # the samples of the losses
        terms = model.train()(images, targets)
        gradients = torch.autograd.grad(sum(terms.values()), list(model.parameters()))
        model.roi_heads.score_thresh = 0.0  # else a new network finds nothing
        with torch.no_grad():
            outcomes.append((terms, gradients, model.eval()(images)))
    assert len(outcomes[0][2][0]["masks"]) > 0
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("kind", DETECTORS)
def test_images_without_objects_give_finite_losses_and_gradients(kind):
    torch.manual_seed(0)
    model = build_detector(replace(SMALL, detector=kind), 3).train()
    boxes, labels = torch.tensor([[3.0, 4, 20, 30], [5, 5, 5.02, 40]]), torch.tensor([1, 2])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    some, none = [{"boxes": x, "labels": y, "masks": z} for x, y, z in (
        (boxes, labels, masks), (boxes[:0], labels[:0], masks[:0]))]  # fmt: skip
    for targets in ([none, none], [some, none]):
        terms = model([torch.zeros(3, 64, 64), torch.rand(3, 64, 64)], targets)
        sum(terms.values()).backward()
        assert all(x.isfinite() for x in terms.values()), terms
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(b.isfinite().all() for b in model.buffers())
    assert all(p.grad is not None for p in model.parameters())  # which DDP needs


@pytest.mark.parametrize("norm", ["trained", "frozen"])
def test_frozen_norms_stay_and_others_learn(norm):
    torch.manual_seed(0)
    model = build_detector(replace(SMALL, detector="faster-rcnn-c4", norm=norm), 3).train()
    old = {k: x.clone() for k, x in model.named_buffers() if "running" in k}
    assert len(old) > 10
    targets = [{"boxes": torch.tensor([[3.0, 4, 20, 30]]), "labels": torch.tensor([1])}]
    sum(model([torch.rand(3, 64, 64)], targets).values()).backward()
    assert {torch.equal(x, old[k]) for k, x in model.named_buffers() if k in old} == {
        norm == "frozen"
    }
    learned = {k for k, p in model.named_parameters() if p.requires_grad and p.dim() == 1}
    assert any("bn" in k for k in learned) == (norm == "trained")
    assert model.backbone[0][0].weight.grad.abs().sum() > 0  # nothing else is frozen


# ---- runs --------------------------------------------------------------------------------------
def rows(folder, name="step"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


@pytest.mark.parametrize("kind", ["faster-rcnn-fpn", "mask-rcnn-c4"])
def test_a_halted_run_ends_as_a_whole_one(kind, tmp_path, monkeypatch, capsys):
    config = replace(SMALL, detector=kind, rois=4, proposals=4)
    detect.train(replace(config, run=tmp_path / "whole"))
    asked = iter([False, False, True])  # after the third step, which has no checkpoint of its own
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "stop_requested", lambda self: next(asked))
        detect.train(replace(config, run=tmp_path / "halted"))
    assert not (tmp_path / "halted/detector.pt").exists()
    assert len(rows(tmp_path / "halted", "loss")) == 3
    detect.train(replace(config, run=tmp_path / "halted"))
    whole = rows(tmp_path / "whole")
    assert rows(tmp_path / "halted") == whole
    assert [row["step"] for row in rows(tmp_path / "whole", "box_AP")] == [2, 4]
    first, second = (
        torch.load(tmp_path / x / "detector.pt", weights_only=True) for x in ("whole", "halted")
    )
    assert all(torch.equal(x, second[k]) for k, x in first.items())
    results = [(tmp_path / x / "results.json").read_text() for x in ("whole", "halted")]
    assert results[0] == results[1]
    assert set(json.loads(results[0])) >= {"step", "box", *(["mask"] if "mask" in kind else [])}
    with Image.open(tmp_path / "whole/pictures/step-000004.png") as picture:
        assert picture.size == (4 * 322 + 2, 4 * 322 + 2)
    assert capsys.readouterr().out.count("AP50") == 4
    # The rate: half at the first step of the warm-up, then whole, then a tenth; a quarter of 16.
    rates = [row["lr"] for row in rows(tmp_path / "whole", "lr")]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.001])


# It says nothing of the result.
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_retinanet_runs_in_bf16(tmp_path):
    config = replace(SMALL, detector="retinanet-fpn", precision="bf16", steps=2)
    detect.train(replace(config, run=tmp_path))
    terms = {"loss", "loss_classifier", "loss_box_reg", "grad_norm", "lr", "unreadable", "step"}
    assert [row.keys() for row in rows(tmp_path, "loss")] == [terms, terms]
    assert len(rows(tmp_path, "box_AP")) == 1
    weights = torch.load(tmp_path / "detector.pt", weights_only=True)
    assert {x.dtype for x in weights.values()} <= {torch.float32, torch.int64}


def find(rank, group, config, weights, folder):
    world = harness.World(rank, group.size(), torch.device("cpu"))
    _, data = load(config)
    model = build_detector(config, len(data.classes))
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.backbone.body.bn1.running_mean += rank  # on a CPU each process has its own
    with harness.Run(folder, config, world) as run:
        run.resume(model, torch.optim.SGD(model.parameters(), 0.1))
        detect.evaluate(model, data, run, 1)


def test_two_processes_find_what_one_finds(tmp_path, monkeypatch):
    config = replace(SMALL, scenes=5)  # an odd number
    _, data = load(config)
    torch.manual_seed(0)
    model = build_detector(config, len(data.classes))
    torch.save(model.state_dict(), weights := tmp_path / "weights")
    seen, judge = tmp_path / "seen", detect.average_precision

    def note(truth, found, kind):
        seen.write_text(json.dumps(found))
        return judge(truth, found, kind)

    monkeypatch.setattr(detect, "average_precision", note)
    found = []
    for count in (1, 2):
        on_processes(count, find, config, weights, tmp_path / f"{count}")
        found.append(sorted(json.loads(seen.read_text()), key=lambda x: (x["image_id"], x["bbox"])))
    assert found[0] == found[1]
    assert {x["image_id"] for x in found[0]} == {0, 1, 2, 3, 4}


def test_it_learns():
    """Losses fall on a few scenes; that AP rises too is the demo's to show."""
    torch.manual_seed(0)
    train, _ = load(SMALL)
    model = build_detector(replace(SMALL, width=16), len(train.classes)).train()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), []
    images, targets, _ = batch_of(train, 0, 1, 2, 3)
    for _ in range(12):
        loss = sum(model([x / 255 for x in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# ---- what goes wrong ---------------------------------------------------------------------------
BROKEN = SimpleNamespace(
    category={"annotations": [{"id": 1, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9]}]},
    image={"annotations": [{"id": 1, "image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9]}]},
    box={"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 9]}]},
    word={"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": ["a", 0, 9, 9]}]},
    bare={"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9]}]},
    nothing={"annotations": []},
    nan={"annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, "nan", 9]}]},
    keys={"categories": [{"id": 3}], "annotations": []},
)


@pytest.mark.parametrize(
    ("content", "changes", "sentence"),
    [
        (BROKEN.category, {}, "val2017.json.*annotation 1 has the category_id 4, which no"),
        (BROKEN.image, {}, "annotation 1 has the image_id 8, which no image"),
        (BROKEN.box, {}, r"annotation 1 has the bbox \[0, 0, 9\]: four numbers"),
        (BROKEN.word, {}, "annotation 1 has the bbox 'a': a finite number"),
        (BROKEN.bare, {"detector": "mask-rcnn-fpn"}, "mask"),
        (BROKEN.nothing, {}, "no object"),
        (BROKEN.nan, {}, "annotation 1 has the bbox 'nan': a finite number"),
        (BROKEN.keys, {}, "category 3 has no 'name'"),
        ({}, {"annotations": ("annotations/none.json",)}, "none.json cannot be used.*No such file"),
        ({}, {"annotations": ("a.json", "b.json")}, "b.json is one file too many"),
        ({}, {"annotations": ("VOC2007/train",)}, "Main/train.txt cannot be used.*No such"),
        ({}, {"encoder": "random:tiny-vit"}, "--encoder is random:tiny-vit: give a ResNet"),
        ({}, {"encoder": "random:densenet121"}, "--encoder is random:densenet121: give a ResNet"),
        ({}, {"batch": 64}, "--batch is 64"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, content, changes, sentence):
    config = replace(coco(tmp_path / "coco", **content), batch=2, run=tmp_path / "run")
    with pytest.raises(harness.UserError, match=sentence) as error:
        detect.train(replace(config, **changes))
    assert "\n" not in str(error.value)


def test_other_wrong_files_are_named(devkit, tmp_path):
    voc(tmp_path, split="val", image="000011", objects=[("cow", 0, 3, 3, 9, 9)])
    with pytest.raises(harness.UserError, match="lack the class cow"):
        load(replace(devkit, val_annotations=("VOC2007/val",)))
    for text in ("<annotation>", "<annotation></annotation>", "<annotation><size/></annotation>"):
        (tmp_path / "VOC2007/Annotations/000011.xml").write_text(text)
        with pytest.raises(harness.UserError, match=r"000011.xml cannot be used \((no|it has|its)"):
            load(replace(devkit, val_annotations=("VOC2007/val",)))
    noise(tmp_path / "VOC2007/JPEGImages/000010.jpg", 40, 30)
    _, val = load(devkit)
    with pytest.raises(harness.UserError, match=r"000010.jpg has height, width \(40, 30\), not"):
        batch_of(val, 1)
    voc(tmp_path, split="hard", image="000012", objects=[("cat", 1, 3, 3, 9, 9)])
    train, _ = load(replace(devkit, annotations=("VOC2007/hard",)))
    assert len(train) == 1
    with pytest.raises(harness.UserError, match="no object to find"):  # nothing to score
        load(replace(devkit, val_annotations=("VOC2007/hard",)))
    plain = boxes_json(tmp_path / "boxes")
    with pytest.raises(harness.UserError, match=r"splits.json cannot be used \(it has no 'test'\)"):
        load(replace(plain, val_annotations=("test",)))


def test_help_answers_without_importing_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = subprocess.run(
        [sys.executable, Path(detect.__file__), "--preset", "voc", "--help"], check=False,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "VOC2007/trainval" in done.stdout
