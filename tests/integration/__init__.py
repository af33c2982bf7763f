"""Tests on a real build, real models, real processes."""
