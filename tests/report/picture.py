"""Takes the picture of docs/images of a run's page: `python tests/report/picture.py RUN_DIR`."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from browser import launch
from rorqual.report import open_run, write_page

FILE = Path(__file__).parents[2] / "docs" / "images" / "report.png"
MAX_BYTES = 150_000


def main(run_folder: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, launch() as browser:
        file = Path(folder) / "report.html"
        write_page([open_run(run_folder)], file)
        page = browser.new_page(
            viewport={"width": 1240, "height": 1000}, color_scheme="light", device_scale_factor=0.55
        )
        page.goto(file.as_uri())
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(FILE, optimize=True)
    assert FILE.stat().st_size < MAX_BYTES, f"{FILE}: {FILE.stat().st_size} bytes"
    print(FILE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
