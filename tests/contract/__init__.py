"""Verifies TEI's contract (extensions/data/contract.json) on the real server: `make contract`."""
