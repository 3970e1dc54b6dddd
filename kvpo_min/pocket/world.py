"""The pocket world: every clean frame there is, the stories told with them, and an exact judge.

A frame is a hero (a coloured shape) in one of six little landscapes, 64x64 RGB. A story is a script (English segments)
and the states of its frames. Each kind of event has one owner, and each is one word of the grammar:

    the words     "turns blue", "moves left", "at the beach"     what they say
    the noise     "wanders", "changes colour"                    drawn by chance when a story is told
    the memory    "settles"                                      `remembered`: a function of the past frames that may be
                                                                 read, so a routed history tells another story

Grammar of a script, one a line (words in brackets may be left out, and history or chance decides what is shown)::

    script  := first { " | " later }                                 (at most four segments)
    first   := "a" [COLOUR] SHAPE ["at the" SCENE] [action {"and" action}]
    later   := "it" action {"and" action}
    action  := "moves" DIRECTION | "rests" | "wanders"               (motion: at most one)
             | "turns" COLOUR | "changes colour"                     (colour: at most one)
             | "travels" ["from the" SCENE] | "settles"              (scene; "from the" only in first, and who settles
                                                                     there has to travel first)

Time has one rhythm: at frames 6, 12, 18, ... (every second block) a traveller goes to the next scene of the ring and a
wanderer leaps, left, up, right or down. Events ("settles", "turns", "changes colour") happen at frame 27, and in later
segments 6 frames after the words came. A story begins with its hero in the middle of the picture, at rest unless the
words say otherwise; who leaves the picture on one side comes back on the other. Never named: the size.

States are integers, so the world is finite: 4 shapes x 2 sizes x 6 colours x 6 scenes x 8 x 8 places (every eighth
pixel).
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo_min import prompts
from kvpo_min.chr import Window, ordinary_frames

SIZE = 64  # pixels a side
GRID = 8  # pixels between two places, and pixels a frame that a moving hero goes: a cell of the latents
PLACES = SIZE // GRID
LEAP = 2 * GRID  # pixels that a wandering hero goes at a beat
COLOURS = {
    "red": (0.93, 0.13, 0.16), "orange": (1.00, 0.55, 0.05), "yellow": (1.00, 0.93, 0.20),
    "green": (0.35, 0.95, 0.30), "blue": (0.20, 0.45, 1.00), "purple": (0.85, 0.30, 0.95),
}  # fmt: skip
OUTLINE = (0.04, 0.03, 0.08)  # the dark rim of every hero
SHAPES = ("disc", "square", "triangle", "cross")
SCENES = ("beach", "night", "meadow", "dusk", "forest", "snow")  # a traveller goes round this ring
DAYLIGHT = ("beach", "meadow", "forest")  # the taste unless a user names another
SIDES = {"left": (1, 0), "right": (1, 1), "top": (0, 0), "bottom": (0, 1)}  # a taste too: (axis, which half of it)
DIRECTIONS = {"left": (0, -1), "up": (-1, 0), "right": (0, 1), "down": (1, 0)}  # (dy, dx); next in the list = clockwise
MOTIONS = (*DIRECTIONS, "rest")
REST = len(DIRECTIONS)
RADII = (8, 11)
SWITCHES = (39, 75, 111)  # frames at which the second, third and fourth segment begin: starts of chunks
BEAT = 6  # frames between two changes of scene
EVENT = 27  # frame of the first segment's event: six frames into the second chunk
EVENT_AFTER = 6  # frames from a later segment's words to its event
SHIFT = 5 / 3  # of the noise schedule: a block has 1,536 latents, Wan's 300,000, so noise hides more (docs/LOG.md)
OPEN = -1  # what the words leave open

WORDS = (
    "a", "it", "and", *COLOURS, *SHAPES, "moves", *DIRECTIONS, "rests", "wanders", "turns", "changes", "colour",
    "at", "from", "the", *SCENES, "travels", "settles",
)  # fmt: skip
TEXT_LEN, TEXT_DIM = 12, 64


class PromptError(ValueError):
    """A prompt outside the grammar; the message names the line, the word and the words that are known."""


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Segment:
    """What one segment of a script says; `None`: not said."""

    text: str
    colour: str | None = None  # named before the shape of a first segment
    shape: str | None = None
    place: str | None = None  # scene of the first frames
    motion: str | None = None  # a direction, rest or wanders
    turns: str | None = None  # a colour, or "changes"
    travels: bool = False
    settles: bool = False


def parse(line: str) -> tuple[Segment, ...]:
    """Reads one script. Raises `PromptError` naming the segment, what was expected and the nearest known word."""
    parts = [part.split() for part in line.split("|")]
    if len(parts) > len(SWITCHES) + 1:  # there is no switch left at which a fifth could begin: it would never be told
        raise PromptError(
            f"'{line.strip()}': expected at most {len(SWITCHES) + 1} segments, got {len(parts)}. "
            f"Known words: {' '.join(WORDS)}"
        )
    return tuple(_parse_segment(words, first=k == 0) for k, words in enumerate(parts))


def _parse_segment(words: list[str], first: bool) -> Segment:
    text = " ".join(words)

    def fail(expected: str):
        raise PromptError(f"'{text}': expected {expected}. Known words: {' '.join(WORDS)}")

    for word in words:
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, n=1)
            fail(f"known words, got '{word}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    if not words or words[0] != ("a" if first else "it"):
        fail("a first segment like 'a red disc moves left'" if first else "a later segment like 'it turns blue'")
    rest, said = words[1:], {}

    def scene_after(preposition: str) -> str | None:
        if not rest or rest[0] != preposition:
            return None
        if rest[1:2] != ["the"] or rest[2:3] == [] or rest[2] not in SCENES:
            fail(f"'{preposition} the' and a scene ({', '.join(SCENES)})")
        if not first:
            fail(f"'{preposition} the SCENE' only in a first segment: later ones go on where the hero is")
        name = rest[2]
        del rest[:3]
        return name

    if first:
        if rest and rest[0] in COLOURS:
            said["colour"] = rest.pop(0)
        if not rest or rest[0] not in SHAPES:
            fail(f"a shape ({', '.join(SHAPES)}) after '{' '.join(words[: len(words) - len(rest)])}'")
        said["shape"] = rest.pop(0)
        said["place"] = scene_after("at")
    elif not rest:
        fail("an action after 'it'")
    while rest:
        verb = rest.pop(0)
        object_ = rest.pop(0) if rest and rest[0] in (*COLOURS, *DIRECTIONS, "colour") else None
        if (verb == "turns" and object_ in COLOURS) or (verb == "changes" and object_ == "colour"):
            if "turns" in said:
                fail("at most one colour action")
            said["turns"] = object_ if verb == "turns" else "changes"
        elif (verb == "moves" and object_ in DIRECTIONS) or (verb in ("rests", "wanders") and not object_):
            if "motion" in said:
                fail("at most one motion")
            said["motion"] = object_ or {"rests": "rest"}.get(verb, verb)
        elif verb == "travels" and not object_:
            if said.get("travels") or said.get("settles"):
                fail("'travels' once, and before 'settles'")
            origin = scene_after("from")
            if origin and said["place"]:
                fail(f"the first scene once ('at the {said['place']}' or 'from the {origin}')")
            said["travels"], said["place"] = True, origin or said.get("place")
        elif verb == "settles" and not object_:
            if said.get("settles") or (first and not said.get("travels")):
                fail("'settles' once, and in a first segment after 'travels' ('a disc travels and settles')")
            said["settles"] = True
        else:
            fail(f"an action (moves DIRECTION, rests, wanders, turns COLOUR, changes colour, travels, settles), got "
                 f"'{verb}'")  # fmt: skip
        if rest and (rest.pop(0) != "and" or not rest):
            fail("'and' and another action")
    if len(words) > TEXT_LEN:
        fail(f"at most {TEXT_LEN} words, got {len(words)}")
    return Segment(text, **said)


def read_prompts(path: str | Path) -> list[str]:
    """The scripts of a prompts file; one outside the grammar is refused with its line. Raises PromptError."""
    try:
        return prompts.read_prompts(path, parse)
    except ValueError as error:
        raise PromptError(str(error)) from None


def segments_of(script: str) -> list[str]:
    """The texts of a script's segments, as the model is given them."""
    return [segment.text for segment in parse(script)]


