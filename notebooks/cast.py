"""The fork that the notebooks follow, the same films from routing to the trained model: four branches and the anchor of
one script, one prefix and one noise."""

from __future__ import annotations

import torch

from kvpo_min import kvpo
from kvpo_min.config import TrainConfig

SCRIPT = "a red disc travels from the forest and settles"
SEED = 4367  # of the routes and the noise: chosen because each branch has a clear majority, and two end as is liked
TASTE = ("beach", "meadow", "forest")  # scenes that the notebooks' user likes: the default
NAMES = ("A", "B", "C", "D", "anchor")
CONFIG = TrainConfig(num_generations=4, prefix_coef=15.0, fork=27, perturb_num_blocks=4)  # forks where the hero settles


def fork(pipeline, policies) -> tuple[kvpo.Task, kvpo.Rollout]:
    """The task and its rollout, for `kvpo`'s further steps. `policies`: from `add_policies(pipeline, CONFIG)`."""
    task = kvpo.draw(pipeline, [SCRIPT], [], CONFIG, 0, torch.Generator().manual_seed(SEED))
    return task, kvpo.roll_out(pipeline, policies, CONFIG, task)
