"""Film strips of forks, the moving picture of the method, and looping files, against the frames they are made of."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kvpo_min import viz
from kvpo_min.viz import film as strips

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import movie as movies  # noqa: E402

READS = torch.tensor([[0, 2, 5], [0, 1, 3]])  # of two branches, in a past of six frames


def grey(*levels, size=16):
    """A video [T, 3, H, W] with one flat grey a frame."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, size, size)


@pytest.fixture
def fork():
    past = grey(0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    branches = torch.stack([grey(0.10, 0.11, 0.12), grey(0.3, 0.31, 0.32), grey(0.5, 0.51, 0.52)])
    return past, branches


def greys_of_row(picture, y):
    """The grey levels that stand in at least eight pixels side by side of one line, in their order."""
    line, runs = [picture.getpixel((x, y)) for x in range(picture.width)], []
    for x in range(len(line) - 8):
        r, g, b = line[x]
        if r == g == b and r not in (0, 255) and line[x : x + 8] == [line[x]] * 8 and runs[-1:] != [r]:
            runs.append(r)
    return runs


def shade(level):
    return round(255 * level)


# --------------------------------------------------------------------------------------------------------- film strips


def test_film_fork_darkens_what_a_branch_may_not_read(fork):
    past, branches = fork
    picture = viz.film_fork(past, READS, branches, ["a", "b", "c"], columns=3)
    levels = [shade(level) for level in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    rows = [44 + 78 * r + 32 for r in range(3)]  # under a header of 44 pixels, the middles of rows of 64 + 14
    for y, read in zip(rows, [{0, 2, 5}, {0, 1, 3}, {0, 1, 2, 3, 4, 5}], strict=True):
        seen = greys_of_row(picture, y)
        strip = [level if k in read else int(viz.DARK * level) for k, level in enumerate(levels)]
        assert seen[seen.index(strip[0]) :][:6] == strip
    assert 0.3 < viz.DARK < 0.6  # what is not read can be made out, and is clearly apart from what is


def test_film_fork_shows_the_fork_and_then_the_branch(fork):
    past, branches = fork
    picture = viz.film_fork(past, READS, branches, ["a", "b", "c"], columns=2)
    for r, branch in enumerate(branches):
        seen = greys_of_row(picture, 44 + 78 * r + 5)  # above the strips, the tags and the words
        assert seen[-2:] == strips._bytes(branch)[[0, -1], 0, 0, 0].tolist()
    ink = tuple(int(viz.INK[k : k + 2], 16) for k in (1, 3, 5))
    bold = [x for x in range(picture.width) if all(picture.getpixel((x, y)) == ink for y in range(40, 270))]
    assert len(bold) == 4 and bold == list(range(bold[0], bold[0] + 4))
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_film_fork_has_room_for_its_title(fork):
    past, branches = fork
    picture = viz.film_fork(past, READS, branches[:, :1], list("???"))
    grey = tuple(int(viz.GREY[k : k + 2], 16) for k in (1, 3, 5))
    title = [x for x in range(picture.width) for y in range(12, 32) if picture.getpixel((x, y)) == grey]
    assert max(title) < picture.width - 10


def test_film_fork_gives_hearts_to_liked_rows(fork):
    past, branches = fork
    picture = viz.film_fork(past, READS, branches, ["a", "b", "c"], liked=[False, True])
    heart = tuple(int(viz.LIKED[k : k + 2], 16) for k in (1, 3, 5))
    found = [y for y in range(picture.height) for x in range(picture.width) if picture.getpixel((x, y)) == heart]
    assert found and 44 + 78 <= min(found) and max(found) < 44 + 2 * 78


def test_strips_of_long_pasts_are_torn_where_nobody_reads():
    assert strips._shown_past(60, [{0, 1, 30}, {59}]) == [0, 1, *range(27, 60)]
    assert strips._shown_past(6, [{0}]) == list(range(6))
    tiles = strips._pictures(grey(0.2, 0.3, 0.4), 10)
    strip, left = strips._strip(tiles, [0, 1, 27], {0})
    assert left == [2, 14, 38] and strip.size == (50, 24)  # tiles of 10, gaps of 2, one tear of 12
    paper = tuple(int(viz.PAPER[k : k + 2], 16) for k in (1, 3, 5))
    assert strip.getpixel((30, 12)) == paper and strip.getpixel((3, 12)) == (51, 51, 51)
    assert strip.getpixel((40, 12)) == (int(viz.DARK * 102),) * 3


def test_branches_have_letters_and_colours_that_no_hero_has():
    from kvpo_min.pocket.world import COLOURS

    assert [viz.branch_letter(k) for k in range(4)] == list("ABCD")
    for tag in viz.TAGS:
        ours = torch.tensor([int(tag[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        assert min((ours - torch.tensor(ink)).norm() for ink in COLOURS.values()) > 0.3


def test_small_frames_are_enlarged_in_whole_pixels():
    frame = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (image,) = strips._pictures(frame, 32)
    assert image.size == (32, 32)
    expected = [round(255 * v) for v in frame[0, :, 5, 2].tolist()]
    assert {image.getpixel((8 + x, 20 + y)) for x in range(4) for y in range(4)} == {tuple(expected)}


# ------------------------------------------------------------------------------------------------------- moving picture


@pytest.fixture
def movie(fork):
    past, branches = fork
    whole = torch.cat([past, branches[2]])
    args = dict(past=past, reads=READS, branches=branches[:2], labels=["beach\nreward 2.50", "snow\nreward 2.00"],
                liked=[True, False], before=whole, after=torch.cat([past, grey(0.20, 0.21, 0.22)]),
                prompt="a red disc travels and settles")  # fmt: skip
    return args, movies.fork_movie(**args)


def test_movie_plays_the_past_stops_at_the_fork_and_holds_the_end(movie):
    args, pages = movie
    past, stop, held = 6, movies.STOP, movies.HELD  # a past of 6 frames has no more pages
    assert len(pages) == past + stop + 2 * 3 + held and {page.size for page in pages} == {(900, pages[0].height)}
    assert len({page.tobytes() for page in pages[past : past + stop]}) == 1
    assert len({page.tobytes() for page in pages[-held - 2 :]}) == 1  # the last one is the still
    places = movies._movie_page(args["past"], None, ["", ""], [False] * 2, "", ("", ""), [""] * 4)[1]
    films = [torch.cat([args["past"], branch]) for branch in args["branches"]] + [args["before"], args["after"]]
    shown = ((pages[0], 0), (pages[5], 5), (pages[6], 5), (pages[past + stop], 6), (pages[past + stop + 2], 7))
    for page, t in (*shown, (pages[-1], 8)):
        for (x, y), film in zip(places, films, strict=True):
            assert page.getpixel((x + 40, y + 40)) == (movies._coarse(int(strips._bytes(film)[t, 0, 0, 0])),) * 3


def test_movie_says_things_when_they_come(movie):
    _, pages = movie

    def count(page, colour):
        wanted = tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))
        return sum(n for n, seen in page.getcolors(1 << 20) if seen == wanted)

    fork = 6 + movies.STOP
    assert [count(pages[k], viz.LIKED) > 0 for k in (0, 6, fork, fork + 2, -1)] == [False, False, False, True, True]
    assert count(pages[0], viz.LIT) < count(pages[6], viz.LIT)  # before the fork nobody reads anything yet


def test_movie_says_an_where_the_world_says_a():
    said = movies._grammar("a orange square travels, a red disc and a yellow one settle")
    assert said == "an orange square travels, a red disc and a yellow one settle"


def test_movie_says_how_many():
    assert (
        movies._sentences(4, 1)[0].startswith("Four videos")
        and "The liked one (\u2665) is" in movies._sentences(4, 1)[2]
    )
    assert movies._sentences(4, 1, ("beach", "snow"))[3] == "\u2665 liked here: beach, snow"
    assert movies._sentences(12, 2)[0].startswith("12 videos") and "ones (\u2665) are" in movies._sentences(12, 2)[2]


# ---------------------------------------------------------------------------------------------------------------- files


def test_webp_loops_and_has_the_pages(tmp_path):
    pages = [Image.new("RGB", (8, 8), (shade(k / 6),) * 3) for k in range(7)]
    image = Image.open(movies.save_webp(tmp_path / "v.webp", pages, fps=10))
    assert image.n_frames == 7 and image.info["loop"] == 0 and image.size == (8, 8)
    for k in range(7):
        image.seek(k)
        assert image.convert("RGB").getpixel((4, 5)) == (shade(k / 6),) * 3  # without loss
        assert image.info["duration"] == 100


def test_webp_keeps_a_frame_that_does_not_change(tmp_path):
    still = [Image.new("RGB", (8, 8), colour) for colour in ("black", "black", "white")]
    image = Image.open(movies.save_webp(tmp_path / "v.webp", still, fps=3))
    times = []
    for k in range(image.n_frames):
        image.seek(k)
        image.load()
        times.append(image.info["duration"])
    assert times == [667, 333]


def test_movie_is_small(movie, tmp_path):
    assert movies.save_webp(tmp_path / "m.webp", movie[1], 12).stat().st_size < 100_000


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(labels=["a"]), "N labels"),
        (dict(past=torch.rand(6, 3, 8, 8)), "same frame size"),
        (dict(past=torch.rand(6, 16, 16)), "a past"),
        (dict(reads=torch.tensor([[0, 6]] * 2)), "no frames 0 to 6"),
        (dict(reads=torch.tensor([[0, 1]])), "for 3 rows"),
        (dict(reads=torch.tensor([0, 1])), "frames .G, L."),
    ],
)
def test_film_fork_refuses_what_does_not_fit(fork, change, match):
    args = dict(past=fork[0], reads=READS, branches=fork[1], labels=["a", "b", "c"]) | change
    with pytest.raises(ValueError, match=match):
        viz.film_fork(**args)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(liked=[True]), "which are liked"),
        (dict(before=grey(0.1)), "before and after must be"),
        (dict(reads=READS[:1]), "for 2 rows|liked"),
        (dict(labels=["a"]), "N labels"),
    ],
)
def test_movie_refuses_what_does_not_fit(movie, change, match):
    with pytest.raises(ValueError, match=match):
        movies.fork_movie(**(movie[0] | change))
