#!/usr/bin/env bash
# diffusers 0.42.1: saving a sharded model beside its sharded fp16 variant removes the variant's weights and keeps its index.
#
# Versions: diffusers 0.42.1, torch 2.13.0, safetensors 0.8.0, and the accelerate that pip brings.
# Behaviour: save_pretrained(folder, variant="fp16", max_shard_size=...) writes shards and an index, which load. A second
# save_pretrained(folder, max_shard_size=...) of the plain weights cleans the folder and takes every shard of the variant
# away, while its index file stays: variant="fp16" then fails to load. In the other order (plain first, variant second)
# nothing is lost, nor where neither is in shards.
# Output seen: "plain after fp16: 4 files of fp16 gone, its index stays, FileNotFoundError";
# "fp16 after plain: 0 files gone".
# Exit code: 0 while this is so; not 0 once the variant survives.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 safetensors==0.8.0 accelerate
cat > "$work/try.py" <<'PY'
import os
import sys
import tempfile

from diffusers import AutoencoderKL

model = AutoencoderKL(
    block_out_channels=(32,), norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
)
fp16, plain = {"variant": "fp16", "max_shard_size": "200KB"}, {"max_shard_size": "200KB"}


def save(first, second):
    """A folder with both, and the weight files of the first that the second took away."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, **first)
    AutoencoderKL.from_pretrained(folder, variant=first.get("variant"))
    before = set(os.listdir(folder))
    model.save_pretrained(folder, **second)
    return folder, sorted(before - set(os.listdir(folder)))


folder, gone = save(fp16, plain)
stays = os.path.exists(os.path.join(folder, "diffusion_pytorch_model.safetensors.index.fp16.json"))
try:
    AutoencoderKL.from_pretrained(folder, variant="fp16")
    loads = True
except OSError as error:
    loads = False
    print(f"plain after fp16: {len(gone)} files of fp16 gone, its index {'stays' if stays else 'went'}, {type(error).__name__}")
_, other = save(plain, fp16)
print(f"fp16 after plain: {len(other)} files gone")
sys.exit(0 if gone and stays and not loads and not other else 1)
PY
"$work/venv/bin/python" "$work/try.py" 2>/dev/null
