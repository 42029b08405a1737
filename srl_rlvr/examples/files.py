"""Files of problems → Example tables: JSON lines or Parquet as they are, told apart by their columns.

`SCHEMAS` is the whole list of what is understood; to understand another, add a row. This module knows files and
columns; it must not know what a verifier does with the reference that it names.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import columns, references
from srl_rlvr.examples.names import nearest
from srl_rlvr.examples.steps import one_line_each, operations
from srl_rlvr.verifiers import check_name
from srl_rlvr.verifiers.answers import extract_answer, read_number

log = logging.getLogger(__name__)

Split = Literal["train", "dev"]
Made = TypeVar("Made")
Row = Mapping[str, Any]

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
FOLIO_LABELS = ("True", "False", "Unknown")
UNANSWERED = "(unanswered)"
_ANSWERS = ("answer", "label", "solution")  # columns that only rows with an answer have
_OF_ANSWERS = ("exact", "numeric", "choice", "expression", "similarity")  # verifiers that need no metadata of rows
_TURNS = ("messages", "conversations", "prompt")  # columns of conversations
_OTHER_NAMES = {
    "question": ("prompt", "instruction", "query", "input", "text"),
    "answer": ("completion", "response", "output", "target", "label", "ground_truth"),
}
_MOST_NAMED = 5

_LETTERED = re.compile(r"\(?([A-Z])\s*[).:]\s*")
_NOT_A_STEP = re.compile(
    r"\W*((the|so|hence|therefore|correct|right|final|answer|ans|option|choice|is)\b\W*)*[A-Z]\W*|\W*(solution|explanation)\W*",
    re.IGNORECASE,
)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # escaped; text only where a pair of them is
_CALCULATOR = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class Reading:
    """How rows are read."""

    limit: int | None = None  # the first so many
    candidates: int = 50  # of one question, at most
    ordered: bool = False  # candidates come in the order of a search, which counts
    card: Mapping[str, Any] | None = None  # of the model that is asked
    unanswered: bool = False  # for prediction: rows need no answer
    skip_bad: bool = False  # rows that are wrong are left out and counted
    verifiers: Sequence[str] = ()  # the user's own, that rows may name


WHOLE = Reading()


@dataclass(frozen=True)
class InMemory:
    """Rows that stand in no file, as those of a request; read like one."""

    rows: Sequence[dict[str, Any]]
    name: str = "request"

    def __str__(self) -> str:
        return self.name

    def is_dir(self) -> bool:
        return False


Source = Path | InMemory


@dataclass(frozen=True)
class Problem:
    """What a row says, before it is an Example. Raised ValueErrors become an InputError that names the row."""

    prompt: str
    steps: Sequence[str]
    reference: str
    verifier: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schema:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    problem: Callable[[Row], Problem]


def load(
    path: Source,
    split: Split = "train",
    limit: int | None = None,
    model_type: str = "task_llm",
    unanswered: bool = False,
    skip_bad: bool = False,
    verifiers: Sequence[str] = (),
) -> pa.Table:
    """The Examples of a file, or of a folder's `split` file: the first `limit`, each once.

    For prediction rows may be `unanswered`: what they have as an answer is not read, and every row is kept, repeated or
    not.
    Raises InputError naming the file, and the row and column where there is one.
    """
    file = find(path, split)
    schema: Schema | None = None

    def example(number: int, row: dict[str, Any]) -> dict[str, Any]:
        nonlocal schema
        if "problem" in row and "question" not in row:  # as MATH and its kin call it
            row["question"] = row.pop("problem")
        own = list(row)
        if unanswered:
            row |= {"answer": UNANSWERED, "label": UNANSWERED}
        schema = schema or _recognize(row)
        for column in schema.required:
            if column not in row:
                raise _missing(f"{file}, row {number}", {name: row[name] for name in own}, column, unanswered)
        return _example(file, number, row, schema, task_of(path, file), model_type, verifiers)

    check = None if unanswered else references.slow_faults
    return collect(file, example, limit=limit, skip_bad=skip_bad, keep_repeated=unanswered, check=check)


def collect(
    file: Source,
    example_of: Callable[[int, dict[str, Any]], dict[str, Any]],
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    keep_repeated: bool = False,
    check: Callable[[Sequence[Mapping[str, Any]]], list[str]] | None = None,
) -> pa.Table:
    """The Examples that `example_of` (line number, row) makes of the file's rows: the first `limit`, each once.

    Of rows that repeat a problem the first that has steps is kept; those with another answer are named in the log.
    `check` tells what is wrong with each Example ("" for nothing), all at once.
    A row that is wrong ends it with its InputError, or under `skip_bad` is left out, counted and said.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it should be 1 or more")
    examples: dict[Any, dict[str, Any]] = {}
    repeated, bad = 0, left_out(skip_bad)
    contradicting: list[tuple[int, int]] = []
    for number, example in each(file, example_of, bad):
        key = number if keep_repeated else example["id"]
        first = examples.setdefault(key, example)
        if first is not example:
            repeated += 1
            if not _same_answer(first, example):
                contradicting.append((_row_of(first), number))
            elif len(first["steps"]) == 0 < len(example["steps"]):
                examples[key] = example
        if len(examples) == limit:
            break
    if check is not None:
        for (key, example), fault in zip(list(examples.items()), check([*examples.values()]), strict=True):
            if fault:
                error = InputError(f"{file}, row {_row_of(example)}: {fault}")
                if bad is None:
                    raise error
                bad.append(error)
                del examples[key]
    say_left_out(file, bad)
    if not examples:
        raise InputError(f"{file}: the file holds no rows" + (" that are right" if bad else ""))
    if repeated:
        log.warning("%s: rows dropped that repeat an earlier problem: %d", file.name, repeated)
    if contradicting:
        pairs = [f"{one} and {other}" for one, other in contradicting[:_MOST_NAMED]]
        more = f" (and {len(contradicting) - _MOST_NAMED} more)" if len(contradicting) > _MOST_NAMED else ""
        log.warning(
            "%s: rows with the same question and different answers: %s%s; the first of each pair is kept: correct or "
            "delete one of them", file.name, ", ".join(pairs), more,
        )  # fmt: skip
    return records.build("Example", examples.values())


