"""The arena: costs against hand counts, rows that outlive interruptions, what is refused, tables from rows."""

import contextlib
import csv
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpo_min import cli, kvpo, pocket
from kvpo_min.chr import chunk_starts
from kvpo_min.cli.models import run_rewards
from kvpo_min.cli.options import parse_options
from kvpo_min.compare import arena as ring
from kvpo_min.compare.arena import (
    COLUMNS,
    TRAINED,
    UNTRAINED,
    arena,
    config_of,
    counting,
    methods_of,
    runs_of,
    shared_key,
)
from kvpo_min.compare.baselines import REFUSED
from kvpo_min.pocket import prompts as prompts_of
from kvpo_min.pocket import world
from kvpo_min.rewards import Mixture, NotFinite
from kvpo_min.train import add_policies

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import arena_tables  # noqa: E402
import evaluation_noise  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

REWARDS = Mixture(  # as many as the pocket's and as cheap as can be: how red, how much of it moves, how blue
    {
        "vq": lambda videos, prompts: videos[:, :, 0].mean((1, 2, 3)),
        "mq": lambda videos, prompts: videos.diff(dim=1).abs().mean((1, 2, 3, 4)),
        "ta": lambda videos, prompts: videos[:, :, 2].mean((1, 2, 3)),
    },
    dict(vq=1.0, mq=1.0, ta=1.0),
)
SMALL = "num_generations=3,perturb_num_blocks=2,rank=2"


def cheap_reading(pixels):
    """Stands for the judge's exhaustive search, which would take most of the time here."""
    colour, place = pixels.mean((3, 4)).argmax(2), torch.zeros(*pixels.shape[:2], 2)
    distance, scene = pixels.std((2, 3, 4)), pixels.mean((3, 4)).argmin(2)
    motion = (pixels[:, :, 0].mean((2, 3)) > 0.5).long()
    return world.Reading(colour, colour * 0, scene, motion, distance, torch.ones_like(distance), place)


@pytest.fixture(scope="module")
def make(make_pipeline):
    return lambda: replace(make_pipeline(), read=cheap_reading)


def options_for(path, methods="rwr", **more):
    given = dict(seeds="0", learning_rates="1e-3", forwards=1, evaluations=1, eval_prompts=2, set=SMALL, mode="short",
                 vq=1.0, mq=1.0, ta=1.0)  # fmt: skip
    return ring.ArenaOptions(csv=str(path), methods=methods, **given | more)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# -------------------------------------------------------------------------------------------------------------- passes


def trained_once(make, method, settings, **more):
    """-> the log of one update, and the passes it took"""
    options = options_for("unused", method, set=settings, **more)
    pipeline, config, counts = make(), config_of(method, options, 1e-3, 0), Counter(forward=0, backward=0)
    n_segments = ring.MODES[options.mode][1]
    scripts = world.prompt_set(4, n_segments, 0)
    stream = ring.updates(pipeline, method, scripts, REWARDS, config, add_policies(pipeline, config))
    with counting(pipeline.backbone, counts):
        log = next(stream)
    return log, counts["forward"], counts["backward"]


def test_passes_of_kvpo_by_hand(make, monkeypatch):
    seen, make_plan = [], kvpo.make_plan
    monkeypatch.setattr(kvpo, "make_plan", lambda *a: seen.append(make_plan(*a)) or seen[-1])
    log, forward, backward = trained_once(make, "kvpo", f"{SMALL},tau=1,unsafe_scale=1,grad_steps=3")
    p, b = seen[0].fork // 3, (min(s for s in [*chunk_starts(39), 39] if s > seen[0].fork) - seen[0].fork) // 3
    rest = (39 - seen[0].fork) // 3  # blocks that are made: to the end of the video
    rollout = 5 * p + 4 * 5 * rest  # 4 steps and the encoding; 3 branches and the anchor
    replays = 2 * (3 * b * 4 + 3 * (b - 1))  # initial and present policy: all steps, and the context between blocks
    assert (forward, backward) == (rollout + replays - 2 * 2, 3 * b * 3 - 2)  # the first step, of one noise: once
    assert log["grad_norm"] > 0


def test_passes_of_astrolabe_by_hand(make):
    log, forward, backward = trained_once(make, "astrolabe", "num_generations=3,selective=false,kl_coef=0,rank=2")
    group = 5 * log["window_start"] // 3 + 3 * 5 * 6  # prefix, then 3 candidates of 6 blocks
    assert (forward, backward) == (2 * (group + 2 * (3 * 6 + 3 * 5)), 2 * 3 * 6)  # 2 groups; old and present policy


@pytest.mark.parametrize("method", ["rwr", "flow_grpo", "cm_grpo", "fresh+nft"])
def test_passes_of_the_other_methods_by_hand(make, method, monkeypatch):
    seen, make_plan = [], kvpo.make_plan
    monkeypatch.setattr(kvpo, "make_plan", lambda *a: seen.append(make_plan(*a)) or seen[-1])
    _, forward, backward = trained_once(make, method, SMALL)
    p, b = seen[0].fork // 3, (min(s for s in [*chunk_starts(39), 39] if s > seen[0].fork) - seen[0].fork) // 3
    replayed = 2 if method == "cm_grpo" else b  # its noise is in the routed blocks alone
    rollout = 5 * p + 4 * 5 * b  # 4 steps and the encoding; 3 branches and the anchor
    copies = 2 if method == "cm_grpo" else 0  # its branches begin from one noise, so the first step is replayed once
    assert forward == rollout + 3 * replayed * 4 + 3 * (replayed - 1) - copies
    # of a Gaussian policy all steps but the last
    assert backward == 3 * replayed * (3 if "grpo" in method else 4) - copies


