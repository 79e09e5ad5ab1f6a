"""GGUF: the container read and written, what its keys and names mean for `deepseek2`, its types."""
