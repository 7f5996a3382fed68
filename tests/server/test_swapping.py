"""A server on a CPU is ready at once, and goes on by compiled code: between two batches, with nothing lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from turbolens_proto.v1 import model_service_pb2, model_service_pb2_grpc
from turbolens_server.config import ServerConfig
from turbolens_server.engine.types import Job
from turbolens_server.loading.compiled import Shape
from turbolens_server.loading.load import load_engine
from turbolens_server.rpc.queue import Queue, QueueLimits
from turbolens_server.serving import Serving, load_and_serve
from turbolens_server.swapping import Start, start_compiled, swap_when_compiled
from turbolens_server.unet.artifacts import ArtifactCache
from turbolens_server.unet.torch_unet import TorchUNet


@pytest.fixture(scope="module")
def settings(small_model, tmp_path_factory):
    """Of a server whose cache is empty."""
    folder, saes = small_model
    cache = tmp_path_factory.mktemp("cache")
    return ServerConfig(model=str(folder), sae=(str(saes),), cache=str(cache), warm_up=False)


@pytest.fixture(scope="module")
def filled(settings, graph_cache):
    """Of one whose cache has its compiled code, which takes minutes to make."""
    load_engine(model=settings.model, saes=list(settings.sae), backend="torch-compile", cache=graph_cache)
    return dataclasses.replace(settings, cache=str(graph_cache))


def eager(settings):
    return load_engine(model=settings.model, saes=list(settings.sae))


def jobs_of(engine, seed: int) -> list[Job]:
    return [Job("a star", seed, 2, *engine.info.default_size, saes=tuple(engine.info.saes))]


class Compiled(TorchUNet):
    """Stands in for compiled code, which takes minutes to make: other work to the same end."""

    def __init__(self, unet) -> None:
        super().__init__(unet, name="torch-compile")

    def predict(self, sample, timestep, conditions, tap):
        return super().predict(sample, timestep, conditions, tap) * (1 + 1e-6)


async def change_over(engine, settings) -> list[str]:
    """What ran each of the pictures that callers ask for while the server changes over, in order."""
    queue = Queue(engine, QueueLimits(max_batch=4))
    swap = asyncio.create_task(swap_when_compiled(engine, queue, settings))
    made, rounds_after = [], 0
    while rounds_after < 2:
        rounds_after += swap.done()
        seeds = range(3 * len(made), 3 * len(made) + 3)
        made.append(await asyncio.gather(*(queue.run(jobs_of(engine, seed)) for seed in seeds)))
    await swap
    await queue.close()
    for number, several in enumerate(made[:1] + made[-1:]):
        for place, (result,) in enumerate(several):
            seed = place if number == 0 else 3 * (len(made) - 1) + place
            (expected,) = eager(settings).run(jobs_of(engine, seed)) if place == 0 else (result,)
            assert np.abs(expected.picture.astype(int) - result.picture).max() <= 2
    return [result.backend for several in made for (result,) in several]


async def test_a_server_changes_over_under_load_and_loses_nothing(settings, monkeypatch):
    engine = eager(settings)
    assert start_compiled(engine, settings) is Start.UNTIL_COMPILED
    assert engine.info.backend == "torch"
    assert "compiled in the background" in engine.info.backend_reason

    async def compile_soon(_: ServerConfig) -> None:
        await asyncio.sleep(0.5)

    def found(engine, cache, reason):
        return dataclasses.replace(engine.running, unet=Compiled(engine.components.unet), reason=reason)

    monkeypatch.setattr("turbolens_server.swapping._compile", compile_soon)
    monkeypatch.setattr("turbolens_server.swapping.find_compiled", found)
    by = await change_over(engine, settings)
    assert by[0] == "torch"
    assert by[-1] == "torch-compile"
    assert by == sorted(by)  # once, and for good
    assert engine.info.backend == "torch-compile"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_process_compiles_and_a_server_changes_over(filled):
    engine = eager(filled)
    start_compiled(engine, dataclasses.replace(filled, cache="/nowhere"))
    by = await change_over(engine, filled)
    assert {by[0], by[-1]} == {"torch", "torch-compile"}
    assert by == sorted(by)


def test_a_batch_is_made_by_one_backend_from_its_first_step_to_its_picture(settings):
    engine = eager(settings)
    denoised = engine.denoise(jobs_of(engine, 1))
    engine.use(dataclasses.replace(engine.running, unet=Compiled(engine.components.unet), decoder=None))
    (result,) = engine.decode(denoised)
    assert result.backend == "torch"
    assert result.picture is not None


async def test_what_fails_to_compile_is_told_and_nothing_changes(settings, monkeypatch):
    async def fails(_: ServerConfig) -> str:
        return "no room"

    monkeypatch.setattr("turbolens_server.swapping._compile", fails)
    engine = eager(settings)
    start_compiled(engine, settings)
    await swap_when_compiled(engine, None, settings)
    assert (engine.info.backend, "no room" in engine.info.backend_reason) == ("torch", True)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_next_start_is_compiled_from_its_first_picture_and_says_so(filled):
    serving = Serving(filled)
    port = await serving.start("127.0.0.1:0")
    try:
        await load_and_serve(serving, filled)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            model = (await stub.GetModel(model_service_pb2.GetModelRequest())).model
        assert (model.backend, model.backend_reason[:15]) == ("torch-compile", "auto: compiled ")
    finally:
        await serving.stop(0)


def test_torch_is_pinned_by_its_name(settings):
    engine = load_engine(model=settings.model, saes=list(settings.sae), backend="torch")
    assert start_compiled(engine, dataclasses.replace(settings, backend="torch")) is Start.SETTLED
    assert (engine.info.backend, engine.info.backend_reason) == ("torch", "asked for: torch")


async def test_without_a_compiler_it_stays_and_says_why(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = eager(settings)
    assert start_compiled(engine, dataclasses.replace(settings, cache=str(tmp_path))) is Start.SETTLED
    assert "no C++ compiler (no-such-compiler)" in engine.info.backend_reason
    assert engine.info.backend == "torch"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_damaged_entry_is_set_aside(filled, tmp_path):
    shutil.copytree(Path(filled.cache) / "packages", tmp_path / "packages")
    mine = dataclasses.replace(filled, cache=str(tmp_path))
    engine = eager(mine)
    start_compiled(engine, mine)
    assert engine.info.backend == "torch-compile"
    for file in (tmp_path / "packages").glob("*/decoder/**/*.so"):
        whole = file.read_bytes()
        file.unlink()  # this process has it mapped: what is written into it would change under the code that runs
        file.write_bytes(whole[:-1])
    engine = eager(mine)
    start_compiled(engine, mine)
    assert engine.info.backend == "torch"
    assert not [folder for folder in (tmp_path / "packages").iterdir() if not folder.name.startswith(".")]


def test_an_entry_that_is_no_code_is_set_aside(settings, tmp_path):
    mine = dataclasses.replace(settings, cache=str(tmp_path))
    engine = eager(mine)
    cache = ArtifactCache(tmp_path)
    entry = cache.add("packages", Shape.of(engine).key, lambda folder: {"made": (folder / "x").write_text("x")})
    start_compiled(engine, mine)
    assert engine.info.backend == "torch"
    assert not entry.folder.exists()


def test_what_compiles_ends_with_its_server(settings, tmp_path):
    command = [sys.executable, "-m", "turbolens_server.compile_worker"]
    told = json.dumps(dataclasses.asdict(dataclasses.replace(settings, cache=str(tmp_path)))) + "\n"
    done = subprocess.run(command, input=told, text=True, timeout=60, capture_output=True, check=False)
    assert done.returncode == 1
    assert not list(tmp_path.glob("packages/[!.]*"))
