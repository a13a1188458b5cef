"""π0.5 with SAFE-Pruner on the Astribot S1, as a ROS 2 node."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safe_pruner_node.engine.wrap import wrap

__all__ = ["wrap"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`wrap` on first use: importing the package must not import torch."""
    if name == "wrap":
        from safe_pruner_node.engine.wrap import wrap  # noqa: PLC0415 - see above

        return wrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
