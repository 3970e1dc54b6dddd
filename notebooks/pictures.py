"""Figures of the notebooks: branches, the tour of the model, and training by hand, live and recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpo_min.chr import DROPPED, NEAREST, SINK, Window, ordinary_frames, route_mask
from kvpo_min.viz.film import TAGS, branch_letter
from kvpo_min.viz.run import _column, held_out_points
from kvpo_min.viz.style import (
    ANCHOR,
    BRANCHES,
    HATCHES,
    _bytes,
    _check_labels,
    _figure,
    _plain,
    _small_png,
    branch_colour,
)
from kvpo_min.viz.video import tile

# ------------------------------------------------------------------------------- branches: routes, energies, rewards


def overlap_matrices(panels: Mapping[str, Tensor]):
    """How alike the windows of every two branches are, one matrix a way to draw. -> Figure

    panels: title -> Jaccard indices [G, G] from `chr.overlap`; the title gets the mean over pairs of branches."""
    figure = _figure(4 * len(panels), 4)
    for axes, (title, matrix) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        g = len(matrix)
        mean = (matrix.sum() - matrix.trace()) / (g * (g - 1))
        axes.imshow(matrix.numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set_title(f"{title}\nmean overlap {mean:.2f} (low: unlike)", fontsize=10)
        axes.set(xlabel="branch", ylabel="branch", xticks=range(g), yticks=range(g))
        for y in range(g):
            for x in range(g):
                colour = "w" if matrix[y, x] > 0.6 else "k"
                axes.text(x, y, f"{matrix[y, x]:.1f}", ha="center", va="center", fontsize=10, color=colour)
    return figure


def exploration_plot(ways: Mapping[str, tuple[Sequence[float], Sequence[float]]]):
    """How often branches end in another scene, and how far their frames are from clean ones; a point a way. -> Figure

    ways: name -> (share of branches that end in another scene, distance over the anchor's), one number a fork; bars are
    standard errors over forks. Names that begin with "noise" are drawn as squares."""
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    for k, (name, (told, distance)) in enumerate(ways.items()):
        told, distance = torch.tensor(told).float(), torch.tensor(distance).float()
        sem = [t.std().item() / len(t) ** 0.5 if len(t) > 1 else 0.0 for t in (told, distance)]
        marker, colour = ("s" if name.startswith("noise") else "o"), branch_colour(k)
        axes.errorbar(distance.mean(), told.mean(), sem[0], sem[1], marker=marker, color=colour, linestyle="",
                      markeredgecolor="#555555", markersize=13, capsize=2, label=name)  # fmt: skip
    axes.axvline(1, color=ANCHOR, linestyle="--", linewidth=1, label="anchor")
    axes.set_ylim(-0.05, 1.05)
    _plain(axes, "", "distance from clean frames, over the anchor's (right: less clean)", "branches in another scene")
    axes.legend(frameon=False, fontsize=11, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def energy_map(energies: Tensor, sigma: Tensor, start: int = 0, block: int = 3, names: Sequence[str] = ()):
    """Energy of every branch (row), block (group of columns) and denoising step (column). -> Figure

    energies [G, B, S] from `tve.step_energies`, sigma [S]; `start`: first frame of the first block; `names` of the
    rows, where they are not A, B, ..."""
    g, n_blocks, n_steps = energies.shape
    if sigma.shape != (n_steps,):
        raise ValueError(f"expected sigma [{n_steps}], one a step, got {list(sigma.shape)}")
    figure = _figure(max(5.0, 0.36 * n_blocks * n_steps + 1.5), 0.32 * g + 2.0)
    axes = figure.add_subplot()
    image = axes.imshow(energies.flatten(1).numpy(), cmap="Greys", vmin=0, aspect="auto")
    for b in range(1, n_blocks):
        axes.axvline(b * n_steps - 0.5, color="white", linewidth=4)
    steps = [f"{s:.2f}".lstrip("0") for s in sigma.tolist()]
    axes.set_xticks(range(n_blocks * n_steps), steps * n_blocks, fontsize=10, rotation=60)
    names = names or [branch_letter(k) for k in range(g)]
    axes.set_yticks(range(g), names, color="white", fontsize=10)
    for label, k, name in zip(axes.get_yticklabels(), range(g), names, strict=True):
        colour = ANCHOR if name == "anchor" else _tag_colour(k)
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 2.5})
    for b in range(n_blocks):
        first = start + b * block
        where = (b * n_steps + (n_steps - 1) / 2, -0.6)
        axes.text(*where, f"frames {first} to {first + block - 1}", ha="center", va="bottom", fontsize=10)
    axes.set_xlabel("noise level sigma of the step")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="mean squared velocity difference", pad=0.01)
    return figure


def _tag_colour(branch: int) -> str:
    """The colour of a branch's letter in the film strips; no hero has one of the first four."""
    return TAGS[branch] if branch < len(TAGS) else branch_colour(branch)


def branch_bars(panels: Mapping[str, Tensor], ylabel: str = "", line: float | None = None, xlabel: str = "branch"):
    """One bar a branch in each panel, in the branches' colours, all panels on one scale. -> Figure

    panels: title -> [G], the same G; `line`: where to draw a dashed line, such as 1 / G."""
    sizes = {len(values) for values in panels.values()}
    if len(sizes) != 1:
        raise ValueError(f"panels must have the same number of branches, got {sorted(sizes)}")
    g = sizes.pop()
    figure = _figure(max(4.0, (0.28 * g + 0.9) * len(panels)), 2.9)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    least = 0.005 * max(values.abs().max().item() for values in panels.values())  # what is less cannot be seen
    for axes, (title, values) in zip(grid, panels.items(), strict=True):
        colours = [_tag_colour(k) for k in range(g)]
        bars = axes.bar([branch_letter(k) for k in range(g)], values.tolist(), color=colours, edgecolor="#555555")
        if g <= 6:  # else there is no room
            axes.bar_label(bars, fmt=lambda x: f"{x:.2g}" if abs(x) > least else "0", fontsize=10, padding=2)
            axes.margins(y=0.16)
        if line is not None:
            axes.axhline(line, color=ANCHOR, linestyle="--", linewidth=1)
        _plain(axes, title, xlabel)
        axes.title.set_fontsize(10)
    grid[0].set_ylabel(ylabel)
    return figure


def branch_lines(values: Tensor, ylabel: str = "", xlabel: str = "update"):
    """One line a branch, in the branches' colours. values [updates, G] -> Figure"""
    figure = _figure(6, 3)
    axes = figure.add_subplot()
    for g, line in enumerate(values.T.tolist()):
        axes.plot(line, color=_tag_colour(g), marker="o", markersize=4, linewidth=2, label=branch_letter(g))
    _plain(axes, "", xlabel, ylabel)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# ------------------------------------------------------------------------------------------ tour (notebooks 00 to 03)

ROADMAP = {  # what is drawn: box -> what stands in it; the numbers are the notebooks'
    "model": "one block\nat a time\n(01, 02, 03)",
    "routes": "each branch\nreads another\npast (04)",
    "energy": "energies:\nhow likely was\neach (05)",
    "rewards": "rewards\nof the videos\n(06)",
    "update": "one update\nof the weights\n(07)",
    "train": "again and\nagain\n(08, 09, 10)",
}


def roadmap(lit: Sequence[str] = ()):
    """KVPO from left to right, one box a step (keys of `ROADMAP`); the `lit` ones are this notebook's. -> Figure"""
    if unknown := set(lit) - set(ROADMAP):
        raise ValueError(f"expected boxes among {list(ROADMAP)}, got {sorted(unknown)}")
    figure = _figure(10, 1.5)
    axes = figure.add_subplot()
    for x, (name, text) in enumerate(ROADMAP.items()):
        if name in lit:
            axes.text(x, -1.3, "this notebook", ha="center", va="center", fontsize=10, color=BRANCHES[4])
        face = BRANCHES[1] if name in lit else "white"
        box = dict(boxstyle="round,pad=0.5", facecolor=face, edgecolor=ANCHOR)
        axes.text(x, 0, text, ha="center", va="center", fontsize=10, bbox=box)
        if x:
            axes.annotate("", (x - 0.38, 0), (x - 0.62, 0), arrowprops=dict(arrowstyle="->", color=ANCHOR))
    axes.set(xlim=(-0.5, len(ROADMAP) - 0.5), ylim=(-1.5, 1))
    axes.set_axis_off()
    return figure


def images(pixels: Tensor, titles: Sequence[str], columns: int = 0, inches: float = 1.1):
    """Single pictures side by side, each under its title. pixels [N, 3, H, W] -> Figure; 0 columns: all in one row"""
    if pixels.ndim != 4 or len(titles) != len(pixels):
        raise ValueError(f"expected pictures [N, 3, H, W] and N titles, got {list(pixels.shape)} and {len(titles)}")
    columns = columns or len(pixels)
    rows = math.ceil(len(pixels) / columns)
    lines = 1 + max(title.count("\n") for title in titles)
    figure = _figure(inches * columns, (inches + 0.22 * lines) * rows)
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.set_axis_off()
    for axes, picture, title in zip(grid.flat, _bytes(pixels), titles, strict=False):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=11, pad=3)
    return figure


