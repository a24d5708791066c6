"""Which tests `make test-fast` leaves out."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every case of a `sampled` test but its first as slow."""
    seen = set()
    for item in items:
        if item.get_closest_marker("sampled") is None:
            continue
        function = item.nodeid.partition("[")[0]
        if function in seen:
            item.add_marker(pytest.mark.slow)
        seen.add(function)
