"""Every option of every command works or is refused: each field of every configuration is changed alone, and what the
run does, writes or hands on must change with it, or an error must name it. A new option without a case fails here."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
from pathlib import Path

import pytest
import torch

from kvpo_min import cli, pocket
from kvpo_min import policies as adapters
from kvpo_min.checks import bench as bench_of
from kvpo_min.checks import doctor as doctor_of
from kvpo_min.checks import parity as parity_of
from kvpo_min.cli import options as cli_options
from kvpo_min.cli import run as cli_run
from kvpo_min.compare import arena as arena_of
from kvpo_min.compare import astrolabe
from kvpo_min.pocket import distill
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, adapter_weights, add_policies, train
from kvpo_min.viz import report as cli_report
from kvpo_min.wan import WanBackbone, real
from kvpo_min.wan.checkpoints import Lora, export_lora
from kvpo_min.wan.real import WanOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = {1: ["a red disc moves left", "a cross changes colour"], 2: ["a disc | it turns blue", "a cross | it rests"]}
STEPS = {"checkpointing_steps": 1}


@dataclasses.dataclass
class Case:
    """`changed` on top of `base` must change `what`, a part of what the observer sees; {there}: a folder of files."""

    changed: dict
    what: str = "log"
    base: dict = dataclasses.field(default_factory=dict)


def of(what, base=None, **changed):
    return Case(changed, what, base or {})


CASES = {
    TrainConfig: {
        "output_dir": of("files", STEPS, output_dir="b"),
        "seed": of("log", seed=1),
        "max_train_steps": of("log", max_train_steps=3),
        "num_frames": of("log", num_frames=45),
        "num_segments": of("log", num_segments=2),
        "learning_rate": of("default", learning_rate=4e-3),
        "lr_warmup_steps": of("default", lr_warmup_steps=0),
        "lr_scheduler": of("default", lr_scheduler="linear"),
        "adam_weight_decay": of("default", adam_weight_decay=0.5),
        "max_grad_norm": of("default", max_grad_norm=1e-3),
        "rank": of("default", rank=3),
        "lora_alpha": of("log", lora_alpha=9),
        "ema_decay": of("ema", ema_decay=0.5),
        "num_generations": of("log", num_generations=3),
        "groups_per_update": of("log", groups_per_update=2),
        "in_order": of("log", in_order=True),
        "num_iterations": of("default", num_iterations=2),
        "old_policy_every": of("log", old_policy_every=1),
        "fork": of("log", fork=24),
        "nearest": of("log", nearest=1),
        "perturb_num_blocks": of("log", perturb_num_blocks=3),
        "local_frames": of("log", {"perturb_num_blocks": 1, "num_frames": 39}, local_frames=3),
        "grad_steps": of("default", grad_steps=2),
        "tau": of("log", tau=2e-3),
        "tau_groups": of("log", {"tau": 0.0}, tau_groups=1),
        "tau_target": of("log", {"tau": 0.0}, tau_target=0.8),
        "kl_coef": of("log", kl_coef=50.0),
        "prefix_coef": of("log", prefix_coef=3.0),
        "clip_range_low": of("log", clip_range_low=1e-7),
        "clip_range_high": of("log", clip_range_high=1e-7),
        "adv_clip_max": of("log", adv_clip_max=1.0),
        "adv_eps": of("log", adv_eps=1.0),
        "anchor_in_group": of("log", anchor_in_group=True),
        "local_weight": of("log", local_weight=0.5),
        "global_weight": of("log", global_weight=2.0),
        "fuse_mode": of("log", fuse_mode="zscore"),
        "global_frames": of("log", global_frames=0),
        "unsafe_scale": of("log", unsafe_scale=0.5),
        "compat": of("log", compat="official"),
        "checkpointing_steps": of("files", checkpointing_steps=2),
        "checkpoints_total_limit": of("files", STEPS, checkpoints_total_limit=1),
        "resume_from_checkpoint": of("log", resume_from_checkpoint="{there}/run/checkpoint-1"),
        "branch_batch": of("batches", branch_batch=1),
        "replay_batch": of("batches", replay_batch=3),
    },
    cli_options.RunOptions: {
        "prompts": of("scripts", prompts="{there}/p.txt"),
        "event": of("scripts", event="changes colour"),
        "eval_prompts": of("held_out", eval_prompts=3),
        "eval_every": of("curve", eval_every=1),
        "like": of("taste", like="night"),
        "vq": of("weights", vq=2.0),
        "mq": of("weights", mq=0.0),
        "ta": of("weights", ta=0.5),
        "model": of("model", model="{there}/pocket"),
        "processes": of("processes", {"groups_per_update": 6}, processes=3),
        "report_to": of("reported", report_to="tensorboard"),
        "overwrite_output_dir": of("code", {"output_dir": "{there}/full"}, overwrite_output_dir=True),
    },
    cli_options.SampleOptions: {
        "script": of("sampled", script="a square"),
        "prompts": of("sampled", prompts="{there}/p.txt", script=""),
        "adapter": of("adapter", adapter="a"),
        "num_frames": of("sampled", num_frames=42),
        "seed": of("sampled", seed=3),
        "output_dir": of("files", output_dir="b"),
        "model": of("model", model="{there}/pocket"),
        "overwrite_output_dir": of("code", {"output_dir": "{there}/full"}, overwrite_output_dir=True),
    },
    cli_options.EvalOptions: {
        "prompts": of("evaluated", prompts="{there}/p.txt"),
        "json": of("files", json="b.json"),
        "adapter": of("adapter", adapter="a"),
        "num_frames": of("evaluated", num_frames=42),
        "seed": of("evaluated", seed=3),
        "like": of("taste", like="night"),
        "vq": of("weights", vq=2.0),
        "mq": of("weights", mq=0.0),
        "ta": of("weights", ta=0.5),
        "model": of("model", model="{there}/pocket"),
    },
    cli_options.ExportOptions: {
        "adapter": of("files", adapter="{there}/lora_b"),
        "layout": of("files", layout="authors"),
        "lora_alpha": of("files", lora_alpha=3.0),
        "lora": of("files", lora="{there}/lora_b"),
        "merged_alpha": of("files", {"lora": "{there}/lora_b"}, merged_alpha=3.0),
        "output_dir": of("files", output_dir="b"),
    },
    arena_of.ArenaOptions: {
        "csv": of("files", csv="b.csv"),
        "methods": of("runs", methods="kvpo,rwr"),
        "seeds": of("runs", seeds="0,1"),
        "learning_rates": of("runs", learning_rates="1e-4"),
        "sweep_seed": of("runs", {"learning_rates": "1e-4,1e-3"}, sweep_seed=7),
        "forwards": of("runs", forwards=20),
        "evaluations": of("runs", evaluations=2),
        "mode": of("prompts", mode="long"),
        "event": of("prompts", event="changes colour"),
        "eval_prompts": of("prompts", eval_prompts=3),
        "set": of("config", set="nearest=1"),
        "like": of("taste", like="night"),
        "vq": of("weights", vq=2.0),
        "mq": of("weights", mq=0.0),
        "ta": of("weights", ta=0.5),
        "model": of("model", model="{there}/pocket"),
        "plan": of("out", plan=True),
    },
    doctor_of.DoctorOptions: {
        "output_dir": of("err", output_dir="absent"),
        "model": of("model", model="{there}/pocket"),
        "seed": of("config", seed=1),
        "num_frames": of("config", num_frames=147),
        "num_segments": of("config", {"num_frames": 147}, num_segments=4),
        "num_generations": of("config", num_generations=3),
        "perturb_num_blocks": of("config", perturb_num_blocks=3),
        "rank": of("config", rank=3),
    },
    bench_of.BenchOptions: {
        "json": of("files", json="b.json"),
        "pairs": of("timed", pairs=2),
        "scaling": of("timed", scaling=True),
        "num_frames": of("config", num_frames=147),
        "num_segments": of("config", {"num_frames": 147}, num_segments=4),
        "num_generations": of("config", num_generations=3),
        "perturb_num_blocks": of("config", perturb_num_blocks=3),
        "seed": of("config", seed=1),
        "model": of("model", model="{there}/pocket"),
    },
    parity_of.ParityOptions: {"golden": of("err", golden="{there}/full")},
    WanOptions: {
        "weights_name": of("told", weights_name="generator"),
        "lora": of("transformer", lora="a/b"),
        "merged_alpha": of("told", {"lora": "a/b"}, merged_alpha=3.0),
        "components": of("text", components="c"),
        "height": of("latent_shape", height=64),
        "width": of("latent_shape", width=64),
        "device": of("text", device="meta"),
        "dtype": of("transformer", dtype="float32"),
        "gradient_checkpointing": of("checkpointing", gradient_checkpointing=True),
        "bank_size": of("bank", bank_size=3),
        "bank_interval": of("bank", base={"bank_size": 3}, bank_interval=2),
        "bank_compat": of("bank", base={"bank_size": 3}, bank_compat="official"),
        "vq_model": of("rewards", vq_model="worker x"),
        "mq_model": of("rewards", mq_model="worker x"),
        "ta_model": of("rewards", ta_model="worker x"),
    },
    distill.DistillConfig: {
        "output_dir": of("autoencoder", output_dir="b"),
        "seed": of("teacher", seed=1),
        "device": of("err", device="nowhere"),
        "autoencoder_steps": of("autoencoder", autoencoder_steps=7),
        "autoencoder_batch": of("autoencoder", autoencoder_batch=3),
        "autoencoder_learning_rate": of("autoencoder", autoencoder_learning_rate=1e-3),
        "teacher_steps": of("teacher", teacher_steps=7),
        "teacher_learning_rate": of("teacher", teacher_learning_rate=1e-3),
        "teacher_batch": of("teacher", teacher_batch=2),
        "first_blocks": of("teacher", first_blocks=3),
        "first_weight": of("teacher", first_weight=5.0),
        "text_dropout": of("teacher", text_dropout=1.0),
        "student_steps": of("student", student_steps=7),
        "student_learning_rate": of("student", student_learning_rate=1e-3),
        "fake_learning_rate": of("student", fake_learning_rate=1e-3),
        "fake_updates": of("student", fake_updates=1),
        "student_batch": of("student", student_batch=2),
        "student_first_blocks": of("student", student_first_blocks=3),
        "guidance": of("student", guidance=1.0),
        "ema_decay": of("student", ema_decay=0.5),
        "stories": of("stories", stories=6),
        "checkpointing_steps": of("autoencoder", checkpointing_steps=3),
    },
    astrolabe.AstrolabeConfig: {
        "seed": of("log", seed=1),
        "max_train_steps": of("log", max_train_steps=3),
        "num_frames": of("log", num_frames=30),
        "window_frames": of("log", window_frames=9),
        "fork": of("log", fork=15),
        "num_generations": of("log", num_generations=4),
        "groups_per_update": of("log", groups_per_update=2),
        "levels_per_group": of("log", levels_per_group=2),
        "learning_rate": of("default", learning_rate=1e-3),
        "adam_weight_decay": of("default", adam_weight_decay=0.5),
        "max_grad_norm": of("default", max_grad_norm=1e-4),
        "rank": of("default", rank=3),
        "lora_alpha": of("log", lora_alpha=9),
        "beta": of("log", beta=0.5),
        "adv_clip_max": of("log", adv_clip_max=0.5),
        "spread": of("log", spread="none"),
        "kl_coef": of("default", kl_coef=0.0),
        "primary": of("default", primary="mq"),
        "selective": of("log", selective=False),
        "old_decay": of("old", old_decay=0.5),
        "ema_decay": of("ema", ema_decay=0.5),
        "tau_kl": of("log", tau_kl=1e-9),
        "k_max": of("log", k_max=1),
        "branch_batch": of("batches", branch_batch=1),
        "replay_batch": of("batches", replay_batch=1),
        "compat": of("log", compat="official"),
        "space": of("log", space="x0"),
        "levels": of("log", levels="even"),
        "context": of("log", context="noisy"),
        "best": of("default", best="first"),
    },
}


def test_every_option_has_a_case():
    """Asks every command which configurations it reads."""
    read = {astrolabe.AstrolabeConfig}  # through `arena --set`
    for name in cli_options.COMMANDS:
        read.update(importlib.import_module(f"kvpo_min.cli.{name}").OPTIONS)
    assert read == set(CASES)
    for cls in read:
        names = {f.name for f in dataclasses.fields(cls)}
        assert names == set(CASES[cls]), (
            f"{cls.__name__}: give the options {names ^ set(CASES[cls])} a case, or drop it"
        )
        for name, case in CASES[cls].items():
            assert name in case.changed and case.changed[name] != case.base.get(name)


# --------------------------------------------------------------------------------------------------------- what is seen


def staged():
    """A reward: in the first update the anchor, last, is best; then the first branch is, and the others are worse."""
    calls = itertools.count()

    def reward(videos, prompts):
        ranks = torch.arange(len(videos)).roll(0 if next(calls) < 2 else 1)
        return ranks + 0.1 * videos.std((1, 2, 3, 4))

    return reward


def weights_of(policies, name):
    return {key: weight.detach().clone().flatten().tolist() for key, weight in adapter_weights(policies, name).items()}


def watched(pipeline):
    """-> how many blocks the model is asked for at once"""
    sizes, velocity = set(), pipeline.backbone.velocity

    def watch(x, *args):
        sizes.add(len(x))
        return velocity(x, *args)

    pipeline.backbone.velocity = watch
    return sizes


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def timeless(line):
    return {key: value for key, value in line.items() if key != "step_time"}


def observe_train(options, make_pipeline, monkeypatch, folder):
    small = dict(
        output_dir="a", num_generations=2, rank=2, lora_alpha=2, tau=1e-3, tau_groups=2, max_train_steps=2,
        unsafe_scale=1.0,
        learning_rate=5e-3, old_policy_every=2, num_frames=42, adv_clip_max=100.0,
    )  # fmt: skip
    config, pipeline = TrainConfig(**small | options), make_pipeline()
    policies, batches = add_policies(pipeline, config), watched(pipeline)
    rewards = Mixture({"it": staged()}, {"it": 1.0})
    log = [timeless(step.log()) for step in train(pipeline, SCRIPTS[config.num_segments], rewards, config, policies)]
    seen = {name: weights_of(policies, name) for name in ("default", "ema")}
    return seen | {"log": log, "batches": batches, "files": sorted(files(folder))}


def observe_astrolabe(options, make_pipeline, monkeypatch, folder):
    small = dict(
        num_generations=3, groups_per_update=1, rank=2, lora_alpha=2, max_train_steps=2, num_frames=21, window_frames=6,
        learning_rate=5e-3, kl_coef=10.0, tau_kl=9.0,
    )  # fmt: skip
    config, pipeline = astrolabe.AstrolabeConfig(**small | options), make_pipeline()
    policies, batches = add_policies(pipeline, config), watched(pipeline)
    opposed = {
        "vq": lambda v, prompts: v[:, :, 0].mean((1, 2, 3)),
        "mq": lambda v, prompts: -v[:, :, 0].mean((1, 2, 3)),
    }
    rewards = Mixture(opposed, {"vq": 1.0, "mq": 0.5})  # so that there is always a candidate of which only one is fond
    log = [timeless(line) for line in astrolabe.train(pipeline, SCRIPTS[1], rewards, config, policies)]
    return {name: weights_of(policies, name) for name in ("default", "old", "ema")} | {"log": log, "batches": batches}


def command(argv, options, positional=""):
    """Runs a command -> exit code and what it prints. `options`: {name: value}; True: a flag without a value"""
    words = [options[positional]] if options.get(positional) else []
    for name, value in options.items():
        if name != positional and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([argv, *words])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


class Anything:
    """Stands for a picture, or for a set of policies: takes every call."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def stub_models(monkeypatch, make_pipeline, seen):
    monkeypatch.setattr(pocket, "load_model", lambda model, *like: seen.update(model=model) or make_pipeline())
    monkeypatch.setattr(adapters, "load_adapter", lambda pipeline, adapter: seen.update(adapter=adapter))
    monkeypatch.setattr("kvpo_min.viz.save_video", lambda path, *args: Path(path).write_text("video"))
    monkeypatch.setattr("kvpo_min.viz.contact_sheet", lambda *args, **kwargs: Anything())
    return seen


