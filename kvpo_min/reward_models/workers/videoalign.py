"""VideoAlign worker: visual quality (vq), motion quality on shades of grey (mq), text alignment (ta); a 2B judge.

    python videoalign.py --repo VideoAlign --weights VideoReward [--device cuda] [--offload]

Environment: envs/videoalign.txt. `--repo`: a clone of KwaiVGI/VideoAlign, whose modules lie at its root; `--weights`:
the folder of KlingTeam/VideoReward. Facts: its inference.py (scores normalised with the checkpoint's own means and
deviations) and vision_process.py (frames at the checkpoint's rate, evenly spread); the authors of KVPO give MQ the
video in shades of grey (rewards/scorers/video/videoalign.py).
"""

import argparse
import os
import sys

from serve import serve

sys.path.pop(0)  # this folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", required=True, help="clone of KwaiVGI/VideoAlign")
    parser.add_argument("--weights", required=True, help="folder of KlingTeam/VideoReward")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4, help="videos in one forward")
    parser.add_argument("--offload", action="store_true", help="leave the GPU between two requests")
    args = parser.parse_args()
    sys.path.insert(0, os.path.abspath(args.repo))
    model, held = None, {}

    def read(element):
        """Stands for a video file reader: takes the frames from `held` and samples them as theirs does."""
        import torch
        import vision_process

        if element["sample_type"] != "uniform":
            raise ValueError(f"the checkpoint must sample frames uniformly, got {element['sample_type']}")
        video, fps = held[os.path.basename(element["video"])]
        n = vision_process.smart_nframes(element, total_frames=len(video), video_fps=fps)
        return torch.from_numpy(video[torch.linspace(0, len(video) - 1, n).round().long().numpy()])

    def score(videos, prompts, request):
        nonlocal model
        import torch
        import vision_process

        component = request["component"].upper()
        if component not in ("VQ", "MQ", "TA"):
            raise ValueError(f"component must be vq, mq or ta, got {request['component']!r}")
        if model is None:
            from inference import VideoVLMRewardInference

            vision_process.VIDEO_READER_BACKENDS["held"] = read
            vision_process.get_video_reader_backend = lambda: "held"
            model = VideoVLMRewardInference(args.weights, device=args.device, dtype=torch.bfloat16)
        if args.offload:
            model.model.to(args.device)
        scores = []
        for begin in range(0, len(videos), args.batch):
            held.clear()
            for i, video in enumerate(videos[begin : begin + args.batch]):
                held[str(i)] = (grey(video) if component == "MQ" else video, request["fps"])
            with torch.inference_mode():  # their own call keeps a graph
                rewards = model.reward(list(held), prompts[begin : begin + args.batch], use_norm=True)
            scores += [reward[component] for reward in rewards]
        return scores

    def leave():
        import torch

        if args.offload and model is not None:
            model.model.to("cpu")
            torch.cuda.empty_cache()

    serve(score, leave)


def grey(video):
    """uint8 [F, 3, H, W] -> its luma (ITU-R 601-2) in all three channels, as torchvision's rgb_to_grayscale."""
    import numpy as np

    luma = np.tensordot(np.array([0.2989, 0.587, 0.114], np.float32), video.astype(np.float32), ([0], [1]))
    return np.repeat(luma.astype(np.uint8)[:, None], 3, 1)


if __name__ == "__main__":
    main()
