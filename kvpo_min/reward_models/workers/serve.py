"""The loop of a reward worker: a line of JSON in, a line of JSON out (described in reward_models/__init__.py).

Needs numpy alone: it runs in whatever environment the reward model wants.
"""

import json
import os
import sys
import traceback


def serve(score, leave):
    """Answers requests until stdin ends. `score(videos uint8 [N, F, 3, H, W], prompts, request) -> N numbers`; what it
    raises is reported as an error, and the worker goes on. `leave()` gives up the GPU, before every answer."""
    import numpy as np

    # Answers go to the stdout we were given; whatever libraries print goes to stderr instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"]}
        try:
            videos = np.load(request["videos"], mmap_mode="r", allow_pickle=False)
            answer["scores"] = [float(s) for s in score(videos, request["prompts"], request)]
        except Exception as error:  # the model may well serve the next request
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {error}"
        leave()  # also after an error, whose tensors are gone by now: the trainer goes on and needs the memory
        print(json.dumps(answer), file=answers, flush=True)
