"""Training state: what comes back is what was written, and what is not this training's is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infoprune_export.errors import InfopruneError
from infoprune_export.training.state import STATE, discard_state, restore, store

SCALER = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9, "_growth_tracker": 4}


def fresh(shape: tuple[int, ...] = (3, 2)) -> tuple[dict[str, torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(1)
    # Names may have dots, and one may begin like another.
    trained = {
        name: torch.randn(shape, generator=generator).requires_grad_(True) for name in ("a.weight", "a", "never used")
    }
    return trained, torch.optim.AdamW(trained.values(), lr=0.1)


def step(trained: dict[str, torch.Tensor], optimizer: Any) -> None:
    optimizer.zero_grad()
    (trained["a"].square().sum() + trained["a.weight"].pow(4).sum()).backward()
    optimizer.step()


def test_training_goes_on_from_state_with_the_same_bits(tmp_path):
    trained, optimizer = fresh()
    for _ in range(3):
        step(trained, optimizer)
    sums, buffers = torch.tensor([1.5, 2.5], dtype=torch.float64), {"seen": torch.arange(3)}
    scaler = SimpleNamespace(state_dict=lambda: SCALER)
    store(tmp_path, trained, optimizer, scaler, 3, sums, [{"loss": 0.1}], buffers)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    other, other_optimizer = fresh()
    taken: dict[str, Any] = {}
    back = torch.zeros(2, dtype=torch.float64)
    found = restore(tmp_path, other, other_optimizer, SimpleNamespace(load_state_dict=taken.update), back, taken.update)
    assert found == (3, [{"loss": 0.1}])
    assert torch.equal(back, sums)
    assert torch.equal(taken.pop("seen"), buffers["seen"])
    assert taken == SCALER
    # Killed once more behind the next step.
    step(other, other_optimizer)
    store(tmp_path, other, other_optimizer, None, 4, sums, [])
    last, last_optimizer = fresh()
    assert restore(tmp_path, last, last_optimizer, None, back)[0] == 4
    step(last, last_optimizer)
    for _ in range(2):
        step(trained, optimizer)
    assert all(torch.equal(trained[name], last[name]) for name in trained)


def test_without_state_training_begins(tmp_path):
    trained, optimizer = fresh()
    before = {name: value.clone() for name, value in trained.items()}
    assert restore(tmp_path, trained, optimizer, None, torch.zeros(1)) == (0, [])
    assert all(torch.equal(value, before[name]) for name, value in trained.items())


def test_discarded_state_is_gone_and_may_be_gone_already(tmp_path):
    store(tmp_path, *fresh(), None, 1, torch.zeros(1), [])
    discard_state(tmp_path)
    discard_state(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_state_is_written_leaves_the_state_before(tmp_path, monkeypatch):
    import infoprune_export.training.state as module

    trained, optimizer = fresh()
    store(tmp_path, trained, optimizer, None, 1, torch.zeros(1), [])

    def kill(tensors: Any, path: Any, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", kill)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, trained, optimizer, None, 2, torch.zeros(1), [])
    assert restore(tmp_path, trained, optimizer, None, torch.zeros(1))[0] == 1


@pytest.mark.parametrize("case", ["shape", "name", "sums", "buffers", "scaler"])
def test_state_of_another_training_is_refused(tmp_path, case):
    trained, optimizer = fresh()
    store(tmp_path, trained, optimizer, None, 1, torch.zeros(2), [])
    other, other_optimizer = fresh((2, 3) if case == "shape" else (3, 2))
    if case == "name":
        other["b"] = other.pop("a")
    scaler = SimpleNamespace(load_state_dict=dict) if case == "scaler" else None
    take = (lambda buffers: buffers["seen"]) if case == "buffers" else (lambda buffers: None)
    sums = torch.zeros(3 if case == "sums" else 2)
    with pytest.raises(InfopruneError, match=r"training.safetensors: not the state of this training .* delete it"):
        restore(tmp_path, other, other_optimizer, scaler, sums, take)
