"""A complete fine-tuning run on a model that is embedded here: nothing to download."""
