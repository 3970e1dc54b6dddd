"""This code reproduces the numbers recorded from the authors' implementation (tests/golden/README.md).

Another set of the same layout can be checked with KVPO_GOLDEN=/path/to/folder.
"""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from kvpo_min import cli, rollout
from kvpo_min.bank import Bank
from kvpo_min.checks import parity, parity_memflow
from kvpo_min.chr import Window, branch_frames, plan_official
from kvpo_min.grpo import branch_kl, clipped_objective
from kvpo_min.kvpo import replay_energies
from kvpo_min.tve import gibbs_log_prob, schedule
from kvpo_min.wan.checkpoints import wan_from_original

GOLDEN = Path(os.environ.get("KVPO_GOLDEN") or Path(__file__).parent / "golden")
SCHEDULE, PLANS, OBJECTIVES, CALLS, UPDATE, SHAPES = (
    parity.read(GOLDEN / f"{name}.json")
    for name in (
        "schedule", "chr_plans", "grpo_objective", "causal_wan_tiny", "kvpo_update_tiny", "wan_1_3b_state_dict_shapes",
    )
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float32), expected, rtol=1e-5, atol=1e-6)


def tensors(name):
    return parity.read(GOLDEN / f"{name}.safetensors")


def run_calls(info):
    backbone = parity.new_backbone(info["config"], tensors("causal_wan_tiny"))
    return parity.call_pairs(backbone, info, tensors("causal_wan_tiny_io"))


def run_update(info):
    shift, recorded = SCHEDULE["shift"], tensors("kvpo_update_tiny")
    return parity.update_pairs(CALLS["config"], tensors("causal_wan_tiny"), info, recorded, shift)


def gaps(pairs, measure):
    """Largest difference of every name before the "/"."""
    return {row.compared.split(" (")[0]: row.difference for row in parity.rows("", [pairs], measure, 0)}


@pytest.fixture(scope="module")
def update():
    return run_update(UPDATE)


# ------------------------------------------------------------------------------------ schedule, plans and the objective


