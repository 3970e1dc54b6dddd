"""The model that ships: its files, that it shows sprites, and the invariants of the method on it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvpo_min import chr as routing
from kvpo_min.pocket import WEIGHTS, load_pocket, pocket_rewards, world
from kvpo_min.rollout import Sampler, draw_noise, fork, replay
from kvpo_min.train import TrainConfig, add_policies, evaluate, sample, train
from kvpo_min.tve import step_energies


@pytest.fixture(scope="module")
def pipeline():
    return load_pocket()


def test_the_weights_are_small_safetensors_in_diffusers_layout():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(path.stat().st_size for path in files) < 10_000_000
    classes = {"autoencoder": "AutoencoderTiny", "teacher": "WanTransformer3DModel", "student": "WanTransformer3DModel"}
    for part, name in classes.items():
        assert json.loads((WEIGHTS / part / "config.json").read_text())["_class_name"] == name
        with safe_open(WEIGHTS / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_the_autoencoder_keeps_what_the_judge_reads(pipeline):
    states = torch.stack([world.simulate(s, 6, torch.Generator().manual_seed(k)) for k, s in enumerate(SCRIPTS)])
    clean = world.render(states)
    from diffusers import AutoencoderTiny

    from kvpo_min.pocket.distill import to_latent

    autoencoder = AutoencoderTiny.from_pretrained(WEIGHTS / "autoencoder").float()
    latents = to_latent(autoencoder, clean.flatten(0, 1)).unflatten(0, clean.shape[:2])
    reading, again = world.judge(clean), world.judge(pipeline.decode(latents))
    for name in ("colour", "shape", "motion"):
        assert torch.equal(getattr(reading, name), getattr(again, name))
    assert again.distance.max() < 0.35


SCRIPTS = ["a red disc moves left", "a blue square moves up", "a green triangle rests", "a purple cross moves right"]


def test_the_same_seed_gives_the_same_video_and_no_other_seed_does(pipeline):
    one, same = (next(sample(pipeline, SCRIPTS[:2], 6, seed=5)) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, next(sample(pipeline, SCRIPTS[:2], 6, seed=6)))


def test_the_student_shows_sprites_and_follows_words(pipeline):
    scripts = world.prompt_set(24, 1, seed=5)
    judged = evaluate(pipeline, scripts, pocket_rewards(), 21)["judge"]
    recorded = json.loads((Path(__file__).parents[1] / "docs" / "distillation.json").read_text())
    promised = recorded["short: student, 4 steps"]["judge"]
    for name in ("valid", "colour", "shape", "motion"):  # 24 prompts against 256: three standard errors and more
        assert judged[name] > promised[name] - 0.25, (name, judged[name], promised[name])


def test_invariants_on_the_real_model(pipeline):
    window, sigmas = routing.Window(), pipeline.sigmas
    sampler = Sampler(sigmas, window)
    plan = routing.plan(39, window, 1, 5, 3, torch.Generator().manual_seed(0))
    noise = draw_noise(13, 4, (3, *pipeline.latent_shape), torch.Generator().manual_seed(1))
    texts = [pipeline.embed(["a disc changes colour"])]
    with torch.no_grad():
        made = fork(pipeline.backbone, texts, noise, plan, 39, 39, sampler, nearest=1)
        v = replay(pipeline.backbone, made, sampler, branches=4)
    energies = step_energies(v, made.trajectory.velocity).sum((1, 2))
    assert energies[-1] < 1e-8  # the anchor under its own context
    assert (energies[:-1] > 1e-5).all()
    assert torch.equal(made.videos[:-1, : plan.fork], made.videos[-1:, : plan.fork].expand(3, -1, -1, -1, -1))


def test_one_update_on_the_real_model_moves_towards_better_branches():
    pipeline = load_pocket()
    config = TrainConfig(max_train_steps=1, num_generations=4, tau_groups=1, unsafe_scale=1.0, kl_coef=0.0)
    policies = add_policies(pipeline, config)
    (step,) = train(pipeline, ["a disc changes colour"], pocket_rewards(), config, policies)
    (group,) = step.groups
    assert torch.equal(group.ratio, torch.ones(4))
    sampler = Sampler(pipeline.sigmas)
    with torch.no_grad():
        v = replay(pipeline.backbone, group.rollout, sampler)
    after = torch.log_softmax(-step_energies(v, group.rollout.trajectory.velocity[:4]).sum((1, 2)) / step.tau, 0)
    assert (group.advantages * (after - group.log_p)).sum() > 0
