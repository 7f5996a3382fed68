"""Packages of compiled code, run so that other threads of Python have their turn meanwhile.

PyTorch's own binding holds Python's global lock until a package has run, for tens of milliseconds or, on a large model,
seconds: no health check is answered, no caller heard, no picture coded. Called as a class of TorchScript, which lets go
of that lock, a package runs beside all of them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from turbolens_server.kernels import select_native

LIBRARY: Final = "native.so"
"""File that :func:`build` writes; the other one:"""
SELECT: Final = "select.so"
"""`kernels/select_native.py`."""
_SOURCE: Final = """
#include <ATen/Parallel.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

struct Package : torch::CustomClassHolder {
  Package(std::string path, int64_t callers)
      : loader(path, "model", /*run_single_threaded=*/callers == 1, /*num_runners=*/callers) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) {
    return loader.boxed_run(std::move(inputs));
  }
  torch::inductor::AOTIModelPackageLoader loader;
};

int64_t take_one_core() {
  at::get_num_threads();  // sets this thread's number to the process's, the first time
  omp_set_num_threads(1);
  return at::get_num_threads();
}

TORCH_LIBRARY(turbolens_compiled, library) {
  library.class_<Package>("Package").def(torch::init<std::string, int64_t>()).def("run", &Package::run);
  library.def("take_one_core", take_one_core);
}
"""

Run = Callable[[list[Tensor]], Sequence[Tensor]]
"""A loaded package."""


def compiler() -> str:
    """The C++ compiler, as PyTorch chooses it."""
    return os.environ.get("CXX", "g++")


def build(folder: Path) -> None:
    """Compile what loads packages, and what selects features, into a folder.

    Raises:
        RuntimeError: the compiler says why.
    """
    root = Path(torch.__file__).parent
    headers = root / "include"
    _compile(
        _SOURCE, folder / LIBRARY, "-O1", "-fopenmp",
        f"-I{headers}", f"-I{headers}/torch/csrc/api/include", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )  # fmt: skip
    build_select(folder)


def build_select(folder: Path) -> None:
    """Compile what selects features, for this CPU, into a folder.

    Raises:
        RuntimeError: the compiler says why.
    """
    _compile(select_native.SOURCE, folder / SELECT, "-O3", "-march=native")


def _compile(code: str, library: Path, *flags: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "native.cpp"
        source.write_text(code)
        command = [compiler(), "-std=c++20", "-fPIC", "-shared", str(source), "-o", str(library), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")


def load(package: Path, callers: int = 1) -> Run:
    """A package, unpacked in a folder beside what :func:`build` wrote, ready to run; for so many threads at a time,
    who share its weights."""
    run: Run = _package_class(package.parent / LIBRARY)(str(package), callers).run
    return run


def workers(count: int, name: str) -> ThreadPoolExecutor:
    """Threads in each of which PyTorch's libraries use one core, whatever the process's number; a package was loaded.

    PyTorch's own setting is of the process: a thread that began meanwhile would keep it.
    """
    return ThreadPoolExecutor(count, name, initializer=torch.ops.turbolens_compiled.take_one_core)


def _package_class(library: Path) -> Any:
    """The class; a process loads it once, whichever folder's, since they are all the same."""
    try:
        return torch.classes.turbolens_compiled.Package
    except RuntimeError:  # not there yet
        torch.classes.load_library(str(library))
        return torch.classes.turbolens_compiled.Package
