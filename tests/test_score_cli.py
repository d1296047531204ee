"""From training to a quality on the command line's own functions: digits trained, scored at checkpoints, curated."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from torchmetrics.functional import spearman_corrcoef

from lightning_mimic import Ledger
from lightning_mimic.cli.build import build
from lightning_mimic.cli.score import main
from lightning_mimic.cli.scoring import score
from lightning_mimic.cli.training import train
from lightning_mimic.curation import curate
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.errors import MimicError

EPOCHS = 3
# A directory of checkpoints that a second run finds is a matter of its own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


def composed(root: str, folder: Path, *overrides: str):
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        paths = [f"paths.output={folder}", f"paths.reference={folder / 'reference.ckpt'}"]
        return compose(root, overrides=[*paths, "trainer.enable_progress_bar=false", *overrides])


def trained(folder: Path, *overrides: str):
    return train(composed("train", folder, "test=false", "logger=none", *overrides))


def scored(folder: Path, name: str, *overrides: str, count: int = EPOCHS) -> Ledger:
    files = ",".join(str(folder / "epochs" / f"{k:03d}.ckpt") for k in range(count))
    said = ["experiment=digits_noisy", f"ledger={folder / name}", f"checkpoints=[{files}]"]
    return score(composed("score", folder, *said, *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that never saw the 50 trusted images, a training with its scores and epochs, all scored after it."""
    folder = tmp_path_factory.mktemp("digits")
    quiet = "trainer.enable_checkpointing=false"
    trained(folder, "experiment=digits_reference", "data.train=trusted_fit", "trainer.max_epochs=30", quiet)
    epochs = [f"save_epochs_to={folder / 'epochs'}", f"trainer.max_epochs={EPOCHS}"]
    trainer = trained(folder, "experiment=digits_noisy", f"mimic.ledger={folder / 'stream'}", *epochs)
    torch.save(trainer.lightning_module.state_dict(), folder / "last.pt")
    scored(folder, "noisy")
    scored(folder, "right", "data.train=trusted_held", "data.noise.rate=0")
    scored(folder, "wrong", "data.train=trusted_held", "data.noise.rate=1")
    return folder


def rows_of(ledger: Path) -> list[dict]:
    return Ledger(ledger).table(deduplicate=False).to_pylist()


def digits(**options) -> DigitsDataModule:
    data = DigitsDataModule(**options)
    data.setup()
    return data


def test_training_saves_the_model_of_every_epoch(folder):
    names = sorted(path.name for path in (folder / "epochs").iterdir())
    assert names == [f"{k:03d}.ckpt" for k in range(EPOCHS)]
    saved = [torch.load(folder / "epochs" / name, weights_only=True) for name in names]
    assert [each["epoch"] for each in saved] == list(range(EPOCHS))
    last = torch.load(folder / "last.pt", weights_only=True)
    torch.testing.assert_close(saved[-1]["state_dict"], last, rtol=0, atol=0)
    heads = [each["state_dict"]["head.weight"] for each in saved]
    assert not torch.equal(heads[0], heads[1])


def test_every_image_is_scored_once_at_every_checkpoint(folder):
    ids = sorted(digits().noisy_ids.tolist())
    for epoch in range(EPOCHS):
        assert sorted(row["id"] for row in rows_of(folder / "noisy") if row["epoch"] == epoch) == ids
    attempt = Ledger(folder / "noisy").meta["attempts"][0]
    assert [Path(each["file"]).name for each in attempt["checkpoints"]] == [f"{k:03d}.ckpt" for k in range(EPOCHS)]
    assert attempt["config"]["reweight"] == "none"
    assert attempt["score_kind"] == "own_loss"
    assert "diagnosis" not in attempt


