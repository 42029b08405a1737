"""A small honest base model, made in minutes: pretrained on the single moves of generated families.

It is to stand before problems of several steps as a large model stands before competition problems: it can move, and
cannot chain. How near it comes to that is in docs/learning.md. Its pretraining text:

- *openings*: a problem in the chat form, given, and the first line of its solution, predicted; short problems first;
- *moves*: a problem and one line of its solution, given, and the next line, predicted;
- *rewritings*: the lines of a solution without its problem, given, and the line that gathers them, predicted; or that
  line, given, and the answer, predicted;
- *echoes*: a problem in the chat form and a piece of it again, whose end is predicted: what comes after what;
- *sheets*: lines of solutions in the order of chance, no two of one problem, then an answer line and the end.

The others come when openings have taught it to look at the problem: with sheets from the start it does not learn that.
Without echoes neither SFT nor SRL learned any chain from 64 solutions, and without rewritings 16 solutions did not
teach the last two lines (docs/learning.md).

No text predicts more than one line of one solution, so that whatever chains moves was learned in training afterwards.

With `think` a thought stands before each line that is predicted: how that line is worked out, which the expert does not
write (`Family.thought`). The line that is given has its thought in half of the texts. A chain of sums has no line that
gathers the others: its rewritings are a problem and its last line, given, and the answer.

A Llama of 4 million parameters; its tokenizer writes each digit, and each line break, as one token.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from srl_rlvr import records
from srl_rlvr.errors import InputError
from srl_rlvr.examples import generated
from srl_rlvr.examples.families import FAMILIES as all_families
from srl_rlvr.model_types import Solution, task_llm
from srl_rlvr.policies.losses import UpdateSpec
from srl_rlvr.seeds import derived_seed
from srl_rlvr.verifiers.similarity import CLOSE, OPEN

FAMILIES: dict[str, dict[str, Any]] = {  # with the params that its problems are drawn with
    "number_filtering": {"min_numbers": 2, "max_numbers": 7, "min_decimals": 0, "max_decimals": 0},
    "number_sorting": {"min_numbers": 3, "max_numbers": 7, "max_decimals": 0, "min_value": -9, "max_value": 9},
    "word_sorting": {"min_words": 3, "max_words": 7, "max_word_length": 4},
}
THINKING_FAMILIES: dict[str, dict[str, Any]] = {  # whose steps have thoughts
    "basic_arithmetic": {
        "min_terms": 2,
        "max_terms": 5,
        "min_digits": 1,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
    "rewritten_sums": {"min_terms": 2, "max_terms": 7, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 2, "max_animals": 5, "min_instances": 1, "max_instances": 9},
}
VOCABULARY = 512
END = "<|im_end|>"
_SPECIAL = [END, "<|im_start|>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_OF_SIXTEEN = {  # texts: openings, moves, rewritings, echoes, sheets
    False: (4, 6, 4, 1, 1),
    True: (6, 6, 2, 1, 1),
}
_LONGEST_SHEET = 8
_ECHO_GIVEN, _ECHO_PREDICTED = 4, 20  # tokens at most
_FOR_TOKENIZER = 2_000  # problems of each family
_ONLY_OPENINGS_UNTIL = 0.15  # of all updates
_ALL_LENGTHS_AFTER = 0.4  # of all updates


def build(
    folder: Path,
    *,
    families: Mapping[str, dict[str, Any]] = FAMILIES,
    think: bool = False,
    seed: int = 0,
    updates: int = 2_400,
    texts_per_update: int = 32,
    problems: int = 10_000,
    learning_rate: float = 1e-3,
    observe: Callable[[int, dict[str, float]], None] = lambda update, metrics: None,
) -> None:
    """Write the pretrained model, its tokenizer and its card to `folder`, in Hugging Face layout.

    `problems` are drawn of each family. The same seed gives the same model on the same machine. `observe` is told each
    update's metrics. Raises InputError where a family or a param is not known, a family has no thoughts for `think`, or
    there are fewer problems.
    """
    from srl_rlvr.policies import base_models
    from srl_rlvr.policies.text import TextPolicy

    for name in families:
        if think and name in all_families and all_families[name].thought is None:
            able = ", ".join(name for name, family in all_families.items() if family.thought)
            raise InputError(f"family '{name}' has no thoughts, which think asks for; {able} have")
    rows = {
        name: generated.generate(name, problems, derived_seed("base", name, seed), params).to_pylist()
        for name, params in families.items()
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = train_tokenizer([row for of_family in rows.values() for row in of_family[:_FOR_TOKENIZER]], think)
    tokenizer.save_pretrained(partial)
    random_model(tokenizer, seed).save_pretrained(partial)
    policy = TextPolicy(partial, weight_decay=0.01, seed=seed)
    texts = Texts(list(rows.values()), tokenizer, seed, think)
    for update in range(updates):
        batch = as_samples(texts.batch(texts_per_update, update / updates))
        rate = learning_rate * _schedule(update, updates)
        observe(update, policy.update(batch, UpdateSpec("cross_entropy", rate)))
    card = {
        "model_type": task_llm.TYPE.name,
        "base": "none",
        "families": dict(families),
        "think": think,
        "seed": seed,
        "updates": updates,
    }
    policy.save_model(partial, card)
    base_models.load_model(partial).bfloat16().save_pretrained(partial)  # half the size
    partial.rename(folder)


def train_tokenizer(problems: Sequence[dict[str, Any]], think: bool = False) -> Any:
    """Of the problems' language."""
    texts = []
    for row in problems:
        lines = task_llm.TYPE.lines(row)
        texts += [row["prompt"], *(thought_before(row, line) + line if think else line for line in lines)]
    return tokenizer_of([task_llm.TYPE.system(think), *texts])


