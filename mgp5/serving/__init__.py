"""An OpenAI-compatible server: one loop decodes and denoises for all requests, and a web app is in front of it."""
