"""Small graphs that break exactly one rule, each with a twin that breaks none."""

from __future__ import annotations

from dataclasses import dataclass

EVERY = ("jetson-orin-jp62", "jetson-orin-jp72", "h200")
OLD, NEW = EVERY[:1], EVERY[1:]


@dataclass(frozen=True)
class Case:
    """Graphs in ONNX's text form, without their header."""

    rule: str
    node: str
    bad: str
    good: str
    targets: tuple[str, ...] = EVERY
    """Those on which the bad graph is bad; on the others it is as good as its twin."""
    severity: str = "error"
    opset: int = 20
    words: str = ""
    """Part of the problem or the fix."""


def _plain(body: str, inputs: str = "float[N, 64] x", outputs: str = "float[N, 64] y", weights: str = "") -> str:
    return f"g ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {body} }}"


def _shapes(body: str, **options: str) -> str:
    """With x [N, 64], its extents n and integers i [M] at hand."""
    options.setdefault("inputs", "float[N, 64] x, int64[M] i")
    weights = (
        "int64[1] zero = {0}, int64[1] one = {1}, int64 nil = {0}, int64 step = {1}, float none = {0}, "
        "int64[1] wide = {64}, int64 many = {3}"
    )
    return _plain(f"n = Shape <start: int = 0, end: int = 1> (x) {body}", weights=weights, **options)


def _attention(
    scores: str = "s = MatMul (q, k)",
    weights: str = "w = Softmax <axis: int = -1> (s)",
    values: str = "y = MatMul (w, v)",
    head: int = 64,
    inputs: str = "",
    outputs: str = "",
) -> str:
    """[mm] and [soft] name the first product and Softmax; fp16 projections of 64 channels make q, k and v of x."""
    ones = ", ".join(["1"] * 4)
    given = f"float16[1, H, S, {head}] q, float16[1, H, {head}, S] k, float16[1, H, S, {head}] v{inputs}"
    kept = f"float16[1, H, S, {head}] y{outputs}"
    return (
        f"g ({given}) => ({kept}) <float16[4] anchor = {{{ones}}}, float[1] narrow = {{1}}, int64[1] axes = {{-1}}, "
        f"float[1] scale = {{0.1}}, int8[1] zero = {{0}}> "
        f"{{ [mm] {scores} [soft] {weights} [out] {values} }}"
    )


def _loop(carried: str, body: str, trips: str = "many", condition: str = "", scan: str = "") -> str:
    outputs = "state" + (", rows" if scan else "")
    return _shapes(
        f"f = Squeeze (n) "
        f"[loop] {outputs} = Loop <body = turn (int64 number, bool going, float[N, 64] before) => "
        f"(bool on, {carried} after{scan}) {{ on = Identity (going) {body} }}> ({trips}, {condition}, x) "
        "y = Identity (state)" + (" z = Identity (rows)" if scan else ""),
        outputs="float[N, 64] y" + (", float[K, N, 64] z" if scan else ""),
        inputs="float[N, 64] x, int64[M] i, bool b",
    )


def _if(result: str, no: str) -> str:
    return _plain(
        "[choice] y = If (b) <then_branch = yes () => (float[N, 64] u) { u = Neg (x) }, "
        f"else_branch = no () => ({result} u2) {{ u2 = {no} }}>",
        inputs="float[N, 64] x, bool b",
    )


def _local(calls: str, functions: str) -> str:
    return _plain(calls) + functions


def _function(name: str, body: str, domain: str = "local", takes: str = "a", more: str = "") -> str:
    header = f'<domain: "{domain}", opset_import: ["" : 20, "local" : 1, "other" : 1]>'
    return f" {header} {name} {more} ({takes}) => (b) {{ {body} }}"


_DEEP = "".join(_function(f"f{i}", f"b = local.f{i + 1} (a)") for i in range(24)) + _function("f24", "b = Neg (a)")
_SHALLOW = "".join(_function(f"f{i}", f"b = local.f{i + 1} (a)") for i in range(23)) + _function("f23", "b = Neg (a)")
_PLUGIN = 'plugin_namespace: string = "mine"'
_MATRIX = ", ".join(["1"] * 64 * 8)
INFINITE = "31744"
"""The text form gives fp16 by its bits."""

