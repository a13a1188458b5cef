"""The model against the joint table: frames composed by hand must be MuJoCo's."""

import mujoco
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from safe_pruner_node.twin.joint_table import HOME, joint_names
from safe_pruner_node.twin.scene import build_scene

# Copied from the public whole-body URDF a second time, on purpose: a slip of the pen in the
# package's table must not be able to agree with itself.
TORSO = [
    ((0, 0, 0.12), (-1.5708, 1.5708, 0)),
    ((-0.38, 0, 0), (0, 0, 0)),
    ((-0.39, 0, 0), (0, 0, 0)),
    ((0, 0, 0), (1.5708, 0, -1.5708)),
]
TORSO_END = ((0, 0, 0.34475), (0, 0, 0))
ARM_BASE = {
    "left": ((0, 0.06449, 0.02348), (0, -1.22173, -1.5708)),
    "right": ((0, -0.06449, 0.02348), (0, -1.22173, 1.5708)),
}
ARM = [
    ((0, 0, 0.091), (0, 0, 0)),
    ((0, 0, 0), (1.5708, 0, 0)),
    ((0, 0.05, 0), (1.5708, 0, -1.5708)),
    ((0.03, 0, 0.309), (-1.5708, 0, 0)),
    ((0, 0, 0), (1.5708, 0, 0)),
    ((0, 0, 0.277), (-1.5708, 0, 0)),
    ((0, 0, 0), (0, 1.5708, 0)),
]
ARM_END = ((0, -0.15, 0), (0, 0, 0))

LIMITS = {
    "astribot_torso": ([-0.04, -2.3, -0.4, -1.2], [1.3, 0.06, 2.3, 1.2]),
    "astribot_head": ([-1.57, -1.22], [1.57, 1.22]),
    "astribot_arm_left": (
        [-3.1, -1.53, -3.1, -0.06, -2.56, -0.76, -1.53],
        [3.1, 0.46, 3.1, 2.61, 2.56, 0.76, 1.53],
    ),
}
LIMITS["astribot_arm_right"] = LIMITS["astribot_arm_left"]


@pytest.fixture(scope="module")
def model():
    return build_scene("empty", 0).spec.compile()


def homogeneous(origin, angle=0.0):
    """Parent to child: translate, rotate by rpy about fixed axes, turn about the own z."""
    xyz, rpy = origin
    matrix = np.eye(4)
    turn = Rotation.from_euler("xyz", rpy) * Rotation.from_euler("z", angle)
    matrix[:3, :3], matrix[:3, 3] = turn.as_matrix(), xyz
    return matrix


def end_effector_by_hand(side, torso, arm):
    """End effector in the torso base, [4, 4]."""
    pose = np.eye(4)
    for origin, angle in zip(TORSO, torso, strict=True):
        pose = pose @ homogeneous(origin, angle)
    pose = pose @ homogeneous(TORSO_END) @ homogeneous(ARM_BASE[side])
    for origin, angle in zip(ARM, arm, strict=True):
        pose = pose @ homogeneous(origin, angle)
    return pose @ homogeneous(ARM_END)


@pytest.mark.parametrize("side", ["left", "right"])
def test_end_effector_matches_the_joint_table(model, side):
    data = mujoco.MjData(model)
    rng = np.random.default_rng(1)
    arm_names = joint_names(f"astribot_arm_{side}")
    for _ in range(25):
        torso, arm = rng.uniform(-1.5, 1.5, 4), rng.uniform(-2.5, 2.5, 7)
        for name, angle in zip(joint_names("astribot_torso"), torso, strict=True):
            data.joint(name).qpos[0] = angle
        for name, angle in zip(arm_names, arm, strict=True):
            data.joint(name).qpos[0] = angle
        mujoco.mj_kinematics(model, data)
        expected = end_effector_by_hand(side, torso, arm)
        site = data.site(f"astribot_arm_{side}_end_effector")
        base = data.body("astribot_chassis").xpos
        np.testing.assert_allclose(site.xpos - base, expected[:3, 3], atol=1e-6)
        np.testing.assert_allclose(site.xmat.reshape(3, 3), expected[:3, :3], atol=1e-6)


def test_home_pose_holds_both_grippers_level_and_mirrored(model):
    """The vendor's home pose, which only makes sense with the vendor's frames."""
    data = mujoco.MjData(model)
    for part in ("astribot_torso", "astribot_arm_left", "astribot_arm_right"):
        for name, angle in zip(joint_names(part), HOME[part], strict=True):
            data.joint(name).qpos[0] = angle
    mujoco.mj_kinematics(model, data)
    left, right = (data.site(f"astribot_gripper_{s}_pinch") for s in ("left", "right"))
    np.testing.assert_allclose(left.xpos * [1, -1, 1], right.xpos, atol=1e-4)
    for side in ("left", "right"):
        forward = data.body(f"astribot_gripper_{side}").xmat.reshape(3, 3)[:, 2]
        np.testing.assert_allclose(forward, [1, 0, 0], atol=0.01)


@pytest.mark.parametrize("part", sorted(LIMITS))
def test_joint_limits_are_the_urdfs(model, part):
    ranges = np.array([model.joint(name).range for name in joint_names(part)])
    np.testing.assert_allclose(ranges.T, LIMITS[part])
