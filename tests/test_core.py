"""The core files against closed forms, naive loops, finite differences and numbers worked out by hand."""

import ast
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from kvpo_min.chr import (
    DROPPED,
    NEAREST,
    ROUTED,
    SINK,
    Window,
    branch_frames,
    chunk_of,
    chunk_starts,
    dispersed_routes,
    eligible_forks,
    ordinary_frames,
    overlap,
    plan,
    plan_official,
    pool,
    route_mask,
    uniform_routes,
)
from kvpo_min.config import TrainConfig
from kvpo_min.grpo import (
    anchor_advantages,
    branch_is_safe,
    branch_kl,
    clipped_objective,
    fuse,
    kvpo_loss,
    log_ratio,
    safety_scale,
)
from kvpo_min.tve import (
    Trajectory,
    calibrate_tau,
    energy_weights,
    gibbs_entropy,
    gibbs_log_prob,
    schedule,
    step_energies,
    trajectory_energy,
    velocity_to_x0,
    x0_to_velocity,
)

PACKAGE = Path(__file__).parent.parent / "kvpo_min"
LONGLIVE = Window()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- copied alone


@pytest.mark.parametrize("name", ["chr", "tve", "grpo", "rewards"])
def test_file_can_be_copied_alone(name, tmp_path):
    source = (PACKAGE / f"{name}.py").read_text()
    (tmp_path / f"{name}.py").write_text(source)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {name}; "
        f"assert {name}.__file__.startswith({str(tmp_path)!r}) and 'kvpo_min' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    imported = set()  # at import; an adapter may import more inside a function
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("a sibling" if node.level else node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


# ---------------------------------------------------------------- chr


def test_chunks_of_147_frames():
    assert chunk_starts(147) == [0, 21, 39, 57, 75, 93, 111, 129]  # kvpo_spec 1.4
    assert chunk_starts(39) == [0, 21]
    assert chunk_starts(21) == [0]
    chunks = [chunk_of(frame, 147) for frame in range(147)]
    assert chunks[:21] == [range(21)] * 21 and chunks[21:39] == [range(21, 39)] * 18 and chunks[146] == range(129, 147)
    assert chunk_of(21, 32) == range(21, 32) and chunk_of(20, 20 + 1) == range(21)


def test_ordinary_frames():
    assert ordinary_frames(0, LONGLIVE).tolist() == []
    assert ordinary_frames(2, LONGLIVE).tolist() == [0, 1]
    assert ordinary_frames(6, LONGLIVE).tolist() == [0, 1, 2, 3, 4, 5]
    assert ordinary_frames(9, LONGLIVE).tolist() == list(range(9))
    assert ordinary_frames(39, LONGLIVE).tolist() == [0, 1, 2, 33, 34, 35, 36, 37, 38]
    assert ordinary_frames(9, Window(sink=0, past=2)).tolist() == [7, 8]
    assert ordinary_frames(39, LONGLIVE).dtype == torch.long


def test_pool_of_paper_and_authors():
    assert pool(42, LONGLIVE, nearest=1, perturb_num_blocks=5, gap=3) == range(24, 38)  # kvpo_spec 2.2
    assert pool(42, LONGLIVE, nearest=1, perturb_num_blocks=5) == range(24, 41)  # no hole before the nearest frame
    assert pool(21, LONGLIVE, nearest=0, perturb_num_blocks=5) == range(3, 21)  # everything after the sink
    assert len(pool(6, LONGLIVE, nearest=5, perturb_num_blocks=5)) == 0


def test_eligible_forks():
    authors = [21, 24, 39, 42, 57, 60, 75, 78, 93, 96, 111, 114]  # kvpo_spec 2.1
    assert eligible_forks(147, LONGLIVE, nearest=1, perturb_num_blocks=5, gap=3) == authors
    assert eligible_forks(147, LONGLIVE, nearest=1, perturb_num_blocks=5) == authors
    assert eligible_forks(147, LONGLIVE, nearest=1, perturb_num_blocks=5, first_chunks=2) == [21, 24]
    assert eligible_forks(39, LONGLIVE, nearest=1, perturb_num_blocks=5) == [21, 24]
    assert eligible_forks(21, LONGLIVE, nearest=1, perturb_num_blocks=3) == [12]
    assert eligible_forks(21, LONGLIVE, nearest=1, perturb_num_blocks=5) == []
    assert eligible_forks(39, LONGLIVE, nearest=0, perturb_num_blocks=1) == [12, 15, 18, 21, 24, 27, 30, 33, 36]
    assert eligible_forks(32, LONGLIVE, nearest=0, perturb_num_blocks=1) == [
        12,
        15,
        18,
        21,
        24,
        27,
    ]  # 30 and 31 are no block
    # Reach: 12 frames of history hold 9 after the sink, of which routing 3 blocks uses up 6; too few remain for 6.
    assert eligible_forks(147, Window(history=12), nearest=0, perturb_num_blocks=3) == []


def test_no_route_reads_the_future_and_all_rows_are_alike():
    for seed in range(20):
        for nearest in (0, 1, 2):
            p = plan(147, LONGLIVE, nearest, perturb_num_blocks=5, num_generations=8, generator=seeded(seed))
            assert p.fork in eligible_forks(147, LONGLIVE, nearest, 5) and p.perturb_num_blocks == 5
            assert p.routes.shape == (8, 6 - nearest)
            for start in range(p.fork, p.fork + 15, 3):
                frames = branch_frames(p.routes, start, LONGLIVE, nearest)
                assert frames.shape == (8, 9) == (8, len(ordinary_frames(start, LONGLIVE)))
                for row, route in zip(frames.tolist(), p.routes.tolist(), strict=True):
                    assert row == sorted({0, 1, 2, *route, *range(start - nearest, start)})  # ascending, nothing twice
                    assert row[-1] < start and set(route) <= set(p.pool)
                    # Still resident: the sink and the last 30 frames before the block.
                    assert all(f < 3 or f >= start - 30 for f in row)


def test_plan_comes_from_its_generator():
    for seed in range(10):
        p = plan(39, LONGLIVE, 1, 2, 4, seeded(seed))
        again = plan(39, LONGLIVE, 1, 2, 4, seeded(seed))
        assert again.fork == p.fork and again.routes.equal(p.routes)
    forks = {plan(39, LONGLIVE, 1, 2, 4, seeded(seed)).fork for seed in range(50)}
    assert len(forks) > 4


def test_a_fork_that_is_given_is_taken_or_refused():
    drawn = plan(39, LONGLIVE, 2, 4, 3, seeded(5), fork=27)
    assert drawn.fork == 27 and drawn.pool == pool(27, LONGLIVE, 2, 4) and drawn.routes.shape == (3, 4)
    with pytest.raises(ValueError, match=r"\[21, 24, 27\].*got 30"):
        plan(39, LONGLIVE, 2, 4, 3, seeded(5), fork=30)
    with pytest.raises(ValueError, match="compat"):
        TrainConfig(compat="official", fork=27)


def test_plan_official_differs_from_the_papers_only_where_documented():
    p = plan_official(42, 0, 1_000_003, 147, LONGLIVE, 1, 5, 8)  # kvpo_spec 2.2
    assert (p.fork, p.pool, p.perturb_num_blocks) == (42, range(24, 38), 5)
    assert p.routes[0].tolist() == [25, 31, 34, 35, 36] and p.routes[7].tolist() == [26, 27, 32, 33, 37]


def test_uniform_routes_are_uniform():
    frames, num_generations = range(3, 17), 7000
    routes = uniform_routes(frames, 5, num_generations, seeded())
    assert routes.shape == (num_generations, 5)
    assert (routes.diff(dim=1) > 0).all()  # ascending, none twice
    share = torch.bincount(routes.flatten(), minlength=17)[3:] / num_generations
    # Standard error of a share is sqrt(5/14 * 9/14 / 7000) = .0057; allow 5 of them.
    assert_close(share, torch.full((14,), 5 / 14), rtol=0, atol=0.029)
    assert uniform_routes(range(4), 4, 2, seeded()).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    "n_frames, n_routed, num_generations", [(14, 5, 8), (30, 9, 8), (12, 6, 3), (6, 6, 4), (7, 2, 16)]
)
def test_dispersed_routes_against_a_loop(n_frames, n_routed, num_generations):
    frames = range(10, 10 + n_frames)
    order = torch.randperm(n_frames, generator=seeded(5)).tolist()
    shift = max(1, n_frames // num_generations)
    expected = []
    for g in range(num_generations):
        expected.append(sorted(frames[order[(g * shift + i) % n_frames]] for i in range(n_routed)))
    assert dispersed_routes(frames, n_routed, num_generations, seeded(5)).tolist() == expected


def test_overlap_against_sets():
    routes = uniform_routes(range(3, 17), 5, 6, seeded(1))
    rows = [set(row) for row in routes.tolist()]
    expected = torch.tensor([[len(a & b) / len(a | b) for b in rows] for a in rows])
    assert_close(overlap(routes), expected)
    assert_close(
        overlap(torch.tensor([[1, 2], [2, 3], [4, 5]])), torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
    )


def test_route_mask_against_a_loop():
    p = plan(147, LONGLIVE, 2, 5, 4, seeded(3))
    frames = branch_frames(p.routes, p.fork + 6, LONGLIVE, 2)
    mask = route_mask(frames, p.fork + 6, LONGLIVE, 2)
    assert mask.dtype == torch.int8 and mask.shape == (4, p.fork + 6)
    for g, row in enumerate(frames.tolist()):
        for t in range(p.fork + 6):
            label = SINK if t < 3 else NEAREST if t >= p.fork + 4 else ROUTED
            assert mask[g, t] == (label if t in row else DROPPED)
    edges = branch_frames(
        torch.tensor([[3, 7], [4, 18]]), 21, LONGLIVE, 2
    )  # just after the sink, just before the nearest
    assert route_mask(edges, 21, LONGLIVE, 2)[0].tolist() == [1, 1, 1, 2, 0, 0, 0, 2, *[0] * 11, 3, 3]
    assert route_mask(edges, 21, LONGLIVE, 2)[1].tolist() == [1, 1, 1, 0, 2, *[0] * 13, 2, 3, 3]
    ordinary = route_mask(ordinary_frames(15, LONGLIVE)[None], 15, LONGLIVE, nearest=6)
    assert ordinary.tolist() == [[SINK] * 3 + [DROPPED] * 6 + [NEAREST] * 6]


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: Window(sink=-1), r"Window.sink.*got -1"),
        (lambda: Window(past=0), r"Window.past.*got 0"),
        (lambda: Window(block=0), r"Window.block.*got 0"),
        (lambda: Window(history=8), r"Window.history.*9.*got 8"),
        (lambda: chunk_starts(0), r"at least 1 frame, got 0, 21, 18"),
        (lambda: chunk_starts(39, rest=0), r"at least 1 frame, got 39, 21, 0"),
        (lambda: ordinary_frames(-1, LONGLIVE), r"0 or more, got -1"),
        (lambda: pool(21, LONGLIVE, 6, 5), r"nearest must be 0..5, .* got 6"),
        (lambda: pool(21, LONGLIVE, -1, 5), r"nearest must be 0..5, .* got -1"),
        (lambda: chunk_of(39, 39), r"0..38, got 39"),
        (lambda: chunk_of(-3, 39), r"0..38, got -3"),
        (lambda: eligible_forks(39, LONGLIVE, 1, 0), r"perturb_num_blocks.*got 0"),
        (lambda: eligible_forks(147, Window(4, 8, 4, 40), 1, 2), r"4 frames, got.*21 and 18"),
        (lambda: plan(147, Window(2, 8, 2, 40), 1, 2, 4, seeded()), r"2 frames"),
        (lambda: uniform_routes(range(4), 5, 2, seeded()), r"5 frames.*pool of 4"),
        (lambda: dispersed_routes(range(4), 5, 2, seeded()), r"5 frames.*pool of 4"),
        (lambda: uniform_routes(range(4), 0, 2, seeded()), r"at least 1, got 0 and 2"),
        (lambda: dispersed_routes(range(4), 1, 0, seeded()), r"at least 1, got 1 and 0"),
        (lambda: plan(21, LONGLIVE, 1, 5, 4, seeded()), r"no block can fork"),
        (lambda: plan_official(42, 0, 0, 21, LONGLIVE, 1, 5, 4), r"no block can fork"),
        (lambda: branch_frames(torch.tensor([[5, 21]]), 21, LONGLIVE, 1), r"got 0..21"),
        (lambda: branch_frames(torch.tensor([[5, -2]]), 21, LONGLIVE, 1), r"got -2..20"),
        (
            lambda: branch_frames(torch.tensor([[5, 20]]), 21, LONGLIVE, 1),
            r"read twice: .* lie in 3..19 .* \[\[5, 20\]\]",
        ),
        (lambda: branch_frames(torch.tensor([[5, 6], [2, 7]]), 21, LONGLIVE, 1), r"read twice"),
        (lambda: branch_frames(torch.tensor([[5, 5]]), 21, LONGLIVE, 1), r"read twice: .* differ within a branch"),
    ],
)
def test_chr_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# ---------------------------------------------------------------- tve


