"""The rollouts as a film: three cameras, what the policy kept of them, progress, and kappa."""

from __future__ import annotations

import io
from pathlib import Path

import av
import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

mpl.use("Agg")

import matplotlib.pyplot as plt

from safe_pruner_node.evaluation.figures import KAPPA_COLOUR, KEYFRAME_COLOUR
from safe_pruner_node.evaluation.run_record import EpisodeRecord, StepRecord

FPS = 15
LAST_PICTURE_S = 1.5
"""How long an episode's last picture stays, with how it ended."""

_WIDTH, _HEIGHT = 1280, 720
_TITLE_HEIGHT = 40
_BAND = 520
"""Where the band below the cameras begins, pixels."""
_CAMERAS = {
    "head": (0, 40, 852, 480),
    "left_wrist": (854, 40, 426, 239),
    "right_wrist": (854, 281, 426, 239),
}
"""Camera to x, y, width, height of its picture, pixels."""
_KEPT = {
    "head": (8, 552, 208, 118),
    "left_wrist": (222, 552, 208, 118),
    "right_wrist": (436, 552, 208, 118),
}
"""The same for what the policy kept of it."""
_BAR = (8, 690, 636, 20)
_TRACE = (652, 524, 628, 196)
_TRACE_LEFT, _TRACE_RIGHT = 0.09, 0.985
"""Axes of the trace, as shares of its width."""

_BACKGROUND = (24, 26, 29)
_PALE = (232, 234, 237)
_DIM = (150, 155, 162)
_RED = (255, 120, 100)
_GREEN = (88, 200, 120)


class RolloutFilm:
    """An MP4 that grows by an episode at a time; close it at the end.

    Args:
        path: File to write (H.264, 15 frames a second, real time).
    """

    def __init__(self, path: Path) -> None:
        self._container = av.open(str(path), "w", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream("libx264", rate=FPS)
        self._stream.width, self._stream.height = _WIDTH, _HEIGHT
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "23", "preset": "veryfast"}
        self._fonts = {size: _font(size) for size in (13, 15, 18)}

    def close(self) -> None:
        """Ends the file."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()

    def add(self, episode: EpisodeRecord) -> None:
        """Appends an episode.

        Args:
            episode: With its images and overlays; needs at least one step.
        """
        trace = _trace_image(episode)
        images, kept = _Newest(episode.images, _CAMERAS), _Newest(episode.overlays, _KEPT)
        picture = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
        for number in track(range(int(episode.wall_s * FPS) + 1), "film", transient=True):
            now_s = number / FPS
            picture = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
            images.paste(picture, now_s)
            kept.paste(picture, now_s)
            self._words(picture, episode, now_s)
            _paste_trace(picture, trace, now_s / max(episode.wall_s, 1e-9))
            self._write(picture)
        self._outcome(picture, episode)
        for _ in range(int(LAST_PICTURE_S * FPS)):
            self._write(picture)

    def _write(self, picture: Image.Image) -> None:
        frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def _words(self, picture: Image.Image, episode: EpisodeRecord, now_s: float) -> None:
        """The prompt above; step, progress and its bar below."""
        draw = ImageDraw.Draw(picture)
        draw.text((12, 9), f"“{episode.prompt}”", font=self._fonts[18], fill=_PALE)
        clock = f"{now_s:4.1f} s   {episode.task}, seed {episode.seed}"
        draw.text((_WIDTH - 12, 12), clock, font=self._fonts[15], fill=_DIM, anchor="ra")
        step = _step_at(episode, now_s)
        if step is not None:
            colour = _RED if step.keyframe else _PALE
            draw.text((8, _BAND + 8), _step_words(step), font=self._fonts[15], fill=colour)
        progress = max((value for at_s, value in episode.stages if at_s <= now_s), default=0.0)
        x, y, width, height = _BAR
        words = f"progress {progress:.0f}"
        draw.text((x, y - 17), words, font=self._fonts[13], fill=_DIM)
        draw.rectangle([x, y, x + width, y + height], fill=(52, 56, 62))
        colour = _GREEN if progress >= 100 else (92, 150, 214)
        if progress > 0:
            draw.rectangle([x, y, x + width * progress / 100, y + height], fill=colour)
        if progress >= 100:
            self._flag(draw, "SUCCESS", _GREEN)

    def _outcome(self, picture: Image.Image, episode: EpisodeRecord) -> None:
        """Over an episode's last picture."""
        draw = ImageDraw.Draw(picture)
        if episode.success:
            self._flag(draw, f"SUCCESS after {episode.seconds:.1f} s", _GREEN)
        else:
            self._flag(draw, f"NOT DONE in {episode.seconds:.1f} s", _RED)

    def _flag(self, draw: ImageDraw.ImageDraw, words: str, colour: tuple[int, int, int]) -> None:
        font = self._fonts[18]
        width = int(draw.textlength(words, font=font)) + 24
        draw.rectangle([12, 54, 12 + width, 88], fill=colour)
        draw.text((24, 60), words, font=font, fill=(12, 14, 16))


