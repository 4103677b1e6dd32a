"""The package: its public names, what it imports, and the examples in its docstrings."""

import doctest
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from ensemble_cases import X, Y, fit
from models import classifier, ensemble_of

import snapshot_ensemble
from snapshot_ensemble import (
    CosineAnnealing,
    GenerateSnapshotCallbacks,
    Report,
    SnapshotEnsemble,
    SnapshotEnsembleCallback,
    VisualizeLR,
    plots,
)
from snapshot_ensemble.losses import GaussianNLL
from snapshot_ensemble.ray import BatchPredictor, fit_chains
from snapshot_ensemble.sklearn import SnapshotEnsembleClassifier, SnapshotEnsembleRegressor


def test_all_public_names_have_docstrings():
    for name in snapshot_ensemble.__all__:
        assert getattr(snapshot_ensemble, name).__doc__


WITHOUT = """
import sys
for name in ("matplotlib", "scipy", "sklearn", "pandas", "tf2onnx", "openvino", "ray", "pyarrow"):
    sys.modules[name] = None  # From now on, importing it is an error.
import snapshot_ensemble
assert snapshot_ensemble.SnapshotEnsemble
del sys.modules["scipy"]  # The package requires it, and `snapshot_ensemble.sklearn` imports it.
try:
    import snapshot_ensemble.sklearn
except ImportError as error:
    assert "pip install 'snapshot-ensemble[sklearn]'" in str(error)
else:
    raise AssertionError
from snapshot_ensemble.ray import BatchPredictor, fit_chains  # Ray is imported where it is used.
"""


@pytest.mark.slow
def test_importing_the_package_does_not_import_optional_dependencies(tmp_path):
    # Blocked rather than checked afterwards, since Keras imports some of them if installed.
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, env=environment, cwd=tmp_path)


EXAMPLES = [
    test
    for public in (
        SnapshotEnsemble,
        CosineAnnealing,
        SnapshotEnsembleCallback,
        GenerateSnapshotCallbacks,
        VisualizeLR,
        fit_chains,
        BatchPredictor,
        plots.plot_early_exit,
        plots.plot_risk_coverage,
        plots.plot_schedule,
        Report.to_frame,
        SnapshotEnsembleClassifier,
        SnapshotEnsembleRegressor,
        GaussianNLL,
    )
    for test in doctest.DocTestFinder().find(public, public.__name__)
    if test.examples
]


def test_the_public_classes_have_examples():
    assert {"SnapshotEnsemble", "CosineAnnealing"} <= {test.name for test in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_do_what_they_show(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ens = ensemble_of(classifier(metrics=None), 2)
    if "merge" in example.name:  # It shows the cycles of a run.
        ens = SnapshotEnsemble(ens.model, cycles=2)
        fit(ens, epochs=2)
    example.globs.update(
        **{name: getattr(snapshot_ensemble, name) for name in snapshot_ensemble.__all__},
        plot_early_exit=plots.plot_early_exit,
        plot_risk_coverage=plots.plot_risk_coverage,
        plot_schedule=plots.plot_schedule,
        fit_chains=fit_chains,
        BatchPredictor=BatchPredictor,
        keras=keras,
        np=np,
        # Not eager where there are hundreds of steps.
        model=classifier(run_eagerly="find_lr" not in example.name),
        ens=ens,
        **{"x": X, "y": Y, "x_val": X, "y_val": Y},
    )
    failed, attempted = doctest.DocTestRunner().run(example, clear_globs=False)
    assert attempted > 0
    assert failed == 0, capsys.readouterr().out