def observe_run(options, make_pipeline, monkeypatch, folder):
    seen = stub_models(monkeypatch, make_pipeline, {})

    def measure(pipeline, scripts, rewards, *args):
        seen.update(held_out=scripts, weights=dict(rewards.weights), taste=rewards.rewards["vq"].like)
        return {"vq": 0.5, "reward": 0.5, "head": {"reward": 0.5}}, torch.zeros(1, 3, 3, 8, 8)

    def train_loop(pipeline, scripts, rewards, config, policies, out, report, curve, begin):
        seen.update(scripts=scripts, reported=report is not None, curve=curve is not None)
        return "", 0, [], 0, []

    def share_work(n, command, meanwhile):
        seen.update(processes=n)
        return contextlib.nullcontext()

    monkeypatch.setattr(cli_run, "measure", measure)
    monkeypatch.setattr(cli_run, "train_loop", train_loop)
    monkeypatch.setattr(cli_run, "share_work", share_work)
    monkeypatch.setattr("kvpo_min.policies.add_policies", lambda *args: Anything())
    for name in ("draw_curves", "draw_groups", "draw_before_after"):
        monkeypatch.setattr(cli_report, name, lambda *args: None)
    monkeypatch.setattr("kvpo_min.policies.save_adapter", lambda *args: None)
    done = command("train", {"output_dir": "run", "eval_prompts": 2} | options)
    seen.setdefault("reported", done["err"] if "report_to" in done["err"] else None)  # refused: its package is missing
    return seen | done


