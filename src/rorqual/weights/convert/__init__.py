"""A conversion: planned tensor by tensor, written by threads, resumed where it ended, verified."""
