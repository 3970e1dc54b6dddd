"""Learned rewards: HPSv3 and VideoAlign in processes of their own, CLIP and PickScore in this one.

HPSv3 and VideoAlign pin versions of transformers that do not fit ours. So each runs in its own environment (`envs/`)
as a worker (`workers/`), and `WorkerReward` talks to it in lines of JSON:

    to its stdin:     {"id": 7, "videos": "/tmp/.../videos.npy", "prompts": ["...", ...], "fps": 16, "component": "mq"}
    from its stdout:  {"id": 7, "scores": [0.31, ...]}   or   {"id": 7, "error": "what went wrong"}

`videos.npy` holds uint8 [N, F, 3, H, W], uncompressed: what both models read after rounding to a picture. Anything that
speaks these lines is a reward.

What the authors score (rewards/scorers/video/hpsv3.py and videoalign.py of their repository): VQ is the mean of HPSv3
over all frames; MQ is VideoAlign's motion quality of the video in shades of grey; TA is VideoAlign's text
alignment.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvpo_min.rewards import Mixture, RewardError, check_videos
from kvpo_min.system import number_in_environment

WORKERS = Path(__file__).parent / "workers"
FPS = 16  # frames a second of Wan2.1's videos


class WorkerReward:
    """A reward model in a process of its own: `reward(videos [N, F, 3, H, W] in [0, 1], prompts) -> [N]`, higher is
    better.

    command: how to start the worker, words or one shell-like line. It starts with the first call, serves all later
    ones and ends with `close()`, with this object or with this process.
    timeout: seconds to wait for an answer; the first one includes loading the model.
    component: which of the worker's scores, where it has several. `part` makes more rewards on the same process.
    fps: frames a second of the videos that it will be given.

    Raises RewardError, naming the command, when the worker cannot be started, dies (with the last lines of its
    stderr), says nothing for `timeout` seconds, reports an error, or answers anything but N finite numbers.
    """

    def __init__(
        self, command: Sequence[str] | str, timeout: float = 600.0, component: str = "", fps: float = FPS
    ):  # fmt: skip
        try:
            words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        except ValueError as error:  # a quotation that does not end
            raise ValueError(f"the worker's command cannot be read ({error}), got {command!r}") from None
        if not words or type(timeout) not in (int, float) or not 0 < timeout < 1e9:
            raise ValueError(f"a worker needs a command and a timeout above 0, got {command!r} and {timeout!r}")
        self.worker, self.timeout, self.component, self.fps = _Worker(words), timeout, component, fps

    def part(self, component: str) -> WorkerReward:
        """Another score of the same worker; both share the process."""
        other = WorkerReward(self.worker.command, self.timeout, component, self.fps)
        other.worker = self.worker
        return other

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        import numpy as np

        check_videos(videos, prompts)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the worker may live on this GPU, and cannot use what we merely keep in reserve
        with tempfile.TemporaryDirectory(prefix="kvpo-reward-") as folder:
            path = Path(folder, "videos.npy")
            np.save(path, to_uint8(videos))
            request = {"videos": str(path), "prompts": list(prompts), "fps": self.fps, "component": self.component}
            scores = self.worker.ask(request, self.timeout)
        wrong = f"must give {len(videos)} finite scores, got {str(scores)[:500]}"
        if not isinstance(scores, list) or len(scores) != len(videos) or {*map(type, scores)} - {int, float}:
            raise self.worker.error(wrong)
        try:
            given = torch.tensor([float(score) for score in scores], dtype=torch.float32, device=videos.device)
        except OverflowError:  # a whole number that is larger than floats are
            raise self.worker.error(wrong) from None
        if not given.isfinite().all():  # in float32 too
            raise self.worker.error(wrong)
        return given

    def close(self) -> None:
        """Ends the worker. A later call would start it again."""
        self.worker.close()


def to_uint8(videos: Tensor):
    """[..., 3, H, W] in [0, 1] -> numpy uint8 of the same shape, on the CPU."""
    return (videos.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


NEEDED = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|TZ|TMPDIR|TEMP|TMP|LANG|LC_.*|LD_LIBRARY_PATH|XDG_CACHE_HOME|SYSTEMROOT|VIRTUAL_ENV|"
    "(CONDA|PYTHON|CUDA|NVIDIA|NCCL|OMP|MKL|OPENBLAS|TORCH|PYTORCH|TRITON|HF|TRANSFORMERS|SSL).*|(HTTPS?|NO)_PROXY"
)  # names of what programs of this kind read
SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|KEY")


def worker_environment() -> dict[str, str]:
    """What a worker needs of this process's environment, and no secrets: one that wants more gets it in its command,
    `worker env NAME=value ...`. One of a torchrun process sees the GPU of that process alone, as its cuda:0."""
    env = {k: v for k, v in os.environ.items() if NEEDED.fullmatch(k.upper()) and not SECRET.search(k.upper())}
    if number_in_environment("WORLD_SIZE", 1) > 1 and torch.cuda.is_available():
        visible, n = env.get("CUDA_VISIBLE_DEVICES", ""), number_in_environment("LOCAL_RANK")
        if visible and n >= len(visible.split(",")):
            raise ValueError(f"CUDA_VISIBLE_DEVICES must name a GPU for process {n} (LOCAL_RANK), got {visible!r}")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[n] if visible else str(n)
    return env


def answer_in(text: str) -> dict | list | None:
    """The answer in what a worker printed, or a list, which is none without its id; None: something else, libraries
    print what they like. Raises ValueError for what is meant as an answer and is no JSON."""
    text = text.strip()
    begin = re.search(r'^{|{\s*"(id|scores|error)"', text)
    try:
        found = json.JSONDecoder().raw_decode(text[begin.start() :])[0] if begin else json.loads(text)
    except (ValueError, RecursionError) as error:
        if begin:
            raise ValueError(str(error)) from None
        return None
    return found if isinstance(found, dict | list) else None


class _Worker:
    """The process behind one or more `WorkerReward`s."""

    def __init__(self, command: list[str]):
        self.command = command
        self.process: subprocess.Popen | None = None
        self.ids = itertools.count()

    def ask(self, request: dict, timeout: float):
        """Sends one request and returns the "scores" of its answer, unchecked. Other lines on stdout are skipped."""
        if self.process is None:
            self.start()
        number = next(self.ids)
        deadline, noise = time.monotonic() + timeout, deque(maxlen=5)
        while not self.lines.empty():  # what came after the last answer belongs to nobody
            line = self.lines.get()
            if line is None:  # it died meanwhile
                self.lines.put(None)
                break
            noise.append(line[:500])
        line = (json.dumps({"id": number, **request}) + "\n").encode()
        # from a thread, since a worker that does not read would block us; if it is dead, stdout's end says so
        threading.Thread(target=_send, args=(self.process.stdin.fileno(), line), daemon=True).start()
        soon, wanted = 0.0, f'must answer in JSON like {{"id": {number}, "scores": [...]}}'
        while True:
            try:
                if (left := deadline - time.monotonic()) <= 0:  # also of a worker that prints without end
                    raise queue.Empty
                line = self.lines.get(timeout=left)
            except queue.Empty:
                what = f"gave no answer within {timeout:g} s" if deadline > soon else wanted
                raise self.error(f"{what}{_quote('it printed', noise)}") from None
            if line is None:
                code = _exit_code(self.process)
                raise self.error(f"died ({code}){_quote('it printed', noise)}")
            try:  # what progress bars wrote over, with \r, stands on the same line
                answer = next(filter(None, map(answer_in, line.split("\r"))), None)
            except ValueError as error:
                raise self.error(f"{wanted} ({error}), got {line[:500]!r}") from None
            if not isinstance(answer, dict):
                if answer:  # a list of numbers alone: an answer without its form, if none in that form comes soon
                    deadline = soon = min(deadline, time.monotonic() + 1)
                noise.append(line[:500])
                continue
            theirs = answer.get("id", number)
            if type(theirs) is int and 0 <= theirs < number:  # of a request that was interrupted
                noise.append(line[:500])
                continue
            if theirs != number or type(theirs) is not int:
                raise self.error(f"must answer request {number}, got {line[:500]!r}")
            if answer.get("error"):
                raise self.error(f"reports: {answer['error']}", keep=True)
            return answer.get("scores", answer)

    def start(self) -> None:
        pipe = subprocess.PIPE
        try:  # in a session of its own: Ctrl-C does not reach it, and its children end with it
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, env=worker_environment()
            )  # fmt: skip
        except OSError as error:
            what_to_do = "see envs/ for how to make its environment"
            if "=" in self.command[0]:
                what_to_do = f"for a variable of its environment: worker env {shlex.join(self.command)}"
            message = f"reward worker `{shlex.join(self.command)}` cannot be started: {error}"
            raise RewardError(f"{message}; {what_to_do}") from error
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.stderr: deque[str] = deque(maxlen=20)
        streams = ((self.process.stdout, self.lines.put, True), (self.process.stderr, self.stderr.append, False))
        readers = [threading.Thread(target=_read, args=args, daemon=True) for args in streams]
        for reader in readers:
            reader.start()
        self.stderr_reader = readers[1]
        self.finalizer = weakref.finalize(self, _end, self.process)  # also when this process exits

    def error(self, what: str, keep: bool = False) -> RewardError:
        """The error to raise. Unless `keep`, the worker is ended: whatever it says later belongs to nobody."""
        if not keep:
            self.close()
            self.stderr_reader.join(timeout=5)  # its last words
        last = list(self.stderr)
        return RewardError(f"reward worker `{shlex.join(self.command)}` {what}{_quote('its stderr ends', last)}")

    def close(self) -> None:
        if self.process is not None:
            self.process = None
            self.finalizer()


def _send(pipe: int, line: bytes) -> None:
    try:
        while line:
            line = line[os.write(pipe, line) :]
    except OSError:  # it is gone, or was closed meanwhile
        pass


def _read(stream, put, mark_end: bool) -> None:
    with stream:
        for line in iter(lambda: stream.readline(2**20), b""):  # no longer one is kept in memory
            put(line.decode(errors="replace").rstrip("\n"))
    if mark_end:
        put(None)


def _quote(label: str, lines) -> str:
    return f"; {label}:\n  " + "\n  ".join(lines) if lines else ""


def _exit_code(process: subprocess.Popen) -> str:
    try:
        return f"exit code {process.wait(timeout=5)}"
    except subprocess.TimeoutExpired:  # it closed its stdout and lives on
        return "it closed its stdout"


def _end(process: subprocess.Popen, patience: float = 1.0) -> None:
    """Asks the process to end by closing its stdin, then kills it and its children."""
    process.stdin.close()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # it leads its session
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def hpsv3_reward(python: str, *options: str, timeout: float = 1800.0) -> WorkerReward:
    """HPSv3 (VQ). `python`: that of its environment (envs/hpsv3.txt); `options`: see workers/hpsv3.py."""
    return WorkerReward([python, str(WORKERS / "hpsv3.py"), *options], timeout)


def videoalign_rewards(python: str, *options: str, timeout: float = 1800.0) -> dict[str, WorkerReward]:
    """VideoAlign's {"vq", "mq", "ta"} from one process; mq looks at the video in shades of grey, as the authors do.
    `python`: that of its environment (envs/videoalign.txt); `options`: see workers/videoalign.py."""
    vq = WorkerReward([python, str(WORKERS / "videoalign.py"), *options], timeout, "vq")
    return {"vq": vq, "mq": vq.part("mq"), "ta": vq.part("ta")}


def reward_from(line: str, component: str, fps: float = FPS):
    """The reward that a line of a config names; `component`: what it is wanted for ("vq", "mq" or "ta"); `fps`: frames
    a second of the videos.

        hpsv3 PYTHON [options]           workers/hpsv3.py with the python of its environment (envs/hpsv3.txt)
        videoalign PYTHON [options]      workers/videoalign.py, likewise (envs/videoalign.txt)
        worker COMMAND                   any other program that speaks the lines at the top of this file
        clip [FOLDER_OR_ID [DEVICE]]     `ClipReward`
        pickscore [FOLDER_OR_ID [DEVICE]]

    Raises ValueError for any other line."""
    kind, *words = map(os.path.expanduser, shlex.split(line) or [""])
    if kind in ("hpsv3", "videoalign") and words:
        return WorkerReward([words[0], str(WORKERS / f"{kind}.py"), *words[1:]], 1800.0, component, fps)
    if kind == "worker" and words:
        return WorkerReward(words, component=component, fps=fps)
    if kind == "clip" and len(words) <= 2:
        return ClipReward(*words[:1], device=(*words, "cpu", "cpu")[1])
    if kind == "pickscore" and len(words) <= 2:
        beside = {"processor": None} if words and Path(words[0], "preprocessor_config.json").is_file() else {}
        return PickScoreReward(*words[:1], device=(*words, "cpu", "cpu")[1], **beside)
    raise ValueError(
        f"{component}_model must be 'hpsv3 PYTHON [options]', 'videoalign PYTHON [options]', 'worker COMMAND', "
        f"'clip [FOLDER [DEVICE]]' or 'pickscore [FOLDER [DEVICE]]', got {line!r}"
    )


def mixture_from(lines: Mapping[str, str], weights: Mapping[str, float], fps: float = FPS) -> Mixture:
    """{"vq": line, ...} (see `reward_from`; "": none) and a weight each -> their mixture. Equal lines share one model.
    Raises ValueError for a weight without a model, and for a model without a weight."""
    rewards, made = {}, {}
    for name, line in lines.items():
        if not line and weights[name]:
            raise ValueError(
                f"{name} weighs {weights[name]:g}, but no model scores it: give --{name}_model, or --{name} 0"
            )
        if line and not weights[name]:
            raise ValueError(f"--{name}_model is given, but --{name} is 0: leave one of them out")
        if line:
            made[line] = made.get(line) or reward_from(line, name, fps)
            rewards[name] = made[line].part(name) if isinstance(made[line], WorkerReward) else made[line]
    return Mixture(rewards, {name: weights[name] for name in rewards})


def even_frames(count: int, n: int) -> list[int]:
    """`n` of `count` frames, evenly spread, both ends included; the middle one for n = 1; all if there are fewer."""
    if n >= count:
        return list(range(count))
    return [count // 2] if n == 1 else [round(i * (count - 1) / (n - 1)) for i in range(n)]


class ClipReward:
    """CLIP score: mean over frames of the cosine between the picture's and the prompt's embedding, in [-1, 1].

    `reward(videos [N, F, 3, H, W] in [0, 1], prompts) -> [N]`. folder_or_id: a folder or Hub repository with a
    `CLIPModel`; processor: where its tokenizer and image processor are, if not there. Pictures are resized and cropped
    at the centre as that processor says; words beyond its text length (77 tokens) are not read. `frames` of each video
    are looked at. `device` holds the model.
    """

    def __init__(
        self, folder_or_id: str | Path = "openai/clip-vit-large-patch14", processor: str | Path | None = None,
        frames: int = 8, device: str | torch.device = "cpu",
    ):  # fmt: skip
        from transformers import CLIPModel, CLIPProcessor

        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.model = CLIPModel.from_pretrained(folder_or_id).to(device).eval().requires_grad_(False)
        self.processor = CLIPProcessor.from_pretrained(processor or folder_or_id)
        self.frames, self.scale = frames, 1.0

    @torch.no_grad()
    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        from PIL import Image

        check_videos(videos, prompts)
        picked = to_uint8(videos[:, even_frames(videos.shape[1], self.frames)])  # [N, f, 3, H, W]
        length = self.model.config.text_config.max_position_embeddings
        scores = []
        for frames, prompt in zip(picked, prompts, strict=True):
            pictures = [Image.fromarray(frame.transpose(1, 2, 0)) for frame in frames]
            inputs = self.processor(
                text=[prompt], images=pictures, truncation=True, max_length=length, return_tensors="pt"
            )
            inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask", "pixel_values")}
            out = self.model(**inputs)  # its embeddings have length 1
            scores.append((out.image_embeds @ out.text_embeds[0]).mean())
        scores = (self.scale * torch.stack(scores)).float()
        if not scores.isfinite().all():
            raise RewardError(f"{type(self).__name__} must give finite scores, got {scores.tolist()}")
        return scores.to(videos.device)


class PickScoreReward(ClipReward):
    """PickScore (Kirstain et al. 2023): a CLIP-H trained on human choices. The cosine times the model's own scale,
    divided by 26 so that scores lie near 1 (flow_grpo's convention). Otherwise as `ClipReward`."""

    def __init__(
        self, folder_or_id: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        frames: int = 8, device: str | torch.device = "cpu",
    ):  # fmt: skip
        super().__init__(folder_or_id, processor, frames, device)
        self.scale = self.model.logit_scale.exp().item() / 26