def test_passes_of_a_whole_video_are_its_blocks(make_backbone):
    """A call that takes several blocks at once costs as many passes; without gradient nothing comes back."""
    backbone, counts = make_backbone(), Counter(forward=0, backward=0)
    x = torch.zeros(2, 9, 8, 4, 4, requires_grad=True)
    with counting(backbone, counts):
        backbone(x, torch.ones(2), torch.arange(9), world.embed(["a disc"])).sum().backward()
    backbone(x, torch.ones(2), torch.arange(9), world.embed(["a disc"]))
    assert counts == {"forward": 6, "backward": 6} and not backbone._forward_hooks


def test_budget_is_kept_within_one_update(make, tmp_path):
    options = options_for(tmp_path / "a.csv", forwards=900, evaluations=2)
    rows = list(arena(make, REWARDS, options))
    _, one, back = trained_once(make, "rwr", SMALL)
    assert [row["budget"] for row in rows] == ["450", "900"]
    for row in rows:
        assert int(row["budget"]) <= int(row["forwards"]) < int(row["budget"]) + 1.5 * one  # forks differ in cost
        assert abs(int(row["forwards"]) / one - int(row["updates"])) < 0.5 * int(row["updates"])
    assert int(rows[1]["forwards"]) > int(rows[0]["forwards"]) and int(rows[0]["backwards"]) >= 0.5 * back


# --------------------------------------------------------------------------------------------------------- the regimes


@pytest.mark.parametrize("mode, event, like, fork", [
    ("settles", "from the,settles", "beach,meadow,forest", 27), ("wanders", "from the,wanders", "left", 24),
])  # fmt: skip
def test_a_regime_has_the_demos_settings(mode, event, like, fork):
    from kvpo_min.cli.demo import DEFAULTS

    options = ring.ArenaOptions(csv="unused", mode=mode)
    assert (options.event, options.like) == (event, like)
    same = ("prefix_coef", "groups_per_update", "num_iterations", "lr_scheduler", "adv_eps", "max_grad_norm")
    for method in ("kvpo", "flow_grpo", "neighbor_grpo", "fresh+nft"):
        config = config_of(method, options, 3e-3, 1)
        assert (config.fork, config.num_frames, config.learning_rate) == (fork, fork + 3, 3e-3)
        assert [getattr(config, name) for name in same] == [DEFAULTS[name] for name in same]
    assert config_of("kvpo", options, 1, 0).tau == DEFAULTS["tau"] and config_of("ar_copo", options, 1, 0).tau == 0
    ours = config_of("astrolabe", options, 1e-3, 0)
    assert (ours.fork, ours.window_frames, ours.groups_per_update) == (fork, 3, DEFAULTS["groups_per_update"])
    assert config_of("kvpo", replace(options, set="prefix_coef=0"), 1e-3, 0).prefix_coef == 0


def test_a_rate_that_falls_ends_with_the_budget(make, tmp_path):
    """As many updates as the budget holds, counted by hand from the first; and losses of one size for all methods."""
    more = (
        "num_generations=3,groups_per_update=2,num_iterations=2,rank=2,lr_scheduler=linear,fork=21,prefix_coef=2,tau=1"
    )
    options = options_for(tmp_path / "a.csv", "kvpo,routing+energy", set=more, forwards=2500, evaluations=2)
    costs = ring.Costs(make, REWARDS, options)
    rows = {(row["method"], row["budget"]): row for row in arena(make, REWARDS, options)}
    for method in ("kvpo", "routing+energy"):
        passes, norm = costs.of(method)
        last = rows[method, "2500"]
        assert round(2500 / passes) >= int(last["updates"]) > int(rows[method, "1250"]["updates"]) > 0
        most = passes * int(last["updates"])  # every group forks at the same frame; those of kvpo may be unsafe
        assert most * (method != "kvpo") <= int(last["forwards"]) <= most
    scale = json.loads(rows["routing+energy", "2500"]["settings"])["loss_scale"]
    assert scale == pytest.approx(costs.of("kvpo")[1] / costs.of("routing+energy")[1], rel=1e-3)
    assert json.loads(rows["kvpo", "2500"]["settings"])["loss_scale"] == 1


# ---------------------------------------------------------------------------------------------------------- the methods


@pytest.fixture(scope="module")
def all_rows(make, tmp_path_factory):
    path = tmp_path_factory.mktemp("arena") / "all.csv"
    softmax = options_for(path, "kvpo,neighbor_grpo,ar_copo,routing+distance", set=f"{SMALL},tau=0.01")
    others = options_for(path, "flow_grpo,dance_grpo,cm_grpo,diffusion_nft,rwr,routing+nft,initial+nft")
    rest = options_for(path, "astrolabe,best_of_n,best_of_n_chunks", set="num_generations=3")
    return [row for options in (softmax, others, rest) for row in arena(make, REWARDS, options)], path


