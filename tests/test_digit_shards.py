"""The digits with captions: parts that do not overlap, captions that say what `truth.parquet` says, and the layout."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from sklearn.datasets import load_digits

from lightning_mimic.cli.make_shards import main
from lightning_mimic.data.digit_pairs import (
    CLASS_NAMES,
    TEMPLATES,
    encode_png,
    pair_id,
    split_digit_pairs,
    write_digit_shards,
)
from lightning_mimic.data.digits import DigitsDataModule
from lightning_mimic.data.noise import SymmetricNoise
from lightning_mimic.errors import MimicError

SEED = 10
PARTS = {"reference": 300, "val": 100, "pool": 897}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    write_digit_shards(folder, SEED, 0.4)
    return folder


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    digits = DigitsDataModule(train="trusted", split_seed=SEED)
    digits.setup()
    return digits


def pairs_of(tar: Path) -> list[dict[str, bytes]]:
    """In the order of the shard; the parts of one pair stand together."""
    pairs: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as opened:
        for member in opened:
            key, _, suffix = member.name.partition(".")
            assert not pairs or key not in list(pairs)[:-1]
            pairs.setdefault(key, {})[suffix] = opened.extractfile(member).read()  # type: ignore[union-attr]
    return list(pairs.values())


def truth_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "truth.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_parts_share_no_image_and_leave_out_the_test_images(digits: DigitsDataModule) -> None:
    rows = {part: rows.tolist() for part, (rows, _, _) in split_digit_pairs(SEED, 0.4).items()}
    assert {part: len(of_part) for part, of_part in rows.items()} == PARTS
    trusted = [sample.id for sample in digits.train_dataloader().dataset]
    assert rows["reference"][:150] == trusted[:150]
    assert rows["val"][:50] == trusted[150:]  # those that DigitsDataModule validates on
    test = [sample.id for sample in digits.test_dataloader().dataset]
    assert sorted(sum(rows.values(), test)) == list(range(1797))


def test_only_captions_of_the_pool_are_wrong_and_as_many_as_asked_for() -> None:
    _, shown, named = (pieces := split_digit_pairs(SEED, 0.4))["pool"]
    assert torch.equal(named, SymmetricNoise(0.4, SEED)(shown, 10)[0])
    assert int((shown != named).sum()) == int(0.4 * 897)
    assert all(torch.equal(*pieces[part][1:]) for part in ("reference", "val"))
    assert torch.equal(*split_digit_pairs(SEED, 0.0)["pool"][1:])


@pytest.mark.parametrize("part", PARTS)
def test_every_pair_is_complete_and_its_caption_is_what_the_truth_says(
    out: Path, digits: DigitsDataModule, part: str
) -> None:
    from PIL import Image

    truth = truth_of(out)
    target = load_digits().target
    row_of = {pair_id(SEED, row): row for row in split_digit_pairs(SEED, 0.4)[part][0].tolist()}
    captions = {t.format(name): digit for digit, name in enumerate(CLASS_NAMES) for t in TEMPLATES}
    sizes, seen = json.loads((out / part / "sizes.json").read_text()), []
    assert list(sizes) == sorted(path.name for path in (out / part).glob("*.tar"))
    for shard, size in sizes.items():
        pairs = pairs_of(out / part / shard)
        metadata = pq.read_table((out / part / shard).with_suffix(".parquet")).to_pylist()
        assert len(pairs) == size == len(metadata)
        for pair, about in zip(pairs, metadata, strict=True):
            described = json.loads(pair["json"])
            assert described["caption"] == pair["txt"].decode() == about["text"]
            assert described["uid"] == about["uid"]
            assert hashlib.sha256(pair["png"]).hexdigest() == about["sha256"]
            row = row_of[described["uid"]]
            digit = target[row]
            stated = truth[described["uid"]]
            assert stated["digit"] == digit
            assert stated["mismatched"] == (captions[described["caption"]] != digit)
            image = Image.open(io.BytesIO(pair["png"]))
            grey = digits.images(torch.tensor(row))[0].mul(255).byte()
            assert image.mode == "RGB"
            assert image.tobytes() == bytes(grey.flatten().repeat_interleave(3).tolist())
            seen.append(described["uid"])
    assert sorted(seen) == sorted(row_of)


def test_every_template_is_used(out: Path) -> None:
    captions = {row["text"] for path in out.glob("*/*.parquet") for row in pq.read_table(path).to_pylist()}
    assert captions == {template.format(name) for name in CLASS_NAMES for template in TEMPLATES}


def test_images_are_those_zero_shot_sees(digits: DigitsDataModule) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image
    from torchvision.transforms.functional import to_pil_image

    image = digits.images(torch.tensor(0))
    assert Image.open(io.BytesIO(encode_png(image))).tobytes() == to_pil_image(image).convert("RGB").tobytes()


def test_the_same_arguments_write_the_same_bytes(out: Path, tmp_path: Path) -> None:
    write_digit_shards(tmp_path / "again", SEED, 0.4)
    write_digit_shards(tmp_path / "other", SEED + 1, 0.4)
    files = [path.relative_to(out) for path in out.rglob("*.*") if path.is_file()]
    assert len(files) == 13 * 2 + 3 + 1
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert not set(truth_of(out)) & set(truth_of(tmp_path / "other"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mimic-make-shards", *words])
    main()


#: Writes the shards, and is killed at a file in the middle of one.
KILLED = """
import itertools, os, signal, sys, tarfile
from lightning_mimic.data.digit_pairs import write_digit_shards
add, count = tarfile.TarFile.addfile, itertools.count()
def addfile(self, *args):
    if next(count) == 2350:
        self.fileobj.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, *args)
tarfile.TarFile.addfile = addfile
write_digit_shards(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
def test_a_writer_that_is_killed_leaves_no_half_of_the_shards(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "made"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    write_digit_shards(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("files", [1, 2350])
def test_shards_are_all_there_or_none(files, tmp_path, monkeypatch):
    add, count = tarfile.TarFile.addfile, iter(range(1, 10**6))

    def addfile(self, *args):
        if next(count) == files:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(MimicError, match=r"^`out`: .*/made cannot be written: No space left on device\.$"):
            write_digit_shards(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    write_digit_shards(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "truth.parquet").exists()


def test_the_command_writes_the_shards_of_the_experiment(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, f"seed={SEED}")
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said == {"shards": "outputs/digit_shards", "next": "mimic-train experiment=clip_digits_reference"}
    written = tmp_path / "outputs" / "digit_shards"
    assert (written / "truth.parquet").read_bytes() == (out / "truth.parquet").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    with initialize_config_module("lightning_mimic.conf", version_base="1.3"):
        config = compose("train", overrides=["experiment=clip_digits", "paths.output=run"])
        data = instantiate(config.data)
    data.setup()
    assert sum(len(batch.ids) for batch in data.train_dataloader()) == PARTS["pool"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out=full"], "`out`: full is not an empty directory"),
        (["mismatched=1.5"], "`mismatched` is 1.5; expected the share"),
    ],
)
def test_the_command_refuses_in_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert str(ended.value).startswith(f"mimic-make-shards: {said}")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
