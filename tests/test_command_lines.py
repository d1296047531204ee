"""What the words of a command line mean, and how the commands end where they cannot be followed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_mimic.cli.arguments import arranged, settle
from lightning_mimic.cli.command import command
from lightning_mimic.cli.curate import compare_main, curate_main, select_main
from lightning_mimic.cli.help import conf_folder, help_text, version_text
from lightning_mimic.cli.make_shards import main as make_shards
from lightning_mimic.cli.report import main as report
from lightning_mimic.cli.score import main as score
from lightning_mimic.cli.settings import check_types
from lightning_mimic.cli.train import main as train
from lightning_mimic.cli.training import train_and_measure
from lightning_mimic.errors import MimicError
from lightning_mimic.version import __version__
from support.configs import QUIET, composed
from support.ledgers import write_scores

PATHS = ["a/epoch=0-step=35.ckpt", "run[1]/x.ckpt", "é/x#1.ckpt", "it's=a.ckpt", "~/a=b.ckpt", "two words=1", "{a}=b"]


def value_of(word):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_taken_as_it_is(path):
    (word,) = arranged([f"resume={path}"])
    assert str(value_of(word)) == path
    assert arranged([word]) == [word]  # for the processes that are started by it


def test_paths_in_a_list_are_taken_as_they_are():
    (word,) = arranged(["checkpoints=[a/epoch=0-step=35.ckpt,last.ckpt]"])
    assert [str(each) for each in value_of(word)] == ["a/epoch=0-step=35.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    "word", ["a=1", "a=[1,2]", "a={b:1}", "a=${oc.env:X}", "~a", "+a=b", "a=1,2", "--cfg", "a='x=1'"]
)
def test_other_words_are_left_alone(word):
    assert arranged([word]) == [word]


def test_a_sweep_comes_first_and_its_paths_are_apart():
    words = arranged(["resume=a=1.ckpt,b=2.ckpt", "--multirun"])
    assert words == ["--multirun", "resume='a=1.ckpt','b=2.ckpt'"]


@pytest.mark.parametrize(
    ("text", "value"), [("16", 16), ("5e-1", 0.5), ("-1.", -1.0), ("true", True), ("0004", "0004"), ("a", "a")]
)
def test_the_environment_gives_numbers(text, value, monkeypatch):
    monkeypatch.setenv("VALUE", text)
    config = OmegaConf.create({"a": {"b": ["${oc.env:VALUE}"]}, "ledger": "${oc.env:VALUE}", "at": "x/${oc.env:VALUE}"})
    settle(config)
    assert config == {"a": {"b": [value]}, "ledger": text, "at": f"x/{text}"}
    assert type(config.a.b[0]) is type(value)


TARGETS = {"net": "torch.nn.Linear", "data": "lightning_mimic.data.digits.DigitsDataModule"}
TARGETS |= {"mimic": "lightning_mimic.GradMimic", "trainer": "lightning.Trainer"}
TARGETS |= {"filter": "lightning_mimic.curation.Ensemble"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("net.bias", "no"),
        ("net.in_features", 1.5),
        ("net.in_features", True),
        ("net.in_features", None),
        ("data.batch_size", "abc"),
        ("data.noise", "nope"),
        ("mimic.temperature", True),
        ("mimic.temperature", [1]),
        ("mimic.parameters", [1, 2]),
        ("mimic.ledger", ["a"]),
        ("trainer.limit_val_batches", "abc"),
        ("seed", 2**32),
        ("seed", -1),
        ("test", "off"),
        ("optimized_metric", True),
        ("checkpoints", [None]),
        ("filter.filters", ["sign"]),
    ],
)
def test_a_value_of_another_type_is_refused(place, value):
    config = OmegaConf.create({name: {"_target_": target} for name, target in TARGETS.items()})
    OmegaConf.update(config, place, value)
    with pytest.raises(MimicError, match=f"^`{place}` is .*; expected "):
        check_types(config)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("net.bias", False),
        ("data.noise", None),
        ("data.noise", {"_target_": "lightning_mimic.data.noise.SymmetricNoise"}),
        ("mimic.temperature", 1),
        ("mimic.parameters", ["head", "!body"]),
        ("mimic.parameters", "all"),
        ("mimic.reference", "a.ckpt"),
        ("trainer.devices", [0, 1]),
        ("trainer.limit_val_batches", 0.5),
        ("trainer.strategy", "ddp"),
        ("data.seed", "???"),
        ("checkpoints", ["a.ckpt"]),
        ("filter.filters", [{"_target_": "lightning_mimic.curation.Sign"}]),
        ("nowhere", {"_target_": "no.such.Thing", "size": "abc"}),
    ],
)
def test_values_that_fit_are_left_alone(place, value):
    config = OmegaConf.create({name: {"_target_": target} for name, target in TARGETS.items()})
    OmegaConf.update(config, place, value)
    check_types(config)


ENDS = {
    "an option": (
        train,
        ["experiment=digits_nosy"],
        "`experiment=digits_nosy`: experiment has no option 'digits_nosy'; nearest: 'digits_noisy'",
    ),
    "a group": (train, ["experimnt=digits_noisy"], "no setting 'experimnt'; nearest: 'experiment'"),
    "a plus": (train, ["+experiment=digits_noisy"], "Multiple values for experiment; leave out the '+'"),
    "a setting": (train, ["mimic.temprature=1"], "`mimic` has no setting 'temprature'; nearest: 'temperature'"),
    "the environment": (train, ["seed=${oc.env:NOT_THERE}"], "Environment variable 'NOT_THERE' not found"),
    "a checkpoint": (train, ["experiment=digits_reference", "resume=a=1.ckpt"], "`resume`: there is no file a=1.ckpt"),
    "a damaged checkpoint": (
        train,
        ["experiment=digits_reference", "resume=damaged.ckpt"],
        "does not fit its checksum",
    ),
    "a model in the place of a run": (
        train,
        ["experiment=digits_reference", "resume=model.ckpt"],
        "`resume`: model.ckpt holds no run to go on from",
    ),
    "code in a checkpoint": (
        train,
        ["experiment=digits_reference", "resume=code.ckpt"],
        "holds Python objects besides tensors",
    ),
    "another run's checkpoint": (
        train,
        ["experiment=digits_reference", "resume=run.ckpt"],
        "`resume`: run.ckpt is of a run that trained another model: ",
    ),
    "a directory for a model": (train, ["experiment=digits_reference", "save_to=."], "`save_to`: . is there and is no"),
    "a link for a model": (train, ["experiment=digits_reference", "save_to=link.ckpt"], "is no regular file"),
    "no for false": (
        train,
        ["experiment=digits_reference", "data.augment=no"],
        "`data.augment` is 'no'; expected true or false",
    ),
    "a word for a number": (
        train,
        ["experiment=digits_reference", "trainer.max_epochs=abc"],
        "`trainer.max_epochs` is 'abc'; expected a whole number or null",
    ),
    "no steps": (train, ["experiment=digits_reference", "trainer.accumulate_grad_batches=0"], "is 0; expected 1"),
    "a learning rate": (train, ["experiment=digits_reference", "model.optimizer.lr=-1"], "Invalid learning rate: -1"),
    "a missing path": (train, ["experiment=digits_noisy", "paths.reference=null"], "`paths.reference` is None"),
    "Hydra's folder": (train, ["experiment=digits_reference", "hydra.run.dir=/proc/none"], "/proc/none"),
    "Hydra's flag": (train, ["--resolve"], "--resolve flag"),
    "a word": (train, ["foo"], "'foo' is no setting; "),
    "a value": (train, ["mimic=none", "model.pretrained=null", "data.train=nosy"], "`train` is 'nosy'"),
    "another command": (curate_main, ["ledgr=x"], "no setting 'ledgr'; nearest: 'ledger'"),
    "a command's name": (train, ["digits_noisy"], "'digits_noisy' is an experiment; type: mimic-train experiment="),
    "dashes": (train, ["--experiment", "digits_noisy"], "without dashes: mimic-train experiment=digits_noisy"),
    "dashes and a group": (train, ["--max-epochs", "3"], "without dashes: mimic-train trainer.max_epochs=3"),
    "dashes and a value": (curate_main, ["--ledger=x"], "without dashes: mimic-curate ledger=x"),
    "an unknown flag": (train, ["--fast"], "there is no flag '--fast'"),
    "blanks": (train, ["experiment", "=", "digits_noisy"], "without spaces; type: mimic-train experiment=digits_noisy"),
    "a blank": (train, ["experiment=", "digits_noisy"], "type: mimic-train experiment=digits_noisy"),
    "a blank in front": (train, ["=digits_noisy"], "begins with '='"),
    "a group alone": (train, ["model"], "'model' needs a value"),
    "an option in a folder": (train, ["experiment=paper/dtdd"], "no option 'paper/dtdd'; nearest: 'paper/dtd'"),
    "a group in a group": (train, ["data/noise=symetric"], "data/noise has no option 'symetric'; nearest: 'symmetric'"),
    "a deep setting": (train, ["data.noise.rte=1"], "`data.noise` has no setting 'rte'; nearest: 'rate'"),
    "an added argument": (train, ["experiment=digits_reference", "+trainer.foo=1"], "`trainer` cannot be built: "),
    "a device": (train, ["experiment=digits_reference", "trainer.accelerator=tpu"], "`trainer` cannot be built: "),
    "a quote": (train, ["'a=b"], "cannot be read as NAME=VALUE"),
    "nothing for what is required": (curate_main, [], "`ledger` is missing"),
    "a ledger that is not there": (curate_main, ["nothere"], "nothere holds no ledger"),
    "a filter": (curate_main, ["x", "filter=postrior"], "filter has no option 'postrior'; nearest: 'posterior'"),
    "an export": (curate_main, ["x", "exports=[cvs]"], "nearest: 'csv'"),
    "a table that is not there": (select_main, ["a.csv", "out=x.parquet"], "a.csv is not there"),
    "a word too many": (compare_main, ["a", "b"], "'a' is no setting"),
    "a manifest that is not there": (report, ["nothere"], "nothere is no manifest"),
    "a folder": (make_shards, ["out=/proc/none/shards"], "/proc/none"),
    "no ledger": (score, ["experiment=digits_curation", "checkpoints=x", "ledger=null"], "`ledger` is None; expected"),
    "no folder": (make_shards, ["out=null"], "`out` is None; expected a path"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_mistake_ends_with_one_line(name, tmp_path, monkeypatch, capsys):
    main, words, said = ENDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    folder = [] if "hydra.run.dir" in str(words) else [f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["mimic", *words, *folder])
    torch.save({"weight": torch.ones(1)}, tmp_path / "model.ckpt")
    torch.save({"state_dict": {}, "code": torch.nn.ReLU()}, tmp_path / "code.ckpt")
    (tmp_path / "link.ckpt").symlink_to("elsewhere.ckpt")
    run = {"state_dict": {"weight": torch.ones(1)}, "loops": {}, "optimizer_states": [{"param_groups": []}]}
    torch.save(run, tmp_path / "run.ckpt")
    torch.save({"state_dict": {"weight": torch.ones(999)}}, tmp_path / "damaged.ckpt")
    content = bytearray((tmp_path / "damaged.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in str(ended.value)
    assert capsys.readouterr().err.splitlines()[-1] == str(ended.value)


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    @command("mimic-select", "select")
    def main(config):
        raise TypeError("two values")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mimic-select", "recipe=a", "out=b"])
    with pytest.raises(TypeError, match="two values"):
        main()


ENDED_BY = {
    "Ctrl-C": (KeyboardInterrupt, 130, "mimic-select: interrupted; what was recorded until now is kept.\n"),
    "a closed pipe": (BrokenPipeError, 141, ""),
    "a full disk": (OSError(28, "No space left on device"), 2, "mimic-select: [Errno 28] No space left on device\n"),
    "a package": (ModuleNotFoundError("no", name="duckdb"), 2, "duckdb is not installed; it comes with: pip install"),
}


@pytest.mark.parametrize("name", ENDED_BY)
def test_a_command_that_is_ended_says_why(name, monkeypatch, tmp_path, capfd):
    error, status, said = ENDED_BY[name]

    @command("mimic-select", "select")
    def main(config):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mimic-select", "recipe=a", "out=b"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # pytest's own stdout stays open
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert said in capfd.readouterr().err


def test_ctrl_c_in_the_trainer_is_an_interruption_too(monkeypatch, tmp_path):
    @command("mimic-select", "select")
    def main(config):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning's trainer does

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mimic-select", "recipe=a", "out=b"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


@pytest.mark.slow
def test_ctrl_c_while_something_is_imported_ends_at_once():
    code = "import contextlib, signal, sys\nfrom lightning_mimic.cli.errors import quits_at_once\n"
    code += "with quits_at_once('mimic-x'), contextlib.suppress(BaseException): signal.raise_signal(signal.SIGINT)\n"
    code += "sys.exit(7)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "mimic-x: interrupted; nothing was done yet.\n")


HELP = Path(__file__).parent / "data" / "help"


@pytest.mark.parametrize("root", sorted(path.stem for path in conf_folder().glob("*.yaml")))
def test_help_is_as_recorded(root):
    recorded = HELP / f"{root}.txt"
    assert help_of(root) == recorded.read_text(), "after a change that is meant: python tests/test_command_lines.py"


def help_of(root):
    return help_text(f"mimic-{root.replace('_', '-')}", root) + "\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["experiment=digits_noisy", "--help"]])
def test_help_is_shown_however_it_is_asked_for(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mimic-train", *words])
    train()
    assert capsys.readouterr().out == help_of("train")


def test_the_version_is_the_packages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mimic-train", "--version"])
    train()
    said = capsys.readouterr().out.strip()
    assert said == version_text()
    assert said.startswith(f"lightning_mimic {__version__} (Python 3.")
    assert f"torch {torch.__version__.partition('+')[0]}" in said


WITHOUT_TORCH = """
import sys
from importlib import import_module
for module, function, *words in {calls!r}:
    sys.argv = ["mimic", *words]
    try:
        getattr(import_module(f"lightning_mimic.cli.{{module}}"), function)()
    except SystemExit as ended:
        assert ended.code == 2, ended
    loaded = {{"torch", "lightning", "pytorch_lightning"}} & set(sys.modules)
    assert not loaded, (module, words, loaded)
