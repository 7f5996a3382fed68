"""What docs/security.md and docs/reliability.md say, held against the code; and promises that have no other home."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import grpc
import pytest
from certificates import make_ca, sign
from google.rpc import status_pb2

from tests import messages
from turbolens_proto.v1 import model_service_pb2 as ms
from turbolens_server.engine.types import NotFinite
from turbolens_server.logs import configure_logging, get_logger, through_ours
from turbolens_server.rpc import convert, errors
from turbolens_server.rpc.check_pool import CheckPool
from turbolens_server.rpc.errors import RpcError, Violation

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "docs" / name for name in ("reliability.md", "security.md")]
RPC = ROOT / "server" / "turbolens_server" / "rpc"
REASON = re.compile(r"[A-Z][A-Z0-9_]{5,}")


def reasons() -> set[str]:
    """Every reason in the code: the text that an `RpcError`, or what makes one, is given."""
    found = set()
    for file in RPC.glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            given = []
            if isinstance(node, ast.Call):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                given = given if name in ("RpcError", "__init__", "overloaded", "no_token") else []
            elif isinstance(node, ast.FunctionDef) and any(one.arg == "reason" for one in node.args.args):
                given = node.args.defaults
            texts = {one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            found |= {text for text in texts if REASON.fullmatch(text)}
    return found


def rows(page: Path, columns: int) -> list[list[str]]:
    """The cells of the page's tables of so many columns, without heads."""
    cells = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in row]
        for row in cells
        if len(row) == columns and "::test_" in row[-1]
    ]  # fmt: skip


def test_every_refusal_of_the_code_is_in_the_table_and_none_else():
    table = {row[2].strip("`") for row in rows(PAGES[0], 5)}
    found = reasons()
    assert len(found) > 15
    assert table == found


MADE_OF = {str: "x", int: 1, float: 1.0, NotFinite: NotFinite(0, "VAE"), Sequence[Violation]: [Violation("f", "d")]}


def refusals() -> dict[str, tuple[str, set[str]]]:
    """Of each reason, gRPC's code and the kinds of detail that come with it, beside the info that all have."""
    made = [errors.overloaded("x", 1.0, reason) for reason in ("SHARE_FULL", "MEMORY_FULL", "CHECKS_FULL")]
    made.append(errors.no_token("x", "TOKEN_UNKNOWN"))
    for make in vars(errors).values():
        if inspect.isfunction(make) and make.__module__ == errors.__name__:
            types = get_type_hints(make)
            if types.pop("return") is RpcError:
                required = [one for one in inspect.signature(make).parameters.values() if one.default is one.empty]
                made.append(make(*(MADE_OF[types[one.name]] for one in required)))
    made.append(errors.Stalled(1.0, 1))
    for file in set(RPC.glob("**/*.py")) - {RPC / "errors.py"}:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RpcError" and len(node.args) == 3:
                code, _, reason = node.args
                if isinstance(code, ast.Attribute) and isinstance(reason, ast.Constant):
                    made.append(RpcError(getattr(grpc.StatusCode, code.attr), "x", reason.value))
    found = {}
    for error in made:
        trailing = dict(error.trailing_metadata("id"))
        kinds = {one.TypeName() for one in status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details}
        assert "google.rpc.ErrorInfo" in kinds
        assert ("google.rpc.RetryInfo" in kinds) == ("grpc-retry-pushback-ms" in trailing)
        found[error.reason] = error.code.name, {kind.rpartition(".")[2] for kind in kinds} - {"ErrorInfo"}
    return found


def test_the_table_says_of_every_refusal_which_code_and_details_it_has():
    told = {}
    for _, code, reason, details, _ in rows(PAGES[0], 5):
        told[reason.strip("`")] = code.strip("`"), set(re.findall(r"`(BadRequest|RetryInfo|QuotaFailure)`", details))
    assert told == refusals()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_is_there(page):
    named = set(re.findall(r"`(test_\w+)::(test_\w+)`", page.read_text()))
    assert len(named) > 10
    for file, test in sorted(named):
        sources = [path.read_text() for path in (ROOT / "tests").glob(f"**/{file}.py")]
        assert any(f"def {test}(" in source for source in sources), f"{file}::{test}"


