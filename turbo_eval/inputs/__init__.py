"""What a measurement reads: models and texts, where they come from, what they hash to."""
