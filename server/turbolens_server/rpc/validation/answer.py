"""How large an answer will be, as far as it can be known before any work."""

from __future__ import annotations

from collections.abc import Sequence

from turbolens_proto.v1 import run_pb2
from turbolens_server.engine.info import EngineInfo
from turbolens_server.engine.types import Job
from turbolens_server.rpc.transport import MAX_MESSAGE_BYTES
from turbolens_server.rpc.validation.checks import Checks
from turbolens_server.rpc.validation.selection import Selection


def check_answer(checks: Checks, jobs: Sequence[Job], selection: Selection | None, *, raw: bool, latents: bool) -> None:
    """Refuse a request whose answer would pass the largest message: streams send the same in parts.

    Args:
        checks: where what is wrong goes.
        jobs: what runs.
        selection: of the features that come back.
        raw: pictures come as pixels; the size of a coded one is not known before.
        latents: they come back; four float32 for each 64 pixels, as of most VAEs.
    """
    size = sum(
        job.height * job.width * (3 * raw + latents / 4) + features_bytes(job, selection, checks.info) for job in jobs
    )
    if size > MAX_MESSAGE_BYTES:
        told = f"the answer would have about {size / 2**20:.0f} MiB, a message holds {MAX_MESSAGE_BYTES // 2**20}"
        checks.wrong("run", f"{told}; ask for fewer seeds or features at once, or for the same by a stream")


def features_bytes(job: Job, selection: Selection | None, info: EngineInfo) -> int:
    """About what the features of one picture take in a message; where an SAE has no bound, as measured."""
    if selection is None:
        return 0
    total = 0.0
    points = {point.name: point for point in info.hook_points}
    ks = {options.sae: options.k for options in job.sae_options}
    for name in selection.saes:
        bundle = info.saes[name].bundle
        rows, columns = points[info.saes[name].hook_point].grid(job.height, job.width)
        active = float(ks.get(name) or bundle.k or 0)
        if bundle.measured is not None and (selection.only is not None or not active):
            frequency = bundle.measured.frequency
            active = float(frequency.sum() if selection.only is None else frequency[list(selection.only[name])].sum())
        elif selection.only is not None:
            active = 0.0  # how often a feature is active is not known
        entry = (2 if bundle.d_sae <= 2**16 else 4) + (2 if selection.value_type == run_pb2.VALUE_TYPE_FLOAT16 else 4)
        runs = 1 if bundle.steps is not None else job.steps
        total += runs * rows * columns * (2 + entry * active)
    return int(total)
