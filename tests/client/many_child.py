"""A run of many prompts in a process of its own, for tests that kill it: TARGET OUT KIND."""

import sys

import turbolens as tl
from turbolens._many import tables

PROMPTS = [f"prompt {i}" if i % 50 else f"bad {i}" for i in range(400)]

if __name__ == "__main__":
    tables._PART_ITEMS = 32
    target, out, kind = sys.argv[1:]
    with tl.connect(target) as lens:
        if kind == "pictures":
            lens.generate_many(PROMPTS, out, seeds=[1, 2], progress=False)
        else:
            lens.extract_many(PROMPTS, out, seeds=[1, 2], progress=False)
