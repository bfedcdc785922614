"""A whole recipe: which model and data, and the sections of the other files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from infoprune_export.recipe.base import Name, Spec, tuple_of_list
from infoprune_export.recipe.data import DataSpec
from infoprune_export.recipe.delivery import BenchSpec, EngineSpec, ExportSpec, ValidateSpec
from infoprune_export.recipe.structure import BudgetSpec, FfnSpec, HeadsSpec, LanguageSpec, RecoverySpec, RefitSpec
from infoprune_export.recipe.visual_tokens import DecoderSpec, TokensSpec


class ModelSpec(Spec):
    """The vision-language model to compress."""

    name_or_path: str = Field(min_length=1)
    """A folder, a hub id such as ``llava-hf/llava-1.5-7b-hf`` (nothing else uses the network), or ``testbed/…``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the newest of its main branch by default."""
    trust_remote_code: bool = False
    """Let a hub model run Python of its own. Only for authors you trust."""
    image_packing: Literal["anyres", "tiles"] = "anyres"
    """LLaVA-NeXT only. Its own packing, or all tokens of all tiles (2880 for 2 x 2), as in token pruning papers."""


Values = Annotated[tuple[Any, ...], BeforeValidator(tuple_of_list), Field(min_length=1)]


class Recipe(Spec):
    """A whole run. `variants` name sets of ``dotted.key: value`` overrides that are run beside it, up to accuracy."""

    name: Name
    """Of the run and its folder below ``runs``: letters, digits, dot, dash, underscore."""
    description: str = ""
    """One line, for lists and the report."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of everything that is drawn: scenes, order of batches, random methods."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train, calibrate and answer; ``auto`` is CUDA where there is a device. The engine has its target's."""
    model: ModelSpec
    data: DataSpec = DataSpec()
    heads: HeadsSpec = HeadsSpec()
    ffn: FfnSpec = FfnSpec()
    budget: BudgetSpec = BudgetSpec()
    recovery: RecoverySpec = RecoverySpec()
    language: LanguageSpec = LanguageSpec()
    refit: RefitSpec = RefitSpec()
    tokens: TokensSpec = TokensSpec()
    decoder: DecoderSpec = DecoderSpec()
    export: ExportSpec = ExportSpec()
    engine: EngineSpec = EngineSpec()
    validate_: ValidateSpec = Field(ValidateSpec(), alias="validate")
    bench: BenchSpec = BenchSpec()
    variants: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """Name to overrides; each is a run of its own beside this one, and a row of the report."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted keys and the values that ``sweep`` gives them, in every combination; a single run leaves it alone."""

    @model_validator(mode="before")
    @classmethod
    def _method_under_budget(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        budget, heads = tree.get("budget"), tree.get("heads", {})
        if isinstance(budget, dict) and budget.get("by", "none") != "none" and isinstance(heads, dict):
            return {**tree, "heads": {"method": "obs", **heads}}
        return tree

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        for section, method in (("heads", self.heads.method), ("ffn", self.ffn.method)):
            if self.budget.by != "none" and method != "obs":
                raise ValueError(
                    f"budget.by = {self.budget.by!r} compares damages that only {section}.method obs knows, not "
                    f"{method}; use obs, or budget.by none"
                )
        return self

    @model_validator(mode="after")
    def _something_to_recover(self) -> Recipe:
        if self.recovery.method != "none" and self.heads.method == self.ffn.method == "none":
            raise ValueError(
                f"recovery.method = {self.recovery.method!r}, but heads.method and ffn.method are none, so there is "
                "nothing to recover from; prune something, or use recovery.method none"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, keys as in the YAML file."""
        return self.model_dump(mode="json", by_alias=True)