def thought_before(row: Mapping[str, Any], line: str) -> str:
    """How this line of the expert's is worked out, in tags; nothing before the answer."""
    of_family = all_families[row["task"]].thought
    return f"{OPEN}{of_family(line) if of_family else ''}{CLOSE}"


def tokenizer_of(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE over the texts, with the chat form; digits and line breaks stand alone."""
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
    first, *others = texts
    tokenizer.train_from_iterator([first, "system\nuser\nassistant\n", *others], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, additional_special_tokens=_SPECIAL[1:]
    )
    fast.chat_template = _TEMPLATE
    return fast


class Texts:
    """What is learned from: (given, to be predicted) token sequences, drawn from problems by family."""

    def __init__(self, families: Sequence[Sequence[dict[str, Any]]], tokenizer: Any, seed: int, think: bool = False):
        self._families = [sorted(rows, key=lambda row: len(row["prompt"])) for rows in families]
        self._tokenizer = tokenizer
        self._think = think
        self._draw = random.Random(f"base:{seed}")

    def batch(self, count: int, progress: float) -> list[tuple[list[int], list[int]]]:
        """The texts of one update; `progress` in [0, 1) says how far the pretraining is."""
        # Shorter problems come first, and first again when the other texts begin.
        if progress < _ONLY_OPENINGS_UNTIL:
            lengths = min(1.0, 0.1 + 4 * progress)
            return [self._opening(lengths) for _ in range(count)]
        others = (progress - _ONLY_OPENINGS_UNTIL) / (_ALL_LENGTHS_AFTER - _ONLY_OPENINGS_UNTIL)
        lengths = min(1.0, 0.3 + 0.7 * others)
        openings, moves, rewritings, echoes, sheets = (count * part // 16 for part in _OF_SIXTEEN[self._think])
        return (
            [self._opening(lengths) for _ in range(openings)]
            + [self._move(lengths) for _ in range(moves)]
            + [self._rewriting(lengths) for _ in range(rewritings)]
            + [self._echo() for _ in range(echoes)]
            + [self._sheet() for _ in range(sheets)]
        )

    def _solution(self, lengths: float) -> tuple[Solution, list[list[int]]]:
        """Of a problem among the shorter ones, and its lines as they are predicted. `lengths` is the share of the
        problems that is drawn from."""
        rows = self._draw.choice(self._families)
        row = rows[self._draw.randrange(math.ceil(lengths * len(rows)))]
        solution = task_llm.TYPE.encode_solution(self._tokenizer, row, self._think)
        thoughts = [self._thought(row, line) for line in task_llm.TYPE.lines(row)]
        return solution, [self._encode(thought) + step for thought, step in zip(thoughts, solution.steps, strict=True)]

    def _thought(self, row: dict[str, Any], line: str) -> str:
        return thought_before(row, line) if self._think else ""

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _seen(self, solution: Solution, lines: list[list[int]]) -> list[list[int]]:
        """Lines of which one is given: under `think` with their thoughts in half of the texts."""
        return self._draw.choice((solution.steps, lines)) if self._think else lines

    def _opening(self, lengths: float) -> tuple[list[int], list[int]]:
        solution, lines = self._solution(lengths)
        return solution.prompt, lines[0]

    def _move(self, lengths: float) -> tuple[list[int], list[int]]:
        solution, lines = self._solution(lengths)
        k = self._draw.randrange(1, max(2, len(lines) - 1))
        return solution.prompt + self._seen(solution, lines)[k - 1], lines[k]

    def _rewriting(self, lengths: float) -> tuple[list[int], list[int]]:
        solution, lines = self._solution(lengths)
        if self._think:
            return solution.prompt + self._seen(solution, lines)[-2], lines[-1]
        *before, last, answer = lines
        gathers = self._draw.choice((False, True, True))
        given = [token for line in before for token in line] if gathers else last
        return [self._tokenizer.eos_token_id, *given], last if gathers else answer

    def _echo(self) -> tuple[list[int], list[int]]:
        row = self._draw.choice(self._draw.choice(self._families))
        tokens = self._encode(row["prompt"])
        start = self._draw.randrange(len(tokens) - 1)
        given = min(start + self._draw.randint(1, _ECHO_GIVEN), len(tokens) - 1)
        prompt = task_llm.TYPE.encode_prompt(self._tokenizer, row, self._think)
        return prompt + tokens[start:given], tokens[given : given + _ECHO_PREDICTED]

    def _sheet(self) -> tuple[list[int], list[int]]:
        """One line of each of a few problems, but of the last its answer, which ends the sheet."""
        *others, last = self._draw.sample(self._draw.choice(self._families), 1 + self._draw.randint(1, _LONGEST_SHEET))
        drawn = [(row, self._draw.choice(row["steps"])) for row in others]
        lines = [f"{self._thought(row, step)}{step}\n" for row, step in drawn]
        answer = task_llm.TYPE.lines(last)[-1]
        lines.append(f"{self._thought(last, answer)}{answer}")
        tokens = [token for line in lines for token in self._encode(line)]
        end = self._tokenizer.eos_token_id
        return [end], [*tokens, end]


def as_samples(batch: Sequence[tuple[list[int], list[int]]]) -> pa.Table:
    """A Sample table of (given, to be predicted) token sequences."""
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


def random_model(tokenizer: Any, seed: int) -> Any:
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
            initializer_range=1 / 16,  # 1 / sqrt(hidden_size); with the usual 0.02 copying comes several times later
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
