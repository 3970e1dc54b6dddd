"""Nothing is lost: runs that are killed, interrupted or resumed, full disks, and numbers that are not finite."""

import contextlib
import errno
import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import SCRIPTS, Run, bitwise, numbers, only, ranked

from kvpo_min import cli, kvpo, system
from kvpo_min import policies as adapters
from kvpo_min.checks import doctor
from kvpo_min.cli import folders
from kvpo_min.cli import models as cli_models
from kvpo_min.cli import options as cli_options
from kvpo_min.cli import run as cli_run
from kvpo_min.cli.doctor import read_config
from kvpo_min.rewards import Mixture, RewardError
from kvpo_min.train import adapter_weights, add_policies, checkpoints, save_checkpoint, train
from kvpo_min.viz import report as cli_report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import kill_resume  # noqa: E402
from kill_resume import log_lines  # noqa: E402

training = importlib.import_module("kvpo_min.train")
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
SHORT = dict(num_frames=24, global_frames=0, perturb_num_blocks=1, num_generations=2)
FILES = {"default.safetensors", "ema.safetensors", "old.safetensors", "state.json", "training_state.pt"}


@pytest.fixture(scope="module")
def make_pipeline(make_pipeline, make_backbone):
    """With one layer: these tests make many updates."""
    return lambda: replace(make_pipeline(), backbone=make_backbone(layers=1))


def whole(folder):
    """The checkpoints of a folder; all of them must have all files."""
    for step in checkpoints(folder):
        assert {path.name for path in (folder / f"checkpoint-{step}").iterdir()} == FILES, step
    return checkpoints(folder)


def optimizer_in(checkpoint):
    """The tensors of the optimizer, flat."""
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer"]["state"]
    return {f"{k} {name}": tensor for k in state for name, tensor in state[k].items()}


def stopping(error, *calls):
    """A reward that raises `error` in these calls (counted from 0)."""
    count = iter(range(1000))

    def reward(videos, prompts):
        if next(count) in calls:
            raise error
        return videos[:, :, 0].mean((1, 2, 3))

    return only(reward)


# ----------------------------------------------------------------------------------------------------------- killed


def test_a_killed_run_that_is_resumed_ends_as_one_that_was_not():
    """Five moments of SIGKILL and one of SIGTERM: a process each, resumed in another (see kill_resume.py)."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--moments", "6", "--seed", "1"]
    command += ["--signals", *["KILL"] * 5, "TERM"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "moment" not in line]
    assert [row[1] for row in rows] == ["KILL"] * 5 + ["TERM"] and all(row[-1] == "yes |" for row in rows)
    assert "6 of 6 runs ended as the one that was not killed" in done.stdout
    assert "resumed" in {row[6] for row in rows}


def test_the_comparison_of_killed_runs_can_fail(finished, tmp_path):
    """A line that is there twice, an older adapter and a leftover are each seen."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    (tmp_path / "run" / "checkpoint-9.aside").mkdir()
    shutil.copy(finished / "checkpoint-6" / "ema.safetensors", tmp_path / "run" / "adapter_model.safetensors")
    ours, theirs = kill_resume.contents(tmp_path / "run"), kill_resume.contents(finished)
    assert [key for key in theirs if ours[key] != theirs[key]] == ["adapter", "metrics", "names"]


# ------------------------------------------------------------------------------------------------------ interrupted

WINDOW = SHORT | dict(old_policy_every=2, groups_per_update=2, tau=0.0, tau_groups=1, max_train_steps=4)


@pytest.fixture(scope="module")
def uninterrupted(make_pipeline, tmp_path_factory):
    """Four updates of two groups; the old policy is refreshed before updates 0 and 2."""
    folder = str(tmp_path_factory.mktemp("whole"))
    return Run(make_pipeline(), stopping(None), checkpointing_steps=50, output_dir=folder, **WINDOW).go()


