"""A model's layers: which there are, which to replace, and what becomes of the model."""