def observe_sample(options, make_pipeline, monkeypatch, folder):
    seen = stub_models(monkeypatch, make_pipeline, {"adapter": None})

    def sample(pipeline, scripts, length, seed, *args, **kwargs):
        seen["sampled"] = scripts, length, seed
        yield torch.zeros(len(scripts), 3, *pipeline.latent_shape)

    monkeypatch.setattr("kvpo_min.cli.sample.sample", sample)
    done = command("sample", {"script": "a disc", "output_dir": "a"} | options, "script")
    return seen | done | {"files": sorted(files(folder))}


def observe_eval(options, make_pipeline, monkeypatch, folder):
    seen = stub_models(monkeypatch, make_pipeline, {"adapter": None})

    def evaluate(pipeline, scripts, rewards, length, seed, *args, **kwargs):
        seen.update(evaluated=(scripts, length, seed), weights=dict(rewards.weights))
        seen["taste"] = rewards.rewards["vq"].like
        return {"vq": 0.5}

    monkeypatch.setattr("kvpo_min.cli.eval.evaluate", evaluate)
    (folder / "one.txt").write_text("a disc\n")
    done = command("eval", {"prompts": "one.txt", "json": "a.json"} | options)
    return seen | done | {"files": sorted(files(folder))}


def observe_export(options, make_pipeline, monkeypatch, folder):
    there = options.pop("there")
    done = command("export", {"adapter": f"{there}/lora_a", "output_dir": "a"} | options)
    return done | {"files": files(folder)}