def assert_goes_on(uninterrupted, first, make_pipeline, done):
    """The checkpoint of `done` updates is there; resumed, the run ends like the one that was not interrupted."""
    folder = Path(first.config.output_dir)
    assert whole(folder)[-1] == done
    again = dict(vars(first.config), resume_from_checkpoint="latest")
    second = Run(make_pipeline(), stopping(None), **again).go()
    assert [step.step for step in second.steps] == list(range(done, 4))
    assert numbers(second.steps) == numbers(uninterrupted.steps)[done:]
    for name in ("default", "old", "ema"):
        assert bitwise(second.weights(name), uninterrupted.weights(name))
    ours, theirs = (path / "checkpoint-4" for path in (folder, Path(uninterrupted.config.output_dir)))
    assert bitwise(optimizer_in(ours), optimizer_in(theirs))
    states = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
    assert states[0]["order"] == states[1]["order"] and len(states[0]["logs"]) == 4
    logs = [{k: v for k, v in line.items() if k != "step_time"} for line in states[0]["logs"]]
    assert logs == numbers(uninterrupted.steps)
    assert not list(folder.glob("*.aside"))


@pytest.mark.parametrize("call, done", [(5, 2), (6, 3)])  # of the reward: one a group
def test_ctrl_c_inside_an_update_keeps_those_before_it(call, done, uninterrupted, make_pipeline, tmp_path):
    """In the second group of update 2, after the refresh, and in the first of update 3, inside the window."""
    settings = WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=50)
    first = Run(make_pipeline(), stopping(KeyboardInterrupt(), call), **settings)
    with pytest.raises(KeyboardInterrupt):
        first.go()
    assert_goes_on(uninterrupted, first, make_pipeline, done)


def test_ctrl_c_waits_until_the_weights_have_moved(uninterrupted, make_pipeline, tmp_path, monkeypatch):
    """A real SIGINT in the optimizer's step: the update is finished first."""
    plain, count = torch.optim.AdamW.step, iter(range(100))

    def interrupted(self):
        if next(count) == 2:
            signal.raise_signal(signal.SIGINT)
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    first = Run(make_pipeline(), stopping(None), **WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=50))
    with pytest.raises(KeyboardInterrupt):
        first.go()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_goes_on(uninterrupted, first, make_pipeline, 3)


def test_any_other_error_keeps_what_was_trained_too(uninterrupted, make_pipeline, tmp_path):
    settings = WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=50)
    first = Run(make_pipeline(), stopping(KeyError("my reward is wrong"), 2), **settings)
    with pytest.raises(KeyError, match="my reward is wrong"):
        first.go()
    assert_goes_on(uninterrupted, first, make_pipeline, 1)


def test_a_second_ctrl_c_while_it_saves_corrupts_nothing(uninterrupted, make_pipeline, tmp_path, monkeypatch):
    settings = WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=2)
    first = Run(make_pipeline(), stopping(KeyboardInterrupt(), 6), **settings)
    for _ in range(3):
        next(first)

    def again(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", again)
    with pytest.raises(KeyboardInterrupt):
        next(first)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-3.aside").is_dir()
    assert_goes_on(uninterrupted, first, make_pipeline, 2)


def test_half_an_optimizer_step_is_never_saved(make_pipeline, tmp_path, monkeypatch):
    run = Run(make_pipeline(), stopping(None), **WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=50))
    next(run)
    plain = torch.optim.AdamW.step

    def half(self):
        plain(self)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(run)
    assert not list(tmp_path.iterdir())


