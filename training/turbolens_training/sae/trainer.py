"""Train the SAEs of all hook points from one stream; everything that a resumed run needs is in one state."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from turbolens_server.files import write_file
from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.activations.reservoir import Reservoir
from turbolens_training.activations.sources import TokenSource
from turbolens_training.checkpoints import add_rows, cut_log, read_states, save_state
from turbolens_training.sae.architectures import build_architecture
from turbolens_training.sae.architectures.base import Export
from turbolens_training.sae.auxk import auxk_loss, auxk_target, dead_features, decode_dead, strongest
from turbolens_training.sae.boards import Board
from turbolens_training.sae.config import OF_EXPORT, OF_THE_MACHINE, SaeConfig
from turbolens_training.sae.distributed import ALONE, Ranks
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.optimizer import UnitRowAdam

_LOOK_EVERY: Final = 25
"""Steps between looks at the device's counters, each of which waits for the device."""


LOG: Final = "log.jsonl"
"""Beside the checkpoint."""
_STATE: Final = ("config", "cursor", "generators", "reservoirs", "trainers")
"""What a checkpoint has beside its step."""


class NonFiniteLoss(ArithmeticError):
    """A loss that is not finite, with the batch that gave it, [N, d_model] as the U-Net made it."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__("the loss is not finite")
        self.batch = batch


@dataclasses.dataclass(frozen=True)
class Progress:
    """How one SAE is doing on its training batches."""

    explained: float
    """1 - FVU of the last batch, on the variance of the first tokens."""
    l0: float
    dead: float
    """Share of features; on training's own tokens."""


