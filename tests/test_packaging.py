"""What pip installs is what the repository has."""

from __future__ import annotations

import fnmatch
import itertools
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_installed_package_has_every_file_that_the_repository_has():
    """Setuptools takes a folder for a package where its name could be one; what lies in others has to be named."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    missing = []
    for where in tool["packages"]["find"]["where"]:
        for path in (ROOT / where).rglob("*"):
            *folders, name = path.relative_to(ROOT / where).parts
            if path.is_dir() or path.suffix in (".py", ".pyi", ".pyc") or ".egg-info/" in str(path):
                continue
            package = list(itertools.takewhile(str.isidentifier, folders))
            inside = "/".join([*folders[len(package) :], name])
            wanted = tool["package-data"].get("*" if package == folders else ".".join(package), ())
            if not any(fnmatch.fnmatch(inside, pattern) for pattern in wanted):
                missing.append(str(path))
    assert not missing