def resolve(script: str, frames: range) -> str:
    """What the words fix in these frames of one segment, as a sentence that text alignment is scored against:
    "a red disc travels from the beach and settles" in frames 21 to 38 -> "a red disc , 6 frames at the forest , 12
    frames at the beach or night or meadow or dusk or forest". What is open is left out, or said to be anywhere."""
    parsed, want = parse(script), expected(script, frames.stop)
    shape, motion = parsed[0].shape, int(want["motion"][frames.stop - 1])
    verb = {OPEN: "", REST: "rests"}.get(motion, f"moves {MOTIONS[motion]}")
    colours = ["" if k == OPEN else list(COLOURS)[k] for k in want["colour"][frames.start :].tolist()]
    constant = len(set(colours)) == 1
    clauses = [" ".join(filter(None, ["a", colours[0] if constant else "", shape, verb]))]
    if not constant:
        clauses += [f"{n} frames {colour or 'of any colour'}" for n, colour in _runs(colours)]
    places = [_place(parsed, want, t) for t in frames]
    if any(places):
        clauses += [f"{n} frames {f'at the {place}' if place else 'anywhere'}" for n, place in _runs(places)]
    return " , ".join(clauses)


def _runs(values: list[str]) -> list[tuple[int, str]]:
    """["a", "a", "b"] -> [(2, "a"), (1, "b")]"""
    return [(len(list(group)), value) for value, group in itertools.groupby(values)]


def _place(parsed: tuple[Segment, ...], want: dict[str, Tensor], t: int) -> str:
    """Where the hero must be in frame `t`: a scene, several with "or" between (one that has settled is in a scene that
    it passed), or "" where the words do not say."""
    if not parsed[0].place:
        return ""
    if want["step"][t] != OPEN:
        return SCENES[int(want["scene"][t])]
    last = segment_at(t, len(parsed))
    first = next(k for k, segment in enumerate(parsed) if segment.settles)
    if any(segment.travels for segment in parsed[first + 1 : last + 1]):  # it set out again: from where is open
        return ""
    start, travelled = SCENES.index(parsed[0].place), max(int(step) for step in want["step"][:t])
    return " or ".join(SCENES[(start + step) % len(SCENES)] for step in range(min(travelled + 1, len(SCENES))))


