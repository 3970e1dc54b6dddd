"""What a run shows of its held-out prompts: the curve, the progress line, the last sentence, and whose taste it is."""

import io
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from kvpo_min import cli, pocket
from kvpo_min.cli import run as cli_run
from kvpo_min.cli.options import EvalOptions, RunOptions
from kvpo_min.compare.arena import ArenaOptions
from kvpo_min.pocket import pocket_rewards, world
from kvpo_min.rewards import Mixture
from kvpo_min.train import TrainConfig, add_policies, evaluate
from kvpo_min.viz import report

pytestmark = pytest.mark.usefixtures("one_thread")
FROM = ("night", "meadow")  # they settle in the forest and in the snow
FILM_SCRIPTS = [f"a red disc travels from the {scene} and settles" for scene in FROM]
CONFIG = TrainConfig(num_generations=2, rank=2, lora_alpha=2, tau=1e-3, unsafe_scale=1.0, max_train_steps=5,
                     num_frames=24, perturb_num_blocks=2, checkpointing_steps=1)  # fmt: skip
RISE = Mixture({"it": lambda videos, prompts: videos.mean((1, 2, 3, 4))}, {"it": 1.0})


@pytest.fixture(scope="module")
def film():
    """Clean videos of the two journeys, [2, 39, 3, 64, 64]"""
    generator = torch.Generator().manual_seed(0)
    return world.render(torch.stack([world.simulate(script, 39, generator) for script in FILM_SCRIPTS]))


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_transformer):
    """A random pocket model."""
    from kvpo_min.pocket.distill import new_autoencoder

    folder = tmp_path_factory.mktemp("model")
    new_autoencoder().save_pretrained(folder / "autoencoder")
    make_transformer(layers=1).save_pretrained(folder / "student")
    return folder


# --------------------------------------------------------------------------------------------------------------- curve


def test_a_point_of_the_curve_is_an_evaluation_of_the_first_prompts(make_pipeline, monkeypatch):
    """Every so many updates, always with the same noise; what does not exist (no words fix a motion) is left out."""
    monkeypatch.setattr("kvpo_min.pipeline.CURVE", 2)
    pipeline, scripts, rewards = (
        make_pipeline(),
        ["a red disc wanders", "a cross wanders", "a square wanders"],
        pocket_rewards(),
    )
    config = replace(CONFIG, num_frames=6)
    curve = cli_run.held_out_curve(pipeline, scripts, rewards, config, 3)
    assert curve(1) == curve(5) == {}
    point, again = curve(0), curve(3)
    whole = evaluate(pipeline, scripts[:2], rewards, 6)
    whole |= whole.pop("judge")
    assert point.pop("eval/seconds") > 0 and again.pop("eval/seconds") > 0
    assert point == again == {f"eval/{name}": value for name, value in whole.items() if math.isfinite(value)}
    head = evaluate(pipeline, scripts, rewards, 6, head=2)["head"]  # of a larger batch: rounded otherwise
    given = curve(0, head)
    assert given.pop("eval/seconds") < 1 and given == pytest.approx(point, rel=1e-4)
    assert curve(5, head).keys() == given.keys() | {"eval/seconds"}  # costs nothing, so it may come at any time
    assert "eval/motion" not in point and "eval/liked" not in point and {"eval/colour", "eval/reward"} <= set(point)
    assert cli_run.held_out_curve(pipeline, scripts, rewards, config, 0) is None


def test_the_curve_follows_the_policy_that_is_trained(make_pipeline):
    pipeline = make_pipeline()
    policies = add_policies(pipeline, CONFIG)
    curve = cli_run.held_out_curve(pipeline, ["a red disc"], RISE, replace(CONFIG, num_frames=6), 1)
    before = curve(0)["eval/reward"]
    with torch.no_grad():
        for name, weight in policies.named_parameters():
            if "lora_B.default" in name:
                weight.fill_(0.1)
    assert abs(curve(1)["eval/reward"] - before) > 1e-6


def test_the_curve_makes_no_more_videos_at_once_than_it_may(make_pipeline):
    """A real model makes one at a time."""
    pipeline, sizes = make_pipeline(), set()
    velocity = pipeline.backbone.velocity
    pipeline.backbone.velocity = lambda x, *args: sizes.add(len(x)) or velocity(x, *args)
    cli_run.held_out_curve(pipeline, ["a red disc"] * 3, RISE, replace(CONFIG, num_frames=3), 1, batch=1)(0)
    assert sizes == {1}


def looped(make_pipeline, folder, curve, report=None, **changes):
    """The loop of a run in `folder` -> (why it stopped, its lines)"""
    folder.mkdir(exist_ok=True)
    config, pipeline = replace(CONFIG, output_dir=str(folder), **changes), make_pipeline()
    policies = add_policies(pipeline, config)
    scripts = ["a red disc moves left"]
    begin = {key.replace("eval/", "eval0/"): value for key, value in curve(0).items()}
    stopped, _, logs, _, _ = cli_run.train_loop(pipeline, scripts, RISE, config, policies, folder, report, curve, begin)
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert kept == logs and [line["step"] for line in logs] == list(range(len(logs)))
    return stopped, logs


