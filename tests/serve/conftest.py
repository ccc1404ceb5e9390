"""A small model whose frames are 48 samples."""

import pytest

from fastmimi.devtools.testing import small_model


@pytest.fixture(scope="package")
def model():
    return small_model(upsampling_ratios=[4, 3, 2])
