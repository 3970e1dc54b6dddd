"""The distillation: clips against the stories they were cut from, their encoding against a rollout's own, the DMD
gradient in closed form, Muon against torch's, resuming."""

import copy
import inspect
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min.chr import Window, branch_frames, chunk_starts, ordinary_frames, pool
from kvpo_min.pocket import distill, load_pocket, world
from kvpo_min.rollout import KVHistory, Sampler, Stream, generate, stale_from
from kvpo_min.tve import schedule

pytestmark = pytest.mark.usefixtures("one_thread")
STATES = 4 * 2 * 6 * 6 * 8 * 8
WINDOW = Window()
FORMS = (0, 39, 57, 75, 111, 129)  # a short story, chunks at a switch of words, chunks inside a segment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stories():
    """Stories whose latents are the numbers of their frames' rows."""
    told = distill.tell_stories(240, torch.arange(float(STATES)).view(-1, 1, 1, 1), seed=3)
    kept = {}
    for name, key in (("short", told.short[:, 12:27]), ("long", told.long[:, :3])):  # by which a clip is known
        seen = {tuple(row): k for k, row in enumerate(key.tolist())}
        kept |= {
            field: getattr(told, field)[list(seen.values())] for field in (name, f"{name}_text", f"{name}_settles")
        }
        kept |= {"motion": told.motion[list(seen.values())]} if name == "short" else {}
    assert len(kept["short"]) > 100 and len(kept["long"]) > 50
    return distill.replace(told, **kept)


@pytest.fixture(scope="module")
def shown(stories):
    """The same with latents that a model can read, [8, 4, 4]."""
    return distill.replace(stories, latents=torch.randn(STATES, 8, 4, 4, generator=seeded()).half())


def rows_of(x0):
    """x0 [B, n, 3, 1, 1, 1] of `stories` -> rows [B, 3 n]"""
    return x0.flatten(1).long()


def frames_of(clip):
    """Absolute frame of each place of a clip."""
    return torch.tensor([start + f for start in clip.starts for f in range(3)])


def told_by(clip, stories, chunk):
    """Which story each clip of the batch shows. -> indices [B]"""
    rows = rows_of(clip.x0)
    bank, own = (stories.long[:, :3], rows[:, :3]) if chunk else (stories.short[:, 12:27], rows[:, 12:27])
    same = (own[:, None] == bank).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def event_of(chunk):
    return chunk + 6 if chunk else 27


def settles_in(stories, story, chunk):
    if not chunk:
        return bool(stories.short_settles[story, 0])
    return chunk in world.SWITCHES and bool(stories.long_settles[story, world.segment_at(chunk, 4)])


def most_remembered(scenes, frames):
    """The scene that most of `frames` behind the sink show; at a tie the one that was seen first."""
    behind = sorted(f for f in frames if f >= 3)
    best = max(sum(scenes[f] == scenes[g] for g in behind) for f in behind)
    return next(scenes[f] for f in behind if sum(scenes[f] == scenes[g] for g in behind) == best)


# ---------------------------------------------------------------- the table of all frames, and the stories


def test_every_clean_frame_has_a_row_of_its_own():
    states = distill.random_states(3000, seeded())
    rows = distill.state_row(states)
    assert rows.min() >= 0 and rows.max() < STATES
    assert len(rows.unique()) == len(states.unique(dim=0))
    assert distill.scene_of(rows).equal(states[:, 3])
    other = states.clone()
    other[:, 3] = (states[:, 3] + 2) % 6
    assert distill.in_scene(rows, other[:, 3]).equal(distill.state_row(other))
    assert [set(column.tolist()) for column in states.T[:4]] == [set(range(n)) for n in (4, 2, 6, 6)]
    assert set(states[:, 4:].flatten().tolist()) == set(range(0, 64, 8))


def test_the_table_holds_each_frame_at_its_row(tmp_path, monkeypatch):
    """The states themselves in place of pictures and latents: nothing is rendered."""
    monkeypatch.setattr(world, "render", lambda states: states)
    monkeypatch.setattr(distill, "to_latent", lambda autoencoder, pixels: pixels.float())
    path = tmp_path / "latents.safetensors"
    first, other = (SimpleNamespace(device="cpu", state_dict=lambda k=k: {"w": torch.tensor([k])}) for k in (1.0, 2.0))
    table = distill.encode_world(first, path)
    assert table.shape == (STATES, 6) and table.dtype == torch.float16
    assert distill.state_row(table.long()).equal(torch.arange(STATES))
    monkeypatch.setattr(distill, "to_latent", lambda autoencoder, pixels: pixels.float() + 1)
    assert distill.encode_world(first, path).equal(table)  # kept: the autoencoder is not asked again
    assert distill.encode_world(other, path).equal((table.float() + 1).half())  # of another one: made anew