def trajectory(G=3, B=2, S=4, dtype=torch.float64, seed=0):
    z, x0 = torch.randn(2, G, B, S, 3, 2, 4, 4, dtype=dtype, generator=seeded(seed))
    return Trajectory(z, x0, schedule(S).to(dtype))


def test_schedule():
    assert_close(schedule(), torch.tensor([1, 0.9375, 5 / 6, 0.625]))
    assert_close(schedule(5, shift=1.0), torch.tensor([1, 0.8, 0.6, 0.4, 0.2]))
    assert schedule(1).tolist() == [1.0]


def test_velocity_and_x0_are_two_views_of_one_prediction():
    noise, x0 = torch.randn(2, 2, 3, 4, 4, 4, dtype=torch.float64, generator=seeded())
    sigma = torch.tensor([0.9, 0.3], dtype=torch.float64)  # one per sample
    z = (1 - sigma)[:, None, None, None, None] * x0 + sigma[:, None, None, None, None] * noise
    assert_close(x0_to_velocity(z, x0, sigma), noise - x0)
    assert_close(velocity_to_x0(z, noise - x0, sigma), x0)
    assert_close(x0_to_velocity(z[0], x0[0], 0.9), noise[0] - x0[0])
    half = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert x0_to_velocity(half, half, 0.5).dtype == torch.float32


