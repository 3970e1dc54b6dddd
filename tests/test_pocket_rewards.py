"""The pocket world's rewards: against loops over pixels and finite differences, and that they rank clean, damaged and
wrong videos in every landscape as they say they do."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kvpo_min.pocket import look, pocket_rewards, rewards, world
from kvpo_min.pocket.rewards import Look, MotionQuality, TextAlignment, VisualQuality, centre_steps, look_at
from kvpo_min.pocket.world import COLOURS, DAYLIGHT, DIRECTIONS, SCENES, SHAPES, SIZE

pytestmark = pytest.mark.usefixtures("one_thread")
LOOK = look()
VQ, MQ, TA = VisualQuality(LOOK, DAYLIGHT), MotionQuality(LOOK), TextAlignment(LOOK)
CLEAN = VisualQuality(LOOK, DAYLIGHT, taste=0.0)  # the clean part alone
REWARDS = {"vq": VQ, "mq": MQ, "ta": TA}
BRIGHT = ("beach", "meadow", "dusk")  # have a sea, a field and a sun of colours near an ink


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def video(colour="red", shape="disc", scene="forest", path=None, size=0):
    """One hero on `path` [T, 2] (default: 5 frames, a place a frame to the right); `scene`: one, or one a frame.
    -> [T, 3, H, W]"""
    path = torch.tensor([[28, 20 + 4 * t] for t in range(5)]) if path is None else path
    places = [scene] * len(path) if isinstance(scene, str) else scene
    where = torch.tensor([SCENES.index(name) for name in places])[:, None]
    hero = torch.tensor([SHAPES.index(shape), size, list(COLOURS).index(colour)]).expand(len(path), -1)
    return world.render(torch.cat([hero, where, path % SIZE], 1))


def straight(name, frames=6, speed=4):
    return torch.tensor([28, 32]) + speed * torch.arange(frames)[:, None] * torch.tensor(DIRECTIONS.get(name, (0, 0)))


# ---------------------------------------------------------------- what they look at


def small_look(height, width, n_scenes=2, shapes=None):
    pictures = torch.rand(n_scenes, 3, height, width, generator=seeded(9))
    inks = {"red": (0.9, 0.1, 0.1), "blue": (0.1, 0.2, 0.9)}
    return Look(
        inks, (0.0, 0.0, 0.0), {name: p for name, p in zip(SCENES, pictures, strict=False)}, shapes or {}, DIRECTIONS
    )


def off_the_line(pixel, a, b):
    """Squared distance from the straight line between two colours, by trying a thousand points on it."""
    between = torch.linspace(0, 1, 1001)[:, None]
    return float((a + between * (b - a) - pixel).square().sum(1).min())


def test_look_at_against_a_loop_over_pixels():
    here = small_look(4, 5)
    pictures, palette = list(here.scenes.values()), [*here.inks.values(), here.rim]
    frame = (pictures[1] + 0.3 * torch.rand(3, 4, 5, generator=seeded())).clamp(0, 1)
    frame[:, 1, 2] = torch.tensor(palette[0])
    seen = look_at(frame[None, None], here)

    def apart(a, b):
        return sum((float(a[c]) - float(b[c])) ** 2 for c in range(3))

    pixels = [(i, j) for i in range(4) for j in range(5)]
    far = [sum(d / (d + 0.1) for d in (apart(frame[:, i, j], p[:, i, j]) for i, j in pixels)) / 20 for p in pictures]
    share = torch.tensor([-f / 0.03 for f in far]).softmax(0)
    assert_close(seen.scenes[0, 0], share, rtol=1e-3, atol=1e-5)
    for i, j in pixels:
        behind = sum(float(s) * apart(frame[:, i, j], p[:, i, j]) for s, p in zip(share, pictures, strict=True))
        squared = torch.tensor([*(apart(frame[:, i, j], ink) for ink in palette), behind])
        assert_close(seen.inks[0, 0, :, i, j], (-squared / (2 * 0.06**2)).softmax(0)[:2], rtol=1e-3, atol=1e-5)
        rim, mixed = torch.tensor(here.rim), [*map(torch.tensor, here.inks.values()), pictures[1][:, i, j]]
        d2 = min(behind, *(off_the_line(frame[:, i, j], rim, colour) for colour in mixed))
        assert_close(seen.stray[0, 0, i, j].item(), d2**2 / (d2**2 + 0.3**4), rtol=1e-2, atol=1e-4)


def test_videos_are_read_once_for_all_rewards_and_anew_when_they_change(monkeypatch):
    reads = []
    read_pixels = rewards.read_pixels
    monkeypatch.setattr(rewards, "read_pixels", lambda *args: reads.append(1) or read_pixels(*args))
    mixture, words = pocket_rewards(1.0, 1.0, 1.0), ["a red disc"]
    videos = world.render(world.simulate(words[0], 6, seeded()))[None]
    before = mixture.scores(videos, words)
    assert len(reads) == 1 and mixture.scores(videos, words) == before and len(reads) == 1
    videos.mul_(0.5)  # in place: the tensor is the same one
    assert mixture.scores(videos, words) != before and len(reads) == 2
    with torch.inference_mode():  # such tensors do not count their changes
        dark = videos.clone()
    assert mixture.scores(dark, words) == mixture.scores(videos, words)
    for _ in range(2):  # each with a graph of its own
        mixture(videos.requires_grad_(), words).sum().backward()
    number = len(rewards._seen)
    del videos
    assert len(rewards._seen) == number - 1


def test_the_scene_is_read_whatever_the_hero():
    states = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(6), torch.arange(6))
    places = 8 * torch.randint(0, 8, (len(states), 2), generator=seeded())
    frames = world.render(torch.cat([states, places], 1))
    shares = look_at(frames[:, None], LOOK).scenes[:, 0]
    assert shares[torch.arange(288), states[:, 3]].min() > 0.99
    halves = 0.5 * frames[:6] + 0.5 * frames[[1, 2, 3, 4, 5, 0]]  # between two landscapes: of neither for sure
    assert look_at(halves[:, None], LOOK).scenes.amax(2).max() < 0.95


def test_centre_steps_are_the_steps_of_the_hero():
    path = torch.tensor([[8, 60], [8, 64], [12, 64], [8, 58], [8, 58], [0, 52], [-8, 52]])  # goes over two edges
    for shape in SHAPES:
        mass = look_at(video("red", shape, "night", path)[None], LOOK).inks.sum(2)
        assert_close(centre_steps(mass)[0], (path[1:] - path[:-1]).float(), rtol=0, atol=0.35)


def test_shape_shares_against_a_search_over_all_places():
    masks = {
        name: (torch.rand(2, 6, 6, generator=seeded(k)) > 0.6).double() for k, name in enumerate(("disc", "cross"))
    }
    measure = TextAlignment(small_look(6, 6, shapes=masks))
    mass = torch.rand(1, 1, 6, 6, generator=seeded(5), dtype=torch.float64)
    fits = []
    for bank in masks.values():
        best = -math.inf
        for mask in bank:
            for dy in range(6):
                for dx in range(6):
                    overlap = (mask.roll((dy, dx), (0, 1)) * mass[0, 0]).sum()
                    best = max(best, float(overlap / mask.square().sum().sqrt() / (mass.square().sum() + 1).sqrt()))
        fits.append(best)
    want = (measure.sharpness * torch.tensor(fits, dtype=torch.float64)).softmax(0)
    assert_close(measure.shape_shares(mass)[0, 0], want)


def test_scores_lie_between_0_and_1():
    wild = torch.rand(2, 5, 3, SIZE, SIZE, generator=seeded())
    videos = torch.cat([wild, video()[None], torch.zeros(1, 5, 3, SIZE, SIZE), torch.ones(1, 5, 3, SIZE, SIZE)])
    prompts = ["a red disc moves right", "a disc rests , 5 frames at the snow", "a red disc", "a cross", "it"]
    for reward in REWARDS.values():
        score = reward(videos, prompts)
        assert score.shape == (5,) and (score >= 0).all() and (score <= 1).all()


# ---------------------------------------------------------------- VQ


def test_vq_against_a_loop_over_pixels():
    """(1 - taste) exp(-stray / 64) (1 - exp(-mass / 20)) + taste * liked, of one frame with a dirty patch."""
    frame = video("orange", "disc", "snow", size=1)[0].clone()  # [3, H, W]
    frame[:, 50:56, 3:9] = 0.5
    inks, rim = torch.tensor([*COLOURS.values()]), torch.tensor(world.OUTLINE)
    landscape, stray, mass = world.scenes()[SCENES.index("snow")], 0.0, 0.0  # which is plain to see: its share is 1
    for pixel, behind in zip(frame.flatten(1).T, landscape.flatten(1).T, strict=True):
        squared = torch.stack([*inks, rim, behind]).sub(pixel).square().sum(1)
        mass += float((-squared / (2 * 0.06**2)).softmax(0)[:6].sum())
        d2 = min(float(squared[-1]), *(off_the_line(pixel, rim, colour) for colour in [*inks, behind]))
        stray += d2**2 / (d2**2 + 0.3**4)
    clean = math.exp(-stray / 64) * (1 - math.exp(-mass / 20))
    assert CLEAN(frame[None, None], [""]).item() == pytest.approx(clean, rel=1e-3)
    assert VQ(frame[None, None], [""]).item() == pytest.approx(0.5 * clean, rel=1e-3)
    liked = VisualQuality(LOOK, ("night", "snow"), taste=0.25)(frame[None, None], [""])
    assert liked.item() == pytest.approx(0.75 * clean + 0.25, rel=1e-3)


def every_hero(scene):
    """Of every shape, size and colour. -> [48, 1, 3, H, W]"""
    looks = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(6))
    where = torch.tensor([SCENES.index(scene), 36, 28]).expand(48, -1)
    return world.render(torch.cat([looks, where], 1))[:, None]


@pytest.mark.parametrize("scene", SCENES)
def test_a_clean_small_cross_scores_what_a_clean_large_disc_scores(scene):
    score = CLEAN(every_hero(scene), [""] * 48).view(4, 2, 6)
    cross, disc = score[SHAPES.index("cross"), 0], score[SHAPES.index("disc"), 1]
    assert (cross - disc).abs().max() < 0.01, (cross.tolist(), disc.tolist())
    assert score.max() - score.min() < 0.1  # nor is any other look much better than another


@pytest.mark.parametrize("like", [DAYLIGHT, ("night",), ("snow", "dusk")])
def test_vq_prefers_liked_scenes_whatever_the_hero(like):
    reward = VisualQuality(LOOK, like)
    score = {scene: reward(every_hero(scene), [""] * 48) for scene in SCENES}
    least = min(score[name].min() for name in like)
    assert least > max(score[name].max() for name in SCENES if name not in like) + 0.1
    same = torch.stack([score[name] for name in SCENES])
    liked = torch.tensor([name in like for name in SCENES])
    assert (same[liked].amin(0) > same[~liked].amax(0) + 0.3).all()  # of the same hero


def test_a_part_of_the_frames_at_a_liked_scene_is_a_part_of_the_taste():
    mixed = torch.stack([video(scene=["night"] * k + ["forest"] * (5 - k)) for k in range(6)])
    full = VisualQuality(LOOK, ("forest",), taste=1.0)(mixed, [""] * 6)
    assert_close(full, torch.linspace(1, 0, 6), rtol=0, atol=0.01)


@pytest.mark.parametrize("side, y, x", [("left", 32, 16), ("right", 32, 48), ("top", 16, 32), ("bottom", 48, 32)])
def test_vq_prefers_the_liked_side(side, y, x):
    """1 where all of the hero is there, 0 on the other side, half on the line between; the scene does not matter."""
    where = [(y, x), ((y + 32) % 64 if y != 32 else 32, (x + 32) % 64 if x != 32 else 32), (32, 32)]
    states = torch.tensor([[0, 1, 1, scene, *place] for scene in range(6) for place in where])
    scores = VisualQuality(LOOK, (side,), taste=1.0)(world.render(states)[:, None], [""] * 18).view(6, 3)
    assert_close(scores, torch.tensor([1.0, 0.0, 0.5]).expand(6, 3), rtol=0, atol=0.08)


@pytest.mark.parametrize("scene", SCENES)
def test_an_empty_landscape_has_no_clean_part(scene):
    empty = world.scenes()[SCENES.index(scene)][None, None]
    assert CLEAN(empty, [""]).item() < 0.05
    clean = video(scene=scene, size=1)
    behind = world.scenes()[SCENES.index(scene)]
    faded = torch.stack([clean + share * (behind - clean) for share in (0.0, 0.3, 0.6, 1.0)])
    score = CLEAN(faded, [""] * 4)
    assert (score[1:] < score[0] - 0.01).all() and score[-1] < 0.05, score.tolist()


@pytest.mark.parametrize("scene", SCENES)
def test_vq_falls_with_noise_and_blur(scene):
    clean = video("purple", scene=scene)
    noise = torch.randn(clean.shape, generator=seeded())
    score = VQ(torch.stack([clean + level * noise for level in (0, 0.04, 0.08, 0.12)]), [""] * 4)
    assert (score.diff() < 0).all() and score[0] - score[-1] > 0.05, score.tolist()
    blurred = [clean, *(F.avg_pool2d(clean, w, 1, w // 2, count_include_pad=False) for w in (5, 9))]
    score = VQ(torch.stack(blurred), [""] * 3)
    assert (score.diff() < 0).all() and score[0] - score[-1] > 0.03, score.tolist()


# ---------------------------------------------------------------- MQ


def test_mq_in_closed_form():
    """Steps of 0 or 4 pixels: smooth is exp(-change^2 / 2 / 1.5^2), alive is tanh(step)."""
    there_and_back = torch.tensor([[28, 20], [28, 24], [28, 20], [28, 24], [28, 20]])
    paths = {
        "rest": (straight("rest"), 0.5 + 0),
        "on": (straight("right"), 0.5 + 0.5 * math.tanh(4)),
        "slow": (straight("right", speed=1), 0.5 + 0.5 * math.tanh(1)),
        "back": (there_and_back, 0.5 * math.exp(-64 / 4.5) + 0.5 * math.tanh(4)),
        "start": (torch.tensor([[28, 20]] * 3 + [[28, 24], [28, 28]]),
                  0.5 * (2 + math.exp(-16 / 4.5)) / 3 + 0.5 * (2 * math.tanh(4)) / 4),
    }  # fmt: skip
    for name, (path, want) in paths.items():
        score = MQ(video(path=path)[None], [""]).item()
        assert score == pytest.approx(want, abs=0.01), name


@pytest.mark.parametrize("scene", SCENES)
def test_mq_likes_motion_that_goes_on_and_ignores_what_moves(scene):
    on = straight("right", 8)
    turn = torch.cat([on[:4], on[3] + 4 * torch.arange(1, 5)[:, None] * torch.tensor([1, 0])])
    jerk, wild = on.clone(), on.clone()
    jerk[4, 0] += 4
    wild[:, 0] += 8 * torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    scores = [MQ(video(scene=scene, path=path)[None], [""]).item() for path in (on, turn, jerk, wild)]
    assert (
        scores == sorted(scores, reverse=True) and min(a - b for a, b in zip(scores, scores[1:], strict=False)) > 0.05
    )
    looks = torch.stack([video(c, s, scene, on, size=k % 2) for k, c in enumerate(COLOURS) for s in SHAPES])
    score = MQ(looks, [""] * 24)
    assert score.max() - score.min() < 0.05


def test_mq_does_not_see_the_landscape_change():
    """A traveller's scene changes from frame to frame; the hero goes on."""
    path = straight("right", 6)
    ring = video(path=path, scene=["night", "night", "forest", "forest", "night", "forest"])
    assert MQ(ring[None], [""]).item() == pytest.approx(MQ(video(path=path)[None], [""]).item(), abs=0.02)


