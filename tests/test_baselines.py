"""The other methods against torch.distributions, naive loops and closed forms; the grid and why cells are refused."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from kvpo_min import kvpo
from kvpo_min.chr import Plan, uniform_routes
from kvpo_min.compare import baselines
from kvpo_min.compare.astrolabe import noised
from kvpo_min.compare.baselines import (
    EXPLORATIONS,
    METHODS,
    POLICIES,
    REFUSED,
    Method,
    best_of_n,
    check_cell,
    cm_grpo_regression,
    consistency_kernel,
    dance_kernel,
    diffusion_nft_loss,
    distance_log_prob,
    energy_loss,
    explore,
    flow_grpo_loss,
    flow_sde_kernel,
    gaussian_log_prob,
    group_advantages,
    neighbor_loss,
    policy_loss,
    quasi_norm_advantages,
    replay_points,
    rwr_loss,
)
from kvpo_min.config import TrainConfig
from kvpo_min.pocket import world
from kvpo_min.policies import acting, adapter_weights, add_policies
from kvpo_min.rewards import Mixture
from kvpo_min.rollout import Sampler, Stream, draw_noise, fork, generate, replay
from kvpo_min.train import train
from kvpo_min.tve import Trajectory, schedule, step_energies, velocity_to_x0

pytestmark = pytest.mark.usefixtures("one_thread")

SIGMAS = schedule()
SHAPE = (3, 8, 4, 4)
WORDS = world.embed(["a red disc moves left"])
PLAIN = Sampler(SIGMAS)
CLOSE = dict(atol=1e-5, rtol=0)
KERNELS = (consistency_kernel, flow_sde_kernel, dance_kernel)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PLAN = Plan(12, range(3, 11), uniform_routes(range(3, 11), 5, 3, seeded(1)), 2)  # 3 branches, 2 routed blocks


@pytest.fixture(scope="module")
def backbone(make_backbone):
    return make_backbone()


@pytest.fixture(scope="module")
def noise():
    return draw_noise(6, 4, SHAPE, seeded(5))


def trajectory_of(kernel, G=3, B=2, seed=0, dtype=torch.float64):
    """A trajectory drawn from a kernel with velocities out of thin air. -> it, and the velocities"""
    v = torch.randn(G, B, 4, 1, 2, 3, 3, generator=seeded(seed), dtype=dtype)
    eps = torch.randn(v.shape, generator=seeded(seed + 1), dtype=dtype)
    sigma, z = SIGMAS.to(dtype), [eps[:, :, 0]]
    for s in range(3):
        mean, std = kernel(z[-1], v[:, :, s], sigma[s], sigma[s + 1])
        z.append(mean + std * eps[:, :, s + 1])
    z = torch.stack(z, 2)
    return Trajectory(z, velocity_to_x0(z, v, sigma), sigma), v


# ---------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_half_precision_are_taken_in_float32(kernel, dtype):
    whole, v = trajectory_of(kernel)
    half = Trajectory(whole.z.to(dtype), whole.x0.to(dtype), whole.sigma.to(dtype))
    wide = Trajectory(half.z.float(), half.x0.float(), half.sigma.float())
    v = v.to(dtype)
    got = gaussian_log_prob(half, v, kernel)
    assert got.isfinite().all() and torch.equal(got, gaussian_log_prob(wide, v.float(), kernel))
    mean, std = flow_sde_kernel(*(torch.ones(1, dtype=dtype) for _ in range(3)), torch.tensor([0.9375], dtype=dtype))
    assert mean.isfinite().all() and 0 < std < 1  # the root takes the next level also where .9999 rounds to 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_probabilities_are_those_of_torch(kernel):
    trajectory, v = trajectory_of(kernel)
    other = v + 0.1
    for u in (v, other):
        log_p = gaussian_log_prob(trajectory, u, kernel)
        assert log_p.shape == (3, 2, 3)
        for g in range(3):
            for b in range(2):
                for s in range(3):
                    m, d = kernel(trajectory.z[g, b, s], u[g, b, s], trajectory.sigma[s], trajectory.sigma[s + 1])
                    want = Normal(m, d).log_prob(trajectory.z[g, b, s + 1]).mean()
                    assert_close(log_p[g, b, s], want)
    assert (gaussian_log_prob(trajectory, v, kernel) - log_p).abs().min() > 1e-6


def test_how_much_noise_each_kernel_injects():
    """Standard deviations of the steps of the 4-step schedule, and what the formulas would leave in the last latent."""
    x = torch.zeros(())
    levels = [*SIGMAS, torch.zeros(())]
    stds = {k: [k(x, x, a, b)[1].item() for a, b in zip(levels, levels[1:], strict=False)] for k in KERNELS}
    assert stds[flow_sde_kernel] == pytest.approx([0.700, 0.875, 0.714, 0.714], abs=6e-4)
    assert stds[dance_kernel] == pytest.approx([0.075, 0.097, 0.137, 0.237], abs=6e-4)
    assert stds[consistency_kernel] == pytest.approx([0.9375, 0.8333, 0.625, 0.0], abs=6e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_first_level_that_is_rounded_counts_as_one(kernel):
    """Shift 5/3, the pocket model's, gives .99999994 in float32; the kernels must do there what they do at 1."""
    x, v = torch.randn(2, 3, generator=seeded())
    levels = schedule(4, 5 / 3)
    rounded, (first, second) = levels[0], (torch.ones(()), levels[1])
    assert rounded != 1
    for got, want in zip(kernel(x, v, rounded, second), kernel(x, v, first, second), strict=True):
        assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("kernel", [flow_sde_kernel, dance_kernel])
