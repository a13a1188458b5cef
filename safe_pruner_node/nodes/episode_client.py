"""Puts episodes into a running twin and hands the arms to the policy, over the wire alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from safe_pruner_msgs.srv import NewEpisode, SetPrompt
from std_srvs.srv import Trigger

ANSWER_S = 10.0
"""How long a service may take to answer, s."""

TAKE_OVER_S = 30.0
"""How long a request is repeated that is refused for a reason that passes, s."""

RETRY_S = 0.1


class EpisodeError(Exception):
    """An episode cannot be begun or ended; one line says why."""


class EpisodeClient:
    """The order in which a policy node and a twin go from one episode to the next.

    The twin's joints jump to the home pose with a new episode, so the policy node is deactivated
    meanwhile: its commands begin again at the joints that it measures when it is activated.

    Args:
        node: Makes the calls.
        executor: Has the node; is spun while an answer is awaited.
        policy: Name of the policy node.
        twin: Name of the twin.
    """

    def __init__(
        self, node: Node, executor: SingleThreadedExecutor, policy: str, twin: str
    ) -> None:
        self._executor = executor
        self._change_state = node.create_client(ChangeState, f"/{policy}/change_state")
        self._reset = node.create_client(Trigger, f"/{policy}/reset")
        self._set_prompt = node.create_client(SetPrompt, f"/{policy}/set_prompt")
        self._start = node.create_client(Trigger, f"/{policy}/start")
        self._stop = node.create_client(Trigger, f"/{policy}/stop")
        self._new_episode = node.create_client(NewEpisode, f"/{twin}/new_episode")

    def deactivate(self) -> None:
        """The policy node brakes, holds, and commands no more."""
        self._transition("deactivate")

    def place(self, task: str, seed: int) -> None:
        """Another episode in the twin; the policy node must be inactive."""
        # Refused for as long as the node's last commands have not passed.
        self._insist(self._new_episode, NewEpisode.Request(task=task, seed=seed))

    def start(self, prompt: str) -> None:
        """The policy gets the arms: a new episode for it, and what to do in words."""
        self._transition("activate")
        self._insist(self._reset, Trigger.Request())
        self._insist(self._set_prompt, SetPrompt.Request(prompt=prompt))
        self._insist(self._start, Trigger.Request())  # waits for fresh joint states

    def stop(self) -> None:
        """The policy node takes the arms back and brakes."""
        self._insist(self._stop, Trigger.Request())

    def _transition(self, label: str) -> None:
        request = ChangeState.Request()
        request.transition.label = label
        if not self._call(self._change_state, request).success:
            raise EpisodeError(f"the policy node does not {label}")

    def _insist(self, client: Client, request: object) -> None:
        """Repeats a request until it is granted."""
        deadline_s = time.monotonic() + TAKE_OVER_S
        while not (answer := self._call(client, request)).success:
            if time.monotonic() > deadline_s:
                raise EpisodeError(f"{client.srv_name}: {answer.message}")
            self.spin(lambda: False, RETRY_S)

    def _call(self, client: Client, request: object) -> Any:  # noqa: ANN401 - generated
        if not client.wait_for_service(ANSWER_S):
            raise EpisodeError(f"{client.srv_name} is not there")
        future = client.call_async(request)
        if not self.spin(future.done, ANSWER_S):
            raise EpisodeError(f"{client.srv_name} does not answer")
        return future.result()

    def spin(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Serves the node until something is so; False when the time is over first."""
        deadline_s = time.monotonic() + timeout_s
        while not done():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            self._executor.spin_once(timeout_sec=min(left_s, 0.1))
        return True
