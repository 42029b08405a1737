"""JSON Schemas as grammars that vLLM holds an answer to. Runs in the sandbox: a schema decides how long it takes.

A pattern's repetitions cost time when the schema becomes a grammar; which tokens each place of the grammar allows is
found when it is compiled, for the model's own tokenizer. vLLM compiles it again, which takes as long: what is compiled
here in time holds vLLM up no longer than that.
"""

from __future__ import annotations

import functools

import xgrammar  # torch comes with it: it is imported before a job's deadline begins

_LARGEST = 256_000  # characters of a grammar; vLLM parses it in the replica's event loop


def of_schema(schema: str, tokenizer: str) -> str:
    """Return the grammar of a JSON Schema in EBNF. `tokenizer` is xgrammar's serialized TokenizerInfo.

    Answers have the form in which the types write them: line breaks, no endless white space, and fields in the order of
    the text if none is required. (In any order a grammar cannot make each of some fields come once.) Raises ValueError
    if no grammar can hold an answer to the schema, or if the grammar is too large.
    """
    try:
        any_order = '"required"' not in schema
        text = str(xgrammar.Grammar.from_json_schema(schema, any_order=any_order, max_whitespace_cnt=2))
        if len(text) > _LARGEST:
            raise ValueError(f"its grammar has {len(text):,} characters; {_LARGEST:,} are the most")
        _compiler(tokenizer).compile_grammar(text)  # the text, as vLLM does
        return text
    except RuntimeError as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(first.rpartition(": ")[2][:200] or "the schema is not supported") from None


@functools.lru_cache(maxsize=1)
def _compiler(tokenizer: str) -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
