"""Labeled sets: every layout in its true format, masks against a slow loop, what can be wrong."""

import json
import math
import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
from downstream import fields, image_sets, label_files, object_sets, records, voc
from downstream.image_sets import LAYOUTS, open_images, open_videos, read_frame, read_mask
from faster_coco_eval import mask as coco_masks
from harness import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from densekit.scenes import SCENE_CLASSES

H, W = 6, 9
# Of Cityscapes' own table: the ids that count, in the order of the train ids 0 ... 18.
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


# ---- files in the true formats ---------------------------------------------------------------
def picture(path, size=(H, W), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)


def png(path, labels, mode="L"):
    """A label map; in mode P the colors are far from the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, np.uint8))
    if mode == "P":
        image.putpalette([(7 * i + 100) % 256 for i in range(768)])
    image.save(path)
    with Image.open(path) as file:
        assert file.mode == mode


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def same(labels, expected):
    np.testing.assert_array_equal(labels, expected)


def draw(seed, *ids, size=(H, W)):
    return np.random.default_rng(seed).choice(ids, size)


def make_folder(root):
    classes = {"labels": ["other", "cat", "dog"], "labels27": ["animal"], "ignore": 255}
    text(root / "classes.json", classes)
    text(root / "splits.json", {"train": ["c"], "val": ["b", "a"], "valid": ["a"]})
    for i, name in enumerate("abc"):
        picture(root / "images" / f"{name}.jpg", seed=i)
        png(root / "labels" / f"{name}.png", draw(i, 0, 1, 2, 255))
    rows = [
        {"box": [0.5, 1, 4.25, 5], "cat": 2, "crowd": 0},
        {"box": [0, 0, 9, 6], "cat": 1, "crowd": 1},
    ]
    text(root / "boxes.json", [{"id": "a", "kind": "inst", "objects": rows}])
    return root


def row(name="a", **changes):
    """A row of boxes.json with one object."""
    return {"id": name, "objects": [{"box": [0, 0, 2, 2], "cat": 1, **changes}]}


COCO_CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


def square(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


PERSON = {"category_id": 1, "bbox": [1, 1, 4, 3], "segmentation": square(1, 1, 5, 4)}


def make_coco(root, objects, names=("a",), size=(H, W)):
    for i, name in enumerate(names):
        picture(root / "val2017" / f"{name}.jpg", size, seed=i)
    infos = [
        {"id": 7 + i, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]}
        for i, name in enumerate(names)
    ]
    objects = [{"id": 1 + i, "image_id": 7, "iscrowd": 0, **x} for i, x in enumerate(objects)]
    content = {"images": infos[::-1], "annotations": objects, "categories": COCO_CATEGORIES}
    text(root / "annotations" / "instances_val2017.json", content)
    return root


def make_stuff(root):
    picture(root / "train2017" / "000000000009.jpg")
    png(root / "stuffthingmaps" / "train2017" / "000000000009.png", draw(0, 0, 90, 181, 255))
    return root


def make_panoptic(root):
    ids = np.full((H, W), 5 + 256 * 300)
    ids[:2], ids[2, :4], ids[5] = 0, 3 * 65536 + 2 * 256 + 1, 70000
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [
        {"id": 5 + 256 * 300, "category_id": 200, "iscrowd": 0, "bbox": [0, 2, W, 4]},
        {"id": 3 * 65536 + 2 * 256 + 1, "category_id": 18, "iscrowd": 0, "bbox": [0, 2, 4, 1]},
        {"id": 70000, "category_id": 18, "iscrowd": 1, "bbox": [0, 5, W, 1]},
    ]
    stuff = {"id": 200, "name": "rug-merged", "isthing": 0}
    content = {
        "images": [{"id": 139, "file_name": "139.jpg", "height": H, "width": W}],
        "annotations": [{"image_id": 139, "file_name": "139.png", "segments_info": segments}],
        "categories": [stuff, *({**x, "isthing": 1} for x in COCO_CATEGORIES)],
    }
    text(root / "annotations" / "panoptic_val2017.json", content)
    picture(root / "val2017" / "139.jpg")
    maps = root / "annotations" / "panoptic_val2017"
    maps.mkdir()
    Image.fromarray(rgb).save(maps / "139.png")
    return root


def voc_object(name, box, difficult=0):
    ends = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    box = "".join(f"<{end}>{x}</{end}>" for end, x in ends)
    part = "<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>"
    return f"""<object><name>{name}</name><difficult>{difficult}</difficult>{part}
        <bndbox>{box}</bndbox></object>"""


def make_voc(root, year="2012"):
    root = root / "VOCdevkit" / f"VOC{year}"
    objects = voc_object("tvmonitor", (1, 2, 9, "6.0")) + voc_object("cat", (1, 1, 2, 2), 1)
    for i, name in enumerate(("2007_000033", "2007_000001")):
        picture(root / "JPEGImages" / f"{name}.jpg", seed=i)
        png(root / "SegmentationClass" / f"{name}.png", draw(i, 0, 15, 20, 255), "P")
        text(root / "Annotations" / f"{name}.xml", f"<annotation>{objects}</annotation>")
    text(root / "ImageSets" / "Segmentation" / "val.txt", "2007_000033\n2007_000001\n")
    text(root / "ImageSets" / "Segmentation" / "trainval.txt", "2007_000033\n")
    return root


def make_ade(root):
    root = root / "ADEChallengeData2016"
    rows = [
        f"{i}\t0.1\t11\t1\t{'building, edifice' if i == 2 else f'name {i}'}" for i in range(1, 151)
    ]
    text(root / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    picture(root / "images" / "validation" / "ADE_val_00000001.jpg")
    png(root / "annotations" / "validation" / "ADE_val_00000001.png", draw(0, 0, 1, 2, 150))
    return root


def make_cityscapes(root):
    for city, number in (("munster", 1), ("frankfurt", 0)):
        stem = f"{city}_{number:06d}_000294"
        picture(root / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png")
        ids = np.arange(H * W).reshape(H, W) % 34
        fine = root / "gtFine" / "val" / city
        png(fine / f"{stem}_gtFine_labelIds.png", ids)
        png(fine / f"{stem}_gtFine_instanceIds.png", ids)
    return root


def make_davis(root):
    text(root / "ImageSets" / "2017" / "val.txt", "bike\ncar\n")
    for name in ("bike", "car"):
        for i in range(3):
            picture(root / "JPEGImages" / "480p" / name / f"{i:05d}.jpg", seed=i)
            if name == "bike" or i == 0:
                path = root / "Annotations" / "480p" / name / f"{i:05d}.png"
                png(path, draw(i, 0, 1, 2, 255), "P")
    return root


MAKERS = {
    "folder": make_folder,
    "coco": lambda root: make_coco(root, [PERSON]),
    "coco-stuff": make_stuff,
    "coco-panoptic": make_panoptic,
    "voc": make_voc,
    "ade20k": make_ade,
    "cityscapes": make_cityscapes,
}  # fmt: skip


def first(layout):
    return "train" if layout == "coco-stuff" else "val"


@pytest.fixture
def one_layout(tmp_path, request):
    return tmp_path, MAKERS[request.param](tmp_path), request.param


every_layout = pytest.mark.parametrize("one_layout", MAKERS, indirect=True)


# ---- every layout ----------------------------------------------------------------------------
@every_layout
def test_a_layout_is_recognized_and_keeps_the_contract(one_layout, capsys):
    _, root, layout = one_layout
    found = open_images(root, split=first(layout))
    assert found.layout == layout
    assert f"layout {layout}, {len(found)} images, {len(found.classes)} classes" in (
        capsys.readouterr().out
    )
    assert len(found) == len(found.names) == len({*found.names}) > 0
    assert all(isinstance(x, str) for x in found.classes)
    for name, item in zip(found.names, found, strict=True):  # iteration ends at the last
        assert item.name == name
        assert item.image.dtype == torch.uint8
        assert item.image.shape == (3, H, W)
        assert item.labels.dtype == torch.uint8  # of up to 255 classes
        assert item.labels.shape == (H, W)
        known = item.labels[item.labels != found.ignored]
        assert len(known) > 0
        assert 0 <= known.min() <= known.max() < len(found.classes)
        assert item.boxes.dtype == torch.float32
        assert item.boxes.shape == (len(item.box_classes), 4)
        assert (item.boxes[:, :2] < item.boxes[:, 2:]).all()
        assert item.box_classes.dtype == torch.int64
        assert ((item.box_classes >= 0) & (item.box_classes < len(found.classes))).all()


@every_layout
def test_a_named_layout_is_the_same_set_and_says_nothing(one_layout, capsys):
    _, root, layout = one_layout
    found = open_images(root, split=first(layout))
    capsys.readouterr()
    named = open_images(root, layout, first(layout))
    assert capsys.readouterr().out == ""
    assert (named.layout, named.names, named.classes) == (layout, found.names, found.classes)
    for a, b in zip(found, named, strict=True):
        assert a.labels.equal(b.labels)
        assert a.boxes.equal(b.boxes)


@every_layout
def test_a_split_that_does_not_exist_is_answered_with_those_that_do(one_layout):
    _, root, _ = one_layout
    with pytest.raises(UserError, match=r"'tset': choose one of .*(val|train2017)"):
        open_images(root, split="tset")


@every_layout
def test_a_missing_image_is_named_at_once(one_layout):
    _, root, layout = one_layout
    image = next(
        x for x in sorted(root.rglob("*"))
        if x.suffix == ".jpg" or x.name.endswith("leftImg8bit.png")
    )  # fmt: skip
    image.unlink()
    if layout == "cityscapes":  # there the images are the list
        assert len(open_images(root)) == 1
    else:
        with pytest.raises(UserError, match=f"1 files are missing, such as .*{image.name}"):
            open_images(root, split=first(layout))


@every_layout
def test_a_label_map_of_another_size_is_refused_and_both_files_are_named(one_layout):
    _, root, layout = one_layout
    found = open_images(root, split=first(layout))
    picture(found.images[found.names[0]], (H, W + 1))
    labels = found.labels[found.names[0]]
    sentence = f"{found.images[found.names[0]]} is .*{H}, {W + 1}.* {labels} .*{H}, {W}"
    with pytest.raises(UserError, match=sentence.replace("[", r"\[")):
        found[0]


@pytest.mark.parametrize("layout", [x for x in MAKERS if x != "coco"])
def test_an_unreadable_label_map_is_named(layout, tmp_path):
    found = open_images(MAKERS[layout](tmp_path), split=first(layout))
    path = found.labels[found.names[0]]
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UserError, match=f"{path} cannot be used"):
        found[0]


@pytest.mark.parametrize(
    ("layout", "number"),
    [("folder", 3), ("voc", 21), ("coco-stuff", 182), ("ade20k", 151), ("cityscapes", 34)],
)
def test_an_id_beyond_the_classes_is_named_with_its_file(layout, number, tmp_path):
    found = open_images(MAKERS[layout](tmp_path), split=first(layout))
    path = found.labels[found.names[0]]
    png(path, draw(0, 1, 1, number))
    with pytest.raises(UserError, match=f"{path} has the id {number}, which is none"):
        found[0]


def test_a_colored_label_map_is_refused(tmp_path):
    found = open_images(make_folder(tmp_path))
    picture(found.labels["b.jpg"])
    with pytest.raises(UserError, match=r"b.png is no label map: its mode is RGB"):
        found[0]


# ---- each layout -----------------------------------------------------------------------------
def test_a_folder_has_its_labels_and_boxes_in_the_order_of_the_split(tmp_path, capsys):
    make_folder(tmp_path)
    rows = json.loads((tmp_path / "boxes.json").read_text())
    flat = {"box": [3, 3, 3, 5], "cat": 1}
    swapped = {"box": [5, 4, 2, 1], "cat": 1}  # or x, y, width and height by mistake
    rows[0]["objects"] += [flat, swapped]
    text(tmp_path / "boxes.json", rows)
    found = open_images(tmp_path)
    assert "2 objects are left out: their boxes have no area" in capsys.readouterr().out
    assert found.names == ["b.jpg", "a.jpg"]
    assert found.classes == ["other", "cat", "dog"]
    assert found.background == 0
    same(found[0].labels, draw(1, 0, 1, 2, 255))
    assert found[0].image.equal(harness.read_image(tmp_path / "images" / "b.jpg"))
    assert len(found[0].boxes) == 0
    assert found[1].boxes.tolist() == [[0.5, 1, 4.25, 5]]  # no crowd, none without an area
    assert found[1].box_classes.tolist() == [2]


def test_an_image_may_lack_its_label_map_and_that_is_said(tmp_path, capsys):
    make_folder(tmp_path)
    (tmp_path / "labels" / "a.png").unlink()
    item = open_images(tmp_path)[1]
    assert "1 of the 2 images have no label map" in capsys.readouterr().out
    assert item.labels is None
    assert len(item.boxes) == 1
    (tmp_path / "labels" / "b.png").unlink()
    (tmp_path / "boxes.json").unlink()
    with pytest.raises(UserError, match=r"labels has no label map of the 2 images, such as b"):
        open_images(tmp_path)
    (tmp_path / "labels" / "c.png").unlink()
    (tmp_path / "labels").rmdir()  # a set that says it has none, as a segmenter may train on
    assert [open_images(tmp_path).read_labels(i) for i in (0, 1)] == [None, None]


def test_a_folder_may_ignore_another_number(tmp_path):
    text(make_folder(tmp_path) / "classes.json", {"labels": ["other", "cat"], "ignore": 2})
    (tmp_path / "boxes.json").unlink()  # which has a box of class 2
    raw = draw(1, 0, 1, 2, 255)
    same(open_images(tmp_path)[0].labels, np.where(raw == 2, 255, raw))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("classes.json", "{", r"classes.json cannot be used \(Expecting"),
        ("classes.json", {"names": []}, r"classes.json cannot be used \(it has no 'labels'\)"),
        ("classes.json", '{"labels": ["a"], "labels": ["b"]}', r"the key 'labels' stands twice"),
        ("classes.json", {"labels": ["x"], "background": 1}, r"background is 1: the classes are 0"),
        ("splits.json", ["val"], r"splits.json cannot be used \(it is \['val'\]: fields by their"),
        ("splits.json", 5, r"splits.json cannot be used \(it is 5: fields by their names"),
        ("splits.json", {"val": [9]}, r"it names the image 9, which is no text"),
        ("splits.json", {"val": "abc"}, r"has the val 'abc': a list is needed"),
        ("classes.json", {"labels": {"cat": 0}}, r"has the labels .*: a list is needed"),
        ("boxes.json", {"a": []}, r"has the rows .*: a list is needed"),
        ("splits.json", {"val": []}, r"0 images and 3 classes"),
        ("splits.json", {"val": ["a", "z"]}, r"1 files are missing, such as .*images/z.jpg"),
        (
            "boxes.json",
            [{"id": "a"}],
            r"boxes.json cannot be used \(the row 'a' has no 'objects'\)",
        ),
        ("boxes.json", [{}], r"boxes.json cannot be used \(the row 0 has no 'id'\)"),
        ("boxes.json", [{"id": 7, "objects": []}], r"the row 7 has no text as its id"),
        ("boxes.json", [{"id": x, "objects": []} for x in ("a", "a.jpg")], "twice, for a.jpg"),
        ("boxes.json", [{"id": x, "objects": []} for x in ("a", "./a")], "twice, for a.jpg"),
        ("boxes.json", [row("z")], r"boxes.json .*of its rows 1 files are missing, such as .*z"),
        ("boxes.json", [row("images/a")], r"of its rows 1 files are missing"),
        ("splits.json", {"val": ["../a"]}, r"^'../a' is no image of .*images: give its name in"),
        ("splits.json", {"val": ["/a.jpg"]}, r"^'/a.jpg' is no image of"),
        ("splits.json", {"val": [""]}, r"^'' is no image of"),
        ("boxes.json", [row(box=[0, 0, 2])], r"has the box \[0, 0, 2\]: four numbers"),
        ("boxes.json", [row(box=[0, 0, "x", 2])], r"the row 'a' has the box 'x': a finite number"),
        ("boxes.json", [row(box=[0, 0, math.nan, 2])], r"the row 'a' has the box nan: a finite"),
        ("boxes.json", [row(crowd="maybe")], r"the row 'a' has the crowd 'maybe': 0 or 1"),
        ("boxes.json", [row(cat=1.5)], r"the row 'a' has the cat 1.5: a whole number"),
        ("boxes.json", [row(cat=3)], r"the row 'a' has an object of cat 3: the classes are 0 to 2"),
        ("boxes.json", [row(cat=0)], r"an object of cat 0, which is the background"),
    ],
)
def test_a_broken_folder_is_one_sentence(file, content, sentence, tmp_path):
    text(make_folder(tmp_path) / file, content)
    with pytest.raises(UserError, match=sentence):
        open_images(tmp_path)


def test_a_missing_splits_file_is_named(tmp_path):
    (make_folder(tmp_path) / "splits.json").unlink()
    with pytest.raises(UserError, match=r"splits.json cannot be used \(.*No such file"):
        open_images(tmp_path)


def run_lengths(mask):
    """Uncompressed RLE, by hand: column by column, zeros first."""
    counts, value = [0], 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if int(mask[y, x]) != value:
                counts.append(0)
                value = 1 - value
            counts[-1] += 1
    return {"size": [*mask.shape], "counts": counts}


boxes = st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(1, 6)] * 2)


@given(
    st.lists(st.tuples(boxes, st.sampled_from([1, 18]), st.booleans(), st.booleans()), max_size=5)
)
def test_coco_masks_are_drawn_as_a_slow_loop_draws_them(tmp_path_factory, shapes):
    """Rectangles on whole pixels, as polygons or run lengths, some of them crowds."""
    root, objects, masks = tmp_path_factory.mktemp("coco"), [], []
    for (x, y, w, h), category, crowd, polygon in shapes:
        x1, y1 = min(x + w, W), min(y + h, H)
        mask = np.zeros((H, W), bool)
        mask[y:y1, x:x1] = True
        masks.append((mask, 255 if crowd else {1: 1, 18: 2}[category], crowd))
        segmentation = square(x, y, x1, y1) if polygon else run_lengths(mask)
        row = {"category_id": category, "iscrowd": int(crowd), "segmentation": segmentation}
        objects.append({**row, "bbox": [x, y, x1 - x, y1 - y]})
    found = open_images(make_coco(root, objects))
    item, expected = found[0], np.zeros((H, W), int)
    for y in range(H):
        for x in range(W):
            here = [m for m in masks if m[0][y, x]]
            if here:  # the smallest object wins, the last of those; a crowd only where none is
                best = min(enumerate(here), key=lambda m: (m[1][2], m[1][0].sum(), -m[0]))
                expected[y, x] = best[1][1]
    np.testing.assert_array_equal(item.labels, expected)
    wanted = [x for x in objects if not x["iscrowd"]]
    assert item.boxes.tolist() == [
        [x, y, x + w, y + h] for x, y, w, h in (x["bbox"] for x in wanted)
    ]
    assert item.box_classes.tolist() == [{1: 1, 18: 2}[x["category_id"]] for x in wanted]


def test_coco_classes_are_in_the_order_of_their_ids_behind_the_background(tmp_path):
    found = open_images(make_coco(tmp_path, [], names=("a", "b")))
    assert found.classes == ["background", "person", "dog"]
    assert found.names == ["a.jpg", "b.jpg"]  # in the file b is the first
    assert found.background == 0
    assert found[0].labels.eq(0).all()
    assert found[0].boxes.shape == (0, 4)


def test_coco_images_may_lie_in_a_folder_of_images(tmp_path):
    make_coco(tmp_path, [])
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    places = ["images/val2017", "images", "."]
    for place, after in zip(places, [*places[1:], None], strict=True):
        name = "annotations/instances_val2017.json"
        file = tmp_path / place / "a.jpg"
        for found in (open_images(tmp_path), object_sets.read(tmp_path, (name,))):
            assert [x.image.resolve() for x in found.records] == [file.resolve()]
        if after:
            file.rename(tmp_path / after / "a.jpg")


def test_coco_objects_without_masks_leave_the_boxes_and_no_map(tmp_path):
    rows = [{"category_id": 18, "bbox": [1.5, 2, 3, 2]}]
    item = open_images(make_coco(tmp_path, rows))[0]
    assert item.labels is None
    assert item.boxes.tolist() == [[1.5, 2, 4.5, 4]]
    assert item.box_classes.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category_id": 99}, "has the category_id 99, which no category"),
        ({"category_id": "1"}, "has the category_id '1', which no category"),
        ({"category_id": None}, "has the category_id None: a whole number"),
        ({"image_id": "7"}, "has the image_id '7', which no image"),
        ({"image_id": 8}, "has the image_id 8, which no image"),
        ({"image_id": [7]}, r"has the image_id \[7\]: a whole number"),
        ({"bbox": [1, 2]}, r"has the bbox \[1, 2\]: four numbers"),
        ({"bbox": None}, "has the bbox None: four numbers"),
        ({"bbox": [1, 2, "three", 4]}, "has the bbox 'three': a finite number"),
        ({"bbox": [1, 2, math.inf, 4]}, "has the bbox inf: a finite number"),
        ({"area": "large"}, "has the area 'large': a finite number"),
        ({"iscrowd": 2}, "has the iscrowd 2: 0 or 1"),
        ({"segmentation": 3}, "has the segmentation 3: a list of polygons"),
        ({"segmentation": [1, 1, 4, 1, 4, 4]}, r"has the segmentation \[1, .*: a list of polygons"),
        ({"segmentation": [[1, 1, 4, 1, 4, 4, 1]]}, "has a polygon of 7 numbers"),
        ({"segmentation": [[1, 1, 4, 1, 4, math.nan]]}, "has a polygon with a corner"),
        ({"segmentation": [[1, 1, 1e9, 1, 4, 4]]}, "has a polygon with a corner"),
        ({"segmentation": [[1, 1, 4, 1, 4, "x"]]}, "has the polygon 'x': a finite number"),
        ({"segmentation": {"counts": [54]}}, "has no 'size'"),
        ({"segmentation": {"size": [6, 9]}}, "has no 'counts'"),
        (
            {"segmentation": {"size": [9, 6], "counts": [54]}},
            "has run lengths of the size .9, 6.: the image",
        ),
        ({"segmentation": {"size": [6, 9], "counts": [53]}}, "has run lengths of 53 pixels"),
        (
            {"segmentation": {"size": [6, 9], "counts": [60, -6]}},
            "has the count -6: a whole number",
        ),
        ({"segmentation": {"size": [6, 9], "counts": "PP1"}}, "has run lengths of"),
        (
            {"segmentation": {"size": [6, 9], "counts": "\u00e9"}},
            "has the counts .*: they are broken",
        ),
        ({"segmentation": {"size": [6, 9], "counts": ""}}, "has the counts '': they are broken"),
    ],
)
def test_a_broken_coco_object_is_one_sentence_of_both_readers(change, sentence, tmp_path):
    root = make_coco(tmp_path, [PERSON, {**PERSON, **change}])
    whole = "instances_val2017.json cannot be used \\(the annotation 2 " + sentence
    with pytest.raises(UserError, match=whole) as error:
        open_images(root)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=whole):
        object_sets.read(root, ("annotations/instances_val2017.json",))


def test_panoptic_colors_are_ids_to_the_base_256(tmp_path):
    found = open_images(make_panoptic(tmp_path))
    assert found.classes == ["person", "dog", "rug-merged"]
    expected = torch.full((H, W), 2)
    expected[:2], expected[2, :4], expected[5] = 255, 1, 255  # nothing; a dog; a crowd
    same(found[0].labels, expected)
    assert found[0].boxes.tolist() == [[0, 2, 4, 3]]  # neither stuff nor crowds
    assert found[0].box_classes.tolist() == [1]


def test_a_panoptic_segment_that_is_not_listed_is_named(tmp_path):
    make_panoptic(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segments_info"][1]
    text(path, content)
    with pytest.raises(UserError, match=r"139.png has the id 197121, which is none"):
        open_images(tmp_path)[0]


def test_coco_stuff_ids_are_the_classes(tmp_path):
    found = open_images(make_stuff(tmp_path), split="train")
    assert len(found.classes) == 182
    same(found[0].labels, draw(0, 0, 90, 181, 255))


def test_voc_palette_numbers_are_the_classes_and_its_boxes_count_from_one(tmp_path):
    make_voc(tmp_path)
    found = open_images(tmp_path)
    assert found.names == ["2007_000033.jpg", "2007_000001.jpg"]
    assert found.classes[0] == "background"
    assert sorted(found.classes[1:]) == found.classes[1:]
    assert len(found.classes) == 21
    same(found[0].labels, draw(0, 0, 15, 20, 255))
    assert found[0].boxes.tolist() == [[0, 1, 9, 6]]  # nothing that is difficult, no part
    assert found[0].box_classes.tolist() == [20]


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_in_and_above_its_folder(place, tmp_path):
    make_voc(tmp_path)
    assert len(open_images(tmp_path / place)) == 2


def test_two_years_of_voc_are_not_mixed_up(tmp_path):
    make_voc(tmp_path)
    make_voc(tmp_path, "2007")
    with pytest.raises(
        UserError, match=r"one set, not 2: layout voc: .*VOC2007, layout voc: .*VOC2012"
    ):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (voc_object("unicorn", (1, 1, 2, 2)), r"'unicorn' is none of the classes"),
        (voc_object("cat", (1, 1, 2, "x")), r"object 1 has the ymax 'x': a finite number"),
        (voc_object("cat", (1, 1, 2, 2), "hardly"), r"object 1 has the difficult 'hardly': 0 or 1"),
        (voc_object("", (1, 1, 2, 2)), r"object 1 has no name"),
        ("<size><width>9</width></size>", r"its size has the height None: a whole number"),
        ("", r"it has neither a size nor an object"),
        ("<object>", r"mismatched tag"),
        (None, r"No such file"),
    ],
    ids=["class", "number", "difficult", "name", "size", "empty", "xml", "missing"],
)
def test_a_broken_voc_annotation_is_one_sentence(content, sentence, tmp_path):
    path = make_voc(tmp_path) / "Annotations" / "2007_000033.xml"
    path.unlink() if content is None else text(path, f"<annotation>{content}</annotation>")
    with pytest.raises(UserError, match=rf"2007_000033.xml cannot be used \(.*{sentence}"):
        open_images(tmp_path)[0]


def test_ade_labels_lose_one_and_nothing_is_ignored_but_zero(tmp_path):
    make_ade(tmp_path)
    found = open_images(tmp_path)
    assert (len(found.classes), found.classes[1]) == (150, "building, edifice")
    raw = torch.from_numpy(draw(0, 0, 1, 2, 150))
    same(found[0].labels, torch.where(raw == 0, 255, raw - 1))


def test_cityscapes_ids_become_train_ids(tmp_path):
    found = open_images(make_cityscapes(tmp_path))
    stems = ["frankfurt/frankfurt_000000_000294", "munster/munster_000001_000294"]
    assert found.names == [f"{stem}_leftImg8bit.png" for stem in stems]
    assert found.classes[:3] == ["road", "sidewalk", "building"]
    assert (len(found.classes), found.classes[-1]) == (19, "bicycle")
    expected = [CITYSCAPES.index(i % 34) if i % 34 in CITYSCAPES else 255 for i in range(H * W)]
    assert found[0].labels.flatten().tolist() == expected


def test_scenes_depend_on_the_split_alone():
    a, b, train = open_images(None), open_images(None, "scenes"), open_images(None, split="train")
    assert a.classes == [*SCENE_CLASSES]
    assert a.layout == "scenes"
    for x, y, other in zip(a, b, train, strict=True):
        assert x.image.equal(y.image)
        assert x.labels.equal(y.labels)
        assert x.boxes.equal(y.boxes)
        assert not x.image.equal(other.image)
        assert len(x.boxes) == len(x.box_classes)
        for box, kind in zip(x.boxes.long().tolist(), x.box_classes.tolist(), strict=True):
            x0, y0, x1, y1 = box
            assert (x.labels[y0:y1, x0:x1] == kind).any()
    assert sum(len(x.boxes) for x in a) > len(a)
    with pytest.raises(UserError, match=r"choose one of \['test', 'train', 'val'\]"):
        open_images(None, split="all")


def test_a_turned_image_has_the_labels_of_the_upright_one(tmp_path):
    make_folder(tmp_path)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    picture(tmp_path / "images" / "b.jpg", (W, H), exif=exif)
    assert open_images(tmp_path)[0].image.shape == (3, H, W)


# ---- labels and images apart -----------------------------------------------------------------
@every_layout
def test_labels_need_no_image_and_images_no_labels(one_layout, monkeypatch):
    _, root, layout = one_layout
    found = open_images(root, split=first(layout))
    item = found[0]

    def never(*_):
        raise AssertionError("it was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(harness, "read_image", never)
        same(found.read_labels(0), item.labels)
        assert found.read_boxes(0)[0].equal(item.boxes)
    with monkeypatch.context() as patch:
        patch.setattr(label_files, "read_pixels", never)
        patch.setattr(records.Mask, "draw", never)
        assert found.read_image(0).equal(item.image)
        assert found.read_boxes(0)[1].equal(item.box_classes)


@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_size_in_the_header_is_that_of_the_upright_image(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a{suffix}"
    picture(path, exif=exif)
    assert label_files.upright_size(path) == tuple(read_frame(path).shape[1:])
    if suffix == ".png":  # the orientation may also stand behind the pixels
        chunks = path.read_bytes()
        start = chunks.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(chunks[start : start + 4], "big")
        end = chunks.index(b"IEND") - 4
        late = [chunks[:start], chunks[stop:end], chunks[start:stop], chunks[end:]]
        path.write_bytes(b"".join(late))
        assert label_files.upright_size(path) == tuple(read_frame(path).shape[1:])


@pytest.mark.parametrize(
    ("classes", "kind", "ignored"),
    [
        (1, torch.uint8, 255),
        (255, torch.uint8, 255),
        (256, torch.int16, -1),
        (300, torch.int16, -1),
    ],
)
def test_ignored_is_outside_the_classes_however_many_there_are(classes, kind, ignored, tmp_path):
    """In a folder every number of a class is that class, 255 too."""
    void = 255 if classes <= 255 else 65535
    numbers = np.resize([*range(classes), void], (20, 20)).astype(np.uint16)
    root = tmp_path
    text(root / "classes.json", {"labels": [f"class {i}" for i in range(classes)]})
    text(root / "splits.json", {"val": ["a"]})
    picture(root / "images" / "a.jpg", (20, 20))
    (root / "labels").mkdir()
    Image.fromarray(numbers).save(root / "labels" / "a.png")
    found = open_images(root)
    labels = found[0].labels
    assert (found.ignored, labels.dtype) == (ignored, kind)
    assert not 0 <= found.ignored < classes
    same(labels, np.where(numbers == void, ignored, numbers.astype(int)))


def test_an_image_has_classes_where_the_set_says_so(tmp_path):
    for name in ("cat/1.jpg", "dog/1.png", "dog/2.jpg"):
        picture(tmp_path / "train" / name)
    picture(tmp_path / "val" / "cat" / "1.jpg")
    found = open_images(tmp_path, "class-folders", "train")
    assert found.names == ["cat/1.jpg", "dog/1.png", "dog/2.jpg"]
    assert found.classes == ["cat", "dog"]
    assert [x.classes.tolist() for x in found] == [[1, 0], [0, 1], [0, 1]]
    assert found[0].labels is None
    with pytest.raises(UserError, match=r"choose one of \['train', 'val'\]"):
        open_images(tmp_path, "class-folders", "test")


def test_voc_main_has_objects_and_a_difficult_one_leaves_its_class_unsure(tmp_path):
    root = make_voc(tmp_path)
    text(root / "ImageSets" / "Main" / "val.txt", "2007_000001\n\n2007_000033 -1\n2007_000001\n")
    text(root / "ImageSets" / "Main" / "cat_val.txt", "2007_000001  0\n")
    found = open_images(tmp_path, "voc-main", "val")
    assert found.classes == voc.CLASSES
    prefix = "JPEGImages/"
    assert found.names == [f"{prefix}2007_000001.jpg", f"{prefix}2007_000033.jpg"]
    item = found[0]
    assert item.labels is None
    assert item.boxes.tolist() == [[0, 1, 9, 6]]
    kinds = [found.classes.index(name) for name in ("tvmonitor", "cat", "dog")]
    assert item.classes[kinds].tolist() == [1, -1, 0]
    assert [x.difficult for x in found.records[0].objects] == [False, True]
    assert len(open_images(tmp_path, "voc-main", "v")) == 2  # no list of one class is meant
    assert len(open_images(tmp_path, "voc-main", "cat_val")) == 1


def test_images_of_one_name_in_two_folders_stay_two(tmp_path):
    root = make_voc(tmp_path)
    for number, name in enumerate(("s1/a", "s2/a")):
        picture(root / "JPEGImages" / f"{name}.jpg", seed=number)
        png(root / "SegmentationClass" / f"{name}.png", np.full((H, W), number))
        size = f"<size><height>{H}</height><width>{W}</width></size>"
        text(root / "Annotations" / f"{name}.xml", f"<annotation>{size}</annotation>")
    text(root / "ImageSets" / "Segmentation" / "val.txt", "s1/a\ns2/a\n")
    found = open_images(tmp_path)
    assert found.names == ["s1/a.jpg", "s2/a.jpg"]
    assert [found.find(x) for x in ("s1/a", "s2/a.jpg")] == [0, 1]
    blank = torch.zeros(3, H, W, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"2 images of the set are named a.jpg"):
        records.LabeledSet(["x"], [records.Record("a.jpg", blank)] * 2)


# ---- one reader ------------------------------------------------------------------------------
# Of each image its objects: box as x, y, width, height; class; crowd; difficult.
some_objects = st.lists(
    st.tuples(boxes, st.sampled_from(["person", "dog"]), st.booleans(), st.booleans()), max_size=3
)
PLAIN = ((0, 0, 2, 2), "dog", False, False)  # without one there would be nothing to score
objects_of_images = st.lists(some_objects, max_size=2).map(lambda images: [[PLAIN], *images])


def as_coco(root, images):
    objects = []
    for i, image in enumerate(images):
        for (x, y, w, h), name, crowd, _ in image:
            number = {"person": 1, "dog": 18}[name]
            row = {"image_id": 7 + i, "category_id": number, "bbox": [x, y, w, h]}
            objects.append(
                {**row, "iscrowd": int(crowd), "segmentation": square(x, y, x + w, y + h)}
            )
    make_coco(root, objects, [f"{i}" for i in range(len(images))])
    return "coco", ("annotations/instances_val2017.json",)


def as_boxes_json(root, images):
    rows = []
    for i, image in enumerate(images):
        picture(root / "images" / f"{i}.jpg", seed=i)
        objects = []
        for (x, y, w, h), name, crowd, difficult in image:
            kind = {"person": 1, "dog": 2}[name]
            flags = {"crowd": int(crowd), "difficult": difficult}
            objects.append({"box": [x, y, x + w, y + h], "cat": kind, **flags})
        rows.append({"id": f"{i}", "objects": objects})
    text(root / "boxes.json", rows)
    text(root / "splits.json", {"val": [f"{i}" for i in range(len(images))]})
    text(root / "classes.json", {"labels": ["other", "person", "dog"]})
    return "folder", ("val",)


def as_voc_main(root, images):
    for i, image in enumerate(images):
        picture(root / "JPEGImages" / f"{i}.jpg", seed=i)
        size = f"<size><height>{H}</height><width>{W}.0</width></size>"
        objects = [
            voc_object(name, (x + 1, y + 1, x + w, y + h), int(difficult))
            for (x, y, w, h), name, _, difficult in image
        ]
        text(
            root / "Annotations" / f"{i}.xml", f"<annotation>{size}{''.join(objects)}</annotation>"
        )
    listed = "\n".join(f"{i}" for i in range(len(images)))
    text(root / "ImageSets" / "Main" / "val.txt", listed)
    return "voc-main", ("val",)


@pytest.mark.parametrize("write", [as_coco, as_boxes_json, as_voc_main])
@settings(max_examples=15)
@given(images=objects_of_images)
def test_evaluation_and_detection_see_the_same_objects(write, tmp_path_factory, images):
    """They differ in what they are told to: difficult objects are trained on."""
    root = tmp_path_factory.mktemp("set")
    layout, annotations = write(root, images)
    found = open_images(root, layout)
    config = SimpleNamespace(data=root, detector="faster-rcnn-fpn", seed=0)
    detected = object_sets.read(root, annotations)
    classes = object_sets.object_classes(detected)
    data = object_sets.Objects(detected, classes, config, train=False)
    assert len(found) == len(data)
    for i, image in enumerate(images):
        if write is as_voc_main:  # which has no crowds
            image = [(box, name, False, difficult) for box, name, _, difficult in image]
        if write is as_coco:  # which has no difficult objects
            image = [(box, name, crowd, False) for box, name, crowd, _ in image]
        own, own_classes = found.read_boxes(i)
        _, (target,), *_ = data[0, i]
        trained = [x for x in image if not x[2] and x[0][0] < W and x[0][1] < H]
        clipped = [[x, y, min(x + w, W), min(y + h, H)] for (x, y, w, h), *_ in trained]
        assert target["boxes"].tolist() == clipped
        certain = [place for place, x in enumerate(trained) if not x[3]]
        assert own.tolist() == [clipped[place] for place in certain]
        names = [trained[place][1] for place in certain]
        assert [found.classes[k] for k in own_classes.tolist()] == names
        assert [classes[k - 1] for k in target["labels"].tolist()] == [x[1] for x in trained]
        scored = [x for x in data.coco.imgToAnns[i] if not x["iscrowd"] and x["area"] < 1e6]
        assert len(scored) == sum(not x[3] for x in trained)


def test_boxes_of_an_image_of_another_size_are_refused_by_both_readers(tmp_path):
    make_folder(tmp_path)
    text(tmp_path / "boxes.json", [{**row(), "w": W, "h": H + 1}])
    text(tmp_path / "splits.json", {"val": ["a"]})
    found = open_images(tmp_path)
    with pytest.raises(UserError, match=r"a.jpg is \[6, 9\] pixels, .*annotation says \[7, 9\]"):
        found[0]
    assert found.read_labels(0) is not None
    config = SimpleNamespace(data=tmp_path, detector="faster-rcnn-fpn", seed=0)
    detected = object_sets.read(tmp_path, ("val",))
    data = object_sets.Objects(detected, ["cat", "dog"], config, train=False)
    with pytest.raises(UserError, match=r"a.jpg has height, width \(6, 9\), not \(7, 9\)"):
        data[0, 0]


def test_what_lies_outside_the_image_is_no_object(tmp_path, capsys):
    inside = {**PERSON, "bbox": [-100, 1, 105, 400]}
    outside = {**PERSON, "category_id": 18, "bbox": [50, 1, 4, 3]}
    item = open_images(make_coco(tmp_path, [inside, outside]))[0]
    assert item.boxes.tolist() == [[0, 1, 5, H]]
    assert item.classes.tolist() == [0, 1, 0]
    assert "1 objects are left out: their boxes have no area" in capsys.readouterr().out


def test_a_class_0_that_is_an_object_is_one_for_both_readers(tmp_path):
    make_folder(tmp_path)
    text(tmp_path / "boxes.json", [row(cat=0) | {"id": x} for x in "ab"])
    for content in ({"labels": ["cat", "dog"]}, {"labels": ["other", "dog"], "background": None}):
        text(tmp_path / "classes.json", content | {"ignore": 2})
        found = open_images(tmp_path)
        assert found.background is None
        assert found.read_boxes(1)[1].tolist() == [0]
        detected = object_sets.read(tmp_path, ("val",))
        assert object_sets.object_classes(detected) == content["labels"]
    text(tmp_path / "classes.json", {"labels": ["dog", "ground"], "background": 1, "ignore": 2})
    assert open_images(tmp_path).background == 1
    assert object_sets.object_classes(object_sets.read(tmp_path, ("val",))) == ["dog"]


# ---- wrong labels are never silent -----------------------------------------------------------
def drawn(*polygons, size=(10, 20)):
    shape = fields.segmentation([list(x) for x in polygons], size)
    return None if shape is None else records.Mask(shape, size).draw()


SHORT = st.lists(st.integers(0, 9), max_size=5)
LONG = st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(1, 4)] * 2).map(
    lambda x: square(x[0], x[1], x[0] + x[2], x[1] + x[3])[0]
)


def test_a_polygon_of_four_numbers_is_no_box():
    assert drawn([2, 2, 8, 6], [2, 2, 8, 2, 8, 6, 2, 6]).sum() == 24
    assert drawn([2, 2, 8, 2, 8, 6, 2, 6], [2, 2, 8, 6]).sum() == 24
    assert drawn([2, 2, 8, 6], [2, 2, 8, 6]) is None
    assert drawn([2, 2, 8, 6]) is None
    assert drawn([]) is None
    assert drawn() is None


@given(st.lists(SHORT | LONG, max_size=5))
def test_polygons_of_less_than_three_corners_change_nothing(polygons):
    expected = np.zeros((10, 20), bool)
    for x in polygons:
        if len(x) >= 6:  # a rectangle on whole pixels
            expected[x[1] : x[5], x[0] : x[2]] = True
    mask = drawn(*polygons)
    if not any(len(x) >= 6 for x in polygons):
        assert mask is None
    else:
        same(mask, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.floats(0, 1))
def test_run_lengths_of_either_kind_are_the_mask(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    size = (height, width)
    text = coco_masks.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    counts = run_lengths(mask)["counts"]
    assert fields.decode_counts(text).tolist() == counts
    for form in (text, counts, [f"{x}.0" for x in counts]):
        shape = fields.segmentation({"size": [f"{height}", float(width)], "counts": form}, size)
        same(records.Mask(shape, size).draw(), mask)


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_text_is_run_lengths_that_fill_the_image_or_a_sentence(counts):
    try:
        shape = fields.segmentation({"size": [3, 4], "counts": counts}, (3, 4))
    except fields.FieldError:
        return
    assert records.Mask(shape, (3, 4)).draw().shape == (3, 4)


@pytest.mark.parametrize(
    "shape",
    [
        {"size": [H, W], "counts": [H * W]},
        {"size": [H, W], "counts": [H * W, 0]},
        coco_masks.encode(np.zeros((H, W), np.uint8, order="F")),
        square(W, 0, W + 3, 4),
        square(-4, 0, 0, 4) + square(0, H, 4, H + 1) + square(1, -3, 4, 0),
    ],
)
def test_an_object_without_a_pixel_has_no_mask(shape, tmp_path):
    if isinstance(shape, dict) and isinstance(shape["counts"], bytes):
        shape = {"size": [H, W], "counts": shape["counts"].decode()}
    found = open_images(make_coco(tmp_path, [{**PERSON, "segmentation": shape}]))
    assert found[0].labels is None
    assert len(found[0].boxes) == 1
    detected = object_sets.read(tmp_path, ("annotations/instances_val2017.json",))
    config = SimpleNamespace(data=tmp_path, detector="mask-rcnn-fpn", seed=0)
    for train in (True, False):
        with pytest.raises(UserError, match="Some objects have no mask"):
            object_sets.Objects(detected, ["person", "dog"], config, train=train)


@given(*[st.integers(-12, 12)] * 6)
def test_polygons_outside_the_image_have_no_pixel(a, b, c, d, e, f):
    polygon = [a, b, c, d, e, f]
    if not fields.is_in_image([polygon], (H, W)):
        assert not drawn(polygon, size=(H, W)).any()


def test_an_outline_between_the_pixels_is_no_mask_to_train_on(tmp_path):
    dot = {**PERSON, "bbox": [2, 2, 1, 1], "segmentation": square(2.1, 2.1, 2.3, 2.3)}
    make_coco(tmp_path, [dot, PERSON])
    detected = object_sets.read(tmp_path, ("annotations/instances_val2017.json",))
    config = SimpleNamespace(data=tmp_path, detector="mask-rcnn-fpn", seed=0)
    data = object_sets.Objects(detected, ["person", "dog"], config, train=True)
    _, (target,), *_ = data[0, 0]
    assert [len(target[key]) for key in ("boxes", "labels", "masks")] == [1, 1, 1]
    assert target["masks"].sum() == 12


def test_both_readers_compare_the_panoptic_map_with_its_list(tmp_path):
    make_panoptic(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    segments = content["annotations"][0]["segments_info"]
    config = SimpleNamespace(data=tmp_path, detector="mask-rcnn-fpn", seed=0)

    segments.append({"id": 8, "category_id": 18, "bbox": [0, 0, 4, 1]})  # the map lacks it
    text(path, content)
    open_images(tmp_path)[0]
    detected = object_sets.read(tmp_path, (path,))
    data = object_sets.Objects(detected, ["person", "dog"], config, train=True)
    with pytest.raises(UserError, match=r"139.png has no pixel of the segment 8, .* no mask"):
        data[0, 0]

    del segments[0], segments[-1]
    text(path, content)
    with pytest.raises(UserError, match=r"139.png has the id 76805, which is none of the set's"):
        open_images(tmp_path)[0]
    detected = object_sets.read(tmp_path, (path,))
    data = object_sets.Objects(detected, ["person", "dog"], config, train=True)
    with pytest.raises(UserError, match=r"139.png has the id 76805, which is none of the set's"):
        data[0, 0]


def test_an_object_without_a_polygon_has_no_mask_and_its_image_no_map(tmp_path):
    root = make_coco(tmp_path, [PERSON, {**PERSON, "segmentation": [[]]}])
    item = open_images(root)[0]
    assert item.labels is None
    assert len(item.boxes) == 2


SPELLINGS = [int, float, str, lambda x: f" {x}.0 "]


@given(st.integers(1, 9), st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_whole_numbers_are_taken_in_any_spelling(number, spelling, flag_spelling):
    assert fields.whole(spelling(number), "height") == number
    assert fields.four([spelling(number)] * 4, "bbox") == [number] * 4
    assert fields.flag(flag_spelling(1), "iscrowd")
    assert not fields.flag(flag_spelling(0), "iscrowd")


@given(
    st.none()
    | st.booleans()
    | st.integers(-9, 9).map(lambda x: x + 0.5)
    | st.sampled_from([math.nan, math.inf, -math.inf])
    | st.text("abc.-")
    | st.integers(max_value=0)
    | st.lists(st.integers(), max_size=2)
)
def test_what_is_no_whole_number_is_a_sentence(value):
    with pytest.raises(fields.FieldError, match=r"has the height .*: a whole number, 1 or more"):
        fields.whole(value, "height", 1)


def flagged(layout, root, key):
    """A set of one object, with this flag."""
    if layout == "coco":
        make_coco(root, [{**PERSON, key: 1}])
    if layout == "coco-panoptic":
        path = make_panoptic(root) / "annotations" / "panoptic_val2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["segments_info"][1][key] = 1
        text(path, content)
    if layout == "folder":
        make_folder(root)
        text(root / "splits.json", {"val": ["a"]})
        text(root / "boxes.json", [row(**{key: 1})])
    if layout == "voc":
        make_voc(root)
        flag = f"</difficult><{key}>1</{key}>"
        content = voc_object("dog", (1, 1, 3, 3)).replace("</difficult>", flag)
        path = root / "VOCdevkit" / "VOC2012" / "Annotations" / "2007_000033.xml"
        text(path, f"<annotation>{content}</annotation>")
    return open_images(root, layout)


@pytest.mark.parametrize("layout", ["coco", "coco-panoptic", "folder", "voc"])
@pytest.mark.parametrize(
    ("key", "crowd"),
    [
        *((key, True) for key in ("iscrowd", "isCrowd", "is_crowd", "crowd", "ignore", "Ignore")),
        *((key, False) for key in ("difficult", "isDifficult")),
    ],
)
def test_a_flag_is_read_however_its_key_is_spelled(layout, key, crowd, tmp_path):
    found = flagged(layout, tmp_path, key)
    x = found.records[0].objects[0]
    assert (x.crowd, x.difficult) == (crowd, not crowd)
    assert len(found.read_boxes(0)[0]) == 0


def test_a_category_is_no_thing_however_its_key_is_spelled(tmp_path):
    make_coco(tmp_path, [PERSON])
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][1]["isThing"] = False
    text(path, content)
    assert object_sets.object_classes(object_sets.read(tmp_path, (path,))) == ["dog"]


def test_sizes_and_boxes_as_text_are_read(tmp_path):
    box = [str(x) for x in PERSON["bbox"]]
    make_coco(tmp_path, [{**PERSON, "bbox": box, "iscrowd": "0", "area": "12"}])
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"height": f"{H}", "width": W + 0.0, "id": 7.0}
    text(path, content)
    for found in (open_images(tmp_path).records, object_sets.read(tmp_path, (path,)).records):
        assert found[0].size == (H, W)
        assert found[0].objects[0].box == (1, 1, 5, 4)
        assert not found[0].objects[0].crowd


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ([{"height": None}], "the image 7 has the height None: a whole number, 1 or more"),
        ([{"height": "tall"}], "the image 7 has the height 'tall'"),
        ([{"width": 0}], "the image 7 has the width 0"),
        ([{"width": 9.5}], "the image 7 has the width 9.5"),
        ([{"id": None}], "the image None has the id None: a whole number"),
        ([{"file_name": 5}], "the image 7 has the file_name 5: a text"),
        ([{}, {"file_name": "b.jpg"}], "the image 7 stands twice: it is a.jpg and b.jpg"),
        ([{}, {"id": 8}], "the image 8 is a.jpg, and so is the image 7"),
        ([{}, {"id": 8, "file_name": "./a.jpg"}], "the image 8 is a.jpg, and so is the image 7"),
        ([{"file_name": ""}], "the image 7 has the file_name '': a text"),
    ],
)
def test_a_broken_coco_image_is_one_sentence(images, sentence, tmp_path):
    root = make_coco(tmp_path, [])
    path = root / "annotations" / "instances_val2017.json"
    info = {"id": 7, "file_name": "a.jpg", "height": H, "width": W}
    content = {"images": [info | x for x in images], "annotations": [], "categories": []}
    for missing in (False, True):
        if missing:  # a key that is not there
            content["images"] = [{k: v for k, v in info.items() if k != "height"}]
            sentence = "the image 7 has no 'height'"
        text(path, content)
        with pytest.raises(UserError, match=rf"val2017.json cannot be used \({sentence}"):
            open_images(root)


def test_file_names_are_keys_with_their_extensions(tmp_path):
    """In COCO's file each image has its own objects, whatever its name."""
    names = ["a.jpg", "a.png", "v.0001.jpg", "v.0002.jpg"]
    infos, objects = [], []
    for i, name in enumerate(names):
        picture(tmp_path / "val2017" / name, seed=i)
        infos.append({"id": i, "file_name": name, "height": H, "width": W})
        objects.append({**PERSON, "id": i, "image_id": i, "bbox": [i, 0, 1, 1]})
    content = {"images": infos, "annotations": objects, "categories": COCO_CATEGORIES}
    text(tmp_path / "annotations" / "instances_val2017.json", content)
    found = open_images(tmp_path)
    assert found.names == names
    assert [x.boxes[0, 0].item() for x in found] == [0, 1, 2, 3]
    assert len({x.image.numpy().tobytes() for x in found}) == 4


