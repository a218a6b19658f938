"""Figures, measured and printed; nothing here is a test."""
