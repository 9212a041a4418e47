"""Lists the kernels of a GPU program by total time, from a device trace of JAX's profiler."""

from __future__ import annotations

import collections
import pathlib
import re

import jax

_PRODUCT = re.compile(r"nvjet|gemm|cutlass|cublas|xmma|dot", re.IGNORECASE)
_ATTENTION = re.compile(r"fmha|flash|attention|cudnn|forward_kernel|backward_kernel", re.IGNORECASE)


def kernel_times(folder: str, times: int) -> list[tuple[str, str, float, int]]:
  """Returns (kind, kernel, milliseconds, launches), largest first, of each of `times` equal parts of the newest trace.

  Kernels whose names differ in a number only are one. The kind is product, attention, copy or other.
  """
  file = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  milliseconds: dict[str, float] = collections.defaultdict(float)
  launches: dict[str, int] = collections.defaultdict(int)
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    if not plane.name.startswith("/device:GPU"):
      continue
    for line in plane.lines:
      if "Stream" not in line.name:
        continue
      for event in line.events:
        name = re.sub(r"[_.]?\d+$", "", event.name)
        milliseconds[name] += event.duration_ns / 1e6 / times
        launches[name] += 1
  return [(_kind(name), name, ms, round(launches[name] / times)) for name, ms in _largest_first(milliseconds)]


def _largest_first(sums: dict[str, float]) -> list[tuple[str, float]]:
  return sorted(sums.items(), key=lambda item: item[1], reverse=True)


def _kind(name: str) -> str:
  if _ATTENTION.search(name):
    return "attention"
  if _PRODUCT.search(name):
    return "product"
  return "copy" if "Memcpy" in name or "Memset" in name else "other"


def summary(kernels: list[tuple[str, str, float, int]], largest: int = 10) -> str:
  """Returns lines for people: the share of each kind, and the largest kernels."""
  if not kernels:
    return "the trace has no kernels of a GPU"
  total = sum(ms for _, _, ms, _ in kernels)
  kinds: dict[str, float] = collections.defaultdict(float)
  for kind, _, ms, _ in kernels:
    kinds[kind] += ms
  shares = ", ".join(f"{kind} {ms:.1f} ms ({ms / total:.0%})" for kind, ms in _largest_first(kinds))
  lines = [f"kernels {total:.1f} ms, {sum(n for *_, n in kernels)} launches: {shares}"]
  lines += [f"  {ms:9.2f} ms {n:6d} x  {kind:<9} {name[:100]}" for kind, name, ms, n in kernels[:largest]]
  return "\n".join(lines)