def test_label_maps_of_dotted_names_are_not_mixed_up(tmp_path):
    make_folder(tmp_path)
    names = ["v.0001", "v.0002"]
    for i, name in enumerate(names):
        picture(tmp_path / "images" / f"{name}.jpg", seed=i)
        png(tmp_path / "labels" / f"{name}.png", np.full((H, W), i))
    text(tmp_path / "splits.json", {"val": names})
    assert [x.labels.unique().tolist() for x in open_images(tmp_path)] == [[0], [1]]


def test_a_whole_file_name_is_that_file(tmp_path):
    for name in ("a.jpg", "a.jpg.png"):
        picture(tmp_path / name)
        assert label_files.ImageFolder(tmp_path).find(name) == tmp_path / name
    blank = torch.zeros(3, H, W, dtype=torch.uint8)
    names = ["a.jpg.png", "a.jpg", "b/a.jpg"]
    found = image_sets.ImageSet(
        records.LabeledSet(["x"], [records.Record(x, blank) for x in names])
    )
    assert [found.find(name) for name in names] == [0, 1, 2]


@pytest.mark.parametrize("layout", ["folder", "coco-stuff", "voc", "ade20k", "davis"])
def test_two_files_of_one_name_are_an_error_that_names_both(layout, tmp_path):
    root = {**MAKERS, "davis": make_davis}[layout](tmp_path)
    image = next(x for x in sorted(root.rglob("*.jpg")) if "images" not in x.name)
    picture(image.with_suffix(".png"))
    sentence = rf"{image} and {image.with_suffix('.png')} are both named {image.stem}: rename one"
    with pytest.raises(UserError, match=sentence):
        open_images(root, layout, first(layout))


