"""Every file of conf/ composes and builds what it names; every experiment trains a batch; the command line works."""

import configparser
import contextlib
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_mimic import GradMimic, Ledger
from lightning_mimic.cli.build import build
from lightning_mimic.cli.training import train
from support.cases import case
from support.configs import CONF, CURATE, QUIET, ROOT, SCORE, composed
from support.pair_shards import write_shards

# What changes others (experiments, and whose reference is meant) has tests of its own.
GROUPS = sorted(p.relative_to(CONF) for p in CONF.glob("*/**/*.yaml"))
GROUPS = [path for path in GROUPS if path.parts[0] not in ("experiment", "reference")]
ROOTS = sorted(p.stem for p in CONF.glob("*.yaml"))
SCORED = ("data", "data/noise", "data/transform", "model", "model/backbone", "mimic", "trainer", "paths")
COMMANDS = {
    "train": "train:main",
    "score": "score:main",
    "curate": "curate:curate_main",
    "partition": "curate:partition_main",
    "summarise": "curate:summarise_main",
    "select": "curate:select_main",
    "make_shards": "make_shards:main",
    "report": "report:main",
    "compare": "curate:compare_main",
}
EXPERIMENTS = sorted(p.stem for p in CONF.glob("experiment/*.yaml") if p.stem.startswith("digits"))
PAIRS = sorted(p.stem for p in CONF.glob("experiment/*.yaml") if not p.stem.startswith(("digits", "own")))
# Two packages' habits: a deprecated call within Lightning, and an unused trainer flag under fast_dev_run.
pytestmark = pytest.mark.filterwarnings("ignore:.*fast_dev_run.*")


def reference(folder: Path) -> Path:
    train(composed(folder, "experiment=digits_reference", "trainer.max_epochs=5", "test=false", *QUIET))
    return folder / "reference.ckpt"


def test_every_root_is_a_command_and_every_group_has_one():
    assert sorted(COMMANDS) == ROOTS
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    said = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].strip().splitlines())
    assert said.pop("mimic-doctor") == "lightning_mimic.cli.doctor:main"  # has no configuration
    assert said == {
        f"mimic-{name.replace('_', '-')}": f"lightning_mimic.cli.{module}" for name, module in COMMANDS.items()
    }


ALL_GROUPS = sorted({path.parent.as_posix() for path in GROUPS})
WHERE = [("curate" if group == "filter" else "train", group) for group in ALL_GROUPS]
WHERE += [("score", group) for group in ALL_GROUPS if group in SCORED]


NEEDED = {
    "data/image_text": ["data.shards=a.tar"],
    "data/torchvision": ["data.name=cifar10"],
    "data/image_folder": ["data.root=images"],
    "data/noise/annotators": ["data.noise.path=CIFAR-10_human.pt"],
}


@pytest.mark.parametrize(("root", "group"), WHERE)
def test_every_file_builds_what_it_names(root, group, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as the command sets it
    if (root, group) == ("train", "mimic"):  # aligned_architecture puts weights into the module that it makes
        reference(tmp_path)
    for option in sorted(path.stem for path in GROUPS if path.parent.as_posix() == group):
        given = {"train": [], "score": SCORE, "curate": CURATE}[root]
        # What has no default of its own, and what is a part of another.
        given = [*given, *NEEDED.get(f"{group}/{option}", [])]
        given += ["data=torchvision", "data.name=dtd"] if group == "data/transform" else []
        given += ["model=clip"] if group == "model/towers" else []
        with case(option):
            node = config = composed(tmp_path, f"{group}={option}", *given, root=root)
            for part in group.split("/"):
                node = node[part]
            if option == "none":
                assert not node
            elif group == "paths":
                assert "_target_" not in node
            else:
                # For another command the same file need not be built again, only find all that it refers to.
                assert OmegaConf.to_container(node, resolve=True)["_target_"]
                if root == "train" and group in ("model", "mimic"):
                    build(config)  # completes the model's settings
                assert root == "score" or instantiate(node) is not None


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_a_batch(experiment, tmp_path):
    reference(tmp_path)
    train(composed(tmp_path, f"experiment={experiment}", "trainer.fast_dev_run=true", *QUIET))


def tiny(folder: Path) -> list[str]:
    """Makes an experiment on image-text pairs one of two shards and of small towers."""
    shards = write_shards(folder / "shards", 8, 8)
    config = composed(folder, "model=clip", "model/towers=digits")
    torch.save(instantiate(config.model).state_dict(), folder / "reference.ckpt")
    transforms = [f"++data.{name}.image_size=32" for name in ("transform", "eval_transform")]
    return [
        "model/towers=digits", f"data.shards={[str(path) for path in shards]}", "++data.tokenizer.context_length=16",
        *transforms, "data.batch_size=8", "data.num_workers=0", "data.val_shards=null",
        "mimic.parameters=[towers.visual.head.proj,towers.text_projection]", "trainer.accelerator=cpu",
        "trainer.devices=1", "trainer.strategy=auto",
    ]  # fmt: skip


WAYS = [(experiment, "") for experiment in PAIRS]
WAYS += [("clip_digits", mimic) for mimic in ("clip_posterior", "clip_same_start", "none")]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "mimic"), WAYS)
def test_every_experiment_on_pairs_trains_a_batch(experiment, mimic, tmp_path):
    how = [*tiny(tmp_path), "trainer.fast_dev_run=true", *QUIET, *([f"mimic={mimic}"] if mimic else [])]
    how += ["mimic.temperature=null"] * (mimic == "clip_posterior")
    aligns = mimic in ("", "clip_posterior") and experiment != "clip_digits_reference"
    with pytest.warns(UserWarning, match="never aligned") if aligns else contextlib.nullcontext():
        trainer = train(composed(tmp_path, f"experiment={experiment}", *how))
    assert trainer.global_step == 1
    scored = any(isinstance(callback, GradMimic) for callback in trainer.callbacks)
    assert scored == (mimic != "none" and experiment != "clip_digits_reference")


