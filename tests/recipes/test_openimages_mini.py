"""OpenImage-MINI: the rule on drawn annotations, the published formats, what can be wrong."""

import csv
import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import openimages_mini
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openimages_mini import COUNTERPARTS, Config, choose, select
from PIL import Image

V4 = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf"
V4 += ",IsDepiction,IsInside"
V6 = V4 + "".join(f",XClick{i}{axis}" for axis in "XY" for i in (1, 2, 3, 4))
NAMES = {
    "/m/01g317": "Person", "/m/04yx4": "Man", "/m/0bt9lr": "Dog", "/m/04rmv": "Mouse",
    "/m/020lf": "Computer mouse", "/m/018xm": "Ball", "/m/02rgn06": "Volleyball (Ball)",
    "/m/0h8n5zk": "Kitchen & dining room table", "/m/07j7r": "Tree", "/m/0dzct": "Human face",
}  # fmt: skip
COCO = {
    "Person": "person", "Man": "person", "Dog": "dog", "Computer mouse": "mouse",
    "Ball": "sports ball", "Volleyball (Ball)": "sports ball",
    "Kitchen & dining room table": "dining table",
}  # fmt: skip
COCO_80 = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").strip().split(", ")  # fmt: skip
# The options without which the command does not start, and wrong ones with their sentences.
NEEDED = ["--boxes", "boxes.csv", "--classes", "classes.csv", "--coco", "coco.json"]
NEEDED += ["--out", "list.txt"]
WRONG = [
    ([*NEEDED, "--seed", "-1"], "--seed is -1"),
    ([*NEEDED, "--out", "list.csv"], "--out is list.csv"),
    ([*NEEDED, "--out", "nowhere/list.txt"], "--out is nowhere/list.txt"),
    ([*NEEDED, "--images", "nowhere"], "--images is nowhere"),
    (["--coco", "coco.json", "--out", "list.txt"], "--boxes is missing: give --boxes, --classes"),
    (["--coco", "coco.json", *NEEDED[:2], "--out", "list.txt"], "--classes is missing"),
    (NEEDED[:6], "--out is missing"),
    (["--coco", "coco.json", "--images", "."], "--images is .: leave it out"),
    (["--coco", "coco.json", "--prefix", "train/"], "--prefix is train/: leave it out"),
    (["--coco", "coco.json", "--mapping", "m.json"], "--mapping is m.json: leave it out"),
]
LIMITS = {"person": 4, "dog": 2, "mouse": 1, "sports ball": 3, "dining table": 1}


def write_boxes(path, images, header=V4, seed=None):
    """The boxes of `images`, {ID: [(class, whether a group)]}; with a seed in another order."""
    labels = {name: label for label, name in NAMES.items()}
    columns, rows = header.split(","), []
    for image, boxes in images.items():
        for name, group in boxes:
            row = dict.fromkeys(columns, "0.25") | {"Source": "xclick", "Confidence": "1"}
            row |= {x: "0" for x in columns if x.startswith("Is")} | {"ImageID": image}
            rows.append(row | {"LabelName": labels[name], "IsGroupOf": str(int(group))})
    if seed is not None:
        random.Random(seed).shuffle(rows)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_coco(path, limits, crowds=(), objects=None, images=1):
    """So many objects of each class, and a crowd of each in `crowds`, in the first image.

    `objects` replaces them: of each its image, its class and whether it is a crowd.
    """
    numbers = {name: 3 * i + 1 for i, name in enumerate(limits)}  # COCO's numbers have gaps
    if objects is None:
        objects = [(0, name, 0) for name, n in limits.items() for _ in range(n)]
        objects += [(0, name, 1) for name in crowds]
    polygon, rle = [[1.5, 2.0, 3.0, 4.0, 5.0, 6.0]], {"counts": [272, 2], "size": [64, 48]}
    annotations = [
        {"segmentation": rle if crowd else polygon, "area": 4.0, "iscrowd": int(crowd), "id": i,
         "image_id": 9 + image, "bbox": [1.0, 2.0, 3.0, 4.0], "category_id": numbers[name]}
        for i, (image, name, crowd) in enumerate(objects)
    ]  # fmt: skip
    categories = [{"supercategory": "x", "id": i, "name": x} for x, i in numbers.items()]
    rows = [
        {"id": 9 + i, "file_name": f"{9 + i:012}.jpg", "height": 64, "width": 48}
        for i in range(images)
    ]
    content = {"images": rows, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps({"info": {}, "licenses": [], **content}))


