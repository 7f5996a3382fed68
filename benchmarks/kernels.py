"""The fused SAE kernels beside plain torch on a GPU, and beside what the GPU can do at all.

    python benchmarks/kernels.py

Sizes are SDXL Turbo's: updates of 1,280 dimensions at 256 positions a picture, 5,120 features. Every contender is
checked against float32 first, then captured in a CUDA graph and replayed in interleaved rounds with a cold L2 cache
(between two uses of an SAE the whole U-Net passes through it). Writes `benchmarks/results/kernels.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.files import write_file
from turbolens_server.kernels import plain

ROOT: Final = Path(__file__).resolve().parent.parent
D_MODEL: Final = 1280
D_SAE: Final = 5120
POSITIONS: Final = 256
PICTURES: Final = (1, 4, 8, 16)
K: Final = (10, 20)
MAX_L0: Final = 64
EDITED: Final = 4
"""Features edited in each picture."""
FLUSH_BYTES: Final = 256 * 2**20
TOLERANCE: Final = 2e-2
"""Largest difference to float32 of a value of some units: half-precision operands, in another order."""

Launch = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Data:
    """Random weights and updates, in the types that a GPU serves."""

    x: Tensor  # [N, d_model] float16
    W_enc: Tensor  # [d_model, d_sae] float16
    bias: Tensor  # [d_sae] float32
    W_dec: Tensor  # [d_sae, d_model] float16
    threshold: Tensor  # [d_sae] float32: about 15 features are above it at a position


def make_data(pictures: int) -> Data:
    """The same for everyone."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    return Data(
        x=normal(POSITIONS * pictures, D_MODEL).half(),
        W_enc=(normal(D_MODEL, D_SAE) / D_MODEL**0.5).half(),
        bias=0.1 * normal(D_SAE),
        W_dec=torch.nn.functional.normalize(normal(D_SAE, D_MODEL), dim=1).half(),
        threshold=torch.full((D_SAE,), 2.75, device="cuda"),
    )


def contenders(data: Data, pictures: int, k: int) -> dict[str, dict[str, Launch]]:
    """What is compared, by kernel; the first of each is the baseline."""
    from turbolens_server.kernels import fused

    x, W_enc, bias, W_dec = data.x, data.W_enc, data.bias, data.W_dec
    every = dataclasses.replace(fused.TOPK_TILES, candidates=k)

    def encode(tiles: Any) -> Launch:
        return lambda: fused.encode_topk(x, W_enc, bias, k, tiles=tiles)

    topk = {
        "plain": lambda: plain.encode_topk(x, W_enc, bias, k),
        "fused": encode(fused.TOPK_TILES),
        "fused, k candidates a tile": encode(every),
    }
    for tiles in fused.OTHER_TILES:
        topk[f"fused, {tiles.block_m} x {tiles.block_n}, {tiles.num_warps} warps"] = encode(tiles)

    values, indices, _ = plain.encode_topk(x, W_enc, bias, k)
    dense = torch.zeros(len(x), D_SAE, device="cuda", dtype=torch.float16)
    dense.scatter_(1, indices, values.half())
    W_wide = W_dec.float()  # the type in which plain torch gathers
    entries = pictures * EDITED
    edits = (
        x.view(pictures, POSITIONS, D_MODEL),
        torch.ones(pictures, POSITIONS, device="cuda"),
        torch.arange(0, entries + 1, EDITED, device="cuda", dtype=torch.int32),
        indices[:entries, 0].contiguous(),
        torch.full((entries, POSITIONS), -1.0, device="cuda"),
        torch.full((entries, POSITIONS), 5.0, device="cuda"),
        W_dec,
    )
    closed = (values.view(pictures, POSITIONS, k), indices.view(pictures, POSITIONS, k))
    opened = (closed[0][..., :0], closed[1][..., :0])
    threshold = data.threshold
    return {
        "encode_topk": topk,
        "encode_jumprelu": {
            "plain": lambda: plain.encode_jumprelu(x, W_enc, bias, threshold, MAX_L0),
            "fused": lambda: fused.encode_jumprelu(x, W_enc, bias, threshold, MAX_L0),
        },
        "gather_decode": {
            "plain": lambda: plain.gather_decode(values, indices, W_wide),
            "fused": lambda: fused.gather_decode(values, indices, W_dec),
            "dense product": lambda: dense @ W_dec,
        },
        "apply_edits, open loop": {
            "plain": lambda: plain.apply_edits(*edits, *opened),
            "fused": lambda: fused.apply_edits(*edits, *opened),
        },
        "apply_edits, closed loop": {
            "plain": lambda: plain.apply_edits(*edits, *closed),
            "fused": lambda: fused.apply_edits(*edits, *closed),
        },
    }


def check(name: str, run: Launch, baseline: Launch) -> int:
    """Rows that a TopK encode did again; the result must be the baseline's.

    Raises:
        ValueError: it is another.
    """
    ours, theirs = run(), baseline()
    first, second = (result[0] if isinstance(result, tuple) else result for result in (ours, theirs))
    error = float((first.float() - second.float()).abs().max())
    if not error <= TOLERANCE:
        raise ValueError(f"{name} differs from plain torch by {error:.3g}, more than {TOLERANCE}")
    return int(ours[2].sum()) if name.startswith("encode_topk") else 0


def capture(run: Launch) -> torch.cuda.CUDAGraph:
    """A graph of one run, warmed up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def measure(runs: dict[str, Launch], rounds: int, *, cold: bool = True) -> dict[str, float]:
    """Median microseconds of each run, in interleaved rounds."""
    graphs = {name: capture(run) for name, run in runs.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            if cold:
                flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            times[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: 1000 * float(torch.tensor([start.elapsed_time(end) for start, end in pairs]).median())
        for name, pairs in times.items()
    }


def ceilings(rounds: int) -> dict[str, float]:
    """What this GPU reaches: TFLOP/s of a large half-precision product, TB/s of a large copy."""
    edge, size = 8192, 2**30
    a, b = (torch.randn(edge, edge, device="cuda").half() for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    took = measure({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, cold=False)
    return {"tflops": 2 * edge**3 / took["product"] / 1e6, "tb_per_s": 2 * size / took["copy"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="interleaved rounds of each case")
    rounds: int = parser.parse_args().rounds
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs an NVIDIA GPU; on a CPU there is only plain torch to time")
    import triton

    result: dict[str, Any] = {
        "benchmark": "kernels",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "rounds": rounds,
        "ceilings": ceilings(rounds),
        "cases": [],
    }
    print(f"{result['gpu']}: {result['ceilings']}")
    for pictures in PICTURES:
        data = make_data(pictures)
        for k in K:
            for kernel, runs in contenders(data, pictures, k).items():
                baseline = next(iter(runs.values()))
                again = {name: check(f"{kernel}: {name}", run, baseline) for name, run in runs.items()}
                took = measure(runs, rounds)
                for name, microseconds in took.items():
                    result["cases"].append(
                        {
                            "kernel": kernel, "contender": name, "pictures": pictures, "k": k,
                            "us": microseconds, "over_plain": microseconds / took["plain"],
                            "rows_done_again": again[name],
                        }
                    )  # fmt: skip
                    print(f"{kernel}, {pictures} x {POSITIONS}, k {k}: {name} {microseconds:.1f} us")
    results = ROOT / "benchmarks" / "results"
    write_file(results / "kernels.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
