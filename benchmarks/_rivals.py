"""What `seven_types.py` compares with: sentence-transformers' own trainers and losses, and logistic regression, on the
same rows with the same rate and batch. Their other settings are their defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Result = tuple[list[float], dict[str, float]]  # scores of the questions, and metrics


def mnrl(task: Any, train: list[dict[str, Any]], base: Path, out: Path, steps: int, seed: int) -> None:
    """MultipleNegativesRankingLoss: each question with one that answers it and the hardest that does not."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(base), device="cpu")
    model.max_seq_length = task.max_context
    triples = []
    for row in train:
        answers = {int(step) for step in row["steps"]}
        others = [text for number, text in enumerate(row["candidates"]) if number not in answers]
        triples += [(row["prompt"], row["candidates"][number], others[0]) for number in sorted(answers)[:1] if others]
    columns = dict(zip(("anchor", "positive", "negative"), map(list, zip(*triples, strict=True)), strict=True))
    arguments = SentenceTransformerTrainingArguments(**_arguments(task, out, steps, task.batch, seed))
    SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=MultipleNegativesRankingLoss(model)
    ).train()
    model.save_pretrained(str(out), create_model_card=False)


def bce(task: Any, train: list[dict[str, Any]], base: Path, out: Path, steps: int, seed: int) -> None:
    """Cross-encoder with binary cross-entropy: a pair of question and candidate is a row."""
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    rows = [
        (row["prompt"], text, float(str(number) in row["steps"]))
        for row in train
        for number, text in enumerate(row["candidates"])
    ]
    columns: dict[str, list[Any]] = dict(
        zip(("query", "document", "label"), map(list, zip(*rows, strict=True)), strict=True)
    )
    _cross_encoder(task, columns, BinaryCrossEntropyLoss, base, out, steps, task.batch * task.candidates, seed)


def lambda_loss(task: Any, train: list[dict[str, Any]], base: Path, out: Path, steps: int, seed: int) -> None:
    """Cross-encoder with LambdaLoss (NDCG-Loss2++, its default): a question with its candidates is a row."""
    from sentence_transformers.cross_encoder.losses import LambdaLoss

    columns = {
        "query": [row["prompt"] for row in train],
        "docs": [row["candidates"] for row in train],
        "labels": [[float(str(n) in row["steps"]) for n in range(len(row["candidates"]))] for row in train],
    }
    _cross_encoder(task, columns, LambdaLoss, base, out, steps, task.batch, seed)


def logistic(task: Any, train: list[dict[str, Any]], base: Path, dev: Any, held_out: Any) -> Result:
    """Logistic regression on the base's embeddings, calibrated on the dev problems as ours is."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    from srl_rlvr.model_types import intent_router

    model = SentenceTransformer(str(base), device="cpu")

    def embed(rows: list[dict[str, Any]]) -> np.ndarray:
        return model.encode([row["prompt"] for row in rows], batch_size=64, show_progress_bar=False)

    fitted = LogisticRegression(max_iter=1000, C=10).fit(embed(train), [int(row["steps"][0]) for row in train])

    def predictions(rows: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
        probabilities = fitted.predict_proba(embed(rows))
        best = fitted.classes_[probabilities.argmax(1)]
        return [
            {
                "components": json.dumps({"accuracy": float(str(pick) in row["steps"])}),
                "reference": row["reference"],
                "logprobs": [float(np.log(of.max()))],
            }
            for row, pick, of in zip(rows, best, probabilities, strict=True)
        ]

    card = {"calibration": intent_router.calibrate(predictions(dev))}
    judged = predictions(held_out)
    in_scope = [json.loads(found["components"])["accuracy"] for found in judged if found["reference"] != "{}"]
    return in_scope, intent_router.TYPE.metrics(judged, card)


TRAINERS: dict[str, Callable[[Any, list[dict[str, Any]], Path, Path, int, int], None]] = {
    "mnrl": mnrl,
    "bce": bce,
    "lambda": lambda_loss,
}


def _cross_encoder(
    task: Any, columns: dict[str, list[Any]], loss: Any, base: Path, out: Path, steps: int, batch: int, seed: int
) -> None:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from transformers import set_seed

    set_seed(seed)  # the head is drawn
    model = CrossEncoder(str(base), num_labels=1, max_length=task.max_context, device="cpu")
    arguments = CrossEncoderTrainingArguments(**_arguments(task, out, steps, batch, seed))
    CrossEncoderTrainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss(model)).train()
    model.save_pretrained(str(out), create_model_card=False)


def _arguments(task: Any, out: Path, steps: int, batch: int, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(out.with_name("trainer")),
        "use_cpu": True,
        "seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": task.learning_rate,
        "warmup_steps": 2,
        "lr_scheduler_type": "constant_with_warmup",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
    }
