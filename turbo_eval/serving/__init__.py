"""From a cache that was measured to a llama-server that runs it."""
