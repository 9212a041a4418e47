"""MEGABYTE (arXiv 2305.07185) in JAX."""
