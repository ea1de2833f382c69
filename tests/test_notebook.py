"""The notebooks: their cells are plain, their outputs are left out, and they run."""

import ast
import json
import sysconfig

import package_check
import pytest
from files import project_files

NOTEBOOKS = project_files("notebooks/*.ipynb")


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_is_one():
    assert "adapt.ipynb" in {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_as_it_was_written(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        lines = "".join(cell["source"]).replace("\\\n", " ").splitlines()
        ast.parse("\n".join(line for line in lines if line[:1] not in ("%", "!")))
    first = "".join(cells(path, "code")[0]["source"])
    assert '%pip install --quiet "{DENSEKIT}[' in first
    for cell in cells(path, "markdown"):
        for line in "".join(cell["source"]).splitlines():
            assert ". " not in line.rstrip("."), f"more than one sentence: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_in_an_environment_and_a_folder_of_its_own(path, tmp_path):
    """`make package-check` does the same where not even torch is installed."""
    pytest.importorskip("ipykernel")
    pytest.importorskip("nbclient")
    wheel, _ = package_check.build(tmp_path / "dist")
    lent = sysconfig.get_path("purelib")
    python = package_check.make_environment(tmp_path / "environment", lent=lent)
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [python, "-c", package_check.NOTEBOOK, path]
    package_check.step("the notebook", command, empty, DENSEKIT=str(wheel))

    executed = [cell["outputs"] for cell in cells(empty / "executed.ipynb", "code")]
    kinds = {output["output_type"] for outputs in executed for output in outputs}
    assert "error" not in kinds
    pictures = [o for outputs in executed for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    assert (empty / "run" / "encoder.safetensors").is_file()
