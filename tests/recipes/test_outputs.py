"""Work that would be lost at its end: where results go is tried first."""

from dataclasses import replace
from pathlib import Path

import d3ssl
import evaluate
import export
import harness
import numpy as np
import openimages_mini
import proposals
import pytest
import torch
from downstream.encoders import Encoder
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
import densekit as dk

NO_DISK = Path("/proc/self")  # a folder in which nobody, not even root, makes a file
pytestmark = pytest.mark.skipif(not NO_DISK.is_dir(), reason="there is no /proc")


def forbidden(*_, **__):
    raise AssertionError("work has begun")


def test_an_evaluation_tries_its_folder_before_the_first_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_encoder", forbidden)
    config = evaluate.Config(("random:tiny",), out=NO_DISK)
    with pytest.raises(harness.UserError, match=r"--out leads to /proc/self/results.json, which"):
        evaluate.evaluate(config)
    for name in ("results.json", "report.md"):
        out = tmp_path / name.split(".")[0]
        (out / name).mkdir(parents=True)
        with pytest.raises(harness.UserError, match=f"{name}, which .* is a folder"):
            evaluate.evaluate(replace(config, out=out))


def test_an_export_tries_its_file_before_the_encoder(monkeypatch):
    monkeypatch.setattr(export, "load_encoder", forbidden)
    with pytest.raises(harness.UserError, match=r"--out (is|leads to) /proc/self/a\.onnx"):
        export.export(export.Config("random:tiny", "onnx", NO_DISK / "a.onnx"))


def test_proposals_are_searched_when_their_file_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "search_all", forbidden)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(harness.UserError, match=r"--out (is|leads to) /proc/self/a\.npz"):
        proposals.propose(proposals.Config(tmp_path, out=NO_DISK / "a.npz"))


def test_a_list_is_made_when_its_file_can_be_written(monkeypatch):
    monkeypatch.setattr(openimages_mini, "read_classes", forbidden)
    file = Path(__file__)
    config = openimages_mini.Config(file, file, file, out=NO_DISK / "a.txt")
    with pytest.raises(harness.UserError, match=r"--out leads to /proc/self/a\.txt, which"):
        openimages_mini.check_options(config)


def test_trying_a_file_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("precious")
    for name in ("a", "b"):
        harness.check_output("--out", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "precious"
    for bad in (tmp_path, tmp_path / "none" / "b", tmp_path / "a" / "b", tmp_path / ("b" * 300)):
        with pytest.raises(harness.UserError, match=r"--out leads to .*, which cannot be written"):
            harness.check_output("--out", bad)


class Huge(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2**15, 2**15, device="meta"))


def test_a_network_that_no_onnx_file_holds_is_refused_before_the_export(monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", forbidden)
    encoder = Encoder.__new__(Encoder)
    nn.Module.__init__(encoder)
    encoder.architecture = "huge"
    encoder.network = Huge()
    job = export.Job("a.onnx", encoder, {}, "RGB", [], [])
    with pytest.raises(harness.UserError, match=r"huge has weights of 4\.0 GiB, and an ONNX file"):
        export.to_onnx(job)


# ---- proposals of other images -----------------------------------------------------------------
class Elsewhere(list):
    """Images whose proposals lie outside of them."""

    boxes = [torch.tensor([[2.0, 2.0, 3.0, 3.0]])] * 4


def test_an_epoch_without_a_region_ends_with_a_sentence(tmp_path, monkeypatch):
    pixels = (dk.sample_scenes(4, (40, 40)).images * 255).byte()
    source = Elsewhere((image, ()) for image in pixels)
    monkeypatch.setattr(d3ssl, "image_source", lambda *_, **__: source)
    monkeypatch.setattr(d3ssl, "evaluate", lambda *_: None)
    config = replace(
        d3ssl.PRESETS["demo"], run=tmp_path / "run", batch=2, epochs=9, workers=0, head=(8, 8),
        bank=4, bins=2, views=d3ssl.Views(size=32), device="cpu",
    )  # fmt: skip
    with pytest.raises(harness.UserError, match="None of the 4 images had a proposal in its views"):
        d3ssl.train(config)


def test_a_box_outside_of_its_image_and_another_shape_are_said(tmp_path, capsys):
    for name in ("0.png", "1.png"):
        Image.new("RGB", (48, 40)).save(tmp_path / name)
    path = tmp_path / "some.npz"

    def write(size, box):
        found = proposals.Found(size, np.array([box], np.int32))
        proposals.write_proposals(path, {"0.png": found}, {"schema": proposals.SCHEMA})
        return proposals.ImagesWithProposals(tmp_path, path)

    for box in ([0, 0, 49, 40], [0, 0, 48, 41], [-1, 0, 8, 8], [9, 0, 8, 8]):
        with pytest.raises(harness.UserError, match=r"some\.npz .* a box that does not lie in"):
            write((40, 48), box)
    for size in ((40, 48), (80, 96), (401, 480)):  # itself, and resized copies
        write(size, [0, 0, 8, 8])
        assert capsys.readouterr().err == ""
    write((48, 40), [0, 0, 8, 8])
    assert "0.png is 40 x 48 pixels, but" in capsys.readouterr().err


# ---- files and disks that fail in the middle of work --------------------------------------------
FAILURES = {
    "file": lambda folder: (folder / "none").read_bytes(),
    "folder": lambda folder: folder.write_bytes(b""),
    "control": lambda folder: (folder / "a\x1b[2J").read_bytes(),
    "disk": lambda _: Path("/dev/full").write_bytes(b"1"),
    "loader": lambda folder: list(harness.load(DataLoader(Removed(folder), num_workers=1))),
}


class Removed:
    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return (self.folder / "none").read_bytes()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_file_that_fails_is_one_line(failure, tmp_path, capfd):
    assert harness.main(FAILURES[failure], tmp_path) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert "\x1b" not in said
    name = {"folder": str(tmp_path), "disk": "No space left"}.get(failure, f"{tmp_path}/")
    assert name in said


def test_an_error_of_no_file_is_none_of_the_users():
    def refuse(_):
        raise ConnectionResetError("by peer")

    with pytest.raises(ConnectionResetError):
        harness.main(refuse, None)
