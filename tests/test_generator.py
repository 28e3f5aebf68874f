"""A model and seeds, to images: generator.py, and the scripts that draw them, eval.py, teaser.py and compare.py."""

from dist_util import UserError

import csv
import dataclasses
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import dataset
import defaults
import eval as eval_script
import fid
import generator
import misc
import sde
from conftest import TINY_NETWORK, Gaussian, run, tiny_checkpoint, tiny_teacher, write_folder
from processes import Job


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
        assert float(a["FID"]) == pytest.approx(float(b["FID"]), abs=2e-3)
    for name in ("a.png", "a-fid.png", "b.png", "b-fid.png"):
        Image.open(tmp_path / name).verify()
    done = run(
        "compare.py", *both, *shared, "--images", tmp_path / "images", "--rho", "3", "--dest", tmp_path / "c.png", expect=2
    )
    assert "with other rho" in done.stderr
    run("compare.py", *both, *shared, "--end_seed", "9", "--time_grid", "cosine", "--rho", "2", "--dest", tmp_path / "d.png")
    rows = csv.DictReader((tmp_path / "d-fid.csv").read_text().splitlines())
    grids = {(row["mode"], row["time_grid"], row["rho"]) for row in rows}
    assert grids == {("denoiser", "cosine", "2.0"), ("characteristic", "t", "1.0")}  # a flow map has no solver's grid


# --------------------------------------------------------------------------------------------------------- seeds, steps


def test_seeds_that_would_repeat_the_images_of_others_are_refused():
    """torch's generator keeps 32 bits of a seed: 2^32 would be 0 again."""
    generator.check_seeds(2**32 - 2, 2**32 - 1)
    shape, device = (1, 2, 2), torch.device("cpu")
    assert not torch.equal(*(generator.SeedNoise([seed], shape, device)() for seed in (2**32 - 1, 2**31 - 1)))
    for start, end in ((2**32, 2**32), (2**32 - 1, 2**32), (0, 2**40), (-1, 3), (3, 2)):
        with pytest.raises(UserError, match=f"--start_seed {start} --end_seed {end}"):
            generator.check_seeds(start, end)
    with pytest.raises(UserError, match="below 2\\^32"):
        generator.SeedNoise([0, 2**32], shape, device)


CHURNED = {"churn": True, "gamma": 3.0, "s_min": 0.0, "s_max": 1.0}


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@pytest.mark.parametrize(
    "flags",
    [{"ode_solver": name} for name in sde.SOLVERS]
    + [{"ode_solver": "heun", "rho": 3.0}, {"ode_solver": "heun", **CHURNED}, {"ode_solver": "deis", **CHURNED}, {"sde": True}],
    ids=str,
)
def test_evaluations_are_those_that_are_made(flags, num_steps):
    """Churn moves the times, and with them where heun takes its second evaluation."""
    teacher = tiny_teacher(**{**flags, "num_steps": num_steps})
    calls = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    states = teacher.states(range(2))
    assert len(states) == num_steps + 1 and len(calls) == generator.nfe(teacher.config)


def test_a_flow_map_is_drawn_in_one_step_unless_told_otherwise(tmp_path):
    path = tiny_checkpoint(tmp_path, mode="characteristic", num_steps=1)
    model = generator.load_model(path)
    record = model.record(range(3))
    assert record["nfe"] == model.config.sampling.num_steps == 1 and len(model.states(range(2))) == 2
    assert not {"ode_solver", "sde", "churn", "s_min", "s_max", "gamma"} & record["config"]["sampling"].keys()
    assert generator.load_model(path, {"num_steps": 5}).record([0])["nfe"] == 5
    with pytest.raises(UserError, match="--churn is True: .* the flow map has no SDE and no churn"):
        generator.load_model(path, {"churn": True})


def test_a_solver_for_a_flow_map_is_named_as_unused(models, tmp_path):
    """It is no error, since the same flags are given to both models."""
    common = ["--nsampling", "2", "--ode_solver", "heun", "--dest"]
    done = run("teaser.py", "--checkpoint", models / "flow" / "latest.pth", *common, tmp_path / "x.png")
    assert "is a flow map, which has no ode_solver: the image does not change" in done.stderr
    done = run("teaser.py", "--checkpoint", models / "ode" / "latest.pth", *common, tmp_path / "y.png")
    both = ["--denoiser", models / "ode" / "latest.pth", "--characteristic", models / "flow" / "latest.pth"]
    assert "is a flow map" not in done.stderr + run("compare.py", *both, "--num_steps", "1", *common, tmp_path / "z.png").stderr