def test_sde_kernels_keep_the_marginals(kernel):
    """For x0 ~ N(0, 1) the exact velocity is linear in x; a short step keeps the variance of the forward process."""
    one = torch.ones((), dtype=torch.float64)
    errors = []
    for dt in (1e-2, 1e-3):
        sigma = torch.tensor(0.7, dtype=torch.float64)
        var = (1 - sigma) ** 2 + sigma**2
        slope = (sigma - (1 - sigma)) / var  # E[eps - x0 | x] = slope * x
        mean, std = kernel(one, slope * one, sigma, sigma - dt)
        after = mean**2 * var + std**2
        errors.append(abs(after - ((1 - sigma + dt) ** 2 + (sigma - dt) ** 2)) / dt)
    assert errors[1] < 0.2 * errors[0] and errors[1] < 0.01  # second order in dt
    wrong = kernel(one, -slope * one, sigma, sigma - dt)[0] ** 2 * var + std**2
    assert abs(wrong - ((1 - sigma + dt) ** 2 + (sigma - dt) ** 2)) / dt > 0.1


def drawn(backbone, z, plan, kernel):
    """A fork whose steps are drawn from `kernel`, after a prefix by the ordinary sampler, as `update` makes it."""
    prefix = generate(backbone, Stream(), [WORDS], z[-1:], plan.fork, PLAIN)
    return fork(backbone, [WORDS], z, plan, 18, 18, replace(PLAIN, kernel=kernel), 1, prefix=prefix)


def test_the_samplers_own_kernel_is_the_sampler(backbone, noise):
    z, plan = explore("fresh", PLAN, noise, seeded(2))
    want = fork(backbone, [WORDS], z, plan, 18, 18, PLAIN, 1)
    got = drawn(backbone, z, plan, consistency_kernel)
    assert torch.equal(got.videos, want.videos) and torch.equal(got.trajectory.z, want.trajectory.z)


@pytest.mark.parametrize("kernel", [flow_sde_kernel, dance_kernel])
def test_steps_are_drawn_from_the_kernel(backbone, noise, kernel):
    z, plan = explore("fresh", PLAN, noise, seeded(2))
    made = drawn(backbone, z, plan, kernel)
    assert_close(made.videos[:, 12:], made.trajectory.x0[:, :, -1].flatten(1, 2))  # the last step adds no noise
    v = replay(backbone, made, PLAIN, branches=4)
    sigma = SIGMAS[:, None, None, None, None]
    mean, std = kernel(made.trajectory.z[:, :, :-1], v[:, :, :-1], sigma[:-1], sigma[1:])
    eps = z[:, 4:, 1:]  # blocks 4 and 5
    assert_close((made.trajectory.z[:, :, 1:] - mean) / std, eps, atol=2e-4, rtol=0)
    # the ordinary sampler, given the noise that would have led to the same points, makes the same videos
    same = z.clone()
    s = SIGMAS[1:, None, None, None, None]
    same[:, 4:, 1:] = (made.trajectory.z[:, :, 1:] - (1 - s) * made.trajectory.x0[:, :, :-1]) / s
    assert_close(fork(backbone, [WORDS], same, plan, 18, 18, PLAIN, 1).videos, made.videos, **CLOSE)


# ------------------------------------------------------------------------------------------------------- exploration


