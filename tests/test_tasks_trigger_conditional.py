import pytest
import torch

from foveate.tasks.trigger_conditional import CONTENT, PLAIN, START, TRIGGER, trigger_conditional


def test_the_target_is_the_mean_of_the_contents_before_the_trigger():
    batch = trigger_conditional(50, seed=0, length=12, dim=6)
    for x, y, at in zip(*batch, strict=True):
        want = torch.zeros_like(x)
        want[at, CONTENT:] = x[1:at, CONTENT:].mean(0)
        torch.testing.assert_close(y, want)
    assert (batch.targets[..., :CONTENT] == 0).all()


def test_marks_say_what_stands_where():
    batch = trigger_conditional(4000, seed=1, length=8)
    at = torch.arange(8)
    assert torch.equal(batch.inputs[..., TRIGGER], (at == batch.trigger[:, None]).float())
    assert torch.equal(batch.inputs[..., START], (at == 0).float().expand(4000, 8))
    assert (batch.inputs[..., :CONTENT].sum(-1) == 1).all()
    assert (batch.inputs[:, 0, CONTENT:] == 0).all()
    content = batch.inputs[:, 1:, CONTENT:]
    assert abs(float(content.mean())) < 0.01 and abs(float(content.std()) - 1) < 0.01
    counts = batch.trigger.bincount(minlength=8)
    assert (counts[:2] == 0).all() and (counts[2:] - 4000 / 6).abs().max() < 100


def one_head(batch, share):
    """ReLU attention from the trigger's mark to the plain mark; `share` divides by position."""
    length = batch.inputs.shape[1]
    scores = batch.inputs[..., TRIGGER, None] * batch.inputs[..., None, :, PLAIN]
    weights = scores.relu().tril() / share(torch.arange(length)).clamp_min(1)[:, None]
    content = batch.inputs.clone()
    content[..., :CONTENT] = 0
    return weights, weights @ content


def test_a_relu_head_that_divides_by_the_averaged_tokens_is_exact_and_rests_at_zero():
    batch = trigger_conditional(200, seed=2)
    weights, output = one_head(batch, lambda i: i - 1)
    torch.testing.assert_close(output, batch.targets)
    assert float(batch.loss(output)) < 1e-12
    rest = batch.inputs[..., TRIGGER] == 0
    assert (weights[rest] == 0).all()


def test_a_relu_head_that_divides_by_the_visible_keys_is_never_exact():
    batch = trigger_conditional(2000, seed=3)
    _, output = one_head(batch, lambda i: i + 1)
    gain = (output * batch.targets).sum() / output.square().sum()  # the best there is
    assert 1 < float(gain) < 3
    assert float(batch.loss(gain * output)) > 0.01 * float(batch.loss(torch.zeros_like(output)))
    for at in (2, 5, 23):  # its gain would have to depend on the position
        here = batch.trigger == at
        got, want = output[here], batch.targets[here]
        torch.testing.assert_close(got * (at + 1) / (at - 1), want)


def test_predicting_nothing_costs_what_is_known():
    zero = [
        float(batch.loss(torch.zeros_like(batch.targets)))
        for batch in (trigger_conditional(2000, seed=s) for s in range(3))
    ]
    want = sum(1 / (at - 1) for at in range(2, 24)) / 22 * 13 / 16 / 24
    assert all(abs(loss / want - 1) < 0.1 for loss in zero)


def test_seeds_reproduce_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (trigger_conditional(4, seed=s).inputs for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"dim": 3}, "dim must be at least 4, got 3"),
    ],
)
def test_refuses_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        trigger_conditional(**{"rows": 2, "seed": 0} | options)
