"""Recipes and targets: what to do, with which budgets, for which machine.

A recipe is a YAML file checked against `Recipe`. Unknown keys, wrong types and values out of range are refused with
the dotted name of the key. Defaults come from the papers unless the field says otherwise: "A" is the structural paper
(heads, feed-forward networks), "B" the visual-token paper.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    import torch

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


class _Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ── Sections ─────────────────────────────────────────────────────────────────


class ModelSpec(_Spec):
    """The vision-language model to compress."""

    name_or_path: str = Field(min_length=1)
    """A folder, a hub id such as ``llava-hf/llava-1.5-7b-hf`` (nothing else uses the network), or ``testbed/…``."""
    revision: str | None = None
    trust_remote_code: bool = False
    image_packing: Literal["anyres", "tiles"] = "anyres"
    """LLaVA-NeXT only. Its own packing, or all tokens of all tiles (2880 for 2 x 2), as in token pruning papers."""


class DataSpec(_Spec):
    """Images and questions for calibration and validation; an image is used for one of the two, never both.

    Without `images`, procedural scenes are drawn. With `images` alone, calibration distils features and validation
    counts how often both models give the same answer to `prompts`. With `questions` and `annotations` (VQAv2 JSON),
    calibration uses the answers and validation the VQA accuracy.
    """

    images: str | None = None
    questions: str | None = None
    annotations: str | None = None
    prompts: tuple[str, ...] = ("Describe the image.",)
    calibration_images: int = Field(448, ge=1)
    validation_questions: int = Field(2000, ge=1)
    scene_sizes: Literal["square", "mixed"] = "square"
    """Sizes of the procedural scenes: 112 x 112 pixels, or one of seven sizes of about that area for each scene."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _complete(self) -> DataSpec:
        if (self.questions is None) != (self.annotations is None):
            raise ValueError("questions and annotations belong together: give both VQAv2 files or neither")
        if self.questions is not None and self.images is None:
            raise ValueError("questions need images: name the folder their image ids refer to")
        if not self.prompts:
            raise ValueError("prompts is empty: give at least one question")
        return self


class HeadsSpec(_Spec):
    """Attention-head pruning (paper A, section 4.1).

    ``paper`` is its objective to the letter: ``task + alpha |zeta|_1 + beta eRank + gamma KS`` and a threshold.
    ``budgeted`` repairs what was measured to be wrong with it: the penalty is on the gates' sum instead of |zeta|
    (whose minimum is the threshold itself), KS becomes a sorted Wasserstein-1 distance (KS has no gradient), heads are
    chosen by budget, survivors get gate 1, and the output projection is refitted.
    """

    method: Literal["budgeted", "paper", "none"] = "budgeted"
    remove: float = Field(0.5, ge=0, lt=1)
    """Fraction of all heads that ``budgeted`` removes."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """``paper`` keeps a head whose gate is at least this (z)."""
    alpha: float = Field(0.01, ge=0)
    beta: float = Field(0.01, ge=0)
    gamma: float = Field(0.1, ge=0)
    learning_rate: float = Field(1e-2, gt=0)
    epochs: int = Field(7, ge=1)
    batch_size: int = Field(32, ge=1)
    """Images per step."""
    questions_per_image: int = Field(1, ge=1)
    """Drawn anew from the image's questions at every epoch."""
    initial_zeta: float = 3.0
    """The paper says only "a large value"; sigmoid(3) = .95."""


class FfnSpec(_Spec):
    """Feed-forward compression (paper A, section 4.2).

    ``paper`` replaces the network by the truncated SVD of W2 W1 (Algorithm 2): linear, chosen by `epsilon`. ``obs``
    removes neurons: optimal-brain-surgeon cost in the output-gradient metric, widths from one budget over all blocks.
    """

    method: Literal["obs", "paper", "none"] = "obs"
    keep_macs: float = Field(0.5, gt=0, le=1)
    """Fraction of all FFN multiply-accumulates that ``obs`` keeps."""
    round_to: int = Field(64, ge=1)
    """Widths are multiples of this; GEMM kernels waste the rest of a tile."""
    epsilon: float = Field(0.05, gt=0, lt=1)
    """``paper``: keep the fewest singular values with at least (1 - epsilon^2) of the squared sum."""


