import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import harness
import numpy as np
import proposals
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from proposals import Config, read_proposals, select
import densekit as dk
from densekit.scenes import sample_scenes

FOLDER = Path(proposals.__file__).parent
NAMES = ["0.png", "a/1.png", "a/b c/2.png", "z.png"]
SMALL = Config(Path(), side=8, workers=1)
# The options without which the command does not start, and wrong ones with their sentences.
NEEDED = ["--data", "photos"]
WRONG = [
    ([*NEEDED, "--longest", "-1"], "--longest is -1"),
    ([*NEEDED, "--side", "-1"], "--side is -1: give 0 pixels or more"),
    ([*NEEDED, "--aspect", "0.3"], "--aspect is 0.3: give 1 or more"),
    ([*NEEDED, "--aspect", "nan"], "--aspect is nan"),
    ([*NEEDED, "--scale", "0.8", "0.3"], "--scale is 0.8 0.3"),
    ([*NEEDED, "--scale", "-0.1", "0.3"], "--scale is -0.1 0.3"),
    ([*NEEDED, "--scale", "0.3", "1.1"], "--scale is 0.3 1.1"),
    ([*NEEDED, "--scale", "nan", "0.8"], "--scale is nan 0.8"),
    ([*NEEDED, "--most", "-1"], "--most is -1"),
    ([*NEEDED, "--workers", "0"], "--workers is 0: give 1 process or more"),
]
EVERY = replace(SMALL, side=0, aspect=1e9, scale=(0.0, 1.0))


@pytest.fixture(scope="module", autouse=True)
def _environment():
    with pytest.MonkeyPatch.context() as patch:  # or the first search would set it for all tests
        patch.setenv("PYTHONPATH", str(FOLDER))
        yield


def draw(count=4, size=(96, 80)):
    drawn = sample_scenes(count, size, generator=torch.Generator().manual_seed(0)).images
    return (drawn * 255).byte().movedim(1, -1).numpy()