def test_every_threat_names_a_test():
    lines = [line for line in PAGES[1].read_text().splitlines() if line.startswith("|")][2:]
    assert lines
    assert all("::test_" in line for line in lines)


@pytest.mark.parametrize("bad", ['x" level="error', "a" * 129, ""])  # what gRPC itself sends at all
async def test_an_id_that_could_forge_a_line_is_replaced(running, log_lines, bad):
    await running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=[("x-request-id", "plain")])
    await running.generation.Generate(messages.generate(prompt="", seeds=[1]), metadata=[("x-request-id", bad)])
    hostile = messages.generate(prompt="", seeds=[1], request_id="a\n{}")
    with pytest.raises(grpc.aio.AioRpcError):
        await running.generation.Generate(hostile)
    told = [line["request_id"] for line in log_lines if line["event"] == "rpc"]
    assert told[0] == "plain"
    assert len(told) == 3
    # In a line of JSON a quote ends nothing; what is not printable, or long, is not there at all.
    assert all(0 < len(one) <= 128 and one.isprintable() for one in told)


@pytest.fixture
def _loggers_restored():
    ours, root = logging.getLogger("turbolens"), logging.getLogger()
    before = [(one, list(one.handlers), one.propagate, one.level) for one in (ours, root)]
    yield
    logging.captureWarnings(False)
    for one, one.handlers, one.propagate, one.level in before:
        one.manager._clear_cache()


@pytest.mark.usefixtures("_loggers_restored")
@pytest.mark.parametrize("style", ["json", "pretty"])
def test_an_unexpected_error_is_logged_without_the_values_around_it(style, capsys):
    configure_logging(style, "info")

    def fail(prompt: str) -> None:
        raise RuntimeError("boom")

    try:
        fail("my secret" + " prompt")
    except RuntimeError as error:
        get_logger().error("unexpected", exc_info=error)
    told = capsys.readouterr().err
    assert "boom" in told
    assert "my secret prompt" not in told


