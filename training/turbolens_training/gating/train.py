"""`turbolens train gates`: train on a frozen U-Net, measure as served, write the gates."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.engine.engine import Engine
from turbolens_server.gating.bundle import CONFIG_FILE, GateBundle, save_gates
from turbolens_server.gating.gates import Gates
from turbolens_server.gating.maths import GateHead, GateMlp
from turbolens_server.loading.gates import open_gates
from turbolens_server.loading.load import load_engine
from turbolens_server.unet.attention_taps import with_attention_points
from turbolens_server.unet.points import HookPoint, block_of, is_cross_attention
from turbolens_server.unet.tapped import find_hook_points, tapped_forward
from turbolens_training.checkpoints import add_rows, cut_log, previous, read_states, save_state, terminated
from turbolens_training.evaluation.regions import TwoThings, draw_all, score, shares
from turbolens_training.evaluation.sampling import thumbnails
from turbolens_training.gating.config import OF_THE_MACHINE, GateConfig
from turbolens_training.gating.data import Batch, TwoThingScenes
from turbolens_training.measures.concepts import check_truth
from turbolens_training.measures.report import write_table

_HEAD = "shared"
_LOG_STEPS = 10


def points_of(engine: Engine) -> dict[str, HookPoint]:
    """Every hook point of a model, attention layers included."""
    parts = engine.components
    return with_attention_points(parts.unet, find_hook_points(parts.unet, parts.vae_downscale))


def chosen_blocks(points: Mapping[str, HookPoint], asked: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks that get gates, in order of execution.

    Raises:
        ValueError: one has no cross-attention, or they differ in width and cannot share a head.
    """
    attending = {block_of(name): point for name, point in points.items() if is_cross_attention(name)}
    if unknown := [name for name in asked if name not in attending]:
        raise ValueError(f"blocks: no cross-attention in {', '.join(unknown)}; there is in {', '.join(attending)}")
    coarsest = max(point.downscale for point in attending.values())
    default = [name for name, p in attending.items() if p.downscale == coarsest and not name.startswith("mid")]
    blocks = tuple(name for name in attending if name in (asked or default))
    if len({attending[name].d_model for name in blocks}) != 1:
        raise ValueError(f"blocks: {', '.join(blocks)} differ in width and cannot share a head")
    return blocks


def first_head(d: int, text: int, hidden: int, start_bias: float, seed: int) -> GateHead:
    """A head before training; its linear maps start as PyTorch's do."""
    torch.manual_seed(seed)

    def mlp(width: int) -> GateMlp:
        into, out = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, hidden)
        return GateMlp(torch.ones(width), torch.zeros(width), into.weight, into.bias, out.weight, out.bias)

    return GateHead(mlp(d), mlp(text), torch.tensor(start_bias))


def weights_of(head: GateHead) -> list[Tensor]:
    """All weights of a head, in order."""
    return [*head.features, *head.tokens, head.bias]


def head_of(weights: list[Tensor]) -> GateHead:
    """The head of the weights that `weights_of` gives."""
    size = len(GateMlp._fields)
    return GateHead(GateMlp(*weights[:size]), GateMlp(*weights[size : 2 * size]), weights[-1])