def test_trajectory_velocity_and_branch_slices():
    t = trajectory()
    for s, sigma in enumerate(t.sigma):
        assert_close(t.velocity[:, :, s], (t.z[:, :, s] - t.x0[:, :, s]) / sigma)
    part = t[1:3]
    assert part.z.shape == (2, 2, 4, 3, 2, 4, 4)
    assert_close(part.velocity, t.velocity[1:3])
    assert_close(t[[2, 0]].x0, torch.stack([t.x0[2], t.x0[0]]))
    with pytest.raises(FrozenInstanceError):
        t.sigma = None


def test_energy_against_a_loop():
    t = trajectory()
    v_theta = t.velocity + torch.randn(t.z.shape, dtype=torch.float64, generator=seeded(1))
    weights = torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64)
    e = step_energies(v_theta, t.velocity)
    E = trajectory_energy(e, weights)
    for g in range(3):
        expected = 0.0
        for b in range(2):
            for s in range(4):
                r = v_theta[g, b, s] - t.velocity[g, b, s]
                assert_close(e[g, b, s], (r * r).sum() / r.numel())
                expected += weights[s] * e[g, b, s]
        assert_close(E[g], expected)
    assert_close(trajectory_energy(e), e.sum((1, 2)))
    assert_close(step_energies(v_theta[0, 0], t.velocity[0, 0]), e[0, 0])
    assert step_energies(t.velocity, t.velocity).eq(0).all()


