"""One run of a study: mimic-train or mimic-score, and beside its files the figures that the tables need."""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import hydra
import lightning as L
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_mimic import Ledger
from lightning_mimic.cli.scoring import score
from lightning_mimic.cli.training import train
from lightning_mimic.curation import CurationError, Ensemble, KMeans, Mixture, Sign, Threshold, curate, detect
from lightning_mimic.data.splits import LabelledSplits
from lightning_mimic.models import CLIP, pair_losses
from lightning_mimic.random_streams import torch_generator
from lightning_mimic.reference import read_reference
from scripts.provenance import commit

FILTERS = {
    "sign": Sign(),
    "threshold 1/B": Threshold(),
    "k-means": KMeans(),
    "mixture": Mixture(),
    "label model of the last three": Ensemble([Threshold(), KMeans(), Mixture()]),
}

OmegaConf.register_new_resolver("add", lambda a, b: int(a) + int(b), replace=True)


@hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run, unless an earlier sweep has done this run.

    What is asked for beside mimic-train's own settings stands under ``study``:

    * ``phase``: of the study; where it chooses, the test split cannot be read.
    * ``each_epoch``: evaluate after every epoch, and not only after the last.
    * ``filters``: ``all``; else the sign alone decides what is found.
    * ``truth``: a Parquet file with ``id`` and ``mismatched``, of image-text pairs.
    * ``noise``, ``noise_on``: standard deviations of noise on the reference's tensors whose names begin so.
    * ``scored``, ``pick``, ``fraction``: train on a part of the samples that a ledger ranks first, or on as many drawn
      at random.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = folder / "result.json"
    if result.exists():
        return
    silence()
    study = OmegaConf.to_container(config.study, resolve=True)
    for left in ("scores", "epochs"):  # of a run that was broken off
        shutil.rmtree(folder / left, ignore_errors=True)
    if "checkpoints" in config:
        shutil.rmtree(config.ledger, ignore_errors=True)
        score(config)
        write_result(result, {"ledger": str(config.ledger)})
        return
    if "pick" in study:
        config.data.keep = str(picked(config.seed, study, folder / "manifest.parquet"))
    if "noise" in study:
        config.paths.reference = str(corrupted(config.paths.reference, config.seed, study, folder / "reference.pt"))
    config.test = False  # whose table would be one of hundreds
    watch = Watch(study["phase"], study.get("each_epoch", False))
    trainer = train(config, [watch])
    write_result(result, watch.figures(trainer) | scored(trainer, folder, study))


def write_result(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a run and the commit of its code; whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**figures, "commit": commit()}))
    unfinished.rename(path)


def silence() -> None:
    """Keep other packages' notes out of the tables."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if (threads := os.environ.get("OMP_NUM_THREADS")) is not None:
        torch.set_num_threads(int(threads))


def seal(data: L.LightningDataModule) -> None:
    """Refuse the test split from here on; a choice may not rest on it."""

    def refuse(*arguments: object) -> NoReturn:
        raise RuntimeError("the test split was asked for while the study chooses; a choice may rest on validation data")

    data.test_dataloader = refuse  # type: ignore[method-assign]
    below = getattr(data, "data", data)  # of cached features
    for each in (below, getattr(below, "zero_shot", None)):
        if isinstance(each, LabelledSplits):
            each.test_dataloader = refuse  # type: ignore[method-assign]
            each.rows.pop("test", None)


class Watch(L.Callback):
    """Evaluates on validation data while a study chooses, and on test data when it reports.

    Args:
        phase: ``"choose"`` or ``"report"``.
        each_epoch: After every epoch of a run on one device; else after the last.
    """

    def __init__(self, phase: str, each_epoch: bool) -> None:
        self.phase, self.each_epoch = phase, each_epoch
        self.curves: dict[str, list[float]] = {}
        self.start = ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.phase == "choose":
            seal(trainer.datamodule)
        bytes_of = (tensor.detach().cpu().numpy().tobytes() for tensor in pl_module.parameters())
        self.start = hashlib.sha256(b"".join(bytes_of)).hexdigest()

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.each_epoch:
            return
        pl_module.eval()
        held, images = (trainer.datamodule.val_dataloader(), self._loader(trainer.datamodule))
        if isinstance(pl_module, CLIP):
            classes, images = pl_module.zero_shot.weights(pl_module), images[1]
            pairs = [torch.cat(parts) for parts in zip(*held[0], strict=True)]
            embedded = pl_module.encode_image(pairs[0], normalize=True), pl_module.encode_text(pairs[1])
            self._add("held_loss", float(pair_losses(*embedded, pl_module.scale).mean()))
            logits = ((pl_module.encode_image(batch[0], normalize=True) @ classes, batch[1]) for batch in images)
        else:
            logits = ((pl_module(batch[0]), batch[1]) for batch in images)
        right = torch.cat([each.argmax(1) == labels for each, labels in logits])
        self._add("accuracy", float(right.float().mean()))
        self._add("steps", trainer.global_step)
        pl_module.train()

    def figures(self, trainer: L.Trainer) -> dict[str, Any]:
        """Of the last epoch, of the best, and the curves."""
        if not self.each_epoch:
            evaluate = trainer.validate if self.phase == "choose" else trainer.test
            split = "val" if self.phase == "choose" else "test"
            (metrics,) = evaluate(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
            self._add("accuracy", metrics[f"{split}/accuracy"])
        accuracy = self.curves["accuracy"]
        return {"accuracy": accuracy[-1], "best_accuracy": max(accuracy), "curves": self.curves, "start": self.start}

    def _loader(self, data: L.LightningDataModule) -> Any:
        return data.val_dataloader() if self.phase == "choose" else data.test_dataloader()

    def _add(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(value)


def picked(seed: int, study: Mapping[str, Any], path: Path) -> Path:
    """Keeps a fraction of the scored samples: those of the highest mean scores, or as many drawn at random."""
    table = mean_scores(Ledger(study["scored"])).sort_by([("score", "descending"), ("id", "ascending")])
    keep = torch.arange(table.num_rows) < round(study["fraction"] * table.num_rows)
    if study["pick"] == "random":
        keep = keep[torch.randperm(len(keep), generator=torch_generator(seed, "random selection"))]
    pq.write_table(pa.table({"id": table["id"], "keep": keep.tolist()}), path)
    return path


def corrupted(reference: str, seed: int, study: Mapping[str, Any], path: Path) -> Path:
    """The reference with noise on its weights, in units of each tensor's standard deviation."""
    tensors, drawn = read_reference(reference), torch_generator(seed, "reference noise")
    for name, tensor in tensors.items():
        if name.startswith(study.get("noise_on", "")):
            tensors[name] = tensor + study["noise"] * tensor.std() * torch.randn(tensor.shape, generator=drawn)
    torch.save(tensors, path)
    return path