class GateTraining:
    """One head on its way through training."""

    def __init__(self, engine: Engine, config: GateConfig) -> None:
        points = points_of(engine)
        self.config = config
        self.engine = engine
        self.blocks = chosen_blocks(points, config.blocks)
        layers = [name for name in points if is_cross_attention(name) and block_of(name) in self.blocks]
        unet = engine.components.unet.requires_grad_(False)
        width = points[layers[0]].d_model
        start = first_head(width, unet.config.cross_attention_dim, config.hidden, config.start_bias, config.seed)
        parts = [t.detach().to(engine.device).requires_grad_() for t in weights_of(start)]
        self.head = head_of(parts)
        self.gates = Gates({_HEAD: self.head}, dict.fromkeys(layers, _HEAD), config.threshold, config.closed)
        self.optimizer = torch.optim.AdamW(parts, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.step = 0
        self._data = TwoThingScenes(engine, config.seed, "training", config.batch, config.one_step_share)
        self.held_out = TwoThingScenes(engine, config.seed, "held out", config.batch, config.one_step_share)

    def loss(self, batch: Batch, gates: Gates | None) -> tuple[Tensor, float]:
        """Squared error of the prediction, [B], and the share of positions' tokens that are heard; None: no gates."""
        gating = None if gates is None else gates.of(batch.conditions.hidden)
        heard: list[Tensor] = []
        if gating is not None:
            gating.told = lambda _, opened: heard.append(opened.float().mean())
        conditions = dataclasses.replace(batch.conditions, gating=gating)
        unet = self.engine.components.unet
        prediction = tapped_forward(unet, batch.sample.to(unet.dtype), batch.timesteps, conditions)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        share = torch.stack(heard).mean().item() if heard else 1.0
        return (prediction.float() - batch.target).square().mean((1, 2, 3)), share

    def train_step(self) -> dict[str, float]:
        """Take one step."""
        config = self.config
        rate = config.learning_rate * _factor(self.step, config.steps, config.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        errors, share = self.loss(self._data(self.step), self.gates)
        loss = errors.mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss is {loss.item()}; the last checkpoint stays")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights_of(self.head), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"step": self.step, "rate": rate, "loss": loss.item(), "heard": share}

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides the result."""
        told = dataclasses.asdict(self.config)
        mine = {name: value for name, value in told.items() if name not in OF_THE_MACHINE}
        return {**mine, "blocks": list(self.blocks), "model": self.engine.info.model_hash}

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        weights = [weight.detach() for weight in weights_of(self.head)]
        state = {"step": self.step, "settings": self._settings, "weights": weights}
        save_state(path, state | {"optimizer": self.optimizer.state_dict()})

    def resume(self, path: Path) -> bool:
        """Go on from a checkpoint, if there is one.

        Raises:
            ValueError: it is of a run with other settings.
        """
        state = next(read_states(path, self.engine.device, ("settings", "weights", "optimizer")), None)
        if state is None:
            return False
        if changed := [name for name, value in self._settings.items() if state["settings"].get(name) != value]:
            raise ValueError(
                f"{path}: of a run with another {', '.join(changed)}; choose another --work, or --overwrite"
            )
        with torch.no_grad():
            for weight, saved in zip(weights_of(self.head), state["weights"], strict=True):
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True

    def train(self, checkpoint: Path, stop: Callable[[], bool]) -> None:
        """Train to the end, or until told to stop; the checkpoint is written in either case."""
        config, log = self.config, checkpoint.parent / "log.jsonl"
        cut_log(log, self.step)
        saved, rows = (self.step, time.monotonic()), []
        with tqdm(total=config.steps, initial=self.step, desc="gates", unit="step", smoothing=0.05) as bar:
            while self.step < config.steps and not stop():
                row = self.train_step()
                bar.update()
                if self.step % _LOG_STEPS == 0 or self.step == config.steps:
                    rows.append(row)
                    bar.set_postfix(loss=f"{row['loss']:.4f}", heard=f"{row['heard']:.0%}")
                late = time.monotonic() - saved[1] > 60 * config.checkpoint_minutes
                if late or self.step - saved[0] >= config.checkpoint_steps or self.step == config.steps:
                    self._checkpoint(checkpoint, log, rows)
                    saved = (self.step, time.monotonic())
        if self.step > saved[0]:
            self._checkpoint(checkpoint, log, rows)

    def _checkpoint(self, checkpoint: Path, log: Path, rows: list[dict[str, float]]) -> None:
        add_rows(log, rows)
        rows.clear()
        self.save(checkpoint)

    def bundle(self, **provenance: Any) -> GateBundle:
        """The gates as they are, to be written."""
        head = head_of([weight.detach().cpu().clone() for weight in weights_of(self.head)])
        config, info = self.config, self.engine.info
        return GateBundle(
            {_HEAD: head}, {_HEAD: self.blocks}, config.threshold, config.closed, info.model_hash, provenance
        )

    @torch.no_grad()
    def held_out_rows(self) -> Iterator[dict[str, float | str]]:
        """Mean squared error on held-out batches, with the gates and without, at the first timestep and at others."""
        errors: dict[tuple[str, str], list[Tensor]] = {}
        shares: list[float] = []
        for index in range(self.config.held_out):
            batch = self.held_out(index)
            first = batch.timesteps == batch.timesteps.max()
            for name, gates in (("with gates", self.gates), ("without", None)):
                error, share = self.loss(batch, gates)
                shares += [share] if gates else []
                errors.setdefault((name, "first"), []).append(error[first])
                errors.setdefault((name, "others"), []).append(error[~first])
        for (name, when), each in errors.items():
            found = torch.cat(each)
            if len(found):
                heard = sum(shares) / len(shares) if name == "with gates" else 1.0
                yield {"heard": name, "timesteps": when, "n": len(found), "mse": found.mean().item(), "open": heard}


def _factor(step: int, total: int, warm_up: int) -> float:
    """Of the learning rate: linear warm-up, then half a cosine to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def train_gates(config: GateConfig) -> Path:
    """Train gates, going on from a checkpoint; returns their folder.

    Raises:
        ValueError: the folder holds those of an earlier run, which the settings do not let replace; or the model does
            not draw scenes whose truth is known.
        SystemExit: SIGTERM came. The checkpoint is written, and the same command goes on from there.
    """
    checkpoint = config.work / "state.pt"
    if (config.out / CONFIG_FILE).exists() and not (config.overwrite or (config.resume and checkpoint.exists())):
        raise ValueError(
            f"--out {config.out} holds gates of an earlier run: choose another folder, replace them by --overwrite, or "
            "go on with the run in --work by --resume"
        )
    if config.overwrite:
        for left in (checkpoint, previous(checkpoint)):
            left.unlink(missing_ok=True)
    config.work.mkdir(parents=True, exist_ok=True)
    engine = load_engine(model=config.model, device=config.device, saes=[])
    check_truth(engine, "gates of other models are served from folders that others trained")
    run = GateTraining(engine, config)
    if run.resume(checkpoint):
        print(f"going on from step {run.step} of {config.steps}, the checkpoint in {config.work}", file=sys.stderr)
    with terminated() as stop:
        run.train(checkpoint, stop)
    if run.step < config.steps:
        print(f"stopped at step {run.step} of {config.steps}; run again to go on", file=sys.stderr)
        sys.exit(128 + 15)
    # Measured as served, through a folder that the server would load.
    trial = config.work / "trial"
    save_gates(trial, run.bundle())
    rows = [*run.held_out_rows()]
    worth = drawn(engine, trial, config)
    write_table(config.work / "quality", rows)
    write_table(config.work / "binding", worth)
    recipe = {
        **{k: v for k, v in dataclasses.asdict(config).items() if k not in OF_THE_MACHINE},
        "model": engine.info.model,
    }
    save_gates(
        config.out, run.bundle(recipe=recipe, data="captioned scenes of two things", quality=rows, binding=worth)
    )
    config.tell(report(config, rows, worth), gates=config.out, quality=rows, binding=worth)
    return config.out


def with_gates(engine: Engine, source: str, *, force: bool = False) -> Engine:
    """The same model with gates beside it, as the server loads them.

    Raises:
        LoadError: they cannot be read, or do not fit.
    """
    text = engine.components.unet.config.cross_attention_dim
    info = open_gates(source, points_of(engine), text, engine.info.model_hash, force=force)
    return Engine(engine.components, engine.unet, dataclasses.replace(engine.info, gate=info), engine.device)


def drawn(engine: Engine, folder: Path, config: GateConfig) -> list[dict[str, object]]:
    """Attributes, arrangement and leaks of held-out scenes in one step, with the gates and without."""
    gated = with_gates(engine, str(folder))
    scenes = TwoThings.draw(engine, config.scenes, config.seed)
    said: list[tuple[str, tuple[str, ...]]] = [(caption, ()) for caption in scenes.captions]
    rows = []
    for name, gate in (("with gates", True), ("without", False)):
        latents = draw_all(gated, said, scenes, 8, gate=gate)
        rows.append({"heard": name, "n": len(said), **shares(score(scenes, thumbnails(latents)))})
    return rows


def report(config: GateConfig, rows: list[dict[str, float | str]], worth: list[dict[str, object]]) -> str:
    """What a run came to, in words."""
    told = [
        f"  {row['heard']}, {row['timesteps']} timesteps: squared error {row['mse']:.5f}, {row['open']:.1%} heard"
        for row in rows
    ]
    drawn_ = [
        f"  {row['heard']}: all six attributes right {row['all of both']} %, arrangement {row['arrangement']} %, "
        f"leaked {row['leaked']} %"
        for row in worth
    ]
    return "\n".join(
        [
            f"gates are in {config.out}; held-out pictures of two things:",
            *told,
            f"{config.scenes} scenes drawn in one step:",
            *drawn_,
            "serve them, and switch them on in a request by gate=True:",
            f"  turbolens serve --model {config.model} --gate {config.out}",
        ]
    )
