"""The pocket world: every clean frame there is, the stories told with them, and an exact judge.

A frame is one sprite on one background, 64x64 RGB. A story is a script (English segments) and the states of its frames.

Grammar of a script, one a line (words in brackets may be left out, and history then decides what is shown)::

    script  := first { " | " later }                                    (at most four segments)
    first   := "a" [COLOUR] SHAPE [action ["and" action]]
    later   := "it" action ["and" action]
    action  := "moves" [DIRECTION] | "rests" | "wanders" | "turns"  (motion: at most one of these)
             | "turns" COLOUR | "changes colour"                    (colour: at most one; "turns" COLOUR only in later)

"turns", "wanders" and "changes colour" are open events: the words say that something happens, not when, and not what
comes out. Never named: the size, the speed, the background, and the hand (clockwise or not) by which a sprite turns,
at a wall or anywhere. A sprite that moves leaves the picture on one side and comes back on the other; one that
wanders turns at the walls.

States are integers, so the world is finite: 4 shapes x 2 sizes x 6 colours x 2 backgrounds x 32 x 32 places (every
other pixel).
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SIZE = 64  # pixels a side
COLOURS = {
    "red": (0.90, 0.20, 0.20), "orange": (0.94, 0.57, 0.16), "yellow": (0.94, 0.88, 0.28),
    "green": (0.24, 0.75, 0.35), "blue": (0.24, 0.39, 0.92), "purple": (0.65, 0.29, 0.86),
}  # fmt: skip
WARM = ("red", "orange", "yellow")
SHAPES = ("disc", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "up": (-1, 0), "right": (0, 1), "down": (1, 0)}  # (dy, dx); next in the list = clockwise
MOTIONS = (*DIRECTIONS, "rest")
REST = len(DIRECTIONS)
RADII = (8, 11)
SPEEDS = (4, 6)  # pixels a frame
BACKGROUNDS = ((0.05, 0.06, 0.11), (0.22, 0.19, 0.25))
WALL = (12, 52)  # a wandering sprite turns where its centre would leave this square
SWITCHES = (39, 75, 111)  # frames at which the second, third and fourth segment begin: starts of chunks
SHIFT = 5 / 3  # of the noise schedule: a block has 1,536 latents, Wan's 300,000, so noise hides more (docs/LOG.md)
OPEN = -1  # an attribute that the words leave open

WORDS = (
    "a", "it", "and", *COLOURS, *SHAPES, "moves", *DIRECTIONS, "rests", "wanders", "turns", "changes", "colour",
)  # fmt: skip
TEXT_LEN, TEXT_DIM = 10, 64


class PromptError(ValueError):
    """A prompt outside the grammar; the message names the line, the word and the words that are known."""


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Segment:
    """What one segment of a script says. `None`: not said. `motion`: a direction, moves, rest, wanders or turns."""

    text: str
    colour: str | None = None  # COLOURS, "changes", or "changes red": a first segment that also says from which colour
    shape: str | None = None
    motion: str | None = None


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
    rest, colour, shape, motion = words[1:], None, None, None
    if first:
        if rest and rest[0] in COLOURS:
            colour = rest.pop(0)
        if not rest or rest[0] not in SHAPES:
            fail(f"a shape ({', '.join(SHAPES)}) after '{' '.join(words[: len(words) - len(rest)])}'")
        shape = rest.pop(0)
    elif not rest:
        fail("an action after 'it'")
    said_colour = said_motion = False
    while rest:
        verb = rest.pop(0)
        object_ = rest.pop(0) if rest and rest[0] in (*COLOURS, *DIRECTIONS, "colour") else None
        if (verb == "turns" and object_ in COLOURS) or (verb == "changes" and object_ == "colour"):
            if said_colour:
                fail("at most one colour action")
            if first and object_ in COLOURS:
                fail("the colour before the shape in a first segment ('a blue disc'), or 'changes colour'")
            said_colour, colour = True, object_ if verb == "turns" else "changes"
            if first and words[1] in COLOURS:
                colour = f"changes {words[1]}"
        elif (verb == "moves" and object_ in (None, *DIRECTIONS)) or (
            verb in ("rests", "wanders", "turns") and object_ is None
        ):
            if said_motion:
                fail("at most one motion")
            said_motion, motion = True, object_ or {"rests": "rest"}.get(verb, verb)
        else:
            fail(f"an action (moves [direction], rests, wanders, turns [colour], changes colour), got '{verb}'")
        if rest and (rest.pop(0) != "and" or not rest):
            fail("'and' and a second action")
    if len(words) > TEXT_LEN:
        fail(f"at most {TEXT_LEN} words, got {len(words)}")
    return Segment(text, colour, shape, motion)


def read_prompts(path: str | Path) -> list[str]:
    """One script a line; empty lines and lines starting with # are skipped. A bad line is refused with its number."""
    scripts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                parse(line)
            except PromptError as error:
                raise PromptError(f"{path}, line {number}: {error}") from None
            scripts.append(line.strip())
    if not scripts:
        raise PromptError(f"{path}: no prompts in it. Write one script a line, segments separated by ' | '")
    return scripts


