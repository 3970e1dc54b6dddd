"""Learned rewards: workers that these tests write and start, well behaved and not; the two worker scripts with stub
libraries; CLIP and PickScore with a tiny random model against the formula by hand."""

import os
import sys
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kvpo_min.reward_models import (
    ClipReward,
    PickScoreReward,
    RewardError,
    WorkerReward,
    even_frames,
    hpsv3_reward,
    videoalign_rewards,
    worker_environment,
)
from kvpo_min.rewards import Mixture

VIDEOS = torch.rand(3, 5, 3, 28, 42, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red disc", 'words with "quotes", commas\nand lines', "größer"]

STUB = """
import json, os, sys, time
def tell(line):
    sys.stdout.write(line + chr(10))
    sys.stdout.flush()
starts = int(open({count!r}).read() or 0) + 1 if os.path.exists({count!r}) else 1
open({count!r}, "w").write(str(starts))
for line in sys.stdin:
    request = json.loads(line)
    prompts = request["prompts"]
    tell_scores = lambda scores: tell(json.dumps(dict(id=request["id"], scores=scores)))
    {body}
"""


@pytest.fixture
def stub(tmp_path):
    """Writes a worker whose answer to each request is `body`; -> its reward, made with `**options`."""
    made = []

    def make(body, **options):
        script = tmp_path / "stub_worker.py"
        script.write_text(STUB.format(body=body, count=str(tmp_path / "starts")))
        made.append(WorkerReward([sys.executable, "-S", str(script)], **({"timeout": 30} | options)))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def starts(tmp_path):
    return int((tmp_path / "starts").read_text())


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------- a worker that works


def test_scores_arrive_and_the_process_is_reused(stub, tmp_path):
    reward = stub("tell_scores([len(p) + len(request['component']) for p in prompts])")
    assert not (tmp_path / "starts").exists()  # nothing runs before the first call
    expected = torch.tensor([float(len(p)) for p in PROMPTS])
    assert_close(reward(VIDEOS, PROMPTS), expected, rtol=0, atol=0)
    assert_close(reward(VIDEOS, PROMPTS), expected, rtol=0, atol=0)
    assert_close(reward.part("mq")(VIDEOS, PROMPTS), expected + 2, rtol=0, atol=0)
    assert starts(tmp_path) == 1
    process = reward.worker.process
    reward.close()
    assert process.poll() == 0  # it ended by itself when its stdin did
    assert_close(reward(VIDEOS, PROMPTS), expected, rtol=0, atol=0)
    assert starts(tmp_path) == 2


def test_the_file_holds_the_pixels(stub, tmp_path):
    """The worker copies the file; it must be the rounded pixels, and gone after the answer."""
    copy = tmp_path / "copy.npy"
    body = f"open({str(copy)!r}, 'wb').write(open(request['videos'], 'rb').read()); tell_scores([0] * len(prompts))"
    reward = stub(f"{body}; sys.stderr.write(request['videos'] + chr(10)); sys.stderr.flush()")
    reward((VIDEOS * 1.5 - 0.25).requires_grad_(), PROMPTS)  # partly outside [0, 1]
    pixels = np.load(copy)
    assert pixels.dtype == np.uint8 and pixels.shape == tuple(VIDEOS.shape)
    assert_close(torch.from_numpy(pixels) / 255.0, (VIDEOS * 1.5 - 0.25).clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)
    deadline = time.monotonic() + 10
    while not reward.worker.stderr and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(reward.worker.stderr[0])


def test_noise_on_stdout_is_skipped(stub):
    reward = stub("tell('Loading checkpoint shards: 100%'); tell(''); tell('[1, 2]'); tell_scores([1, 2.5, 3])")
    for _ in range(2):
        assert reward(VIDEOS, PROMPTS).tolist() == [1, 2.5, 3]


ANSWERS = {  # what a worker prints -> its scores
    "after a bar": "tell(chr(13) + '100%' + chr(13) + json.dumps(dict(id=request['id'], scores=[1, 2, 3])))",
    "after words": "tell('loaded: 100% ' + json.dumps(dict(id=request['id'], scores=[1, 2, 3])))",
    "before a bar": "tell(json.dumps(dict(id=request['id'], scores=[1, 2, 3])) + chr(13) + '100%')",
    "without an id": "tell(json.dumps(dict(scores=[1, 2, 3])))",
    "no error": "tell(json.dumps(dict(id=request['id'], scores=[1, 2, 3], error=None)))",
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_beside_something_else_is_read(case, stub):
    assert stub(ANSWERS[case])(VIDEOS, PROMPTS).tolist() == [1, 2, 3]


NO_ANSWERS = {  # what a worker prints instead, and what must be in the error, soon
    "a bare list": ("tell('[0.1, 0.2, 0.3]')", "[0.1, 0.2, 0.3]"),
    "of another request": ("tell(json.dumps(dict(id=request['id'] + 1, scores=[1, 2, 3])))", '"id": 1'),
    "an id that is no number": ("tell(json.dumps(dict(id='x', scores=[1, 2, 3])))", '"id": "x"'),
    "Python's form": ("tell(str(dict(id=request['id'], scores=[1, 2, 3])))", "{'id': 0"),
    "cut": ("tell('{' + chr(34) + 'id' + chr(34) + ': 0, ')", '{"id": 0,'),
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_an_answer_that_cannot_be_used_is_named_at_once(case, stub):
    body, said = NO_ANSWERS[case]
    begun = time.monotonic()
    with pytest.raises(RewardError, match="must ") as caught:
        stub(body, timeout=300)(VIDEOS, PROMPTS)
    assert said in str(caught.value) and time.monotonic() - begun < 60


def test_a_worker_that_prints_without_end_is_ended(stub):
    with pytest.raises(RewardError, match="no answer within 1 s"):
        stub("[tell('still loading') for _ in iter(int, 1)]", timeout=1)(VIDEOS, PROMPTS)


def test_pixels_that_are_not_finite_reach_no_reward(stub, tmp_path):
    """Rounded to bytes NaN would be some colour, and score as that."""
    videos, asked = VIDEOS.clone(), []
    videos[1, 2, 0, 3, 4] = float("nan")
    mixture = Mixture({"it": lambda videos, prompts: asked.append(1) or [1.0] * len(videos)}, {"it": 1.0})
    for reward in (stub("tell_scores([1, 2, 3])"), mixture):
        with pytest.raises(FloatingPointError, match="pixels.*not finite"):
            reward(videos, PROMPTS)
    assert not asked and not (tmp_path / "starts").exists()


def test_a_worker_gets_no_secrets_of_its_parent(stub, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_VARIABLE", "LD_PRELOAD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    body = "env = os.environ; secrets = sum(v == 'secret' for v in env.values()); "
    body += "tell_scores([secrets, int('PATH' in env), int('HF_HOME' in env)])"
    assert stub(body)(VIDEOS, PROMPTS).tolist() == [0, 1, 1]


def test_it_fits_in_a_mixture(stub):
    reward = stub("tell_scores([0.5, 1, 2])")
    mixture = Mixture({"vq": reward, "ta": lambda videos, prompts: torch.ones(len(videos))}, {"vq": 2.0, "ta": 1.0})
    assert mixture(VIDEOS, PROMPTS).tolist() == [2, 3, 5]


def test_the_worker_ends_with_the_reward(stub):
    reward = WorkerReward(stub("tell_scores([1, 2, 3])").worker.command, timeout=30)
    reward(VIDEOS, PROMPTS)
    pid = reward.worker.process.pid
    assert running(pid)
    del reward
    assert not running(pid)


def test_a_late_answer_is_not_taken_for_the_next(stub):
    """An interrupted request leaves its answer in the pipe."""
    reward = stub(
        "tell(json.dumps(dict(id=max(0, request['id'] - 1), scores=[1 + request['id'], 2, 3]))); tell_scores([2, 2, 3])"
    )
    assert reward(VIDEOS, PROMPTS).tolist() == [1, 2, 3]
    assert reward(VIDEOS, PROMPTS).tolist() == [2, 2, 3]  # and not what came under the id of the first


def test_long_prompts_do_not_block(stub):
    """A worker that is silent and does not read: the request is larger than a pipe holds."""
    reward = stub("")
    reward.worker.command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    reward.timeout = 0.5
    with pytest.raises(RewardError, match="within 0.5 s"):
        reward(VIDEOS, ["word " * 100_000] * 3)


# ---------------------------------------------------------------- workers that do not


def test_a_worker_that_dies_is_named_with_its_last_words(stub, tmp_path):
    body = "sys.stderr.write('CUDA out of memory' + chr(10)); tell('half an ans'); sys.stderr.flush(); os._exit(3)"
    reward = stub(body)
    with pytest.raises(RewardError) as caught:
        reward(VIDEOS, PROMPTS)
    for part in ("stub_worker.py", "died", "exit code 3", "CUDA out of memory", "half an ans"):
        assert part in str(caught.value)
    with pytest.raises(RewardError, match="died"):  # started anew, it dies anew
        reward(VIDEOS, PROMPTS)
    assert starts(tmp_path) == 2


def test_a_worker_that_died_once_serves_again(stub, tmp_path):
    reward = stub("tell_scores([1, 2, 3]) if starts > 1 else os._exit(1)")
    with pytest.raises(RewardError, match="exit code 1"):
        reward(VIDEOS, PROMPTS)
    assert reward(VIDEOS, PROMPTS).tolist() == [1, 2, 3]


def test_a_worker_that_hangs_is_ended(stub):
    reward = stub("tell('thinking'); time.sleep(600)", timeout=1.5)
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"stub_worker.py.*no answer within 1.5 s(?s:.*)thinking"):
        reward(VIDEOS, PROMPTS)
    assert time.monotonic() - begun < 10
    assert reward.worker.process is None


def test_children_of_a_hanging_worker_end_too(stub, tmp_path):
    pid = tmp_path / "child"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    body = f"import subprocess; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    reward = stub(body, timeout=2)
    with pytest.raises(RewardError, match="no answer"):
        reward(VIDEOS, PROMPTS)
    deadline = time.monotonic() + 10  # whoever adopts it has to collect it
    while running(int(pid.read_text())) and time.monotonic() < deadline:
        state = open(f"/proc/{pid.read_text()}/stat").read().split()[2] if os.path.exists("/proc/self/stat") else ""
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not running(int(pid.read_text()))


@pytest.mark.parametrize(
    "body, message",
    [
        ("tell_scores([1, float('nan'), 3])", "3 finite scores, got .*nan"),
        ("tell_scores([1, float('inf'), 3])", "3 finite scores, got .*inf"),
        ("tell_scores([1, 2])", r"3 finite scores, got \[1, 2\]"),
        ("tell_scores(['1', '2', '3'])", "3 finite scores"),
        ("tell_scores([None, 1, 2])", "3 finite scores"),
        ("tell_scores([True, 1, 2])", "3 finite scores"),
        ("tell_scores(1.0)", "3 finite scores, got 1.0"),
        ("tell(json.dumps(dict(id=request['id'], score=[1, 2, 3])))", "3 finite scores, got .*score"),
        ("tell('{not json')", "answer in JSON .*{not json"),
        ("tell('not json'); sys.exit()", "died .exit code 0(?s:.*)not json"),
        ("tell(json.dumps(dict(id=request['id'], error='no such picture')))", "reports: no such picture"),
    ],
)
def test_bad_answers_are_errors(stub, body, message):
    reward = stub(body)
    with pytest.raises(RewardError, match=message) as caught:
        reward(VIDEOS, PROMPTS)
    assert "stub_worker.py" in str(caught.value)


def test_a_reported_error_does_not_cost_the_process(stub, tmp_path):
    """Loading 7B again for one bad request would be dear."""
    body = "request['id'] or tell(json.dumps(dict(id=0, error='bad'))); request['id'] and tell_scores([1, 2, 3])"
    reward = stub(body)
    with pytest.raises(RewardError, match="bad"):
        reward(VIDEOS, PROMPTS)
    assert reward(VIDEOS, PROMPTS).tolist() == [1, 2, 3]
    assert starts(tmp_path) == 1


def test_a_worker_that_cannot_start():
    reward = hpsv3_reward("/nowhere/bin/python")
    with pytest.raises(RewardError, match="/nowhere/bin/python .*hpsv3.py.*cannot be started.*envs/"):
        reward(VIDEOS, PROMPTS)


def test_wrong_use_is_refused():
    for command, timeout in (("", 1), ([], 1), ("python", 0)):
        with pytest.raises(ValueError, match="timeout above 0"):
            WorkerReward(command, timeout)
    with pytest.raises(ValueError, match="N prompts"):
        WorkerReward("python worker.py")(VIDEOS, PROMPTS[:2])


# ---------------------------------------------------------------- the worker scripts, with stub libraries


def test_hpsv3_worker(tmp_path, monkeypatch):
    """A stub of the package: mu is the picture's mean red plus the prompt's length. It prints, as such packages do."""
    package = tmp_path / "hpsv3"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import numpy as np\n"
        "class HPSv3RewardInferencer:\n"
        "    def __init__(self, config_path=None, checkpoint_path=None, device='cuda'):\n"
        "        print('{\"loading\":', checkpoint_path, device)\n"
        "    def reward(self, prompts, image_paths):\n"
        "        print('batch of', len(prompts))\n"
        "        assert len(prompts) == len(image_paths) <= 2, 'batch'\n"
        "        red = [np.asarray(image)[..., 0].mean() for image in image_paths]\n"
        "        assert image_paths[0].size == (42, 28), image_paths[0].size\n"
        "        return [(r + len(p), 0.1) for r, p in zip(red, prompts)]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pixels = (VIDEOS * 255).round()
    for options, frames in ((), [0, 1, 2, 3, 4]), (("--frames", "3"), [0, 2, 4]):
        reward = hpsv3_reward(sys.executable, "--device", "cpu", "--batch", "2", *options, timeout=60)
        expected = pixels[:, frames, 0].mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in PROMPTS])
        assert_close(reward(VIDEOS, PROMPTS), expected, rtol=1e-5, atol=1e-3)
        reward.close()


def test_an_offloaded_worker_leaves_the_gpu_also_after_an_error(tmp_path, monkeypatch):
    (tmp_path / "hpsv3").mkdir()
    (tmp_path / "hpsv3" / "__init__.py").write_text(
        "class Model:\n"
        f"    def to(self, device): open({str(tmp_path / 'log')!r}, 'a').write(device + ' ')\n"
        "class HPSv3RewardInferencer:\n"
        "    model = Model()\n"
        "    def __init__(self, **kwargs): pass\n"
        "    def reward(self, prompts, image_paths):\n"
        "        if prompts[0] == 'fail': raise RuntimeError('out of memory')\n"
        "        return [(1.0, 0.1)] * len(prompts)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reward = hpsv3_reward(sys.executable, "--device", "meta", "--offload", timeout=60)
    with pytest.raises(RewardError, match="out of memory"):
        reward(VIDEOS[:1], ["fail"])
    assert (tmp_path / "log").read_text() == "meta cpu "
    assert reward(VIDEOS[:1], ["a"]).tolist() == [1.0]
    assert (tmp_path / "log").read_text() == "meta cpu meta cpu "
    reward.close()


def test_videoalign_worker(tmp_path):
    """A stub of the repository's modules. The scores are means of the frames that arrive: vq of the red channel, mq of
    red minus blue (0 on shades of grey), ta of the red channel plus the prompt's length."""
    repo = tmp_path / "VideoAlign"
    repo.mkdir()
    (repo / "vision_process.py").write_text(
        "VIDEO_READER_BACKENDS = {}\n"
        "def get_video_reader_backend(): return 'decord'\n"
        "def smart_nframes(ele, total_frames, video_fps): return round(total_frames / video_fps * ele['fps'])\n"
        "def fetch(ele): return VIDEO_READER_BACKENDS[get_video_reader_backend()](ele)\n"
    )
    (repo / "inference.py").write_text(
        "import os\n"
        "import vision_process\n"
        "class VideoVLMRewardInference:\n"
        "    def __init__(self, load_from_pretrained, device, dtype): print('loaded', load_from_pretrained)\n"
        "    def reward(self, video_paths, prompts, use_norm=True):\n"
        "        assert len(video_paths) == len(prompts) <= 2, 'batch'\n"
        "        out = []\n"
        "        for path, prompt in zip(video_paths, prompts):\n"
        "            ele = {'video': 'file://' + os.path.abspath(path), 'fps': 12.8, 'sample_type': 'uniform'}\n"
        "            video = vision_process.fetch(ele).float()\n"
        "            assert video.shape == (4, 3, 28, 42), video.shape\n"
        "            red, blue = video[:, 0].mean().item(), video[:, 2].mean().item()\n"
        "            out.append({'VQ': red, 'MQ': red - blue, 'TA': red + len(prompt), 'Overall': 0.0})\n"
        "        return out\n"
    )
    options = ["--repo", str(repo), "--weights", "none", "--device", "cpu", "--batch", "2"]
    rewards = videoalign_rewards(sys.executable, *options, timeout=120)
    assert list(rewards) == ["vq", "mq", "ta"]
    red = (VIDEOS * 255).round()[:, [0, 1, 3, 4], 0].mean((1, 2, 3))  # frames 0, 1.33, 2.67, 4, rounded
    assert_close(rewards["vq"](VIDEOS, PROMPTS), red, rtol=1e-5, atol=1e-3)
    lengths = torch.tensor([float(len(p)) for p in PROMPTS])
    assert_close(rewards["ta"](VIDEOS, PROMPTS), red + lengths, rtol=1e-5, atol=1e-3)
    assert rewards["mq"](VIDEOS, PROMPTS).tolist() == [0, 0, 0]
    with pytest.raises(RewardError, match="component.*'beauty'"):
        rewards["vq"].part("beauty")(VIDEOS, PROMPTS)
    assert rewards["vq"].worker is rewards["mq"].worker
    rewards["vq"].close()


# ---------------------------------------------------------------- CLIP and PickScore


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIPModel of width 16 with its tokenizer (a word each) and image processor, as on the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<start>", "<unk>", "a", "red", "disc", "blue", "square", "moves", "<end>"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 1), ("<end>", 9)]
    tokens.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 9}
    config = CLIPConfig(
        text_config=size | text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=12
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():  # a fresh CLIP says nearly the same of every picture
            if weight.ndim > 1:
                weight.mul_(10)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def by_hand(folder, videos, prompts, frames):
    """Cosines [N, f] from the towers and projections alone, pictures resized and cropped with PIL."""
    from PIL import Image
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    words = {"a": 3, "red": 4, "disc": 5, "blue": 6, "square": 7, "moves": 8}
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of CLIP's training pictures
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    rows = []
    with torch.no_grad():
        for video, prompt in zip(videos, prompts, strict=True):
            ids = torch.tensor([[1, *[words[w] for w in prompt.split()][:6], 9]])
            hidden = model.text_model(input_ids=ids).last_hidden_state[0, -1]  # at <end>
            text = model.text_projection(hidden)
            row = []
            for f in frames:
                picture = Image.fromarray((video[f] * 255).round().byte().permute(1, 2, 0).numpy())
                short = min(picture.size)
                width, height = (round(16 * side / short) for side in picture.size)
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
                left, top = (width - 16) // 2, (height - 16) // 2
                crop = np.asarray(picture.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 255
                x = (torch.from_numpy(crop).permute(2, 0, 1) - mean) / std
                hidden = model.vision_model(pixel_values=x[None]).last_hidden_state[0, 0]
                image = model.visual_projection(model.vision_model.post_layernorm(hidden))
                row.append(torch.nn.functional.cosine_similarity(image, text, dim=0))
            rows.append(torch.stack(row))
    return torch.stack(rows), model.logit_scale.exp().item()


def test_clip_score_against_the_formula_by_hand(clip_folder):
    prompts = ["a red disc", "a blue square moves", "a disc a disc a disc a disc a disc"]  # the last one is cut
    cosines, scale = by_hand(clip_folder, VIDEOS, prompts, [0, 2, 4])
    assert cosines.std() > 0.01  # pictures and words matter
    score = ClipReward(clip_folder, frames=3)(VIDEOS, prompts)
    assert_close(score, cosines.mean(1), rtol=1e-4, atol=1e-5)
    pick = PickScoreReward(clip_folder, processor=None, frames=3)(VIDEOS, prompts)
    assert_close(pick, cosines.mean(1) * scale / 26, rtol=1e-4, atol=1e-4)


def test_clip_score_of_a_video_does_not_depend_on_its_neighbours(clip_folder):
    reward = ClipReward(clip_folder, frames=2)
    prompts = ["a red disc", "a blue square", "moves"]
    together = reward(VIDEOS, prompts)
    alone = torch.cat([reward(v[None], [p]) for v, p in zip(VIDEOS, prompts, strict=True)])
    assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.dtype == torch.float32 and not together.requires_grad
    with pytest.raises(ValueError, match="frames.*at least 1"):
        ClipReward(clip_folder, frames=0)


def test_even_frames():
    assert even_frames(69, 8) == [0, 10, 19, 29, 39, 49, 58, 68]
    assert even_frames(5, 1) == [2]
    assert even_frames(3, 8) == [0, 1, 2]
    for count in range(2, 40):
        for n in range(2, count + 1):
            picked = even_frames(count, n)
            assert len(set(picked)) == n and picked[0] == 0 and picked[-1] == count - 1


def test_clip_scores_that_are_no_numbers_skip_the_update(clip_folder):
    reward = ClipReward(clip_folder, frames=2)
    reward.scale = float("nan")
    with pytest.raises(RewardError, match="ClipReward.*finite"):
        reward(VIDEOS, ["red"] * len(VIDEOS))


@pytest.mark.parametrize("visible, expected", [("", "1"), ("4,6", "6")])
def test_a_worker_sees_the_gpu_of_its_torchrun_process(monkeypatch, visible, expected):
    for name, value in dict(WORLD_SIZE="2", LOCAL_RANK="1", CUDA_VISIBLE_DEVICES=visible).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_environment()["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert worker_environment()["CUDA_VISIBLE_DEVICES"] == visible
