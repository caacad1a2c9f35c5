"""A scaling law as a page: figures, tables, what it predicts, and what others have published."""
