"""Compiles steps for devices that need not be there and says what they cost."""