class RefitSpec(_Spec):
    """Ridge least squares that fits output projections (heads) and down projections (FFN) to the original model."""

    enabled: bool = True
    ridge: float = Field(0.1, gt=0)
    """Added to the normal matrix's diagonal, relative to its mean. On the testbed .001 to .1 are equal at 448 images;
    with few images the larger one is safer."""


class TokensSpec(_Spec):
    """Stage 1 visual-token selection (paper B, section 3.1 and Algorithm 1).

    The paper's own setting is ``prior: cls, quality: softmax, exponent: 0.5, normalize: false, merge_above: -1,
    positions: contiguous``; the defaults differ where it was measured to lose accuracy on the testbeds.
    """

    method: Literal[
        "infoprune",
        "none",
        "random",
        "stride",
        "pool",
        "downsample",
        "fastervlm",
        "visionzip",
        "divprune",
        "cdpruner",
        "vscan",
    ] = "infoprune"
    """``infoprune`` alone can be exported. The others are to compare with, in PyTorch, and take from here `keep_ratio`
    and `positions` only: the controls ``random``, ``stride`` (uniform over the raster), ``pool`` (means over the grid)
    and ``downsample`` (a smaller image); ``fastervlm`` and ``visionzip`` (the tower's attention), ``vscan`` (attention
    of a shallow block and the last), ``divprune`` and ``cdpruner`` (diversity; the latter without text relevance)."""
    keep_ratio: Ratio = Fraction(1, 2)
    """T = ceil(N * keep_ratio)."""
    prior: Literal["cls", "received", "value"] = "value"
    """Attention that ranks tokens: the [CLS] row, what each token receives from all others on average, or that times
    the norm of its value: what it contributes to the others."""
    pool_factor: float = Field(8.0, ge=1)
    """alpha: the greedy step chooses among the ceil(alpha T) tokens with the highest prior; 2 or 3 in the paper. With a
    quality that is not constant the prior has its say in the greedy step, and a small pool loses accuracy at 1/9."""
    quality: Literal["power", "softmax"] = "power"
    """q in Z = sqrt(q) x, from the prior a: (a / max a)^exponent, or the paper's softmax(a / temperature)^exponent,
    which is as good as constant, because attention to one of hundreds of tokens is far smaller than the temperature."""
    exponent: float = Field(1.0, ge=0)
    """gamma_q; 0.5 in the paper."""
    temperature: float = Field(0.7, gt=0)
    """tau of ``softmax``."""
    normalize: bool = True
    """Select on unit-length features, so that novelty counts and length does not."""
    merge: bool = True
    """Fold dropped tokens into the kept token each is most similar to."""
    merge_above: float = Field(0.8, ge=-1, le=1)
    """Only those with at least this cosine similarity; the paper merges all, which costs accuracy at small budgets."""
    inertia: float = Field(1.0, gt=0)
    """Weight of the kept token in its merge; the paper leaves it open."""
    positions: Literal["original", "contiguous"] = "original"
    """Position ids of kept tokens in the language model: where they were, or 0..T-1. The paper leaves it open."""


def _as_layer(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 0):
        return value
    raise ValueError("expected auto or the number of a layer, counted from 0")


class DecoderSpec(_Spec):
    """Stage 2: visual tokens dropped between two layers of the language model (paper B, section 3.2).

    ``random`` is its control; ``fastv``, ``pyramiddrop`` and ``sparsevlm`` are published methods to compare with.
    """

    method: Literal["none", "infoprune", "random", "fastv", "pyramiddrop", "sparsevlm"] = "none"
    layer: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], BeforeValidator(_as_layer)] = "auto"
    """K, from 0: attention in this layer ranks the tokens, and the layers behind it see the kept ones. The paper has 15
    of 32 for LLaVA-7B and 13 of 28 for Qwen2.5-VL-7B. Auto: where the paper's saturation signals settle on the
    calibration images; the published methods take their own layers, scaled to the model's depth."""
    keep_ratio: Ratio = Fraction(1, 3)
    """R2, of the visual tokens that enter the language model."""

    @property
    def finds_layer(self) -> bool:
        """Whether K has to be found; the published methods have layers of their own."""
        return self.layer == "auto" and self.method in ("infoprune", "random")


