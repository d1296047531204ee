"""From a ledger to a manifest."""

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
#: What the manifest notes of the attempts whose rows count.
_NOTED = ("config", "data", "score_kind", "checkpoints")


#: Share of the samples from which labels are many.
_MANY = 0.05


@dataclass(frozen=True)
class Curation:
    """What came of it.

    Attributes:
        manifest: The decisions.
        samples: On which it decides.
        kept: Those that stay.
        unscored: Those without a score, among ``samples``.
        share_kept: Share of the scored samples with a mean score of 0 or more, whatever the filter; ``None`` where none
            has a score, or 0 does not divide the scores of this scorer.
        mean_score: Of the scored samples, loss per unit of weight distance; ``None`` if none has a score.
        mean_score_kept: Of those that stay; ``None`` if none of these has a score. Pools that one model scored in one
            run can be compared by it.
        quality: Calibrated by trusted samples; ``None`` without them.
        lost: Parts and rows of the ledger that were damaged, missing or in doubt.
        files: All that was written.
        verdict: On the reference that the scores were taken with, ``"compatible"``, ``"doubtful"``, ``"unsure"`` or
            ``"unrelated"``: the worst of the attempts whose rows count; ``None`` where it was not diagnosed.
        wrong_share: The estimated share of wrong labels, from the calibration of the reference on the given labels;
            ``None`` where the ledger has none.
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
        """Return a view for a notebook: the figures, and the most suspicious samples.

        Args:
            dataset: The samples, as for :func:`~lightning_mimic.curation.report`; ``None``: without images and texts.
            samples: Number of samples.
            render: From a sample to a PIL image, a text, or a pair of them.

        Raises:
            MimicError: The data set has none of the samples, or one that cannot be shown.
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
    """Decide which samples stay.

    Args:
        ledger: Recorded scores.
        filter: A decision rule; by default :class:`~lightning_mimic.curation.Sign`.
        out: Directory for the manifest and its exports, which appears when all is done; ``None``: a temporary one,
            which goes with the result's manifest.
        pool: Parquet or CSV whose column ``id`` lists all samples that there are; one that it lists twice has two rows.
        unscored: What becomes of samples that have no score.
        trusted: Ledger of trusted samples that trained neither the reference nor the model, scored with their true
            labels, and
        mislabelled: the same samples scored with wrong labels (several ledgers: each with other ones, the more the
            better): they calibrate the quality. All must be scored at the same moments as the data: by
            :class:`~lightning_mimic.AtCheckpoints`, at the same checkpoints.
        corrections: What a person has corrected: CSV or Parquet with ``id``, ``keep``, ``label`` and ``label_name``, as
            the report's page downloads it. An empty cell changes nothing. Such decisions have the reason ``by hand``;
            corrected labels are in the column ``corrected_label``, and :meth:`Manifest.subset` trains on them.
        exports: Beside the manifest: ``"csv"``, ``"datacomp"``, ``"cleanlab"``.
        allow_partial: Read what there is of the ledger, instead of refusing where parts are damaged or rows missing.
        accept_verdict: Decide although the diagnosis found the reference ``doubtful`` or ``unsure``. An ``unsure``
            reference needs no acceptance with ``Posterior()``, for which it is calibrated.
        partitioned: Folder to which the ledger was split and summed up by many processes
            (:func:`~lightning_mimic.curation.partition_share`, :func:`~lightning_mimic.curation.summarise_partition`);
            ``None``: that is done here.
        memory: Of the database, which spills the rest to disk.
        progress: Told what is being done.

    Raises:
        CurationError: Options, tables or scores from which no decision can be made; a filter that means nothing for the
            ledger's scorer; a reference that is unrelated, or doubtful or unsure and not accepted.
        LedgerError: A ledger that is not there, is damaged, lacks rows or mixes runs.

    Warns:
        UserWarning: The quality by the sign of scores and the share of wrong labels contradict each other; or most
            labels of the samples that the sign drops are right by the calibrated reference.

    Example:
        >>> curate("nowhere")
        Traceback (most recent call last):
            ...
        lightning_mimic.errors.LedgerError: nowhere holds no ledger (no _meta.json in it).
    """
    _check_options(unscored, allow_partial=allow_partial, accept_verdict=accept_verdict)
    exports = checked_exports(exports)
    if (trusted is None) != (mislabelled is None):
        raise CurationError("`trusted` and `mislabelled` calibrate together: the same samples, scored both ways.")
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
                "diagnosis": f"{verdict}{'' if verdict.stands in (None, 'compatible') else '; decided all the same'}",
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
        # The database has let go of its memory by now; an export opens its own.
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
    """Warn of a quality by the sign that the calibrated reference contradicts."""
    if quality is None or wrong is None or quality.basis != "sign":
        return
    if quality.high < 1 - wrong.high or quality.low > 1 - wrong.low:
        warnings.warn(
            f"by the sign of scores {quality} of the samples are good, and by the calibrated reference {wrong} are "
            "wrong. One of the two is off: a model that has memorised its data, or overtaken its reference, keeps "
            "held-out samples more often; noise that follows the classes can look like the reference's own partiality. "
            "Score more trusted samples, so that their ledgers hold what the reference predicts: the quality then "
            "rests on that.",
            stacklevel=3,
        )


