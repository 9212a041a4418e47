"""Draws every picture of the project as a PNG file.

matplotlib is imported when the first picture is drawn. It is used without pyplot: no window system, no global state.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from megabyte_jax.errors import PlotError
from megabyte_jax.files.atomic_file import replacing

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#8a8a8a"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_STYLE: dict[Any, Any] = {  # Any: matplotlib declares a type of all its keys
  "axes.axisbelow": True,
  "axes.edgecolor": "#b0b0b0",
  "axes.grid": True,
  "axes.labelsize": 10,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 12,
  "axes.titleweight": "bold",
  "font.size": 9.5,
  "grid.color": "#e8e8e8",
  "legend.frameon": False,
  "lines.solid_capstyle": "round",
  "xtick.color": "#b0b0b0",
  "xtick.labelcolor": "#404040",
  "ytick.color": "#b0b0b0",
  "ytick.labelcolor": "#404040",
}
_WHOLE_CURVE = 30  # shorter training curves are shown without smoothing


def loss_curve(metrics_jsonl: epath.PathLike, out_png: epath.PathLike) -> None:
  """Draws bits per byte over training: every progress line, a smoothed curve, and the validation points.

  Args:
    metrics_jsonl: as `metrics.Metrics` writes it; `bpb` and `validation_bpb` are drawn.
    out_png: path of the picture.

  Raises:
    PlotError: the file is missing, or no line in it has a bpb.
  """
  if not epath.Path(metrics_jsonl).exists():
    raise PlotError(f"{metrics_jsonl} does not exist; train.py writes it into its --workdir")
  records = _records(epath.Path(metrics_jsonl).read_text())
  steps, bpb = _series(records, "bpb")
  validation_steps, validation = _series(records, "validation_bpb")
  if not len(steps) and not len(validation_steps):
    raise PlotError(f"{metrics_jsonl} has no bpb in any line; train for at least config.log_every steps")
  with _axes(out_png, "Training", "optimizer steps", "bits per byte") as axes:
    values = list(validation)
    if len(steps) < _WHOLE_CURVE:
      axes.plot(steps, bpb, color=_COLORS[0], marker=".", label="training")
      values += list(bpb)
    else:
      smooth = _smooth(bpb)
      axes.plot(steps, bpb, color=_COLORS[0], alpha=0.3, linewidth=1)
      axes.plot(steps, smooth, color=_COLORS[0], linewidth=2, label="training (smoothed)")
      values += list(smooth)
      # The first steps fall from 8 bits within a moment, and would press all the rest into the lowest part.
      late = bpb[len(bpb) // 50 :]
      low, high = min([late.min(), *validation]), max([*smooth[len(smooth) // 20 :], *validation])
      margin = 0.12 * (high - low) or 0.1
      axes.set_ylim(low - margin, high + 2 * margin)
    if len(validation_steps):
      axes.plot(
        validation_steps, validation, "o", color=_COLORS[1], markersize=5, markeredgecolor="white", label="validation"
      )
      below = len(steps) and bpb[-1] > validation[-1]  # the curve; else its number would cover that
      axes.annotate(
        f"{validation[-1]:.3f}",
        (validation_steps[-1], validation[-1]),
        xytext=(-7, -4) if below else (0, 9),
        textcoords="offset points",
        ha="right" if len(validation_steps) > 1 or len(steps) else "center",
        color=_COLORS[1],
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
      )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(left=0)
    axes.legend(loc="upper right")


def loss_by_position(
  values_by_position: Sequence[float] | Mapping[str, Sequence[float]],
  out_png: epath.PathLike,
  title: str,
  xlabel: str,
  *,
  bin_width: int = 1,
  weights: Sequence[float] | None = None,
) -> None:
  """Draws the mean loss by position in a patch (Fig. 5 of the paper) or in the context (Fig. 4).

  Args:
    values_by_position: bits per byte at each position or in each bin; several curves as {name: values}. NaN leaves a
      gap where nothing was scored.
    out_png: path of the picture.
    title, xlabel: texts.
    bin_width: bytes per value, drawn at the middle of its bin; 1 draws at positions 0, 1, ...
    weights: bytes at each position or in each bin of a single curve, for its mean; None takes all alike.

  Raises:
    PlotError: a curve has no finite value.
  """
  several = isinstance(values_by_position, Mapping)
  given = values_by_position if isinstance(values_by_position, Mapping) else {"": values_by_position}
  curves = {name: np.asarray(values, np.float64) for name, values in given.items()}
  for name, values in curves.items():
    if not np.isfinite(values).any():
      raise PlotError(f"no position of {name or 'the curve'} has a loss to draw in {out_png}")
  with _axes(out_png, title, xlabel, "bits per byte") as axes:
    for (name, values), color in zip(curves.items(), itertools.cycle(_COLORS), strict=False):
      x = np.arange(len(values)) * bin_width + (bin_width - 1) / 2
      marker: dict[str, Any] = {"marker": "o", "markersize": 6, "markeredgecolor": "white"} if len(values) <= 64 else {}
      axes.plot(x, values, color=color, linewidth=2, label=name, **marker)
      if not several:
        known = np.isfinite(values)
        mean = float(np.average(values[known], weights=None if weights is None else np.asarray(weights)[known]))
        axes.axhline(mean, color=_GREY, linewidth=1, linestyle=_DASHES[1], zorder=1)
        axes.annotate(
          f"mean {mean:.3f}",
          (1, mean),
          xycoords=axes.get_yaxis_transform(),
          xytext=(4, 0),  # beside the picture: within it the curve would run through the number
          textcoords="offset points",
          va="center",
          color=_GREY,
          annotation_clip=False,
        )
    positions = max(map(len, curves.values()))
    if bin_width == 1 and positions <= 16:
      axes.set_xticks(range(positions))
    else:
      axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(y=0.15)
    if several:
      axes.legend(loc="best")


def flops_per_byte(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], out_png: epath.PathLike) -> None:
  """Draws forward FLOPs per byte over the sequence length, both on logarithmic axes (Fig. 3 of the paper).

  Args:
    curves: {name: (sequence lengths in bytes, FLOPs per byte)}. The last word of a name is the model's size; names that
      agree in the rest share a colour.
    out_png: path of the picture.

  Raises:
    PlotError: there is no curve.
  """
  if not curves:
    raise PlotError(f"no curve to draw in {out_png}")
  families: dict[str, list[str]] = {}
  for name in curves:
    families.setdefault(name.rpartition(" ")[0] or name, []).append(name)
  with _axes(out_png, "Compute per byte", "sequence length (bytes)", "forward FLOPs per byte", width=8) as axes:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for (family, names), color in zip(families.items(), itertools.cycle(_COLORS), strict=False):
      for i, name in enumerate(names):
        line: dict[str, Any] = {"color": color, "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 2}
        axes.plot(*curves[name], label=family if i == 0 else None, **line)
    lengths = sorted({length for xs, _ in curves.values() for length in xs})
    ticks = lengths if len(lengths) <= 7 else lengths[:: -(-len(lengths) // 7)]
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.minorticks_off()
    colors = {
      name: color for names, color in zip(families.values(), itertools.cycle(_COLORS), strict=False) for name in names
    }
    _label_ends(axes, {name: (xs[-1], ys[-1], colors[name]) for name, (xs, ys) in curves.items()})
    axes.legend(loc="upper left")


def lines(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  title: str,
  xlabel: str,
  ylabel: str,
  out_png: epath.PathLike,
  *,
  log: bool = False,
  training: bool = False,
) -> None:
  """Draws several curves in one picture.

  Args:
    curves: {name: (x, y)}.
    title, xlabel, ylabel: texts.
    out_png: path of the picture.
    log: makes both axes logarithmic and marks every point.
    training: smooths the curves and cuts the picture off at the top, above which a tenth of all points may lie.

  Raises:
    PlotError: there is no curve.
  """
  if not curves:
    raise PlotError(f"no curve to draw in {out_png}")
  with _axes(out_png, title, xlabel, ylabel) as axes:
    for i, (name, (x, y)) in enumerate(curves.items()):
      dash = _DASHES[i // len(_COLORS) % len(_DASHES)]  # another one when all colours are taken
      line: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "linestyle": dash, "linewidth": 2, "label": name}
      if log:
        line |= {"marker": "o", "markersize": 5}
      values = np.asarray(y, np.float64)
      axes.plot(x, _smooth(values) if training and len(values) > _WHOLE_CURVE else values, **line)
    if log:
      axes.set_xscale("log")
      axes.set_yscale("log")
    if training:
      every = np.concatenate([np.asarray(y, np.float64) for _, y in curves.values()])
      low, high = every.min(), np.quantile(every, 0.9)
      axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
    axes.legend()


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
  """Writes the last word of each name beside the end (x, y, color) of its curve, without overlaps."""
  bottom, top = np.log10(axes.get_ylim())
  gap = (top - bottom) * 0.042
  last = -np.inf
  for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
    last = max(np.log10(y), last + gap)
    size = name.rpartition(" ")[2]
    axes.annotate(
      size, (x, 10**last), xytext=(6, 0), textcoords="offset points", va="center", color=color, annotation_clip=False
    )


@contextlib.contextmanager
def panels(out_png: epath.PathLike, count: int) -> Iterator[list[Axes]]:
  """Yields axes side by side; those with labels get a legend, and they are saved if the block ends without an error."""
  with _figure(out_png, count, 10.0) as row:
    for axes in row:
      axes.set_prop_cycle(color=_COLORS)
    yield row
    for axes in row:
      if axes.get_legend_handles_labels()[0]:
        axes.legend()


@contextlib.contextmanager
def _axes(out_png: epath.PathLike, title: str, xlabel: str, ylabel: str, width: float = 7.0) -> Iterator[Axes]:
  """Yields axes to draw on, saved as `out_png` if the block ends without an error."""
  with _figure(out_png, 1, width) as [axes]:
    axes.set_title(title, parse_math=False)  # names of files may hold a dollar sign
    axes.set(xlabel=xlabel, ylabel=ylabel)
    yield axes


@contextlib.contextmanager
def _figure(out_png: epath.PathLike, count: int, width: float) -> Iterator[list[Axes]]:
  """Yields axes side by side, saved as `out_png` if the block ends without an error."""
  import matplotlib as mpl  # noqa: PLC0415  (slow, and few commands draw)
  from matplotlib.figure import Figure  # noqa: PLC0415
  from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

  with mpl.rc_context(_STYLE):
    figure = Figure(figsize=(width, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    yield [figure.add_subplot(1, count, 1 + i) for i in range(count)]
    with replacing(out_png) as path, path.open("wb") as file:
      figure.savefig(file, format="png", dpi=150)


def _records(text: str) -> list[dict[str, Any]]:
  """Returns the complete lines of a JSONL file, parsed; the last line may still be in the making.

  Raises:
    PlotError: a line is not JSON; says which.
  """
  records = []
  for number, line in enumerate(text.splitlines(keepends=True), 1):
    if line.endswith("\n"):
      try:
        records.append(json.loads(line))
      except (ValueError, RecursionError) as error:
        raise PlotError(f"line {number} of the metrics is not JSON ({error}); remove it") from error
  return records


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, values) of the records that have a finite `key`."""
  found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
  steps, values = np.asarray(found, np.float64).reshape(-1, 2).T
  return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
  """Returns a Gaussian running mean, with a standard deviation of 1% of the curve, normalised at both ends."""
  width = max(1.0, len(values) / 100)
  reach = int(3 * width)
  bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
  return np.convolve(values, bell, "same") / np.convolve(np.ones_like(values), bell, "same")
