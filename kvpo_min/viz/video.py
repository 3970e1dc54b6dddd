"""Videos: contact sheets, mp4 files and a notebook player."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min.viz.style import ANCHOR, _bytes, _check_labels, _small_png

# --------------------------------------------------------------------------------------------------------------- videos


def contact_sheet(pixels: Tensor, labels: Sequence[str], every: int = 0, first: int = 0, scale: int = 1):
    """Every `every`-th frame of each video in a row under its label; 0: so that about 14 are shown. -> Pillow image

    pixels [N, T, 3, H, W]; `first`: the number of the first frame, for the header; `scale`: pixels a pixel.
    Raises ValueError when there is not one label a video."""
    from PIL import Image, ImageDraw, ImageFont

    _check_labels(pixels, labels)
    every = every or max(1, math.ceil(pixels.shape[1] / 14))
    shown = _bytes(pixels[:, ::every]).repeat(scale, 2).repeat(scale, 3)  # [N, columns, H, W, 3]
    n, columns, height, width = shown.shape[:4]
    font = ImageFont.load_default(size=12 if scale == 1 else 16)
    line = 18 if scale == 1 else 24
    gap = 2 * scale
    row = line + height + gap
    text = max(font.getlength(label) for label in labels)
    sheet = Image.new("RGB", (max(columns * (width + gap), math.ceil(text) + 8), line + n * row), "white")
    draw = ImageDraw.Draw(sheet)
    for c in range(columns):
        draw.text((c * (width + gap) + 2, 2), f"{'frame ' if c == 0 else ''}{first + c * every}", ANCHOR, font)
    for r in range(n):
        draw.text((2, line + r * row + 2), labels[r], "black", font)
        for c in range(columns):
            sheet.paste(Image.fromarray(shown[r, c]), (c * (width + gap), line + r * row + line))
    sheet._repr_png_ = lambda: _small_png(sheet)
    sheet._repr_jpeg_ = lambda: None  # notebooks would store both
    return sheet


def before_after(before_pixels: Tensor, after_pixels: Tensor, prompts: Sequence[str]):
    """Contact sheet in which each prompt's video before training stands above the one after. -> Pillow image

    Both [N, T, 3, H, W], from the same noise if the comparison is to be fair."""
    if before_pixels.shape != after_pixels.shape:
        raise ValueError(f"before and after differ: {list(before_pixels.shape)} and {list(after_pixels.shape)}")
    pairs = torch.stack([before_pixels, after_pixels], 1).flatten(0, 1)  # before 0, after 0, before 1, ...
    labels = [f"{when}: {prompt}" for prompt in prompts for when in ("before", "after")]
    return contact_sheet(pairs, labels)


def tile(pixels: Tensor, columns: int = 0, gap: int = 2) -> Tensor:
    """Videos [N, T, 3, H, W] row by row in one [T, 3, H', W'], white between them. 0 columns: nearly square."""
    n, t, _, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = pixels.new_ones(t, 3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for k in range(n):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        out[:, :, y : y + height, x : x + width] = pixels[k]
    return out


def _media():
    """mediapy with an ffmpeg: the system's, or the one that imageio-ffmpeg ships."""
    import mediapy

    if not mediapy.video_is_available():
        import imageio_ffmpeg

        mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return mediapy


def _enlarged(pixels: Tensor) -> Tensor:
    """Small frames in whole multiples, about 192 pixels high: h264 halves the colour's resolution."""
    factor = max(1, 192 // pixels.shape[-2])
    return pixels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def save_video(path: str | Path, pixels: Tensor, fps: float = 8) -> Path:
    """Writes an mp4 (h264). pixels [T, 3, H, W], or [N, T, 3, H, W], which are tiled. -> path

    Frames less than 192 pixels high are enlarged by a whole factor."""
    if pixels.ndim not in (4, 5):
        raise ValueError(f"expected one video [T, 3, H, W] or several [N, T, 3, H, W], got {list(pixels.shape)}")
    frames = _enlarged(pixels)
    frames = tile(frames) if frames.ndim == 5 else frames
    height, width = frames.shape[-2:]
    frames = torch.nn.functional.pad(frames, (0, width % 2, 0, height % 2), value=1.0)  # h264 wants even sizes
    # absolute: ffmpeg takes "run:1" for a protocol and "-x" for an option
    _media().write_video(str(Path(path).absolute()), _bytes(frames), fps=fps, qp=18)
    return Path(path)


def show_videos(pixels: Tensor, labels: Sequence[str], fps: float = 8, columns: int = 4):
    """Players for a notebook, one a video, the videos embedded. pixels [N, T, 3, H, W] -> an IPython HTML object"""
    from IPython.display import HTML

    _check_labels(pixels, labels)
    videos = list(_bytes(_enlarged(pixels)))
    # Chromium passes clicks on a player by in JupyterLab's outputs unless it is positioned (notebooks/browser.py)
    style = "<style>.show_videos video { position: relative }</style>"
    return HTML(style + _media().show_videos(videos, list(labels), fps=fps, columns=columns, return_html=True))
