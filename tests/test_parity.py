"""The core files reproduce the numbers recorded from the authors' implementation (tests/golden/README.md).

Another set of the same layout can be checked with KVPO_GOLDEN=/path/to/folder.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from kvpo_min.chr import Window, branch_frames, chunk_starts, eligible_forks, plan_official
from kvpo_min.grpo import anchor_advantages, branch_kl, clipped_objective, fuse, kvpo_loss, safety_scale
from kvpo_min.tve import gibbs_entropy, gibbs_log_prob, schedule

GOLDEN = Path(os.environ.get("KVPO_GOLDEN") or Path(__file__).parent / "golden")
SCHEDULE, PLANS, OBJECTIVES = (
    json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("schedule", "chr_plans", "grpo_objective")
)


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float32), expected, rtol=1e-5, atol=1e-6)


def test_schedule():
    sigma = schedule(len(SCHEDULE["sigmas"]), SCHEDULE["shift"])
    torch.testing.assert_close(sigma, torch.tensor(SCHEDULE["sigmas"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * sigma, torch.tensor(SCHEDULE["warped_timesteps"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: f"s{case['sample_idx']}-c{case['seed_context']}")
def test_chr_plan(case):
    c, expected = case["config"], case["plan"]
    # Their local size and their m count the block being denoised, ours count past frames.
    window = Window(c["sink"], c["local"] - c["sink"] - c["fpb"], c["fpb"], c["local"] + c["slice"])
    nearest = c["m"] - c["fpb"]
    layout = dict(first_chunks=c["within"], first=c["chunk"], rest=c["minnew"])

    forks = eligible_forks(c["total"], window, nearest, c["P"], **layout, gap=window.block)
    assert len(forks) == expected["eligible_blocks_count"]
    assert chunk_starts(c["total"], c["chunk"], c["minnew"]) == [x["start_frame"] for x in expected["chunks"]]

    seeds = case["base_seed"], case["sample_idx"], case["seed_context"]
    plan = plan_official(*seeds, c["total"], window, nearest, c["P"], c["K"], **layout)
    assert plan.fork == expected["perturb_block_abs_frame"]
    assert plan.fork + window.block * plan.n_blocks == expected["perturb_block_end_frame"]
    assert plan.pool == range(expected["stable_older_frame_start"], expected["stable_older_frame_end"])
    assert plan.routes.tolist() == [b["selected_older_frame_indices"] for b in expected["branch_plans"]]

    frames = branch_frames(plan.routes, plan.fork, window, nearest)
    assert frames.shape == (c["K"], c["local"] - c["fpb"])  # a full window: nothing was drawn that would be read twice


@pytest.mark.parametrize("case", OBJECTIVES, ids=lambda case: f"G{case['G']}-{case['fusion_mode']}-kl{case['kl_coef']}")
def test_objective(case):
    signals = {}
    for name in ("local", "global"):
        rewards = {k: torch.tensor(v) for k, v in case[f"{name}_rewards"].items()}
        signals[name] = anchor_advantages(rewards, case[f"{name}_anchor"], case["weights"])
        close(signals[name], case[f"adv_{name}"])

    weights = case["fusion_local_weight"], case["fusion_global_weight"]
    A = fuse(signals["local"], signals["global"], *weights, case["fusion_mode"], case["adv_clip"])
    close(A, case["adv_fused"])

    log_p_old, log_p_init = (gibbs_log_prob(-torch.tensor(case[f"log_score_{who}"]), 1.0) for who in ("old", "init"))
    checked_gradients = 0
    for mechanism, unsafe in (("mechanism_1", 0.0), ("mechanism_2", 0.5)):
        expected, scale = case[mechanism], safety_scale(case["safe"], unsafe)
        log_score = torch.tensor(case["log_score_theta"], requires_grad=True)
        log_p = gibbs_log_prob(-log_score, 1.0)
        loss = kvpo_loss(log_p, log_p_old, log_p_init, A, case["clip_low"], case["clip_high"], case["kl_coef"], scale)
        loss.total.backward()
        close(loss.total.detach(), expected["total_loss"])
        close(loss.ratio, expected["ratio"])
        close(loss.clip_fraction if scale else 0.0, expected["clip_fraction"])  # theirs reports 0 for a skipped update
        close(gibbs_entropy(log_p.detach()), loss.entropy)
        if expected["loss_scale"] is not None:
            close(scale, expected["loss_scale"])
        if expected["entropy"] is not None:  # theirs is that of pi * scale, which does not sum to 1 when unsafe
            close(scale * (loss.entropy - math.log(scale)), expected["entropy"])
        if expected["grad_log_score"] is not None:
            close(log_score.grad, expected["grad_log_score"])
            checked_gradients += 1
        else:
            assert scale == 0 and not log_score.grad.any()  # theirs skips the update instead
    assert checked_gradients >= 1

    policy, _, _ = clipped_objective(log_p, log_p_old, A, case["clip_low"], case["clip_high"])
    close((policy + case["kl_coef"] * branch_kl(log_p, log_p_init)) * scale, case["mechanism_2"]["total_loss"])
