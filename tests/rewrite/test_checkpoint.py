"""Pruned checkpoints of every family through transformers' own loader and generation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from families import (
    FAMILIES,
    build,
    ffn_plan,
    head_plan,
    own_features,
    own_logits,
    own_tokens,
    prune,
    refitted,
    relative_error,
    seeded,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.rewrite import checkpoint
from infoprune_export.rewrite.surgery import FFN_BYPASS, FFN_IN, FFN_OUT

# Blocks of `families.head_plan` and `ffn_plan` by what is left in them.
NO_HEADS, NO_NEURONS, WHOLE, LINEAR, ONE_NEURON, FACTORED, BYPASS = range(7)


class NoProcessor:
    """The random models have none, and a checkpoint's weights do not depend on it."""

    def save_pretrained(self, folder):
        pass


def pruned_model(name):
    """Blocks with none, one, some and all heads; FFNs of no, one, half and all neurons, and of every other kind."""
    tower = tower_of(build(name, blocks=8))
    heads, ffn = head_plan(tower), ffn_plan(tower)
    prune(tower, heads, ffn, refitted(tower, heads, ffn, seeded()))
    return tower.model


def save(model, folder):
    checkpoint.save(model, NoProcessor(), tower_of(model), folder)
    return folder


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def assert_same_model(actual, expected):
    """Every weight bit for bit, and of the same shape."""
    theirs, ours = actual.state_dict(), expected.state_dict()
    assert list(theirs) == list(ours)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype, name
        assert torch.equal(theirs[name], value), name
    assert tower_of(actual).head_counts() == tower_of(expected).head_counts()
    assert tower_of(actual).ffn_shapes() == tower_of(expected).ffn_shapes()


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request):
    return pruned_model(request.param)


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
    return save(pruned, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def inputs(pruned):
    return tower_of(pruned).example_inputs(2, seeded())


# ── There and back ──


def same_but_for_rounding(a, b):
    """Equal weights at differently aligned addresses may take another kernel, and round differently."""
    assert relative_error(a, b) < 1e-6


def test_generate_on_pixels_gives_the_same_tokens(pruned, saved, inputs):
    """The model's own generate, on prompts of two lengths with images of two sizes where the family has them."""
    model = load(saved)
    assert torch.equal(own_tokens(model, inputs), own_tokens(pruned, inputs))
    same_but_for_rounding(own_logits(model, inputs), own_logits(pruned, inputs))


def test_reloaded_model_is_bit_equal(pruned, saved, inputs):
    model = load(saved)
    assert_same_model(model, pruned)
    with torch.no_grad():
        features = tower_of(model).features_of(inputs)
        same_but_for_rounding(features, tower_of(pruned).features_of(inputs))
    assert relative_error(torch.cat(own_features(model, inputs)), features.flatten(0, 1)) <= 1e-5


def test_second_generation_is_bit_equal(pruned, saved, tmp_path):
    """save_pretrained on a reloaded model writes the record again."""
    load(saved).save_pretrained(tmp_path)
    assert_same_model(load(tmp_path), pruned)


def test_sharded_checkpoint_is_bit_equal(pruned, saved, tmp_path):
    load(saved).save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(load(tmp_path), pruned)


def test_pruning_on_is_pruned_on_reload(saved, tmp_path):
    model = load(saved)
    tower = tower_of(model)
    tower.blocks[WHOLE].keep_heads([1])
    tower.blocks[WHOLE].keep_neurons([0, 2])
    assert_same_model(load(save(model, tmp_path)), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(pruned, saved, tmp_path, dtype):
    """Read in half from a file in full, written in half, and read as it is."""
    model = load(saved, dtype=dtype)
    for name, value in pruned.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert_same_model(load(tmp_path, dtype="auto"), model)


def test_device_map_changes_nothing(pruned, saved):
    assert_same_model(load(saved, device_map="cpu"), pruned)


def test_reloaded_model_is_an_ordinary_one(pruned, saved):
    model = load(saved)
    assert not getattr(model, "is_quantized", False)
    assert model.half().dtype == torch.float16
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_testbed_with_its_processor_comes_back(random_vlm, pixels, tmp_path):
    from transformers import AutoProcessor

    random_vlm.tower.blocks[0].keep_heads([])
    checkpoint.save(random_vlm.model, random_vlm.processor, random_vlm.tower, tmp_path)
    assert_same_model(load(tmp_path), random_vlm.model)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == testbed.build_processor().chat_template


# ── What is in the file ──


def names_of(model, saved, block, role):
    """The file's names for a block's weights by role; the inputs of a gated FFN are one."""
    one = tower_of(model).blocks[block]
    names = one._names
    tails = {
        "qkv": [f"{names.attention}.{part}" for part in names.qkv],
        "attention_out": [f"{names.attention}.{names.out}"],
        FFN_IN: [f"{names.ffn}.{part}" for part in names.ffn_in],
        FFN_OUT: [f"{names.ffn}.{names.ffn_out}"],
        "ffn_in_factor": [f"{names.ffn}.{part}_factor" for part in names.ffn_in],
        "ffn_out_factor": [f"{names.ffn}.{names.ffn_out}_factor"],
        FFN_BYPASS: [f"{names.ffn}.bypass"],
    }[role]
    stack = "blocks" if model.config.model_type.startswith("qwen") else "encoder.layers"
    wanted = tuple(f"{stack}.{block}.{tail}.{kind}" for tail in tails for kind in ("weight", "bias"))
    return sorted(name for name in load_file(saved / "model.safetensors") if name.endswith(wanted))


def test_file_has_no_trace_of_removed_parts(pruned, saved):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(saved / "model.safetensors").items()}
    assert names_of(pruned, saved, NO_HEADS, "qkv") == []
    assert [shapes[name] for name in names_of(pruned, saved, NO_HEADS, "attention_out")] == [(64,), (64, 0)]
    parts = 1 if pruned.config.model_type.startswith("qwen") else 3
    one_head = [shapes[name] for name in names_of(pruned, saved, NO_NEURONS, "qkv")]
    assert sorted(one_head) == sorted([(48 // parts,), (48 // parts, 64)] * parts)
    assert {shapes[name] for name in names_of(pruned, saved, NO_NEURONS, FFN_IN)} == {(0,), (0, 64)}
    assert [shapes[name] for name in names_of(pruned, saved, NO_NEURONS, FFN_OUT)] == [(64,), (64, 0)]
    assert [shapes[name] for name in names_of(pruned, saved, LINEAR, FFN_IN)] == [(5, 64)]
    assert [shapes[name] for name in names_of(pruned, saved, LINEAR, FFN_OUT)] == [(64,), (64, 5)]
    assert {shapes[name] for name in names_of(pruned, saved, ONE_NEURON, FFN_IN)} == {(1,), (1, 64)}


def test_file_holds_factors_and_bypass_in_place_of_the_dense_weights(pruned, saved):
    tensors, tower = load_file(saved / "model.safetensors"), tower_of(pruned)
    width, projections = tower.blocks[WHOLE].ffn_shape.size, len(tower.blocks[WHOLE].ffn_projections)

    def weights(number, *roles):
        names = [name for role in (FFN_IN, FFN_OUT, *roles) for name in names_of(pruned, saved, number, role)]
        return sum(tensors[name].numel() for name in names if name.endswith("weight"))

    factored, bypass = tower.blocks[FACTORED].ffn_shape, tower.blocks[BYPASS].ffn_shape
    assert weights(FACTORED, "ffn_in_factor", "ffn_out_factor") == sum(factored.ranks) * (64 + width)
    assert weights(BYPASS, FFN_BYPASS) == 64 * (projections * bypass.size + 2 * bypass.ranks[0])
    # Where the old name is there at all, the shape is another one: a loader that knows nothing of it stops.
    for number in (FACTORED, BYPASS):
        for role in (FFN_IN, FFN_OUT):
            for name in names_of(pruned, saved, number, role):
                dense = tensors[name.replace(f".{number}.", f".{WHOLE}.")]
                assert name.endswith("bias") or tensors[name].shape != dense.shape


# ── Damage ──

PARTS = [
    (NO_HEADS, "attention_out"),
    (NO_NEURONS, "qkv"),
    (NO_NEURONS, FFN_IN),
    (NO_NEURONS, FFN_OUT),
    (WHOLE, "attention_out"),
    (LINEAR, FFN_IN),
    (LINEAR, FFN_OUT),
    (ONE_NEURON, FFN_IN),
    (FACTORED, FFN_IN),
    (FACTORED, "ffn_in_factor"),
    (FACTORED, "ffn_out_factor"),
    (BYPASS, FFN_BYPASS),
    (BYPASS, FFN_OUT),
]


# The record and the loader are one for all families, and the names in a block are these two's or alike.
DAMAGED = pytest.mark.parametrize(
    "pruned",
    [pytest.param(name, marks=() if name in ("llava", "qwen2.5-vl") else pytest.mark.exhaustive) for name in FAMILIES],
    indirect=True,
    scope="module",
)


def copy_with(saved, folder, change):
    """The checkpoint with its tensors changed in place by `change`."""
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved / "config.json", folder)
    return folder


def tail(name):
    """The end of a tensor's name, the same in the file and in the model."""
    return ".".join(name.split(".")[-3:])


@DAMAGED
@pytest.mark.parametrize(("block", "role"), PARTS)
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_missing_tensor_raises_and_is_named(pruned, saved, tmp_path, block, role, which):
    name = names_of(pruned, saved, block, role)[which]
    folder = copy_with(saved, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(InfopruneError, match=rf"missing tensors: .*{tail(name)}"):
        load(folder)


@DAMAGED
@pytest.mark.parametrize(("block", "role"), PARTS)
def test_wrongly_shaped_tensor_raises_and_is_named(pruned, saved, tmp_path, block, role):
    name = names_of(pruned, saved, block, role)[-1]

    def grow(tensors):
        tensors[name] = torch.zeros([extent + 1 for extent in tensors[name].shape])

    folder = copy_with(saved, tmp_path, grow)
    with pytest.raises(InfopruneError, match=rf"mismatched tensors: .*{tail(name)}"):
        load(folder)


def test_wrongly_shaped_tensor_raises_even_when_told_to_ignore_it(pruned, saved, tmp_path):
    name = names_of(pruned, saved, WHOLE, "qkv")[-1]
    folder = copy_with(saved, tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 64)}))
    with pytest.raises(InfopruneError, match=rf"mismatched tensors: .*{tail(name)}"):
        load(folder, ignore_mismatched_sizes=True)


def test_renamed_tensor_raises(pruned, saved, tmp_path):
    name = names_of(pruned, saved, WHOLE, "qkv")[-1]

    def rename(tensors):
        tensors[name.replace(f".{WHOLE}.", ".77.")] = tensors.pop(name)

    with pytest.raises(InfopruneError, match=rf"missing tensors: .*{tail(name)}"):
        load(copy_with(saved, tmp_path, rename))


def test_surplus_tensor_raises(saved, tmp_path):
    with pytest.raises(InfopruneError, match="unexpected tensors: stray"):
        load(copy_with(saved, tmp_path, lambda tensors: tensors.update(stray=torch.zeros(2))))


def test_tensors_of_a_removed_part_raise(pruned, saved, tmp_path):
    """A file from before pruning under a pruned record."""
    name = names_of(pruned, saved, WHOLE, "qkv")[-1].replace(f".{WHOLE}.", f".{NO_HEADS}.")
    with pytest.raises(InfopruneError, match=rf"unexpected tensors: .*{tail(name)}"):
        load(copy_with(saved, tmp_path, lambda tensors: tensors.update({name: torch.zeros(64, 64)})))


def test_missing_tensors_outside_the_blocks_raise(saved, tmp_path):
    parts = ("projector", "merger", "embed_tokens", "lm_head", "image_newline", "patch_embed", "position", "pos_embed")
    names = list(load_file(saved / "model.safetensors"))
    found = [next(name for name in names if part in name) for part in parts if any(part in name for name in names)]
    assert len(found) >= 4
    for name in found:
        folder = copy_with(saved, tmp_path, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(InfopruneError, match=rf"missing tensors: .*{name.split('.')[-1]}"):
            load(folder)


def test_tied_embeddings_are_in_the_file_once_and_come_back(random_vlm, tmp_path):
    model = random_vlm.model
    model.config.quantization_config = checkpoint.InfopruneConfig(blocks=checkpoint.structure_of(random_vlm.tower))
    model.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    assert not any("lm_head" in name for name in names)
    assert_same_model(load(tmp_path), model)
    embeddings = next(name for name in names if "embed_tokens" in name)
    (tmp_path / "damaged").mkdir()
    with pytest.raises(InfopruneError, match="missing tensors: .*(embed_tokens|lm_head)"):
        load(copy_with(tmp_path, tmp_path / "damaged", lambda tensors: tensors.pop(embeddings)))


def test_missing_shard_raises(saved, tmp_path):
    load(saved).save_pretrained(tmp_path, max_shard_size="300KB")
    max(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path)


def test_stock_transformers_refuses_every_checkpoint(tmp_path):
    """Without our import nothing may be filled in at random, even where only whole heads or all neurons are gone."""
    folders = [str(save(pruned_model(name), tmp_path / name)) for name in FAMILIES]
    code = """
import sys
from transformers import AutoModelForImageTextToText as Auto
for folder in sys.argv[1:]:
    try:
        Auto.from_pretrained(folder)
        print("loaded", folder)
    except RuntimeError as error:
        print("refused" if "ignore_mismatched_sizes" in str(error) else error)
assert "infoprune_export" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["refused"] * len(FAMILIES)


@DAMAGED
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda record: record["blocks"].pop(), r"records \d pruned blocks, the tower has \d"),
        (lambda record: record["blocks"][0].update(num_heads=9), "9 heads of 16 do not fit"),
        (lambda record: record["blocks"][0].update(num_heads=-1), "-1 heads of 16 do not fit"),
        (lambda record: record["blocks"][0].update(num_heads=1.5), "1.5 heads of 16 do not fit"),
        (lambda record: record["blocks"][0].update(head_dim=8), "0 heads of 8 do not fit"),
        (lambda record: record["blocks"][0]["ffn"].update(size=4096), "mlp FFN of size 4096 does not fit"),
        (lambda record: record["blocks"][0]["ffn"].update(size=-1), "mlp FFN of size -1 does not fit"),
        (lambda record: record["blocks"][0]["ffn"].update(kind="linear", size=0), "linear FFN of size 0"),
        (lambda record: record["blocks"][0]["ffn"].update(kind="constant"), r"constant FFN of size \d+ does not fit"),
        (lambda record: record["blocks"][0]["ffn"].update(kind="sparse"), r"sparse FFN of size \d+ does not fit"),
        (lambda record: record["blocks"][FACTORED]["ffn"].pop("ranks"), r"factored FFN of size \d+ does not fit"),
        (lambda record: record["blocks"][FACTORED]["ffn"]["ranks"].pop(), r"and ranks \[.*\] does not fit"),
        (lambda record: record["blocks"][FACTORED]["ffn"].update(ranks=[64, 64, 64]), r"and ranks \[64, 64, 64\]"),
        (lambda record: record["blocks"][FACTORED]["ffn"].update(ranks=7), "and ranks 7 does not fit"),
        (lambda record: record["blocks"][FACTORED]["ffn"]["ranks"].__setitem__(0, 1.5), r"and ranks \[1.5, .*fit"),
        (lambda record: record["blocks"][BYPASS]["ffn"].update(ranks=[0]), r"bypass FFN .* and ranks \[0\] does not"),
        (lambda record: record["blocks"][BYPASS]["ffn"].pop("ranks"), r"bypass FFN of size \d+ does not fit"),
        (lambda record: record["blocks"][BYPASS]["ffn"].update(size=0), r"bypass FFN of size 0 and ranks"),
        (lambda record: record["blocks"][WHOLE]["ffn"].update(ranks=[3]), r"mlp FFN .* and ranks \[3\] does not fit"),
        (lambda record: record["blocks"][0].update(ffn="mlp"), "block 0: .* records no structure"),
        (lambda record: record["blocks"][0].pop("ffn"), "block 0: .* records no structure"),
        (lambda record: record["blocks"].__setitem__(0, 7), "block 0: 7 records no structure"),
        (lambda record: record.update(schema_version=99), "schema_version 99"),
    ],
)
def test_record_that_does_not_fit_raises(saved, tmp_path, change, match):
    folder = copy_with(saved, tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InfopruneError, match=match):
        load(folder)
