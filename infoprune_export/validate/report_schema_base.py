"""What the forms of reports are made of: strict parts, and the types of their figures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Verdict = Literal["PASS", "FAIL"]
Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Side = Literal["original", "compressed"]


class Part(pydantic.BaseModel):
    """Refuses unknown keys, other types and values that are no finite number."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def schema_of(model: type[Part], name: str) -> dict[str, Any]:
    """A published JSON schema (draft 2020-12) of a model."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:infoprune-export:{name}",
        **model.model_json_schema(),
    }
