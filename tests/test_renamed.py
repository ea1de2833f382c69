"""`docs/renamed.json` says where every old public name went, and each of its targets exists.

The file has four sections: `api` (names, parameters as `function(parameter)`, fields of records),
`files`, `options` of commands, and `written` (fields of logs and side-cars). A value is the new
name, or a dict of it as `to`, null where there is none, and the reason as `why`.

`tests/data/api_before_rooms.txt` lists what was public before the modules were put in order. Each
of its lines still exists or is explained; what moved with its owner needs no entry of its own.
"""

import ast
import functools
import importlib
import inspect
import json
import re

import pytest
from files import ROOT, project_files

SECTIONS = json.loads((ROOT / "docs" / "renamed.json").read_text())
RENAMED = {old: new for section in SECTIONS.values() for old, new in section.items()}
BEFORE = (ROOT / "tests" / "data" / "api_before_rooms.txt").read_text().splitlines()


def target(old):
    """The new name of a renamed thing, None if it is gone; without an entry the old name."""
    new = RENAMED.get(old, old)
    return new["to"] if isinstance(new, dict) else new


def lookup(name):
    """The object of a dotted name: a module, what it lists as public, or a field of a record."""
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    for part in rest:
        if not inspect.ismodule(found) or part in getattr(found, "__all__", vars(found)):
            found = getattr(found, part)
        else:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


@functools.cache
def options(path):
    """The command line of a recipe, read off its `Config` without the seconds of an import."""
    tree = ast.parse((ROOT / path).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def walk(node, prefix):
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                name = f"{prefix}{field.target.id}"
                kind = getattr(field.annotation, "id", None)
                if kind in classes:
                    yield from walk(classes[kind], f"{name}.")
                else:
                    yield name.replace("_", "-")

    return set(walk(classes["Config"], "--"))


def exists(name):
    if name.startswith(("log: ", "side-car: ")):
        field = name.split(": ")[1]
        sources = (path.read_text() for path in project_files("recipes/**/*.py"))
        return any(re.search(rf'"{field}"|\b{field}=', source) for source in sources)
    if name.startswith("recipes/"):
        path, _, option = name.partition(" ")
        return (ROOT / path).is_file() and (not option or option in options(path))
    function, _, parameter = name.rstrip(")").partition("(")
    try:
        found = lookup(function)
    except (AttributeError, ImportError):
        return False
    return not parameter or parameter in inspect.signature(found).parameters


def owner(name):
    """What a parameter, a field, an option or a member belongs to; None for a module or file."""
    for pattern in (r"(.*)\(\w+\)", r"(.*) --.*", r"(densekit\.\w+\.\w+)\.\w+"):
        if match := re.fullmatch(pattern, name):
            return match[1]
    return None


def now(name):
    """Today's name of what was called so: its own entry, or its owner's."""
    belongs = owner(name)
    if name in RENAMED or belongs is None or belongs not in RENAMED:
        return target(name)
    new = target(belongs)
    return new and new + name.removeprefix(belongs)


@pytest.mark.parametrize("old", RENAMED)
def test_what_an_old_name_points_to_exists(old):
    new = RENAMED[old]
    assert isinstance(new, str) or (new.keys() == {"to", "why"} and new["why"].endswith("."))
    assert target(old) is None or exists(target(old))


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_gone(old):
    assert not exists(old)


def test_every_old_name_exists_or_is_explained():
    assert len(BEFORE) > 800
    unexplained = [name for name in BEFORE if (new := now(name)) is not None and not exists(new)]
    assert unexplained == []


def test_every_old_flat_name_exists_or_is_explained():
    homes = (re.fullmatch(r"densekit\.(\w+)\.(\w+)", name) for name in BEFORE)
    flat = [f"densekit.{m[2]}" for m in homes if m and m[1] not in {"testing", "typing"}]
    assert len(flat) > 100
    assert [name for name in flat if target(name) and not exists(target(name))] == []


@pytest.mark.parametrize(
    "name",
    [
        "densekit.nothing",
        "densekit.views.nothing",
        "densekit.views.View.nothing",
        "densekit.views.full_view(nothing)",
        "recipes/nothing.py",
        "recipes/croc.py --nothing",
        "log: nothing_of_this_name",
    ],
)
def test_the_check_sees_what_does_not_exist(name):
    assert not exists(name)
