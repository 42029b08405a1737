"""A small honest base model, made in minutes: pretrained on the single moves of generated families.

It is to stand before problems of several steps as a large model stands before competition problems: it can move, and
cannot chain. How near it comes to that is in docs/results.md. Its pretraining text:

- *openings*: a problem in the chat form, and the first line of its solution, no more;
- *sheets*: lines of solutions in the order of chance, no two of one problem, then an answer line and the end.

No text holds two lines of one solution, so that whatever chains moves was learned in training afterwards.
A Llama of 4 million parameters; its tokenizer writes each digit, and each line break, as one token.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.examples import generated
from srl_rlvr.model_types import task_llm
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.seeds import derived_seed

FAMILIES = ("sums", "number_sorting", "leg_counting")
VOCABULARY = 512
END = "<|im_end|>"
_SPECIAL = [END, "<|im_start|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LONGEST_SHEET = 8
_PROBLEMS = 20_000  # of each family, at most


def build(
    folder: Path,
    *,
    families: Sequence[str] = FAMILIES,
    seed: int = 0,
    updates: int = 1_500,
    texts_per_update: int = 64,
    learning_rate: float = 2e-3,
    observe: Callable[[int, dict[str, float]], None] = lambda update, metrics: None,
) -> None:
    """Write the pretrained model, its tokenizer and its card to `folder`, in Hugging Face layout.

    The same seed gives the same model on the same machine. `observe` is told each update's metrics.
    Raises InputError where a family is not known.
    """
    from srl_rlvr.policies.text import TextPolicy

    count = min(_PROBLEMS, texts_per_update * (updates + 1))
    problems = [
        row
        for name in families
        for row in generated.generate(name, count, derived_seed("base", name, seed)).to_pylist()
    ]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = train_tokenizer(problems)
    tokenizer.save_pretrained(partial)
    _random_model(tokenizer, seed).save_pretrained(partial)
    policy = TextPolicy(partial, tokens_per_microbatch=4096, weight_decay=0.01, seed=seed)
    stream = texts(problems, tokenizer, seed)
    for update in range(updates):
        batch = _as_samples([next(stream) for _ in range(texts_per_update)])
        rate = learning_rate * _schedule(update, updates)
        observe(update, policy.update(batch, UpdateSpec("cross_entropy", rate)))
    card = {"model_type": task_llm.NAME, "base": "none", "families": list(families), "seed": seed, "updates": updates}
    policy.save_model(partial, card)
    partial.rename(folder)


def train_tokenizer(problems: Sequence[dict[str, Any]], vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE over the problems' language; digits and line breaks stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r"\n|\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [text for row in problems for text in (row["prompt"], *row["steps"], f"Answer: {row['reference']}")]
    tokenizer.train_from_iterator([task_llm.INSTRUCTION, "system\nuser\nassistant\n", *lines], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=_SPECIAL[1:]
    )
    fast.chat_template = _TEMPLATE
    return fast


def texts(problems: Sequence[dict[str, Any]], tokenizer: Any, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (given, to be predicted) token sequences, an opening and a sheet in turn."""
    draw = random.Random(f"base:{seed}")
    by_family: dict[str, list[dict[str, Any]]] = {}
    for row in problems:
        by_family.setdefault(row["task"], []).append(row)
    families = list(by_family.values())
    header = _common_prefix([task_llm.encode_prompt(tokenizer, text, think=False) for text in ("A", "0")])
    while True:
        opening = task_llm.encode_solution(tokenizer, draw.choice(problems), think=False).trunk(1)
        yield opening[:header], opening[header:]
        yield (
            [tokenizer.eos_token_id],
            _sheet(draw.sample(draw.choice(families), 1 + draw.randint(1, _LONGEST_SHEET)), draw, tokenizer),
        )


def _sheet(problems: Sequence[dict[str, Any]], draw: random.Random, tokenizer: Any) -> list[int]:
    """One line of each problem (of one family) but the last, whose answer line ends the sheet."""
    *others, last = problems
    lines = [f"{draw.choice(problem['steps'])}\n" for problem in others] + [f"Answer: {last['reference']}"]
    return [token for line in lines for token in tokenizer.encode(line, add_special_tokens=False)] + [
        tokenizer.eos_token_id
    ]


def _common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with."""
    return next(i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1)


def _as_samples(batch: Sequence[tuple[list[int], list[int]]]) -> pa.Table:
    """What is given is computed once for all texts that begin with it."""
    rows = [
        {
            "prompt_id": str(index),
            "sample_index": 0,
            "trunk_id": str(given),
            "policy_version": 0,
            "prompt_ids": given,
            "completion_ids": predicted,
            "behavior_logprobs": [0.0] * len(predicted),
            "advantage": 1.0,
        }
        for index, (given, predicted) in enumerate(batch)
    ]
    return records.build("Sample", rows)


def _schedule(update: int, updates: int) -> float:
    """Linear warm-up over a fiftieth of the updates, then half a cosine to a tenth."""
    warm_up = max(1, updates // 50)
    if update < warm_up:
        return (update + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (update - warm_up) / max(1, updates - warm_up)))


def _random_model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
