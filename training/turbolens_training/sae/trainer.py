"""Train the SAEs of all hook points from one stream; everything that a resumed run needs is in one state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.activations.reservoir import Reservoir
from turbolens_training.sae.config import OF_EXPORT, SaeConfig
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.optimizer import UnitRowAdam
from turbolens_training.sae.topk import (
    auxk_loss,
    gather_decode,
    initial_weights,
    pre_activations,
    reconstruction_loss,
    top_k,
)

_LOOK_EVERY: Final = 25
"""Steps between looks at the device's counters, each of which waits for the device."""


class TokenSource(Protocol):
    """Where training data comes from: a chunk is a function of its index."""

    widths: dict[str, int]
    """d_model of each hook point."""
    identity: str
    """What the data comes from; a run goes on only with the same."""

    def tokens(self, index: int, per_image: int) -> dict[str, Tensor]:
        """Tokens [n, d_model] of every hook point."""
        ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """How one SAE is doing on its training batches."""

    explained: float
    """1 - FVU of the last batch, on the variance of the first tokens."""
    l0: float
    dead: float
    """Share of features not active on the last `dead_tokens` tokens."""


class SaeTrainer:
    """One SAE in training: weights, optimiser, dead clock."""

    def __init__(self, config: SaeConfig, tokens: Tensor, seed: int, normalizer: Normalizer) -> None:
        """Start from tokens [N, d_model], not yet normalised, on the device to train on."""
        self._config = config
        self.normalizer = normalizer
        generator = torch.Generator().manual_seed(seed)
        initial = initial_weights(normalizer(tokens), config.d_sae, generator)
        tensors = {name: tensor.requires_grad_() for name, tensor in initial.tensors().items()}
        device = tokens.device
        self.weights = SaeWeights(**tensors)
        self._optimizer = UnitRowAdam(tensors.values(), self.weights.W_dec, lr=config.rate(0))
        self._idle = torch.zeros(config.d_sae, dtype=torch.int64, device=device)  # tokens since last active
        self._dead = torch.zeros(0, dtype=torch.int64, device=device)  # features dead at the last look
        self._last = torch.zeros(2, device=device)  # FVU and L0 of the last batch

    def step(self, x: Tensor, step: int) -> None:
        """Learn from updates x [N, d_model], not yet normalised."""
        config, weights = self._config, self.weights
        x = self.normalizer(x)
        pre = pre_activations(weights, x)
        values, indices = top_k(pre, config.k)
        reconstruction = gather_decode(values, indices, weights.W_dec) + weights.b_dec
        fvu = reconstruction_loss(x, reconstruction)
        loss = fvu
        if len(self._dead):
            # Some may have come back to life since the last look.
            alive = self._idle[self._dead] < config.dead_tokens
            dead_pre = pre[:, self._dead].masked_fill(alive, -torch.inf)
            auxk = auxk_loss(dead_pre, x - reconstruction, weights.W_dec[self._dead])
            loss = loss + config.auxk_coefficient * auxk
        self._optimizer.param_groups[0]["lr"] = config.rate(step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.tensors().values()), 1.0)
        self._optimizer.step()

        with torch.no_grad():
            active = values > 0
            # Counted on the device, in tokens: nothing here waits for it. Padding indices scatter a 0, which is
            # harmless beside the maximum.
            fired = torch.zeros_like(self._idle).scatter_reduce_(0, indices.flatten(), active.flatten().long(), "amax")
            self._idle = (self._idle + len(x)) * (1 - fired)
            self._last = torch.stack([fvu.detach(), active.sum(1).float().mean()])
            if (step + 1) % _LOOK_EVERY == 0:
                self._dead = (self._idle >= config.dead_tokens).nonzero()[:, 0]

    @property
    def idle(self) -> Tensor:
        """Tokens since each feature was last active, [d_sae]."""
        return self._idle

    def folded(self) -> SaeWeights:
        """The weights as they are served: on updates as the U-Net makes them, on the CPU."""
        detached = {name: tensor.detach().cpu() for name, tensor in self.weights.tensors().items()}
        normalizer = dataclasses.replace(self.normalizer, mean=self.normalizer.mean.cpu())
        return normalizer.fold(SaeWeights(**detached))

    def progress(self) -> Progress:
        fvu, l0 = self._last.tolist()
        return Progress(1 - fvu, l0, (self._idle >= self._config.dead_tokens).float().mean().item())

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


