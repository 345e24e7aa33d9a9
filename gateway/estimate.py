"""The work of one request: decode two images, infer their flow, encode the response."""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from flownet2 import contract, measures
from flownet2.formats import Flow
from flownet2.models import Model
from gateway import fields, images
from gateway.admission import SLOT_BYTES, Reservation
from gateway.context import Context
from gateway.encoders import ENCODINGS, Estimate, Format
from gateway.errors import ImageTooLarge
from gateway.settings import Settings
from gateway.state import State

Direction = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class EncodedFlow:
    """A flow as it is sent, and the back factors of x and y."""

    content: bytes
    scale: tuple[float, float]


async def estimate(
    state: State, job: "Job", body_bytes: Reservation, response_bytes: Reservation
) -> EncodedFlow:
    """Decode, infer and encode.

    Args:
        state: the gateway's state.
        job: the request.
        body_bytes: released when the images are decoded.
        response_bytes: grows to the size of the response.
    """
    context, run = job.context, state.threads.run
    pair = await run(job.open, state.settings)
    width, height = next(iter(pair.values())).size
    state.metrics.image_pixels.observe(width * height)
    queued = time.perf_counter()
    with Reservation(state.limits.slots) as slots:
        weight = max(1, -(-images.working_bytes(pair, job.native) // SLOT_BYTES))
        await slots.wait(weight * (2 if job.direction == "both" else 1))
        context.stages["queue"] = time.perf_counter() - queued
        batches = await run(job.prepare, pair)
        body_bytes.release()
        with context.stage("infer"):
            flows = [
                flow
                for image1, image2 in batches
                for flow in await state.cluster.infer(
                    job.model.name,
                    image1,
                    image2,
                    deadline=job.deadline,
                    request_id=context.request_id,
                    headers=context.trace_headers,
                )
            ]
        with context.stage("encode"):
            encoded = await run(job.encode, flows, (width, height))
        await response_bytes.wait(len(encoded.content))
        return encoded


@dataclass(kw_only=True)
class Job:
    """A request, and the parts of its work that run in threads.

    Attributes:
        content: body of the request; `open` empties it to free the memory.
        content_type: its `Content-Type`.
        model: network to use.
        native: True to compute at the images' own size, False to resize them to 512x512.
        direction: flow from the first image to the second, the reverse, or both.
        format: format of the response.
        encoding: content coding of the response, or None.
        deadline: time on the event loop's clock when the client stops waiting.
        context: the request's context, for the times of the stages.
    """

    content: bytearray
    content_type: str
    model: Model
    native: bool
    direction: Direction
    format: Format
    encoding: str | None
    deadline: float
    context: Context

    def open(self, settings: Settings) -> dict[str, Image.Image]:
        """Parse the body and the headers of the images.

        Raises:
            GatewayError: a fault of the body or of the images.
        """
        content, self.content = self.content, bytearray()
        with self.context.stage("decode"):
            files = fields.parse(content, self.content_type)
            pair = images.open_pair(files, settings.image_formats, settings.max_image_pixels)
        for field, image in pair.items():
            if self.native:
                images.check_native(image, field, settings.max_native_pixels)
            self._check_model(image, field)
        return pair

    def _check_model(self, image: Image.Image, field: str) -> None:
        """Check the pixel limit of the model.

        Raises:
            ImageTooLarge: it is exceeded.
        """
        limit = self.model.max_pixels
        width, height = image.size if self.native else images.GRID
        if limit is not None and images.padded_area(width, height) > limit:
            advice = "" if self.native else " with size=native"
            raise ImageTooLarge(
                f"The model {self.model.name} computes at most {limit} pixels, each side rounded "
                f"up to a multiple of {contract.SIZE_MULTIPLE}; {field} has more at "
                f"{width}x{height}. Send smaller images{advice}, or choose another model.",
                field=field,
            )

    def prepare(self, pair: dict[str, Image.Image]) -> list[tuple[images.Pixels, images.Pixels]]:
        """Convert the images to inputs of the model, one after the other to save memory.

        Returns:
            First and second images of one batch or of two, uint8 [N, height, width, 3].
        """
        prepared = []
        for field in list(pair):
            with self.context.stage("decode"):
                image = images.load(pair.pop(field), field)
            with self.context.stage("resize"):
                prepared.append(images.to_rgb(image, field, self.native))
            del image
        first, second = (image[None] for image in prepared)
        if self.direction == "forward":
            return [(first, second)]
        if self.direction == "backward":
            return [(second, first)]
        _, height, width, _ = first.shape
        limit = self.model.max_pixels  # of a batch, as it bounds the memory of an inference
        too_many = limit is not None and 2 * images.padded_area(width, height) > limit
        if too_many or max(height, width) > contract.BATCH_EDGE:
            return [(first, second), (second, first)]
        return [(np.concatenate([first, second]), np.concatenate([second, first]))]

    def encode(self, flows: list[Flow], size: tuple[int, int]) -> EncodedFlow:
        """Scale flows to pixels of the original images, and encode them.

        Args:
            flows: one flow, or two for both directions, in pixels of the model's input.
            size: width and height of the original images.
        """
        occluded = measures.occluded(*flows) if self.direction == "both" else None
        scale = (1.0, 1.0)
        if not self.native:
            scale = (size[0] / images.GRID[0], size[1] / images.GRID[1])
            flows = [_scaled(flow, scale) for flow in flows]
        flow, *backward = flows
        result = Estimate(flow, scale, backward[0] if backward else None, occluded)
        content = self.format.encode(result)
        if self.encoding:
            content = ENCODINGS[self.encoding](content)
        return EncodedFlow(content, scale)


def _scaled(flow: Flow, scale: tuple[float, float]) -> Flow:
    """Multiply u and v by a factor each."""
    rows = flow.reshape(len(flow), -1)  # NumPy is slow along an axis of two
    factors = np.tile(np.array(scale, np.float32), flow.shape[1])
    return (rows * factors).reshape(flow.shape)
