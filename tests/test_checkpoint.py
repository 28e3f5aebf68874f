"""Weights on disk: what a checkpoint holds, the moving average, which files are kept, and files of others."""

import os
import signal

import torch

import checkpoint
import misc
from conftest import STAGE_1, tiny_config
from processes import Job


def test_ema_follows_its_formula():
    module = torch.nn.Linear(1, 1)
    ema = checkpoint.EMA(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            module.weight.add_(1)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)


def test_checkpoint_holds_what_the_format_says(trained):
    content = torch.load(trained["denoiser"], weights_only=True)
    assert set(content) == {"model", "ema", "optim", "step", "config", "mean", "random", "run", "format"}
    assert content["step"] == 3 and content["mean"].shape == (1, 8, 8)
    assert not torch.equal(content["model"]["dec.8x8_aux_conv.bias"], content["ema"]["dec.8x8_aux_conv.bias"])


def test_equal_runs_write_equal_files(tmp_path):
    """So that the hash in a table of scores names the weights."""
    config = tiny_config()
    hashes = set()
    for folder in ("a", "b/longer"):
        torch.manual_seed(0)
        model = checkpoint.build_model(config)
        path = checkpoint.TrainingState(model, config, torch.zeros(1, 8, 8)).save(tmp_path / folder)
        assert f".pth.{os.getpid()}".encode() not in path.read_bytes()  # torch.save keeps the name of a path it is given
        hashes.add(misc.file_hash(path))
    assert len(hashes) == 1


# ---------------------------------------------------------------------------------------------------- files in a folder


def test_rotation_keeps_what_latest_points_to(tmp_path):
    """A kill between writing a checkpoint and pointing to it leaves a later one, which may be all that --keep 1 counts."""
    for step in (1, 2, 3):
        (tmp_path / f"DDPMpp-{step:06d}.pth").touch()
    (tmp_path / "latest.pth").symlink_to("DDPMpp-000002.pth")
    checkpoint.remove_old(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["DDPMpp-000002.pth", "DDPMpp-000003.pth"]


def test_the_last_checkpoints_are_kept(tmp_path):
    assert Job(tmp_path / "log", *STAGE_1, "--workdir", tmp_path / "run").wait() == [0]
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert names == ["DDPMpp-000009.pth", "DDPMpp-000012.pth", "latest.pth"]
    assert Job(tmp_path / "log", *STAGE_1, "--keep", "0", "--workdir", tmp_path / "all").wait() == [0]
    assert len(checkpoint.checkpoints(tmp_path / "all")) == 4


def test_a_lost_pointer_and_a_damaged_checkpoint(tmp_path):
    """Copying may lose the link: the last checkpoint is found.  A damaged one is an error, never passed over in silence."""
    run = [*STAGE_1, "--workdir", tmp_path / "run"]
    assert Job(tmp_path / "first", *run, fault=("step", 8)).wait() == [-signal.SIGKILL]
    (tmp_path / "run" / "latest.pth").unlink()
    assert checkpoint.latest_checkpoint(tmp_path / "run").name == "DDPMpp-000006.pth"
    (tmp_path / "run" / "DDPMpp-000006.pth").write_bytes(b"damaged")
    job = Job(tmp_path / "second", *run)
    assert job.wait() == [2] and "DDPMpp-000006.pth is not a checkpoint" in job.err()
