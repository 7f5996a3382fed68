"""The in-process server and its logs."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import structlog
from fake_engine import FakeEngine

from tests import messages
from turbolens_proto.v1 import generation_service_pb2_grpc
from turbolens_server import embedded
from turbolens_server.loading.errors import LoadError
from turbolens_server.logs import configure_logging, get_logger


@pytest.fixture
def loads(monkeypatch):
    """What was asked to be loaded."""
    asked = []

    def load(config):
        asked.append(config)
        return FakeEngine()

    monkeypatch.setattr(embedded, "load_from", load)
    return asked


def test_it_serves_on_a_private_socket_until_it_is_closed(loads):
    with embedded.start("fake", max_seeds=2) as running:
        folder = Path(running.target.removeprefix("unix:")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with grpc.insecure_channel(running.target) as channel:
            stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
            assert stub.Generate(messages.generate(prompt="x", seeds=[1])).generations[0].seed == 1
    assert (loads[0].model, loads[0].max_seeds) == ("fake", 2)
    assert not folder.exists()
    running.close()


def test_one_that_nobody_closes_leaves_no_folder_behind(tmp_path):
    code = """
from fake_engine import FakeEngine
from turbolens_server import embedded

embedded.load_from = lambda config: FakeEngine()
server = embedded.start("fake")
print(server.target)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    folder = Path(done.stdout.strip().removeprefix("unix:")).parent
    assert folder.parent == tmp_path
    assert not folder.exists()


def test_what_cannot_be_loaded_is_told(monkeypatch):
    def fail(config):
        raise LoadError("no such model")

    monkeypatch.setattr(embedded, "load_from", fail)
    with pytest.raises(LoadError, match="no such model"):
        embedded.start("nowhere")


@pytest.fixture
def _logger_restored():
    logger = logging.getLogger("turbolens")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate, logger.level = before
    logger.manager._clear_cache()


@pytest.mark.usefixtures("_logger_restored")
def test_logs_are_json_lines_above_their_level(capsys):
    configure_logging("auto", "warning")
    log = get_logger().bind(request_id="r")
    log.info("unseen")
    log.warning("seen", code="OK")
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert (told["event"], told["level"], told["request_id"], told["code"]) == ("seen", "warning", "r", "OK")
    assert told["timestamp"].endswith("Z")


def test_the_hosts_logging_is_left_alone(loads):
    def state():
        loggers = [logging.getLogger(), logging.getLogger("turbolens")]
        return [(list(one.handlers), one.level, one.propagate) for one in loggers], structlog.get_config()

    before = state()
    with embedded.start("fake"):
        assert state() == before
    with pytest.raises(TypeError, match="getLogger"):
        embedded.start("fake", log_level="info")