def test_every_method_gives_a_finite_row(all_rows):
    rows, path = all_rows
    assert {row["method"] for row in rows} >= {*TRAINED, *UNTRAINED} and read(path) == rows
    for row in rows:
        assert tuple(row) == COLUMNS and not row["note"]
        for name in ("reward_after", "reward_sem", "vq_after", "mq_before", "ta_sem", "judge_all_after",
                     "judge_distance_after", "sharpness_after", "motion_energy_after", "diversity_before"):  # fmt: skip
            assert math.isfinite(float(row[name])), (row["method"], name)
        for name in ("journey", "remembered", "coherent", "liked"):  # every script's hero travels and settles
            assert 0 <= float(row[f"judge_{name}_after"]) <= 1, (row["method"], name)
        assert float(row["passes_per_video"]) == (195 if row["method"] in UNTRAINED else 65)  # 3 videos of 13 blocks
        if row["method"] in UNTRAINED:
            assert row["forwards"] == row["backwards"] == row["budget"] == "0"
        elif row["method"] != "kvpo":  # whose first group may be unsafe
            assert int(row["forwards"]) > 0 and int(row["backwards"]) > 0 and row["updates"] == "1"
        json.loads(row["settings"])


def test_best_of_n_does_not_lose(all_rows):
    """The first candidate is the video without choice, so the reward of the best cannot be below."""
    row = next(row for row in all_rows[0] if row["method"] == "best_of_n")
    assert float(row["reward_after"]) >= float(row["reward_before"])
    assert float(row["reward_after"]) == pytest.approx(sum(float(row[f"{n}_after"]) for n in ("vq", "mq", "ta")), 1e-4)


def test_training_changes_what_is_measured(make, tmp_path):
    """Against an evaluation by `train.evaluate` of the same base model."""
    from kvpo_min.train import evaluate

    (row,) = arena(make, REWARDS, options_for(tmp_path / "a.csv", "cm_grpo", learning_rates="1e-1"))
    assert row["reward_after"] != row["reward_before"] and float(row["reward_sem"]) > 0
    scripts = world.prompt_set(2, 1, prompts_of.EVAL_SEED, "settles")
    base = evaluate(make(), scripts, REWARDS, 39)
    for name in ("vq", "mq", "ta", "reward"):
        assert float(row[f"{name}_before"]) == pytest.approx(base[name], rel=1e-4)
    assert float(row["judge_all_before"]) == pytest.approx(base["judge"]["all"], abs=1e-5)
    for name in ("distance", "scene", "journey", "remembered", "coherent", "liked"):
        assert float(row[f"judge_{name}_before"]) == pytest.approx(base["judge"][name], rel=1e-4, nan_ok=True)


def test_a_run_that_diverges_is_a_row(make, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(ring, "train", broken)
    options = options_for(tmp_path / "a.csv", "rwr", learning_rates="1e-3,1e-2")
    rows = list(arena(make, REWARDS, options))
    assert [row["purpose"] for row in rows] == ["sweep", "sweep"]  # no rate is left to report
    assert all(row["note"] == "diverged: the loss is nan" and row["reward_after"] == "" for row in rows)
    assert not list(arena(None, REWARDS, options))


def test_passes_that_cannot_be_counted_end_the_arena(make, tmp_path, monkeypatch):
    """They are counted in `forward`; a backbone that does without would train for ever."""
    monkeypatch.setattr(ring, "counting", lambda backbone, counts: contextlib.nullcontext())
    with pytest.raises(ValueError, match="passes.*backbone"):
        list(arena(make, REWARDS, options_for(tmp_path / "a.csv", "rwr")))


def test_a_number_given_twice_counts_once():
    assert ring.numbers("0,1,0", int, "seeds") == [0, 1]
    assert ring.numbers("1e-3,0.001", float, "learning_rates") == [0.001]


def test_videos_that_are_not_finite_are_a_row(make, tmp_path, monkeypatch):
    """The update went through, the evaluation after it does not; the base model is measured first."""
    measure, calls = ring.measure, []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise NotFinite("the reward vq is nan")
        return measure(*args)

    monkeypatch.setattr(ring, "measure", second_fails)
    options = options_for(tmp_path / "a.csv", forwards=600, evaluations=2)
    rows = list(arena(make, REWARDS, options))
    assert [row["note"] for row in rows] == ["diverged: the reward vq is nan"] * 2
    assert rows[0]["reward_after"] == "" and not ring.left(options, shared_key(options, REWARDS), rows)


def test_numbers_on_pixels_by_hand():
    pixels = torch.zeros(1, 2, 3, 4, 4)
    pixels[:, 1, :, 1, 1] = 0.5  # one pixel lights up in the second frame
    assert ring.motion_energy(pixels).item() == pytest.approx(0.25 / 16)
    # second differences along a row of 4: (0, .5, 0, 0) -> (-1, .5); of 4 rows, 2 frames and 2 directions
    assert ring.sharpness(pixels).item() == pytest.approx(2 * (1 + 0.25) / (2 * 4 * 2))
    r = world.Reading(*torch.zeros(4, 3, 4).long(), torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 4, 2))
    r.colour[2, 0], r.motion[2, 0], r.scene[2, 1] = 1, 1, 1
    assert ring.diversity(r, 2, 1) == 0.5  # frames 0 and 1 of 4; what is a distance or a place does not count