def segments_of(script: str) -> list[str]:
    """The texts of a script's segments, as the model is given them."""
    return [segment.text for segment in parse(script)]


def resolve(script: str) -> list[str]:
    """What the words fix in each segment, as one full sentence a segment: "a red disc | it moves left" ->
    ["a red disc", "a red disc moves left"]. This is what text alignment is scored against; open attributes are left
    out."""
    segments = parse(script)
    colour = motion = None
    sentences = []
    for segment in segments:
        colour = segment.colour if segment.colour is not None else colour
        motion = segment.motion if segment.motion is not None else motion
        verb = "rests" if motion == "rest" else f"moves {motion}" if motion in DIRECTIONS else ""
        words = ["a", colour if colour in COLOURS else "", segments[0].shape, verb]
        sentences.append(" ".join(filter(None, words)))
    return sentences


def segment_at(frame: int, n_segments: int) -> int:
    """Which segment's words rule at `frame`: the number of switches at or before it."""
    return sum(switch <= frame for switch in SWITCHES[: n_segments - 1])


@functools.cache
def _word_table() -> Tensor:
    table = torch.ones(1, 1)
    while table.shape[0] < TEXT_DIM:  # Sylvester's construction: rows of +-1, all orthogonal, no randomness to store
        table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)])
    return table  # [64, 64]


def embed(texts: list[str]) -> Tensor:
    """Fixed word embeddings: one orthogonal vector a word plus one a place. -> [B, TEXT_LEN, TEXT_DIM]; padding is
    0."""
    out = torch.zeros(len(texts), TEXT_LEN, TEXT_DIM)
    for b, text in enumerate(texts):
        words = text.split()
        if len(words) > TEXT_LEN or any(word not in WORDS for word in words):
            raise PromptError(f"'{text}' cannot be embedded: at most {TEXT_LEN} of the words {' '.join(WORDS)}")
        for place, word in enumerate(words):
            out[b, place] = _word_table()[1 + WORDS.index(word)] + _word_table()[TEXT_DIM - 1 - place]
    return out


