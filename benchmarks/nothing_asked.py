"""The same pictures by the bare `diffusers` pipeline, by our engine and by our server, with nothing asked of features.

    python -m benchmarks.nothing_asked

Twice: with a prompt that was encoded before (the pipeline is handed its embeddings, we find it in the cache), and with
a new prompt for every call. The bare pipeline encodes a prompt once for all pictures of a call, as we do. On a CPU we
run what is compiled ahead for it, as `turbolens serve` does from its second start on; the first run compiles it, which
takes minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import turbolens as tl
from benchmarks.places import RESULTS
from turbolens_server.bench import contenders as make
from turbolens_server.bench.contenders import BarePipeline, Work
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure
from turbolens_server.embedded import start
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.load import load_engine

SIZES = ((1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (8, 4))
"""Pictures a call, steps."""
BACKEND = "torch-compile"


def run(rounds: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Measure every size with a prompt that is kept, and with new ones."""
    engine = load_engine(backend=BACKEND)
    bare = BarePipeline(engine)
    cases = []
    with start(backend=BACKEND) as server, tl.connect(server.target) as lens:
        for pictures, steps in sizes:
            work = Work(pictures, steps, *engine.info.default_size)
            for text in ("kept", "new"):
                print(f"{pictures} pictures, {steps} steps, {text} prompt", file=sys.stderr)
                rows = measure(_contenders(engine, bare, lens, work, text == "new"), rounds)
                cases.append({"label": {"pictures": pictures, "steps": steps, "prompt": text}, "rows": rows})
    return assemble("nothing_asked", rounds, cases, model=engine.info.model, model_hash=engine.info.model_hash)


def _contenders(engine: Engine, bare: BarePipeline, lens: tl.Lens, work: Work, new: bool) -> list[Contender]:
    prompt: Callable[[], str] = make.fresh_prompt if new else lambda: make.PROMPT
    kept = bare.embed(make.PROMPT)
    seeds = list(range(work.batch))
    aim = Aim(0.6 if work.batch == 1 else 0.65)
    return [
        Contender("diffusers", lambda: bare.run(work, prompt=prompt()) if new else bare.run(work, **kept)),
        Contender("engine", lambda: engine.run(work.jobs(prompt())), {"diffusers": aim}),
        Contender(
            "server",
            lambda: lens.generate(prompt(), seeds=seeds, steps=work.steps, format="raw"),
            {"diffusers": aim},
        ),
    ]


def main(rounds: int = 12, out: Path = RESULTS / "nothing_asked.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each contender is timed once.
        out: JSON file to write.
    """
    result = run(rounds)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
