"""Builds packed folders and prepared data sets once, for training to read."""
