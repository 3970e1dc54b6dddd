"""Checks of the notebooks' exercises: `check_NN(answer)` returns a `Verdict`, which is true when the answer is right
and shows as a sentence.

The answer `None` means "not tried yet". A check never raises on an answer: it says what is expected, and of a wrong one
what is wrong with it. Each compares with a computation of its own, never with a stored answer.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found. `assert check_NN(answer)` passes when it is right; as a cell's last line it is shown."""

    right: bool | None  # None: not tried yet
    says: str

    def __bool__(self) -> bool:
        return bool(self.right)

    def __repr__(self) -> str:
        return {True: "Right. ", False: "Not yet. ", None: "Your turn. "}[self.right] + self.says


def _wrong(answer) -> bool | None:
    """What `right` is for an answer of the wrong kind: None where there is no answer yet."""
    parts = answer.values() if isinstance(answer, dict) else [answer]
    return None if all(part is None for part in parts) else False


# ------------------------------------------------------------------------------- 00 where, who is better, who gains


def _letter(answer, n: int) -> int:
    """A branch's number, from its letter or its number; -1 for anything else."""
    if isinstance(answer, str):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:n]
        return letters.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    try:
        branch = -1 if isinstance(answer, bool) else operator.index(answer)  # also numpy's and torch's whole numbers
    except TypeError:
        return -1
    return branch if 0 <= branch < n else -1


def check_00_scenes(answer, seen, reads, sink: int = 3) -> Verdict:
    """answer: the scene that each branch settles in, by the world's rule. seen: the scene of every past frame, a name
    each; reads [G, L]: the frames that each branch may read."""
    rows = [[int(f) for f in row] for row in reads]

    def most(row, least: int) -> str:
        names = [seen[f] for f in row if f >= least]
        return max(names, key=lambda name: (names.count(name), -names.index(name)))  # at a tie the one seen first

    if answer is None:
        return Verdict(None, f"Give {len(rows)} names of scenes, one a branch.")
    given = [answer] if isinstance(answer, str) else list(answer) if isinstance(answer, (list, tuple)) else []
    if len(given) != len(rows) or any(name not in seen for name in given):
        known = ", ".join(dict.fromkeys(seen))
        return Verdict(False, f"Expected {len(rows)} scenes of the past ({known}), got {answer!r}.")
    right = [most(row, sink) for row in rows]
    if given == right:
        return Verdict(True, "That is what each of them remembers best.")
    if given == [most(row, 0) for row in rows]:
        return Verdict(False, "You counted the sink's frames too: the rule leaves them out.")
    if given == [seen[row[-1]] for row in rows]:
        return Verdict(False, "That is where the hero is now. Count all frames behind the sink that a branch may read.")
    wrong = ["ABCDEFGH"[k] for k, (a, b) in enumerate(zip(given, right, strict=True)) if a != b]
    return Verdict(False, f"Look at {', '.join(wrong)} again: count the scenes; at a tie the one seen first wins.")


def check_00_signs(by_mean, by_anchor, rewards: Tensor, anchor: float) -> Verdict:
    """by_mean, by_anchor: the signs of the advantages, such as "--++", if rewards [G] are compared with the group's
    mean, and with the anchor's."""
    if by_mean is None or by_anchor is None:
        return Verdict(None, f"Give two texts of {len(rewards)} signs, such as '{'+-' * (len(rewards) // 2)}'.")

    def signs(base: float) -> str:
        return "".join("+" if r > base else "-" if r < base else "0" for r in rewards.tolist())

    want = {"the group's mean": signs(sum(rewards.tolist()) / len(rewards)), "the anchor": signs(anchor)}
    if (by_anchor, by_mean) == tuple(want.values()):
        return Verdict(False, "You have the two the wrong way round.")
    for (base, right), given in zip(want.items(), (by_mean, by_anchor), strict=True):
        if given != right:
            return Verdict(False, f"Compared with {base} it is not {given!r}: above is +, below is -, one a branch.")
    return Verdict(True, "Being better than the others is not enough: a branch must beat what the model does anyway.")


def check_00(answer, energies: Tensor, advantages: Tensor, tau: float) -> Verdict:
    """answer: the branch (letter or number) whose probability grows most in a small step down the gradient of the
    objective. energies, advantages [G] of one group."""
    g = len(energies)
    if answer is None:
        return Verdict(None, f"Set the answer to a branch, a letter from A to {'ABCDEFGH'[g - 1]}.")
    branch = _letter(answer, g)
    if branch < 0:
        return Verdict(False, f"Expected a branch, one of the first {g} letters, got {answer!r}.")
    # by differences, without the formula: the loss -sum(p * A) / G is followed a small way downhill in E
    E = energies.double()
    p = torch.softmax(-E / tau, 0)
    tiny = 1e-6 * tau

    def loss(e: Tensor) -> Tensor:
        return -(torch.softmax(-e / tau, 0) / p * advantages.double()).mean()

    slope = torch.stack([(loss(E + tiny * one) - loss(E - tiny * one)) / (2 * tiny) for one in torch.eye(g).double()])
    change = torch.softmax(-(E - 0.1 * tau * slope / slope.abs().max().clamp(min=1e-30)) / tau, 0) - p
    best = int(change.argmax())
    if branch == best:
        return Verdict(True, f"{'ABCDEFGH'[best]} gains {change[best]:+.4f}, more than any other.")
    return Verdict(
        False,
        f"{'ABCDEFGH'[branch]} changes by {change[branch]:+.4f}, another one gains more. What a branch gains is its "
        "probability times its pull, A_g - p_g * sum(A), less the mean pull.",
    )


# ------------------------------------------------------------- 01 one step, two velocities, what is random, who decides


def check_01_one_step(answer, data: Tensor, shares: Tensor) -> Verdict:
    """answer: where one step from sigma 1 lands, whatever the noise, for a perfectly trained velocity. data [N, D] is
    drawn with probabilities `shares` [N]."""
    if answer is None:
        return Verdict(None, f"Give {data.shape[1]} numbers, a point.")
    try:
        given = torch.as_tensor(answer).double()
    except (TypeError, ValueError, RuntimeError):
        return Verdict(False, f"Expected {data.shape[1]} numbers, got {answer!r}.")
    if given.shape != data.shape[1:]:
        return Verdict(False, f"Expected a point of {data.shape[1]} numbers, got shape {list(given.shape)}.")
    # at sigma 1 the input is noise alone: the best answer minimises the squared error to all that it may have been
    best = torch.zeros(data.shape[1]).double()
    for _ in range(200):
        best = best - 0.2 * ((best - data.double()) * shares.double()[:, None]).sum(0)
    if torch.allclose(given, best, atol=0.02):
        return Verdict(True, "One step lands on the mean of all data, which need not be a place where data are.")
    if torch.allclose(given, data.double().mean(0), atol=0.02):
        return Verdict(False, "That is the mean of the places. How often is each of them drawn?")
    if (data.double() - given).abs().amax(1).min() < 0.02:
        return Verdict(False, "That is one of the places: the noise does not tell which of them it came from.")
    return Verdict(False, "With least squares the best guess is the mean of all that it may have been.")


def check_01_sources(answer) -> Verdict:
    """answer: which of "initial noise", "step noise" and "history" still change the video at eta = 0."""
    names = ("initial noise", "step noise", "history")
    if answer is None:
        return Verdict(None, f"Give a set of these: {', '.join(names)}.")
    try:
        given = {answer} if isinstance(answer, str) else set(answer)
    except TypeError:
        given = {None}
    if not given <= set(names):
        return Verdict(False, f"Expected a set of these: {', '.join(names)}; got {answer!r}.")
    levels, weights = (1.0, 0.8, 0.5, 0.2), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def made(initial: int, steps: int, history: int) -> Tensor:  # a sampler of four numbers, its seeds for each source
        draw = [torch.Generator().manual_seed(seed) for seed in (initial, steps, history)]
        past, x = torch.randn(4, generator=draw[2]), torch.randn(4, generator=draw[0])
        for level, lower in zip(levels, (*levels[1:], 0.0), strict=True):
            torch.randn(4, generator=draw[1])  # drawn and, at eta 0, mixed in with weight 0
            x = x + (lower - level) * (weights[0] * x.tanh() + weights[1] * past + weights[2])
        return x

    changed = {"initial noise": (1, 0, 0), "step noise": (0, 1, 0), "history": (0, 0, 1)}
    truth = {name for name, seeds in changed.items() if not torch.equal(made(*seeds), made(0, 0, 0))}
    if given == truth:
        return Verdict(True, "Without fresh noise between the steps the other two still decide everything.")
    if "step noise" in given:
        return Verdict(False, "At eta = 0 no fresh noise is mixed in between the steps.")
    return Verdict(False, "One is missing: two things are still given to the sampler from outside.")


def check_01_owner(answer, shares) -> Verdict:
    """answer: {event: "routing", "noise" or "neither"}, what tells another story most often. shares: event -> {source:
    share of branches that differ from the anchor}; sources that route are named so. Below a third nothing does."""
    if not isinstance(answer, dict) or set(answer) != set(shares):
        return Verdict(False, f"Give a dict with the keys {', '.join(shares)}.")
    kinds = ("routing", "noise", "neither")
    if odd := [value for value in answer.values() if value not in kinds]:
        return Verdict(_wrong(answer), f"Each is one of {', '.join(kinds)}; got {odd[0]!r}.")
    truth = {}
    for event, by in shares.items():
        most = max(by, key=by.get)
        truth[event] = "neither" if by[most] < 1 / 3 else "routing" if most.startswith("routing") else "noise"
    if wrong := [event for event in shares if answer[event] != truth[event]]:
        return Verdict(False, f"The measurement says otherwise about {', '.join(map(repr, wrong))}.")
    return Verdict(True, "So it was measured, below.")


