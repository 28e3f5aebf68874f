"""Shared by the tests: running scripts as users do, tiny settings, and models small enough to be instant."""

import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

from processes import Job

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GOLDEN = ROOT / "tests" / "golden"

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # the models here are tiny; threads would only wait for each other

# The smallest network and run on the digits.
TINY_NETWORK = ["--model_channels", "8", "--channel_mult", "1", "2", "--num_blocks", "1", "--attn_resolutions", "4"]
TINY_RUN = ["--train_steps", "3", "--bsz", "8", "--global_bsz", "16", "--log_freq", "1", "--sampling_freq", "3"]
TINY_RUN += ["--nsampling", "4", "--lr_rampup_steps", "2"]


def launch(*command, ranks=None, expect=0):
    """A script as users start it, with python or with torchrun; subprocess.CompletedProcess with text output."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
