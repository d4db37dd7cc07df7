"""Readers of real data, and reading, writing and export of the image pool."""
