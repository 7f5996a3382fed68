#!/usr/bin/env bash
# safetensors 0.8.0 writes NumPy arrays that are not in C order as other numbers, without an error; 0.7.0 wrote them right.
#
# Versions: safetensors 0.7.0 and 0.8.0, numpy 2.4.6.
# Behaviour: safetensors.numpy.save of an array in Fortran order, or of a transposed one (what scikit-learn's components
# and many a decoder W_dec.T are), keeps shape and type, and takes the bytes as they lie in memory: read back, the shape
# is right and the values are in other places. The same calls of 0.7.0 give the array back. safetensors.torch refuses
# such tensors by a ValueError in both versions.
# Output seen: 0.7.0: Fortran True, transposed True; 0.8.0: Fortran False, transposed False (True: came back as it was).
# Exit code: 0 while this is so; not 0 once 0.8.0's own answer differs.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

plain = np.arange(6, dtype=np.float32).reshape(2, 3)
same = {}
for name, array in {"Fortran": np.asfortranarray(plain), "transposed": plain.T}.items():
    back = load(save({"x": array}))["x"]
    assert back.shape == array.shape and back.dtype == array.dtype
    same[name] = bool(np.array_equal(back, array))
assert np.array_equal(load(save({"x": plain}))["x"], plain)
print(f"safetensors {safetensors.__version__}: " + ", ".join(f"{name} {value}" for name, value in same.items()))
wanted = sys.argv[1] == "right"
sys.exit(0 if all(value is wanted for value in same.values()) else 1)
PY
python3 -m venv "$work/venv"
for version in "0.7.0 right" "0.8.0 wrong"; do
  set -- $version
  "$work/venv/bin/pip" install --quiet "safetensors==$1" numpy==2.4.6
  "$work/venv/bin/python" "$work/try.py" "$2"
done
