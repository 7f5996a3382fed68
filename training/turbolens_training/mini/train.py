"""Train `mini`: four stages, each resumable from its own checkpoint.

The VAE's latent is anchored to a meaning we choose, so that the U-Net's target is known without it and the stages
need not wait for each other: three channels are the picture averaged over 4x4 pixels, the fourth is the share of
the cell that things cover. The U-Net then learns (caption, noise) -> latent by regression, because the noise decides
whatever the caption leaves open (see :mod:`~turbolens_training.mini.scenes`).
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from pytorch_optimizer import Muon
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from turbolens_server.files import whole_folder, write_file
from turbolens_server.unet.conditions import Conditions
from turbolens_server.unet.tapped import tapped_forward
from turbolens_training.checkpoints import add_rows, read_states, save_state
from turbolens_training.mini import model as parts
from turbolens_training.mini.captions import describe
from turbolens_training.mini.config import OF_THE_MACHINE, MiniConfig
from turbolens_training.mini.evaluate import as_png, progress_sheet, quick_scores
from turbolens_training.mini.render import render
from turbolens_training.mini.scenes import (
    CODE_SIZES,
    decode_scenes,
    jitter_from_noise,
    sample_codes,
)
from turbolens_training.mini.tokenizer import CONTEXT_LENGTH

OTHER_TIMESTEPS: Final = (749, 666, 499, 332, 249)
"""What trailing spacing visits after 999 in runs of 2, 3 and 4 steps."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One training batch: everything that (seed, stage, step) decides."""

    codes: Tensor  # [B, CODE_DIM]
    captions: list[str]
    noise: Tensor  # [B, 4, h, w]
    target: Tensor  # [B, 4, h, w], the scaled latent
    weight: Tensor  # [B, 1, h, w]


