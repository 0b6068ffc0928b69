"""A picture in tiles: where they lie, and how what a network makes of each is blended.

Two ways. `even`: tiles of one size, spread evenly, of which the outer margin is dropped and the rest of each overlap is
feathered. `as_diffusers`: what `AutoencoderKL.enable_tiling` does, slivers at the far edges and blending in place included.
A network that looks farther than the overlap, or at the whole picture at once (group norms and attention of a VAE), makes
something else of a tile than of the whole: no blending removes that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stepforge.runtime.arrays import Float32

Run = Callable[[Float32], Float32]  # [C, h, w] -> [C', h·up/down, w·up/down], an array that may be kept and written

DIFFUSERS_OVERLAP = 0.25  # AutoencoderKL.tile_overlap_factor


@dataclass(frozen=True, slots=True)
class Tile:
    """Height, width and overlap of tiles, in positions of what the network reads."""

    height: int
    width: int
    overlap: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Positions that a network makes of one that it reads, a side: up for one, or one for `down`."""

    up: int = 1
    down: int = 1

    def __call__(self, positions: int) -> int:
        return positions * self.up // self.down


def starts(length: int, tile: int, overlap: int, multiple: int = 1) -> list[int]:
    """Where tiles along an axis begin: at multiples of `multiple`, the first at 0, the last so that it ends at the far end.

    Neighbours share at least `overlap` positions. length and tile: multiples of `multiple`; overlap < tile.
    """
    if tile >= length:
        return [0]
    stride = max((tile - overlap) // multiple, 1) * multiple
    count = 1 + math.ceil((length - tile) / stride)
    units = (length - tile) // multiple
    return [units * index // (count - 1) * multiple for index in range(count)]


def weights(length: int, tile: int, begins: list[int]) -> list[Float32]:
    """Weights of each tile's positions along an axis: at every position of the axis they add up to 1.

    The outer quarter of an overlap has weight 0, since a network knows least of what lies beside a tile's edge; between
    the quarters the weights are a ramp.
    """
    tile = min(tile, length)
    found = [np.ones(tile, np.float64) for _ in begins]
    for index in range(1, len(begins)):
        shared = begins[index - 1] + tile - begins[index]
        margin = shared // 4
        ramp = np.clip((np.arange(shared) + 0.5 - margin) / (shared - 2 * margin), 0.0, 1.0)
        found[index][:shared] *= ramp
        found[index - 1][tile - shared :] *= 1.0 - ramp
    total = np.zeros(length)
    for begin, weight in zip(begins, found, strict=True):
        total[begin : begin + tile] += weight
    return [
        (weight / total[begin : begin + tile]).astype(np.float32) for begin, weight in zip(begins, found, strict=True)
    ]


def even(run: Run, picture: Float32, tile: Tile, ratio: Ratio, multiple: int = 1) -> Float32:
    """What a network makes of a picture [C, H, W], tile by tile; in one piece where that is a tile.

    multiple: of positions where tiles may begin. H, W and the tile's sides are multiples of it, and it of ratio.down.
    """
    height, width = picture.shape[1:]
    if tile.height >= height and tile.width >= width:
        return run(picture)
    whole: Float32 | None = None
    rows = list(_axis(height, tile.height, tile.overlap, ratio, multiple))
    columns = list(_axis(width, tile.width, tile.overlap, ratio, multiple))
    for read_rows, made_rows, row_weights in rows:
        for read_columns, made_columns, column_weights in columns:
            made = run(np.ascontiguousarray(picture[:, read_rows, read_columns]))
            if whole is None:
                whole = np.zeros((len(made), ratio(height), ratio(width)), np.float32)
            whole[:, made_rows, made_columns] += made * (row_weights[:, None] * column_weights)
    assert whole is not None
    return whole


def _axis(length: int, tile: int, overlap: int, ratio: Ratio, multiple: int) -> Iterator[tuple[slice, slice, Float32]]:
    """What each tile reads and makes along an axis, and its weights."""
    tile = min(tile, length)
    begins = starts(length, tile, overlap, multiple)
    made = [ratio(begin) for begin in begins]
    for begin, at, weight in zip(begins, made, weights(ratio(length), ratio(tile), made), strict=True):
        yield slice(begin, begin + tile), slice(at, at + ratio(tile)), weight


def as_diffusers(run: Run, picture: Float32, side: int, ratio: Ratio) -> Float32:
    """The same as `AutoencoderKL.tiled_decode` and `_tiled_encode` of diffusers 0.42.1 do it.

    side: of tiles, in positions of what the network reads (`tile_latent_min_size` to decode, `tile_sample_min_size` to
    encode). Tiles begin every 3/4 of it, so that the last ones may be slivers; each is blended with the ones above and to
    the left of it, as these have become by their own blending.
    """
    height, width = picture.shape[1:]
    if height <= side and width <= side:
        return run(picture)
    stride = int(side * (1 - DIFFUSERS_OVERLAP))
    extent = int(ratio(side) * DIFFUSERS_OVERLAP)
    kept = ratio(side) - extent
    above: list[Float32] = []
    rows = []
    for top in range(0, height, stride):
        row = [
            run(np.ascontiguousarray(picture[:, top : top + side, left : left + side]))
            for left in range(0, width, stride)
        ]
        for index, tile in enumerate(row):
            if above:
                _blend(above[index], tile, extent, axis=1)
            if index:
                _blend(row[index - 1], tile, extent, axis=2)
        rows.append(np.concatenate([tile[:, :kept, :kept] for tile in row], axis=2))
        above = row
    return np.concatenate(rows, axis=1)


def _blend(before: Float32, tile: Float32, extent: int, *, axis: int) -> None:
    """Fade a tile in over the last positions of the one before it; changes the tile."""
    a, b = np.moveaxis(before, axis, 0), np.moveaxis(tile, axis, 0)
    extent = min(len(a), len(b), extent)
    for position in range(extent):
        share = np.float32(position / extent)
        b[position] = a[len(a) - extent + position] * (np.float32(1) - share) + b[position] * share
