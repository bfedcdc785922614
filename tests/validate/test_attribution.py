"""Planted faults are attributed to the step and part that they were planted in, and a clean run to none."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from families import build, ffn_plan, head_plan, prune, refitted, seeded

from infoprune_export.engine.onnxruntime import OnnxRuntimeEngine, open_session
from infoprune_export.errors import InfopruneError
from infoprune_export.export.names import boundaries_of, parts_of
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.models import tower_of
from infoprune_export.models.precision import check_keep_fp32
from infoprune_export.models.vlm import VLM, cast
from infoprune_export.recipe import OnnxRuntimeTarget, load_recipe
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate.attribution import Subject, attribute, check_foreign, find_broken, part_rows
from infoprune_export.validate.blocks import Limits, OnnxParts, TorchParts, compare_parts

SELECT = ["tokens.keep_ratio=1/4"]
FAMILIES = ("llava", "qwen2.5-vl")
CPU = OnnxRuntimeTarget(
    name="onnx", description="", backend="onnxruntime", providers=("CPUExecutionProvider",), threads=1
)


def engine(path):
    return OnnxRuntimeEngine(open_session(path, CPU), {})


def vlm(model):
    return VLM(model.eval().requires_grad_(False), None, tower_of(model))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A subject of each family, pruned in every way, with its fp32 file."""
    subjects = {}

    def subject(family):
        if family in subjects:
            return subjects[family]
        model = build(family)
        original = vlm(model)
        heads, ffn = head_plan(original.tower), ffn_plan(original.tower)
        heads = replace(heads, kept=(*heads.kept[:-1], (0, 2, 3)))
        weights = refitted(original.tower, heads, ffn, seeded())
        pruned = vlm(copy.deepcopy(model))
        prune(pruned.tower, heads, ffn, weights)
        pruned.model.eval().requires_grad_(False)
        recipe = load_recipe("quickstart", [*SELECT, f"name=attributed-{family}"])
        folder = tmp_path_factory.mktemp(family)
        export_onnx(pruned.tower, recipe.tokens, folder, opset=20)
        inputs = [(f"{n} images", original.tower.example_inputs(n, seeded(n))) for n in (1, 2)]
        subjects[family] = Subject(
            recipe=recipe,
            original=original,
            only_heads=None,
            by_plans=pruned,
            recovered=pruned,
            pruned=pruned,
            full_copy=vlm(copy.deepcopy(model)),
            heads=heads,
            ffn=ffn,
            weights=weights,
            onnx=folder / MODEL,
            precision=None,
            engines={"onnx": engine(folder / MODEL)},
            engine_file=None,
            providers=(),
            cases=inputs,
        )
        return subjects[family]

    return subject


def cases(subject, tokens):
    form = VisionEncoder(subject.pruned.tower, tokens, None).form
    return [(name, subject.pruned.tower.calls(inputs, form)) for name, inputs in subject.cases]


def broken(subject, rows):
    return [(found["step"], found["part"]) for found in find_broken(subject, [], rows)]


def against_checkpoint(subject, faulty):
    """Parts of a faulty checkpoint, against what it should have been."""
    tokens = subject.recipe.tokens
    reference, candidate = (TorchParts(one.tower, tokens) for one in (subject.recovered, faulty))
    limits = Limits.of("fp32", 1e-2)
    return compare_parts("checkpoint", reference, candidate, cases(subject, tokens), limits, faulty.tower, tokens)


def against_file(subject, path, step="onnx", numerics="fp32"):
    tokens, limits = subject.recipe.tokens, Limits.of(numerics, 1e-2)
    reference = TorchParts(subject.pruned.tower, tokens)
    return compare_parts(step, reference, OnnxParts(path), cases(subject, tokens), limits, subject.pruned.tower, tokens)


@pytest.fixture
def edited(tmp_path):
    """A changed copy of an ONNX file: edit(model) works on the graph with its weights."""

    def edit(source: Path, change):
        model = ir.load(source)
        for value in model.graph.initializers.values():
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        change(model)
        folder = tmp_path / f"edited-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        ir.save(model, folder / MODEL, external_data="weights.data")
        return folder / MODEL

    return edit


