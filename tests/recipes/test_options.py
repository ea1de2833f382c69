"""The options of every command: each wrong one is answered by a sentence of its own.

The tables `WRONG` of test_<recipe>.py hold the arguments, and the beginning of the sentence.
"""

import dataclasses
import importlib
import math
import os
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import harness
import pytest
import test_openimages_mini
import test_proposals
from files import project_files

FOLDER = Path(harness.__file__).parent
COMMANDS = [path.stem for path in project_files("recipes/*.py") if path.stem != "harness"]
MODULES = {name: importlib.import_module(name) for name in COMMANDS}
TESTS = {name: importlib.import_module(f"test_{name}") for name in COMMANDS}
WRONG = {name: TESTS[name].WRONG for name in COMMANDS}
NEEDED = {  # without which these commands do not start
    **{name: [] for name in COMMANDS},
    "evaluate": ["random:tiny"],
    "export": ["random:tiny", "--to", "timm", "--out", "a.pth"],
    "openimages_mini": test_openimages_mini.NEEDED,
    "proposals": test_proposals.NEEDED,
}
SHARED = [  # the options that several commands have in the same words
    (["--keep", "0"], "--keep is 0"),
    (["--value-range", "2", "1"], "--value-range is 2.0 1.0"),
    (["--value-range", "0", "inf"], "--value-range is 0.0 inf"),
    (["--warn-after", "0"], "--warn-after is 0.0"),
    (["--give-up-after", "nan"], "--give-up-after is nan"),
    (["--collective-timeout", "0"], "--collective-timeout is 0.0"),
]
SIGNED = ("--mean",)  # of images whose values may be negative, such as decibels
for name in COMMANDS:
    known = {x.name for x in dataclasses.fields(MODULES[name].Config)}
    own = [x for x in SHARED if x[0][0].removeprefix("--").replace("-", "_") in known]
    WRONG[name] = [*WRONG[name], *(([*NEEDED[name], *words], start) for words, start in own)]
CASES = [
    pytest.param(name, arguments, start, id=f"{name} {' '.join(arguments)}")
    for name in COMMANDS
    for arguments, start in WRONG[name]
]


