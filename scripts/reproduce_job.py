"""One run of scripts/reproduce.py: mimic-train, and beside its files the figures that the tables need."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from digits_runs import are_wrong, silence
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_mimic import Ledger
from lightning_mimic.cli.train import train
from lightning_mimic.curation import CurationError, Ensemble, KMeans, Mixture, Sign, Threshold, TopK, curate, detect

FILTERS = {
    "sign": Sign(),
    "threshold 1/B": Threshold(),
    "k-means": KMeans(),
    "mixture": Mixture(),
    "label model of the last three": Ensemble([Threshold(), KMeans(), Mixture()]),
}


@hydra.main(version_base="1.3", config_path="pkg://lightning_mimic.conf", config_name="train")
def main(config: DictConfig) -> None:
    """Trains, unless an earlier sweep has done this run."""
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    result = folder / "result.json"
    if result.exists():
        return
    shutil.rmtree(folder / "scores", ignore_errors=True)  # of a run that was broken off
    silence()
    if "pick" in config:
        config.data.keep = str(picked(config, folder / "manifest.parquet"))
    config.test = False  # whose table would be one of hundreds
    trainer = train(config)
    every = "filters" in config and job.runtime.choices.mimic == "official"
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(figures(trainer, folder, every)))
    unfinished.rename(result)


def picked(config: DictConfig, path: Path) -> Path:
    """Keeps a fraction of the scored samples: those of the highest mean scores, or as many drawn blindly."""
    table = curate(config.scored, TopK(fraction=config.fraction)).manifest.table()
    keep = torch.tensor(table["keep"].to_pylist())
    if config.pick == "random":
        keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(config.seed))]
    pq.write_table(pa.table({"id": table["id"], "keep": keep.tolist()}), path)
    return path


def figures(trainer: L.Trainer, folder: Path, every_filter: bool) -> dict[str, Any]:
    """Test accuracy after the last epoch; of a scored run, what its scores find, and how many samples had a say."""
    tested = trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)
    found: dict[str, Any] = {"accuracy": tested[0]["test/accuracy"]}
    if not (folder / "scores").exists():
        return found
    data = trainer.datamodule
    data = getattr(data, "data", data)  # below cached features
    found["ess"] = effective_share(folder / "scores")
    found["filters"] = {}
    for name in FILTERS if every_filter else ("sign",):
        try:
            table = curate(folder / "scores", FILTERS[name], unscored="keep").manifest.table()
        except CurationError as error:  # a label model whose voters all say the same
            found["filters"][name] = {"refused": str(error)}
            continue
        table = table.filter(pc.is_valid(table["score"]))
        wrong = are_wrong(data, table["id"].to_pylist())
        kept = torch.tensor(table["keep"].to_pylist())
        shares = {"share_kept": float(kept.float().mean()), "share_right": float((~wrong).float().mean())}
        found["filters"][name] = shares
        if wrong.any():
            found["filters"][name] |= asdict(detect(torch.tensor(table["score"].to_pylist()), ~kept, wrong))
    return found


def effective_share(ledger: Path) -> float:
    """Mean over the batches of ``1/Σw²``, over their size."""
    rows = Ledger(ledger).table()
    rows = rows.append_column("square", pc.power(rows["weight"], 2))
    sums = rows.group_by(["attempt", "epoch", "batch"]).aggregate([("square", "sum"), ("batch_size", "max")])
    # A batch of which nothing is kept has no say at all.
    squares, sizes = (torch.tensor(sums[name].to_pylist()) for name in ("square_sum", "batch_size_max"))
    return float(torch.where(squares > 0, 1 / squares.clamp(min=1e-12) / sizes, 0.0).mean())


if __name__ == "__main__":
    main()
