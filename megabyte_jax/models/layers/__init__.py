"""Holds what models are built of: attention, the decoder block, stacks with their caches, dropout and look-ups."""
