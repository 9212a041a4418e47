"""Reads documents with random access and cuts them into training batches; models and training are unknown here."""
