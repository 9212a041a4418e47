"""Shows people progress, pictures and metrics; it computes no result of its own."""