# ---------------------------------------------------------------------------------------------------- rows, sweep, file


def test_the_noise_of_an_evaluation(make, all_rows, monkeypatch, capsys):
    """Noise 0 of benchmarks/evaluation_noise.py is the arena's, the others are other videos of the same model."""
    monkeypatch.setattr(evaluation_noise, "load_pocket", make)
    monkeypatch.setattr(evaluation_noise, "run_rewards", lambda options, model: REWARDS)
    evaluation_noise.main(["--mode", "short", "--eval_prompts", "2", "--noises", "2"])
    first, *others, mean, deviation = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    row, names = all_rows[0][0], ("reward", "vq", "mq", "ta", "judge_all")
    for name, value in zip(names, (float(cell.strip("| ")) for cell in first), strict=True):
        assert value == pytest.approx(float(row[f"{name}_before"]), abs=6e-4)
    a, b = (float(line[0]) for line in others)
    assert a != b and float(mean[0]) == pytest.approx((a + b) / 2, abs=1.1e-3)
    assert float(deviation[0]) == pytest.approx(abs(a - b) / 2**0.5, abs=1.6e-3)


def test_a_second_call_computes_nothing(make, tmp_path):
    options = options_for(tmp_path / "a.csv", "rwr,best_of_n", set="num_generations=3")
    assert len(list(arena(make, REWARDS, options))) == 2
    before = (tmp_path / "a.csv").read_bytes()
    assert not list(arena(None, REWARDS, options))  # there is no pipeline to compute with
    assert (tmp_path / "a.csv").read_bytes() == before
    assert len(ring.left(replace(options, seeds="0,1"), shared_key(options, REWARDS), read(tmp_path / "a.csv"))) == 2


