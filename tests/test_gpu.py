"""On a GPU: scripts, precisions, NCCL, continued runs, and the numbers of the CPU.  Skipped where there is none."""

import json

import numpy as np
import pytest
import torch

import checkpoint
import dataset
import fid
import generator
import lpips
import sde
from conftest import TINY_NETWORK, golden_images, launch, tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RUN = [
    "train.py",
    *TINY_NETWORK,
    "--dropout",
    "0.2",
    "--train_steps",
    "12",
    "--bsz",
    "8",
    "--global_bsz",
    "16",
    "--dump_freq",
    "6",
]
RUN += ["--lr_decay", "none", "--log_freq", "6", "--sampling_freq", "12", "--nsampling", "4", "--lr_rampup_steps", "2"]
STAGE_2 = ["--mode", "characteristic", "--num_steps", "4", "--bank_size", "32", "--bank_refresh_freq", "4"]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    launch(*RUN, "--workdir", folder / "teacher", gpu=True)
    return folder / "teacher" / "latest.pth"


def last_line(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("ranks", [None, 1], ids=["python", "NCCL"])
@pytest.mark.parametrize("how", ["--precision fp32", "--precision tf32", "--precision bf16", "--precision bf16 --compile"])
def test_stage_1_trains(tmp_path, how, ranks):
    launch(*RUN, *how.split(), "--workdir", tmp_path / "run", ranks=ranks, gpu=True)
    line = last_line(tmp_path / "run")
    assert line["step"] == 12 and 0 < line["loss"] < 10 and line["gflops_per_s"] > 0 and line["memory_gb"] >= 0


@pytest.mark.parametrize("objective", ["trajectory", "semigroup"])
@pytest.mark.parametrize("how", ["--precision fp32", "--precision bf16", "--precision bf16 --compile"])
def test_stage_2_trains(tmp_path, teacher, how, objective):
    flags = [*STAGE_2, "--teacher", teacher, "--objective", objective, *how.split(), "--workdir", tmp_path / "run"]
    launch(*RUN, *flags, gpu=True)
    assert last_line(tmp_path / "run")["step"] == 12
    assert {p.name for p in (tmp_path / "run").iterdir()}.isdisjoint({"bank-0.bin", "bank-0.json"})


@pytest.mark.parametrize("stage_2", [False, True], ids=["stage 1", "stage 2"])
def test_a_run_that_was_cut_continues_as_the_one_that_was_not(tmp_path, teacher, stage_2):
    """To float32's rounding: a GPU may add up a gradient in another order each time."""
    flags = [*RUN, *([*STAGE_2, "--teacher", teacher] if stage_2 else []), "--workdir"]
    launch(*flags, tmp_path / "whole", gpu=True)
    launch(*flags, tmp_path / "cut", "--train_steps", "6", gpu=True)
    launch(*flags, tmp_path / "cut", gpu=True)
    whole, cut = (checkpoint.read(tmp_path / name / "DDPMpp-000012.pth") for name in ("whole", "cut"))
    for name, value in whole["model"].items():
        torch.testing.assert_close(cut["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"mode": "characteristic"}], ids=["denoiser", "flow map"])
def test_images_are_those_of_the_cpu(tmp_path, flags):
    path = tiny_checkpoint(tmp_path, **flags)
    cpu, gpu = (generator.load_model(path, device=device).images(range(16)).int() for device in ("cpu", "cuda"))
    assert (cpu - gpu).abs().max() <= 1
    for precision, bound in (("tf32", 8), ("bf16", 40)):
        fast = generator.load_model(path, {"precision": precision}, "cuda").images(range(16)).int()
        assert (fast - cpu).abs().max() <= bound, precision


def test_eval_writes_the_images_that_python_draws(tmp_path, teacher):
    launch("eval.py", "--checkpoint", teacher, "--workdir", tmp_path / "png", "--end_seed", "19", ranks=1, gpu=True)
    launch("eval.py", "--checkpoint", teacher, "--workdir", tmp_path / "npz", "--end_seed", "19", "--format", "npz", gpu=True)
    drawn = generator.load_model(teacher, device="cuda").images(range(20))
    for path in (tmp_path / "png", tmp_path / "npz"):
        images = dataset.open_images(path)[0]
        assert torch.equal(images.batch(range(20))[0], drawn)


def test_scores_are_those_of_the_cpu(weights):
    images = golden_images("gpu", (64, 3, 32, 32))
    for name in ("pixels", "inception"):
        cpu, gpu = (fid.measure(images, fid.load_features(name, d, weights["inception"])) for d in ("cpu", "cuda"))
        scale = np.abs(cpu.sigma).max()
        assert np.abs(cpu.mu - gpu.mu).max() < 1e-4 * np.abs(cpu.mu).max()
        assert np.abs(cpu.sigma - gpu.sigma).max() < (1e-4 * scale if name == "inception" else 1e-12 * scale)


def test_lpips_is_that_of_the_cpu(weights):
    a, b = (golden_images(name, (4, 3, 32, 32)) / 255 for name in "ab")
    net = lpips.LPIPS(weights["piq"], weights["vgg"])
    cpu = net(a, b)
    torch.backends.cudnn.allow_tf32 = False
    torch.testing.assert_close(net.cuda()(a.cuda(), b.cuda()).cpu(), cpu, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ["deis", "dpm", "heun"])
def test_solvers_run_on_the_device_of_their_states(solver):
    x = torch.randn(4, 1, 8, 8)
    states = [
        list(sde.sample(sde.solver(solver, lambda x, t: 0.3 * x), x.to(d), sde.grid(5, 0.999, 1e-3, 1.0).to(d)))[-1]
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(states[1].cpu(), states[0], rtol=1e-5, atol=1e-5)


def test_both_directions_run(tmp_path):
    model = generator.load_model(tiny_checkpoint(tmp_path), device="cuda")
    images = model.images(range(4))
    again, cpu = model.decode(model.encode(images)), generator.load_model(tiny_checkpoint(tmp_path))
    assert (again.int() - cpu.decode(cpu.encode(images)).int()).abs().max() <= 2
    assert (model.from_images(images, 0.5).int() - cpu.from_images(images, 0.5).int()).abs().max() <= 2
