"""The thin modules: they hold tensors under the names that others expect and hand them to `ops`."""
