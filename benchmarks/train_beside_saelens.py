"""Training one TopK SAE: our trainer's step beside that of SAELens' own trainer, on the same batches in the same order.

    python -m benchmarks.train_beside_saelens

Both are run by the step that their own training loops run. What they learn is judged by one function, in float64, on
tokens that neither saw.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from benchmarks.places import RESULTS
from turbolens_server.bench.results import assemble, save, to_markdown
from turbolens_server.bench.timing import Aim, Contender, compare, interleave
from turbolens_server.loading.load import load_engine
from turbolens_server.sae.bundle import SaeWeights
from turbolens_training.activations.config import DataConfig
from turbolens_training.activations.prompts import ScenePrompts
from turbolens_training.activations.sources import TokenSource, open_streams
from turbolens_training.measures.quality import VarianceSums
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.maths import decode, pre_activations, top_k
from turbolens_training.sae.normalizer import Normalizer
from turbolens_training.sae.trainer import SaeTrainer

AIM: Final = Aim(ratio=0.6)
FULL: Final = SaeConfig(
    d_sae=5120, k=10, batch=4096, steps=150, dead_tokens=10_000_000, learning_rate=3.6e-4, warm_up=15
)
"""The published sizes; the rate is the usual law's for this width, and the warm-up is as short as the run."""
MINI: Final = SaeConfig(learning_rate=1e-2)
"""As the SAEs of `mini` are trained, but for the rate: the default, 3e-3, explains less of both blocks, and 2e-2 leaves
7 % of the features of one dead (docs/training.md)."""
MINI_RATE_OF_SAELENS: Final = 3e-3
"""Of 1.5e-3, 3e-3 and 1e-2, the rate at which SAELens explains most of both blocks together in 1,500 steps."""
BLOCKS: Final = ("mid.0", "up.0.0")
"""Of `mini`: the one whose SAE explains least, and one that is explained nearly whole."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What an SAE is trained and judged on."""

    name: str
    batches: Tensor  # [B, batch, d_model] float32: taken in this order, again and again
    held_out: Tensor  # [N, d_model]

    @property
    def tokens(self) -> Tensor:
        """All training tokens, [B batch, d_model]."""
        return self.batches.flatten(0, 1)


def synthetic(d_model: int, directions: int, active: int, batch: int, batches: int, held_out: int) -> Data:
    """Tokens that are sums of a few random directions, the frequent ones by far more often than the rare, and a mean.

    Args:
        d_model: width of a token.
        directions: of the dictionary that tokens are made of.
        active: directions of a token.
        batch: tokens of a batch.
        batches: number of batches.
        held_out: tokens to judge by.
    """
    generator = torch.Generator().manual_seed(0)
    rows = functional.normalize(torch.randn(directions, d_model, generator=generator), dim=1)
    frequency = 1 / (torch.arange(directions) + 10.0)
    mean = torch.randn(d_model, generator=generator) / d_model**0.5

    def make(n: int) -> Tensor:
        picks = frequency.multinomial(n * active, replacement=True, generator=generator).view(n, active)
        strengths = 0.5 + torch.rand(n, active, generator=generator)
        tokens: Tensor = functional.embedding_bag(picks, rows, per_sample_weights=strengths, mode="sum") + mean
        return tokens

    made = torch.stack([make(batch) for _ in range(batches)])
    return Data("synthetic", made, make(held_out))


def of_mini(blocks: Sequence[str], batch: int, chunks: int, held_out: int) -> list[Data]:
    """Updates of `mini` at some blocks, shuffled: so many chunks of its training stream and of the held-out one.

    Of pictures made in one step: a pass of the U-Net makes the most pictures so, and with few an SAE learns them.
    """
    config = DataConfig(device="cpu", one_step_share=1.0)
    streams = open_streams(load_engine(device="cpu", saes=[]), config, ScenePrompts())

    def collect(source: TokenSource, count: int) -> dict[str, Tensor]:
        made = [source.tokens(index, MINI.tokens_per_image) for index in range(count)]
        return {block: torch.cat([tokens[block] for tokens in made]) for block in blocks}

    training, judged = (collect(source, count) for source, count in zip(streams, (chunks, held_out), strict=True))
    order = torch.randperm(len(training[blocks[0]]), generator=torch.Generator().manual_seed(0))
    order = order[: len(order) // batch * batch]
    return [Data(block, training[block][order].unflatten(0, (-1, batch)), judged[block]) for block in blocks]


class Ours:
    """Our trainer."""

    def __init__(self, config: SaeConfig, tokens: Tensor) -> None:
        self._trainer = SaeTrainer(config, tokens, 0, Normalizer.fit(tokens))

    def step(self, x: Tensor, step: int) -> None:
        """As :class:`turbolens_training.sae.trainer.SaeTraining` does it."""
        self._trainer.step(x, step)

    def weights(self) -> SaeWeights:
        """What would be served, for tokens as they come."""
        return self._trainer.export().weights


class Theirs:
    """SAELens' `SAETrainer` with its `TopKTrainingSAE`, tokens scaled by its `ActivationScaler`."""

    def __init__(self, config: SaeConfig, tokens: Tensor, sae: dict[str, Any], trainer: dict[str, Any]) -> None:
        """`sae` and `trainer`: settings other than SAELens' defaults, of either."""
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(0)  # their weights are drawn from the global generator
        d_in = tokens.shape[1]
        self._sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=d_in, d_sae=config.d_sae, k=config.k, normalize_activations="expected_average_only_in", **sae
            )
        )
        rate = trainer.get("lr", SAETrainerConfig.lr)
        self._trainer: Any = SAETrainer(
            SAETrainerConfig(
                total_training_samples=config.steps * config.batch, train_batch_size_samples=config.batch,
                lr_end=rate / 10, **trainer,
            ),
            self._sae,
            iter(()),
        )  # fmt: skip
        self._trainer.activation_scaler.estimate_scaling_factor(d_in, iter((tokens,)), n_batches_for_norm_estimate=1)

    def step(self, x: Tensor, step: int) -> None:
        """What `SAETrainer.fit` does for a batch, without its bar and log."""
        self._trainer.maybe_reset_sparsity()
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def weights(self) -> SaeWeights:
        """What they would save, for tokens as they come; the training is at its end."""
        scaler = self._trainer.activation_scaler
        self._sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
        state = self._sae.state_dict()
        self._sae.process_state_dict_for_saving_inference(state)
        return SaeWeights(**{name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})


