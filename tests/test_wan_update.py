"""The benchmark of one update at the real model's size: its two schedules agree, and its plan is what happens."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import wan_update as bench  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small():
    model = bench.build(bench.SMALL, "cpu", torch.float32)
    bench.fill_moments(model)
    return model, bench.draw_task(bench.SMALL, model.device)


def gradients_of(small, schedule, *setting):
    """Weights as before, loss and gradients of one update."""
    model, task = small
    bench.copy_adapter(model.policies, "old", "default")
    return schedule(model, task, *setting, bench.Meter(model.device))


def test_both_schedules_and_all_settings_give_the_same_update(small):
    theirs = gradients_of(small, bench.naive)
    assert theirs[0].isfinite() and sum(g.norm() for g in theirs[1]) > 0
    for setting in ((1, 1), (2, 3), (3, 8)):
        ours = gradients_of(small, bench.update, *setting)
        loss, gradients = bench.difference(ours, theirs)
        assert loss < 1e-4 and gradients < 1e-4, (setting, loss, gradients)


def test_the_comparison_can_fail(small):
    """Another advantage, another gradient."""
    model, task = small
    ours = gradients_of(small, bench.update, 3, 8)
    theirs = gradients_of((model, replace(task, advantages=task.advantages.flip(0))), bench.update, 3, 8)
    assert bench.difference(ours, theirs)[1] > 1e-2


@pytest.fixture(scope="module")
def planned():
    return bench.plan_update(bench.SMALL, torch.float32, [(1, 1), (2, 3)])


@pytest.mark.parametrize("setting", [(1, 1), (2, 3)])
def test_planned_memory_is_what_the_update_takes(small, planned, setting):
    """The plan (meta device, stand-in for the network) against the bytes that are alive in a real update. The stand-in
    takes the memory of a backward at once with its forward, when there are a few more copies of the context."""
    model, task = small
    bench.copy_adapter(model.policies, "old", "default")
    fixed, _, table = planned
    with bench.Live() as live:
        meter = bench.Meter(model.device, live)
        bench.update(model, task, *setting, meter)
    for phase in ("prefix", "branches", "decode", "replay, initial policy", "replay", "replay with gradient"):
        expected, seen = table[setting][phase]["peak"] - fixed.always, meter.rows[phase]["peak"]
        assert expected == pytest.approx(seen, rel=0.06), phase


def test_a_memory_bank_is_planned_too(small, planned):
    model, task = small
    size = replace(bench.SMALL, bank_size=3)
    fixed, _, table = bench.plan_update(size, torch.float32, [(1, 1)])
    bench.copy_adapter(model.policies, "old", "default")
    with bench.Live() as live:
        meter = bench.Meter(model.device, live)
        bench.update(model, replace(task, size=size), 1, 1, meter)
    for phase in ("prefix", "branches", "replay", "replay with gradient"):
        expected, seen = table[1, 1][phase]["peak"] - fixed.always, meter.rows[phase]["peak"]
        assert expected == pytest.approx(seen, rel=0.06), phase
        assert expected > planned[2][1, 1][phase]["peak"] - fixed.always + 3 * fixed.frame, phase


def test_planned_work_is_what_the_update_does(small, planned):
    """FLOPs and forwards, counted on the real network."""
    from torch.utils.flop_counter import FlopCounterMode

    model, task = small
    bench.copy_adapter(model.policies, "old", "default")
    table = planned[2]
    with FlopCounterMode(display=False) as counter:
        bench.update(model, task, 2, 3, bench.Meter(model.device))
    expected = sum(row["flops"] for row in table[2, 3].values())
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    size, rows = bench.SMALL, table[2, 3]
    assert rows["prefix"]["forwards"] == size.fork // 3 * 5
    each = (size.stop - size.fork) // 3 * 5 + 4  # and at the prompt switch, frame 39, 4 blocks are encoded again
    assert rows["branches"]["forwards"] == (size.num_generations + 1) * each
    assert rows["replay"]["forwards"] == size.num_generations * (6 * 4 + 5)  # 6 blocks to the end of the chunk
    assert rows["replay with gradient"]["forwards"] == size.num_generations * (6 * size.grad_steps + 5)


def test_live_counts_bytes_that_are_alive():
    outside = torch.zeros(100)
    with bench.Live() as live:
        view = outside[:50]
        assert live.now == 0  # no new memory
        a = torch.zeros(1000)
        b = a.reshape(10, 100)[2:]
        assert live.now == 4000
        c = a + 1
        assert (live.now, live.peak) == (8000, 8000)
        del a
        assert live.now == 8000  # b still holds it
        del b
        assert (live.now, live.peak) == (4000, 8000)
        outside += view.sum() * 0 + c.sum() * 0
        del c
    assert live.now == 0


def test_full_size_is_wan_1_3b():
    """Parameters as recorded from the checkpoint: 1,418,996,800; LoRA on every linear layer of a block but the text's
    keys and values: 349,962,240 - 60 * 256 * (1536 + 1536)."""
    model = bench.build(bench.FULL, "meta", torch.bfloat16)
    adapter = sum(w.numel() for w in model.weights)
    assert adapter == 349_962_240 - 60 * 256 * 2 * 1536
    assert sum(w.numel() for w in model.backbone.transformer.parameters()) - 3 * adapter == 1_418_996_800
    assert all(w.dtype == torch.float32 for w in model.weights)
    block = model.backbone.transformer.blocks[0]
    assert block.ffn.net[2].base_layer.weight.dtype == torch.bfloat16
    assert bench.FULL.fork in bench.routing.eligible_forks(147, bench.WINDOW, bench.NEAREST, 5)
    assert (bench.FULL.chunk_end, bench.FULL.stop) == (75, 147)


def test_the_command(capsys, monkeypatch, planned):
    monkeypatch.setattr(bench, "network_cost", lambda size, dtype: planned[1])  # as seen before
    monkeypatch.setattr(sys, "argv", ["wan_update.py", "--small", "--naive", "--device", "cpu", "--branch_batch", "3"])
    bench.main()
    out = capsys.readouterr().out
    assert "| replay with gradient |" in out and "| replay, old policy |" in out and "Relative difference" in out
    monkeypatch.setattr(sys, "argv", ["wan_update.py", "--fork", "22"])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2 and "21, 24, 39" in capsys.readouterr().err


def test_unequal_schedules_are_refused_before_a_time_is_given(monkeypatch):
    monkeypatch.setattr(bench, "difference", lambda ours, theirs: (0.0, 1e-3))
    with pytest.raises(AssertionError, match="schedules differ"):
        bench.measure(bench.SMALL, "cpu", torch.float32, (3, 8), True)


def test_tensors_agree_with_a_single_graph(small):
    """The gradient piece by piece against one backward through all energies of `rollout.replay`."""
    from kvpo_min.grpo import kvpo_loss
    from kvpo_min.rollout import fork, replay
    from kvpo_min.tve import calibrate_tau, gibbs_log_prob, step_energies, trajectory_energy

    model, task = small
    size = task.size
    ours = gradients_of(small, bench.update, 2, 3)
    bench.copy_adapter(model.policies, "old", "default")
    with torch.no_grad(), bench.acting(model.policies, "old"):
        made = fork(model.backbone, task.texts, task.noise, task.plan, size.stop, size.chunk_end, task.sampler, 1)

    def energies(grad_steps):
        v = replay(model.backbone, made, task.sampler, grad_steps)
        return trajectory_energy(step_energies(v, made.trajectory.velocity[: len(v)]))

    with torch.no_grad(), bench.acting(model.policies, "initial"):
        initial = energies(0)
    E = energies(size.grad_steps)
    tau = calibrate_tau(E.detach()[None])
    log_p = gibbs_log_prob(E, tau)
    loss = kvpo_loss(log_p, log_p.detach(), gibbs_log_prob(initial, tau), task.advantages).total
    gradients = torch.autograd.grad(loss, model.weights)
    assert_close(ours[0], loss.detach(), rtol=1e-4, atol=1e-6)
    largest = max(g.abs().max() for g in gradients)
    for a, b in zip(ours[1], gradients, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * largest.item())