"""


@pytest.mark.slow
def test_help_mistakes_and_curation_do_without_torch(tmp_path):
    write_scores(tmp_path / "scores", [1.0, -1.0, 2.0])
    modules = {"train": "main", "score": "main", "make_shards": "main", "report": "main", "curate": "select_main"}
    calls = [(module, function, "--help") for module, function in modules.items()]
    calls += [("train", "main", "digits_noisy"), ("train", "main", "experiment=digits_nosy")]
    calls += [
        ("curate", "curate_main", "scores", "exports=[csv]"),
        ("curate", "curate_main", "scores", "filter=gmm", "out=gmm"),
        ("curate", "partition_main", "scores", "out=parts", "partitions=1"),
        ("curate", "summarise_main", "parts", "partition=0"),
        ("curate", "curate_main", "scores", "partitioned=parts", "out=shared"),
        ("curate", "select_main", "curated/manifest.parquet", "out=best.parquet"),
        ("curate", "compare_main", "manifests={a: curated/manifest.parquet, b: best.parquet}"),
        ("report", "main", "curated"),
    ]
    code = WITHOUT_TORCH.format(calls=calls)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_no_training_step_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = ["trainer.enable_progress_bar=false", "logger=none", "test=false", "trainer.enable_checkpointing=false"]
    words = ["experiment=digits_reference", "trainer.max_epochs=0", "hydra.run.dir=run", *quiet]
    monkeypatch.setattr(sys, "argv", ["mimic-train", *words])
    with pytest.raises(SystemExit, match="no training step was done, so there is no trained model"):
        train()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_sweeper_gets_the_figure_that_it_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=digits_reference", "trainer.max_epochs=1", "save_to=model.ckpt", *QUIET]
    returned = train_and_measure(composed(tmp_path, *words, "optimized_metric=train/accuracy"))
    assert isinstance(returned, float)
    assert 0 < returned <= 1
    # The same as without it, where nothing is returned.
    assert train_and_measure(composed(tmp_path, *words, "save_to=other.ckpt")) is None
    with pytest.raises(
        MimicError, match="`optimized_metric`: 'train/acuracy' was not logged; nearest: 'train/accuracy'"
    ):
        train_and_measure(composed(tmp_path, *words, "save_to=third.ckpt", "optimized_metric=train/acuracy"))


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for each in conf_folder().glob("*.yaml"):
        (HELP / f"{each.stem}.txt").write_text(help_of(each.stem))
