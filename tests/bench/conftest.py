"""Fixtures of the bench tests."""

from tests.kernels.conftest import fast_interpreter  # noqa: F401