def test_stories_are_told_as_the_world_tells_them():
    latents, generator = torch.zeros(1), seeded(7)
    told = distill.tell_stories(7, latents, seed=7)
    assert told.short.shape == (7, 39) and told.long.shape == (3, 147) and told.latents is latents
    for name, count, n_segments, n_frames in (("short", 7, 1, 39), ("long", 3, 4, 147)):
        scripts = [world.sample_script(generator, n_segments) for _ in range(count)]
        for k, script in enumerate(scripts):
            states = world.simulate(script, n_frames, generator)
            assert getattr(told, name)[k].equal(distill.state_row(states).int())
            texts = getattr(told, f"{name}_text")[k]
            assert texts.equal(world.embed([part.strip() for part in script.split("|")]))
            settles = ["settles" in part for part in script.split("|")]
            assert getattr(told, f"{name}_settles")[k].tolist() == settles
            if n_segments == 1:
                words = script.split()
                named = [d for d in world.DIRECTIONS if d in words]
                named += ["rest"] * (not named and "moves" not in words and "wanders" not in words)
                assert told.motion[k] == (world.MOTIONS.index(named[0]) if named else world.OPEN)


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("chunk", FORMS)
def test_a_clip_shows_its_story_up_to_the_event(stories, chunk):
    clip, event = distill.sample_clip(stories, 48, seeded(chunk), chunk=chunk), event_of(chunk)
    starts = [0, *range(chunk - 21, chunk + 18, 3)] if chunk else list(range(0, 39, 3))
    assert clip.starts == starts and clip.x0.shape[:3] == (48, len(starts), 3)
    frames, rows, own = frames_of(clip), rows_of(clip.x0), told_by(clip, stories, chunk)
    bank = stories.long if chunk else stories.short
    before = (frames < event) & (frames >= (0 if chunk else 9))  # a short story's beginning may be `turned`
    assert rows[:, before].equal(bank[own][:, frames[before]].long())

    for i, start in enumerate(starts):
        # the last blocks before a switch are encoded again under the new words, older ones keep theirs
        again = start >= stale_from(chunk, WINDOW) if chunk in world.SWITCHES else start > 0
        segment = world.segment_at(max(start, chunk), 4) if again else world.segment_at(min(start, chunk - 1), 4)
        if chunk and start == 0:
            segment = 0
        text = stories.long_text[own, segment] if chunk else stories.short_text[own, 0]
        assert clip.text[:, i].equal(text), start


@pytest.mark.parametrize("chunk", FORMS)
def test_a_hero_settles_where_its_readable_frames_say(stories, chunk):
    """From the event on, by a loop over what the event's block reads: routed for half of the clips."""
    clip, event = distill.sample_clip(stories, 96, seeded(chunk), chunk=chunk), event_of(chunk)
    frames, rows, own = frames_of(clip), rows_of(clip.x0), told_by(clip, stories, chunk)
    bank = stories.long if chunk else stories.short
    settled = moved = 0
    for b in range(96):
        if not settles_in(stories, own[b], chunk):
            continue
        scenes = {int(f): int(s) for f, s in zip(frames, distill.scene_of(rows[b]), strict=True)}
        reads = frames[clip.reads[clip.starts.index(event)][b]].tolist()
        goal = torch.tensor(most_remembered(scenes, reads))
        after = frames >= event
        assert rows[b, after].equal(distill.in_scene(bank[own[b]][frames[after]].long(), goal))
        settled, moved = settled + 1, moved + int(goal != scenes[event - 1])
    if chunk in (0, *world.SWITCHES):
        assert settled > 20 and moved > 3  # a route does take heroes elsewhere
    else:
        assert not settled


