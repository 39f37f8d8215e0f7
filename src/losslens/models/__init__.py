"""The base model, its tokenizer and its adapters."""