def test_a_score_is_that_of_the_checkpoints_weights(folder):
    """By hand: the gradient of a linear head is a product of what comes out and what goes in."""
    data, reference = (
        digits(noise=SymmetricNoise(0.4, seed=0)),
        torch.load(folder / "reference.ckpt", weights_only=True)["state_dict"],
    )
    labels = dict(zip(data.noisy_ids.tolist(), data.given_labels.tolist(), strict=True))
    _, model = build(composed("score", folder, "experiment=digits_noisy", "ledger=x", "checkpoints=[x]"))
    for epoch in range(EPOCHS):
        model.load_state_dict(torch.load(folder / "epochs" / f"{epoch:03d}.ckpt", weights_only=True)["state_dict"])
        model.eval()
        rows = [row for row in rows_of(folder / "noisy") if row["epoch"] == epoch]
        ids = torch.tensor([row["id"] for row in rows])
        given = torch.tensor([labels[each] for each in ids.tolist()])
        with torch.no_grad():
            features = model.backbone(data.images(ids))
            out = model.head(features).softmax(1) - torch.nn.functional.one_hot(given, 10)
            weight, bias = (reference[f"head.{n}"] - model.head.get_parameter(n) for n in ("weight", "bias"))
            dot = (out * (features @ weight.T + bias)).sum(1)
            expected = -dot / (weight.square().sum() + bias.square().sum()).sqrt()
        torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), expected, rtol=1e-4, atol=1e-5)
        assert [row["label"] for row in rows] == given.tolist()


def test_trusted_images_are_scored_with_true_and_with_wrong_labels(folder):
    data = digits()
    batch = next(iter(data.val_dataloader()))
    held = dict(zip(batch.ids.tolist(), batch[1].tolist(), strict=True))
    for name, right in (("right", True), ("wrong", False)):
        rows = rows_of(folder / name)
        assert len(rows) == EPOCHS * 50
        assert {row["id"] for row in rows} == held.keys()
        assert all((row["label"] == held[row["id"]]) is right for row in rows)


def test_trusted_images_calibrate_the_quality(folder):
    done = curate(folder / "noisy", trusted=folder / "right", mislabelled=folder / "wrong")
    assert (done.samples, done.unscored, done.quality.trusted) == (1097, 0, 50)
    assert done.quality.low <= 1 - 438 / 1097 <= done.quality.high
    assert done.quality.estimate == pytest.approx(1 - 438 / 1097, abs=0.1)


def test_scores_of_a_training_stream_do_not_calibrate_with_those_at_checkpoints(folder):
    with pytest.raises(ValueError, match="score both at the same checkpoints"):
        curate(folder / "stream", trusted=folder / "right", mislabelled=folder / "wrong")
    scored(folder, "first", count=1)
    with pytest.raises(ValueError, match="score both at the same checkpoints"):
        curate(folder / "first", trusted=folder / "right", mislabelled=folder / "wrong")


def means(ledger: Path) -> torch.Tensor:
    """Mean score by sample, in the order of ids."""
    table = curate(ledger).manifest.table().sort_by("id")
    assert table["id"].to_pylist() == sorted(digits().noisy_ids.tolist())
    return torch.tensor(table["score"].to_pylist())


def test_scores_at_checkpoints_rank_samples_as_the_training_stream_does(folder):
    """Spearman, of means over the epochs: each stream score is taken before its epoch's checkpoint, on the way."""
    assert spearman_corrcoef(means(folder / "noisy"), means(folder / "stream")) > 0.9


def test_training_on_what_a_manifest_keeps_sees_these_images_alone(folder, tmp_path):
    done = curate(folder / "noisy", out=tmp_path / "curated")
    kept = {row["id"] for row in done.manifest.table().to_pylist() if row["keep"]}
    assert 300 < len(kept) < 900
    said = [f"data.keep={done.manifest.path}", f"mimic.ledger={tmp_path / 'kept'}", "trainer.max_epochs=1"]
    trained(folder, "experiment=digits_noisy", *said, "trainer.enable_checkpointing=false")
    assert sorted(row["id"] for row in rows_of(tmp_path / "kept")) == sorted(kept)
    labels = {row["id"]: row["label"] for row in rows_of(folder / "noisy")}
    assert all(row["label"] == labels[row["id"]] for row in rows_of(tmp_path / "kept"))


