"""What the small base of `paper_table.py` can do: the mean probability that it gives to the expert's line.

    python benchmarks/base_moves.py [--model DIR]     half a minute
    python benchmarks/base_moves.py --quick           two problems of each family

24 problems of each family that it was pretrained on, of four or five items, drawn with another seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _machine import tell
from paper_table import BASE, TASKS

PROBLEMS = 24


def main() -> None:
    from srl_rlvr import small_base
    from srl_rlvr.examples import generated
    from srl_rlvr.model_types import task_llm
    from srl_rlvr.policies import base_models
    from srl_rlvr.policies.text import TextPolicy
    from srl_rlvr.seeds import derived_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", type=Path, default=BASE)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    tokenizer, policy = base_models.load_tokenizer(options.model), TextPolicy(options.model)
    end, figures = tokenizer.eos_token_id, {}
    problems = 2 if options.quick else PROBLEMS
    for name in small_base.FAMILIES:
        task = TASKS[name]
        rows = generated.generate(task.family, problems, derived_seed("moves", name), task.params).to_pylist()
        texts: dict[str, list[tuple[list[int], list[int]]]] = {}
        for row in rows:
            solution = task_llm.TYPE.encode_solution(tokenizer, row, think=False)
            prompt, (*lines, last, _) = solution.prompt, solution.steps
            before = [token for line in lines for token in line]
            k = len(lines) // 2
            for kind, text in {
                "first line": (prompt, lines[0]),
                "next line, after the line before": (prompt + lines[k - 1], lines[k]),
                "next line, in place": (solution.trunk(k), lines[k]),
                "last line, in place": (prompt + before, last),
                "last line, without the problem": ([end, *before], last),
            }.items():
                texts.setdefault(kind, []).append(text)
        for kind, of_kind in texts.items():
            logprobs = policy.logprobs(small_base.as_samples(of_kind))
            mean = float(np.mean([np.exp(of_text.sum()) for of_text in logprobs]))
            figures[f"{name}: {kind}"] = round(mean, 3)
            print(f"{name:<18}{kind:<34}{mean:.2f}")
    tell("base_moves", figures, whole=not options.quick and options.model == BASE)


if __name__ == "__main__":
    main()
