"""Every public name is exported once, documented in full, and shown by an example that runs."""

import ast
import doctest
import importlib
import inspect
import os
import re
import runpy
import shlex
import sys
import textwrap
from contextlib import nullcontext, suppress
from unittest import SkipTest
from xml.etree import ElementTree

import pytest
import torch
import yaml
from api_pages import first_page, first_sentence, modules, page
from files import ROOT, project_files
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import densekit

MODULES = {
    path.stem: importlib.import_module(f"densekit.{path.stem}")
    for path in project_files("densekit/*.py")
    if path.stem != "__init__"
}
NOT_FLAT = {"recipes", "testing", "typing", "viz"}  # by their own names: no part of a training
INTERNAL = {  # what modules of densekit share, and `__all__` leaves out
    "hints": {
        "array_hint",
        "fits",
        "form_decides",
        "form_of",
        "is_array",
        "is_record",
        "records_of",
        "with_fields",
    },
    "messages": {"about_map", "explain", "explain_devices", "looks_like_map"},
    "numerics": {
        *("block_rows", "broadcasts", "check", "check_cells", "check_size", "check_temperature"),
        *("fit_valid", "full_precision", "has_spread", "in_range", "interpolation_weights"),
        *(
            "readable",
            "recomputed",
            "refuse_channels_last",
            "refuse_maps",
            "row_of",
            "safe_divide",
            "sample_uniform",
            "take_rows",
        ),
        "widened",
    },
    "pooling": {"pool_bins"},
}
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Examples", "References")
PUBLIC = {
    f"{module}.{name}": getattr(MODULES[module], name)
    for module in MODULES
    for name in MODULES[module].__all__
    if getattr(getattr(MODULES[module], name), "__module__", "") == f"densekit.{module}"
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
RECORDS = {name: value for name, value in PUBLIC.items() if hasattr(value, "_fields")}
# No example may depend on it: one that draws numbers seeds them, and prints what any CPU prints.
SEED = int(os.environ.get("DENSEKIT_TEST_SEED", "0"))
PAGES = project_files("docs/**/*.md", "README.md")


# ---- exports ---------------------------------------------------------------------------------


def test_the_flat_package_lists_every_public_name_once():
    homes = {}
    for module in MODULES.keys() - NOT_FLAT:
        for name in MODULES[module].__all__:
            homes.setdefault(name, []).append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
    assert sorted(homes) == sorted(densekit.__all__)
    assert len(set(densekit.__all__)) == len(densekit.__all__)
    for name, (module,) in homes.items():
        assert getattr(densekit, name) is getattr(MODULES[module], name)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_lists_what_it_defines(module):
    defined = {
        name
        for name, value in vars(MODULES[module]).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "") == f"densekit.{module}"
    }
    internal = INTERNAL.get(module, set())
    assert internal <= defined
    assert defined - internal <= set(MODULES[module].__all__)


@pytest.mark.parametrize("module", INTERNAL)
def test_what_modules_share_is_explained_and_used_by_another_one(module):
    sources = [path.read_text() for path in project_files("densekit/*.py") if path.stem != module]
    for name in INTERNAL[module]:
        assert getattr(MODULES[module], name).__doc__
        assert any(re.search(rf"\b{name}[()]", source) for source in sources)


# ---- randomness ------------------------------------------------------------------------------

DRAW_ON_THEIR_WAY = {  # algorithms and states, by the names that the papers give them
    *(
        "bootstrap",
        "dense_structure_score",
        "ema_update",
        "init_bank",
        "kmeans_plus_plus",
        "minibatch_kmeans",
    ),
    *("similarity_iou_curve", "train_linear_probe"),
}


def test_what_draws_is_called_so_and_takes_a_generator():
    names = {name.split(".")[1]: value for name, value in FUNCTIONS.items()}
    draws = {name for name, f in names.items() if "generator" in inspect.signature(f).parameters}
    assert {name for name in names if name.startswith("sample_")} == draws - DRAW_ON_THEIR_WAY
    assert draws >= DRAW_ON_THEIR_WAY