@pytest.mark.parametrize("name", ["139.png", "./139.png"])
def test_two_panoptic_images_do_not_share_a_map(name, tmp_path):
    make_panoptic(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 140, "file_name": "140.jpg", "height": H, "width": W})
    segments = content["annotations"][0]["segments_info"]
    other = {"image_id": 140, "file_name": name, "segments_info": segments}
    content["annotations"].append(other)
    text(path, content)
    with pytest.raises(UserError, match=r"image 140 has the map 139.png, and so has the image 139"):
        open_images(tmp_path)
    content["annotations"][1]["image_id"] = 139
    text(path, content)
    with pytest.raises(UserError, match=r"the image 139 stands twice"):
        open_images(tmp_path)


def test_an_image_that_coco_stuff_has_no_map_of_is_not_dropped(tmp_path, capsys):
    picture(make_stuff(tmp_path) / "train2017" / "000000000010.jpg")
    found = open_images(tmp_path, split="train")
    assert [x.labels is None for x in found] == [False, True]
    assert "1 of the 2 images have no label map" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], r"it is \[\]: fields by their names are needed"),
        (
            {"images": [], "categories": [], "annotations": None},
            "it has the annotations None: a list",
        ),
        ({"images": {}, "categories": [], "annotations": []}, "it has the images {}: a list"),
        ({"images": [], "annotations": []}, "it has no 'categories'"),
        (
            {"images": [], "categories": [], "annotations": [5]},
            "the annotation number 0 of the list is 5: fields by their names",
        ),
    ],
)
def test_a_coco_file_of_another_form_is_one_sentence_of_both_readers(content, sentence, tmp_path):
    path = tmp_path / "annotations" / "instances_val2017.json"
    text(path, content)
    with pytest.raises(UserError, match=sentence):
        open_images(tmp_path)
    with pytest.raises(UserError, match=sentence):
        object_sets.read(tmp_path, (path,))