def test_energy_is_computed_in_float32_or_better():
    a = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    b = a + 2**-7  # the next bfloat16
    assert_close(step_energies(b, a), torch.tensor(2.0**-14), rtol=0, atol=0)
    assert step_energies(a.double(), a.double()).dtype == torch.float64


def test_x0_and_velocity_energies_agree_through_sigma_squared():
    t = trajectory()
    v_theta = torch.randn(t.z.shape, dtype=torch.float64, generator=seeded(2))
    x0_theta = velocity_to_x0(t.z, v_theta, t.sigma)
    x0_energies = step_energies(x0_theta, t.x0)  # the same mean, over x0 residuals
    v_energies = step_energies(v_theta, t.velocity)
    assert_close(x0_energies, v_energies * t.sigma**2)
    # The authors' log score -sum mse_x0 / (2 * max(sigma, floor)^2) is ours at tau 2.
    for floor in (0.0, 0.7, 1.0):
        official = -(x0_energies / (2 * t.sigma.clamp(min=floor) ** 2)).sum((1, 2))
        E = trajectory_energy(v_energies, energy_weights(t.sigma, floor))
        assert_close(-E / 2, official)
        assert_close(gibbs_log_prob(E, tau=2.0), official.log_softmax(0))


def test_energy_weights_by_hand():
    sigma = torch.tensor([1.0, 0.5, 0.25])
    assert energy_weights(sigma).tolist() == [1, 1, 1]
    assert energy_weights(sigma, 1.0).tolist() == [1, 0.25, 0.0625]
    assert energy_weights(sigma, 0.5).tolist() == [1, 1, 0.25]


def test_gibbs_policy():
    E = torch.tensor([0.0, math.log(2.0), math.log(4.0)])
    assert_close(gibbs_log_prob(E, 1.0).exp(), torch.tensor([4 / 7, 2 / 7, 1 / 7]))
    assert_close(gibbs_log_prob(E, 0.5).exp(), torch.tensor([16 / 21, 4 / 21, 1 / 21]))
    assert_close(gibbs_log_prob(E + 5, 1.0), gibbs_log_prob(E, 1.0))
    assert_close(gibbs_entropy(gibbs_log_prob(torch.zeros(8), 1.0)), torch.tensor(math.log(8)))
    assert_close(gibbs_entropy(torch.tensor([0.5, 0.25, 0.25]).log()), torch.tensor(1.5 * math.log(2)))
    assert gibbs_entropy(torch.tensor([0.0, -math.inf])) == 0


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0])
def test_calibrated_tau_gives_the_target_spread(target):
    E = 0.05 + 0.001 * torch.rand(6, 8, generator=seeded())
    tau = calibrate_tau(E, target)
    assert isinstance(tau, float)
    spread = (-E / tau).std(dim=1, correction=0).mean()
    assert_close(spread, torch.tensor(target), rtol=1e-4, atol=0)
    assert gibbs_entropy(gibbs_log_prob(E[0], 1.0)) > math.log(8) - 1e-6  # uncalibrated: uniform
    assert gibbs_entropy(gibbs_log_prob(E[0], tau)) < math.log(8) - 0.02


NAN = float("nan")


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: schedule(0), r"steps >= 1 .* got steps 0"),
        (lambda: schedule(4, -1.0), r"shift > 0, got steps 4 and shift -1.0"),
        (lambda: trajectory()[0], r"one branch: \[g:g\+1\].* got \[2, 4, 3, 2, 4, 4\]"),
        (lambda: Trajectory(trajectory().z, trajectory(G=2).x0, schedule()), r"both be \[G, B, S"),
        (lambda: Trajectory(trajectory().z, trajectory().x0, schedule(3)), r"S = 4 levels above 0, got \[1.0,"),
        (lambda: Trajectory(trajectory().z, trajectory().x0, schedule() * 0), r"S = 4 levels above 0, got \[0.0,"),
        (
            lambda: step_energies(torch.ones(2, 1, 1, 1, 1), torch.ones(1, 1, 1, 1)),
            r"one shape .* \[2, 1, 1, 1, 1\] and",
        ),
        (lambda: step_energies(torch.ones(1, 1, 1), torch.ones(1, 1, 1)), r"\[..., F, C, H, W\], got \[1, 1, 1\]"),
        (lambda: trajectory_energy(torch.ones(2, 3)), r"energies \[G, B, S\] .* got \[2, 3\] and None"),
        (lambda: trajectory_energy(torch.ones(2, 3, 4), torch.ones(3)), r"weights \[S\], got \[2, 3, 4\] and \[3\]"),
        (lambda: gibbs_log_prob(torch.ones(2), 0.0), r"tau.*got 0.0"),
        (lambda: gibbs_log_prob(torch.ones(2), NAN), r"tau.*got nan"),
        (lambda: calibrate_tau(torch.ones(8)), r"energies \[N, G\] .* got \[8\]"),
        (lambda: calibrate_tau(torch.ones(8, 1)), r"2 branches or more .* got \[8, 1\]"),
        (lambda: calibrate_tau(torch.rand(2, 4), 0.0), r"target > 0, got \[2, 4\] and 0.0"),
        (lambda: calibrate_tau(torch.ones(2, 4)), r"spread of 0.0"),
        (lambda: calibrate_tau(torch.tensor([[1.0, NAN]])), r"spread of nan"),
        (
            lambda: calibrate_tau(torch.tensor([[1.0, 1e300]], dtype=torch.float64)),
            r"spread of inf",
        ),
    ],
)
def test_tve_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_levels_must_fit_the_latents():
    z = torch.randn(2, 3, 4, 4, generator=seeded())  # no frame axis: a sigma a row would broadcast to [2, 2, 3, 4, 4]
    for view in (x0_to_velocity, velocity_to_x0):
        with pytest.raises(ValueError, match=r"expected latents .* got \[2, 3, 4, 4\] and \[2\]"):
            view(z, z, torch.tensor([0.5, 0.6]))
        assert view(z, z, 0.5).shape == z.shape