class ExportSpec(_Spec):
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of weights and activations; the module is exported as it is typed, the graph is never converted."""
    quantization: Literal["none", "int8"] = "none"
    """INT8 weights and activations of linear layers (QDQ), calibrated on the calibration images; needs fp32."""
    images: Literal["auto", "one", "several"] = "auto"
    """Images per call where the family allows any size (Qwen, LLaVA-NeXT). One is faster, and all that token selection
    takes there. Auto: several without selection, one with it."""
    opset: int = Field(20, ge=18, le=22)
    """20 is the newest every supported TensorRT reads (10.3 on Jetson included)."""

    @model_validator(mode="after")
    def _types_fit(self) -> ExportSpec:
        if self.quantization == "int8" and self.precision != "fp32":
            raise ValueError(f"quantization int8 with precision {self.precision}: INT8 is made from fp32; use fp32")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as torch names it."""
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]

    @property
    def several(self) -> bool | None:
        """`images` as the exporter takes it."""
        return None if self.images == "auto" else self.images == "several"

    @property
    def numerics(self) -> str:
        """What tolerances go by: fp32, fp16, bf16 or int8."""
        return "int8" if self.quantization == "int8" else self.precision


class EngineSpec(_Spec):
    target: str = "onnxruntime-cpu"
    """A file of ``engines/targets`` without its suffix, or a path to one."""


