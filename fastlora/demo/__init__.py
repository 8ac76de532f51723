"""A complete fine-tuning run on a model that ships with the package: nothing to download."""
