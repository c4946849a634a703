"""Keys and values of many rows that share prompts: where they lie, and how transformers models attend to them."""
