"""`turbolens train sae`: train, measure on held-out data, write bundles."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.load import load_engine
from turbolens_training.activations.sources import ChunkSource, TokenSource, open_sources
from turbolens_training.evaluation.quality import measure
from turbolens_training.evaluation.report import write_table
from turbolens_training.export.bundles import read_saes, write_bundles
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.distributed import Ranks, SharedSource, join_ranks
from turbolens_training.sae.trainer import SaeRun


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM does not end the process; what is yielded says whether it came."""
    received = False

    def receive(*_: object) -> None:
        nonlocal received
        received = True

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGTERM, before)


def train_saes(config: SaeConfig) -> Path:
    """Train the SAEs of every hook point, going on from a checkpoint; returns the bundles' folder.

    Under `torchrun` each rank trains some of them, see `sae/distributed.py`.

    Raises:
        SystemExit: SIGTERM came. The checkpoint is written, and the same command goes on from there.
    """
    with join_ranks(config.device) as (ranks, device):
        engine = load_engine(model=config.model, device=device, saes=[], hook_points=config.hook_points)
        training, held_out = open_sources(engine, config, config.shards)
        _train(config, ranks, engine, SharedSource(training, ranks) if ranks.world > 1 else training, held_out)
    return config.out


def _train(config: SaeConfig, ranks: Ranks, engine: Engine, training: TokenSource, held_out: ChunkSource) -> None:
    """What one rank does."""
    device = next(engine.components.unet.parameters()).device
    run = SaeRun(config, training, device, ranks=ranks)
    folder = config.work if ranks.world == 1 else config.work / f"rank-{ranks.rank}-of-{ranks.world}"
    checkpoint = folder / "state.pt"
    if ranks.all(checkpoint.exists()):
        run.resume(checkpoint)
    with terminated() as stop:
        run.train(config.steps, checkpoint=checkpoint, stop=lambda: ranks.any(stop()))
    if run.step < config.steps:
        print(f"stopped at step {run.step} of {config.steps}; run again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    # Measured as served: through the folder that the server will load.
    write_bundles(config.out, engine.info, run)
    ranks.barrier()
    saes = {name: sae for name, sae in read_saes(config.out, engine, device).items() if name in run.trainers}
    chunks = range(min(config.held_out_chunks, held_out.chunks or config.held_out_chunks))
    measured = measure(saes, map(held_out.updates, chunks))
    idle = {name: trainer.idle.cpu() for name, trainer in run.trainers.items()}
    rows = []
    for name, measurement in measured.items():
        dead = ((measurement.active == 0) & (idle[name] >= config.dead_tokens)).float().mean().item()
        rows += measurement.rows(name, dead)
    write_bundles(config.out, engine.info, run, stats={name: m.stats() for name, m in measured.items()}, quality=rows)
    table = [row for part in ranks.gather(rows) for row in part]
    if ranks.rank == 0:
        write_table(config.work / "quality", table)
