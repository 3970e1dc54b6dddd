"""Prefix preservation, ours and not the paper's: what it measures, its gradient, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from kvpo_min import kvpo
from kvpo_min.bank import Bank
from kvpo_min.chr import ordinary_frames
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import KVHistory
from kvpo_min.train import TrainConfig, acting, adapter_weights, add_policies, train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(num_generations=2, tau=1.0, rank=2, lora_alpha=2, prefix_coef=3.0)


def rolled_out(pipeline, config=CONFIG):
    policies = add_policies(pipeline, config)
    task = kvpo.draw(pipeline, ["a red disc moves left"], [], config, 0, torch.Generator().manual_seed(0))
    return policies, task, kvpo.roll_out(pipeline, policies, config, task)


def moved(policies, size=0.1):
    """The trained adapter away from the initial policy, which is the one whose B matrices are 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in adapter_weights(policies, "default").items():
            if "lora_B" in name:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))


def naive(pipeline, policies, config, task, rollout, done=0):
    """One block and one level at a time, from the prefix encoded anew by the policy that made it. With several
    iterations the two levels take turns, from block to block and from one iteration to the next."""
    sampler, backbone, text = pipeline.sampler(1), pipeline.backbone, rollout.text
    history, drifts = KVHistory(), []
    for b, x0 in enumerate(rollout.prefix.x0):
        start = 3 * b
        with acting(policies, "old"):
            kv = history.read(ordinary_frames(start, sampler.window))
            history = history.append(start, backbone.encode(x0, start, text, kv))
        for s in range(2):
            if config.num_iterations > 1 and (b + s + done) % 2:
                continue
            sigma = sampler.sigmas[s]
            z = (1 - sigma) * x0 + sigma * task.noise[:, b, s]
            v = {}
            for policy in ("initial", "default"):
                with acting(policies, policy):
                    v[policy] = backbone.velocity(z, sigma.expand(1), start, text, kv)
            drifts.append((v["default"] - v["initial"].detach()).square().mean())
    return torch.stack(drifts).mean()


def test_equal_weights_have_drifted_nowhere(make_pipeline):
    pipeline = make_pipeline()
    policies, task, rollout = rolled_out(pipeline)
    assert kvpo.preserve(pipeline, policies, CONFIG, task, rollout)[0] == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in adapter_weights(policies, "default").values())


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_it_is_the_mean_over_blocks_and_levels(make_pipeline, num_iterations):
    pipeline, config = make_pipeline(), replace(CONFIG, num_iterations=num_iterations)
    policies, task, rollout = rolled_out(pipeline)
    moved(policies)
    kept, drifts = None, []
    for done in range(num_iterations):
        expected = naive(pipeline, policies, config, task, rollout, done)
        drift, kept = kvpo.preserve(pipeline, policies, config, task, rollout, kept, done)
        assert drift == pytest.approx(expected.item(), rel=1e-4)
        assert expected > 1e-6
        drifts.append(drift)
    assert kvpo.preserve(pipeline, policies, config, task, rollout, kept, num_iterations)[0] == drifts[0]
    assert len({*drifts}) == num_iterations
    if num_iterations > 1:  # together they see what one iteration sees
        whole = kvpo.preserve(pipeline, policies, CONFIG, task, rollout)[0]
        assert sum(drifts) / 2 == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("replay_batch, num_iterations", [(1, 1), (3, 1), (3, 2), (100, 1)])
def test_pieces_give_the_same(make_pipeline, replay_batch, num_iterations):
    pipeline = make_pipeline()
    policies, task, rollout = rolled_out(pipeline)
    moved(policies)
    weights, gradients = adapter_weights(policies, "default").values(), []
    whole = replace(CONFIG, num_iterations=num_iterations)
    for config in (whole, replace(whole, replay_batch=replay_batch)):
        drift, kept = kvpo.preserve(pipeline, policies, config, task, rollout)
        gradients.append((drift, kept, *(weight.grad.clone() for weight in weights)))
        for weight in weights:
            weight.grad = None
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(torch.as_tensor(pieces), torch.as_tensor(whole), rtol=1e-3, atol=1e-5)


def test_its_gradient_by_finite_differences(make_pipeline):
    pipeline = make_pipeline()
    pipeline.backbone.double()
    pipeline = replace(pipeline, embed=lambda texts, embed=pipeline.embed: embed(texts).double(),
                       sigmas=pipeline.sigmas.double())  # fmt: skip
    config = replace(CONFIG, groups_per_update=2)
    policies = add_policies(pipeline, config)
    for weight in policies.parameters():
        weight.data = weight.data.double()
    task = kvpo.draw(pipeline, ["a red disc moves left"], [], config, 0, torch.Generator().manual_seed(0))
    task = replace(task, noise=task.noise.double())
    rollout = kvpo.roll_out(pipeline, policies, config, task)
    moved(policies)
    kvpo.preserve(pipeline, policies, config, task, rollout)
    weights, step = adapter_weights(policies, "default"), 1e-3
    for name, weight in list(weights.items())[::7]:
        at = weight.grad.abs().argmax()  # the network's embeddings are float32, so small slopes drown in rounding
        slope, values = weight.grad.flatten()[at].item(), []
        for sign in (1, -1):
            with torch.no_grad():
                weight.flatten()[at] += sign * step
                values.append(naive(pipeline, policies, config, task, rollout).item())
                weight.flatten()[at] -= sign * step
        numeric = config.prefix_coef * (values[0] - values[1]) / (2 * step) / config.groups_per_update
        assert abs(slope) > 1e-5
        assert slope == pytest.approx(numeric, rel=0.02), name


def test_no_other_policy_is_touched_and_the_log_tells(make_pipeline):
    pipeline = make_pipeline()

    def first(videos, prompts):
        return torch.arange(len(videos), 0, -1.0)

    config = replace(CONFIG, max_train_steps=2, learning_rate=1e-2)
    with_it, without = [], []
    for logs, coef in ((with_it, 3.0), (without, 0.0)):
        pipeline = make_pipeline()
        for step in train(pipeline, ["a red disc moves left"], Mixture({"r": first}, {"r": 1.0}),
                          replace(config, prefix_coef=coef)):  # fmt: skip
            logs.append(step.log())
    assert [line["prefix_drift"] for line in without] == [0, 0]
    assert with_it[0]["prefix_drift"] == 0 and with_it[1]["prefix_drift"] > 0


def test_official_has_none():
    assert TrainConfig(compat="official").prefix_coef == 0


@pytest.mark.parametrize("coef", [-1.0, float("nan"), float("inf")])
def test_bad_coefficients_are_refused(coef):
    with pytest.raises(ValueError, match="prefix_coef"):
        TrainConfig(prefix_coef=coef)


def test_it_is_refused_with_a_memory_bank(make_pipeline, tmp_path):
    """It would replay the prefix without the bank that made it."""
    pipeline = replace(make_pipeline(), bank=Bank())
    config = replace(CONFIG, output_dir=str(tmp_path), max_train_steps=1, perturb_num_blocks=3)
    rewards = Mixture({"vq": lambda videos, prompts: videos.mean((1, 2, 3, 4))}, {"vq": 1.0})
    with pytest.raises(ValueError, match="prefix_coef.*bank"):
        next(train(pipeline, ["a red disc moves left"], rewards, config))
