"""The layers of the house: a module imports only from a lower one."""

import ast
import sys
from pathlib import Path

import pytest
from files import ROOT, project_files

LAYERS = {
    "typing": -1,  # what all signatures are made of
    "distributed": 0,
    "schedules": 0,
    "scenes": 0,
    "ema": 0,
    "bank": 0,
    "boxes": 0,
    "views": 1,
    "regions": 1,
    "pooling": 1,
    "losses": 1,
    "sampling": 2,
    "clustering": 2,
    "matching": 2,
    "metrics": 2,
    "k_means": 3,
    "diagnostics": 3,
    "neighbors": 3,
    "probes": 3,
}
GEOMETRY = {"boxes", "views", "sampling", "matching"}
DEPENDENCIES = {"torch", "einops", "jaxtyping", "beartype"}
OPTIONAL = {"metrics": {"scipy"}}  # imported where it is called, with a sentence if it is missing


def imports(source):
    """Dotted names of all modules that a source imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            # `from densekit import views` imports a module too; names that are none do no harm.
            yield from (f"{name}.{alias.name}" for alias in node.names)


def siblings(source, package="densekit"):
    """Modules of the package that a source imports; "" for the flat package itself."""
    found = [name.split(".") for name in imports(source)]
    inside = [parts for parts in found if parts[0] == package]
    return {parts[1] if len(parts) > 1 and parts[1] in LAYERS else "" for parts in inside}


def faults(module, source):
    """What a module of the package imports against the rules."""
    for name in sorted(siblings(source)):
        if name == "":
            yield f"{module} imports the flat package, which imports {module}"
        elif LAYERS[name] >= LAYERS[module]:
            yield f"{module} (layer {LAYERS[module]}) imports {name} (layer {LAYERS[name]})"
        elif module == "losses" and name in GEOMETRY:
            yield f"a loss sees tensors, but losses imports {name}"
    for name in sorted(set(imports(source))):
        top = name.split(".")[0]
        known = DEPENDENCIES | OPTIONAL.get(module, set())
        if top not in {"densekit", *known, *sys.stdlib_module_names}:
            yield f"{module} imports {name or 'by a relative path'}, no dependency of the library"


def modules():
    return [p for p in project_files("densekit/**/*.py") if p.name != "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_from_a_lower_layer(path):
    assert path.stem in LAYERS, f"give {path.stem} a layer in {Path(__file__).name}"
    assert list(faults(path.stem, path.read_text())) == []


def recipes():
    return project_files("recipes/*.py")


MORE = {"d3ssl": {"proposals"}}  # which made its data


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_a_recipe_imports_only_what_lies_beside_it(path):
    local = {p.stem for p in recipes()} | {"downstream", "recipes", "tests", "benchmarks", ""}
    tops = {name.split(".")[0] for name in imports(path.read_text())}
    allowed = {"harness", "downstream", *MORE.get(path.stem, set())}
    assert tops & local <= (allowed if path.stem != "harness" else set())


def test_the_harness_knows_no_geometry_and_no_loss():
    source = (ROOT / "recipes" / "harness.py").read_text()
    assert siblings(source) <= {"scenes", "distributed", ""}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("boxes", "from densekit.views import View"),
        ("views", "def f():\n    import densekit.sampling"),
        ("views", "from densekit import losses"),
        ("views", "from densekit import View"),
        ("views", "import densekit"),
        ("losses", "from densekit.boxes import box_iou"),
        ("losses", "import torchvision.ops"),
        ("losses", "try:\n    from scipy import optimize\nexcept ImportError:\n    pass"),
        ("losses", "from .typing import typed"),
    ],
)
def test_the_check_sees_a_fault(module, source):
    assert len(list(faults(module, source))) == 1


def test_the_check_lets_a_lower_layer_pass():
    source = "import math\nimport torch.nn\nfrom densekit.boxes import box_iou\n"
    assert list(faults("views", source + "from densekit.typing import typed\n")) == []