def of_curve(logs):
    return [{key: value for key, value in line.items() if key.startswith("eval")} for line in logs]


def every_second(done):
    return {} if done % 2 else {"eval/reward": float(done), "eval/liked": done / 8}


WHOLE = [
    {"eval0/reward": 0.0, "eval0/liked": 0.0}, {"eval/reward": 2.0, "eval/liked": 0.25},
    {}, {"eval/reward": 4.0, "eval/liked": 0.5}, {},
]  # fmt: skip


def test_the_curve_survives_a_resume_in_place_and_elsewhere(make_pipeline, tmp_path):
    """Checkpoints do not hold it: it is read from the file beside the checkpoint, whose last line was cut off."""
    assert of_curve(looped(make_pipeline, tmp_path / "a", every_second)[1]) == WHOLE
    looped(make_pipeline, tmp_path / "b", every_second, max_train_steps=3)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval/rew')
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    elsewhere = looped(make_pipeline, tmp_path / "c", every_second, resume_from_checkpoint=checkpoint)
    in_place = looped(make_pipeline, tmp_path / "b", every_second, resume_from_checkpoint="latest")
    assert of_curve(elsewhere[1]) == of_curve(in_place[1]) == WHOLE


def test_ctrl_c_while_a_point_is_measured_keeps_the_others(make_pipeline, tmp_path):
    """The update was done and saved, its line not yet written: the lines are then those of the checkpoint."""

    def interrupted(done):
        if done == 4:
            raise KeyboardInterrupt
        return every_second(done)

    stopped, logs = looped(make_pipeline, tmp_path / "a", interrupted)
    assert stopped == "interrupted" and of_curve(logs) == [*WHOLE[:3], {}]


def test_the_last_point_is_a_part_of_the_measurement_that_ends_the_run(make_pipeline, tmp_path):
    """So it is not made twice: the loop leaves it out."""
    asked = []
    stopped, logs = looped(make_pipeline, tmp_path / "a", lambda done: asked.append(done) or every_second(done),
                           max_train_steps=4)  # fmt: skip
    assert not stopped and asked == [0, 1, 2, 3] and of_curve(logs)[-1] == {}


def test_lines_that_hold_no_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cli_run.measured_before(path) == {}
    path.write_text('{"step": 0, "kl": 1, "eval0/reward": 2}\n{"step": 1}\n[1]\n3\n{"kl": 1}\n\n{"step": 2, "eval/re')
    assert cli_run.measured_before(path) == {0: {"eval0/reward": 2}, 1: {}}


# ------------------------------------------------------------------------------------------------------------ progress


def shown(total, logs, begin, lines):
    with cli_run.Progress(total, logs, begin) as progress:
        for line in lines:
            progress(line)


def test_without_a_terminal_there_is_a_line_every_ten_updates(capsys):
    lines = [{"eval/liked": 0.5} if k == 4 else {} for k in range(25)]
    shown(25, [], {"eval0/liked": 0.25, "eval0/reward": 1.0}, lines)
    out, err = capsys.readouterr()
    assert not out and [line.split(",")[0] for line in err.splitlines()] == [f"update {n} of 25" for n in (10, 20, 25)]
    for line in err.splitlines():
        assert line.split(", ")[1].endswith(" minutes left")
        assert line.split(", ")[2] == "held-out liked 0.50 (before 0.25)"


def test_the_minutes_left_are_those_of_the_updates_since(capsys, monkeypatch):
    """A run that goes on after 20 of 40 updates: ten more in 120 seconds, so the last ten take two minutes."""
    times = iter([0.0, 120.0])
    monkeypatch.setattr(cli_run.time, "perf_counter", lambda: next(times))
    earlier = [{"eval0/liked": 0.25}, *[{}] * 18, {"eval/liked": 0.75}]
    shown(40, earlier, {}, [{}] * 10)
    assert capsys.readouterr().err == "update 30 of 40, 2.0 minutes left, held-out liked 0.75 (before 0.25)\n"


def test_without_a_judge_or_a_curve(capsys):
    shown(10, [], {"eval0/reward": 1.0}, [{"eval/reward": 1.5}] * 10)
    shown(10, [], {}, [{"reward": 1.25, "anchor_reward": 1.5}] * 10)
    shown(10, [], {}, [{"skipped": 1.0}] * 10)
    ends = [line.split(", ")[2:] for line in capsys.readouterr().err.splitlines()]
    assert ends == [["held-out reward 1.50 (before 1.00)"], ["reward minus anchor -0.250"], []]