def contenders_of(config: SaeConfig, tokens: Tensor, *, rate: float, sparse: bool) -> dict[str, Ours | Theirs]:
    """Both trainers: SAELens' with its defaults, and tuned.

    Args:
        config: of ours; sizes and number of steps hold for all.
        tokens: all that they are trained on.
        rate: of the tuned one, with our warm-up and decay.
        sparse: whether the tuned one has sparse activations. They save it time at full size, and know no rescaling by
            the decoder's norms, its default.
    """
    schedule = {
        "lr": rate,
        "lr_warm_up_steps": config.warm_up,
        "lr_decay_steps": round(config.decay_share * config.steps),
    }
    activations = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
    return {
        "SAELens": Theirs(config, tokens, {}, {}),
        "SAELens, tuned": Theirs(config, tokens, activations, schedule),
        "TurboLens": Ours(config, tokens),
    }


@dataclasses.dataclass
class Training:
    """A trainer on its way through the batches, some steps at each call."""

    step: Callable[[Tensor, int], None]
    batches: Tensor
    steps: int
    done: int = 0

    def __call__(self) -> None:
        for at in range(self.done, self.done + self.steps):
            self.step(self.batches[at % len(self.batches)], at)
        self.done += self.steps


def explained_variance(weights: SaeWeights, k: int, x: Tensor) -> float:
    """Of tokens [N, d_model], by a TopK SAE, all in float64."""
    exact = SaeWeights(**{name: tensor.detach().double() for name, tensor in weights.tensors().items()})
    sums = VarianceSums()
    for part in x.double().split(1024):
        sums.add(part, decode(top_k(pre_activations(exact, part), k), exact.W_dec) + exact.b_dec)
    return sums.explained


def measure_case(config: SaeConfig, data: Data, steps_a_round: int, *, rate: float, sparse: bool) -> dict[str, Any]:
    """Train all to the end, in turns; see :func:`contenders_of`."""
    print(f"{data.name}, k {config.k}: {config.steps} steps", file=sys.stderr)
    trained = contenders_of(config, data.tokens, rate=rate, sparse=sparse)
    *others, ours = trained
    contenders = [
        Contender(
            name, Training(each.step, data.batches, steps_a_round), dict.fromkeys(others if name == ours else (), AIM)
        )
        for name, each in trained.items()
    ]
    # The round that does not count trains too.
    times = interleave(contenders, config.steps // steps_a_round - 1)
    a_step = {name: [ms / steps_a_round for ms in by_round] for name, by_round in times.items()}
    return {
        "label": {"data": data.name, "steps": config.steps},
        "size": {"d_model": data.held_out.shape[1], "d_sae": config.d_sae, "k": config.k, "batch": config.batch},
        "rows": compare(contenders, a_step),
        "tokens": {"training": len(data.tokens), "held out": len(data.held_out)},
        "explained": {
            name: explained_variance(each.weights(), config.k, data.held_out) for name, each in trained.items()
        },
    }


def run(full: SaeConfig = FULL, mini: SaeConfig = MINI, blocks: Sequence[str] = BLOCKS) -> dict[str, Any]:
    """Measure at full size and on `mini`."""
    data = synthetic(1280, 10_240, full.k, full.batch, batches=64, held_out=8192)
    cases = [measure_case(full, data, max(1, full.steps // 15), rate=full.learning_rate, sparse=True)]
    del data
    for block in of_mini(blocks, mini.batch, chunks=128, held_out=16):
        cases.append(measure_case(mini, block, max(1, mini.steps // 30), rate=MINI_RATE_OF_SAELENS, sparse=False))
    rounds = min(len(row.ms) for case in cases for row in case["rows"])
    return assemble("train_beside_saelens", rounds, cases, sae_lens=importlib.metadata.version("sae-lens"))


def main(steps: int = FULL.steps, out: Path = RESULTS / "train_beside_saelens.json") -> None:
    """Measure and write.

    Args:
        steps: at full size.
        out: JSON file to write.
    """
    result = run(dataclasses.replace(FULL, steps=steps))
    print(to_markdown(result))
    save(out, result)


if __name__ == "__main__":
    tyro.cli(main)
