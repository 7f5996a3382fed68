"""What pip installs: four distributions from one repository, each with all of its files and nothing of the others."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = (ROOT, ROOT / "server", ROOT / "training", ROOT / "studio")


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name if folder != ROOT else "sdk")
def test_an_installed_package_has_every_file_that_the_repository_has(folder):
    """Setuptools takes a folder for a package where its name could be one; what lies in others has to be named."""
    tool = project(folder)["tool"]["setuptools"]
    find = tool["packages"]["find"]
    missing = []
    for where in find["where"]:
        for path in (folder / where).rglob("*"):
            *folders, name = path.relative_to(folder / where).parts
            if path.is_dir() or path.suffix in (".py", ".pyi", ".pyc") or ".egg-info/" in str(path):
                continue
            if not folders or not any(fnmatch.fnmatch(folders[0], known) for known in find.get("include", ["*"])):
                continue  # beside the packages: the project's own file, licences, what a build left
            package = list(itertools.takewhile(str.isidentifier, folders))
            inside = "/".join([*folders[len(package) :], name])
            wanted = tool["package-data"].get("*" if package == folders else ".".join(package), ())
            if not any(fnmatch.fnmatch(inside, pattern) for pattern in wanted):
                missing.append(str(path))
    assert not missing


def test_all_have_one_version_and_ask_for_each_other_at_it():
    projects = [project(folder)["project"] for folder in PROJECTS]
    (version,) = {one["version"] for one in projects}
    names = {one["name"] for one in projects}
    for one in projects:
        asked = [*one["dependencies"], *itertools.chain(*one["optional-dependencies"].values())]
        for requirement in asked:
            name, _, rest = requirement.partition("==")
            if name.partition("[")[0] in names - {one["name"]}:
                assert rest == version, requirement
        assert one["license-files"] == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        assert len({(folder / name).read_text() for folder in PROJECTS}) == 1


def test_every_extra_of_the_others_is_one_of_the_sdk():
    """`pip install 'turbolens[onnx]'` is what documents and messages say, wherever the code lies."""
    sdk, *others = (project(folder)["project"] for folder in PROJECTS)
    for other in others:
        for extra in other["optional-dependencies"]:
            assert sdk["optional-dependencies"][extra] == [f"{other['name']}[{extra}]=={sdk['version']}"]
    said = re.compile(r"turbolens\[([a-z,-]+)\]")
    texts = [
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
        *(path for f in PROJECTS for path in f.rglob("turbolens*/**/*.py")),
    ]
    named = {extra for path in texts for several in said.findall(path.read_text()) for extra in several.split(",")}
    assert {"server", "tensorrt"} <= named <= sdk["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A wheel of each distribution, by its name; built from a copy, since a build leaves files where it runs."""
    copy, out = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("wheels")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "web")
    for name in ("client", "server", "training", "studio"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(out), ".", "./server", "./training", "./studio"]
    subprocess.run(command, cwd=copy, check=True)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """All that is installed here but TurboLens."""
    folder = tmp_path_factory.mktemp("others")
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if not installed.name.startswith(("turbolens", "__editable__")):
            (folder / installed.name).symlink_to(installed)
    return folder


def site(folder: Path, *wheels: Path) -> Path:
    """A folder with these wheels installed."""
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(*paths: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with these folders alone to import from."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-S", "-P", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_the_sdk_is_a_small_wheel_that_runs_alone(wheels, others, tmp_path):
    assert wheels.keys() == {"turbolens", "turbolens_server", "turbolens_studio", "turbolens_training"}
    assert wheels["turbolens"].stat().st_size < 2**18
    inside = {name.partition("/")[0] for name in zipfile.ZipFile(wheels["turbolens"]).namelist()}
    assert inside == {"turbolens", "turbolens_command", "turbolens_proto", "turbolens-0.1.0.dist-info"}
    light = site(tmp_path, wheels["turbolens"])
    code = "import turbolens.cli, sys; print(turbolens.__file__, 'torch' in sys.modules); turbolens.cli.main({})"
    helped = python(light, others, code=code.format(["--help"]))
    assert helped.stdout.startswith(f"{light}/turbolens/__init__.py False\n"), helped.stderr
    assert "turbolens generate" in helped.stdout
    for argv, extra in ((["serve"], "server"), (["train"], "training"), (["studio"], "studio")):
        refused = python(light, others, code=code.format(argv))
        assert refused.returncode == 1
        assert refused.stderr == f"turbolens: {argv[0]} is not installed: pip install 'turbolens[{extra}]'\n"
    embedded = python(light, others, code="import turbolens as tl; tl.connect('embedded')")
    assert "pip install 'turbolens[server]'" in embedded.stderr


def test_the_server_is_a_wheel_that_serves_mini(wheels, others, tmp_path):
    inside = {name.partition("/")[0] for name in zipfile.ZipFile(wheels["turbolens_server"]).namelist()}
    assert inside == {"turbolens_server", "turbolens_server-0.1.0.dist-info"}
    both = site(tmp_path, wheels["turbolens"], wheels["turbolens_server"])
    code = """
import turbolens as tl
with tl.connect("embedded", warm_up=False) as lens:
    print(tl.__file__, [sae.name for sae in lens.model().saes], lens.generate("a big red star", seed=1).image.size)
"""
    served = python(both, others, code=code)
    assert served.stdout.startswith(f"{both}/turbolens/__init__.py ['down.2.1', "), served.stderr
    assert served.stdout.endswith("(128, 128)\n")


def test_the_studio_is_a_wheel_that_brings_its_page(wheels):
    inside = zipfile.ZipFile(wheels["turbolens_studio"]).namelist()
    assert {name.partition("/")[0] for name in inside} == {"turbolens_studio", "turbolens_studio-0.1.0.dist-info"}
    page = {name.rpartition("/")[2] for name in inside if name.startswith("turbolens_studio/static/")}
    assert {"index.html", "studio.js", "studio.css", "icon.svg"} <= page


def test_every_command_is_where_its_code_is(wheels):
    """An entry point names a function of its own distribution; the SDK's command knows which extra brings it."""
    from turbolens.cli import _EXTRAS

    found = {}
    for name, wheel in wheels.items():
        archive = zipfile.ZipFile(wheel)
        (points,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        text = archive.read(points).decode()
        own = {member.partition("/")[0] for member in archive.namelist() if member.endswith("/__init__.py")}
        assert set(re.findall(r"= (\w+)[.:]", text)) <= own
        found |= dict.fromkeys(
            re.findall(r"^(\w+) = ", text.partition("[turbolens.commands]")[2].partition("\n[")[0], re.M), name
        )
    extras = {"turbolens_server": "server", "turbolens_studio": "studio", "turbolens_training": "training"}
    assert {command: extras[name] for command, name in found.items()} == _EXTRAS
