"""Readers of device memory, each with `parse` (pure) apart from `read`."""
