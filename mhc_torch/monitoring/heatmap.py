"""Mixing weights as a heatmap: its cells and colours, and a picture of it that is drawn in milliseconds.

A figure of matplotlib takes a third of a second of Python for fifty layers. Drawn in a thread, it would hold the
interpreter for as long, and training would wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from jaxtyping import Float
from torch import Tensor

try:
    import matplotlib as mpl
    from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'mhc-jax[viz]'") from error

from mhc_torch.monitoring.diagnostics import history_columns

NOT_LIVE, PRUNED = "0.85", "black"
LEGEND = {"0 (pruned)": PRUNED, "no such state yet": NOT_LIVE}
# A weight that is less than this part of the largest has the lowest colour, still not that of zero.
_SMALLEST = 1e-6
# Colours darker than this could be taken for black.
_DARK = 0.2
# In pixels. With what stands around the cells, a picture is at most 1080 high.
_CELLS_WIDTH, _CELLS_HEIGHT, _ROW, _LINE, _MARGIN = 320, 960, 12, 12, 10


def heat_cells(weights: Mapping[str, Float[Tensor, "_"]]) -> Float[np.ndarray, "layers columns"]:
    """A row for each layer, NaN where it has no such state.

    Raises:
        ValueError: ``weights`` is empty.
    """
    if not weights:
        raise ValueError("weights: no history layer to draw; the model holds no MHCSkip or MatrixMHCSkip that mixes")
    columns = history_columns(weights)
    cells = np.full((len(weights), max(places.stop for places in columns.values())), np.nan)
    for row, (name, alpha) in zip(cells, weights.items(), strict=True):
        row[columns[name]] = alpha.detach().cpu().double().numpy()
    return cells


def colour_scale(cells: Float[np.ndarray, "layers columns"]) -> Normalize:
    """From the smallest weight to the largest: logarithmic, or linear where there are negative ones.

    Weights that differ by powers of ten, as those of a residual start, so differ in colour; zero is no part of it.
    """
    given = cells[np.isfinite(cells)]
    least, most = given.min(initial=1.0), given.max(initial=0.0)
    if least < 0:
        return Normalize(least, max(most, least + 1), clip=True)
    most = most or 1.0
    least = given[given > 0].min(initial=most)
    return LogNorm(min(max(least, most * _SMALLEST), most / 2), most, clip=True)


def scale_ticks(norm: Normalize) -> list[float]:
    """Five weights in equal distances on the colour scale, the smallest and the largest among them."""
    return norm.inverse(np.linspace(0, 1, 5)).tolist()


def colours(cmap: str) -> Colormap:
    """A colour map without its dark end, so that only zero looks black; grey where there is no such state.

    Raises:
        ValueError: matplotlib has no colour map of this name.
    """
    if cmap not in mpl.colormaps:
        raise ValueError(f"cmap must be the name of a colour map of matplotlib such as 'viridis', got {cmap!r}")
    every = mpl.colormaps[cmap](np.linspace(0, 1, 256))
    light = every[every[:, :3] @ (0.3, 0.6, 0.1) >= _DARK]
    return ListedColormap(light if len(light) > 1 else every).with_extremes(bad=NOT_LIVE)


def mixing_picture(weights: Mapping[str, Float[Tensor, "_"]]) -> Image.Image:
    """The heatmap of :func:`~mhc_torch.monitoring.dashboard.draw_mixing_weights` as an RGB image.

    It is at most 1080 pixels high, however many layers there are, and leaves nothing in matplotlib.

    Raises:
        ValueError: ``weights`` is empty.
    """
    cells = heat_cells(weights)
    norm, cmap = colour_scale(cells), colours("viridis")
    painted = cmap(np.ma.masked_invalid(norm(np.where(cells == 0, 1, cells))), bytes=True)[..., :3]
    painted[np.isnan(cells)] = mpl.colors.to_rgba_array(NOT_LIVE)[0, :3] * 255
    painted[cells == 0] = 0

    names = list(weights)
    left = _MARGIN + math.ceil(max(_font().getlength(name) for name in names)) + _MARGIN
    top, height = 3 * _LINE, min(_ROW * len(names), _CELLS_HEIGHT)
    right, bottom = left + _CELLS_WIDTH, top + height
    picture = Image.new("RGB", (right + 100, bottom + 5 * _LINE), "white")
    draw = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x, y), text, fill="black", font=_font(), anchor=anchor)

    picture.paste(_stretched(painted, _CELLS_WIDTH, height), (left, top))
    write(left + _CELLS_WIDTH / 2, _LINE, "Mixing weights by layer depth", "mm")
    for layer in range(0, len(names), math.ceil(_LINE * len(names) / height)):
        write(left - 4, top + (layer + 0.5) * height / len(names), names[layer], "rm")
    window = cells.shape[1]
    for column in range(0, window, math.ceil(30 * window / _CELLS_WIDTH)):
        write(left + (column + 0.5) * _CELLS_WIDTH / window, bottom + _LINE, str(column), "mm")
    write(
        left + _CELLS_WIDTH / 2, bottom + 2.2 * _LINE, f"history index (0 oldest, {window - 1} latest), or stream", "mm"
    )

    scale = cmap(np.linspace(1, 0, height), bytes=True)[:, None, :3]
    picture.paste(_stretched(scale, 16, height), (right + 20, top))
    write(right + 28, top - _LINE, "weight α", "mm")
    for tick, text in zip(np.linspace(bottom, top, 5), scale_ticks(norm), strict=True):
        write(right + 42, tick, f"{text:.2g}", "lm")
    x = float(left)
    for meaning, colour in LEGEND.items():
        box = tuple(round(255 * part) for part in mpl.colors.to_rgb(colour))
        draw.rectangle((x, bottom + 3.5 * _LINE, x + 14, bottom + 4.2 * _LINE), fill=box)
        write(x + 20, bottom + 3.9 * _LINE, meaning, "lm")
        x += 50 + _font().getlength(meaning)
    return picture


def _stretched(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.NEAREST)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 10)
