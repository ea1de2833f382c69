"""Labeled sets: every layout in its true format, masks against a slow loop, what can be wrong."""

import json
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from downstream import image_sets
from downstream.image_sets import LAYOUTS, open_images, open_videos, read_frame, read_mask
from harness import UserError
from hypothesis import given
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
        {"box": [3, 3, 3, 5], "cat": 1, "crowd": 0},
    ]
    text(root / "boxes.json", [{"id": "a", "kind": "inst", "objects": rows}])
    return root


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
        assert item.labels.dtype == torch.int64
        assert item.labels.shape == (H, W)
        known = item.labels[item.labels != 255]
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
    picture(found.labels["b"])
    with pytest.raises(UserError, match=r"b.png is no label map: its mode is RGB"):
        found[0]


# ---- each layout -----------------------------------------------------------------------------
def test_a_folder_has_its_labels_and_boxes_in_the_order_of_the_split(tmp_path):
    found = open_images(make_folder(tmp_path))
    assert found.names == ["b", "a"]
    assert found.classes == ["other", "cat", "dog"]
    assert found[0].labels.equal(torch.from_numpy(draw(1, 0, 1, 2, 255)))
    assert found[0].image.equal(harness.read_image(tmp_path / "images" / "b.jpg"))
    assert len(found[0].boxes) == 0
    assert found[1].boxes.tolist() == [[0.5, 1, 4.25, 5]]  # no crowd, none without an area
    assert found[1].box_classes.tolist() == [2]


def test_only_an_image_with_a_row_of_boxes_may_lack_its_label_map(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "labels" / "a.png").unlink()
    item = open_images(tmp_path)[1]
    assert item.labels is None
    assert len(item.boxes) == 1
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 files are missing, such as .*labels/b.png"):
        open_images(tmp_path)


def test_a_folder_may_ignore_another_number(tmp_path):
    text(make_folder(tmp_path) / "classes.json", {"labels": ["other", "cat"], "ignore": 2})
    raw = torch.from_numpy(draw(1, 0, 1, 2, 255))
    assert open_images(tmp_path)[0].labels.equal(torch.where(raw == 2, 255, raw))


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("classes.json", "{", r"classes.json cannot be used \(Expecting"),
        ("classes.json", {"names": []}, r"classes.json cannot be used \(it has no 'labels'\)"),
        ("classes.json", {"labels": ["x"] * 256}, r"2 images and 256 classes"),
        ("splits.json", ["val"], r"splits.json cannot be used \(list indices"),
        ("splits.json", {"val": []}, r"0 images and 3 classes"),
        ("splits.json", {"val": ["a", "z"]}, r"2 files are missing, such as .*images/z.jpg"),
        ("boxes.json", [{"id": "a"}], r"boxes.json cannot be used \(it has no 'objects'\)"),
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


def test_a_box_of_no_class_is_named(tmp_path):
    make_folder(tmp_path)
    rows = [{"box": [0, 0, 2, 2], "cat": 3}]
    text(tmp_path / "boxes.json", [{"id": "a", "objects": rows}])
    with pytest.raises(UserError, match=r"A box of .*a.jpg has the id 3"):
        open_images(tmp_path)[1]


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
    assert found.names == ["a", "b"]  # in the file b is the first
    assert found[0].labels.eq(0).all()
    assert found[0].boxes.shape == (0, 4)


def test_coco_images_may_lie_in_a_folder_of_images(tmp_path):
    make_coco(tmp_path, [])
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    assert len(open_images(tmp_path)) == 1
    (tmp_path / "images" / "val2017" / "a.jpg").rename(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "val2017").rmdir()
    assert len(open_images(tmp_path)) == 1


