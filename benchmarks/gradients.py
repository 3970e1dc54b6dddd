"""How much of a method's gradient is signal? Measured at the base model, without a step.

    python benchmarks/gradients.py --json docs/gradients.json

For each method of the arena: the gradients of some groups (script, fork and noise differ) on the untrained LoRA, and
the mean cosine between two of them, with the jackknife's standard error. What groups agree on is what training follows;
a cosine of .01 means that a group's gradient is 99% its own noise. Agreement need not be about the reward: "shuffled"
is the same with the rewards of each group's branches exchanged at random, so what is left there has nothing to do with
them. And the videos that a method learns from: mean reward of the branches over the anchor's (or over that of the
ordinary sampler), and its spread inside a group.
"""

import argparse
import json
from pathlib import Path

import torch

from kvpo_min.arena import SCRIPTS, config_of, updates
from kvpo_min.cli import ArenaOptions
from kvpo_min.pocket import load_pocket, pocket_rewards
from kvpo_min.pocket.world import prompt_set
from kvpo_min.rewards import Mixture
from kvpo_min.train import adapter_weights, add_policies

METHODS = ("kvpo", "astrolabe", "flow_grpo", "dance_grpo", "cm_grpo", "neighbor_grpo", "ar_copo", "diffusion_nft",
           "rwr")  # fmt: skip


class Shuffled(Mixture):
    """Scores of which each video but the last, the anchor's, has another one's."""

    generator = torch.Generator().manual_seed(0)

    def scores(self, videos, prompts):
        order = [*torch.randperm(len(videos) - 1, generator=self.generator).tolist(), len(videos) - 1]
        return {name: score[order] for name, score in super().scores(videos, prompts).items()}


def cosine(gradients: torch.Tensor) -> tuple[float, float]:
    """Mean cosine between the rows of [K, N], and its standard error by leaving out a row at a time."""
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    products = unit @ unit.T
    k = len(products)

    def mean(keep: torch.Tensor) -> torch.Tensor:
        own = products[keep][:, keep]
        return (own.sum() - own.trace()) / (len(own) * (len(own) - 1))

    left_out = torch.stack([mean(torch.arange(k) != i) for i in range(k)])
    error = ((k - 1) / k * (left_out - left_out.mean()).square().sum()).sqrt()
    return mean(torch.arange(k) >= 0).item(), error.item()


def measure(method: str, n_groups: int, rewards: Mixture, seed: int = 0) -> dict:
    options = ArenaOptions(csv="unused", event="changes colour")
    pipeline, config = load_pocket(), config_of(method, options, 1e-30, seed)  # a step that changes nothing
    policies = add_policies(pipeline, config)
    weights = adapter_weights(policies, "default").values()
    gradients, logs = [], []
    for log in updates(pipeline, method, prompt_set(SCRIPTS, 1, seed, options.event), rewards, config, policies):
        logs.append(log)
        if log.get("grad_norm"):
            gradients.append(torch.cat([w.grad.flatten() for w in weights]))
        if len(gradients) == n_groups:
            break
    mean, error = cosine(torch.stack(gradients))
    return {"groups": n_groups, "cosine": mean, "error": error, "log": logs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", required=True, help="file of the figures; what is in it is not computed again")
    args = parser.parse_args()
    path, plain = Path(args.json), pocket_rewards()
    found = json.loads(path.read_text()) if path.exists() else {}
    for method in args.methods.split(","):
        for name, rewards in ((method, plain), (f"{method}, shuffled", Shuffled(plain.rewards, plain.weights))):
            if name not in found:
                found[name] = measure(method, args.groups, rewards)
                path.write_text(json.dumps(found, indent=1))
            print(name, found[name]["cosine"], found[name]["error"], flush=True)


if __name__ == "__main__":
    main()