def test_a_model_is_of_the_file_that_was_read_though_its_link_moves_on(models, tmp_path):
    """As latest.pth does while a run goes on."""
    link = tmp_path / "latest.pth"
    link.symlink_to(models / "ode" / "DDPMpp-000002.pth")
    model = generator.load_model(link)
    link.unlink()
    link.symlink_to(models / "ode" / "DDPMpp-000004.pth")
    record = model.record(range(2))
    assert (record["step"], record["sha256"]) == (2, misc.file_hash(models / "ode" / "DDPMpp-000002.pth"))
    generator.check_same_on_all_ranks(link, model.sha256)


def test_ranks_that_read_different_files_are_refused(monkeypatch):
    monkeypatch.setattr(generator.dist_util, "gather", lambda value: [value, "another"])
    with pytest.raises(UserError, match="latest.pth changed while it was read"):
        generator.check_same_on_all_ranks("latest.pth", "one")


def test_every_script_draws_a_flow_map_in_one_step(models, tmp_path):
    """Though it has learned on a grid of two."""
    flow = ["--checkpoint", models / "flow" / "latest.pth"]
    run("eval.py", *flow, "--workdir", tmp_path / "images", "--end_seed", "3")
    assert json.loads((tmp_path / "images" / "eval.json").read_text())["nfe"] == 1
    done = run("teaser.py", *flow, "--trajectory", "--nsampling", "1", "--dest", tmp_path / "paths")
    assert done.stdout == f"{tmp_path}/paths.png\n"
    assert Image.open(tmp_path / "paths.png").size == (2 * 72 + 8, 72 + 8)  # two states: noise and data
    run("fid.py", "--mode", "gen", *flow, "--end_seed", "3", "--dest", tmp_path / "x")
    assert fid.read_statistics(tmp_path / "x.npz").metadata["made_by"]["nfe"] == 1


def test_a_setting_that_does_not_exist_is_an_error_with_the_name_meant(tmp_path):
    path = tiny_checkpoint(tmp_path)
    for name, meant in (("num_step", "num_steps"), ("solver", "ode_solver"), ("eval_eps", "eval_eps")):
        with pytest.raises(UserError, match=f"there is no setting {name}.*{meant}"):
            generator.load_model(path, {name: 3})


def test_a_setting_of_training_or_of_another_type_is_an_error(tmp_path):
    path = tiny_checkpoint(tmp_path)
    for flags, what in (
        ({"lr": 3.0}, "lr is a setting of training"),
        ({"grid_steps": 4}, "grid_steps is a setting of training"),
        ({"num_steps": "20"}, "setting num_steps is '20': it must be of the kind of 20"),
        ({"num_steps": 2.5}, "setting num_steps is 2.5"),
        ({"churn": "x"}, "setting churn is 'x': it must be of the kind of False"),
    ):
        with pytest.raises(UserError, match=re.escape(what)):
            generator.load_model(path, flags)
    assert generator.load_model(path, {"rho": 2}).config.sampling.rho == 2


# -------------------------------------------------------------------------------------------- sets of images that go on


def prepare(folder, model, start_seed=0, end_seed=9):
    eval_script.prepare(folder, model, "png", range(start_seed, end_seed + 1))


