"""What the words of a command line mean, and how the commands end where they cannot be followed."""

import sys

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_mimic.cli.arguments import arranged, settle
from lightning_mimic.cli.curate import curate_main
from lightning_mimic.cli.make_shards import main as make_shards
from lightning_mimic.cli.score import main as score
from lightning_mimic.cli.settings import check_types
from lightning_mimic.cli.train import main as train
from lightning_mimic.errors import MimicError
from support.configs import QUIET, composed

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
        "'experiment/digits_nosy'; nearest: 'digits_noisy'",
    ),
    "a group": (train, ["experimnt=digits_noisy"], "Could not override 'experimnt'; nearest: 'experiment'"),
    "a plus": (train, ["+experiment=digits_noisy"], "Multiple values for experiment; leave out the '+'"),
    "a setting": (train, ["mimic.temprature=1"], "Could not override 'mimic.temprature'; nearest: 'temperature'"),
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
    "a word": (train, ["foo"], "Error parsing override 'foo'"),
    "a value": (train, ["mimic=none", "model.pretrained=null", "data.train=nosy"], "`train` is 'nosy'"),
    "another command": (curate_main, ["ledgr=x"], "Could not override 'ledgr'; nearest: 'ledger'"),
    "a folder": (make_shards, ["out=/proc/none/shards"], "/proc/none"),
    "no ledger": (score, ["experiment=digits_curation", "checkpoints=x", "ledger=null"], "`ledger` is None; expected"),
    "no folder": (make_shards, ["out=null"], "`out` is None; expected a path"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_mistake_ends_with_one_line(name, tmp_path, monkeypatch):
    main, words, said = ENDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["mimic", f"hydra.run.dir={tmp_path}/run", *words])
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
    assert isinstance(ended.value.code, str)
    assert said in ended.value.code
    assert "\n" not in ended.value.code


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
    returned = train.__wrapped__(composed(tmp_path, *words, "optimized_metric=train/accuracy"))
    assert isinstance(returned, float)
    assert 0 < returned <= 1
    # The same as without it, where nothing is returned.
    assert train.__wrapped__(composed(tmp_path, *words, "save_to=other.ckpt")) is None
    with pytest.raises(
        MimicError, match="`optimized_metric`: 'train/acuracy' was not logged; nearest: 'train/accuracy'"
    ):
        train.__wrapped__(composed(tmp_path, *words, "save_to=third.ckpt", "optimized_metric=train/acuracy"))
