"""The page on own scorers, weightings and layers runs as it stands."""

import re
from pathlib import Path

import torch

from lightning_mimic.gradients import layer_rules

PAGE = (Path(__file__).parent.parent / "docs" / "contributing" / "extending.md").read_text()


def test_the_code_runs(monkeypatch, capsys):
    monkeypatch.setattr(layer_rules, "_REGISTERED", {})
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "extending"}  # later blocks go on from the first
    for block in blocks:
        exec(compile(block, "extending.md", "exec"), names)
    assert len(blocks) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["tensor([ 1.6667, -0.2000])", "tensor([0.7500, 0.2500])", str(torch.Size([5]))]