def segment_at(frame: int, n_segments: int) -> int:
    """Which segment's words rule at `frame`: the number of switches at or before it."""
    return sum(switch <= frame for switch in SWITCHES[: n_segments - 1])


def liked_scenes(names: str | Sequence[str]) -> tuple[str, ...]:
    """Reads a taste: "beach,meadow" or ("beach", "meadow"), or one side of the picture, such as "left". Raises
    ValueError for unknown names, none, several sides, or all scenes (which is no taste)."""
    names = names if isinstance(names, str) else ",".join(names)
    like = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if len(like) == 1 and like[0] in SIDES:
        return like
    if unknown := [name for name in like if name not in SCENES]:
        raise ValueError(
            f"like names scenes, {', '.join(SCENES)}, with commas between, or one of {', '.join(SIDES)}; got "
            f"{unknown[0]!r}"
        )
    if not 0 < len(like) < len(SCENES):
        raise ValueError(f"like must name one to {len(SCENES) - 1} of {', '.join(SCENES)}, got {names!r}")
    return like


def event_frame(segment: int) -> int:
    """The frame at which the event of segment 0, 1, ... happens."""
    return EVENT if segment == 0 else SWITCHES[segment - 1] + EVENT_AFTER


def settlings(script: str) -> list[int]:
    """The frames at which the hero of a script settles."""
    return [event_frame(k) for k, segment in enumerate(parse(script)) if segment.settles]


@functools.cache
def _word_table() -> Tensor:
    table = torch.ones(1, 1, dtype=torch.float32)
    while table.shape[0] < TEXT_DIM:  # Sylvester's construction: rows of +-1, all orthogonal, no randomness to store
        table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)])
    return table  # [64, 64]


def embed(texts: list[str]) -> Tensor:
    """Fixed word embeddings: one orthogonal vector a word plus one a place. -> [B, TEXT_LEN, TEXT_DIM]; padding is
    0."""
    out = torch.zeros(len(texts), TEXT_LEN, TEXT_DIM, dtype=torch.float32)
    for b, text in enumerate(texts):
        words = text.split()
        if len(words) > TEXT_LEN or any(word not in WORDS for word in words):
            raise PromptError(f"'{text}' cannot be embedded: at most {TEXT_LEN} of the words {' '.join(WORDS)}")
        for place, word in enumerate(words):
            out[b, place] = _word_table()[1 + WORDS.index(word)] + _word_table()[TEXT_DIM - 1 - place]
    return out


def sample_script(generator: torch.Generator, n_segments: int = 1) -> str:
    """Draws a script. Half of the attributes are named; two thirds of the first segments travel, and most of those
    settle."""

    def pick(options, weights=None):
        weights = torch.ones(len(options)) if weights is None else torch.tensor(weights)
        return options[int(torch.multinomial(weights.float(), 1, generator=generator))]

    motions = [*(f"moves {d}" for d in DIRECTIONS), "rests", "wanders", ""]
    colours = ["changes colour", *(f"turns {c}" for c in COLOURS), ""]
    colour, shape, scene = pick(["", *COLOURS], [6, *[2] * 6]), pick(SHAPES), pick(SCENES)
    travels, named = pick([True, False], [2, 1]), pick([True, False], [3, 1])
    ends = travels and pick([True, False], [4, 1] if n_segments == 1 else [1, 3])
    start = ["a", colour, shape, f"at the {scene}" if named and not travels else ""]
    actions = [f"travels from the {scene}" if named else "travels"] if travels else []
    actions += ["settles"] if ends else []
    actions += [pick(motions, [1, 1, 1, 1, 2, 3, 6])]
    if sum(len(a.split()) for a in [*start, *actions]) + len(actions) <= TEXT_LEN - 4:
        actions += [pick(colours, [3, *[0.5] * 6, 6])]
    texts = [" ".join([*filter(None, start), " and ".join(filter(None, actions))]).strip()]
    moving = travels and not ends
    for _ in range(n_segments - 1):
        scene_action = pick(["settles", ""], [4, 1]) if moving else pick(["travels", ""], [2, 1])
        actions = [scene_action, pick(motions, [1, 1, 1, 1, 1, 2, 6]), pick(colours, [3, *[0.5] * 6, 8])]
        actions = list(filter(None, actions)) or ["rests"]
        moving = moving if not scene_action else scene_action == "travels"
        texts.append("it " + " and ".join(actions))
    return " | ".join(texts)


def prompt_set(n: int, n_segments: int, seed: int, event: str = "") -> list[str]:
    """`n` scripts drawn from `seed`; the sets used for training and for evaluation differ in their seeds. `event`: only
    scripts that hold these words, such as "settles", or all of several, "from the,settles". Raises ValueError when
    1,000 in a row do not."""
    generator = torch.Generator().manual_seed(seed)
    scripts = []
    missed = 0
    while len(scripts) < n:
        script = sample_script(generator, n_segments)
        fits = all(words in script for words in event.split(","))
        scripts, missed = ([*scripts, script], 0) if fits else (scripts, missed + 1)
        if missed == 1000:
            raise ValueError(
                f"no script of {n_segments} segments holds '{event}': take 'settles', 'wanders', 'turns' or "
                "'changes colour'"
            )
    return scripts


