"""The pocket world against its own words: a naive renderer, a naive search for the nearest clean frame, and paths and
readings made by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.testing import assert_close

from kvpo_min.pocket import world
from kvpo_min.pocket.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    OPEN,
    REST,
    SHAPES,
    SIZE,
    SPEEDS,
    SWITCHES,
    TEXT_DIM,
    TEXT_LEN,
    WALL,
    WORDS,
    PromptError,
    Reading,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def every_look(seed=0):
    """All shapes, sizes, colours and backgrounds, each at a random place of the 64x64. -> states [96, 6]"""
    looks = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(6), torch.arange(2))
    return torch.cat([looks, torch.randint(0, SIZE, (len(looks), 2), generator=seeded(seed))], 1)


def steps_of(states):
    """[T - 1, 2] steps (dy, dx) of the sprite, the shorter way round the torus."""
    return (states[1:, 4:] - states[:-1, 4:] + SIZE // 2) % SIZE - SIZE // 2


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "script, colours, motions",
    [
        ("a disc", [None], [None]),
        ("a red disc", ["red"], [None]),
        ("a disc moves", [None], ["moves"]),
        ("a red disc moves left", ["red"], ["left"]),
        ("a cross changes colour", ["changes"], [None]),
        ("a blue cross changes colour", ["changes blue"], [None]),
        ("a purple triangle changes colour and moves up", ["changes purple"], ["up"]),
        ("a square rests", [None], ["rest"]),
        ("a square wanders and changes colour", ["changes"], ["wanders"]),
        ("a disc | it turns", [None, None], [None, "turns"]),
        ("a disc | it turns blue", [None, "blue"], [None, None]),
        ("a disc | it turns blue and turns", [None, "blue"], [None, "turns"]),
        ("a disc | it turns and turns blue", [None, "blue"], [None, "turns"]),
        ("a disc|it moves down  and  changes colour", [None, "changes"], [None, "down"]),
        ("a disc | it rests | it wanders | it moves", [None] * 4, [None, "rest", "wanders", "moves"]),
    ],
)
def test_scripts_of_the_grammar(script, colours, motions):
    segments = world.parse(script)
    assert [s.colour for s in segments] == colours and [s.motion for s in segments] == motions
    assert segments[0].shape in SHAPES and all(s.shape is None for s in segments[1:])
    assert world.segments_of(script) == [" ".join(part.split()) for part in script.split("|")]


BAD_LINES = [
    ("a rad disc moves left", r"'rad' \(did you mean 'red'\?\)"),
    ("a red dics", r"'dics' \(did you mean 'disc'\?\)"),
    ("a red disc mvoes left", r"did you mean 'moves'"),
    ("a red disc moves lefft", r"did you mean 'left'"),
    ("a disc changes color", r"'color' \(did you mean 'colour'\?\)"),
    ("a red disc zigzags", r"expected known words, got 'zigzags'\."),  # nothing is near enough to be proposed
    ("A red disc", r"expected known words, got 'A'"),
    ("a red disc, moves left", r"got 'disc,' \(did you mean 'disc'\?\)"),
    ("the red disc", r"expected known words, got 'the'"),
    ("red disc moves left", r"a first segment like 'a red disc moves left'"),
    ("it moves left", r"a first segment like"),
    ("a red disc | a blue disc", r"a later segment like 'it turns blue'"),
    ("a red disc | ", r"'': expected a later segment"),
    ("| it turns", r"'': expected a first segment"),
    ("a", r"a shape \(disc, square, triangle, cross\) after 'a'"),
    ("a red", r"a shape .* after 'a red'"),
    ("a moves left", r"a shape .* after 'a'"),
    ("a red blue disc", r"a shape .* after 'a red'"),
    ("a disc red", r"an action .* got 'red'"),
    ("a disc left", r"an action .* got 'left'"),
    ("a disc moves blue", r"an action .* got 'moves'"),
    ("a disc | it turns left", r"an action .* got 'turns'"),
    ("a disc rests left", r"an action .* got 'rests'"),
    ("a disc | it changes", r"an action .* got 'changes'"),
    ("a disc | it", r"an action after 'it'"),
    ("a disc | it and rests", r"an action .* got 'and'"),
    ("a disc | it rests and", r"'and' and a second action"),
    ("a disc | it rests turns blue", r"'and' and a second action"),
    ("a disc moves left and rests", r"at most one motion"),
    ("a disc | it turns and wanders", r"at most one motion"),
    ("a disc | it turns blue and changes colour", r"at most one colour action"),
    ("a disc turns blue", r"the colour before the shape in a first segment"),
    ("a disc | it rests | it rests | it rests | it rests", r"at most 4 segments, got 5"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_lines_are_refused(line, message, tmp_path):
    assert len(BAD_LINES) >= 20
    with pytest.raises(PromptError, match=message):
        world.parse(line)
    path = tmp_path / "prompts.txt"
    path.write_text(f"# comment\n\na red disc\n{line}\n")
    with pytest.raises(PromptError, match=rf"prompts\.txt, line 4: .*{message}") as caught:
        world.read_prompts(path)
    assert f"Known words: {' '.join(WORDS)}" in str(caught.value)


def test_read_prompts_skips_comments_and_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a first comment\n\n  a red disc moves left  \r\n   \n   # another\na cross | it turns blue")
    assert world.read_prompts(path) == ["a red disc moves left", "a cross | it turns blue"]
    path.write_text("# nothing but this\n\n")
    with pytest.raises(PromptError, match=r"prompts\.txt: no prompts in it"):
        world.read_prompts(path)
    with pytest.raises(FileNotFoundError):
        world.read_prompts(tmp_path / "missing.txt")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*WORDS, "|", "|", "it", "and", "moves", "turns", "dsic", ""]), max_size=12))
def test_any_line_is_either_told_or_refused(words):
    """What the parser accepts, everything else can work with; what it refuses, it refuses with a `PromptError`."""
    line = " ".join(["a", "disc", *words])
    try:
        segments = world.parse(line)
    except PromptError:
        return
    texts = world.segments_of(line)
    assert len(segments) == len(texts) == len(world.resolve(line))
    assert world.embed(texts).shape == (len(texts), TEXT_LEN, TEXT_DIM)
    assert world.simulate(line, 45, seeded()).shape == (45, 6)
    world.embed(world.resolve(line))  # the sentences that rewards see are words of the world too


def test_resolve_carries_words_on_and_drops_what_an_event_opens():
    assert world.resolve("a red disc | it moves left") == ["a red disc", "a red disc moves left"]
    assert world.resolve("a disc rests | it turns blue | it changes colour | it wanders") == [
        "a disc rests",
        "a blue disc rests",
        "a disc rests",
        "a disc",
    ]
    assert world.resolve("a red cross changes colour") == ["a cross"]
    assert world.resolve("a red cross moves up | it turns | it moves | it moves down") == [
        "a red cross moves up",
        "a red cross",
        "a red cross",
        "a red cross moves down",
    ]


def test_segments_begin_at_the_switches():
    frames = [0, 38, 39, 74, 75, 110, 111, 146]
    assert [world.segment_at(t, 4) for t in frames] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [world.segment_at(t, 2) for t in frames] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [world.segment_at(t, 1) for t in frames] == [0] * 8


def test_embeddings_are_orthogonal_in_words_and_places():
    line = "a purple triangle changes colour and moves left"
    table = world.embed([line])[0]
    assert table.shape == (TEXT_LEN, TEXT_DIM)
    n = len(line.split())
    assert (table[n:] == 0).all() and (table[:n] != 0).any(1).all()  # padding, and only that
    assert_close(table[:n] @ table[:n].T, 2.0 * TEXT_DIM * torch.eye(n))  # other word, other place: orthogonal

    words = torch.stack([world.embed([word])[0, 0] for word in WORDS])  # all at the first place
    assert_close(words @ words.T, TEXT_DIM + TEXT_DIM * torch.eye(len(WORDS)))  # they share the place and nothing else
    places = world.embed([" ".join(["disc"] * TEXT_LEN)])[0]
    assert_close(places @ places.T, TEXT_DIM + TEXT_DIM * torch.eye(TEXT_LEN))


def test_embeddings_do_not_depend_on_the_batch_or_the_call():
    texts = ["a red disc", "it turns blue and moves up", "it rests"]
    together = world.embed(texts)
    assert together.equal(torch.cat([world.embed([text]) for text in texts]))
    assert together.equal(world.embed(texts))
    for text in ("a pink disc", " ".join(["it"] * (TEXT_LEN + 1))):
        with pytest.raises(PromptError, match="cannot be embedded: at most 10 of the words a it and red"):
            world.embed([text])


def test_prompt_sets():
    assert world.prompt_set(50, 4, seed=3) == world.prompt_set(50, 4, seed=3)
    train, held_out = world.prompt_set(300, 4, seed=0), world.prompt_set(300, 4, seed=1)
    assert len(set(train) & set(held_out)) < 0.02 * 300  # long scripts of two seeds hardly meet
    for n_segments in (1, 2, 4):
        for script in world.prompt_set(100, n_segments, seed=5):
            assert len(world.parse(script)) == n_segments
    used = " ".join(world.prompt_set(300, 4, seed=0)).split()
    assert set(WORDS) <= set(used)  # nothing is known that no story ever says
    first = [world.parse(script)[0] for script in train]
    unnamed = sum(s.colour in (None, "changes") for s in first) / len(first)
    assert 0.3 < unnamed < 0.7  # words are left out, so that history decides
    held = world.prompt_set(40, 4, seed=0, event="changes colour")
    assert held == [script for script in train if "changes colour" in script][:40]
    with pytest.raises(ValueError, match="no script of 1 segments holds 'turns red'"):  # said in later segments only
        world.prompt_set(1, 1, seed=0, event="turns red")


# ---------------------------------------------------------------- stories


def test_stories_do_what_their_words_say():
    compared = 0
    for n_segments, seed in ((1, 0), (4, 1)):
        for k, script in enumerate(world.prompt_set(60, n_segments, seed)):
            states, said = world.simulate(script, 147, seeded(k)), world.expected(script, 147)
            assert (states[:, 0] == said["shape"]).all()
            named = said["colour"] != OPEN
            assert (states[named, 2] == said["colour"][named]).all(), script
            steps = steps_of(states)
            for t in range(1, 147):  # the step to a frame is made under the words of that frame
                motion = int(said["motion"][t])
                if motion == OPEN:
                    continue
                compared += 1
                if motion == REST:
                    assert steps[t - 1].tolist() == [0, 0], (script, t)
                else:
                    dy, dx = DIRECTIONS[MOTIONS[motion]]
                    speed = int(steps[t - 1].abs().max())
                    assert speed in SPEEDS and steps[t - 1].tolist() == [dy * speed, dx * speed], (script, t)
    assert compared > 1000


def test_expected_by_hand():
    said = world.expected("a red disc moves left | it changes colour | it turns blue and turns | it rests", 147)
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    colours = [red] * 39 + [OPEN] * 36 + [blue] * 72
    motions = [MOTIONS.index("left")] * 75 + [OPEN] * 36 + [REST] * 36
    assert said["colour"].tolist() == colours and said["motion"].tolist() == motions
    assert said["shape"].tolist() == [SHAPES.index("disc")] * 147


def test_size_background_and_speed_last_for_the_whole_story():
    drawn = set()
    for k, script in enumerate(world.prompt_set(40, 4, seed=2)):
        states = world.simulate(script, 147, seeded(k))
        for column in (0, 1, 3):  # shape, size, background
            assert (states[:, column] == states[0, column]).all()
        speeds = set(steps_of(states).abs().amax(1).tolist()) - {0}
        assert len(speeds) <= 1 and speeds <= set(SPEEDS)
        assert (states[:, 4:] % 2 == 0).all()  # every other pixel
        drawn.add((int(states[0, 1]), int(states[0, 3])))
    assert len(drawn) == 4  # nothing that is never named is always the same


def test_a_sprite_that_leaves_comes_back_on_the_other_side():
    for name, (dy, _) in DIRECTIONS.items():
        crossings = 0
        for seed in range(4):
            place = world.simulate(f"a disc moves {name}", 60, seeded(seed))[:, 4:]
            assert 0 <= place.min() and place.max() < SIZE
            jump = (place[1:] - place[:-1]).abs().amax(1)
            crossings += int((jump > SIZE // 2).sum())
            across = place[:, 1 if dy else 0]
            assert (across == across[0]).all()
        assert crossings > 0, name  # at 2 pixels a frame 60 frames go nearly twice round


def test_a_wandering_sprite_never_crosses_a_wall_outwards():
    turns = 0
    for seed in range(60):
        states = world.simulate("a disc wanders", 147, seeded(seed))
        place, steps = states[1:, 4:], steps_of(states)
        assert (place[steps < 0] >= WALL[0]).all() and (place[steps > 0] <= WALL[1]).all()
        assert (states[1:, 4:] - states[:-1, 4:]).abs().max() <= max(SPEEDS)  # and never wraps
        assert (steps.abs().amax(1) > 0).all()  # and never stops
        turns += int((steps[1:] != steps[:-1]).any(1).sum())
    assert turns > 60


@pytest.mark.parametrize("event, column", [("changes colour", 2), ("turns", None)])
def test_open_events_happen_once_inside_their_segment(event, column):
    """At least 3 frames after the segment's beginning (12 in the first one) and before its end, where it shows."""
    for k, begin in enumerate((0, *SWITCHES)):
        end = (*SWITCHES, 147)[k]
        script = " | ".join(["a red disc moves left", *["it moves left"] * 3])
        if k == 0 and event == "turns":  # a first segment that turns has no direction of its own
            script = script.replace("a red disc moves left", "a red disc turns")
        else:
            words = script.split(" | ")
            words[k] = f"a red disc moves left and {event}" if k == 0 else f"it {event}"
            script = " | ".join(words)
        seen = set()
        for seed in range(30):
            states = world.simulate(script, 147, seeded(seed))
            inside = states[begin:end]
            shown = inside[:, column][:, None] if column else steps_of(states)[max(begin, 1) - 1 : end - 1]
            changes = (shown[1:] != shown[:-1]).any(1).nonzero()[:, 0] + 1 + (0 if column or begin else 1)
            assert len(changes) == 1, (script, seed)
            assert (12 if k == 0 else 3) <= int(changes[0]) < end - begin - 3
            if column:
                assert (states[:begin, column] == states[0, column]).all()  # not before its segment
            seen.add(int(changes[0]))
        assert len(seen) > 5  # the words do not say when


