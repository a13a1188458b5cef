"""π0.5 with SAFE-Pruner on the Astribot S1, as a ROS 2 node."""

__version__ = "0.1.0"
