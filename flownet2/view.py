"""A flow as a picture for people: colours with their legend, arrows, or the second frame warped."""

from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from flownet2.colours import colours
from flownet2.formats import Flow, known
from flownet2.images import Pixels
from flownet2.measures import warp

Kind = Literal["colours", "arrows", "warp"]

LEGEND = 97
"""Side of the legend, in pixels."""


def coloured(flow: Flow, maximum: float) -> Pixels:
    """The flow in Middlebury's colours, and beside it the wheel of `maximum` pixels of motion."""
    picture = colours(flow, maximum)
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width + LEGEND + 20, max(height, LEGEND + 40)), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    canvas.paste(Image.fromarray(wheel(maximum)), (width + 10, 10))
    label = f"{maximum:.3g} px"
    ImageDraw.Draw(canvas).text((width + 10, LEGEND + 14), label, fill="black")
    return np.asarray(canvas)


def wheel(maximum: float) -> Pixels:
    """The colours of all motions up to `maximum`, each where it points to; white outside."""
    axis = np.linspace(-maximum, maximum, LEGEND, dtype=np.float32)
    flow = np.stack(np.meshgrid(axis, axis), axis=2)
    picture = colours(flow, maximum)
    picture[np.hypot(flow[..., 0], flow[..., 1]) > maximum] = 255
    return picture


def arrows(flow: Flow, background: Pixels | None) -> Pixels:
    """An arrow at every few pixels, from where a point is to where it goes."""
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
    """The second frame as the first saw it, if the flow is right; black outside of it."""
    return np.rint(warp(second, flow)).astype(np.uint8)