def save(folder, names=NAMES):
    for name, image in zip(names, draw(len(names)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "photos")


def run(folder, **changes):
    """What the command leaves for these images."""
    config = replace(SMALL, data=folder, **changes)
    proposals.propose(config)
    return read_proposals(config.out or f"{folder}.proposals.npz")


def lists(found):
    """The boxes of each name."""
    return {
        name: found.boxes[start:stop].tolist()
        for name, start, stop in zip(
            found.names, found.offsets[:-1], found.offsets[1:], strict=True
        )
    }


def same(a, b):
    assert a.names == b.names
    for x, y in zip(a[1:], b[1:], strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def search_by_hand(image, mode="fast"):
    """Every box of selective search, a set of (x0, y0, x1, y1)."""
    finder = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    finder.setBaseImage(np.ascontiguousarray(image[..., ::-1]))
    {"fast": finder.switchToSelectiveSearchFast, "quality": finder.switchToSelectiveSearchQuality}[
        mode
    ]()
    return {(x, y, x + w, y + h) for x, y, w, h in finder.process().tolist()}


def spans(last):
    return st.tuples(st.integers(0, last), st.integers(0, last)).map(sorted)


# ---- the filter --------------------------------------------------------------------------------
@given(
    st.data(),
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.integers(0, 30),
    st.sampled_from(["1", "1.5", "2", "3", "4.35"]),
    st.sampled_from([("0.3", "0.8"), ("0", "1"), ("0.09", "0.29"), ("0.5", "0.5")]),
    st.integers(0, 5),
)
def test_the_filter_keeps_what_a_slow_loop_keeps(data, size, side, aspect, scale, most):
    boxes = st.tuples(spans(size[1]), spans(size[0])).map(
        lambda x: (x[0][0], x[1][0], *x[0][1:], x[1][1])
    )
    boxes = data.draw(st.lists(boxes, max_size=20)) * 2
    kept = set()
    for x0, y0, x1, y1 in boxes:
        width, height = x1 - x0, y1 - y0
        if min(width, height) >= max(side, 1) and max(width, height) <= Fraction(aspect) * min(
            width, height
        ):
            low, share, high = (
                Fraction(scale[0]),
                Fraction(width * height, size[0] * size[1]),
                Fraction(scale[1]),
            )
            if low**2 <= share <= high**2:
                kept.add((x0, y0, x1, y1))
    kept = sorted(kept, key=lambda x: (-(x[2] - x[0]) * (x[3] - x[1]), *x))
    config = Config(
        Path(), side=side, aspect=float(aspect), scale=(float(scale[0]), float(scale[1]))
    )
    array = np.array(boxes, np.int32).reshape(-1, 4)
    found = select(array, size, config)
    assert found.dtype == np.int32
    assert [tuple(box) for box in found.tolist()] == kept
    np.testing.assert_array_equal(select(found, size, config), found)
    np.testing.assert_array_equal(select(array[::-1], size, config), found)
    few = select(array, size, replace(config, most=most))
    np.testing.assert_array_equal(few, found[: most or len(found)])


def test_the_filter_of_the_paper():
    def kept(*box):
        return len(select(np.array([box]), (100, 100), Config(Path()))) == 1

    assert kept(10, 20, 60, 70)
    assert kept(0, 0, 32, 32)  # at the least side; the root of the share is 0.32
    assert not kept(0, 0, 31, 60)
    assert not kept(0, 0, 60, 31)
    assert kept(0, 0, 96, 32)  # three times as wide as high
    assert not kept(0, 0, 97, 32)
    assert not kept(0, 0, 32, 97)
    assert kept(0, 0, 80, 80)  # the largest share
    assert not kept(0, 0, 81, 80)
    assert not len(select(np.array([[0, 0, 32, 32]]), (100, 120), Config(Path())))  # too small


def test_ties_pass_the_filter():
    """Whatever the rounding of 100 x 4.35, or of the root of 0.009 x 0.009."""

    def kept(box, **changes):
        config = Config(Path(), side=1, **changes)
        return len(select(np.array([[0, 0, *box]]), (1000, 1000), config)) == 1

    for share in range(1, 999):
        assert kept((share, share), scale=(share / 1000, share / 1000))
        assert not kept((share, share + 1), scale=(share / 1000, share / 1000))
    for more in range(1, 899):
        options = {"scale": (0.0, 1.0), "aspect": 1 + more / 100}
        assert kept((100, 100 + more), **options)
        assert not kept((100, 101 + more), **options)


# ---- the file ----------------------------------------------------------------------------------
NAME = st.lists(st.sampled_from([b"a", b" ", b"/", b"\xff", "é".encode()]), min_size=1)
NAME = NAME.map(b"".join)


@st.composite
def boxes_of_an_image(draw):
    """The height and the width of an image, and boxes inside of it."""
    height, width = draw(st.tuples(*[st.integers(1, 10**5)] * 2))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, x2 = sorted(draw(st.tuples(*[st.integers(0, width)] * 2)))
        y1, y2 = sorted(draw(st.tuples(*[st.integers(0, height)] * 2)))
        boxes.append((x1, y1, x2, y2))
    return (height, width), boxes


@settings(max_examples=10)
@given(st.dictionaries(NAME, boxes_of_an_image(), min_size=1, max_size=5))
def test_lists_of_any_length_survive_the_file(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("lists")
    (folder / "all.txt").write_bytes(b"\n".join(images))
    settings = {"schema": 1, "mode": "fast", "longest": 640, "side": 8, "aspect": 3.0}
    rows = [settings | {"scale": [0.3, 0.8], "most": 0}]
    rows += [[os.fsdecode(name), *row] for name, row in images.items()]
    partial = folder / "all.txt.proposals.npz.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(folder / "all.txt")  # nothing is left to search
    assert not partial.exists()
    assert found.names == [os.fsdecode(name) for name in images]
    assert found.sizes.tolist() == [list(size) for size, _ in images.values()]
    assert list(lists(found).values()) == [[*map(list, boxes)] for _, boxes in images.values()]
    same(run(folder / "all.txt"), found)  # from the file itself


def test_the_file_is_as_documented(folder):
    found = run(folder)
    with np.load(f"{folder}.proposals.npz", allow_pickle=False) as file:
        assert sorted(file) == sorted(["names", "sizes", "offsets", "boxes", "settings"])
        assert file["names"].dtype.kind == "S"
        assert file["names"].tolist() == harness.FolderImages(folder).names.tolist()
        types = [file[x].dtype for x in ("sizes", "offsets", "boxes")]
        assert types == [np.int32, np.int64, np.int32]
        assert json.loads(str(file["settings"])) == {
            "schema": 1, "mode": "fast", "longest": 640, "side": 8, "aspect": 3.0,
            "scale": [0.3, 0.8], "most": 0,
        }  # fmt: skip
    assert found.names == NAMES
    assert len(found) == 4  # a plain tuple
    assert [path.name for path in sorted(folder.parent.iterdir())] == [
        "photos",
        "photos.proposals.npz",
    ]


NPY = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (0,), }".ljust(127)
    + b"\n"
)


def break_file(path, **changes):
    with np.load(path) as file:
        arrays = {**file, **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no proposals\n"),
        lambda path: path.write_bytes(path.read_bytes()[:300]),
        lambda path: path.write_bytes(NPY),
        lambda path: break_file(path, boxes=None),
        lambda path: break_file(path, settings='{"schema": 2}'),
        lambda path: break_file(path, settings="{}"),
        lambda path: break_file(path, sizes=np.zeros((3, 2), np.int32)),
        lambda path: break_file(path, offsets=np.zeros(5, np.int64)),
        lambda path: break_file(path, offsets=np.array([0, 2, 1, 1, 2])),
        lambda path: break_file(path, offsets=np.array([0, -1, 1, 1, 2])),
        lambda path: break_file(path, offsets=np.array([0, 3, 3, 3, 2])),
        lambda path: break_file(path, offsets=np.array([0, 0.5, 1, 1, 2])),
        lambda path: break_file(path, sizes=np.zeros((4, 2), np.int32)),
        lambda path: break_file(path, names=np.array(["a"] * 4, object)),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, change):
    path = tmp_path / "a.npz"
    arrays = {"sizes": np.ones((4, 2), np.int32), "offsets": np.array([0, 1, 1, 1, 2])}
    arrays |= {"names": np.array([b"a"] * 4), "boxes": np.ones((2, 4), np.int32)}
    np.savez(path, **arrays, settings='{"schema": 1}')
    assert read_proposals(path).names == ["a"] * 4
    change(path)
    with pytest.raises(harness.UserError, match=f"{path} is no proposals file") as error:
        read_proposals(path)
    assert "\n" not in str(error.value)


def test_no_file_is_one_sentence(tmp_path):
    with pytest.raises(harness.UserError, match=r"There is no proposals file .*a\.npz"):
        read_proposals(tmp_path / "a.npz")


def test_importing_needs_no_cv2(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    spec = importlib.util.spec_from_file_location("again", proposals.__file__)
    monkeypatch.setitem(sys.modules, "again", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["again"])


# ---- images for a training ---------------------------------------------------------------------
def test_scenes_have_proposals(monkeypatch):
    plain = harness.image_source(None, scenes=70)
    source = proposals.image_source(None, None, scenes=70)
    assert len(source) == len(source.boxes) == 70
    assert all(torch.equal(a[0], b[0]) for a, b in zip(source, plain, strict=True))
    assert source[69][1] == ()
    with pytest.raises(harness.UserError, match="--data"):
        proposals.image_source(None, None, scenes=0)
    with pytest.raises(harness.UserError, match="--proposals belong to images"):
        proposals.image_source(None, Path("a.npz"), scenes=70)
    asked = []

    def fake(count, size, *, generator, **_):
        asked.append(count)
        used = torch.arange(8) < torch.arange(count)[:, None] % 3  # then a small one, then zeros
        boxes = torch.tensor([0.0, 0.0, 16.0 + len(asked), 32.0]) * used[..., None]
        boxes[:, 3] = torch.tensor([10.0, 10.0, 28.0, 28.0])
        return SimpleNamespace(images=torch.full((count, 3, *size), 0.5), boxes=boxes)

    monkeypatch.setattr(dk, "sample_scenes", fake)
    source = proposals.image_source(None, None, scenes=130)
    assert [len(boxes) for boxes in source.boxes[:64]] == [i % 3 + 4 for i in range(64)]
    assert [source.boxes[i][0, 2] * 64 for i in (1, 65, 129)] == [17, 18, 19]
    others = torch.cat([boxes[-4:] for boxes in source.boxes])
    assert others.amin() >= 0
    assert others.amax() <= 1
    assert len(others.unique(dim=0)) > 400  # of whole pixels, in all places
    assert sum(asked) == 130
    assert max(asked) <= 64  # which bounds the memory


# ---- the search --------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_proposals_are_opencvs_whatever_the_workers(folder, mode, capsys):
    found = run(folder, mode=mode, workers=2)
    line = capsys.readouterr().out
    assert line.startswith(f"4 images, {len(found.boxes)} proposals, {len(found.boxes) / 4:.1f} an")
    assert line.endswith(f"0 images without any, 0 unreadable files: {folder}.proposals.npz\n")
    assert len(found.boxes) > 40
    assert found.sizes.tolist() == [[96, 80]] * 4
    for image, boxes in zip(draw(), lists(found).values(), strict=True):
        every = np.array([*search_by_hand(image, mode)])
        assert boxes == select(every, (96, 80), SMALL).tolist()
        assert np.min(boxes) >= 0
        assert (np.max(boxes, 0)[2:] <= [80, 96]).all()
    same(run(folder, mode=mode, workers=1, out=folder.parent / "one.npz"), found)


def test_a_photograph_that_lies_on_its_side(tmp_path):
    for name in ("lying", "upright"):
        (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw(1)[0]).save(tmp_path / "lying/a.jpg", exif=exif)
    with Image.open(tmp_path / "lying/a.jpg") as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.size == (96, 80)
    upright.save(tmp_path / "upright/a.jpg", format="PNG")
    found = run(tmp_path / "lying")
    assert found.sizes.tolist() == [[80, 96]]
    assert len(found.boxes) > 5
    same(found, run(tmp_path / "upright"))


def test_boxes_of_a_shrunk_image_are_in_its_own_pixels(tmp_path):
    image = draw(1)[0]
    double = tmp_path / "double.png"
    Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(double)
    size, boxes = proposals.search(double, replace(EVERY, longest=96))
    assert size == (192, 160)
    assert {tuple(x) for x in boxes.tolist()} == {
        tuple(2 * y for y in x) for x in search_by_hand(image)
    }
    for longest in (0, 192, 300):
        boxes = proposals.search(double, replace(EVERY, longest=longest))[1]
        full = search_by_hand(image.repeat(2, 0).repeat(2, 1))
        assert {tuple(x) for x in boxes.tolist()} == full
    # A factor that is no integer: inside, and the whole image is whole.
    boxes = proposals.search(double, replace(EVERY, longest=70))[1]
    assert boxes[0].tolist() == [0, 0, 160, 192]
    assert boxes.min() == 0
    assert len(boxes) > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (20, 20)])
