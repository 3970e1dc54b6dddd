"""The moving picture of the method, page by page, and the file that it is written to (picture.py chooses its fork)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kvpo_min.chr import Window, ordinary_frames
from kvpo_min.viz.film import CARD, GREY, INK, PAPER, _check_fork, _font, _pictures, _shown_past, _strip, _tag, _write

FILM, LARGE = 96, 128  # sizes of the films


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


def save_webp(path: str | Path, pages: Sequence, fps: float) -> Path:
    """Writes Pillow images as a WebP that plays for ever, without loss, which is small for flat pictures. A page like
    the one before it makes that one stay longer. -> path"""
    kept, ends = [], []
    for k, page in enumerate(pages):
        if not kept or (page is not kept[-1] and page.tobytes() != kept[-1].tobytes()):
            kept.append(page)
            ends.append(0)
        ends[-1] = round(1000 * (k + 1) / fps)
    times = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    how = {"lossless": True, "quality": 50, "method": 4}
    kept[0].save(path, "WEBP", save_all=True, append_images=kept[1:], duration=times, loop=0, **how)
    return Path(path)
