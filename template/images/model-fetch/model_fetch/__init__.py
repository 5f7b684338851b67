"""Fetches one pinned model version, whole and verified, into a folder that TEI can load."""

__version__ = "1.0.0"
