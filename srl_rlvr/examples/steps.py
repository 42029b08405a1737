"""How a solution is written as steps: one line each, one move each, the result in sight."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from fractions import Fraction

_SYMBOLS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//"}
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def one_line_each(lines: Iterable[str]) -> list[str]:
    """The lines that hold anything, white space folded: a step ends where its line ends."""
    return [folded for line in lines if (folded := " ".join(line.split()))]


def show(number: Fraction) -> str:
    """`143`, not `143.0`; other values to four decimals at most."""
    return str(number.numerator) if number.denominator == 1 else f"{float(number):.4f}".rstrip("0").rstrip(".")


def operations(expression: str) -> list[str]:
    """One step for each operation of an arithmetic expression, innermost first: `["4 * 3 = 12", "14 - 12 = 2"]`.

    Raises ValueError where the expression is more than numbers, parentheses and `+ - * / //`, or divides by zero.
    """
    steps: list[str] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return Fraction(str(number))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as constant):
                return -value(constant)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = value(operand)
                steps.append(f"-({show(inner)}) = {show(-inner)}")
                return -inner
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SYMBOLS:
                first, second = value(left), value(right)
                result = Fraction(_OPERATORS[type(op)](first, second))
                steps.append(f"{show(first)} {_SYMBOLS[type(op)]} {show(second)} = {show(result)}")
                return result
        raise ValueError(f"'{expression}' holds more than numbers and + - * /")

    try:
        value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"'{expression}' is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError(f"'{expression}' divides by zero") from None
    return steps
