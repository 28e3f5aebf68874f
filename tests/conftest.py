"""Shared by the tests: running scripts as users do, tiny settings, and models small enough to be instant."""

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

from processes import Job

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import checkpoint  # noqa: E402
import dataset  # noqa: E402
import defaults  # noqa: E402
import generator  # noqa: E402
import misc  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # the models here are tiny; threads would only wait for each other

# The smallest network and run on the digits.
TINY_NETWORK = ["--model_channels", "8", "--channel_mult", "1", "2", "--num_blocks", "1", "--attn_resolutions", "4"]
TINY_RUN = ["--train_steps", "3", "--bsz", "8", "--global_bsz", "16", "--log_freq", "1", "--sampling_freq", "3"]
TINY_RUN += ["--nsampling", "4", "--lr_rampup_steps", "2"]

# A run of 12 steps with a checkpoint every 3, and one that never ends; both stages.
LENGTH = ["--train_steps", "12", "--dump_freq", "3", "--log_freq", "5", "--sampling_freq", "4", "--nsampling", "2"]
BATCH = ["--global_bsz", "8", "--bsz", "4", "--lr_rampup_steps", "6", "--keep", "2"]
STAGE_1 = ["train.py", *TINY_NETWORK, "--dropout", "0.2", *LENGTH, *BATCH]
STAGE_2 = ["train.py", "--mode", "characteristic", *LENGTH, *BATCH, "--num_steps", "4", "--bank_size", "16"]
STAGE_2 += ["--bank_refresh_freq", "2", "--teacher_steps", "3", "--dsm_share", "0.5"]
SMALL = [*TINY_NETWORK, "--dropout", "0.2", "--global_bsz", "8", "--bsz", "4", "--lr_rampup_steps", "6", "--log_freq", "5"]
ENDLESS = ["--train_steps", "1000000", "--dump_freq", "1000000", "--sampling_freq", "0", "--lr_decay", "none", "--keep", "2"]

# Short runs of both stages, of 4 steps with a checkpoint every 2.
SHORT_STAGE_1 = ["train.py", *TINY_NETWORK, "--train_steps", "4", "--bsz", "4", "--global_bsz", "8", "--sampling_freq", "0"]
SHORT_STAGE_1 += ["--dump_freq", "2"]
SHORT_STAGE_2 = ["train.py", "--mode", "characteristic", "--train_steps", "4", "--bsz", "4", "--global_bsz", "8"]
SHORT_STAGE_2 += ["--sampling_freq", "0", "--num_steps", "2", "--bank_size", "4"]


def launch(*command, ranks=None, expect=0, gpu=False):
    """A script as users start it, with python or with torchrun; subprocess.CompletedProcess with text output."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [str(part) for part in command]
    done = subprocess.run(launcher + command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == expect, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def run(*command, ranks=1, expect=0):
    """The same in processes that need not import torch first, several times as fast: processes.Job."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder) / "log", *command, ranks=ranks)
        statuses = job.wait(300)
        assert statuses == [expect] * ranks, f"{statuses}: {' '.join(map(str, command))}\n{job.out()}\n{job.err()}"
        return subprocess.CompletedProcess(command, expect, job.out(), job.err())


# ----------------------------------------------------------------------------------------------- runs and their folders


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny denoiser and its flow map, trained by the real script under torchrun with two gloo ranks and two rounds."""
    folder = tmp_path_factory.mktemp("trained")
    halves = ["--bsz", "4"]
    first = launch(
        "train.py", "--mode", "denoiser", "--workdir", folder / "denoiser", *TINY_NETWORK, *TINY_RUN, *halves, ranks=2
    )
    teacher = folder / "denoiser" / "DDPMpp-000003.pth"
    options = ["--teacher", teacher, "--num_steps", "4", "--bank_size", "16", "--bank_refresh_freq", "1"]
    second = launch("train.py", "--mode", "characteristic", "--workdir", folder / "flow", *options, *TINY_RUN, *halves, ranks=2)
    return {
        "denoiser": teacher,
        "characteristic": folder / "flow" / "DDPMpp-000003.pth",
        "folders": [folder / "denoiser", folder / "flow"],
        "outputs": [first, second],
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A denoiser with dropout, so that its students draw random numbers in the network too."""
    folder = tmp_path_factory.mktemp("teacher")
    assert Job(folder / "log", *STAGE_1, "--workdir", folder / "run").wait() == [0]
    return folder / "run" / "DDPMpp-000012.pth"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with the workdirs `ode` and `flow` of a tiny denoiser and its student."""
    folder = tmp_path_factory.mktemp("models")
    for command, name in ((SHORT_STAGE_1, "ode"), ([*SHORT_STAGE_2, "--teacher", "ode/DDPMpp-000004.pth"], "flow")):
        job = Job(folder / f"log-{name}", *command, "--workdir", name, cwd=folder)
        assert job.wait() == [0], job.err()
    return folder


def tiny_config(**flags):
    network = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    return defaults.resolve({**network, "bsz": 8, "global_bsz": 8, "num_steps": 4, "grid_steps": 4, **flags})


def tiny_teacher(**flags):
    config = tiny_config(**flags)
    torch.manual_seed(0)
    model = checkpoint.build_model(config).eval().requires_grad_(False)
    return generator.Trained(model, config, torch.full((1, 8, 8), 0.2), 0, "")


def tiny_checkpoint(folder, **flags):
    """The path of a checkpoint of tiny_config(**flags), with random weights that are not at their start."""
    config = tiny_config(**flags)
    torch.manual_seed(0)
    model = checkpoint.build_model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    data = config.data
    mean = torch.full((data.image_channels, data.image_size, data.image_size), 0.1)
    return checkpoint.TrainingState(model, config, mean).save(folder)


def wait_for(condition, what, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} in {timeout} s"
        time.sleep(0.02)


def has_trained(workdir):
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def metrics(workdir):
    """What metrics.jsonl holds, but for the speed and the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    measured = ("images_per_s", "data_share", "gflops_per_s", "memory_gb", "seconds")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def assert_equal(a, b, where=""):
    """Equal to the last bit: tensors, numbers, and whatever holds them."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Weights, optimizer, average, counters and metrics of two workdirs that trained to the end; pictures too."""
    assert_equal(*(checkpoint.read(workdir / "DDPMpp-000012.pth") for workdir in (a, b)))
    assert metrics(a) == metrics(b) and [line["step"] for line in metrics(a)] == [5, 10, 12]
    names = [sorted(path.name for path in workdir.glob("**/*") if path.name != ".lock") for workdir in (a, b)]
    assert names[0] == names[1]
    for path in (a / "samples").iterdir():
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes()