def test_images_may_be_made_in_other_batches_and_more_of_them(tmp_path):
    """What changes no image but for rounding may differ when eval.py goes on; all else is refused."""
    path, folder = tiny_checkpoint(tmp_path), tmp_path / "images"
    model = generator.load_model(path)
    prepare(folder, model)
    prepare(folder, generator.load_model(path, {"num_steps": 3}))  # no image yet: the record alone is none
    assert json.loads((folder / "eval.json").read_text())["config"]["sampling"]["num_steps"] == 3
    prepare(folder, model)
    misc.write_png(folder / "000000.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    prepare(folder, generator.load_model(path, {"eval_bsz": 2}))
    prepare(folder, model, end_seed=12)
    assert json.loads((folder / "eval.json").read_text())["end_seed"] == 12
    refused = [("seeds up to end_seed 12", model, {}), ("start_seed", model, {"start_seed": 1, "end_seed": 12})]
    refused += [("num_steps", generator.load_model(path, {"num_steps": 3}), {"end_seed": 12})]
    for what, other, seeds in refused:
        with pytest.raises(UserError, match=f"holds images made with other ({what})"):
            prepare(folder, other, **seeds)
    assert json.loads((folder / "eval.json").read_text())["end_seed"] == 12


def test_more_images_are_added_to_those_that_are_there(models, tmp_path):
    command = ["eval.py", "--checkpoint", models / "ode" / "latest.pth", "--num_steps", "2", "--workdir", tmp_path / "out"]
    run(*command, "--end_seed", "2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    run(*command, "--end_seed", "5", "--eval_bsz", "1")
    assert len(before) == 3 and len(list((tmp_path / "out").glob("*.png"))) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert dataset.open_images(tmp_path / "out")[1]["made_by"]["end_seed"] == 5


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_npz_holds_what_the_pngs_hold_and_is_made_once(models, tmp_path, ranks):
    command = ["eval.py", "--checkpoint", models / "ode" / "latest.pth", "--num_steps", "2", "--eval_bsz", "2"]
    run(*command, "--end_seed", "4", "--workdir", tmp_path / "png")
    one_file = [*command, "--format", "npz", "--workdir", tmp_path / "npz"]
    done = run(*one_file, "--end_seed", "4", ranks=ranks)
    path = tmp_path / "npz" / "images.npz"
    assert done.stdout == f"{path}\n" and {p.name for p in path.parent.iterdir()} == {"images.npz", "eval.json"}
    (path.parent / "._1.png").touch()  # what macOS puts beside is no picture
    images, metadata = dataset.open_images(path.parent)
    expected = dataset.open_images(tmp_path / "png")[0]
    assert torch.equal(images.batch(range(5))[0], expected.batch(range(5))[0]) and metadata["made_by"]["end_seed"] == 4
    assert np.load(path)["arr_0"].shape == (5, 8, 8, 1)
    before = path.stat().st_mtime_ns
    run(*one_file, "--end_seed", "4", ranks=ranks)
    assert path.stat().st_mtime_ns == before
    run(*one_file, "--end_seed", "5", ranks=ranks)
    assert len(dataset.open_images(path)[0]) == 6
    other = run(*one_file, "--end_seed", "5", "--format", "png", expect=2).stderr
    assert "holds images in the other --format" in other


def test_compare_refuses_images_of_another_precision(models, tmp_path):
    path, folder = models / "ode" / "latest.pth", tmp_path / "denoiser-2"
    run("eval.py", "--checkpoint", path, "--num_steps", "2", "--end_seed", "2", "--workdir", folder, "--precision", "bf16")
    flags = {"num_steps": 2, "precision": "bf16"}
    assert len(compare.find_images(folder, generator.load_model(path, flags).record(range(3)))[0]) == 3
    with pytest.raises(UserError, match="with other precision: make it again"):
        compare.find_images(folder, generator.load_model(path, {"num_steps": 2}).record(range(3)))


def test_compare_refuses_images_of_other_seeds(models, tmp_path):
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "ref.npz")
    shared = ["--ref_path", tmp_path / "ref.npz", "--images", tmp_path, "--num_steps", "1", "--dest", tmp_path / "c.png"]
    for mode, name, start in (("denoiser", "ode", 0), ("characteristic", "flow", 3)):
        shared += [f"--{mode}", models / name / "latest.pth"]
        seeds = ["--start_seed", start, "--end_seed", start + 5, "--workdir", tmp_path / f"{mode}-1"]
        run("eval.py", "--checkpoint", models / name / "latest.pth", "--num_steps", "1", *seeds)
    assert "hold images of different seeds" in run("compare.py", *shared, expect=2).stderr


def exhaust_memory():
    """There is room for two images, and no more."""
    real = generator.SeedNoise.__call__

    def draw(noise):
        if len(noise.generators) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(noise)

    generator.SeedNoise.__call__ = draw


def test_images_that_did_not_fit_are_made_with_the_flag_that_the_error_names(models, tmp_path):
    command = ["eval.py", "--checkpoint", models / "flow" / "latest.pth", "--end_seed", "4", "--workdir", tmp_path / "out"]
    job = Job(tmp_path / "first", *command, prepare=exhaust_memory)
    assert job.wait() == [2] and "error: out of memory on rank 0" in job.err() and "--eval_bsz" in job.err(), job.err()
    job = Job(tmp_path / "second", *command, "--eval_bsz", "2", prepare=exhaust_memory)
    assert job.wait() == [0] and len(list((tmp_path / "out").glob("*.png"))) == 5, job.err()


def test_a_folder_whose_name_is_not_text_is_printed_as_it_is(models, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    command = ["eval.py", "--checkpoint", models / "flow" / "latest.pth", "--end_seed", "2", "--workdir", folder]
    job = Job(tmp_path / "log", *command)
    assert job.wait() == [0], job.err()
    assert (tmp_path / "log.0.out").read_bytes() == os.fsencode(folder) + b"\n" and len(os.listdir(folder)) == 4


# ------------------------------------------------------------------------------ from images to noise, and from there back


class ClosedForm:
    """The denoiser of a Gaussian whose mean is an image, as a model that calls it with labels."""

    def __init__(self, **flags):
        self.target = Gaussian(torch.full((64,), 0.1), 0.2)
        self.trained = dataclasses.replace(tiny_teacher(eval_eps0=1e-4, num_steps=100, rho=2.0, **flags), model=self)

    def __call__(self, x, t, label=None):
        return self.target.denoise(x.flatten(1), t).reshape(x.shape).float()

    def images(self, n):
        z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return dataset.to_uint8(0.1 + 0.2 * z, centered=True)


@pytest.mark.parametrize("solver", ["heun", "deis", "dpm", "edm"])
def test_latents_are_where_the_exact_flow_has_them_and_decode_to_the_images(solver):
    """At t = 1 - eval_eps1 they have the law of noise."""
    model = ClosedForm(ode_solver=solver)
    images = model.images(40)
    latents, t = model.trained.encode(images), torch.full((40,), 1 - 1e-3, dtype=torch.float64)
    exact = model.target.flow_map(dataset.to_model(images, True).flatten(1), 0 * t, t).reshape(latents.shape)
    assert latents.dtype == torch.float32 and (latents - exact).abs().max() < 0.15 and abs(latents.std() - 1) < 0.05
    assert eval_script.psnr(model.trained.decode(latents), images).min() > 40


def test_psnr_is_that_of_the_mean_squared_difference():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    others = images.clone()
    others[1, 0, 0, 0], others[2] = 255, 255
    assert eval_script.psnr(images, others).tolist() == pytest.approx([math.inf, 10 * math.log10(4), 0])


def test_decoding_begins_where_the_images_of_seeds_begin(models):
    for name in ("ode", "flow"):
        model = generator.load_model(models / name / "latest.pth", {"num_steps": 3})
        assert torch.equal(model.decode(model.latents([7, 3])), model.images([7, 3]))


def write_digits(folder, n=5):
    return write_folder(folder, dataset.load(defaults.resolve({}).data).batch(range(n))[0])


def printed(done):
    """The first line of stdout, and the numbers of the others."""
    first, *others = done.stdout.splitlines()
    assert [line.split()[:2] for line in others] == [["PSNR", f"{i:06d}"] for i in range(len(others) - 1)] + [["PSNR", "mean"]]
    return first, [float(line.split()[2]) for line in others]


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_are_encoded_and_decoded_by_both_models_on_any_number_of_ranks(models, tmp_path, ranks):
    folder, out = write_digits(tmp_path / "digits"), tmp_path / "out"
    ode, flow = (["eval.py", "--checkpoint", models / name / "latest.pth"] for name in ("ode", "flow"))
    model = generator.load_model(models / "ode" / "latest.pth", {"num_steps": 4})
    encode = [*ode, "--num_steps", "4", "--encode", folder, "--workdir", out, "--eval_bsz", "2"]
    assert run(*encode, ranks=ranks).stdout == f"{out}/latents.npz\n" and os.listdir(out) == ["latents.npz"]
    originals = dataset.open_images(folder)[0].batch(range(5))[0]
    with np.load(out / "latents.npz") as file:
        assert file["latents"].dtype == np.float32 and "labels" not in file
        np.testing.assert_allclose(file["latents"], model.encode(originals), atol=1e-4)
        assert np.array_equal(file["images"], originals)
        latents, made = torch.from_numpy(file["latents"]), json.loads(str(file["metadata"]))
    assert made["sha256"] == misc.file_hash(models / "ode" / "latest.pth") and made["source"] == str(folder)
    sampling = made["config"]["sampling"]
    assert [sampling[k] for k in ("ode_solver", "num_steps", "time_grid", "eval_eps0")] == ["dpm", 4, "cosine", 0.01]

    for name, command, there in (("ode", [*ode, "--num_steps", "4"], "png"), ("flow", flow, "png"), ("flow", flow, "npz")):
        again = tmp_path / f"{name}-{there}"
        command = [*command, "--latents", out / "latents", "--workdir", again, "--format", there]
        first, values = printed(run(*command, ranks=ranks))
        assert first == str(again if there == "png" else again / "images.npz") and len(values) == 6
        decoder = generator.load_model(models / name / "latest.pth", {"num_steps": 4 if name == "ode" else 1})
        expected, found = decoder.decode(latents), dataset.open_images(again)[0].batch(range(5))[0]
        assert (expected.int() - found.int()).abs().max() <= 1
        assert values[:5] == pytest.approx(eval_script.psnr(found, originals).tolist(), abs=0.01)
        assert values[5] == pytest.approx(sum(values[:5]) / 5, abs=0.01)
        assert printed(run(*command, ranks=ranks)) == (first, values)  # which makes nothing again
    assert json.loads((again / "eval.json").read_text())["begin"] == {"latents": misc.file_hash(out / "latents.npz")}

    before = (out / "latents.npz").stat().st_mtime_ns
    run(*encode, ranks=ranks)
    assert (out / "latents.npz").stat().st_mtime_ns == before
    assert "made with other num_steps: choose another --workdir" in run(*encode, "--num_steps", "5", expect=2).stderr


def test_images_of_seeds_latents_and_images_do_not_mix(models, tmp_path):
    folder, out = write_digits(tmp_path / "digits"), tmp_path / "out"
    command = ["eval.py", "--checkpoint", models / "flow" / "latest.pth", "--workdir", out]
    run(*command, "--from", folder, "--t", "0.5")
    for other in (
        ["--end_seed", "4"],
        ["--from", folder, "--t", "0.6"],
        ["--from", write_digits(tmp_path / "six", 6), "--t", "0.5"],
    ):
        assert "made with other latents or images to begin from" in run(*command, *other, expect=2).stderr
    assert "made with other start_seed" in run(*command, "--from", folder, "--t", "0.5", "--start_seed", "1", expect=2).stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_are_drawn_from_others_with_the_noise_of_their_seeds(models, tmp_path, ranks):
    folder, path = write_digits(tmp_path / "digits"), models / "flow" / "latest.pth"
    shared = ["eval.py", "--checkpoint", path, "--from", folder, "--t", "0.5", "--workdir", tmp_path / "out"]
    done = run(*shared, "--start_seed", "7", "--eval_bsz", "2", ranks=ranks)
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert done.stdout == f"{tmp_path}/out\n" and record["nfe"] == 1 and record["begin"]["t"] == 0.5
    found = pixels(tmp_path / "out")
    assert list(found) == [f"{seed:06d}.png" for seed in range(7, 12)]
    model, originals = generator.load_model(path), dataset.open_images(folder)[0].batch(range(5))[0]
    z = generator.SeedNoise(range(7, 12), (1, 8, 8), torch.device("cpu"))()
    x, t = sde.interpolate(dataset.to_model(originals, True), z, torch.tensor(0.5)), torch.full((5,), 0.5)
    expected = dataset.to_uint8(model.model(x, t, 0 * t), True)[:, 0].numpy().astype(int)
    assert_same_images(dict(zip(found, expected)), found)


def test_the_noise_of_a_small_time_keeps_an_image_and_that_of_a_large_one_does_not():
    model = ClosedForm(ode_solver="dpm")
    images = model.images(40)
    near, far = (eval_script.psnr(model.trained.from_images(images, t, start_seed=5), images).mean() for t in (1e-3, 0.9))
    assert near > 25 and far < 20


def test_heuns_evaluations_are_counted_from_the_time_that_images_get():
    teacher, calls = tiny_teacher(ode_solver="heun", num_steps=6, rho=3.0), []
    images = dataset.load(defaults.resolve({}).data).batch([0, 1])[0]
    given = generator.from_images(teacher, generator.labelled(teacher, images), 0.05)
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    teacher.images(range(2), given)
    assert len(calls) == generator.nfe(teacher.config, 0.05) != generator.nfe(teacher.config)


def test_interpolation_joins_the_images_of_two_seeds_and_of_two_latents(models, tmp_path):
    teaser_command = ["teaser.py", "--checkpoint", models / "flow" / "latest.pth", "--dest", tmp_path / "row"]
    model = generator.load_model(models / "flow" / "latest.pth")
    ode = ["eval.py", "--checkpoint", models / "ode" / "latest.pth", "--encode", write_digits(tmp_path / "digits")]
    run(*ode, "--num_steps", "4", "--workdir", tmp_path / "out")
    latents = torch.from_numpy(np.load(tmp_path / "out" / "latents.npz")["latents"])
    ends = {(): model.images([3, 8]), ("--latents", tmp_path / "out" / "latents"): model.decode(latents[[3, 0]])}
    for numbers in (["0", "5"], ["-1", "0"]):
        done = run(*teaser_command, "--interpolate", *numbers, "--latents", tmp_path / "out" / "latents", expect=2)
        assert f"error: --interpolate {' '.join(numbers)}: the latents in" in done.stderr
        assert "are numbered from 0 to 4" in done.stderr and not done.stdout
    for numbers, (flags, expected) in zip((["3", "8"], ["3", "0"]), ends.items()):
        done = run(*teaser_command, "--interpolate", *numbers, *flags, "--columns", "5")
        assert done.stdout == f"{tmp_path}/row.png\n"
        row = np.array(Image.open(tmp_path / "row.png"))[..., 0].astype(int)
        assert row.shape == (64 + 16, 5 * 72 + 8)
        assert np.abs(row[8:72:8, 8:72:8] - expected[0, 0].numpy()).max() <= 1
        assert np.abs(row[8:72:8, 4 * 72 + 8 : 5 * 72 : 8] - expected[1, 0].numpy()).max() <= 1


CLASSES = {"label_dim": 3, "mode": "denoiser", "class_names": ("eight", "nine", "zero")}


def test_classes_are_those_of_the_class_folders_by_name(tmp_path):
    """Of which there may be some alone; --class_idx wins."""
    path = tiny_checkpoint(tmp_path, **CLASSES, num_steps=3)
    batch = dataset.load(defaults.resolve({}).data).batch(range(4))[0]
    for i, name in enumerate(["zero", "eight", "zero", "eight"]):
        (tmp_path / "some" / name).mkdir(parents=True, exist_ok=True)
        misc.write_png(tmp_path / "some" / name / f"{i}.png", batch[i])
    shared = ["eval.py", "--checkpoint", path]
    run(*shared, "--encode", tmp_path / "some", "--workdir", tmp_path / "out")
    with np.load(tmp_path / "out" / "latents.npz") as file:
        assert file["labels"].tolist() == [0, 0, 2, 2]
        found, images = file["latents"], torch.from_numpy(file["images"])
    model = generator.load_model(path)
    expected = model.encode(images, torch.tensor([0, 0, 2, 2]))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - model.encode(images, torch.tensor([1, 1, 1, 1])).numpy()).max() > 1e-2
    run(*shared, "--latents", tmp_path / "out" / "latents", "--workdir", tmp_path / "again")
    assert torch.equal(
        dataset.open_images(tmp_path / "again")[0].batch(range(4))[0], model.decode(expected, torch.tensor([0, 0, 2, 2]))
    )
    run(*shared, "--encode", tmp_path / "some", "--workdir", tmp_path / "one", "--class_idx", "1")
    assert np.load(tmp_path / "one" / "latents.npz")["labels"].tolist() == [1, 1, 1, 1]
    teaser_command = ["teaser.py", "--checkpoint", path, "--dest", tmp_path / "row", "--interpolate"]
    assert "needs one class for all: add --class_idx" in run(*teaser_command, "0", "1", expect=2).stderr
    latents = ["--latents", tmp_path / "out" / "latents"]
    assert "the two images have classes 0 and 2" in run(*teaser_command, "0", "2", *latents, expect=2).stderr
    run(*teaser_command, "0", "1", *latents)
    run(*teaser_command, "0", "2", *latents, "--class_idx", "1")
    (tmp_path / "some" / "eight").rename(tmp_path / "some" / "seven")
    assert (
        "have other classes than the 3"
        in run(*shared, "--from", tmp_path / "some", "--t", "0.5", "--workdir", tmp_path / "x", expect=2).stderr
    )
    write_folder(tmp_path / "flat", batch)
    assert (
        "come without classes"
        in run(*shared, "--from", tmp_path / "flat", "--t", "0.5", "--workdir", tmp_path / "x", expect=2).stderr
    )
    with pytest.raises(UserError, match="come without classes, and the model has 3: add --class_idx"):
        model.decode(expected)


def test_a_kill_while_latents_are_written_leaves_nothing_half_written(models, tmp_path):
    command = ["eval.py", "--checkpoint", models / "ode" / "latest.pth", "--encode", write_digits(tmp_path / "digits")]
    command += ["--num_steps", "3", "--workdir", tmp_path / "out"]
    assert Job(tmp_path / "log", *command, fault=("before rename", 1)).wait() == [-9]
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".tmp"]
    run(*command)
    assert os.listdir(tmp_path / "out") == ["latents.npz"]


