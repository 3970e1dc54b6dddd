"""One KVPO update in the authors' order of work, written out from top to bottom: what `kvpo-min bench` compares with.

Order of work (their trainer/kvpo.py:985-1582 and 2257-3341, pipeline/streaming_training.py; in our words, not theirs):
- branches one after the other, then the anchor, each from a copy of the snapshot at the fork
- the whole history copied for every forward, then the few frames picked that are read
- the whole video decoded and scored for every branch, prefix included
- old and initial policy replayed in every update, also while the old one still is the current one
- replayed branch after branch, block after block, step after step, and between blocks the replaying policy's own last
  prediction encoded; one graph over everything
Not as theirs, so that the numbers are those of `kvpo_min.train`: no noise in the context, routed frames looked up by
their absolute number, a prompt switch encoded block by block and also when it falls on the fork, float32, adapters
instead of copies of the model, no copies between host and device.

It uses neither `kvpo_min.rollout` nor the loop of `kvpo_min.train`; of the package only the network, the window's
frames (chr.py), the objective (grpo.py), the rewards and the adapters.
"""

import functools

import torch

from kvpo_min.chr import Window, branch_frames, ordinary_frames
from kvpo_min.grpo import anchor_advantages, branch_is_safe, fuse, kvpo_loss, safety_scale
from kvpo_min.policies import acting, adapter_weights, copy_adapter

WINDOW = Window()


