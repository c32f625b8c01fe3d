"""Studies of the method at a small scale, each one resumable command."""
