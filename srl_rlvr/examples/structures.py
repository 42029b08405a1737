"""Files of texts with what is to be read from them → Example tables of the parser and the extractor.

    `text` (or `tokens`), `frames`            the parser: predicates with their roles, as PropBank has them
    `text`, `target`                          the extractor: an object; its JSON Schema in `schema`, or one of what the
                                              fields of the train file hold
    `tokens` (or `text`), `entities`          the extractor: an array of texts for each type of entity, or of slot
                                              where the column is `slots`

The answer is JSON over lines, one a frame or a field, in the order of the text: the expert's actions are its lines.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import columns, files
from srl_rlvr.verifiers.structures import alternatives, read_json, validator

Row = Mapping[str, Any]
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
FRAMES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"predicate": _TEXT},
        "required": ["predicate"],
        "additionalProperties": {"anyOf": [_TEXT, _TEXTS]},
    },
}
_ANSWERS = ("target", "frames", "entities", "slots")
_MOST_SHOWN, _DEEPEST_SHOWN = 10_000, 16  # fields: references can make a small schema endless


class _Role(BaseModel):
    role: str
    start: int = -1  # token
    end: int = -1


class _Frame(BaseModel):
    predicate: str
    index: int | None = None  # token
    args: list[_Role]


class _Entity(BaseModel):
    type: str = Field(validation_alias=AliasChoices("type", "slot"))
    start: int
    text: str


_FRAMES, _ENTITIES = TypeAdapter(list[_Frame]), TypeAdapter(list[_Entity])


def load(
    path: files.Source,
    split: files.Split,
    model_type: str,
    verifier: str,
    how: files.Reading = files.WHOLE,
) -> pa.Table:
    """The Examples of a file or of a folder's `split`, each once.

    Fields of rows without a `schema` are those of the model's card, where there is one, else of the train file.
    Raises InputError naming the file, the row and the column.
    """
    file = files.find(path, split)
    null_is_missing = isinstance(file, Path) and file.suffix == ".parquet"
    known = how.card or {}
    if verifier == "fields" and "schema" not in known and not how.unanswered:
        known = _known([files.find(path, "train") if path.is_dir() else file], how.skip_bad)

    def example(number: int, row: dict[str, Any]) -> dict[str, Any]:
        where = f"{file}, row {number}"
        row = _read(row, where, () if how.unanswered else _ANSWERS)
        text = _text(row, where)
        if row.get("verifier", verifier) not in (None, verifier):
            raise InputError(f"{where}: column 'verifier' is for types of text; an answer of {model_type} is verified "
                             f"by '{verifier}'")  # fmt: skip
        if verifier == "frames":
            prompt = " ".join(_tokens(row) or text.split())
            metadata: Row = {"text": prompt}
            steps = as_lines([] if how.unanswered else _frames(row, prompt, where))
        else:
            of_row = _schema_of(row, known, where)
            prompt = f"{json.dumps(_short(of_row))}\n{text}"
            metadata = {"schema": of_row}
            steps = as_lines({} if how.unanswered else _fields(row, of_row, text, where, null_is_missing))
        return records.example(
            model_type=model_type,
            task=files.task_of(path, file),
            prompt=prompt,
            steps=steps,
            reference="\n".join(steps),
            verifier=verifier,
            metadata=metadata,
            difficulty=len(steps),
            provenance={"source": file.name, "row": number, "id": row.get("id")},
        )

    return files.collect(file, example, limit=how.limit, skip_bad=how.skip_bad, keep_repeated=how.unanswered)


def _read(row: dict[str, Any], where: str, answers: Sequence[str]) -> dict[str, Any]:
    """The row, with columns that hold JSON as text read: so rows of different fields are kept in one Arrow table."""
    read = {}
    for column in ("schema", *answers):
        if isinstance(value := row.get(column), str):
            try:
                read[column] = read_json(value)
            except ValueError as error:
                raise InputError(f"{where}: column '{column}' should be an object or a list, or JSON of one; "
                                 f"it is text, and {error}") from None  # fmt: skip
    return row | read


def _text(row: Row, where: str) -> str:
    tokens = _tokens(row)
    text = " ".join(tokens) if tokens else row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: there should be 'text' that is not empty, or 'tokens'")
    return columns.bounded(text, "the text", where)


def _tokens(row: Row) -> list[str]:
    """The row's own, or none."""
    tokens = row.get("tokens")
    return tokens if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens) else []