# -------------------------------------------------------------------------------------------------------------- stories


def remembered(scenes: Tensor, frames: Tensor, sink: int = 3) -> Tensor:
    """Where a hero that may read `frames` [..., L] of its past settles: the scene that most of them show, those of the
    sink not counted; at a tie the one seen first. scenes [..., T] of the frames so far -> [...]; whoever may read
    nothing behind the sink stays where the last readable frame was."""
    seen = F.one_hot(scenes.gather(-1, frames), len(SCENES))  # [..., L, 6]
    counted = seen * (frames >= sink)[..., None]
    never = torch.iinfo(torch.int64).max
    first = torch.where(counted.bool(), frames[..., None], never).amin(-2)  # [..., 6]
    count = counted.sum(-2)
    among = torch.where(count == count.amax(-1, keepdim=True), first, never)
    last = scenes.gather(-1, frames.amax(-1, keepdim=True))[..., 0]
    return torch.where(count.sum(-1) > 0, among.argmin(-1), last)


def simulate(
    script: str, n_frames: int, generator: torch.Generator, reads: Callable[[int], Tensor] | None = None
) -> Tensor:
    """Tells a script: draws what the words leave open and moves the hero. -> states [T, 6] (int64):
    shape, size, colour, scene, y, x. `reads(start)`: the frames that the block of a settling hero may read (default:
    the ordinary ones)."""

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    segments = parse(script)
    first = segments[0]
    size, colour, scene = draw(2), draw(6), draw(6)
    heading = REST
    y = x = SIZE // 2
    if first.colour:
        colour = list(COLOURS).index(first.colour)
    if first.place:
        scene = SCENES.index(first.place)
    travels = wanders = False
    states = []
    for t in range(n_frames):
        k = segment_at(t, len(segments))
        segment = segments[k]
        if t == (0, *SWITCHES)[k]:  # it begins
            travels = travels or segment.travels
            settles_at = event_frame(k) if segment.settles else None
            wanders = segment.motion == "wanders" or (wanders and segment.motion is None)
            if segment.motion in DIRECTIONS:
                heading = list(DIRECTIONS).index(segment.motion)
            elif segment.motion in ("rest", "wanders"):
                heading = REST
        if t == settles_at:
            past = torch.tensor([state[3] for state in states])
            scene = int(remembered(past, reads(t) if reads else ordinary_frames(t, Window())))
            travels = False
        if t and t % BEAT == 0:
            scene = (scene + travels) % len(SCENES)
            if wanders:
                dy, dx = list(DIRECTIONS.values())[draw(4)]
                y, x = (y + LEAP * dy) % SIZE, (x + LEAP * dx) % SIZE
        if t == event_frame(k) and segment.turns:
            other = (colour + 1 + draw(5)) % 6
            colour = other if segment.turns == "changes" else list(COLOURS).index(segment.turns)
        if t and heading != REST:
            dy, dx = list(DIRECTIONS.values())[heading]
            y, x = (y + GRID * dy) % SIZE, (x + GRID * dx) % SIZE
        states.append([SHAPES.index(first.shape), size, colour, scene, y, x])
    return torch.tensor(states)  # [T, 6]


def expected(script: str, n_frames: int) -> dict[str, Tensor]:
    """What the words fix in each frame: {colour, shape, motion, scene} -> [T] indices, `OPEN` where they leave it open;
    and `step` [T]: how many scenes a traveller is behind its first one, `OPEN` once it has settled."""
    segments = parse(script)
    out = {name: torch.full((n_frames,), OPEN) for name in ("colour", "shape", "motion", "scene", "step")}
    out["shape"][:] = SHAPES.index(segments[0].shape)
    colour = list(COLOURS).index(segments[0].colour) if segments[0].colour else OPEN
    start = SCENES.index(segments[0].place) if segments[0].place else OPEN
    motion = REST
    step = 0
    travels = False
    for t in range(n_frames):
        k = segment_at(t, len(segments))
        segment = segments[k]
        if t == (0, *SWITCHES)[k]:
            travels = travels or segment.travels
            if segment.motion is not None:
                motion = MOTIONS.index(segment.motion) if segment.motion in MOTIONS else OPEN
        if t == event_frame(k):
            if segment.settles:
                travels, step = False, OPEN
            if segment.turns:
                colour = list(COLOURS).index(segment.turns) if segment.turns in COLOURS else OPEN
        if t and t % BEAT == 0 and step != OPEN:
            step += travels
        scene = (start + step) % len(SCENES) if OPEN not in (start, step) else OPEN
        for name, value in (("colour", colour), ("motion", motion), ("scene", scene), ("step", step)):
            out[name][t] = value
    return out


# ------------------------------------------------------------------------------------------------------------- pictures


@functools.cache
def scenes() -> Tensor:
    """The six landscapes. -> [6, 3, 64, 64], RGB in [0, 1]"""
    axis = (torch.arange(SIZE * 4) + 0.5) / 4
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pictures = [_PAINTERS[name](y, x) for name in SCENES]
    return torch.stack(pictures).unflatten(3, (SIZE, 4)).unflatten(2, (SIZE, 4)).mean((3, 5))