def test_a_story_is_fixed_by_its_generator():
    script = "a disc wanders and changes colour | it turns | it wanders | it changes colour"
    assert world.simulate(script, 147, seeded(4)).equal(world.simulate(script, 147, seeded(4)))
    stories = {tuple(world.simulate(script, 147, seeded(s)).flatten().tolist()) for s in range(10)}
    assert len(stories) == 10


# ---------------------------------------------------------------- pictures


def naive_frame(state):
    """One frame, pixel by pixel and sample by sample, from the geometry in words: a disc of radius r; a square of half
    side .88 r; an upright triangle of height and base 1.9 r; a cross of arms .76 r wide. 4 x 4 samples a pixel."""
    shape, size, colour, background, y0, x0 = (int(v) for v in state)
    r = (8, 11)[size]

    def inside(y, x):
        if shape == 0:
            return y * y + x * x <= r * r
        if shape == 1:
            return max(abs(y), abs(x)) <= 0.88 * r
        if shape == 2:
            return -1.1 * r + 2 * abs(x) <= y <= 0.8 * r
        return min(abs(y), abs(x)) <= 0.38 * r and max(abs(y), abs(x)) <= r

    ink, paper = np.array(list(COLOURS.values())[colour]), np.array(BACKGROUNDS[background])
    frame = np.empty((3, SIZE, SIZE))
    for i in range(SIZE):
        for j in range(SIZE):
            dy, dx = (i - y0 + 32) % 64 - 32, (j - x0 + 32) % 64 - 32  # pixels from the centre, the shorter way round
            hits = 0
            if max(abs(dy), abs(dx)) <= r + 1:
                for a in (-0.375, -0.125, 0.125, 0.375):
                    for b in (-0.375, -0.125, 0.125, 0.375):
                        hits += inside(dy + a, dx + b)
            frame[:, i, j] = paper + hits / 16 * (ink - paper)
    return torch.tensor(frame)


