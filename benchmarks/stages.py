"""Where the time of a picture goes: its stages, each by itself, beside the whole in process and over the socket.

python -m benchmarks.stages
python -m benchmarks.stages --backend torch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import turbolens as tl
from benchmarks.places import RESULTS
from turbolens_server.bench import contenders as make
from turbolens_server.bench.contenders import Work
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Contender, measure
from turbolens_server.embedded import start
from turbolens_server.engine.decode import decode_rows
from turbolens_server.engine.engine import Engine
from turbolens_server.images import encode_png
from turbolens_server.loading.load import load_engine

PICTURES = (1, 8)


def run(rounds: int, backend: str) -> dict[str, Any]:
    """Measure one picture and a batch, in one step."""
    engine = load_engine(backend=backend)
    cases = []
    with start(backend=backend) as server, tl.connect(server.target) as lens:
        for pictures in PICTURES:
            work = Work(pictures, 1, *engine.info.default_size)
            rows = measure(_contenders(engine, lens, work), rounds)
            cases.append({"label": {"pictures": pictures, "steps": 1}, "rows": rows})
    info = engine.info
    return assemble("stages", rounds, cases, model=info.model, model_hash=info.model_hash, backend=info.backend)


def _contenders(engine: Engine, lens: tl.Lens, work: Work) -> list[Contender]:
    every, seeds = tuple(engine.info.saes), list(range(work.batch))
    text, drawn = engine.components.text, make.pictures(engine, work.jobs())
    latents = torch.from_numpy(np.stack([result.latents for result in engine.run(work.jobs()) if result]))
    stages: dict[str, Callable[[], object]] = {
        "text, prompts of their own": lambda: text.encode_together([make.fresh_prompt() for _ in seeds]),
        "U-Net": make.unet_pass(engine, work, ()),
        "U-Net and all features": make.unet_pass(engine, work, every),
        "decoder": lambda: list(_decoded(engine, latents)),
        "PNG": lambda: [encode_png(picture) for picture in drawn],
        "engine, nothing asked": lambda: engine.run(work.jobs()),
        "engine, all features": lambda: engine.run(work.jobs(saes=every)),
        "engine, eight adds": lambda: engine.run(work.jobs(edits=make.eight_adds(engine))),
        "call, raw": lambda: lens.generate(make.PROMPT, seeds=seeds, format="raw"),
        "call, PNG": lambda: lens.generate(make.PROMPT, seeds=seeds),
        "call, new prompt, PNG": lambda: lens.generate(make.fresh_prompt(), seeds=seeds),
        "call, PNG and all features": lambda: lens.generate(make.PROMPT, seeds=seeds, features=True),
    }
    return [Contender(name, stage) for name, stage in stages.items()]


@torch.inference_mode()
def _decoded(engine: Engine, latents: torch.Tensor) -> Sequence[object]:
    rows = range(len(latents))
    return list(decode_rows(engine.running.decoder, latents, rows, [True] * len(rows)))


def main(rounds: int = 12, backend: str = "torch-compile", out: Path = RESULTS / "stages.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each stage is timed once.
        backend: what runs the model, as for `turbolens serve`.
        out: JSON file to write.
    """
    result = run(rounds, backend)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
