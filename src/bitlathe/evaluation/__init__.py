"""Measuring a model, and how far it is from its original."""
