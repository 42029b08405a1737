"""The router's confidence: calibrated, and a threshold below which a text is out of scope."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from srl_rlvr.model_types import intent_router

ROUTER = intent_router.TYPE
CARD = {"labels": {"pay": "pay", "greet": "says hello"}}


def predictions(count: int = 4000, in_scope: float = 0.8, seed: int = 0) -> list[dict[str, Any]]:
    """A router that is right with the square of the probability that it says, and never where out of scope; there it
    says less."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        known = rng.random() < in_scope
        probability = rng.uniform(0.5, 1) if known else rng.uniform(0, 0.6)
        right = bool(known and rng.random() < probability**2)
        reference = '{"0": 1.0}' if known else "{}"
        components = json.dumps({"accuracy": float(right)})
        logprobs = [math.log(probability)]
        found.append({"components": components, "reference": reference, "logprobs": logprobs})
    return found


def test_calibration_makes_confidence_the_share_that_is_right() -> None:
    learned_from, judged = predictions(), predictions(seed=1)
    calibration = intent_router.calibrate(learned_from)
    found = ROUTER.metrics(judged, CARD | {"calibration": calibration})
    as_said = ROUTER.metrics(judged, CARD | {"calibration": {"slope": 1.0, "intercept": 0.0, "threshold": 0.0}})
    assert found["ece"] < 0.05 < as_said["ece"]


def test_how_much_of_dev_is_out_of_scope_changes_no_confidence() -> None:
    calibration = intent_router.calibrate(predictions(in_scope=0.3))
    found = ROUTER.metrics(predictions(in_scope=0.97, seed=1), CARD | {"calibration": calibration})
    assert found["ece"] < 0.05


def test_the_threshold_finds_what_is_out_of_scope_and_keeps_what_is_not() -> None:
    calibration = intent_router.calibrate(predictions())
    found = ROUTER.metrics(predictions(seed=1), CARD | {"calibration": calibration})
    assert found["oos_recall"] > 0.7
    assert found["accepted_accuracy"] > 0.8 * found["accuracy"]


def test_without_anything_out_of_scope_every_label_is_believed() -> None:
    assert intent_router.calibrate(predictions(in_scope=1.0))["threshold"] == 0.0


def test_where_nothing_is_wrong_there_is_nothing_to_learn() -> None:
    right = {"components": '{"accuracy": 1.0}', "reference": '{"0": 1.0}', "logprobs": [-0.1]}
    assert intent_router.calibrate([right] * 3) == {"slope": 1.0, "intercept": 0.0, "threshold": 0.0}


@pytest.mark.parametrize(("probability", "label"), [(0.9, "greet"), (0.2, None)])
def test_a_text_below_the_threshold_has_no_label(probability: float, label: str | None) -> None:
    card = CARD | {"calibration": {"slope": 1.0, "intercept": 0.0, "threshold": 0.5}}
    answer = ROUTER.present({}, {"text": "1 0", "logprobs": [math.log(probability), -1.0]}, card)
    assert answer == {"label": label, "confidence": pytest.approx(probability)}


def test_the_calibration_error_is_the_gap_weighed_by_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.15, 0.15])
    right = np.array([True, False, False, False])
    assert intent_router.expected_calibration_error(confidence, right) == pytest.approx(0.5 * 0.45 + 0.5 * 0.15)


def test_a_few_answers_that_say_the_surest_are_wrong_calibrate_nothing() -> None:
    few = predictions(11)
    for number, found in enumerate(few):
        found |= {"logprobs": [math.log(0.99 if number == 0 else 0.6)], "reference": '{"0": 1.0}'}
        found["components"] = json.dumps({"accuracy": float(number > 0)})
    assert intent_router.calibrate(few) == {"slope": 1.0, "intercept": 0.0, "threshold": 0.0}
