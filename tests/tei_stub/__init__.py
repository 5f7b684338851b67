"""A server that answers as TEI documents it (openapi.json), with faults on demand."""