def write(folder, images, limits=LIMITS, *, crowds=(), header=V4, seed=None, v7=False, **settings):
    """All three files, and the configuration that reads them."""
    boxes = folder / ("boxes.csv.gz" if settings.pop("gz", False) else "boxes.csv")
    write_boxes(boxes, images, header, seed)
    write_coco(folder / "coco.json", limits, crowds)
    lines = ["LabelName,DisplayName"] * v7 + [f"{x},{y}" for x, y in NAMES.items()]
    (folder / "classes.csv").write_text("".join(f"{line}\n" for line in lines))
    paths = {"classes": folder / "classes.csv", "coco": folder / "coco.json"}
    return Config(boxes=boxes, **paths, out=folder / "mini.txt", **settings)


def result(config):
    select(config)
    figures = json.loads(Path(f"{config.out}.json").read_text())
    assert {x.name for x in config.out.parent.glob(".*")} == set()  # no file half written
    return config.out.read_text().splitlines(), figures


def image_id(number):
    return hashlib.md5(str(number).encode()).hexdigest()[:16]


# Many images of a few objects: some limits are reached, some images go without a shared class.
BOXES = st.lists(st.tuples(st.sampled_from([*NAMES.values()]), st.booleans()), max_size=5)
IMAGES = st.lists(BOXES, min_size=1, max_size=12).map(
    lambda drawn: {image_id(i): boxes for i, boxes in enumerate(drawn)}
)
COUNTS = st.fixed_dictionaries({name: st.integers(0, 6) for name in LIMITS})


def shared(boxes, groups=True):
    return Counter(COCO[name] for name, group in boxes if name in COCO and (groups or not group))


def turn(seed, image):
    return hashlib.blake2b(f"{seed} {image}".encode(), digest_size=16).digest()


def slow(images, limits, seed, groups):
    """The rule, one image after the other."""
    used, taken = Counter(), []
    for image in sorted(images, key=lambda x: turn(seed, x)):
        needs = shared(images[image], groups)
        if needs and all(used[x] + n <= limits[x] for x, n in needs.items()):
            used += needs
            taken.append(image)
    return taken, used


