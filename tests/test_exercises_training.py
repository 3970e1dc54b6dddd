"""The exercises of notebooks 06 to 09: right answers pass, plausible wrong ones are told what is wrong."""

import math

import pytest
import torch

from kvpo_min.grpo import clipped_objective
from teach import (
    StubVideoModel,
    backbone_faults,
    check_06_advantage,
    check_06_best,
    check_06_weight,
    check_07,
    check_07_gain,
    check_07_kl,
    check_07_slope,
    check_08,
    check_08_alarm,
    check_08_diagnose,
    check_08_paired,
    check_09,
    check_10_alarm,
    check_10_most,
    check_10_names,
    entropy_curves,
    symptoms,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------- 06 rewards, and a hack

VQ = torch.tensor([[0.9, 0.5, 0.4], [0.5, 0.1, 0.0], [0.7, 0.6, 0.0]])  # waits in, settles in
TA = torch.tensor([[0.5, 0.6, 0.6], [0.6, 0.7, 0.7], [0.6, 0.9, 0.9]])


def test_06_the_favourite():
    names = ("beach", "night", "snow")
    assert check_06_best(("beach", "beach"), VQ, names)
    for answer, says in (
        (("snow", "snow"), "another film 0.90"), (("snow", "beach"), "what the words say"),
        (None, "Give two scenes"), (("beach", "moon"), "Give two scenes"), ("beach", "Give two scenes"),
    ):  # fmt: skip
        verdict = check_06_best(answer, VQ, names)
        assert not verdict and says in verdict.says, answer


def test_06_advantages_over_the_anchor():
    r, anchor = torch.tensor([0.7, 0.2, 0.5]), 0.4
    every = torch.tensor([*r, anchor])
    assert check_06_advantage((r - anchor) / every.std(), r, anchor)
    assert check_06_advantage([round(x, 2) for x in ((r - anchor) / every.std()).tolist()], r, anchor)
    for answer, says in (
        (None, "3 numbers"), ([1.0], "shape [1]"), ("much", "got 'much'"),
        ((r - r.mean()) / r.std(), "measures from the anchor"), ((r - anchor) / r.std(), "and the anchor together"),
        ((r - anchor) / every.std(correction=0), "unbiased"), (r - anchor, "divide by their spread"),
        ((anchor - r) / every.std(), "sign"), (r, "Subtract"),
    ):  # fmt: skip
        verdict = check_06_advantage(answer, r, anchor)
        assert not verdict and says in verdict.says, (answer, verdict)


def test_06_the_weight_at_which_cheating_stops():
    turns = (0.9 - 0.6) / (0.9 - 0.5)  # from row 0, where .9 is VQ's best, to row 2
    assert check_06_weight(turns, VQ, TA, 2) and check_06_weight(0.8, VQ, TA, 2)
    for answer, says in (
        (0.5, "cheating still pays"), (2.0, "less would do"), (None, "one number"), ("all", "one number"),
    ):  # fmt: skip
        verdict = check_06_weight(answer, VQ, TA, 2)
        assert not verdict and says in verdict.says, answer


# -------------------------------------------------------------------------------------------- 07 gain, slope, KL


def test_07_who_gains():
    E, A = torch.tensor([1.0, 1.2, 1.4]), torch.tensor([-1.0, 2.0, 0.5])
    assert check_07_gain("B", E, A, 0.3) and check_07_gain("b", E, A, 0.3)
    for answer, says in (
        ("A", "Being likely"),
        ("C", "another one gains more"),
        ("D", "ABC"),
        (1, "ABC"),
        (None, "ABC"),
    ):
        verdict = check_07_gain(answer, E, A, 0.3)
        assert not verdict and says in verdict.says, answer


def slope(A, p, tau):
    return (A - p * A.sum()) / (len(A) * tau)


WRONG_SLOPES = {
    "sign is wrong": lambda A, p, tau: -slope(A, p, tau),
    "divide by G": lambda A, p, tau: len(A) * slope(A, p, tau),
    "divide by tau": lambda A, p, tau: tau * slope(A, p, tau),
    "the pull alone": lambda A, p, tau: A / (len(A) * tau),
    "not its mean": lambda A, p, tau: (A - p * A.mean()) / (len(A) * tau),
    "p, not 1 / G": lambda A, p, tau: (A - A.mean()) / (len(A) * tau),
    "shape []": lambda A, p, tau: slope(A, p, tau).sum(),
    "returns nothing": lambda A, p, tau: None,
    "raised": lambda A: A,
    "autograd [": lambda A, p, tau: p,
}


@pytest.mark.parametrize("says", WRONG_SLOPES)
def test_07_the_slope(says):
    assert check_07_slope(slope)
    verdict = check_07_slope(WRONG_SLOPES[says])
    assert not verdict and says in verdict.says, verdict


def kl(log_p, other):
    return (log_p.exp() * (log_p - other)).sum()


WRONG_KLS = {
    "other way round": lambda a, b: kl(b, a),
    "sign is wrong": lambda a, b: -kl(a, b),
    "do not average": lambda a, b: kl(a, b) / len(a),
    "by its probability": lambda a, b: (a - b).sum(),
    "returns nothing": lambda a, b: None,
    "raised": lambda a, b: a - b,
    "a loop over branches": lambda a, b: 2 * kl(a, b),
}


@pytest.mark.parametrize("says", WRONG_KLS)
def test_07_the_kl(says):
    assert check_07_kl(kl) and check_07_kl(lambda a, b: kl(a, b).item())
    verdict = check_07_kl(WRONG_KLS[says])
    assert not verdict and says in verdict.says, verdict


# ------------------------------------------------------------------------------------------------ 07 clipped objective


def ratios(log_p, log_p_old, low, high):
    r = (log_p - log_p_old).exp()
    return r, r.clamp(1 - low, 1 + high)


def objective(log_p, log_p_old, A, low, high):
    r, c = ratios(log_p, log_p_old, low, high)
    return -torch.minimum(r * A, c * A).mean()


def test_07_accepts_right_answers():
    assert check_07(objective)
    assert check_07(lambda log_p, old, A, low, high: clipped_objective(log_p, old, A, low, high)[0])  # the package's


def half_detached(log_p, old, A, low, high):
    return objective(log_p.detach(), old, A, low, high) + 0 * log_p.sum()


WRONG_07 = {
    "not clipped": lambda lp, old, A, low, high: -((lp - old).exp() * A).mean(),
    "only the clipped": lambda lp, old, A, low, high: -(ratios(lp, old, low, high)[1] * A).mean(),
    "larger counts": lambda lp, old, A, low, high: -torch.maximum(*(r * A for r in ratios(lp, old, low, high))).mean(),
    "sign is wrong": lambda *args: -objective(*args),
    "sum over branches": lambda *args: 6 * objective(*args),
    "old over new": lambda lp, old, A, low, high: -torch.minimum(*(r * A for r in ratios(old, lp, low, high))).mean(),
    "not to 1 - clip_range_low": lambda lp, old, A, low, high: (
        -torch.minimum((lp - old).exp() * A, (lp - old).exp().clamp(low, high) * A).mean()
    ),
    "this is a tuple of": clipped_objective,
    "swapped": lambda lp, old, A, low, high: objective(lp, old, A, high, low),
    "No gradient": lambda lp, *args: objective(lp.detach(), *args),
    "the gradient is not": half_detached,
    "shape [6]": lambda lp, old, A, low, high: -torch.minimum(*(r * A for r in ratios(lp, old, low, high))),
    "returns nothing": lambda *args: None,
    "raised": lambda lp: lp,
    "a loop over branches": lambda *args: 1.3 * objective(*args),
}


@pytest.mark.parametrize("says", WRONG_07)
def test_07_says_what_is_wrong(says):
    verdict = check_07(WRONG_07[says])
    assert not verdict and says in verdict.says, verdict


# ------------------------------------------------------------------------------------------------------ 08 a stop rule


def stop(entropies, num_generations, patience=5, share=0.12):
    last = entropies[-patience:]
    return len(last) == patience and max(last) < share * math.log(num_generations)


def test_08_accepts_right_answers():
    recorded = [1.9, 0.05, 1.7, 1.2] * 10
    assert check_08(stop) and check_08(stop, recorded, 8)

    def average(entropies, g):  # another rule
        return len(entropies) >= 6 and sum(entropies[-6:]) / 6 < 0.15 * math.log(g)

    assert check_08(average)

    def says_only_when_to_stop(entropies, g):  # without else: None means go on
        if stop(entropies, g):
            return True

    assert check_08(says_only_when_to_stop)


WRONG_08 = {
    "'dips'": lambda e, g: e[-1] < 0.12 * math.log(g),  # one low value is no collapse
    "'low but alive'": lambda e, g: len(e) >= 5 and max(e[-5:]) < 0.7 * math.log(g),
    "'collapse' is dead": lambda e, g: False,
    "only after update": lambda e, g: len(e) >= 15 and max(e[-15:]) < 0.12 * math.log(g),
    "With 2 branches": lambda e, g: len(e) >= 5 and max(e[-5:]) < 0.3,  # nats, whatever the number of branches
    "returns nothing": lambda e, g: None,
    "raised": lambda e: True,
}


@pytest.mark.parametrize("nats", [0.05 * k for k in range(1, 14)])
def test_08_no_fixed_number_of_nats_passes(nats):
    assert not check_08(lambda e, g: len(e) >= 5 and max(e[-5:]) < nats)


@pytest.mark.parametrize("says", WRONG_08)
def test_08_says_what_is_wrong(says):
    verdict = check_08(WRONG_08[says])
    assert not verdict and says in verdict.says, verdict


def test_08_looks_at_the_recorded_run():
    verdict = check_08(stop, [2.0] * 5 + [0.01] * 6, 8)
    assert not verdict and "recorded run after update 9" in verdict.says


def test_made_up_entropies_are_entropies():
    for g in (2, 8, 64):
        for name, curve in entropy_curves(g).items():
            assert all(0 <= value <= math.log(g) for value in curve), name
        curves = entropy_curves(g)
        assert max(curves["collapse"][31:]) < 0.1 * math.log(g) < min(curves["healthy"])
        assert sum(value < 0.1 * math.log(g) for value in curves["dips"]) == 2


# ----------------------------------------------------------------------------- 08 pairs, diagnoses, an alarm


def error(before, after):
    change = after - before
    return change.std() / len(change) ** 0.5


WRONG_ERRORS = {
    "two sets of different prompts": lambda b, a: ((b.var() + a.var()) / len(a)) ** 0.5,
    "smaller by the root": lambda b, a: (a - b).std(),
    "root of N, not by N": lambda b, a: (a - b).std() / len(a),
    "the mean change itself": lambda b, a: (a - b).mean(),
    "returns nothing": lambda b, a: None,
    "raised": lambda b: b,
    "expected": lambda b, a: 1.0,
}


@pytest.mark.parametrize("says", WRONG_ERRORS)
def test_08_a_fair_comparison(says):
    assert check_08_paired(error) and check_08_paired(lambda b, a: (a - b).std(correction=0) / len(a) ** 0.5)
    verdict = check_08_paired(WRONG_ERRORS[says])
    assert not verdict and says in verdict.says, verdict


def recorded_run(reward, coherent, entropy):
    """Twelve updates whose numbers go from the first to the second of each pair, measured after every third."""

    def at(pair, t):
        return pair[0] + (pair[1] - pair[0]) * t / 12

    def measured(t, key):
        return {f"{key}/reward": at(reward, t), f"{key}/coherent": at(coherent, t), f"{key}/journey": 0.9}

    lines = [{"step": t, "entropy": at(entropy, t)} for t in range(12)]
    lines[0] |= measured(0, "eval0")
    for t in (3, 6, 9, 12):
        lines[t - 1] |= measured(t, "eval")
    return lines


def test_08_diagnoses():
    runs = {
        "P": recorded_run((1.5, 1.8), (0.9, 0.4), (1.8, 1.8)),
        "Q": recorded_run((1.5, 1.5), (0.9, 0.9), (0.01, 0.01)),
        "R": recorded_run((1.5, 1.8), (0.9, 0.88), (1.8, 1.7)),
    }
    right = {"P": "hacked", "Q": "dead", "R": "healthy"}
    assert check_08_diagnose(right, runs, 8)
    for run, wrong, says in (
        ("P", "healthy", "the judge sees falls"), ("Q", "healthy", "near 0"), ("R", "hacked", "judge's shares stay"),
    ):  # fmt: skip
        verdict = check_08_diagnose(right | {run: wrong}, runs, 8)
        assert not verdict and says in verdict.says
    for answer in (None, {"P": "hacked"}, right | {"P": None}, right | {"P": ["dead"]}):
        assert "Give every run" in check_08_diagnose(answer, runs, 8).says


def alarm(rewards, coherent):
    return rewards[-1] > rewards[0] + 0.05 and coherent[-1] < coherent[0] - 0.1


WRONG_ALARMS = {
    "'healthy'": lambda r, c: c[-1] < c[0],
    "'unlucky'": lambda r, c: c[-1] < c[0] - 0.1,
    "'weak from the start'": lambda r, c: r[-1] > r[0] and c[-1] < 0.7,
    "does not ring": lambda r, c: r[-1] > r[0] + 1.0,
    "or never rings": lambda r, c: None,
    "raised": lambda r: True,
}


@pytest.mark.parametrize("says", WRONG_ALARMS)
def test_08_an_alarm(says):
    assert check_08_alarm(alarm)
    verdict = check_08_alarm(WRONG_ALARMS[says])
    assert not verdict and says in verdict.says, verdict


# ------------------------------------------------------------------------------------------------------- 09 a Backbone


class Adapter:
    def __init__(self, model):
        self.model = model

    def velocity(self, x, sigma, start, text, kv):
        return (x - self.clean(x, 1000 * sigma, start, text, kv)) / sigma[:, None, None, None, None]

    def clean(self, x, timestep, start, text, kv):
        b = len(x)
        memory = x.new_zeros(b, 0, self.model.width) if kv is None else kv[0, 0, :, :, 0].expand(b, -1, -1)
        first = torch.as_tensor(start).expand(b)
        return self.model(x.transpose(1, 2), timestep, first, text.expand(b, -1, -1), memory).transpose(1, 2)

    def encode(self, x0, start, text, kv):
        b = len(x0)
        rows = self.model.remember(x0.transpose(1, 2), torch.as_tensor(start).expand(b), text.expand(b, -1, -1))
        return torch.stack([rows, rows])[None, :, :, :, None, None]


class WrongSign(Adapter):
    def velocity(self, *args):
        return -super().velocity(*args)


class Clean(Adapter):
    def velocity(self, x, sigma, start, text, kv):
        return self.clean(x, 1000 * sigma, start, text, kv)


class SigmaForTime(Adapter):
    def velocity(self, x, sigma, start, text, kv):
        return (x - self.clean(x, sigma, start, text, kv)) / sigma[:, None, None, None, None]


class Forgetful(Adapter):
    def velocity(self, x, sigma, start, text, kv):
        return super().velocity(x, sigma, start, text, None)


class NumberOnly(Adapter):
    def clean(self, x, timestep, start, text, kv):
        return super().clean(x, timestep, torch.full((len(x),), start), text, kv)


class Timeless(Adapter):
    """Remembers every block as if it were the first."""

    def encode(self, x0, start, text, kv):
        return super().encode(x0, 0, text, kv)


class Flat(Adapter):
    def encode(self, *args):
        return super().encode(*args).squeeze()


class Writes(Adapter):
    def velocity(self, x, sigma, start, text, kv):
        if kv is not None:
            kv += 1
        return super().velocity(x, sigma, start, text, kv)


class BatchOfOne(Adapter):
    """Forgets to expand a history that serves the whole batch."""

    def clean(self, x, timestep, start, text, kv):
        if kv is not None and kv.shape[2] != len(x):
            raise RuntimeError("kv has another batch than x")
        return super().clean(x, timestep, start, text, kv)


class Mixes(Adapter):
    def velocity(self, *args):
        return super().velocity(*args) + super().velocity(*args).mean()


WRONG_09 = {
    "The sign is wrong": WrongSign, "This is the clean video": Clean, "timestep 1000 sigma": SigmaForTime,
    "does not look at kv": Forgetful, "raised": NumberOnly, "With a history": Timeless, "must give [layers": Flat,
    "read only": Writes, "another batch": BatchOfOne, "must not see each other": Mixes,
}  # fmt: skip


def test_09_accepts_the_right_adapter():
    assert check_09(Adapter), check_09(Adapter)


@pytest.mark.parametrize("says", WRONG_09)
def test_09_says_what_is_wrong(says):
    verdict = check_09(WRONG_09[says])
    assert not verdict and says in verdict.says, verdict


def test_09_untouched():
    class Untouched:
        def __init__(self, model):
            pass

        def velocity(self, *args): ...

        def encode(self, *args): ...

    assert "returns nothing" in check_09(Untouched).says


def test_the_real_backbone_has_no_faults(make_backbone):
    from kvpo_min.pocket import world

    backbone = make_backbone()
    text = world.embed(["a red disc moves left"])
    assert backbone_faults(backbone, (8, 4, 4), text) == ""
    velocity = backbone.velocity
    backbone.velocity = lambda x, sigma, start, text, kv: velocity(x, sigma, 0, text, kv)
    assert backbone_faults(backbone, (8, 4, 4), text) == ""  # another model, but a consistent one
    replays = iter(range(10**6))
    backbone.velocity = lambda *args: velocity(*args) + 0.1 * next(replays)
    assert backbone_faults(backbone, (8, 4, 4), text) != ""


def test_the_stub_refuses_other_shapes():
    model = StubVideoModel()
    with pytest.raises(ValueError, match=r"video \[B, 4, F, H, W\]"):
        model.remember(torch.zeros(1, 3, 4, 2, 2), torch.zeros(1), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match="memory"):
        model(torch.zeros(2, 4, 3, 2, 2), torch.zeros(2), torch.zeros(2), torch.zeros(2, 2, 8), torch.zeros(1, 3, 6))


# ------------------------------------------------------------------------------------------------------- not tried yet


@pytest.mark.parametrize(
    "check", [check_07, check_07_slope, check_07_kl, check_08, check_08_paired, check_08_alarm, check_09]
)
def test_none_is_not_an_answer(check):
    verdict = check(None)
    assert not verdict and verdict.says.startswith("Write a")


# ------------------------------------------------------------------------------------------------- 10 six spoiled runs


def spoiled(name, n=3, end=0.5, **change):
    """A run's record whose held-out journey ends at `end`."""
    line = dict(entropy=2.0, kl=0.01, prefix_drift=0.001, grad_norm=0.05, safe=1.0, reward=2.1, anchor_reward=2.0)
    log = [line | change | {"step": k} for k in range(n)]
    names = ("reward", "liked", "journey", "valid")
    log[0] |= {f"eval0/{key}": 0.5 for key in names}
    log[-1] |= {f"eval/{key}": end if key == "journey" else 0.5 for key in names}
    return {"name": name, "log": log}


SPOILED = {
    "healthy": spoiled("nothing"), "A": spoiled("tau / 100", entropy=0.1), "B": spoiled("no brakes", kl=0.5, end=0.1),
    "C": spoiled("nearest 0", safe=0.25),
}  # fmt: skip
NAMED = {"A": "tau / 100", "B": "no brakes", "C": "nearest 0"}


def test_10_what_a_run_says_of_itself():
    seen = symptoms(SPOILED["B"]["log"])
    assert seen["KL to the initial policy"] == pytest.approx(0.5) and seen["reward minus anchor"] == pytest.approx(0.1)
    assert seen["change of the held-out journey"] == pytest.approx(-0.4)


def test_10_names():
    assert check_10_names(NAMED, SPOILED)
    for answer in (None, "A", {}, {"A": "tau / 100"}, dict.fromkeys("ABC"), dict.fromkeys("ABC", "no brakes")):
        verdict = check_10_names(answer, SPOILED)
        assert not verdict and "Give each of A, B, C" in verdict.says
    swapped = NAMED | {"A": "no brakes", "B": "tau / 100"}
    verdict = check_10_names(swapped, SPOILED)
    assert not verdict and "1 of 3" in verdict.says and "entropy, 0.100 against 2.000" in verdict.says
    assert "tau" not in verdict.says  # it does not tell


def test_10_the_worst():
    assert check_10_most("B", SPOILED, "-change of the held-out journey")
    assert check_10_most("B", SPOILED, "KL to the initial policy")
    verdict = check_10_most("A", SPOILED, "-change of the held-out journey")
    assert not verdict and "A is 0.000, and another run's -0.400" in verdict.says
    for answer in (None, "healthy", "Z", 1):
        assert "Give one of the letters A, B, C" in check_10_most(answer, SPOILED, "entropy").says


def test_10_an_alarm():
    assert check_10_alarm(lambda line: line["entropy"] < 1 or line["kl"] > 0.1 or line["safe"] < 0.5, SPOILED)
    for rule, says in (
        (None, "Write a function"), (lambda line: None, "returns nothing"), (lambda line: True, "the healthy run"),
        (lambda line: line["entropy"] < 1, "catches 1 of the others, not 3"),
        (lambda line: line["eval/journey"] < 0.4, "raised"),
    ):  # fmt: skip
        verdict = check_10_alarm(rule, SPOILED)
        assert not verdict and says in verdict.says
