"""Reads public checkpoints of Wan2.1-T2V-1.3B and of the models distilled from it; writes a LoRA in their layouts.

| what | layout |
|---|---|
| Wan2.1 in diffusers layout | a folder with `transformer/config.json` and safetensors |
| Self-Forcing, LongLive base, KVPO base | `.pt` with `generator_ema`, `generator` or `model`, original Wan key names |
| LongLive and KVPO LoRA | `.pt`, raw peft names or under `generator_lora`, original Wan key names, alpha = rank |
| our checkpoints | `default.safetensors`, or the moving average `ema.safetensors`, beside `state.json` |
| MemFlow base and LoRA | the same two; its memory bank has no weights, so nothing inside tells them from LongLive's |
| a LoRA of ours | a peft folder: `adapter_config.json` and `adapter_model.safetensors` |
| a LoRA for `WanPipeline.load_lora_weights` | `pytorch_lora_weights.safetensors` |

A `.pt` may also come as `.safetensors` with the same keys, and a source may be `owner/name` or
`owner/name/path/of/a/file.pt` on the Hub. Files are read as tensors only: no code in them is run. What does not fit is
a ValueError that names the file, what was expected and what to do.

Difference from the authors (models/longlive/trainer/kvpo.py:275-302), who go on training the released LoRA: here it is
merged into the base, so the initial policy is the base with the new adapter off. `stack_loras` joins the two again.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min.system import load_tensors, not_finite, read_text, read_yaml, say, sync, writing

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
GENERATORS = ("generator_ema", "generator", "model")  # the average first, as Self-Forcing's own inference takes it
LORAS = ("generator_lora",)
ALPHAS = ("lora_alpha", "network_alpha", "alpha")  # how a LoRA's scale is called, also at the end of longer names
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("base_model.", "model.", "diffusion_model.", "transformer.", "module.")
ORIGINAL = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
TO_ORIGINAL = {
    ".attn1.": ".self_attn.", ".attn2.": ".cross_attn.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
    ".to_out.0.": ".o.", ".ffn.net.0.proj.": ".ffn.0.", ".ffn.net.2.": ".ffn.2.",
}  # fmt: skip
SIZES = (  # the layers whose shapes tell all sizes
    "patch_embedding", "proj_out", "blocks.0.ffn.net.0.proj", "condition_embedder.text_embedder.linear_1",
    "condition_embedder.time_embedder.linear_1",
)  # fmt: skip
HEAD_DIM = 128  # of every Wan model; shapes do not tell how many heads share a width
OTHERS = {"longlive": "LongLive", "self-forcing": "Self-Forcing", "self_forcing": "Self-Forcing"}  # without a bank


# ---------------------------------------------------------------------------------------------------------------- files


def fetch(source: str | Path, patterns: Sequence[str] | None = None) -> Path:
    """A local file or folder as it is; otherwise `owner/name` (its files that match `patterns`) or
    `owner/name/path/of/a/file.pt` from the Hub. Raises ValueError naming the source."""
    path, parts = Path(source).expanduser(), str(source).split("/")
    if path.exists():
        return path
    is_file = path.suffix in SUFFIXES
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", str(source)) or (len(parts) < 3 if is_file else len(parts) != 2):
        raise ValueError(f"{source}: there is no such file or folder")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if is_file:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:  # network, licence, disk: each library below has its own kinds
        raise ValueError(f"{source} is no local file or folder, and the Hub says: {first_line(error)}") from None


def read_file(path: Path) -> tuple[dict, dict]:
    """What a .safetensors or .pt file holds, and its metadata (safetensors only), without running code of the file.
    Raises ValueError for one that is empty, cut short, or holds more than tensors."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        content = load_tensors(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: expected nothing but tensors, numbers and dicts of them; it holds other Python "
            f"objects, and reading those could run code ({first_line(error)}). Save its weights alone, as safetensors"
        ) from None
    except Exception as error:  # a damaged zip, pickle or header can raise nearly anything
        kind = "safetensors" if path.suffix == ".safetensors" else "what torch.save writes (a zip file)"
        raise ValueError(
            f"{path} cannot be read: expected {kind}; it is cut short, damaged or something else "
            f"({type(error).__name__}: {first_line(error)}). Download it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got a {type(content).__name__}")
    return content, {}


