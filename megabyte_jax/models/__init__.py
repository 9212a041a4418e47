"""The models: MEGABYTE and its baselines."""
