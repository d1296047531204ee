"""Train, resume, score, curate and compare on a real S3 server, which fails, goes away, and is shared with others."""

import os
import re
import subprocess
import sys
import threading

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lightning_mimic import GradMimic, Ledger, MimicError, WithIds, collate_with_ids, stores
from lightning_mimic.callbacks import AtCheckpoints
from lightning_mimic.cli.curate import compare_main, curate_main, select_main
from lightning_mimic.cli.training import train, without_secrets
from lightning_mimic.curation import CurationError, curate
from lightning_mimic.errors import LedgerError
from lightning_mimic.ledger import LedgerWriter, open_run
from lightning_mimic.manifest import Manifest
from lightning_mimic.reference import ReferenceLoadError, read_reference
from lightning_mimic.stores import path_of
from support.configs import composed
from support.ledgers import CONFIG
from support.object_store import BUCKET, BUSY, CLOSE, object_store
from support.ranks import WORLD, on_two_ranks, strategy, two
from support.toys import WithLosses, parameters_of, toy, toy_data, trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty")]
SAMPLES, SIZE = 12, 4


@pytest.fixture(scope="module")
def server():
    with object_store() as proxy:
        yield proxy


@pytest.fixture
def place(server, request, monkeypatch):
    """The URL of a folder of its own; what fails is tried again at once."""
    monkeypatch.setattr(stores, "WAITS", (0.05, 0.1, 0.2, 0.4, 0.8, 1.6))
    server.heal()
    yield f"s3://{BUCKET}/{request.node.name}"
    server.heal()


def data(rank=0, ranks=1):
    rows = range(rank, SAMPLES, ranks)
    batches = [list(rows[start : start + SIZE]) for start in range(0, len(rows), SIZE)]
    return DataLoader(WithIds(toy_data(SAMPLES)), batch_sampler=batches, collate_fn=collate_with_ids)


def mimic(ledger, reference=None):
    reference = parameters_of(toy(seed=1)) if reference is None else reference
    return GradMimic(reference, "head", ledger=ledger, diagnose_reference=False)


def saves(folder):
    return pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


def fit(folder, reference=None, epochs=2, resume=None):
    options = {"max_epochs": epochs, "enable_checkpointing": True}
    callbacks = mimic(f"{folder}/ledger", reference), saves(f"{folder}/epochs")
    trainer(*callbacks, **options).fit(toy(WithLosses), data(), ckpt_path=resume)


def rows_of(ledger):
    table = Ledger(ledger).table()
    return table.drop_columns(["attempt"]).to_pylist()


def test_a_run_is_trained_resumed_and_scored_on_the_store_as_on_a_disk(place, server, tmp_path):
    torch.save(toy(seed=1).state_dict(), tmp_path / "reference.ckpt")
    path_of(f"{place}/reference.ckpt", "x").put(tmp_path / "reference.ckpt")
    found = []
    for folder in (str(tmp_path), place):
        reference = f"{folder}/reference.ckpt"
        fit(folder, reference)
        fit(folder, reference, epochs=4, resume=f"{folder}/epochs/epoch=1.ckpt")
        scores = GradMimic(reference, "head", ledger=f"{folder}/scores", reweight="none", diagnose_reference=False)
        checkpoints = AtCheckpoints(f"{folder}/epochs")
        assert [path.name for path in checkpoints.checkpoints] == [f"epoch={k}.ckpt" for k in range(4)]
        trainer(scores, checkpoints, max_epochs=4).fit(toy(WithLosses), data())
        found.append((rows_of(f"{folder}/ledger"), rows_of(f"{folder}/scores")))
        noted = Ledger(f"{folder}/scores").meta["attempts"][0]["checkpoints"]
        assert [each["file"] for each in noted] == [f"{folder}/epochs/epoch={k}.ckpt" for k in range(4)]
    assert [len(rows) for rows in found[1]] == [4 * SAMPLES, 4 * SAMPLES]
    assert found[0] == found[1]
    meta = Ledger(f"{place}/ledger").meta
    assert [facts["rows"] for facts in meta["attempts"]] == [[2 * SAMPLES], [2 * SAMPLES]]
    assert "secret" not in str(meta)


