"""The exported U-Net in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from turbolens_server.files import first_line
from turbolens_server.unet.backend import PREDICTION, BackendError, need

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRunner:
    """One pass of an exported graph; reads and writes the tensors' own memory."""

    def __init__(self, path: Path, device: torch.device, *, optimize: bool = True) -> None:
        """Load a graph; `optimize` lets ONNX Runtime rewrite it first.

        Raises:
            BackendError: ONNX Runtime is missing, has nothing for this device, or cannot load the graph.
        """
        ort = need("onnxruntime", "onnx")
        provider = _PROVIDERS[device.type]
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"this onnxruntime ({ort.__version__}) has no {provider}; install onnxruntime-gpu in its place, "
                "or use --device cpu"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings = {"device_id": str(device.index or 0)} if device.type == "cuda" else {}
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime has an exception type of its own for every status
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path} ({first_line(error)})") from error
        if provider not in self._session.get_providers():
            raise BackendError(f"ONNX Runtime {ort.__version__} could not start its {provider} on {device}")
        self._device = device
        self._whole = ort.RunOptions()
        self._part = ort.RunOptions()
        self._part.only_execute_path_to_fetches = True

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """See :data:`turbolens_server.unet.graph.Execute`; where no prediction is wanted, the pass ends early."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
                bind(name, tensor.device.type, tensor.device.index or 0, kind, list(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding, self._whole if PREDICTION in outputs else self._part)
        binding.synchronize_outputs()