@given(IMAGES, COUNTS, st.integers(0, 3), st.booleans(), st.integers(0, 9))
def test_the_rule(tmp_path_factory, images, limits, seed, groups, shuffled):
    folder = tmp_path_factory.mktemp("rule")
    config = write(folder, images, limits, seed=None, groups=groups)
    config = replace(config, seed=seed)
    expected, used = slow(images, limits, seed, groups)
    if not expected:
        with pytest.raises(harness.UserError):
            select(config)
        assert not config.out.exists()
        return
    listed, figures = result(config)
    taken = [line.removesuffix(".jpg") for line in listed]
    assert taken == sorted(expected)
    # What the paper asks for, and that no image could be added.
    assert all(used[x] <= limits[x] for x in limits)
    assert all(shared(images[x], groups) for x in taken)
    for image in images.keys() - {*taken}:
        needs = shared(images[image], groups)
        assert not needs or any(used[x] + n > limits[x] for x, n in needs.items())
    # The figures of Table 2, of all classes.
    objects = [[name for name, group in images[x] if groups or not group] for x in taken]
    assert figures["images"] == len(taken)
    assert figures["objects_per_image"] == pytest.approx(np.mean([len(x) for x in objects]))
    assert figures["categories_per_image"] == pytest.approx(np.mean([len({*x}) for x in objects]))
    assert figures["categories"] == len({name for x in objects for name in x})
    assert {x: y["taken"] for x, y in figures["shared"].items()} == {x: used[x] for x in limits}
    assert {x: y["coco"] for x, y in figures["shared"].items()} == limits
    # The order of the rows is no part of it, even where an image comes back.
    write_boxes(config.boxes, images, seed=shuffled)
    assert result(config) == (listed, figures)


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=9), st.randoms())
def test_choose_gives_each_image_its_turn(needs, shuffled):
    order = list(range(len(needs)))
    shuffled.shuffle(order)
    order = order[: len(order) * 3 // 4 + 1]  # some are not there
    used, expected = np.zeros(3, int), []
    for i in order:
        if any(needs[i]) and (used + needs[i] <= 3).all():
            used += needs[i]
            expected.append(i)
    rows = [(i, c, n) for i, row in enumerate(needs) for c, n in enumerate(row) if n]
    columns = np.array(rows, int).reshape(-1, 3).T
    assert choose(order, *columns, [3, 3, 3]) == expected


@pytest.fixture
def many():
    """Three hundred images, of which the limits admit a few."""
    rng, names = random.Random(0), [*NAMES.values()]
    return {
        image_id(i): [(rng.choice(names), rng.random() < 0.1) for _ in range(rng.randint(1, 5))]
        for i in range(300)
    }


def test_the_seed_fixes_the_list(many, tmp_path):
    config = write(tmp_path, many)
    first, figures = result(config)
    assert (first, figures) == result(config)
    assert len({tuple(result(replace(config, seed=seed))[0]) for seed in range(4)}) == 4
    assert figures["settings"]["seed"] == 0


@pytest.mark.parametrize(
    "form", [{"header": V6}, {"v7": True}, {"gz": True}, {"header": V6, "v7": True, "gz": True}]
)
def test_every_published_format_gives_the_same(many, tmp_path, form):
    expected = result(write(tmp_path, many, header=V4, v7=False))[0]
    assert result(write(tmp_path, many, **form))[0] == expected


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_nothing(many, tmp_path):
    config = write(tmp_path, many, v7=True)
    expected = result(config)
    for path in (config.boxes, config.classes):
        text = path.read_text().replace("\n", "\r\n") + "\r\n"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert result(config) == expected


def test_the_table_names_classes_of_coco_and_no_class_twice():
    assert len(COCO_80) == 80
    assert COUNTERPARTS.keys() <= {*COCO_80}
    names = [y.casefold() for x in COCO_80 for y in COUNTERPARTS.get(x, [x])]
    assert len({*names}) == len(names)
    found = openimages_mini.counterparts(NAMES, dict.fromkeys(COCO_80, 1), {})
    assert found == {label: COCO[name] for label, name in NAMES.items() if name in COCO}


def test_a_class_without_counterpart_is_named_and_the_rest_goes_on(many, tmp_path, capsys):
    expected, _ = result(write(tmp_path, many))
    assert "warning" not in capsys.readouterr().out
    listed, figures = result(write(tmp_path, many, {**LIMITS, "zebra": 7}))
    assert listed == expected
    assert figures["without_counterpart"] == ["zebra"]
    assert figures["shared"].keys() == LIMITS.keys()
    assert figures["shared"]["person"]["openimages"] == ["Man", "Person"]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line and "'zebra'" in line] == lines[:1]
    assert lines[-4].split()[:2] == ["mini.txt", str(len(expected))]
    assert lines[-3].split()[:2] == ["coco.json", "1"]
    assert lines[-2].split()[-4:] == ["146K", "9.1", "3.2", "569"]
    assert lines[-1].split()[-4:] == ["118K", "7.4", "2.95", "80"]


# Objects of COCO: the number of the image, the class, and whether it is a crowd.
OBJECTS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["person", "dog"]), st.booleans()))


@given(OBJECTS, st.booleans())
def test_the_figures_of_coco_are_counted_from_its_objects(tmp_path_factory, objects, groups):
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    write_coco(path, {"person": 0, "dog": 0, "zebra": 0}, objects=objects, images=5)
    counts, figures = openimages_mini.read_coco(path, groups)
    kept = [(image, name) for image, name, crowd in objects if groups or not crowd]
    per_image = [[name for image, name in kept if image == i] for i in range(5)]
    assert counts == {x: [name for _, name in kept].count(x) for x in ("person", "dog", "zebra")}
    assert figures == {
        "images": 5,
        "objects_per_image": pytest.approx(np.mean([len(x) for x in per_image])),
        "categories_per_image": pytest.approx(np.mean([len({*x}) for x in per_image])),
        "categories": len({name for _, name in kept}),
        "images_without_object": sum(not x for x in per_image),
    }