_SUMMED = "s = ReduceSum <keepdims: int = 0> (r) f = Cast <to: int = 1> (s) after = Add (before, f)"

CASES = {
    # ── The file ──
    "opset": Case(
        "opset", "model", _plain("y = Neg (x)"), _plain("y = Neg (x)"), OLD, opset=22, words="export.opset=20"
    ),
    "two functions of a name": Case(
        "function-name",
        "half",
        _local(
            "u = local.half (x) y = other.half (u)",
            _function("half", "b = Neg (a)") + _function("half", "b = Abs (a)", "other"),
        ),
        _local(
            "u = local.half (x) y = local.rest (u)", _function("half", "b = Neg (a)") + _function("rest", "b = Abs (a)")
        ),
    ),
    "deep functions": Case(
        "function-depth", "f0", _local("y = local.f0 (x)", _DEEP), _local("y = local.f0 (x)", _SHALLOW)
    ),
    "an input left out": Case(
        "function-inputs",
        "call",
        _local("[call] y = local.f (x)", _function("f", "b = Neg (a)", takes="a, c")),
        _local("[call] y = local.f (x, x)", _function("f", "b = Neg (a)", takes="a, c")),
    ),
    "a builtin's name": Case(
        "name-clash",
        "mine",
        _local("[mine] y = local.Gelu (x)", _function("Gelu", "b = Neg (a)")),
        _local("[mine] y = local.MyGelu (x)", _function("MyGelu", "b = Neg (a)")),
        words="local::Gelu",
    ),
    "an AOT plugin": Case(
        "plugin",
        "mine",
        _plain(f"[mine] y = local.Mine <{_PLUGIN}, aot: int = 1> (x)"),
        _plain(f"[mine] y = local.Mine <{_PLUGIN}> (x)"),
        OLD,
    ),
    "a plugin in a function": Case(
        "plugin",
        "inner",
        _local("y = local.f (x)", _function("f", f"[inner] b = local.Mine <{_PLUGIN}> (a)")),
        _local("y = local.f (x)", _function("f", "[inner] b = Neg (a)")),
    ),
    "a plugin behind a function": Case(
        "plugin",
        "mine",
        _local(f"[mine] y = local.Mine <{_PLUGIN}> (x)", _function("Mine", "b = Neg (a)", more="<plugin_namespace>")),
        _plain(f"[mine] y = local.Mine <{_PLUGIN}> (x)"),
        OLD,
    ),
    # ── Operators ──
    "an operator nobody reads": Case(
        "operator", "det", _plain("[det] d = Det (x) y = Add (x, d)"), _plain("[det] d = ReduceSum (x) y = Add (x, d)")
    ),
    "an operator of later releases": Case(
        "operator",
        "window",
        _plain("[window] h = HannWindow (k) y = Mul (x, h)", weights="int64 k = {64}"),
        _plain("[window] h = Cast <to: int = 1> (k) y = Mul (x, h)", weights="int64 k = {64}"),
        OLD,
    ),
    "an operator in a loop": Case(
        "operator",
        "inside",
        _loop("float[N, 64]", "[inside] t = Det (before) after = Add (before, t)"),
        _loop("float[N, 64]", "[inside] t = ReduceSum (before) after = Add (before, t)"),
    ),
    "computed axes": Case(
        "constant-input",
        "sum",
        _shapes("a = Sub (n, n) [sum] s = ReduceSum <keepdims: int = 1> (x, a) y = Add (x, s)"),
        _shapes("[sum] s = ReduceSum <keepdims: int = 1> (x, zero) y = Add (x, s)"),
    ),
    "computed axes of Pad": Case(
        "constant-input",
        "pad",
        _shapes("a = Sub (n, n) p = Concat <axis: int = 0> (zero, zero) [pad] y = Pad (x, p, none, a)"),
        _shapes("p = Concat <axis: int = 0> (zero, zero) [pad] y = Pad (x, p, none, zero)"),
        OLD,
    ),
    "NonZero": Case(
        "data-dependent",
        "where",
        _plain(
            "[where] z = NonZero (x) s = ReduceSum <keepdims: int = 0> (z) c = Cast <to: int = 1> (s) y = Add (x, c)"
        ),
        _plain("[where] z = Sign (x) s = ReduceSum <keepdims: int = 0> (z) c = Cast <to: int = 1> (s) y = Add (x, c)"),
    ),
    "an extent from values": Case(
        "data-dependent",
        "range",
        _shapes(
            "c = ReduceMax <keepdims: int = 0> (i) [range] r = Range (nil, c, step) "
            "s = ReduceSum <keepdims: int = 0> (r) f = Cast <to: int = 1> (s) y = Add (x, f)"
        ),
        _shapes(
            "c = Squeeze (n) [range] r = Range (nil, c, step) s = ReduceSum <keepdims: int = 0> (r) "
            "f = Cast <to: int = 1> (s) y = Add (x, f)"
        ),
    ),
    "a mixed extent": Case(
        "data-dependent",
        "expand",
        _shapes(
            "m = Concat <axis: int = 0> (n, i) h = Slice (m, zero, one) s = Concat <axis: int = 0> (h, wide) "
            "[expand] y = Expand (x, s)"
        ),
        _shapes("s = Concat <axis: int = 0> (n, wide) [expand] y = Expand (x, s)"),
    ),
    "a large K": Case(
        "topk",
        "top",
        _plain("[top] v, p = TopK (x, k) y = Relu (v)", weights="int64[1] k = {3840}", inputs="float[N, 4000] x"),
        _plain("[top] v, p = TopK (x, k) y = Relu (v)", weights="int64[1] k = {3839}", inputs="float[N, 4000] x"),
        words="3840, the limit is 3839",
    ),
    "an unsorted K": Case(
        "topk",
        "top",
        _plain("[top] v, p = TopK <sorted: int = 0> (x, k) y = Relu (v)", weights="int64[1] k = {64}"),
        _plain("[top] v, p = TopK <sorted: int = 1> (x, k) y = Relu (v)", weights="int64[1] k = {64}"),
    ),
    "a scan of unknown length": Case(
        "loop",
        "loop",
        _loop("float[N, 64]", "after = Neg (before) row = Identity (after)", trips="f", scan=", float[N, 64] row"),
        _loop("float[N, 64]", "after = Neg (before) row = Identity (after)", scan=", float[N, 64] row"),
        words="scan",
    ),
    "a growing state": Case(
        "loop",
        "loop",
        _loop("float[R, 64]", "after = Concat <axis: int = 0> (before, x)"),
        _loop("float[N, 64]", "after = Add (before, x)"),
        words="changes its shape",
    ),
    "a shrinking state": Case(
        "loop",
        "loop",
        _loop("float[N, 1]", "after = ReduceSum <keepdims: int = 1> (before, one)"),
        _loop("float[N, 64]", "r = ReduceSum <keepdims: int = 1> (before, one) after = Add (before, r)"),
        words="changes its shape",
    ),
    "an extent from a loop's counter": Case(
        "data-dependent",
        "range",
        _loop("float[N, 64]", f"[range] r = Range (nil, number, step) {_SUMMED}"),
        _loop("float[N, 64]", f"[range] r = Range (nil, many, step) {_SUMMED}"),
    ),
    "a condition": Case(
        "loop",
        "loop",
        _loop("float[N, 64]", "after = Neg (before)", condition="b"),
        _loop("float[N, 64]", "after = Neg (before)"),
        severity="warning",
        words="condition",
    ),
    "a trip count from values": Case(
        "loop",
        "loop",
        _shapes(
            "c = ReduceMax <keepdims: int = 0> (i) "
            "[loop] y = Loop <body = turn (int64 number, bool going, float[N, 64] a) => "
            "(bool on, float[N, 64] b) { on = Identity (going) b = Neg (a) }> (c, , x)"
        ),
        _shapes(
            "c = Squeeze (n) [loop] y = Loop <body = turn (int64 number, bool going, float[N, 64] a)"
            " => (bool on, float[N, 64] b) { on = Identity (going) b = Neg (a) }> (c, , x)"
        ),
        severity="warning",
        words="trip count",
    ),
    "branches of another rank": Case(
        "branches",
        "choice",
        _if("float", "ReduceSum <keepdims: int = 0> (x)"),
        _if("float[N, 64]", "Abs (x)"),
    ),
    "a reducing ScatterND": Case(
        "scatter",
        "put",
        _shapes(
            'p = Unsqueeze (i, one) [put] y = ScatterND <reduction: string = "add"> (x, p, u)',
            inputs="float[N, 64] x, int64[M] i, float[M, 64] u",
        ),
        _shapes(
            "p = Unsqueeze (i, one) [put] y = ScatterND (x, p, u)", inputs="float[N, 64] x, int64[M] i, float[M, 64] u"
        ),
    ),
    "ScatterND that says none": Case(
        "scatter",
        "put",
        _shapes(
            'p = Unsqueeze (i, one) [put] y = ScatterND <reduction: string = "none"> (x, p, u)',
            inputs="float[N, 64] x, int64[M] i, float[M, 64] u",
        ),
        _shapes(
            "p = Unsqueeze (i, one) [put] y = ScatterND (x, p, u)", inputs="float[N, 64] x, int64[M] i, float[M, 64] u"
        ),
        OLD,
    ),
    "a reducing ScatterElements": Case(
        "scatter",
        "put",
        _plain(
            '[put] y = ScatterElements <reduction: string = "add"> (x, p, u)',
            inputs="float[N, 64] x, int64[N, 64] p, float[N, 64] u",
        ),
        _plain("[put] y = ScatterElements (x, p, u)", inputs="float[N, 64] x, int64[N, 64] p, float[N, 64] u"),
        severity="warning",
    ),
    "Attention of rank 3": Case(
        "attention",
        "attend",
        _plain(
            "[attend] y = Attention <q_num_heads: int = 1, kv_num_heads: int = 1> (x, x, x)",
            inputs="float[1, N, 64] x",
            outputs="float[1, N, 64] y",
        ),
        _plain("[attend] y = Attention (x, x, x)", inputs="float[1, 1, N, 64] x", outputs="float[1, 1, N, 64] y"),
        NEW,
        opset=23,
        words="rank 3",
    ),
    "Attention with softcap": Case(
        "attention",
        "attend",
        _plain(
            "[attend] y = Attention <softcap: float = 2.0> (x, x, x)",
            inputs="float[1, 1, N, 64] x",
            outputs="float[1, 1, N, 64] y",
        ),
        _plain("[attend] y = Attention (x, x, x)", inputs="float[1, 1, N, 64] x", outputs="float[1, 1, N, 64] y"),
        NEW,
        opset=23,
        words="softcap",
    ),
    "a second output": Case(
        "outputs",
        "norm",
        _plain(
            "[norm] h, m = LayerNormalization (x, s) y = Add (h, m)",
            weights=f"float[64] s = {{{', '.join(['1'] * 64)}}}",
        ),
        _plain("[norm] y = LayerNormalization (x, s)", weights=f"float[64] s = {{{', '.join(['1'] * 64)}}}"),
    ),
    "a zero point": Case(
        "quantization",
        "q",
        _plain(
            "[q] h = QuantizeLinear (x, s, z) y = DequantizeLinear (h, s, nought)",
            weights="float s = {0.1}, int8 z = {3}, int8 nought = {0}",
        ),
        _plain(
            "[q] h = QuantizeLinear (x, s, nought) y = DequantizeLinear (h, s, nought)",
            weights="float s = {0.1}, int8 nought = {0}",
        ),
        words="zero point",
    ),
    "an int32 bias": Case(
        "quantization",
        "bias",
        _plain("[bias] b = DequantizeLinear (w, s) y = Add (x, b)", weights="float s = {0.1}, int32[1] w = {5}"),
        _plain("[bias] b = DequantizeLinear (w, s) y = Add (x, b)", weights="float s = {0.1}, int8[1] w = {5}"),
        words="int32",
    ),
    # ── Tensors ──
    "integer products": Case(
        "operand-type",
        "mm",
        _plain(
            "[mm] p = MatMul (i, i) c = Cast <to: int = 1> (p) y = Add (x, c)",
            inputs="float[64, 64] x, int32[64, 64] i",
            outputs="float[64, 64] y",
        ),
        _plain(
            "j = Cast <to: int = 1> (i) [mm] c = MatMul (j, j) y = Add (x, c)",
            inputs="float[64, 64] x, int32[64, 64] i",
            outputs="float[64, 64] y",
        ),
    ),
    "nine axes": Case(
        "rank",
        "nine",
        _plain(
            "[nine] h = Unsqueeze (x, a) y = ReduceSum <keepdims: int = 0> (h, a)",
            weights="int64[7] a = {0, 1, 2, 3, 4, 5, 6}",
        ),
        _plain(
            "[nine] h = Unsqueeze (x, a) y = ReduceSum <keepdims: int = 0> (h, a)",
            weights="int64[6] a = {0, 1, 2, 3, 4, 5}",
        ),
    ),
    "doubles": Case(
        "dtype",
        "wide",
        _plain("[wide] d = Cast <to: int = 11> (x) y = Cast <to: int = 1> (d)"),
        _plain("[wide] d = Cast <to: int = 10> (x) y = Cast <to: int = 1> (d)"),
        severity="warning",
    ),
    "16-bit integers": Case(
        "dtype",
        "short",
        _plain("[short] d = Cast <to: int = 5> (x) y = Cast <to: int = 1> (d)"),
        _plain("[short] d = Cast <to: int = 6> (x) y = Cast <to: int = 1> (d)"),
        words="int16",
    ),
    "a large integer": Case(
        "int64-range",
        "big",
        _plain(
            "h = Mul (i, big) c = Cast <to: int = 1> (h) y = Add (x, c)",
            inputs="float[N, 64] x, int64[N, 64] i",
            weights="int64 big = {2147483648}",
        ),
        _plain(
            "h = Mul (i, big) c = Cast <to: int = 1> (h) z = Slice (x, from, to) y = Add (z, c)",
            inputs="float[N, 64] x, int64[N, 64] i",
            weights="int64 big = {2147483647}, int64[1] from = {0}, int64[1] to = {9223372036854775807}",
        ),
        severity="warning",
    ),
    "an infinite weight": Case(
        "overflow",
        "w",
        _plain(
            "y = MatMul (x, w)",
            inputs="float16[N, 8] x",
            outputs="float16[N, 64] y",
            weights=f"float16[8, 64] w = {{{_MATRIX.replace('1', INFINITE, 1)}}}",
        ),
        _plain(
            "y = MatMul (x, w)",
            inputs="float16[N, 8] x",
            outputs="float16[N, 64] y",
            weights=f"float16[8, 64] w = {{{_MATRIX}}}",
        ),
    ),
    "an infinite weight that is transposed": Case(
        "overflow",
        "w",
        _plain(
            "t = Transpose (w) y = MatMul (x, t)",
            inputs="float16[N, 64] x",
            outputs="float16[N, 8] y",
            weights=f"float16[8, 64] w = {{{_MATRIX.replace('1', INFINITE, 1)}}}",
        ),
        _plain(
            "t = Transpose (w) y = MatMul (x, t)",
            inputs="float16[N, 64] x",
            outputs="float16[N, 8] y",
            weights=f"float16[8, 64] w = {{{_MATRIX}}}",
        ),
    ),
    "a weight too large for fp16": Case(
        "overflow",
        "w",
        _plain(
            "h = Cast <to: int = 10> (w) y = Mul (x, h)",
            inputs="float16[N, 2] x",
            outputs="float16[N, 2] y",
            weights="float[2] w = {1, -65505}",
        ),
        _plain(
            "h = Cast <to: int = 10> (w) y = Mul (x, h)",
            inputs="float16[N, 2] x",
            outputs="float16[N, 2] y",
            weights="float[2] w = {1, -65504}",
        ),
        words="65505",
    ),
    # ── Speed ──
    "an odd width": Case(
        "width",
        "mm",
        _plain(
            "[mm] y = MatMul (x, w)",
            inputs="float16[N, 8] x",
            outputs="float16[N, 12] y",
            weights=f"float16[8, 12] w = {{{', '.join(['1'] * 96)}}}",
        ),
        _plain(
            "[mm] y = MatMul (x, w)",
            inputs="float16[N, 8] x",
            outputs="float16[N, 16] y",
            weights=f"float16[8, 16] w = {{{', '.join(['1'] * 128)}}}",
        ),
        severity="warning",
        words="12 is no multiple of 8",
    ),
    "an odd int8 width": Case(
        "width",
        "mm",
        _plain(
            "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) b = DequantizeLinear (w, s, z) "
            "[mm] y = MatMul (a, b)",
            inputs="float[N, 16] x",
            outputs="float[N, 8] y",
            weights=f"float s = {{0.1}}, int8 z = {{0}}, int8[16, 8] w = {{{', '.join(['1'] * 128)}}}",
        ),
        _plain(
            "[mm] y = MatMul (x, w)",
            inputs="float[N, 16] x",
            outputs="float[N, 8] y",
            weights=f"float[16, 8] w = {{{', '.join(['1'] * 128)}}}",
        ),
        severity="warning",
        words="16 (int8)",
    ),
    "rotary without a cast back": Case(
        "attention-fp32",
        "mm",
        _attention(
            "s = MatMul (qw, kw)", values="y = MatMul (h, v)", weights="w = Softmax (s) h = Cast <to: int = 10> (w)"
        ).replace("{ [mm]", "{ qw = Cast <to: int = 1> (q) kw = Cast <to: int = 1> (k) [mm]"),
        _attention("s = MatMul (qh, k)").replace(
            "{ [mm]", "{ qw = Cast <to: int = 1> (q) qr = Neg (qw) qh = Cast <to: int = 10> (qr) [mm]"
        ),
        severity="warning",
        words="rotary",
    ),
    "softmax without a cast back": Case(
        "attention-fp32",
        "out",
        _attention(weights="w = Softmax (wide)", values="y16 = MatMul (w, vw) y = Cast <to: int = 10> (y16)").replace(
            "[soft]", "wide = Cast <to: int = 1> (s) vw = Cast <to: int = 1> (v) [soft]"
        ),
        _attention(weights="w = Softmax (wide)", values="y = MatMul (h, v)")
        .replace("[soft]", "wide = Cast <to: int = 1> (s) [soft]")
        .replace("[out]", "h = Cast <to: int = 10> (w) [out]"),
        severity="warning",
        words="Softmax's output",
    ),
    "a subtracted maximum": Case(
        "attention-pattern",
        "soft",
        _attention(weights="w = Softmax (d)").replace("[soft]", "m = ReduceMax (s, axes) d = Sub (s, m) [soft]"),
        _attention(weights="w = Softmax (d)", inputs=", float16[1, 1, S, S] mask").replace(
            "[soft]", "d = Add (s, mask) [soft]"
        ),
        severity="warning",
        words="maximum",
    ),
    "a mask behind softmax": Case(
        "attention-pattern",
        "soft",
        _attention(values="y = MatMul (h, v)", inputs=", bool[1, 1, S, S] mask").replace(
            "[out]", "h = Where (mask, w, w) [out]"
        ),
        _attention(weights="w = Softmax (d)", inputs=", bool[1, 1, S, S] mask").replace(
            "[soft]", "d = Where (mask, s, s) [soft]"
        ),
        severity="warning",
        words="Where",
    ),
    "an output inside": Case(
        "attention-pattern",
        "soft",
        _attention(outputs=", float16[1, H, S, S] w"),
        _attention(),
        severity="warning",
        words="output of the graph",
    ),
    "a small head": Case("head-size", "out", _attention(head=8), _attention(head=16), severity="warning"),
    "a large head": Case("head-size", "out", _attention(head=264), _attention(head=256), severity="warning"),
    "an odd head": Case("head-size", "out", _attention(head=36), _attention(head=40), severity="warning"),
}