def test_the_error_for_missing_shards_has_the_command_that_writes_them(tmp_path):
    config = composed(tmp_path, "experiment=clip_digits_reference", f"paths.shards={tmp_path / 'shards'}")
    message = f"no {tmp_path}/shards. It is made by: mimic-make-shards out={tmp_path}/shards"
    with pytest.raises(ValueError, match=f"^`paths.shards`: there is {message}$"):
        train(config)


@pytest.mark.parametrize("experiment", PAIRS)
def test_every_experiment_on_pairs_composes_for_scoring(experiment, tmp_path):
    shards = ["data.shards=a.tar"] if experiment.startswith("datacomp") else []
    config = composed(tmp_path, f"experiment={experiment}", *shards, *SCORE, root="score")
    assert config.checkpoints == ["a.ckpt"]
    assert instantiate(config.data).seed == 0


def test_the_rotation_of_a_clips_reference_can_be_left_out(tmp_path):
    config = composed(tmp_path, *(given := ["experiment=clip_digits", *tiny(tmp_path), *QUIET]))
    assert instantiate(config.mimic).settings.reference.rotate
    config = composed(tmp_path, *given, "mimic.reference.rotate=false")
    assert not instantiate(config.mimic).settings.reference.rotate


def test_datacomps_recipe_is_the_fixed_one(tmp_path):
    for scale, seen in (("small", 12_800_000), ("medium", 128_000_000)):
        config = composed(tmp_path, f"experiment=datacomp_{scale}", "data.shards=a.tar")
        assert config.data.samples_per_epoch * config.trainer.max_epochs == seen
        assert config.data.batch_size * config.trainer.devices == 4096
        assert config.data.samples_per_epoch / 4096 % config.data.num_workers == 0  # nothing is rounded up
        assert (config.model.optimizer.lr, config.model.warmup_steps) == (5e-4, 500)
        assert (config.model.towers.model_name, config.mimic.temperature) == ("ViT-B-32", 0.05)
        with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
            bare = compose("train", overrides=[f"experiment=datacomp_{scale}"])
        assert OmegaConf.is_missing(bare.paths, "reference")
        assert OmegaConf.is_missing(bare.data, "shards")


UNRELATED = {
    "another start": ["mimic=aligned"],
    "another architecture": [
        "mimic=aligned_architecture",
        "model/backbone=mlp",
        "model.optimizer.lr=0.002",
    ],
}


@pytest.mark.parametrize("kind", UNRELATED)
def test_a_reference_may_be_unrelated(kind, tmp_path):
    reference(tmp_path)
    config = composed(tmp_path, "experiment=digits_scratch", *UNRELATED[kind], "trainer.fast_dev_run=true", *QUIET)
    build(config)
    assert instantiate(config.mimic).settings.reference.every == 10
    with pytest.warns(UserWarning, match="never aligned"):  # in one batch
        train(config)


