"""Files of images and what is asked about them → Example tables of the vision type, told apart by their columns.

    `image`, `question`, `answer`     as they are; the expert's `steps` where there are some
    `image`, `sentence`, `label`      whether the sentence is true; steps: what stands in each box (`structured_rep`)
    `image`, `n_…`                    how many there are of each: a JSON object, a number a line
    `image`, `label`                  which of the labels in training
    `image`, `character`              whether two rows show the same character; steps: which one each shows

An image is its encoded bytes (Parquet), a path from the file's folder, or a `data:` address; `images` is a list of
them. The expert's actions are the lines of the whole answer, the one with the result too.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, TypeAdapter

from srl_rlvr import images, records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import columns, files
from srl_rlvr.examples.structures import as_lines
from srl_rlvr.verifiers import check_name

Row = Mapping[str, Any]
_COUNT = "n_"  # begins the columns that are counts of something in the image
_STEPS = TypeAdapter(list[str] | None)
_COUNT_OF = TypeAdapter(Annotated[int, Field(ge=0, strict=True)])
_OBJECTS = "n_objects"  # of all kinds, where others say of which


@dataclass(frozen=True)
class Problem:
    question: str
    lines: Sequence[str]  # of the whole answer
    reference: str
    verifier: str = "exact"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Any] = ()  # beside the row's own


def load(
    path: files.Source, split: files.Split, how: files.Reading = files.WHOLE, model_type: str = "multimodal_vision"
) -> pa.Table:
    """The Examples of a file or of a folder's `split`. Raises InputError naming the file, the row and the column."""
    file = files.find(path, split)
    train = files.find(path, "train") if path.is_dir() else file
    reader: Callable[[int, Row, str], Problem] | None = None

    def example(number: int, row: dict[str, Any]) -> dict[str, Any]:
        nonlocal reader
        where = f"{file}, row {number}"
        reader = reader or _reader(row, where, file, train, how)
        problem = reader(number, row, where)
        own = row["images"] if isinstance(row.get("images"), list) else [row.get("image")]
        return records.example(
            model_type=model_type,
            task=files.task_of(path, file),
            prompt=columns.bounded(problem.question, "the question", where),
            images=[_image(value, file, where) for value in (*own, *problem.images)],
            steps=[] if how.unanswered else problem.lines,
            reference=problem.reference,
            verifier=problem.verifier,
            metadata=problem.metadata,
            difficulty=len(problem.lines),
            provenance={"source": file.name, "row": number, "id": row.get("id")},
        )

    return files.collect(file, example, limit=how.limit, skip_bad=how.skip_bad, keep_repeated=how.unanswered)


def card(paths: Sequence[Path]) -> dict[str, Any]:
    """What a card has to hold to ask about images that come alone: the question that all rows have in common, what
    verifies its answer, and the labels or the schema."""
    for path in paths:
        [first] = load(path, "train", files.Reading(limit=1, skip_bad=True)).to_pylist()
        metadata = json.loads(first["metadata"])
        if metadata:
            return {"question": first["prompt"], "verifier": first["verifier"], "metadata": metadata}
    return {}


def _reader(
    row: Row, where: str, file: files.Source, train: files.Source, how: files.Reading
) -> Callable[[int, Row, str], Problem]:
    """What makes a Problem of (number, row, where) for rows with such columns."""
    if "image" not in row and "images" not in row:
        raise InputError(f"{where}: column 'image' is missing: encoded bytes, a path, or a data: address")
    if how.unanswered:
        return lambda number, row, where: _unanswered(row, how.card or {}, where)
    if "question" in row:
        return _asked
    if "sentence" in row:
        return _statement
    if "character" in row:
        return _pairs(file, how.skip_bad)
    known = (how.card or {}).get("metadata", {})
    in_train = (of for _, of in files.read_rows(train, how.skip_bad))
    if _counted(row):
        things = known["schema"]["properties"] if "schema" in known else itertools.chain(*map(_counted, in_train))
        names = list(dict.fromkeys(things))
        return lambda number, row, where: _counts(row, names, where)
    if "label" in row:
        labels = known.get("labels") or _labels(in_train)
        return lambda number, row, where: _label(row, labels, where)
    raise InputError(f"{where}: beside 'image' there should be 'question' and 'answer', 'sentence' and 'label', "
                     "'label', 'character', or counts as 'n_…'")  # fmt: skip


def _labels(rows: Iterable[Row]) -> list[str]:
    """Every label that is one, sorted."""
    found = set[str]()
    for row in rows:
        with contextlib.suppress(InputError):  # said when it is that row's turn
            found.add(_text(row, "label", ""))
    return sorted(found)


def _counted(row: Row) -> list[str]:
    """The things that the row counts."""
    return [name.removeprefix(_COUNT) for name in row if name.startswith(_COUNT) and name != _OBJECTS]


def _answer(result: str) -> str:
    return f"Answer: {result}"


def _text(row: Row, column: str, where: str) -> str:
    """A text, or a number as one."""
    value = row.get(column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value).removesuffix(".0") if is_number else columns.text(row, column, where)


