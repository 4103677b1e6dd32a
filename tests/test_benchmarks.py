"""A smoke run of each benchmark: that it runs, and the figures that do not depend on time."""

from benchmarks import shared_backbone


def test_shared_backbone(capsys):
    parameters, ratios = shared_backbone.main(["--rows", "8", "--size", "8", "--pairs", "1"])
    head = (128 * 64 + 64) + (64 * 10 + 10)
    backbone = parameters["one model"] - head
    assert parameters["combined model"] == backbone + 6 * head
    assert set(ratios) == {"combined model", "members side by side"}
    assert "time / one model" in capsys.readouterr().out
