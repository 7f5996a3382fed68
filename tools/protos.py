"""Generate the Python stubs of `proto/` into `client/turbolens_proto`, or check that they are fresh.

    python tools/protos.py            write the stubs and leave the baseline alone
    python tools/protos.py --check    fail where the checked-in stubs differ from what would be written

The stubs are made by a pinned, old grpcio-tools, so that they import on every newer grpcio and protobuf.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "client" / "turbolens_proto"
TOOLS_VERSION = "1.81.1"


def generate(out: Path) -> None:
    """Write the stubs of every proto below `out`/v1."""
    if version("grpcio-tools") != TOOLS_VERSION:
        raise SystemExit(f"grpcio-tools {version('grpcio-tools')} found; the stubs are made with {TOOLS_VERSION}")
    protos = sorted((ROOT / "proto" / "turbolens" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        bin_dir = Path(sys.executable).parent
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
        command += [f"--python_out={scratch}", f"--grpc_python_out={scratch}"]
        for plugin, flag in (("protoc-gen-mypy", "mypy"), ("protoc-gen-mypy_grpc", "mypy_grpc")):
            command += [f"--plugin={plugin}={bin_dir / plugin}", f"--{flag}_out=quiet:{scratch}"]
        subprocess.run([*command, *map(str, protos)], check=True)
        target = out / "v1"
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((Path(scratch) / "turbolens" / "v1").iterdir()):
            # The proto package is turbolens.v1, but `turbolens` is the SDK: the stubs live in their own package.
            text = re.sub(
                r"\bturbolens\.v1\b(?=( import|\.\w+_pb2| as|$))", "turbolens_proto.v1", path.read_text(), flags=re.M
            )
            text = text.replace("import turbolens.v1.", "import turbolens_proto.v1.")
            (target / path.name).write_text(text)
    for folder in (out, target):
        (folder / "__init__.py").write_text('"""Generated from proto/turbolens/v1; see tools/protos.py."""\n')
    (out / "py.typed").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(STUBS)
        return
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
        present = {p.relative_to(STUBS) for p in STUBS.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        stale = [n for n in names & present if not filecmp.cmp(fresh / n, STUBS / n, shallow=False)]
        stale += sorted(names ^ present)
        if stale:
            raise SystemExit(f"stale stubs, run `make protos`: {', '.join(map(str, sorted(stale)))}")


if __name__ == "__main__":
    main()
