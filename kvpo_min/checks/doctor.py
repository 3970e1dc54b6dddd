"""The invariants behind `kvpo-min doctor`: one update is run and all that must hold in it is looked at, then the files
of a finished run. Each check says what was seen and what usually broke it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kvpo_min import pocket
from kvpo_min import policies as adapters
from kvpo_min.chr import Window
from kvpo_min.config import TrainConfig, knob
from kvpo_min.pocket import pocket_rewards
from kvpo_min.pocket.prompts import check_geometry, run_prompts
from kvpo_min.policies import acting, adapter_weights, add_policies
from kvpo_min.resume import read_checkpoint
from kvpo_min.rollout import replay
from kvpo_min.system import read_metrics, read_yaml, say
from kvpo_min.train import train
from kvpo_min.tve import gibbs_log_prob, step_energies
from kvpo_min.wan.checkpoints import read_lora


@dataclass(frozen=True)
class DoctorOptions:
    """Runs one update and checks every invariant"""

    output_dir: str = knob("", "folder of a finished run, whose files are checked as well; empty: none")
    model: str = knob("", "folder with autoencoder/ and student/; empty: the embedded model")
    seed: int = 0
    num_frames: int = knob(39, "39 for the short mode, 147 for the long one")
    num_segments: int = 1
    num_generations: int = knob(8, "branches")
    perturb_num_blocks: int = knob(5, "routed blocks after the fork")
    rank: int = knob(16, "of the LoRA")


@dataclass(frozen=True)
class Check:
    """One invariant: whether it holds, what was seen, and what usually broke it."""

    name: str
    passed: bool
    seen: str
    cause: str


def doctor_config(options: DoctorOptions):
    """One update that moves the weights whether or not a branch beats the anchor: the doctor asks if the machinery
    turns, not if this one group was lucky."""
    return TrainConfig(
        output_dir="", seed=options.seed, max_train_steps=1, num_frames=options.num_frames, rank=options.rank,
        lora_alpha=options.rank, num_segments=options.num_segments, num_generations=options.num_generations,
        perturb_num_blocks=options.perturb_num_blocks, tau_groups=2, unsafe_scale=1.0, prefix_coef=10.0,
    )  # fmt: skip


def check_update(options: DoctorOptions) -> list[Check]:
    """Runs one update and checks everything that must hold in it."""
    config = doctor_config(options)
    scripts, _ = run_prompts(config, event="settles")  # where memory decides, so that routes must show
    check_geometry(config)
    pipeline = pocket.load_model(options.model)

    @torch.no_grad()
    def fingerprint():
        x = torch.randn(1, 3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return pipeline.backbone.velocity(x, torch.ones(1), 0, pipeline.embed(pipeline.segments(scripts[0])[:1]), None)

    base = fingerprint()
    policies = add_policies(pipeline, config)
    before = {key: weight.detach().clone() for key, weight in adapter_weights(policies, "default").items()}
    say("one update ...")
    cause = "equal energies mean that routes changed nothing; not finite means that weights or rewards are broken"
    try:
        step = next(train(pipeline, scripts, pocket_rewards(), config, policies))
    except (ValueError, FloatingPointError, RuntimeError) as error:
        return [Check("one update runs", False, " ".join(str(error).split()), cause)]
    if step.skipped:
        return [Check("one update runs", False, step.skipped, cause)]
    with acting(policies, "initial"):
        initial = fingerprint()
    checks = [Check("one update runs", True, f"{step.step_time:.1f} s", "")]
    checks += check_routes(step, config)
    checks += check_energies(pipeline, policies, step, config)
    checks += check_signal(step)
    checks += check_weights_moved(policies, before, step)
    return checks + [
        Check(
            "the initial policy is unchanged (adapter off equals the base)", torch.equal(initial, base),
            f"largest difference {(initial - base).abs().max():.1e}",
            "the optimizer holds base weights, or the adapter was merged: give it adapter_weights(policies, 'default')",
        ),
        Check(
            "the trained policy differs from the initial one", not torch.equal(fingerprint(), base), "",
            "the adapter is switched off: policies.set_adapter('default') was not called after acting(...)",
        ),
    ]  # fmt: skip


def check_routes(step, config) -> list[Check]:
    plans = [group.plan for group in step.groups]
    newest = max(int(plan.routes.max()) - plan.fork for plan in plans)
    window = Window()
    inside = all(plan.routes.min() >= window.sink and plan.routes.max() < plan.fork - config.nearest for plan in plans)
    differ = all(len(plan.routes.unique(dim=0)) > 1 for plan in plans)
    return [
        Check(
            "routes hold past frames only, after the sink and before the nearest", inside and newest < 0,
            f"newest routed frame is {-newest} before the fork",
            "the pool ends too late: chr.pool must stop at fork - nearest",
        ),
        Check(
            "branches read different frames", differ, f"{len(plans[0].pool)} frames in the pool",
            "the pool is no larger than a route: fork later, or route fewer frames",
        ),
    ]  # fmt: skip


def check_energies(pipeline, policies, step, config) -> list[Check]:
    """Replays the group under the policy that made it, which the update has left as it was."""
    group = step.groups[0]
    sampler, n = pipeline.sampler(config.num_segments), config.num_generations
    with torch.no_grad(), acting(policies, "old"):
        v = replay(pipeline.backbone, group.rollout, sampler, config.grad_steps, branches=n + 1)
    E = step_energies(v, group.rollout.trajectory.velocity).sum((1, 2))  # [G + 1], anchor last
    recorded = group.energies.sum((1, 2))
    again = (gibbs_log_prob(E[:-1], step.tau) - group.log_p).exp()
    spread = recorded.std(correction=0).item()
    kl = max(abs(g.kl) for g in step.groups)
    return [
        Check(
            "the anchor's energy under its own context is 0", E[-1].item() < 1e-6 + 1e-4 * E[:-1].mean().item(),
            f"{E[-1]:.1e}, branches {E[:-1].mean():.1e}",
            "the replay reads other frames, words or positions than the rollout did, or adds noise to the context",
        ),
        Check(
            "the branches' energies are above 0 and finite",
            bool(recorded.isfinite().all()) and recorded.min().item() > 10 * max(E[-1].item(), 1e-12),
            f"{recorded.min():.1e} to {recorded.max():.1e}",
            "routes were not applied while the branches were made, or the replay reads them too",
        ),
        Check(
            "the ratio is exactly 1 at equal weights", all(bool((g.ratio == 1).all()) for g in step.groups),
            f"largest deviation {max(float((g.ratio - 1).abs().max()) for g in step.groups):.1e}",
            "old and current policy differ before the first update, or dropout is on",
        ),
        Check(
            "a second replay of the old policy gives the same probabilities", (again - 1).abs().max().item() < 1e-3,
            f"largest deviation {(again - 1).abs().max():.1e}",
            "the replay is not deterministic: dropout, noise drawn anew, or a history that changed meanwhile",
        ),
        Check(
            "KL to the initial policy is 0 at the start", kl < 1e-6, f"{kl:.1e}",
            "LoRA's B matrices do not start at 0, or the initial policy is not the base with its adapter off",
        ),
        Check(
            "the shared prefix has not drifted at the start", all(g.prefix_drift < 1e-12 for g in step.groups),
            f"{max(g.prefix_drift for g in step.groups):.1e}",
            "LoRA's B matrices do not start at 0, or prefix and policies do not belong together",
        ),
        Check(
            "tau matches the spread of the energies", 0.01 < spread / step.tau < 10,
            f"tau {step.tau:.1e}, spread {spread:.1e}",
            "tau was set by hand for another model: leave it at 0 to have it measured, else neither clip nor KL acts",
        ),
    ]  # fmt: skip


def check_signal(step) -> list[Check]:
    log = step.log()
    A = torch.cat([group.advantages for group in step.groups])
    finite_numbers = all(math.isfinite(value) for value in log.values())
    return [
        Check(
            "rewards of a group differ", log["frac_reward_zero_std"] == 0, f"spread {log['reward_std']:.1e}",
            "the branches show the same video, or the reward does not see what differs",
        ),
        Check(
            "advantages are finite and not all 0", bool(A.isfinite().all()) and A.abs().max().item() > 0,
            f"{A.min():+.2f} to {A.max():+.2f}",
            "all rewards are equal, so nothing can be learned from this group",
        ),
        Check(
            "everything that is logged is finite", finite_numbers, "",
            "a reward or the loss is not finite: look at the videos and lower learning_rate",
        ),
    ]  # fmt: skip


def check_weights_moved(policies, before: Mapping, step) -> list[Check]:
    """Reads the gradients that the update left on the weights."""
    now = adapter_weights(policies, "default")
    pulled = [key for key, weight in now.items() if weight.grad is not None and weight.grad.abs().max() > 0]
    moved = [key for key in pulled if not now[key].detach().equal(before[key])]
    up = [key for key in now if "lora_B" in key]
    return [
        Check(
            "the gradient is finite and above 0", math.isfinite(step.grad_norm) and step.grad_norm > 0,
            f"norm {step.grad_norm:.1e}",
            "energies without gradient (grad_steps 0), or no branch beat the anchor and the safety rule stopped it",
        ),
        Check(
            "every LoRA pair is reached by the gradient", bool(up) and set(up) <= set(pulled),
            f"{len(set(up) & set(pulled))} of {len(up)}; the A matrices follow after the first update",
            "a layer is not on the path of the replay, or cached without gradient: leave it out of the LoRA's targets",
        ),
        Check(
            "every weight with a gradient changed", bool(pulled) and len(moved) == len(pulled),
            f"{len(moved)} of {len(pulled)}",
            "the optimizer holds other tensors than the model, or learning_rate is below the weights' precision",
        ),
    ]  # fmt: skip


def check_run_folder(folder: Path, model: str, read_config: Callable[[Path], object]) -> list[Check]:
    """The files of a finished run: complete, finite, and an adapter that loads and does something. `read_config` raises
    an error for a config.yaml that no run could have been made with."""

    def check(name: str, cause: str, look: Callable[[], tuple[bool, str]]) -> Check:
        try:
            passed, seen = look()
        except Exception as error:  # a damaged file can raise nearly anything, and each is a finding
            passed, seen = False, " ".join(f"{error or type(error).__name__}".split())
        return Check(name, passed, seen, cause)

    def config_reads():
        read_config(folder / "config.yaml")
        return bool(read_yaml(folder / "config.yaml")), "it is empty"

    def metrics_finite():
        lines = read_metrics(folder / "metrics.jsonl")
        for k, line in enumerate(lines):
            if line["step"] != k:
                return False, f"line {k + 1} is of update {line['step']}, expected {k}"
            odd = [key for key, value in line.items() if type(value) not in (int, float) or not math.isfinite(value)]
            if odd:
                return False, f"line {k + 1}: {odd[0]} is {line[odd[0]]!r}, expected a finite number"
            if not {"skipped", "reward"} & {*line}:
                return False, f"line {k + 1} has no reward"
        return bool(lines), f"{len(lines)} updates"

    def of_a_real_model() -> bool:
        try:
            return "components" in read_yaml(folder / "config.yaml")
        except (OSError, ValueError):  # a finding of its own
            return False

    def summary_complete():
        summary = json.loads((folder / "summary.json").read_text())
        lacking = [key for key in ("updates", "seconds", "seed") if summary.get(key) is None]
        expected = ("reward",) if of_a_real_model() else ("vq", "mq", "ta", "reward", "judge")  # its rewards are chosen
        lacking += [
            f"{when}.{key}"
            for when in ("before", "after")
            for key in expected
            if (summary.get(when) or {}).get(key) is None
        ]
        if lacking:
            return False, f"lacks {', '.join(lacking)}"
        try:
            lines, config = len(read_metrics(folder / "metrics.jsonl")), read_yaml(folder / "config.yaml")
        except (OSError, ValueError):  # findings of their own
            return True, ""
        if lines not in (0, summary["updates"] + summary.get("skipped", 0)):
            return False, f"says {summary['updates']} updates, but metrics.jsonl has {lines} lines"
        seed = config.get("seed", summary["seed"])
        return seed == summary["seed"], f"says seed {summary['seed']}, config.yaml {seed}"

    def adapter_whole():
        lora = read_lora(folder)
        rank = read_yaml(folder / "config.yaml").get("rank", lora.rank)
        return lora.rank == rank, f"rank {lora.rank}" + (f", but config.yaml says {rank}" if lora.rank != rank else "")

    def checkpoints_whole():
        found = sorted(path for path in folder.glob("checkpoint-*") if not path.name.endswith(".aside"))
        for path in found:
            _, _, state = read_checkpoint(path)
            if path.name != f"checkpoint-{state['step']}":
                return False, f"{path.name} holds update {state['step']}"
        return True, ", ".join(path.name for path in found) or "none"

    def nothing_aside():
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.aside"))
        return not left, ", ".join(left)

    def adapter_acts():
        if of_a_real_model():  # not loaded here: an adapter acts when a B matrix is not 0
            most = max(
                weight.abs().max().item() for key, weight in read_lora(folder).weights.items() if "lora_B" in key
            )
            return math.isfinite(most) and most > 0, f"largest weight of a B matrix {most:.1e}"
        pipeline = pocket.load_model(model)
        x = torch.randn(1, 3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        call = (x, torch.ones(1), 0, pipeline.embed(["a disc"]), None)
        with torch.no_grad():
            base = pipeline.backbone.velocity(*call)
            adapters.load_adapter(pipeline, folder)
            trained = pipeline.backbone.velocity(*call)
        difference = (trained - base).abs().max().item()
        return math.isfinite(difference) and difference > 0, f"largest change of a velocity {difference:.1e}"

    other = "it was trained on another model: give that one with --model"
    return [
        check("config.yaml reads as a run", "the file was edited, or comes from another version", config_reads),
        check("metrics.jsonl is complete and finite", "the run diverged, or was cut off in a line", metrics_finite),
        check("summary.json is complete", "the run was interrupted: resume it, or run it again", summary_complete),
        check(
            "the adapter is whole, finite and of the run's rank",
            "the run diverged, the file was cut off, or it comes from another run: take a checkpoint's, or train again",
            adapter_whole,
        ),
        check(
            "checkpoints can be resumed from",
            "a file was deleted or cut off, or the weights diverged: delete that folder and resume an earlier one",
            checkpoints_whole,
        ),
        check(
            "nothing is half-written",
            "the run was killed while it wrote: nothing reads what ends in .aside, delete it",
            nothing_aside,
        ),
        check("the adapter loads and changes the model", other, adapter_acts),
    ]
