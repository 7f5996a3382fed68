"""What a call to an idle server takes beyond the engine's own work: sending, checking, queueing, packing, coding.

python -m benchmarks.served
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

import turbolens as tl
from benchmarks.places import RESULTS
from turbolens_server.bench import contenders as make
from turbolens_server.bench.contenders import Work
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure
from turbolens_server.embedded import start
from turbolens_server.loading.load import load_engine

AIM = Aim(ratio=1.05, added_ms=3.0)


def run(rounds: int) -> dict[str, Any]:
    """Measure one picture in one step: where the engine takes least, the rest weighs most."""
    engine = load_engine(backend="torch-compile")
    work = Work(1, 1, *engine.info.default_size)
    plain, features = work.jobs(), work.jobs(saes=tuple(engine.info.saes))
    with start(backend="torch-compile") as server, tl.connect(server.target) as lens:
        contenders = [
            Contender("engine", lambda: engine.run(plain)),
            Contender("server, raw", lambda: lens.generate(make.PROMPT, seed=0, format="raw"), {"engine": AIM}),
            Contender("server, PNG", lambda: lens.generate(make.PROMPT, seed=0), {"engine": AIM}),
            Contender("engine, all features", lambda: engine.run(features)),
            Contender(
                "server, PNG and all features",
                lambda: lens.generate(make.PROMPT, seed=0, features=True),
                {"engine, all features": AIM},
            ),
        ]
        rows = measure(contenders, rounds)
    case = {"label": {"pictures": work.batch, "steps": work.steps}, "rows": rows}
    return assemble("served", rounds, [case], model=engine.info.model, model_hash=engine.info.model_hash)


def main(rounds: int = 60, out: Path = RESULTS / "served.json") -> None:
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
