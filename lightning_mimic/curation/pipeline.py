"""The function :func:`curate`, which turns a ledger of scores into a manifest of decisions."""

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_mimic.curation.corrections import apply_corrections
from lightning_mimic.curation.filters import Decision, DecisionRule, Posterior, Sign, checked_rule
from lightning_mimic.curation.partitions import write_partitions
from lightning_mimic.curation.quality import calibrated_quality
from lightning_mimic.curation.reference_facts import WrongShare, check_verdict, reference_verdict, wrong_share
from lightning_mimic.curation.scorer_meaning import missing_basis
from lightning_mimic.curation.scores import Scores
from lightning_mimic.curation.shares import SharedPartitions
from lightning_mimic.database import Database, Progress, parquet, quoted
from lightning_mimic.errors import CurationError, nearest_names
from lightning_mimic.files import TemporaryFolder, atomic_directory
from lightning_mimic.manifest import EXPORTS, Manifest, checked_exports, write_rows
from lightning_mimic.metrics.estimate import Quality
from lightning_mimic.tables import Table, settle_ids
from lightning_mimic.user_files import user_path, writing
from lightning_mimic.version import __version__

if TYPE_CHECKING:
    from lightning_mimic.report import Inline, Render

Unscored = Literal["keep", "drop", "fail"]
#: Facts about the attempt that the manifest records.
_NOTED = ("config", "data", "score_kind", "checkpoints")


#: Share of all samples above which dropped samples with right labels cause a warning.
_MANY = 0.05


@dataclass(frozen=True)
class Curation:
    """Hold the result of :func:`curate`.

    Attributes:
        manifest: Manifest with the decisions.
        samples: Number of samples in the manifest.
        kept: Number of kept samples.
        unscored: Number of samples on which the filter could not decide, usually for lack of a score.
        share_kept: Share of the scored samples with a mean score of 0 or more, whatever the filter; ``None`` if no
            sample has a score, or if 0 does not separate good from bad scores of this scorer.
        mean_score: Mean score of the scored samples, in loss per unit of weight distance; ``None`` without scores.
        mean_score_kept: Mean score of the kept samples, or ``None`` if none of them has a score. Comparable between
            pools that one model scored in one run.
        quality: Share of good samples, calibrated by trusted samples; ``None`` without them.
        lost: Parts and rows of the ledger that were damaged, missing or doubtful.
        files: Paths of all files written.
        verdict: Verdict on the reference: ``"compatible"``, ``"doubtful"``, ``"unsure"`` or ``"unrelated"``, the worst
            of the attempts whose rows are used; ``None`` if it was not diagnosed.
        wrong_share: Estimated share of wrong labels, from the calibration of the reference on the given labels;
            ``None`` if the ledger has no calibration.
    """

    manifest: Manifest
    samples: int
    kept: int
    unscored: int
    share_kept: float | None
    mean_score: float | None
    mean_score_kept: float | None
    quality: Quality | None
    lost: tuple[str, ...]
    files: tuple[Path, ...]
    verdict: str | None
    wrong_share: WrongShare | None

    def show(self, dataset: Any = None, samples: int = 10, render: "Render | None" = None) -> "Inline":
        """Return a notebook view with the figures and the most suspicious samples.

        Args:
            dataset: Data set with the samples, as for :func:`~lightning_mimic.curation.report`; ``None``: show neither
                images nor texts.
            samples: Number of samples to show.
            render: Function from a sample to a PIL image, a text, or a pair of them.

        Raises:
            MimicError: The data set has none of the samples, or a sample cannot be shown.
        """
        from lightning_mimic.report import manifest_view

        return manifest_view(self.manifest, dataset, samples, render)

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