class _Newest:
    """Of every camera the newest picture at a time that only grows, fitted into its place."""

    def __init__(
        self,
        pictures: dict[str, list[tuple[float, bytes]]],
        places: dict[str, tuple[int, int, int, int]],
    ) -> None:
        self._pictures = pictures
        self._places = places
        self._next = dict.fromkeys(pictures, 0)
        self._decoded: dict[str, Image.Image] = {}

    def paste(self, picture: Image.Image, now_s: float) -> None:
        for camera, frames in self._pictures.items():
            following = self._next[camera]
            while following < len(frames) and frames[following][0] <= now_s:
                following += 1
            if following != self._next[camera]:
                self._next[camera] = following
                size = self._places[camera][2:]
                self._decoded[camera] = _fitted(frames[following - 1][1], size)
            if camera in self._decoded:
                picture.paste(self._decoded[camera], self._places[camera][:2])


def _fitted(jpeg: bytes, size: tuple[int, int]) -> Image.Image:
    """A picture as large as its place allows, letterboxed in black."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = min(size[0] / picture.width, size[1] / picture.height)
    fitted = (round(picture.width * scale), round(picture.height * scale))
    panel = Image.new("RGB", size)
    panel.paste(picture.resize(fitted), ((size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2))
    return panel


def _font(size: int) -> ImageFont.FreeTypeFont:
    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), size)


def _step_at(episode: EpisodeRecord, now_s: float) -> StepRecord | None:
    """The newest step at a time; None before the first."""
    before = [step for step in episode.steps if step.time_s <= now_s]
    return before[-1] if before else None


def _step_words(step: StepRecord) -> str:
    kappa = "" if np.isnan(step.kappa) else f"   kappa {step.kappa:.3f}"
    kind = "KEYFRAME" if step.keyframe else "pruned"
    tokens = f"{step.kept_tokens} of {step.visual_tokens} tokens"
    return f"step {step.query}   {kind}   {tokens}{kappa}   {step.step_ms:.0f} ms"


def _paste_trace(picture: Image.Image, trace: Image.Image, share: float) -> None:
    x, y, width, height = _TRACE
    picture.paste(trace, (x, y))
    cursor = x + width * (_TRACE_LEFT + (_TRACE_RIGHT - _TRACE_LEFT) * min(share, 1.0))
    line = [(cursor, y + 8), (cursor, y + height - 40)]
    ImageDraw.Draw(picture).line(line, fill=_PALE, width=2)


def _trace_image(episode: EpisodeRecord) -> Image.Image:
    """kappa over the episode: keyframes as red lines, stages of the task as green ones."""
    _, _, width, height = _TRACE
    background = "#{:02x}{:02x}{:02x}".format(*_BACKGROUND)
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor=background)
    axes = figure.add_axes((_TRACE_LEFT, 0.22, _TRACE_RIGHT - _TRACE_LEFT, 0.74))
    axes.set_facecolor("#212427")
    steps = episode.steps
    time_s = [step.time_s for step in steps]
    for step in steps:
        if step.keyframe:
            axes.axvline(step.time_s, color=KEYFRAME_COLOUR, lw=1.2)
    for at_s, progress in episode.stages:
        if progress > 0:
            axes.axvline(at_s, color="#58c878", lw=1.2, ls=":")
    axes.plot(time_s, [step.gamma for step in steps], "--", color="0.6", lw=1)
    axes.plot(time_s, [step.kappa for step in steps], "-o", color=KAPPA_COLOUR, lw=1.5, ms=3)
    axes.set_xlim(0.0, max(episode.wall_s, 1e-3))
    axes.set_ylabel("kappa", fontsize=9, color="0.85")
    words = "time, s   (red: keyframe, dashed: gamma, green: the task gets on)"
    axes.set_xlabel(words, fontsize=8, color="0.85", labelpad=1)
    axes.tick_params(labelsize=8, colors="0.7")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor=background)
    plt.close(figure)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