@pytest.mark.parametrize("shape", range(4), ids=SHAPES)
def test_render_against_a_naive_renderer(shape):
    states = torch.tensor([[shape, 0, 1 + shape, 1, 20, 40], [shape, 1, (5 * shape) % 6, 0, 62, 2]])  # one wraps twice
    expected = torch.stack([naive_frame(state) for state in states])
    assert_close(world.render(states).double(), expected, rtol=0, atol=1e-6)


def test_render_keeps_leading_dimensions():
    states = every_look()[:6].reshape(2, 3, 6)
    frames = world.render(states)
    assert frames.shape == (2, 3, 3, SIZE, SIZE)
    assert frames[1, 2].equal(world.render(states[1, 2])) and 0 <= frames.min() and frames.max() <= 1


# ---------------------------------------------------------------- judge


def test_the_judge_reads_clean_frames_exactly():
    states = torch.cat([every_look(0), every_look(1)])
    reading = world.judge(world.render(states)[:, None])
    assert reading.shape[:, 0].equal(states[:, 0]) and reading.colour[:, 0].equal(states[:, 2])
    assert reading.place[:, 0].equal(states[:, 4:])
    assert reading.distance.max() < 0.01 and reading.valid.all()
    found, _ = world._nearest_clean(world.render(states))  # size and background too, which it does not report
    assert found.equal(states)