def curate(  # noqa: PLR0913
    ledger: str | Path,
    filter: DecisionRule | None = None,
    out: str | Path | None = None,
    *,
    pool: str | Path | None = None,
    unscored: Unscored = "fail",
    trusted: str | Path | None = None,
    mislabelled: str | Path | Sequence[str | Path] | None = None,
    corrections: str | Path | None = None,
    exports: Sequence[str] = (),
    allow_partial: bool = False,
    accept_verdict: bool = False,
    partitioned: str | Path | None = None,
    memory: str = "2GB",
    progress: Progress | None = None,
) -> Curation:
    """Decide which samples to keep, and write a manifest.

    Args:
        ledger: Directory of the ledger with the recorded scores.
        filter: Decision rule; by default :class:`~lightning_mimic.curation.Sign`.
        out: Directory for the manifest and its exports, created when everything is complete; ``None``: a temporary
            directory, which is deleted with the manifest object of the result.
        pool: Parquet or CSV file whose column ``id`` lists all samples of the data set; an id that is listed twice gets
            two rows. ``None``: the samples of the ledger.
        unscored: Decision on samples without a score: ``"keep"``, ``"drop"``, or ``"fail"`` to raise an error.
        trusted: Ledger of trusted samples, scored with their true labels, that were used to train neither the reference
            nor the model. With ``mislabelled``, it calibrates the quality.
        mislabelled: Ledger of the same samples scored with wrong labels, or several ledgers with different wrong
            labels; more are better. All must be scored at the checkpoints at which the data were scored, with
            :class:`~lightning_mimic.AtCheckpoints`.
        corrections: CSV or Parquet file with manual corrections in columns ``id``, ``keep``, ``label`` and
            ``label_name``, as downloaded from the report page. An empty cell changes nothing. Corrected decisions have
            the reason ``by hand``; corrected labels are in the column ``corrected_label``, and
            :meth:`Manifest.subset` trains on them.
        exports: Further formats to write: ``"csv"``, ``"datacomp"``, ``"cleanlab"``.
        allow_partial: Whether to read the rest of the ledger if parts are damaged or rows are missing, instead of
            raising an error.
        accept_verdict: Whether to decide although the diagnosis found the reference ``doubtful`` or
            ``unsure``. With ``Posterior()``, for which the reference is calibrated, these need no acceptance.
        partitioned: Folder in which several processes have partitioned and summarised the ledger
            (:func:`~lightning_mimic.curation.partition_share`, :func:`~lightning_mimic.curation.summarise_partition`);
            ``None``: do both here.
        memory: Memory limit of the database, such as ``"2GB"``; larger data spill to disk.
        progress: Callback for progress, called with a description and the completed share.

    Raises:
        CurationError: An option, a table or the scores are invalid; the filter is meaningless for the scores of the
            ledger's scorer; or the reference is unrelated, or doubtful or unsure and not accepted.
        LedgerError: The ledger does not exist, is damaged, lacks rows or mixes runs.

    Warns:
        UserWarning: The quality estimated from the sign of scores contradicts the share of wrong labels, or most of the
            samples that the sign drops have right labels according to the calibrated reference.

    Example:
        >>> curate("nowhere")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.LedgerError: nowhere holds no ledger (no _meta.json in it).
    """
    _check_options(unscored, allow_partial=allow_partial, accept_verdict=accept_verdict)
    exports = checked_exports(exports)
    if (trusted is None) != (mislabelled is None):
        raise CurationError(
            "`trusted` and `mislabelled` need each other: give ledgers of the same samples, with true and with wrong "
            "labels."
        )
    chosen = Sign() if filter is None else checked_rule(filter)
    final = None if out is None else _require_empty(user_path(out, "out"))
    with _temporary() if final is None else _written(final) as made:
        folder = made if isinstance(made, Path) else made.path
        with Database(memory, progress) as database:
            shared = None if partitioned is None else SharedPartitions(partitioned)
            data = Scores(user_path(ledger, "ledger"), database, allow_partial=allow_partial, shared=shared)
            place = str(data.ledger.directory)
            verdict = reference_verdict(place, data.attempts)
            calibrated = getattr(chosen, "calibrated", False)
            check_verdict(place, verdict, accepted=accept_verdict, calibrated=calibrated)
            wrong = wrong_share(place, data.attempts)
            quality = calibrated_quality(data, trusted, mislabelled)
            _warn_of_contradiction(quality, wrong)
            for name in exports:
                EXPORTS[name].check(database, data.samples)
            listed = _pool(data, pool)
            share_kept = _share_by_sign(data, chosen)
            decision = chosen.decide(data)
            _decide(data, listed, decision, unscored)
            if isinstance(chosen, Sign) and wrong is not None and "posterior" in data.columns:
                _warn_of_right_labels_dropped(database)
            corrected = None
            if corrections is not None:
                corrected = apply_corrections(
                    corrections,
                    database,
                    id_type=data.id_type,
                    class_names=data.class_names,
                    has_labels=data.parts.has_classes,
                )
            samples, kept, without, mean, mean_kept = database.row(
                "SELECT count(*), count_if(keep), count_if(opinion IS NULL), avg(score), avg(score) FILTER (keep) "
                "FROM decided"
            )
            if without and unscored == "fail":
                raise CurationError(_no_opinion(database, without, samples))
            provenance = {
                "package_version": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "ledger": {
                    "directory": place,
                    "run": data.ledger.meta["run"],
                    **{each: data.attempts[-1].get(each) for each in _NOTED},
                },
                "verdict": verdict.verdict,
                "diagnosis": f"{verdict}{'' if verdict.stands in (None, 'compatible') else '; decided anyway'}",
                "filter": repr(chosen),
                "facts": decision.facts,
                "pool": None if pool is None else str(user_path(pool, "pool")),
                "unscored": {"samples": without, "are": unscored},
                "corrections": corrected,
                "lost": list(data.parts.lost),
                "samples": samples,
                "kept": kept,
                "share_kept": share_kept,
                "mean_score": {"all": mean, "kept": mean_kept},
                "quality": None if quality is None else asdict(quality),
                "wrong_share": None if wrong is None else asdict(wrong),
            }
            if data.class_names is not None:
                provenance["class_names"] = list(data.class_names)
            with database.reader(_ordered(data, corrected), "writing") as rows:
                write_rows(folder / "manifest.parquet", rows, provenance)
        # Exports open databases of their own, once this one has released its memory.
        _export(Manifest(folder / "manifest.parquet"), folder, exports, progress or (lambda what, share: None))
        names = sorted(path.name for path in folder.iterdir())
    if final is not None:
        folder = final
    manifest = Manifest(folder / "manifest.parquet")
    if isinstance(made, TemporaryFolder):
        weakref.finalize(manifest, made.close)
    files = tuple(folder / name for name in names)
    return Curation(
        manifest=manifest,
        samples=samples,
        kept=kept,
        unscored=without,
        share_kept=share_kept,
        mean_score=mean,
        mean_score_kept=mean_kept,
        quality=quality,
        lost=data.parts.lost,
        files=files,
        verdict=verdict.verdict,
        wrong_share=wrong,
    )


