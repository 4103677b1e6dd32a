"""The architecture: public signatures, use of private Keras names, and sizes of modules."""

import ast
import inspect
import pathlib

import keras
import pytest
import tensorflow as tf

import snapshot_ensemble
from snapshot_ensemble import SnapshotEnsemble, plots

HOME = pathlib.Path(snapshot_ensemble.__file__).parent
SIGNATURES = (pathlib.Path(__file__).parent / "public_signatures.txt").read_text("utf-8")
MODULES = sorted(HOME.rglob("*.py"))
OUTSIDE = [path for path in MODULES if "keras_compat" not in path.parts]


def name_of(path):
    return str(path.relative_to(HOME))


def signature(function):
    shown, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def methods(name, kind):
    special = ("__call__", "__len__", "__getitem__", "__iter__")
    for member in sorted(dir(kind)):
        value = inspect.getattr_static(kind, member)
        if member.startswith("_") and member not in special:
            continue
        if isinstance(value, property):
            yield f"{name}.{member}"
        elif inspect.isfunction(value) or isinstance(value, classmethod):
            yield f"{name}.{member}{signature(getattr(kind, member))}"


def test_public_signatures_match_the_list():
    rows = []
    for name in snapshot_ensemble.__all__:
        value = getattr(snapshot_ensemble, name)
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        rows.append(name + ("" if is_error else signature(value)))
        if name in ("SnapshotEnsemble", "CosineAnnealing", "Report", "Cycle"):
            rows += methods(name, value)
    rows += [f"plots.{name}{signature(getattr(plots, name))}" for name in plots.__all__]
    assert "\n".join(rows) == SIGNATURES.strip()


def test_the_ensemble_is_one_class():
    assert SnapshotEnsemble.__mro__ == (SnapshotEnsemble, object)


def private_names():
    """The private names of the Keras and TensorFlow objects that the package handles."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("adam", "mse")
    sequential = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    function = tf.function(lambda: None)
    things = [model, sequential, model.layers[1], model.optimizer, inputs, function]
    things += [keras.metrics.Mean(), keras.losses.MeanSquaredError(), model.weights[0]]
    names = {name for thing in things for name in dir(thing)} | {"_keras_mask"}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


PRIVATE = private_names()


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_private_names_of_keras_are_in_keras_compat_alone(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = []
        wrong += [m for m in modules if m.startswith(("keras.src", "tensorflow.python"))]
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            wrong += [] if is_own else [node.attr]
        if isinstance(node, ast.Constant) and node.value in PRIVATE:
            wrong.append(node.value)
    assert not wrong


def test_the_scan_for_private_names_finds_them():
    assert {"_flatten_layers", "_compile_config", "_learning_rate", "_inbound_nodes"} < PRIVATE
    assert {"_keras_history", "_run_through_graph", "_functional", "_clone"} < PRIVATE


def test_few_modules_need_tensorflow():
    needing = [
        name_of(path)
        for path in MODULES
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Import) and any(a.name == "tensorflow" for a in node.names)
    ]
    assert 0 < len(needing) <= 14


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_small(path):
    """At most 400 lines per file, except ensemble.py, and 40 per function without docstring."""
    text = path.read_text("utf-8")
    if path.name != "ensemble.py":
        assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.count("\n") + 1 if docstring else 0
            # An `__init__` and a `fit` with many arguments are mostly their signatures.
            if path.name != "ensemble.py":
                assert lines <= 40, node.name


def test_methods_of_the_ensemble_delegate():
    """The work is done in other modules, so each method needs only a few statements."""
    (face,) = (path for path in MODULES if path.name == "ensemble.py")
    for node in ast.walk(ast.parse(face.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            statements = [n for top in body for n in ast.walk(top) if isinstance(n, ast.stmt)]
            assert len(statements) <= 13, node.name


@pytest.mark.parametrize("path", sorted(HOME.glob("*/__init__.py")), ids=name_of)
def test_each_subpackage_documents_its_purpose_and_imports(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert len(tree.body) == 1
    docstring = ast.get_docstring(tree)
    assert "mport" in docstring
