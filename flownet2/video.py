"""Video in and out: each frame decoded once, and a video of pictures, by FFmpeg's libraries."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from flownet2 import storage
from flownet2.errors import Error
from flownet2.images import Pixels

TICKS = 90_000
"""Ticks of a second in written videos."""


class VideoError(Error):
    """A video that cannot be read, or not to its end; the message names it and says how far."""


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame; `pixels` converts it."""

    number: int
    time: float
    frame: av.VideoFrame

    def pixels(self) -> Pixels:
        """Uint8 RGB `[H, W, 3]`, upright as its rotation metadata says, from any pixel format."""
        return np.rot90(self.frame.to_ndarray(format="rgb24"), round(self.frame.rotation / 90))


def count(path: str) -> int | None:
    """How many frames a video says it has, roughly; None where it does not say."""
    with _open(path) as (container, stream):
        if stream.frames:
            return int(stream.frames)
        if container.duration and stream.average_rate:
            return int(container.duration / 1e6 * stream.average_rate)
    return None


def frames(path: str) -> Iterator[VideoFrame]:
    """The frames of a video file, or of a camera by its device, in order, each decoded once.

    Raises:
        VideoError: it is no video, or is damaged or cut off; after all frames that can be read.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        number, packets, end, reason = 0, 0, 0.0, ""
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    reason = "it is damaged or cut off there"
                if packet.size and packet.pts is not None:
                    packets += 1
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for frame in packet.decode():
                    yield VideoFrame(
                        number, number / 25 if frame.time is None else frame.time, frame
                    )
                    number += 1
        except av.error.FFmpegError as error:
            reason = str(error.strerror)
        # A file that was cut off ends like any other, but earlier than its head says.
        if end < _end(container, stream) and not 0 < stream.frames <= packets:
            reason = reason or "it is cut off there"
        if reason:
            missing = f" of about {stream.frames}" if stream.frames else ""
            raise VideoError(f"{path} can be read up to frame {number}{missing} only: {reason}")


def _end(container: Any, stream: Any) -> float:
    """The earliest time, in seconds, at which a whole file can end, by what its head says."""
    start = float((stream.start_time or 0) * stream.time_base)
    frame = 1 / float(stream.average_rate or 25)
    if container.format.name == "avi":  # whose other figures are of what is there
        return start + (int(stream.frames) - 1.5) * frame
    if stream.duration:
        return start + float(stream.duration * stream.time_base) - 1.5 * frame
    # Matroska tells the length of the longest stream.
    others = 2.0 if len(container.streams) > 1 else 0.0
    return start + float(container.duration or 0) / 1e6 - others - 1.5 * frame


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[Any, Any]]:
    """The file and its best video stream."""
    with contextlib.ExitStack() as stack:
        try:
            if path.startswith("/dev/"):
                container = stack.enter_context(av.open(path, mode="r", format="v4l2"))
            else:
                file = stack.enter_context(storage.open_file(path))
                container = stack.enter_context(av.open(file, mode="r"))
        except FileNotFoundError as error:
            raise VideoError(f"{path} does not exist") from error
        except (OSError, ValueError) as error:  # FFmpeg's errors are one of the two
            reason = getattr(error, "strerror", None) or error
            raise VideoError(f"{path} cannot be read as a video: {reason}") from error
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream: give a video, or a folder of frames")
        yield container, container.streams.video[0]


def write(path: Path, pictures: Iterable[tuple[float, Pixels]]) -> None:
    """Write a video (H.264, 4:2:0) of pictures with their times in seconds.

    Odd sides lose nothing: the last row or column is repeated, as 4:2:0 wants even ones.
    """
    with av.open(str(path), mode="w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        shown = -1
        for time, pixels in pictures:
            height, width, _ = pixels.shape
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if shown < 0:
                stream.height, stream.width = even.shape[:2]
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            shown = max(round(time * TICKS), shown + 1)
            frame.pts, frame.time_base = shown, Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
