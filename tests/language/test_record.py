"""Checkpoints with a pruned language model through transformers' own loader."""

from __future__ import annotations

import json

import pytest
import torch
from families import (
    FAMILIES,
    build,
    ffn_plan,
    head_plan,
    own_logits,
    own_tokens,
    prune,
    refitted,
    relative_error,
    seeded,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.language import language_layers
from infoprune_export.rewrite import checkpoint


class NoProcessor:
    """The random models have none, and a checkpoint's weights do not depend on it."""

    def save_pretrained(self, folder):
        pass


def pruned_model(name, *, tower=True):
    """Both layers pruned differently, behind a pruned tower."""
    model = build(name, blocks=4)
    if tower:
        view = tower_of(model)
        heads, ffn = head_plan(view), ffn_plan(view)
        prune(view, heads, ffn, refitted(view, heads, ffn, seeded()))
    first, second = language_layers(model)
    first.keep_heads((2, 3))
    first.keep_neurons(range(0, 64, 3))
    second.keep_heads((0, 3))
    return model


def save(model, folder):
    checkpoint.save(model, NoProcessor(), tower_of(model), folder)
    return folder


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_weights(actual, expected):
    theirs, ours = actual.state_dict(), expected.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(pruned_model("qwen2-vl"), tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_and_again(name, tmp_path):
    model = pruned_model(name)
    loaded = load(save(model, tmp_path / "first"))
    assert_same_weights(loaded, model)
    inputs = tower_of(model).example_inputs(2, seeded())
    assert torch.equal(own_tokens(loaded, inputs), own_tokens(model, inputs))
    assert relative_error(own_logits(loaded, inputs), own_logits(model, inputs)) < 1e-6
    sizes = [(x.num_heads, x.num_key_value_heads, x.num_neurons) for x in language_layers(loaded)]
    assert sizes == [(2, 1, 22), (2, 2, 64)]
    loaded.save_pretrained(tmp_path / "second")
    again = load(tmp_path / "second", dtype=torch.float16)
    assert_same_weights(again, model.to(torch.float16))
    assert config_of(tmp_path / "second")["quantization_config"]["schema_version"] == 2


def test_a_whole_language_model_is_written_as_before(tmp_path):
    model = build("llava", blocks=3)
    tower_of(model).blocks[0].keep_heads((1,))
    record = config_of(save(model, tmp_path))["quantization_config"]
    assert record["schema_version"] == 1
    assert "language" not in record
    assert_same_weights(load(tmp_path), model)


def test_language_models_that_are_not_known_are_left_alone(tmp_path):
    model = build("llava", blocks=3)
    model.model.language_model.config.model_type = "olmo2"
    assert "language" not in config_of(save(model, tmp_path))["quantization_config"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda record: record["language"].pop(), "records 1 pruned language layers, the model has 2"),
        (lambda record: record.update(language=7), "records 7 pruned language layers, the model has 2"),
        (lambda record: record["language"].__setitem__(1, 3), "language layer 1: 3 records no structure"),
        (lambda record: record["language"][0].pop("neurons"), "language layer 0: .* records no structure"),
        (lambda record: record["language"][0].update(num_heads=3, num_key_value_heads=2), "3 query heads over 2"),
        (lambda record: record["language"][0].update(num_heads=4), "4 query heads over 1 key-value heads of 16 do not"),
        (lambda record: record["language"][0].update(num_key_value_heads=0), "2 query heads over 0"),
        (lambda record: record["language"][0].update(num_key_value_heads=-1), "2 query heads over -1"),
        (lambda record: record["language"][1].update(num_heads=2.0), "2.0 query heads over 2"),
        (lambda record: record["language"][1].update(num_heads=0), "0 query heads over 2"),
        (lambda record: record["language"][1].update(head_dim=8), "heads of 8 do not fit"),
        (lambda record: record["language"][0].update(neurons=65), "65 neurons do not fit the 64"),
        (lambda record: record["language"][0].update(neurons=0), "0 neurons do not fit"),
        # A record that could be, of weights that are not.
        (lambda record: record["language"][0].update(neurons=21), "mismatched tensors: .*(gate|up|down)_proj"),
        (lambda record: record["language"][1].update(num_key_value_heads=1), "mismatched tensors: .*[kv]_proj"),
        (lambda record: record.pop("language"), "mismatched tensors"),
        (lambda record: record.update(schema_version=3), "schema_version 3, this version reads up to 2"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(saved, tmp_path, change, match):
    config = config_of(saved)
    change(config["quantization_config"])
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InfopruneError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("part", ["layers.0.self_attn.o_proj.weight", "layers.1.mlp.gate_proj.weight"])
def test_a_missing_tensor_is_refused(saved, tmp_path, part):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(part) and "visual" not in name)]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InfopruneError, match=f"missing tensors: .*{part}"):
        load(tmp_path)
