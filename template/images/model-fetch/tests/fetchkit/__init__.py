"""What the tests of model-fetch are made with: models, stores, a proxy that breaks things, runs."""
