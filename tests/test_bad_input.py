"""Wrong input of every kind that a user or a caller can give, drawn by hypothesis: each case must end in an error that
names the thing and what was expected, and of a command in one line on stderr, exit code 2 and nothing written.

The last test counts the cases. `HYPOTHESIS_PROFILE=many pytest tests/test_bad_input.py` draws five times as many, and
others in every run.
"""

import contextlib
import difflib
import functools
import io
import json
import math
import os
import pickle
import re
import string
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load, save

from kvpo_min import chr as routing
from kvpo_min import cli, pocket
from kvpo_min import config as config_of_runs
from kvpo_min import policies as adapters
from kvpo_min.checks import doctor as doctor_of
from kvpo_min.checks import parity as parity_of
from kvpo_min.cli import options as cli_options
from kvpo_min.compare import arena
from kvpo_min.compare import arena as arena_of
from kvpo_min.pocket import prompts as prompts_of
from kvpo_min.pocket import world
from kvpo_min.pocket.distill import DistillConfig
from kvpo_min.pocket.rewards import MotionQuality, TextAlignment, VisualQuality
from kvpo_min.prompts import read_prompts as all_prompts
from kvpo_min.reward_models import answer_in
from kvpo_min.rewards import Mixture, check_videos
from kvpo_min.rollout import KVHistory, Sampler, Stream, draw_noise, fork, generate, pieces, replay
from kvpo_min.system import CLAIM, STALE, claimed, number_in_environment
from kvpo_min.train import TrainConfig, add_policies, sample, score
from kvpo_min.tve import schedule
from kvpo_min.wan import real
from kvpo_min.wan.checkpoints import GENERATORS, load_transformer, read_file, read_lora, tensors_of
from kvpo_min.wan.real import WanOptions

pytestmark = pytest.mark.usefixtures("one_thread")

checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("few", derandomize=True, deadline=None, database=None, suppress_health_check=checks)
settings.register_profile("many", settings.get_profile("few"), derandomize=False, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "few")
TIMES = {"few": 1, "many": 5}[PROFILE]
TESTS, CASES = set(), Counter()  # test -> cases that were refused as they should be
REFUSALS = Counter()


def cases(n):
    """Draws `n` cases (times five in the profile "many") and counts those in which something was refused."""

    def decorate(test):
        TESTS.add(test.__name__)
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            before = REFUSALS.total()
            inner(*args, **kwargs)
            CASES[test.__name__] += REFUSALS.total() > before

        test.hypothesis.inner_test = counted
        return settings(settings.get_profile(PROFILE), max_examples=n * TIMES)(test)

    return decorate


def refused(call, *named, error=ValueError):
    """The call raises this kind of error, and its message holds all of the words."""
    with pytest.raises(error) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    is_named(caught.value, *named)


def is_named(error, *named):
    message = str(error)
    assert all(str(word) in message for word in named), f"{named} not in {message!r}"
    assert len(message) > sum(len(str(word)) for word in named) and len(message) > 15, message  # what was expected
    REFUSALS["of calls"] += 1