def test_commands_read_and_write_urls(place, tmp_path, monkeypatch, capsys):
    words = ["experiment=digits_reference", f"save_to={place}/model.ckpt", "test=false"]
    words += ["trainer.max_epochs=1", "logger=none", "trainer.enable_progress_bar=false", "data.train=trusted_fit"]
    train(composed(tmp_path, *words, "trainer.enable_checkpointing=false"))
    assert sorted(read_reference(f"{place}/model.ckpt"))
    write_run(f"{place}/run")
    out, plot = f"{place}/curated", f"{place}/quality.png"
    for command, main, *said in (
        ("mimic-curate", curate_main, f"ledger={place}/run", f"out={out}", "exports=[csv]"),
        ("mimic-select", select_main, f"recipe={out}/manifest.parquet:score top 3", f"out={place}/best.parquet"),
        ("mimic-compare", compare_main, f"manifests={{all: {out}/manifest.parquet}}", f"plot={plot}"),
    ):
        monkeypatch.setattr(sys, "argv", [command, *said])
        monkeypatch.chdir(tmp_path)
        main()
    said = capsys.readouterr().out
    assert f"{out}/manifest.csv" in said
    assert f"{place}/best.parquet: 3 of 8 samples kept" in said
    assert sum(row["keep"] for row in Manifest(f"{place}/best.parquet").table().to_pylist()) == 3
    assert path_of(plot, "x").read_bytes().startswith(b"\x89PNG")


def test_loggers_get_no_signature_of_a_url(tmp_path):
    plain = composed(tmp_path, "experiment=digits_noisy")
    assert without_secrets(plain) is plain
    plain.paths.reference = "https://host/ref.ckpt?Signature=1f&b=2"
    logged = OmegaConf.to_container(without_secrets(plain), resolve=True)
    assert logged["paths"]["reference"] == logged["mimic"]["reference"] == "https://host/ref.ckpt"
    assert "1f&" not in str(logged)


def write_run(folder, parts=2, size=4):
    run = open_run(folder, CONFIG, 0, None, {"ranks": 1})
    writer = LedgerWriter(folder, run.run, run.attempt, 0, token=run.token)
    for part in range(parts):
        writer.append(rows(part, size))
        writer.commit()
    run.note({"rows": [writer.rows]})
    run.close()


def rows(part, size):
    ids = range(part * size, (part + 1) * size)
    columns = {"id": list(ids), "score": [k - 3.5 for k in ids], "weight": [0.25] * size, "batch_size": [size] * size}
    places = {"epoch": [0] * size, "step": [part] * size, "batch": [part] * size, "position": range(size)}
    return columns | places | {"flag": ["ok"] * size}


def test_a_part_is_put_by_one_request_and_read_whole_once(place, server):
    write_run(f"{place}/run", parts=1)
    start = server.requests.copy()
    write_run(f"{place}/longer", parts=11)
    # The part; then a listing of the descriptions, and size and content of the last, to see that the run is still ours.
    more = {name: count - 2 * start[name] for name, count in server.requests.items()}
    assert more == {"PUT": 10, "GET": 20, "HEAD": 10}
    ledger = Ledger(f"{place}/longer")
    server.heal()
    assert len(ledger.table()) == 44
    assert server.requests == {"GET": 11 + 2}  # listings of the parts and of the descriptions
    assert len(ledger.table()) == 44
    assert server.requests == {"GET": 11 + 4}
    server.heal()
    done = curate(f"{place}/longer")
    assert done.samples == 44
    assert server.requests == {"GET": 11 + 4, "HEAD": 1}


@pytest.mark.parametrize("fault", [BUSY, CLOSE])
def test_a_server_that_fails_every_third_request_loses_no_row(fault, place, server, tmp_path):
    fit(tmp_path)
    server.fault = lambda number, method, path: fault if number % 3 == 0 else None
    options = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(mimic(f"{place}/ledger"), saves(tmp_path / "epochs"), **options).fit(toy(WithLosses), data())
    assert server.requests.total() > 20
    assert rows_of(f"{place}/ledger") == rows_of(tmp_path / "ledger")
    done = curate(f"{place}/ledger", out=f"{place}/curated", exports=["csv"])
    local = curate(tmp_path / "ledger", out=tmp_path / "curated")
    assert done.manifest.table().equals(local.manifest.table())


class GoesAway(pl.Callback):
    """Has the server go away in the second epoch, for longer than the requests are tried again."""

    def __init__(self, server):
        self.server = server

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.server.go_away(1.5)


def test_a_server_that_goes_away_for_a_while_loses_no_row(place, server, tmp_path):
    fit(tmp_path)
    options = {"max_epochs": 2, "enable_checkpointing": True}
    callbacks = GoesAway(server), mimic(f"{place}/ledger"), saves(tmp_path / "epochs")
    trainer(*callbacks, **options).fit(toy(WithLosses), data())
    assert rows_of(f"{place}/ledger") == rows_of(tmp_path / "ledger")