def check_01(answer) -> Verdict:
    """answer: (dv [...], sigma) -> difference of the clean predictions [...] of two models at the same z and sigma."""
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.25, 0.5, 0.9):
        x0, noise, dv = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        z = (1 - sigma) * x0 + sigma * noise
        # the clean data that a velocity means: solve z = (1 - sigma) x + sigma e and v = e - x for x
        system = torch.tensor([[1 - sigma, sigma], [-1.0, 1.0]], dtype=torch.float64)
        v = noise - x0
        clean = [torch.linalg.solve(system, torch.stack([z, velocity]))[0] for velocity in (v, v + dv)]
        want = clean[1] - clean[0]
        try:
            got = answer(dv, sigma) if callable(answer) else answer
            got = None if got is None else torch.as_tensor(got, dtype=torch.float64)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"Your function raised {type(error).__name__}: {error}")
        if got is None:
            return Verdict(None, "Return the difference of the clean predictions, from dv and sigma.")
        if got.shape != want.shape:
            return Verdict(False, f"Expected numbers of the shape of dv, {list(want.shape)}, got {list(got.shape)}.")
        if not torch.allclose(got, want):
            if torch.allclose(got, -want):
                return Verdict(False, "The size is right, the sign is not: a larger velocity means less clean data.")
            factor = (got * dv).sum() / dv.square().sum()
            return Verdict(
                False, f"At sigma {sigma} your answer is {factor:.3f} times dv. Write x0 = z - sigma * v twice."
            )
    return Verdict(True, "They differ by -sigma * dv, found here by solving for x0 at three noise levels.")


# ------------------------------------------------------------------------------------------------- 02 break causality