def main(argv, monkeypatch=None):
    """-> exit code and stderr of a command, run in this process; no model may be loaded, and nothing written"""

    def reached(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    err, before = io.StringIO(), set(Path.cwd().rglob("*"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(pocket, "load_model", reached)
        patch.setattr("kvpo_min.wan.real.load_wan", reached)
        patch.setattr("kvpo_min.cli.run.measure", reached)
        patch.setattr("kvpo_min.pocket.distill.train_autoencoder", reached)
        code = cli.main(argv)
    assert set(Path.cwd().rglob("*")) == before
    return code, err.getvalue()


def refused_by_main(argv, *named):
    code, err = main(argv)
    assert code == 2 and err.startswith("kvpo-min: error: ") and err.count("\n") == 1, (code, err)
    assert all(word in err for word in named), (named, err)
    REFUSALS["of commands"] += 1


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """An empty working folder."""
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        yield


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder for files that the cases write again and again."""
    return tmp_path_factory.mktemp("files")


# ------------------------------------------------------------------------------------------------------------- configs

CLASSES = {
    "train": (TrainConfig, cli_options.RunOptions, WanOptions),
    "sample": (cli_options.SampleOptions, WanOptions),
    "eval": (cli_options.EvalOptions, WanOptions),
    "export": (cli_options.ExportOptions,),
    "doctor": (doctor_of.DoctorOptions,),
    "arena": (arena_of.ArenaOptions,),
    "parity": (parity_of.ParityOptions,),
    "distill": (DistillConfig,),
}
KINDS = {command: {f.name: f.type for cls in classes for f in fields(cls)} for command, classes in CLASSES.items()}
words = st.text(string.ascii_letters + " _-.", min_size=1, max_size=12)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
no_words = st.lists(junk, max_size=2) | st.dictionaries(words, junk, max_size=2) | st.none()
WRONG_KIND = {  # YAML values that an option of this kind must not take
    "int": no_words
    | st.booleans()
    | st.sampled_from(["two", "1.5", "1e3", ".nan", "", 1.5, math.nan, math.inf, "1 2"]),
    "float": no_words | st.booleans() | st.sampled_from(["x", "", "1,5", math.nan, math.inf, -math.inf, "1e400", "--"]),
    "bool": no_words | st.sampled_from(["maybe", "no way", 3, 0.5, 1, 0, "yes", "no", "true"]),
    "str": no_words | st.booleans() | st.integers() | st.floats(),
}


@st.composite
def wrong_options(draw, commands):
    command = draw(st.sampled_from(commands))
    name = draw(st.sampled_from(sorted(KINDS[command])))
    return command, name, draw(WRONG_KIND[KINDS[command][name]])


def dump(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


@cases(80)
@given(case=wrong_options([c for c in CLASSES if c not in ("train", "sample", "eval")]))
def test_a_value_of_another_kind_is_refused_by_name(case, there):
    command, name, value = case
    refused_by_main([command, "--config", dump(there / "c.yaml", {name: value})], name)


@cases(25)
@given(case=wrong_options(["train", "sample", "eval"]))
def test_a_value_of_another_kind_in_the_large_commands(case, there):
    command, name, value = case
    refused_by_main([command, "--config", dump(there / "c.yaml", {name: value})], name)


@cases(40)
@given(
    name=st.sampled_from(sorted(n for n, kind in KINDS["doctor"].items() if kind == "int")),
    value=st.sampled_from(["two", "1.5", "nan", "inf", "1e3", "", "[1]", "null", "true", "1 2", "{}", "٣x"]) | words,
)
def test_flags_of_another_kind(name, value):
    refused_by_main(["doctor", f"--{name}={value}"], f"--{name}")


@st.composite
def misspelt(draw, names):
    name = draw(st.sampled_from(sorted(names)))
    k = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    edited = draw(
        st.sampled_from([name[:k] + name[k + 1 :], name[:k] + letter + name[k:], name[:k] + letter + name[k + 1 :]])
    )
    return name, edited


@cases(200)
@given(case=misspelt([n for n in KINDS["train"] if len(n) > 4]), value=junk)
def test_a_misspelt_key_gets_the_nearest_name(case, value, there):
    name, key = case
    known = list(KINDS["train"])
    if key in known or not key:
        return
    path = dump(there / "c.yaml", {"seed": 3, key: value} if not key.startswith(" ") else {key: value})
    refused(lambda: cli_options.check_yaml(path, known), path, f"unknown key '{key}'", "did you mean '")
    near = re.search(r"did you mean '(\w+)'", config_of_runs.nearest_known(key, known))[1]
    assert near in known and (near == name or difflib.SequenceMatcher(None, key, near).ratio() > 0.8)


@cases(40)
@given(case=misspelt(KINDS["parity"].keys() | {"golden"}), value=words)
def test_a_misspelt_flag_gets_the_nearest_name(case, value):
    name, flag = case
    if flag in (name, "config", "help") or not flag:
        return
    refused_by_main(["parity", f"--{flag}", value], f"unknown flag --{flag} (did you mean '{name}'?)")


MALFORMED = [
    "seed: !!bool maybe", "seed: !!int x", "seed: !!int ''", "seed: !!timestamp abc", "seed: 2024-13-45", "? [1]\n: 2",
    "<<: 3", "seed: *a", "seed: 1\n---\nseed: 2", "!!python/object:os.system {}", "%YAML 9\n---\nseed: 1", "seed: 1: 2",
    "seed: " + "1" * 5000, "[" * 1200, "a: " + "[" * 1200, "seed: 1\nseed: 2", "seed: 'open", "- seed", "seed", "3",
    "\tseed: 1", "seed: !!binary x", "a: {b: c", "seed: @1", "seed: `1`", "{seed: 1, seed: 2}",
]  # fmt: skip


@cases(150)
@given(
    content=st.sampled_from(MALFORMED).map(str.encode)
    | st.tuples(st.sampled_from(MALFORMED), st.text(max_size=20)).map(lambda two: "\n".join(two).encode())
    | st.binary(min_size=1, max_size=40).map(lambda b: b"\xff\xfe\x80" + b)
    | st.text("[]{}:,!&*|>%@`'\" \n-?#ab1", min_size=1, max_size=30).map(str.encode)
)
def test_a_file_that_is_no_config_is_refused_by_name(content, there):
    path = there / "c.yaml"
    path.write_bytes(content)
    try:
        got = cli_options.check_yaml(str(path), list(KINDS["doctor"]))
    except ValueError as error:
        return is_named(error, path)
    assert got == {} and yaml.safe_load(content) in (None, {}), content  # what passes holds nothing


@cases(20)
@given(content=st.sampled_from(MALFORMED))
def test_a_malformed_config_ends_a_command_in_one_line(content, there):
    (there / "c.yaml").write_text(content)
    refused_by_main(["parity", "--config", str(there / "c.yaml")], "c.yaml")


tastes = (  # that are none: unknown scenes, no scene, all of them
    st.sampled_from(["", ",", " ", "beach,moon", "beach meadow", "Beach", ",".join(world.SCENES)])
    | words.filter(lambda w: not {part.strip() for part in w.split(",")} <= {*world.SCENES, ""})
)

LIMITS = {  # option -> values that are out of its range
    TrainConfig: {
        **dict.fromkeys(
            ["max_train_steps", "groups_per_update", "old_policy_every", "rank", "tau_groups", "perturb_num_blocks",
             "num_segments", "checkpoints_total_limit", "lora_alpha"], st.integers(max_value=0)),
        **dict.fromkeys(
            ["learning_rate", "max_grad_norm", "adv_clip_max", "clip_range_low", "clip_range_high", "tau_target"],
            st.floats(max_value=0) | st.sampled_from([math.nan, math.inf])),
        **dict.fromkeys(
            ["kl_coef", "prefix_coef", "tau", "unsafe_scale", "local_weight", "global_weight", "adam_weight_decay"],
            st.floats(max_value=0, exclude_max=True) | st.sampled_from([math.nan, math.inf])),
        **dict.fromkeys(
            ["global_frames", "checkpointing_steps", "lr_warmup_steps", "nearest", "branch_batch", "replay_batch"],
            st.integers(max_value=-1)),
        "num_frames": st.integers(max_value=2) | st.integers(1, 100).map(lambda n: 3 * n + 1),
        "num_generations": st.integers(max_value=1),
        "grad_steps": st.integers(max_value=0) | st.integers(min_value=5),
        "ema_decay": st.floats(min_value=1) | st.floats(max_value=-1e-9) | st.just(math.nan),
        "compat": words.filter(lambda w: w != "official"),
        "fuse_mode": words.filter(lambda w: w not in ("std", "zscore", "none")),
        "seed": st.integers(min_value=2**63) | st.integers(max_value=-(2**63) - 1),
    },
    cli_options.RunOptions: {
        "eval_prompts": st.integers(max_value=0), "eval_every": st.integers(max_value=-1), "like": tastes,
        "report_to": words.filter(lambda w: w not in ("none", "tensorboard")),
        **dict.fromkeys(["vq", "mq", "ta"], st.floats(max_value=-1e-9) | st.sampled_from([math.nan, math.inf])),
    },
    arena_of.ArenaOptions: {
        "eval_prompts": st.integers(max_value=1), "mode": words.filter(lambda w: w not in arena_of.MODES),
        "evaluations": st.integers(max_value=0) | st.integers(min_value=40001), "forwards": st.integers(max_value=2),
        "sweep_seed": st.integers(min_value=2**63), "csv": st.just(""), "like": tastes.filter(bool),
    },
    WanOptions: {
        "dtype": words.filter(lambda w: w not in ("bfloat16", "float32")), "device": words.map(lambda w: w + "?"),
        "height": st.integers(max_value=15) | st.integers(1, 99).map(lambda n: 16 * n + 3),
        "width": st.integers(max_value=15) | st.integers(1, 99).map(lambda n: 16 * n + 3),
    },
    DistillConfig: {
        **{f.name: st.integers(max_value=0) for f in fields(DistillConfig) if f.type == "int" and f.name != "seed"},
        **{f.name: st.floats(max_value=-1e-9) | st.sampled_from([math.nan, math.inf])
           for f in fields(DistillConfig) if f.type == "float"},
        "seed": st.integers(min_value=2**63), "device": words.map(lambda w: w + "?"),
        "text_dropout": st.floats(min_value=1, exclude_min=True),
        "ema_decay": st.floats(min_value=1),
    },
    cli_options.ExportOptions: {
        "layout": words.filter(lambda w: w not in ("diffusers", "peft", "authors")), "adapter": st.just("")
    },
    cli_options.SampleOptions: {"seed": st.integers(min_value=2**63), "script": st.sampled_from(["", " ", "\n"])},
    cli_options.EvalOptions: {"seed": st.integers(max_value=-(2**63) - 1), "json": st.just(""), "prompts": st.just(""),
                              "like": tastes},
}  # fmt: skip
NEEDED = {
    arena_of.ArenaOptions: {"csv": "x"},
    cli_options.ExportOptions: {"adapter": "x"},
    cli_options.SampleOptions: {"script": "a disc"},
    cli_options.EvalOptions: {"prompts": "x", "json": "x"},
}


@st.composite
def out_of_range(draw):
    cls = draw(st.sampled_from(list(LIMITS)))
    name = draw(st.sampled_from(sorted(LIMITS[cls])))
    return cls, name, draw(LIMITS[cls][name])


@cases(500)
@given(case=out_of_range())
def test_a_value_out_of_range_is_refused_by_name(case):
    cls, name, value = case
    refused(lambda: cls(**NEEDED.get(cls, {}) | {name: value}), name)


@cases(40)
@given(
    settings=st.sampled_from(
        ["tau", "tau=", "tau=x", "rank=1.5", "rank=two", "nope=1", "seed=1", "learning_rate=1", "=", "=1", "rank=0",
         "num_generations=1", "grad_steps=9", "tau=nan", "tau=inf", "compat=x", "nearest=6", "perturb_num_blocks=99"]),
    method=st.sampled_from(["kvpo", "kvpo,astrolabe", "kvpo,rwr"]),
)  # fmt: skip
def test_bad_settings_of_the_arena(settings, method, there):
    options = arena_of.ArenaOptions(csv=str(there / "absent.csv"), methods=method, set=settings)
    name = settings.split("=")[0] or "--set"
    here = arena.shared_key  # what `arena.check` is given does not matter here: no rows
    refused(
        lambda: arena.check(options, here(options, Mixture({}, {})), []), name.replace("perturb_num_blocks", "block")
    )


@cases(40)
@given(
    name=st.sampled_from(["seeds", "learning_rates"]),
    value=st.sampled_from(
        ["", "x", "1,,2", "1;2", "nan", "inf", "-1", "0", str(2**63), "1e-3,0", "100", str(prompts_of.EVAL_SEED)]
    ),
)
def test_bad_lists_of_the_arena(name, value, there):
    good = {"seeds": ("", "0", "-1"), "learning_rates": ("100", str(2**63), str(prompts_of.EVAL_SEED))}
    if value in good[name]:
        return
    options = arena_of.ArenaOptions(csv="x", **{name: value})
    refused(lambda: arena.check(options, {}, []), "seed" if name == "seeds" else name)


@cases(60)
@given(
    content=st.binary(min_size=1, max_size=60)
    | st.sampled_from(["settings", "{}", '{"a": 1}', "x", "", "1,2", '"open', "[" * 3000, "null", "3"]).map(
        lambda last: (",".join(arena.COLUMNS) + "\n" + ",".join(["x"] * (len(arena.COLUMNS) - 1)) + "," + last).encode()
    ),
    ended=st.booleans(),
)
def test_a_file_that_is_no_csv_of_the_arena(content, ended, there):
    path = there / "arena.csv"
    content += b"\n" * ended
    path.write_bytes(content)
    last = content.decode(errors="replace").rstrip("\n").rsplit(",", 1)[-1]
    try:
        rows = arena.read_rows(path, mend=True)
    except ValueError as error:
        assert path.read_bytes() == content
        return is_named(error, path)
    assert all(isinstance(json.loads(row["settings"]), dict) for row in rows) and (
        not rows or last in ("{}", '{"a": 1}')
    )


# ------------------------------------------------------------------------------------------------------- prompts, paths

known = st.sampled_from(world.WORDS)
almost = st.lists(known, min_size=1, max_size=12).map(" ".join)
bad_line = (
    st.text(min_size=1, max_size=20).filter(lambda t: t.strip() and not t.lstrip().startswith("#"))
    | almost
    | st.lists(almost, min_size=2, max_size=6).map(" | ".join)
    | st.sampled_from(["a rde disc", "a disc |", "| a disc", "it turns", "a disc | | it turns", "a disc moves moves"])
)


def parses(line):
    try:
        world.parse(line)
        return True
    except world.PromptError:
        return False


@cases(250)
@given(line=bad_line.filter(lambda t: len((t + "x").splitlines()) == 1 and not parses(t)), before=st.integers(0, 3))
def test_a_bad_line_of_a_prompts_file_is_named(line, before, there):
    path = there / "p.txt"
    path.write_text("a disc\n" * before + line + "\n", encoding="utf-8", errors="surrogatepass")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return refused(lambda: world.read_prompts(str(path)), path, "UTF-8")
    refused(lambda: world.read_prompts(str(path)), path, f"line {before + 1}: ", "expected")


@cases(60)
@given(
    content=st.binary(max_size=30).map(lambda b: b"a disc\n\xff" + b)
    | st.sampled_from([b"", b"\n\n", b"# a\n", b" \t\r\n"])
)
def test_a_file_without_prompts_is_refused(content, there):
    path = there / "p.txt"
    path.write_bytes(content)
    refused(lambda: world.read_prompts(str(path)), path)
    if b"disc" in content:
        refused(lambda: real.read_prompts(path), path, "UTF-8")


REAL_LINES = st.sampled_from(
    ["3,[a],[b]", "2,[a],[b", "2,[a]],[b]", "1,[]", "2,[a],[]", "2,[a],[b | c]", "²,[a]", "9" * 5000 + ",[a]", "1,a"]
)
REAL_JSON = st.sampled_from(
    ['{"prompts": "a"}', '{"prompts": [1]}', '["a"]', '{"prompts": ["a"', '{"text": []}', "null", "3", '"x"',
     "[" * 5000, '{"prompts": ["a | b"]}', '{"prompts": null}', "1" * 5000, '{"prompts": [["a"]]}', "NaN", "{}"]
)  # fmt: skip


@cases(150)
@given(line=REAL_LINES | REAL_JSON, before=st.integers(0, 3), more=st.sampled_from(["", " ", "\u2028"]))
def test_a_bad_line_for_a_real_model_is_named(line, before, more, there):
    is_json = line[0] in '{["n3N' or line == "1" * 5000
    path = there / ("r.jsonl" if is_json else "r.txt")
    good = '{"prompts": ["a"]}\n' if is_json else "1,[a]\n"
    path.write_text(good * (before + 1) + line + more + "\n", encoding="utf-8")
    refused(lambda: real.read_prompts(path), path, f"line {before + 2}: ")


@cases(40)
@given(parts=st.lists(st.sampled_from(["a", "", " ", "b c"]), min_size=2, max_size=4))
def test_an_empty_prompt_between_others_is_refused(parts, there):
    line = real.BETWEEN.join(["x", *parts, "y"])
    (there / "plain.txt").write_text(line)
    if all(part.strip() for part in parts):
        assert real.read_prompts(there / "plain.txt", len(parts) + 2 if len(parts) < 3 else 4)
    else:
        refused(lambda: real.read_prompts(there / "plain.txt"), "line 1: a prompt is empty")


@cases(40)
@given(
    option=st.sampled_from(
        [("sample", "--output_dir", "a disc"), ("sample", "--prompts", ""), ("eval", "--prompts", ""),
         ("export", "--adapter", ""), ("parity", "--golden", ""), ("doctor", "--output_dir", ""),
         ("arena", "--csv", ""), ("export", "--output_dir", "")]),
    kind=st.sampled_from(["below a file", "absent", "folder", "long"]),
)  # fmt: skip
def test_paths_that_cannot_be_are_refused(option, kind, there):
    command, flag, script = option
    (there / "file").write_text("x")
    (there / "full").mkdir(exist_ok=True)
    (there / "full" / "x").write_text("x")
    path = {"below a file": there / "file" / "x", "absent": there / "no" / "x", "folder": there / "full",
            "long": there / ("x" * 300)}[kind]  # fmt: skip
    if (flag == "--output_dir" and command != "doctor" and kind in ("absent", "long")) or command == "arena" != kind:
        if kind != "folder" or command != "arena":
            return  # a folder that will be made
    if (command, kind) == ("doctor", "folder"):
        return
    more = {"eval": ["--json", "o.json"], "export": ["--adapter", str(there)] if flag != "--adapter" else []}
    refused_by_main([command, *([script] if script else []), flag, str(path), *more.get(command, [])], path.name)


# ------------------------------------------------------------------------------------------------- weights and adapters

BLOCK = "blocks.0.attn1.to_q"


def lora_tensors(rank=2, width=24):
    generator = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.{BLOCK}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"base_model.model.{BLOCK}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }


WHOLE = save(lora_tensors())


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


WHOLE_PT = torch_bytes({"generator_lora": lora_tensors()})


def test_the_whole_files_are_read(there):
    """Or the tests below would pass for another reason."""
    (there / "whole.safetensors").write_bytes(WHOLE)
    (there / "whole.pt").write_bytes(WHOLE_PT)
    assert read_lora(there / "whole.safetensors").rank == read_lora(there / "whole.pt").rank == 2


@cases(200)
@given(keep=st.integers(0, len(WHOLE) - 1))
def test_safetensors_cut_at_any_byte(keep, there):
    path = there / "a.safetensors"
    path.write_bytes(WHOLE[:keep])
    refused(lambda: read_lora(path), path, "cut short" if keep else "empty")


@cases(60)
@given(keep=st.integers(0, len(WHOLE_PT) - 1), suffix=st.sampled_from([".pt", ".pth", ".bin", ".ckpt"]))
def test_torch_files_cut_at_any_byte(keep, suffix, there):
    path = there / f"a{suffix}"
    path.write_bytes(WHOLE_PT[:keep])
    refused(lambda: read_lora(path), path, "cut short" if keep else "empty")


@cases(100)
@given(
    content=st.binary(min_size=1, max_size=200)
    | st.binary(max_size=50).map(lambda b: len(b).to_bytes(8, "little") + b)
    | junk.map(lambda j: json.dumps(j).encode()).map(lambda b: len(b).to_bytes(8, "little") + b + bytes(16)),
    suffix=st.sampled_from([".safetensors", ".pt", ".bin"]),
)
def test_what_is_no_weights_file(content, suffix, there):
    path = there / f"junk{suffix}"
    path.write_bytes(content)
    refused(lambda: read_lora(path), path)
    refused(lambda: load_transformer(path, num_heads=2), path)


class Code:
    """Unpickling it would make a file."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


@cases(60)
@given(
    call=st.sampled_from([os.mkdir, os.system, open, exec, eval, print, os.listdir, Path, getattr]),
    where=st.sampled_from(["top", "generator", "generator_lora", "model", "deep"]),
    how=st.sampled_from(["torch", "pickle"]), suffix=st.sampled_from([".pt", ".bin", ".safetensors"]),
)  # fmt: skip
def test_a_pickle_that_would_run_code_does_not(call, where, how, suffix, there):
    made = there / "ran"
    argument = {os.mkdir: str(made), os.system: f"touch {made}", exec: f"open({str(made)!r}, 'w')",
                eval: f"open({str(made)!r}, 'w')"}.get(call, str(made))  # fmt: skip
    code = Code(call, argument)
    content = {"top": code, "deep": {"generator": {"x": [code]}}}.get(where, {where: code})
    path = there / f"code{suffix}"
    path.write_bytes(pickle.dumps(content) if how == "pickle" else torch_bytes(content))
    for read in (read_lora, load_transformer, read_file):
        refused(lambda read=read: read(path), path)
    assert not made.exists()


other_values = st.sampled_from(
    [None, 3, "x", [], {}, torch.zeros(2, 24, dtype=torch.complex64), lambda: torch.zeros(2, 24).to_sparse(),
     lambda: torch.zeros(2, 24, device="meta"), torch.zeros(0, 24), torch.zeros(()), torch.zeros(2),
     torch.zeros(2, 2, 2), torch.full((2, 24), math.nan), torch.full((2, 24), math.inf), torch.zeros(3, 24)]
)  # fmt: skip


@cases(120)
@given(
    value=other_values,
    key=st.sampled_from(sorted(lora_tensors())),
    change=st.sampled_from(["set", "drop", "add", "rename"]),
)
def test_loras_that_are_not_whole(value, key, change, there):
    state, value = lora_tensors(), value() if callable(value) else value  # odd tensors do not outlive their case
    if change == "set":
        state[key] = value
    elif change == "drop":
        state.pop(key)
    elif change == "add":
        state["base_model.model.blocks.1.attn1.to_q.lora_A.weight"] = value
    else:
        state[key.replace("lora_", "lora_X")] = state.pop(key)
    path = there / "changed.pt"
    path.write_bytes(torch_bytes(state))
    refused(lambda: read_lora(path), path)


ALPHAS = ["null", "[1]", '"x"', "-1", "0", "NaN", "Infinity", "{}", "1e400"]


@cases(60)
@given(
    text=st.sampled_from(ALPHAS).map(lambda a: f'{{"lora_alpha": {a}}}')
    | st.sampled_from(["3", "null", "[]", "{", "", '"x"', '{"r": 2}', "[" * 5000, '{"lora_alpha": 2, "r": 3}',
                       '{"lora_alpha": 2, "r": null}', '{"lora_alpha": 2, "rank_pattern": {"a": 1}}',
                       '{"lora_alpha": 2, "use_rslora": true}', '{"lora_alpha": 2, "modules_to_save": ["x"]}'])
)  # fmt: skip
def test_bad_configs_beside_an_adapter(text, there):
    folder = there / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(WHOLE)
    (folder / "adapter_config.json").write_text(text)
    refused(lambda: read_lora(folder), "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapted(make_pipeline, there):
    """A pipeline, and the files of an adapter that fits it."""
    folder = there / "fits"
    adapters.save_adapter(add_policies(make_pipeline(), TrainConfig(rank=2)), folder, "tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    return make_pipeline(), config, (folder / "adapter_model.safetensors").read_bytes()


CONFIG_CHANGES = st.sampled_from(
    [{"r": 3}, {"r": 0}, {"r": -1}, {"r": "two"}, {"r": None}, {"r": 10**9}, {"r": [2]}, {"lora_alpha": "x"},
     {"lora_alpha": None}, {"lora_alpha": [1]}, {"target_modules": None}, {"target_modules": []}, {"target_modules": 5},
     {"target_modules": ["nowhere"]}, {"target_modules": ["to_q"]}, {"target_modules": "("}, {"peft_type": "LOHA"},
     {"peft_type": None}, {"peft_type": 3}, {"use_dora": True}, {"modules_to_save": ["proj_out"]},
     {"rank_pattern": {"to_q": 7}}, {"rank_pattern": 5}, {"bias": "all"}, {"bias": "x"}, {"lora_dropout": "x"},
     {"layers_to_transform": [0]}, {"init_lora_weights": "x"}, {"exclude_modules": ["to_q"]}, {"r": True}]
)  # fmt: skip


@cases(60)
@given(change=CONFIG_CHANGES)
def test_adapter_folders_whose_config_does_not_fit(change, adapted, there):
    """And the pipeline stays as it was."""
    pipeline, config, weights = adapted
    folder = there / "load"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    refused(lambda: adapters.load_adapter(pipeline, folder), folder)
    assert not any("lora" in name for name, _ in pipeline.backbone.named_modules())


@cases(80)
@given(
    keep=st.integers(0, 20000), config=st.sampled_from(["whole", "3", "null", "[]", "", "{", '"x"', "[" * 5000, "{}"]),
    nan=st.booleans(),
)  # fmt: skip
def test_adapter_folders_that_are_damaged(keep, config, nan, adapted, there):
    pipeline, whole, weights = adapted
    folder = there / "load"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(whole) if config == "whole" else config)
    broken = weights[:-4] + torch.tensor([math.nan]).numpy().tobytes() if nan else weights[: keep % len(weights)]
    (folder / "adapter_model.safetensors").write_bytes(broken)
    refused(lambda: adapters.load_adapter(pipeline, folder), folder)
    assert not any("lora" in name for name, _ in pipeline.backbone.named_modules())


# ------------------------------------------------------------------------------------- kinds that users met elsewhere

lines_of = {  # form -> a script's line
    ".txt": " | ".join,
    "LongLive's": lambda prompts: f"{len(prompts)},{','.join(f'[{prompt}]' for prompt in prompts)}",
    ".jsonl": lambda prompts: json.dumps({"prompts": prompts}),
}
scripts_of = st.lists(
    st.lists(st.text("abcé []{},\"'#0129-", min_size=1, max_size=12), min_size=1, max_size=4), max_size=5
)
spoils = st.sampled_from(
    ["\u200b", "\ufeff \u2060", "\x00a", "a |b", "a | ", "|", '{"text": "a"}', '["a", "b"]', "[", '["a",']
)


@cases(850)
@given(
    form=st.sampled_from(sorted(lines_of)), scripts=scripts_of, spoil=spoils, at=st.integers(0, 5), end=st.booleans(),
    blank=st.booleans(), suffix=st.sampled_from(["", ".csv", ".json", ".yaml", ".tsv", ".md"]),
)  # fmt: skip
def test_kind_prompts_are_read_as_they_were_written_or_refused_with_their_line(
    form, scripts, spoil, at, end, blank, suffix, there
):
    scripts = [[" ".join(prompt.split()).strip('[]{}#,"').strip() for prompt in script] for script in scripts]
    scripts = [[f"x{prompt}x".replace("[", "").replace("]", "") for prompt in script] for script in scripts]
    lines = [lines_of[form](script) for script in scripts]
    if blank:
        lines = [line for each in lines for line in ("", each)]
    name = "form.JSONL" if form == ".jsonl" else "form.txt"
    (there / name).write_bytes(("\ufeff" * blank + ("\r\n" if end else "\n").join(lines)).encode())
    if scripts:
        assert all_prompts(there / name) == [" | ".join(script) for script in scripts]
    lines.insert(min(at, len(lines)), spoil)
    (there / name).write_text("\n".join(lines))
    refused(lambda: all_prompts(there / name), there / name, ", line ")
    if suffix:
        (there / f"form{suffix}").write_text("\n".join(lines))
        refused(lambda: all_prompts(there / f"form{suffix}"), f"form{suffix}", "expected a .txt file")


no_json = st.text("[]:,'1ae ", min_size=1, max_size=12).map("{".__add__)
bars = st.sampled_from(["", "100%\r", "\rloading: 3/3\r", "[INFO] ", "\x1b[2K", "it/s]\r"])


@cases(500)
@given(
    before=bars, after=bars, scores=st.lists(st.floats(-9, 9), max_size=3),
    wrong=no_json | st.sampled_from(['{"id": 0', "{'id': 0, 'scores': [1]}", '{"scores": [1', "{]", '{"error": }']),
)  # fmt: skip
def test_kind_answers_of_workers_are_found_or_named(before, after, scores, wrong):
    line = before + json.dumps({"id": 0, "scores": scores}) + after
    found = [answer for answer in map(answer_in, line.split("\r")) if answer]
    assert found == [{"id": 0, "scores": scores}]
    for noise in (before, after, "Loading 100%", "", "nan", "3"):
        assert not any(map(answer_in, noise.split("\r")))
    refused(lambda: [answer_in(part) for part in ("\r" * bool(after) + wrong).split("\r")])


@cases(250)
@given(
    alphas=st.dictionaries(st.sampled_from(["config", "state", "header", "tensors", "kohya"]), st.sampled_from([4, 8]),
                           min_size=1),
    last=st.sampled_from([0.0, 3.0]), odd=st.sampled_from(["x", "", "0", "-1", "nan", "inf", "[1]"]),
)  # fmt: skip
def test_kind_scales_are_read_from_everywhere_or_refused(alphas, last, odd, there):
    folder = there / "scales"
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "state.json"):
        (folder / name).unlink(missing_ok=True)
    tensors, header = lora_tensors(), {}
    for place, alpha in alphas.items():
        if place == "config":
            (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        elif place == "state":
            (folder / "state.json").write_text(json.dumps({"config": {"rank": 2, "lora_alpha": alpha}}))
        elif place == "tensors":
            tensors[f"{BLOCK}.alpha"] = torch.tensor(float(alpha))
        else:
            header["lora_alpha" if place == "header" else "ss_network_alpha"] = str(alpha)
    path = folder / "a.safetensors"
    path.write_bytes(save(tensors, header or None))
    if len({*alphas.values()}) == 1 or last:
        assert read_lora(path, last).alpha == (last or next(iter(alphas.values())))
    else:
        refused(lambda: read_lora(path), path, "4.0, 8.0", "--lora_alpha")
    path.write_bytes(save(tensors, {"lora_alpha": odd}))
    refused(lambda: read_lora(path), path, "alpha")


@cases(300)
@given(
    names=st.sets(st.sampled_from(["generator", "generator_ema", "model", "critic", "ema", "optimizer"]), min_size=1),
    which=st.sampled_from(["", "generator", "generator_ema", "critic", "nowhere"]),
)  # fmt: skip
def test_kind_of_several_weights_the_named_or_the_average_is_taken(names, which):
    content = {name: {"a": torch.full((2,), float(k))} for k, name in enumerate(sorted(names))} | {"step": 3}
    wanted = which or next((name for name in GENERATORS if name in names), "")
    if wanted in names:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert tensors_of(content, GENERATORS, which) == {"a": content[wanted]["a"]}
        assert (wanted in said.getvalue()) == (len(names) > 1 and not which)
    refused(lambda: tensors_of(content, GENERATORS, "nowhere"), "nowhere")


@cases(250)
@given(
    where=st.sampled_from(["lora", "adapter", "pixels", "scores", "latents"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    at=st.integers(0, 47),
)
def test_kind_numbers_that_are_not_finite_pass_no_border(where, value, at, adapted, there):
    """At every position of what is handed on."""

    def spoil(tensor):
        spoilt = tensor.clone()
        spoilt.view(-1)[at % tensor.numel()] = value
        return spoilt

    pipeline, config, weights = adapted
    if where == "lora":
        key = sorted(lora_tensors())[at % 2]
        (there / "nan.safetensors").write_bytes(save(lora_tensors() | {key: spoil(lora_tensors()[key])}))
        return refused(lambda: read_lora(there / "nan.safetensors"), "nan.safetensors", "finite")
    if where == "adapter":
        state, folder = load(weights), there / "load"
        key = sorted(state)[at % len(state)]
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(save(state | {key: spoil(state[key])}))
        return refused(lambda: adapters.load_adapter(pipeline, folder), folder, key)
    scored = []
    mixture = Mixture({"it": lambda videos, prompts: scored.append(1) or spoil(torch.zeros(N))}, {"it": 1.0})
    if where == "scores":
        return refused(lambda: mixture(VIDEOS, ["", ""]), "reward 'it' must give 2 finite numbers")
    if where == "latents":
        broken = lambda *args: replace(STREAM, x0=(spoil(torch.zeros(1, 3, 8, 4, 4)),))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvpo_min.pipeline.generate", broken)
            return refused(lambda: next(sample(pipeline, ["a disc"], 3)), "latents", error=FloatingPointError)
    for reward in (mixture, MotionQuality(None)):
        refused(lambda reward=reward: reward(spoil(VIDEOS), ["", ""]), "pixels", error=FloatingPointError)
    assert not scored


@cases(150)
@given(wide=st.integers(2, 9), deep=st.integers(2, 30), kind=st.sampled_from(["list", "mapping", "self"]))
def test_kind_small_files_that_would_become_huge_are_refused(wide, deep, kind, there):
    path = there / "bomb.yaml"
    parts = ["a0: &a0 [x, x]" if kind != "mapping" else "a0: &a0 {b: x}"]
    for k in range(1, deep):
        refs = [f"*a{k - 1}"] * wide
        inner = (
            f"[{', '.join(refs)}]"
            if kind != "mapping"
            else f"{{{', '.join(f'c{n}: {r}' for n, r in enumerate(refs))}}}"
        )
        parts.append(f"a{k}: &a{k} {inner}")
    path.write_text("a: &a [*a]\n" if kind == "self" else "\n".join(parts))
    refused(lambda: cli_options.check_yaml(str(path), ["seed"]), path)
    claimed_size = 2 ** (20 + deep)
    (there / "huge.safetensors").write_bytes(claimed_size.to_bytes(8, "little") + b'{"a": 1}' * wide)
    refused(lambda: read_file(there / "huge.safetensors"), "huge.safetensors")


@cases(200)
@given(
    name=st.sampled_from(["WORLD_SIZE", "LOCAL_RANK", "RANK"]),
    value=st.sampled_from(["", "two", "-1", "1.5", "1e3", "٣", " 2", "0x2", "None"]),
)
def test_kind_environment_variables_are_named(name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        refused(lambda: number_in_environment(name), name, repr(value))


@cases(150)
@given(
    content=st.binary(max_size=80) | st.sampled_from([b"elsewhere 12\n", b"elsewhere x", b"\xff\xfe 3"]),
    age=st.integers(0, 600), option=st.sampled_from(["output_dir", "model", "prompts"]), user=words,
)  # fmt: skip
def test_kind_claims_and_homes(content, age, option, user, there):
    """Whatever is in a claim: it counts, or it does not, and the folder is free again afterwards."""
    folder = there / "claimed"
    folder.mkdir(exist_ok=True)
    (folder / CLAIM).write_bytes(content)
    os.utime(folder / CLAIM, (time.time() - age,) * 2)
    with contextlib.suppress(FileExistsError), claimed(folder):
        refused(lambda: claimed(folder).__enter__(), folder, "is in use", error=FileExistsError)
    if age > STALE + 5 or b" " not in content.strip():
        assert not (folder / CLAIM).exists()
    (folder / CLAIM).unlink(missing_ok=True)
    home = cli_options.expanded(option, "~/" + user)
    assert home.startswith("/") and home.endswith(user)
    refused(lambda: cli_options.expanded(option, "~nobody-of-that-name/" + user), option, "~nobody-of-that-name")


# ------------------------------------------------------------------------------------------------------------- rewards

N = 2
STREAM = Stream()
VIDEOS = torch.zeros(N, 4, 3, 8, 8)
liking_nothing = functools.partial(VisualQuality, like=())
wrong_scores = (
    st.sampled_from(
        [None, "x", object(), {}, [[1], [1, 2]], ["a", "b"], 0.5, [], [1.0], torch.zeros(N, 1), torch.zeros(1, N),
         torch.zeros(3), torch.zeros(()), torch.zeros(N, dtype=torch.complex64), [None, 1], b"ab", {1, 2}]
    )
    | st.lists(st.floats(), min_size=N, max_size=N).filter(lambda s: not all(map(math.isfinite, s)))
    | st.lists(st.floats(-1, 1), max_size=6).filter(lambda s: len(s) != N)
    | st.lists(st.integers(0, 3), min_size=0, max_size=4).filter(lambda s: s != [N]).map(torch.zeros)
)  # fmt: skip


@cases(200)
@given(given_=wrong_scores, name=st.sampled_from(["vq", "mine"]))
def test_rewards_of_the_wrong_shape_or_kind_are_named(given_, name):
    mixture = Mixture({name: lambda videos, prompts: given_}, {name: 1.0})
    refused(lambda: mixture(VIDEOS, ["", ""]), f"reward '{name}' must give {N} finite numbers, got")


@cases(150)
@given(
    shape=st.lists(st.integers(0, 4), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.uint8, torch.int64, torch.bool, torch.complex64]),
    n_prompts=st.integers(0, 3),
    reward=st.sampled_from([liking_nothing, MotionQuality, TextAlignment]),
)
def test_videos_of_the_wrong_shape_or_kind_are_refused(shape, dtype, n_prompts, reward):
    good = len(shape) == 5 and shape[2] == 3 and 0 not in shape and shape[0] == n_prompts
    if good and dtype == torch.float32:
        return check_videos(torch.zeros(shape), ["a"] * n_prompts)
    refused(lambda: reward(None)(torch.zeros(shape, dtype=dtype), ["a"] * n_prompts), "a reward takes")


@cases(30)
@given(
    prompts=st.sampled_from(["ab", [1, 2], [None, "a"], ("a", 2), [["a"], ["b"]]]),
    reward=st.sampled_from([liking_nothing, TextAlignment]),
)
def test_prompts_of_the_wrong_kind_are_refused(prompts, reward):
    refused(lambda: reward(None)(VIDEOS, prompts), "a reward takes a list of prompts")


@cases(50)
@given(weight=st.sampled_from([None, "1", math.nan, math.inf, -math.inf, [1], 1j]), name=words)
def test_weights_of_the_wrong_kind_are_named(weight, name):
    refused(lambda: Mixture({name: None}, {name: weight}), f"the weight of reward '{name}' must be a finite number")


@cases(30)
@given(frames=st.integers(0, 2), n=st.integers(0, 2))
def test_a_clip_too_short_to_score_is_refused(frames, n, adapted):
    constant = Mixture({"it": lambda videos, prompts: torch.zeros(len(videos))}, {"it": 1.0})
    refused(lambda: score(adapted[0], constant, torch.zeros(n, frames, 3, 8, 8), ["a disc"] * n, 21), "3 frames")


# ---------------------------------------------------------------------------------------------------- forks and windows

WINDOW = routing.Window()


@cases(100)
@given(
    name=st.sampled_from(["sink", "past", "block", "history"]),
    value=st.integers(max_value=-1) | st.sampled_from([None, "3", 2.5, math.nan, []]) | st.floats(),
)
def test_windows_of_impossible_sizes(name, value):
    refused(lambda: routing.Window(**{name: value}), f"Window.{name} must be")


@cases(100)
@given(past=st.integers(1, 40), sink=st.integers(0, 20), short=st.integers(1, 5))
def test_windows_that_their_history_cannot_hold(past, sink, short):
    refused(lambda: routing.Window(sink, past, 3, sink + past - short), "Window.history must be at least")


@cases(100)
@given(
    fork=st.integers(-5, 60), nearest=st.integers(-3, 9), perturb_num_blocks=st.integers(-2, 6), gap=st.integers(-3, 3),
)  # fmt: skip
def test_pools_hold_past_frames_or_are_refused(fork, nearest, perturb_num_blocks, gap):
    if 0 <= nearest < WINDOW.past and fork >= 0 and perturb_num_blocks >= 1 and gap >= 0:
        frames = routing.pool(fork, WINDOW, nearest, perturb_num_blocks, gap)
        return all(WINDOW.sink <= f < fork - nearest - gap for f in frames) or pytest.fail(f"{frames}")
    refused(lambda: routing.pool(fork, WINDOW, nearest, perturb_num_blocks, gap), "got")


@cases(60)
@given(
    total=st.integers(-3, 30),
    perturb_num_blocks=st.integers(4, 9),
    branches=st.integers(1, 3),
    nearest=st.integers(0, 5),
)
def test_videos_in_which_no_block_can_fork(total, perturb_num_blocks, branches, nearest):
    generator = torch.Generator().manual_seed(0)
    refused(lambda: routing.plan(total, WINDOW, nearest, perturb_num_blocks, branches, generator),
            "no block can fork" if total > 0 else "at least 1 frame")  # fmt: skip


@cases(150)
@given(
    start=st.integers(9, 60),
    routes=st.lists(st.lists(st.integers(-3, 70), min_size=1, max_size=5), min_size=1, max_size=3),
    nearest=st.integers(-1, 6),
)
def test_frames_that_a_branch_cannot_read_are_refused(start, routes, nearest):
    width = min(map(len, routes))
    routes = [row[:width] for row in routes]
    pool = range(WINDOW.sink, start - nearest)
    good = all(f in pool for row in routes for f in row) and all(len(set(row)) == width for row in routes)
    if good and nearest >= 0:
        frames = routing.branch_frames(torch.tensor(routes), start, WINDOW, nearest)
        assert frames.max() < start and frames.shape[1] == WINDOW.sink + width + nearest
        return
    refused(lambda: routing.branch_frames(torch.tensor(routes), start, WINDOW, nearest), "got")


@cases(40)
@given(
    routes=st.sampled_from([torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(2, 3), torch.tensor([3]),
                            torch.zeros(1, 1, 1, dtype=torch.long)]),
    start=st.integers(9, 30),
)  # fmt: skip
def test_routes_of_the_wrong_shape_or_kind(routes, start):
    refused(lambda: routing.branch_frames(routes, start, WINDOW, 2), "routes must be frame numbers [G, n_routed]")


@cases(60)
@given(frames=st.lists(st.integers(-20, 40), min_size=1, max_size=6), start=st.integers(0, 20))
def test_masks_of_frames_that_are_not_past(frames, start):
    if all(0 <= f < start for f in frames):
        return routing.route_mask(torch.tensor([frames]), start, WINDOW, 2)
    refused(lambda: routing.route_mask(torch.tensor([frames]), start, WINDOW, 2), f"at frame {start} can read frames")


class Silent:
    """A backbone that must not be asked: what is wrong is found before."""

    device = "cpu"

    def velocity(self, *args):
        raise AssertionError("the model was asked")

    encode = velocity


SAMPLER = Sampler(schedule(), WINDOW, switches=(12,))
TEXTS = [torch.zeros(1, 2, 4)] * 2


@cases(120)
@given(
    stop=st.integers(-6, 40), made=st.integers(0, 4), blocks=st.integers(0, 10), texts=st.integers(0, 2),
)  # fmt: skip
def test_videos_that_cannot_be_made_are_refused_before_the_first_block(stop, made, blocks, texts):
    noise = torch.zeros(1, blocks, 4, 3, 1, 2, 2)
    stream = Stream(tuple(torch.zeros(1, 3, 1, 2, 2) for _ in range(made)), KVHistory(), 3 * made, int(made > 4))
    fits = stop % 3 == 0 and 3 * made <= stop <= 3 * blocks
    if fits and (stop == 3 * made or texts > (stop - 3 >= 12)):
        return
    refused(lambda: generate(Silent(), stream, TEXTS[:texts], noise, stop, SAMPLER), f"{stop}")


@cases(80)
@given(fork_=st.integers(-3, 60), until=st.integers(-3, 60), stop=st.integers(-3, 60))
def test_forks_out_of_range_are_refused(fork_, until, stop):
    if 0 <= fork_ < until <= stop:
        stop = fork_ - 1
    plan = routing.Plan(fork_, range(0), torch.zeros(2, 4, dtype=torch.long), 5)
    noise = torch.zeros(1, 20, 4, 3, 1, 2, 2)
    refused(
        lambda: fork(Silent(), TEXTS, noise, plan, stop, until, SAMPLER, 2), "expected 0 <= fork < record_until <= stop"
    )


def test_words_must_not_change_inside_the_trajectory():
    """Its replay is under the words of the fork. At its ends they may change."""
    plan = routing.Plan(21, range(3, 20), torch.zeros(2, 4, dtype=torch.long), 5)
    noise, sampler = torch.zeros(1, 20, 4, 3, 1, 2, 2), replace(SAMPLER, switches=(30,))
    match = "change at frame 30, inside the trajectory [21, 39)"
    refused(lambda: fork(Silent(), TEXTS, noise, plan, 39, 39, sampler, 2), match)


@pytest.fixture(scope="module")
def rollout(adapted):
    """One group of a real, tiny model."""
    pipeline, generator = adapted[0], torch.Generator().manual_seed(0)
    plan = routing.plan(39, WINDOW, 2, 1, 2, generator)
    noise = draw_noise(13, 4, (3, *pipeline.latent_shape), generator)
    sampler = Sampler(pipeline.sigmas, WINDOW)
    made = fork(pipeline.backbone, [pipeline.embed(["a disc"])], noise, plan, plan.fork + 3, plan.fork + 3, sampler, 2)
    return pipeline.backbone, made, sampler


@cases(100)
@given(
    grad_steps=st.integers(-3, 8),
    branches=st.integers(-2, 6),
    context=st.sampled_from(["stored", "own", "", "other", None]),
)
def test_replays_that_do_not_fit_are_refused(grad_steps, branches, context, rollout):
    _, made, sampler = rollout
    if 0 <= grad_steps <= 4 and 1 <= branches <= 3 and context in ("stored", "own"):
        context = "neither"
    call = functools.partial(replay, Silent(), made, sampler, grad_steps, context=context, branches=branches)
    refused(call, "context must be", "grad_steps 0..4", "branches 1..3")


@cases(50)
@given(batch=st.integers(-3, 3), n_steps=st.integers(-3, 9))
def test_pieces_that_do_not_fit_are_refused(batch, n_steps, rollout):
    _, made, sampler = rollout
    if batch >= 1 and 0 <= n_steps <= 4:
        batch = 0
    refused(
        lambda: next(pieces(Silent(), made, sampler, batch, n_steps)),
        "replay_batch must be at least 1 and n_steps 0..4",
    )


@cases(60)
@given(held=st.sets(st.integers(0, 12), max_size=6), asked=st.lists(st.integers(0, 15), min_size=1, max_size=5))
def test_frames_that_a_history_does_not_hold_are_named(held, asked):
    history = KVHistory({f: torch.zeros(1, 2, 1, 1, 1, 1) for f in held})
    missing = sorted(set(asked) - held)
    if missing:
        refused(lambda: history.read(torch.tensor(asked)), f"frames {missing} are not in the history", error=KeyError)
    else:
        assert history.read(torch.tensor(asked)).shape[3] == len(asked)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model(there, make_transformer):
    """The files of a pocket model."""
    from kvpo_min.pocket.distill import new_autoencoder

    folder = there / "model"
    new_autoencoder().save_pretrained(folder / "autoencoder")
    make_transformer().save_pretrained(folder / "student")
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WEIGHTS = "diffusion_pytorch_model.safetensors"


@cases(60)
@given(data=st.data())
def test_models_that_are_damaged_or_do_not_belong_together(data, model, there):
    from safetensors.torch import load, save

    part = data.draw(st.sampled_from(["autoencoder", "student"]))
    name = Path(part, data.draw(st.sampled_from(["config.json", WEIGHTS])))
    damage = data.draw(st.sampled_from(["cut", "drop", "add", "shape", "absent", "empty"]))
    content = model[name]
    if damage == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 3))]
    elif damage in ("absent", "empty"):
        content = b""
    elif name.name == WEIGHTS:
        state = load(content)
        key = data.draw(st.sampled_from(sorted(state)))
        if damage == "drop":
            del state[key]
        elif damage == "add":
            state[key + "x"] = torch.zeros(1)
        else:
            state[key] = torch.zeros(1, 7)
        content = save(state)
    else:
        config = json.loads(content)
        sizes = {
            "autoencoder": ["latent_channels"],
            "student": ["in_channels", "out_channels", "text_dim", "num_layers"],
        }
        key = data.draw(st.sampled_from(sizes[part]))
        content = json.dumps(config | {key: data.draw(st.sampled_from([0, 3, -1, "x", None, [1]]))}).encode()
    folder = there / "damaged"
    for path, whole in model.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if path == name else whole)
        if path == name and damage == "absent":
            (folder / path).unlink()
    refused(lambda: pocket.load_model(str(folder)), folder, error=(ValueError, FileNotFoundError))


# --------------------------------------------------------------------------------------------------------------- count


def test_kind_cases_were_so_many(capsys):
    """`HYPOTHESIS_PROFILE=many pytest -n 0 tests/test_bad_input.py -k test_kind`: 10,000"""
    kinds = {name for name in TESTS if name.startswith("test_kind")}
    if kinds - set(CASES):
        pytest.skip("counts only where all kinds are run")
    total = sum(CASES[name] for name in kinds)
    with capsys.disabled():
        print(f"\n{total} cases of {len(kinds)} kinds")
    assert total >= 1700 * TIMES  # hypothesis draws fewer where it finds no others


def test_how_many_cases_there_were(capsys):
    """The last test of the file: needs all others before it."""
    missing = TESTS - set(CASES)
    if missing:
        pytest.skip(f"counts only where the whole file is run: {len(missing)} tests were not")
    total = CASES.total()
    with capsys.disabled():
        print(f"\n{total} cases of wrong input in {len(CASES)} tests")
    assert all(CASES.values()), CASES
    assert total >= 2000 * TIMES