@pytest.mark.parametrize("kind", EXPLORATIONS)
def test_exploration_changes_what_it_says(kind, noise):
    z, plan = explore(kind, PLAN, noise, seeded(2), strength=0.5)
    if kind == "routing":
        assert z is noise and plan is PLAN
        return
    assert z.shape == (4, 6, 4, *SHAPE) and plan.perturb_num_blocks == 0 and torch.equal(z[-1:], noise)
    changed = (z[:-1] != noise).flatten(3).any(3)  # [G, blocks, S]
    want = torch.zeros(6, 4, dtype=torch.bool)
    want[4:, {"fresh": slice(None), "initial": slice(0, 1), "consistency": slice(1, None)}[kind]] = True
    assert torch.equal(changed, want.expand(3, -1, -1))
    fresh = z[:-1, 4:, 1 if kind == "consistency" else 0]
    assert abs(fresh.std() - 1) < 0.05
    along = (fresh * noise[:, 4:, 1 if kind == "consistency" else 0]).mean()
    assert along == pytest.approx(0.0 if kind == "fresh" else math.sqrt(0.75), abs=0.1)
    assert (fresh[0] - fresh[1]).abs().max() > 0.5


def test_pivot_block_alone(noise):
    z, _ = explore("initial", replace(PLAN, perturb_num_blocks=1), noise, seeded(2))
    changed = (z[:-1] != noise).flatten(3).any(3).any(0)
    assert changed.nonzero().tolist() == [[4, 0]]


def test_exploration_refuses(noise):
    for kind, strength in (("initial", 1.5), ("initial", 0.0), ("consistency", 1.5)):
        with pytest.raises(ValueError, match="strength"):
            explore(kind, PLAN, noise, seeded(), strength=strength)
    explore("consistency", PLAN, noise, seeded(), strength=1.0)
    with pytest.raises(ValueError, match="anchor's noise"):
        explore("fresh", PLAN, noise.repeat(2, 1, 1, 1, 1, 1, 1), seeded())
    with pytest.raises(ValueError, match="exploration must be"):
        explore("temperature", PLAN, noise, seeded())


# -------------------------------------------------------------------------------------------------------- the grid


def test_the_grid():
    allowed = {(e, p) for e in EXPLORATIONS for p in POLICIES} - set(REFUSED)
    assert len(allowed) == 10 and len(REFUSED) == 6
    for cell in allowed:
        check_cell(*cell)
        Method(*cell)
    for (exploration, policy), reason in REFUSED.items():
        with pytest.raises(ValueError, match="makes no sense") as error:
            Method(exploration, policy)
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="one of"):
        check_cell("routing", "ppo")


@pytest.mark.parametrize("kind", ["fresh", "initial", "consistency"])
def test_why_energies_need_routing(backbone, noise, kind):
    """Branches made by noise explain themselves: no energy, hence no gradient. Routed ones do not."""
    z, plan = explore(kind, PLAN, noise, seeded(2))
    made = fork(backbone, [WORDS], z, plan, 18, 18, PLAIN, 1)
    energies = step_energies(replay(backbone, made, PLAIN), made.trajectory.velocity[:-1])
    assert energies.max() < 1e-10
    routed = fork(backbone, [WORDS], noise, PLAN, 18, 18, PLAIN, 1)
    energies = step_energies(replay(backbone, routed, PLAIN), routed.trajectory.velocity[:-1])
    assert energies.min() > 1e-7


# ------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    r = torch.tensor([1.0, 2.0, 3.0, 6.0])
    A = group_advantages(r, 0.0)
    assert_close(A, (r - 3) / math.sqrt((4 + 1 + 0 + 9) / 4))
    assert_close(quasi_norm_advantages(A, 2.0), A / math.sqrt(4))  # at p = 2: standardised over sqrt(G)
    assert quasi_norm_advantages(torch.zeros(4)).tolist() == [0.0] * 4
    p = 0.8
    assert_close(quasi_norm_advantages(A, p), A / sum(abs(a) ** p for a in A.tolist()) ** (1 / p))


# ----------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kernel", KERNELS)
def test_policy_gradient_at_ratio_1(kernel):
    trajectory, v_old = trajectory_of(kernel)
    A, v = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), v_old.clone().requires_grad_()
    got = torch.autograd.grad(flow_grpo_loss(trajectory, v, v_old, A, kernel), v)[0]
    mean, std = kernel(trajectory.z[:, :, :-1], v[:, :, :-1], *[t[:, None, None, None, None] for t in
                       (trajectory.sigma[:-1], trajectory.sigma[1:])])  # fmt: skip
    log_p = Normal(mean, std).log_prob(trajectory.z[:, :, 1:]).mean((-4, -3, -2, -1))
    want = torch.autograd.grad(-(A[:, None, None] * log_p).mean(), v)[0]
    assert_close(got, want)
    assert want.abs().max() > 1e-4 and got[:, :, -1].abs().max() == 0  # the last step is left out
    first = torch.autograd.grad(flow_grpo_loss(trajectory, v, v_old, A, kernel, steps=[1]), v)[0]
    assert_close(first[:, :, 1], 3 * got[:, :, 1])
    assert first[:, :, [0, 2, 3]].abs().max() == 0
    for steps in ([3], []):
        with pytest.raises(ValueError, match="no noise"):
            flow_grpo_loss(trajectory, v, v_old, A, kernel, steps=steps)


