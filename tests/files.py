"""The files that belong to the project, whatever else lies in its folder."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def tracked():
    """Paths of all files that git tracks; None without git, as in a source distribution."""
    if not (ROOT / ".git").exists():  # a folder inside another repository is not its checkout
        return None
    try:
        command = ["git", "ls-files", "-z"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return frozenset(ROOT / name for name in done.stdout.split("\0") if name)


def project_files(*patterns):
    """Files of the project that match one of the patterns, such as "docs/**/*.md"; sorted.

    A log, a draft or a cache that lies in the folder is not among them. Without git nobody can
    tell them apart, and every file that matches is one.
    """
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(found if tracked() is None else found & tracked())


def own_modules():
    """Names of the project's modules, as they are imported: packages by their own names."""
    files = project_files("recipes/*.py", "tests/*.py", "tests/recipes/*.py")
    return ["densekit", "downstream", *(path.stem for path in files)]
