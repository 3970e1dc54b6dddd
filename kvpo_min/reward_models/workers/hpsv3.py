"""HPSv3 worker: the mean over frames of HPSv3's preference score (its mu), a 7B judge of single pictures.

    python hpsv3.py [--checkpoint HPSv3.safetensors] [--config HPSv3_7B.yaml] [--device cuda] [--offload]

Environment: envs/hpsv3.txt. Facts: MizzenAI/HPSv3 hpsv3/inference.py (arguments by keyword, because their order differs
between versions; logits are mu and sigma); the authors of KVPO take the mean of mu over all frames.
"""

import argparse
import sys

from serve import serve

sys.path.pop(0)  # this folder, in which this file would hide the package hpsv3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=None, help="HPSv3.safetensors; default: from the Hub")
    parser.add_argument("--config", default=None, help="a copy of the package's HPSv3_7B.yaml that names a local base")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4, help="pictures in one forward")
    parser.add_argument("--frames", type=int, default=0, help="frames of a video, evenly spread; 0: all of them")
    parser.add_argument("--offload", action="store_true", help="leave the GPU between two requests")
    args = parser.parse_args()
    model = None

    def score(videos, prompts, request):
        nonlocal model
        import numpy as np
        from PIL import Image

        if model is None:
            from hpsv3 import HPSv3RewardInferencer

            model = HPSv3RewardInferencer(config_path=args.config, checkpoint_path=args.checkpoint, device=args.device)
        if args.offload:
            model.model.to(args.device)
        count = videos.shape[1]
        frames = np.linspace(0, count - 1, min(args.frames or count, count)).round().astype(int)
        scores = []
        for video, prompt in zip(videos, prompts, strict=True):
            mu = []
            for begin in range(0, len(frames), args.batch):
                pictures = [Image.fromarray(video[f].transpose(1, 2, 0)) for f in frames[begin : begin + args.batch]]
                logits = model.reward(prompts=[prompt] * len(pictures), image_paths=pictures)
                mu += [float(one[0]) for one in logits]
            scores.append(sum(mu) / len(mu))
        return scores

    def leave():
        import torch

        if args.offload and model is not None:
            model.model.to("cpu")
            torch.cuda.empty_cache()

    serve(score, leave)


if __name__ == "__main__":
    main()