def test_a_caller_who_stops_early_gets_no_files(make_pipeline, tmp_path):
    """Nor does one without checkpoints, unless he asks for one with `save_when_stopped`."""
    run = Run(make_pipeline(), stopping(None), **WINDOW | dict(output_dir=str(tmp_path), checkpointing_steps=50))
    next(run)
    run.updates.close()
    run = Run(make_pipeline(), stopping(KeyboardInterrupt(), 2), **WINDOW | dict(output_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert not list(tmp_path.iterdir())
    pipeline = make_pipeline()
    updates = train(pipeline, SCRIPTS, run.rewards, run.config, add_policies(pipeline, run.config), True)
    next(updates)
    with pytest.raises(KeyboardInterrupt):
        updates.throw(KeyboardInterrupt())
    assert whole(tmp_path) == [1]


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def saving(make_pipeline, tmp_path):
    """`save(step, **changes)` writes a checkpoint of a small model into tmp_path."""
    run = Run(make_pipeline(), output_dir=str(tmp_path))
    optimizer = torch.optim.AdamW(adapter_weights(run.policies, "default").values())

    def save(step, **changes):
        state = {"step": step, "tau": 1.0, "order": [], "skips": 0, "logs": []}
        return save_checkpoint(replace(run.config, **changes), run.policies, optimizer, torch.Generator(), state)

    return save


def test_there_is_a_whole_checkpoint_at_every_moment(saving, tmp_path, monkeypatch):
    """Looked at before and after everything that renames or deletes, with room for one checkpoint only; also when a
    checkpoint of that name is there."""
    moments = []

    def watched(plain):
        def call(*args, **kwargs):
            moments.append(whole(tmp_path))
            plain(*args, **kwargs)
            moments.append(whole(tmp_path))

        return call

    saving(1, checkpoints_total_limit=1)
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    saving(2, checkpoints_total_limit=1)
    assert whole(tmp_path) == [2] and all(moments) and [1, 2] in moments
    moments.clear()
    saving(3, checkpoints_total_limit=2)
    saving(3, checkpoints_total_limit=2)
    assert whole(tmp_path) == [2, 3] and all(moments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_deletion_that_was_cut_off_leaves_no_half_checkpoint(saving, tmp_path, monkeypatch):
    saving(1), saving(2)

    def cut_off(folder, **kwargs):
        if (folder / "default.safetensors").exists():
            (folder / "default.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        saving(3)
    monkeypatch.undo()
    assert whole(tmp_path) == [2, 3] and list(tmp_path.glob("*.aside"))
    saving(4)
    assert whole(tmp_path) == [3, 4] and not list(tmp_path.glob("*.aside"))


def test_the_newest_is_kept_beside_later_ones_of_an_earlier_run(saving, tmp_path):
    for step in (8, 9, 2):
        saving(step)
    assert whole(tmp_path) == [2, 9]
    assert [saving(step, checkpoints_total_limit=5) for step in (3, 4)] and whole(tmp_path) == [2, 3, 4, 9]


@pytest.mark.parametrize("file", ["default.safetensors", "training_state.pt"])
def test_a_full_disk_is_named_and_costs_no_checkpoint(file, make_pipeline, tmp_path):
    """The system itself refuses files above a size, as it refuses all on a full disk."""
    settings = SHORT | dict(output_dir=str(tmp_path), max_train_steps=3, checkpointing_steps=1)
    run = Run(make_pipeline(), **settings)
    next(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "checkpoint-1" / file).stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError) as caught:
            next(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    named = "default.safetensors" if file == "default.safetensors" else "(default.safetensors|training_state.pt)"
    assert caught.match(rf"checkpoint-2.aside/{named} could not be written: .*File too large.*Free space there")
    assert caught.match("checkpoint-1 is whole, so then go on with --resume_from_checkpoint latest")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and whole(tmp_path) == [1]
    Run(make_pipeline(), **settings | {"resume_from_checkpoint": "latest"}).go()
    assert whole(tmp_path) == [2, 3]


def test_a_full_disk_before_the_first_checkpoint(saving, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="training_state.pt.*No space left.*no earlier checkpoint"):
        saving(1)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_and_changes_nothing(saving, make_pipeline, tmp_path):
    damages = {
        "old.safetensors": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "training_state.pt": lambda path: path.write_bytes(b"x"),
        "ema.safetensors": lambda path: path.unlink(),
        "state.json": lambda path: path.write_text('{"step": 1'),
    }
    for name, damage in damages.items():
        folder = saving(1)
        damage(folder / name)
        run = Run(make_pipeline(), output_dir=str(tmp_path), resume_from_checkpoint="latest")
        before = run.weights()
        with pytest.raises(ValueError, match="checkpoint-1 is damaged"):
            next(run)
        assert bitwise(run.weights(), before)


# ------------------------------------------------------------------------------------------------------- not finite

NOT_FINITE = {  # what is spoiled: what is said, and what to do
    "reward": (r"reward 'it' must give 3 finite numbers, got \[1.0, nan, 1.0\]", "mend that reward or leave it out"),
    "pixels": ("the pixels of the videos are not finite", "diverged: start again with a lower learning_rate"),
    "videos": ("the latents of the videos are not finite", "diverged: start again with a lower learning_rate"),
    "initial": ("the energies of the initial policy are not finite", "diverged"),
    "trained": ("the energies of the trained policy are not finite", "diverged"),
    "old": ("the energies of the old policy are not finite", "diverged"),
    "loss": ("the loss is inf, that is, not finite", "diverged"),
    "gradient": ("the gradient's norm is nan, not finite", "diverged"),
}


def spoiled(what, run, monkeypatch):
    """-> a list: while something is in it, `what` is not finite."""
    on, policy = [], []
    plain = {name: getattr(kvpo, name) for name in ("acting", "fork", "replay_energies", "kvpo_loss")}

    def reward(videos, prompts):
        score = ranked(videos, prompts)
        return score * 0 + torch.tensor([1, float("nan"), 1]) if on and what == "reward" else score

    @contextlib.contextmanager
    def acting(policies, name):
        policy.append("trained" if name == "default" else name)
        try:
            with plain["acting"](policies, name):
                yield
        finally:
            policy.pop()

    def fork(*args):
        made = plain["fork"](*args)
        return replace(made, videos=made.videos / 0) if on and what == "videos" else made

    decode = run.pipeline.decode

    def spoiled_decode(latents):
        pixels = decode(latents)
        return pixels * float("nan") if on and what == "pixels" else pixels

    object.__setattr__(run.pipeline, "decode", spoiled_decode)

    def replay_energies(*args):
        energies = plain["replay_energies"](*args)
        return energies + float("inf") if on and what == policy[-1] else energies

    def kvpo_loss(*args):
        loss = plain["kvpo_loss"](*args)
        return replace(loss, total=loss.total + float("inf")) if on and what == "loss" else loss

    for replacement in (acting, fork, replay_energies, kvpo_loss):
        monkeypatch.setattr(kvpo, replacement.__name__, replacement)
    weight = next(w for key, w in adapter_weights(run.policies, "default").items() if "lora_B" in key)
    weight.register_hook(lambda g: g * float("nan") if on and what == "gradient" else None)
    run.rewards.rewards["it"] = reward
    return on


@pytest.mark.parametrize("what", NOT_FINITE)
def test_what_is_not_finite_is_skipped_counted_and_stops_the_run(what, make_pipeline, tmp_path, monkeypatch):
    """In update 1, whose old policy is another one, and from update 3 on. No NaN gets anywhere."""
    said, advice = NOT_FINITE[what]
    settings = SHORT | dict(output_dir=str(tmp_path), max_train_steps=9, old_policy_every=10, checkpointing_steps=1)
    run = Run(make_pipeline(), Mixture({"it": ranked}, {"it": 1.0}), **settings)
    on = spoiled(what, run, monkeypatch)
    next(run)
    before = {name: run.weights(name) for name in ("default", "old", "ema")}
    on.append(True)
    step = next(run)
    assert step.groups == [] and step.grad_norm == 0 and step.log()["skipped"] == 1
    assert re.fullmatch(said, step.skipped)
    assert all(bitwise(run.weights(name), before[name]) for name in before)
    assert bitwise(optimizer_in(tmp_path / "checkpoint-2"), optimizer_in(tmp_path / "checkpoint-1"))
    on.clear()
    third = next(run)
    assert not third.skipped and third.grad_norm > 0 and not bitwise(run.weights(), before["default"])
    after = run.weights()
    on.append(True)
    error = ValueError if what == "reward" else FloatingPointError
    with pytest.raises(error, match=f"updates 3 to 5 were skipped; in update 5 {said}: .*{advice}"):
        run.go()
    assert bitwise(run.weights(), after) and whole(tmp_path) == [5, 6]
    lines = json.loads((tmp_path / "checkpoint-6" / "state.json").read_text())["logs"]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0, 1, 1, 1]
    monkeypatch.undo()
    again = Run(make_pipeline(), only(ranked), **settings | {"resume_from_checkpoint": "latest"})
    step = next(again)
    assert step.step == 6 and not step.skipped and bitwise(again.weights("old"), run.weights("old"))
    for name in ("default", "old", "ema"):
        assert all(weight.isfinite().all() for weight in again.weights(name).values())


def test_skips_in_a_row_are_counted_across_a_resume(make_pipeline, tmp_path):
    """Killed after two of three: the third still stops the run, as it would have."""
    settings = SHORT | dict(output_dir=str(tmp_path), max_train_steps=9, checkpointing_steps=1)
    run = Run(make_pipeline(), stopping(RewardError("the scorer died"), 1, 2, 3), **settings)
    for _ in range(3):
        next(run)
    run.updates.close()
    again = settings | {"resume_from_checkpoint": "latest"}
    again = Run(make_pipeline(), stopping(RewardError("the scorer died"), 0), **again)
    assert next(again).skipped
    with pytest.raises(RewardError, match="3 updates in a row"):
        next(again)
    assert json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())["skips"] == 0  # mended by whoever resumes


def test_a_learning_rate_that_blows_up_stops_the_run_and_says_so(make_pipeline, tmp_path):
    settings = SHORT | dict(output_dir=str(tmp_path), max_train_steps=9, checkpointing_steps=50)
    run = Run(make_pipeline(), only(ranked), learning_rate=1e30, **settings)
    with pytest.raises(FloatingPointError, match="updates 1 to 3.*not finite.*learning_rate"):
        run.go()
    assert whole(tmp_path) == [4]
    for name in ("default", "old", "ema"):
        assert all(weight.isfinite().all() for weight in run.weights(name).values())


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        kill_resume.make_model(folder)
    return folder


@pytest.fixture(scope="module")
def undrawn():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_groups", "draw_before_after"):
            patch.setattr(cli_report, name, lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def finished(model, undrawn, tmp_path_factory):
    """A run of six updates; the tests only read its folder."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(argv(model, folder)) == 0
    return folder


def argv(model, folder, *more):
    return ["train", "--model", str(model), "--output_dir", str(folder), *kill_resume.OPTIONS, *more]


def differences(folder, finished):
    ours, theirs = kill_resume.contents(folder), kill_resume.contents(finished)
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def after_calls(monkeypatch, calls, act):
    """Calls `act` on the score in these calls (from 0) of the first reward; the first measures the held-out prompt."""
    plain, count = cli_models.run_rewards, iter(range(1000))

    def run_rewards(*arguments):
        mixture = plain(*arguments)

        def vq(videos, prompts):
            score = mixture.rewards["vq"](videos, prompts)
            return act(score) if next(count) in calls else score

        return Mixture({**mixture.rewards, "vq": vq}, mixture.weights)

    monkeypatch.setattr(cli_models, "run_rewards", run_rewards)


@pytest.mark.parametrize("number", [n for n in system.ENDING if n != signal.SIGALRM])
def test_every_ending_signal_is_taken_as_ctrl_c(number):
    """Inside the block that a command is, and only there; while something is written it waits."""
    default, done = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL, []
    before = signal.signal(number, default)  # a shell's background jobs ignore some
    try:
        with pytest.raises(KeyboardInterrupt), system.ends_like_ctrl_c():
            with system.uninterrupted():
                signal.raise_signal(number)
                done.append("whole")
            done.append("not reached")
        assert done == ["whole"] and signal.getsignal(number) == default
    finally:
        signal.signal(number, before)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with system.ends_like_ctrl_c(), system.uninterrupted():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def heard():
    """Signals as a shell passes them on: under nohup SIGHUP is ignored, in the tests too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_all_updates_without_checkpoints_too(number, model, finished, tmp_path, capsys, monkeypatch):
    after_calls(monkeypatch, [3], lambda score: signal.raise_signal(number))
    command = argv(model, tmp_path / "run", "--checkpointing_steps", "0", "--max_train_steps", "3")
    assert cli.main(command) == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    err = capsys.readouterr().err
    assert "kvpo-min: interrupted after 2 updates; what there is was saved; go on from checkpoint-2: " in err
    assert whole(tmp_path / "run") == [2] and log_lines(tmp_path / "run") == log_lines(finished)[:2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"] is None and summary["updates"] == 2
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "run" / "checkpoint-2" / "default.safetensors")
    assert len(saved) == len(kept) and all(any(w.equal(k) for k in kept.values()) for w in saved.values())
    if number == signal.SIGTERM:  # the same from here on
        return
    monkeypatch.undo()
    assert cli.main([*command, "--resume_from_checkpoint", "latest"]) == 0
    assert log_lines(tmp_path / "run") == log_lines(finished)[:3]


def test_ctrl_c_before_an_update_touches_no_adapter(model, finished, tmp_path, capsys, monkeypatch):
    """A resumed run that is stopped at once must not replace the adapter by one that was not loaded yet."""
    for name in ("checkpoint-6", "config.yaml", "adapter_model.safetensors"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        copy(finished / name, (tmp_path / "run").mkdir(exist_ok=True) or tmp_path / "run" / name)
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_checkpoint", stopped)
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", "7"]
    assert cli.main([*argv(model, tmp_path / "run"), *more]) == 130
    assert "interrupted before an update was done; go on from checkpoint-6" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_an_interrupted_save_loses_no_line(model, finished, tmp_path, monkeypatch):
    """Ctrl-C while checkpoint-2 is written, before the line of its second update is."""
    plain = training.save_checkpoint
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    assert cli.main(argv(model, tmp_path / "run")) == 130
    assert whole(tmp_path / "run") == [2]
    assert log_lines(tmp_path / "run") == log_lines(finished)[:2]


def test_ctrl_c_between_two_updates_saves_too(model, finished, tmp_path, monkeypatch):
    """While the loop has update 1 in its hands and has not written its line yet."""
    plain, count = cli_run.set_aside, iter(range(9))

    def interrupted(step):
        if next(count) == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(step)

    monkeypatch.setattr(cli_run, "set_aside", interrupted)
    assert cli.main(argv(model, tmp_path / "run", "--checkpointing_steps", "0")) == 130
    assert whole(tmp_path / "run") == [2] and log_lines(tmp_path / "run") == log_lines(finished)[:2]


@pytest.mark.parametrize("lines", ["torn", "none", "too many"])
def test_a_run_killed_before_its_end_is_finished(lines, model, finished, tmp_path):
    """All updates are done; the metrics are damaged, adapter and summary were not written any more."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    for leftover in ("summary.json.aside", "metrics.jsonl.aside"):
        (tmp_path / "run" / leftover).write_text("{")
    path = tmp_path / "run" / "metrics.jsonl"
    text = path.read_text()
    path.write_text({"torn": text[:-40], "none": "", "too many": text + '{"step": 6}\n'}[lines])
    assert cli.main(argv(model, tmp_path / "run", "--resume_from_checkpoint", "latest")) == 0
    assert differences(tmp_path / "run", finished) == []
    assert cli.main(argv(model, tmp_path / "run", "--resume_from_checkpoint", "latest")) == 2  # now it is done


def test_a_full_disk_in_a_run(model, finished, tmp_path, capsys, monkeypatch):
    """checkpoint-2 cannot be written: exit code 2, the file, what to do; checkpoint-1 is whole, and the run goes on."""
    from safetensors import torch as safetensors

    plain = safetensors.save_file

    def full(tensors, path, *more, **options):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(tensors, path, *more, **options)

    monkeypatch.setattr(safetensors, "save_file", full)
    command = argv(model, tmp_path / "run", "--checkpointing_steps", "1", "--max_train_steps", "3")
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "kvpo-min: error: " in err and "checkpoint-2.aside/default.safetensors could not be written: No space" in err
    assert "checkpoint-1 is whole, so then go on with --resume_from_checkpoint latest" in err and "Traceback" not in err
    assert whole(tmp_path / "run") == [1] and not list((tmp_path / "run").glob("*.aside"))
    monkeypatch.undo()
    assert cli.main([*command, "--resume_from_checkpoint", "latest"]) == 0
    assert log_lines(tmp_path / "run") == log_lines(finished)[:3] and whole(tmp_path / "run") == [3]


def test_files_are_the_old_or_the_new_ones(tmp_path, make_pipeline, monkeypatch):
    """A disk that fills up while the adapter or a text is written leaves those of before, and is named."""
    pipeline = make_pipeline()
    policies = add_policies(pipeline, Run(make_pipeline()).config)
    adapters.save_adapter(policies, tmp_path, "tiny")
    system.write_text(tmp_path / "summary.json", "{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "summary.json"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(OSError, match="adapter.aside.*File too large"):
            adapters.save_adapter(policies, tmp_path, "other")
        with pytest.raises(OSError, match="summary.json.aside.*File too large"):
            system.write_text(tmp_path / "summary.json", "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".aside"} == before


def test_a_folder_that_cannot_be_written_is_said_before_any_work(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_run, "measure", None)  # would fail if it were reached
    (tmp_path / "file").write_text("")
    for folder in ("/proc/kvpo_min_run", str(tmp_path / "file" / "run")):
        assert cli.main(argv(model, folder)) == 2
        err = capsys.readouterr().err
        assert f"kvpo-min: error: {folder} cannot be" in err or f"so {folder} cannot be made" in err

    def read_only(*arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(system.tempfile, "TemporaryFile", read_only)
    assert cli.main(argv(model, tmp_path / "run")) == 2
    assert "cannot be written to: Read-only file system; free space, or name another" in capsys.readouterr().err


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    """A live process holds it by a lock; one of another machine by its last sign of life; a dead one does not."""
    folder = tmp_path / "a" / "run"
    with system.claimed(folder):
        (held,) = folder.iterdir()
        for _ in range(2):
            with pytest.raises(FileExistsError, match=f"{folder} is in use.*process {os.getpid()}"):
                with system.claimed(folder):
                    raise AssertionError("two at once")
        assert list(folder.iterdir()) == [held]
    assert not (tmp_path / "a").exists()  # nothing was put into it
    folder.mkdir(parents=True)
    for host, seconds, taken in (("elsewhere", 0, True), ("elsewhere", 3600, False), (socket.gethostname(), 0, False)):
        (folder / held.name).write_text(f"{host} 99999999\n")
        then = time.time() - seconds
        os.utime(folder / held.name, (then, then))
        with contextlib.ExitStack() as stack:
            if taken:
                stack.enter_context(pytest.raises(FileExistsError, match=f"process 99999999 on {host}"))
            stack.enter_context(system.claimed(folder))
            (folder / "kept").write_text("x")
        assert (folder / held.name).exists() == taken
    assert (folder / "kept").exists()


def test_a_claim_where_the_disk_knows_no_locks(tmp_path, monkeypatch):
    """Then a process of this machine is asked for."""

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(system.fcntl, "flock", no_locks)
    for process, taken in ((os.getppid(), True), (2**22 + 5, False)):
        (tmp_path / system.CLAIM).write_text(f"{socket.gethostname()} {process}\n")
        with pytest.raises(FileExistsError) if taken else contextlib.nullcontext():
            with system.claimed(tmp_path):
                pass


def test_of_two_runs_in_one_folder_the_second_is_refused(model, tmp_path, capsys, monkeypatch):
    """It starts while the first is measured, after all its checks; the first one's files are its own."""
    second, plain = [], cli_run.measure

    def measure(*arguments):
        if not second:
            second.append(None)
            second[0] = cli.main(argv(model, tmp_path / "run", "--overwrite_output_dir"))
        return plain(*arguments)

    monkeypatch.setattr(cli_run, "measure", measure)
    assert cli.main(argv(model, tmp_path / "run", "--max_train_steps", "2")) == 0
    assert second == [2] and f"{tmp_path / 'run'} is in use" in capsys.readouterr().err
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [0, 1]
    assert not (tmp_path / "run" / system.CLAIM).exists()


def test_nothing_is_overwritten_unasked(model, finished, tmp_path, capsys):
    """A run's folder, what comes after an older checkpoint, and a folder into which another run's checkpoint leads."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-4")
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    (run / "checkpoint-4" / "state.json").write_text(json.dumps(state | {"step": 4, "logs": state["logs"][:4]}))
    older = ["--resume_from_checkpoint", str(run / "checkpoint-4")]
    shutil.copytree(run, tmp_path / "other")
    for folder, more, said in (
        (run, [], "is not empty"),
        (run, older, "holds checkpoint-6, which is newer than checkpoint-4: resume latest, or give --overwrite_output"),
        (tmp_path / "other", older, "is not empty"),
    ):
        assert cli.main(argv(model, folder, *more)) == 2
        assert said in capsys.readouterr().err
        assert differences(folder, run) == []
    config = training.TrainConfig(output_dir=str(run), resume_from_checkpoint=older[1])
    folders.make_room(run, config, cli_options.RunOptions(overwrite_output_dir=True))
    assert whole(run) == [4] and (run / "adapter_model.safetensors").exists()


def test_a_run_goes_on_in_another_folder_with_all_its_lines(model, finished, tmp_path, capsys):
    from_there = ["--resume_from_checkpoint", str(finished / "checkpoint-6"), "--max_train_steps", "7"]
    assert cli.main([*argv(model, tmp_path / "run"), *from_there]) == 0
    lines = log_lines(tmp_path / "run")
    assert len(lines) == 7 and lines[:6] == log_lines(finished)
    assert whole(finished) == [6] and whole(tmp_path / "run") == [7]


def test_without_a_checkpoint_it_says_how_to_start_anew(model, finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0')
    (tmp_path / "run" / "checkpoint-2.aside").mkdir()
    assert cli.main(argv(model, tmp_path / "run", "--resume_from_checkpoint", "latest")) == 2
    err = capsys.readouterr().err
    assert "there is no checkpoint in" in err and "without --resume_from_checkpoint, with --overwrite_output_dir" in err
    assert cli.main(argv(model, tmp_path / "run")) == 2 and "is not empty" in capsys.readouterr().err
    assert cli.main(argv(model, tmp_path / "run", "--overwrite_output_dir", "--max_train_steps", "1")) == 0
    assert log_lines(tmp_path / "run") == log_lines(finished)[:1] and whole(tmp_path / "run") == [1]
    assert not (tmp_path / "run" / "checkpoint-2.aside").exists()


def test_a_run_whose_reward_gives_nan(model, tmp_path, capsys, monkeypatch):
    """From update 2 on: the third NaN in a row stops the run, exit code 2, since a reward is the user's to mend."""
    after_calls(monkeypatch, range(3, 9), lambda score: score * float("nan"))
    assert cli.main(argv(model, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "updates 2 to 4 were skipped; in update 4 reward 'vq' must give 3 finite numbers" in err
    assert err.count("was skipped: ") == 3 and "mend that reward" in err and "go on from checkpoint-5" in err
    assert [line.get("skipped", 0) for line in log_lines(tmp_path / "run")] == [0, 0, 1, 1, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["updates"], summary["skipped"], summary["after"]) == (2, 3, None)
    assert whole(tmp_path / "run") == [5]


def test_a_run_that_diverges(model, tmp_path, capsys):
    """Exit code 1; the adapter that is saved is large, but every number of it is finite."""
    assert cli.main(argv(model, tmp_path / "run", "--learning_rate", "1e30")) == 1
    err = capsys.readouterr().err
    assert "updates 1 to 3 were skipped; in update 3 the latents of the videos are not finite: the weights have" in err
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    checks = doctor.check_run_folder(tmp_path / "run", str(model), read_config)
    failed = [check.name for check in checks if not check.passed]
    assert set(failed) <= {"summary.json is complete", "the adapter loads and changes the model"}
