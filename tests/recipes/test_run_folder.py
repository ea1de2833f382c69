"""A run folder under fire: changed files, broken bytes, full disks, two owners, odd processes."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import d3ssl
import harness
import minimal
import pytest
import torch
import torch._dynamo  # before any fork: importing it in the children takes long
import torch.distributed as dist
from downstream import bands
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_d3ssl import SMALL as D3SSL
from test_harness import ALONE, Config, build, in_a_fork, on_processes, rows, train

# Python 3.12 warns of any fork beside threads; these children touch nothing that a thread holds.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


# ---- the files of a run ----------------------------------------------------------------------
@dataclass(frozen=True)
class Labels:
    data: Path | None = None
    split: str = "val"
    annotations: tuple[str, ...] = ("train.json", "val")


@dataclass(frozen=True)
class Named:
    data: Path | None = None
    mapping: Path | None = None
    weights: str | None = None
    encoder: str = "random:tiny"
    labels: Labels = field(default_factory=Labels)
    changed_data: bool = False


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def begin(run, config, **options):
    """Open a run folder as if a run had begun, and leave it; what it says against it."""
    try:
        with harness.Run(run, config, ALONE, **options):
            (run / "metrics.jsonl").touch()
    except harness.UserError as error:
        return str(error)
    return ""


NAMES = st.sampled_from(["a.png", "b.png", "c.jpg", "inner/a.png", "inner/d.tif"])
CONTENTS = st.sampled_from([b"", b"one", b"two", b"three"])
IMAGES = st.dictionaries(NAMES, CONTENTS, min_size=1)


@given(IMAGES, IMAGES, st.sets(st.sampled_from(["notes.md", ".hidden.png", "x/.y.png"])))
def test_a_run_goes_on_exactly_with_the_images_that_it_had(tmp_path_factory, old, new, others):
    folder = tmp_path_factory.mktemp("run")
    config = Named(folder / "images")
    fill(config.data, old)
    assert begin(folder / "run", config) == ""
    shutil.rmtree(config.data)
    fill(config.data, {**new, **dict.fromkeys(others, b"no image")})
    told = begin(folder / "run", config)
    assert (told == "") == (old == new)
    if len(old) != len(new):
        assert f"--data: {len(old)} images then, {len(new)} now" in told
    elif set(old) != set(new):
        assert "--data: images of other names now" in told
    elif old != new:
        assert "--data: another content now" in told
    if told:
        assert begin(folder / "run", replace(config, changed_data=True)) == ""
        assert begin(folder / "run", config) == told  # no step was made with the new ones


@pytest.fixture
def named(tmp_path):
    """A configuration with files of every kind, as the run folder knows them."""
    fill(
        tmp_path,
        {
            "images/1.png": b"one",
            "list.txt": b"images/1.png\n",
            "mapping.json": b"{}",
            "weights.pth": bytes(2**20),
            "encoder.safetensors": b"ours",
            "encoder.json": b"0",
            "labeled/train.json": b"1",
            "labeled/classes.json": b"[]",
            "labeled/1.png": b"map",
            "other/1.png": b"one",
        },
    )
    return Named(
        tmp_path / "images",
        tmp_path / "mapping.json",
        f"timm:resnet18:{tmp_path / 'weights.pth'}",
        str(tmp_path),
        Labels(tmp_path / "labeled"),
    )


def write_middle(path):
    with path.open("r+b") as file:
        file.seek(2**19)
        file.write(b"1")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "mapping.json").write_text("[]"), "--mapping: another content"),
        (lambda folder: write_middle(folder / "weights.pth"), "--weights: another content now"),
        (lambda folder: (folder / "encoder.json").write_text("1"), "--encoder: another content"),
        (
            lambda folder: (folder / "labeled/train.json").write_text("2"),
            "--labels.annotations: another",
        ),
        (
            lambda folder: (folder / "labeled/classes.json").write_text("{}"),
            "--labels.data: another content now",
        ),
        (
            lambda folder: (folder / "labeled/boxes.json").touch(),
            "--labels.data: 2 label files then, 3 now",
        ),
        (lambda folder: (folder / "labeled/1.png").unlink(), "--labels.data: 1 images then, 0 now"),
        (lambda folder: shutil.rmtree(folder / "images"), "--data: no such file or folder now"),
        (lambda folder: os.utime(folder / "images/1.png", (0, 0)), ""),
    ],
)
def test_every_option_that_names_files_is_watched(tmp_path, named, change, told):
    assert begin(tmp_path / "run", named) == ""
    change(tmp_path)
    found = begin(tmp_path / "run", named)
    assert told in found
    assert bool(told) == bool(found)


def test_the_place_counts_and_not_its_spelling(tmp_path, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to("images")
    (tmp_path / "other/images").mkdir()
    shutil.copy("images/1.png", "other/images/1.png")
    assert begin(run, named) == ""
    for same in (Path("images"), Path("link"), Path("other/../images")):
        assert begin(run, replace(named, data=same)) == ""
    elsewhere = begin(run, replace(named, data=Path("other")))
    assert f"--data: {tmp_path / 'images'} then, {tmp_path / 'other'} now" in elsewhere
    monkeypatch.chdir(tmp_path / "other")
    assert "--data: " in begin(run, replace(named, data=Path("images")))
    assert "data = " in begin(run, replace(named, data=None))
    assert "labels.data = " in begin(run, replace(named, labels=Labels()))


def test_a_list_counts_with_its_images(tmp_path, named):
    config = replace(named, data=tmp_path / "list.txt")
    assert begin(tmp_path / "run", config) == ""
    fill(tmp_path, {"images/1.png": b"two"})
    assert "--data: another content now" in begin(tmp_path / "run", config)
    fill(tmp_path, {"images/1.png": b"one", "list.txt": b"images/1.png\nimages/2.png\n"})
    assert "--data: 1 names then, 2 now" in begin(tmp_path / "run", config)


@given(st.sampled_from(["0.npy", "b.tif", "inner/b.TIFF", "inner/c.NPY"]), CONTENTS)
def test_arrays_count_where_a_recipe_reads_them(tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("run")
    config = Named(folder / "images", labels=Labels(folder / "images"))
    fill(config.data, {"a.tif": b"one", "inner/a.npy": b"one"})
    read_by = {"bands": bands.EXTENSIONS, "pictures": harness.EXTENSIONS}
    for run, extensions in read_by.items():
        assert begin(folder / run, config, extensions=extensions) == ""
    fill(config.data, {name: content})
    count = {"bands": 2, "pictures": 1}
    for run, extensions in read_by.items():
        told = begin(folder / run, config, extensions=extensions)
        is_read = name.lower().endswith(extensions)
        assert (told == "") == (not is_read)
        if is_read:
            assert f"--data: {count[run]} images then, {count[run] + 1} now" in told
            assert "--labels.data: " in told
    (config.data / name).unlink()
    fill(config.data, {"inner/a.npy": b"two"})
    assert "another content" in begin(folder / "bands", config, extensions=bands.EXTENSIONS)
    assert begin(folder / "pictures", config) == ""


@pytest.mark.parametrize("name", ["first.json", "last.json"])
def test_each_of_several_annotation_files_is_watched(tmp_path, name):
    fill(tmp_path, {"first.json": b"1", "last.json": b"1", "labeled/1.png": b"map"})
    names = (str(tmp_path / "first.json"), str(tmp_path / "last.json"))
    config = Named(labels=Labels(tmp_path / "labeled", annotations=names))
    assert begin(tmp_path / "run", config) == ""
    fill(tmp_path, {name: b"2"})
    found = begin(tmp_path / "run", config)
    assert "--labels.annotations" in found
    assert "another content now" in found


def test_labels_behind_a_link_are_watched(tmp_path, named):
    fill(tmp_path, {"elsewhere/a.json": b"1", "elsewhere/B.JSON": b"1"})
    (named.labels.data / "more").symlink_to(tmp_path / "elsewhere")
    assert begin(tmp_path / "run", named) == ""
    fill(tmp_path, {"elsewhere/B.JSON": b"2"})
    assert "--labels.data: another content now" in begin(tmp_path / "run", named)


def test_new_files_are_noted_once_the_run_goes_on_with_them(tmp_path, named, capsys):
    run = tmp_path / "run"
    assert begin(run, named) == ""
    fill(tmp_path, {"images/2.png": b"two"})
    refused = begin(run, named)
    assert refused.count("\n") == 0
    assert "go on with them by --changed-data, or choose another with --run" in refused
    net, optimizer = build("sgd", 0.1)
    with harness.Run(run, replace(named, changed_data=True), ALONE) as opened:
        opened.resume(net, optimizer)
    assert "goes on with other files (--data: 1 images then, 2 now)" in capsys.readouterr().err
    assert begin(run, named) == ""


def test_a_run_of_an_older_version_goes_on_with_a_warning(tmp_path, named, capsys):
    run = tmp_path / "run"
    assert begin(run, named) == ""
    stored = json.loads((run / "config.json").read_text())
    del stored["fingerprint"], stored["changed_data"]
    (run / "config.json").write_text(json.dumps(stored))
    assert begin(run, named) == ""
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "an older version" in warning


def test_a_run_folder_among_the_images_holds_no_images(tmp_path):
    fill(tmp_path, {"1.png": b"", "runs/x/pictures/2.png": b"", "runs/y/3.png": b""})
    fill(tmp_path, {"runs/x/config.json": b"{}", "runs/x/metrics.jsonl": b""})
    assert harness.list_images(tmp_path) == ["1.png", "runs/y/3.png"]


def test_d3ssl_names_the_proposals_that_it_finds_by_itself(tmp_path, monkeypatch):
    given = {}

    def stop(folder, config, world, *, files):
        given.update(files)
        raise KeyError

    monkeypatch.setattr(harness, "Run", stop)
    with pytest.raises(KeyError):
        d3ssl.train(replace(D3SSL, data=tmp_path / "im", run=tmp_path / "run"))
    assert given == {"proposals": tmp_path / "im.proposals.npz"}


# ---- broken bytes ----------------------------------------------------------------------------
STEPS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder with the checkpoints of steps 7 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with harness.process_group("cpu") as world:
        train(world, folder, Config(), steps=STEPS)
    return folder


def resume(folder):
    """The step that a run resumes from."""
    with harness.process_group("cpu") as world:
        return resume_on(world, folder)


def resume_on(world, folder):
    net, optimizer = build("sgd", 0.05)
    teacher, _ = build("sgd", 0.05)
    queue = {"bank": torch.zeros(16, 4), "position": torch.tensor(0)}
    with harness.Run(folder, Config(), world) as run:
        return run.resume(net, optimizer, teacher=teacher, queue=queue)


def copy_of(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "run"
    return Path(shutil.copytree(whole, folder))


@st.composite
def damages(draw):
    """A function that damages a file, and its description."""
    kind = draw(st.sampled_from(["cut", "flip", "delete", "append", "empty"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    bit = draw(st.integers(0, 7))

    def damage(path):
        content = bytearray(path.read_bytes())
        index = int(place * len(content))
        if kind == "delete":
            path.unlink()
            return
        if kind == "flip":
            content[index] ^= 1 << bit
        elif kind == "append":
            content += b"\0"
        else:
            del content[0 if kind == "empty" else index :]
        path.write_bytes(content)

    damage.__name__ = f"{kind} at {place}"
    return damage


@given(st.sampled_from([".metadata", "__0_0.distcp", "row.json", "checksums.json"]), damages())
def test_a_broken_checkpoint_is_named_and_the_older_one_taken(
    tmp_path_factory, whole, name, damage
):
    folder = copy_of(whole, tmp_path_factory)
    newest = folder / "checkpoints" / "step-00000008"
    damage(newest / name)
    found = harness.damage_of(newest)
    if found:
        assert "\n" not in found
        assert resume(folder) == 7
        assert [x.name for x in sorted(newest.parent.iterdir())] == [
            "broken-step-00000008", "step-00000007",
        ]  # fmt: skip
        assert rows(folder)[-1]["step"] == 6
    else:  # white space, or a name of what is not read; without sums the rest is looked at
        assert name == "checksums.json"
        assert resume(folder) == 8


ROWS = [
    b"", b"5", b'"abc"', b"null", b'{"a": 1}', b'["a"]', b"[[]]", b"[{}]",
    b'[{"terms": ["loss"], "steps": 0, "sums": [[1]]}]',
    b'[{"terms": ["loss"], "steps": true, "sums": [[1]]}]',
    b'[{"terms": ["loss"], "steps": 1, "sums": []}]',
    b'[{"terms": ["loss"], "steps": 1, "sums": [[1, 2]]}]',
    b'[{"terms": ["loss"], "steps": 1, "sums": [["1"]]}]',
    b'[{"terms": ["loss"], "steps": 1, "sums": [[NaN]]}]',
    b'[{"terms": [5], "steps": 1, "sums": [[1]]}]',
    b'[{"terms": "l", "steps": 1, "sums": ["a"]}]',
]  # fmt: skip


@pytest.mark.parametrize("content", ROWS)
def test_a_row_that_is_none_is_damage(tmp_path, content):
    (tmp_path / "row.json").write_bytes(content)
    with pytest.raises(Exception, match=r"^[^\n]+$"):
        harness._read_row(tmp_path)


def test_a_checkpoint_without_sums_whose_row_is_none_is_passed_over(tmp_path_factory, whole):
    folder = copy_of(whole, tmp_path_factory)
    newest = folder / "checkpoints" / "step-00000008"
    (newest / "checksums.json").unlink()
    (newest / "row.json").write_text('["abc"]')
    assert resume(folder) == 7


def test_a_checkpoint_that_was_renamed_is_of_no_other_step(tmp_path_factory, whole, capsys):
    folder = copy_of(whole, tmp_path_factory)
    places = folder / "checkpoints"
    (places / "step-00000007").rename(places / "step-00000012")
    assert resume(folder) == 8
    assert "step-00000012 is broken (it was renamed, and is of step 7)" in capsys.readouterr().err
    sums = json.loads((places / "step-00000008" / "checksums.json").read_text())
    assert sums.pop("step") == 8
    (places / "step-00000008" / "checksums.json").write_text(json.dumps(sums))
    assert resume(folder) == 8  # as of an older version


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [None, b"", b"half"])
def test_a_broken_checkpoint_without_checksums_is_passed_over_too(
    tmp_path_factory, whole, name, content, capsys
):
    folder = copy_of(whole, tmp_path_factory)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "checksums.json").unlink()
    broken = folder / "checkpoints" / "step-00000008" / name
    broken.unlink() if content is None else broken.write_bytes(content)
    assert resume(folder) == 7
    said = capsys.readouterr().err.splitlines()
    assert "step-00000008 is broken (" in said[0]
    assert "goes on from step-00000007" in said[0]
    assert "not verified" in said[1]


def test_without_a_whole_checkpoint_nothing_is_begun_anew(tmp_path_factory, whole):
    folder = copy_of(whole, tmp_path_factory)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / ".metadata").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(harness.UserError, match=r"is whole \(step-00000008: .metadata is missing;"):
        resume(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_strange_names_and_lines_are_skipped(tmp_path_factory, whole, capsys):
    folder = copy_of(whole, tmp_path_factory)
    places = folder / "checkpoints"
    for name in ("step-old.tar", "step-00000099", ".DS_Store", "step-00000099.txt"):
        (places / name).write_text("a file")
    for name in ("step-", "step-000010.tmp", "step-00000012-epoch-", "best", "step-00000099-copy"):
        (places / name).mkdir()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    strange = [
        b"\xff\n",
        b"[1]\n",
        b"{}\n",
        b'{"step": "1"}\n',
        b'{"step": 1, "loss": "low"}\n',
        b'{"step": 1, "loss": null}\n',
        b'{"step": 1, "probe_miou": [1]}\n',
        b"[" * 5000 + b"\n",
        b"NaN\n",
        b"\n",
    ]
    content = b"".join([strange[0], lines[0], *strange[1:], *lines[1:], b'{"step": 9'])
    (folder / "metrics.jsonl").write_bytes(content)
    assert resume(folder) == 8
    assert (folder / "metrics.jsonl").read_bytes() == b"".join(lines)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"{len(strange)} lines" in warning
    with harness.process_group("cpu") as world:  # saves, and removes no strange name
        train(world, folder, Config(), steps=12)
    assert (places / "step-old.tar").exists()
    assert (places / "step-00000099-copy").exists()


def test_rows_that_lack_a_number_are_not_printed(tmp_path_factory, whole, capsys):
    folder = copy_of(whole, tmp_path_factory)
    lines = [
        b'{"step": 1, "probe_miou": 0.5}\n',
        b'{"step": 2, "probe_miou": 0.25, "prior_miou": 0.125}\n',
        b'{"step": 3, "probe_miou": NaN, "prior_miou": "x"}\n',
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    with harness.Run(folder, Config(), ALONE) as run:
        assert [row["step"] for row in run.rows("probe_miou")] == [1, 2]
        harness.print_probes(run, "; {prior_miou}")
    assert capsys.readouterr().out.count("probe mIoU") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 5000])
def test_a_broken_configuration_is_a_sentence(tmp_path_factory, whole, content):
    folder = copy_of(whole, tmp_path_factory)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(harness.UserError, match=r"config\.json cannot be read \([^\n]*\): restore"):
        resume(folder)


# ---- code in a checkpoint --------------------------------------------------------------------
class Code:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_does_not_run(tmp_path_factory, whole):
    folder = copy_of(whole, tmp_path_factory)
    newest = folder / "checkpoints" / "step-00000008"
    metadata = harness.PlainReader(newest).read_metadata()
    metadata.planner_data = Code(folder / "ran")
    (newest / ".metadata").write_bytes(pickle.dumps(metadata))
    harness.write_checksums(newest)  # by somebody who knows of them
    assert "mkdir" in harness.damage_of(newest)
    assert resume(folder) == 7
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("pathlib", "os.PathLike"),
    ],
)
def test_no_other_name_is_read(module, name):
    content = b"c" + f"{module}\n{name}\n".encode() + b"."
    with pytest.raises((pickle.UnpicklingError, AttributeError)):
        harness.PlainUnpickler(io.BytesIO(content)).load()


def test_code_in_the_state_of_the_optimizer_does_not_run(tmp_path):
    with harness.process_group("cpu"):
        state = {"optimizer": (Code(tmp_path / "ran"),)}
        harness.dcp.save(state, checkpoint_id=tmp_path / "step")
        with pytest.raises(harness.dcp.api.CheckpointException, match="mkdir"):
            harness.dcp.load(
                {"optimizer": ()},
                storage_reader=harness.PlainReader(tmp_path / "step"),
                planner=harness.PlainPlanner(),
            )
    assert not (tmp_path / "ran").exists()


# ---- a disk that fails -----------------------------------------------------------------------
def trained_to(folder, steps):
    """A whole run as a command makes it."""
    with harness.process_group("cpu") as world:
        train(world, folder, Config(), steps=steps)


def train_with_files_of(folder, most, steps):
    """The exit code of a process whose files may have `most` bytes, as on a full disk; its words.

    They go through a pipe, which has no limit.
    """
    receiver, sender = os.pipe()

    def child():
        sys.stderr = os.fdopen(sender, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        os._exit(harness.main(lambda steps: trained_to(folder, steps), steps))

    code = in_a_fork(child)
    os.close(sender)
    with open(receiver) as said:
        return code, said.read()


@pytest.mark.parametrize("most", [0, 8, 600, 3000])
def test_a_disk_that_is_full_is_one_sentence(tmp_path, most):
    """No byte; the lock alone; the configuration; and half of a checkpoint."""
    folder = tmp_path / "run"
    code, said = train_with_files_of(folder, most, 4)
    assert code == 2
    assert said.count("\n") == 1
    assert f"{folder} cannot be read or written (" in said
    assert "File too large" in said
    assert "none is saved" in said
    assert not list(folder.glob("checkpoints/*"))
    trained_to(folder, 4)  # there is space again
    assert rows(folder)[-1]["step"] == 4


def test_a_disk_that_gets_full_keeps_the_last_checkpoint(tmp_path_factory, whole):
    folder = copy_of(whole, tmp_path_factory)
    code, said = train_with_files_of(folder, 3000, 12)
    assert code == 2
    assert f"last good checkpoint is {folder}/checkpoints/step-00000008." in said
    assert sorted(x.name for x in (folder / "checkpoints").iterdir()) == [
        "step-00000007", "step-00000008",
    ]  # fmt: skip
    trained_to(folder, 12)


@pytest.mark.parametrize("place", ["log", "curves", "picture", "unreadable", "other", "elsewhere"])
def test_whatever_is_written_to_a_run_folder_may_fail(tmp_path, place):
    """Also by the code in the `with`; but an error of other files is none of the run folder."""
    folder = tmp_path / "run"
    net, optimizer = build("sgd", 0.1)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def use(run):
        run.resume(net, optimizer)
        if place == "log":
            run._metrics = SimpleNamespace(write=fails)
            run.log(1, loss=1.0)
        elif place == "curves":
            run._curves.add_scalar = fails
            run.log(1, loss=1.0)
        elif place == "picture":
            (folder / "pictures").touch()
            run.picture_path(1)
        elif place == "unreadable":
            (folder / "unreadable.txt").mkdir()
            run.note_unreadable(["a.png: broken"])
        elif place == "other":
            torch.save(torch.zeros(100_000), "/dev/full")
        else:
            (tmp_path / "nowhere").read_bytes()

    expected = FileNotFoundError if place == "elsewhere" else harness.UserError
    with (
        harness.process_group("cpu") as world,
        pytest.raises(expected, match=r"cannot be read or written|nowhere"),
        harness.Run(folder, Config(), world) as run,
    ):
        use(run)


# ---- owners ----------------------------------------------------------------------------------
def owner(folder, ready):
    """A process that owns a run folder, with a process of its own, in the middle of a save."""
    with harness.Run(folder, Config(), ALONE):
        if os.fork() == 0:  # as a loader process that does not end
            time.sleep(20)
            os._exit(0)
        (folder / "checkpoints" / ".step-00000012").mkdir(parents=True)
        ready.touch()
        time.sleep(20)


def test_a_run_folder_has_one_owner_until_that_has_died(tmp_path, whole, tmp_path_factory):
    folder = copy_of(whole, tmp_path_factory)
    ready = tmp_path / "ready"
    process = torch.multiprocessing.get_context("fork").Process(target=owner, args=(folder, ready))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        in_use = rf"{folder} is in use by another process \({process.pid} on "
        for config in (Config(), Config(scale=(0.5, 1.0))):
            with pytest.raises(harness.UserError, match=in_use):
                harness.Run(folder, config, ALONE)
        assert (folder / "checkpoints" / ".step-00000012").exists()
    finally:
        process.kill()
        process.join()
    with harness.Run(folder, Config(), ALONE):
        assert not (folder / "checkpoints" / ".step-00000012").exists()
        with pytest.raises(harness.UserError, match="in use"):
            harness.Run(folder, Config(), ALONE)
    with harness.Run(folder, Config(), ALONE):  # who was refused has not opened it for others
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path_factory, whole, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    folder = copy_of(whole, tmp_path_factory)
    (folder / "checkpoints" / ".step-00000012").mkdir()  # it may be of a save that goes on
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with harness.Run(folder, Config(), ALONE):
        assert (folder / "checkpoints" / ".step-00000012").exists()
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 1
    trained_to(folder, 12)  # and the save of this step replaces it
    assert not (folder / "checkpoints" / ".step-00000012").exists()


@pytest.mark.parametrize(
    ("size", "rank", "launcher"),
    [
        ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
        ("PMI_SIZE", "PMI_RANK", "mpiexec"),
    ],
)
def test_other_launchers_than_torchrun_are_told_apart(monkeypatch, size, rank, launcher):
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "1")
    with harness.process_group("cpu"):
        pass
    monkeypatch.setenv(size, "2")
    with (
        pytest.raises(harness.UserError, match=f"{launcher} has started 2 .*: start with torchrun"),
        harness.process_group("cpu"),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(harness.UserError, match="RANK is set, and WORLD_SIZE and MASTER_ADDR and"):
        harness.check_launcher()
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    harness.check_launcher()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv(rank)  # as in the shell of an allocation
    harness.check_launcher()


def test_a_port_in_use_is_a_sentence(monkeypatch):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": used.getsockname()[1]}
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, **place}.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(harness.UserError, match=r"in use[^\n]*another --master-port"),
            harness.process_group("cpu"),
        ):
            pass


# ---- processes that differ -------------------------------------------------------------------
def open_differently(world, cases):
    told = []
    for folder, configs in cases:
        try:
            with harness.Run(folder, configs[world.rank], world):
                told.append("")
        except harness.UserError as error:
            told.append(str(error))
    return told


def test_processes_with_other_options_or_files_all_say_so(tmp_path, named):
    fill(tmp_path, {"more/1.png": b"one", "more/2.png": b"two", "same/1.png": b"one"})
    fill(tmp_path, {"renamed/2.png": b"one", "edited/1.png": b"two"})
    data = [replace(named, data=tmp_path / name) for name in ("more", "same", "renamed", "edited")]
    config = Config()
    pairs = [
        (config, replace(config, scale=(0.5, 1.0))),
        (config, replace(config, log_every=3)),
        (config, replace(config, workers=3)),
        (named, data[0]),
        (named, data[1]),
        (named, data[2]),
        (named, data[3]),
        (named, replace(named, mapping=None)),
    ]
    cases = [(tmp_path / f"run-{number}", pair) for number, pair in enumerate(pairs)]
    first, second = on_processes(2, tmp_path, open_differently, cases)
    assert first == second
    for told, expected in zip(
        first,
        [
            "--scale is [0.2, 1.0] on rank 0, [0.5, 1.0] on rank 1",
            "--log-every is 2 on rank 0, 3 on rank 1",
            "",
            "--data: 1 images on rank 0, 2 on rank 1",
            "",  # another place with the same files, as on the disks of two machines
            "--data: images of other names on rank 1",
            "--data: another content on rank 1",
            "--mapping",
        ],
        strict=True,
    ):
        assert expected in told
        assert bool(expected) == bool(told)


def end_alone(world, folder):
    """One of two processes ends; what the other one says, and its exit code."""

    def function(_):
        with harness.Run(folder, Config(), world):
            if world.rank == 1:
                os._exit(0)
            dist.all_reduce(torch.zeros(1))

    code = harness.main(function, None)
    (folder / "code").write_text(str(code))
    os._exit(0)


def test_a_process_that_ends_is_a_sentence_of_the_others(tmp_path, capfd):
    with pytest.raises(FileNotFoundError):  # there are no results
        on_processes(2, tmp_path, end_alone, tmp_path / "run")
    assert (tmp_path / "run" / "code").read_text() == "2"
    assert "Another process of this run has ended" in capfd.readouterr().err


def test_all_processes_take_the_same_checkpoint(tmp_path, tmp_path_factory, whole):
    folder = copy_of(whole, tmp_path_factory)
    (folder / "checkpoints" / "step-00000008" / "row.json").unlink()
    assert on_processes(2, tmp_path, resume_on, folder) == [7, 7]


# ---- killed at any moment --------------------------------------------------------------------
def kill_soon(delay, pids):
    """Kill processes after so many seconds, wherever this process then is."""

    def kill():
        for pid in pids():
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(delay, kill)
    timer.daemon = True
    timer.start()


def own_pid():
    return [os.getpid()]


def children():
    """The loader's processes."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


