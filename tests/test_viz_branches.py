"""Figures of routes, energies and rewards against the numbers they show."""

import io

import pytest
import torch
from torch.testing import assert_close

import pictures
from kvpo_min import viz
from kvpo_min.chr import Window, branch_frames, overlap

WINDOW = Window()


def colours(patches):
    from matplotlib.colors import to_hex

    return [to_hex(patch.get_facecolor()).upper() for patch in patches]


def frames(*routes, nearest=1):
    return branch_frames(torch.tensor(routes), 21, WINDOW, nearest)


def test_overlap_matrices_name_the_mean_over_pairs():
    matrix = overlap(torch.tensor([[1, 2], [1, 3], [4, 5]]))  # 1 / 3 for the first two, else 0
    axes = pictures.overlap_matrices({"drawn": matrix}).axes[0]
    assert axes.get_title() == "drawn\nmean overlap 0.11 (low: unlike)"  # (2 / 3) / 6
    assert_close(torch.tensor(axes.images[0].get_array()), matrix)
    assert [t.get_text() for t in axes.texts] == [f"{v:.1f}" for v in matrix.flatten().tolist()]


def test_exploration_plot_shows_means_and_standard_errors():
    figure = pictures.exploration_plot({"routing": ([0.2, 0.6], [1.0, 1.2]), "noise": ([0.1], [0.9])})
    first, second = figure.axes[0].containers
    assert_close(first[0].get_xydata().flatten().tolist(), [1.1, 0.4], rtol=1e-5, atol=0)
    assert second[0].get_marker() == "s" and first[0].get_marker() == "o"
    across = first[2][0].get_segments()[0]  # 0.1 to each side: std 0.1414 over the root of 2
    assert_close(across[:, 0].tolist(), [1.0, 1.2], rtol=1e-5, atol=0)


def test_energy_map_puts_blocks_and_steps_side_by_side():
    energies = torch.arange(24.0).view(2, 3, 4)
    axes = pictures.energy_map(energies, torch.tensor([1.0, 0.9, 0.8, 0.6]), start=21).axes[0]
    assert_close(torch.tensor(axes.images[0].get_array()), energies.flatten(1))
    assert [t.get_text() for t in axes.texts] == ["frames 21 to 23", "frames 24 to 26", "frames 27 to 29"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1.00", ".90", ".80", ".60"] * 3


def test_energy_map_names_its_rows():
    axes = pictures.energy_map(torch.rand(2, 1, 2), torch.tensor([1.0, 0.5]), names=("A", "anchor")).axes[0]
    boxes = [label.get_bbox_patch() for label in axes.get_yticklabels()]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "anchor"]
    assert colours(boxes) == [viz.TAGS[0].upper(), viz.ANCHOR.upper()]


def test_a_loop_plays_all_films_in_step():
    import base64

    from PIL import Image

    pixels = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    html = pictures.loop(pixels, ["one", "two"], scale=2).data
    film = Image.open(io.BytesIO(base64.b64decode(html.split("base64,")[1].split('"')[0])))
    assert film.format == "WEBP" and film.n_frames == 4 and film.info["loop"] == 0
    assert film.size == (2 * (32 + 8), 32 + 26) and 'alt="one, two"' in html


def test_wish_has_a_row_a_name_and_a_column_a_level():
    rows = {"before": torch.zeros(2, 3, 8, 8), "wanted": torch.ones(2, 3, 8, 8)}
    axes = pictures.wish(rows, torch.tensor([1.0, 0.5])).axes
    assert [a.get_title() for a in axes] == ["noise 1.00", "noise 0.50", "", ""]
    assert [a.get_ylabel() for a in axes] == ["before", "", "wanted", ""]
    assert axes[0].images[0].get_array().max() == 0 and axes[3].images[0].get_array().min() == 255


def test_film_fork_lights_what_is_read():
    past, films = torch.ones(21, 3, 16, 16), torch.zeros(3, 6, 3, 16, 16)
    picture = viz.film_fork(past, frames([4, 6, 8, 10, 12], [5, 7, 9, 11, 13]), films, ["a", "b", "c"])
    row = [picture.getpixel((x, 44 + 32)) for x in range(picture.width)]  # through the first branch's strip
    lit = sum(a != (255, 255, 255) and b == (255, 255, 255) for a, b in zip(row, row[1:], strict=False))
    assert lit >= 9  # its nine frames are as bright as they were
    with pytest.raises(ValueError, match="N labels"):
        viz.film_fork(past, frames([4, 6, 8, 10, 12]), films[:2], ["a"])


def test_branch_bars_share_one_scale_and_the_branches_colours():
    panels = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([0.0, 3.0, 1.0])}
    left, right = pictures.branch_bars(panels, "advantage", 0.25).axes
    assert [p.get_height() for p in left.patches] == [1.0, -2.0, 0.5]
    assert colours(right.patches) == [c.upper() for c in viz.TAGS[:3]]  # those of the letters in the film strips
    assert [t.get_text() for t in left.get_xticklabels()] == ["A", "B", "C"]
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] < -2 < 3 < left.get_ylim()[1]
    assert left.lines[0].get_ydata()[0] == 0.25 and left.get_ylabel() == "advantage"


def test_branch_lines_by_hand():
    axes = pictures.branch_lines(torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3]]), "probability").axes[0]
    assert_close(axes.lines[0].get_ydata().tolist(), [0.1, 0.4, 0.7], rtol=1e-6, atol=0)
    assert [line.get_color() for line in axes.lines] == list(viz.TAGS[:2])


def test_stored_pictures_keep_their_colours_in_fewer_bytes():
    from PIL import Image

    pixels = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sheet = viz.contact_sheet(pixels, ["a", "b"], every=1)
    plain = io.BytesIO()
    sheet.save(plain, "PNG")
    assert len(sheet._repr_png_()) < len(plain.getvalue()) and sheet._repr_jpeg_() is None
    flat = Image.new("RGB", (40, 40), viz.BRANCHES[5])
    flat.paste(Image.new("RGB", (10, 10), viz.ANCHOR), (5, 5))
    assert Image.open(io.BytesIO(viz.style._small_png(flat))).convert("RGB").tobytes() == flat.tobytes()


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: pictures.energy_map(torch.zeros(2, 3, 4), torch.ones(3)), r"sigma \[4\]"),
        (lambda: pictures.branch_bars({"a": torch.zeros(3), "b": torch.zeros(4)}), "same number of branches"),
    ],
)
def test_errors_of_branch_figures(call, match):
    with pytest.raises(ValueError, match=match):
        call()
