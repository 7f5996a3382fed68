"""The image: clean by hadolint, made of what the build gets, with a bill of what is in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

from tests.deploy import charts

STAGES = re.findall(r"^FROM (\S+) AS (\S+)$", charts.DOCKERFILE, re.M)


def test_hadolint_finds_no_fault():
    done = subprocess.run(
        [str(charts.BIN / "hadolint"), str(charts.ROOT / "deploy/docker/Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_hadolint_would_see_one():
    done = subprocess.run(
        [str(charts.BIN / "hadolint"), "-"], input="FROM debian\n", capture_output=True, text=True, check=False
    )
    assert "DL3006" in done.stdout


def test_what_comes_from_elsewhere_can_be_pinned():
    known = {name for _, name in STAGES} | {"base-${DEVICE}"}
    assert {image for image, _ in STAGES} - known == {"python:${PYTHON_TAG}${PYTHON_DIGEST:+@${PYTHON_DIGEST}}"}
    assert re.search(r"^ARG PYTHON_DIGEST=$", charts.DOCKERFILE, re.M)
    for device in ("cpu", "cuda"):
        assert f"base-{device}" in known


def test_every_image_that_runs_is_nobody_in_particular():
    """After the last USER nothing runs; and it is the user whom the charts name."""
    stages = re.split(r"^FROM ", charts.DOCKERFILE, flags=re.M)[1:]
    final = [stage for stage in stages if "\nENTRYPOINT " in stage]
    assert {re.match(r"\S+ AS (\S+)", stage)[1] for stage in final} == charts.entrypoints().keys()
    for stage in final:
        assert re.findall(r"^USER (\S+)$", stage, re.M) == ["10001:10001"]
        assert "RUN" not in stage.partition("\nUSER ")[2]
    assert list(charts.entrypoints())[-1] == "server"  # what is built where no stage is named


def test_the_image_gets_what_it_is_built_from():
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", charts.DOCKERFILE, re.M)
        for name in line.split()[:-1]
    }  # fmt: skip
    let_in = {line[1:] for line in (charts.ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all((charts.ROOT / name).exists() for name in copied)
    project = tomllib.loads((charts.ROOT / "pyproject.toml").read_text())
    assert {*project["tool"]["setuptools"]["packages"]["find"]["where"]} <= let_in
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= let_in
    own = {path.parent.name for path in charts.ROOT.glob("*/pyproject.toml")}
    installed = re.findall(
        r"\./(\w+)", "".join(re.findall(r"^RUN pip install --constraint.+$", charts.DOCKERFILE, re.M))
    )
    assert {*installed} == own & let_in


def test_the_bill_of_materials_is_made_by_the_command_in_the_dockerfile(tmp_path):
    """Run here, on this environment: it names every package with its version."""
    (line, *more) = set(re.findall(r"/opt/sbom/bin/(cyclonedx-py .+)$", charts.DOCKERFILE, re.M))
    assert not more
    out = tmp_path / "sbom.json"
    here = line.replace("/opt/turbolens/bin/python", sys.executable).replace("/opt/turbolens/sbom.cdx.json", str(out))
    subprocess.run([str(charts.BIN / here.split()[0]), *here.split()[1:]], check=True, capture_output=True)
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    versions = {one["name"]: one["version"] for one in bill["components"]}
    assert versions["torch"].startswith(
        re.findall(r"^torch==(\S+)$", (charts.ROOT / "constraints.txt").read_text(), re.M)[0]
    )
    assert re.findall(r"cyclonedx-bom==(\S+)", charts.DOCKERFILE) == [versions["cyclonedx-bom"]]
