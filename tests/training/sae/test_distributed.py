"""Ranks are processes here, as they are under torchrun; they talk by gloo on the CPU."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from turbolens_server.sae.bundle import load_bundle
from turbolens_training.sae import train as sae_train
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.distributed import Ranks, SharedSource
from turbolens_training.sae.export.gates import BelowGatesError
from turbolens_training.sae.trainer import SaeTraining

CPU = torch.device("cpu")
CONFIG = SaeConfig(
    d_sae=48, k=4, steps=24, batch=32, warm_up=5, dead_tokens=128, steps_per_chunk=3, tokens_per_image=8, reservoir=100
)
TOLERANCE = 1e-6
"""Of weights near 1, after 24 steps. On one kind of CPU they are bit-equal; threads may add in another order."""


class Uneven:
    """Chunks and blocks of different sizes, so that the reservoirs are not full at the same time."""

    identity = kind = "uneven"

    def __init__(self) -> None:
        self.widths = {"a": 12, "b": 16, "c": 8}
        self.made: list[int] = []

    def tokens(self, index: int, per_image: int) -> dict[str, torch.Tensor]:
        self.made.append(index)
        found = {}
        for name, width in self.widths.items():
            g = torch.Generator().manual_seed(1000 * width + index)
            images = (1 + index % 3) * (3 if name == "a" else 1)
            found[name] = 3 * torch.randn(images * per_image, width, generator=g) + 7
        return found


def train(rank: int, world: int, folder: str, steps: int) -> None:
    """One rank's whole run, going on from a checkpoint where there is one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{steps}", rank=rank, world_size=world)
    try:
        source, ranks = Uneven(), Ranks(rank, world)
        run = SaeTraining(CONFIG, SharedSource(source, ranks), CPU, ranks=ranks)
        checkpoint = Path(folder) / f"state-{rank}.pt"
        if checkpoint.exists():
            run.resume(checkpoint)
        run.train(steps, checkpoint=checkpoint)
        assert all(index % world == rank for index in source.made)
    finally:
        dist.destroy_process_group()


def test_two_ranks_train_what_one_rank_trains(tmp_path: Path) -> None:
    for steps in (9, 24):  # stopped between, in the middle of a round of chunks
        mp.spawn(train, (2, str(tmp_path), steps), nprocs=2)
    alone = SaeTraining(CONFIG, Uneven(), CPU)
    alone.train(24)
    ours = alone.state_dict()
    together = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [list(state["trainers"]) for state in together] == [["a", "c"], ["b"]]
    for state in together:
        assert state["cursor"] == ours["cursor"]
        for name, trainer in state["trainers"].items():
            assert torch.equal(trainer["idle"], ours["trainers"][name]["idle"])
            for key, weights in trainer["weights"].items():
                assert (weights - ours["trainers"][name]["weights"][key]).abs().max() <= TOLERANCE


def resume_apart(rank: int, folder: str) -> None:
    """Two ranks whose checkpoints are not of one step, as a copy of a folder taken in the middle may be."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        ranks = Ranks(rank, 2)
        run = SaeTraining(CONFIG, SharedSource(Uneven(), ranks), CPU, ranks=ranks)
        run.step = 3 + rank
        checkpoint = Path(folder) / f"state-{rank}.pt"
        run.save(checkpoint)
        with pytest.raises(ValueError, match=r"of different steps \(rank 0 at 3, rank 1 at 4\); choose another --work"):
            run.resume(checkpoint)
    finally:
        dist.destroy_process_group()


def test_ranks_at_different_steps_do_not_go_on_together(tmp_path: Path) -> None:
    mp.spawn(resume_apart, (str(tmp_path),), nprocs=2)


def test_more_ranks_than_saes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 ranks for 3 SAEs; start 3 at most"):
        Ranks(0, 4).own(["a", "b", "c"])


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def train_and_export(rank: int, ports: tuple[str, str], model: str, folder: Path) -> None:
    """One rank of `torchrun turbolens train sae`, whose last SAE is below a gate: held back first, then let through."""
    torch.set_num_threads(1)
    sae_train.failures = lambda *_, **__: ["is bad"] if rank == 1 else []
    for port, allow in zip(ports, (False, True), strict=True):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        config = SaeConfig(
            model, hook_points=("mid.0", "up.0.1"), device="cpu", images=4, held_out_chunks=2, d_sae=32, k=4, steps=6,
            batch=16, reservoir=40, warm_up=2, out=folder / "bundles", work=folder / "work", allow_below_gates=allow,
        )  # fmt: skip
        if allow:
            sae_train.train_saes(config)
            continue
        with pytest.raises(BelowGatesError, match=r"^not exported: up\.0\.1: is bad \("):
            sae_train.train_saes(config)
        assert not config.out.exists()


def test_one_sae_below_its_gates_holds_back_those_of_every_rank(tiny_folder: Path, tmp_path: Path) -> None:
    mp.spawn(train_and_export, ((free_port(), free_port()), str(tiny_folder), tmp_path), nprocs=2)
    below = {
        folder.name: load_bundle(folder).provenance["gates"]["below"] for folder in (tmp_path / "bundles").iterdir()
    }
    assert below == {"mid.0": [], "up.0.1": ["is bad"]}
    table = json.loads((tmp_path / "work" / "quality.json").read_text())
    assert [row["block"] for row in table if row["timestep"] == "all"] == ["mid.0", "up.0.1"]
    assert not list((tmp_path / "work").glob("**/trial"))
