"""The commands of docs/datacomp.md, as they are written there, on a small pool of DataComp's layout."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_module

from lightning_mimic.cli import curate as commands
from support.cases import case
from support.ledgers import write_scores

PAGE = (Path(__file__).parent.parent / "docs" / "datacomp.md").read_text()
MAINS = {"mimic-curate": commands.curate_main, "mimic-select": commands.select_main}
MAINS["mimic-compare"] = commands.compare_main


def written():
    """The words of each command, in the order of the page."""
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [words for words in lines if words and words[0].startswith("mimic-")]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """997 pairs in three metadata files; 700 of them were scored, and one has no CLIP score."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    uids = [generator.bytes(16).hex() for _ in range(997)]
    clip = generator.standard_normal(997)
    clip[5] = np.nan
    folder = Path("pool", "metadata")
    folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(997), 3)):
        columns = {"uid": [uids[k] for k in part], "clip_l14_similarity_score": clip[part]}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    scores = generator.standard_normal(700)
    write_scores(Path("runs", "small", "scores"), scores, ids=uids[:700])
    return uids, clip, scores.astype(np.float32)


def as_datacomp(uids):
    return sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in uids)


@pytest.mark.slow
def test_the_filters_are_what_numpy_selects(pool, monkeypatch, capsys):
    uids, clip, scores = pool
    offline = [words for words in written() if words[0] in MAINS]
    assert [words[0] for words in offline] == ["mimic-curate", "mimic-curate", "mimic-select", "mimic-compare"]
    for words in offline:
        monkeypatch.setattr("sys.argv", words)
        MAINS[words[0]]()
    assert "top30" in capsys.readouterr().out
    positive = {uids[k] for k in np.flatnonzero(scores >= 0)}
    best = {uids[k] for k in np.argsort(-scores)[: round(0.3 * 700)]}
    edge = -np.sort(-clip)[int(0.3 * 997)]
    both = {uids[k] for k in np.flatnonzero(clip >= edge)} & positive
    for path, want in (("curated/kept.npy", positive), ("top30/kept.npy", best), ("both.kept.npy", both)):
        with case(path):
            subset = np.load(path)
            assert subset.dtype == np.dtype("u8,u8")
            assert subset.tolist() == as_datacomp(want)


def test_the_training_commands_are_whole_configurations():
    trained = [words for words in written() if words[0] == "mimic-train"]
    assert len(trained) == 2
    for words in trained:
        with initialize_config_module("lightning_mimic.conf", version_base="1.3"), case(words):
            config = compose("train", words[1:])
        assert config.data.shards == "pool/shards/{00000000..00001287}.tar"
        assert config.trainer.devices * config.data.batch_size == 4096


def test_what_is_taken_out_of_a_checkpoint_is_a_model_of_open_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vision, text = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32}, {"layers": 1, "width": 64, "heads": 2}
    trained = open_clip.CLIP(64, vision, text)
    weights = {f"towers.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": weights | {"zero_shot.weight": torch.zeros(1)}}, "filtered.ckpt")
    exec(*re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), {})
    Path("small.json").write_text(json.dumps({"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config("small.json")
    read = open_clip.create_model("small", pretrained="filtered.pt")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], tensor, rtol=0, atol=0)
