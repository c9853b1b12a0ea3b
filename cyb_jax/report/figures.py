"""The pictures of reports: PNG files, drawn on matplotlib's Agg canvas without its global state.

Colours are those of Okabe and Ito, and cividis for scales, which colour-blind readers can distinguish. Lines differ in
style and marker, and bars in hatching, so that they can also be distinguished in black and white. Text is readable when
a picture is 330 pixels wide.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax.errors import InputError

try:
  import matplotlib
  import matplotlib.patheffects
  import matplotlib.ticker
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.colors import LogNorm
  from matplotlib.figure import Figure
except ImportError:
  raise InputError("matplotlib: not installed, but the figures need it; pip install 'cyb_jax[report]'") from None

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D00")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 2, 2)))
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "---", "++")
_WIDTH, _DPI = 4.8, 200
_FONT = {"font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "legend.fontsize": 9.5, "hatch.linewidth": 0.6}

# (name, x, y) or (name, x, y, low, high) of a line.
Series = tuple[Any, ...]


def _draw(paint: Callable[[Figure], None], height: float) -> bytes:
  """The PNG of a figure that `paint` draws; matplotlib's global state does not change."""
  with matplotlib.rc_context(matplotlib.rcParamsDefault):
    matplotlib.rcParams.update(_FONT)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    paint(figure)
    out = io.BytesIO()
    # Without matplotlib's version, so that equal numbers give equal files.
    canvas.print_png(out, metadata={"Software": None})
  return out.getvalue()


