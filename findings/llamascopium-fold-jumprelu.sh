#!/usr/bin/env bash
# llamascopium's fold of the data set's norm changes which features of a JumpReLU SAE fire.
#
# Versions: llamascopium 2.0.0b34, torch 2.13.0 (CPU).
# Behaviour: its documentation says that folding the data set's average norm into the weights ("inference" mode)
# "doesn't affect the encoding and decoding as a whole". `standardize_parameters_of_dataset_norm` divides the encoder's
# bias by the factor, so that pre-activations shrink by it, and leaves the JumpReLU's thresholds as they are. With a factor
# f = sqrt(d_model) / norm that is not 1, other features fire, and the reconstruction is another.
# Output seen: positions whose active features are the same: 1.4 %; mean number of them 7.4 before, 11.7 after;
# reconstructions differ by up to 18.8. With the thresholds divided by f too: 100 %.
# Exit code: 0 while this is so; not 0 once the fold keeps the features.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet llamascopium==2.0.0b34 torch==2.13.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import math

import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

D, NORM = 8, 20.0
torch.manual_seed(0)
config = SAEConfig(hook_point_in="h", hook_point_out="h", d_model=D, expansion_factor=3, act_fn="jumprelu")
made = SparseAutoEncoder(config)
for parameter in made.parameters():
    parameter.data = torch.randn_like(parameter) * 0.5
made.set_dataset_average_activation_norm({"h": NORM})
made.save_pretrained("sae")
config.save_hyperparameters("sae")

x = torch.randn(500, D) * 7
factor = math.sqrt(D) / NORM
with torch.no_grad():
    plain = SparseAutoEncoder.from_pretrained("sae")
    z = plain.encode(plain.normalize_activations({"h": x})["h"])
    folded = SparseAutoEncoder.from_pretrained("sae", fold_activation_scale=True)
    z_folded = folded.encode(x)
    same = ((z > 0) == (z_folded > 0)).all(1).float().mean().item()
    apart = (plain.decode(z) / factor - folded.decode(z_folded)).abs().max().item()
    folded.activation_function.log_jumprelu_threshold -= math.log(factor)
    mended = ((z > 0) == (folded.encode(x) > 0)).all(1).float().mean().item()
print(f"positions of the same features {same:.1%}, mean number {(z > 0).sum(1).float().mean():.1f} and "
      f"{(z_folded > 0).sum(1).float().mean():.1f}, reconstructions apart by {apart:.1f}; thresholds folded too {mended:.1%}")
assert mended > 0.99, "with its thresholds folded the fold is exact"
assert same < 0.5, "CHANGED: the fold keeps the features"
print("as described")
PY
