#!/usr/bin/env bash
# A model compiled by AOTInductor and run from Python lets no other thread of Python run until it is done.
#
# Versions: torch 2.13.0 (CPU).
# Behaviour: PyTorch's operators give Python's global lock back while they work, so a server can run a model in one thread
# and answer in another. The same model, packaged by `aoti_compile_and_package` and loaded by `aoti_load_package`, is run by
# a binding that keeps the lock for the whole pass. In a server, every other caller and every health check waits that long.
# Output seen: "a pass takes about 1168 ms; turns of the other thread in one: eager 741, compiled 1" (the one is before it)
# Exit code: 0 while this is so; not 0 once other threads have their turn.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat > "$work/try.py" <<'PY'
import sys
import threading
import time

import torch

torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8))).eval()
x = torch.randn(512, 2048)
with torch.no_grad():
    package = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)))
compiled = torch._inductor.aoti_load_package(package)
PASSES = 5


def turns_beside(run):
    """How often another thread ran while passes did, each pass marked from its first line to its last."""
    inside = done = False

    def work():
        nonlocal inside, done
        with torch.no_grad():
            for _ in range(PASSES):
                inside = True
                run(x)
                inside = False
                time.sleep(0.01)
        done = True

    run(x)
    thread, turns = threading.Thread(target=work), 0
    thread.start()
    while not done:
        turns += inside
        time.sleep(0.001)
    thread.join()
    return turns / PASSES


began = time.perf_counter()
with torch.no_grad():
    compiled(x)
took = 1000 * (time.perf_counter() - began)
eager, ahead = turns_beside(model), turns_beside(compiled)
print(f"a pass takes about {took:.0f} ms; turns of the other thread in one: eager {eager:.0f}, compiled {ahead:.0f}")
sys.exit(0 if took > 20 and eager > 10 and ahead <= 1 else 1)
PY
"$work/venv/bin/python" "$work/try.py" 2>/dev/null
