"""Texts out of unpacked packages, a function a source."""