def probability_change(before: Tensor, after: Tensor, names: Sequence[str] = ("before", "after")):
    """Probabilities [G] of the branches, pale before and full after an update. -> Figure"""
    figure = _figure(5.5, 2.8)
    axes = figure.add_subplot()
    colours = [_tag_colour(g) for g in range(len(before))]
    for values, offset, alpha, name in ((before, -0.2, 0.4, names[0]), (after, 0.2, 1.0, names[1])):
        places = [g + offset for g in range(len(values))]
        bars = axes.bar(places, values.tolist(), 0.38, color=colours, alpha=alpha, edgecolor="#555555", label=name)
        axes.bar_label(bars, fmt=lambda x: f"{x:.3f}".lstrip("0"), fontsize=10, padding=2)
    axes.margins(y=0.14)
    axes.set_xticks(range(len(before)), [branch_letter(g) for g in range(len(before))])
    _plain(axes, f"probability: {names[0]} (pale) and {names[1]}", "branch", "probability")
    axes.title.set_fontsize(10)
    return figure


def scatter_panels(panels: Mapping[str, Tensor], data: Tensor):
    """Clouds of points [N, 2], one a panel, over the data points [M, 2] in grey. -> Figure"""
    figure = _figure(2.2 * len(panels), 2.5)
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(grid, panels.items(), strict=True):
        axes.scatter(*data.T.tolist(), s=60, color=ANCHOR, marker="o", alpha=0.25, linewidth=0)
        axes.scatter(*points.detach().T.tolist(), s=3, color=BRANCHES[4], alpha=0.5, linewidth=0)
        axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        _plain(axes, name)
        axes.title.set_fontsize(10)
    return figure


