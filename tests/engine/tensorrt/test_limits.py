"""The tables are about operators and inputs that ONNX has, grow with releases, and agree with the shipped targets."""

from __future__ import annotations

import onnx
import pytest

from infoprune_export.engine.tensorrt.limits import FLOAT_ONLY, LIMITS, ONE_OUTPUT, limits_of
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import TensorRtTarget, assets, load_target

TARGETS = [name for name in assets("targets") if isinstance(load_target(name), TensorRtTarget)]
# Older than every opset that is exported, or never standard; the parser still knows them.
LEGACY = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("10.3.0", (10, 3)),
        ("10.13.3", (10, 3)),
        ("10.16.1", (10, 16)),
        ("10.16.2", (10, 16)),
        ("11.0.0", (10, 16)),
        ("11.4.1", (11, 4)),
        ("12.0.0", (11, 4)),
    ],
)
def test_a_release_is_held_to_the_newest_table_that_is_not_newer(version, release):
    assert limits_of(version).release == release


@pytest.mark.parametrize("version", ["10.2.0", "8.6.1"])
def test_a_release_older_than_every_table_is_refused_in_one_line(version):
    with pytest.raises(InfopruneError, match=rf"TensorRT {version}.*use 10\.3"):
        limits_of(version)


@pytest.mark.parametrize("name", TARGETS)
def test_shipped_targets_state_the_opsets_of_their_release(name):
    target = load_target(name)
    assert tuple(target.opset) == limits_of(target.tensorrt).opset


def test_shipped_targets_need_no_route_that_their_release_lacks():
    routes = {name: (load_target(name).token_select, limits_of(load_target(name).tensorrt)) for name in TARGETS}
    assert routes
    assert all(route != "aot" or limits.aot_plugins for route, limits in routes.values())


def test_support_grows_with_releases():
    assert [limits.release for limits in LIMITS] == sorted(limits.release for limits in LIMITS)
    for older, newer in zip(LIMITS, LIMITS[1:], strict=False):
        assert older.operators < newer.operators
        assert older.opset[1] < newer.opset[1]
        assert newer.constant_inputs.items() <= older.constant_inputs.items()


def test_operators_are_those_of_onnx():
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    names = frozenset.union(*(limits.operators for limits in LIMITS))
    assert names - standard == LEGACY
    assert standard >= FLOAT_ONLY | ONE_OUTPUT
    assert names >= FLOAT_ONLY | ONE_OUTPUT
    # What other exporters use and no release reads.
    assert not names & {"Compress", "Unique", "DynamicQuantizeLinear", "SequenceAt", "Optional", "BitShift", "Det"}


def test_constant_inputs_are_axes_and_the_like():
    expected = {"axes", "axis", "depth", "training_mode", "y_zero_point", "x_zero_point"}
    for limits in LIMITS:
        for name, numbers in limits.constant_inputs.items():
            assert {onnx.defs.get_schema(name).inputs[number].name for number in numbers} <= expected, name
            assert name in limits.operators


@pytest.mark.parametrize(
    ("name", "since"),
    [
        ("Gelu", (10, 3)),
        ("LayerNormalization", (10, 3)),
        ("STFT", (10, 16)),
        ("Attention", (10, 16)),
        ("Swish", (11, 4)),
    ],
)
def test_operators_appear_where_their_release_notes_say(name, since):
    assert {limits.release for limits in LIMITS if name in limits.operators} == {
        limits.release for limits in LIMITS if limits.release >= since
    }
