"""Starts the SAFE-Pruner policy node on an Astribot S1, or on its twin with ``twin:=true``."""

from __future__ import annotations

import dataclasses
import os

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from safe_pruner_node.bringup import BringupOptions, node_specs, options_from_text
from safe_pruner_node.errors import ConfigError
from safe_pruner_node.resources import resource


def _nodes(context: LaunchContext) -> list[Node]:
    """The nodes of ``safe_pruner_node.bringup``, the same that ``make demo`` starts."""
    arguments = {
        item.name: LaunchConfiguration(item.name).perform(context)
        for item in dataclasses.fields(BringupOptions)
    }
    try:
        specs = node_specs(options_from_text(arguments))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    return [
        Node(
            package="safe_pruner_node",
            executable=spec.executable,
            name=spec.name,
            parameters=[dict(spec.parameters)],
            output="screen",
            emulate_tty=True,
            # The policy node brakes and holds before it ends: give it the time to.
            sigterm_timeout="10",
            sigkill_timeout="10",
        )
        for spec in specs
    ]


def generate_launch_description() -> LaunchDescription:
    """One documented argument per field of BringupOptions, then the nodes."""
    arguments = [
        DeclareLaunchArgument(
            item.name,
            default_value=str(item.default).lower()
            if isinstance(item.default, bool)
            else str(item.default),
            description=item.metadata["help"],
        )
        for item in dataclasses.fields(BringupOptions)
    ]
    variable = "FASTRTPS_DEFAULT_PROFILES_FILE"  # the user's own wins
    profile = SetEnvironmentVariable(
        variable, os.environ.get(variable) or str(resource("config/fastdds.xml"))
    )
    return LaunchDescription([*arguments, profile, OpaqueFunction(function=_nodes)])
