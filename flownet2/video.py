"""Decoding and encoding of videos with FFmpeg's libraries."""

import contextlib
import errno
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter
import numpy as np
from av.video.reformatter import VideoReformatter

from flownet2 import storage
from flownet2.errors import Error
from flownet2.images import Pixels

PIPE = "-"
"""The path that stands for standard input."""
TICKS_PER_SECOND = 90_000
"""Time base of written videos."""

_NETWORK = re.compile(r"(https?|rtsps?|rtmps?|rtp|udp|tcp|srt|mms)://", re.IGNORECASE)
_OPEN_SECONDS, _READ_SECONDS = 10.0, 30.0
"""Timeouts of network streams."""
_LONGEST_LOSS_SECONDS = 10.0
"""A longer gap between two frames is a cut between recordings, not a loss."""
_DELAYED_FRAMES = 64
"""Largest delay of a decoder, in packets, by reordering and threads."""


_converters = threading.local()
"""FFmpeg's converters to RGB: they are slow to set up and serve one thread each."""


class VideoError(Error):
    """Raised when a video cannot be read, or only in part; the message says which part."""


@dataclass(frozen=True)
class VideoFrame:
    """A decoded frame.

    Attributes:
        number: position in the video, from 0; lost frames count.
        time: presentation time in seconds.
        picture: the frame as FFmpeg decoded it.
        continuous: False if frames are missing between the previous frame and this one.
    """

    number: int
    time: float
    picture: av.VideoFrame
    continuous: bool = True

    def pixels(self) -> Pixels:
        """Convert to uint8 RGB `[H, W, 3]`, rotated and mirrored as players show it."""
        if not hasattr(_converters, "rgb"):
            _converters.rgb = VideoReformatter()
        picture = _converters.rgb.reformat(self.picture, format="rgb24")
        pixels: Pixels = picture.to_ndarray()
        side_data: Any = self.picture.side_data
        for data in side_data.keys():  # noqa: SIM118  not a dict
            if data.type.name == "DISPLAYMATRIX":
                return _oriented(pixels, np.frombuffer(bytes(data), np.int32))
        return pixels


def _oriented(pixels: Pixels, matrix: np.ndarray[Any, Any]) -> Pixels:
    """Apply a display matrix: x' = a x + c y and y' = b x + d y, rounded to right angles."""
    a, b, _, c, d = (int(value) for value in matrix[:5])
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def is_live(path: str) -> bool:
    """Return True for cameras, pipes and network streams, which cannot be read twice."""
    return path == PIPE or path.startswith("/dev/") or is_network(path)


def is_network(path: str) -> bool:
    """Return True if FFmpeg reads the path over the network itself."""
    return _NETWORK.match(path) is not None


@dataclass(frozen=True)
class Facts:
    """Facts in a video's header: number of frames (estimated) and frames per second, or None."""

    frames: int | None
    rate: float | None


def facts(path: str) -> Facts:
    """Read the header of a video file; raise VideoError if it is not one."""
    with _open(path) as (container, stream):
        rate = float(stream.average_rate) if stream.average_rate else None
        seconds = (container.duration or 0) / av.time_base
        tag = _matroska_duration(stream)
        frames = int(stream.frames) or int((tag or seconds) * (rate or 0)) or None
        return Facts(frames, rate)


def is_video(path: str) -> bool:
    """Return True if FFmpeg finds and decodes a video stream in a file."""
    try:
        with _open(path) as (container, stream):
            if stream.codec_context.name in ("ansi", "bintext", "xbin", "idf"):  # text
                return False
            return next(container.decode(stream), None) is not None
    except (VideoError, storage.StorageError, av.error.FFmpegError):
        return False


