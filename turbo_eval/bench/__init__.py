"""Speed: llama-bench runs and their records."""
