"""`foveate bench basics`: parts by name, and what is measured is shown whatever ends the rest."""

import pytest
import torch

from foveate.bench import basics


@pytest.fixture
def parts(monkeypatch):
    """Parts that take no time; the last one fails."""

    def first(load, rounds):
        yield basics.Line("the first", f"{rounds} rounds", "≤ 1", True)

    def second(load, rounds):
        yield basics.Line("the second", "9 ms", "≤ 2 ms", False)
        raise ValueError("no more")

    monkeypatch.setattr(basics, "PARTS", {"one": first, "two": second})


def test_parts_are_shown_with_their_bars(parts, foveate_command):
    code, out, _ = foveate_command("bench", "basics", "--only=one", "--rounds=3")
    assert code == 0 and "yes" in out and "3 rounds" in out and "the second" not in out


def test_what_is_measured_is_shown_when_a_part_fails(parts, foveate_command):
    code, out, err = foveate_command("bench", "basics")
    assert code != 0 and "no more" in err
    assert "the first" in out and "NO" in out and "9 ms" in out


def test_an_unknown_part_is_named(parts, foveate_command):
    code, out, err = foveate_command("bench", "basics", "--only=one,three")
    assert code != 0 and "no part three; known: one, two" in err and not out


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_pair_on_the_model_gives_ratio_and_gap(rounds, tiny_llama):
    ids = torch.arange(3, 60)[None]
    lines = list(basics.measure(lambda: (tiny_llama, ids), rounds, ["attach", "dense"]))
    assert [line.bar for line in lines] == ["≤ +2 %", "≥ 1.2×, 1e-4"]
    assert "logits within" in lines[1].figure and float(lines[1].figure.split("within")[1]) < 1e-4