def _asked(number: int, row: Row, where: str) -> Problem:
    answer, steps = _text(row, "answer", where), columns.take(row, "steps", _STEPS, "a list of texts", where)
    return Problem(_text(row, "question", where), [*(steps or ()), _answer(answer)], answer)


def _unanswered(row: Row, of_model: Row, where: str) -> Problem:
    question = _statement_question(row, where) if "sentence" in row else row.get("question") or of_model.get("question")
    if not isinstance(question, str):
        raise InputError(f"{where}: it has no 'question', and the model's card names none")
    if question != of_model.get("question"):
        return Problem(question, (), "unknown")
    try:
        check_name(of_model["verifier"])  # a card comes with a model, and names no code either
    except InputError as error:
        raise InputError(f"{where}: the model's card: {error}") from None
    return Problem(question, (), "{}", of_model["verifier"], of_model["metadata"])


def _label(row: Row, labels: Sequence[str], where: str) -> Problem:
    label = _text(row, "label", where)
    if label not in labels:
        raise InputError(f"{where}: label '{label}' is none of those in training: {', '.join(labels)}")
    question = f"Which of these is shown: {', '.join(labels)}?"
    return Problem(question, [_answer(label)], label, metadata={"labels": labels})


def _statement(number: int, row: Row, where: str) -> Problem:
    if not isinstance(row.get("label"), bool):
        raise InputError(f"{where}: column 'label' should be true or false")
    result = str(row["label"]).lower()
    lines = [*_boxes(row.get("structured_rep"), where), _answer(result)]
    return Problem(_statement_question(row, where), lines, result)


def _statement_question(row: Row, where: str) -> str:
    return f"{_text(row, 'sentence', where)}\nIs that true or false?"


def _boxes(drawn: Any, where: str) -> list[str]:
    """A line for each box: how many there are in it of each colour and shape."""
    if drawn is None:
        return []
    lines = []
    try:
        for number, box in enumerate(json.loads(drawn), start=1):
            kinds = Counter(f"{_COLOURS.get(thing['color'].lower(), thing['color'].lower())} {thing['type']}"
                            for thing in box)  # fmt: skip
            lines.append(f"{number}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{where}: column 'structured_rep' should be JSON: boxes of things with 'color' and 'type'") \
            from None  # fmt: skip
    return lines


_COLOURS = {"#0099ff": "blue"}


def _counts(row: Row, names: Sequence[str], where: str) -> Problem:
    counts = [columns.take(row, _COUNT + name, _COUNT_OF, "a number of things, 0 or more", where) for name in names]
    lines = as_lines(dict(zip(names, counts, strict=True)))
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "additionalProperties": False,
    }
    question = f"How many are there of each: {', '.join(names)}? Answer with a JSON object, a number a line."
    return Problem(question, lines, "\n".join(lines), "fields", {"schema": schema})


def _pairs(file: files.Source, skip_bad: bool) -> Callable[[int, Row, str], Problem]:
    """Every row beside another of its alphabet: rows in turn beside the same character and beside another one."""
    of_alphabet: dict[str, list[tuple[int, str, Any]]] = {}  # numbers of rows, what they show, their images
    for number, row in files.read_rows(file, skip_bad):
        with contextlib.suppress(InputError):  # said when it is that row's turn
            shown = number, _text(row, "character", ""), row.get("image")
            of_alphabet.setdefault(str(row.get("alphabet")), []).append(shown)

    def problem(number: int, row: Row, where: str) -> Problem:
        character, same = _text(row, "character", where), number % 2 == 0
        others = [
            (other, image)
            for at, other, image in of_alphabet[str(row.get("alphabet"))]
            if at != number and (other == character) == same
        ]
        if not others:
            raise InputError(f"{where}: no other row of its alphabet to show beside '{character}'")
        other, beside = random.Random(f"pair:{row.get('id', number)}").choice(others)
        lines = [f"1: {character}", f"2: {other}", _answer("yes" if same else "no")]
        question = "Do both images show the same character, yes or no?"
        return Problem(question, lines, "yes" if same else "no", images=[beside])

    return problem


def _image(value: Any, file: files.Source, where: str) -> bytes:
    """The encoded image, known to be one. Raises InputError naming the row."""
    if isinstance(value, Mapping):  # as the datasets library writes images into Parquet
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _read(value, file, where)
    if not isinstance(value, bytes):
        raise InputError(f"{where}: column 'image' should be encoded bytes, a path, or a data: address")
    try:
        images.check(value)
    except ValueError as error:
        raise InputError(f"{where}: the image {error}") from None
    return value


def _read(value: str, file: files.Source, where: str) -> bytes:
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error:
            raise InputError(f"{where}: the image's data: address is not valid base64") from None
    if isinstance(file, files.InMemory):
        raise InputError(f"{where}: an image should be its encoded bytes, or a data: address")
    try:
        return (file.parent / value).read_bytes()
    except (OSError, ValueError) as error:  # a null byte, or half of a pair of surrogates
        reason = error.strerror if isinstance(error, OSError) else "no path"
        raise InputError(f"{where}: the image {value[:200]} cannot be read ({reason})") from None