def lines(curves: Mapping[str, Tensor], title: str, xlabel: str, ylabel: str, marks: Mapping[int, str] | None = None):
    """One line a curve [T] over 0, 1, ..., with dotted lines at `marks` {place: what is there}. -> Figure"""
    figure = _figure(7, 2.8)
    axes = figure.add_subplot()
    for k, (name, values) in enumerate(curves.items()):
        axes.plot(range(len(values)), torch.as_tensor(values).tolist(), color=BRANCHES[(4, 5, 2, 0)[k % 4]], label=name)
    for place, text in (marks or {}).items():
        axes.axvline(place, color=ANCHOR, linestyle=":", linewidth=1)
        axes.text(place, axes.get_ylim()[1], f" {text}", fontsize=10, va="top", color="#555555")
    _plain(axes, title, xlabel, ylabel)
    axes.title.set_fontsize(11)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def masks(panels: Mapping[str, Tensor], lines_every: int = 0):
    """Who may read whom: one bool mask [queries, keys] a panel, blue where it may. -> Figure

    `lines_every`: a line between blocks of that many rows and columns."""
    from matplotlib.colors import ListedColormap

    figure = _figure(2.6 * len(panels), 2.8)
    for axes, (name, mask) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.imshow(mask.int().tolist(), cmap=ListedColormap(["white", BRANCHES[1]]), vmin=0, vmax=1)
        for k in range(0, max(mask.shape) + 1, lines_every or max(mask.shape)):
            axes.axhline(k - 0.5, color=ANCHOR, linewidth=0.7)
            axes.axvline(k - 0.5, color=ANCHOR, linewidth=0.7)
        axes.set(xlabel="key: frame that is read", ylabel="query: frame that reads")
        axes.set_xlim(-0.5, mask.shape[1] - 0.5)
        axes.set_ylim(mask.shape[0] - 0.5, -0.5)
        axes.set_title(name, fontsize=10)
    return figure


