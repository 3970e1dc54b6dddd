"""The pipeline of a real model, on small random components that these tests write."""

import gc
import json
import math
import os
import shlex
import shutil
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from kvpo_min import cli
from kvpo_min.checks import doctor
from kvpo_min.cli import run as cli_run
from kvpo_min.cli.doctor import read_config
from kvpo_min.cli.options import RunOptions, parse_options
from kvpo_min.pocket import world
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, add_policies, sample, train
from kvpo_min.wan import real
from kvpo_min.wan.checkpoints import Lora, export_lora, merge_lora, read_lora
from kvpo_min.wan.real import WanOptions, decode_stream, encode_texts, load_wan, read_prompts, text_cache

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "a red blue disc square moves left right it turns slowly".split()
TEXTS = ["a red disc moves left", "it  turns   blue", "a square"]
CONFIG = Path(__file__).parent.parent / "configs" / "longlive_single_gpu.yaml"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def parts():
    """transformer, vae, text encoder and tokenizer with random weights; 16 channels, text of 32 numbers"""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=160,
        )  # fmt: skip
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0)
        )
    return dict(transformer=transformer.eval(), vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A diffusers folder of all parts."""
    folder = tmp_path_factory.mktemp("wan")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def options(folder):
    return WanOptions(components=str(folder), height=32, width=32, device="cpu", dtype="float32")


@pytest.fixture
def loaded(folder, options, tmp_path):
    def load(**changes):
        return load_wan(str(folder), TEXTS, tmp_path / "prompts", replace(options, **changes))

    return load


# ----------------------------------------------------------------------------------------------------------------- text


def test_text_is_what_the_diffusers_pipeline_encodes(parts, folder, tmp_path):
    pipe = WanPipeline(parts["tokenizer"], parts["text_encoder"], None, None)
    expected, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False, max_sequence_length=512)
    embed = encode_texts(TEXTS, tmp_path / "cache", str(folder), dtype=torch.float32, batch=2)
    assert_close(embed(TEXTS), expected, rtol=0, atol=1e-6)
    assert embed(TEXTS[1:2]).shape == (1, 512, 32) and not embed(TEXTS[1:2])[0, 4:].any()  # 3 words and the end
    assert_close(embed([TEXTS[2], TEXTS[0]]), expected[[2, 0]], rtol=0, atol=1e-6)


def test_rare_letters_become_bytes_as_in_umt5(parts, folder, tmp_path):
    """A folder that names T5's class, as Wan's does: the ids are those of its tokenizer.json."""
    words = ["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁red"]
    scores = [0.0] * 260 + [-1.0, -2.0, -2.0]
    tokenizer = Tokenizer(models.Unigram(list(zip(words, scores, strict=True)), unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = dict(tokenizer_class="T5TokenizerFast", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, pad_token_id=0)
    ).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    text = "a red é"
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert ids[0, 3:5].tolist() == [4 + 0xC3, 4 + 0xA9]
    (rows,) = real.text_encoder(str(tmp_path), "cpu", torch.float32)([text])
    assert_close(rows, encoder(ids, torch.ones_like(ids)).last_hidden_state[0], rtol=0, atol=1e-5)


def test_texts_are_encoded_once_and_the_encoder_is_freed(folder, tmp_path, monkeypatch):
    made, encoded = [], []
    from_folder, text_encoder = real.from_folder, real.text_encoder
    monkeypatch.setattr(
        real, "from_folder", lambda *a, **k: [m := from_folder(*a, **k), made.append(weakref.ref(m))][0]
    )

    def counting(*args):
        encode = text_encoder(*args)
        return lambda texts: [encode(texts), encoded.extend(texts)][0]

    monkeypatch.setattr(real, "text_encoder", counting)
    cache = text_cache(tmp_path / "prompts.txt")
    assert cache == tmp_path / "prompts.txt.umt5"
    first = encode_texts(TEXTS[:2] * 2, cache, str(folder))(TEXTS[:1])
    gc.collect()
    assert encoded == TEXTS[:2] and len(made) == 1 and made[0]() is None
    encode_texts(TEXTS[:2], cache, str(folder))
    assert len(made) == 1  # nothing was missing, so the encoder was not even loaded
    embed = encode_texts(TEXTS, cache, str(folder))
    assert encoded == TEXTS and len(made) == 2
    assert_close(embed(TEXTS[:1]), first, rtol=0, atol=0)
    other = tmp_path / "other"
    other.symlink_to(folder)
    encode_texts(TEXTS[:1], cache, str(other))
    assert encoded == TEXTS  # the same encoder under another name
    encode_texts(TEXTS[:1], cache, str(folder), dtype=torch.float32)
    assert encoded == [*TEXTS, TEXTS[0]]  # in another precision: not the same encoding
    assert encoded_in(cache) == [1, 1, 2]  # three calls that lacked something, three files, and nothing left aside


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_another_encoder_under_the_same_path_encodes_anew(part, parts, folder, tmp_path):
    """Of the same size and date: only what is in its files differs."""
    shutil.copytree(folder, tmp_path / "wan")
    place, cache = str(tmp_path / "wan"), tmp_path / "cache"
    before = encode_texts(TEXTS, cache, place, dtype=torch.float32)(TEXTS)
    if part == "text_encoder":
        file = tmp_path / "wan" / part / "model.safetensors"
        changed = {key: t * 1.5 for key, t in load_file(file).items()}
        stat = file.stat()
        save_file(changed, file, {"format": "pt"})
        assert file.stat().st_size == stat.st_size
    else:
        file = tmp_path / "wan" / part / "tokenizer.json"
        stat, text = file.stat(), file.read_text()
        swapped = text.replace('"red"', '"xxx"').replace('"blue"', '"red"').replace('"xxx"', '"blue"')
        file.write_text(swapped)
        assert swapped != text
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = encode_texts(TEXTS, cache, place, dtype=torch.float32)(TEXTS)
    assert (after - before).abs().max() > 1e-2
    fresh = encode_texts(TEXTS, tmp_path / "fresh", place, dtype=torch.float32)(TEXTS)
    assert_close(after, fresh, rtol=0, atol=0)


def test_encodings_are_kept_elsewhere_if_the_folder_cannot_be_written_to(folder, tmp_path, monkeypatch):
    """And nothing is loaded where they can be kept nowhere."""
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "prompts.txt.umt5"  # below a file, nobody can make a folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(real, "text_encoder", None)  # would fail if it were reached
    with pytest.raises(OSError, match=f"neither in {cache} nor in .*cache"):
        encode_texts(TEXTS, cache, str(folder))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = encode_texts(TEXTS, cache, str(folder))(TEXTS)
    assert encoded_in(tmp_path / "home" / "kvpo_min") == [3]
    monkeypatch.setattr(real, "text_encoder", None)
    assert_close(encode_texts(TEXTS, cache, str(folder))(TEXTS), first, rtol=0, atol=0)


def test_encodings_that_are_not_finite_are_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        real, "text_encoder", lambda *args: lambda texts: [torch.full((2, 32), float("nan"))] * len(texts)
    )
    with pytest.raises(FloatingPointError, match="not finite: a red disc moves left"):
        encode_texts(TEXTS, tmp_path / "cache", str(folder))
    assert not (tmp_path / "cache").exists()


def encoded_in(cache):
    """How many prompts each file of the folder holds, sorted."""
    return sorted(len(load_file(path)) for path in cache.iterdir())


def test_an_interrupted_encoding_keeps_what_it_has(folder, tmp_path, monkeypatch):
    text_encoder, encoded = real.text_encoder, []

    def interrupted(*args):
        encode = text_encoder(*args)

        def some(texts):
            if len(encoded) == 4:
                raise KeyboardInterrupt
            encoded.extend(texts)
            return encode(texts)

        return some

    texts, cache = [f"{text}, {n}" for n in range(3) for text in TEXTS[:2]], tmp_path / "cache"
    monkeypatch.setattr(real, "text_encoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(texts, cache, str(folder), batch=2, part=2)
    assert encoded_in(cache) == [2, 2]
    monkeypatch.setattr(real, "text_encoder", lambda *args: [encoded.clear(), interrupted(*args)][1])
    embed = encode_texts(texts, cache, str(folder), batch=2, part=2)
    assert encoded == texts[4:] and encoded_in(cache) == [2, 2, 2]
    monkeypatch.setattr(real, "text_encoder", text_encoder)
    assert_close(embed(texts), encode_texts(texts, tmp_path / "at once", str(folder))(texts), rtol=0, atol=0)


def test_text_errors(folder, tmp_path):
    cache = tmp_path / "cache"
    embed = encode_texts(TEXTS, cache, str(folder))
    with pytest.raises(ValueError, match="lacks 'a blue disc'"):
        embed(["a blue disc"])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{file.name}.*delete it"):
        encode_texts(TEXTS, cache, str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        encode_texts(TEXTS, tmp_path / "new", str(tmp_path / "empty"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "tokenizer").symlink_to(folder / "tokenizer")
    with pytest.raises(ValueError, match="text_encoder holds no UMT5EncoderModel"):
        encode_texts(TEXTS, tmp_path / "new", str(tmp_path / "half"))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------- video


def whole(vae, latents):
    """diffusers' own decode, with the normalisation of `WanPipeline` channel by channel -> pixels in [0, 1]"""
    z = latents.transpose(1, 2).clone()
    for c, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        z[:, c] = z[:, c] / (1.0 / std) + mean
    with torch.no_grad():
        return vae.decode(z, return_dict=False)[0].transpose(1, 2) / 2 + 0.5


@pytest.mark.parametrize("blocks", [[1, 3, 3], [3, 4], [7], [1] * 7])
def test_streamed_decoding_is_the_full_decoding(blocks, parts):
    latents = draw(2, 7, 16, 4, 4)
    pieces = list(decode_stream(parts["vae"], latents.split(blocks, 1)))
    assert [p.shape[1] for p in pieces] == [4 * blocks[0] - 3, *(4 * n for n in blocks[1:])]
    assert_close(torch.cat(pieces, 1), whole(parts["vae"], latents), rtol=0, atol=1e-5)


def test_two_streams_do_not_disturb_each_other(parts):
    one, two = draw(1, 4, 16, 4, 4), draw(1, 4, 16, 4, 4, seed=1)
    streams = [decode_stream(parts["vae"], x.split(2, 1)) for x in (one, two)]
    pieces = list(zip(*streams, strict=True))
    for k, x in enumerate((one, two)):
        assert_close(torch.cat([p[k] for p in pieces], 1), whole(parts["vae"], x), rtol=0, atol=1e-5)


def test_rewards_get_one_pixel_frame_a_latent_frame(loaded, parts):
    pipeline, latents = loaded(), draw(2, 5, 16, 4, 4)
    pixels = pipeline.decode(latents)
    assert pixels.shape == (2, 5, 3, 32, 32) and pixels.device.type == "cpu"
    assert_close(pixels, whole(parts["vae"], latents)[:, ::4], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- pipeline


def test_pipeline_of_a_folder(loaded, parts):
    pipeline = loaded()
    assert_close(pipeline.sigmas, torch.tensor([1.0, 0.9375, 5 / 6, 0.625]))
    assert pipeline.latent_shape == (16, 4, 4) and pipeline.switches == (39, 75, 111)
    assert pipeline.segments("a | b | c") == ["a", "b", "c"]
    clips = (range(21, 39), range(39, 75), range(75, 78))  # each lies in one segment
    assert [pipeline.reward_prompts("a | b | c", frames) for frames in clips] == ["a", "b", "c"]
    x, text = draw(1, 3, 16, 4, 4), pipeline.embed(TEXTS[:1])
    v = pipeline.backbone.velocity(x, torch.tensor([0.625]), 0, text, None)
    with torch.no_grad():
        stock = parts["transformer"](x.transpose(1, 2), torch.tensor([625.0]), text, return_dict=False)[0]
    assert_close(v, stock.transpose(1, 2), rtol=0, atol=1e-5)


def test_bfloat16_keeps_levels_and_latents_exact(loaded):
    exact, mixed = loaded().backbone, loaded(dtype="bfloat16").backbone
    assert mixed.transformer.proj_out.weight.dtype == torch.bfloat16
    seen = []
    mixed.transformer.condition_embedder.timesteps_proj.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    x, text = draw(2, 3, 16, 4, 4), loaded().embed(TEXTS[:1])
    history = mixed.encode(x, 0, text, None)
    assert history.dtype == torch.bfloat16  # half the memory
    kv = history.flatten(3, 4)
    for sigma in (1.0, 0.9375, 0.625):
        v = mixed.velocity(x, torch.full((2,), sigma), 3, text, kv)
        wanted = exact.velocity(x, torch.full((2,), sigma), 3, text, kv.float())
        assert v.dtype == torch.float32 and (v - wanted).norm() < 0.03 * wanted.norm()
    assert [t.tolist() for t in seen[1:]] == [[1000.0] * 2, [937.5] * 2, [625.0] * 2]  # bfloat16 would read 936


def test_gradient_checkpointing_changes_nothing(loaded):
    gradients = []
    for on in (False, True):
        pipeline = loaded(gradient_checkpointing=on)
        assert pipeline.backbone.transformer.is_gradient_checkpointing == on
        policies = add_policies(pipeline, TrainConfig(rank=2, lora_alpha=2))
        with torch.no_grad():
            for k, (name, weight) in enumerate(sorted(policies.named_parameters())):
                if "lora_" in name:
                    weight.copy_(0.1 * draw(*weight.shape, seed=k))
        x, text = draw(1, 3, 16, 4, 4), pipeline.embed(TEXTS[:1])
        kv = pipeline.backbone.encode(x, 0, text, None).flatten(3, 4)
        pipeline.backbone.velocity(x, torch.tensor([0.9375]), 3, text, kv).square().mean().backward()
        gradients.append({n: p.grad for n, p in policies.named_parameters() if p.grad is not None})
    assert gradients[0] and any(g.abs().max() > 1e-6 for g in gradients[0].values())
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


def test_one_update_in_bfloat16(loaded, tmp_path):
    pipeline = loaded(dtype="bfloat16", gradient_checkpointing=True)
    rewards = Mixture({"vq": lambda videos, prompts: videos.mean((1, 2, 3, 4))}, {"vq": 1.0})
    config = TrainConfig(
        output_dir=str(tmp_path / "run"), max_train_steps=1, num_frames=39, rank=2, lora_alpha=2, num_generations=2,
        perturb_num_blocks=2, tau=1e-4, branch_batch=1, replay_batch=8, unsafe_scale=0.5, grad_steps=1, kl_coef=10.0,
    )  # fmt: skip
    policies = add_policies(pipeline, config)
    loras = {name: weight for name, weight in policies.named_parameters() if "lora_" in name}
    assert loras and all(weight.dtype == torch.float32 for weight in loras.values())
    before = {name: weight.detach().clone() for name, weight in loras.items() if ".default." in name}
    (step,) = train(pipeline, TEXTS[:1], rewards, config, policies)
    (group,) = step.groups
    assert math.isfinite(step.grad_norm) and step.grad_norm > 0 and group.videos.shape[2:] == (3, 32, 32)
    assert_close(group.ratio, torch.ones(2))
    assert any(not torch.equal(loras[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("compat", ["", "official"])
def test_an_update_with_a_memory_bank(loaded, tmp_path, compat):
    """A small MemFlow: bank and slots reach the group, batch limits change nothing, and without a bank it is another
    update."""
    script, made = " | ".join(TEXTS[:2]), []
    rewards = Mixture({"vq": lambda videos, prompts: 10 * videos.mean((1, 2, 3, 4))}, {"vq": 1.0})
    for bank_size, branch_batch, replay_batch in ((3, 0, 0), (3, 1, 2), (0, 0, 0)):
        pipeline = loaded(bank_size=bank_size)
        config = TrainConfig(
            str(tmp_path), max_train_steps=1, num_frames=57, num_segments=2, num_generations=2, rank=2, tau=1e-4,
            unsafe_scale=1.0, perturb_num_blocks=5, compat=compat, global_frames=0, branch_batch=branch_batch,
            replay_batch=replay_batch, seed=3,
        )  # fmt: skip
        (step,) = train(pipeline, [script], rewards, config)
        (group,) = step.groups
        bank = group.rollout.prefix.bank
        assert group.plan.slots == bool(bank_size and compat) and (bank is None) == (not bank_size)
        assert bank is None or (bank.compat, bank.size, bank.recorded) == (compat, 3, -(-group.plan.fork // 9))
        made.append((step.grad_norm, group.energies))
    assert made[0][0] > 0 and made[1][0] == pytest.approx(made[0][0], rel=1e-3)
    assert_close(made[1][1], made[0][1], rtol=1e-3, atol=1e-6)
    assert (made[2][1] - made[0][1]).abs().max() > 0.1 * made[0][1].max()


def test_a_bank_in_bfloat16(loaded):
    """Entries are kept in the precision of the histories, and ranked in float32."""
    pipeline = loaded(bank_size=3, dtype="bfloat16")
    (latents,) = sample(pipeline, TEXTS[:1], 39)
    (without,) = sample(replace(pipeline, bank=None), TEXTS[:1], 39)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert_close(latents[:, :3], without[:, :3], rtol=0, atol=0)
    assert (latents[:, 3:] - without[:, 3:]).abs().max() > 1e-2
    keys = pipeline.backbone.text_keys(pipeline.embed(TEXTS[:1]))
    exact = loaded(bank_size=3).backbone.text_keys(pipeline.embed(TEXTS[:1]))
    assert_close(keys.float(), exact, rtol=0, atol=0.03)


def test_components_that_do_not_belong_together(folder, options, parts, tmp_path):
    small = WanTransformer3DModel.from_config({**parts["transformer"].config, "in_channels": 8})
    small.save_pretrained(tmp_path / "eight" / "transformer")
    with pytest.raises(ValueError, match="8 channels.*16"):
        load_wan(str(tmp_path / "eight"), TEXTS, tmp_path / "cache", options)
    wide = WanTransformer3DModel.from_config({**parts["transformer"].config, "text_dim": 48})
    wide.save_pretrained(tmp_path / "wide" / "transformer")
    with pytest.raises(ValueError, match="48 numbers.*32"):
        load_wan(str(tmp_path / "wide"), TEXTS, tmp_path / "cache", options)
    other = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True)
    other.save_pretrained(tmp_path / "wan22" / "vae")
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "wan22" / part).symlink_to(folder / part)
    with pytest.raises(ValueError, match="Wan2.2"):
        load_wan(str(folder), TEXTS, tmp_path / "cache", replace(options, components=str(tmp_path / "wan22")))
    with pytest.raises(ValueError, match="name the texts"):
        load_wan(str(folder), [], tmp_path / "cache", options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            load_wan(str(folder), TEXTS, tmp_path / "cache", replace(options, device="cuda"))


def test_options_of_the_bank_are_checked():
    for wrong, message in (
        (dict(bank_size=-1), "bank_size must be at least 0"), (dict(bank_compat="official"), "give bank_size too"),
        (dict(bank_interval=2), "give bank_size too"), (dict(bank_size=3, bank_interval=0), "must be 1 or more"),
        (dict(bank_size=3, bank_compat="authors"), 'compat must be "" or "official"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WanOptions(**wrong)


def test_options_are_checked():
    with pytest.raises(ValueError, match="merged_alpha must be at least 0, got -1"):
        WanOptions(merged_alpha=-1)
    for bad in ({"dtype": "float16"}, {"height": 481}, {"width": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            WanOptions(**bad)


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompt_files(tmp_path):
    listed, lines, plain = (tmp_path / name for name in ("a.jsonl", "b.txt", "c.txt"))
    listed.write_text(json.dumps({"prompts": ["a, b", " it [x] ", "c"]}) + "\n\n" + json.dumps({"prompts": ["d", "e"]}))
    lines.write_text("3,[a, b],[it [x]],[c]\n2, [d], [e]\n")
    plain.write_text("a, b | it [x] | c\nd | e\n")
    for path in (listed, lines, plain):
        assert read_prompts(path, 2) == ["a, b | it [x]", "d | e"]
        with pytest.warns(UserWarning, match="1 of 2 scripts have fewer than 3 prompts"):
            assert read_prompts(path, 3) == ["a, b | it [x] | c"]
        with pytest.raises(ValueError, match="no script of 4 prompts"):
            read_prompts(path, 4)
    lines.write_text("1,[a]\n0\n0,\n")  # `0`: the authors' tool found no scene in that line
    with pytest.warns(UserWarning, match="2 of 3"):
        assert read_prompts(lines, 1) == ["a"]


@pytest.mark.parametrize("reader", [read_prompts, world.read_prompts])
def test_other_forms_are_refused_and_the_same_for_both_models(reader, tmp_path):
    """With the file, the line, and the form that is wanted; none of them becomes a prompt."""
    for name, text, line in (
        ("a.csv", "prompt\na disc\n", 0), ("a.json", '["a disc"]', 0), ("a.yaml", "- a disc", 0), ("a.md", "a disc", 0),
        ("a.txt", '["a disc",\n"a cross"]', 1), ("a.txt", '[\n"a disc"\n]', 1), ("a.txt", '{"prompts": ["a disc"]}', 1),
        ("a.txt", "a disc\n3,[slow] a disc\na disc\n", 2), ("a.txt", "1,[a disc]\na disc\n", 2),
        ("a.txt", "a disc\n\u200b\n", 2), ("a.txt", "a disc\n\x00\n", 2), ("a.txt", "a disc |a cross\n", 1),
        ("a.jsonl", '"a disc"\n', 1), ("a.jsonl", "a disc\n", 1), ("a.txt", "# a disc\n", 0),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="expected") as caught:
            reader(tmp_path / name)
        assert (
            f"{tmp_path / name}, line {line}: " in str(caught.value)
            if line
            else str(tmp_path / name) in str(caught.value)
        )
    for name, text in (
        ("A.JSONL", '{"prompts": ["a disc", "it rests"]}\n\n{"prompts": ["a cross", "it rests"]}'),
        ("a.txt", "\ufeff# two of them\r\na disc | it rests\r\n\r\na cross | it rests"),
        ("b.txt", "2,[a disc],[it rests]\n2, [a cross], [it rests]\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode())
        assert reader(tmp_path / name) == ["a disc | it rests", "a cross | it rests"]


@pytest.mark.parametrize(
    "name, line",
    [("a.txt", "3,[a],[b]"), ("a.txt", "2,[a],[b"), ("a.txt", "2,[a]],[b]"), ("a.txt", "[a],[b]"), ("a.txt", "a | b"),
     ("a.txt", "2,[a],[]"), ("a.txt", "2,[a],[b | c]"), ("a.jsonl", '{"prompts": "a"}'),
     ("a.jsonl", '{"prompts": [1]}'), ("a.jsonl", '["a"]'), ("a.jsonl", '{"prompts": ["a"'),
     ("a.jsonl", '{"text": []}')],
)  # fmt: skip
def test_bad_line_is_refused_with_its_number(name, line, tmp_path):
    good = '{"prompts": ["a", "b"]}' if name.endswith("jsonl") else "2,[a],[b]"
    (tmp_path / name).write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=rf"{name}, line 3: "):
        read_prompts(tmp_path / name, 1)


def test_scripts_as_long_as_they_are(tmp_path):
    """Without a number of prompts: all that can be shown, at most four."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompts": list("abcdef"[:n])}) + "\n" for n in (1, 2, 4, 6)))
    assert read_prompts(path) == ["a", "a | b", "a | b | c | d", "a | b | c | d"]
    with pytest.raises(FileNotFoundError, match="no prompts file"):
        read_prompts(tmp_path / "absent.txt")


def test_prompt_file_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="a.txt is not a text file"):
        read_prompts(tmp_path / "a.txt", 1)


# --------------------------------------------------------------------------------------------------------------- config


def test_config_is_the_authors():
    config, run, wan = parse_options("train", [TrainConfig, RunOptions, WanOptions], ["--config", str(CONFIG)])
    authors = dict(  # their configs/train_kvpo_longlive.yaml
        num_frames=147, num_segments=4, num_generations=8, perturb_num_blocks=5, grad_steps=2, adv_clip_max=2.5,
        clip_range_low=0.1, clip_range_high=0.2, kl_coef=10.0, local_weight=1.0, global_weight=0.5, rank=256,
        lora_alpha=256, learning_rate=1e-5, adam_weight_decay=0.01, max_grad_norm=1.0, ema_decay=0.999, seed=42,
        max_train_steps=2 * 1500, lr_warmup_steps=2 * 5, old_policy_every=2, nearest=4 - 3, unsafe_scale=0.5,
        tau=2.0, global_frames=126, groups_per_update=1,  # ours: the authors have no such numbers, or others
    )  # fmt: skip
    assert asdict(config) | authors == asdict(config)
    assert (config.branch_batch, config.replay_batch) == (1, 2)
    judge = wan.vq_model
    assert wan == WanOptions(
        lora="checkpoints/longlive/models/lora.pt", gradient_checkpointing=True, vq_model=judge, mq_model=judge,
        ta_model=judge,
    )  # fmt: skip
    rewards = real.load_rewards(wan, vq=run.vq, mq=run.mq, ta=run.ta).rewards
    assert list(rewards) == ["vq", "mq", "ta"] and len({id(reward.worker) for reward in rewards.values()}) == 1
    assert [reward.component for reward in rewards.values()] == ["vq", "mq", "ta"]
    command = rewards["vq"].worker.command
    assert command[0] == "envs/videoalign/bin/python" and Path(command[1]).is_file() and command[-1] == "--offload"
    assert rewards["mq"].fps == 4  # one pixel frame a latent frame, 16 / 4 a second
    assert run.model.endswith("longlive_base.pt") and run.prompts.endswith(".txt")


def test_config_of_memflow_is_the_authors():
    """Only what their two configs differ in (bank, m, places), and what follows from it."""
    path = CONFIG.with_name("memflow_single_gpu.yaml")
    found, other = yaml.safe_load(path.read_text()), yaml.safe_load(CONFIG.read_text())
    assert {key for key in found if found[key] != other.get(key)} == {
        "output_dir", "model", "lora", "bank_size", "bank_interval", "nearest"
    }  # fmt: skip
    config, run, wan = parse_options("train", [TrainConfig, RunOptions, WanOptions], ["--config", str(path)])
    assert (wan.bank_size, wan.bank_interval, wan.bank_compat) == (3, 3, "")
    assert (
        config.nearest == 3 - 3 and run.model == "checkpoints/memflow/base.pt" and wan.lora.endswith("memflow/lora.pt")
    )


# ------------------------------------------------------------------------------------------------------------- commands

WORKER = """
import json, os, sys
import numpy as np
for line in sys.stdin:
    request = json.loads(line)
    open(LOG, "a").write(json.dumps(request) + chr(10))
    if os.path.exists(LOG + ".broken"):
        os._exit(3)
    videos = np.load(request["videos"]).astype(float)
    channel = dict(vq=0, mq=1, ta=2)[request["component"]]
    scores = (videos[:, :, channel].std((2, 3)).mean(1) / 10).tolist()
    print(json.dumps(dict(id=request["id"], scores=scores)), flush=True)
"""
SCRIPTS = ["a red disc moves left", "a blue square", "a disc turns", "it moves right slowly"]  # the last is held out


class Place:
    """A folder with prompts and a worker, and the flags of a small run on the random components."""

    def __init__(self, path, folder):
        self.path, self.log = path, path / "requests.jsonl"
        (path / "prompts.txt").write_text("".join(f"{script}\n" for script in SCRIPTS))
        (path / "worker.py").write_text(WORKER.replace("LOG", repr(str(self.log))))
        judge = f"worker {sys.executable} {path / 'worker.py'}"
        self.options = dict(
            model=str(folder), components=str(folder), height=32, width=32, device="cpu", dtype="float32", vq=1.0,
            mq=0.0, ta=0.5, vq_model=judge, ta_model=judge,
        )  # fmt: skip
        self.small = dict(
            prompts=str(path / "prompts.txt"), eval_prompts=1, num_generations=2, rank=2, lora_alpha=2, tau=1e-4,
            branch_batch=1, replay_batch=2, unsafe_scale=1.0, grad_steps=1, perturb_num_blocks=2,
        )  # fmt: skip

    def flags(self, **more):
        out = []
        for name, value in (self.options | more).items():
            out += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return out

    def train(self, name="run", **more):
        return cli.main(["train", *self.flags(**self.small | {"output_dir": str(self.path / name)} | more)])

    def metrics(self, name="run"):
        return [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]

    def requests(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of two updates, which the tests only read."""
    place = Place(tmp_path_factory.mktemp("trained"), folder)
    assert place.train(max_train_steps=2, checkpointing_steps=2) == 0
    return place


def test_a_run_of_a_real_model_leaves_what_is_promised(trained, folder):
    run = trained.path / "run"
    for name in ("adapter_model.safetensors", "checkpoint-2/state.json", "figures/reward.png", "figures/story_0001.png",
                 "videos/before_after.png", "videos/group_0000.mp4"):  # fmt: skip
        assert (run / name).is_file(), name
    assert any((trained.path / "prompts.txt.umt5").iterdir())
    assert [line["step"] for line in trained.metrics()] == [0, 1]
    assert set(trained.metrics()[0]) >= {"rewards/vq/mean", "rewards/ta/mean"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 2 and set(summary["after"]) == {"vq", "ta", "reward", "vq_sem", "ta_sem", "reward_sem"}
    tried, seen = trained.requests()[:2], [request["prompts"] for request in trained.requests()[2:]]
    assert [request["prompts"] for request in tried] == [["a red disc moves left"]] * 2  # a clip of noise, at the start
    assert seen[:2] == seen[-2:] == [[SCRIPTS[-1]]] * 2  # before and after, two components each
    assert {prompt for prompts in seen[2:-2] for prompt in prompts} <= set(SCRIPTS[:-1])
    assert {request["fps"] for request in trained.requests()} == {4}
    assert [check.name for check in doctor.check_run_folder(run, "", read_config) if not check.passed] == []
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved | trained.options | trained.small == saved and saved["gradient_checkpointing"] is False
    card = (run / "README.md").read_text()
    assert f"kvpo-min sample '{SCRIPTS[-1]}' --adapter {run} --model {folder}" in card
    assert "none of them were trained on" in card
    assert "reward\n1 VQ + 0.5 TA" in card and "pocket" not in card


def test_the_commands_of_the_card_run_as_they_are_printed(trained, tmp_path, monkeypatch):
    """On this machine: device and precision are the run's."""
    card = (trained.path / "run" / "README.md").read_text()
    commands = [shlex.split(line)[1:] for line in card.splitlines() if line.startswith("kvpo-min ")]
    assert [command[0] for command in commands] == ["sample", "export"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        short = ["--num_frames", "3"] if command[0] == "sample" else []  # only to be done sooner
        assert cli.main([*command, *short]) == 0, command
    assert len(list((tmp_path / "kvpo_samples").glob("*.mp4"))) == 1
    assert (tmp_path / "kvpo_export" / "pytorch_lora_weights.safetensors").is_file()


def test_held_out_prompts_are_not_trained_on(tmp_path, capsys):
    """Held out are words, not lines: what is there twice, also in other letters or spaces, is not trained on."""
    (tmp_path / "p.txt").write_text("a\nb\nC  d\nb\nc d\nb\n")
    config, options = TrainConfig(), RunOptions(prompts=str(tmp_path / "p.txt"), eval_prompts=2)
    scripts, held_out = real.real_prompts(config, options)
    assert (scripts, held_out) == (["a"], ["c d", "b"]) and "3 scripts are left out" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("b\nB\n")
    with pytest.raises(ValueError, match="no other one"):
        real.real_prompts(config, replace(options, eval_prompts=1))


def test_eval_of_the_adapter_is_the_runs_own_measurement(trained, tmp_path):
    """Another command, another process of the worker: the numbers of summary.json, before and after."""
    held_out, summary = tmp_path / "held_out.txt", json.loads((trained.path / "run" / "summary.json").read_text())
    held_out.write_text(SCRIPTS[-1])
    results = {}
    for name, more in (("before", {}), ("after", {"adapter": str(trained.path / "run")})):
        out = tmp_path / f"{name}.json"
        assert cli.main(["eval", *trained.flags(prompts=str(held_out), json=str(out), **more)]) == 0
        results[name] = json.loads(out.read_text())
        for key in ("vq", "ta", "reward"):
            assert results[name][key] == pytest.approx(summary[name][key], abs=1e-6)
    assert abs(results["after"]["reward"] - results["before"]["reward"]) > 1e-9
    assert results["after"]["vq_model"] == trained.options["vq_model"]


def test_sample_of_a_script_and_of_a_file(trained, tmp_path):
    flags = trained.flags(adapter=str(trained.path / "run"), num_frames=9)
    plain = [flag for name in ("vq", "ta", "vq_model", "ta_model", "mq") for flag in (f"--{name}", "")]
    keep = [flags[k : k + 2] for k in range(0, len(flags), 2) if flags[k] not in plain]
    argv = ["sample", *(flag for pair in keep for flag in pair), "--output_dir"]
    assert cli.main([*argv, str(tmp_path / "one"), SCRIPTS[0]]) == 0
    assert cli.main([*argv, str(tmp_path / "file"), "--prompts", str(trained.path / "prompts.txt")]) == 0
    assert len(list((tmp_path / "file").glob("*.mp4"))) == 4
    name = "000_a_red_disc_moves_left.png"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


@pytest.mark.parametrize("layout", ["diffusers", "peft", "authors"])
def test_export(layout, trained, parts, tmp_path, capsys):
    """What is written does to the base what the run's adapter does to it; a second time it is refused."""
    argv = ["export", "--adapter", str(trained.path / "run"), "--layout", layout, "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "rank 2, alpha 2, 16 layers" in out
    path = Path(out.split(": ")[0])
    want, got = read_lora(trained.path / "run"), read_lora(path if layout == "authors" else path.parent)
    assert sorted(got.modules) == sorted(want.modules) and any(got.pair(m)[1].any() for m in got.modules)
    for module in want.modules:
        (a, b), (a_got, b_got) = want.pair(module), got.pair(module)
        assert_close(b_got @ a_got, b @ a, rtol=0, atol=1e-7)
    before = path.read_bytes()
    assert cli.main(argv) == 2 and "is not empty; name another --output_dir" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_export_joined_with_the_released_lora(trained, parts, tmp_path):
    run, out = str(trained.path / "run"), tmp_path / "out"
    assert cli.main(["export", "--adapter", run, "--lora", run, "--layout", "peft", "--output_dir", str(out)]) == 0
    once, twice = (WanTransformer3DModel.from_config(parts["transformer"].config) for _ in range(2))
    for transformer in (once, twice):
        transformer.load_state_dict(parts["transformer"].state_dict())
    merge_lora(once, read_lora(run))
    merge_lora(once, read_lora(run))
    merge_lora(twice, read_lora(out))
    assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=1e-6)


def test_resume_of_a_real_run(folder, tmp_path, capsys):
    """Two updates and one more; options of the model are those of the run."""
    place = Place(tmp_path, folder)
    assert place.train(max_train_steps=1, checkpointing_steps=1) == 0
    more = dict(resume_from_checkpoint="latest", max_train_steps=2, checkpointing_steps=2)
    assert place.train(**more, height=48) == 2
    assert "was made with height 32, not 48; resume with the same options" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    written = prompts.read_text()
    prompts.write_text(written.replace("disc", "square", 1))
    assert place.train(**more) == 2
    assert "was made with 'a red disc moves left' where 'a red square moves left' stands" in capsys.readouterr().err
    prompts.write_text(written)
    assert place.train(**more, eval_prompts=3) == 0  # two of them were trained on, if the checkpoint's update took them
    assert [line["step"] for line in place.metrics()] == [0, 1]
    card, kept = (
        (tmp_path / "run" / "README.md").read_text(),
        json.loads((tmp_path / "run" / "scripts.json").read_text()),
    )
    seen = len({*kept} & {*SCRIPTS[-3:]})
    assert f"{seen or 'none'} of them were trained on" in card


def test_a_reward_that_breaks_stops_the_run_and_loses_nothing(folder, tmp_path, capsys, monkeypatch):
    """The worker works before the training and dies in it: three updates skipped, a checkpoint, exit code 2; when it is
    mended, the run goes on."""
    place, measure = Place(tmp_path, folder), cli_run.measure

    def then_break(*arguments):
        result = measure(*arguments)
        (tmp_path / "requests.jsonl.broken").write_text("")
        return result

    monkeypatch.setattr(cli_run, "measure", then_break)
    assert place.train(max_train_steps=5, checkpointing_steps=10) == 2
    err = capsys.readouterr().err
    assert err.count("was skipped: reward worker") == 3 and "died (exit code 3)" in err
    assert "error: the rewards of 3 updates in a row could not be had" in err and "stopped after 0 updates" in err
    assert [line["skipped"] for line in place.metrics()] == [1, 1, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"] is None and (summary["updates"], summary["skipped"]) == (0, 3)
    assert (tmp_path / "run" / "checkpoint-3" / "state.json").is_file()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    monkeypatch.undo()
    more = dict(max_train_steps=5, checkpointing_steps=10, resume_from_checkpoint="latest")
    assert place.train(**more) == 2 and "died (exit code 3)" in capsys.readouterr().err  # measuring needs it as well
    (tmp_path / "requests.jsonl.broken").unlink()
    assert place.train(**more) == 0
    assert [(line["step"], "skipped" in line) for line in place.metrics()] == [
        (0, True), (1, True), (2, True), (3, False), (4, False)
    ]  # fmt: skip


REFUSED = {
    "no prompts": ({"prompts": None}, "needs --prompts FILE"),
    "prompts": ({"prompts": "{tmp}/absent.txt"}, "there is no prompts file"),
    "all held out": ({"eval_prompts": 4}, "has 4 scripts, of which the last 4 would be held out"),
    "segments": ({"num_segments": 2, "num_frames": 57}, "has no script of 2 prompts"),
    "five segments": ({"num_segments": 5}, "num_segments must be 1 to 4, got 5"),
    "length": ({"num_frames": 40}, "must be a multiple of 3"),
    "no judge": ({"vq_model": ""}, "vq weighs 1, but no model scores it: give --vq_model, or --vq 0"),
    "no weight": ({"mq_model": "clip"}, "--mq_model is given, but --mq is 0"),
    "judge": ({"vq_model": "hpsv2 python"}, "vq_model must be 'hpsv3 PYTHON [options]'"),
    "judge alone": ({"vq_model": "worker"}, "vq_model must be 'hpsv3 PYTHON [options]'"),
    "dtype": ({"dtype": "float16"}, "dtype must be"),
    "flag": ({"hieght": 32}, "unknown flag --hieght (did you mean 'height'?)"),
    "model": ({"model": "{tmp}/absent"}, "there is no such file or folder"),
    "no model": ({"model": "{tmp}"}, "expected"),
    "taste": ({"like": "night"}, "like names scenes of the pocket world"),
    "pocket": ({"model": ""}, "is an option of a real model, but the embedded one is a pocket model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_line_and_leaves_no_run(case, folder, tmp_path, capsys):
    place = Place(tmp_path, folder)
    changes, message = REFUSED[case]
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    place.small = {name: value for name, value in place.small.items() if changes.get(name, 0) is not None}
    assert place.train(**{name: value for name, value in changes.items() if value is not None}) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("kvpo-min: ")]
    assert len(lines) == 1 and lines[0].startswith("kvpo-min: error: ") and message in lines[0], err
    assert not (tmp_path / "run").exists()
    assert not place.log.exists() or len(place.requests()) == 2  # the clip of noise at most


def test_keys_of_a_real_model_are_refused_in_a_pocket_config(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("rank: 4\nlora: x.pt\n")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
    assert "lora is an option of a real model" in capsys.readouterr().err
    assert cli.main(["sample", "a disc", "--device", "cpu", "--output_dir", str(tmp_path / "run")]) == 2
    assert "device is an option of a real model" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_of_memflow_from_its_files_to_a_lora(folder, tmp_path, capsys):
    """Base and LoRA in the released layout, one update of the config of MemFlow with compat official, evaluation, and
    the trained LoRA in the authors' layout, joined with the released one."""
    place = Place(tmp_path, folder)
    release = tmp_path / "checkpoints" / "memflow"
    authors_files(release, "base.pt")
    more = dict(
        model=str(release / "base.pt"), lora=str(release / "lora.pt"), bank_size=3, compat="official", num_frames=39,
        max_train_steps=1, checkpointing_steps=0,
    )  # fmt: skip
    for name in ("tau", "unsafe_scale", "grad_steps"):
        del place.small[name]  # compat sets them
    assert place.train(**more | {"bank_size": 0}) == 2
    assert "this is a MemFlow checkpoint" in capsys.readouterr().err
    assert place.train(**more) == 0
    ran = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert ran["bank_size"] == 3 and ran["bank_compat"] == "official"  # what its videos are evaluated with
    argv = ["export", "--adapter", str(tmp_path / "run"), "--lora", str(release / "lora.pt"), "--layout", "authors"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    state = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)["generator_lora"]
    assert read_lora(tmp_path / "out" / "lora.pt").rank == 4 and all(".self_attn." in k or ".cross_attn." in k or
                                                                     ".ffn." in k for k in state)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- README


def authors_files(models, name="longlive_base.pt"):
    """A random Wan of one layer and one head, and a LoRA for it, as the authors' files hold them."""
    from test_checkpoints import original, prefixed

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=32, ffn_dim=48, num_layers=1,
        )  # fmt: skip
    models.mkdir(parents=True)
    torch.save({"generator": prefixed(original(transformer.state_dict()), "model.")}, models / name)
    layer = "blocks.0.attn1.to_q"
    lora = Lora({f"{layer}.lora_A.weight": draw(2, 128), f"{layer}.lora_B.weight": draw(128, 2, seed=1)}, alpha=2.0)
    export_lora(lora, models, "authors")


def test_the_readme_on_small_folders(folder, tmp_path, monkeypatch):
    """The commands of "Your own GPU" as they are printed, on files in the layout of the released ones; of the config
    only sizes, rewards and the places of prompts and components are replaced."""
    from test_readme import marked

    commands = [line for line in marked("gpu").splitlines() if line.startswith("kvpo-min ")]
    assert [command.split()[1] for command in commands] == ["train", "export"]
    place, printed = Place(tmp_path, folder), yaml.safe_load(CONFIG.read_text())
    del place.options["model"]
    small = printed | place.options | place.small
    small |= dict(mq_model="", max_train_steps=1, num_frames=57, num_segments=2, checkpointing_steps=0)
    assert (small["model"], small["lora"]) == (printed["model"], printed["lora"])
    authors_files((tmp_path / printed["model"]).parent)
    (tmp_path / "prompts.txt").write_text("2,[a red disc],[it turns]\n2,[a square],[it moves left]\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / CONFIG.name).write_text(yaml.safe_dump(small))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert cli.main(command.split()[1:]) == 0, command
    assert read_lora(tmp_path / "kvpo_lora").rank == 4  # with the released one, of rank 2
    assert json.loads((tmp_path / "kvpo_longlive" / "summary.json").read_text())["after"]["reward"] > 0