def sample_script(generator: torch.Generator, n_segments: int = 1) -> str:
    """Draws a script: half of the attributes are named, and about half of the segments hold an open event."""

    def pick(options, weights=None):
        weights = torch.ones(len(options)) if weights is None else torch.tensor(weights)
        return options[int(torch.multinomial(weights.float(), 1, generator=generator))]

    colour, shape = pick(["", *COLOURS], [6, *[1.5] * 6]), pick(SHAPES)
    named = [f"moves {d}" for d in DIRECTIONS]
    actions = [pick([*named, "moves", "rests", "wanders", "turns", ""], [2, 2, 2, 2, 2, 2, 3, 3, 1])]
    actions += [pick(["changes colour", ""], [5, 6])]
    texts = [" ".join(filter(None, ["a", colour, shape, " and ".join(filter(None, actions))]))]
    for _ in range(n_segments - 1):
        actions = [
            pick([*named, "moves", "rests", "wanders", "turns", ""], [2, 2, 2, 2, 1, 2, 3, 3, 5]),
            pick(["changes colour", *[f"turns {c}" for c in COLOURS], ""], [5, *[1] * 6, 7]),
        ]
        if int(torch.randint(2, (), generator=generator)):
            actions.reverse()
        actions = list(filter(None, actions)) or [pick(["turns", "changes colour"])]
        texts.append("it " + " and ".join(actions))
    return " | ".join(texts)


def prompt_set(n: int, n_segments: int, seed: int, event: str = "") -> list[str]:
    """`n` scripts drawn from `seed`; the sets used for training and for evaluation differ in their seeds. `event`: only
    scripts that hold these words, such as "changes colour". Raises ValueError when 1,000 in a row do not."""
    generator, scripts, missed = torch.Generator().manual_seed(seed), [], 0
    while len(scripts) < n:
        script = sample_script(generator, n_segments)
        scripts, missed = ([*scripts, script], 0) if event in script else (scripts, missed + 1)
        if missed == 1000:
            raise ValueError(f"no script of {n_segments} segments holds '{event}': take 'changes colour' or 'turns'")
    return scripts


# -------------------------------------------------------------------------------------------------------------- stories


def simulate(script: str, n_frames: int, generator: torch.Generator) -> Tensor:
    """Tells a script: draws what the words leave open and moves the sprite. -> states [T, 6] (int64):
    shape, size, colour, background, y, x."""

    def draw(low, high):  # one integer of [low, high)
        return int(torch.randint(low, high, (), generator=generator))

    segments = parse(script)
    starts = [0, *SWITCHES[: len(segments) - 1]]
    first = segments[0]
    size, background, speed, hand = draw(0, 2), draw(0, 2), SPEEDS[draw(0, 2)], 1 if draw(0, 2) else -1
    y, x, colour, heading, wanders = 2 * draw(0, 32), 2 * draw(0, 32), draw(0, 6), draw(0, 5), False
    if first.colour in COLOURS or (first.colour or "").startswith("changes "):
        colour = list(COLOURS).index(first.colour.split()[-1])
    states = []
    for t in range(n_frames):
        k = segment_at(t, len(segments))
        segment = segments[k]
        if t == starts[k]:
            end = starts[k + 1] if k + 1 < len(starts) else n_frames
            low, high = t + (12 if k == 0 else 3), max(min(end, t + 36) - 5, t + 16)
            colour_event, turn_event = draw(low, high), draw(low, high)
            wanders = segment.motion == "wanders"
            if segment.motion in DIRECTIONS:
                heading = list(DIRECTIONS).index(segment.motion)
            elif segment.motion == "rest":
                heading = REST
            elif segment.motion in ("moves", "wanders", "turns") and (k == 0 or heading == REST):
                heading = draw(0, 4)
            elif segment.motion == "moves":
                heading = draw(0, 4)
            if k and segment.colour in COLOURS:
                colour = list(COLOURS).index(segment.colour)
        if (segment.colour or "").startswith("changes") and t == colour_event:
            colour = (colour + draw(1, 6)) % 6
        if segment.motion == "turns" and t == turn_event:
            heading = (heading + hand) % 4
        if t:
            for turn in (0, hand, -hand, 2):  # straight on, else by its hand, else what is left in a corner
                step = list(DIRECTIONS.values())[(heading + turn) % 4] if heading != REST else (0, 0)
                ahead = (y + speed * step[0], x + speed * step[1])
                blocked = any(
                    (s < 0 and a < WALL[0]) or (s > 0 and a > WALL[1]) for s, a in zip(step, ahead, strict=True)
                )
                if not (wanders and blocked):
                    break
            heading = heading if heading == REST else (heading + turn) % 4
            y, x = ahead[0] % SIZE, ahead[1] % SIZE
        states.append([SHAPES.index(first.shape), size, colour, background, y, x])
    return torch.tensor(states)  # [T, 6]


