import csv
import math

import pytest
import torch
from torch import nn

from foveate.tasks.checkpoint import Checkpoint
from foveate.tasks.train import fit


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))


def train(net, keep=None, *, steps=20, stop=None, bad=None, **options):
    """Train with dropout, so that the random numbers of torch matter; `stop` interrupts."""

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        found = (net(x) - x.sum(1, keepdim=True)).square().mean()
        return found * math.nan if step == bad else found

    return fit(net.parameters(), loss, steps=steps, lr=0.01, keep=keep, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("stop", [5, 6, 13])
def test_an_interrupted_training_ends_bitwise_as_one_that_was_not(tmp_path, stop):
    whole = model()
    want = train(whole)
    first = model()
    with pytest.raises(KeyboardInterrupt):
        train(first, Checkpoint(tmp_path, first, {"task": "sum"}, every=5), stop=stop)
    second = model()
    torch.manual_seed(999)
    keep = Checkpoint(tmp_path, second, {"task": "sum"}, every=5)
    assert train(second, keep) == want and same(second, whole)
    third = model()
    assert train(third, Checkpoint(tmp_path, third, {"task": "sum"}, every=5)) == want
    assert same(third, whole)


def test_the_log_has_every_step_once(tmp_path):
    net = model()
    with pytest.raises(KeyboardInterrupt):
        train(net, Checkpoint(tmp_path, net, {}, every=4), stop=11)
    losses = train(net, Checkpoint(tmp_path, net, {}, every=4))
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(20))
    assert [float(row["loss"]) for row in rows] == losses
    assert max(float(row["rate"]) for row in rows) == pytest.approx(0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv"]


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path):
    net = model()
    with pytest.raises(RuntimeError, match=r"nan at step 13 of 20.*checkpoint is in"):
        train(net, Checkpoint(tmp_path, net, {}, every=5), bad=13)
    again = model()
    losses = train(again, Checkpoint(tmp_path, again, {}, every=5))
    assert len(losses) == 20 and all(math.isfinite(x) for x in losses)


def test_checkpoints_of_others_are_refused_and_left_alone(tmp_path):
    net = model()
    train(net, Checkpoint(tmp_path, net, {"task": "sum", "width": 8}))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="made with width=8, now it is 16"):
        train(net, Checkpoint(tmp_path, net, {"task": "sum", "width": 16}))
    with pytest.raises(ValueError, match=r"made with fit=\{.*'steps': 20.*now it is"):
        train(net, Checkpoint(tmp_path, net, {"task": "sum", "width": 8}), steps=30)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "checkpoint.pt").write_bytes(before[:100])
    with pytest.raises(ValueError, match="no checkpoint, or is damaged"):
        train(net, Checkpoint(tmp_path, net, {}))
    torch.save({"weights": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="was not written by a training of foveate"):
        train(net, Checkpoint(tmp_path, net, {}))


def test_options_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Checkpoint(tmp_path, model(), {}, every=0)


def test_tensorboard_hears_the_same_or_is_named_when_missing(tmp_path):
    net = model()
    try:
        keep = Checkpoint(tmp_path, net, {}, tensorboard=True)
    except ImportError as error:
        assert "pip install tensorboard" in str(error)
        return
    train(net, keep)
    assert any(p.name.startswith("events.out.tfevents") for p in tmp_path.iterdir())
