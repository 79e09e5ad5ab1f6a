"""Operators of a training step, forward and backward, each with a plain twin."""
