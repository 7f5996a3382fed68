"""Settings: flags over environment over file over defaults."""

from __future__ import annotations

import pytest

from turbolens_server.config import ConfigError, ServerConfig, read_config


def test_precedence(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_steps = 2\nmodel = "from-file"\nsae = ["a", "b"]\n')
    environment = {"TURBOLENS_PORT": "2", "TURBOLENS_MAX_STEPS": "3", "OTHER": "x"}
    config = read_config(["--config", str(file), "--port", "4"], environment)
    assert (config.port, config.max_steps, config.model, config.sae) == (4, 3, "from-file", ("a", "b"))
    assert read_config([f"--config={file}"], {}).port == 1
    assert read_config([], {}) == ServerConfig()
    assert read_config([], {"TURBOLENS_SAE": "a, b", "TURBOLENS_REFLECTION": "false"}).sae == ("a", "b")


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("prt = 1", {}, "no setting prt"),
        ("port = ", {}, "--config"),
        ("", {"TURBOLENS_PORT": "many"}, "TURBOLENS_PORT"),
        ("", {"TURBOLENS_REFLECTION": "perhaps"}, "true or false"),
        ("port = 70000", {}, "65535"),
        ("max_steps = 0", {}, "max_steps"),
        ("threads = -1", {}, "threads is -1; it must be at least 0"),
        ("grace_s = nan", {}, "grace_s"),
        ("max_batch = 0", {}, "max_batch"),
        ("max_queue_pictures = 15", {}, "at least 16"),
        ('port = "80"', {}, "port = '80': must be a whole number"),
        ("max_queue = true", {}, "whole number"),
        ('reflection = "no"', {}, "true or false"),
        ("model = 3", {}, "must be a text"),
        ("sae = [1]", {}, "list of texts"),
        ('log_format = "xml"', {}, "one of auto, json, pretty"),
        ("", {"TURBOLENS_LOG_LEVEL": "loud"}, "one of debug, info"),
        ("", {"TURBOLENS_PROT": "80"}, "TURBOLENS_PROT: no such setting; TURBOLENS_PORT is one"),
        ("", {"TURBOLENS_MAX_STEP": "8"}, "TURBOLENS_MAX_STEPS is one"),
    ],
)
def test_what_cannot_be_used_is_named(text, environment, says, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_config(["--config", str(file)], environment)


def test_variables_that_others_read_are_none_of_ours():
    of_the_sdk = {f"TURBOLENS_{name}": "x" for name in ("TARGET", "TOKEN", "TLS_CA")}
    of_kubernetes = {"TURBOLENS_SERVICE_PORT": "80", "TURBOLENS_SERVICE_HOST": "1", "TURBOLENS_PORT_80_TCP_PORT": "80"}
    assert read_config([], of_the_sdk | of_kubernetes | {"TURBOLENS_STUDIO_TOKEN": "x"}) == ServerConfig()


def test_all_that_cannot_be_used_is_named_together(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = "80"\nprt = 1\nmodel = 3\n')
    with pytest.raises(ConfigError) as refused:
        read_config(["--config", str(file)], {"TURBOLENS_PORT": "many", "TURBOLENS_LOG_LEVEL": "loud"})
    assert [line.removeprefix(f"--config {file}: ").split()[0] for line in refused.value.args] == [
        "no", "port", "model", "TURBOLENS_PORT='many':", "TURBOLENS_LOG_LEVEL='loud':"
    ]  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        read_config(["--max-steps", "0", "--max-queue", "0", "--timesteps", "9", "99"], {})
    assert [line.split()[0] for line in refused.value.args] == ["max_steps", "max_queue", "timesteps"]
