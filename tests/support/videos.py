"""Videos for tests."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.support.gateway_stack import picture


def write_video(
    path: Path,
    count: int,
    size: tuple[int, int] = (64, 48),
    *,
    codec: str = "",
    pixels: str = "",
    times: Callable[[int], Fraction] | None = None,
    format: str | None = None,
    sound: tuple[str, int, float] | None = None,
    **options: str,
) -> list[np.ndarray]:
    """Write a video of random pictures and return them.

    Args:
        codec: by default FFV1, which is lossless, in Matroska, and H.264 of RGB elsewhere.
        pixels: pixel format.
        sound: codec, rate in Hz and length in seconds of a silent sound track.
        options: options of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = path.suffix == ".mkv"
    pixels = pixels or ("bgr0" if lossless else "rgb24")
    codec = codec or ("ffv1" if lossless else "libx264rgb")
    images = [np.asarray(picture(seed, *size)) for seed in range(count)]
    with av.open(str(path), "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        base = Fraction(1, 1000 if times else 25)
        stream.codec_context.time_base = base
        audio = container.add_stream(sound[0], rate=sound[1]) if sound else None
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(times(number) / base) if times else number, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio and sound:
            silence = np.zeros((1, round(sound[1] * sound[2])), np.float32)
            samples = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
            samples.rate = sound[1]
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))
    return images
