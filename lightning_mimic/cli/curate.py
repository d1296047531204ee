"""``mimic-curate`` and its steps on many machines, ``mimic-select`` and ``mimic-compare``: scores to decisions."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_mimic.cli.command import command
from lightning_mimic.cli.follow_up import after_manifest, ledgers_of
from lightning_mimic.cli.progress import shown_progress
from lightning_mimic.cli.summary import aligned
from lightning_mimic.curation import (
    Comparison,
    Curation,
    CurationError,
    Manifest,
    Recipe,
    compare,
    curate,
    partition_share,
    report,
    select,
    summarise_partition,
)


@command("mimic-curate", "curate", first="ledger")
def curate_main(config: DictConfig) -> None:
    """Decide which samples of a ledger stay."""
    console = Console()
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    del settings["filter"]
    if settings["out"] is None:
        raise CurationError("`out` is null; expected a directory for the manifest.")
    with shown_progress(console) as progress:
        done = curate(filter=instantiate(config.filter), progress=progress, **settings)
    show(console, done)
    print(aligned(after_manifest(done.manifest.path, ledgers_of([done.manifest]))))  # noqa: T201


@command("mimic-partition", "partition", first="ledger")
def partition_main(config: DictConfig) -> None:
    """Splits a share of a ledger into partitions."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    with shown_progress(Console()) as progress:
        print(partition_share(**settings, progress=progress))  # noqa: T201


@command("mimic-summarise", "summarise", first="partitioned")
def summarise_main(config: DictConfig) -> None:
    """Sums up the samples of a partition."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    with shown_progress(Console()) as progress:
        print(summarise_partition(**settings, progress=progress))  # noqa: T201


@command("mimic-select", "select", first="recipe")
def select_main(config: DictConfig) -> None:
    """Composes filters."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    with shown_progress(Console()) as progress:
        manifest = select(**settings, progress=progress)
    kept, samples = (manifest.provenance[name] for name in ("kept", "samples"))
    print(f"{manifest.path}: {kept:,} of {samples:,} samples kept ({kept / max(samples, 1):.1%})")  # noqa: T201
    ledgers = ledgers_of([term.path for term in Recipe.parse(settings["recipe"]).terms])
    print(aligned(after_manifest(manifest.path, ledgers)))  # noqa: T201


@command("mimic-compare", "compare")
def compare_main(config: DictConfig) -> None:
    """Puts data sets beside each other."""
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(settings["manifests"], dict):
        raise CurationError(
            f"`manifests` is {settings['manifests']!r}; expected names, as in {{new: a/manifest.parquet}}."
        )
    manifests = {str(name): Manifest(path) for name, path in settings["manifests"].items()}
    noise = settings["noise"]
    if isinstance(noise, dict):
        noise = {str(name): share for name, share in noise.items()}
    comparison = compare(manifests, noise)
    show_comparison(Console(), comparison)
    if settings["page"]:
        if len(manifests) != 2:
            raise CurationError(f"`page` shows two data sets, and `manifests` has {len(manifests)}.")
        (one, first), (other, second) = manifests.items()
        data = instantiate(config.data) if config.get("data") else None
        with shown_progress(Console()) as progress:
            page = report(first, data, settings["page"], against=second, names=(one, other), progress=progress)
        print(page)  # noqa: T201
    if settings["plot"]:
        from lightning_mimic.curation.plots import plot_quality

        plot_quality(settings["plot"], comparison)
        print(f"\n{settings['plot']}")  # noqa: T201


def show(console: Console, done: Curation) -> None:
    """Print the verdict on a ledger's reference, and what came of the ledger as a table."""
    console.print(f"{done.manifest.provenance['diagnosis']}.", highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False, title=f"by {done.manifest.provenance['filter']}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    scored = done.samples - done.unscored
    policy = done.manifest.provenance["unscored"]["are"]
    rest = {"keep": f"{done.unscored:,} without a score are kept", "drop": f"{done.unscored:,} without a score go"}
    dropped = done.samples - done.kept
    table.add_row("samples", f"{done.samples:,}", "in the pool, or else in the ledger")
    table.add_row("kept", f"{done.kept:,}", f"{done.kept / done.samples:.1%}")
    table.add_row("dropped", f"{dropped:,}", f"{dropped / done.samples:.1%}")
    table.add_row(
        "coverage", f"{scored / done.samples:.1%}", rest[policy] if done.unscored else "every sample has a score"
    )
    sign = "share kept by the sign of the mean score, whatever the filter"
    table.add_row(
        "by sign",
        _percent(done.share_kept),
        sign if done.share_kept is not None else "0 does not divide the scores of this scorer",
    )
    table.add_row("mean score", _score(done.mean_score_kept), f"of what is kept; {_score(done.mean_score)} of all")
    if done.quality is None:
        table.add_row("quality", "–", "unknown without trusted samples")
    else:
        interval = f"95 % interval {done.quality.low:.1%} to {done.quality.high:.1%}"
        by = f"by {done.quality.trusted} trusted samples"
        by += " and whether the reference agrees" if done.quality.basis == "agreement" else ""
        table.add_row("quality", f"{done.quality.estimate:.1%}", f"{interval}, {by}")
    if done.wrong_share is not None:
        wrong = done.wrong_share
        interval = f"95 % interval {wrong.low:.1%} to {wrong.high:.1%}"
        table.add_row("wrong labels", f"{wrong.estimate:.1%}", f"{interval}, as the calibrated reference estimates")
    if done.lost:
        table.add_row("left out", f"{len(done.lost)}", f"damaged, missing or in doubt: {'; '.join(done.lost[:2])}")
    console.print(table)
    for path in done.files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print the verdicts on the references of data sets, and the data sets as a table."""
    verdicts = (f"{each.name}: {each.verdict or 'not diagnosed'}" for each in comparison.datasets)
    console.print(f"References: {', '.join(verdicts)}.", highlight=False, markup=False, soft_wrap=True)
    table = Table()
    shares = ("score of 0 or more", "quality", "95 % interval", "truly good")
    for head in ("data set", "samples", "kept", "mean score", *shares):
        table.add_column(head, justify="left" if head == "data set" else "right", no_wrap=head == "data set")
    for each in comparison.datasets:
        known = each.low is not None and each.high is not None
        table.add_row(
            each.name,
            f"{each.samples:,}",
            _percent(each.kept),
            _score(each.mean_score_kept),
            _percent(each.share_kept),
            _percent(each.quality),
            f"{_percent(each.low)} to {_percent(each.high)}" if known else "–",
            _percent(each.right),
        )
    console.print(table)
    wrong = [f"{each.name}: {each.wrong_share:.1%}" for each in comparison.datasets if each.wrong_share is not None]
    if wrong:
        console.print(
            f"Wrong labels, as the calibrated references estimate: {', '.join(wrong)}.", markup=False, soft_wrap=True
        )
    if comparison.pearson is not None:
        console.print(
            f"Correlation with the truth: {comparison.pearson:.3f} (Pearson), {comparison.spearman:.3f} (Spearman)."
        )


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:+.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
