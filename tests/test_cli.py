"""The commands as a user meets them, on a tiny random model in the layout of `kvpo-min distill`."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import mediapy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kvpo_min import cli, pocket, system
from kvpo_min import pipeline as generator
from kvpo_min import policies as adapters
from kvpo_min.checks import doctor
from kvpo_min.chr import Plan
from kvpo_min.cli import eval as cli_eval
from kvpo_min.cli import models as cli_models
from kvpo_min.cli import options as cli_options
from kvpo_min.cli import run as cli_run
from kvpo_min.cli.demo import DEFAULTS
from kvpo_min.cli.doctor import read_config
from kvpo_min.pocket import load_pocket, pocket_rewards, world
from kvpo_min.pocket import prompts as prompts_of
from kvpo_min.rollout import draw_noise
from kvpo_min.train import TrainConfig, adapter_weights, add_policies, evaluate, train
from kvpo_min.viz import report as cli_report
from kvpo_min.wan.real import WanOptions

ROOT = Path(__file__).parent.parent
SMALL = [
    "--num_generations",
    "3",
    "--rank",
    "2",
    "--tau_groups",
    "1",
    "--groups_per_update",
    "1",
    "--num_iterations",
    "2",
    "--eval_prompts",
    "2",
    "--checkpointing_steps",
    "2",
    "--eval_every",
    "2",
    "--lr_scheduler",
    "constant",
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_transformer):
    """A folder with a random autoencoder, whose pictures have some contrast, and a random student."""
    from kvpo_min.pocket.distill import new_autoencoder

    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = new_autoencoder()
    with torch.no_grad():
        autoencoder.decoder.layers[-1].weight.mul_(30)
    autoencoder.save_pretrained(folder / "autoencoder")
    make_transformer().save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A demo of four updates, whose folder the tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    argv = ["demo", "--model", str(model), "--output_dir", str(folder), "--max_train_steps", "4", *SMALL]
    assert cli.main(argv) == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of runs that are not about pictures."""
    for name in ("draw_curves", "draw_groups", "draw_before_after"):
        monkeypatch.setattr(cli_report, name, lambda *arguments: None)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("step_time", "eval/seconds", "eval0/seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- options


COMMANDS = ("demo", "train", "sample", "eval", "export", "distill", "doctor", "parity", "arena", "bench")


def test_help_needs_no_torch():
    code = (
        "import sys; from kvpo_min.cli import main; assert main(['--help']) == 0; assert main([]) == 2; "
        "assert not {'torch', 'diffusers', 'peft', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())  # argparse wraps lines as wide as the terminal
    flag = {"eval": "--json", "parity": "--golden", "arena": "--csv", "bench": "--pairs"}.get(command, "--output_dir")
    assert stopped.value.code == 0 and flag in out
    if command == "train":
        assert "length of the videos" in out and "--num_generations" in out and "default: 0.001" in out


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nseed: 3\noverwrite_output_dir: true\n")
    argv = ["--config", str(tmp_path / "c.yaml"), "--seed", "7"]
    config, options = cli_options.parse_options("train", [TrainConfig, cli_options.RunOptions], argv)
    assert config == TrainConfig(learning_rate=1e-5, seed=7)
    assert options == cli_options.RunOptions(overwrite_output_dir=True)


@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_flags_win_wherever_they_stand(config, tmp_path):
    (tmp_path / "c.yaml").write_text("max_train_steps: 7\nrank: 3\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    config, empty = ([part.format(tmp_path / name) for part in config] for name in ("c.yaml", "empty.yaml"))
    for argv in (["--max_train_steps", "4", *config], [*config, "--max_train_steps=4", *empty]):
        (given,) = cli_options.parse_options("train", [TrainConfig], argv)
        assert (given.max_train_steps, given.rank) == (4, 3)


def test_printed_config_reads_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--rank", "5", "--compat", "official", "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    argv = ["--config", str(tmp_path / "c.yaml")]
    config, _, wan = cli_options.parse_options("train", [TrainConfig, cli_options.RunOptions, WanOptions], argv)
    assert config == TrainConfig(rank=5, compat="official")
    assert cli_models.real_options(argv, "", wan) is None  # it names a real model's options too, as they are by default


@pytest.mark.parametrize("name", ["short", "long"])
def test_shipped_configs_can_run(name):
    argv = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    config, options = cli_options.parse_options("train", [TrainConfig, cli_options.RunOptions], argv)
    scripts, held_out = prompts_of.run_prompts(config, options.prompts, options.event, options.eval_prompts)
    prompts_of.check_geometry(config)
    assert {len(s.split(" | ")) for s in scripts + held_out} == {config.num_segments}
    assert (len(scripts), len(held_out)) == (256, options.eval_prompts)
    assert (config.num_frames, config.num_segments) == {"short": (39, 1), "long": (147, 4)}[name]


WRONG = {
    "command": (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
    "flag": (["train", "--lerning_rate", "1"], "unknown flag --lerning_rate (did you mean 'learning_rate'?)"),
    "abbreviation": (["train", "--learning", "1"], "did you mean 'learning_rate'?"),
    "value": (["train", "--rank", "two"], "--rank: expected int, got 'two'"),
    "key": (["train", "--config", "{tmp}/key.yaml"], "unknown key 'num_generation' (did you mean 'num_generations'?)"),
    "no mapping": (["train", "--config={tmp}/list.yaml"], "must hold lines like 'seed: 0', got a list"),
    "no yaml": (["train", "--config", "{tmp}/no.yaml"], "is not YAML"),
    "config without a file": (["train", "--config"], "expected one argument"),
    "no config": (["train", "--config", "{tmp}/absent.yaml"], "there is no config file"),
    "range": (["train", "--num_generations", "1"], "num_generations must be at least 2"),
    "blocks": (["train", "--perturb_num_blocks", "7"], "num_frames 39, perturb_num_blocks 7 and nearest 2: no block"),
    "arena below a file": (["arena", "--csv", "{tmp}/one.txt/a.csv"], "one.txt is a file, so"),
    "arena in a folder": (["arena", "--csv", "{tmp}"], "is a folder, name a file"),
    "bench below a file": (["bench", "--json", "{tmp}/one.txt/a.json"], "one.txt is a file, so"),
    "weights": (["train", "--vq", "0", "--mq", "0", "--ta", "0"], "not all 0"),
    "eval prompts": (["demo", "--eval_prompts", "0"], "eval_prompts must be at least 1"),
    "taste": (["demo", "--like", "beach,moon"], "like names scenes, beach, night, meadow, dusk, forest, snow, with"),
    "no taste": (["demo", "--like", "beach,night,meadow,dusk,forest,snow"], "like must name one to 5 of beach, night"),
    "curve": (["demo", "--eval_every", "-1"], "eval_every must be at least 0, got -1"),
    "report": (["train", "--report_to", "wandb"], "report_to must be"),
    "length": (["train", "--num_frames", "40"], "num_frames must be a multiple of 3"),
    "too short to fork": (["train", "--num_frames", "21"], "no block can fork"),
    "segment unseen": (["train", "--num_segments", "2"], "num_frames must be above 39, where segment 2 begins, got 39"),
    "segments": (
        ["train", "--num_segments", "2", "--num_frames", "75", "--prompts", "{tmp}/one.txt"],
        "have 1 segments",
    ),
    "seed": (["train", "--seed", str(prompts_of.EVAL_SEED)], "draws the held-out prompts"),
    "prompt": (
        ["train", "--prompts", "{tmp}/bad.txt"],
        "bad.txt, line 2: 'a rde disc': expected known words, got 'rde'",
    ),
    "no prompts": (["train", "--prompts", "{tmp}/absent.txt"], "there is no prompts file"),
    "binary prompts": (["train", "--prompts", "{tmp}/binary.txt"], "is not a text file in UTF-8"),
    "mixed": (["eval", "--prompts", "{tmp}/mixed.txt", "--json", "{tmp}/o.json"], "the same number of segments"),
    "folder in use": (["train", "--output_dir", "{tmp}"], "is not empty; name another --output_dir, or give"),
    "folder is a file": (["train", "--output_dir", "{tmp}/one.txt"], "is a file; name a folder"),
    "model": (["train", "--model", "{tmp}/none"], "none is no pocket model (it has no student/)"),
    "pocket folder": (["demo", "--model", "{tmp}/none"], "holds no model; run `kvpo-min distill"),
    "option of a real model": (["train", "--height", "64"], "height is an option of a real model"),
    "export without": (["export"], "--adapter FOLDER is required"),
    "export layout": (["export", "--adapter", "x", "--layout", "kohya"], "layout must be"),
    "export nothing": (["export", "--adapter", "{tmp}/none"], "there is no adapter"),
    "export folder": (["export", "--adapter", "{tmp}", "--output_dir", "{tmp}"], "is not empty; name another"),
    "nothing to resume": (["train", "--resume_from_checkpoint", "latest"], "there is no checkpoint in"),
    "no checkpoint": (["train", "--resume_from_checkpoint", "{tmp}"], "is not a checkpoint"),
    "sample nothing": (["sample"], "give either a script in quotes, or --prompts FILE"),
    "sample both": (["sample", "a disc", "--prompts", "{tmp}/one.txt"], "give either a script"),
    "sample words": (["sample", "a blue sqare"], "did you mean 'square'?"),
    "sample long": (["sample", "a disc | it rests | it rests | it rests | it rests"], "at most 4 segments, got 5"),
    "sample folder": (["sample", "a disc", "--output_dir", "{tmp}"], "is not empty; name another --output_dir"),
    "eval without": (["eval", "--prompts", "{tmp}/one.txt"], "--json FILE is required"),
    "eval folder": (["eval", "--prompts", "{tmp}/one.txt", "--json", "{tmp}"], "is a folder"),
    "distill folder": (["distill", "--output_dir", "{tmp}"], "is not empty"),
    "doctor folder": (["doctor", "--output_dir", "{tmp}/absent"], "there is no run folder"),
    "adapter": (["sample", "a disc", "--model", "{model}", "--adapter", "{tmp}"], "it has no adapter_config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(case, model, tmp_path, capsys, monkeypatch):
    (tmp_path / "key.yaml").write_text("num_generation: 4\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "no.yaml").write_text("a: [1\n")
    (tmp_path / "one.txt").write_text("a disc\n")
    (tmp_path / "bad.txt").write_text("# comment\na rde disc\n")
    (tmp_path / "mixed.txt").write_text("a disc\na disc | it rests\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = contents(tmp_path)
    argv, message = WRONG[case]
    assert cli.main([word.format(tmp=tmp_path, model=model) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvpo-min: error: ") and err.count("\n") == 1 and message in err
    assert contents(tmp_path) == before and not list(elsewhere.iterdir())


def test_home_is_expanded_in_every_option_and_file(tmp_path, monkeypatch):
    """In flags, in YAML, and in the path of the YAML file; a script may begin with what it likes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/run\nlora: ~/lora.pt\ncomponents: ~/wan\n")
    classes = [TrainConfig, cli_options.RunOptions, WanOptions]
    argv = ["--config", "~/c.yaml", "--prompts", "~/p.txt", "--model=~/pocket", "--resume_from_checkpoint", "~/run/c"]
    values = cli_options.all_options(*cli_options.parse_options("train", classes, argv))
    places = dict(output_dir="run", lora="lora.pt", components="wan", prompts="p.txt", model="pocket")
    for name, place in (places | {"resume_from_checkpoint": "run/c"}).items():
        assert values[name] == f"{tmp_path}/{place}"
    assert cli_options.parse_options("sample", [cli_options.SampleOptions], ["~ a disc"])[0].script == "~ a disc"
    with pytest.raises(ValueError, match="--prompts.*~nobody-of-that-name"):
        cli_options.parse_options("train", classes, ["--prompts", "~nobody-of-that-name/p.txt"])
    (tmp_path / "p.txt").write_text("a disc\n")
    assert world.read_prompts("~/p.txt") == ["a disc"]


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


OUTPUTS = {
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "full": lambda: open("/dev/full", "w"),
    "gone": closed_pipe,
    "none": lambda: None,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_result_that_cannot_be_printed_is_saved_and_no_failure(output, make_pipeline, tmp_path, monkeypatch):
    result = {"vq": 0.5, "mq": 0.5, "ta": 0.5, "reward": 1.5, "reward_sem": 0.25, "judge": {"all": 1.0}}
    monkeypatch.setattr(cli_eval, "evaluate", lambda *args, **kwargs: result)
    monkeypatch.setattr(pocket, "load_model", lambda *args: make_pipeline())
    (tmp_path / "p.txt").write_text("a disc\n")
    streams = [OUTPUTS[output](), OUTPUTS[output]()]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    code = cli.main(["eval", "--prompts", str(tmp_path / "p.txt"), "--json", str(tmp_path / "a.json")])
    assert [sys.stdout, sys.stderr] == streams
    monkeypatch.undo()
    assert code == 0 and json.loads((tmp_path / "a.json").read_text())["reward"] == 1.5
    if output == "ascii":
        streams[0].seek(0)
        assert "1.500 \\xb1 0.250" in streams[0].read()


def test_pictures_that_cannot_be_made_cost_no_result(model, tmp_path, capsys, monkeypatch):
    """It is tried before the first update, and said; the result is measured all the same, and the card shows none."""

    def broken(*args, **kwargs):
        raise RuntimeError("ffmpeg: no such codec")

    for name in ("reward_curve", "save_video", "before_after"):
        monkeypatch.setattr(f"kvpo_min.viz.{name}", broken)
    argv = ["train", "--model", str(model), "--output_dir", str(tmp_path / "run"), *SMALL, "--max_train_steps", "1"]
    assert cli.main([*argv, "--eval_every", "0", "--num_iterations", "1"]) == 0
    err = capsys.readouterr().err
    assert err.index("no such codec") < err.index("before training") and err.count("pictures are left out") == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]["reward"] > 0
    assert "![" not in (tmp_path / "run" / "README.md").read_text()


def test_a_broken_ffmpeg_is_said_before_a_video_is_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho wrong version >&2\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(mediapy._config, "ffmpeg_name_or_path", "ffmpeg")  # as in a new process
    monkeypatch.setattr(pocket, "load_model", None)  # would fail if it were reached
    assert cli.main(["sample", "a disc", "--output_dir", str(tmp_path / "out")]) == 2
    assert "videos cannot be written" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "sample"])
@pytest.mark.parametrize("where", ["weights", "latents", "pixels"])
def test_what_is_not_finite_ends_a_command_with_a_name(command, where, model, tmp_path, capsys, monkeypatch):
    """No JSON with a mean of it, no black video."""
    place, load = tmp_path / "model", pocket.load_model
    shutil.copytree(model, place)
    if where == "weights":
        file = place / "student" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["blocks.0.attn1.to_q.weight"][3, 4] = float("nan")
        save_file(weights, file, {"format": "pt"})

    def spoiled(*args):
        pipeline = load(*args)
        if where == "latents":
            pipeline.backbone.velocity = lambda x, *more: x * float("inf")
        else:
            decode = pipeline.decode
            pipeline = dataclasses.replace(
                pipeline, decode=lambda z: decode(z).index_fill(1, torch.tensor([2]), float("nan"))
            )
        return pipeline

    if where != "weights":
        monkeypatch.setattr(pocket, "load_model", spoiled)
    (tmp_path / "p.txt").write_text("a disc\n")
    out = ["--json", str(tmp_path / "a.json")] if command == "eval" else ["--output_dir", str(tmp_path / "out")]
    code = cli.main([command, "--prompts", str(tmp_path / "p.txt"), "--model", str(place), "--num_frames", "6", *out])
    err = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    named = {"weights": "blocks.0.attn1.to_q.weight", "latents": "the latents", "pixels": "the pixels"}[where]
    assert code == (2 if where == "weights" else 1) and len(err) == 1 and named in err[0] and "not finite" in err[0]
    assert not (tmp_path / "a.json").exists() and not list(tmp_path.rglob("*.mp4"))


def test_numbers_do_not_depend_on_torchs_defaults(make_pipeline):
    made = []
    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            noise = draw_noise(2, 4, (3, 8, 4, 4), torch.Generator().manual_seed(0))
        finally:
            torch.set_default_dtype(before)
        made.append(noise)
    assert made[0].dtype == made[1].dtype == torch.float32 and made[0].equal(made[1])


def test_damaged_model_is_named(model, tmp_path, capsys):
    for part in ("autoencoder", "student"):
        (tmp_path / part).mkdir()
        for path in (model / part).iterdir():
            (tmp_path / part / path.name).write_bytes(path.read_bytes()[:2000])
    assert cli.main(["sample", "a disc", "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} cannot be loaded as a model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_tensorboard_is_said_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(["train", "--report_to", "tensorboard", "--output_dir", str(tmp_path / "run")]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_tensorboard_receives_every_number(monkeypatch, tmp_path):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(folder)

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    options = cli_options.RunOptions(report_to="tensorboard")
    report = cli_run.reporter(TrainConfig(output_dir=str(tmp_path)), options)
    assert seen == []  # nothing is opened for a run that may yet be refused
    report({"step": 3, "reward": 0.5})
    report({"step": 4, "reward": 0.75})
    assert seen == [str(tmp_path / "runs"), ("step", 3, 3), ("reward", 0.5, 3), ("step", 4, 4), ("reward", 0.75, 4)]


# ---------------------------------------------------------------------------------------------------------------- runs


def test_run_leaves_what_is_promised(finished):
    names = {str(path) for path in contents(finished)}
    assert names >= {
        "config.yaml", "metrics.jsonl", "summary.json", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "figures/reward.png", "figures/diagnostics.png", "figures/energies.png", "figures/routes_0000.png",
        "figures/story_0003.png", "videos/before_after.png", "videos/group_0000.mp4", "videos/group_0003.png",
        "checkpoint-4/state.json",
    }  # fmt: skip
    assert sum(name.startswith("videos/before_after_") and name.endswith(".mp4") for name in names) == 2
    assert not any(name.endswith(".aside") for name in names)
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert ["eval/reward" in line for line in lines] == [False, True, False, True] and "eval0/reward" in lines[0]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["updates"] == 4 and summary["seed"] == 0 and summary["seconds"] > 0
    assert lines[3]["eval/reward"] == summary["after"]["reward"] != lines[1]["eval/reward"]  # both are of 2 prompts
    card = (finished / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    row = next(line.split(" | ") for line in card.splitlines() if line.startswith("| MQ | "))
    assert [cell.split()[0] for cell in row[1:3]] == [f"{summary[when]['mq']:.3f}" for when in ("before", "after")]


def test_summary_is_what_a_stranger_measures_with_peft(finished, model):
    """Loads the folder with peft alone, on a new base: breaks if another adapter, or none, were saved or measured."""
    from peft import PeftModel

    summary = json.loads((finished / "summary.json").read_text())
    held_out = world.prompt_set(2, 1, prompts_of.EVAL_SEED, DEFAULTS["event"])
    assert not set(held_out) <= set(world.prompt_set(2, 1, 0, DEFAULTS["event"]))
    pipeline, rewards = (
        load_pocket(folder=model),
        pocket_rewards(**{name: DEFAULTS[name] for name in ("vq", "mq", "ta")}),
    )
    n_frames = DEFAULTS["num_frames"]
    assert system.finite(evaluate(pipeline, held_out, rewards, n_frames)) == summary["before"]
    PeftModel.from_pretrained(pipeline.backbone.transformer, finished)
    assert system.finite(evaluate(pipeline, held_out, rewards, n_frames)) == summary["after"]
    assert summary["before"] != summary["after"]


def test_config_of_a_run_is_the_run(finished, model):
    argv = ["--config", str(finished / "config.yaml")]
    config, options = cli_options.parse_options("train", [TrainConfig, cli_options.RunOptions], argv)
    small = dict(max_train_steps=4, num_generations=3, rank=2, tau_groups=1, checkpointing_steps=2)
    small |= dict(groups_per_update=1, num_iterations=2, lr_scheduler="constant")
    demo = {name: value for name, value in DEFAULTS.items() if name in TrainConfig.__dataclass_fields__}
    assert config == TrainConfig(**demo | small | {"output_dir": str(finished)})
    demo = {name: value for name, value in DEFAULTS.items() if name not in demo}
    assert options == cli_options.RunOptions(**demo | {"model": str(model), "eval_prompts": 2, "eval_every": 2})


def test_resumed_run_equals_an_uninterrupted_one(finished, model, tmp_path, capsys, undrawn):
    argv = ["train", "--model", str(model), "--output_dir", str(tmp_path / "run"), *SMALL]
    for name, value in DEFAULTS.items():
        if f"--{name}" not in argv:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    assert cli.main([*argv, "--max_train_steps", "2"]) == 0
    with (tmp_path / "run" / "metrics.jsonl").open(
        "a"
    ) as file:  # an update after the checkpoint, then the lights went out
        file.write('{"step": 2, "reward": 99, "step_time": 1.0}\n')
    before = contents(tmp_path)
    resume = [*argv, "--resume_from_checkpoint", "latest"]
    assert cli.main([*resume, "--max_train_steps", "2"]) == 2
    assert "nothing is left to do" in capsys.readouterr().err
    assert cli.main([*resume, "--max_train_steps", "4", "--kl_coef", "9"]) == 2
    assert f"was made with kl_coef {DEFAULTS['kl_coef']}, not 9.0" in capsys.readouterr().err
    assert cli.main([*resume, "--max_train_steps", "4", "--ta", "2"]) == 2
    assert f"was made with ta {DEFAULTS['ta']}, not 2.0" in capsys.readouterr().err
    assert cli.main([*resume, "--max_train_steps", "4", "--like", "night"]) == 2
    assert "was made with like 'beach,meadow,forest', not 'night'" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert cli.main([*resume, "--max_train_steps", "4"]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)  # the held-out curve's numbers among them
    saved = "adapter_model.safetensors"
    assert (tmp_path / "run" / saved).read_bytes() == (finished / saved).read_bytes()


def test_overwriting_must_be_asked_for_and_spares_other_files(model, tmp_path, capsys, undrawn):
    (tmp_path / "checkpoint-9").mkdir()
    for name in ("metrics.jsonl", "checkpoint-9/state.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    argv = ["demo", "--model", str(model), "--output_dir", str(tmp_path), "--max_train_steps", "1", *SMALL]
    assert cli.main(argv) == 2 and "--overwrite_output_dir" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "old"
    assert cli.main([*argv, "--overwrite_output_dir"]) == 0
    assert len(metrics(tmp_path)) == 1 and (tmp_path / "notes.txt").read_text() == "old"
    assert not (tmp_path / "checkpoint-9").exists()


def test_interrupted_run_keeps_what_it_has(model, tmp_path, capsys, monkeypatch, undrawn):
    def interrupted(*arguments):
        yield next(train(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("kvpo_min.train.train", interrupted)
    argv = ["train", "--model", str(model), "--output_dir", str(tmp_path / "run"), *SMALL]
    assert cli.main(argv) == 130
    err = capsys.readouterr().err
    assert "interrupted after 1 updates; what there is was saved; there is no checkpoint: start again with" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"] is None and summary["before"]["reward"] > 0 and len(metrics(tmp_path / "run")) == 1
    pipeline = load_pocket(folder=model)
    weights = adapter_weights(adapters.load_adapter(pipeline, tmp_path / "run"), "default")
    assert all(weight.abs().max() > 0 for weight in weights.values())  # B left zero: the update is in it


def test_an_adapter_is_saved_over_what_a_killed_run_left(model, tmp_path):
    """peft reads the model card that it finds where it saves; this one was cut off in its header."""
    pipeline = load_pocket(folder=model)
    policies = add_policies(pipeline, TrainConfig(rank=2))
    (tmp_path / "adapter.aside").mkdir()
    (tmp_path / "adapter.aside" / "README.md").write_text("---\nlibrary_name: [peft\n---\n")
    adapters.save_adapter(policies, tmp_path, "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("how", ["torchrun", "--processes"])
def test_two_processes_leave_one_run(model, tmp_path, how):
    """One folder, each update once, the weights and measurements of a single process."""
    argv = ["train", "--model", str(model), *SMALL, "--max_train_steps", "2", "--groups_per_update", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if how == "torchrun" else []
    own = ["--processes", "2"] if how == "--processes" else []
    start = [sys.executable, *start, "-m", "kvpo_min.cli", *argv, *own, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "one")]) == 0
    assert [line["step"] for line in metrics(tmp_path / "two")] == [0, 1]
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-6)  # prefixes are made in other batches, that is, rounded
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    for when in ("before", "after"):
        assert two[when].pop("judge") == pytest.approx(one[when].pop("judge"), nan_ok=True)
        assert two[when] == pytest.approx(one[when], rel=1e-5, abs=1e-6)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-6 for key in one)
    assert done.stdout.count("| reward") + done.stdout.count("\nreward") == 1  # one table


def test_ctrl_c_ends_all_processes_and_keeps_the_last_update(model, tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "--model", str(model), *SMALL, "--max_train_steps", "200", "--groups_per_update", "2"]
    start = [sys.executable, "-m", "kvpo_min.cli", *argv, "--processes", "2", "--output_dir", str(folder)]
    run = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 2:
        assert run.poll() is None and time.monotonic() < wait_for, run.stderr.read()[-2000:]
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "what there is was saved" in err and "Traceback" not in err
    assert (folder / "adapter_model.safetensors").exists()
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    assert left.stdout == ""


def test_diverging_run_is_told_apart_from_wrong_input(model, tmp_path, capsys, monkeypatch, undrawn):
    def diverging(*arguments):
        raise FloatingPointError("update 3: the loss is nan; lower learning_rate")
        yield

    monkeypatch.setattr("kvpo_min.train.train", diverging)
    assert cli.main(["train", "--model", str(model), "--output_dir", str(tmp_path / "run"), *SMALL]) == 1
    assert "kvpo-min: error: update 3: the loss is nan; lower learning_rate" in capsys.readouterr().err


def test_table_marks_what_does_not_exist():
    before = {"vq": 0.5, "mq": 0.25, "ta": 1.0, "reward": 1.75, "reward_sem": 0.01, "judge": {"all": float("nan")}}
    after = before | {"vq": 0.75, "judge": {"all": 0.5}}
    rows = [line.split() for line in generator.table({"before": before, "after": after}).splitlines()]
    assert rows[0] == ["before", "after", "change"] and rows[1] == ["VQ", "0.500", "0.750", "+0.250"]
    assert rows[4] == ["reward", "1.750", "±", "0.010", "1.750", "±", "0.010", "+0.000"]
    assert rows[5] == ["judge:", "all", "-", "0.500", "-"]


# ------------------------------------------------------------------------------------------------------------ adapters


def velocity(pipeline):
    x = torch.randn(2, 3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return pipeline.backbone.velocity(x, torch.tensor([1.0, 0.5]), 6, pipeline.embed(["a red disc"]), None)


def test_saved_adapter_reloads_bit_for_bit(make_pipeline, tmp_path):
    from peft import PeftModel

    pipeline = make_pipeline()
    base = velocity(pipeline)
    policies = add_policies(pipeline, TrainConfig(rank=3, lora_alpha=3))
    with torch.no_grad():
        for name in ("default", "old"):
            for weight in adapter_weights(policies, name).values():
                weight.copy_(torch.randn(weight.shape))
    trained = velocity(pipeline)
    adapters.save_adapter(policies, tmp_path, "tiny")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    ours = make_pipeline()
    loaded = adapters.load_adapter(ours, tmp_path)
    peft = make_pipeline()
    PeftModel.from_pretrained(peft.backbone.transformer, tmp_path)
    assert velocity(ours).equal(trained) and velocity(peft).equal(trained) and not trained.equal(base)
    for key, weight in adapter_weights(loaded, "default").items():
        assert weight.equal(adapter_weights(policies, "default")[key]) and not weight.requires_grad
    with pytest.raises(ValueError, match="has an adapter already"):
        adapters.load_adapter(ours, tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "damaged or not a LoRA"),
        (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LOHA"}'), "peft_type is not LORA"),
        (lambda f: cut(f / "adapter_model.safetensors"), "damaged or not a LoRA"),
        (lambda f: edit(f, r=5), "do not fit, the first is"),
        (lambda f: edit(f, target_modules=["to_q"]), "do not fit, the first is"),
        (lambda f: edit(f, target_modules=["elsewhere"]), "made for another model"),
    ],
)
def test_bad_adapter_is_refused_and_leaves_the_model_alone(damage, message, make_pipeline, tmp_path):
    pipeline = make_pipeline()
    adapters.save_adapter(add_policies(pipeline, TrainConfig(rank=2)), tmp_path, "tiny")
    damage(tmp_path)
    pipeline = make_pipeline()
    base = velocity(pipeline)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapters.load_adapter(pipeline, tmp_path)
    assert velocity(pipeline).equal(base)
    assert not any("lora" in name for name, _ in pipeline.backbone.named_modules())


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------- sample, eval


def test_sample_writes_a_video_and_a_sheet_a_script(finished, model, tmp_path):
    from PIL import Image

    from kvpo_min import viz

    (tmp_path / "p.txt").write_text("a red disc moves left\na cross | it turns blue\na square\n")
    argv = ["sample", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--output_dir"]
    assert cli.main([*argv, str(tmp_path / "out")]) == 0
    names = ["000_a_red_disc_moves_left", "001_a_cross_it_turns_blue", "002_a_square"]
    expected = sorted(f"{name}.{kind}" for name in names for kind in ("mp4", "png"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    lengths = [len(viz.video._media().read_video(tmp_path / "out" / f"{name}.mp4")) for name in names]
    assert lengths == [39, 75, 39]  # two segments: up to where a third would begin
    (tmp_path / "out" / "mine.txt").write_text("kept")
    one = ["sample", "a square", "--model", str(model), "--num_frames", "21", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*one, "--overwrite_output_dir"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000_a_square.mp4", "000_a_square.png", "mine.txt"]

    one = ["sample", "a red disc moves left", "--model", str(model), "--num_frames", "21", "--output_dir"]
    for name, more in (("a", []), ("b", []), ("c", ["--adapter", str(finished)]), ("d", ["--seed", "1"])):
        assert cli.main([*one, str(tmp_path / name), *more]) == 0
    a, b, c, d = (Image.open(tmp_path / name / f"{names[0]}.png").tobytes() for name in "abcd")
    assert a == b and a != c and a != d


def test_eval_writes_what_evaluate_measures(finished, model, tmp_path, capsys):
    scripts = ["a red disc moves left", "a cross wanders"]
    (tmp_path / "p.txt").write_text("\n".join(scripts))
    out = tmp_path / "new" / "result.json"
    argv = [
        "eval",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--json",
        str(out),
        "--model",
        str(model),
        "--num_frames",
        "21",
    ]
    assert cli.main([*argv, "--adapter", str(finished), "--vq", "2", "--seed", "4"]) == 0
    result = json.loads(out.read_text())
    pipeline = load_pocket(folder=model)
    adapters.load_adapter(pipeline, finished)
    wanted = system.finite(evaluate(pipeline, scripts, pocket_rewards(vq=2.0), 21, seed=4))
    assert {key: result[key] for key in wanted} == wanted and result["n"] == 2 and result["num_frames"] == 21
    assert f"{wanted['reward']:.3f} ± {wanted['reward_sem']:.3f}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- distill


def test_distill_passes_its_options_on_and_goes_on_with_its_own_folder(tmp_path, monkeypatch, capsys):
    seen = []

    def distill(config):
        (Path(config.output_dir) / "teacher").mkdir(parents=True)
        seen.append(config)
        return {"student": {"reward": float("nan")}}

    monkeypatch.setattr("kvpo_min.pocket.distill.distill", distill)
    argv = ["distill", "--output_dir", str(tmp_path / "m"), "--teacher_steps", "7"]
    assert cli.main(argv) == 0 and (seen[0].teacher_steps, seen[0].output_dir) == (7, str(tmp_path / "m"))
    assert json.loads((tmp_path / "m" / "report.json").read_text()) == {"student": {"reward": None}}
    monkeypatch.setattr("kvpo_min.pocket.distill.distill", lambda config: Path(config.output_dir) / "weights")
    assert cli.main(argv) == 0 and f"--model {tmp_path / 'm' / 'weights'}" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_a_sound_model_and_run_sound(finished, model, capsys):
    argv = ["doctor", "--model", str(model), "--rank", "2", "--num_generations", "3", "--output_dir", str(finished)]
    code, out = cli.main(argv), capsys.readouterr().out
    assert code == 0, out
    assert "25 of 25 checks passed" in out and out.count("PASS") == 25 and "FAIL" not in out


def test_doctor_reports_an_update_that_cannot_run(model, capsys, monkeypatch):
    def broken(*arguments):
        raise ValueError("energies of a group must differ")
        yield

    monkeypatch.setattr(doctor, "train", broken)
    assert cli.main(["doctor", "--model", str(model), "--rank", "2"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  one update runs  (energies of a group must differ)\n      usual cause: " in out


@pytest.fixture(scope="module")
def update(make_pipeline):
    """One update of the tiny pipeline: (pipeline, policies, weights before, step, config)."""
    pipeline = make_pipeline()
    config = doctor.doctor_config(doctor.DoctorOptions(num_generations=3, rank=2))
    policies = add_policies(pipeline, config)
    before = {key: weight.detach().clone() for key, weight in adapter_weights(policies, "default").items()}
    step = next(train(pipeline, world.prompt_set(4, 1, 0), pocket_rewards(), config, policies))
    return pipeline, policies, before, step, config


def failures(checks):
    return [check.name for check in checks if not check.passed]


def test_doctor_sees_what_is_broken(update):
    """Every check fails when, and only when, what it looks at is broken: a check that cannot fail proves nothing."""
    pipeline, policies, before, step, config = update
    group = step.groups[0]

    def broken(**changes):
        return dataclasses.replace(step, groups=[dataclasses.replace(group, **changes)])

    def energies(step):
        return failures(doctor.check_energies(pipeline, policies, step, config))

    def routed(routes):
        return failures(doctor.check_routes(broken(plan=Plan(group.plan.fork, group.plan.pool, routes, 5)), config))

    assert failures(doctor.check_routes(step, config)) == [] and energies(step) == []
    assert failures(doctor.check_signal(step)) == []
    assert failures(doctor.check_weights_moved(policies, before, step)) == []

    future = group.plan.routes.clone()
    future[0, -1] = group.plan.fork
    assert routed(future) == ["routes hold past frames only, after the sink and before the nearest"]
    assert routed(group.plan.routes[:1].expand(3, -1)) == ["branches read different frames"]

    assert energies(broken(ratio=group.ratio + 1e-6)) == ["the ratio is exactly 1 at equal weights"]
    assert energies(broken(log_p=group.log_p + 0.01)) == [
        "a second replay of the old policy gives the same probabilities"
    ]
    assert energies(broken(prefix_drift=1e-3)) == ["the shared prefix has not drifted at the start"]
    assert energies(broken(kl=1e-3)) == ["KL to the initial policy is 0 at the start"]
    assert energies(broken(energies=torch.zeros_like(group.energies)))[0].startswith(
        "the branches' energies are above 0"
    )
    cold = dataclasses.replace(step, tau=1.0)
    assert "tau matches the spread of the energies" in energies(cold)
    rollout = group.rollout
    other_words = dataclasses.replace(rollout, text=pipeline.embed(["a purple cross wanders"]))
    assert "the anchor's energy under its own context is 0" in energies(broken(rollout=other_words))

    flat = {name: torch.full_like(r, 0.5) for name, r in group.rewards.items()}
    assert failures(doctor.check_signal(broken(rewards=flat))) == ["rewards of a group differ"]
    assert failures(doctor.check_signal(broken(advantages=torch.zeros(3)))) == ["advantages are finite and not all 0"]
    assert failures(doctor.check_signal(broken(loss=float("nan")))) == ["everything that is logged is finite"]

    now = {key: weight.detach().clone() for key, weight in adapter_weights(policies, "default").items()}
    assert failures(doctor.check_weights_moved(policies, now, step)) == ["every weight with a gradient changed"]
    still = dataclasses.replace(step, grad_norm=0.0)
    assert failures(doctor.check_weights_moved(policies, before, still)) == ["the gradient is finite and above 0"]
    weight = next(w for key, w in adapter_weights(policies, "default").items() if "lora_B" in key)
    gradient, weight.grad = weight.grad, None
    checks = doctor.check_weights_moved(policies, before, step)
    assert failures(checks) == ["every LoRA pair is reached by the gradient"]
    weight.grad = gradient


def test_doctor_says_why_its_update_was_skipped(update, make_pipeline, monkeypatch):
    step = dataclasses.replace(update[3], skipped="the reward is not finite")
    monkeypatch.setattr(pocket, "load_model", lambda folder: make_pipeline())
    monkeypatch.setattr(doctor, "train", lambda *args: iter([step]))
    (check,) = doctor.check_update(doctor.DoctorOptions(num_generations=3, rank=2))
    assert (check.passed, check.seen) == (False, "the reward is not finite") and "weights or rewards" in check.cause


WHOLE, CONFIG, METRICS, SUMMARY, ASIDE, LOADS = (
    "the adapter is whole, finite and of the run's rank", "config.yaml reads as a run",
    "metrics.jsonl is complete and finite", "summary.json is complete", "nothing is half-written",
    "the adapter loads and changes the model",
)  # fmt: skip
RESUMES = "checkpoints can be resumed from"
ADAPTER, STEP = "adapter_model.safetensors", "checkpoint-4"


def line(number, text):
    """Replaces a line of metrics.jsonl."""

    def damage(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[number - 1] = text
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name):
    return lambda folder: (folder / name).unlink()


def spoil(name, change):
    """Changes the tensors of a file."""

    def damage(folder):
        save_file(change(load_file(folder / name)), folder / name)

    return damage


def nan(state):
    next(iter(state.values())).view(-1)[0] = float("nan")
    return state


DAMAGES = {  # what is done to a run -> the checks that fail, and what they say
    "no config": (without("config.yaml"), {CONFIG: "there is no config file", WHOLE: "there is no config file"}),
    "unknown key": (write("config.yaml", "sede: 1\n"), {CONFIG: "did you mean 'seed'"}),
    "no mapping": (write("config.yaml", "- 1\n"), {CONFIG: "got a list", WHOLE: "got a list"}),
    "config of another run": (lambda f: (f / "config.yaml").write_text("rank: 5\n"), {WHOLE: "config.yaml says 5"}),
    "bad value": (lambda f: (f / "config.yaml").write_text("rank: 2\ngrad_steps: 9\n"), {CONFIG: "grad_steps"}),
    "no metrics": (without("metrics.jsonl"), {METRICS: "0 updates"}),
    "cut metrics": (lambda f: cut(f / "metrics.jsonl"), {METRICS: "line 4: expected the JSON of an update"}),
    "broken line": (line(2, "{oh"), {METRICS: "line 2: expected the JSON of an update, got '{oh'"}),
    "a line that is no record": (line(3, "[1, 2]"), {METRICS: "line 3: expected the JSON"}),
    "a number alone": (line(3, "3"), {METRICS: "line 3: expected the JSON"}),
    "NaN": (line(2, '{"step": 1, "loss": NaN}'), {METRICS: "line 2: loss is nan"}),
    "a word": (line(2, '{"step": 1, "loss": "low"}'), {METRICS: "line 2: loss is 'low'"}),
    "an update twice": (line(4, '{"step": 2}'), {METRICS: "line 4 is of update 2, expected 3"}),
    "no UTF-8": (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff"), {METRICS: "UTF-8"}),
    "no summary": (without("summary.json"), {SUMMARY: "summary.json"}),
    "half a summary": (write("summary.json", '{"updates": 4, "seconds": 1, "seed": 0}'), {SUMMARY: "after.reward"}),
    "another summary": (write("summary.json", "[]"), {SUMMARY: "list"}),
    "cut adapter": (lambda f: cut(f / ADAPTER), {WHOLE: "cut short", LOADS: "damaged"}),
    "no adapter": (without(ADAPTER), {WHOLE: ADAPTER, LOADS: f"it has no {ADAPTER}"}),
    "NaN weights": (spoil(ADAPTER, nan), {WHOLE: "not finite", LOADS: "not finite"}),
    "weights of another run": (
        spoil(ADAPTER, lambda s: {k: w.repeat(*((2, 1) if "lora_A" in k else (1, 2))) for k, w in s.items()}),
        {WHOLE: "its config says rank 2, but its matrices have rank 4", LOADS: "do not fit"},
    ),
    "a layer too few": (spoil(ADAPTER, lambda s: dict(list(s.items())[2:])), {LOADS: "do not fit"}),
    "an adapter that does nothing": (
        spoil(ADAPTER, lambda s: {k: 0 * w for k, w in s.items()}), {LOADS: "largest change of a velocity 0.0e+00"}
    ),
    "adapter config of another rank": (lambda f: edit(f, r=5), {WHOLE: "config says rank 5", LOADS: "do not fit"}),
    "adapter config cut": (lambda f: cut(f / "adapter_config.json"), {WHOLE: "damaged", LOADS: "damaged"}),
    "no state": (without(f"{STEP}/state.json"), {RESUMES: "state.json"}),
    "cut state": (lambda f: cut(f / STEP / "state.json"), {RESUMES: "char"}),
    "state of another step": (lambda f: (f / STEP).rename(f / "checkpoint-9"), {RESUMES: "checkpoint-9 holds update"}),
    "half a state": (write(f"{STEP}/state.json", '{"step": 4}'), {RESUMES: "checkpoint-4 is damaged"}),
    "cut training state": (lambda f: cut(f / STEP / "training_state.pt"), {RESUMES: "checkpoint-4 is damaged"}),
    "no old policy": (without(f"{STEP}/old.safetensors"), {RESUMES: "old.safetensors"}),
    "NaN average": (spoil(f"{STEP}/ema.safetensors", nan), {RESUMES: "ema base_model"}),
    "empty policy": (lambda f: (f / STEP / "default.safetensors").write_bytes(b""), {RESUMES: "is damaged"}),
    "killed while saving": (lambda f: (f / "checkpoint-6.aside").mkdir(), {ASIDE: "checkpoint-6.aside"}),
    "killed while a file was written": (write("summary.json.aside", ""), {ASIDE: "summary.json.aside"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_doctor_names_what_is_wrong_with_a_run(damage, finished, model, tmp_path):
    """The checks that look at it fail, by the name of the file, and no others."""
    for path, data in contents(finished).items():
        if path.suffix not in (".mp4", ".png"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_bytes(data)
    hurt, findings = DAMAGES[damage]
    hurt(tmp_path)
    checks = {check.name: check for check in doctor.check_run_folder(tmp_path, str(model), read_config)}
    assert [name for name, check in checks.items() if not check.passed] == [n for n in checks if n in findings]
    for name, said in findings.items():
        assert said in checks[name].seen and checks[name].cause


def test_doctor_reports_damage_without_a_traceback(finished, model, tmp_path, capsys, monkeypatch):
    """Everything at once, through the command."""
    monkeypatch.setattr(doctor, "check_update", lambda options: [])
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "adapter_config.json", ADAPTER):
        (tmp_path / name).write_bytes(b"\xff\x00[")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-4.aside").mkdir()
    assert cli.main(["doctor", "--output_dir", str(tmp_path), "--model", str(model)]) == 1
    out, err = capsys.readouterr()
    assert out.count("FAIL") == out.count("usual cause: ") == 7 and "0 of 7 checks passed" in out
    assert "Traceback" not in out + err
