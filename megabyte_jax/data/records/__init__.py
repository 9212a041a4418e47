"""Reads the records of JSONL, Parquet and Hugging Face data sets, and compressed files as what they hold."""