def expected(script: str, n_frames: int) -> dict[str, Tensor]:
    """What the words fix in each frame: {colour, shape, motion} -> [T] indices, `OPEN` where they leave it open."""
    segments = parse(script)
    out = {name: torch.full((n_frames,), OPEN) for name in ("colour", "shape", "motion")}
    out["shape"][:] = SHAPES.index(segments[0].shape)
    colour = motion = OPEN
    for t in range(n_frames):
        segment = segments[segment_at(t, len(segments))]
        if segment.colour is not None:
            colour = list(COLOURS).index(segment.colour) if segment.colour in COLOURS else OPEN
        if segment.motion is not None:
            motion = MOTIONS.index(segment.motion) if segment.motion in MOTIONS else OPEN
        out["colour"][t], out["motion"][t] = colour, motion
    return out


# ------------------------------------------------------------------------------------------------------------- pictures


@functools.cache
def masks() -> Tensor:
    """Coverage of every (shape, size), centred on pixel (0, 0) of a torus, 4x4 samples a pixel. -> [4, 2, 64, 64]"""
    axis = (torch.arange(SIZE * 4) + 0.5) / 4 - 0.5
    axis = (axis + SIZE / 2) % SIZE - SIZE / 2
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
    stack = torch.stack([torch.stack(bank) for bank in banks], 1).float()  # [4, 2, 256, 256]
    return stack.unflatten(3, (SIZE, 4)).unflatten(2, (SIZE, 4)).mean((3, 5))  # [4, 2, 64, 64]


def render(states: Tensor) -> Tensor:
    """Clean frames of states [..., 6]. -> [..., 3, 64, 64], RGB in [0, 1]"""
    shape, size, colour, background, y, x = states.reshape(-1, 6).unbind(1)
    pixels = torch.arange(SIZE)
    mask = masks()[
        shape[:, None, None], size[:, None, None],
        (pixels[None, :, None] - y[:, None, None]) % SIZE, (pixels[None, None, :] - x[:, None, None]) % SIZE,
    ][:, None]  # fmt: skip
    ink = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]
    paper = torch.tensor(BACKGROUNDS)[background][:, :, None, None]
    return (paper + mask * (ink - paper)).reshape(*states.shape[:-1], 3, SIZE, SIZE)


# ---------------------------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True)
class Reading:
    """What the judge sees in videos, each field [N, T]."""

    colour: Tensor  # index into COLOURS
    shape: Tensor  # index into SHAPES
    motion: Tensor  # index into MOTIONS
    distance: Tensor  # to the nearest clean rendering, 0 = equal, 1 = as far off as an empty frame
    place: Tensor  # [N, T, 2] pixel (y, x) of the sprite's centre

    @property
    def valid(self) -> Tensor:
        """[N, T] bool: the frame shows a sprite at all."""
        return self.distance < VALID


VALID = 0.5  # a frame is a valid sprite when it is at most half as far from a clean rendering as an empty frame


def judge(videos: Tensor) -> Reading:
    """Finds the nearest clean rendering of every frame by exhaustive search over shape, size, colour, background and
    all 64x64 places (least squares; the places by FFT). videos [N, T, 3, 64, 64] in [0, 1]. Exact, no parameters."""
    if videos.ndim != 5 or tuple(videos.shape[2:]) != (3, SIZE, SIZE):
        raise ValueError(f"the judge reads videos [N, T, 3, {SIZE}, {SIZE}], got {list(videos.shape)}")
    frames = videos.detach().float().cpu().flatten(0, 1)
    found = [_nearest_clean(part) for part in frames.split(64)]
    best, distance = (torch.cat(parts).unflatten(0, videos.shape[:2]) for parts in zip(*found, strict=True))
    return Reading(best[..., 2], best[..., 0], motion_of(best[..., 4:]), distance, best[..., 4:])


