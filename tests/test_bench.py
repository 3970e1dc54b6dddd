"""The plain update against `train.train`, what `kvpo-min bench` counts and says, and what makes an update fast."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kvpo_min import chr as routing
from kvpo_min import cli, pocket
from kvpo_min.checks import bench
from kvpo_min.checks.bench import BenchOptions
from kvpo_min.pocket import pocket_rewards, world
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import Sampler, draw_noise, fork, replay

pytestmark = pytest.mark.usefixtures("one_thread")

G, S, BLOCK = 3, 4, 3
OPTIONS = BenchOptions(pairs=1, num_frames=24, num_generations=G, perturb_num_blocks=2, seed=1)  # fork at 15
SIZES = ["--num_frames", "24", "--num_generations", "2", "--perturb_num_blocks", "2", "--seed", "1"]


def brightness(videos, prompts):
    return 1e3 * videos.mean((1, 2, 3, 4))  # large, since advantages divide by their spread + 1e-8


def contrast(videos, prompts):
    return 1e3 * videos.std((1, 2, 3, 4))


SMOOTH = Mixture({"brightness": brightness, "contrast": contrast}, {"brightness": 1.0, "contrast": 0.5})


def make(make_pipeline, options=OPTIONS, fork=None, **changes):
    """A subject, the settings of an update, and its task."""
    config = replace(bench.make_config(options), tau=0.1, rank=2, lora_alpha=2, **changes)
    subject, plan = bench.make_subject(make_pipeline(), SMOOTH, config), None
    if fork:
        frames = routing.pool(fork, routing.Window(), config.nearest, 2)
        routes = routing.uniform_routes(frames, 6 - config.nearest, G, torch.Generator().manual_seed(0))
        plan = routing.Plan(fork, frames, routes, 2)
    return subject, config, bench.make_task(subject.pipeline, config, plan)


def both(subject, config, task, context):
    """-> relative differences of ours and the plain update, in float64; their meters"""
    meters = bench.Meter(), bench.Meter()
    with bench.in_float64(subject) as wide:
        mine = bench.outcome(wide, bench.ours(wide, config, task, meters[0]))
        plain = bench.outcome(wide, bench.naive(wide, config, task, meters[1], context))
    return bench.difference(mine, plain), meters


TWO_SEGMENTS = replace(OPTIONS, num_frames=57, num_segments=2)
CASES = {
    "ours": (OPTIONS, {}, "stored"),
    "authors": (OPTIONS, {}, "own"),
    "pieces": (OPTIONS, {"replay_batch": 3, "branch_batch": 2}, "stored"),
    "the anchor in the group": (OPTIONS, {"anchor_in_group": True, "fuse_mode": "none", "adv_eps": 10.0}, "stored"),
    "it in pieces": (OPTIONS, {"anchor_in_group": True, "replay_batch": 3, "branch_batch": 2}, "stored"),
    # new words at frame 39; what follows the chunk hardly differs between branches, and would be a ratio of roundings
    "a switch on the fork": (TWO_SEGMENTS, {"fork": 39, "global_weight": 0.0}, "own"),
    "a switch before the fork": (TWO_SEGMENTS, {"fork": 51, "global_weight": 0.0}, "stored"),
}


@pytest.mark.parametrize("case", CASES)
def test_both_schedules_give_the_same_update(case, make_pipeline):
    options, changes, context = CASES[case]
    if context == "own":
        changes = changes | {"compat": "official"}
    found, _ = both(*make(make_pipeline, options, **changes), context)
    assert max(found.values()) < 1e-6, found
    assert bench.agree(case, found) is found


def test_a_wrong_context_is_seen(make_pipeline):
    """Negative control: the plain update with the other context is another update, and bench would stop."""
    subject, config, task = make(make_pipeline)
    found, _ = both(subject, config, task, "own")
    assert found["gradient"] > 1e-3
    with pytest.raises(bench.Disagreement, match="no time was taken"):
        bench.agree("the wrong context", found)
    with pytest.raises(bench.Disagreement):
        bench.agree("no gradient at all", {"loss": 0.0, "gradient": float("nan")})


def test_both_score_the_same_clips_against_the_same_words(make_pipeline):
    """What the words fix depends on the frames; the plain update scores the prefix as well."""
    config = replace(bench.make_config(TWO_SEGMENTS), tau=0.1, rank=2, lora_alpha=2)
    heard = []

    def spied(videos, prompts):
        heard.extend((videos.shape[1], prompt) for prompt in prompts)
        return brightness(videos, prompts)

    subject = bench.make_subject(make_pipeline(), Mixture({"it": spied}, {"it": 1.0}), config)
    frames = routing.pool(21, routing.Window(), config.nearest, 2)
    plan = routing.Plan(21, frames, routing.uniform_routes(frames, 4, G, torch.Generator().manual_seed(0)), 2)
    script = "a red disc travels from the beach and settles | it turns blue"
    task = replace(bench.make_task(subject.pipeline, config, plan), script=script)
    before, chunk, after = ((len(r), world.resolve(script, r)) for r in (range(21), range(21, 39), range(39, 57)))
    bench.ours(subject, config, task, bench.Meter())
    assert heard == [clip for clip in (chunk, after) for _ in range(G + 1)] and len({before[1], *heard}) == 3
    heard.clear()
    bench.naive(subject, config, task, bench.Meter())
    assert set(heard) == {before, chunk, after} and len(heard) == 3 * (G + 1)


def test_every_update_starts_from_the_same_weights(make_pipeline):
    subject, config, task = make(make_pipeline)
    first = bench.outcome(subject, bench.ours(subject, config, task, bench.Meter()))
    assert any(not w.equal(subject.start[name]) for name, w in subject.weights.items())  # the optimiser took a step
    again = bench.outcome(subject, bench.ours(subject, config, task, bench.Meter()))
    assert first[0] == again[0] and first[1].equal(again[1])


def test_counts_are_the_closed_forms(make_pipeline):
    """Forward passes and tokens of both schedules; ours in fewer calls of the network."""
    subject, config, task = make(make_pipeline)
    _, meters = both(subject, config, task, "stored")
    before, after = task.plan.fork // BLOCK, (task.stop - task.plan.fork) // BLOCK  # blocks
    replayed = (task.chunk.stop - task.plan.fork) // BLOCK
    assert after > replayed > 1
    replays = G * (replayed * S + replayed - 1)  # every step, and the context of every block but the last
    forwards = {"prefix": before * (S + 1), "rollout": (G + 1) * after * (S + 1), "replay": replays}
    ours, plain = (meter.rows for meter in meters)
    for phase, n in forwards.items():
        once = n - (G - 1) * (phase == "replay")  # the first step after the fork is the same for all branches
        assert (ours[phase]["forwards"], plain[phase]["forwards"], plain[phase]["calls"]) == (once, n, n), phase
        for rows in (ours, plain):
            assert rows[phase]["tokens"] == rows[phase]["forwards"] * BLOCK * 4  # 4 tokens a frame
    assert ours["replay_frozen"]["forwards"] == replays - (G - 1)  # the initial policy; the old one is the current one
    assert plain["replay_frozen"]["forwards"] == 2 * replays
    assert ours["rollout"]["calls"] == after * (S + 1)
    for phase in ("replay", "replay_frozen"):  # at most 48 at once
        assert ours[phase]["calls"] == replayed - 1 + -(-(G * replayed * S - G + 1) // 48)
    for rows in (ours, plain):
        assert all(rows[phase]["seconds"] > 0 for phase in bench.PHASES)
        assert all(rows[phase]["calls"] == 0 for phase in ("decode", "reward", "backward", "optimiser", "other"))


def test_the_floor_makes_the_calls_of_an_update(make_pipeline, monkeypatch):
    subject, config, task = make(make_pipeline)
    meter = bench.Meter()
    bench.ours(subject, config, task, meter)
    again, graphs = bench.Meter(), []
    counted = bench.Counted(subject.pipeline.backbone, again)
    bare = replace(subject, pipeline=replace(subject.pipeline, backbone=counted))
    monkeypatch.setattr(torch.Tensor, "backward", lambda total: graphs.append(total))
    assert bench.floor(bare, meter.calls) > 0

    def shapes(calls, has_graph):
        return [(c.encodes, c.x.shape, c.kv) for c in calls if c.has_graph == has_graph]

    for has_graph in (False, True):
        assert shapes(again.calls, has_graph) == shapes(meter.calls, has_graph) != []
    assert len(graphs) == 1 and graphs[0].requires_grad


def test_bfloat16_is_close(make_pipeline):
    """What `ratio_default` uses where the processor has it: the same network, rounded to 8 bits."""
    subject, config, task = make(make_pipeline)
    plain, fast = subject.pipeline.backbone, bench.in_bfloat16(subject).pipeline.backbone
    text = subject.pipeline.embed(["a disc"])
    with torch.no_grad():
        kv = plain.encode(task.noise[:, 0, 0], 0, text, None)
        half_kv = fast.encode(task.noise[:, 0, 0], 0, text, None)
        v, half_v = (
            backbone.velocity(task.noise[:, 1, 0], torch.ones(1), 3, text, read.flatten(3, 4))
            for backbone, read in ((plain, kv), (fast, half_kv))
        )
    assert half_kv.dtype == torch.bfloat16 and half_v.dtype == torch.float32
    for half, full in ((half_kv, kv), (half_v, v)):
        assert 0 < (half.float() - full).norm() / full.norm() < 0.02
    meter = bench.Meter()
    assert torch.isfinite(torch.tensor(bench.ours(bench.in_bfloat16(subject), config, task, meter)))
    assert bench.floor(bench.in_bfloat16(subject), meter.calls) > 0
    assert {call.kv[1] for call in meter.calls if call.kv} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def tiny(make_pipeline, monkeypatch):
    """The command on the tiny model; processes of their own are not started, their answers are made up."""
    monkeypatch.setattr(pocket, "load_model", lambda folder: make_pipeline())
    monkeypatch.setattr(pocket, "pocket_rewards", lambda *_: SMOOTH)
    answers = {"peak": 2**28, "seconds_a_block": [0.1, 0.1]}
    monkeypatch.setattr(bench, "alone", lambda *_: answers)


def test_bench_prints_and_writes_what_it_found(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "bench.json"
    assert cli.main(["bench", "--pairs", "2", *SIZES, "--json", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert set(result) == {
        "ratio", "ratio_default", "floor_ratio", "seconds", "difference", "phases", "peak_memory", "pairs", "about",
    }  # fmt: skip
    assert min(result[key] for key in ("ratio", "ratio_default", "floor_ratio")) > 0
    assert max(result["difference"]["authors"].values()) < 1e-4 and max(result["difference"]["default"].values()) < 1e-4
    names = ["ours", "naive", "ours_default", "naive_default"]
    assert list(result["phases"]) == names and list(result["phases"]["ours"]) == list(bench.PHASES)
    assert len(result["pairs"]) == 2 and set(result["pairs"][0]) == {*names, "floor"}
    ratios = sorted(pair["naive"] / pair["ours"] for pair in result["pairs"])
    assert result["ratio"] == pytest.approx(sum(ratios) / 2)
    for name in names:  # the phases of a run are all of it
        one = result["phases"][name]
        assert sum(row["seconds"] for row in one.values()) == pytest.approx(result["seconds"][name], rel=0.2)
    for word in (f"{result['ratio']:.2f} times faster", f"{result['floor_ratio']:.2f} times the floor", "256 MiB"):
        assert word in printed


def test_numbers_that_do_not_agree_take_no_time(tiny, monkeypatch, tmp_path, capsys):
    naive = bench.naive
    monkeypatch.setattr(bench, "naive", lambda *args: naive(*args[:4], "stored"))  # but the authors' is "own"
    out = tmp_path / "bench.json"
    assert cli.main(["bench", *SIZES, "--json", str(out)]) == 1
    err = capsys.readouterr().err
    assert "kvpo-min: error: the authors' settings: the loss differs by" in err and "no time was taken" in err
    assert not out.exists()


def test_scaling_prints_what_it_found(tiny, tmp_path, capsys, monkeypatch):
    """On updates that take a second a branch and block, and a second more; their prefix does not count."""

    def ours(subject, config, task, meter):
        blocks = (task.chunk.stop - task.plan.fork) // BLOCK
        assert len(task.plan.routes) == config.num_generations and task.chunk.stop == task.stop
        meter.rows["prefix"]["seconds"], meter.rows["replay"]["seconds"] = 100.0, 1.0
        meter.rows["rollout"]["seconds"] = float(len(task.plan.routes) * blocks)

    monkeypatch.setattr(bench, "ours", ours)
    out = tmp_path / "scaling.json"
    assert cli.main(["bench", "--scaling", *SIZES[2:], "--json", str(out)]) == 0
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["branches"] == {"2": 13, "4": 25, "8": 49, "16": 97}  # 6 blocks from frame 21 to 39
    assert result["blocks"] == {str(p): 2 * p + 1 for p in range(1, 7)}  # 2 branches
    assert result["history"] == dict.fromkeys(("21", "57", "93", "129"), 13) and result["history_ratio"] == 1
    assert result["line_of_branches"] == pytest.approx(
        {"seconds_each": 6, "seconds_fixed": 1, "largest_deviation": 0}, abs=1e-9
    )
    assert "1.00 + 2.000 each, off by 0% at most" in printed and "largest over smallest 1.00" in printed
    assert "stream of 1470 frames: 256 MiB, 100 ms a block in its second chunk, 100 in its last" in printed


def test_a_straight_line():
    assert bench.line({1: 3.0, 2: 5.0, 4: 9.0}) == pytest.approx(
        {"seconds_each": 2, "seconds_fixed": 1, "largest_deviation": 0}, abs=1e-12
    )
    assert bench.line({1: 1.0, 2: 4.0, 3: 9.0})["largest_deviation"] > 0.1


WRONG = {
    "flag": (["--pair", "1"], "unknown flag --pair (did you mean 'pairs'?)"),
    "pairs": (["--pairs", "0"], "pairs must be at least 1, got 0"),
    "branches": (["--num_generations", "1"], "num_generations must be at least 2"),
    "length": (["--num_frames", "40"], "num_frames must be a multiple of 3"),
    "no fork": (["--num_frames", "21"], "no block can fork"),
    "segments": (["--num_segments", "5", "--num_frames", "147"], "num_segments must be 1 to 4, got 5"),
    "unseen": (["--num_segments", "2"], "num_frames must be above 39"),
    "folder": (["--json", "{tmp}"], "is a folder, name a file"),
    "model": (["--model", "{tmp}/none"], "holds no model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, tmp_path, capsys):
    argv, message = WRONG[case]
    assert cli.main(["bench", *(word.format(tmp=tmp_path) for word in argv)]) == 2
    assert message in capsys.readouterr().err


def test_peak_memory_is_that_of_this_process():
    ballast = torch.ones(2**27)  # half a GiB here, which the process that is started does not hold
    code = (
        "import torch; from kvpo_min.checks.bench import peak_memory; before = peak_memory(); "
        "ballast = torch.ones(2**27); print(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**26 < before < bench.peak_memory() and len(ballast) == 2**27
    assert 2**28 < after - before < 2**30


def test_a_process_of_its_own(monkeypatch, capsys, make_pipeline):
    """It is started for what was asked, with the options that were given, and says what went wrong in it."""
    monkeypatch.setattr(pocket, "load_model", lambda folder: make_pipeline())
    started = []

    def run(argv, **_):
        started.append(argv)
        bench.main(*argv[3:])  # here instead
        return subprocess.CompletedProcess(argv, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    found = {what: bench.alone(what, OPTIONS, 42) for what in ("nothing", "naive", "stream")}
    assert all(argv[:3] == [sys.executable, "-m", "kvpo_min.checks.bench"] for argv in started)
    assert all(one["peak"] > 2**26 for one in found.values()) and len(found["stream"]["seconds_a_block"]) == 2
    failed = subprocess.CompletedProcess([], 1, "", "no memory")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no memory"):
        bench.alone("ours", OPTIONS)


# ----------------------------------------------------------------------------------------------- what makes it fast


def test_replays_in_small_batches_are_one_batch(make_pipeline):
    """AT_ONCE cuts a replay where no `replay_batch` does; how it is cut changes nothing but rounding."""
    pipeline, generator = make_pipeline(), torch.Generator().manual_seed(0)
    window = routing.Window()
    frames = routing.pool(21, window, 2, 5)
    plan = routing.Plan(21, frames, routing.uniform_routes(frames, 4, G, generator), 5)
    noise = draw_noise(13, S, (BLOCK, *pipeline.latent_shape), generator)
    sampler = Sampler(pipeline.sigmas, window)
    rollout = fork(pipeline.backbone, [pipeline.embed(["a disc"])], noise, plan, 39, 39, sampler, 2)
    whole = replay(pipeline.backbone, rollout, sampler, replay_batch=1000)
    torch.testing.assert_close(replay(pipeline.backbone, rollout, sampler), whole, atol=1e-6, rtol=1e-6)
    weights = list(pipeline.backbone.requires_grad_().parameters())
    slopes = []
    for replay_batch in (None, 1000):
        v = replay(pipeline.backbone, rollout, sampler, S, replay_batch)
        slopes.append(torch.autograd.grad(v.square().sum(), weights, allow_unused=True))
    for small, large in zip(*slopes, strict=True):
        if large is not None:
            torch.testing.assert_close(small, large, atol=1e-5 * large.abs().max().item(), rtol=1e-4)


def test_rewards_of_a_batch_are_those_of_single_videos():
    videos = torch.rand(3, 6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red disc moves left", "a disc rests", "a blue square"]
    together = pocket_rewards().scores(videos, prompts)
    for i, prompt in enumerate(prompts):
        for name, one in pocket_rewards().scores(videos[i : i + 1], [prompt]).items():
            torch.testing.assert_close(one, together[name][i : i + 1], atol=1e-6, rtol=1e-6)


def test_importing_the_package_is_cheap():
    """torch is the only large library that the modules import; diffusers and the others wait for a model."""
    code = (
        "import sys, kvpo_min; assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "import kvpo_min.pocket, kvpo_min.compare.baselines, kvpo_min.wan.real\n"
        "assert not {'diffusers', 'peft', 'transformers', 'matplotlib', 'IPython'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