def check_02(mask, differ) -> Verdict:
    """mask: bool [6, 6], True where the row's frame reads the column's; differ: the frames whose result in two layers
    of attention differs from the results that are made one frame at a time."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (6, 6):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        return Verdict(False, f"Expected a bool tensor [6, 6] as the mask, got {got}.")
    if not mask.triu(1).any():
        return Verdict(None, "The mask is still causal: no frame reads a later one. Set mask[2, 4] to True.")
    if not mask.diagonal().all():
        return Verdict(False, "Every frame reads itself: leave the diagonal True.")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    layers = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) / 8**0.5

    def run(x: Tensor, mask: Tensor) -> Tensor:
        for q, k, v in layers:
            scores = (x @ q) @ (x @ k).T / 8**0.5
            x = scores.masked_fill(~mask, -torch.inf).softmax(1) @ (x @ v)
        return x

    # frame by frame nothing later exists yet: a frame's own result is the last row of what there is
    alone = torch.stack([run(x[: f + 1], mask[: f + 1, : f + 1].tril())[-1] for f in range(6)])
    truth = set(((run(x, mask) - alone).abs().amax(1) > 1e-9).nonzero()[:, 0].tolist())
    if differ is None:
        return Verdict(None, "The mask looks into the future. Now name the frames whose results differ, as a set.")
    try:
        named = {int(f) for f in differ}
    except (TypeError, ValueError):
        return Verdict(False, f"Expected a set of frames such as {{2}}, got {differ!r}.")
    if named == truth:
        return Verdict(True, f"Frames {sorted(truth)} differ: in layer two whoever reads a changed frame changes too.")
    says = []
    if named - truth:
        says.append(f"{sorted(named - truth)} do not differ")
    if truth - named:
        says.append(f"{len(truth - named)} more differ: who reads, in the second layer, what changed in the first?")
    return Verdict(False, "; ".join(says).capitalize())


def check_02_kept(answer, sink: int = 3, size: int = 33, block: int = 3) -> Verdict:
    """answer: a function, start -> the frames that are in the history when the block at `start` is made."""
    if answer is None or not callable(answer):
        return Verdict(None, "Write a function of `start` that returns a list of frames.")
    kept: list[int] = []
    for start in range(0, 150, block):
        try:
            given = answer(start)
            given = None if given is None else [int(f) for f in given]
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"At {start} your function raised {type(error).__name__}: {error}")
        if given is None:
            return Verdict(None, "The function returns nothing yet: return a list of frames.")
        if sorted(given) != kept:
            says = f"At {start} you keep {len(given)} frames, the history has {len(kept)}"
            if len(set(given)) < len(given):
                return Verdict(False, f"At {start} a frame stands in your list twice: {given}.")
            if set(kept[:sink]) - set(given):
                return Verdict(False, says + f": the sink, {kept[:sink]}, never goes.")
            if max(given, default=0) >= start and start:
                return Verdict(False, f"At {start} your list holds frame {max(given)}, which is not made yet.")
            return Verdict(False, says + f"; in all there are at most {size}, the sink among them.")
        kept = [*kept, *range(start, start + block)]
        while len(kept) > size:  # the oldest behind the sink goes
            del kept[sink]
    return Verdict(True, f"Never more than {size} frames, however long the video is.")


def check_02_most(answer, frames: Tensor, change: Tensor) -> Verdict:
    """answer: the past frame without which a block changes most. frames, change [L]."""
    if isinstance(answer, bool) or not isinstance(answer, int) or answer not in frames.tolist():
        return Verdict(_wrong(answer), f"Give one of the frames that the block reads: {frames.tolist()}.")
    best = int(frames[change.argmax()])
    place = 1 + int((change > change[frames.tolist().index(answer)]).sum())
    if answer == best:
        return Verdict(True, f"Without frame {best} the block changes most.")
    return Verdict(False, f"Frame {answer} comes in place {place} of {len(frames)}.")


def check_02_drift(answer, accuracy, part: int = 3) -> Verdict:
    """answer: the name of the curve that is higher in the last third. accuracy: name -> [T]."""
    names = list(accuracy)
    if answer not in names:
        return Verdict(_wrong(answer), f"Give one of {', '.join(map(repr, names))}.")
    ends = {name: float(curve[-(len(curve) // part) :].mean()) for name, curve in accuracy.items()}
    says = ", ".join(f"{name}: {end:.2f}" for name, end in ends.items())
    best = max(ends, key=ends.get)
    if max(ends.values()) - min(ends.values()) < 0.02:
        return Verdict(True, f"They end alike ({says}): a draw, every answer is right.")
    return Verdict(answer == best, f"In the last third, {says}.")


# ------------------------------------------------------------------------------------------ 03 which way does DMD pull?


def check_03(answer) -> Verdict:
    """answer: (real, fake) -> gradient of the loss with respect to a sample, from the two denoised estimates, all of
    one shape. Gradient descent with it must take a student's samples to the teacher's distribution."""
    generator = torch.Generator().manual_seed(0)
    teacher, sigma = torch.tensor([2.0, -1.0, 0.5]), 0.6
    mean = torch.zeros(3)  # of the student: its samples are mean + noise, the teacher's are teacher + noise

    def denoised(z: Tensor, centre: Tensor) -> Tensor:
        # E[x0 | z] for x0 ~ N(centre, 1) and z = (1 - sigma) x0 + sigma noise: two Gaussians, by Bayes' rule
        return centre + (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * (z - (1 - sigma) * centre)

    before, along = (mean - teacher).norm(), 0.0
    for step in range(100):
        x0 = mean + torch.randn(64, 3, generator=generator)
        z = (1 - sigma) * x0 + sigma * torch.randn(64, 3, generator=generator)
        real, fake = denoised(z, teacher), denoised(z, mean)
        try:
            got = answer(real, fake) if callable(answer) else answer
            got = None if got is None else torch.as_tensor(got, dtype=torch.float32)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"Your function raised {type(error).__name__}: {error}")
        if got is None:
            return Verdict(None, "Return the gradient of the loss with respect to the sample, from real and fake.")
        if got.shape != real.shape:
            return Verdict(False, f"Expected a gradient of shape {list(real.shape)}, got {list(got.shape)}.")
        if step == 0:  # only the direction is asked for: at first the answer is as large as the difference
            scale = (fake - real).norm() / got.norm().clamp(min=1e-30)
            along = float(torch.cosine_similarity(got.flatten(), (fake - real).flatten(), dim=0))
        mean = mean - 0.1 * scale * got.mean(0)  # a step of gradient descent on the student's one parameter
    after = (mean - teacher).norm()
    if along < -0.9:
        return Verdict(False, "Gradient descent with it drives the student away from the teacher: look at the sign.")
    if not after < 0.1 * before:  # also nan
        return Verdict(
            False,
            f"The student ends {after:.2f} from the teacher (it began at {before:.2f}). The gradient must vanish when "
            "the two estimates agree, and only then.",
        )
    return Verdict(True, f"In 100 steps the student's mean came from {before:.2f} to {after:.2f} of the teacher's.")


def check_03_guided(answer) -> Verdict:
    """answer: (mute, told, scale) -> the guided velocity: scale 0 is the one without words, 1 the one with them."""
    generator = torch.Generator().manual_seed(0)
    mute, told = torch.randn(2, 3, 4, generator=generator)
    for scale in (0.0, 1.0, 3.0, -0.5):
        try:
            got = answer(mute, told, scale) if callable(answer) else answer
            got = None if got is None else torch.as_tensor(got, dtype=torch.float32)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"Your function raised {type(error).__name__}: {error}")
        if got is None:
            return Verdict(None, "Return the guided velocity, from mute, told and scale.")
        if got.shape != mute.shape:
            return Verdict(False, f"Expected a velocity of shape {list(mute.shape)}, got {list(got.shape)}.")
        # the point on the line through both that is `scale` times as far from mute as told is, on the same side
        want = torch.stack([torch.lerp(a, b, scale) for a, b in zip(mute.flatten(), told.flatten(), strict=True)])
        if not torch.allclose(got.flatten(), want, atol=1e-5):
            says = f"With scale {scale:g} it is off."
            return Verdict(False, says + " Scale 0 gives `mute`, 1 gives `told`, 2 goes as far again.")
    return Verdict(True, "Above 1 it goes further than the words alone would.")


def check_03_ends(answer, teacher: float = 2.0, student: float = 0.0) -> Verdict:
    """answer: the gradient fake - real of two Gaussians N(teacher, 1) and N(student, 1), at sigma 0 and at sigma 1."""
    try:
        none, all_ = (float(x) for x in answer)
    except (TypeError, ValueError):
        return Verdict(False, "Give two numbers, the gradient at sigma 0 and at sigma 1.")
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)

    def estimate(centre: float, sigma: float, z: float) -> float:  # E[x0 | z] by a sum over all x0
        log = -0.5 * (x - centre) ** 2 - 0.5 * ((z - (1 - sigma) * x) / max(sigma, 1e-2)) ** 2
        return float((log.softmax(0) * x).sum())

    right = [estimate(student, sigma, 0.7 * (1 - sigma)) - estimate(teacher, sigma, 0.7 * (1 - sigma))
             for sigma in (0.0, 1.0)]  # fmt: skip
    if abs(none - right[0]) < 0.02 and abs(all_ - right[1]) < 0.02:
        return Verdict(True, "Without noise both models see the sample itself; in noise alone each says its own mean.")
    if abs(none - right[1]) < 0.02 and abs(all_ - right[0]) < 0.02:
        return Verdict(False, "The two ends are the other way round: sigma 0 is no noise.")
    if abs(all_ + right[1]) < 0.02:
        return Verdict(False, "Look at the sign: fake minus real.")
    return Verdict(False, "At sigma 0 the input is the sample; at sigma 1 it says nothing, and each gives its mean.")


def check_03_order(answer, valid) -> Verdict:
    """answer: the names, from most valid frames to fewest. valid: name -> share of valid frames."""
    names = list(valid)
    if not isinstance(answer, (list, tuple)) or sorted(map(str, answer)) != sorted(names):
        return Verdict(_wrong(answer), f"Give a list of these names, the one with most valid frames first: {names}.")
    best = sorted(names, key=valid.get, reverse=True)
    if all(valid[a] >= valid[b] - 0.005 for a, b in zip(answer, answer[1:], strict=False)):
        return Verdict(True, "Valid frames: " + ", ".join(f"{name} {valid[name]:.2f}" for name in best) + ".")
    return Verdict(False, f"The first is {best[0]!r}, the last {best[-1]!r}.")


# ---------------------------------------------------------------------------------------- 04 routes that overlap less


def check_04(answer) -> Verdict:
    """answer: a function like `chr.uniform_routes`, `(frames, n_routed, num_generations, generator) -> [G, n_routed]`,
    whose branches share fewer frames than uniform draws do."""
    if answer is None:
        return Verdict(None, "Write a function (frames, n_routed, num_generations, generator) -> routes [G, n_routed].")
    verdicts = [_fewer_shared(answer, range(3, last), 5, 8) for last in (20, 17)]
    return next((verdict for verdict in verdicts if not verdict), verdicts[0])


def _fewer_shared(answer, frames: range, n: int, g: int) -> Verdict:
    shared = []
    used = set()
    plans = set()
    pool = f"frames {frames[0]} to {frames[-1]}"
    for seed in range(20):
        try:
            routes, again = (answer(frames, n, g, torch.Generator().manual_seed(seed)) for _ in range(2))
            if routes is None:
                return Verdict(None, f"The function returns nothing yet: return routes [{g}, {n}].")
            routes, again = (torch.stack([*map(torch.as_tensor, plan)]) for plan in (routes, again))
            rows = routes.tolist()
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"With {pool}, {n} routed and {g} branches it raised {error!r}.")
        if not isinstance(rows, list) or len(rows) != g or any(not isinstance(r, list) or len(r) != n for r in rows):
            return Verdict(False, f"Expected routes [{g}, {n}], one row a branch, got {routes!r}.")
        for k, row in enumerate(rows):
            if not set(row) <= set(frames):
                return Verdict(False, f"Branch {k} reads {row}, but only {pool} are in the pool.")
            if len(set(row)) < n:
                return Verdict(False, f"Branch {k} reads a frame twice: {row}. All {n} must differ.")
            if row != sorted(row):
                return Verdict(False, f"Frames of a branch must ascend, branch {k} has {row}.")
        if rows != again.tolist():
            return Verdict(False, "The same generator seed gave two plans: draw from the given generator alone.")
        shared += [len(set(a) & set(b)) for i, a in enumerate(rows) for b in rows[:i]]
        used |= {frame for row in rows for frame in row}
        plans.add(str(rows))
    if len(plans) < 2:
        return Verdict(False, "Every seed gives the same plan, so training would never see another one: use generator.")
    if used != set(frames):
        return Verdict(False, f"In 20 plans the frames {sorted(set(frames) - used)} were never read by anyone.")
    mean = sum(shared) / len(shared)
    uniform = n * n / len(frames)  # each of one branch's n frames is among the other's n with probability n / pool
    each, extra = divmod(g * n, len(frames))  # the fewest: every frame is read as often as every other, or once more
    pairs = (len(frames) - extra) * each * (each - 1) / 2 + extra * (each + 1) * each / 2
    fewest = pairs / (g * (g - 1) / 2)
    says = (
        f"From {len(frames)} frames two branches share {mean:.2f} of {n}; uniform draws share {uniform:.2f}, "
        f"the fewest is {fewest:.2f}."
    )
    if mean > (uniform + fewest) / 2:
        return Verdict(False, says + " Come closer to it: let no frame be read often while another is not read.")
    return Verdict(True, says)


def _named_scenes(answer) -> tuple[list[str] | None, str]:
    """Names of scenes, and what is wrong with them."""
    from kvpo_min.pocket import world

    try:
        named = [answer] if isinstance(answer, str) else [str(name) for name in answer]
    except TypeError:
        return None, f"Expected names of scenes, got {answer!r}."
    if unknown := [name for name in named if name not in world.SCENES]:
        return None, f"The scenes are {', '.join(world.SCENES)}; got {unknown[0]!r}."
    return named, ""


def _settles(seen: list[int], route: list[int], nearest: int, sink: int = 3) -> int:
    """Where a hero settles whose block begins after the scenes `seen`, by counting; `world.remembered` is tensors."""
    read = sorted({*route, *range(len(seen) - nearest, len(seen))})
    count = {scene: sum(seen[f] == scene for f in read if f >= sink) for scene in set(seen)}
    return next(seen[f] for f in read if f >= sink and count[seen[f]] == max(count.values()))


def check_04_reads(answer, route: Tensor, start: int, nearest: int) -> Verdict:
    """answer: the past frames that a branch with these routed frames reads when its block at `start` is made."""
    route = [int(f) for f in route]
    if answer is None:
        return Verdict(None, f"Name the {3 + len(route) + nearest} past frames that it reads, as a list or set.")
    try:
        named = {int(f) for f in answer}
    except (TypeError, ValueError):
        return Verdict(False, f"Expected frame numbers such as [0, 1, 2], got {answer!r}.")
    sink, near = set(range(3)), set(range(start - nearest, start))
    if named == sink | set(route) | near:
        return Verdict(
            True, f"Sink, route, and the {nearest} frames before {start}: the nearest ones have moved along."
        )
    if any(f >= start for f in named):
        return Verdict(False, f"Frame {max(named)} is no past frame: the block at {start} is still being made.")
    if not sink <= named:
        return Verdict(False, "The sink is missing: every block reads the first three frames.")
    if not set(route) <= named:
        return Verdict(False, "Routed frames stay the same in every routed block; some of them are missing.")
    return Verdict(False, f"Sink and route are there. Which {nearest} frames come right before frame {start}?")


def check_04_settles(answer, scenes: Tensor, routes: Tensor, nearest: int) -> Verdict:
    """answer: names of scenes, one a branch: where the rule lets each settle. scenes [T]: those of the frames before
    the event; routes [G, n_routed]."""
    from kvpo_min.pocket import world

    if answer is None:
        return Verdict(None, f"Give {len(routes)} names of scenes, one a branch.")
    named, fault = _named_scenes(answer)
    if fault:
        return Verdict(False, fault)
    if len(named) != len(routes):
        return Verdict(False, f"Expected {len(routes)} names, one a branch, got {len(named)}.")
    seen = scenes.tolist()
    wanted = [world.SCENES[_settles(seen, route, nearest)] for route in routes.tolist()]
    wrong = ["ABCDEFGH"[g % 8] for g, (a, b) in enumerate(zip(named, wanted, strict=True)) if a != b]
    if not wrong:
        return Verdict(True, f"The rule says {', '.join(wanted)}. Now see what the model does.")
    says = f"Wrong for {', '.join(wrong)}."
    if named == [world.SCENES[seen[-1]]] * len(named):
        says += " That is where the hero is when it settles; what counts is what it may remember."
    elif world.SCENES[seen[0]] in named and seen[0] not in seen[3:]:
        says += " The sink does not count."
    else:
        says += (
            f" Count, for each scene, the routed frames and the {nearest} nearest ones; at a tie the older scene wins."
        )
    return Verdict(False, says)


def check_04_route(
    answer, wish: str, scenes: Tensor, pool: range, nearest: int, n_routed: int, most: int | None = None
) -> Verdict:
    """answer: `n_routed` frames of `pool`, at most `most` of them of `wish`, that make the hero settle there. scenes
    [T] before the event."""
    from kvpo_min.pocket import world

    if answer is None:
        return Verdict(None, f"Give {n_routed} different frames from {pool[0]} to {pool[-1]}.")
    try:
        route = [int(f) for f in answer]
    except (TypeError, ValueError):
        return Verdict(False, f"Expected frame numbers, got {answer!r}.")
    if len(route) != n_routed or len(set(route)) != n_routed:
        return Verdict(False, f"Expected {n_routed} different frames, got {route}.")
    if outside := [f for f in route if f not in pool]:
        return Verdict(False, f"Frame {outside[0]} is not in the pool, {pool[0]} to {pool[-1]}.")
    seen = scenes.tolist()
    there = world.SCENES[_settles(seen, route, nearest)]
    shown = sum(world.SCENES[seen[f]] == wish for f in route)
    if there == wish and most is not None and shown > most:
        return Verdict(False, f"It leads to the {wish}, but by {shown} of its frames. Can you do it with {most}?")
    if there == wish:
        return Verdict(True, f"With these frames the hero remembers the {wish} best.")
    says = f"This route leads to the {there}: {shown} of its frames show the {wish}."
    if shown:
        says += f" The {nearest} nearest frames count as well, and at a tie the older scene wins."
    return Verdict(False, says)


def check_04_never(answer, scenes: Tensor, pool: range, nearest: int, n_routed: int) -> Verdict:
    """answer: names of the scenes in which no route of `n_routed` frames can let the hero settle."""
    import itertools

    from kvpo_min.pocket import world

    if answer is None:
        return Verdict(None, "Name the scenes that no route can reach, as a set.")
    named, fault = _named_scenes(answer)
    if fault:
        return Verdict(False, fault)
    seen = scenes.tolist()
    routes = itertools.combinations(pool, n_routed)  # all of them: some thousand
    reached = {world.SCENES[_settles(seen, [*route], nearest)] for route in routes}
    never = set(world.SCENES) - reached
    if set(named) == never:
        return Verdict(True, f"All routes tried: they reach {', '.join(sorted(reached))} and nothing else.")
    if too_many := sorted(set(named) & reached):
        return Verdict(False, f"A route can reach the {too_many[0]}.")
    missing = never - set(named)
    if world.SCENES[seen[-1]] in missing:
        says = f"{n_routed} routed frames, how few scenes: can all have fewer than the {nearest} nearest frames show?"
    elif any(world.SCENES[k] in missing for k in seen[:3]):
        says = "Which scene is seen in the sink alone? The sink does not count."
    else:
        says = "Where has the hero never been?"
    return Verdict(False, f"{len(missing)} more cannot be reached. {says}")


# ------------------------------------------------------------------------------------- 05 weights of the x0 residual


def check_05(answer) -> Verdict:
    """answer: a function `(sigma [S], floor) -> weights [S]` by which each step's mean squared x0 residual is
    multiplied: floor 0 gives the velocity energy, and no sigma below `floor` counts as smaller than it."""
    if answer is None:
        return Verdict(None, "Write a function (sigma, floor) -> weights, one a step; a single line is enough.")
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([1.0, 0.9375, 5 / 6, 0.625], dtype=torch.float64)
    x0, noise, ours, theirs = torch.randn(4, 4, 50, dtype=torch.float64, generator=generator)  # each [S, elements]
    z = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
    v_residual = [float(((a - b) ** 2).mean()) for a, b in zip(ours, theirs, strict=True)]
    x0_residual = []
    for s, level in enumerate(sigma.tolist()):  # the two clean predictions of one noisy input
        a, b = z[s] - level * ours[s], z[s] - level * theirs[s]
        x0_residual.append(float(((a - b) ** 2).mean()))
    for floor in (0.0, 0.7, 1.0):
        per_step = zip(v_residual, sigma.tolist(), x0_residual, strict=True)
        wanted = [v * (s / max(s, floor)) ** 2 / x for v, s, x in per_step]
        try:
            given = answer(sigma, floor)
            if given is None:
                return Verdict(None, "The function returns nothing yet: return the weights, one a step.")
            given = torch.as_tensor(given).double()
            good = given.shape == sigma.shape and torch.allclose(given, torch.tensor(wanted).double(), rtol=1e-4)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"With sigma {sigma.tolist()} and floor {floor} it raised {error!r}.")
        if good:
            continue
        if given.shape != sigma.shape:
            return Verdict(False, f"Expected one weight a step, shape [4], got {list(given.shape)}.")
        hint = ""
        if torch.allclose(given, sigma**2, rtol=1e-4):
            hint = " That is the other way round: an x0 residual is already sigma times a velocity residual."
        elif torch.allclose(given, (sigma / sigma.clamp(min=floor)) ** 2, rtol=1e-4):
            hint = " These belong to velocity residuals (`energy_weights`); an x0 residual is sigma times as large."
        elif torch.allclose(given, 1 / sigma, rtol=1e-4):
            hint = " Residuals are squared, so their factor is too."
        elif floor:
            hint = " Without a floor it is right."
        got, due = ([round(x, 3) for x in w] for w in (given.tolist(), wanted))
        return Verdict(False, f"For floor {floor} the weights should be {due}, got {got}.{hint}")
    return Verdict(True, "With floor 0 the sum is the velocity energy, with floor 1 the plain sum of x0 residuals.")


def check_05_least(answer, energies: Tensor) -> Verdict:
    """answer: the branch (letter or number) with the least energy. energies [G, B, S]."""
    g = len(energies)
    if answer is None:
        return Verdict(None, f"Choose a branch, a letter from A to {'ABCDEFGH'[g - 1]}.")
    branch = _letter(answer, g)
    if branch < 0:
        return Verdict(False, f"Expected a branch, one of the first {g} letters, got {answer!r}.")
    each = energies.sum((1, 2)).tolist()
    best = min(range(g), key=each.__getitem__)
    if branch == best:
        return Verdict(True, f"Its energy is {each[best]:.2f}, the next one's {sorted(each)[1]:.2f}.")
    return Verdict(
        False,
        f"The energy of {'ABCDEFGH'[branch]} is {each[branch]:.2f}, and another one has less. Which film could the "
        "model have made with its ordinary memory, too?",
    )


def check_05_tau(answer, E: Tensor) -> Verdict:
    """answer: a tau at which the entropy of the Gibbs policy over energies E [G] is half of log G, within 5%."""
    if answer is None:
        return Verdict(None, "Give a number.")
    try:
        tau = float(answer)
    except (TypeError, ValueError):
        return Verdict(False, f"Expected a number, got {answer!r}.")
    if not 0 < tau < math.inf:
        return Verdict(False, f"A temperature is above 0 and finite, got {tau}.")
    low = min(E.tolist())
    weights = [math.exp(-(e - low) / tau) for e in E.tolist()]
    p = [w / sum(weights) for w in weights]
    share = -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))
    if abs(share - 0.5) < 0.05:
        return Verdict(True, f"The entropy is {share:.0%} of log G, and the likeliest branch has {max(p):.2f}.")
    which = "too large: the branches are nearly alike" if share > 0.5 else "too small: one branch takes all"
    return Verdict(False, f"The entropy is {share:.0%} of log G, so tau is {which}.")


def check_05_slope(answer) -> Verdict:
    """answer: a function (p [G], k, tau) -> d log pi(k) / d E [G], with p the Gibbs probabilities."""
    if answer is None:
        return Verdict(None, "Write a function (p, k, tau) -> slopes [G].")
    generator = torch.Generator().manual_seed(0)
    for tau in (1.0, 0.3):
        E = torch.rand(4, generator=generator, dtype=torch.float64)
        p = torch.softmax(-E / tau, 0)
        for k in (0, 2):
            tiny, one = 1e-6, torch.eye(4, dtype=torch.float64)  # by differences
            pairs = [[torch.log_softmax(-(E + sign * tiny * e) / tau, 0)[k] for sign in (1, -1)] for e in one]
            wanted = torch.stack([(up - down) / (2 * tiny) for up, down in pairs])
            try:
                given = answer(p, k, tau)
                if given is None:
                    return Verdict(None, "The function returns nothing yet: return the slopes, one a branch.")
                given = torch.as_tensor(given).double()
            except Exception as error:  # an answer may be anything
                return Verdict(False, f"It raised {error!r}.")
            if given.shape != p.shape:
                return Verdict(False, f"Expected one slope a branch, shape [4], got {list(given.shape)}.")
            if torch.allclose(given, wanted, atol=1e-5):
                continue
            hint = "Compare with small differences of E."
            if torch.allclose(given, -wanted, atol=1e-5):
                hint = "The sign: more energy makes a branch less likely."
            elif torch.allclose(given, tau * wanted, atol=1e-5):
                hint = "The temperature is missing: scores are -E / tau."
            elif torch.allclose(given, -one[k] / tau, atol=1e-5):
                hint = "The other energies matter too: they are in the sum below the fraction."
            return Verdict(False, f"Not the slope of log pi({k}). {hint}")
    return Verdict(True, "It agrees with small differences: down with its own energy, up with the others'.")


# --------------------------------------------------------------------------------- 06 rewards by hand, and a hack


def check_06_best(answer, values: Tensor, names) -> Verdict:
    """answer: (where it waits, where it settles), the film that a reward likes best. values [waits, settles]."""
    try:
        y, x = (list(names).index(name) for name in answer)
    except (TypeError, ValueError):
        return Verdict(_wrong(answer), f"Give two scenes, (where it waits, where it settles), of {', '.join(names)}.")
    got, best = values[y, x].item(), values.max().item()
    if got > best - 0.1:  # liked scenes differ a little in how clean they look
        return Verdict(True, f"It gets {got:.2f}, and no film more than {best:.2f}.")
    return Verdict(False, f"It gets {got:.2f}, another film {best:.2f}. Does the reward know what the words say?")


def check_06_advantage(answer, rewards: Tensor, anchor: float) -> Verdict:
    """answer: the advantages [G] over the anchor of one component, before they are fused."""
    r, n = rewards.tolist(), len(rewards)
    if answer is None:
        return Verdict(None, f"Give {n} numbers, one a branch.")
    try:
        given = torch.as_tensor(answer).double()
    except (TypeError, ValueError):
        return Verdict(False, f"Expected {n} numbers, got {answer!r}.")
    if given.shape != (n,):
        return Verdict(False, f"Expected {n} numbers, one a branch, got shape {list(given.shape)}.")

    def over(base: float, numbers: list[float], less: int) -> Tensor:
        mean = sum(numbers) / len(numbers)
        std = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - less))
        return torch.tensor([(x - base) / std for x in r]).double()

    def same(other: Tensor) -> bool:
        return torch.allclose(given, other, atol=0.01)

    right = over(anchor, [*r, anchor], 1)
    if same(right):
        return Verdict(True, "Those above the anchor have a positive advantage, however the others do.")
    for hint, wrong in (
        ("These are measured from the group's mean; KVPO measures from the anchor.", over(sum(r) / n, r, 1)),
        ("These are measured from the group's mean; KVPO measures from the anchor.", over(sum(r) / n, [*r, anchor], 1)),
        ("The spread is that of the branches and the anchor together.", over(anchor, r, 1)),
        ("The standard deviation is the unbiased one: divide by n - 1.", over(anchor, [*r, anchor], 0)),
        ("Right differences; now divide by their spread.", torch.tensor([x - anchor for x in r]).double()),
        ("The sign is wrong: better than the anchor is positive.", -right),
    ):
        if same(wrong):
            return Verdict(False, hint)
    return Verdict(False, "Subtract the anchor's reward, then divide by the standard deviation of all videos.")


def check_06_weight(answer, vq: Tensor, ta: Tensor, told: int) -> Verdict:
    """answer: the weight of TA, with VQ's at 1, from which on the best film waits where the words say, in row `told`.
    vq, ta [waits, settles]."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return Verdict(_wrong(answer), "Give one number, the smallest weight of TA that stops the cheating.")

    def cheats(weight: float) -> bool:
        total = vq + weight * ta
        return int(total.flatten().argmax()) // total.shape[1] != told

    low, high = 0.0, 1e3
    for _ in range(60):  # where it turns, by halving
        middle = (low + high) / 2
        low, high = (middle, high) if cheats(middle) else (low, middle)
    if abs(answer - high) <= 0.1 * high:
        return Verdict(True, f"It turns at {high:.2f}: below it the best film waits in a liked scene.")
    if cheats(float(answer)):
        return Verdict(False, f"With {answer:g} cheating still pays: find what a frame gains in VQ and loses in TA.")
    return Verdict(False, f"With {answer:g} it is honest, but less would do.")


