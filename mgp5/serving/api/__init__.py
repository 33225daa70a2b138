"""OpenAI's APIs, one file each: what a client sends -> conversation and options; events -> what it gets."""
