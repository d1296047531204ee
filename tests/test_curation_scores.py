"""A ledger in the database: the same rows as a slow reader in plain Python keeps, and nothing damaged among them."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_mimic.curation.scores import Scores
from lightning_mimic.database import Database
from lightning_mimic.errors import CurationError
from lightning_mimic.ledger import Ledger, LedgerError
from support.cases import case, for_each
from support.ledgers import CONFIG, write_ledger, write_scores

COLUMNS = "id, score, scorings, relative_weight, label, predicted, flag"


@pytest.fixture
def database():
    with Database() as made:
        yield made


def fetched(database, query):
    return database.connection.execute(query).fetchall()


def samples_in(database, folder, *name, **how):
    return fetched(database, f"SELECT {COLUMNS} FROM {Scores(folder, database, *name, **how).samples} ORDER BY id")


def samples(folder, **how):
    with Database() as made:
        return samples_in(made, folder, **how)


def random_run(run_seed, seed, named):
    """Rows of a run killed and resumed within an epoch, on ranks whose sampler pads; and its attempts' starts."""
    random = np.random.default_rng([run_seed, seed])
    first, gap, many = [(0, 1, 63), (7, 1, 64), (3, 5, 6), (0, 1, 70), (2, 63, 2)][seed % 5]
    epochs, ranks = [first + gap * k for k in range(many)], int(random.integers(1, 4))
    ids = [f"x/{k}" if named else 10**12 * (k - 3) for k in range(int(random.integers(1, 14)))]
    per_epoch = -(-len(ids) // (2 * ranks))
    starts = [0, *sorted(int(s) for s in random.integers(1, many * per_epoch, size=seed % 3))]
    rows = []
    for attempt, start in enumerate(starts):
        if attempt == 1 and seed % 2:
            continue  # it died before its first part
        for k in range(start // per_epoch, many):
            order = list(random.permutation(len(ids)))
            order += order[: -len(order) % (2 * ranks)]  # to make ranks even
            order += order[:1] * (2 * per_epoch * ranks - len(order))
            batch0 = start % per_epoch if k == start // per_epoch else 0
            for n, sample in enumerate(order[: 2 * ranks * (per_epoch - batch0)]):
                own = np.random.default_rng(
                    [run_seed, seed, k, sample]
                )  # whether it has a score, and its classes, hold all epoch
                score = random.normal() if own.random() < 0.8 else own.choice([np.nan, np.inf, -np.inf])
                flag = "ok" if math.isfinite(score) else str(own.choice(["nonfinite_loss", "overflow", "ok"]))
                batch = batch0 + n // (2 * ranks)
                rows.append({
                    "id": ids[sample], "epoch": epochs[k], "step": k * per_epoch + batch, "batch": batch,
                    "rank": n % ranks, "position": n // ranks % 2, "attempt": attempt, "part": int(random.integers(3)),
                    "score": float(np.float32(score)), "weight": float(np.float32(random.random())),
                    "batch_size": int(random.integers(1, 9)), "flag": "alone" if random.random() < 0.1 else flag,
                    "label": None if sample % 4 == 1 else int(own.integers(9)),
                    "predicted": None if sample % 4 > 1 else int(own.choice([0, 5, 2**31, -100])),
                })  # fmt: skip
    return rows, starts


def held(rows, starts):
    """What a reader keeps, one row at a time."""
    wrote = {row["attempt"] for row in rows}
    kept = {}
    order = ("epoch", "step", "batch", "rank", "position")
    for row in sorted(rows, key=lambda row: [row[name] for name in order]):
        if all(row["step"] < starts[later] for later in wrote if later > row["attempt"]):
            kept.setdefault((row["id"], row["epoch"]), row)
    return list(kept.values())


def mean(values):
    return pytest.approx(math.fsum(values) / len(values), rel=1e-12, abs=1e-14) if values else None


@pytest.mark.parametrize("seed", range(15))
def test_samples_and_scorings_are_those_of_a_slow_reader(seed, run_seed, tmp_path, database):
    named = seed % 4 < 2
    rows, starts = random_run(run_seed, seed, named)
    write_ledger(tmp_path, rows, starts=starts)
    scores, kept = Scores(tmp_path, database), held(rows, starts)
    assert scores.id_type == ("VARCHAR" if named else "BIGINT")
    found = {row[0]: row[1:] for row in fetched(database, f"SELECT {COLUMNS} FROM {scores.samples}")}
    assert found.keys() == {row["id"] for row in kept}
    assert database.value(f"SELECT count(*) FROM {scores.samples}") == len(found)
    for sample, (score, scorings, relative_weight, label, predicted, flag) in found.items():
        own = sorted((row for row in kept if row["id"] == sample), key=lambda row: row["epoch"])
        scored = [row for row in own if math.isfinite(row["score"])]
        assert scorings == len(scored)
        assert score == mean([row["score"] for row in scored])
        weighed = [row["weight"] * row["batch_size"] for row in scored if row["flag"] != "alone"]
        assert relative_weight == mean(weighed)
        assert (label, predicted) == (own[-1]["label"], own[-1]["predicted"])
        assert flag in {row["flag"] for row in own} if not scored else flag is None
    view = scores.scorings()
    assert list(view.epochs) == sorted({row["epoch"] for row in kept if math.isfinite(row["score"])})
    expected = [
        (r["id"], r["epoch"], r["score"], None if r["flag"] == "alone" else r["weight"] * r["batch_size"], r["label"])
        for r in kept
        if math.isfinite(r["score"])
    ]
    found = fetched(database, f"SELECT id, epoch, score, relative_weight, label FROM {view.name}")
    assert sorted(found, key=str) == sorted(expected, key=str)
    table = Ledger(tmp_path).table().select(["id", "epoch", "score", "attempt", "position"]).to_pylist()
    same = [
        (r["id"], r["epoch"], r["score"] if math.isfinite(r["score"]) else None, r["attempt"], r["position"])
        for r in kept
    ]
    theirs = [
        tuple(v if v is None or isinstance(v, str) or math.isfinite(v) else None for v in r.values()) for r in table
    ]
    assert sorted(theirs, key=str) == sorted(same, key=str)


def test_means_are_the_scored_samples_in_an_epoch_0(tmp_path, database):
    columns = {"epoch": [7, 7, 7, 8, 8], "score": [1.0, -2.0, None, 2.0, None], "label": [4, 5, 6, 4, 5]}
    write_ledger(tmp_path, {"id": ["a", "b", "c", "a", "b"], "weight": 0.25, "batch_size": 8} | columns)
    means = Scores(tmp_path, database).means()
    assert means.epochs == (0,)
    found = fetched(database, f"SELECT id, epoch, score, relative_weight, label FROM {means.name} ORDER BY id")
    assert found == [("a", 0, 1.5, 2.0, 4), ("b", 0, -2.0, 2.0, 5)]


def test_never_scored_samples_are_there_with_their_flag_and_one_alone_has_no_relative_weight(tmp_path):
    flags = ["zero_direction", "alone", "ok"]
    write_ledger(tmp_path, {"id": [1, 2, 3], "score": [None, 3.0, 4.0], "flag": flags, "weight": 1.0, "batch_size": 1})
    assert samples(tmp_path) == [
        (1, None, 0, None, None, None, "zero_direction"),
        (2, 3.0, 1, None, None, None, None),
        (3, 4.0, 1, 1.0, None, None, None),
    ]


def test_a_nan_that_another_writer_left_is_no_score(tmp_path):
    write_ledger(tmp_path, {"id": [1, 2], "score": [3.0, 5.0], "flag": ["ok", "overflow"]})
    (part,) = tmp_path.glob("*.parquet")
    table = pq.read_table(part)
    at = table.schema.get_field_index("score")
    nan = pa.array([3.0, math.nan], pa.float32(), from_pandas=False)
    pq.write_table(table.set_column(at, table.schema.field(at), nan), part, write_page_checksum=True)
    assert samples(tmp_path) == [(1, 3.0, 1, 1.0, None, None, None), (2, None, 0, None, None, None, "overflow")]


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_repeat_does_not_stand_in_for_the_row_that_counts(repeats, tmp_path, database):
    rows = [{"id": 1, "position": 0}, {"id": 2, "position": 1, "score": 4.0}]
    rows += [{"id": 1, "position": 2 + k, "score": 3.0} for k in range(repeats)]
    write_ledger(tmp_path, rows)
    assert Ledger(tmp_path).table().select(["id", "score"]).to_pydict() == {"id": [1, 2], "score": [None, 4.0]}
    scores = Scores(tmp_path, database)
    assert fetched(database, f"SELECT id, score FROM {scores.samples} ORDER BY id") == [(1, None), (2, 4.0)]
    assert fetched(database, f"SELECT id FROM {scores.scorings().name}") == [(2,)]


def test_two_ledgers_share_a_database(tmp_path, database):
    write_scores(tmp_path / "a", [1.0, 2.0])
    write_scores(tmp_path / "b", [[3.0], [5.0]], ids=["z"])
    one, other = Scores(tmp_path / "a", database), Scores(tmp_path / "b", database, "trusted0")
    assert fetched(database, f"SELECT id, score FROM {one.samples} ORDER BY id") == [(0, 1.0), (1, 2.0)]
    assert fetched(database, f"SELECT id, score FROM {other.samples}") == [("z", 4.0)]


@pytest.mark.parametrize("labels", [[9, 4, 0], None])
def test_classes_are_those_of_a_samples_last_epoch_with_labels_or_without(labels, tmp_path):
    columns = {"epoch": [0, 1, 2], "score": 1.0, "label": labels, "predicted": [7, 2, 0]}
    write_ledger(tmp_path, {"id": ["a", "a", "b"]} | columns)
    assert [row[4:6] for row in samples(tmp_path)] == ([(4, 2), (0, 0)] if labels else [(None, 2), (None, 0)])


@for_each("name", ["epoch=9", "id=4", "flag=zero", "it's", "run[1]", "a*b?"])
def test_what_the_folder_is_called_does_not_matter(name, tmp_path):
    write_ledger(tmp_path / name, {"id": [1, 1, 2], "epoch": [0, 1, 1], "score": [0.5, 1.5, None], "flag": "overflow"})
    assert samples(tmp_path / name) == [(1, 1.0, 2, 1.0, None, None, None), (2, None, 0, None, None, None, "overflow")]


def flip(part, position, bit=1):
    content = bytearray(part.read_bytes())
    content[position] ^= bit
    part.write_bytes(content)


def ends(part):
    """Where each column's last page ends."""
    columns = pq.read_metadata(part).row_group(0).to_dict()["columns"]
    return {c["path_in_schema"]: c["dictionary_page_offset"] + c["total_compressed_size"] for c in columns}


READ = ["id", "epoch", "step", "batch", "rank", "position", "attempt", "score", "weight", "batch_size", "flag", "label"]


def test_a_flipped_byte_in_any_column_that_is_read_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(1 << 30, size=400)
    write_ledger(tmp_path, {"id": range(400), "score": values / 7, "label": values, "predicted": values[::-1]})
    (part,) = tmp_path.glob("*.parquet")
    content = part.read_bytes()
    for column in (*READ, "predicted"):
        part.write_bytes(content)
        flip(part, ends(part)[column] - 1)
        message = re.escape(f"1 of 1 parts are damaged: {part.name} (400 rows: ")
        with case(column), pytest.raises(LedgerError, match=message):
            samples(tmp_path)
    part.write_bytes(content)
    assert len(samples(tmp_path)) == 400


def test_of_restricted_columns_only_the_checksums_of_these_count(tmp_path):
    write_scores(tmp_path, np.arange(50) / 7, loss=np.arange(50) / 3)
    (part,) = tmp_path.glob("*.parquet")
    flip(part, ends(part)["loss"] - 1)
    assert Ledger(tmp_path).parts(["id", "score"]).paths == (part,)
    for columns in (None, ["id", "loss"], ["loss"]):
        with pytest.raises(LedgerError, match="1 of 1 parts are damaged"):
            Ledger(tmp_path).parts(columns)


@pytest.mark.slow
def test_a_flipped_bit_in_a_parts_description_is_an_error_or_harmless(run_seed, tmp_path, database):
    ids = list(range(0x11223300, 0x11223328))
    write_ledger(tmp_path, {"id": ids, "score": 1.0, "label": 3, "epoch": [i % 4 for i in ids]})
    (part,) = tmp_path.glob("*.parquet")
    good, content = samples(tmp_path), part.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    draw = np.random.default_rng(run_seed)
    for position in draw.choice(range(start, len(content)), size=200, replace=False).tolist():
        part.write_bytes(content)
        flip(part, position, bit := 1 << int(draw.integers(8)))
        try:
            found = samples_in(database, tmp_path, f"flipped{position}")
        except (LedgerError, CurationError):
            continue
        assert found == good, f"bit {bit} of byte {position} of {len(content)}"


def test_damaged_and_missing_parts_are_named_and_the_rest_is_read(tmp_path):
    rows = [{"id": k, "score": k, "part": k // 2} for k in range(10)]
    write_ledger(tmp_path, rows)
    parts = sorted(tmp_path.glob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-30])
    flip(parts[1], ends(parts[1])["score"] - 1)
    parts[3].unlink()
    with pytest.raises(LedgerError) as raised:
        Ledger(tmp_path).parts()
    assert str(raised.value).startswith(f"{tmp_path}: 2 of 4 parts are damaged: {parts[0].name} (2 rows: ")
    missing = "attempt 0, rank 0, part 3 (missing). `allow_partial=True` reads the rest."
    assert str(raised.value).endswith(f"); and rows are missing: {missing}")
    told = []
    found = Ledger(tmp_path).parts(allow_partial=True, advance=lambda *of: told.append(of))
    assert (found.paths, found.attempts, found.id_type) == ((parts[2], parts[4]), (0,), pa.int64())
    assert found.lost[0] == "attempt 0, rank 0, part 3 (missing)"
    assert [lost[: lost.index(":")] for lost in found.lost[1:]] == [f"{part.name} (2 rows" for part in parts[:2]]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row[0] for row in samples(tmp_path, allow_partial=True)] == [4, 5, 8, 9]


def test_a_lost_attempt_that_superseded_all_leaves_no_rows(tmp_path):
    write_ledger(tmp_path, {"id": [1, 2], "attempt": [0, 1], "score": 1.0}, starts=(0, 0))
    (part,) = tmp_path.glob("*-a1-*")
    part.write_bytes(b"")
    with pytest.raises(LedgerError, match=re.escape(f"{tmp_path} holds no rows")):
        samples(tmp_path, allow_partial=True)


def test_parts_say_what_was_gone_over_again_and_whether_there_are_labels(tmp_path):
    rows = [{"id": k, "step": k, "attempt": k // 3} for k in range(4)] + [{"id": 9, "step": 2, "attempt": 2}]
    write_ledger(tmp_path, rows, starts=(0, 1, 2))
    found = Ledger(tmp_path).parts()
    assert (dict(found.until), found.attempts, found.has_classes, found.lost) == ({0: 1, 1: 2}, (0, 2), False, ())
    write_ledger(tmp_path / "b", {"id": ["x", "y"], "label": [None, 3], "part": [0, 1]})
    found = Ledger(tmp_path / "b").parts(["id"])
    assert (dict(found.until), found.attempts, found.has_classes, found.id_type) == ({}, (0,), True, pa.string())


def test_mixed_ids_other_settings_and_other_runs_are_refused(tmp_path):
    run = write_ledger(tmp_path / "a", [{"id": 1}])
    other = CONFIG | {"temperature": 0.1}
    with pytest.warns(UserWarning, match="temperature"):
        write_ledger(tmp_path / "a", [{"id": 2, "step": 3}], starts=(3,), configs=other, run=run)
    with pytest.raises(LedgerError, match=r"/a: its attempts differ in temperature: 0\.5, 0\.1, so their scores are"):
        Ledger(tmp_path / "a").parts()
    write_ledger(tmp_path / "b", [{"id": 1}])
    (part,) = (tmp_path / "b").glob("*.parquet")
    write_ledger(tmp_path / "c", [{"id": "1"}])
    (named,) = (tmp_path / "c").glob("*.parquet")
    named.rename(part.with_name(part.name.replace("-r0-", "-r1-")))
    message = f"{tmp_path / 'b'} mixes int and str ids"
    with pytest.raises(LedgerError, match=re.escape(message)):
        Ledger(tmp_path / "b").parts()
    part.rename(part.with_name(part.name.replace("-a0-", "-a2-")))
    with pytest.raises(LedgerError, match=re.escape("parts of attempt 2, which its _meta.json does not know.")):
        Ledger(tmp_path / "b").parts()
