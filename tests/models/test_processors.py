import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from infoprune_export.data import testbed
from infoprune_export.models.processors import load_processor

WITHOUT_TORCHVISION = importlib.util.find_spec("torchvision") is None


@pytest.fixture
def published(tmp_path):
    """The shipped folder as published checkpoints are laid out: image settings in their own file, the full class."""
    folder = tmp_path / "model"
    shutil.copytree(
        testbed.checkpoint("testbed/tiny-qwen2.5-vl"), folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    image = {**settings["image_processor"], "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    return folder


def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (98, 126, 3), np.uint8))


@pytest.mark.skipif(not WITHOUT_TORCHVISION, reason="torchvision is installed: the full processor loads")
def test_a_published_layout_loads_without_torchvision(published):
    processor = load_processor(published, "qwen2_5_vl", local_files_only=True)
    shipped = load_processor(testbed.checkpoint("testbed/tiny-qwen2.5-vl"), "qwen2_5_vl", local_files_only=True)
    ours, theirs = (dict(p.image_processor([image()], return_tensors="np")) for p in (processor, shipped))
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])
    np.testing.assert_array_equal(ours["image_grid_thw"], [[1, 14, 18]])
    assert processor.image_token == "<|image_pad|>"
    assert processor.chat_template


@pytest.mark.skipif(not WITHOUT_TORCHVISION, reason="torchvision is installed: the full processor loads")
def test_what_it_saves_names_the_full_class_and_loads_again(published, tmp_path):
    load_processor(published, "qwen2_5_vl", local_files_only=True).save_pretrained(tmp_path / "saved")
    shutil.copy(published / "config.json", tmp_path / "saved")
    named = json.loads((tmp_path / "saved" / "processor_config.json").read_text())["processor_class"]
    assert named == "Qwen2_5_VLProcessor"
    assert (tmp_path / "saved" / "preprocessor_config.json").is_file(), "where the full class finds its video settings"
    again = load_processor(tmp_path / "saved", "qwen2_5_vl", local_files_only=True)
    assert again.image_processor.patch_size == 7


def test_other_families_are_not_helped(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path, "llava", local_files_only=True)