def check_06(answer) -> Verdict:
    """answer: (reward, video). The reward must like clean heroes better than empty landscapes, and the video, [F, 3,
    64, 64] in [0, 1], must beat every clean hero although the judge sees none in most of its frames."""
    from kvpo_min.pocket import world

    if not isinstance(answer, tuple) or len(answer) != 2 or any(part is None for part in answer):
        return Verdict(None, "Give a pair: a reward (videos, prompts) -> [N], and a video that hacks it.")
    reward, video = answer
    if not isinstance(video, Tensor) or video.ndim != 4 or tuple(video.shape[1:]) != (3, 64, 64) or len(video) < 3:
        got = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
        return Verdict(False, f"The video must be [F, 3, 64, 64] with 3 frames or more, got {got}.")
    if not 0 <= float(video.min()) <= float(video.max()) <= 1:  # also false for nan
        return Verdict(False, f"Pixels lie in [0, 1], got {float(video.min()):.2f} to {float(video.max()):.2f}.")
    t = 4 * torch.arange(3)  # every shape, size and colour in every landscape, moving right
    states = torch.cartesian_prod(*(torch.arange(k) for k in (4, 2, 6, 6)))  # [288, 4]
    place = torch.stack([torch.full_like(t, 32), (t + 28) % 64], 1).expand(len(states), -1, -1)
    clean = world.render(torch.cat([states[:, None].expand(-1, 3, -1), place], 2))  # [288, 3, 3, 64, 64]
    empty = world.scenes()[:, None].expand(-1, 3, -1, -1, -1)
    try:
        scores = []
        for videos in (clean, empty, video[None]):
            score = torch.as_tensor(reward(videos, ["a disc"] * len(videos))).detach().float()
            if score.shape != (len(videos),) or not bool(score.isfinite().all()):
                return Verdict(False, f"The reward must give {len(videos)} finite numbers, got {score!r}.")
            scores.append(score)
    except Exception as error:  # an answer may be anything
        return Verdict(False, f"The reward raised {error!r}.")
    of_clean, of_empty, of_hack = scores
    if not of_clean.min() > of_empty.max():
        return Verdict(
            False,
            f"Nobody would train on this reward: an empty landscape gets up to {of_empty.max():.3f}, the worst clean "
            f"hero {of_clean.min():.3f}. Reward something that heroes have.",
        )
    valid = world.judge(video[None]).valid.float().mean().item()
    if valid >= 0.5:
        return Verdict(False, f"The judge sees a proper hero in {valid:.0%} of the frames: that is no hack yet.")
    says = f"The hack gets {of_hack.item():.3f}, the best of 288 clean heroes {of_clean.max():.3f}"
    if not of_hack.item() > of_clean.max():
        return Verdict(False, says + ": what does your reward not look at?")
    return Verdict(True, says + f", and the judge sees a hero in {valid:.0%} of its frames.")