def observe_arena(options, make_pipeline, monkeypatch, folder):
    from kvpo_min.compare import arena

    seen = stub_models(monkeypatch, make_pipeline, {"runs": [], "prompts": [], "config": []})

    def compete(pipeline, prompts, rewards, run, options, before, lacking, costs):
        seen["runs"].append(run)
        seen["prompts"].append(prompts)
        seen["config"].append(arena.config_of(run.method, options, run.learning_rate, run.seed))
        seen.update(weights=dict(rewards.weights), taste=rewards.rewards["vq"].like)
        for budget in lacking:
            numbers = {f"{name}_{when}": 0.0 for name in arena.PAIRED for when in ("before", "after", "sem")}
            yield budget, numbers | dict(forwards=1, backwards=1, updates=1, seconds=0.0, note="", settings="{}")

    monkeypatch.setattr(arena, "compete", compete)
    monkeypatch.setattr(arena, "measure", lambda *args: {})
    monkeypatch.setattr(arena, "plan", lambda *args: "what would be run")
    small = dict(
        csv="a.csv", methods="kvpo", seeds="0", learning_rates="1e-3", forwards=10, evaluations=1, eval_prompts=2
    )
    return seen | command("arena", small | options) | {"files": sorted(files(folder))}


def observe_doctor(options, make_pipeline, monkeypatch, folder):
    seen = {}

    def load_model(model):
        seen["model"] = model
        raise ValueError("far enough")

    monkeypatch.setattr(pocket, "load_model", load_model)
    monkeypatch.setattr(doctor_of, "check_geometry", lambda config: seen.update(config=config))
    return seen | command("doctor", options)


