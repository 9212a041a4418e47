"""Holds one file a command and what all commands share; only train.py, eval.py and benchmarks/ import this room."""