# ------------------------------------------------------------------ 07 who gains, the slope, the objective, the KL


def check_07_gain(answer, energies: Tensor, advantages: Tensor, tau: float) -> Verdict:
    """answer: the letter of the branch whose probability grows most in a small step of the energies against the
    objective's slope. energies, advantages [G]."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(energies)]
    if not isinstance(answer, str) or len(answer) != 1 or answer.upper() not in letters:
        return Verdict(_wrong(answer), f"Give a branch, one of the letters {letters}.")
    E, g = energies.double(), letters.index(answer.upper())
    p = torch.softmax(-E / tau, 0)
    tiny = 1e-6 * tau

    def loss(e: Tensor) -> Tensor:
        return -(torch.softmax(-e / tau, 0) / p * advantages.double()).mean()

    slope = torch.stack(
        [(loss(E + tiny * one) - loss(E - tiny * one)) / (2 * tiny) for one in torch.eye(len(E)).double()]
    )
    change = torch.softmax(-(E - 0.1 * tau * slope / slope.abs().max().clamp(min=1e-30)) / tau, 0) - p
    best = int(change.argmax())
    if g == best:
        return Verdict(True, f"{letters[g]} gains {change[g]:+.4f}, more than any other.")
    says = f"{letters[g]} changes by {change[g]:+.4f}, another one gains more."
    if g == int(energies.argmin()):
        says += " Being likely is not enough: what is its advantage?"
    return Verdict(False, says)


def check_07_slope(answer) -> Verdict:
    """answer: (A [G], p [G], tau) -> dL/dE [G] at ratio 1 and without KL."""
    if answer is None:
        return Verdict(None, "Write a function (A, p, tau) -> [G].")
    generator = torch.Generator().manual_seed(0)
    for G, tau in ((4, 0.5), (3, 2.0), (8, 0.1)):
        E, A = torch.randn(2, G, generator=generator, dtype=torch.float64)
        p, leaf = torch.softmax(-E / tau, 0), E.clone().requires_grad_()
        (-(torch.softmax(-leaf / tau, 0) / p * A).mean()).backward()
        try:
            given = answer(A, p, tau)
            given = None if given is None else torch.as_tensor(given).double()
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"It raised {error!r}.")
        if given is None:
            return Verdict(None, "The function returns nothing yet: return [G] slopes.")
        if given.shape != (G,):
            return Verdict(False, f"Expected {G} slopes, one a branch, got shape {list(given.shape)}.")
        want = leaf.grad
        if torch.allclose(given, want, atol=1e-6):
            continue
        for hint, wrong in (
            ("The sign is wrong: a good branch's slope is positive, so that descent lowers its energy.", -want),
            ("The objective is a mean over branches: divide by G.", want * G),
            ("The energies are divided by tau before the softmax: divide by tau.", want * tau),
            ("That is the pull alone; what all branches share is missing, p times the sum of A.", A / (G * tau)),
            ("Take the sum of A, not its mean.", (A - p * A.mean()) / (G * tau)),
            ("Every branch is as likely as every other only at the start: p, not 1 / G.", (A - A.mean()) / (G * tau)),
        ):
            if torch.allclose(given, wrong, atol=1e-6):
                return Verdict(False, hint)
        got, due = ([round(x, 3) for x in w.tolist()] for w in (given, want))
        return Verdict(False, f"For one group of {G} it gives {got}, autograd {due}.")
    return Verdict(True, "It agrees with autograd in groups of 4, 3 and 8.")


def check_07_kl(answer) -> Verdict:
    """answer: (log_p [G], log_p_init [G]) -> KL(pi || pi_init), a number."""
    if answer is None:
        return Verdict(None, "Write a function (log_p, log_p_init) -> a number.")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        log_p, initial = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(1)
        want = sum(math.exp(a) * (a - b) for a, b in zip(log_p.tolist(), initial.tolist(), strict=True))
        back = sum(math.exp(b) * (b - a) for a, b in zip(log_p.tolist(), initial.tolist(), strict=True))
        try:
            given = answer(log_p, initial)
            given = None if given is None else float(given)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"It raised {error!r}.")
        if given is None:
            return Verdict(None, "The function returns nothing yet: return one number.")
        if math.isclose(given, want, rel_tol=1e-4):
            continue
        for hint, wrong in (
            ("That is the KL the other way round: weigh by the policy's own probabilities.", back),
            ("The sign is wrong: a KL is never negative.", -want),
            ("Sum over the branches, do not average.", want / 5),
            ("Weigh each branch by its probability.", float((log_p - initial).sum())),
        ):
            if math.isclose(given, wrong, rel_tol=1e-4):
                return Verdict(False, hint)
        return Verdict(False, f"It gives {given:.4f}, a loop over branches {want:.4f}.")
    return Verdict(True, "It agrees with a loop over branches, and is 0 only where nothing has moved.")


def check_07(answer) -> Verdict:
    """answer: like `grpo.clipped_objective`, (log_p, log_p_old, A, clip_range_low, clip_range_high) -> loss ()."""
    if answer is None:
        return Verdict(
            None, "Write a function (log_p, log_p_old, A, clip_range_low, clip_range_high) -> loss, a single number."
        )
    generator = torch.Generator().manual_seed(0)
    cases = [torch.randn(2, 6, generator=generator, dtype=torch.float64) for _ in range(20)]
    wrongs = {  # plausible slips, one branch at a time; each names itself when an answer equals it
        "the ratio is not clipped": lambda r, c, a: r * a,
        "only the clipped ratio is used: of the two products the smaller counts": lambda r, c, a: c * a,
        "of the two products the larger counts instead of the smaller": lambda r, c, a: max(r * a, c * a),
        "the ratio is old over new: it is new over old": lambda r, c, a: min(a / r, min(max(1 / r, 0.9), 1.3) * a),
        "the ratio is clipped to the two numbers, not to 1 - clip_range_low and 1 + clip_range_high": lambda r, c, a: (
            min(r * a, min(max(r, 0.1), 0.3) * a)
        ),
    }

    def by_hand(scores: Tensor, old: Tensor, A: Tensor, low: float, high: float, term=None) -> float:
        total = 0.0
        for now, before, a in zip(scores.tolist(), old.tolist(), A.tolist(), strict=True):
            r = math.exp(now - before)
            c = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
            total += term(r, c, a) if term else min(r * a, c * a)
        return -total / len(A)

    tried = []  # (what the answer gives, arguments)
    for scores, A in cases:
        log_p, log_p_old = scores.log_softmax(0), (0.5 * scores.flip(0)).log_softmax(0)
        leaf = log_p.clone().requires_grad_()
        try:
            given = answer(leaf, log_p_old, A, 0.1, 0.3)
            if given is None:
                return Verdict(None, "The function returns nothing yet: return the loss, a single number.")
            if isinstance(given, tuple):
                return Verdict(False, f"Return the loss alone, a single number; this is a tuple of {len(given)}.")
            given = torch.as_tensor(given)
            if given.numel() != 1:
                return Verdict(False, f"Expected one number, the mean over branches, got shape {list(given.shape)}.")
            if not given.requires_grad:
                return Verdict(False, "No gradient reaches log_p: compute the loss with torch operations on it.")
            given.sum().backward()
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"It raised {error!r}.")
        tried.append((given.item(), (log_p, log_p_old, A, 0.1, 0.3), leaf.grad))

    def same(term=None, sign: float = 1.0, factor: float = 1.0, swap: bool = False) -> bool:
        def wanted(args) -> float:
            args = (*args[:3], args[4], args[3]) if swap else args
            return sign * factor * by_hand(*args, term=term)

        return all(math.isclose(seen, wanted(args), rel_tol=1e-4, abs_tol=1e-6) for seen, args, _ in tried)

    if same():
        for _, args, gradient in tried:  # by differences: a detached ratio gives the right value and no gradient
            tiny, one = 1e-6, torch.eye(6, dtype=torch.float64)
            slope = [by_hand(args[0] + tiny * e, *args[1:]) - by_hand(args[0] - tiny * e, *args[1:]) for e in one]
            if not torch.allclose(gradient, torch.tensor(slope, dtype=torch.float64) / (2 * tiny), atol=1e-4):
                return Verdict(False, "The values are right, the gradient is not: is something detached, or in place?")
        return Verdict(True, "Values and gradients agree with a loop over branches, in 20 random groups.")
    for message, term in wrongs.items():
        if same(term):
            return Verdict(False, f"In your loss {message}.")
    if same(sign=-1.0):
        return Verdict(False, "The sign is wrong: a loss is made smaller, and good branches should become likelier.")
    if same(factor=6.0):
        return Verdict(False, "This is the sum over branches; the objective is their mean.")
    if same(swap=True):
        return Verdict(
            False,
            "clip_range_low and clip_range_high are swapped: the range is 1 - clip_range_low to 1 + clip_range_high.",
        )
    seen, args, _ = tried[0]
    return Verdict(False, f"For the first random group it gives {seen:.4f}, a loop over branches {by_hand(*args):.4f}.")


# ------------------------------------------------------- 08 a fair comparison, two diagnoses, two rules for stopping


def check_08_paired(answer) -> Verdict:
    """answer: (before [N], after [N]) -> standard error of the mean change, of the same N prompts and noise."""
    if answer is None:
        return Verdict(None, "Write a function (before, after) -> one number.")
    generator = torch.Generator().manual_seed(0)
    for n in (16, 64):
        before = torch.rand(n, generator=generator, dtype=torch.float64)
        after = before + 0.05 + 0.02 * torch.randn(n, generator=generator, dtype=torch.float64)
        change = [b - a for a, b in zip(before.tolist(), after.tolist(), strict=True)]
        mean = sum(change) / n
        std = math.sqrt(sum((x - mean) ** 2 for x in change) / (n - 1))
        try:
            given = answer(before, after)
            given = None if given is None else float(given)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"It raised {error!r}.")
        if given is None:
            return Verdict(None, "The function returns nothing yet: return one number.")
        if math.isclose(given, std / math.sqrt(n), rel_tol=0.04):  # divided by n or by n - 1
            continue
        apart = math.sqrt(float(before.var() + after.var()) / n)
        for hint, wrong in (
            ("That is right for two sets of different prompts. These are the same: look at the changes.", apart),
            ("That is the spread of the changes; the error of their mean is smaller by the root of N.", std),
            ("Divide by the root of N, not by N.", std / n),
            ("That is the mean change itself; asked is how sure it is.", mean),
        ):
            if math.isclose(given, wrong, rel_tol=0.04):
                return Verdict(False, hint)
        return Verdict(False, f"For {n} made-up prompts it gives {given:.4f}, expected {std / math.sqrt(n):.4f}.")
    return Verdict(True, "Prompts differ far more than training changes them, and pairs take that out.")


def check_08_diagnose(answer, runs: dict, num_generations: int) -> Verdict:
    """answer: {run: "healthy", "hacked" or "dead"}; runs: {run: lines of metrics.jsonl, with a held-out curve}."""
    kinds = ("healthy", "hacked", "dead")
    named = isinstance(answer, dict) and set(answer) == set(runs)
    if not named or any(kind not in kinds for kind in answer.values()):
        return Verdict(_wrong(answer), f"Give every run of {', '.join(runs)} one of the words {', '.join(kinds)}.")

    def change(logs: list, name: str) -> float:
        return [line[f"eval/{name}"] for line in logs if f"eval/{name}" in line][-1] - logs[0][f"eval0/{name}"]

    for run, logs in runs.items():
        entropies = [line["entropy"] for line in logs if "entropy" in line]
        if max(entropies[-5:]) < 0.12 * math.log(num_generations):
            kind, sign = "dead", "its entropy is near 0, so one branch has all the probability"
        elif change(logs, "reward") > 0 and min(change(logs, "coherent"), change(logs, "journey")) < -0.1:
            kind, sign = "hacked", "its reward rises while what the judge sees falls"
        else:
            kind, sign = "healthy", "branches are compared to the end, and the judge's shares stay"
        if answer[run] != kind:
            return Verdict(False, f"Run {run} is not {answer[run]}: {sign}.")
    return Verdict(True, "The judge unmasks the hacked run and the entropy the dead one; the reward shows neither.")


def check_08_alarm(answer) -> Verdict:
    """answer: (rewards, journeys), the held-out curves so far, one point every few updates -> bool: is the reward being
    hacked?"""
    if answer is None:
        return Verdict(None, "Write a function (rewards, journeys) -> bool.")
    runs = {  # name: (reward from, to; journeys from, to; whether it should ring)
        "healthy": ((1.6, 1.9), (0.95, 0.95), False),
        "hacked": ((1.6, 1.9), (0.95, 0.4), True),
        "unlucky": ((1.6, 1.4), (0.95, 0.5), False),
        "weak from the start": ((1.6, 1.9), (0.6, 0.62), False),
    }
    why = {
        "healthy": "journeys only tremble there",
        "unlucky": "there the reward falls as well: bad luck or a bad rate, but no hack",
        "weak from the start": "journeys are poor there, but they do not fall: compare with the first point",
    }
    for seed in range(5):
        noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)).mul(0.015)
        noise[:, [0, -1]] = 0
        for name, (reward, journeys, due) in runs.items():
            way = torch.linspace(0, 1, 12)
            curves = [(a + (b - a) * way + e).tolist() for (a, b), e in zip((reward, journeys), noise, strict=True)]
            try:
                rang = [answer(*(curve[: t + 1] for curve in curves)) for t in range(12)]
            except Exception as error:  # an answer may be anything
                return Verdict(False, f"It raised {error!r}.")
            if all(ring is None for ring in rang) and due:
                return Verdict(None, "The function returns nothing yet, or never rings: return True for a hack.")
            if due and not any(rang):
                return Verdict(False, "It does not ring in a run whose reward rises by .3 while journeys fall to .4.")
            if not due and any(rang):
                return Verdict(False, f"It rings in the run {name!r}: {why[name]}.")
    return Verdict(True, "It rings where the reward rises and journeys fall, and nowhere else.")


def entropy_curves(num_generations: int, seed: int = 0) -> dict[str, list[float]]:
    """Made-up entropies of 60 updates, in nats: "healthy" (noisy, most of log G), "dips" (healthy, with two single
    updates near 0, which happens when one group has a clear winner), "low but alive" (a quarter of log G), "collapse"
    (from update 30 on one branch has nearly everything), "slow collapse" (the same within 20 updates)."""
    generator = torch.Generator().manual_seed(seed)
    most, n = math.log(num_generations), 60
    noise = 0.08 * torch.randn(5, n, generator=generator)
    step = torch.arange(n)
    level = torch.stack([
        torch.full((n,), 0.8), torch.full((n,), 0.8), torch.full((n,), 0.25),
        torch.where(step < 30, 0.8, 0.06), 0.8 - 0.74 * ((step - 25) / 20).clamp(0, 1),
    ])  # fmt: skip
    noise = torch.where(level < 0.3, 0.1 * noise, noise)
    curves = (level + noise).clamp(0.005, 0.99)
    curves[1, [12, 40]] = 0.02
    names = ("healthy", "dips", "low but alive", "collapse", "slow collapse")
    return {name: (most * curve).tolist() for name, curve in zip(names, curves, strict=True)}


def check_08(answer, recorded: list[float] | None = None, num_generations: int = 8) -> Verdict:
    """answer: a stop rule `(entropies so far, num_generations) -> bool`, asked after every update. `recorded`: the
    entropies of a real run of `num_generations` branches, which did not collapse."""
    if answer is None:
        return Verdict(None, "Write a function (entropies, num_generations) -> bool: should the run stop now?")

    def stops(curve: list[float], g: int) -> int | None:
        """The update after which the rule stops the run; None: never."""
        return next((t for t in range(len(curve)) if answer(curve[: t + 1], g)), None)

    try:
        if all(answer([2.0] * 10 + [0.0] * n, 8) is None for n in (0, 30)):  # None alone means "go on"
            return Verdict(None, "The function returns nothing yet: return True to stop, False to go on.")
        for g in (2, 8, 64):
            for seed in range(5):
                curves = entropy_curves(g, seed)
                for name, why in (
                    ("healthy", "its entropy is noisy but high"),
                    ("dips", "two single groups had a clear winner, and the next ones were fine"),
                    ("low but alive", "its entropy is low, but far from 0 and steady"),
                ):
                    if (t := stops(curves[name], g)) is not None:
                        return Verdict(False, f"With {g} branches it stops the run {name!r} after update {t}: {why}.")
                for name, dead in (("collapse", 30), ("slow collapse", 45)):
                    t = stops(curves[name], g)
                    if t is None or t > dead + 10:
                        when = "never" if t is None else f"only after update {t}"
                        says = f"With {g} branches the run {name!r} is dead from update {dead} on, and it stops {when}"
                        return Verdict(False, says + ": 10 updates later is too late.")
                    if t < dead - 15:
                        says = f"With {g} branches the run {name!r} is stopped after update {t}"
                        return Verdict(False, f"{says}, long before it is dead at {dead}.")
        t = stops(recorded, num_generations) if recorded else None
    except Exception as error:  # an answer may be anything
        return Verdict(False, f"It raised {error!r}.")
    if t is not None:
        return Verdict(False, f"It stops the recorded run after update {t}, at an entropy of {recorded[t]:.2f} nats.")
    return Verdict(True, "It stops what is dead within 10 updates, and lets noisy, dipping and low runs go on.")


# ------------------------------------------------------------------------------------- 09 a Backbone for a stub model


class StubVideoModel:
    """A tiny causal video model whose conventions are its own, as those of every new model are:

    - it predicts the clean video, not a velocity;
    - time is `timestep` [B], 1000 for pure noise and 0 for clean;
    - videos are [B, C, F, H, W];
    - `first` [B] is the absolute number of the first frame;
    - the past is `memory` [B, n, D], one row a remembered frame, in any order; n may be 0.
    """

    channels, width = 4, 6

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.look = torch.randn(self.channels, self.width, generator=generator)
        self.say = torch.randn(self.width, self.channels, generator=generator)
        self.query = torch.randn(self.channels, self.width, generator=generator)
        self.hear = torch.randn(8, self.channels, generator=generator) / 8

    def remember(self, video: Tensor, first: Tensor, words: Tensor) -> Tensor:
        """Clean video [B, C, F, H, W] -> what to keep of it, [B, F, D]."""
        self._check(video, first)
        place = torch.sin(0.3 * (first[:, None] + torch.arange(video.shape[2])))  # [B, F]
        said = torch.einsum("bld,dc->bc", words, self.hear)[:, None]
        return torch.tanh((video.mean((3, 4)).transpose(1, 2) + said) @ self.look + place[..., None])

    def __call__(self, video: Tensor, timestep: Tensor, first: Tensor, words: Tensor, memory: Tensor) -> Tensor:
        """Noisy video [B, C, F, H, W] at `timestep` [B] -> the clean video, same shape."""
        self._check(video, first)
        if timestep.shape != first.shape or memory.ndim != 3 or len(memory) != len(video):
            raise ValueError(
                f"expected timestep [B] and memory [B, n, {self.width}] for B = {len(video)}, got "
                f"{list(timestep.shape)} and {list(memory.shape)}"
            )
        share = 1 - 0.9 * timestep / 1000  # [B] how much of the input is trusted
        place = torch.sin(0.3 * (first[:, None] + torch.arange(video.shape[2])))
        q = video.mean((3, 4)).transpose(1, 2) @ self.query + place[..., None]  # [B, F, D]
        recalled = (q @ memory.transpose(1, 2)).softmax(-1) @ memory if memory.shape[1] else torch.zeros_like(q)
        said = torch.einsum("bld,dc->bc", words, self.hear)
        drawn = torch.tanh(recalled @ self.say + said[:, None]).transpose(1, 2)[..., None, None]  # [B, C, F, 1, 1]
        return share[:, None, None, None, None] * video + (1 - share)[:, None, None, None, None] * drawn

    def _check(self, video: Tensor, first: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != self.channels or first.shape != video.shape[:1]:
            raise ValueError(
                f"expected video [B, {self.channels}, F, H, W] and first [B], got {list(video.shape)} and "
                f"{list(first.shape)}"
            )


def backbone_faults(backbone, latent_shape: tuple[int, int, int], text: Tensor) -> str:
    """What is wrong with a `rollout.Backbone`, in a sentence; "" when it keeps the contract. For any model:
    `backbone_faults(WanBackbone(transformer), (16, 8, 8), text)`. latent_shape C, H, W; text [1, L, D].

    Looked at: shapes; a number and a vector of starts; rows of a batch that do not see each other; a history that
    matters and is only read; and the one thing that catches the rest: a branch that reads its ordinary frames has, when
    replayed, energy 0."""
    from kvpo_min.chr import Plan, Window, uniform_routes
    from kvpo_min.rollout import Sampler, draw_noise, fork, replay
    from kvpo_min.tve import schedule, step_energies

    generator = torch.Generator().manual_seed(0)
    window, sigma = Window(), torch.tensor([0.9, 0.4])
    x = torch.randn(2, window.block, *latent_shape, generator=generator)
    v = backbone.velocity(x, sigma, 0, text, None)
    if not isinstance(v, Tensor) or v.shape != x.shape:
        return f"velocity must give {list(x.shape)}, the shape of x, got {list(getattr(v, 'shape', [type(v)]))}"
    kv = backbone.encode(x, 0, text, None)
    if not isinstance(kv, Tensor) or kv.ndim != 7 or kv.shape[1:4] != (2, 2, window.block):
        return (
            f"encode must give [layers, 2, B = 2, F = {window.block}, tokens, heads, D], got "
            f"{list(getattr(kv, 'shape', [type(kv)]))}"
        )
    kv = kv.flatten(3, 4)  # as `KVHistory.read` hands it out: [layers, 2, B, tokens read, heads, D]
    before = kv.clone()
    now = backbone.velocity(x, sigma, 3, text, kv)
    if not kv.equal(before):
        return "velocity changed the history it was given: kv is read only"
    if torch.allclose(now, backbone.velocity(x, sigma, 3, text, kv.roll(1, 2) + 1.0)):
        return "velocity does not look at kv: another history gives the same velocity"
    starts = backbone.velocity(x, sigma, torch.tensor([3, 3]), text, kv)
    if not torch.allclose(now, starts, atol=1e-4):
        return "start 3 and start [3, 3] must give the same velocity: it may be a number or [B]"
    shared, copied = (backbone.velocity(x, sigma, 3, text, k) for k in (kv[:, :, :1], kv[:, :, [0, 0]]))
    if not torch.allclose(shared, copied, atol=1e-4):
        return "kv of batch 1 must serve the whole batch: expand it"
    alone = backbone.velocity(x[1:], sigma[1:], 3, text, kv[:, :, 1:])
    if not torch.allclose(now[1:], alone, atol=1e-4):
        return "a row of the batch alone gives another velocity than in the batch: rows must not see each other"
    many = backbone.encode(x, 3, text, kv)
    if not torch.allclose(many[:, :, 1:], backbone.encode(x[1:], 3, text, kv[:, :, 1:]), atol=1e-4):
        return "encode gives other keys and values for a row alone than in the batch"

    plan = Plan(12, range(3, 11), uniform_routes(range(3, 11), 5, 2, generator), 2)
    sampler = Sampler(schedule(), window)
    noise = draw_noise(6, 4, (window.block, *latent_shape), generator)
    with torch.no_grad():
        made = fork(backbone, [text], noise, plan, 18, 18, sampler, 1)
        E = step_energies(replay(backbone, made, sampler, branches=3), made.trajectory.velocity).sum((1, 2))
    if not E.isfinite().all():
        return f"energies are not finite: {E.tolist()}"
    if not E[2] <= 1e-6 + 1e-4 * E[:2].mean():
        return f"the anchor's energy must be 0, got {E[2]:.2g}: the replay sees another model than the rollout did"
    if not E[:2].min() > 1e-10:
        return "a routed branch has energy 0: the history it read changed nothing"
    return ""


def check_09(answer) -> Verdict:
    """answer: a class whose instances, `answer(StubVideoModel())`, are a `rollout.Backbone`."""
    if answer is None:
        return Verdict(None, "Write a class with __init__(self, model), velocity and encode.")
    model = StubVideoModel()
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3))
    latent = (model.channels, 4, 4)
    try:
        backbone = answer(model)
        generator = torch.Generator().manual_seed(1)
        x, sigma = torch.randn(2, 3, *latent, generator=generator), torch.tensor([1.0, 0.625])
        given = backbone.velocity(x, sigma, 6, text, None)
        if given is None:
            return Verdict(None, "velocity returns nothing yet: return v = noise - x0, with the shape of x.")
        fault = backbone_faults(backbone, latent, text)
    except Exception as error:  # an answer may be anything
        return Verdict(False, f"It raised {error!r}.")
    if fault:
        return Verdict(False, fault[0].upper() + fault[1:] + ".")
    for b in range(2):  # one video at a time, by the model's own conventions
        memory = torch.zeros(1, 0, model.width)
        x0 = model(x[b : b + 1].transpose(1, 2), 1000 * sigma[b : b + 1], torch.tensor([6]), text, memory)
        v = (x[b] - x0[0].transpose(0, 1)) / sigma[b]
        if not torch.allclose(given[b], v, atol=1e-4):
            if torch.allclose(given[b], -v, atol=1e-4):
                return Verdict(False, "The sign is wrong: v = noise - x0 = (x - x0) / sigma.")
            if torch.allclose(given[b], x0[0].transpose(0, 1), atol=1e-4):
                return Verdict(False, "This is the clean video; asked is the velocity, (x - x0) / sigma.")
            says = f"The velocity is off at sigma {sigma[b]:g}"
            return Verdict(False, f"{says}: is the timestep 1000 sigma, and is the residual divided by sigma?")
    kv = backbone.encode(x, 6, text, None)
    past = [backbone.velocity(x, sigma, 9, text, kv.flatten(3, 4)[:, :, :, rows]) for rows in ([0, 1, 2], [0], [2])]
    for rows, seen in zip(([0, 1, 2], [0], [2]), past, strict=True):
        words = text.expand(2, -1, -1)
        memory = model.remember(x.transpose(1, 2), torch.tensor([6, 6]), words)[:, rows]
        x0 = model(x.transpose(1, 2), 1000 * sigma, torch.tensor([9, 9]), words, memory)
        v = (x - x0.transpose(1, 2)) / sigma[:, None, None, None, None]
        if kv.flatten(3, 4).shape[3] != 3 or not torch.allclose(seen, v, atol=1e-4):
            return Verdict(
                False,
                "With a history the velocity is off: what is read must be the rows that `remember` gave for those "
                "frames, and `encode` must remember the frames at `start`.",
            )
    return Verdict(True, "Velocities agree with the model's own conventions, and an unrouted replay has energy 0.")


def check_09_shape(answer, kv: Tensor) -> Verdict:
    """answer: the shape [layers, 2, B, F, tokens a frame, heads, D] of the keys and values of a block."""
    if answer is None:
        return Verdict(None, "Give seven numbers: layers, 2, B, frames, tokens a frame, heads, head width.")
    try:
        named = [int(n) for n in answer]
    except (TypeError, ValueError):
        return Verdict(False, f"Expected seven numbers, got {answer!r}.")
    names = ("layers", "keys and values", "videos", "frames", "tokens a frame", "heads", "head width")
    if len(named) != len(names):
        return Verdict(False, f"Expected seven numbers ({', '.join(names)}), got {len(named)}.")
    if wrong := [name for name, a, b in zip(names, named, kv.shape, strict=True) if a != b]:
        hint = " A token is a patch of 2 x 2 latents." if "tokens a frame" in wrong else ""
        return Verdict(False, f"Not right: {', '.join(wrong)}.{hint}")
    return Verdict(True, f"{kv.numel():,} numbers for {kv.shape[3]} frames.")


def check_09_reward(answer) -> Verdict:
    """answer: a reward (videos [N, F, 3, H, W], prompts) -> [N] that is higher the less neighbouring frames differ."""
    if answer is None:
        return Verdict(None, "Write a function (videos, prompts) -> one number a video.")
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(3, 1, 3, 8, 8, generator=generator).expand(-1, 6, -1, -1, -1)
    noise = torch.randn(3, 6, 3, 8, 8, generator=generator)
    levels = [(still + size * noise).clamp(0, 1) for size in (0.0, 0.05, 0.2)]
    drift = torch.linspace(0.2, 0.8, 6).view(1, 6, 1, 1, 1).expand(3, -1, 3, 8, 8)
    blink = drift[:, [0, 5, 1, 4, 2, 3]]  # the same frames in another order
    scores = []
    try:
        for videos in (*levels, drift, blink):
            given = answer(videos, ["a disc"] * 3)
            if given is None:
                return Verdict(None, "The function returns nothing yet: return one number a video.")
            given = torch.as_tensor(given).float()
            if given.shape != (3,) or not bool(given.isfinite().all()):
                return Verdict(False, f"Expected 3 finite numbers, one a video, got {given!r}.")
            scores.append(given)
        alone = torch.as_tensor(answer(levels[1][:1], ["a disc"])).float()
    except Exception as error:  # an answer may be anything
        return Verdict(False, f"It raised {error!r}.")
    if not torch.allclose(alone, scores[1][:1], atol=1e-6):
        return Verdict(False, "A video alone gets another score than among others: take the mean per video.")
    if bool((scores[0] < scores[2]).all()):
        return Verdict(False, "Flicker is rewarded: higher is better, so the sign is wrong.")
    if not bool((scores[0] > scores[1]).all() and (scores[1] > scores[2]).all()):
        return Verdict(False, "Still, a little noise, much noise: the score must fall in this order.")
    if not bool((scores[3] > scores[4]).all()):
        return Verdict(False, "The same frames in a jumpy order must score less: look at neighbouring frames.")
    return Verdict(True, "Still videos score best, flicker worst, and every video is scored on its own.")


def check_09_memory(answer) -> Verdict:
    """answer: "branches", "window" and "pixels" in the order of what more of each costs, least first: 16 branches for
    8, 12 past frames for 6, 720 x 1280 pixels for 480 x 832."""
    from kvpo_min.wan.real import memory_plan

    names = ("branches", "window", "pixels")
    if answer is None:
        return Verdict(None, f"Put {', '.join(names)} in order, the one that costs least first.")
    try:
        named = [str(name) for name in answer]
    except TypeError:
        named = []
    if sorted(named) != sorted(names):
        return Verdict(False, f"Expected each of {', '.join(names)} once, got {answer!r}.")
    changes = ({"num_generations": 16}, {"past": 12}, {"height": 720, "width": 1280})
    cost = {name: sum(memory_plan(**change).values()) for name, change in zip(names, changes, strict=True)}
    if named == sorted(names, key=cost.get):
        return Verdict(True, ", ".join(f"{name} {cost[name]:.1f} GiB" for name in named) + ".")
    hint = "Branches are made one at a time and share their past." if named[0] != "branches" else (
        "Twice the pixels make every kept frame larger, not only the ones that are read."
    )  # fmt: skip
    return Verdict(False, hint)


# ------------------------------------------------------------------------------------- 10 six spoiled runs, recorded


def symptoms(log: list[dict]) -> dict[str, float]:
    """What a run's lines say of it: means over its updates, or, of the held-out curve, the change from start to end."""
    means = {
        "entropy": [line["entropy"] for line in log],
        "KL to the initial policy": [line["kl"] for line in log],
        "drift of the prefix": [line["prefix_drift"] for line in log],
        "norm of the gradient": [line["grad_norm"] for line in log],
        "groups with a branch above the anchor": [line["safe"] for line in log],
        "reward minus anchor": [line["reward"] - line["anchor_reward"] for line in log],
    }
    found = {name: sum(values) / len(values) for name, values in means.items()}
    for name in ("reward", "liked", "journey", "valid"):
        found[f"change of the held-out {name}"] = log[-1][f"eval/{name}"] - log[0][f"eval0/{name}"]
    return found