def observe_bench(options, make_pipeline, monkeypatch, folder):
    from kvpo_min.checks import bench

    seen = stub_models(monkeypatch, make_pipeline, {})

    def stub(what):
        def timed(pipeline, rewards, options):
            seen.update(timed=(what, options.pairs), config=bench.make_config(options))
            return {}

        return timed

    for name in ("bench", "scaling"):
        monkeypatch.setattr(bench, name, stub(name))
    for name in ("table", "scaling_table"):
        monkeypatch.setattr(bench, name, lambda result: "a table")
    return seen | command("bench", options) | {"files": sorted(files(folder))}


def observe_parity(options, make_pipeline, monkeypatch, folder):
    from kvpo_min.checks.parity import parity

    monkeypatch.setattr(
        "kvpo_min.checks.parity.parity", lambda golden: [] if golden == "tests/golden" else parity(golden)
    )
    return command("parity", options)


def observe_wan(options, make_pipeline, monkeypatch, folder):
    options, seen = WanOptions(**{"device": "cpu", "height": 32, "width": 32} | options), {"checkpointing": False}

    class Part:
        config = Anything()

        def to(self, device):
            seen.setdefault("devices", []).append(device)
            return self

        def enable_gradient_checkpointing(self):
            seen["checkpointing"] = True

    Part.config.scale_factor_spatial, Part.config.z_dim = 8, 16

    def encode_texts(texts, cache, components, device, dtype):
        seen["text"] = components, device, dtype
        return lambda texts: torch.zeros(1, 2, 3)

    monkeypatch.setattr(real, "encode_texts", encode_texts)
    monkeypatch.setattr(
        real, "load_transformer", lambda *args, **told: seen.update(transformer=args, told=told) or Part()
    )
    monkeypatch.setattr(real, "from_folder", lambda cls, path, dtype: Part())
    monkeypatch.setattr(real, "fetch", lambda source, patterns: Path(source))
    monkeypatch.setattr(real, "check_parts", lambda *args: None)
    monkeypatch.setattr(real, "MixedBackbone", lambda *args: None)
    pipeline = real.load_wan("m", ["a"], "cache", options)
    seen |= {"latent_shape": pipeline.latent_shape, "bank": pipeline.bank}
    assert ("memflow" in seen["told"]) == bool(options.bank_size)
    named = {name: float(bool(getattr(options, f"{name}_model"))) for name in ("vq", "mq", "ta")}
    rewards = real.load_rewards(options, **named).rewards
    return seen | {"rewards": {name: (reward.worker.command, reward.component) for name, reward in rewards.items()}}


