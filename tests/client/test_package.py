"""The package as a whole: light to import, stable at its surface."""

from __future__ import annotations

import resource
import subprocess
import sys

import turbolens as tl

# What callers may rely on: a change here is a change of the product, and belongs in the changelog.
NAMES = """
TLS BlockFeatures Cancelled Coded DeadlineExceeded Done Edit Example Extraction Feature FeatureRef Features
FieldViolation InternalError InvalidRequest Label Lens Mask Match NotFound Overloaded PermissionDenied Picture
PictureReady Pictures Queued RunFeatures Step Table TopFeature TurboLensError Unauthenticated Unavailable
Unimplemented Warning ablate add aio box boxes connect edits_from_json edits_to_json feature mask polygon
replace scale set_to
"""
METHODS = "close extract generate get_feature list_features model search_features stream_features stream_generate"
HEAVY = ("torch", "diffusers", "transformers", "PIL", "turbolens_server", "turbolens_training")


def test_importing_loads_nothing_heavy():
    code = f"import sys, turbolens; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_is_quick():
    def seconds(code: str) -> float:
        # Processor time: the wall clock would measure whatever else the machine is doing.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = min(seconds("import turbolens") for _ in range(5)) - min(seconds("pass") for _ in range(5))
    assert best < 0.3


def test_everything_public_exists_and_has_a_docstring():
    for name in tl.__all__:
        assert getattr(tl, name).__doc__, name


def test_the_public_surface_is_as_agreed():
    assert sorted(tl.__all__) == sorted(NAMES.split())
    assert sorted(name for name in vars(tl.Lens) if not name.startswith("_")) == METHODS.split()
    assert tl.aio.__all__ == ["AsyncLens", "connect"]
