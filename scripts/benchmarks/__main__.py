"""Measure what this package costs and saves.

python -m scripts.benchmarks NAME [options]
python -m scripts.benchmarks NAME --help
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from scripts.benchmarks.benchmark_report import as_markdown, write_json
from scripts.benchmarks.short_fits import silence
from scripts.provenance import facts as facts_of
from scripts.provenance import write_section

#: By name: the module, and a line for --help.
BENCHMARKS = {
    "step": ("step_benchmark", "arithmetic, time and memory of a classifier's step, beside vmap and a loop by hand"),
    "clip": ("clip_benchmark", "arithmetic, time and memory of a CLIP's step"),
    "features": ("feature_benchmark", "time of a linear probe from cached features, beside one from images"),
    "shards": ("shard_benchmark", "image-text pairs per second, beside open_clip's own pipeline"),
    "curation": ("curation_benchmark", "time and memory of filters on ledgers of millions of rows"),
    "store": ("store_benchmark", "seconds and requests of a ledger on an object store, beside one on a disk"),
}


class Style(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are, and the default of every option."""


def main() -> None:
    words = sys.argv[1:]
    parser = argparse.ArgumentParser("python -m scripts.benchmarks", description=__doc__, formatter_class=Style)
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, (module, line) in BENCHMARKS.items():
        command = commands.add_parser(name, help=line, formatter_class=Style)
        if name in words[:1]:  # the others need not be imported
            benchmark = importlib.import_module(f"scripts.benchmarks.{module}")
            command.description = benchmark.__doc__
            benchmark.add_options(command)
            command.add_argument("--out", help="JSON with every single measurement")
            command.add_argument("--markdown", help="a file in which the section of this benchmark is replaced")
    options = parser.parse_args(words)
    if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; run on a machine with one, or leave --device out")
    silence()
    facts = facts_of("scripts.benchmarks") | ({"threads": str(options.threads)} if "threads" in options else {})
    for report in benchmark.measure(options):
        if options.out:  # after every part: a long run that breaks off keeps what it has measured
            write_json(options.out, report, facts)
    print(as_markdown(report, facts))
    if options.markdown:
        write_section(Path(options.markdown), f"benchmark {report.section}", as_markdown(report, facts))


if __name__ == "__main__":
    main()