# ---- docstrings ------------------------------------------------------------------------------


def sections(docstring):
    """The sections of a Google-style docstring, in order: name -> text; "" is what precedes."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(docstring), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(text):
    """Names that a section explains: the lines of its first indentation, up to the colon."""
    return [name.lstrip("*") for name in re.findall(r"^ {4}([\w*]+)(?: \(.*?\))?:", text, re.M)]


def raised(function):
    """Names of the errors that the body of a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    nodes = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return {node.id for node in calls if isinstance(node, ast.Name)}


def shortcomings(function):
    """What the docstring of a public function lacks."""
    found = sections(function.__doc__ or "")
    signature = inspect.signature(function)
    if not re.fullmatch(r"\S[^\n]*[.?!]", found[""].split("\n\n")[0].strip()):
        yield "its first paragraph is not one line that ends in a stop"
    if [*found][1:] != [name for name in SECTIONS if name in found]:
        yield f"its sections {[*found][1:]} are not in the order {SECTIONS}"
    if entries(found.get("Args", "")) != [*signature.parameters]:
        yield f"Args explains {entries(found.get('Args', ''))}, not {[*signature.parameters]}"
    if signature.return_annotation is not None and not found.get("Returns", "").strip():
        yield "Returns is missing"
    if missing := raised(function) - set(entries(found.get("Raises", ""))):
        yield f"Raises leaves out {sorted(missing)}"
    lines = re.findall(r"^ *(?:>>>|\.\.\.) ", found.get("Examples", ""), re.M)
    if not 1 <= len(lines) <= 6:
        yield f"Examples has {len(lines)} lines of code, not 1 to 6"
    if "References" in found and not found["References"].strip():
        yield "References is empty"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented_in_full(name):
    assert list(shortcomings(FUNCTIONS[name])) == []


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_explains_every_field(name):
    assert RECORDS[name].__doc__.count("\n") > 1  # not the one that NamedTuple writes
    found = sections(RECORDS[name].__doc__)
    assert entries(found.get("Attributes", "")) == list(RECORDS[name]._fields)


def test_every_public_name_is_a_function_or_a_record():
    assert PUBLIC.keys() == FUNCTIONS.keys() | RECORDS.keys()


def _bad(x, y: int = 0) -> int:
    """Two lines
    and no stop

    Args:
        x: A number.

    Examples:
        No code.

    Returns:
        A number.

    References:
    """
    if y:
        raise ValueError("y")
    return x


def test_the_check_sees_each_shortcoming():
    found = " | ".join(shortcomings(_bad))
    for word in ("one line", "order", "Args explains", "Raises", "Examples", "References"):
        assert word in found
    found = " | ".join(shortcomings(lambda: None))
    for word in ("one line", "Returns", "Examples"):
        assert word in found


# ---- examples --------------------------------------------------------------------------------


class OtherCPU(TorchDispatchMode):
    """In place of another CPU: sums and functions come out one rounding away from this one's."""

    # Each of these has some freedom in how it is computed; +, -, *, / and the root have none.
    FREE = (
        *("sum", "mean", "prod", "cumsum", "std", "var", "linalg_vector_norm", "_cdist_forward"),
        *("mm", "bmm", "addmm", "baddbmm", "dot", "mv", "convolution", "native_layer_norm"),
        *("_softmax", "_log_softmax", "logsumexp", "exp", "expm1", "log", "log1p", "log2", "pow"),
        *("rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "grid_sampler_2d"),
        *("upsample_bilinear2d", "_linalg_svd", "_linalg_eigh", "_linalg_solve_ex", "linalg_qr"),
        *("linalg_lstsq", "linalg_cholesky_ex", "cholesky_solve"),
    )

    def __init__(self, direction):
        super().__init__()
        self.direction = direction

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.FREE:
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.mul_(1 + self.direction * torch.finfo(x.dtype).eps)
        return result


def run_example(name, seed):
    # The names of its own module alone, which any other tool for such examples gives them as well.
    names = dict(vars(MODULES[name.split(".")[0]]))
    names["__name__"] = __name__  # a warning that an example causes is one of our own
    test = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, names, name, None, None)
    report = []
    torch.manual_seed(seed)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=report.append).failed == 0, "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_docstring_runs(name):
    draws = "rand" in PUBLIC[name].__doc__
    for seed in range(SEED, SEED + (20 if draws else 1)):
        run_example(name, seed)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_of_a_docstring_prints_the_same_on_any_cpu(name, direction):
    with OtherCPU(direction):
        run_example(name, SEED)


