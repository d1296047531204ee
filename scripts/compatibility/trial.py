"""Try the cases of one library and write what was found as JSON; run within the library's environment."""

import importlib
import importlib.metadata
import json
import logging
import sys
import time
import traceback
from pathlib import Path

import torch

from scripts.compatibility.case import try_case
from scripts.compatibility.libraries import LIBRARIES


def main(name: str, out: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are tiny
    library = LIBRARIES[name]
    found = {"versions": {each: importlib.metadata.version(each) for each in library.shown}, "cases": []}
    try:
        cases = importlib.import_module(f"scripts.compatibility.cases.{name}").CASES
    except Exception:
        found["error"] = traceback.format_exc(limit=-2).strip()
        cases = []
    for case in cases:
        began = time.monotonic()
        try:
            found["cases"].append(try_case(case))
        except Exception:
            found["cases"].append({"name": case.name, "error": traceback.format_exc(limit=-4).strip()})
        print(f"{name}: {case.name}: {time.monotonic() - began:.0f} s", flush=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