class ValidateSpec(_Spec):
    """What the verdict demands. Scales are relative to the largest absolute output."""

    max_accuracy_drop: float = Field(4.0, ge=0)
    """Points, original to engine; the standard error of the difference is printed beside it, not added to it."""
    min_agreement: float = Field(0.8, ge=0, le=1)
    """Without annotations: fraction of questions both models answer alike."""
    rewrite_tolerance: float = Field(1e-5, gt=0)
    onnx_tolerance: float | None = Field(None, gt=0)
    """Largest error, relative. By default 1e-4 in fp32, 3e-2 in fp16, 0.2 in bf16, 0.5 in INT8."""
    min_cosine: float | None = Field(None, ge=0, le=1)
    """By default 0.999999 in fp32, 0.9995 in fp16, 0.99 in bf16, 0.99 in INT8."""
    replay_tolerance: float = Field(1e-2, gt=0)
    """Worst step of the kept indices when replayed in float64: 1 - residual / best residual. Judged in fp32 only: in
    lower precision the features themselves differ by more, and accuracy judges."""
    parity_batches: Sizes = (1, 3, 8)

    @field_validator("parity_batches", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class BenchSpec(_Spec):
    """Latency, original against compressed, interleaved in one process."""

    batch_sizes: Sizes = (1, 16)
    rounds: int = Field(30, ge=3)
    warmup: int = Field(3, ge=0)
    threads: int = Field(1, ge=1)
    """CPU threads inside an operator. One, because small pruned GEMMs scale worse than large ones."""

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Recipe(_Spec):
    """A whole run. `variants` name sets of ``dotted.key: value`` overrides that are run beside it, up to accuracy."""

    name: Name
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelSpec
    data: DataSpec = DataSpec()
    heads: HeadsSpec = HeadsSpec()
    ffn: FfnSpec = FfnSpec()
    refit: RefitSpec = RefitSpec()
    tokens: TokensSpec = TokensSpec()
    decoder: DecoderSpec = DecoderSpec()
    export: ExportSpec = ExportSpec()
    engine: EngineSpec = EngineSpec()
    validate_: ValidateSpec = Field(ValidateSpec(), alias="validate")
    bench: BenchSpec = BenchSpec()
    variants: dict[Name, dict[str, Any]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, keys as in the YAML file."""
        return self.model_dump(mode="json", by_alias=True)


class Target(_Spec):
    """A machine an engine is built for: ``engines/targets/NAME.yaml``."""

    name: str
    description: str
    backend: Literal["onnxruntime"]
    providers: tuple[str, ...] = Field(min_length=1)
    """ONNX Runtime execution providers, most wanted first; the first must be available."""
    graph_optimization: Literal["basic", "extended", "all"] = "all"
    threads: int = Field(0, ge=0)
    """Threads inside an operator; 0 lets ONNX Runtime decide."""

    @field_validator("providers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


# ── Reading ──────────────────────────────────────────────────────────────────


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or shipped name and apply ``dotted.key=value`` overrides (values are YAML).

    Raises:
        InfopruneError: no such file, not YAML, unknown key, wrong type, value out of range.
    """
    path = find_asset("recipes", name)
    tree = _read_mapping(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InfopruneError(f"--set {override!r}: expected KEY=VALUE, for example --set heads.remove=0.25")
        try:
            value = yaml.safe_load(text)
        except _YAML_ERRORS:
            raise InfopruneError(f"--set {override!r:.80}: the value is not valid YAML; quote it") from None
        _check_plain(value, f"--set {key}")
        _assign(tree, key, value)
    recipe = _check(Recipe, tree, path)
    for variant in recipe.variants:
        variant_of(recipe, variant)
    return recipe


def read_recipe(path: Path) -> Recipe:
    """A recipe as a run's folder records it.

    Raises:
        InfopruneError: see `load_recipe`.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    except (ValueError, RecursionError):
        raise InfopruneError(f"{path}: not valid JSON; run the recipe again") from None
    recipe: Recipe = _check(Recipe, tree, path)
    return recipe


def variant_of(recipe: Recipe, variant: str) -> Recipe:
    """The recipe with one variant's overrides applied, and no variants of its own."""
    tree = recipe.to_dict()
    tree.update(name=f"{recipe.name}-{variant}", variants={})
    origin = f"variant {variant!r} of {recipe.name}"
    for key, value in recipe.variants[variant].items():
        try:
            _assign(tree, key, value)
        except InfopruneError as error:
            raise InfopruneError(f"{origin}: {error}") from None
    return _check(Recipe, tree, origin)


def load_target(name: str) -> Target:
    """Read a target by shipped name or path."""
    path = find_asset("targets", name)
    return _check(Target, _read_mapping(path), path)


def assets(kind: Literal["recipes", "targets"]) -> dict[str, Path]:
    """Shipped YAML files by name: from the installed package, or from the source tree."""
    package = Path(str(importlib.resources.files("infoprune_export")))
    source = {"recipes": package.parent / "recipes", "targets": package.parent / "engines" / "targets"}[kind]
    folder = next((f for f in (package / "assets" / kind, source) if f.is_dir()), source)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_asset(kind: Literal["recipes", "targets"], name: str | Path) -> Path:
    """A file given by path, else a shipped one given by name."""
    path = Path(name)
    with contextlib.suppress(OSError):  # a name too long to be one
        if path.is_file():
            return path
    shipped = assets(kind)
    by_name = {alias: file for stem, file in shipped.items() for alias in (stem, f"{stem}.yaml", f"{kind}/{stem}.yaml")}
    if str(name) in by_name:
        return by_name[str(name)]
    what = kind.removesuffix("s")
    raise InfopruneError(
        f"no {what} at {str(name)!r:.200}; give a file or one of: {', '.join(shipped) or 'none shipped'}"
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except _YAML_ERRORS as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise InfopruneError(f"{path}{line}: not valid YAML; check quotes and indentation") from None
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InfopruneError(f"{path}: expected a mapping of keys to values, found {type(tree).__name__}")
    _check_plain(tree, str(path))
    return tree


# What yaml's constructors let through on values such as 2020-13-45, and on nesting without end.
_YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def _check_plain(value: Any, origin: str) -> None:
    """Refuse what YAML allows and JSON does not: aliases that contain themselves, bytes, dates."""
    try:
        json.dumps(value, allow_nan=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise InfopruneError(f"{origin}: not a tree of plain values ({error}); quote the value") from None


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InfopruneError(
                f"{dotted}: {parent!r} is a value, not a section; see infoprune-export recipes --schema"
            )
        tree = child
    tree[last] = value


def _check(spec: type[Any], tree: dict[str, Any], origin: Path | str) -> Any:
    try:
        return spec.model_validate(tree)
    except pydantic.ValidationError as error:
        raise InfopruneError(f"{origin}: {_explain(spec, error)}") from None


def _explain(spec: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """The first problem in one line: dotted key, what is wrong, what is allowed."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        siblings = _fields(spec, location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(siblings)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    return f"{key} = {shown if len(shown) < 60 else shown[:57] + '...'}: {message[0].lower()}{message[1:]}"


def _fields(spec: type[pydantic.BaseModel], location: Sequence[str]) -> list[str]:
    names = {field.alias or name: field.annotation for name, field in spec.model_fields.items()}
    if location and isinstance(child := names.get(location[0]), type) and issubclass(child, pydantic.BaseModel):
        return _fields(child, location[1:])
    return sorted(names)
