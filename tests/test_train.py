"""The loop on a tiny random model: closed forms, naive recomputation of what a step reports, and bitwise repeats."""

import dataclasses
import importlib
import io
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import chr as routing
from kvpo_min import kvpo, system
from kvpo_min.config import under
from kvpo_min.pocket import pocket_rewards
from kvpo_min.rewards import Mixture, RewardError
from kvpo_min.rollout import Sampler, Stream, draw_noise, generate, replay
from kvpo_min.train import (
    TrainConfig,
    acting,
    adapter_weights,
    add_policies,
    checkpoints,
    copy_adapter,
    evaluate,
    find_checkpoint,
    make_plan,
    sample,
    score,
    train,
)
from kvpo_min.tve import schedule, step_energies

training = importlib.import_module("kvpo_min.train")  # the module, whatever the package calls `train`
pytestmark = pytest.mark.usefixtures("one_thread")

SIGMAS = schedule()
SCRIPTS = ["a red disc moves left", "a cross changes colour", "a blue square rests"]
LONG_SCRIPTS = ["a red disc moves left | it rests", "a cross | it moves up and changes colour"]


def red(videos, prompts):
    return videos[:, :, 0].mean((1, 2, 3))


def contrast(videos, prompts):
    return videos.std((1, 2, 3, 4))


def ranked(videos, prompts):
    """The first branch is best, the anchor, last in the batch, is worst."""
    return torch.arange(len(videos), 0, -1.0)


def anchor_best(videos, prompts):
    return torch.arange(len(videos)).float()


def constant(videos, prompts):
    return torch.full((len(videos),), 0.25)


def only(reward):
    return Mixture({"it": reward}, {"it": 1.0})


TWO = Mixture({"red": red, "contrast": contrast}, {"red": 1.0, "contrast": 2.0})


class Run:
    """A training run on a fresh tiny pipeline; `run.steps` after `run.go()`, or one at a time with `next(run)`."""

    def __init__(self, pipeline, rewards=TWO, scripts=SCRIPTS, **changes):
        small = dict(num_generations=3, tau=1e-3, rank=4, learning_rate=5e-3, lr_warmup_steps=0, unsafe_scale=1.0)
        small |= dict(nearest=1, kl_coef=2.0)
        self.config = TrainConfig(**small | {"max_train_steps": 2} | changes)
        self.pipeline, self.scripts, self.rewards = pipeline, scripts, rewards
        self.policies = add_policies(pipeline, self.config)
        self.updates = train(pipeline, scripts, rewards, self.config, self.policies)
        self.steps = []

    def __next__(self):
        self.steps.append(next(self.updates))
        return self.steps[-1]

    def go(self):
        self.steps += list(self.updates)
        return self

    def weights(self, name="default"):
        return {key: weight.detach().clone() for key, weight in adapter_weights(self.policies, name).items()}

    def log_p(self, group, policy, grad_steps=0):
        """log pi of a recorded group under one of the policies as it is now, by the paper's formula."""
        switches = self.pipeline.switches[: self.config.num_segments - 1]
        with acting(self.policies, policy):
            v = replay(self.pipeline.backbone, group.rollout, Sampler(SIGMAS, switches=switches), grad_steps)
        made = group.rollout.trajectory
        v_made = (made.z - made.x0)[: len(v)] / SIGMAS[:, None, None, None, None]
        energy = (v - v_made).square().flatten(3).mean(3).sum((1, 2))
        return torch.log_softmax(-energy / self.steps[0].tau, 0)


