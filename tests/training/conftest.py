"""Fixtures around a small random FLUX."""

from tests.support.flux import _one_thread, flux, inputs, model, records, settings  # noqa: F401