# ---------------------------------------------------------------- TA


def preferred(videos, prompts):
    """[videos, prompts] scores of every video under every prompt."""
    return torch.stack([TA(videos, [prompt] * len(videos)) for prompt in prompts], 1)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("size", range(2))
def test_ta_prefers_the_named_colour_shape_and_motion(scene, size):
    short = straight("right", 3)
    sets = {
        "colour": ([video(c, "square", scene, short, size) for c in COLOURS], [f"a {c} thing" for c in COLOURS]),
        "shape": ([video("purple", s, scene, short, size) for s in SHAPES], [f"a {s}" for s in SHAPES]),
        "motion": ([video("red", "cross", scene, straight(d, 3), size) for d in (*DIRECTIONS, "rest")],
                   [*(f"it moves {d}" for d in DIRECTIONS), "it rests"]),
    }  # fmt: skip
    for name, (videos, prompts) in sets.items():
        score = preferred(torch.stack(videos), prompts)
        right = torch.arange(len(prompts))
        assert score.argmax(0).equal(right) and score.argmax(1).equal(right), (name, score.tolist())
        wrong = score.masked_fill(torch.eye(len(prompts), dtype=torch.bool), -1)
        assert (score.diagonal() > wrong.amax(0) + 0.3).all(), name  # the named one is worth a lot
        assert (score.diagonal() > 0.5).all(), name


