#!/usr/bin/env bash
# diffusers gives every attention layer of a kohya LoRA one alpha, whatever alpha each layer's own entry says.
#
# Versions: diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: kohya's layout keeps an alpha beside every pair of matrices; a layer's change is alpha / rank * up @ down. A
# valid file of rank 2 has alpha 3 for an attention layer and alpha 1 for a convolution, as files with a convolution alpha
# of their own have. `load_lora_weights` warns of nothing, and scales the attention layer by 1/2 in place of 3/2. The
# alpha is read, but under the name of an older attention processor ("...attn1.processor.to_q_lora.down.weight"), which
# no layer of the model matches, so peft falls back to the other.
# Output seen: alpha/rank in the file: conv 0.5, attention 1.5; applied: conv 0.5, attention 0.5
# Exit code: 0 while this is so; not 0 once the attention layer gets its own alpha.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 torch==2.13.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

ATTENTION, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"
ALPHA = {ATTENTION: 3.0, CONV: 1.0}
RANK = 2
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=(2, 4),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=80, transformer_layers_per_block=(1, 1), use_linear_projection=True,
)
tensors = {}
for name, alpha in ALPHA.items():
    out, *rest = unet.get_submodule(name).weight.shape
    key = "lora_unet_" + name.replace(".", "_")
    tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, *rest)
    tensors[f"{key}.lora_up.weight"] = torch.randn(out, RANK, *[1] * len(rest[1:]))
    tensors[f"{key}.alpha"] = torch.tensor(alpha)
save_file(tensors, "kohya.safetensors")

state, alphas = StableDiffusionXLPipeline.lora_state_dict("kohya.safetensors", unet_config=unet.config)
print("alphas as read:", alphas)
StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="x")
applied = {name: unet.get_submodule(name).scaling["x"] for name in ALPHA}
told = {name: alpha / RANK for name, alpha in ALPHA.items()}
print(f"alpha/rank in the file: conv {told[CONV]}, attention {told[ATTENTION]}; "
      f"applied: conv {applied[CONV]}, attention {applied[ATTENTION]}")
assert applied[CONV] == told[CONV], "the convolution has its own alpha"
assert applied[ATTENTION] == told[CONV] != told[ATTENTION], "CHANGED: the attention layer has its own alpha"
print("as described")
PY
