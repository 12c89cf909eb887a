"""The operations, a file for each family; `catalogue` lists them."""