def check_10_names(answer, runs: dict) -> Verdict:
    """answer: {letter: name of what was changed}; runs: {letter: {"name": ..., "log": lines of metrics.jsonl}}, with
    the "healthy" one among them."""
    letters = [letter for letter in runs if letter != "healthy"]
    names = [runs[letter]["name"] for letter in letters]
    given = answer if isinstance(answer, dict) else {}
    if set(given) != set(letters) or sorted(map(str, given.values())) != sorted(names):
        return Verdict(
            _wrong(answer), f"Give each of {', '.join(letters)} one of the names {', '.join(sorted(names))}."
        )
    seen = {letter: symptoms(run["log"]) for letter, run in runs.items()}
    wrong = [letter for letter in letters if given[letter] != runs[letter]["name"]]
    if not wrong:
        return Verdict(True, "No single number tells all six apart: each has its own.")
    letter, healthy = wrong[0], seen["healthy"]
    spread = {key: max(abs(each[key] - healthy[key]) for each in seen.values()) or 1.0 for key in healthy}
    key = max(healthy, key=lambda key: abs(seen[letter][key] - healthy[key]) / spread[key])
    return Verdict(
        False,
        f"{len(letters) - len(wrong)} of {len(letters)} are right. {letter} is not {given[letter]!r}: what stands out "
        f"there is the {key}, {seen[letter][key]:.3f} against {healthy[key]:.3f} in the healthy run.",
    )


