"""SAEs that are compared with each other, each trained once."""

from __future__ import annotations

import json

import torch

from turbolens_server.sae.bundle import load_bundle
from turbolens_server.sae.sae import Sae
from turbolens_training.sae.config import SaeConfig
from turbolens_training.sae.export.bundles import recipe_of
from turbolens_training.sae.train import train_saes


def trained(config: SaeConfig) -> Sae:
    """The SAE of a run at its one hook point; trained unless that was done with the same settings."""
    (block,) = config.hook_points
    folder = config.out / block
    recipe = json.loads(json.dumps(recipe_of(config)))
    if not (folder / "cfg.json").exists() or load_bundle(folder).provenance.get("recipe") != recipe:
        train_saes(config)
    return Sae(load_bundle(folder), torch.device("cpu"))
