"""From recorded scores to figures and a picture."""

import pyarrow as pa
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from lightning_mimic.curation import detect, summarise
from lightning_mimic.curation.report import plot_scores


def test_a_sample_is_the_mean_of_its_scorings():
    rows = pa.table(
        {
            "id": ["a", "b", "a", "b", "c"],
            "score": pa.array([1.0, -2.0, 3.0, None, None]),
            "label": pa.array([4, 5, 4, 5, None], pa.int64()),
            "predicted": [1, 2, 4, 3, 0],
        }
    )
    assert summarise(rows).to_pylist() == [
        {"id": "b", "score": -2.0, "scorings": 1, "label": 5, "predicted": 3},
        {"id": "a", "score": 2.0, "scorings": 2, "label": 4, "predicted": 4},
        {"id": "c", "score": None, "scorings": 0, "label": None, "predicted": 0},
    ]


def test_detection_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(200, generator=generator) < 0.3
    scores = torch.randn(200, generator=generator) - wrong.float()
    found = detect(scores, scores < 0, wrong)
    precision, recall, f1, _ = precision_recall_fscore_support(wrong, scores < 0, average="binary")
    assert found.auroc == pytest.approx(roc_auc_score(wrong, -scores), abs=1e-6)
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1), abs=1e-6)
    assert found.share_kept == pytest.approx(float((scores >= 0).float().mean()))
    assert found.share_right == pytest.approx(float((~wrong).float().mean()))
    assert found.auroc > 0.5  # lower scores are the suspicious ones


def test_the_picture_is_a_png(tmp_path):
    images = [torch.rand(1, 8, 8) for _ in range(3)]
    wrong = torch.tensor([True, False, False, True])
    plot_scores(tmp_path / "a.png", torch.tensor([-1.0, 0.0, 2.0, -0.5]), wrong, images, ["x", "y", "z"], "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
