"""The SRL parser: a sentence in, its ordered frames out: a JSON array, a frame a line, each with its predicate and the
spans of its roles."""

from srl_rlvr.model_types.kinds.text import StructuredType

TYPE = StructuredType(
    name="srl_parser",
    metric="f1",
    instruction="Write the frames of the sentence as a JSON array, one frame a line: its predicate, then the text of "
    "each of its roles, in the order of the sentence.",
    verifier="frames",
    parts=("predicate", "role"),
)
