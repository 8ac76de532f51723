"""What the CSV says: the goals, the table, the pictures, the page, the README's figures."""
