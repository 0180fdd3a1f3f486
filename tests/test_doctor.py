"""`foveate doctor`: what it says, and that a fault does not escape it."""

import math

import pytest
import torch
from typer.testing import CliRunner

from foveate import native, ops
from foveate.bench import doctor
from foveate.cli import app
from foveate.ops.backend import current


@pytest.fixture
def ask(monkeypatch):
    """Run the command; without a timing unless asked, for that takes the longest."""

    def call(timed=False):
        if not timed:
            monkeypatch.setattr(doctor, "dense_speed", lambda: (0.01, 1.5))
        return CliRunner().invoke(app, ["doctor"])

    return call


def spoiled(monkeypatch, change):
    """Let `change` act on what a primitive gives on every backend but the reference."""

    def call(inputs):
        out, lse = ops.attend(*inputs, causal=True, return_lse=True)
        return (out, lse) if current() == "reference" else change(out, lse)

    monkeypatch.setitem(doctor._CALLS, "attend", (call, torch.float32, 2e-5))


def test_it_says_what_runs_here(ask):
    result = ask(timed=True)
    assert result.exit_code == 0, result.output
    for word in (native.isa(), "torch", torch.__version__, "built-in model", "threads", "attend"):
        assert word in result.output
    assert "NO" not in result.output and "PyTorch's own" in result.output


def test_every_check_passes_and_measures_something():
    checks = list(doctor.checks())
    assert len(checks) == len(doctor._CALLS) and all(check.passed for check in checks)


def test_without_kernels_it_says_so(ask, monkeypatch):
    monkeypatch.setenv("FOVEATE_ISA", "none")
    result = ask()
    assert result.exit_code == 0 and doctor.facts()["backend"] == "torch"
    assert "none (FOVEATE_ISA=none)" in result.output


@pytest.mark.parametrize(
    "change",
    [lambda out, lse: (out + 1e-4, lse), lambda out, lse: (out, lse * math.nan)],
)
def test_a_wrong_result_is_seen_and_ends_with_1(ask, monkeypatch, change):
    spoiled(monkeypatch, change)
    result = ask()
    assert result.exit_code == 1 and result.output.count("NO ") == 1


def test_a_kernel_that_cannot_be_called_ends_with_1_and_its_reason(ask, monkeypatch):
    def stale(out, lse):
        raise RuntimeError("built from other sources")

    spoiled(monkeypatch, stale)
    result = ask()
    assert result.exit_code == 1 and "built from other sources" in result.output
