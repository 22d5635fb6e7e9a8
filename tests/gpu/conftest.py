"""What tests of the GPU device share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nettorrent_mpi.device.gpu import Gpu
from tests.gpu.compared import HostOps
from tests.gpu.host.runtime import HostRuntime


@pytest.fixture(params=[pytest.param(0, marks=pytest.mark.long), 3], scope="module")
def host_ops(request: pytest.FixtureRequest) -> Iterator[HostOps]:
    """Operations on the host device; its seed shuffles the order of threads and blocks."""
    device = Gpu(HostRuntime(request.param))
    yield HostOps(device)
    device.close()
