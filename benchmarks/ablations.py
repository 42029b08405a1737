"""What each setting of the stages is worth: one change at a time to one cell of the paper table.

    python benchmarks/ablations.py            every change that has no score yet, then the table
    python benchmarks/ablations.py --quick    two changes of a few updates: it works
    python benchmarks/ablations.py --table    only the table, of the scores that are there

The cell is SRL with the expert in its group, then RLVR, on 64 demonstrations of number_sorting from the small base;
runs and scores are kept with those of `paper_table.py`.
`autojunk` is no row: it is off by the definition of the reward, and on it changes nothing below 200 characters.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import paper_table as table
from _machine import tell
from paper_table import Cell

SEEDS = 1
SRL, RLVR = "stages.guided.", "stages.rlvr."


def both(change: str) -> str:
    return f"{SRL}{change} {RLVR}{change}"


LORA_RATES = f"{SRL}learning_rate=2e-3 {RLVR}learning_rate=5e-4"
CHANGES = {  # of the run file's keys
    "as in the table": "",
    "similarity over words": f"{SRL}measure=words",
    "similarity over tokens": f"{SRL}measure=tokens",
    "actions of two lines": f"{SRL}lines_per_action=2 {SRL}max_tokens=64",
    "the whole solution as one action": f"{SRL}lines_per_action=0 {SRL}max_tokens=150",
    "without the expert in the group": f"{SRL}expert_in_group=false",
    "with thinking, without the expert": f"think=true {SRL}expert_in_group=false {SRL}max_tokens=64",
    "groups of 8, half as many": f"{SRL}group_size=8 {SRL}prompts_per_step=16",
    "advantage r - mean (dr_grpo)": both("advantage=dr_grpo"),
    "advantage leave-one-out (rloo)": both("advantage=rloo"),
    "no refills (dynamic sampling off)": both("max_refills=0"),
    "KL 0.01": both("kl=0.01"),
    "LoRA of rank 8, five times the rates": f"model.lora_rank=8 {LORA_RATES}",
    "LoRA of rank 64, five times the rates": f"model.lora_rank=64 {LORA_RATES}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    place = table.QUICK if options.quick else table.FULL
    cells = [cell(changes, seed) for seed in range(options.seeds) for changes in CHANGES.values()]
    if options.cell:
        table.run(next(cell for cell in cells if cell.name == options.cell), place)
        return
    if options.quick:
        cells = cells[:2]
    if not options.table:
        table.begin_anew(place, options.quick)
        done = table.read_scores(place)
        table.in_processes(__file__, [cell for cell in cells if cell not in done], place, options)
    found = table.read_scores(place)
    rows = {name: {c.seed: found[c] for c in cells if c in found and c.changes == of} for name, of in CHANGES.items()}
    table.print_table({name: list(scores.values()) for name, scores in rows.items() if scores})
    tell("ablations", print_gains(rows), whole=not options.quick and options.seeds == SEEDS)


def print_gains(rows: dict[str, dict[int, Any]]) -> dict[str, float | None]:
    """Print each change's gain over the table's cell in points (95 %), paired by problem and by common seeds.
    Return the means of the changes that have run."""
    print()
    first = next(iter(rows.values()))
    gains: dict[str, float | None] = dict.fromkeys(list(rows)[1:])
    for name, scores in list(rows.items())[1:]:
        seeds = sorted(first.keys() & scores.keys())
        if seeds:
            here, there = (np.array([of[seed]["here"]["greedy"] for seed in seeds], float) for of in (scores, first))
            gain = 100 * (here - there)
            low, high = table.interval(gain)
            gains[name] = round(float(gain.mean()), 2)
            print(f"{name:<36}{gain.mean():+6.1f} ({low:+.1f} to {high:+.1f}), seeds: {len(seeds)}")
    return gains


def cell(changes: str, seed: int) -> Cell:
    return Cell("number_sorting", 64, "guided-srl-rlvr", seed, changes)


if __name__ == "__main__":
    main()