def frames(
    path: str, *, deinterlace: bool = False, warn: Callable[[str], None] = lambda _: None
) -> Iterator[VideoFrame]:
    """Decode the frames of a video in order, without those that are damaged.

    Args:
        path: a file, a URL, a camera's device, or `PIPE`.
        deinterlace: whether to combine the fields of each frame into a progressive frame.
        warn: receives a line if the video is interlaced and `deinterlace` is False.

    Raises:
        VideoError: the file is not a video, or parts of it are damaged, missing or cut off; raised
            after all frames that can be decoded.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        reading = _Reading(container, stream, is_live(path))
        filtered = _Deinterlaced(stream) if deinterlace else None
        read, interlaced = 0, False
        for frame in reading.frames():
            if frame.picture.interlaced_frame and not (interlaced or deinterlace):
                interlaced = True
                warn(f"{path} is interlaced: --deinterlace removes the combs at moving edges")
            for done in filtered.add(frame) if filtered else (frame,):
                yield done
                read = done.number + 1
        for done in filtered.flush() if filtered else ():
            yield done
            read = done.number + 1
        problem = reading.problem(read)
        if problem:
            raise VideoError(f"{path} {problem}")


class _Reading:
    """Decodes a stream, and finds out which frames are lost.

    Losses show in errors of the decoder, in frames that FFmpeg marks as corrupt, and in the length
    of the file. A gap in the timestamps is a loss near a corrupt packet, and in transport streams
    of constant frame rate. A corrupt packet alone is not a loss: joined transport streams have such
    a packet at each joint. After a loss, frames are used from the next key frame on, because
    earlier frames are predicted from lost frames.
    """

    def __init__(self, container: Any, stream: Any, live: bool) -> None:
        self._container = container
        self._stream = stream
        self._live = live
        self._period = 1 / float(stream.average_rate or 25)
        self._transport = container.format.name == "mpegts"
        self._packets = 0
        self._video_end = 0.0
        self._longest_end = 0.0
        self._error = ""
        self._started = False
        self._suspect = 0
        """Number of the next frames before which a gap in the timestamps is a loss."""
        self._broken = False
        """True while frames are predicted from lost frames."""
        self._intervals = 0
        self._regular_intervals = 0
        self._decoder_errors = 0
        self._lost = 0
        self._first_loss = 0

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the frames that decoded without damage."""
        number, last, continuous = 0, None, True
        for frame in self._decoded():
            if not self._started and self._transport and frame.is_corrupt:
                continue  # a recording that begins between two key frames
            self._started = True
            time = number * self._period if frame.time is None else float(frame.time)
            if last is None:
                lost = self._decoder_errors
            else:
                lost = self._lost_in(time - last, bool(frame.is_corrupt))
            last = time
            self._broken = (self._broken or lost > 0 or frame.is_corrupt) and not (
                frame.key_frame and not frame.is_corrupt
            )
            if lost or self._broken:
                self._first_loss = self._first_loss if self._lost else number
                self._lost += lost + self._broken
                continuous = False
            number += lost
            if not self._broken:
                yield VideoFrame(number, time, frame, continuous)
                continuous = True
            number += 1

    def _lost_in(self, interval: float, corrupt: bool) -> int:
        """Return the number of frames that are lost in the interval between two frames."""
        regular = self._transport and self._regular_intervals > max(10, 0.9 * self._intervals)
        self._intervals += 1
        self._regular_intervals += abs(interval - self._period) < 0.1 * self._period
        suspect = self._suspect > 0 or corrupt or regular
        self._suspect = _DELAYED_FRAMES if corrupt else max(0, self._suspect - 1)
        if suspect and 1.5 * self._period < interval <= _LONGEST_LOSS_SECONDS:
            return round(interval / self._period) - 1
        return 0

    def _decoded(self) -> Iterator[av.VideoFrame]:
        kinds = ("video", "audio", "subtitle")
        streams = [stream for stream in self._container.streams if stream.type in kinds]
        try:
            for packet in self._container.demux(streams):
                wanted = packet.stream.index == self._stream.index
                if packet.size and packet.pts is not None:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    self._longest_end = max(self._longest_end, end)
                    if wanted:
                        self._packets += 1
                        self._video_end = max(self._video_end, end)
                if not wanted:
                    continue
                if packet.is_corrupt:
                    self._suspect = _DELAYED_FRAMES
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    if self._started or not self._transport:
                        self._suspect = _DELAYED_FRAMES
                        self._broken = True
                        self._decoder_errors += 1
        except av.error.FFmpegError as error:
            # FFmpeg reports the end of an HTTP stream without a length as EIO.
            if not (self._live and error.errno == errno.EIO):
                self._error = str(error.strerror)
            with contextlib.suppress(av.error.FFmpegError):
                yield from self._stream.decode(None)

    def problem(self, read: int) -> str:
        """Return what is wrong with the video after `read` frames, or ""."""
        about = f" of about {self._stream.frames}" if self._stream.frames else ""
        if self._error or self._cut_off():
            reason = self._error or "it is cut off there"
            return f"can be read up to frame {read}{about} only: {reason}"
        lost = max(self._lost, self._decoder_errors)
        if lost:
            where = f", the first at frame {self._first_loss}" if self._lost else ""
            return f"is damaged: {lost} frame{'s are' if lost > 1 else ' is'} missing{where}"
        return ""

    def _cut_off(self) -> bool:
        """Return True if the packets end before the length that the header gives."""
        container, stream = self._container, self._stream
        if self._live or container.format.flags & av.format.Flags.no_timestamps.value:
            return False  # there is no length, or one estimated from the bit rate
        if self._video_end >= _promised_end(container, stream):
            return False
        if stream.frames:
            return bool(self._packets < stream.frames)
        # The header gives the length of the longest stream, or estimates it.
        return self._longest_end < float(container.duration or 0) / av.time_base - 0.5


