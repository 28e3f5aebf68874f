"""What the repository promises as a whole: its layers, its README, its command lines, its settings."""

from dist_util import UserError

import argparse
import ast
import csv
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dataset
import defaults
import fid
import generator
import misc
from conftest import ROOT, SHORT_STAGE_1, SHORT_STAGE_2, launch, run
from processes import Job

SCRIPTS = ("train", "eval", "fid", "teaser", "compare", "checkpoint")
GROUND = {"misc", "network", "defaults", "sde", "inception", "lpips", "dist_util"}
MAY_IMPORT = {
    # imports point down
    "train": {"workdir", "fid", "generator", "dataset", "checkpoint", *GROUND},
    "eval": {"generator", "dataset", *GROUND},
    "teaser": {"generator", "dataset", *GROUND},
    "compare": {"fid", "generator", "dataset", *GROUND},
    "fid": {"generator", "dataset", *GROUND},  # a script, and a library for train and compare
    "workdir": {"generator", "checkpoint", *GROUND},
    "generator": {"dataset", "checkpoint", *GROUND},
    "dataset": GROUND,
    "checkpoint": GROUND,
    "misc": {"dist_util"},
    "network": {"sde"},
    "defaults": {"sde", "dist_util"},
    "dist_util": {"defaults"},  # for --help alone, before torch is imported
    **dict.fromkeys(("sde", "inception", "lpips"), set()),
}


