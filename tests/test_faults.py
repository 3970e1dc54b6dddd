"""Faults that a strict tester found: each is refused with a sentence, or gives the right value."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvpo_min import cli, pocket, prompts, resume, system
from kvpo_min.checks import doctor
from kvpo_min.cli import folders
from kvpo_min.cli.doctor import read_config
from kvpo_min.cli.options import ExportOptions, RunOptions, SampleOptions, parse_options
from kvpo_min.compare import arena
from kvpo_min.config import TrainConfig
from kvpo_min.pipeline import evaluate
from kvpo_min.pocket import distill, world
from kvpo_min.policies import add_policies, base_hash, load_adapter, save_adapter
from kvpo_min.reward_models import WorkerReward
from kvpo_min.rewards import Mixture, NotFinite, RewardError
from kvpo_min.train import train
from kvpo_min.viz import save_video
from kvpo_min.wan.checkpoints import Lora, export_lora, load_transformer, merge_lora, read_lora
from kvpo_min.wan.real import WanOptions

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN = Mixture({"vq": lambda videos, prompts: videos.mean((1, 2, 3, 4))}, {"vq": 1.0})


@pytest.fixture
def adapter(make_pipeline, tmp_path):
    """A saved adapter of rank 2 and alpha 16."""
    policies = add_policies(make_pipeline(), TrainConfig(rank=2))
    save_adapter(policies, tmp_path, "tiny")
    return tmp_path


def weights_of(adapter, header=None):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, header)
    return path


# ---------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.mark.parametrize("alpha", [0, -16, float("nan")])
def test_an_adapter_without_a_scale_is_refused_when_it_is_loaded(adapter, make_pipeline, alpha):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    with pytest.raises(ValueError, match="adapter.*alpha"):
        load_adapter(make_pipeline(), adapter)


def test_two_alphas_are_refused_when_it_is_loaded_as_when_it_is_exported(adapter, make_pipeline):
    weights_of(adapter, {"lora_alpha": "64"})
    with pytest.raises(ValueError, match="64"):
        load_adapter(make_pipeline(), adapter)
    with pytest.raises(ValueError, match="64"):
        read_lora(adapter)
    weights_of(adapter, {"lora_alpha": "16"})
    load_adapter(make_pipeline(), adapter)


def test_loading_an_adapter_leaves_the_callers_random_numbers(adapter, make_pipeline):
    pipeline = make_pipeline()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_adapter(pipeline, adapter)
    assert torch.equal(torch.get_rng_state(), before)


def test_alpha_in_a_trainers_header_and_in_the_authors_yaml(adapter, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, alone / "n.safetensors", {"training_config": json.dumps({"rank": 2, "lora_alpha": 8})})
    assert read_lora(alone / "n.safetensors").alpha == 8
    torch.save({"generator_lora": tensors}, alone / "lora.pt")
    (alone / "config.yaml").write_text("adapter:\n  rank: 2\n  alpha: 6\n")
    assert read_lora(alone / "lora.pt").alpha == 6
    (alone / "config.yaml").write_text("a: [")  # another program's, or damaged: it says nothing
    assert read_lora(alone / "lora.pt").alpha == 2


def lora_of(size, alpha=1.0):
    a, b = torch.full((2, 24), size), torch.full((24, 2), size)
    return Lora({"blocks.0.attn1.to_q.lora_A.weight": a, "blocks.0.attn1.to_q.lora_B.weight": b}, alpha)


def test_a_merge_that_makes_infinite_weights_is_refused(make_transformer):
    with pytest.raises(ValueError, match="to_q.*alpha"):
        merge_lora(make_transformer(), lora_of(1e25))


@pytest.mark.parametrize("layout", ["peft", "diffusers", "authors"])
def test_an_export_is_whole_and_finite_or_is_not_there(layout, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="1e\\+39"):
        export_lora(lora_of(1.0, 1e39), tmp_path, layout)
    assert not list(tmp_path.iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kvpo_min.wan.checkpoints.sync", full)
        with pytest.raises(OSError, match="No space"):
            export_lora(lora_of(1.0), tmp_path, layout)
    assert not list(tmp_path.iterdir())
    path = export_lora(lora_of(1.0), tmp_path, layout)
    assert path.exists() and not (tmp_path / "export.aside").exists()
    assert read_lora(path).pair("blocks.0.attn1.to_q")[1].unique().tolist() == [0.5]


def test_options_that_would_do_nothing_are_refused(make_transformer, tmp_path):
    for kind, more in ((ExportOptions, {"adapter": "x"}), (WanOptions, {"device": "cpu"})):
        with pytest.raises(ValueError, match="merged_alpha"):
            kind(merged_alpha=5.0, **more)
    make_transformer().save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="weights_name.*nonsense"):
        load_transformer(tmp_path, which="nonsense")
    with pytest.raises(ValueError, match="local_weight"):
        TrainConfig(local_weight=0.0, global_weight=0.0)
    for more in ({"local_frames": 3, "perturb_num_blocks": 2}, {"local_frames": 6, "compat": "official"}):
        with pytest.raises(ValueError, match="local_frames"):
            TrainConfig(**more)
    with pytest.raises(ValueError, match="rank"):
        TrainConfig(rank=2_000_000_000)


# -------------------------------------------------------------------------------------------------------------- rewards


def test_a_sum_that_is_not_finite_is_no_reward(make_pipeline):
    huge = Mixture(MEAN.rewards, {"vq": 1e39})
    with pytest.raises(NotFinite, match="1e\\+39"):
        evaluate(make_pipeline(), ["a disc"], huge, 6)


@pytest.mark.parametrize("like", ["forrest", ("forrest",), (), ("left", "beach"), "left,right"])
def test_a_taste_is_checked_wherever_it_is_given(like):
    with pytest.raises(ValueError, match="like"):
        pocket.pocket_rewards(like=like)
    with pytest.raises(ValueError, match="like"):
        pocket.load_pocket(like=like)


def test_a_taste_may_be_words_or_a_tuple():
    for like in ("beach", ("beach",), "left"):
        reward = pocket.pocket_rewards(like=like).rewards["vq"]
        assert reward.like == ((like,) if isinstance(like, str) else like)


def test_a_caller_gets_a_sentence(make_pipeline):
    with pytest.raises(ValueError, match="script"):
        evaluate(make_pipeline(), [], MEAN, 6)
    config = TrainConfig(num_frames=24, global_frames=0, perturb_num_blocks=1, rank=2, tau=1.0, num_generations=2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        next(train(make_pipeline(), ["a disc"], MEAN, config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_words_do_not_depend_on_torchs_default(dtype):
    before = world.embed(["a red disc"])
    world._word_table.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(world.embed(["a red disc"]), before) and before.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        world._word_table.cache_clear()


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("line", [
    '{"prompts": ["a", "", "b"]}', '{"prompts": ["a"], "prompts": ["b"]}', '{"prompts": ["a"], "seed": 7}',
    '{"prompts": ["a \\ud800"]}',
])  # fmt: skip
def test_jsonl_that_would_be_guessed_at_is_refused(line, tmp_path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1"):
        prompts.read_prompts(tmp_path / "p.jsonl")


def test_a_script_alone_is_read_as_a_line_of_a_file_is():
    assert prompts.read_script("a red disc | it turns blue") == "a red disc | it turns blue"
    for script in ("a red disc | ", "a red disc|it turns blue", "a \ud800", '["a"]'):
        with pytest.raises(ValueError):
            prompts.read_script(script)


# ------------------------------------------------------------------------------------------------- files and folders


def test_results_do_not_replace_what_they_are_made_of(tmp_path, capsys):
    (tmp_path / "q.txt").write_text("a disc\n")
    argv = ["eval", "--prompts", str(tmp_path / "q.txt"), "--json", str(tmp_path / "q.txt")]
    assert cli.main(argv) == 2 and "prompts" in capsys.readouterr().err
    assert (tmp_path / "q.txt").read_text() == "a disc\n"


def test_output_folders_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    for argv in (
        ["train", "--output_dir", "", "--overwrite_output_dir"],
        ["export", "--adapter", "x", "--output_dir", ""],
    ):
        assert cli.main(argv) == 2
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="UTF-8"):
        parse_options("train", [TrainConfig], ["--output_dir", os.fsdecode(b"r\xff")])


def test_variables_in_paths_are_filled_in_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPO_PLACE", str(tmp_path))
    monkeypatch.delenv("KVPO_NOWHERE", raising=False)
    (given,) = parse_options("sample", [SampleOptions], ["a disc", "--output_dir", "$KVPO_PLACE/run"])
    assert given.output_dir == f"{tmp_path}/run"
    with pytest.raises(ValueError, match="KVPO_NOWHERE"):
        parse_options("sample", [SampleOptions], ["a disc", "--output_dir", "$KVPO_NOWHERE/run"])


def test_a_file_is_tried_with_its_folder_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("{}")
    folders.check_file(tmp_path / "a.json")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with pytest.raises(PermissionError):  # the file itself could be written, but not beside it
        folders.check_file(tmp_path / "a.json")
    monkeypatch.undo()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PermissionError):
        folders.check_file(tmp_path / "pipe")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    system.write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"


@pytest.mark.parametrize("folder", ["run:1", "-x", "pipe:"])
def test_folders_that_ffmpeg_takes_for_something_else(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir()
    path = save_video(Path(folder) / "a.mp4", torch.zeros(3, 3, 64, 64))
    assert path.stat().st_size > 0


def test_without_an_error_stream(monkeypatch):
    """`2>&-`: there is no sys.stderr at all."""
    from kvpo_min.cli.run import Progress

    monkeypatch.setattr(sys, "stderr", None)
    with cli.patient_output(), Progress(3, [], {}) as shown:
        shown({"reward": 1.0, "anchor_reward": 0.0})
    assert sys.stderr is None


# ------------------------------------------------------------------------------------------------------------- resuming


def checkpoint(tmp_path, **changes):
    state = {"config": {}, "step": 2, "tau": 1.0, "order": [0], "skips": 0, "logs": [{"step": 0}, {"step": 1}]}
    folder = tmp_path / "checkpoint-2"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state | changes))
    return folder


@pytest.mark.parametrize("changes", [
    {"config": []}, {"step": "2"}, {"logs": None}, {"logs": [1]}, {"order": [-1]}, {"order": ["x"]},
    {"tau": float("nan")}, {"tau": True}, {"skips": 1.5},
])  # fmt: skip
def test_a_state_of_the_wrong_kind_is_named(changes, tmp_path):
    assert resume.read_state(checkpoint(tmp_path))["step"] == 2
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        resume.read_state(checkpoint(tmp_path, **changes))


def test_only_numbers_are_numbers_of_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-007", "checkpoint-2", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert resume.checkpoints(tmp_path) == [2]


@pytest.mark.parametrize("content", ["[", "null", '["a", 1]'])
def test_damaged_scripts_of_a_run_are_named(content, tmp_path):
    config = TrainConfig(resume_from_checkpoint=str(checkpoint(tmp_path)))
    (tmp_path / "scripts.json").write_text(content)
    with pytest.raises(ValueError, match="scripts.json"):
        folders.earlier_scripts(config)


def test_metrics_that_are_no_text_are_named(tmp_path):
    from kvpo_min.cli.run import measured_before

    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    for read in (system.read_metrics, measured_before):
        with pytest.raises(ValueError, match="metrics.jsonl"):
            read(tmp_path / "metrics.jsonl")


def test_the_order_of_a_taste_says_nothing(tmp_path):
    folder = checkpoint(tmp_path, config={"like": "beach,meadow,forest", "max_train_steps": 60})
    folders.check_resume(folder, TrainConfig(), RunOptions(like="forest,beach,meadow"))
    with pytest.raises(ValueError, match="like"):
        folders.check_resume(folder, TrainConfig(), RunOptions(like="forest,beach"))


def test_a_run_does_not_go_on_upon_another_base(make_pipeline, tmp_path):
    small = dict(num_frames=24, global_frames=0, perturb_num_blocks=1, rank=2, tau=1.0, num_generations=2)
    config = TrainConfig(**small, output_dir=str(tmp_path), checkpointing_steps=1, max_train_steps=1)
    list(train(make_pipeline(), ["a disc"], MEAN, config))
    on = TrainConfig(**small, output_dir=str(tmp_path), resume_from_checkpoint="latest", max_train_steps=2)
    list(train(make_pipeline(), ["a disc"], MEAN, on))
    with pytest.raises(ValueError, match="base weights"):
        list(train(make_pipeline(seed=1), ["a disc"], MEAN, on))
    a, b, other = (make_pipeline(seed=s).backbone.transformer for s in (0, 0, 1))
    assert base_hash(a) == base_hash(b) != base_hash(other)


# ------------------------------------------------------------------------------------------------- arena and distilling


def test_an_arenas_file_is_held_and_its_numbers_are_numbers(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.csv"
    with system.claimed(tmp_path / "a.csv.inuse"):
        assert cli.main(["arena", "--csv", str(path), "--methods", "best_of_n"]) == 2
    assert "in use" in capsys.readouterr().err
    row = dict.fromkeys(arena.COLUMNS, "") | {"settings": "{}", "reward_after": "1,5"}
    arena.append_row(path, row)
    with pytest.raises(ValueError, match="row 1"):
        arena.read_rows(path)


def test_an_arena_does_not_mix_bases(make_pipeline, tmp_path):
    options = arena.ArenaOptions(csv=str(tmp_path / "a.csv"), mode="short", methods="best_of_n", seeds="0",
                                 eval_prompts=2, set="num_generations=2")  # fmt: skip
    three = Mixture(dict.fromkeys(("vq", "mq", "ta"), MEAN.rewards["vq"]), dict.fromkeys(("vq", "mq", "ta"), 1.0))
    assert len(list(arena.arena(make_pipeline, three, options))) == 1
    more = arena.replace(options, seeds="0,1")
    with pytest.raises(ValueError, match="base weights"):
        list(arena.arena(lambda: make_pipeline(seed=1), three, more))


def test_distilling_goes_on_with_the_same_settings_alone(tmp_path):
    path = tmp_path / "config.json"
    distill.check_settings(distill.DistillConfig(), path)
    distill.check_settings(distill.DistillConfig(teacher_steps=7, output_dir="elsewhere"), path)  # longer, or moved
    with pytest.raises(ValueError, match="seed 0, not 5"):
        distill.check_settings(distill.DistillConfig(seed=5), path)


def test_a_damaged_state_of_a_stage_is_named(tmp_path):
    (tmp_path / "training_state.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="training_state.pt is damaged"):
        distill.loop(tmp_path, 1, {}, {}, torch.Generator(), lambda i: 0.0, 1)


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("values, name", [
    ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_PORT": "1"}, "RANK"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "abc"}, "MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT"),
])  # fmt: skip
def test_variables_of_torchrun_are_checked(values, name, monkeypatch):
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=name):
        system.join_processes()


def test_processes_that_cannot_share_are_refused_before_they_start(monkeypatch):
    with pytest.raises(ValueError, match="groups_per_update 2"):
        system.processes_for(3, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert system.processes_for(2, 4) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert system.processes_for(2, 4) == 1


# --------------------------------------------------------------------------------------------------------- second round

WORKER = """
import json, sys
for n, line in enumerate(sys.stdin):
    {act}
    sys.stdout.flush()