def test_names_that_read_the_same_are_told_apart():
    assert records.distinct_names([1, "1", "a"], [5, "x", 7]) == ["1 (5)", "1 (x)", "a"]
    for names in (["a", "a", "a (1)"], ["a (2)", "a", "a", "a (1)"], ["a", "a"]):
        for marks in (range(1, len(names) + 1), [1] * len(names)):
            found = records.distinct_names(names, marks)
            assert len(set(found)) == len(found) == len(names)


def test_a_class_that_is_called_background_is_a_class_of_its_own(tmp_path):
    make_coco(tmp_path / "coco", [{**PERSON, "category_id": x} for x in (1, 18)])
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 18, "name": "cat"}, {"id": 1, "name": "background"}]
    text(path, content)
    found = open_images(tmp_path / "coco")
    assert found.classes == ["background", "background (1)", "cat"]
    assert found[0].box_classes.tolist() == [1, 2]

    root = make_voc(tmp_path / "voc")
    objects = voc_object("background", (1, 1, 2, 2)) + voc_object("cat", (3, 1, 5, 2))
    annotation = root / "Annotations" / "2007_000033.xml"
    text(annotation, re.sub("<object>.*</object>", objects, annotation.read_text(), flags=re.S))
    text(root / "ImageSets" / "Main" / "val.txt", "2007_000033\n")
    found = open_images(root, "voc-main", "val")
    assert found.classes == ["background", "background (object)", "cat"]
    assert found[0].box_classes.tolist() == [1, 2]


