"""Calibrated data quality, estimated from ledgers of trusted samples with true and with wrong labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mimic.curation.reference_facts import last_calibration
from lightning_mimic.curation.scorer_meaning import missing_basis
from lightning_mimic.curation.scores import Scores
from lightning_mimic.errors import CurationError
from lightning_mimic.ledger.description import meaning
from lightning_mimic.metrics.estimate import Quality, estimate_quality, tells_apart
from lightning_mimic.user_files import user_path

#: Settings that must be equal for the scores of two ledgers to be comparable.
_SAME = ("scorer", "scorer_settings", "reference", "aligned_every", "aligned_rotate", "parameters", "direction")
#: SQL conditions for whether a sample counts as kept; null if unknown.
_AGREES, _SIGN = "reference_predicted = label", "score >= 0"
_PREDICTED = "reference_predicted"


def calibrated_quality(
    data: Scores, trusted: str | Path | None, mislabelled: str | Path | Sequence[str | Path] | None
) -> Quality | None:
    """Estimate the share of good samples in a ledger; ``None`` without trusted samples.

    If the ledgers hold the labels predicted by the reference, a sample counts as kept if the prediction equals the
    given label. The reference treats trusted samples like the data; a model trained on the data does not, because it
    memorises them. Posteriors are unsuitable, because those of each ledger depend on the share of wrong labels in that
    ledger. Without predictions, a sample counts as kept by the sign of its mean score.

    Args:
        data: Scores of the data.
        trusted: Ledger with true labels, see :func:`~lightning_mimic.curation.curate`.
        mislabelled: Ledgers with wrong labels, see :func:`~lightning_mimic.curation.curate`.

    Raises:
        CurationError: The ledgers differ in their samples, settings or checkpoints, or the sign of the scores is
            meaningless or does not separate true from wrong labels.
    """
    if trusted is None or mislabelled is None:
        return None
    wrong: Sequence[Any] = mislabelled if isinstance(mislabelled, list | tuple) else [mislabelled]
    ledgers = [user_path(trusted, "trusted"), *(user_path(each, "mislabelled") for each in wrong)]
    if len(ledgers) < 2:
        raise CurationError("`mislabelled` is empty; expected at least one ledger.")
    calibrating = [Scores(ledger, data.database, f"trusted{k}") for k, ledger in enumerate(ledgers)]
    for scores in calibrating:
        _check_same(data, scores)
    _check_paired(calibrating)
    if _predicted_alike(data, calibrating):
        kept, samples = _counted(data, _AGREES)
        return estimate_quality(kept, samples, *_agreements(calibrating), basis="agreement")
    missing = missing_basis(data.config, "zero")
    if missing is not None:
        raise CurationError(
            "`trusted`: the reference's predictions are not in every ledger, so that the quality would be estimated "
            f"from the sign of scores, but {data.ledger.directory} holds {missing}."
        )
    kept, samples = _counted(data, _SIGN)
    if not samples:
        raise CurationError(f"{data.ledger.directory}: none of its samples has a score.")
    at_first = tells_apart(*_signs(calibrating, first=True))
    return estimate_quality(kept, samples, *_signs(calibrating), told_apart_at_first=at_first)


def _check_same(data: Scores, scores: Scores) -> None:
    """Raise ``CurationError`` unless trusted samples were scored with the data's settings and at its checkpoints."""
    ours, theirs = _scored_when(data), _scored_when(scores)
    if ours != theirs:
        raise CurationError(
            f"{scores.ledger.directory} was scored {theirs}, but {data.ledger.directory} {ours}. Scores change as the "
            "model learns, so that an estimate from both would be biased: score both at the same checkpoints "
            "(mimic-score, AtCheckpoints)."
        )
    configs = meaning(data.config), meaning(scores.config)
    for name in _SAME:
        own, other = (config.get(name) for config in configs)
        if own != other:
            raise CurationError(
                f"{scores.ledger.directory} was scored with another {name} than {data.ledger.directory} "
                f"({other} instead of {own}), so that their scores are not comparable. Score both with the same "
                "settings."
            )


