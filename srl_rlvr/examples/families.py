"""What can be generated, and how our expert solves it: one `Family` for each, on top of reasoning-gym.

An expert is a pure function from a reasoning-gym item to steps; an item that it cannot solve gets none and is left
out. The last step ends in the answer, after its last `=` or `: ` (gsm_symbolic, whose solutions come from
reasoning-gym: as one of its numbers), so that a test can hold every expert to reasoning-gym's own scorer. A family
whose scorer runs the answer as code is not taken in.
This module must not know how items are drawn, hashed or stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from srl_rlvr.examples.steps import one_line_each, operations

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A data set of reasoning-gym with our default params and our expert."""

    dataset: str
    expert: Callable[[Item], list[str]]
    params: Mapping[str, Any] = field(default_factory=dict)
    thought: Callable[[str], str] | None = None  # how one of the expert's steps is worked out, which he does not write


# Instructions on form would contradict the model type's own, and two wordings of one problem would have two ids,
# one of which could be trained on and the other held out.
_REWRITES = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\s*Give (?:only [^.]*|the (?:result|answer)) as your final answer\.", ""),
        (r"^State the final answer to the following arithmetic problem: (.*) =$", r"Calculate \1."),
        (r"^(?:What is|Solve|Compute|Evaluate:) ([-+*/()\d\s]+)[.?]$", r"Calculate \1."),
        (r"^(?:Find the value of|Solve for|Determine the value of) (\w)\b[^:]*: (.*)$", r"Solve for \1: \2"),
        (r"\s*Please follow the instruction below:.*", r"\nWrite the answer as in ['-69', '-13', '1', '7']."),
        (r"^Your task is to (?:count|sort|convert) .*?\n\n", ""),
        (r"^Now, how", "How"),
        (r"^Your output should be a comma-separated list of words.*?\n\nNow, s", "S"),
        (r"\bNow, convert", "Convert"),
    )
]


