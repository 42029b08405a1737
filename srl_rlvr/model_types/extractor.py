"""The extractor: the fields of a JSON Schema and a text in, JSON out, a field a line, in the order of the text."""

from srl_rlvr.model_types.kinds.text import StructuredType

TYPE = StructuredType(
    name="extractor",
    metric="f1",
    instruction="Read these fields from the text. Answer with a JSON object, one field a line, in the order of the "
    "text; leave out what the text does not have.",
)