def test_entropy_has_a_gradient_where_a_branch_has_none_of_the_probability():
    E = torch.tensor([0.0, 3.0, 0.1], requires_grad=True)
    log_p = gibbs_log_prob(E, 0.01)  # exp(-300) is 0
    gibbs_entropy(log_p).backward()
    tiny = 1e-4
    want = [
        (gibbs_entropy(gibbs_log_prob(E.detach().double() + tiny * e, 0.01))
         - gibbs_entropy(gibbs_log_prob(E.detach().double() - tiny * e, 0.01))) / (2 * tiny)
        for e in torch.eye(3, dtype=torch.float64)
    ]  # fmt: skip
    assert log_p[1].exp() == 0 and E.grad.isfinite().all()
    assert_close(E.grad.double(), torch.stack(want), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- grpo


def test_worked_example_of_one_component():
    """Numbers of kvpo_spec 4.4, recorded from the authors' code."""
    local = torch.tensor([8.1, 8.4, 7.9, 8.8, 8.2, 8.0, 8.6, 8.3])
    global_ = torch.tensor([6.4, 6.1, 6.3, 6.6, 6.2, 6.5, 6.0, 6.45])
    a_local = anchor_advantages({"vq": local}, {"vq": 8.25}, {"vq": 1.0})
    a_global = anchor_advantages({"vq": global_}, {"vq": 6.3}, {"vq": 1.0})
    expected = torch.tensor([-0.526233, 0.526233, -1.227881, 1.929528, -0.175412, -0.877058, 1.227882, 0.175412])
    assert_close(a_local, expected, rtol=1e-5, atol=1e-5)
    A = fuse(a_local, a_global)
    expected = torch.tensor([-0.268407, 0.010072, -1.229063, 2.5, -0.433916, -0.361236, 0.454064, 0.563080])
    assert_close(A, expected, rtol=1e-5, atol=1e-5)
    # With one component the scale of the anchor-relative step cancels (kvpo_spec appendix C.7).
    collapsed = (local - 8.25) / local.std(correction=0) + 0.5 * (global_ - 6.3) / global_.std(correction=0)
    assert_close(A, collapsed.clamp(-2.5, 2.5), rtol=1e-4, atol=1e-5)

    l_old = torch.tensor([-1.20, -1.05, -1.32, -1.11, -1.25, -1.18, -1.07, -1.29])
    l_init = torch.tensor([-1.22, -1.04, -1.31, -1.13, -1.24, -1.20, -1.06, -1.28])
    l_theta = torch.tensor([-1.18, -1.08, -1.30, -1.02, -1.27, -1.15, -1.09, -1.33], requires_grad=True)
    log_p, log_p_old, log_p_init = (gibbs_log_prob(-score, 1.0) for score in (l_theta, l_old, l_init))
    loss = kvpo_loss(log_p, log_p_old, log_p_init, A, kl_coef=10.0)
    loss.total.backward()
    assert_close(loss.total.item(), -0.160143, rtol=0, atol=2e-6)
    assert_close(loss.policy.item(), -0.174454, rtol=0, atol=2e-6)
    assert_close(10 * loss.kl.item(), 0.014311, rtol=0, atol=2e-6)
    grad = torch.tensor([0.092600, -0.046052, 0.174583, -0.168757, 0.027025, 0.119372, -0.086050, -0.112720])
    assert_close(l_theta.grad, grad, rtol=0, atol=1e-6)
    halved = kvpo_loss(log_p, log_p_old, log_p_init, A, kl_coef=10.0, scale=safety_scale(False, 0.5))
    assert_close(halved.total.item(), -0.080072, rtol=0, atol=2e-6)


def test_a_floor_of_the_spread_tells_noise_from_a_difference():
    rewards = {"vq": torch.tensor([0.9, 0.1, 0.5]), "ta": torch.tensor([0.501, 0.499, 0.5])}
    anchor, weights = {"vq": 0.1, "ta": 0.5}, {"vq": 1.0, "ta": 1.0}
    std = {name: torch.cat([r, torch.tensor([anchor[name]])]).std() for name, r in rewards.items()}
    want = sum((rewards[name] - anchor[name]) / (std[name] + 0.05) for name in rewards)
    A = anchor_advantages(rewards, anchor, weights, 0.05)
    assert_close(A, want)
    share = [anchor_advantages({"ta": rewards["ta"]}, {"ta": 0.5}, {"ta": 1.0}, eps)[0] for eps in (1e-8, 0.05)]
    assert share[0] > 1 and share[1] < 0.03  # a thousandth: all of the advantage, or hardly any


def test_gradient_formula_by_finite_differences():
    A = torch.tensor([1.3, -0.4, 0.7, -2.0], dtype=torch.float64)
    E = torch.tensor([0.031, 0.028, 0.035, 0.030], dtype=torch.float64, requires_grad=True)
    tau, h = 0.003, 1e-7
    log_p_old = gibbs_log_prob(E.detach(), tau)

    def total(energies):
        return kvpo_loss(gibbs_log_prob(energies, tau), log_p_old, log_p_old, A, kl_coef=0.0).total

    p = log_p_old.exp()
    formula = (A - p * A.sum()) / (len(A) * tau)
    steps = h * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(total(E + d) - total(E - d)) / (2 * h) for d in steps]).detach()
    (autograd,) = torch.autograd.grad(total(E), E)
    assert_close(differences, formula, rtol=1e-5, atol=1e-5)
    assert_close(autograd, formula)
    assert_close(formula.sum(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-9)  # a contrast
    assert formula[0] > 0 > formula[3]  # descent lowers the energy of the best branch


def test_gradient_ignores_an_offset_of_A_only_while_the_policy_is_uniform():
    A = torch.tensor([1.0, -0.5, 0.25])

    def gradient(E, A):
        E = E.clone().requires_grad_()
        log_p = gibbs_log_prob(E, 1.0)
        return torch.autograd.grad(kvpo_loss(log_p, log_p, log_p, A).total, E)[0]

    assert_close(gradient(torch.zeros(3), A + 7), gradient(torch.zeros(3), A))
    skewed = torch.tensor([0.0, 1.0, 2.0])
    assert (gradient(skewed, A + 7) - gradient(skewed, A)).abs().max() > 0.1


def test_ratio_is_exactly_one_at_equal_weights():
    log_p = gibbs_log_prob(torch.rand(8, generator=seeded()), 0.003).requires_grad_()
    loss = kvpo_loss(log_p, log_p, log_p, torch.randn(8, generator=seeded(1)))
    assert loss.ratio.tolist() == [1.0] * 8
    assert loss.clip_fraction == 0 and loss.kl == 0
    assert_close(loss.entropy, gibbs_entropy(log_p.detach()))
    assert loss.total.requires_grad and not any(
        t.requires_grad for t in (loss.policy, loss.kl, loss.ratio, loss.clip_fraction, loss.entropy)
    )


@pytest.mark.parametrize(
    "ratio, A, terms, moving, clipped",
    [  # min(rho * A, clip(rho, .9, 1.2) * A) per branch; which branches still have a gradient; share of rho outside
        ([1.0, 1.1, 0.95], [1.0, 2.0, -1.0], [1.0, 2.2, -0.95], [True, True, True], 0.0),
        ([1.5, 1.5, 1.0], [1.0, -1.0, 1.0], [1.2, -1.5, 1.0], [False, True, True], 2 / 3),
        ([0.5, 0.5, 1.0], [1.0, -1.0, 2.0], [0.5, -0.9, 2.0], [True, False, True], 2 / 3),
        ([1.3, 0.8, 2.0], [1.0, -2.0, 3.0], [1.2, -1.8, 3.6], [False, False, False], 1.0),
    ],
)
def test_clip_table(ratio, A, terms, moving, clipped):
    log_p_old = torch.zeros(3)
    log_p = torch.tensor(ratio).log().requires_grad_()
    loss, rho, fraction = clipped_objective(log_p, log_p_old, torch.tensor(A))
    assert_close(loss.item(), -sum(terms) / 3)
    assert_close(rho.detach(), torch.tensor(ratio))
    assert_close(fraction.item(), clipped)
    (grad,) = torch.autograd.grad(loss, log_p)
    assert (grad != 0).tolist() == moving
    assert_close(kvpo_loss(log_p, log_p_old, log_p_old, torch.tensor(A)).policy, loss.detach())  # same defaults


def test_log_ratio_is_clamped_and_detached():
    log_p = torch.tensor([0.0, -100.0, 1.0], requires_grad=True)
    log_p_old = torch.tensor([-100.0, 0.0, 0.5], requires_grad=True)
    r = log_ratio(log_p, log_p_old)
    assert r.tolist() == [20.0, -20.0, 0.5]
    r.sum().backward()
    assert log_p.grad.tolist() == [0, 0, 1] and log_p_old.grad is None


def test_only_the_policy_carries_gradient():
    def leaf():
        return torch.randn(4, generator=generator).requires_grad_()

    generator = seeded()
    score, score_old, score_init, rewards = (leaf() for _ in range(4))
    A = anchor_advantages({"vq": rewards}, {"vq": 0.1}, {"vq": 1.0})
    assert not A.requires_grad
    log_p, log_p_old, log_p_init = (gibbs_log_prob(-s, 1.0) for s in (score, score_old, score_init))
    advantages = leaf()
    kvpo_loss(log_p, log_p_old, log_p_init, advantages).total.backward()
    assert score.grad.any()
    assert [x.grad for x in (score_old, score_init, rewards, advantages)] == [None] * 4


def test_branch_kl():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert branch_kl(p.log(), p.log()) == 0
    assert_close(branch_kl(p.log(), q.log()).item(), 0.25 * math.log(2))  # .5 log 2 + 0 - .25 log 2
    for seed in range(20):
        a, b = torch.randn(2, 8, generator=seeded(seed)).log_softmax(1)
        assert branch_kl(a, b) > 0
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
        )
        assert_close(branch_kl(a, b), expected)


