"""Who visits the studio in tests, and the picture that is looked at."""

from __future__ import annotations

from turbolens_studio.guard import Access

TOKEN = "for-tests"
ACCESS = Access(TOKEN, frozenset({"lens.example.org"}), "turbolens-studio-test")
PROMPT = "a big red circle left of a big red square, sky background"
