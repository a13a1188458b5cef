"""Rendering beside the physics: one thread that owns the GL context and its copy of the state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import mujoco

from safe_pruner_node.twin.cameras import CameraRig, Resolution, Snapshot
from safe_pruner_node.types import RgbImage

OnImage = Callable[[str, RgbImage, int], None]
"""Called in the rendering thread with camera, image and the stamp of the state it shows, ns."""


class CameraThread:
    """Renders the newest snapshot that it is given, one set of images at a time.

    A thread and not a process: MuJoCo and OpenCV let go of the interpreter lock while they draw
    and encode, and the model is shared.

    Args:
        model: The compiled twin.
        resolutions: Camera name to resolution, in rendering order.
        on_image: Takes each finished image.
    """

    def __init__(
        self, model: mujoco.MjModel, resolutions: Mapping[str, Resolution], on_image: OnImage
    ) -> None:
        self._model = model
        self._resolutions = dict(resolutions)
        self._on_image = on_image
        self._changed = threading.Condition()
        self._job: tuple[Snapshot, int] | None = None
        self._stopping = False
        self.error: Exception | None = None
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)
        self._thread.start()

    def load(self, model: mujoco.MjModel) -> None:
        """Draws another model, from the next snapshot on; waits for the set being drawn."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is None or not self._thread.is_alive())
            self._model = model

    def submit(self, snapshot: Snapshot, stamp_ns: int) -> bool:
        """Asks for a set of images; False (and counted) while the last set is still being drawn."""
        with self._changed:
            if self._job is not None:
                self.skipped += 1
                return False
            self._job = (snapshot, stamp_ns)
            self._changed.notify_all()
            return True

    def wait_drawn(self) -> None:
        """Returns when everything submitted has been drawn, or the thread has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._job is None or not self._thread.is_alive())

    def stop(self) -> None:
        """Finishes the current set and frees the GL context."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        loaded = self._model
        try:
            rig = CameraRig(loaded, self._resolutions)
        except Exception as error:  # noqa: BLE001 - any GL failure; the owner reports it
            self._end(error)
            return
        try:
            while (job := self._next_job()) is not None:
                snapshot, stamp_ns = job
                if loaded is not self._model:
                    loaded = self._model
                    rig.load(loaded)
                rig.show(snapshot)
                for camera in self._resolutions:
                    self._on_image(camera, rig.render(camera), stamp_ns)
                self._end(None)
        except Exception as error:  # noqa: BLE001 - as above
            self._end(error)
        finally:
            rig.close()

    def _next_job(self) -> tuple[Snapshot, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._job is not None or self._stopping)
            return None if self._stopping else self._job

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            self._job = None
            self.error = error
            self._changed.notify_all()
