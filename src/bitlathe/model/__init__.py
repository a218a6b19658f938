"""The only room that runs transformers modules."""
