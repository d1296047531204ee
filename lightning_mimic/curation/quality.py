"""The calibrated quality of a ledger's data, from ledgers of trusted samples with true and with wrong labels."""

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

#: What two ledgers' scores must have been taken with to mean the same.
_SAME = ("scorer", "scorer_settings", "reference", "aligned_every", "aligned_rotate", "parameters", "direction")
#: Whether a row of a table of samples is kept, null where that is not known.
_AGREES, _SIGN = "reference_predicted = label", "score >= 0"
_PREDICTED = "reference_predicted"


def calibrated_quality(
    data: Scores, trusted: str | Path | None, mislabelled: str | Path | Sequence[str | Path] | None
) -> Quality | None:
    """Estimate the share of good samples in a ledger; ``None`` without trusted samples.

    Where the ledgers hold the labels that the reference predicted, a sample counts as kept if that is the given one. A
    reference treats trusted samples as it does the data; a model that was trained on the data does not, as it memorises
    them. Posteriors would not do: each ledger's rest on the share of wrong labels in that ledger. Elsewhere a sample
    counts as kept by the sign of its mean score.

    Args:
        data: The data's scores.
        trusted: See :func:`~lightning_mimic.curation.curate`.
        mislabelled: Likewise.

    Raises:
        CurationError: Ledgers of other samples, settings or moments; scores whose sign means nothing, or that do not
            tell wrong labels apart.
    """
    if trusted is None or mislabelled is None:
        return None
    wrong: Sequence[Any] = mislabelled if isinstance(mislabelled, list | tuple) else [mislabelled]
    ledgers = [user_path(trusted, "trusted"), *(user_path(each, "mislabelled") for each in wrong)]
    if len(ledgers) < 2:
        raise CurationError("`mislabelled` is empty; expected one ledger or more.")
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
            "`trusted`: without the reference's predictions in every ledger, the quality is estimated by the sign of "
            f"scores, and {data.ledger.directory} holds {missing}."
        )
    kept, samples = _counted(data, _SIGN)
    if not samples:
        raise CurationError(f"{data.ledger.directory}: none of its samples has a score.")
    at_first = tells_apart(*_signs(calibrating, first=True))
    return estimate_quality(kept, samples, *_signs(calibrating), told_apart_at_first=at_first)


def _check_same(data: Scores, scores: Scores) -> None:
    """Raise ``CurationError`` unless trusted samples were scored as the data were, and when they were."""
    ours, theirs = _scored_when(data), _scored_when(scores)
    if ours != theirs:
        raise CurationError(
            f"{scores.ledger.directory} was scored {theirs}, and {data.ledger.directory} {ours}. A score changes as "
            "the model learns, so an estimate from both would be off: score both at the same checkpoints (mimic-score, "
            "AtCheckpoints)."
        )
    configs = meaning(data.config), meaning(scores.config)
    for name in _SAME:
        own, other = (config.get(name) for config in configs)
        if own != other:
            raise CurationError(
                f"{scores.ledger.directory} was scored with another {name} than {data.ledger.directory} "
                f"({other} against {own}); their scores do not compare."
            )


def _check_paired(calibrating: Sequence[Scores]) -> None:
    """Raise ``CurationError`` unless all ledgers hold the same samples."""
    first, *others = calibrating
    for other in others:
        joined = f"{first.samples} FULL JOIN {other.samples} USING (id)"
        unpaired = f"FROM {joined} WHERE {first.samples}.seen IS NULL OR {other.samples}.seen IS NULL"
        if other.id_type != first.id_type or first.database.value(f"SELECT count(*) {unpaired}"):
            raise CurationError(
                f"{other.ledger.directory} and {first.ledger.directory} must hold the same samples, with wrong and "
                "with true labels; their ids differ."
            )


def _scored_when(scores: Scores) -> str:
    """When scores were taken, as a phrase."""
    checkpoints = scores.attempts[-1].get("checkpoints")
    if checkpoints is None:
        return "while a model trained on it"
    return "at checkpoints " + ", ".join(each["sha256"][:8] for each in checkpoints)


def _predicted_alike(data: Scores, calibrating: Sequence[Scores]) -> bool:
    """Whether labels are known, and what the reference predicted, for the data as for the trusted samples.

    Class biases change what a reference predicts; those of two ledgers are estimates of the same ones.
    """
    calibrations = [last_calibration(scores.attempts) for scores in (data, calibrating[0])]
    biased = [isinstance(each, dict) and each.get("biases") is not None for each in calibrations]
    if biased[0] != biased[1] or not all(_PREDICTED in scores.columns for scores in (data, calibrating[0])):
        return False
    known = all(_most_have(scores, _AGREES) for scores in (data, calibrating[0]))
    return known and all(_most_have(scores, "label") for scores in calibrating)


def _most_have(scores: Scores, value: str) -> bool:
    """Whether an SQL value is known of more than half of the samples."""
    known, samples = scores.database.row(f"SELECT count({value}), count(*) FROM {scores.samples}")
    return bool(2 * known > samples)


def _counted(scores: Scores, keeps: str) -> tuple[int, int]:
    """How many samples are kept, of how many of which that is known."""
    kept, known = scores.database.row(f"SELECT count_if({keeps}), count({keeps}) FROM {scores.samples}")
    return int(kept), int(known)


def _agreements(calibrating: Sequence[Scores]) -> tuple[list[bool], list[list[bool]]]:
    """Whether the reference predicts each trusted sample's true label, and each of its wrong ones.

    All by the ledger with true labels: with wrong labels alone a reference cannot be calibrated.
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
    """Whether each trusted sample's mean score is 0 or more with its true label, and with each of its wrong ones.

    Args:
        calibrating: With true labels, and with wrong ones.
        first: The first epoch's scores instead of the means.
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
