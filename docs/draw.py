"""Draws the pictures of dashboard.md and retrofit.md: runs both where they lie."""

import os
import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = ["dashboard.md", "retrofit.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> None:
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(DOCS / "images")
    for page in PAGES:
        blocks = re.findall(
            r"^```python\n(.*?)^```$",
            (DOCS / page).read_text(),
            re.MULTILINE | re.DOTALL,
        )
        exec("".join(blocks), {"__name__": "__main__"})
    shutil.rmtree("counted")  # the checkpoint that retrofit.md saves


if __name__ == "__main__":
    main()