def test_from_python_too_what_does_not_fit_is_refused():
    denoiser, flow = tiny_teacher(), tiny_teacher(mode="characteristic")
    images, latents = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8)
    for call, message in (
        (lambda: flow.encode(images), "the model is a flow map, which runs to data alone"),
        (lambda: denoiser.sampled(num_steps=1).encode(images), "--num_steps is 1: encoding takes 2 or more"),
        (lambda: denoiser.encode(latents), r"the images are 2 of float32 \(1, 8, 8\): the model takes uint8 \(1, 8, 8\)"),
        (lambda: denoiser.encode(images[:, :, :7]), r"the images are 2 of uint8 \(1, 7, 8\)"),
        (lambda: denoiser.encode(images[:0]), "the images are 0 of"),
        (lambda: flow.decode(latents.double()), "the latents are 2 of float64"),
        (lambda: flow.decode(latents / 0), "the latents are not finite"),
        (lambda: tiny_teacher(churn=True).decode(latents), "--sde and --churn add noise"),
        (lambda: tiny_teacher(sde=True).encode(images), "--sde and --churn add noise"),
        (lambda: flow.from_images(images, 1.0), "--t is 1.0: it must be above eval_eps0"),
        (lambda: flow.from_images(images, 0.5, start_seed=2**32 - 1), "each below 2\\^32"),
    ):
        with pytest.raises(UserError, match=message):
            call()


