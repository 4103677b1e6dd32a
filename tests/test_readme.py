"""The README's code, run as it stands there."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(blocks) >= 5
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    ens, again, x_test = names["ens"], names["again"], names["x_test"]
    assert len(again) == len(ens) == 5
    np.testing.assert_array_equal(again.predict(x_test, verbose=0), ens.predict(x_test, verbose=0))
    assert ens.predict_members(x_test, verbose=0).shape == (5, 450, 10)
    assert ens.evaluate(x_test, names["y_test"], verbose=0)[1] > 0.9