def test_kl_pulls_back_towards_the_initial_policy():
    E = torch.tensor([0.0, 1.0], requires_grad=True)  # the initial policy is uniform
    log_p = gibbs_log_prob(E, 1.0)
    zero = torch.zeros(2)
    (grad,) = torch.autograd.grad(kvpo_loss(log_p, log_p, gibbs_log_prob(zero, 1.0), zero).total, E)
    assert grad[0] < 0 < grad[1]  # descent raises the lower energy and lowers the higher one


def test_advantages_by_hand():
    rewards = {"vq": torch.tensor([1.0, 3.0]), "ta": torch.tensor([0.0, 10.0])}
    # vq: anchor 2, unbiased std of (1, 3, 2) is 1. ta: anchor 5, unbiased std of (0, 10, 5) is 5.
    A = anchor_advantages(rewards, {"vq": 2.0, "ta": torch.tensor(5.0)}, {"vq": 1.0, "ta": 0.5})
    assert_close(A, torch.tensor([-1.5, 1.5]))
    assert anchor_advantages({"vq": torch.tensor([1, 3])}, {"vq": 2}, {"vq": 1}).dtype == torch.float32


def test_component_without_variance_adds_exactly_nothing():
    vq, same = torch.tensor([0.1, 0.7, 0.3]), torch.full((3,), 0.3)
    alone = anchor_advantages({"vq": vq}, {"vq": 0.2}, {"vq": 1.0})
    both = anchor_advantages({"vq": vq, "ta": same}, {"vq": 0.2, "ta": 0.3}, {"vq": 1.0, "ta": 4.0})
    assert both.equal(alone)


