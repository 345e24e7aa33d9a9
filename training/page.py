"""Make the example that the web page shows first: `python -m training.page samples/photo_0`.

The service must be running. Writes gateway/web/sample/ (the pair as JPEG, and the service's
response) and samples/page.jpg, the screenshot in the README. The flow is rounded to 1/16 pixel so
that it compresses well.
"""

import argparse
import io
import json
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from flownet2.contract import IMAGE_INPUTS

ROOT = Path(__file__).parents[1]
STEPS = 16
"""Steps of the rounded flow per pixel."""


def write_sample(pair: Path, url: str, folder: Path) -> None:
    """Write the page's sample: image1.jpg, image2.jpg, flow.npz and about.json."""
    images = {}
    for index, name in enumerate(IMAGE_INPUTS):
        file = folder / f"{name}.jpg"
        Image.open(pair / f"frame{index}.png").save(file, quality=92)
        images[name] = file.read_bytes()
    response = httpx2.post(
        f"{url}/estimate_flow/?size=native&direction=both",
        files=images,
        headers={"Accept": "application/x-npz"},
        timeout=60,
    ).raise_for_status()
    arrays = np.load(io.BytesIO(response.content))
    flow = np.round(arrays["flow"] * STEPS) / np.float32(STEPS)
    np.savez_compressed(folder / "flow.npz", flow=flow, occluded=arrays["occluded"])
    models = httpx2.get(f"{url}/models").raise_for_status().json()["models"]
    about = next(model for model in models if model["default"])
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def write_picture(url: str, file: Path) -> None:
    """Write a screenshot of the page after it is opened."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  needs a browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(url)
        page.get_by_text("computed beforehand").first.wait_for()
        page.get_by_text("Ready").wait_for()
        page.screenshot(path=file, type="jpeg", quality=88, full_page=True)
        browser.close()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.page", description=__doc__)
    parser.add_argument("pair", type=Path, help="folder with frame0.png and frame1.png")
    parser.add_argument("--url", default="http://127.0.0.1:5003", help="URL of the running service")
    arguments = parser.parse_args()
    write_sample(arguments.pair, arguments.url, ROOT / "gateway" / "web" / "sample")
    write_picture(arguments.url, ROOT / "samples" / "page.jpg")


if __name__ == "__main__":
    main()
