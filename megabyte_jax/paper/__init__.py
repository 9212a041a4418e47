"""Holds the paper's rows, configs, printed numbers and tables, and the recipes beside them."""