def test_interruption_loses_one_run_and_changes_no_number(make, tmp_path, monkeypatch):
    more = dict(seeds="0,1", forwards=600, evaluations=2)
    whole = list(arena(make, REWARDS, options_for(tmp_path / "whole.csv", **more)))
    options = options_for(tmp_path / "a.csv", **more)
    measure, calls = ring.measure, []

    def stopped(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ring, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            list(arena(make, REWARDS, options))
    kept = read(tmp_path / "a.csv")
    assert [row["budget"] for row in kept] == ["300"]  # the base model and seed 0 at its first budget were measured
    with open(tmp_path / "a.csv", "a") as file:  # and the machine failed within a line
        file.write("rwr,,short,settles,beach")
    rows = list(arena(make, REWARDS, options))
    assert [(row["seed"], row["budget"]) for row in rows] == [("0", "600"), ("1", "300"), ("1", "600")]
    assert numbers(read(tmp_path / "a.csv")) == numbers(whole)


def test_half_a_header_and_foreign_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("method,mod")
    assert ring.read_rows(path) == [] and path.read_bytes() == b"method,mod"  # who only reads changes nothing
    assert ring.read_rows(path, mend=True) == [] and path.read_bytes() == b""
    row = dict.fromkeys(COLUMNS, "1") | {"settings": '{"a": "b, c"}'}
    ring.append_row(path, row)
    assert ring.read_rows(path) == [row]
    for foreign in ("seed,reward\n1,2\n", "seed,reward\n1,2", '{"a": 1}', ",".join(COLUMNS) + "\nx\nx"):
        path.write_text(foreign)
        with pytest.raises(ValueError, match="name another file|is damaged"):
            ring.read_rows(path, mend=True)
        assert path.read_text() == foreign


def fake(options, method, rate, seed, gain, purpose="result", budget=None, note="", **more):
    """A row as the arena would write it."""
    budgets = (0,) if method in UNTRAINED else (options.forwards,)
    run = ring.Run(method, purpose, rate, seed, budgets)
    row = dict.fromkeys(COLUMNS, "") | run.key(shared_key(options, REWARDS), budget or budgets[-1])
    row |= {f"{name}_before": "1" for name in (*ring.PAIRED, *ring.PLAIN)}
    row |= {f"{name}_after": str(1 + gain) for name in (*ring.PAIRED, *ring.PLAIN)}
    row |= {f"{name}_sem": "0.01" for name in ring.PAIRED}
    row |= {"forwards": row["budget"], "backwards": "9", "updates": "3", "seconds": "60", "passes_per_video": "65"}
    return row | {"note": note, "settings": "{}"} | more


def test_the_sweep_chooses_on_a_seed_of_its_own(tmp_path):
    options = options_for("a.csv", "rwr,best_of_n", learning_rates="1e-4,3e-4,1e-3", seeds="0,1", forwards=90,
                          evaluations=3)  # fmt: skip
    here = shared_key(options, REWARDS)
    runs = runs_of(options, here, [])
    assert [(r.purpose, r.seed, r.budgets) for r in runs[:3]] == [("sweep", 100, (90,))] * 3
    assert all(math.isnan(r.learning_rate) and r.budgets == (30, 60, 90) for r in runs[3:] if r.method == "rwr")
    rows = [fake(options, "rwr", rate, 100, gain, "sweep") for rate, gain in ((1e-4, 0.1), (3e-4, 0.3))]
    assert math.isnan(runs_of(options, here, rows)[3].learning_rate)  # one is missing
    lost = fake(options, "rwr", 1e-3, 100, 9.0, "sweep", note="diverged: x")
    unread = fake(options, "rwr", 1e-4, 100, math.nan, "sweep")
    assert runs_of(options, here, [unread, rows[1], lost])[3].learning_rate == 3e-4
    runs = runs_of(options, here, [*rows, lost])
    assert [(r.method, r.seed, r.learning_rate) for r in runs[3:]] == [
        ("rwr", 0, 3e-4), ("best_of_n", 0, 0.0), ("rwr", 1, 3e-4), ("best_of_n", 1, 0.0)]  # fmt: skip
    sweep, result = (ring.eval_prompts(replace(options, eval_prompts=32), runs[k]) for k in (0, 3))
    assert sweep != result and result == world.prompt_set(32, 1, prompts_of.EVAL_SEED, "settles")
    with pytest.raises(ValueError, match="cannot be reported"):
        ring.check(replace(options, sweep_seed=1), here, [])
    assert [r.purpose for r in runs_of(replace(options, learning_rates="1e-4"), here, [])] == ["result"] * 4
    assert runs_of(replace(options, seeds=""), here, []) == runs_of(options, here, [])[:3]  # the sweep alone


def test_rows_made_with_other_settings_are_not_mixed(make, tmp_path):
    options = options_for(tmp_path / "a.csv")
    row = fake(options, "rwr", 1e-3, 0, 0.1, settings=json.dumps({"nearest": 1, "gone": 3}))
    ring.append_row(tmp_path / "a.csv", row)
    with pytest.raises(ValueError, match="rwr.*nearest 1.*2"):
        list(arena(make, REWARDS, options))
    assert not ring.check(replace(options, methods="cm_grpo"), shared_key(options, REWARDS), [row])


def test_rows_of_another_taste_are_others():
    """The taste is in the reward: a run that likes other scenes is another run, however the scenes are ordered."""
    options = options_for("a.csv")
    rows = [fake(options, "rwr", 1e-3, 0, 0.1)]
    for like, lacking in (("forest, beach,meadow", 0), ("night", 1)):
        other = replace(options, like=like)
        assert len(ring.left(other, shared_key(other, REWARDS), rows)) == lacking


# ------------------------------------------------------------------------------------------------------------- refused


def test_refused_cells_say_why(make, tmp_path, capsys):
    assert len(ring.GRID) == 16 and len(methods_of("grid")) == 10
    for (exploration, policy), reason in REFUSED.items():
        with pytest.raises(ValueError, match="makes no sense") as error:
            methods_of(f"{exploration}+{policy}")
        assert reason in str(error.value)
    options = options_for(tmp_path / "a.csv", "grid")
    here, path = shared_key(options, REWARDS), tmp_path / "a.csv"
    for method in methods_of("grid"):
        settings = ring.settings_of(method, config_of(method, options, 1e-3, 0))
        ring.append_row(path, fake(options, method, 1e-3, 0, 0.1, settings=json.dumps(settings)))
    assert not ring.left(options, here, read(path)) and not list(arena(None, REWARDS, options))
    said = capsys.readouterr().err
    assert said.count("is refused: ") == 6 and all(reason in said for reason in REFUSED.values())


WRONG = {
    "method": (["--methods", "kvpo,astrolab"], "unknown method 'astrolab' (did you mean 'astrolabe'?)"),
    "cell": (["--methods", "routing+ppo"], "policy one of"),
    "setting": (["--methods", "kvpo", "--set", "kl_coeff=3"], "kvpo has no such setting (did you mean 'kl_coef'?)"),
    "setting of another": (["--methods", "kvpo,rwr", "--set", "kl_coef=3"], "rwr has no such setting"),
    "unused": (["--methods", "rwr", "--set", "tau=1"], "rwr has no such setting"),
    "given": (["--methods", "kvpo", "--set", "seed=1"], "kvpo has no such setting"),
    "no value": (["--methods", "kvpo", "--set", "tau"], "name=value"),
    "value": (["--methods", "kvpo", "--set", "kl_coef=much"], "expected a float"),
    "truth": (["--methods", "astrolabe", "--set", "selective=maybe"], "expected a bool"),
    "range": (["--methods", "kvpo", "--set", "num_generations=1"], "num_generations must be at least 2"),
    "twice": (["--methods", "kvpo", "--set", "tau=1,rank=2,tau=2"], "--set gives tau twice"),
    "spread": (["--methods", "astrolabe", "--set", "spread=x"], 'spread must be "none" or "global"'),
    "old policy": (["--methods", "astrolabe", "--set", "compat=official,old_decay=0"], "old_decay is not read with"),
    "window": (["--methods", "astrolabe", "--set", "window_frames=24"], "no window of 24 frames fits"),
    "primary": (["--methods", "astrolabe", "--set", "primary=vqq"], "expected vq, mq or ta"),
    "average": (["--methods", "kvpo", "--set", "ema_decay=0.9"], "kvpo has no such setting"),
    "fork": (["--methods", "kvpo", "--mode", "short", "--set", "perturb_num_blocks=9"], "no block can fork"),
    "seeds": (["--seeds", "0;1"], "--seeds takes numbers"),
    "nothing to sweep": (["--seeds", "", "--learning_rates", "1e-3"], "give several, or give seeds"),
    "nothing that is swept": (["--seeds", "", "--methods", "best_of_n"], "give several, or give seeds"),
    "no rates": (["--learning_rates", ""], "at least one number"),
    "eval seed": (["--seeds", str(prompts_of.EVAL_SEED)], "draw the evaluation prompts"),
    "mode": (["--mode", "middle"], "mode must be"),
    "taste": (["--like", "beach,moon"], "like names scenes, beach, night, meadow, dusk, forest, snow, with commas"),
    "prompts": (["--eval_prompts", "1"], "at least 2"),
    "flag": (["--sead", "1"], "did you mean 'seeds'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_any_work(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pocket, "load_model", lambda *args: pytest.fail("a model was loaded"))
    argv, message = WRONG[case]
    assert cli.main(["arena", "--csv", str(tmp_path / "a.csv"), *argv]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a.csv").exists()


def test_the_command(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pocket, "load_model", lambda *args: make())
    argv = ["arena", "--csv", str(tmp_path / "a.csv"), "--methods", "rwr", "--seeds", "0", "--learning_rates", "1e-3",
            "--mode", "short", "--forwards", "1", "--evaluations", "1", "--eval_prompts", "2",
            "--set", SMALL]  # fmt: skip
    assert cli.main([*argv, "--plan"]) == 0
    planned = capsys.readouterr().out
    assert "| rwr | 1 | 1 |" in planned and "1 runs, 1 forward passes" in planned and not (tmp_path / "a.csv").exists()
    passes = int(planned.split("| rwr | 1 | 1 | ")[1].split(" |")[0])
    assert cli.main(argv) == 0
    assert "rwr" in capsys.readouterr().out and int(read(tmp_path / "a.csv")[0]["forwards"]) == passes
    with pytest.raises(SystemExit):
        cli.main(["arena", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "never reported" in text and "forward passes of the generator" in text


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_of_a_file(tmp_path, monkeypatch):
    options = options_for(tmp_path / "a.csv", "main", forwards=90, set="", learning_rates="1e-4,1e-3")
    gains = [0.10, 0.16, 0.31]
    rows = [fake(options, "rwr", rate, 100, gain, "sweep") for rate, gain in ((1e-4, 0.1), (1e-3, 0.4))]
    rows += [fake(options, "rwr", 1e-3, seed, gain / 2, budget=45) for seed, gain in enumerate(gains)]
    rows += [fake(options, "rwr", 1e-3, seed, gain) for seed, gain in enumerate(gains)]
    rows += [fake(options, "rwr", 1e-4, 0, 7.0)]  # another rate: a line of its own
    rows += [fake(options, "best_of_n", 0.0, 0, 0.2, passes_per_video="520")]
    rows += [fake(options, "routing+energy", 1e-3, 0, -0.05)]
    changed = replace(options, set="num_generations=4")
    rows += [fake(changed, "rwr", 1e-3, 0, 0.07)]
    rows += [fake(replace(options, forwards=180), "rwr", 1e-3, 3, 0.19, budget=90)]  # went on, and passed by here
    gains = [*gains, 0.19]
    for row in rows:
        ring.append_row(tmp_path / "a.csv", row)
    monkeypatch.chdir(tmp_path)
    arena_tables.main(["--csv", "a.csv", "--output", "tables.md"])
    out = Path("tables.md").read_text(encoding="utf-8")
    mean, error = statistics.mean(gains), statistics.stdev(gains) / 4**0.5
    (line,) = [line for line in out.splitlines() if line.startswith("| rwr | 0.001 | 4 | ")]
    assert f"{mean:+.3f} ± {error:.3f}" in line and "| 4 |" in line
    assert "| best_of_n |" in out and "520" in out
    assert "**+0.400 ± 0.010**" in out and "edge" in out  # the largest of the rates was chosen
    assert "| routing+energy | 0.001 | 1 |" in out
    assert "| num_generations=4 | rwr | 0.001 | 1 | +0.070 | -0.030 |" in out  # -.030: seed 0 has +.100 without
    ring.append_row(tmp_path / "a.csv", fake(replace(options, eval_prompts=4), "rwr", 1e-3, 0, 0.1))
    arena_tables.main(["--csv", "a.csv", "--output", "tables.md"])
    assert "4 prompts" in Path("tables.md").read_text(encoding="utf-8")  # other prompts: a table of their own


def test_the_picture_of_both_regimes():
    """A panel a regime, with its hold on the past; KVPO's line ends at the mean of its seeds; sweeps, other settings
    and cells are not drawn."""
    rows = []
    for mode, gains, hold in (("settles", (0.1, 0.3), ""), ("wanders", (0.0, 0.1), arena_tables.FREE)):
        plain = options_for("a.csv", forwards=90, set="", mode=mode)
        options = replace(plain, set=hold)
        rows += [fake(options, "kvpo", 1e-2, seed, g * k / 90 - 0.5, budget=k) for seed, g in enumerate(gains)
                 for k in (45, 90)]  # fmt: skip
        rows += [fake(plain, "best_of_n", 0.0, 0, -0.3), fake(options, "rwr", 1e-2, 100, 0.4, "sweep")]
        rows += [fake(options, "routing+nft", 1e-2, 0, 0.4), fake(replace(options, set="rank=4"), "rwr", 1e-2, 0, 0.4)]
        rows += [fake(options, "kvpo", 1e-1, 0, 0.5), fake(plain, "astrolabe", 1e-2, 0, -0.9)]
    for axes, end, rise in zip(arena_tables.regimes(rows).axes, (0.7, 0.55), ("-.30", "-.45"), strict=True):
        (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
        assert line.get_ydata()[0] == 1 and line.get_ydata()[-1] == pytest.approx(end)
        named = {f"KVPO ({rise})", "Best-of-N, untrained (-.30)", "Astrolabe (-.90)"}
        assert {text.get_text() for text in axes.texts} == {*named, "before training", "(rise of the reward)"}


def test_names_that_would_lie_on_each_other_are_spread():
    marks = [(0.9, ("a",)), (0.2, ("b",)), (0.21, ("c",)), (0.29, ("d",))]
    got = {what[0]: level for level, what in arena_tables.apart(marks, 0.05)}
    assert got == pytest.approx({"a": 0.9, "b": 0.18, "c": 0.23, "d": 0.29})


def test_the_picture_of_hacking():
    """A line a way, from before training through its evaluations: the taste's gain, and the stories in their order."""
    rows = []
    for weights, settings, journeys in (("vq=3 mq=0 ta=0", "prefix_coef=0,kl_coef=20", (0.5, 0.1)),
                                        ("vq=3 mq=0.1 ta=3", "", (0.9, 0.8))):  # fmt: skip
        for seed in (0, 1):
            for budget, journey in zip((45, 90), journeys, strict=True):
                row = fake(options_for("a.csv", forwards=90, set=settings), "kvpo", 1e-2, seed, 0.1, budget=budget)
                more = {
                    "vq_before": "1",
                    "judge_liked_before": "0.4",
                    "judge_liked_after": "0.7",
                    "vq_after": f"{1 + budget / 100 + seed}",
                    "judge_journey_after": f"{journey}",
                }
                rows.append(row | {"weights": weights, "judge_journey_before": "1"} | more)
    left, right = arena_tables.hacking(rows).axes
    assert {text.get_text() for text in right.texts} == {"taste alone, KL 20", "taste and words, past held", "before"}
    for axes, x in ((left, [0, 0.95, 1.4]), (right, [0.4, 0.7, 0.7])):
        for line, journeys in zip(axes.lines, ((1, 0.5, 0.1), (1, 0.9, 0.8)), strict=True):
            assert list(line.get_xdata()) == pytest.approx(x)
            assert list(line.get_ydata()) == pytest.approx(journeys)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """benchmarks/tables.py on rows of our own: -> (module, a function that writes them)."""
    import tables

    monkeypatch.setattr(tables, "DATA", tmp_path)

    def write(name, rows):
        for row in rows:
            ring.append_row(tmp_path / f"arena_{name}.csv", row)

    return tables, write


def test_a_line_of_a_table_is_the_rate_with_most_seeds():
    options = options_for("a.csv", forwards=90, set="", mode="settles")
    two = [fake(options, "kvpo", 1e-2, seed, -0.5) for seed in (0, 1)]
    rows = [*two, fake(options, "kvpo", 1e-1, 0, 0.9), fake(options, "kvpo", 1e-2, 100, 0.9, "sweep")]
    rows += [fake(options, "kvpo", 1e-2, 2, 0.9, budget=45), fake(options, "kvpo", 1e-2, 3, 0.9, note="diverged")]
    (own,) = arena_tables.lines_of(rows).values()
    assert arena_tables.whole(own) == two
    better = [fake(options, "kvpo", 1e-3, seed, -0.4) for seed in (0, 1)]
    assert arena_tables.lines_of([*rows, *better]) == {("kvpo", ""): better}


def test_the_table_of_both_regimes(recorded):
    """Held where memory decides, not held where noise does; KVPO's lead is paired by seed."""
    tables, write = recorded
    for mode, setting, ours in (("settles", "", (-0.5, -0.3)), ("wanders", arena_tables.FREE, (-0.6, -0.6))):
        options = options_for("a.csv", forwards=90, set=setting, mode=mode)
        write(mode, [fake(options, "kvpo", 1e-2, seed, g) for seed, g in enumerate(ours)])
        write(mode, [fake(options, "rwr", 1e-2, 1, -0.7), fake(options, "routing+nft", 1e-2, 0, -0.1)])
        other = replace(options, set="" if setting else arena_tables.FREE)
        write(mode, [fake(other, "rwr", 1e-2, 0, 0.9), fake(replace(options, set=""), "best_of_n", 0.0, 1, -0.2)])
    head, _, *lines = tables.arena().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| before training", "| best_of_n", "| kvpo", "| rwr"]
    assert lines[2] == ("| kvpo | 2 | .60 ± .10 | .60 ± .10 | -.40 ± .10 | - "
                        "| 2 | .40 ± .00 | .40 ± .00 | -.60 ± .00 | - |")  # fmt: skip
    assert lines[3] == "| rwr | 1 | .30 | .30 | -.70 | +.40 | 1 | .30 | .30 | -.70 | +.10 |"
    assert tables.arena_hold().splitlines()[2:] == [
        "| rwr | .30 (.30) | 1.90 (1.90) | 1.90 (1.90) | - | .30 (.30) |",
        "| kvpo | .60 ± .10 (.60 ± .10) | - | - | - | .40 ± .00 (.40 ± .00) |",
    ]


def test_the_grid_shows_the_bare_cell_or_the_best_method_in_it(recorded):
    tables, write = recorded
    for mode, setting in (("settles", ""), ("wanders", arena_tables.FREE)):
        options = options_for("a.csv", forwards=90, set=setting, mode=mode)
        write(mode, [fake(options, "routing+energy", 1e-2, 0, -0.5), fake(options, "kvpo", 1e-2, 0, -0.1)])
        write(mode, [fake(options, "flow_grpo", 1e-2, 0, -0.3), fake(options, "neighbor_grpo", 1e-2, 0, -0.8),
                     fake(options, "ar_copo", 1e-2, 0, -0.6)])  # fmt: skip
    assert tables.arena_grid().splitlines()[2:] == [
        "| fresh | .70 / .70 | refused | refused | - / - |",
        "| initial | refused | .40 / .40 | refused | - / - |",
        "| consistency | - / - | - / - | refused | - / - |",
        "| routing | refused | - / - | .50 / .50 | - / - |",
    ]


def test_the_table_of_ablations_compares_seed_by_seed(recorded):
    tables, write = recorded
    plain = options_for("a.csv", forwards=90, set="", mode="settles")
    changed = replace(plain, set="kl_coef=5")
    write("ablations", [fake(plain, "kvpo", 1e-2, seed, g) for seed, g in enumerate((-0.5, -0.3))])
    write("ablations", [fake(changed, "kvpo", 1e-2, seed, g) for seed, g in enumerate((-0.7, -0.9))])
    lines = tables.arena_ablations().splitlines()[2:]
    assert lines == [
        "| before training | - | 1.00 | - | 1.00 | - | - |",
        "| as it is | 3 | .60 ± .10 | - | .60 ± .10 | -.40 ± .10 | - |",
        "| kl_coef=5 | 3 | .20 ± .10 | -.40 ± .20 | .20 ± .10 | -.80 ± .10 | -.40 ± .20 |",
    ]


def test_the_table_of_both_events_keeps_taste_and_hold_apart(recorded):
    tables, write = recorded
    plain = options_for("a.csv", forwards=90, set="", mode="settles", like="beach,snow")
    write("mixture", [fake(plain, "kvpo", 1e-2, seed, g) for seed, g in enumerate((-0.5, -0.3))])
    write("mixture", [fake(replace(plain, like="left"), "kvpo", 1e-2, 0, -0.7)])
    write("mixture", [fake(replace(plain, like="left", set=arena_tables.FREE), "rwr", 1e-2, 0, -0.8)])
    assert tables.arena_mixture().splitlines()[2:] == [
        "| beach, snow | kvpo | yes | 2 | 1.00 to .60 ± .10 | .60 ± .10 | -.40 ± .10 |",
        "| left | kvpo | yes | 1 | 1.00 to .30 | .30 | -.70 |",
        "| left | rwr | no | 1 | 1.00 to .20 | .20 | -.80 |",
    ]


def test_the_table_of_selective_kl(recorded):
    tables, write = recorded
    for settings, gain in (("kl_coef=0,old_decay=0", 0.9), ("kl_coef=1,old_decay=0,selective=false", 0.1)):
        options = options_for("a.csv", forwards=90, set=settings, mode="wanders")
        for budget in (45, 90):
            row = fake(options, "astrolabe", 1e-2, 0, gain - 1, budget=budget)
            write("selective", [row | {"vq_before": "0.5", "vq_after": f"{0.5 + gain * budget / 90}"}])
    assert tables.arena_selective().splitlines()[2:] == [
        "| 0 | - | .90 | .90 | .90 | .90 | .90 | +.90 |",
        "| 1 | all | .10 | .10 | .10 | .10 | .10 | +.10 |",
    ]


def test_the_recorded_rows_are_all_that_the_script_asks_for():
    """benchmarks/arena.sh with a kvpo-min that only says what it was called with: nothing is left to compute."""
    root = Path(__file__).parents[1]
    calls = 'kvpo-min() { printf "%s\\0" "$@"; printf "\\n"; }; python() { :; }; source benchmarks/arena.sh'
    said = subprocess.run(["bash", "-c", calls], cwd=root, capture_output=True, text=True, check=True).stdout
    asked = Counter()
    for call in said.splitlines():
        command, *argv = call.rstrip("\0").split("\0")
        (options,) = parse_options(command, (ring.ArenaOptions,), argv)
        path = root / options.csv
        asked[path.name] += 1
        here, rows = ring.shared_key(options, run_rewards(options)), ring.read_rows(path)
        ring.check(options, here, rows)
        assert ring.left(options, here, rows) == [], call
    assert set(asked) == {path.name for path in (root / "benchmarks/data").glob("arena_*.csv")}


def test_the_tables_of_the_results_are_made_of_the_recorded_rows():
    import tables

    text = tables.RESULTS.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 5
    assert tables.rewritten(text) == text
