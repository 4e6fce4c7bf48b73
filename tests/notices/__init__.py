"""Notices: every source against a real server, a real signal or a real file."""