# --------------------------------------------------------------------------------------------------------- as a library


def test_five_lines_load_a_model_and_give_images_states_and_their_score(models, tmp_path):
    digits = dataset.load(defaults.resolve({}).data)
    fid.write_statistics(tmp_path / "digits.npz", fid.measure(digits, fid.load_features("pixels")))

    model = generator.load_model(models / "ode" / "latest.pth", {"num_steps": 3})
    images = model.images(range(4))
    states = model.states(range(4))
    found = fid.measure(images, fid.load_features("pixels"))
    score = fid.frechet_distance(fid.read_statistics(tmp_path / "digits.npz"), found)

    assert images.shape == (4, 1, 8, 8) and images.dtype == torch.uint8 and 0 < score < 100
    assert len(states) == 4 and all(x.shape == (4, 1, 8, 8) and x.dtype == torch.float32 for x in states)
    assert torch.equal(dataset.to_uint8(states[-1], model.config.data.centered), images)
    assert torch.equal(model.images([3]), images[3:]) and not model.model.training
    assert found.metadata["n"] == 4 and found.metadata["image"] == [1, 8, 8]


def add_solver():
    """Order 2, exponential: the denoiser of the middle."""

    def midpoint(denoise, x, t, s):
        middle = (t + s) / 2
        return sde.transport(x, denoise(sde.transport(x, denoise(x, t), t, middle), middle), t, s)

    sde.SOLVERS["midpoint"] = midpoint


