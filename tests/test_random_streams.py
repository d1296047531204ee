"""Random streams: no two kinds of draw of one seed, or of two, coincide; nor does any with torch's own samplers."""

import itertools
from typing import get_args

import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler

from lightning_mimic.data.comparison import comparison_loader
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import AsymmetricNoise, SymmetricNoise
from lightning_mimic.random_streams import Purpose, stream_seed, torch_generator

SEEDS = range(4)
PURPOSES = get_args(Purpose)


def first(order: torch.Tensor) -> torch.Tensor:
    """The first 400 of 1,000, as a mask."""
    return torch.zeros(1000, dtype=torch.bool).index_fill(0, order[:400], True)


def test_no_two_streams_choose_the_same_samples():
    drawn = {
        (purpose, seed, epoch): first(torch.randperm(1000, generator=torch_generator(seed, purpose, *place)))
        for purpose, seed in itertools.product(PURPOSES, SEEDS)
        for epoch, place in (("", ()), ("epoch 0", (0,)), ("epoch 1", (1,)))
    }
    for seed, epoch in itertools.product(SEEDS, (0, 1)):
        sampler = DistributedSampler(range(1000), num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        # Of one seed and the next epoch it draws what it draws of the next seed.
        drawn["DistributedSampler", seed + epoch, ""] = first(torch.tensor(list(sampler)))
    for seed in SEEDS:
        torch.manual_seed(seed)
        drawn["RandomSampler", seed, ""] = first(torch.tensor(list(RandomSampler(range(1000)))))
    names, masks = list(drawn), torch.stack(list(drawn.values())).double()
    common = masks @ masks.T
    # Of two independent choices 160 on average, with a standard deviation of 7.6.
    pairs = (common - 160).abs().triu(1) > 6 * 7.6
    assert not pairs.any(), [(names[a], names[b]) for a, b in pairs.nonzero().tolist()]


def test_a_stream_depends_on_the_seed_the_purpose_and_the_place():
    seeds = [
        stream_seed(seed, purpose, *place)
        for seed, purpose in itertools.product([*range(100), -1, 2**40], PURPOSES)
        for place in ((), (0,), (1,), (0, 1), (1, 0), (10,))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_purpose_is_one_of_the_list():
    with pytest.raises(ValueError, match="'label nose' is no purpose; nearest: 'label noise'"):
        stream_seed(0, "label nose")


@pytest.mark.parametrize("noise", [SymmetricNoise, AsymmetricNoise])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_wrong_labels_lie_everywhere_in_an_epoch_of_a_distributed_sampler(noise, ranks):
    labels = torch.randint(10, (1097,), generator=torch.Generator().manual_seed(5))
    for seed in SEEDS:
        _, wrong = noise(0.4, seed=seed)(labels, 10)
        orders = [DistributedSampler(range(1097), ranks, rank, shuffle=True, seed=seed) for rank in range(ranks)]
        epoch = torch.tensor([list(order) for order in orders]).T.flatten()
        for part in wrong[epoch].float().chunk(4):
            assert 0.28 < float(part.mean()) < 0.52


def test_what_the_digits_draw_of_one_seed_is_independent():
    for seed in SEEDS:
        data = DigitsDataModule(noise=SymmetricNoise(0.4, seed=seed), split_seed=seed, seed=seed, batch_size=100)
        data.setup()
        wrong = dict(zip(data.noisy_ids.tolist(), data.wrong.tolist(), strict=True))
        in_training = [each for batch in data.train_dataloader() for each in torch.as_tensor(batch.ids).tolist()]
        compared = [each for batch in comparison_loader(data) for each in torch.as_tensor(batch.ids).tolist()]
        flipped = data.noisy_ids[data.flipped(data.noisy_ids, 0)].tolist()
        for ids in (in_training[:300], in_training[-300:], compared[:300], flipped, data.noisy_ids[:300].tolist()):
            assert 0.28 < sum(wrong[each] for each in ids) / len(ids) < 0.52
        assert len({*in_training[:100]} & {*compared[:100]}) < 40


def test_the_test_images_are_the_same_for_every_seed():
    parts = []
    for seed in SEEDS:
        data = DigitsDataModule(seed=seed, split_seed=seed)
        data.setup()
        parts.append({name: set(rows.tolist()) for name, rows in data.rows.items()})
    assert all(each["test"] == parts[0]["test"] for each in parts)
    assert len({frozenset(each["trusted"]) for each in parts}) == len(parts)
    for each in parts:
        assert sum(map(len, (each["test"], each["trusted"], each["noisy"]))) == 1797
        assert len(each["test"] | each["trusted"] | each["noisy"]) == 1797
