"""These tests run the Triton kernels on the CPU, in Triton's interpreter.

Triton decides at import whether its functions are compiled or interpreted, and PyTorch may import it at any time; so
they run in a process that was told before, which `test_interpreter.py` starts. Elsewhere they are not collected:

    TRITON_INTERPRET=1 python -m pytest tests/server/kernels/interpreted
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
