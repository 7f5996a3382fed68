"""Who may call, over what, and how much: TLS, callers' certificates, tokens, scopes, quotas, ports of their own."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import re
import shutil
import socket

import grpc
import pytest
from certificates import make_ca, sign
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serve import serve

from tests import messages
from turbolens_proto.v1 import generation_service_pb2_grpc, model_service_pb2_grpc
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_server.config import ConfigError, ServerConfig
from turbolens_server.rpc import tls as tls_module
from turbolens_server.rpc import tokens as tokens_module
from turbolens_server.rpc.errors import RpcError
from turbolens_server.rpc.quotas import Quota
from turbolens_server.rpc.tokens import Tokens, make_token

if shutil.which("openssl") is None:
    pytest.skip("needs the openssl command", allow_module_level=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CA, a server's pair, another CA, and a caller's pair of each."""
    folder = tmp_path_factory.mktemp("tls")
    ca, other = make_ca(folder), make_ca(folder, "other")
    return {
        "ca": ca,
        "server": sign(ca, folder, "server"),
        "caller": sign(ca, folder, "caller", "caller-seven"),
        "stranger": sign(other, folder, "stranger", "stranger"),
        "folder": folder,
    }


def settings(files, *, mutual: bool = False) -> dict[str, str]:
    certificate, key = files["server"]
    more = {"tls_client_ca": str(files["ca"])} if mutual else {}
    return {"tls_cert": str(certificate), "tls_key": str(key), **more}


def channel(running, files, caller: str | None = None) -> grpc.aio.Channel:
    pair = [file.read_bytes() for file in reversed(files[caller])] if caller else [None, None]
    credentials = grpc.ssl_channel_credentials(files["ca"].read_bytes(), *pair)
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.enable_retries", 0)]
    return grpc.aio.secure_channel(running.address, credentials, options)


async def generate(over: grpc.aio.Channel, **options):
    stub = generation_service_pb2_grpc.GenerationServiceStub(over)
    return await stub.Generate(messages.generate(prompt="", seeds=options.pop("seeds", [1])), timeout=30, **options)


async def test_with_a_certificate_the_port_speaks_tls_alone(fake, files):
    async with serve(fake, **settings(files)) as running:
        async with channel(running, files) as over:
            assert (await generate(over)).generations
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(running.channel)  # in the clear
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_a_client_ca_callers_need_a_certificate_and_are_known_by_it(fake, files, log_lines):
    async with serve(fake, **settings(files, mutual=True)) as running:
        async with channel(running, files, "caller") as over:
            assert (await generate(over)).generations
        assert [line["caller"] for line in log_lines if line["event"] == "rpc"] == ["caller-seven"]
        for caller in (None, "stranger"):
            async with channel(running, files, caller) as over:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(over)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def served_certificate(running) -> bytes:
    def ask() -> bytes:
        import ssl

        host, _, port = running.address.rpartition(":")
        return ssl.get_server_certificate((host, int(port))).encode()

    return await asyncio.to_thread(ask)


async def test_a_renewed_certificate_is_served_without_a_restart(fake, files, tmp_path, log_lines):
    pair = [shutil.copy(file, tmp_path / f"now{file.suffix}") for file in files["server"]]
    async with serve(fake, tls_cert=str(pair[0]), tls_key=str(pair[1])) as running:
        async with channel(running, files) as over:
            assert (await generate(over)).generations
            first = await served_certificate(running)
            # Half of a renewal: the certificate without its key keeps what was.
            renewed = sign(files["ca"], tmp_path, "renewed")
            shutil.copy(renewed[0], pair[0])
            assert await served_certificate(running) == first
            assert [line["event"] for line in log_lines if "certificate" in line["event"]] == ["certificate kept"]
            shutil.copy(renewed[1], pair[1])
            assert (await served_certificate(running)).split() == renewed[0].read_bytes().split()
            assert (await generate(over)).generations  # a connection that was there goes on
        async with channel(running, files) as over:
            assert (await generate(over)).generations


def test_files_that_do_not_belong_together_fail_the_start(files):
    pair = tls_module.TlsFiles(files["server"][0], files["caller"][1])
    with pytest.raises(ConfigError, match="tls_cert, tls_key"):
        tls_module.server_credentials(pair)
    for wrong in ({"tls_cert": "x"}, {"tls_key": "x"}, {"tls_client_ca": "x"}):
        with pytest.raises(ConfigError, match="tls_"):
            ServerConfig(**wrong)


# Tokens


@pytest.fixture
def tokens(tmp_path):
    """A file of tokens, and the tokens by name."""
    given, text = {}, ""
    for name, more in (
        ("all", ""),
        ("reader", "scopes = []"),
        ("extractor", 'scopes = ["extract"]'),
        ("limited", "pictures_per_minute = 4\npictures_in_flight = 3"),
    ):
        given[name], digest = make_token()
        text += f'[[token]]\nname = "{name}"\nsha256 = "{digest}"\n{more}\n'
    (tmp_path / "tokens").write_text(text)
    return tmp_path / "tokens", given


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