@pytest.fixture
def options(monkeypatch, tmp_path):
    """What a recipe reads from a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def read(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        return MODULES[name].read_options()

    return read


def fields(config, prefix="--"):
    """Each option with its type: those of nested configurations too."""
    for name, kind in typing.get_type_hints(type(config)).items():
        option = f"{prefix}{name.replace('_', '-')}"
        if dataclasses.is_dataclass(kind):
            yield from fields(getattr(config, name), f"{option}.")
        else:
            yield option, kind


def numbers(kind):
    """The types of number that a value of this type holds; Literals hold none, nor do paths."""
    if typing.get_origin(kind) is typing.Literal:
        return set()
    parts = typing.get_args(kind)
    if parts:
        return set().union(*map(numbers, parts))
    return {kind} & {int, float}


def get(config, option):
    for name in option.removeprefix("--").replace("-", "_").split("."):
        config = getattr(config, name)
    return config


def put(config, option, value):
    """The configuration with another value of one option."""
    name, _, rest = option.removeprefix("--").replace("-", "_").partition(".")
    if rest:
        value = put(getattr(config, name), f"--{rest}", value)
    return dataclasses.replace(config, **{name: value})


def answer(name, config):
    """The sentence that answers a configuration; nothing if it is allowed."""
    try:
        MODULES[name].check_options(config)
    except harness.UserError as error:
        return str(error)
    return ""


def test_the_walk_sees_all_options():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        pair: tuple[float, float] = (0.0, 1.0)

    @dataclasses.dataclass(frozen=True)
    class Outer:
        some_path: Path | None = None
        kind: typing.Literal[1, 2] = 1
        flag: bool = False
        words: tuple[str, ...] = ()
        count: int | None = 3
        inner: Inner = dataclasses.field(default_factory=Inner)

    found = {option: numbers(kind) for option, kind in fields(Outer())}
    assert found == {
        "--some-path": set(), "--kind": set(), "--flag": set(), "--words": set(),
        "--count": {int}, "--inner.pair": {float},
    }  # fmt: skip
    changed = put(Outer(), "--inner.pair", (2.0, 3.0))
    assert get(changed, "--inner.pair") == (2.0, 3.0)
    assert put(changed, "--inner.pair", (0.0, 1.0)) == Outer()


# ---- each option -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments", "start"), CASES)
def test_a_wrong_option_is_answered_by_one_sentence(
    name, arguments, start, monkeypatch, tmp_path, capfd
):
    """The file runs as a command does, but in this process, which has imported torch already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert leaving.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {start}")
    assert error.endswith(".\n")
    assert error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_that_can_be_wrong_is_in_the_table(options, name):
    """All that hold numbers. Types refuse the rest, and text and paths are checked when used."""
    config = options(name, *NEEDED[name])
    tried = {word for arguments, _ in WRONG[name] for word in arguments}
    lacking = [option for option, kind in fields(config) if numbers(kind) and option not in tried]
    assert lacking == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_number_may_be_negative_or_nan(options, name):
    config = options(name, *NEEDED[name])
    for option, kind in fields(config):
        bad = {float: [-1.0, math.nan], int: [-1]}
        if option in SIGNED:
            bad = {float: [math.nan]}
        for value in [x for number in numbers(kind) for x in bad[number]]:
            before = get(config, option)
            wrong = value
            if isinstance(before, tuple):  # in the last place, and an empty one gets a place
                wrong = (*before[:-1], value)
            elif before is None and "tuple" in str(kind):  # a pair that is not given
                wrong = (value, value)
            sentence = answer(name, put(config, option, wrong))
            assert sentence.startswith(f"{option} is {harness.as_typed(wrong)}: "), sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_the_defaults_are_allowed(options, name, tmp_path):
    for preset in getattr(MODULES[name], "PRESETS", {"": None}):
        chosen = ["--preset", preset, "--data", str(tmp_path)] if preset else []
        assert answer(name, options(name, *NEEDED[name], *chosen)) == ""


# ---- the command line ------------------------------------------------------------------------


def run(name, *arguments, path):
    """The command as a process of its own, with modules that stand before all others."""
    return subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *arguments],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(path), "COLUMNS": "120"},  # no option is wrapped
    )  # fmt: skip


def help_texts(printed):
    """What --help says of each option, without its default, and of each group of options."""
    texts = {}
    group = key = ""
    for line in printed.splitlines():
        content = line[2:-1].strip("\u2500").rstrip()
        if line.startswith("\u256d"):  # the upper edge of a box, which names a group
            group = key = content.strip("\u2500 ")
        elif line.startswith("\u2502"):
            if content.startswith("-") or (group == "positional arguments" and content[:1] != " "):
                key, _, content = content.partition("  ")
            texts[key] = f"{texts.get(key, '')} {content.strip()}".strip()
    return {key: re.split(r" ?\((?:default|required)", text)[0] for key, text in texts.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_unknown_options_answer_without_importing_torch(name, tmp_path):
    for module in ("torch", "cv2"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('{module} was imported')")
    done = run(name, "--help", path=tmp_path)
    assert done.returncode == 0, done.stderr
    options = [f"--{x.name}".replace("_", "-") for x in dataclasses.fields(MODULES[name].Config)]
    assert sum(option in done.stdout for option in options) > len(options) / 2
    texts = help_texts(done.stdout)
    assert [key for key, text in texts.items() if not text] == []
    assert len(set(texts.values())) == len(texts)  # a comment may be taken for that of the next

    wrong = run(name, *NEEDED[name], "--no-such-option", "3", path=tmp_path)
    assert wrong.returncode == 2
    assert "--no-such-option" in wrong.stdout + wrong.stderr
    assert "Traceback" not in wrong.stderr
