"""Conversations in tokens, by a model's own chat template. Imports no torch.

Templates differ in what they take: some refuse a system message or leave it out, some open or close a thought at the
beginning of the answer. Texts of users may hold the model's control tokens as plain text; they stay text.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srl_rlvr.errors import InputError

Message = Mapping[str, Any]

_OPEN, _CLOSE = "<think>", "</think>"
_NONCE = secrets.token_hex(8)  # nobody who writes a text can guess what stands for a control token
_MASK = re.compile(f"\ue000{_NONCE}([0-9]+)\ue001")
_PROBE = ("systemprobe", "userprobe")


def prompt_ids(tokenizer: Any, messages: Sequence[Message], think: bool) -> list[int]:
    """Return the tokens of a conversation up to the beginning of the assistant's answer.

    A control token that is written in a message is tokenized as text. Raises InputError if the template refuses the
    conversation.
    """
    controls = _controls(tokenizer, _template(tokenizer))
    if not any(controls.found_in(text) for message in messages for text in _texts(message)):
        return list(tokenizer(render(tokenizer, messages, think), add_special_tokens=False)["input_ids"])
    masked = [_with_texts(message, controls.mask) for message in messages]
    return controls.encode_rendered(render(tokenizer, masked, think))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens around it; a control token written in it stays text."""
    controls = _controls(tokenizer, _template(tokenizer))
    if controls.found_in(text):
        return controls.encode_text(text)
    return list(tokenizer.encode(text, add_special_tokens=False))


def control_token_in(tokenizer: Any, text: str) -> str:
    """Return the first control token of the model that the text has in it, or ""."""
    found = _controls(tokenizer, _template(tokenizer)).pattern.search(text)
    return found[0] if found else ""


def unused_tokens(tokenizer: Any) -> set[str]:
    """Return the special tokens that stand in no prompt: they have no role, and the template does not write them.

    `tokenizer` may be a processor. Raises InputError if the template cannot be asked a question.
    """
    plain, template = getattr(tokenizer, "tokenizer", tokenizer), _template(tokenizer)
    messages = _probe(tokenizer, "system" if "system" in _roles(tokenizer, template) else "")
    prompts = [_apply(tokenizer, messages, think) for think in (False, True)]
    roles = {token for token in plain.special_tokens_map.values() if isinstance(token, str)}
    special = {str(token) for token in plain.added_tokens_decoder.values() if token.special}
    return {token for token in special - roles if not any(token in prompt for prompt in prompts)}


def render(tokenizer: Any, messages: Sequence[Message], think: bool) -> str:
    """Return a conversation as text, up to the beginning of the assistant's answer. `tokenizer` may be a processor.

    The policy writes its thoughts itself: under `think` a thought that the template opens (or an empty one) is left
    out of the prompt; without it a thought that the template opens is closed. Raises InputError if the template
    refuses the conversation, or begins the answer in the middle of a thought.
    """
    _check_beginning(tokenizer, _template(tokenizer), think)
    return _begun(_apply(tokenizer, _adapted(tokenizer, messages), think), think)


def template_options(think: bool) -> dict[str, Any]:
    """Return the variables by which templates are told whether to think."""
    return {"enable_thinking": think, "thinking": think}


