"""Forks as film strips that play: what each branch may read is lit, the rest of its past is dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpo_min.chr import Window, ordinary_frames
from kvpo_min.viz.style import ANCHOR, _bytes, _check_labels, _small_png

PAPER, CARD, INK, GREY = "#fbfaf6", "#f0ede5", "#1f1d1a", "#6b675f"
LIT = "#ffd84d"  # around frames that may be read
DARK = 0.5  # brightness of those that may not: still to be made out
LIKED = "#c2255c"
TAGS = ("#0f766e", "#8b5e34", "#475569", "#7b3f5d")  # teal, brown, slate, plum: no hero has these


def branch_letter(branch: int) -> str:
    """A for branch 0, B for branch 1, ...: where colours belong to heroes, letters tell branches apart."""
    return chr(ord("A") + branch % 26)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _pictures(pixels: Tensor, height: int) -> list:
    """Frames [T, 3, H, W] as Pillow images of that height: whole pixels enlarged, then averaged down where it must."""
    from PIL import Image

    times, out = math.ceil(height / pixels.shape[-2]), []
    for frame in _bytes(pixels):
        image = Image.fromarray(frame)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        out.append(image.resize((round(image.width * height / image.height), height), Image.Resampling.BOX))
    return out


def _heart(draw, x: float, y: float, size: float) -> None:
    """A heart in the square of `size` at (x, y): Pillow's font has none."""
    curve = []
    for k in range(60):
        t = 2 * math.pi * k / 60
        dx = math.sin(t) ** 3
        dy = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
        curve.append((x + size * (0.5 + 0.5 * dx), y + size * (0.46 - 0.5 * dy)))
    draw.polygon(curve, fill=LIKED)


def _write(draw, x: float, y: float, text: str, size: int, colour: str = INK) -> float:
    """Writes one line whose middle is at height y; \u2665 becomes a heart. -> where it ends"""
    font = _font(size)
    for k, part in enumerate(text.split("\u2665")):
        if k:
            _heart(draw, x, y - 0.42 * size, 0.84 * size)
            x += 0.84 * size
        draw.text((x, y), part, colour, font, anchor="lm")
        x += font.getlength(part)
    return x


