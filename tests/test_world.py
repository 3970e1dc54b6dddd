"""The pocket world against its own words: a naive painter, an exhaustive search over every clean frame there is, loops
over frames, and stories and readings made by hand."""

import math
import re
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.testing import assert_close

from kvpo_min.pocket import world
from kvpo_min.pocket.world import (
    COLOURS,
    DAYLIGHT,
    DIRECTIONS,
    GRID,
    MOTIONS,
    OPEN,
    OUTLINE,
    REST,
    SCENES,
    SHAPES,
    SIZE,
    SWITCHES,
    TEXT_DIM,
    TEXT_LEN,
    WORDS,
    PromptError,
    Reading,
    Segment,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BEACH, NIGHT, MEADOW, DUSK, FOREST, SNOW = range(6)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_states(n, seed=0):
    """Every shape, size, colour, scene and place, uniformly. -> [n, 6]"""
    sizes = torch.tensor([4, 2, 6, 6, 8, 8])
    states = (torch.rand(n, 6, generator=seeded(seed)) * sizes).long()
    states[:, 4:] *= GRID
    return states


def every_look(seed=0):
    """All shapes, sizes, colours and scenes, each at a random place. -> states [288, 6]"""
    looks = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(6), torch.arange(6))
    return torch.cat([looks, GRID * torch.randint(0, 8, (len(looks), 2), generator=seeded(seed))], 1)


def steps_of(states):
    """[T - 1, 2] steps (dy, dx) of the hero, the shorter way round the torus."""
    return (states[1:, 4:] - states[:-1, 4:] + SIZE // 2) % SIZE - SIZE // 2


def changes(column):
    """Frames at which a column of states is not what it was one frame before."""
    return (column[1:] != column[:-1]).nonzero()[:, 0].add(1).tolist()


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "script, said",
    [
        ("a disc", [{"shape": "disc"}]),
        ("a red disc", [{"shape": "disc", "colour": "red"}]),
        ("a cross at the snow", [{"shape": "cross", "place": "snow"}]),
        ("a blue cross at the night rests", [dict(shape="cross", colour="blue", place="night", motion="rest")]),
        *[(f"a disc moves {d}", [{"shape": "disc", "motion": d}]) for d in DIRECTIONS],
        ("a square rests", [{"shape": "square", "motion": "rest"}]),
        ("a square wanders", [{"shape": "square", "motion": "wanders"}]),
        *[(f"a disc turns {c}", [{"shape": "disc", "turns": c}]) for c in COLOURS],
        ("a red disc changes colour", [{"shape": "disc", "colour": "red", "turns": "changes"}]),
        ("a triangle travels", [{"shape": "triangle", "travels": True}]),
        *[(f"a disc travels from the {s}", [{"shape": "disc", "travels": True, "place": s}]) for s in SCENES],
        ("a disc at the beach travels", [{"shape": "disc", "travels": True, "place": "beach"}]),
        ("a disc travels and settles", [{"shape": "disc", "travels": True, "settles": True}]),
        ("a disc rests and travels and settles", [dict(shape="disc", travels=True, settles=True, motion="rest")]),
        (
            "a disc turns blue and travels from the dusk and settles",
            [dict(shape="disc", turns="blue", travels=True, place="dusk", settles=True)],
        ),
        ("a disc | it settles", [{"shape": "disc"}, {"settles": True}]),
        ("a disc | it travels and settles", [{"shape": "disc"}, {"travels": True, "settles": True}]),
        ("a disc|it moves down  and  changes colour", [{"shape": "disc"}, {"motion": "down", "turns": "changes"}]),
        (
            "a disc | it travels and wanders | it settles and turns red | it rests",
            [{"shape": "disc"}, {"travels": True, "motion": "wanders"}, {"settles": True, "turns": "red"},
             {"motion": "rest"}],
        ),
    ],
)  # fmt: skip
def test_scripts_of_the_grammar(script, said):
    texts = [" ".join(part.split()) for part in script.split("|")]
    assert world.parse(script) == tuple(Segment(text, **what) for text, what in zip(texts, said, strict=True))
    assert world.segments_of(script) == texts


ACTION = r"an action \(moves DIRECTION, rests, wanders, turns COLOUR, changes colour, travels, settles\), got "
SETTLES = r"'settles' once, and in a first segment after 'travels' \('a disc travels and settles'\)"
TRAVELS = r"'travels' once, and before 'settles'"
PLACES = r"and a scene \(beach, night, meadow, dusk, forest, snow\)"
BAD_LINES = [
    ("a rad disc moves left", r"'rad' \(did you mean 'red'\?\)"),
    ("a red dics", r"'dics' \(did you mean 'disc'\?\)"),
    ("a red disc mvoes left", r"did you mean 'moves'"),
    ("a disc changes color", r"'color' \(did you mean 'colour'\?\)"),
    ("a disc at the forrest", r"'forrest' \(did you mean 'forest'\?\)"),
    ("a disc travels and setles", r"'setles' \(did you mean 'settles'\?\)"),
    ("a red disc zigzags", r"expected known words, got 'zigzags'\."),  # nothing is near enough to be proposed
    ("A red disc", r"expected known words, got 'A'"),
    ("a red disc, moves left", r"got 'disc,' \(did you mean 'disc'\?\)"),
    ("the red disc", r"'the red disc': expected a first segment"),
    ("red disc moves left", r"a first segment like 'a red disc moves left'"),
    ("it moves left", r"a first segment like"),
    ("", r"'': expected a first segment"),
    ("a red disc | a blue disc", r"'a blue disc': expected a later segment like 'it turns blue'"),
    ("a red disc | ", r"'': expected a later segment"),
    ("| it turns blue", r"'': expected a first segment"),
    ("a", r"a shape \(disc, square, triangle, cross\) after 'a'"),
    ("a red", r"a shape .* after 'a red'"),
    ("a moves left", r"a shape .* after 'a'"),
    ("a red blue disc", r"a shape .* after 'a red'"),
    ("a disc red", ACTION + "'red'"),
    ("a disc left", ACTION + "'left'"),
    ("a disc the beach", ACTION + "'the'"),
    ("a disc from the beach", ACTION + "'from'"),
    ("a disc moves blue", ACTION + "'moves'"),
    ("a disc turns", ACTION + "'turns'"),
    ("a disc turns left", ACTION + "'turns'"),
    ("a disc rests left", ACTION + "'rests'"),
    ("a disc changes", ACTION + "'changes'"),
    ("a disc changes blue", ACTION + "'changes'"),
    ("a disc travels left", ACTION + "'travels'"),
    ("a disc travels and settles blue", ACTION + "'settles'"),
    ("a disc | it", r"an action after 'it'"),
    ("a disc | it and rests", ACTION + "'and'"),
    ("a disc | it at the beach", ACTION + "'at'"),
    ("a disc | it rests and", r"'and' and another action"),
    ("a disc | it rests turns blue", r"'and' and another action"),
    ("a disc moves left at the beach", r"'and' and another action"),  # the scene comes before the actions
    ("a disc moves left and rests", r"at most one motion"),
    ("a disc | it wanders and wanders", r"at most one motion"),
    ("a disc | it turns blue and changes colour", r"at most one colour action"),
    ("a disc travels and travels", TRAVELS),
    ("a disc | it settles and travels", TRAVELS),
    ("a disc settles", SETTLES),
    ("a disc at the beach settles", SETTLES),
    ("a disc travels and settles and settles", SETTLES),
    ("a disc | it settles and settles", SETTLES),
    ("a disc at the", "'at the' " + PLACES),
    ("a disc at beach", "'at the' " + PLACES),
    ("a disc at the red", "'at the' " + PLACES),
    ("a disc travels from the", "'from the' " + PLACES),
    ("a disc travels from night", "'from the' " + PLACES),
    ("a disc | it travels from the beach", r"'from the SCENE' only in a first segment: later ones go on where"),
    ("a disc at the beach travels from the night", r"the first scene once \('at the beach' or 'from the night'\)"),
    ("a disc at the beach travels from the beach", r"the first scene once"),
    ("a red disc travels from the snow and settles and moves left and rests", r"at most one motion"),
    ("a red disc travels from the snow and settles and moves left and turns blue", r"at most 12 words, got 15"),
    ("a disc | it rests | it rests | it rests | it rests", r"expected at most 4 segments, got 5"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_lines_are_refused(line, message, tmp_path):
    with pytest.raises(PromptError, match=message) as caught:
        world.parse(line)
    assert f"Known words: {' '.join(WORDS)}" in str(caught.value)
    if line:  # an empty line of a file is skipped
        path = tmp_path / "prompts.txt"
        path.write_text(f"# comment\n\na red disc\n{line}\n")
        with pytest.raises(PromptError, match=rf"prompts\.txt, line 4: .*{message}"):
            world.read_prompts(path)


def test_every_word_that_is_expected_is_named():
    """A message must hold the words that would have been right, and they must all be words."""
    for name, words in (("shape", SHAPES), ("scene", SCENES)):
        line = "a at" if name == "shape" else "a disc at the a"
        with pytest.raises(PromptError) as caught:
            world.parse(line)
        assert ", ".join(words) in str(caught.value)
    assert len(set(WORDS)) == len(WORDS) and {*COLOURS, *SHAPES, *SCENES, *DIRECTIONS} < set(WORDS)


def test_read_prompts_skips_comments_and_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeff# a first comment\n\n  a red disc moves left  \r\n   \n   # another\na cross | it turns blue"
    )
    assert world.read_prompts(path) == ["a red disc moves left", "a cross | it turns blue"]
    path.write_text("# nothing but this\n\n")
    with pytest.raises(PromptError, match=r"prompts\.txt: no prompts in it"):
        world.read_prompts(path)
    with pytest.raises(FileNotFoundError):
        world.read_prompts(tmp_path / "missing.txt")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*WORDS, "|", "|", "it", "and", "and", "travels", "settles", "moves", "turns", "dsic", ""]),
        max_size=12,
    )
)
def test_any_line_is_either_told_or_refused(words):
    """What the parser accepts, everything else can work with; what it refuses, it refuses with a `PromptError`."""
    line = " ".join(["a", "disc", *words])
    try:
        segments = world.parse(line)
    except PromptError:
        return
    texts = world.segments_of(line)
    assert len(segments) == len(texts) and world.embed(texts).shape == (len(texts), TEXT_LEN, TEXT_DIM)
    assert world.simulate(line, 45, seeded()).shape == (45, 6)
    assert world.resolve(line, range(21, 39)).startswith("a ")


