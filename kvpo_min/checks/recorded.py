"""What parity.py and parity_memflow.py both read recordings with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpo_min.chr import Window
from kvpo_min.wan import WanBackbone
from kvpo_min.wan.checkpoints import transformer_from

Pairs = dict[str, tuple]  # "what/which": (ours, theirs), each a number, a list or a tensor


def window_of(local: int, sink: int, m: int, block: int, capacity: int) -> tuple[Window, int]:
    """Their sizes, which count the block being denoised -> ours and `nearest`, which count past frames."""
    return Window(sink, local - sink - block, block, capacity), m - block


def planned_routes(plan: dict) -> Tensor:
    return torch.tensor([branch["selected_older_frame_indices"] for branch in plan["branch_plans"]])


def new_backbone(config: dict, weights: dict[str, Tensor]) -> WanBackbone:
    """`config` and `weights` in original Wan names, loaded as a released checkpoint is."""
    return WanBackbone(transformer_from(weights, config["num_heads"]))