# ── Clean ──


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_broken_in_a_clean_run_and_every_part_is_looked_at(made, family):
    subject = made(family)
    found = attribute(subject)
    assert found["broken"] == []
    assert [row["step"] for row in found["steps"]] == ["original", "ffn", "tokens", "onnx"]
    blocks = {f"blocks.{i}.{part}" for i in range(len(subject.pruned.tower.blocks)) for part in ("attention", "ffn")}
    behind = {"embedding", "prior", "selection", "merging"}
    for step in ("rewrite", "checkpoint", "onnx"):
        parts = {row["part"] for row in found["blocks"] if row["step"] == step}
        assert blocks <= parts
        assert (behind - {"embedding"} if step != "rewrite" else {"embedding"}) <= parts
    assert all(row["judged"] for row in found["blocks"])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_say_where_nodes_come_from(made, family):
    model = ir.load(made(family).onnx)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert all(node.name.rpartition("/")[0] == part for node, part in parts_of(model).items())
    blocks = len(made(family).pruned.tower.blocks)
    assert {f"blocks.{i}" for i in range(blocks)} | {f"blocks.{i}.attention" for i in range(blocks)} <= set(
        boundaries_of(model)
    )
    assert not any(node.op_type == "Mark" for node in model.graph)


# ── A checkpoint ──