def _nearest_clean(frames: Tensor) -> tuple[Tensor, Tensor]:
    """frames [N, 3, 64, 64] -> state [N, 6], distance [N]"""
    n, bank = len(frames), masks().flatten(0, 1)  # [8, 64, 64]
    spectrum = torch.fft.rfft2(bank).conj()[None, :, None] * torch.fft.rfft2(frames)[:, None]  # [N, 8, 3, 64, 33]
    correlation = torch.fft.irfft2(spectrum, s=(SIZE, SIZE)).flatten(3)  # [N, 8, 3, 4096]: sum_pixels mask * frame
    cost, where, energies = [], [], []
    for paper in torch.tensor(BACKGROUNDS):
        ink = torch.tensor(list(COLOURS.values())) - paper  # [6, 3]
        empty = (frames - paper[:, None, None]).square().sum((1, 2, 3))  # [N]
        match = torch.einsum("kc,nmcp->nmkp", ink, correlation)  # [N, 8, 6, 4096]
        peak, place = match.max(-1)  # over the places only the correlation varies
        peak = peak - (ink @ paper)[None, None] * bank.sum((1, 2))[None, :, None]
        energy = bank.square().sum((1, 2))[:, None] * ink.square().sum(1)[None]  # [8, 6]: ||rendering - paper||^2
        cost.append(empty[:, None, None] - 2 * peak + energy), where.append(place)  # [N, 8, 6]
        energies.append(energy.expand(n, -1, -1))
    cost, where, energies = (torch.stack(part, 1).flatten(1) for part in (cost, where, energies))  # [N, 2 * 8 * 6]
    least, index = cost.min(1)
    place, energy = where.gather(1, index[:, None])[:, 0], energies.gather(1, index[:, None])[:, 0]
    mask, colour, paper = index // 6 % 8, index % 6, index // 48
    state = torch.stack([mask // 2, mask % 2, colour, paper, place // SIZE, place % SIZE], 1)
    return state, (least.clamp(min=0) / energy).sqrt()


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
    return torch.where(way.abs().amax(-1) < SPEEDS[0], REST, heading)


def correctness(reading: Reading, scripts: list[str]) -> dict[str, float]:
    """Shares of frames: `valid`; `colour`, `shape`, `motion` right among the frames whose words fix them; `all` of the
    named ones right at once; `warm` colours (the taste, not correctness); mean `distance`."""
    n_frames = reading.colour.shape[1]
    wanted = [expected(script, n_frames) for script in scripts]
    valid, out, every = reading.valid, {"valid": reading.valid.float().mean().item()}, reading.valid.clone()
    for name in ("colour", "shape", "motion"):
        want = torch.stack([w[name] for w in wanted])
        right = (getattr(reading, name) == want) & valid
        fixed = want != OPEN
        out[name] = right[fixed].float().mean().item() if fixed.any() else float("nan")
        every &= right | ~fixed
    out["all"] = every.float().mean().item()
    warm = torch.tensor([list(COLOURS).index(c) for c in WARM])
    out["warm"] = torch.isin(reading.colour, warm)[valid].float().mean().item() if valid.any() else float("nan")
    out["distance"] = reading.distance.clamp(max=2).mean().item()
    return out


def story(reading: Reading, video: int, shortest: int = 3) -> list[tuple[int, int, int]]:
    """The order of events in one video: its runs of (colour, shape, motion) that last at least `shortest` frames."""
    told, length, last = [], 0, None
    for now in zip(*(getattr(reading, n)[video].tolist() for n in ("colour", "shape", "motion")), strict=True):
        length = length + 1 if now == last else 1
        last = now
        if length == shortest and (not told or told[-1] != now):
            told.append(now)
    return told