@pytest.mark.parametrize("layout", ["coco-stuff", "ade20k"])
def test_a_split_of_images_alone_is_opened_but_not_scored(layout, tmp_path):
    root = MAKERS[layout](tmp_path)
    image = next(root.rglob("*.jpg"))
    picture(image.parents[1] / "more" / "x.jpg")
    found = open_images(tmp_path, split="more", labels=False)
    assert (found.names, found.read_labels(0)) == (["x.jpg"], None)
    with pytest.raises(UserError, match="more has no label map of the 1 images, such as x"):
        open_images(tmp_path, split="more")


def test_a_class_folder_has_the_images_of_its_subfolders(tmp_path, capsys):
    for name in ("cat/1.jpg", "cat/indoors/1.jpg", "dog/a/b/2.png", "loose.jpg", "cat/.hidden.jpg"):
        picture(tmp_path / "train" / name)
    found = open_images(tmp_path, "class-folders", "train")
    assert found.names == ["cat/1.jpg", "cat/indoors/1.jpg", "dog/a/b/2.png"]
    assert [x.classes.tolist() for x in found] == [[1, 0], [1, 0], [0, 1]]
    assert (
        "1 images are left out, since they lie in no folder of a class" in capsys.readouterr().out
    )


def test_hidden_files_of_cityscapes_are_no_images(tmp_path):
    root = make_cityscapes(tmp_path)
    for image in list(root.rglob("*_leftImg8bit.png")):
        (image.parent / f"._{image.name}").write_bytes(b"Mac OS X")
    assert len(open_images(root)) == 2
    assert len(object_sets.read(root, ("val", "val")).records) == 2


