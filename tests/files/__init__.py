"""Checkpoints for tests: as other libraries lay them out, and damaged on purpose."""
