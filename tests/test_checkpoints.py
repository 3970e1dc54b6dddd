"""Checkpoints in and out: every public layout, written small by these tests, and files that must be refused."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from kvpo_min.train import LORA_TARGETS
from kvpo_min.wan import checkpoints
from kvpo_min.wan.checkpoints import Lora, export_lora, load_transformer, merge_lora, read_lora, stack_loras

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(os.environ.get("KVPO_GOLDEN") or Path(__file__).parent / "golden")
SHAPES = json.loads((GOLDEN / "wan_1_3b_state_dict_shapes.json").read_text())  # the authors' names, the full model
RENAMED = (  # diffusers' names -> original ones, written down here a second time
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"), ("norm2", "norm3"),
    ("attn1.to_q", "self_attn.q"), ("attn1.to_k", "self_attn.k"), ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"), ("attn2.to_q", "cross_attn.q"), ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"), ("attn2.to_out.0", "cross_attn.o"), ("attn1.norm", "self_attn.norm"),
    ("attn2.norm", "cross_attn.norm"), ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
)  # fmt: skip
RANK, ALPHA = 4, 10.0


def original(state):
    """diffusers' names -> original Wan names"""
    out = {}
    for key, tensor in state.items():
        key = key.replace("scale_shift_table", "modulation" if key.startswith("blocks") else "head.modulation")
        for ours, theirs in RENAMED:
            key = key.replace(ours, theirs)
        out[key] = tensor
    return out


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def write(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(transformer):
    """Velocity of one fixed input."""
    timestep, text = torch.tensor([600.0]), draw(1, 5, transformer.config.text_dim, seed=1)
    return transformer(draw(1, 8, 3, 4, 4), timestep, text, return_dict=False)[0]


@pytest.fixture(scope="module")
def base(make_transformer):
    return make_transformer()


@pytest.fixture(scope="module")
def weights(base):
    return base.state_dict()


@pytest.fixture(scope="module")
def trained(make_transformer):
    """peft's own model with a LoRA that does something, on the layers that training uses, alpha not the rank"""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LORA_TARGETS, exclude_modules=r".*\.attn2\.to_k")
    model = peft.get_peft_model(make_transformer(), config)
    for k, (name, weight) in enumerate(sorted(model.named_parameters())):
        if "lora_" in name:
            weight.data = 0.2 * draw(*weight.shape, seed=k)
    return model


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    """The folder that peft itself writes."""
    folder = tmp_path_factory.mktemp("peft")
    trained.save_pretrained(str(folder))
    return folder


# ----------------------------------------------------------------------------------------------------------------- base


LAYOUTS = {
    "Self-Forcing": ("sf.pt", lambda w: {"generator_ema": prefixed(original(w), "model._fsdp_wrapped_module.")}),
    "LongLive": ("longlive_base.pt", lambda w: {"generator": prefixed(original(w), "model."), "step": 3000}),
    "under model": ("base.pt", lambda w: {"model": prefixed(original(w), "model.")}),
    "bare": ("wan.pth", original),
    "safetensors": ("longlive_base.safetensors", lambda w: prefixed(original(w), "model.")),
    "Wan's own": ("diffusion_pytorch_model.safetensors", original),
    "diffusers' names": ("wan.safetensors", dict),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout, base, weights, tmp_path):
    name, wrap = LAYOUTS[layout]
    path = write(tmp_path / name, wrap(weights))
    loaded = load_transformer(path, dtype=torch.float32, num_heads=2)
    path.unlink()  # the model must not live on in the file
    assert_close(forward(loaded), forward(base), rtol=0, atol=0)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    wanted = {k: v for k, v in base.config.items() if not k.startswith("_") and k != "rope_max_seq_len"}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.config.items() if k in wanted} == wanted


