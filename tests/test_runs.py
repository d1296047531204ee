"""What a run leaves, where it leaves it, and what it says at its end."""

import importlib
import logging
import os
import shlex
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_mimic import Ledger
from lightning_mimic.callbacks import SuspiciousImages
from lightning_mimic.cli import follow_up
from lightning_mimic.cli.errors import check_inputs_exist
from lightning_mimic.cli.next_command import new_path, setting, shared_words, shell_line
from lightning_mimic.cli.run_folder import KeepEarlierRun, new_run_folder
from lightning_mimic.cli.saved_model import SETTINGS, model_file, settings_of_model
from lightning_mimic.cli.summary import logged_run
from lightning_mimic.cli.training import train
from lightning_mimic.errors import MimicError
from lightning_mimic.manifest import Manifest
from support.configs import QUIET, composed

MAINS = {"mimic-train": "train:main", "mimic-curate": "curate:curate_main", "mimic-report": "report:main"}
MAINS |= {"mimic-select": "curate:select_main", "mimic-score": "score:main"}
FAST = ["trainer.enable_progress_bar=false", "test=false"]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a line as a shell would; the function returns the rows of the summary, and all output under ``""``."""
    monkeypatch.chdir(tmp_path)

    def run(line, *more):
        program, *words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *words, *more])
        module, _, function = MAINS[program].partition(":")
        getattr(importlib.import_module(f"lightning_mimic.cli.{module}"), function)()
        text = capfd.readouterr().out
        rows = [line.split("  ", 1) for line in text.splitlines() if "  " in line.strip()]
        return {"": text} | {row[0]: row[1].strip() for row in rows}

    yield run
    logging.shutdown()


@pytest.mark.slow
def test_every_command_ends_with_the_next_one(run, tmp_path):
    made = run("mimic-train experiment=digits_reference", "trainer.max_epochs=30", *FAST)
    assert made["model"] == "outputs/digits_reference.ckpt"
    place = "it's a run, a=b [1]"
    scored = run(made["next"], setting("hydra.run.dir", place), "trainer.enable_progress_bar=false")
    assert scored["verdict"] == "The reference is compatible."
    folder = Path(scored["ledger"]).parent
    assert folder == Path(place)
    assert 0.8 < float(scored["test accuracy"]) < 1
    log = (tmp_path / scored["log file"]).read_text()
    for said in ("the reference is compatible", "mimic-curate", "`max_epochs=10` reached"):
        # The log file adds time and origin; the terminal shows the same, once.
        assert scored[""].count(said) == log.count(said) == 1
    assert all("=" not in path.name for path in (tmp_path / scored["checkpoints"]).iterdir())
    assert OmegaConf.load(scored["configuration"]).data.noise.rate == 0.4
    decided = run(scored["next"])
    page = run(decided["next"])
    assert Path(page["page"]).parent == folder / "report"
    assert Path(page["page"]).read_text().count("data:image/") > 100
    assert page["next"] == decided["then"]
    last = run(page["next"], *FAST)
    assert Path(last["ledger"]).parent.parent == Path("outputs/digits_noisy")
    rows = Ledger(last["ledger"]).table()
    kept = sum(Manifest(folder / "curated" / "manifest.parquet").table()["keep"].to_pylist())
    assert len(set(rows["id"].to_pylist())) == kept < 1097
    again = run(decided["next"])
    assert "an earlier page of this name was replaced" in again[""]
    run(last["next"])
    recipe = f"{Path(last['ledger']).parent}/curated/manifest.parquet:score top 50%"
    chosen = run(shell_line("mimic-select", setting("recipe", recipe), "out=half.parquet"))
    words = shlex.split(chosen["then"])
    assert words[:2] == ["mimic-train", "experiment=digits_noisy"]
    assert [word for word in words if word.startswith("data.")] == ["data.keep=half.parquet"]


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "a=b",
        "it's",
        "x#1",
        "[x]",
        "{a}",
        "a,b",
        "2024",
        "null",
        "true",
        "x\\",
        "a\\'b",
        "${x}",
        '"q"',
        "",
        " a",
        "é",
    ],
)
def test_hydra_reads_a_setting_as_it_was(text):
    for value in (text, [text, 1], {"k": text}):
        (word,) = shlex.split(shell_line(setting("out", value)))
        read = OverridesParser.create().parse_override(word).value()
        read = OmegaConf.create({"out": getattr(read, "text", read)})
        read = OmegaConf.to_container(read, resolve=True)["out"]
        assert read == value
        assert type(read) is type(value)


def test_words_of_one_run_alone_are_left_out_of_the_next():
    words = ["experiment=a", "mimic.ledger=s", "mimic.temperature=1", "save_to=x", "data/noise=asymmetric", "+data.x=1"]
    assert shared_words(words) == ["experiment=a", "mimic.temperature=1", "data/noise=asymmetric", "+data.x=1"]
    assert shared_words(words, "data.noise", "mimic") == ["experiment=a", "+data.x=1"]


def test_warnings_and_messages_of_lightning_are_logged_as_all_others(caplog):
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(logging.StreamHandler())
    with warnings.catch_warnings(), caplog.at_level(logging.INFO), logged_run():
        warnings.simplefilter("always")
        warnings.warn("a warning", stacklevel=1)
        logger.info("a message")
    assert logger.handlers == []
    assert [record.name for record in caplog.records] == ["py.warnings", "lightning.pytorch"]


def test_a_new_path_is_free(tmp_path):
    assert new_path(tmp_path / "a.ckpt") == tmp_path / "a.ckpt"
    for name in ("a.ckpt", "a-2.ckpt"):
        (tmp_path / name).touch()
    assert new_path(tmp_path / "a.ckpt") == tmp_path / "a-3.ckpt"


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_run_folder, ["digits_noisy"] * 40))
    assert len(set(folders)) == 40
    assert all(Path(each).parent == Path("outputs/digits_noisy") for each in folders)
    assert Path(new_run_folder(None)).parent == Path("outputs/train")
    assert Path(new_run_folder("[paper/digits,paper/reference]")).parent.name == "paper-digits,paper-reference"


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2", "RANK": "1"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}])
def test_processes_of_a_launcher_need_one_folder_for_all(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MimicError, match=r"hydra\.run\.dir=runs/NAME"):
        new_run_folder("digits_noisy")
    assert os.listdir(tmp_path) == []


def test_a_folder_of_an_earlier_run_is_refused(tmp_path, capsys):
    hydra = {"output_subdir": ".hydra", "run": {"dir": str(tmp_path)}}
    config = OmegaConf.create({"hydra": hydra, "resume": None})
    KeepEarlierRun().on_run_start(config)
    (tmp_path / "scores").mkdir()
    with pytest.raises(SystemExit) as ended:
        KeepEarlierRun().on_run_start(config)
    assert "scores is there already, of an earlier run" in str(ended.value.args)
    KeepEarlierRun().on_run_start(OmegaConf.merge(config, {"resume": "a.ckpt"}))
    KeepEarlierRun().on_run_start(OmegaConf.merge(config, {"hydra": {"output_subdir": None}}))  # a further process


@pytest.mark.slow
def test_a_sweep_has_one_folder_with_its_jobs_by_number(run, tmp_path):
    place = "save_to='${hydra:runtime.output_dir}/m.ckpt'"
    run("mimic-train experiment=digits_reference -m seed=1,2", "trainer.max_epochs=1", place, *FAST)
    (folder,) = (tmp_path / "outputs" / "digits_reference").iterdir()
    assert all((folder / number / name).exists() for number in "01" for name in ("m.ckpt", "train.log", ".hydra"))


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "tensorboard", "mlflow", "wandb"])
def test_every_logger_logs(logger, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = {"wandb": ["logger.offline=true"]}.get(logger, [])
    done = run(f"mimic-train data.train=trusted mimic=none trainer.max_epochs=1 logger={logger}", *more, *FAST)
    found = [path for path in (tmp_path / done["logs"]).rglob("*") if path.is_file()]
    name = {"csv": "metrics.csv", "tensorboard": "events.out.", "mlflow": "loss", "wandb": ".wandb"}[logger]
    (first, *_) = [path for path in found if name in path.name]
    assert first.stat().st_size > 0
    if logger == "csv":
        assert "train/loss" in first.read_text()


def test_a_logger_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    config = composed(tmp_path, "experiment=digits_reference", "logger=wandb", "save_to=null")
    with pytest.raises(MimicError, match=r"WandbLogger .*pip install 'lightning-mimic\[loggers\]'"):
        train(config)


def test_mlflow_takes_no_suspicious_images(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    words = ["experiment=digits_scratch", "logger=mlflow", "mimic=grad_norm", "suspicious_images=1"]
    with pytest.raises(MimicError, match=f"{SuspiciousImages.__name__} needs a logger that takes images"):
        train(composed(tmp_path, *words, "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false"))


def saving(folder, *words):
    return composed(folder, "experiment=digits_reference", "trainer.max_epochs=1", "test=false", *QUIET, *words)


def test_save_to_replaces_a_file_of_the_same_settings_alone(tmp_path, caplog):
    path = tmp_path / "reference.ckpt"
    train(saving(tmp_path))
    first = path.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
        train(saving(tmp_path, "paths.output=elsewhere"))
    assert path.stat().st_mtime_ns > first
    assert "reference.ckpt is replaced" in caplog.text
    content = path.read_bytes()
    for words, name in ((["data.train=trusted_fit"], "data.train"), (["seed=1"], "seed")):
        with pytest.raises(MimicError, match=rf"`{name}` was .*Name another file \(save_to=.*reference-2.ckpt"):
            train(saving(tmp_path, *words))
    assert path.read_bytes() == content
    torch.save({"state_dict": {}}, path)
    with pytest.raises(MimicError, match="is there already, of unknown settings"):
        train(saving(tmp_path))


def test_a_resumed_run_replaces_its_own_model(tmp_path):
    train(saving(tmp_path))
    state = torch.load(tmp_path / "reference.ckpt", weights_only=True)
    longer = saving(tmp_path, "trainer.max_epochs=2")
    assert model_file(longer, settings_of_model(longer), state) == (tmp_path / "reference.ckpt", True)
    with pytest.raises(MimicError, match=r"`trainer\.max_epochs` was 1 there and is 2 here"):
        model_file(longer, settings_of_model(longer), {SETTINGS: {"seed": 7}})


CURES = {
    "digits": (["experiment=digits_noisy"], "mimic-train experiment=digits_reference"),
    "no experiment": ([], "mimic-train data.train=trusted mimic=none save_to="),
    "own images": (
        ["data=image_folder", "data.root=my photos"],
        "mimic-train data=image_folder 'data.root=my photos' data.trusted=trusted.csv data.train=trusted mimic=none "
        "save_to=",
    ),
    "own images in an experiment of the digits": (
        ["experiment=digits_noisy", "data=image_folder", "data.root=photos", "data.trusted=0.2"],
        "mimic-train experiment=digits_noisy data=image_folder data.root=photos data.trusted=0.2 model.pretrained=null "
        "data.train=trusted mimic=none save_to=",
    ),
    "another backbone": (
        ["experiment=digits_noisy", "model/backbone=mlp", "mimic.temperature=2", "data.split_seed=3"],
        "mimic-train experiment=digits_reference model/backbone=mlp data.split_seed=3",
    ),
    "pairs": (["data=image_text", "data.shards=a.tar", "model=clip"], "with mimic=none save_to="),
}


@pytest.mark.parametrize("name", CURES)
def test_a_missing_reference_names_the_cure_for_these_data(name, tmp_path, monkeypatch):
    words, cure = CURES[name]
    monkeypatch.setattr(follow_up, "current_words", lambda: words)
    config = composed(tmp_path, *words, *(["mimic.parameters=head"] if "experiment" not in str(words) else []))
    with pytest.raises(MimicError) as raised:
        check_inputs_exist(config)
    message = str(raised.value)
    assert message.startswith(f"`paths.reference`: there is no {tmp_path}/reference.ckpt. ")
    assert cure in message
    assert ("digits" in message) == ("digits" in " ".join(words))