@pytest.mark.filterwarnings("ignore:the last scores could not be recorded")
def test_rows_that_a_store_does_not_take_are_in_the_checkpoint_and_written_when_it_is_resumed(
    place, server, tmp_path, monkeypatch
):
    fit(tmp_path, epochs=3)
    monkeypatch.setattr(stores, "WAITS", ())
    parts = re.compile(r"/part-.*-000001-")
    server.fault = lambda number, method, path: BUSY if parts.search(path) else None
    options = {"max_epochs": 3, "enable_checkpointing": True}
    callbacks = mimic(f"{place}/ledger"), saves(tmp_path / "held")
    warned = pytest.warns(UserWarning, match="A checkpoint that is saved now contains these rows")
    with warned, pytest.raises(LedgerError):
        trainer(*callbacks, **options).fit(toy(WithLosses), data())
    server.heal()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="has not ended. If its process still runs"):
        trainer(mimic(f"{place}/ledger"), saves(tmp_path / "held"), **options).fit(
            toy(WithLosses), data(), ckpt_path=tmp_path / "held" / "epoch=1.ckpt"
        )
    assert rows_of(f"{place}/ledger") == rows_of(tmp_path / "ledger")


def two_ranks(rank, folder):
    url = (folder / "url").read_text()
    options = {"strategy": strategy(), **two()}
    trainer(mimic(url), **options).fit(toy(WithLosses), data(rank, WORLD))


def test_two_ranks_write_the_rows_of_one(place, tmp_path):
    (tmp_path / "url").write_text(f"{place}/ledger")
    on_two_ranks(two_ranks, tmp_path)
    meta = Ledger(f"{place}/ledger").meta
    assert meta["attempts"][0]["rows"] == [6, 6]
    found = Ledger(f"{place}/ledger").table()
    assert sorted(found["id"].to_pylist()) == list(range(SAMPLES))
    assert set(found["rank"].to_pylist()) == {0, 1}


def test_of_runs_that_start_at_once_one_wins(place):
    won, lost, start = [], [], threading.Barrier(4)

    def begin(number):
        start.wait()
        try:
            won.append(open_run(place, CONFIG | {"temperature": number}, 0, None, {"ranks": 1}))
        except LedgerError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (opened,) = won
    assert [facts["token"] for facts in Ledger(place).meta["attempts"]] == [opened.token]
    assert len(lost) == 3
    assert all("just now. Give each its own." in each or "already holds" in each for each in lost)


KILLED = """
import sys
from lightning_mimic.files import atomic_write
from lightning_mimic.stores import path_of
with atomic_write(path_of(sys.argv[1], "x"), exclusive=True) as file:
    file.write(bytes(1 << 26))
"""


def test_of_a_file_whose_writer_is_killed_nothing_is_there(place, server):
    process = subprocess.Popen([sys.executable, "-c", KILLED, f"{place}/part.parquet"])
    server.half_way = lambda method: process.kill() if method == "PUT" else None
    assert process.wait(60) == -9
    server.heal()
    assert not path_of(f"{place}/part.parquet", "x").exists()
    assert list(path_of(place, "x").glob("*")) == []


def test_what_cannot_be_used_is_named_in_a_sentence(place, server, tmp_path, monkeypatch):
    missing = "s3://no-such-bucket/run"
    with pytest.raises(LedgerError, match=r"cannot write to s3://no-such-bucket/run: .*bucket does not exist"):
        open_run(missing, CONFIG, 0, None, {})
    with pytest.raises(LedgerError, match="no-such-bucket/run holds no ledger"):
        curate(missing)
    with pytest.raises(ReferenceLoadError, match="`reference`: no file s3://no-such-bucket/run"):
        read_reference(missing)
    with pytest.raises(CurationError, match=r"no-such-bucket/run/m\.parquet is no manifest: there is no such file"):
        Manifest(f"{missing}/m.parquet")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    stores.url_to_fs(place)[0].clear_instance_cache()
    for act in (
        lambda: open_run(place, CONFIG, 0, None, {}),
        lambda: read_reference(f"{place}/a.ckpt"),
        lambda: Manifest(f"{place}/m.parquet"),
    ):
        with pytest.raises(MimicError, match="there are no credentials for it"):
            act()
    stores.url_to_fs(place)[0].clear_instance_cache()