def test_clipping_of_the_step_ratio():
    trajectory, v_old = trajectory_of(consistency_kernel)
    A = torch.ones(3, dtype=torch.float64)
    mean_eps = (trajectory.z[:, :, 1:] - (1 - SIGMAS[1:, None, None, None, None]) * trajectory.x0[:, :, :-1]).mean()
    v = (v_old - 0.3 * mean_eps.sign()).requires_grad_()  # any move: what leaves the range has no gradient
    wide = torch.autograd.grad(flow_grpo_loss(trajectory, v, v_old, A, consistency_kernel, clip=10.0), v)[0]
    narrow = torch.autograd.grad(flow_grpo_loss(trajectory, v, v_old, A, consistency_kernel, clip=1e-6), v)[0]
    ratio = (gaussian_log_prob(trajectory, v, consistency_kernel)
             - gaussian_log_prob(trajectory, v_old, consistency_kernel)).exp()  # fmt: skip
    grown = ratio > 1 + 1e-6
    assert grown.any() and (~grown).any()
    assert narrow[:, :, :3][grown].abs().max() == 0
    assert_close(narrow[:, :, :3][~grown], wide[:, :, :3][~grown])


def test_cm_grpo_regression_has_the_gradient_of_its_kernel():
    trajectory, v_old = trajectory_of(consistency_kernel)
    A, v = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), v_old.clone().requires_grad_()
    regression = torch.autograd.grad(cm_grpo_regression(trajectory, v, A), v)[0]
    ppo = torch.autograd.grad(flow_grpo_loss(trajectory, v, v_old, A, consistency_kernel), v)[0]
    assert_close(regression, ppo)
    capped = torch.autograd.grad(cm_grpo_regression(trajectory, v, 100 * A, A_max=2.0), v)[0]
    assert_close(capped, torch.autograd.grad(cm_grpo_regression(trajectory, v, torch.tensor([2.0, -2.0, 2.0])), v)[0])


def test_neighbor_grpo_against_a_loop():
    candidates = torch.randn(5, 1, 4, *SHAPE, generator=seeded(1), dtype=torch.float64)
    z = torch.randn(1, 1, 4, *SHAPE, generator=seeded(2), dtype=torch.float64)
    anchor = Trajectory(z, z, SIGMAS.double())
    v = torch.randn(z.shape, generator=seeded(3), dtype=torch.float64).requires_grad_()
    A, tau = torch.tensor([2.0, -1.0, 0.0, 0.5, -1.5], dtype=torch.float64), 0.3
    got = torch.autograd.grad(neighbor_loss(anchor, v, v, candidates, A, tau), v)[0]
    x0 = (z - SIGMAS.double()[:, None, None, None, None] * v.detach()).requires_grad_()
    loss = 0.0
    for s in range(4):
        d = torch.stack([(candidates[i, 0, s] - x0[0, 0, s]).square().mean() for i in range(5)])
        p = torch.softmax(-d.detach() / tau, 0)
        assert_close(distance_log_prob(x0, candidates, tau)[:, 0, s, 0].exp(), p)
        loss = loss + ((A - p * A.sum()) / (5 * tau) * d).sum() / 4  # the closed form of grpo.py at ratio 1
    want = torch.autograd.grad(loss, x0)[0] * -SIGMAS.double()[:, None, None, None, None]
    assert_close(got, want)
    # an anchor that is itself a candidate takes all the mass unless tau is of the order of the distances
    own = distance_log_prob(candidates[:1], candidates, 0.01)[:, 0, 0, 0].exp()
    assert own[0] > 0.999
    assert distance_log_prob(candidates[:1], candidates, 2.0)[0, 0, 0, 0].exp() < 0.5