@pytest.mark.parametrize("mimic", ["cosine", "grad_norm", "rho_loss", "reference_loss", "uniform", "all_parameters"])
def test_any_scorer_scores_at_checkpoints(mimic, folder, tmp_path):
    rows = scored(folder, tmp_path / "scores", f"mimic={mimic}", "+trainer.limit_train_batches=2", count=1).table()
    assert rows.num_rows == 64
    assert rows["score"].null_count == 0


def test_no_scorer_is_refused(folder, tmp_path):
    with pytest.raises(MimicError, match="mimic=none scores nothing"):
        scored(folder, tmp_path / "scores", "mimic=none")
    assert not (tmp_path / "scores").exists()


def test_a_ledger_that_is_there_is_not_written_into(folder):
    before = sorted(path.name for path in (folder / "noisy").iterdir())
    with pytest.raises(ValueError, match="already holds"):
        scored(folder, "noisy")
    assert sorted(path.name for path in (folder / "noisy").iterdir()) == before


OF_DIGITS = ["experiment=digits_noisy", "paths.reference=reference.ckpt", "trainer.enable_progress_bar=false"]


def test_the_command_scores_and_says_where_and_leaves_nothing_else(folder):
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "lightning_mimic.cli.score", *OF_DIGITS, "+trainer.limit_train_batches=3"]
    command += ["checkpoints=[epochs/000.ckpt,epochs/002.ckpt]", "ledger=said"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[-3:])
    assert (said["ledger"], said["next"]) == ("said", "mimic-curate ledger=said out=curated")
    assert set(folder.iterdir()) - before == {folder / "said"}
    assert not (folder / "checkpoints").exists()  # nor did any scoring before it
    score_of = {(row["epoch"], row["id"]): row["score"] for row in rows_of(folder / "noisy")}
    rows = rows_of(folder / "said")
    assert {row["epoch"] for row in rows} == {0, 1}
    for row in rows:
        assert row["score"] == pytest.approx(score_of[2 * row["epoch"], row["id"]], rel=1e-4, abs=1e-5)


def test_a_directory_stands_for_its_checkpoints_in_order(folder, tmp_path):
    said = ["experiment=digits_noisy", f"ledger={tmp_path / 'scores'}", f"checkpoints={folder / 'epochs'}"]
    ledger = score(composed("score", folder, *said))
    for name in ("epoch", "id", "score"):
        assert ledger.table()[name].to_pylist() == Ledger(folder / "noisy").table()[name].to_pylist()
    files = [
        [each["sha256"] for each in Ledger(d).meta["attempts"][0]["checkpoints"]]
        for d in (ledger.directory, folder / "noisy")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ledger=never"], "`checkpoints` is missing"),
        (["checkpoints=[epochs/000.ckpt]"], "`ledger` is missing"),
        (["checkpoints=epochs/000.ckpt", "ledger=never"], "`checkpoints` is 'epochs/000.ckpt'; expected a directory"),
    ],
)
def test_the_command_says_what_is_missing_or_of_another_kind(words, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["mimic-score", *OF_DIGITS, *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in str(ended.value)
    assert not (folder / "never").exists()


def test_training_again_does_not_leave_another_runs_epochs_to_be_scored(folder, tmp_path):
    said = ["experiment=digits_noisy", f"save_epochs_to={tmp_path / 'epochs'}", "trainer.max_epochs=1"]
    trained(folder, *said, f"mimic.ledger={tmp_path / 'a'}")
    with pytest.raises(ValueError, match=r"`save_epochs_to`: .*000.ckpt is there already, of another run"):
        trained(folder, *said, f"mimic.ledger={tmp_path / 'b'}")
    assert not (tmp_path / "b").exists()
    assert [path.name for path in (tmp_path / "epochs").iterdir()] == ["000.ckpt"]
