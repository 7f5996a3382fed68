"""What of a run is attributed."""

from __future__ import annotations

from turbolens_proto.v1 import feature_service_pb2
from turbolens_server.engine.types import Attribute, Job, attribution_values
from turbolens_server.rpc.transport import MAX_MESSAGE_BYTES
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.unet.points import is_z


def check_attribute(checks: Checks, request: feature_service_pb2.AttributeFeatureRequest, job: Job) -> Attribute:
    """The feature and the step; the run is checked before."""
    step = request.step if request.HasField("step") else job.steps - 1
    if not 0 <= step < job.steps:
        checks.bad("step", step, f"must be 0 to {job.steps - 1}")
    asked = Attribute(request.feature.sae, request.feature.index, step)
    if not checks.feature("feature", request.feature):
        return asked
    info = checks.info
    sae = info.saes[asked.sae]
    if not is_z(sae.hook_point):
        at_z = [name for name, other in info.saes.items() if is_z(other.hook_point)]
        checks.bad(
            "feature.sae", asked.sae,
            f"it sits at {sae.hook_point}, and only features at the z of an attention layer, such as up.0.1.attn2.0.z, "
            f"are sums of their sources; this server has {', '.join(at_z) or 'no SAE there'}",
        )  # fmt: skip
        return asked
    if sae.bundle.steps is not None:
        checks.bad("feature.sae", asked.sae, "its features are of whole runs, and not of one step")
    if not info.opens_attention:
        checks.wrong("feature", f"the backend {info.backend} does not show attention; serve with --backend torch")
    rows, columns = checks.points[sae.hook_point].grid(job.height, job.width)
    size = 4 * attribution_values(sae.hook_point, rows * columns, info.max_prompt_tokens * (1 + len(job.regions)))
    if size > MAX_MESSAGE_BYTES:
        told = f"the answer would have about {size / 2**20:.0f} MiB, a message holds {MAX_MESSAGE_BYTES // 2**20}"
        checks.wrong("feature", f"{told}; ask for a smaller picture")
    return asked
