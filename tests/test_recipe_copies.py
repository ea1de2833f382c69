"""`python -m densekit.recipes`: what it lists, and that a copy loses nothing."""

import re
import subprocess
import sys

import pytest
from files import ROOT, project_files
from densekit import recipes
from densekit.recipes import copy_recipe, list_recipes


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_the_recipes_are_the_commands_of_the_folder():
    listed = list_recipes()
    files = {path.stem for path in project_files("recipes/*.py")} - {"harness"}  # a module
    assert set(listed) == files
    assert list(listed) == sorted(listed)
    assert all(summary.endswith(".") and "\n" not in summary for summary in listed.values())


def test_a_copy_is_the_recipe_and_what_it_imports(tmp_path):
    copied = copy_recipe("minimal", tmp_path / "new" / "folder")
    assert copied[0] == tmp_path / "new" / "folder" / "minimal.py"
    assert set(content(tmp_path)) == {path.relative_to(tmp_path) for path in copied}
    for path in copied:
        assert (
            path.read_bytes()
            == (ROOT / "recipes" / path.relative_to(copied[0].parent)).read_bytes()
        )
    names = {str(path.relative_to(copied[0].parent)) for path in copied}
    assert {"harness.py", "downstream/__init__.py", "downstream/encoders.py"} <= names
    assert "downstream/protocols.py" not in names


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_copy_has_every_module_that_its_files_import(tmp_path, recipe):
    copied = copy_recipe(recipe, tmp_path)
    text = "\n".join(path.read_text() for path in copied if path.suffix == ".py")
    tops = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M))
    parts = set(re.findall(r"^ *from downstream\.(\w+) import", text, re.M))
    for names in re.findall(r"^ *from downstream import ([\w, ]+)", text, re.M):
        parts |= {name.split()[0] for name in names.split(",")}
    files = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in copied}
    top_files = {path.stem for path in project_files("recipes/*.py")}
    needed = {recipe} | (tops & top_files) | {f"downstream/{name}" for name in parts}
    if parts:
        needed.add("downstream/__init__")
    assert files - {"coco_stuff_27"} == needed
    assert ("coco_stuff_27" in files) == ("coco_stuff_27" in text)


def test_a_second_copy_changes_nothing_and_another_recipe_shares_the_modules(tmp_path):
    copy_recipe("minimal", tmp_path)
    before = content(tmp_path)
    assert copy_recipe("minimal", tmp_path)[0] == tmp_path / "minimal.py"
    assert content(tmp_path) == before
    copy_recipe("croc", tmp_path)
    assert content(tmp_path).items() > before.items()


@pytest.mark.parametrize("changed", ["minimal.py", "harness.py", "downstream/encoders.py"])
def test_what_was_changed_is_never_overwritten(tmp_path, changed):
    copy_recipe("minimal", tmp_path)
    (tmp_path / changed).write_text("mine\n")
    before = content(tmp_path)
    recipe = "minimal" if changed == "minimal.py" else "croc"  # both have the others
    with pytest.raises(FileExistsError, match=f"nothing was copied: .*{changed}"):
        copy_recipe(recipe, tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("file", ["file", "file/in/it", "folder/downstream"])
def test_a_file_where_a_folder_should_be_is_refused(tmp_path, file):
    taken = tmp_path / (file if file.startswith("folder") else "file")
    taken.parent.mkdir(exist_ok=True)
    taken.write_text("mine\n")
    target = tmp_path / ("folder" if file.startswith("folder") else file)
    with pytest.raises(FileExistsError, match=f"{taken} is a file: give a folder"):
        copy_recipe("minimal", target)
    assert content(tmp_path) == {taken.relative_to(tmp_path): b"mine\n"}


def test_a_folder_or_a_dangling_link_is_other_content(tmp_path):
    (tmp_path / "minimal.py").mkdir()
    (tmp_path / "harness.py").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match=r"nothing was copied: .*minimal.py, .*harness.py"):
        copy_recipe("minimal", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harness.py", "minimal.py"]


def test_the_command_lists_copies_and_says_what_is_wrong(tmp_path, capsys):
    command = [sys.executable, "-m", "densekit.recipes", "list"]
    listed = subprocess.run(command, capture_output=True, text=True)
    assert listed.stderr == ""  # no warning that the package has imported the module before
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(list_recipes())

    recipes._main(["copy", "minimal", str(tmp_path)])
    says = capsys.readouterr().out
    assert says.endswith(f"To start: python {tmp_path / 'minimal.py'} --help\n")
    with pytest.raises(SystemExit, match="2"):
        recipes._main(["copy", "minimum", str(tmp_path)])
    assert "There is no recipe 'minimum': it is one of adapt, croc" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        recipes._main(["copy", "minimal", str(tmp_path / ("long" * 100))])
    assert ": File name too long.\n" in capsys.readouterr().err