def anchored_latent(picture: Tensor, cover: Tensor, size: int) -> Tensor:
    """The VAE latent that stands for a picture, by definition, before scaling.

    Args:
        picture: [B, 3, H, H] in [-1, 1].
        cover: [B, 1, H, H] in [0, 1].
        size: edge of the latent; divides H.

    Returns:
        [B, 4, size, size]: area-averaged RGB and area-averaged cover as -1..1.
    """
    return functional.avg_pool2d(torch.cat([picture, cover * 2 - 1], 1), picture.shape[-1] // size)


def draw_batch(seed: int, stage: str, step: int, size: int, batch: int, weight: float, device: str) -> Batch:
    """The batch of one step; scenes and noise come from CPU generators, so devices agree."""
    rng = random.Random(f"{seed}/{stage}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    codes = sample_codes(batch, generator)
    captions = [describe(scene, rng) for scene in decode_scenes(codes)]
    codes = codes.to(device)
    noise = torch.randn(batch, 4, size, size, generator=generator).to(device)
    picture, cover = render(codes, jitter_from_noise(noise), 2 * size)
    target = anchored_latent(picture, cover, size) * parts.SCALING_FACTOR
    thing = (functional.max_pool2d(functional.avg_pool2d(cover, 2), 3, 1, 1) > 0.05).float()
    return Batch(codes, captions, noise, target, 1 + weight * thing)


def x0_from_v(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latent that a v-prediction implies (Salimans & Ho 2022, appendix D)."""
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v


def choose_precision(precision: str, device: str) -> torch.dtype:
    """Resolve `auto` by timing one matrix product of each kind on this device."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if device != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(768, 768, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        return time.perf_counter() - start

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else torch.float32


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up so that early steps do not linger."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, p in module.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.shadow = state["count"], state["shadow"]


class Training:
    """The folder of one training run: checkpoints written whole or not at all, and a JSONL log."""

    def __init__(self, config: MiniConfig) -> None:
        self.config = config
        self.folder = config.out
        self.folder.mkdir(parents=True, exist_ok=True)
        has_gpu = torch.cuda.is_available()
        self.device = ("cuda" if has_gpu else "cpu") if config.device == "auto" else config.device
        self.dtype = choose_precision(config.precision, self.device)

    def load(self, stage: str) -> dict[str, Any] | None:
        """The last whole checkpoint of a stage.

        Raises:
            ValueError: it is of a run with other settings.
        """
        state = next(read_states(self.folder / f"{stage}.pt", self.device, ("config", "modules")), None)
        if state is not None and state["config"] != self._settings:
            changed = [name for name, value in self._settings.items() if state["config"].get(name) != value]
            told = f"of a run with another {', '.join(changed)}; choose another --out"
            raise ValueError(f"{self.folder / stage}.pt: {told}")
        return state

    def save(self, stage: str, state: dict[str, Any]) -> None:
        save_state(self.folder / f"{stage}.pt", {"config": self._settings, **state})

    def log(self, **row: Any) -> None:
        add_rows(self.folder / "log.jsonl", [{"time": round(time.time(), 1), **row}])

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides the result."""
        settings = dataclasses.asdict(self.config)
        return {name: value for name, value in settings.items() if name not in OF_THE_MACHINE}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def cosine(step: int, total: int, warm_up: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def run_stage(
    training: Training,
    stage: str,
    total: int,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    train_step: Callable[[int], Tensor],
    *,
    ema: Ema | None = None,
    on_checkpoint: Callable[[int], dict[str, Any]] | None = None,
) -> None:
    """Run one stage to its end, resuming where its checkpoint left off.

    `train_step(step)` returns the loss; this function owns the schedule, the update, the log and the checkpoints.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    step = 0
    if state := training.load(stage):
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        step = state["step"]
        if step < total:
            optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.load_state_dict(state["ema"])

    def checkpoint() -> None:
        state = {"step": step, "modules": {name: module.state_dict() for name, module in modules.items()}}
        state |= {"optimizer": optimizer.state_dict(), "ema": ema.state_dict() if ema else {}}
        training.save(stage, state)
        training.log(stage=stage, step=step, loss=average, **(on_checkpoint(step) if on_checkpoint else {}))

    if step >= total:
        return
    average = math.nan
    saved = time.monotonic()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with tqdm(total=total, initial=step, desc=stage, unit="step", smoothing=0.05) as bar:
        while step < total:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine(step, total, 100)
            loss = train_step(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{stage} step {step}: loss is {loss.item()}; last checkpoint: {training.folder}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if ema:
                ema.update(next(iter(modules.values())))
            step += 1
            value = loss.item()
            average = value if math.isnan(average) else 0.98 * average + 0.02 * value
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}")
            if time.monotonic() - saved > 60 * training.config.checkpoint_minutes:
                checkpoint()
                saved = time.monotonic()
    checkpoint()


def train_text(training: Training) -> parts.TextEncoders:
    """Stage 1: the encoders learn to name every attribute, each from the output that the U-Net will see."""
    torch.manual_seed(training.config.seed)
    text = parts.TextEncoders(*parts.build_text_encoders()).to(training.device)
    heads = torch.nn.ModuleList(torch.nn.Linear(d, sum(CODE_SIZES)) for d in (parts.TEXT_DIM, parts.POOLED_DIM))
    heads = heads.to(training.device)
    optimizer = torch.optim.AdamW([*text.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    accuracy: list[float] = []

    def step_loss(step: int) -> Tensor:
        rng = random.Random(f"{training.config.seed}/text/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        codes = sample_codes(training.config.text_batch, generator)
        # Captions are short: the first four fifths of the steps need not carry all 77 positions.
        length = 40 if step < 0.8 * training.config.text_steps else CONTEXT_LENGTH
        ids = text.tokenize([describe(scene, rng) for scene in decode_scenes(codes)], length)
        codes = codes.to(training.device)
        with training.autocast():
            hidden, pooled = text((ids[0].to(training.device), ids[1].to(training.device)))
            # The padding after the end token has read the whole caption too; the U-Net attends to it, so it must say.
            place = torch.randint(length // 2, length, (len(codes),), generator=generator)
            read = hidden[torch.arange(len(codes)), place, : parts.TEXT_DIM]
            both = (heads[0](read).float(), heads[1](pooled).float())
        loss = torch.zeros((), device=training.device)
        right = []
        for logits in both:
            for column, scores in enumerate(logits.split(CODE_SIZES, 1)):
                loss = loss + functional.cross_entropy(scores, codes[:, column])
                right.append((scores.argmax(1) == codes[:, column]).float().mean().item())
        accuracy[:] = right
        return loss

    run_stage(
        training, "text", training.config.text_steps, {"text": text, "heads": heads}, optimizer, step_loss,
        on_checkpoint=lambda _: {"accuracy": [round(a, 3) for a in accuracy]},
    )  # fmt: skip
    return text.eval().requires_grad_(False)


def muon_groups(unet: UNet2DConditionModel, config: MiniConfig, factor: float) -> list[dict[str, Any]]:
    """Muon on the inner matrices and convolutions, AdamW on vectors and on the first and last layer."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in unet.named_parameters():
        outer = name.startswith(("conv_in", "conv_out", "time_embedding", "add_embedding"))
        (rest if p.ndim < 2 or outer else matrices).append(p)
    return [
        {
            "params": matrices,
            "lr": factor * config.muon_rate,
            "use_muon": True,
            "weight_decay": 0.01,
            "use_adjusted_lr": False,
        },
        {
            "params": rest,
            "lr": factor * config.learning_rate,
            "use_muon": False,
            "betas": (0.9, 0.98),
            "weight_decay": 0.0,
        },
    ]


class Denoiser(torch.nn.Module):
    """The U-Net as it is trained: without pooled text, and without the spare blocks of some pictures."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, hidden: Tensor, time_ids: Tensor, keep: Tensor) -> Tensor:
        """Prediction [B, 4, h, w]; `keep` [B, len(SPARE_BLOCKS)] is 0 where a block's update is left out."""

        def tap(name: str, update: Tensor, _: tuple[int, int]) -> Tensor:
            return update * keep[:, parts.SPARE_BLOCKS.index(name), None, None].to(update.dtype)

        silent = torch.zeros(len(x_t), parts.POOLED_DIM, device=x_t.device, dtype=hidden.dtype)
        at = frozenset(parts.SPARE_BLOCKS)
        prediction = tapped_forward(self.unet, x_t, t, Conditions(hidden, silent, time_ids), tap=tap, at=at)
        if prediction is None:
            raise AssertionError("a pass that is not stopped predicts")
        return prediction


def train_unet(training: Training, text: parts.TextEncoders) -> UNet2DConditionModel:
    """Stage 2: the U-Net, at half the resolution first. Returns the averaged weights."""
    config = training.config
    alpha_bars = parts.build_scheduler().alphas_cumprod.to(training.device)
    others = torch.tensor(OTHER_TIMESTEPS)
    time_ids = torch.tensor(parts.TIME_IDS, dtype=torch.float32, device=training.device)
    unet: UNet2DConditionModel = parts.build_unet().to(training.device)
    previous: dict[str, Any] | None = None
    for stage, steps, size, factor in (
        ("half", config.half_steps, 16, 1.0),
        ("full", config.full_steps, 32, config.full_rate),
    ):
        torch.manual_seed(config.seed)
        unet = parts.build_unet().to(training.device)
        if previous:
            unet.load_state_dict(previous)
        optimizer = Muon(muon_groups(unet, config, factor))
        denoiser = Denoiser(unet)
        forward = torch.compile(denoiser) if config.compile and stage == "full" else denoiser
        ema = Ema(unet, 0.998)

        def step_loss(step: int, stage: str = stage, size: int = size, forward: Any = forward) -> Tensor:
            batch = draw_batch(config.seed, stage, step, size, config.batch, config.foreground_weight, training.device)
            generator = torch.Generator().manual_seed(step)
            n = len(batch.codes)
            one_step = torch.rand(n, generator=generator) < config.one_step_share
            pick = others[torch.randint(len(others), (n,), generator=generator)]
            t = torch.where(one_step, 999, pick)
            fresh = torch.randn(batch.noise.shape, generator=generator).to(training.device)
            # At t=999 the input is the coupled noise, as in the sampler; later steps see fresh noise, as ancestral
            # sampling adds it.
            noise = torch.where(one_step.to(training.device)[:, None, None, None], batch.noise, fresh)
            alpha_bar = torch.where(t.to(training.device) == 999, 0.0, alpha_bars[t])[:, None, None, None]
            x_t = alpha_bar.sqrt() * batch.target + (1 - alpha_bar).sqrt() * noise
            ids = text.tokenize(batch.captions)
            with training.autocast():
                with torch.no_grad():
                    hidden, _ = text((ids[0].to(training.device), ids[1].to(training.device)))
                keep = torch.rand(n, len(parts.SPARE_BLOCKS), generator=generator) >= config.block_dropout
                v = forward(
                    x_t, t.to(training.device), hidden, time_ids.expand(n, -1), keep.to(training.device)
                ).float()
            error = x0_from_v(v, x_t, alpha_bar) - batch.target
            loss: Tensor = (batch.weight * (error.square() + 0.5 * error.abs())).sum()
            return loss / (4 * batch.weight.sum())

        def report(step: int, size: int = size, ema: Ema = ema) -> dict[str, Any]:
            averaged = parts.build_unet().to(training.device)
            averaged.load_state_dict(ema.shadow)
            scores, sheet = quick_scores(one_step_latents(training, text, averaged.eval()), size)
            write_file(training.folder / "progress.png", as_png(progress_sheet(sheet)))
            tqdm.write(f"step {step}: {scores}")
            return scores

        run_stage(training, stage, steps, {"unet": unet}, optimizer, step_loss, ema=ema, on_checkpoint=report)
        previous = ema.shadow
    if previous is None:
        raise AssertionError("no stage ran")
    unet.load_state_dict(previous)
    return unet.eval().requires_grad_(False)


def one_step_latents(
    training: Training, text: parts.TextEncoders, unet: UNet2DConditionModel
) -> Callable[[list[str], Tensor], Tensor]:
    """The one-step generator as a function: (captions, noise [B, 4, h, w]) -> scaled latents [B, 4, h, w]."""
    time_ids = torch.tensor(parts.TIME_IDS, dtype=torch.float32, device=training.device)

    @torch.no_grad()
    def generate(captions: list[str], noise: Tensor) -> Tensor:
        ids = text.tokenize(captions)
        hidden, pooled = text((ids[0].to(training.device), ids[1].to(training.device)))
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(len(noise), -1)}
        t = torch.full((len(noise),), 999, device=training.device)
        v: Tensor = unet(noise.to(training.device), t, hidden, added_cond_kwargs=added, return_dict=False)[0]
        return -v

    return generate


def scene_batches(training: Training, stage: str, batch: int) -> Callable[[int], tuple[Batch, Tensor]]:
    """Full-size pictures for the VAE's stages, with exact latents: step -> (batch, pictures [B, 3, 128, 128])."""

    def draw(step: int) -> tuple[Batch, Tensor]:
        drawn = draw_batch(training.config.seed, stage, step, parts.LATENT_SIZE, batch, 0.0, training.device)
        picture, cover = render(drawn.codes, jitter_from_noise(drawn.noise), parts.PICTURE_SIZE)
        exact = anchored_latent(picture, cover, parts.LATENT_SIZE)
        return dataclasses.replace(drawn, target=exact), picture

    return draw


def picture_loss(drawn: Tensor, picture: Tensor) -> Tensor:
    """Squared plus absolute error, with three times the weight on edges, which are few and are what one sees."""
    step_x = (picture[..., 1:] - picture[..., :-1]).abs().mean(1, keepdim=True)
    step_y = (picture[..., 1:, :] - picture[..., :-1, :]).abs().mean(1, keepdim=True)
    edge = functional.pad(step_x, (0, 1)) + functional.pad(step_y, (0, 0, 0, 1))
    weight = 1 + 3 * (functional.max_pool2d(edge, 3, 1, 1) > 0.1).float()
    error = drawn - picture
    loss: Tensor = (weight * (error.square() + 0.5 * error.abs())).mean()
    return loss


def train_vae(training: Training) -> Any:
    """Stage 3: an encoder that finds the anchored latent, a decoder that draws from it."""
    torch.manual_seed(training.config.seed)
    vae = parts.build_vae().to(training.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    draw = scene_batches(training, "vae", 16)

    def step_loss(step: int) -> Tensor:
        batch, picture = draw(step)
        generator = torch.Generator().manual_seed(step)
        # A quarter of each picture is enough to learn from, and costs a quarter.
        rows, columns = (4 * int(v) for v in torch.randint(parts.LATENT_SIZE // 2, (2,), generator=generator))
        half = parts.PICTURE_SIZE // 2
        picture = picture[..., rows : rows + half, columns : columns + half]
        target = batch.target[..., rows // 4 : (rows + half) // 4, columns // 4 : (columns + half) // 4]
        with training.autocast():
            posterior = vae.encode(picture).latent_dist
            # Latents that are slightly wrong, as the U-Net's are, must still be drawn cleanly.
            wrong = torch.randn(target.shape, generator=generator).to(training.device)
            latent = posterior.sample(generator) + 0.03 * wrong
            drawn = vae.decode(latent).sample.float()
        anchor = functional.mse_loss(posterior.mean.float(), target)
        # A narrow posterior: its variance is held near 0.02 squared by the KL to that width.
        width = posterior.logvar.float() - 2 * math.log(0.02)
        spread = 0.5 * (width.exp() - 1 - width).mean()
        loss: Tensor = picture_loss(drawn, picture) + anchor + 1e-4 * spread
        return loss

    run_stage(training, "vae", training.config.vae_steps, {"vae": vae}, optimizer, step_loss)
    return vae.eval().requires_grad_(False)


def polish_decoder(training: Training, text: parts.TextEncoders, unet: UNet2DConditionModel, vae: Any) -> Any:
    """Stage 4: the decoder learns to draw the true picture from the U-Net's latents as well as from true ones."""
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0)
    draw = scene_batches(training, "polish", 8)
    generate = one_step_latents(training, text, unet)

    def step_loss(step: int) -> Tensor:
        batch, picture = draw(step)
        with training.autocast():
            if step % 2:
                latent = generate(batch.captions, batch.noise).float() / parts.SCALING_FACTOR
            else:
                wrong = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(step))
                latent = batch.target + 0.02 * wrong.to(training.device)
            drawn = vae.decode(latent).sample.float()
        return picture_loss(drawn, picture)

    run_stage(training, "polish", training.config.polish_steps, {"vae": vae}, optimizer, step_loss)
    return vae.eval().requires_grad_(False)


def train_mini(config: MiniConfig) -> Path:
    """Train every stage that is not finished and write the model; returns its folder."""
    training = Training(config)
    training.log(device=training.device, dtype=str(training.dtype), threads=torch.get_num_threads())
    text = train_text(training)
    unet = train_unet(training, text)
    vae = polish_decoder(training, text, unet, train_vae(training))
    folder = config.out / "model"
    with whole_folder(folder, replace=True) as whole:
        parts.save_pipeline(whole, text, unet, vae, torch.float16)
    return folder
