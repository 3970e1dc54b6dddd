"""The options of a training run, with their defaults, their bounds, and the authors' numbers in one place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass


@dataclass
class TrainConfig:
    """One run. Names are those of diffusers and TRL where they have one, KVPO's words for its own knobs."""

    output_dir: str = "kvpo_run"
    seed: int = 0
    max_train_steps: int = 60
    num_frames: int = 39  # length of the videos: 39 = a single prompt (short mode), 147 = four segments (long mode)
    num_segments: int = 1  # prompts a script; 1, or up to 4 in long videos
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 2
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 16  # of the LoRA
    lora_alpha: int = 16
    ema_decay: float = 0.95
    num_generations: int = 8  # branches G
    groups_per_update: int = 1  # scripts whose gradients are averaged in one update
    old_policy_every: int = 1  # updates between refreshes of the rollouts' policy; with 1 ratio and clip never act
    nearest: int = 2  # nearest past frames that every branch keeps; the other slots of the window are routed
    perturb_num_blocks: int = 5  # routed blocks after the fork
    grad_steps: int = 4  # denoising steps of the replay that carry gradient; all of them count in the energy
    tau: float = 0.0  # temperature of the Gibbs policy; 0: from the spread of the first groups' energies, then frozen
    tau_groups: int = 8  # groups that set tau
    tau_target: float = 0.4  # spread of the log scores -E / tau in a group that tau is set for
    kl_coef: float = 1.0
    clip_range_low: float = 0.1
    clip_range_high: float = 0.2
    adv_clip_max: float = 2.5
    local_weight: float = 1.0
    global_weight: float = 0.5
    fuse_mode: str = "std"  # grpo.fuse: "std" (over the anchor), "zscore" (over the mean of the group), "none"
    global_frames: int = 36  # frames after the fork's chunk that the global reward sees, if the video goes on
    unsafe_scale: float = 0.0  # factor on the loss when no branch beats the anchor: 0 (paper) or 0.5 (authors)
    compat: str = ""  # "official": the authors' routing, energy and replay context, and the numbers below
    checkpointing_steps: int = 0  # updates between checkpoints (and one at the end); 0: one only if a run is stopped
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = ""  # "latest", or the path of a checkpoint-N folder
    branch_batch: int = 0  # branches that run at once; 0: all
    replay_batch: int = 0  # replayed steps that run at once; 0: all

    def __post_init__(self):
        for name in (
            "max_train_steps",
            "groups_per_update",
            "old_policy_every",
            "rank",
            "tau_groups",
            "perturb_num_blocks",
            "num_segments",
            "checkpoints_total_limit",
            "lora_alpha",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "max_grad_norm",
            "adv_clip_max",
            "clip_range_low",
            "clip_range_high",
            "tau_target",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in (
            "kl_coef",
            "tau",
            "unsafe_scale",
            "global_frames",
            "checkpointing_steps",
            "lr_warmup_steps",
            "nearest",
            "branch_batch",
            "replay_batch",
            "local_weight",
            "global_weight",
            "adam_weight_decay",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if self.num_frames < 3 or self.num_frames % 3:
            raise ValueError(f"num_frames must be a multiple of 3 (a block), got {self.num_frames}")
        if self.global_frames % 3:
            raise ValueError(f"global_frames must be a multiple of 3 (a block), got {self.global_frames}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must lie in -2**63 .. 2**63 - 1, got {self.seed}")
        if not 1 <= self.grad_steps <= 4:
            raise ValueError(f"grad_steps must be 1 to 4 (denoising steps), got {self.grad_steps}")
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: a policy over one branch has nothing to choose")
        if self.fuse_mode not in ("std", "zscore", "none"):
            raise ValueError(f'fuse_mode must be "std", "zscore" or "none", got {self.fuse_mode!r}')
        if self.compat not in ("", "official"):
            raise ValueError(f'compat must be "" or "official", got {self.compat!r}')
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.compat:  # the authors' scale, in one place (docs/paper_map.md)
            self.tau, self.kl_coef, self.unsafe_scale, self.grad_steps, self.nearest = 2.0, 10.0, 0.5, 2, 1

    @property
    def context(self) -> str:
        """What a replay encodes between blocks: the branch's own x0, or the policy's last prediction (authors)."""
        return "own" if self.compat else "stored"

    @property
    def sigma_floor(self) -> float:
        """Of the energy's weights: 0 the velocity energy (paper), 1 that of x0 (authors)."""
        return 1.0 if self.compat else 0.0


def nearest_known(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(known)}"


def check_weights(*weights: float) -> None:
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"the weights vq, mq, ta must be 0 or more and not all 0, got {', '.join(map(str, weights))}")


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses what torch's generators do not take, before any work."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{name} must lie in -2**63 .. 2**63 - 1, got {seed}")


def check_official(values: Mapping, kind: type, given: Container[str] = ()) -> None:
    """Refuses an option beside compat that compat replaces. kind: the class of the configuration; given: names of what
    was given in so many words, which otherwise, as it is by default, cannot be told from not given."""
    ours, theirs = (vars(kind(compat=compat)) for compat in ("", values["compat"]))
    for name, value in theirs.items():
        said = name in given or values[name] != ours[name]
        if name != "compat" and value != ours[name] and said and values[name] != value:
            raise ValueError(
                f"{name} is {value} with compat {values['compat']}, got {values[name]}: leave one of them out"
            )
