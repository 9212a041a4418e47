"""Holds the train state, the step that changes it and the optimizer; the loop itself is in train.py."""