def test_imports_point_down():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == set(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported & modules <= allowed, name


def test_the_mathematics_touches_neither_files_nor_generators():
    tree = ast.parse((ROOT / "sde.py").read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    assert not names & {"open", "print", "rand", "randn", "randint", "randn_like", "rand_like", "multinomial", "generator"}


# --------------------------------------------------------------------------------------------------- the README


def commands_of(document):
    """Every command in a document's sh blocks, one string each, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def readme_commands():
    return commands_of(ROOT / "README.md")


def test_readme_names_the_two_commands_first():
    commands = readme_commands()
    assert [c for c in commands if c.startswith("make")][:2] == ["make demo", "make test"]
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:50])
    assert "make demo" in first_screen and "make test" in first_screen and "assets/" in first_screen


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_parsed_by_their_scripts(command):
    check_command(command)


OTHERS = [
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "checkpoints/README", "stats/README")),
]


@pytest.mark.parametrize("command", sorted({command for document in OTHERS for command in commands_of(document)}))
def test_commands_of_other_documents_are_parsed_too(command):
    check_command(command)


class Parsed(Exception):
    """The flags of a program are ones that it takes."""


def check_benchmark(path, words):
    """SystemExit unless the program takes these words; it goes no further than to read them."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser):
        real(parser, words)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        importlib.import_module(Path(path).stem).main()


def test_a_documented_benchmark_with_an_unknown_flag_fails():
    check_command("python benchmarks/recipe.py --stage 1")
    for wrong in ("--stage 9", "--stage 1 --no_such_flag x"):
        with pytest.raises(SystemExit):
            check_command(f"python benchmarks/recipe.py {wrong}")


def check_command(command):
    """AssertionError or UserError unless a command is one that its script takes."""
    words = shlex.split(command)
    if words[0] in ("git", "cd", "make", "export", "mkdir"):
        targets = (ROOT / "Makefile").read_text()
        assert words[0] != "make" or all(re.search(rf"^{word}:", targets, flags=re.M) for word in words[1:])
        return
    assert words[0] in ("python", "torchrun", ".venv/bin/python"), command
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[script].startswith("benchmarks/"):
        check_benchmark(words[script], words[script + 1 :])
        return
    _, flags = defaults.parse(words[script].removesuffix(".py"), words[script + 1 :])
    if "mode" in flags or "data_name" in flags:
        flags = {name: value for name, value in flags.items() if value != "auto"}  # which is measured
        in_stage_2 = defaults.IN_STAGE_2 if words[script] == "train.py" and flags.get("mode") == "characteristic" else {}
        defaults.resolve({in_stage_2.get(name, name): value for name, value in flags.items()})


def test_no_documented_folder_is_both_a_run_and_a_set_of_images():
    """Pasted one after the other, the second command would be refused, or train among the images."""
    used = {}
    for document in (ROOT / "README.md", *OTHERS):
        for command in commands_of(document):
            for script, folder in re.findall(r"(train|eval)\.py .*--workdir (\S+)", command):
                used.setdefault(folder, set()).add(script)
    assert len(used) > 20 and all(len(scripts) == 1 for scripts in used.values()), used


def section(name, heading):
    """The text of a document from a heading to the next one of its kind."""
    text = (ROOT / name).read_text()
    return text[text.index(f"\n## {heading}\n") :].split("\n## ")[1]


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_the_readmes_lines_of_python_run(models, tmp_path, monkeypatch, capsys):
    """With a tiny model in the place of the one that its commands train."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "digits-characteristic").symlink_to(models / "flow")
    run("fid.py", "--mode", "ref", "--data_name", "digits", "--dest", tmp_path / "logs" / "digits.npz")
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(section("README.md", "From Python"))
    names = {}
    exec(block, names)
    assert names["images"].dtype == torch.uint8 and names["images"].shape == (1800, 1, 8, 8)
    assert len(names["states"]) == 2 and names["states"][0].shape == (8, 1, 8, 8)
    assert float(capsys.readouterr().out) > 0
    assert len([line for line in block.splitlines() if line and not line.startswith("import ")]) <= 5


def write_in(additions):
    """Execute code in the namespace of modules, as if it had been written there."""
    for name, code in additions:
        exec(code, vars(importlib.import_module(name)))


ADDITIONS = {
    # heading: (modules in which its blocks are written, one after the other; the flag that knows it then, its name; the others)
    "Add a solver": (["sde"], ["--teacher_solver", "midpoint"], "it must be one of euler, heun, deis, dpm, edm"),
    "Add a distance": (["sde"], ["--loss_norm", "l1"], "it must be one of l2, huber, lpips"),
    "Add an objective of stage 2": (["train"], ["--objective", "one_step"], "it must be one of trajectory, semigroup"),
    "Add a data set": (
        ["dataset", "defaults"],
        ["--data_name", "shapes"],
        "choose from 'digits', 'mnist', 'cifar', 'afhq', 'folder'",
    ),
}


@pytest.mark.parametrize("heading", ADDITIONS)
def test_what_contributing_adds_works(heading, models, tmp_path):
    modules, flag, others = ADDITIONS[heading]
    blocks = python_blocks(section("CONTRIBUTING.md", heading))
    assert len(blocks) == len(modules)
    command = [*SHORT_STAGE_2, "--teacher", models / "ode" / "latest.pth"]
    if "--data_name" in flag:
        images, labels = np.zeros((8, 1, 16, 16), np.uint8), np.arange(8) % 2
        np.savez(tmp_path / "shapes.npz", images=images, labels=labels)
        command = [*SHORT_STAGE_1, "--attn_resolutions", "8", "--data_path", tmp_path]
    write = partial(write_in, list(zip(modules, blocks)))
    job = Job(tmp_path / "log", *command, *flag, "--workdir", tmp_path / "run", prepare=write)
    assert job.wait() == [0], job.err()
    plain = json.loads((tmp_path / "run" / "config.json").read_text())
    assert any(section.get(flag[0].strip("-")) == flag[1] for section in plain.values())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["distance" if "--teacher" in command else "loss"] > 0
    job = Job(tmp_path / "without", *command, *flag, "--workdir", tmp_path / "new")  # the name is known by that alone
    lines = job.wait() == [2] and job.err().splitlines()
    assert lines and lines[-1].startswith("error: ") and all(word in lines[-1] for word in (*flag, others)), job.err()
    assert not (tmp_path / "new").exists()


def test_the_tests_that_contributing_names_are_there():
    named = set(re.findall(r"tests/test_\w+\.py", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named >= {f"tests/test_{room}.py" for room in ("dataset", "checkpoint", "generator", "workdir", "fid", "train")}
    assert all((ROOT / name).is_file() for name in named)


def test_torchrun_on_one_machine_takes_a_port_of_its_own():
    """Two jobs on one machine would want the same one."""
    commands = [command for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) for command in commands_of(path)]
    commands = [command for command in commands if command.startswith("torchrun") and "--nnodes" not in command]
    assert commands and all("--standalone" in command for command in commands)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    text = launch(f"{script}.py", "--help").stdout
    own, names, _ = defaults.SCRIPTS[script]
    sections = [own] + [defaults.SECTIONS[name] for name in names]
    settings = [f for section in sections for f in dataclasses.fields(section)]
    flags = [f for f in settings if f.metadata["flag"] and not f.metadata["positional"]]
    assert all(f.metadata["help"] for f in settings) and all(f"--{f.name.rstrip('_')}" in text for f in flags)
    assert text.count("(default:") >= len(flags) - 3  # names hidden by the script's own
    assert text.isascii()  # printing it under a locale that knows no more would end in a traceback


@pytest.mark.parametrize("program", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py") if p.name != "timing.py"))
def test_benchmarks_start_and_explain_themselves(program):
    assert "usage:" in launch(f"benchmarks/{program}", "--help").stdout


def test_a_benchmark_without_its_checkpoint_is_one_line(tmp_path):
    done = launch("benchmarks/nearest.py", "--checkpoint", "nowhere.pth", "--dest", tmp_path / "x.png", expect=2)
    assert done.stderr == "error: there is no checkpoint nowhere.pth\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_without_torch(tmp_path, script):
    """Importing it takes seconds."""
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch')")
    command = [sys.executable, ROOT / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py"), done.stderr
    assert f"python {script}.py" in done.stdout and not done.stderr


def test_no_python_of_ours_is_ignored_by_git_and_no_data_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert {f"{name}.py" for name in MAY_IMPORT} <= set(tracked)
    assert [f for f in tracked if f.startswith(("data/", "logs/"))] == ["data/README.md", "data/digits.npz"]
    assert [f for f in tracked if f.startswith("stats/")] == ["stats/README.md", "stats/stats.csv"]


# ------------------------------------------------------------------------------------------------ published models


def test_the_published_flow_map_draws_the_published_picture(tmp_path):
    """Up to one level of 255 in a pixel, from float rounding: 64 digits in one evaluation each, with no other flag."""
    run("teaser.py", "--checkpoint", ROOT / "checkpoints" / "mnist-characteristic.pth", "--dest", tmp_path / "drawn.png")
    drawn, published = (np.array(Image.open(p)) for p in (tmp_path / "drawn.png", ROOT / "assets" / "mnist-one-step.png"))
    assert drawn.shape == published.shape and np.abs(drawn.astype(int) - published).max() <= 1


def test_the_hashes_of_the_published_models_are_theirs():
    text = (ROOT / "checkpoints" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+\.pth)` .* ([0-9a-f]{64}) \|$", text, flags=re.M))
    assert rows == {path.name: misc.file_hash(path) for path in (ROOT / "checkpoints").glob("*.pth")}


def table_rows(document, start):
    """The cells, but for empty ones, of each row of a document that begins with `start`, by number of evaluations."""
    text, found = (ROOT / document).read_text(), []
    for row in re.findall(rf"^\| {re.escape(start)} \|(.*)\|$", text, flags=re.M):
        cells = [cell.strip(" *") for cell in row.split("|")][-5:]
        found.append({nfe: float(cell) for nfe, cell in zip(("1", "2", "5", "10", "20"), cells) if cell})
    return found


def test_the_documented_scores_are_the_measured_rows():
    rows = list(csv.DictReader((ROOT / "stats" / "stats.csv").open()))
    assert {row["n"] for row in rows if row["dataset"] == "mnist"} == {"50000"}
    for row in rows:
        if row["source"].startswith("checkpoints/"):
            assert row["sha256"] == misc.file_hash(ROOT / row["source"]), row["source"]
    mnist = {"dataset": "mnist", "start_seed": "0"}
    dpm, deis, flow = ({**mnist, "solver": solver} for solver in ("dpm", "deis", "flow map"))
    even, others, more = {"time_grid": "t"}, {"start_seed": "50000"}, {"start_seed": "100000"}
    for document, start, these in (
        ("README.md", "digits, denoiser's ODE (dpm)", {"source": "logs/demo/denoiser/DDPMpp-000600.pth"}),
        ("README.md", "digits, flow map", {"source": "logs/demo/characteristic/DDPMpp-000500.pth"}),
        ("docs/speed.md", "`semigroup`, 115 steps", {"step": "115"}),
        ("docs/mnist.md", "our denoiser, `dpm`, even steps", dpm | even),
        ("docs/mnist.md", "our denoiser, `deis`, even steps, seeds 50000 to 99999", deis | even | others),
        ("docs/mnist.md", "our denoiser, `deis`, even steps, seeds 100000 to 149999", deis | even | more),
        ("docs/mnist.md", "our denoiser, `dpm`, even steps, seeds 50000 to 99999", dpm | even | others),
        ("docs/mnist.md", "our denoiser, `dpm`, even steps, seeds 100000 to 149999", dpm | even | more),
        ("docs/mnist.md", "our denoiser, `deis`, even steps", deis | even),
        ("docs/mnist.md", "our flow map", flow),
        ("docs/mnist.md", "our flow map, seeds 50000 to 99999", flow | others),
        ("docs/mnist.md", "our flow map, seeds 100000 to 149999", flow | more),
        ("README.md", "MNIST, our denoiser's ODE (deis)", deis | even),
        ("README.md", "MNIST, our denoiser's ODE (dpm)", dpm | even),
        ("README.md", "MNIST, our flow map", flow),
    ):
        measured = {row["nfe"]: float(row["FID"]) for row in rows if these.items() <= row.items()}
        assert table_rows(document, start) == [{nfe: pytest.approx(value, abs=6e-4) for nfe, value in measured.items()}]


def test_the_published_digits_score_what_the_readme_says():
    row = re.search(r"^\| digits, flow map \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.M).group(1)
    data = dataset.load(defaults.resolve({"data_name": "digits"}).data)
    model = generator.load_model(ROOT / "checkpoints" / "digits-characteristic.pth", {}, "cpu")
    reference, found = (fid.measure(images, fid.load_features("pixels")) for images in (data, model.images(range(1800))))
    assert fid.frechet_distance(reference, found) == pytest.approx(float(row.split("|")[0]), abs=2e-3)


# ------------------------------------------------------------------------------------------------------- settings


def test_every_preset_makes_a_valid_configuration_that_survives_json():
    for data_name, mode in defaults.TRAIN_PRESETS:
        config = defaults.resolve({"data_name": data_name, "mode": mode})
        assert defaults.from_dict(json.loads(json.dumps(defaults.to_dict(config)))) == config


def test_presets_of_mnist_and_cifar_are_the_reference_recipe():
    mnist, cifar = (defaults.resolve({"data_name": name, "mode": "denoiser"}) for name in ("mnist", "cifar"))
    assert (mnist.network.model_channels, mnist.network.channel_mult, mnist.network.attn_resolutions) == (32, (1, 2, 2), (14,))
    assert (cifar.network.model_channels, cifar.network.channel_mult, cifar.network.attn_resolutions) == (
        128,
        (1, 2, 2, 2),
        (16,),
    )
    assert (mnist.train.lr, mnist.train.ema_decay, mnist.train.train_steps, mnist.data.centered) == (1e-3, 0.999, 10000, False)
    assert (cifar.train.lr, cifar.train.ema_decay, cifar.train.train_steps, cifar.data.centered) == (2e-4, 0.9999, 400000, True)
    for config in (mnist, cifar):
        assert (config.network.num_blocks, config.network.dropout, config.network.sigma_data, config.network.M) == (
            4,
            0.1,
            1,
            999,
        )
        assert (config.train.global_bsz, config.train.lr_rampup_steps, config.train.lr_decay) == (1024, 500, "none")
        assert (config.train.train_eps0, config.train.train_eps1) == (1e-5, 1e-3)
    for name, lr in (("mnist", 1e-3), ("cifar", 1e-4)):
        config = defaults.resolve({"data_name": name, "mode": "characteristic"})
        assert (config.train.lr, config.train.global_bsz, config.train.lr_rampup_steps, config.train.train_steps) == (
            lr,
            256,
            200,
            2000,
        )
        assert (config.distil.grid_steps, config.distil.teacher_steps, config.sampling.num_steps) == (20, 19, 1)


def parsed(*argv):
    return defaults.parse("train", list(argv))[1]


def test_flags_win_over_presets_and_presets_over_defaults():
    config = defaults.resolve(parsed("--data_name", "mnist", "--lr", "5e-4"))
    assert config.train.lr == 5e-4 and config.network.model_channels == 32


def test_lists_and_booleans_are_written_in_every_documented_way():
    assert parsed("--channel_mult", "1", "2", "2") == {"channel_mult": (1, 2, 2)}
    assert parsed("--attn_resolutions") == {"attn_resolutions": ()}
    for argv, value in (
        (["--churn"], True),
        (["--churn", "True"], True),
        (["--churn", "False"], False),
        (["--no-churn"], False),
    ):
        assert parsed(*argv) == {"churn": value}
    assert parsed("--gamma", "1e-1") == {"gamma": 0.1}


def test_the_preset_of_afhq_is_that_of_the_reference():
    config = defaults.resolve({"data_name": "afhq", "mode": "denoiser"})
    assert config.network.channel_mult == (1, 1, 2, 2, 2) and config.network.attn_resolutions == (16,)


@pytest.mark.parametrize(
    ("written", "read"),
    [("DDPMpp", "ddpmpp"), ("DDPM++", "ddpmpp"), ("ddpm++", "ddpmpp"), ("NCSNpp", "ncsnpp"), ("NCSN++", "ncsnpp")],
)
def test_the_spelling_of_an_architecture_does_not_matter(written, read):
    assert parsed("--architecture", written) == {"architecture": read}


def test_attention_is_where_the_network_has_it():
    """A resolution that was asked for and is not there is refused; the preset's are left out."""
    folder = {"data_name": "folder", "image_size": 24, "channel_mult": (1, 2)}
    with pytest.raises(UserError, match=r"--attn_resolutions is \(5,\): .*\[24, 12\]"):
        defaults.resolve({**folder, "attn_resolutions": (5,)})
    assert defaults.resolve(folder).network.attn_resolutions == ()
    assert defaults.resolve({**folder, "attn_resolutions": (12,)}).network.attn_resolutions == (12,)
    assert defaults.resolve({**folder, "image_size": 64}).network.attn_resolutions == ()
    assert defaults.resolve({**folder, "image_size": 16}).network.attn_resolutions == (8,)


def test_endings_are_added_where_they_are_missing_and_home_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")

    def read(script, *argv):
        return defaults.parse(script, list(argv))

    for module, ending in (("fid", ".npz"), ("teaser", ".png"), ("compare", ".png")):
        for name in ("stats/x", f"stats/x{ending}"):
            assert read(module, "--dest", name)[0].dest == f"stats/x{ending}"
        assert read(module, "--dest", "stats/x.7")[0].dest == f"stats/x.7{ending}"
        assert read(module, "--dest=~/x")[0].dest == f"/home/somebody/x{ending}"
    assert read("train", "--workdir=~/x")[0].workdir == "/home/somebody/x"
    assert read("train", "--teacher", "~/t.pth", "--ref_path", "~/r.npz")[0].teacher == "/home/somebody/t.pth"
    assert read("train", "--data_path", "~")[1] == {"data_path": "/home/somebody"}
    assert read("fid", "--img_folder=~/images")[0].img_folder == "/home/somebody/images"


def test_a_flow_map_of_an_earlier_version_keeps_its_grid():
    """There one setting was the steps of sampling and those of stage 2's grid."""
    for mode, expected in (("characteristic", (15, 3.0, 1)), ("denoiser", (20, 1.0, 15))):
        plain = defaults.to_dict(defaults.resolve({"mode": mode}))
        for name in ("grid_steps", "grid_rho", "grid_spacing"):
            del plain["distil"][name]
        plain["sampling"].update(num_steps=15, rho=3.0)
        config = defaults.from_dict(plain)
        assert (config.distil.grid_steps, config.distil.grid_rho, config.sampling.num_steps) == expected
        assert defaults.from_dict(json.loads(json.dumps(defaults.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"model_chanels": 8}}, "unknown setting 'network.model_chanels'"),
        ({"net": {}}, "unknown section 'net'"),
        ({"network": {"model_channels": "8"}}, "is '8'"),
        ({"network": {"channel_mult": [1, 2.5]}}, "channel_mult"),
        ([], "not a dictionary"),
    ],
)
def test_unknown_or_wrong_configurations_are_fatal(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        defaults.from_dict(change)


# --------------------------------------------------------------------- properties of settings, for whatever hypothesis finds

SETTINGS = [f for section in defaults.SECTIONS.values() for f in dataclasses.fields(section) if f.metadata["flag"]]


def values(f):
    """Values of a setting that are allowed by themselves."""
    if f.metadata["choices"]:
        return st.sampled_from(defaults.choices(f))
    if f.type is bool:
        return st.booleans()
    if f.type is str:
        return st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: not text.startswith("-"))
    if typing.get_origin(f.type) is tuple:
        return st.lists(st.integers(1, 64), min_size=f.name == "channel_mult", max_size=4).map(tuple)
    if f.metadata["between"]:
        low, high = f.metadata["between"]
        return st.floats(low, high, exclude_min=True, exclude_max=True, allow_nan=False)
    low, high = f.metadata["least"], f.metadata["most"]
    return st.integers(low, high) if f.type is int else st.floats(low, high, allow_nan=False)


