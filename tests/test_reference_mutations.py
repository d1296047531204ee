"""Damaged references: the right tensors or an error, and where there are checksums never other numbers."""

import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_mimic.reference import ReferenceLoadError, read_reference
from support.checkpoints import mutated, weights, write_distributed, write_shards

TRIES = 150


def archive(path: Path) -> None:
    torch.save({"state_dict": weights(), "epoch": 3}, path)


FORMATS = {
    "archive": archive,
    "legacy": lambda path: torch.save(weights(), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(weights(), path),
    "shards": lambda path: write_shards(path, weights()),
    "shards of torch": lambda path: write_shards(path, weights(), "bin"),
    "distributed": lambda path: write_distributed(path, {"model": weights()}),
}
#: Those whose tensors' numbers have checksums.
CHECKED = {"archive", "shards of torch", "distributed"}


@pytest.mark.random
@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_reference_is_read_rightly_or_refused(form, tmp_path):
    path, source = tmp_path / "reference", random.Random(form)
    FORMATS[form](path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    intact, outcomes = {file: file.read_bytes() for file in files}, {"read": 0, "refused": 0}
    for _ in range(TRIES):
        file = source.choice(files)
        file.write_bytes(mutated(intact[file], source))
        start = time.monotonic()
        found = None
        with suppress(ReferenceLoadError):
            found = read_reference(path)
        outcomes["refused" if found is None else "read"] += 1
        if found is not None and form in CHECKED:
            torch.testing.assert_close(found, weights(), rtol=0, atol=0)
        assert time.monotonic() - start < 10
        file.write_bytes(intact[file])
    assert outcomes["refused"] > TRIES // 2
    torch.testing.assert_close(read_reference(path), weights(), rtol=0, atol=0)
    shutil.rmtree(path, ignore_errors=True)
