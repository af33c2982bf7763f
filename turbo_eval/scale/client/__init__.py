"""The sweep's side: hands out cells, takes in records."""