@pytest.mark.parametrize("chunk", FORMS)
def test_a_traveller_that_does_not_settle_goes_on(stories, chunk):
    clip, event = distill.sample_clip(stories, 96, seeded(chunk), chunk=chunk), event_of(chunk)
    frames, rows, own = frames_of(clip), rows_of(clip.x0), told_by(clip, stories, chunk)
    bank, after, going = stories.long if chunk else stories.short, frames >= event, 0
    for b in range(96):
        if not settles_in(stories, own[b], chunk):
            told = bank[own[b]][frames[after]].long()
            going += len(distill.scene_of(told).unique()) > 1
            assert rows[b, after].equal(told)
    assert going > 3


@pytest.mark.parametrize("chunk", FORMS)
def test_what_blocks_read_is_chr_or_the_ordinary_window(stories, chunk):
    clip = distill.sample_clip(stories, 64, seeded(chunk + 1), chunk=chunk)
    frames, begins = frames_of(clip), chunk or 21
    ordinary = [[f for f in ordinary_frames(s, WINDOW).tolist() if f in frames] for s in clip.starts]
    routed = 0
    for b in range(64):
        reads = [frames[r[b]].tolist() for r in clip.reads]
        ways = [None]  # all ordinary, or a route of one of the two forks; which, the blocks themselves must show
        for fork in (begins, begins + 3):
            first = set(reads[clip.starts.index(fork)]) - {0, 1, 2}
            for nearest in (1, 2, 3):
                route = sorted(first - set(range(fork - nearest, fork)))
                if len(route) == 6 - nearest and set(route) <= set(pool(fork, WINDOW, nearest, 5)):
                    ways.append((fork, nearest, torch.tensor([route])))
        fits = []
        for way in ways:
            want = list(ordinary)
            if way:
                fork, nearest, route = way
                for i, start in enumerate(clip.starts):
                    if fork <= start < fork + 15:
                        want[i] = branch_frames(route, start, WINDOW, nearest)[0].tolist()
            fits.append(want == reads)
        assert any(fits), (b, reads)
        routed += not fits[0]
    assert 16 < routed < 48  # half of the clips


@pytest.mark.parametrize("chunk", FORMS)
@pytest.mark.parametrize("more", [0, 1, 4])
def test_queries_ask_for_blocks_of_the_story(stories, chunk, more):
    clip, event = distill.sample_clip(stories, 24, seeded(more), more=more, chunk=chunk), event_of(chunk)
    at, rows, frames = clip.starts.index(event), rows_of(clip.x0), frames_of(clip)
    own = told_by(clip, stories, chunk)
    seen, deciding, elsewhere = set(), [], 0
    for q in clip.queries:
        if q.block not in seen:  # the first one of a block is the clip's own
            seen.add(q.block)
            assert q.reads.equal(clip.reads[q.block]) and q.x0.equal(clip.x0[:, q.block])
            continue
        deciding.append(q.block)
        assert q.weight.equal(next(p.weight for p in clip.queries if p.block == q.block))
        if q.block != at:
            assert q.reads.equal(clip.reads[q.block]) and q.x0.equal(clip.x0[:, q.block])
            continue
        asked = frames[q.reads]
        assert (asked.diff(dim=1) > 0).all() and asked.shape == (24, 9)
        for b in range(24):
            want = rows[b, 3 * at : 3 * at + 3]
            if settles_in(stories, own[b], chunk):
                scenes = {int(f): int(s) for f, s in zip(frames, distill.scene_of(rows[b]), strict=True)}
                goal = most_remembered(scenes, asked[b].tolist())
                want, elsewhere = distill.in_scene(want, torch.tensor(goal)), elsewhere + (goal != scenes[event - 1])
            assert q.x0[b].flatten().long().equal(want)
    assert [clip.starts[i] for i in sorted(seen)] == list(range(chunk or 3, (chunk or 21) + 18, 3))
    travel = [i for i in sorted(seen) if clip.starts[i] % 6 == 0 or clip.starts[i] == 3] if more else []
    assert sorted(deciding) == sorted([at] * more + travel)
    if more == 4:
        first, *routed = [q for q in clip.queries if q.block == at][1:]
        assert frames[first.reads].equal(ordinary_frames(event, WINDOW).expand(24, -1))
        assert all(len(frames[q.reads].unique(dim=0)) > 10 for q in routed)  # a route of its own for each
        assert chunk not in (0, *world.SWITCHES) or elsewhere > 5


