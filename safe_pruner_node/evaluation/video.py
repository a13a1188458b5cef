"""The rollout as a film: three cameras with the kept tokens clear, and the kappa trace."""

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

from safe_pruner_node.evaluation.figures import KEYFRAME_COLOUR
from safe_pruner_node.evaluation.run_record import RunRecord

FPS = 15
_WIDTH, _HEIGHT = 1280, 656
_PANELS = {
    "head": (0, 0, 854, 480),
    "left_wrist": (854, 0, 426, 240),
    "right_wrist": (854, 240, 426, 240),
}
"""Camera to x, y, width, height of its panel, pixels."""
_TRACE = (0, 480, 1280, 176)
_TRACE_LEFT, _TRACE_RIGHT = 0.05, 0.985
"""Axes of the trace, as shares of its width."""


def rollout_video(record: RunRecord, path: Path) -> None:
    """Write the film in real time at 15 frames a second.

    Args:
        record: A run with overlays recorded.
        path: MP4 to write (H.264).
    """
    last_s = max(step.time_s for step in record.steps)
    trace = _trace_image(record, last_s)
    font = ImageFont.truetype(
        str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 15
    )
    cursors = dict.fromkeys(record.overlays, 0)
    decoded: dict[str, Image.Image] = {}
    step_index = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for number in track(range(int(last_s * FPS) + 1), "rollout.mp4", transient=True):
            now_s = number / FPS
            for camera, frames in record.overlays.items():
                decoded_at = cursors[camera]
                while decoded_at < len(frames) and frames[decoded_at][0] <= now_s:
                    decoded_at += 1
                if decoded_at != cursors[camera]:
                    cursors[camera] = decoded_at
                    decoded[camera] = _panel(frames[decoded_at - 1][1], camera)
            while (
                step_index + 1 < len(record.steps) and record.steps[step_index + 1].time_s <= now_s
            ):
                step_index += 1
            picture = _compose(decoded, trace, now_s / last_s if last_s else 0.0)
            _caption(picture, record, step_index, now_s, font)
            for packet in stream.encode(_frame(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _frame(picture: Image.Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")


def _panel(jpeg: bytes, camera: str) -> Image.Image:
    """One overlay fitted into its panel, letterboxed in black."""
    _, _, width, height = _PANELS[camera]
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = min(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    panel = Image.new("RGB", (width, height))
    panel.paste(picture.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
    return panel


def _compose(panels: dict[str, Image.Image], trace: Image.Image, progress: float) -> Image.Image:
    """One film frame: panels above, the trace with its time cursor below."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "black")
    for camera, panel in panels.items():
        picture.paste(panel, _PANELS[camera][:2])
    x, y, width, height = _TRACE
    picture.paste(trace, (x, y))
    cursor = x + width * (_TRACE_LEFT + (_TRACE_RIGHT - _TRACE_LEFT) * min(progress, 1.0))
    ImageDraw.Draw(picture).line([(cursor, y), (cursor, y + height)], fill="black", width=2)
    return picture


def _caption(
    picture: Image.Image,
    record: RunRecord,
    index: int,
    now_s: float,
    font: ImageFont.FreeTypeFont,
) -> None:
    """One line over the head camera: time, step, tokens and kappa."""
    step = record.steps[index]
    kind = "KEYFRAME" if step.keyframe else "pruned"
    kappa = "-" if np.isnan(step.kappa) else f"{step.kappa:.3f}"
    text = (
        f"{now_s:5.1f} s   step {step.query}   {kind}   {step.kept_tokens}/{step.visual_tokens}"
        f" tokens   kappa {kappa}   {step.step_ms:.0f} ms"
    )
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, 0, 854, 24], fill=(20, 20, 20))
    draw.text((8, 3), text, font=font, fill=(255, 120, 100) if step.keyframe else (235, 235, 235))


def _trace_image(record: RunRecord, last_s: float) -> Image.Image:
    """kappa over the whole run, keyframes as red lines."""
    _, _, width, height = _TRACE
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((_TRACE_LEFT, 0.24, _TRACE_RIGHT - _TRACE_LEFT, 0.68))
    time_s = [step.time_s for step in record.steps]
    axes.plot(time_s, [step.kappa for step in record.steps], "-", color="#2471a3", lw=1.5)
    axes.plot(time_s, [step.gamma for step in record.steps], "--", color="0.4", lw=1)
    for step in record.steps:
        if step.keyframe:
            axes.axvline(step.time_s, color=KEYFRAME_COLOUR, lw=1)
    axes.set_xlim(0.0, max(last_s, 1e-3))
    axes.set_ylabel("kappa", fontsize=9)
    axes.set_xlabel("time, s (red: keyframe, dashed: gamma)", fontsize=9, labelpad=1)
    axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")
