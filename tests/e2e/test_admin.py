"""SAEs that are loaded, unloaded and read again while a server serves, on the embedded model."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import socket
import weakref

import grpc
import pytest

import turbolens as tl
from tests import messages
from turbolens.cli import main
from turbolens_proto.v1 import admin_service_pb2 as pb
from turbolens_proto.v1 import admin_service_pb2_grpc, generation_service_pb2_grpc
from turbolens_server.config import ConfigError, ServerConfig
from turbolens_server.embedded import start
from turbolens_server.engine.engine import Engine
from turbolens_server.loading.hub import embedded_saes
from turbolens_server.rpc.tokens import make_token

PROMPT = "a big red star on the left, night background"
OPTIONS = {"seed": 7, "steps": 1, "format": "raw"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A folder of one SAE."""
    folder = tmp_path_factory.mktemp("saes") / "up.0.1"
    return shutil.copytree(next(embedded_saes().glob("**/up.0.1")), folder)


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def served(bundle, port):
    # A long grace: on a slow machine less work may wait than is asked for here.
    with start(sae=(str(bundle),), admin_port=port, grace_s=600) as server:
        yield server


@pytest.fixture
def both(served, port):
    """A connection to the service and one to its admin port; the SAE that it started with is there again after."""
    with tl.connect(served.target) as lens, tl.connect(f"127.0.0.1:{port}") as admin:
        yield lens, admin
        for sae in admin.model().saes:
            if sae.name != "up.0.1":
                admin.unload_sae(sae.name)


def test_an_sae_is_loaded_read_steered_by_and_unloaded(both, bundle):
    lens, admin = both
    assert [sae.name for sae in admin.load_saes(f"other@up.0.1={bundle}")] == ["up.0.1", "other"]
    assert [sae.name for sae in admin.model().saes] == ["up.0.1", "other"]
    both_read = lens.extract(PROMPT, seed=7, saes=["up.0.1", "other"])
    assert both_read["other"].top(3)[0].ref.index == both_read["up.0.1"].top(3)[0].ref.index
    feature = both_read["up.0.1"].top(1)[0].ref.index
    pictures = [lens.generate(PROMPT, **OPTIONS, steer=[tl.add(f"{sae}/{feature}", 4)]) for sae in ("up.0.1", "other")]
    assert pictures[0].bytes == pictures[1].bytes != lens.generate(PROMPT, **OPTIONS).bytes
    assert lens.search_features("red", block="other")
    assert [sae.name for sae in admin.unload_sae("other")] == ["up.0.1"]
    with pytest.raises(tl.InvalidRequest, match=r"this server has up\.0\.1"):
        lens.extract(PROMPT, seed=7, saes=["other"])


def test_reading_again_takes_what_is_there_now(both, bundle):
    lens, admin = both
    before = lens.model().saes[0]
    file = bundle / "provenance.json"
    old = file.read_text()
    file.write_text(json.dumps({**json.loads(old), "note": "read again"}))
    try:
        (after,) = admin.reload_sae("up.0.1")
    finally:
        file.write_text(old)
    assert after.hash == before.hash
    assert after.provenance["note"] == "read again"
    with tl.connect(lens._target) as another:
        assert another.model().saes[0].provenance["note"] == "read again"
    assert lens.generate(PROMPT, **OPTIONS, features=["up.0.1"]).features["up.0.1"]


def test_what_cannot_be_served_is_refused_and_what_was_goes_on(both, bundle, tmp_path):
    lens, admin = both
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "sae_weights.safetensors").write_bytes(b"no weights")
    for source, why in (
        (str(bundle), "two SAEs are called up.0.1"),
        (str(broken), "broken"),
        (str(tmp_path / "nowhere"), "nowhere"),
        (f"x@no.such.block={bundle}", "no block no.such.block"),
        (f"x@down.0.0={bundle}", "x"),
    ):
        with pytest.raises(tl.InvalidRequest, match=why) as caught:
            admin.load_saes(source)
        assert caught.value.reason == "SAE_NOT_SERVED"
    for call in (admin.unload_sae, admin.reload_sae):
        with pytest.raises(tl.NotFound, match=r"up\.0\.1"):
            call("nobody")
    assert [sae.name for sae in admin.model().saes] == ["up.0.1"]
    assert lens.extract(PROMPT, seed=7, saes=["up.0.1"])