def test_coco_alone_is_counted_and_nothing_is_written(tmp_path, capsys):
    path = tmp_path / "instances_train2017.json"
    objects = [(0, "dog", 0), (0, "dog", 0), (0, "person", 0), (1, "dog", 1)]
    write_coco(path, {"person": 0, "dog": 0}, objects=objects, images=3)
    select(Config(path))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["#Imgs", "#Obj/Img", "#Cat/Img", "#Cat"],
        ["instances_train2017.json", "3", "1.333", "1", "2"],
        ["COCO", "(Table", "2)", "118K", "7.4", "2.95", "80"],
    ]
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    select(Config(path, groups=False))
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["3", "1", "0.6667", "2"]


def test_six_hundred_classes(tmp_path, monkeypatch):
    things = {f"/m/0{i:04}": f"Thing {i}" for i in range(600)}
    monkeypatch.setattr(sys.modules[__name__], "NAMES", {**things, **NAMES})
    images = {"a": [(name, False) for name in [*things.values(), "Dog", "Man", "Dog"]]}
    listed, figures = result(write(tmp_path, images, {"person": 1, "dog": 2}))
    assert listed == ["a.jpg"]
    assert [*figures.values()][:4] == [1, 603, 602, 602]
    assert {x: y["taken"] for x, y in figures["shared"].items()} == {"person": 1, "dog": 2}


def test_groups_and_crowds_are_one_object_or_none(tmp_path):
    images = {"a": [("Dog", True), ("Tree", True)], "b": [("Dog", False), ("Tree", False)]}
    config = write(tmp_path, images, {"dog": 1}, crowds=["dog"])
    listed, figures = result(config)
    assert listed == ["a.jpg", "b.jpg"]
    assert figures["shared"]["dog"]["coco"] == 2
    listed, figures = result(replace(config, groups=False))
    assert listed == ["b.jpg"]
    assert figures["shared"]["dog"] == {"taken": 1, "coco": 1, "openimages": ["Dog"]}
    assert (figures["objects_per_image"], figures["categories"]) == (2, 2)


def test_a_mapping_replaces_the_table_class_by_class(tmp_path):
    names = "Mouse", "Computer mouse", "Man", "Person", "Dog"
    images = {name.replace(" ", "_"): [(name, False)] for name in names}
    config = write(tmp_path, images, {"person": 9, "mouse": 9, "dog": 9})
    assert result(config)[0] == ["Computer_mouse.jpg", "Dog.jpg", "Man.jpg", "Person.jpg"]
    config = replace(config, mapping=tmp_path / "mapping.json")
    config.mapping.write_text('{"mouse": ["MOUSE", "no such class"], "person": []}')
    listed, figures = result(config)
    assert listed == ["Dog.jpg", "Mouse.jpg"]
    assert figures["without_counterpart"] == ["person"]


def test_a_recipe_reads_the_list_of_the_images_that_are_there(tmp_path):
    images = {image_id(i): [("Dog", False)] for i in range(6)}
    (tmp_path / "train").mkdir()
    for i in (1, 2, 4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "train" / f"{image_id(i)}.jpg")
    config = write(tmp_path, images, {"dog": 9}, prefix="train")
    config = replace(config, images=tmp_path / "train")
    listed, _ = result(config)
    assert listed == sorted(f"train/{image_id(i)}.jpg" for i in (1, 2, 4))
    source = harness.FolderImages(config.out)
    assert len(source) == 3
    found = [source[i] for i in range(3)]
    assert {round(image[0].float().mean().item() / 40) for image, _ in found} == {1, 2, 4}
    assert not any(unreadable for _, unreadable in found)
    # An image's turn is the same whichever others are there.
    config = replace(config, coco=tmp_path / "few.json")
    write_coco(config.coco, {"dog": 2})
    assert result(config)[0] == sorted(sorted(listed, key=lambda x: turn(0, Path(x).stem))[:2])


