"""Comparing both sides of a move in full, independently of what batches and catch-ups recorded."""