def adapted_messages(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Return the conversation as the model's chat template takes it. `tokenizer` may be a processor.

    If the template refuses system messages (as Gemma's), or leaves them out, the system's text stands before the
    question in the first user's turn. A developer's message is the system's if the template knows no such role.
    Raises InputError if the template refuses the conversation.
    """
    found = _adapted(tokenizer, messages)
    _apply(tokenizer, found, False)
    return found


def check_template(tokenizer: Any, model: Any) -> None:
    """Raise InputError if there is no chat template, or none that can be told a question. It may be a processor."""
    template = tokenizer.chat_template
    if template is None:
        raise InputError(
            f"model '{model}': its tokenizer has no chat template; use an instruct model, or add chat_template.jinja"
        )
    if isinstance(template, dict) and "default" not in template:
        raise InputError(
            f"model '{model}': it has several chat templates ({', '.join(sorted(template))}), and none is called "
            "'default'; name one so in tokenizer_config.json"
        )
    try:
        _roles(tokenizer, _template(tokenizer))
    except InputError as error:
        raise InputError(f"model '{model}': {error}") from None


@dataclass(frozen=True)
class _Controls:
    """The control tokens of a model, and how a text is tokenized in which they stay text."""

    tokenizer: Any
    texts: tuple[str, ...]

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.texts, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def found_in(self, text: str) -> bool:
        return self.pattern.search(text) is not None

    def mask(self, text: str) -> str:
        return self.pattern.sub(lambda found: f"\ue000{_NONCE}{self.texts.index(found[0])}\ue001", text)

    def encode_text(self, text: str) -> list[int]:
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        encode, original = self._renamed
        tokens: list[int] = encode(text)
        return [original.get(token, token) for token in tokens]

    def encode_rendered(self, text: str) -> list[int]:
        """`text` is a template's, with masks in what users wrote: all control tokens in it are the template's own."""
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            ids: list[int] = []
            for part in re.split(f"({self.pattern.pattern})", text):
                own = part in self.texts
                written = _MASK.sub(lambda found: self.texts[int(found[1])], part)
                ids += [self.tokenizer.convert_tokens_to_ids(part)] if own else self.encode_text(written)
            return ids
        renamed = self.pattern.sub(lambda found: _alias(self.texts.index(found[0])), text)
        return self.encode_text(_MASK.sub(lambda found: self.texts[int(found[1])], renamed))

    @functools.cached_property
    def _renamed(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer that knows the control tokens under other names; which id of it stands for which."""
        from tokenizers import Tokenizer

        tree = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {text: _alias(number) for number, text in enumerate(self.texts)}
        ids = {}
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
            ids[token["content"]] = token["id"]
        tree |= {"post_processor": None, "truncation": None, "padding": None}
        copy = Tokenizer.from_str(json.dumps(tree))
        original: dict[int, int] = {}
        for name, own in ids.items():
            found: Any = copy.token_to_id(name)
            original[found] = own
        return lambda text: copy.encode(text, add_special_tokens=False).ids, original


@functools.lru_cache(maxsize=16)
def _controls(tokenizer: Any, template: str) -> _Controls:
    """The special tokens, and other added tokens by which the template marks turns."""
    texts = set()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    written = _written(tokenizer) if added and template else ""
    for token in added.values():
        text = str(token)
        is_mark = bool(re.fullmatch(r"\W.*\W", text)) and text in written
        if text.strip() and text not in (_OPEN, _CLOSE) and (token.special or is_mark):
            texts.add(text)
    return _Controls(tokenizer, tuple(sorted(texts)))


def _written(tokenizer: Any) -> str:
    """What the template writes of one question, and of two."""
    asked = {"role": "user", "content": "a"}
    found = []
    for messages in ([asked], [asked, {"role": "assistant", "content": "a"}, asked]):
        with contextlib.suppress(InputError):
            found.append(_apply(tokenizer, messages, False))
    return " ".join(found)


def _adapted(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    roles = _roles(tokenizer, _template(tokenizer))
    found = [{**m, "role": "system"} if m["role"] == "developer" and "developer" not in roles else m for m in messages]
    if "system" in roles:
        return found
    told = list(itertools.takewhile(lambda message: message["role"] == "system", found))
    rest = found[len(told) :]
    if told and rest and rest[0]["role"] == "user":
        return [_joined([*told, rest[0]]), *rest[1:]]
    return [{**_joined(told), "role": "user"}, *rest] if told else rest


def _begun(text: str, think: bool) -> str:
    """The prompt with the beginning of the answer that `render` promises."""
    end = text.rstrip()
    closed = end.endswith(_CLOSE)
    before = end.removesuffix(_CLOSE)
    opened = before.rstrip().endswith(_OPEN)
    if think and opened:
        return before.rstrip().removesuffix(_OPEN)
    if think and closed:
        return before
    return f"{end}\n\n{_CLOSE}\n\n" if opened and not closed else text


@functools.lru_cache(maxsize=16)
def _check_beginning(tokenizer: Any, template: str, think: bool) -> None:
    """Raise InputError if the prompt and the natural form of an answer do not make what rewards expect."""
    plain = getattr(tokenizer, "tokenizer", tokenizer)
    for tag in (_OPEN, _CLOSE) if think else ():
        tokens = plain.encode(tag, add_special_tokens=False)
        if tag in plain.decode(tokens) and tag not in plain.decode(tokens, skip_special_tokens=True):
            raise InputError(
                f"the model's tokenizer has {tag} as a special token, which texts of answers do not keep: give it "
                "'special': false in tokenizer.json and tokenizer_config.json, or set think = false"
            )
    messages = _probe(tokenizer, "system" if "system" in _roles(tokenizer, template) else "")
    begun = _begun(_apply(tokenizer, messages, think), think).rpartition(_PROBE[1])[2]
    if begun.rfind(_OPEN) > begun.rfind(_CLOSE):
        raise InputError(
            f"the model's chat template begins an answer with {begun[begun.rfind(_OPEN) :][:60]!r}: let it end with "
            f"{_OPEN}, or leave thoughts to the model; change chat_template.jinja"
        )


@functools.lru_cache(maxsize=16)
def _roles(tokenizer: Any, template: str) -> frozenset[str]:
    """Those of system and developer whose messages stand in what the template writes."""
    told, asked = _PROBE
    found: set[str] = set()
    refusal = InputError("the model's chat template leaves the question out")
    for role in ("system", "developer", ""):
        try:
            text = _apply(tokenizer, _probe(tokenizer, role), False)
        except InputError as error:
            refusal = error
            continue
        if asked in text and (told in text or not role):
            found.add(role)
    if not found:
        raise refusal
    return frozenset(found)


def _probe(tokenizer: Any, role: str) -> list[Message]:
    """A question, after a message of `role` if one is given."""
    told, asked = _PROBE
    pairs = [(name, text) for name, text in ((role, told), ("user", asked)) if name]
    if hasattr(tokenizer, "image_processor"):
        return [{"role": name, "content": [{"type": "text", "text": text}]} for name, text in pairs]
    return [{"role": name, "content": text} for name, text in pairs]


def _apply(tokenizer: Any, messages: Sequence[Message], think: bool) -> str:
    from jinja2 import TemplateError

    options = template_options(think)
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # a template is a program of the model's author
        said = " ".join(str(error).split())[:200]
        raise InputError(f"the model's chat template refuses the conversation: {said}") from None


def _template(tokenizer: Any) -> str:
    """What the answers of this module that are kept depend on beside the tokenizer; "" without a template."""
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else json.dumps(template) if template else ""


def _alias(number: int) -> str:
    return f"\ue002{_NONCE}{number}\ue003"


def _texts(message: Message) -> list[str]:
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part.get("type") == "text"]


def _with_texts(message: Message, change: Any) -> Message:
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {**message, "content": [{**p, "text": change(p["text"])} if p.get("type") == "text" else p for p in content]}


def _joined(messages: Sequence[Message]) -> Message:
    """One message, the last's, with the texts of the others before it."""
    *before, last = messages
    told = "\n\n".join(text for message in before for text in _texts(message))
    if not before:
        return last
    content = last.get("content") or ""
    if isinstance(content, str):
        return {**last, "content": f"{told}\n\n{content}"}
    return {**last, "content": [{"type": "text", "text": f"{told}\n\n"}, *content]}
