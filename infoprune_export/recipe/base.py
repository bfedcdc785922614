"""What every section of a recipe is made of."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, PlainSerializer

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


def _as_fraction(value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
        raise ValueError('expected a number or a fraction in quotes such as "1/2"')
    # Text is matched first: Fraction would spend minutes on "1e-99999999".
    if isinstance(value, str) and not re.fullmatch(r"\s*\d{1,9}(\.\d{0,9}|/\d{1,9})?\s*", value):
        raise ValueError(f'{value!r:.40} is not a number or a fraction such as "1/2"')
    try:
        ratio = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{value!r:.40} is not a number or a fraction such as "1/2"') from None
    if isinstance(value, float):
        ratio = ratio.limit_denominator(10_000)
    if not 0 < ratio <= 1:
        raise ValueError(f"{value} is outside (0, 1]: keep at least one token and at most all")
    return ratio


Ratio = Annotated[Fraction, BeforeValidator(_as_fraction), PlainSerializer(str)]
"""A share in (0, 1] of visual tokens: a number, or a fraction in quotes such as "64/576", which is exact."""


def tuple_of_list(value: Any) -> Any:
    """YAML and JSON have lists where a strict field is a tuple."""
    return tuple(value) if isinstance(value, list) else value


class Spec(pydantic.BaseModel):
    """Strict: unknown keys, other types and values that are no finite number are refused.

    The text below a field is its description in the JSON schema and in the reference.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
