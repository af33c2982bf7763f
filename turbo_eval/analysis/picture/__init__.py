"""Pictures of a table: the front of quality against memory, on a page and on a terminal."""
