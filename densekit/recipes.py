"""The recipes that come with densekit, and copies of them to change.

    python -m densekit.recipes list
    python -m densekit.recipes copy croc my_project     # then: python my_project/croc.py --help

A copy holds the recipe and every module of the recipes that it imports, and runs from where it is.
The packages that recipes need are those of the extra `recipes`: `pip install "densekit[recipes]"`.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["copy_recipe", "list_recipes"]


def list_recipes() -> dict[str, str]:
    """List the recipes: the name of each and its first line of documentation.

    Returns:
        What `copy_recipe` calls each recipe, in alphabetical order, with what it does.

    Raises:
        FileNotFoundError: The files of the recipes did not come with this installation.

    Examples:
        >>> [name for name in list_recipes() if name.startswith("densesiam")]
        ['densesiam', 'densesiam_segment']
    """
    sources = {path.stem: path.read_text(encoding="utf-8") for path in _folder().glob("*.py")}
    commands = sorted(name for name, source in sources.items() if _is_command(source))
    return {name: _summary(sources[name]) for name in commands}


def copy_recipe(name: str, destination: str | Path) -> list[Path]:
    """Copy a recipe, and every module of the recipes that it imports, into a folder.

    Nothing that was changed is lost: a file that is there already with other content is an error,
    before anything is copied, and one with the same content stays as it is. A second recipe can
    thus be copied beside the first, and shares its modules.

    Args:
        name: a recipe of `list_recipes`.
        destination: a folder, which is made if it is missing.

    Returns:
        The recipe's own file in the folder, followed by those of the modules that it imports.

    Raises:
        ValueError: There is no recipe of this name.
        FileExistsError: A file of the copy is there with other content, or the folder is a file.
        FileNotFoundError: The files of the recipes did not come with this installation.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [str(path.relative_to(folder)) for path in copy_recipe("openimages_mini", folder)]
        ['openimages_mini.py', 'harness.py']
    """
    recipes = list_recipes()
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}: it is one of {', '.join(recipes)}.")
    folder = _folder()
    target = Path(destination)
    sources = _imported(folder, folder / f"{name}.py")
    copies = {target / path.relative_to(folder): path.read_bytes() for path in sources}
    for parent in {parent for copy in copies for parent in copy.parents}:
        if parent.exists() and not parent.is_dir():
            raise FileExistsError(f"{parent} is a file: give a folder.")
    changed = [copy for copy, content in copies.items() if _is_other(copy, content)]
    if changed:
        names = ", ".join(str(copy) for copy in changed)
        raise FileExistsError(f"Other content is there already, and nothing was copied: {names}.")
    for copy, content in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            copy.write_bytes(content)
    return list(copies)


# ---- files -----------------------------------------------------------------------------------


def _folder() -> Path:
    """The recipes inside of the package where it is installed, or beside it in a clone."""
    package = Path(__file__).parent
    for folder in (package / "recipe_files", package.parent / "recipes"):
        if (folder / "harness.py").is_file():
            return folder
    raise FileNotFoundError(f"The recipes are not beside {package}: install densekit again.")


def _is_other(file: Path, content: bytes) -> bool:
    """Whether something else than a file of this content is there: a link to nothing, too."""
    if file.is_file():
        return file.read_bytes() != content
    return file.is_dir() or file.is_symlink()


def _is_command(source: str) -> bool:
    return '__name__ == "__main__"' in source


def _summary(source: str) -> str:
    """The first paragraph of a module's documentation, on one line."""
    text = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(text.split("\n\n")[0].split())


def _imported(folder: Path, recipe: Path) -> list[Path]:
    """A recipe's file, and all files of the folder that it needs, in the order of need."""
    found = [recipe]
    for path in found:  # it grows meanwhile
        source = path.read_text(encoding="utf-8")
        needed = [file for name in _modules(source) for file in _files(folder, name)]
        needed += [file for file in sorted(folder.glob("*.json")) if file.name in source]
        found += [file for file in dict.fromkeys(needed) if file not in found]
    return found


def _modules(source: str) -> list[str]:
    """The dotted names that a source imports; some of them are names inside of a module."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _files(folder: Path, name: str) -> list[Path]:
    """The files of a module of the recipes: its own, and those of the packages around it."""
    parts = name.split(".")
    packages = [folder.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
    own = folder.joinpath(*parts).with_suffix(".py")
    return [path for path in [*packages, own] if path.is_file()]


# ---- command ---------------------------------------------------------------------------------


def _main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, or with those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m densekit.recipes", description=_summary_here())
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list the recipes")
    copy = commands.add_parser("copy", help="copy a recipe and what it imports into a folder")
    copy.add_argument("name", metavar="NAME", help="a recipe of the list")
    copy.add_argument("destination", metavar="DEST", type=Path, help="a folder; made if missing")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            recipes = list_recipes()
            width = max(len(name) for name in recipes)
            lines = [f"{name:<{width}}  {summary}" for name, summary in recipes.items()]
        else:
            copied = copy_recipe(options.name, options.destination)
            lines = [str(path) for path in copied]
            lines += ["", 'It needs the packages of the extra: pip install "densekit[recipes]"']
            lines += [f"To start: python {copied[0]} --help"]
    except OSError as error:  # of our own, which is a sentence, or of the system
        if not error.strerror:
            parser.error(str(error))
        parser.error(f"{error.filename}: {error.strerror}.")
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write("\n".join(lines) + "\n")


def _summary_here() -> str:
    return (__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    _main()
