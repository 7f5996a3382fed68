"""The lanes of a batch: which walk each of its rows is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from turbolens_server.engine.types import Job


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """One row of a batch."""

    job: int
    """Position of its job in the batch."""
    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The rows of a batch: first the pictures' own, in order of their jobs, then the reference runs'."""

    rows: tuple[Lane, ...]
    references: tuple[dict[str, int], ...]
    """Of each job, the row of each reference run by name."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Lanes:
        """The lanes of the jobs of one batch."""
        rows = [Lane(at, job.prompt, job.seed) for at, job in enumerate(jobs)]
        references: list[dict[str, int]] = []
        for at, job in enumerate(jobs):
            references.append({run.name: len(rows) + offset for offset, run in enumerate(job.references)})
            rows += [Lane(at, run.prompt, run.seed) for run in job.references]
        return cls(tuple(rows), tuple(references))

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, job: int) -> list[int]:
        """The rows of a job, its picture's first."""
        return [job, *self.references[job].values()]
