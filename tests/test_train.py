"""The objectives, their gradients, and both stages by the script."""

import dist_util

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import dataset
import defaults
import generator
import misc
import network
import sde
import train
import workdir
from conftest import ROOT, TINY_NETWORK, TINY_RUN, images, launch, run, tiny_config, tiny_teacher, write_folder
from processes import Job


def student_of(teacher, **flags):
    config = tiny_config(mode="characteristic", **flags)
    student = checkpoint.build_model(config)
    network.start_from_teacher(student.net, teacher.model.net)
    return student.train(), config


def objective_of(teacher, student, config, start=0, folder=None):
    """The objective of a configuration, ready for the steps from `start` on."""
    ema = checkpoint.EMA(student, 0.9).module
    objective = train.OBJECTIVES[config.distil.objective](student, config, teacher, sde.huber, ema)
    objective.begin(start, folder)
    return objective


# ------------------------------------------------------------------------------------------------------------ gradients


GRADIENTS = """
import sys, torch, dist_util, train
sys.path.insert(0, "tests")
from test_train import gradient_model, gradient_objective, gradient_batch

def main():
    rounds = int(sys.argv[1])
    with dist_util.session():
        world = dist_util.world_size()
        model = gradient_model()
        pieces = list(zip(*(x.chunk(world * rounds) for x in gradient_batch())))
        mine = pieces[dist_util.rank() :: world]
        parallel = dist_util.parallel(model)
        train.accumulate(parallel, gradient_objective(parallel), lambda r: mine[r], rounds)
        if dist_util.rank() == 0:
            torch.save([p.grad for p in model.parameters()], sys.argv[2])

dist_util.launch(main)
"""


def gradient_model():
    torch.manual_seed(0)
    return checkpoint.build_model(tiny_config())


def gradient_batch():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(8, 1, 8, 8, generator=generator),
        torch.randn(8, 1, 8, 8, generator=generator),
        torch.linspace(0.1, 1, 8),
    ]


def gradient_objective(model):
    def objective(x0, z, t):
        loss = sde.denoising_loss(model(sde.interpolate(x0, z, t), t), x0, t, 1.0).mean()
        return loss, {"loss": loss}

    return objective


def test_two_ranks_of_two_rounds_give_the_gradients_of_one(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + GRADIENTS)
    launch(script, 2, tmp_path / "split.pt", ranks=2)
    model = gradient_model()
    train.accumulate(model, gradient_objective(model), lambda r: gradient_batch(), 1)
    for p, split in zip(model.parameters(), torch.load(tmp_path / "split.pt")):
        torch.testing.assert_close(split, p.grad, rtol=1e-4, atol=1e-6)
    assert sum(p.grad.abs().sum() for p in model.parameters()) > 0


@pytest.mark.parametrize("mode", ["denoiser", "characteristic"])
def test_operations_are_counted_as_torch_counts_a_real_pass(mode):
    config = tiny_config(mode=mode)
    net, x, t = checkpoint.build_model(config).net, torch.zeros(1, 1, 8, 8), torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        net(x, t, *([t] if mode == "characteristic" else [])).sum().backward()
    assert checkpoint.flops(config) == counter.get_total_flops() > 0


@pytest.mark.parametrize("stage_2", [(), ("--objective", "trajectory"), ("--objective", "semigroup")])
def test_a_dry_run_says_how_large_a_run_would_be_and_leaves_no_trace(models, tmp_path, stage_2):
    teacher = ("--mode", "characteristic", "--teacher", models / "ode" / "latest.pth", "--num_steps", "4")
    flags = (*teacher, *stage_2) if stage_2 else ()
    out = run("train.py", *TINY_RUN, *flags, "--workdir", tmp_path / "new", "--dry_run").stdout
    words = {line.split()[0]: line for line in out.splitlines()}
    assert words.keys() == {"parameters", "operations", "images", "time"} | ({"bank"} if "trajectory" in stage_2 else set())
    assert re.search(r"about \d+:\d\d:\d\d on 1 x cpu", words["time"]), words
    assert not (tmp_path / "new").exists()