def test_images_without_structure_have_few_boxes_or_none(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert proposals.search(tmp_path / "a.png", EVERY)[1].tolist() == [[0, 0, *size]]
    assert proposals.search(tmp_path / "a.png", SMALL)[1].shape == (0, 4)


class Pool:
    """In place of the executor: `answer` each task at once."""

    def __init__(self, *_):
        self.submitted = 0

    def submit(self, search, path, config):
        self.submitted += 1
        future = Future()
        self.answer(future, path.name)
        return future

    def shutdown(self, **_): ...


def test_few_tasks_are_under_way_at_a_time(monkeypatch):
    pool = Pool()
    pool.answer = Future.set_result
    monkeypatch.setattr(proposals, "ProcessPoolExecutor", lambda *_: pool)
    names = [str(i) for i in range(1000)]
    results = proposals.search_all(Path(), names, replace(SMALL, workers=3))
    seen = [next(results)]
    assert 3 < pool.submitted < 20
    seen += results
    assert sorted(seen) == sorted(zip(names, names, strict=True))


def test_what_came_with_the_death_of_a_worker_counts(monkeypatch):
    def answer(future, name):
        if name in "0369":
            future.set_result(name)
        else:
            future.set_exception(BrokenExecutor())

    pool, seen = Pool(), []
    pool.answer = answer
    monkeypatch.setattr(proposals, "ProcessPoolExecutor", lambda *_: pool)
    with pytest.raises(harness.UserError, match="or at one of 1, 2, 4: try fewer"):
        seen.extend(proposals.search_all(Path(), [*"0123456789"], replace(SMALL, workers=3)))
    assert sorted(seen) == [(x, x) for x in "0369"]


# ---- resuming ----------------------------------------------------------------------------------
@pytest.fixture
def searched(monkeypatch):
    """The names that each call searched."""
    calls, search_all = [], proposals.search_all
    monkeypatch.setattr(
        proposals, "search_all", lambda *args: calls.append(args[1]) or search_all(*args)
    )
    return calls


def test_interrupted_and_resumed(folder, monkeypatch, searched, capsys):
    def update(self):
        updates.append(None)
        if len(updates) == 2:
            raise KeyboardInterrupt

    def interrupt():
        updates.clear()
        with monkeypatch.context() as patch:
            patch.setattr(proposals.tqdm, "update", update)
            run(folder)

    updates = []
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not multiprocessing.active_children()
    out = Path(f"{folder}.proposals.npz")
    partial = Path(f"{out}.partial")
    assert not out.exists()
    first, *rows = map(json.loads, partial.read_text().splitlines())
    assert first["schema"] == 1
    done = [name for name, *_ in rows]
    assert len(done) == 2
    lines = partial.read_bytes().splitlines(keepends=True)
    for end in (lines[-1][:-2], b"\xff" * 9, b"[" * 5000):  # cut, or nonsense
        partial.write_bytes(b"".join(lines[:-1]) + end)
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        assert searched[-1] == [name for name in NAMES if name != done[0]]
    whole = partial.read_bytes()
    partial.write_bytes(lines[0][:40])  # not even the settings
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with pytest.raises(harness.UserError, match="other settings"):
        run(folder, most=3)
    partial.write_bytes(whole)
    capsys.readouterr()
    found = run(folder)
    assert len(searched[-1]) == 1
    bar = capsys.readouterr().err
    assert " 3/4 " in bar
    assert " 4/4 " in bar
    assert " 0/4 " not in bar
    assert not partial.exists()
    same(found, run(folder, out=folder.parent / "whole.npz"))


def test_new_files_are_added_and_lost_ones_dropped(folder, searched):
    run(folder)
    stamps = lists(run(folder))
    assert searched == [NAMES, []]
    (folder / "0.png").unlink()
    (folder / "a/1.png").write_bytes(b"lost")  # is in the file already
    Image.fromarray(draw(5)[4]).save(folder / "m.png")
    (folder / "bad.png").touch()
    found = run(folder)
    assert searched[2:] == [["bad.png", "m.png"]]
    assert found.names == ["a/1.png", "a/b c/2.png", "m.png", "z.png"]
    assert {name: boxes for name, boxes in lists(found).items() if name in stamps} == {
        name: boxes for name, boxes in stamps.items() if name != "0.png"
    }
    unreadable = Path(f"{folder}.proposals.unreadable.txt")
    assert unreadable.read_text().startswith(f"{folder / 'bad.png'}: ")
    Image.fromarray(draw(5)[4]).save(folder / "bad.png")  # mended
    assert lists(run(folder))["bad.png"] == lists(found)["m.png"]
    assert searched[3:] == [["bad.png"]]
    assert not unreadable.read_text()


@pytest.mark.parametrize("end", ["", ".partial"])
def test_other_settings_are_refused(folder, end, monkeypatch):
    run(folder, mode="fast")
    path = Path(f"{folder}.proposals.npz")
    if end:
        path.unlink()
        monkeypatch.setattr(proposals, "search", die)
        with pytest.raises(harness.UserError, match="A worker process died"):
            run(folder)
    files = sorted(folder.parent.iterdir())
    changes = {"mode": "quality", "most": 7, "workers": 2}
    with pytest.raises(harness.UserError, match="other settings") as error:
        run(folder, **changes)
    assert f"{path}{end} has" in str(error.value)
    assert "(mode = 'fast', now 'quality', most = 0, now 7)" in str(error.value)
    assert sorted(folder.parent.iterdir()) == files


# ---- what can go wrong -------------------------------------------------------------------------
def die(path, config):
    if path.name == "2.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return proposals.search(path, config)


def lack(path, config):
    raise AttributeError("module 'cv2' has no attribute 'ximgproc'")


def test_a_worker_that_dies_is_one_sentence_and_loses_nothing(folder, monkeypatch, searched):
    with monkeypatch.context() as patch:
        patch.setattr(proposals, "search", die)
        with pytest.raises(harness.UserError) as error:
            run(folder)
    assert str(error.value) == (
        "A worker process died, out of memory or at one of a/b c/2.png: try fewer --workers, or "
        "without that image."
    )
    assert not multiprocessing.active_children()
    found = run(folder)
    assert searched == [NAMES, NAMES[2:]]
    same(found, run(folder, out=folder.parent / "whole.npz"))


def test_opencv_without_its_contributions_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(proposals, "search", lack)
    with pytest.raises(harness.UserError, match="opencv-contrib-python-headless is missing"):
        run(folder)


def test_bad_files_are_named_and_skipped(folder, capsys):
    good = run(folder, out=folder.parent / "good.npz")
    (folder / "1-half.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    (folder / "a/0-empty.jpg").touch()
    (folder / "link.jpg").symlink_to("nowhere.jpg")
    (folder / os.fsdecode(b"\xff.jpg")).write_text("text")
    capsys.readouterr()
    same(run(folder, workers=2), good)
    assert ", 4 unreadable files: " in capsys.readouterr().out
    lines = Path(f"{folder}.proposals.unreadable.txt").read_bytes().splitlines()
    names = [b"1-half.png", b"a/0-empty.jpg", b"link.jpg", rb"\xff.jpg"]  # the last is escaped
    for line, name in zip(lines, names, strict=True):
        path, reason = line.split(b": ", 1)
        assert path == bytes(folder) + b"/" + name
        assert len(reason) > 3


def test_a_list_of_images(folder):
    everything = run(folder)
    (folder / "some.txt").write_text("z.png\nlost.png\n\na/1.png\nz.png\n")
    found = run(folder / "some.txt")
    assert found.names == ["z.png", "a/1.png"]
    assert lists(found) == {name: lists(everything)[name] for name in found.names}


def test_nothing_readable_is_one_sentence(tmp_path):
    (tmp_path / "bad").mkdir()
    with pytest.raises(harness.UserError, match="No image file"):
        run(tmp_path / "bad")
    with pytest.raises(harness.UserError, match="does not exist"):
        run(tmp_path / "lost")
    (tmp_path / "bad/a.png").touch()
    for _ in range(2):
        with pytest.raises(
            harness.UserError, match=r"No image of .* is readable, such as .*a\.png: "
        ):
            run(tmp_path / "bad")
    assert [x.name for x in tmp_path.iterdir() if x.is_file()] == ["bad.proposals.unreadable.txt"]


def test_a_folder_that_does_not_exist_is_none_to_write_to(folder):
    with pytest.raises(harness.UserError, match=r"--out leads to /nowhere/a\.npz, which cannot"):
        run(folder, out=Path("/nowhere/a.npz"))


def test_a_folder_is_no_file_to_write(folder):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(harness.UserError) as error:
        run(folder, out=folder.parent)
    parent = folder.parent
    example = parent / "photos.proposals.npz"
    assert str(error.value) == (
        f"--out is {parent}: give a file, such as {example}, instead of a folder."
    )
    (parent / "photos.proposals.npz").mkdir()  # where the file goes without --out
    with pytest.raises(harness.UserError, match="instead of a folder"):
        run(folder)
    (parent / "photos.proposals.npz").rmdir()
    assert sorted(parent.rglob("*")) == before


# ---- the command -------------------------------------------------------------------------------
def start(*arguments):
    return subprocess.Popen(
        [sys.executable, FOLDER / "proposals.py", *map(str, arguments)], start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script's & ignores it
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip


def test_ctrl_c_ends_the_command_at_once_and_loses_nothing(tmp_path, searched):
    names = [f"{i:02}.png" for i in range(30)]
    folder, out = save(tmp_path / "photos", names), tmp_path / "a.npz"
    os.mkfifo(folder / "never.png")  # whoever reads it waits: the command cannot end by itself
    options = ["--side", 8, "--mode", "quality", "--workers", 2]
    process = start("--data", folder, "--out", out, *options)
    partial = Path(f"{out}.partial")
    deadline = time.monotonic() + 100
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all
    _, errors = process.communicate(timeout=20)  # the workers are gone too: they hold the pipe
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "error: interrupted"
    kept = partial.read_bytes().count(b"\n") - 1
    assert 3 <= kept <= 30
    (folder / "never.png").unlink()
    found = run(folder, out=out, mode="quality")
    assert len(searched[0]) == 30 - kept
    assert found.names == names
    assert (
        lists(found)["07.png"]
        == proposals.search(folder / "07.png", replace(SMALL, mode="quality"))[1].tolist()
    )
