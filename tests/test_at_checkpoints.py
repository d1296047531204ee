"""Scoring at checkpoints: what a loop over per-sample gradients gives at just these weights, and nothing moves."""

import hashlib

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import oracles
from lightning_mimic import Aligned, GradMimic, Ledger, WithIds, collate_with_ids
from lightning_mimic.callbacks import AtCheckpoints
from lightning_mimic.callbacks.at_checkpoints import _digest
from lightning_mimic.scorers import CosineSimilarity, GradNorm, ReferenceLoss, RhoLoss, Uniform
from support.aligned_heads import Listed, unrelated
from support.cases import pairwise
from support.checkpoint_scoring import Moody, MoodyWithLosses, checkpoints, column, scored, toy_at
from support.checkpoints import write_distributed, write_shards
from support.hooks_left import traces
from support.ranks import on_two_ranks, strategy, two
from support.toys import Toy, WithLosses, loader, losses_of, parameters_of, toy, toy_data, trainer

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Decays(Moody):
    """An optimizer that moves weights without a gradient, and a schedule."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.5, weight_decay=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Fails(Moody):
    error = None

    def training_step(self, batch, batch_idx):
        if self.error and (self.trainer.current_epoch, batch_idx) == (1, 1):
            raise self.error
        return super().training_step(batch, batch_idx)


def watched(module):
    """Keeps the module's state as it is in each batch, which parameters need gradients, and what all batches leave."""
    seen, step = [], module.training_step

    def training_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        needed = {name for name, p in module.named_parameters() if p.requires_grad}
        seen.append((module.trainer.current_epoch, state, needed, module.training))
        assert all(p.grad is None for p in module.parameters())
        return loss

    module.training_step = training_step
    return seen


TARGETS = {"head": ["head"], "norm": ["norm"], "two": ["body", "head"], "all": ["body", "norm", "head"]}


def test_checkpoints_of_several_files_are_scored_as_one_file_is(tmp_path):
    states = [toy_at(Moody, k).state_dict() for k in range(2)]
    paths = [write_shards(tmp_path / "shards", states[0]), write_distributed(tmp_path / "parts", {"model": states[1]})]
    (tmp_path / "files").mkdir()
    rows = scored(tmp_path, toy(Moody), paths)
    expected = scored(tmp_path / "files", toy(Moody), checkpoints(tmp_path / "files")[:2])
    for epoch in range(2):
        found = column(rows, "score", epoch)
        assert len(found) == 14
        torch.testing.assert_close(found, column(expected, "score", epoch), **CLOSE)
    names = [each["sha256"] for each in Ledger(tmp_path / "scores").meta["attempts"][0]["checkpoints"]]
    (part,) = (tmp_path / "parts").glob("*.distcp")
    part.write_bytes(part.read_bytes() + b"x")
    assert _digest(paths[0]) == names[0]
    assert _digest(paths[1]) != names[1]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", [Moody, MoodyWithLosses])
def test_every_epoch_has_the_scores_at_its_checkpoint(kind, targets, tmp_path):
    data, reference, layers = toy_data(14), parameters_of(toy(kind, seed=1)), TARGETS[targets]
    rows = scored(tmp_path, toy(kind), checkpoints(tmp_path, kind), parameters="all" if targets == "all" else layers)
    assert rows["id"].to_pylist() == 3 * list(range(14))  # each once an epoch
    for epoch in range(3):
        module = toy_at(kind, epoch)
        gradients = oracles.per_sample_gradients(module, losses_of, data[:])
        chosen = {n: p for n, p in module.named_parameters() if n.split(".")[0] in layers}
        expected = oracles.mimic_scores(gradients, reference, chosen)
        torch.testing.assert_close(column(rows, "score", epoch), expected, **CLOSE)
        if kind is MoodyWithLosses:
            torch.testing.assert_close(column(rows, "loss", epoch), losses_of(module, data[:]).detach(), **CLOSE)
            assert column(rows, "label", epoch).tolist() == data[:][1].tolist()
    assert Ledger(tmp_path / "scores").meta["attempts"][0]["score_kind"] == "own_loss"


