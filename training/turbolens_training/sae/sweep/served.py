"""What a server sends for a bundle, beside what the bundle itself makes of the same updates."""

from __future__ import annotations

from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt
import torch

from turbolens_proto.v1 import feature_service_pb2 as messages
from turbolens_proto.v1 import run_pb2
from turbolens_proto.v1.feature_service_pb2_grpc import FeatureServiceStub
from turbolens_server.embedded import start
from turbolens_server.engine.engine import Engine
from turbolens_server.rpc.transport import MAX_MESSAGE_BYTES
from turbolens_training.activations.stream import PromptStream, collect_updates
from turbolens_training.sae.config import SaeConfig

_OPTIONS: Final = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)


def compare_served(engine: Engine, settings: SaeConfig, held_out: PromptStream, pictures: int) -> dict[str, Any]:
    """Ask an in-process server, over its socket, for the features of held-out pictures.

    Args:
        engine: the model with the bundles.
        settings: of the run that made them.
        held_out: whose first pictures are asked for, one a request.
        pictures: how many.

    Returns:
        `positions` compared, over all SAEs; those with as many features active (`same_count`), with the same ones
        (`same_features`); and the largest difference of an activation.
    """
    counted: dict[str, Any] = {"pictures": pictures, "positions": 0, "same_count": 0, "same_features": 0}
    largest = 0.0
    every = {name: torch.arange(sae.bundle.d_sae) for name, sae in engine.saes.items()}
    with (
        start(settings.model, sae=(str(settings.out),), device=settings.device, warm_up=False) as server,
        grpc.insecure_channel(server.target, options=_OPTIONS) as channel,
    ):
        stub = FeatureServiceStub(channel)
        for caption, seed in list(zip(*held_out.drawn(0), strict=True))[:pictures]:
            for steps in {sae.bundle.steps or 1 for sae in engine.saes.values()}:
                answer = stub.ExtractFeatures(_request(caption, seed, steps))
                updates = collect_updates(engine, [caption], [seed], steps).by_block
                for found in answer.extractions[0].features:
                    sae = engine.saes[found.sae]
                    at_steps = updates[sae.bundle.hook_point][:, 0]  # [T, P, d_model]
                    runs = sae.bundle.steps is not None
                    codes = sae.encode(at_steps.transpose(0, 1).flatten(1) if runs else at_steps[found.step])
                    own = codes.of(every[found.sae].to(codes.indices.device)).cpu().numpy()
                    sent = _dense(found)
                    counted["positions"] += len(own)
                    counted["same_count"] += int(((own > 0).sum(1) == (sent > 0).sum(1)).sum())
                    counted["same_features"] += int(((own > 0) == (sent > 0)).all(1).sum())
                    largest = max(largest, float(np.abs(own - sent).max()))
    return {**counted, "largest_difference": largest}


def _request(caption: str, seed: int, steps: int) -> messages.ExtractFeaturesRequest:
    return messages.ExtractFeaturesRequest(
        run=run_pb2.Run(
            source=run_pb2.Source(prompt=run_pb2.PromptSource(text=caption)),
            seeds=[seed],
            sampling=run_pb2.Sampling(steps=steps),
            features=run_pb2.FeatureSelection(value_type=run_pb2.VALUE_TYPE_FLOAT32),
        )
    )


def _dense(found: run_pb2.SparseFeatures) -> npt.NDArray[np.float32]:
    """Activations as a table [positions, d_sae]."""
    counts = np.frombuffer(found.counts, "<u2")
    dense = np.zeros((len(counts), found.d_sae), np.float32)
    indices = np.frombuffer(found.indices, "<u2" if found.d_sae <= 2**16 else "<u4")
    dense[np.repeat(np.arange(len(counts)), counts), indices] = np.frombuffer(found.values, "<f4")
    return dense
