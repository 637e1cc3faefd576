"""Serve a model: vLLM's OpenAI-compatible server with our prompts, `/score` and a web page."""
