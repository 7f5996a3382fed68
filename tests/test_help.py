"""Every command explains itself at once: nothing heavy is imported for it, whatever the command itself would need."""

from __future__ import annotations

import json
import subprocess
import sys

COMMANDS = """
serve; token; studio; generate; extract; attribute; extract-many; generate-many; sweep; replay; provenance; doctor
completion; features; features search; features list; features contrast; features show; steer; steer validate
steer apply; steer diff; admin; admin load; admin unload; admin reload; admin list; engine; engine build; engine list
engine verify; engine prune; bench; sae; sae import; catalog; catalog build; catalog import-labels; train; train mini
train sae; train sweep; train cache; train cache fill; train cache verify; train cache import-tars; train dose
train eval; train regions; train riebench; train nested; train temporal; train words; train gates; train rebuild
"""
HEAVY = ("torch", "diffusers", "transformers", "scipy", "matplotlib", "pandas", "pyarrow", "onnxruntime", "sklearn")
PROGRAM = """
import contextlib, io, json, sys, time
told, began = {}, time.process_time()
from turbolens.cli import _EXTRAS, _OWN, main
for command in sys.argv[1:]:
    told[command] = out = {}
    began = time.process_time() if len(told) > 1 else began
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            main([*command.split(), "--help"])
        except SystemExit as ended:
            out["code"] = ended.code
    out |= {"seconds": time.process_time() - began, "text": said.getvalue(), "modules": sorted(sys.modules)}
print(json.dumps({"told": told, "commands": [*_OWN, *_EXTRAS]}))
"""

LIBRARIES = """
import time
began = time.process_time()
import asyncio, grpc, numpy, structlog, tyro
print(time.process_time() - began)
"""


def said_by(program: str, *arguments: str) -> str:
    run = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_command_explains_itself_at_once_without_torch():
    commands = [command.strip() for line in COMMANDS.strip().splitlines() for command in line.split(";")]
    result = json.loads(said_by(PROGRAM, *commands))
    # The first imports all that others need too. Of three runs, since one may fall into a busy moment.
    first, *_ = commands
    again = [json.loads(said_by(PROGRAM, first))["told"][first]["seconds"] for _ in range(2)]
    result["told"][first]["seconds"] = min(result["told"][first]["seconds"], *again)
    # A second, or on a slow machine four times what the libraries take by themselves.
    at_once_s = max(1, 4 * min(float(said_by(LIBRARIES)) for _ in range(3)))
    assert {command.split()[0] for command in commands} == set(result["commands"]), "a command is not tried here"
    for command, told in result["told"].items():
        assert told["code"] == 0, f"{command}: {told['text']}"
        assert command in told["text"], command
        assert not set(HEAVY) & set(told["modules"]), command
        # Of the processor's time, which other work on the machine does not lengthen as it does the clock's.
        assert told["seconds"] < at_once_s, f"{command}: {told['seconds']:.2f} s, at once is {at_once_s:.2f}"