class SaeRun:
    """The whole run: the SAEs, their reservoirs, the position in the data and the generator of every draw."""

    def __init__(self, config: SaeConfig, source: TokenSource, device: torch.device) -> None:
        self.config = config
        self.step = 0
        self._source = source
        self._device = device
        self._cursor = 0  # the next chunk
        self._generator = torch.Generator().manual_seed(config.seed)
        self._reservoirs = {name: Reservoir(config.reservoir, width, device) for name, width in source.widths.items()}
        self.trainers: dict[str, SaeTrainer] = {}
        """By hook point; none before the reservoirs are full."""

    def train(self, until: int, *, checkpoint: Path | None = None) -> None:
        """Train up to step `until`, with a checkpoint now and then and at the end."""
        if not self.trainers:
            self._fill()
        with tqdm(total=until, initial=self.step, desc="SAEs", unit="step", smoothing=0.05) as bar:
            while self.step < until:
                if self.step % self.config.steps_per_chunk == self.config.steps_per_chunk - 1:
                    self._take_chunk()
                for name, trainer in self.trainers.items():
                    trainer.step(self._reservoirs[name].draw(self.config.batch, self._generator), self.step)
                self.step += 1
                bar.update()
                if self.step % _LOOK_EVERY == 0:
                    bar.set_postfix_str(self._summary())
                if checkpoint and (self.step % self.config.checkpoint_steps == 0 or self.step == until):
                    self.save(checkpoint)

    def _summary(self) -> str:
        """EV, L0 and dead share of each block, short."""
        each = ((name, trainer.progress()) for name, trainer in self.trainers.items())
        return ", ".join(f"{name} EV {p.explained:.3f} L0 {p.l0:.1f} dead {p.dead:.0%}" for name, p in each)

    def _fill(self) -> None:
        """Fill the reservoirs; their first contents set mean and scale."""
        with tqdm(desc="filling", unit="chunk") as bar:
            while not all(reservoir.full for reservoir in self._reservoirs.values()):
                self._take_chunk()
                bar.update()
        self._build({name: Normalizer.fit(reservoir.rows) for name, reservoir in self._reservoirs.items()})

    def _build(self, normalizers: dict[str, Normalizer]) -> None:
        for rank, (name, normalizer) in enumerate(normalizers.items()):
            seed = self.config.seed * 1000 + rank
            self.trainers[name] = SaeTrainer(self.config, self._reservoirs[name].rows, seed, normalizer)

    def _take_chunk(self) -> None:
        for name, tokens in self._source.tokens(self._cursor, self.config.tokens_per_image).items():
            self._reservoirs[name].put(tokens.to(self._device), self._generator)
        self._cursor += 1

    def _identity(self) -> dict[str, Any]:
        """What decides the result: the data's source, and the settings."""
        settings = dataclasses.asdict(self.config)
        for name in ("out", "work", "model", "device", "checkpoint_steps", "held_out_chunks", *OF_EXPORT):
            del settings[name]
        return {"source": self._source.identity, **settings}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what follows."""
        return {
            "config": self._identity(),
            "step": self.step,
            "cursor": self._cursor,
            "generator": self._generator.get_state(),
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
        self._generator.set_state(state["generator"].cpu())
        for name, reservoir in self._reservoirs.items():
            reservoir.load_state_dict(state["reservoirs"][name])
        trainers = state["trainers"]
        self._build({n: Normalizer(s["mean"].to(self._device), s["scale"]) for n, s in trainers.items()})
        for name, trainer in self.trainers.items():
            trainer.load_state_dict(trainers[name])

    def save(self, path: Path) -> None:
        """Write the state; a write that is cut off leaves the last one whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a file that `save` wrote."""
        self.load_state_dict(torch.load(path, map_location=self._device, weights_only=True))