# ------------------------------------------------------------------------------------------------------- sets of images


def images(n=37, shape=(1, 6, 5), seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def in_memory(batch):
    return dataset.MemoryImages(batch, torch.zeros(len(batch)))


def write_folder(folder, batch, classes=None):
    for i, image in enumerate(batch):
        place = folder / (f"class{i % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        misc.write_png(place / f"{i:06d}.png", image)
    return folder


def rgb16():
    """A PNG file with 16 bits a channel, which Pillow reads as 8 without a word."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(5 * 6)) for _ in range(6))
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------- golden weights


def golden_generator(name):
    return torch.Generator().manual_seed(zlib.crc32(f"golden-1:{name}".encode()))


def golden_tensor(key, shape):
    """The weight that tests/golden/*.npz were computed with: a function of its name and shape."""
    generator = golden_generator(key)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if key.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    x = torch.randn(shape, generator=generator)
    if key.endswith(("bias", "running_mean")):
        return 0.1 * x
    return x * math.sqrt(2 / math.prod(shape[1:])) if len(shape) >= 2 else 1 + 0.1 * x


def golden_images(name, shape):
    """The uint8 images (N, C, H, W) that tests/golden/*.npz were computed from."""
    generator, (n, c, h, w) = golden_generator(f"images:{name}"), shape
    coarse = torch.rand((n, c, h // 4, w // 4), generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=False)
    x = x + 0.05 * torch.randn(shape, generator=generator)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files with the golden weights in the published formats: paths by name."""
    from torchvision.models import vgg16

    folder = tmp_path_factory.mktemp("weights")
    shapes = json.loads((GOLDEN / "inception-keys.json").read_text())
    with torch.device("meta"):
        vgg = vgg16(weights=None).features
    lin = [golden_tensor(f"lin{i}", (1, c, 1, 1)).abs() for i, c in enumerate((64, 128, 256, 512, 512))]
    contents = {
        "inception": {key: golden_tensor(key, tuple(shape)) for key, shape in shapes.items()},
        "vgg": {f"features.{k}": golden_tensor(f"features.{k}", tuple(v.shape)) for k, v in vgg.state_dict().items()},
        "piq": lin,
        "lpips": {f"lin{i}.model.1.weight": tensor for i, tensor in enumerate(lin)},
    }
    paths = {name: folder / f"{name}.pth" for name in contents}
    for name, content in contents.items():
        torch.save(content, paths[name])
    return paths


# --------------------------------------------------------------------------------------------------------- closed forms


class Gaussian:
    """Target N(mean, sigma^2 I): its denoiser and flow map in closed form, for images (B, d) and times (B,)."""

    def __init__(self, mean, sigma):
        self.mean, self.sigma = mean, sigma

    def variance(self, t):
        return (1 - t) ** 2 * self.sigma**2 + t * (2 - t)

    def denoise(self, x, t):
        t = t[:, None]
        return self.mean + (1 - t) * self.sigma**2 / self.variance(t) * (x - (1 - t) * self.mean)

    def flow_map(self, x, t, s):
        t, s = t[:, None], s[:, None]
        return (1 - s) * self.mean + (self.variance(s) / self.variance(t)).sqrt() * (x - (1 - t) * self.mean)


@pytest.fixture
def gaussian():
    return Gaussian(torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64), 0.5)


def pytest_terminal_summary(terminalreporter):
    """The counts of the README's section "Reliability": kills survived, bad inputs tried."""
    counts = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            counts[name] = counts.get(name, 0) + value
    if counts:
        terminalreporter.write_line("reliability: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