def test_energy_loss_is_kvpos():
    trajectory, _ = trajectory_of(consistency_kernel, G=4)
    v_old = trajectory.velocity + 0.1 * torch.randn(trajectory.z.shape, generator=seeded(9), dtype=torch.float64)
    A, tau = torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64), 0.01
    v = v_old.clone().requires_grad_()
    got = torch.autograd.grad(energy_loss(trajectory, v, v_old, A, tau), v)[0]
    E = step_energies(v, trajectory.velocity).sum((1, 2))
    p = torch.softmax(-E.detach() / tau, 0)
    want = torch.autograd.grad(((A - p * A.sum()) / (4 * tau) * E).sum(), v)[0]
    assert_close(got, want)


def test_softmax_policies_are_clipped():
    """Away from the old policy: each ratio by hand, and no pull where a candidate has moved far enough its own way."""
    trajectory, _ = trajectory_of(consistency_kernel, G=4)
    v_old = trajectory.velocity + 0.1 * torch.randn(trajectory.z.shape, generator=seeded(9), dtype=torch.float64)
    v = (v_old + 0.05 * torch.randn(v_old.shape, generator=seeded(4), dtype=torch.float64)).requires_grad_()
    A, clip, tau = torch.tensor([1.0, -1.0, 0.5, -0.2], dtype=torch.float64), 0.2, 0.02

    def by_hand(log_p, log_p_old, low):
        flat, total = 0, 0.0
        for g, a in enumerate(A.tolist()):
            for new, old in zip(log_p[g].flatten(), log_p_old[g].flatten(), strict=True):
                rho = (new - old).exp()
                stays = (a > 0 and rho > 1 + clip) or (a < 0 and rho < 1 - low)
                flat += stays
                total = total - (rho.clamp(1 - low, 1 + clip) if stays else rho) * a
        assert 0 < flat < log_p.numel()
        return total / log_p.numel()

    def energies(u):
        return torch.log_softmax(-step_energies(u, trajectory.velocity).sum((1, 2)) / tau, 0)

    got, want = energy_loss(trajectory, v, v_old, A, tau, clip), by_hand(energies(v), energies(v_old), clip / 2)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, v)[0], torch.autograd.grad(want, v)[0])

    def distances(u):
        x0 = trajectory[:1].z - SIGMAS.double()[:, None, None, None, None] * u
        d = [(trajectory.x0[i] - x0[0]).square().mean((-4, -3, -2, -1)) for i in range(4)]
        return torch.log_softmax(-torch.stack(d) / tau, 0)

    one, old = v.detach()[:1].requires_grad_(), v_old[:1]
    got = neighbor_loss(trajectory[:1], one, old, trajectory.x0, A, tau, clip)
    want = by_hand(distances(one), distances(old), clip)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, one)[0], torch.autograd.grad(want, one)[0])


def test_reward_weighted_regression_by_hand():
    v, u = torch.randn(2, 3, 2, 2, generator=seeded(4))
    A = torch.tensor([0.0, 1.0, 9.0])
    w = torch.tensor([1.0, math.e, 20.0])  # the last is cut
    want = sum(w[g] / w.mean() * (v[g] - u[g]).square().mean() for g in range(3)) / 3
    assert_close(rwr_loss(v, u, A), want)
    assert_close(rwr_loss(v, u, A, tau=1e6), (v - u).square().mean(), **CLOSE)  # hot: plain flow matching


def test_weights_of_the_regression_hold_where_all_are_tiny():
    v, u = torch.randn(2, 2, 3, 2, generator=seeded(4))
    close, far = rwr_loss(v, u, torch.tensor([-1.0, -2.0]), tau=0.005), (v - u)[0].square().mean() / 2
    assert_close(close, 2 * far)  # exp(-200) is 0 in float32; normalised, the first has all the weight


def test_flat_rewards_of_half_precision_stay_0():
    assert torch.equal(quasi_norm_advantages(torch.zeros(3).half()), torch.zeros(3))


def test_shapes_that_would_broadcast_are_refused():
    trajectory, v = trajectory_of(consistency_kernel)
    A, three = torch.ones(1).double(), torch.ones(3).double()
    flat, one = v.flatten(1), v[:1]
    calls = [
        lambda: flow_grpo_loss(trajectory, one, one, three),
        lambda: flow_grpo_loss(trajectory, v, v, A),
        lambda: cm_grpo_regression(trajectory, one, three),
        lambda: cm_grpo_regression(trajectory, v, A),
        lambda: rwr_loss(flat, flat, A),
        lambda: rwr_loss(flat, flat[:1], three),
        lambda: neighbor_loss(trajectory[:1], one, one, trajectory.x0, A, 1.0),
        lambda: neighbor_loss(trajectory[:2], one, one, trajectory.x0, three, 1.0),
        lambda: neighbor_loss(trajectory[:1], one, one, trajectory.x0[:, :1], three, 1.0),
        lambda: diffusion_nft_loss(flat, torch.tensor(0.5), flat, flat, flat[:1], three),
        lambda: diffusion_nft_loss(flat, torch.tensor(0.5), flat, flat, flat, A),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"tensors of one shape and A \[3\]"):
            call()


