"""The Arrow tables that everything exchanges: one schema a record, checked here and nowhere else.

    Example ──► Prompt ──► Rollout ──► Verdict ──► Sample
    (a problem)  (a question  (an answer)  (what it was   (what the learner
                  to the policy)            worth)         is given)

`check` is called at each hand-over between actors. It knows schemas and lengths; it must not know
what a reward or a policy is.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from srl_rlvr.errors import InputError

SCORED, INVALID, FAILED = "scored", "invalid", "failed"
OUTCOMES = (SCORED, INVALID, FAILED)
PASSED = 1.0 - 1e-6  # the reward of a right answer, or more

_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
_IMAGES = pa.list_(pa.binary())  # encoded, as files hold them; a prompt's tokens have a place for each, in order


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in fields])


EXAMPLE = _schema(
    ("id", pa.string()),  # content hash, see `example_id`
    ("model_type", pa.string()),
    ("task", pa.string()),  # data set or generated family
    ("prompt", pa.string()),  # the user's turn
    ("images", _IMAGES),
    ("steps", pa.list_(pa.string())),  # the expert's actions, in order, without line breaks at their ends
    ("reference", pa.string()),  # the right final answer
    ("candidates", pa.list_(pa.string())),
    ("verifier", pa.string()),  # name in `srl_rlvr.verifiers.VERIFIERS`
    ("metadata", pa.string()),  # JSON that the verifier needs beside the reference
    ("difficulty", pa.float32()),
    ("provenance", pa.string()),  # JSON: where it came from
)

PROMPT = _schema(
    ("id", pa.string()),  # unique within a run's stage: example and step
    ("example_id", pa.string()),
    ("stage", pa.string()),
    ("step_index", pa.int32()),  # 0-based; -1 for a whole problem
    ("token_ids", _IDS),
    ("images", _IMAGES),
    ("trunk_id", pa.string()),  # prompts of one trunk are prefixes of one token sequence
    ("offset", pa.int32()),  # where this prompt's samples branch off the trunk, in tokens
    ("verifier", pa.string()),
    ("reference", pa.string()),  # what the verifier compares with: the expert's step or the final answer
    ("metadata", pa.string()),
)

ROLLOUT = _schema(
    ("prompt_id", pa.string()),
    ("sample_index", pa.int32()),
    ("policy_version", pa.int64()),
    ("token_ids", _IDS),  # sampled tokens, the stop token included
    ("logprobs", _LOGPROBS),  # natural log, under the policy and temperature that sampled
    ("text", pa.string()),  # decoded once for verifiers and people; training never reads it
    ("finish_reason", pa.string()),  # stop | length
)

VERDICT = _schema(
    ("prompt_id", pa.string()),
    ("sample_index", pa.int32()),
    ("outcome", pa.string()),
    ("reward", pa.float32()),  # meaningless where outcome is `failed`
    ("components", pa.string()),  # JSON object: named parts of the reward
    ("detail", pa.string()),
)

SAMPLE = _schema(
    ("prompt_id", pa.string()),
    ("sample_index", pa.int32()),
    ("trunk_id", pa.string()),
    ("policy_version", pa.int64()),
    ("prompt_ids", _IDS),
    ("images", _IMAGES),
    ("completion_ids", _IDS),
    ("behavior_logprobs", _LOGPROBS),
    ("advantage", pa.float32()),
)

SCHEMAS = {"Example": EXAMPLE, "Prompt": PROMPT, "Rollout": ROLLOUT, "Verdict": VERDICT, "Sample": SAMPLE}

_SAME_LENGTH = {"Rollout": ("token_ids", "logprobs"), "Sample": ("completion_ids", "behavior_logprobs")}


class RecordError(InputError):
    """A table that does not hold to its record's schema; the message names the record and the column."""


