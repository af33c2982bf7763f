"""Cache types: block sizes, bits, codebooks."""