def test_only_the_policy_carries_gradient():
    trajectory, v = trajectory_of(consistency_kernel)
    v, others = v.requires_grad_(), [t.clone().requires_grad_() for t in (v.detach(), v.detach() + 1, torch.ones(3))]
    v_old, target, A = others
    sigma = torch.tensor(0.5)
    losses = [
        rwr_loss(v, target, A),
        diffusion_nft_loss(v.detach(), sigma, v, v_old, v.detach(), A),
        neighbor_loss(trajectory[:1], v[:1], v_old[:1], target, A, 1.0),
        flow_grpo_loss(trajectory, v, v_old, A, consistency_kernel),
    ]
    for loss in losses:
        got = torch.autograd.grad(loss, [v, *others], allow_unused=True)
        assert got[0] is not None and got[1:] == (None, None, None)


def test_diffusion_nft_against_a_loop():
    eps, x0, v, v_old = torch.randn(4, 3, 2, 2, generator=seeded(6), dtype=torch.float64)
    sigma, beta, A = torch.tensor(0.8333, dtype=torch.float64), 0.1, torch.tensor([-7.0, 1.0, 3.0]).double()
    z, want = (1 - sigma) * x0 + sigma * eps, 0.0
    for g in range(3):
        r = min(max(A[g].item(), -5), 5) / 10 + 0.5
        for share, u in ((r, beta * v[g] + (1 - beta) * v_old[g]), (1 - r, (1 + beta) * v_old[g] - beta * v[g])):
            miss = z[g] - sigma * u - x0[g]
            want += 5 * share * (miss**2 / miss.abs().mean()).mean() / beta / 3
    assert_close(diffusion_nft_loss(z, sigma, v, v_old, x0, A, beta), want)


# -------------------------------------------------------------------------------------------------------- Best-of-N


def brightness(latents, start):
    return latents.mean((1, 2, 3, 4))


def test_best_of_n_videos(backbone):
    noise = draw_noise(6, 4, SHAPE, seeded(7), batch=4)
    video, (winner,), (rewards,) = best_of_n(backbone, [WORDS], noise, [18], PLAIN, brightness)
    singles = [generate(backbone, Stream(), [WORDS], noise[i : i + 1], 18, PLAIN).latents for i in range(4)]
    scores = torch.cat([brightness(x, 0) for x in singles])
    assert_close(rewards, scores, **CLOSE)
    assert winner == scores.argmax() and video.latents.shape[0] == 1
    assert_close(video.latents, singles[winner], **CLOSE)


def test_best_of_n_chunks(backbone):
    noise = draw_noise(6, 4, SHAPE, seeded(7), batch=3)
    seen = []

    def judge(latents, start):
        seen.append((start, latents.shape[1]))
        return brightness(latents, start)

    video, winners, rewards = best_of_n(backbone, [WORDS], noise, [6, 15, 18], PLAIN, judge)
    assert seen == [(0, 6), (6, 9), (15, 3)] and len(winners) == len(rewards) == 3
    # naive: the winners' noise, chunk by chunk, in a single video
    joined = torch.cat([noise[w : w + 1, a:b] for w, a, b in zip(winners, (0, 2, 5), (2, 5, 6), strict=True)], 1)
    assert_close(video.latents, generate(backbone, Stream(), [WORDS], joined, 18, PLAIN).latents, **CLOSE)
    assert winners == [int(r.argmax()) for r in rewards]
    with pytest.raises(ValueError, match="ascend"):
        best_of_n(backbone, [WORDS], noise, [6, 6], PLAIN, brightness)
    with pytest.raises(ValueError, match="finite"):
        best_of_n(backbone, [WORDS], noise, [6], PLAIN, lambda x, start: x.mean((1, 2, 3, 4)) / 0)


# ------------------------------------------------------------------------------------------------------------ the loop


REWARDS = Mixture({"vq": lambda videos, prompts: videos[:, :, 0].mean((1, 2, 3))}, {"vq": 1.0})
SMALL = dict(
    tau=1.0, num_frames=21, num_generations=3, perturb_num_blocks=2, tau_groups=1, rank=2, lr_warmup_steps=0, nearest=1
)