def naive_segment(text, first):
    """What a segment of the grammar says, read with regular expressions."""

    def one(pattern):
        found = re.search(rf"\b{pattern}\b", text)
        return found and found[1]

    colour = one(rf"^a ({'|'.join(COLOURS)})") if first else None
    motion = one(rf"moves ({'|'.join(DIRECTIONS)})") or one("(rests|wanders)")
    turns = one(rf"turns ({'|'.join(COLOURS)})") or one("(changes) colour")
    shape, place = one(f"({'|'.join(SHAPES)})"), one(r"(?:at|from) the (\w+)")
    motion = "rest" if motion == "rests" else motion
    return Segment(text, colour, shape, place, motion, turns, "travels" in text, "settles" in text)


def test_500_drawn_scripts_are_read_as_they_were_written():
    drawn, generator = [], seeded(1)
    for k in range(500):
        script = world.sample_script(generator, 1 + k % 4)
        segments = world.parse(script)
        assert len(segments) == 1 + k % 4
        texts = script.split(" | ")
        assert all(len(text.split()) <= TEXT_LEN for text in texts) and world.segments_of(script) == texts
        assert segments == tuple(naive_segment(text, k == 0) for k, text in enumerate(texts)), script
        drawn.append(script)
    assert set(" ".join(drawn).split()) - {"|"} == set(WORDS)  # nothing is known that no story ever says
    first = [naive_segment(script.split(" | ")[0], True) for script in drawn]
    short = [naive_segment(script, True) for script in drawn[::4]]

    def share(of, what):
        return sum(bool(what(segment)) for segment in of) / len(of)

    assert 0.55 < share(first, lambda s: s.colour) < 0.78
    assert 0.65 < share(first, lambda s: s.place) < 0.85
    assert 0.58 < share(first, lambda s: s.travels) < 0.76
    travellers = [s for s in short if s.travels]
    assert 0.65 < share(travellers, lambda s: s.settles) < 0.95
    assert not any(s.settles and not s.travels for s in first)


def test_later_segments_let_a_hero_settle_only_while_it_travels():
    settled = 0
    for script in world.prompt_set(150, 4, seed=4):
        travels = False
        for segment in world.parse(script):
            assert not (segment.settles and not (travels or segment.travels)), script
            assert not (segment.travels and travels), script  # nor set out twice
            travels, settled = (travels or segment.travels) and not segment.settles, settled + segment.settles
    assert settled > 150


def test_embeddings_are_orthogonal_in_words_and_places():
    line = "a purple triangle travels from the night and settles and rests"
    table = world.embed([line])[0]
    assert table.shape == (TEXT_LEN, TEXT_DIM)
    n = len(line.split())
    assert (table[n:] == 0).all() and (table[:n] != 0).any(1).all()  # padding, and only that
    repeated = torch.tensor([[float(a == b) for b in line.split()] for a in line.split()])
    gram = TEXT_DIM * (torch.eye(n) + repeated)  # other word, other place: orthogonal
    assert_close(table[:n] @ table[:n].T, gram)

    words = torch.stack([world.embed([word])[0, 0] for word in WORDS])  # all at the first place
    assert_close(words @ words.T, TEXT_DIM + TEXT_DIM * torch.eye(len(WORDS)))  # they share the place and nothing else
    places = world.embed([" ".join(["disc"] * TEXT_LEN)])[0]
    assert_close(places @ places.T, TEXT_DIM + TEXT_DIM * torch.eye(TEXT_LEN))


def test_embeddings_do_not_depend_on_the_batch_or_the_call():
    texts = ["a red disc", "it turns blue and moves up", "it settles"]
    together = world.embed(texts)
    assert together.equal(torch.cat([world.embed([text]) for text in texts]))
    assert together.equal(world.embed(texts))
    for text in ("a pink disc", " ".join(["it"] * (TEXT_LEN + 1))):
        with pytest.raises(PromptError, match="at most 12 of the words a it"):
            world.embed([text])


def test_prompt_sets():
    assert world.prompt_set(50, 4, seed=3) == world.prompt_set(50, 4, seed=3)
    train, held_out = world.prompt_set(200, 4, seed=0), world.prompt_set(200, 4, seed=1)
    assert len(set(train) & set(held_out)) < 0.02 * 200  # long scripts of two seeds hardly meet
    for event in ("settles", "changes colour", "wanders"):
        held = world.prompt_set(30, 1, seed=0, event=event)
        assert held == [script for script in world.prompt_set(400, 1, seed=0) if event in script][:30]
    held = world.prompt_set(20, 1, seed=0, event="from the,settles")
    assert held and all("from the" in script and "settles" in script for script in held)
    with pytest.raises(ValueError, match="'melts'.*'settles', 'wanders', 'turns'"):
        world.prompt_set(1, 1, seed=0, event="melts")


