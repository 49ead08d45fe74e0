"""Clusters shared by the tests of this folder: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.harness import Cluster, serving


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """One prefill and one decode instance, for one module."""
    with serving("--prefill", "1", "--decode", "1") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_pairs() -> Iterator[Cluster]:
    """Two prefill and two decode instances, for one module."""
    with serving("--prefill", "2", "--decode", "2") as cluster:
        yield cluster