def start(size, config, victim=None, kind="", count=0, delay=0.0):
    """The processes of a run of `minimal`, which torchrun would start.

    One of them, the victim, is killed so many seconds after its `count`-th step or save has begun;
    or its loader's processes are.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def child(rank):
        torch.set_num_threads(1)
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if rank == victim:
            name = "save" if kind == "save" else "record"
            method = getattr(harness.Run, name)
            calls = iter(range(count + 1))

            def then_killed(*arguments, **options):
                if next(calls, None) == count:
                    kill_soon(delay, children if kind == "loader" else own_pid)
                return method(*arguments, **options)

            setattr(harness.Run, name, then_killed)
        os._exit(harness.main(minimal.train, config))

    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def end(processes, seconds=300):
    """The exit codes of processes that end by themselves in time; -9 of the others."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def losses(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_never_was(
    tmp_path, size, monkeypatch
):
    """Ten kills of each: of the main processes, of the loader's, and in the middle of a save."""
    random = Random(size)
    monkeypatch.setattr(minimal, "probe", lambda model: 0.25)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(16):
        pixels = torch.randint(256, (32, 32, 3), generator=harness.generator(number))
        Image.fromarray(pixels.byte().numpy()).save(images / f"{number}.png")
    config = minimal.Config(
        data=images, run=tmp_path / "whole", size=16, grid=2, batch=4, epochs=10, workers=1,
        log_every=1, save_every=3, device="cpu",
    )  # fmt: skip
    assert end(start(size, config)) == [0] * size
    whole = losses(config.run)
    assert len(whole) == 40

    config = replace(config, run=tmp_path / "killed")
    for number in range(10):
        kind = ("main", "save", "loader", "save")[number % 4]
        count = random.randrange(2 if kind == "save" else 6)
        victim = random.randrange(size)
        codes = end(start(size, config, victim, kind, count, random.uniform(0, 0.1)))
        killed = 2 if kind == "loader" else -signal.SIGKILL
        assert codes[victim] == killed
        assert set(codes) <= {2, killed}

    processes = start(size, config)
    before = len(losses(config.run))
    assert before < 40
    deadline = time.monotonic() + 100
    while processes[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
        newest = max(map(harness.step_of, harness.find_checkpoints(config.run)))
        with contextlib.suppress(ValueError):  # half a line
            if losses(config.run)[-1]["step"] > max(newest, before):
                break
    for _ in range(10):  # two that come at once count as one
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    assert set(end(processes, 10)) <= {-signal.SIGTERM, 2}  # at once; 2 is of the other one's end
    assert end(start(size, config)) == [0] * size
    assert losses(config.run) == whole
