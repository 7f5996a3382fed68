"""A picture that takes features from another run, in one batch with it, beside asking for both one after the other.

python -m benchmarks.references
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

import turbolens as tl
from benchmarks.places import RESULTS
from turbolens_server.bench.contenders import PROMPT
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, measure

OTHER = "a big blue ring on the left, snow background"
AIM = Aim(ratio=0.75)
FEATURES = 16
"""Given, and as many taken away."""


def run(rounds: int, step_counts: tuple[int, ...]) -> dict[str, Any]:
    """Measure through the SDK and a server in this process, coded pictures included."""
    cases = []
    with tl.connect("embedded") as lens:
        model = lens.model()
        others = {"other": tl.reference(OTHER)}
        for steps in step_counts:
            given = [row.ref for row in lens.extract(OTHER, seed=0, steps=steps)["up.0.1"].top(FEATURES)]
            taken = [
                row.ref
                for row in lens.extract(PROMPT, seed=0, steps=steps)["up.0.1"].top(2 * FEATURES)
                if row.ref not in given
            ]
            edits = {
                "transfer": [tl.transfer(given, "other", remove=taken[:FEATURES])],
                "patch": [tl.patch("up.0.1", "other")],
            }

            def two(steps: int = steps, given: list[Any] = given) -> None:
                lens.generate(OTHER, seed=0, steps=steps)
                lens.generate(PROMPT, seed=0, steps=steps, steer=[tl.set_to(given, 2.0, unit="raw")])

            contenders = [Contender("two requests", two)]
            for name, steer in edits.items():

                def one(steps: int = steps, steer: list[Any] = steer) -> None:
                    lens.generate(PROMPT, seed=0, steps=steps, steer=steer, references=others)

                contenders.append(Contender(name, one, {"two requests": AIM}))
            cases.append({"label": {"pictures": 1, "steps": steps}, "rows": measure(contenders, rounds)})
    return assemble("references", rounds, cases, model=model.name, model_hash=model.hash)


def main(rounds: int = 30, steps: tuple[int, ...] = (1, 4), out: Path = RESULTS / "references.json") -> None:
    """Measure and write.

    Args:
        rounds: rounds in which each contender is timed once.
        steps: numbers of steps to measure at.
        out: JSON file to write.
    """
    result = run(rounds, steps)
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