def _check_paired(calibrating: Sequence[Scores]) -> None:
    """Raise ``CurationError`` unless all ledgers hold the same samples."""
    first, *others = calibrating
    for other in others:
        joined = f"{first.samples} FULL JOIN {other.samples} USING (id)"
        unpaired = f"FROM {joined} WHERE {first.samples}.seen IS NULL OR {other.samples}.seen IS NULL"
        if other.id_type != first.id_type or first.database.value(f"SELECT count(*) {unpaired}"):
            raise CurationError(
                f"{other.ledger.directory} and {first.ledger.directory} have different ids; expected the same "
                "samples, with wrong and with true labels."
            )


def _scored_when(scores: Scores) -> str:
    """Return when samples were scored, as a phrase."""
    checkpoints = scores.attempts[-1].get("checkpoints")
    if checkpoints is None:
        return "while a model was trained on it"
    return "at checkpoints " + ", ".join(each["sha256"][:8] for each in checkpoints)


def _predicted_alike(data: Scores, calibrating: Sequence[Scores]) -> bool:
    """Return whether most samples of the data and the trusted samples have a label and a comparable prediction.

    Class biases change the predictions of a reference, so either both ledgers have them or neither. If both do, they
    are estimates of the same biases.
    """
    calibrations = [last_calibration(scores.attempts) for scores in (data, calibrating[0])]
    biased = [isinstance(each, dict) and each.get("biases") is not None for each in calibrations]
    if biased[0] != biased[1] or not all(_PREDICTED in scores.columns for scores in (data, calibrating[0])):
        return False
    known = all(_most_have(scores, _AGREES) for scores in (data, calibrating[0]))
    return known and all(_most_have(scores, "label") for scores in calibrating)


def _most_have(scores: Scores, value: str) -> bool:
    """Return whether an SQL value is known for more than half of the samples."""
    known, samples = scores.database.row(f"SELECT count({value}), count(*) FROM {scores.samples}")
    return bool(2 * known > samples)


def _counted(scores: Scores, keeps: str) -> tuple[int, int]:
    """Return the number of kept samples, and the number of samples for which this is known."""
    kept, known = scores.database.row(f"SELECT count_if({keeps}), count({keeps}) FROM {scores.samples}")
    return int(kept), int(known)


def _agreements(calibrating: Sequence[Scores]) -> tuple[list[bool], list[list[bool]]]:
    """Return whether the reference predicts each trusted sample's true label, and each of its wrong labels.

    All predictions are from the ledger with true labels, because a reference cannot be calibrated on wrong labels only.
    """
    first = calibrating[0]
    joined = " ".join(
        f"JOIN (SELECT id, label AS label{k} FROM {scores.samples}) AS part{k} USING (id)"
        for k, scores in enumerate(calibrating)
    )
    labels = [f"label{k}" for k in range(len(calibrating))]
    known = " AND ".join(f"{each} IS NOT NULL" for each in (_PREDICTED, *labels))
    answers = ", ".join(f"{_PREDICTED} = {each}" for each in labels)
    return _split(first.database.rows(f"SELECT {answers} FROM {first.samples} {joined} WHERE {known}"))


def _signs(calibrating: Sequence[Scores], *, first: bool = False) -> tuple[list[bool], list[list[bool]]]:
    """Return whether each trusted sample's mean score is 0 or more with its true label, and with each wrong label.

    Args:
        calibrating: Scores with true labels, followed by those with wrong labels.
        first: Whether to use the scores of the first epoch instead of the means.
    """
    parts = []
    for k, scores in enumerate(calibrating):
        rows = scores.samples
        if first:
            rows = f"{scores.scorings().name} QUALIFY row_number() OVER (PARTITION BY id ORDER BY epoch) = 1"
        parts.append(f"(SELECT id, {_SIGN} AS sign{k} FROM {rows}) AS part{k}")
    names = [f"sign{k}" for k in range(len(parts))]
    joined = " ".join([parts[0], *(f"JOIN {part} USING (id)" for part in parts[1:])])
    known = " AND ".join(f"{name} IS NOT NULL" for name in names)
    return _split(calibrating[0].database.rows(f"SELECT {', '.join(names)} FROM {joined} WHERE {known}"))


def _split(answers: Sequence[tuple[bool, ...]]) -> tuple[list[bool], list[list[bool]]]:
    return [row[0] for row in answers], [list(row[1:]) for row in answers]