def test_a_solver_is_added_from_outside(models, tmp_path):
    """By a function and one line: it draws images, and its evaluations are counted."""
    command = ["eval.py", "--checkpoint", models / "ode" / "latest.pth", "--end_seed", "2", "--num_steps", "3"]
    job = Job(tmp_path / "log", *command, "--ode_solver", "midpoint", "--workdir", tmp_path / "out", prepare=add_solver)
    assert job.wait() == [0], job.err()
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["nfe"] == 6 and record["config"]["sampling"]["ode_solver"] == "midpoint"
    job = Job(tmp_path / "unknown", *command, "--ode_solver", "midpoint", "--workdir", tmp_path / "new")
    assert job.wait() == [2] and "--ode_solver is midpoint: it must be one of euler, heun, deis, dpm" in job.err(), job.err()


def test_images_that_are_not_finite_are_an_error_and_not_black(models, tmp_path):
    content = torch.load(models / "ode" / "latest.pth", weights_only=True)
    content["ema"] = {name: 1e30 * value for name, value in content["ema"].items()}
    torch.save(content, tmp_path / "huge.pth")
    with pytest.raises(UserError, match="huge.pth makes images that are not finite"):
        generator.load_model(str(tmp_path / "huge.pth"), {"num_steps": 2}).images(range(2))


