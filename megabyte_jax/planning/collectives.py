"""Counts the communication of a compiled program: its collectives, how often each runs and how many bytes it sends.

The source is the text of the optimised program (`compiled.as_text()`), the only form in which XLA shows collectives. A
stack of layers is a loop there, so each instruction of its body counts once per iteration. Between slices of TPUs the
runtime moves arrays through the hosts. XLA writes such a transfer as a send whose attributes name the collective.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALL = re.compile(r"(?:calls|to_apply|condition|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_OPERATION = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_BETWEEN_SLICES = re.compile(
  rf' = \((.*?), u32.* send\(.*_xla_megascale_target="\{{([^}}]*)\}}.*'
  rf'_xla_megascale_transfer_type="({"|".join(kind.replace("-", "_").upper() for kind in KINDS)})"'
)
_PIECE = re.compile(r"channel_id=(\d+),.*chain_id=\"(\d+)\"")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^}]*\}")
_OPERANDS = re.compile(r"\(\(([^()]*)\)")  # of a start: a tuple before its results (JAX 0.11.2, all-reduces, too)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: one of KINDS.
    arrays: bytes of each resulting array on one device; for a reduce-scatter, bytes of each input array.
    group: number of devices in one group.
    times: executions in one run of the program.
    name: the operation's name in the source program, as XLA recorded it; '' if it recorded none.
    between_slices: True if it uses the data centre's network; `group` then counts slices.
  """

  kind: str
  arrays: tuple[int, ...]
  group: int
  times: int
  name: str
  between_slices: bool = False

  @property
  def wire_bytes(self) -> float:
    """Bytes that each device sends in one run of the program, assuming ring algorithms."""
    share = (self.group - 1) / self.group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
    return sum(self.arrays) * factor * self.times


def collectives(hlo: str) -> list[Collective]:
  """Returns the collectives in the text of an optimised program, in its order, without groups of one device.

  XLA may spread one collective over several fusions to overlap it with their work. Each fusion then shows the whole
  collective under the same `channel_id` and `chain_id`, perhaps inside a loop. It is counted once, with the number of
  executions of the fusion that runs least often.
  """
  times = _runs(hlo)
  found: dict[object, Collective] = {}
  for computation, line in _lines(hlo):
    if not times[computation]:
      continue
    sent = _BETWEEN_SLICES.search(line)
    if sent:
      found[len(found)] = _between_slices(sent[1], sent[2], sent[3], times[computation])
    match = _OPERATION.search(line)
    if not match:
      continue
    shape, kind, started = match.groups()
    group = _group(line)
    arrays = _arrays(shape, kind, bool(started))
    if kind == "reduce-scatter":
      arrays = tuple(size * group for size in arrays)
    name = re.search(r'op_name="([^"]*)"', line)
    if group == 1:
      continue
    piece = _PIECE.search(line)
    key = (kind, *piece.groups()) if piece else len(found)
    if key not in found or times[computation] < found[key].times:
      found[key] = Collective(kind, arrays, group, times[computation], name[1] if name else "")
  return list(found.values())


def _between_slices(shape: str, slices: str, kind: str, times: int) -> Collective:
  """Returns the collective of one send between slices; `slices` lists the slices taking part, such as 1,2 or 1:4."""
  group = 0
  for part in slices.split(","):
    first, _, last = part.partition(":")
    group += int(last or first) - int(first) + 1
  kind = kind.lower().replace("_", "-")
  sizes = _sizes(shape)
  if kind == "all-gather":  # a device sends its part of the result
    sizes = [size * group for size in sizes]
  return Collective(kind, tuple(sizes), group, times, "", between_slices=True)


def _lines(hlo: str) -> Iterator[tuple[str, str]]:
  """Yields (name of its computation, line) of every instruction."""
  computation = ""
  for line in hlo.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      computation = header[2]
    elif " = " in line:
      yield computation, line


