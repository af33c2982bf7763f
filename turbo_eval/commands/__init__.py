"""One short module a command (or command group); each has `register(app)`."""
