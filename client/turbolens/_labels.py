"""What features stand for: sent once for a connection, with the first features of each SAE."""

from __future__ import annotations

from collections.abc import Iterable

from turbolens._run import Run
from turbolens_proto.v1 import run_pb2


class Labels:
    """The labels that came so far."""

    def __init__(self) -> None:
        self._by_sae: dict[str, dict[int, str]] = {}
        self._complete: set[tuple[tuple[str, ...] | None, int | None]] = set()

    def wanted(self, run: Run) -> bool:
        """Whether the server is to send the labels of what this run returns."""
        return run.features is not None and _key(run) not in self._complete

    def learn(self, chunks: Iterable[run_pb2.SparseFeatures]) -> None:
        """Keep the labels that come with features."""
        for chunk in chunks:
            self.of(chunk.sae).update(chunk.labels)

    def have(self, run: Run) -> None:
        """All features of this run have come, and with them the labels of every feature of its SAEs."""
        if not run.only:
            self._complete.add(_key(run))

    def of(self, sae: str) -> dict[int, str]:
        """Those of one SAE, by feature; more may come."""
        return self._by_sae.setdefault(sae, {})


def _key(run: Run) -> tuple[tuple[str, ...] | None, int | None]:
    """What decides of which SAEs features come: where none is named, those that the steps allow."""
    return run.features, run.steps
