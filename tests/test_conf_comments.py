"""Every file and every setting of conf/ has a comment, from which help texts and documentation are made."""

import pytest

from lightning_mimic.cli.conf_comments import Setting, read_conf
from support.configs import CONF

FILES = sorted(CONF.rglob("*.yaml"))
# Experiments only override settings of other groups, where these have their comments.
OBJECTS = [path for path in FILES if "experiment" not in path.parts]


def name(path):
    return path.relative_to(CONF).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_has_a_summary(path):
    summary = read_conf(path).summary
    assert summary[0].isupper()
    assert summary.endswith(".")
    assert "@package" not in summary


def test_every_setting_has_a_comment():
    bare = [f"{name(path)}: {each.key}" for path in OBJECTS for each in read_conf(path).settings if not each.comment]
    assert bare == []


def test_what_is_read(tmp_path):
    (tmp_path / "base.yaml").write_text("# A base.\n_target_: pkg.Net\nwidth: 64 # of the hidden layer\n")
    (tmp_path / "option.yaml").write_text(
        "# @package _global_\n# Two\n# lines.\ndefaults:\n  - base\n  - noise: symmetric\n  - _self_\n\n"
        "width: 8\nempty: # nothing\nlisted: [1, 2] # two numbers\ntext: 'a # b' # quoted\n"
        "optimizer: # any\n  _partial_: true\n  lr: 1e-3 # learning rate\nhydra:\n  run: none\n"
    )
    read = read_conf(tmp_path / "option.yaml")
    assert (read.summary, read.target) == ("Two lines.", "pkg.Net")
    assert read.defaults == [("", "base"), ("noise", "symmetric"), ("", "_self_")]
    assert read.settings == [
        Setting("width", "8", "of the hidden layer"),
        Setting("empty", "null", "nothing"),
        Setting("listed", "[1, 2]", "two numbers"),
        Setting("text", "'a # b'", "quoted"),
        Setting("optimizer", "", "any"),
        Setting("optimizer.lr", "1e-3", "learning rate"),
    ]
