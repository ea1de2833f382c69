"""The wheel holds library and recipes alone, and the pins are what they promise to be."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from email.parser import Parser

import files
import pytest
from files import ROOT, own_modules, project_files, tracked
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LIBRARY = [Requirement(line) for line in PROJECT["dependencies"]]
RECIPES = [Requirement(line) for line in EXTRAS["recipes"]]
ALL = [Requirement(line) for extra in EXTRAS.values() for line in extra] + LIBRARY
IMPORTED_AS = {"pillow": "PIL", "faster-coco-eval": "faster_coco_eval"}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return {canonical(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


# ---- the files -------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_a_file_is_of_the_project_if_git_tracks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "tracked", files.tracked.__wrapped__)  # without what it has kept
    for name in ("kept.md", "kept.log", "test.log", "gone.md"):
        (tmp_path / name).touch()
    assert len(project_files("*.md", "*.log")) == 4  # without git, all of them
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "kept.md", "kept.log", "gone.md"], cwd=tmp_path, check=True)
    (tmp_path / "gone.md").unlink()
    assert project_files("*.md", "*.log") == [tmp_path / "kept.log", tmp_path / "kept.md"]


# ---- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the project's own files, whatever else lies beside them."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for path in project_files("*", "densekit/**/*", "recipes/**/*"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_library_and_the_recipes_alone(wheel):
    metadata = [name for name in wheel.namelist() if ".dist-info/" in name]
    code = set(wheel.namelist()) - set(metadata)
    library = {path.relative_to(ROOT).as_posix() for path in project_files("densekit/**/*")}
    files = project_files("recipes/**/*")
    recipes = {path.relative_to(ROOT / "recipes").as_posix() for path in files}
    assert code == library | {f"densekit/recipe_files/{name}" for name in recipes}
    assert "densekit/py.typed" in code
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_wheel_asks_only_for_the_library_s_own_dependencies(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = Parser().parsestr(wheel.read(name).decode())
    required = [Requirement(line) for line in fields.get_all("Requires-Dist")]
    needed = {r.name for r in required if r.marker is None}
    assert needed == {"torch", "einops", "jaxtyping", "beartype"}
    assert fields["License-Expression"] == "Apache-2.0"


def test_the_wheel_works_without_what_the_recipes_need(wheel, tmp_path):
    wheel.extractall(tmp_path)
    names = sorted(IMPORTED_AS.get(r.name, r.name) for r in RECIPES)
    code = f"""
import importlib, pkgutil, sys
for name in {names}:
    sys.modules[name] = None  # an import of it fails now
import densekit
assert densekit.__file__.startswith({str(tmp_path)!r}), densekit.__file__
for module in pkgutil.iter_modules(densekit.__path__):
    importlib.import_module("densekit." + module.name)
print(densekit.__version__, tuple(densekit.crop_views(
    densekit.scenes.sample_scenes(2, (8, 8)).images, densekit.full_view((8, 8), (2,)), 4).shape))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = wheel.filename.rsplit("/", 1)[-1].split("-")[1]
    assert done.stdout.split(maxsplit=1) == [version, "(2, 3, 4, 4)\n"]


@pytest.mark.slow
def test_a_copied_recipe_needs_no_file_but_those_of_the_copy(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    code = """
import importlib, pathlib, sys
from densekit.recipes import copy_recipe, list_recipes
others = set(sys.modules)
for recipe in list_recipes():
    folder = pathlib.Path(sys.argv[1], recipe)
    files = copy_recipe(recipe, folder)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    module = importlib.import_module(recipe)
    assert pathlib.Path(module.__file__) == files[0]
    own = {path.relative_to(folder).parts[0].removesuffix(".py") for path in files}
    for name in [name for name in sys.modules if name.split(".")[0] in own]:
        assert pathlib.Path(sys.modules.pop(name).__file__) in files, name
    sys.path.remove(str(folder))
    print(recipe)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "copies")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"harness"}
    assert set(done.stdout.split()) == recipes
    copied = tmp_path / "copies" / "densesiam_segment" / "coco_stuff_27.json"
    assert copied.read_bytes() == (ROOT / "recipes" / copied.name).read_bytes()


# ---- warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*own_modules(), "densekit.views", "downstream.encoders"])
def test_a_warning_of_our_own_is_an_error(module):
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("module", ["torch.fx", "onnxscript", "timm.models", "evaluate_more"])
def test_a_warning_of_others_is_none(module):
    with warnings.catch_warnings(record=True) as shown:  # with the filters that are in force
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module=module)
    assert len(shown) == 1


# ---- make ------------------------------------------------------------------------------------


def make_test_with(interpreter):
    """What `make test` says with this interpreter, which is none that it can use."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-C", str(ROOT), "test", f"PYTHON={interpreter}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    return done.stderr + done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "was not found"),
        ("echo 'shim: not installed' >&2; exit 127", "could not be started"),
        ('case "$1" in -V) echo Python 3.10.1;; esac; exit ${2:+1}', "is Python 3.10.1, and"),
    ],
    ids=["missing", "broken", "old"],
)
def test_make_says_what_is_wrong_with_an_interpreter(tmp_path, script, says):
    interpreter = tmp_path / "python3.99"
    if script:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    assert f"{interpreter} {says}" in make_test_with(interpreter)
    assert not (ROOT / ".venv-python3.99").exists()


# ---- the pins --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_a_constraints_file_is_a_list_of_versions(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(pins(name)) == len(lines)


def test_every_dependency_is_pinned():
    pinned = pins("constraints.txt")
    for requirement in ALL:
        if requirement.name != "densekit":
            assert canonical(requirement.name) in pinned, f"{requirement} has no pin"
            assert pinned[canonical(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("requirement", LIBRARY + RECIPES, ids=str)
def test_a_lower_bound_is_the_version_that_is_tested(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    assert pins("constraints-oldest.txt")[canonical(requirement.name)] == Version(bound.version)


def test_no_file_names_a_package_registry():
    # The brackets keep this very line from matching.
    hosts = re.compile(r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|[n]pmjs\.org")
    if tracked() is None:
        pytest.skip("not a git checkout")
    present = [path for path in sorted(tracked()) if path.is_file()]
    texts = {path: path.read_bytes().decode(errors="ignore") for path in present}
    assert len(texts) > 10
    assert [str(path) for path, text in texts.items() if hosts.search(text)] == []
