"""Several optimizer steps on the groups of one update (`num_iterations`), against the same steps made by hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import kvpo
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, adapter_weights, add_policies, copy_adapter, train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    max_train_steps=2, num_generations=2, tau=1.0, rank=2, lora_alpha=2, prefix_coef=3.0, num_iterations=3,
    learning_rate=1e-2, unsafe_scale=0.5,
)  # fmt: skip
SCRIPTS = ["a red disc moves left", "a blue cross rests"]


def brightness(videos, prompts):
    return videos.mean((1, 2, 3, 4))


REWARDS = Mixture({"brightness": brightness}, {"brightness": 1.0})


def by_hand(pipeline, config):
    """Rollouts and rewards once an update; energies, loss and a step of the optimizer `num_iterations` times."""
    policies = add_policies(pipeline, config)
    weights = list(adapter_weights(policies, "default").values())
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(config.seed), []
    for step in range(config.max_train_steps):
        copy_adapter(policies, "default", "old")
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, (step + 1) / config.lr_warmup_steps)
        task = kvpo.draw(pipeline, SCRIPTS, order, config, step, generator)
        rollout = kvpo.roll_out(pipeline, policies, config, task)
        _, signals = kvpo.score_group(pipeline, REWARDS, task, rollout)
        A, safe = kvpo.compare(signals, REWARDS.weights, config)
        initial = kvpo.energies_of(pipeline, policies, config, rollout, "initial")
        for _ in range(config.num_iterations):
            optimizer.zero_grad()
            energies = kvpo.energies_of(pipeline, policies, config, rollout, "default", with_graph=True)
            both = {"initial": initial, "default": energies}
            kvpo.send_back(pipeline, config, rollout, both, A, 1.0 if safe else 0.5, config.tau)
            kvpo.preserve(pipeline, policies, config, task, rollout)
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
    return adapter_weights(policies, "default")


def test_iterations_are_further_steps_on_the_same_branches(make_pipeline):
    pipeline = make_pipeline()
    policies = add_policies(pipeline, CONFIG)
    steps = list(train(pipeline, SCRIPTS, REWARDS, CONFIG, policies))
    assert len(steps) == 2
    theirs, ours = by_hand(make_pipeline(), CONFIG), adapter_weights(policies, "default")
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)


def test_one_iteration_is_not_three(make_pipeline):
    ends = []
    for n in (1, 3):
        pipeline, config = make_pipeline(), replace(CONFIG, num_iterations=n)
        policies = add_policies(pipeline, config)
        for _ in train(pipeline, SCRIPTS, REWARDS, config, policies):
            pass
        ends.append(torch.cat([w.flatten() for w in adapter_weights(policies, "default").values()]))
    assert (ends[0] - ends[1]).norm() > 0.1 * ends[0].norm()


def test_what_is_not_finite_ends_the_iterations(make_pipeline, monkeypatch):
    """The first step of an update is kept, what follows is left out."""
    seen, again = [], kvpo.again

    def fails_at_the_second(*args):
        seen.append(1)
        if len(seen) == 2:
            raise FloatingPointError("the energies are not finite")
        again(*args)

    monkeypatch.setattr(kvpo, "again", fails_at_the_second)
    pipeline, config = make_pipeline(), replace(CONFIG, max_train_steps=1, num_iterations=4)
    policies = add_policies(pipeline, config)
    with pytest.warns(UserWarning, match="2 of 4 iterations"):
        (step,) = train(pipeline, SCRIPTS, REWARDS, config, policies)
    assert len(seen) == 2 and not step.skipped
    two = make_pipeline()
    others = add_policies(two, config)
    monkeypatch.setattr(kvpo, "again", again)
    list(train(two, SCRIPTS, REWARDS, replace(config, num_iterations=2), others))
    for name, weight in adapter_weights(others, "default").items():
        assert_close(adapter_weights(policies, "default")[name], weight)