def reason_of(error: grpc.aio.AioRpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert any(detail.Unpack(info) for detail in status.details)
    return info.reason


async def test_a_call_without_a_token_that_is_known_is_refused_before_it_is_read(fake, tokens, log_lines):
    path, _ = tokens
    async with serve(fake, tokens=str(path)) as running:
        for metadata, reason in (
            ([], "TOKEN_MISSING"),
            ([("authorization", "Basic x")], "TOKEN_MISSING"),
            (bearer("wrong"), "TOKEN_UNKNOWN"),
        ):
            raw = running.channel.unary_unary("/turbolens.v1.GenerationService/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(b"\xff not even a message", metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert reason_of(caught.value) == reason
        assert not fake.batches
        health = health_pb2_grpc.HealthStub(running.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status  # probes need none
    assert "wrong" not in str(log_lines)


async def test_a_token_may_do_what_its_scopes_say(fake, tokens, log_lines):
    path, given = tokens
    async with serve(fake, tokens=str(path)) as running:
        assert (await generate(running.channel, metadata=bearer(given["all"]))).generations
        models = model_service_pb2_grpc.ModelServiceStub(running.channel)
        await models.GetModel(ms.GetModelRequest(), metadata=bearer(given["reader"]))
        await running.features.ExtractFeatures(messages.extract(prompt=""), metadata=bearer(given["extractor"]))
        for name in ("reader", "extractor"):
            with pytest.raises(grpc.aio.AioRpcError, match="lacks the scope generate") as caught:
                await generate(running.channel, metadata=bearer(given[name]))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert reason_of(caught.value) == "SCOPE_MISSING"
    assert {line["caller"] for line in log_lines if line["event"] == "rpc"} == {"all", "reader", "extractor"}
    assert not any(token in str(log_lines) for token in given.values())


def test_every_method_is_said_to_be_open_or_what_it_needs():
    from turbolens_proto.v1 import admin_service_pb2, feature_service_pb2, generation_service_pb2, model_service_pb2
    from turbolens_server.rpc import callers

    files = (model_service_pb2, feature_service_pb2, generation_service_pb2, admin_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    methods = {f"{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods == callers._NEEDS.keys()
    nobody = callers.Caller("x", frozenset())
    assert callers.refused(nobody, "turbolens.v1.NewService/Forgotten").reason == "SCOPE_MISSING"


async def test_a_stream_of_requests_is_refused_in_the_same_way(fake, tokens):
    path, given = tokens
    async with serve(fake, tokens=str(path)) as running:
        for metadata, code in (
            ([], grpc.StatusCode.UNAUTHENTICATED),
            (bearer(given["reader"]), grpc.StatusCode.PERMISSION_DENIED),
        ):
            call = running.features.ExtractFeaturesBatch(iter(()), metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is code


async def test_a_quota_holds_and_says_when_more_is_there(fake, tokens):
    path, given = tokens
    mine = bearer(given["limited"])
    async with serve(fake, tokens=str(path)) as running:
        fake.gate.clear()
        running_call = asyncio.ensure_future(generate(running.channel, seeds=[1, 2], metadata=mine))
        assert await asyncio.to_thread(fake.started.wait, 30)
        with pytest.raises(grpc.aio.AioRpcError, match="2 of 3 pictures in flight") as caught:
            await generate(running.channel, seeds=[1, 2], metadata=mine)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        fake.gate.set()
        await running_call
        await generate(running.channel, seeds=[3, 4], metadata=mine)
        with pytest.raises(grpc.aio.AioRpcError, match="4 pictures a minute") as caught:
            await generate(running.channel, seeds=[5, 6], metadata=mine)
        assert 20_000 < int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) <= 30_000
        with pytest.raises(grpc.aio.AioRpcError, match="may have 3 by its quota") as caught:
            await generate(running.channel, seeds=range(4), metadata=mine)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await generate(running.channel, metadata=bearer(given["all"]))).generations  # nobody else's matter


async def test_a_call_that_a_full_server_refused_uses_no_quota_up(fake, tokens):
    path, given = tokens
    async with serve(fake, tokens=str(path), max_queue=1) as running:
        fake.gate.clear()
        others = [asyncio.ensure_future(generate(running.channel, metadata=bearer(given["all"])))]
        assert await asyncio.to_thread(fake.started.wait, 30)
        others.append(asyncio.ensure_future(generate(running.channel, metadata=bearer(given["all"]))))
        await asyncio.sleep(0.2)
        for _ in range(3):  # of two pictures each, where four are a minute's
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(running.channel, seeds=[1, 2], metadata=bearer(given["limited"]))
            assert reason_of(caught.value) == "QUEUE_FULL"
        fake.gate.set()
        await asyncio.gather(*others)
        await generate(running.channel, seeds=[1, 2], metadata=bearer(given["limited"]))


def test_a_minutes_pictures_come_back_evenly():
    now = 0.0
    quota = Quota("x", per_minute=60, clock=lambda: now)
    quota.take(60)
    now = 10.0
    quota.take(10)
    with pytest.raises(RpcError):
        quota.take(1)
    now = 1000.0
    quota.take(60)
    with pytest.raises(RpcError):
        quota.take(1)
    quota.give_back(5, used=False)
    quota.take(5)
    with pytest.raises(RpcError):
        quota.take(1)


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tokens, monkeypatch, log_lines):
    path, given = tokens
    monkeypatch.setattr(tokens_module, "_LOOK_EVERY_S", 0)
    known = Tokens(path)
    assert known.find(given["all"]).name == "all"
    before = path.read_text()
    path.write_text("this is [not TOML")
    assert known.find(given["all"]).name == "all"
    path.write_text(before.replace('"all"', '"renamed"').partition('[[token]]\nname = "reader"')[0])
    assert known.find(given["all"]).name == "renamed"
    assert known.find(given["reader"]) is None
    assert [line["event"] for line in log_lines] == ["tokens kept", "tokens read"]


GOOD = f'name = "x"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("[[token]]\nsha256 = 'x'", "name must be"),
        ('[[token]]\nname = "a\\nb"\n', "name must be"),
        ('[[token]]\nname = "x"\nsha256 = "plain text"', "64 hexadecimal digits"),
        (f"[[token]]\n{GOOD}scopes = ['fly']", "scopes of x must be a list of generate, extract, admin"),
        (f"[[token]]\n{GOOD}pictures_per_minute = 0", "must be a whole number from 1"),
        (f"[[token]]\n{GOOD}colour = 1", "no setting colour"),
        (f"[[token]]\n{GOOD}\n[[token]]\n{GOOD}", "x is there twice"),
        ("token = 1", r"\[\[token\]\]"),
    ],
)
def test_a_file_that_cannot_be_used_fails_the_start_and_says_why(entry, says, tmp_path):
    (tmp_path / "tokens").write_text(entry)
    with pytest.raises(ConfigError, match=says):
        Tokens(tmp_path / "tokens")


def test_a_token_is_made_and_shown_once(capsys, tmp_path):
    tokens_module.main(["alice"])
    shown = capsys.readouterr().out
    (token,) = re.findall(r"tl_\S{43}", shown)
    (tmp_path / "tokens").write_text(shown)
    assert Tokens(tmp_path / "tokens").find(token).name == "alice"


# Ports of their own


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_probes_and_prometheus_have_ports_of_their_own(fake, tokens, files):
    health_port, metrics_port = free_port(), free_port()
    ports = {"health_port": health_port, "metrics_port": metrics_port}
    async with serve(fake, tokens=str(tokens[0]), **settings(files), **ports) as running:
        async with channel(running, files) as over:
            await generate(over, metadata=bearer(tokens[1]["all"]))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as clear:
            request = health_pb2.HealthCheckRequest(service="turbolens.v1.GenerationService")
            answer = await health_pb2_grpc.HealthStub(clear).Check(request)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(clear)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

        def scrape() -> str:
            connection = http.client.HTTPConnection("127.0.0.1", metrics_port, timeout=5)
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

        text = await asyncio.to_thread(scrape)
    assert 'turbolens_requests_total{code="OK",method="turbolens.v1.GenerationService/Generate"} 1.0' in text
    for name in (
        "turbolens_queue_wait_seconds_bucket", "turbolens_queue_pictures", "turbolens_queue_requests",
        "turbolens_running_pictures", "turbolens_batch_size_sum", 'turbolens_stage_seconds_count{stage="unet"}',
        "turbolens_refusals", "turbolens_cancellations_total", "turbolens_undelivered_bytes",
        'turbolens_build_info{backend="fake"', "turbolens_ready 1.0", "process_resident_memory_bytes",
        'turbolens_unet_steps_total{fate="used"} 1.0',
    ):  # fmt: skip
        assert name in text


def test_the_command_prints_a_token_for_people_and_for_programs(capsys):
    tokens_module.main(["alice"])
    assert 'name = "alice"' in capsys.readouterr().out
    tokens_module.main(["alice", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert hashlib.sha256(told["token"].encode()).hexdigest() == told["sha256"]
    for wrong in (["--json"], ["two words"], ['a"b']):
        with pytest.raises(SystemExit) as ended:
            tokens_module.main(wrong)
        assert ended.value.code == 2
