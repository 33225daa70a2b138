"""Image heads: from LLM states to an image, one file per paper."""
