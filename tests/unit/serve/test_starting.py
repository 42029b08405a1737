from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from serve import starting
from serve.starting import NotStartedError, cause_of

RETRIED = "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
TRACEBACK = """\
ray::ServeReplica:b:B.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^
RuntimeError: Traceback (most recent call last):
  File "/app/serve/replicas.py", line 15, in __init__
    raise ValueError("no such weights")
          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""
ENGINE_LOG = """\
:job_id:01000000
:actor_name:ServeReplica:a:A
(EngineCore_DP0 pid=7) ERROR 12-01 17:30:09 [core.py:843] EngineCore failed to start.
(EngineCore_DP0 pid=7) ERROR 12-01 17:30:09 [core.py:843] Traceback (most recent call last):
(EngineCore_DP0 pid=7) ERROR 12-01 17:30:09 [core.py:843]   File "core.py", line 834, in run
(EngineCore_DP0 pid=7) ERROR 12-01 17:30:09 [core.py:843]     raise ValueError()
(EngineCore_DP0 pid=7) ERROR 12-01 17:30:09 [core.py:843] ValueError: Available memory on node 0 (0.4/23.54 GiB) on kv \
cache allocation is less than requested memory for kv (1.0 GiB). Decrease --kv-cache-memory-bytes
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6)   File "utils.py", line 1, in wait
(APIServer pid=6)     raise RuntimeError()
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (RETRIED + TRACEBACK + "ValueError: no such weights\nsecond line: and more",
         "ValueError: no such weights second line: and more"),
        (TRACEBACK + "srl_rlvr.errors.InputError: model '/m': cannot load it", "model '/m': cannot load it"),
        (ENGINE_LOG, "ValueError: Available memory on node 0 (0.4/23.54 GiB) on kv cache allocation is less than "
                     "requested memory for kv (1.0 GiB). Decrease --kv-cache-memory-bytes"),
        ("The actor died because it was killed", "The actor died because it was killed"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_cause_is_the_error_at_the_end_in_one_line(text: str, cause: str) -> None:
    assert cause_of(text) == cause


class Serve:
    """In the place of Ray Serve: `status` is what it will say, one after the other, the last for ever."""

    def __init__(self) -> None:
        self.deployed, self.said = list[Any](), list[dict[str, tuple[str, str, str]]]()
        self.hangs = threading.Event()

    def run_many(self, targets: Any, **_: Any) -> None:
        self.deployed += targets

    def status(self) -> ServeStatus:
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        return ServeStatus(applications={
            name: ApplicationStatusOverview(status, "", 0.0, {name: DeploymentStatusOverview(of, "", {}, message)})  # type: ignore[arg-type]
            for name, (status, of, message) in said.items()
        })  # fmt: skip


@pytest.fixture
def ray_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    found = Serve()
    monkeypatch.setattr(starting, "ray_serve", found)
    monkeypatch.setattr(starting, "RunTarget", lambda *of, **_: of)
    monkeypatch.setattr(starting, "_engine_log", lambda _: ENGINE_LOG)
    monkeypatch.setattr(starting, "_LOOKED_EVERY_S", 0.0)
    yield found
    found.hangs.set()


WAITING, RUNNING = ("DEPLOYING", "UPDATING", ""), ("RUNNING", "HEALTHY", "")
TARGETS = {"%C3%9C": ("application", ["Ü"]), "shared-b": ("other", ["b", "c"])}


def test_it_is_told_which_models_are_awaited(ray_serve: Serve) -> None:
    told: list[str] = []
    ray_serve.said = [{}, {"%C3%9C": WAITING, "shared-b": RUNNING}, {"%C3%9C": RUNNING, "shared-b": RUNNING}]
    starting.run(TARGETS, 10, told.append)
    assert [line.split(" (")[0] for line in told] == ["b, c: ready; waiting for Ü", "Ü: ready"]
    assert [name for _, name in ray_serve.deployed] == list(TARGETS)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (("DEPLOY_FAILED", "DEPLOY_FAILED", TRACEBACK + "ValueError: no such weights"), "no such weights"),
        (("DEPLOYING", "UPDATING", RETRIED + TRACEBACK + "srl_rlvr.errors.InputError: cannot load it"), "cannot load"),
        (("DEPLOY_FAILED", "DEPLOY_FAILED", TRACEBACK + "RuntimeError: Engine core initialization failed. See root"),
         "less than requested memory for kv.*; lower kv_cache_gib"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_start_is_named_with_its_own_cause(ray_serve: Serve, status: Any, said: str) -> None:
    ray_serve.said = [{"%C3%9C": status, "shared-b": RUNNING}]
    with pytest.raises(NotStartedError, match=f"model 'Ü' does not start: .*{said}") as found:
        starting.run(TARGETS, 10)
    assert "\n" not in str(found.value) and "--kv" not in str(found.value) and found.value.exit_code == 1


def test_what_may_pass_is_waited_for_until_the_deadline(ray_serve: Serve) -> None:
    ray_serve.said = [{"%C3%9C": ("DEPLOYING", "UPDATING", RETRIED + TRACEBACK + "OSError: busy"), "shared-b": RUNNING}]
    with pytest.raises(NotStartedError, match="for Ü to start.*OSError: busy.*start_deadline_s"):
        starting.run(TARGETS, 0.2)


def test_a_controller_that_does_not_answer_is_not_waited_for_for_ever(
    ray_serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "_CALL_DEADLINE_S", 0.1)
    monkeypatch.setattr(ray_serve, "status", ray_serve.hangs.wait)
    with pytest.raises(NotStartedError, match="controller"):
        starting.run(TARGETS, 10)

    def dead() -> Any:
        raise RayActorError

    monkeypatch.setattr(ray_serve, "status", dead)
    with pytest.raises(NotStartedError, match="actor"):
        starting.run(TARGETS, 10)
