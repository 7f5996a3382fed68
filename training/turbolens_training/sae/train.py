"""`turbolens train sae`: train, measure on held-out data, write bundles."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import shutil
import signal
import sys
from pathlib import Path

from torch import Tensor

from turbolens_server.engine.engine import Engine
from turbolens_server.loading.places import EMBEDDED
from turbolens_training.activations.cache import ShardCache
from turbolens_training.activations.config import SCENES, prompt_set
from turbolens_training.activations.prompt_specs import open_prompts
from turbolens_training.activations.sources import ChunkSource, TokenSource, open_model, open_sources
from turbolens_training.activations.temporal import TemporalSource
from turbolens_training.checkpoints import previous, terminated
from turbolens_training.measures.quality import measure
from turbolens_training.measures.report import write_table
from turbolens_training.sae.auxk import dead_features
from turbolens_training.sae.boards import check_board, open_board
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.distributed import Ranks, SharedSource, join_ranks
from turbolens_training.sae.export.bundles import read_saes, write_bundles
from turbolens_training.sae.export.gates import failures, pass_gates, record
from turbolens_training.sae.trainer import SaeTraining


def dead_share(active: Tensor, idle: Tensor, config: SaeConfig) -> float:
    """Share of features that are dead at the end of a run, by :func:`turbolens_training.sae.auxk.dead_features`.

    Args:
        active: held-out positions at which each feature is active, [d_sae].
        idle: training tokens since it was, [d_sae].
        config: of the run, now done. One of fewer tokens than `dead_tokens` proves a feature dead by all of them.
    """
    tokens = min(config.dead_tokens, config.steps * config.batch)
    return dead_features(idle, tokens, active).float().mean().item()


def train_saes(config: SaeConfig) -> Path:
    """Train the SAEs of every hook point, going on from a checkpoint; returns the bundles' folder.

    Under `torchrun` each rank trains some of them, see `sae/distributed.py`.

    Raises:
        ValueError: the bundles' folder holds those of an earlier run, which the settings do not let replace.
        BelowGatesError: an SAE fails a gate; the checkpoint and the table of quality are there to look at.
        SystemExit: SIGTERM came. The checkpoint is written, and the same command goes on from there.
    """
    _keep_earlier(config)
    check_board(config.board)
    with join_ranks(config.device) as (ranks, device):
        shards = config.shards
        data = open_prompts(config.prompts, seed=config.seed) if shards is None else ShardCache(shards)
        engine = open_model(config, device)
        chunks, held_out = open_sources(engine, config, data)
        training = TemporalSource(chunks, config.run_steps) if config.architecture == "temporal" else chunks
        _train(config, ranks, engine, SharedSource(training, ranks) if ranks.world > 1 else training, held_out)
    return config.out


def _keep_earlier(config: SaeConfig) -> None:
    """Refuse, before any work, to replace the bundles of an earlier run that nobody said to replace."""
    earlier = sorted(folder.parent.name for folder in config.out.glob("*/cfg.json"))
    going_on = config.resume and any(config.work.glob("**/state*.pt"))
    if earlier and not (config.overwrite or going_on):
        raise ValueError(
            f"--out {config.out} holds SAEs of an earlier run ({', '.join(earlier)}): choose another folder, replace "
            "them by --overwrite, or go on with the run in --work by --resume"
        )


def _train(config: SaeConfig, ranks: Ranks, engine: Engine, training: TokenSource, held_out: ChunkSource) -> None:
    """What one rank does."""
    device = next(engine.components.unet.parameters()).device
    run = SaeTraining(config, training, device, ranks=ranks)
    folder = config.work if ranks.world == 1 else config.work / f"rank-{ranks.rank}-of-{ranks.world}"
    checkpoint = folder / "state.pt"
    if config.overwrite:
        for left in (checkpoint, previous(checkpoint)):
            left.unlink(missing_ok=True)
    if run.resume(checkpoint) and ranks.rank == 0:
        print(f"going on from step {run.step} of {config.steps}, the checkpoint in {config.work}", file=sys.stderr)
    if config.board is not None:
        run.board = open_board(config.board, folder / "board", dataclasses.asdict(config))
    with terminated() as stop, contextlib.closing(run.board) if run.board else contextlib.nullcontext():
        run.train(config.steps, checkpoint=checkpoint, stop=lambda: ranks.any(stop()))
    if run.step < config.steps:
        print(f"stopped at step {run.step} of {config.steps}; run again to go on", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    # Measured as served, through folders that the server would load; what passes the gates is then put in place.
    trial = folder / "trial"
    write_bundles(trial, engine.info, run)
    saes = read_saes(trial, run.trainers, device)
    chunks = range(min(config.held_out_chunks, held_out.chunks or config.held_out_chunks))
    measured = measure(saes, map(held_out.updates, chunks))
    shutil.rmtree(trial)
    rows: list[dict[str, str | float]] = []
    below: dict[str, list[str]] = {}
    for name, measurement in measured.items():
        idle = run.trainers[name].idle.cpu()
        dead = dead_share(measurement.active, idle, config)
        named = {"block": name, "prompts": prompt_set(config.prompts)}
        rows += [{**named, **row} for row in measurement.rows(name, dead=dead)]
        below[name] = failures(
            saes[name].bundle.weights,
            l0_most=measurement.l0_most,
            l0_mean=measurement.l0_mean,
            k=saes[name].bundle.k,
            aim=config.k,
            explained_variance=measurement.explained_variance,
            dead=dead,
            gates=config.gates,
        )
    order = [point.name for point in engine.info.hook_points]
    table = sorted(itertools.chain(*ranks.gather(rows)), key=lambda row: order.index(str(row["block"])))
    if ranks.rank == 0:
        write_table(config.work / "quality", table)
    # Gathered once the table is written, as a rank that fails ends the others. All fail alike: one SAE below its gates
    # holds back those of every rank.
    everywhere = dict(itertools.chain(*(of_rank.items() for of_rank in ranks.gather(below))))
    pass_gates({name: everywhere[name] for name in order}, allow_below=config.allow_below_gates)
    write_bundles(
        config.out,
        engine.info,
        run,
        stats={name: measurement.stats() for name, measurement in measured.items()},
        quality=rows,
        gates={name: record(config.gates, reasons) for name, reasons in below.items()},
    )
    ranks.barrier()
    if ranks.rank == 0:
        config.tell(report(config, table), saes=config.out, quality=table)


def report(config: SaeConfig, table: list[dict[str, str | float]]) -> str:
    """What a run came to, in words: where the bundles are, what they are worth, what to do with them."""
    worth = [
        f"  {row['block']}: explains {row['explained_variance']:.1%} of the variance with {row['l0_mean']:g} active "
        f"features at a position, {row['dead']:.1%} dead"
        for row in table
        if row["timestep"] == "all"
    ]
    variant = f" --variant {config.variant}" if config.variant else ""
    model, prompts = f"--model {config.model}{variant}", "" if config.prompts == SCENES else config.prompts
    named = f" --prompts {shlex.quote(prompts)}" if prompts and config.model != EMBEDDED else ""
    return "\n".join(
        [
            f"{len(worth)} SAEs are in {config.out}; held-out pictures of {prompt_set(config.prompts)}:",
            *worth,
            f"by timestep: {config.work / 'quality.md'}",
            "next, statistics, examples and labels of their features:",
            f"  turbolens catalog build {model} --sae {config.out} --work {config.work}{named}",
            "and then, serve them:",
            f"  turbolens serve {model} --sae {config.out}",
        ]
    )
