"""Paths, the project, git, processes: what knows nothing of llama.cpp."""
