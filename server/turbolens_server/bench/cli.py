"""`turbolens bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro

from turbolens_server.bench.config import BenchConfig


def main(argv: list[str]) -> None:
    """Entry point of `turbolens bench`: measure, print, and write where told to."""
    config = tyro.cli(BenchConfig, args=argv, prog="turbolens bench")
    if Path(config.model).is_file():
        sys.exit(
            f"turbolens bench: --model {config.model}: one file; the bare pipeline beside it is read from a folder"
        )
    # What measures is imported here: a command's help must not wait for torch.
    from turbolens_server.bench.results import describe_machine, save, to_markdown
    from turbolens_server.bench.suite import describe_case, run
    from turbolens_server.files import WriteError, check_writable
    from turbolens_server.loading.errors import LoadError
    from turbolens_server.sae.bundle import BundleError

    try:
        if config.out is not None:
            check_writable(config.out.parent)
        result = run(config)
    except (LoadError, BundleError, ValueError, WriteError) as error:
        sys.exit(f"turbolens bench: {error}")
    if config.json:
        print(json.dumps(result, indent=1))
    else:
        print(describe_machine(result["machine"]))
        for case in result["cases"]:
            print(describe_case(case))
        print(f"\n{to_markdown(result)}")
    if config.out is not None:
        try:
            save(config.out, result)
        except WriteError as error:
            sys.exit(f"turbolens bench: {error}")