def test_categories_of_one_name_stay_two_classes_of_both_readers(tmp_path):
    make_coco(tmp_path, [{**PERSON, "category_id": x} for x in (1, 18)])
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": x, "name": "bat"} for x in (18, 1)]
    text(path, content)
    found = open_images(tmp_path)
    assert found.classes == ["background", "bat (1)", "bat (18)"]
    assert found[0].box_classes.tolist() == [1, 2]
    detected = object_sets.read(tmp_path, (path,))
    assert object_sets.object_classes(detected) == ["bat (1)", "bat (18)"]
    content["categories"] = [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]
    text(path, content)
    with pytest.raises(UserError, match="the category 1 stands twice"):
        open_images(tmp_path)


def test_things_and_stuff_of_panoptic_are_masks_for_detection(tmp_path):
    make_panoptic(tmp_path)
    detected = object_sets.read(tmp_path, ("annotations/panoptic_val2017.json",))
    assert object_sets.object_classes(detected) == ["person", "dog"]
    config = SimpleNamespace(data=tmp_path, detector="mask-rcnn-fpn", seed=0)
    data = object_sets.Objects(detected, ["person", "dog"], config, train=False)
    assert [x["iscrowd"] for x in data.coco.imgToAnns[0]] == [0, 1]
    mask = data.coco.annToMask(data.objects[0][0])
    expected = np.zeros((H, W))
    expected[2, :4] = 1
    same(mask, expected)