def _runs(hlo: str) -> dict[str, int]:
  """Counts the executions of each computation: loops of a known length multiply, calls add up."""
  entry = next((m[2] for m in map(_COMPUTATION.match, hlo.splitlines()) if m and m[1]), "")
  definitions: dict[str, dict[str, str]] = defaultdict(dict)
  for computation, line in _lines(hlo):
    text = line.strip()
    definitions[computation]["ROOT" if text.startswith("ROOT ") else text.split(" = ")[0].lstrip("%")] = text
  calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
  for computation, line in _lines(hlo):
    names, trips = _CALL.findall(line), 1
    if " while(" in line:
      trips = _trips(line, definitions)
    for many, one in _BRANCHES.findall(line):
      names += [name.strip().lstrip("%") for name in many.split(",")] if many else [one]
    calls[computation] += [(name, trips) for name in names]
  runs: dict[str, int] = defaultdict(int)
  todo = [(entry, 1)]  # the call graph has no cycles
  while todo:
    computation, count = todo.pop()
    runs[computation] += count
    todo += [(name, count * trips) for name, trips in calls[computation]]
  return runs


def _trips(line: str, definitions: dict[str, dict[str, str]]) -> int:
  """Returns the trip count of the loop in `line`; 1 where the text does not show it.

  CPU programs state it. In TPU programs it follows from the condition, `counter < limit`, and from the increment in the
  body (2 where XLA unrolled a loop that overlaps a gather with a product). Counters start at 0.
  """
  noted = _TRIPS.search(line)
  if noted:
    return int(noted[1])
  called = [re.search(rf"{key}=%?([\w.\-]+)", line) for key in ("condition", "body")]
  condition, body = (definitions[name[1]] for name in called if name)
  test = re.search(r" compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition.get("ROOT", ""))
  if not test or test[2] not in condition:
    return 1
  limit, place = _constant(condition[test[2]]), re.search(r"index=(\d+)", condition.get(test[1], ""))
  added = 1
  if place:
    results = re.findall(r"%([\w.\-]+)", body.get("ROOT", "").partition(" tuple(")[2])
    change = body.get(results[int(place[1])], "") if int(place[1]) < len(results) else ""
    operands = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", change)
    added = max(_constant(body.get(name, "")) for name in operands.groups()) if operands else 1
  return -(-limit // max(added, 1)) if limit else 1


def _constant(line: str) -> int:
  """Returns the value that an integer constant is defined with, 0 for any other line."""
  found = re.search(r"\[\]\S* constant\((\d+)\)", line)
  return int(found[1]) if found else 0


def _arrays(shape: str, kind: str, started: bool) -> tuple[int, ...]:
  """Returns the bytes of each result in an instruction's shape; an asynchronous start also lists operands and flags."""
  sizes = _sizes(shape)
  if started and (operands := _OPERANDS.match(_LAYOUT.sub("", shape))):
    count = len(_sizes(operands[1]))
    return tuple(sizes[count : 2 * count])
  if not started or kind == "all-reduce" or len(sizes) < 2:
    return tuple(sizes)
  if kind == "collective-permute":  # operand, result, two flags
    return (sizes[1],)
  return tuple(sizes[len(sizes) // 2 :])


def _sizes(shape: str) -> list[int]:
  """Returns the bytes of each array in a shape."""
  return [
    _BYTES.get(dtype, 1) * math.prod(int(d) for d in dims.split(",") if d)
    for dtype, dims in _SHAPE.findall(_LAYOUT.sub("", shape))
  ]


def _group(line: str) -> int:
  """Returns the number of devices in a replica group; 2 for a permute, which lists pairs instead.

  There are three notations: `{{0,1},{2,3}}`, `[groups,size]<=[..]`, and `mesh['a'=4,'b'=2] {'b'}`. In the last an axis
  may be split: `'a':(1)2` is a part of it with 2 devices.
  """
  if "source_target_pairs" in line:
    return 2
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  if listed:
    return len(listed[1].split(","))
  counted = re.search(r"replica_groups=\[(\d+(?:,\d+)*)\]<=", line)
  if counted:
    return int(counted[1].split(",")[-1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\S+\s*)?\{([^}]*)\}", line)
  if not named:
    return 2
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
  parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
  return math.prod(int(part) if part else sizes[name] for name, part in parts)
