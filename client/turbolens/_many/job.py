"""What a run of many prompts is, so that going on with it can be told from beginning another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format, message

from turbolens._run import Run
from turbolens_proto.v1 import model_service_pb2, run_pb2


def describe(run: Run, model: model_service_pb2.Model, **more: Any) -> dict[str, Any]:
    """A job as plain JSON: the settings of every run, the model and SAEs that they are made with."""
    settings = run.to_proto()
    settings.ClearField("source")
    settings.ClearField("seeds")
    made: dict[str, Any] = {
        "settings": _plain(settings),
        "model": {"name": model.name, "hash": model.hash, "components_hash": model.components_hash},
        "saes": {sae.name: sae.hash for sae in model.saes},
        "loras": [_plain(lora) for lora in model.loras],
        **more,
    }
    return dict(json.loads(json.dumps(made)))


def check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another job's output.

    Raises:
        ValueError: it names what differs.
    """
    differs = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if differs:
        told = "; ".join(f"{name}: {before.get(name)} before, {now.get(name)} now" for name in differs)
        raise ValueError(f"{out} is there and of another job ({told}); pass overwrite=True, or another file")


def check_served(job: Mapping[str, Any], made: run_pb2.Provenance) -> None:
    """Hold an answer to the model that the job began with, since servers change under long runs.

    Raises:
        ValueError: another model or SAE answered.
    """
    served = {"hash": made.model_hash, "components_hash": made.components_hash}
    other = [name for name, hash in made.sae_hashes.items() if job["saes"].get(name) != hash]
    if other or any(job["model"][name] != hash for name, hash in served.items()):
        what = f"the SAEs {', '.join(other)}" if other else "the model"
        raise ValueError(f"the server changed {what} during the run; what was made before is kept, but is of the other")


def _plain(proto: message.Message) -> Any:
    return json_format.MessageToDict(proto)
