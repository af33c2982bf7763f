"""Speed records as tables and as figures."""