def _check_options(unscored: str, **flags: bool) -> None:
    if unscored not in get_args(Unscored):
        raise CurationError(f"`unscored` is {unscored!r}; {nearest_names(str(unscored), get_args(Unscored))}.")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise CurationError(f"`{name}` is {value!r}; expected true or false.")


def _warn_of_contradiction(quality: Quality | None, wrong: WrongShare | None) -> None:
    """Warn if a quality estimated from the sign of scores contradicts the calibrated reference."""
    if quality is None or wrong is None or quality.basis != "sign":
        return
    if quality.high < 1 - wrong.high or quality.low > 1 - wrong.low:
        warnings.warn(
            f"according to the sign of scores {quality} of the samples are good, but according to the calibrated "
            f"reference {wrong} are wrong. One of the two estimates is wrong: a model that has memorised its data, or "
            "is better than its reference, keeps held-out samples more often; label noise that depends on the class "
            "can be mistaken for a class bias of the reference. Score more trusted samples, so that their ledgers "
            "hold the reference's predictions, from which the quality is then estimated.",
            stacklevel=3,
        )


def _warn_of_right_labels_dropped(database: Database) -> None:
    """Warn if most of the samples dropped by the sign of their score have a right label by the calibrated reference."""
    samples, dropped, right = database.row(
        "SELECT count(*), count_if(NOT opinion), count_if(NOT opinion AND posterior >= 0.5) FROM decided"
    )
    if right > max(dropped / 2, _MANY * samples):
        warnings.warn(
            f"the sign of the score drops {dropped} of {samples} samples, but according to the calibrated reference "
            f"{right} of these have a right label. The sign is unreliable once the model is more confident than its "
            "reference. Decide by the calibrated reference (filter=posterior).",
            stacklevel=3,
        )


def _share_by_sign(data: Scores, chosen: DecisionRule) -> float | None:
    """Return the share of the scored samples with a mean score of 0 or more; ``None`` if the sign has no meaning.

    Raises:
        CurationError: No sample has a score, and the decision needs scores.
    """
    positive, scored = data.database.row(f"SELECT count_if(score >= 0), count(score) FROM {data.samples}")
    if not scored and not isinstance(chosen, Posterior):
        raise CurationError(f"{data.ledger.directory}: none of its samples has a score.")
    return positive / scored if scored and missing_basis(data.config, "zero") is None else None


def _require_empty(out: Path) -> Path:
    """Return the path, or raise :class:`CurationError` if it is taken."""
    if out.is_symlink():
        raise CurationError(f"`out`: {out} is a symbolic link; expected a new directory.")
    with writing(out):  # an object store may deny access
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken:
        raise CurationError(f"`out`: {out} is there already; name another directory, or delete it.")
    return out


def _export(manifest: Manifest, folder: Path, exports: Sequence[str], progress: Progress) -> None:
    for name in exports:
        progress(f"exporting {name}", 0.0)
        EXPORTS[name].write(manifest, folder / EXPORTS[name].file)
        progress(f"exporting {name}", 1.0)


