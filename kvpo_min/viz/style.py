"""What all figures share: colours, hatches, a figure that no pyplot knows of, pixels as bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from torch import Tensor

from kvpo_min.chr import BANK, DROPPED, NEAREST, ROUTED, SINK

ANCHOR = "#7f7f7f"
BRANCHES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#882255")
HATCHES = {SINK: "////", ROUTED: "", NEAREST: "...", BANK: "xxx"}
NAMES = {SINK: "sink", ROUTED: "routed", NEAREST: "nearest", DROPPED: "not read", BANK: "bank"}
FACES = {DROPPED: "white", SINK: "#dddddd", BANK: "#f4e3a1"}  # the others have the branch's colour


def branch_colour(branch: int) -> str:
    """Colour of branch 0, 1, ...; from the ninth on they come again."""
    return BRANCHES[branch % len(BRANCHES)]


def _figure(width: float, height: float):
    """A figure of width x height inches that no pyplot knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")

    def png() -> bytes:
        from PIL import Image

        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=100)
        return _small_png(Image.open(out))

    figure._repr_png_ = png  # notebooks draw pyplot's figures by themselves, this one only when it can show itself
    return figure


def _small_png(image) -> bytes:
    """A Pillow image as a PNG of 256 colours: less than half the bytes, and notebooks store many."""
    from PIL import Image

    out = io.BytesIO()
    few = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def _plain(axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(pixels: Tensor):
    """[..., 3, H, W] in [0, 1] -> numpy uint8 [..., H, W, 3]"""
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        raise ValueError(f"expected videos [..., T, 3, H, W], got {list(pixels.shape)}")
    return (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def _check_labels(pixels: Tensor, labels: Sequence[str]) -> None:
    if pixels.ndim != 5 or len(labels) != len(pixels):
        raise ValueError(f"expected videos [N, T, 3, H, W] and N labels, got {list(pixels.shape)} and {len(labels)}")
