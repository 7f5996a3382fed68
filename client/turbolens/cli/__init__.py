"""The `turbolens` command: its own verbs, and those that other distributions bring.

Exit codes: 0, it worked; 1, it failed; 2, it was asked for what cannot be, so asking again is of no use; 130, Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Final, NoReturn

import turbolens as tl

COMMANDS: Final = "turbolens.commands"
_OWN: Final = {
    "generate": "turbolens.cli.pictures:Generate",
    "extract": "turbolens.cli.pictures:Extract",
    "attribute": "turbolens.cli.attribute:Attribute",
    "extract-many": "turbolens.cli.many:ExtractMany",
    "generate-many": "turbolens.cli.many:GenerateMany",
    "sweep": "turbolens.cli.many:Sweep",
    "features": "turbolens.cli.features:FeatureCommands",
    "provenance": "turbolens.cli.provenance:Provenance",
    "replay": "turbolens.cli.replay:Replay",
    "steer": "turbolens.cli.steer:SteerCommands",
    "admin": "turbolens.cli.admin:AdminCommands",
    "doctor": "turbolens.cli.doctor:Doctor",
    "completion": "turbolens.cli.completion:Completion",
}
"""Where each verb is: imported when it is asked for, so that no other waits for it."""
_EXTRAS: Final = {
    "serve": "server",
    "token": "server",
    "studio": "studio",
    "engine": "server",
    "bench": "server",
    "sae": "server",
    "catalog": "training",
    "train": "training",
}
_HELP: Final = """turbolens: pictures of SDXL Turbo, the features behind them, and steering by those features

  turbolens serve                       serve a model (see turbolens serve --help)
  turbolens token NAME                  make a token for a caller of a server that asks for one
  turbolens admin load ./sae            have a server load SAEs while it serves; also: unload, reload, list
  turbolens studio                      explore, paint and compare in a browser; with --embedded, on a model of its own
  turbolens generate "a blue ring ..."  make pictures, steered or not
  turbolens extract "a blue ring ..."   show the features behind pictures
  turbolens attribute PROMPT FEATURE    say which words, positions and heads made a feature fire
  turbolens extract-many FILE OUT       features of very many prompts, as a table; also: generate-many, as pictures
  turbolens sweep PROMPT ...            one picture at many strengths of many features
  turbolens features search blue        find features by words; also: list, show, contrast
  turbolens steer apply FILE PROMPT     make a picture with a steering file; also: validate, diff
  turbolens provenance picture.png      say how a picture was made
  turbolens engine build                build a TensorRT engine; also: list, verify, prune
  turbolens train ...                   train the embedded model and SAEs
  turbolens sae import SRC OUT          make bundles of SAEs that another project trained
  turbolens catalog ...                 measure and name the features of bundles: build, import-labels
  turbolens bench                       measure this machine beside the bare diffusers pipeline
  turbolens replay picture.png          make it again and say whether it is equal, or what differs
  turbolens doctor                      say what is wrong
  turbolens completion bash             print what makes a shell complete all of this; also: zsh

  --help after any of them explains it; --version says the version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # a second one waits for nothing
        sys.exit(130)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP)
        return
    if args[0] == "--version":
        print(version("turbolens"))
        return
    name, rest = args[0], args[1:]
    if name in _EXTRAS:
        _installed(name, rest)
        return
    if name not in _OWN:
        _fail(2, f"no command {name!r}; there are {', '.join((*_OWN, *_EXTRAS))}")
    import tyro

    module, _, kind = _OWN[name].partition(":")
    command = tyro.cli(getattr(import_module(module), kind), args=rest, prog=f"turbolens {name}")
    try:
        command.run()
    except (tl.InvalidRequest, tl.NotFound, ValueError, TypeError) as error:
        _fail(2, error)
    except BrokenPipeError:
        raise
    except (tl.TurboLensError, RuntimeError, OSError) as error:
        _fail(1, error)


def _installed(command: str, argv: list[str]) -> None:
    """Run a command that another distribution brings, such as `serve`."""
    way_out = f"pip install 'turbolens[{_EXTRAS[command]}]'"
    found = list(entry_points(group=COMMANDS, name=command))
    if not found:
        _fail(1, f"{command} is not installed: {way_out}")
    try:
        found[0].load()(argv)
    except ModuleNotFoundError as error:
        if (error.name or "turbolens").startswith("turbolens"):
            raise
        _fail(1, f"{command} needs {error.name}, which is not installed: {way_out}")


def _fail(code: int, why: object) -> NoReturn:
    print(f"turbolens: {why}", file=sys.stderr)
    sys.exit(code)