def check(record: str, table: pa.Table) -> pa.Table:
    """Return `table` if it is a valid `record` table.

    Raises RecordError naming the first column that is missing, unknown, of another type, null, or of
    lengths that do not agree.
    """
    schema = SCHEMAS[record]
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise RecordError(f"{record} table: column '{field.name}' is missing; it should be {field.type}")
        found = table.schema.field(index).type
        if found != field.type:
            raise RecordError(f"{record} table: column '{field.name}' is {found}; it should be {field.type}")
        if table.column(index).null_count:
            raise RecordError(f"{record} table: column '{field.name}' has {table.column(index).null_count} nulls")
        if pa.types.is_list(found) and any(chunk.flatten().null_count for chunk in table.column(index).chunks):
            raise RecordError(f"{record} table: column '{field.name}' has nulls within its lists")
    unknown = [name for name in table.column_names if name not in schema.names]
    if unknown:
        raise RecordError(f"{record} table: column '{unknown[0]}' is not part of the record")
    if record in _SAME_LENGTH and table.num_rows:
        first, second = _SAME_LENGTH[record]
        same = pc.equal(pc.list_value_length(table[first]), pc.list_value_length(table[second]))  # type: ignore[attr-defined]
        if not pc.all(same).as_py():  # type: ignore[attr-defined]
            row = same.to_pylist().index(False)
            lengths = len(table[first][row]), len(table[second][row])
            raise RecordError(f"{record} table: row {row} has {lengths[0]} {first} and {lengths[1]} {second}")
    return table


def build(record: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A checked `record` table from dictionaries; `images` may be left out where there are none.

    Raises RecordError naming the column that does not fit.
    """
    schema = SCHEMAS[record]
    rows = list(rows)
    columns = []
    for field in schema:
        try:
            values = [row.get("images", ()) if field.name == "images" else row[field.name] for row in rows]
            columns.append(pa.array(values, type=field.type))
        except KeyError:
            raise RecordError(f"{record} table: column '{field.name}' is missing") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RecordError(f"{record} table: column '{field.name}' is not {field.type}: {reason}") from None
    unknown = next((name for row in rows for name in row if name not in schema.names), None)
    if unknown is not None:
        raise RecordError(f"{record} table: column '{unknown}' is not part of the record")
    return check(record, pa.Table.from_arrays(columns, schema=schema))


def concat(record: str, tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of `tables`, in order, as one checked table; an empty table where there are none."""
    return check(record, pa.concat_tables(tables).combine_chunks() if tables else SCHEMAS[record].empty_table())


def example(
    *,
    model_type: str,
    task: str,
    prompt: str,
    steps: Sequence[str],
    reference: str,
    verifier: str,
    metadata: Mapping[str, Any] | None = None,
    difficulty: float = 0.0,
    provenance: Mapping[str, Any] | None = None,
    images: Sequence[bytes] = (),
    candidates: Sequence[str] = (),
) -> dict[str, Any]:
    """One Example row; its id is the hash of what is asked, so the same problem has one id wherever it comes from."""
    return {
        "id": example_id(model_type, prompt, images, candidates),
        "model_type": model_type,
        "task": task,
        "prompt": prompt,
        "images": list(images),
        "steps": list(steps),
        "reference": reference,
        "candidates": list(candidates),
        "verifier": verifier,
        "metadata": json.dumps(dict(metadata or {}), sort_keys=True, default=str),
        "difficulty": float(difficulty),
        "provenance": json.dumps(dict(provenance or {}), sort_keys=True, default=str),
    }


def folded(text: str) -> str:
    """The text as identity sees it: white space folded, letters and their accents composed (NFC)."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def example_id(model_type: str, prompt: str, images: Sequence[bytes] = (), candidates: Sequence[str] = ()) -> str:
    """128-bit content hash, hex. A copy that differs in white space or in Unicode's composition is the same problem."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (model_type, folded(prompt), *candidates):
        digest.update(unicodedata.normalize("NFC", part).encode() + b"\0")
    for image in images:
        digest.update(hashlib.blake2b(image, digest_size=16).digest())
    return digest.hexdigest()
