from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from srl_rlvr import records
from srl_rlvr.errors import InputError, RunError
from srl_rlvr.verifiers import pool as pool_module
from srl_rlvr.verifiers.pool import VerifierPool


def outcomes(verdicts: pa.Table) -> list[str]:
    return verdicts["outcome"].to_pylist()


def is_alive(pid: int) -> bool:
    """Alive and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(*pids: int) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end and any(is_alive(pid) for pid in pids):
        time.sleep(0.02)
    return not any(is_alive(pid) for pid in pids)


def test_verdicts_come_in_the_order_of_the_rollouts_with_their_own_prompts_metadata(pool, batch):
    tables = [batch("bad_verifiers:echo", [str(i)] * 3, f"ref{i}", {"note": i}) for i in range(60)]
    prompts = pa.concat_tables([p for p, _ in tables])
    prompts = prompts.set_column(0, records.PROMPT.field("id"), pa.array([f"p{i}" for i in range(60)]))
    rollouts = pa.concat_tables([r for _, r in tables])
    ids = [f"p{i}" for i in range(60) for _ in range(3)]
    rollouts = rollouts.set_column(0, records.ROLLOUT.field("prompt_id"), pa.array(ids)).take(list(range(179, -1, -1)))
    verdicts = pool.score(prompts, rollouts)
    assert records.check("Verdict", verdicts)["prompt_id"].to_pylist() == ids[::-1]
    assert verdicts["sample_index"].to_pylist() == [2, 1, 0] * 60
    assert verdicts["detail"].to_pylist() == [f"ref{i[1:]} stop {i[1:]}" for i in ids[::-1]]
    assert pool.score(prompts, rollouts).equals(verdicts)


def test_no_rollouts_give_no_verdicts(pool, batch):
    assert pool.score(*batch("exact", [])).num_rows == 0


@pytest.mark.parametrize("name", ["hang", "hang_without_yielding"])
def test_a_hanging_verifier_fails_its_own_sample_and_no_other(pool, batch, name):
    texts = ["good"] * 40
    texts[7] = texts[8] = "bad"
    before = pool.health()["timeouts"]
    verdicts = pool.score(*batch(f"bad_verifiers:{name}", texts))
    assert [i for i, outcome in enumerate(outcomes(verdicts)) if outcome != "scored"] == [7, 8]
    assert verdicts["detail"][7].as_py() == "timed out after 0.5 s"
    assert verdicts["reward"][7].as_py() == 0.0
    assert pool.health()["timeouts"] == before + 2


@pytest.mark.parametrize(("name", "exit_code"), [("leave", 7), ("die_by_signal", -9)])
def test_a_dying_worker_fails_its_own_sample_and_no_other(pool, batch, name, exit_code):
    texts = ["good"] * 40
    texts[0] = texts[20] = texts[39] = "bad"
    before = pool.health()["replaced"]
    verdicts = pool.score(*batch(f"bad_verifiers:{name}", texts))
    assert [i for i, outcome in enumerate(outcomes(verdicts)) if outcome != "scored"] == [0, 20, 39]
    assert verdicts["detail"][20].as_py() == f"worker died (exit code {exit_code})"
    assert pool.health()["replaced"] == before + 3


def test_what_is_not_a_finite_score_is_failed(pool, batch):
    expected = {
        "raise": "ValueError: no such thing",
        "surrogate": "ValueError: ?",
        "memory": "MemoryError: ",
        "recursion": "RecursionError: ",
        "exit": "worker died (exit code 3)",
        "nan": "returned nan as reward",
        "infinite": "returned inf as part",
        "too large": "returned 1e+300 as reward",
        "dict": "returned a dict; it should return a Score or a number from 0 to 1",
        "two": "returned 2.0 as reward; a plain number should be from 0 to 1",
        "text": "returned a str as reward",
        "outcome": "returned the outcome 'splendid'",
    }
    verdicts = pool.score(*batch("bad_verifiers:misbehave", [*expected, "print"]))
    assert outcomes(verdicts) == ["failed"] * len(expected) + ["scored"]
    for detail, start in zip(verdicts["detail"].to_pylist(), expected.values(), strict=False):
        assert detail.startswith(start)


def test_a_number_from_0_to_1_is_a_score(pool, batch):
    texts = ["number", "half", "true", "false", "numpy true", "numpy float"]
    verdicts = pool.score(*batch("bad_verifiers:misbehave", texts))
    assert outcomes(verdicts) == ["scored"] * len(texts)
    assert verdicts["reward"].to_pylist() == [1.0, 0.5, 1.0, 0.0, 1.0, 0.25]


def test_a_prompt_cannot_name_code_that_nobody_declared(pool, batch, bad_verifiers_importable, tmp_path):
    made = tmp_path / "made"
    for name in ("os:system", "timeit:timeit", "bad_verifiers:start_a_child"):
        with VerifierPool(workers=1, deadline_s=0.5, own=["bad_verifiers:echo"]) as strict:
            with pytest.raises(InputError, match="is not declared"):
                strict.score(*batch(name, [f"touch {made}"], f"touch {made}"))
            [worker] = strict._workers
            wait_until_ready(strict, batch)
            worker.connection.send([(0, name, f"touch {made}", "", "{}", "stop")])  # past the pool's own check
            kind, message = worker.connection.recv()
            assert kind == "input_error" and "is not declared" in message
    assert not made.exists()


def wait_until_ready(pool, batch):
    assert outcomes(pool.score(*batch("exact", ["Answer: x"], "x"))) == ["scored"]


def test_an_item_that_hangs_is_never_tried_again(pool, batch, tmp_path):
    notes = tmp_path / "starts"
    verdicts = pool.score(*batch("bad_verifiers:count_starts", ["a", "bad", "b"], str(notes)))
    assert outcomes(verdicts) == ["scored", "failed", "scored"]
    assert sorted(notes.read_text().split()) == ["a", "b", "bad"]


def test_imports_and_warm_ups_do_not_count_against_the_deadline(pool, batch):
    assert outcomes(pool.score(*batch("slow_to_import:quick", ["x"] * 20))) == ["scored"] * 20


def test_heavy_verifiers_load_outside_the_deadline(pool, batch):
    before = pool.health()["timeouts"]
    verdicts = pool.score(*batch("expression", ["Answer: 1/2"] * 4, "\\frac{1}{2}"))
    assert verdicts["detail"].to_pylist() == ["answered '1/2'"] * 4
    entry = {"answer": "3", "metadata": {}}
    verdicts = pool.score(*batch("reasoning_gym", ["Answer: 3", "Answer: 4"], "3", {"dataset": "gcd", "entry": entry}))
    assert verdicts["reward"].to_pylist() == [1.0, 0.0]
    assert pool.health()["timeouts"] == before


def test_a_formula_that_cannot_be_worked_out_is_ended(pool, batch):
    verdicts = pool.score(*batch("expression", ["Answer: $9^{9^{9^{9}}}!$", "Answer: 6"], "6"))
    assert outcomes(verdicts)[1] == "scored"
    assert verdicts["reward"].to_pylist() == [0.0, 1.0]


def test_a_worker_that_died_idle_costs_no_verdict(pool, batch):
    os.kill(pool._workers[0].process.pid, 9)
    assert outcomes(pool.score(*batch("exact", ["Answer: x"] * 8, "x"))) == ["scored"] * 8
    assert pool.health()["alive"] == 2


def test_an_unknown_verifier_names_the_nearest(pool, batch):
    with pytest.raises(InputError, match="did you mean 'similarity'"):
        pool.score(*batch("similarty", ["x"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:f", "no_such_package cannot be imported"),
        ("bad_verifiers:no_such_function", "has no function"),
        ("bad_verifiers:refuse", "set up wrongly"),
        ("bad_verifiers:as_verl", r"called as as_verl\(text, reference, metadata\)"),
        ("bad_verifiers:as_trl", r"called as as_trl\(text, reference, metadata\)"),
    ],
)
def test_a_run_that_is_set_up_wrongly_ends_with_the_cause_and_leaves_the_pool_usable(pool, batch, name, message):
    with pytest.raises(InputError, match=message):
        pool.score(*batch(name, ["x"] * 100))
    assert outcomes(pool.score(*batch("exact", ["Answer: x"], "x"))) == ["scored"]


def test_a_verifier_that_cannot_be_loaded_ends_the_run(pool, batch):
    with pytest.raises(RunError, match=r"loading verifier ends_on_import:f ended its process \(exit code 9\)"):
        pool.score(*batch("ends_on_import:f", ["x"]))
    assert outcomes(pool.score(*batch("exact", ["Answer: x"], "x"))) == ["scored"]


def test_loading_has_a_deadline_of_its_own(batch, bad_verifiers_importable, own_verifiers, monkeypatch):
    monkeypatch.setattr(pool_module, "LOAD_DEADLINE_S", 0.5)
    with (
        VerifierPool(workers=1, deadline_s=0.5, own=own_verifiers) as fresh,
        pytest.raises(RunError, match="took over 0.5 s 3 times in a row"),
    ):
        fresh.score(*batch("slow_to_import:quick", ["x"]))


def test_a_rollout_without_its_prompt_is_refused(pool, batch):
    prompts, rollouts = batch("exact", ["x"])
    with pytest.raises(records.RecordError, match="no prompt has the id 'p'"):
        pool.score(prompts.slice(0, 0), rollouts)
    with pytest.raises(records.RecordError, match="stands twice"):
        pool.score(pa.concat_tables([prompts, prompts]), rollouts)


def test_metadata_that_is_not_an_object_is_refused(pool, batch):
    prompts, rollouts = batch("exact", ["x"])
    column = records.PROMPT.get_field_index("metadata")
    for metadata in ("{", "[1]"):
        broken = prompts.set_column(column, records.PROMPT.field("metadata"), pa.array([metadata]))
        with pytest.raises(records.RecordError, match="id 'p': metadata is not a JSON object"):
            pool.score(broken, rollouts)


def test_the_finish_reason_reaches_the_verifier(pool, batch):
    verdicts = pool.score(*batch("similarity", ["2 + 3\n"], "2 + 3\n", finish_reason="length"))
    assert (outcomes(verdicts), verdicts["reward"].to_pylist()) == (["invalid"], [-1.0])
    assert json.loads(verdicts["components"][0].as_py()) == {"format": -1.0}


def test_closing_ends_the_workers_and_what_they_started(batch, bad_verifiers_importable, own_verifiers, tmp_path):
    notes = tmp_path / "pids"
    with VerifierPool(workers=1, deadline_s=0.5, own=own_verifiers) as pool:
        worker = pool._workers[0].process.pid
        pool.score(*batch("bad_verifiers:start_a_child", ["x"], str(notes)))
        replacement = pool._workers[0].process.pid
    assert wait_until_gone(worker, replacement, *map(int, notes.read_text().split()))
    assert pool.health()["alive"] == 0
    pool.close()
    with pytest.raises(RunError, match="closed"):
        pool.score(*batch("exact", ["x"]))


def test_workers_exit_when_their_parent_is_killed():
    code = (
        "import os, time\n"
        "from srl_rlvr.verifiers.pool import VerifierPool\n"
        "pool = VerifierPool(workers=2, deadline_s=1.0)\n"
        "print(*[worker.process.pid for worker in pool._workers], flush=True)\n"
        "time.sleep(60)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.communicate()
    assert wait_until_gone(*pids)


def test_workers_import_nothing_heavy_before_they_need_it():
    code = (
        "import sys, srl_rlvr.verifiers.worker\n"
        "heavy = {'ray', 'torch', 'numpy', 'pyarrow', 'sympy', 'math_verify', 'reasoning_gym', 'rapidfuzz'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("workers", "deadline_s"), [(0, 1.0), (1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_a_pool_needs_workers_and_a_finite_deadline(workers, deadline_s):
    with pytest.raises(InputError, match="verifier pool"):
        VerifierPool(workers, deadline_s)
