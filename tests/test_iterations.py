"""Several optimizer steps on the groups of one update (`num_iterations`), against the same steps made by hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvpo_min import kvpo
from kvpo_min.pocket import world
from kvpo_min.pocket.prompts import run_prompts
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, adapter_weights, add_policies, copy_adapter, rate, train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    max_train_steps=2, num_generations=2, tau=1.0, rank=2, lora_alpha=2, prefix_coef=3.0, num_iterations=3,
    learning_rate=1e-2, unsafe_scale=0.5, grad_steps=2,
)  # fmt: skip
SCRIPTS = ["a red disc moves left", "a blue cross rests"]


def brightness(videos, prompts):
    return videos.mean((1, 2, 3, 4))


REWARDS = Mixture({"brightness": brightness}, {"brightness": 1.0})


def by_hand(pipeline, config):
    """Rollouts and rewards once an update; energies, loss and a step of the optimizer `num_iterations` times. Energies
    of steps without gradient stay those of the first time."""
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
        for done in range(config.num_iterations):
            optimizer.zero_grad()
            energies = kvpo.energies_of(pipeline, policies, config, rollout, "default", with_graph=True)
            if not done:
                first = energies.detach()
            energies = torch.cat([energies[:, :, : config.grad_steps], first[:, :, config.grad_steps :]], 2)
            both = {"initial": initial, "default": energies}
            kvpo.send_back(pipeline, config, rollout, both, A, 1.0 if safe else 0.5, config.tau)
            kvpo.preserve(pipeline, policies, config, task, rollout, done=done)
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


@pytest.mark.parametrize("compat", ["", "official"])  # official: all steps are replayed again
def test_pieces_give_the_same_gradient_again(make_pipeline, compat):
    gradients = []
    for replay_batch in (0, 3):
        pipeline, config = make_pipeline(), replace(CONFIG, replay_batch=replay_batch, compat=compat)
        policies = add_policies(pipeline, config)
        task = kvpo.draw(pipeline, SCRIPTS, [], config, 0, torch.Generator().manual_seed(0))
        group = kvpo.update(pipeline, policies, REWARDS, config, task, config.tau)
        weights = adapter_weights(policies, "default").values()
        with torch.no_grad():
            for k, weight in enumerate(weights):
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(k)))
        for weight in weights:
            weight.grad = None
        kvpo.again(pipeline, policies, config, group, config.tau)
        gradients.append([weight.grad for weight in weights])
    for whole, pieces in zip(*gradients, strict=True):
        assert_close(pieces, whole, rtol=1e-3, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])


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


def test_the_rate_falls_in_a_line_to_the_end_of_the_run():
    config = TrainConfig(
        learning_rate=1.0, lr_warmup_steps=2, lr_scheduler="linear", max_train_steps=4, num_iterations=2
    )
    rates = [rate(config, step, iteration) for step in range(4) for iteration in range(2)]
    assert rates == pytest.approx([0.5, 0.4375, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])  # half of it in the first update
    level = replace(config, lr_scheduler="constant")
    assert [rate(level, step) for step in range(4)] == [0.5, 1, 1, 1]
    with pytest.raises(ValueError, match="lr_scheduler"):
        TrainConfig(lr_scheduler="cosine")


def test_every_optimizer_step_has_its_own_rate(make_pipeline, monkeypatch):
    config = replace(CONFIG, lr_scheduler="linear", num_iterations=2, max_train_steps=2, lr_warmup_steps=0)
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: seen.append(self.param_groups[0]["lr"]) or step(self, *a, **k)
    )
    list(train(make_pipeline(), SCRIPTS, REWARDS, config))
    assert seen == pytest.approx([config.learning_rate * share for share in (1, 0.75, 0.5, 0.25)])


def test_scripts_in_order(make_pipeline):
    scripts = [f"a {colour} disc moves left" for colour in ("red", "blue", "green")]
    config = replace(CONFIG, in_order=True, groups_per_update=2, max_train_steps=3, num_iterations=1)
    met = [group.script for step in train(make_pipeline(), scripts, REWARDS, config) for group in step.groups]
    assert met == [*scripts, *scripts]


def test_drawn_scripts_are_dealt_so_that_six_begin_in_six_scenes():
    config = TrainConfig(in_order=True, num_frames=33)
    scripts, held_out = run_prompts(config, "", "from the,settles", 8)
    plain, same = run_prompts(replace(config, in_order=False), "", "from the,settles", 8)
    assert sorted(scripts) == sorted(plain) and held_out == same
    for begin in range(0, 60, 6):
        assert {world.parse(script)[0].place for script in scripts[begin : begin + 6]} == set(world.SCENES)
    assert len(run_prompts(config, "", "", 8)[0]) == 256  # some of these name no scene


def test_a_falling_rate_and_a_resumed_run(make_pipeline, tmp_path):
    """It goes on where it stopped, and is refused where its end would be another."""
    config = replace(
        CONFIG, lr_scheduler="linear", output_dir=str(tmp_path), checkpointing_steps=1, checkpoints_total_limit=9
    )
    whole, pipeline = make_pipeline(), make_pipeline()
    policies = add_policies(whole, config)
    list(train(whole, SCRIPTS, REWARDS, config, policies))
    again = replace(config, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    ours = add_policies(pipeline, again)
    assert [step.step for step in train(pipeline, SCRIPTS, REWARDS, again, ours)] == [1]
    for name, weight in adapter_weights(policies, "default").items():
        assert_close(adapter_weights(ours, "default")[name], weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match="max_train_steps 2.*linear.*not 3"):
        next(train(make_pipeline(), SCRIPTS, REWARDS, replace(again, max_train_steps=3)))
