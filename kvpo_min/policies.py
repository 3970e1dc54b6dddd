"""Policies are adapters on one base model: `default` (trained), `old` (makes the rollouts), `ema` (moving average, to
be measured or exported; no update reads it). The initial policy is the base with its adapters switched off."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpo_min.system import not_finite, sync, writing

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


def load_adapter(pipeline, folder: str | Path):
    """Puts a saved LoRA on the pipeline's transformer, ready to sample. -> the peft model

    Raises FileNotFoundError when a file is missing and ValueError when it is damaged, no LoRA, or made for another
    model; the pipeline is then as it was."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import safe_open

    folder, transformer = Path(folder).expanduser(), pipeline.backbone.transformer
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder that it lies in, with its adapter_config.json")
    if (folder / "state.json").is_file():
        how = f"kvpo-min export --layout peft --adapter {folder / 'default.safetensors'}"
        raise ValueError(f"{folder} is a checkpoint, not an adapter: make one of it first, with {how}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter: it has no {name}")
    if any("lora_" in name for name, _ in transformer.named_parameters()):
        raise ValueError("the model has an adapter already: load it again before you load another")
    try:
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "LORA":
            raise ValueError("peft_type is not LORA")
        config = LoraConfig.from_pretrained(folder)
        if config.megatron_config:  # peft would import a module of the config's choice
            raise ValueError("megatron_config is not supported")
        config.base_model_name_or_path = None  # a note for readers; peft would compare it with the base's path
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}
            header = file.metadata() or {}
        alphas = {float(config.lora_alpha), float(header.get("lora_alpha", config.lora_alpha))}
        if len(alphas) > 1:
            raise ValueError(f"two alphas are written with it, {alphas}: keep the one it was trained with")
        if not 0 < min(alphas) < math.inf:
            raise ValueError(f"expected an alpha above 0, got {min(alphas)}")
    except Exception as error:  # JSON, safetensors and peft have kinds of their own
        raise ValueError(f"{folder}: the adapter is damaged or not a LoRA: {error or type(error).__name__}") from None
    if broken := not_finite(saved):
        raise ValueError(f"{folder}: the adapter's {broken[0]} holds numbers that are not finite")
    try:
        with torch.device("meta"):  # first on a model without weights: what fails half-way would leave its layers
            trial = get_peft_model(type(transformer).from_config(transformer.config), copy.deepcopy(config))
    except Exception as error:  # peft found none of the layers, or cannot use what the config says
        raise ValueError(f"{folder}: the adapter was made for another model: {error or type(error).__name__}") from None
    wanted = get_peft_model_state_dict(trial, save_embedding_layers=False)
    wrong = [key for key in sorted({*wanted, *saved}) if not same_shape(wanted.get(key), saved.get(key))]
    if wrong:
        raise ValueError(
            f"{folder}: the adapter was made for another model, or is incomplete: {len(wrong)} of its tensors do not "
            f"fit, the first is {wrong[0]}"
        )
    with torch.random.fork_rng([]):  # peft draws first what is then replaced
        policies = get_peft_model(transformer, config)
    set_peft_model_state_dict(policies, saved)
    return policies.requires_grad_(False).eval()


def base_hash(policies) -> str:
    """Of the frozen weights, by their first numbers: tells one base from another that lies under the same path."""
    found = hashlib.sha256()
    for name, weight in policies.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")  # as it is called without adapters
        if "lora_" not in name:
            found.update(f"{name} {tuple(weight.shape)}".encode())
            first = weight.detach().flatten()[:64].to("cpu", torch.bfloat16)  # the same in whatever precision it runs
            found.update(first.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


def same_shape(a, b) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def save_adapter(policies, folder: Path, base: str) -> None:
    """The trained policy (adapter `default`) as peft writes it, at the top of the folder. Raises OSError."""
    policies.peft_config["default"].base_model_name_or_path = base
    aside = folder / "adapter.aside"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed: peft would read the model card in it
    try:
        with writing(aside):
            policies.save_pretrained(str(aside), selected_adapters=["default"], save_embedding_layers=False)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                sync(aside / name)
                os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