def test_learning_rate_warms_up_and_decays():
    cfg = tiny_config(lr=1.0, lr_rampup_steps=4, train_steps=100, lr_decay="none").train
    assert [train.learning_rate(s, cfg) for s in (0, 1, 3, 50, 99)] == [0.25, 0.5, 1, 1, 1]
    cfg = dataclasses.replace(cfg, lr_decay="cosine")
    assert train.learning_rate(50, cfg) == pytest.approx(0.5) and train.learning_rate(99, cfg) < 1e-3


def test_ranks_rounds_and_steps_draw_different_noise_and_the_same_again(monkeypatch):
    def draw(rank, step, r):
        monkeypatch.setattr(train.dist_util, "rank", lambda: rank)
        generator = torch.Generator()
        train.seed_round(generator, 0, step, r)
        return torch.cat([torch.randn(3, generator=generator), torch.rand(3)])

    draws = [draw(*where) for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all((draws[i] != draws[j]).all() for i in range(4) for j in range(i))
    assert torch.equal(draw(1, 0, 0), draws[1])


# ----------------------------------------------------------------------------------------------------------- objectives


def solutions(objective):
    """All states of the bank that are trained on, (K + 1, N, C, H, W)."""
    return objective.bank.states[: objective.slots].transpose(0, 1).flatten(1, 2)


def test_bank_holds_the_teachers_solutions_and_is_refreshed():
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=16, bank_refresh_freq=2)
    objective = objective_of(teacher, student, config)
    step = objective.teacher_step(None)
    bank, ts = solutions(objective).clone(), objective.ts
    assert bank.shape == (5, 16, 1, 8, 8)
    for k in range(4):
        expected = step(bank[k], ts[k].expand(16), ts[k + 1].expand(16))
        torch.testing.assert_close(bank[k + 1], expected, rtol=1e-4, atol=1e-5)
    changed = []
    for n in range(1, 5):
        objective.start_step(n)
        changed.append([bool((solutions(objective)[:, h] != bank[:, h]).any()) for h in (slice(0, 8), slice(8, 16))])
    assert changed == [[False, False], [True, False], [True, False], [True, True]]
    later = objective_of(teacher, student, config, start=4)  # what a run that continues at 4 sees
    assert torch.equal(solutions(later), solutions(objective))