def test_of_several_weights_the_average_is_taken_or_the_one_that_is_named(weights, tmp_path, capsys):
    """As Self-Forcing's own inference takes them; a line says what was taken where there was a choice."""
    names = {"generator": 2.0, "critic": 3.0, "generator_ema": 1.0}
    content = {name: {key: k * tensor for key, tensor in original(weights).items()} for name, k in names.items()}
    path, key = write(tmp_path / "both.pt", content), "blocks.0.attn1.to_q.weight"
    for which, k in (("", 1.0), ("generator", 2.0), ("critic", 3.0)):
        loaded = load_transformer(path, dtype=torch.float32, num_heads=2, which=which).state_dict()
        assert_close(loaded[key], k * weights[key], rtol=0, atol=0)
        said = capsys.readouterr().err
        assert ("generator_ema is taken" in said and "--weights_name" in said) == (not which)
    write(path, {"generator": content["generator"], "step": 3})
    load_transformer(path, num_heads=2)
    assert not capsys.readouterr().err  # there is no choice
    with pytest.raises(ValueError, match="both.pt.*'ema'.*generator"):
        load_transformer(path, num_heads=2, which="ema")


def test_weights_that_are_not_finite_are_refused_by_name(base, weights, adapter, tmp_path):
    for value in (float("nan"), float("inf")):
        bad = {key: tensor.clone() for key, tensor in weights.items()}
        bad["blocks.1.attn1.to_q.weight"][0, 0] = value
        with pytest.raises(ValueError, match="wan.pt: .*not finite: blocks.1.attn1.to_q.weight"):
            load_transformer(write(tmp_path / "wan.pt", original(bad)), num_heads=2)
        base.save_pretrained(tmp_path / "transformer")
        save_file({key: t.contiguous() for key, t in bad.items()},
                  tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")  # fmt: skip
        with pytest.raises(ValueError, match="transformer.*not finite: blocks.1.attn1.to_q.weight"):
            load_transformer(tmp_path)


def test_files_that_claim_more_than_they_hold_are_refused_before_they_are_read(tmp_path):
    """A header of 2^60 bytes, a compressed archive, and a view of 2^40 numbers on one."""
    header, bomb, view = tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "c.pt"
    header.write_bytes((2**60).to_bytes(8, "little") + b"{}" + bytes(64))
    torch.save({"generator": {"a": torch.zeros(2**18)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    assert bomb.stat().st_size < 2**17
    write(view, {"blocks.0.a.lora_A.weight": torch.zeros(1).expand(2**40)})
    for path, said in ((header, "cannot be read"), (bomb, "compressed"), (view, "claim more numbers")):
        for read in (load_transformer, read_lora):
            with pytest.raises(ValueError, match=f"{path.name}.*{said}"):
                read(path)


def test_folders(base, weights, tmp_path):
    base.save_pretrained(tmp_path / "diffusers" / "transformer")
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "WanModel", "num_heads": 2}')
    write(tmp_path / "wan" / "diffusion_pytorch_model.safetensors", original(weights))
    for source in (tmp_path / "diffusers", tmp_path / "diffusers" / "transformer", tmp_path / "wan"):
        loaded = load_transformer(source, dtype=torch.float32, num_heads=2)
        assert_close(dict(loaded.state_dict()), dict(weights), rtol=0, atol=0)
        assert_close(forward(loaded), forward(base), rtol=0, atol=2e-6)  # weights that lie elsewhere in memory


def test_bfloat16_keeps_what_diffusers_keeps_in_float32(base, weights, tmp_path):
    base.save_pretrained(tmp_path / "transformer")
    reference = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", dtype=torch.bfloat16)
    for source in (tmp_path, write(tmp_path / "wan.pt", original(weights))):
        loaded = load_transformer(source, num_heads=2)
        assert_close(dict(loaded.state_dict()), dict(reference.state_dict()), rtol=0, atol=0)  # dtypes are compared too
        assert_close(loaded.rope.freqs_cos[:160], reference.rope.freqs_cos, rtol=0, atol=0)


def test_the_full_model_fits_without_an_option():
    state = {f"model.{key}": torch.empty(shape, device="meta") for key, shape in SHAPES.items()}
    state = checkpoints.wan_from_original(state)
    config = checkpoints.wan_config_from(state)
    assert config == dict(
        patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30, cross_attn_norm=True,
    )  # fmt: skip
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config)
    checkpoints.check_fit(state, transformer.state_dict())
    assert {k: list(t.shape) for k, t in original(transformer.state_dict()).items()} == SHAPES  # this file's renaming


def test_the_authors_weights_give_the_authors_output():
    """the first block of the recorded run reads no history"""
    info = json.loads((GOLDEN / "causal_wan_tiny.json").read_text())
    io = load_file(GOLDEN / "causal_wan_tiny_io.safetensors")
    heads, call = info["config"]["num_heads"], info["calls"][0]
    loaded = load_transformer(GOLDEN / "causal_wan_tiny.safetensors", dtype=torch.float32, num_heads=heads)
    x, timestep = io[call["input"]].transpose(1, 2), torch.tensor([call["timestep"]])
    with torch.no_grad():
        v = loaded(x, timestep, io["text_embeds"], return_dict=False)[0].transpose(1, 2)
    assert_close(v, io[call["output"]], rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- refused files


class Code:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def changed(weights, **tensors):
    return {**original(weights), **{key.replace("__", "."): tensor for key, tensor in tensors.items()}}


REFUSED = {
    "empty": (lambda d, w: (d / "a.pt").touch() or d / "a.pt", "empty"),
    "cut pt": (lambda d, w: cut(write(d / "a.pt", original(w))), "cut short"),
    "cut safetensors": (lambda d, w: cut(write(d / "a.safetensors", original(w))), "cut short"),
    "text": (lambda d, w: (d / "a.pt").write_text("<html>not found</html>") and d / "a.pt", "torch.save"),
    "pointer": (lambda d, w: (d / "a.pt").write_text("version https://git-lfs.github.com\n") and d / "a.pt", "git lfs"),
    "code": (lambda d, w: write(d / "a.pt", {"generator": Code(d / "ran")}), "could run code"),
    "bare pickle": (lambda d, w: (d / "a.pt").write_bytes(pickle.dumps(Code(d / "ran"))) and d / "a.pt", "cannot be"),
    "pickle as safetensors": (
        lambda d, w: (d / "a.safetensors").write_bytes(pickle.dumps(Code(d / "ran"))) and d / "a.safetensors",
        "expected safetensors",
    ),
    "another ending": (lambda d, w: (d / "a.zip").write_text("x") and d / "a.zip", "ends in"),
    "a list": (lambda d, w: write(d / "a.pt", [torch.zeros(2)]), "got a list"),
    "no tensors": (lambda d, w: write(d / "a.pt", {"generator": {"step": 3}}), "expected tensors"),
    "nothing": (lambda d, w: write(d / "a.pt", {}), "found nothing"),
    "another model": (lambda d, w: write(d / "a.pt", {"conv1.weight": torch.zeros(2, 2)}), "conv1.weight"),
    "image to video": (lambda d, w: write(d / "a.pt", changed(w, img_emb__proj=torch.zeros(2))), "image-to-video"),
    "half of it": (
        lambda d, w: write(d / "a.pt", {k: t for k, t in original(w).items() if "blocks.1" not in k or "norm3" in k}),
        "missing: blocks.1.scale_shift_table",
    ),
    "no patches": (lambda d, w: write(d / "a.pt", {"head.modulation": torch.zeros(1, 2, 4)}), "patch_embedding.weight"),
    "one too many": (lambda d, w: write(d / "a.pt", changed(w, blocks__0__extra=torch.zeros(2))), "blocks.0.extra"),
    "wrong shape": (
        lambda d, w: write(d / "a.pt", changed(w, blocks__1__self_attn__q__weight=torch.zeros(3, 24))),
        "blocks.1.attn1.to_q.weight [3, 24] instead of [24, 24]",
    ),
    "wrong sizes": (lambda d, w: write(d / "a.pt", changed(w, patch_embedding__weight=torch.zeros(8, 8))), "no shapes"),
    "twice": (
        lambda d, w: write(d / "a.pt", {"model.head.head.bias": torch.zeros(2), "head.head.bias": torch.zeros(2)}),
        "twice",
    ),
    "LoRA": (lambda d, w: write(d / "a.pt", {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 4)}), "is a LoRA"),
    "MemFlow by keys": (lambda d, w: write(d / "a.pt", changed(w, blocks__0__kv_bank=torch.zeros(2))), "memory bank"),
    "MemFlow by name": (
        lambda d, w: (d / "memflow").mkdir() or write(d / "memflow" / "base.pt", {"generator": original(w)}),
        "would be run without its memory bank: give bank_size 3",
    ),
    "no such file": (lambda d, w: d / "a.pt", "no such file"),
    "folder of something": (lambda d, w: (d / "a").mkdir() or d / "a", "transformer/config.json"),
}  # fmt: skip


@pytest.mark.parametrize("layout, name", [
    ("peft", "adapter_model.safetensors"), ("diffusers", "pytorch_lora_weights.safetensors"), ("authors", "lora.pt"),
])  # fmt: skip
def test_a_damaged_lora_of_every_layout_is_refused(layout, name, adapter, tmp_path):
    export_lora(read_lora(adapter), tmp_path, layout)
    cut(tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}.*cut short"):
            read_lora(source)


@pytest.mark.parametrize("key, read", [("generator_lora", read_lora), ("generator_ema", load_transformer)])
def test_code_under_a_known_key_is_refused(key, read, tmp_path):
    path = write(tmp_path / "a.pt", {key: Code(tmp_path / "ran")})
    with pytest.raises(ValueError, match="could run code"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_memflow_and_longlive_are_told_apart_by_name_and_not_guessed(weights, adapter, trained, tmp_path):
    """Base and LoRA of both as they are released: the same keys, other folders."""
    state, own = {"generator": prefixed(original(weights), "model.")}, read_lora(adapter)
    release = tmp_path / "checkpoints"
    memflow, longlive = release / "memflow", release / "longlive" / "models"
    for folder, name in ((memflow, "base.pt"), (longlive, "longlive_base.pt")):
        export_lora(own, folder, "authors")
        write(folder / name, state)
    with torch.no_grad():
        expected = forward(trained)  # peft's own, base and LoRA
    loads = dict(dtype=torch.float32, num_heads=2)
    for base, lora, is_memflow in (
        (memflow / "base.pt", memflow / "lora.pt", True), (longlive / "longlive_base.pt", longlive / "lora.pt", False),
    ):  # fmt: skip
        assert_close(forward(load_transformer(base, lora, memflow=is_memflow, **loads)), expected, rtol=0, atol=1e-5)
        for source in ((base, None), (write(tmp_path / "base.pt", state), lora)):
            with pytest.raises(ValueError) as caught:
                load_transformer(*source, memflow=not is_memflow, **loads)
            told = "MemFlow" if is_memflow else "LongLive"
            assert f"this is a {told} checkpoint" in str(caught.value) and "bank_size" in str(caught.value)
            assert str(source[1] or source[0]) in str(caught.value)
    for is_memflow in (False, True):  # names that say nothing, or both, are taken as told
        both = tmp_path / "longlive_and_memflow.pt"
        load_transformer(write(both, state), memflow=is_memflow, **loads)
        load_transformer(tmp_path / "base.pt", memflow=is_memflow, **loads)
    assert read_lora(memflow / "lora.pt").rank == own.rank  # a LoRA by itself needs no bank


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, weights, tmp_path):
    make, phrase = REFUSED[case]
    path = make(tmp_path, weights)
    with pytest.raises(ValueError) as caught:
        load_transformer(path, num_heads=2)
    assert type(caught.value) is ValueError and str(path) in str(caught.value) and phrase in str(caught.value)
    assert not (tmp_path / "ran").exists()
    if case not in ("one too many", "wrong shape", "half of it"):  # as a LoRA none of them is one either
        if case not in ("LoRA", "MemFlow by name", "folder of something"):
            with pytest.raises(ValueError, match=path.name):
                read_lora(path)
    assert not (tmp_path / "ran").exists()


def test_heads_that_cannot_be_told_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="width 24"):
        load_transformer(write(tmp_path / "a.pt", original(weights)))


@pytest.mark.parametrize("damage", ["cut weights", "cut config", "missing tensor", "pickle instead"])
def test_damaged_folder_is_refused(damage, base, weights, tmp_path):
    folder = tmp_path / "transformer"
    base.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    if damage == "cut weights":
        cut(file)
    elif damage == "cut config":
        (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel", ')
    elif damage == "missing tensor":
        save_file({key: tensor for key, tensor in weights.items() if key != "proj_out.bias"}, file)
    else:
        file.unlink()
        torch.save({"proj_out.bias": Code(tmp_path / "ran")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="transformer") as caught:
        load_transformer(tmp_path)
    assert type(caught.value) is ValueError
    assert ("proj_out.bias" in str(caught.value)) == (damage == "missing tensor")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------------- LoRA


def scaled(lora):
    """alpha / rank inside B: how a file without alpha says the same."""
    return {f"{m}.lora_{x}.weight": t for m in lora.modules for x, t in zip("AB", lora.pair(m), strict=True)}


LORAS = {
    "raw peft": ("lora.pt", lambda lora: prefixed(original(scaled(lora)), "base_model.model.")),
    "generator_lora": (
        "kvpo.pt",
        lambda lora: {"generator_lora": prefixed(original(scaled(lora)), "base_model.model."), "step": 8},
    ),
    "live names": (
        "live.pt",
        lambda lora: {
            key.replace(".weight", ".default.weight"): tensor
            for key, tensor in prefixed(original(scaled(lora)), "model.base_model.model._fsdp_wrapped_module.").items()
        },
    ),
    "safetensors": ("lora.safetensors", lambda lora: prefixed(original(scaled(lora)), "diffusion_model.")),
    "diffusers' names": ("ours.safetensors", lambda lora: prefixed(scaled(lora), "transformer.")),
}


@pytest.mark.parametrize("layout", LORAS)
def test_every_lora_layout_merges_to_what_peft_computes(layout, trained, weights, adapter, tmp_path):
    name, wrap = LORAS[layout]
    path = write(tmp_path / name, {k: v for k, v in wrap(read_lora(adapter)).items()})
    base = write(tmp_path / "base.pt", {"generator": original(weights)})
    loaded = load_transformer(base, lora=path, dtype=torch.float32, num_heads=2)
    with trained.disable_adapter():
        assert (forward(trained.base_model.model) - forward(loaded)).abs().max() > 0.05  # the LoRA does something
    assert_close(forward(loaded), forward(trained.base_model.model), rtol=0, atol=2e-5)


def test_peft_folder_keeps_alpha(adapter, trained, base, tmp_path):
    lora = read_lora(adapter)
    assert (lora.rank, lora.alpha) == (RANK, ALPHA) and len(lora.modules) == 2 * 9  # attn2.to_k has none
    base.save_pretrained(tmp_path / "transformer")
    merged = load_transformer(tmp_path, lora=adapter, dtype=torch.float32)
    assert_close(forward(merged), forward(trained.base_model.model), rtol=0, atol=2e-5)


SCALES = {  # where alpha 8 of a LoRA of rank 4 is written: file, what it holds, header, files beside it
    "config beside .bin": ("adapter_model.bin", dict, {}, "adapter_config.json"),
    "config beside any name": ("my_lora.safetensors", dict, {}, "adapter_config.json"),
    "kohya's header": ("a.safetensors", dict, {"ss_network_alpha": "8"}, ""),
    "header": ("a.safetensors", dict, {"lora_alpha": "8.0"}, ""),
    "beside the tensors": ("a.pt", lambda s: {"generator_lora": s, "lora_alpha": 8}, {}, ""),
    "in a config beside them": ("a.pt", lambda s: {"generator_lora": s, "config": {"adapter": {"alpha": 8}}}, {}, ""),
    "among the tensors": ("a.pt", lambda s: s | {"blocks.0.attn1.to_q.alpha": torch.tensor(8.0)}, {}, ""),
    "a state beside": ("ema.safetensors", dict, {}, "state.json"),
}


@pytest.mark.parametrize("case", SCALES)
def test_alpha_is_read_from_wherever_it_is_written(case, tmp_path, capsys):
    name, wrap, header, beside = SCALES[case]
    layer = "blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": draw(4, 24), f"{layer}.lora_B.weight": draw(24, 4, seed=1)}
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(wrap(tensors), path, header or None)
    else:
        torch.save(wrap(tensors), path)
    if beside:
        config = {"r": 4, "lora_alpha": 8} if "adapter" in beside else {"config": {"rank": 4, "lora_alpha": 8}}
        (tmp_path / beside).write_text(json.dumps(config))
    lora = read_lora(path)
    assert (lora.rank, lora.alpha) == (4, 8.0)
    assert_close(lora.pair(layer)[1], 2 * tensors[f"{layer}.lora_B.weight"], rtol=0, atol=0)
    assert not capsys.readouterr().err and read_lora(path, 6.0).alpha == 6.0  # the last word is the user's
    other = {"config": {"lora_alpha": 3}} if beside == "state.json" else {"lora_alpha": 3}
    if beside != "adapter_config.json":
        (tmp_path / "adapter_config.json").write_text(json.dumps(other | {"lora_alpha": 3}))
        with pytest.raises(ValueError, match=f"{name}: .*3.0, 8.0.*--lora_alpha"):
            read_lora(path)


def test_alpha_that_is_written_nowhere_is_the_rank_and_said(tmp_path, capsys):
    layer = "blocks.0.attn1.to_q"
    path = write(tmp_path / "a.pt", {f"{layer}.lora_A.weight": draw(4, 24), f"{layer}.lora_B.weight": draw(24, 4)})
    assert read_lora(path).alpha == 4.0 and "no alpha is written" in capsys.readouterr().err
    for odd in (
        {"alpha": "x"},
        {"lora_alpha": None},
        {"alpha": torch.zeros(2)},
        {"alpha": -1},
        {"alpha": float("nan")},
    ):
        with pytest.raises(ValueError, match="a.pt: .*alpha"):
            read_lora(write(path, torch.load(path) | odd))
        write(path, {key: t for key, t in torch.load(path).items() if "lora_A" in key or "lora_B" in key})


def test_a_folder_of_two_loras_is_not_decided(adapter, tmp_path):
    for layout in ("peft", "authors"):
        export_lora(read_lora(adapter), tmp_path, layout)
    with pytest.raises(ValueError, match="holds adapter_model.safetensors, lora.pt; or name the file"):
        read_lora(tmp_path)
    assert read_lora(tmp_path / "adapter_model.safetensors").alpha == ALPHA


def test_export_peft(adapter, trained, make_transformer, tmp_path):
    export_lora(read_lora(adapter), tmp_path, "peft")
    again = peft.PeftModel.from_pretrained(make_transformer(), str(tmp_path))
    assert_close(forward(again.base_model.model), forward(trained.base_model.model), rtol=0, atol=0)


def test_export_diffusers_loads_in_the_pipeline(adapter, trained, make_transformer, tmp_path):
    lora = read_lora(adapter)
    path = export_lora(lora, tmp_path, "diffusers")
    pipeline = WanPipeline(None, None, None, None, transformer=make_transformer())
    pipeline.load_lora_weights(str(tmp_path))
    assert_close(forward(pipeline.transformer), forward(trained.base_model.model), rtol=0, atol=1e-6)
    again = read_lora(path)
    assert again.alpha == ALPHA
    assert_close(again.weights, lora.weights, rtol=0, atol=0)


class Tree(nn.Module):
    """Modules under the authors' names."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            parent, *path = self, *name.split(".")
            for step in path[:-1]:
                if not hasattr(parent, step):
                    parent.add_module(step, nn.Module())
                parent = getattr(parent, step)
            parent.add_module(path[-1], layer)


def test_export_authors_loads_as_they_load_it(adapter, trained, base, tmp_path):
    """lora_utils.py:19-75 and kvpo.py:295-300: LoRA on every linear layer of a block, alpha = rank, then
    set_peft_model_state_dict"""
    path = export_lora(read_lora(adapter), tmp_path, "authors")
    state = torch.load(path, weights_only=True)["generator_lora"]
    assert {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in state} <= set(SHAPES)
    ours = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    theirs = {name.removesuffix("."): layer for name, layer in original({f"{n}.": m for n, m in ours.items()}).items()}
    model = peft.get_peft_model(Tree(theirs), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(theirs)))
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    pairs = dict(zip(ours, theirs, strict=True))
    for name, layer in trained.base_model.model.named_modules():
        if name in pairs:
            x = draw(5, layer.in_features)
            assert_close(model.base_model.model.get_submodule(pairs[name])(x), layer(x), rtol=0, atol=1e-5)
    again = read_lora(path)
    assert_close(again.weights, scaled(read_lora(adapter)), rtol=0, atol=0)


def test_stacked_loras_do_what_both_do(adapter, make_transformer):
    first = read_lora(adapter)
    second = {k: 0.1 * draw(*(3 if n == RANK else n for n in t.shape), seed=9) for k, t in first.weights.items()}
    second = Lora({key: t for key, t in second.items() if ".attn1.to_v." not in key}, 6.0)  # other rank, fewer layers
    both, one = make_transformer(), make_transformer()
    merge_lora(both, first)
    merge_lora(both, second)
    stacked = stack_loras(first, second)
    merge_lora(one, stacked)
    assert stacked.rank == stacked.alpha == RANK + 3
    assert_close(forward(one), forward(both), rtol=0, atol=1e-5)


BAD_LORAS = {
    "no partner": (lambda s: {k: t for k, t in s.items() if k != "blocks.0.ffn.0.lora_B.weight"}, "without a partner"),
    "no A": (lambda s: {k: t for k, t in s.items() if k != "blocks.0.ffn.0.lora_A.weight"}, "without a partner"),
    "two ranks": (lambda s: s | {"blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 24)}, "ranks"),
    "vectors": (lambda s: {k: t.flatten() for k, t in s.items()}, "matrices"),
    "another layer": (lambda s: {k.replace("s.1.", "s.7."): t for k, t in s.items()}, "unexpected: blocks.7."),
    "another width": (lambda s: {k: t.repeat(1, 2) if "lora_A" in k else t for k, t in s.items()}, "of another shape"),
    "a base model": (lambda s: {"head.head.bias": torch.zeros(2)}, "expected a LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LORAS)
def test_bad_lora_is_refused_by_name(case, adapter, weights, tmp_path):
    change, phrase = BAD_LORAS[case]
    path = write(tmp_path / "lora.pt", change(original(scaled(read_lora(adapter)))))
    base = write(tmp_path / "base.pt", original(weights))
    with pytest.raises(ValueError, match=phrase) as caught:
        load_transformer(base, lora=path, num_heads=2)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}{}", '{"r": 4}', '{"lora_alpha": [1]}', '{"lora_alpha": 4, "use_dora": true}']
)
def test_bad_adapter_config_is_refused(text, adapter, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="use_dora" if "dora" in text else "damaged"):
        read_lora(tmp_path)


def test_unknown_layout_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="peft, diffusers or authors"):
        export_lora(read_lora(adapter), tmp_path, "kohya")


# ------------------------------------------------------------------------------------------------------------------ Hub


def test_hub_is_asked_only_for_what_is_not_here(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "file.pt"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda r, **k: asked.append((r, k)) or str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert checkpoints.fetch("owner/name") == Path("owner/name") and not asked
    assert checkpoints.fetch("owner/other/models/base.pt") == tmp_path / "file.pt"
    assert checkpoints.fetch("owner/other-1.3B", ["vae/*"]) == tmp_path
    assert asked == [("owner/other", "models/base.pt"), ("owner/other-1.3B", {"allow_patterns": ["vae/*"]})]
    for local in ("models/base.pt", "./owner/other", "../a/b", "/a/b", "name", "owner/other/folder"):
        with pytest.raises(ValueError, match="no such file"):
            checkpoints.fetch(local)
    assert len(asked) == 2


def test_hub_errors_name_the_source(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("offline\nand a long page")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError, match="owner/name is no local .* offline$"):
        checkpoints.fetch("owner/name")
