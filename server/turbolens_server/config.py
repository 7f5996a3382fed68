"""Settings of `turbolens serve`: flags over environment over file over defaults."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import tyro

from turbolens_server.engine.batcher import MAX_BATCH

_OF_THE_SDK: Final = frozenset({"TURBOLENS_TARGET", "TURBOLENS_TOKEN", "TURBOLENS_TLS_CA"})
"""Variables that another package reads, and that look like settings of ours."""
_A_TYPO: Final = 0.925
"""How alike two names are that differ by a letter or two."""


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
    of one block are served. `mini` brings its own, `mini-saes`, and beside them `mini-nested`,
    `mini-temporal` and `mini-attention`."""
    force_sae: bool = False
    """Serve an SAE on a model that it was not trained on; every result says so."""
    gate: str = ""
    """Learned region gates, which requests switch on: a folder that `turbolens train gates` wrote, a hub id, or `mini`,
    the embedded model's own; empty: none."""
    force_gate: bool = False
    """Serve gates on a model that they were not trained on; every result says so."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda`, `cuda:1`."""
    dtype: str = "auto"
    """`auto` (float16 on a GPU, else float32), `float32`, `float16` or `bfloat16`."""
    threads: int = 0
    """CPU threads that compute a picture; 0: as many as there are cores, or as OMP_NUM_THREADS says. Where something
    else keeps a core busy, one fewer is much faster: each operation waits for the slowest of its threads."""
    backend: Literal["auto", "torch", "torch-compile", "onnx", "tensorrt"] = "auto"
    """What runs the U-Net; all but `torch` and `torch-compile` need an extra. What is asked for runs or the start
    fails; `tensorrt` needs an engine from `turbolens engine build`. On a CPU `auto` serves by `torch` at once and by
    `torch-compile` as soon as that is compiled, in the background or by an earlier start; `torch` pins it."""
    onnx_regions: bool = False
    """With `onnx` in `float32`: serve regions too, by a second graph, exported at the first start, which holds the
    weights once more; without it such requests are refused. What has no regions runs on the first graph as before."""
    compile_cores: int = 1
    """Cores that may compile in the background, at the lowest priority, where `backend` is `auto`, on a CPU; 0: none,
    and what the cache has is taken all the same."""
    cache: str = ""
    """Folder of exported graphs, TensorRT engines and compiled code; empty: ~/.cache/turbolens."""
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
    """How long a batch waits, after one of several requests, for them to come back; for callers who are told apart, a
    tenth of that batch's time where that is more. An idle server never waits; with 0 none does."""
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
        if found := list(self.problems()):
            raise ConfigError(*found)

    def problems(self) -> Iterator[str]:
        """All that is wrong with the settings by themselves, in words."""
        least_of: dict[str, float] = {
            "threads": 0,
            "compile_cores": 0,
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
                yield f"{name} is {getattr(self, name)}; it must be at least {least}{why}"
        if any(later >= earlier for earlier, later in itertools.pairwise(self.timesteps)):
            yield f"timesteps are {self.timesteps}; they must fall"
        for name in ("port", "health_port", "metrics_port", "admin_port"):
            if not 0 <= getattr(self, name) <= 65535:
                yield f"{name} is {getattr(self, name)}; it must be 0 to 65535"
        if self.admin_port and not self.tokens and not _is_own(self.host):
            yield f"admin_port: whoever reaches {self.host} could change what is served; give tokens"
        if bool(self.tls_cert) != bool(self.tls_key):
            yield "tls_cert and tls_key: one is missing; TLS takes both"
        if self.tls_client_ca and not self.tls_cert:
            yield "tls_client_ca: callers show certificates over TLS only; give tls_cert and tls_key"


def _is_own(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


class ConfigError(ValueError):
    """Settings that cannot be used, a text for each, which names it."""

    def __str__(self) -> str:
        return "; ".join(self.args)


@dataclasses.dataclass(frozen=True)
class _Given(ServerConfig):
    __doc__ = ServerConfig.__doc__

    def __post_init__(self) -> None:
        """As they were given: what is wrong with them is told when all are read."""


def _from_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file, and what is wrong with it, in words."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        return {}, [f"--config {path}: {error}"]
    known = {field.name for field in dataclasses.fields(ServerConfig)}
    wrong = []
    if unknown := sorted(values.keys() - known):
        wrong.append(f"--config {path}: no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known}
    wrong += [line for name, v in values.items() for line in _misfits(name, v, f"--config {path}: {name} = {v!r}")]
    return values, wrong


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the environment, and what is wrong with them, in words."""
    values: dict[str, Any] = {}
    wrong = []
    hints = get_type_hints(ServerConfig)
    for field in dataclasses.fields(ServerConfig):
        name = f"TURBOLENS_{field.name.upper()}"
        text = environment.get(name)
        if text is None:
            continue
        try:
            values[field.name] = _parse(text, field.default, hints[field.name])
        except ValueError as error:
            wrong.append(f"{name}={text!r}: {error}")
        else:
            wrong += _misfits(field.name, values[field.name], f"{name}={text!r}")
    ours = {f"TURBOLENS_{field.name.upper()}" for field in dataclasses.fields(ServerConfig)}
    # Only what looks like one of ours: Kubernetes, the SDK and the studio have names of their own.
    for name in sorted(n for n in environment if n.startswith("TURBOLENS_") and n not in ours | _OF_THE_SDK):
        if near := difflib.get_close_matches(name, ours, 1, _A_TYPO):
            wrong.append(f"{name}: no such setting; {near[0]} is one")
    return values, wrong


def _misfits(name: str, value: Any, where: str) -> Iterator[str]:
    """What is wrong with a value that is not of the type that its field declares; flags are checked by tyro."""
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
        yield f"{where}: must be {wanted}"


def _parse(text: str, default: Any, hint: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("0", "1", "true", "false"):
            raise ValueError("must be true or false")
        return text.lower() in ("1", "true")
    if isinstance(default, tuple):
        return tuple(get_args(hint)[0](part.strip()) for part in text.split(",") if part.strip())
    return type(default)(text) if isinstance(default, (int, float)) else text


def given_settings(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """The settings of a command line as they were given: each of its type, but not looked at otherwise.

    Raises:
        ConfigError: values from the file or the environment that cannot be read; all of them.
    """
    rest = list(argv)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for at, argument in enumerate(rest):
        if argument == "--config" and at + 1 < len(rest):
            values, wrong = _from_file(Path(rest[at + 1]))
            del rest[at : at + 2]
            break
        if argument.startswith("--config="):
            values, wrong = _from_file(Path(argument.partition("=")[2]))
            del rest[at]
            break
    more, also_wrong = _from_environment(environment)
    if wrong or also_wrong:
        raise ConfigError(*wrong, *also_wrong)
    return tyro.cli(_Given, args=rest, default=_Given(**values | more), prog="turbolens serve")


def read_config(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """The settings of a command line.

    Raises:
        ConfigError: settings that cannot be used; all of them.
    """
    return checked(given_settings(argv, environment))


def checked(given: ServerConfig) -> ServerConfig:
    """The same settings.

    Raises:
        ConfigError: some cannot be used; all of them.
    """
    return ServerConfig(**{field.name: getattr(given, field.name) for field in dataclasses.fields(given)})