def run(make_pipeline, method, **options):
    """One update of `train`. -> its log, and how far the farthest weight of the adapter went"""
    pipeline, config = make_pipeline(), TrainConfig(**SMALL | dict(max_train_steps=1, learning_rate=1e-2) | options)
    policies = add_policies(pipeline, config)
    before = {name: w.detach().clone() for name, w in adapter_weights(policies, "default").items()}
    (step,) = train(pipeline, world.prompt_set(1, 1, seed=7), REWARDS, config, policies, method=method)
    after = adapter_weights(policies, "default")
    return step, max((before[name] - w).abs().max().item() for name, w in after.items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_a_step(make_pipeline, name):
    method = METHODS[name]
    softmax = method.policy in ("distance", "energy")
    step, moved = run(make_pipeline, method, tau=0.0 if softmax else 1.0)  # 0: the first group sets it
    log = step.log()
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0 and moved > 0 and step.tau > 0


def test_every_allowed_cell_takes_a_step(make_pipeline):
    for exploration in EXPLORATIONS:
        for policy in POLICIES:
            if (exploration, policy) not in REFUSED:
                _, moved = run(make_pipeline, Method(exploration, policy), tau=0.01)
                assert moved > 0, (exploration, policy)


@pytest.mark.parametrize("name, blocks", [("cm_grpo", 2), ("dance_grpo", 2), ("ar_copo", 1), ("flow_grpo", 0)])
def test_the_loss_sees_the_blocks_that_differ(make_pipeline, monkeypatch, name, blocks):
    """With noise in 2 blocks (AR-CoPO: one), of up to 3 in the chunk; fresh noise reaches its end."""
    seen, loss = [], baselines.policy_loss
    monkeypatch.setattr(baselines, "policy_loss", lambda *a: seen.append(a[2].trajectory.z.shape[1]) or loss(*a))
    step, _ = run(make_pipeline, METHODS[name], tau=0.01)
    assert seen == [blocks or (21 - step.groups[0].plan.fork) // 3]


def test_a_gradient_that_is_not_finite_is_not_stepped(make_pipeline, monkeypatch):
    def loss_of(method, rollout, at, v, *others):
        return (v * 0).sum().sqrt()  # 0, and its slope is not finite

    monkeypatch.setattr(baselines, "policy_loss", loss_of)
    step, moved = run(make_pipeline, METHODS["flow_grpo"])
    assert "gradient's norm is nan" in step.skipped and moved == 0


def test_more_iterations_keep_the_first_velocities(make_pipeline, monkeypatch):
    """The old policy is the one that made the branches in all iterations: clips have something to act on."""
    ratios, loss = [], baselines.policy_loss

    def loss_of(method, rollout, at, v, v_old, *others):
        ratios.append((v - v_old).abs().max().item())
        return loss(method, rollout, at, v, v_old, *others)

    monkeypatch.setattr(baselines, "policy_loss", loss_of)
    run(make_pipeline, METHODS["cm_grpo"], num_iterations=3, max_grad_norm=1e9)
    assert len(ratios) == 3 and ratios[0] < 1e-5 < ratios[1] < ratios[2]


@pytest.mark.parametrize("name", ["cm_grpo", "diffusion_nft", "ar_copo", "kvpo"])
def test_more_iterations_replay_the_steps_with_gradient_only(make_pipeline, monkeypatch, name):
    """The others keep their first velocities: the loss is that of a whole replay with these put in."""
    seen, loss = [], baselines.policy_loss

    def loss_of(method, rollout, at, v, v_old, A, tau, steps):
        pipeline, policies = used
        with torch.no_grad(), acting(policies, "default"):
            whole = replay(pipeline.backbone, at, pipeline.sampler(1), branches=len(v))
        assert_close(v[:, :, :2], whole[:, :, :2], **CLOSE)
        seen.append((v.detach(), whole))
        return loss(method, rollout, at, v, v_old, A, tau, steps)

    more = dict(max_train_steps=1, learning_rate=1e-2, num_iterations=3, grad_steps=2, tau=0.01, max_grad_norm=1e9)
    pipeline, config = make_pipeline(), TrainConfig(**SMALL | more)
    used = pipeline, add_policies(pipeline, config)
    monkeypatch.setattr(baselines, "policy_loss", loss_of)
    scripts = world.prompt_set(1, 1, seed=7)
    list(train(pipeline, scripts, REWARDS, config, used[1], method=METHODS[name]))
    (first, whole), *later = seen
    assert_close(first, whole, **CLOSE)
    for v, whole in later:
        assert torch.equal(v[:, :, 2:], first[:, :, 2:]) and not torch.allclose(v, whole, **CLOSE)


def test_the_energy_cell_is_kvpo_without_its_anchor(make_pipeline):
    """Same scripts, forks, noise and branches, and the gradient of KVPO with the group's mean instead of the anchor."""
    more = dict(tau=0.01, kl_coef=0.0, unsafe_scale=1.0, fuse_mode="zscore", global_frames=0, adv_eps=1e-4,
                clip_range_low=0.1, clip_range_high=0.2)  # fmt: skip
    ours, _ = run(make_pipeline, kvpo, **more)
    cell, _ = run(make_pipeline, METHODS["kvpo"], **more)
    assert torch.equal(ours.groups[0].rollout.videos, cell.groups[0].rollout.videos)
    assert ours.groups[0].rewards["vq"].tolist() == cell.groups[0].rewards["vq"].tolist()
    a, b = (step.groups[0].advantages for step in (ours, cell))  # alike but for the deviation's n or n - 1
    assert cell.grad_norm / b.norm() == pytest.approx((ours.grad_norm / a.norm()).item(), rel=1e-3)
    assert_close(a / a.norm(), b / b.norm(), atol=1e-3, rtol=0)


def test_scale_and_preservation(make_pipeline):
    """A loss of twice the size has twice the gradient; what holds the prefix is the same for every method."""
    one, _ = run(make_pipeline, METHODS["rwr"], max_grad_norm=1e9)
    two, _ = run(make_pipeline, replace(METHODS["rwr"], scale=2.0), max_grad_norm=1e9)
    assert two.grad_norm == pytest.approx(2 * one.grad_norm, rel=1e-4)
    held, _ = run(make_pipeline, METHODS["rwr"], max_grad_norm=1e9, prefix_coef=5.0, num_iterations=2)
    ours, _ = run(make_pipeline, kvpo, tau=0.01, unsafe_scale=1.0, prefix_coef=5.0, num_iterations=2)
    assert held.groups[0].kept.shape == ours.groups[0].kept.shape
    assert_close(held.groups[0].kept, ours.groups[0].kept, **CLOSE)  # the initial policy's, on the same prefix
    assert held.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)  # nothing has drifted before the first step


def test_policy_loss_of_a_recorded_group(backbone, noise):
    """What each policy is asked at, and that it refuses advantages of another size."""
    z, plan = explore("initial", PLAN, noise, seeded(2))
    made = fork(backbone, [WORDS], z, plan, 18, 18, PLAIN, 1)
    at, rows = replay_points(Method("initial", "distance"), made, seeded())
    assert rows == 1 and torch.equal(at.trajectory.z, made.trajectory.z[-1:])
    at, rows = replay_points(Method("initial", "nft"), made, seeded())
    assert rows == 3
    eps, ends = at.trajectory.velocity + at.trajectory.x0, made.trajectory.x0[:3, :, -1:]  # the target is eps - x0
    assert_close(at.trajectory.x0, ends.expand_as(at.trajectory.x0))
    assert_close(eps, torch.randn(eps.shape, generator=seeded()), atol=1e-4, rtol=0)
    # at a level, the velocities are those of `astrolabe.noised`
    v = replay(backbone, at, PLAIN, branches=3)
    for s, sigma in enumerate(SIGMAS):
        alone = noised(made, PLAIN, sigma, eps[:, :, s])
        assert_close(v[:, :, s : s + 1], replay(backbone, *alone, branches=3), atol=1e-4, rtol=0)
    # and DiffusionNFT's loss is the mean of the levels', each with weights of its own
    nft, t, old = METHODS["diffusion_nft"], at.trajectory, 0.9 * v
    A = torch.tensor([1.0, 0.0, -1.0])
    each = [diffusion_nft_loss(t.z[:, :, s], t.sigma[s], v[:, :, s], old[:, :, s], t.x0[:, :, s], A) for s in range(4)]
    assert_close(policy_loss(nft, made, at, v, old, A), sum(each) / 4)
    assert policy_loss(Method("initial", "nft"), made, at, v, v, A) > 0
    with pytest.raises(ValueError, match="G = 3"):
        policy_loss(Method("initial", "nft"), made, at, v, v, A[:2])
    clean, _ = noised(made, PLAIN, SIGMAS[3], torch.zeros(3, 2, *SHAPE))
    assert_close(clean.trajectory.z[:, :, 0], (1 - SIGMAS[3]) * made.trajectory.x0[:3, :, -1])