def _frames(row: Row, text: str, where: str) -> list[dict[str, Any]]:
    """The frames in the order of the sentence."""
    frames = columns.take(row, "frames", _FRAMES, "a list of frames", where)
    tokens = _tokens(row) or text.split()
    found, places = [], [frame.index for frame in frames]
    repeated = next((place for place in places if place is not None and places.count(place) > 1), None)
    if repeated is not None:
        raise InputError(f"{where}: two frames have their predicate at token {repeated}")
    for frame in sorted(frames, key=lambda frame: frame.index or 0):
        if frame.predicate not in text:
            raise InputError(f"{where}: the predicate '{frame.predicate[:60]}' is not in the text")
        taken: list[tuple[int, int]] = []
        roles: dict[str, list[str]] = {}
        for role in sorted(frame.args, key=lambda role: (role.start, role.end)):
            start, end = role.start, role.end
            if not 0 <= start < end <= len(tokens):
                raise InputError(f"{where}: {role.role} of '{frame.predicate}' spans tokens {start} to {end} "
                                 f"of {len(tokens)}")  # fmt: skip
            if any(start < other_end and other_start < end for other_start, other_end in taken):
                raise InputError(f"{where}: the roles of '{frame.predicate}' overlap at token {start}")
            taken.append((start, end))
            roles.setdefault(role.role, []).append(" ".join(tokens[start:end]))
        of_frame = {role: spans if len(spans) > 1 else spans[0] for role, spans in roles.items()}
        found.append({"predicate": frame.predicate, **of_frame})
    return found


def card(paths: Sequence[Path]) -> dict[str, Any]:
    """For an extractor's card: the JSON Schema of all fields in these train files, and where rows name several domains
    (`domain`) that of each."""
    return _known([files.find(path, "train") for path in paths], skip_bad=True)


def _known(train: Iterable[files.Source], skip_bad: bool) -> dict[str, Any]:
    domains: dict[str, dict[str, Any]] = {}
    for file in train:
        for domain, fields in _domains(file, skip_bad).items():
            domains[domain] = _merged(domains.get(domain, {}), fields)
    of_domain = {domain: _object(fields) for domain, fields in domains.items()}
    return {"schema": _object(_merged(*domains.values()))} | ({"domains": of_domain} if len(domains) > 1 else {})


def _schema_of(row: Row, known: Row, where: str) -> dict[str, Any]:
    """A row's JSON Schema is its own, else that of its domain, else that of all fields that are known."""
    found = row.get("schema") or known.get("domains", {}).get(str(row.get("domain", ""))) or known.get("schema")
    if found is None:
        raise InputError(f"{where}: it has no 'schema', and the model's card names none")
    return _checked(found, where)


def _checked(schema: Any, where: str) -> dict[str, Any]:
    schema = files.without_nulls(schema)  # padded, where other rows have other fields
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise InputError(f"{where}: 'schema' should be a JSON Schema of an object with 'properties'")
    from jsonschema import SchemaError

    fields = {name: _field(field, where) for name, field in schema["properties"].items()}
    checked = {"additionalProperties": False} | schema | {"properties": fields}
    try:
        _validator(json.dumps(checked, default=str))
    except SchemaError as error:
        raise InputError(f"{where}: 'schema' is no JSON Schema: {error.json_path}: {error.message[:200]}") from None
    return checked


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Of a JSON Schema that is one, once for all the rows that have it: the check takes milliseconds. Raises
    SchemaError."""
    from jsonschema import Draft202012Validator

    checked = json.loads(schema)
    Draft202012Validator.check_schema(checked, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return validator(checked)


def _field(schema: Any, where: str) -> Row:
    """The schema of a field or an item: true and false are schemas as well."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise InputError(f"{where}: 'schema' has {str(schema)[:60]!r} where a field's own schema should be")
    return schema | ({"items": _field(schema["items"], where)} if "items" in schema else {})