def test_schedule():
    sigma = schedule(len(SCHEDULE["sigmas"]), SCHEDULE["shift"])
    torch.testing.assert_close(sigma, torch.tensor(SCHEDULE["sigmas"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * sigma, torch.tensor(SCHEDULE["warped_timesteps"]), rtol=1e-6, atol=0)
    level = parity.sigma_at_int_timestep(sigma, SCHEDULE["shift"])
    torch.testing.assert_close(level, torch.tensor(SCHEDULE["sigmas_after_int_cast"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: f"s{case['sample_idx']}-c{case['seed_context']}")
def test_chr_plan(case):
    for name, (ours, theirs) in parity.plan_pairs(case).items():
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), name

    c = case["config"]
    window, nearest = parity.window_of(c["local"], c["sink"], c["m"], c["fpb"], c["local"] + c["slice"])
    routes = parity.planned_routes(case["plan"])
    frames = branch_frames(routes, case["plan"]["perturb_block_abs_frame"], window, nearest)
    assert frames.shape == (c["K"], c["local"] - c["fpb"])  # a full window: nothing was drawn that would be read twice


@pytest.mark.parametrize("case", OBJECTIVES, ids=lambda case: f"G{case['G']}-{case['fusion_mode']}-kl{case['kl_coef']}")
def test_objective(case):
    pairs = parity.objective_pairs(case)
    for ours, theirs in pairs.values():
        close(torch.as_tensor(ours).detach(), theirs)
    assert sum(case[rule]["grad_log_score"] is not None for rule in ("mechanism_1", "mechanism_2")) >= 1

    log_p, log_p_old, log_p_init = (
        gibbs_log_prob(-torch.tensor(case[f"log_score_{who}"]), 1.0) for who in ("theta", "old", "init")
    )
    A, expected = torch.tensor(case["adv_fused"]), case["mechanism_2"]
    policy, _, _ = clipped_objective(log_p, log_p_old, A, case["clip_low"], case["clip_high"])
    scale = 1.0 if case["safe"] else 0.5
    close((policy + case["kl_coef"] * branch_kl(log_p, log_p_init)) * scale, expected["total_loss"])


# ---------------------------------------------------------------------------------------------------- the causal Wan


def test_every_call_of_the_causal_wan():
    pairs = run_calls(CALLS)
    assert len(pairs) == len(CALLS["calls"])
    assert sum("routed" in name for name in pairs) == sum(call["routed"] for call in CALLS["calls"]) > 0
    for name, (ours, theirs) in pairs.items():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_other_routed_frames_are_seen():
    """Control: with frames that were not read, routed blocks differ, and nothing before them does."""
    info, routed = copy.deepcopy(CALLS), CALLS["routed_frames"]
    first = next(call["start_frame"] for call in CALLS["calls"] if call["routed"])
    nearest = CALLS["m_nearest_frames"] - tensors("causal_wan_tiny_io")[CALLS["calls"][0]["input"]].shape[1]
    sink = CALLS["config"]["sink_size"]
    resident = range(max(sink, first - (CALLS["kv_capacity_frames"] - sink)), first - nearest)
    others = [f for f in resident if f not in routed]
    info["routed_frames"] = sorted((others + routed)[: len(routed)])
    pairs = run_calls(info)
    before = [pair for pair, call in zip(pairs.values(), CALLS["calls"], strict=True) if call["start_frame"] < first]
    assert parity.difference(before, "absolute") < 1e-4
    assert gaps(pairs, "absolute")["velocities of routed blocks"] > 1e-3


def test_the_released_keys_fit_the_stock_model():
    """Nothing is missing and nothing is left over, with shapes, by the loader's own strictness."""
    with torch.device("meta"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30, cross_attn_norm=True,
        )  # fmt: skip
        weights = wan_from_original({key: torch.empty(shape) for key, shape in SHAPES.items()})
    assert len(weights) == len(SHAPES)
    model.load_state_dict(weights, strict=True, assign=True)
    assert all(theirs == ours for ours, theirs in parity.key_pairs(SHAPES).values())

    fewer = {key: shape for key, shape in SHAPES.items() if key != "head.modulation"}
    more = SHAPES | {"blocks.0.cross_attn.k_img.weight": [1536, 1536]}
    assert [ours for ours, _ in parity.key_pairs(fewer).values()] == [0, 1]
    assert [ours for ours, _ in parity.key_pairs(more).values()] == [1, 0]


# ------------------------------------------------------------------------------------------------------- the update


def test_routes_of_the_update():
    for name, (ours, theirs) in parity.route_pairs(UPDATE).items():
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), name


ROLLOUT = ("prefix", "videos of the branches", "video of the anchor", "noisy inputs", "clean predictions")


def test_prefix_branches_anchor_and_trajectories(update):
    found = gaps({name: update[name] for name in ROLLOUT}, "relative")
    assert max(found.values()) < 1e-4, found


def test_scores_ratio_loss_and_gradients(update):
    floors = [name.removeprefix("sigma_floor_") for name in UPDATE["expected"]]
    kinds = {name.split("/")[0] for name in update} - set(ROLLOUT)
    assert {f"log scores, {who} policy" for who in ("old", "initial", "changed")} | {"ratio", "loss"} <= kinds
    recorded = {key.split("/", 1)[1] for key in tensors("kvpo_update_tiny") if key.startswith("grad_floor")}
    assert {kind.removeprefix("gradient of ") for kind in kinds if kind.startswith("gradient")} == recorded
    for kind in kinds:
        for floor in floors:
            ((_, gap),) = gaps({kind: update[f"{kind}/{floor}"]}, "relative").items()
            assert gap < 1e-4, f"{kind} at floor {floor}: {gap}"


def test_reading_the_frames_as_planned_is_seen():
    """Control: where the cache had rolled these are the planned frames, else some that were not read either."""
    info, (window, nearest) = copy.deepcopy(UPDATE), parity.update_window(UPDATE)
    planned, read = (torch.tensor(x) for x in (parity.planned_routes(UPDATE["plan"]).tolist(), UPDATE["branch_frames"]))
    if planned.equal(read):
        planned = (read - window.sink + 1) % (UPDATE["fork_frame"] - nearest - window.sink) + window.sink
    info["branch_frames"] = planned.sort(1).values.tolist()
    if parity.planned_routes(UPDATE["plan"]).equal(planned):
        for plan, frames in zip(info["plan"]["branch_plans"], read.tolist(), strict=True):
            plan["selected_older_frame_indices"] = frames  # or they would count as a plan, and be moved
    found = gaps(run_update(info), "relative")
    assert found["prefix"] < 1e-4 and found["video of the anchor"] < 1e-4
    assert found["videos of the branches"] > 1e-3 and found["log scores, old policy"] > 1e-3


def test_another_context_of_the_replay_is_seen(monkeypatch):
    """Control: our default context gives other scores than the authors'."""
    monkeypatch.setattr(parity, "replay_energies", lambda *args, context: replay_energies(*args, context="stored"))
    found = gaps(run_update(UPDATE), "relative")
    assert found["videos of the branches"] < 1e-4 < found["log scores, changed policy"]


def test_the_exact_sigma_is_seen(update, monkeypatch):
    """Control: below the floor of 1 the authors' look-up at int(timestep) counts, where it is another level."""
    sigma = torch.tensor(SCHEDULE["sigmas"])
    level = parity.sigma_at_int_timestep(sigma, SCHEDULE["shift"])
    monkeypatch.setattr(parity, "sigma_at_int_timestep", lambda sigma, shift: sigma)
    exact = run_update(UPDATE)
    for floor in (name.removeprefix("sigma_floor_") for name in UPDATE["expected"]):
        counts = ((level.clamp(min=float(floor)) / sigma.clamp(min=float(floor))) - 1).abs().max() > 5e-4
        name = f"log scores, changed policy/{floor}"
        theirs, ours = (parity.difference([pairs[name]], "relative") for pairs in (update, exact))
        assert ours > 10 * theirs if counts else ours < 1e-4, floor


@pytest.mark.parametrize(
    "fork, planned, read",
    [
        (39, [21, 25, 28, 31, 34], [24, 28, 31, 34, 37]),  # both seen in the authors' code with a cache of 33 frames
        (42, [24, 28, 31, 34, 37], [27, 31, 34, 37, 40]),
        (21, [3, 7, 10, 13, 16], [3, 7, 10, 13, 16]),
        (24, [6, 8, 10, 13, 19], [6, 8, 10, 13, 19]),
        (30, [3, 8, 10, 13, 25], [3, 8, 10, 13, 25]),  # the cache is full, but nothing has left it yet
    ],
)
def test_frames_are_read_late_once_the_cache_has_rolled(fork, planned, read):
    assert parity.frames_read(torch.tensor([planned]), fork, Window()).tolist() == [read]


def test_a_late_frame_lies_before_the_nearest_ones():
    for seed in range(20):
        plan = plan_official(
            seed, 0, 0, num_frames=147, window=Window(), nearest=1, perturb_num_blocks=5, num_generations=8
        )
        late = parity.frames_read(plan.routes, plan.fork, Window())
        assert branch_frames(late, plan.fork, Window(), 1).shape == (8, 9)


def test_changed_weights():
    weights = {"blocks.0.ffn.2.weight": torch.ones(2), "blocks.0.ffn.2.bias": torch.ones(2)}
    out = parity.changed(weights, "theta = weights with every '*.ffn.2.weight' x 1.02.")
    assert out["blocks.0.ffn.2.weight"].tolist() == pytest.approx([1.02, 1.02])
    assert out["blocks.0.ffn.2.bias"] is weights["blocks.0.ffn.2.bias"]
    for rule in ("theta = weights", "every '*.ffn.7.weight' x 2"):
        with pytest.raises(ValueError, match="theta_rule"):
            parity.changed(weights, rule)


# ------------------------------------------------------------------------------------------------- MemFlow and its bank


@pytest.fixture(scope="module")
def memflow():
    """What was recorded of the authors' MemFlow variant: info, weights, tensors."""
    if not any((GOLDEN / name).is_file() for name in parity.MEMFLOW):
        pytest.skip("nothing of MemFlow was recorded there")
    return [parity.read(GOLDEN / name) for name in parity.MEMFLOW]


@pytest.fixture(scope="module")
def memflow_calls(memflow):
    return run_memflow_calls(memflow)


def run_memflow_calls(memflow):
    info, weights, io = memflow
    return parity_memflow.call_pairs(parity.new_backbone(info["config"], weights), info, io)


def memflow_velocities(memflow, bank=None):
    """Largest differences of the velocities that `generate` and `fork` make, by block, from the recorded ones."""
    info, weights, io = memflow
    backbone = parity.new_backbone(info["config"], weights)
    made, sampler, prefix = parity_memflow.rollout_of(backbone, info, io, bank)
    out, block = {}, info["num_frame_per_block"]
    for start, (z, x0) in prefix.items():
        out[start // block] = (z - x0) / sampler.sigmas[:, None, None, None, None]
    for b, v in enumerate(made.trajectory.velocity[0]):
        out[info["fork_frame"] // block + b] = v[None]
    theirs = {b: torch.stack([io[f"out_{b}_{s}"] for s in range(v.shape[1])], 1) for b, v in out.items()}
    return {b: (v - theirs[b]).abs().max().item() for b, v in out.items()}


def memflow_bank(memflow, **changes):
    return replace(parity_memflow.settings(memflow[0])[2], **changes)


def test_the_plans_of_memflow(memflow):
    for case in memflow[0]["plans"]:
        for name, (ours, theirs) in parity.plan_pairs(case, slots=True).items():
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), name


def test_every_call_of_memflow(memflow, memflow_calls):
    held, scores, velocities = memflow_calls
    calls = memflow[0]["calls"]
    assert len(velocities) == len(calls) and len(held) == 2 * len(calls)
    for name, (ours, theirs) in held.items():
        assert ours == theirs, name
    assert len(scores) == sum(len(call.get("retrieval", ())) for call in calls) > 0
    for name, (ours, theirs) in scores.items():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, (ours, theirs) in velocities.items():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_rollout_and_replay_of_memflow(memflow):
    info, weights, io = memflow
    made, scored = parity_memflow.rollout_pairs(info["config"], weights, info, io)
    assert {name.split("/")[0] for name in made} == {
        f"velocities of `{what}`" for what in ("generate", "fork", "replay")
    }
    assert max(gaps(made, "absolute").values()) < 1e-4
    assert sum(name.startswith("gradient") for name in scored) == sum(key.startswith("replay_grad/") for key in io) > 0
    found = gaps(scored, "relative")
    assert max(found.values()) < 1e-4, found


def test_sparse_activation_of_memflow(memflow):
    info, _, io = memflow
    assert max(gaps(parity_memflow.sparse_pairs(info, io), "relative").values()) < 1e-4


def test_without_a_bank_only_the_first_block_agrees(memflow):
    """Control."""
    found = memflow_velocities(memflow)
    assert found.pop(0) < 1e-4 and min(found.values()) > 1e-3, found


@pytest.mark.parametrize("fault", ["merged once", "words at the switch"])
def test_mending_a_fault_of_the_authors_is_seen(memflow, fault, monkeypatch):
    """Control: the defaults, one by one; until the bank has been full they are the authors'."""
    info, bank = memflow[0], memflow_bank(memflow)
    if fault == "merged once":
        kept = type(bank).merge
        monkeypatch.setattr(type(bank), "merge", lambda self, keys: replace(kept(self, keys), pending=None))
        before = next(c["block"] for c in info["calls"] if c.get("retrieval")) + 1  # the second merge of one frame
    else:
        monkeypatch.setattr(type(bank), "at_switch", lambda self, keys: self.merge(keys))
        before = info["switch_frame"] // info["num_frame_per_block"]
    found = memflow_velocities(memflow, bank)
    assert max(gap for b, gap in found.items() if b < before) < 1e-4
    assert max(gap for b, gap in found.items() if b >= before) > 1e-3, found


def test_a_bank_that_is_encoded_again_at_a_switch_is_seen(memflow, monkeypatch):
    """Control: entries and pending frame under the new words, where the pass encodes these frames."""
    info, switch = memflow[0], rollout.switch_prompt

    def again(backbone, stream, text, sampler, segment):
        stream = switch(backbone, stream, text, sampler, segment)
        bank, frames = stream.bank, stream.history.frames
        kv = bank.kv.clone()
        for layer, held in enumerate(bank.frames[:, 0].tolist()):
            for slot, frame in enumerate(held):
                if frame >= rollout.stale_from(stream.frame, sampler.window):
                    kv[layer, :, :, slot] = frames[frame][layer]
        return replace(stream, bank=replace(bank, kv=kv, pending=frames[bank.pending_frame]))

    monkeypatch.setattr(rollout, "switch_prompt", again)
    found, first = (
        memflow_velocities(memflow, memflow_bank(memflow)),
        info["switch_frame"] // info["num_frame_per_block"],
    )
    assert max(gap for b, gap in found.items() if b < first) < 1e-4 < 1e-3 < found[first], found


@pytest.mark.parametrize("reads", ["the sink too", "slots as frames"])
def test_other_frames_in_routed_blocks_are_seen(memflow, reads, monkeypatch):
    """Control: a routed block that keeps the sink, and slots that do not move with the cache."""
    info, real = memflow[0], parity_memflow.slot_frames

    def other(routes, start, window):
        if reads == "slots as frames":
            return routes
        frames = real(routes, start, window)
        return torch.cat([torch.arange(window.sink).expand(len(frames), -1), frames], 1)

    history = rollout.KVHistory.keep
    monkeypatch.setattr(rollout.KVHistory, "keep", lambda self, sink, newest: history(self, sink, 10**6))
    monkeypatch.setattr(parity_memflow, "slot_frames", other)
    held, _, velocities = run_memflow_calls(memflow)
    first = next(call["output"] for call in info["calls"] if call["routed"])
    wrong = {name.split("/")[1] for name, (ours, theirs) in velocities.items() if (ours - theirs).abs().max() > 1e-4}
    routed = {call["output"] for call in info["calls"] if call["routed"] and call["kind"] == "denoise"}
    assert routed <= wrong and held[f"frames read/{first}"][0] != held[f"frames read/{first}"][1]
    assert not wrong & {call["output"] for call in info["calls"] if call["phase"] != "branch"}


def test_a_replay_that_records_is_seen(memflow, monkeypatch):
    """Control: ours does, by default."""
    info, weights, io = memflow
    record = Bank.record
    monkeypatch.setattr(Bank, "record", lambda self, start, kv, replaying=False: record(self, start, kv))
    made, scored = parity_memflow.rollout_pairs(info["config"], weights, info, io)
    found = gaps(made, "absolute")
    assert found["velocities of `fork`"] < 1e-4 and found["velocities of `replay`"] > 1e-3
    assert gaps(scored, "relative")["score of the branch"] > 1e-3


# ---------------------------------------------------------------------------------------------------------- the command


def test_difference():
    nan = float("nan")
    assert parity.difference([([1.0, 2.0], [1.0, 4.0]), (3.0, 2.5)], "absolute") == 2
    assert parity.difference([([1.0, 2.0], [1.0, 4.0])], "relative") == 0.5
    assert parity.difference([([1, 2, 3], [1, 4, 5])], "count") == 2
    assert parity.difference([([1, 2], [1, 2, 3])], "count") == float("inf")
    assert not parity.Row("", "", "absolute", parity.difference([([nan, 0.0], [0.0, 0.0])], "absolute"), 1.0).ok


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden", copy_function=shutil.copyfile))


def test_the_table(capsys):
    assert cli.main(["parity", "--golden", str(GOLDEN)]) == 0
    out = capsys.readouterr().out
    memflow = parity.MEMFLOW if (GOLDEN / parity.MEMFLOW[0]).is_file() else ()
    for name in (*parity.FILES, *memflow):
        assert name.split(".")[0].removesuffix("_io") in out
    assert " NO " not in out and out.splitlines()[-1].endswith("comparisons within tolerance")


def test_a_difference_is_reported_and_fails(folder, capsys):
    (folder / "schedule.json").write_text(json.dumps(SCHEDULE | {"sigmas": [s + 1e-3 for s in SCHEDULE["sigmas"]]}))
    assert cli.main(["parity", "--golden", str(folder)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if " NO " in line]
    assert len(wrong) == 1 and "schedule.json" in wrong[0] and "1.0e-03" in wrong[0]


def test_a_folder_that_cannot_be_read_is_named(folder, capsys):
    def message():
        assert cli.main(["parity", "--golden", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1
        return err

    (folder / "schedule.json").write_text(json.dumps({"shift": 5.0}))
    assert "another layout than tests/golden: 'denoising_step_list' is not there" in message()
    (folder / "kvpo_update_tiny.safetensors").write_bytes(b"not tensors")
    assert "kvpo_update_tiny.safetensors is damaged" in message()
    (folder / "schedule.json").write_text("{")
    assert "schedule.json is damaged" in message()
    (folder / "schedule.json").unlink()
    assert "lacks schedule.json" in message()
    shutil.copyfile(GOLDEN / "schedule.json", folder / "schedule.json")
    for name in parity.MEMFLOW:
        (folder / name).unlink(missing_ok=True)
    (folder / parity.MEMFLOW[1]).touch()
    assert f"lacks {parity.MEMFLOW[0]}, {parity.MEMFLOW[2]}" in message()
    shutil.rmtree(folder)
    assert f"there is no folder {folder}" in message()