def test_a_failed_run_leaves_the_earlier_list(many, tmp_path):
    config = write(tmp_path, many)
    before = result(config)
    with config.boxes.open("a") as file:
        file.write("0123456789abcdef,xclick,/m/0")  # the file ends in the middle of a row
    with pytest.raises(harness.UserError, match=r"boxes\.csv is not .* columns"):
        select(config)
    assert config.out.read_text().splitlines() == before[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("boxes.csv", None, "cannot be read: No such file"),
        ("classes.csv", None, "cannot be read: No such file"),
        ("coco.json", None, "cannot be read: No such file"),
        ("boxes.csv", "", "boxes.csv is not a file of OpenImages' boxes .*ImageID"),
        ("boxes.csv", "ImageID,LabelName\na,/m/0bt9lr\n", "boxes.csv is not .*IsGroupOf"),
        ("boxes.csv", f"{V4}\n", "names no object"),
        ("boxes.csv", f"{V4}\na,b,c\n", "line 2 has 3 columns"),
        ("boxes.csv", b"\xff\xfe\x00", "boxes.csv is not .*UnicodeDecodeError"),
        ("boxes.csv", f"{V4}\na,x,/m/07j7r{',0' * 10}\n", "No image of .* fits the rule"),
        ("boxes.csv.gz", f"{V4}\n", "cannot be read: Not a gzipped file"),
        ("boxes.csv.gz", gzip.compress(V4.encode())[:-9], "is not a file .*EOFError"),
        ("classes.csv", "Person\nDog\n", "classes.csv is not a list of OpenImages' classes"),
        ("classes.csv", "/m/07j7r,Tree\n", "has no class of .*coco.json"),
        ("classes.csv", "", "has no class of .*coco.json"),
        ("coco.json", "{", "coco.json is not an instances file of COCO .*JSONDecodeError"),
        ("coco.json", "[]", "coco.json is not an instances file"),
        ("coco.json", '{"categories": []}', "coco.json is not an instances file .*annotations"),
        ("coco.json", '{"categories": [{"id": 1}], "annotations": []}', "KeyError: 'name'"),
        ("coco.json", '{"categories": [], "annotations": [{"category_id": 1}]}', "KeyError: 1"),
        ("coco.json", '{"categories": [], "annotations": []}', "KeyError: 'images'"),
        ("coco.json", '{"categories": [], "annotations": [], "images": []}', "names no image"),
        (
            "coco.json",
            '{"categories": [{"id": 1, "name": "a"}], "images": [], '
            '"annotations": [{"category_id": 1, "image_id": 7}]}',
            "coco.json is not an instances file of COCO .*KeyError: 7",
        ),
        ("mapping.json", '{"mouse": "Mouse"}', "mapping.json is not a mapping"),
        ("mapping.json", '{"mouse": [1]}', "mapping.json is not a mapping"),
        ("mapping.json", '["mouse"]', "mapping.json is not a mapping"),
        ("mapping.json", '{"mice": ["Mouse"]}', r"names \['mice'\], which COCO lacks"),
        ("mapping.json", '{"mouse": ["Dog"]}', "'dog' is a counterpart of both 'dog' and 'mouse'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, file, content, message):
    config = write(tmp_path, {"a": [("Dog", False)]})
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    elif content is not None:
        (tmp_path / file).write_bytes(content)
    else:
        (tmp_path / file).unlink()
    if file.startswith("boxes"):
        config = replace(config, boxes=tmp_path / file)
    if file == "mapping.json":
        config = replace(config, mapping=tmp_path / file)
    with pytest.raises(harness.UserError, match=message) as error:
        select(config)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"out": "mini.csv"}, r"--out is .*mini\.csv: give a \.txt file"),
        ({"out": "nowhere/mini.txt"}, "--out is .*: give a file in a folder that exists"),
        ({"images": "nowhere"}, "--images is .*nowhere: give a folder that exists"),
        ({"images": "."}, "No image of .* lies in"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said_in_one_sentence(tmp_path, setting, message):
    config = write(tmp_path, {"a": [("Dog", False)]})
    with pytest.raises(harness.UserError, match=message):
        select(replace(config, **{name: tmp_path / value for name, value in setting.items()}))


def command(*arguments):
    return subprocess.run(
        [sys.executable, openimages_mini.__file__, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_the_command(many, tmp_path):
    config = write(tmp_path, many)
    expected = result(config)
    config.out.unlink()
    files = [f"--{x}={getattr(config, x)}" for x in ("boxes", "classes", "coco", "out")]
    done = command(*files, "--no-groups")
    assert done.returncode == 0, done.stderr
    assert "Table 2" in done.stdout
    assert config.out.read_text().splitlines() == result(replace(config, groups=False))[0]
    assert config.out.read_text().splitlines() != expected[0]