@pytest.mark.parametrize("mode", ["none", "std", "zscore"])
def test_all_equal_rewards_give_zero_advantage_and_gradient(mode):
    rewards = {"vq": torch.full((4,), 0.3), "mq": torch.full((4,), 1.7)}
    A = anchor_advantages(rewards, {"vq": 0.3, "mq": 1.7}, {"vq": 1.0, "mq": 1.0})
    A = fuse(A, A, fuse_mode=mode)
    assert A.tolist() == [0, 0, 0, 0]
    E = torch.rand(4, generator=seeded(), requires_grad=True)
    log_p = gibbs_log_prob(E, 0.1)
    (grad,) = torch.autograd.grad(kvpo_loss(log_p, log_p, log_p, A, kl_coef=0.0).total, E)
    assert grad.tolist() == [0, 0, 0, 0]


def test_fuse_by_hand():
    local, global_ = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 8.0])  # population std 1 and 2, means 1 and 6
    assert_close(fuse(local, global_, fuse_mode="none", adv_clip_max=100.0), torch.tensor([2.0, 6.0]))
    assert_close(fuse(local, global_, fuse_mode="std", adv_clip_max=100.0), torch.tensor([1.0, 4.0]))
    assert_close(fuse(local, global_, fuse_mode="zscore"), torch.tensor([-1.5, 1.5]))
    assert_close(fuse(local, global_, 2.0, 0.25, fuse_mode="zscore"), torch.tensor([-2.25, 2.25]))
    assert_close(fuse(local, global_, adv_clip_max=2.5), torch.tensor([1.0, 2.5]))
    assert_close(fuse(-local, -global_, adv_clip_max=2.5), torch.tensor([-1.0, -2.5]))
    assert_close(fuse(local, None), local)
    flat = torch.tensor([3.0, 3.0])
    assert fuse(flat, None, fuse_mode="zscore", adv_clip_max=9.0).equal(flat)  # no spread to divide by


def test_safety():
    rewards, weights = {"vq": torch.tensor([1.0, 2.0]), "mq": torch.tensor([4.0, 3.0])}, {"vq": 1.0, "mq": 0.5}
    assert branch_is_safe(rewards, {"vq": 2.0, "mq": 2.9}, weights)  # 3.0 loses and 3.5 wins against 3.45
    assert not branch_is_safe(rewards, {"vq": 2.0, "mq": 3.0}, weights)  # a tie is not better
    assert not branch_is_safe(rewards, {"vq": torch.tensor(9.0), "mq": 0.0}, weights)
    assert [safety_scale(True), safety_scale(False), safety_scale(True, 0.5), safety_scale(False, 0.5)] == [
        1,
        0,
        1,
        0.5,
    ]
    E = torch.rand(2, requires_grad=True, generator=seeded())
    log_p = gibbs_log_prob(E, 1.0)
    init = torch.tensor([0.9, 0.1]).log()
    loss = kvpo_loss(log_p, log_p, init, torch.tensor([1.0, -1.0]), scale=safety_scale(False))
    assert torch.autograd.grad(loss.total, E)[0].tolist() == [0, 0]  # not even the KL acts
    assert loss.kl > 0