def test_ta_counts_the_frames_at_the_named_scenes():
    one = video(scene=["beach", "beach", "night", "night", "snow"])[None]

    def at(clauses):
        return TA(one, [f"a thing , {clauses}"]).item()

    cases = {
        "2 frames at the beach , 2 frames at the night , 1 frames at the snow": 5,
        "2 frames at the beach , 3 frames at the night or snow": 5,
        "5 frames at the beach or night or meadow or dusk or forest or snow": 5,
        "5 frames at the beach": 2,
        "2 frames at the night , 3 frames at the beach": 0,
        "1 frames at the beach , 4 frames at the night": 3,
        "5 frames at the meadow or dusk or forest": 0,
        "3 frames at the beach or night": 5 * 3 / 3,  # of the frames that are named
    }  # fmt: skip
    for clauses, right in cases.items():
        assert at(clauses) == pytest.approx(right / 5, abs=0.01), clauses


def test_ta_is_the_mean_of_what_is_named():
    one = video("red", "disc")[None]
    there = "5 frames at the snow"
    words = ("red", "disc", "moves left", f"a , {there}")
    parts = [TA(one, [part]) for part in words]
    assert len({round(part.item(), 2) for part in parts}) == 4
    assert_close(TA(one, [f"a red disc moves left , {there}"]), torch.stack(parts).mean(0))
    assert_close(TA(one, ["a red disc , 2 frames at the snow , 3 frames at the dusk"]), (parts[0] + parts[1] + 0) / 3,
                 rtol=0, atol=1e-3)  # fmt: skip
    assert TA(one, ["a thing zigzags"]).item() == 1  # nothing that it knows is named
    assert_close(TA(one, ["a red thing zigzags"]), parts[0])  # unknown words are skipped


