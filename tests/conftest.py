"""Fixtures that several packages' tests share."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=50)
settings.load_profile("default")


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start; each of these processes has a core

# Servers that tests start keep to what they begin with: nothing is compiled beside them or taken from a user's cache.
os.environ.setdefault("TURBOLENS_BACKEND", "torch")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def full_disk() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with full_disk(most):` no file grows past `most` bytes, which writers see as they see a full disk."""

    @contextlib.contextmanager
    def limit(most: int = 0) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="session")
def engine():
    """The embedded model with its own SAEs."""
    from turbolens_server.loading.load import load_engine

    return load_engine()


@pytest.fixture(scope="session")
def gate_folder(engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random gates of `mini`, about half of them closed: one head for the outer blocks, one for the middle."""
    from turbolens_server.gating.bundle import GateBundle, save_gates
    from turbolens_server.gating.maths import GateHead, GateMlp

    rng, hidden, text = torch.Generator().manual_seed(5), 8, engine.components.unet.config.cross_attention_dim

    def mlp(d: int) -> GateMlp:
        shapes = ((d,), (d,), (hidden, d), (hidden,), (hidden, hidden), (hidden,))
        return GateMlp(*(torch.randn(shape, generator=rng) for shape in shapes))

    blocks = {"outer": ("down.2.0", "down.2.1", "up.0.0", "up.0.1", "up.0.2"), "mid": ("mid.0",)}
    heads = {name: GateHead(mlp(128), mlp(text), torch.tensor(0.1)) for name in blocks}
    folder = tmp_path_factory.mktemp("gates")
    save_gates(folder, GateBundle(heads, blocks, 0.5, -1e4, engine.info.model_hash, {"recipe": "random"}))
    return folder


@pytest.fixture(scope="session")
def gated_engine(gate_folder: Path):
    """The embedded model with its own SAEs and random gates."""
    from turbolens_server.loading.load import load_engine

    return load_engine(gate=str(gate_folder))


def save_random_model(folder: Path, unet, scheduler) -> None:
    """A `diffusers` folder of a U-Net and a scheduler beside `mini`'s untrained other parts."""
    from diffusers import StableDiffusionXLPipeline

    from turbolens_training.mini import model as parts

    first, second = parts.build_text_encoders()
    pipeline = StableDiffusionXLPipeline(
        vae=parts.build_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=parts.build_tokenizer(),
        tokenizer_2=parts.build_tokenizer(pad_token="!"),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL-type folder that is not `mini`: epsilon prediction, EulerDiscrete, convolutional projections."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    from turbolens_training.mini import model as parts

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        {
            **parts.build_unet().config,
            "block_out_channels": (32, 32, 64),
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": False,
            "sample_size": 16,
        }
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    folder = tmp_path_factory.mktemp("tiny")
    save_random_model(folder, unet, scheduler)
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path):
    """The random folder as an engine, without SAEs."""
    from turbolens_server.loading.load import load_engine

    return load_engine(model=str(tiny_folder))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model of one block a level with random SAEs at two of them: (folder, folder of SAEs)."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    from turbolens_server.loading.hashes import hash_unet
    from turbolens_server.sae.bundle import SaeWeights, save_bundle
    from turbolens_training.mini import model as parts

    torch.manual_seed(1)
    changes = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (1, 1),
        "use_linear_projection": False,
        "sample_size": 16,
    }
    unet = UNet2DConditionModel.from_config({**parts.build_unet().config, **changes})
    folder, saes = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("small-saes")
    save_random_model(folder, unet, EulerDiscreteScheduler(timestep_spacing="trailing"))
    for block, module in (("mid.0", "mid_block.attentions.0"), ("up.0.1", "up_blocks.0.attentions.1")):
        W_dec = torch.nn.functional.normalize(torch.randn(96, 64), dim=-1)
        weights = SaeWeights(W_dec.T.contiguous(), torch.zeros(96), W_dec, torch.zeros(64))
        save_bundle(
            saes / block, hook_point=block, hook_module=module, model_name="small", model_hash=hash_unet(folder),
            architecture="topk", k=6, weights=weights, stats=None, provenance={},
        )  # fmt: skip
    return folder, saes


@pytest.fixture(scope="session")
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Exported graphs and engines that several tests share, in whichever process they run: an export takes a minute."""
    # Exports log every symbolic step at a level that only pytest's capture would format.
    trace = logging.getLogger("torch.__trace")
    before, trace.disabled = trace.disabled, True
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / "graphs").mkdir(exist_ok=True)
    yield shared / "graphs"
    trace.disabled = before


@pytest.fixture(scope="session")
def server():
    """A real server on the embedded model, over a real socket."""
    from turbolens_server.embedded import start

    with start(max_queue=4) as running:
        yield running


@pytest.fixture(scope="session")
def lens(server):
    """A client of it."""
    import turbolens as tl

    with tl.connect(server.target) as connected:
        yield connected


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, object]]]:
    """What the server logs, as it logs it: a dict for each event."""

    class Lines(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[dict[str, object]] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.seen.append(record.msg)  # type: ignore[arg-type]  # structlog hands over the event itself

    lines = Lines()
    logger = logging.getLogger("turbolens")
    logger.addHandler(lines)
    with caplog.at_level(logging.INFO, "turbolens"):
        yield lines.seen
    logger.removeHandler(lines)
