"""The paper's experiments: official settings, and the two runs of each, reference and probe."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_mimic import Ledger
from lightning_mimic.cli.training import train
from lightning_mimic.data.torchvision_sets import SETS
from lightning_mimic.models import timm_backbone
from lightning_mimic.scorers import MimicScore
from support.configs import CONF, QUIET, SCORE, composed
from support.image_sets import write_set

SETS_OF_PAPER = sorted(p.stem for p in (CONF / "experiment" / "paper").glob("*.yaml") if p.stem in SETS)
SMALL = [
    "model.backbone.name=test_vit",
    "model.backbone.weights=null",
]
SMALL += ["data.transform.size=160", "data.num_workers=0", "trainer.max_epochs=1", "test=false", *QUIET]


@pytest.mark.parametrize("name", SETS_OF_PAPER)
def test_all_six_have_the_official_settings(name, tmp_path):
    config = composed(tmp_path, f"experiment=paper/{name}")
    assert (config.model.optimizer.lr, config.model.optimizer.weight_decay) == (1e-4, 1e-5)
    assert config.model.optimizer._target_ == "torch.optim.AdamW"
    assert (config.data.batch_size, config.data.flip, config.data.train) == (32, True, "noisy")
    assert config.trainer.max_epochs == (10 if name in ("dtd", "flowers102") else 5)
    assert (config.data.name, config.data.trusted, config.model.freeze_backbone) == (name, 0.0, True)
    mimic = instantiate(config.mimic)
    assert isinstance(mimic.settings.make_scores, MimicScore)
    weighting = mimic.settings.make_weights
    assert (weighting.temperature, weighting.min_ess, mimic.settings.reweight) == (1.0, 0.0, "target")
    transform = instantiate(config.data.transform)
    assert "mean=[0.5], std=[0.5]" in repr(transform)
    assert "224" in repr(transform)
    assert composed(tmp_path, f"experiment=paper/{name}", *SCORE, root="score").checkpoints == ["a.ckpt"]


def test_all_six_are_there():
    assert sorted(SETS) == SETS_OF_PAPER


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("cifar10", "seen"), ("dtd", "trusted_split")])
def test_a_reference_is_made_and_given_to_a_probe_of_another_seed(name, kind, tmp_path, monkeypatch):
    write_set(name, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    common = [f"reference={kind}", f"data.root={tmp_path}", f"paths.paper={tmp_path}", *SMALL, "paths.output=run"]
    torch.save(timm_backbone("test_vit").state_dict(), "published.pt")
    common += ["features=features", "model.pretrained=published.pt"]
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        made = compose("train", overrides=[f"experiment=[paper/{name},paper/reference]", *common])
        probe = compose("train", overrides=[f"experiment=paper/{name}", *common, "data.noise.rate=0.4"])
    assert (made.seed, probe.seed, made.data.noise.rate) == (100, 0, 0.0)
    assert made.save_to == probe.mimic.reference == f"{tmp_path}/{kind}.ckpt"
    assert made.data.train == {"seen": "noisy", "trusted_split": "trusted"}[kind]
    words = f"'experiment=[paper/{name},paper/reference]' reference={kind}"
    message = f"`paths.reference`: there is no {tmp_path}/{kind}.ckpt. It is made by: mimic-train {words}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(probe)
    reference = train(made)
    learnt = set(reference.train_dataloader.dataset.ids)
    model = train(probe)
    scored = set(Ledger("run/scores").table()["id"].to_pylist())
    if kind == "seen":
        assert scored == learnt
    else:
        assert not scored & learnt
        assert learnt
        # Of every class enough for the few that influence asks for.
        with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
            asked = compose("train", overrides=[f"experiment=paper/{name}", *common, "mimic=influence"])
        instantiate(asked.mimic)
    assert set(model.datamodule.data.noisy_ids.tolist()) == scored
    assert len(list(Path("features").glob("*.npy"))) == 1  # nothing validates: DTD's val is not read
    heads = [trainer.lightning_module.head.weight for trainer in (reference, model)]
    assert not torch.equal(*heads)
    with pytest.raises(ValueError, match=r"^`model.num_classes` is 7, and that of the data is \d+\. Leave"):
        train(OmegaConf.merge(made, {"model": {"num_classes": 7}, "save_to": None}))