ONE = {"vq": torch.ones(2)}


def test_a_branch_that_is_reproduced_has_no_energy_in_bfloat16():
    """z and x0 may come in bfloat16; their difference is taken in float32, so it is that of the stored numbers."""
    z, x0 = (torch.randn(2, 1, 4, 3, 1, 2, 2, generator=seeded(k)).bfloat16() for k in range(2))
    sigma = schedule(4, 5.0)
    exact = (z.double() - x0.double()) / sigma.double()[:, None, None, None, None]
    v = Trajectory(z, x0, sigma).velocity
    assert v.dtype == torch.float32
    assert_close(v.double(), exact, rtol=1e-6, atol=1e-7)


def test_safety_and_advantages_agree_in_bfloat16():
    """A difference of half a step of bfloat16: both compare in float32."""
    rewards, anchor = {"vq": torch.full((3,), 8.0625, dtype=torch.bfloat16)}, {"vq": torch.tensor(8.05)}
    assert branch_is_safe(rewards, anchor, {"vq": 1.0}) and (anchor_advantages(rewards, anchor, {"vq": 1.0}) > 0).all()
    assert not branch_is_safe(rewards, {"vq": torch.tensor(8.07)}, {"vq": 1.0})


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: anchor_advantages({}, {}, {}), ValueError, r"at least one reward component, got none"),
        (lambda: anchor_advantages(ONE, {}, {"vq": 1}), KeyError, r"anchor lacks the reward components \['vq'\]"),
        (lambda: anchor_advantages(ONE, {"vq": 1}, {}), KeyError, r"weights lacks the reward components \['vq'\]"),
        (lambda: anchor_advantages(ONE, {"vq": 1, "ta": 1}, {"vq": 1}), KeyError, r"anchor names \['ta'\]"),
        (lambda: branch_is_safe(ONE, {"vq": 1}, {"vq": 1, "ta": 1}), KeyError, r"weights names \['ta'\]"),
        (
            lambda: branch_is_safe(ONE, {"vq": torch.ones(3)}, {"vq": 1}),
            ValueError,
            r"anchor\['vq'\].*one number",
        ),
        (
            lambda: anchor_advantages(ONE, {"vq": torch.ones(3)}, {"vq": 1}),
            ValueError,
            r"must be one number, got \[3\]",
        ),
        (lambda: anchor_advantages(ONE, {"vq": 1}, {"vq": math.nan}), ValueError, r"weights\['vq'\] must be finite"),
        (lambda: branch_is_safe({"vq": torch.tensor([])}, {"vq": 1}, {"vq": 1}), ValueError, r"must be \[G\]"),
        (
            lambda: anchor_advantages(
                {"vq": torch.ones(2), "ta": torch.ones(3)}, {"vq": 1, "ta": 1}, {"vq": 1, "ta": 1}
            ),
            ValueError,
            r"rewards\['ta'\].*got \[3\]",
        ),
        (
            lambda: anchor_advantages({"vq": torch.ones(2, 1)}, {"vq": 1}, {"vq": 1}),
            ValueError,
            r"\[G\].* got \[2, 1\]",
        ),
        (
            lambda: anchor_advantages({"vq": torch.tensor([1.0, NAN])}, {"vq": 1}, {"vq": 1}),
            ValueError,
            r"rewards\['vq'\].*got \[1.0, nan\]",
        ),
        (
            lambda: anchor_advantages({"vq": torch.ones(2)}, {"vq": torch.tensor(NAN)}, {"vq": 1}),
            ValueError,
            r"anchor\['vq'\].*got nan",
        ),
        (lambda: fuse(torch.ones(2), None, fuse_mode="max"), ValueError, r'"none", "std" or "zscore", got \'max\''),
        (lambda: fuse(torch.ones(2), torch.ones(3)), ValueError, r"alike, got \[2\] and \[3\]"),
        (lambda: fuse(torch.ones(3, 2), None), ValueError, r"\[G\] alike, got \[3, 2\] and None"),
        (lambda: kvpo_loss(*[torch.ones(3, 2)] * 4), ValueError, r"\[G\] like log_p, got \[3, 2\] and \[3, 2\]"),
        (lambda: clipped_objective(torch.ones(2), torch.ones(2), torch.ones(1)), ValueError, r"\[2\], \[2\] and \[1\]"),
        (
            lambda: kvpo_loss(torch.ones(2), torch.ones(2), torch.ones(1), torch.ones(2)),
            ValueError,
            r"log_p_init.*got \[1\] and \[2\]",
        ),
    ],
)
def test_grpo_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_losses_of_half_precision_stay_finite():
    log_p = torch.tensor([-0.1, -15.0]).half().requires_grad_()
    loss = kvpo_loss(log_p, torch.tensor([-15.0, -0.1]).half(), log_p.detach(), torch.zeros(2))  # a ratio of exp(14.9)
    loss.total.backward()
    assert loss.total == 0 and loss.ratio.isfinite().all() and log_p.grad.isfinite().all()


def test_advantages_carry_no_gradient():
    r, anchor = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(1.5, requires_grad=True)
    assert not anchor_advantages({"vq": r}, {"vq": anchor}, {"vq": 1.0}).requires_grad
