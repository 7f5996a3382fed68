"""What is wrong with where a server is to look and listen is said at once, before anything heavy is imported."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from turbolens_server.config import ServerConfig
from turbolens_server.loading.places import problems


def test_everything_that_is_not_there_is_told_together(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = problems(
            ServerConfig(
                model="/no/model", vae="./no-vae", sae=("up.0.1=/no/sae", "a@mid.0=~/no", str(tmp_path), "owner/sae"),
                lora=("/no/lora=0.5", "owner/lora"), port=port, model_config="./no-config",
                tls_cert="/no/cert", tls_key=__file__, tokens="/no/tokens",
            )
        )  # fmt: skip
    assert [line.split(":")[0] for line in found] == [
        "--model /no/model", "--sae /no/sae", "--sae ~/no", "--vae ./no-vae", "--model-config ./no-config",
        "--lora /no/lora", "--tls-cert /no/cert", "--tokens /no/tokens",
        "cannot listen on 127.0.0.1",
    ]  # fmt: skip
    assert f"{port}: Address already in use" in found[-1]


@pytest.mark.parametrize("model", ["mini", "random:sdxl-turbo", "stabilityai/sdxl-turbo"])
def test_names_that_need_no_folder_are_left_to_loading(model):
    assert problems(ServerConfig(model=model, port=0)) == []


def test_a_host_that_is_nobodys_is_told():
    assert "cannot listen on 203.0.113.1:50051" in problems(ServerConfig(host="203.0.113.1"))[0]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (
            ["--model", "/no/model", "--sae", "/no/sae"],
            1,
            ["--model /no/model: no such folder", "--sae /no/sae: no such"],
        ),
        (["--config", "/no/file.toml"], 2, ["--config /no/file.toml"]),
        (
            ["--max-steps", "0", "--port", "99999", "--tls-cert", "cert.pem", "--model", "/no/model"],
            2,
            ["max_steps is 0", "port is 99999", "tls_cert and tls_key", "--model /no/model", "--tls-cert cert.pem: no"],
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused_without_torch(argv, code, says):
    run = "import sys; from turbolens_server import app\ntry: app.main(sys.argv[1:])"
    program = f"{run}\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == code
    assert len(lines) == len(says)
    assert all(line.startswith("turbolens serve: ") and said in line for line, said in zip(lines, says, strict=True))