def test_coco_objects_without_masks_leave_the_boxes_and_no_map(tmp_path):
    rows = [{"category_id": 18, "bbox": [1.5, 2, 3, 2]}]
    item = open_images(make_coco(tmp_path, rows))[0]
    assert item.labels is None
    assert item.boxes.tolist() == [[1.5, 2, 4.5, 4]]
    assert item.box_classes.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category_id": 99}, r"\(it has no 99\)"),
        ({"segmentation": {"size": [4, 4], "counts": "PP1"}}, r"\("),
        ({"bbox": [1, 2]}, r"\(not enough values"),
    ],
    ids=["category", "mask", "box"],
)
def test_a_broken_coco_object_is_one_sentence(change, sentence, tmp_path):
    with pytest.raises(UserError, match="instances_val2017.json cannot be used " + sentence):
        open_images(make_coco(tmp_path, [{**PERSON, **change}]))[0]


def test_panoptic_colors_are_ids_to_the_base_256(tmp_path):
    found = open_images(make_panoptic(tmp_path))
    assert found.classes == ["person", "dog", "rug-merged"]
    expected = torch.full((H, W), 2)
    expected[:2], expected[2, :4], expected[5] = 255, 1, 255  # nothing; a dog; a crowd
    assert found[0].labels.equal(expected)
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
    assert found[0].labels.equal(torch.from_numpy(draw(0, 0, 90, 181, 255)))


def test_voc_palette_numbers_are_the_classes_and_its_boxes_count_from_one(tmp_path):
    make_voc(tmp_path)
    found = open_images(tmp_path)
    assert found.names == ["2007_000033", "2007_000001"]
    assert found.classes[0] == "background"
    assert sorted(found.classes[1:]) == found.classes[1:]
    assert len(found.classes) == 21
    assert found[0].labels.equal(torch.from_numpy(draw(0, 0, 15, 20, 255)))
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
        (voc_object("unicorn", (1, 1, 2, 2)), r"'unicorn' is not in list"),
        (voc_object("cat", (1, 1, 2, "x")), r"could not convert"),
        ("<object>", r"mismatched tag"),
        (None, r"No such file"),
    ],
    ids=["class", "number", "xml", "missing"],
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
    assert found[0].labels.equal(torch.where(raw == 0, 255, raw - 1))


def test_cityscapes_ids_become_train_ids(tmp_path):
    found = open_images(make_cityscapes(tmp_path))
    assert found.names == ["frankfurt/frankfurt_000000_000294", "munster/munster_000001_000294"]
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


# ---- which set, which split ------------------------------------------------------------------
def test_a_folder_without_a_set_is_told_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="must hold one set, not 0") as error:
        open_images(tmp_path)
    assert all(f"{x}: {mark}" in str(error.value) for x, (_, mark) in LAYOUTS.items())
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
        UserError, match=r"choose one of \['ade20k', 'auto', 'cityscapes', 'coco', "
    ):
        open_images(make_folder(tmp_path), layout)
    with pytest.raises(UserError, match=r"choose one of \['auto', 'scenes'\]"):
        open_images(None, "voc")


def test_a_split_is_taken_by_its_whole_name_first_and_else_by_the_only_beginning(tmp_path):
    root = make_folder(tmp_path)
    assert open_images(root, split="val").names == ["b", "a"]  # not "valid"
    assert open_images(root, split="vali").names == ["a"]
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
    assert item.labels.equal(torch.where(raw == 2, 0, 255))
    assert item.box_classes.tolist() == [0]


def test_a_mapping_counts_classes_not_the_numbers_in_the_files(tmp_path, mapping):
    make_ade(tmp_path / "set")
    raw = torch.from_numpy(draw(0, 0, 1, 2, 150))
    text(mapping, {"names": ["building"], "map": {"1": 0}})
    labels = open_images(tmp_path / "set", mapping=mapping)[0].labels
    assert labels.equal(torch.where(raw == 2, 0, 255))


@pytest.mark.parametrize("pairs", [{"3": 0}, {"-1": 0}, {"0": 1}, {"0": -1}, {"x": 0}, {"0": None}])
def test_a_mapping_out_of_range_is_refused(pairs, tmp_path, mapping):
    text(mapping, {"names": ["pet"], "map": pairs})
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


def test_the_module_is_no_command():
    assert "__main__" not in Path(image_sets.__file__).read_text()
