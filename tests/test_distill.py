"""The distillation: clips, masks, teacher forcing against block-by-block rollouts, the DMD gradient, resuming."""

import copy
import inspect

import pytest
import torch
from diffusers import WanTransformer3DModel

from kvpo_min.pocket import distill, world
from kvpo_min.wan import WanBackbone


def tiny_backbone(seed: int = 0) -> WanBackbone:
    torch.manual_seed(seed)
    return WanBackbone(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8,
            text_dim=world.TEXT_DIM, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=256,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def stories() -> distill.Stories:
    latents = torch.randn(98304, *distill.LATENT, generator=torch.Generator().manual_seed(0)).half()
    return distill.tell_stories(10, latents, seed=3)


def test_every_clean_frame_has_a_row_of_its_own():
    generator = torch.Generator().manual_seed(0)
    states = distill.random_states(2000, generator)
    rows = distill.state_row(states)
    assert rows.min() >= 0 and rows.max() < 98304
    assert len(rows.unique()) == len(states.unique(dim=0))


@pytest.mark.parametrize("start", [0, 3, 9, 21, None])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_mask_against_a_naive_reading_of_the_rules(stories, start, dropout):
    generator = torch.Generator().manual_seed(1)
    clip = distill.sample_clips(stories, 4, generator, start)
    mask = distill.clip_mask(clip, generator, dropout)
    kinds = ["far"] * 9 + ["clean"] * 15 + ["noisy"] * 12
    for b in range(4):
        keys = torch.cat([clip.far_frames[b], clip.clean_frames[b], clip.noisy_frames[b]]).tolist()
        for q, frame in enumerate(keys[9:]):
            kind, block = kinds[9 + q], frame // 3 * 3
            read = {(kinds[k], keys[k]) for k in mask[b, q].nonzero()[:, 0].tolist()}
            own = {(kind, f) for f in range(block, block + 3)}
            assert own <= read
            past = read - own
            assert all(f < block and kind_ != "noisy" for kind_, f in past)
            if block >= 3:
                assert {("far", f) for f in range(3)} <= past
            rest = {f for kind_, f in past if not (kind_ == "far" and f < 3)}
            assert all(f >= 3 for f in rest)  # the sink is never read twice
            ordinary = {f for f in clip.clean_frames[b].tolist() if max(3, block - 6) <= f < block}
            if kind == "clean" or dropout == 0:
                assert rest == ordinary
            else:
                assert len(rest) <= 6 and (block - 1 in rest or block <= 3)


def test_dropout_reaches_far_frames_and_keeps_the_nearest(stories):
    generator = torch.Generator().manual_seed(2)
    clip = distill.sample_clips(stories, 16, generator, start=75)
    mask = distill.clip_mask(clip, generator, 1.0)
    noisy = mask[:, 15:]
    assert noisy[:, :, 3:9].any()  # frames from further back
    assert (noisy[:, :, : 9 + 15].sum(2) == 9).all()  # as many as an ordinary block reads: 3 + 6
    counts = noisy[:, 0, 9 + 4].float().mean()  # second nearest frame of the first block: a coin decides, or the draw
    assert 0.3 < counts < 1.0


def test_teacher_forcing_equals_block_by_block(stories):
    backbone, generator = tiny_backbone(), torch.Generator().manual_seed(4)
    clip = distill.sample_clips(stories, 3, generator)
    mask = distill.clip_mask(clip, generator, 0.5)
    x, sigma = torch.randn(clip.noisy.shape, generator=generator), torch.full((3, 12), 0.5)
    with torch.no_grad():
        at_once = distill.teacher_forcing(backbone, clip, x, sigma, mask)
        kv = distill.far_kv(backbone, clip)
        for i in range(5):
            rows, written = slice(3 * i, 3 * i + 3), []
            backbone(clip.clean[:, rows], torch.zeros(3), clip.clean_frames[:, rows].clamp(min=0), clip.text, kv,
                     mask[:, rows, : 9 + 3 * i + 3], written)  # fmt: skip
            kv = torch.cat([kv, torch.stack(written)], 3)
        for j in range(4):
            rows, seen = slice(15 + 3 * j, 18 + 3 * j), 9 + 6 + 3 * j
            may_read = torch.cat([mask[:, rows, :seen], mask.new_ones(3, 3, 3)], 2)
            block = slice(3 * j, 3 * j + 3)
            one = backbone(
                x[:, block], sigma[:, block], clip.noisy_frames[:, block], clip.text, kv[:, :, :, : seen * 16], may_read
            )
            torch.testing.assert_close(one, at_once[:, block], atol=1e-5, rtol=0)


def test_rollout_carries_gradient_at_one_step_and_reads_its_own_past(stories):
    backbone, generator = tiny_backbone(), torch.Generator().manual_seed(5)
    clip = distill.sample_clips(stories, 2, generator, start=21)
    mask = distill.clip_mask(clip, generator, 0.0)
    live, final = distill.student_rollout(backbone, clip, mask, generator)
    assert live.requires_grad and not final.requires_grad and live.shape == final.shape == clip.noisy.shape
    other = distill.replace(clip, clean=torch.cat([clip.clean[:, :6], torch.randn_like(clip.clean[:, 6:])], 1))
    generator.manual_seed(5), distill.sample_clips(stories, 2, generator, start=21)
    distill.clip_mask(clip, generator, 0.0)
    again = distill.student_rollout(backbone, other, mask, generator)[1]
    assert torch.equal(final, again)  # clean frames after the start are the student's own, not the clip's


def test_dmd_gradient_pulls_from_fake_to_real(stories):
    teacher, fake = tiny_backbone(1), tiny_backbone(2)
    clip = distill.sample_clips(stories, 2, torch.Generator().manual_seed(6))
    mask = distill.clip_mask(clip, torch.Generator().manual_seed(6), 0.0)
    x0 = clip.noisy.clone().requires_grad_()
    scores = [lambda x, s, m=m: distill.teacher_forcing(m, clip, x, s, mask) for m in (teacher, fake)]
    distill.dmd_loss(x0, *scores, torch.Generator().manual_seed(7)).backward()
    generator = torch.Generator().manual_seed(7)
    level = distill.shifted(0.02 + 0.96 * torch.rand(2, 4, generator=generator)).repeat_interleave(3, 1)
    s = level[:, :, None, None, None]
    with torch.no_grad():
        x = (1 - s) * clip.noisy + s * torch.randn(clip.noisy.shape, generator=generator)
        real = x - s * distill.teacher_forcing(teacher, clip, x, level, mask)
        other = x - s * distill.teacher_forcing(fake, clip, x, level, mask)
    assert torch.nn.functional.cosine_similarity(-x0.grad.flatten(), (real - other).flatten(), dim=0) > 0.9
    same = clip.noisy.clone().requires_grad_()
    distill.dmd_loss(same, scores[0], scores[0], torch.Generator().manual_seed(7)).backward()
    assert same.grad.abs().max() < 1e-6  # equal scores: nothing to do


def test_a_block_at_a_switch_is_the_first_noisy_block_of_a_clip_there(stories):
    """Encoding block by block against teacher forcing's one masked forward, and the right frames and words."""
    backbone, n = tiny_backbone(), 3
    past, x0, sink_text, text, start = distill.switch_blocks(stories, n, torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    several = (stories.segments > 1).nonzero()[:, 0]
    story = several[torch.randint(len(several), (n,), generator=draws)]
    segment = torch.full((n,), world.SWITCHES.index(start) + 1)
    clip = distill.clip_at(stories, story, segment, torch.full((n,), start), torch.Generator().manual_seed(2))
    assert torch.equal(x0, clip.noisy[:, :3]) and torch.equal(text, clip.text)
    assert torch.equal(past[:, 3:], clip.clean[:, :6]) and torch.equal(past[:, :3], clip.far[:, :3])

    sigma, noisy = torch.full((n, 12), 0.7), torch.randn(clip.noisy.shape, generator=draws)
    with torch.no_grad():
        mask = distill.clip_mask(clip, torch.Generator(), 0.0)
        at_once = distill.teacher_forcing(backbone, clip, noisy, sigma, mask)[:, :3]
        kv = distill.encode_past(backbone, past, sink_text, text, start)
        alone = backbone.velocity(noisy[:, :3], sigma[:, 0], start, text, kv)
        wrong = backbone.velocity(noisy[:, :3], sigma[:, 0], start, sink_text, kv)
    assert (at_once - alone).abs().max() < 1e-5 < (at_once - wrong).abs().max()


def test_a_turned_block_goes_where_its_words_say_whatever_its_past_did():
    """Places are read back from a table whose rows hold their own numbers; the words by their embedding."""
    table = torch.arange(98304.0)[:, None, None, None]
    stories = distill.Stories(table, torch.zeros(1, 3), torch.zeros(1), torch.ones(1))
    named = [(c, s) for c in ("", *world.COLOURS) for s in world.SHAPES]
    verbs = [*(f"moves {d}" for d in world.DIRECTIONS), "rests"]
    texts = [" ".join(f"a {c} {s} {verb}".split()) for c, s in named for verb in verbs]
    generator, starts, disagree = torch.Generator().manual_seed(0), set(), 0
    for _ in range(12):
        past, x0, words, start = distill.turned_blocks(stories, 8, generator)
        rows = torch.cat([past, x0], 1).flatten(1).long()  # [8, T]
        place = 2 * torch.stack([rows // 32 % 32, rows % 32], 2)
        motion = world.motion_of(place)  # [8, T]
        found = [texts[int((world.embed(texts) - w).square().sum((1, 2)).argmin())] for w in words]
        told = torch.tensor([world.expected(text, 1)["motion"][0] for text in found])
        shape = torch.tensor([world.expected(text, 1)["shape"][0] for text in found])
        colour = torch.tensor([world.expected(text, 1)["colour"][0] for text in found])
        assert torch.equal(motion[:, start + 1 :], told[:, None].expand(-1, 2))
        assert torch.equal(rows // (2 * 6 * 2 * 32 * 32), shape[:, None].expand_as(rows))
        seen = rows // (2 * 32 * 32) % 6
        assert ((seen == colour[:, None]) | (colour == world.OPEN)[:, None]).all()
        starts.add(start)
        disagree += (motion[:, 0] != told).sum().item()
    assert starts == {3, 6, 9} and 48 < disagree < 96  # four in five of 96


def test_guidance_of_one_is_none_and_two_doubles_what_the_words_add():
    text = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def velocity(text):
        return 1 + text.sum((1, 2))

    assert torch.allclose(distill.guided(velocity, text, 1.0), velocity(text))
    assert torch.allclose(distill.guided(velocity, text, 2.0) - 1, 2 * (velocity(text) - 1))


def test_a_share_of_the_texts_is_emptied_whole():
    text = distill.without_words(torch.ones(2000, 3, 4), 0.1, torch.Generator().manual_seed(0))
    empty = (text == 0).all((1, 2))
    assert 0.07 < empty.float().mean() < 0.13 and bool((text[~empty] == 1).all())
    assert torch.equal(distill.without_words(text, 0.0, torch.Generator()), text)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muon_takes_the_steps_of_torchs_own(shape, monkeypatch):
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)  # torch's iterations, but in float32 like ours
    exec(source.replace(".bfloat16()", ".float()"), vars(_muon).copy() | {}, scope := {})
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])
    generator = torch.Generator().manual_seed(0)
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


def test_a_stage_resumes_bit_for_bit(tmp_path):
    def run(folder, total, every=2):
        torch.manual_seed(0)
        model, generator = torch.nn.Linear(3, 3), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)

        def step(i):
            loss = model(torch.randn(4, 3, generator=generator)).square().mean() + 0 * torch.rand(())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        distill.loop(folder, total, {"model": model}, {"optimizer": optimizer}, generator, step, every)
        return copy.deepcopy(model.state_dict())

    run(tmp_path / "a", 4)
    resumed, straight = run(tmp_path / "a", 8), run(tmp_path / "b", 8)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert not torch.equal(resumed["weight"], run(tmp_path / "c", 4)["weight"])


def test_all_stages_run_and_leave_a_model_that_loads(tmp_path):
    config = distill.DistillConfig(
        output_dir=str(tmp_path), autoencoder_steps=2, teacher_steps=2, student_steps=5, teacher_batch=1,
        student_batch=1, student_first_blocks=2, first_blocks=2, switch_blocks=2, turned_blocks=2, stories=5,
    )  # fmt: skip
    latents = torch.zeros(98304, *distill.LATENT, dtype=torch.float16)
    from safetensors.torch import save_file

    save_file({"latents": latents}, tmp_path / "latents.safetensors")  # spares the test 98304 encodings
    weights = distill.distill(config)
    from kvpo_min.pocket import load_pocket

    for name in ("student", "teacher"):
        pipeline = load_pocket(name, weights)
        assert pipeline.decode(torch.zeros(1, 2, *distill.LATENT)).shape == (1, 2, 3, 64, 64)
    moved = [
        (a - b).abs().max()
        for a, b in zip(
            load_pocket("student", weights).backbone.parameters(),
            load_pocket("teacher", weights).backbone.parameters(),
            strict=True,
        )
    ]
    assert max(moved) > 0  # the student was trained
