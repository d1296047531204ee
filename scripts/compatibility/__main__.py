"""Try the LightningModules of other libraries with GradMimic, and write docs/guide/compatibility.md.

    python -m scripts.compatibility
    python -m scripts.compatibility --only torchgeo timm --again

Each library is installed into an environment of its own, which reuses this one's packages and is removed after its
cases have been tried. A library that has a result in --out is not tried again, unless --again is given.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from scripts.compatibility.environments import InstallError, environment
from scripts.compatibility.libraries import LIBRARIES, Library
from scripts.compatibility.page import counts, section
from scripts.provenance import ROOT, facts, write_section


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.compatibility", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--again", action="store_true", help="try libraries that have a result, too")
    parser.add_argument("--out", type=Path, default=Path("outputs/compatibility"), help="a result file per library")
    parser.add_argument(
        "--markdown", type=Path, default=ROOT / "docs" / "guide" / "compatibility.md", help="(%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the cases of a library (%(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        result = options.out / f"{name}.json"
        if options.again or not result.exists():
            found = tried(name, LIBRARIES[name], options.timeout) | {"facts": facts("scripts.compatibility")}
            result.write_text(json.dumps(found, indent=1))
        found = json.loads(result.read_text())
        write_section(options.markdown, f"compatibility {name}", section(LIBRARIES[name], found))
    results = {name: options.out / f"{name}.json" for name in LIBRARIES}
    if all(result.exists() for result in results.values()):  # a part of them would take the others off the page
        everything = {name: json.loads(result.read_text()) for name, result in results.items()}
        write_section(options.markdown, "compatibility counts", counts(everything))


def tried(name: str, library: Library, timeout: float) -> dict[str, Any]:
    """Return what was found for a library, or why nothing could be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        try:
            with environment(library, Path(folder) / "environment") as python:
                command = [str(python), "-m", "scripts.compatibility.trial", name, str(out)]
                subprocess.run(command, cwd=ROOT, check=True, timeout=timeout)
        except InstallError as error:
            return {"error": f"{', '.join(library.packages + library.alone)} cannot be installed: {error}"}
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return {"error": f"the cases broke off ({error})"}
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
