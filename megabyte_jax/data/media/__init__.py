"""Turns images and recordings into bytes and back, and reads files and sets of them."""