def test_forms_of_clips_are_drawn_and_taken_in_turn(stories):
    later = chunk_starts(147)[2:]
    generator = seeded()
    drawn = [distill.sample_clip(stories, 1, generator, more=0).starts for _ in range(400)]
    begins = [0 if starts[1] == 3 else starts[1] + 21 for starts in drawn]
    assert set(begins) == {0, *later} and 0.58 < begins.count(0) / 400 < 0.72
    at_switch = sum(begin in world.SWITCHES for begin in begins) / sum(begin > 0 for begin in begins)
    assert 0.5 < at_switch < 0.8  # 3 of 6 chunks begin with new words, and are drawn twice as often
    turn = [distill.form_of(i) for i in range(72)]
    assert turn.count(0) == 48 and set(turn) == {0, *later}
    assert [turn.count(chunk) for chunk in later] == [6, 2, 6, 2, 6, 2]


def test_turned_heroes_come_another_way_and_then_do_as_told():
    """Straight stories of every named motion, turned up to frame 3, 6 or 9; places are read back from the rows."""
    motion = torch.tensor([*range(5), world.OPEN, 2, 3])
    scripts = [f"a red disc moves {d}" for d in world.DIRECTIONS] + ["a red disc rests", "a red disc"]
    scripts += ["a red disc moves right", "a red disc moves down"]
    rows = torch.stack([distill.state_row(world.simulate(s, 15, seeded(k))) for k, s in enumerate(scripts)])
    until, heading = torch.tensor([3, 6, 9, 3, 6, 9, 6, 9]), torch.tensor([1, 4, 0, 2, 3, 0, 2, 1])
    chosen = torch.tensor([True] * 7 + [False])
    turned, wrong = distill.turned(rows, motion, chosen, until, heading)
    assert (turned // 64).equal(rows // 64)  # only the place
    for k in range(8):
        place = 8 * torch.stack([turned[k] // 8 % 8, turned[k] % 8], 1)
        steps = (place.diff(dim=0) + 32) % 64 - 32
        if k in (5, 6, 7):  # no motion named, the same one, not chosen
            assert turned[k].equal(rows[k]) and not wrong[k].any()
            continue
        u = int(until[k])
        assert turned[k, u - 1 :].equal(rows[k, u - 1 :])
        names = [*world.DIRECTIONS.values(), (0, 0)]
        assert (steps[: u - 1] == 8 * torch.tensor(names[heading[k]])).all()
        assert (steps[u - 1 :] == 8 * torch.tensor(names[motion[k]])).all()
        assert wrong[k].tolist() == [t < u for t in range(15)]


def test_turned_blocks_are_read_but_not_asked_for(stories):
    """Weight 0 exactly where a block does not show what the story shows."""
    clip = distill.sample_clip(stories, 200, seeded(5), more=2, chunk=0)
    rows, own = rows_of(clip.x0), told_by(clip, stories, 0)
    told = stories.short[own].long()
    differs = (rows != told).view(200, 13, 3)[:, :4].any(2)
    assert 0.05 < differs[:, 0].float().mean() < 0.2 and not differs[:, 3].any()
    weight = torch.stack([next(q.weight for q in clip.queries if q.block == i) for i in range(1, 4)], 1)
    assert (weight == 0).equal(differs[:, 1:]) and set(weight.unique().tolist()) == {0.0, 1.0}
    assert all((q.weight == 1).all() for q in clip.queries if q.block > 3)


# ---------------------------------------------------------------- clips and the model


class Forced:
    """A backbone whose blocks come out as given, so that a rollout's own code encodes them."""

    device = torch.device("cpu")

    def __init__(self, backbone, blocks):
        self.backbone, self.blocks, self.written = backbone, blocks, {}

    def velocity(self, x, sigma, start, text, kv):
        return (x - self.blocks[start]) / sigma.view(-1, 1, 1, 1, 1)

    def encode(self, x0, start, text, kv):
        own = self.written[start] = self.backbone.encode(x0, start, text, kv)
        return own


def test_a_short_clip_is_encoded_as_a_rollout_encodes_it(shown, make_backbone):
    backbone = make_backbone()
    clip = distill.sample_clip(shown, 3, seeded(1), chunk=0)
    usual = [(r == ordinary_frames(s, WINDOW)).all() for s, r in zip(clip.starts, clip.reads, strict=True)]
    assert not all(usual) and any(usual)  # routes are among them
    forced = Forced(backbone, {start: clip.x0[:, i] for i, start in enumerate(clip.starts)})
    generate(
        forced, Stream(), [clip.text[:, 0]], torch.zeros(3, 13, 1, 3, 8, 4, 4), 39, Sampler(torch.ones(1)),
        reads=lambda start: clip.reads[start // 3],
    )  # fmt: skip
    ours = distill.encode_clip(backbone, clip, clip.x0)
    theirs = torch.cat([forced.written[start] for start in clip.starts], 3)  # [layers, 2, B, 39, tokens, heads, D]
    assert_close(ours, theirs.permute(2, 3, 0, 1, 4, 5, 6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [39, 57, 129])
def test_a_later_chunk_is_encoded_as_a_history_gives_it(shown, make_backbone, chunk):
    backbone = make_backbone()
    clip, history, written = distill.sample_clip(shown, 3, seeded(2), chunk=chunk), KVHistory(), []
    frames = frames_of(clip)
    for i, start in enumerate(clip.starts):
        own = backbone.encode(clip.x0[:, i], start, clip.text[:, i], history.read(frames[clip.reads[i]]))
        history = history.append(start, own)
        written.append(own)
    ours = distill.encode_clip(backbone, clip, clip.x0)
    assert_close(ours, torch.cat(written, 3).permute(2, 3, 0, 1, 4, 5, 6), atol=1e-5, rtol=0)


def test_encoding_carries_gradient(shown, make_backbone):
    """Finite differences of a sum over the event's keys, on the way from the sink through all blocks between."""
    backbone = make_backbone()
    clip = distill.sample_clip(shown, 1, seeded(3), chunk=57)
    x0 = clip.x0.clone().requires_grad_()
    direction = torch.randn(x0[:, 0].shape, generator=seeded(1))

    def last(x0):
        return distill.encode_clip(backbone, clip, x0)[:, -3:, 1].double().sin().sum()  # of the second layer

    (grad,) = torch.autograd.grad(last(x0), x0)
    step = torch.zeros_like(x0)
    step[:, 0] = 0.02 * direction  # large, because diffusers' norms round to float32
    with torch.no_grad():
        difference = (last(x0 + step) - last(x0 - step)) / 0.04
    assert difference.abs() > 1e-3
    assert_close((grad[:, 0] * direction).sum().double(), difference, rtol=0.02, atol=0)


@pytest.mark.parametrize("chunk", [0, 75])
def test_velocities_of_all_queries_equal_one_call_each(shown, make_backbone, chunk):
    backbone = make_backbone()
    clip = distill.sample_clip(shown, 2, seeded(4), chunk=chunk)
    frames = distill.encode_clip(backbone, clip, clip.x0)
    x = torch.randn(len(clip.queries), 2, 3, 8, 4, 4, generator=seeded())
    sigma = torch.rand(len(clip.queries), 2, generator=seeded())
    together = distill.velocities(backbone, clip, frames, x, sigma, clip.text)
    for k, q in enumerate(clip.queries):
        for b in range(2):
            read = [frames[b, place] for place in q.reads[b].tolist()]  # each [layers, 2, tokens, heads, D]
            kv = torch.cat(read, 2)[:, :, None] if read else None
            alone = backbone.velocity(x[k, b : b + 1], sigma[k, b : b + 1], clip.starts[q.block],
                                      clip.text[b : b + 1, q.block], kv)  # fmt: skip
            assert_close(together[k, b], alone[0], atol=1e-5, rtol=0)


class Linear:
    """A model that answers with a multiple of what it is given, whatever it reads."""

    def __init__(self, factor):
        self.factor, self.calls = factor, []

    def velocity(self, x, sigma, start, text, kv):
        self.calls.append((x, sigma))
        return self.factor * x


def test_the_loss_is_the_error_of_the_velocity_where_a_block_is_right(shown):
    clip = distill.sample_clip(shown, 40, seeded(8), chunk=0)
    frames, model = torch.zeros(40, 39, 1, 2, 1, 1, 1), Linear(0.5)
    loss = distill.flow_matching_loss(model, clip, frames, seeded(9))
    x, sigma = (torch.cat(parts) for parts in zip(*model.calls, strict=True))
    order = sorted(range(len(clip.queries)), key=lambda k: clip.queries[k].reads.shape[1])  # as many reads, one call
    x0 = torch.cat([clip.queries[k].x0 for k in order])
    weight = torch.cat([clip.queries[k].weight for k in order])
    s = sigma.view(-1, 1, 1, 1, 1)
    noise = (x - (1 - s) * x0) / s
    error = (0.5 * x - (noise - x0)).square().mean((1, 2, 3, 4))
    assert 0 < (weight == 0).sum() < 100
    assert_close(loss, (error * weight).sum() / weight.sum(), rtol=1e-3, atol=0)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01

    own, more = [], []
    for k, levels in zip(order, sigma.split(40), strict=True):  # a block that decides is asked again, at high noise
        first = next(j for j, q in enumerate(clip.queries) if q.block == clip.queries[k].block)
        (own if k == first else more).append(levels)
    assert 0.1 < (torch.cat(own) > 0.9).float().mean() < 0.3 and (torch.cat(more) > 0.9).float().mean() > 0.55


def test_noise_levels():
    u = distill.noise_levels(20000, generator=seeded())
    last = distill.shifted(torch.tensor(0.25))
    assert 0 < u.min() and u.max() <= 1 and 0.14 < (u < last).float().mean() < 0.2  # one in six
    high = distill.shifted(torch.tensor(0.9))
    decide = distill.deciding_levels(20000, generator=seeded())
    assert abs((decide >= 0.9).float().mean() - 0.6 - 0.4 * (u >= 0.9).float().mean()) < 0.02 and decide.max() <= 1
    assert high > 0.9  # sigma itself, not the unshifted number
    assert_close(distill.shifted(torch.tensor([1, 0.75, 0.5, 0.25])), schedule(shift=world.SHIFT))


def test_first_blocks_are_beginnings_under_their_own_words(stories):
    x0, text = distill.first_blocks(stories, 200, seeded())
    same = (x0.flatten(1)[:, None] == stories.short[:, :3]).all(2)
    assert (same.sum(1) >= 1).all() and len(x0.flatten(1).unique(dim=0)) > 80
    for own, words in zip(same, text, strict=True):
        assert any(words.equal(stories.short_text[int(k), 0]) for k in own.nonzero()[:, 0])
    model = Linear(0.0)
    loss = distill.block_loss(model, x0, text, seeded(1))
    (x, sigma), s = model.calls[0], model.calls[0][1].view(-1, 1, 1, 1, 1)
    assert_close(loss, ((x - (1 - s) * x0) / s - x0).square().mean(), rtol=1e-3, atol=0)
    assert sigma.shape == (200,)


# ---------------------------------------------------------------- the student


def test_the_students_blocks_are_those_of_a_rollout(shown, make_backbone):
    """`student_rollout` against `rollout.generate` with the same noise and reads; one step a block has gradient."""
    student = copy.deepcopy(make_backbone()).requires_grad_(True)
    clip = distill.sample_clip(shown, 2, seeded(6), more=0, chunk=0)
    live, final = distill.student_rollout(student, clip, 0, seeded(3))
    draws, noise, exits = seeded(3), [], []
    for _ in clip.starts:
        exits.append(int(torch.randint(4, (), generator=draws)))
        noise.append(torch.stack([torch.randn(2, 3, 8, 4, 4, generator=draws) for _ in range(4)], 1))
    steps = []
    stream = generate(
        student, Stream(), [clip.text[:, 0]], torch.stack(noise, 1), 39, Sampler(schedule(shift=world.SHIFT)),
        reads=lambda start: clip.reads[start // 3], record=lambda start, z, x0: steps.append(x0),
    )  # fmt: skip
    assert_close(final.flatten(1, 2), stream.latents, atol=1e-4, rtol=0)
    assert len(set(exits)) > 1
    for k, (step, exit_step) in enumerate(zip(steps, exits, strict=True)):
        assert_close(live[:, k].detach(), step[:, exit_step], atol=1e-4, rtol=0)
    assert live.requires_grad and not final.requires_grad


def test_given_blocks_are_the_clips_and_the_rest_the_students_own(shown, make_backbone):
    student = copy.deepcopy(make_backbone()).requires_grad_(True)
    clip = distill.sample_clip(shown, 2, seeded(6), more=0, chunk=39)
    live, final = distill.student_rollout(student, clip, 8, seeded(3))
    assert live.shape[1] == 6 and final.shape == clip.x0.shape
    assert final[:, :8].equal(clip.x0[:, :8])
    noisy = distill.replace(clip, x0=torch.cat([clip.x0[:, :8], torch.randn_like(clip.x0[:, 8:])], 1))
    assert final.equal(distill.student_rollout(student, noisy, 8, seeded(3))[1])  # nothing of the story leaks in
    # What is read is detached, or a block's loss would reach the blocks before it.
    (grad,) = torch.autograd.grad(live[:, 0].sum(), student.transformer.proj_out.bias, retain_graph=True)
    (both,) = torch.autograd.grad(live[:, 1].sum(), student.transformer.proj_out.bias)
    sigmas = schedule(shift=world.SHIFT)
    for g in (grad, both):  # x0 = x - sigma v, so of the last layer's bias: -sigma times the numbers it is added to
        assert (g / -(g.numel() * 0 + 2 * 3 * 4)).min() >= sigmas.min() - 1e-3
        assert any(torch.allclose(g, -s * torch.full_like(g, 2 * 3 * 4), rtol=1e-4) for s in sigmas)


def test_dmd_gradient_in_closed_form():
    """Where both scores know one x0 each, whatever the noise, the gradient is their difference over the distance."""
    x0 = torch.randn(2, 3, 4, 8, 2, 2, generator=seeded()).requires_grad_()
    real, fake = (torch.randn(x0.shape, generator=seeded(k)) for k in (1, 2))

    def towards(goal):
        return lambda x, levels: (x - goal) / levels[..., None, None, None, None]

    loss = distill.dmd_loss(x0, towards(real), towards(fake), seeded(3))
    loss.backward()
    distance = (x0 - real).abs().mean((2, 3, 4, 5), keepdim=True)
    gradient = ((fake - real) / distance).detach()
    assert_close(x0.grad * x0.numel(), gradient, rtol=1e-3, atol=1e-3)
    assert_close(loss.detach(), 0.5 * gradient.square().mean(), rtol=1e-3, atol=0)
    same = x0.detach().clone().requires_grad_()
    distill.dmd_loss(same, towards(real), towards(real), seeded(3)).backward()
    assert same.grad.abs().max() < 1e-6  # equal scores: nothing to do


def test_dmd_moves_samples_to_where_the_real_score_says():
    x0 = torch.zeros(1, 16, 1, 8, 2, 2)
    goal = torch.randn(8, 2, 2, generator=seeded())
    for step in range(200):
        x0 = x0.detach().requires_grad_()
        own = x0.detach()

        def fake(x, levels, own=own):  # a perfect score of what there is
            return (x - own) / levels[..., None, None, None, None]

        distill.dmd_loss(x0, lambda x, s: (x - goal) / s[..., None, None, None, None], fake, seeded(step)).backward()
        x0 = x0 - 0.02 * x0.numel() * x0.grad
    assert (x0 - goal).abs().mean() < 0.05 < goal.abs().mean()


def test_guidance_of_one_is_none_and_two_doubles_what_the_words_add():
    text = torch.randn(2, 3, 4, generator=seeded())

    def velocity(text):
        return 1 + text.sum((1, 2))

    assert torch.allclose(distill.guided(velocity, text, 1.0), velocity(text))
    assert torch.allclose(distill.guided(velocity, text, 2.0) - 1, 2 * (velocity(text) - 1))


def test_a_share_of_the_texts_is_emptied_whole():
    text = distill.without_words(torch.ones(2000, 3, 4), 0.1, seeded())
    empty = (text == 0).all((1, 2))
    assert 0.07 < empty.float().mean() < 0.13 and bool((text[~empty] == 1).all())
    assert torch.equal(distill.without_words(text, 0.0, torch.Generator()), text)


# ---------------------------------------------------------------- optimizers, stages, configuration


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_takes_the_steps_of_torchs_own(shape, monkeypatch):
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)  # torch's iterations, but in float32 like ours
    exec(source.replace(".bfloat16()", ".float()"), vars(_muon).copy() | {}, scope := {})
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    generator = seeded()
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for _ in range(2)] for _ in range(2))
    optimizers = (
        distill.Muon(ours, 0.02),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - 1).abs().max() > 0.01
        assert torch.allclose(a, b, atol=1e-5)


def test_rates_rise_and_fall_and_averages_follow():
    rates = [distill.warm_cosine(i, 100, 10) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.02 + 0.98 / 2) and rates[10] == 1 and 0.02 < rates[99] < 0.03
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.75 * slow.weight + 0.25 * fast.weight
    distill.ema_update(slow, fast, 0.75)
    assert_close(slow.weight, want)


def test_a_stage_resumes_bit_for_bit(tmp_path):
    def run(folder, total, every=2):
        torch.manual_seed(0)
        model, generator = torch.nn.Linear(3, 3), seeded()
        optimizer, steps = torch.optim.AdamW(model.parameters(), 0.1), []

        def step(i):
            steps.append(i)
            loss = model(torch.randn(4, 3, generator=generator)).square().mean() * (1 + torch.rand(()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        distill.loop(folder, total, {"model": model}, {"optimizer": optimizer}, generator, step, every)
        return copy.deepcopy(model.state_dict()), steps

    run(tmp_path / "a", 4)
    (resumed, steps), (straight, _) = run(tmp_path / "a", 8), run(tmp_path / "b", 8)
    assert steps == [4, 5, 6, 7]
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert not torch.equal(resumed["weight"], run(tmp_path / "c", 4)[0]["weight"])
    done, steps = run(tmp_path / "a", 8)
    assert steps == [] and all(torch.equal(done[k], straight[k]) for k in straight)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["training_state.pt"]  # nothing left aside


def test_a_stage_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    counted, model, generator = [], torch.nn.Linear(1, 1), seeded()

    def step(i):
        counted.append(i)
        if counted == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        distill.loop(tmp_path, 6, {"model": model}, {}, generator, step, 3)
    distill.loop(tmp_path, 6, {"model": model}, {}, generator, step, 3)
    assert counted == [0, 1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize("name", [f.name for f in fields(distill.DistillConfig) if f.type in ("int", "float")])
def test_numbers_of_a_configuration_are_bounded(name):
    zero = name in ("text_dropout", "ema_decay", "seed")
    for bad in [-1, *([] if zero else [0])] if name != "seed" else [2**63, -(2**63) - 1]:
        with pytest.raises(ValueError, match=rf"{name} must "):
            distill.DistillConfig(**{name: bad})
    if isinstance(getattr(distill.DistillConfig(), name), float):
        for bad in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"{name} must be .*finite"):
                distill.DistillConfig(**{name: bad})
    if zero:
        assert getattr(distill.DistillConfig(**{name: 0}), name) == 0


def test_shares_and_devices_of_a_configuration():
    for bad in ({"text_dropout": 1.5}, {"ema_decay": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            distill.DistillConfig(**bad)
    with pytest.raises(ValueError, match="abacus"):
        distill.DistillConfig(device="abacus")


def test_the_real_transformer_fits_its_size():
    model = distill.new_transformer()
    size = sum(p.numel() for p in model.parameters())
    assert 1.5e6 < size < 2.6e6  # twice that in fp16, twice over, and the autoencoder: under 12 MB
    encoder = sum(p.numel() for p in distill.new_autoencoder().parameters())
    assert 2 * (2 * size + encoder) < 11.5e6


def test_all_stages_run_and_leave_a_model_that_loads(tmp_path, make_transformer, monkeypatch):
    """Two steps a stage with a small transformer; the table of all frames is given, which spares 18,432 encodings."""
    from safetensors.torch import save_file

    monkeypatch.setattr(distill, "new_transformer", lambda: make_transformer().requires_grad_(True))
    config = distill.DistillConfig(
        output_dir=str(tmp_path), autoencoder_steps=2, autoencoder_batch=2, teacher_steps=4, student_steps=6,
        teacher_batch=1, student_batch=1, first_blocks=2, stories=5,
    )  # fmt: skip
    latents = torch.randn(512, *distill.LATENT, generator=seeded()).half().repeat(STATES // 512, 1, 1, 1)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    torch.manual_seed(0)
    weights = distill.distill(config)
    parts = {name: load_pocket(name, weights) for name in ("student", "teacher")}
    for name, pipeline in parts.items():
        assert pipeline.decode(torch.zeros(1, 2, *distill.LATENT)).shape == (1, 2, 3, 64, 64)
        assert all(p.isfinite().all() for p in pipeline.backbone.parameters())
        assert f"{tmp_path}" not in (weights / name / "config.json").read_text()
    student, teacher, first = (dict(b.named_parameters()) for b in (
        parts["student"].backbone, parts["teacher"].backbone, distill.WanBackbone(make_transformer())))  # fmt: skip
    for a, b in ((student, teacher), (teacher, first)):
        assert sum((a[k] - b[k]).abs().max() > 0 for k in a) > len(a) / 2  # each stage trained its own
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("training_state.pt")}
    distill.distill(config)  # all is done: nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in before} == before
