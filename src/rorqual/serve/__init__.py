"""The server: OpenAI's, Anthropic's and DeepSeek's routes over the engine."""
