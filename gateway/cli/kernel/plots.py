"""Drawing what a kernel found: the obvious array as text in the terminal, or as a PNG file.

In: named arrays in the order a kernel declares them. Out: text, or the bytes of a PNG (W3C PNG, third edition; 8-bit
greyscale). One dimension is a line, two an image with logarithmic shades, more are summed over the first ones.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

COLUMNS, ROWS = 76, 18
_BRAILLE_BITS = np.array([1, 8, 2, 16, 4, 32, 64, 128])
"""Of the dots of one character, row by row."""
_SHADES = " .:-=+*#%@"
PNG_SIDE_MAX = 4096
PNG_WIDTH, PNG_HEIGHT = 960, 480
_MARGIN = 20

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]


def default_of(state: Mapping[str, Array], result: Mapping[str, Array] | None, verdicts: Array) -> tuple[str, Array]:
    """The obvious plot, by the rule of a product's default one: what finish() changed, else the first state array of more
    than one value, else the verdicts."""
    found = {name: values for name, values in (result or {}).items() if values.tobytes() != state[name].tobytes()}
    found = {**found, **{name: values for name, values in state.items() if name not in found}, "verdicts": verdicts}
    return next(((name, values) for name, values in found.items() if values.size > 1), ("verdicts", verdicts))


def text(name: str, values: Array) -> str:
    """A plot of about COLUMNS × ROWS characters, without colours."""
    flat = _at_most_2d(values)
    return _line_text(name, flat) if flat.ndim == 1 else _image_text(name, flat)


def png(name: str, values: Array) -> bytes:
    """Bright is much for an image; a line is black on white. The name and the range are in the file's text chunk."""
    flat = _at_most_2d(values)
    pixels = _line_pixels(flat) if flat.ndim == 1 else _image_pixels(flat)
    low, high = _range(flat)
    return _png(pixels, f"{name}, shape {values.shape}, {low:g} to {high:g}")


def _at_most_2d(values: Array) -> Floats:
    numbers = np.atleast_1d(values).astype(np.float64)
    while numbers.ndim > 2:
        numbers = numbers.sum(axis=0)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _range(numbers: Floats) -> tuple[float, float]:
    if not np.isfinite(numbers).any():
        return 0.0, 0.0
    return float(np.nanmin(numbers)), float(np.nanmax(numbers))


def _pooled(numbers: Floats, axis: int, most: int) -> Floats:
    """Maxima over equal runs, so that a peak of one pixel stays visible."""
    size = numbers.shape[axis]
    if size <= most:
        return numbers
    starts = (np.arange(most) * size) // most
    return np.asarray(np.fmax.reduceat(numbers, starts, axis=axis), np.float64)


def _shaded(numbers: Floats) -> Floats:
    """0 … 1, logarithmic where nothing is negative."""
    low, high = _range(numbers)
    shifted = np.nan_to_num(numbers - low, nan=0.0)
    if high <= low:
        return np.zeros_like(shifted)
    if low >= 0:
        return np.asarray(np.log1p(shifted) / np.log1p(high - low), np.float64)
    return np.asarray(shifted / (high - low), np.float64)


def _line_text(name: str, numbers: Floats) -> str:
    """Dots of braille: two across and four down a character (Unicode block 2800)."""
    low, high = _range(numbers)
    across, down = 2 * COLUMNS, 4 * (ROWS - 2)
    pooled = np.nan_to_num(_pooled(numbers, 0, across), nan=low)
    # Few values become steps.
    pooled = pooled[np.arange(across) * len(pooled) // across]
    level = (pooled - low) / (high - low) if high > low else np.zeros_like(pooled)
    heights = np.round((1 - level) * (down - 1)).astype(int)
    dots = np.zeros((down, across), bool)
    before = int(heights[0])
    for column, now in enumerate(heights.tolist()):
        top, bottom = sorted((before, now))
        dots[top if top == now else top + 1 : bottom + 1 if bottom == now else bottom, column] = True
        before = now
    cells = dots.reshape(down // 4, 4, across // 2, 2).transpose(0, 2, 1, 3).reshape(down // 4, across // 2, 8)
    codes = 0x2800 + (cells * _BRAILLE_BITS).sum(axis=2)
    labels = [f"{high:.4g}", *[""] * (down // 4 - 2), f"{low:.4g}"]
    width = max(len(label) for label in labels)
    lines = [f"{label:>{width}} ┤{''.join(map(chr, row))}" for label, row in zip(labels, codes.tolist(), strict=True)]
    end = str(len(numbers) - 1)
    ruler = f"{' ' * (width + 1)}└{'─' * (across // 2)}\n{' ' * (width + 2)}0{end:>{max(1, across // 2 - 1)}}"
    return "\n".join([f"{name} ({len(numbers)} values, {low:g} to {high:g})", *lines, ruler])


def _image_text(name: str, numbers: Floats) -> str:
    low, high = _range(numbers)
    # A character is about twice as high as wide.
    rows = max(1, min(ROWS, round(COLUMNS * numbers.shape[0] / numbers.shape[1] / 2)))
    small = _shaded(_pooled(_pooled(numbers, 0, rows), 1, COLUMNS))
    levels = np.minimum((small * len(_SHADES)).astype(int), len(_SHADES) - 1)
    lines = ["".join(_SHADES[level] for level in row) for row in levels]
    width = len(lines[0])
    title = f"{name} ({numbers.shape[0]}×{numbers.shape[1]}, {low:g} to {high:g})"
    return "\n".join([title, "┌" + "─" * width + "┐", *(f"│{line}│" for line in lines), "└" + "─" * width + "┘"])


def _image_pixels(numbers: Floats) -> npt.NDArray[np.uint8]:
    small = _pooled(_pooled(numbers, 0, PNG_SIDE_MAX), 1, PNG_SIDE_MAX)
    return np.round(_shaded(small) * 255).astype(np.uint8)


def _line_pixels(numbers: Floats) -> npt.NDArray[np.uint8]:
    canvas = np.full((PNG_HEIGHT, PNG_WIDTH), 255, np.uint8)
    width, height = PNG_WIDTH - 2 * _MARGIN, PNG_HEIGHT - 2 * _MARGIN
    canvas[_MARGIN + height, _MARGIN : _MARGIN + width] = 128
    canvas[_MARGIN : _MARGIN + height, _MARGIN] = 128
    low, high = _range(numbers)
    pooled = np.nan_to_num(_pooled(numbers, 0, width), nan=low)
    level = (pooled - low) / (high - low) if high > low else np.zeros_like(pooled)
    place = np.arange(width) * max(len(level) - 1, 1) / max(width - 1, 1)
    heights = np.round((1 - np.interp(place, np.arange(len(level)), level)) * (height - 1)).astype(int)
    before = int(heights[0])
    for column, now in enumerate(heights.tolist()):
        top, bottom = sorted((before, now))
        canvas[_MARGIN + top : _MARGIN + bottom + 1, _MARGIN + column] = 0
        before = now
    return canvas


def _png(pixels: npt.NDArray[np.uint8], title: str) -> bytes:
    height, width = pixels.shape
    # Filter type 0 before each row.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    label = b"Title\0" + title.encode("latin-1", "replace")
    body = chunk(b"IHDR", head) + chunk(b"tEXt", label) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