class SaeTrainer:
    """One SAE in training: weights, optimiser, dead clock."""

    def __init__(self, config: SaeConfig, tokens: Tensor, seed: int, normalizer: Normalizer) -> None:
        """Start from tokens [N, d_model], not yet normalised, on the device to train on."""
        self._config = config
        self.normalizer = normalizer
        generator = torch.Generator().manual_seed(seed)
        self._architecture = build_architecture(config)
        self.weights = self._architecture.initial_weights(normalizer(tokens), config.d_sae, generator)
        self._parameters = [tensor.requires_grad_() for tensor in self._architecture.trainable(self.weights).values()]
        self._optimizer = UnitRowAdam(self._parameters, self.weights.W_dec, lr=config.rate(0))
        device = tokens.device
        self._idle = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # tokens since last active
        self._dead = torch.zeros(0, dtype=torch.int64, device=device)  # features dead at the last look
        self._last: tuple[Tensor, Tensor] | None = None  # error and counts of the last batch

    def step(self, x: Tensor, step: int) -> None:
        """Learn from updates x [N, d_model], not yet normalised.

        Raises:
            NonFiniteLoss: the loss is not finite; the weights are those from before the step.
        """
        config, weights = self._config, self.weights
        normal = self._architecture.read(weights, self.normalizer(x))
        done = self._architecture.run(weights, normal)
        loss = done.loss
        # Some may have come back to life since the last look. On a GPU, to drop them would wait for the device.
        alive = ~dead_features(self._idle[self._dead], config.dead_tokens)
        dead = self._dead if x.is_cuda else self._dead[~alive]
        if len(dead):
            barred = alive if x.is_cuda else torch.zeros(len(dead), dtype=torch.bool)
            places = config.auxk_places
            target = auxk_target(weights, normal, strongest(done.pre, done.active, config.k - places))
            made = decode_dead(weights, normal, done.pre, places or normal.shape[1] // 2, dead, barred)
            loss = loss + config.auxk_coefficient * auxk_loss(made, target)
        if not torch.isfinite(loss):  # waits for the device, which a run that goes on with NaN would not repay
            raise NonFiniteLoss(x)
        self._optimizer.param_groups[0]["lr"] = config.rate(step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()

        with torch.no_grad():
            self._architecture.observe(weights, done)
            counts = done.active.counts(config.d_sae)
            self._idle = (self._idle + len(x)) * (counts == 0)
            self._last = done.error, counts
            if (step + 1) % _LOOK_EVERY == 0:
                self._dead = dead_features(self._idle, config.dead_tokens).nonzero()[:, 0]

    @property
    def idle(self) -> Tensor:
        """Tokens since each feature was last active, [d_sae]."""
        return self._idle

    def export(self) -> Export:
        """The SAE as it is served: on updates as the U-Net makes them, on the CPU."""
        detached = {name: tensor.detach().cpu() for name, tensor in self.weights.tensors().items()}
        weights = SaeWeights(**detached)
        mean = self._architecture.read(weights, self.normalizer.mean.cpu())  # reading is linear
        return self._architecture.export(dataclasses.replace(self.normalizer, mean=mean).fold(weights))

    def progress(self) -> Progress:
        fvu, l0 = 0.0, 0.0
        if self._last is not None:
            error, counts = self._last
            fvu, l0 = error.square().mean().item(), counts.sum().item() / len(error)
        dead = dead_features(self._idle, self._config.dead_tokens)
        return Progress(1 - fvu, l0, dead.float().mean().item())

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: tensor.detach() for name, tensor in self.weights.tensors().items()},
            "optimizer": self._optimizer.state_dict(),
            "idle": self._idle,
            "dead": self._dead,
            "mean": self.normalizer.mean,
            "scale": self.normalizer.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.weights.tensors().items():
                tensor.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._idle = state["idle"].to(self._idle.device)
        self._dead = state["dead"].to(self._dead.device)


def _summary(progress: Mapping[str, Progress]) -> str:
    """EV, L0 and dead share of each block, short."""
    return ", ".join(f"{name} EV {p.explained:.3f} L0 {p.l0:.1f} dead {p.dead:.1%}" for name, p in progress.items())


class SaeTraining:
    """The whole run: the SAEs, their reservoirs, the position in the data and the generator of every draw.

    Each SAE has its own generator, so that it does not depend on which others are trained beside it.
    """

    def __init__(self, config: SaeConfig, source: TokenSource, device: torch.device, *, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.step = 0
        self.source = source
        self._device = device
        self._cursor = 0  # the next chunk
        self.board: Board | None = None
        """Where the log is shown too."""
        self._saved = time.monotonic()  # when the last checkpoint was written, or the run began
        self._ranks = ranks
        self._seeds = {name: random.Random(f"{config.seed}/{name}").getrandbits(62) for name in source.widths}
        self._generators = {name: torch.Generator().manual_seed(seed) for name, seed in self._seeds.items()}
        self._reservoirs = {name: Reservoir(config.reservoir, width, device) for name, width in source.widths.items()}
        self.trainers: dict[str, SaeTrainer] = {}
        """By hook point; none before the reservoirs are full."""

    def train(self, until: int, *, checkpoint: Path | None = None, stop: Callable[[], bool] = lambda: False) -> None:
        """Train up to step `until`, or until `stop` says so, with a checkpoint now and then and at the end.

        Beside the checkpoint lies the log, `log.jsonl`: a line for each SAE now and then.

        Raises:
            ArithmeticError: a loss is not finite. The batch is saved beside the checkpoint, which stays as it was.
        """
        if not self.trainers:
            self._fill(stop)
        if not self.trainers:  # stopped before there was anything to keep
            return
        with tqdm(total=until, initial=self.step, desc="SAEs", unit="step", smoothing=0.05) as bar:
            while self.step < until:
                if self.step % self.config.steps_per_chunk == self.config.steps_per_chunk - 1:
                    self._take_chunk()
                for name, trainer in self.trainers.items():
                    batch = self._reservoirs[name].draw(self.config.batch, self._generators[name])
                    try:
                        trainer.step(batch, self.step)
                    except NonFiniteLoss as error:
                        raise self._failure(name, error, checkpoint) from error
                self.step += 1
                bar.update()
                if self.step % _LOOK_EVERY == 0:
                    progress = {name: trainer.progress() for name, trainer in self.trainers.items()}
                    bar.set_postfix_str(_summary(progress))
                    if checkpoint:
                        self._log(checkpoint.with_name(LOG), progress)
                ends = self.step == until or stop()
                if checkpoint and (ends or self._is_due()):
                    self.save(checkpoint)
                    self._saved = time.monotonic()
                if ends:
                    break

    def _is_due(self) -> bool:
        """Whether a checkpoint is, by steps or, on all ranks alike, by time."""
        if self.step % self.config.checkpoint_steps == 0:
            return True
        late = time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes
        return self.step % _LOOK_EVERY == 0 and self._ranks.any(late)

    def _log(self, path: Path, progress: Mapping[str, Progress]) -> None:
        """Add a line for each SAE."""
        if self.board is not None:
            numbers = {n: dataclasses.asdict(state) for n, state in progress.items()}
            self.board.add(self.step, {f"{n}/{what}": v for n, own in numbers.items() for what, v in own.items()})
        at = {"step": self.step, "rate": self.config.rate(self.step - 1)}
        add_rows(path, [{**at, "block": name, **dataclasses.asdict(state)} for name, state in progress.items()])

    def _failure(self, name: str, error: NonFiniteLoss, checkpoint: Path | None) -> ArithmeticError:
        """What to raise for a loss that is not finite, with its batch saved."""
        where = ""
        if checkpoint:
            path = checkpoint.with_name(f"not-finite-{name}-{self.step}.safetensors")
            write_file(path, save({"batch": error.batch.contiguous()}))
            where = f"; its batch is in {path}"
        return ArithmeticError(f"{name}, step {self.step}: {error}{where}")

    def _fill(self, stop: Callable[[], bool]) -> None:
        """Fill the reservoirs; their first contents set mean and scale."""
        with tqdm(desc="filling", unit="chunk") as bar:
            while not self._ranks.all(all(reservoir.full for reservoir in self._reservoirs.values())):
                if stop():
                    return
                self._take_chunk()
                bar.update()
        self._build({name: Normalizer.fit(reservoir.rows) for name, reservoir in self._reservoirs.items()})

    def _build(self, normalizers: dict[str, Normalizer]) -> None:
        for name, normalizer in normalizers.items():
            self.trainers[name] = SaeTrainer(self.config, self._reservoirs[name].rows, self._seeds[name], normalizer)

    def _take_chunk(self) -> None:
        for name, tokens in self.source.tokens(self._cursor, self.config.tokens_per_image).items():
            self._reservoirs[name].put(tokens.to(self._device), self._generators[name])
        self._cursor += 1

    def _identity(self) -> dict[str, Any]:
        """What decides the result: the data's source, and the settings."""
        settings = dataclasses.asdict(self.config)
        for name in (*OF_THE_MACHINE, *OF_EXPORT, "held_out_chunks"):
            del settings[name]
        return {"source": self.source.identity, **settings}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what follows."""
        return {
            "config": self._identity(),
            "step": self.step,
            "cursor": self._cursor,
            "generators": {name: generator.get_state() for name, generator in self._generators.items()},
            "reservoirs": {name: reservoir.state_dict() for name, reservoir in self._reservoirs.items()},
            "trainers": {name: trainer.state_dict() for name, trainer in self.trainers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        ours = self._identity()
        if state["config"] != ours:
            changed = [name for name, value in ours.items() if state["config"].get(name) != value]
            raise ValueError(f"the checkpoint is of a run with another {', '.join(changed)}; choose another --work")
        self.step, self._cursor = state["step"], state["cursor"]
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name].cpu())
        for name, reservoir in self._reservoirs.items():
            reservoir.load_state_dict(state["reservoirs"][name])
        trainers = state["trainers"]
        self._build({n: Normalizer(s["mean"].to(self._device), s["scale"]) for n, s in trainers.items()})
        for name, trainer in self.trainers.items():
            trainer.load_state_dict(trainers[name])

    def save(self, path: Path) -> None:
        """Write the state; a write that is cut off leaves the last one whole, on every rank.

        Raises:
            WriteError: it cannot be written; the last one is as it was.
        """
        save_state(path, self.state_dict(), barrier=self._ranks.barrier)

    def resume(self, path: Path) -> bool:
        """Go on from the last checkpoint that is whole on every rank, if there is one; the log loses what came after.

        Args:
            path: of the last checkpoint, as `save` got it.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
            ValueError: it is the state of a run with other settings, or other ranks are at another step. They would
                ask for different chunks, and wait for each other for ever.
        """
        states = read_states(path, self._device, _STATE)
        state = next(states, None)
        steps = self._ranks.gather(None if state is None else state["step"])
        known = [step for step in steps if step is not None]
        if not known:
            cut_log(path.with_name(LOG), 0)  # of a run that was ended before its first checkpoint
            return False
        if state is not None and len(known) == len(steps) and state["step"] > min(known):
            state = next(states, state)  # a rank was stopped before it had put its own in place
        steps = self._ranks.gather(None if state is None else state["step"])
        if state is None or len({*steps}) > 1:
            told = ", ".join(f"rank {rank} at {'none' if at is None else at}" for rank, at in enumerate(steps))
            raise ValueError(f"the ranks' checkpoints are of different steps ({told}); choose another --work")
        self.load_state_dict(state)
        cut_log(path.with_name(LOG), self.step)
        return True
