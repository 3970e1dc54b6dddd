"""The page to play with (docs/index.html) is whole: small, of its own files alone, and every click leads somewhere."""

import itertools
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
INDEX = DOCS / "index.html"
HTML = INDEX.read_text(encoding="utf-8")
WRITTEN = [INDEX, DOCS / "page" / "page.css", DOCS / "page" / "page.js"]
REMAKE = "run `python benchmarks/page.py --only_lines`"


@pytest.fixture(scope="module")
def data():
    text = (DOCS / "page" / "data.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def frames(name):
    """How many rows and columns of frames a picture has."""
    with Image.open(DOCS / "page" / f"{name}.webp") as picture:
        assert picture.width % 64 == picture.height % 64 == 0
        return picture.height // 64, picture.width // 64


def test_a_phone_can_load_it_and_a_person_can_read_it():
    assert sum(path.stat().st_size for path in [INDEX, *(DOCS / "page").iterdir()]) <= 4_000_000
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in WRITTEN) <= 500


def test_nothing_comes_from_elsewhere():
    for path in [*WRITTEN, DOCS / "page" / "data.js"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|[\"'(]//|@import|\bimport\b.*from|fetch\(|XMLHttpRequest", text), path.name


def test_every_file_it_names_is_there():
    named = re.findall(r'(?:href|src)="(?!data:)([^"#]+)', HTML)
    assert len(named) > 10
    for target in named:
        assert (DOCS / target).is_file(), target
    for anchor in re.findall(r'href="#([^"]+)"', HTML):
        assert f'id="{anchor}"' in HTML


def test_links_to_code_lead_to_the_line():
    links = re.findall(r'href="([^"#]+)#L(\d+)" data-def="([^"]+)"', HTML)
    assert len(links) >= 6
    for path, number, start in links:
        line = (DOCS / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert line.lstrip().startswith(start), f"{path}#L{number} is '{line}': {REMAKE}"


def test_every_click_leads_to_a_recorded_route(data):
    lattice = data["lattice"]
    routes = lattice["routes"]
    assert len(routes) >= 60
    # the page keeps so many cards lit, whichever is clicked: each such choice must have its film
    for choice in itertools.combinations(lattice["cards"], lattice["chosen"]):
        assert "-".join(map(str, choice)) in routes
    assert len(set(routes)) == len(routes)
    assert frames("routes") == (len(routes) + 1, 6)  # the usual memory's film is last
    assert len(lattice["ends"]) == len(lattice["rewards"]) == len(routes) + 1
    assert frames("fresh") == (len(lattice["freshEnds"]), 6)
    assert frames("past") == (1, lattice["fork"]) == (1, len(lattice["scenes"]))


def test_memory_tells_more_stories_than_noise(data):
    lattice = data["lattice"]
    assert len(set(lattice["ends"])) > len(set(lattice["freshEnds"]))


def test_every_update_has_its_films_and_its_group(data):
    run = data["runs"][0]
    updates = len(run["groups"])
    assert len(run["films"]) == len(run["liked"]) == updates + 1
    assert frames("updates") == (5 * (updates + 1), run["frames"])
    assert frames("groups") == (updates, len(run["groups"][0]["ends"]))
    for group in run["groups"]:
        for advantage, p, force in zip(group["A"], group["p"], group["force"], strict=True):
            assert force == pytest.approx(advantage - p * sum(group["A"]), abs=0.01)


def test_every_taste_has_its_films(data):
    assert len(data["runs"]) == 3
    assert len({tuple(run["like"]) for run in data["runs"]}) == 3
    for k, run in enumerate(data["runs"]):
        assert frames(f"ends{k}") == (2, len(run["before"])) == (2, len(run["after"]))
        assert frames(f"pairs{k}") == (2 * len(run["pairs"]), run["frames"])
        for ends, liked in ((run["before"], run["liked"][0]), (run["after"], run["liked"][-1])):
            assert sum(end in run["like"] for end in ends) / len(ends) == pytest.approx(liked, abs=0.001)


def test_the_readme_links_to_it_on_its_first_screen():
    top = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:16]
    assert any("(docs/index.html)" in line for line in top)
