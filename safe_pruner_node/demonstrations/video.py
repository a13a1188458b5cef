"""MP4 files: coded for training, joined without coding again, read in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import final

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from safe_pruner_node.errors import ConfigError
from safe_pruner_node.types import RgbImage

CODEC = "libx264"
PIXEL_FORMAT = "yuv444p"
"""Full colour resolution. With halved colour (yuv420p) the twin's sharp coloured edges stay below
38 dB however many bits are spent; with full colour the same bits give 40."""

OPTIONS = {"crf": "17", "preset": "veryfast", "g": "15", "bf": "0"}
"""A keyframe every 15 frames, for random access; no B-frames, so that files can be joined."""

VIDEO_INFO = {"video.codec": "h264", "video.pix_fmt": PIXEL_FORMAT, "video.g": 15, "video.crf": 17}
"""What ``info.json`` says about the coding."""


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


@final
class VideoFileWriter:
    """Codes frames into one MP4 file. One thread: the processes share the cores.

    Args:
        path: The file.
        fps: Frames per second.
        size: Height and width of the frames.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self._container = av.open(str(path), "w", format="mp4")
        stream = self._container.add_stream(CODEC, rate=_rate(fps))
        assert isinstance(stream, av.VideoStream)  # noqa: S101 - what a video codec gives
        self._stream = stream
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = PIXEL_FORMAT
        self._stream.options = dict(OPTIONS)
        self._stream.codec_context.thread_count = 1

    def add(self, image: RgbImage) -> None:
        """Appends a frame, [height, width, 3]."""
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()


def join(sources: Iterable[tuple[Path, int]], target: Path, fps: float) -> None:
    """Joins files of :class:`VideoFileWriter` one after the other, without coding again.

    Args:
        sources: Each file with its number of frames; all of one size.
        target: The file to write.
        fps: Frames per second of all of them.
    """
    rate = _rate(fps)
    frames = 0
    with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as joined:
        stream: av.VideoStream | None = None
        for path, count in sources:
            with av.open(str(path)) as source:
                template = source.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(template)
                    stream.time_base = template.time_base
                assert template.time_base is not None  # noqa: S101 - our own files have one
                shift = round(frames / rate / template.time_base)
                for packet in source.demux(template):
                    if packet.dts is None:  # the empty one at the end
                        continue
                    assert packet.pts is not None  # noqa: S101 - as above
                    packet.pts += shift
                    packet.dts += shift
                    packet.stream = stream
                    joined.mux(packet)
            frames += count


class VideoFileReader:
    """Reads runs of frames from one file, in order. Not for several threads at once.

    Args:
        path: The file.
        size: Height and width that its frames must have.

    Raises:
        ConfigError: No such file, not a video, or another size.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path = path
        self._size = size
        self._reformat = VideoReformatter()
        try:
            self._container = av.open(str(path))
        except FileNotFoundError:
            raise ConfigError(path, "", "nothing", "a video file") from None
        except (FFmpegError, OSError) as error:
            raise ConfigError(path, "", _said(error), "a video file") from None
        if not self._container.streams.video:
            raise ConfigError(path, "", "a file without video", "a video file")
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        found = self._stream.height, self._stream.width
        if found != size:
            self.close()
            raise ConfigError(
                path, "frame size", f"{found[1]}x{found[0]}", f"{size[1]}x{size[0]} (info.json)"
            )

    def read(self, start_s: float, fps: float, wanted: range, frames: int) -> NDArray[np.uint8]:
        """Frames of one episode.

        Args:
            start_s: Time of the episode's first frame in the file, s.
            fps: Frames per second.
            wanted: Which frames, counted from the episode's first.
            frames: How many the episode has, for the error line.

        Returns:
            [len(wanted), height, width, 3].

        Raises:
            ConfigError: The file ends too early, or is damaged.
        """
        images = np.empty((len(wanted), *self._size, 3), np.uint8)
        taken = seen = 0
        if len(wanted) == 0:
            return images
        try:
            for frame in self._from(start_s, fps):
                if seen == wanted[taken]:
                    self._convert(frame, images[taken])
                    taken += 1
                    if taken == len(wanted):
                        return images
                seen += 1
        except FFmpegError as error:
            raise ConfigError(self.path, f"from {start_s:g} s", _said(error), "frames") from None
        raise ConfigError(
            self.path, f"from {start_s:g} s", f"{seen} frames", f"{frames}, the episode's length"
        )

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def _from(self, start_s: float, fps: float) -> Iterator[av.VideoFrame]:
        time_base = self._stream.time_base
        assert time_base is not None  # noqa: S101 - FFmpeg gives every video stream one
        self._container.seek(round(start_s / float(time_base)), stream=self._stream)
        first_s = start_s - 0.5 / fps  # nearest frame: stamps are rounded to the file's ticks
        for frame in self._container.decode(self._stream):
            if frame.time is not None and frame.time >= first_s:
                yield frame

    def _convert(self, frame: av.VideoFrame, image: NDArray[np.uint8]) -> None:
        rgb = self._reformat.reformat(frame, format="rgb24")
        if (rgb.height, rgb.width) != self._size:
            found = f"{rgb.width}x{rgb.height}"
            expected = f"{self._size[1]}x{self._size[0]} (info.json)"
            raise ConfigError(self.path, "frame size", found, expected)
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        image[:] = rows[: rgb.height, : 3 * rgb.width].reshape(image.shape)


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
