"""Figures of each token: the file that llama-kv-eval writes, and paired statistics of two caches."""
