"""Contact sheets: many pictures on one, with labels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from stepforge.runtime.errors import RequestError

MAX_SHEET = 80_000_000  # pixels; Pillow warns when it opens more than 89 million
LABEL_LINES = 2
LABEL_ROOM = 128  # pixels: narrower cells are enlarged for their labels' sake
GAP = 4  # pixels around each cell
FONT_SIZE = 12


class Sheet:
    """A white sheet of equal cells that is filled as pictures come; a cell that gets none stays white.

    cell: width and height of the largest picture. columns: None makes the sheet about square. upscale: a whole factor, by
    nearest neighbour. Labels stand below their cells, wrapped to two lines and cut with "..."; Pillow's own font has Latin
    letters only. Raises RequestError for a sheet that cannot be made.
    """

    def __init__(
        self,
        count: int,
        cell: tuple[int, int],
        *,
        columns: int | None = None,
        labels: Sequence[str] | None = None,
        upscale: int = 1,
    ) -> None:
        if count < 1:
            raise RequestError("a contact sheet needs at least one picture")
        if labels is not None and len(labels) != count:
            raise RequestError(f"{len(labels)} labels for {count} pictures; give one for each")
        columns = math.ceil(math.sqrt(count)) if columns is None else columns
        if columns < 1 or upscale < 1:
            raise RequestError(f"columns is {columns} and upscale {upscale}; both must be 1 or more")
        self._columns, self._upscale = min(columns, count), upscale
        self._cell = (upscale * cell[0], upscale * cell[1])
        self._font = ImageFont.load_default(FONT_SIZE)
        ascent_and_descent = self._font.getmetrics() if isinstance(self._font, ImageFont.FreeTypeFont) else (FONT_SIZE,)
        self._line = math.ceil(sum(ascent_and_descent))
        self._pitch = (self._cell[0] + GAP, self._cell[1] + GAP + (LABEL_LINES * self._line if labels else 0))
        rows = math.ceil(count / self._columns)
        width, height = self._columns * self._pitch[0] + GAP, rows * self._pitch[1] + GAP
        if width * height > MAX_SHEET:
            raise RequestError(f"the contact sheet would be {width}x{height}; at most {MAX_SHEET} pixels are allowed")
        self.picture = Image.new("RGB", (width, height), "white")
        for index, label in enumerate(labels or ()):
            self._write(index, label)

    def place(self, index: int, image: Image.Image) -> None:
        """Put a picture into cell `index`, counted row by row."""
        left, top = self._corner(index)
        size = (image.width * self._upscale, image.height * self._upscale)
        scaled = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
        self.picture.paste(scaled, (left + (self._cell[0] - size[0]) // 2, top + (self._cell[1] - size[1]) // 2))

    def _corner(self, index: int) -> tuple[int, int]:
        return GAP + index % self._columns * self._pitch[0], GAP + index // self._columns * self._pitch[1]

    def _write(self, index: int, label: str) -> None:
        text = " ".join(label[:1000].encode("utf-8", "replace").decode().split())
        if not text:
            return
        letters = int(
            self._cell[0] * len(text) / max(self._font.getlength(text), 1)
        )  # by the average width of these letters
        strip = Image.new("RGB", (self._cell[0], LABEL_LINES * self._line), "white")  # cuts a line of wide ones
        lines = textwrap.wrap(text, max(4, letters), max_lines=LABEL_LINES, placeholder="...")
        for row, line in enumerate(lines):
            ImageDraw.Draw(strip).text((0, row * self._line), line, "black", self._font)
        left, top = self._corner(index)
        self.picture.paste(strip, (left, top + self._cell[1]))
