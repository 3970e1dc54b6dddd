"""Policies are adapters on one base model: `default` (trained), `old` (makes the rollouts), `ema` (moving average).
The initial policy is the base with its adapters switched off."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvpo_min.config import TrainConfig
    from kvpo_min.pipeline import Pipeline

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every linear layer of a block
LORA_FROZEN = r".*\.attn2\.to_(k|v)"  # left out: the authors' get no gradient, since they cache text keys and values


def add_policies(pipeline: Pipeline, config: TrainConfig):
    """Puts the adapters `default`, `old` and `ema` on the backbone's transformer, all equal to the initial policy.
    -> the peft model; the base's weights stay as they are. Raises ValueError for a model that has adapters already."""
    from peft import LoraConfig, get_peft_model

    if any("lora_" in name for name, _ in pipeline.backbone.transformer.named_parameters()):
        raise ValueError(
            "the model has adapters already: give train(policies=...) what add_policies made, or load it anew"
        )
    if not any(name.endswith(tuple(LORA_TARGETS)) for name, _ in pipeline.backbone.transformer.named_modules()):
        raise ValueError(
            f"no layer of the model ends with one of {LORA_TARGETS}, diffusers' names: name them so, or give "
            "train(policies=...) a peft model of the transformer with the adapters default, old and ema, all alike"
        )
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none",
        target_modules=LORA_TARGETS, exclude_modules=LORA_FROZEN,
    )  # fmt: skip
    device = torch.device(pipeline.backbone.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # peft draws the A matrices from the global generator
        policies = get_peft_model(pipeline.backbone.transformer, lora)
        for name in ("old", "ema"):
            policies.add_adapter(name, lora)
    for name in ("old", "ema"):
        copy_adapter(policies, "default", name)
    for weight in adapter_weights(policies, "ema").values():
        if weight.is_cuda:  # it is kept and saved, and does not act: the GPU's memory is for the others
            weight.data = weight.data.cpu()
    policies.set_adapter("default")
    return policies


def adapter_weights(policies, name: str) -> dict[str, Tensor]:
    """The live tensors of one adapter, keyed by the parameter's name without the adapter's."""
    return {key.replace(f".{name}.", "."): weight for key, weight in policies.named_parameters() if f".{name}." in key}


@torch.no_grad()
def copy_adapter(policies, source: str, target: str, weight: float = 1.0) -> None:
    """target <- (1 - weight) * target + weight * source, tensor by tensor."""
    ours, theirs = adapter_weights(policies, target), adapter_weights(policies, source)
    for key in ours:
        ours[key].lerp_(theirs[key].to(ours[key].device), weight)


@contextlib.contextmanager
def acting(policies, name: str):
    """Lets one policy act: "default", "old", "ema" (which a GPU run keeps on the CPU), or "initial" (adapters off)."""
    if name == "initial":
        with policies.disable_adapter():
            yield
        return
    policies.set_adapter(name)
    try:
        yield
    finally:
        policies.set_adapter("default")