def test_ta_falls_when_a_video_is_partly_wrong():
    red, blue = video("red"), video("blue")
    mixed = torch.stack([torch.cat([blue[:k], red[k:]]) for k in range(6)])
    assert (TA(mixed, ["a red disc"] * 6).diff() < -0.05).all()


def test_ta_of_stories_told_right_and_wrong():
    """Sentences of `resolve` for the second chunk, on the story itself, on another story's video, on one that stays."""
    scripts = [s for s in world.prompt_set(80, 1, seed=6, event="settles") if "the" in s and "turns" not in s][:12]
    states = torch.stack([world.simulate(s, 39, seeded(k)) for k, s in enumerate(scripts)])
    stays, astray = states.clone(), states.clone()
    stays[:, :, 3] = states[:, :1, 3]  # waits from the start
    astray[:, 27:, 3] = (states[:, :1, 3] + 5) % 6  # settles in the one scene that it has not seen
    sentences = [world.resolve(script, range(21, 39)) for script in scripts]
    right, waits, wrong = (TA(world.render(s[:, 21:39]), sentences) for s in (states, stays, astray))
    assert right.min() > 0.75 and (right > waits + 0.05).all() and (right > wrong + 0.1).all()


def test_a_hero_that_turns_when_its_words_say_scores_most():
    script = "a red disc at the forest rests and turns blue"
    right = world.simulate(script, 39, seeded())
    early = right.clone()
    early[:, 2] = right[-1, 2]
    sentences = [world.resolve(script, range(21, 39))] * 2
    score = TA(world.render(torch.stack([right, early])[:, 21:]), sentences)
    assert score[0] >= score[1]


