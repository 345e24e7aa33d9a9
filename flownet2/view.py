"""Visualisations of flow: colours with their legend, arrows, warped frames, error maps.

Flow is float32 `[height, width, 2]` in pixels, NaN where it is unknown. Frames and pictures are
uint8 RGB `[height, width, 3]`.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from flownet2.colours import ERROR_COLOURS, colours, error_colours
from flownet2.formats import Flow, known
from flownet2.images import Pixels
from flownet2.measures import warp

Kind = Literal["colours", "arrows", "warp"]

LEGEND = 97
"""Side of the legend, in pixels."""
THUMBNAIL = 240
"""Longer edge of a picture of a contact sheet, in pixels."""
SHEET_PICTURES = 64
"""Most pictures of a contact sheet."""
_ERROR_LABELS = ("1/16", "1/8", "1/4", "1/2", "1", "2", "4", "8", "16")


def coloured(flow: Flow, maximum: float, image: Pixels | None = None) -> Pixels:
    """Draw the flow in Middlebury's colours, with the wheel of all motions up to `maximum` pixels.

    The colours are multiplied with the grey values of `image`, if it is given.
    """
    picture = colours(flow, maximum)
    if image is not None:
        grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
        picture = (picture.astype(np.uint16) * grey // 255).astype(np.uint8)
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width + LEGEND + 20, max(height, LEGEND + 40)), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    canvas.paste(Image.fromarray(wheel(maximum)), (width + 10, 10))
    label = f"{maximum:.3g} px"
    ImageDraw.Draw(canvas).text((width + 10, LEGEND + 14), label, fill="black")
    return np.asarray(canvas)


def wheel(maximum: float) -> Pixels:
    """Draw the colours of all motions up to `maximum`, each at its end point; white outside."""
    axis = np.linspace(-maximum, maximum, LEGEND, dtype=np.float32)
    flow = np.stack(np.meshgrid(axis, axis), axis=2)
    picture = colours(flow, maximum)
    picture[np.hypot(flow[..., 0], flow[..., 1]) > maximum] = 255
    return picture


def arrows(flow: Flow, background: Pixels | None) -> Pixels:
    """Draw the motion at a grid of points as arrows, on the first frame if it is given."""
    height, width, _ = flow.shape
    pixels = np.full((height, width, 3), 255, np.uint8) if background is None else background
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    spacing = max(8, max(height, width) // 40)
    valid = known(flow)
    for y in range(spacing // 2, height, spacing):
        for x in range(spacing // 2, width, spacing):
            if valid[y, x]:
                u, v = map(float, flow[y, x])
                draw.line((x, y, x + u, y + v), fill=(255, 0, 0))
                draw.ellipse((x + u - 1, y + v - 1, x + u + 1, y + v + 1), fill=(160, 0, 0))
    return np.asarray(picture)


def warped(flow: Flow, second: Pixels) -> Pixels:
    """Warp the second frame onto the first; black where the motion ends outside."""
    return np.rint(warp(second, flow)).astype(np.uint8)


def error_map(flow: Flow, truth: Flow, caption: str) -> Pixels:
    """Draw the end-point errors in KITTI's colours, with their scale and a caption below."""
    picture = error_colours(flow, truth)
    height, width, _ = picture.shape
    box = 34
    canvas = Image.new("RGB", (max(width, box * len(ERROR_COLOURS) + 20), height + 68), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for index, colour in enumerate(ERROR_COLOURS):
        left = 10 + box * index
        fill = tuple(map(int, colour))
        draw.rectangle((left, height + 8, left + box - 1, height + 22), fill=fill)
    for index, label in enumerate(_ERROR_LABELS):
        draw.text((10 + box * (index + 1), height + 24), label, fill="black", anchor="mt")
    draw.text((10, height + 36), "of 3 px or 5 % of the motion; wrong from 1", fill="black")
    draw.text((10, height + 50), caption, fill="black")
    return np.asarray(canvas)


def contact_sheet(pictures: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Arrange pictures in a grid, shrunk, each with its name below."""
    thumbnails = []
    for _, pixels in pictures:
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        thumbnails.append(thumbnail)
    width = max(thumbnail.width for thumbnail in thumbnails) + 8
    height = max(thumbnail.height for thumbnail in thumbnails) + 20
    columns = int(np.ceil(np.sqrt(len(pictures) * height / width)))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (thumbnail, (name, _)) in enumerate(zip(thumbnails, pictures, strict=True)):
        left, top = index % columns * width + 4, index // columns * height + 4
        canvas.paste(thumbnail, (left, top))
        draw.text((left, top + thumbnail.height + 1), name, fill="black")
    return np.asarray(canvas)
