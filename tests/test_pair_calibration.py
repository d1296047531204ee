"""The calibration of pairs: on similarities whose truth is known, and what must not matter."""

import pytest
import torch
import torch.nn.functional as F

from lightning_mimic.reference.pair_calibration import BINS, MIN_PAIRS, RunningPairCalibration, _falling
from support.ranks import WORLD, on_two_ranks

WIDTH, BATCH = 32, 64


def embeddings(count, wrong_share, seed=0, noise=0.2):
    """Images, texts that are noisy copies of them, and which of these belong to another image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, WIDTH, generator=generator)
    texts = images + noise * WIDTH**0.5 * F.normalize(torch.randn(count, WIDTH, generator=generator)) * 5**0.5
    wrong = torch.arange(count) < round(wrong_share * count)
    texts[wrong] = texts[wrong].roll(1, 0)
    order = torch.randperm(count, generator=generator)
    return F.normalize(images)[order], F.normalize(texts)[order], wrong[order]


def calibrated(images, texts, batch=BATCH):
    calibration = RunningPairCalibration()
    for place in range(0, len(images), batch):
        calibration.update(images[place : place + batch], texts[place : place + batch])
    return calibration


@pytest.mark.parametrize("wrong_share", [0.0, 0.2, 0.4, 0.6, 0.7])
@pytest.mark.parametrize("noise", [0.2, 0.4])
def test_the_share_of_mismatched_pairs_is_found(wrong_share, noise):
    for seed in range(3):
        images, texts, _ = embeddings(3000, wrong_share, seed, noise)
        found = calibrated(images, texts).calibration()
        assert found.informative
        assert abs(found.wrong_share - wrong_share) < 0.04
        assert found.low - 0.02 <= wrong_share <= found.high + 0.02
        assert found.low <= found.wrong_share <= found.high
        assert found.facts()["samples"] == pytest.approx(float(found.samples))


@pytest.mark.parametrize("wrong_share", [0.2, 0.4, 0.6])
def test_posteriors_are_shares_of_matches(wrong_share):
    images, texts, wrong = embeddings(6000, wrong_share, noise=0.6)
    posteriors = calibrated(images, texts).posteriors(images, texts)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (posteriors >= low) & (posteriors <= low + 0.2)
        if inside.sum() >= 100:
            assert abs(float(posteriors[inside].mean() - (~wrong[inside]).float().mean())) < 0.1
    assert abs(float(posteriors.mean()) - (1 - wrong_share)) < 0.05
    similarities = (images * texts).sum(1)
    assert (posteriors[similarities.argsort()].diff() >= 0).all()


def test_clean_pairs_are_kept_and_mismatches_found():
    images, texts, _ = embeddings(3000, 0.0)
    assert (calibrated(images, texts).posteriors(images, texts) > 0.5).float().mean() > 0.99
    images, texts, wrong = embeddings(3000, 0.4)
    keep = calibrated(images, texts).posteriors(images, texts) > 0.5
    assert keep[~wrong].float().mean() > 0.98
    assert keep[wrong].float().mean() < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_a_reference_that_knows_nothing_makes_no_difference(seed):
    images, texts, _ = embeddings(3000, 1.0, seed)
    calibration = calibrated(images, texts)
    assert torch.equal(calibration.posteriors(images, texts), torch.ones(3000))
    assert not calibration.calibration().informative
    assert calibration.wrong_share == 0


def test_an_inverted_reference_makes_no_difference():
    images, texts, _ = embeddings(3000, 0.3)
    calibration = calibrated(images, -texts)
    assert torch.equal(calibration.posteriors(images, -texts), torch.ones(3000))


def test_nothing_is_known_of_few_pairs():
    images, texts, _ = embeddings(MIN_PAIRS + 56, 0.3)
    calibration = RunningPairCalibration()
    assert calibration.calibration() is None
    assert torch.isnan(calibration.posteriors(images, texts)).all()
    calibration.update(images[: MIN_PAIRS - 1], texts[: MIN_PAIRS - 1])
    assert torch.isnan(calibration.posteriors(images, texts)).all()
    assert not calibration.calibration().informative
    calibration.update(images[MIN_PAIRS - 1 :], texts[MIN_PAIRS - 1 :])
    assert not torch.isnan(calibration.posteriors(images, texts)).any()


def test_repeated_captions_and_images_are_no_mismatches():
    images, texts, _ = embeddings(3000, 0.3)
    plain = calibrated(images, texts)
    # Every batch holds each pair eight times: exchanging captions among these makes matches, which are left out.
    eight = [torch.cat([each.view(-1, 8, WIDTH)] * 8, 1).flatten(0, 1) for each in (images, texts)]
    found = calibrated(*eight).calibration()
    assert abs(found.separation - plain.calibration().separation) < 0.02
    assert abs(found.wrong_share - 0.3) < 0.05


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_pair_that_is_not_finite_has_no_posterior_and_is_not_counted(broken):
    images, texts, _ = embeddings(640, 0.3)
    expected = RunningPairCalibration()
    expected.update(images[1:-1], texts[1:-1])
    images[0, 3] = broken
    texts[-1, 3] = broken
    found = RunningPairCalibration()
    found.update(images, texts)
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
    posteriors = found.posteriors(images, texts)
    assert torch.isnan(posteriors).nonzero().flatten().tolist() == [0, 639]


def test_old_pairs_fade():
    clean, wrong = embeddings(3000, 0.0), embeddings(12000, 0.5)
    calibration = calibrated(*clean[:2])
    for place in range(0, 12000, BATCH):
        calibration.update(wrong[0][place : place + BATCH], wrong[1][place : place + BATCH])
    assert abs(calibration.calibration().wrong_share - 0.5) < 0.05
    assert calibration.calibration().samples < 4200


def test_a_resumed_calibration_continues():
    images, texts, _ = embeddings(1280, 0.3)
    whole, first, second = calibrated(images, texts), RunningPairCalibration(), RunningPairCalibration()
    second.load_state_dict(first.state_dict())  # before the first update
    for place in range(0, 1280, BATCH):
        second.update(images[place : place + BATCH], texts[place : place + BATCH])
        first, second = second, RunningPairCalibration()
        second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.state_dict(), whole.state_dict())


def test_the_falling_sequence_is_the_nearest_one():
    values = torch.tensor([0.9, 0.2, 0.6, 0.5, 0.1]).double()
    weights = torch.tensor([1.0, 1.0, 3.0, 1.0, 0.0]).double()
    torch.testing.assert_close(
        _falling(values, weights), torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1]).double(), atol=1e-6, rtol=0
    )
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(2, BINS, generator=generator).double()
    found = _falling(values, weights)
    assert (found.diff() <= 1e-12).all()
    # By the conditions that only the solution meets: it is orthogonal to its residual, which no falling step reduces.
    residual = weights * (values - found)
    assert abs(float(residual @ found)) < 1e-6
    assert (residual.cumsum(0) <= 1e-6).all()


def two_ranks(rank, folder):
    images, texts, _ = embeddings(1280, 0.3)
    both = RunningPairCalibration()
    for place in range(0, 1280, BATCH):
        # Of different sizes, and none on one rank at last.
        cut = place + (40 if place < 1280 - BATCH else BATCH)
        own = slice(place, cut) if rank == 0 else slice(cut, place + BATCH)
        both.update(images[own], texts[own])
    torch.save(both.state_dict(), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    images, texts, _ = embeddings(1280, 0.3)
    expected = calibrated(images, texts).state_dict()
    on_two_ranks(two_ranks, tmp_path)
    for rank in range(WORLD):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
