"""The benchmark of one update at the real model's size: its two schedules agree, and its plan is what happens."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpo_min import kvpo
from kvpo_min.bank import Bank
from kvpo_min.checks.bench import Disagreement

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import wan_update as bench  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small():
    model = bench.build(bench.SMALL, "cpu", torch.float32)
    bench.fill_moments(model)
    return model, bench.draw_task(bench.SMALL, model)


def batches(branch_batch, replay_batch):
    return replace(bench.SMALL.config, branch_batch=branch_batch, replay_batch=replay_batch)


def outcome(small, schedule, config, meter=None):
    """Weights as before, loss and gradient of one update."""
    model, task = small
    bench.copy_adapter(model.policies, "old", "default")
    model.optimizer.zero_grad()
    return schedule(model, task, config, meter or bench.Meter(model.device))


def test_both_schedules_and_all_settings_give_the_same_update(small):
    theirs = outcome(small, bench.naive, bench.SMALL.config)
    assert abs(theirs[0]) > 0 and theirs[1].norm() > 0
    for setting in ((1, 1), (2, 3), (3, 8)):
        apart = bench.difference(outcome(small, bench.update, batches(*setting)), theirs)
        assert max(apart.values()) < 1e-4, (setting, apart)


def test_the_steps_are_the_update(small):
    """One call of `kvpo.update`, in one graph."""
    model, task = small
    ours = outcome(small, bench.update, batches(2, 3))
    bench.copy_adapter(model.policies, "old", "default")
    model.optimizer.zero_grad()
    config = batches(2, 0)
    group = kvpo.update(model.pipeline, model.policies, bench.REWARDS, config, task, config.tau)
    assert max(bench.difference(ours, (group.loss, model.gradient)).values()) < 1e-4


def test_the_comparison_can_fail(small):
    """Other rewards, another gradient."""
    model, task = small
    ours = outcome(small, bench.update, batches(3, 8))
    pipeline = bench.make_pipeline(bench.SMALL, model.pipeline.backbone, lambda video: None, model.device, seed=1)
    pipeline = replace(pipeline, embed=model.pipeline.embed)
    theirs = outcome((replace(model, pipeline=pipeline), task), bench.update, batches(3, 8))
    assert bench.difference(ours, theirs)["gradient"] > 1e-2


@pytest.fixture(scope="module")
def planned():
    return bench.plan_update(bench.SMALL, torch.float32, [(1, 1), (2, 3)])


@pytest.mark.parametrize("setting", [(1, 1), (2, 3)])
def test_planned_memory_is_what_the_update_takes(small, planned, setting):
    """The plan (meta device, stand-in for the network) against the bytes that are alive in a real update. The stand-in
    takes the memory of a backward at once with its forward, when there are a few more copies of the context."""
    fixed, _, table = planned
    with bench.Live() as live:
        meter = bench.Meter(small[0].device, live)
        outcome(small, bench.update, batches(*setting), meter)
    for phase in ("prefix", "rollout", "decode", "replay_frozen", "replay", "backward"):
        expected, seen = table[setting][phase]["peak"] - fixed.always, meter.rows[phase]["peak"]
        assert expected == pytest.approx(seen, rel=0.06), phase


def test_a_memory_bank_is_planned_too(small, planned):
    model, task = small
    fixed, _, table = bench.plan_update(replace(bench.SMALL, bank_size=3), torch.float32, [(1, 1)])
    model = replace(model, pipeline=replace(model.pipeline, bank=Bank(3)))
    with bench.Live() as live:
        meter = bench.Meter(model.device, live)
        outcome((model, task), bench.update, batches(1, 1), meter)
    for phase in ("prefix", "rollout", "replay", "backward"):
        expected, seen = table[1, 1][phase]["peak"] - fixed.always, meter.rows[phase]["peak"]
        assert expected == pytest.approx(seen, rel=0.06), phase
        assert expected > planned[2][1, 1][phase]["peak"] - fixed.always + 3 * fixed.frame, phase


def test_planned_work_is_what_the_update_does(small, planned):
    """FLOPs and forwards, counted on the real network."""
    from torch.utils.flop_counter import FlopCounterMode

    model, task = small
    table = planned[2]
    with FlopCounterMode(display=False) as counter:
        outcome(small, bench.update, batches(2, 3))
    expected = sum(row["flops"] for row in table[2, 3].values())
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    g, fork, rows = bench.SMALL.config.num_generations, bench.SMALL.fork, table[2, 3]
    assert rows["prefix"]["forwards"] == fork // 3 * 5
    each = (task.stop - fork) // 3 * 5 + 4  # and at the prompt switch, frame 39, 4 blocks are encoded again
    assert rows["rollout"]["forwards"] == (g + 1) * each
    assert rows["replay"]["forwards"] == g * (6 * 4 + 5)  # 6 blocks to the end of the chunk
    assert rows["backward"]["forwards"] == g * (6 * bench.SMALL.config.grad_steps + 5)


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
    assert sum(w.numel() for w in model.pipeline.backbone.transformer.parameters()) - 3 * adapter == 1_418_996_800
    assert all(w.dtype == torch.float32 for w in model.weights)
    block = model.pipeline.backbone.transformer.blocks[0]
    assert block.ffn.net[2].base_layer.weight.dtype == torch.bfloat16
    assert bench.FULL.fork in bench.routing.eligible_forks(147, bench.WINDOW, 1, 5)
    assert bench.FULL.config.num_segments == 4


def test_the_command(capsys, monkeypatch, planned):
    monkeypatch.setattr(bench, "network_cost", lambda size, dtype: planned[1])  # as seen before
    monkeypatch.setattr(sys, "argv", ["wan_update.py", "--small", "--naive", "--device", "cpu", "--branch_batch", "3"])
    bench.main()
    out = capsys.readouterr().out
    assert "| backward |" in out and "| reward |" in out and "Relative difference" in out
    monkeypatch.setattr(sys, "argv", ["wan_update.py", "--fork", "22"])
    with pytest.raises(SystemExit) as caught:
        bench.main()
    assert caught.value.code == 2 and "21, 24, 39" in capsys.readouterr().err


def test_unequal_schedules_are_refused_before_a_time_is_given(monkeypatch):
    monkeypatch.setattr(bench, "difference", lambda ours, theirs: {"loss": 0.0, "gradient": 1e-3})
    with pytest.raises(Disagreement, match="1.0e-03"):
        bench.measure(bench.SMALL, "cpu", torch.float32, True)