def by_hand(scorer, module, reference, batch):
    gradients = oracles.per_sample_gradients(module, losses_of, batch)
    head = {n: p for n, p in module.named_parameters() if n.startswith("head")}
    norms = torch.cat([gradients[n].flatten(1) for n in head], 1).norm(dim=1)
    own, others = (losses_of(m, batch).detach() for m in (module, reference))
    return {
        "CosineSimilarity": lambda: oracles.mimic_scores(gradients, parameters_of(reference), head) / norms,
        "GradNorm": lambda: norms,
        "RhoLoss": lambda: own - others,
        "ReferenceLoss": lambda: -others,
        "Uniform": lambda: torch.zeros_like(own),
    }[type(scorer).__name__]()


@pytest.mark.parametrize("scorer", [CosineSimilarity(), GradNorm(), RhoLoss(), ReferenceLoss(), Uniform()])
def test_other_scorers_score_at_checkpoints(scorer, tmp_path):
    reference = toy_at(MoodyWithLosses, 8)
    options = {"scorer": scorer, "reference": reference if scorer.needs & {"dot", "reference_losses"} else None}
    options["parameters"] = "head" if scorer.needs & {"dot", "norms"} else None
    rows = scored(tmp_path, toy(MoodyWithLosses), checkpoints(tmp_path, MoodyWithLosses), **options)
    for epoch in range(3):
        expected = by_hand(scorer, toy_at(MoodyWithLosses, epoch), reference, toy_data(14)[:])
        torch.testing.assert_close(column(rows, "score", epoch), expected, **CLOSE)


STEPS = {"plain": {}, "clipped": {"gradient_clip_val": 0.01}, "accumulated": {"accumulate_grad_batches": 3}}