# ---- lists -----------------------------------------------------------------------------------
def test_a_line_finds_its_image_with_or_without_folder_and_extension():
    names = ["city/a.png", "city/v.0001.jpg", "city/v.0002.jpg", "town/b.jpg", "village/b.jpg"]
    blank = torch.zeros(3, H, W, dtype=torch.uint8)
    found = image_sets.ImageSet(
        records.LabeledSet(["x"], [records.Record(name, blank) for name in names])
    )
    for number, lines in {
        0: ["city/a.png", "a", "a.png", "a.jpg", "city/a"],  # a list may have other extensions
        1: ["v.0001", "city/v.0001", "v.0001.jpg"],
        2: ["v.0002"],
        3: ["town/b", "town/b.jpg"],
        None: ["v", "v.0003", "c.jpg", ".jpg", "0001"],
    }.items():
        assert [found.find(line) for line in lines] == [number] * len(lines)
    with pytest.raises(UserError, match=r"^b may be town/b.jpg or village/b.jpg"):
        found.find("b")


def test_only_newlines_end_a_line_and_a_byte_order_mark_is_no_part_of_it(tmp_path):
    names = ["a b", "c\u2028d", "e\x85f", "g\x0bh", "\u00e9"]
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff".encode() + "\r\n".join([*names, "", "  "]).encode())
    assert label_files.read_list(path) == names


