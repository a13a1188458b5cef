"""From policy rate to control rate: a C1 curve through the actions that never overshoots them."""

from __future__ import annotations

import numpy as np

from safe_pruner_node.types import FloatArray


def monotone_tangents(actions: FloatArray, dt_s: float) -> FloatArray:
    """Velocity at every action such that cubic Hermite pieces stay between their end points.

    Harmonic mean of the two neighbouring slopes, zero where they differ in sign (Fritsch and
    Butland, SIAM J. Sci. Stat. Comput. 5(2), 1984, for equal spacing); at both ends the one
    neighbouring slope. A plain Catmull-Rom tangent would overshoot: past a joint limit, or past
    the gripper's full closure.

    Args:
        actions: Targets, [horizon, dof].
        dt_s: Time between two actions, seconds.

    Returns:
        Velocities, [horizon, dof]; zeros for a single action.
    """
    tangents = np.zeros_like(actions)
    if len(actions) == 1:
        return tangents
    slopes = np.diff(actions, axis=0) / dt_s  # [horizon - 1, dof]
    before, after = slopes[:-1], slopes[1:]
    same_sign = before * after > 0.0
    total = np.where(same_sign, before + after, 1.0)
    # 2 b (a / (a + b)): the quotient is within [0, 1], so the product cannot overflow
    tangents[1:-1] = np.where(same_sign, 2.0 * before * (after / total), 0.0)
    tangents[0], tangents[-1] = slopes[0], slopes[-1]
    return tangents


def hermite(
    actions: FloatArray, tangents: FloatArray, dt_s: float, time_s: float
) -> tuple[FloatArray, FloatArray]:
    """Position and velocity of the cubic Hermite curve at a time.

    Args:
        actions: Targets, [horizon, dof].
        tangents: Velocity at every action, [horizon, dof].
        dt_s: Time between two actions, seconds.
        time_s: Time since ``actions[0]``, seconds. Outside of the chunk the nearest action is
            held at zero velocity.

    Returns:
        Position [dof] and velocity [dof].
    """
    last = len(actions) - 1
    if time_s < 0.0 or time_s > last * dt_s or last == 0:
        return actions[0 if time_s < 0.0 else last].copy(), np.zeros_like(actions[0])
    index = min(int(time_s / dt_s), last - 1)
    u = time_s / dt_s - index
    start, end = actions[index], actions[index + 1]
    m0, m1 = tangents[index] * dt_s, tangents[index + 1] * dt_s
    rise = end - start
    # Horner form of h00 p0 + h10 m0 + h01 p1 + h11 m1
    c2, c3 = 3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise
    position = start + u * (m0 + u * (c2 + u * c3))
    velocity = (m0 + u * (2.0 * c2 + 3.0 * u * c3)) / dt_s
    return position, velocity


def smoothstep(u: float) -> tuple[float, float]:
    """Blend weight 3u^2 - 2u^3 on [0, 1], and its derivative in u; 0 or 1 outside."""
    if u <= 0.0:
        return 0.0, 0.0
    if u >= 1.0:
        return 1.0, 0.0
    return u * u * (3.0 - 2.0 * u), 6.0 * u * (1.0 - u)