def scored(trainer: L.Trainer, folder: Path, study: Mapping[str, Any]) -> dict[str, Any]:
    """Of a scored run: what its scores find, how many samples had a say, and what was said of the reference."""
    if not (folder / "scores").exists():
        return {}
    ledger = Ledger(folder / "scores")
    diagnosis = ledger.meta["attempts"][-1].get("diagnosis") or {}
    found: dict[str, Any] = {"ess": effective_share(ledger), "verdict": diagnosis.get("verdict"), "filters": {}}
    wrong = wrong_ids(trainer.datamodule, study)
    # Not by `curate`, which refuses an unrelated reference, and a scorer whose sign means nothing: here that is shown.
    found["filters"]["sign"] = judged(by_sign(mean_scores(ledger)), wrong)
    for name in [*FILTERS][1:] if study.get("filters") == "all" else ():
        try:
            table = curate(folder / "scores", FILTERS[name], unscored="keep", accept_verdict=True).manifest.table()
        except CurationError as error:  # an unrelated reference, a label model whose voters all say the same
            found["filters"][name] = {"refused": str(error)}
            continue
        found["filters"][name] = judged(table, wrong)
    rows = ledger.table()
    first = rows.filter(pc.equal(rows["epoch"], pc.min(rows["epoch"])))
    found["first_auroc"] = judged(by_sign(first), wrong).get("auroc")
    found["auroc"] = found["filters"]["sign"].get("auroc")
    return found


def mean_scores(ledger: Ledger) -> pa.Table:
    """Each sample's mean score, whatever the verdict on the reference."""
    rows = ledger.table()
    rows = rows.filter(pc.is_valid(rows["score"]))
    return rows.group_by("id").aggregate([("score", "mean")]).rename_columns(["id", "score"])


def by_sign(rows: pa.Table) -> pa.Table:
    """Rows with a score, kept where it is 0 or more."""
    return rows.append_column("keep", pc.greater_equal(rows["score"], 0))


def judged(table: pa.Table, wrong: set[Any]) -> dict[str, float]:
    """Shares, and how well a decision and its scores find what is wrong; before a reference is aligned, no scores."""
    table = table.filter(pc.is_valid(table["score"]))
    if not table.num_rows:  # a reference that was not aligned before the epoch's end
        return {}
    mask = torch.tensor([each in wrong for each in table["id"].to_pylist()])
    kept, scores = torch.tensor(table["keep"].to_pylist()), torch.tensor(table["score"].to_pylist())
    shares = {"share_kept": float(kept.float().mean()), "share_right": float((~mask).float().mean())}
    return shares | asdict(detect(scores, ~kept, mask)) if mask.any() and not mask.all() else shares


def wrong_ids(data: Any, study: Mapping[str, Any]) -> set[Any]:
    """The samples whose labels are wrong, or the pairs that do not match."""
    if "truth" in study:
        rows = pq.read_table(study["truth"])
        return set(rows.filter(rows["mismatched"])["id"].to_pylist())
    data = getattr(data, "data", data)  # below cached features
    ids = data.sources["train"].ids or range(len(data.sources["train"].labels))
    return {ids[row] for row in data.noisy_ids[data.wrong].tolist()}


def effective_share(ledger: Ledger) -> float:
    """Mean over the batches of ``1/Σw²``, over their size."""
    rows = ledger.table()
    rows = rows.append_column("square", pc.power(rows["weight"], 2))
    sums = rows.group_by(["attempt", "epoch", "batch"]).aggregate([("square", "sum"), ("batch_size", "max")])
    # A batch of which nothing is kept has no say at all.
    squares, sizes = (torch.tensor(sums[name].to_pylist()) for name in ("square_sum", "batch_size_max"))
    return float(torch.where(squares > 0, 1 / squares.clamp(min=1e-12) / sizes, 0.0).mean())