# ---- which set, which split ------------------------------------------------------------------
def test_a_folder_without_a_set_is_told_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="must hold one set, not 0") as error:
        open_images(tmp_path)
    automatic = {name: x.mark for name, x in LAYOUTS.items() if x.automatic}
    assert len(automatic) == 7
    assert all(f"{name}: {mark}" in str(error.value) for name, mark in automatic.items())
    with pytest.raises(UserError, match=r"not 0: layout coco: annotations/instances"):
        open_images(tmp_path, "coco")
    with pytest.raises(UserError, match="must hold one set, not 0"):
        open_images(tmp_path / "nothing")


def test_several_layouts_in_one_folder_are_named_and_each_can_be_chosen(tmp_path):
    MAKERS["coco"](tmp_path)
    make_stuff(tmp_path)
    with pytest.raises(UserError, match=r"not 2: layout coco: .*, layout coco-stuff: "):
        open_images(tmp_path)
    assert open_images(tmp_path, "coco").layout == "coco"
    assert open_images(tmp_path, "coco-stuff", "train").layout == "coco-stuff"


@pytest.mark.parametrize("layout", ["cocoa", "scenes", ""])
def test_an_unknown_layout_is_answered_with_those_that_exist(layout, tmp_path):
    with pytest.raises(
        UserError, match=r"choose one of \['ade20k', 'auto', 'cityscapes', 'class-folders', "
    ):
        open_images(make_folder(tmp_path), layout)
    with pytest.raises(UserError, match=r"choose one of \['auto', 'scenes'\]"):
        open_images(None, "voc")


def test_a_split_is_taken_by_its_whole_name_first_and_else_by_the_only_beginning(tmp_path):
    root = make_folder(tmp_path)
    assert open_images(root, split="val").names == ["b.jpg", "a.jpg"]  # not "valid"
    assert open_images(root, split="vali").names == ["a.jpg"]
    with pytest.raises(UserError, match=r"has 2 'v': choose one of \['train', 'val', 'valid'\]"):
        open_images(root, split="v")


# ---- other classes ---------------------------------------------------------------------------
@pytest.fixture
def mapping(tmp_path):
    text(tmp_path / "map.json", {"names": ["pet"], "things": 1, "map": {"2": 0}})
    return tmp_path / "map.json"


def test_a_mapping_changes_labels_boxes_and_names_and_ignores_the_rest(tmp_path, mapping):
    root = make_folder(tmp_path / "set")
    rows = [{"box": [0, 0, 2, 2], "cat": i} for i in (1, 2)]
    text(root / "boxes.json", [{"id": "a", "objects": rows}])
    item = (found := open_images(root, mapping=mapping))[1]
    assert found.classes == ["pet"]
    raw = torch.from_numpy(draw(0, 0, 1, 2, 255))
    same(item.labels, torch.where(raw == 2, 0, 255))
    assert item.box_classes.tolist() == [0]


def test_a_mapping_counts_classes_not_the_numbers_in_the_files(tmp_path, mapping):
    make_ade(tmp_path / "set")
    raw = torch.from_numpy(draw(0, 0, 1, 2, 150))
    text(mapping, {"names": ["building"], "map": {"1": 0}})
    labels = open_images(tmp_path / "set", mapping=mapping)[0].labels
    same(labels, torch.where(raw == 2, 0, 255))


@pytest.mark.parametrize(
    "content",
    [
        *({"map": pairs} for pairs in ({"3": 0}, {"-1": 0}, {"0": 1}, {"0": -1}, {"x": 0})),
        *({"map": pairs} for pairs in ({"0": None}, {"0": 0.5}, {"1": 0, "01": 0})),
        {"names": "pet"},
        {"map": [0]},
        *({"things": things} for things in (2, -1, "two", 0.5, None, True)),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(content, tmp_path, mapping):
    text(mapping, {"names": ["pet"], "map": {"2": 0}, **content})
    with pytest.raises(UserError, match=r"map\.json cannot be used"):
        open_images(make_folder(tmp_path / "set"), mapping=mapping)


# ---- videos ----------------------------------------------------------------------------------
def test_a_video_has_a_mask_or_none_for_each_frame(tmp_path):
    bike, car = open_videos(make_davis(tmp_path))
    assert (bike.name, car.name) == ("bike", "car")
    assert [x.name for x in bike.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    for i, (frame, mask) in enumerate(zip(bike.frames, bike.masks, strict=True)):
        assert read_frame(frame).equal(harness.read_image(frame))
        assert mask.stem == frame.stem
        assert read_mask(mask).dtype == torch.int64
        assert read_mask(mask).equal(torch.from_numpy(draw(i, 0, 1, 2, 255)))
    assert car.masks[1:] == [None, None]
    assert car.masks[0].stem == "00000"


def test_a_video_without_masks_says_so(tmp_path):
    for path in (make_davis(tmp_path) / "Annotations" / "480p" / "bike").iterdir():
        path.unlink()
    assert open_videos(tmp_path)[0].masks is None


@pytest.mark.parametrize("lists", ["480p", "2016"])
def test_a_mask_of_davis_2016_is_one_object(lists, tmp_path):
    """Its masks are 0 and 255, and a few of them have colors."""
    make_davis(tmp_path)
    (tmp_path / "ImageSets" / "2017").rename(tmp_path / "ImageSets" / lists)
    frame = "480p/bike/00000"
    if lists == "480p":
        line = f"/JPEGImages/{frame}.jpg /Annotations/{frame}.png"
        text(
            tmp_path / "ImageSets" / "480p" / "val.txt",
            f"{line}\n{line.replace('00000', '00001')}\n",
        )
    mask = draw(0, 0, 255)
    png(tmp_path / "Annotations" / f"{frame}.png", mask)
    colored = np.stack([mask] * 3 + [np.full_like(mask, 255)], -1).astype(np.uint8)
    Image.fromarray(colored).save(tmp_path / "Annotations" / "480p" / "bike" / "00001.png")
    bike = open_videos(tmp_path)[0]
    assert len(open_videos(tmp_path)) == (1 if lists == "480p" else 2)
    for path in bike.masks[:2]:
        same(bike.read_mask(path), mask // 255)
    with pytest.raises(UserError, match="is no DAVIS 2017"):
        open_videos(tmp_path, year="2017")


@pytest.mark.parametrize("year", ["2017", "2016"])
def test_frames_are_labeled_images_of_any_object(year, tmp_path):
    root = make_davis(tmp_path)
    if year == "2016":
        (root / "ImageSets" / "2017").rename(root / "ImageSets" / "2016")
    found = open_images(root, "davis")
    assert found.names[0] == "bike/00000.jpg"
    assert found.classes == ["background", "object"]
    raw = draw(0, 0, 1, 2, 255)
    is_object = (raw > 0).astype(int)
    same(found[0].labels, np.where((raw == 255) & (year == "2017"), 255, is_object))
    assert [x.labels is None for x in found] == [False] * 4 + [True] * 2


def test_what_is_wrong_with_a_video_is_one_sentence(tmp_path):
    make_davis(tmp_path)
    with pytest.raises(UserError, match=r"no 'test': choose one of \['val'\]"):
        open_videos(tmp_path, split="test")
    with pytest.raises(UserError, match=r"no '1080p': choose one of \['480p'\]"):
        open_videos(tmp_path, resolution="1080p")
    (tmp_path / "JPEGImages" / "480p" / "bike" / "00001.jpg").unlink()
    with pytest.raises(UserError, match=r"bike of .* has no frames, or a mask without"):
        open_videos(tmp_path)
    text(tmp_path / "ImageSets" / "2017" / "val.txt", "boat\n")
    with pytest.raises(UserError, match=r"boat of .* has no frames"):
        open_videos(tmp_path)


def test_masks_of_one_and_of_sixteen_bits_are_numbers_too(tmp_path):
    values = draw(0, 0, 1, 300)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(values > 0).save(tmp_path / "flat.png")
    assert read_mask(tmp_path / "deep.png").equal(torch.from_numpy(values))
    assert read_mask(tmp_path / "flat.png").equal(torch.from_numpy(values > 0).long())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_numbers_of_any_depth_are_the_classes(bits, tmp_path):
    """Pillow itself spreads the grays of few bits to 0 ... 255."""
    values = draw(0, *range(min(2**bits, 200)), size=(5, 16))
    places = np.arange(bits)[::-1]
    packed = np.packbits((values[..., None] >> places & 1).astype(np.uint8).reshape(5, -1), axis=1)
    pixels = np.pad(packed, ((0, 0), (1, 0))).tobytes()  # each row begins with its filter, 0
    header = struct.pack(">IIBBBBB", 16, 5, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        check = zlib.crc32(kind + data)
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    (tmp_path / "a.png").write_bytes(content)
    same(read_mask(tmp_path / "a.png"), values)


def test_a_label_map_of_changed_numbers_is_refused(tmp_path):
    Image.fromarray(np.zeros((H, W), np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a.jpg is no label map: a JPEG changes the numbers"):
        read_mask(tmp_path / "a.jpg")


def test_the_module_is_no_command():
    assert "__main__" not in Path(image_sets.__file__).read_text()
