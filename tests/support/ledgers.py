"""Small real ledgers, as training writes them, from plain lists."""

from collections import Counter
from itertools import chain

import numpy as np

from lightning_mimic.ledger import Ledger, LedgerWriter, open_run
from lightning_mimic.ledger.description import meta_path, write_meta

CONFIG = {"reweight": "all", "temperature": 0.5}


def write_ledger(folder, rows, *, starts=(0,), configs=CONFIG, run=None, notes=()):
    """Writes rows where their ``attempt``, ``rank`` and ``part`` (each 0, if left out) say; returns the run's id.

    Args:
        folder: The ledger's directory, made if it is not there.
        rows: A list of dicts, or a dict of columns (a single value stands for a whole column). Only ``id`` is needed.
            Left out, ``epoch`` is 0, ``step`` the epoch, ``batch`` 0, ``position`` the row's place in the list,
            ``batch_size`` how many rows share attempt, epoch, step and batch, ``weight`` 1/batch_size, ``flag`` "ok",
            and ``score``, ``loss``, ``label``, ``predicted`` null. A score of NaN or ``None`` is written as null.
        starts: First step of each attempt; one number per attempt.
        configs: What decides the meaning of the scores: one for all attempts, or a list of one per attempt (the
            writer warns where two differ).
        run: Of an earlier call whose ledger goes on; attempts are numbered from there.
        notes: More for the description, for example ``{"score_kind": "own"}``.

    Example::

        write_ledger(tmp_path, {"id": [4, 5, 4, 5], "epoch": [0, 0, 1, 1], "score": [0.5, -1.0, 0.25, None]})
        write_ledger(tmp_path, [{"id": "a", "score": 1.0}, {"id": "b", "rank": 1, "flag": "alone"}])
    """
    columns = _columns(rows)
    attempts = columns.pop("attempt")
    places = list(zip(attempts, columns.pop("part"), columns.pop("rank"), strict=True))
    for number, start in enumerate(starts):
        config = configs[number] if isinstance(configs, list | tuple) else configs
        opened = open_run(folder, config, start, run, dict(notes))
        run, attempt = opened.run, opened.attempt
        writers = {}
        for place in sorted({place for place in places if place[0] == number}):
            writer = writers.setdefault(place[2], LedgerWriter(folder, run, attempt, place[2]))
            here = [i for i, there in enumerate(places) if there == place]
            writer.append({name: [values[i] for i in here] for name, values in columns.items()})
            writer.flush()
        opened.close()
    return run


def note(folder, attempt, notes):
    """Adds to the description of an attempt, as if it had noted that itself; ``None`` takes a note away."""
    meta = Ledger(folder).meta
    facts = meta["attempts"][attempt] | notes
    meta["attempts"][attempt] = {name: value for name, value in facts.items() if notes.get(name, "") is not None}
    write_meta(meta_path(folder), meta)


def write_scores(folder, scores, *, ids=None, epochs=None, **columns):
    """Writes one scoring of every sample in every epoch; returns the run's id.

    Args:
        folder: The ledger's directory.
        scores: Shape ``(epochs, samples)``, or ``(samples,)`` for one epoch; NaN where there is no score.
        ids: Of the samples; 0, 1, 2, ... if left out.
        epochs: Their numbers; 0, 1, 2, ... if left out.
        columns: More, each of the scores' shape or ``(samples,)`` or a single value.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    many, n = scores.shape
    ids = range(n) if ids is None else ids
    epochs = range(many) if epochs is None else epochs
    filled = {name: np.broadcast_to(np.asarray(values), scores.shape).ravel() for name, values in columns.items()}
    plain = {"id": list(ids) * many, "epoch": np.repeat(list(epochs), n), "position": list(range(n)) * many}
    return write_ledger(folder, plain | {"score": scores.ravel()} | filled)


def _columns(rows):
    if not isinstance(rows, dict):
        names = dict.fromkeys(chain(["id"], *rows))
        rows = {name: [row.get(name, _LEFT_OUT) for row in rows] for name in names}
    n = len(rows["id"])
    full = {name: _listed(rows.get(name, _LEFT_OUT), n) for name in {**_DEFAULTS, **rows}}

    def fill(name, values):
        full[name] = [new if old is _LEFT_OUT else old for old, new in zip(full[name], values, strict=True)]

    for name, value in _DEFAULTS.items():
        fill(name, [value] * n)
    fill("step", full["epoch"])
    fill("position", range(n))
    batches = list(zip(full["attempt"], full["epoch"], full["step"], full["batch"], strict=True))
    sizes = Counter(batches)
    fill("batch_size", [sizes[batch] for batch in batches])
    fill("weight", [None if size is None else 1 / size for size in full["batch_size"]])
    return full


_LEFT_OUT = object()
_DEFAULTS = {"epoch": 0, "batch": 0, "attempt": 0, "rank": 0, "part": 0, "flag": "ok"}
_DEFAULTS |= dict.fromkeys(["score", "loss", "label", "predicted"])
_DEFAULTS |= dict.fromkeys(["step", "position", "batch_size", "weight"], _LEFT_OUT)


def _listed(values, n):
    if isinstance(values, str) or not hasattr(values, "__len__"):
        return [values] * n
    return values.tolist() if hasattr(values, "tolist") else list(values)
