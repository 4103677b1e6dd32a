"""One export in each format, for the tests of what happens to files."""

import warnings

import pytest
from export_cases import FILES, earlier
from models import dense, ensemble_of


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """A folder with one export in each format."""
    folder = tmp_path_factory.mktemp("exports")
    ens = ensemble_of(dense())
    with warnings.catch_warnings():  # Of TensorFlow and its converters.
        warnings.simplefilter("ignore")
        for name, (first, *_) in FILES.items():
            ens.export(folder / first, name)
    return folder


@pytest.fixture(params=FILES)
def file_format(request):
    return request.param


@pytest.fixture
def old(exports, file_format, tmp_path):
    """The path of an earlier export, among files of the user."""
    return earlier(exports, file_format, tmp_path / "models")
