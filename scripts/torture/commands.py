"""What is attacked: short runs of what writes, each with its inputs and with the content of its outputs."""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset

from lightning_mimic import GradMimic, Ledger, Reweighter, WithIds, collate_with_ids
from lightning_mimic.curation import compare, curate, select
from lightning_mimic.data import CachedFeatures
from lightning_mimic.data.digit_pairs import write_digit_shards
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.manifest import Manifest
from lightning_mimic.models import ImageClassifier
from scripts.benchmarks.short_fits import quiet_trainer

SAMPLES, BATCH, EPOCHS = 48, 8, 3
# Steps between checkpoints, none of which ends an epoch: resumed from such a one, Lightning's next checkpoints lack the
# loader's state, with this package or without.
EVERY = 5


@dataclass(frozen=True)
class Command:
    """A run that writes.

    Attributes:
        name: For the table.
        prepare: Writes the inputs into a folder that exists.
        act: Runs in the folder, with the name of the output; a second call continues or repeats what was broken off.
        content: What the output of this name holds, which must not depend on how often it was broken off; ``None``
            where nothing is complete.
        grows: A broken off run may leave the first part of the content.
        exclusive: Of several at the same time with one output, exactly one succeeds.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path, str], None]
    content: Callable[[Path, str], Any]
    grows: bool = False
    exclusive: bool = True


class Net(L.LightningModule):
    """A classifier of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x).tanh()), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples() -> WithIds:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 6, generator=generator)
    return WithIds(TensorDataset(x, torch.randint(3, (SAMPLES,), generator=generator)))


class Resumable:
    """A loader that goes on within an epoch, where its state says."""

    def __init__(self) -> None:
        self._samples, self._epoch, self._done = samples(), 0, 0

    def __len__(self) -> int:
        return SAMPLES // BATCH

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._done = state["epoch"], state["done"]

    def __iter__(self) -> Iterator[Any]:
        if self._done == len(self):
            self._epoch, self._done = self._epoch + 1, 0
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self._epoch)).tolist()
        for first in range(self._done * BATCH, SAMPLES, BATCH):
            self._done += 1
            yield collate_with_ids([self._samples[row] for row in order[first : first + BATCH]])


def write_reference(folder: Path) -> None:
    torch.manual_seed(1)
    torch.save(Net().state_dict(), folder / "reference.pt")


def fit(folder: Path, name: str) -> None:
    """Train with a checkpoint every few steps, from the last one that can be read."""
    found = [path for path in sorted((folder / f"{name}-checkpoints").glob("*.ckpt"), reverse=True) if _is_whole(path)]
    torch.manual_seed(0)
    mimic = GradMimic(folder / "reference.pt", "head", ledger=folder / name, diagnose_reference=False)
    saver = ModelCheckpoint(
        folder / f"{name}-checkpoints",
        "{step:04d}",
        every_n_train_steps=EVERY,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    options = {"max_epochs": EPOCHS, "enable_checkpointing": True}
    quiet_trainer(mimic, saver, **options).fit(Net(), Resumable(), ckpt_path=found[0] if found else None)


def _is_whole(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:  # half a file of Lightning's
        return False
    return True


def plain_loop(folder: Path, name: str) -> None:
    """Train without Lightning, always from the start."""
    torch.manual_seed(0)
    net, loader = Net(), Resumable()
    optimizer = net.configure_optimizers()
    settings = {"ledger": folder / name, "diagnose_reference": False}
    with Reweighter(net, folder / "reference.pt", "head", **settings) as reweighter:
        for epoch in range(EPOCHS):
            for batch in loader:
                with reweighter.step(batch, epoch=epoch) as step:
                    optimizer.zero_grad()
                    step.backward(net.training_step(batch, 0))
                optimizer.step()


def ledger_rows(folder: Path, name: str) -> list[Any] | None:
    """Rows of a ledger without what tells attempts apart."""
    if not any((folder / name).glob("*.parquet")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not ended
        table = Ledger(folder / name).table()
    return [tuple(row.values()) for row in table.drop_columns(["attempt"]).to_pylist()]


def write_ledger(folder: Path) -> None:
    write_reference(folder)
    plain_loop(folder, "ledger")


def make_manifest(folder: Path, name: str) -> None:
    curate(folder / "ledger", out=folder / name, exports=("csv",))


def manifest_files(folder: Path, name: str) -> Any:
    if not (folder / name).exists():
        return None
    return [*_decisions(folder / name / "manifest.parquet"), (folder / name / "manifest.csv").read_text()]


def write_tables(folder: Path) -> None:
    for name, values in (("a", range(100)), ("b", range(100, 0, -1))):
        pq.write_table(
            pa.table({"id": range(100), "value": [float(value) for value in values]}), folder / f"{name}.parquet"
        )


def select_rows(folder: Path, name: str) -> None:
    recipe = f"{folder}/a.parquet:value top 50% minus {folder}/b.parquet:value top 70%"
    select(recipe, folder / f"{name}.parquet", exports=("csv",))


def selected_files(folder: Path, name: str) -> Any:
    if not (folder / f"{name}.parquet").exists():
        return None
    return [*_decisions(folder / f"{name}.parquet"), (folder / f"{name}.manifest.csv").read_text()]


def _decisions(path: Path) -> list[Any]:
    manifest = Manifest(path)
    kept = {key: manifest.provenance[key] for key in ("samples", "kept")}
    return [manifest.table().to_pylist(), kept]


def make_shards(folder: Path, name: str) -> None:
    write_digit_shards(folder / name)


def features_of(folder: Path, name: str) -> CachedFeatures:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model = ImageClassifier(backbone, num_classes=10, image_shape=(1, 8, 8), freeze_backbone=True)
    return CachedFeatures(DigitsDataModule(), model, folder / name)


def make_features(folder: Path, name: str) -> None:
    features_of(folder, name).prepare_data()


def files_within(folder: Path, name: str) -> Any:
    """Digests of the files that have their final names."""
    paths = [path for path in sorted((folder / name).rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths] or None


def write_manifests(folder: Path) -> None:
    write_ledger(folder)
    make_manifest(folder, "made")


def plot(folder: Path, name: str) -> None:
    from lightning_mimic.curation.plots import plot_quality

    manifests = {each: Manifest(folder / "made" / "manifest.parquet") for each in ("one", "other")}
    plot_quality(folder / f"{name}.png", compare(manifests, {"one": 0.1, "other": 0.2}))


def plotted(folder: Path, name: str) -> Any:
    path = folder / f"{name}.png"
    return path.read_bytes()[-8:] if path.exists() else None  # a PNG's end


def nothing(folder: Path) -> None:
    """Prepare nothing."""


#: In the order of the table.
COMMANDS = (
    Command("fit", write_reference, fit, ledger_rows, grows=True),
    Command("plain loop", write_reference, plain_loop, ledger_rows, grows=True),
    Command("curate", write_ledger, make_manifest, manifest_files),
    Command("select", write_tables, select_rows, selected_files),
    Command("plot", write_manifests, plot, plotted, exclusive=False),
    Command("make shards", nothing, make_shards, files_within),
    Command("features", nothing, make_features, files_within, grows=True, exclusive=False),
)


def copy_of(template: Path, folder: Path) -> Path:
    """A fresh copy of a command's inputs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder
