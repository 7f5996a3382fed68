"""The architectures by the name that `--architecture` gives them."""

from __future__ import annotations

from turbolens_training.sae.architectures.base import SaeArchitecture
from turbolens_training.sae.architectures.batch_topk import BatchTopK
from turbolens_training.sae.architectures.jump_relu import JumpReLU
from turbolens_training.sae.architectures.matryoshka import Matryoshka
from turbolens_training.sae.architectures.temporal import Temporal
from turbolens_training.sae.architectures.topk import TopK
from turbolens_training.sae.config import SaeConfig


def build_architecture(config: SaeConfig) -> SaeArchitecture:
    """The architecture that a configuration names."""
    match config.architecture:
        case "topk":
            return TopK(config.k)
        case "batch-topk":
            return BatchTopK(config.k)
        case "jumprelu":
            return JumpReLU(config.k, config.bandwidth, config.l0_coefficient)
        case "matryoshka":
            return Matryoshka(config.k, config.nested_k, config.matryoshka_prefixes, config.level_weights)
        case "temporal":
            selection = BatchTopK(config.k) if config.selection == "batch-topk" else TopK(config.k)
            return Temporal(selection, config.run_steps, config.prediction)