# ---------------------------------------------------------------- smooth, and one video at a time


@pytest.mark.parametrize("name", REWARDS)
def test_gradients_by_finite_differences(name):
    """In float64, at the pixels that matter most and on, beside and off the hero. Noise keeps them off the kinks."""
    prompt, h = ["a red square moves up , 1 frames at the forest , 2 frames at the beach or night"], 1e-6
    path = torch.tensor([[28, 28], [28, 32], [24, 36]])
    pixels = video("orange", "disc", ["forest", "night", "snow"], path)[None].double()
    pixels = (pixels + 0.01 * torch.randn(pixels.shape, generator=seeded(2), dtype=torch.float64)).requires_grad_()
    reward = replace(REWARDS[name], look=replace(LOOK, scenes={k: v.double() for k, v in LOOK.scenes.items()}))
    score = reward(pixels, prompt)
    assert score.dtype == torch.float64
    (grad,) = torch.autograd.grad(score.sum(), pixels)
    assert grad.isfinite().all()
    largest = grad.abs().flatten().topk(3).indices
    spots = [tuple(int(i) for i in torch.unravel_index(k, grad.shape)) for k in largest]
    spots += [(0, 0, 1, 28, 28), (0, 1, 0, 28, 40), (0, 2, 2, 24, 36), (0, 2, 1, 5, 5)]
    for spot in spots:
        step = torch.zeros_like(pixels)
        step[spot] = h
        with torch.no_grad():
            difference = (reward(pixels + step, prompt) - reward(pixels - step, prompt)) / (2 * h)
        assert_close(difference[0], grad[spot], rtol=1e-4, atol=1e-8)
    assert grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", REWARDS)
