"""Finding the quickest kernel for each product on a GPU."""