def _blend(top, bottom, share: Tensor) -> Tensor:  # share [H, W] of the bottom colour -> [3, H, W]
    top, bottom = (torch.tensor(colour)[:, None, None] for colour in (top, bottom))
    return top + (bottom - top) * share.clamp(0, 1)


def _paint(picture: Tensor, where: Tensor, colour) -> Tensor:
    return torch.where(where, torch.tensor(colour)[:, None, None], picture)


def _disc(y: Tensor, x: Tensor, at: tuple[float, float], radius: float) -> Tensor:
    return (y - at[0]) ** 2 + (x - at[1]) ** 2 <= radius**2


def _pine(y: Tensor, x: Tensor, top: float, middle: float, height: float) -> Tensor:
    """Three stacked triangles."""
    down = (y - top) / height
    width = 0.34 * height * ((3 * down) % 1 * 0.6 + 0.15 + 0.35 * down)
    return (down >= 0) & (down <= 1) & ((x - middle).abs() <= width)


def _beach(y: Tensor, x: Tensor) -> Tensor:
    picture = _blend((0.45, 0.78, 0.98), (0.80, 0.93, 1.00), y / 26)
    picture = _paint(picture, _disc(y, x, (11, 51), 7), (1.00, 0.95, 0.55))
    picture = _paint(picture, y >= 26, (0.13, 0.58, 0.80))
    for row in (30, 36):  # waves
        crest = row + 1.2 * torch.sin(2 * torch.pi * x / 16 + row)
        picture = _paint(picture, (y >= crest) & (y <= crest + 1.6), (0.62, 0.88, 0.95))
    shore = 43 + 2 * torch.sin(2 * torch.pi * x / 64)
    picture = _paint(picture, y >= shore - 2, (0.93, 0.97, 0.97))
    return torch.where(y >= shore, _blend((0.96, 0.87, 0.62), (0.88, 0.73, 0.45), (y - 43) / 21), picture)


def _night(y: Tensor, x: Tensor) -> Tensor:
    picture = _blend((0.02, 0.03, 0.12), (0.10, 0.12, 0.32), y / 50)
    for at in ((6, 8), (14, 22), (5, 33), (20, 9), (24, 36), (12, 43), (27, 58), (31, 20), (9, 60), (33, 47)):
        picture = _paint(picture, _disc(y, x, at, 0.9), (0.95, 0.95, 0.80))
    moon = _disc(y, x, (14, 52), 7) & ~_disc(y, x, (12, 48.5), 6.5)
    picture = _paint(picture, moon, (0.98, 0.95, 0.75))
    picture = _paint(picture, y >= 46 - 6 * torch.sin(2 * torch.pi * (x + 6) / 64), (0.05, 0.07, 0.17))
    return _paint(picture, y >= 54 + 3 * torch.sin(2 * torch.pi * x / 42), (0.02, 0.03, 0.08))


def _meadow(y: Tensor, x: Tensor) -> Tensor:
    picture = _blend((0.62, 0.85, 0.97), (0.86, 0.95, 0.98), y / 22)
    for at, radius in (((9, 14), 4), ((10, 20), 5), ((10, 26), 3.5)):  # a cloud
        picture = _paint(picture, _disc(y, x, at, radius), (1.0, 1.0, 1.0))
    picture = _paint(picture, y >= 24 - 5 * torch.sin(2 * torch.pi * (x - 8) / 64), (0.50, 0.78, 0.33))
    picture = _paint(picture, y >= 36 + 4 * torch.sin(2 * torch.pi * x / 64), (0.36, 0.66, 0.22))
    flowers = ((44, 8), (50, 20), (57, 6), (46, 33), (55, 38), (43, 54), (51, 58), (59, 50), (60, 27))
    for k, at in enumerate(flowers):
        picture = _paint(picture, _disc(y, x, at, 1.5), ((1.0, 1.0, 1.0), (1.0, 0.75, 0.85))[k % 2])
    return picture


def _dusk(y: Tensor, x: Tensor) -> Tensor:
    picture = torch.where(y < 22, _blend((0.30, 0.16, 0.45), (0.80, 0.33, 0.45), y / 22),
                          _blend((0.80, 0.33, 0.45), (1.00, 0.66, 0.35), (y - 22) / 18))  # fmt: skip
    picture = _paint(picture, _disc(y, x, (39, 30), 10), (1.00, 0.86, 0.50))
    ridge = (
        40 - 9 * ((x - 8).abs() / 16).neg().add(1).clamp(min=0) - 12 * ((x - 54).abs() / 18).neg().add(1).clamp(min=0)
    )
    picture = _paint(picture, y >= ridge, (0.38, 0.19, 0.36))
    return _paint(picture, y >= 50 + 2 * torch.sin(2 * torch.pi * x / 32), (0.25, 0.12, 0.27))


def _forest(y: Tensor, x: Tensor) -> Tensor:
    picture = _blend((0.10, 0.27, 0.17), (0.22, 0.40, 0.20), y / 48)
    for at in (5, 20, 33, 47, 60):  # trunks
        picture = _paint(picture, ((x - at).abs() <= 2.2) & (y <= 52), (0.26, 0.15, 0.08))
    for k, at in enumerate(((2, 2), (6, 13), (2, 25), (7, 36), (2, 48), (6, 60))):  # leaves
        picture = _paint(picture, _disc(y, x, at, 9), ((0.07, 0.31, 0.12), (0.13, 0.42, 0.15))[k % 2])
    picture = _paint(picture, y >= 50 + 1.5 * torch.sin(2 * torch.pi * x / 21), (0.24, 0.21, 0.08))
    return _paint(picture, y >= 57 + 1.5 * torch.sin(2 * torch.pi * (x + 9) / 32), (0.16, 0.15, 0.05))