def bitwise(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def numbers(steps):
    """Everything a run reports, but its time."""
    return [{k: v for k, v in step.log().items() if k != "step_time"} for step in steps]


# ------------------------------------------------------------------------------------------------- one ordinary run


@pytest.fixture(scope="module")
def plain(make_pipeline):
    """Three updates, tau from the first two groups, two reward components, everything else as by default."""
    run = Run(make_pipeline(), tau=0.0, tau_groups=2, max_train_steps=3, lr_warmup_steps=2, unsafe_scale=0.0)
    run.trail = [{name: run.weights(name) for name in ("default", "old", "ema")}]
    for _ in range(3):
        next(run)
        run.trail.append({name: run.weights(name) for name in ("default", "old", "ema")})
    return run


def test_the_ratio_is_1_at_equal_weights(plain):
    for step in plain.steps:
        assert len(step.groups) == 1
        for group in step.groups:
            assert torch.equal(group.ratio, torch.ones(3))
            assert torch.equal(group.log_p, group.log_p_old)
    assert torch.equal(plain.steps[0].groups[0].log_p, plain.steps[0].groups[0].log_p_init)
    assert plain.steps[0].groups[0].kl == 0


def test_tau_is_set_once_and_frozen(plain, make_pipeline, monkeypatch):
    assert len({step.tau for step in plain.steps}) == 1 and plain.steps[0].tau > 0
    seen, calibrate = [], training.calibrate_tau
    monkeypatch.setattr(training, "calibrate_tau", lambda E, target: seen.append((E, target)) or calibrate(E, target))
    again = Run(make_pipeline(), tau=0.0, tau_groups=2, max_train_steps=1, lr_warmup_steps=2, unsafe_scale=0.0)
    next(again)
    ((energies, target),) = seen
    assert energies.shape == (2, 3) and target == 0.4
    spread = (energies - energies.mean(1, keepdim=True)).square().mean(1).sqrt().mean()
    assert_close(plain.steps[0].tau, spread.item() / 0.4, rtol=1e-5, atol=0)
    assert numbers(again.steps) == numbers(plain.steps[:1])


def test_a_given_tau_is_used_as_it_is(make_pipeline, monkeypatch):
    monkeypatch.setattr(training, "calibrate_tau", None)  # not called
    assert next(Run(make_pipeline(), tau=0.125)).tau == 0.125


def test_what_a_group_reports_is_what_happened(plain):
    """Rewards from its own videos, energies and log pi from the paper's formula, plan and shapes."""
    group, config = plain.steps[0].groups[0], plain.config
    assert group.script in SCRIPTS and group.plan.fork in (21, 24) and group.plan.perturb_num_blocks == 5
    assert group.videos.shape == (4, 18, 3, 64, 64) and group.rollout.videos.shape == (4, 39, 8, 4, 4)
    assert_close(group.videos, plain.pipeline.decode(group.rollout.videos[:, 21:39]))
    for name, reward in plain.rewards.rewards.items():
        everyone = reward(group.videos, [])
        assert torch.equal(group.rewards[name], everyone[:3]) and torch.equal(group.anchor[name], everyone[3])
    assert group.after is None
    blocks = (39 - group.plan.fork) // 3
    assert group.energies.shape == (3, blocks, 4) and group.energies.min() > 0
    assert_close(group.log_p_init, plain.log_p(group, "initial"), atol=1e-4, rtol=0)
    assert_close(group.log_p, group.log_p_init)
    expected = torch.log_softmax(-group.energies.sum((1, 2)) / plain.steps[0].tau, 0)
    assert_close(group.log_p, expected, atol=1e-5, rtol=0)
    assert_close(group.entropy, -(expected.exp() * expected).sum().item(), atol=1e-5, rtol=0)
    total = group.rewards["red"] + 2 * group.rewards["contrast"]
    assert group.safe == bool((total > group.anchor["red"] + 2 * group.anchor["contrast"]).any())
    # advantages: relative to the anchor, standardised with it in the group, weighted, scaled, clamped
    A = 0
    for name, weight in plain.rewards.weights.items():
        std = torch.cat([group.rewards[name], group.anchor[name][None]]).std()
        A = A + weight * (group.rewards[name] - group.anchor[name]) / std
    assert_close(group.advantages, (A / A.std(correction=0)).clamp(-config.adv_clip_max, config.adv_clip_max))


def test_learning_rate_warms_up(plain):
    assert [step.learning_rate for step in plain.steps] == [2.5e-3, 5e-3, 5e-3]
    assert [step.step for step in plain.steps] == [0, 1, 2]


def test_old_is_the_policy_before_the_update_and_ema_lags_behind(plain):
    moved = 0
    for before, after, step in zip(plain.trail[:-1], plain.trail[1:], plain.steps, strict=True):
        assert bitwise(after["old"], before["default"])  # refreshed at the start of every update
        if step.grad_norm == 0:
            assert bitwise(after["default"], before["default"]) and bitwise(after["ema"], before["ema"])
            continue
        moved += 1
        for key, ema in after["ema"].items():
            assert_close(ema, 0.95 * before["ema"][key] + 0.05 * after["default"][key], atol=1e-8, rtol=1e-5)
        assert not bitwise(after["default"], before["default"])
    assert moved >= 1


def test_the_initial_policy_stays_what_it_was(plain, make_backbone):
    base = make_backbone()
    noise = draw_noise(4, 4, (3, 8, 4, 4), torch.Generator().manual_seed(0))
    text = plain.pipeline.embed(["a disc"])

    def video(backbone):
        return generate(backbone, Stream(), [text], noise, 12, Sampler(SIGMAS)).latents

    want = video(base)
    with acting(plain.policies, "initial"):
        assert torch.equal(video(plain.pipeline.backbone), want)
    assert not torch.equal(video(plain.pipeline.backbone), want)
    trained = dict(plain.pipeline.backbone.transformer.named_parameters())
    for key, weight in base.transformer.named_parameters():
        stem, _, leaf = key.rpartition(".")
        same = trained[key] if key in trained else trained[f"{stem}.base_layer.{leaf}"]
        assert torch.equal(same, weight), key


def test_acting_returns_to_the_trained_policy(plain):
    default = adapter_weights(plain.policies, "default")
    for name in ("old", "ema", "initial", "default"):
        with pytest.raises(RuntimeError, match="stop"), acting(plain.policies, name):
            raise RuntimeError("stop")
        assert plain.policies.active_adapter == "default"
        assert all(weight.requires_grad for weight in default.values())
    for name in ("old", "ema"):
        assert not any(weight.requires_grad for weight in adapter_weights(plain.policies, name).values())


def test_layers_of_other_names_are_refused_by_name(make_pipeline):
    pipeline = make_pipeline()
    stranger = torch.nn.ModuleDict({"query": torch.nn.Linear(2, 2)})
    pipeline.backbone.transformer = stranger
    with pytest.raises(ValueError, match="'to_q', .*diffusers"):
        add_policies(pipeline, TrainConfig(rank=2))


def test_copy_adapter(make_pipeline):
    before = torch.get_rng_state()
    policies = add_policies(make_pipeline(), TrainConfig(rank=2))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own random numbers go on
    with torch.no_grad():
        for k, name in enumerate(("default", "old", "ema")):
            for weight in adapter_weights(policies, name).values():
                weight.fill_(float(k + 1))
    copy_adapter(policies, "default", "ema", 0.25)
    copy_adapter(policies, "default", "old")
    adapters = {name: adapter_weights(policies, name) for name in ("default", "old", "ema")}
    values = {name: {w.mean().item() for w in adapter.values()} for name, adapter in adapters.items()}
    assert values == {"default": {1.0}, "old": {1.0}, "ema": {2.5}}
    keys = set(adapters["default"])
    assert keys == set(adapters["old"]) == set(adapters["ema"])
    assert len(keys) == 2 * 2 * 8  # A and B of 8 layers in 2 blocks


LOG_KEYS = {
    "prefix_drift",
    "step", "reward", "reward_std", "anchor_reward", "frac_reward_zero_std", "energy/mean", "energy/std",
    "ratio/max_dev_first", "safe", "advantage/abs_mean", "tau", "grad_norm", "learning_rate", "step_time", "loss", "kl",
    "entropy", "clip_ratio/region_mean", "rewards/red/mean", "rewards/contrast/mean",
}  # fmt: skip


def test_the_log_line(plain):
    for step in plain.steps:
        line, group = step.log(), step.groups[0]
        assert line.keys() == LOG_KEYS
        assert all(math.isfinite(value) for value in line.values())
        assert json.loads(json.dumps(line)) == line
        total = group.rewards["red"] + 2 * group.rewards["contrast"]
        assert_close(line["reward"], total.mean().item())
        assert_close(line["reward_std"], total.std().item())
        assert_close(line["anchor_reward"], (group.anchor["red"] + 2 * group.anchor["contrast"]).item())
        assert_close(line["energy/mean"], group.energies.sum((1, 2)).mean().item())
        assert line["ratio/max_dev_first"] == 0 and line["frac_reward_zero_std"] == 0


def test_the_same_seed_gives_the_same_numbers(plain, make_pipeline):
    again = Run(make_pipeline(), tau=0.0, tau_groups=2, max_train_steps=3, lr_warmup_steps=2, unsafe_scale=0.0).go()
    assert numbers(again.steps) == numbers(plain.steps)
    for name in ("default", "old", "ema"):
        assert bitwise(again.weights(name), plain.trail[-1][name])
    assert torch.equal(again.steps[2].groups[0].videos, plain.steps[2].groups[0].videos)


def test_another_seed_gives_others(plain, make_pipeline):
    other = Run(make_pipeline(), seed=1, tau=plain.steps[0].tau, max_train_steps=1, lr_warmup_steps=2)
    next(other)
    assert (other.steps[0].groups[0].rollout.videos - plain.steps[0].groups[0].rollout.videos).abs().max() > 0.1
    assert not bitwise(other.weights("old"), plain.trail[0]["default"])


def test_every_script_comes_once_before_any_comes_again(make_pipeline):
    run = Run(make_pipeline(), only(ranked), groups_per_update=3, num_generations=2).go()
    for step in run.steps:
        assert sorted(group.script for group in step.groups) == sorted(SCRIPTS)


# -------------------------------------------------------------------------------------------------------- the update


def test_an_update_moves_pi_towards_the_good_branches(make_pipeline):
    run = Run(make_pipeline(), only(ranked), grad_steps=4, kl_coef=1e-6, learning_rate=2e-4)
    before = run.weights()
    group = next(run).groups[0]
    assert not bitwise(run.weights(), before)
    A, after = group.advantages, run.log_p(group, "default")
    assert A[0] > A[1] > A[2] > 0  # as `ranked` says
    assert (A * (after - group.log_p)).sum() > 1e-3
    assert_close(run.log_p(group, "old"), group.log_p, atol=1e-4, rtol=0)


def test_the_gradient_is_the_mean_over_groups_of_the_closed_form(make_pipeline, monkeypatch):
    """At ratio 1: dL/dE_g = (A_g - p_g * sum(A)) / (G * tau), plus the KL's part, times the rule for unsafe groups."""
    captured, clip = {}, torch.nn.utils.clip_grad_norm_

    def spy(weights, limit):
        weights = list(weights)
        captured.update(gradient=[weight.grad.clone() for weight in weights], limit=limit)
        return clip(weights, limit)

    run = Run(make_pipeline(), groups_per_update=2, unsafe_scale=0.5, max_grad_norm=0.7, grad_steps=2, kl_coef=1.0)
    weights = list(adapter_weights(run.policies, "default").values())
    with torch.no_grad():  # zero B would hide half of the gradient; all three policies alike, so that the ratio stays 1
        generator = torch.Generator().manual_seed(1)
        for key, weight in adapter_weights(run.policies, "default").items():
            if "lora_B" in key:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    started = run.weights()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    step = next(run)
    monkeypatch.undo()
    with torch.no_grad():
        for key, weight in adapter_weights(run.policies, "default").items():
            weight.copy_(started[key])
    want = [torch.zeros_like(w) for w in weights]
    for group in step.groups:
        log_p = run.log_p(group, "default", grad_steps=2)
        assert_close(log_p.detach(), group.log_p, atol=1e-4, rtol=0)
        A, p, n = group.advantages, log_p.exp().detach(), 3
        # policy part by the closed form; KL to the initial policy: d KL / d log_p = p (log_p - log_p_init + 1)
        energy = -log_p * step.tau  # up to a constant, which the contrast does not see
        surrogate = (energy * (A - p * A.sum()) / (n * step.tau)).sum()
        surrogate = surrogate + (log_p * p * (log_p.detach() - group.log_p_init + 1)).sum()
        scale = 1.0 if group.safe else 0.5
        for total, part in zip(want, torch.autograd.grad(scale * surrogate / 2, weights), strict=True):
            total += part
    norm = torch.cat([g.flatten() for g in want]).norm()
    assert_close(step.grad_norm, norm.item(), rtol=1e-3, atol=0)
    assert captured["limit"] == 0.7
    for got, expected in zip(captured["gradient"], want, strict=True):
        assert_close(got, expected, atol=1e-3 * norm.item(), rtol=1e-3)
    assert max(group.kl for group in step.groups) > 1e-4  # so the KL part was there to be checked


def test_the_gradient_is_clipped(make_pipeline, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    record = next(Run(make_pipeline(), only(ranked), max_grad_norm=0.01))
    assert record.grad_norm > 0.1  # reported as it was
    assert_close(seen[0].item(), 0.01, rtol=1e-3, atol=0)


def test_the_old_policy_makes_the_rollouts_until_it_is_refreshed(make_pipeline):
    run = Run(make_pipeline(), only(ranked), old_policy_every=2, max_train_steps=3, learning_rate=2e-3)
    initial = run.weights()
    assert torch.equal(next(run).groups[0].ratio, torch.ones(3))
    after_one = run.weights()
    second = next(run)
    group = second.groups[0]
    assert bitwise(run.weights("old"), initial)
    assert (group.ratio - 1).abs().max() > 1e-3
    assert_close(group.ratio, (group.log_p - group.log_p_old).exp())
    assert_close(group.log_p_old, run.log_p(group, "old"), atol=1e-4, rtol=0)
    assert second.log()["ratio/max_dev_first"] == (group.ratio - 1).abs().max()
    # whose trajectories are they? The anchor is explained exactly by the policy that made it
    anchor_energy = {}
    for name in ("old", "default"):
        with torch.no_grad(), acting(run.policies, name):
            v = replay(run.pipeline.backbone, group.rollout, Sampler(SIGMAS), branches=4)[3]
        anchor_energy[name] = step_energies(v, group.rollout.trajectory.velocity[3]).max()
    assert anchor_energy["old"] < 1e-10 < 1e-8 < anchor_energy["default"]
    before_three = run.weights()
    assert not bitwise(before_three, after_one)
    assert torch.equal(next(run).groups[0].ratio, torch.ones(3))
    assert bitwise(run.weights("old"), before_three)


def test_equal_rewards_give_no_update(make_pipeline):
    run = Run(make_pipeline(), only(constant), unsafe_scale=0.0).go()
    fresh = Run(make_pipeline())
    for step in run.steps:
        assert step.grad_norm == 0 and step.groups[0].loss == 0 and not step.groups[0].safe
        assert torch.equal(step.groups[0].advantages, torch.zeros(3))
        assert step.log()["frac_reward_zero_std"] == 1
    for name in ("default", "old", "ema"):
        assert bitwise(run.weights(name), fresh.weights(name))


def test_when_no_branch_beats_the_anchor(make_pipeline, monkeypatch):
    """unsafe_scale 0: no update at all, nor a replay with graph; 0.5: half the loss and half the gradient."""
    records, replayed, plain = {}, [], kvpo.replay_energies
    monkeypatch.setattr(kvpo, "replay_energies", lambda *a: replayed.append(plain(*a)) or replayed[-1])
    for scale in (0.0, 0.5, 1.0):
        run = Run(make_pipeline(), only(anchor_best), unsafe_scale=scale)
        before = run.weights()
        replayed.clear()
        records[scale] = next(run)
        assert any(energies.requires_grad for energies in replayed) == (scale > 0)
        assert not records[scale].groups[0].safe and records[scale].log()["safe"] == 0
        assert bitwise(run.weights(), before) == (scale == 0)
    assert records[0.0].grad_norm == records[0.0].groups[0].loss == 0
    assert records[1.0].groups[0].loss > 0.5
    assert_close(records[0.0].groups[0].energies, records[1.0].groups[0].energies, rtol=1e-5, atol=1e-6)
    assert_close(records[0.5].groups[0].loss, records[1.0].groups[0].loss / 2)
    assert_close(records[0.5].grad_norm, records[1.0].grad_norm / 2, rtol=1e-5, atol=0)
    safe = next(Run(make_pipeline(), only(ranked), unsafe_scale=0.0))
    assert safe.groups[0].safe and safe.grad_norm > 0


def test_an_unsafe_update_after_a_safe_one_does_not_coast_on_momentum(make_pipeline):
    turn = []

    def first_only(videos, prompts):
        turn.append(len(videos))
        return ranked(videos, prompts) if len(turn) == 1 else anchor_best(videos, prompts)

    run = Run(make_pipeline(), only(first_only), unsafe_scale=0.0)
    before = run.weights()
    assert next(run).grad_norm > 0
    after = run.weights()
    assert not bitwise(after, before)
    assert next(run).grad_norm == 0
    assert bitwise(run.weights(), after)


def test_rewards_of_a_wrong_shape_stop_the_run_at_once(make_pipeline):
    """They are no accident; numbers that are not finite are skipped first (test_resume.py)."""
    with pytest.raises(ValueError, match="'it'.*4 finite numbers"):
        next(Run(make_pipeline(), only(lambda videos, prompts: torch.ones(1))))


def test_batch_limits_change_no_number(make_pipeline):
    whole = next(Run(make_pipeline()))
    split = next(Run(make_pipeline(), branch_batch=1, replay_batch=7))
    assert_close(split.groups[0].rollout.videos, whole.groups[0].rollout.videos, atol=1e-5, rtol=0)
    assert_close(split.groups[0].log_p, whole.groups[0].log_p, atol=1e-3, rtol=0)
    assert_close(split.grad_norm, whole.grad_norm, rtol=1e-2, atol=0)


def gradients_in_float64(make_pipeline, monkeypatch, **changes):
    """The gradient of a first update whose network runs in float64; -> (list of gradients, its only group)."""
    pipeline, seen = make_pipeline(), []

    class Wide(type(pipeline.backbone)):
        def forward(self, x, sigma, frames, text, *more, **named):
            return super().forward(x.double(), sigma, frames, text.double(), *more, **named)

    pipeline.backbone.__class__ = Wide
    pipeline = replace(pipeline, decode=lambda latents, plain=pipeline.decode: plain(latents.float()))
    settings = dict(tau=0.1, unsafe_scale=1.0, grad_steps=2, kl_coef=1.0, max_train_steps=1)
    run = Run(pipeline, **settings | changes)
    run.policies.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # zero B would hide half of the gradient
        for key, weight in adapter_weights(run.policies, "default").items():
            if "lora_B" in key:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_",
        lambda weights, limit: [seen.append(w.grad.clone()) for w in weights] and torch.tensor(1.0),
    )  # fmt: skip
    step = next(run)
    monkeypatch.undo()
    return seen, step.groups[0]


@pytest.mark.parametrize("context", ["", "official"])
def test_the_gradient_piece_by_piece_is_the_gradient(context, make_pipeline, monkeypatch):
    """Any `replay_batch` against one graph over the whole update, to 1e-6 of the gradient's norm."""
    whole, group = gradients_in_float64(make_pipeline, monkeypatch, compat=context)
    norm = torch.cat([g.flatten() for g in whole]).norm()
    assert norm > 1e-6 and all(g.dtype == torch.float64 for g in whole)
    largest = {}
    for batch in (1, 2, 3, 5, 100):
        parts, same = gradients_in_float64(make_pipeline, monkeypatch, compat=context, replay_batch=batch)
        assert_close(same.energies, group.energies, rtol=1e-6, atol=0)
        apart = [(a - b).flatten() for a, b in zip(parts, whole, strict=True)]
        largest[batch] = (torch.cat(apart).norm() / norm).item()
    assert max(largest.values()) < 1e-6, largest


@pytest.mark.parametrize("prefix_coef", [0.0, 3.0])
def test_no_more_forwards_at_once_than_replay_batch(make_pipeline, monkeypatch, prefix_coef):
    """In the replays, those with gradient too; and every piece is sent backward before the next one is made."""
    pipeline, sizes, alive = make_pipeline(), [], []
    plain = pipeline.backbone.velocity

    def watched(x, sigma, start, text, kv, *mask):
        out = plain(x, sigma, start, text, kv, *mask)
        sizes.append(len(x))
        if out.requires_grad:
            alive[:] = [ref for ref in alive if ref() is not None]
            assert not alive, "a graph of an earlier piece is still there"
            alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(pipeline.backbone, "velocity", watched)
    next(Run(pipeline, replay_batch=2, branch_batch=1, prefix_coef=prefix_coef))
    assert max(sizes) == 2 and alive


# --------------------------------------------------------------------------------------------- rewards that fail


def failing(*calls):
    """A reward that fails in these calls (counted from 0)."""
    count = iter(range(1000))

    def reward(videos, prompts):
        if next(count) in calls:
            raise RewardError("reward worker `judge` died (exit code 3)")
        return ranked(videos, prompts)

    return only(reward)


def test_an_update_whose_rewards_fail_is_skipped(make_pipeline):
    """Nothing moves, the record says why, and the next updates are those of a run whose scorer never failed there."""
    run = Run(make_pipeline(), failing(1), max_train_steps=3)
    next(run)
    before = {name: run.weights(name) for name in ("default", "ema")}
    step = next(run)
    assert step.groups == [] and step.skipped == "reward worker `judge` died (exit code 3)" and step.grad_norm == 0
    assert all(bitwise(run.weights(name), before[name]) for name in before)
    line = step.log()
    assert json.loads(json.dumps(line)) == line and line["skipped"] == 1 and "reward" not in line
    assert line.keys() < LOG_KEYS | {"skipped"} and all(math.isfinite(value) for value in line.values())
    third = next(run)
    assert third.step == 2 and third.skipped == "" and third.log().keys() > {"reward"}
    whole = Run(make_pipeline(), failing(), max_train_steps=3).go()
    assert third.groups[0].script == whole.steps[2].groups[0].script
    assert torch.equal(third.groups[0].plan.routes, whole.steps[2].groups[0].plan.routes)


def test_half_an_update_is_no_update(make_pipeline):
    """The first script's gradient is dropped with the second script's rewards."""
    run = Run(make_pipeline(), failing(1), groups_per_update=2, max_train_steps=2)
    before = run.weights()
    assert next(run).skipped and bitwise(run.weights(), before)
    alone = next(run)
    assert not alone.skipped and alone.grad_norm > 0


def test_rewards_that_keep_failing_stop_the_run_after_a_checkpoint(make_pipeline, tmp_path):
    settings = dict(output_dir=str(tmp_path), max_train_steps=9, checkpointing_steps=50)
    run = Run(make_pipeline(), failing(1, 3, 4, 5), **settings)
    with pytest.raises(RewardError, match="3 updates in a row.*`judge` died"):
        while True:
            next(run)
    assert [bool(step.skipped) for step in run.steps] == [False, True, False, True, True, True]
    assert checkpoints(tmp_path) == [6]
    again = Run(make_pipeline(), failing(), **settings | {"resume_from_checkpoint": "latest", "max_train_steps": 7})
    assert next(again).step == 6
    Run(make_pipeline(), failing(0), max_train_steps=1).go()  # without checkpoints there is none to write


def test_what_was_trained_is_not_overwritten_by_new_adapters(make_pipeline):
    run = Run(make_pipeline()).go()
    before = run.weights()
    with pytest.raises(ValueError, match="adapters already"):
        next(train(run.pipeline, run.scripts, run.rewards, run.config))
    assert bitwise(run.weights(), before)


def test_segments_that_would_never_be_shown_are_refused(make_pipeline):
    two, switched = ["a red disc | a blue disc"], dict(num_segments=2, max_train_steps=1)
    for switches, num_frames in (((39,), 39), ((), 57)):
        pipeline = replace(make_pipeline(), switches=switches, segments=lambda script: script.split(" | "))
        run = Run(pipeline, scripts=two, num_frames=num_frames, **switched)
        with pytest.raises(
            ValueError, match=f"num_frames is {num_frames} and segments begin at .*not all of 2 segments"
        ):
            next(run)


# --------------------------------------------------------------------------------------------- several processes

TORCHRUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_pipeline
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, adapter_weights, add_policies, join_processes, processes, train
from test_train import SCRIPTS, TWO, failing
torch.set_num_threads(1)
join_processes()
rank, world = processes()
pipeline, config = tiny_pipeline(), TrainConfig(**{settings!r})
policies = add_policies(pipeline, config)
fails = {fails!r}
rewards = (failing(*fails) if rank == 1 else failing()) if fails else TWO
if fails and rank == 0:  # a NaN in the gradient of this process alone, in its third update
    count = iter(range(100))
    weight = next(w for key, w in adapter_weights(policies, "default").items() if "lora_B" in key)
    weight.register_hook(lambda g: g * float("nan") if next(count) == 2 else None)
steps = train(pipeline, SCRIPTS, rewards, config, policies)
steps = [(step.log(), [group.script for group in step.groups], step.skipped) for step in steps]
weights = {{name: adapter_weights(policies, name) for name in ("default", "old", "ema")}}
torch.save((world, steps, weights), {out!r} + str(rank))
"""


def torchrun(tmp_path, settings, fails=()):
    """Runs TORCHRUN in two processes with gloo; -> (world, steps, weights) of each."""
    script = tmp_path / "two.py"
    script.write_text(
        TORCHRUN.format(tests=str(Path(__file__).parent), settings=settings, fails=fails, out=str(tmp_path / "out"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(tmp_path / f"out{rank}", weights_only=True) for rank in (0, 1)]


def test_two_processes_are_one_that_sees_both_scripts(make_pipeline, tmp_path):
    """Three updates, tau and the old policy's window included; only the first process writes."""
    settings = dict(
        num_generations=3, rank=4, nearest=1, kl_coef=2.0, learning_rate=5e-3, lr_warmup_steps=0, unsafe_scale=1.0,
        max_train_steps=3,
        groups_per_update=2, old_policy_every=2, tau_groups=3, checkpointing_steps=2,
    )  # fmt: skip
    whole = Run(make_pipeline(), **settings | {"tau": 0.0, "output_dir": str(tmp_path / "one")}).go()
    both = torchrun(tmp_path, settings | {"output_dir": str(tmp_path / "two")})
    for rank, (world, steps, weights) in enumerate(both):
        assert world == 2
        for name in ("default", "old", "ema"):
            for key, weight in whole.weights(name).items():
                assert_close(weights[name][key], weight, rtol=0, atol=1e-6)
        for (line, scripts, _), step in zip(steps, whole.steps, strict=True):
            assert scripts == [step.groups[rank].script]
            for key, value in numbers([step])[0].items():
                assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert whole.steps[2].grad_norm > 0 and not bitwise(whole.weights("ema"), whole.weights("old"))
    assert checkpoints(tmp_path / "two") == [2, 3]
    resumed = settings | {"resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-2"), "output_dir": ""}
    alone = Run(make_pipeline(), **resumed | {"checkpointing_steps": 0}).go()  # their checkpoint is a whole one
    for key, weight in alone.weights().items():
        assert_close(weight, whole.weights()[key], rtol=0, atol=1e-6)


