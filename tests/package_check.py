"""The package where nothing else is: wheel, source, examples, a copied recipe and the notebook.

    make package-check           # about ten minutes, half of it pip, and 7 GB of disk space

It makes an environment and an empty folder, installs the wheel there with the extras `recipes` and
`weights`, and says how long each step took. Nothing of this checkout is on the path of the steps.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

EXAMPLES = """
import doctest, importlib, pkgutil, densekit
failed = tried = 0
for module in pkgutil.iter_modules(densekit.__path__):
    result = doctest.testmod(importlib.import_module("densekit." + module.name))
    failed, tried = failed + result.failed, tried + result.attempted
print(tried, "lines of examples,", failed, "failed")
raise SystemExit(failed > 0 or tried < 100)
"""

PHOTOS = """
import pathlib, densekit
from PIL import Image
folder = pathlib.Path("photos")
folder.mkdir()
for number, scene in enumerate(densekit.sample_scenes(100, (240, 320)).images):
    pixels = (255 * scene).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / f"{number}.jpg")
"""

NOTEBOOK = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=280, kernel_name="python3").execute()
nbformat.write(notebook, "executed.ipynb")
"""


def build(folder):
    """Make the source package, and the wheel out of it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    return wheel, source


def make_environment(folder, lent=None):
    """A new environment: its interpreter. It may be lent the packages of another environment.

    Of those, none that is installed in development mode is seen, because of whose files they are.
    """
    venv.create(folder, with_pip=True)
    if lent is not None:
        (packages,) = Path(folder, "lib").glob("python*/site-packages")
        (packages / "lent.pth").write_text(f"{lent}\n")
    return Path(folder, "bin", "python")


def surroundings(**more):
    """The variables of this process, without those that lead to this checkout."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    others = {key: value for key, value in os.environ.items() if key not in own}
    pins = {
        key: str(ROOT / others[key])  # `make` names them from where it is
        for key in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
        if others.get(key)
    }
    return {**others, **pins, **more}


def step(name, command, folder, **more):
    """Run a command in a folder, and print its time; end with what it said where it fails."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=surroundings(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.monotonic() - started
    print(f"{name:36} {seconds:5.0f} seconds, {processor:5.0f} of CPU time", flush=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{name} failed with exit code {done.returncode}.")
    return done.stdout


def check(folder):
    """All steps, in an empty folder."""
    wheel, source = build(folder / "dist")
    python = make_environment(folder / "environment")
    empty = folder / "empty"
    empty.mkdir()

    pip = [python, "-m", "pip", "install", "--quiet"]
    step("install the wheel", [*pip, f"{wheel}[recipes,weights]"], empty)
    imported = "import densekit; print(densekit.__file__)"
    path = step("import", [python, "-c", imported], empty).strip()
    assert path.startswith(str(folder / "environment")), path
    step("examples of the docstrings", [python, "-c", EXAMPLES], empty)
    step("list the recipes", [python, "-m", "densekit.recipes", "list"], empty)

    step("images of one's own", [python, "-c", PHOTOS], empty)
    step("copy adapt", [python, "-m", "densekit.recipes", "copy", "adapt", "my"], empty)
    step("its first pictures of them", [python, "my/adapt.py", "--data", "photos"], empty)
    pictures = sorted((empty / "runs").glob("*/pictures/*.png"))
    assert len(pictures) == 2, pictures
    step("copy minimal", [python, "-m", "densekit.recipes", "copy", "minimal", "my2"], empty)
    step("its demo", [python, "my2/minimal.py"], empty)

    step("install the notebook's program", [*pip, "nbclient", "ipykernel"], empty)
    notebook = [python, "-c", NOTEBOOK, ROOT / "notebooks" / "adapt.ipynb"]
    alone = folder / "notebook"
    alone.mkdir()
    step("the notebook", notebook, alone, DENSEKIT=str(wheel))

    step("install the source", [*pip, "--force-reinstall", "--no-deps", source], empty)
    step("import", [python, "-c", imported], empty)
    step("list the recipes", [python, "-m", "densekit.recipes", "list"], empty)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where all of it is kept, by default nowhere")
    folder = parser.parse_args().folder
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            check(Path(temporary))
    else:
        folder.mkdir(parents=True)
        check(folder.resolve())