def prompt(item: Item) -> str:
    """The item's question, without the instructions on form that the model type gives itself."""
    text = item["question"]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def sums(item: Item) -> list[str]:
    first, *rest = item["metadata"]["expression"].split()
    total, steps = Decimal(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        new = total + Decimal(term) if sign == "+" else total - Decimal(term)
        steps.append(f"{total} {sign} {term} = {new}")
        total = new
    return steps or [f"the sum: {total}"]


def basic_arithmetic(item: Item) -> list[str]:
    expression = item["metadata"]["expression"]
    # The oracle divides downward to whole numbers; `//` says so.
    return operations(expression.replace("/", "//")) or [f"the value: {expression}"]


def rewritten_sums(item: Item) -> list[str]:
    """The first two numbers become their sum, and what is left is written anew: each step needs only the one before."""
    expression = item["metadata"]["expression"]
    if not re.fullmatch(r"\d+( \+ \d+)*", expression):
        return []
    first, *rest = (int(term) for term in expression.split(" + "))
    steps = []
    while rest:
        total, left = first + rest[0], rest[1:]
        rewritten = f", left: {' + '.join(map(str, [total, *left]))}" if left else ""
        steps.append(f"{first} + {rest[0]} = {total}{rewritten}")
        first, rest = total, left
    return steps or [f"the value: {first}"]


def column_addition(step: str) -> str:
    """Of `a + b = c …`: digit by digit from the right, with what is carried. Of any other step nothing."""
    terms = re.match(r"(\d+) \+ (\d+) =", step)
    if not terms:
        return ""
    width = max(map(len, terms.groups()))
    carried, columns = 0, []
    for one, other in reversed(list(zip(*(term.zfill(width) for term in terms.groups()), strict=True))):
        total = int(one) + int(other) + carried
        columns.append(f"{one} + {other}{' + 1' if carried else ''} = {total}")
        carried = total // 10
    return ", ".join(columns)


def products(item: Item) -> list[str]:
    first, *rest = (int(term) for term in item["metadata"]["expression"].split(" * "))
    total, steps = first, []
    for factor in rest:
        sign, digits = -1 if factor < 0 else 1, str(abs(factor))
        values = [sign * int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
        running = 0
        for index, part in enumerate([value for value in values if value] or [0]):
            steps.append(f"{total} * {part} = {total * part}")
            if index:
                steps.append(f"{running} + {total * part} = {running + total * part}".replace("+ -", "- "))
            running += total * part
        total = running
    return steps or [f"the product: {total}"]


def _euclid(a: int, b: int) -> list[str]:
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return steps


def gcd(item: Item) -> list[str]:
    numbers = item["metadata"]["numbers"]
    steps, current = [], numbers[0]
    for number in numbers[1:]:
        steps += _euclid(current, number)
        current = math.gcd(current, number)
    return [*steps, f"gcd = {current}"]


def lcm(item: Item) -> list[str]:
    first, *rest = item["metadata"]["numbers"]
    steps, current = [], first
    for number in rest:
        divisor = math.gcd(current, number)
        steps += [*_euclid(current, number), f"gcd = {divisor}"]
        steps.append(f"lcm = {current} / {divisor} * {number} = {math.lcm(current, number)}")
        current = math.lcm(current, number)
    return steps or [f"lcm = {current}"]


def fraction_simplification(item: Item) -> list[str]:
    over, under = item["metadata"]["numerator"], item["metadata"]["denominator"]
    divisor = math.gcd(over, under)
    return [
        *_euclid(over, under),
        f"gcd = {divisor}",
        f"{over} / {divisor} = {over // divisor}",
        f"{under} / {divisor} = {under // divisor}",
        f"{over}/{under} = {over // divisor}/{under // divisor}",
    ]


def prime_factorization(item: Item) -> list[str]:
    number = rest = item["metadata"]["number"]
    factors, steps, divisor = [], [], 2
    while divisor * divisor <= rest:
        if rest % divisor:
            divisor += 1
            continue
        steps.append(f"{rest} / {divisor} = {rest // divisor}")
        factors.append(divisor)
        rest //= divisor
    steps.append(f"{rest} is prime")
    return [*steps, f"{number} = {' × '.join(map(str, [*factors, rest]))}"]


def base_conversion(item: Item) -> list[str]:
    source, target, digits = (item["metadata"][key] for key in ("source_base", "target_base", "source_repr"))
    if not digits:  # reasoning-gym writes zero as nothing in most bases
        return []
    steps, value = [], int(digits[0], 36)
    if source != 10:
        if digits[0].isalpha():
            steps.append(f"{digits[0]} = {value}")
        for digit in digits[1:]:
            new = value * source + int(digit, 36)
            steps.append(f"{value} * {source} + {int(digit, 36)} = {new}")
            value = new
    value = int(digits, source)
    if target == 10:
        return [*steps, f"in base 10: {value}"]
    remainders = ""
    while value or not remainders:
        value, digit = divmod(before := value, target)
        shown = "0123456789abcdefghijklmnopqrstuvwxyz"[digit]
        steps.append(f"{before} / {target} = {value} remainder {digit}" + (f" ({shown})" if digit > 9 else ""))
        remainders += shown
    return [*steps, f"remainders read backward: {remainders[::-1]}"]


def count_bits(item: Item) -> list[str]:
    value, ones, steps = item["metadata"]["number"], 0, []
    while value:
        ones += value % 2
        steps.append(f"{value} / 2 = {value // 2} remainder {value % 2}, ones = {ones}")
        value //= 2
    return steps or ["ones = 0"]


def simple_equations(item: Item) -> list[str]:
    name, (left, right) = item["metadata"]["variable"], item["metadata"]["equation"].split(" = ")
    factor = constant = 0
    for sign, digits, variable in re.findall(rf"([-+]?)(\d*)\*?({name}?)", left.replace(" ", "")):
        if digits or variable:
            number = int(f"{sign}{digits or 1}")
            factor, constant = (factor + number, constant) if variable else (factor, constant + number)
    shown = {1: name, -1: f"-{name}"}.get(factor, f"{factor}*{name}")
    steps, rest = [], int(right)
    if constant:
        sign = "-" if constant > 0 else "+"
        steps.append(f"{shown} = {rest} {sign} {abs(constant)} = {rest - constant}")
        rest -= constant
    return steps if factor == 1 and steps else [*steps, f"{name} = {rest} / {factor} = {rest // factor}"]


def leg_counting(item: Item) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, count in item["metadata"]["animals"].items():
        legs = count * ANIMALS[animal]
        total += legs
        steps.append(f"{animal}: {count} * {ANIMALS[animal]} = {legs}, total = {total}")
    return steps


def leg_total(step: str) -> str:
    """Of `animal: count * legs = product, total = total`: the product, and what it adds to the total before, digit by
    digit. Of any other step nothing."""
    found = re.match(r"[a-z ]+: (\d+ \* \d+ = (\d+)), total = (\d+)", step)
    if not found:
        return ""
    product, legs, total = found.groups()
    before = int(total) - int(legs)
    return f"{product}, {column_addition(f'{before} + {legs} =')}" if before else product


def letter_counting(item: Item) -> list[str]:
    letter, total, steps = item["metadata"]["target_letter"], 0, []
    for word in item["metadata"]["span"]:
        if count := word.lower().count(letter):
            total += count
            steps.append(f"{word} has {count}, total = {total}")
    return steps or ["total = 0"]


def number_sorting(item: Item) -> list[str]:
    falling = item["metadata"]["direction"] == "descending"
    ordered = sorted(item["metadata"]["original_numbers"], key=float, reverse=falling)
    return [*(f"{'largest' if falling else 'smallest'} left: {number}" for number in ordered), f"sorted: {ordered}"]


def word_sorting(item: Item) -> list[str]:
    ordered = sorted(item["metadata"]["transformed_words"], reverse=item["metadata"]["direction"] == "descending")
    return [*(f"next: {word}" for word in ordered), f"sorted: {', '.join(ordered)}"]


def number_filtering(item: Item) -> list[str]:
    numbers, bound = item["metadata"]["original_numbers"], item["metadata"]["filter_value"]
    action, side = item["metadata"]["operation"].split("_")
    written: dict[float, str] = {}  # equal numbers are written as the first of them is, as the oracle does
    kept, steps = [], []
    for number in numbers:
        value = float(number)
        matches = value > float(bound) if side == "larger" else value < float(bound)
        keep = matches == (action == "keep")
        relation = ">" if value > float(bound) else "<" if value < float(bound) else "="
        steps.append(f"{number} {relation} {bound}, {'keep' if keep else 'remove'}")
        written.setdefault(value, number)
        if keep:
            kept.append(written[value])
    return [*steps, f"the list: {kept}"]


def spell_backward(item: Item) -> list[str]:
    word = item["metadata"]["word"][::-1]
    return [f"{letter}: {word[: index + 1]}" for index, letter in enumerate(word)]


def gsm_symbolic(item: Item) -> list[str]:
    return one_line_each(item["metadata"]["answer_cot"].partition("####")[0].splitlines())


FAMILIES: dict[str, Family] = {
    "sums": Family("chain_sum", sums, {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 2}),
    "chain_sum": Family("chain_sum", sums),
    "decimal_chain_sum": Family("decimal_chain_sum", sums, {"max_digits": 2, "max_decimal_places": 2}),
    "basic_arithmetic": Family(
        "basic_arithmetic",
        basic_arithmetic,
        {"min_terms": 3, "max_digits": 1, "operators": ("+", "-", "*")},
        column_addition,
    ),
    "rewritten_sums": Family(
        "basic_arithmetic",
        rewritten_sums,
        {"min_terms": 3, "max_digits": 2, "operators": ("+",), "allow_parentheses": False, "allow_negation": False},
        column_addition,
    ),
    "products": Family("products", products, {"max_digits": 3}),
    "gcd": Family("gcd", gcd),
    "lcm": Family("lcm", lcm),
    "fraction_simplification": Family("fraction_simplification", fraction_simplification, {"styles": ("plain",)}),
    "prime_factorization": Family("prime_factorization", prime_factorization),
    "base_conversion": Family("base_conversion", base_conversion),
    "count_bits": Family("count_bits", count_bits, {"max_n": 1023}),
    "simple_equations": Family("simple_equations", simple_equations),
    "leg_counting": Family("leg_counting", leg_counting, thought=leg_total),
    "letter_counting": Family("letter_counting", letter_counting),
    "number_sorting": Family("number_sorting", number_sorting, {"max_numbers": 6}),
    "number_filtering": Family("number_filtering", number_filtering, {"max_numbers": 6, "max_decimals": 2}),
    "word_sorting": Family("word_sorting", word_sorting, {"max_words": 6}),
    "spell_backward": Family("spell_backward", spell_backward),
    "gsm_symbolic": Family("gsm_symbolic", gsm_symbolic),
}