def test_each_video_is_scored_alone(name):
    videos = torch.stack(
        [video("red", "disc"), video("blue", "cross", "snow", straight("up", 5)), video("green", "square")]
    )
    videos = (videos + 0.02 * torch.randn(videos.shape, generator=seeded())).clamp(0, 1)
    prompts = ["a red disc moves left", "a cross , 5 frames at the snow", "a blue square rests"]
    together = REWARDS[name](videos, prompts)
    alone = torch.cat([REWARDS[name](videos[k : k + 1], prompts[k : k + 1]) for k in range(3)])
    assert_close(together, alone, rtol=0, atol=1e-5)
    assert_close(REWARDS[name](videos.flip(0), prompts[::-1]), together.flip(0), rtol=0, atol=1e-5)


def test_each_prefers_the_clean_story_to_a_damaged_one():
    clean = video("red", "disc", "forest", straight("right", 6))
    noise = (clean + 0.15 * torch.randn(clean.shape, generator=seeded())).clamp(0, 1)
    shaken = video("red", "disc", "forest", straight("right", 6) + 8 * torch.tensor([[0, 0], [1, 0]] * 3))
    other = video("blue", "cross", "night", straight("left", 6))
    prompt = "a red disc moves right , 6 frames at the forest"
    for name, bad in (("vq", noise), ("vq", other), ("mq", shaken), ("mq", noise), ("ta", noise), ("ta", other)):
        score = REWARDS[name](torch.stack([clean, bad]), [prompt] * 2)
        assert score[0] > score[1] + 0.02, (name, score.tolist())


