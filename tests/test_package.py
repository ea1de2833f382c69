"""The wheel holds the library alone, and the pins are what they promise to be."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
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


# ---- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_library_alone(wheel):
    metadata = [name for name in wheel.namelist() if ".dist-info/" in name]
    code = set(wheel.namelist()) - set(metadata)
    assert code == {f"densekit/{p.name}" for p in ROOT.glob("densekit/*") if p.is_file()}
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
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    # The brackets keep this very line from matching.
    hosts = re.compile(r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|[n]pmjs\.org")
    files = [ROOT / name for name in done.stdout.splitlines()]
    texts = {path: path.read_bytes().decode(errors="ignore") for path in files if path.is_file()}
    assert len(texts) > 10
    assert [str(path) for path, text in texts.items() if hosts.search(text)] == []
