"""Serve a trained model: vLLM's own OpenAI-compatible server with our prompts, `/score` and a web page in front."""