def test_a_run_that_continues_computes_no_solution_again(tmp_path, monkeypatch):
    """The bank's batches are read from the workdir, unless they are damaged, or were made from something else."""
    teacher, solved = tiny_teacher(), []
    teacher.sha256 = "a teacher's"
    real = sde.sample
    monkeypatch.setattr(sde, "sample", lambda *arguments: solved.append(1) or real(*arguments))

    def begun(start, folder=tmp_path, **flags):
        student, config = student_of(teacher, bank_size=24, bank_refresh_freq=2, **flags)
        objective = objective_of(teacher, student, config, start, folder)
        made = len(solved)
        solved.clear()
        return objective, made

    first, made = begun(0)
    assert made == 4  # with the batch that is not trained on
    for step in range(1, 5):
        first.start_step(step)
    solved.clear()
    again, made = begun(4)
    assert made == 0 and torch.equal(solutions(again), solutions(first))
    back, made = begun(3)  # killed after its last checkpoint: of one batch the place was taken
    assert made == 1 and torch.equal(solutions(back), solutions(begun(3, None)[0]))
    assert begun(3, data_path="elsewhere", num_workers=2)[1] == 0
    assert begun(3, grid_steps=3)[1] == 4 and begun(3)[1] == 4  # another grid
    assert begun(3, grid_spacing="t")[1] == 4 and begun(3)[1] == 4
    with open(tmp_path / "bank-0.bin", "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    damaged, made = begun(3)
    assert made == 1 and torch.equal(solutions(damaged), solutions(back))
    record = json.loads((tmp_path / "bank-0.json").read_text())
    for text in ("{", "[]", json.dumps({**record, "held": {"0": 5}}), json.dumps({**record, "held": {"0": []}})):
        (tmp_path / "bank-0.json").write_text(text)
        assert begun(3)[1] == 4
    teacher.sha256 = "another's"
    assert begun(3)[1] == 4


def test_the_pairs_of_each_solution_are_counted_as_they_are_drawn():
    """On 8 pairs a step of which a quarter are for stage 1, from a bank of two batches."""
    teacher = tiny_teacher()
    for freq in (0, 2, 3):
        student, config = student_of(teacher, bank_size=16, bank_refresh_freq=freq, dsm_share=0.25, dsm_weight=1.0)
        objective, trained_on = objective_of(teacher, student, config, start=3), set()
        for step in range(3, 14):
            objective.start_step(step)
            trained_on |= {objective.first, objective.first + 1}
        assert objective.pairs_of_each(3, 14) == pytest.approx(11 * 6 / (8 * len(trained_on)))
        assert objective.pairs_of_each(6, 6) == 0  # a run that is done


def test_a_flow_map_that_knows_its_bank_by_heart_shows():
    """`one_step` falls and `one_step_new` does not: the batch behind the bank is never trained on."""
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=8, bank_refresh_freq=0, dsm_weight=0.0, dsm_share=0.0, to_data_share=0.0)
    objective = objective_of(teacher, student, config)
    objective.ema = student
    x, end = objective.bank.states[1, 0], objective.bank.states[1, -1]
    t, s = (objective.ts[k].expand(8) for k in (0, -1))
    with torch.no_grad():
        expected = sde.DISTANCES["huber"](sde.transport(x, student(x, t, s), t, s), end).mean().item()
    before = objective.watch()
    assert before["one_step_new"] == pytest.approx(expected, rel=1e-5)
    kept, objective.bank.states[1] = objective.bank.states[1].clone(), float("nan")
    optim, source = torch.optim.Adam(student.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        optim.zero_grad()
        objective(torch.rand(8, 1, 8, 8), None, source)[0].backward()
        optim.step()
    objective.bank.states[1] = kept
    after = objective.watch()
    assert after["one_step"] < 0.5 * before["one_step"] and after["one_step_new"] > 2 * after["one_step"], (before, after)


@pytest.mark.parametrize("objective", ["trajectory", "semigroup"])
def test_fresh_student_makes_the_one_step_loss_zero_with_one_teacher_step(objective):
    """With a grid of one step the student's start, one deis step of the teacher, is the solution."""
    teacher = tiny_teacher()
    student, config = student_of(teacher, grid_steps=1, bank_size=8, objective=objective, dsm_share=0.0, dsm_weight=0.0)
    loss = objective_of(teacher, student, config)
    value, _ = loss(torch.rand(8, 1, 8, 8), None, torch.Generator().manual_seed(0))
    assert value.item() < 1e-5


@pytest.mark.parametrize("objective", ["trajectory", "semigroup"])
@pytest.mark.parametrize("label_dim", [0, 10])
def test_objectives_learn_and_use_labels(objective, label_dim):
    teacher = tiny_teacher(label_dim=label_dim)
    student, config = student_of(teacher, bank_size=8, objective=objective, label_dim=label_dim, teacher_steps=2)
    loss = objective_of(teacher, student, config)
    optim = torch.optim.RAdam(student.parameters(), lr=3e-3)
    label = dataset.one_hot(torch.arange(8) % 10, label_dim)
    x0 = torch.full((8, 1, 8, 8), 0.8)
    denoising = []
    for _ in range(40):
        value, logs = loss(x0, label, torch.Generator().manual_seed(0))
        optim.zero_grad()
        value.backward()
        optim.step()
        denoising.append(logs["denoising"].item())
    assert denoising[-1] < 0.8 * denoising[0]
    assert logs["weight"] > 0 and all(p.grad is None for p in loss.ema.parameters())


# ------------------------------------------------------------------------------- the same recipe on any number of ranks


def pretend_ranks(monkeypatch, rank, world):
    monkeypatch.setattr(dist_util, "rank", lambda: rank)
    monkeypatch.setattr(dist_util, "world_size", lambda: world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_bank_is_shared_by_the_ranks(monkeypatch, world):
    """--bank_size and the refresh are totals: each rank holds its part, of other solutions than the others'."""
    teacher, shares = tiny_teacher(), []
    student, config = student_of(teacher, bank_size=16, bank_refresh_freq=2, bsz=2, global_bsz=8, dsm_share=0.5)
    for rank in range(world):
        pretend_ranks(monkeypatch, rank, world)
        objective = objective_of(teacher, student, config)
        assert solutions(objective).shape == (5, 16 // world, 1, 8, 8)
        before = solutions(objective)[0].clone()
        objective.start_step(2)
        changed = (solutions(objective)[0] != before).flatten(1).any(1)
        assert changed.sum() == 8 // world  # one batch of all ranks together
        shares.append(solutions(objective)[0])
    assert len({x.numpy().tobytes() for x in torch.cat(shares)}) == 16


def parts_of(batch, config, objective, monkeypatch, ranks):
    """What all rounds and ranks of a step log, and for each part its distances and stage-1 losses."""
    real, seen, logs = sde.trajectory_losses, [], []

    def note(*arguments, **named):
        seen.append(real(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(sde, "trajectory_losses", note)
    bsz = config.train.bsz
    for place in range(0, len(batch), bsz):
        pretend_ranks(monkeypatch, place // bsz % ranks, ranks)
        generator = torch.Generator().manual_seed(place)
        logs.append(objective(batch[place : place + bsz], None, generator, place)[1])
    monkeypatch.setattr(sde, "trajectory_losses", real)
    return logs, seen


@pytest.mark.parametrize(
    ("bsz", "global_bsz", "share"),
    [(24, 24, 0.3), (12, 24, 0.3), (6, 24, 0.3), (4, 24, 0.3), (3, 24, 0.35), (2, 24, 0.5), (8, 24, 0.25), (3, 24, 0.6)],
)
def test_all_parts_of_a_step_spend_the_share_and_weigh_their_images_the_same(monkeypatch, bsz, global_bsz, share):
    """Whatever the size of a part, which may not divide."""
    teacher = tiny_teacher()
    settings = {"bsz": bsz, "global_bsz": global_bsz, "dsm_share": share, "bank_size": 24, "adaptive_weight": False}
    student, config = student_of(teacher, **settings)
    objective = objective_of(teacher, student, config)
    batch = torch.rand(global_bsz, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for ranks in (1, 2) if global_bsz // bsz % 2 == 0 else (1,):
        logs, seen = parts_of(batch, config, objective, monkeypatch, ranks)
        distances, denoising = (torch.cat([part[i] for part in seen]) for i in (0, 1))
        assert len(denoising) == round(share * global_bsz) and len(distances) + len(denoising) == global_bsz
        for name, values in (("distance", distances), ("denoising", denoising)):
            mean = sum(log[name] for log in logs) / len(logs)
            torch.testing.assert_close(mean, values.mean(), rtol=1e-5, atol=1e-7)


def losses_of(model, seed):
    """A distance and a stage-1 loss of a part of a batch."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    d = model(x, torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.0]))
    return d.square().mean(), (d - x).abs().mean()


@pytest.mark.parametrize("split", ["ranks", "rounds"])
def test_the_adaptive_weight_is_that_of_the_whole_step(monkeypatch, split):
    """Of two ranks or of two rounds: as one part has it that holds all images."""
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=8, bsz=4, global_bsz=8, dsm_weight=1.0)
    objective, last = objective_of(teacher, student, config), student.net.output.weight
    parts = [losses_of(student, seed) for seed in (0, 1)]
    gradients = [[torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in part] for part in parts]
    expected = sde.adaptive_weight(*(a + b for a, b in zip(*gradients)))
    assert abs(sde.adaptive_weight(*gradients[1]) / expected - 1) > 1e-3  # one part alone has another
    if split == "ranks":
        pretend_ranks(monkeypatch, 1, 2)
        others = iter(gradients[0])
        monkeypatch.setattr(dist_util, "sum_over_ranks", lambda gradient: gradient + next(others))
    else:
        objective.combine(*parts[0], 0)
    found = objective.combine(*parts[1], 4)[1]["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_step_that_is_not_finite_leaves_the_adaptive_weight_as_it_was(which, factor):
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=8, bsz=4, global_bsz=8, dsm_weight=1.0)
    objective = objective_of(teacher, student, config)
    for place, seed in ((0, 0), (4, 1)):
        objective.combine(*losses_of(student, seed), place)
    before = objective.ratio.clone()
    for place, seed in ((0, 2), (4, 3)):
        losses = list(losses_of(student, seed))
        losses[which] = losses[which] * factor
        objective.combine(*losses, place)
    assert (objective.ratio == before) == (factor != 0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_first_step_that_is_not_finite_leaves_no_adaptive_weight(which):
    """The next step then takes its own, as a first one does."""
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=8, bsz=4, global_bsz=8, dsm_weight=1.0)
    objective, fresh = (objective_of(teacher, student, config) for _ in range(2))
    for place, seed in ((0, 2), (4, 3)):
        losses = list(losses_of(student, seed))
        losses[which] = losses[which] * float("inf")
        objective.combine(*losses, place)
    for place, seed in ((0, 0), (4, 1)):
        found, expected = (each.combine(*losses_of(student, seed), place)[1]["weight"] for each in (objective, fresh))
        assert found == expected and found.isfinite()
    assert objective.ratio == fresh.ratio


# ----------------------------------------------------------------------------------------------------------- the script


def test_both_stages_run_under_torchrun_and_leave_everything(trained):
    for folder, done in zip(trained["folders"], trained["outputs"]):
        assert done.stdout.strip() == str(folder / "DDPMpp-000003.pth")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert all(line["loss"] > 0 and line["images_per_s"] > 0 and line["lr"] > 0 for line in lines)
        Image.open(folder / "samples" / "000003.png").verify()
        Image.open(folder / "loss.png").verify()
        config = defaults.from_dict(json.loads((folder / "config.json").read_text()))
        assert config.network.model_channels == 8 and config.train.global_bsz == 16
        names = {path.name for path in folder.iterdir()}
        assert names == {"metrics.jsonl", "samples", "loss.png", "config.json", "DDPMpp-000003.pth", "latest.pth", ".lock"}
    assert "model_channels=8" in trained["outputs"][0].stderr


def refuse_pictures():
    """Nothing can be drawn."""

    def fail(*arguments, **options):
        raise RuntimeError("no colours left")

    misc.write_grid = misc.write_figure = fail


def test_a_picture_that_fails_is_a_warning(tmp_path):
    job = Job(tmp_path / "log", "train.py", *TINY_NETWORK, *TINY_RUN, "--workdir", tmp_path / "run", prepare=refuse_pictures)
    assert job.wait() == [0] and (tmp_path / "run" / "DDPMpp-000003.pth").exists(), job.err()
    for name in ("samples/000003.png", "loss.png"):
        assert re.search(rf"warning: cannot make .*{name}: no colours left", job.err()), job.err()
    assert "Traceback" not in job.err()


@pytest.mark.parametrize(("script", "backend"), [("train", "module://matplotlib_inline.backend_inline"), ("compare", "bogus")])
def test_pictures_do_not_depend_on_the_backend_that_the_environment_names(models, tmp_path, monkeypatch, script, backend):
    """That of every notebook, and none that exists."""
    monkeypatch.setenv("MPLBACKEND", backend)
    train = [*TINY_NETWORK, *TINY_RUN, "--train_steps", "1", "--workdir", tmp_path]
    compare = ["--denoiser", models / "ode" / "latest.pth", "--characteristic", models / "flow" / "latest.pth"]
    compare += ["--num_steps", "1", "--nsampling", "1", "--dest", tmp_path / "loss"]
    done = launch(f"{script}.py", *(train if script == "train" else compare))
    assert "warning" not in done.stderr
    Image.open(tmp_path / "loss.png").verify()


# ----------------------------------------------------------------------------------------------------- scores and LPIPS


def test_training_scores_itself_with_the_score_that_fid_py_gives(tmp_path):
    """2 ranks, 7 images: the score of the last step is that of the checkpoint's images."""
    reference, workdir = tmp_path / "digits.npz", tmp_path / "run"
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference)
    scoring = ["--ref_path", reference, "--fid_freq", "2", "--fid_num", "7"]
    done = run("train.py", "--workdir", workdir, *TINY_NETWORK, *TINY_RUN, *scoring, ranks=2)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["pixel_fid"] for line in lines if "pixel_fid" in line}
    assert list(scores) == [2, 3] and all(line["images_scored"] == 7 for line in lines if "pixel_fid" in line)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert f"pixel_fid={scores[3]:.4f}" in done.stderr
    images = ["--checkpoint", workdir / "DDPMpp-000003.pth", "--end_seed", "6"]
    assert float(run("fid.py", "--ref_path", reference, *images).stdout) == pytest.approx(scores[3], rel=1e-4)


def watch_the_group():
    """No DistributedDataParallel may outlive the process group: its end can wait for a rank that has gone."""
    import gc

    real = torch.distributed.destroy_process_group

    def destroy(*arguments):
        gc.collect()
        assert not any(isinstance(x, torch.nn.parallel.DistributedDataParallel) for x in gc.get_objects())
        real(*arguments)

    torch.distributed.destroy_process_group = destroy


def test_the_model_goes_before_the_process_group_does(tmp_path):
    job = Job(
        tmp_path / "log", "train.py", "--workdir", tmp_path / "run", *TINY_NETWORK, *TINY_RUN, ranks=2, prepare=watch_the_group
    )
    assert job.wait(120) == [0, 0], job.err()


def test_scoring_does_not_change_training(tmp_path):
    reference = tmp_path / "digits.npz"
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", reference)
    states = []
    for name, more in (("plain", []), ("scored", ["--ref_path", reference, "--fid_freq", "1", "--fid_num", "4"])):
        run("train.py", "--workdir", tmp_path / name, *TINY_NETWORK, *TINY_RUN, *more)
        states.append(checkpoint.read(tmp_path / name / "DDPMpp-000003.pth")["ema"])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("objective", ["trajectory", "semigroup"])
def test_stage_2_learns_with_lpips(trained, weights, tmp_path, objective):
    """The distance logged is that of LPIPS, and images pass through the resizing that the reference has."""
    batch = ["--train_steps", "1", "--bsz", "2", "--global_bsz", "2", "--log_freq", "1", "--sampling_freq", "0"]
    small = ["--num_steps", "4", "--bank_size", "2", "--teacher_steps", "3", "--dsm_share", "0.5"]
    files = ["--lpips_weights", weights["piq"], "--vgg_weights", weights["vgg"]]
    stage_2 = ["--mode", "characteristic", "--teacher", trained["denoiser"], "--objective", objective, "--loss_norm", "lpips"]
    run("train.py", *stage_2, *batch, *small, *files, "--workdir", tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["distance"] < 5 and line["grad_norm"] > 0
    content = checkpoint.read(tmp_path / "run" / "DDPMpp-000001.pth")
    assert not any("vgg" in key or "lin" in key for key in content["model"])


def test_lpips_distance_maps_the_models_range_to_the_unit_interval(weights):
    import lpips

    files = defaults.TrainRun(lpips_weights=str(weights["piq"]), vgg_weights=str(weights["vgg"]))
    net = lpips.LPIPS(weights["piq"], weights["vgg"], pooling="avg")
    a, b = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = net(*(torch.nn.functional.interpolate(x, (224, 224), mode="bilinear") for x in (a, b)))
    for data_name, scale in (("digits", lambda x: 2 * x - 1), ("mnist", lambda x: x)):  # centered, and not
        config = defaults.resolve({"data_name": data_name, "mode": "characteristic", "loss_norm": "lpips"})
        distance = train.make_distance(files, config, torch.device("cpu"))
        torch.testing.assert_close(distance(scale(a), scale(b)), expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize(("solver", "evaluations"), [("deis", 4), ("heun", 6)])
def test_a_dry_run_times_what_each_objective_computes(solver, evaluations):
    """On 8 images a round: steps 2 to 10, of 3 rounds; an objective from outside counts its own network alone."""
    assert train.Objective(None, None).work(2, 10, 3) == (24, 0)
    teacher = tiny_teacher()
    student, config = student_of(teacher, bank_size=16, bank_refresh_freq=2, teacher_solver=solver, grid_steps=4)
    assert objective_of(teacher, student, config).work(2, 10, 3) == (24, (2 + 1 + 3) * 3 * evaluations)
    student, config = student_of(teacher, objective="semigroup", teacher_steps=2, teacher_solver=solver, grid_steps=4)
    mean = (1 * 1 + 2 * 2) / 3
    assert objective_of(teacher, student, config).work(2, 10, 3) == pytest.approx((48, 24 * (mean * evaluations / 4 + 4)))


# ------------------------------------------------------------------------------------- held-out images, classes, guidance


@pytest.fixture
def parts(tmp_path):
    """A folder with train/ and test/ of two classes of grey images."""
    for part, n in (("train", 24), ("test", 21)):
        write_folder(tmp_path / "data" / part, images(n, (1, 8, 8), seed=n), classes=2)
    return tmp_path / "data"


OF_FOLDER = ["--data_name", "folder", "--image_size", "8", "--image_channels", "1", *TINY_NETWORK, "--label_dropout", "0.2"]


def test_held_out_loss_is_that_of_fixed_noise_and_does_not_depend_on_ranks(parts, tmp_path):
    common = ["train.py", *OF_FOLDER, "--data_path", parts, *TINY_RUN, "--bsz", "8", "--conditional", "--val_freq", "2"]
    for ranks in (1, 2):
        run(*common, "--workdir", tmp_path / f"{ranks}", ranks=ranks)
    lines = [[x for x in workdir.read_metrics(tmp_path / f"{ranks}") if "val_loss" in x] for ranks in (1, 2)]
    assert [x["step"] for x in lines[0]] == [2, 3] and len(lines[0][0]["val_bins"]) == 10
    trained = generator.load_model(tmp_path / "1" / "DDPMpp-000003.pth")
    config = trained.config.replace("data", data_path=str(parts))
    found = train.Validation(config, torch.device("cpu"))(trained, None)
    assert found == {name: pytest.approx(lines[0][1][name], rel=1e-5) for name in ("val_loss", "val_bins")}
    first = [x[0] for x in lines]  # weights differ by rounding only
    assert first[0]["val_loss"] == pytest.approx(first[1]["val_loss"], rel=0.05)
    held = torch.tensor(found["val_bins"])
    assert held.isfinite().all() and config.data.class_names == ("class0", "class1")


def test_conditional_and_measured_settings_are_kept_and_the_same_command_continues(parts, tmp_path):
    common = ["train.py", *OF_FOLDER, "--data_path", parts, *TINY_RUN, "--conditional", "--sigma_data", "auto", "--flip"]
    common += ["--bsz", "8", "--lr_decay", "none", "--workdir", tmp_path / "run"]
    run(*common)
    run(*common, "--train_steps", "4")
    config = generator.load_model(tmp_path / "run" / "DDPMpp-000004.pth").config
    pixels = dataset.to_model(images(24, (1, 8, 8), seed=24), True)
    assert config.network.label_dim == 2 and config.data.flip
    assert config.network.sigma_data == pytest.approx(float(pixels.std(correction=0)), abs=1e-4)


def test_guidance_is_distilled(parts, tmp_path):
    common = ["--data_path", parts, *TINY_RUN, "--bsz", "8"]
    run("train.py", *OF_FOLDER, *common, "--conditional", "--workdir", tmp_path / "teacher")
    flags = [
        "--mode",
        "characteristic",
        "--teacher",
        tmp_path / "teacher" / "latest.pth",
        "--guidance",
        "2",
        "--num_steps",
        "2",
    ]
    for objective in ("trajectory", "semigroup"):
        run("train.py", *flags, *common, "--objective", objective, "--bank_size", "16", "--workdir", tmp_path / objective)
        model = generator.load_model(tmp_path / objective / "latest.pth", {"class_idx": "class1"})
        assert model.config.distil.teacher_guidance == 2 and model.config.sampling.guidance == 1
        run("teaser.py", "--checkpoint", tmp_path / objective / "latest.pth", "--per_class", "--columns", "3")
        Image.open(tmp_path / objective / "teaser-characteristic.png").verify()


def test_a_guided_teacher_is_followed_by_the_bank_and_by_the_stage_1_loss():
    teacher = tiny_teacher(label_dim=3, label_dropout=0.1)
    for p in teacher.model.net.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    student, config = student_of(teacher, bank_size=8, dsm_weight=1.0, label_dim=3)
    config = config.replace("distil", teacher_guidance=2.0)
    objective = objective_of(teacher, student, config)
    label = dataset.one_hot(objective.labels[0], 3)
    denoise = generator.guided(teacher, 2.0)
    step = sde.solver(config.distil.teacher_solver, lambda x, t: denoise(x, t, label=label))
    x = objective.bank.states[0, 0]
    with torch.no_grad():
        torch.testing.assert_close(list(sde.sample(step, x, objective.ts))[-1].float(), objective.bank.states[0, -1])
        z, t = torch.randn(8, 1, 8, 8), torch.full((8,), 0.5)
        guided = denoise(sde.interpolate(x, z, t), t, label=label)
        torch.testing.assert_close(objective.target(x, z, t, label), guided)


def test_init_begins_with_the_weights_and_the_network_of_a_checkpoint(models, parts, tmp_path):
    source = models / "ode" / "DDPMpp-000004.pth"
    flags = ["--data_name", "folder", "--image_size", "8", "--image_channels", "1", "--data_path", parts, "--conditional"]
    flags += ["--train_steps", "1", "--bsz", "8", "--global_bsz", "8", "--lr", "1e-9", "--init", source]
    done = run("train.py", *flags, "--workdir", tmp_path / "run")
    assert "2 tensors begin afresh: map_label.bias, map_label.weight" in done.stderr and "are left out" not in done.stderr
    new, old = checkpoint.read(tmp_path / "run" / "latest.pth"), checkpoint.read(source)
    for name, value in old["ema"].items():
        torch.testing.assert_close(new["model"][name], value, rtol=1e-4, atol=1e-6)
    assert new["config"]["network"]["model_channels"] == 8 and new["step"] == 1


def test_init_takes_images_of_another_size_level_by_level_and_is_remembered(models, parts, tmp_path):
    source = models / "ode" / "DDPMpp-000004.pth"
    flags = ["--data_name", "folder", "--image_size", "16", "--image_channels", "1", "--data_path", parts, "--init", source]
    flags += ["--bsz", "8", "--global_bsz", "8", "--lr_decay", "none", "--workdir", tmp_path / "run"]
    done = run("train.py", *flags, "--train_steps", "1")
    assert "begin afresh" not in done.stderr and "are left out" not in done.stderr
    run("train.py", *flags, "--train_steps", "2")
    content = checkpoint.read(tmp_path / "run" / "DDPMpp-000002.pth")
    assert content["config"]["network"]["attn_resolutions"] == [8]
    assert content["run"]["init"] == {"path": str(source), "sha256": misc.file_hash(source)}


def test_stage_2_refuses_other_classes_of_the_same_number(parts, tmp_path):
    common = ["--data_path", parts, *TINY_RUN, "--bsz", "8"]
    run("train.py", *OF_FOLDER, *common, "--conditional", "--workdir", tmp_path / "teacher")
    for part in ("train", "test"):
        (parts / part / "class0").rename(parts / part / "another")
    flags = ["--mode", "characteristic", "--teacher", tmp_path / "teacher" / "latest.pth", "--num_steps", "2"]
    done = run("train.py", *flags, *common, "--workdir", tmp_path / "flow", expect=2)
    assert "the data has the classes another, class1, and" in done.stderr
