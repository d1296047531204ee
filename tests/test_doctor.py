"""``mimic-doctor``: what a bug report needs, also where something is missing or broken."""

import importlib
import sys
from importlib import metadata

import pytest
import torch

from lightning_mimic.cli import doctor
from lightning_mimic.version import __version__


def lines(text, start):
    return [line.strip() for line in text.splitlines() if line.strip().startswith(start)]


def test_versions_extras_and_devices_are_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mimic-doctor"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    doctor.main()
    text = capsys.readouterr().out
    assert text.startswith(f"lightning-mimic {__version__}\npython {sys.version.split()[0]} ")
    assert lines(text, "torch ") == [f"torch {metadata.version('torch')}"]
    extras = ["clip", "curation", "loggers", "report", "s3", "vision"]
    assert lines(text, "optional") == [f"optional packages of pip install 'lightning-mimic[{name}]'" for name in extras]
    assert lines(text, "duckdb ") == [f"duckdb {metadata.version('duckdb')}"] * 2
    assert len(lines(text, "cuda: ")) == len(lines(text, "mps: ")) == 1
    assert "WORLD_SIZE=2" in lines(text, "ranks: ")[0]


def test_what_is_missing_or_too_old_is_named(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "timm":
            raise metadata.PackageNotFoundError
        return "0.1" if name == "duckdb" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    text = doctor.checkup()
    assert lines(text, "timm ") == ["timm missing"]
    assert lines(text, "duckdb ") == ["duckdb 0.1; >=2.0 is needed"] * 2


@pytest.mark.parametrize("error", [OSError("libtorch.so is damaged"), ImportError("no torch")])
def test_a_torch_that_cannot_be_imported_is_a_line_of_the_report(error, monkeypatch):
    def broken(name):
        assert name == "torch"
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert lines(doctor.checkup(), "devices: ") == [f"devices: torch cannot be used: {type(error).__name__}: {error}"]


def test_devices_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"card {k}")
    assert lines(doctor.checkup(), "cuda: ")[0].startswith("cuda: card 0, card 1 (")
