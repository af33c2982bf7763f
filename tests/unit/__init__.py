"""Tests that need no build."""
