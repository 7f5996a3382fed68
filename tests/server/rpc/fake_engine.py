"""An engine without a model: makes what it is asked for at once, stops where it is told to, and keeps account."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import torch

from turbolens_server.engine.info import EngineInfo, GateInfo, MemoryNeed, SaeInfo
from turbolens_server.engine.types import FeaturesReady, Job, NotFinite, Result, SparseCodes, StepDone
from turbolens_server.gating.bundle import GateBundle
from turbolens_server.sae.bundle import Bundle, FeatureStats, Nesting, SaeWeights
from turbolens_server.unet.points import HookPoint

D_SAE = 16
DEAD = 5
"""The feature of `mid.0` that has no mean."""
TOKENS = 20


def a_bundle(name: str, *, stats: bool, d_sae: int = D_SAE, folder=None, provenance=None) -> Bundle:
    mean = np.linspace(1, 2, d_sae, dtype=np.float32)
    mean[DEAD] = 0
    weights = SaeWeights(torch.zeros(4, d_sae), torch.zeros(d_sae), torch.zeros(d_sae, 4), torch.zeros(4))
    measured = FeatureStats(
        mean=mean,
        max=mean * 3,
        frequency=np.linspace(0, 0.5, d_sae, dtype=np.float32),
        timesteps=np.array([999]),
        update_rms=np.array([2.0], np.float32),
    )
    return Bundle(
        name=name,
        hook_point=name,
        architecture="topk",
        k=2,
        weights=weights,
        stats=measured if stats else None,
        hash=f"hash of {name}",
        model_hash="hash of fake",
        provenance=provenance or {"recipe": "fake"},
        folder=folder,
    )


def a_nested_bundle(name: str) -> Bundle:
    """Of a k up to 4 and of three prefixes."""
    bundle = a_bundle(name, stats=True)
    return dataclasses.replace(bundle, architecture="turbolens-matryoshka", nesting=Nesting(4, (4, 8, D_SAE)))


def a_gate() -> GateInfo:
    """Gates without networks, forced on this model."""
    bundle = GateBundle({}, {"one": ("mid.0",)}, 0.5, -1e4, "hash of another", {"recipe": "fake"}, "hash of gates")
    return GateInfo(bundle, bundle.gates({"mid.0": ["mid.0.attn2.0"]}), forced=True)


def an_info(**changes) -> EngineInfo:
    points = tuple(HookPoint(name, f"module.of.{name}", 4, 16) for name in ("mid.0", "up.0.1"))
    bundles = (a_bundle("mid.0", stats=True), a_bundle("up.0.1", stats=False))
    info = EngineInfo(
        model="fake",
        model_hash="hash of fake",
        components_hash="hash of the rest",
        hook_points=points,
        saes={b.name: SaeInfo(b.name, b.hook_point, b, forced=False) for b in bundles},
        default_steps=1,
        max_steps=4,
        default_size=(64, 64),
        sizes=((64, 64), (32, 64)),
        max_prompt_tokens=TOKENS,
        backend="fake",
        backend_reason="no other fits",
        device="cpu",
        dtype="float32",
        versions={"turbolens": "0"},
        memory=MemoryNeed(weights=4, saes=3, activations=2, available=100),
        load_s=1.5,
        region_strides=(16,),
    )
    return dataclasses.replace(info, **changes)


class FakeEngine:
    """Every step waits for `gate`, asking meanwhile whether anybody still wants the jobs."""

    def __init__(self, info: EngineInfo | None = None) -> None:
        self.info = info or an_info()
        self.pipelined = False
        self.gate = threading.Event()
        self.gate.set()
        self.decode_gate = threading.Event()
        self.decode_gate.set()
        self.started = threading.Event()
        self.stopped = threading.Event()
        """A batch ended because all of its jobs were cancelled."""
        self.fails: Exception | None = None
        self.room = 1000
        """Jobs of a batch that memory suffices for."""
        self.freed = 0
        self.warm_up_fails: Exception | None = None
        self.not_finite: set[int] = set()
        """Seeds that come to values that are not finite."""
        self.peak = 1.5
        """Largest activation."""
        self.batches: list[list[int]] = []
        """Seeds of every batch."""
        self.threads: set[str] = set()
        self.warmed_up: list[int] = []
        self.warm_up_s = 0.0

    def embed_text(self, texts):
        self.threads.add(threading.current_thread().name)
        vectors = np.array([[len(t), sum(map(ord, t)), ord((t or "a")[0])] for t in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def free_memory(self):
        self.freed += 1

    def warm_up(self, max_batch):
        if self.warm_up_fails:
            raise self.warm_up_fails
        self.warmed_up.append(max_batch)
        return Job("", 0, 1, *self.info.default_size), self.warm_up_s

    def denoise(self, jobs, *, on_event, cancelled):
        self.threads.add(threading.current_thread().name)
        self.batches.append([job.seed for job in jobs])
        self.started.set()
        if self.fails:
            raise self.fails
        if len(jobs) > self.room:
            on_event(StepDone(0, 0, jobs[0].steps))
            raise RuntimeError("CUDA error: out of memory")
        features = [[] for _ in jobs]
        live = [True] * len(jobs)
        for step in range(jobs[0].steps):
            while not self.gate.is_set() and not all(cancelled(i) for i in range(len(jobs))):
                time.sleep(0.002)
            live = [alive and not cancelled(i) for i, alive in enumerate(live)]
            if not any(live):
                self.stopped.set()
                break
            for i, job in enumerate(jobs):
                if live[i] and job.seed in self.not_finite:
                    live[i] = False
                    on_event(NotFinite(i, "U-Net", step, "float32"))
                if not live[i]:
                    continue
                for sae in job.saes:
                    features[i].append(self.codes(sae, step, job))
                    on_event(FeaturesReady(i, features[i][-1]))
                wanted = job.previews and step < job.steps - 1
                on_event(StepDone(i, step, job.steps, self.picture(job) if wanted else None))
        return jobs, live, features

    def decode(self, denoised, *, on_event, cancelled):
        self.threads.add(threading.current_thread().name)
        self.decode_gate.wait()
        jobs, live, features = denoised
        for i, job in enumerate(jobs):
            if not live[i] or cancelled(i):
                continue
            cut = max(0, len(job.prompt.split()) - TOKENS)
            latents = np.full((4, job.height // 8, job.width // 8), job.seed % 7, np.float32)
            picture = self.picture(job) if job.picture else None
            on_event(Result(i, picture, latents, tuple(features[i]), cut, len(jobs)))

    def codes(self, sae, step, job) -> SparseCodes:
        """Positions take 0, 1, 2, 0, 1, 2, ... entries."""
        height, width = job.height // 16, job.width // 16
        counts = (np.arange(height * width) % 3).astype(np.uint16)
        entries = int(counts.sum())
        indices = (np.arange(entries) % self.info.saes[sae].bundle.d_sae).astype(np.int32)
        values = np.linspace(0.5, self.peak, entries, dtype=np.float32)
        return SparseCodes(sae, step, height, width, self.info.saes[sae].bundle.d_sae, counts, indices, values)

    @staticmethod
    def picture(job):
        return np.random.default_rng(job.seed).integers(0, 255, (job.height, job.width, 3)).astype(np.uint8)
