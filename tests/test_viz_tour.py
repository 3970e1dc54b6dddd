"""Figures of notebooks 00 to 03 against the numbers they show."""

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

import pictures
from kvpo_min import viz
from kvpo_min.chr import Window, ordinary_frames

WINDOW = Window()


def rectangles(axes, **size):
    found = [p for p in axes.patches if isinstance(p, Rectangle)]
    return [p for p in found if all(getattr(p, f"get_{k}")() == v for k, v in size.items())]


def heights(axes):
    return [round(bar.get_height(), 6) for bar in axes.patches]


def test_roadmap_lights_what_it_is_told():
    texts = [t for t in pictures.roadmap(["energy"]).axes[0].texts if t.get_bbox_patch()]
    faces = [to_hex(t.get_bbox_patch().get_facecolor()).upper() for t in texts]
    assert faces.count(viz.BRANCHES[1]) == 1 and faces[list(pictures.ROADMAP).index("energy")] == viz.BRANCHES[1]
    with pytest.raises(ValueError, match="nonsense"):
        pictures.roadmap(["nonsense"])


def test_images_holds_the_pictures():
    pixels = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    figure = pictures.images(pixels, ["a", "b", "c"], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", ""]
    seen = torch.from_numpy(figure.axes[2].images[0].get_array().data)
    assert torch.equal(seen, (pixels[2] * 255).round().byte().movedim(0, -1))
    with pytest.raises(ValueError, match="titles"):
        pictures.images(pixels, ["a"])


def test_probability_change_shows_both():
    figure = pictures.probability_change(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5]))
    assert heights(figure.axes[0]) == [0.25, 0.75, 0.5, 0.5]


def test_scatter_panels():
    points, data = torch.randn(7, 2), torch.zeros(1, 2)
    figure = pictures.scatter_panels({"one": points, "two": points + 1}, data)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    torch.testing.assert_close(torch.tensor(figure.axes[1].collections[1].get_offsets().data).float(), points + 1)


def test_lines_and_marks():
    figure = pictures.lines({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 2.0])}, "t", "x", "y", {1: "here"})
    assert [list(line.get_ydata()) for line in figure.axes[0].lines[:2]] == [[1.0, 3.0], [2.0, 2.0]]
    assert list(figure.axes[0].lines[2].get_xdata()) == [1, 1]
    assert figure.axes[0].texts[0].get_text().strip() == "here"


def test_masks_show_the_mask():
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    image = pictures.masks({"m": mask}, 2).axes[0].images[0].get_array()
    assert image.tolist() == mask.int().tolist()


def test_kv_map_counts():
    starts = range(0, 60, 3)
    resident = {start: range(max(0, start - 33), start) for start in starts}
    axes = pictures.kv_map(starts, WINDOW, resident, lit=45).axes[0]
    cells = [p for p in rectangles(axes, width=1, height=1)]
    for row, start in enumerate(starts):
        here = {int(p.get_x()) for p in cells if p.get_y() == row}
        reads = set(ordinary_frames(start, WINDOW).tolist())
        assert here == (reads | set(resident[start]) if start else set())
        hatched = {int(p.get_x()) for p in cells if p.get_y() == row and p.get_hatch()}
        assert hatched == reads
    framed = [p for p in rectangles(axes, height=1) if p.get_linewidth() == 2]
    assert [(p.get_y(), p.get_width()) for p in framed] == [(15, 48)]


def test_the_bank_of_each_layer():
    axes = pictures.bank_map(torch.tensor([[0, 9, 9], [0, 9, 18]]), 21, 30).axes[0]
    counts = axes.images[0].get_array()
    assert counts.shape == (2, 30) and counts[0, 9] == 2 and counts[1].nonzero()[0].tolist() == [0, 9, 18]
    assert axes.get_xticks().tolist() == [0, 9, 18, 29]


def test_frame_bars():
    frames = ordinary_frames(12, WINDOW)
    axes = pictures.frame_bars(frames, torch.arange(1.0, 10.0), 12, WINDOW, "t", "y").axes[0]
    bars = [p for p in axes.patches if abs(p.get_width() - 0.8) < 1e-6]
    assert [round(p.get_x() + 0.4) for p in bars] == frames.tolist()
    assert [p.get_height() for p in bars] == list(range(1, 10))
    assert [p.get_hatch() for p in bars] == ["////"] * 3 + ["..."] * 6


def test_densities_and_arrows():
    figure = pictures.match_densities({"before": 0.0, "after": 2.0}, 2.0, lambda x, b: torch.full_like(x, 2.0 - b), n=5)
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    for axes, b in zip(figure.axes, (0.0, 2.0), strict=True):
        teacher, student = axes.lines
        assert abs(teacher.get_xdata()[teacher.get_ydata().argmax()] - 2) < 0.1
        assert abs(student.get_xdata()[student.get_ydata().argmax()] - b) < 0.1
        moves = [text.xy[0] - text.xyann[0] for text in axes.texts]
        assert len(moves) == (5 if b == 0 else 0) and all(abs(move - 2) < 1e-5 for move in moves)


def test_colour_counts():
    inks = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}
    figure = pictures.colour_counts({"teacher": {"red": 2, "blue": 1}, "student": {"red": 3}}, inks)
    assert heights(figure.axes[0]) == [2, 1] and heights(figure.axes[1]) == [3, 0]
    assert [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches] == ["#ff0000", "#0000ff"]