@pytest.mark.usefixtures("_loggers_restored")
def test_what_libraries_log_and_warn_of_is_json_too(capsys):
    configure_logging("json", "info")
    logging.getLogger("some.library").warning("of %s", "a library")
    logging.getLogger("some.library").info("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["level"], first["logger"]) == ("of a library", "warning", "some.library")
    assert "soon gone" in second["event"]


@pytest.mark.usefixtures("_loggers_restored")
def test_who_listens_to_our_events_hears_no_librarys():
    configure_logging("json", "info")
    heard = logging.NullHandler()
    logging.getLogger("turbolens").addHandler(heard)
    assert heard not in logging.getLogger().handlers


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.usefixtures("_loggers_restored")
def test_libraries_that_print_for_themselves_do_so_as_json(library, capsys, monkeypatch):
    named = logging.getLogger(library)
    monkeypatch.setattr(named, "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(named, "propagate", False)
    configure_logging("json", "info")
    through_ours()
    logging.getLogger(f"{library}.part").warning("a word of advice")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "a word of advice"


@pytest.mark.parametrize(
    ("place", "told"),
    [("/home/op/models/xl", "xl"), ("./xl", "xl"), ("~/m/xl", "xl"), ("mini", "mini"), ("stabilityai/sdxl-turbo",) * 2],
)
def test_callers_are_not_told_where_an_operator_keeps_things(place, told):
    assert convert._name_of(place) == told
    provenance = {"prompts": ["/data/secret/captions.parquet"], "steps": 3, "share": 1 / 2, "a": {"b": "50/50"}}
    assert convert._without_places(provenance) == {**provenance, "prompts": ["captions.parquet"]}


BUF = shutil.which("buf") or shutil.which("buf", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(BUF is None, reason="needs buf")
async def test_buf_curl_lists_and_calls(running, tmp_path):
    base = f"http://{running.address}"

    async def curl(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip
        out, error = await process.communicate()
        assert process.returncode == 0, error.decode()
        return out.decode()

    assert "turbolens.v1.GenerationService" in await curl("--list-services", base)
    model = json.loads(await curl(f"{base}/turbolens.v1.ModelService/GetModel"))
    assert model["model"]["name"] == (await running.models.GetModel(ms.GetModelRequest())).model.name


_AUDITED = """
import os, sys
looked_up = []
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        looked_up.append(str(arguments[0]))
        print("LOOKED UP", arguments[0], file=sys.stderr, flush=True)
sys.addaudithook(hook)
sys.argv = ["turbolens", "serve", "--port", "0", "--log-format", "json", *sys.argv[1:]]
from turbolens_command import main
main()
import gc
print("LEFT TO COLLECT", len(gc.get_objects()), gc.get_freeze_count(), file=sys.stderr)
"""


def test_a_server_looks_nobody_up_leaves_nothing_at_home_and_nothing_to_long_collections(tmp_path):
    certificate, key = sign(make_ca(tmp_path), tmp_path, "server")
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ORT_", "XDG_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", _AUDITED, "--tls-cert", certificate, "--tls-key", key],
        stderr=subprocess.PIPE, text=True, env={**environment, "HOME": str(home)},
    )  # fmt: skip
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"event": "ready"' in line:
                break
        else:
            pytest.fail("".join(lines))
        variables = Path(f"/proc/{process.pid}/maps")
        if variables.exists():
            libraries = variables.read_text()
            assert "libonnxruntime" not in libraries or not any(home.rglob("*"))
        port = json.loads(next(line for line in lines if '"listening"' in line))["address"].rpartition(":")[2]
        for hostile in (b"GET / HTTP/1.1\r\n\r\n", b'\n{"event": "forged"}\n'):  # neither of them TLS
            with socket.create_connection(("127.0.0.1", int(port))) as caller:
                caller.sendall(hostile)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    (counts,) = re.findall(r"LEFT TO COLLECT (\d+) (\d+)", rest)
    assert 10 * int(counts[0]) < int(counts[1])  # a full collection of all that is loaded would hold the event loop
    looked_up = [line.split()[-1] for line in [*lines, *rest.splitlines()] if line.startswith("LOOKED UP")]
    assert {host for host in looked_up if host not in ("127.0.0.1", "localhost")} == set()
    told = [json.loads(line) for line in [*lines, *rest.splitlines()] if not line.startswith(("LOOKED UP", "LEFT TO"))]
    assert {"listening", "ready", "stopped"} <= {line["event"] for line in told}
    assert "forged" not in {line["event"] for line in told}
    assert [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()] == []


async def test_checks_are_bounded():
    pool, gate = CheckPool(), threading.Event()
    waiting = [asyncio.create_task(pool.run(gate.wait)) for _ in range(64)]
    await asyncio.sleep(0)
    with pytest.raises(RpcError) as caught:
        await pool.run(gate.wait)
    assert (caught.value.reason, caught.value.retry_after_s) == ("CHECKS_FULL", 1.0)
    gate.set()
    await asyncio.gather(*waiting)
    assert await pool.run(lambda: 3) == 3
    pool.close()


async def test_a_check_whose_caller_left_is_not_begun():
    pool, gate = CheckPool(), threading.Event()
    busy = [asyncio.create_task(pool.run(gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    begun = []
    leaving = asyncio.create_task(pool.run(begun.append, 1))
    await asyncio.sleep(0.05)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.set()
    await asyncio.gather(*busy)
    await pool.run(time.sleep, 0)
    assert begun == []
    pool.close()