def test_measure_takes_bytes_alone():
    import fid

    with pytest.raises(UserError, match="must be uint8"):
        fid.measure(torch.rand(4, 1, 8, 8), fid.load_features("pixels"))


# ----------------------------------------------------------------------------------------------------------- guidance


def conditional(**flags):
    return tiny_teacher(label_dim=3, label_dropout=0.1, num_steps=3, **flags)


def with_guidance(trained, w, **others):
    return dataclasses.replace(trained, config=trained.config.replace("sampling", guidance=w, **others))


def test_guided_score_is_the_extrapolated_score():
    x, strong, weak = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    found = sde.score(x, sde.guided(strong, weak, 2.5), t)
    torch.testing.assert_close(found, sde.score(x, weak, t) + 2.5 * (sde.score(x, strong, t) - sde.score(x, weak, t)))


def test_guidance_pushes_away_from_the_denoiser_without_a_class():
    trained = conditional()
    for p in trained.model.net.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x, t, label = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.eye(3)[[0, 1, 2, 0]]
    strong, weak = (trained.model(x, t, label=one) for one in (label, torch.zeros(4, 3)))
    assert (strong - weak).abs().max() > 1e-3
    torch.testing.assert_close(generator.guided(trained, 3.0)(x, t, label=label), weak + 3 * (strong - weak))
    assert torch.equal(generator.guided(trained, 0.0)(x, t, label=label), weak)
    assert torch.equal(generator.guided(trained, 1.0)(x, t, label=label), strong)
    assert generator.nfe(with_guidance(trained, 3.0).config) == 2 * generator.nfe(trained.config)


