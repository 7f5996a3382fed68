"""Settings of `turbolens serve`: flags over environment over file over defaults."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from turbolens_server.engine.batcher import MAX_BATCH


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Serve a model and its SAEs over gRPC.

    Every setting can also come from the environment (TURBOLENS_MODEL, TURBOLENS_PORT, ...; lists separated by
    commas) or from a TOML file given by --config; a flag wins over the environment, and that over the file.

    Examples: `turbolens serve`; `turbolens serve --model stabilityai/sdxl-turbo --variant fp16 --sae ./sdxl-saes`.
    """

    model: str = "mini"
    """`mini` (ships with the package), a `diffusers` folder, a hub id of an SDXL-type model, a `.safetensors` file, or
    `random:sdxl-turbo`: that architecture with random weights, to try a machine at full size."""
    sae: tuple[str, ...] = ()
    """SAEs: a bundle, the folder of an SAE of another project, a folder of several, or a hub id each; `BLOCK=PATH` says
    where one sits whose folder does not, `NAME=PATH` or `NAME@BLOCK=PATH` what requests call it, which is how several
    of one block are served. `mini` brings its own."""
    force_sae: bool = False
    """Serve an SAE on a model that it was not trained on; every result says so."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`."""
    dtype: str = "auto"
    """`auto` (float16 on a GPU, else float32), `float32`, `float16` or `bfloat16`."""
    threads: int = 0
    """CPU threads that compute a picture; 0: as many as there are cores, or as OMP_NUM_THREADS says. Where something
    else keeps a core busy, one fewer is much faster: each operation waits for the slowest of its threads."""
    backend: Literal["auto", "torch", "torch-compile", "onnx", "tensorrt"] = "auto"
    """What runs the U-Net; all but `torch` and `torch-compile` need an extra. What is asked for runs or the start
    fails; `tensorrt` needs an engine from `turbolens engine build`."""
    cache: str = ""
    """Folder of exported graphs and TensorRT engines; empty: ~/.cache/turbolens."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""
    model_config: str | None = None
    """Where --model is one `.safetensors` file in SDXL's original layout: a `diffusers` folder or hub id of a model of
    its kind, whose configurations, scheduler and vocabularies it gets; left out: SDXL base. No weights are read."""
    vae: str | None = None
    """Another VAE, by folder, hub id or `.safetensors` file, such as a fast or a half-precision one."""
    size: int = 0
    """Edge of the pictures in pixels, which are square; 0: the model's own."""
    lora: tuple[str, ...] = ()
    """LoRAs to fuse into the model, `PATH` or `PATH=WEIGHT` each: a safetensors file in the layout of `diffusers` or of
    kohya, a folder of one, or a hub id. SAEs of the model without them need --force-sae."""
    scheduler: str = ""
    """Another scheduler than the model's, by its class in `diffusers`: `LCM`, `TCD`, `DPMSolverMultistep`, ...; it must
    take one pass of the U-Net a step. Empty: the model's own."""
    timestep_spacing: Literal["", "leading", "linspace", "trailing"] = ""
    """How the scheduler spaces its timesteps; empty: as the model says."""
    timesteps: tuple[int, ...] = ()
    """Timesteps of requests of as many steps, falling, for models distilled for certain ones: `--timesteps 399`. They
    are also how many steps a request takes that does not say."""
    embedded_guidance: float = 8.0
    """Guidance scale of a U-Net that is distilled for guidance and takes it as an embedding, as LCM's does."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for all."""
    port: int = 50051
    """Port to listen on; 0 takes a free one and says which."""
    tls_cert: str = ""
    """File of the server's certificate and its chain, in PEM; with it the port speaks TLS only. It, the key and the
    callers' CA are read again when they change."""
    tls_key: str = ""
    """File of the certificate's key."""
    tls_client_ca: str = ""
    """File of who signs callers' certificates; with it callers must have one."""
    tokens: str = ""
    """File of callers' tokens, hashed, with scopes and quotas (see `turbolens token`); with it every call needs one."""
    health_port: int = 0
    """Port that answers health alone, in the clear and without a token, for probes that can do neither; 0: none."""
    metrics_port: int = 0
    """Port of Prometheus metrics, over HTTP at /metrics; 0: none."""
    admin_port: int = 0
    """Port on which SAEs are loaded and unloaded while the server serves (see `turbolens admin`), by callers with the
    scope `admin`; on another address than this machine's own it needs `tokens`. 0: none."""
    traces: bool = False
    """Send spans of calls, batches and steps by OpenTelemetry, to where OTEL_EXPORTER_OTLP_ENDPOINT and its like say;
    needs the extra `traces`."""
    max_connection_age_s: float = 0
    """Seconds after which callers are asked to connect anew, so that they find servers that were added; 0: never."""
    more_sizes: tuple[str, ...] = ()
    """Sizes served beside the first, WIDTHxHEIGHT, such as 640x384: pictures of one size run together."""
    max_steps: int = 4
    """Most denoising steps of a request."""
    max_seeds: int = 16
    """Most pictures of a request."""
    max_batch: int = MAX_BATCH
    """Most pictures that run together, of one caller or several; memory for so many must be free at start."""
    batch_wait_ms: float = 5.0
    """How long a batch waits, after one of several callers, for them to come back; an idle server never waits."""
    max_queue: int = 64
    """Requests that may wait; one more is refused with the time to come back."""
    max_queue_pictures: int = 256
    """Pictures that may wait, of all requests; a request past it is refused in the same way."""
    max_held_mib: int = 1024
    """MiB that requests may hold together, from their message's arrival until their answer is read, by estimate."""
    stalled_s: float = 60.0
    """Seconds after which a stream is ended whose caller reads nothing."""
    warm_up: bool = True
    """Run the model once before the server is ready, so that the first caller does not wait for it."""
    grace_s: float = 30.0
    """Seconds that requests in flight get when the server is told to stop."""
    reflection: bool = True
    """Answer server reflection, so that tools can list the services."""
    log_format: Literal["auto", "json", "pretty"] = "auto"
    """JSON lines, colours, or whichever fits the terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""

    def __post_init__(self) -> None:
        least_of: dict[str, float] = {
            "threads": 0,
            "port": 0,
            "max_steps": 1,
            "max_seeds": 1,
            "max_batch": 1,
            "batch_wait_ms": 0,
            "max_queue": 1,
        }
        least_of |= {"max_queue_pictures": self.max_seeds, "grace_s": 0, "size": 0, "max_held_mib": 1, "stalled_s": 0.1}
        for name, least in least_of.items():
            if not getattr(self, name) >= least:  # not-a-number too
                why = " (max_seeds: a request must fit)" if name == "max_queue_pictures" else ""
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}{why}")
        if any(later >= earlier for earlier, later in itertools.pairwise(self.timesteps)):
            raise ConfigError(f"timesteps are {self.timesteps}; they must fall")
        for name in ("port", "health_port", "metrics_port", "admin_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 to 65535")
        if self.admin_port and not self.tokens and not _is_own(self.host):
            raise ConfigError(f"admin_port: whoever reaches {self.host} could change what is served; give tokens")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key: one is missing; TLS takes both")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca: callers show certificates over TLS only; give tls_cert and tls_key")


def _is_own(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


class ConfigError(ValueError):
    """A setting that cannot be used; the text names it."""


def _from_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    known = {field.name for field in dataclasses.fields(ServerConfig)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"--config {path}: no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: _checked(name, value, f"--config {path}: {name} = {value!r}") for name, value in values.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ServerConfig):
        text = environment.get(f"TURBOLENS_{field.name.upper()}")
        if text is None:
            continue
        try:
            value = _parse(text, field.default, get_type_hints(ServerConfig)[field.name])
        except ValueError as error:
            raise ConfigError(f"TURBOLENS_{field.name.upper()}={text!r}: {error}") from error
        values[field.name] = _checked(field.name, value, f"TURBOLENS_{field.name.upper()}={text!r}")
    return values


def _checked(name: str, value: Any, where: str) -> Any:
    """A value of the type that its field declares; flags are checked by tyro."""
    hint = get_type_hints(ServerConfig)[name]
    if get_origin(hint) is Literal:
        fits, wanted = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    elif get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        fits = isinstance(value, tuple) and all(type(part) is kind for part in value)
        wanted = "a list of texts" if kind is str else "a list of whole numbers"
    elif hint in (int, float):
        fits, wanted = isinstance(value, (int, hint)) and not isinstance(value, bool), "a number"
        wanted = "a whole number" if hint is int else wanted
    else:
        fits, wanted = isinstance(value, hint), "true or false" if hint is bool else "a text"
    if not fits:
        raise ConfigError(f"{where}: must be {wanted}")
    return value


def _parse(text: str, default: Any, hint: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError("must be true or false")
        return text.lower() in ("1", "true")
    if isinstance(default, tuple):
        return tuple(get_args(hint)[0](part.strip()) for part in text.split(",") if part.strip())
    return type(default)(text) if isinstance(default, (int, float)) else text


def read_config(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """The settings of a command line.

    Raises:
        ConfigError: a value from the file or the environment cannot be used.
    """
    rest = list(argv)
    base: dict[str, Any] = {}
    for at, argument in enumerate(rest):
        if argument == "--config" and at + 1 < len(rest):
            base = _from_file(Path(rest[at + 1]))
            del rest[at : at + 2]
            break
        if argument.startswith("--config="):
            base = _from_file(Path(argument.partition("=")[2]))
            del rest[at]
            break
    base |= _from_environment(environment)
    try:
        default = ServerConfig(**base)
    except TypeError as error:
        raise ConfigError(str(error)) from error
    return tyro.cli(ServerConfig, args=rest, default=default, prog="turbolens serve")
