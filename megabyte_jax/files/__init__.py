"""Writes files whole or not at all, locks folders and speaks to object stores; it knows nothing of runs."""