def _tag(draw, x: float, y: float, size: int, branch: int | None) -> None:
    """A letter on a square of the branch's colour, its left at x and its middle at height y; None: the anchor."""
    if branch is None:
        name = "anchor"
        colour = ANCHOR
        width = 2.2 * size
        letters = 0.55
    else:
        name = branch_letter(branch)
        colour = TAGS[branch % len(TAGS)]
        width = size
        letters = 0.7
    draw.rounded_rectangle((x, y - size / 2, x + width, y + size / 2), size // 5, colour)
    draw.text((x + width / 2, y), name, "white", _font(round(letters * size)), anchor="mm")


def _strip(tiles: Sequence, numbers: Sequence[int], read: set[int]):
    """A film strip of small pictures: those whose numbers are in `read` lit, the others dark. Where numbers are left
    out the strip is torn. -> Pillow image and the left edges of the tiles"""
    from PIL import Image, ImageDraw

    width, height = tiles[0].size
    gap, edge = 2, 7
    torn = [k > 0 and number != numbers[k - 1] + 1 for k, number in enumerate(numbers)]
    left = [gap + k * (width + gap) + 12 * sum(torn[: k + 1]) for k in range(len(numbers))]
    strip = Image.new("RGB", (left[-1] + width + gap, height + 2 * edge), "black")
    draw = ImageDraw.Draw(strip)
    for k, (number, picture, x) in enumerate(zip(numbers, tiles, left, strict=True)):
        if torn[k]:
            draw.rectangle((x - gap - 12, 0, x - gap - 1, strip.height), PAPER)
        lit = number in read
        if lit:
            draw.rectangle((x - gap, 0, x + width + gap - 1, strip.height), LIT)
        for hole in range(2):  # the perforation
            at = x + (2 * hole + 1) * width / 4 - 2
            for y in (2, height + edge + 2):
                draw.rectangle((at, y, at + 4, y + 2), "#8a6d00" if lit else "white")
        strip.paste(picture if lit else picture.point(lambda value: int(DARK * value)), (x, edge))
    return strip, left


def _check_fork(past: Tensor, reads: Tensor, branches: Tensor, labels: Sequence[str], n_rows: int) -> None:
    """past [T, 3, H, W], reads [G, L], branches [n_rows, T', 3, H, W] and a label a row belong together."""
    _check_labels(branches, labels)
    if past.ndim != 4 or past.shape[1:] != branches.shape[2:] or not len(past) or not branches.shape[1]:
        raise ValueError(
            f"expected a past [T, 3, H, W] and branches [N, T', 3, H, W] of the same frame size, got "
            f"{list(past.shape)} and {list(branches.shape)}"
        )
    if reads.ndim != 2 or not reads.numel() or len(branches) != n_rows:
        raise ValueError(f"expected frames [G, L] for {len(branches)} rows of films, got {list(reads.shape)}")
    if int(reads.min()) < 0 or int(reads.max()) >= len(past):
        raise ValueError(f"a past of {len(past)} frames has no frames {int(reads.min())} to {int(reads.max())}")


def _shown_past(n: int, rows: Sequence[set[int]], most: int = 33) -> list[int]:
    """The past frames that a strip shows: the last ones, and older ones that somebody reads."""
    return sorted({*range(max(0, n - most), n)}.union(*rows))


def film_fork(
    past: Tensor, reads: Tensor, branches: Tensor, labels: Sequence[str], liked: Sequence[bool] = (),
    window: Window | None = None, columns: int = 5,
):  # fmt: skip
    """One fork as film strips, a row a branch and the anchor: the past with the frames that it may not read dark, the
    fork as a bold line, what came of it. -> Pillow image

    past [T, 3, H, W] from frame 0 to the fork; reads [G, L]: the frames that each branch reads at the fork; branches
    [G + 1, T', 3, H, W] from the fork on, the anchor last, of which `columns` frames are shown; labels: one a row, such
    as "forest\\nreward 2.41"; liked: which rows get a heart. Raises ValueError when these do not fit together."""
    from PIL import Image, ImageDraw

    _check_fork(past, reads, branches, labels, len(reads) + 1)
    start = len(past)
    height = 64
    margin = 16
    tag = 30
    rows = [*map(set, reads.tolist()), set(ordinary_frames(start, window or Window()).tolist())]
    numbers = _shown_past(start, rows)
    tiles = _pictures(past[numbers], 24)
    index = torch.linspace(0, branches.shape[1] - 1, min(columns, branches.shape[1])).round().long()
    films = [_pictures(branch[index], height) for branch in branches]
    strips = [_strip(tiles, numbers, read)[0] for read in rows]
    x_strip = margin + round(2.2 * tag) + 12
    titles = "the past they share: only lit frames may be read", f"from frame {start} on"
    wide = [math.ceil(_font(17).getlength(title)) for title in titles]
    x_line = x_strip + max(strips[0].width, wide[0]) + 10
    x_film = x_line + 14
    x_label = x_film + len(index) * (films[0][0].width + 4) + 10
    text = max(_font(18).getlength(line) for label in labels for line in label.split("\n"))
    width = max(x_label + math.ceil(text) + 24, x_film + wide[1]) + margin
    head, row = 44, height + 14
    picture = Image.new("RGB", (width, head + len(rows) * row + 8), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, x_strip, head / 2, titles[0], 17, GREY)
    _write(draw, x_film, head / 2, titles[1], 17, GREY)
    for r, (strip, film, label) in enumerate(zip(strips, films, labels, strict=True)):
        y = head + r * row + height // 2
        _tag(draw, margin, y, tag, r if r < len(reads) else None)
        picture.paste(strip, (x_strip, y - strip.height // 2))
        for c, frame in enumerate(film):
            x = x_film + c * (frame.width + 4)
            draw.rectangle((x - 1, y - height // 2 - 1, x + frame.width, y + height // 2), GREY)
            picture.paste(frame, (x, y - height // 2))
        lines = label.split("\n")
        for k, line in enumerate(lines):
            heart = " \u2665" * (k == 0 and any(liked[r : r + 1]))
            _write(draw, x_label, y + 22 * (k - (len(lines) - 1) / 2), line + heart, 18, GREY if k else INK)
    draw.rectangle((x_line, head - 12, x_line + 3, picture.height - 8), INK)
    picture._repr_png_ = lambda: _small_png(picture)
    picture._repr_jpeg_ = lambda: None  # notebooks would store both
    return picture
