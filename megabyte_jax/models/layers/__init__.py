"""Holds what models are built of: attention, the decoder block, stacks of blocks with their caches, dropout and look-ups."""