@pytest.mark.parametrize("label_dim", [0, 3])
def test_autoguidance_pushes_away_from_a_weaker_network(tmp_path, label_dim):
    paths = [tiny_checkpoint(tmp_path / name, label_dim=n, seed=i) for i, (name, n) in enumerate((("a", 3), ("b", label_dim)))]
    trained = generator.load_model(paths[0], {"guidance": 2.0, "num_steps": 2}, guide=paths[1])
    x, t, label = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.eye(3)[[0, 1, 2, 0]]
    strong, weak = trained.model(x, t, label=label), trained.guide.model(x, t, label=label if label_dim else None)
    torch.testing.assert_close(generator.guided(trained, 2.0)(x, t, label=label), weak + 2 * (strong - weak))
    record = trained.record(range(2))
    assert record["guide"] == misc.file_hash(paths[1])
    assert generator.differences(record, {**record, "guide": "another"}) == ["guide"]


def test_a_class_is_chosen_by_its_name(tmp_path):
    path = tiny_checkpoint(tmp_path, label_dim=3)
    content = torch.load(path, weights_only=True)
    content["config"]["data"]["class_names"] = ["cat", "dog", "wild"]
    torch.save(content, path)
    named, numbered = (generator.load_model(path, {"class_idx": which}) for which in ("dog", 1))
    assert named.config == numbered.config and torch.equal(named.images(range(3)), numbered.images(range(3)))
    with pytest.raises(UserError, match="no such class: it knows cat, dog, wild"):
        generator.load_model(path, {"class_idx": "bird"})


def test_a_name_that_is_a_number_wins_over_the_number(tmp_path):
    path = tiny_checkpoint(tmp_path, label_dim=3)
    content = torch.load(path, weights_only=True)
    content["config"]["data"]["class_names"] = ["1", "10", "2"]
    torch.save(content, path)
    found = {which: generator.load_model(path, {"class_idx": which}).config.sampling.class_idx for which in (1, 2, "10", 0)}
    assert found == {1: 0, 2: 2, "10": 1, 0: 0}


def test_the_other_grid_has_its_own_rho_and_the_same_grid_keeps_it():
    karras = defaults.resolve({"time_grid": "karras", "rho": 5.0})
    assert defaults.resolve({"time_grid": "karras"}, karras).sampling.rho == 5
    assert defaults.resolve({"time_grid": "t"}, karras).sampling.rho == 1
    assert defaults.resolve({"time_grid": "t", "rho": 2.0}, karras).sampling.rho == 2
    assert defaults.resolve({"time_grid": "karras"}).sampling.rho == 7
    assert defaults.resolve({"time_grid": "cosine"}, karras).sampling.rho == 1
    assert defaults.resolve({"time_grid": "cosine", "rho": 2.0}).sampling.rho == 2