def test_a_terminal_gets_one_line_that_is_redrawn(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    shown(20, [], {"eval0/liked": 0.25}, [{"eval/liked": 0.5}] * 20)
    text = sys.stderr.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and "\r" in text and "20/20" in text
    assert "held-out liked 0.50 (before 0.25)" in text


# ---------------------------------------------------------------------------------------------------- the last sentence


def result(liked, anew, journey):
    return {"reward": 1.0, "judge": {"liked": liked, "liked anew": anew, "journey": journey}}


def test_the_sentence_counts_heroes_that_settle():
    text = report.in_words(result(0.5, 0.0, 1.0), result(0.75, 0.5, 0.75), FILM_SCRIPTS * 2, 39)
    assert text == (
        "The hero settles in a scene you like: 2 of 4 before, 3 after "
        "(50% of those that memory leads elsewhere, 0% before); its journey is in order in 100%, then 75%."
    )


def test_not_every_script_settles_and_some_do_so_twice():
    """Shares are of settlings: two here, though there are three scripts; the last one's second comes after the end."""
    scripts = ["a disc rests | it rests", "a cross travels and settles | it rests",
               "a disc travels and settles | it travels | it settles"]  # fmt: skip
    text = report.in_words(result(0.5, 0.0, 1.0), result(1.0, 1.0, 1.0), scripts, 75)
    assert ": 1 of 2 before, 2 after" in text
    assert ": 2 of 3 before, 3 after" in report.in_words(result(2 / 3, 0, 1), result(1, 1, 1), scripts, 84)


def test_the_count_is_the_judges_own(film):
    """Against the judge's reading of clean videos, with and without anyone who was elsewhere before the event."""
    reading = world.judge(film)
    judged = {"reward": 1.0, "judge": world.correctness(reading, FILM_SCRIPTS, ("forest", "dusk"))}
    text = report.in_words(judged, judged, FILM_SCRIPTS, 39)
    assert ": 1 of 2 before, 1 after (0% of those that memory leads elsewhere, 0% before);" in text
    everybody = {"reward": 1.0, "judge": world.correctness(reading, FILM_SCRIPTS, ("forest", "snow"))}
    assert "elsewhere" not in report.in_words(everybody, everybody, FILM_SCRIPTS, 39)
    assert "elsewhere" not in report.in_words(everybody, judged, FILM_SCRIPTS, 39)  # there is no share before


def test_where_nobody_settles_the_reward_is_told():
    nobody = result(math.nan, math.nan, math.nan)
    told = [({"reward": 1.0}, {"reward": 1.25}), (nobody, nobody | {"reward": 1.25})]
    for before, after in told:  # a real model has no judge
        assert report.in_words(before, after, ["a disc rests"], 39) == "The reward went from 1.000 to 1.250."


# --------------------------------------------------------------------------------------------------------------- taste


@pytest.mark.parametrize("options", [
    RunOptions, lambda **more: EvalOptions(prompts="p", json="j", **more), lambda **more: ArenaOptions(csv="c", **more)
])  # fmt: skip
def test_an_unknown_scene_is_refused_with_the_known_ones(options):
    assert options(like=" snow, night").like
    with pytest.raises(ValueError, match="'moon'") as error:
        options(like="beach,moon")
    assert all(scene in str(error.value) for scene in world.SCENES)


LIKED = [("forest", 0.5), ("forest,snow", 1.0), ("snow, forest,snow", 1.0), ("beach,night", 0.0)]


@pytest.mark.parametrize("like, share", LIKED)
def test_the_taste_decides_which_videos_are_liked_and_the_reward(like, share, film, model, tmp_path, monkeypatch):
    """`kvpo-min eval` on known videos: the frames in liked scenes, counted, are half of VQ."""
    load = pocket.load_model
    monkeypatch.setattr(pocket, "load_model", lambda *args: replace(load(*args), decode=lambda latents: film))
    monkeypatch.setattr("kvpo_min.pipeline.sample", lambda *args, **kwargs: iter([torch.zeros(2, 39, 1)]))
    (tmp_path / "p.txt").write_text("\n".join(FILM_SCRIPTS))
    argv = ["eval", "--prompts", str(tmp_path / "p.txt"), "--model", str(model), "--json"]

    def measured(like):
        assert cli.main([*argv, str(tmp_path / "o.json"), "--like", like]) == 0
        return json.loads((tmp_path / "o.json").read_text())

    got, other = measured(like), measured("dusk")
    assert got["judge"]["liked"] == share and other["judge"]["liked"] == 0
    assert got["judge"]["coherent"] == got["judge"]["remembered"] == got["judge"]["valid"] == 1
    # frames of the two journeys, six in a scene, three in the fifth, and 12 more where they settle
    frames = {"beach": 3, "night": 6, "meadow": 12, "dusk": 12, "forest": 18 + 6, "snow": 3 + 18}
    counts = [sum(frames[name] for name in world.liked_scenes(names)) for names in (like, "dusk")]
    assert got["vq"] - other["vq"] == pytest.approx(0.5 * (counts[0] - counts[1]) / 78, abs=0.01)
    assert got["reward"] - got["vq"] == pytest.approx(other["reward"] - other["vq"])