def test_the_judge_reads_clean_stories():
    scripts = world.prompt_set(6, 4, seed=8)
    videos = torch.stack([world.render(world.simulate(s, 126, seeded(k))) for k, s in enumerate(scripts)])
    seen = world.correctness(world.judge(videos), scripts)
    assert seen["valid"] == seen["colour"] == seen["shape"] == 1
    # Motion is read over two frames, so a frame beside a turn can show either heading: at most 2 in 36.
    assert seen["motion"] > 1 - 2 / 36 and seen["all"] > 1 - 2 / 36 and seen["distance"] < 0.01


def naive_distances(frame, states):
    """Squared distance of one frame to the renderings of many states, by subtraction. -> [len(states)]"""
    parts = [(world.render(part) - frame).double().square().sum((1, 2, 3)) for part in states.split(256)]
    return torch.cat(parts)


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_rendering_against_a_naive_search(seed):
    truth = every_look(seed)[[7, 31, 58, 94][seed]]
    frame = world.render(truth) + 0.12 * torch.randn(3, SIZE, SIZE, generator=seeded(seed))
    looks = every_look()[:, :4]
    around = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))  # the places next to the true one
    places = (truth[4:] + around) % SIZE
    candidates = torch.cat([looks.repeat_interleave(9, 0), places.repeat(len(looks), 1)], 1)  # [864, 6]
    squared = naive_distances(frame, candidates)
    state, distance = world._nearest_clean(frame[None])
    assert state[0].equal(candidates[squared.argmin()]) and state[0].equal(truth)
    paper = torch.tensor(BACKGROUNDS)[truth[3]][:, None, None]
    own = (squared.min() / (world.render(truth) - paper).double().square().sum()).sqrt()
    assert_close(distance[0].double(), own, rtol=1e-3, atol=0)


