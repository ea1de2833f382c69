"""Names of files and classes on their way to the terminal: no sentence acts upon it."""

import ast
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import harness
import pytest
from files import ROOT, project_files
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

# What acts upon a terminal, hides text or begins a line; a byte that is no UTF-8; plain letters.
STRANGE = "\x1b\n\r\t\b\x07\x00\x7f\x9b\u2028\u202e\u2066\u200b\udcff\udc9b\ud800\U000e0001"
names = st.text(st.sampled_from(STRANGE) | st.characters(codec=None), min_size=1)


def captured(function, *arguments):
    """What a function writes to the two streams of a terminal."""
    streams = StringIO(), StringIO()
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        function(*arguments)
    return [stream.getvalue() for stream in streams]


def fail(name, error=harness.UserError):
    raise error(f"The file {name} is broken.")


@given(names)
def test_an_escaped_text_is_printable_and_stays_as_it_is(name):
    escaped = harness.printable(name)
    assert escaped.isprintable()
    escaped.encode()
    assert harness.printable(escaped) == escaped
    assert escaped == name or not name.isprintable()


def test_escapes_are_pythons_and_bytes_are_themselves():
    name = os.fsdecode(b"a\x1b[2J\nb\xff.png") + "\u202egnp\U000e0001"
    assert harness.printable(name) == r"a\x1b[2J\nb\xff.png\u202egnp\U000e0001"


@given(names)
def test_every_way_to_the_terminal_escapes_a_name(name):
    sentence = f"The file {harness.printable(name)} is broken."
    harness._has_said[0] = 0
    assert captured(harness.tell, f"The file {name} is broken.") == [f"{sentence}\n", ""]
    assert captured(harness.say, f"The file {name} is broken.") == ["", f"{sentence}\n"]
    assert captured(harness.say_once, f"The file {name} is broken.")[1] == f"warning: {sentence}\n"
    assert captured(harness.main, fail, name) == ["", f"error: {sentence}\n"]
    with pytest.raises(harness.UserError) as error:
        fail(name)
    assert str(error.value) == sentence
    assert f"{error.value}" == sentence


@pytest.mark.parametrize(
    ("said", "line", "first"),
    [
        ("", "OSError", "OSError"),
        ("\n", "OSError", "OSError"),
        ("a.", "a", "a"),
        ("\na  b.\nc.", "a b. c", "a  b"),
    ],
)
def test_an_error_in_one_line(said, line, first):
    assert harness.one_line(OSError(said)) == line
    assert harness.first_line(OSError(said)) == first


def test_an_unreadable_file_keeps_its_name(tmp_path):
    name = "two  spaces\nand a line.png"
    (tmp_path / name).touch()
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    _, (told,) = harness.FolderImages(tmp_path)[0]
    assert told.startswith(f"{tmp_path / name}: cannot identify image file")


class Broken:
    """Images of which none can be read, for a loader process."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        fail("a\x1b[2J\nUserError: b\udcff")


def load_broken(config):
    for _ in harness.load(DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")):
        pass


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_sentence_of_a_loader_process_is_one_line(capsys):
    assert harness.main(load_broken, None) == 2
    want = "error: The file a\\x1b[2J\\nUserError: b\\xff is broken.\n"
    assert capsys.readouterr().err == want


def test_unreadable_names_are_one_line_each_in_the_run_folder(tmp_path):
    strange = [
        os.fsdecode(b"1\x1b[2J.png"),
        "2\nfake.png",
        "3\u202e.png",
        os.fsdecode(b"4\xff.png"),
    ]
    for name in strange:
        (tmp_path / name).write_text("no image")
    harness.FolderImages(tmp_path)
    run = object.__new__(harness.Run)
    run.folder = tmp_path
    run._unreadable = set()
    run.note_unreadable(f"{tmp_path / name}: broken" for name in strange)
    text = (tmp_path / "unreadable.txt").read_text(encoding="utf-8")
    want = [harness.printable(f"{tmp_path / name}: broken") for name in strange]
    assert sorted(text.splitlines()) == sorted(want)
    assert run.unreadable == 4


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.parametrize(
    "path", project_files("recipes/**/*.py"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_recipes_write_to_the_terminal_by_the_harness_alone(path):
    """Elsewhere `print` and the title of a progress bar could show a name as it is."""
    for node, called in calls(path):
        if path.name != "harness.py":
            assert called not in ("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write")
        if called == "tqdm":
            for title in [x.value for x in node.keywords if x.arg == "desc"] + node.args[1:2]:
                escaped = ast.unparse(title).startswith("harness.printable(")
                assert escaped or isinstance(title, ast.Constant), f"line {node.lineno}"


def test_a_report_holds_no_control_character(tmp_path):
    from downstream.report import report_text

    class Options:
        data = "d\x1b[2J"
        size = (8, 8)
        split = "val"
        seeds = 1
        out = tmp_path

    iou = {"a\x1b[2J\nb": 0.5, "c": 0.25}
    results = {"e\u202e": {"linear-seg": {"miou": 0.5, "iou": iou}}}
    text = report_text(results, ["linear-seg"], Options)
    assert all(line.isprintable() for line in text.split("\n"))
