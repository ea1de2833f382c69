"""The pages docs/api/MODULE.md and docs/index.md: `python tests/api_pages.py` writes them.

tests/test_docs.py compares them. The page of a module lists its names, each with the first line of
its docstring, so that it can be read in a checkout too. The builders of the documentation add the
docstrings themselves. The first page is README.md, with links as they are in the folder docs.
"""

import importlib
import inspect
import re

from files import ROOT, project_files


def first_sentence(value):
    """The first line of a docstring, without the links that only the built pages resolve."""
    line = inspect.getdoc(value).split("\n\n")[0].replace("\n", " ")
    return re.sub(r"\[([^\]]+)\]\[[^\]]*\]", r"\1", line)


def is_documented(value):
    """Whether it has a docstring of its own, as functions and records do, and aliases do not."""
    return inspect.isfunction(value) or inspect.isclass(value)


def page(name):
    """The text of a module's page."""
    module = importlib.import_module(f"densekit.{name}")
    rows = []
    for public in module.__all__:
        value = getattr(module, public)
        if is_documented(value) and value.__module__ == module.__name__:
            sentence = first_sentence(value).replace("|", "\\|")  # a table's cells end at bars
            rows.append(f"| `{public}` | {sentence} |\n")
    return (
        f"# densekit.{name}\n\n"
        f"| name | what |\n|---|---|\n{''.join(rows)}\n"
        f"::: densekit.{name}\n"
        "    options:\n"
        "      show_root_heading: false\n"
        "      heading_level: 2\n"
    )


def modules():
    """The modules that have a public name; the others are helpers, which need no page."""
    names = [path.stem for path in project_files("densekit/*.py") if path.stem != "__init__"]
    return [name for name in names if importlib.import_module(f"densekit.{name}").__all__]


def first_page():
    """The text of README.md, for docs/index.md: a line that links to a file outside docs goes."""
    lines = (ROOT / "README.md").read_text().splitlines(keepends=True)
    outside = re.compile(r"\]\((?!docs/|https?://|#)")
    return "".join(line for line in lines if not outside.search(line)).replace("](docs/", "](")


if __name__ == "__main__":
    (ROOT / "docs" / "index.md").write_text(first_page())
    for name in modules():
        (ROOT / "docs" / "api" / f"{name}.md").write_text(page(name))
