"""Compile every fused kernel for every supported GPU, on a machine without one, and say what each takes.

    python tools/kernels_aot.py                 all, and write docs/kernels-aot.md
    python tools/kernels_aot.py --arch 90       print those of one compute capability

Fails where a kernel does not compile or spills registers. Sizes are SDXL Turbo's: updates of 1,280 dimensions, 5,120
features, in half precision.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turbolens_server.kernels import triton_kernels as kernels
from turbolens_server.kernels.fused import FUSE, JUMPRELU_TILES, OTHER_TILES, TOPK_TILES, Tiles, candidates_for

ROOT: Final = Path(__file__).resolve().parent.parent
ARCHES: Final = {80: "A100", 89: "L40S, RTX 40", 90: "H100", 100: "B200", 120: "RTX 50"}
D_MODEL: Final = 1280
D_SAE: Final = 5120
HALF, FLOAT, INT, LONG, KEY = "*fp16", "*fp32", "*i32", "*i64", "*i64"


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One kernel with the arguments that the compiler sees, as a launch would give them."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Type of every argument that is no constant."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that did not fit."""
    shared: int
    """Bytes of a program."""


def _encoder(tiles: Tiles) -> tuple[dict[str, str], dict[str, Any]]:
    """What every kernel with a matrix product takes."""
    types = {"x_ptr": HALF, "w_ptr": HALF, "bias_ptr": FLOAT, "N": "i32", "w_stride_d": "i32"}
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    return types, {"w_stride_f": 1, "D": D_MODEL, **blocks}


def _shortlist(tiles: Tiles, k: int, *, again: bool = False) -> Specimen:
    types, constants = _encoder(tiles)
    per_tile = k if again else candidates_for(D_SAE, k, tiles.block_n)
    what = f"k {k}, {per_tile} a tile of {tiles.block_m} x {tiles.block_n}"
    what += ", flagged rows" * again
    return Specimen(
        f"shortlist ({what})",
        kernels.shortlist,
        {**types, "flags_ptr": INT, "keys_ptr": KEY},
        {**constants, "F": D_SAE, "PER_TILE": per_tile, "ONLY_FLAGGED": again},
        tiles.num_warps,
        tiles.num_stages,
    )


def _merge(given: int, per_tile: int, k: int, *, again: bool = False, counts: bool = False) -> Specimen:
    types = {"keys_ptr": KEY, "values_ptr": FLOAT, "indices_ptr": LONG, "N": "i32"}
    types["counts_ptr" if counts else "flags_ptr"] = INT
    return Specimen(
        f"merge ({given} candidates to {k}{', flagged rows' * again}{', counted' * counts})",
        kernels.merge,
        types,
        {
            "flags_ptr" if counts else "counts_ptr": None, "KEYS": given, "PER_TILE": per_tile, "K": k,
            "HAS_COUNTS": counts, "ONLY_FLAGGED": again, "BLOCK_R": TOPK_TILES.merge_rows,
            "WIDTH": triton.next_power_of_2(given),
        },
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """Every kernel that serves or that the benchmark tries."""
    tiles, jumping = TOPK_TILES, JUMPRELU_TILES
    count = triton.cdiv(D_SAE, tiles.block_n)
    types, constants = _encoder(jumping)
    found = [_shortlist(other, 10) for other in (tiles, *OTHER_TILES)]
    found += [_shortlist(tiles, 20), _shortlist(tiles, 20, again=True)]
    for k in (10, 20):
        few = candidates_for(D_SAE, k, tiles.block_n)
        found += [_merge(count * few, few, k), _merge(count * k, k, k, again=True)]
    found += [
        Specimen(
            "above_threshold (64 slots)",
            kernels.above_threshold,
            {**types, "threshold_ptr": FLOAT, "counts_ptr": INT, "keys_ptr": KEY},
            {**constants, "F": D_SAE, "SLOTS": 64},
            jumping.num_warps,
            jumping.num_stages,
        ),
        _merge(64, 64, 64, counts=True),
        Specimen(
            "decode_rows (k 20)",
            kernels.decode_rows,
            {"values_ptr": FLOAT, "indices_ptr": LONG, "w_ptr": HALF, "out_ptr": FLOAT},
            {"D": D_MODEL, "K": 20, "BLOCK_D": 256},
            num_warps=2,
        ),
    ]
    pointers = {
        "x_ptr": HALF, "gain_ptr": FLOAT, "offsets_ptr": INT, "features_ptr": LONG, "slope_ptr": FLOAT,
        "shift_ptr": FLOAT, "w_ptr": HALF, "values_ptr": FLOAT, "indices_ptr": LONG, "out_ptr": HALF, "P": "i32",
    }  # fmt: skip
    for k, width in ((0, 1), (20, 32)):
        blocks = {"D": D_MODEL, "K": k, "WIDTH": width, "BLOCK_P": 16, "BLOCK_D": 128}
        name = f"edit_updates ({f'k {k}' if k else 'open loop'})"
        found.append(Specimen(name, kernels.edit_updates, pointers, blocks))
    return found


def compile_for(specimen: Specimen, arch: int) -> Usage:
    """Compile one kernel and read what ptxas says of it.

    Raises:
        RuntimeError: it does not compile, from Triton or ptxas.
    """
    names = specimen.kernel.arg_names
    types = {name: specimen.types.get(name, "constexpr") for name in names}
    # As a launch specialises: torch's allocations are aligned, and the sizes are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in specimen.types}
    source = ASTSource(specimen.kernel, types, specimen.constants, aligned)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, **FUSE}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    if registers is None or not spilled:
        raise RuntimeError(f"ptxas did not say what {specimen.name} takes:\n{text}")
    return Usage(int(registers[1]), sum(map(int, spilled)), compiled.metadata.shared)


def to_markdown(usage: dict[str, dict[int, Usage]]) -> str:
    """The page."""
    arches = list(next(iter(usage.values())))
    lines = [
        "# What the fused kernels take",
        "",
        f"Made by `make kernels` with Triton {triton.__version__}, without a GPU: registers of a thread / bytes of",
        "shared memory of a program, for each compute capability. Nothing spills, or the tool would have failed.",
        "",
        "| kernel | " + " | ".join(f"sm {arch} ({ARCHES[arch]})" for arch in arches) + " |",
        "|---|" + "---|" * len(arches),
    ]
    for name, row in usage.items():
        cells = (f"{row[arch].registers} / {row[arch].shared:,}" for arch in arches)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=list(ARCHES), help="print one compute capability's; write nothing")
    arch: int | None = parser.parse_args().arch
    usage: dict[str, dict[int, Usage]] = {}
    for specimen in specimens():
        usage[specimen.name] = {}
        for each in ARCHES if arch is None else (arch,):
            taken = compile_for(specimen, each)
            print(f"sm {each}: {specimen.name}: {taken}", flush=True)
            usage[specimen.name][each] = taken
    spills = [f"{name} on sm {each}" for name, row in usage.items() for each, taken in row.items() if taken.spilled]
    if spills:
        raise SystemExit(f"registers spill: {'; '.join(spills)}")
    if arch is None:
        (ROOT / "docs" / "kernels-aot.md").write_text(to_markdown(usage))


if __name__ == "__main__":
    main()
