"""Scores every byte of documents exactly once and reports bits per byte."""