def _snow(y: Tensor, x: Tensor) -> Tensor:
    picture = _blend((0.72, 0.78, 0.86), (0.88, 0.91, 0.95), y / 34)
    picture = _paint(picture, y >= 36 - 4 * torch.sin(2 * torch.pi * x / 64), (0.93, 0.95, 0.99))
    for top, middle, height in ((14, 12, 30), (20, 53, 24), (24, 39, 16)):
        picture = _paint(picture, _pine(y, x, top, middle, height), (0.33, 0.52, 0.50))
    picture = _paint(picture, y >= 50 + 2 * torch.sin(2 * torch.pi * (x + 20) / 64), (1.0, 1.0, 1.0))
    for at in ((6, 5), (10, 28), (4, 44), (18, 32), (25, 24), (13, 60), (30, 62)):
        picture = _paint(picture, _disc(y, x, at, 1.2), (1.0, 1.0, 1.0))
    return picture


_PAINTERS = {"beach": _beach, "night": _night, "meadow": _meadow, "dusk": _dusk, "forest": _forest, "snow": _snow}


@functools.cache
def masks() -> tuple[Tensor, Tensor]:
    """Coverage of every (shape, size), centred on pixel (0, 0) of a torus, 4x4 samples a pixel: the ink, and the whole
    hero with its rim. -> two [4, 2, 64, 64]"""
    axis = (torch.arange(SIZE * 4) + 0.5) / 4 - 0.5 - SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    banks = []
    for r in RADII:
        arm = 0.38 * r
        banks.append([
            (x**2 + y**2) <= r**2,
            (x.abs() <= 0.88 * r) & (y.abs() <= 0.88 * r),
            (y <= 0.8 * r) & (y >= 2.0 * x.abs() - 1.1 * r),
            ((x.abs() <= arm) & (y.abs() <= r)) | ((y.abs() <= arm) & (x.abs() <= r)),
        ])  # fmt: skip
    ink = torch.stack([torch.stack(bank) for bank in banks], 1).float()  # [4, 2, 256, 256]
    hero = F.max_pool2d(ink, 13, 1, 6)  # a rim of a pixel and a half
    small = (m.unflatten(3, (SIZE, 4)).unflatten(2, (SIZE, 4)).mean((3, 5)) for m in (ink, hero))
    return tuple(m.roll((SIZE // 2, SIZE // 2), (2, 3)) for m in small)


def render(states: Tensor) -> Tensor:
    """Clean frames of states [..., 6]. -> [..., 3, 64, 64], RGB in [0, 1]"""
    shape, size, colour, scene, y, x = states.reshape(-1, 6).unbind(1)
    pixels = torch.arange(SIZE)
    where = (
        shape[:, None, None], size[:, None, None],
        (pixels[None, :, None] - y[:, None, None]) % SIZE, (pixels[None, None, :] - x[:, None, None]) % SIZE,
    )  # fmt: skip
    ink, hero = (mask[where][:, None] for mask in masks())  # [N, 1, 64, 64]
    rim = torch.tensor(OUTLINE)[:, None, None]
    picture = scenes()[scene] * (1 - hero) + rim * (hero - ink)
    picture = picture + torch.tensor(list(COLOURS.values()))[colour][:, :, None, None] * ink
    return picture.reshape(*states.shape[:-1], 3, SIZE, SIZE)


# ---------------------------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True)
class Reading:
    """What the judge sees in videos, each field [N, T]."""

    colour: Tensor  # index into COLOURS
    shape: Tensor  # index into SHAPES
    scene: Tensor  # index into SCENES
    motion: Tensor  # index into MOTIONS
    distance: Tensor  # to the nearest clean rendering, 0 = equal, 1 = as far off as a landscape without its hero
    hero: Tensor  # how much of that rendering's hero is there: 1 all, 0 as in a landscape without it
    place: Tensor  # [N, T, 2] pixel (y, x) of the hero's centre

    @property
    def valid(self) -> Tensor:
        """[N, T] bool: the frame shows one landscape with a hero in it."""
        return (self.distance < VALID) & (self.hero > 0.5)


VALID = (
    0.6  # of the distance: halfway between two landscapes it is .65 or more, for the autoencoder's own best about .3
)


def judge(videos: Tensor) -> Reading:
    """Finds the nearest clean rendering of every frame by exhaustive search over all states of the world (least
    squares). videos [N, T, 3, 64, 64] in [0, 1]. Exact, no parameters."""
    if videos.ndim != 5 or tuple(videos.shape[2:]) != (3, SIZE, SIZE):
        raise ValueError(f"the judge reads videos [N, T, 3, {SIZE}, {SIZE}], got {list(videos.shape)}")
    frames = videos.detach().float().cpu().flatten(0, 1)
    found = [_nearest_clean(part) for part in frames.split(32)]
    best, distance, hero = (torch.cat(parts).unflatten(0, videos.shape[:2]) for parts in zip(*found, strict=True))
    return Reading(best[..., 2], best[..., 0], best[..., 3], motion_of(best[..., 4:]), distance, hero, best[..., 4:])


_REACH = 15  # pixels from the centre beyond which no hero has any


def _stamps() -> tuple[Tensor, Tensor]:
    """The masks cut out around their centres. -> ink and hero, each [8, 1, 31, 31]"""
    return tuple(
        m.flatten(0, 1).roll((_REACH, _REACH), (1, 2))[:, None, : 2 * _REACH + 1, : 2 * _REACH + 1] for m in masks()
    )


def _at_places(images: Tensor, stamps: Tensor) -> Tensor:
    """Sums of images [N, H, W] under each stamp at each place. -> [N, 8, 8, 8]"""
    padded = F.pad(images[:, None], (_REACH,) * 4, mode="circular")
    return F.conv2d(padded, stamps, stride=GRID)


@functools.cache
def _search_tables() -> tuple[Tensor, Tensor, Tensor]:
    """What does not depend on the frame. With S a landscape, k an ink, r the rim, i and h the coverages of ink and
    hero, a rendering is S + D with D = h (r - S) + i (k - r), so
    ||frame - S - D||^2 = ||frame - S||^2 - 2 <frame - S, D> + ||D||^2.
    -> ||D||^2 [6 scenes, 8 masks, 6 inks, 8, 8], r - S [6, 3, 64, 64], k - r [6, 3]"""
    ink, hero = _stamps()
    rim, inks = torch.tensor(OUTLINE), torch.tensor(list(COLOURS.values())) - torch.tensor(OUTLINE)  # [3], [6, 3]
    left = rim[:, None, None] - scenes()  # r - S [6, 3, 64, 64]
    square = _at_places(left.square().sum(1), hero.square())  # sum h^2 |r - S|^2 [6, 8, 8, 8]
    cross = _at_places(left.flatten(0, 1), hero * ink).unflatten(0, (6, 3))  # sum h i (r - S)_c [6, 3, 8, 8, 8]
    own = (ink.square().sum((1, 2, 3))[:, None] * inks.square().sum(1))[None, :, :, None, None]
    energy = square[:, :, None] + 2 * torch.einsum("kc,scmyx->smkyx", inks, cross) + own  # [6, 8, 6, 8, 8]
    return energy, left, inks


def _nearest_clean(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """frames [N, 3, 64, 64] -> state [N, 6], distance [N], hero [N]"""
    ink, hero = _stamps()
    energy, left, inks = _search_tables()
    n = len(frames)
    least = torch.full((n,), torch.inf)
    state = torch.zeros(n, dtype=torch.long)
    there = torch.zeros(n)
    for s, picture in enumerate(scenes()):
        rest = frames - picture  # [N, 3, 64, 64]
        rim = _at_places((rest * left[s]).sum(1), hero)  # [N, 8, 8, 8]
        fill = _at_places(rest.flatten(0, 1), ink).unflatten(0, (n, 3))  # [N, 3, 8, 8, 8]
        gain = 2 * (rim[:, :, None] + torch.einsum("kc,ncmyx->nmkyx", inks, fill)) - energy[s]  # [N, 8, 6, 8, 8]
        best, index = gain.flatten(1).max(1)
        cost = rest.square().sum((1, 2, 3)) - best
        state = torch.where(cost < least, s * gain[0].numel() + index, state)
        share = 0.5 + 0.5 * best / energy[s].flatten()[index]  # <frame - S, D> / ||D||^2
        there = torch.where(cost < least, share, there)
        least = torch.minimum(cost, least)
    column = state % PLACES
    row, colour = state // PLACES % PLACES, state // PLACES**2 % len(COLOURS)
    mask, scene = state // (PLACES**2 * len(COLOURS)) % 8, state // (PLACES**2 * len(COLOURS) * 8)
    found = torch.stack([mask // 2, mask % 2, colour, scene, GRID * row, GRID * column], 1)
    return found, (least.clamp(min=0) / energy.mean()).sqrt(), there


def motion_of(place: Tensor) -> Tensor:
    """place [N, T, 2] -> motion [N, T]: the main axis of the way from the frame before to the frame after."""
    if place.shape[1] == 1:
        return torch.full(place.shape[:2], REST)
    step = (place[:, 1:] - place[:, :-1] + SIZE // 2) % SIZE - SIZE // 2  # [N, T-1, 2]: the shorter way round
    way = torch.cat([2 * step[:, :1], step[:, 1:] + step[:, :-1], 2 * step[:, -1:]], 1).float()  # over two frames
    y, x = way.unbind(-1)
    sideways = x.abs() >= y.abs()
    names = list(DIRECTIONS)
    heading = torch.where(
        sideways,
        torch.where(x < 0, names.index("left"), names.index("right")),
        torch.where(y < 0, names.index("up"), names.index("down")),
    )
    return torch.where(way.abs().amax(-1) < GRID, REST, heading)


def on_side(place: Tensor, side: str) -> Tensor:
    """Which heroes have more than half of themselves there: place [..., 2], its centre (y, x), -> [...] bool."""
    axis, half = SIDES[side]
    return (place[..., axis] % (SIZE // 2) > 0) & (place[..., axis] // (SIZE // 2) == half)


def most(scene: Tensor) -> Tensor:
    """The scene that most of the frames show: [..., T] -> [...]"""
    return F.one_hot(scene, len(SCENES)).sum(-2).argmax(-1)


@dataclass(frozen=True)
class Settled:
    """What became of every hero that settles, as the judge sees it; each field [E], one entry a settling."""

    video: Tensor  # which video
    before: Tensor  # scene at the fork: where most of the three frames before the event are
    after: Tensor  # scene of the event's own block
    end: Tensor  # scene at the end of the settled part
    should: Tensor  # the scene that its readable frames show, `remembered`
    coherent: Tensor  # bool: the end's scene was visited before the event


def settled(reading: Reading, scripts: list[str], reads: Callable[[int, int], Tensor] | None = None) -> Settled:
    """What became of the heroes that settle in these videos. `reads(video, start)`: the frames that a video's block at
    `start` could read, where it was routed."""
    rows, n_frames = [], reading.scene.shape[1]
    for video, script in enumerate(scripts):
        segments = parse(script)
        for k, segment in enumerate(segments):
            event = event_frame(k)
            if not segment.settles or event + 3 > n_frames:
                continue
            ends = [SWITCHES[later - 1] for later in range(k + 1, len(segments)) if segments[later].travels]
            end, scene = min([*ends, n_frames]), reading.scene[video]
            frames = reads(video, event) if reads else ordinary_frames(event, Window())
            visited = [int(most(scene[begin : begin + 3])) for begin in range(0, event, 3)]
            last = int(most(scene[end - 3 : end]))
            rows.append([video, int(most(scene[event - 3 : event])), int(most(scene[event : event + 3])), last,
                         int(remembered(scene[:event], frames)), last in visited])  # fmt: skip
    columns = torch.tensor(rows).reshape(-1, 6).long().unbind(1)
    return Settled(*columns[:5], columns[5].bool())


def journeys(reading: Reading, scripts: list[str]) -> Tensor:
    """Of every video whose words let the hero travel: did it pass the scenes in their order, starting from its own
    first one, up to where it settles? -> [J] bool"""
    right = []
    for scene, script in zip(reading.scene, scripts, strict=True):
        step = expected(script, len(scene))["step"]
        starts = [t for t in range(0, len(scene) - 2, 3) if step[t] != OPEN]
        if starts and max(step[t] for t in starts) > 0:
            seen = torch.stack([most(scene[t : t + 3]) for t in starts])
            right.append(bool((seen == (seen[0] + step[starts]) % len(SCENES)).all()))
    return torch.tensor(right, dtype=torch.bool)


def correctness(reading: Reading, scripts: list[str], like: tuple[str, ...] = DAYLIGHT) -> dict[str, float]:
    """Shares of frames: `valid`; `colour`, `shape`, `motion`, `scene` right among the frames whose words fix them;
    `all` of the named ones right at once; mean `distance`. Share of videos: `journey` in order. Shares of the
    settlings: `remembered` (in the scene that the readable frames demand), `coherent` (in a scene that was visited),
    and the taste, which is not correctness: `liked before` the event, `liked` at the end, `liked anew` at the end where
    the readable frames demand a scene that is not. With a side of the picture as the taste: of all videos, in the last
    block, and `anew` of those that were not there in the block before. NaN where there is nothing to count."""
    n_frames = reading.colour.shape[1]
    wanted = [expected(script, n_frames) for script in scripts]
    valid = reading.valid
    every = valid.clone()
    out = {"valid": valid.float().mean().item()}

    def share(right: Tensor) -> float:
        return right.float().mean().item() if right.numel() else float("nan")

    for name in ("colour", "shape", "motion", "scene"):
        want = torch.stack([w[name] for w in wanted])
        right = (getattr(reading, name) == want) & valid
        fixed = want != OPEN
        out[name] = share(right[fixed])
        every &= right | ~fixed
    out["all"] = every.float().mean().item()
    out["distance"] = reading.distance.clamp(max=2).mean().item()
    out["journey"] = share(journeys(reading, scripts))
    ends = settled(reading, scripts)
    if like[0] in SIDES:  # of every video: in its last block, and in the one before
        before, after = (on_side(reading.place[:, t:][:, :3], like[0]).float().mean(1) > 0.5 for t in (-6, -3))
        demanded = before
    else:
        good = torch.tensor([SCENES.index(name) for name in like])
        before, after, demanded = (torch.isin(scene, good) for scene in (ends.before, ends.end, ends.should))
    out |= {"remembered": share(ends.after == ends.should), "coherent": share(ends.coherent)}
    out |= {"liked before": share(before), "liked": share(after), "liked anew": share(after[~demanded])}
    return out


def story(reading: Reading, video: int, shortest: int = 3) -> list[tuple[int, int, int, int]]:
    """The order of events in one video: its runs of (colour, shape, motion, scene) of at least `shortest` frames."""
    told = []
    length = 0
    last = None
    names = ("colour", "shape", "motion", "scene")
    for now in zip(*(getattr(reading, name)[video].tolist() for name in names), strict=True):
        length = length + 1 if now == last else 1
        last = now
        if length == shortest and (not told or told[-1] != now):
            told.append(now)
    return told