def kv_map(starts: Sequence[int], window: Window, resident: Mapping[int, Sequence[int]], lit: int | None = None):
    """The memory of a video: a row a block, what it reads (sink and nearest hatched), what else is kept (pale).
    -> Figure

    starts: first frames of the blocks; resident: start -> frames in the history when that block is made; `lit`: the
    start of the block whose row is framed."""
    from matplotlib.patches import Patch, Rectangle

    figure = _figure(9, 0.13 * len(starts) + 1.3)
    axes = figure.add_subplot()
    for y, start in enumerate(starts):
        if start:
            mask = route_mask(ordinary_frames(start, window)[None], start, window, window.past)[0].tolist()
            for x, kind in enumerate(mask):
                if kind != DROPPED or x in resident[start]:
                    face = {SINK: "#bbbbbb", NEAREST: ANCHOR, DROPPED: "#eeeeee"}[kind]
                    cell = Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=0.3)
                    cell.set_hatch(HATCHES.get(kind, ""))
                    axes.add_patch(cell)
        axes.add_patch(Rectangle((start, y), window.block, 1, facecolor=BRANCHES[4], linewidth=0))
        if start == lit:
            whole = (0, y), start + window.block, 1
            axes.add_patch(Rectangle(*whole, facecolor="none", edgecolor="black", linewidth=2, zorder=3))
            axes.text(start + window.block + 1, y + 0.5, f"the block at {start}", va="center", fontsize=10)
    if len(starts) * window.block > 2 * window.history:  # there is something to say it of
        axes.text(window.sink + 2, len(starts) - 2, "evicted", va="center", fontsize=10)
    axes.set(xlim=(0, starts[-1] + window.block), ylim=(len(starts), 0), xlabel="frame", ylabel="block (first frame)")
    rows = range(0, len(starts), max(1, len(starts) // 10))
    axes.set_yticks([y + 0.5 for y in rows], [str(starts[y]) for y in rows], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"sink": ("#bbbbbb", SINK), "nearest": (ANCHOR, NEAREST), "kept, not read": ("#eeeeee", DROPPED)}
    handles = [
        Patch(facecolor=f, hatch=HATCHES.get(k, ""), edgecolor="white", label=name) for name, (f, k) in kinds.items()
    ]
    handles.append(Patch(facecolor=BRANCHES[4], label="the block that is made"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    return figure


def bank_map(frames: Tensor, stop: int, total: int):
    """Which old frames the bank of each layer holds before frame `stop` of a film of `total`: frames [layers, n]; one
    that is held twice is darker. -> Figure"""
    counts = torch.zeros(len(frames), total).scatter_add(1, frames.cpu(), torch.ones(frames.shape))
    figure = _figure(8, 2.2)
    axes = figure.add_subplot()
    axes.imshow(counts.tolist(), cmap="Blues", vmin=0, vmax=1.5, aspect="auto", interpolation="nearest")
    axes.axvspan(stop - 0.5, total - 0.5, color=ANCHOR, alpha=0.15, lw=0)
    axes.set_yticks(range(len(frames)), range(1, len(frames) + 1), fontsize=10)
    axes.set_xticks(sorted({*frames.flatten().tolist(), total - 1}))
    axes.set(xlabel="frame of the film" + (" (grey: not made yet)" if stop < total else ""), ylabel="layer")
    axes.set_title(f"what each layer's bank holds before frame {stop}", fontsize=12)
    return figure


def frame_bars(frames: Tensor, values: Tensor, start: int, window: Window, title: str, ylabel: str):
    """One bar, on a log scale, for each past frame [L] that the block at `start` reads: sink or nearest. -> Figure"""
    figure = _figure(7, 2.3)
    axes = figure.add_subplot()
    kinds = route_mask(frames[None], start, window, window.past)[0, frames].tolist()
    for x, value, kind in zip(frames.tolist(), values.tolist(), kinds, strict=True):
        face = "#bbbbbb" if kind == SINK else ANCHOR
        axes.bar(x, value, 0.8, color=face, hatch=HATCHES.get(kind, ""), edgecolor="white")
    axes.axvspan(start - 0.5, start + window.block - 0.5, color=BRANCHES[4], alpha=0.4)
    axes.set_yscale("log")
    _plain(axes, title, "frame (blue: the block that is made)", ylabel)
    axes.title.set_fontsize(10)
    return figure


def match_densities(panels: Mapping[str, float], teacher: float, pull, n: int = 9):
    """A student N(b, 1) on its way to a teacher N(teacher, 1), one panel a moment. -> Figure

    panels: title -> b; `pull`: (points [n], b) -> where descent moves each of them, drawn as arrows."""
    figure = _figure(3.2 * len(panels), 3)
    x = torch.linspace(min(0.0, *panels.values()) - 3, max(teacher, *panels.values()) + 3, 200)
    for axes, (title, b) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for centre, colour, name in ((teacher, ANCHOR, "teacher"), (b, BRANCHES[4], "student")):
            height = (-0.5 * (x - centre).square()).exp()
            axes.fill_between(x, height, color=colour, alpha=0.3, linewidth=0)
            axes.plot(x, height, color=colour, linewidth=2, label=name)
        points = b + torch.linspace(-1.6, 1.6, n)
        for k, (at, move) in enumerate(zip(points.tolist(), pull(points, b).tolist(), strict=True)):
            if abs(move) > 0.1:  # below that an arrow would be nothing but its head
                y = -0.1 - 0.08 * (k % 3)  # in three rows, so that they do not overlap
                axes.annotate("", (at + move, y), (at, y),
                              arrowprops=dict(arrowstyle="-|>", color=BRANCHES[5], linewidth=1.5))  # fmt: skip
        _plain(axes, title)
        axes.title.set_fontsize(11)
        axes.set(ylim=(-0.35, 1.1), yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    return figure


def colour_counts(counts: Mapping[str, Mapping[str, int]], inks: Mapping[str, tuple[float, float, float]]):
    """How often each colour was seen, a panel a model, in the colours themselves. counts: model -> {colour: n}. ->
    Figure"""
    figure = _figure(4 * len(counts), 2.6)
    for axes, (name, seen) in zip(figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts.items(),
                                  strict=True):  # fmt: skip
        axes.bar(list(inks), [seen.get(ink, 0) for ink in inks], color=list(inks.values()), edgecolor="#555555")
        _plain(axes, name)
        axes.title.set_fontsize(11)
    return figure


# -------------------------------------------------------------------------------- training: by hand, live and recorded


def objective_figure(log_p: Tensor, log_p_old: Tensor, log_p_init: Tensor, A: Tensor, settings: Sequence[tuple]):
    """The clipped objective of one group, a row a setting (clip_range_low, clip_range_high, kl_coef). -> Figure

    Left: what each branch adds to the loss, -min(rho A, clip(rho) A) over its ratio rho, with a dot where it is now
    (filled: it still pulls; empty: it is clipped). Right: how far the policy's log score l = -E / tau is moved by the
    clipped objective alone and by the KL alone, -dL/dl, both through autograd. log_p, log_p_old, log_p_init, A: [G]."""
    from kvpo_min.grpo import branch_kl, clipped_objective

    if not settings:
        raise ValueError("expected at least one setting (clip_range_low, clip_range_high, kl_coef), got none")
    n, ratio = len(A), (log_p - log_p_old).exp().detach()
    width = max(0.5, 1.3 * (ratio - 1).abs().max().item())
    rho = torch.linspace(max(0.0, 1 - width), 1 + width, 201)
    figure = _figure(9.5, 3.2 * len(settings))
    for (left, right), (low, high, kl_coef) in zip(figure.subplots(len(settings), 2, squeeze=False), settings,
                                                     strict=True):  # fmt: skip
        left.axvspan(1 - low, 1 + high, color="#eeeeee", linewidth=0)
        for g in range(n):

            def term(r, a=A[g], low=low, high=high):
                return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)

            moves = bool((A[g] > 0 and ratio[g] <= 1 + high) or (A[g] < 0 and ratio[g] >= 1 - low))
            left.plot(rho, term(rho), color=_tag_colour(g), label=f"{branch_letter(g)}: advantage {A[g].item():+.2f}")
            left.plot(ratio[g], term(ratio[g]), "o", color=_tag_colour(g), markeredgecolor="#555555",
                      markerfacecolor=_tag_colour(g) if moves else "white", markersize=8)  # fmt: skip
        _plain(left, f"clip {1 - low:g} to {1 + high:g}", "ratio", "loss of the branch")
        left.legend(frameon=False, fontsize=10)
        pulls = []
        for loss in (lambda s: clipped_objective(s, log_p_old, A, low, high)[0],  # noqa: B023
                     lambda s: kl_coef * branch_kl(s, log_p_init)):  # noqa: B023  # fmt: skip
            score = log_p.detach().clone().requires_grad_()
            pulls.append((-torch.autograd.grad(loss(score.log_softmax(0)), score)[0]).tolist())
        colours = [_tag_colour(g) for g in range(n)]
        for k, (pull, name) in enumerate(zip(pulls, ("clipped objective", f"KL, weight {kl_coef:g}"), strict=True)):
            places, hatch = [g + 0.4 * k - 0.2 for g in range(n)], "" if k == 0 else "xxx"
            right.bar(places, pull, 0.36, edgecolor="#555555", linewidth=0.5, color=colours, hatch=hatch, label=name)
        right.axhline(0, color="#555555", linewidth=0.8)
        right.set_xticks(range(n), [branch_letter(g) for g in range(n)])
        _plain(right, "what moves the branch (up: likelier)", "", "-dL / d log p")
        right.legend(frameon=False, fontsize=10)
    return figure


def push_pull(v: Tensor, u: Tensor, slope: Tensor):
    """Velocities of two numbers: the policy's v [2], the branches' u [G, 2], and the step each asks of v. -> Figure

    Branch g asks for slope_g * (u_g - v): towards its own velocity where slope = dL/dE > 0, away from it below 0.
    Arrows are scaled to fit, all alike; the black one is their sum."""
    asked = slope[:, None] * (u - v)  # [G, 2]
    total = asked.sum(0)
    scale = 0.8 * (u - v).norm(dim=1).max() / torch.cat([asked, total[None]]).norm(dim=1).max().clamp(min=1e-12)
    figure = _figure(8, 3)
    axes = figure.add_subplot()
    for g in range(len(u)):
        axes.plot(*u[g].tolist(), "o", color=_tag_colour(g), markersize=11, markeredgecolor="#555555",
                  label=f"{branch_letter(g)} {'pulls' if slope[g] > 0 else 'pushes'}")  # fmt: skip
        axes.annotate("", (v + scale * asked[g]).tolist(), v.tolist(),
                      arrowprops=dict(arrowstyle="-|>", color=_tag_colour(g), linewidth=2.5))  # fmt: skip
    axes.annotate("", (v + scale * total).tolist(), v.tolist(),
                  arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.5, linestyle="--"))  # fmt: skip
    axes.scatter(*(v + scale * asked).T.tolist(), alpha=0)  # arrows alone would not widen the axes
    axes.plot(*v.tolist(), "s", color="white", markeredgecolor="black", markersize=9, label="the policy's velocity")
    axes.margins(0.25)
    axes.set_aspect("equal")
    _plain(axes, "Who pulls, who pushes (dashed: all together)", "first number of the velocity", "second number")
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def training_board(logs: Sequence[Mapping], step=None, frames: int = 6):
    """One picture of a run that is under way: its held-out curve where the log has one, the groups' reward minus the
    anchor's, entropy, KL and clipped ratios; with `step`, a `train.Step`, also films of its first group's best and
    worst branch and of the anchor. -> Figure. logs: as in `reward_curve`; `frames` a film."""
    at, step = _column(logs, "step"), None if step is None or step.skipped else step
    points = held_out_points(logs)
    figure = _figure(10, 2.6 if step is None else 7.2)
    top, bottom = (figure, None) if step is None else figure.subfigures(2, 1, height_ratios=(1, 1.8))
    held, over, entropy, clip = top.subplots(1, 4)
    name = "liked" if "liked" in points else "reward"
    if name in points:
        held.plot(*points[name][:2], color=BRANCHES[4], marker="o", markersize=4)
    else:
        held.text(0.5, 0.5, "not measured", ha="center", transform=held.transAxes)
    if name == "liked":
        held.set_ylim(-0.03, 1.03)
    _plain(held, f"held out: {name}", "updates")
    gained = [line["reward"] - line["anchor_reward"] for line in logs if not line.get("skipped")]
    over.bar(at, gained, color=[BRANCHES[4] if x > 0 else ANCHOR for x in gained])
    over.axhline(0, color="#555555", linewidth=1)
    _plain(over, "reward minus anchor", "update")
    entropy.plot(at, _column(logs, "entropy"), color=BRANCHES[6], marker="o", markersize=3)
    if step is not None:
        most = math.log(len(step.groups[0].A))  # the branches, and the anchor where it is one of the choices
        entropy.axhline(most, color="#555555", linestyle="--", linewidth=1)
        entropy.set_ylim(0, 1.1 * most)
    _plain(entropy, "entropy (dashed: the most)", "update")
    clip.plot(at, _column(logs, "clip_ratio/region_mean"), color=BRANCHES[7], marker="o", markersize=3, label="clipped")
    clip.plot(at, _column(logs, "kl"), color=BRANCHES[2], marker="s", markersize=3, label="KL (nats)")
    clip.set_ylim(bottom=0)
    _plain(clip, "clipped ratios, KL", "update")
    clip.legend(frameon=False, fontsize=10)
    for axes in (held, over, entropy, clip):
        axes.title.set_fontsize(11)
        axes.tick_params(labelsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if step is not None:
        group = step.groups[0]
        worst, *_, best = group.advantages.argsort().tolist()
        names = ("best", "worst", "anchor")
        for axes, g, name in zip(bottom.subplots(3, 1), (best, worst, len(group.advantages)), names, strict=True):
            index = torch.linspace(0, group.videos.shape[1] - 1, min(frames, group.videos.shape[1])).round().long()
            film = tile(group.videos[g, index][:, None], len(index))
            axes.imshow(_bytes(film)[0], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            gained = (
                "" if name == "anchor" else f": branch {branch_letter(g)}, advantage {group.advantages[g].item():+.2f}"
            )
            axes.spines[:].set(color=ANCHOR if name == "anchor" else _tag_colour(g), linewidth=2)
            axes.set_title(name + gained, fontsize=11, loc="left", pad=2)
        bottom.suptitle(f"update {step.step}: {group.script}", fontsize=11)
    return figure


def recorded(logs: Sequence[Mapping], at: int = -1):
    """Reward, entropy, KL and energy of a recorded run, with a line through the `at`-th record and its numbers as
    titles. -> Figure. logs: the lines of metrics.jsonl."""
    panels = {"reward": "reward", "entropy": "entropy (nats)", "kl": "KL (nats)", "energy/mean": "energy"}
    step = _column(logs, "step")
    here = logs[at]
    figure = _figure(8, 2.1)
    for axes, (key, name), colour in zip(figure.subplots(1, 4), panels.items(), BRANCHES[4:], strict=True):
        axes.plot(step, _column(logs, key), color=colour, linewidth=1)
        if key == "reward":
            axes.plot(step, _column(logs, "anchor_reward"), color=ANCHOR, linewidth=1, linestyle="--")
        axes.axvline(here["step"], color="#555555", linewidth=1)
        if not here.get("skipped"):
            axes.plot(here["step"], here[key], "o", color=colour, markeredgecolor="#555555")
        _plain(axes, f"{name}: " + ("skipped" if here.get("skipped") else f"{here[key]:.4g}"), "update")
        axes.title.set_fontsize(8)
        axes.xaxis.label.set_fontsize(8)
        axes.tick_params(labelsize=7)
    figure.suptitle(f"update {here['step']}", fontsize=10)
    return figure


PARTS = {  # of real.memory_plan, in the order in which they are stacked: (colour, hatch)
    "transformer": ("#7f7f7f", ""), "VAE": ("#bbbbbb", ""), "adapters": (BRANCHES[4], ""),
    "optimizer": (BRANCHES[1], ""), "gradients": (BRANCHES[1], "xxx"), "shared past": (BRANCHES[2], ""),
    "bank": ("#d8b84a", "xx"), "branches' own frames": (BRANCHES[0], ""), "what blocks read": (BRANCHES[3], "///"),
    "videos": (BRANCHES[6], ""), "activations": (BRANCHES[5], "..."),
}  # fmt: skip


def memory_bars(plans: Mapping[str, Mapping[str, float]], limits: Sequence[float] = (24, 80)):
    """GiB by part, stacked, one bar a plan of `real.memory_plan`; dashed lines at the memory of GPUs. -> Figure"""
    if not plans:
        raise ValueError("expected at least one plan {part: GiB}, got none")
    unknown = sorted({part for plan in plans.values() for part in plan} - set(PARTS))
    if unknown:
        raise ValueError(f"expected parts {list(PARTS)}, got {unknown} too")
    figure = _figure(9, 0.55 * len(plans) + 2.2)
    axes = figure.add_subplot()
    begin = [0.0] * len(plans)
    for part, (colour, hatch) in PARTS.items():
        size = [plan.get(part, 0.0) for plan in plans.values()]
        if not any(round(gib, 2) for gib in size):  # too little to be seen
            continue
        axes.barh(range(len(plans)), size, left=begin, color=colour, hatch=hatch, edgecolor="white", label=part)
        begin = [b + s for b, s in zip(begin, size, strict=True)]
    for y, total in enumerate(begin):
        axes.text(total, y, f" {total:.1f}", va="center", fontsize=10, backgroundcolor="white")
    most = max(begin)
    for limit in limits:
        if limit < 1.6 * most:
            axes.axvline(limit, color="#555555", linestyle="--", linewidth=1)
            axes.text(limit, -0.6, f"{limit:g} GiB", ha="center", va="bottom", fontsize=10, backgroundcolor="white")
    axes.set_yticks(range(len(plans)), list(plans))
    axes.set_ylim(len(plans) - 0.5, -0.9)
    axes.set_xlim(0, 1.1 * most)
    _plain(axes, "", "GiB at the largest moment of one update")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    return figure


# ------------------------------------------------------------------------------------------- films that play in a loop


def loop(pixels: Tensor, labels: Sequence[str], fps: float = 6, scale: int = 2):
    """Films side by side, in step and for ever, each under its label. pixels [N, T, 3, H, W] -> an IPython HTML object

    One small WebP inside the notebook, so that it also plays where no kernel runs."""
    import base64
    import io

    from IPython.display import HTML
    from PIL import Image, ImageDraw

    from kvpo_min.viz.film import PAPER, _font, _pictures

    films = [_pictures(film, scale * pixels.shape[-2]) for film in pixels]
    width, height = films[0][0].size
    pages = []
    for frames in zip(*films, strict=True):
        page = Image.new("RGB", (len(films) * (width + 8), height + 26), PAPER)
        draw = ImageDraw.Draw(page)
        for k, (frame, label) in enumerate(zip(frames, labels, strict=True)):
            draw.text((k * (width + 8) + width / 2, 13), label, "black", _font(15), anchor="mm")
            page.paste(frame, (k * (width + 8), 26))
        pages.append(page)
    out, times = io.BytesIO(), [round(1000 / fps)] * (len(pages) - 1) + [1200]  # the end stays for a while
    pages[0].save(out, "WEBP", save_all=True, append_images=pages[1:], duration=times, loop=0, quality=50, method=4)
    data = base64.b64encode(out.getvalue()).decode()
    return HTML(f'<img alt="{", ".join(labels)}" src="data:image/webp;base64,{data}">')


def wish(rows: Mapping[str, Tensor], sigma: Tensor):
    """What is predicted at each noise level, a row each: name -> pictures [S, 3, H, W], sigma [S]. -> Figure"""
    figure = _figure(1.05 * len(sigma) + 1.5, 1.05 * len(rows) + 0.3)
    grid = figure.subplots(len(rows), len(sigma), squeeze=False)
    for r, ((name, pictures), line) in enumerate(zip(rows.items(), grid, strict=True)):
        for axes, picture, level in zip(line, _bytes(pictures), sigma.tolist(), strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if not r:
                axes.set_title(f"noise {level:.2f}", fontsize=10)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    return figure


# ------------------------------------------------------------- films in step, stories by hand, runs side by side


def _label(draw, place: tuple[float, float], text: str, size: int = 16) -> None:
    from PIL import ImageFont

    draw.multiline_text(place, text, "black", ImageFont.load_default(size=size), spacing=4)


def film_rows(pixels: Tensor, labels: Sequence[str], every: int = 3, first: int = 0, scale: int = 2):
    """One video a row, its label on the left, every `every`-th frame enlarged, with wide gutters. -> Pillow image

    pixels [N, T, 3, H, W]; `first`: the number of the first frame, for the header."""
    from PIL import Image, ImageDraw, ImageFont

    _check_labels(pixels, labels)
    films = _bytes(pixels[:, ::every].repeat_interleave(scale, -2).repeat_interleave(scale, -1))
    n, columns, height, width = films.shape[:4]
    font = ImageFont.load_default(size=16)
    gap = 10
    line = 26
    left = 16 + math.ceil(max(font.getlength(part) for label in labels for part in label.split("\n")))
    sheet = Image.new("RGB", (left + columns * (width + gap), line + n * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for c in range(columns):
        _label(draw, (left + c * (width + gap), 2), f"{'frame ' if c == 0 else ''}{first + c * every}")
    for r in range(n):
        y = line + r * (height + gap)
        _label(draw, (4, y + 8), labels[r])
        for c in range(columns):
            sheet.paste(Image.fromarray(films[r, c]), (left + c * (width + gap), y))
    sheet._repr_png_ = lambda: _small_png(sheet)
    sheet._repr_jpeg_ = lambda: None  # notebooks would store both
    return sheet


def heat(panels: Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str], ylabel="", xlabel="", mark=None):
    """Tables of numbers as shades, one a panel, the numbers in their cells. panels: title -> [rows, columns];
    `mark` (row, column): the cell that is framed. -> Figure"""
    from matplotlib.patches import Rectangle

    figure = _figure(4.6 * len(panels), 0.5 * len(rows) + 1.6)
    for axes, (title, table) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        low, high = table.min().item(), table.max().item()
        axes.imshow(table.tolist(), cmap="Greys", vmin=low, vmax=high + 0.3 * (high - low) + 1e-9)
        for y, row in enumerate(table.tolist()):
            for x, value in enumerate(row):
                dark = value > low + 0.75 * (high - low)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=10, color="w" if dark else "k")
        if mark is not None:
            axes.add_patch(Rectangle((mark[1] - 0.5, mark[0] - 0.5), 1, 1, fill=False, edgecolor=BRANCHES[5], lw=3))
        axes.set_xticks(range(len(columns)), columns, fontsize=10, rotation=30)
        axes.set_yticks(range(len(rows)), rows, fontsize=10)
        axes.set_title(title, fontsize=12)
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


RUN_ROWS = {"held-out reward": ("reward",), "held-out films": ("liked", "coherent", "journey"), "entropy": ("entropy",)}


def run_curves(runs: Mapping[str, Sequence[Mapping]], rows: Mapping[str, Sequence[str]] | None = None):
    """Recorded runs side by side, one a column. runs: title -> lines of metrics.jsonl; rows: label -> names of its
    lines, each of the held-out curve or, where it has none of that name, of the training groups. -> Figure"""
    rows = rows or RUN_ROWS
    figure = _figure(3.4 * len(runs) + 0.6, 2.1 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), len(runs), squeeze=False, sharey="row", sharex="col")
    for c, (title, logs) in enumerate(runs.items()):
        for axes, (label, names) in zip(grid[:, c], rows.items(), strict=True):
            for k, name in enumerate(names):
                at, values = run_column(logs, name)
                style = ("-", "--", ":")[k % 3]  # where lines lie on each other
                axes.plot(at, values, style, color=BRANCHES[(4, 5, 2)[k % 3]], lw=2,
                          marker="." if len(at) < 30 else "", label=name)  # fmt: skip
            if len(names) > 1 and c == 0:
                axes.legend(frameon=False, fontsize=10)
            axes.xaxis.get_major_locator().set_params(integer=True)
            _plain(axes, title if axes is grid[0, c] else "", "updates" if axes is grid[-1, c] else "")
            if c == 0:
                axes.set_ylabel(label, fontsize=10)
    return figure


def run_column(logs: Sequence[Mapping], name: str) -> tuple[list[int], list[float]]:
    """-> (updates done, values) of the held-out curve's `name`, or of the training groups' where it has none."""
    held = [(0, logs[0][f"eval0/{name}"])] if f"eval0/{name}" in logs[0] else []
    held += [(line["step"] + 1, line[f"eval/{name}"]) for line in logs if f"eval/{name}" in line]
    if not held:
        held = [(line["step"], line[name]) for line in logs if name in line]
    return [at for at, _ in held], [value for _, value in held]


def log_lines(panels: Mapping[str, Mapping[str, Sequence[float]]], x: Sequence[float], xlabel="", ylabel=""):
    """Shares from 0 to 1 over a logarithmic x, one panel a title: title -> {name: values}. -> Figure"""
    figure = _figure(4 * len(panels) + 0.5, 3)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        for k, (name, values) in enumerate(curves.items()):
            axes.plot([float(at) for at in x], [float(v) for v in values], color=BRANCHES[4 + k], lw=2, label=name)
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        _plain(axes, title, xlabel)
    grid[0].set_ylabel(ylabel)
    grid[0].legend(frameon=False, fontsize=10)
    return figure
