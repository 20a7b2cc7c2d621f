"""Model families, one file each, and what fills them."""
