"""Real servers for tests, on 127.0.0.1, ended by process id."""
