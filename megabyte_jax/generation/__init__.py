"""Samples bytes with caches and codes bytes with a model's probabilities."""
