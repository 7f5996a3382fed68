"""The lanes of a batch: which walk each of its rows is of, and what it hears."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from turbolens_server.engine.types import Guidance, Job, Start


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """One row of a batch."""

    job: int
    """Position of its job in the batch."""
    prompt: str | None
    """What it hears; None: nothing."""
    walk: int
    """Row of the latents that it sees."""


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The rows of a batch: first the pictures' own, in order of their jobs, then the reference runs', each a walk with
    latents of the same row; then the second lanes of walks with guidance, in the same order."""

    rows: tuple[Lane, ...]
    seeds: tuple[int, ...]
    """Of each walk."""
    starts: tuple[Start | None, ...]
    """Of each walk."""
    guidance: tuple[Guidance | None, ...]
    """Of each walk."""
    references: tuple[dict[str, int], ...]
    """Of each job, the walk of each reference run by name."""
    second: Mapping[int, int]
    """Of each walk with guidance, its lane without the prompt."""

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Lanes:
        """The lanes of the jobs of one batch."""
        rows = [Lane(at, job.prompt, at) for at, job in enumerate(jobs)]
        seeds, starts = [job.seed for job in jobs], [job.start for job in jobs]
        references: list[dict[str, int]] = []
        for at, job in enumerate(jobs):
            references.append({run.name: len(rows) + offset for offset, run in enumerate(job.references)})
            rows += [Lane(at, run.prompt, len(rows) + offset) for offset, run in enumerate(job.references)]
            seeds += [run.seed for run in job.references]
            starts += [run.start for run in job.references]
        guidance = tuple(jobs[lane.job].guidance for lane in rows)
        guided = [(walk, one) for walk, one in enumerate(guidance) if one is not None]
        second = {walk: len(rows) + offset for offset, (walk, _) in enumerate(guided)}
        rows += [Lane(rows[walk].job, one.negative_prompt, walk) for walk, one in guided]
        return cls(tuple(rows), tuple(seeds), tuple(starts), guidance, tuple(references), second)

    def __len__(self) -> int:
        return len(self.rows)

    def walks_of(self, job: int) -> list[int]:
        """The walks of a job, its picture's first."""
        return [job, *self.references[job].values()]

    def rows_of(self, job: int) -> list[int]:
        """The rows of a job, its picture's first."""
        walks = self.walks_of(job)
        return [*walks, *(self.second[walk] for walk in walks if walk in self.second)]

    def read_by(self, row: int) -> dict[str, int]:
        """The row of each reference run that edits of a row of a picture read, by name: of the same side."""
        lane = self.rows[row]
        named = self.references[lane.job]
        return named if row == lane.walk else {name: self.second[walk] for name, walk in named.items()}
