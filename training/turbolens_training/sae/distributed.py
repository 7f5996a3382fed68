"""Training on many GPUs by `torchrun`: whole SAEs to ranks, and the pictures made by all ranks together.

An SAE is small beside the model that makes its data, so each lives on one rank, and no gradient is ever exchanged. Of
`world` chunks in a row every rank makes one, and sends each block's tokens to the rank that trains on them. Every SAE
sees the chunks that it would see on a single rank, in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turbolens_training.activations.sources import TokenSource

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that train together; with one rank, no process group is needed."""

    rank: int = 0
    world: int = 1

    def owner(self, place: int) -> int:
        """The rank that trains the SAE at `place` in the order of hook points."""
        return place % self.world

    def own(self, names: Sequence[str]) -> list[str]:
        """The SAEs of this rank.

        Raises:
            ValueError: some rank would have none.
        """
        if len(names) < self.world:
            raise ValueError(f"{self.world} ranks for {len(names)} SAEs; start {len(names)} at most")
        return [name for place, name in enumerate(names) if self.owner(place) == self.rank]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank; for small things, which are pickled."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def all(self, flag: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.gather(flag))

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)


ALONE: Final = Ranks()


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the ranks that `torchrun` started, if it did; yields this rank and its device.

    Args:
        device: as the user gave it; "auto" and "cuda" become one GPU for each rank of a machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, device
        return
    if device in ("auto", "cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Ranks(dist.get_rank(), world), device
    finally:
        dist.destroy_process_group()


class SharedSource:
    """A source whose chunks all ranks make together; each gets the tokens of its own SAEs only."""

    chunks = None

    def __init__(self, source: TokenSource, ranks: Ranks) -> None:
        self._source = source
        self._ranks = ranks
        self._blocks = list(source.widths)
        self.widths = {name: source.widths[name] for name in ranks.own(self._blocks)}
        self.identity = source.identity
        self.kind = source.kind
        self._round = -1
        self._held: list[dict[str, Tensor]] = []  # the chunks of one round

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Tokens [n, d_model] of this rank's hook points; every rank must ask for the same chunks in the same order."""
        round_, place = divmod(index, self._ranks.world)
        if round_ != self._round:
            self._held = self._share(self._source.tokens(round_ * self._ranks.world + self._ranks.rank, per_image))
            self._round = round_
        return self._held[place]

    def _share(self, made: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Send what this rank made to the owners; returns what it got from each rank."""
        got: list[dict[str, Tensor]] = [{} for _ in range(self._ranks.world)]
        counts = self._ranks.gather({name: len(tokens) for name, tokens in made.items()})
        for place, name in enumerate(self._blocks):
            tokens, owner = made[name], self._ranks.owner(place)
            most = max(count[name] for count in counts)  # chunks differ in their steps
            padded = torch.cat([tokens, tokens.new_zeros(most - len(tokens), tokens.shape[1])])
            received = [torch.empty_like(padded) for _ in counts] if owner == self._ranks.rank else None
            dist.gather(padded, received, dst=owner)
            for chunk, rows, count in zip(got, received or [], counts, strict=bool(received)):
                chunk[name] = rows[: count[name]]
        return got