def _row_of(example: Mapping[str, Any]) -> int:
    return json.loads(example["provenance"])["row"]


def _same_answer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    numbers = [read_number(of["reference"]) if of["verifier"] == "numeric" else None for of in (one, other)]
    return one["reference"] == other["reference"] or (None not in numbers and numbers[0] == numbers[1])


def task_of(path: Source, file: Source) -> str:
    """How problems of this file are called: by its folder, or by its name where that says more."""
    if isinstance(file, InMemory):
        return file.name
    plain = file.name.startswith(("train.", "dev.", "queries_"))
    return file.resolve().parent.name if path.is_dir() or plain else file.name.partition(".")[0]


def find(path: Source, split: Split = "train") -> Source:
    """The file itself, or a folder's `<split>.jsonl.gz`, `.jsonl` or `.parquet`. Raises InputError with the nearest
    name."""
    if isinstance(path, InMemory):
        return path
    if path.is_dir():
        for suffix in SUFFIXES:
            if (file := path / f"{split}{suffix}").is_file():
                return file
        names = _names_in(path)
        shard = next((name for name in sorted(names) if re.fullmatch(rf"{split}-\d+-of-\d+\.parquet", name)), None)
        joined = (
            f"; {shard} is one of several files: join them into {split}.parquet" if shard else nearest(split, names)
        )
        raise InputError(f"{path}: no {split}.jsonl.gz, .jsonl or .parquet{joined}")
    if not path.is_file():
        raise InputError(f"{path}: no such file{nearest(path.name, _names_in(path.parent))}")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: files should end in {' or '.join(SUFFIXES)}")
    return path


