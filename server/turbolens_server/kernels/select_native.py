"""The selection of :mod:`turbolens_server.kernels.select` as native code: the same bits, in less than half the time.

It is compiled with the packages that run a model on a CPU (`unet/native.py`), and serves where they do.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from turbolens_server.kernels.select import Pick

SOURCE: Final = """
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

extern "C" void pick(const float* pre, int64_t rows, int64_t width, int64_t k, float* values, int64_t* indices) {
  constexpr int64_t block = 64, few = 256;
  const int64_t padded = (width + block - 1) / block * block;
  std::vector<int32_t> keys(padded, 0), where(padded);
  std::vector<uint64_t> found(padded);
  int32_t* const key = keys.data();
  for (int64_t row = 0; row < rows; ++row, pre += width, values += k, indices += k) {
    // A positive float grows as its bits do, and NaN is above all of them. What is not positive is 0.
    std::memcpy(key, pre, width * sizeof(float));
    int32_t most = 0;
    for (int64_t j = 0; j < padded; ++j) {
      const int32_t bits = key[j], size = bits & 0x7fffffff, up = bits < 0 ? 0 : bits;
      const int32_t kept = size > 0x7f800000 ? size : up;
      key[j] = kept;
      most = most > kept ? most : kept;
    }
    // Halve the range until few more than k reach `least`; it stays 1 where fewer than k are positive.
    int32_t least = 1, above = most;
    while (above - least > 1) {
      const int32_t middle = least + (above - least) / 2;
      int32_t count = 0;
      for (int64_t j = 0; j < padded; ++j) count += key[j] >= middle;
      (count >= k ? least : above) = middle;
      if (count >= k && count <= k + k / 2) break;
    }
    int64_t n = 0;
    for (int64_t start = 0; start < padded; start += block) {
      int32_t any = 0;
      for (int64_t j = 0; j < block; ++j) any |= key[start + j] >= least;
      if (!any) continue;
      for (int64_t j = start; j < start + block; ++j) {  // without a branch that could be guessed wrong
        where[n] = static_cast<int32_t>(j);
        n += key[j] >= least;
      }
    }
    // The upper half is the value, the lower one the feature, the smaller as the larger number.
    for (int64_t i = 0; i < n; ++i)
      found[i] = static_cast<uint64_t>(key[where[i]]) << 32 | static_cast<uint32_t>(~where[i]);
    const auto put = [&](int64_t at, uint64_t entry) {
      const uint32_t bits = entry >> 32;
      std::memcpy(values + at, &bits, sizeof bits);
      indices[at] = static_cast<uint32_t>(~entry);
    };
    const int64_t chosen = std::min(n, k);
    if (n <= few) {  // counting who is larger is faster than sorting
      for (int64_t i = 0; i < n; ++i) {
        int64_t place = 0;
        for (int64_t j = 0; j < n; ++j) place += found[j] > found[i];
        if (place < k) put(place, found[i]);
      }
    } else {
      std::partial_sort(found.begin(), found.begin() + chosen, found.begin() + n, std::greater<uint64_t>());
      for (int64_t i = 0; i < chosen; ++i) put(i, found[i]);
    }
    for (int64_t j = 0, at = chosen; at < k; ++j)
      if (key[j] == 0) put(at++, static_cast<uint32_t>(~j));
  }
}
"""
"""C++, without anything of PyTorch."""


def load(library: Path) -> Pick:
    """What :data:`SOURCE` is compiled to; while it runs, other threads of Python do."""
    function = ctypes.CDLL(str(library)).pick
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [address, number, number, number, address, address], None

    def pick(pre: npt.NDArray[np.float32], values: npt.NDArray[np.float32], indices: npt.NDArray[np.int64]) -> None:
        if not (pre.flags.c_contiguous and values.flags.c_contiguous and indices.flags.c_contiguous):
            raise ValueError("rows that are not beside each other")
        function(pre.ctypes.data, *pre.shape, values.shape[1], values.ctypes.data, indices.ctypes.data)

    return pick
