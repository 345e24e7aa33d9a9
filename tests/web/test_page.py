"""The page in a real browser, against a gateway whose model's flow is known in closed form."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from flownet2.colours import colours
from flownet2.formats import to_flo, to_kitti
from launch.triton import Triton
from tests.support.gateway_stack import ROOT, Gateway, encoded, picture, run_gateway, wait_until
from tests.support.stack import Stack

SAMPLE = ROOT / "gateway" / "web" / "sample"
PIXELS = [(0, 0), (63, 47), (17, 30), (40, 5)]
FILES = {"b_2.png": encoded(picture(2)), "a_10.png": encoded(picture(1))}


def drop(page: Page, files: dict[str, bytes], kind: str = "image/png") -> None:
    """Drop files onto the page."""
    drop_files(page, list(files.items()), kind)


def drop_files(page: Page, files: list[tuple[str, bytes]], kind: str = "image/png") -> None:
    """Drop files onto the page; two of them may have the same name."""
    transfer = page.evaluate_handle(
        """([files, type]) => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files)
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
            return transfer;
        }""",
        [[[name, list(content)] for name, content in files], kind],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def wait_for_response(page: Page, request: str) -> None:
    """Wait until a response is shown whose curl command contains a text."""
    expect(page.locator("#code")).to_contain_text(request)


def read_at(page: Page, x: int, y: int, canvas: str = "#flow") -> list[float]:
    """u and v that the page shows for a pixel of 64x48 under the mouse."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    page.mouse.move(
        box["x"] + (x + 0.5) * box["width"] / 64, box["y"] + (y + 0.5) * box["height"] / 48
    )
    text = page.locator("#readout").inner_text().replace("\N{MINUS SIGN}", "-")
    assert f"x {x}, y {y} " in text
    return [float(re.search(rf"{name} ([+-][\d.]+)", text)[1]) for name in "uv"]


def ask(gateway: Gateway, image1: bytes, image2: bytes, **query: str) -> np.ndarray:
    """The flow by the API."""
    response = gateway.client.post(
        "/estimate_flow/",
        params={"size": "native", **query},
        files={"image1": image1, "image2": image2},
        headers={"Accept": "application/x-npy"},
    ).raise_for_status()
    return np.load(io.BytesIO(response.content))