def read_rows(file: Source, skip_bad: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) for each row, or line of JSON that is not blank. Raises InputError naming file and line."""
    return each(file, lambda _, row: row, left_out(skip_bad))


def left_out(skip_bad: bool) -> list[InputError] | None:
    """Where `each` is to put what is wrong with rows, or nothing where the first such row ends it."""
    return [] if skip_bad else None


def each(
    file: Source, make: Callable[[int, dict[str, Any]], Made], bad: list[InputError] | None = None
) -> Iterator[tuple[int, Made]]:
    """(number from 1, what `make` (number, row) gives) of each row. The InputError of a row that is wrong is raised, or
    put into `bad`."""
    for number, line in _lines(file):
        try:
            made = make(number, _row(file, number, line))
        except InputError as error:
            if bad is None:
                raise
            bad.append(error)
        else:
            yield number, made


def say_left_out(file: Source, bad: list[InputError] | None) -> None:
    """Log how many rows were left out, and the first."""
    if bad:
        log.warning("%s: wrong rows left out: %d; the first: %s", file.name, len(bad), bad[0])


def _row(file: Source, number: int, line: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(line, dict):
        return line
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once_each)
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        raise InputError(f"{file}, line {number}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{file}, line {number}: not JSON that can be read ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{file}, line {number}: a row should be a JSON object, not {_kind(row)}")
    return row


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object. Raises ValueError if a key comes twice: readers differ in which of its values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' comes twice")
    return found


def _lines(file: Source) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(number from 1, line) of those that are not blank; of Parquet the rows, without what is null."""
    number = 0
    if isinstance(file, InMemory):
        yield from enumerate(file.rows, start=1)
        return
    if file.suffix == ".parquet":
        yield from enumerate(_parquet(file), start=1)
        return
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file}: not a whole gzip file after line {number} ({error})") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = pq.ParquetFile(file)
        names = _label_names(content.schema_arrow)
        for batch in content.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield without_nulls(row) | {
                    column: of[row[column]]
                    for column, of in names.items()
                    if isinstance(row.get(column), int) and 0 <= row[column] < len(of)
                }
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a whole Parquet file ({str(error).splitlines()[0]})") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: a column of texts holds what is not UTF-8") from None


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of each column's numbers, where Hugging Face's datasets library wrote them (its ClassLabel)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {column: of["names"] for column, of in features.items() if of.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {column: of for column, of in labels.items() if _is_text_list(of)}


def without_nulls(value: Any) -> Any:
    """What a row does not have is null in Parquet, and where rows were padded, at every level."""
    if isinstance(value, dict):
        return {name: without_nulls(of) for name, of in value.items() if of is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _recognize(row: Row) -> Schema:
    """The first schema whose required columns are all there, else the closest one."""
    for schema in SCHEMAS:
        if all(column in row for column in schema.required):
            return schema
    return max(SCHEMAS, key=lambda schema: (sum(column in row for column in schema.required), -len(schema.required)))


def _missing(where: str, row: Row, column: str, unanswered: bool) -> InputError:
    """The error for a row without this column: what it has, what to do, and which columns are read."""
    there = f"; it has {', '.join(row)}" if row else ""
    sets = [[name for name in schema.required if not (unanswered and name in _ANSWERS)] for schema in SCHEMAS]
    wanted = ", or ".join(dict.fromkeys(" + ".join(names) for names in sorted(sets, key=len)))
    return InputError(f"{where}: column '{column}' is missing{there}{_remedy(row, column)}; columns read: {wanted}")


def _remedy(row: Row, column: str) -> str:
    turns = next((name for name in row if name in _TURNS and isinstance(row[name], list)), None)
    if turns:
        return f"; put the user's turn of '{turns}' into 'question', and the right answer to it alone into 'answer'"
    close = get_close_matches(column, list(row), n=1, cutoff=0.8)
    if close:
        return f"; did you mean '{close[0]}'?"
    other = next((name for name in _OTHER_NAMES.get(column, ()) if name in row), None)
    return f"; rename '{other}' to '{column}'" if other else ""


def _example(
    file: Source, number: int, row: Row, schema: Schema, task: str, model_type: str, verifiers: Sequence[str]
) -> dict[str, Any]:
    given: dict[str, Any] = {
        key: _as_text(value) for key, value in row.items() if value is not None or key in schema.required
    }
    for column in (*schema.required, *schema.optional, "verifier", "id"):
        expected, fits = COLUMNS[column]
        if column in given and not fits(given[column]):
            found = f"{_kind(given[column])} ({json.dumps(given[column], ensure_ascii=False, default=str)[:60]})"
            raise InputError(f"{file}, row {number}: column '{column}' should be {expected}, not {found}")
    try:
        problem = schema.problem(given)
        verifier = given.get("verifier", problem.verifier)
        check_name(verifier, verifiers)
        if verifier not in _OF_ANSWERS and verifier not in verifiers:
            raise ValueError(f"column 'verifier' is '{verifier}'; rows of text may name {', '.join(_OF_ANSWERS)}, or a "
                             "verifier of your own that is declared")  # fmt: skip
        if problem.reference != UNANSWERED and (
            fault := references.fault(problem.reference, verifier, problem.metadata)
        ):
            raise ValueError(fault)
    except (InputError, ValueError) as error:
        raise InputError(f"{file}, row {number}: {error}") from None
    return records.example(
        model_type=model_type,
        task=task,
        prompt=columns.bounded(problem.prompt, "the question", f"{file}, row {number}"),
        steps=problem.steps,
        reference=problem.reference,
        verifier=verifier,
        metadata=problem.metadata,
        difficulty=len(problem.steps),
        provenance={"source": file.name, "row": number, "id": given.get("id")},
    )


def _as_text(value: Any) -> Any:
    """Parquet's dates, times and decimals as JSON lines would have them; anything else as it is."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return format(value, "f") if isinstance(value, decimal.Decimal) and value.is_finite() else value


def _from_conclusion(row: Row) -> Problem:
    if row["label"] not in (*FOLIO_LABELS, UNANSWERED):
        raise ValueError(f"column 'label' is '{row['label']}'; it should be one of {', '.join(FOLIO_LABELS)}")
    question = f"Conclusion: {row['conclusion']}\nIs the conclusion True, False or Unknown?"
    return Problem("\n".join([*row["premises"], question]), (), row["label"], "choice", {"labels": list(FOLIO_LABELS)})


def _from_options(row: Row) -> Problem:
    options = [option.strip() for option in row["options"]]
    if not all(_LETTERED.match(option) for option in options):
        options = [f"{chr(ord('A') + index)}) {option}" for index, option in enumerate(options)]
    options = [_LETTERED.sub(r"\1) ", option, count=1) for option in options]
    letters = [option[0] for option in options]
    answer = str(row["answer"]).strip()
    if answer not in (*letters, UNANSWERED):
        raise ValueError(
            f"column 'answer' is '{answer}'; it should be one of the options' letters {', '.join(letters)}"
        )
    lines = one_line_each(row.get("rationale", "").splitlines())
    steps = [line for line in lines if not _NOT_A_STEP.fullmatch(line)]
    return Problem("\n".join([row["question"], *options]), steps, answer, "choice", {"labels": letters})


def _from_equation(row: Row) -> Problem:
    try:
        steps = operations(row["equation"])
    except ValueError as error:
        raise ValueError(f"column 'equation': {error}") from None
    reference, verifier = _reference(row["answer"])
    # SVAMP itself has equations that contradict the answer: such steps would teach the wrong thing.
    if steps and verifier == "numeric":
        result, right = float(steps[-1].rpartition(" = ")[2]), read_number(reference)
        steps = steps if right is not None and math.isclose(result, right, abs_tol=0.01) else []
    return Problem(row["question"], steps, reference, verifier)


def _from_question(row: Row) -> Problem:
    # The original GSM8K has the solution in the answer: lines of reasoning, then `#### 72`.
    solution, marker, answer = str(row["answer"]).rpartition("####")
    lines = row.get("steps") or row.get("solution", solution if marker else "").splitlines()
    if not marker and (marked := extract_answer(answer)):  # others end in `Answer: 72` or \boxed{72}
        *solved, last = answer.strip().splitlines()
        lines = lines or (solved if last.lower().startswith("answer:") else [*solved, last] if solved else [])
        answer = marked
    reference, verifier = _reference(answer)
    return Problem(row["question"], one_line_each(_CALCULATOR.sub("", line) for line in lines), reference, verifier)


def _from_solution(row: Row) -> Problem:
    answer = extract_answer(row["solution"])
    if answer is None:
        raise ValueError(
            "column 'answer' is missing, and column 'solution' marks none by 'Answer:', \\boxed{…} or '####'"
        )
    return _from_question({**row, "answer": answer})


_reference = references.reference_of


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text_or_number(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_answer(value: object) -> bool:
    return _is_text_or_number(value) and (not isinstance(value, float) or math.isfinite(value))


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return type(value).__name__


# The most telling columns first: a row with options also has a question and an answer.
SCHEMAS = (
    Schema(("premises", "conclusion", "label"), (), _from_conclusion),
    Schema(("question", "options", "answer"), ("rationale",), _from_options),
    Schema(("question", "equation", "answer"), (), _from_equation),
    Schema(("question", "answer"), ("steps", "solution"), _from_question),
    Schema(("question", "solution"), (), _from_solution),
)

COLUMNS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "id": ("text or a number", _is_text_or_number),
    "verifier": ("text", _is_text),
    "question": ("text that is not empty", _is_text),
    "answer": ("text or a finite number", _is_answer),
    "conclusion": ("text that is not empty", _is_text),
    "label": ("text that is not empty", _is_text),
    "premises": ("a list of texts", _is_text_list),
    "options": ("a list of texts", _is_text_list),
    "steps": ("a list of texts", _is_text_list),
    "solution": ("text", lambda value: isinstance(value, str)),
    "rationale": ("text", lambda value: isinstance(value, str)),
    "equation": ("text that is not empty", _is_text),
}