@pytest.fixture(scope="module")
def stories():
    latents = torch.randn(18432, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    return distill.tell_stories(6, latents, seed=3)


def observe_distill(options, make_pipeline, monkeypatch, folder, stories, make_transformer, stage):
    """One step of the stage, with the learning rates, sizes and folder that its loop is given."""
    seen = {}

    class Stop(Exception):
        pass

    def loop(out, total, modules, optimizers, generator, step, every):
        loss = step(4)
        rates = [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]
        sums = [sum(w.double().sum().item() for w in module.parameters()) for module in modules.values()]
        seen[stage] = str(out), total, every, loss, rates, sums
        raise Stop

    def tell_stories(n, *args):
        seen["stories"] = n
        raise Stop

    small = dict(
        output_dir="a", autoencoder_batch=2, teacher_batch=1, first_blocks=2, student_batch=1, student_first_blocks=2,
        stories=5,
    )  # fmt: skip
    monkeypatch.setattr(distill, "loop", loop)
    monkeypatch.setattr(distill, "new_transformer", lambda: make_transformer(layers=1).train().requires_grad_(True))
    with contextlib.suppress(Stop):
        try:
            config = distill.DistillConfig(**small | options)
        except ValueError as error:
            return {"err": str(error)}
        if stage == "autoencoder":
            distill.train_autoencoder(config)
        elif stage == "teacher":
            distill.train_teacher(config, stories)
        elif stage == "student":
            distill.train_student(config, stories, WanBackbone(make_transformer(layers=1)))
        elif stage == "stories":
            monkeypatch.setattr(distill, "train_autoencoder", lambda config: None)
            monkeypatch.setattr("diffusers.AutoencoderTiny.from_pretrained", lambda *args: distill.new_autoencoder())
            monkeypatch.setattr(distill, "encode_world", lambda *args: None)
            monkeypatch.setattr(distill, "tell_stories", tell_stories)
            distill.distill(config)
    return seen or {"err": ""}


OBSERVERS = {
    TrainConfig: observe_train, cli_options.RunOptions: observe_run, cli_options.SampleOptions: observe_sample,
    cli_options.EvalOptions: observe_eval, cli_options.ExportOptions: observe_export,
    arena_of.ArenaOptions: observe_arena,
    doctor_of.DoctorOptions: observe_doctor, bench_of.BenchOptions: observe_bench,
    parity_of.ParityOptions: observe_parity,
    WanOptions: observe_wan, distill.DistillConfig: observe_distill, astrolabe.AstrolabeConfig: observe_astrolabe,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_pipeline(make_pipeline, make_backbone):
    """With a single layer."""
    return lambda: dataclasses.replace(make_pipeline(), backbone=make_backbone(layers=1))


@pytest.fixture(scope="module")
def there(tmp_path_factory, small_pipeline):
    """Files that options name."""
    folder = tmp_path_factory.mktemp("there")
    (folder / "p.txt").write_text("a square rests\n")
    (folder / "full").mkdir()
    (folder / "full" / "metrics.jsonl").write_text("")
    (folder / "pocket" / "student").mkdir(parents=True)
    for k, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(k)
        shapes = {"blocks.0.attn1.to_q.lora_A.weight": (2, 4), "blocks.0.attn1.to_q.lora_B.weight": (4, 2)}
        weights = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
        export_lora(Lora(weights, 4.0), folder / f"lora_{name}", "peft")
    with pytest.MonkeyPatch.context() as patch:
        observe_train({"output_dir": str(folder / "run"), "max_train_steps": 1} | STEPS, small_pipeline, patch, folder)
    return folder


@pytest.fixture(scope="module")
def baselines():
    return {}


@pytest.mark.parametrize("cls, name", [(cls, name) for cls, cases in CASES.items() for name in cases])
def test_the_option_does_something(cls, name, there, baselines, tmp_path, small_pipeline, make_transformer, stories):
    case = CASES[cls][name]

    def filled(options):
        return {key: v.replace("{there}", str(there)) if isinstance(v, str) else v for key, v in options.items()}

    def observe(options, place):
        (tmp_path / place).mkdir()
        (there / "full" / "metrics.jsonl").write_text("")
        more = {}
        if cls is distill.DistillConfig:
            more = dict(stories=stories, make_transformer=make_transformer, stage=case.what)
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(tmp_path / place):
            options = filled(options) | ({"there": there} if cls is cli_options.ExportOptions else {})
            return OBSERVERS[cls](options, small_pipeline, patch, tmp_path / place, **more)

    key = cls, case.what if cls is distill.DistillConfig else "", json.dumps(case.base)
    if key not in baselines:
        baselines[key] = observe(case.base, "base")
    before, after = baselines[key], observe(case.base | case.changed, "changed")
    if case.what == "err":  # refused
        assert before["err"] != after["err"] and str(filled(case.changed)[name]) in after["err"]
    else:
        assert before[case.what] != after[case.what], f"{name} changes nothing"
    if case.what in ("files", "batches") and cls in (TrainConfig, astrolabe.AstrolabeConfig):
        for ours, theirs in zip(before["log"], after["log"], strict=True):  # bookkeeping changes no number
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