def test_another_process_gives_the_same_numbers_bit_for_bit(make_pipeline, tmp_path):
    """Same seed, other hashes: breaks if anything depends on the process, a set's order or another generator."""
    settings = dict(num_generations=2, rank=2, tau_groups=1, max_train_steps=2, unsafe_scale=1.0, learning_rate=5e-3)
    here = Run(make_pipeline(), **settings | dict(lr_warmup_steps=2, nearest=2, kl_coef=1.0, tau=0.0)).go()
    script = tmp_path / "one.py"
    script.write_text(
        TORCHRUN.format(tests=str(Path(__file__).parent), settings=settings, fails=(), out=str(tmp_path / "out"))
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "12345"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    world, steps, weights = torch.load(tmp_path / "out0", weights_only=True)
    there = [{key: value for key, value in line.items() if key != "step_time"} for line, _, _ in steps]
    assert world == 1 and there == numbers(here.steps) and len(there) == 2
    assert all(bitwise(weights[name], here.weights(name)) for name in ("default", "old", "ema"))


def test_two_processes_skip_together(tmp_path):
    """The second one's scorer fails in the second update, the first one's gradient is NaN in the third: neither moves,
    and both go on."""
    settings = dict(
        num_generations=2,
        rank=2,
        nearest=1,
        kl_coef=2.0,
        tau=1e-3,
        max_train_steps=4,
        groups_per_update=2,
        unsafe_scale=1.0,
    )
    both = torchrun(tmp_path, settings, fails=(1,))
    for _, steps, _ in both:
        skipped = ["", "reward worker `judge` died (exit code 3)", "the gradient's norm is nan, not finite", ""]
        assert [skipped for _, _, skipped in steps] == skipped
    weights = [weights["default"] for _, _, weights in both]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert all(weight.isfinite().all() for weight in weights[0].values())


def test_groups_must_share_out_evenly(make_pipeline, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: (1, 2))
    with pytest.raises(ValueError, match="2 processes.*groups_per_update 3"):
        next(Run(make_pipeline(), groups_per_update=3))


# --------------------------------------------------------------------------------------------------------- long mode


def test_long_mode_scores_the_chunk_of_the_fork_and_what_follows(make_pipeline):
    """57 frames, the words switch at 39: forks in [21, 39) have a global signal, forks in [39, 57) have none."""
    calls = []

    def spied(videos, prompts):
        calls.append((videos.shape[1], set(prompts)))
        return contrast(videos, prompts)

    long = dict(num_frames=57, num_segments=2, groups_per_update=4)
    run = Run(make_pipeline(), only(spied), LONG_SCRIPTS, **long)
    step = next(run)
    forks = [group.plan.fork for group in step.groups]
    assert any(fork < 39 for fork in forks) and any(fork >= 39 for fork in forks), forks
    resolved = {
        "a red disc moves left | it rests": ["a red disc moves left", "a red disc rests"],
        "a cross | it moves up and changes colour": ["a cross rests", "a cross moves up"],
    }
    for group in step.groups:
        words, chunk = resolved[group.script], 21 if group.plan.fork < 39 else 39
        assert torch.equal(group.videos, run.pipeline.decode(group.rollout.videos[:, chunk : chunk + 18]))
        assert group.rollout.videos.shape[1] == 57
        assert group.energies.shape[1] == (chunk + 18 - group.plan.fork) // 3  # the trajectory ends with its chunk
        if chunk == 21:
            assert calls.pop(0) == (18, {words[0]})
            assert calls.pop(0) == (18, {words[1]})
            rest = contrast(run.pipeline.decode(group.rollout.videos[:, 39:]), [])
            assert_close(torch.cat([group.after[0]["it"], group.after[1]["it"][None]]), rest)
            ours = group.rewards["it"] - group.anchor["it"]
            theirs = group.after[0]["it"] - group.after[1]["it"]
            A = ours / ours.std(correction=0) + 0.5 * theirs / theirs.std(correction=0)
            assert_close(group.advantages, A.clamp(-2.5, 2.5), atol=1e-3, rtol=0)
            assert group.safe == bool((ours > 0).any() or (theirs > 0).any())
        else:
            assert calls.pop(0) == (18, {words[1]})
            assert group.after is None
        segment = int(group.plan.fork >= 39)
        assert group.rollout.prefix.segment == segment
        assert torch.equal(group.rollout.text, run.pipeline.embed([run.pipeline.segments(group.script)[segment]]))
    assert not calls
    assert all(math.isfinite(value) for value in step.log().values())


def test_global_frames_end_the_video_early(make_pipeline):
    """A video of 93 frames is made only as far as it is scored."""
    run = Run(make_pipeline(), num_frames=93, global_frames=6, max_train_steps=1)
    group = next(run).groups[0]
    chunk_end = next(end for end in (39, 57, 75, 93) if end > group.plan.fork)
    assert group.rollout.videos.shape[1] == min(93, chunk_end + 6)


def test_local_frames_end_what_is_replayed_and_scored(make_pipeline):
    """Of the chunk 21..38 the frames up to the fork's block, as if the chunk, or the film, ended there."""
    short = {"fork": 27, "perturb_num_blocks": 1, "global_frames": 0, "max_train_steps": 1}
    film, part = (next(Run(make_pipeline(), **short, **more)).groups[0]
                  for more in ({"num_frames": 30}, {"num_frames": 39, "local_frames": 3}))  # fmt: skip
    assert part.videos.shape[1] == 9 and part.rollout.videos.shape[1] == 30 and part.energies.shape[1] == 1
    for ours, theirs in ((part.videos, film.videos), (part.energies, film.energies), (part.log_p, film.log_p)):
        torch.testing.assert_close(ours, theirs)
    more = next(Run(make_pipeline(), **short | {"global_frames": 6}, num_frames=39, local_frames=3)).groups[0]
    assert more.rollout.videos.shape[1] == 36 and more.after is not None


def test_segments_are_scored_with_their_own_words(make_pipeline):
    """Lengths of clips and words as numbers, worked out by hand."""
    rewards = Mixture(
        {
            "length": lambda videos, prompts: torch.full((len(videos),), float(videos.shape[1])),
            "words": lambda videos, prompts: torch.tensor([float(len(prompt.split())) for prompt in prompts]),
        },
        {"length": 1.0, "words": 1.0},
    )
    pipeline = make_pipeline()
    scripts = ["a disc | it rests | it moves up", "a red disc moves left | it rests | it wanders"]
    # in full: "a disc rests", "a disc rests", "a disc moves up"
    # and "a red disc moves left", "a red disc rests", "a red disc"
    video = torch.zeros(2, 57, 3, 4, 4)
    out = score(pipeline, rewards, video, scripts, 21)  # frames 21..77: clips of 18, 36 and 3 frames
    assert_close(out["length"], torch.full((2,), (18 + 36 + 3) / 3))
    assert_close(out["words"], torch.tensor([(3 + 3 + 4) / 3, (5 + 4 + 3) / 3]))
    out = score(pipeline, rewards, video[:, :55], scripts, 21)  # one frame of the last segment: too short for motion
    assert_close(out["length"], torch.full((2,), (18 + 36) / 2))
    out = score(pipeline, rewards, video[:, :18], scripts, 39)  # begins on the switch
    assert_close(out["words"], torch.tensor([3.0, 4.0]))


def test_scripts_must_fit_the_mode(make_pipeline):
    with pytest.raises(ValueError, match=r"num_segments is 2.*\[1\]"):
        next(Run(make_pipeline(), num_segments=2, num_frames=57))
    with pytest.raises(ValueError, match=r"num_segments is 1.*\[1, 2\]"):
        next(Run(make_pipeline(), scripts=[*SCRIPTS, LONG_SCRIPTS[0]]))
    with pytest.raises(ValueError, match=r"same number of segments, got \[1, 2\]"):
        next(sample(make_pipeline(), [SCRIPTS[0], LONG_SCRIPTS[0]], 12))


# ------------------------------------------------------------------------------------------------------------ compat


def test_official_numbers(make_pipeline):
    run = Run(make_pipeline(), compat="official", num_frames=57, max_train_steps=1, nearest=None, tau=None)
    assert (run.config.tau, run.config.nearest, run.config.grad_steps) == (2.0, 1, 2)
    step = next(run)
    group = step.groups[0]
    index = SCRIPTS.index(group.script)
    plan = routing.plan_official(0, index, 1_000_003, 57, routing.Window(), 1, 5, 3)
    assert (plan.fork, plan.pool) == (group.plan.fork, group.plan.pool) and torch.equal(plan.routes, group.plan.routes)
    # its log score: minus half the mean squared error of x0 (sigma^2 times that of the velocity) over its own context
    with torch.no_grad(), acting(run.policies, "initial"):
        v = replay(run.pipeline.backbone, group.rollout, Sampler(SIGMAS), context="own")
    z, x0 = group.rollout.trajectory.z[:3], group.rollout.trajectory.x0[:3]
    errors = (z - SIGMAS[:, None, None, None, None] * v - x0).square().flatten(3).mean(3)
    assert_close(group.log_p, torch.log_softmax(-errors.sum((1, 2)) / 2, 0), atol=1e-6, rtol=0)
    assert step.tau == 2.0


def test_a_preset_fills_only_what_was_left_open():
    ours, theirs = TrainConfig(), TrainConfig(compat="official")
    names = ("tau", "kl_coef", "unsafe_scale", "grad_steps", "nearest")
    assert [getattr(ours, name) for name in names] == [0.0, 1.0, 0.0, 4, 2]
    assert [getattr(theirs, name) for name in names] == [2.0, 10.0, 0.5, 2, 1]
    for name in names:  # our own number, given: it stays
        assert getattr(TrainConfig(compat="official", **{name: getattr(ours, name)}), name) == getattr(ours, name)
    assert under(ours, "official") == theirs and under(theirs, "") == ours
    with pytest.raises(dataclasses.FrozenInstanceError):
        theirs.kl_coef = 1.0


def test_official_plans_differ_between_updates():
    config, window = TrainConfig(compat="official", num_frames=147), routing.Window()
    plans = [make_plan(config, step, 3, window, None) for step in range(4)]
    assert len({(plan.fork, str(plan.routes.tolist())) for plan in plans}) > 1


@pytest.mark.parametrize(
    "bad",
    [
        {"max_train_steps": 0}, {"num_generations": 1}, {"num_generations": 0}, {"groups_per_update": 0},
        {"old_policy_every": 0}, {"rank": 0}, {"tau_groups": 0}, {"learning_rate": 0.0}, {"learning_rate": -1e-4},
        {"learning_rate": math.nan}, {"max_grad_norm": 0.0}, {"adv_clip_max": 0.0}, {"clip_range_low": 0.0},
        {"clip_range_high": -0.1}, {"kl_coef": -1.0}, {"kl_coef": math.nan}, {"tau": -1.0}, {"unsafe_scale": -0.5},
        {"global_frames": -1}, {"checkpointing_steps": -1}, {"lr_warmup_steps": -1}, {"compat": "author"},
        {"fuse_mode": "mean"},
        {"ema_decay": 1.0}, {"ema_decay": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        TrainConfig(**bad)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def resumed(make_pipeline, tmp_path_factory):
    """Five updates in one go, and three plus two through a checkpoint inside the old policy's second window of two."""
    folder = str(tmp_path_factory.mktemp("run"))
    settings = dict(old_policy_every=2, tau=0.0, tau_groups=1, num_generations=2, output_dir=folder)
    whole = Run(make_pipeline(), max_train_steps=5, **settings).go()
    first = Run(make_pipeline(), max_train_steps=3, checkpointing_steps=3, **settings).go()
    second = Run(make_pipeline(), max_train_steps=5, resume_from_checkpoint="latest", **settings)
    return whole, first, second.go()


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(resumed, make_pipeline):
    whole, first, second = resumed
    assert [step.step for step in second.steps] == [3, 4]
    assert numbers(first.steps) + numbers(second.steps) == numbers(whole.steps)
    for name in ("default", "old", "ema"):
        assert bitwise(second.weights(name), whole.weights(name))
    # the checkpoint was worth a test: inside a window whose old policy is neither the initial nor the trained one,
    # and inside a round through the scripts
    assert whole.steps[3].log()["ratio/max_dev_first"] > 1e-5
    assert not bitwise(first.weights("old"), first.weights("default"))
    assert not bitwise(first.weights("old"), Run(make_pipeline()).weights("old"))
    assert not bitwise(second.weights(), first.weights())
    state = json.loads((find_checkpoint(second.config) / "state.json").read_text())
    assert len(state["order"]) == 2


def test_resuming_a_finished_run_does_nothing(resumed, make_pipeline):
    _, first, _ = resumed
    again = Run(make_pipeline(), **vars(first.config) | {"resume_from_checkpoint": "latest"}).go()
    assert again.steps == []
    assert bitwise(again.weights("ema"), first.weights("ema"))


def test_a_checkpoint_must_fit(resumed, make_pipeline):
    _, first, _ = resumed
    path = str(find_checkpoint(TrainConfig(output_dir=first.config.output_dir, resume_from_checkpoint="latest")))
    with pytest.raises(ValueError, match="checkpoint-3.*adapter"):
        next(Run(make_pipeline(), rank=2, max_train_steps=5, resume_from_checkpoint=path))


def test_only_the_newest_checkpoints_stay(make_pipeline, tmp_path):
    run = Run(
        make_pipeline(), only(constant), output_dir=str(tmp_path), max_train_steps=5, num_generations=2,
        checkpointing_steps=2, checkpoints_total_limit=2,
    )  # fmt: skip
    left = []
    for _ in range(5):
        next(run)
        left.append(checkpoints(tmp_path))
    assert left == [[], [2], [2], [2, 4], [4, 5]]  # every second update, and the last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    files = ["default.safetensors", "ema.safetensors", "old.safetensors", "state.json", "training_state.pt"]
    assert sorted(p.name for p in (tmp_path / "checkpoint-5").iterdir()) == files


def test_find_checkpoint(tmp_path):
    def find(which):
        return find_checkpoint(TrainConfig(output_dir=str(tmp_path), resume_from_checkpoint=which))

    with pytest.raises(FileNotFoundError, match="no checkpoint.*--checkpointing_steps"):
        find("latest")
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        find(str(tmp_path / "checkpoint-3"))
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-11.aside", "checkpoint-99", "checkpoint-x"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-99":  # cut off while it was written
            (tmp_path / name / "state.json").write_text("{}")
    assert checkpoints(tmp_path) == [2, 10]  # by number, not by spelling
    assert find("latest").name == "checkpoint-10"
    assert find(str(tmp_path / "checkpoint-2")).name == "checkpoint-2"
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        find(str(tmp_path / "checkpoint-99"))


def test_a_checkpoint_that_was_cut_off_is_never_latest(make_pipeline, tmp_path, monkeypatch):
    settings = dict(output_dir=str(tmp_path), max_train_steps=2, num_generations=2, checkpointing_steps=1)
    run = Run(make_pipeline(), only(constant), **settings)
    next(run)

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        next(run)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [1]
    again = Run(make_pipeline(), only(constant), **settings | {"resume_from_checkpoint": "latest"})
    assert find_checkpoint(again.config).name == "checkpoint-1"
    again.go()
    assert [step.step for step in again.steps] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


# -------------------------------------------------------------------------------------------------------- evaluation


def test_samples_do_not_depend_on_the_batch(make_pipeline):
    pipeline, scripts = make_pipeline(), [*SCRIPTS, SCRIPTS[0]]
    at_once = torch.cat(list(sample(pipeline, scripts, 15, seed=3, batch=4)))
    parts = list(sample(pipeline, scripts, 15, seed=3, batch=3))
    assert [len(part) for part in parts] == [3, 1]
    assert_close(torch.cat(parts), at_once, atol=1e-5, rtol=0)
    assert_close(torch.cat(list(sample(pipeline, scripts, 15, seed=3, batch=1))), at_once, atol=1e-5, rtol=0)
    assert (at_once[0] - at_once[3]).abs().max() > 0.1  # the same words twice: noise of their own
    assert (next(sample(pipeline, scripts, 15, seed=4)) - at_once).abs().max() > 0.1


def test_long_samples_are_plain_generation(make_pipeline):
    """Two prompt switches, 93 frames, against `generate` with a history that forgets nothing."""
    pipeline, script = make_pipeline(), "a red disc | it moves up | it turns blue"
    (latents,) = sample(pipeline, [script], 93, seed=3)
    assert latents.shape == (1, 93, 8, 4, 4)
    texts = [pipeline.embed([text]) for text in ("a red disc", "it moves up", "it turns blue")]
    noise = draw_noise(31, 4, (3, 8, 4, 4), torch.Generator().manual_seed(3))
    sampler = Sampler(SIGMAS, routing.Window(history=1000), switches=(39, 75))
    assert torch.equal(latents, generate(pipeline.backbone, Stream(), texts, noise, 93, sampler).latents)


def test_samples_of_another_sampler(make_pipeline):
    """Euler with 6 steps, the initial noise alone: against the equation dx / d sigma = v, worked out step by step."""
    pipeline, sigmas = make_pipeline(), schedule(6)
    (latents,) = sample(pipeline, SCRIPTS[:1], 3, seed=3, sigmas=sigmas, eta=0.0)
    x = torch.randn(1, 1, 1, 3, 8, 4, 4, generator=torch.Generator().manual_seed(3))[0, 0]
    text = pipeline.embed(SCRIPTS[:1])
    for sigma, below in zip(sigmas, [*sigmas[1:], torch.tensor(0.0)], strict=True):
        with torch.no_grad():
            x = x + (below - sigma) * pipeline.backbone.velocity(x, sigma.reshape(1), 0, text, None)
    assert_close(latents, x, atol=1e-5, rtol=0)
    (stochastic,) = sample(pipeline, SCRIPTS[:1], 3, seed=3, sigmas=sigmas)
    assert (stochastic - latents).abs().max() > 0.1


@pytest.mark.parametrize("batch", [3, 2])
def test_evaluation_is_the_mean_over_single_videos(make_pipeline, batch):
    """The pocket rewards and the judge, video by video."""
    pipeline, rewards = make_pipeline(), pocket_rewards(vq=1.0, mq=2.0, ta=0.5)
    got = evaluate(pipeline, SCRIPTS, rewards, 9, seed=3, batch=batch)
    rows, judged = [], []
    for i, script in enumerate(SCRIPTS):
        noise = draw_noise(3, 4, (3, 8, 4, 4), torch.Generator().manual_seed(3 + 10000 * i))
        text = pipeline.embed([script])
        pixels = pipeline.decode(generate(pipeline.backbone, Stream(), [text], noise, 9, Sampler(SIGMAS)).latents)
        words = pipeline.reward_prompts(script, range(9))
        rows.append([reward(pixels, [words]).item() for reward in rewards.rewards.values()])
        judged.append(pipeline.judge(pipeline.read(pixels), [script]))
    rows = torch.tensor(rows)
    totals = rows @ torch.tensor([1.0, 2.0, 0.5])
    for name, mean in zip(("vq", "mq", "ta"), rows.mean(0), strict=True):
        assert_close(got[name], mean.item(), atol=1e-4, rtol=0)
    assert_close(got["reward"], totals.mean().item(), atol=1e-4, rtol=0)
    assert_close(got["reward_sem"], (totals.std() / 3**0.5).item(), atol=1e-4, rtol=0)
    assert got["judge"].keys() == judged[0].keys()
    for key in ("valid", "all", "distance"):
        assert_close(got["judge"][key], sum(j[key] for j in judged) / 3, atol=1e-4, rtol=0)
    named = [j["colour"] for j in judged if j["colour"] == j["colour"]]  # nan: no words fix the colour
    assert_close(got["judge"]["colour"], sum(named) / len(named), atol=1e-4, rtol=0)


def test_a_helper_has_one_thread_whatever_the_environment_says(monkeypatch):
    """With two of MKL's it took a third longer, and gave other digits."""
    started = []

    class Started:
        stdout = io.BytesIO(b"\n")
        kill = wait = lambda self: None

        def __init__(self, command, env, **more):
            started.append((env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["RANK"], env["WORLD_SIZE"]))

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(system.subprocess, "Popen", Started)
    with system.share_work(2, ["demo"], lambda: started.append("meanwhile")):
        assert torch.get_num_threads() == 1
    assert started == [("1", "1", "1", "2"), "meanwhile"] and os.environ["MKL_NUM_THREADS"] == "2"
