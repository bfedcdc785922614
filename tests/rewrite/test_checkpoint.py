import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.rewrite import checkpoint
from infoprune_export.rewrite.surgery import apply_ffn, apply_heads

HEADS = HeadPlan((4,) * 5, ((), (2,), (0, 1, 2, 3), (0, 3), (1,)))
FFN = FfnPlan(
    (128,) * 5,
    (
        FfnChoice("mlp", tuple(range(64))),
        FfnChoice("mlp", ()),
        FfnChoice("mlp", tuple(range(128))),
        FfnChoice("linear", rank=5),
        FfnChoice("mlp", (3,)),
    ),
)


@pytest.fixture
def pruned(random_vlm):
    """Blocks with 0, 1, some and all heads; FFNs of width 64, 0, all and 1, and a linear one."""
    weights = {
        "3.ffn_in.weight": torch.randn(5, 32),
        "3.ffn_out.weight": torch.randn(32, 5),
        "3.ffn_out.bias": torch.randn(32),
        "1.attention_out.weight": torch.randn(32, 8),
    }
    apply_heads(random_vlm.tower, HEADS, {k: v for k, v in weights.items() if "attention" in k})
    apply_ffn(random_vlm.tower, FFN, {k: v for k, v in weights.items() if "ffn" in k})
    return random_vlm


def save(vlm, folder):
    checkpoint.save(vlm.model, vlm.processor, vlm.tower, folder)
    return folder


def load(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def test_reloaded_model_is_bit_equal(pruned, pixels, tmp_path):
    model = load(save(pruned, tmp_path))
    with torch.no_grad():
        assert torch.equal(tower_of(model).features(pixels), pruned.tower.features(pixels))
    assert tower_of(model).head_counts() == [0, 1, 4, 2, 1]
    assert [shape.size for shape in tower_of(model).ffn_shapes()] == [64, 0, 128, 5, 1]


def test_second_generation_is_bit_equal(pruned, pixels, tmp_path):
    """save_pretrained on a reloaded model writes the record again."""
    load(save(pruned, tmp_path / "first")).save_pretrained(tmp_path / "second")
    with torch.no_grad():
        again = tower_of(load(tmp_path / "second")).features(pixels)
        assert torch.equal(again, pruned.tower.features(pixels))


def test_sharded_checkpoint_is_bit_equal(pruned, pixels, tmp_path):
    save(pruned, tmp_path)
    load(tmp_path).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(tower_of(load(tmp_path / "shards")).features(pixels), pruned.tower.features(pixels))


def test_generate_gives_the_same_tokens(pruned, pixels, tmp_path):
    model = load(save(pruned, tmp_path))
    ids = torch.tensor([[2] + [4] * 64 + [5, 20, 21, 6]])
    inputs = {"input_ids": ids, "pixel_values": pixels["pixel_values"][:1], "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(model.generate(**inputs), pruned.model.generate(**inputs))


def test_reloaded_model_is_an_ordinary_one(pruned, tmp_path):
    model = load(save(pruned, tmp_path))
    assert not model.is_quantized
    assert model.half().dtype == torch.float16
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in pruned.model.parameters())


def test_file_has_no_trace_of_removed_parts(pruned, tmp_path):
    save(pruned, tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items() if "vision" in name}
    block = next(name for name in shapes if "layers.1.self_attn.q_proj.weight" in name)
    assert shapes[block] == (8, 32)
    assert shapes[block.replace("layers.1.self_attn.q_proj", "layers.4.mlp.fc1")] == (1, 32)
    assert not any("layers.0.self_attn.q_proj" in name for name in shapes)


def plant(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj.weight", "layers.0.self_attn.out_proj.bias", "lm_head"])
def test_missing_tensor_raises_and_is_named(pruned, tmp_path, part):
    save(pruned, tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    name = next((n for n in names if part in n and "language" not in n), next(n for n in names if "embed_tokens" in n))
    plant(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(InfopruneError, match="missing tensors"):
        load(tmp_path)


def test_renamed_tensor_raises(pruned, tmp_path):
    save(pruned, tmp_path)
    plant(tmp_path, lambda tensors: tensors.update(stray=torch.zeros(2)))
    with pytest.raises(InfopruneError, match="unexpected tensors: stray"):
        load(tmp_path)


def test_wrongly_shaped_tensor_raises(pruned, tmp_path):
    save(pruned, tmp_path)

    def cut(tensors):
        name = next(n for n in tensors if "layers.2.mlp.fc1.weight" in n and "vision" in n)
        tensors[name] = tensors[name][:100].clone()

    plant(tmp_path, cut)
    with pytest.raises((InfopruneError, RuntimeError), match="mismatch"):
        load(tmp_path)


def test_stock_transformers_refuses_the_checkpoint(pruned, tmp_path):
    """Without our import nothing may be filled in at random, even where only whole heads or all neurons are gone."""
    import subprocess
    import sys

    save(pruned, tmp_path)
    code = "import sys; from transformers import AutoModelForImageTextToText as A; A.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ignore_mismatched_sizes" in result.stderr


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda record: record["blocks"].pop(), "records 4 pruned blocks, the tower has 5"),
        (lambda record: record["blocks"][0].update(num_heads=9), "9 heads of 8 do not fit"),
        (lambda record: record["blocks"][0].update(head_dim=16), "do not fit"),
        (lambda record: record["blocks"][0]["ffn"].update(size=4096), "FFN size 4096"),
        (lambda record: record.update(schema_version=99), "schema_version 99"),
    ],
)
def test_record_that_does_not_fit_raises(pruned, tmp_path, change, match):
    save(pruned, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InfopruneError, match=match):
        load(tmp_path)