@pytest.mark.slow
def test_the_noisy_experiment_probes_the_reference(tmp_path):
    path = reference(tmp_path)
    trainer = train(composed(tmp_path, "experiment=digits_noisy", "trainer.max_epochs=1", *QUIET))
    model, saved = trainer.lightning_module, torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(model.backbone.layers[0].weight, saved["backbone.layers.0.weight"], rtol=0, atol=0)
    assert not torch.equal(model.head.weight, saved["head.weight"])
    assert not any(p.requires_grad for p in model.backbone.parameters())
    rows = Ledger(tmp_path / "scores").table()
    assert len(set(rows["id"].to_pylist())) == rows.num_rows == 1097
    assert "test/accuracy" in trainer.callback_metrics


def test_the_reference_is_readable_without_running_code(tmp_path):
    saved = torch.load(reference(tmp_path), weights_only=True)
    assert "pytorch-lightning_version" in saved


def test_a_list_of_parameters_can_be_said(tmp_path):
    callback = instantiate(composed(tmp_path, "mimic.parameters=[head.weight,head.bias]").mimic)
    assert isinstance(callback, GradMimic)
    assert callback.settings.parameters == ["head.weight", "head.bias"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_for_scoring(experiment, tmp_path):
    config = composed(tmp_path, f"experiment={experiment}", *SCORE, root="score")
    assert config.checkpoints == ["a.ckpt"]
    assert instantiate(config.data).train == {"digits_reference": "trusted"}.get(experiment, "noisy")


def test_what_a_command_cannot_do_without_is_missing_until_it_is_said(tmp_path):
    needed = {"train": set(), "score": {"checkpoints", "ledger"}, "curate": {"ledger"}}
    needed |= {"select": {"recipe", "out"}, "compare": {"manifests"}, "make_shards": set()}
    needed |= {"partition": {"ledger"}, "summarise": {"partitioned"}, "report": {"manifest"}}
    for root in ROOTS:
        assert OmegaConf.missing_keys(composed(tmp_path, root=root)) == needed[root], root


def run(folder: Path, *words: str, module: str = "train") -> str:
    """What a command prints, in a process of its own."""
    name, _, function = module.partition(":")
    call = f"import sys, lightning_mimic.cli.{name} as m; sys.argv[0] = 'mimic'; m.{function}()"
    how = ["-c", call] if function else ["-m", f"lightning_mimic.cli.{name}"]
    command = [sys.executable, *how, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """What a command prints, in this process."""

    def runs(*words: str, module: str = "train") -> str:
        name, _, function = module.partition(":")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mimic", *words])
        command = getattr(importlib.import_module(f"lightning_mimic.cli.{name}"), function or "main")
        with contextlib.suppress(SystemExit) if words == ("--help",) else contextlib.nullcontext():
            command()
        return capsys.readouterr().out

    return runs


@pytest.mark.slow
def test_two_processes_by_the_command_line(run_here, tmp_path):
    small = ["trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    run_here("experiment=digits_reference", *small, "hydra/job_logging=none", "hydra/hydra_logging=none")
    assert (tmp_path / "outputs" / "digits_reference.ckpt").exists()
    two = ["trainer=ddp", "trainer.devices=2", "test=false"]
    run(tmp_path, "experiment=digits_noisy", *two, *small)
    (folder,) = (tmp_path / "outputs" / "digits_noisy").iterdir()  # one for both
    rows = Ledger(folder / "scores").table()
    assert set(rows["rank"].to_pylist()) == {0, 1}
    assert rows.num_rows == len(set(rows["id"].to_pylist())) == 1097  # the sampler's padding left out


@pytest.mark.slow
def test_the_wheel_carries_code_and_configuration(tmp_path):
    # From a copy: a build leaves its folder behind, and the next wheel would carry what was removed since.
    source = tmp_path / "source"
    for name in ("lightning_mimic", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"lightning_mimic/conf/{p.relative_to(CONF)}" for p in CONF.rglob("*.yaml")} <= names
    assert {p.relative_to(ROOT).as_posix() for p in ROOT.glob("lightning_mimic/**/*.py")} <= names
    assert "lightning_mimic/py.typed" in names
    # From the unpacked wheel alone, outside the checkout.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv = ['mimic-train', '--cfg', 'job']\n"
    code += "import lightning_mimic.cli.train as t; assert 'site' in t.__file__; t.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "DigitsDataModule" in done.stdout, done.stderr[-2000:]


def test_lightning_is_the_package_that_the_configuration_means(tmp_path):
    assert isinstance(instantiate(composed(tmp_path, *QUIET).trainer), L.Trainer)
