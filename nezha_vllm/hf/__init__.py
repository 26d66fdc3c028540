"""The transformers side: models, tokenizer and checkpoint folders. What vLLM serves is compared with this."""