@pytest.mark.parametrize("block", [1, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_was_sliced_wrongly(made, family, block):
    """The value rows of one head are another's; the next blocks do not answer for it."""
    subject = made(family)
    faulty = vlm(copy.deepcopy(subject.pruned.model))
    block %= len(faulty.tower.blocks)
    chosen = faulty.tower.blocks[block]
    with torch.no_grad():
        weight = chosen.attention_out.weight
        weight[:, : chosen.head_dim] = weight[:, : chosen.head_dim].flip(1)
    assert broken(subject, against_checkpoint(subject, faulty)) == [("checkpoint", f"blocks.{block}.attention")]


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_ffn_bias_that_was_lost(made, family, block):
    subject = made(family)
    faulty = vlm(copy.deepcopy(subject.pruned.model))
    block %= len(faulty.tower.blocks)
    faulty.tower.blocks[block].ffn_out.bias.data.zero_()
    assert broken(subject, against_checkpoint(subject, faulty)) == [("checkpoint", f"blocks.{block}.ffn")]


@pytest.mark.parametrize("family", FAMILIES)
def test_surgery_that_takes_the_wrong_head(made, family):
    subject = made(family)
    model = build(family)
    wrong = vlm(model)
    kept = [*subject.heads.kept[:-1], (0, 1, 3)]
    prune(wrong.tower, replace(subject.heads, kept=tuple(kept)), subject.ffn, subject.weights)
    rows = part_rows(replace(subject, by_plans=wrong, full_copy=vlm(build(family))))
    assert broken(subject, rows) == [("rewrite", f"blocks.{len(kept) - 1}.attention")]


# ── An ONNX file ──


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_ffn_bias_that_a_graph_lost_with_its_nodes(made, family, block, edited):
    subject = made(family)

    def lose(model):
        (name,) = [n for n in model.graph.initializers if _is_down_bias(n, block)]
        tensor = model.graph.initializers[name]
        tensor.const_value = ir.Tensor(np.zeros_like(tensor.const_value.numpy()), name=name)

    path = edited(subject.onnx, lose)
    (found,) = find_broken(replace(subject, onnx=path), [], against_file(subject, path))
    assert (found["step"], found["part"]) == ("onnx", f"blocks.{block}.ffn")
    assert found["nodes"]
    assert all(name.startswith(f"blocks.{block}.ffn/") for name in found["nodes"])


def _is_down_bias(name, block):
    return any(
        f"{stem}.{block}.mlp.{down}.bias" in name for stem in ("layers", "blocks") for down in ("fc2", "down_proj")
    )


def _permuted(model, value, users, axis):
    """Give these users a copy of a value whose first two entries along an axis are swapped."""
    order = ir.Value(name="planted_order", const_value=ir.Tensor(np.array([1, 0]), name="planted_order"))
    model.graph.register_initializer(order)
    rest_start = ir.Value(name="planted_start", const_value=ir.Tensor(np.array([2]), name="planted_start"))
    rest_end = ir.Value(name="planted_end", const_value=ir.Tensor(np.array([2**31]), name="planted_end"))
    axes = ir.Value(name="planted_axis", const_value=ir.Tensor(np.array([axis]), name="planted_axis"))
    for constant in (rest_start, rest_end, axes):
        model.graph.register_initializer(constant)
    first = ir.node("Gather", [value, order], {"axis": axis}, name="planted_first")
    rest = ir.node("Slice", [value, rest_start, rest_end, axes], name="planted_rest")
    joined = ir.node("Concat", [first.outputs[0], rest.outputs[0]], {"axis": axis}, name="planted")
    for node in (first, rest, joined):
        node.outputs[0].name = f"{node.name}_value"
        node.outputs[0].dtype = value.dtype
    for user, place in users:
        user.replace_input_with(place, joined.outputs[0])
    anchor = users[0][0]
    model.graph.insert_before(anchor, [first, rest, joined])


def test_windows_that_are_out_of_order_in_one_block(made, edited):
    """The gather in front of block 1's windowed attention takes two patches in each other's place."""
    subject = made("qwen2.5-vl")
    windowed = [i for i, block in enumerate(subject.pruned.tower.blocks) if block.windowed and block.num_heads]
    assert windowed
    for block in windowed[:2]:

        def disorder(model, block=block):
            parts = parts_of(model)
            inverse = next(value for value in model.graph.inputs if value.name == "window_inverse")
            users = [(n, place) for n, place in inverse.uses() if parts[n] == f"blocks.{block}.attention"]
            assert users
            _permuted(model, inverse, users, 0)

        path = edited(subject.onnx, disorder)
        assert broken(subject, against_file(subject, path)) == [("onnx", f"blocks.{block}.attention")]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tokens_that_were_swapped(made, family, edited):
    subject = made(family)

    def swap(model):
        name = "selected_tokens" if family == "llava" else "image_features"
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
        node = value.producer()
        source = node.inputs[0]
        _permuted(model, source, [(node, 0)], 1)

    path = edited(subject.onnx, swap)
    assert broken(subject, against_file(subject, path)) == [("onnx", "merging")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_of_other_tokens(made, family, edited):
    subject = made(family)

    def change(model):
        (node,) = [node for node in model.graph if node.op_type == "TokenSelect"]
        node.attributes["pool_factor"] = ir.AttrFloat32("pool_factor", 1.0)

    path = edited(subject.onnx, change)
    assert broken(subject, against_file(subject, path)) == [("onnx", "selection")]


def test_a_foreign_file_without_the_names_is_refused(made, tmp_path):
    subject = made("llava")
    check_foreign(subject.onnx, subject.onnx)
    with pytest.raises(InfopruneError, match=r"input '\w+' is on one side only"):
        check_foreign(made("qwen2.5-vl").onnx, subject.onnx)
    bare = onnx.load(subject.onnx, load_external_data=False)
    for node in bare.graph.node:
        for names in (node.input, node.output):
            names[:] = [
                f"x{name}"
                if name.startswith(("blocks", "embed", "visual_tokens", "prior", "kept", "sel"))
                and name != "kept_indices"
                else name
                for name in names
            ]
    del bare.graph.value_info[:]
    shutil.copytree(subject.onnx.parent, tmp_path / "bare")
    (tmp_path / "bare" / MODEL).write_bytes(bare.SerializeToString())
    with pytest.raises(InfopruneError, match="keep their names"):
        check_foreign(tmp_path / "bare" / MODEL, subject.onnx)


def test_a_foreign_file_of_other_outputs_or_types_is_refused(made, tmp_path):
    subject = made("llava")
    model = onnx.load(subject.onnx, load_external_data=False)
    kept = [value for value in model.graph.output if value.name != "kept_indices"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    (tmp_path / "lost.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InfopruneError, match="output 'kept_indices' is not there"):
        check_foreign(tmp_path / "lost.onnx", subject.onnx)
    model = onnx.load(subject.onnx, load_external_data=False)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    (tmp_path / "double.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InfopruneError, match="input 'pixel_values' is DOUBLE, in the run it is FLOAT"):
        check_foreign(tmp_path / "double.onnx", subject.onnx)


def test_a_step_whose_parts_nobody_looked_at_says_so_and_names_every_figure(made):
    """As a TensorRT engine's, which does not show what is inside."""
    subject = made("llava")
    parity = {"cosine": 0.9, "norm_ratio": 1.0, "relative_error": 1e-6, "case": "1 image"}
    row = {"step": "engine", "passed": False, "parity": parity, "tolerance": 1e-4, "min_cosine": 0.999999}
    row["kept_suboptimality"] = 0.02
    (found,) = find_broken(subject, [row], [{"step": "onnx", "passed": True}])
    assert found["reason"] == (
        "largest error 1.0e-06 of the scale (limit 1.0e-04), cosine 0.900000 (limit 0.999999), kept tokens worse than "
        "the best by up to 0.02; parts were not looked at"
    )
    (found,) = find_broken(subject, [row], [{"step": "engine", "passed": True}])
    assert found["reason"].endswith("; every part is within its own limit, so small errors add up")


# ── fp16 ──


def overflowing(family, block):
    """An unpruned model whose FFN neurons in one block exceed fp16, though what they add to the stream does not."""
    made = vlm(build(family))
    ffn = made.tower.blocks[block].ffn_projections
    with torch.no_grad():
        for parameter in ffn["ffn_in"].parameters():
            parameter.mul_(3e5)
        ffn["ffn_out"].weight.mul_(1e-6)
    return made


def narrow(subject, made, folder, keep=()):
    """The subject of an fp16 export of this model, beside its fp32 graph."""
    tokens = subject.recipe.tokens
    for name, tower in (("float", made.tower), ("half", cast(made, torch.float16, keep).tower)):
        (folder / name).mkdir(exist_ok=True)
        if not (folder / name / MODEL).exists() or name == "half":
            export_onnx(tower, tokens, folder / name, opset=20)
    recipe = load_recipe("quickstart", [*SELECT, "export.precision=fp16"])
    file = folder / "half" / MODEL
    return replace(subject, recipe=recipe, pruned=made, onnx=folder / "float" / MODEL, precision=file)


def precision_rows(subject):
    tokens, tower = subject.recipe.tokens, subject.pruned.tower
    pair = OnnxParts(subject.onnx), OnnxParts(subject.precision)
    return compare_parts("precision", *pair, cases(subject, tokens), Limits.of("fp16", 1e-2), tower, tokens)


@pytest.mark.parametrize(
    ("family", "block"), [("llava", 1), pytest.param("qwen2.5-vl", 2, marks=pytest.mark.exhaustive)]
)
def test_fp16_that_overflows_is_found_with_its_nodes_and_mended_by_the_option_it_names(made, family, block, tmp_path):
    model, part = overflowing(family, block), f"blocks.{block}.ffn"
    subject = narrow(made(family), model, tmp_path)
    (found,) = find_broken(subject, [], precision_rows(subject))
    assert (found["step"], found["part"]) == ("precision", part)
    assert found["overflow"]
    assert all(node["node"].startswith(f"{part}/") and node["largest"] > 65504 for node in found["overflow"])
    assert found["fix"] == f"--set export.keep_fp32=[{part}]"
    mended = narrow(subject, model, tmp_path, keep=[part])
    assert find_broken(mended, [], precision_rows(mended)) == []
    names = [{node.name for node in ir.load(file).graph} for file in (mended.onnx, mended.precision)]
    assert {name for name in names[0] if "Cast" not in name} <= names[1]


@pytest.mark.exhaustive
def test_a_stream_that_overflows_is_kept_in_fp32_as_a_whole(made, tmp_path):
    model = vlm(build("llava"))
    with torch.no_grad():
        model.tower.blocks[1].ffn_out.bias[3] = 2e5
    subject = narrow(made("llava"), model, tmp_path)
    found = find_broken(subject, [], precision_rows(subject))
    assert found[0]["part"] == "blocks.1.ffn"
    assert "stream" in found[0]["fix"]
    kept = found[0]["fix"].partition("[")[2].rstrip("]").split(",")
    mended = narrow(subject, model, tmp_path, keep=kept)
    assert find_broken(mended, [], precision_rows(mended)) == []


def test_unknown_parts_are_refused():
    check_keep_fp32(["stream", "blocks.3", "blocks.0.attention"], 4)
    for wrong in ("blocks.4", "blocks.1.mlp", "embedding"):
        with pytest.raises(
            InfopruneError, match=f"'{wrong}' is no part of this encoder; there are stream, and blocks.N"
        ):
            check_keep_fp32([wrong], 4)