class Video:
    """One video under way: its latents, and the keys and values of the sink and of the 30 newest frames."""

    def __init__(self, backbone, sigmas, texts, switches, noise):
        self.backbone, self.sigmas, self.texts, self.switches = backbone, sigmas, texts, switches
        self.noise = noise  # [1, blocks, S, F, C, H, W]
        self.kv = {}  # frame -> [layers, 2, 1, tokens, heads, D]
        self.blocks = []  # latents [1, F, C, H, W]
        self.segment = 0

    def copy(self):
        other = Video(self.backbone, self.sigmas, self.texts, self.switches, self.noise)
        other.kv = {frame: kv.clone() for frame, kv in self.kv.items()}
        other.blocks, other.segment = list(self.blocks), self.segment
        return other

    def read(self, frames):
        """Copies all that is kept, then picks: -> [layers, 2, 1, L * tokens, heads, D]; None where nothing is read."""
        if not len(frames):
            return None
        kept = sorted(self.kv)
        whole = torch.stack([self.kv[frame] for frame in kept], 3)
        return whole[:, :, :, [kept.index(frame) for frame in frames.tolist()]].flatten(3, 4)

    def commit(self, start, x0, frames):
        """Encodes a clean block that reads `frames`; the oldest ones after the sink are dropped."""
        kv = self.backbone.encode(x0, start, self.texts[self.segment], self.read(frames))
        for f in range(WINDOW.block):
            self.kv[start + f] = kv[:, :, :, f]
        while len(self.kv) > WINDOW.history:
            del self.kv[min(frame for frame in self.kv if frame >= WINDOW.sink)]

    def switch_prompt(self, start):
        """Where new words begin, the last window of frames is encoded again with them, oldest block first."""
        segment = sum(switch <= start for switch in self.switches)
        if segment == self.segment:
            return
        self.segment = segment
        reach = WINDOW.sink + WINDOW.past + WINDOW.block
        for old in range(0, start, WINDOW.block):
            if old >= max(WINDOW.sink, start - reach):
                self.commit(old, self.blocks[old // WINDOW.block], ordinary_frames(old, WINDOW))

    def make(self, start, frames):
        """One block: predict x0, re-noise, four times, then encode. -> inputs z and predictions x0, [S, F, C, H, W]"""
        noise = self.noise[:, start // WINDOW.block]
        z = []
        predictions = []
        x = noise[:, 0]
        for s, sigma in enumerate(self.sigmas):
            z.append(x)
            v = self.backbone.velocity(x, sigma[None], start, self.texts[self.segment], self.read(frames))
            x0 = x - sigma * v
            predictions.append(x0)
            if s + 1 < len(self.sigmas):
                x = (1 - self.sigmas[s + 1]) * x0 + self.sigmas[s + 1] * noise[:, s + 1]
        self.commit(start, x0, frames)
        self.blocks.append(x0)
        return torch.cat(z), torch.cat(predictions)


def update(pipeline, policies, rewards, config, task, meter, context="own"):
    """One update of the adapter `default`. `pipeline`, `policies`, `rewards`, `config`: as for `train.train`; `task`:
    script, plan and noise; `meter(phase)`: a context manager for each phase; context="stored": between replayed blocks
    the branch's own x0 is encoded instead. -> loss; the gradient is left on the weights"""
    backbone = pipeline.backbone
    sigmas = pipeline.sigmas
    plan = task.plan
    weights = adapter_weights(policies, "default")
    optimizer = torch.optim.AdamW(weights.values(), lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    with meter("optimiser"):
        copy_adapter(policies, "default", "old")
        optimizer.zero_grad()
    texts = [pipeline.embed([text]) for text in pipeline.segments(task.script)]
    switches = pipeline.switches[: config.num_segments - 1]

    # rollout, by the old policy: prefix, branches, anchor
    trails, videos = [], []
    with torch.no_grad(), acting(policies, "old"):
        with meter("prefix"):
            prefix = Video(backbone, sigmas, texts, switches, task.noise)
            for start in range(0, plan.fork, WINDOW.block):
                prefix.switch_prompt(start)
                prefix.make(start, ordinary_frames(start, WINDOW))
            prefix.switch_prompt(plan.fork)
        for routes in [*plan.routes.split(1), None]:
            with meter("rollout"):
                video, trail = prefix.copy(), []
                for start in range(plan.fork, task.stop, WINDOW.block):
                    video.switch_prompt(start)
                    frames = ordinary_frames(start, WINDOW)
                    if routes is not None and start < plan.fork + plan.perturb_num_blocks * WINDOW.block:
                        frames = branch_frames(routes, start, WINDOW, config.nearest)[0]
                    made = video.make(start, frames)
                    if start < task.chunk.stop:
                        trail.append((start, *made))
                trails.append(trail)
                videos.append(torch.cat(video.blocks, 1))

    # rewards: every video whole, clip by clip
    local, rest = [], []
    for video in videos:
        with meter("decode"):
            pixels = pipeline.decode(video)
        with meter("reward"):
            told = functools.partial(pipeline.reward_prompts, task.script)
            before = score(rewards, pixels, told, switches, range(0, task.chunk.start))
            local.append(mean(score(rewards, pixels, told, switches, task.chunk)))
            after = score(rewards, pixels, told, switches, range(task.chunk.stop, task.stop))
            if after:
                rest.append(mean(before + after))  # what the prefix adds is the same for all videos: it cancels
    signals = [local, rest] if rest else [local]
    columns = [{name: torch.cat([clip[name] for clip in signal]) for name in signal[0]} for signal in signals]
    branches = [{name: column[:-1] for name, column in signal.items()} for signal in columns]
    anchors = [{name: column[-1] for name, column in signal.items()} for signal in columns]
    each = [anchor_advantages(b, a, rewards.weights, config.adv_eps) for b, a in zip(branches, anchors, strict=True)]
    if config.anchor_in_group:
        each = [torch.cat([A, torch.zeros(1)]) for A in each]
    how = (config.local_weight, config.global_weight, config.fuse_mode, config.adv_clip_max)
    A = fuse(*each, *[None] * (2 - len(each)), *how)
    safe = any(branch_is_safe(b, a, rewards.weights) for b, a in zip(branches, anchors, strict=True))

    def energy(trail):
        """E () of one branch under the active policy and the ordinary history."""
        video, total = prefix.copy(), 0.0
        for start, z, x0 in trail:
            frames, text = ordinary_frames(start, WINDOW), texts[prefix.segment]
            for s, sigma in enumerate(sigmas):
                with torch.set_grad_enabled(torch.is_grad_enabled() and s < config.grad_steps):
                    v = backbone.velocity(z[s : s + 1], sigma[None], start, text, video.read(frames))
                u = (z[s] - x0[s]) / sigma  # the branch's velocity
                weight = sigma**2 if config.compat else 1.0  # the authors' residual is that of x0
                total = total + weight * (v[0] - u).square().mean()
            last = x0[-1:] if context == "stored" else (z[-1:] - sigma * v).detach()
            if start != trail[-1][0]:
                video.commit(start, last, frames)
        return total

    def log_prob():
        chosen = trails if config.anchor_in_group else trails[:-1]
        return torch.log_softmax(-torch.stack([energy(trail) for trail in chosen]) / config.tau, 0)

    # replay: three policies, then one step of the optimiser
    with meter("replay_frozen"), torch.no_grad():
        with acting(policies, "old"):
            log_p_old = log_prob()
        with acting(policies, "initial"):
            log_p_init = log_prob()
    with meter("replay"):
        log_p = log_prob()
    scale = safety_scale(safe, config.unsafe_scale)
    loss = kvpo_loss(
        log_p, log_p_old, log_p_init, A, config.clip_range_low, config.clip_range_high, config.kl_coef, scale
    )
    with meter("backward"):
        loss.total.backward()
    with meter("optimiser"):
        torch.nn.utils.clip_grad_norm_(weights.values(), config.max_grad_norm)
        optimizer.step()
        copy_adapter(policies, "default", "ema", 1 - config.ema_decay)
    return loss.total.item()


def score(rewards, pixels, told, switches, frames):
    """Scores of some frames of one video [1, T, 3, H, W], a clip for each segment in view: [{component: [1]}, ...].
    told(frames): the text that frames of one segment are scored against"""
    borders = [frames.start, *[s for s in switches if frames.start < s < frames.stop], frames.stop]
    clips = []
    for begin, end in zip(borders, borders[1:], strict=False):
        if end - begin >= 3:  # motion needs three frames
            clips.append(rewards.scores(pixels[:, begin:end], [told(range(begin, end))]))
    return clips


def mean(clips):
    return {name: torch.stack([clip[name] for clip in clips]).mean(0) for name in clips[0]}
