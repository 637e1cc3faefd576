"""Serving a trained model: vLLM's own OpenAI-compatible server, with our prompts, `/score` and a page before it."""
