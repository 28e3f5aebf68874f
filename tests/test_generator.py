"""A model and seeds, to images: generator.py, and the scripts that draw them, eval.py, teaser.py and compare.py."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import generator
import misc
from conftest import TINY_NETWORK, run


def pixels(folder):
    return {p.name: np.array(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def assert_same_images(a, b):
    """Equal up to one level in a rare pixel, from float rounding."""
    assert a.keys() == b.keys()
    difference = np.abs(np.stack([a[k] for k in a]) - np.stack([b[k] for k in b]))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("options", [["--mode", "characteristic", "--num_steps", "2"], ["--ode_solver", "heun", "--churn"]])
def test_images_depend_on_their_seeds_alone(trained, tmp_path, options):
    mode = "characteristic" if "characteristic" in options else "denoiser"
    shared = ["eval.py", "--checkpoint", trained[mode], "--num_steps", "3", *options, "--start_seed", "5", "--end_seed", "11"]
    run(*shared, "--workdir", tmp_path / "one")
    run(*shared, "--workdir", tmp_path / "two", "--eval_bsz", "2", ranks=2)
    run(*shared[:-3], "9", "--end_seed", "9", "--workdir", tmp_path / "alone")
    one, two, alone = (pixels(tmp_path / d) for d in ("one", "two", "alone"))
    assert list(one) == [f"{seed:06d}.png" for seed in range(5, 12)]
    assert_same_images(one, two)
    assert_same_images(alone, {"000009.png": one["000009.png"]})
    assert len({v.tobytes() for v in one.values()}) == 7
    record = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert record["sha256"] == misc.file_hash(trained[mode]) and record["step"] == 3
    assert record["nfe"] == (2 if mode == "characteristic" else 4)
    assert record["config"]["sampling"].get("churn") == (None if mode == "characteristic" else True)


def test_first_draw_of_a_seed_is_its_latent():
    noise = generator.SeedNoise([3, 4], (1, 8, 8), torch.device("cpu"))
    expected = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(noise()[1], expected) and not torch.equal(noise()[1], expected)


@pytest.mark.parametrize("solver", ["euler", "heun", "deis"])
def test_every_solver_runs_and_counts_its_evaluations(trained, solver):
    loaded = generator.load_model(trained["denoiser"], {"ode_solver": solver, "num_steps": 4}, torch.device("cpu"))
    calls = []
    loaded.model.register_forward_hook(lambda *_: calls.append(1))
    states = list(generator.solve(loaded, range(2)))
    assert len(states) == 5 and all(torch.isfinite(x).all() for x in states)
    assert len(calls) == generator.nfe(loaded.config) == (6 if solver == "heun" else 4)


def test_checkpoint_without_configuration_takes_it_from_flags(trained, tmp_path):
    """What others publish: bare U-Net weights, maybe under a wrapper's prefix."""
    content = torch.load(trained["characteristic"], weights_only=True)
    bare = {"ema": {f"model.{k}": v for k, v in content["ema"].items()}, "model": content["model"], "step": 3}
    torch.save(bare, tmp_path / "bare.pth")
    shared = ["eval.py", "--mode", "characteristic", "--workdir", tmp_path / "out", "--num_steps", "1", "--end_seed", "1"]
    done = run(*shared, "--checkpoint", tmp_path / "bare.pth", "--data_name", "digits", *TINY_NETWORK)
    assert "mean of its data" in done.stderr
    run(*shared[:-5], tmp_path / "ours", *shared[-4:], "--checkpoint", trained["characteristic"])
    ours, bare = pixels(tmp_path / "ours"), pixels(tmp_path / "out")
    assert max(np.abs(ours[k] - bare[k]).max() for k in ours) <= 2  # the mean's part is eval_eps1


def test_teaser_draws_a_grid_and_trajectories(trained, tmp_path):
    grid, paths = tmp_path / "grid.png", tmp_path / "paths.png"
    flow, ode = (("--checkpoint", trained[mode]) for mode in ("characteristic", "denoiser"))
    run("teaser.py", *flow, "--num_steps", "1", "--nsampling", "6", "--columns", "3", "--dest", grid)
    run("teaser.py", *ode, "--num_steps", "4", "--trajectory", "--nsampling", "2", "--dest", paths)
    cell = 8 * 8 + 8  # 8 pixels enlarged to 64, and a border
    assert Image.open(grid).size == (3 * cell + 8, 2 * cell + 8)
    assert Image.open(paths).size == (5 * cell + 8, 2 * cell + 8)


def test_compare_draws_both_models_and_their_curves(trained, tmp_path):
    reference = tmp_path / "digits.npz"
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference)
    shared = ["--num_steps", "1", "2", "--ref_path", reference]
    both = ["--denoiser", trained["denoiser"], "--characteristic", trained["characteristic"]]
    run("compare.py", *both, *shared, "--dest", tmp_path / "a.png", "--nsampling", "3", "--end_seed", "19")
    for mode in ("denoiser", "characteristic"):
        for n in (1, 2):
            folder = tmp_path / "images" / f"{mode}-{n}"
            run("eval.py", "--checkpoint", trained[mode], "--workdir", folder, "--end_seed", "19", "--num_steps", n)
    run("compare.py", *both, *shared, "--dest", tmp_path / "b.png", "--images", tmp_path / "images")
    tables = [list(csv.DictReader((tmp_path / f"{name}-fid.csv").read_text().splitlines())) for name in "ab"]
    assert [(r["mode"], r["nfe"], r["n"]) for r in tables[0]] == [
        (mode, n, "20") for mode in ("denoiser", "characteristic") for n in ("1", "2")
    ]
    for a, b in zip(*tables):
        assert float(a["fid"]) == pytest.approx(float(b["fid"]), abs=2e-3)
    for name in ("a.png", "a-fid.png", "b.png", "b-fid.png"):
        Image.open(tmp_path / name).verify()
    done = run(
        "compare.py", *both, *shared, "--images", tmp_path / "images", "--rho", "3", "--dest", tmp_path / "c.png", expect=2
    )
    assert "with other rho" in done.stderr