def file_of(path: Path, names: Sequence[str], expected: str) -> Path:
    """`path` if it is a file, else the one of `names` that the folder holds."""
    found = [p for p in (path, *(path / name for name in names)) if p.is_file()]
    if len(found) != 1:
        held = f", but it holds {', '.join(p.name for p in found)}" if found else ""
        raise ValueError(f"{path}: expected a folder with {expected}{held}; or name the file itself")
    return found[0]


def tensors_of(content: Mapping, names: Sequence[str], which: str = "") -> dict[str, Tensor]:
    """The state dict under `which`, by default under the first of `names` that is there, else `content` itself. Where
    there is a choice, a line says what was taken."""
    choice = [name for name, part in content.items() if isinstance(part, dict) and has_tensors(part)]
    taken = which or next((name for name in names if name in choice), "")
    if which and which not in choice:
        raise ValueError(f"expected weights under {which!r}, found {some(choice or content)}")
    if taken and len(choice) > 1 and not which:
        say(f"kvpo-min: of the weights {', '.join(choice)}, {taken} is taken; --weights_name NAME takes another")
    found = content[taken] if taken else content
    found = {k: v for k, v in found.items() if alpha_of(k) is None}  # `scales_in` reads those
    if not has_tensors(found):
        raise ValueError(f"expected tensors at the top or under {' or '.join(names)}, found {some(content)}")
    if odd := [k for k, v in found.items() if v.layout != torch.strided or v.is_complex() or v.is_meta]:
        raise ValueError(f"expected dense tensors of real numbers, but these are not: {some(odd)}")
    # a view can claim any size
    if large := [k for k, v in found.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]:
        raise ValueError(f"these claim more numbers than the file holds: {some(large)}")
    return found


def has_tensors(part: Mapping) -> bool:
    """Whether a dict is one of tensors, beside which scales may stand."""
    rest = {key: value for key, value in part.items() if alpha_of(key) is None}
    return bool(rest) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in rest.items())


def from_folder(cls, folder: Path, **kwargs):
    """`cls.from_pretrained` (diffusers, transformers) of a local folder, safetensors only; -> frozen, eval mode.
    Where the library would draw a missing weight at random, this raises ValueError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no {cls.__name__}: it has no config.json")
    try:
        model, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **kwargs
        )
    except PermissionError:
        raise
    except Exception as error:  # see read_file
        raise ValueError(
            f"{folder} cannot be loaded as a {cls.__name__}: expected config.json and safetensors that fit it "
            f"({first_line(error)}). Download the folder again"
        ) from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise ValueError(f"{folder} is no whole {cls.__name__}: {what.replace('_', ' ')} {some(report[what])}")
    if broken := not_finite(model.state_dict()):
        raise ValueError(f"{folder}: these weights are not finite: {some(broken)}. Download the folder again")
    return model.eval().requires_grad_(False)


@contextmanager
def naming(path: str | Path):
    """Puts the file's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def some(names) -> str:
    """The first few of many names."""
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


# ----------------------------------------------------------------------------------------------------------------- base


def wan_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or LoRA weights under original Wan names, in whatever wrapping, -> diffusers' names, by diffusers' own
    converter. Names that are diffusers' already only lose their wrapping. Raises ValueError for other models' keys."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    bare = {}
    for key, tensor in state_dict.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if key in bare:
            raise ValueError(f"the key {key} is there twice, under two prefixes; keep one")
        bare[key] = tensor
    if any("bank" in key for key in bare):
        raise ValueError("its keys name a memory bank: expected none, since MemFlow's bank has no weights")
    if any(part in key for key in bare for part in (".attn1.", ".attn2.", ".ffn.net.", "condition_embedder.")):
        return bare
    strange = [key for key in bare if key.split(".")[0] not in ORIGINAL]
    if strange:
        raise ValueError(
            f"expected the keys of a Wan text-to-video transformer ({', '.join(ORIGINAL)}), found {some(strange)}; "
            f"image-to-video and other variants are not supported"
        )
    return convert_wan_transformer_to_diffusers(bare)