FLAGS = st.fixed_dictionaries({}, optional={f.name: values(f) for f in SETTINGS})


@given(FLAGS)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much, hypothesis.HealthCheck.too_slow], deadline=None
)
def test_any_configuration_survives_json(flags):
    try:
        config = defaults.resolve(flags)
    except UserError:  # values that do not go together
        hypothesis.reject()
    assert defaults.from_dict(json.loads(json.dumps(defaults.to_dict(config)))) == config
    assert defaults.resolve(flags, config) == config


@given(FLAGS, st.booleans())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow])
def test_any_flags_are_read_as_they_were_written(flags, short):
    argv = []
    for name, value in flags.items():
        if type(value) is bool and short:
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    assert parsed(*argv) == flags


@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from([f"--{f.name}" for f in SETTINGS]), st.sampled_from(["-1", "1e9", "nan", "\n"]))
    )
)
def test_any_command_line_is_read_or_refused_with_one_line(argv):
    try:
        defaults.resolve(parsed(*argv))
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    except SystemExit as stopped:  # --help
        assert stopped.code == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_other_content_of_a_file_is_no_configuration(content):
    with pytest.raises(UserError):
        defaults.from_dict({"network": content, "train": {"lr": content}})


# ------------------------------------------------------------------------------------------------ users' mistakes


def test_mistakes_on_several_ranks_are_reported_once(tmp_path):
    done = launch(
        "train.py", "--mode", "characteristic", "--workdir", tmp_path / "new", ranks=2, expect=1
    )  # torchrun's own status
    assert done.stderr.count("error: --teacher is missing") == 1 and "Error:" not in done.stderr.split("torch.distributed")[0]