def test_no_rendering_is_nearer_than_the_one_found():
    """On frames that are nothing in particular: no state out of many is nearer than the judge's."""
    frames = torch.rand(3, 3, SIZE, SIZE, generator=seeded()) * torch.tensor([1.0, 0.5, 0.2])[:, None, None, None]
    states, _ = world._nearest_clean(frames)
    others = torch.cat([every_look(seed) for seed in range(8)])
    for frame, state in zip(frames, states, strict=True):
        assert naive_distances(frame, state[None]) <= naive_distances(frame, others).min() + 1e-2


SPRITE = torch.tensor([0, 1, 4, 0, 30, 36])  # a large blue disc on the darker background


def blurred(frame, width):
    if width == 1:
        return frame
    padded = F.pad(frame[None], [width // 2] * 4, mode="circular")
    return F.avg_pool2d(padded, width, stride=1)[0]


def noisy(frame, level):
    return frame + level * torch.randn(frame.shape, generator=seeded(3))


def faded(frame, share):  # 1: the sprite is gone
    paper = torch.tensor(BACKGROUNDS)[SPRITE[3]][:, None, None]
    return frame + share * (paper - frame)


def two_coloured(frame, columns):  # the left `columns` of the disc are yellow
    other = SPRITE.clone()
    other[2] = list(COLOURS).index("yellow")
    mixed = frame.clone()
    edge = int(SPRITE[5]) - 11
    mixed[:, :, edge : edge + columns] = world.render(other)[:, :, edge : edge + columns]
    return mixed


@pytest.mark.parametrize(
    "damage, levels",
    [
        (blurred, [1, 3, 5, 9, 15]),
        (noisy, [0.0, 0.005, 0.01, 0.02, 0.05, 0.1]),
        (faded, [0.0, 0.2, 0.4]),
        (two_coloured, [0, 3, 6, 9]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_more_damage_is_further_away(damage, levels):
    frames = torch.stack([damage(world.render(SPRITE), level) for level in levels])
    distance = world.judge(frames[None]).distance[0]
    assert distance[0] < 0.01 and (distance.diff() > 0.01).all(), distance.tolist()


def test_an_empty_frame_is_no_sprite():
    papers = torch.tensor(BACKGROUNDS)[None, :, :, None, None].expand(1, 2, 3, SIZE, SIZE)
    reading = world.judge(papers)
    assert_close(reading.distance, torch.ones(1, 2), rtol=0, atol=0.01)
    assert not reading.valid.any()
    gone = world.judge(faded(world.render(SPRITE), 1.0)[None, None])
    assert_close(gone.distance, torch.ones(1, 1), rtol=0, atol=0.01)


def test_the_judge_refuses_other_videos():
    for shape in [(2, 3, SIZE, SIZE), (1, 2, 1, SIZE, SIZE), (1, 2, 3, 32, 32)]:
        with pytest.raises(ValueError, match=r"reads videos \[N, T, 3, 64, 64\], got \["):
            world.judge(torch.zeros(shape))


@pytest.mark.parametrize("name", MOTIONS)
def test_motion_of_straight_paths(name):
    dy, dx = DIRECTIONS.get(name, (0, 0))
    for speed in SPEEDS:
        t = torch.arange(40)[:, None]
        path = (torch.tensor([50, 10]) + speed * t * torch.tensor([dy, dx])) % SIZE  # goes over the edge
        assert (world.motion_of(path[None]) == MOTIONS.index(name)).all()


def test_motion_of_paths_made_by_hand():
    def read(path):
        return [MOTIONS[m] for m in world.motion_of(torch.tensor(path)[None])[0].tolist()]

    corner = [[10, 10], [10, 14], [10, 18], [14, 18], [18, 18], [18, 18], [18, 18]]
    assert read(corner) == ["right", "right", "right", "down", "down", "rest", "rest"]  # the corner, frame 2: sideways
    assert read([[10, 10]]) == ["rest"]
    assert read([[10, 10], [8, 10]]) == ["up", "up"]
    assert read([[0, 0], [0, 1], [0, 0], [0, 1], [0, 0]])[1:-1] == ["rest"] * 3  # a tremble is not a motion
    assert read([[0, 62], [0, 0], [0, 2]]) == ["right"] * 3 and read([[0, 2], [0, 0], [0, 62]]) == ["left"] * 3


def reading_of(colour, shape, motion, distance):
    columns = [torch.tensor([values]) for values in (colour, shape, motion, distance)]
    return Reading(*columns, torch.zeros(1, len(colour), 2, dtype=torch.long))


def test_correctness_by_hand():
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    left, up = MOTIONS.index("left"), MOTIONS.index("up")
    #                     right       wrong colour  wrong shape   wrong motion  right, but no sprite
    reading = reading_of([red, blue, red, red, red], [0, 0, 1, 0, 0], [left, left, left, up, left],
                         [0.1, 0.1, 0.1, 0.3, 0.9])  # fmt: skip
    seen = world.correctness(reading, ["a red disc moves left"])
    assert seen["valid"] == pytest.approx(4 / 5)
    assert seen["colour"] == seen["shape"] == seen["motion"] == pytest.approx(3 / 5)
    assert seen["all"] == pytest.approx(1 / 5)
    assert seen["warm"] == pytest.approx(3 / 4)  # of the valid frames
    assert seen["distance"] == pytest.approx(0.3)

    seen = world.correctness(reading, ["a disc"])  # only the shape is named
    assert math.isnan(seen["colour"]) and math.isnan(seen["motion"])
    assert seen["shape"] == pytest.approx(3 / 5) == seen["all"]

    nothing = reading_of([red], [0], [left], [7.0])
    seen = world.correctness(nothing, ["a red disc"])
    assert seen["valid"] == seen["colour"] == seen["all"] == 0 and math.isnan(seen["warm"])
    assert seen["distance"] == 2  # one wild frame does not decide the mean


def test_correctness_counts_each_video_by_its_own_words():
    one, two = reading_of([0], [0], [0], [0.0]), reading_of([4], [1], [2], [0.0])
    both = Reading(*(torch.cat([getattr(r, n) for r in (one, two)]) for n in one.__dataclass_fields__))
    seen = world.correctness(both, ["a red disc", "a red square"])
    assert seen["colour"] == 0.5 and seen["shape"] == 1 and seen["all"] == 0.5


def test_story_is_the_order_of_what_lasts():
    a, b = (0, 0, 0), (4, 0, 0)
    runs = [(a, 5), (b, 2), (a, 3), (b, 4), ((4, 0, 1), 3), (a, 1)]
    frames = [state for state, length in runs for _ in range(length)]
    colour, shape, motion = zip(*frames, strict=True)
    reading = reading_of(colour, shape, motion, [0.0] * len(frames))
    assert world.story(reading, 0) == [a, b, (4, 0, 1)]  # the flicker of two frames is not told
    assert world.story(reading, 0, shortest=2) == [a, b, a, b, (4, 0, 1)]
    assert world.story(reading, 0, shortest=6) == []
