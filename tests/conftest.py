"""Fixtures shared by all tests."""

import pytest

from qkernels.testing import isa_cap, supported_isas


@pytest.fixture(params=supported_isas())
def isa(request):
    """Runs the test once under every instruction set that this machine has."""
    with isa_cap(request.param):
        yield request.param
