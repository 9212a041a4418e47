"""Bytes for training and evaluation."""