def test_another_cpu_prints_the_sum_of_ones_otherwise():
    with OtherCPU(1):
        assert str(torch.ones(2).sum()) == "tensor(2.0000)"
        assert str(torch.ones(2) + torch.ones(2)) == "tensor([2., 2.])"


WITH_COMMANDS = {"my_images.md"}  # the blocks of these pages that are `sh` run, too
ELSEWHERE = OtherCPU(1)
RUNS = [
    pytest.param(page, cpu, id=f"{page.relative_to(ROOT)}-{name}")
    for page in PAGES
    for name, cpu in {"here": nullcontext(), "elsewhere": ELSEWHERE}.items()
    if cpu is not ELSEWHERE or page.name not in WITH_COMMANDS
]


@pytest.mark.parametrize(("page", "cpu"), RUNS)
def test_the_python_of_a_page_runs(page, cpu, tmp_path, monkeypatch):
    def run_commands(example):
        """Run each `python recipes/NAME.py OPTIONS` of a block, in this process."""
        for line in example.parsed.replace("\\\n", " ").splitlines():
            _, script, *options = shlex.split(line)
            monkeypatch.setattr(sys, "argv", [script, *options])
            with pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_path(str(ROOT / script), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(SEED)
    parsers = [PythonCodeBlockParser(), SkipParser()]
    if page.name in WITH_COMMANDS:
        parsers.append(CodeBlockParser("sh", run_commands))
    document = Sybil(parsers).parse(page)
    document.namespace["__name__"] = __name__
    with cpu:
        for example in document.examples():
            with suppress(SkipTest):  # it needs a package that the tests do not have
                example.evaluate()


def test_the_own_recipe_is_as_short_as_its_page_says():
    text = (ROOT / "docs" / "guide" / "own_recipe.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert "150 lines" in text.splitlines()[0]
    assert "\n\n".join(blocks).count("\n") <= 150


@pytest.mark.parametrize("name", ["frames", "valid", "randomness", "precision", "clusters"])
def test_a_figure_of_the_guide_is_drawn_where_a_page_shows_it(name):
    drawn = runpy.run_path(str(ROOT / "docs" / "guide" / "figures.py"))[f"{name}_figure"]()
    assert ElementTree.fromstring(drawn).find("svg").get("aria-label")
    assert "nan" not in drawn.split("base64")[0]
    shown = [page for page in PAGES if f"print({name}_figure())" in page.read_text()]
    assert len(shown) == 1


# ---- formulas --------------------------------------------------------------------------------


def test_formulas_are_rendered_offline():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert {"pymdownx.arithmatex": {"generic": True}} in settings["markdown_extensions"]
    names = [*settings["extra_css"], *settings["extra_javascript"]]
    assert [name for name in names if not (ROOT / "docs" / name).is_file()] == []
    katex = ROOT / "docs" / "assets" / "katex"
    assert (katex / "LICENSE").read_text().startswith("The MIT License")
    fonts = re.findall(r"url\(([^)]+)\)", (katex / "katex.min.css").read_text())
    assert len(fonts) == len({*fonts}) == 20
    assert [x for x in fonts if not (katex / x).is_file()] == []


def formulas(text):
    """What stands between dollar signs, outside of code."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`|^ *>>>.*$", "", text, flags=re.M | re.S)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", text, re.S)]


@pytest.mark.parametrize("page", [page for page in PAGES if "/guide/" in str(page)], ids=str)
def test_the_formulas_of_a_guide_close_what_they_open(page):
    for formula in formulas(page.read_text()):
        assert formula.count("{") == formula.count("}")
        assert formula.count("\\left") == formula.count("\\right")


@pytest.mark.parametrize("name", [name for name in PUBLIC if "$" in PUBLIC[name].__doc__])
def test_the_formulas_of_a_docstring_can_be_read_and_rendered(name):
    found = formulas(PUBLIC[name].__doc__)
    assert found
    for formula in found:
        assert formula.count("{") == formula.count("}")
        assert "\n\n" not in formula  # a dollar sign without its partner
        assert not re.search(r"\\(left|right|big|displaystyle)\b", formula), "too much TeX"
        assert "\t" not in formula  # a backslash in a string that is not raw
        assert "\f" not in formula


# ---- pages -----------------------------------------------------------------------------------


def nav_pages(entry):
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from nav_pages(part)


def nav():
    return list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


@pytest.mark.parametrize("module", modules())
def test_a_module_with_public_names_has_a_page(module):
    path = ROOT / "docs" / "api" / f"{module}.md"
    assert path.read_text() == page(module), "run python tests/api_pages.py"
    assert f"api/{module}.md" in nav()


def test_the_first_page_is_the_readme():
    assert (ROOT / "docs" / "index.md").read_text() == first_page(), "run python tests/api_pages.py"


def test_a_time_or_size_of_the_readme_stands_on_the_page_that_it_links():
    table = (ROOT / "README.md").read_text().split("## Which recipe for me\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 9
    found = []
    for *_, time, memory in rows:
        for cell in (time, memory.removesuffix(" |")):
            assert re.search(r"measured|as above|\]\(docs/", cell), cell
            found += re.findall(r"\[([^\]]+)\]\(([^)#]+)", cell)
    table_of_runs = runpy.run_path(str(ROOT / "docs/recipes/adapt_table.py"))
    rows_of_runs = table_of_runs["read_rows"](ROOT / "docs/recipes/adapt-runs.jsonl")
    runs = table_of_runs["results"](rows_of_runs)
    for text, target in found:
        if re.search(r"\d|three|four", text):
            known = (ROOT / target).read_text() + runs * target.endswith("adapt.md")
            assert text.removesuffix(" GB") in known, text


def test_the_help_of_the_package_lists_the_modules():
    text = " ".join(densekit.__doc__.split())
    assert [x for x in modules() if f" {x}: {first_sentence(MODULES[x])} " not in text] == []


def without_layout(code):
    """Code without blanks and trailing commas: its lines are broken elsewhere when indented."""
    return re.sub(r"\s|,(?=\s*[)\]])", "", code)


def test_the_page_of_the_minimal_recipe_shows_its_code():
    source = without_layout((ROOT / "recipes" / "minimal.py").read_text())
    text = (ROOT / "docs" / "recipes" / "minimal.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) > 5
    assert [block for block in blocks if without_layout(block) not in source] == []


def test_torchrun_is_told_where_its_own_options_end():
    files = [*PAGES, *project_files("recipes/*.py")]
    text = "\n".join(path.read_text().replace("\\\n", "") for path in files)
    commands = re.findall(r"^ *torchrun .*$", text, re.M)
    assert len(commands) > 9
    assert [x for x in commands if not re.search(r" -- +\S+\.py\b", x)] == []  # it has a --run-path


def test_a_recipe_has_a_page():
    commands = [path for path in project_files("recipes/*.py") if "tyro.cli" in path.read_text()]
    names = {path.stem for path in commands}
    assert len(names) > 9
    assert {f"recipes/{name}.md" for name in names} <= set(nav())


def test_the_pages_and_the_navigation_name_each_other():
    pages = [str(path.relative_to(ROOT / "docs")) for path in project_files("docs/**/*.md")]
    assert sorted(nav()) == sorted(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_file_finds_it(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
