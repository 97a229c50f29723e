import pytest

import gpu_poor.isa


@pytest.fixture(params=gpu_poor.isa.available())
def isa(request):
    """Run the test under every instruction set of this CPU, and under plain torch."""
    with gpu_poor.isa.cap(request.param):
        yield request.param
