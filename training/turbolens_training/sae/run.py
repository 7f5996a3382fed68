"""`turbolens train sae`: train, measure on held-out data, write bundles."""

from __future__ import annotations

from pathlib import Path

from turbolens_server.engine.engine import Engine
from turbolens_server.engine.load import load_engine
from turbolens_training.activations.stream import HELD_OUT, TRAINING, SceneStream
from turbolens_training.evaluation.quality import measure
from turbolens_training.evaluation.report import write_table
from turbolens_training.export.bundles import read_saes, write_bundles
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


def train_saes(config: SaeConfig) -> Path:
    """Train the SAEs of every hook point, going on from a checkpoint; returns the bundles' folder."""
    engine = load_engine(model=config.model, device=config.device, saes=[])
    device = next(engine.components.unet.parameters()).device
    run = SaeRun(config, stream(engine, config, TRAINING), device)
    checkpoint = config.work / "state.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    run.train(config.steps, checkpoint=checkpoint)

    # Measured as served: through the folder that the server will load.
    write_bundles(config.out, engine.info, run)
    held_out = stream(engine, config, HELD_OUT)
    updates = (held_out.chunk(index).updates for index in range(config.held_out_chunks))
    measured = measure(read_saes(config.out, engine, device), updates)
    idle = {name: trainer.idle.cpu() for name, trainer in run.trainers.items()}
    rows = []
    for name, measurement in measured.items():
        dead = ((measurement.active == 0) & (idle[name] >= config.dead_tokens)).float().mean().item()
        rows += measurement.rows(name, dead)
    write_bundles(config.out, engine.info, run, stats={name: m.stats() for name, m in measured.items()}, quality=rows)
    write_table(config.work / "quality", rows)
    return config.out
