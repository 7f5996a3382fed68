"""Where a server is, who calls it, and what is tried again."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from fake_server import Running, refuse
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2 as details

import turbolens as tl
from turbolens._channel import connection


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("host", "dns:///host:50051"),
        ("host:1234", "dns:///host:1234"),
        ("10.0.0.1:1", "dns:///10.0.0.1:1"),
        ("::1", "dns:///[::1]:50051"),
        ("[::1]:7", "dns:///[::1]:7"),
        ("[::1]", "dns:///[::1]:50051"),
        ("unix:/tmp/x", "unix:/tmp/x"),
        ("dns:///a.b:9", "dns:///a.b:9"),
        (["127.0.0.1:1", "127.0.0.1:2"], "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("127.0.0.1:1, 127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
    ],
)
def test_a_target_is_a_host_and_a_port_or_several(said, read):
    assert connection(said, None, (), None, {}).target == read


@pytest.mark.parametrize(
    "said", ["", " ", "a b", "host:", "host:x", "host:70000", ":1", "a:1:2:x", "host:1/path", [""], [], "http://host:1"]
)
def test_what_is_no_target_is_refused_before_anything_is_sent(said):
    with pytest.raises(ValueError, match="no target"):
        connection(said, None, (), None, {})


CA = b"""-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUA+FRkTG2QOrpmFJu2LYaRmTBSNMwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjkxMzUwNDZaGA8yMTI2MTEwNTEzNTA0
NlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPu6
FY6xkrU47/seI7Ylrtp3p2p6JtNBZRBK4u99jfdCMl061/6KshZiQoWRIkxPUfKI
kwGh+EB6cY1f98IEPlujUzBRMB0GA1UdDgQWBBQp1BAT/XF2k+hUZomcC4G91CEh
ITAfBgNVHSMEGDAWgBQp1BAT/XF2k+hUZomcC4G91CEhITAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQC8edTylt9V9uED2zGCtS+TF4WQyb1t3b5Q
lUQzwmAXngIgd1Pkx7UQQN2WDVXRzR28mmZvCbPI8hjHHKs/FNrUwxY=
-----END CERTIFICATE-----
"""


def test_what_is_left_out_comes_from_the_environment(tmp_path):
    (tmp_path / "ca.pem").write_bytes(CA)
    environment = {
        "TURBOLENS_TARGET": "far:1",
        "TURBOLENS_TOKEN": "secret",
        "TURBOLENS_TLS_CA": str(tmp_path / "ca.pem"),
    }
    to = connection(None, None, (), None, environment)
    assert (to.target, to.tls) == ("dns:///far:1", tl.TLS(CA))
    assert to.metadata() == (("authorization", "Bearer secret"),)
    assert connection(None, None, (), None, {}).target == "dns:///localhost:50051"
    assert connection("near:2", "mine", [("x", "y")], True, environment).metadata()[0][1] == "Bearer mine"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ca": "none.pem"}, r"ca .*none\.pem: No such file"),
        ({"ca": "text.pem"}, r"ca .*text\.pem: "),
        ({"certificate": "ca.pem"}, "one is missing"),
        ({"key": "ca.pem"}, "one is missing"),
        ({"certificate": "ca.pem", "key": "text.pem"}, r"certificate .*ca\.pem, key .*text\.pem: "),
    ],
)
def test_files_that_no_connection_can_come_from_are_named(files, said, tmp_path):
    (tmp_path / "ca.pem").write_bytes(CA)
    (tmp_path / "text.pem").write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"TLS: .*{said}"):
        tl.TLS.from_files(**{name: tmp_path / file for name, file in files.items()})


def test_a_token_does_not_travel_in_the_clear_unless_told_so():
    with pytest.raises(ValueError, match="in the clear"):
        connection("far:1", "secret", (), None, {})
    for target, tls in (("far:1", True), ("far:1", False), ("localhost:1", None), ("unix:/x", None)):
        assert connection(target, "secret", (), tls, {}).token == "secret"


@pytest.mark.parametrize("token", ["secret\n", " secret", "sécret", ""])
def test_a_token_that_cannot_travel_is_told(token, running):
    with pytest.raises(ValueError, match="a token is plain ASCII"):
        tl.connect(running.target, token=token)
    with tl.connect(running.target, token=lambda: token) as client, pytest.raises(ValueError, match="plain ASCII"):
        client.generate("x")


@pytest.mark.parametrize(
    "pair",
    [
        ("X-Team", "blue"),
        ("x-team", "b\nc"),
        ("x-team", "ü"),
        ("x-team", 3),
        ("x-team-bin", "b"),
        ("grpc-x", "b"),
        "xy",
    ],
)
def test_metadata_that_cannot_travel_is_told(pair, running):
    with pytest.raises(ValueError, match="metadata holds"):
        tl.connect(running.target, metadata=[pair])


def test_metadata_may_be_a_mapping(running, fake):
    with tl.connect(running.target, metadata={"x-team": "blue", "x-team-bin": b"\0"}) as client:
        client.generate("x")
    assert {("x-team", "blue"), ("x-team-bin", b"\0")} <= set(fake.metadata)


def test_every_call_brings_token_and_metadata(running, fake):
    tokens = iter(["first", "second"])
    with tl.connect(running.target, token=lambda: next(tokens), metadata=[("x-team", "blue")]) as client:
        client.generate("x")
        assert {("authorization", "Bearer first"), ("x-team", "blue")} <= set(fake.metadata)
        list(client.stream_generate("x"))
        assert ("authorization", "Bearer second") in fake.metadata


def full(seconds: float, times: int):
    """A handler that refuses so often."""
    left = [times]

    def handle(context):
        if left[0]:
            left[0] -= 1
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(seconds * 1000))
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", details.RetryInfo(retry_delay=delay))

    return handle


def ids(fake, kind) -> list[str]:
    return [request.request_id for request in fake.requests if type(request).__name__ == kind]


def test_a_full_server_is_asked_again_when_it_says_and_as_the_same_request(client, fake):
    fake.on["Generate"] = full(0.2, times=2)
    start = time.monotonic()
    assert client.generate("x", seed=3).seed == 3
    assert time.monotonic() - start >= 0.4
    attempts = ids(fake, "GenerateRequest")
    assert len(attempts) == 3
    assert len(set(attempts)) == 1


def test_a_stream_is_too_before_its_first_event(client, fake):
    fake.on["StreamGenerate"] = full(0.1, times=1)
    assert list(client.stream_generate("x", seed=3))
    assert len(set(ids(fake, "StreamGenerateRequest"))) == 1


def test_the_async_client_waits_without_holding_the_loop(running, fake):
    fake.on["Generate"] = full(0.3, times=1)

    async def call():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        task = asyncio.create_task(tick())
        async with tl.aio.connect(running.target) as client:
            await client.generate("x")
        task.cancel()
        return ticks

    assert asyncio.run(call()) > 10


@pytest.mark.parametrize("timeout", [float("nan"), 0, -1, 1e10, float("-inf")])
def test_absurd_timeouts_are_refused_by_name(running, client, timeout):
    for ask in (
        lambda: client.generate("x", timeout=timeout),
        lambda: tl.connect(running.target, timeout=timeout),
        lambda: client.wait_ready(timeout),
    ):
        with pytest.raises(ValueError, match=r"timeout is .* inf: no limit"):
            ask()


def test_no_limit_can_be_said(running, client):
    assert client.generate("x", seed=3, timeout=float("inf")).seed == 3
    for none in (None, float("inf")):
        with tl.connect(running.target, timeout=none) as patient:
            assert patient.generate("x", seed=3).seed == 3
            assert list(patient.stream_generate("x", seed=3))


def test_wait_ready_waits_for_a_server_that_loads(client, fake):
    loads = [2]

    def loading(context):
        if loads[0]:
            loads[0] -= 1
            refuse(context, grpc.StatusCode.UNAVAILABLE, "the model is loading", details.ErrorInfo(reason="LOADING"))

    fake.on["GetModel"] = loading
    assert client.wait_ready(20).name == "fake"
    loads[0] = 1  # another server in its place
    assert client.wait_ready(20).name == "fake"
    assert loads == [0]


def test_wait_ready_gives_up_in_time():
    started = time.monotonic()
    with tl.connect("127.0.0.1:9", timeout=5) as nobody, pytest.raises(tl.Unavailable):
        nobody.wait_ready(2)
    assert time.monotonic() - started < 12


def test_a_wait_past_the_timeout_gives_the_refusal_itself_and_at_once(running, fake):
    fake.on["Generate"] = full(300, times=9)
    start = time.monotonic()
    with tl.connect(running.target, timeout=60) as client, pytest.raises(tl.Overloaded, match="full"):
        client.generate("x")
    assert time.monotonic() - start < 30


def test_calls_take_turns_over_several_servers_and_survive_the_loss_of_one(running, fake):
    other = Running()
    try:
        with tl.connect([running.target, other.target], timeout=20) as client:
            for seed in range(10):
                client.generate("x", seed=seed)
            counts = [len(ids(each, "GenerateRequest")) for each in (fake, other.fake)]
            assert min(counts) >= 3
            other.close()
            for seed in range(10):
                client.generate("x", seed=seed)
    finally:
        other.close()


def test_a_closed_connection_says_so(running):
    client = tl.connect(running.target)
    client.generate("x")
    client.close()
    with pytest.raises(tl.Closed, match="is closed"):
        client.generate("x")


def test_a_connection_of_another_event_loop_says_so(running):
    client = tl.aio.connect(running.target)

    async def call() -> None:
        await client.generate("x")

    asyncio.run(call())
    with pytest.raises(tl.Closed, match="belongs to another event loop"):
        asyncio.run(call())


def test_a_server_of_another_version_is_warned_of(client, fake, monkeypatch):
    fake.versions = {"turbolens": "0.1.7"}
    monkeypatch.setattr("turbolens._retry.client_version", lambda: "9.9.0")
    with pytest.warns(UserWarning, match=r"this is turbolens 9\.9\.0 and the server is"):
        client.model()