def lines(
  series: Sequence[Series],
  *,
  x: str,
  y: str,
  log_x: bool = False,
  log_y: bool = False,
  legend: bool = True,
  level: float | None = None,
  diagonal: bool = False,
  x_ticks: Sequence[float] | None = None,
) -> bytes:
  """Lines with markers.

  Args:
    series: (name, x, y), or (name, x, y, low, high) with a band.
    x, y: the labels of the axes, with their unit.
    log_x, log_y: whether the axes are logarithmic.
    legend: whether names are shown.
    level: the height of a horizontal line; None: no such line.
    diagonal: whether to draw the line y = x.
    x_ticks: the ticks of the x axis; None: chosen automatically.
  """

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    if level is not None:
      axes.axhline(level, color="#777777", linewidth=1, linestyle=":")
    if diagonal:
      axes.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle=":")
    for i, (name, xs, ys, *band) in enumerate(series):
      style = {"color": COLOURS[i % 8], "linestyle": _LINES[i % 8], "marker": _MARKERS[i % 8]}
      axes.plot(xs, ys, label=name, linewidth=1.8, markersize=5, markevery=max(len(xs) // 12, 1), **style)
      if band:
        axes.fill_between(xs, *band, color=COLOURS[i % 8], alpha=0.2, linewidth=0)
    _scales(axes, log_x, log_y)
    if x_ticks is not None:
      axes.set_xticks(x_ticks)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    if legend:
      _legend(figure, axes, len(series))

  return _draw(paint, 3.4 + (0.28 * math.ceil(len(series) / 2) if legend else 0))


def trade_off(
  marks: Sequence[tuple[str, int, float, float, float, float, bool, bool]], names: Sequence[str], *, x: str, y: str
) -> bytes:
  """Numbered points on logarithmic axes, with error bars over seeds, and a dashed line through the Pareto front.

  Args:
    marks: (the text next to the point, the index of its name, x, y, low, high, whether it is hollow, whether it is on
      the front).
    names: the names of the points; a hollow point shares the name of a solid point.
    x, y: the labels of the axes, with their unit.
  """

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    front = sorted((px, py) for _, _, px, py, _, _, _, on in marks if on)
    if len(front) > 1:
      axes.step(*zip(*front), where="post", color="#777777", linewidth=1.2, linestyle="--", zorder=1)
    solid = {name: (px, py) for _, name, px, py, _, _, hollow, _ in marks if not hollow}
    for _, name, px, py, low, high, hollow, _ in marks:
      colour = COLOURS[name % 8]
      if hollow:
        axes.plot(*zip(solid[name], (px, py)), color=colour, linewidth=1, linestyle=":", zorder=1)
      axes.errorbar(
        [px], [py], yerr=[[max(py - low, 0)], [max(high - py, 0)]], fmt=_MARKERS[(name + name // 8) % 8], color=colour,
        markerfacecolor="#ffffff" if hollow else colour, markersize=6, capsize=3, elinewidth=1, zorder=2,
        label=None if hollow else names[name],
      )  # fmt: skip
    axes.margins(0.12)
    _scales(axes, True, True)
    _annotate(axes, [(words, px, py) for words, _, px, py, *_ in marks])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    _legend(figure, axes, len(names))

  columns = 2 if max(map(len, names)) <= 22 else 1
  return _draw(paint, 4.2 + 0.23 * math.ceil(len(names) / columns))


def _annotate(axes: Any, words: Sequence[tuple[str, float, float]]) -> None:
  """Writes text next to points of logarithmic axes, each on the least crowded side."""
  sides = {(5, 3): (1, 1), (-5, 3): (-1, 1), (5, -9): (1, -1), (-5, -9): (-1, -1), (0, 7): (0, 1), (0, -13): (0, -1)}
  spots = np.array([axes.transData.transform((x, y)) for _, x, y in words]) / _DPI * 72
  taken = list(spots)
  for (text, x, y), spot in zip(words, spots):
    centres = {offset: spot + np.multiply(side, (8, 9)) for offset, side in sides.items()}

    def crowd(offset: tuple[int, int], centres: dict = centres) -> float:
      return float(sum(np.exp(-((np.linalg.norm(centres[offset] - other) / 8) ** 2)) for other in taken))

    offset = min(sides, key=crowd)
    taken.append(centres[offset])
    across = {1: "left", -1: "right", 0: "center"}[sides[offset][0]]
    halo = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground="#ffffff")]
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha=across, fontsize=8.5, path_effects=halo)


def bars(
  names: Sequence[str],
  values: Sequence[float],
  *,
  x: str,
  low: Sequence[float] | None = None,
  high: Sequence[float] | None = None,
  zero: bool = False,
) -> bytes:
  """Values with their numbers, one above the other, the first value on top.

  Args:
    names: the names of the values.
    values: drawn as dots on an axis that covers their range, or as bars from 0.
    x: the label of the axis, with its unit.
    low, high: the ends of the error bars.
    zero: whether to draw bars from 0.
  """

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    rows = np.arange(len(names))
    errors = None
    if low is not None and high is not None:
      errors = np.maximum([np.subtract(values, low), np.subtract(high, values)], 0)
    if zero:
      axes.barh(rows, values, height=0.65, color=COLOURS[4], edgecolor="#000000", linewidth=0.8)
      if errors is not None:
        axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor="#000000", capsize=3, linewidth=1.2)
      axes.axvline(0, color="#000000", linewidth=0.8)
    else:
      axes.errorbar(values, rows, xerr=errors, fmt="o", color=COLOURS[0], capsize=4, linewidth=1.6, markersize=7)
      axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    ends = values if errors is None else np.add(values, errors[1])
    for row, end, value in zip(rows, ends, values):
      at = max(end, 0) if zero else end, row
      axes.annotate(_brief(value, 4), at, (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(rows, [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    left, right = axes.get_xlim()
    # Space for the numbers.
    axes.set_xlim(left, right + 0.14 * (right - left))
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(_BRIEF)
    axes.set_xlabel(x)

  return _draw(paint, 1.0 + 0.34 * max(len(names), 3))


def grouped_bars(names: Sequence[str], series: Sequence[tuple[Any, ...]], *, x: str, y: str) -> bytes:
  """Bars side by side.

  Args:
    names: the names along the x axis.
    series: (name, values), or (name, values, deviations) with error bars; a value may be None.
    x, y: the labels of the axes, with their unit.
  """

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    centres = np.arange(len(names))
    width = 0.82 / len(series)
    for i, (name, values, *deviations) in enumerate(series):
      values = [np.nan if value is None else value for value in values]
      axes.bar(
        centres + (i - (len(series) - 1) / 2) * width, values, width, label=name, color=COLOURS[i % 8],
        hatch=_HATCHES[i % 8], edgecolor="#ffffff" if i % 8 != 6 else "#999999", linewidth=0.4,
        yerr=deviations[0] if deviations else None, capsize=3, ecolor="#000000",
      )  # fmt: skip
    axes.set_xticks(centres, [_short(name) for name in names])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(series) > 1:
      _legend(figure, axes, len(series))

  return _draw(paint, 3.2 + (0.28 * math.ceil(len(series) / 2) if len(series) > 1 else 0))


def histogram(edges: Sequence[float], counts: Sequence[float], *, x: str, y: str, mean: float | None = None) -> bytes:
  """Counts between edges, and a line at the mean."""

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=COLOURS[4])
    axes.stairs(counts, edges, color="#000000", linewidth=0.8)
    if mean is not None:
      axes.axvline(mean, color=COLOURS[1], linewidth=2, linestyle="--", label=f"mean {mean:.3g}")
      _legend(figure, axes, 1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)

  return _draw(paint, 3.4)


def density(
  x_edges: Sequence[float], y_edges: Sequence[float], counts: Sequence[Sequence[float]], *, x: str, y: str
) -> bytes:
  """Counts over a plane on a logarithmic colour scale; empty cells are white. The y axis covers the non-empty cells."""

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    cells = np.ma.masked_equal(np.asarray(counts, float).T, 0)
    norm = LogNorm(vmin=1, vmax=max(float(cells.max() or 1), 2)) if cells.count() else None
    mesh = axes.pcolormesh(x_edges, y_edges, cells, norm=norm, cmap="cividis_r")
    axes.axhline(0, color="#000000", linewidth=0.8, linestyle=":")
    axes.set_xlim(x_edges[0], x_edges[-1])
    used = np.flatnonzero(cells.count(axis=1)) if cells.count() else np.array([0, len(y_edges) - 2])
    axes.set_ylim(y_edges[max(used[0] - 1, 0)], y_edges[min(used[-1] + 2, len(y_edges) - 1)])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.colorbar(mesh, ax=axes, label="tokens", format=_BRIEF)

  return _draw(paint, 3.6)


def points(clouds: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[str]]], *, x: str, y: str) -> bytes:
  """Clouds of points, (name, x, y, words); the word of each cloud's outermost point is written next to it."""

  def paint(figure: Figure) -> None:
    axes = figure.add_subplot()
    every = [np.concatenate([np.asarray(cloud[k], np.float64) for cloud in clouds]) for k in (1, 2)]
    middle = [float(np.median(values)) if len(values) else 0.0 for values in every]
    span = [float(np.ptp(values)) or 1.0 if len(values) else 1.0 for values in every]
    for i, (name, xs, ys, words) in enumerate(clouds):
      axes.scatter(xs, ys, 26, color=COLOURS[i % 8], marker=_MARKERS[i % 8], label=name, alpha=0.8, linewidths=0)
      if len(xs):
        off = [np.abs(np.asarray(values) - m) / s for values, m, s in zip((xs, ys), middle, span)]
        outermost = int(np.argmax(off[0] + off[1]))
        point = xs[outermost], ys[outermost]
        axes.annotate(_plain(words[outermost]), point, (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.margins(0.12)
    _legend(figure, axes, len(clouds))

  return _draw(paint, 4.0)


def stacked_lines(panels: Sequence[tuple[str, bool, Sequence[Series]]], *, x: str) -> bytes:
  """Panels (y label, whether it is logarithmic, series) with a shared x axis."""

  def paint(figure: Figure) -> None:
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, log, series) in zip(grid, panels):
      for i, (name, xs, ys) in enumerate(series):
        style = {"color": COLOURS[i % 8], "linestyle": _LINES[i % 8], "marker": _MARKERS[i % 8]}
        axes.plot(xs, ys, label=name, linewidth=1.6, markersize=4.5, markevery=max(len(xs) // 12, 1), **style)
      _scales(axes, False, log)
      axes.set_ylabel(label)
      axes.grid(color="#dddddd", linewidth=0.6)
      if len(series) > 1:
        axes.legend(frameon=False)
    grid[-1].set_xlabel(x)

  return _draw(paint, 1.0 + 2.3 * len(panels))


def _scales(axes: Any, log_x: bool, log_y: bool) -> None:
  for log, axis, scale in ((log_x, axes.xaxis, axes.set_xscale), (log_y, axes.yaxis, axes.set_yscale)):
    axis.set_major_formatter(_BRIEF)
    if not log:
      axis.set_major_locator(_few_ticks())
      continue
    scale("log")
    low, high = axis.get_view_interval()
    if high / low < 100:
      # The axis has too few powers of ten to read a value from them.
      steps = matplotlib.ticker.LogLocator(10, subs=(1, 2, 5), numticks=20)
      few = sum(low <= tick <= high for tick in steps.tick_values(low, high)) < 3
      axis.set_major_locator(_few_ticks() if few else steps)
      axis.set_major_formatter(_BRIEF)
      axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _few_ticks() -> Any:
  return matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def _brief(value: float, digits: int = 3) -> str:
  for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
    if abs(value) >= size:
      return f"{value / (1e3 if letter == 'k' else size):.{digits}g}{letter}"
  return f"{value:.{max(digits, 4)}g}"


_BRIEF = matplotlib.ticker.FuncFormatter(lambda value, _: _brief(value))


def _legend(figure: Figure, axes: Any, count: int) -> None:
  handles, names = axes.get_legend_handles_labels()
  names = [_short(name, 40) for name in names]
  columns = 2 if count > 1 and max(map(len, names)) <= 22 else 1
  figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.8)


def _short(name: str, most: int = 22) -> str:
  name = _plain(str(name))
  return name if len(name) <= most else f"{name[: most - 1]}…"


def _plain(text: str) -> str:
  """Text that matplotlib can draw: no formulas, and no characters that its font lacks."""
  return "".join(c if c.isprintable() and ord(c) < 0x2600 else "?" for c in text).replace("$", r"\$")


def shares(values: Iterable[float]) -> str:
  """Shares as text, for the alternative text of a picture."""
  return ", ".join(f"{value:.3f}" for value in values)


def finite(rows: Iterable[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
  """The values of two fields, for the rows that have both."""
  pairs = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
  return [a for a, _ in pairs], [b for _, b in pairs]