def test_opens_on_a_result(page: Page) -> None:
    expect(page.locator("#about")).to_contain_text("FlowNet2")
    colours = page.evaluate(
        """() => {
            const canvas = document.getElementById("flow");
            const {width, height} = canvas;
            const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
            return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    assert colours > 100


def test_the_sample_is_the_flow_of_the_shipped_weights(stack: Stack) -> None:
    files = {name: (SAMPLE / f"{name}.jpg").read_bytes() for name in ("image1", "image2")}
    response = httpx2.post(
        f"{stack.url}/estimate_flow/?size=native",
        files=files,
        headers={"Accept": "application/x-npy"},
        timeout=60,
    ).raise_for_status()
    flow = np.load(io.BytesIO(response.content))
    with np.load(SAMPLE / "flow.npz") as arrays:
        error = np.linalg.norm(arrays["flow"] - flow, axis=-1).mean()
    assert error < 0.1, "run `python -m training.page samples/photo_0` beside `make serve`"


@pytest.mark.parametrize("query", [{}, {"size": "512"}], ids=["native", "512"])
def test_dropped_files(page: Page, gateway: Gateway, query: dict[str, str]) -> None:
    if query:
        page.get_by_text(re.compile("^512")).click()
    drop(page, FILES)
    wait_for_response(page, 'image1=@"a_10.png')
    expect(page.locator("#stages")).to_contain_text("network")
    flow = ask(gateway, FILES["a_10.png"], FILES["b_2.png"], **query)
    rows, columns, _ = flow.shape
    for x, y in PIXELS:
        expected = flow[int((y + 0.5) / 48 * rows), int((x + 0.5) / 64 * columns)]
        assert read_at(page, x, y) == pytest.approx(expected, abs=0.006)
        assert read_at(page, x, y, "#images") == pytest.approx(expected, abs=0.006)


def test_occluded_pixels(page: Page, gateway: Gateway) -> None:
    drop(page, FILES)
    wait_for_response(page, "a_10.png")
    page.get_by_label("Occluded pixels").check()
    wait_for_response(page, "direction=both")
    response = gateway.client.post(
        "/estimate_flow/?size=native&direction=both",
        files={"image1": FILES["a_10.png"], "image2": FILES["b_2.png"]},
        headers={"Accept": "application/x-npz"},
    ).raise_for_status()
    with np.load(io.BytesIO(response.content)) as arrays:
        mask, flow = arrays["occluded"], arrays["flow"]
    hidden, seen = (np.argwhere(mask == value)[0] for value in (True, False))
    for y, x in (hidden, seen):
        assert read_at(page, x, y) == pytest.approx(flow[y, x], abs=0.006)
        assert ("occluded" in page.locator("#readout").inner_text()) == mask[y, x]


@pytest.mark.parametrize(
    ("kind", "size", "together"),
    [("flo", "native", True), ("kitti", "512", True), ("kitti", "native", False)],
)
def test_errors_against_ground_truth(
    page: Page, gateway: Gateway, kind: str, size: str, together: bool
) -> None:
    """A third file is the true flow: errors as the page shows them, and as NumPy computes them."""
    if size == "512":
        page.get_by_text(re.compile("^512")).click()
    flow = resampled(ask(gateway, FILES["a_10.png"], FILES["b_2.png"], size=size), 48, 64)
    truth = flow.copy()
    truth[:24] += (3, 4)  # off by 5 pixels: an outlier where the true motion is short
    truth[:24, 32:] += (400, 0)  # off by 400, of which 5 % are less
    truth[40:] = np.nan
    name, content = {
        "flo": ("truth.flo", to_flo(truth)),
        "kitti": ("a_10.png", to_kitti(truth)),
    }[kind]
    if together:
        drop_files(page, [*FILES.items(), (name, content)])
        wait_for_response(page, "a_10.png")
    else:
        drop(page, FILES)
        wait_for_response(page, "a_10.png")
        drop(page, {name: content})
    accuracy = page.locator("#accuracy")
    expect(accuracy).to_contain_text("EPE")
    shown = [float(text) for text in re.findall(r"[\d.]+", accuracy.inner_text())]
    known = np.isfinite(truth).all(axis=-1)
    error = np.linalg.norm(truth - flow, axis=-1)[known]
    length = np.linalg.norm(truth, axis=-1)[known]
    outliers = 100 * ((error > 3) & (error > 0.05 * length)).mean()
    assert shown == pytest.approx([error.mean(), outliers], abs=0.06)
    page.locator("#result-kind").get_by_text("Errors").click()
    picture = canvas_pixels(page)
    height, width, _ = picture.shape
    assert read_error(page, 10, 10) == pytest.approx(5, abs=0.02)
    assert tuple(picture[height // 4, width // 4]) == (254, 224, 144)
    red, _, blue = picture[int(height * 0.65), width // 2]
    assert blue > red  # correct
    assert tuple(picture[int(height * 0.95), width // 2]) == (0, 0, 0)  # unknown


def test_ground_truth_of_other_images_is_refused(page: Page) -> None:
    drop_files(page, [*FILES.items(), ("truth.flo", to_flo(np.zeros((5, 7, 2), np.float32)))])
    expect(page.locator("#problem-truth")).to_contain_text("7 \N{MULTIPLICATION SIGN} 5")
    wait_for_response(page, "a_10.png")
    drop(page, {"truth.flo": to_flo(np.zeros((48, 64, 2), np.float32))[:-4]})
    expect(page.locator("#problem-truth")).to_contain_text("incomplete")


def resampled(flow: np.ndarray, height: int, width: int) -> np.ndarray:
    """A flow at another size, bilinear, one axis after the other."""
    for axis, side in ((0, height), (1, width)):
        places = (np.arange(side) + 0.5) * flow.shape[axis] / side - 0.5
        flow = np.apply_along_axis(
            lambda line, places=places: np.interp(places, np.arange(len(line)), line), axis, flow
        )
    return flow.astype(np.float32)


def canvas_pixels(page: Page) -> np.ndarray:
    """The picture of the flow or of its errors, RGB [height, width, 3]."""
    width, height, data = page.evaluate(
        """() => {
            const {width, height} = document.getElementById("flow");
            const context = document.getElementById("flow").getContext("2d");
            return [width, height, [...context.getImageData(0, 0, width, height).data]];
        }"""
    )
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def read_error(page: Page, x: int, y: int) -> float:
    """The error that the page shows for a pixel under the mouse."""
    read_at(page, x, y)
    return float(re.search(r"error ([\d.]+)", page.locator("#readout").inner_text())[1])


def test_files_and_commands_are_the_response(page: Page, gateway: Gateway, tmp_path: Path) -> None:
    """Downloads and what the curl command writes are the API's bytes."""
    drop(page, FILES)
    wait_for_response(page, "a_10.png")
    saved = {}
    for suffix in ("flo", "npy", "png"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f".{suffix}", exact=True).click()
        saved[suffix] = download.value.path().read_bytes()
    images = {"image1": FILES["a_10.png"], "image2": FILES["b_2.png"]}
    for suffix, kind in (("flo", "application/x-flo"), ("npy", "application/x-npy")):
        response = gateway.client.post(
            "/estimate_flow/?size=native", files=images, headers={"Accept": kind}
        )
        assert saved[suffix] == response.content
    response = gateway.client.post(
        "/estimate_flow/?size=native", files=images, headers={"Accept": "image/png"}
    )
    theirs, ours = (
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16)
        for file in (response.content, saved["png"])
    )
    assert np.abs(theirs - ours).max() <= 1  # a double rounds otherwise than a float

    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    code = page.locator("#code")
    subprocess.run(["bash", "-c", code.inner_text()], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "flow.npy").read_bytes() == saved["npy"]
    page.get_by_text("Python", exact=True).click()
    flow = python(code.inner_text(), "result.flow", tmp_path)
    assert np.array_equal(flow, np.load(io.BytesIO(saved["npy"])))
    page.get_by_text(re.compile("^512")).click()
    wait_for_response(page, "size=512")
    flow = python(code.inner_text(), "result", tmp_path)
    assert np.array_equal(flow, ask(gateway, *images.values(), size="512"))


