"""Where the package's own files (config, calibration, launch) are, installed or in a checkout."""

from __future__ import annotations

from pathlib import Path

from safe_pruner_node.errors import ConfigError

_CHECKOUT = Path(__file__).resolve().parent.parent


def resource(relative: str) -> Path:
    """Path of a file that the package installs, such as ``config/astribot_s1.yaml``.

    A checkout (or a ``--symlink-install``) wins over the installed share folder, so that an
    edited file is the one that runs.

    Args:
        relative: Path below the repository root, the same below ``share/safe_pruner_node``.

    Raises:
        ConfigError: The file is in neither place.
    """
    in_checkout = _CHECKOUT / relative
    if in_checkout.exists():
        return in_checkout
    try:
        from ament_index_python.packages import (  # noqa: PLC0415 - ROS is optional here
            PackageNotFoundError,
            get_package_share_directory,
        )

        share = Path(get_package_share_directory("safe_pruner_node"))
    except (ImportError, PackageNotFoundError):
        share = None
    if share is not None and (share / relative).exists():
        return share / relative
    raise ConfigError(
        "package files",
        relative,
        f"nothing at {in_checkout}",
        "the file in the checkout, or safe_pruner_node built with colcon and sourced",
    )