# ---------------------------------------------------------------- the mixture, and errors


def test_pocket_rewards_are_the_three_with_their_weights():
    videos, prompts = torch.stack([video("red"), video("blue", scene="night")]), ["a red disc", "a red disc moves up"]
    mixture = pocket_rewards(vq=1.0, mq=0.5, ta=2.0)
    scores = mixture.scores(videos, prompts)
    assert list(scores) == ["vq", "mq", "ta"]
    for name, reward in REWARDS.items():
        assert_close(scores[name], reward(videos, prompts))
    assert_close(mixture(videos, prompts), scores["vq"] + 0.5 * scores["mq"] + 2 * scores["ta"])
    nights = pocket_rewards(like=("night",)).scores(videos, prompts)
    assert nights["vq"][1] > nights["vq"][0] and scores["vq"][0] > scores["vq"][1]


def test_rewards_refuse_what_they_cannot_score():
    for reward in REWARDS.values():
        with pytest.raises(ValueError, match=r"videos \[N, F, 3, H, W\] and N prompts, got .*\[5, 3, 64, 64\]"):
            reward(video(), ["a disc"] * 5)
        with pytest.raises(ValueError, match=r"got torch.uint8"):
            reward(torch.zeros(2, 4, 3, SIZE, SIZE, dtype=torch.uint8), ["a disc"] * 2)
    with pytest.raises(ValueError, match="at least 3 frames, got 2"):
        pocket_rewards()(video()[None, :2], ["a disc"])  # a change of step needs three frames
    assert TA(video()[None, :2], ["a disc moves left"]).isfinite()  # a step needs two
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        TA(video()[None, :1], ["a disc moves left"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_of_low_precision_are_scored_in_float32(dtype):
    """What is scored is the rounded pixels, not rounded again on the way."""
    pixels, words = video("red", "square")[None].to(dtype), ["a red square moves right , 5 frames at the forest"]
    for reward in REWARDS.values():
        assert torch.equal(reward(pixels, words), reward(pixels.float(), words))


def test_a_diagonal_direction_scores_at_most_1():
    here = replace(LOOK, directions={"diagonally": (1, 1), "right": (0, 1)})
    path = torch.tensor([[16 + 4 * f, 16 + 4 * f] for f in range(5)])
    pixels = video("red", "square", path=path)[None]
    along, half = (TextAlignment(here)(pixels, [word]).item() for word in ("diagonally", "right"))
    length = math.hypot(4, 4)
    assert 0.95 < along <= 0.5 + 0.5 * length / math.hypot(length, 1) + 1e-3 and half < along


def test_a_look_of_ones_own():
    pixels = video("red", "square")[None]
    assert TextAlignment(replace(LOOK, shapes={}))(pixels, ["red"]) > 0.7
    small = replace(LOOK, shapes={"dot": torch.ones(1, 5, 5)})
    with pytest.raises(ValueError, match=r"masks.*\[5, 5\] and \[64, 64\]"):
        TextAlignment(small)(pixels, ["a dot"])