def _warn_of_right_labels_dropped(database: Database) -> None:
    """Warn of decisions by the sign that the calibrated reference contradicts."""
    samples, dropped, right = database.row(
        "SELECT count(*), count_if(NOT opinion), count_if(NOT opinion AND posterior >= 0.5) FROM decided"
    )
    if right > max(dropped / 2, _MANY * samples):
        warnings.warn(
            f"the sign of the score drops {dropped} of {samples} samples, and by the calibrated reference {right} of "
            "these have a right label. The sign is wrong where the model has become surer than its reference. Decide "
            "by the calibrated reference (filter=posterior).",
            stacklevel=3,
        )


def _share_by_sign(data: Scores, chosen: DecisionRule) -> float | None:
    """Return the share of the scored samples with a mean score of 0 or more; ``None`` where that has no meaning.

    Raises:
        CurationError: No sample has a score, and the decision needs one.
    """
    positive, scored = data.database.row(f"SELECT count_if(score >= 0), count(score) FROM {data.samples}")
    if not scored and not isinstance(chosen, Posterior):
        raise CurationError(f"{data.ledger.directory}: none of its samples has a score.")
    return positive / scored if scored and missing_basis(data.config, "zero") is None else None


def _require_empty(out: Path) -> Path:
    """The path, unless something is there already."""
    if out.is_symlink():
        raise CurationError(f"`out`: {out} is a symbolic link, and nothing is written through one.")
    with writing(out):  # a store may refuse to be asked
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
    """The manifest's rows, the most suspicious first."""
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


#: The columns that are indices of classes.
_CLASSES = ("label", "predicted", "reference_predicted")


def _pool(data: Scores, pool: str | Path | None) -> list[str] | None:
    """The ids of the pool by partition, as tables; those of the ledger must be among them."""
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
            f"{example!r}. Give the pool that was trained on."
        )
    return parts


def _decide(data: Scores, pool: list[str] | None, decision: Decision, unscored: Unscored) -> None:
    """The view ``decided``: all samples, the filter's opinion, and what is done."""
    database, count = data.database, data.partitions
    opinions = [f"({decision.query})"] * count
    if count > 1 and not decision.by_sample:
        files = write_partitions(database, decision.query, database.folder / "opinions", count, "deciding")
        nobody = f"(SELECT * FROM ({decision.query}) LIMIT 0)"
        opinions = [parquet(*each) if each else nobody for each in files]
    decided = [database.folder / f"decided-{number}.parquet" for number in range(count)]
    for number in data.one_at_a_time(last=True):
        database.report_progress("putting together", number / count)
        listed = None if pool is None else pool[number]
        database.copy(_decided(data, listed, decision, opinions[number], unscored), decided[number])
    database.report_progress("putting together", 1.0)
    database.run(f"CREATE VIEW decided AS FROM {parquet(*decided)}")


def _decided(data: Scores, pool: str | None, decision: Decision, opinions: str, unscored: Unscored) -> str:
    """SQL for what is decided about the samples of one partition, with the opinions on them."""
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
    """The message for samples that no filter can judge."""
    example, reason = database.row("SELECT id, reason FROM decided WHERE opinion IS NULL ORDER BY id LIMIT 1")
    return (
        f"{count} of {samples} samples cannot be judged, such as {example!r} ({reason}). "
        "`unscored='keep'` keeps them, `unscored='drop'` drops them."
    )


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path]:
    with writing(out), atomic_directory(out, "manifest.parquet") as folder:
        yield folder


@contextlib.contextmanager
def _temporary() -> Iterator[TemporaryFolder]:
    """Create a folder that stays unless there is an error."""
    with writing("the folder for temporary files"):
        folder = TemporaryFolder(".mimic-curate-")
        try:
            yield folder
        except BaseException:
            folder.close()
            raise