async def test_requests_in_flight_keep_theirs_and_an_unloaded_sae_leaves_nothing(served, port, bundle):
    async with (
        grpc.aio.insecure_channel(served.target) as channel,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as other,
    ):
        admin = admin_service_pb2_grpc.AdminServiceStub(other)
        await admin.LoadSaes(pb.LoadSaesRequest(source=f"short@up.0.1={bundle}"))
        engine = served._serving._readiness.ready.engine
        gone = weakref.ref(engine.saes["short"])
        del engine
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        request = messages.generate(prompt=PROMPT, seeds=range(8), sampling={"steps": 4}, features={"saes": ["short"]})
        # One runs and two wait: none has been answered when their SAE goes.
        calls = [asyncio.ensure_future(stub.Generate(request)) for _ in range(3)]
        await asyncio.sleep(0.3)
        await admin.UnloadSae(pb.UnloadSaeRequest(name="short"))
        assert not all(call.done() for call in calls)
        late = asyncio.ensure_future(stub.Generate(request))
        for answer in await asyncio.gather(*calls):
            assert {chunk.sae for made in answer.generations for chunk in made.features} == {"short"}
            assert answer.provenance.sae_hashes.keys() == {"short"}
        with pytest.raises(grpc.aio.AioRpcError, match=r"this server has up\.0\.1"):
            await late
    for _ in range(50):
        gc.collect()
        if gone() is None:
            return
        await asyncio.sleep(0.1)
    pytest.fail("an unloaded SAE is still held")


def test_the_port_needs_a_token_of_the_scope_and_answers_nothing_else(tmp_path, bundle, engine, monkeypatch):
    monkeypatch.setattr("turbolens_server.embedded.load_from", lambda config: engine)
    tokens = {name: make_token() for name in ("painter", "operator")}
    file, scopes = tmp_path / "tokens.toml", {"painter": '["generate", "extract"]', "operator": '["admin"]'}
    file.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = {scopes[name]}\n'
            for name, (_, digest) in tokens.items()
        )
    )
    port = free_port()
    with start(tokens=str(file), admin_port=port, warm_up=False):
        target = f"127.0.0.1:{port}"
        with tl.connect(target) as nobody, pytest.raises(tl.Unauthenticated):
            nobody.load_saes(str(bundle))
        with (
            tl.connect(target, token=tokens["painter"][0]) as painter,
            pytest.raises(tl.PermissionDenied, match="admin"),
        ):
            painter.unload_sae("up.0.1")
        with tl.connect(target, token=tokens["operator"][0]) as operator:
            assert "up.0.1" not in {sae.name for sae in operator.unload_sae("up.0.1")}
            with pytest.raises(tl.Unimplemented):
                operator.generate("x")
    assert "up.0.1" in engine.info.saes  # nothing is changed in place


def test_for_others_than_this_machine_the_port_needs_tokens():
    with pytest.raises(ConfigError, match="give tokens"):
        ServerConfig(host="0.0.0.0", admin_port=1)
    ServerConfig(host="0.0.0.0", admin_port=1, tokens="a-file")
    ServerConfig(admin_port=1)


def test_by_command(served, port, bundle, capsys):
    def admin(*arguments: str) -> list[str]:
        main(["admin", *arguments, "--server", f"127.0.0.1:{port}", "--json"])
        return [row["name"] for row in json.loads(capsys.readouterr().out)]

    assert admin("load", f"again@up.0.1={bundle}") == ["up.0.1", "again"]
    assert admin("reload", "again") == ["up.0.1", "again"]
    assert admin("unload", "again") == ["up.0.1"]
    assert admin("list") == ["up.0.1"]
    with pytest.raises(SystemExit) as ended:
        main(["admin", "unload", "again", "--server", f"127.0.0.1:{port}"])
    assert ended.value.code == 2


def test_an_engine_with_other_saes_shares_the_model_and_changes_nothing(engine):
    kept = [sae for sae in engine.info.saes.values() if sae.name != "up.0.1"]
    other = engine.serving(kept, engine.info.memory)
    assert isinstance(other, Engine)
    assert other.components is engine.components
    assert all(other.saes[sae.name] is engine.saes[sae.name] for sae in kept)
    assert "up.0.1" in engine.saes
    assert "up.0.1" not in other.saes