def check_10_most(answer, runs: dict, key: str) -> Verdict:
    """answer: the letter of the spoiled run with the largest value of a symptom, such as "KL to the initial policy"; a
    minus sign before the key: the smallest."""
    sign, key = (-1, key[1:]) if key.startswith("-") else (1, key)
    seen = {letter: symptoms(run["log"])[key] for letter, run in runs.items() if letter != "healthy"}
    if answer not in seen:
        return Verdict(_wrong(answer), f"Give one of the letters {', '.join(seen)}.")
    best = max(seen, key=lambda letter: sign * seen[letter])
    if seen[answer] == seen[best]:
        return Verdict(
            True, f"{seen[best]:.3f}; the {key} of the healthy run: {symptoms(runs['healthy']['log'])[key]:.3f}."
        )
    return Verdict(False, f"The {key} of {answer} is {seen[answer]:.3f}, and another run's {seen[best]:.3f}.")


def check_10_alarm(answer, runs: dict, least: int = 3) -> Verdict:
    """answer: a rule `line -> bool`, asked of every update's line without its held-out curve. It must be silent in the
    healthy run and ring in `least` of the others."""
    if answer is None:
        return Verdict(None, "Write a function: the line of an update -> True if something is wrong.")
    rings = {}
    for letter, run in runs.items():
        lines = [{key: value for key, value in line.items() if not key.startswith("eval")} for line in run["log"]]
        try:
            rings[letter] = [answer(line) for line in lines]
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"It raised {error!r}. A line holds {', '.join(sorted(lines[0]))}.")
    if all(ring is None for each in rings.values() for ring in each):
        return Verdict(None, "The function returns nothing yet: return True or False.")
    if any(rings["healthy"]):
        at = [bool(ring) for ring in rings["healthy"]].index(True)
        return Verdict(False, f"It rings in the healthy run, at update {at}.")
    caught = [letter for letter, each in rings.items() if any(each)]
    if len(caught) < least:
        return Verdict(
            False, f"It is silent in the healthy run, but it catches {len(caught)} of the others, not {least}."
        )
    return Verdict(True, f"It catches {', '.join(caught)} from training numbers alone; the rest need held-out films.")


def _careful(check):
    @functools.wraps(check)
    def checked(*args, **kwargs) -> Verdict:
        try:
            return check(*args, **kwargs)
        except Exception as error:  # an answer may be anything
            return Verdict(False, f"This is not the kind of answer that is asked for: {type(error).__name__}, {error}.")

    return checked


globals().update({name: _careful(f) for name, f in list(globals().items()) if name.startswith("check_")})
