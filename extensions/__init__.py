"""MLflow-aware Jinja extensions of the template, in layers: each module imports only those below it.

entry → pin → registry, embedding_model → errors; entry → sizing → accelerator → errors.
"""