def test_segments_and_events_have_their_frames():
    frames = [0, 38, 39, 74, 75, 110, 111, 146]
    assert [world.segment_at(t, 4) for t in frames] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [world.segment_at(t, 2) for t in frames] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [world.segment_at(t, 1) for t in frames] == [0] * 8
    assert [world.event_frame(k) for k in range(4)] == [27, 45, 81, 117]


# ---------------------------------------------------------------- stories


def test_a_traveller_goes_round_the_ring_at_frames_6_12_18():
    t = torch.arange(147)
    for k, name in enumerate(SCENES):
        scene = world.simulate(f"a disc travels from the {name}", 147, seeded(k))[:, 3]
        assert scene.equal((k + t // 6) % 6)
    scene = world.simulate("a disc at the snow | it travels | it rests | it turns blue", 147, seeded())[:, 3]
    assert scene.equal((SNOW + ((t - 36) // 6).clamp(min=0)) % 6)  # its words come at 39
    assert changes(world.simulate("a disc at the snow", 147, seeded())[:, 3]) == []


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_hero_that_moves_comes_back_on_the_other_side(name):
    dy, dx = DIRECTIONS[name]
    for seed in range(3):
        states = world.simulate(f"a disc moves {name}", 60, seeded(seed))
        t = torch.arange(60)[:, None]
        assert states[:, 4:].equal((states[0, 4:] + GRID * t * torch.tensor([dy, dx])) % 64)


def test_motions_last_until_other_words_come():
    script = "a disc moves up | it turns red | it rests | it moves left"
    steps = steps_of(world.simulate(script, 147, seeded(3)))
    assert (steps[:74] == torch.tensor([-GRID, 0])).all() and (steps[74:110] == 0).all()  # steps to frames 75, 111
    assert (steps[110:] == torch.tensor([0, -GRID])).all()
    drawn = {tuple(steps_of(world.simulate("a disc", 2, seeded(s)))[0].tolist()) for s in range(60)}
    assert drawn == {(0, 0)}  # nothing said: it rests


def test_a_wandering_hero_leaps_at_the_beats_only():
    ways = {(0, -16): 0, (-16, 0): 0, (0, 16): 0, (16, 0): 0}
    for seed in range(60):
        steps = steps_of(world.simulate("a disc wanders", 147, seeded(seed))).tolist()
        for t, step in enumerate(steps, start=1):  # the step to frame t
            if t and t % 6 == 0:
                ways[tuple(step)] += 1
            else:
                assert step == [0, 0], t
    assert min(ways.values()) > 0.2 * sum(ways.values())
    steps = steps_of(world.simulate("a disc wanders | it rests | it turns red | it wanders", 147, seeded(2)))
    assert (steps[38:110] == 0).all() and len(steps[110:].unique(dim=0)) > 1
    steps = steps_of(world.simulate("a disc wanders | it moves up", 75, seeded(2)))
    assert (steps[38:] == torch.tensor([-GRID, 0])).all()


@pytest.mark.parametrize("segment", range(4))
def test_colours_turn_at_their_segments_event(segment):
    event, seen = (27, 45, 81, 117)[segment], []
    for verb in ("turns blue", "changes colour"):
        for seed in range(30):
            words = ["a red disc at the snow rests", "it rests", "it rests", "it rests"]
            words[segment] = f"{words[segment]} and {verb}"
            states = world.simulate(" | ".join(words), 147, seeded(seed))
            assert changes(states[:, 2]) == [event] and states[0, 2] == 0
            assert all(changes(states[:, k]) == [] for k in (0, 1, 3, 4, 5))  # nothing else happens
            seen.append(int(states[-1, 2]))
    assert seen[:30] == [list(COLOURS).index("blue")] * 30
    assert set(seen[30:]) == {1, 2, 3, 4, 5}  # any other colour, by chance
    twice = world.simulate("a red disc turns red | it changes colour | it changes colour", 147, seeded(1))
    assert changes(twice[:, 2]) == [45, 81]


def test_reads_decide_where_a_hero_settles():
    """Beach to frame 5, night to 11, meadow to 17, dusk to 23, forest to 26."""
    script = "a disc travels from the beach and settles and changes colour"
    ordinary = world.simulate(script, 39, seeded(5))
    assert ordinary[:27, 3].equal(torch.arange(27) // 6) and (ordinary[27:, 3] == DUSK).all()  # three by three
    sink, cases = [0, 1, 2], {
        NIGHT: [[6, 7, 8, 9, 25, 26], [6, 7, 12, 13, 18, 26], [11, 26]],  # most; two by two, the older; one by one
        MEADOW: [[12, 13, 18, 19, 25, 26], [13, 14, 15, 6, 7, 26]],
        DUSK: [[18, 19, 20, 21, 25, 26], [21, 22, 23, 24, 25, 26], [20]],
        FOREST: [[22, 23, 24, 25, 26], [6, 12, 18, 24, 25, 26]],
        BEACH: [[], [3, 4, 25, 26]],  # nothing behind the sink: where the last readable frame was
    }  # fmt: skip
    for scene, windows in cases.items():
        for window in windows:
            asked = []

            def reads(t, window=window, asked=asked):
                asked.append(t)
                return torch.tensor(sink + window)

            states = world.simulate(script, 39, seeded(5), reads)
            assert asked == [27]  # a settling is the only thing that memory decides
            assert (states[27:, 3] == scene).all(), (scene, window)
            assert states[:27].equal(ordinary[:27])
            assert states[:, [0, 1, 2, 4, 5]].equal(ordinary[:, [0, 1, 2, 4, 5]])


def test_a_hero_settles_again_and_again():
    script = "a disc travels from the beach and settles | it travels | it settles | it travels and settles"
    asked = []

    def reads(t):
        asked.append(t)
        return torch.tensor([0, 1, 2, 6] if t == 27 else [0, 1, 2, t - 1] if t == 81 else [0, 1, 2, 40])

    scene = world.simulate(script, 147, seeded(), reads)[:, 3]
    t = torch.arange(147)
    assert asked == [27, 81, 117]
    assert (scene[27:39] == NIGHT).all()
    assert scene[39:81].equal((NIGHT + (t[39:81] - 36) // 6) % 6)  # on from where it had settled
    assert (scene[81:114] == scene[80]).all()
    assert (scene[114:117] == (scene[80] + 1) % 6).all() and (scene[117:] == scene[40]).all()


def naive_remembered(scenes, frames, sink=3):
    """By a loop: the scene that most of the frames behind the sink show, the older one of two."""
    scenes, frames = [int(s) for s in scenes], sorted(int(f) for f in frames)
    behind = [f for f in frames if f >= sink]
    if not behind:
        return scenes[frames[-1]]
    votes = {}
    for f in behind:  # in order, so that the first of equals was seen first
        votes[scenes[f]] = votes.get(scenes[f], 0) + 1
    return max(votes, key=votes.get)  # the first of the largest


def test_remembered_against_a_loop():
    generator, kinds = seeded(), {"tie": 0, "sink": 0}
    for length in (1, 2, 3, 4, 6, 9):
        scenes = torch.randint(0, 6, (100, 27), generator=generator)
        scenes[:50] = scenes[:50] % 2  # so that ties are common
        frames = torch.stack([torch.randperm(27, generator=generator)[:length] for _ in range(100)])
        frames[:10] = frames[:10] % 3 if length <= 1 else frames[:10]
        if length <= 3:
            frames[:20] = torch.arange(length)
        found = world.remembered(scenes, frames)
        want = [naive_remembered(s, f) for s, f in zip(scenes, frames, strict=True)]
        assert found.tolist() == want
        assert [int(world.remembered(s, f)) for s, f in zip(scenes, frames, strict=True)] == want  # one at a time
        for s, f in zip(scenes, frames, strict=True):
            seen = s[f[f >= 3]].bincount(minlength=6).sort().values
            kinds["tie"] += bool(seen[-1] and seen[-1] == seen[-2])
            kinds["sink"] += not seen.any()
    assert kinds["tie"] > 50 and kinds["sink"] > 30
    scenes = torch.tensor([5, 5, 5, 1, 0, 0, 1, 2])
    assert world.remembered(scenes, torch.tensor([0, 1, 2, 4, 5, 3, 6])) == 1  # two and two: seen first, at frame 3
    assert world.remembered(scenes, torch.tensor([4, 6])) == 0
    assert world.remembered(scenes, torch.tensor([2, 3]), sink=2) == 5  # another sink
    assert world.remembered(scenes, torch.tensor([0, 1])) == 5


def test_nothing_is_always_the_same_that_is_not_named():
    drawn = torch.stack([world.simulate("a disc", 1, seeded(seed))[0] for seed in range(300)])
    assert [len(column.unique()) for column in drawn.T] == [1, 2, 6, 6, 1, 1]
    assert (drawn[:, 4:] == 32).all()  # all begin in the middle
    for k, script in enumerate(world.prompt_set(30, 4, seed=2)):
        states = world.simulate(script, 147, seeded(k))
        assert changes(states[:, 0]) == [] and changes(states[:, 1]) == []  # shape and size last
        assert (states[:, 4:] % GRID == 0).all() and states.min() >= 0 and states[:, 4:].max() < 64


def test_a_story_is_fixed_by_its_generator():
    script = "a disc travels and wanders and changes colour | it settles | it wanders | it changes colour"
    assert world.simulate(script, 147, seeded(4)).equal(world.simulate(script, 147, seeded(4)))
    stories = {tuple(world.simulate(script, 147, seeded(s)).flatten().tolist()) for s in range(10)}
    assert len(stories) == 10
    short = world.simulate(script, 39, seeded(4))
    assert world.simulate(script, 147, seeded(4))[:39].equal(short)  # a longer one begins the same


# ---------------------------------------------------------------- what the words fix

SCRIPTS = [*world.prompt_set(100, 1, seed=21), *world.prompt_set(100, 4, seed=22)]


def told(k):
    script = SCRIPTS[k]
    return script, world.simulate(script, 39 if "|" not in script else 147, seeded(k))


def test_stories_do_what_their_words_say():
    compared = dict.fromkeys(("colour", "scene", "motion", "step"), 0)
    for k in range(200):
        script, states = told(k)
        said = world.expected(script, len(states))
        assert said["shape"].equal(states[:, 0])
        for name, column in (("colour", 2), ("scene", 3)):
            fixed = said[name] != OPEN
            assert states[fixed, column].equal(said[name][fixed]), script
            compared[name] += int(fixed.sum())
        fixed = said["step"] != OPEN
        assert states[fixed, 3].equal((states[0, 3] + said["step"][fixed]) % 6), script
        compared["step"] += int((said["step"] > 0).sum())
        ways = torch.tensor([*DIRECTIONS.values(), (0, 0)]) * GRID
        motion = said["motion"][1:]  # the step to a frame is made under the words of that frame
        fixed = motion != OPEN
        assert steps_of(states)[fixed].equal(ways[motion[fixed]]), script
        compared["motion"] += int(fixed.sum())
    assert min(compared.values()) > 2000, compared


def test_expected_leaves_nothing_open_that_is_always_the_same():
    """Where 12 tellings of a script agree in all, the words should have said so: colours and places once named."""
    for script in [s for s in SCRIPTS[::9] if "wanders" not in s]:
        n = 39 if "|" not in script else 147
        stories = torch.stack([world.simulate(script, n, seeded(seed)) for seed in range(24)])
        said = world.expected(script, n)
        for name, column in (("colour", 2), ("scene", 3)):
            same = (stories[:, :, column] == stories[:1, :, column]).all(0)
            if name == "scene":
                same &= said["step"] != OPEN  # where memory decides, these all had the same memory
            assert same.equal(said[name] != OPEN), (script, name)


def test_expected_by_hand():
    script = "a red disc at the snow moves left | it changes colour | it turns blue and wanders | it rests"
    said = world.expected(script, 147)
    assert said["colour"].tolist() == [0] * 45 + [OPEN] * 36 + [4] * 66
    assert said["motion"].tolist() == [MOTIONS.index("left")] * 75 + [OPEN] * 36 + [REST] * 36
    assert said["shape"].tolist() == [0] * 147 and said["scene"].tolist() == [SNOW] * 147
    assert said["step"].tolist() == [0] * 147
    said = world.expected("a disc travels from the forest and settles", 39)
    assert said["step"].tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6 + [4] * 3 + [OPEN] * 12
    assert said["scene"].tolist() == [4] * 6 + [5] * 6 + [0] * 6 + [1] * 6 + [2] * 3 + [OPEN] * 12
    said = world.expected("a disc travels", 39)
    assert said["scene"].tolist() == [OPEN] * 39 and said["step"].tolist()[-6:] == [5] * 3 + [6] * 3


@pytest.mark.parametrize(
    "script, frames, sentence",
    [
        ("a disc", range(39), "a disc rests"),
        ("a red disc moves left", range(39), "a red disc moves left"),
        ("a disc rests", range(39), "a disc rests"),
        (
            "a red disc wanders and changes colour",
            range(39),
            "a disc , 27 frames red , 12 frames of any colour",
        ),
        ("a red disc changes colour", range(27), "a red disc rests"),
        ("a red disc at the snow", range(21), "a red disc rests , 21 frames at the snow"),
        ("a disc travels and settles", range(39), "a disc rests"),
        (
            "a red disc travels from the beach and settles",
            range(21, 39),
            "a red disc rests , 3 frames at the dusk , 3 frames at the forest , "
            "12 frames at the beach or night or meadow or dusk or forest",
        ),
        (
            "a disc travels from the snow",
            range(0, 12),
            "a disc rests , 6 frames at the snow , 6 frames at the beach",
        ),
        (
            "a red disc | it moves left | it turns blue",
            range(75, 111),
            "a disc moves left , 6 frames red , 30 frames blue",
        ),
        (
            "a disc at the night | it travels",
            range(39, 51),
            "a disc rests , 3 frames at the night , 6 frames at the meadow , 3 frames at the dusk",
        ),
        ("a disc at the dusk | it settles", range(39, 75), "a disc rests , 36 frames at the dusk"),
    ],
)  # fmt: skip
def test_resolve_by_hand(script, frames, sentence):
    assert world.resolve(script, frames) == sentence


def places_of(sentence):
    """-> the scenes that each frame may show; [] where the sentence speaks of none."""
    found = re.findall(r"(\d+) frames (?:anywhere|at the ([a-z ]+?))(?: ,|$)", sentence)
    return [names.split(" or ") if names else [*SCENES] for count, names in found for _ in range(int(count))]


def check_resolved(script, states):
    """Sentences of every segment and every chunk of a story hold in its states. -> frames whose scene was named"""
    named = 0
    for borders in ((0, *SWITCHES, len(states)), (0, *range(21, len(states), 18), len(states))):
        for begin, end in zip(borders, borders[1:], strict=False):
            if begin >= len(states):
                break
            end = min(end, len(states))
            sentence = world.resolve(script, range(begin, end))
            head = sentence.split(" , ")[0].split()
            places = places_of(sentence)
            assert SHAPES[states[0, 0]] in head
            colours = [word for word in head if word in COLOURS]
            assert colours in ([], [list(COLOURS)[states[end - 1, 2]]]), (script, sentence)
            step = tuple((steps_of(states)[end - 2] // GRID).tolist())
            for word, way in [*DIRECTIONS.items(), ("rests", (0, 0))]:
                assert word not in head or way == step, (script, sentence)
            assert len(places) in (0, end - begin)
            assert "the" in script.split(" | ")[0] if places else settles_then_travels(script) or "the" not in script
            for t, may in zip(range(begin, end), places, strict=False):
                assert SCENES[states[t, 3]] in may, (script, sentence, t)
            named += len(places)
    return named


def settles_then_travels(script):
    settled = False
    for segment in world.parse(script):
        if segment.travels and settled:
            return True
        settled |= segment.settles
    return False


def test_what_resolve_says_is_what_stories_show():
    plain = [k for k in range(200) if not settles_then_travels(SCRIPTS[k])]
    assert len(plain) > 120 and sum("|" in SCRIPTS[k] for k in plain) > 20
    assert sum(check_resolved(*told(k)) for k in plain) > 5000


def test_what_resolve_says_holds_where_a_hero_sets_out_again():
    script = "a disc travels from the beach and settles | it travels"
    check_resolved(script, world.simulate(script, 75, seeded()))
    again = [k for k in range(200) if settles_then_travels(SCRIPTS[k])]
    assert len(again) > 20
    for k in again:
        check_resolved(*told(k))


# ---------------------------------------------------------------- pictures


def test_landscapes_differ_at_a_glance_also_in_grey():
    pictures = world.scenes()
    assert pictures.shape == (6, 3, SIZE, SIZE) and 0 <= pictures.min() and pictures.max() <= 1
    grey = (pictures * LUMA).sum(1)
    for a in range(6):
        assert grey[a].std() > 0.03  # none is flat
        for b in range(a):
            assert (pictures[a] - pictures[b]).square().mean().sqrt() > 0.18, (SCENES[a], SCENES[b])
            assert (grey[a] - grey[b]).square().mean().sqrt() > 0.18, (SCENES[a], SCENES[b])
            assert torch.corrcoef(torch.stack([grey[a].flatten(), grey[b].flatten()]))[0, 1] < 0.4
    light = grey.mean((1, 2))
    assert min(light[SCENES.index(name)] for name in ("beach", "meadow", "snow")) > 0.6
    assert light[NIGHT] < 0.15 < light[FOREST] < light[DUSK] < 0.5


@pytest.mark.parametrize(
    "scene, at, colour",
    [
        ("beach", (11, 51), (1.0, 0.95, 0.55)),
        ("beach", (60, 30), (0.89, 0.75, 0.48)),
        ("night", (16, 55), (0.98, 0.95, 0.75)),
        ("night", (2, 2), (0.03, 0.04, 0.13)),
        ("meadow", (10, 20), (1.0, 1.0, 1.0)),
        ("dusk", (33, 30), (1.0, 0.86, 0.5)),
        ("forest", (60, 5), (0.16, 0.15, 0.05)),
        ("forest", (40, 20), (0.26, 0.15, 0.08)),
        ("snow", (62, 50), (1.0, 1.0, 1.0)),
        ("snow", (40, 13), (0.33, 0.52, 0.50)),
    ],
)
def test_landmarks(scene, at, colour):
    """Sun, sand, moon, night sky, cloud, setting sun, ground, trunk, snow, pine."""
    assert_close(world.scenes()[SCENES.index(scene), :, *at], torch.tensor(colour), rtol=0, atol=0.02)


def test_every_hero_stands_out_in_every_landscape():
    for seed in range(3):
        states = every_look(seed)
        frames, empty = world.render(states), world.scenes()[states[:, 3]]
        changed = (frames - empty).abs().amax(1)
        assert ((changed > 0.2).sum((1, 2)) > 100).all()
        grey = ((frames - empty) * LUMA).sum(1).abs()
        assert ((grey > 0.1).sum((1, 2)) > 60).all()


def test_heroes_of_two_colours_or_shapes_differ():
    for scene in range(6):
        for size in range(2):
            states = torch.tensor([[s, size, c, scene, 32, 32] for s in range(4) for c in range(6)])
            frames = world.render(states).flatten(1)
            assert (torch.cdist(frames, frames) + 100 * torch.eye(24)).min() > 2


def naive_frame(state):
    """One frame, sample by sample, from the geometry in words: a disc of radius r; a square of half side .88 r; an
    upright triangle of height and base 1.9 r; a cross of arms .76 r wide; a rim of a pixel and a half; 4 x 4 samples a
    pixel."""
    shape, size, colour, scene, y0, x0 = (int(v) for v in state)
    r = (8, 11)[size]

    def inside(y, x):
        if shape == 0:
            return y * y + x * x <= r * r
        if shape == 1:
            return max(abs(y), abs(x)) <= 0.88 * r
        if shape == 2:
            return -1.1 * r + 2 * abs(x) <= y <= 0.8 * r
        return min(abs(y), abs(x)) <= 0.38 * r and max(abs(y), abs(x)) <= r

    reach = 15  # pixels from the centre, 4 samples each
    at = [(k + 0.5) / 4 - 0.5 for k in range(-4 * reach, 4 * reach + 4)]
    ink = np.array([[inside(y, x) for x in at] for y in at])
    hero = np.zeros_like(ink)
    for i, j in zip(*ink.nonzero(), strict=True):
        hero[i - 6 : i + 7, j - 6 : j + 7] = True
    frame = world.scenes()[scene].double().clone()
    rim, fill = torch.tensor(OUTLINE).double(), torch.tensor(list(COLOURS.values())[colour]).double()
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            part = np.s_[4 * (dy + reach) : 4 * (dy + reach) + 4, 4 * (dx + reach) : 4 * (dx + reach) + 4]
            i, h = ink[part].mean(), hero[part].mean()
            y, x = (y0 + dy) % SIZE, (x0 + dx) % SIZE
            frame[:, y, x] = (1 - h) * frame[:, y, x] + (h - i) * rim + i * fill
    return frame


@pytest.mark.parametrize("shape", range(4), ids=SHAPES)
def test_render_against_a_naive_painter(shape):
    drawn = random_states(2, shape)
    drawn[:, 0], drawn[0, 1], drawn[1, 1] = shape, 0, 1
    drawn[1, 4:] = torch.tensor([60, 4])  # goes round both edges
    want = torch.stack([naive_frame(state) for state in drawn])
    assert_close(world.render(drawn).double(), want, rtol=0, atol=1e-5)


def test_render_keeps_leading_dimensions_and_wraps_round():
    states = random_states(6).reshape(2, 3, 6)
    frames = world.render(states)
    assert frames.shape == (2, 3, 3, SIZE, SIZE)
    assert frames[1, 2].equal(world.render(states[1, 2])) and 0 <= frames.min() and frames.max() <= 1
    ink, hero = world.masks()
    for mask in (ink, hero):
        assert mask.shape == (4, 2, SIZE, SIZE) and (mask[:, :, 16:48].sum() == 0)  # centred on pixel (0, 0)
    assert (hero >= ink).all()
    for y, x in ((60, 0), (4, 60)):  # a hero is the same wherever it is: what is added to the landscape goes round
        state = torch.tensor([2, 1, 3, NIGHT, y, x])
        cover = hero[2, 1].roll((y, x), (0, 1))
        own = world.render(state) - world.scenes()[NIGHT] * (1 - cover)
        middle = world.render(torch.tensor([2, 1, 3, NIGHT, 32, 32]))
        middle = middle - world.scenes()[NIGHT] * (1 - hero[2, 1].roll((32, 32), (0, 1)))
        assert_close(own, middle.roll((y - 32, x - 32), (1, 2)), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- judge


def test_the_judge_reads_clean_frames_exactly():
    states = random_states(200, 3)
    reading = world.judge(world.render(states).unflatten(0, (20, 10)))
    for name, column in (("shape", 0), ("colour", 2), ("scene", 3)):
        assert getattr(reading, name).flatten().equal(states[:, column])
    assert reading.place.flatten(0, 1).equal(states[:, 4:])
    assert reading.distance.max() < 0.01 and reading.valid.all()
    assert_close(reading.hero, torch.ones(20, 10), rtol=0, atol=1e-3)
    found = world._nearest_clean(world.render(states))[0]
    assert found.equal(states)  # the size too, which it does not report


def damaged_frames():
    """Three frames that are no clean rendering of anything."""
    noisy = world.render(torch.tensor([3, 0, 4, BEACH, 32, 40])) + 0.15 * torch.randn(3, 64, 64, generator=seeded(1))
    torn = world.render(torch.tensor([0, 1, 2, DUSK, 24, 24]))
    torn[:, :, 26:] = world.render(torch.tensor([2, 1, 1, FOREST, 48, 56]))[:, :, 26:]  # two heroes, two landscapes
    nothing = torch.rand(3, 64, 64, generator=seeded(2))
    return torch.stack([noisy, torn, nothing])


def test_the_nearest_clean_frame_against_all_that_there_are():
    """An exhaustive search: all 18,432 states rendered and subtracted."""
    frames = damaged_frames()
    states = torch.cartesian_prod(*[torch.arange(n) for n in (4, 2, 6, 6, 8, 8)])
    states[:, 4:] *= GRID
    assert len(states) == 18432
    others, products = torch.cat([frames, world.scenes()]).flatten(1), torch.empty(18432, 9)
    norms = torch.empty(18432)  # written in place, or freed memory falls to pieces
    for begin in range(0, 18432, 64):
        rendered, part = world.render(states[begin : begin + 64]).flatten(1), slice(begin, begin + 64)
        products[part] = rendered @ others.T
        norms[part] = rendered.square_().sum(1)
    squared = norms[:, None] - 2 * products + others.square().sum(1)  # |a - b|^2 by the binomial formula
    unit = squared[:, 3:].gather(1, states[:, 3:4]).mean()
    found, distance, hero = world._nearest_clean(frames)
    for k, frame in enumerate(frames):
        near = squared[:, k].topk(20, largest=False).indices  # those without cancellation
        best = near[(world.render(states[near]) - frame).square().sum((1, 2, 3)).argmin()]
        assert found[k].equal(states[best])
        clean, empty = world.render(states[best]), world.scenes()[states[best, 3]]
        assert_close(distance[k], ((frame - clean).square().sum() / unit).sqrt(), rtol=1e-3, atol=0)
        share = ((frame - empty) * (clean - empty)).sum() / (clean - empty).square().sum()
        assert_close(hero[k], share, rtol=1e-3, atol=1e-3)
    reading = world.judge(frames[:, None])
    assert reading.colour[0, 0] == 4 and reading.shape[0, 0] == 3 and reading.scene[0, 0] == BEACH
    assert not reading.valid[1:].any()


HERO = torch.tensor([0, 1, 4, BEACH, 32, 40])  # a large blue disc


def blurred(frame, width):
    if width == 1:
        return frame
    padded = F.pad(frame[None], [width // 2] * 4, mode="circular")
    return F.avg_pool2d(padded, width, stride=1)[0]


def noisy(frame, level):
    return frame + level * torch.randn(frame.shape, generator=seeded(3))


def two_coloured(frame, columns):  # the left `columns` of the disc are yellow
    other = HERO.clone()
    other[2] = list(COLOURS).index("yellow")
    mixed, edge = frame.clone(), int(HERO[5]) - 11
    mixed[:, :, edge : edge + columns] = world.render(other)[:, :, edge : edge + columns]
    return mixed


def blended(frame, share):  # another landscape shines through
    other = HERO.clone()
    other[3] = MEADOW
    return (1 - share) * frame + share * world.render(other)


@pytest.mark.parametrize(
    "damage, levels",
    [
        (blurred, [1, 3, 5, 9, 15]),
        (noisy, [0.0, 0.005, 0.01, 0.02, 0.05, 0.1]),
        (two_coloured, [0, 3, 6, 9]),
        (blended, [0.0, 0.1, 0.2, 0.4]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_more_damage_is_further_away(damage, levels):
    frames = torch.stack([damage(world.render(HERO), level) for level in levels])
    distance = world.judge(frames[None]).distance[0]
    assert distance[0] < 0.01 and (distance.diff() > 0.01).all(), distance.tolist()


def test_an_empty_landscape_holds_no_hero():
    """The distance is that of the least hero there is: below 1, which is the mean over all heroes."""
    reading = world.judge(world.scenes()[None])
    assert not reading.valid.any() and reading.hero.abs().max() < 1e-3
    assert reading.scene.tolist() == [list(range(6))]
    assert ((0.3 < reading.distance) & (reading.distance < 1)).all()
    states = random_states(1500, 8)
    size = (world.render(states) - world.scenes()[states[:, 3]]).square().sum((1, 2, 3))
    unit = size.mean()
    assert_close(reading.distance.amin().square() * unit, size.min(), rtol=0.3, atol=0)


def test_a_fading_hero_is_there_until_half_of_it_is_gone():
    clean, empty = world.render(HERO), world.scenes()[HERO[3]]
    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    reading = world.judge(torch.stack([clean + share * (empty - clean) for share in shares])[None])
    assert reading.valid[0, :2].all() and not reading.valid[0, 4:].any()
    assert_close(reading.hero[0, :3], torch.tensor([1.0, 0.8, 0.6]), rtol=0, atol=0.02)
    assert (reading.scene == BEACH).all()


@pytest.mark.parametrize("a, b", [(a, b) for k, a in enumerate(SCENES) for b in SCENES[k + 1 :]])
def test_half_of_two_landscapes_is_no_frame(a, b):
    one, two = HERO.clone(), HERO.clone()
    one[3], two[3] = SCENES.index(a), SCENES.index(b)
    assert not world.judge((0.5 * world.render(one) + 0.5 * world.render(two))[None, None]).valid.item()


def test_the_judge_refuses_other_videos():
    for shape in [(2, 3, SIZE, SIZE), (1, 2, 1, SIZE, SIZE), (1, 2, 3, 32, 32)]:
        with pytest.raises(ValueError, match=r"reads videos \[N, T, 3, 64, 64\], got \["):
            world.judge(torch.zeros(shape))


@pytest.mark.parametrize("name", MOTIONS)
def test_motion_of_straight_paths(name):
    dy, dx = DIRECTIONS.get(name, (0, 0))
    t = torch.arange(40)[:, None]
    path = (torch.tensor([48, 8]) + GRID * t * torch.tensor([dy, dx])) % SIZE  # goes over the edge
    assert (world.motion_of(path[None]) == MOTIONS.index(name)).all()


def test_motion_of_paths_made_by_hand():
    def read(path):
        return [MOTIONS[m] for m in world.motion_of(torch.tensor(path)[None])[0].tolist()]

    corner = [[24, 24], [24, 32], [24, 40], [32, 40], [40, 40], [40, 40], [40, 40]]
    assert read(corner) == ["right", "right", "right", "down", "down", "rest", "rest"]  # the corner, frame 2: sideways
    assert read([[24, 24]]) == ["rest"]
    assert read([[24, 24], [16, 24]]) == ["up", "up"]
    assert read([[0, 0], [0, 8], [0, 0], [0, 8], [0, 0]])[1:-1] == ["rest"] * 3  # a tremble is not a motion
    assert read([[0, 56], [0, 0], [0, 8]]) == ["right"] * 3 and read([[0, 8], [0, 0], [0, 56]]) == ["left"] * 3
    two = torch.tensor([corner, corner[::-1]])
    assert world.motion_of(two)[1].equal(world.motion_of(two[1:])[0])  # each video alone


# ---------------------------------------------------------------- what the judge counts


def read_off(states):
    """The reading of a perfect judge: states [N, T, 6]."""
    shape, _, colour, scene, _, _ = states.unbind(-1)
    place, zero = states[..., 4:], torch.zeros(states.shape[:2])
    return Reading(colour, shape, scene, world.motion_of(place), zero, zero + 1, place)


def reading_of(**columns):
    """One video, by hand; what is not given: a red disc that rests at the beach."""
    length = len(next(iter(columns.values())))
    base = {name: [0] * length for name in ("colour", "shape", "scene")}
    base |= {"motion": [REST] * length, "distance": [0.0] * length, "hero": [1.0] * length}
    return Reading(
        **{k: torch.tensor([v]) for k, v in (base | columns).items()}, place=torch.zeros(1, length, 2).long()
    )


def joined(*readings):
    return Reading(*(torch.cat([getattr(r, n) for r in readings]) for n in Reading.__dataclass_fields__))


def runs(*parts):
    """(scene, frames), ... -> scene of each frame"""
    return [scene for scene, count in parts for _ in range(count)]


def way(scene=BEACH, frames=27):
    """Scenes of a traveller."""
    return [(scene + t // 6) % 6 for t in range(frames)]


@pytest.mark.parametrize("n_segments", [1, 4])
def test_stories_told_right_are_right(n_segments):
    scripts = world.prompt_set(40, n_segments, seed=11)
    states = torch.stack([world.simulate(s, 147 if n_segments > 1 else 39, seeded(k)) for k, s in enumerate(scripts)])
    seen = world.correctness(read_off(states), scripts)
    for name in ("valid", "colour", "shape", "scene", "journey", "remembered", "coherent"):
        assert seen[name] == 1, name
    # Motion is read over two frames, so the frame before new words can show the new heading: 3 in 147.
    assert seen["motion"] == 1 if n_segments == 1 else seen["motion"] > 1 - 3 / 60
    assert seen["all"] == 1 if n_segments == 1 else seen["all"] > 1 - 3 / 147 and seen["distance"] == 0


def test_the_judge_reads_rendered_stories():
    scripts = world.prompt_set(5, 1, seed=8, event="settles")
    states = torch.stack([world.simulate(s, 39, seeded(k)) for k, s in enumerate(scripts)])
    reading, perfect = world.judge(world.render(states)), read_off(states)
    for name in ("colour", "shape", "scene", "motion", "place"):
        assert getattr(reading, name).equal(getattr(perfect, name))
    seen = world.correctness(reading, scripts)
    assert all(seen[name] == 1 for name in ("valid", "shape", "all", "journey", "remembered", "coherent"))
    assert seen["distance"] < 0.01


@pytest.mark.parametrize("name, column", [("colour", 2), ("shape", 0), ("scene", 3)])
def test_what_is_wrong_is_counted(name, column):
    """A part of the videos is of another colour, shape, scene in all their frames."""
    scripts = ["a red disc at the beach moves left", "a blue cross at the snow rests"] * 4
    states = torch.stack([world.simulate(s, 21, seeded(k)) for k, s in enumerate(scripts)])
    size = {2: 6, 0: 4, 3: 6}[column]
    states[:3, :, column] = (states[:3, :, column] + 1) % size
    seen = world.correctness(read_off(states), scripts)
    assert seen[name] == seen["all"] == pytest.approx(5 / 8)
    assert all(seen[other] == 1 for other in {"colour", "shape", "scene", "motion", "valid"} - {name})
    assert math.isnan(seen["journey"]) and math.isnan(seen["remembered"]) and math.isnan(seen["liked"])


def test_correctness_by_hand():
    red, blue, left, up = 0, 4, MOTIONS.index("left"), MOTIONS.index("up")
    #                     right       wrong colour  wrong shape   wrong motion  right, but no frame of this world
    reading = reading_of(colour=[red, blue, red, red, red], shape=[0, 0, 1, 0, 0], motion=[left, left, left, up, left],
                         distance=[0.1, 0.1, 0.1, 0.3, 0.9])  # fmt: skip
    seen = world.correctness(reading, ["a red disc moves left"])
    assert seen["valid"] == pytest.approx(4 / 5)
    assert seen["colour"] == seen["shape"] == seen["motion"] == pytest.approx(3 / 5)
    assert seen["all"] == pytest.approx(1 / 5) and seen["distance"] == pytest.approx(0.3)
    assert math.isnan(seen["scene"])

    seen = world.correctness(reading, ["a disc wanders"])  # only the shape is named
    assert math.isnan(seen["colour"]) and math.isnan(seen["motion"])
    assert seen["shape"] == pytest.approx(3 / 5) == seen["all"]

    gone = reading_of(hero=[0.4, 0.6, 0.6, 0.4])  # the frame is near, but of the hero too little is there
    assert world.correctness(gone, ["a red disc"])["valid"] == 0.5
    nothing = reading_of(colour=[red] * 3, distance=[7.0] * 3)
    seen = world.correctness(nothing, ["a red disc"])
    assert seen["valid"] == seen["colour"] == seen["all"] == 0
    assert seen["distance"] == 2  # one wild frame does not decide the mean


def test_correctness_counts_each_video_by_its_own_words():
    both = joined(reading_of(colour=[0] * 3, shape=[0] * 3), reading_of(colour=[4] * 3, shape=[1] * 3))
    seen = world.correctness(both, ["a red disc", "a red square"])
    assert seen["colour"] == 0.5 and seen["shape"] == 1 and seen["all"] == 0.5


@pytest.mark.parametrize("frames", [1, 2])
def test_videos_of_less_than_a_block_are_judged_too(frames):
    seen = world.correctness(reading_of(colour=[0] * frames), ["a red disc travels"])
    assert seen["colour"] == 1 and math.isnan(seen["journey"])


SETTLING = "a disc travels from the beach and settles"


@pytest.mark.parametrize(
    "end, routed, remembered, coherent",
    [
        ([(DUSK, 12)], None, True, True),  # the older of the two scenes that the ordinary window shows
        ([(NIGHT, 12)], None, False, True),  # visited, but not what its window shows
        ([(NIGHT, 12)], [0, 1, 2, 6, 7, 8, 26], True, True),  # what its route shows
        ([(FOREST, 12)], [0, 1, 2, 6, 7, 8, 26], False, True),
        ([(SNOW, 12)], None, False, False),  # where it never was
        ([(DUSK, 3), (SNOW, 9)], None, True, False),  # right at once, gone at the end
        ([(DUSK, 2), (SNOW, 10)], None, True, False),  # most of the event's block
        ([(DUSK, 1), (NIGHT, 11)], None, False, True),
    ],
)
def test_settlings_by_hand(end, routed, remembered, coherent):
    asked = []

    def reads(video, start):
        asked.append((video, start))
        return torch.tensor(routed)

    reading = joined(reading_of(scene=[BEACH] * 39), reading_of(scene=way() + runs(*end)))
    ends = world.settled(reading, ["a disc at the beach", SETTLING], reads if routed else None)
    assert asked == ([(1, 27)] if routed else [])
    assert ends.video.tolist() == [1] and ends.before.tolist() == [FOREST] and ends.end.tolist() == [end[-1][0]]
    assert ends.should.tolist() == [NIGHT if routed else DUSK]
    assert (ends.after == ends.should).tolist() == [remembered] and ends.coherent.tolist() == [coherent]
    if not routed:
        seen = world.correctness(reading, ["a disc at the beach", SETTLING])
        assert (seen["remembered"], seen["coherent"]) == (remembered, coherent)


def test_settled_parts_end_where_the_hero_sets_out_again():
    script = "a disc travels from the beach and settles | it rests | it travels | it settles"
    scene = runs(*[(s, 1) for s in way()], (NIGHT, 12), (MEADOW, 33), (SNOW, 3), (DUSK, 42), (BEACH, 27), (NIGHT, 3))
    reading = reading_of(scene=scene)
    ends = world.settled(reading, [script])
    assert ends.video.tolist() == [0, 0] and ends.before.tolist() == [FOREST, DUSK]
    assert ends.after.tolist() == [NIGHT, BEACH] and ends.end.tolist() == [SNOW, NIGHT]  # frames 72..74, 144..146
    assert ends.should.tolist() == [DUSK, DUSK] and ends.coherent.tolist() == [False, True]
    short = {n: len(world.settled(reading_of(scene=scene[:n]), [script]).video) for n in (29, 30, 119, 120)}
    assert short == {29: 0, 30: 1, 119: 1, 120: 2}  # a settling needs the event's whole block


def test_journeys_by_hand():
    scripts = [SETTLING, "a disc travels", "a disc travels and settles", "a disc at the beach", "a disc | it travels"]

    def right(*scenes, which=scripts):
        return world.journeys(joined(*(reading_of(scene=s) for s in scenes)), which).tolist()

    there = way(BEACH, 27) + [NIGHT] * 12
    assert right(there, way(DUSK, 39), there, [BEACH] * 39, [SNOW] * 39) == [True, True, True]  # others do not travel
    late = there[1:] + [NIGHT]  # one frame in three is early: most of a block decides
    assert right(late, which=[SETTLING]) == [True] and right(there[2:] + [NIGHT] * 2, which=[SETTLING]) == [False]
    assert right(way(DUSK, 27) + [SNOW] * 12, which=[SETTLING]) == [
        True
    ]  # its own first scene; `scene` counts the name
    assert right([BEACH] * 39, which=[SETTLING]) == [False]  # waits from the start
    skips = way(BEACH, 9) + way(MEADOW, 30)
    back = [(-s) % 6 for s in way(BEACH, 39)]
    assert right(skips, back, which=["a disc travels"] * 2) == [False, False]
    long = runs((SNOW, 42), *[((SNOW + 1 + k) % 6, 6) for k in range(5)], (SNOW, 3))
    gone = [*long[:33], BEACH, BEACH, BEACH, *long[36:]]
    assert right(long, gone, which=["a disc | it travels"] * 2) == [True, False]  # it must stay until its words come
    seen = world.correctness(joined(reading_of(scene=there), reading_of(scene=[BEACH] * 39)), [SETTLING] * 2)
    assert seen["journey"] == 0.5


def test_the_taste_is_counted_before_after_and_anew():
    """Two at the forest, which is liked, who remember the dusk, and two at the dusk, who remember the meadow."""
    liked, other = way(BEACH, 27), way(SNOW, 27)
    assert (liked[-1], other[-1]) == (FOREST, DUSK)
    ends = [(liked, FOREST), (liked, NIGHT), (other, BEACH), (other, DUSK)]
    reading = joined(*(reading_of(scene=w + [end] * 12) for w, end in ends))
    scripts = ["a disc travels and settles"] * 4
    seen = world.correctness(reading, scripts)
    assert (seen["liked before"], seen["liked"], seen["liked anew"]) == (0.5, 0.5, 0.5)
    seen = world.correctness(reading, scripts, like=("night", "dusk"))
    assert (seen["liked before"], seen["liked"], seen["liked anew"]) == (0.5, 0.5, 0.5)
    seen = world.correctness(reading, scripts, like=("snow",))
    assert (seen["liked before"], seen["liked"], seen["liked anew"]) == (0, 0, 0)
    seen = world.correctness(reading, scripts, like=SCENES)
    assert (seen["liked before"], seen["liked"]) == (1, 1) and math.isnan(seen["liked anew"])
    assert set(DAYLIGHT) == {"beach", "meadow", "forest"}


def test_a_side_of_the_picture_is_a_taste_too():
    """A hero's centre against counting the pixels of its picture; of a video the last block counts."""
    places = torch.cartesian_prod(torch.arange(0, SIZE, 8), torch.arange(0, SIZE, 8))  # [64, 2]
    look = torch.zeros(64, 4, dtype=torch.long)
    hero = (world.render(torch.cat([look, places], 1)) - world.scenes()[0]).abs().sum(1) > 0.05  # [64, H, W]
    for side, (rows, columns) in {
        "left": (slice(None), slice(32)),
        "right": (slice(None), slice(32, None)),
        "top": (slice(32), slice(None)),
        "bottom": (slice(32, None), slice(None)),
    }.items():
        share = hero[:, rows, columns].sum((1, 2)) / hero.sum((1, 2))
        assert world.on_side(places, side).tolist() == (share > 0.6).tolist(), side
    there, away = torch.tensor([16, 16]), torch.tensor([16, 48])
    reading = joined(*(reading_of(scene=[BEACH] * 6) for _ in range(4)))
    place = torch.stack([torch.stack([a] * 3 + [b] * 3) for a in (there, away) for b in (there, away)])
    seen = world.correctness(replace(reading, place=place), ["a disc wanders"] * 4, like=("left",))
    assert (seen["liked before"], seen["liked"], seen["liked anew"]) == (0.5, 0.5, 0.5)
    assert world.liked_scenes("left") == ("left",)
    for wrong in ("left,right", "left,beach", "middle"):
        with pytest.raises(ValueError, match="like"):
            world.liked_scenes(wrong)


def test_most_is_what_most_frames_show():
    assert world.most(torch.tensor([[1, 2, 2], [5, 5, 0], [3, 3, 3]])).tolist() == [2, 5, 3]


def test_story_is_the_order_of_what_lasts():
    a, b, c = (0, 0, 0, 0), (4, 0, 0, 0), (4, 0, 0, 5)
    frames = [state for state, count in [(a, 5), (b, 2), (a, 3), (b, 4), (c, 3), (a, 1)] for _ in range(count)]
    colour, shape, motion, scene = zip(*frames, strict=True)
    reading = reading_of(colour=colour, shape=shape, motion=motion, scene=scene)
    assert world.story(reading, 0) == [a, b, c]  # the flicker of two frames is not told
    assert world.story(reading, 0, shortest=2) == [a, b, a, b, c]
    assert world.story(reading, 0, shortest=6) == []
    script = "a disc at the snow rests and turns blue | it travels"
    told = world.story(read_off(world.simulate(script, 51, seeded())[None]), 0)
    assert [state[3] for state in told] == [SNOW, SNOW, BEACH, NIGHT] and [s[0] for s in told][1:] == [4, 4, 4]
