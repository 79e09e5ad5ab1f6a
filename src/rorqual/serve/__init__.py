"""The server: OpenAI's and DeepSeek's routes over the engine."""
