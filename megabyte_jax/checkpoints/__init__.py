"""Saves and restores runs, whole or not at all; how a step is computed is not decided here."""