def _domains(train: files.Source, skip_bad: bool) -> dict[str, dict[str, Any]]:
    """The fields of each `domain` in the file, and the schema of each field."""

    def fields_of(number: int, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        where = f"{train}, row {number}"
        row = _read(row, where, _ANSWERS)
        text = _text(row, where)
        if isinstance(row.get("target"), dict):
            fields = {name: _kind_of(value) for name, value in _as_json(row["target"], where).items()}
        else:
            fields = {kind: _TEXTS for kind, _, _ in _entities(row, text, where)}
        return str(row.get("domain", "")), fields

    of_domain: dict[str, dict[str, Any]] = {}
    for _, (domain, fields) in files.each(train, fields_of, files.left_out(skip_bad)):
        of_domain[domain] = _merged(of_domain.get(domain, {}), fields)
    return of_domain


def _object(fields: Row) -> dict[str, Any]:
    """The schema of an object of these fields; one that never holds anything is a text."""
    return {"type": "object", "properties": {name: fields[name] or _TEXT for name in sorted(fields)}}


def _merged(*tables: Row) -> dict[str, Any]:
    """Fields with their schemas, of several rows or domains."""
    found: dict[str, Any] = {}
    for name, kind in itertools.chain(*(table.items() for table in tables)):
        found[name] = _either(found.get(name, {}), kind)
    return found


def _kind_of(value: Any) -> dict[str, Any]:
    """A value's schema; of what is empty nothing is known, and it is {}."""
    if value in (None, "", []):
        return {}
    if isinstance(value, list):
        return {"type": "array", "items": functools.reduce(_either, map(_kind_of, value))}
    return {"type": {str: "string", dict: "object", bool: "boolean"}.get(type(value), "number")}


def _either(one: Row, other: Row) -> dict[str, Any]:
    """The schema of what is of one or of the other."""
    if not one or not other or one == other:
        return dict(one or other)
    if one["type"] == other["type"] == "array":
        return {"type": "array", "items": _either(one["items"], other["items"])}
    types = [of["type"] if isinstance(of["type"], list) else [of["type"]] for of in (one, other)]
    return {"type": sorted({*types[0], *types[1]})}


def _entities(row: Row, text: str, where: str) -> list[tuple[str, int, str]]:
    """(type, start, text) of each entity, or slot."""
    column = next((name for name in ("entities", "slots") if name in row), None)
    if column is None:
        raise InputError(f"{where}: an extractor's row should have 'target', 'entities' or 'slots'")
    entities = columns.take(row, column, _ENTITIES, "a list of entities with 'type', 'start' and 'text'", where)
    found = [(entity.type, entity.start, entity.text) for entity in entities]
    missing = next(((kind, span) for kind, _, span in found if span not in text), None)
    if missing is not None:
        raise InputError(f"{where}: the {missing[0]} '{missing[1][:60]}' is not in the text")
    return found


def _check_valid(values: Row, schema: Row, where: str) -> None:
    """An expert whose answer the verifier would refuse teaches nothing."""
    from referencing.exceptions import Unresolvable

    try:
        error = next(_validator(json.dumps(schema, default=str)).iter_errors(values), None)
    except Unresolvable as unresolved:
        raise InputError(f"{where}: 'schema' refers to '{unresolved.ref}', which is not in it") from None
    if error is not None:
        raise InputError(f"{where}: the answer is not valid by its schema: {error.json_path}: {error.message[:200]}")


def _as_json(target: Row, where: str) -> dict[str, Any]:
    """As JSON has it: Parquet has dates and decimals, too."""

    def plain(value: Any) -> Any:
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, decimal.Decimal):
            return float(value)
        raise TypeError(f"{type(value).__name__} is no JSON")

    try:
        return read_json(json.dumps(target, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: column 'target' should be a JSON object: {error}") from None


def _without_padding(value: Any, schema: Any, whole: Row, null_is_missing: bool) -> Any:
    """The value with null in fields that are required only: elsewhere it is padding of rows with different fields.

    If `null_is_missing`, as in Parquet, required fields that are missing and may be null are null.
    """
    kinds = alternatives(schema, whole)
    if isinstance(value, list):
        items = {"anyOf": [of["items"] for of in kinds if "items" in of]}
        return [_without_padding(item, items, whole, null_is_missing) for item in value]
    if not isinstance(value, dict):
        return value
    of_objects = [of for of in kinds if "properties" in of]
    required = set.intersection(*(set(of.get("required", ())) for of in of_objects)) if of_objects else set()
    fields_of = {
        name: {"anyOf": [of["properties"][name] for of in of_objects if name in of["properties"]]}
        for name in {*value, *required}
    }
    missing = sorted(required - value.keys()) if null_is_missing else ()
    filled = {name: None for name in missing if _may_be_null(fields_of[name], whole)}
    kept = {name: of for name, of in value.items() if of is not None or name in required}
    return {name: _without_padding(of, fields_of[name], whole, null_is_missing) for name, of in kept.items()} | filled


def _may_be_null(schema: Any, whole: Row) -> bool:
    for of in alternatives(schema, whole):
        types = of.get("type", [])
        if "null" in ([types] if isinstance(types, str) else types) or None in of.get("enum", ()):
            return True
    return False


def _short(schema: Row) -> dict[str, Any]:
    """A JSON Schema's fields as the model is shown them: a type, or a list of several; an array as a list of what its
    items are; an object by its fields; what is one of some values by these."""
    shown = 0

    def kind(field: Any, above: tuple[Row, ...]) -> Any:
        nonlocal shown
        shown += 1
        kinds: list[Any] = []
        for of in alternatives(field, schema):
            found = kind_of(of, above)
            kinds += [found] if found not in kinds else []
        return kinds[0] if len(kinds) == 1 else kinds

    def kind_of(field: Row, above: tuple[Row, ...]) -> Any:
        if "enum" in field or "const" in field:
            return {"enum": field.get("enum", [field.get("const")])}
        types = field.get("type", "object" if "properties" in field else "string")
        repeated = any(field is one for one in above)
        if repeated or shown > _MOST_SHOWN or len(above) > _DEEPEST_SHOWN:
            return types
        if types == "array" or "array" in types:
            return [kind(field.get("items", {}), (*above, field))]
        if types == "object" and field.get("properties"):
            return {name: kind(of, (*above, field)) for name, of in field["properties"].items()}
        return types

    return {name: kind(field, ()) for name, field in schema["properties"].items()}


def _fields(row: Row, schema: Row, text: str, where: str, null_is_missing: bool) -> dict[str, Any]:
    """Each field that has a value, or has to be there, in the order of the text."""
    values: dict[str, Any] = {}
    if isinstance(row.get("target"), dict):
        required, target = schema.get("required", ()), _as_json(row["target"], where)
        target = _without_padding(target, schema, schema, null_is_missing)
        values = {of: value for of, value in target.items() if value not in (None, "", []) or of in required}
    else:
        for kind, _, span in sorted(_entities(row, text, where), key=lambda entity: entity[1]):
            values.setdefault(kind, []).append(span)
    unknown = next((name for name in values if name not in schema["properties"]), None)
    if unknown is not None:
        raise InputError(f"{where}: field '{unknown}' is not in the schema: {', '.join(schema['properties'])}")
    _check_valid(values, schema, where)

    def place(value: Any) -> int:
        at = text.find(str(value[0] if isinstance(value, list) and value else value))
        return at if at >= 0 else len(text)

    return {name: values[name] for name in sorted(values, key=lambda name: place(values[name]))}


def as_lines(answer: Sequence[Any] | Mapping[str, Any]) -> list[str]:
    """An array or an object as JSON, an element or a field a line."""
    if isinstance(answer, Mapping):
        parts: Iterable[str] = (f"{_json(name)}: {_json(value)}" for name, value in answer.items())
        opening, closing = "{", "}"
    else:
        parts, opening, closing = map(_json, answer), "[", "]"
    lines = list(parts) or [""]
    lines = [f"{line}," for line in lines[:-1]] + [f"{lines[-1]}{closing}"]
    return [opening + lines[0], *lines[1:]]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
