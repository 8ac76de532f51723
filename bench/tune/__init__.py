"""Finding the fastest kernel for each product on a GPU."""
