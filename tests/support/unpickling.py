"""An object that shows whether it was unpickled."""

import os
from pathlib import Path


class Canary:
    """Makes a directory as soon as somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)
