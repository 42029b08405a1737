"""Units and nouns beside a number: which ones stand there, and whether two answers mean the same.

It must not know how the number itself is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

# One symbol for each unit, and how else it is written. Prefixed forms are spelled out: "mm" and "Mm" differ.
_SPELLINGS = """
$: dollar usd us$ buck | €: euro eur | £: pound-sterling gbp quid | ¥: yen jpy yuan cny | ₹: rupee inr rs rs. | ¢: cent
%: percent pct | °: degree deg | °C: celsius centigrade °c | °F: fahrenheit °f | K: kelvin | rad: radian
km: kilometer kilometre | m: meter metre | dm: decimeter decimetre | cm: centimeter centimetre
mm: millimeter millimetre | nm: nanometer nanometre | μm: µm um micrometer micron
mi: mile | yd: yard | ft: foot feet | in: inch inches
kg: kilogram kilo | g: gram gramme | mg: milligram | t: tonne ton | lb: lbs pound | oz: ounce
s: sec second | ms: millisecond | min: minute mins | h: hr hour | d: day | wk: week | mo: month | yr: year
am: a.m | pm: p.m
L: l liter litre | mL: ml milliliter millilitre cc | gal: gallon | qt: quart | pt: pint | cup: | ha: hectare | acre:
mph: mi/h | kph: km/h kmh | m/s: | W: watt | kW: kilowatt | kWh: | V: volt | A: ampere amp | N: newton | J: joule
kJ: kilojoule | cal: calorie | kcal: | Hz: hertz | kHz: kilohertz | MHz: megahertz | GHz: gigahertz | Pa: pascal | kPa:
Ω: ohm | mol: mole | B: byte | kB: KB kilobyte | MB: megabyte | GB: gigabyte | TB: terabyte
"""
SIGNS = "$€£¥₹¢%°"

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\b\s*")
_DEGREES = re.compile(r"\^?\{?\\circ\b\}?|\\degree\b|º")
_POWERS = (
    (re.compile(r"\bsq(?:uare|\.)?\s+([A-Za-z]+)\b|\b([A-Za-z]+)\s+squared\b"), r"\1\2²"),
    (re.compile(r"\bcubic\s+([A-Za-z]+)\b|\b([A-Za-z]+)\s+cubed\b"), r"\1\2³"),
)
_CELSIUS = re.compile(r"\b(?:°|degrees?)\s*(C\b|F\b|celsius\b|fahrenheit\b)|°\s*(C\b|F\b)", re.IGNORECASE)
_NEUTRAL = re.compile(r"\b(?:in (?:total|all)|altogether|overall|each|left|remaining|exactly|only)\b", re.IGNORECASE)
_PER = re.compile(r"\s+(?:per|an?)\s+(?=[A-Za-z])")
_TOKEN = re.compile(rf"[{re.escape(SIGNS)}]C?F?|[^\W\d_](?:[^\W\d_]|[.'’-](?=[^\W\d_]))*[²³]?(?:/[^\W\d_]+[²³]?)*")


def units_of(text: str) -> list[str]:
    """Return the units and words of the text in order, each unit by its symbol: "square meters a day" → `m²/d`."""
    text = _DEGREES.sub("°", _LATEX_TEXT.sub(" ", text)).replace("{", " ").replace("}", " ").replace("\\", "")
    text = _NEUTRAL.sub(" ", text)
    text = re.sub(r"\s*\^?\s*([23])(?![\d.])", lambda power: "²³"[int(power[1]) - 2], text)
    for pattern, power in _POWERS:
        text = pattern.sub(power, text)
    text = _CELSIUS.sub(lambda found: f"°{(found[1] or found[2])[0].upper()}", text)
    return [_symbol(token) for token in _TOKEN.findall(_PER.sub("/", text))]


def same(wanted: Sequence[str], found: Sequence[str]) -> bool:
    """Whether an answer with the units `found` means what the units `wanted` say. A bare number leaves them out."""
    if not wanted or not found:
        return True
    return found[0] in wanted if _is_unit(found[0]) else bool(set(wanted) & set(found))


def is_known(word: str) -> bool:
    """Whether the word as it is written is a unit, or made of units: "km/h", but not "apples"."""
    return _is_unit(_symbol(word))


def _is_unit(symbol: str) -> bool:
    return all(part.rstrip("²³") in _symbols().values() for part in symbol.split("/"))


def _symbol(token: str) -> str:
    symbol = "/".join(map(_known, token.split("/")))
    return _symbols().get(symbol, symbol)


def _known(word: str) -> str:
    """The symbol of a unit; of another word its singular, as near as an "s" tells."""
    power = word[-1:] if word[-1:] in ("²", "³") else ""
    bare, table = word.removesuffix(power), _symbols()
    lower = bare.lower()
    singular = lower[:-1] if len(lower) > 2 and lower.endswith("s") and not lower.endswith("ss") else lower
    if len(bare) == 1:  # "g" and "G" differ
        return table.get(bare, bare) + power
    return next((table[name] for name in (bare, lower, singular) if name in table), singular) + power


@functools.cache
def _symbols() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in re.split(r"[|\n]", _SPELLINGS.strip()):
        symbol, _, others = entry.strip().partition(":")
        found |= dict.fromkeys([symbol, *others.split()], symbol)
    return found