@pytest.mark.filterwarnings("ignore:.*samples held NaN")
@pytest.mark.parametrize(
    *pairwise(kind=[Moody, MoodyWithLosses, Decays], steps=STEPS, reweight=["none", "all"], broken=[False, True])
)
def test_nothing_moves_to_the_bit(kind, steps, reweight, broken, tmp_path):
    data, module, paths = toy_data(14), toy(kind), checkpoints(tmp_path, kind)
    seen = watched(module)
    data.tensors[0][[2, 5]] = float("nan") if broken else 1.0
    options = {"on_nonfinite": "mask_loss", "reweight": reweight}
    scored(tmp_path, module, paths, data=data, trainer_options=STEPS[steps], **options)
    assert len(seen) == 3 * 4
    for epoch, state, _, _ in seen:
        torch.testing.assert_close(state, dict(toy_at(kind, epoch).state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.state_dict()), dict(toy_at(kind, 2).state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(("chosen", "needed"), [("head", {"head.weight", "head.bias"}), ("norm.bias", {"norm.bias"})])
def test_only_the_scored_parameters_need_gradients_in_evaluation_mode(chosen, needed, tmp_path):
    module = toy(Moody)
    seen = watched(module)
    scored(tmp_path, module, checkpoints(tmp_path), parameters=chosen)
    assert len(seen) == 12
    assert all(found == needed and not training for _, _, found, training in seen)


class FailsInSetup(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        raise RuntimeError("late")


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt(), "setup"])
def test_the_module_is_left_as_it_was_however_it_ends(error, tmp_path):
    module = toy(Fails)
    module.norm.eval()
    module.body.bias.requires_grad_(False)
    before, module.error = traces(module), None if error == "setup" else error
    run = {"more": [FailsInSetup()] if error == "setup" else []}
    if error is None:
        scored(tmp_path, module, checkpoints(tmp_path, Fails), **run)
    else:
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
            scored(tmp_path, module, checkpoints(tmp_path, Fails), **run)
    assert traces(module) == before
    assert before[0] == []
    assert isinstance(module.configure_optimizers(), torch.optim.SGD)
    # And trains as one that was never scored.
    module.error, fresh = None, toy(Fails)
    fresh.load_state_dict(module.state_dict())
    fresh.norm.eval()
    fresh.body.bias.requires_grad_(False)
    for each in (module, fresh):
        torch.manual_seed(0)
        trainer().fit(each, loader(toy_data(8)))
    torch.testing.assert_close(parameters_of(module), parameters_of(fresh), rtol=0, atol=0)
    assert not torch.equal(module.head.weight, toy_at(Fails, 2).head.weight)


def test_the_ledger_names_the_checkpoints_by_content(tmp_path):
    paths = checkpoints(tmp_path)
    scored(tmp_path, toy(Moody), [str(path) for path in paths])
    said = Ledger(tmp_path / "scores").meta["attempts"][0]["checkpoints"]
    assert said == [{"file": str(p), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths]
    assert len({each["sha256"] for each in said}) == 3


PAIRED = {"head": Moody, "all": MoodyWithLosses}


def on_rank(rank, folder):
    for parameters, kind in PAIRED.items():
        module = toy(kind)
        batches = [list(range(start + 2 * rank, start + 2 * rank + 2)) for start in range(0, 16, 4)]
        mine = torch.utils.data.DataLoader(WithIds(toy_data(16)), batch_sampler=batches, collate_fn=collate_with_ids)
        paths = sorted(folder.glob(f"{kind.__name__}[0-9].*"))
        reference = parameters_of(toy(kind, seed=1))
        mimic = GradMimic(reference, parameters, reweight="none", ledger=folder / "two" / parameters)
        trainer(mimic, AtCheckpoints(paths), epochs=3, strategy=strategy(), **two()).fit(module, mine)
        torch.save(module.state_dict(), folder / f"{parameters}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    for kind in PAIRED.values():
        checkpoints(tmp_path, kind)
    on_two_ranks(on_rank, tmp_path)
    for parameters, kind in PAIRED.items():
        (tmp_path / "one" / parameters).mkdir(parents=True)
        one = scored(
            tmp_path / "one" / parameters,
            toy(kind),
            sorted(tmp_path.glob(f"{kind.__name__}[0-9].*")),
            data=toy_data(16),
            parameters=parameters,
        )
        ledger = Ledger(tmp_path / "two" / parameters)
        two = ledger.table().sort_by([("epoch", "ascending"), ("id", "ascending")])
        assert one["id"].to_pylist() == two["id"].to_pylist() == 3 * list(range(16))
        for epoch in range(3):
            torch.testing.assert_close(column(two, "score", epoch), column(one, "score", epoch), **CLOSE)
        assert set(two["rank"].to_pylist()) == {0, 1}
        assert len(ledger.meta["attempts"][0]["checkpoints"]) == 3
        assert ledger.meta["attempts"][0]["rows"] == [24, 24]
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{parameters}-{rank}.pt", weights_only=True)
            torch.testing.assert_close(state, toy_at(kind, 2).state_dict(), rtol=0, atol=0)


def test_the_same_checkpoint_twice_scores_all_against_an_aligned_reference(tmp_path):
    (path,), data, reference = checkpoints(tmp_path, count=1), toy_data(40), unrelated()
    mimic = GradMimic(Aligned(reference, every=3), "head", reweight="none", ledger=tmp_path / "s")
    trainer(mimic, AtCheckpoints([path, path]), epochs=2).fit(toy(Moody), loader(data))
    module, listed = toy_at(Moody, 0), Listed(reference, 3)
    batches = [data[k : k + 4] for k in range(0, 40, 4)]
    found = [listed(module, b, oracles.per_sample_gradients(module, losses_of, b)) for b in 2 * batches]
    rows = Ledger(tmp_path / "s").table().sort_by([("epoch", "ascending"), ("id", "ascending")])
    assert [score is not None for score in rows["score"].to_pylist()] == listed.known
    assert listed.known == [False] * 28 + [True] * 52  # four samples per feature with the eighth batch
    scores = torch.cat([column(rows, "score", epoch) for epoch in (0, 1)])
    torch.testing.assert_close(scores[28:], torch.cat(found)[28:], **CLOSE)


def test_the_progress_bar_says_scoring_and_shows_no_epoch(tmp_path, capsys):
    mimic = GradMimic(parameters_of(toy(Moody, seed=1)), "head", reweight="none", ledger=tmp_path / "s")
    fit = trainer(mimic, AtCheckpoints(checkpoints(tmp_path)), epochs=3, enable_progress_bar=True)
    fit.fit(toy(Moody), loader(toy_data(14)))
    shown = "".join(capsys.readouterr())
    assert "scoring: 100%" in shown
    assert "12/12" in shown
    assert "Epoch" not in shown
    assert not fit.progress_bar_callback.is_disabled
    steps = Ledger(tmp_path / "s").table(deduplicate=False)["step"].to_pylist()
    assert steps == [4 * epoch + sample // 4 for epoch in range(3) for sample in range(14)]


class OneArgument(Toy):
    """Takes the batch alone, and sets what it needs when an epoch begins."""

    def on_train_epoch_start(self):
        self.scale = 2.0

    def on_train_batch_start(self, batch, batch_idx):
        self.offset = 0.0 * batch_idx

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.scale / 2 * self(batch[0]) + self.offset, batch[1])


class OnlySecond(GradMimic):
    def should_score(self, trainer):
        return trainer.current_epoch == 1


def test_the_module_is_called_as_by_the_trainer_and_a_schedule_holds(tmp_path):
    reference, data = parameters_of(toy(seed=1)), toy_data(8)
    paths = checkpoints(tmp_path, OneArgument, count=2)
    mimic = OnlySecond(reference, "head", reweight="none", ledger=tmp_path / "s")
    trainer(AtCheckpoints(paths), mimic, epochs=2).fit(toy(OneArgument), loader(data))  # in this order, too
    ledger = Ledger(tmp_path / "s")
    assert len(ledger.meta["attempts"]) == 1
    assert ledger.meta["attempts"][0]["data"]["samples"] == 8
    module = toy_at(OneArgument, 1)
    expected = oracles.mimic_scores(
        oracles.per_sample_gradients(module, losses_of, data[:]),
        reference,
        {name: p for name, p in module.named_parameters() if name.startswith("head")},
    )
    assert set(ledger.table()["epoch"].to_pylist()) == {1}
    torch.testing.assert_close(column(ledger.table(), "score", 1), expected, **CLOSE)


class Sums(WithLosses):
    def training_step(self, batch, batch_idx):
        return self.sample_losses(batch).sum()


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_loss_that_is_not_the_mean_is_refused_while_scoring_too(parameters, tmp_path):
    with pytest.raises(ValueError, match=r"does not return the plain mean of `self\.sample_losses\(batch\)`"):
        scored(tmp_path, toy(Sums), checkpoints(tmp_path, Sums, count=1), parameters=parameters)


class Reloads(pl.LightningDataModule):
    def train_dataloader(self):
        start = 100 * self.trainer.current_epoch
        return loader(toy_data(4), ids=range(start, start + 4))


def test_data_that_are_loaded_anew_are_scored(tmp_path):
    mimic = GradMimic(parameters_of(toy(seed=1)), "head", reweight="none", ledger=tmp_path / "s")
    fit = trainer(
        mimic, AtCheckpoints(checkpoints(tmp_path, Toy, count=2)), epochs=2, reload_dataloaders_every_n_epochs=1
    )
    fit.fit(toy(Toy), datamodule=Reloads())
    assert sorted(Ledger(tmp_path / "s").table()["id"].to_pylist()) == [0, 1, 2, 3, 100, 101, 102, 103]