def wan_config_from(state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> dict:
    """Arguments of `WanTransformer3DModel`, from the shapes of weights under diffusers' names. Shapes do not tell the
    number of heads: by default a head is 128 wide, as in all of Wan's models. Raises ValueError."""
    keys = [f"{name}.weight" for name in SIZES]
    if missing := [key for key in keys if key not in state_dict]:
        raise ValueError(f"expected the weights of a whole Wan transformer, but these are missing: {some(missing)}")
    shapes = [tuple(state_dict[key].shape) for key in keys]
    if [len(shape) for shape in shapes] != [5, 2, 2, 2, 2]:
        raise ValueError(f"these are no shapes of a Wan transformer: {dict(zip(keys, shapes, strict=True))}")
    (dim, in_channels, *patch), (out, _), (ffn_dim, _), (_, text_dim), (_, freq_dim) = shapes
    heads = num_heads or dim // HEAD_DIM
    if not heads or dim % heads or dim // heads % 2 or out % math.prod(patch):
        raise ValueError(f"width {dim} and {out} outputs are no sizes of a Wan transformer (heads of {HEAD_DIM})")
    return dict(
        patch_size=tuple(patch), num_attention_heads=heads, attention_head_dim=dim // heads, in_channels=in_channels,
        out_channels=out // math.prod(patch), text_dim=text_dim, freq_dim=freq_dim, ffn_dim=ffn_dim,
        num_layers=len({key.split(".")[1] for key in state_dict if key.startswith("blocks.")}),
        cross_attn_norm="blocks.0.norm2.weight" in state_dict,
    )  # fmt: skip


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises ValueError that lists keys which are missing, left over, or of another shape."""
    shapes = {key: (list(t.shape), list(wanted[key].shape)) for key, t in found.items() if key in wanted}
    lists = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [f"{key} {ours} instead of {theirs}" for key, (ours, theirs) in shapes.items()
                             if ours != theirs],
    }  # fmt: skip
    wrong = "; ".join(f"{name}: {some(keys)}" for name, keys in lists.items() if keys)
    if wrong:
        raise ValueError(f"the weights do not fit ({wrong}). Is it the whole file, and made for this model?")


def transformer_from(state_dict: Mapping[str, Tensor], num_heads: int | None = None):
    """A frozen `WanTransformer3DModel` in float32 with these weights, original or diffusers' names. Raises
    ValueError."""
    from diffusers import WanTransformer3DModel

    if any(".lora_" in key for key in state_dict):
        raise ValueError("this is a LoRA, not a model: give the base model, and this file as its lora")
    state = wan_from_original(state_dict)
    config = wan_config_from(state, num_heads)
    with torch.device("meta"):  # no second copy of the weights, and no time for drawing them at random
        transformer = WanTransformer3DModel(**config)
    check_fit(state, transformer.state_dict())
    if broken := not_finite(state):
        raise ValueError(f"these weights are not finite: {some(broken)}. Download it again")
    # a copy: the memory-mapped file may be replaced or deleted while the model lives
    transformer.load_state_dict({key: t.to(torch.float32, copy=True) for key, t in state.items()}, assign=True)
    rope = transformer.rope  # its tables are no weights: made again, off the meta device
    transformer.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    return transformer.eval().requires_grad_(False)


def check_variant(source: str | Path, memflow: bool) -> None:
    """Raises ValueError for a file that is of another model by its file or folder name: no key tells MemFlow's from
    LongLive's, and the wrong one would run without a word. Names that say nothing are taken as told."""
    for part in map(str.lower, reversed(Path(source).absolute().parts[-3:])):
        theirs, other = "memflow" in part, next((name for word, name in OTHERS.items() if word in part), "")
        if theirs == bool(other):  # neither, or both
            continue
        if theirs and not memflow:
            raise ValueError(
                f"{source}: this is a MemFlow checkpoint, by its file or folder name, and would be run without its "
                f"memory bank: give bank_size 3, as in configs/memflow_single_gpu.yaml, or rename it"
            )
        if other and memflow:
            raise ValueError(
                f"{source}: this is a {other} checkpoint, by its file or folder name, and would be run with MemFlow's "
                f"memory bank: leave bank_size out, or rename it if it is MemFlow's"
            )
        return


def load_transformer(
    source: str | Path, lora: str | Path | None = None, dtype: torch.dtype = torch.bfloat16,
    num_heads: int | None = None, memflow: bool = False, which: str = "", alpha: float = 0.0,
):  # fmt: skip
    """A frozen `WanTransformer3DModel` on the CPU from any layout in the table above, with a released LoRA merged into
    it (in float32, then cast). What diffusers keeps in float32 (norms, time embedder, modulation) stays so. `memflow`:
    that both are MemFlow's; `which`: the name of the weights in a file that holds several; `alpha`: the LoRA's, where
    it is not written with it. Raises ValueError naming the file."""
    from diffusers import WanTransformer3DModel

    for file in (source, lora) if lora else (source,):
        check_variant(file, memflow)
    path = fetch(source, ["transformer/*", "config.json", "diffusion_pytorch_model*"])
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config = folder / "config.json"
    if config.is_file() and "WanTransformer3DModel" in config.read_text(errors="replace"):
        if which:
            raise ValueError(f"{source}: weights_name is for files with several weights, and this is a folder of one "
                             f"model: leave it out, got {which!r}")  # fmt: skip
        transformer = from_folder(WanTransformer3DModel, folder, dtype=torch.float32)
    else:
        expected = "transformer/config.json of a WanTransformer3DModel, or Wan's diffusion_pytorch_model.safetensors"
        file = file_of(path, ["diffusion_pytorch_model.safetensors"], expected)
        content, _ = read_file(file)
        with naming(file):
            transformer = transformer_from(tensors_of(content, GENERATORS, which), num_heads)
    if lora:
        adapter = read_lora(lora, alpha)
        with naming(lora):
            merge_lora(transformer, adapter)
    exact = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, weight in transformer.named_parameters():
        if not exact & set(name.split(".")):
            weight.data = weight.data.to(dtype)
    return transformer


# ----------------------------------------------------------------------------------------------------------------- LoRA


@dataclass(frozen=True)
class Lora:
    """W x + alpha / rank * B A x. Keys: `<diffusers name of the layer>.lora_A.weight` [rank, in] and `.lora_B.weight`
    [out, rank], float32."""

    weights: dict[str, Tensor]
    alpha: float

    @property
    def modules(self) -> list[str]:
        return [key.removesuffix(".lora_A.weight") for key in self.weights if key.endswith(".lora_A.weight")]

    @property
    def rank(self) -> int:
        return len(self.weights[f"{self.modules[0]}.lora_A.weight"])

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A [rank, in], and alpha / rank * B [out, rank]"""
        a, b = (self.weights[f"{module}.lora_{x}.weight"] for x in "AB")
        return a, b * (self.alpha / self.rank)


def lora_from(state_dict: Mapping[str, Tensor], alpha: float | None = None) -> Lora:
    """Takes peft names, of original or diffusers' layers, in any wrapping. Without `alpha` it is the rank, as the
    authors configure it (configs/train_kvpo_longlive.yaml:216-221). Raises ValueError."""
    plain = {re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key): t for key, t in state_dict.items()}
    strange = [key for key in plain if not re.search(r"\w\.lora_[AB]\.weight$", key)]
    if strange:
        raise ValueError(f"expected a LoRA, keys ending in lora_A.weight and lora_B.weight; found {some(strange)}")
    weights = {key: t.to(torch.float32, copy=True).contiguous() for key, t in wan_from_original(plain).items()}
    a_keys, b_keys = ({key for key in weights if name in key} for name in ("lora_A", "lora_B"))
    alone = {key.replace("lora_A", "lora_B") for key in a_keys} ^ b_keys
    ranks = {t.shape[key in b_keys] if t.ndim == 2 else None for key, t in weights.items()}
    if alone or len(ranks) != 1 or ranks & {None, 0}:
        raise ValueError(
            f"expected matrices lora_A [rank, in] and lora_B [out, rank] for every layer, all of one rank; "
            f"ranks: {some(ranks)}; without a partner: {some(alone)}"
        )
    (rank,) = ranks
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"expected an alpha above 0, got {alpha}")
    if broken := not_finite(weights):
        raise ValueError(f"these hold numbers that are not finite: {some(broken)}")
    return Lora(weights, float(rank if alpha is None else alpha))


def read_lora(source: str | Path, alpha: float = 0.0) -> Lora:
    """A LoRA from any layout in the table above. Its alpha is `alpha`, if that is not 0, else the one that is written
    with it (`scales_in`), else its rank, as the authors configure it. Raises ValueError naming the file."""
    names = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "lora.pt")
    path = fetch(source, ["adapter_config.json", *names])
    file = file_of(path, names, " or ".join(names))
    content, header = read_file(file)
    with naming(file):
        try:
            beside = [json.loads(read_text(file.with_name(name))) for name in ("adapter_config.json", "state.json")
                      if file.with_name(name).is_file()]  # fmt: skip
            beside += [json.loads(text) for key, text in header.items() if key == "lora_adapter_metadata"]
            others = [json.loads(text) for key, text in header.items() if text.lstrip().startswith("{")]
            others += [theirs for theirs in [yaml_beside(file)] if theirs]
            configs = [{str(key).removeprefix("transformer."): value for key, value in config.items()}
                       for config in (one.get("config", one) for one in beside)]  # fmt: skip
            written = {float(config["lora_alpha"]) for config in configs}
            written |= {float(value) for part in (content, header, *others) for value in scales_in(part)}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, RuntimeError):
            raise ValueError("its adapter_config.json, state.json, header or alpha is damaged") from None
        special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")
        if used := [name for config in configs for name in special if config.get(name)]:
            raise ValueError(f"expected a plain LoRA of one rank and alpha, but it uses {', '.join(used)}")
        if len(written) > 1 and not alpha:
            raise ValueError(f"expected one alpha, but {some(sorted(written))} are written; --lora_alpha settles it")
        lora = lora_from(tensors_of(content, LORAS), alpha or next(iter(written), None))
        ranks = {config[key] for config in configs for key in ("r", "rank") if key in config}
        if ranks - {lora.rank}:
            raise ValueError(f"its config says rank {some(ranks)}, but its matrices have rank {lora.rank}")
    if not written and not alpha:
        say(f"kvpo-min: {file}: no alpha is written with this LoRA, so it is its rank, {lora.rank}, as the authors'")
    return lora


def yaml_beside(file: Path) -> dict:
    """The authors' config.yaml in a LoRA's folder: its part `adapter`, with `rank` and `alpha`. Another file of that
    name says nothing."""
    try:
        config = read_yaml(file.with_name("config.yaml"))
    except (OSError, ValueError):
        return {}
    return config["adapter"] if isinstance(config.get("adapter"), dict) else {}


def alpha_of(name) -> str | None:
    """The name itself, if it is one of a LoRA's scale, alone or at the end of a longer one."""
    return name if isinstance(name, str) and re.search(rf"(^|[._])({'|'.join(ALPHAS)})$", name) else None


def scales_in(content, depth: int = 3) -> Iterator:
    """What is written under names of a scale in a file's header, or beside its tensors, as in {"lora": {...}, "config":
    {"lora_alpha": 8}}."""
    for name, value in content.items() if depth else ():
        if alpha_of(name):
            yield value
        elif isinstance(value, dict):
            yield from scales_in(value, depth - 1)


@torch.no_grad()
def merge_lora(transformer, lora: Lora) -> None:
    """W <- W + alpha / rank * B A, in place. Raises ValueError when a layer is missing or has another shape."""
    targets = {f"{module}.weight": lora.pair(module) for module in lora.modules}
    weights = {name: weight for name, weight in transformer.named_parameters() if name in targets}
    check_fit({name: b.new_empty((len(b), a.shape[1]), device="meta") for name, (a, b) in targets.items()}, weights)
    for name, weight in weights.items():
        a, b = targets[name]
        weight += (b @ a).to(weight)
    if broken := not_finite(weights):
        raise ValueError(f"with it these weights are not finite: {some(broken)}; is its alpha {lora.alpha:g} right?")


def stack_loras(*loras: Lora) -> Lora:
    """One LoRA that does what all do, its rank the sum of theirs: for programs that load only one."""
    layers: dict[str, list] = {}
    for k, lora in enumerate(loras):
        for module in lora.modules:
            layers.setdefault(module, [None] * len(loras))[k] = lora.pair(module)
    weights = {}
    for module, pairs in layers.items():
        a, b = next(pair for pair in pairs if pair)
        nothing = [(a.new_zeros(lora.rank, a.shape[1]), b.new_zeros(len(b), lora.rank)) for lora in loras]
        pairs = [pair or zeros for pair, zeros in zip(pairs, nothing, strict=True)]
        weights[f"{module}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        weights[f"{module}.lora_B.weight"] = torch.cat([b for _, b in pairs], 1)
    return Lora(weights, float(sum(lora.rank for lora in loras)))


def export_lora(lora: Lora, folder: str | Path, layout: str) -> Path:
    """Writes a LoRA, whole or not at all -> the file. layout "peft": adapter_config.json and adapter_model.safetensors;
    "diffusers": for `WanPipeline.load_lora_weights`, alpha in the header; "authors": lora.pt, `generator_lora` under
    original key names. Theirs holds no alpha (their YAML has it, equal to the rank), so alpha / rank goes into B.
    Raises ValueError for a scale that its numbers do not bear, and OSError."""
    if layout not in (names := {"authors": "lora.pt", "peft": "adapter_model.safetensors",
                                "diffusers": "pytorch_lora_weights.safetensors"}):  # fmt: skip
        raise ValueError(f"layout must be peft, diffusers or authors, got {layout!r}")
    if broken := not_finite({module: lora.pair(module)[1] for module in lora.modules}):
        raise ValueError(f"with alpha {lora.alpha:g} these are not finite: {some(broken)}; give a smaller --lora_alpha")
    folder = Path(folder)
    aside = folder / "export.aside"
    shutil.rmtree(aside, ignore_errors=True)  # of a call that was killed
    try:
        with writing(aside):
            aside.mkdir(parents=True)
            write_layout(lora, aside, layout)
            for path in sorted(aside.iterdir()):
                sync(path)
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / names[layout]


def write_layout(lora: Lora, folder: Path, layout: str) -> None:
    if layout == "authors":
        state = {}
        for module in lora.modules:
            for x, tensor in zip("AB", lora.pair(module), strict=True):
                key = f".{module}.lora_{x}.weight"
                for ours, theirs in TO_ORIGINAL.items():
                    key = key.replace(ours, theirs)
                state[f"base_model.model{key}"] = tensor
        content = io.BytesIO()  # torch.save to a file does not say when the disk is full
        torch.save({"generator_lora": state}, content)
        (folder / "lora.pt").write_bytes(content.getbuffer())
        return

    from peft import LoraConfig

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.modules, lora_dropout=0.0, bias="none")
    if layout == "peft":
        from safetensors.torch import save_file

        config.save_pretrained(folder)
        save_file({f"base_model.model.{k}": t for k, t in lora.weights.items()}, folder / "adapter_model.safetensors")
    else:
        from diffusers import WanPipeline

        WanPipeline.save_lora_weights(
            folder, transformer_lora_layers=lora.weights, transformer_lora_adapter_metadata=config.to_dict()
        )
