"""Adapters: from files into models, and back."""
