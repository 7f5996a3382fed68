"""No part of a server tells its maker about itself.

ONNX Runtime looks up a host of its vendor and keeps an id of the machine under the home folder as soon as it is
imported, which `diffusers` does wherever it is installed. The others send nothing on their own account today, but have
a switch, so it is set.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

SWITCHES: Final = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, diffusers, transformers, datasets
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray
    "DO_NOT_TRACK": "1",  # whoever asks
}


def switch_off_telemetry(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set every switch that is not set already: an operator who wants telemetry says so."""
    for name, value in SWITCHES.items():
        environment.setdefault(name, value)