def python(code: str, result: str, folder: Path) -> np.ndarray:
    """Run Python code, and return its result."""
    code += f"\nimport sys, numpy\nnumpy.save(sys.stdout.buffer, {result})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True
    )
    return np.load(io.BytesIO(done.stdout))


def test_colours_are_those_of_the_library(page: Page) -> None:
    rng = np.random.default_rng(0)
    flow = rng.normal(0, 5, (40, 50, 2)).astype(np.float32)
    flow[0, 0] = 0
    for maximum in (None, 4.0, 30.0):
        pixels = page.evaluate(
            """async ([height, width, data, maximum]) => {
                const {colourise, longest} = await import("./web/colours.js");
                const flow = {height, width, data: new Float32Array(data)};
                return [...colourise(flow, maximum ?? longest(flow)).data];
            }""",
            [*flow.shape[:2], flow.ravel().tolist(), maximum],
        )
        picture = np.array(pixels).reshape(*flow.shape[:2], 4)
        assert (picture[..., 3] == 255).all()
        assert np.abs(picture[..., :3] - colours(flow, maximum)).max() <= 1


def test_a_wrong_file_is_reported_beside_its_field(page: Page, context: BrowserContext) -> None:
    drop(page, {"a.png": FILES["b_2.png"], "b.png": b"no picture at all"})
    problem = page.locator("#problem-image2")
    expect(problem).to_have_text(re.compile("image2"))
    expect(page.locator("#image2")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#problem-image1")).to_be_empty()
    drop(page, {"a.png": FILES["b_2.png"], "b.png": encoded(picture(1, 80, 48))})
    expect(page.get_by_role("alert").filter(has_text="size")).to_be_visible()
    drop(page, FILES)
    wait_for_response(page, "a_10.png")
    expect(problem).to_be_empty()
    context.faults.clear()  # the browser logs each 422


def test_exif_orientation_is_ignored_as_the_service_does(page: Page) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {
        f"{name}.jpg": encoded(picture(seed), "JPEG", exif=exif.tobytes())
        for name, seed in (("a", 1), ("b", 2))
    }
    drop(page, turned, "image/jpeg")
    expect(page.locator("#dimensions")).to_have_text("64 \N{MULTIPLICATION SIGN} 48")


def film(levels: list[int], size: tuple[int, int] = (64, 48), rate: int = 10) -> bytes:
    """A WebM of grey frames."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=rate)
        stream.width, stream.height = size
        for level in levels:
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (level,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_steps_through_a_video(page: Page) -> None:
    """Each pair has its own difference of brightness, which is the model's flow."""
    levels = [0, 16, 48, 96, 160, 240]
    drop(page, {"film.webm": film(levels)}, "video/webm")
    frames = page.locator("#frame-name")
    for first in range(3):
        expect(frames).to_have_text(f"{first} → {first + 1} of {len(levels)}")
        wait_for_response(page, f'image1=@"film_{first:06}.png"')
        expected = (levels[first + 1] - levels[first]) / 8
        assert read_at(page, 30, 20) == pytest.approx([expected] * 2, abs=0.5)
        page.get_by_role("button", name="Next frame").click()
    page.get_by_label("Frames between image 1 and image 2").fill("2")
    page.get_by_label("Frames between image 1 and image 2").blur()
    wait_for_response(page, "film_000005.png")
    assert read_at(page, 30, 20) == pytest.approx([(240 - 96) / 8] * 2, abs=0.5)


def test_camera_is_live(page: Page) -> None:
    page.get_by_text("Camera", exact=True).click()
    page.get_by_role("button", name="Start the camera").click()
    wait_for_response(page, "camera_1.jpg")
    expect(page.locator("#status")).to_contain_text("pairs a second")
    page.get_by_role("button", name="Stop the camera").click()
    expect(page.get_by_role("button", name="Start the camera")).to_be_visible()


def test_keyboard_moves_the_crosshair(page: Page) -> None:
    readout = page.locator("#readout")
    page.locator("#flow").focus()
    page.keyboard.press("ArrowRight")
    before = readout.inner_text()
    page.keyboard.press("Shift+ArrowDown")
    expect(readout).not_to_have_text(before)
    page.keyboard.press("Escape")
    expect(readout).to_contain_text("Point at")


def test_warp_brings_image_2_back(page: Page) -> None:
    """A shifted image, warped by the shift, is the first image; outside it is transparent."""
    rng = np.random.default_rng(0)
    image2 = rng.integers(0, 256, (12, 20, 3), np.uint8)
    flow = np.full((12, 20, 2), (2.5, 1.0), np.float32)
    pixels = page.evaluate(
        """async ([height, width, rgba, data]) => {
            const {warp} = await import("./web/view.js");
            const canvas = new OffscreenCanvas(width, height);
            const image = new ImageData(new Uint8ClampedArray(rgba), width, height);
            canvas.getContext("2d").putImageData(image, 0, 0);
            const back = warp(canvas, {width, height, data: new Float32Array(data)}, 1);
            return [...back.getContext("2d").getImageData(0, 0, width, height).data];
        }""",
        [12, 20, np.dstack([image2, np.full((12, 20), 255, np.uint8)]).ravel().tolist(),
         flow.ravel().tolist()],
    )  # fmt: skip
    back = np.array(pixels).reshape(12, 20, 4)
    expected = (image2[1:, 2:-1].astype(float) + image2[1:, 3:]) / 2
    assert np.abs(back[:-1, :17, :3] - expected).max() <= 1
    assert (back[:-1, :17, 3] == 255).all()
    assert (back[-1, :, 3] == 0).all()
    assert (back[:, 17:, 3] == 0).all()


def test_a_lost_connection_is_reported(page: Page, context: BrowserContext) -> None:
    context.route("**/estimate_flow/**", lambda route: route.abort())
    page.get_by_role("button", name="Estimate flow").click()
    expect(page.locator("#problem")).to_contain_text("connection was lost")
    context.faults.clear()  # the browser logs what we did
    context.unroute("**/estimate_flow/**")
    page.get_by_role("button", name="Estimate flow").click()
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#problem")).to_be_empty()


def test_asks_for_a_key(
    context: BrowserContext, closed_form_triton: Triton, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    with run_gateway(
        closed_form_triton.address.grpc, tmp_path / "log", GATEWAY_API_KEYS_FILE=str(keys)
    ) as guarded:
        wait_until(lambda: guarded.get("/readyz") == 200)
        page = context.new_page()
        page.goto(guarded.url)
        for key in ("wrong", "the-key"):
            expect(page.locator("#problem-key")).to_contain_text("X-API-Key")
            page.get_by_label("requires an API key").fill(key)
            page.get_by_role("button", name="Use this key").click()
        page.get_by_text("Ready").wait_for()
        page.get_by_role("button", name="Estimate flow").click()
        expect(page.locator("#status")).to_contain_text("Done")
    context.faults.clear()  # the browser logs each 401


def test_page_and_docs_work_below_a_prefix(context: BrowserContext, gateway: Gateway) -> None:
    """As behind a proxy that serves the gateway at /some/prefix/."""
    context.route(
        "**/some/prefix/**",
        lambda route: route.fulfill(
            response=route.fetch(url=route.request.url.replace("/some/prefix", ""))
        ),
    )
    context.route(re.compile(r":\d+/(?!some/prefix/)"), lambda route: route.abort())
    page = context.new_page()
    page.goto(f"{gateway.url}/some/prefix/")
    page.get_by_text("Ready").wait_for()
    page.get_by_role("button", name="Estimate flow").click()
    wait_for_response(page, f"{gateway.url}/some/prefix/estimate_flow/")
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("combobox").first).to_have_value(f"{gateway.url}/some/prefix/")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    for source in ("Video", "Camera", "Images"):
        page.locator("#ask").get_by_text(source, exact=True).click()
        found = Axe().run(page).response["violations"]
        assert [x for x in found if x["impact"] in ("serious", "critical")] == []


def test_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