"""


def worker(tmp_path, act, timeout=30):
    (tmp_path / "w.py").write_text(WORKER.format(act=act))
    return WorkerReward([sys.executable, str(tmp_path / "w.py")], timeout)


@pytest.mark.parametrize("act", [
    'print(json.dumps({"id": n, "scores": [1e300, 0.0]}))', 'print(json.dumps({"id": n, "scores": [10**400, 0]}))',
    'print(json.dumps({"id": n, "scores": [True, 0.5]}))', 'print(json.dumps({"id": -1, "scores": [0.5, 0.5]}))',
])  # fmt: skip
def test_scores_that_no_float_holds_are_refused(act, tmp_path):
    with pytest.raises(RewardError):
        worker(tmp_path, act)(torch.rand(2, 3, 3, 8, 8), ["a", "b"])


def test_a_late_answer_without_an_id_is_nobodys(tmp_path):
    act = 'print(json.dumps({"scores": [n, n]})); n or print(json.dumps({"scores": [9, 9]}))'
    reward, videos = worker(tmp_path, act), torch.rand(2, 3, 3, 8, 8)
    assert reward(videos, ["a", "b"]).tolist() == [0, 0]
    time.sleep(0.5)  # the second line has come
    assert reward(videos, ["a", "b"]).tolist() == [1, 1]


def test_a_workers_command_is_explained(tmp_path):
    with pytest.raises(ValueError, match="unclosed"):
        WorkerReward("python 'unclosed")
    for timeout in (float("inf"), "5", True):
        with pytest.raises(ValueError, match="timeout above 0"):
            WorkerReward("python", timeout)
    with pytest.raises(RewardError, match="worker env FOO=1 python"):
        WorkerReward("FOO=1 python w.py")(torch.rand(2, 3, 3, 8, 8), ["a", "b"])


def test_a_base_is_known_with_and_without_adapters_and_in_any_precision(make_pipeline):
    policies, plain = add_policies(make_pipeline(), TrainConfig(rank=2)), make_pipeline().backbone.transformer
    assert base_hash(policies) == base_hash(plain) == base_hash(plain.to(torch.bfloat16))


def test_what_is_no_adapters_folder_says_the_way_on(adapter, make_pipeline, tmp_path):
    with pytest.raises(ValueError, match="name the folder"):
        load_adapter(make_pipeline(), adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="kvpo-min export"):
        load_adapter(make_pipeline(), checkpoint(tmp_path))


def test_a_config_that_cannot_be_printed_is_a_failure():
    code = "import sys; from kvpo_min import cli; sys.exit(cli.main(['train', '--print_config']))"
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" > /dev/full'], stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"No space" in done.stderr


@pytest.mark.parametrize("broken", ["order", "optimizer", "alike"])
def test_doctor_refuses_what_a_resume_refuses(broken, make_pipeline, tmp_path):
    small = dict(num_frames=24, global_frames=0, perturb_num_blocks=1, rank=2, tau=1.0, num_generations=2)
    config = TrainConfig(**small, output_dir=str(tmp_path), checkpointing_steps=1, max_train_steps=1)
    list(train(make_pipeline(), ["a disc"], MEAN, config))
    folder = tmp_path / "checkpoint-1"
    assert resume.read_checkpoint(folder)[2]["step"] == 1
    if broken == "order":
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"order": "x"}))
    if broken == "optimizer":
        torch.save({}, folder / "training_state.pt")
    if broken == "alike":
        tensors = load_file(folder / "ema.safetensors")
        save_file(dict(list(tensors.items())[:2]), folder / "ema.safetensors")
    checks = doctor.check_run_folder(tmp_path, "", read_config)
    (found,) = [check for check in checks if "checkpoints" in check.name]
    assert not found.passed


def test_a_setting_that_a_method_lacks_names_those_that_have_it():
    """A row would say that it was made with it."""
    options = arena.ArenaOptions(csv="x", set="prefix_coef=0", methods="kvpo,rwr,astrolabe,best_of_n")
    assert arena.config_of("kvpo", options, 1e-3, 0).prefix_coef == 0
    with pytest.raises(ValueError, match="--methods kvpo,rwr has it"):
        arena.config_of("astrolabe", options, 1e-3, 0)


def test_losses_without_a_gradient_are_not_scaled_to_nothing():
    options = arena.ArenaOptions(csv="x")
    costs = arena.Costs(None, None, options, {"kvpo": (100, 0.0), "rwr": (100, 1.0)})
    with pytest.raises(ValueError, match="kvpo has no gradient"):
        costs.settle("rwr", arena.config_of("rwr", options, 1e-3, 0), 1000)


def test_a_check_of_a_notebook_never_raises():
    sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
    import teach

    runs = {"healthy": {"log": []}, "A": {"log": []}}
    for verdict in (teach.check_10_most([], runs, "x"), teach.check_05_tau(10**400, torch.rand(3)),
                    teach.check_02_drift(torch.arange(4).numpy(), {})):  # fmt: skip
        assert verdict.right is False and verdict.says
