"""`turbolens train sae`: train, measure on held-out data, write bundles."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.load import load_engine
from turbolens_training.activations.stream import HELD_OUT, TRAINING, SceneStream
from turbolens_training.evaluation.quality import measure
from turbolens_training.evaluation.report import write_table
from turbolens_training.export.bundles import read_saes, write_bundles
from turbolens_training.export.gates import failures, pass_gates, record
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.trainer import SaeRun


def stream(engine: Engine, config: SaeConfig, split: str) -> SceneStream:
    """The data of a run: the same mix of steps for training and for what is held out."""
    return SceneStream(
        engine,
        seed=config.seed,
        split=split,
        images=config.images,
        one_step_share=config.one_step_share,
        multi_steps=config.multi_steps,
    )


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

    Raises:
        BelowGatesError: an SAE fails a gate; the checkpoint and the table of quality are there to look at.
        SystemExit: SIGTERM came. The checkpoint is written, and the same command goes on from there.
    """
    engine = load_engine(model=config.model, device=config.device, saes=[])
    device = next(engine.components.unet.parameters()).device
    run = SaeRun(config, stream(engine, config, TRAINING), device)
    checkpoint = config.work / "state.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    with terminated() as stop:
        run.train(config.steps, checkpoint=checkpoint, stop=stop)
    if run.step < config.steps:
        print(f"stopped at step {run.step} of {config.steps}; run again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    # Measured as served, through folders that the server would load; what passes the gates is then put in place.
    trial = config.work / "trial"
    write_bundles(trial, engine.info, run)
    held_out = stream(engine, config, HELD_OUT)
    saes = read_saes(trial, engine, device)
    measured = measure(saes, (held_out.chunk(index).updates for index in range(config.held_out_chunks)))
    shutil.rmtree(trial)
    rows: list[dict[str, str | float]] = []
    below: dict[str, list[str]] = {}
    for name, measurement in measured.items():
        idle = run.trainers[name].idle.cpu()
        dead = ((measurement.active == 0) & (idle >= config.dead_tokens)).float().mean().item()
        rows += measurement.rows(name, dead)
        below[name] = failures(
            saes[name].bundle.weights,
            l0_most=measurement.l0_most,
            k=saes[name].bundle.k,
            explained_variance=measurement.explained_variance,
            dead=dead,
            gates=config.gates,
        )
    write_table(config.work / "quality", rows)
    pass_gates(below, allow_below=config.allow_below_gates)
    write_bundles(
        config.out,
        engine.info,
        run,
        stats={name: measurement.stats() for name, measurement in measured.items()},
        quality=rows,
        gates={name: record(config.gates, reasons) for name, reasons in below.items()},
    )
    return config.out
