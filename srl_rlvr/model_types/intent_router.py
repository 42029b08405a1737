"""The intent router: a text in, one label out, or out of scope. A label is a text as well (its description, or its
name), so that a new one needs no training.

What is out of scope is no label: rows labeled `oos` are neither trained on nor counted in the accuracy. Logistic
regression on the dev problems that are in scope turns the probability of the pick into that of its being right (Platt
1999); how often a text is out of scope in use, dev does not say. From which confidence on a label is to be believed,
the `oos` rows tell: where in-scope accuracy and out-of-scope recall have the best mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from srl_rlvr.examples import rankings
from srl_rlvr.model_types.kinds.ranking import RankingType

_BINS = 15  # of the calibration error
_CLIP = 1e-6


@dataclass(frozen=True)
class RouterType(RankingType):
    calibrates: ClassVar[bool] = True
    one_card: ClassVar[bool] = True

    def card(self, paths: Sequence[Path], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The labels and their texts, and the calibration on these dev predictions."""
        labels: dict[str, str] = {}
        for path in paths:
            labels |= rankings.read_labels(path, skip_bad=True)
        return {"labels": labels} | ({"calibration": calibrate(predictions)} if predictions else {})

    def counts(self, example: Mapping[str, Any]) -> bool:
        return bool(example["steps"])

    def metrics(self, predictions: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> dict[str, float]:
        """Accuracy of what is in scope; the share of it that is accepted, and right; out-of-scope recall; and the
        expected calibration error."""
        right, in_scope, probabilities = _columns(predictions)
        found = {"accuracy": float(right[in_scope].mean())} if in_scope.any() else {}
        if "calibration" in card:
            confidence = confidences(probabilities, card["calibration"])
            kept = confidence >= card["calibration"]["threshold"]
            found["ece"] = expected_calibration_error(confidence, right)
            if in_scope.any():
                found["accepted_accuracy"] = float((right & kept)[in_scope].mean())
            if not in_scope.all():
                found["oos_recall"] = float((~kept)[~in_scope].mean())
        return found

    def present(self, example: Mapping[str, Any], prediction: Mapping[str, Any], card: Mapping[str, Any]) -> Any:
        """The label (null: out of scope) and how sure it is."""
        label = list(card["labels"])[int(prediction["text"].split()[0])]
        probability = np.array([math.exp(prediction["logprobs"][0])])
        if "calibration" not in card:
            return {"label": label, "confidence": float(probability[0])}
        confidence = float(confidences(probability, card["calibration"])[0])
        return {"label": label if confidence >= card["calibration"]["threshold"] else None, "confidence": confidence}


def calibrate(predictions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{slope, intercept, threshold} on these predictions; where none in scope is wrong there is nothing to learn."""
    from sklearn.linear_model import LogisticRegression

    right, in_scope, probabilities = _columns(predictions)
    slope, intercept = 1.0, 0.0
    if len(np.unique(right[in_scope])) == 2:
        fitted = LogisticRegression(C=1e6).fit(_logits(probabilities[in_scope])[:, None], right[in_scope])
        if fitted.coef_[0, 0] > 0:  # of a few it may say that the surest are wrong
            slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    found = {"slope": slope, "intercept": intercept, "threshold": 0.0}
    if in_scope.all() or not in_scope.any():
        return found
    confidence = confidences(probabilities, found)

    def balance(threshold: float) -> float:
        kept = confidence >= threshold
        return float((right & kept)[in_scope].mean() + (~kept)[~in_scope].mean())

    return found | {"threshold": max(map(float, np.unique(confidence)), key=balance)}


def confidences(probabilities: np.ndarray, calibration: Mapping[str, float]) -> np.ndarray:
    """Of being right, from the probability of each pick."""
    return 1 / (1 + np.exp(-(calibration["slope"] * _logits(probabilities) + calibration["intercept"])))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """ECE over 15 bins of equal width (Guo et al., 1706.04599, eq. 3)."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        len(of_bin) / len(right) * abs(right[of_bin].mean() - confidence[of_bin].mean())
        for of_bin in (np.flatnonzero(bins == number) for number in range(_BINS))
        if len(of_bin)
    ]
    return float(sum(gaps))


def _columns(predictions: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(right, in scope, probability of the pick) of each."""
    right = [json.loads(prediction["components"])["accuracy"] > 0 for prediction in predictions]
    in_scope = [prediction["reference"] != "{}" for prediction in predictions]
    probabilities = [math.exp(prediction["logprobs"][0]) for prediction in predictions]
    return np.array(right, bool), np.array(in_scope, bool), np.array(probabilities)


def _logits(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, _CLIP, 1 - _CLIP)
    return np.log(clipped / (1 - clipped))


TYPE = RouterType(name="intent_router", metric="accuracy", kind="bi", verifier="label")