def _promised_end(container: Any, stream: Any) -> float:
    """Return the earliest time, in seconds, at which a complete video can end."""
    start = float((stream.start_time or 0) * stream.time_base)
    frame = 1 / float(stream.average_rate or 25)
    if container.format.name == "avi":  # its duration is computed from the existing data
        return start + (int(stream.frames) - 1.5) * frame
    if stream.duration:
        return start + float(stream.duration * stream.time_base) - 1.5 * frame
    tag = _matroska_duration(stream)
    if tag is not None:
        return tag - 1.5 * frame
    # Streams of other kinds may be longer.
    others = 2.0 if len(container.streams) > 1 else 0.0
    return start + float(container.duration or 0) / av.time_base - others - 1.5 * frame


def _matroska_duration(stream: Any) -> float | None:
    """Return the length of one stream, in seconds, that FFmpeg notes in Matroska files."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) if tag else None


class _Deinterlaced:
    """FFmpeg's `bwdif`: one progressive frame for each frame, one frame late."""

    def __init__(self, stream: Any) -> None:
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(template=stream)
        deinterlace = self._graph.add("bwdif", "mode=send_frame")
        source.link_to(deinterlace)
        deinterlace.link_to(self._graph.add("buffersink"))
        self._graph.configure()
        self._waiting: deque[VideoFrame] = deque()

    def add(self, frame: VideoFrame) -> Iterator[VideoFrame]:
        """Take a frame and return those that are ready."""
        self._waiting.append(frame)
        self._graph.push(frame.picture)
        return self._ready()

    def flush(self) -> Iterator[VideoFrame]:
        """Return the remaining frames."""
        self._graph.push(None)
        return self._ready()

    def _ready(self) -> Iterator[VideoFrame]:
        while self._waiting:
            try:
                picture = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            frame = self._waiting.popleft()
            assert isinstance(picture, av.VideoFrame)
            yield VideoFrame(frame.number, frame.time, picture, frame.continuous)


@contextlib.contextmanager
def _open(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a video and choose its stream: FFmpeg's best one that is not a cover picture."""
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(_opened(path, stack))
        except storage.NotFound:
            raise
        except (OSError, ValueError, av.error.FFmpegError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(f"{path} cannot be read as a video: {reason}") from error
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError(f"{path} has no video stream: give a video, or a folder of frames")
        yield container, stream


def _opened(path: str, stack: contextlib.ExitStack) -> Any:
    if path == PIPE:
        return av.open("pipe:0")
    if path.startswith("/dev/"):
        return av.open(path, format="v4l2")
    if is_network(path):
        options = {"rtsp_transport": "tcp"} if path.lower().startswith("rtsp") else {}
        return av.open(path, options=options, timeout=(_OPEN_SECONDS, _READ_SECONDS))
    return av.open(stack.enter_context(storage.open_file(path)))


def write(path: Path, pictures: Iterable[tuple[float, Pixels]]) -> None:
    """Write a video (H.264, 4:2:0).

    4:2:0 needs even sides, so the last row or column of odd ones is repeated.

    Args:
        path: the file to write.
        pictures: presentation times in seconds, and uint8 RGB `[H, W, 3]` of one size.
    """
    with path.open("wb") as file, av.open(file, mode="w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)
        shown = -1
        for time, pixels in pictures:
            height, width, _ = pixels.shape
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if shown < 0:
                stream.height, stream.width = even.shape[:2]
            frame = av.VideoFrame.from_ndarray(even, format="rgb24")
            shown = max(round(time * TICKS_PER_SECOND), shown + 1)
            frame.pts, frame.time_base = shown, Fraction(1, TICKS_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
