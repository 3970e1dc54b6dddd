"""Forks as film strips that play: what each branch may read is lit, the rest of its past is dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min.chr import Window, ordinary_frames
from kvpo_min.viz.style import ANCHOR, _bytes, _check_labels, _small_png
from kvpo_min.viz.video import _enlarged, tile

PAPER, CARD, INK, GREY = "#fbfaf6", "#f0ede5", "#1f1d1a", "#6b675f"
LIT = "#ffd84d"  # around frames that may be read
DARK = 0.16  # brightness of those that may not
LIKED = "#c2255c"
TAGS = ("#0f766e", "#8b5e34", "#475569", "#7b3f5d")  # teal, brown, slate, plum: no hero has these


def branch_letter(branch: int) -> str:
    """A for branch 0, B for 1, ..., in pictures of heroes, whose colours no branch may have."""
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
    x_line = x_strip + strips[0].width + 10
    x_film = x_line + 14
    x_label = x_film + len(index) * (films[0][0].width + 4) + 10
    text = max(_font(18).getlength(line) for label in labels for line in label.split("\n"))
    head, row = 44, height + 14
    picture = Image.new("RGB", (x_label + math.ceil(text) + 24 + margin, head + len(rows) * row + 8), PAPER)
    draw = ImageDraw.Draw(picture)
    _write(draw, x_strip, head / 2, "the past they share: only lit frames may be read", 17, GREY)
    _write(draw, x_film, head / 2, f"from frame {start} on", 17, GREY)
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


def fork_movie(
    past: Tensor, reads: Tensor, branches: Tensor, labels: Sequence[str], liked: Sequence[bool], before: Tensor,
    after: Tensor, prompt: str, ends: Sequence[str] = ("before", "after"), window: Window | None = None,
) -> list:  # fmt: skip
    """The method as a moving picture, 900 pixels wide: one past, what each branch may read of it, and all films in
    step; below the same prompt and noise before and after training. -> Pillow images at 12 a second, the first of
    which shows how everything ends and can stand alone

    past [T, 3, H, H]; reads [G, L] at the fork; branches [G, T', 3, H, H], no anchor; labels: one a branch, such as
    "forest\\nreward 2.41"; liked: which branches get a heart; before and after [T + T', 3, H, H], and what stands under
    them, `ends`. Raises ValueError when these do not fit together."""
    _check_fork(past, reads, branches, labels, len(reads))
    length = len(past) + branches.shape[1]
    if past.shape[-1] != past.shape[-2] or len(liked) != len(reads):
        raise ValueError(
            f"expected square frames, and of {len(reads)} branches which are liked, got {list(past.shape)} and "
            f"{len(liked)} of them"
        )
    if not before.shape == after.shape == (length, *past.shape[1:]):
        raise ValueError(
            f"before and after must be {[length, *past.shape[1:]]} like past and branch, got {list(before.shape)} and "
            f"{list(after.shape)}"
        )
    ordinary = set(ordinary_frames(len(past), window or Window()).tolist())
    rows, says = [*map(set, reads.tolist()), ordinary], _sentences(len(reads), sum(liked))
    told = _movie_page(past, rows, labels, liked, prompt, ends, says)
    untold = _movie_page(past, rows, [""] * len(labels), [False] * len(labels), prompt, ("before", "after"), says)
    films = [_pictures(torch.cat([past, branch]), FILM) for branch in branches]
    films += [_pictures(film, LARGE) for film in (before, after)]
    pages = []
    for t in range(length):
        page, places, cursor = told if t >= len(past) + branches.shape[1] // 3 else untold
        pages.append(page.copy())
        for film, place in zip(films, places, strict=True):
            pages[t].paste(film[t].point(_coarse), place)
        if t < len(past):
            cursor(pages[t], t)
    shared, own = pages[: len(past)], [now for now in pages[len(past) :] for _ in range(2)]
    return [pages[-1]] * 30 + shared + [shared[-1]] * 6 + own


FILM, LARGE = 96, 128  # sizes of the films of fork_movie


def _coarse(value: int) -> int:
    """64 shades of each colour: what a decoder adds to them no eye sees, and it would double the file."""
    return min(255, 4 * round(value / 4))


def _sentences(n: int, n_liked: int) -> tuple[str, str, str]:
    """What the picture says, one sentence a part of it, for `n` branches."""
    number = dict(enumerate(("Two", "Three", "Four", "Five", "Six", "Seven", "Eight"), start=2)).get(n, str(n))
    rewarded = "The liked ones (\u2665) are" if n_liked > 1 else "The liked one (\u2665) is"
    return (
        f"{number} videos share one past and the same noise.",
        "Each may look back only at the lit frames. So each goes on in a different place.",
        f"{rewarded} rewarded. After training the model goes there by itself.",
    )


def _movie_page(past: Tensor, rows: Sequence[set[int]], labels, liked, prompt: str, ends, says):
    """What does not move; rows: the frames that each branch reads, then those of an ordinary block. -> the page, the
    places of the films, and what marks the time on it: a function of a page and a frame of the past"""
    from PIL import Image, ImageDraw

    width, margin, row, y_strip = 900, 20, 112, 58
    numbers = _shown_past(len(past), rows)
    x_film = width - margin - 4 - FILM
    x_line = x_film - 24
    tiles = _pictures(past[numbers], min(30, (x_line - 14 - margin) // len(numbers) - 2))
    whole, left = _strip(tiles, numbers, set(numbers))
    y_rows = y_strip + whole.height + 70
    y_end = y_rows + row * len(labels) + 8
    page = Image.new("RGB", (width, y_end + LARGE + 84), PAPER)
    draw = ImageDraw.Draw(page)

    _write(draw, margin, 32, says[0], 24)
    page.paste(whole, (margin, y_strip))
    draw.rectangle((x_line, y_strip, x_line + 3, y_strip + whole.height - 1), INK)
    _write(draw, x_film, 34, "noise", 18, GREY)
    noise = torch.randint(30, 226, (6, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    page.paste(Image.fromarray(noise.numpy()).resize((FILM, whole.height), Image.Resampling.NEAREST), (x_film, y_strip))

    _write(draw, margin, y_rows - 26, says[1], 22)
    places = [(x_film, y_rows + r * row + 4) for r in range(len(labels))]
    for r, (label, heart) in enumerate(zip(labels, liked, strict=True)):
        y = y_rows + r * row
        draw.rounded_rectangle((margin - 8, y, width - margin + 8, y + row - 8), 8, "#fbe4ea" if heart else CARD)
        _tag(draw, margin, y + 24, 30, r)
        place, *reward = label.split("\n")
        x = _write(draw, margin + 44, y + 24, place + " \u2665" * heart, 22)
        _write(draw, x + 20, y + 25, "   ".join(reward), 18, GREY)
        page.paste(_strip(tiles, numbers, rows[r])[0], (margin, y + 46))
        draw.rectangle((x_line, y, x_line + 3, y + row - 8), INK)

    _write(draw, margin, y_end + 20, says[2], 22)
    x_after = width - margin - 4 - LARGE
    x_before = x_after - LARGE - 90
    for x, text in ((x_before, ends[0]), (x_after, ends[1])):
        places.append((x, y_end + 44))
        _write(draw, x + LARGE / 2 - _font(18).getlength(text) / 2, y_end + LARGE + 62, text, 18)
    _arrow(draw, x_before + LARGE + 18, x_after - 18, y_end + 44 + LARGE // 2)
    y = _paragraph(draw, margin, y_end + 56, f"\u201c{prompt}\u201d", x_before - margin - 30)
    _write(draw, margin, y + 12, "same prompt, same noise, ordinary memory:", 18, GREY)
    small = _pictures(past[numbers], min(24, (x_before - margin - 30) // len(numbers) - 2))
    page.paste(_strip(small, numbers, rows[-1])[0], (margin, y + 30))
    for (x, y), size in zip(places, [FILM] * len(labels) + [LARGE] * 2, strict=True):
        draw.rectangle((x - 1, y - 1, x + size, y + size), GREY)

    def cursor(page, t: int) -> None:
        x, y = margin + left[numbers.index(t)] + tiles[0].width / 2, y_strip + whole.height + 2
        ImageDraw.Draw(page).polygon([(x, y), (x - 8, y + 12), (x + 8, y + 12)], INK)

    return page, places, cursor


def _arrow(draw, x0: int, x1: int, y: int) -> None:
    draw.rectangle((x0, y - 2, x1 - 10, y + 1), INK)
    draw.polygon([(x1, y), (x1 - 14, y - 9), (x1 - 14, y + 8)], INK)
    draw.text(((x0 + x1) / 2, y - 20), "train", GREY, _font(18), anchor="mm")


def _paragraph(draw, x: float, y: float, text: str, width: float) -> float:
    """Writes text in lines of at most `width`. -> the height at which the next line would stand"""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _font(18).getlength(longer) <= width else [*lines, word]
    for k, line in enumerate(lines):
        _write(draw, x, y + 24 * k, line, 18)
    return y + 24 * len(lines)


def save_webp(path: str | Path, frames: Tensor | Sequence, fps: float = 8, quality: int = 100) -> Path:
    """Writes a WebP that plays for ever. frames: Pillow images, or a video [T, 3, H, W], or several [N, T, 3, H, W],
    which are tiled and play in step, enlarged as in `save_video`. -> path

    quality 100: without loss, which is small for flat pictures; below, as JPEG's. A frame like the one before it makes
    that one stay longer. Raises ValueError when there is nothing to write."""
    from PIL import Image

    if isinstance(frames, Tensor):
        if frames.ndim not in (4, 5):
            raise ValueError(f"expected a video [T, 3, H, W] or several [N, T, 3, H, W], got {list(frames.shape)}")
        big = _enlarged(frames)
        frames = [Image.fromarray(frame) for frame in _bytes(tile(big, gap=8) if big.ndim == 5 else big)]
    if not frames or not 0 < fps <= 1000:
        raise ValueError(f"expected at least one frame and 0 < fps <= 1000, got {len(frames)} and {fps}")
    kept, ends = [], []
    for k, frame in enumerate(frames):
        if not kept or (frame is not kept[-1] and frame.tobytes() != kept[-1].tobytes()):
            kept.append(frame)
            ends.append(0)
        ends[-1] = round(1000 * (k + 1) / fps)
    times = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    how = {"lossless": True, "quality": 50} if quality == 100 else {"quality": quality}
    kept[0].save(path, "WEBP", save_all=True, append_images=kept[1:], duration=times, loop=0, method=4, **how)
    return Path(path)