def _ordered(data: Scores, corrected: dict[str, Any] | None) -> str:
    """Return SQL for the rows of the manifest, the most suspicious first."""
    columns = list(data.columns)
    classes = [each for each in _CLASSES if each in columns]
    if corrected is not None:
        columns.append("corrected_label")
        classes.append("corrected_label")
    if data.class_names is not None:
        names = f"[{', '.join(quoted(name) for name in data.class_names)}]::VARCHAR[]"
        known = f"BETWEEN 0 AND {len(data.class_names) - 1}"
        columns += [f"CASE WHEN {each} {known} THEN ({names})[{each} + 1] END AS {each}_name" for each in classes]
    return f"""SELECT id, keep, score, scorings::INT AS scorings, relative_weight, votes_keep::INT AS votes_keep,
        votes::INT AS votes, reason, {", ".join(columns)} FROM decided ORDER BY score NULLS LAST, id"""


#: Columns with class indices.
_CLASSES = ("label", "predicted", "reference_predicted")


def _pool(data: Scores, pool: str | Path | None) -> list[str] | None:
    """Return tables with the ids of the pool, one per partition, which must include all ids of the ledger."""
    if pool is None:
        return None
    database, table = data.database, Table(user_path(pool, "pool"))
    table.load(database, "pool", {"id": "id"}, "reading the pool")
    settle_ids(database, {"pool": table}, data.id_type)
    parts = ["pool"]
    if data.partitions > 1:
        files = write_partitions(database, "FROM pool", database.folder / "pool", data.partitions, "splitting the pool")
        parts = [parquet(*each) if each else "(FROM pool LIMIT 0)" for each in files]
    unknown, example = 0, None
    for number in data.one_at_a_time():
        others = f"FROM {data.samples} ANTI JOIN {parts[number]} AS part USING (id)"
        count, one = database.row(f"SELECT count(*), min(id) {others}")
        unknown, example = unknown + count, one if example is None else example
    if unknown:
        raise CurationError(
            f"{data.ledger.directory} has scores of {unknown} samples that `pool` {table.path} does not list, such as "
            f"{example!r}. Give the pool from which the samples were scored."
        )
    return parts


def _decide(data: Scores, pool: list[str] | None, decision: Decision, unscored: Unscored) -> None:
    """Create the view ``decided`` with all samples, the filter's (``opinion``) and the final decisions (``keep``)."""
    database, count = data.database, data.partitions
    opinions = [f"({decision.query})"] * count
    if count > 1 and not decision.by_sample:
        files = write_partitions(database, decision.query, database.folder / "opinions", count, "deciding")
        empty = f"(SELECT * FROM ({decision.query}) LIMIT 0)"
        opinions = [parquet(*each) if each else empty for each in files]
    decided = [database.folder / f"decided-{number}.parquet" for number in range(count)]
    for number in data.one_at_a_time(last=True):
        database.report_progress("combining", number / count)
        listed = None if pool is None else pool[number]
        database.copy(_decided(data, listed, decision, opinions[number], unscored), decided[number])
    database.report_progress("combining", 1.0)
    database.run(f"CREATE VIEW decided AS FROM {parquet(*decided)}")


def _decided(data: Scores, pool: str | None, decision: Decision, opinions: str, unscored: Unscored) -> str:
    """Return SQL for the decisions on the samples of one partition, given the filter's opinions."""
    source = f"{data.samples} AS scores"
    if pool is not None:
        source = f"{pool} AS pool LEFT JOIN {data.samples} AS scores ON pool.id = scores.id"
    key = "scores" if pool is None else "pool"
    return f"""SELECT {key}.id, scores.score, coalesce(scores.scorings, 0) AS scorings, scores.relative_weight,
            {", ".join(f"scores.{name}" for name in data.columns)}, decision.keep AS opinion, votes_keep, votes,
            coalesce(decision.keep, {unscored == "keep"}) AS keep,
            CASE WHEN decision.keep IS NULL THEN coalesce(
                    'no score: ' || scores.flag,
                    CASE WHEN scores.scorings > 0 THEN {quoted(decision.abstains)} END,
                    'never scored')
                WHEN NOT decision.keep THEN {quoted(decision.reason)} END AS reason
        FROM {source} LEFT JOIN {opinions} AS decision ON {key}.id = decision.id"""


def _no_opinion(database: Database, count: int, samples: int) -> str:
    """Return the message for samples on which the filter has no opinion."""
    example, reason = database.row("SELECT id, reason FROM decided WHERE opinion IS NULL ORDER BY id LIMIT 1")
    return (
        f"no decision on {count} of {samples} samples, such as {example!r} ({reason}). `unscored='keep'` keeps them, "
        "`unscored='drop'` drops them."
    )


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    with writing(out), atomic_directory(out, "manifest.parquet") as folder:
        yield folder


@contextlib.contextmanager
def _temporary() -> Iterator[TemporaryFolder]:
    """Create a temporary folder, which is removed only if an error occurs."""
    with writing("the folder for temporary files"):
        folder = TemporaryFolder(".mimic-curate-")
        try:
            yield folder
        except BaseException:
            folder.close()
            raise
