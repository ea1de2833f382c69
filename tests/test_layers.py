"""The rooms of the house: who imports whom, and which file is a command."""

import ast
import re
import sys
from pathlib import Path

import pytest
from files import ROOT, project_files

ROOMS = [  # from the ground up: a module imports from the lines below its own alone
    {"hints", "recipes"},
    {"messages"},
    {"typing"},
    {"distributed", "scenes", "schedules", "ema"},
    {"numerics"},
    {"bank", "boxes", "metrics", "sorting"},
    {"views", "pooling", "regions", "losses", "clustering", "neighbors", "video"},
    {"sampling", "k_means"},
    {"matching", "probes", "diagnostics"},
    {"adapters", "testing", "viz"},
]
LAYERS = {module: layer for layer, modules in enumerate(ROOMS) for module in modules}
GEOMETRY = {"boxes", "views", "sampling", "matching", "pooling", "regions"}
ONLY_FOR = {"scenes": {"probes"}}  # modules that no other module may import
DEPENDENCIES = {"torch", "einops", "jaxtyping", "beartype"}
OPTIONAL = {
    "metrics": {"scipy"},
    "adapters": {"albumentations"},
    "viz": {"matplotlib"},
}  # imported where it is called, with a sentence if it is missing


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


def private_names(source):
    """Private names that a source takes from another module, by an import or by a dot."""
    for name in imports(source):
        if any(part.startswith("_") and not part.endswith("__") for part in name.split(".")[1:]):
            yield name
    modules = {name.split(".")[-1] for name in imports(source) if name.split(".")[0] == "densekit"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if module in modules and name.startswith("_") and not name.endswith("__"):
                yield f"{module}.{name}"


def faults(module, source):
    """What a module of the package imports against the rules."""
    for name in sorted(siblings(source)):
        if name == "":
            yield f"{module} imports the flat package, which imports {module}"
        elif LAYERS[name] >= LAYERS[module]:
            yield f"{module} (layer {LAYERS[module]}) imports {name} (layer {LAYERS[name]})"
        elif module == "losses" and name in GEOMETRY:
            yield f"a loss sees tensors, but losses imports {name}"
        elif module not in ONLY_FOR.get(name, {module}):
            yield f"{module} imports {name}, which only {sorted(ONLY_FOR[name])} may import"
    for name in private_names(source):
        if name.startswith("densekit") or ("." in name and name.split(".")[0] in LAYERS):
            yield f"{module} imports the private name {name}"
    for name in sorted(set(imports(source))):
        top = name.split(".")[0]
        known = DEPENDENCIES | OPTIONAL.get(module, set())
        if top not in {"densekit", *known, *sys.stdlib_module_names}:
            yield f"{module} imports {name or 'by a relative path'}, no dependency of the library"


# ---- the library -----------------------------------------------------------------------------


def modules():
    return [p for p in project_files("densekit/**/*.py") if p.name != "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_from_a_lower_layer(path):
    assert path.stem in LAYERS, f"give {path.stem} a layer in {Path(__file__).name}"
    assert list(faults(path.stem, path.read_text())) == []


def test_typing_holds_the_decorator_and_what_annotations_need():
    source = (ROOT / "densekit" / "typing.py").read_text()
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [name for name in functions if not name.startswith("_")] == ["typed"]


# ---- the recipes -----------------------------------------------------------------------------


def recipes():
    return project_files("recipes/*.py")


def downstream():
    return project_files("recipes/downstream/*.py")


def main_blocks(path):
    """The number of blocks that run a file by its name."""
    tests = [node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return sum("__name__" in ast.unparse(test) for test in tests)


def test_every_file_beside_the_harness_is_a_command_and_no_other_file_is():
    blocks = {path.name: main_blocks(path) for path in recipes() + downstream()}
    commands = {path.name for path in recipes()} - {"harness.py"}
    assert blocks == {name: int(name in commands) for name in blocks}


MORE = {  # a recipe that another one needs
    "d3ssl": {"proposals"},  # which made its data
    "soco": {"proposals", "d3ssl"},  # whose augmentations of regions and measures it has
    "adapt": {"evaluate"},  # which scores its encoder before and after
}


@pytest.mark.parametrize("path", recipes() + downstream(), ids=lambda path: path.stem)
def test_a_recipe_imports_only_what_lies_beside_it(path):
    local = {p.stem for p in recipes()} | {"downstream", "recipes", "tests", "benchmarks", ""}
    tops = {name.split(".")[0] for name in imports(path.read_text())}
    allowed = {"harness", "downstream", path.stem, *MORE.get(path.stem, set())}
    assert tops & local <= (allowed if path.stem != "harness" else set())


def test_the_harness_knows_no_geometry_and_no_loss():
    source = (ROOT / "recipes" / "harness.py").read_text()
    assert siblings(source) <= {"scenes", "distributed", ""}


def test_the_harness_names_no_method():
    text = (ROOT / "recipes" / "harness.py").read_text().lower()
    methods = {path.stem for path in recipes()} - {"harness", "export", "evaluate"}
    words = set(re.findall(r"[a-z0-9_]+", text))
    assert words & (methods | {"proposal", "box", "boxes", "cluster", "bank", "teacher"}) == set()


# ---- the checks ------------------------------------------------------------------------------


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
        ("diagnostics", "from densekit.scenes import sample_scenes"),
        ("diagnostics", "from densekit.boxes import _valid"),
        ("diagnostics", "from densekit import boxes\nboxes._valid"),
    ],
)
def test_the_check_sees_a_fault(module, source):
    assert len(list(faults(module, source))) == 1


def test_the_check_lets_a_lower_layer_pass():
    source = "import math\nimport torch.nn\nfrom densekit.boxes import box_iou\n"
    assert list(faults("views", source + "from densekit.typing import typed\n")) == []
