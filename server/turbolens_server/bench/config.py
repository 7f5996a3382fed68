"""Settings of `turbolens bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Measure the engine beside the bare `diffusers` pipeline, on the same weights and in the same run.

    Nothing asked, the features of every SAE extracted, eight `add` edits over all blocks, one `scale` edit a block; the
    U-Net alone; and a prompt that was not seen before, to PNG. Contenders take turns within each round; ratios come
    with a 95 % interval. Nothing else should run on the machine meanwhile.

    Example: turbolens bench --model random:sdxl-turbo --batch 1 8
    """

    model: str = "mini"
    """`mini`, a `diffusers` folder or hub id, or `random:sdxl-turbo`: the real size with random weights.
    One file is not taken: the bare pipeline is read from a folder."""
    sae: tuple[str, ...] = ()
    """SAEs, as `turbolens serve` takes them; `mini` and random models bring their own."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`."""
    dtype: str = "auto"
    """`auto` (float16 on a GPU, else float32), `float32`, `float16` or `bfloat16`."""
    backend: str = "auto"
    """What runs the U-Net, as `turbolens serve` takes it."""
    batch: tuple[int, ...] = (1, 8)
    """Pictures of a batch; each number is a case of its own."""
    steps: tuple[int, ...] = (1,)
    """Denoising steps; each number is a case of its own."""
    size: int | None = None
    """As for `turbolens serve`; left out: the model's own."""
    rounds: int = 20
    """Rounds in which each contender is timed once."""
    json: bool = False
    """Print JSON, as `out` has it."""
    out: Path | None = None
    """JSON file to write; left out: the result is printed only."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "rounds"):
            values = getattr(self, name)
            if not values or min(values if isinstance(values, tuple) else (values,)) < 1:
                raise ValueError(f"{name} is {values}; it must be at least 1")
